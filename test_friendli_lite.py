"""The tests of friendli_lite, and the stand-in container that they and the demo run against.

    python3 -m unittest                                         # the tests
    python3 test_friendli_lite.py --demo "Say this is a test!"  # the command line and a stand-in
    python3 test_friendli_lite.py --serve 8000                  # the stand-in alone, until Ctrl-C

All of it is on 127.0.0.1. Sleep, clock and chance are injected; only tests of the time limits of
sockets wait, for some tenths of a second. FRIENDLI_LITE_FUZZ=100000 makes the fuzz test longer.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import base64
import collections.abc
import contextlib
import copy
import dataclasses
import email.utils
import errno
import functools
import gc
import http.client
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import pickle
import pydoc
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from unittest import mock
from urllib.parse import urlsplit

import friendli_lite
from friendli_lite import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    CompletionRequest,
    CompletionStream,
    FriendliError,
    RetryConfig,
    complete,
    stream,
)

try:
    import tracemalloc
except ImportError:  # as under PyPy; nothing is measured then
    tracemalloc = mock.Mock(**{"get_traced_memory.return_value": (0, 0)})

sys.setswitchinterval(0.0005)  # so that a stand-in's thread answers at once
HERE = os.path.dirname(os.path.abspath(__file__))
TOKEN = "flp_TopSecret0123456789"
TEXT = " This is a test!"  # what the stand-in completes
JSON, EVENTS = "application/json", "text/event-stream"
MEDIA_TYPES = {complete: JSON, stream: EVENTS}
CLOSE = "close"  # what a scripted answer returns to have its connection closed
WORKERS = ThreadPoolExecutor(999)  # for servers, and for calls at the same time; reused for speed


# The stand-in container


class StandInContainer:
    """A server on a port of its own that answers POST /v1/completions as a Friendli Container does.

    A test may script what comes instead: each item is the answer to one request, either bytes, sent
    as they are, or a function of the connected socket, whose result CLOSE ends the connection.

    Attributes:
        url: the server's, for `server_url`.
        requests: the requests that came, in order, as `Received`.
        connections: how many connections were accepted.
    """

    def __init__(self, *script, port=0, tls=None):
        self._script = list(script)
        self._tls = tls
        self._lock = threading.Lock()
        self._sockets = set()
        self._running = []
        self.requests = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._start(self._accept)

    def script(self, *answers):
        """Add answers for the next requests."""
        self._script.extend(answers)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Close all connections, and wait for what serves them; raise what went wrong there."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for future in self._running:
            future.result(10)

    def drop_connections(self):
        """Close what is open, as a restart does."""
        with self._lock:
            open_sockets = list(self._sockets)
        for sock in open_sockets:
            with contextlib.suppress(OSError):  # SSLSocket.shutdown() would fail what reads from it
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _start(self, target, *args):
        self._running.append(WORKERS.submit(target, *args))

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                self._start(self._serve, sock)

    def _serve(self, sock):
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError))  # a client may leave at any time
            stack.callback(sock.close)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
                stack.callback(sock.close)
            with self._lock:
                self._sockets.add(sock)
            stack.callback(self._sockets.discard, sock)
            reader = stack.enter_context(sock.makefile("rb"))
            while True:
                received = Received.read(reader)
                if received is None:
                    return
                with self._lock:
                    self.requests.append(received)
                    answer = self._script.pop(0) if self._script else container_answer(received)
                if play(answer, sock) == CLOSE:
                    return


def play(answer, sock):
    """Send an answer of bytes, or call one that is a function; return its result."""
    return answer(sock) if callable(answer) else sock.sendall(answer)


class Received:
    """A request as it came: `path`, `headers` (names in lower case), `body` in bytes, `json`."""

    def __init__(self, line, headers, body):
        self.method, self.path = line.split()[:2]
        self.headers = headers
        self.body = body

    @property
    def json(self):
        return json.loads(self.body)

    @classmethod
    def read(cls, reader):
        lines = []
        for raw in iter(reader.readline, b""):
            if raw == b"\r\n":
                break
            lines.append(raw.decode("latin-1").rstrip("\r\n"))
        else:
            return None
        headers = {
            name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])
        }
        return cls(lines[0], headers, reader.read(int(headers.get("content-length", 0))))


def container_answer(received):
    """Answer as a Friendli Container does: a completion or a stream, 404 or 422."""
    if received.path.partition("?")[0].rpartition("/v1/")[2] != "completions":
        return json_answer({"detail": "Not Found"}, 404)
    try:
        request = received.json
        if ("prompt" in request) == ("tokens" in request):
            raise ValueError("exactly one of prompt and tokens is needed")
        found = list(mistakes(request))
    except (TypeError, ValueError) as error:
        found = [{"loc": ["body"], "msg": str(error), "type": "value_error"}]
    if found:
        return json_answer({"detail": found}, 422)
    if request.get("stream"):
        return event_stream(*chunks(request))
    return json_answer(completion(request))


JSON_TYPES = {
    "str": ("string", str), "int": ("integer", int), "float": ("number", (int, float)),
    "bool": ("boolean", bool), "Sequence": ("list", list), "Mapping": ("dictionary", dict),
}  # fmt: skip


def mistakes(request):
    """Yield what a container finds wrong with the types of a request's fields."""
    for name, value in request.items():
        annotation = CompletionRequest.__annotations__.get(name, "None")
        expected = [part.partition("[")[0] for part in annotation.split(" | ") if part != "None"]
        fits = (
            isinstance(value, JSON_TYPES[part][1]) and (part == "bool") == isinstance(value, bool)
            for part in expected
        )
        if expected and value is not None and not any(fits):
            noun = " or ".join(JSON_TYPES[part][0] for part in expected)
            kind = f"{JSON_TYPES[expected[0]][0]}_type"
            yield {"loc": ["body", name], "msg": f"Input should be a valid {noun}", "type": kind}


def words(request):
    """The tokens of the answer: a test, word by word, as many as `max_tokens` allows."""
    sentence = [" This", " is", " a", " test", "!"]
    return sentence[: request.get("max_tokens") or len(sentence)]


def usage(request):
    prompt = request.get("prompt") or ""
    prompts = prompt if isinstance(prompt, list) else [prompt]
    prompt_tokens = len(request.get("tokens") or " ".join(map(str, prompts)).split())
    completion_tokens = len(words(request)) * (request.get("n") or 1)
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


def logprobs(texts):
    return {
        "text_offset": list(itertools.accumulate([0, *map(len, texts[:-1])])),
        "token_logprobs": [-0.5] * len(texts), "tokens": texts,
        "top_logprobs": [{text: -0.5} for text in texts],
    }  # fmt: skip


def finish_reason(request):
    return "length" if request.get("max_tokens") == len(words(request)) else "stop"


def completion(request):
    """The body of a completion."""
    texts = words(request)
    logs = logprobs(texts) if request.get("logprobs") else None
    choice = {"finish_reason": finish_reason(request), "tokens": [*range(len(texts))]}
    choices = [
        {"index": index, "text": "".join(texts), "seed": 42 + index, **choice, "logprobs": logs}
        for index in range(request.get("n") or 1)
    ]
    start = {"id": "cmpl-26a1e10db8544bc3adb488d2d205288b", "object": "text_completion"}
    return {**start, "choices": choices, "usage": usage(request), "model": request.get("model")}


def chunk(choices, **fields):
    """The payload of one event."""
    start = {"id": "cmpl-1", "object": "text_completion", "choices": choices}
    return {**start, **fields, "created": 1733382157}


def text_chunk(text, index=0, reason=None, logs=None, token=7):
    """The payload of an event with a text; the end of a choice has no token."""
    choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logs}
    return chunk([choice if reason else {**choice, "token": token}])


def chunks(request):
    """The payloads of a stream, choices interleaved."""
    indexes = range(request.get("n") or 1)
    for token, text in enumerate(words(request)):
        logs = logprobs([text]) if request.get("logprobs") else None
        yield from (text_chunk(text, index, None, logs, token) for index in indexes)
    yield from (text_chunk("", index, finish_reason(request)) for index in indexes)
    if (request.get("stream_options") or {}).get("include_usage"):
        yield chunk([], usage=usage(request))


def head(status=200, **headers):
    """The head of an answer; header names with _ for -."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return "".join([f"HTTP/1.1 {status} Reason\r\n", *lines, "\r\n"]).encode("latin-1")


def page(body, status=400, content_type="text/plain", **headers):
    """A whole answer with any body."""
    length = len(body)
    return head(status, Content_Type=content_type, Content_Length=length, **headers) + body


def json_answer(payload, status=200, **headers):
    """A whole answer with a JSON body."""
    return page(json.dumps(payload).encode(), status, JSON, **headers)


def sse(*payloads, done=True):
    """The body of an event stream."""
    events = [f"data: {json.dumps(payload, separators=(',', ':'))}\n\n" for payload in payloads]
    return "".join([*events, "data: [DONE]\n\n" if done else ""]).encode()


def one_chunk(piece):
    """A piece of a body in chunked framing."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def chunked(*pieces):
    """Pieces of a body in chunked framing, to its end."""
    return b"".join(map(one_chunk, [*pieces, b""]))


def event_stream(*payloads, done=True, framing="chunked"):
    """A whole answer with an event stream; framing="close" needs the end of the connection."""
    return framed(sse(*payloads, done=done), framing, EVENTS)


def framed(body, framing, content_type):
    """A whole answer of status 200 with a body in one of the three framings of HTTP/1.1."""
    if framing == "length":
        return page(body, 200, content_type)
    if framing == "chunked":
        return head(Content_Type=content_type, Transfer_Encoding="chunked") + chunked(body)
    return head(Content_Type=content_type, Connection="close") + body


# Scripted answers: bytes, or functions of the connected socket


FRAMINGS = ("chunked", "length", "close")
JSON_HEAD = head(Content_Type=JSON, Content_Length=100_000)
STREAM_HEAD = head(Content_Type=EVENTS, Transfer_Encoding="chunked")
ONE = b'{"choices":[{"text":"a"}]}'  # the smallest completion, or chunk
ANSWER = json_answer(completion({}))
STREAM = event_stream(*chunks({}))
CHUNKED_JSON_HEAD = head(Content_Type=JSON, Transfer_Encoding="chunked")
A_CHUNK = one_chunk(sse(text_chunk("a"), done=False))
ONE_EVENT = STREAM_HEAD + A_CHUNK
AT_ONCE = RetryConfig(initial_delay=0)
SPENT = 0.06  # a timeout that must run out; what comes before it takes less, even on a busy machine
RETRY = {"retries": RetryConfig(1, initial_delay=0)}


def payload(call, data):
    """The body of an answer that holds some JSON: alone, or as the one event of a stream."""
    return data if call is complete else b"data: " + data + b"\n\ndata: [DONE]\n\n"


def then_close(data):
    """An answer that ends with the end of its connection."""

    def answer(sock):
        sock.sendall(data)
        return CLOSE

    return answer


def hang(data=b"", sent=None):
    """An answer that stops after some bytes, sets an event if there is one, and does no more."""

    def answer(sock):
        sock.sendall(data)
        if sent:
            sent.set()
        sock.recv(1)
        return CLOSE

    return answer


def trickle(data, more):
    """An answer that goes on, a part every 15 ms, until the client leaves."""

    def answer(sock):
        sock.sendall(data)
        while True:
            time.sleep(0.015)
            sock.sendall(more)

    return answer


def endless(start, more):
    """An answer that goes on as fast as it can, until the client leaves."""

    def answer(sock):
        sock.sendall(start)
        while True:
            sock.sendall(more)

    return answer


def fin(sock):
    """No answer: the connection is closed."""
    sock.shutdown(socket.SHUT_RDWR)
    return CLOSE


def rst(sock):
    """No answer: the connection is reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(sock.detach())
    return CLOSE


class Later:
    """An answer of some bytes and, once the test calls `now()`, of another answer."""

    def __init__(self, data, answer):
        self._data, self._answer = data, answer
        self._now, self._done = threading.Event(), threading.Event()

    def __call__(self, sock):
        sock.sendall(self._data)
        if not self._now.wait(10):
            raise AssertionError("the test did not call now()")
        result = play(self._answer, sock)
        self._done.set()
        return result

    def now(self):
        self._now.set()
        if not self._done.wait(10):
            raise AssertionError("the scripted answer did not end")


# How the tests make calls


def texts_and_error(ask):
    """Return the texts that a call, or a part of it, gives, and the error that ends it or None."""
    texts = []
    try:
        result = ask()
        texts.extend(part.text for part in ([result] if hasattr(result, "text") else result))
    except FriendliError as error:
        return texts, error
    return texts, None


def outcome(call, prompt="x", **options):
    """Make a call without retries; return the texts that it gave, and its error or None."""
    options = {"retries": 0, "timeout": 5, **options}
    return texts_and_error(lambda: call(prompt, **options))


def outcome_of(prepared_call):
    """Complete a prepared call; return the text, or the error."""
    texts, error = texts_and_error(prepared_call.complete)
    return error or texts[0]


READERS = {complete: friendli_lite._read_completion, stream: friendli_lite._read_chunks}


class FakeResponse:
    """A response of status 200 that no connection brings: its body comes from a list of bytes."""

    is_complete = True

    def __init__(self, pieces=(), **headers):
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.secrets = friendli_lite._Secrets({})
        self.pieces = iter(pieces)

    def read(self):
        return next(self.pieces, b"")

    def drain(self):
        pass

    close = drain


def outcome_of_body(call, body, **headers):
    """Return the texts that a call finds in a body, or in its pieces, and its error or None."""
    pieces = [body] if isinstance(body, bytes) else body
    response = FakeResponse(pieces, **{"content_type": MEDIA_TYPES[call], **headers})
    return texts_and_error(lambda: READERS[call](response))


CUT = APIConnectionError("the server closed the connection")


class FakeConnection:
    """Stands for a connection on which pieces of a response arrive, and then an error.

    Without an error, it is a failure of the test to wait for more than the pieces.
    """

    via = ""

    def __init__(self, pieces, error=None):
        self.secrets = friendli_lite._Secrets({})
        self.is_open, self.timeouts = True, None
        self._claim = threading.Lock()
        self._pieces = list(pieces)
        self._error = error or AssertionError("it waits for more than has come")

    def receive(self, may_end=False):
        if self._pieces:
            return self._pieces.pop(0)
        if may_end and self._error is CUT:
            return b""
        raise self._error

    def claim(self):
        return self._claim.acquire(blocking=False)

    def close(self):
        self.is_open = False


def outcome_of_pieces(call, pieces, error=None):
    """Read a response from a fake connection; return its texts, its error or None, and that.

    The connection is open if it was left to the pool.
    """
    connection = FakeConnection(pieces, error)

    def read():
        with contextlib.closing(friendli_lite._Response(connection)) as response:
            result = READERS[call](response)
            yield from [result] if call is complete else result

    texts, error = texts_and_error(read)
    friendli_lite._pool._idle.pop(connection, None)
    return texts, error and error.with_traceback(None), connection


def deliveries(data):
    """Two ways for bytes to arrive: at once, and one by one (long ones in parts)."""
    size = 1 if len(data) < 9999 else 997
    return [data], [data[start : start + size] for start in range(0, len(data), size)]


def prepared(url, retries=None, total_timeout=None, draw=1.0, clock=time.monotonic, **fields):
    """Return a call that is not yet sent, whose sleeps are recorded, and the list of these.

    Chance draws a fraction of what it may.
    """
    call = friendli_lite._prepare(
        "stream" in fields, "p", fields, url, TOKEN, None, retries, 600.0, None, None
    )
    call.timeouts = friendli_lite._Timeouts(600.0, total_timeout or 1e6, clock)
    waits = []
    call.sleep = waits.append
    call.uniform = lambda low, high: low + draw * (high - low)
    return call, waits


def raised(call, **options):
    """Return the error of a call with its traceback, which assertRaises() would cut."""
    try:
        result = call(**{"prompt": "x", "retries": 0, "timeout": 5, **options})
        list(result if call is stream else ())
    except Exception as error:
        return error
    raise AssertionError("no error was raised")


def setUpModule():
    """Leave little in the environment, and have the garbage collector skip what is there by now."""
    unittest.addModuleCleanup(os.environ.update, dict(os.environ))
    for name in list(os.environ):
        if not name.startswith(("PATH", "PYTHON", "SYSTEMROOT", "TEMP", "TMP")):
            del os.environ[name]
    freeze()


def freeze():
    if hasattr(gc, "freeze"):
        gc.collect()
        gc.freeze()
        unittest.addModuleCleanup(gc.unfreeze)


def open_descriptors():
    return len(os.listdir("/dev/fd"))


class TestCase(unittest.TestCase):
    """A test with a small environment that holds TOKEN, and with no idle connection at its start.

    No log, no error and no frame of a traceback may show TOKEN, and no socket may stay open.
    """

    def setUp(self):
        environment = mock.patch.dict(os.environ, FRIENDLI_TOKEN=TOKEN)
        environment.start()
        self.addCleanup(environment.stop)
        self.addCleanup(friendli_lite._pool.close)
        recorder = warnings.catch_warnings(record=True)
        warned = recorder.__enter__()
        self.addCleanup(recorder.__exit__)
        warnings.simplefilter("always")
        self.log = io.StringIO()
        handler = logging.StreamHandler(self.log)
        logger = logging.getLogger("friendli_lite")
        self.addCleanup(logger.setLevel, logger.level)
        self.addCleanup(logger.removeHandler, handler)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
        self.addCleanup(self.check_traces, warned)

    def check_traces(self, warned):
        self.assertNotIn(TOKEN, self.log.getvalue())
        friendli_lite._pool.close()
        self.assertEqual([], [str(warning.message) for warning in warned])

    @classmethod
    def tearDownClass(cls):
        """Check that no socket is left to the garbage collector, once for all tests of a class."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            gc.collect(1)
        if warned:
            raise AssertionError(*(str(warning.message) for warning in warned))

    def serve(self, *script, **options):
        """Start a stand-in container, and make it the default server."""
        container = StandInContainer(*script, **options)
        self.addCleanup(container.close)
        os.environ["FRIENDLI_SERVER_URL"] = container.url
        return container

    def refuse(self):
        """Make a port the default server on which nobody listens; return its URL.

        It is kept, since a port that was merely closed may be another process's a moment later.
        """
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.bind(("127.0.0.1", 0))
        url = os.environ["FRIENDLI_SERVER_URL"] = f"http://127.0.0.1:{sock.getsockname()[1]}"
        return url

    def ask(self, times=1, call=complete, **options):
        """Make calls, without retries by default, that must give the text of the stand-in."""
        for _ in range(times):
            texts, error = outcome(call, **options)
            if error is not None:
                raise error
            self.assertEqual(TEXT, "".join(texts))

    def failure(self, kind, call=complete, **options):
        """Make a call that must fail with exactly this error, in which nothing shows TOKEN."""
        error = raised(call, **options)
        self.check_error(kind, error)
        return error

    def check_error(self, kind, error, *words):
        """Check an error's class, that it is one line with these words, and that it hides TOKEN."""
        self.assertIs(kind, type(error))
        if isinstance(error, FriendliError):
            self.assertRegex(str(error), r"\APOST https?://\S+: .{1,1500}\Z")
        for word in words:
            self.assertIn(word, str(error))
        self.assertNotIn(TOKEN, shown(error))

    @contextlib.contextmanager
    def case(self, *names):
        """Run a case of a table, and leave no idle connection to the next."""
        with self.subTest(" ".join(map(str, names))[:200]):
            yield
        friendli_lite._pool.close()

    @contextlib.contextmanager
    def within(self, seconds):
        start = time.monotonic()
        yield
        self.assertLess(time.monotonic() - start, seconds)

    @contextlib.contextmanager
    def each(self, scheme, *script):
        """Run a case with a server of this scheme; yield it, and the options for calls of it."""
        tls, options = tls_for(scheme)
        with self.case(scheme, *script), self.serve(*script, tls=tls) as server:
            yield server, options


def shown(error):
    """All that an error tracker may collect of an error, and of those behind it.

    Their texts and fields, and the local variables of frames outside this file, which knows TOKEN.
    """
    errors, pending = [], [error]
    while pending:
        error = pending.pop()
        if error is not None and error not in errors:
            errors.append(error)
            pending += [error.__cause__, error.__context__]
    texts = [f"{error} {error!r} {vars(error)}" for error in errors]
    for error in errors:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename != __file__:
                texts += [f"{name}={value!r}" for name, value in frame.f_locals.items()]
    return "\n".join(texts)


# Certificates, proxies, other processes


OPENSSL_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = ${ENV::NAME}
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[leaf]
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = ${ENV::HOSTS}
"""


@functools.lru_cache(maxsize=None)
def certificates():
    """Make a CA and certificates, once for all tests; return what finds the path of "ca.pem"."""
    if shutil.which("openssl") is None:
        raise unittest.SkipTest("there is no openssl command to make certificates with")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = functools.partial(os.path.join, folder.name)
    with open(path("config"), "w") as config:
        config.write(OPENSSL_CONFIG)

    def openssl(*commands):
        """Run commands side by side, each for a name and hosts."""
        quiet = {"cwd": folder.name, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        processes = []
        for name, hosts, command in commands:
            env = {**os.environ, "NAME": name, "HOSTS": hosts}
            command = ["openssl", *command.format(name=name).split()]
            processes.append(subprocess.Popen(command, env=env, **quiet))
        if sum([process.wait() for process in processes]):
            raise AssertionError("openssl failed")

    here, elsewhere = "DNS:localhost,IP:127.0.0.1", "DNS:elsewhere.invalid"
    leaves = [("server", here, 2), ("expired", here, -1), ("elsewhere", elsewhere, 2)]
    new = "req -config config -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 "
    new += "-keyout {name}.key "
    sign = "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -extfile config -extensions leaf "
    openssl(
        ("ca", here, new + "-x509 -days 2 -extensions ca -out {name}.pem"),
        ("self-signed", here, new + "-x509 -days 2 -extensions leaf -out {name}.pem"),
        *((name, hosts, new + "-new -out {name}.csr") for name, hosts, _ in leaves),
    )
    openssl(
        *(
            (name, hosts, sign + f"-set_serial {number} -days {days} -out {{name}}.pem")
            for number, (name, hosts, days) in enumerate(leaves, 1)
        )
    )
    return path


def server_tls(name="server", client_ca=None):
    path = certificates()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path(f"{name}.pem"), path(f"{name}.key"))
    if client_ca:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def tls_for(scheme):
    """The context of a server of this scheme, and the options of a call that accepts it."""
    return shared_tls() if scheme == "https" else (None, {})


def client_tls():
    return ssl.create_default_context(cafile=certificates()("ca.pem"))


@functools.lru_cache(maxsize=None)
def shared_tls():
    """The context of a server, and the option of a call that accepts it."""
    return server_tls(), {"ssl_context": client_tls()}


class Proxy(StandInContainer):
    """A proxy for http, by absolute URI, and for https, by CONNECT; tunnels carried `seen`."""

    def __init__(self, user_password=None, refusal=None):
        self.seen = b""
        self._refusal = refusal
        self._credentials = (
            user_password and "Basic " + base64.b64encode(user_password.encode()).decode()
        )
        super().__init__()

    def _serve(self, sock):
        with contextlib.suppress(OSError), sock, sock.makefile("rb") as reader:
            self._sockets.add(sock)
            for received in iter(lambda: Received.read(reader), None):
                self.requests.append(received)
                if self._credentials not in (None, received.headers.get("proxy-authorization")):
                    sock.sendall(json_answer({"error": "who are you?"}, 407))
                elif self._refusal is not None:
                    sock.sendall(self._refusal)
                    break
                elif received.method == "CONNECT":
                    self._tunnel(sock, received.path)
                    break
                else:
                    sock.sendall(self._forward(received))

    def _tunnel(self, sock, address):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as server:
            sock.sendall(head(200))
            self._start(self._relay, server, sock)
            self._relay(sock, server)

    def _relay(self, source, target):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                self.seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _forward(self, received):
        url = urlsplit(received.path)
        with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=5)) as connection:
            connection.request(received.method, url.path, received.body, received.headers)
            response = connection.getresponse()
            return page(response.read(), response.status, response.headers["Content-Type"])


def listener(stack, backlog=128):
    """Listen, and never accept; with backlog=0 connecting hangs. Return the URL."""
    sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))
    for _ in range(0 if backlog else 4):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(sock.getsockname())
    return f"http://127.0.0.1:{sock.getsockname()[1]}"


def exit_status(function):
    """Call a function in a forked child; return its wait status, 0 if the function returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for the threads of the stand-in
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(10)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def exit_status_of_main(arguments):
    """Run the command line in this process; return its exit status, as Python would make it."""
    try:
        friendli_lite.main(arguments)
    except SystemExit as exit_:
        if not isinstance(exit_.code, str):
            return exit_.code
        if sys.stderr:
            print(exit_.code, file=sys.stderr)
        return 1
    return 0


@functools.lru_cache(maxsize=None)
def text_of(name):
    """The text of a file of the repository."""
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


def source():
    return text_of("friendli_lite.py")


def readme():
    return text_of("README.md")


# Errors


