# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "friendli==0.16.3",
#     "httpx==0.28.1",
#     "httpx-sse==0.4.3",
#     "openai==3.54.0",
#     "requests==2.34.2",
# ]
# ///
"""Measure friendli_lite beside the clients that people would use instead.

    uv run benchmarks/against_peers.py            # about five minutes
    uv run benchmarks/against_peers.py --quick    # within one; fewer rounds, so more noise

or with pip (the peers need Python 3.11; the client itself needs neither them nor it):

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install --upgrade pip      # to 26 or newer
    /tmp/peers/bin/pip install --requirements-from-script benchmarks/against_peers.py
    /tmp/peers/bin/python benchmarks/against_peers.py

It prints two Markdown tables: what is to be reached, and the figures of every client.

The server is a process of its own, and has its answers rendered before the first request. The
clients take turns, each turn in a fresh process, so that they share neither memory nor imports nor
one noisy minute. Costs are processor time, user and system, of the client's process alone; ratios
compare the minima of all rounds, since what is above the minimum is the machine's, not the code's.
Needs Unix, and the `openssl` command for a certificate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib.metadata
import inspect
import json
import os
import platform
import resource
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Samples = dict[tuple[str, Callable], list[float]]  # by figure and client, one a round
Cells = tuple[str, ...]
BODY = {"model": "m", "prompt": "Say this is a test!", "max_tokens": 16}

# --- The clients: each makes complete() and stream() for a server's URL ---
# They keep a connection where they can, and are otherwise left at their defaults. Each stands by
# itself, imports included: its source alone is the script whose start is timed.


def friendli_lite(url):
    import friendli_lite

    def complete():
        return friendli_lite.complete(BODY, server_url=url, token="t").text

    def stream():
        return (chunk.text for chunk in friendli_lite.stream(BODY, server_url=url, token="t"))

    return complete, stream


def floor(url):
    """Python's own HTTP and JSON and nothing else: no check, no error, no data class."""
    import http.client
    import json

    scheme, _, rest = url.partition("://")
    host, _, prefix = rest.partition("/")
    connections = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    connection = connections[scheme](host)

    def post(body):
        connection.request("POST", f"/{prefix}/v1/completions", json.dumps(body))
        return connection.getresponse()

    def complete():
        return json.loads(post(BODY).read())["choices"][0]["text"]

    def stream():
        response = post({**BODY, "stream": True})
        rest = b""
        while piece := response.read1():
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if event != b"data: [DONE]":
                    yield json.loads(event[6:])["choices"][0]["text"]

    return complete, stream


def urllib_script(url):
    import json
    import urllib.request

    def post(body):
        headers = {"Authorization": "Bearer t", "Content-Type": "application/json"}
        data = json.dumps(body).encode()
        request = urllib.request.Request(url + "/v1/completions", data, headers)
        return urllib.request.urlopen(request, timeout=600)

    def complete():
        with post(BODY) as response:
            return json.load(response)["choices"][0]["text"]

    def stream():
        with post({**BODY, "stream": True}) as response:
            for line in response:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line[6:])["choices"][0]["text"]

    return complete, stream


def friendli(url):
    from friendli import SyncFriendli

    completions = SyncFriendli(token="t", x_friendli_team="t").container.completions

    def complete():
        return completions.complete(request=BODY, server_url=url).choices[0].text

    def stream():
        chunks = completions.complete(request={**BODY, "stream": True}, server_url=url)
        return (chunk.data.choices[0].text for chunk in chunks)

    return complete, stream


def openai(url):
    from openai import OpenAI

    completions = OpenAI(base_url=url + "/v1", api_key="t").completions

    def complete():
        return completions.create(**BODY).choices[0].text

    def stream():
        return (chunk.choices[0].text for chunk in completions.create(**BODY, stream=True))

    return complete, stream


def httpx(url):
    import json

    import httpx

    client = httpx.Client(headers={"Authorization": "Bearer t"}, timeout=600)
    url += "/v1/completions"

    def complete():
        return client.post(url, json=BODY).json()["choices"][0]["text"]

    def stream():
        import httpx_sse

        body = {**BODY, "stream": True}
        with httpx_sse.connect_sse(client, "POST", url, json=body) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)["choices"][0]["text"]

    return complete, stream


