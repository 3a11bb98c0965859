# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "coverage==7.17.4",
#     "friendli==0.16.5",
#     "httpx==0.28.1",
#     "httpx-sse==0.4.3",
#     "openai==3.57.0",
#     "requests==2.34.2",
# ]
# ///
"""Measure friendli_lite beside the clients that people would use instead.

    uv run benchmarks/against_peers.py            # about six minutes
    uv run benchmarks/against_peers.py --quick    # about one minute; fewer rounds, so more noise

README.md, beside this file, says how to run it with pip, and what came out. It prints two Markdown
tables: friendli_lite against its targets, and the figures of every client.

This file starts the processes and reports; server.py is the server's process, measure.py a
client's, and clients.py holds the clients. The clients take turns, each turn in a fresh process, so
that they share neither memory nor imports nor one noisy minute. Ratios compare the minima of all
rounds: what is above the minimum is due to the machine, not to the code.
Needs Unix, and the `openssl` command to make a certificate.
"""

from __future__ import annotations

import argparse
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
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import coverage
from clients import LABELS, friendli, friendli_lite, http_client, httpx, openai, plain_urllib
from measure import (
    CALL,
    EVENT,
    FIRST,
    GROWTH,
    OF_1K,
    OF_1MB,
    OF_12MB,
    OF_100K,
    PACKED,
    THREAD,
    THREADS,
)
from workload import BODY, TEXT

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STANDARD = "json, ssl, dataclasses, urllib.request"
IMPORT = f"import (http.client column: {STANDARD}), ms"
START = "process start to first completion, ms"
START_UNCOMPILED = "process start to first completion, no compiled files, ms"
Samples = dict[tuple[str, Callable], list[float]]  # by figure and client
Cells = tuple[str, ...]


# --- Starting the processes ---


def sample(rounds: int, quick: bool) -> Samples:
    samples = defaultdict(list)
    with started_server() as (environment, http, https), uncompiled(environment) as bundle:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for _ in range(1 if quick else 3):
                samples[IMPORT, friendli_lite].append(import_time(environment, "friendli_lite"))
                samples[IMPORT, http_client].append(import_time(environment, STANDARD))
                for client in LABELS:
                    samples[START, client].append(start_time(environment, client, http))
                    samples[START_UNCOMPILED, client].append(start_time(bundle, client, http))
            for client in LABELS:
                arguments = (HERE / "measure.py", client.__name__, http, https)
                output = run(environment, *arguments, *(["--quick"] if quick else []))
                for figure, value in json.loads(output).items():
                    samples[figure, client].append(value)
    return samples


@contextlib.contextmanager
def started_server() -> Iterator[tuple[dict[str, str], str, str]]:
    """Yield the environment for clients, and the URLs for http and https."""
    with tempfile.TemporaryDirectory() as folder:
        command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=benchmark -days 2 "
        command += "-addext subjectAltName=IP:127.0.0.1 "
        command += "-addext keyUsage=digitalSignature,keyCertSign -keyout key.pem -out cert.pem"
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
        certificate, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
        command, pipe = [sys.executable, HERE / "server.py", certificate, key], subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
            http, https = (server.stdout.readline().strip() for _ in range(2))
            shutil.copy(ROOT / "friendli_lite.py", folder)  # an edit during the run changes nothing
            yield client_environment(certificate, folder), http, https


def client_environment(certificate: Path, folder: str, size: int = 85) -> dict[str, str]:
    """This process's environment, with `folder` to import from, without what changes a client.

    It is padded to the size of a desktop's, since urllib reads all of it to find its proxies.
    """
    unwanted = ("_PROXY", "FRIENDLI_", "OPENAI_", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not any(u in k.upper() for u in unwanted)}
    kept |= dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(certificate))
    kept |= {"PYTHONPATH": folder}
    return kept | {f"BENCHMARK_{i}": "padding" for i in range(size - len(kept))}


@contextlib.contextmanager
def uncompiled(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield an environment where friendli_lite and its peers are source files only, and stay so.

    So it is in a Lambda bundle without `__pycache__`: its folder is read-only, and each cold start
    compiles what it imports. The standard library is compiled there, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        no_caches = shutil.ignore_patterns("__pycache__", "pip")
        installed = sysconfig.get_path("purelib")
        shutil.copytree(installed, folder, ignore=no_caches, dirs_exist_ok=True)
        shutil.copy(Path(environment["PYTHONPATH"], "friendli_lite.py"), folder)
        yield environment | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}


def import_time(environment: dict[str, str], modules: str) -> float:
    code = f"import time; t = time.process_time(); import {modules}; print(time.process_time() - t)"
    return float(run(environment, "-c", code)) * 1e3