class ErrorTests(TestCase):
    def test_the_fields_of_an_error_are_its_arguments(self):
        nothing = {"status_code": 0, "headers": {}, "body": "", "message": ""}
        details = {"status_code": 503, "headers": {"a": "b"}, "body": "page", "message": "busy"}
        for error, fields in [
            (FriendliError("text"), {}), (APITimeoutError("text"), {}),
            (APIResponseError("text"), {"body": ""}),
            (APIResponseError("text", "page"), {"body": "page"}),
            (APIStatusError("text"), nothing), (APIStatusError("text", **details), details),
            (APIStatusError("text", *details.values()), details),
        ]:  # fmt: skip
            with self.subTest(repr(error), fields=fields):
                self.assertEqual(("text", fields, 0), (str(error), vars(error), error.attempts))
        self.assertIsNot(APIStatusError("a").headers, APIStatusError("b").headers)

    def test_errors_survive_pickling_and_copying(self):
        busy = {"error": "busy"}
        self.serve(fin, json_answer(busy, 503, X_Id="7"), json_answer(busy))
        errors = list(map(self.failure, (APIConnectionError, APIStatusError, APIResponseError)))
        self.assertEqual([1, 1, 1], [error.attempts for error in errors])
        for error in [*errors, FriendliError("text"), APITimeoutError("text")]:
            pickles = [pickle.dumps(error, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
            for twin in [*map(pickle.loads, pickles), copy.copy(error), copy.deepcopy(error)]:
                with self.subTest(type(error).__name__):
                    self.assertIsNot(error, twin)
                    self.assertIs(type(error), type(twin))
                    self.assertEqual((error.args, vars(error)), (twin.args, vars(twin)))

    def test_errors_are_caught_by_their_base_classes(self):
        for kind in (APIStatusError, APIConnectionError, APIResponseError):
            self.assertEqual((FriendliError,), kind.__bases__)
        self.assertEqual((APIConnectionError,), APITimeoutError.__bases__)
        self.assertEqual((Exception,), FriendliError.__bases__)


# Request


# The fields of the API: their type in Python, a value, and their names
API_FIELDS = [
    ("str | Sequence[str]", "Say this is a test!", "prompt"), ("str", "my-adapter", "model"),
    ("int", 2, "encoder_no_repeat_ngram logprobs max_tokens max_total_tokens min_tokens"
     " min_total_tokens n no_repeat_ngram top_k"),
    ("int | Sequence[int]", [1, 2], "seed"), ("bool", False, "stream"),
    ("float", 0.7, "encoder_repetition_penalty frequency_penalty min_p presence_penalty"
     " repetition_penalty temperature top_p xtc_probability xtc_threshold"),
    ("Sequence[int]", [1, 2], "tokens eos_token forced_output_tokens token_index_to_replace"),
    ("Sequence[float]", [0.5, -1.0], "embedding_to_replace"),
    ("Sequence[str]", ["\n"], "bad_words stop"),
    ("Sequence[Mapping[str, Sequence[int]]]", [{"tokens": [4]}], "bad_word_tokens stop_tokens"),
    ("Mapping[str, bool]", {"include_usage": True}, "stream_options"),
    ("Mapping[str, Any]", {"type": "json_object"}, "response_format"),
]  # fmt: skip


class FieldTests(TestCase):
    def test_the_fields_are_those_of_the_api_and_extra_body(self):
        expected = {
            name: f"{kind} | None" for kind, _, names in API_FIELDS for name in names.split()
        }
        self.assertEqual(33, len(expected))
        expected["extra_body"] = "Mapping[str, Any] | None"
        self.assertEqual(expected, CompletionRequest.__annotations__)
        self.assertEqual(dict.fromkeys(expected), vars(CompletionRequest()))

    def test_the_typed_keywords_are_the_fields_of_a_request(self):
        keywords = source().partition("class _RequestFields(")[2].partition("\n\n\n")[0]
        found = re.findall(r"^ +(\w+): (.+)$", keywords, re.MULTILINE)
        self.assertEqual([*CompletionRequest.__annotations__.items()], found)

    def test_each_field_is_described_where_help_shows_it(self):
        for kind in (CompletionRequest, RetryConfig):
            doc = source().partition(f"\nclass {kind.__name__}:")[2].split('"""')[1]
            doc = doc.partition("Attributes:")[2]
            described = re.findall(r"^        (\w+): \S.{10}", doc, re.MULTILINE)
            self.assertEqual([*kind.__annotations__], described)

    def test_all_fields_are_sent_as_given_and_none_is_not(self):
        values = {name: value for _, value, names in API_FIELDS for name in names.split()}
        tokens = {**values, "stream": True}
        del values["tokens"], tokens["prompt"]
        server = self.serve()
        complete(values)
        list(stream(tokens, max_tokens=None))
        del tokens["max_tokens"]
        self.assertEqual([values, tokens], [request.json for request in server.requests])


# Response types


def parse(build, **fields):
    """Parse a completion, or a chunk, with these fields."""
    return friendli_lite._parse(FakeResponse(), json.dumps(fields).encode(), build)


_completion, _chunk = friendli_lite._completion, friendli_lite._chunk
PARSERS = {complete: _completion, stream: _chunk}


class CompletionTests(TestCase):
    def test_a_completion_has_all_that_the_server_said(self):
        self.serve()
        request = {"prompt": "Say this", "logprobs": 1, "n": 2, "model": "adapter"}
        logs = friendli_lite.Logprobs(**logprobs([" This", " is", " a", " test", "!"]))
        self.assertEqual([0, 5, 8, 10, 15], logs.text_offset)
        choices = [
            friendli_lite.CompletionChoice(index, TEXT, seed, "stop", [0, 1, 2, 3, 4], logs)
            for index, seed in enumerate([42, 43])
        ]
        usage = friendli_lite.Usage(2, 10, 12, {"cached_tokens": 0})
        start = ("cmpl-26a1e10db8544bc3adb488d2d205288b", "text_completion")
        expected = friendli_lite.Completion(*start, choices, usage, "adapter", completion(request))
        self.assertEqual(expected, complete("Say this", logprobs=1, n=2, model="adapter"))

    def test_a_stream_has_all_that_the_server_said(self):
        self.serve()
        options = {"max_tokens": 1, "logprobs": 1, "stream_options": {"include_usage": True}}
        logs = friendli_lite.Logprobs(**logprobs([" This"]))
        texts = [[friendli_lite.ChunkChoice(index, " This", 0, None, logs)] for index in (0, 1)]
        ends = [[friendli_lite.ChunkChoice(index, "", None, "length")] for index in (0, 1)]
        usages = [None] * 4 + [friendli_lite.Usage(1, 2, 3, {"cached_tokens": 0})]
        start, created = ("cmpl-1", "text_completion"), 1733382157
        payloads = chunks({"prompt": "p", "n": 2, **options})
        expected = [
            friendli_lite.CompletionChunk(*start, choices, created, usage, raw)
            for choices, usage, raw in zip([*texts, *ends, []], usages, payloads)
        ]
        self.assertEqual(expected, list(stream("p", n=2, **options)))

    def test_other_fields_are_kept_and_missing_ones_are_none(self):
        answer = {
            "choices": [{"text": "t", "finish_reason": "abort", "stop_reason": 3}],
            "usage": {"total_tokens": 3, "more": 1}, "system_fingerprint": "b1", "raw": {"a": 1},
            "headers": {"a": "b"}, "error": None,
        }  # fmt: skip
        choice = friendli_lite.CompletionChoice(None, "t", None, "abort", [], None)
        usage = friendli_lite.Usage(None, None, 3, None)
        expected = friendli_lite.Completion(None, None, [choice], usage, None, answer)
        found = parse(_completion, **answer)
        self.assertEqual((expected, {}), (found, found.headers))
        part = friendli_lite.ChunkChoice(None, "t", None, "abort", None)
        expected = friendli_lite.CompletionChunk(None, None, [part], None, usage, answer)
        self.assertEqual(expected, parse(_chunk, **answer))

    def test_null_is_as_good_as_missing_however_it_is_spelled(self):
        nothing = dict.fromkeys(["index", "seed", "tokens", "logprobs", "token"])
        nulls = dict.fromkeys(["id", "object", "usage", "model", "created", "error"])
        for build, reason in itertools.product(PARSERS.values(), (None, "null", "")):
            with self.subTest(reason, build=build.__name__):
                bare = parse(build, choices=[{"text": "a"}])
                choice = {"text": "a", "finish_reason": reason, **nothing}
                full = parse(build, choices=[choice], **nulls)
                self.assertIsNone(full.choices[0].finish_reason)
                full.raw = bare.raw
                self.assertEqual(bare, full)
        empty = parse(_completion, choices=[{"text": "a", "logprobs": {"tokens": None}}])
        self.assertEqual(friendli_lite.Logprobs([], [], [], []), empty.choices[0].logprobs)

    def test_text_is_that_of_the_choice_with_index_0_or_none(self):
        cases = [([0, 1], "a"), ([2, 1, 0], "c"), ([None, None], "a"), ([1, 2], "")]
        for (indexes, expected), build in itertools.product(cases, PARSERS.values()):
            with self.subTest(indexes, build=build.__name__):
                choices = [{"index": i, "text": text} for i, text in zip(indexes, "abc")]
                self.assertEqual(expected, parse(build, choices=choices).text)

    def test_a_chunk_may_lack_a_text_only_at_the_end_or_with_usage(self):
        usage = {"total_tokens": 3}
        for fields, choice, is_taken in [
            ({}, {"index": 0, "finish_reason": "stop"}, True),
            ({}, {"text": None, "finish_reason": "length"}, True),
            ({"usage": usage}, {"index": 0}, True),
            ({"usage": {}}, {"text": None, "finish_reason": None}, True),
            ({"usage": None}, {"index": 0}, False), ({"usage": usage}, {"text": 7}, False),
            ({}, {"finish_reason": "null"}, False), ({}, {"finish_reason": ""}, False),
        ]:  # fmt: skip
            with self.subTest(choice, **fields):
                answer = {"choices": [choice], **fields}
                texts, error = outcome_of_body(stream, sse(answer))
                expected = ([""], type(None)) if is_taken else ([], APIResponseError)
                self.assertEqual(expected, (texts, type(error)))
                _, error = outcome_of_body(complete, json.dumps(answer).encode())
                self.assertIs(APIResponseError, type(error))

    def test_the_shape_of_chat_is_an_error_that_says_so(self):
        message, end = {"content": "hi"}, {"finish_reason": "stop"}
        choices = [{"message": message, **end}, {"delta": {}, **end}, {"text": None, "delta": None}]
        for choice, call in itertools.product(choices, MEDIA_TYPES):
            with self.subTest(choice, call=call.__name__):
                data = json.dumps({"choices": [choice], "usage": {"total_tokens": 3}})
                texts, error = outcome_of_body(call, payload(call, data.encode()))
                self.assertEqual(([], APIResponseError), (texts, type(error)))
                self.assertIn("it has the shape of chat, another endpoint", str(error))
                self.assertEqual(data, error.body)
        for build in PARSERS.values():  # what also has a text is a completion
            self.assertEqual("a", parse(build, choices=[{"text": "a", "message": message}]).text)

    def test_headers_are_kept_but_neither_shown_nor_compared(self):
        self.serve(json_answer(completion({}), X_Request_Id="Ab-1", X_RateLimit_Remaining="7"))
        answer = complete("p")
        names = ("x-request-id", "x-ratelimit-remaining", "content-type")
        self.assertEqual(["Ab-1", "7", JSON], [answer.headers[name] for name in names])
        self.assertNotIn("Ab-1", repr(answer))
        twin = pickle.loads(pickle.dumps(answer))
        self.assertEqual((answer, answer.headers), (twin, twin.headers))
        self.assertEqual(parse(_completion, **completion({})), answer)
        part = parse(_chunk, choices=[{"text": "a"}])
        self.assertEqual(part, pickle.loads(pickle.dumps(part)))
        self.assertNotIn("raw", repr(answer) + repr(part))

    def test_the_headers_of_a_stream_are_those_of_its_last_attempt(self):
        first, second = (head(Content_Type=EVENTS, X_Id=number) for number in "12")
        self.serve(then_close(first), then_close(second + sse(text_chunk("a"))))
        with stream("p", retries=AT_ONCE) as chunks:
            self.assertEqual("1", chunks.headers["x-id"])
            self.assertEqual(["a"], [chunk.text for chunk in chunks])
        self.assertEqual("2", chunks.headers["x-id"])


# The two calls: the stream


class StreamTests(TestCase):
    def test_a_stream_is_a_generator_and_a_context_manager(self):
        self.serve()
        with stream("p") as chunks:
            self.assertIsInstance(chunks, collections.abc.Generator)
            self.assertIs(CompletionStream, type(chunks))
            self.assertIs(chunks, iter(chunks))
            self.assertEqual([" This", " is"], [next(chunks).text, chunks.send(None).text])
            self.assertNotIn(TOKEN, repr(chunks) + repr(chunks._call) + repr(chunks._call.response))
        self.assertRaises(StopIteration, next, chunks)
        self.assertRaises(StopIteration, chunks.send, None)
        self.assertEqual([], list(chunks))

    def test_an_error_thrown_in_closes_the_stream_and_comes_out(self):
        server = self.serve()
        errors = (KeyError("thrown"), APIConnectionError("thrown"), KeyboardInterrupt())
        for error, read in itertools.product(errors, (id, next)):
            with self.subTest(repr(error), read=read.__name__), stream("p") as chunks:
                text = str(error)
                read(chunks)
                with self.assertRaises(type(error)) as caught:
                    chunks.throw(error)
                self.assertIs(error, caught.exception)
                self.assertEqual(text, str(error))
                self.assertEqual([], list(chunks))
        with stream("p") as chunks:
            self.assertRaises(KeyError, chunks.throw, KeyError)
        self.assertEqual((7, 7), (len(server.requests), server.connections))

    def test_a_refused_request_raises_at_the_call(self):
        self.serve(json_answer({"error": "no"}, 422))
        self.assertRaises(APIStatusError, stream, "p")

    @unittest.skipUnless(os.path.isdir("/dev/fd"), "there is no folder of open descriptors")
    def test_streams_left_in_every_way_leave_no_descriptor_open(self):
        gc.disable()  # it would hide what is not let go at once
        self.addCleanup(gc.enable)
        before = open_descriptors()
        leaves = [
            id, CompletionStream.close, CompletionStream.__exit__,
            lambda chunks: chunks.throw(KeyboardInterrupt()),
        ]  # fmt: skip
        with self.serve() as server:
            for read, leave in itertools.product((id, next, list), leaves):
                with self.case(read, leave):
                    for _ in range(25):
                        chunks = stream("x")
                        read(chunks)
                        with contextlib.suppress(KeyboardInterrupt):
                            leave(chunks)
                        if leave is not id:
                            self.assertEqual([], list(chunks))
                        del chunks
            if sys.implementation.name != "cpython":  # collection comes when it comes
                gc.collect()
        friendli_lite._pool.close()
        self.assertEqual(before, open_descriptors())
        self.assertEqual(12 * 25, len(server.requests))


def closing_first(chunks, function):
    """Return a function that has another thread close a stream, and then does its own work."""

    def close_and_go_on(*args, **options):
        WORKERS.submit(chunks.close).result(5)
        return function(*args, **options)

    return close_and_go_on


class ClosedMeanwhileTests(TestCase):
    """Another thread closes a stream, in each phase of it."""

    def check_closed(self, read, source):
        """Check the error that a reader of the stream gets; return its number of attempts."""
        _, error = texts_and_error(functools.partial(read, source))
        self.check_error(APIConnectionError, error, ": another thread closed the stream")
        return error.attempts

    def cut_stream(self, *script):
        """Open a stream of which nothing comes, so that its first chunk needs a retry."""
        server = self.serve(then_close(STREAM_HEAD), *script)
        call, _ = prepared(server.url, stream=True)
        return server, call, CompletionStream(call.open())

    def test_before_anything_was_sent(self):
        server = self.serve()
        call, _ = prepared(server.url, stream=True)
        call.abort()
        self.assertEqual(0, self.check_closed(friendli_lite._Call.open, call))
        self.assertEqual(0, server.connections)

    def test_while_a_chunk_is_waited_for(self):
        """Over TLS by the socket below: SSLSocket.shutdown() would make it a plain one first."""
        for scheme, start in itertools.product(["http", "https"], [STREAM_HEAD, ONE_EVENT]):
            with self.each(scheme, hang(start)) as (server, options), self.within(2):
                chunks = stream("p", retries=3, timeout=5, **options)
                if start == ONE_EVENT:
                    next(chunks)
                waiting = WORKERS.submit(next, chunks)
                while not (chunks._chunks.gi_running or waiting.done()):
                    time.sleep(0.001)
                time.sleep(0.01)  # by now it most likely waits for the socket
                with mock.patch.object(ssl.SSLSocket, "shutdown") as shutdown:
                    chunks.close()
                    self.assertEqual(1, self.check_closed(Future.result, waiting))
                self.assertFalse(shutdown.called)
                self.assertEqual([], list(chunks))
                self.assertEqual(1, len(server.requests))

    def test_before_a_retry_has_a_connection(self):
        """The stream is closed just before the retry calls the function that a row names."""
        pool = friendli_lite._pool
        for owner, name, idle, attempts in [
            (None, "sleep", 0, [1]), (socket, "getaddrinfo", 0, [2]),
            (pool, "acquire", 0, [2]), (pool, "acquire", 1, [2, 3]),  # 3 if it is replaced
        ]:  # fmt: skip
            with self.case(name, idle):
                server, call, chunks = self.cut_stream()
                self.ask(idle)
                close_first = closing_first(chunks, getattr(owner or call, name))
                with mock.patch.object(owner or call, name, close_first):
                    self.assertIn(self.check_closed(next, chunks), attempts)
                self.assertEqual(1 + idle, len(server.requests))
                self.ask()

    def test_while_the_head_of_a_retry_is_waited_for(self):
        server, _, chunks = self.cut_stream()
        server.script(closing_first(chunks, hang()))
        self.assertEqual(2, self.check_closed(next, chunks))
        self.assertEqual(2, len(server.requests))

    def test_a_connection_that_was_released_is_left_alone(self):
        server, call, chunks = self.cut_stream(json_answer({}, 503))
        close_and_ask = closing_first(chunks, self.ask)
        call.sleep = lambda seconds: close_and_ask() if call.retry == 2 else None
        self.assertEqual(2, self.check_closed(next, chunks))
        self.assertEqual((3, 2), (len(server.requests), server.connections))

    def test_a_connection_that_another_call_uses_is_left_alone(self):
        server, call, chunks = self.cut_stream(json_answer({}, 503))
        server.script(closing_first(chunks, then_close(ANSWER)))
        call.sleep = lambda seconds: self.ask(call.retry - 1)  # not before the first retry
        self.assertEqual(2, self.check_closed(next, chunks))
        self.assertEqual((3, 2), (len(server.requests), server.connections))


# Building the request


def body(request=None, is_stream=False, **fields):
    """The body of a request, decoded."""
    return json.loads(friendli_lite._build_body(request, fields, is_stream))


def refused(function, *arguments, **options):
    """Pass what must be refused; return the error as the last line of its traceback."""
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


class BodyTests(TestCase):
    def test_a_request_is_a_prompt_a_mapping_or_a_completion_request(self):
        template = CompletionRequest(prompt="old", max_tokens=2, extra_body={"new_field": None})
        mapping = types.MappingProxyType({"prompt": "p", "n": 2})
        p, new = {"prompt": "p"}, {"a": {"b": [None]}, "c": 1}
        for request, fields, expected in [
            ("p", {}, p), ("", {}, {"prompt": ""}), (None, {"tokens": []}, {"tokens": []}),
            (None, {"prompt": ["p", "q"]}, {"prompt": ["p", "q"]}),
            ("p", {"temperature": 0, "seed": 0}, {**p, "temperature": 0, "seed": 0}),
            (mapping, {"n": 1, "stop": ("a", "b")}, {**p, "n": 1, "stop": ["a", "b"]}),
            (mapping, {"n": None, "seed": None}, p),
            (template, p, {**p, "max_tokens": 2, "new_field": None}),
            (template, {"extra_body": {}, "max_tokens": None}, {"prompt": "old"}),
            (CompletionRequest(tokens=[1]), {"extra_body": new}, {"tokens": [1], **new}),
        ]:  # fmt: skip
            with self.subTest(request=request, fields=fields):
                self.assertEqual(expected, body(request, **fields))
                self.assertEqual({**expected, "stream": True}, body(request, True, **fields))

    def test_stream_may_be_said_but_not_contradicted(self):
        for is_stream, other in [(False, "stream"), (True, "complete")]:
            self.assertEqual(is_stream, body("p", is_stream, stream=is_stream)["stream"])
            message = f"ValueError: stream={not is_stream} is for {other}()"
            self.assertEqual(message, refused(body, "p", is_stream, stream=not is_stream))

    def test_any_text_can_be_a_prompt_and_is_sent_as_compact_ascii(self):
        built = friendli_lite._build_body("é\ud800", {"extra_body": {"ü": [1.5, 2]}}, True)
        self.assertEqual(rb'{"prompt":"\u00e9\ud800","stream":true,"\u00fc":[1.5,2]}', built)
        server = self.serve()
        prompt = "a\ud800b\udcff\0\x7f\u2028\u00e9\U0001f600" + "0123456789" * 200_000
        self.ask(prompt=prompt)
        self.assertTrue(server.requests[0].json["prompt"] == prompt)  # no diff of 2 MB

    def test_what_json_has_not_is_not_sent(self):
        deep, circle, infinity = [], {}, float("inf")
        circle["circle"] = circle
        for _ in range(100_000):
            deep = [deep]
        values = [b"p", NAN, infinity, [1, -infinity], {1}, deep, circle, {(): 1}]
        for name, fields in [
            *(("z", {"prompt": "p", "extra_body": {"z": value}}) for value in values),
            ("prompt", {"prompt": b"p"}), ((), {"prompt": "p", "extra_body": {(): 1}}),
        ]:  # fmt: skip
            message = f"ValueError: {name!r} cannot be sent as JSON: "
            self.assertEqual(message, refused(body, **fields)[: len(message)])

    def test_what_the_caller_passes_is_never_changed(self):
        self.serve()
        fields = {"prompt": "p", "extra_body": {"z": {"y": 1}}, "n": None}
        for request in (fields, CompletionRequest(**fields)):
            arguments = {"request": request, "headers": {"x-a": "b"}, "stop": ["a"]}
            before = copy.deepcopy(arguments)
            complete(**arguments)
            list(stream(**arguments))
            self.assertEqual(before, arguments)
            self.assertEqual(request, pickle.loads(pickle.dumps(request)))


class URLTests(TestCase):
    def test_a_server_url_takes_prefixes_slashes_and_v1(self):
        kept = "http://h/v1x http://h/completions http://h/%41;b=c,d http://[2001:DB8::1.2.3.4]"
        kept += f" http://127.0.0.1:1 http://[::1]:8000 http://a_b.c-d.{'a' * 63}.{'b' * 63}.:65535"
        for url, expected in {
            **{url: url for url in kept.split()}, "HTTP://h:/": "http://h",
            "http://h:80/": "http://h:80", "HTTPS://h/v1": "https://h", "http://h": "http://h",
            "https://h/V1/Completions": "https://h", "http://h/v1/completions///": "http://h",
            "http://h//v1//completions": "http://h", "http://h/a/b/v1/": "http://h/a/b",
            "http://h/v1/v1": "http://h/v1",
        }.items():  # fmt: skip
            with self.subTest(url):
                self.assertEqual(f"{expected}/v1/completions", friendli_lite._completions_url(url))

    def test_each_mistake_in_a_server_url_has_its_own_words(self):
        for mistake, urls in {
            "it is empty": "", "it holds a backslash": "http://h\\a|https://\\",
            "it holds a blank or a control character": "http://h /|http://h\n| http://h|\0",
            "it holds a character that is not ASCII": "http://h/é|http://한국",
            "it must begin with http:// or https://": "localhost:8000|ftp://h|//h|http:/h",
            "it has a query": "http://h/?a=b|http://h?|http://?#", "it has a fragment": "http://h/#v1",
            "it has no host": "http://|http:///v1|https://:80|http:////",
            "it has % in its host": "http://h%41|http://[fe80::1%25lo]/v1",
            "it has an invalid host": "http://[::1|http://[g::1]|http://[]|http://[::1]a|http://a,b"
            f"|http://a..b|http://.a|http://a..b:0|http://{'a' * 64}",
            "it has an invalid port": "http://h:0|http://h:08|http://h:x|http://h:-1|http://h:80:80"
            "|http://h:65536|http://h:65540|http://h:65600|http://h:66000|http://h:70000"
            "|http://h:100000|http://h:+80|http://[::1]:x/%41",
        }.items():  # fmt: skip
            for url in urls.split("|"):
                with self.subTest(url):
                    message = f"ValueError: server_url cannot be {url!r}: {mistake}"
                    self.assertEqual(message, refused(friendli_lite._completions_url, url))

    def test_the_default_server_is_that_of_the_environment_or_localhost(self):
        local = "http://localhost:8000/v1/completions"
        self.assertEqual(local, friendli_lite._completions_url(None))
        for variable, expected in [("", local), ("http://h/a", "http://h/a/v1/completions")]:
            os.environ["FRIENDLI_SERVER_URL"] = variable
            self.assertEqual(expected, friendli_lite._completions_url(None))
        os.environ["FRIENDLI_SERVER_URL"] = "h"
        message = "ValueError: server_url cannot be 'h': it must begin with http:// or https://"
        self.assertEqual(message, refused(friendli_lite._completions_url, None))

    def test_long_urls_are_judged_at_once(self):
        parts = ("/", "/a", "/v1", "/v1/completions", "a.", ":1", "%")
        with self.within(1):
            for start, part in itertools.product(("http://h", "http://h/v1", "x"), parts):
                refused(friendli_lite._completions_url, start + part * 3000 + " ")


class HeaderTests(TestCase):
    def test_a_container_and_a_hosted_product_differ_in_url_token_and_model(self):
        options = {"model": "ENDPOINT_ID:ADAPTER", "headers": {"X-Friendli-Team": "my-team"}}
        hosted = {"authorization": f"Bearer {TOKEN}", "x-friendli-team": "my-team"}
        products = [("", {"token": ""}, {}), ("/dedicated", options, hosted)]
        for (path, options, more), call in itertools.product(products, MEDIA_TYPES):
            with self.case(path, call.__name__), self.serve() as server:
                self.ask(1, call, server_url=server.url + path, **options)
                (request,) = server.requests
                expected = "POST", f"{path}/v1/completions", options.get("model")
                found = request.method, request.path, request.json.get("model")
                self.assertEqual(expected, found)
                expected = {
                    "accept": MEDIA_TYPES[call], "accept-encoding": "identity",
                    "content-type": JSON, "content-length": str(len(request.body)),
                    "host": f"127.0.0.1:{server.port}", **more,
                    "user-agent": f"friendli_lite/{friendli_lite.__version__}",
                }  # fmt: skip
                self.assertEqual(expected, request.headers)

    def test_a_token_is_that_of_the_argument_or_of_the_environment(self):
        for variable, argument, expected in [
            (f" {TOKEN}\r\n", None, f"Bearer {TOKEN}"), (TOKEN, "\tother\n", "Bearer other"),
            ("\n", "a b~!", "Bearer a b~!"), (TOKEN, "", None), (TOKEN, " \n", None),
            ("", None, None), (None, None, None),
        ]:  # fmt: skip
            with self.subTest(variable=variable, argument=argument):
                environment = {} if variable is None else {"FRIENDLI_TOKEN": variable}
                with mock.patch.dict(os.environ, environment, clear=True):
                    headers = friendli_lite._build_headers(False, argument, None)
                self.assertEqual(expected, headers.get("Authorization"))

    def test_extra_headers_hold_what_http_allows_and_override_the_others(self):
        server = self.serve()
        ours = {
            "AUTHORIZATION": "Basic x", "accept": "a/b", "user-Agent": "me", "host": "",
            "X": "\t !~\x80\xff", "!#$%&'*+-.^_`|~09az": "",
        }  # fmt: skip
        self.ask(headers=ours)
        self.assertEqual(8, len(friendli_lite._build_headers(False, TOKEN, ours)))  # each once
        ours = {name.lower(): value for name, value in ours.items()}
        headers = server.requests[0].headers
        self.assertEqual({**headers, **ours}, headers)


NAN = float("nan")
HINTS = {
    "max_token": "did you mean 'max_tokens'?", "time_out": "did you mean 'timeout='?",
    "best_of": "extra_body takes new ones", "messages": "chat is left out; pass a prompt",
    "api_key": "use token=", "base_url": "use server_url=", "extra_headers": "use headers=",
    "http_headers": "use headers=", "max_completion_tokens": "use max_tokens=",
    "timeout_ms": "use timeout=, in seconds",
}  # fmt: skip
NO_PASSWORD = "ValueError: server_url must not hold user:password@; use token or headers"
CANNOT = "has a character that headers must not have"
USER_URLS = (f"http://user:{TOKEN}@h", f"{TOKEN}@h", f"http://h/{TOKEN}@?#")
TOKENS = (f"{TOKEN}\nx", f"é{TOKEN}", f"\x01{TOKEN}", f"{TOKEN}\x7f")
HEADER_NAMES = ("a b", "", "a:", "é", "a\n", "(a)", "\tx")
HEADER_VALUES = ("b\r\nc: d", "b\n", "\0", "\x7f", "\u0100", "\r", "\ud800", f"{TOKEN}\n")
SECONDS = "ValueError: timeout and total_timeout must be seconds, timeout above 0, or None"

# Arguments of a call, and the error that each is
MISTAKES = [
    *(({name: None}, f"TypeError: unknown field {name!r}; {hint}") for name, hint in HINTS.items()),
    ({"request": {"api_key": 1}}, "TypeError: unknown field 'api_key'; use token="),
    ({"request": {3: 1}}, "TypeError: unknown field 3; extra_body takes new ones"),
    ({"request": ["p"]}, "TypeError: request (a list of prompts is prompt=[...]) must be"
     " str or Mapping or CompletionRequest, not list"),
    ({"request": "p"}, "TypeError: the prompt was given twice, as request and as prompt="),
    ({"prompt": None}, "ValueError: exactly one of prompt and tokens is needed; neither was given"),
    ({"tokens": []}, "ValueError: exactly one of prompt and tokens is needed; both were given"),
    ({"stop": "END"}, 'TypeError: stop must be a list of strings: stop=["END"]'),
    ({"bad_words": ""}, 'TypeError: bad_words must be a list of strings: bad_words=[""]'),
    ({"extra_body": "z"}, "TypeError: extra_body must be Mapping, not str"),
    ({"extra_body": {"n": None}}, "ValueError: extra_body holds 'n', which is a field of its own"),
    ({"server_url": 3}, "TypeError: server_url must be str, not int"),
    *(({"server_url": url}, NO_PASSWORD) for url in USER_URLS),
    ({"token": TOKEN.encode()}, "TypeError: token must be str, not bytes"),
    *(({"token": token}, f"ValueError: token {CANNOT}") for token in TOKENS),
    ({"headers": [("a", "b")]}, "TypeError: headers must be Mapping, not list"),
    ({"headers": {b"a": "a"}}, "TypeError: the name of a header must be str, not bytes"),
    ({"headers": {"a": TOKEN.encode()}}, "TypeError: header 'a' must be str, not bytes"),
    *(({"headers": {name: "c"}}, f"ValueError: header {name!r} {CANNOT}") for name in HEADER_NAMES),
    *(({"headers": {"a": value}}, f"ValueError: header 'a' {CANNOT}") for value in HEADER_VALUES),
    *(({"headers": {name: "3"}}, f"ValueError: header {name!r} is set by the client")
      for name in ("Content-Length", "transfer-encoding")),
    ({"retries": "3"}, "TypeError: retries must be RetryConfig or int or NoneType, not str"),
    ({"retries": True}, "TypeError: retries must be RetryConfig or int or NoneType, not bool"),
    ({"retries": -1}, "ValueError: max_retries must be finite and not negative, not -1"),
    ({"timeout": "3"}, "TypeError: timeout must be int or float, not str"),
    ({"total_timeout": "3"}, "TypeError: total_timeout must be int or float, not str"),
    ({"timeout": 0}, SECONDS), ({"timeout": -1.5}, SECONDS), ({"timeout": NAN}, SECONDS),
    ({"total_timeout": NAN}, SECONDS),
    ({"ssl_context": ""}, "TypeError: ssl_context must be SSLContext or NoneType, not str"),
]  # fmt: skip


class MistakeTests(TestCase):
    def test_mistakes_are_named_unsent_and_show_no_credential(self):
        server = self.serve()
        credentials = {"token": TOKEN, "headers": {"X-Api-Key": TOKEN, "Cookie": TOKEN}}
        for (options, message), call in itertools.product(MISTAKES, MEDIA_TYPES):
            with self.subTest(message, call=call.__name__):
                error = raised(call, **{**credentials, **options})
                self.assertEqual(message, f"{type(error).__name__}: {error}")
                names = [f.f_code.co_name for f, _ in traceback.walk_tb(error.__traceback__)]
                self.assertEqual(["raised", call.__name__, "_prepare"], names)
                self.assertNotIn(TOKEN, shown(error))
                self.assertIsNone(error.__context__)
        os.environ["FRIENDLI_TOKEN"] = f"{TOKEN}\r\nX: y"
        self.check_error(ValueError, raised(complete), "token has a character")
        self.assertEqual(0, server.connections)

    def test_the_two_calls_have_the_same_parameters(self):
        names = ["server_url", "token", "retries", "total_timeout", "headers", "ssl_context"]
        for call in MEDIA_TYPES:
            expected = {**dict.fromkeys(names), "timeout": 600.0}
            self.assertEqual(((None,), expected), (call.__defaults__, call.__kwdefaults__))


# Sending with retries


BUSY = json_answer({}, 503)


class TimeLeftTests(TestCase):
    def test_a_socket_has_the_shorter_limit_and_a_message_names_it(self):
        silent, spent = ": no data received for timeout=0.25 s", ": total_timeout=1 s was spent"
        for limits, now, remaining, seconds, later, message in [
            ((0.25, 1.0), 0.0, 1.0, 0.25, 0.25, silent),
            ((0.25, 1.0), 0.75, 0.25, 0.25, 0.75, silent),
            ((0.25, 1.0), 0.875, 0.125, 0.125, 0.999, spent),  # it wakes up early
            ((0.25, 1.0), 0.0, 1.0, 0.25, 1.0, spent),
            ((1800.0, 1e6), 0.0, 1e6, 1800.0, 0.0, ": no data received for timeout=1800 s"),
        ]:
            with self.subTest(limits, now=now, later=later):
                clock = mock.Mock(return_value=100.0)
                timeouts = friendli_lite._Timeouts(*limits, clock)
                clock.return_value = 100.0 + now
                found = timeouts.elapsed(), timeouts.remaining(), timeouts.for_socket()
                self.assertEqual((now, remaining, seconds), found)
                clock.return_value = 100.0 + later
                self.assertEqual(message, timeouts.message())
                accepted = message.replace("received", "accepted")
                self.assertEqual(accepted, timeouts.message("accepted"))
        for spent in (0.0, -1.0):
            with self.assertRaisesRegex(socket.timeout, r"\Atimed out\Z"):
                friendli_lite._Timeouts(0.25, spent, lambda: 0.0).for_socket()

    def test_connecting_has_no_more_time_than_the_call_has_left(self):
        clock = mock.Mock(return_value=100.0)
        call = friendli_lite._Timeouts(5.0, 3.0, clock)
        for now, seconds in [(100.0, 3.0), (102.5, 0.5), (104.0, 0.0)]:
            clock.return_value = now
            timeouts = friendli_lite._ConnectTimeouts(call)
            self.assertEqual(seconds, timeouts.remaining())
            self.assertEqual(f" within {seconds:g} s (total_timeout)", timeouts.message())

    def test_none_is_no_limit_and_large_numbers_are_as_good(self):
        infinity, most = float("inf"), 1e6
        for limits, expected in [
            ((None, None), (most, most)), ((infinity, infinity), (most, most)),
            ((10**400, 10**400), (most, most)), ((1e300, 5), (most, 5)), ((0.5, 0), (0.5, 0)),
            ((0.5, None), (0.5, most)), ((3, -1.5), (3, -1.5)), ((3, -(10**400)), (3, -most)),
        ]:  # fmt: skip
            with self.subTest(limits):
                timeouts = friendli_lite._build_timeouts(*limits)
                self.assertEqual(expected, (timeouts.timeout, timeouts.total_timeout))
                self.assertIs(time.monotonic, timeouts.clock)


class SendingTests(TestCase):
    def waits(self, *answers, **options):
        """Make a call on a clock that only its delays advance; return these, and text or error."""
        self.clock = mock.Mock(return_value=0.0)
        with self.serve(*answers) as server:
            call, waits = prepared(server.url, clock=self.clock, **options)

            def sleep(seconds):
                waits.append(seconds)
                self.clock.return_value += seconds

            call.sleep = sleep
            result = outcome_of(call)
            attempts = [call.attempts, getattr(result, "attempts", call.attempts)]
            self.assertEqual([len(waits) + 1] * 3, [len(server.requests), *attempts])
            friendli_lite._pool.close()
            return waits, result

    def test_delays_grow_up_to_max_delay_and_the_jitter_is_full(self):
        config = RetryConfig(max_retries=5)
        for retries, draw, expected in [
            (6, 1.0, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]), (6, 0.5, [0.25, 0.5, 1.0, 2.0, 4.0, 4.0]),
            (6, 0.0, [0.0] * 6), (config, 1.0, [0.5, 1.0, 2.0, 4.0, 8.0]), (1, 1.0, [0.5]),
            (None, 1.0, [0.5, 1.0, 2.0]), (0, 1.0, []),
        ]:  # fmt: skip
            with self.subTest(f"{retries} retries", draw=draw):
                waits, error = self.waits(*[BUSY] * 9, retries=retries, draw=draw)
                self.assertEqual((expected, 503), (waits, error.status_code))
                after = f" (after {len(expected) + 1} attempts)" if expected else ""
                self.assertEqual(after, str(error).partition(" 503 Reason")[2])
        call = friendli_lite._Call  # in which the sleep and the chance are real
        self.assertEqual((time.sleep, random.uniform), (call.sleep, call.uniform))

    def test_broken_connections_are_tried_again_where_wanted(self):
        cut = then_close(JSON_HEAD + b"{")
        result = self.waits(fin, rst, cut, BUSY, retries=4)
        self.assertEqual(([0.5, 1.0, 2.0, 4.0], TEXT), result)
        waits, error = self.waits(cut, retries=RetryConfig(retry_connection_errors=False))
        self.assertEqual(([], APIConnectionError), (waits, type(error)))

    def test_what_a_server_asks_for_is_waited_out_if_there_is_time(self):
        date = email.utils.formatdate(2e9, usegmt=True)
        for asked, options, expected in [
            (["60", "nonsense", "61"], {}, [60.25, 0.5]), ([date] * 9, {"retries": 1}, [30.25]),
            (["3"] * 9, {"total_timeout": 3.5}, [3.25]), (["3"] * 9, {"total_timeout": 3.25}, []),
            (["3"] * 9, {"total_timeout": 3.0}, []),
            (["0"] * 9, {"total_timeout": 2.5, "retries": 9}, [0.25, 0.5, 1.0]),
        ]:  # fmt: skip
            with self.subTest(asked[0], **options), mock.patch("time.time", lambda: 2e9 - 30):
                answers = [json_answer({"error": "slow down"}, 429, Retry_After=a) for a in asked]
                waits, error = self.waits(*answers, draw=0.5, **options)
                self.assertEqual((expected, 429), (waits, error.status_code))
                last = asked[len(waits)]
                self.assertIn(f": slow down (Retry-After: {last})", str(error))

    def test_total_timeout_is_checked_again_after_parsing(self):
        decode = friendli_lite._decode_json

        def decode_slowly(text):
            self.clock.return_value += 3.0
            return decode(text)

        with mock.patch.object(friendli_lite, "_decode_json", decode_slowly):
            self.assertEqual(([], TEXT), self.waits(total_timeout=3.5))
            waits, error = self.waits(total_timeout=3.0)
        self.assertEqual([], waits)
        words = "the response came too late: total_timeout=3 s was spent"
        self.check_error(APITimeoutError, error, words)

    def test_a_timeout_is_tried_again_only_where_nothing_was_sent(self):
        with contextlib.ExitStack() as stack:
            full, silent = listener(stack, backlog=0), listener(stack)
            late = "no response: no data received for timeout="
            cases = [
                (full, False, 2, f"cannot connect within {SPENT} s (timeout)"),
                (silent.replace("http", "https"), False, 2, "cannot connect within"),
                (silent, False, 1, late), (silent, True, 2, late),
            ]  # fmt: skip
            futures = []
            for url, is_wanted, *_ in cases:
                retries = RetryConfig(1, initial_delay=0, retry_timeouts=is_wanted)
                options = {"retries": retries, "timeout": SPENT, "ssl_context": NO_CAS}
                futures.append(WORKERS.submit(raised, complete, server_url=url, **options))
            for (*_, attempts, message), future in zip(cases, futures):
                with self.subTest(message, attempts=attempts):
                    self.check_error(APITimeoutError, future.result(), message)
                    self.assertEqual(attempts, future.result().attempts)

    def test_a_stream_is_tried_again_until_its_first_event(self):
        server = self.serve(
            BUSY, then_close(event_stream(done=False)), BUSY,
            then_close(head(Content_Type=EVENTS, Connection="close") + b": ping\n\ndata: {"),
        )  # fmt: skip
        with stream("p", retries=RetryConfig(4, initial_delay=0)) as chunks:
            self.assertEqual(2, len(server.requests))
            self.assertEqual(TEXT, "".join(chunk.text for chunk in chunks))
        self.assertEqual(5, len(server.requests))
        server.script(then_close(event_stream(text_chunk("a"), done=False)))
        texts, error = outcome(stream, retries=AT_ONCE)
        self.assertEqual((["a"], 1, 6), (texts, error.attempts, len(server.requests)))
        self.check_error(APIConnectionError, error, server.url)

    @mock.patch.object(friendli_lite, "_MAX_CONNECT_SECONDS", 0.01)
    def test_only_the_last_attempt_decides_whether_anything_was_sent(self):
        with contextlib.ExitStack() as stack:
            full = listener(stack, backlog=0)
            call, _ = prepared(self.serve(fin).url, retries=2)
            call.sleep = lambda seconds: setattr(call, "url", full)
            error = outcome_of(call)
        self.assertEqual((APITimeoutError, 3), (type(error), error.attempts))


# Retry decisions


class RetryConfigTests(TestCase):
    SECONDS = ["initial_delay", "max_delay", "multiplier", "max_retry_after"]

    def test_it_takes_any_finite_number_of_seconds_and_any_statuses(self):
        for fields in [
            dict.fromkeys(self.SECONDS, 0), dict.fromkeys(self.SECONDS, sys.float_info.max),
            {"max_retries": 10**9, "status_codes": range(500, 600)}, {"status_codes": ()},
            *({"status_codes": kind([429])} for kind in (list, tuple, set, frozenset)),
        ]:  # fmt: skip
            with self.subTest(fields):
                config = pickle.loads(pickle.dumps(RetryConfig(**fields)))
                self.assertEqual({**vars(RetryConfig()), **fields}, vars(config))
        with self.assertRaises(dataclasses.FrozenInstanceError):
            config.max_retries = 1

    def test_it_refuses_what_is_no_number_of_seconds_and_no_status(self):
        kinds = "tuple or list or set or frozenset or range"
        finite = "ValueError: {name} must be finite and not negative, not {value}"
        for names, values, message in [
            (self.SECONDS, ("1", None, 1j), "TypeError: {name} must be int or float, not {kind}"),
            (["max_retries"], ("1", None, True, 2.5), "TypeError: {name} must be int, not {kind}"),
            (["status_codes"], ("429", 429), f"TypeError: {{name}} must be {kinds}, not {{kind}}"),
            (["status_codes"], (["4"], (4, "5")), "TypeError: each of {name} must be int, not str"),
            (self.SECONDS, (-1, -0.5, 10**400, float("inf"), NAN), finite),
        ]:  # fmt: skip
            for name, value in itertools.product(names, values):
                with self.subTest(name, value=value):
                    words = {"name": name, "value": value, "kind": type(value).__name__}
                    found = refused(RetryConfig, **{name: value})
                    self.assertEqual(message.format(**words), found)


class RetryDecisionTests(TestCase):
    def delay(self, error, retry=0, was_sent=True, **config):
        return friendli_lite._retry_delay(
            error, retry, was_sent, RetryConfig(**config), lambda low, high: low + high
        )

    def test_what_is_tried_again_is_as_configured(self):
        gateway, broken, late = APIStatusError("", 504), APIConnectionError(""), APITimeoutError("")
        asked, unwanted = {"retry_timeouts": True}, {"retry_connection_errors": False}
        for error, was_sent, config, expected in [
            (broken, True, {}, 0.5), (broken, False, {}, 0.5),
            (broken, True, {**unwanted, **asked}, None),
            (late, False, {}, 0.5), (late, False, {**unwanted, **asked}, None),
            (late, True, {}, None), (late, True, {**unwanted, **asked}, 0.5),
            (APIResponseError(""), True, asked, None),
            (APIStatusError("", 505), True, {**unwanted, "status_codes": range(500, 600)}, 0.5),
            (gateway, True, {}, None), (gateway, True, asked, 0.5),
            (gateway, True, {"status_codes": [504]}, 0.5),
            (gateway, True, {**asked, "status_codes": []}, 0.5),
            (APIStatusError("", 524), True, asked, 0.5),
            *((APIStatusError("", status), True, asked, None) for status in (501, 505, 525)),
        ]:  # fmt: skip
            with self.subTest(repr(error), was_sent=was_sent, **config):
                self.assertEqual(expected, self.delay(error, was_sent=was_sent, **config))
        retried = [status for status in range(600) if self.delay(APIStatusError("", status))]
        self.assertEqual([408, 429, 500, 502, 503, 520, 521, 522, 523, 529], retried)

    def test_only_trouble_that_no_retry_can_mend_is_not_tried_again(self):
        for cause, expected in [
            (OSError(errno.ENOENT, "no"), None),
            (socket.gaierror(errno.ENOENT, "later"), 0.5),  # EAI_AGAIN is 2 on macOS
            (ssl.SSLError(1, "[SSL: TLSV1_ALERT_INTERNAL_ERROR] no"), 0.5),
        ]:
            with self.subTest(repr(cause)):
                error = APIConnectionError("")
                error.__cause__ = cause
                self.assertEqual(expected, self.delay(error))

    def test_a_delay_has_a_limit_also_if_the_server_asks_for_it(self):
        for retry, seconds, config, expected in [
            (0, "", {}, 0.5), (4, "", {}, 8.0), (4000, "", {}, 8.0),
            (4000, "", {"multiplier": 0.5}, 0.0), (1, "", {"multiplier": 0}, 0.0),
            (0, "", {"initial_delay": 0}, 0.0), (4000, "", {"initial_delay": 0}, 0.0),
            (1, "", {"initial_delay": 1e200, "multiplier": 1e200}, 8.0),
            (3, "", {"initial_delay": 2, "multiplier": 3, "max_delay": 100}, 54),
            (9, "", {"initial_delay": 1e308, "multiplier": 1, "max_delay": 1e308}, 1e6),
            (0, "7", {}, 7.5), (0, "60", {}, 60.5), (0, "60.001", {}, None),
            (0, "99", {"max_retry_after": 99}, 99.5), (0, "1", {"max_retry_after": 0.5}, None),
            (0, "0", {"max_retry_after": 0}, 0.5), (0, "9" * 15, {"max_retry_after": 1e18}, 1e6),
        ]:  # fmt: skip
            with self.subTest(retry, seconds=seconds, **config):
                error = APIStatusError("", 503, {"retry-after": seconds})
                self.assertEqual(expected, self.delay(error, retry, max_retries=5000, **config))


class RetryAfterTests(TestCase):
    NOW = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT
    # Numbers that are none, and dates
    NONSENSE = (
        "|-1|+1|nan|inf|1e3|0x10|1_000|7s|1,5|.5|7 8|\u0663|soon|Wed|, , ,"
        "|Wed, 99 Oct 99999 07:28:30 GMT|Tue, 02 Jan 2024 1.2.3.4 GMT"
        "|Tue, 02 Jan 2024 1.2.3.4.5|Tue, 02 Jan 2024 1. GMT|Tue, 02 Jan 99999999999 00:00:00 GMT"
        "|Tue, 02 Jan 9999 99:99:99 GMT|Tue, 02 Jan 2024 00:00:00 +9999999999"
        "|Fri, 31 Dec 9999 23:59:59 -9999|Thu, 01 Jan 0001 00:00:00 GMT"
    )

    def asked(self, value, **headers):
        return friendli_lite._retry_after({"retry-after": value, **headers}, self.NOW)

    def test_all_its_forms_are_read_and_nonsense_asks_for_nothing(self):
        for value, expected in {
            "7": 7.0, " 8 ": 8.0, "1.5": 1.5, "2.": 2.0, "0" * 14 + "9." + "0" * 15: 9.0,
            "1000000000000000": 1e15, "1" * 400: float("inf"),
            "Wed, 21 Oct 2015 07:28:30 GMT": 30.0, "Wed, 21 Oct 2015 09:28:30 +0200": 30.0,
            "Wednesday, 21-Oct-15 07:28:30 GMT": 30.0, "Wed, 21 Oct 2015 07:27:59 GMT": 0.0,
            **dict.fromkeys([*self.NONSENSE.split("|"), "\0", "(" * 2000], 0.0),
        }.items():  # fmt: skip
            with self.subTest(value[:50]):
                self.assertEqual(expected, self.asked(value))
                self.assertEqual(expected, self.asked(value, **{"retry-after-ms": "soon"}))
                self.assertEqual(1.5005, self.asked(value, **{"retry-after-ms": "1500.5"}))
        for headers, expected in [({"retry-after-ms": "250"}, 0.25), ({}, 0.0)]:
            self.assertEqual(expected, friendli_lite._retry_after(headers, self.NOW))

    def test_whatever_email_utils_raises_is_nonsense(self):
        for error in (UnboundLocalError, TypeError, IndexError, OverflowError, RecursionError):
            patch = mock.patch("email.utils.parsedate_to_datetime", side_effect=error)
            with self.subTest(error.__name__), patch as parse:
                self.assertEqual(0.0, self.asked("odd"))
                parse.assert_called_once_with("odd")

    @unittest.skipUnless(hasattr(time, "tzset"), "this system has no time.tzset()")
    def test_a_date_without_a_zone_is_utc(self):
        self.addCleanup(time.tzset)
        self.addCleanup(os.environ.pop, "TZ")
        os.environ["TZ"] = "Asia/Seoul"
        time.tzset()
        for date in ("Wed Oct 21 07:28:30 2015", "Wed, 21 Oct 2015 07:28:30 -0000"):
            self.assertEqual(30.0, self.asked(date))


# The transport: reading a response


OK = b"HTTP/1.1 200 OK\r\n"
CODING, LENGTH = b"Transfer-Encoding: ", b"Content-Length: "
LONG = b"X: " + b"a" * 33_000
# What is wrong, what comes before it, the wrong parts (one for each response), what comes behind it
MALFORMED = [
    ("something other than HTTP/1.x", b"",
     b"<html>hello|\xff|\x15\x03\x01\x00\x02\x02\x46|SSH-2.0-OpenSSH_9.9|ICY 200 OK|HTTP/2 200"
     b"|HTTP/0.9 200 OK|http/1.1 200 OK| HTTP/1.1 200 OK|\n|\r\n", b""),
    ("something other than HTTP/1.x", head(103), b"nonsense", b""),
    ("a malformed status line", b"",
     b"HTTP/1.1|HTTP/1.x 200 OK|HTTP/1.12 200 OK|HTTP/1.1200 OK|HTTP/1.1 x OK|HTTP/1.1 20 OK"
     b"|HTTP/1.1 99999 OK|HTTP/1.1 -20 OK|HTTP/1.1 099 OK|HTTP/1.1  200 OK|HTTP/1.1\t200 OK"
     b"|HTTP/1.1 200OK|HTTP/1.1 200 O\0K|HTTP/1.1 200 O\rK|HTTP/1.1 \xb200 OK", b"\r\n"),
    ("a malformed header", OK, b" X: y", b"\r\n"),  # folded, but no header comes before
    ("a malformed header", OK + b"X: a\r\n",
     b"nonsense|X : y|Bad Name: x|: x|(x): y|X\0: y|X: a\0b|X: a\rb|\r|\xc9: x|\xa0X: y| b\0c"
     b"|\tb\rc", b"\r\n"),
    ("an unknown transfer-encoding", OK + LENGTH + b"5\r\n" + CODING,
     b"|gzip|identity|chunked;q=1|gzip, chunked|chunked, chunked|chunked, gzip", b"\r\n\r\n"),
    ("an invalid length", OK + LENGTH,
     b"|-5|+5|5.0|0x5|1e1|five|5 5|5, 6|5, 05|5,|,5|5;5|" + b"9" * 100, b"\r\n\r\n"),
    ("over 100 headers", OK + b"X: y\r\n" + b" y\r\n" * 99, b" y", b"\r\n"),
    ("over 100 headers", OK + b"".join(b"X-%d: y\r\n" % i for i in range(100)), b"X: y", b"\r\n"),
    ("over 32768 bytes of headers", b"", b"HTTP/1.1 200 " + b"O" * 33_000, b""),
    ("over 32768 bytes of headers", OK, LONG, b""),
    ("over 32768 bytes of headers", head(100) * 1500, b"HTTP/1.1 100 Reason", b"\r\n"),
    ("a malformed chunk", CHUNKED_JSON_HEAD,
     b"|zz|1_0|1\rx|1;a\0b|\xbd|-1|+1|0x1| 1|1 1|" + b"f" * 100, b"\r\n"),
    ("a malformed chunk", CHUNKED_JSON_HEAD, b"0" * 33_000 + b"|1;" + b"x" * 33_000, b""),
    ("a malformed chunk", CHUNKED_JSON_HEAD + b"1\r\na", b"XX|1", b"\r\n"),
    ("a malformed chunk", CHUNKED_JSON_HEAD + b"1\r\n{\r\n", b"zz|-0", b"\r\n"),
    ("a malformed header", CHUNKED_JSON_HEAD + chunked(ONE)[:-2], b"nonsense|X : y", b"\r\n"),
    ("over 32768 bytes of headers", CHUNKED_JSON_HEAD + chunked(ONE)[:-2], LONG, b""),
]  # fmt: skip


class ResponseTests(TestCase):
    def test_a_malformed_response_is_refused_and_what_is_wrong_is_quoted(self):
        for what, before, parts, behind in MALFORMED:
            is_open = not before.startswith(CHUNKED_JSON_HEAD)  # a bad head: _Connection closes it
            for part in parts.split(b"|"):
                for pieces in deliveries(before + part + behind):
                    with self.subTest(what, part=part[:90], pieces=len(pieces)):
                        texts, error, connection = outcome_of_pieces(complete, pieces)
                        self.assertEqual(([], APIResponseError), (texts, type(error)))
                        quoted = friendli_lite._one_line(repr(error.body))
                        self.assertEqual(f"the server sent {what}: {quoted}", str(error))
                        self.assertNotIn("\n", error.body)
                        body, whole = error.body.strip(), part.decode("latin-1").strip()
                        self.assertEqual(whole if len(pieces) == 1 else whole[: len(body)], body)
                        self.assertEqual(is_open, connection.is_open)

    def test_a_head_that_costs_time_is_refused_in_no_time(self):
        quotes = b'Content-Type: multipart/x; a="' + b'\r\n ";' * 40_000 + b"\r\n\r\n"
        nested = b"Content-Type: message/rfc822\r\r" * 2000 + b"\r\n\r\n"
        for data in (quotes, nested, b"X: \r\n" * 60_000, b"X:" + b" " * 240_000, b"\r" * 240_000):
            start = time.process_time()
            for pieces in deliveries(OK + data):
                with self.subTest(data[:20], pieces=len(pieces)):
                    _, error, _ = outcome_of_pieces(complete, pieces)
                    self.assertIs(APIResponseError, type(error))
            self.assertLess(time.process_time() - start, 0.5)

    def check_head(self, lines, status, reason, headers):
        for end in (b"\r\n", b"\n"):
            for pieces in deliveries(end.join([*lines, b"Content-Length: 0", b"", b""])):
                with self.subTest(lines[-1][:60], end=end, pieces=len(pieces)):
                    response = friendli_lite._Response(FakeConnection(pieces))
                    self.assertEqual((status, reason), (response.status, response.reason))
                    self.assertEqual({**headers, "content-length": "0"}, response.headers)

    def test_good_heads_are_taken_whether_they_come_at_once_or_by_byte(self):
        for line, status, reason in [
            (b"HTTP/1.1 200 ", 200, ""), (b"HTTP/1.1 200", 200, ""),
            (b"HTTP/1.0 200 OK", 200, "OK"), (b"HTTP/1.1 999 ?", 999, "?"),
            (b"HTTP/1.2 200 Very fine: caf\xe9", 200, "Very fine: café"),
        ]:  # fmt: skip
            self.check_head([line], status, reason, {})
        for lines, headers in [
            ([b"x-request-id: 7", b"X-OTHER:8"], {"x-request-id": "7", "x-other": "8"}),
            ([b"X: \t a : b \t "], {"x": "a : b"}), ([b"X: caf\xe9 \xff"], {"x": "café ÿ"}),
            ([b"X: \x01\x7f\x0b"], {"x": "\x01\x7f\x0b"}), ([b"X:", b"Y: "], {"x": "", "y": ""}),
            ([b"X: a", b"Y: b", b"x: c", b"X:"], {"x": "a, c, ", "y": "b"}),
            ([b"X: a", b"  b", b"\tc ", b"Y: d"], {"x": "a b c", "y": "d"}),
            ([b"!#$%&'*+-.^_`|~09: a"], {"!#$%&'*+-.^_`|~09": "a"}),
            ([b"X: " + b"a" * 32_000], {"x": "a" * 32_000}),
            ([b"X: y"] * 99, {"x": ", ".join("y" * 99)}),  # with Content-Length they are 100
        ]:  # fmt: skip
            self.check_head([b"HTTP/1.1 200 OK", *lines], 200, "OK", headers)

    def check_taken(self, call, data, is_kept=True):
        """Check that a response of ONE is read however it arrives, and whether all may be kept."""
        for pieces in deliveries(data):
            with self.subTest(data[-99:], call=call.__name__, pieces=len(pieces)):
                texts, error, connection = outcome_of_pieces(call, pieces, CUT)
                self.assertEqual((["a"], None, is_kept), (texts, error, connection.is_open))

    def test_good_framings_are_taken_and_end_where_they_say(self):
        """Each response is followed by the end of its connection; not all may be kept."""
        size, whole = b"%d" % len(ONE), chunked(ONE)
        long = b"X: " + b"y" * 20_000 + b"\r\n"
        bytewise = chunked(*(ONE[i : i + 1] for i in range(len(ONE))))
        extended = whole.replace(b"\r\n", b";a=b;c\r\n", 1).replace(b"0\r\n", b'00 ; x="y"\r\n')
        keep = b"\r\nConnection: x ,Keep-Alive"
        cases = {b"HTTP/1.1 200 OK": [
            (LENGTH + size, ONE, True), (LENGTH + b"000" + size, ONE, True),
            (LENGTH + b"\r\n " + size, ONE, True), (LENGTH + size + b" ,\t" + size, ONE, True),
            (LENGTH + b", ".join([size] * 3), ONE, True), (LENGTH + size + keep, ONE, True),
            (LENGTH + size + b"\r\nConnection: x, Close", ONE, False),
            (LENGTH + size + b"\r\nConnection: closed", ONE, True),
            (LENGTH + size + b"\r\nConnection: keep-alive\r\nConnection: close", ONE, False),
            (b"X: y", b" " * 200_000 + ONE, False),  # to the end of the connection
            (CODING.upper() + b"\tCHUNKED\t", whole, True),
            (CODING + b"chunked\r\n" + LENGTH + b"7", whole, False),
            (CODING + b"chunked" + keep, bytewise, True), (CODING + b"chunked", extended, True),
            (CODING + b"chunked", whole.replace(b"1a", b"1A"), True),
            (CODING + b"chunked", whole.replace(b"\r", b" \t\r", 1), True),
            (CODING + b"chunked", b"0" * 90 + whole[:-5] + b"000\r\n\r\n", True),
            (CODING + b"chunked", whole[:-2] + b"X: y\r\n z\r\n\r\n", True),
            (long + CODING + b"chunked", whole[:-2] + long + b"\r\n", True),
        ], b"HTTP/1.0 200 OK": [
            (LENGTH + size, ONE, False), (LENGTH + size + keep, ONE, True),
            (LENGTH + size + b"\r\nConnection: close, keep-alive", ONE, False),
            (CODING + b"chunked" + keep, whole, False),
        ], head(100) + head(103, Link="</a>; rel=preload") + head(199) + b"HTTP/1.1 200 OK": [
            (LENGTH + size, ONE, True), (CODING + b"chunked", whole, True),
        ]}  # fmt: skip
        for start, rows in cases.items():
            for (lines, body, is_kept), end in itertools.product(rows, [b"\r\n", b"\n"]):
                data = b"\r\n".join([start, b"Content-Type: application/json", lines, b"", body])
                self.check_taken(complete, data.replace(b"\r\n", end), is_kept)

    def test_a_stream_is_whole_at_done_whatever_becomes_of_its_end(self):
        whole = STREAM_HEAD + chunked(payload(stream, ONE))
        for end in (b"zz\r\n", b"-1\r\n", b"0\r\nnonsense\r\n\r\n", b"0\r\n" + LONG):
            self.check_taken(stream, whole[:-5] + end, is_kept=False)

    def test_bytes_behind_a_response_close_its_connection(self):
        forged = json_answer({"choices": [{"text": "forged"}]})
        for call, framing in itertools.product(MEDIA_TYPES, ["length", "chunked"]):
            data = framed(payload(call, ONE), framing, MEDIA_TYPES[call])
            for behind in (forged, forged * 100, b"\r\n"):
                with self.subTest(behind[:50], call=call.__name__, framing=framing):
                    texts, error, connection = outcome_of_pieces(call, [data + behind])
                    self.assertEqual((["a"], None, False), (texts, error, connection.is_open))

    def test_a_status_without_a_body_ends_with_its_head(self):
        for status, is_tunnel, is_kept in [
            (204, False, True), (304, False, True), (101, False, False), (200, True, False),
            (299, True, False),
        ]:  # fmt: skip
            for headers in ({}, {"Content_Length": 5}, {"Transfer_Encoding": "x"}):
                with self.case(status, is_tunnel, headers):
                    connection = FakeConnection([head(status, **headers)])
                    response = friendli_lite._Response(connection, is_tunnel)
                    self.assertEqual((status, b""), (response.status, response.read()))
                    response.close()
                    self.assertEqual(is_kept, connection.is_open)

    def test_a_wrong_content_length_is_an_error(self):
        for call, length, kind in [
            (complete, 0, APIResponseError), (complete, len(ONE) - 1, APIResponseError),
            (complete, 10**30, APIConnectionError), (stream, len(ONE) - 1, APIConnectionError),
        ]:  # fmt: skip
            with self.subTest(call=call.__name__, length=length):
                data = head(Content_Type=MEDIA_TYPES[call], Content_Length=length)
                texts, error, connection = outcome_of_pieces(call, [data + payload(call, ONE)], CUT)
                self.assertEqual(([], kind, False), (texts, type(error), connection.is_open))

    def test_a_response_is_read_once_to_its_end(self):
        connection = FakeConnection([head(Transfer_Encoding="chunked") + chunked(b"a")])
        response = friendli_lite._Response(connection)
        self.assertEqual([b"a", b"", b"", b""], [response.read() for _ in range(4)])

    def test_a_response_cut_at_any_byte_is_an_error_after_its_chunks(self):
        event, done = b"data: " + ONE + b"\n\n", b"data: [DONE]\n\n"
        bodies = {complete: [ONE[:11], ONE[11:]], stream: [event, event, done]}
        for (call, pieces), framing in itertools.product(bodies.items(), FRAMINGS):
            whole = framed(b"".join(pieces), framing, MEDIA_TYPES[call])
            if framing == "chunked":  # a cut between chunks is a cut between events
                whole = whole[: whole.index(b"\r\n\r\n") + 4] + chunked(*pieces)
            end = len(whole)
            if call is stream:  # ends at [DONE], by a line end or by that of the connection
                end = whole.index(b"[DONE]") + len(b"[DONE]") + (framing != "close")
            for length in range(len(whole)):
                data = whole[:length]
                has_head = b"\r\n\r\n" in data
                kind = None if length >= end else APIConnectionError
                if (call, framing) == (complete, "close") and has_head:
                    kind = APIResponseError  # only the JSON tells
                expected = ["a"] * (data.count(b"}\n\n") if call is stream else kind is None)
                with self.subTest(call=call.__name__, framing=framing, cut=data[-20:]):
                    texts, error, connection = outcome_of_pieces(call, [data], CUT)
                    self.assertEqual((expected, kind), (texts, error and type(error)))
                    if has_head and kind:
                        self.assertFalse(connection.is_open)

    def test_a_connection_that_ends_is_an_error_after_the_chunks_that_came(self):
        for framing, end, words in [
            ("chunked", fin, "the response was cut short: the server closed the connection"),
            ("close", fin, "the stream was cut short: it ended before [DONE]"),
            ("chunked", rst, "response was cut short"), ("close", rst, "response was cut short"),
        ]:  # fmt: skip
            data = framed(sse(text_chunk("a"), text_chunk("b")), framing, EVENTS)
            later = Later(data[: data.index(b"\n\n") + 9], end)
            with self.case(framing, end), self.serve(later):
                chunks = stream("x", retries=3, timeout=5)
                self.assertEqual("a", next(chunks).text)
                later.now()
                texts, error = texts_and_error(lambda chunks=chunks: chunks)
                self.assertEqual(([], []), (texts, list(chunks)))
                self.check_error(APIConnectionError, error, words)


# The transport: connections, reused, replaced, shared


class ReuseTests(TestCase):
    def test_calls_in_a_row_share_a_connection_over_http_and_https(self):
        """The session tickets of TLS 1.3, which follow the handshake, are no sign of death."""
        for scheme, call in itertools.product(["http", "https"], MEDIA_TYPES):
            with self.each(scheme) as (server, options):
                self.ask(4, call, **options)
                self.assertEqual((4, 1), (len(server.requests), server.connections))

    def test_after_an_error_page_a_connection_is_kept_if_all_of_it_came(self):
        start = head(503, Transfer_Encoding="chunked")
        for name, answer, connections in [
            ("whole", json_answer({}, 503), 1), ("empty", head(503, Content_Length=0), 1),
            ("larger than what is read of it", page(b"x" * 200_000, 503), 1),
            ("broken", start + b"nonsense\r\n", 2),
            ("broken in its trailers", start + b"1\r\na\r\n0\r\nBad Header\r\n\r\n0\r\n\r\n", 2),
            ("endless", endless(start, b"4\r\nabcd\r\n" * 999), 2),
            ("to its end", then_close(head(503) + b"x"), 2),
            ("stalled", hang(head(503, Content_Length=9) + b"x"), 2),
        ]:  # fmt: skip
            with self.case(name), self.serve(answer) as server:
                self.failure(APIStatusError, timeout=SPENT if name == "stalled" else 5)
                self.ask()
                self.assertEqual(connections, server.connections)

    def test_what_follows_done_is_received_and_the_connection_kept(self):
        for framing in ("chunked", "length"):
            start, done, rest = framed(payload(stream, ONE), framing, EVENTS).partition(b"[DONE]\n")
            for pieces in deliveries(rest):
                with self.subTest(framing, pieces=len(pieces)):
                    texts, error, connection = outcome_of_pieces(stream, [start + done, *pieces])
                    self.assertEqual((["a"], None, True), (texts, error, connection.is_open))
                    self.assertEqual(0.01, connection.timeouts.total_timeout)

    def test_a_stalled_or_endless_rest_after_done_delays_no_call(self):
        by_length = framed(sse(text_chunk("a")), "length", EVENTS)
        in_chunks = event_stream(text_chunk("a"))
        endless_end = endless(in_chunks[:-5], one_chunk(b"x" * 999))
        for answer in (hang(by_length[:-1]), hang(in_chunks[:-2]), endless_end):
            with self.case(answer), self.serve(answer) as server, self.within(3):
                self.assertEqual((["a"], None), outcome(stream))
                self.ask()
                self.assertEqual(2, server.connections)

    def test_other_contexts_and_proxies_get_connections_of_their_own(self):
        one, other = client_tls(), client_tls()
        with Proxy() as proxy, self.serve(tls=server_tls()) as server:
            with_password = proxy.url.replace("//", "//user:password@")
            for connections, context, proxy_url in [
                (1, one, ""), (2, other, ""), (2, one, ""), (3, one, proxy.url),
                (4, one, with_password), (4, one, ""), (4, other, ""),
            ]:  # fmt: skip
                os.environ["HTTPS_PROXY"] = proxy_url
                self.ask(ssl_context=context)
                self.assertEqual(connections, server.connections)

    def test_the_socket_sends_at_once_and_survives_a_nat_where_it_can(self):
        self.serve()
        self.ask()
        (connection,) = friendli_lite._pool._idle
        getsockopt = connection._sock.getsockopt
        self.assertTrue(getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        for name, value in [
            ("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 60),
            ("TCP_NOTSENT_LOWAT", 16384),
        ]:  # fmt: skip
            if hasattr(socket, name):
                found = getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                self.assertEqual(value, found, name)
        sock = mock.Mock(**{"setsockopt.side_effect": OSError()})  # a platform may lack them all
        friendli_lite._set_socket_options(sock)
        self.assertLess(3, sock.setsockopt.call_count)
        with mock.patch.object(friendli_lite, "socket", types.SimpleNamespace()):
            friendli_lite._set_socket_options(sock)


class IdleConnection:
    """Stands for an idle connection; `interrupt` is called whenever it is used."""

    idle_since = ()
    is_open = True

    def __init__(self, interrupt=lambda: None):
        self._interrupt = interrupt

    @property
    def route(self):
        self._interrupt()
        return "route"

    def is_alive(self):
        self._interrupt()
        return self.is_open

    def close(self):
        self._interrupt()
        self.is_open = False


class PoolTests(TestCase):
    def test_an_idle_connection_must_be_young_by_both_clocks(self):
        for monotonic, wall, is_kept in [
            (3.9, 3.9, True), (4.1, 4.1, False), (3.9, -3600.0, True), (3600.0, -3600.0, False),
            (4.1, 0.0, False),  # the clock was set back
            (0.1, 4.1, False),  # the machine slept, or the Lambda was frozen
        ]:  # fmt: skip
            with self.subTest(monotonic=monotonic, wall=wall):
                clocks = [mock.Mock(return_value=1000.0), mock.Mock(return_value=1_700_000_000.0)]
                pool, idle = friendli_lite._ConnectionPool(*clocks), IdleConnection()
                pool.release(idle)
                clocks[0].return_value += monotonic
                clocks[1].return_value += wall
                self.assertIs(idle if is_kept else None, pool.acquire("route"))
                self.assertEqual(is_kept, idle.is_open)
        self.assertEqual((time.monotonic, time.time), friendli_lite._pool._clocks)

    def test_the_connection_used_last_is_taken_the_oldest_closed(self):
        pool = friendli_lite._ConnectionPool(lambda: 0.0)
        idle = [IdleConnection() for _ in range(66)]
        for connection in idle:
            pool.release(connection)
        self.assertEqual([False] * 2 + [True] * 64, [connection.is_open for connection in idle])
        self.assertEqual([idle[65], idle[64]], [pool.acquire("route"), pool.acquire("route")])
        pool.release(idle[65])
        self.assertIs(idle[65], pool.acquire("route"))
        self.assertIsNone(pool.acquire("another route"))
        pool.close()
        self.assertEqual([False] * 64 + [True] * 2, [connection.is_open for connection in idle])
        self.assertIsNone(pool.acquire("route"))

    def test_what_has_rested_too_long_or_died_is_closed_when_the_pool_is_used(self):
        clock = mock.Mock(return_value=0.0)
        pool = friendli_lite._ConnectionPool(clock)
        old, young, dead = IdleConnection(), IdleConnection(), IdleConnection()
        pool.release(old)
        clock.return_value = 4.1
        pool.release(young)
        self.assertEqual([False, True], [old.is_open, young.is_open])
        pool.release(dead)
        dead.is_open = False
        self.assertIs(young, pool.acquire("route"))
        self.assertEqual({}, pool._idle)

    def use_interrupted(self, use, moment):
        """Use a pool, and take two connections at some moment; return all that can be taken."""

        def interrupt():
            countdown[0] -= 1
            if countdown[0] == 0:
                taken.extend([pool.acquire("route"), pool.acquire("route")])
            return 0.0

        countdown, taken = [0], []
        pool = friendli_lite._ConnectionPool(interrupt)
        pool.release(IdleConnection(interrupt))
        pool.release(IdleConnection(interrupt))
        countdown[0] = moment
        with mock.patch.object(friendli_lite, "_MAX_IDLE_CONNECTIONS", 1):
            taken.append(use(pool, IdleConnection(interrupt)))
        countdown[0] = 0
        taken.extend(iter(lambda: pool.acquire("route"), None))
        self.assertEqual({}, pool._idle)
        return [connection for connection in taken if connection is not None]

    def test_what_interrupts_the_pool_takes_only_open_connections_and_once(self):
        """As a signal handler, or another thread, may do at any moment."""
        for use in (
            lambda pool, another: pool.acquire("route"),
            lambda pool, another: pool.release(another),
            lambda pool, another: pool.close(),
        ):
            for moment in range(1, 12):
                with self.subTest(use=use, moment=moment):
                    taken = self.use_interrupted(use, moment)
                    self.assertEqual(len(taken), len(set(taken)))
                    self.assertEqual([], [found for found in taken if not found.is_open])


def alert(sock):
    """End a TLS connection by an alert, past the encryption."""
    os.write(sock.fileno(), b"\x15\x03\x03\x00\x02\x02\x50")
    return CLOSE


class DeadConnectionTests(TestCase):
    ENDS = [("http", fin), ("http", rst), ("https", fin), ("https", rst), ("https", alert)]

    def check_counts(self, expected, error, server):
        self.assertEqual(expected, (error.attempts, len(server.requests), server.connections))

    def test_one_that_was_closed_or_sent_what_nobody_asked_for_is_not_used(self):
        forged = json_answer({"choices": [{"text": "forged"}]})
        for scheme, end in [*self.ENDS, ("http", forged), ("https", forged)]:
            later = Later(ANSWER, end)
            with self.each(scheme, later) as (server, options):
                self.ask(**options)
                later.now()
                self.ask(**options)
                self.assertEqual((2, 2), (len(server.requests), server.connections))

    def test_one_that_closes_at_that_very_moment_is_replaced_a_new_one_is_not(self):
        for scheme, end in self.ENDS:
            with self.each(scheme, end, ANSWER, end, ANSWER, end, fin) as (server, options):
                error = self.failure(APIConnectionError, **options)
                self.check_counts((1, 1, 1), error, server)
                self.ask(2, **options)
                error = self.failure(APIConnectionError, **options)  # without a retry
                self.check_counts((2, 6, 4), error, server)

    def test_one_that_failed_counts_as_no_request_sent(self):
        """A timeout of the connection in its place is retried, as only where nothing was sent."""
        server = self.serve(ANSWER, fin)
        self.ask()
        call, _ = prepared(server.url, 1)
        address = socket.getaddrinfo("127.0.0.1", server.port, type=socket.SOCK_STREAM)
        lookup = mock.Mock(side_effect=[socket.timeout("timed out"), address])
        with mock.patch.object(socket, "getaddrinfo", lookup):
            self.assertEqual((TEXT, 3), (call.complete().text, call.attempts))

    def test_one_that_breaks_after_0_3_s_was_served_and_is_not_replaced(self):
        for seconds, requests, expected in [(0.29, 3, [TEXT]), (0.31, 2, [])]:
            clock = mock.Mock(return_value=0.0)

            def end_late(sock, clock=clock, seconds=seconds):
                clock.return_value += seconds
                return fin(sock)

            with self.case(seconds), self.serve(ANSWER, end_late) as server:
                self.ask()
                call, waits = prepared(server.url, 0, clock=clock)
                texts, error = texts_and_error(call.complete)
                self.assertEqual(expected, texts)
                self.assertIs(type(None) if expected else APIConnectionError, type(error))
                self.assertEqual((requests, []), (len(server.requests), waits))
                self.assertEqual(requests - 1, call.attempts)

    def test_after_a_byte_or_a_timeout_the_request_is_not_sent_again(self):
        """What is malformed is not tried again either, nor is the end of it waited for."""
        for kind, answer, options in [
            (APIConnectionError, then_close(b"H"), {}),
            (APIConnectionError, then_close(JSON_HEAD), {}),
            (APITimeoutError, hang(), {"timeout": SPENT}),
            (APIResponseError, hang(b"nonsense"), {"retries": 3}),
            (APIResponseError, hang(head(Content_Length="\xb2")), {"retries": 3}),
            (APIResponseError, hang(CHUNKED_JSON_HEAD + b"zz\r\n"), {"retries": 3}),
            (APIResponseError, hang(OK + b"X : y\r\n"), {"retries": 3, "call": stream}),
            (APIResponseError, hang(STREAM_HEAD + b"zz\r\n"), {"retries": 3, "call": stream}),
        ]:
            with self.case(kind.__name__, options), self.serve(ANSWER, answer) as server:
                self.ask()
                self.check_counts((1, 2, 1), self.failure(kind, **options), server)


class ThreadsAndProcessesTests(TestCase):
    def test_32_threads_each_get_the_responses_to_their_own_requests(self):
        logging.getLogger("friendli_lite").setLevel(logging.INFO)

        names = [f"adapter-{number}" for number in range(128)]
        with self.serve() as server, ThreadPoolExecutor(32) as threads:
            models = threads.map(lambda name: complete("x", model=name, retries=0).model, names)
            self.assertEqual(names, list(models))
            self.assertEqual(128, len(server.requests))
            self.assertLessEqual(server.connections, 64)  # two may reach for one idle connection

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no os.fork()")
    def test_a_forked_child_touches_no_connection_of_its_parent(self):
        def leave_and_ask():
            chunks._call.abort()
            chunks.close()
            self.ask()

        later = Later(STREAM[:-40], STREAM[-40:])
        with self.serve(later) as server:
            chunks = stream("x")
            text = next(chunks).text
            self.ask()
            self.assertEqual(0, exit_status(leave_and_ask))
            later.now()
            self.assertEqual(TEXT, text + "".join(chunk.text for chunk in chunks))
            self.ask(2)
            self.assertEqual((5, 3), (len(server.requests), server.connections))

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no os.fork()")
    def test_a_fork_while_another_thread_uses_the_pool_blocks_no_call(self):
        def clock():
            if threading.current_thread() is not threading.main_thread():
                looking.set()
                go_on.wait(5)
            return time.monotonic()

        looking, go_on = threading.Event(), threading.Event()
        pool = friendli_lite._ConnectionPool(clock)
        with mock.patch.object(friendli_lite, "_pool", pool), self.serve():
            future = WORKERS.submit(self.ask)
            self.assertTrue(looking.wait(5))
            self.assertEqual(0, exit_status(self.ask))
            go_on.set()
            future.result(5)
            pool.close()

    def test_a_connection_is_either_shut_down_or_left_to_the_pool(self):
        for is_shut_down in (True, False):
            with self.case(is_shut_down), self.serve() as server:
                response = prepared(server.url)[0]._send()
                friendli_lite._read_completion(response)
                connection = response.connection
                if is_shut_down:
                    connection.shut_down(connection._claim)
                response.close()
                connection.shut_down(connection._claim)
                response.close()
                self.assertEqual(is_shut_down, not connection.is_alive())
                idle = [] if is_shut_down else [connection]
                self.assertEqual(idle, list(friendli_lite._pool._idle))


def throw(error):
    raise error


@unittest.skipUnless(hasattr(signal, "pthread_kill"), "this system has no signals")
class SignalTests(TestCase):
    def handle(self, handler):
        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, handler))
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)

    def interrupt(self, size):
        """Have SIGALRM come while the client waits for what follows so many bytes."""
        receive, received, interrupted = friendli_lite._Connection.receive, [], []

        def receive_or_interrupt(connection, may_end=False):
            if len(b"".join(received)) == size and not interrupted:
                interrupted.append(True)
                signal.setitimer(signal.ITIMER_REAL, 0.002)
            received.append(receive(connection, may_end))
            return received[-1]

        return mock.patch.object(friendli_lite._Connection, "receive", receive_or_interrupt)

    def test_what_a_handler_raises_comes_out_as_it_is_and_leaves_nothing_open(self):
        before = open_descriptors()
        for scheme, (call, data, error) in itertools.product(["http", "https"], [
            (complete, b"", TimeoutError("x")), (complete, OK + b"Content-", KeyboardInterrupt()),
            (complete, JSON_HEAD, TimeoutError()), (complete, CHUNKED_JSON_HEAD, Exception()),
            (stream, b"", KeyboardInterrupt()), (stream, STREAM_HEAD, KeyboardInterrupt()),
            (stream, STREAM_HEAD + b"ff\r\ndata: ", TimeoutError("x")),
            (complete, head(503, Content_Length=9), ValueError()),
        ]):  # fmt: skip
            self.handle(lambda *_, error=error: throw(error))
            with self.each(scheme, hang(data)) as (server, options), self.interrupt(len(data)):
                with self.assertRaises(type(error)) as caught:
                    list(call("x", retries=3, timeout=5, **options))
                server.close()
                self.assertIs(error, caught.exception)
                self.assertLessEqual(server.connections, 1)  # nothing is sent again
        self.assertEqual(before, open_descriptors())

    def test_so_does_what_it_raises_in_the_handshake(self):
        def interrupted_handshake(sock):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            handshake(sock)

        handshake = ssl.SSLSocket.do_handshake
        patch = mock.patch.object(ssl.SSLSocket, "do_handshake", interrupted_handshake)
        with contextlib.ExitStack() as stack, patch:
            url = listener(stack).replace("http", "https")
            for error in (TimeoutError("too late"), ValueError("x"), KeyboardInterrupt()):
                self.handle(lambda *_, error=error: throw(error))
                with self.subTest(repr(error)), self.assertRaises(type(error)) as caught:
                    complete("x", server_url=url, retries=3, timeout=5, ssl_context=NO_CAS)
                self.assertIs(error, caught.exception)

    def test_a_timeout_is_ours_if_a_limit_was_spent_or_the_socket_says_so(self):
        clock = mock.Mock(return_value=0.0)
        connection = object.__new__(friendli_lite._Connection)
        connection.timeouts = friendli_lite._Timeouts(5.0, 10.0, clock)
        connection.via = ""
        for error, seconds, kind in [
            (socket.timeout("timed out"), 0.0, APITimeoutError),
            (TimeoutError("The read operation timed out"), 0.0, APITimeoutError),
            (socket.timeout(), 10.0, APITimeoutError),
            (TimeoutError("mine"), 10.0, APITimeoutError),
            (TimeoutError("mine"), 9.9, TimeoutError), (TimeoutError(), 0.0, TimeoutError),
            (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), 0.0, APIConnectionError),
            (TimeoutError(errno.ETIMEDOUT, "too late"), 0.0, APIConnectionError),
            (ConnectionResetError("x"), 0.0, APIConnectionError),
        ]:  # fmt: skip
            with self.subTest(repr(error), seconds=seconds):
                clock.return_value = seconds
                found = connection._failure("what", error)
                self.assertIs(kind, type(found))
                self.assertEqual(kind is TimeoutError, found is error)

    def test_a_handler_may_make_calls_of_its_own(self):
        answers = [(complete, ANSWER, 9), (stream, STREAM, 200)]
        for scheme, (call, answer, size) in itertools.product(["http", "https"], answers):
            later = Later(answer[:size], answer[size:])
            with self.each(scheme, later) as (server, options), self.interrupt(size):

                def ask_meanwhile(*_, options=options, later=later):
                    self.ask(**options)
                    later.now()

                self.handle(ask_meanwhile)
                self.ask(call=call, **options)
                self.ask(2, **options)
                self.assertEqual(4, len(server.requests))