def requests(url):
    import json

    import requests

    session = requests.Session()
    session.headers["Authorization"] = "Bearer t"
    url += "/v1/completions"

    def complete():
        return session.post(url, json=BODY, timeout=600).json()["choices"][0]["text"]

    def stream():
        with session.post(url, json={**BODY, "stream": True}, stream=True, timeout=600) as response:
            for line in response.iter_lines():
                if line and line != b"data: [DONE]":
                    yield json.loads(line[6:])["choices"][0]["text"]

    return complete, stream


CLIENTS = {
    friendli_lite: "friendli_lite",
    floor: "floor",
    urllib_script: "plain urllib",
    requests: "requests",
    httpx: "httpx (-sse)",
    openai: "openai",
    friendli: "official SDK",
}
STANDARD = "json, ssl, dataclasses, urllib.request"

# --- The server: a path's first part names the answer, as in /events-1000/v1/completions ---

WORDS = [" such", " a", " test", ",", " and", " more", " of", " it", " than", "."]
TEXT = "".join(WORDS)
MB = 1024 * 1024
EVENTS_PER_WRITE = 250  # 50 KB, so that the server is never what is waited for
LENGTHS = (EVENTS_PER_WRITE, 1_000, 100_000)
STAMP_AFTER = 0.02  # seconds, for the client to be waiting by then
REST_AFTER = 0.01  # seconds, to find out a client that holds back what it has for want of more


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def in_pieces(data: bytes, size: int = 64 * 1024) -> list[bytes]:
    return [http_chunk(data[start : start + size]) for start in range(0, len(data), size)]


def sse(text: str, token: int | None = None, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "token": token, "finish_reason": finish_reason}
    event = {"id": "cmpl-26a1e10db8544bc39c7e3f0b2f1d6a90", "object": "text_completion"}
    event |= {"choices": [choice | {"logprobs": None}], "created": 1733382157}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


OK = b"HTTP/1.1 200 OK\r\n"
STREAM_START = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_END = http_chunk(sse("", finish_reason="length") + b"data: [DONE]\n\n") + http_chunk(b"")


