"""What one process measures of one client; it prints its figures as a JSON object.

    python3 benchmarks/measure.py CLIENT HTTP_URL HTTPS_URL [--quick]

CLIENT is the name of a function in clients.py; the URLs are those that server.py prints. Costs are
the processor time, user and system, of this process alone. Imports are few, since they count as
the client's memory. The name of a figure ends in its unit.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import clients
from workload import LONG, MB, MEDIUM, SHORT, TEXT, WORDS

# Of every client
EVENT = "streamed event, µs"
PACKED = "streamed event, 250 of them to an HTTP chunk, µs"
MEMORY = "peak memory of a process that streams, MB"
FIRST = "first chunk after it was sent, ms"
CALL = "completion over a kept https connection, µs"
# Of friendli_lite only: does its cost grow with what it handles?
OF_1K, OF_100K = "streamed event of 1,000, µs", "streamed event of 100,000, µs"
OF_1MB, OF_12MB = "event of 1 MB in 64 KiB chunks, ms", "event of 12 MB in 64 KiB chunks, ms"
GROWTH = "growth of peak memory over a stream of 200 MB, MB"
THREAD, THREADS = "elapsed time per completion, 1 thread, µs", "... with 16 threads, µs"


def measure(client: Callable, http: str, https: str, quick: bool) -> dict[str, float]:
    seconds = 0.1 if quick else 0.5  # to spend on a figure
    figures = {
        EVENT: per_event(client, http + "/events", MEDIUM, 1, seconds),
        PACKED: per_event(client, http + "/packed", MEDIUM, 1, seconds),
        MEMORY: peak_memory(),
        FIRST: first_chunk(client, http, 5 if quick else 20),
        CALL: per_call(client(https + "/completion")[0], seconds),
    }
    if client is clients.friendli_lite:
        figures |= {
            GROWTH: growth_of_peak(client(http + "/200MB")[1]),
            OF_1K: per_event(client, http + "/events", MEDIUM, 100, seconds),
            OF_100K: per_event(client, http + "/events", LONG, 1, seconds),
            OF_1MB: per_large_event(client, http, 1, seconds),
            OF_12MB: per_large_event(client, http, 12, seconds),
            **thread_figures(client(http + "/completion")[0], 2 if quick else 5),
        }
    return figures


# --- Processor time ---


def per_event(client: Callable, url: str, count: int, repeats: int, seconds: float) -> float:
    """Microseconds per event: a long stream minus a short one, so that only events count."""

    def cost(length: int) -> float:
        stream, characters = client(f"{url}-{length}")[1], length // len(WORDS) * len(TEXT)
        drain(stream, characters)  # warm-up
        return processor_time(lambda: drain(stream, characters), repeats, seconds)

    return (cost(count) - cost(SHORT)) / (count - SHORT) * 1e6


def per_large_event(client: Callable, url: str, size: int, seconds: float) -> float:
    """Milliseconds for a stream of one event of `size` MB; 12 MB are read at a time."""
    stream = client(f"{url}/event-of-{size}MB")[1]
    drain(stream, size * MB)  # warm-up
    return processor_time(lambda: drain(stream, size * MB), 12 // size, seconds) * 1e3


def per_call(complete: Callable[[], str], seconds: float) -> float:
    """Microseconds per completion over a connection that is already open."""
    complete()  # connects
    return processor_time(complete, 50, seconds) * 1e6


def processor_time(action: Callable[[], object], repeats: int, seconds: float) -> float:
    """Seconds per action: the lowest mean of `repeats` actions, measured for `seconds`."""
    means = []
    deadline = time.monotonic() + seconds
    while len(means) < 2 or time.monotonic() < deadline:
        before = time.process_time()
        for _ in range(repeats):
            action()
        means.append((time.process_time() - before) / repeats)
    return min(means)


def drain(stream: Callable[[], Iterator[str]], characters: int) -> None:
    """Read to the end; a client that lost text on the way would not be comparable."""
    if (seen := sum(map(len, stream()))) != characters:
        sys.exit(f"{seen:,} of {characters:,} characters came out of a stream")


# --- Elapsed time ---


def first_chunk(client: Callable, url: str, times: int) -> float:
    """Median of the milliseconds between an event's sending and its arrival at the caller."""
    stream = client(url + "/stamp")[1]

    def latency() -> float:
        chunks = stream()
        sent_at = float(next(chunks))
        elapsed = time.monotonic() - sent_at
        for _ in chunks:
            pass  # to the end, so that the connection is kept
        return elapsed * 1e3

    return sorted(latency() for _ in range(times))[times // 2]


def thread_figures(complete: Callable[[], str], times: int) -> dict[str, float]:
    """The lowest of several, taken in turn: elapsed time includes what other processes do."""
    pairs = [(elapsed_per_call(complete, 1), elapsed_per_call(complete, 16)) for _ in range(times)]
    one, sixteen = map(min, zip(*pairs, strict=True))
    return {THREAD: one, THREADS: sixteen}


def elapsed_per_call(complete: Callable[[], str], threads: int, calls: int = 400) -> float:
    """Microseconds of elapsed time per completion; the calls are divided among the threads."""
    from concurrent.futures import ThreadPoolExecutor  # here, to add to no client's peak memory

    with ThreadPoolExecutor(threads) as pool:
        before = time.monotonic()
        list(pool.map(lambda _: [complete() for _ in range(calls // threads)], range(threads)))
        return (time.monotonic() - before) / calls * 1e6


# --- Memory ---


def growth_of_peak(stream: Callable[[], Iterator[str]]) -> float:
    before = peak_memory()
    drain(stream, 200 * MB)
    return peak_memory() - before


def peak_memory() -> float:
    """Megabytes. From /proc where there is one, since ru_maxrss begins with the parent's peak."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


if __name__ == "__main__":
    name, http_url, https_url, *options = sys.argv[1:]
    figures = measure(getattr(clients, name), http_url, https_url, "--quick" in options)
    print(json.dumps(figures))