# The transport: connecting, and the limits of time


NO_CAS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # for what fails before: it takes no time to make


def looked_up(*urls, error=None):
    """Have a name that is looked up lead to the addresses of these URLs, or to an error."""
    addresses = [(urlsplit(url).hostname, urlsplit(url).port) for url in urls]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    return mock.patch.object(socket, "getaddrinfo", return_value=found, side_effect=error)


class ConnectTests(TestCase):
    def test_addresses_that_are_late_or_refuse_cost_no_retry(self):
        connect = socket.socket.connect
        errors = [
            socket.timeout("timed out"), TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
            ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ]  # fmt: skip

        def fail_at_first(sock, address):
            if errors:
                raise errors.pop()
            connect(sock, address)

        server = self.serve()
        patch = mock.patch.object(socket.socket, "connect", fail_at_first)
        with looked_up(*[server.url] * 4) as lookup, patch:
            self.ask(2, server_url="http://localhost:9")
        lookup.assert_called_once_with("localhost", 9, type=socket.SOCK_STREAM)
        self.assertEqual((2, 1), (len(server.requests), server.connections))

    def test_what_a_handler_raises_leaves_out_the_next_address(self):
        for error in (TimeoutError("mine"), ValueError("mine"), KeyboardInterrupt()):
            patch = mock.patch.object(socket.socket, "connect", side_effect=error)
            with self.case(repr(error)), looked_up("http://a:1", "http://b:2"), patch as connect:
                with self.assertRaises(type(error)) as caught:
                    complete("x")
                self.assertIs(error, caught.exception)
                self.assertEqual(1, connect.call_count)

    def test_each_address_has_a_share_of_the_time_that_is_left(self):
        clock = mock.Mock()
        ipv6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))
        ipv4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))

        def time_out(address):
            clock.return_value += sockets.return_value.settimeout.call_args[0][0]
            raise socket.timeout("timed out")

        for total_timeout, found, shares, limit in [
            (60.0, [ipv6, ipv4], [2.5, 7.5], "10 s (the limit for connecting)"),
            (60.0, [ipv4] * 5, [2.0] * 5, "10 s (the limit for connecting)"),
            (3.0, [ipv6, ipv4, ipv4], [1.0] * 3, "3 s (total_timeout)"),
        ]:
            clock.return_value = 0.0
            call, _ = prepared("http://friendli.invalid", 0, total_timeout, clock=clock)
            lookup = mock.patch.object(socket, "getaddrinfo", return_value=found)
            with self.case(shares), lookup, mock.patch.object(socket, "socket") as sockets:
                sockets.return_value.connect.side_effect = time_out
                error = outcome_of(call)
                self.check_error(APITimeoutError, error, f": cannot connect within {limit}; ")
                expected, sock = [], mock.call()
                for (*kind, _, address), share in zip(found, shares):
                    waiting = [sock.settimeout(share), sock.connect(address), sock.close()]
                    expected += [mock.call(*kind), *waiting]
                self.assertEqual([*expected, sock.close()], sockets.mock_calls)

    def test_the_handshake_has_the_time_that_connecting_left(self):
        clock = mock.Mock(return_value=0.0)

        def take_long(sock):
            clock.return_value = friendli_lite._MAX_CONNECT_SECONDS - 0.02

        connected = mock.patch.object(friendli_lite, "_set_socket_options", take_long)
        with contextlib.ExitStack() as stack, connected, self.within(2):
            call, _ = prepared(listener(stack).replace("http", "https"), 0, clock=clock)
            call.ssl_context = NO_CAS
            error = outcome_of(call)
        self.check_error(APITimeoutError, error, "cannot connect within 10 s")

    def test_a_failed_connection_says_why_and_is_retried_unless_local(self):
        url = self.refuse()
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        up = "is the server up? check server_url (after 2 attempts)"
        numbers = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)
        local = "this machine is at fault, not the server"
        for lookup, reason, hint, attempts in [
            (looked_up(url, url, url), "Connection refused", up, 2),
            (looked_up(), "the name has no address", up, 2),
            (looked_up(error=OSError()), "OSError", up, 2),
            (looked_up(error=unknown), "Name or service not known", up, 2),
            *((looked_up(error=OSError(number, "x")), "x", local, 1) for number in numbers),
        ]:
            for call in MEDIA_TYPES:
                with self.case(call, reason), lookup as looked:
                    error = self.failure(APIConnectionError, call, **RETRY)
                    what = f"POST {url}/v1/completions: cannot connect"
                    self.assertEqual(f"{what}: {reason}; {hint}", str(error))
                    self.assertEqual((attempts, attempts), (error.attempts, looked.call_count))

    def test_the_default_ports_are_80_and_443(self):
        with looked_up() as lookup:
            for url, *asked in [
                ("http://h", "h", 80), ("https://h", "h", 443), ("https://h:8443", "h", 8443),
                ("http://[::1]", "::1", 80), ("http://H.:1", "h.", 1), ("https://h", "proxy", 80),
            ]:  # fmt: skip
                os.environ["HTTPS_PROXY"] = "http://proxy" if "proxy" in asked else ""
                self.failure(APIConnectionError, server_url=url, ssl_context=NO_CAS)
                self.assertEqual(asked, [*lookup.call_args[0]])