def completion() -> bytes:
    choice = {"index": 0, "text": TEXT, "seed": 7, "finish_reason": "length", "tokens": [1778] * 10}
    usage = {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
    answer = {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}
    body = json.dumps(answer).encode()
    return OK + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def rendered_answers() -> dict[str, list[bytes]]:
    """Each answer as the writes that it is sent by."""
    tokens = [sse(WORDS[i % len(WORDS)], token=1778 + i) for i in range(EVENTS_PER_WRITE)]
    apart = b"".join(map(http_chunk, tokens))  # as servers send them, which flush each
    packed = http_chunk(b"".join(tokens))
    streams = {
        "event-of-1MB": in_pieces(sse("x" * MB)),
        "event-of-12MB": in_pieces(sse("x" * 12 * MB)),
        "200MB": in_pieces(sse("x" * 4096) * 16) * (200 * 16),
    }
    for length in LENGTHS:
        streams[f"events-{length}"] = [apart] * (length // EVENTS_PER_WRITE)
        streams[f"packed-{length}"] = [packed] * (length // EVENTS_PER_WRITE)
    framed = {name: [STREAM_START, *writes, STREAM_END] for name, writes in streams.items()}
    return framed | {"completion": [completion()]}


async def send_stamp(writer: asyncio.StreamWriter) -> None:
    """A stream whose first event says when it was sent: the monotonic clock is all processes'."""
    writer.write(STREAM_START)
    await asyncio.sleep(STAMP_AFTER)
    writer.write(http_chunk(sse(repr(time.monotonic()))))
    await asyncio.sleep(REST_AFTER)
    writer.write(STREAM_END)


async def serve(folder: str) -> None:
    """Print the URLs, then serve until standard input ends, which it does with the parent."""
    answers = rendered_answers()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split()[0]
                await reader.readexactly(int(length))
                name = head.split(b"/", 2)[1].decode()
                if name == "stamp":
                    await send_stamp(writer)
                    continue
                for write in answers[name]:
                    writer.write(write)
                    await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    for scheme, tls in (("http", None), ("https", context)):
        server = await asyncio.start_server(converse, "127.0.0.1", 0, ssl=tls)
        print(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()


# --- What one client's process measures; a figure's name ends in its unit ---

IMPORT = f"import (floor: {STANDARD}), ms"
START = "process start to first answer, ms"
EVENT = "streamed event, µs"
PACKED = "streamed event, 250 of them to an HTTP chunk, µs"
MEMORY = "peak memory of a process that streams, MB"
FIRST = "first chunk after it was sent, ms"
CALL = "completion over a kept https connection, µs"
OF_1K, OF_100K = "streamed event of 1,000, µs", "streamed event of 100,000, µs"
OF_1MB, OF_12MB = "event of 1 MB in 64 KiB pieces, ms", "event of 12 MB in 64 KiB pieces, ms"
GROWTH = "growth of peak memory over a stream of 200 MB, MB"
THREAD, THREADS = "elapsed time a completion, 1 thread, µs", "... with 16 threads, µs"


def processor_time(action: Callable[[], object], times: int, spend: float) -> float:
    """Seconds an action: the least of the means of `times`, as many as `spend` seconds hold."""
    means = []
    deadline = time.monotonic() + spend
    while len(means) < 2 or time.monotonic() < deadline:
        before = time.process_time()
        for _ in range(times):
            action()
        means.append((time.process_time() - before) / times)
    return min(means)


def drain(stream: Callable[[], Iterator[str]], characters: int) -> None:
    """Read to the end; a client that lost text on the way would not be comparable."""
    if (seen := sum(map(len, stream()))) != characters:
        sys.exit(f"{seen:,} of {characters:,} characters came out of a stream")


def per_event(client: Callable, url: str, count: int, times: int, spend: float) -> float:
    """Microseconds an event: a long stream less a short one, so that only events count."""

    def cost(length: int) -> float:
        stream, characters = client(f"{url}-{length}")[1], length // len(WORDS) * len(TEXT)
        drain(stream, characters)  # warm-up
        return processor_time(lambda: drain(stream, characters), times, spend)

    return (cost(count) - cost(EVENTS_PER_WRITE)) / (count - EVENTS_PER_WRITE) * 1e6


def per_large_event(client: Callable, url: str, size: int, spend: float) -> float:
    """Milliseconds for a stream of one event of `size` MB; as many MB whatever the size."""
    stream = client(f"{url}/event-of-{size}MB")[1]
    drain(stream, size * MB)  # warm-up
    return processor_time(lambda: drain(stream, size * MB), 12 // size, spend) * 1e3


def per_call(complete: Callable[[], str], spend: float) -> float:
    """Microseconds a completion."""
    complete()  # connects
    return processor_time(complete, 50, spend) * 1e6


def first_chunk(client: Callable, url: str, times: int) -> float:
    """Median of the milliseconds between an event's sending and its arrival at the caller."""
    stream = client(url + "/stamp")[1]

    def latency() -> float:
        chunks = stream()
        stamp = float(next(chunks))
        elapsed = time.monotonic() - stamp
        for _ in chunks:
            pass  # to the end, for the connection to be kept
        return elapsed * 1e3

    return statistics.median(latency() for _ in range(times))


def elapsed_per_call(complete: Callable[[], str], threads: int, calls: int = 400) -> float:
    """Microseconds by the clock on the wall, for as many calls whatever the threads."""
    with ThreadPoolExecutor(threads) as pool:
        before = time.monotonic()
        list(pool.map(lambda _: [complete() for _ in range(calls // threads)], range(threads)))
        return (time.monotonic() - before) / calls * 1e6


def thread_figures(complete: Callable[[], str], times: int) -> dict[str, float]:
    """The least of some in turn, since the wall's clock also sees what else the machine does."""
    pairs = [(elapsed_per_call(complete, 1), elapsed_per_call(complete, 16)) for _ in range(times)]
    one, sixteen = map(min, zip(*pairs, strict=True))
    return {THREAD: one, THREADS: sixteen}


def peak_memory() -> float:
    """Megabytes. Where there is /proc, not by ru_maxrss, which begins with the parent's peak."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def growth_of_peak(stream: Callable[[], Iterator[str]]) -> float:
    before = peak_memory()
    drain(stream, 200 * MB)
    return peak_memory() - before


def measure(client: Callable, http: str, https: str, quick: bool) -> dict[str, float]:
    spend = 0.1 if quick else 0.5
    figures = {
        EVENT: per_event(client, http + "/events", 1_000, 1, spend),
        PACKED: per_event(client, http + "/packed", 1_000, 1, spend),
        MEMORY: peak_memory(),
        FIRST: first_chunk(client, http, 5 if quick else 20),
        CALL: per_call(client(https + "/completion")[0], spend),
    }
    if client is friendli_lite:
        figures |= {
            GROWTH: growth_of_peak(client(http + "/200MB")[1]),
            OF_1K: per_event(client, http + "/events", 1_000, 100, spend),
            OF_100K: per_event(client, http + "/events", 100_000, 1, spend),
            OF_1MB: per_large_event(client, http, 1, spend),
            OF_12MB: per_large_event(client, http, 12, spend),
            **thread_figures(client(http + "/completion")[0], 2 if quick else 5),
        }
    return figures


# --- What starts the processes ---


def run(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(arguments)[-200:]}\n{done.stderr}")
    return done.stdout


def import_time(environment: dict[str, str], modules: str) -> float:
    code = f"import time; t = time.process_time(); import {modules}; print(time.process_time() - t)"
    return float(run(environment, "-c", code)) * 1e3


def start_time(environment: dict[str, str], client: Callable, url: str) -> float:
    """Processor time of a whole process, the interpreter's start included, that asks once."""
    call = f"assert {client.__name__}({url!r} + '/completion')[0]() == {TEXT!r}"

    def ended_children() -> float:  # without the server, which lives on
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = ended_children()
    run(environment, "-c", f"BODY = {BODY}\n{inspect.getsource(client)}\n{call}")
    return (ended_children() - before) * 1e3


def client_environment(certificate: Path) -> dict[str, str]:
    """This process's, less what would change a client's ways; all take a private CA from it."""
    unwanted = ("_PROXY", "FRIENDLI_", "OPENAI_", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not any(u in k.upper() for u in unwanted)}
    trust = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(certificate))
    return kept | trust | {"PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def started_server() -> Iterator[tuple[dict[str, str], str, str]]:
    """Yield the environment for clients, and the URLs for http and https."""
    with tempfile.TemporaryDirectory() as folder:
        command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=benchmark -days 2 "
        command += "-addext subjectAltName=IP:127.0.0.1 "
        command += "-addext keyUsage=digitalSignature,keyCertSign -keyout key.pem -out cert.pem"
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
        command, pipe = [sys.executable, __file__, "serve", folder], subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
            http, https = (server.stdout.readline().strip() for _ in range(2))
            yield client_environment(Path(folder, "cert.pem")), http, https


def sample(rounds: int, quick: bool) -> Samples:
    samples = defaultdict(list)
    with started_server() as (environment, http, https):
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            samples[IMPORT, friendli_lite].append(import_time(environment, "friendli_lite"))
            samples[IMPORT, floor].append(import_time(environment, STANDARD))
            for client in CLIENTS:
                samples[START, client].append(start_time(environment, client, http))
            for client in CLIENTS:
                arguments = ("measure", client.__name__, http, https, "quick" if quick else "")
                figures = json.loads(run(environment, __file__, *arguments))
                for figure, value in figures.items():
                    samples[figure, client].append(value)
    return samples


def wheel_size() -> int | None:
    """Bytes of the wheel, or None if it cannot be built; of a copy, since a build leaves traces."""
    pip, uv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w"], ["uv", "build", "-o"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build"))
        for tool in (pip, uv):
            with contextlib.suppress(OSError):
                subprocess.run([*tool, folder, copy], capture_output=True)
            for wheel in Path(folder).glob("*.whl"):
                return wheel.stat().st_size
    return None


# --- The report ---

RATIOS = (
    (IMPORT, floor, 1.2),
    (START, friendli, 0.17),
    (START, urllib_script, 1.4),
    (EVENT, floor, 1.5),
    (EVENT, friendli, 1 / 50),
    (EVENT, openai, 1 / 12),
    (EVENT, httpx, 1 / 2),
    (PACKED, floor, 1.5),
    (CALL, httpx, 1.0),
    (CALL, openai, 1 / 2),
    (CALL, friendli, 1 / 8),
)


def targets(samples: Samples) -> Iterator[tuple[str, float | None, str, float, str]]:
    """Yield figure, value, "at most" or "at least", limit, unit."""

    def own(figure: str, of: Callable = min) -> float:
        return of(samples[figure, friendli_lite])

    for figure, peer, limit in RATIOS:
        title = f"{figure.rpartition(',')[0]} / {CLIENTS[peer]}"
        yield title, own(figure) / min(samples[figure, peer]), "at most", limit, " x"
    median = own(FIRST, statistics.median)
    yield "first chunk after it was sent, median", median, "at most", 1, " ms"
    longer = own(OF_100K) / own(OF_1K)
    yield "event of 100,000 / of 1,000, or inverse", max(longer, 1 / longer), "at most", 1.15, " x"
    yield "event of 12 MB / of 1 MB", own(OF_12MB) / own(OF_1MB), "at most", 14, " x"
    yield "growth of memory, 200 MB streamed", own(GROWTH, max), "at most", 8, " MB"
    threaded = own(THREAD) / own(THREADS)
    yield "calls a second, 16 threads / 1 thread", threaded, "at least", 0.9, " x"
    module, wheel = (ROOT / "friendli_lite.py").read_bytes(), wheel_size()
    yield "the module", len(module) / 1000, "at most", 45, " KB"
    yield "the module", len(module.splitlines()), "at most", 1000, " lines"
    yield "the wheel", wheel and wheel / 1000, "at most", 25, " KB"


def brief(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def judged(figure: str, value: float | None, sense: str, limit: float, unit: str) -> Cells:
    target = f"{sense} {brief(limit)}{unit}"
    if value is None:
        return figure, "not measured", target, ""
    reached = value >= limit if sense == "at least" else value <= limit
    return figure, brief(value) + unit, target, "yes" if reached else "**no**"


def raw_figures(samples: Samples) -> Iterator[Cells]:
    yield "minimum / median of the rounds", *CLIENTS.values()
    for figure in dict.fromkeys(figure for figure, _ in samples):
        columns = [samples.get((figure, client)) for client in CLIENTS]
        pairs = ((min(column), statistics.median(column)) if column else () for column in columns)
        yield figure, *(" / ".join(map(brief, pair)) for pair in pairs)


def table(head: Cells, *rows: Cells) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def conditions(rounds: int) -> str:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    with contextlib.suppress(OSError):
        model = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
        machine += f" of {model}"
    peers = ("friendli", "openai", "httpx", "httpx-sse", "requests")
    versions = ", ".join(f"{peer} {importlib.metadata.version(peer)}" for peer in peers)
    python = f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}"
    return f"{datetime.date.today()}; {rounds} rounds; {python}; {machine}; {versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 7
    samples = sample(rounds, quick)
    rows = (judged(*target) for target in targets(samples))
    print(table(("figure", "value", "to reach", "reached"), *rows))
    print(f"\n{conditions(rounds)}\n")
    print(table(*raw_figures(samples)))


if __name__ == "__main__":
    role, *rest = sys.argv[1:] or [""]
    if role == "serve":
        asyncio.run(serve(*rest))
    elif role == "measure":
        name, http_url, https_url, size = rest
        print(json.dumps(measure(globals()[name], http_url, https_url, size == "quick")))
    else:
        main()