def start_time(environment: dict[str, str], client: Callable, url: str) -> float:
    """Processor time of a whole process, the interpreter's start included, that asks once."""
    call = f"assert {client.__name__}({url!r} + '/completion')[0]() == {TEXT!r}"

    def ended_children() -> float:  # without the server, which is still running
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = ended_children()
    run(environment, "-c", f"BODY = {BODY}\n{inspect.getsource(client)}\n{call}")
    return (ended_children() - before) * 1e3


def run(environment: dict[str, str], *arguments: str | Path) -> str:
    command, folder = [sys.executable, *arguments], environment["PYTHONPATH"]
    # From that folder, too, since `python -c` imports from the current one first.
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, arguments))[-200:]}\n{done.stderr}")
    return done.stdout


# --- friendli_lite against its targets ---

RATIOS = (  # figure, peer, at most; None where no target is set
    (IMPORT, http_client, 1.2),
    (START, friendli, 0.17),
    (START, plain_urllib, 1.4),
    (START_UNCOMPILED, friendli, None),
    (START_UNCOMPILED, plain_urllib, None),
    (EVENT, http_client, 1.5),
    (EVENT, friendli, 1 / 50),
    (EVENT, openai, 1 / 12),
    (EVENT, httpx, 1 / 2),
    (PACKED, http_client, 1.5),
    (CALL, http_client, 1.3),
    (CALL, httpx, 1 / 2),
    (CALL, openai, 1 / 2),
    (CALL, friendli, 1 / 8),
)


def targets(samples: Samples) -> Iterator[tuple[str, float | None, str, float | None, str]]:
    """Yield figure, value, "at most" or "at least", limit, unit."""

    def own(figure: str, of: Callable = min) -> float:
        return of(samples[figure, friendli_lite])

    for figure, peer, limit in RATIOS:
        name = "import" if figure == IMPORT else figure.rpartition(",")[0]
        beside = f"import of {STANDARD}" if figure == IMPORT else LABELS[peer]
        ratio = own(figure) / min(samples[figure, peer])
        yield f"{name} / {beside}", ratio, "at most", limit, " x"
    median = own(FIRST, statistics.median)
    yield "first chunk after it was sent, median", median, "at most", 1, " ms"
    longer = own(OF_100K) / own(OF_1K)
    yield "event of 100,000 / of 1,000, or inverse", max(longer, 1 / longer), "at most", 1.15, " x"
    yield "event of 12 MB / of 1 MB", own(OF_12MB) / own(OF_1MB), "at most", 14, " x"
    yield "growth of memory, 200 MB streamed", own(GROWTH, max), "at most", 8, " MB"
    threaded = own(THREAD) / own(THREADS)
    yield "calls per second, 16 threads / 1 thread", threaded, "at least", 0.9, " x"
    yield "statements of the module", statements(), "at most", 1050, ""
    wheel = wheel_size()
    yield "the wheel", wheel and wheel / 1000, "at most", 27, " KB"


def statements() -> int:
    """As `coverage report` counts them."""
    counter = coverage.Coverage(data_file=None, config_file=ROOT / "pyproject.toml")
    return len(counter.analysis2(str(ROOT / "friendli_lite.py"))[1])


def wheel_size() -> int | None:
    """Bytes of the wheel, or None if it cannot be built; built from a copy, to leave no traces."""
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


def judged(figure: str, value: float | None, sense: str, limit: float | None, unit: str) -> Cells:
    measured = "not measured" if value is None else brief(value) + unit
    target = "none" if limit is None else f"{sense} {brief(limit)}{unit}"
    if value is None or limit is None:
        return figure, measured, target, ""
    reached = value >= limit if sense == "at least" else value <= limit
    return figure, measured, target, "yes" if reached else "no"


def raw_figures(samples: Samples) -> Iterator[Cells]:
    yield "minimum / median of all rounds", *LABELS.values()
    for figure in dict.fromkeys(figure for figure, _ in samples):
        columns = [samples.get((figure, client)) for client in LABELS]
        pairs = ((min(column), statistics.median(column)) if column else () for column in columns)
        yield figure, *(" / ".join(map(brief, pair)) for pair in pairs)


def brief(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


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
    parser.add_argument("--quick", action="store_true", help="end within about a minute")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 7
    samples = sample(rounds, quick)
    rows = (judged(*target) for target in targets(samples))
    print(table(("friendli_lite", "value", "target", "reached"), *rows))
    print(f"\n{conditions(rounds)}\n")
    print(table(*raw_figures(samples)))


if __name__ == "__main__":
    main()