class WaitingTests(TestCase):
    SILENT = [  # the call, and what comes before the server falls silent
        (complete, b""), (complete, OK + b"Content-"), (complete, head(103)),
        (complete, JSON_HEAD), (complete, JSON_HEAD + b"{"), (stream, STREAM_HEAD),
        (stream, ONE_EVENT), (stream, STREAM_HEAD + b"ff\r\ndata: "), (stream, STREAM_HEAD + b"f"),
    ]  # fmt: skip
    SLOW = [  # the call, what comes at once, and what follows, too slowly, for ever
        (complete, b"HTTP/1.1 200 ", b"O"), (complete, OK + b"A: ", b"a"),
        (complete, head(103), head(103)), (complete, JSON_HEAD, b" "),
        (complete, CHUNKED_JSON_HEAD + chunked(ONE)[:-2] + b"X: ", b"y"),
        (stream, STREAM_HEAD, b"1\r\nd\r\n"), (stream, STREAM_HEAD, b"0"),
        (stream, STREAM_HEAD, one_chunk(b": ping\n\n")), (stream, STREAM_HEAD, A_CHUNK),
    ]  # fmt: skip

    def cases(self, stack):
        """Yield calls, URLs, options, and words of the error."""
        quiet, full = listener(stack), listener(stack, backlog=0)
        https = quiet.replace("http", "https")
        for limits in ({"timeout": 0.04}, {"total_timeout": 0.04}):
            has_total = "total_timeout" in limits  # which an earlier phase may have spent
            options = {**limits, "retries": AT_ONCE}  # for connecting, which may take long as well
            for call, data in self.SILENT:
                sent = threading.Event()
                server = self.serve(hang(data, sent))
                self.sent[f"127.0.0.1:{server.port}"] = sent
                what = "the response was cut short" if data else "no response"
                late = f"{what}: no data received for timeout=0.04 s"
                yield call, server.url, options, "total_timeout" if has_total else late
            late = "cannot connect within 0.04 s (timeout)"
            connecting = " s (total_timeout)" if has_total else late
            yield complete, https, {**limits, "ssl_context": NO_CAS}, connecting
            yield complete, full, limits, connecting
            upload = {**options, "prompt": "x" * 3_000_000}
            late = "the request could not be sent: no data accepted for timeout=0.04 s"
            yield complete, quiet, upload, "total_timeout" if has_total else late
        retries = RetryConfig(9, initial_delay=0, retry_timeouts=True)
        options = {"timeout": 0.02, "total_timeout": 0.05, "retries": retries}
        yield stream, quiet, options, ""  # either limit may be the last
        limits = {"total_timeout": 0.05}
        for call, start, more in self.SLOW:
            yield call, self.serve(trickle(start, more)).url, limits, "total_timeout"
        if shutil.which("openssl"):
            tls, options = shared_tls()
            server = self.serve(trickle(JSON_HEAD, b" "), tls=tls)
            yield complete, server.url, {**limits, **options}, "total_timeout"

    def test_a_call_waits_no_longer_than_it_was_told_in_any_phase(self):
        """All at once; each must take as long as its limit says.

        A server may be late on a busy machine, so no reading begins before it has fallen silent.
        """
        self.sent, receive = {}, friendli_lite._Connection.receive

        def receive_when_sent(connection, may_end=False):
            host = connection.route[1]
            if host in self.sent:
                self.sent[host].wait(10)
            return receive(connection, may_end)

        def run(call, url, options, words):
            start = time.monotonic()
            _, error = outcome(call, server_url=url, **options)
            return time.monotonic() - start, error

        with contextlib.ExitStack() as stack:
            cases = [*self.cases(stack)]
            reading = mock.patch.object(friendli_lite._Connection, "receive", receive_when_sent)
            stack.enter_context(reading)
            futures = [WORKERS.submit(run, *case) for case in cases]
            for (*case, options, words), future in zip(cases, futures):
                limit = options.get("total_timeout") or options["timeout"]
                with self.subTest(words, case=case, limit=limit):
                    elapsed, error = future.result()
                    self.check_error(APITimeoutError, error, words)
                    self.assertTrue(limit - 0.005 < elapsed < limit + 2, f"{elapsed} s: {error}")

    def test_no_limit_is_no_limit(self):
        self.serve()
        self.ask(2, timeout=None)
        self.ask(timeout=float("inf"), total_timeout=float("inf"))

    def test_a_spent_total_timeout_sends_nothing(self):
        server = self.serve()
        for call, seconds in itertools.product(MEDIA_TYPES, [0, -1.5]):
            error = self.failure(APITimeoutError, call, total_timeout=seconds, retries=3)
            words = f"the request was not sent: total_timeout={seconds} s was spent"
            self.check_error(APITimeoutError, error, words)
            self.assertEqual((0, 0), (error.attempts, server.connections))


