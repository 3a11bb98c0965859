"""The server that the clients are measured against: canned responses over http and https.

    python3 benchmarks/server.py CERTIFICATE KEY

prints its two URLs, and serves until its standard input ends, which it does when the benchmark
does. The first part of a path names the response, as in /events-1000/v1/completions:

    completion          one completion, as JSON
    events-N            a stream of N tokens, each event in an HTTP chunk of its own
    packed-N            a stream of N tokens, 250 events to an HTTP chunk
    event-of-1MB, -12MB a stream of one huge event, in HTTP chunks of 64 KiB
    200MB               a stream of many events of 4 KiB
    stamp               a stream of one event, whose text is the time at which it was sent

All but the last are rendered before the first request, and written in large blocks, so that a
client never waits for the server's Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import sys
import time

from workload import MB, SHORT, STREAM_LENGTHS, TEXT, WORDS

EVENTS_PER_WRITE = SHORT  # 50 KB; each length of a stream is a multiple of it
STAMP_DELAY_SECONDS = 0.02  # for the client to be waiting when the event is sent
STAMP_PAUSE_SECONDS = 0.01  # before the rest; exposes a client that waits to fill its buffer


# --- Responses, each as a list of the blocks that it is written in ---

OK = b"HTTP/1.1 200 OK\r\n"
STREAM_HEAD = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def rendered_responses() -> dict[str, list[bytes]]:
    tokens = [sse_event(WORDS[i % len(WORDS)], token=1778 + i) for i in range(EVENTS_PER_WRITE)]
    separate = b"".join(map(http_chunk, tokens))  # as from a server that flushes each event
    packed = http_chunk(b"".join(tokens))
    streams = {
        "event-of-1MB": in_http_chunks(sse_event("x" * MB)),
        "event-of-12MB": in_http_chunks(sse_event("x" * 12 * MB)),
        "200MB": in_http_chunks(sse_event("x" * 4096) * 16) * (200 * 16),
    }
    for length in STREAM_LENGTHS:
        streams[f"events-{length}"] = [separate] * (length // EVENTS_PER_WRITE)
        streams[f"packed-{length}"] = [packed] * (length // EVENTS_PER_WRITE)
    complete = {name: [STREAM_HEAD, *blocks, STREAM_END] for name, blocks in streams.items()}
    return complete | {"completion": [completion()]}


def completion() -> bytes:
    choice = {"index": 0, "text": TEXT, "seed": 7, "finish_reason": "length", "tokens": [1778] * 10}
    usage = {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15}
    fields = {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}
    body = json.dumps(fields).encode()
    return OK + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def sse_event(text: str, token: int | None = None, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "token": token, "finish_reason": finish_reason}
    event = {"id": "cmpl-26a1e10db8544bc39c7e3f0b2f1d6a90", "object": "text_completion"}
    event |= {"choices": [choice | {"logprobs": None}], "created": 1733382157}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def in_http_chunks(data: bytes, size: int = 64 * 1024) -> list[bytes]:
    return [http_chunk(data[start : start + size]) for start in range(0, len(data), size)]


LAST_EVENTS = sse_event("", finish_reason="length") + b"data: [DONE]\n\n"
STREAM_END = http_chunk(LAST_EVENTS) + http_chunk(b"")


# --- Serving ---


async def serve(certificate: str, key: str) -> None:
    responses = rendered_responses()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                name = await read_request(reader)
                if name == "stamp":
                    await send_stamp(writer)
                    continue
                for block in responses[name]:
                    writer.write(block)
                    await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    for scheme, tls in (("http", None), ("https", context)):
        server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
        print(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()


async def read_request(reader: asyncio.StreamReader) -> str:
    """Read one POST, body included, and return the first part of its path."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length:")[2].split()[0]
    await reader.readexactly(int(length))
    return head.split(b"/", 2)[1].decode()


async def send_stamp(writer: asyncio.StreamWriter) -> None:
    """Send the time as an event; the monotonic clock is the same for all processes."""
    writer.write(STREAM_HEAD)
    await asyncio.sleep(STAMP_DELAY_SECONDS)
    writer.write(http_chunk(sse_event(repr(time.monotonic()))))
    await asyncio.sleep(STAMP_PAUSE_SECONDS)
    writer.write(STREAM_END)


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