class RawServer(StandInContainer):
    """A server that leaves all to one function of the connected socket, also the request."""

    def _serve(self, sock):
        with contextlib.suppress(OSError), sock:
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with sock:
                self._script[0](sock)


class UploadTests(TestCase):
    def test_a_response_to_an_upload_that_the_server_stopped_reading_is_read(self):
        """A server answers 413, and closes, before it has read 2 MB."""

        def refuse(sock):
            sock.recv(1000)
            sock.sendall(json_answer({"error": "too large"}, 413, Connection="close"))
            time.sleep(0.01)

        for scheme in ("http", "https"):
            tls, options = tls_for(scheme)
            with self.case(scheme), RawServer(refuse, tls=tls) as server:
                options = {"prompt": "x" * 2_000_000, "server_url": server.url, **options}
                error = self.failure(APIStatusError, retries=3, **options)
                self.assertEqual((413, "too large"), (error.status_code, error.message))
                self.assertEqual((1, 1), (error.attempts, server.connections))

    def test_an_early_response_is_read_whatever_sending_raises(self):
        """Python 3.10 to 3.12 raise SSLEOFError where others raise BrokenPipeError."""
        for error in (BrokenPipeError(), ConnectionResetError(), ssl.SSLEOFError()):
            sending = mock.patch.object(socket.socket, "send", side_effect=error)
            with self.case(repr(error)), RawServer(then_close(json_answer({}, 413))) as server:
                with sending:
                    found = self.failure(APIStatusError, server_url=server.url)
                self.assertEqual((413, 1), (found.status_code, server.connections))

    @unittest.skipUnless(hasattr(socket, "TCP_NOTSENT_LOWAT"), "the buffer hides what was not sent")
    def test_a_slow_line_shows_progress_over_http_and_https(self):
        """It takes 16 KiB in 0.028 s: larger pieces, or a buffer that hides them, are too slow.

        A busy machine may be slow to read as well, but hardly three times in a row.
        """
        size = 130_000

        def read_slowly(sock):
            received = 0
            for data in iter(lambda: sock.recv(4096), b""):
                received += len(data)
                if received < 80_000:
                    time.sleep(0.007)
                if received >= size:
                    sock.sendall(ANSWER)
                    break

        def upload(scheme):
            tls, options = tls_for(scheme)
            options = {"prompt": "x" * size, "timeout": 0.11, **options}
            for _ in range(3):
                with RawServer(read_slowly, tls=tls) as server:
                    server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    texts, error = outcome(complete, server_url=server.url, **options)
                if error is None:
                    break
            return texts, error

        schemes = ["http", "https"] if shutil.which("openssl") else ["http"]
        for scheme, found in zip(schemes, WORKERS.map(upload, schemes)):
            with self.subTest(scheme):
                self.assertEqual(([TEXT], None), found)


# The transport: proxies


class ProxyTests(TestCase):
    def through(self, proxy, user_password=""):
        """Have all calls go through a proxy, from now on."""
        url = f"http://{user_password}127.0.0.1:{proxy.port}"
        os.environ.update(HTTP_PROXY=url, HTTPS_PROXY=url)

    def test_http_is_forwarded_and_https_tunnelled_over_one_connection(self):
        """The password is for the proxy alone, the token for the server; NO_PROXY leaves it out."""
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options), Proxy("user:päss/w@rd") as proxy:
                self.through(proxy, "user:p%C3%A4ss%2Fw%40rd@")
                for call in MEDIA_TYPES:
                    self.ask(3, call, **options)
                self.assertEqual((6, 1), (len(server.requests), proxy.connections))
                tokens = {request.headers["authorization"] for request in server.requests}
                self.assertEqual({f"Bearer {TOKEN}"}, tokens)
                first, target = proxy.requests[0], f"127.0.0.1:{server.port}"
                if scheme == "http":
                    self.assertEqual(f"{server.url}/v1/completions", first.path)
                else:
                    self.assertEqual(("CONNECT", target), (first.method, first.path))
                    self.assertEqual({"host", "proxy-authorization"}, first.headers.keys())
                    self.assertEqual("/v1/completions", server.requests[0].path)
                    self.assertNotIn("proxy-authorization", server.requests[0].headers)
                    self.assertGreater(len(proxy.seen), 1000)
                    self.assertNotIn(TOKEN.encode(), proxy.seen)
                proxy.close()
                with mock.patch.dict(os.environ, NO_PROXY=target):
                    self.ask(**options)

    def test_a_tunnel_leads_to_a_host_and_its_port_or_serves_no_call(self):
        with Proxy(refusal=json_answer({}, 407)) as proxy:
            self.through(proxy)
            for url, target in [
                ("https://[::1]:8443", "[::1]:8443"), ("https://[::1]", "[::1]:443"),
                ("https://friendli.invalid:/a/b", "friendli.invalid:443"),
            ]:  # fmt: skip
                with self.case(url):
                    self.failure(APIStatusError, server_url=url, ssl_context=NO_CAS)
                    request = proxy.requests.pop()
                    self.assertEqual((target, {"host": target}), (request.path, request.headers))
                    self.assertEqual([], [*proxy.requests, *friendli_lite._pool._idle])

    def test_a_proxy_that_refuses_or_fails_is_named(self):
        for scheme in ("http", "https"):
            options = {"server_url": f"{scheme}://friendli.invalid", "ssl_context": NO_CAS}
            who, hint, late = " through the proxy", "", f"no data received for timeout={SPENT} s"
            if scheme == "https":
                who, hint, late = ": the proxy", "; check HTTPS_PROXY", f" {SPENT} s (timeout)"
            redirect = then_close(head(302, Location="http://login.invalid"))
            for kind, answer, *words in [
                (APIStatusError, json_answer({"error": "a"}, 407), "with 407 Reason: a; check "),
                (APIStatusError, json_answer({"error": "a"}, 300), "with 300 Reason: a"),
                (APIStatusError, redirect, "with 302 Reason"),
                (APIConnectionError, fin, "no response through "),
                (APITimeoutError, hang(), "no response through ", late),
                (APIResponseError, then_close(b"SSH-2.0-OpenSSH\r\n"), "SSH-2.0-OpenSSH"),
            ]:
                options["timeout"] = SPENT if kind is APITimeoutError else 5
                if kind is APIStatusError:
                    words += [f"{who} 127.0.0.1", hint]
                with self.case(scheme, kind, words), self.serve(answer) as proxy:
                    self.through(proxy, "user:wrong-secret@")
                    error = self.failure(kind, **options)
                    self.check_error(kind, error, f" the proxy 127.0.0.1:{proxy.port}", *words)
                    self.assertNotIn("wrong-secret", shown(error))

    def test_a_proxy_that_is_down_is_named(self):
        url = os.environ["HTTP_PROXY"] = os.environ["HTTPS_PROXY"] = self.refuse()
        for scheme in ("http", "https"):
            error = self.failure(APIConnectionError, server_url=f"{scheme}://friendli.invalid")
            what = f"cannot connect through the proxy {urlsplit(url).netloc}: "
            hint = f"refused; check {scheme.upper()}_PROXY"
            self.check_error(APIConnectionError, error, what, hint)

    def test_which_variable_names_the_proxy(self):
        a, b = "http://a:1", "http://b:2"
        for variables, *urls in [
            ({"HTTP_PROXY": a}, a, None), ({"HTTPS_PROXY": a}, None, a), ({"ALL_PROXY": a}, a, a),
            ({"all_proxy": a, "ALL_PROXY": b}, a, a),
            ({"https_proxy": a, "HTTPS_PROXY": b}, None, a),
            ({"HTTP_PROXY": a, "ALL_PROXY": b}, a, b), ({"HTTPS_PROXY": a, "all_proxy": b}, b, a),
            ({"HTTP_PROXY": "", "ALL_PROXY": a}, a, a),
            ({"http_proxy": "", "HTTP_PROXY": a}, None, None),
            ({"DEFAULT_PROXY": a, "default_proxy": a, "ANY_PROXY": a, "FTP_PROXY": a}, None, None),
            ({"HTTP_PROXY": a, "ALL_PROXY": b, "REQUEST_METHOD": ""}, b, b),
            ({"http_proxy": a, "HTTPS_PROXY": b, "REQUEST_METHOD": "GET"}, a, b),
            ({"ALL_PROXY": a, "NO_PROXY": "friendli.invalid:443"}, a, None),
            ({"ALL_PROXY": a, "NO_PROXY": "*", "no_proxy": "b.invalid"}, a, a),
            ({"ALL_PROXY": a, "NO_PROXY": "*", "no_proxy": ""}, a, a),
            ({"ALL_PROXY": a, "no_proxy": "friendli.invalid"}, None, None),
        ]:  # fmt: skip
            with self.subTest(variables), mock.patch.dict(os.environ, variables):
                for scheme, url in zip(("http", "https"), urls):
                    proxy = friendli_lite._find_proxy(scheme, "friendli.invalid")
                    found = proxy and (f"http://{proxy.address}", variables[proxy.source])
                    self.assertEqual(url and (url, url), found)

    def test_a_cgi_scripts_client_sets_no_proxy_on_windows_either(self):
        os.environ["REQUEST_METHOD"] = "POST"
        with mock.patch.object(os, "name", "nt"):
            self.assertTrue(friendli_lite._is_httpoxy("http_proxy"))
            self.assertFalse(friendli_lite._is_httpoxy("HTTPS_PROXY"))

    def test_the_forms_of_a_proxy_url(self):
        for url, address, user_password in [
            ("http://a:1", "a:1", None), ("http://a", "a", None), ("a:1", "a:1", None),
            ("HTTP://a.example.org.:1/", "a.example.org.:1", None),
            ("http://[::1]:1", "[::1]:1", None), ("user:word@a:1", "a:1", b"user:word"),
            ("http://user@a:1", "a:1", b"user:"), ("http://:word@a:1", "a:1", b":word"),
            ("http://user:a:b:@a:1", "a:1", b"user:a:b:"),
            ("http://us%3Aer:p%40ss%2F%20%C3%A9%E4@a:1", "a:1", b"us:er:p@ss/ \xc3\xa9\xe4"),
            ("http://user:\xe9@a:1", "a:1", b"user:\xc3\xa9"),
            ("http://user:a\udce4@a:1", "a:1", b"user:a\xe4"),
        ]:  # fmt: skip
            with self.subTest(ascii(url)), mock.patch.dict(os.environ, ALL_PROXY=url):
                proxy = friendli_lite._find_proxy("https", "friendli.invalid")
                encoded = base64.b64encode(user_password or b"").decode()
                headers = {"Proxy-authorization": f"Basic {encoded}"} if user_password else {}
                self.assertEqual((address, headers), (proxy.address, proxy.headers))
                self.assertNotIn("Basic", repr(proxy))

    def test_a_wrong_proxy_is_a_mistake_that_shows_no_password(self):
        server = self.serve()
        at = f"127.0.0.1:{server.port}"
        urls = (
            f"socks5://user:top-secret@{at}|https://user:top-secret@{at}|http://user:top-secret/x@{at}"
            f"|http://user:x@top-secret@{at}|http://user:top-secret x@{at}|http://u:top-secret"
            "|http://user:top-secret@|http://a:1/top-secret|http://a:1?top-secret|http://a:99999"
            "|http://|//|:1|http:///a|http://%0d%0a:80|http://\u212a:1|a b| http://a:1|http://a:1\n"
        ).split("|")
        for variable, url in itertools.product(("HTTP_PROXY", "https_proxy", "all_proxy"), urls):
            scheme = "https" if variable == "https_proxy" else "http"
            environment = mock.patch.dict(os.environ, {variable: url})
            with self.subTest(url, variable=variable), environment:
                options = {"server_url": f"{scheme}://{at}", "ssl_context": NO_CAS}
                error = self.failure(ValueError, **options)
                self.assertRegex(str(error), rf"\A{variable} must be like http://host:port ")
                self.assertNotIn("top-secret", shown(error))
        self.assertEqual(0, server.connections)

    def test_no_proxy_as_people_write_it(self):
        for no_proxy, excluded, others in [
            ("", "", "127.0.0.1 localhost"),
            ("localhost,127.0.0.1,::1", "localhost a.localhost 127.0.0.1 [::1] [::1]:9", "[::2]"),
            ("[::1]", "[::1] [::1]:9 [0:0::1]", "[::2]"),
            ("[::1]:9", "[::1]:9", "[::1] [::1]:99"), ("0:0:0:0:0:0:0:1", "[::1]", "[::2]"),
            ("10.1.2.3/8", "10.2.3.4 10.255.0.1:9", "11.0.0.1 [::10] 10.example.org"),
            ("fd00::/8", "[fd00::1] [fdff::1]:9", "[fe80::1] 10.0.0.1"),
            ("example.org:80", "example.org a.example.org:80", "example.org:8080"),
            ("example.org", "example.org example.org. a.example.org a.b.example.org:9", "b.org"),
            (".example.org", "example.org a.example.org EXAMPLE.org", "badexample.org"),
            ("*.example.org", "example.org a.example.org", "badexample.org example.org.uk"),
            ("EXAMPLE.Org.", "example.org a.example.org.", "example.com"),
            ("*", "example.org 127.0.0.1 [::1]:9", ""), ("a.org,*", "127.0.0.1 b.invalid", ""),
            (" a.invalid , ,b.org\tlocalhost  c.org,", "a.invalid b.org localhost c.org", "d.org"),
            ("1, 7.0.0.1, .0.0.1, 0.0.1, *.0.0.1", "", "127.0.0.1"),
            ("ocalhost, ample.org, a.example.org", "", "localhost example.org b.a-example.org"),
            ("http://example.org, [::1, ::1]", "", "example.org [::1]"),
            ("10.0.0.0/99, ::1/999, /8, /", "", "10.0.0.1 [::1] example.org"),
        ]:  # fmt: skip
            os.environ["NO_PROXY"] = no_proxy
            for host in f"{excluded} {others}".split():
                with self.subTest(no_proxy, host=host):
                    is_excluded = friendli_lite._is_excluded("http", host)
                    self.assertIs(host in excluded.split(), is_excluded)

    def test_the_systems_settings_count_without_variables_and_are_read_once(self):
        self.addCleanup(friendli_lite._system_proxy.cache_clear)
        functions = {"http": "getproxies_macosx_sysconf", "https": "getproxies_registry"}
        for scheme, function in functions.items():
            system, here = "the system's proxy settings", {scheme: "a:1", "ftp": "ftp://x"}
            for settings, is_bypassed, variables, found in [
                (here, False, {}, ("a:1", system)), (here, True, {}, None),
                (here, False, {"NO_PROXY": "11.0.0.0/8"}, ("a:1", system)),
                (here, False, {"NO_PROXY": "10.0.0.0/8"}, None), ({"ftp": "a:1"}, False, {}, None),
                (here, False, {"ALL_PROXY": "b:2"}, ("b:2", "ALL_PROXY")), ({}, False, {}, None),
            ]:  # fmt: skip
                friendli_lite._system_proxy.cache_clear()
                read, bypass = mock.Mock(return_value=settings), mock.Mock(return_value=is_bypassed)
                patches = {function: read, "proxy_bypass": bypass, "create": True}
                system_says = mock.patch.multiple("urllib.request", **patches)
                environment = mock.patch.dict(os.environ, variables)
                with self.subTest(scheme, found=found), system_says, environment:
                    proxy = friendli_lite._find_proxy(scheme, "10.1.2.3:80")
                    self.assertEqual(found, proxy and (proxy.address, proxy.source))
                    self.assertEqual("ALL_PROXY" not in variables, read.called)
                    read.reset_mock()
                    self.assertEqual(proxy, friendli_lite._find_proxy(scheme, "10.1.2.3:80"))
                    read.assert_not_called()


# The transport: TLS


class TLSTests(TestCase):
    def default_context(self):
        """Have the default context built anew, in this test and in the next; return its builder."""
        self.addCleanup(friendli_lite._default_ssl_context.cache_clear)
        friendli_lite._default_ssl_context.cache_clear()
        build = mock.patch.object(ssl, "create_default_context", wraps=ssl.create_default_context)
        self.addCleanup(build.stop)
        return build.start()

    def test_a_refused_certificate_is_not_tried_again_and_the_advice_fits(self):
        self.default_context()
        ca = "pass ssl_context, or name a file with its CA in SSL_CERT_FILE"
        clock = "check this machine's clock, or have the certificate renewed"
        elsewhere, host = "not valid for '127.0.0.1'", "check the host in server_url"
        unknown, closed = "unable to get|self[- ]signed", "names /no/file, which cannot be opened"
        for name, context, variables, reason, hint in [
            ("self-signed", client_tls(), {}, "self[- ]signed", ca),
            ("elsewhere", client_tls(), {}, elsewhere, host),
            ("expired", client_tls(), {"SSL_CERT_FILE": "/no/file"}, "expired", clock),
            ("server", None, {}, unknown, ca),
            ("server", None, {"SSL_CERT_FILE": __file__}, unknown, ca),
            ("server", None, {"SSL_CERT_FILE": "/no/file"}, unknown, f"SSL_CERT_FILE {closed}"),
            ("server", None, {"SSL_CERT_DIR": "/no/file"}, unknown, f"SSL_CERT_DIR {closed}"),
        ]:
            with self.case(name, variables), self.serve(tls=server_tls(name)) as server:
                with mock.patch.dict(os.environ, variables):
                    error = self.failure(APIConnectionError, ssl_context=context, retries=3)
                words = rf"cannot connect: TLS failed: .*({reason}).*; {hint}\Z"
                self.assertRegex(str(error), words)
                counts = error.attempts, server.connections, len(server.requests)
                self.assertEqual((1, 1, 0), counts)

    def test_no_tls_is_told_and_one_that_leaves_in_the_handshake_asked_again(self):
        def rst_in_the_handshake(sock):
            sock.recv(1)  # a RST before it makes wrap_socket() of Python leave a socket open
            rst(sock)

        no_tls = "the server does not speak TLS, try http://"
        left = r"is the server up\? check server_url \(after 2 attempts\)"
        for answer, hint, attempts in [
            (hang(head(400)), no_tls, 1), (hang(b"SSH-2.0-OpenSSH_9.9\r\n"), no_tls, 1),
            (hang(b"nonsense" * 9), no_tls, 1), (fin, left, 2), (rst_in_the_handshake, left, 2),
        ]:  # fmt: skip
            with self.case(answer), RawServer(answer) as server:
                url = server.url.replace("http", "https")
                options = {"server_url": url, "ssl_context": NO_CAS, **RETRY}
                error = self.failure(APIConnectionError, **options)
                self.assertRegex(str(error), rf"cannot connect: [^;]+; {hint}\Z")
                self.assertEqual((attempts, attempts), (error.attempts, server.connections))

    def test_a_client_certificate_is_shown_where_one_is_asked_for(self):
        path, context = certificates(), client_tls()
        with self.serve(tls=server_tls(client_ca=path("ca.pem"))) as server:
            self.failure(APIConnectionError, ssl_context=context)
            self.assertEqual([], server.requests)
            context.load_cert_chain(path("elsewhere.pem"), path("elsewhere.key"))
            self.ask(3, ssl_context=context)
            self.assertEqual(2, server.connections)

    def test_a_trailing_dot_is_not_part_of_the_name_in_tls(self):
        names, tls = [], server_tls()
        tls.sni_callback = lambda sock, name, context: names.append(name)
        with self.serve(tls=tls) as server, looked_up(server.url) as lookup:
            for host in ("localhost", "localhost."):
                self.ask(server_url=f"https://{host}:{server.port}", ssl_context=client_tls())
                self.assertEqual((host, server.port), lookup.call_args[0])
                self.assertEqual(f"{host}:{server.port}", server.requests[-1].headers["host"])
        self.assertEqual(["localhost", "localhost"], names)

    def test_a_default_context_is_built_for_https_once_and_for_new_variables(self):
        def answer(sock):
            protocols.append(sock.selected_alpn_protocol())
            sock.sendall(ANSWER)

        protocols, build, path = [], self.default_context(), certificates()
        os.environ["SSL_CERT_FILE"] = path("ca.pem")
        self.serve()
        self.ask()
        self.assertEqual(0, build.call_count)
        tls = server_tls()
        tls.set_alpn_protocols(["h2", "http/1.1"])
        with self.serve(answer, tls=tls), ThreadPoolExecutor(8) as threads:
            self.ask()
            list(threads.map(lambda _: self.ask(2), range(8)))
            self.assertEqual((1, ["http/1.1"]), (build.call_count, protocols))
            for count, name, value in [(2, "SSL_CERT_DIR", "."), (3, "SSL_CERT_FILE", "./ca.pem")]:
                friendli_lite._pool.close()
                os.environ[name] = path(value)
                self.ask()
                self.assertEqual(count, build.call_count)

    def test_a_default_context_is_built_anew_after_a_fault_of_this_machine(self):
        """As a file of CAs that is not there yet; where it does not matter, it is not blamed."""
        build, path = self.default_context(), certificates()
        late = os.environ["SSL_CERT_FILE"] = path("late")
        fault = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        with self.serve(tls=server_tls()) as server:
            with looked_up(error=fault):
                self.failure(APIConnectionError)
            self.failure(APIConnectionError)
            shutil.copy(path("ca.pem"), late)
            self.ask()
            self.assertEqual((3, 2), (build.call_count, server.connections))
            os.remove(late)
        url = self.refuse().replace("http", "https")
        error = self.failure(APIConnectionError, server_url=url)
        self.check_error(APIConnectionError, error, "refused; is the server up?")

    @unittest.skipUnless(hasattr(ssl.SSLContext, "keylog_filename"), "this Python logs no keys")
    def test_a_file_for_keys_that_cannot_be_opened_is_named(self):
        self.default_context()
        server = self.serve()
        url = server.url.replace("http", "https")
        path = os.environ["SSLKEYLOGFILE"] = os.path.join(HERE, "no", "such", "folder")
        error = self.failure(APIConnectionError, server_url=url, retries=3)
        words = f"; SSLKEYLOGFILE names {path}, which cannot be opened"
        self.check_error(APIConnectionError, error, words)
        self.assertEqual((1, 0), (error.attempts, server.connections))


# Error texts


class MessageTests(TestCase):
    MESSAGES = [
        # JSON of any form
        ('{"detail": "no such model"}', "no such model"), ('{"code": "E42"}', "E42"), ("3", "3"),
        ('{"detail": [{"loc": ["body", "stop", 0], "msg": "is null", "type": "type"}, "more"]}',
         "body.stop.0: is null; more"),
        ('{"detail": [{"loc": "body", "msg": "no list"}]}', "no list"), ('" text "', "text"),
        ('[{"B": 1, "Msg": "2", "error": "1", "detail": 1}, null, {"loc": [1], "msg": 0},'
         ' {"loc": [1]}, ["x"]]', "1: 2; 1: 0; x"),
        ('{"error": {"message": "overloaded", "code": 3}}', "overloaded"),
        ('{"error": {"code": 3}, "message": "outer"}', "outer"), ('{"reason": "no"}', "no"),
        ('{"error": {"message": "a", "details": [{"reason": "B"}]}}', "B: a"),
        ('{"success": false, "errors": [{"code": 1, "message": "a"}, {"message": "b"}]}', "a; b"),
        ('{"Error": {"Code": "AccessDenied", "Message": "no"}}', "no"),
        ('{"fault": {"faultstring": "spent"}}', "spent"), ('{"fault": {"code": "E1"}}', "E1"),
        ('{"errorMessage": "boom", "errorType": "X"}', "boom"), ('{"errors": [{"code": 7}]}', "7"),
        ('{"error_message": "boom"}', "boom"), ('{"description": "boom"}', "boom"),
        ('{"type": "https://a/b", "title": "No credit", "detail": "It is 30", "status": 403}',
         "No credit: It is 30"),
        ('{"error": "invalid_grant", "error_description": "expired"}', "invalid_grant: expired"),
        ('{"error": {"message": "", "type": "overloaded", "param": null}}', "overloaded"),
        ('{"error": {"code": "filter"}}', "filter"), ('{"error": null, "message": "m"}', "m"),
        ('{"error": true, "message": "m"}', "m"), ('{"error": " ", "message": "m"}', "m"),
        *((text, "") for text in ("[]", "{}", "null", "false", '""')),
        # Where no known key has a text, the JSON itself
        *((text, text) for text in ('{"a": "b"}', '{"error": []}', '{"error": {"a": 1}}', "true")),
        *((text, text) for text in ("[" * 5000, '{"error":' * 5000)),
        ('{"error": ' + "1" * 5000 + "}",) * 2,  # a number that Python refuses to read
        # Text and web pages, as a person reads them
        ("", ""), ("plain\r\n text", "plain text"), ("1 < 2 and 3 > 2 <3", "1 < 2 and 3 > 2 <3"),
        ("<html><title>502</title><p>Bad Gateway</p></html>", "502 Bad Gateway"),
        ("<!DOCTYPE html><!-- <p>no --><p\nclass='a'>yes<br/>and</p>", "yes and"),
        ('<?xml version="1.0"?><Message>No</Message>', "No"), ("AT&T &bogus; &",) * 2,
        ("<style>a > b {}</style>a<SCRIPT src=x>if (a<b) {}</script >b", "a b"),
        ("<script>\na\n</script>\n<!--\nb\n-->\n<p\n>c", "c"), ("a<styled>b</styled>", "a b"),
        ("a<script>never ends", "a"), ("a<!-- never ends", "a"),
        ("caf&eacute; &#8364; &#x20AC; &lt;b&gt; &amp;lt; a&nbsp;b", "café € € <b> &lt; a b"),
    ]  # fmt: skip

    def test_the_message_is_found_in_json_of_any_form_and_in_pages(self):
        for body, message in self.MESSAGES:
            with self.subTest(body[:80]):
                found = friendli_lite._error_message(body)
                self.assertEqual(message, " ".join(found.split()))

    def test_a_page_is_decoded_by_its_bom_or_the_charset_that_is_named(self):
        text = "价格 é"
        unfit = ["nonsense", "..utf-8", "punycode", "unicode-escape", "raw_unicode_escape"]
        unfit += ["undefined", "idna", "hex"]  # codecs that are for other things, or raise
        for data, parameters, decoded in [
            (text.encode("gb18030"), "; charset=gb18030", text), (text.encode(), "", text),
            ("价格".encode("gbk") + b"\xff", ';CHARSET = "GB2312"; a=b', "价格\ufffd"),
            (b"caf\xe9", "; charset=latin-1", "café"), (b"caf\xe9", "", "caf\ufffd"),
            (b"caf\xe9", "; charset='ISO-8859-1'", "café"), (text.encode(), "; charset=", text),
            (text.encode("utf-8-sig"), "; charset=latin-1", text),
            (text.encode("utf-16"), "; charset=utf-8", text), (text.encode("utf-32"), "", text),
            (b"\xfe\xff" + text.encode("utf-16-be"), "", text),
            *((b"\\\xbc\xf9a-", f"; charset={name}", "\\\ufffd\ufffda-") for name in unfit),
        ]:  # fmt: skip
            with self.subTest(parameters, data=data):
                headers = {"content-type": f"text/html{parameters}"}
                self.assertEqual(decoded, friendli_lite._decode_page(data, headers))

    def test_an_error_has_all_that_the_server_said(self):
        long = "a  b" * 500
        for body, message, content_type, encoding in [
            ('{"errors": [{"message": "too long"}]}', "too long", JSON, "utf-8"),
            ('{"error": " a\\n\\tb\\u001b[31m\\u2028! "}', "a b [31m !", JSON, "utf-8"),
            ("x" * 500, "x" * 500, "", "utf-8"), ("x" * 501, "x" * 500 + "...", "", "utf-8"),
            ("\x01" * 3000 + "x" * 2000, "x" * 500 + "...", "text/plain", "utf-8"),
            ("<p>价格</p>", "价格", "text/html; charset=gbk", "gbk"), ("null", "", JSON, "utf-8"),
            ('{"error": "bom"}', "bom", JSON, "utf-8-sig"), ("", "", "text/plain", "utf-8"),
            ("é\U0001f600", "é\U0001f600", "text/plain", "utf-8"),
        ]:  # fmt: skip
            data = body.encode(encoding)
            sent = {"content-type": content_type, "content-length": str(len(data)), "x-long": long}
            for call in MEDIA_TYPES:
                answer = page(data, 418, content_type, X_Long=long)
                with self.case(call.__name__, body[:40]), self.serve(answer) as server:
                    error = self.failure(APIStatusError, call)
                    what = f"{server.url}/v1/completions: the server responded with 418 Reason"
                    self.assertEqual(f"POST {what}" + (message and f": {message}"), str(error))
                    expected = APIStatusError("", 418, sent, body, message)
                    expected.attempts = 1
                    self.assertEqual(vars(expected), vars(error))

    def test_a_page_is_shown_to_its_first_64_kib_unless_it_is_compressed(self):
        for size, coding, body in [
            (65535, "", "a" * 65535), (65536, "identity", "a" * 65536),
            (65537, "utf-8", "a" * 65536), (99_999, "none", "a" * 65536),
            (41, "gzip", "a body in gzip of 41 bytes"), (9, "br", "a body in br of 9 bytes"),
            (9, "X-GZIP", "a body in gzip of 9 bytes"),
            (65536, "zstd", "a body in zstd of 65536 bytes"),
            (9, "deflate", "a body in deflate of 9 bytes"),
            (65537, "compress", "a body in compress of over 65536 bytes"),
        ]:  # fmt: skip
            answer = page(b"a" * size, Content_Encoding=coding)
            for token in ("", TOKEN):
                with self.case(size, coding, token), self.serve(answer):
                    error = self.failure(APIStatusError, token=token)
                    self.assertEqual((body, body[:500]), (error.body, error.message[:500]))

    def test_a_page_that_does_not_end_is_shown_as_far_as_it_came(self):
        start = head(500, Content_Type="text/plain", Content_Length=99) + b"out of order"
        login = head(Content_Type="text/html", Transfer_Encoding="chunked") + b"6\r\nlog in\r\n"
        for kind, text, answer, options in [
            (APIStatusError, "out of order", trickle(start, b"!"), {"total_timeout": SPENT}),
            (APIStatusError, "out of order", then_close(start), {}),
            (APIResponseError, "log in", then_close(login + b"zz\r\n"), {}),
        ]:
            with self.case(text, options), self.serve(answer), self.within(3):
                error = raised(complete, **options)
                self.check_error(kind, error, text)
                self.assertEqual(text, error.body.rstrip("!"))

    def test_no_message_lacks_its_end(self):
        """Whatever the server left out."""
        end = b"\r\nContent-Length: 0\r\n\r\n"
        script = "<html><script>location='/login'</script></html>"
        for answer, words in [
            (fin, "no response: the server closed the connection"),
            (rst, "no response: Connection reset by peer"),
            (b"HTTP/1.1 522 " + end, "responded with 522"), (page(b"<p></p>"), "with 400 Reason"),
            (b"HTTP/1.1 522" + end, "the server responded with 522"),
            (b"HTTP/1.1 522 \r\nContent-Length: 3\r\n\r\nout", "responded with 522: out"),
            (b"HTTP/1.1 400 a\x1b\xe9\tb" + end, "responded with 400 a é b"),
            (page(b"", 200, JSON), r"response is no completion: Expecting value: .*: \(empty\)"),
            (page(b"", 200, "text/html"), r"the response is text/html, .*: \(empty\)"),
            (page(script.encode(), 200, "text/html"), f"the response is text/html, .*: {script}"),
            (b"\n\n", r"the server sent something other than HTTP/1\.x: ''"),
        ]:  # fmt: skip
            with self.case(words), self.serve(answer):
                self.assertRegex(str(raised(complete)), rf"/v1/completions: .*{words}\Z")

    def test_odd_pages_of_64_kib_cost_no_time(self):
        for text in ("<!--", "<a ", "<script>", "</script ", "<", "&", "&#x", '{"error":'):
            with self.subTest(text), self.within(1):
                friendli_lite._error_message(text * (65536 // len(text)))

    def test_what_a_message_adds_to_some_statuses(self):
        check = "; check the token argument or $FRIENDLI_TOKEN"
        none_sent = "; no token was sent; set FRIENDLI_TOKEN or pass token="
        fewer = "; send fewer requests at a time, or pass a larger retries="
        redirect = "; redirects are not followed: check server_url, the redirect leads to "
        long = "https://a/" + "b" * 900
        for status, headers, options, hint in [
            (400, {}, {}, ""), (401, {}, {}, check), (403, {}, {}, check), (500, {}, {}, ""),
            (404, {}, {}, "; check model and server_url"), (429, {}, {}, fewer),
            (407, {}, {}, "; check the user and password of the proxy"),
            (400, {}, {"token": ""}, ""), (204, {}, {}, ""), (206, {}, {}, ""), (304, {}, {}, ""),
            (401, {}, {"token": ""}, none_sent), (403, {}, {"token": " \n"}, none_sent),
            (403, {}, {"token": "", "headers": {"X-Api-Key": "k"}}, none_sent),
            (403, {}, {"token": "", "headers": {"authorization": "Basic x"}}, check),
            (503, {"retry-after": ""}, {}, " (Retry-After: )"),
            (503, {"retry-after": long}, {}, f" (Retry-After: {long[:500]}...)"),
            (302, {"location": long}, {}, f"{redirect}{long[:500]}..."),
            (300, {"location": "a"}, {}, f"{redirect}a"), (429, {"location": "a"}, {}, fewer),
        ]:  # fmt: skip
            for call in MEDIA_TYPES:
                answer = json_answer({}, status, **headers)
                with self.case(call, status, headers, options), self.serve(answer) as server:
                    error = self.failure(APIStatusError, call, **options)
                    what = f"POST {server.url}/v1/completions: the server responded with {status}"
                    self.assertEqual(f"{what} Reason{hint}", str(error))
                    self.assertEqual(headers, {name: error.headers[name] for name in headers})

    def test_a_redirect_is_not_followed_and_gets_the_token_nowhere(self):
        for status, call in itertools.product([301, 302, 303, 307, 308], MEDIA_TYPES):
            with self.case(status, call), self.serve() as other:
                server = self.serve(json_answer({}, status, Location=f"{other.url}/a?b"))
                error = self.failure(APIStatusError, call, retries=3)
                self.assertTrue(str(error).endswith(f"redirect leads to {other.url}/a?b"), error)
                self.assertEqual((status, 1), (error.status_code, error.attempts))
                self.assertEqual((1, 0), (len(server.requests), other.connections))


# Error texts: secrets


API_KEY, SESSION, PASSWORD = "k-0123456789+.~", "s3ss10n-0123456789", "pass-0123456789"
CREDENTIALS = {"X-Api-Key": API_KEY, "cookie": f"lang=en; session={SESSION}"}
BASIC = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
SECRETS = (TOKEN, API_KEY, SESSION, PASSWORD, BASIC)
JSON_START, EVENTS_START = head(Content_Type=JSON), head(Content_Type=EVENTS)

# What a server sends before it closes the connection, where @ stands for a secret
ECHOES = {
    (complete, APIStatusError): [
        b'HTTP/1.1 503 A\r\n\r\n{"error": "no @!"}', b'HTTP/1.1 400 A\r\n\r\n{"@": ["@"]}',
        b"HTTP/1.1 400 A\r\n\r\n@@", b"HTTP/1.1 503 @\r\n\r\n", b"HTTP/1.1 401 A\r\n@: a\r\n\r\n",
        head(401, Content_Type="text/html") + b"<b>@</b>", head(401, X_Echo="Bearer @"),
        head(302, Location="/?k=@"), head(503, Retry_After="@"),
    ],
    (complete, APIResponseError): [
        b"@ a\r\n\r\n", b"HTTP/1.1 @\r\n\r\n", b"HTTP/1.1 200 OK\r\n@ : a\r\n\r\n",
        head(Content_Length="@"), head(Transfer_Encoding="@"), head(Content_Type="@"),
        CHUNKED_JSON_HEAD + b"@\r\n", CHUNKED_JSON_HEAD + b"0\r\n@ a\r\n",
        JSON_START + b'{"headers": "@"}', JSON_START + b'{"error": "@"}', JSON_START + b"{@",
    ],
    (stream, APIResponseError): [
        EVENTS_START + b'data: {"error": {"message": "@"}}\n\n', EVENTS_START + b"data: @\n\n",
        EVENTS_START + b"event: error\ndata: @\n\n", STREAM_HEAD + b"1\r\na@\r\n",
        head(Content_Type="text/html") + b"<b>@",
    ],
}  # fmt: skip


def secrets(token, headers=None):
    """The credentials of a call, as the module sees them."""
    return friendli_lite._Secrets(friendli_lite._build_headers(False, token, headers))


class SecretTests(TestCase):
    def test_what_a_server_echoes_gets_into_no_error_and_no_log(self):
        server, sent = self.serve(), (TOKEN, TOKEN.upper(), API_KEY, SESSION)
        for (call, kind), echoes in ECHOES.items():
            for echo, secret in itertools.product(echoes, sent):
                server.script(*[then_close(echo.replace(b"@", secret.encode()))] * 2)
                with self.case(echo, secret):
                    error = raised(call, headers=CREDENTIALS, **RETRY)
                    self.check_error(kind, error)
                    text = (shown(error) + self.log.getvalue()).lower()
                    for hidden in (TOKEN, API_KEY, SESSION):
                        self.assertNotIn(hidden[:8].lower(), text)
                        self.assertNotIn(hidden[-8:].lower(), text)
                    self.assertIn("***", f"{error}{vars(error)}")
                    self.log.truncate(self.log.seek(0))
                server._script.clear()

    def test_no_part_of_a_secret_stands_where_a_page_is_cut(self):
        for encoding, unit in (("utf-8", 1), ("utf-16-le", 2)):
            for before in range(65536 // unit - 39, 65536 // unit + 5, unit * 5):
                body = ("x" * before + TOKEN + "x" * 99).encode(encoding)
                answer = page(body, 400, f"text/plain; charset={encoding}")
                with self.case(encoding, before), self.serve(answer):
                    text = raised(complete).body
                    self.assertNotIn(TOKEN[0], text)
                    self.assertTrue(65536 // unit - 50 < len(text) <= 65536 // unit, len(text))

    def test_what_may_be_the_start_of_a_secret_is_dropped_at_a_cut_alone(self):
        response = FakeResponse()
        response.secrets = secrets("abcdefghij")
        for text, is_page, is_complete, shown_as in [
            ("xx Bearer ab", True, True, "xx Bearer ab"), ("xx Bearer ab", True, False, "xx "),
            ("xx Bearer ab", False, True, "xx Bearer ab"), ("nothing", True, False, "nothing"),
            ("xx Bearer ab", False, False, "xx Bearer ab"), ("x abcdefghi", True, False, "x "),
            ("xx abcdefghij", True, False, "xx ***"), ("xx abcdefghij", True, True, "xx ***"),
        ]:  # fmt: skip
            with self.subTest(text, is_page=is_page, is_complete=is_complete):
                response.is_complete = is_complete
                excerpt = friendli_lite._excerpt(response, text.encode(), is_page)
                self.assertEqual(shown_as, excerpt)

    def test_no_part_of_a_secret_stands_at_the_end_of_half_a_line(self):
        for line in (f"X-{TOKEN[:-1]}", f"HTTP/1.1 200 OK\r\n: {TOKEN[:-1]}\r\n"):
            self.serve(line.encode())
            self.assertNotIn(TOKEN[:5], shown(self.failure(APIResponseError)))

    def test_no_part_of_a_secret_stands_where_a_message_is_cut(self):
        spellings = (TOKEN, TOKEN.replace("T", "\\u0054"))
        for case in itertools.product((450, 476, 477, 490, 499, 500), (400, 200), spellings):
            before, status, secret = case
            body = f'{{"error": "{"x" * before}{secret}{"x" * 99}"}}'
            with self.case(*case), self.serve(page(body.encode(), status, JSON)):
                self.assertNotIn("x" + TOKEN[0], str(raised(complete)))

    def test_which_values_are_secrets(self):
        """The token and headers of certain names, whole and in parts, in capitals or not."""
        for token, headers, text, redacted in [
            ("flp_1234", {}, "flp_1234 FLP_1234 Bearer flp_1234", "*** *** ***"),
            ("flp_1234", {}, "\u0130\u0130bearer FLP_1234 flp_123", "II*** flp_123"),
            ("", {"X-API-Key": "12345678"}, "x12345678x1234567x", "x***x1234567x"),
            ("", {"Ocp-Token-Id": "abcdefgh ijklmnop"}, "abcdefgh ijklmnop, ijklmnop", "***, ***"),
            ("", {"Client-Secret": "(regex.*?)+"}, "(REGEX.*?)+ regex", "*** regex"),
            ("", {"Set-Cookie": "a=long1234; b=long123456"}, "long123456 long1234", "*** ***"),
            ("", {"X-Pass": "ab/cd/efgh"}, r"as in JSON: ab\/cd\/efgh", "as in JSON: ***"),
            ("unused", {"authorization": "Basic YWxhZGRpbg"}, "unused YWxhZGRpbg", "unused ***"),
            # Others, and some so short that they may be words of other texts
            ("flp_1234", {"X-Request-Id": "identification"}, "identification", "identification"),
            ("flp_1234", {"Accept-Language": "de-AT, de, en"}, "de-AT, de, en", "de-AT, de, en"),
            ("local", {}, "localhost", "localhost"), ("test123", {}, "test1234", "test1234"),
            ("", {"Authorization": "Bearer n"}, "a Bearer, n", "a Bearer, n"), ("", {}, "a", "a"),
        ]:  # fmt: skip
            with self.subTest(text):
                self.assertEqual(redacted, secrets(token, headers).redact(text))

    def test_a_page_full_of_a_secret_or_of_what_nearly_is_one_costs_no_time(self):
        redact = secrets("a" * 2000 + "b").redact
        for near in ("a" * 65536, ("a" * 1999 + "c") * 32, ("a" * 2000 + "c") * 32):
            with self.within(1):
                self.assertEqual(near, redact(near))
        with self.within(2):
            text = secrets("flp_1234").redact("flp_1234" * 100_000)
        self.assertEqual("***" * 100_000, text)


# Error texts: what a failure leaves behind


# Kinds of failures: their class, the call, the answers, and options of the call
FAILURES = [
    (APIStatusError, complete, [json_answer({"error": TOKEN}, 404)], {}),
    (APIStatusError, stream, [json_answer({}, 503)] * 2, RETRY),
    (APIConnectionError, complete, [fin, fin], RETRY), (APIConnectionError, stream, [fin], {}),
    (APIConnectionError, complete, [then_close(JSON_HEAD + b"{")] * 2, RETRY),
    (APIConnectionError, stream, [then_close(STREAM_HEAD)] * 2, RETRY),
    (APIConnectionError, stream, [then_close(ONE_EVENT)], {}),
    (APITimeoutError, complete, [hang()], {"timeout": 0.005}),
    (APITimeoutError, stream, [hang(ONE_EVENT)], {"total_timeout": 0.01}),
    (APITimeoutError, complete, [], {"total_timeout": 0}),
    (APIResponseError, complete, [then_close(b"220 mail\r\n")], {}),
    (APIResponseError, complete, [json_answer({})], {}), (APIResponseError, stream, [ANSWER], {}),
    (APIResponseError, stream, [then_close(ONE_EVENT + b"zz\r\n")], {}),
    (APIResponseError, stream, [then_close(EVENTS_START + b"data: []\n\n")], {}),
    (ValueError, complete, [], {"token": f"{TOKEN}\n."}),
    (ValueError, stream, [], {"headers": {"X-Key": f"{TOKEN}\n"}}),
]  # fmt: skip
WRONG = b'{"a": "' + b"a" * 2_000_000 + b'"}'
LARGE_FAILURES = [
    (APIStatusError, complete, [page(b"a" * 100_000)], {}),
    (APIStatusError, complete, [page(("a" * 70_000 + "😀").encode("utf-16"))], {}),
    (APIResponseError, complete, [page(b"[" * 50_000, 200, JSON)], {}),
    (APIResponseError, complete, [page(WRONG, 200, JSON)], {}),
    (APIResponseError, stream, [then_close(EVENTS_START + b"data: " + WRONG + b"\n\n")], {}),
]


def garbage_of(action):
    """Return what an action leaves behind that only the garbage collector finds."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        action()
        gc.collect()
        return [f"{type(item).__name__} {item!r:.80}" for item in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


class LeftoverTests(TestCase):
    """A traceback keeps its callers' frames, so those that make calls here have no large locals."""

    @classmethod
    def setUpClass(cls):
        freeze()  # again, for what other tests have left in caches

    def failing(self, failure, times=1):
        """Start the server of a case; return a function that makes the call that often."""
        _, call, script, options = failure
        self.server = self.serve(*script * times)
        return functools.partial(raised, call, **{"headers": CREDENTIALS, **options})

    def check_hidden(self, error):
        for secret in SECRETS:
            self.assertNotIn(secret, shown(error))

    def test_no_frame_of_a_failure_shows_a_secret(self):
        for failure in FAILURES:
            with self.case(*failure):
                error = self.failing(failure)()
                self.assertIs(failure[0], type(error), error)
                self.check_hidden(error)
                self.assertIsNone(getattr(error.__cause__, "__traceback__", None))
                self.assertIsNone(error.__context__)
                self.assertLessEqual(len(traceback.extract_tb(error.__traceback__)), 4)

    def test_no_frame_shows_the_password_of_a_proxy(self):
        kinds = {"https": ValueError, "http": APIConnectionError}
        for scheme, call in itertools.product(kinds, MEDIA_TYPES):
            os.environ["HTTP_PROXY"] = f"{scheme}://user:{PASSWORD}@127.0.0.1:1"
            with self.case(scheme, call):
                error = raised(call, server_url="http://elsewhere.invalid")
                self.check_error(kinds[scheme], error, "HTTP_PROXY")
                self.check_hidden(error)

    def test_no_frame_that_a_signal_handler_interrupts_shows_a_secret(self):
        os.environ["HTTPS_PROXY"] = f"http://user:{PASSWORD}@127.0.0.1:1"
        urls = (self.serve().url, "https://a.invalid")
        steps = ("_connect", "_send", "receive")
        for url, call, step in itertools.product(urls, MEDIA_TYPES, steps):
            methods = {name: mock.Mock() for name in ("_connect", "_send")}
            methods[step] = mock.Mock(side_effect=ZeroDivisionError)
            patch = mock.patch.multiple(friendli_lite._Connection, **methods)
            with self.case(url, call, step), patch:
                error = raised(call, server_url=url, headers=CREDENTIALS)
                self.assertIs(ZeroDivisionError, type(error))
                self.check_hidden(error)

    @unittest.skipIf(isinstance(tracemalloc, mock.Mock), "needs tracemalloc")
    def test_an_error_that_is_kept_with_its_traceback_is_small(self):
        for failures, times, limit in ((FAILURES, 2, 12), (LARGE_FAILURES, 1, 260)):
            for failure in failures:
                with self.case(*failure):
                    fail = self.failing(failure, times + 1)
                    fail()  # what it imports and caches is not counted
                    tracemalloc.start()
                    try:
                        kept = [fail() for _ in range(times)]
                        friendli_lite._pool.close()
                        self.server.close()
                        self.server.requests.clear()
                        self.server._running.clear()
                        self.log.truncate(self.log.seek(0))
                        gc.collect()
                        size = tracemalloc.get_traced_memory()[0] / len(kept)
                    finally:
                        tracemalloc.stop()
                    self.assertLess(size, limit * 1024)

    @unittest.skipUnless(sys.implementation.name == "cpython", "counts references")
    def test_no_call_leaves_an_object_to_the_garbage_collector(self):
        for call in MEDIA_TYPES:
            with self.case(call), self.serve(json_answer({}, 503)):
                ask = functools.partial(self.ask, 2, call, **RETRY)
                ask()  # what it imports is not counted
                self.assertEqual([], garbage_of(ask))
        for failure in FAILURES:
            with self.case(*failure):
                fail = self.failing(failure, 2)
                fail()
                self.assertEqual([], garbage_of(fail))


class LogTests(TestCase):
    def check_log(self, server, *events):
        """Check the lines of the log."""
        expected = [f"POST {server.url}/v1/completions: {event} after # s" for event in events]
        found = re.sub(r"\d\.\d{3} s", "# s", self.log.getvalue())
        self.assertEqual(expected, found.splitlines())
        self.log.truncate(self.log.seek(0))

    def test_a_call_is_done_or_failed(self):
        for call, answer, options, *events in [
            (complete, fin, {}, "failed"), (complete, ANSWER, {}, "status 200", "done"),
            (stream, STREAM, {}, "status 200", "done"),
            (complete, json_answer({}, 404), {}, "status 404", "failed"),
            (stream, json_answer({}, 404), {}, "status 404", "failed"),
            (complete, json_answer({}), {}, "status 200", "failed"),
            (stream, then_close(STREAM_HEAD), {}, "status 200", "failed"),
            (stream, then_close(ONE_EVENT), {}, "status 200", "failed"),
            (complete, b"", {"total_timeout": 0}, "failed"),
        ]:  # fmt: skip
            with self.case(call, answer), self.serve(answer) as server:
                _, error = outcome(call, **options)
                self.assertEqual("done" in events, error is None)
                self.check_log(server, *events)
        self.failure(ValueError, token="a\nb")
        self.check_log(server)  # nothing was begun

    def test_a_retry_is_told_with_its_reason_and_its_delay(self):
        server = self.serve(fin, json_answer({}, 503), STREAM)
        with self.assertLogs("friendli_lite", logging.DEBUG) as logs:
            self.ask(1, stream, retries=AT_ONCE)
        text = "\n".join(logs.output).replace(f"POST {server.url}/v1/completions: ", "")
        expected = [
            "INFO no response: the server closed the connection; retry 1 of 3 in # s",
            "DEBUG status 503 after # s",
            "INFO the server responded with 503 Reason (after 2 attempts); retry 2 of 3 in # s",
            "DEBUG status 200 after # s", "DEBUG done after # s",
        ]  # fmt: skip
        found = re.sub(r"\d\.\d{2,3} s", "# s", text.replace(":friendli_lite:", " "))
        self.assertEqual(expected, found.splitlines())
        error = logs.records[2].args[0]  # which a handler may keep, and with it its frames
        self.assertIs(APIStatusError, type(error))
        if sys.implementation.name == "cpython":  # PyPy sets the traceback of a caught error again
            self.assertIsNone(error.__traceback__)

    def test_a_stream_that_is_left_is_neither_done_nor_failed(self):
        server = self.serve()
        with stream("x") as chunks:
            next(chunks)
        self.check_log(server, "status 200")


# Reading the body: limits and media types


class LimitTests(TestCase):
    low_limits = mock.patch.multiple(
        friendli_lite, _MAX_EVENT_BYTES=16384, _MAX_COMPLETION_BYTES=16384,
        _MAX_ERROR_BODY_BYTES=16384, _MAX_HEAD_BYTES=16384,
    )  # fmt: skip

    def test_the_limits_are_16_and_32_mib(self):
        limits = friendli_lite._MAX_EVENT_BYTES, friendli_lite._MAX_COMPLETION_BYTES
        self.assertEqual((16 * 1024**2, 32 * 1024**2), limits)

    @low_limits
    def test_an_answer_is_taken_up_to_the_limits(self):
        full, one, done = ONE.ljust(16384), b"data: %b\n\n" % ONE, b"data: [DONE]"
        three = b"data: %b\n\n" % full[:-20] * 3
        parts = [three[i : i + 4096] for i in range(0, len(three), 4096)]
        within, beyond = b"\n" * 16384, b"\n" * 16385
        without_event = "the stream has over 16384 bytes without an event"
        for call, pieces, texts, message in [
            (complete, [full], ["a"], None), (stream, [within, done], [], None),
            (stream, [one, within, done], ["a"], None), (stream, [three, done], ["a"] * 3, None),
            (stream, [*parts, done], ["a"] * 3, None),
            (complete, [full, b" "], [], "the response has over 16384 bytes"),
            (stream, [beyond], [], without_event), (stream, [one, beyond], ["a"], without_event),
            (stream, [b"data\n" * 3277], [], without_event),
            (stream, [b":" * 16385], [], "the stream has a line of over 16384 bytes"),
        ]:  # fmt: skip
            with self.subTest(call.__name__, texts=texts, message=message):
                found, error = outcome_of_body(call, pieces)
                self.assertEqual((texts, message), (found, error and str(error)))
                self.assertEqual("", error.body if error else "")

    @low_limits
    def test_an_endless_answer_ends_in_an_error_within_bounded_memory(self):
        """Where memory cannot be measured (PyPy), the error alone is checked."""
        self.serve()
        self.ask()  # what it imports is not counted
        for call, start, more, words in [
            (stream, EVENTS_START + b"data: ", b"a", "the stream has a line of over 16384 bytes"),
            (stream, STREAM_HEAD, one_chunk(b"a" * 16), "a line of over 16384 bytes"),
            (stream, EVENTS_START, b": ping\n\n", "over 16384 bytes without an event"),
            (stream, EVENTS_START, b"data: a\n", "over 16384 bytes without an event"),
            (complete, JSON_START, b" ", "the response has over 16384 bytes"),
            (complete, b"HTTP/1.1 200 OK\r\nA: ", b"a", "over 16384 bytes of headers: 'A: aaa"),
            (complete, head(500), b"a", "the server responded with 500 Reason: aaa"),
            (stream, head(Content_Type="text/html"), b"a", "the response is text/html, not"),
        ]:
            with self.case(start, more), self.serve(endless(start, more * 4096)):
                tracemalloc.start()
                try:
                    error = raised(call)
                    self.assertLess(tracemalloc.get_traced_memory()[1], 1024**2)
                finally:
                    tracemalloc.stop()
                kind = APIStatusError if start == head(500) else APIResponseError
                self.check_error(kind, error, words)
                self.assertLessEqual(len(error.body), 16384)

    def test_the_work_is_linear_in_what_is_received(self):
        pieces = [b"data: ", *[b"a" * 64] * 40_000, b"\n\n", b"data: [DONE]"]
        with self.within(1):
            ((_, data),) = friendli_lite._iter_events(pieces)
        self.assertEqual(40_000 * 64, len(data))


class MediaTypeTests(TestCase):
    def test_good_answers_with_odd_headers_are_taken(self):
        for call, kind in MEDIA_TYPES.items():
            types = [kind, kind.upper(), f" {kind} ", "", f"{kind},", f"{kind}, {kind}"]
            types += [f"{kind};charset=x", f"{kind} ; a=b"]
            cases = [("content_type", value) for value in types]
            cases += [("content_encoding", value) for value in ("", "none", "utf-8", "identity")]
            for name, value in cases:
                with self.subTest(call.__name__, header=value):
                    result = outcome_of_body(call, payload(call, ONE), **{name: value})
                    self.assertEqual((["a"], None), result)
            with self.case(call, "no header"):
                self.serve(then_close(head() + payload(call, ONE)))
                self.assertEqual((["a"], None), outcome(call))

    def test_a_byte_order_mark_is_taken_at_the_start_of_a_body_alone(self):
        bom = b"\xef\xbb\xbf"
        self.assertEqual((["a"], None), outcome_of_body(complete, [bom[:1], bom[1:] + ONE]))
        _, error = outcome_of_body(stream, payload(stream, bom + ONE))
        self.assertIs(APIResponseError, type(error))

    def test_an_answer_of_another_kind_is_an_error_that_says_what_came(self):
        page, raw = b"<title>Please</title>\n<p>log in", b"\0\0\0"
        for call, kind in MEDIA_TYPES.items():
            other = JSON if call is stream else EVENTS
            for data, headers, found, message in [
                (page, {"content_type": "text/html; a=b"}, "text/html", "Please log in"),
                (raw, {"content_encoding": "gzip"}, f"{kind} in gzip", "a body in gzip of 3 bytes"),
                (raw, {"content_encoding": "BR"}, f"{kind} in br", "a body in br of 3 bytes"),
                (b'{"error":"hot"}', {"content_type": other}, other, "hot"),
                (b"hot", {"content_type": f"{other}, {kind}"}, other, "hot"),
            ]:
                with self.subTest(call.__name__, **headers):
                    texts, error = outcome_of_body(call, data, **headers)
                    self.assertEqual(([], APIResponseError), (texts, type(error)))
                    what = f"the response is {found}, not {kind}; check server_url"
                    self.assertEqual(f"{what}: {message}", str(error))
                    self.assertEqual(message if data == raw else data.decode(), error.body)


# Server-sent events


def feedings(data):
    """The ways for bytes to arrive: at once, one by one, and split at every position."""
    halves = ([data[:position], data[position:]] for position in range(1, len(data)))
    return [*deliveries(data), *halves]


class ReaderTests(TestCase):
    # Bytes, without [DONE], and the data of the events in them
    DATA = {
        b"data: 1\n\ndata: 2\n\n": [b"1", b"2"], b"data: 1\r\n\r\ndata: 2\r\n\r\n": [b"1", b"2"],
        b"data: 1\r\rdata: 2\r\r": [b"1", b"2"], b"data: 1\r\ndata: 2\n\r": [b"1\n2"],
        b"data: 1\r\n\rdata: 2\n\r\ndata: 3\r\n\ndata: 4\r\n\r": [b"1", b"2", b"3", b"4"],
        b"Data: 1\ndata : 2\n data: 3\ndata2: 4\ndata: 5\n\n": [b"5"], b"data:1\n\n": [b"1"],
        b": ping\n\n:\n\ndata: 1\n: ping\ndata: 2\n\n": [b"1\n2"], b"data:  1 \n\n": [b" 1 "],
        b"data: 1\ndata: [DONE]\n\n": [b"1\n[DONE]"], b"data: [DONE]x\n\n": [b"[DONE]x"],
        b"data\n\ndata:\n\nevent: a\n\ndata: 1\n\n": [b"1"], b"data: [done]\n\n": [b"[done]"],
        b"data: 1\ndata:\ndata\ndata: 2\n\n": [b"1\n\n\n2"], b"data:\t1\n\n": [b"\t1"],
        "data: 😀\u2028\u2029\u0085\v\x1c\n\n".encode(): ["😀\u2028\u2029\u0085\v\x1c".encode()],
        # A byte order mark counts only at the start, and there once
        b"\xef\xbb\xbfdata: 1\n\n": [b"1"], b"\n\xef\xbb\xbfdata: 1\n\ndata: 2\n\n": [b"2"],
        b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: 2\n\n": [b"2"],
    }  # fmt: skip

    def test_events_are_the_same_however_their_bytes_arrive(self):
        cases = {data: [("", part) for part in parts] for data, parts in self.DATA.items()}
        named = b"event: \xff\nid: 7\nretry: 1\nother: x\nalone\ndata: 1\n\ndata: 2\n\n"
        cases[named] = [("\ufffd", b"1"), ("", b"2")]
        for data, events in cases.items():
            for pieces in feedings(data + b"data: [DONE]\n\ndata: late\n\n"):
                with self.subTest(pieces):
                    self.assertEqual(events, list(friendli_lite._iter_events(pieces)))

    def test_events_and_the_end_are_seen_as_soon_as_they_have_arrived(self):
        data = b"data: 1\r\n\r\ndata: 2\n\ndata: 3\r\rdata: [DONE]\n\n"
        file = io.BytesIO(data)
        pieces = iter(lambda: file.read(1), b"")
        seen = [file.tell() for _ in friendli_lite._iter_events(pieces)]
        ends = (b"1\r\n\r", b"2\n\n", b"3\r\r", b"[DONE]\n")
        self.assertEqual([data.index(end) + len(end) for end in ends], [*seen, file.tell()])

    def test_done_ends_a_stream_in_all_its_spellings(self):
        starts = (b"data: ", b"data:", b"data:  ", b": ping\n\ndata: ", b"event: x\ndata: ")
        ends = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"\r", b"", b" \n\n")
        for start, end in itertools.product(starts, ends):
            for pieces in feedings(b"data: 1\n\n" + start + b"[DONE]" + end):
                with self.subTest(pieces):
                    self.assertEqual([("", b"1")], list(friendli_lite._iter_events(pieces)))

    def test_a_stream_that_ends_before_done_was_cut_short(self):
        cut = "the stream was cut short: it ended before [DONE]"
        for framing in FRAMINGS:
            answer = event_stream(text_chunk("a"), done=False, framing=framing)
            texts, error, _ = outcome_of_pieces(stream, [answer], CUT)
            self.assertEqual((["a"], APIConnectionError, cut), (texts, type(error), str(error)))

    def test_a_stream_is_the_same_in_all_framings_and_pieces(self):
        texts = ["é한", "\u2028\u0085", "😀", ""]
        events = "".join(f'data: {{"choices":[{{"text":"{text}"}}]}}\r\n\r\n' for text in texts)
        data = f"\ufeff: ping\r{events}data: [DONE]\n\n".encode()
        in_chunks_of_one = STREAM_HEAD + chunked(*(bytes([byte]) for byte in data))
        for answer in [in_chunks_of_one, *(framed(data, framing, EVENTS) for framing in FRAMINGS)]:
            with self.case(answer), self.serve(then_close(answer)):
                self.assertEqual((texts, None), outcome(stream))
                for pieces in deliveries(answer):
                    self.assertEqual((texts, None), outcome_of_pieces(stream, pieces, CUT)[:2])


class MidStreamErrorTests(TestCase):
    PAYLOADS = [
        '{"error":"hot"}', '{"choices":[{"text":"a"}],"error":{"message":"hot","code":500}}',
        '{"choices":[],"error":""}', '{"error":{}}', '{"error":false}',
    ]  # fmt: skip
    # Events, and their data
    FORMS = {
        **{f"data: {data}\n\n": data for data in PAYLOADS}, "error:hot\n": "hot",
        'event: error\ndata: {"message":"hot"}\n\n': '{"message":"hot"}',
        'event: error\ndata: {"choices":[]}\n\n': '{"choices":[]}', "error\n\n": "",
        "event: error\ndata: hot\n\n": "hot", "data: hot\nevent: error\n\n": "hot",
        "event: error\ndata: [DONE]\n\n": "[DONE]", "event: error\n\n": "",
    }  # fmt: skip

    def test_an_error_after_status_200_has_the_words_of_the_server(self):
        """Where it has no words, there is its data."""
        a = sse(text_chunk("a"), done=False).decode()
        cases = [(complete, data, [], data) for data in self.PAYLOADS]
        for form, data in self.FORMS.items():
            for end in ("", "data: [DONE]\n\n"):
                cases += [(stream, form + end, [], data), (stream, a + form + end, ["a"], data)]
        for call, body, texts, data in cases:
            with self.subTest(call.__name__, body=body):
                found, error = outcome_of_body(call, body.encode())
                self.assertEqual((texts, APIResponseError), (found, type(error)))
                words = "hot" if "hot" in data else data or "(empty)"
                self.assertEqual(f"the server failed after status 200: {words}", str(error))
                self.assertEqual(data, error.body)

    def test_an_error_over_the_wire_is_not_tried_again(self):
        for texts in ([], ["a"]):
            answer = event_stream(*map(text_chunk, texts), {"error": "hot"})
            with self.case(texts), self.serve(answer) as server:
                found, error = outcome(stream, retries=3)
                self.assertEqual((texts, 1), (found, len(server.requests)))
                self.check_error(APIResponseError, error, "after status 200: hot")


# From JSON to dataclasses


NO_TEXT = "a choice has no text, or a finish_reason that is no string"
# What is said of a payload, the payload, and what stands in it for %b
BROKEN = [
    ("it is not one object", b"%b", b'null true 7 [] [{"choices":[]}] {}x {}{}'),
    ("it has no list of choices", b"{%b}", b'"a":1 "choices":null "choices":7 "choices":{"a":1}'),
    ("a choice is no object", b'{"choices":[%b]}', b'null 7 "a" []'),
    (NO_TEXT, b'{"choices":[%b]}', b'{} {"text":"a"},{}'),
    (NO_TEXT, b'{"choices":[{"text":%b}]}', b'null 7 [] {"a":"b"} true'),
    (NO_TEXT, b'{"choices":[{"text":"a","finish_reason":%b}]}', b"7 [] true"),
    ("Logprobs is no object", b'{"choices":[{"text":"a","logprobs":%b}]}', b'7 [] "a"'),
    ("Usage is no object", b'{"choices":[{"text":"a"}],"usage":%b}', b'7 [] "a"'),
    ("NaN is not JSON", b'{"choices":[],"a":%b}', b"NaN"),
]
# Those of which Python's json speaks, or which are not shown as they are
BROKEN_JSON = [
    *b'hello { {\'choices\':[]} {"choices":[] "choices" {"choices":[{"text":"\xff"}]}'.split(),
    *(b'{"choices":[],"a":%b}' % value for value in (b"Infinity", b"-Infinity")),
    *(b'{"choices":[{"text":"\xed\xa0\x80"}]}', '{"choices":[]}'.encode("utf-16")),
    *(b"[" * 200_000, b'{"error":' * 200_000, b'{"choices":[{"text":"a"}],"a":' + b"[" * 200_000),
]


class PayloadTests(TestCase):
    def test_a_broken_payload_is_an_error_that_shows_it_and_its_mistake(self):
        cases = dict.fromkeys(BROKEN_JSON, ".{1,600}")
        for mistake, form, values in BROKEN:
            for data in (form % value for value in values.split()):
                cases[data] = re.escape(f"{mistake}: {data.decode()}")
        for (data, pattern), build in itertools.product(cases.items(), PARSERS.values()):
            with self.subTest(data[:99], build=build.__name__):
                with self.assertRaises(APIResponseError) as caught:
                    friendli_lite._parse(FakeResponse(), data, build)
                error = caught.exception
                self.assertRegex(str(error), rf"\Athe response is no completion: {pattern}\Z")
                self.assertEqual(data[:65536].decode("utf-8", "replace"), error.body)

    def test_what_only_looks_broken_is_taken(self):
        choice = b'{"text":"a","index":0,"tokens":7,"logprobs":null}'
        more = b'"error":null,"usage":{},"a":{"error":1},"b":1e999,"c":"\\ud800","d":"\xc3\xa9"'
        for call, blank in [(complete, b" \n\t"), (stream, b" ")]:
            data = blank + b'{"choices":[%b],%b}' % (choice, more) + blank
            self.assertEqual((["a"], None), outcome_of_body(call, payload(call, data)))


# From bytes to dataclasses: any bytes


MUTANTS = int(os.environ.get("FRIENDLI_LITE_FUZZ", 300))  # setUpModule() clears the environment
SCRAPS = [
    *b'\0 \xff \xef\xbb\xbf \xe2\x80\xa8 : " \\ { } [ ] , null NaN - 1e999 "\\ud800"'.split(b" "),
    *b'[DONE] "error": "choices": "text": "usage": "delta":'.split(),
    *(b"\n", b"\r", b"\r\n\r\n", b"9" * 5000, b"[" * 5000, b"data: ", b"data: [DONE]\n\n"),
    *(b"event: error\n", b"error: ", b": ping\n\n"),
]
EXCHANGE = {"n": 2, "logprobs": 1, "max_tokens": 2, "stream_options": {"include_usage": True}}
RECORDED = [sse(*chunks(EXCHANGE)), sse(*chunks({})).replace(b"\n", b"\r\n")]
RECORDED.append(json.dumps(completion(EXCHANGE)).encode())


def mutate(dice, data):
    start = dice.randrange(len(data))
    end = start + dice.randrange(1, 40)
    before, span, after = data[:start], data[start:end], data[end:]
    lines = data.splitlines(keepends=True)
    return dice.choice([
        before + bytes([span[0] ^ 1 << dice.randrange(8)]) + span[1:] + after,  # flip
        before + after, before + span, before + span + span + after,  # drop, cut, duplicate
        before + dice.choice(SCRAPS) + span + after,  # insert
        b"".join(dice.sample(lines, len(lines))),  # reorder
    ])  # fmt: skip


class FuzzTests(TestCase):
    def test_only_friendli_errors_escape_whatever_the_bytes_are(self):
        for seed in range(MUTANTS):
            with self.subTest(seed=seed):
                dice = random.Random(seed)
                data = dice.choice(RECORDED)
                for _ in range(dice.randrange(1, 5)):
                    data = mutate(dice, data) or b"\n"
                cuts = sorted({0, *dice.choices(range(len(data)), k=dice.randrange(9)), len(data)})
                pieces = [data[start:end] for start, end in zip(cuts, cuts[1:])]
                texts, error = outcome_of_body(stream, data)
                again = outcome_of_body(stream, pieces)
                self.assertEqual(repr((texts, error)), repr(again), "the pieces matter")
                self.assertTrue(error or b"[DONE]" in data, "a short success")
                texts += outcome_of_body(complete, pieces)[0]
                self.assertEqual({str}, {str, *map(type, texts)})


# The command line


class CommandLineTests(TestCase):
    def run_main(self, arguments, stdin=b"", stdout=None):
        """Run the command line in this process; return its exit status, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        file = io.TextIOWrapper(io.BytesIO(stdin), "latin-1")  # which must not matter
        streams = mock.patch.multiple(sys, stdin=file, stdout=stdout or out, stderr=err)
        with streams, mock.patch.object(logging.root, "handlers", []):
            status = exit_status_of_main(arguments.split())
        return status, out.getvalue(), err.getvalue()

    def test_options_become_fields_and_the_text_is_printed(self):
        server = self.serve()
        for options, fields in [
            ("p", {"prompt": "p"}), ("", {"prompt": "in"}), ("-", {"prompt": "in"}),
            ('--set prompt=["q"]', {"prompt": ["q"]}), ("--set tokens=[7]", {"tokens": [7]}),
            ("--model m --max-tokens 9 p", {"prompt": "p", "model": "m", "max_tokens": 9}),
            ("--temperature 0.5 p", {"prompt": "p", "temperature": 0.5}),
            ('--set stop=["a=b"] --set n=1 p', {"prompt": "p", "stop": ["a=b"], "n": 1}),
            ("--model m --set model=null --set extra_body={} p", {"prompt": "p"}),
        ]:  # fmt: skip
            for way, more in {"": {"stream": True}, "--no-stream ": {}}.items():
                with self.subTest(way + options):
                    self.assertEqual((0, TEXT + "\n", ""), self.run_main(way + options, b"in\n"))
                    self.assertEqual({**fields, **more}, server.requests[-1].json)

    def test_options_say_how_to_call(self):
        defaults = {"timeout": 600.0, "total_timeout": None, "retries": None, "server_url": None}
        how = {"timeout": 5.0, "total_timeout": 0.0, "retries": 0, "server_url": "u"}
        for name, way in {"stream": "p ", "complete": "p --no-stream "}.items():
            with self.subTest(name), mock.patch.object(friendli_lite, name) as call:
                self.run_main(way)
                self.run_main(way + "--timeout 5 --total-timeout 0 --retries 0 --server-url u")
                self.assertEqual([defaults, how], [options for _, options in call.call_args_list])

    def test_json_is_the_raw_object_or_one_a_line(self):
        self.serve()
        request = {"prompt": "p", "n": 2}
        status, out, _ = self.run_main("--json --no-stream --set n=2 p")
        self.assertEqual((0, completion(request)), (status, json.loads(out)))
        status, out, _ = self.run_main("--json --set n=2 p")
        self.assertEqual((0, [*chunks(request)]), (status, [*map(json.loads, out.splitlines())]))

    def test_a_failure_is_one_line_and_exit_status_1(self):
        said = "the server responded with 404 Reason: no such; check model and server_url"
        for options in ("p", "--no-stream p"):
            server = self.serve(json_answer({"detail": "no such"}, 404))
            with self.subTest(options):
                line = f"friendli_lite: POST {server.url}/v1/completions: {said}\n"
                self.assertEqual((1, "", line), self.run_main(options))

    def test_text_that_is_cut_short_ends_in_a_line_end_before_the_error(self):
        server = self.serve(then_close(ONE_EVENT))
        with contextlib.redirect_stdout(io.StringIO()) as both, contextlib.redirect_stderr(both):
            self.assertEqual(1, exit_status_of_main(["p"]))
        said = "the response was cut short: the server closed the connection"
        expected = f"a\nfriendli_lite: POST {server.url}/v1/completions: {said}\n"
        self.assertEqual(expected, both.getvalue())

    def test_wrong_usage_is_exit_status_2(self):
        container = self.serve()
        several = "several choices need --json"
        for arguments, message in [
            ("--set max_token=3 p", "did you mean 'max_tokens'"), ("p q", "unrecognized"),
            ("--set stop p", "--set takes NAME=JSON, not 'stop'\n"),
            ("--set stop=[ p", "--set takes NAME=JSON, not 'stop=['\n"),
            ('--set model="m p', "--set takes NAME=JSON, not 'model=\"m'\n"),
            ("--set a=" + "[" * 100_000, "NAME=JSON"), ("--set tokens=[1] p", "both were given"),
            ('--set token="flp" p', "unknown field 'token'"), ("--timeout 0 p", "timeout"),
            ('--set stop="END" p', "stop must be a list of strings: stop=["),
            ("--set n=2 p", several), ("--no-stream --set n=3 p", several),
            ('--set prompt=["p","q"]', several), ('--no-stream --set prompt=["p","q"]', several),
        ]:  # fmt: skip
            with self.subTest(arguments[:99]):
                status, out, err = self.run_main(arguments)
                self.assertEqual((2, ""), (status, out))
                self.assertRegex(err, r"\Ausage: friendli_lite \[options\] \[PROMPT\]\n.*\n\Z")
                self.assertIn(message, err)
        self.assertEqual(0, container.connections)

    def test_a_text_without_quotes_is_shown_in_its_right_spelling(self):
        for setting, value in {
            "bad_words=a;b": ["a;b"], "stop=\\n": ["\\n"], "prompt=p": "p", "new=x=y": "x=y",
        }.items():  # fmt: skip
            with self.subTest(setting):
                status, _, err = self.run_main(f"--set {setting} p")
                spelling = f"{setting.partition('=')[0]}={json.dumps(value)}"
                hint = f"not {setting!r}; a text needs quotes: --set '{spelling}'\n"
                said = f"friendli_lite: error: --set takes NAME=JSON, {hint}"
                self.assertEqual((2, said), (status, err.partition("\n")[2]))

    def test_stdin_is_utf_8_without_bom_and_one_last_line_end(self):
        server = self.serve()
        prompts = {
            b"": "", b"a\r\n": "a", b"a\n\n": "a\n", b"a\r": "a\r", b"a\0\xe2\x80\xa8": "a\0\u2028",
            b"\r\na\r\nb\r\n": "\r\na\r\nb", b"\xef\xbb\xbf\xef\xbb\xbfa": "\ufeffa",
        }  # fmt: skip
        for data, prompt in prompts.items():
            with self.subTest(data):
                self.assertEqual(0, self.run_main("", data)[0])
                self.assertEqual(prompt, server.requests[-1].json["prompt"])
        for data in (b"caf\xe9", "a".encode("utf-16")):
            with self.subTest(data):
                status, out, err = self.run_main("", data)
                self.assertEqual((2, ""), (status, out))
                self.assertIn("friendli_lite: error: 'utf-8' codec can't decode byte", err)
        self.assertEqual(len(prompts), len(server.requests))

    def test_verbose_tells_of_requests_and_retries_but_no_secret(self):
        server = self.serve(json_answer({"error": f"not {TOKEN}"}, 503, Retry_After=0))
        logging.getLogger("friendli_lite").setLevel(logging.NOTSET)
        with mock.patch.object(friendli_lite, "_retry_delay", return_value=0.0):
            status, out, err = self.run_main("--verbose prompt")
        self.assertEqual((0, TEXT + "\n"), (status, out))
        start = f"friendli_lite: POST {server.url}/v1/completions: "
        retry = "the server responded with 503 Reason: not *** (Retry-After: 0); retry 1 of 3 in"
        lines = ["status 503 after", retry, "status 200 after", "done after"]
        found = [re.sub(r" \d+\.\d+ s\Z", "", line) for line in err.splitlines()]
        self.assertEqual([start + line for line in lines], found)

    def test_ctrl_c_is_exit_status_130_without_a_traceback(self):
        self.serve()
        with mock.patch.object(CompletionStream, "__next__", side_effect=KeyboardInterrupt):
            self.assertEqual((130, "\n", ""), self.run_main("p"))

    def test_a_closed_pipe_ends_it_quietly(self):
        self.serve()
        for options in ("p", "--json p", "--no-stream p"):
            reader, writer = os.pipe()
            os.close(reader)
            with self.subTest(options), open(writer, "w", closefd=False) as stdout:
                self.assertEqual((0, "", ""), self.run_main(options, stdout=stdout))
            os.write(writer, b"what is written at exit goes nowhere")
            os.close(writer)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_reported(self):
        self.serve()
        for options in ("p", "--json p", "--no-stream p"):
            unwritten = contextlib.suppress(OSError)  # which close() tries to write once more
            with unwritten, open("/dev/full", "w") as stdout, self.subTest(options):
                status, _, err = self.run_main(options, stdout=stdout)
                self.assertEqual(1, status)
                self.assertRegex(err, r"\Afriendli_lite: .*No space left on device\n\Z")

    def test_the_module_runs_as_a_program(self):
        argv = mock.patch.object(sys, "argv", ["friendli_lite", "--version"])
        with argv, contextlib.redirect_stdout(io.StringIO()) as out, self.assertRaises(SystemExit):
            runpy.run_path(os.path.join(HERE, "friendli_lite.py"), run_name="__main__")
        self.assertEqual(f"friendli_lite {friendli_lite.__version__}\n", out.getvalue())


class StandInTests(TestCase):
    """The stand-in container as a program, and what it refuses."""

    def test_the_demo_runs_as_the_help_says(self):
        arguments = ["test_friendli_lite.py", "--demo", "--max-tokens=2", "Say this is a test!"]
        argv = mock.patch.object(sys, "argv", arguments)
        with argv, contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_module("test_friendli_lite", run_name="__main__", alter_sys=True)
        self.assertEqual(" This is\n", out.getvalue())

    def test_the_server_runs_until_ctrl_c_as_the_help_says(self):
        def ask_and_interrupt(seconds):
            self.ask(server_url=re.search(r"http:\S+\d", out.getvalue())[0])
            raise KeyboardInterrupt

        sleep = mock.patch.object(time, "sleep", ask_and_interrupt)
        with sleep, contextlib.redirect_stdout(io.StringIO()) as out:
            main(["--serve", "0"])
        line = r"A stand-in container answers at http://127\.0\.0\.1:\d+; Ctrl-C ends it\.\n\Z"
        self.assertRegex(out.getvalue(), line)

    @unittest.skipIf(__doc__ is None, "there are no docstrings")
    def test_the_help_of_this_file_shows_the_demo_and_the_server(self):
        argv = mock.patch.object(sys, "argv", ["test_friendli_lite.py", "--help"])
        with argv, contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertRaises(SystemExit, main, ["--help"])
        for word in ("--demo", "--serve 8000", "python3 -m unittest", "--failfast"):
            self.assertIn(word, out.getvalue())

    def test_a_port_that_cannot_be_served_is_one_line(self):
        for port, why in [(self.serve().port, ".+"), ("http", "invalid literal .*")]:
            with self.subTest(port), self.assertRaises(SystemExit) as caught:
                main(["--serve", str(port)])
            self.assertRegex(caught.exception.code, rf"\Acannot serve on port {port}: {why}\Z")

    def test_it_refuses_what_a_container_refuses(self):
        def answer(request, path="completions"):
            body = json.dumps(request).encode()
            return container_answer(Received(f"POST /v1/{path} HTTP/1.1", [], body))

        for name, value, noun in [
            ("max_tokens", "5", "integer"), ("max_tokens", 1.5, "integer"), ("n", True, "integer"),
            ("temperature", "hot", "number"), ("stop", "END", "list"), ("model", 7, "string"),
            ("stream", "yes", "boolean"), ("prompt", 7, "string or list"),
        ]:  # fmt: skip
            with self.subTest(name, value=value):
                kind, says = f"{noun.split()[0]}_type", f"Input should be a valid {noun}"
                detail = [{"loc": ["body", name], "msg": says, "type": kind}]
                refusal = json_answer({"detail": detail}, 422)
                self.assertEqual(refusal, answer({"prompt": "p", name: value}))
        says = "exactly one of prompt and tokens is needed"
        detail = [{"loc": ["body"], "msg": says, "type": "value_error"}]
        for request in ({"prompt": "p", "tokens": [1]}, {}, []):
            self.assertEqual(json_answer({"detail": detail}, 422), answer(request))
        self.assertTrue(answer(7).startswith(b"HTTP/1.1 422 "))
        taken = {"prompt": "p", "seed": [1], "top_p": 1, "model": None, "new": {}}
        self.assertEqual(json_answer(completion(taken)), answer(taken))
        self.assertEqual(json_answer({"detail": "Not Found"}, 404), answer({}, "models"))
        self.serve()
        error = self.failure(APIStatusError, prompt=None, tokens="12")
        self.assertEqual("body.tokens: Input should be a valid list", error.message)


# The module's own help


class HelpTests(TestCase):
    @unittest.skipIf(__doc__ is None, "there are no docstrings")
    def test_every_public_name_is_documented_with_units_and_sources(self):
        for name in friendli_lite.__all__:
            public = getattr(friendli_lite, name)
            with self.subTest(name):
                # What the dataclass decorator writes does not count
                self.assertNotRegex(inspect.getdoc(public) or "", rf"\A({name}\(|\Z)")
                for attribute, value in vars(public).items() if inspect.isclass(public) else ():
                    if callable(value) or isinstance(value, property):
                        self.assertTrue(attribute.startswith("_") or value.__doc__, attribute)
        for name in inspect.signature(complete).parameters:
            self.assertRegex(inspect.getdoc(complete), rf"\n    (\*\*)?{name}: \S")
        text = pydoc.render_doc(friendli_lite, renderer=pydoc.plaintext)
        for word in "seconds", "Raises:", "Architecture Blog", "Friendli Suite", "$FRIENDLI_TOKEN":
            self.assertIn(word, text)

    def test_each_option_has_its_help_and_each_value_a_name(self):
        for action in friendli_lite._parser()._actions:
            is_named = action.metavar or action.nargs == 0 or action.dest in ("model", "prompt")
            self.assertTrue(action.help and is_named, action.dest)

    def test_the_options_fit_a_terminal_and_their_two_examples_work(self):
        os.environ.update(COLUMNS="80", NO_COLOR="1")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.assertEqual(0, exit_status_of_main(["--help"]))
        lines = printed.getvalue().splitlines()
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertLessEqual(len(lines), 24)
        server = self.serve()
        stdin = mock.patch("sys.stdin", io.StringIO("Say this is a test!"))
        with stdin, contextlib.redirect_stdout(io.StringIO()):
            for example in lines[lines.index("examples:") + 1 :]:
                program, *arguments = shlex.split(example.partition(" < ")[0])
                self.assertEqual(("friendli_lite", 0), (program, exit_status_of_main(arguments)))
        prompts = [received.json["prompt"] for received in server.requests]
        self.assertEqual(["Say this is a test!"] * 2, prompts)


# The file on a stranger's machine


class FolderTestCase(TestCase):
    def enter_folder(self, files):
        """Make a folder to work in and to import from; undo at the end what was done there."""
        undo = contextlib.ExitStack()
        self.addCleanup(undo.close)
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        undo.callback(os.chdir, os.getcwd())
        undo.callback(logging.root.setLevel, logging.root.level)
        undo.enter_context(mock.patch.object(logging.root, "handlers", logging.root.handlers[:]))
        undo.enter_context(mock.patch.object(sys, "path", [folder, *sys.path]))
        undo.enter_context(mock.patch.dict(sys.modules))
        os.chdir(folder)
        for name, text in files.items():
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            with open(name, "w", encoding="utf-8") as file:
                file.write(text)
        return folder

    def run_python(self, *arguments):
        """Run Python in a process of its own, with exit status 0; return its stdout and stderr."""
        command = [sys.executable, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
        self.assertEqual(0, ran.returncode, ran.stdout + ran.stderr)
        return ran.stdout, ran.stderr

    def import_file(self, name):
        """Import a file that the README tells to save."""
        self.enter_folder(readme_files())
        return importlib.import_module(name)

    def run_block(self, code):
        """Run a block of the README as a program; return its namespace and what it printed."""
        names = {"__name__": "readme"}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec", dont_inherit=True), names)
        if "executor" in names:
            self.addCleanup(names["executor"].shutdown)
        return types.SimpleNamespace(**names), printed.getvalue()


class StrangersMachineTests(FolderTestCase):
    def test_its_first_lines_name_the_licence_and_keep_linters_off(self):
        comments = source().partition('"""')[0].splitlines()
        for line in "SPDX-License-Identifier: MIT-0", "ruff: noqa", "fmt: off", "pyright: basic":
            self.assertIn(f"# {line}", comments)
        self.assertLess(len(comments), 9)
        self.assertTrue(all(line.startswith("#") for line in comments))

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "needs Python 3.10")
    def test_it_imports_the_standard_library_only(self):
        kinds = (ast.Import, ast.ImportFrom)
        imports = [node for node in ast.walk(ast.parse(source())) if isinstance(node, kinds)]
        modules = {re.split("[ .]", ast.unparse(node))[1] for node in imports}
        self.assertEqual(set(), modules - sys.stdlib_module_names)
        self.assertIn("socket", modules)

    def test_it_runs_isolated_from_a_read_only_folder_and_from_a_zip(self):
        # Not even root can write into it
        read_only = self.enter_folder({"friendli_lite.py": source(), "__pycache__": ""})
        os.chmod(read_only, 0o555)
        self.addCleanup(os.chmod, read_only, 0o755)
        archive = os.path.join(self.enter_folder({}), "bundle.zip")
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr("friendli_lite.py", source())
        code = "import sys; sys.path.append(sys.argv[1]); import friendli_lite as f; f.main(['Hi'])"
        self.serve()
        os.environ["LC_ALL"] = "C"
        del os.environ["PATH"]  # HOME is not there either
        isolated = functools.partial(self.run_python, "-I", "-S", "-W", "error", "-c", code)
        places = (read_only, archive)
        for place, ran in zip(places, WORKERS.map(isolated, places)):
            with self.subTest(os.path.basename(place)):
                self.assertEqual((f"{TEXT}\n", ""), ran)

    def test_a_pipe_gets_each_chunk_as_it_comes_in_any_locale(self):
        answer = Later(ONE_EVENT, chunked(sse(text_chunk(" caf\u00e9 \U0001f600 \ud800"))))
        server = self.serve(answer)
        os.environ.update(LC_ALL="C", PYTHONIOENCODING="latin-1")
        os.environ.pop("PYTHONUNBUFFERED", None)  # would do what is tested here
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, friendli_lite.__file__], **pipes) as process:
            process.stdin.write("\ufeffé €\r\n".encode())
            process.stdin.close()
            self.assertEqual(b"a", process.stdout.read(1))
            answer.now()
            printed = process.stdout.read().replace(b"\r", b"")
        self.assertEqual((0, b" caf\xe9 \\U0001f600 \\ud800\n"), (process.returncode, printed))
        self.assertEqual("é €", server.requests[0].json["prompt"])

    def test_closed_standard_streams_do_no_harm(self):
        self.enter_folder({})
        for closed, arguments, script, status, printed in [
            ("stdin", [], [], 0, f"{TEXT}\n"), ("stdout", ["Hi"], [], 0, ""),
            ("stderr", ["Hi", "--verbose"], [], 0, f"{TEXT}\n"),
            ("stderr", ["Hi"], [json_answer({}, 422)], 1, ""),  # an error is no output
        ]:  # fmt: skip
            streams = {name: io.StringIO() for name in ("stdin", "stdout", "stderr")}
            with self.case(closed, arguments), self.serve(*script) as server:
                with mock.patch.multiple(sys, **{**streams, closed: None}):  # as Python says it
                    self.assertEqual(status, exit_status_of_main(arguments))
                self.assertEqual(printed, streams["stdout"].getvalue())
                self.assertEqual(1, len(server.requests))


# The README


def readme_blocks():
    """Return the Python blocks, each with the output that is shown below it, or ""."""
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", readme(), re.DOTALL)


def readme_block(text):
    """Return the one Python block that holds a text."""
    (block,) = [code for code, _ in readme_blocks() if text in code]
    return block


def readme_files():
    """Return the files that the README tells to save, and the module beside them."""
    return {
        "lambda_function.py": readme_block("def lambda_handler") + readme_block("def url_handler"),
        "many.py": readme_block("def ask_all"), "friendli_lite.py": source(),
    }  # fmt: skip


def readme_programs():
    """Return the other blocks, which run by themselves or beside the files, with their output."""
    others = "".join([*readme_files().values(), readme_block("from ._vendor")])
    return [(code, shown) for code, shown in readme_blocks() if code not in others]


# A type checker must refuse those that are told to be ignored, and no others
TYPED_CALLS = """
from typing import Any
from friendli_lite import CompletionRequest, complete, stream
fields: dict[str, Any] = {"n": 2}
complete("x", **fields)
complete({"prompt": "x"}, temperature=1, stop=["END"])
text: str = complete(CompletionRequest(prompt=["x", "y"]), seed=[1, 2]).text
texts: list[str] = [chunk.text for chunk in stream(tokens=[1], seed=None)]
complete("x", max_token=5)  # type: ignore[call-arg]
complete("x", max_tokens="5")  # type: ignore[arg-type]
complete("x", messages=[])  # type: ignore[call-arg]
stream("x", seed=1.5)  # type: ignore[arg-type]
number: int = complete("x").text  # type: ignore[assignment]
"""


class ReadmeTests(FolderTestCase):
    def test_every_program_prints_what_is_shown_below_it(self):
        self.enter_folder(readme_files())
        server = self.serve()
        for code, shown in readme_programs():
            if "from dask" in code:
                continue  # it has a test of its own
            with self.subTest(code=code), contextlib.redirect_stderr(io.StringIO()):
                server.requests.clear()
                _, printed = self.run_block(code.replace("http://localhost:8000", server.url))
                is_printing = "print(" in code and "file=file" not in code
                expected = shown.rstrip("\n") or (TEXT if is_printing else "")
                self.assertEqual(expected, printed.rstrip("\n"))
                self.assertTrue(server.requests)
        with open("answers.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = [(row["number"], row["answer"]["choices"][0]["text"]) for row in rows]
        self.assertEqual([(0, TEXT), (1, TEXT)], texts)

    def test_the_first_screen_shows_a_program_and_commands_and_no_long_line(self):
        lines = readme().splitlines()
        self.assertIn("```python", lines[:15])
        program = "test_friendli_lite.py"
        demo = f'{program} --demo "Say this is a test!"'
        for command in (f"{program} --serve 8000", demo, "-m unittest"):
            self.assertIn(f"    python3 {command}", lines[:30])
        self.assertEqual([], [line for line in lines if len(line) > 120 and line[:1] != "|"])

    def test_every_anchor_file_and_section_that_is_named_exists(self):
        headings = re.findall(r"^#+ (.*)$", readme(), re.M)
        anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
        for anchor in re.findall(r"\]\(#(.*?)\)", readme()):
            self.assertIn(anchor, anchors)
        for name in re.findall(r"`(benchmarks/\S+|\.ci/run)`", readme()):
            self.assertTrue(os.path.exists(os.path.join(HERE, name)), name)
        for name in re.findall(r"unittest test_friendli_lite\.(\w+)", readme()):
            self.assertIn(name, globals())
        (layout,) = re.findall(r"\| section \| what it does \|\n(.*?)\n\n", readme(), re.DOTALL)
        named = "\n".join(row.split("|")[1] for row in layout.splitlines()[1:])
        sections = r"^# ([A-Z][^\n]*)\n\n\n(?=class |def |@|[_A-Z])"
        for section in re.findall(sections, source(), re.M):
            self.assertIn(re.split("[:;]", section)[0], named)

    def test_the_version_and_the_count_of_lines_are_those_of_the_file(self):
        line = f'__version__ = "{friendli_lite.__version__}"'
        self.assertEqual([line], re.findall("^__version__.*", source(), re.M))
        self.assertIn(f"`{line}`", readme())
        self.assertIn(f"\n### {friendli_lite.__version__}\n", readme())
        (count,) = re.findall(r"\| friendli_lite \| 1 file \| about ([\d,]+) \|", readme())
        self.assertAlmostEqual(int(count.replace(",", "")), source().count("\n"), delta=150)

    def test_a_vendored_file_works_in_a_package_under_any_name(self):
        self.enter_folder({
            "app/__init__.py": readme_block("from ._vendor"), "app/_vendor/__init__.py": "",
            "app/_vendor/friendli_lite.py": source(), "app/_vendor/completions.py": source(),
        })  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            importlib.import_module("app")
        self.assertEqual(friendli_lite.__version__ + "\n", printed.getvalue())
        for name in ("friendli_lite", "completions"):
            copied = importlib.import_module(f"app._vendor.{name}")
            with self.subTest(name), self.serve(then_close(json_answer({"detail": "no"}, 404))):
                error = pickle.loads(pickle.dumps(raised(copied.complete)))
                copied._pool.close()
                found = (type(error), error.status_code, error.message)
                self.assertEqual((copied.APIStatusError, 404, "no"), found)

    @unittest.skipUnless(importlib.util.find_spec("mypy"), "needs mypy")
    def test_a_strict_type_checker_takes_the_programs_and_refuses_wrong_calls(self):
        programs = {f"program_{n}.py": code for n, (code, _) in enumerate(readme_programs())}
        files = {**programs, **readme_files(), "calls.py": TYPED_CALLS}
        self.enter_folder(files)
        options = ["--strict", "--python-version=3.12", f"--cache-dir={os.devnull}"]
        for name in ("import-not-found", "no-untyped-call"):  # Dask may be missing here
            options.append(f"--disable-error-code={name}")
        _, complaints = self.run_python("-m", "mypy", *options, *files)
        self.assertEqual("", complaints)

    def table(self, heading):
        """Return the rows of the first table below a heading, without the code's marks."""
        section = readme().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (.*) \|$", section, re.M)
        return [[cell.strip() for cell in re.split(r" ?\| ?", row)] for row in rows]

    def test_the_parameters_are_those_of_the_two_calls(self):
        self.assertIn("`help(friendli_lite.CompletionRequest)`", readme())
        shown = {row[0].strip("`"): row[3] for row in self.table("Parameters")[1:]}
        parameters = inspect.signature(complete).parameters  # stream() has the same
        self.assertEqual([*parameters], [*shown, "fields"])
        self.assertEqual("`RetryConfig()`", shown["retries"])
        for name, default in shown.items():
            if default == "`None`" or isinstance(parameters[name].default, float):
                self.assertEqual(f"`{parameters[name].default}`", default)

    def test_every_error_has_its_row(self):
        rows = self.table("Errors")
        named = re.findall(r"`(\w+Error)`", " ".join(row[0] for row in rows))
        public = {name for name in friendli_lite.__all__ if name.endswith("Error")}
        self.assertEqual(public | {"TypeError", "ValueError"}, {*named, "FriendliError"})
        for name in {**vars(APIStatusError("")), **vars(APIResponseError(""))}:
            self.assertIn(f"`.{name}`", str(rows))

    def test_the_results_are_those_of_the_dataclasses(self):
        results = ["ChunkChoice", "Completion", "CompletionChoice", "CompletionChunk", "Logprobs"]
        expected = {"CompletionStream": {"headers"}}
        for kind in [*results, "Usage"]:
            dataclass = getattr(friendli_lite, kind)
            fields = {field.name for field in dataclasses.fields(dataclass)}
            expected[kind] = fields | ({"text"} & set(dir(dataclass)))
        named = {}
        for cell, text, _ in self.table("Results")[1:]:
            kind = cell.strip("`") or kind
            named.setdefault(kind, set()).update(re.findall(r"`(\w+)`", text))
        self.assertEqual(expected, named)

    def test_the_worked_numbers_are_those_of_the_module(self):
        config = RetryConfig()
        delays = [config.initial_delay * config.multiplier**k for k in range(config.max_retries)]
        self.assertLessEqual(delays[-1], config.max_delay)
        self.assertTrue(30 <= config.max_retry_after < 61)
        for said in (
            f"`{config}`. The", "doubles: {:g}, {:g}, {:g} s".format(*delays),
            f"add at most {sum(delays):g} s", f"ends after {9 + delays[0] + 9:g} s at the latest",
            f"| status {', '.join(map(str, config.status_codes))} | yes: `status_codes` |",
            f"Idle connections are used for {friendli_lite._KEEPALIVE_EXPIRY_SECONDS:g} s",
            f"Connecting takes {friendli_lite._MAX_CONNECT_SECONDS:g} s at most",
            f"each gets {friendli_lite._MAX_ADDRESS_SECONDS:g} s at most",
            f"for at most {friendli_lite._MAX_DRAIN_SECONDS * 1000:g} ms",
            f"After {friendli_lite._MAX_STALE_SECONDS:g} s without",
            f"more than {friendli_lite._MAX_COMPLETION_BYTES // 1024**2} MiB",
        ):  # fmt: skip
            self.assertIn(said, " ".join(readme().split()))


DASK_PROGRAM = """
from dask.distributed import LocalCluster
from friendli_lite import Completion, CompletionRequest
from everywhere import ask_everywhere

if __name__ == "__main__":
    requests = [CompletionRequest(prompt="Roll a die")] * 20 + [{"prompt": "a"}]
    for processes in (True, False):
        answers = {}
        with LocalCluster(n_workers=2, processes=processes, dashboard_address=None) as cluster:
            ask_everywhere(requests, answers, cluster)
        kinds = {type(answer) for answer in answers.values()}
        print(sorted(answers) == [*range(21)], kinds == {Completion})
"""


class RecipeTests(FolderTestCase):
    def test_the_error_example_prints_what_happened(self):
        for answer, printed in (
            (json_answer({"detail": "no such model"}, 404), "refused with 404: no such model\n"),
            (event_stream(), "failed after 1 attempts: POST "),
        ):
            with self.case(printed), self.serve(answer):
                found = self.run_block(readme_block("refused with"))[1]
                self.assertEqual(printed, found[: len(printed)])

    def test_the_ported_examples_send_what_they_say(self):
        server = self.serve()
        self.run_block(readme_block("as event_stream"))
        expected = [{"stream": stream, "prompt": "Say this is a test!"} for stream in (False, True)]
        self.assertEqual(expected, [received.json for received in server.requests])

    def test_the_async_stream_leaves_the_loop_free_and_its_connection(self):
        loop_ran, client_left = threading.Event(), threading.Event()

        def answer(sock):
            sock.sendall(head(Content_Type=EVENTS) + sse(text_chunk("a"), done=False))
            if loop_ran.wait(10):  # which the loop sets while it awaits the next chunk
                sock.sendall(sse(text_chunk("b"), done=False))
                if not sock.recv(1):
                    client_left.set()
            return CLOSE

        async def main():
            chunks = names.astream("Hi")
            self.assertEqual("a", (await chunks.__anext__()).text)
            asyncio.get_running_loop().call_soon(loop_ran.set)
            self.assertEqual("b", (await chunks.__anext__()).text)
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(chunks.__anext__(), 0.01)  # which cancels it

        self.serve()
        names, _ = self.run_block(readme_block("async def astream"))
        self.serve(answer)
        asyncio.run(main())
        self.assertTrue(client_left.wait(10))

    def test_async_calls_run_at_the_same_time(self):
        calls = 16
        barrier = threading.Barrier(calls)

        def answer(sock):
            barrier.wait(10)  # until all of the calls have come
            sock.sendall(ANSWER)

        async def main():
            return await asyncio.gather(*[names.acomplete("Hi") for _ in range(calls)])

        self.serve()
        names, _ = self.run_block(readme_block("async def acomplete"))
        self.serve(*[answer] * calls)
        self.assertEqual([TEXT] * calls, [found.text for found in asyncio.run(main())])

    def test_every_prompt_gets_its_own_answer_or_error(self):
        many = self.import_file("many")
        prompts = [f"prompt {number}" for number in range(40)]
        requests = [{"prompt": "p", "max_tokens": "5"}, *prompts]
        self.serve()
        echo = mock.patch(f"{__name__}.words", lambda request: [request["prompt"]])
        pool = mock.patch.object(many, "ThreadPoolExecutor", wraps=ThreadPoolExecutor)
        answers = {}
        with echo, pool as made_pool, contextlib.redirect_stderr(io.StringIO()) as progress:
            many.ask_all(requests, answers)
        error = answers.pop(0)
        self.assertEqual("body.max_tokens: Input should be a valid integer", error.message)
        self.assertIsNone(error.__traceback__)
        texts = {number: answer.text for number, answer in answers.items()}
        self.assertEqual(dict(enumerate(prompts, 1)), texts)
        made_pool.assert_called_once_with(16)
        self.assertIn("41 of 41\r", progress.getvalue())

    def test_an_interruption_keeps_the_answers_and_a_second_run_asks_the_rest(self):
        many = self.import_file("many")
        all_asked, cancelled = threading.Barrier(3), threading.Event()

        class Pool(ThreadPoolExecutor):
            def shutdown(self, *args, **options):  # called when the rest is cancelled
                cancelled.set()
                super().shutdown(*args, **options)

        def interrupt(future, timeout=None):  # a signal could come within the pool's own locks
            all_asked.wait(10)
            raise KeyboardInterrupt

        def answer_late(sock):  # it was paid for, too
            all_asked.wait(10)
            cancelled.wait(10)
            sock.sendall(ANSWER)

        server = self.serve(ANSWER, answer_late, answer_late)
        prompts = [f"prompt {number}" for number in range(100)]
        answers = {}
        pool = mock.patch.object(many, "ThreadPoolExecutor", Pool)
        interruption = mock.patch.object(Future, "result", interrupt)
        with contextlib.redirect_stderr(io.StringIO()):
            with pool, interruption, self.assertRaises(KeyboardInterrupt):
                many.ask_all(prompts, answers, threads=2)
            self.assertEqual({0, 1, 2}, set(answers))
            self.assertEqual(3, len(server.requests))
            many.ask_all(prompts, answers, threads=2)
        self.assertEqual(set(prompts), {received.json["prompt"] for received in server.requests})
        self.assertEqual((100, 100), (len(answers), len(server.requests)))

    @unittest.skipUnless(importlib.util.find_spec("distributed"), "needs distributed")
    def test_dask_sends_each_of_equal_requests_and_returns_its_classes(self):
        block = readme_block("def ask_everywhere")
        files = {**readme_files(), "everywhere.py": block, "program.py": DASK_PROGRAM}
        os.environ["PYTHONPATH"] = self.enter_folder(files)
        server = self.serve()
        self.assertEqual("True True\n" * 2, self.run_python("program.py")[0])
        self.assertEqual(42, len(server.requests))


class LambdaTests(FolderTestCase):
    def test_a_direct_invocation_is_completed_or_told_its_status(self):
        logging.getLogger("friendli_lite").setLevel(logging.INFO)
        handler = self.import_file("lambda_function").lambda_handler
        hi, refused = {"prompt": "Hi"}, json_answer({"detail": "no such model"}, 404)
        no_prompts = [{"prompt": 5}, {}, ["prompt"], None]
        for event, milliseconds, script, status, said, sent in [
            (hi, 5000, [], 200, TEXT, 2), (hi, 5000, [refused] * 2, 502, "no completion", 2),
            (hi, 999, [], 504, "no completion in time", 0),
            *((event, 5000, [], 400, "a prompt is needed", 0) for event in no_prompts),
        ]:  # fmt: skip
            context = mock.Mock(**{"get_remaining_time_in_millis.return_value": milliseconds})
            expected = {"statusCode": status, "text" if status == 200 else "error": said}
            with self.case(event, expected), self.serve(*script) as server:
                with self.assertLogs() as logs:
                    logging.info("assertLogs() needs one")
                    for _ in range(2):
                        self.assertEqual(expected, handler(event, context))
                self.assertEqual((min(sent, 1), sent), (server.connections, len(server.requests)))
                self.assertEqual(status in (502, 504), server.url in str(logs.output))
                self.assertNotIn(TOKEN, str(logs.output))
        os.environ["FRIENDLI_SERVER_URL"] = "internal.example:8000"  # which lacks http://
        with self.assertLogs(level="ERROR") as logs:
            answer = handler(hi, context)
        self.assertEqual({"statusCode": 502, "error": "no completion"}, answer)
        self.assertIn("internal.example", str(logs.output))

    def test_a_function_url_gets_an_http_response(self):
        handler = self.import_file("lambda_function").url_handler
        context = mock.Mock(**{"get_remaining_time_in_millis.return_value": 5000})
        plain = '{"prompt": "caf\u00e9"}'
        encoded = base64.b64encode(plain.encode()).decode()
        for event, status in (
            ({"body": plain, "isBase64Encoded": False}, 200),
            ({"body": encoded, "isBase64Encoded": True}, 200),
            ({"body": "//79", "isBase64Encoded": True}, 400),  # no UTF-8
            ({"body": "prompt=Hi"}, 400), ({"body": None}, 400), ({}, 400),
        ):  # fmt: skip
            with self.case(event), self.serve() as server:
                answer = handler(event, context)
                said = {"text": TEXT} if status == 200 else {"error": "a prompt is needed"}
                self.assertEqual({"statusCode": status, **said}, json.loads(answer.pop("body")))
                self.assertEqual({"statusCode": status, "headers": {"Content-Type": JSON}}, answer)
                prompts = [received.json["prompt"] for received in server.requests]
                self.assertEqual(["caf\u00e9"] if status == 200 else [], prompts)

    def test_the_zip_of_the_two_commands_needs_no_compiler(self):
        self.enter_folder(readme_files())
        commands = re.findall(r"^    python3 (-m (?:compileall|zipfile) .*)$", readme(), re.M)
        self.assertEqual(2, len(commands))
        for command in commands:
            self.assertEqual(("", ""), self.run_python(*command.split()))
        with zipfile.ZipFile("function.zip") as bundle:
            *sources, cache, one, two = bundle.namelist()
            # The times differ, and whoever compiles again gets an error
            self.enter_folder(dict.fromkeys(sources, "raise AssertionError"))
            bundle.extractall(members=[cache, one, two])
        self.assertEqual(["lambda_function.py", "friendli_lite.py"], sources)
        self.assertEqual(("", ""), self.run_python("-c", "import lambda_function"))

    @unittest.skipUnless(importlib.util.find_spec("awslambdaric"), "needs awslambdaric")
    def test_both_handlers_work_under_the_runtime_client_of_aws(self):
        folder = self.enter_folder(readme_files())
        os.environ.update(LAMBDA_TASK_ROOT=folder, PYTHONPATH=folder)
        failed = {"statusCode": 502, "error": "no completion"}
        by_url = {"statusCode": 502, "headers": {"Content-Type": JSON}, "body": json.dumps(failed)}
        headers = {"Lambda_Runtime_Aws_Request_Id": 1, "Lambda_Runtime_Deadline_Ms": 9 * 10**12}
        for handler, event, answer, expected, logged in [
            ("lambda_handler", {"prompt": "Hi"}, json_answer({}, 503, Retry_After=0),
             {"statusCode": 200, "text": TEXT}, "retry 1 of 3"),
            ("url_handler", {"body": '{"prompt": "Hi"}', "isBase64Encoded": False},
             json_answer({"detail": "no such model"}, 404), by_url, "no such model"),
        ]:  # fmt: skip
            with self.subTest(handler):
                # It ends where there is no next event
                runtime = self.serve(json_answer(event, **headers), json_answer({}, 202))
                os.environ["AWS_LAMBDA_RUNTIME_API"] = urlsplit(runtime.url).netloc
                self.serve(answer)
                command = [sys.executable, "-m", "awslambdaric", f"lambda_function.{handler}"]
                ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
                _, posted, _ = runtime.requests
                self.assertEqual("/2018-06-01/runtime/invocation/1/response", posted.path)
                self.assertEqual(expected, posted.json)
                self.assertIn(logged, ran.stdout + ran.stderr)
                self.assertNotIn(TOKEN, ran.stdout + ran.stderr)


# Run as a program


def demo(arguments):
    """Run the command line against a stand-in container."""
    with StandInContainer() as container:
        os.environ["FRIENDLI_SERVER_URL"] = container.url
        os.environ["NO_PROXY"] = "127.0.0.1"
        friendli_lite.main(arguments)


def serve(port="8000"):
    """Keep a stand-in container running until Ctrl-C."""
    try:
        container = StandInContainer(port=int(port))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"cannot serve on port {port}: {error}")
    with container, contextlib.suppress(KeyboardInterrupt):
        print(f"A stand-in container answers at {container.url}; Ctrl-C ends it.", flush=True)
        while True:
            time.sleep(1)


def main(arguments):
    if arguments[:1] == ["--demo"]:
        demo(arguments[1:])
    elif arguments[:1] == ["--serve"]:
        serve(*arguments[1:2])
    else:
        if {"-h", "--help"} & set(arguments):
            print(__doc__)
        unittest.main()


if __name__ == "__main__":
    main(sys.argv[1:])
