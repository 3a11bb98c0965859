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
WORKERS = ThreadPoolExecutor(999)  # of all servers: to start a thread for each would take longer


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
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

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
                if answer(sock) == CLOSE if callable(answer) else sock.sendall(answer):
                    return


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
    """Answer as wire.md of the project's design shows: a completion or a stream, 404 or 422."""
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


def text_chunk(text, index=0, reason=None, logs=None, **token):
    """The payload of an event with a text."""
    token = token or {"token": 7}
    choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logs}
    return chunk([{**choice, **(token if reason is None else {})}])


def chunks(request):
    """The payloads of a stream, choices interleaved."""
    indexes = range(request.get("n") or 1)
    for token, text in enumerate(words(request)):
        logs = logprobs([text]) if request.get("logprobs") else None
        yield from (text_chunk(text, index, None, logs, token=token) for index in indexes)
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
    return page(json.dumps(payload).encode(), status, "application/json", **headers)


def sse(*payloads, done=True):
    """The body of an event stream."""
    events = [f"data: {json.dumps(payload, separators=(',', ':'))}\n\n" for payload in payloads]
    return "".join([*events, "data: [DONE]\n\n" if done else ""]).encode()


def chunked(*pieces):
    """Pieces of a body in chunked framing, to its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


def event_stream(*payloads, done=True, framing="chunked"):
    """A whole answer with an event stream; framing="close" needs the end of the connection."""
    return framed(sse(*payloads, done=done), framing, "text/event-stream")


def framed(body, framing, content_type, status=200):
    """A whole answer with a body in one of the three framings of HTTP/1.1."""
    if framing == "chunked":
        return head(status, Content_Type=content_type, Transfer_Encoding="chunked") + chunked(body)
    if framing == "length":
        return head(status, Content_Type=content_type, Content_Length=len(body)) + body
    return head(status, Content_Type=content_type, Connection="close") + body


# Scripted answers: bytes, or functions of the connected socket


FRAMINGS = ("chunked", "length", "close")
JSON_HEAD = head(Content_Type=JSON, Content_Length=100_000)
STREAM_HEAD = head(Content_Type=EVENTS, Transfer_Encoding="chunked")
ONE = b'{"choices":[{"text":"a"}]}'  # the smallest completion, or chunk
ANSWER = json_answer(completion({}))
STREAM = event_stream(*chunks({}))
CHUNKED_JSON_HEAD = head(Content_Type=JSON, Transfer_Encoding="chunked")
A_CHUNK = chunked(sse(text_chunk("a"), done=False))[:-5]
ONE_EVENT = STREAM_HEAD + A_CHUNK
AT_ONCE = RetryConfig(initial_delay=0)
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
    """An answer of some bytes and, when the test says `now()`, of another answer."""

    def __init__(self, data, answer):
        self._data, self._answer = data, answer
        self._now, self._done = threading.Event(), threading.Event()

    def __call__(self, sock):
        sock.sendall(self._data)
        self._now.wait(5)
        result = self._answer(sock) if callable(self._answer) else sock.sendall(self._answer)
        self._done.set()
        return result

    def now(self):
        self._now.set()
        if not self._done.wait(5):
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
        self.is_open, self.is_claimed, self.timeouts = True, False, None
        self._pieces = list(pieces)
        self._error = error or AssertionError("it waits for more than has come")

    def receive(self, may_end=False):
        if self._pieces:
            return self._pieces.pop(0)
        if may_end and self._error is CUT:
            return b""
        raise self._error

    def claim(self):
        was_claimed, self.is_claimed = self.is_claimed, True
        return not was_claimed

    def close(self):
        self.is_open = False


def outcome_of_pieces(call, pieces, error=None):
    """Read a response from a fake connection; return its texts, its error or None, and this.

    A connection that is open then was left to the pool.
    """

    def read():
        with contextlib.closing(friendli_lite._Response(connection)) as response:
            result = READERS[call](response)
            yield from [result] if call is complete else result

    connection = FakeConnection(pieces, error)
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

    def ask(self, times=1, call=complete, **options):
        """Make calls that must succeed at the first try, with the text of the stand-in."""
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
        """Check an error's class, that it is one line and has these words, and that it is tight."""
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
        tls, options = shared_tls() if scheme == "https" else (None, {})
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
            return framed(response.read(), "length", response.headers["Content-Type"])


def listener(stack, backlog=128):
    """Listen, and never accept; with backlog=0 connecting hangs. Return the URL."""
    sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))
    for _ in range(0 if backlog else 4):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(sock.getsockname())
    return f"http://127.0.0.1:{sock.getsockname()[1]}"


def exit_status(function):
    """Call a function in a forked child; return the status of this: 0 if it returned."""
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


@functools.lru_cache(maxsize=None)
def syntax_tree():
    return ast.parse(source())


# Errors


class ErrorTests(TestCase):
    DETAILS = {"status_code": 503, "headers": {"a": "b"}, "body": "page", "message": "busy"}

    def test_errors_survive_pickling_and_copying(self):
        for error in [
            FriendliError("text"), APIStatusError("text", **self.DETAILS),
            APIConnectionError("text"), APITimeoutError("text"), APIResponseError("text", "page"),
        ]:  # fmt: skip
            error.attempts = 3
            pickles = [pickle.dumps(error, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)]
            for twin in [*map(pickle.loads, pickles), copy.copy(error), copy.deepcopy(error)]:
                with self.subTest(type(error).__name__):
                    self.assertIsNot(error, twin)
                    self.assertIs(type(error), type(twin))
                    self.assertEqual(("text",), twin.args)
                    self.assertEqual(vars(error), vars(twin))

    def test_an_error_of_a_call_survives_pickling(self):
        for kind, answer in [
            (APIStatusError, json_answer({"error": "busy"}, 503, X_Id="7")),
            (APIResponseError, json_answer({"error": "busy"})),
            (APIConnectionError, fin),
        ]:
            with self.case(kind.__name__), self.serve(answer):
                error = self.failure(kind)
                twin = pickle.loads(pickle.dumps(error))
                self.assertEqual((str(error), vars(error)), (str(twin), vars(twin)))
                self.assertEqual(1, twin.attempts)

    def test_the_fields_of_an_error_are_its_arguments(self):
        for error, fields in [
            (FriendliError("text"), {}), (APITimeoutError("text"), {}),
            (APIResponseError("text"), {"body": ""}),
            (APIResponseError("text", "page"), {"body": "page"}),
            (APIStatusError("text", *self.DETAILS.values()), self.DETAILS),
            (APIStatusError("text"), {"status_code": 0, "headers": {}, "body": "", "message": ""}),
        ]:  # fmt: skip
            with self.subTest(repr(error), fields=fields):
                self.assertEqual(("text", fields, 0), (str(error), vars(error), error.attempts))
        self.assertIsNot(APIStatusError("a").headers, APIStatusError("b").headers)

    def test_errors_are_caught_by_their_base_classes(self):
        bases = {
            FriendliError: Exception, APIStatusError: FriendliError,
            APIConnectionError: FriendliError, APITimeoutError: APIConnectionError,
            APIResponseError: FriendliError,
        }  # fmt: skip
        for kind, base in bases.items():
            self.assertEqual((base,), kind.__bases__)


# Request


# The fields of the API, by their types in Python
API_FIELDS = {
    "str | Sequence[str]": "prompt", "str": "model",
    "int": "encoder_no_repeat_ngram logprobs max_tokens max_total_tokens min_tokens"
    " min_total_tokens n no_repeat_ngram top_k",
    "int | Sequence[int]": "seed",
    "float": "encoder_repetition_penalty frequency_penalty min_p presence_penalty"
    " repetition_penalty temperature top_p xtc_probability xtc_threshold",
    "bool": "stream",
    "Sequence[int]": "tokens eos_token forced_output_tokens token_index_to_replace",
    "Sequence[float]": "embedding_to_replace", "Sequence[str]": "bad_words stop",
    "Sequence[Mapping[str, Sequence[int]]]": "bad_word_tokens stop_tokens",
    "Mapping[str, bool]": "stream_options", "Mapping[str, Any]": "response_format",
}  # fmt: skip

# A value for each field but tokens
ALL_FIELDS = json.loads("""{
    "prompt": "Say this is a test!", "model": "my-adapter", "stop": ["\\n"], "bad_words": ["no"],
    "bad_word_tokens": [{"tokens": [1, 2]}], "stop_tokens": [{"tokens": [4]}], "eos_token": [2],
    "embedding_to_replace": [0.5, -1.0], "token_index_to_replace": [0], "seed": [1, 2], "n": 2,
    "encoder_no_repeat_ngram": 1, "encoder_repetition_penalty": 1.5, "no_repeat_ngram": 3,
    "forced_output_tokens": [3], "frequency_penalty": 0.1, "presence_penalty": 0.2, "logprobs": 2,
    "max_tokens": 2, "max_total_tokens": 20, "min_tokens": 1, "min_total_tokens": 2, "top_k": 40,
    "repetition_penalty": 1.1, "temperature": 0.7, "min_p": 0.1, "top_p": 0.9, "stream": false,
    "response_format": {"type": "json_object"}, "stream_options": {"include_usage": true},
    "xtc_probability": 0.3, "xtc_threshold": 0.4
}""")


class FieldTests(TestCase):
    def test_the_fields_are_those_of_the_api_and_extra_body(self):
        expected = {
            name: f"{kind} | None" for kind, names in API_FIELDS.items() for name in names.split()
        }
        self.assertEqual(33, len(expected))
        expected["extra_body"] = "Mapping[str, Any] | None"
        self.assertEqual(expected, CompletionRequest.__annotations__)
        self.assertEqual(dict.fromkeys(expected), vars(CompletionRequest()))

    def test_the_typed_keywords_are_the_fields_of_a_request(self):
        lines = source().splitlines()
        (keywords,) = (
            n.body for n in ast.walk(syntax_tree()) if getattr(n, "name", "") == "_RequestFields"
        )
        found = [
            (item.target.id, lines[item.lineno - 1][item.annotation.col_offset :])
            for item in keywords
            if isinstance(item, ast.AnnAssign)
        ]
        self.assertEqual([*CompletionRequest.__annotations__.items()], found)

    def test_each_field_is_described_where_help_shows_it(self):
        for kind in (CompletionRequest, RetryConfig):
            doc = source().partition(f"\nclass {kind.__name__}:")[2].split('"""')[1]
            doc = doc.partition("Attributes:")[2]
            described = re.findall(r"^        (\w+): \S.{10}", doc, re.MULTILINE)
            self.assertEqual([*kind.__annotations__], described)

    def test_all_fields_are_sent_as_given_and_none_is_not(self):
        server = self.serve()
        complete(ALL_FIELDS)
        tokens = {**ALL_FIELDS, "tokens": [1, 2, 3], "stream": True}
        del tokens["prompt"]
        list(stream(tokens, max_tokens=None))
        del tokens["max_tokens"]
        self.assertEqual([ALL_FIELDS, tokens], [request.json for request in server.requests])
        self.assertEqual(33, len({**ALL_FIELDS, **tokens}))


# Response types


def parse(build, **fields):
    """Parse a completion, or a chunk, with these fields."""
    return friendli_lite._parse(FakeResponse(), json.dumps(fields).encode(), build)


_completion, _chunk = friendli_lite._completion, friendli_lite._chunk
PARSERS = {complete: _completion, stream: _chunk}


class CompletionTests(TestCase):
    def test_a_completion_has_all_that_the_server_said(self):
        self.serve()
        answer = complete("Say this", logprobs=1, n=2, model="adapter")
        self.assertEqual((TEXT, "adapter"), (answer.text, answer.model))
        self.assertEqual([0, 1], [choice.index for choice in answer.choices])
        logs = friendli_lite.Logprobs(**logprobs([" This", " is", " a", " test", "!"]))
        self.assertEqual([0, 5, 8, 10, 15], logs.text_offset)
        choice = friendli_lite.CompletionChoice(1, TEXT, 43, "stop", [0, 1, 2, 3, 4], logs)
        self.assertEqual(choice, answer.choices[1])
        self.assertEqual(friendli_lite.Usage(2, 10, 12, {"cached_tokens": 0}), answer.usage)
        self.assertEqual("text_completion", answer.object)
        self.assertEqual("cmpl-26a1e10db8544bc3adb488d2d205288b", answer.id)
        request = {"prompt": "Say this", "logprobs": 1, "n": 2, "model": "adapter"}
        self.assertEqual(completion(request), answer.raw)

    def test_a_stream_has_all_that_the_server_said(self):
        self.serve()
        options = {"max_tokens": 1, "logprobs": 1, "stream_options": {"include_usage": True}}
        with stream("p", **options) as parts:
            first, last, usage = parts
        logs = friendli_lite.Logprobs(**logprobs([" This"]))
        self.assertEqual([friendli_lite.ChunkChoice(0, " This", 0, None, logs)], first.choices)
        self.assertEqual(("cmpl-1", "text_completion"), (first.id, first.object))
        self.assertEqual([friendli_lite.ChunkChoice(0, "", None, "length", None)], last.choices)
        self.assertEqual((" This", ""), (first.text, last.text))
        self.assertEqual(([], "", 2), (usage.choices, usage.text, usage.usage.total_tokens))
        self.assertEqual([(None, 1733382157)] * 2, [(c.usage, c.created) for c in (first, last)])
        self.assertEqual(1733382157, usage.raw["created"])

    def test_chunks_of_several_choices_come_interleaved(self):
        self.serve()
        texts = {0: "", 1: ""}
        for chunk in stream("p", n=2, max_tokens=2):
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            self.assertEqual(choice.text if choice.index == 0 else "", chunk.text)
        self.assertEqual({0: " This is", 1: " This is"}, texts)

    def test_other_fields_are_kept_and_missing_ones_are_none(self):
        answer = {
            "choices": [{"text": "t", "finish_reason": "abort", "stop_reason": 3}],
            "usage": {"total_tokens": 3, "more": 1}, "system_fingerprint": "b1", "raw": {"a": 1},
            "headers": {"a": "b"}, "error": None,
        }  # fmt: skip
        choice = friendli_lite.CompletionChoice(None, "t", None, "abort", [], None)
        usage = friendli_lite.Usage(None, None, 3, None)
        expected = friendli_lite.Completion(None, None, [choice], usage, None, answer, {})
        self.assertEqual(expected, parse(_completion, **answer))
        part = friendli_lite.ChunkChoice(None, "t", None, "abort", None)
        expected = friendli_lite.CompletionChunk(None, None, [part], None, usage, answer)
        self.assertEqual(expected, parse(_chunk, **answer))

    def test_null_is_as_good_as_missing(self):
        nothing = dict.fromkeys(["index", "seed", "finish_reason", "tokens", "logprobs", "token"])
        nulls = dict.fromkeys(["id", "object", "usage", "model", "created", "error"])
        for build in PARSERS.values():
            bare = parse(build, choices=[{"text": "a"}])
            full = parse(build, choices=[{"text": "a", **nothing}], **nulls)
            full.raw = bare.raw
            self.assertEqual(bare, full)
        empty = parse(_completion, choices=[{"text": "a", "logprobs": {"tokens": None}}])
        self.assertEqual(friendli_lite.Logprobs([], [], [], []), empty.choices[0].logprobs)

    def test_text_is_that_of_the_choice_with_index_0(self):
        first, *others = ([0, 1], "a"), ([1, 0], "b"), ([2, 1, 0], "c"), ([None, None], "a")
        for indexes, expected in [first, *others, ([1, 2], ""), ([1], ""), ([], "")]:
            for build in PARSERS.values():
                with self.subTest(indexes, build=build.__name__):
                    choices = [{"index": i, "text": text} for i, text in zip(indexes, "abc")]
                    self.assertEqual(expected, parse(build, choices=choices).text)

    def test_no_finish_reason_is_none_however_it_is_spelled(self):
        for spelled, expected in [(None, None), ("null", None), ("", None), ("eos", "eos")]:
            for build in PARSERS.values():
                with self.subTest(spelled, build=build.__name__):
                    answer = parse(build, choices=[{"text": "t", "finish_reason": spelled}])
                    self.assertEqual(expected, answer.choices[0].finish_reason)

    def test_a_chunk_may_lack_a_text_only_at_the_end_or_with_usage(self):
        usage = {"total_tokens": 3}
        for fields, choice, is_taken in [
            ({}, {"index": 0, "finish_reason": "stop"}, True),
            ({}, {"text": None, "finish_reason": "length"}, True),
            ({"usage": usage}, {"index": 0}, True),
            ({"usage": {}}, {"text": None, "finish_reason": None}, True),
            ({}, {"index": 0}, False), ({"usage": None}, {"index": 0}, False),
            ({}, {"index": 0, "finish_reason": "null"}, False),
            ({}, {"index": 0, "finish_reason": ""}, False), ({"usage": usage}, {"text": 7}, False),
        ]:  # fmt: skip
            with self.subTest(choice, **fields):
                texts, error = outcome_of_body(stream, sse({"choices": [choice], **fields}))
                self.assertEqual([""] if is_taken else [], texts)
                self.assertIs(type(None) if is_taken else APIResponseError, type(error))
                data = json.dumps({"choices": [choice], **fields}).encode()
                self.assertIs(APIResponseError, type(outcome_of_body(complete, data)[1]))

    def test_the_shape_of_chat_is_an_error_that_says_so(self):
        message = {"content": "hi", "role": "assistant"}
        for choice in [
            {"message": message},
            {"index": 0, "message": message, "finish_reason": "stop"},
            {"delta": {"content": "hi"}}, {"delta": {}, "finish_reason": "stop"},
            {"text": None, "delta": None},
        ]:  # fmt: skip
            answer = {"choices": [choice], "usage": {"total_tokens": 3}}
            for call in MEDIA_TYPES:
                with self.subTest(choice, call=call.__name__):
                    data = json.dumps(answer).encode()
                    texts, error = outcome_of_body(call, payload(call, data))
                    self.assertEqual(([], APIResponseError), (texts, type(error)))
                    self.assertIn("it has the shape of chat, another endpoint", str(error))
                    self.assertEqual(data.decode(), error.body)
        self.serve(json_answer({"choices": [{"message": message}]}))
        self.check_error(APIResponseError, self.failure(APIResponseError), "shape of chat")
        for call in MEDIA_TYPES:  # what also has a text is a completion
            data = json.dumps({"choices": [{"text": "a", "message": message}]}).encode()
            self.assertEqual((["a"], None), outcome_of_body(call, payload(call, data)))

    def test_the_headers_of_a_response_are_kept(self):
        headers = {"X_Request_Id": "Ab-1", "X_RateLimit_Remaining": "7"}
        server = self.serve(json_answer(completion({}), **headers))
        answer = complete("p")
        self.assertEqual("Ab-1", answer.headers["x-request-id"])
        self.assertEqual("7", answer.headers["x-ratelimit-remaining"])
        self.assertEqual("application/json", answer.headers["content-type"])
        self.assertNotIn("Ab-1", repr(answer))
        self.assertNotIn("raw", repr(answer))
        twin = pickle.loads(pickle.dumps(answer))
        self.assertEqual((answer, answer.headers), (twin, twin.headers))
        self.assertEqual(answer.raw, twin.raw)
        twin.headers = {}
        self.assertEqual(answer, twin)
        server.script(
            head(Content_Type=EVENTS, Transfer_Encoding="chunked", **headers)
            + chunked(sse(text_chunk("a")))
        )
        with stream("p") as chunks:
            self.assertEqual("Ab-1", chunks.headers["x-request-id"])
            (chunk,) = chunks
            self.assertEqual(chunk, pickle.loads(pickle.dumps(chunk)))
            self.assertNotIn("raw", repr(chunk))
        self.assertEqual("7", chunks.headers["x-ratelimit-remaining"])

    def test_the_headers_of_a_stream_are_those_of_its_last_attempt(self):
        first = head(Content_Type=EVENTS, Transfer_Encoding="chunked", X="1")
        second = head(Content_Type=EVENTS, Transfer_Encoding="chunked", X="2")
        self.serve(then_close(first), second + chunked(sse(text_chunk("a"))))
        with stream("p", retries=AT_ONCE) as chunks:
            self.assertEqual("1", chunks.headers["x"])
            self.assertEqual(["a"], [chunk.text for chunk in chunks])
            self.assertEqual("2", chunks.headers["x"])


# The two calls: the stream


def leave_block(chunks):
    with chunks:
        next(chunks)


def next_in_thread(chunks):
    """Have another thread wait for a chunk; return what to call for its outcome."""
    future = WORKERS.submit(next, chunks)
    while not chunks._chunks.gi_running:
        time.sleep(0.001)
    return lambda: future.exception(5) or future.result()


CLOSED = "another thread closed the stream"


class StreamTests(TestCase):
    def test_a_stream_is_a_generator_and_a_context_manager(self):
        self.serve()
        with stream("p") as chunks:
            self.assertIsInstance(chunks, collections.abc.Generator)
            self.assertIs(CompletionStream, type(chunks))
            self.assertIs(chunks, iter(chunks))
            self.assertEqual([" This", " is"], [next(chunks).text, chunks.send(None).text])
        self.assertRaises(StopIteration, next, chunks)
        self.assertRaises(StopIteration, chunks.send, None)
        self.assertEqual([], list(chunks))

    def test_an_error_thrown_in_closes_the_stream_and_comes_out(self):
        server = self.serve()
        for error in [KeyError("thrown"), APIConnectionError("thrown"), KeyboardInterrupt()]:
            for read in (id, next):
                with self.subTest(repr(error), read=read.__name__), stream("p") as chunks:
                    text = str(error)
                    read(chunks)
                    with self.assertRaises(type(error)) as caught:
                        chunks.throw(error)
                    self.assertIs(error, caught.exception)
                    self.assertEqual(text, str(error))
                    self.assertEqual([], list(chunks))
        with stream("p") as chunks, self.assertRaises(KeyError):
            chunks.throw(KeyError)
        self.assertEqual((7, 7), (len(server.requests), server.connections))

    def test_a_refused_request_raises_at_the_call(self):
        self.serve(json_answer({"error": "no"}, 422))
        self.assertRaises(APIStatusError, stream, "p")

    def test_chunks_arrive_while_the_server_still_sends(self):
        acknowledged = threading.Semaphore(0)

        def answer(sock):
            sock.sendall(head(Content_Type=EVENTS, Connection="close"))
            for text in "abc":
                sock.sendall(sse(text_chunk(text), done=False))
                if not acknowledged.acquire(timeout=5):
                    return CLOSE  # the client waits for more than an event
            sock.sendall(b"data: [DONE]\n\n")
            return CLOSE

        self.serve(answer)
        texts = []
        for chunk in stream("p"):
            texts.append(chunk.text)
            acknowledged.release()
        self.assertEqual(["a", "b", "c"], texts)

    @unittest.skipUnless(os.path.isdir("/dev/fd"), "there is no folder of open descriptors")
    def test_streams_left_in_every_way_leave_no_descriptor_open(self):
        ways = {
            "left before its start": id,
            "left in its middle": next,
            "closed before its start": CompletionStream.close,
            "closed in its middle": lambda chunks: (next(chunks), chunks.close()),
            "closed twice": lambda chunks: (next(chunks), chunks.close(), chunks.close()),
            "closed by its block": leave_block,
            "ended by an exception": lambda chunks: (next(chunks), chunks.throw(KeyError())),
            "ended by Ctrl-C": lambda chunks: (next(chunks), chunks.throw(KeyboardInterrupt())),
            "read to its end": list,
        }
        is_counted = sys.implementation.name == "cpython"  # else collection comes when it comes
        gc.disable()  # it would hide what is not let go at once
        self.addCleanup(gc.enable)
        before = open_descriptors()
        answer = event_stream(text_chunk("a"), text_chunk("a"))
        with self.serve(*[answer] * 25 * len(ways)) as server:
            for name, leave in ways.items():
                with self.case(name):
                    for _ in range(25):
                        chunks = stream("x")
                        with contextlib.suppress(KeyError, KeyboardInterrupt):
                            leave(chunks)
                        if not name.startswith("left"):
                            self.assertEqual([], list(chunks))
                        del chunks
            if not is_counted:
                gc.collect()
        friendli_lite._pool.close()
        self.assertEqual(before, open_descriptors())
        self.assertEqual(25 * len(ways), len(server.requests))

    def test_its_repr_shows_no_token(self):
        self.serve()
        with stream("p") as chunks:
            self.assertNotIn(TOKEN, repr(chunks) + repr(chunks._call) + repr(chunks._call.response))


class ClosedMeanwhileTests(TestCase):
    """Another thread closes a stream, in each phase of it."""

    def close_elsewhere(self, chunks):
        thread = threading.Thread(target=chunks.close)
        thread.start()
        thread.join(5)
        self.assertFalse(thread.is_alive())

    def check_closed(self, error, attempts):
        self.check_error(APIConnectionError, error, f": {CLOSED}")
        self.assertEqual(attempts, error.attempts)

    def prepared_stream(self, server):
        call, _ = prepared(server.url, stream=True)
        call.open()
        return call, CompletionStream(call)

    def test_before_anything_was_sent(self):
        with self.serve() as server:
            call, _ = prepared(server.url, stream=True)
            call.abort()
            with self.assertRaises(APIConnectionError) as caught:
                call.open()
            self.check_closed(caught.exception, attempts=0)
            self.assertEqual(0, server.connections)

    def test_before_its_connection_is_there(self):
        def close_first(route):
            calls[-1].abort()
            return acquire(route)

        calls, acquire = [], friendli_lite._pool.acquire
        for asked in (0, 1):  # a new connection, and an idle one
            with self.case(asked), self.serve() as server:
                self.ask(asked)
                calls.append(prepared(server.url, stream=True)[0])
                patch = mock.patch.object(friendli_lite._pool, "acquire", close_first)
                with patch, self.assertRaises(APIConnectionError) as caught:
                    calls[-1].open()
                self.check_closed(caught.exception, caught.exception.attempts)
                self.assertEqual(asked, len(server.requests))
                self.ask()

    def test_a_connection_that_another_call_uses_is_left_alone(self):
        with self.serve() as server:
            first = stream("p")
            list(first)
            with stream("p") as second:
                text = next(second).text
                self.close_elsewhere(first)
                first._call.abort()
                self.assertEqual(TEXT, text + "".join(chunk.text for chunk in second))
            self.assertEqual((2, 1), (len(server.requests), server.connections))

    def test_before_its_start_between_chunks_and_after_its_end(self):
        for read in (id, next, list):
            with self.case(read.__name__), self.serve() as server, stream("p") as chunks:
                read(chunks)
                self.close_elsewhere(chunks)
                self.assertEqual([], list(chunks))
                self.assertEqual(1, len(server.requests))

    def test_while_a_chunk_is_waited_for(self):
        """Over TLS by the socket below: SSLSocket.shutdown() would make it a plain one first."""
        for scheme, start in itertools.product(["http", "https"], [STREAM_HEAD, ONE_EVENT]):
            with self.each(scheme, hang(start)) as (server, options), self.within(2):
                chunks = stream("p", retries=3, timeout=5, **options)
                if start == ONE_EVENT:
                    next(chunks)
                result = next_in_thread(chunks)
                time.sleep(0.01)  # until it waits for the socket
                with mock.patch.object(ssl.SSLSocket, "shutdown") as shutdown:
                    chunks.close()
                    self.check_closed(result(), attempts=1)
                self.assertFalse(shutdown.called)
                self.assertEqual([], list(chunks))
                self.assertEqual(1, len(server.requests))

    def test_while_a_retry_is_delayed(self):
        with self.serve(then_close(STREAM_HEAD)) as server:
            call, chunks = self.prepared_stream(server)
            call.sleep = lambda seconds: self.close_elsewhere(chunks)
            with self.assertRaises(APIConnectionError) as caught:
                next(chunks)
            self.check_closed(caught.exception, attempts=1)
            self.assertEqual(1, len(server.requests))

    def test_while_the_head_of_a_retry_is_waited_for(self):
        closing = []
        for answer in (hang(STREAM_HEAD), json_answer({}, 503), fin):

            def close_first(sock, answer=answer):
                closing.pop().close()
                return answer(sock) if callable(answer) else sock.sendall(answer)

            with self.case(answer), self.serve(then_close(STREAM_HEAD), close_first) as server:
                _, chunks = self.prepared_stream(server)
                closing.append(chunks)
                with self.assertRaises(APIConnectionError) as caught:
                    next(chunks)
                self.check_closed(caught.exception, attempts=2)
                self.assertEqual(2, len(server.requests))

    def test_a_connection_that_was_released_is_left_alone(self):
        def close_and_look(seconds):
            (idle,) = friendli_lite._pool._idle
            self.close_elsewhere(chunks)
            self.assertTrue(idle.is_alive())

        with self.serve(then_close(STREAM_HEAD), json_answer({}, 503)) as server:
            call, chunks = self.prepared_stream(server)
            sleeps = iter([lambda seconds: None, close_and_look])
            call.sleep = lambda seconds: next(sleeps)(seconds)
            with self.assertRaises(APIConnectionError) as caught:
                next(chunks)
            self.check_closed(caught.exception, attempts=2)
            self.assertEqual(2, len(server.requests))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_a_forked_child_does_not_end_the_wait_of_its_parent(self):
        later = Later(STREAM_HEAD, chunked(sse(text_chunk("b"))))
        with self.serve(later):
            chunks = stream("p")
            result = next_in_thread(chunks)
            self.assertEqual(0, exit_status(chunks.close))
            later.now()
            self.assertEqual("b", result().text)
            self.assertEqual([], list(chunks))

    def test_while_another_call_uses_the_connection_that_it_had(self):
        def close_meanwhile(sock):
            chunks.close()
            sock.sendall(ANSWER)

        with self.serve(then_close(STREAM_HEAD), json_answer({}, 503), close_meanwhile) as server:
            call, _ = prepared(server.url, stream=True)
            chunks = CompletionStream(call.open())
            naps = iter([lambda: None, self.ask])
            call.sleep = lambda seconds: next(naps)()
            with self.assertRaisesRegex(APIConnectionError, "another thread closed the stream"):
                next(chunks)
            self.assertEqual((3, 2), (len(server.requests), server.connections))

    def test_while_a_retry_looks_up_the_name(self):
        def look_up(*args, **options):
            thread = threading.Thread(target=chunks.close)
            thread.start()
            thread.join()
            return found(*args, **options)

        found = socket.getaddrinfo
        with self.serve(then_close(STREAM_HEAD), hang()) as server:
            call, _ = prepared(server.url, stream=True)
            chunks = CompletionStream(call.open())
            closed = self.assertRaisesRegex(APIConnectionError, "another thread closed the stream")
            with mock.patch.object(socket, "getaddrinfo", look_up), self.within(1), closed:
                next(chunks)
            self.assertEqual(1, len(server.requests))


# Building the request


def body(request=None, is_stream=False, **fields):
    """The body of a request, decoded."""
    return json.loads(friendli_lite._build_body(request, fields, is_stream))


class BodyTests(TestCase):
    def test_a_request_is_a_prompt_a_mapping_or_a_completion_request(self):
        template = CompletionRequest(prompt="old", max_tokens=2, extra_body={"new_field": None})
        mapping = types.MappingProxyType({"prompt": "p", "n": 2})
        p = {"prompt": "p"}
        new = {"a": {"b": [None]}, "c": 1}
        for request, fields, expected in [
            ("p", {}, p), ("", {}, {"prompt": ""}),
            (None, {"prompt": ["p", "q"]}, {"prompt": ["p", "q"]}),
            (None, {"tokens": []}, {"tokens": []}), (p, {"n": 1}, {**p, "n": 1}),
            (mapping, {"n": 1, "seed": None}, {**p, "n": 1}),
            (mapping, {"n": None}, p),
            (mapping, {"stop": ("a", "b")}, {**p, "n": 2, "stop": ["a", "b"]}),
            (template, p, {**p, "max_tokens": 2, "new_field": None}),
            (template, {"extra_body": None}, {"prompt": "old", "max_tokens": 2}),
            (template, {**p, "extra_body": {}, "max_tokens": None}, p),
            (CompletionRequest(tokens=[1]), {"extra_body": new}, {"tokens": [1], **new}),
            ("p", {"temperature": 0, "seed": 0}, {**p, "temperature": 0, "seed": 0}),
        ]:  # fmt: skip
            with self.subTest(request=request, fields=fields):
                self.assertEqual(expected, body(request, **fields))
                self.assertEqual({**expected, "stream": True}, body(request, True, **fields))
        self.assertEqual("old", template.prompt)

    def test_stream_may_be_said_but_not_contradicted(self):
        for is_stream, other in [(False, "stream"), (True, "complete")]:
            self.assertEqual(is_stream, body("p", is_stream, stream=is_stream)["stream"])
            fields = {"prompt": "p", "stream": not is_stream}
            for request in (fields, CompletionRequest(**fields)):
                with self.assertRaises(ValueError) as caught:
                    body(request, is_stream)
                self.assertEqual(f"stream={not is_stream} is for {other}()", str(caught.exception))

    def test_the_body_is_compact_ascii(self):
        built = friendli_lite._build_body("é\ud800", {"extra_body": {"ü": 1.5}, "n": 1}, True)
        self.assertEqual(rb'{"prompt":"\u00e9\ud800","n":1,"stream":true,"\u00fc":1.5}', built)

    def test_any_text_can_be_a_prompt(self):
        server = self.serve()
        for name, prompt in [
            ("empty", ""), ("lone surrogates", "a\ud800b\udcff"),
            ("other characters", "\0\x7f\u2028\u00e9\U0001f600"),
            ("2 MB", "0123456789" * 200_000),
        ]:  # fmt: skip
            with self.subTest(name):
                self.assertEqual(TEXT, complete(prompt).text)
                self.assertTrue(server.requests.pop().json["prompt"] == prompt)  # no diff of 2 MB

    def check_mistake(self, kind, message, request, **fields):
        """Check the message of a mistake, or how it begins."""
        with self.subTest(message), self.assertRaises(kind) as caught:
            body(request, **fields)
        end = len(message) if message.endswith(" ") else None
        self.assertEqual(message, str(caught.exception)[:end])

    def test_an_unknown_field_is_named_with_a_hint(self):
        for name, hint in {
            "max_token": "did you mean 'max_tokens'?", "top_kk": "did you mean 'top_k'?",
            "time_out": "did you mean 'timeout='?", "foo": "extra_body takes new ones",
            "best_of": "extra_body takes new ones", "api_key": "use token=",
            "base_url": "use server_url=", "extra_headers": "use headers=",
            "http_headers": "use headers=", "max_completion_tokens": "use max_tokens=",
            "timeout_ms": "use timeout=, in seconds", "messages": "chat is left out; pass a prompt",
        }.items():  # fmt: skip
            message = f"unknown field {name!r}; {hint}"
            self.check_mistake(TypeError, message, "p", **{name: None})
            self.check_mistake(TypeError, message, {name: 1})
        message = "unknown field 3; extra_body takes new ones"
        self.check_mistake(TypeError, message, {"prompt": "p", 3: 1})

    def test_mistakes_in_the_body_are_named(self):
        needed = "exactly one of prompt and tokens is needed;"
        prompts = "request (a list of prompts is prompt=[...]) must be"
        twice = "the prompt was given twice, as request and as prompt="
        texts = "must be a list of strings:"
        own = "which is a field of its own"
        for kind, message, request, fields in [
            (TypeError, f"{prompts} str or Mapping or CompletionRequest, not list", ["p"], {}),
            (TypeError, twice, "p", {"prompt": "q"}),
            (TypeError, f'stop {texts} stop=["END"]', "p", {"stop": "END"}),
            (TypeError, f'bad_words {texts} bad_words=[""]', {"tokens": [], "bad_words": ""}, {}),
            (TypeError, "extra_body must be Mapping, not str", "p", {"extra_body": "z"}),
            (ValueError, f"extra_body holds 'n', {own}", "p", {"extra_body": {"n": 1}}),
            (ValueError, f"extra_body holds 'seed', {own}", "p", {"extra_body": {"seed": None}}),
            (ValueError, f"{needed} neither was given", None, {}),
            (ValueError, f"{needed} neither was given", {"n": 1, "prompt": None}, {}),
            (ValueError, f"{needed} both were given", "p", {"tokens": []}),
        ]:
            self.check_mistake(kind, message, request, **fields)

    def test_what_json_has_not_is_not_sent(self):
        deep, circle = [], {}
        circle["circle"] = circle
        for _ in range(100_000):
            deep = [deep]
        infinity = float("inf")
        for value in [b"p", float("nan"), infinity, [1, -infinity], {1}, deep, circle, {(): 1}]:
            for name in ("prompt", "temperature", "seed", "response_format"):
                message = f"{name!r} cannot be sent as JSON: "
                self.check_mistake(ValueError, message, {"prompt": "p", name: value})
            message = "'z' cannot be sent as JSON: "
            self.check_mistake(ValueError, message, "p", extra_body={"z": value})
        self.check_mistake(ValueError, "() cannot be sent as JSON: ", "p", extra_body={(): 1})

    def test_what_the_caller_passes_is_never_changed(self):
        self.serve()
        arguments = {
            "request": {"prompt": "p", "extra_body": {"z": {"y": 1}}, "n": None},
            "headers": {"x-a": "b"}, "stop": ["a"], "stream_options": {"include_usage": True},
        }  # fmt: skip
        before = copy.deepcopy(arguments)
        complete(**arguments)
        list(stream(**arguments))
        self.assertEqual(before, arguments)
        request = CompletionRequest("p", extra_body={"z": 1})
        before = copy.deepcopy(request)
        list(stream(request, n=1))
        self.assertEqual(before, request)
        self.assertEqual(request, pickle.loads(pickle.dumps(request)))


class URLTests(TestCase):
    def test_a_server_url_takes_prefixes_slashes_and_v1(self):
        api = "https://api.friendli.ai/serverless"
        for url, expected in {
            "http://h": "http://h", "http://h:80/": "http://h:80", "HTTP://h:/": "http://h",
            "HTTPS://h/v1": "https://h", "https://h/V1/Completions": "https://h",
            "http://h/v1/completions///": "http://h", "http://h//v1//completions": "http://h",
            "http://h/a/b/v1/": "http://h/a/b", "http://h/v1/v1": "http://h/v1",
            "http://h/v1x": "http://h/v1x", "http://h/completions": "http://h/completions",
            "http://h/%41;b=c,d": "http://h/%41;b=c,d", "http://[::1]:8000": "http://[::1]:8000",
            "http://[2001:DB8::1.2.3.4]": "http://[2001:DB8::1.2.3.4]",
            "http://127.0.0.1:1": "http://127.0.0.1:1",
            "http://a_b.c-d.example.:65535": "http://a_b.c-d.example.:65535",
            f"http://{'a' * 63}.b": f"http://{'a' * 63}.b", api: api,
        }.items():  # fmt: skip
            with self.subTest(url):
                self.assertEqual(f"{expected}/v1/completions", friendli_lite._completions_url(url))

    def test_each_mistake_in_a_server_url_has_its_own_words(self):
        for mistake, urls in {
            "it holds a character that is not ASCII": "http://h/é http://한국",
            "it must begin with http:// or https://": "localhost:8000 ftp://h //h http:/h",
            "it holds a backslash": "http://h\\a https://\\",
            "it has a query": "http://h/?a=b http://h? http://?#",
            "it has a fragment": "http://h/v1/completions#stream http://h#",
            "it has no host": "http:// http:///v1 https://:80 http:////",
            "it has % in its host": "http://h%41 http://[fe80::1%25lo]/v1",
            "it has an invalid host": "http://[::1 http://[g::1] http://[] http://[::1]a http://a,b"
            f" http://a..b http://.a http://a..b:0 http://{'a' * 64}",
            "it has an invalid port": "http://h:0 http://h:08 http://h:x http://h:-1 http://h:80:80"
            " http://h:65536 http://h:65540 http://h:65600 http://h:66000 http://h:70000"
            " http://h:100000 http://h:+80 http://[::1]:x",
        }.items():
            for url in urls.split():
                self.check_mistake(url, mistake)
        self.check_mistake("", "it is empty")
        for url in ("http://h /", "http://h\n", " http://h", "\0"):
            self.check_mistake(url, "it holds a blank or a control character")

    def check_mistake(self, url, mistake):
        with self.subTest(url), self.assertRaises(ValueError) as caught:
            friendli_lite._completions_url(url)
        self.assertEqual(f"server_url cannot be {url!r}: {mistake}", str(caught.exception))

    def test_a_password_in_a_server_url_is_refused_unseen(self):
        for url in ("http://user:hunter2@h", "hunter2@h", "http://h/hunter2@?#"):
            with self.subTest(url), self.assertRaises(ValueError) as caught:
                friendli_lite._completions_url(url)
            expected = "server_url must not hold user:password@; use token or headers"
            self.assertEqual(expected, str(caught.exception))

    def test_the_default_server_is_that_of_the_environment_or_localhost(self):
        for variable, expected in [
            ("http://h/a", "http://h/a/v1/completions"),
            ("", "http://localhost:8000/v1/completions"),
            (None, "http://localhost:8000/v1/completions"),
        ]:
            environment = {} if variable is None else {"FRIENDLI_SERVER_URL": variable}
            with self.subTest(variable), mock.patch.dict(os.environ, environment, clear=True):
                self.assertEqual(expected, friendli_lite._completions_url(None))
                url = friendli_lite._completions_url("http://g")
                self.assertEqual("http://g/v1/completions", url)
        os.environ["FRIENDLI_SERVER_URL"] = "localhost"
        self.assertRaisesRegex(ValueError, "must begin", friendli_lite._completions_url, None)

    def test_long_urls_are_judged_at_once(self):
        with self.within(1):
            for start in ("http://h", "http://h/v1", "x"):
                for part in ("/", "/a", "/v1", "/v1/completions", "a.", ":1", "%"):
                    with contextlib.suppress(ValueError):
                        friendli_lite._completions_url(start + part * 3000 + " ")


def build_headers(token=None, headers=None):
    return friendli_lite._build_headers(False, token, headers)


class HeaderTests(TestCase):
    def test_the_three_products_differ_in_url_token_model_and_team(self):
        team = {"X-Friendli-Team": "my-team"}
        for path, arguments in [
            ("", {"token": ""}),
            ("/serverless", {"model": "meta-llama-3.1-8b-instruct", "headers": team}),
            ("/dedicated", {"model": "ENDPOINT_ID:ADAPTER", "headers": team}),
        ]:
            for call, media_type in MEDIA_TYPES.items():
                with self.subTest(path, call=call.__name__):
                    server = self.serve()
                    getattr(call("p", server_url=server.url + path, **arguments), "close", str)()
                    (request,) = server.requests
                    line = f"{request.method} {request.path}"
                    self.assertEqual(f"POST {path}/v1/completions", line)
                    expected = {
                        "accept": media_type, "accept-encoding": "identity",
                        "content-type": "application/json",
                        "content-length": str(len(request.body)),
                        "host": f"127.0.0.1:{server.port}",
                        "user-agent": f"friendli_lite/{friendli_lite.__version__}",
                    }  # fmt: skip
                    if path:
                        expected["authorization"] = f"Bearer {TOKEN}"
                        expected["x-friendli-team"] = "my-team"
                    self.assertEqual(expected, request.headers)
                    self.assertEqual(arguments.get("model"), request.json.get("model"))

    def test_a_token_is_that_of_the_argument_or_of_the_environment(self):
        for variable, argument, expected in [
            (TOKEN, None, TOKEN), (f" {TOKEN}\r\n", None, TOKEN), (TOKEN, "other", "other"),
            (TOKEN, "\tother\n", "other"), (TOKEN, "", None), (TOKEN, " \n", None),
            ("", None, None), (None, None, None), (None, "other", "other"),
            ("\n", "a b~!", "a b~!"),
        ]:  # fmt: skip
            with self.subTest(variable=variable, argument=argument):
                environment = {} if variable is None else {"FRIENDLI_TOKEN": variable}
                with mock.patch.dict(os.environ, environment, clear=True):
                    found = build_headers(token=argument).get("Authorization")
                self.assertEqual(expected and f"Bearer {expected}", found)

    def test_extra_headers_override_those_of_the_client(self):
        server = self.serve()
        ours = {
            "AUTHORIZATION": "Basic x", "accept": "a/b", "user-Agent": "me", "host": "", "X": "",
        }  # fmt: skip
        complete("p", headers=ours)
        (request,) = server.requests
        ours = {name.lower(): value for name, value in ours.items()}
        self.assertEqual({**request.headers, **ours}, request.headers)

    def test_a_header_may_hold_what_http_allows(self):
        for name, value in {"X": "\t !~\x80\xff", "!#$%&'*+-.^_`|~09az": ""}.items():
            with self.subTest(name):
                self.assertEqual(value, build_headers(headers={name: value})[name.capitalize()])

    def test_mistakes_in_headers_are_named(self):
        cannot = "has a character that headers must not have"
        framing = ("Content-Length", "transfer-encoding")
        names = ("a b", "", "a:", "é", "a\n", "(a)", "a\r\nb", "\tx")
        values = ("b\r\nc: d", "b\n", "\0", "\x7f", "\u0100", "\r", "\ud800")
        for kind, message, headers in [
            (TypeError, "headers must be Mapping, not list", [("a", "b")]),
            (TypeError, "the name of a header must be str, not int", {3: "a"}),
            (TypeError, "the name of a header must be str, not bytes", {b"a": "a"}),
            (TypeError, "header 'a' must be str, not int", {"a": 3}),
            (TypeError, "header 'a' must be str, not NoneType", {"a": None}),
            *((ValueError, f"header {name!r} {cannot}", {name: "c"}) for name in names),
            *((ValueError, f"header 'a' {cannot}", {"a": value}) for value in values),
            *((ValueError, f"header {n!r} is set by the client", {n: "3"}) for n in framing),
        ]:
            with self.subTest(message, headers=headers), self.assertRaises(kind) as caught:
                build_headers(headers=headers)
            self.assertEqual(message, str(caught.exception))


class MistakeTests(TestCase):
    """Each call has its arguments checked before it sends anything."""

    MISTAKES = [
        (TypeError, "unknown field", {"max_token": 1}),
        (ValueError, "exactly one", {"tokens": [1]}),
        (TypeError, "list of strings", {"stop": "END"}),
        (ValueError, "cannot be sent", {"top_p": float("nan")}),
        (TypeError, "server_url must be str, not int", {"server_url": 3}),
        (ValueError, "user:password", {"server_url": f"http://user:{TOKEN}@h"}),
        (ValueError, "invalid port", {"server_url": "http://h:x"}),
        (TypeError, "token must be str, not bytes", {"token": TOKEN.encode()}),
        (ValueError, "token has a character", {"token": f"{TOKEN}\nx"}),
        (ValueError, "token has a character", {"token": f"é{TOKEN}"}),
        (TypeError, "header 'x-api-key' must be str", {"headers": {"x-api-key": TOKEN.encode()}}),
        (ValueError, "header 'x-api-key' has", {"headers": {"x-api-key": f"{TOKEN}\n"}}),
        (ValueError, "is set by the client", {"headers": {"a": TOKEN, "content-length": "3"}}),
        (TypeError, "retries must be RetryConfig or int or NoneType, not str", {"retries": "3"}),
        (TypeError, "retries must be RetryConfig or int or NoneType, not bool", {"retries": True}),
        (ValueError, "max_retries must be finite and not negative, not -1", {"retries": -1}),
        (TypeError, "timeout must be int or float, not str", {"timeout": "3"}),
        (TypeError, "timeout must be int or float, not bool", {"timeout": True}),
        (TypeError, "total_timeout must be int or float, not str", {"total_timeout": "3"}),
        (ValueError, "timeout above 0", {"timeout": 0}),
        (ValueError, "timeout above 0", {"timeout": -1.5}),
        (ValueError, "timeout above 0", {"timeout": float("nan")}),
        (ValueError, "total_timeout must be seconds", {"total_timeout": float("nan")}),
        (TypeError, "ssl_context must be SSLContext or NoneType, not str", {"ssl_context": ""}),
    ]

    def test_mistakes_are_named_unsent_and_show_no_credential(self):
        server = self.serve()
        credentials = {"token": TOKEN, "headers": {"X-Api-Key": TOKEN, "Cookie": TOKEN}}
        for (kind, message, fields), call in itertools.product(self.MISTAKES, MEDIA_TYPES):
            with self.subTest(message, call=call.__name__):
                error = raised(call, **{**credentials, **fields})
                self.assertIs(kind, type(error))
                self.assertIn(message, str(error))
                self.assertNotIn(TOKEN, str(error))
                names = [f.f_code.co_name for f, _ in traceback.walk_tb(error.__traceback__)]
                self.assertEqual(["raised", call.__name__, "_prepare"], names)
                if "user:password" not in message:  # it stands in the argument server_url
                    self.assertNotIn(TOKEN, shown(error))
                self.assertIsNone(error.__context__)
        for token in (f"{TOKEN}\n.", f"{TOKEN}\r\nX: y", f"\x01{TOKEN}", f"{TOKEN}\x7f"):
            os.environ["FRIENDLI_TOKEN"] = token
            self.check_error(ValueError, raised(complete), "token has a character")
        self.assertEqual(0, server.connections)

    def test_the_two_calls_have_the_same_parameters(self):
        names = ["request", "server_url", "token", "retries", "total_timeout", "headers"]
        expected = {**dict.fromkeys([*names, "ssl_context"]), "timeout": 600.0}
        for call in MEDIA_TYPES:
            parameters = inspect.signature(call).parameters.values()
            defaults = {p.name: p.default for p in parameters if p.kind != p.VAR_KEYWORD}
            self.assertEqual(expected, defaults)


# Sending with retries


class TimeoutsTests(TestCase):
    def setUp(self):
        super().setUp()
        self.clock = mock.Mock(return_value=100.0)

    def timeouts(self, timeout, total_timeout):
        self.clock.return_value = 100.0
        return friendli_lite._Timeouts(timeout, total_timeout, self.clock)

    def test_a_socket_may_wait_for_the_shorter_of_both_limits(self):
        timeouts = self.timeouts(0.25, 1.0)
        for now, elapsed, remaining, seconds in [
            (100.0, 0.0, 1.0, 0.25), (100.75, 0.75, 0.25, 0.25), (100.875, 0.875, 0.125, 0.125),
        ]:  # fmt: skip
            with self.subTest(now):
                self.clock.return_value = now
                found = timeouts.elapsed(), timeouts.remaining(), timeouts.for_socket()
                self.assertEqual((elapsed, remaining, seconds), found)
        for now in (101.0, 102.0):
            self.clock.return_value = now
            with self.assertRaises(socket.timeout) as caught:
                timeouts.for_socket()
            self.assertEqual("timed out", str(caught.exception))

    def test_a_message_names_the_limit_that_was_spent(self):
        timeouts = self.timeouts(0.25, 1.0)
        self.assertEqual(": no data received for timeout=0.25 s", timeouts.message())
        self.assertEqual(": no data accepted for timeout=0.25 s", timeouts.message("accepted"))
        self.clock.return_value = 101.0
        self.assertEqual(": total_timeout=1 s was spent", timeouts.message())
        self.assertEqual(": total_timeout=1 s was spent", timeouts.message("accepted"))

    def test_connecting_has_the_least_of_three_limits(self):
        for timeout, total_timeout, later, seconds, message in [
            (600.0, 60.0, 0.0, 10.0, " within 10 s (the limit for connecting)"),
            (5.0, 60.0, 0.0, 5.0, " within 5 s (timeout)"),
            (5.0, 3.0, 0.0, 3.0, " within 3 s (total_timeout)"),
            (5.0, 3.0, 2.5, 0.5, " within 0.5 s (total_timeout)"),
            (5.0, 3.0, 4.0, 0.0, " within 0 s (total_timeout)"),
        ]:
            with self.subTest(message):
                call = self.timeouts(timeout, total_timeout)
                self.clock.return_value += later
                timeouts = friendli_lite._ConnectTimeouts(call)
                self.assertEqual((seconds, message), (timeouts.remaining(), timeouts.message()))
                self.clock.return_value += 0.25
                self.assertEqual(seconds - 0.25, timeouts.remaining())

    def test_none_is_no_limit_and_large_numbers_are_as_good(self):
        for timeout, total_timeout, expected in [
            (None, None, (1e6, 1e6)), (float("inf"), float("inf"), (1e6, 1e6)),
            (10**400, 10**400, (1e6, 1e6)), (1e300, 5, (1e6, 5)), (0.5, None, (0.5, 1e6)),
            (3, -1.5, (3, -1.5)),
        ]:  # fmt: skip
            with self.subTest(timeout=timeout):
                timeouts = friendli_lite._build_timeouts(timeout, total_timeout)
                self.assertEqual(expected, (timeouts.timeout, timeouts.total_timeout))
                self.assertIs(time.monotonic, timeouts.clock)

    def test_the_budget_is_looked_at_after_parsing(self):
        decode = friendli_lite._decode_json

        def decode_slowly(text):
            self.clock.return_value += 3.0
            return decode(text)

        with mock.patch.object(friendli_lite, "_decode_json", decode_slowly):
            for total_timeout, expected in [(3.0, APITimeoutError), (3.5, str)]:
                with self.case(total_timeout):
                    server = self.serve()
                    call, waits = prepared(server.url, 3, total_timeout, clock=self.clock)
                    result = outcome_of(call)
                    self.assertIs(expected, type(result))
                    self.assertEqual((1, []), (len(server.requests), waits))
                    if expected is APITimeoutError:
                        words = "the response came too late: total_timeout=3 s was spent"
                        self.check_error(APITimeoutError, result, words)

    def test_a_socket_that_wakes_up_early_blames_the_limit_that_it_had(self):
        now = [0.0]
        timeouts = friendli_lite._Timeouts(5.0, 0.1, lambda: now[0])
        timeouts.for_socket()
        now[0] = 0.0995
        self.assertEqual(": total_timeout=0.1 s was spent", timeouts.message())
        timeouts = friendli_lite._Timeouts(1800.0, 1e6, lambda: now[0])
        timeouts.for_socket()
        self.assertEqual(": no data received for timeout=1800 s", timeouts.message())

    def test_numbers_too_large_for_a_float_are_limits_as_well(self):
        for total_timeout in (-(10**400), -1.5, 0):
            with self.subTest(total_timeout):
                error = self.failure(APITimeoutError, total_timeout=total_timeout)
                self.assertEqual(0, error.attempts)


class SendingTests(TestCase):
    def waits(self, *answers, **options):
        """Make a call that gets these answers; return its delays, and its text or error."""
        with self.serve(*answers) as server:
            call, waits = prepared(server.url, **options)
            result = outcome_of(call)
            self.assertEqual(call.attempts, len(server.requests))
            friendli_lite._pool.close()
            return waits, result

    def test_delays_grow_to_max_delay_with_full_jitter(self):
        for draw, expected in [
            (1.0, [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]), (0.5, [0.25, 0.5, 1.0, 2.0, 4.0, 4.0]),
            (0.0, [0.0] * 6),
        ]:  # fmt: skip
            with self.subTest(draw):
                waits, error = self.waits(*[json_answer({}, 503)] * 7, retries=6, draw=draw)
                self.assertEqual(expected, waits)
                self.assertEqual((503, 7), (error.status_code, error.attempts))
                self.assertRegex(str(error), r" \(after 7 attempts\)\Z")

    def test_retries_are_three_by_default_or_as_many_as_asked_for(self):
        for retries, attempts in [(None, 4), (0, 1), (1, 2), (RetryConfig(max_retries=5), 6)]:
            with self.subTest(retries):
                waits, error = self.waits(*[json_answer({}, 503)] * 9, retries=retries)
                self.assertEqual((attempts - 1, attempts), (len(waits), error.attempts))
                self.assertEqual(attempts > 1, "attempts" in str(error))

    def test_sleep_and_chance_are_real_unless_injected(self):
        call = friendli_lite._Call
        self.assertEqual((time.sleep, random.uniform), (call.sleep, call.uniform))

    def test_a_server_that_recovers_is_no_error(self):
        waits, text = self.waits(fin, rst, json_answer({}, 503))
        self.assertEqual(([0.5, 1.0, 2.0], TEXT), (waits, text))

    def test_what_a_server_asks_for_is_waited_out_and_the_jitter_added(self):
        seconds = ("60", "nonsense", "61")
        asks = [json_answer({"error": "slow down"}, 429, Retry_After=s) for s in seconds]
        waits, error = self.waits(*asks)
        self.assertEqual([60.5, 1.0], waits)
        self.assertIn(": slow down (Retry-After: 61)", str(error))
        self.assertEqual((429, 3), (error.status_code, error.attempts))
        date = email.utils.formatdate(time.time() + 30, usegmt=True)
        ((wait,), _) = self.waits(json_answer({}, 503, Retry_After=date), draw=0.5)
        self.assertTrue(28.25 < wait <= 30.25, wait)

    def test_threads_that_were_refused_together_do_not_come_back_together(self):
        waits = [
            self.waits(json_answer({}, 503, Retry_After=1), draw=draw / 8)[0] for draw in range(8)
        ]
        self.assertEqual([[1 + draw / 16] for draw in range(8)], waits)

    def test_a_delay_that_does_not_fit_is_not_begun(self):
        for total_timeout, expected in [(3.25, [3.0]), (3.0, []), (2.9, [])]:
            with self.subTest(total_timeout):
                options = {"retries": 1, "total_timeout": total_timeout, "clock": lambda: 0.0}
                answers = [json_answer({}, 503, Retry_After=3)] * 2
                waits, error = self.waits(*answers, draw=0.0, **options)
                self.assertEqual(expected, waits)
                self.assertEqual((503, len(expected) + 1), (error.status_code, error.attempts))

    def test_the_delays_count_towards_the_budget(self):
        clock = mock.Mock(return_value=0.0)
        with self.serve(*[json_answer({}, 503)] * 9) as server:
            call, waits = prepared(server.url, 9, 4.0, clock=clock)
            call.sleep = lambda seconds: (
                waits.append(seconds),
                setattr(clock, "return_value", clock.return_value + seconds),
            )
            self.assertEqual(503, outcome_of(call).status_code)
        self.assertEqual([0.5, 1.0, 2.0], waits)

    def test_broken_connections_are_tried_again_where_wanted(self):
        cut = then_close(JSON_HEAD + b"{")
        waits, result = self.waits(cut, cut)
        self.assertEqual(([0.5, 1.0], TEXT), (waits, result))
        waits, error = self.waits(cut, retries=RetryConfig(retry_connection_errors=False))
        self.assertEqual(([], APIConnectionError, 1), (waits, type(error), error.attempts))

    def test_a_timeout_is_tried_again_only_where_nothing_was_sent(self):
        with contextlib.ExitStack() as stack:
            full, silent = listener(stack, backlog=0), listener(stack)
            asked, late = {"retry_timeouts": True}, "no response: no data received for timeout="
            cases = [
                ("connecting", full, {}, 2, "cannot connect within 0.02 s (timeout)"),
                ("connecting", full, {"retry_connection_errors": False}, 1, "cannot connect"),
                ("the handshake", silent.replace("http", "https"), {}, 2, "cannot connect within"),
                ("waiting", silent, {}, 1, late), ("waiting", silent, asked, 2, late),
                ("cut short", self.serve(hang(JSON_HEAD)).url, {}, 1, "the response was cut short"),
            ]  # fmt: skip

            def check(url, config):
                retries = RetryConfig(1, initial_delay=0, **config)
                options = {"retries": retries, "timeout": 0.02, "ssl_context": NO_CAS}
                return outcome(complete, server_url=url, **options)[1]

            with ThreadPoolExecutor(len(cases)) as executor:
                errors = list(executor.map(check, *zip(*[case[1:3] for case in cases])))
            for (name, _, config, attempts, message), error in zip(cases, errors):
                with self.subTest(name, **config):
                    self.check_error(APITimeoutError, error, message)
                    self.assertEqual(attempts, error.attempts)

    def test_a_stream_is_tried_again_until_its_first_event(self):
        server = self.serve(
            json_answer({}, 503), then_close(event_stream(done=False)),
            then_close(head(Content_Type=EVENTS, Connection="close") + b": ping\n\ndata: {"),
        )  # fmt: skip
        with stream("p", retries=AT_ONCE) as chunks:
            self.assertEqual(2, len(server.requests))
            self.assertEqual(TEXT, "".join(chunk.text for chunk in chunks))
        self.assertEqual(4, len(server.requests))

    def test_a_stream_is_never_tried_again_after_its_first_event(self):
        server = self.serve(then_close(event_stream(text_chunk("a"), done=False)))
        texts, error = outcome(stream, retries=AT_ONCE)
        self.assertEqual((["a"], 1, 1), (texts, error.attempts, len(server.requests)))
        self.check_error(APIConnectionError, error, server.url)

    def test_whether_a_request_was_sent_is_that_of_the_last_attempt(self):
        with contextlib.ExitStack() as stack:
            full = listener(stack, backlog=0)
            stack.enter_context(mock.patch.object(friendli_lite, "_MAX_CONNECT_SECONDS", 0.01))
            call, _ = prepared(self.serve(fin).url, retries=2)
            call.sleep = lambda seconds: setattr(call, "url", full)
            error = outcome_of(call)
            self.assertEqual((APITimeoutError, 3), (type(error), error.attempts))


# Retry decisions


class RetryConfigTests(TestCase):
    def test_its_defaults_are_those_that_the_documentation_names(self):
        expected = {
            "max_retries": 3, "initial_delay": 0.5, "max_delay": 8.0, "multiplier": 2.0,
            "max_retry_after": 60.0,
            "status_codes": (408, 429, 500, 502, 503, 520, 521, 522, 523, 529),
            "retry_connection_errors": True, "retry_timeouts": False,
        }  # fmt: skip
        self.assertEqual(expected, vars(RetryConfig()))
        self.assertEqual(RetryConfig(), pickle.loads(pickle.dumps(RetryConfig())))
        with self.assertRaises(dataclasses.FrozenInstanceError):
            RetryConfig().max_retries = 1

    def test_it_takes_any_finite_number_of_seconds_and_any_statuses(self):
        for fields in [
            dict.fromkeys(("initial_delay", "max_delay", "multiplier", "max_retry_after"), 0),
            dict.fromkeys(("initial_delay", "max_delay", "multiplier"), sys.float_info.max),
            {"max_retries": 10**9, "max_retry_after": 1e18},
            *({"status_codes": kind([429])} for kind in (list, tuple, set, frozenset)),
            {"status_codes": range(500, 600)}, {"status_codes": ()},
        ]:  # fmt: skip
            with self.subTest(fields):
                config = RetryConfig(**fields)
                self.assertEqual(fields, {name: getattr(config, name) for name in fields})

    def test_it_refuses_what_is_no_number_of_seconds(self):
        numbers = ("max_retries", "initial_delay", "max_delay", "multiplier", "max_retry_after")
        for name in numbers:
            kind = "int" if name == "max_retries" else "int or float"
            for value in ("1", None, True, 1j):
                message = f"{name} must be {kind}, not {type(value).__name__}"
                self.refuse(TypeError, message, **{name: value})
            for value in (
                -1, 10**400,
                *([float("inf"), float("nan"), -0.5] if kind != "int" else ()),
            ):  # fmt: skip
                message = f"{name} must be finite and not negative, not {value}"
                self.refuse(ValueError, message, **{name: value})
        self.refuse(TypeError, "max_retries must be int, not float", max_retries=2.5)

    def test_it_refuses_what_are_no_statuses(self):
        kinds = "tuple or list or set or frozenset or range"
        self.refuse(TypeError, f"status_codes must be {kinds}, not str", status_codes="429")
        self.refuse(TypeError, f"status_codes must be {kinds}, not int", status_codes=429)
        for codes in (["429"], (429, None), {True}):
            found = type([*codes][-1]).__name__
            self.refuse(
                TypeError, f"each of status_codes must be int, not {found}", status_codes=codes
            )

    def refuse(self, kind, message, **fields):
        with self.subTest(message), self.assertRaises(kind) as caught:
            RetryConfig(**fields)
        self.assertEqual(message, str(caught.exception))


class RetryDecisionTests(TestCase):
    def delay(self, error, retry=0, was_sent=True, **config):
        return friendli_lite._retry_delay(
            error, retry, was_sent, RetryConfig(**config), lambda low, high: low + high
        )

    def test_the_default_statuses_are_tried_again_and_no_others(self):
        retried = {
            status for status in range(600) if self.delay(APIStatusError("", status)) is not None
        }
        self.assertEqual({408, 429, 500, 502, 503, 520, 521, 522, 523, 529}, retried)

    def test_a_timeout_of_a_gateway_is_a_timeout(self):
        for status in (504, 524):
            for config, expected in [
                ({}, None), ({"retry_timeouts": True}, 0.5), ({"status_codes": [status]}, 0.5),
                ({"status_codes": [], "retry_timeouts": True}, 0.5),
            ]:  # fmt: skip
                with self.subTest(status, **config):
                    self.assertEqual(expected, self.delay(APIStatusError("", status), **config))
        for status in (501, 505, 525):
            self.assertIsNone(self.delay(APIStatusError("", status), retry_timeouts=True))

    def test_what_is_tried_again_is_as_configured(self):
        unwanted = {"retry_connection_errors": False}
        for error, was_sent, config, expected in [
            (APIConnectionError(""), True, {}, 0.5), (APIConnectionError(""), False, {}, 0.5),
            (APIConnectionError(""), True, unwanted, None),
            (APIConnectionError(""), True, {**unwanted, "retry_timeouts": True}, None),
            (APITimeoutError(""), False, {}, 0.5), (APITimeoutError(""), False, unwanted, None),
            (APITimeoutError(""), True, {}, None),
            (APITimeoutError(""), True, {"retry_timeouts": True}, 0.5),
            (APITimeoutError(""), True, {**unwanted, "retry_timeouts": True}, 0.5),
            (APIResponseError(""), True, {"retry_timeouts": True}, None),
            (APIStatusError("", 429), True, {**unwanted, "status_codes": range(400, 500)}, 0.5),
            (APIStatusError("", 429), True, {"max_retries": 0}, None),
        ]:  # fmt: skip
            with self.subTest(repr(error), was_sent=was_sent, **config):
                self.assertEqual(expected, self.delay(error, was_sent=was_sent, **config))

    def test_trouble_that_no_retry_can_mend_is_not_tried_again(self):
        for cause, is_tried_again in [
            (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
            (OSError(errno.EMFILE, "too many"), False),
            (FileNotFoundError(errno.ENOENT, "no file"), False),
            (ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] no"), False),
            (ssl.SSLError(1, "[SSL: TLSV1_ALERT_INTERNAL_ERROR] no"), True),
        ]:
            with self.subTest(repr(cause)):
                error = APIConnectionError("")
                error.__cause__ = cause
                self.assertEqual(is_tried_again, self.delay(error) is not None)

    def test_retries_end_at_max_retries(self):
        delays = [self.delay(APIConnectionError(""), retry) for retry in range(5)]
        self.assertEqual([0.5, 1.0, 2.0, None, None], delays)

    def test_the_maximum_delay_never_overflows(self):
        for retry, config, expected in [
            (0, {}, 0.5), (4, {}, 8.0), (4000, {}, 8.0),
            (4000, {"initial_delay": 1, "multiplier": 2}, 8.0),
            (4000, {"multiplier": 0.5}, 0.0),
            (1, {"initial_delay": 1e200, "multiplier": 1e200}, 8.0),
            (3, {"initial_delay": 2, "multiplier": 3, "max_delay": 100}, 54),
            (1, {"initial_delay": 3, "multiplier": 0}, 0),
            (9, {"initial_delay": 1e308, "multiplier": 1, "max_delay": 1e308}, 1e6),
        ]:  # fmt: skip
            with self.subTest(retry, **config):
                delay = self.delay(APIConnectionError(""), retry, max_retries=5000, **config)
                self.assertEqual(expected, delay)

    def test_what_a_server_asks_for_has_a_limit(self):
        for seconds, config, expected in [
            ("0", {}, 0.5), ("7", {}, 7.5), ("60", {}, 60.5), ("60.001", {}, None),
            ("3600", {"max_retry_after": 3600}, 3600.5), ("1", {"max_retry_after": 0.5}, None),
            ("0", {"max_retry_after": 0}, 0.5),
            ("999999999999999", {"max_retry_after": 1e18}, 1e6),
        ]:  # fmt: skip
            with self.subTest(seconds, **config):
                error = APIStatusError("", 503, {"retry-after": seconds})
                self.assertEqual(expected, self.delay(error, **config))
        server = self.serve(json_answer({}, 503, Retry_After=10**14))
        call, waits = prepared(server.url, RetryConfig(max_retry_after=1e18))
        call.timeouts.total_timeout = float("inf")
        self.assertEqual((TEXT, [1e6]), (outcome_of(call), waits))
        with self.assertRaises(OverflowError):  # which is why there is a limit
            time.sleep(1e15)

    def test_no_initial_delay_is_none_at_any_retry(self):
        config = RetryConfig(max_retries=5000, initial_delay=0)
        error = APIConnectionError("")
        for retry in (0, 1100, 4000):
            args = error, retry, False, config, lambda low, high: high
            self.assertEqual(0.0, friendli_lite._retry_delay(*args))

    def test_a_name_that_cannot_be_looked_up_now_is_tried_again(self):
        for number in (errno.ENOENT, errno.EACCES, errno.ENOMEM):  # EAI_AGAIN is 2 on macOS
            self.assertEqual("", friendli_lite._permanent_hint(socket.gaierror(number, "later")))
            self.assertIn("this machine", friendli_lite._permanent_hint(OSError(number, "no")))


class RetryAfterTests(TestCase):
    NOW = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT

    def test_all_its_forms_are_read(self):
        for headers, expected in [
            ({}, 0.0), ({"retry-after": "7"}, 7.0), ({"retry-after": " 0 "}, 0.0),
            ({"retry-after": "1.5"}, 1.5), ({"retry-after": "2."}, 2.0),
            ({"retry-after": "0" * 14 + "9." + "0" * 15}, 9.0),
            ({"retry-after-ms": "250"}, 0.25), ({"retry-after-ms": "1500.5"}, 1.5005),
            ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
            ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
            ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 30.0),
            ({"retry-after": "Wed, 21 Oct 2015 09:28:30 +0200"}, 30.0),
            ({"retry-after": "Wednesday, 21-Oct-15 07:28:30 GMT"}, 30.0),
            ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
            ({"retry-after": "Wed, 21 Oct 2015 07:27:59 GMT"}, 0.0),
            ({"retry-after-ms": "soon", "retry-after": "Wed, 21 Oct 2015 07:28:01 GMT"}, 1.0),
        ]:  # fmt: skip
            with self.subTest(headers):
                self.assertEqual(expected, friendli_lite._retry_after(headers, self.NOW))

    # Numbers that are none, and dates
    NONSENSE = (
        "|-1|+1|nan|inf|1e3|0x10|1_000|7s|1,5|.5|7 8|\u0663|soon|Wed|GMT|Wed, 21 Oct|, , ,"
        "|1 2 3 4 5 6|Wed, 99 Oct 99999 07:28:30 GMT|Tue, 02 Jan 2024 1.2.3.4 GMT"
        "|Tue, 02 Jan 2024 1.2.3.4.5|Tue, 02 Jan 2024 1. GMT|Tue, 02 Jan 99999999999 00:00:00 GMT"
        "|Tue, 02 Jan 9999 99:99:99 GMT|Tue, 02 Jan 2024 00:00:00 +9999999999"
        "|Fri, 31 Dec 9999 23:59:59 -9999|Thu, 01 Jan 0001 00:00:00 GMT"
    )

    def test_nonsense_asks_for_nothing(self):
        for value in [*self.NONSENSE.split("|"), "\0", "(" * 2000]:
            with self.subTest(value[:50]):
                found = friendli_lite._retry_after({"retry-after": value}, self.NOW)
                self.assertEqual(0.0, found)

    def test_whatever_email_utils_raises_is_nonsense(self):
        for error in (UnboundLocalError, TypeError, IndexError, OverflowError, RecursionError):
            patch = mock.patch("email.utils.parsedate_to_datetime", side_effect=error)
            with self.subTest(error.__name__), patch as parse:
                self.assertEqual(0.0, friendli_lite._retry_after({"retry-after": "odd"}, self.NOW))
                parse.assert_called_once_with("odd")

    def test_a_date_without_a_zone_is_utc(self):
        self.addCleanup(time.tzset)
        self.addCleanup(os.environ.pop, "TZ")
        os.environ["TZ"] = "Asia/Seoul"
        time.tzset()
        for date in ("Wed Oct 21 07:28:30 2015", "Wed, 21 Oct 2015 07:28:30 -0000"):
            with self.subTest(date):
                found = friendli_lite._retry_after({"retry-after": date}, 1445412480.0)
                self.assertEqual(30.0, found)

    def test_a_number_of_any_length_is_a_number(self):
        for value, seconds in [("1000000000000000", 1e15), ("1" * 400, float("inf")), ("7.", 7.0)]:
            with self.subTest(value[:20]):
                self.assertEqual(seconds, friendli_lite._retry_after({"retry-after": value}, 0.0))


# The transport: reading a response


def answer_with(call, *lines, framing="length", end=b"\r\n"):
    """A response of ONE, whose head has some lines more than it needs.

    In chunks, there is a boundary within the word "data", as a stream has it.
    """
    body = payload(call, ONE)
    frame = b"Content-Length: %d" % len(body)
    if framing == "chunked":
        frame, body = b"Transfer-Encoding: chunked", chunked(body[:2], body[2:])
    content_type = b"Content-Type: " + MEDIA_TYPES[call].encode()
    return end.join([b"HTTP/1.1 200 OK", content_type, *lines, frame, b"", body])


OK = b"HTTP/1.1 200 OK\r\n"
CODING, LENGTH = b"Transfer-Encoding: ", b"Content-Length: "
STATUS_LINES = (
    b"| |SSH-2.0-OpenSSH_9.9|220 mail ESMTP|ICY 200 OK|HTTP/2 200|HTTP/0.9 200 OK|http/1.1 200 OK"
    b"| HTTP/1.1 200 OK|HTTP/1.1|HTTP/1.x 200 OK|HTTP/1.12 200 OK|HTTP/1.1200 OK|HTTP/1.1 two OK"
    b"|HTTP/1.1 20 OK|HTTP/1.1 99999 OK|HTTP/1.1 |HTTP/1.1 -20 OK|HTTP/1.1 099 OK|HTTP/1.1  200 OK"
    b"|HTTP/1.1\t200 OK|HTTP/1.1 200OK|HTTP/1.1 200 O\0K|HTTP/1.1 200 O\rK|HTTP/1.1 \xb200 OK"
)
HEADERS = (
    b"nonsense|X : y|X\t: y|Bad Name: x|: x|:|=?: x|(x): y|X\0: y|X: a\0b|X: a\rb|\r|\xc9: x"
    b"|\xa0X: y|HTTP/1.1 200 OK"
)
CODINGS = b"|gzip|identity|xchunked|chunked;q=1|gzip, chunked|chunked, chunked|chunked, gzip"
LENGTHS = b"|-5|+5|5.0|0x5|1e1|five|5 5|5, 6|5,|,5|5;5|\xb2|" + b"9" * 100
MALFORMED_HEADS = [
    *(b"\n", b"\x15\x03\x01\x00\x02\x02\x46", b"\x00\x00\x12\x04\x00", b"<html>hello", b"{",
      b"\xff"),
    *(line + b"\r\n" for line in STATUS_LINES.split(b"|")),
    b"HTTP/1.1 200 " + b"O" * 33_000,
    *(answer_with(stream, line, framing="chunked") for line in HEADERS.split(b"|")),
    answer_with(stream, b"X: " + b"a" * 33_000, framing="chunked"),
    answer_with(stream, b"X: a", *[b" b"] * 11_000),
    answer_with(stream, b"X: a", b" b\0c", framing="chunked"),
    answer_with(stream, *[b"X: y"] * 99),  # with Content-Type and Content-Length they are 101
    answer_with(stream, *[b"X: y"] * 5000),
    answer_with(stream, *(b"X-%d: y" % number for number in range(99))),
    OK + b" X: y\r\n",  # folded, but nothing comes before
    *(OK + CODING + coding + b"\r\n\r\n" for coding in CODINGS.split(b"|")),
    *(OK + LENGTH + length + b"\r\n\r\n" for length in LENGTHS.split(b"|")),
    OK + CODING + b"gzip\r\n" + CODING + b"chunked\r\n\r\n",
    OK + CODING + b"gzip\r\n" + LENGTH + b"5\r\n\r\n",
    OK + LENGTH + b"5\r\n" + LENGTH + b"6\r\n\r\n",
    OK + LENGTH + b"5\r\nX: y\r\n" + LENGTH.lower() + b"05\r\n\r\n",
    *(head(100) * 2000, head(103, X="y") * 2000),
    *(head(103) + b"nonsense\r\n\r\n", head(100) + b"SSH-2.0-OpenSSH_9.9\r\n"),
]  # fmt: skip
MALFORMED_CHUNKS = [
    *(b"zz\r\n", b"g\r\n", b"1_0\r\n", b"\r\n\r\n", b"1\rx\n", b"1;a\0b\r\n", b"\xbd\r\n"),
    *(size + b"\r\na" for size in b"-1|+1|0x1| 1|1 1|1,|1.0|\t1".split(b"|")),
    *(b"-" + b"f" * 40 + b"\r\n", b"f" * 100 + b"\r\n", b"0" * 33_000, b"1;" + b"x" * 33_000),
    *(b"1\r\naXX\r\n", b"1\r\na1\r\n", b"1\r\n{\r\nzz\r\n", b"1\r\n{\r\n-0\r\n"),
]
MALFORMED_TRAILERS = [
    *(b"nonsense\r\n", b"X : y\r\n", b"X: " + b"a" * 33_000, b"X: y\r\n" * 101, b"X: y\r\n" * 5000)
]


class ResponseTests(TestCase):
    def test_a_malformed_head_is_refused_whether_it_comes_at_once_or_by_byte(self):
        for data in MALFORMED_HEADS:
            for pieces in deliveries(data):
                with self.subTest(data[:90], length=len(data), pieces=len(pieces)):
                    _, error, _ = outcome_of_pieces(complete, pieces)
                    self.assertIs(APIResponseError, type(error))
                    self.assertRegex(str(error), r"\Athe server sent .{5,100}: b?['\"].{0,510}\Z")
                    self.assertNotIn("\n", error.body)

    def test_a_malformed_chunk_or_trailer_is_refused_likewise(self):
        cases = [
            (call, head(Content_Type=kind, Transfer_Encoding="chunked") + data)
            for call, kind in MEDIA_TYPES.items()
            for data in MALFORMED_CHUNKS
        ]
        cases += [
            (complete, CHUNKED_JSON_HEAD + chunked(ONE)[:-2] + trailers)
            for trailers in MALFORMED_TRAILERS
        ]
        for call, data in cases:
            for pieces in deliveries(data):
                with self.subTest(data[-90:], call=call.__name__, pieces=len(pieces)):
                    texts, error, connection = outcome_of_pieces(call, pieces)
                    self.assertEqual(([], APIResponseError), (texts, type(error)))
                    self.assertIn("the server sent ", str(error))
                    self.assertFalse(connection.is_open)

    def test_a_malformed_response_is_asked_for_once_and_not_waited_for(self):
        """The server waits until the client leaves; a client that waits, too, gets a timeout."""
        server = self.serve()
        cases = list(zip(itertools.cycle(MEDIA_TYPES), MALFORMED_HEADS[::3]))
        cases += [(complete, CHUNKED_JSON_HEAD + data) for data in MALFORMED_CHUNKS[::6]]
        cases += [(stream, STREAM_HEAD + data) for data in MALFORMED_CHUNKS[3::6]]
        for call, data in cases:
            with self.case(call.__name__, data[:90]):
                server.requests.clear()
                server.script(hang(data))
                error = self.failure(APIResponseError, call, retries=3)
                self.assertIn(": the server sent ", str(error))
                self.assertEqual((1, 1), (error.attempts, len(server.requests)))
        self.ask()

    def test_a_stream_is_whole_at_done_whatever_becomes_of_its_end(self):
        body = payload(stream, ONE)
        for end in (b"zz\r\n", b"-1\r\n", b"0\r\nnonsense\r\n\r\n", b"0\r\nX: " + b"y" * 33_000):
            for pieces in deliveries(STREAM_HEAD + chunked(body)[:-5] + end):
                with self.subTest(end[:20], pieces=len(pieces)):
                    texts, error, connection = outcome_of_pieces(stream, pieces)
                    self.assertEqual((["a"], None, False), (texts, error, connection.is_open))

    def test_what_was_received_is_named_in_the_error(self):
        for data, words in [
            (b"\r\n\r\n", r"sent something other than HTTP/1.x: '\r'"),
            (b"HTTP/2 200\r\n", "sent something other than HTTP/1.x: 'HTTP/2 200"),
            (b"SSH-2.0-x\r\n", "sent something other than HTTP/1.x: 'SSH-2.0-x"),
            (b"\x15\x03\x01\x00\x02\x02\x46", r"sent something other than HTTP/1.x: '\x15\x03\x01"),
            (b"HTTP/1.1 99999 OK\r\n", "sent a malformed status line: 'HTTP/1.1 99999 OK'"),
            (OK + b"X : y\r\n", "sent a malformed header: 'X : y'"),
            (OK + b"X: y\r\n" * 101, "sent over 100 headers: 'X: y'"),
            (OK + b"X: " + b"y" * 33_000, "sent over 32768 bytes of headers: 'X: yyy"),
            (head(Transfer_Encoding="gzip"), "sent an unknown transfer-encoding: 'gzip'"),
            (head(Content_Length="-5"), "sent an invalid length: '-5'"),
            (CHUNKED_JSON_HEAD + b"zz\r\n", "sent a malformed chunk: 'zz\\r'"),
        ]:
            with self.subTest(words):
                _, error, _ = outcome_of_pieces(complete, [data])
                self.assertIn(words, str(error))

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

    def test_good_heads_are_taken_whether_they_come_at_once_or_by_byte(self):
        for lines, headers in [
            ([b"x-request-id: 7", b"X-OTHER:8"], {"x-request-id": "7", "x-other": "8"}),
            ([b"X: \t a b \t "], {"x": "a b"}),
            ([b"X:", b"Y: "], {"x": "", "y": ""}),
            ([b"X: caf\xe9 \xff"], {"x": "café ÿ"}),
            ([b"X: a", b"Y: b", b"x: c", b"X:"], {"x": "a, c, ", "y": "b"}),
            ([b"X: a", b"  b", b"\tc ", b"Y: d"], {"x": "a b c", "y": "d"}),
            ([b"X: :a:"], {"x": ":a:"}),
            ([b"!#$%&'*+-.^_`|~09: a"], {"!#$%&'*+-.^_`|~09": "a"}),
            ([b"X: " + b"a" * 32_000], {"x": "a" * 32_000}),
            ([b"X: y"] * 98, {"x": ", ".join("y" * 98)}),  # 100 with those of ONE
            ([b"X: \x01\x7f\x0b"], {"x": "\x01\x7f\x0b"}),
        ]:
            for call, framing, end in itertools.product(
                MEDIA_TYPES, ["length", "chunked"], [b"\r\n", b"\n"]
            ):
                for pieces in deliveries(answer_with(call, *lines, framing=framing, end=end)):
                    with self.subTest(lines[0][:60], call=call.__name__, pieces=len(pieces)):
                        texts, error, connection = outcome_of_pieces(call, pieces)
                        self.assertEqual((["a"], None, True), (texts, error, connection.is_open))
                        found = friendli_lite._Response(FakeConnection(pieces)).headers
                        for name in ("content-type", "content-length", "transfer-encoding"):
                            found.pop(name, None)
                        self.assertEqual(headers, found)

    def test_good_status_lines_are_taken(self):
        for line, status, reason in [
            (b"HTTP/1.1 200 OK", 200, "OK"), (b"HTTP/1.1 200 ", 200, ""),
            (b"HTTP/1.1 200", 200, ""), (b"HTTP/1.0 200 OK", 200, "OK"),
            (b"HTTP/1.2 200 Very fine: caf\xe9", 200, "Very fine: café"),
            (b"HTTP/1.1 522 ", 522, ""), (b"HTTP/1.1 999 ?", 999, "?"),
        ]:  # fmt: skip
            for end, pieces in itertools.product([b"\r\n", b"\n"], range(2)):
                with self.subTest(line, end=end, pieces=pieces):
                    data = deliveries(line + end + b"Content-Length: 0" + end * 2)[pieces]
                    response = friendli_lite._Response(FakeConnection(data))
                    self.assertEqual((status, reason), (response.status, response.reason))
                    self.assertEqual({"content-length": "0"}, response.headers)

    def test_good_framings_are_taken_and_end_where_they_say(self):
        """Each response is followed by the end of its connection; not all may be kept."""
        size, whole = b"%d" % len(ONE), chunked(ONE)
        long = b"X: " + b"y" * 20_000 + b"\r\n"
        bytewise = chunked(*(ONE[i : i + 1] for i in range(len(ONE))))
        extended = whole.replace(b"\r\n", b";a=b;c\r\n", 1).replace(b"0\r\n", b'00 ; x="y"\r\n')
        for frame, body, is_kept in [
            (LENGTH + size, ONE, True), (LENGTH + b"000" + size, ONE, True),
            (LENGTH + size + b"\r\n" + LENGTH + size, ONE, True),
            (LENGTH + size + b" ,\t" + size, ONE, True),
            (LENGTH + b", ".join([size] * 3), ONE, True),
            (LENGTH + size + b"\r\nConnection: x, Close", ONE, False),
            (LENGTH + size + b"\r\nConnection: Keep-Alive", ONE, True),
            (b"X: y", ONE, False),  # to the end of the connection
            (b"X: y", b" " * 200_000 + ONE, False), (CODING + b"chunked", whole, True),
            (CODING + b"chunked ", whole, True), (CODING.upper() + b"\tCHUNKED\t", whole, True),
            (CODING + b"chunked\r\n" + LENGTH + b"7", whole, False),
            (LENGTH + b"7\r\n" + CODING + b"chunked", whole, False),
            (CODING + b"chunked", bytewise, True), (CODING + b"chunked", extended, True),
            (CODING + b"chunked", whole.replace(b"1a", b"1A"), True),
            (CODING + b"chunked", whole.replace(b"\r\n", b"\n"), True),
            (CODING + b"chunked", whole.replace(b"\r", b" \t\r", 1), True),
            (CODING + b"chunked", b"0" * 90 + whole[:-5] + b"000\r\n\r\n", True),
            (CODING + b"chunked", whole[:-2] + b"X: y\r\n z\r\n\r\n", True),
            (long + CODING + b"chunked", whole[:-2] + long + b"\r\n", True),
        ]:  # fmt: skip
            data = b"\r\n".join([OK + b"Content-Type: application/json", frame, b"", body])
            for pieces in deliveries(data):
                with self.subTest(frame, body=body, pieces=len(pieces)):
                    texts, error, connection = outcome_of_pieces(complete, pieces, CUT)
                    self.assertEqual((["a"], None, is_kept), (texts, error, connection.is_open))

    def test_http_1_0_keeps_a_connection_only_where_it_says_so(self):
        for version, connection_header, is_kept in [
            (b"1.1", b"", True), (b"1.0", b"", False), (b"1.0", b"Connection: keep-alive", True),
            (b"1.0", b"Connection: x ,Keep-Alive", True),
            (b"1.0", b"Connection: close, keep-alive", False),
            (b"1.1", b"Connection: closed", True),
            (b"1.1", b"Connection: keep-alive\r\nConnection: close", False),
        ]:  # fmt: skip
            data = answer_with(complete, connection_header or b"X: y").replace(b"1.1", version, 1)
            with self.subTest(version, header=connection_header):
                texts, error, connection = outcome_of_pieces(complete, [data])
                self.assertEqual((["a"], None, is_kept), (texts, error, connection.is_open))

    def test_interim_responses_are_passed_over(self):
        interim = (
            head(100) + head(103, Link="</a>; rel=preload") + head(199) + head(102) + head(100)
        )
        for call in MEDIA_TYPES:
            for pieces in deliveries(interim + answer_with(call, b"X: y")):
                with self.subTest(call=call.__name__, pieces=len(pieces)):
                    texts, error, connection = outcome_of_pieces(call, pieces)
                    self.assertEqual((["a"], None, True), (texts, error, connection.is_open))

    def test_a_status_without_a_body_ends_with_its_head(self):
        for status, is_tunnel, is_kept in [
            (204, False, True), (304, False, True), (101, False, False), (200, True, False),
            (299, True, False),
        ]:  # fmt: skip
            for lines in ({}, {"Content_Length": 5}, {"Transfer_Encoding": "x"}):
                with self.subTest(status, is_tunnel=is_tunnel, lines=lines):
                    connection = FakeConnection([head(status, **lines)])
                    response = friendli_lite._Response(connection, is_tunnel)
                    self.assertEqual((status, b""), (response.status, response.read()))
                    response.close()
                    self.assertEqual(is_kept, connection.is_open)
                    friendli_lite._pool.close()

    def test_after_101_another_protocol_is_spoken_and_no_call_follows(self):
        server = self.serve(head(101, Upgrade="x"))
        self.check_error(APIStatusError, self.failure(APIStatusError), "101")
        self.ask()
        self.assertEqual(2, server.connections)

    def test_bytes_behind_a_response_close_its_connection(self):
        forged = json_answer({"choices": [{"text": "forged"}]})
        for call, framing in itertools.product(MEDIA_TYPES, ["length", "chunked"]):
            data = framed(payload(call, ONE), framing, MEDIA_TYPES[call])
            for extra in (forged, forged * 100, b"\r\n", b"x", b"-ffff\r\na", b"zz\r\n"):
                with self.subTest(extra[:50], call=call.__name__, framing=framing):
                    texts, error, connection = outcome_of_pieces(call, [data + extra])
                    self.assertEqual((["a"], None, False), (texts, error, connection.is_open))
        server = self.serve(ANSWER + forged, STREAM + forged * 100)
        for call in MEDIA_TYPES:
            self.ask(call=call)
        self.ask()
        self.assertEqual(3, server.connections)

    def test_a_wrong_content_length_is_an_error(self):
        for call in MEDIA_TYPES:
            body = payload(call, ONE)
            too_long = [len(body) + 1, 10**30] if call is complete else []
            for length in (0, 7, len(ONE) - 1, *too_long):
                with self.subTest(call=call.__name__, length=length):
                    data = head(Content_Type=MEDIA_TYPES[call], Content_Length=length) + body
                    is_cut = call is stream or length > len(body)
                    _, error, connection = outcome_of_pieces(call, [data], CUT)
                    self.assertIs(APIConnectionError if is_cut else APIResponseError, type(error))
                    self.assertFalse(connection.is_open)

    def test_transfer_encoding_in_http_1_0_ends_the_connection(self):
        coded = head(Content_Type=JSON, Transfer_Encoding="chunked", Connection="keep-alive")
        for version, is_open in ((b"1.0", False), (b"1.1", True)):
            with self.subTest(version):
                data = coded.replace(b"HTTP/1.1", b"HTTP/" + version) + chunked(ONE)
                texts, error, connection = outcome_of_pieces(complete, [data])
                self.assertEqual((["a"], None), (texts, error))
                self.assertEqual(is_open, connection.is_open)

    def test_a_folded_line_is_checked_and_joined(self):
        start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        folded = start + b"Content-Length:\r\n %d\r\nX: a\r\n\tb\r\n\r\n" % len(ONE)
        self.assertEqual((["a"], None), outcome_of_pieces(complete, [folded + ONE])[:2])
        for sign in (b"\0", b"\r"):
            with self.subTest(sign):
                texts, error, _ = outcome_of_pieces(
                    complete, [start + b"X: a\r\n b" + sign + b"c\r\n\r\n"]
                )
                self.assertEqual([], texts)
                self.assertIs(APIResponseError, type(error))

    def test_after_a_malformed_trailer_nothing_is_read(self):
        trailer = b"0\r\nBad Header\r\n\r\n0\r\n\r\n"
        data = head(500, Transfer_Encoding="chunked") + b"1\r\na\r\n" + trailer
        with self.serve(data) as server:
            self.failure(APIStatusError)
            self.ask()
            self.assertEqual(2, server.connections)

    def test_a_response_is_read_once_to_its_end(self):
        connection = FakeConnection([head(Transfer_Encoding="chunked") + chunked(b"a")])
        response = friendli_lite._Response(connection)
        self.assertEqual([b"a", b"", b"", b""], [response.read() for _ in range(4)])


class CutTests(TestCase):
    EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'
    PIECES = {complete: [ONE[:11], ONE[11:]], stream: [EVENT, EVENT, b"data: [DONE]\n\n"]}

    def cuts(self):
        """Yield all beginnings of responses in three framings, and what must come of them."""
        for (call, pieces), framing in itertools.product(self.PIECES.items(), FRAMINGS):
            body = b"".join(pieces)
            whole = framed(body, framing, MEDIA_TYPES[call])
            if framing == "chunked":  # a cut between chunks is a cut between events
                whole = whole[: whole.index(b"\r\n\r\n") + 4] + chunked(*pieces)
            end = len(whole)
            if call is stream:  # ends at [DONE], by a line end or by that of the connection
                end = whole.index(b"[DONE]") + len(b"[DONE]") + (framing != "close")
            for cut in range(len(whole)):
                data = whole[:cut]
                kind = None if cut >= end else APIConnectionError
                if (call, framing) == (complete, "close") and b"\r\n\r\n" in data:
                    kind = APIResponseError  # only the JSON tells
                texts = ["a"] * (data.count(b"}\n\n") if call is stream else kind is None)
                yield call, framing, data, texts, kind

    def test_a_response_cut_at_any_byte_is_an_error_after_its_chunks(self):
        for call, framing, data, texts, kind in self.cuts():
            with self.subTest(call=call.__name__, framing=framing, cut=data[-20:]):
                found, error, connection = outcome_of_pieces(call, [data] if data else [], CUT)
                self.assertEqual((texts, kind), (found, error and type(error)))
                if b"\r\n\r\n" in data and kind:
                    self.assertFalse(connection.is_open)

    def test_so_it_is_over_the_network_where_the_error_tells_why(self):
        server = self.serve()
        for call, framing, data, texts, kind in itertools.islice(self.cuts(), 5, None, 23):
            server.script(then_close(data))
            with self.case(call.__name__, framing, data):
                found, error = outcome(call)
                self.assertEqual((texts, kind), (found, error and type(error)))
                if kind is APIConnectionError and (b"\r\n\r\n" not in data or framing != "close"):
                    self.assertIn("cut short: the server closed the connection", str(error))
        self.ask()

    def test_a_reset_connection_is_an_error_after_the_chunks_that_came(self):
        for framing in FRAMINGS:
            data = framed(sse(text_chunk("a"), text_chunk("b")), framing, EVENTS)
            later = Later(data[: data.index(b"\n\n") + 9], rst)
            with self.case(framing), self.serve(later), stream("x", retries=3, timeout=5) as chunks:
                self.assertEqual("a", next(chunks).text)
                later.now()
                with self.assertRaises(APIConnectionError) as caught:
                    next(chunks)
                self.check_error(APIConnectionError, caught.exception, "cut short: ")
                self.assertEqual([], list(chunks))


# The transport: connections, reused, replaced, shared


class ReuseTests(TestCase):
    def test_calls_in_a_row_share_a_connection_over_http_and_https(self):
        by_length = event_stream(*chunks({}), framing="length")
        for scheme, (call, answer) in itertools.product(
            ["http", "https"], [(complete, ANSWER), (stream, STREAM), (stream, by_length)]
        ):
            with self.each(scheme, *[answer] * 4) as (server, options):
                self.ask(4, call, **options)
                self.assertEqual((4, 1), (len(server.requests), server.connections))

    def test_session_tickets_of_tls_are_no_sign_of_death(self):
        tls, context = server_tls(), client_tls()
        for call in MEDIA_TYPES:  # the tickets of TLS 1.3 come behind the handshake
            with self.case(call.__name__), self.serve(tls=tls) as server:
                self.ask(3, call, ssl_context=context)
                self.assertEqual(1, server.connections)
        self.assertEqual(2, tls.session_stats()["accept_good"])

    def test_a_server_that_closes_after_its_response_is_obeyed(self):
        close = json_answer(completion({}), Connection="close")
        old = ANSWER.replace(b"HTTP/1.1", b"HTTP/1.0")
        kept = json_answer(completion({}), Connection="keep-alive").replace(
            b"HTTP/1.1", b"HTTP/1.0"
        )
        for answer, connections in [(close, 3), (old, 3), (kept, 1)]:
            with self.case(answer), self.serve(*[answer] * 3) as server:
                self.ask(3)
                self.assertEqual(connections, server.connections)

    def test_after_an_error_page_a_connection_is_kept_if_all_of_it_came(self):
        large = head(503, Content_Length=200_000) + b"x" * 200_000
        for name, answer, connections in [
            ("whole", json_answer({}, 503), 1),
            ("larger than what is read of it", large, 1),
            ("empty", head(503, Content_Length=0), 1),
            ("broken", head(503, Transfer_Encoding="chunked") + b"nonsense\r\n", 2),
            ("endless", endless(head(503, Transfer_Encoding="chunked"), b"4\r\nabcd\r\n" * 999), 2),
            ("to its end", then_close(head(503) + b"x"), 2),
            ("stalled", hang(head(503, Content_Length=9) + b"x"), 2),
        ]:
            with self.case(name), self.serve(answer) as server:
                self.failure(APIStatusError, timeout=0.02 if name == "stalled" else 5)
                self.ask()
                self.assertEqual(connections, server.connections)

    def test_what_follows_done_is_received_and_the_connection_kept(self):
        for framing in ("chunked", "length"):
            data = framed(sse(text_chunk("a")), framing, EVENTS)
            end = data.index(b"[DONE]\n") + len(b"[DONE]\n")
            for pieces in ([data[:end], data[end:]], [data[:end], *deliveries(data[end:])[1]]):
                with self.subTest(framing, pieces=len(pieces)):
                    texts, error, connection = outcome_of_pieces(stream, pieces)
                    self.assertEqual((["a"], None, True), (texts, error, connection.is_open))
                    self.assertEqual(0.01, connection.timeouts.total_timeout)

    def test_what_does_not_follow_done_is_waited_for_for_10_ms(self):
        for framing, rest in [("chunked", 2), ("length", 1)]:
            answer = framed(sse(text_chunk("a")), framing, EVENTS)[:-rest]
            with self.case(framing), self.serve(hang(answer)) as server, self.within(0.5):
                self.assertEqual((["a"], None), outcome(stream))
                self.ask()
                self.assertEqual(2, server.connections)

    def test_what_trickles_behind_done_is_not_waited_for(self):
        start = STREAM_HEAD + chunked(sse(text_chunk("a")))[:-5]
        with self.serve(endless(start, chunked(b"x" * 999)[:-5])) as server, self.within(0.5):
            self.assertEqual((["a"], None), outcome(stream))
            self.ask()
            self.assertEqual(2, server.connections)

    def test_a_stream_that_is_left_early_closes_its_connection(self):
        def answer(sock):
            sock.sendall(STREAM[:-40])
            sock.settimeout(5)
            left.append(sock.recv(1))
            return CLOSE

        def collect(chunks):
            gc.collect()

        left = []
        for leave in (CompletionStream.close, collect):
            with self.case(leave.__name__), self.serve(answer) as server:
                chunks = stream("x")
                next(chunks)
                leave(chunks)
                del chunks
                gc.collect()
                server.close()
                self.assertEqual([b""], left)
                left.clear()

    def test_other_contexts_and_proxies_get_connections_of_their_own(self):
        one, other = client_tls(), client_tls()
        with Proxy() as proxy, self.serve(tls=server_tls()) as server:
            for connections, context, proxy_url in [
                (1, one, ""), (2, other, ""), (2, one, ""), (3, one, proxy.url),
                (4, one, proxy.url.replace("//", "//user:password@")),
                (4, one, ""), (4, other, ""),
            ]:  # fmt: skip
                os.environ["HTTPS_PROXY"] = proxy_url
                self.ask(ssl_context=context)
                self.assertEqual(connections, server.connections)

    def test_the_socket_sends_at_once_and_survives_a_nat(self):
        with self.serve():
            self.ask()
            (connection,) = friendli_lite._pool._idle
            sock = connection._sock
            self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            for name, value in [
                ("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60),
                ("TCP_KEEPINTVL", 60), ("TCP_NOTSENT_LOWAT", 16384),
            ]:  # fmt: skip
                if hasattr(socket, name):
                    found = sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                    self.assertEqual(value, found, name)

    def test_a_platform_may_lack_these_options(self):
        sock = mock.Mock()
        sock.setsockopt.side_effect = OSError("not supported")
        friendli_lite._set_socket_options(sock)
        self.assertLess(3, sock.setsockopt.call_count)
        with mock.patch.object(friendli_lite, "socket", types.SimpleNamespace()):
            friendli_lite._set_socket_options(sock)


class IdleConnection:
    """Stands for an idle connection; `interrupt` is called whenever it is used."""

    idle_since = ()

    def __init__(self, interrupt=lambda: None):
        self.is_open = True
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
            (0.0, 0.0, True), (3.9, 3.9, True), (4.1, 4.1, False),
            (4.1, 0.0, False),  # the clock was set back
            (0.1, 4.1, False),  # the machine slept, or the Lambda was frozen
            (0.0, 3600.0, False), (3.9, -3600.0, True), (3600.0, -3600.0, False),
        ]:  # fmt: skip
            now = [1000.0, 1_700_000_000.0]
            pool = friendli_lite._ConnectionPool(lambda now=now: now[0], lambda now=now: now[1])
            with self.case(monotonic, wall), mock.patch.object(friendli_lite, "_pool", pool):
                with self.serve() as server:
                    self.ask()
                    now[0] += monotonic
                    now[1] += wall
                    self.ask()
                    self.assertEqual(1 if is_kept else 2, server.connections)
                pool.close()

    def test_the_clocks_are_that_of_the_wall_and_the_monotonic_one(self):
        self.assertEqual((time.monotonic, time.time), friendli_lite._pool._clocks)

    def test_the_connection_used_last_is_taken_the_oldest_closed(self):
        pool = friendli_lite._ConnectionPool(lambda: 0.0)
        idle = [IdleConnection() for _ in range(66)]
        for connection in idle:
            pool.release(connection)
        self.assertEqual([False] * 2 + [True] * 64, [connection.is_open for connection in idle])
        self.assertIs(idle[65], pool.acquire("route"))
        self.assertIs(idle[64], pool.acquire("route"))
        pool.release(idle[65])
        self.assertIs(idle[65], pool.acquire("route"))
        self.assertIsNone(pool.acquire("another route"))
        pool.close()
        self.assertEqual([True] * 2, [connection.is_open for connection in idle[64:]])
        self.assertEqual({False}, {connection.is_open for connection in idle[:64]})
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
            steps.append(None)
            if len(steps) == moment:
                taken.extend([pool.acquire("route"), pool.acquire("route")])
            return 0.0

        steps, taken = [None] * 99, []
        pool = friendli_lite._ConnectionPool(interrupt)
        first, second, third = (IdleConnection(interrupt) for _ in range(3))
        pool.release(first)
        pool.release(second)
        steps.clear()
        with mock.patch.object(friendli_lite, "_MAX_IDLE_CONNECTIONS", 1):
            taken.append(use(pool, third))
        steps.extend([None] * 99)
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

    def test_the_pool_is_bounded(self):
        with mock.patch.object(friendli_lite, "_MAX_IDLE_CONNECTIONS", 3), self.serve() as server:
            for chunks in [stream("x") for _ in range(8)]:
                list(chunks)
            deadline = time.monotonic() + 5
            while len(server._sockets) != 3 and time.monotonic() < deadline:
                time.sleep(0.005)
            self.assertEqual((3, 8), (len(server._sockets), server.connections))


def alert(sock):
    """End a TLS connection by an alert, past the encryption."""
    os.write(sock.fileno(), b"\x15\x03\x03\x00\x02\x02\x50")
    return CLOSE


class DeadConnectionTests(TestCase):
    ENDS = [("http", fin), ("http", rst), ("https", fin), ("https", rst), ("https", alert)]

    def check_counts(self, expected, error, server):
        self.assertEqual(expected, (error.attempts, len(server.requests), server.connections))

    def test_one_that_the_server_has_closed_is_not_used(self):
        for scheme, end in self.ENDS:
            later = Later(ANSWER, end)
            with self.each(scheme, later) as (server, options):
                self.ask(**options)
                later.now()
                self.ask(**options)
                self.assertEqual((2, 2), (len(server.requests), server.connections))

    def test_one_that_closes_at_that_very_moment_is_replaced_and_counted(self):
        for scheme, end in self.ENDS:
            with self.each(scheme, ANSWER, end, fin) as (server, options):
                self.ask(**options)
                error = self.failure(APIConnectionError, **options)  # without a retry
                self.check_counts((2, 3, 2), error, server)
            with self.each(scheme, ANSWER, end) as (server, options):
                self.ask(2, **options)
                self.assertEqual((3, 2), (len(server.requests), server.connections))

    def test_one_that_failed_counts_as_no_request_sent(self):
        """A timeout of the connection in its place is retried, as only where nothing was sent."""
        connect, late = friendli_lite._Connection._connect, [socket.timeout("timed out")]

        def connect_late(connection, *address):
            if late:
                raise late.pop()
            connect(connection, *address)

        server = self.serve(ANSWER, fin)
        self.ask()
        call, _ = prepared(server.url, 1)
        with mock.patch.object(friendli_lite._Connection, "_connect", connect_late):
            self.assertEqual((TEXT, 3), (call.complete().text, call.attempts))

    def test_a_restart_is_not_noticed(self):
        with self.serve() as server:
            self.ask(2)
        with self.serve(port=server.port) as restarted:
            self.ask()
        self.assertEqual((2, 1), (len(server.requests), len(restarted.requests)))

    def test_one_that_breaks_after_0_3_s_was_served_and_is_not_replaced(self):
        for end, (seconds, requests) in itertools.product([fin, rst], [(0.29, 3), (0.31, 2)]):
            clock = mock.Mock(return_value=0.0)

            def end_late(sock, clock=clock, seconds=seconds, end=end):
                clock.return_value += seconds
                return end(sock)

            with self.case(end.__name__, seconds), self.serve(ANSWER, end_late) as server:
                self.ask()
                call, waits = prepared(server.url, 0, clock=clock)
                with contextlib.ExitStack() as stack:
                    if requests == 2:
                        stack.enter_context(self.assertRaises(APIConnectionError))
                    self.assertEqual(TEXT, call.complete().text)
                self.assertEqual((requests, []), (len(server.requests), waits))
                self.assertEqual(requests - 1, call.attempts)

    def test_after_a_byte_of_a_response_the_request_is_not_sent_again(self):
        for first in (b"H", OK, JSON_HEAD, CHUNKED_JSON_HEAD + b"1\r\n{\r\n"):
            with self.case(first), self.serve(ANSWER, then_close(first)) as server:
                self.ask()
                error = self.failure(APIConnectionError)
                self.check_counts((1, 2, 1), error, server)

    def test_a_new_connection_is_not_replaced(self):
        for scheme, end in self.ENDS:
            with self.each(scheme, end) as (server, options):
                error = self.failure(APIConnectionError, **options)
                self.check_counts((1, 1, 1), error, server)

    def test_a_malformed_response_or_a_timeout_does_not_replace_it(self):
        for kind, answer in [(APIResponseError, hang(b"nonsense")), (APITimeoutError, hang())]:
            with self.case(kind.__name__), self.serve(ANSWER, answer) as server:
                self.ask()
                error = self.failure(kind, timeout=0.03)
                self.check_counts((1, 2, 1), error, server)

    def test_bytes_that_nobody_asked_for_end_a_connection(self):
        forged = json_answer({"choices": [{"text": "forged"}]})
        for scheme in ("http", "https"):
            later = Later(ANSWER, forged)
            with self.each(scheme, later) as (server, options):
                self.ask(**options)
                later.now()
                self.ask(**options)
                self.assertEqual(2, server.connections)


class ThreadsAndProcessesTests(TestCase):
    def test_32_threads_each_get_the_responses_to_their_own_requests(self):
        logging.getLogger("friendli_lite").setLevel(logging.INFO)

        def ask(thread):
            names = [f"{thread}/{number}" for number in range(4)]
            return [complete("x", model=name, retries=0).model == name for name in names]

        with self.serve() as server, ThreadPoolExecutor(32) as threads:
            self.assertEqual([[True] * 4] * 32, list(threads.map(ask, range(32))))
            self.assertEqual(128, len(server.requests))
            self.assertLessEqual(server.connections, 64)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no os.fork()")
    def test_a_forked_child_touches_no_connection_of_its_parent(self):
        for leave in (CompletionStream.close, lambda chunks: chunks._call.abort()):
            later = Later(STREAM[:-40], STREAM[-40:])
            with self.case(leave), self.serve(later) as server:
                chunks = stream("x")
                text = next(chunks).text
                self.ask()

                def in_child(leave=leave, chunks=chunks):
                    leave(chunks)
                    self.ask()

                self.assertEqual(0, exit_status(in_child))
                later.now()
                self.assertEqual(TEXT, text + "".join(chunk.text for chunk in chunks))
                self.ask(2)
                self.assertEqual((5, 3), (len(server.requests), server.connections))

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no os.fork()")
    def test_a_fork_while_another_thread_uses_the_pool_blocks_no_call(self):
        def clock():
            if threading.current_thread() is thread:
                looking.set()
                go_on.wait(5)
            return time.monotonic()

        looking, go_on = threading.Event(), threading.Event()
        thread = threading.Thread(target=self.ask)
        pool = friendli_lite._ConnectionPool(clock)
        with mock.patch.object(friendli_lite, "_pool", pool), self.serve():
            thread.start()
            self.assertTrue(looking.wait(5))
            self.assertEqual(0, exit_status(self.ask))
            go_on.set()
            thread.join(5)
            pool.close()

    def test_what_another_process_opened_is_not_shut_down(self):
        with self.serve() as server:
            self.ask()
            (connection,) = friendli_lite._pool._idle
            connection._owner = 0
            connection.shut_down(connection._claims)
            self.ask()
            self.assertEqual(1, server.connections)

    def test_a_connection_is_either_shut_down_or_left_to_the_pool(self):
        for is_shut_down in (True, False):
            with self.subTest(is_shut_down=is_shut_down), self.serve() as server:
                call, _ = prepared(server.url)
                response = call._send()
                friendli_lite._read_completion(response)
                connection = response.connection
                with mock.patch.object(connection, "_sock", connection._sock) as sock:
                    if is_shut_down:
                        connection.shut_down(connection._claims)
                    response.close()
                    connection.shut_down(connection._claims)
                    response.close()
                    self.assertEqual(-1 if is_shut_down else sock.fileno(), sock.fileno())
                idle = [] if is_shut_down else [connection]
                self.assertEqual(idle, list(friendli_lite._pool._idle))
            friendli_lite._pool.close()


def throw(error):
    raise error


@unittest.skipUnless(hasattr(signal, "pthread_kill"), "this system has no signals")
class SignalTests(TestCase):
    WAITS = [
        (complete, b""), (complete, OK + b"Content-"), (complete, JSON_HEAD),
        (complete, CHUNKED_JSON_HEAD), (stream, b""), (stream, STREAM_HEAD),
        (stream, STREAM_HEAD + b"ff\r\ndata: "), (complete, head(503, Content_Length=9)),
    ]  # fmt: skip

    def interrupt(self, size):
        """Have SIGALRM come while the client waits for what follows so many bytes."""
        receive, received = friendli_lite._Connection.receive, []

        def receive_or_interrupt(connection, may_end=False):
            if len(b"".join(received)) == size:
                signal.setitimer(signal.ITIMER_REAL, 0.002)
            received.append(receive(connection, may_end))
            return received[-1]

        return mock.patch.object(friendli_lite._Connection, "receive", receive_or_interrupt)

    def handle(self, handler):
        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, handler))

    def test_what_a_handler_raises_comes_out_as_it_is(self):
        errors = [TimeoutError("x"), TimeoutError(), ValueError(), KeyboardInterrupt(), Exception()]
        for scheme, number in itertools.product(["http", "https"], range(len(self.WAITS))):
            call, data = self.WAITS[number]
            error = errors[number % len(errors)]
            self.handle(lambda *_, error=error: throw(error))
            with self.each(scheme, hang(data)) as (server, options), self.interrupt(len(data)):
                with self.assertRaises(type(error)) as caught:
                    list(call("x", retries=3, timeout=5, **options))
                server.close()
                self.assertIs(error, caught.exception)
                self.assertLessEqual(server.connections, 1)  # nothing is sent again

    def test_so_it_does_while_connecting(self):
        with contextlib.ExitStack() as stack:
            quiet = listener(stack)
            full = listener(stack, backlog=0)
            for url in (full, quiet.replace("http", "https")):
                for error in (TimeoutError("too late"), ValueError("x"), KeyboardInterrupt()):
                    with self.subTest(url, error=repr(error)):
                        self.handle(lambda *_, error=error: throw(error))
                        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
                        with self.assertRaises(type(error)) as caught:
                            signal.setitimer(signal.ITIMER_REAL, 0.005)
                            complete("x", server_url=url, retries=3, timeout=5, ssl_context=NO_CAS)
                        self.assertIs(error, caught.exception)

    def test_a_timeout_is_ours_if_a_limit_was_spent_or_the_socket_says_so(self):
        clock = mock.Mock(return_value=0.0)
        connection = object.__new__(friendli_lite._Connection)
        connection.timeouts = friendli_lite._Timeouts(5.0, 10.0, clock)
        connection.via = ""
        network = TimeoutError(errno.ETIMEDOUT, "Connection timed out")
        for error, seconds, kind in [
            (socket.timeout("timed out"), 0.0, APITimeoutError),
            (TimeoutError("timed out"), 0.0, APITimeoutError),
            (TimeoutError("The read operation timed out"), 0.0, APITimeoutError),
            (socket.timeout(), 10.0, APITimeoutError),
            (TimeoutError("mine"), 10.0, APITimeoutError),
            (TimeoutError("mine"), 9.9, TimeoutError),
            (TimeoutError(), 0.0, TimeoutError),
            (network, 0.0, APIConnectionError),
            (TimeoutError(errno.ETIMEDOUT, "too late"), 0.0, APIConnectionError),
            (ConnectionResetError("x"), 0.0, APIConnectionError),
        ]:
            with self.subTest(repr(error), seconds=seconds):
                clock.return_value = seconds
                found = connection._failure("what", error)
                self.assertIs(kind, type(found))
                self.assertEqual(kind is TimeoutError, found is error)

    def test_a_handler_may_make_calls_of_its_own(self):
        texts = []
        self.handle(lambda *_: texts.append(complete("x", timeout=5).text))
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options):
                os.environ["SSL_CERT_FILE"] = certificates()("ca.pem")
                for call, data, rest in [
                    (complete, ANSWER[:9], ANSWER[9:]), (stream, STREAM[:200], STREAM[200:]),
                    (complete, b"", ANSWER),
                ]:  # fmt: skip

                    def answer(sock, data=data, rest=rest):
                        sock.sendall(data)
                        time.sleep(0.005)
                        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
                        done = time.monotonic() + 5
                        while not texts and time.monotonic() < done:
                            time.sleep(0.001)
                        sock.sendall(rest)

                    server.script(answer)
                    self.ask(call=call, **options)
                    self.assertEqual([TEXT], texts)
                    texts.clear()
                self.ask(2, **options)

    def test_a_handler_that_calls_at_any_moment_finds_a_consistent_pool(self):
        def handler(*_):
            if not running:
                running.append(True)
                texts.append(complete("x", timeout=5).text)
                running.clear()

        running, texts = [], []
        self.handle(handler)
        with self.serve() as server:
            self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0011)
            self.ask(50)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.assertEqual({TEXT}, set(texts))
            self.assertLessEqual(server.connections, 3)

    def test_ctrl_c_while_waiting_gets_through_and_leaves_no_descriptor_open(self):
        self.handle(signal.default_int_handler)
        before = open_descriptors()
        for scheme, (call, data) in itertools.product(["http", "https"], self.WAITS[2:6]):
            interrupt, raises = self.interrupt(len(data)), self.assertRaises(KeyboardInterrupt)
            with self.each(scheme, hang(data)) as (_, options), interrupt, raises:
                list(call("x", retries=0, timeout=2, **options))
        self.assertEqual(before, open_descriptors())


# The transport: connecting, and the limits of time


NO_CAS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # for what fails before: it takes no time to make


class ConnectTests(TestCase):
    def addresses(self, *urls):
        """Have a name looked up lead to the addresses of these URLs, from now on."""
        found = [(urlsplit(url).hostname, urlsplit(url).port) for url in urls]
        lookup = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]
        patch = mock.patch.object(socket, "getaddrinfo", return_value=lookup)
        self.addCleanup(patch.stop)
        return patch.start()

    def test_a_dead_first_address_leaves_time_for_the_next(self):
        with contextlib.ExitStack() as stack:
            full = listener(stack, backlog=0)
            for scheme, limits in [("http", {"timeout": 0.05}), ("https", {"total_timeout": 0.1})]:
                with self.each(scheme) as (server, options), self.within(1):
                    lookup = self.addresses(full, server.url)
                    url = f"{scheme}://localhost:9"
                    self.ask(2, server_url=url, **limits, **options)
                    lookup.assert_called_once_with("localhost", 9, type=socket.SOCK_STREAM)
                    self.assertEqual((2, 1), (len(server.requests), server.connections))

    def test_an_address_that_refuses_costs_no_retry(self):
        with self.serve() as closed:
            pass
        with self.serve() as server:
            self.addresses(closed.url, closed.url, server.url)
            self.ask(server_url="http://friendli.invalid")

    def test_the_handshake_has_the_time_that_connecting_left(self):
        clock = mock.Mock(return_value=0.0)
        connect = friendli_lite._Connection._connect

        def connect_late(connection, *address):
            connect(connection, *address)
            clock.return_value += friendli_lite._MAX_CONNECT_SECONDS - 0.02

        with contextlib.ExitStack() as stack:
            stack.enter_context(self.within(2))
            patch = mock.patch.object(friendli_lite._Connection, "_connect", connect_late)
            stack.enter_context(patch)
            call, _ = prepared(listener(stack).replace("http", "https"), 0, clock=clock)
            call.ssl_context = NO_CAS
            error = outcome_of(call)
        self.check_error(APITimeoutError, error, "cannot connect within 10 s")

    def test_an_error_without_a_text_is_named_by_its_class(self):
        with mock.patch.object(socket, "getaddrinfo", side_effect=OSError):
            error = self.failure(APIConnectionError)
        self.check_error(APIConnectionError, error, "cannot connect: OSError; is the server up?")

    def test_each_address_has_a_share_of_the_time_that_is_left(self):
        clock = mock.Mock(return_value=0.0)
        ipv6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 3))
        ipv4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 80))

        def time_out(address):
            clock.return_value += sock.settimeout.call_args[0][0]
            raise socket.timeout("timed out")

        for total_timeout, lookup, shares, limit in [
            (60.0, [ipv6], [10.0], "10 s (the limit for connecting)"),
            (60.0, [ipv6, ipv4], [2.5, 7.5], "10 s (the limit for connecting)"),
            (60.0, [ipv6, ipv4, ipv4], [2.5, 2.5, 5.0], "10 s (the limit for connecting)"),
            (60.0, [ipv4] * 5, [2.0, 2.0, 2.0, 2.0, 2.0], "10 s (the limit for connecting)"),
            (3.0, [ipv6, ipv4], [1.5, 1.5], "3 s (total_timeout)"),
            (3.0, [ipv6, ipv4, ipv4], [1.0, 1.0, 1.0], "3 s (total_timeout)"),
        ]:
            clock.return_value = 0.0
            call, _ = prepared("http://friendli.invalid", 0, total_timeout, clock=clock)
            with self.case(total_timeout, shares), mock.patch.object(socket, "socket") as sockets:
                sock = sockets.return_value
                sock.connect.side_effect = time_out
                looked_up = mock.patch.object(socket, "getaddrinfo", return_value=lookup)
                with looked_up, self.assertRaises(APITimeoutError) as caught:
                    call.complete()
                self.assertIn(f": cannot connect within {limit}; ", str(caught.exception))
                waited, connected, made = (
                    [args for args, _ in method.call_args_list]
                    for method in (sock.settimeout, sock.connect, sockets)
                )
                self.assertEqual(shares, [round(seconds, 9) for (seconds,) in waited])
                self.assertEqual([(item[-1],) for item in lookup], connected)
                self.assertEqual([item[:3] for item in lookup], made)
                self.assertEqual(len(lookup), sock.close.call_count - 1)

    def test_a_timeout_of_the_network_leaves_the_rest_to_the_next_address(self):
        with self.serve() as server:
            self.addresses(server.url, server.url)
            connect = socket.socket.connect
            errors = [TimeoutError(errno.ETIMEDOUT, "Connection timed out"), None]

            def fail_first(sock, address):
                error = errors.pop(0)
                if error is not None:
                    raise error
                connect(sock, address)

            with mock.patch.object(socket.socket, "connect", fail_first):
                self.ask()

    def test_what_a_handler_raises_leaves_out_the_next_address(self):
        for error in (TimeoutError("mine"), ValueError("mine"), KeyboardInterrupt()):
            with self.case(repr(error)), self.serve() as server:
                self.addresses(server.url, server.url)
                patch = mock.patch.object(socket.socket, "connect", side_effect=error)
                with patch as connect, self.assertRaises(type(error)) as caught:
                    complete("x")
                self.assertIs(error, caught.exception)
                self.assertEqual((1, 0), (connect.call_count, server.connections))

    def test_all_addresses_dead_is_the_error_of_the_last_and_none_is_said(self):
        with self.serve() as server:
            pass
        for urls, words in [([server.url] * 3, "refused"), ([], "the name has no address")]:
            with self.case(words):
                lookup = self.addresses(*urls)
                retries = RetryConfig(1, initial_delay=0)
                error = self.failure(APIConnectionError, retries=retries)
                self.assertRegex(str(error), f": cannot connect: .*{words}; is the server up")
                self.assertEqual((2, 2), (error.attempts, lookup.call_count))

    def test_a_name_that_is_not_known_is_an_error_of_the_connection(self):
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch.object(socket, "getaddrinfo", side_effect=unknown):
            error = self.failure(APIConnectionError, server_url="http://friendli.invalid")
        self.check_error(APIConnectionError, error, "Name or service not known; is the server up?")

    def test_the_default_ports_are_80_and_443(self):
        with mock.patch.object(socket, "getaddrinfo", return_value=[]) as lookup:
            for url in ("http://h", "https://h", "https://h:8443", "http://[::1]", "http://H.:1"):
                self.failure(APIConnectionError, server_url=url, ssl_context=NO_CAS)
            os.environ["HTTPS_PROXY"] = "http://proxy"
            self.failure(APIConnectionError, server_url="https://h", ssl_context=NO_CAS)
        asked = [args for args, _ in lookup.call_args_list]
        expected = [("h", 80), ("h", 443), ("h", 8443), ("::1", 80), ("h.", 1), ("proxy", 80)]
        self.assertEqual(expected, asked)

    def test_no_server_is_an_error_that_says_where_and_what_to_check(self):
        with self.serve() as server:
            pass
        for call in MEDIA_TYPES:
            error = self.failure(APIConnectionError, call, retries=AT_ONCE)
            words = "refused", "check server_url", "after 4 attempts"
            self.check_error(APIConnectionError, error, server.url, *words)

    def test_faults_of_this_machine_are_not_tried_again(self):
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM):
            fault = OSError(number, os.strerror(number))
            patch = mock.patch.object(socket, "socket", side_effect=fault)
            with self.case(fault), patch as sockets:
                error = self.failure(APIConnectionError, retries=3, server_url="http://127.0.0.1:9")
                words = f"cannot connect: {os.strerror(number)}; this machine is at fault"
                self.check_error(APIConnectionError, error, words)
                self.assertEqual((1, 1), (error.attempts, sockets.call_count))


class TimeoutTests(TestCase):
    def silences(self, stack):
        """Cases in which no byte comes, in every phase, by either limit."""
        cut = "the response was cut short: "
        answers = [
            ("no word", complete, "no response: ", b""),
            ("half a head", complete, cut, b"HTTP/1.1 200 OK\r\nContent-"),
            ("an interim head", complete, cut, head(103)),
            ("a head", complete, cut, JSON_HEAD),
            ("half a body", complete, cut, JSON_HEAD + b"{"),
            ("the head of a stream", stream, cut, STREAM_HEAD),
            ("an event", stream, cut, ONE_EVENT),
            ("half a chunk", stream, cut, STREAM_HEAD + b"ff\r\ndata: "),
            ("half a chunk size", stream, cut, STREAM_HEAD + b"f"),
        ]
        quiet, full = listener(stack), listener(stack, backlog=0)
        https = quiet.replace("http", "https")
        for limits, received, connected in [
            ({"timeout": 0.04}, "no data received for timeout=0.04 s", r"0\.04 s \(timeout\)"),
            ({"total_timeout": 0.04}, "", r"0(\.\d+)? s \(total_timeout\)"),
        ]:
            for name, call, what, data in answers:
                words = received and what + received
                sent = threading.Event()
                server = self.serve(hang(data, sent))
                self.sent[urlsplit(server.url).netloc] = sent
                yield name, server.url, call, words, limits
            connected = "cannot connect within " + connected
            options = {**limits, "ssl_context": NO_CAS}
            yield "a handshake", https, complete, connected, options
            yield "connecting", full, complete, connected, limits
            words = received and f"not be sent: {received.replace('received', 'accepted')}"
            options = {**limits, "prompt": "x" * 3_000_000}
            yield "an upload", quiet, complete, words, options
        limits = {"timeout": 0.02, "total_timeout": 0.05}
        limits["retries"] = RetryConfig(9, initial_delay=0, retry_timeouts=True)
        yield "retries", quiet, stream, "", limits

    def trickles(self):
        """Cases in which bytes come too slowly: total_timeout bounds what is no silence."""
        cases = [
            ("a status line", complete, b"HTTP/1.1 200 ", b"O"),
            ("a header", complete, OK + b"A: ", b"a"),
            ("interim responses", complete, head(103), head(103)),
            ("a body", complete, JSON_HEAD, b" "),
            ("trailers", complete, CHUNKED_JSON_HEAD + chunked(ONE)[:-2] + b"X: ", b"y"),
            ("a stream", stream, STREAM_HEAD, b"1\r\nd\r\n"),
            ("a chunk size", stream, STREAM_HEAD, b"0"),
            ("comments", stream, STREAM_HEAD, chunked(b": ping\n\n")[:-5]),
            ("events", stream, STREAM_HEAD, A_CHUNK),
        ]
        limits = {"timeout": 5, "total_timeout": 0.05}
        for name, call, start, more in cases:
            yield name, self.serve(trickle(start, more)).url, call, "", limits
        if shutil.which("openssl"):
            server = self.serve(trickle(JSON_HEAD, b" "), tls=server_tls())
            options = {**limits, "ssl_context": client_tls()}
            yield "over TLS", server.url, complete, "", options

    def test_a_call_waits_no_longer_than_it_was_told_in_any_phase(self):
        """All at once; each must take as long as its limit says.

        A server may be late on a busy machine, so no reading begins before it has fallen silent.
        """
        self.sent, receive = {}, friendli_lite._Connection.receive

        def receive_when_sent(connection, may_end=False):
            _, host, *_ = connection.route
            if host in self.sent:
                self.sent[host].wait(10)
            return receive(connection, may_end)

        def run(name, url, call, words, options):
            start = time.monotonic()
            _, error = outcome(call, server_url=url, **options)
            return time.monotonic() - start, error

        with contextlib.ExitStack() as stack:
            cases = [*self.silences(stack), *self.trickles()]
            reading = mock.patch.object(friendli_lite._Connection, "receive", receive_when_sent)
            stack.enter_context(reading)
            futures = [WORKERS.submit(run, *case) for case in cases]
            for (name, _, _, words, options), future in zip(cases, futures):
                limit = options.get("total_timeout") or options["timeout"]
                with self.subTest(name, limit=limit):
                    elapsed, error = future.result()
                    self.check_error(APITimeoutError, error)
                    self.assertTrue(re.search(words, str(error)), error)
                    self.assertTrue(limit - 0.005 < elapsed < limit + 2, f"{elapsed} s: {error}")

    def test_no_limit_is_no_limit(self):
        with self.serve():
            self.ask(2, timeout=None)
            self.ask(timeout=float("inf"), total_timeout=float("inf"))

    def test_a_spent_total_timeout_sends_nothing(self):
        with self.serve() as server:
            for call, seconds in itertools.product(MEDIA_TYPES, [0, -1.5]):
                error = self.failure(APITimeoutError, call, total_timeout=seconds, retries=3)
                words = f"the request was not sent: total_timeout={seconds} s was spent"
                self.check_error(APITimeoutError, error, words)
                self.assertEqual(0, error.attempts)
            self.assertEqual(0, server.connections)


class RawServer(StandInContainer):
    """A server that leaves all to one function of the connected socket, also the request."""

    def __init__(self, answer, scheme="http"):
        self._answer = answer
        super().__init__(tls=server_tls() if scheme == "https" else None)

    def _serve(self, sock):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
                stack.callback(sock.close)
            self._answer(sock)


class UploadTests(TestCase):
    def test_a_response_to_an_upload_that_the_server_stopped_reading_is_read(self):
        """A server answers 413, and closes, before it has read 2 MB."""

        def refuse(sock):
            sock.recv(1000)
            sock.sendall(json_answer({"error": "too large"}, 413, Connection="close"))
            time.sleep(0.01)

        for scheme in ("http", "https"):
            with self.case(scheme), RawServer(refuse, scheme) as server:
                options = {"prompt": "x" * 2_000_000, "server_url": server.url, "retries": 3}
                if scheme == "https":
                    options["ssl_context"] = client_tls()
                error = self.failure(APIStatusError, **options)
                self.assertEqual((413, "too large"), (error.status_code, error.message))
                self.assertEqual((1, 1), (error.attempts, server.connections))

    def test_so_it_is_whatever_sending_raises(self):
        """Python 3.10 to 3.12 raise SSLEOFError where others raise BrokenPipeError."""
        refusal = json_answer({"error": "too large"}, 413)
        ready_socket = friendli_lite._Connection._ready_socket

        def failing_socket(connection):
            sock = mock.Mock(wraps=ready_socket(connection))
            sock.send.side_effect = lambda data: sock.sendall(data) or throw(error)
            return sock

        for error in (BrokenPipeError(), ConnectionResetError(), ssl.SSLEOFError()):
            with self.case(repr(error)), self.serve(refusal) as server:
                with mock.patch.object(friendli_lite._Connection, "_ready_socket", failing_socket):
                    found = self.failure(APIStatusError)
                self.assertEqual((413, 1), (found.status_code, len(server.requests)))

    @unittest.skipUnless(hasattr(socket, "TCP_NOTSENT_LOWAT"), "the buffer hides what was not sent")
    def test_a_slow_line_shows_progress_over_http_and_https(self):
        """It takes 16 KiB in 0.028 s: a larger piece, or a buffer that hides it, takes too long."""
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
            options = {"ssl_context": client_tls()} if scheme == "https" else {}
            with RawServer(read_slowly, scheme) as server:
                server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                return outcome(complete, "x" * size, server_url=server.url, timeout=0.11, **options)

        schemes = ["http", "https"] if shutil.which("openssl") else ["http"]
        with ThreadPoolExecutor(2) as threads:
            for scheme, found in zip(schemes, threads.map(upload, schemes)):
                with self.subTest(scheme):
                    self.assertEqual(([TEXT], None), found)


# The transport: proxies


class ProxyTests(TestCase):
    def through(self, url, user_password=""):
        """Have all calls go through a proxy, from now on."""
        url = url.replace("//", f"//{user_password}@") if user_password else url
        os.environ.update(HTTP_PROXY=url, HTTPS_PROXY=url)

    def test_http_is_forwarded_and_https_tunnelled_over_one_connection(self):
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options), Proxy() as proxy:
                self.through(proxy.url)
                for call in MEDIA_TYPES:
                    self.ask(3, call, **options)
                self.assertEqual((6, 1), (len(server.requests), proxy.connections))
                tokens = {request.headers["authorization"] for request in server.requests}
                self.assertEqual({f"Bearer {TOKEN}"}, tokens)
                first = proxy.requests[0]
                if scheme == "http":
                    self.assertEqual(f"{server.url}/v1/completions", first.path)
                else:
                    target = f"127.0.0.1:{server.port}"
                    self.assertEqual(("CONNECT", target), (first.method, first.path))
                    self.assertEqual({"host": target}, first.headers)
                    self.assertEqual("/v1/completions", server.requests[0].path)
                    self.assertGreater(len(proxy.seen), 1000)
                    self.assertNotIn(TOKEN.encode(), proxy.seen)

    def test_user_and_password_are_for_the_proxy_alone(self):
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options), Proxy("user:päss/w@rd") as proxy:
                self.through(proxy.url, "user:p%C3%A4ss%2Fw%40rd")
                self.ask(2, **options)
                if scheme == "https":
                    self.assertNotIn("proxy-authorization", server.requests[0].headers)
                for wrong in ("", "user:wrong-secret"):
                    self.through(proxy.url, wrong)
                    error = self.failure(APIStatusError, **options)
                    self.assertEqual((407, "who are you?"), (error.status_code, error.message))
                    words = (" through the proxy {} responded", "user and password")
                    if scheme == "https":
                        words = (": the proxy {} responded with 407", "check HTTPS_PROXY")
                    words = [word.format(f"127.0.0.1:{proxy.port}") for word in words]
                    self.check_error(APIStatusError, error, *words)
                    self.assertNotIn("wrong-secret", shown(error))
                self.assertEqual(2, len(server.requests))

    def test_a_tunnel_leads_to_a_host_and_its_port(self):
        with Proxy(refusal=json_answer({}, 502)) as proxy:
            self.through(proxy.url)
            for url, target in [
                ("https://[::1]:8443", "[::1]:8443"), ("https://[::1]", "[::1]:443"),
                ("https://friendli.invalid:", "friendli.invalid:443"),
                ("https://friendli.invalid/a/b", "friendli.invalid:443"),
            ]:  # fmt: skip
                with self.case(url):
                    proxy.requests.clear()
                    self.failure(APIStatusError, server_url=url, ssl_context=NO_CAS)
                    (request,) = proxy.requests
                    self.assertEqual((target, {"host": target}), (request.path, request.headers))

    def test_a_refusal_or_nonsense_is_told_of_the_proxy(self):
        close = json_answer({"error": "no"}, 403, Connection="close")
        cases = [
            (APIStatusError, close, "403 Reason: no"),
            (APIStatusError, json_answer({"error": "no gateway"}, 502), "502 Reason: no gateway"),
            (APIStatusError, json_answer({"error": "no"}, 300), "300 Reason: no"),
            (APIStatusError, head(302, Location="http://login.invalid"), "302 Reason"),
            (APIConnectionError, b"", "no response"),
            (APIResponseError, b"SSH-2.0-OpenSSH\r\n", "SSH-2.0-OpenSSH"),
        ]
        for scheme, (kind, refusal, words) in itertools.product(["http", "https"], cases):
            with self.case(scheme, refusal), Proxy(refusal=refusal) as proxy:
                self.through(proxy.url, "user:wrong-secret")
                url = f"{scheme}://friendli.invalid"
                error = self.failure(kind, server_url=url, ssl_context=NO_CAS)
                self.check_error(kind, error, f"the proxy 127.0.0.1:{proxy.port}", words)
                self.assertNotIn("wrong-secret", shown(error))

    def test_one_that_is_silent_or_down_is_named(self):
        for scheme in ("http", "https"):
            with self.case(scheme), contextlib.ExitStack() as stack:
                self.through(listener(stack))
                options = {"server_url": f"{scheme}://friendli.invalid", "ssl_context": NO_CAS}
                error = self.failure(APITimeoutError, timeout=0.02, **options)
                late = "no data received for timeout=" if scheme == "http" else "within 0.02 s"
                self.check_error(APITimeoutError, error, "through the proxy 127.0.0.1:", late)
                stack.close()
                error = self.failure(APIConnectionError, **options)
                what = "cannot connect through the proxy 127.0.0.1:"
                words = f"refused; check {scheme.upper()}_PROXY"
                self.check_error(APIConnectionError, error, what, words)

    def test_which_variable_names_the_proxy(self):
        a, b, c = "http://a:1", "http://b:2", "http://c:3"
        for variables, *urls in [
            ({}, None, None), ({"HTTP_PROXY": a}, a, None), ({"HTTPS_PROXY": a}, None, a),
            ({"http_proxy": a, "HTTP_PROXY": b}, a, None),
            ({"https_proxy": a, "HTTPS_PROXY": b}, None, a), ({"ALL_PROXY": a}, a, a),
            ({"all_proxy": a, "ALL_PROXY": b}, a, a), ({"HTTP_PROXY": a, "ALL_PROXY": b}, a, b),
            ({"HTTPS_PROXY": a, "all_proxy": b}, b, a),
            ({"HTTP_PROXY": "", "HTTPS_PROXY": "", "ALL_PROXY": ""}, None, None),
            ({"HTTP_PROXY": "", "ALL_PROXY": a}, a, a),
            ({"http_proxy": "", "HTTP_PROXY": a}, None, None),
            ({"all_proxy": "", "ALL_PROXY": a}, None, None),
            ({"DEFAULT_PROXY": a, "default_proxy": a, "ANY_PROXY": a, "FTP_PROXY": a}, None, None),
            ({"HTTP_PROXY": a, "REQUEST_METHOD": "GET"}, None, None),
            ({"http_proxy": a, "REQUEST_METHOD": "GET"}, a, None),
            ({"HTTPS_PROXY": a, "REQUEST_METHOD": "GET"}, None, a),
            ({"HTTP_PROXY": a, "ALL_PROXY": b, "REQUEST_METHOD": ""}, b, b),
            ({"HTTP_PROXY": a, "HTTPS_PROXY": b, "ALL_PROXY": c}, a, b),
        ]:  # fmt: skip
            with self.subTest(variables), mock.patch.dict(os.environ, variables):
                for scheme, url in zip(("http", "https"), urls):
                    proxy = friendli_lite._find_proxy(scheme, "friendli.invalid")
                    self.assertEqual(url, proxy and f"http://{proxy.address}")
                    if proxy is not None:
                        self.assertEqual(url, variables[proxy.source])

    def test_the_forms_of_a_proxy_url(self):
        for url, address, user_password in [
            ("http://a:1", "a:1", None), ("http://a", "a", None), ("a:1", "a:1", None),
            ("HTTP://a.example.org.:1/", "a.example.org.:1", None),
            ("http://[::1]:1", "[::1]:1", None), ("http://user:word@a:1", "a:1", "user:word"),
            ("user:word@a:1", "a:1", "user:word"), ("http://user@a:1", "a:1", "user:"),
            ("http://:word@a:1", "a:1", ":word"), ("http://user:a:b:@a:1", "a:1", "user:a:b:"),
            ("http://us%3Aer:p%40ss%2F%20%C3%A9@a:1", "a:1", "us:er:p@ss/ é"),
        ]:  # fmt: skip
            with self.subTest(url), mock.patch.dict(os.environ, ALL_PROXY=url):
                proxy = friendli_lite._find_proxy("https", "friendli.invalid")
                headers = {}
                if user_password is not None:
                    basic = base64.b64encode(user_password.encode()).decode()
                    headers = {"Proxy-authorization": f"Basic {basic}"}
                self.assertEqual((address, headers), (proxy.address, proxy.headers))
                self.assertNotIn("Basic", repr(proxy))

    def test_a_wrong_proxy_is_a_mistake_that_shows_no_password(self):
        with self.serve() as server:
            at = f"127.0.0.1:{server.port}"
            urls = (
                f"socks5://user:top-secret@{at}|socks5h://{at}|ftp://a|https://user:top-secret@{at}"
                f"|https://{at}|http://user:top-secret/x@{at}|http://user:x@top-secret@{at}"
                f"|http://user:top-secret x@{at}|http://u:/top-secret@{at}|http://u:top-secret"
                "|http://user:top-secret@|http://|//|:1|http://:1|http://%0d%0a:80|http://a:99999"
                "|http://a:x|http://a:1/top-secret|http://a:1?top-secret|http:///a|http://\u212a:1"
                f"|a b| http://a:1|http://a:1\n|http://user:top-secret\n@{at}"
            ).split("|")
            for name, url in itertools.product(("http_proxy", "https_proxy", "all_proxy"), urls):
                for variable in (name, name.upper()):
                    scheme = "https" if name == "https_proxy" else "http"
                    os.environ[variable] = url
                    with self.subTest(url, variable=variable):
                        options = {"server_url": f"{scheme}://{at}", "ssl_context": NO_CAS}
                        error = self.failure(ValueError, **options)
                        self.assertRegex(
                            str(error), rf"\A{variable} must be like http://host:port "
                        )
                        self.assertNotIn("top-secret", shown(error))
                    del os.environ[variable]
            self.assertEqual(0, server.connections)

    def test_no_proxy_as_people_write_it(self):
        for no_proxy, excluded, others in [
            ("", "", "127.0.0.1 localhost"),
            ("localhost,127.0.0.1,::1", "localhost a.localhost 127.0.0.1 [::1] [::1]:9", "[::2]"),
            ("[::1]", "[::1] [::1]:9 [0:0::1]", "[::2]"),
            ("[::1]:9", "[::1]:9", "[::1] [::1]:8"),
            ("0:0:0:0:0:0:0:1", "[::1]", "[::2]"),
            ("10.0.0.0/8", "10.1.2.3 10.255.0.1:9", "11.0.0.1 [::10] 10.example.org"),
            ("10.1.2.3/8", "10.255.0.1", "11.0.0.1"),  # with bits of the host set
            ("fd00::/8", "[fd00::1] [fdff::1]:9", "[fe80::1] 10.0.0.1"),
            ("127.0.0.1:9", "127.0.0.1:9", "127.0.0.1 127.0.0.1:99 127.0.0.2:9"),
            ("example.org:80", "example.org a.example.org:80", "example.org:8080"),
            ("example.org", "example.org example.org. a.example.org a.b.example.org:9", "b.org"),
            (".example.org", "example.org a.example.org EXAMPLE.org", "badexample.org"),
            ("*.example.org", "example.org a.example.org", "badexample.org example.org.uk"),
            ("EXAMPLE.Org.", "example.org a.example.org.", "example.com"),
            ("*", "example.org 127.0.0.1 [::1]:9", ""),
            ("example.org,*", "127.0.0.1 b.invalid", ""),
            ("a.invalid  example.org\tlocalhost", "example.org localhost", "b.invalid"),
            (" a.invalid , ,example.org,", "example.org", "b.invalid"),
            ("*:9", "127.0.0.1:9 a.invalid:9", "127.0.0.1 a.invalid"),
            ("1, 7.0.0.1, .0.0.1, 0.0.1, *.0.0.1", "", "127.0.0.1"),
            ("ocalhost, ample.org, a.example.org", "", "localhost example.org b.a-example.org"),
            ("http://example.org, [::1, ::1]", "", "example.org [::1]"),
            ("10.0.0.0/99, ::1/999, /8, /", "", "10.0.0.1 [::1] example.org"),
        ]:
            os.environ["NO_PROXY"] = no_proxy
            for host in f"{excluded} {others}".split():
                with self.subTest(no_proxy, host=host):
                    is_excluded = friendli_lite._is_excluded("http", host)
                    self.assertIs(host in excluded.split(), is_excluded)
        os.environ["NO_PROXY"] = "a.invalid:443"
        self.assertTrue(friendli_lite._is_excluded("https", "a.invalid"))
        self.assertFalse(friendli_lite._is_excluded("http", "a.invalid"))
        for lower, is_excluded in [("a.invalid:443", True), ("b.invalid", False), ("", False)]:
            os.environ["no_proxy"] = lower
            self.assertIs(is_excluded, friendli_lite._is_excluded("https", "a.invalid"))

    def test_an_excluded_proxy_sees_nothing_from_the_next_call_on(self):
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options), Proxy() as proxy:
                self.through(proxy.url)
                here = f"127.0.0.1:{server.port}"
                for no_proxy, connections in [
                    ("127.0.0.1", 0), ("::1 127.0.0.1", 0), ("127.0.0.0/8", 0), ("a.invalid,*", 0),
                    (here, 0), ("127.0.0.1:9, 7.0.0.1, ocalhost", 1), ("", 1), ("*", 1),
                ]:  # fmt: skip
                    os.environ["NO_PROXY"] = no_proxy
                    self.ask(**options)
                    self.assertEqual(connections, proxy.connections, no_proxy)
                self.assertEqual(8, len(server.requests))

    def test_a_variable_that_changes_is_seen_at_the_next_call(self):
        with self.serve() as server, Proxy() as one, Proxy() as other:
            for name, value, seen in [
                ("X", "", [0, 0]), ("ALL_PROXY", one.url, [1, 0]),
                ("HTTP_PROXY", other.url, [1, 1]), ("REQUEST_METHOD", "GET", [2, 1]),
                ("http_proxy", other.url, [2, 2]), ("DEFAULT_PROXY", one.url, [2, 3]),
                ("http_proxy", "", [3, 3]), ("ALL_PROXY", "", [3, 3]),
            ]:  # fmt: skip
                os.environ[name] = value
                self.ask()
                self.assertEqual(seen, [len(one.requests), len(other.requests)], name)
            self.assertEqual(8, len(server.requests))

    def test_the_systems_settings_count_without_variables_and_are_read_once(self):
        forget = friendli_lite._system_proxy.cache_clear
        self.addCleanup(forget)
        functions = ["getproxies_macosx_sysconf", "getproxies_registry"]
        for scheme, function in itertools.product(["http", "https"], functions):
            with self.each(scheme) as (_, options), Proxy() as proxy:
                settings = mock.Mock(return_value={scheme: proxy.url, "ftp": "ftp://x"})
                bypass = mock.Mock(return_value=False)
                patches = {function: settings, "proxy_bypass": bypass, "create": True}
                with mock.patch.multiple(friendli_lite.urllib.request, **patches):
                    for is_bypassed in (False, True):
                        forget()
                        friendli_lite._pool.close()
                        bypass.return_value = is_bypassed
                        self.ask(2, **options)
                        self.assertEqual(1, proxy.connections)
                        read = settings.call_count
                        self.ask(**options)
                        self.assertEqual(read, settings.call_count)
                    forget()
                    settings.return_value = {}
                    self.ask(2, **options)
                    self.assertEqual((1, read + 1), (proxy.connections, settings.call_count))
                    settings.return_value = {scheme: "http://nowhere.invalid"}
                    forget()
                    with mock.patch.dict(os.environ, ALL_PROXY=proxy.url):
                        self.ask(**options)
                    self.assertEqual(read + 1, settings.call_count)

    def test_an_error_of_a_proxy_of_the_systems_settings_says_so(self):
        self.addCleanup(friendli_lite._system_proxy.cache_clear)
        friendli_lite._system_proxy.cache_clear()
        with contextlib.ExitStack() as stack:
            url = listener(stack)
        settings = {"getproxies_macosx_sysconf": lambda: {"http": url}, "create": True}
        with mock.patch.multiple(friendli_lite.urllib.request, **settings):
            error = self.failure(APIConnectionError, server_url="http://friendli.invalid")
        self.check_error(APIConnectionError, error, "refused; check the system's proxy settings")

    def test_a_password_is_sent_byte_for_byte(self):
        for password, sent in (
            ("a\udce4", b"a\xe4"),
            ("%E4%C3%A9", b"\xe4\xc3\xa9"),
            ("\xe9", b"\xc3\xa9"),
        ):
            with self.subTest(ascii(password)):
                os.environ["http_proxy"] = f"http://user:{password}@127.0.0.1:9"
                (credentials,) = friendli_lite._find_proxy("http", "a.invalid").headers.values()
                self.assertEqual(b"user:" + sent, base64.b64decode(credentials.partition(" ")[2]))

    def test_no_proxy_excludes_from_the_systems_proxy_too(self):
        self.addCleanup(friendli_lite._system_proxy.cache_clear)
        friendli_lite._system_proxy.cache_clear()
        settings = {"http": "http://127.0.0.1:3128"}
        patch = functools.partial(mock.patch.object, friendli_lite.urllib.request, create=True)
        with patch("getproxies_registry", lambda: settings), patch("proxy_bypass", lambda host: 0):
            for no_proxy, is_excluded in (("10.0.0.0/8", True), ("11.0.0.0/8", False)):
                os.environ["NO_PROXY"] = no_proxy
                found = friendli_lite._find_proxy("http", "10.1.2.3:80")
                self.assertEqual(is_excluded, found is None)

    def test_a_cgi_scripts_client_sets_no_proxy_on_windows_either(self):
        os.environ["REQUEST_METHOD"] = "POST"
        self.assertFalse(friendli_lite._is_httpoxy("http_proxy"))
        self.assertTrue(friendli_lite._is_httpoxy("HTTP_PROXY"))
        with mock.patch.object(os, "name", "nt"):
            self.assertTrue(friendli_lite._is_httpoxy("http_proxy"))
            self.assertFalse(friendli_lite._is_httpoxy("HTTPS_PROXY"))

    def test_a_connection_that_got_no_tunnel_serves_no_call(self):
        with Proxy(refusal=json_answer({}, 407)) as proxy:
            self.through(proxy.url)
            self.failure(APIStatusError, server_url="https://friendli.invalid")
            self.assertEqual([], list(friendli_lite._pool._idle))


# The transport: TLS


class TLSTests(TestCase):
    def test_a_refused_certificate_is_not_tried_again_and_the_advice_fits(self):
        untrusted = "pass ssl_context, or name a file with its CA"
        elsewhere = "not valid for '127.0.0.1'", "check the host in server_url"
        for name, context, reason, hint in [
            ("self-signed", client_tls(), "self[- ]signed", untrusted),
            ("elsewhere", client_tls(), *elsewhere),
            ("expired", client_tls(), "expired", "check this machine's clock"),
            ("server", None, "unable to get|self[- ]signed", untrusted),
        ]:
            with self.case(name), self.serve(tls=server_tls(name)) as server:
                error = self.failure(APIConnectionError, ssl_context=context, retries=3)
                self.assertRegex(str(error), f"cannot connect: TLS failed: .*({reason}).*; {hint}")
                self.assertEqual((1, 1), (error.attempts, server.connections))
                self.assertEqual([], server.requests)

    def test_a_server_that_speaks_no_tls_is_told_and_not_tried_again(self):
        for answer in (b"HTTP/1.1 400 Bad\r\n\r\n", b"SSH-2.0-OpenSSH_9.9\r\n", b"nonsense" * 9):
            with self.case(answer), RawServer(hang(answer)) as server:
                options = {"server_url": server.url.replace("http", "https"), "retries": 3}
                error = self.failure(APIConnectionError, ssl_context=NO_CAS, **options)
                words = "the server does not speak TLS, try http://"
                self.check_error(APIConnectionError, error, words)
                self.assertNotIn("CA", str(error).partition("cannot connect")[2])
                self.assertEqual((1, 1), (error.attempts, server.connections))

    def test_a_server_that_leaves_in_the_handshake_is_tried_again(self):
        def rst_in_the_handshake(sock):
            sock.recv(1)  # a RST before it makes wrap_socket() of Python leave a socket open
            rst(sock)

        retries = RetryConfig(1, initial_delay=0)
        for answer in (fin, rst_in_the_handshake):
            with self.case(answer.__name__), RawServer(answer) as server:
                url = server.url.replace("http", "https")
                options = {"server_url": url, "retries": retries, "ssl_context": NO_CAS}
                error = self.failure(APIConnectionError, **options)
                self.check_error(APIConnectionError, error, "cannot connect: ", "is the server up?")
                self.assertEqual((2, 2), (error.attempts, server.connections))

    def test_a_client_certificate_is_shown_where_one_is_asked_for(self):
        path, context = certificates(), client_tls()
        with self.serve(tls=server_tls(client_ca=path("ca.pem"))) as server:
            self.failure(APIConnectionError, ssl_context=context)
            self.assertEqual([], server.requests)
            context.load_cert_chain(path("elsewhere.pem"), path("elsewhere.key"))
            self.ask(3, ssl_context=context)
            self.assertEqual(2, server.connections)

    def test_a_trailing_dot_is_not_part_of_the_name_in_tls(self):
        names = []
        tls = server_tls()
        tls.sni_callback = lambda sock, name, context: names.append(name)
        with self.serve(tls=tls) as server:
            address = socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port)
            with mock.patch.object(socket, "getaddrinfo", return_value=[address]) as lookup:
                for host in ("localhost", "localhost."):
                    self.ask(server_url=f"https://{host}:{server.port}", ssl_context=client_tls())
        self.assertEqual(
            ["localhost", "localhost."], [args[0] for args, _ in lookup.call_args_list]
        )
        self.assertEqual(["localhost", "localhost"], names)
        self.assertEqual(f"localhost.:{server.port}", server.requests[1].headers["host"])

    def default_context(self):
        """Have the default context built anew, in this test and in the next."""
        self.addCleanup(friendli_lite._default_ssl_context.cache_clear)
        friendli_lite._default_ssl_context.cache_clear()
        build = mock.patch.object(ssl, "create_default_context", wraps=ssl.create_default_context)
        self.addCleanup(build.stop)
        return build.start()

    def test_the_default_context_is_built_once_and_for_https_alone(self):
        def answer(sock):
            protocols.append(sock.selected_alpn_protocol())
            sock.sendall(ANSWER)

        protocols = []
        build = self.default_context()
        os.environ["SSL_CERT_FILE"] = certificates()("ca.pem")
        with self.serve():
            self.ask()
        self.assertEqual(0, build.call_count)
        tls = server_tls()
        tls.set_alpn_protocols(["h2", "http/1.1"])
        with self.serve(answer, tls=tls), ThreadPoolExecutor(8) as threads:
            self.ask()
            list(threads.map(lambda _: self.ask(2), range(8)))
        self.assertEqual((1, ["http/1.1"]), (build.call_count, protocols))

    def test_other_variables_make_another_default_context(self):
        def context():
            variables = map(os.environ.get, friendli_lite._CA_VARIABLES)
            return friendli_lite._default_ssl_context(*variables)

        path = certificates()
        self.default_context()
        with self.serve(tls=server_tls()):
            for name, value in [("SSL_CERT_FILE", path("ca.pem")), ("SSL_CERT_DIR", path("."))]:
                before = context()
                os.environ[name] = value
                self.ask()
                self.assertIsNot(before, context())

    def test_a_missing_file_of_cas_is_said_and_read_once_it_is_there(self):
        path = certificates()
        for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            build = self.default_context()
            late = os.path.join(tempfile.mkdtemp(dir=path(".")), "late")
            with self.case(variable), self.serve(tls=server_tls()) as server:
                os.environ[variable] = late
                error = self.failure(APIConnectionError, retries=3)
                words = f"; {variable} names {late}, which cannot be opened"
                self.check_error(APIConnectionError, error, "CERTIFICATE_VERIFY_FAILED", words)
                self.assertEqual((1, 1), (error.attempts, server.connections))
                if variable == "SSL_CERT_FILE":
                    shutil.copy(path("ca.pem"), late)
                    self.ask()
                    self.assertEqual(2, build.call_count)
                del os.environ[variable]

    def test_such_a_file_is_not_blamed_where_it_does_not_matter(self):
        os.environ["SSL_CERT_FILE"] = "/no/such/file"
        with self.serve(tls=server_tls("expired")):
            error = self.failure(APIConnectionError, ssl_context=client_tls())
            self.assertNotIn("SSL_CERT_FILE", str(error))
        with self.serve() as server:
            pass
        error = self.failure(APIConnectionError, server_url=server.url.replace("http", "https"))
        self.assertNotIn("SSL_CERT_FILE", str(error))

    def test_a_file_of_cas_without_a_certificate_is_named(self):
        self.default_context()
        os.environ["SSL_CERT_FILE"] = __file__
        with self.serve(tls=server_tls()):
            error = self.failure(APIConnectionError, retries=3)
        self.check_error(APIConnectionError, error, "name a file with its CA in SSL_CERT_FILE")

    @unittest.skipUnless(hasattr(ssl.SSLContext, "keylog_filename"), "this Python logs no keys")
    def test_a_file_for_keys_that_cannot_be_opened_is_named(self):
        with self.serve() as server:
            url = server.url.replace("http", "https")
            path = os.environ["SSLKEYLOGFILE"] = os.path.join(HERE, "no", "such", "folder")
            self.default_context()
            error = self.failure(APIConnectionError, server_url=url, retries=3)
            words = f"; SSLKEYLOGFILE names {path}, which cannot be opened"
            self.check_error(APIConnectionError, error, words)
            self.assertEqual((1, 0), (error.attempts, server.connections))
            del os.environ["SSLKEYLOGFILE"]  # or a server cannot use TLS

    def test_a_default_context_that_could_not_be_built_is_built_anew(self):
        build = self.default_context()
        os.environ["SSL_CERT_FILE"] = certificates()("ca.pem")
        with self.serve(tls=server_tls()) as server:
            fault = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            with mock.patch.object(socket, "getaddrinfo", side_effect=fault):
                error = self.failure(APIConnectionError, retries=3)
            self.check_error(APIConnectionError, error, "this machine is at fault")
            self.ask()
            self.assertEqual((2, 1), (build.call_count, server.connections))


# Error texts


class MessageTests(TestCase):
    JSON = [
        ('{"detail": "no such model"}', "no such model"),
        ('{"detail": [{"loc": ["body", "prompt"], "msg": "is null", "type": "type"}, "more"]}',
         "body.prompt: is null; more"),
        (
            '{"detail": [{"loc": ["body", "stop", 0], "msg": "no string"}]}',
            "body.stop.0: no string",
        ),
        ('{"detail": [{"loc": "body", "msg": "no list"}]}', "no list"),
        ('{"detail": {"error": "deep"}}', "deep"),
        ('{"error": {"message": "overloaded", "code": 3}}', "overloaded"),
        ('{"error": "overloaded", "code": 3}', "overloaded"),
        ('{"error": {"code": 3}, "message": "outer"}', "outer"),
        ('{"error": {"message": "a", "details": [{"reason": "B"}]}}', "B: a"),
        ('{"message": "spent"}', "spent"),
        ('{"message": ["too long", "too many"]}', "too long; too many"),
        ('{"Message": "User is not authorized"}', "User is not authorized"),
        ('{"__type": "x#Throttled", "message": "Rate exceeded"}', "Rate exceeded"),
        ('{"Error": {"Code": "AccessDenied", "Message": "no"}}', "no"),
        ('{"errors": [{"message": "prompt too long"}]}', "prompt too long"),
        ('{"success": false, "errors": [{"code": 1, "message": "a"}, {"message": "b"}]}', "a; b"),
        ('{"errors": [{"title": "a", "detail": "b"}]}', "a: b"),
        ('{"errors": "spent"}', "spent"),
        ('{"fault": {"faultstring": "quota used up"}}', "quota used up"),
        ('{"errorMessage": "boom", "errorType": "X"}', "boom"),
        ('{"error_message": "boom"}', "boom"), ('{"msg": "boom"}', "boom"),
        ('{"description": "boom"}', "boom"),
        ('{"status": "Failure", "reason": "Forbidden"}', "Forbidden"),
        ('{"title": "model is loading", "status": 403}', "model is loading"),
        ('{"type": "https://a/b", "title": "No credit", "detail": "It is 30", "status": 403}',
         "No credit: It is 30"),
        ('{"error": "invalid_grant", "error_description": "expired"}', "invalid_grant: expired"),
        ('{"error": "twice", "message": "twice"}', "twice"),
        ('{"error": {"code": "content_filter"}}', "content_filter"),
        ('{"error": {"type": "overloaded"}}', "overloaded"),
        ('{"error": {"message": "", "type": "overloaded", "param": null}}', "overloaded"),
        ('{"errors": [{"code": 7}]}', "7"), ('{"fault": {"code": "E1"}}', "E1"),
        ('{"code": "E42"}', "E42"), ('{"error": null, "message": "m"}', "m"),
        ('{"error": true, "message": "m"}', "m"),
        ('[{"error": {"code": 429, "message": "exhausted"}}]', "exhausted"),
        ('" text "', "text"), ("3", "3"),
        *((text, "") for text in ("[]", "{}", "null", "false", '""')),
        # Where no known key has a text, the JSON itself
        *((text, text) for text in ('{"a": "b"}', '{"error": []}', '{"error": {"a": 1}}', "true")),
        ('{"errors": {"prompt": ["too long"]}}', '{"errors": {"prompt": ["too long"]}}'),
        ("[" * 5000, "[" * 5000), ('{"error":' * 5000, '{"error":' * 5000),
        ('{"error": 1' + "0" * 5000, '{"error": 1' + "0" * 5000),
    ]  # fmt: skip
    HTML = [
        ("", ""), ("plain\r\n text", "plain text"), ("1 < 2 and 3 > 2 <3", "1 < 2 and 3 > 2 <3"),
        ("<html><title>502</title><p>Bad Gateway</p></html>", "502 Bad Gateway"),
        ("<!DOCTYPE html><!-- <p>no --><p\nclass='a'>yes<br/>and</p>", "yes and"),
        ("<style>a > b {}</style>a<SCRIPT src=x>if (a<b) {}</script >b", "a b"),
        ("<script>\na\n</script>\n<!--\nb\n-->\n<p\n>c", "c"),
        ("a<script>never ends", "a"), ("a<!-- never ends", "a"), ("a<styled>b</styled>", "a b"),
        ("caf&eacute; &#8364; &#x20AC; &lt;b&gt; &amp;lt; a&nbsp;b", "café € € <b> &lt; a b"),
        ("AT&T &bogus; &", "AT&T &bogus; &"),
        ('<?xml version="1.0"?><Error><Code>Denied</Code><Message>No</Message></Error>',
         "Denied No"),
    ]  # fmt: skip

    def test_the_message_is_found_in_json_of_any_form(self):
        for body, message in self.JSON:
            with self.subTest(body[:80]):
                self.assertEqual(message, friendli_lite._error_message(body))

    def test_the_message_of_a_web_page_is_what_a_person_reads(self):
        for body, message in self.HTML:
            with self.subTest(body):
                text = friendli_lite._error_message(body)
                self.assertEqual(message, friendli_lite._one_line(text))

    def test_a_message_is_found_by_its_keys_in_their_order_each_text_once(self):
        payload = [{"B": "2", "a": "1", "c": "1"}, None, {"loc": [1], "a": 0}, {"loc": [1]}, ["x"]]
        found = friendli_lite._find_message(payload, ["a", "b", "c"])
        self.assertEqual("1: 2; 1: 0; x", found)

    def test_a_message_is_short_and_on_one_line(self):
        for text, line in [
            (" quota\n\tspent\u001b[31m\u2028! ", "quota spent [31m !"),
            ("x" * 500, "x" * 500), ("x" * 501, "x" * 500 + "..."),
            ("\0" * 3000 + "x" * 2000, "x" * 500 + "..."), ("é\U0001f600", "é\U0001f600"),
        ]:  # fmt: skip
            with self.subTest(text[:20]):
                self.assertEqual(line, friendli_lite._one_line(text))

    def test_a_page_is_decoded_by_its_bom_or_the_charset_that_is_named(self):
        text = "价格 é"
        for data, content_type, decoded in [
            ("价格".encode("gbk"), "text/html; charset=gbk", "价格"),
            ("价格".encode("gbk"), 'text/html;CHARSET = "GB2312"; a=b', "价格"),
            ("价格".encode("gbk") + b"\xff", "text/html; charset=gbk", "价格\ufffd"),
            (b"caf\xe9", "text/plain; charset=latin-1", "café"),
            (b"caf\xe9", "text/plain; charset='ISO-8859-1'", "café"),
            (b"caf\xe9", "text/plain", "caf\ufffd"),
            ("日本".encode("shift_jis"), "text/html; charset=Shift_JIS", "日本"),
            (text.encode(), "", text),
            (text.encode(), "text/html; charset=", text),
            (text.encode("utf-8-sig"), "text/html; charset=latin-1", text),
            (text.encode("utf-16"), "text/html; charset=utf-8", text),
            (text.encode("utf-16"), "text/html", text),
            (b"\xfe\xff" + text.encode("utf-16-be"), "text/html", text),
            (text.encode("utf-32"), "text/html", text),
            # Unknown charsets, and codecs that are for other things and raise
            *((text.encode(), f"text/html; charset={name}", text) for name in UNFIT_CHARSETS),
            (b"caf\xff", "text/plain; charset=nonsense", "caf\ufffd"),
        ]:
            with self.subTest(content_type, data=data):
                headers = {"content-type": content_type}
                self.assertEqual(decoded, friendli_lite._decode_page(data, headers))

    def test_an_error_has_all_that_the_server_said(self):
        for body, content_type, text, message in [
            ('{"errors": [{"message": "too long"}]}', JSON, None, "too long"),
            ('{"message": "quota\\nspent\\u001b[31m"}', "text/plain", None, "quota spent [31m"),
            (json.dumps({"error": "x" * 10_000}), JSON, None, "x" * 500 + "..."),
            ("[" * 5000, JSON, None, "[" * 500 + "..."),
            ("<p>价格</p>".encode("gbk"), "text/html; charset=gbk", "<p>价格</p>", "价格"),
            ("<p>é</p>".encode("utf-16"), "text/html", "<p>é</p>", "é"),
            ('\ufeff{"error": "bom"}', JSON, '{"error": "bom"}', "bom"),
            ("null", JSON, None, ""),
            ("", "text/plain", None, ""),
        ]:
            data = body if isinstance(body, bytes) else body.encode()
            for call in MEDIA_TYPES:
                answer = page(data, 418, content_type, X_Long="a  b" * 500)
                with self.case(call.__name__, body[:40]), self.serve(answer) as server:
                    error = self.failure(APIStatusError, call)
                    self.assertEqual((418, text or body), (error.status_code, error.body))
                    self.assertEqual(message, error.message)
                    what = f"{server.url}/v1/completions: the server responded with 418 Reason"
                    self.assertEqual(f"POST {what}" + (message and f": {message}"), str(error))
                    expected = {
                        "content-type": content_type, "content-length": str(len(data)),
                        "x-long": "a  b" * 500,
                    }  # fmt: skip
                    self.assertEqual(expected, error.headers)

    def test_a_compressed_page_is_named_with_its_size_and_not_shown(self):
        for coding, size, shown_as in [
            ("gzip", 41, "a body in gzip of 41 bytes"),
            ("X-GZIP", 41, "a body in gzip of 41 bytes"),
            ("deflate", 41, "a body in deflate of 41 bytes"),
            ("br", 41, "a body in br of 41 bytes"),
            ("zstd", 65536, "a body in zstd of 65536 bytes"),
            ("compress", 65537, "a body in compress of over 65536 bytes"),
            *((name, 41, "a" * 41) for name in ("", "identity", "none", "utf-8")),
        ]:
            with self.case(coding, size):
                with self.serve(page(b"a" * size, 403, Content_Encoding=coding)):
                    error = self.failure(APIStatusError)
                self.assertEqual([shown_as] * 2, [error.body, error.message])

    def test_a_page_is_shown_to_its_first_64_kib(self):
        for size, token in [(65535, ""), (65536, ""), (65537, ""), (65536, TOKEN), (99_999, TOKEN)]:
            with self.case(size, token), self.serve(page(b"a" * size)):
                error = self.failure(APIStatusError, token=token)
                self.assertEqual("a" * min(size, 65536), error.body)
        parts = chunked(b"a" * 65537, b"a" * 99)
        with self.case("in parts"), self.serve(head(400, Transfer_Encoding="chunked") + parts):
            self.assertEqual("a" * 65536, self.failure(APIStatusError).body)

    def test_a_page_that_does_not_end_is_shown_as_far_as_it_came(self):
        start = head(500, Content_Type="text/plain", Content_Length=99) + b"out of order"
        login = head(200, Content_Type="text/html", Transfer_Encoding="chunked")
        login += b"6\r\nlog in\r\n"
        cases = [
            (APIStatusError, "out of order", hang(start), {"timeout": 0.03}),
            (APIStatusError, "out of order", trickle(start, b"!"), {"total_timeout": 0.03}),
            (APIStatusError, "out of order", then_close(start), {}),
            (APIResponseError, "log in", hang(login), {"timeout": 0.03}),
            (APIResponseError, "log in", then_close(login + b"zz\r\n"), {}),
        ]

        def ask(case):
            with StandInContainer(case[2]) as server:
                return raised(complete, server_url=server.url, **case[3])

        with ThreadPoolExecutor(len(cases)) as pool, self.within(0.5):
            errors = list(pool.map(ask, cases))
        for (kind, text, *_), error in zip(cases, errors):
            with self.subTest(kind.__name__):
                self.check_error(kind, error, text)
                self.assertEqual(text, error.body.rstrip("!"))

    def test_no_message_ends_in_nothing(self):
        """Whatever the server left out."""
        for answer, words in [
            (b"HTTP/1.1 522 \r\nContent-Length: 0\r\n\r\n", "the server responded with 522"),
            (b"HTTP/1.1 522\r\nContent-Length: 0\r\n\r\n", "the server responded with 522"),
            (
                b"HTTP/1.1 522 \r\nContent-Length: 3\r\n\r\nout",
                "the server responded with 522: out",
            ),
            (b"HTTP/1.1 400 a\x1b\xe9\tb\r\nContent-Length: 0\r\n\r\n", "responded with 400 a é b"),
            (page(b"<p></p>"), "the server responded with 400 Reason"),
            (
                page(b"", 200, JSON),
                r"the response is no completion: Expecting value: .*: \(empty\)",
            ),
            (page(b"", 200, "text/html"), r"the response is text/html, .*: \(empty\)"),
            (b"\r\n\r\n", r"the server sent something other than HTTP/1\.x: '\\r'"),
            (b"\n\n", r"the server sent something other than HTTP/1\.x: ''"),
            (b"\x15\x03\x01\0\x02\x02\x16",
             r"than HTTP/1\.x: '\\x15\\x03\\x01\\x00\\x02\\x02\\x16'"),
            (fin, "no response: the server closed the connection"),
            (rst, "no response: Connection reset by peer"),
        ]:  # fmt: skip
            answer = then_close(answer) if isinstance(answer, bytes) else answer
            with self.case(words), self.serve(answer):
                self.assertRegex(str(raised(complete)), rf"/v1/completions: .*{words}\Z")

    def test_odd_pages_of_64_kib_cost_no_time(self):
        for text in ("<!--", "<a ", "<script>", "</script ", "<", "&", "&#x", '{"error":'):
            with self.subTest(text), self.within(0.3):
                friendli_lite._error_message(text * (65536 // len(text)))

    def test_a_codec_that_is_not_for_pages_is_not_used(self):
        for charset in ("punycode", "raw_unicode_escape", "unicode-escape"):
            with self.subTest(charset):
                headers = {"content-type": f"text/plain; charset={charset}"}
                page = friendli_lite._decode_page(b"\\\xbc\xf9a-", headers)
                self.assertEqual("\\\ufffd\ufffda-", page)

    def test_a_page_of_script_alone_is_shown(self):
        page = b"<html><script>location='/login'</script></html>"
        self.serve(framed(page, "length", "text/html"))
        self.check_error(APIResponseError, self.failure(APIResponseError), "location='/login'")


UNFIT_CHARSETS = [
    "nonsense", "punycode", "unicode_escape", "raw-unicode-escape", "undefined", "hex", "rot13",
    "zlib", "idna", "..utf-8", "a:b",
]  # fmt: skip


class HintTests(TestCase):
    def hint(self, status, call=complete, answer=None, **options):
        """Return what the message of an error adds to the status line."""
        with self.serve(answer or json_answer({}, status)):
            error = raised(call, **options)
        self.assertIs(APIStatusError, type(error))
        return re.sub(r"\APOST \S+ the server responded with \d+ Reason", "", str(error))

    def test_some_statuses_come_with_a_hint(self):
        for status, hint in [
            (400, ""),
            (401, "; check the token argument or $FRIENDLI_TOKEN"),
            (403, "; check the token argument or $FRIENDLI_TOKEN"),
            (404, "; check model and server_url"),
            (407, "; check the user and password of the proxy"),
            (429, "; send fewer requests at a time, or pass a larger retries="),
            (500, ""),
        ]:
            for call in MEDIA_TYPES:
                with self.case(status, call.__name__):
                    self.assertEqual(hint, self.hint(status, call))

    def test_401_and_403_without_a_token_say_that_none_was_sent(self):
        none = "; no token was sent; set FRIENDLI_TOKEN or pass token="
        other = "; check the token argument or $FRIENDLI_TOKEN"
        for status in (401, 403):
            for hint, options in [
                (none, {"token": ""}), (none, {"token": " \n"}),
                (none, {"token": "", "headers": {"X-Api-Key": "k"}}),
                (other, {"token": "t"}),
                (other, {"token": "", "headers": {"authorization": "Basic x"}}),
            ]:  # fmt: skip
                with self.case(status, options):
                    self.assertEqual(hint, self.hint(status, **options))
        os.environ["FRIENDLI_TOKEN"] = ""
        self.assertEqual(none, self.hint(401))
        self.assertEqual("", self.hint(400))

    def test_what_a_server_asks_to_wait_is_told(self):
        for value, told in [("7", "7"), ("a" * 999, "a" * 500 + "..."), ("", "")]:
            with self.case(value[:9]):
                hint = self.hint(503, answer=json_answer({}, 503, Retry_After=value))
                self.assertEqual(f" (Retry-After: {told})", hint)

    def test_a_redirect_is_not_followed_and_gets_the_token_nowhere(self):
        for status, call in itertools.product([301, 302, 303, 307, 308], MEDIA_TYPES):
            with self.case(status, call), self.serve() as other:
                with self.serve(json_answer({}, status, Location=other.url + "/a?b")) as server:
                    error = self.failure(APIStatusError, call, retries=3)
                self.assertEqual((status, 1), (error.status_code, error.attempts))
                (request,) = server.requests
                self.assertEqual(f"Bearer {TOKEN}", request.headers["authorization"])
                self.assertEqual(0, other.connections)
                hint = "; redirects are not followed: check server_url, the redirect leads to "
                self.assertTrue(str(error).endswith(f"Reason{hint}{other.url}/a?b"), error)

    def test_a_long_redirect_is_cut_in_the_message_alone(self):
        long = "https://a/" + "b" * 900
        with self.serve(json_answer({}, 302, Location=long)):
            error = self.failure(APIStatusError)
        self.assertEqual(long, error.headers["location"])
        self.assertTrue(str(error).endswith(long[:500] + "..."))

    def test_a_location_is_a_hint_of_a_redirect_alone(self):
        for status, hint in ((300, "leads to http://a"), (429, "fewer requests at a time")):
            with self.subTest(status):
                self.serve(json_answer({}, status, Location="http://a"))
                self.check_error(APIStatusError, self.failure(APIStatusError), hint)
        self.serve(json_answer({}, 304))
        self.assertTrue(str(self.failure(APIStatusError)).endswith(" responded with 304 Reason"))


# Error texts: secrets


API_KEY, SESSION = "k-0123456789+.~", "s3ss10n-0123456789"
CREDENTIALS = {"X-Api-Key": API_KEY, "cookie": f"lang=en; session={SESSION}"}


def event(text):
    """An answer with an event, and behind it another one with some text."""
    data = text.encode()
    return ONE_EVENT + chunked(data if data.startswith(b"event") else b"data: " + data + b"\n\n")


# Where a server may put what it was sent
ECHOES = {
    (complete, APIStatusError): {
        "JSON": lambda s: json_answer({"error": f"no {s}!"}, 503),
        "JSON of another form": lambda s: json_answer({s: [s]}, 400),
        "text": lambda s: page(f"{s}{s}".encode()),
        "HTML": lambda s: page(f"<b>{s}</b>".encode(), 401, "text/html"),
        "UTF-16": lambda s: page(s.encode("utf-16")),
        "a reason": lambda s: f"HTTP/1.1 503 {s}\r\nContent-Length: 0\r\n\r\n".encode(),
        "a header": lambda s: json_answer({}, 401, X_Echo=f"Bearer {s}"),
        "a name": lambda s: f"HTTP/1.1 401 A\r\n{s}: a\r\nContent-Length: 0\r\n\r\n".encode(),
        "a redirect": lambda s: json_answer({}, 302, Location=f"/?k={s}"),
        "Retry-After": lambda s: json_answer({}, 503, Retry_After=s),
        "a message that is cut": lambda s: json_answer({"error": "x" * 490 + s}, 401),
    },
    (complete, APIResponseError): {
        "no HTTP": lambda s: then_close(f"{s} a\r\n\r\n".encode()),
        "a status": lambda s: then_close(f"HTTP/1.1 {s}\r\n\r\n".encode()),
        "a malformed header": lambda s: then_close(f"HTTP/1.1 200 OK\r\n{s} : a\r\n\r\n".encode()),
        "a length": lambda s: then_close(head(Content_Length=s)),
        "a coding": lambda s: then_close(head(Transfer_Encoding=s)),
        "a chunk size": lambda s: then_close(CHUNKED_JSON_HEAD + f"{s}\r\n".encode()),
        "a trailer": lambda s: then_close(CHUNKED_JSON_HEAD + f"0\r\n{s} a\r\n".encode()),
        "a content type": lambda s: head(Content_Type=s, Content_Length=0),
        "a wrong answer": lambda s: json_answer({"headers": s}),
        "no JSON": lambda s: page(b"{" + s.encode(), 200, JSON),
        "an error": lambda s: json_answer({"error": s}),
    },
    (stream, APIResponseError): {
        "a login page": lambda s: page(f"<b>{s}".encode(), 200, "text/html"),
        "a chunk": lambda s: then_close(STREAM_HEAD + f"1\r\na{s}\r\n".encode()),
        "an event": lambda s: event(json.dumps({"error": {"message": s}})),
        "an error event": lambda s: event(f"event: error\ndata: {s}\n\n"),
        "an event that is no chunk": event,
    },
}


def secrets(token, headers=None):
    """The credentials of a call, as the module sees them."""
    return friendli_lite._Secrets(friendli_lite._build_headers(False, token, headers))


class SecretTests(TestCase):
    def check(self, text, *hidden):
        """Check that a text shows no part of what is hidden, in capitals or not."""
        for secret in hidden or (TOKEN, API_KEY, SESSION):
            for part in (secret[:8], secret[-8:]):
                self.assertNotIn(part.lower(), text.lower())

    def test_what_a_server_echoes_gets_into_no_error_and_no_log(self):
        server, sent = self.serve(), (TOKEN, TOKEN.upper(), API_KEY, SESSION)
        for (call, kind), echoes in ECHOES.items():
            for (name, answer), secret in itertools.product(echoes.items(), sent):
                server.script(*[answer(secret)] * 2)
                with self.case(name, secret):
                    error = raised(call, headers=CREDENTIALS, **RETRY)
                    self.check_error(kind, error)
                    self.check(shown(error) + self.log.getvalue())
                    self.assertIn("***", f"{error}{vars(error)}")
                    self.log.truncate(self.log.seek(0))
                server._script.clear()

    def test_no_part_of_a_secret_stands_where_a_page_is_cut(self):
        for encoding, unit in (("utf-8", 1), ("utf-16-le", 2)):
            response = FakeResponse(content_type=f"text/plain; charset={encoding}")
            response.secrets = secrets(TOKEN)
            for before in range(65536 // unit - 39, 65536 // unit + 5, unit * 3):
                body = ("x" * before + TOKEN + "x" * 99).encode(encoding)
                with self.subTest(encoding, before=before):
                    text = friendli_lite._excerpt(response, body, is_page=True)
                    self.assertNotIn("f", text)
                    self.assertTrue(65536 // unit - 50 < len(text) <= 65536, len(text))
        for before in (65500, 65526, 65536, 65560):
            with self.case(before), self.serve(page(b"x" * before + TOKEN.encode() + b"x" * 99)):
                self.assertNotIn("f", raised(complete).body)

    def test_an_end_that_looks_like_the_start_of_a_secret_is_kept_where_nothing_is_cut(self):
        body = b"it ends like " + TOKEN[:5].encode()
        for is_page, is_complete, is_kept in [
            (True, True, True), (False, False, True), (False, True, True), (True, False, False),
        ]:  # fmt: skip
            response = FakeResponse()
            response.secrets, response.is_complete = secrets(TOKEN), is_complete
            with self.subTest(is_page=is_page, is_complete=is_complete):
                excerpt = friendli_lite._excerpt(response, body, is_page)
                self.assertEqual(is_kept, excerpt == body.decode())

    def test_no_part_of_a_secret_stands_at_the_end_of_half_a_line(self):
        for start in (b"X-", b"HTTP/1.1 200 OK\r\n: "):
            self.serve(start + TOKEN[:-1].encode() + (b"" if start == b"X-" else b"\r\n"))
            error = self.failure(APIResponseError)
            self.assertNotIn(TOKEN[:5], shown(error))

    def test_no_part_of_a_secret_stands_where_a_message_is_cut(self):
        for before in (450, 476, 477, 490, 499, 500):
            for status in (400, 200):
                answer = json_answer({"error": "x" * before + TOKEN + "x" * 99}, status)
                with self.case(before, status), self.serve(answer):
                    self.assertNotIn("x" + TOKEN[0], str(raised(complete)))
                escaped = "x" * before + TOKEN.replace("T", "\\u0054") + "x" * 99
                answer = page(f'{{"error": "{escaped}"}}'.encode(), status, JSON)
                with self.case("escaped", before, status), self.serve(answer):
                    self.assertNotIn("x" + TOKEN[0], str(raised(complete)))

    def test_which_values_are_secrets(self):
        """The token and headers of certain names, whole and in parts, in capitals or not."""
        headers = {
            "X-API-Key": "12345678", "Ocp-Token-Id": "abcdefgh ijklmnop",
            "Client-Secret": "(regex.*?)+", "Set-Cookie": "a=longer123; b=longer123456",
            "X-Request-Id": "identification", "Accept-Language": "de-AT, de, en",
        }  # fmt: skip
        redact = secrets("flp_1234", headers).redact
        for text, redacted in [
            ("flp_1234 FLP_1234 Bearer flp_1234", "*** *** ***"),
            ("bearer FLP_1234", "***"), ("x12345678x1234567x", "x***x1234567x"),
            ("abcdefgh ijklmnop, abcdefgh, ijklmnop", "***, ***, ***"),
            ("(REGEX.*?)+ regex", "*** regex"),
            ("longer123456 longer123 longer12", "*** *** longer12"),
            ("identification de-AT, de, en", "identification de-AT, de, en"),
            ("no secret", "no secret"), ("", ""),
        ]:  # fmt: skip
            with self.subTest(text):
                self.assertEqual(redacted, redact(text))
        self.assertEqual("Bearer a", secrets("").redact("Bearer a"))
        self.assertEqual("***", secrets("ab/cd/efgh").redact(r"ab\/cd\/efgh"))  # as in JSON
        authorization = secrets("unused", {"authorization": "Basic dXNlcjpwYXNz"}).redact
        self.assertEqual("Basic a unused ***", authorization("Basic a unused dXNlcjpwYXNz"))

    def test_what_is_too_short_to_be_a_secret_is_left_as_it_is(self):
        """As "local" and "test", which are words of other texts, too."""
        body = {"error": "localhost: no 0000, body, message, test123 or test1234"}
        for token, headers, message in [
            ("local", {}, body["error"]), ("0", {}, body["error"]), ("test123", {}, body["error"]),
            ("", {"Authorization": "0000"}, body["error"]),
            ("", {"Authorization": "Bearer n"}, body["error"]),
            ("test1234", {}, body["error"].replace("test1234", "***")),
        ]:  # fmt: skip
            with self.case(token, headers), self.serve(json_answer(body, 401)) as server:
                url = server.url.replace("127.0.0.1", "localhost")
                error = self.failure(APIStatusError, server_url=url, token=token, headers=headers)
                what = f"POST {url}/v1/completions: the server responded with 401 Reason"
                self.assertTrue(str(error).startswith(f"{what}: {message};"), error)
                found = error.status_code, error.attempts, error.message
                self.assertEqual((401, 1, message), found)
                names = ["attempts", "body", "headers", "message", "status_code"]
                self.assertEqual(names, sorted(vars(error)))

    def test_a_page_full_of_what_nearly_is_a_secret_costs_no_time(self):
        redact = secrets("a" * 2000 + "b").redact
        for near in ("a" * 65536, ("a" * 1999 + "c") * 32, ("a" * 2000 + "c") * 32):
            with self.within(0.25):
                self.assertEqual(near, redact(near))

    def test_a_part_of_a_secret_at_a_cut_is_dropped_once(self):
        secrets = friendli_lite._Secrets({"Authorization": "Bearer abcdefghij"})
        for text, redacted in [
            ("xx Bearer ab", "xx "),
            ("xxxxxx abcdefghi", "xxxxxx "),
            ("xx abcdefghij", "xx ***"),
            ("nothing", "nothing"),
        ]:
            with self.subTest(text):
                self.assertEqual(redacted, secrets.redact(text, is_cut=True))
                self.assertEqual(text.replace("abcdefghij", "***"), secrets.redact(text))

    def test_a_secret_is_found_as_json_escapes_it_and_after_odd_letters(self):
        secrets = friendli_lite._Secrets({"X-Api-Key": "ab+cd/ef+gh"})
        self.assertEqual('{"e": "***"}', secrets.redact('{"e": "ab+cd\\/ef+gh"}'))
        self.assertEqual("II***", secrets.redact("\u0130\u0130AB+CD/EF+GH"))


# Error texts: what a failure leaves behind


# Each kind of failure: its class, the call, the answers, and options of the call
FAILURES = {
    "a status": (APIStatusError, complete, [json_answer({"error": TOKEN}, 404)], {}),
    "a status that is retried": (APIStatusError, complete, [json_answer({}, 503)] * 2, RETRY),
    "a status of a stream": (APIStatusError, stream, [json_answer({}, 503)] * 2, RETRY),
    "a long page": (APIStatusError, complete, [page(b"a" * 100_000)], {}),
    "no answer": (APIConnectionError, complete, [fin, fin], RETRY),
    "no stream": (APIConnectionError, stream, [fin, rst], RETRY),
    "half an answer": (APIConnectionError, complete, [then_close(JSON_HEAD + b"{")] * 2, RETRY),
    "half a head": (APIConnectionError, stream, [then_close(STREAM_HEAD[:-9])], {}),
    "half a stream": (APIConnectionError, stream, [then_close(ONE_EVENT)], {}),
    "an empty stream": (APIConnectionError, stream, [then_close(STREAM_HEAD)] * 2, RETRY),
    "silence": (APITimeoutError, complete, [hang()], {"timeout": 0.005}),
    "silence in a stream": (APITimeoutError, stream, [hang(ONE_EVENT)], {"total_timeout": 0.01}),
    "no time": (APITimeoutError, complete, [], {"total_timeout": 0}),
    "no time for a stream": (APITimeoutError, stream, [], {"total_timeout": -1}),
    "no HTTP": (APIResponseError, complete, [then_close(b"220 mail\r\n")], {}),
    "a bad chunk": (APIResponseError, stream, [then_close(ONE_EVENT + b"zz\r\n")], {}),
    "no completion": (APIResponseError, complete, [json_answer({})], {}),
    "no stream but JSON": (APIResponseError, stream, [ANSWER], {}),
    "an error in a stream": (APIResponseError, stream, [event('{"error": "no"}')], {}),
    "no chunk in a stream": (APIResponseError, stream, [event("[]")], {}),
    "deep JSON": (APIResponseError, complete, [page(b"[" * 50_000, 200, JSON)], {}),
    "a redirect": (APIStatusError, stream, [json_answer({}, 302, Location=TOKEN)], {}),
    "a token": (ValueError, complete, [], {"token": f"{TOKEN}\n."}),
    "a header": (ValueError, stream, [], {"headers": {"X-Key": f"{TOKEN}\n"}}),
    "a field": (TypeError, complete, [], {"max_token": 5}),
    "a server_url": (ValueError, stream, [], {"server_url": "localhost:8000"}),
}


def garbage_of(action):
    """Return what an action leaves behind that only the garbage collector finds."""
    gc.collect()
    gc.disable()
    try:
        action()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [f"{type(item).__name__} {item!r:.80}" for item in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


class LeftoverTests(TestCase):
    """Frames hold their callers: what makes a call here has no local variables that would count."""

    @classmethod
    def setUpClass(cls):
        freeze()  # again, for what other tests have left in caches

    def failing(self, name, times=1):
        """Start the server of a case; return a function that makes the call that often."""
        _, call, script, options = FAILURES[name]
        self.server = self.serve(*script * times)
        return functools.partial(raised, call, **{"headers": CREDENTIALS, **options})

    def test_no_frame_of_a_failure_shows_a_secret(self):
        for name, (kind, *_) in FAILURES.items():
            with self.case(name):
                error = self.failing(name)()
                self.assertIs(kind, type(error), error)
                for secret in (TOKEN, API_KEY, SESSION):
                    self.assertNotIn(secret, shown(error))
                self.assertIsNone(getattr(error.__cause__, "__traceback__", None))
                self.assertIsNone(error.__context__)
                frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
                self.assertLessEqual(len(frames), 4, frames)

    def test_no_frame_shows_the_password_of_a_proxy(self):
        password = "pass-0123456789"
        encoded = base64.b64encode(f"user:{password}".encode()).decode()
        for variable, value, kind in [
            ("HTTP_PROXY", f"socks5://user:{password}@127.0.0.1:1", ValueError),
            ("ALL_PROXY", f"https://user:{password}@127.0.0.1:1", ValueError),
            ("http_proxy", f"http://user:/{password}@127.0.0.1:1", ValueError),
            ("HTTP_PROXY", f"http://user:{password}@127.0.0.1:1", APIConnectionError),
        ]:
            with self.case(variable, value), mock.patch.dict(os.environ, {variable: value}):
                for call in MEDIA_TYPES:
                    error = raised(call, server_url="http://elsewhere.invalid")
                    self.check_error(kind, error, variable)
                    for secret in (password, encoded, TOKEN):
                        self.assertNotIn(secret, shown(error))

    def test_no_frame_that_a_signal_handler_interrupts_shows_a_secret(self):
        os.environ["HTTPS_PROXY"] = "http://user:pass-0123456789@127.0.0.1:1"
        encoded = base64.b64encode(b"user:pass-0123456789").decode()
        http = self.serve().url

        def interrupt(*_):
            raise ZeroDivisionError

        for url, call in itertools.product([http, "https://a.invalid"], MEDIA_TYPES):
            for method in ("_connect", "_send", "receive"):
                methods = {name: lambda *_: None for name in ("_connect", "_send")}
                methods[method] = interrupt
                patch = mock.patch.multiple(friendli_lite._Connection, **methods)
                with self.case(url, call, method), patch:
                    error = raised(call, server_url=url, headers=CREDENTIALS)
                    self.assertIs(ZeroDivisionError, type(error))
                    for secret in (TOKEN, API_KEY, SESSION, "pass-0123456789", encoded):
                        self.assertNotIn(secret, shown(error))

    @unittest.skipIf(isinstance(tracemalloc, mock.Mock), "needs tracemalloc")
    def test_an_error_that_is_kept_with_its_traceback_is_small(self):
        wrong = b'{"a": "' + b"a" * 2_000_000 + b'"}'
        wide = ("a" * 70_000 + "\U0001f600").encode("utf-16")
        large = {
            "a wrong answer of 2 MB": (APIResponseError, complete, [page(wrong, 200, JSON)], {}),
            "a wrong event of 2 MB": (APIResponseError, stream, [event(wrong.decode())], {}),
            "a page of wide characters": (APIStatusError, complete, [page(wide)], {}),
        }
        small = [name for name in FAILURES if name not in ("a long page", "deep JSON")]
        with mock.patch.dict(FAILURES, large):
            for names, limit in ((small, 12), (["a long page", "deep JSON", *large], 260)):
                for name in names:
                    with self.case(name):
                        times = 2 if limit == 12 else 1
                        fail = self.failing(name, times + 1)
                        fail()  # what it imports and caches is not counted
                        self.assertLess(self.size_of_kept(fail, times), limit * 1024)

    def size_of_kept(self, fail, times):
        tracemalloc.start()
        try:
            kept = [fail() for _ in range(times)]
            friendli_lite._pool.close()
            self.server.close()
            self.server.requests.clear()
            self.server._running.clear()
            self.log.truncate(self.log.seek(0))
            gc.collect()
            return tracemalloc.get_traced_memory()[0] / len(kept)
        finally:
            tracemalloc.stop()

    @unittest.skipUnless(sys.implementation.name == "cpython", "counts references")
    def test_no_call_leaves_an_object_to_the_garbage_collector(self):
        for call in MEDIA_TYPES:
            with self.case(call), self.serve(json_answer({}, 503)):
                ask = functools.partial(self.ask, 2, call, **RETRY)
                ask()  # what it imports is not counted
                self.assertEqual([], garbage_of(ask))
        for name in FAILURES:
            with self.case(name):
                fail = self.failing(name, 2)
                fail()
                self.assertEqual([], garbage_of(fail))


class LogTests(TestCase):
    def check_log(self, *lines):
        """Check the lines of the log, without the URL and times."""
        found = re.sub(r"\d\.\d{2,3} s", "# s", self.log.getvalue())
        expected = [f"POST {self.server.url}/v1/completions: {line}" for line in lines]
        self.assertEqual(expected, found.splitlines())
        self.log.truncate(self.log.seek(0))

    def test_a_call_that_succeeds_is_done(self):
        for call in MEDIA_TYPES:
            self.server = self.serve()
            with self.case(call):
                self.ask(1, call)
                self.check_log("status 200 after # s", "done after # s")

    def test_a_call_that_fails_has_failed_and_is_never_done(self):
        for call, answer, *statuses in [
            (complete, json_answer({}, 404), "status 404 after # s"),
            (stream, json_answer({}, 404), "status 404 after # s"),
            (complete, fin),
            (complete, json_answer({}), "status 200 after # s"),
            (complete, then_close(JSON_HEAD), "status 200 after # s"),
            (stream, then_close(STREAM_HEAD), "status 200 after # s"),
            (stream, event("[]"), "status 200 after # s"),
            (stream, then_close(ONE_EVENT), "status 200 after # s"),
        ]:
            self.server = self.serve(answer)
            with self.case(call, answer):
                self.assertIsInstance(raised(call), FriendliError)
                self.check_log(*statuses, "failed after # s")
        with self.case("retries"):
            self.server = self.serve(fin, json_answer({}, 503), STREAM)
            self.ask(1, stream, retries=AT_ONCE)
            self.check_log(
                "no response: the server closed the connection; retry 1 of 3 in # s",
                "status 503 after # s",
                "the server responded with 503 Reason (after 2 attempts); retry 2 of 3 in # s",
                "status 200 after # s", "done after # s",
            )  # fmt: skip
        retried = self.assertLogs("friendli_lite", logging.INFO)
        with self.serve(json_answer({}, 503)), retried as logs:
            self.ask(1, retries=AT_ONCE)
        self.assertEqual([logging.INFO], [record.levelno for record in logs.records])
        error = logs.records[0].args[0]  # which a handler may keep, and with it its frames
        self.assertIs(APIStatusError, type(error))
        if sys.implementation.name == "cpython":  # PyPy sets the traceback of a caught error again
            self.assertIsNone(error.__traceback__)
        self.server = self.serve()
        with self.case("no time"):
            self.assertIs(APITimeoutError, type(raised(complete, total_timeout=0)))
            self.check_log("failed after # s")
        for options in ({"token": "a\nb"}, {"max_token": 1}, {"total_timeout": "1"}):
            with self.case(options):
                raised(complete, **options)
                self.check_log()

    def test_a_stream_that_is_left_is_neither_done_nor_failed(self):
        self.server = self.serve()
        with stream("x") as chunks:
            next(chunks)
        self.check_log("status 200 after # s")

    def test_the_log_shows_neither_a_secret_nor_the_prompt(self):
        for call in MEDIA_TYPES:
            self.server = self.serve(json_answer({"error": TOKEN}, 503), then_close(STREAM_HEAD))
            with self.case(call):
                raised(call, prompt="my prompt", token=TOKEN, headers=CREDENTIALS, **RETRY)
                for secret in (TOKEN, API_KEY, SESSION, "my prompt", "authorization"):
                    self.assertNotIn(secret.lower(), self.log.getvalue().lower())
                self.assertIn("***", self.log.getvalue())


class EndlessTests(TestCase):
    LIMIT = 16 * 1024
    CASES = {
        "a line": (stream, head(Content_Type=EVENTS) + b"data: ", b"a" * 65536, "EVENT_BYTES"),
        "a line in chunks": (stream, STREAM_HEAD, chunked(b"a" * 16)[:-5] * 999, "EVENT_BYTES"),
        "comments": (stream, head(Content_Type=EVENTS), b": ping\n\n" * 4096, "EVENT_BYTES"),
        "JSON": (complete, head(Content_Type=JSON) + b"[", b" " * 65536, "COMPLETION_BYTES"),
        "a header": (complete, b"HTTP/1.1 200 OK\r\nA: ", b"a" * 65536, "HEAD_BYTES"),
        "a folded header": (complete, b"HTTP/1.1 200 OK\r\nA:", b" a\r\n" * 999, "HEAD_BYTES"),
        "headers": (complete, b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 999, "HEADERS"),
        "early hints": (stream, b"", head(103) * 999, "HEAD_BYTES"),
        "trailers": (stream, STREAM_HEAD + b"0\r\n", b"A: b\r\n" * 999, "HEADERS"),
        "a chunk size": (stream, STREAM_HEAD, b"0" * 65536, "HEAD_BYTES"),
        "a chunk extension": (stream, STREAM_HEAD + b"1;", b"a" * 65536, "HEAD_BYTES"),
        "an error page": (complete, head(500), b"a" * 65536, "ERROR_BODY_BYTES"),
        "a login page": (stream, head(Content_Type="text/html"), b"a" * 65536, "ERROR_BODY_BYTES"),
    }

    def test_an_endless_answer_ends_in_an_error_within_bounded_memory(self):
        """Also if memory is not measured, as under PyPy, the error comes."""
        self.serve()
        self.ask()  # what it imports is not counted
        for name, (call, start, more, limit) in self.CASES.items():
            value = self.LIMIT if limit != "HEADERS" else 100
            with self.case(name), mock.patch.object(friendli_lite, f"_MAX_{limit}", value):
                self.serve(endless(start, more))
                tracemalloc.start()
                try:
                    error = raised(call)
                    self.assertLess(tracemalloc.get_traced_memory()[1], 1024**2)
                finally:
                    tracemalloc.stop()
                kind = APIStatusError if name == "an error page" else APIResponseError
                self.check_error(kind, error)
                if limit in ("EVENT_BYTES", "COMPLETION_BYTES"):
                    self.assertEqual("", error.body)
                    self.assertIn(f" over {value} bytes", str(error))
                self.assertLess(len(error.body), 65536 * 3)
                self.ask(server_url=self.serve().url)


# Reading the body: limits and media types


class LimitTests(TestCase):
    LIMIT = 64 * 1024

    def test_the_limits_are_those_that_the_documentation_names(self):
        names = ("_MAX_EVENT_BYTES", "_MAX_COMPLETION_BYTES", "_MAX_ERROR_BODY_BYTES")
        limits = [getattr(friendli_lite, name) for name in names]
        self.assertEqual([16 * 1024**2, 32 * 1024**2, 64 * 1024], limits)

    def patched(self):
        limits = dict.fromkeys(["_MAX_EVENT_BYTES", "_MAX_COMPLETION_BYTES"], self.LIMIT)
        return mock.patch.multiple(friendli_lite, **limits)

    def test_an_endless_answer_ends_in_an_error_as_soon_as_it_is_too_long(self):
        line = f"the stream has a line of over {self.LIMIT} bytes"
        event = f"the stream has over {self.LIMIT} bytes without an event"
        body = f"the response has over {self.LIMIT} bytes"
        for call, start, more, message in [
            (stream, b"data: ", b"a" * 512, line), (stream, b"data: ", b"ab", line),
            (stream, b":", b"a" * 512, line), (stream, b" ", b"data: a\n" * 64, event),
            (stream, b" ", b"data\n" * 64, event), (stream, b" ", b": ping\n\n" * 64, event),
            (stream, b"data: %b\n\n" % ONE, b": ping\n\n" * 64, event),
            (stream, b"\n", b"\n" * 512, event), (complete, b" ", b" " * 512, body),
            (complete, b"[", b"[" * 512, body),
        ]:  # fmt: skip
            with self.subTest(start + more[:9]), self.patched():
                received = bytearray()
                pieces = itertools.chain([start], itertools.repeat(more))
                source = (received.extend(piece) or piece for piece in pieces)
                _, error = outcome_of_body(call, source)
                self.assertEqual((message, ""), (str(error), error.body))
                self.assertGreater(len(received), self.LIMIT)
                self.assertLessEqual(len(received), self.LIMIT + len(start) + len(more))

    def test_an_answer_within_the_limits_is_taken(self):
        with self.patched():
            data = ONE + b" " * (self.LIMIT - len(ONE))
            self.assertEqual((["a"], None), outcome_of_body(complete, data))
            self.assertIs(APIResponseError, type(outcome_of_body(complete, data + b" ")[1]))
            for size, expected in [(self.LIMIT, type(None)), (self.LIMIT + 1, APIResponseError)]:
                for start in ([], [b"data: %b\n\n" % ONE]):
                    _, error = outcome_of_body(stream, [*start, b"\n" * size, b"data: [DONE]"])
                    self.assertIs(expected, type(error))
            data = data[:-20]
            events = (b"data: " + data + b"\n\n") * 3
            for pieces in ([events], [events[i : i + 4096] for i in range(0, len(events), 4096)]):
                self.assertEqual(
                    (["a"] * 3, None), outcome_of_body(stream, [*pieces, b"data: [DONE]"])
                )

    def test_the_work_is_linear_in_what_is_received(self):
        pieces = [b"data: ", *[b"a" * 64] * 40_000, b"\n\n", b"data: [DONE]"]
        with self.within(1):
            ((_, data),) = friendli_lite._iter_events(pieces)
        self.assertEqual(40_000 * 64, len(data))


class MediaTypeTests(TestCase):
    PAGE = b"<html><title>Please</title>\n<p>log in"

    def test_good_answers_with_odd_headers_are_taken(self):
        for call, media_type in MEDIA_TYPES.items():
            types = [media_type, media_type.upper(), f" {media_type} ", "", f"{media_type},"]
            types += [f"{media_type}{more}" for more in (";charset=x", " ; a=b", f", {media_type}")]
            for name, value in [
                *(("content_type", value) for value in types),
                *(("content_encoding", value) for value in ("", "none", "utf-8", "identity")),
            ]:
                with self.subTest(call.__name__, header=value):
                    result = outcome_of_body(call, payload(call, ONE), **{name: value})
                    self.assertEqual((["a"], None), result)

    def test_an_answer_without_a_content_type_is_taken(self):
        for call in MEDIA_TYPES:
            self.serve(then_close(head(200) + payload(call, ONE)))
            self.assertEqual((["a"], None), outcome(call))

    def test_a_byte_order_mark_before_a_completion_is_taken(self):
        bom = b"\xef\xbb\xbf"
        self.assertEqual((["a"], None), outcome_of_body(complete, bom + ONE))
        self.assertEqual(
            (["a"], None), outcome_of_body(complete, (bytes([byte]) for byte in bom + ONE))
        )
        self.assertEqual((["a"], None), outcome_of_body(stream, bom + payload(stream, ONE)))
        self.assertIs(
            APIResponseError, type(outcome_of_body(stream, payload(stream, bom + ONE))[1])
        )

    def test_an_answer_of_another_kind_is_an_error_that_says_what_came(self):
        for call, media_type in MEDIA_TYPES.items():
            other = JSON if call is stream else EVENTS
            gzip = {"content_type": media_type, "content_encoding": "gzip"}
            for data, headers, words in [
                (self.PAGE, {"content_type": "text/html; a=b"}, ["text/html", "Please log in"]),
                (b"", {"content_type": "text/html"}, ["is text/html", "(empty)"]),
                (b"\x1f\x8b\0", gzip, [f"{media_type} in gzip", "a body in gzip of 3 bytes"]),
                (ONE, {**gzip, "content_encoding": "BR"}, [f"{media_type} in br"]),
                (payload(call, ONE), {"content_type": other}, [other]),
                (b'{"error":"hot"}', {"content_type": other}, [other, "hot"]),
                (ONE, {"content_type": f"{other}, {media_type}"}, [other]),
            ]:
                with self.subTest(call.__name__, **headers):
                    texts, error = outcome_of_body(call, data, **headers)
                    self.assertEqual(([], APIResponseError), (texts, type(error)))
                    for word in [*words, f"not {media_type}; check server_url"]:
                        self.assertIn(word, str(error))
                    if data == self.PAGE:
                        self.assertEqual(self.PAGE.decode(), error.body)

    def test_a_success_of_another_status_is_no_completion(self):
        for call in MEDIA_TYPES:
            for answer, status in [(head(204), 204), (head(206, Content_Length=0), 206)]:
                with self.case(call.__name__, status), self.serve(answer):
                    self.assertEqual(status, self.failure(APIStatusError, call).status_code)

    def test_an_empty_answer_is_an_error(self):
        texts, error = outcome_of_body(complete, b"")
        self.assertEqual(([], APIResponseError, ""), (texts, type(error), error.body))
        self.assertRegex(str(error), r"\Athe response is no completion: .+: \(empty\)\Z")
        texts, error = outcome_of_body(stream, b"")
        self.assertEqual(([], APIConnectionError), (texts, type(error)))


# Server-sent events


# Bytes, without [DONE], and the events and data in them
READER_CASES = {
    "LF": (b"data: 1\n\ndata: 2\n\n", [("", b"1"), ("", b"2")]),
    "CRLF": (b"data: 1\r\n\r\ndata: 2\r\n\r\n", [("", b"1"), ("", b"2")]),
    "CR": (b"data: 1\r\rdata: 2\r\r", [("", b"1"), ("", b"2")]),
    "CR then LF in one": (b"data: 1\r\ndata: 2\n\r", [("", b"1\n2")]),
    "a mixture of line ends": (
        b"data: 1\r\n\rdata: 2\n\r\ndata: 3\r\n\ndata: 4\r\n\r",
        [("", b"%d" % i) for i in (1, 2, 3, 4)],
    ),
    "a BOM": (b"\xef\xbb\xbfdata: 1\n\n", [("", b"1")]),
    "a second BOM": (b"\xef\xbb\xbf\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [("", b"2")]),
    "a BOM in a later line": (b"\n\xef\xbb\xbfdata: 1\n\ndata: 2\n\n", [("", b"2")]),
    "comments": (b": ping\n\n:\n\ndata: 1\n: ping\ndata: 2\n\n", [("", b"1\n2")]),
    "data without a space": (b"data:1\n\n", [("", b"1")]),
    "data with more spaces": (b"data:  1 \n\n", [("", b" 1 ")]),
    "data with a tab": (b"data:\t1\n\n", [("", b"\t1")]),
    "data with a colon": (b"data: 1:2\n\n", [("", b"1:2")]),
    "several data lines": (b"data: 1\ndata:\ndata\ndata: 2\n\n", [("", b"1\n\n\n2")]),
    "no data": (b"data\n\ndata:\n\nevent: a\n\ndata: 1\n\n", [("", b"1")]),
    "blank lines": (b"\n\n\ndata: 1\n\n\n\n", [("", b"1")]),
    "other fields": (b"event: a\nid: 7\nretry: 1\nother: x\nalone\ndata: 1\n\ndata: 2\n\n",
                     [("a", b"1"), ("", b"2")]),
    "an event that is no UTF-8": (b"event: \xff\ndata: 1\n\n", [("\ufffd", b"1")]),
    "names that only look like data": (
        b"Data: 1\ndata : 2\n data: 3\ndata2: 4\ndata: 5\n\n",
        [("", b"5")],
    ),
    "an error field": (b"error: 1\n\nerror\n\n", [("error", b"1"), ("error", b"")]),
    "an error without data": (b"event: error\n\n", [("error", b"")]),
    "an error whose data is [DONE]": (b"event: error\ndata: [DONE]\n\n", [("error", b"[DONE]")]),
    "separators of other kinds": (
        "data: a\u2028b\u2029c\u0085d\ve\ff\x1cg\n\n".encode(),
        [("", "a\u2028b\u2029c\u0085d\ve\ff\x1cg".encode())],
    ),
    "characters of many bytes": ("data: é한😀\n\n".encode(), [("", "é한😀".encode())]),
    "[DONE] within data": (b"data: 1\ndata: [DONE]\n\ndata: [DONE]x\n\ndata: [done]\n\n",
                           [("", b"1\n[DONE]"), ("", b"[DONE]x"), ("", b"[done]")]),
}  # fmt: skip


def feedings(data):
    """Yield the ways to receive bytes: whole, each on its own, and split at every position."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for position in range(1, len(data)):
        yield [data[:position], data[position:]]


class ReaderTests(TestCase):
    def events(self, *pieces):
        """Return the events, and the error that ends them or None."""
        events = []
        try:
            events.extend(friendli_lite._iter_events(pieces))  # extend() keeps what came before
        except FriendliError as error:
            return events, error
        return events, None

    def test_events_are_the_same_however_their_bytes_arrive(self):
        for name, (data, events) in READER_CASES.items():
            for pieces in feedings(data + b"data: [DONE]\n\ndata: late\n\n"):
                with self.subTest(name, pieces=pieces):
                    self.assertEqual(events, list(friendli_lite._iter_events(pieces)))

    def test_an_event_is_given_when_its_last_byte_has_arrived(self):
        data = b"data: 1\r\n\r\ndata: 2\n\ndata: 3\r\rdata: [DONE]"
        received = bytearray()
        pieces = (received.extend(data[i : i + 1]) or data[i : i + 1] for i in range(len(data)))
        ends = [bytes(received) for _ in friendli_lite._iter_events(pieces)]
        expected = [data.index(end) + len(end) for end in (b"1\r\n\r", b"2\n\n", b"3\r\r")]
        self.assertEqual(expected, list(map(len, ends)))

    def test_done_ends_a_stream_in_all_its_spellings(self):
        one = b"data: 1\n\n"
        ends = [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"\r", b"", b" \n\n", b"\n\ndata: {\n\n"]
        for start in (b"data: ", b"data:", b"data:  ", b": ping\n\ndata: ", b"event: x\ndata: "):
            for end in ends:
                for pieces in feedings(one + start + b"[DONE]" + end):
                    with self.subTest(pieces):
                        self.assertEqual([("", b"1")], list(friendli_lite._iter_events(pieces)))

    def test_nothing_is_waited_for_after_done(self):
        def pieces():
            yield b"data: 1\n\ndata: [DONE]\n"
            self.fail("more was asked for")

        self.assertEqual([("", b"1")], list(friendli_lite._iter_events(pieces())))

    def test_a_stream_that_ends_before_done_was_cut_short(self):
        data = b"data: 1\n\ndata: 2\n\ndata: [DONE]"
        for end in range(len(data)):
            for pieces in ([data[:end]], [data[i : i + 1] for i in range(end)]):
                events, error = self.events(*pieces)
                with self.subTest(pieces):
                    expected = [("", b"1"), ("", b"2")][: data[:end].count(b"\n\n")]
                    self.assertEqual(expected, events)
                    self.assertIs(APIConnectionError, type(error))
                    self.assertIn("it ended before [DONE]", str(error))

    def test_a_stream_over_the_wire_is_the_same_however_it_is_cut(self):
        texts = ["é한", "\u2028\u0085", "😀\v", ""]
        dumps = functools.partial(json.dumps, ensure_ascii=False)
        events = "".join(f"data: {dumps(text_chunk(text))}\r\n\r\n" for text in texts)
        data = b"\xef\xbb\xbf: ping\r" + events.encode() + b"data: [DONE]\n\n"

        def trickle_bytes(sock):
            for byte in framed(data, "length", EVENTS):
                sock.sendall(bytes([byte]))
            return CLOSE

        in_chunks_of_one = STREAM_HEAD + chunked(*(bytes([byte]) for byte in data))
        whole = (then_close(framed(data, framing, EVENTS)) for framing in FRAMINGS)
        for answer in (in_chunks_of_one, trickle_bytes, *whole):
            with self.case(answer), self.serve(answer):
                self.assertEqual((texts, None), outcome(stream))


class MidStreamErrorTests(TestCase):
    FORMS = {
        "an error object": b'data: {"error": {"message": "out of memory", "code": 500}}\n\n',
        "an error that is a text": b'data: {"error": "out of memory"}\n\n',
        "an error next to choices": b'data: {"choices": [], "error": ["out of memory"]}\n\n',
        "an error event with JSON": b'event: error\ndata: {"message": "out of memory"}\n\n',
        "an error event with text": b"event: error\ndata: out of memory\n\n",
        "an error event whose name comes last": b"data: out of memory\nevent: error\n\n",
        "an error field": b'error: {"code": 500, "message": "out of memory"}\n\n',
        "an error field with text": b"error:out of memory\n\n",
        "an error field without a blank line": b"error:out of memory\n",
    }

    def test_an_error_in_a_stream_is_an_error_with_the_words_of_the_server(self):
        for name, form in self.FORMS.items():
            for start, before in [(b"", []), (sse(text_chunk("a"), done=False), ["a"])]:
                for end in (b"", b"data: [DONE]\n\n"):
                    with self.subTest(name, start=start, end=end):
                        texts, error = outcome_of_body(stream, start + form + end)
                        self.assertEqual((before, APIResponseError), (texts, type(error)))
                        pattern = r"\Athe server failed after status 200: .*out of memory"
                        self.assertRegex(str(error), pattern)
                        self.assertIn(error.body, form.decode())
                        self.assertIn("out of memory", error.body)

    def test_an_error_over_the_wire_is_not_tried_again(self):
        start = sse(text_chunk("a"), done=False)
        for before, framing in itertools.product((b"", start), FRAMINGS):
            form = self.FORMS["an error object"]
            data = framed(before + form + b"data: [DONE]\n\n", framing, EVENTS)
            with self.case(framing, before), self.serve(then_close(data)) as server:
                texts, error = outcome(stream, retries=3)
                self.assertEqual((["a"] if before else [], 1), (texts, len(server.requests)))
                self.check_error(APIResponseError, error, "after status 200: out of memory")

    def test_an_error_without_a_message_is_an_error(self):
        for form in [
            b"event: error\n\n", b"error\n\n", b"event: error\ndata: [DONE]\n\n",
            b'data: {"error": {}}\n\n', b'data: {"error": false}\n\n', b'data: {"error": ""}\n\n',
            b"event: error\ndata: " + ONE + b"\n\n",
            b'data: {"error": {}, "choices": [{"text": "a"}]}\n\n',
        ]:  # fmt: skip
            with self.subTest(form):
                texts, error = outcome_of_body(stream, form + b"data: [DONE]\n\n")
                self.assertEqual(([], APIResponseError), (texts, type(error)))
                self.assertRegex(str(error), r"\Athe server failed after status 200\b.*\S\Z")

    def test_an_error_in_place_of_a_completion_is_an_error_with_its_words(self):
        for data in [
            b'{"error":"too hot"}', b'{"error":{"message":"too hot"}}',
            b'{"choices":[],"error":["too hot"]}',
            b'{"choices":[{"text":"a"}],"error":{"code":"too hot"}}',
        ]:  # fmt: skip
            with self.subTest(data):
                texts, error = outcome_of_body(complete, data)
                self.assertEqual(([], APIResponseError), (texts, type(error)))
                self.assertEqual("the server failed after status 200: too hot", str(error))
                self.assertEqual(data.decode(), error.body)


# From JSON to dataclasses


BROKEN = [
    *b'hello { {\'choices\':[]} {"choices":[] {"choices":[]}x {"choices":[]}{}'.split(),
    *b'null true 7 "choices" [] [{"choices":[]}] {}'.split(),
    *(b'{"choices":%b}' % value for value in b'null 7 "a" {"text":"a"}'.split()),
    *(b'{"choices":[%b]}' % choice for choice in b'null 7 "a" [] {}'.split()),
    *(b'{"choices":[{"text":%b}]}' % text for text in b'null 7 [] {"a":"b"} true'.split()),
    *(b'{"choices":[{"text":"a","finish_reason":%b}]}' % value for value in b"7 [] true".split()),
    *(b'{"choices":[{"text":"a","logprobs":%b}]}' % value for value in b'7 [] "a"'.split()),
    *(b'{"choices":[{"text":"a"}],"usage":%b}' % value for value in b'7 [] "a"'.split()),
    *(b'{"choices":[],"a":%b}' % value for value in b"NaN Infinity -Infinity".split()),
    *b'{"choices":[{"text":"a"},{}]} {"choices":[{"text":"\xff"}]}'.split(),
    *(b'{"choices":[{"text":"\xed\xa0\x80"}]}', "{}".encode("utf-16")),
    *(b"[" * 200_000, b'{"error":' * 200_000, b'{"choices":[{"text":"a"}],"a":' + b"[" * 200_000),
]


class PayloadTests(TestCase):
    def test_a_broken_payload_is_an_error_that_shows_it(self):
        for data in BROKEN:
            for build in PARSERS.values():
                with self.subTest(data[:99], build=build.__name__):
                    with self.assertRaises(APIResponseError) as caught:
                        friendli_lite._parse(FakeResponse(), data, build)
                    error = caught.exception
                    self.assertRegex(str(error), r"\Athe response is no completion: .{1,600}\Z")
                    self.assertEqual(data[:65536].decode("utf-8", "replace"), error.body)

    def test_each_mistake_in_a_payload_is_named(self):
        for data, mistake in [
            (b"7", "it is not one object"), (b"{} {}", "it is not one object"),
            (b"{}", "it has no list of choices"), (b'{"choices":[7]}', "a choice is no object"),
            (b'{"choices":[{}]}', "a choice has no text, or a finish_reason that is no string"),
            (b'{"choices":[{"text":"a","logprobs":7}]}', "Logprobs is no object"),
            (b'{"choices":[],"usage":7}', "Usage is no object"),
            (b'{"choices":NaN}', "NaN is not JSON"),
        ]:  # fmt: skip
            for build in PARSERS.values():
                with self.subTest(data), self.assertRaises(APIResponseError) as caught:
                    friendli_lite._parse(FakeResponse(), data, build)
                expected = f"the response is no completion: {mistake}: {data.decode()}"
                self.assertEqual(expected, str(caught.exception))

    def test_what_only_looks_broken_is_taken(self):
        for more in [
            b"", b',"finish_reason":"null"', b',"logprobs":null,"usage":{}', b',"a":{"error":1}',
            b',"a":1e999,"b":"\\ud800","c":"\xc3\xa9"', b',"tokens":7,"index":0',
        ]:  # fmt: skip
            for call in MEDIA_TYPES:
                for blank in (b"", b" \n\t"[: 3 if call is complete else 1]):
                    with self.subTest(call.__name__, more=more):
                        data = blank + b'{"choices":[{"text":"a"%b}],"error":null}' % more + blank
                        self.assertEqual((["a"], None), outcome_of_body(call, payload(call, data)))

    def test_an_answer_without_choices_is_empty(self):
        for call in MEDIA_TYPES:
            self.assertEqual(([""], None), outcome_of_body(call, payload(call, b'{"choices":[]}')))


# From bytes to dataclasses: any bytes


MUTANTS = int(os.environ.get("FRIENDLI_LITE_FUZZ", 300))  # setUp() clears the environment
SCRAPS = [
    *b'\0 \xff \xef\xbb\xbf \xe2\x80\xa8 : " \\ { } [ ] , null NaN - 1e999 "\\ud800" [DONE]'.split(
        b" "
    ),
    *b'"error": "choices": "text": "usage": "delta":'.split(),
    *(b"\n", b"\r", b"\r\n\r\n", b"9" * 5000, b"[" * 5000, b"data: ", b"data: [DONE]\n\n"),
    *(b"event: error\n", b"error: ", b": ping\n\n"),
]
EXCHANGE = {"prompt": "x", "n": 2, "logprobs": 1, "max_tokens": 2}
EXCHANGE["stream_options"] = {"include_usage": True}
RECORDED = [
    sse(*chunks(EXCHANGE)), sse(*chunks({})).replace(b"\n", b"\r\n"),
    json.dumps(completion(EXCHANGE)).encode(),
]  # fmt: skip


def mutate(dice, data):
    start = dice.randrange(len(data))
    end = start + dice.randrange(1, 40)
    before, span, after = data[:start], data[start:end], data[end:]
    lines = data.splitlines(keepends=True)
    return dice.choice(
        [
            before + bytes([span[0] ^ 1 << dice.randrange(8)]) + span[1:] + after,  # flip
            before + after,  # drop
            before + dice.choice(SCRAPS) + span + after,  # insert
            before + span + span + after,  # duplicate
            before + span,  # cut
            b"".join(dice.sample(lines, len(lines))),  # reorder
        ]
    )


class FuzzTests(TestCase):
    def check_mutant(self, dice):
        data = dice.choice(RECORDED)
        for _ in range(dice.randrange(1, 5)):
            data = mutate(dice, data) or b"\n"
        cuts = sorted({0, *dice.choices(range(len(data)), k=dice.randrange(9)), len(data)})
        pieces = [data[start:end] for start, end in zip(cuts, cuts[1:])]
        texts, error = outcome_of_body(stream, data)
        again, same_error = outcome_of_body(stream, pieces)
        self.assertEqual((texts, repr(error)), (again, repr(same_error)), "the pieces matter")
        self.assertTrue(error or b"[DONE]" in data, "a short success")
        texts += outcome_of_body(complete, pieces)[0]
        self.assertEqual({str}, {str, *map(type, texts)})

    def test_only_friendli_errors_escape_whatever_the_bytes_are(self):
        for seed in range(MUTANTS):
            try:
                self.check_mutant(random.Random(seed))
            except Exception as error:
                words = f"self.check_mutant(random.Random({seed})) fails: {error!r}"
                raise AssertionError(words) from error


# The command line


class CommandLineTests(TestCase):
    def run_main(self, *arguments, stdin=b""):
        """Run the command line in this process; return its exit status, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            file = io.TextIOWrapper(io.BytesIO(stdin), "latin-1")  # which must not matter
            stack.enter_context(mock.patch.object(sys, "stdin", file))
            stack.enter_context(mock.patch.object(logging.root, "handlers", []))
            status = exit_status_of_main(arguments)
        return status, out.getvalue(), err.getvalue()

    def test_it_prints_a_stream_or_a_completion(self):
        server = self.serve()
        for arguments in (["p"], ["--no-stream", "p"], [], ["-"], ["--set", "n=1", "p"]):
            with self.subTest(arguments):
                ran = self.run_main(*arguments, stdin=b"from stdin\n")
                self.assertEqual((0, TEXT + "\n", ""), ran)
        requests = [request.json for request in server.requests]
        prompts = ["p", "p", "from stdin", "from stdin", "p"]
        self.assertEqual(prompts, [request["prompt"] for request in requests])
        streams = [True, None, True, True, True]
        self.assertEqual(streams, [request.get("stream") for request in requests])

    def test_options_become_fields(self):
        container = self.serve()
        settings = ('stop=["a=b"]', "seed=3", "extra_body={}", "model=null", 'logit_bias="x')
        ran = self.run_main(
            *("--model", "m", "--max-tokens", "2", "--temperature", "0.5", "--set", settings[0]),
            *("--set", settings[1], "--set", settings[2], "--timeout", "5", "--total-timeout", "6"),
            *("--retries", "0", "p", "--server-url", container.url + "/prefix/"),
        )
        self.assertEqual((0, " This is\n", ""), ran)
        expected = {"model": "m", "max_tokens": 2, "temperature": 0.5, "stop": ["a=b"], "seed": 3}
        self.assertEqual({**expected, "prompt": "p", "stream": True}, container.requests[0].json)
        self.assertEqual("/prefix/v1/completions", container.requests[0].path)

    def test_options_say_how_to_call(self):
        with mock.patch.object(friendli_lite, "stream", return_value=[]) as stream:
            self.run_main(
                *("--timeout", "5", "--total-timeout", "6", "--retries", "2", "--server-url", "u"),
                "p",
            )
            how = {"timeout": 5.0, "total_timeout": 6.0, "retries": 2, "server_url": "u"}
            self.assertEqual(how, stream.call_args[1])
            self.run_main("p")
            how = {"timeout": 600.0, "total_timeout": None, "retries": None, "server_url": None}
            self.assertEqual(how, stream.call_args[1])

    def test_a_prompt_or_tokens_may_be_set(self):
        server = self.serve()
        for name, value in (("tokens", [1, 2]), ("prompt", "q")):
            ran = self.run_main("--set", f"{name}={json.dumps(value)}", stdin=b"not read")
            self.assertEqual((0, TEXT + "\n", ""), ran)
            self.assertEqual({name: value, "stream": True}, server.requests[-1].json)

    def test_json_is_the_raw_object_or_one_a_line(self):
        self.serve()
        _, out, _ = self.run_main("--json", "--no-stream", "p")
        self.assertEqual(completion({"prompt": "p"}), json.loads(out))
        _, out, _ = self.run_main("--json", "p")
        self.assertEqual(list(chunks({"prompt": "p"})), list(map(json.loads, out.splitlines())))

    def test_several_choices_are_refused_without_json_and_printed_with_it(self):
        server = self.serve()
        for setting in ("n=2", "n=3", 'prompt=["p", "q"]'):
            for options in ([], ["--no-stream"]):
                with self.subTest(setting, options=options):
                    status, out, err = self.run_main(*options, "--set", setting)
                    self.assertEqual((2, ""), (status, out))
                    self.assertIn("several choices need --json", err)
        self.assertEqual(0, server.connections)
        self.assertEqual((0, f"{TEXT}\n", ""), self.run_main("--set", 'prompt=["p"]'))
        status, out, _ = self.run_main("--json", "--set", "n=2", "p")
        choices = [choice for line in out.splitlines() for choice in json.loads(line)["choices"]]
        for index in (0, 1):
            texts = [choice["text"] for choice in choices if choice["index"] == index]
            self.assertEqual((0, TEXT), (status, "".join(texts)))
        _, out, _ = self.run_main("--json", "--no-stream", "--set", "n=2", "p")
        self.assertEqual([TEXT, TEXT], [choice["text"] for choice in json.loads(out)["choices"]])

    def test_failures_are_one_line_and_exit_status_1(self):
        for options in ([], ["--no-stream"], ["--json"]):
            self.serve(json_answer({"detail": "no such model"}, 404))
            with self.subTest(options):
                status, out, err = self.run_main(*options, "p")
                self.assertEqual((1, ""), (status, out))
                self.assertRegex(err, r"\Afriendli_lite: POST http://.*404.*no such model.*\n\Z")
                self.assertNotIn("attempts", err)  # there was one
                status, out, err = self.run_main(*options, "--total-timeout", "0", "p")
                self.assertEqual((1, ""), (status, out))
                self.assertRegex(err, r"\Afriendli_lite: .* total_timeout=0 s was spent\n\Z")

    def test_text_that_is_cut_short_ends_in_a_line_end_before_the_error(self):
        start = STREAM_HEAD + chunked(sse(text_chunk("half"), done=False))[:-5]
        for answer, kind in (
            (then_close(start), "the response was cut short"),
            (then_close(start + chunked(sse({"error": "too hot"}))), "the server failed .*too hot"),
        ):
            self.serve(answer)
            both = io.StringIO()
            with self.subTest(kind):
                with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
                    self.assertEqual(1, exit_status_of_main(["p"]))
                self.assertRegex(both.getvalue(), rf"\Ahalf\nfriendli_lite: POST .*{kind}.*\n\Z")

    def test_wrong_usage_is_exit_status_2(self):
        container = self.serve()
        for arguments, message in (
            (("--set", "max_token=3", "p"), "did you mean 'max_tokens'"),
            (("--set", "stop", "p"), "--set takes NAME=JSON, not 'stop'\n"),
            (("--set", "stop=[", "p"), "--set takes NAME=JSON, not 'stop=['\n"),
            (("--set", 'model="m', "p"), "--set takes NAME=JSON, not 'model=\"m'\n"),
            (("--set", "a=" + "[" * 100_000, "p"), "NAME=JSON"),
            (("--set", "tokens=[1]", "p"), "both were given"),
            (("--set", 'token="flp"', "p"), "unknown field 'token'"),
            (("--set", 'stop="END"', "p"), "stop must be a list of strings: stop=["),
            (("--set", "=1", "p"), "unknown field ''"), (("--retries", "-1", "p"), "max_retries"),
            (("--timeout", "0", "p"), "timeout"),
            (("--timeout", "soon", "p"), "invalid float value: 'soon'"),
            (("--server-url", "nowhere", "p"), "server_url"),
            (("--no-such-option", "p"), "unrecognized"), (("p", "q"), "unrecognized"),
        ):  # fmt: skip
            with self.subTest(str(arguments)[:99]):
                status, out, err = self.run_main(*arguments)
                self.assertEqual((2, ""), (status, out))
                self.assertRegex(err, r"\Ausage: friendli_lite \[options\] \[PROMPT\]\n.*\n\Z")
                self.assertIn(message, err)
        self.assertEqual(0, container.connections)

    def test_a_text_without_quotes_is_shown_in_its_right_spelling(self):
        for setting, spelling in {
            "stop=END": """--set 'stop=["END"]'""",
            "bad_words=a b": """--set 'bad_words=["a b"]'""",
            "stop=\\n": """--set 'stop=["\\\\n"]'""",
            "model=m": """--set 'model="m"'""",
            "prompt=p": """--set 'prompt="p"'""",
            "new=x=y": """--set 'new="x=y"'""",
        }.items():
            with self.subTest(setting):
                status, _, err = self.run_main("--set", setting, "p")
                hint = f"--set takes NAME=JSON, not {setting!r}; a text needs quotes: {spelling}\n"
                said = err.partition("\n")[2]
                self.assertEqual((2, f"friendli_lite: error: {hint}"), (status, said))
                name, _, value = shlex.split(spelling)[1].partition("=")
                text = setting.partition("=")[2]
                self.assertIn(json.loads(value), (text, [text]))
                self.assertEqual(setting.partition("=")[0], name)

    def test_stdin_is_utf_8_without_bom_and_one_last_line_end(self):
        server = self.serve()
        for data, prompt in [
            (b"", ""), (b"a\n", "a"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"a\r", "a\r"),
            (b"a\n b", "a\n b"), (b"\r\na\r\nb\r\n", "\r\na\r\nb"), (b"\xc3\xa9\xe2\x82\xac", "é€"),
            (b"\xef\xbb\xbfa", "a"),
            (b"\xef\xbb\xbf\xef\xbb\xbfa\xef\xbb\xbf", "\ufeffa\ufeff"),
            (b"a\0\xe2\x80\xa8", "a\0\u2028"),
        ]:  # fmt: skip
            with self.subTest(data):
                self.assertEqual(0, self.run_main(stdin=data)[0])
                self.assertEqual(prompt, server.requests[-1].json["prompt"])
        count = len(server.requests)
        for data in (b"\xff", b"caf\xe9", "a".encode("utf-16")):
            with self.subTest(data):
                status, out, err = self.run_main(stdin=data)
                self.assertEqual((2, ""), (status, out))
                self.assertIn("friendli_lite: error: 'utf-8' codec can't decode byte", err)
        self.assertEqual(count, len(server.requests))

    def test_verbose_tells_of_requests_and_retries_but_no_secret(self):
        container = self.serve(json_answer({"error": f"not {TOKEN}"}, 503, Retry_After=0))
        logging.getLogger("friendli_lite").setLevel(logging.NOTSET)
        with mock.patch.object(friendli_lite, "_retry_delay", return_value=0.0):
            status, out, err = self.run_main("--verbose", "a secret prompt")
        self.assertEqual((0, TEXT + "\n"), (status, out))
        lines = [
            "status 503 after",
            "the server responded with 503 Reason: not *** (Retry-After: 0); retry 1 of 3 in",
            "status 200 after", "done after",
        ]  # fmt: skip
        start = f"friendli_lite: POST {container.url}/v1/completions: "
        found = [re.sub(r" \d+\.\d+ s\Z", "", line) for line in err.splitlines()]
        self.assertEqual([start + line for line in lines], found)
        self.assertNotIn(TOKEN, err)
        self.assertNotIn("secret prompt", err)
        self.assertEqual(f"Bearer {TOKEN}", container.requests[0].headers["authorization"])

    def test_ctrl_c_is_exit_status_130_without_a_traceback(self):
        def interrupt(sock):
            os.kill(os.getpid(), signal.SIGINT)
            sock.sendall(event_stream())  # wakes the client, if it waited before the signal came

        # It is ignored under nohup
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        self.serve(interrupt)
        status, _, err = self.run_main("p")
        self.assertEqual((130, ""), (status, err))

    def run_main_to(self, stdout, *options):
        """Run the command line with a file of the operating system as stdout."""
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(io.StringIO()) as err:
            status = exit_status_of_main([*options, "p"])
        with contextlib.suppress(OSError):  # what could not be written
            stdout.close()
        return status, err.getvalue()

    def test_a_closed_pipe_ends_it_quietly(self):
        self.serve()
        for options in ([], ["--json"], ["--no-stream"]):
            reader, writer = os.pipe()
            os.close(reader)
            with self.subTest(options), os.fdopen(writer, "w", closefd=False) as stdout:
                self.assertEqual((0, ""), self.run_main_to(stdout, *options))
            os.write(writer, b"what is written at exit goes nowhere")
            os.close(writer)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_said(self):
        self.serve()
        for options in ([], ["--json"], ["--no-stream"]):
            with self.subTest(options):
                full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
                status, err = self.run_main_to(full, *options)
                self.assertEqual(1, status)
                self.assertRegex(err, r"\Afriendli_lite: .*No space left on device\n\Z")

    def test_the_module_runs_as_a_program(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "argv", ["friendli_lite", "--version"]))
            out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(self.assertRaises(SystemExit))
            runpy.run_path(os.path.join(HERE, "friendli_lite.py"), run_name="__main__")
        self.assertEqual(f"friendli_lite {friendli_lite.__version__}\n", out.getvalue())


class StandInTests(TestCase):
    """The stand-in container as a program, and what it refuses."""

    def run_this_file(self, *arguments):
        """Run it as a program in this process."""
        with mock.patch.object(sys, "argv", ["test_friendli_lite.py", *arguments]):
            runpy.run_module("test_friendli_lite", run_name="__main__", alter_sys=True)

    def test_the_demo_runs_as_the_help_says(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.run_this_file("--demo", "Say this is a test!")
        self.assertEqual(TEXT + "\n", printed.getvalue())

    @unittest.skipUnless(hasattr(signal, "pthread_kill"), "this system has no signals")
    def test_the_server_runs_until_ctrl_c_as_the_help_says(self):
        def ask_and_interrupt():
            while "\n" not in printed.getvalue():
                time.sleep(0.001)
            try:
                self.ask(server_url=re.search(r"http:\S+\d", printed.getvalue())[0])
            finally:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        # It is ignored under nohup
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, handler)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            asking = WORKERS.submit(ask_and_interrupt)
            self.run_this_file("--serve", "0")
        asking.result(10)
        line = r"A stand-in container answers at http://127\.0\.0\.1:\d+; Ctrl-C ends it\.\n\Z"
        self.assertRegex(printed.getvalue(), line)

    @unittest.skipIf(__doc__ is None, "there are no docstrings")
    def test_the_help_of_this_file_tells_of_both(self):
        argv = mock.patch.object(sys, "argv", ["test_friendli_lite.py", "--help"])
        with argv, contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertRaises(SystemExit, main, ["--help"])
        for word in ("--demo", "--serve 8000", "python3 -m unittest", "--failfast"):
            self.assertIn(word, out.getvalue())

    def test_a_port_that_cannot_be_served_is_one_line(self):
        taken = str(self.serve().port)
        for port, why in [(taken, ".+"), ("http", "invalid literal .*"), ("", "invalid .*")]:
            with self.subTest(port), self.assertRaises(SystemExit) as caught:
                main(["--serve", port])
            self.assertRegex(caught.exception.code, rf"\Acannot serve on port {port}: {why}\Z")

    def test_it_refuses_what_a_container_refuses(self):
        needed = "exactly one of prompt and tokens is needed"
        for request, name, text in [
            ({"prompt": "p", "max_tokens": "5"}, "max_tokens", "integer"),
            ({"prompt": "p", "max_tokens": 1.5}, "max_tokens", "integer"),
            ({"prompt": "p", "n": True}, "n", "integer"),
            ({"prompt": "p", "temperature": "hot"}, "temperature", "number"),
            ({"prompt": "p", "stop": "END"}, "stop", "list"),
            ({"prompt": "p", "model": 7}, "model", "string"),
            ({"prompt": "p", "stream": "yes"}, "stream", "boolean"),
            ({"prompt": 7}, "prompt", "string or list"), ({"tokens": "7"}, "tokens", "list"),
            ({"prompt": "p", "seed": [1], "top_p": 1, "model": None, "new": {}}, None, None),
            ({"prompt": "p", "tokens": [1]}, None, needed), ({}, None, needed), ([], None, needed),
            (7, None, ".+"),
        ]:  # fmt: skip
            with self.subTest(request):
                received = Received(
                    "POST /v1/completions HTTP/1.1", [], json.dumps(request).encode()
                )
                status, _, body = container_answer(received).partition(b"\r\n")
                payload = json.loads(body.rpartition(b"\r\n")[2])
                if text is None:
                    self.assertIn("choices", payload)
                    continue
                self.assertEqual(b"HTTP/1.1 422 Reason", status)
                (found,) = payload["detail"]
                self.assertEqual(["body", name] if name else ["body"], found["loc"])
                self.assertRegex(found["msg"], f"Input should be a valid {text}" if name else text)
                self.assertEqual({"loc", "msg", "type"}, set(found))

    def test_its_words_reach_the_caller(self):
        self.serve()
        error = self.failure(APIStatusError, max_tokens="5")
        message = "body.max_tokens: Input should be a valid integer"
        self.assertEqual((422, message), (error.status_code, error.message))
        error = self.failure(APIStatusError, extra_body={"prompts": 1}, tokens="12", prompt=None)
        self.assertEqual("body.tokens: Input should be a valid list", error.message)
        elsewhere = container_answer(Received("POST /v1/models HTTP/1.1", [], b"{}"))
        self.assertEqual(json_answer({"detail": "Not Found"}, 404), elsewhere)


# The module's own help


class HelpTests(TestCase):
    @unittest.skipIf(__doc__ is None, "there are no docstrings")
    def test_every_public_name_is_documented(self):
        for name in friendli_lite.__all__:
            public = getattr(friendli_lite, name)
            with self.subTest(name):
                # One that the dataclass decorator wrote is none
                self.assertNotRegex(inspect.getdoc(public) or "", rf"\A({name}\(|\Z)")
                for attribute, value in vars(public).items() if inspect.isclass(public) else ():
                    if callable(value) or isinstance(value, property):
                        self.assertTrue(attribute.startswith("_") or value.__doc__, attribute)
        for name in inspect.signature(complete).parameters:
            self.assertRegex(inspect.getdoc(complete), rf"\n    (\*\*)?{name}: \S")

    @unittest.skipIf(__doc__ is None, "there are no docstrings")
    def test_help_tells_units_sources_and_errors(self):
        text = pydoc.render_doc(friendli_lite, renderer=pydoc.plaintext)
        for word in (
            *("seconds", "Raises:", "Architecture Blog", "Friendli Suite", "$FRIENDLI_TOKEN"),
            *friendli_lite.__all__,
        ):
            self.assertIn(word, text)

    def test_the_default_timeout_is_that_of_the_functions(self):
        default = inspect.signature(stream).parameters["timeout"].default
        self.assertEqual(default, friendli_lite._parser().parse_args([]).timeout)

    def test_each_option_has_its_help_and_each_value_a_name(self):
        for action in friendli_lite._parser()._actions:
            with self.subTest(action.dest):
                self.assertTrue(action.help)
                named = action.metavar or action.nargs == 0 or action.dest in ("model", "prompt")
                self.assertTrue(named)

    def test_the_options_fit_a_terminal_and_their_two_examples_work(self):
        os.environ.update(COLUMNS="80", NO_COLOR="1")
        with contextlib.redirect_stdout(io.StringIO()) as printed, self.assertRaises(SystemExit):
            friendli_lite.main(["--help"])
        lines = printed.getvalue().splitlines()
        server = self.serve()
        examples = [shlex.split(line) for line in lines[lines.index("examples:") + 1 :]]
        for program, *arguments in examples:
            with self.subTest(arguments), contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual("friendli_lite", program)
                with mock.patch("sys.stdin", io.StringIO("Say this is a test!")):
                    end = arguments.index("<") if "<" in arguments else None
                    self.assertEqual(0, exit_status_of_main(arguments[:end]))
        prompts = [received.json["prompt"] for received in server.requests]
        self.assertEqual(["Say this is a test!"] * 2, prompts)
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertLessEqual(len(lines), 24)


# The file on a stranger's machine


class VendoredFileTests(TestCase):
    def folder(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        return folder

    def test_its_first_lines_name_the_licence_and_keep_linters_off(self):
        comments = source().partition('"""')[0].splitlines()
        for line in (
            *("# SPDX-License-Identifier: MIT-0", "# ruff: noqa", "# fmt: off", "# pyright: basic"),
        ):
            self.assertIn(line, comments)
        self.assertLess(len(comments), 9)
        self.assertTrue(all(line.startswith("#") for line in comments))

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "needs Python 3.10")
    def test_it_imports_the_standard_library_only(self):
        imported = set()
        for node in ast.walk(syntax_tree()):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(0, node.level)
                imported.add(node.module)
        names = {name.partition(".")[0] for name in imported}
        self.assertEqual(set(), names - sys.stdlib_module_names)
        self.assertIn("socket", names)

    def test_it_runs_isolated_from_a_read_only_folder_and_from_a_zip(self):
        server = self.serve()
        folder = self.folder()
        read_only, archive = os.path.join(folder, "read_only"), os.path.join(folder, "bundle.zip")
        os.mkdir(read_only)
        shutil.copy(friendli_lite.__file__, read_only)
        # Not even root can write into it
        open(os.path.join(read_only, "__pycache__"), "w").close()
        os.chmod(read_only, 0o555)
        self.addCleanup(os.chmod, read_only, 0o755)
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.write(friendli_lite.__file__, "friendli_lite.py")
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import friendli_lite;"
            "print(friendli_lite.__file__); friendli_lite.main(['Hi'])"
        )
        env = {"LC_ALL": "C", "FRIENDLI_SERVER_URL": server.url}  # and neither HOME nor PATH
        if "SYSTEMROOT" in os.environ:  # Windows opens no socket without
            env["SYSTEMROOT"] = os.environ["SYSTEMROOT"]

        def run(place):
            command = [sys.executable, "-I", "-S", "-W", "error", "-c", program, place]
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

        with ThreadPoolExecutor(2) as pool:
            for place, ran in zip((read_only, archive), pool.map(run, (read_only, archive))):
                with self.subTest(os.path.basename(place)):
                    expected = os.path.join(place, "friendli_lite.py") + f"\n{TEXT}\n"
                    self.assertEqual((0, expected, ""), (ran.returncode, ran.stdout, ran.stderr))

    @unittest.skipUnless(importlib.util.find_spec("mypy"), "needs mypy")
    def test_a_type_checker_refuses_wrong_calls_and_no_right_ones(self):
        folder = self.folder()
        shutil.copy(friendli_lite.__file__, folder)
        start = [
            "from typing import Any",
            "from friendli_lite import Completion, CompletionRequest, complete, stream",
            'fields: dict[str, Any] = {"n": 2}',
        ]
        right = [
            'complete("x", max_tokens=5)', 'complete("x", **fields)',
            'complete({"prompt": "x"}, temperature=1, stop=["END"])',
            'text: str = complete(CompletionRequest(prompt=["x", "y"]), seed=[1, 2]).text',
            "texts: list[str] = [chunk.text for chunk in stream(tokens=[1], seed=None)]",
        ]  # fmt: skip
        wrong = [
            'complete("x", max_token=5)', 'complete("x", max_tokens="5")',
            'complete("x", messages=[])', 'stream("x", seed=1.5)',
            'number: int = complete("x").text',
        ]  # fmt: skip
        with open(os.path.join(folder, "program.py"), "w") as file:
            file.write("\n".join([*start, *right, *wrong, ""]))
        command = [sys.executable, "-m", "mypy", "--strict", "--python-version=3.12", "program.py"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        lines = {int(line) for line in re.findall(r"(?m)^program\.py:(\d+): error", ran.stdout)}
        first = len(start) + len(right) + 1
        self.assertEqual(set(range(first, first + len(wrong))), lines, ran.stdout)
        self.assertNotIn("friendli_lite.py:", ran.stdout)


class StrangersMachineTests(TestCase):
    def test_a_pipe_gets_each_chunk_as_it_comes_in_any_locale(self):
        """The text in one process, and JSON lines in another."""
        first, rest = STREAM_HEAD + A_CHUNK, " caf\u00e9 \U0001f600 \ud800"
        os.environ.pop("PYTHONUNBUFFERED", None)  # would do what is tested here
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        env = {**os.environ, **env, "PYTHONIOENCODING": "latin-1"}
        answers = [Later(first, chunked(sse(text_chunk(rest)))) for _ in range(2)]
        servers = [self.serve(answer) for answer in answers]
        with contextlib.ExitStack() as stack:
            command = [sys.executable, friendli_lite.__file__, "--server-url"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": env}
            text, raw = (
                stack.enter_context(subprocess.Popen([*command, server.url, *more], **pipes))
                for server, more in zip(servers, ([], ["--json"]))
            )
            for process in (text, raw):
                process.stdin.write("\ufeffé €\r\n".encode())
                process.stdin.close()
            with self.within(4):  # after 5 s the rest would come by itself
                self.assertEqual(b"a", text.stdout.read(1))
                self.assertEqual(text_chunk("a"), json.loads(raw.stdout.readline()))
            for answer in answers:
                answer.now()
            printed = text.stdout.read().replace(b"\r", b"")
            self.assertEqual(b" caf\xe9 \\U0001f600 \\ud800\n", printed)
            self.assertEqual(text_chunk(rest), json.loads(raw.stdout.read()))
        self.assertEqual((0, 0), (text.returncode, raw.returncode))
        self.assertEqual(["é €"] * 2, [server.requests[0].json["prompt"] for server in servers])

    def test_closed_standard_streams_do_no_harm(self):
        self.addCleanup(setattr, logging.root, "handlers", logging.root.handlers[:])
        refused = json_answer({"detail": "no"}, 422)
        for closed, arguments, script, status, printed in [
            ("stdout", ["Hi"], [], 0, ""), ("stdout", ["Hi", "--json"], [], 0, ""),
            ("stderr", ["Hi"], [refused], 1, ""),  # an error is no output
            ("stderr", ["Hi", "--verbose"], [], 0, f"{TEXT}\n"),
            ("stdin", ["Hi"], [], 0, f"{TEXT}\n"), ("stdin", [], [], 0, f"{TEXT}\n"),
        ]:  # fmt: skip
            server = self.serve(*script)
            streams = {name: io.StringIO() for name in ("stdin", "stdout", "stderr")}
            with self.subTest(closed=closed, arguments=arguments):
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
    """Return the files that the README tells to save."""
    return {
        "lambda_function.py": readme_block("def lambda_handler") + readme_block("def url_handler"),
        "many.py": readme_block("def ask_all"),
    }


def readme_programs():
    """Return the blocks that run by themselves, or beside the files, each with what it prints."""
    parts = ("def lambda_handler", "def url_handler", "def ask_all", "from ._vendor")
    return [
        (code, shown) for code, shown in readme_blocks() if not any(part in code for part in parts)
    ]


def run_block(code):
    """Run a block as a program would, and return its namespace and what it printed."""
    names = {"__name__": "readme"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    return types.SimpleNamespace(**names), printed.getvalue()


def has_module(name):
    return importlib.util.find_spec(name) is not None


class ReadmeTestCase(TestCase):
    def make_folder(self, files):
        """Make a folder to import from, and forget at the end what was imported."""
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        for name, text in files.items():
            os.makedirs(os.path.join(folder, os.path.dirname(name)), exist_ok=True)
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        known = set(sys.modules)
        self.addCleanup(lambda: [sys.modules.pop(name) for name in set(sys.modules) - known])
        sys.path.insert(0, folder)
        self.addCleanup(sys.path.remove, folder)
        return folder

    def import_file(self, name):
        """Import a file that the README tells to save."""
        self.addCleanup(logging.root.setLevel, logging.root.level)
        self.make_folder(readme_files())
        return importlib.import_module(name)

    def run_python(self, *arguments, cwd, **env):
        """Run Python with the repository's modules, in a process of its own."""
        path = os.pathsep.join([cwd, HERE])
        return subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip


class ReadmeTests(ReadmeTestCase):
    def test_every_program_prints_what_is_shown_below_it(self):
        self.addCleanup(logging.root.setLevel, logging.root.level)
        self.addCleanup(setattr, logging.root, "handlers", logging.root.handlers[:])
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.make_folder(readme_files()))
        server = self.serve()
        for code, shown in readme_programs():
            if "from dask" in code:
                continue  # it has a test of its own
            with self.subTest(code=code), contextlib.redirect_stderr(io.StringIO()):
                server.requests.clear()
                names, printed = run_block(code.replace("http://localhost:8000", server.url))
                if hasattr(names, "executor"):
                    names.executor.shutdown()
                is_printing = "print(" in code and "file=file" not in code
                expected = shown.rstrip("\n") or (TEXT if is_printing else "")
                self.assertEqual(expected, printed.rstrip("\n"))
                self.assertTrue(server.requests)
        with open("answers.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = [(row["number"], row["answer"]["choices"][0]["text"]) for row in rows]
        self.assertEqual([(0, TEXT), (1, TEXT)], texts)

    def test_the_first_screen_shows_a_program_and_the_commands(self):
        lines = readme().splitlines()
        self.assertIn("```python", lines[:15])
        for command in (
            "    python3 test_friendli_lite.py --serve 8000",
            '    python3 test_friendli_lite.py --demo "Say this is a test!"',
            "    python3 -m unittest",
        ):
            self.assertIn(command, lines[:30])

    def test_lines_of_prose_and_code_are_at_most_120_wide(self):
        long = [line for line in readme().splitlines() if len(line) > 120 and line[:1] != "|"]
        self.assertEqual([], long)

    def test_every_anchor_and_file_that_is_named_exists(self):
        text = readme()
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }
        for anchor in re.findall(r"\]\(#(.*?)\)", text):
            self.assertIn(anchor, anchors)
        for name in re.findall(r"`(benchmarks/\S+|\.ci/run)`", text):
            self.assertTrue(os.path.exists(os.path.join(HERE, name)), name)
        sections = set(
            re.findall(r"^# ([A-Z][^\n]*)\n\n\n(?=class |def |@|[_A-Z])", source(), re.M)
        )
        (layout,) = re.findall(r"\| section \| what it does \|\n(.*?)\n\n", text, re.DOTALL)
        named = "\n".join(row.split("|")[1] for row in layout.splitlines()[1:])
        for section in sections:
            self.assertIn(section.partition(":")[0].partition(";")[0], named)

    def test_a_vendored_file_works_in_a_package_under_any_name(self):
        module = source()
        (version,) = [line for line in module.splitlines() if line.startswith("__version__")]
        self.assertEqual(f'__version__ = "{friendli_lite.__version__}"', version)
        self.assertIn(f"`{version}`", readme())
        self.assertIn(f"\n### {friendli_lite.__version__}\n", readme())
        files = {"app/__init__.py": readme_block("from ._vendor"), "app/_vendor/__init__.py": ""}
        names = ("friendli_lite", "completions")
        self.make_folder({**files, **{f"app/_vendor/{name}.py": module for name in names}})
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            importlib.import_module("app")
        self.assertEqual(friendli_lite.__version__ + "\n", printed.getvalue())
        self.serve(*[then_close(json_answer({"detail": "no"}, 404))] * 2)
        for name in names:
            with self.subTest(name=name):
                copied = importlib.import_module(f"app._vendor.{name}")
                with self.assertRaises(copied.APIStatusError) as caught:
                    copied.complete("Hi")
                copied._pool.close()
                error = pickle.loads(pickle.dumps(caught.exception))
                self.assertIs(copied.APIStatusError, type(error))
                self.assertEqual((404, "no"), (error.status_code, error.message))

    def test_the_count_of_lines_to_audit_is_that_of_the_file(self):
        lines = len(source().splitlines())
        (said,) = re.findall(r"\| friendli_lite \| 1 file \| about ([\d,]+) \|", readme())
        self.assertAlmostEqual(int(said.replace(",", "")), lines, delta=150)

    @unittest.skipUnless(has_module("mypy"), "mypy is not installed")
    def test_programs_pass_the_strict_type_checker(self):
        programs = [f"program_{number}.py" for number in range(len(readme_programs()))]
        files = {name: code for name, (code, _) in zip(programs, readme_programs())}
        files.update(readme_files(), **{"friendli_lite.py": source()})
        folder = self.make_folder(files)
        # Dask may be missing here
        allowed = ("import-not-found", "no-untyped-call")
        options = [f"--disable-error-code={name}" for name in allowed]
        options += ["--strict", "--cache-dir", os.devnull, *sorted(files)]
        ran = self.run_python("-m", "mypy", *options, cwd=folder)
        self.assertEqual((0, ""), (ran.returncode, ran.stderr), ran.stdout)


class ReadmeTableTests(ReadmeTestCase):
    def table(self, heading):
        """Return the rows of the first table below a heading, without the code's marks."""
        section = readme().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (.*) \|$", section, re.M)
        return [[cell.strip() for cell in re.split(r" ?\| ?", row)] for row in rows]

    def test_the_parameters_are_those_of_the_two_calls(self):
        self.assertIn("`help(friendli_lite.CompletionRequest)`", readme())
        rows = [row for row in self.table("Parameters") if row[0].startswith("`")]
        defaults = {row[0].strip("`"): row[3] for row in rows}
        for call in (friendli_lite.complete, friendli_lite.stream):
            parameters = list(inspect.signature(call).parameters.values())[:-1]
            self.assertEqual([parameter.name for parameter in parameters], list(defaults))
            for parameter in parameters:
                shown = defaults[parameter.name]
                if isinstance(parameter.default, float) or shown == "`None`":
                    self.assertEqual(f"`{parameter.default}`", shown)
        self.assertEqual("`RetryConfig()`", defaults["retries"])

    def test_every_error_has_its_row(self):
        rows = {
            name for row in self.table("Errors") for name in re.findall(r"`(\w+Error)`", row[0])
        }
        public = {name for name in friendli_lite.__all__ if name.endswith("Error")}
        self.assertEqual(public | {"TypeError", "ValueError"}, rows | {"FriendliError"})
        text = " ".join(" ".join(row) for row in self.table("Errors"))
        for error in (friendli_lite.APIStatusError("", 404), friendli_lite.APIResponseError("")):
            for name in vars(error):
                self.assertIn(f"`.{name}`", text)

    def test_the_results_are_those_of_the_dataclasses(self):
        named = {}
        for type_, fields, _ in self.table("Results")[1:]:
            if type_.startswith("`"):
                kind = type_.strip("`")
            named.setdefault(kind, set()).update(re.findall(r"`(\w+)`", fields))
        self.assertEqual({"headers"}, named.pop("CompletionStream"))
        for kind, fields in named.items():
            with self.subTest(kind=kind):
                dataclass = getattr(friendli_lite, kind)
                expected = {field.name for field in dataclasses.fields(dataclass)}
                expected |= {name for name in dir(dataclass) if name == "text"}
                self.assertEqual(expected, fields)
        results = {
            "ChunkChoice", "Completion", "CompletionChoice", "CompletionChunk", "Logprobs", "Usage",
        }  # fmt: skip
        self.assertEqual(results, set(named))

    def test_the_worked_numbers_are_those_of_the_default_retries(self):
        text = " ".join(readme().split())
        shown = re.search(r"`(RetryConfig\(max_retries=3[^`]*\))`\. The", text).group(1)
        config = eval(shown, {"RetryConfig": friendli_lite.RetryConfig})
        self.assertEqual(friendli_lite.RetryConfig(), config)
        for field in dataclasses.fields(config):
            self.assertIn(f"{field.name}=", shown)
        delays = [config.initial_delay * config.multiplier**k for k in range(config.max_retries)]
        self.assertLessEqual(delays[-1], config.max_delay)
        self.assertIn("doubles: {:g}, {:g}, {:g} s".format(*delays), text)
        self.assertIn(f"add at most {sum(delays):g} s", text)
        self.assertIn(f"ends after {9 + delays[0] + 9:g} s at the latest", text)
        self.assertTrue(30 <= config.max_retry_after < 61)
        statuses = ", ".join(map(str, config.status_codes))
        self.assertIn(f"| status {statuses} | yes: `status_codes` |", text)
        for default in ("timeout", "total_timeout"):
            self.assertIn(default, text)
        constants = {
            f"idle connections are used for {friendli_lite._KEEPALIVE_EXPIRY_SECONDS:g} s",
            f"Connecting takes {friendli_lite._MAX_CONNECT_SECONDS:g} s at most",
            f"each gets {friendli_lite._MAX_ADDRESS_SECONDS:g} s at most",
            f"for at most {friendli_lite._MAX_DRAIN_SECONDS * 1000:g} ms",
            f"After {friendli_lite._MAX_STALE_SECONDS:g} s without",
            f"more than {friendli_lite._MAX_COMPLETION_BYTES // 1024**2} MiB",
        }
        for said in constants:
            self.assertIn(said.lower(), text.lower())


class RecipeTests(ReadmeTestCase):
    def test_the_error_example_prints_what_happened(self):
        for answer, printed in (
            (json_answer({"detail": "no such model"}, 404), "refused with 404: no such model\n"),
            (event_stream(), "failed after 1 attempts: POST "),
        ):
            with self.subTest(printed=printed):
                self.serve(answer)
                found = run_block(readme_block("refused with"))[1]
                self.assertEqual(printed, found[: len(printed)])

    def test_the_ported_examples_send_what_they_say(self):
        server = self.serve()
        run_block(readme_block("as event_stream"))
        expected = [{"stream": stream, "prompt": "Say this is a test!"} for stream in (False, True)]
        self.assertEqual(expected, [received.json for received in server.requests])

    def test_the_async_stream_leaves_the_loop_free_and_its_connection(self):
        loop_ran, client_left = threading.Event(), threading.Event()

        def answer(sock):
            sock.sendall(head(Content_Type="text/event-stream") + sse(text_chunk("a"), done=False))
            if loop_ran.wait(10):  # which the loop sets while it awaits the next chunk
                sock.sendall(sse(text_chunk("b"), done=False))
                if not sock.recv(1):
                    client_left.set()
            return CLOSE

        async def read(astream, texts):
            async for chunk in astream("Hi"):
                texts.append(chunk.text)

        async def main(astream):
            texts = []
            task = asyncio.get_running_loop().create_task(read(astream, texts))
            while texts != ["a", "b"] and not task.done():
                await asyncio.sleep(0.001)
                if texts == ["a"]:
                    loop_ran.set()
            task.cancel()  # while it awaits a third chunk, which never comes
            with self.assertRaises(asyncio.CancelledError):
                await task
            return texts

        self.serve()
        names = run_block(readme_block("async def astream"))[0]
        self.addCleanup(names.executor.shutdown)
        self.serve(answer)
        self.assertEqual(["a", "b"], asyncio.run(main(names.astream)))
        self.assertTrue(client_left.wait(10))

    def test_async_calls_run_at_the_same_time(self):
        calls = 16
        barrier = threading.Barrier(calls)

        def answer(sock):
            barrier.wait(10)  # until all of the calls have come
            sock.sendall(json_answer({"choices": [{"text": "a"}]}))

        async def main(acomplete):
            return await asyncio.gather(*[acomplete("Hi") for _ in range(calls)])

        self.serve()
        names = run_block(readme_block("async def acomplete"))[0]
        self.addCleanup(names.executor.shutdown)
        self.serve(*[answer] * calls)
        answers = asyncio.run(main(names.acomplete))
        self.assertEqual(["a"] * calls, [answer.text for answer in answers])


class LambdaTests(ReadmeTestCase):
    NO_PROMPTS = [{"prompt": 5}, {}, ["prompt"], None]

    @staticmethod
    def context(milliseconds=5000):
        return types.SimpleNamespace(get_remaining_time_in_millis=lambda: milliseconds)

    def test_a_direct_invocation_is_completed_or_told_its_status(self):
        logging.getLogger("friendli_lite").setLevel(logging.INFO)
        handler = self.import_file("lambda_function").lambda_handler
        hi, refused = {"prompt": "Hi"}, json_answer({"detail": "no such model"}, 404)
        for event, milliseconds, script, status, said, sent in [
            (hi, 5000, [], 200, TEXT, 2),
            (hi, 5000, [refused] * 2, 502, "no completion", 2),
            (hi, 999, [], 504, "no completion in time", 0),
            *((bad, 5000, [], 400, "a prompt is needed", 0) for bad in self.NO_PROMPTS),
        ]:
            expected = {"statusCode": status, "text" if status == 200 else "error": said}
            with self.subTest(event=event, expected=expected):
                server = self.serve(*script)
                with self.assertLogs() as logs:
                    logging.info("assertLogs() needs one")
                    for _ in range(2):
                        self.assertEqual(expected, handler(event, self.context(milliseconds)))
                self.assertEqual((min(sent, 1), sent), (server.connections, len(server.requests)))
                self.assertEqual(status in (502, 504), server.url in "\n".join(logs.output))
                self.assertNotIn(TOKEN, "\n".join(logs.output))

    def test_a_wrong_variable_is_in_the_log_and_not_in_the_result(self):
        handler = self.import_file("lambda_function").lambda_handler
        os.environ["FRIENDLI_SERVER_URL"] = "internal.example:8000"
        with self.assertLogs(level="ERROR") as logs:
            answer = handler({"prompt": "Hi"}, self.context())
        self.assertEqual({"statusCode": 502, "error": "no completion"}, answer)
        self.assertIn("internal.example", "\n".join(logs.output))

    def test_a_function_url_gets_an_http_response(self):
        handler = self.import_file("lambda_function").url_handler
        plain = '{"prompt": "caf\u00e9"}'
        encoded = base64.b64encode(plain.encode()).decode()
        for event, status in (
            ({"body": plain, "isBase64Encoded": False}, 200),
            ({"body": plain}, 200),
            ({"body": encoded, "isBase64Encoded": True}, 200),
            ({"body": "prompt=Hi"}, 400), ({"body": "[]"}, 400),
            ({"body": "!", "isBase64Encoded": True}, 400),
            ({"body": "//79", "isBase64Encoded": True}, 400),  # no UTF-8
            ({"body": None}, 400), ({}, 400),
        ):  # fmt: skip
            with self.subTest(event=event):
                server = self.serve()
                answer = handler(event, self.context())
                self.assertEqual(status, answer["statusCode"])
                self.assertEqual({"Content-Type": "application/json"}, answer["headers"])
                body = json.loads(answer["body"])
                expected = TEXT if status == 200 else "a prompt is needed"
                self.assertEqual(expected, body.get("text", body.get("error")))
                prompts = [received.json["prompt"] for received in server.requests]
                self.assertEqual(["caf\u00e9"] if status == 200 else [], prompts)

    def test_the_zip_of_the_two_commands_needs_no_compiler(self):
        folder = self.make_folder(readme_files())
        shutil.copy(friendli_lite.__file__, folder)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        commands = re.findall(r"^    python3 -m ((?:compileall|zipfile).*)$", readme(), re.M)
        self.assertEqual(2, len(commands))
        for command in commands:
            module, *arguments = command.split()
            patch = mock.patch.object(sys, "argv", [module, *arguments])
            with patch, contextlib.redirect_stdout(io.StringIO()) as printed:
                try:
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
                except SystemExit as exit_:
                    self.assertIn(exit_.code, (0, None))
            self.assertEqual("", printed.getvalue())
        task = os.path.join(folder, "task")
        with zipfile.ZipFile(os.path.join(folder, "function.zip")) as bundle:
            names = bundle.namelist()  # two sources, and a folder with two more
            self.assertEqual(5, len(names), names)
            bundle.extractall(task)
        names = ("lambda_function.py", "friendli_lite.py")
        sources = [os.path.join(task, name) for name in names]
        for source in sources:  # the times differ, and whoever compiles again gets an error
            with open(source, "w") as file:
                file.write("raise AssertionError('this was compiled')")
        with mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [task, *sys.path]):
            del sys.modules["friendli_lite"]
            module = importlib.import_module("lambda_function")
        self.assertEqual(sources, [module.__file__, module.friendli_lite.__file__])

    @unittest.skipUnless(has_module("awslambdaric"), "AWS's runtime client is not installed")
    def test_both_handlers_work_under_the_runtime_client_of_aws(self):
        folder = self.make_folder(readme_files())
        body = base64.b64encode(b'{"prompt": "Hi"}').decode()
        busy = json_answer({"detail": "busy"}, 503, Retry_After="0")
        refused = json_answer({"detail": "no such model"}, 404)
        completed = {"statusCode": 200, "text": TEXT}
        failed = {"statusCode": 502, "error": "no completion"}
        needed = {"statusCode": 400, "error": "a prompt is needed"}
        by_url = {"body": body, "isBase64Encoded": True}
        for handler, event, script, expected, logged in [
            ("lambda_handler", {"prompt": "Hi"}, [busy], completed, "retry 1 of 3"),
            ("lambda_handler", [], [], needed, ""),
            ("lambda_handler", {"prompt": "Hi"}, [refused], failed, "no such model"),
            ("url_handler", by_url, [], completed, ""),
            ("url_handler", {"body": "prompt"}, [], needed, ""),
        ]:
            with self.subTest(handler=handler, event=event):
                is_posted = threading.Event()

                def wait(sock, is_posted=is_posted):  # the client asks for the next event
                    is_posted.set()
                    sock.recv(1)  # until it is killed
                    return CLOSE

                invocation = json_answer(
                    event, Lambda_Runtime_Aws_Request_Id="1",
                    Lambda_Runtime_Deadline_Ms=int(time.time() * 1000) + 30_000,
                    Lambda_Runtime_Invoked_Function_Arn="arn",
                )  # fmt: skip
                runtime = self.serve(invocation, json_answer({}, 202), wait)
                self.serve(*script)
                environment = {
                    **os.environ,
                    "AWS_LAMBDA_RUNTIME_API": urlsplit(runtime.url).netloc,
                    "LAMBDA_TASK_ROOT": folder, "PYTHONPATH": os.pathsep.join([folder, HERE]),
                }  # fmt: skip
                with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
                    command = [sys.executable, "-m", "awslambdaric", f"lambda_function.{handler}"]
                    options = {"cwd": folder, "env": environment, "stdout": log, "stderr": log}
                    with subprocess.Popen(command, **options) as process:
                        self.assertTrue(is_posted.wait(30))
                        process.kill()
                    log.seek(0)
                    printed = log.read()
                _, posted, _ = runtime.requests
                answer = posted.json
                if handler == "url_handler":
                    self.assertEqual(expected["statusCode"], answer["statusCode"])
                    answer = json.loads(answer["body"])
                self.assertEqual("/2018-06-01/runtime/invocation/1/response", posted.path)
                self.assertEqual(expected, answer)
                self.assertIn(logged, printed)
                self.assertNotIn(TOKEN, printed)


class ManyPromptsTests(ReadmeTestCase):
    def test_every_prompt_gets_its_own_answer_or_error(self):
        many = self.import_file("many")
        prompts = [f"prompt {number}" for number in range(40)]
        server = self.serve()
        echo = mock.patch(f"{words.__module__}.words", lambda request: [request["prompt"]])
        answers = {}
        with echo, contextlib.redirect_stderr(io.StringIO()) as progress:
            many.ask_all(prompts, answers)
        texts = {number: answer.text for number, answer in answers.items()}
        self.assertEqual(dict(enumerate(prompts)), texts)
        self.assertLessEqual(server.connections, 16)
        self.assertIn("40 of 40\r", progress.getvalue())
        self.serve(json_answer({"detail": "too long"}, 422))
        answers = {}
        with contextlib.redirect_stderr(io.StringIO()):
            many.ask_all(["a", "b"], answers, threads=1)
        self.assertEqual(("too long", TEXT), (answers[0].message, answers[1].text))
        self.assertIsNone(answers[0].__traceback__)

    def test_an_interruption_keeps_the_answers_and_a_second_run_asks_the_rest(self):
        many = self.import_file("many")
        asked, cancelled = threading.Event(), threading.Event()

        class Pool(ThreadPoolExecutor):
            def shutdown(self, *args, **options):  # called when the rest is cancelled
                cancelled.set()
                super().shutdown(*args, **options)

        def interrupt(future, timeout=None):  # a signal could come within the pool's own locks
            asked.wait(10)
            raise KeyboardInterrupt

        def answer_late(sock):  # it was paid for, too
            cancelled.wait(10)
            sock.sendall(ANSWER)

        def answer_last(sock):
            asked.set()
            answer_late(sock)

        server = self.serve(ANSWER, answer_late, answer_last)
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

    @unittest.skipUnless(has_module("distributed"), "Dask is not installed")
    def test_dask_sends_each_of_equal_requests_and_returns_its_classes(self):
        block = readme_block("def ask_everywhere")
        script = """
import sys
from dask.distributed import LocalCluster
import friendli_lite
from everywhere import ask_everywhere

if __name__ == "__main__":
    processes = sys.argv[1] == "processes"
    requests = [friendli_lite.CompletionRequest(prompt="Roll a die")] * 20 + [{"prompt": "a"}]
    with LocalCluster(n_workers=2, processes=processes, dashboard_address=None) as cluster:
        answers = {}
        ask_everywhere(requests, answers, cluster)
    print(sorted(answers) == list(range(21)), *{type(answer) for answer in answers.values()})
    print(all(isinstance(answer, friendli_lite.Completion) for answer in answers.values()))
"""
        folder = self.make_folder({**readme_files(), "everywhere.py": block, "script.py": script})
        for how in ("processes", "threads"):
            with self.subTest(how=how):
                server = self.serve()
                ran = self.run_python("script.py", how, cwd=folder)
                said = "True <class 'friendli_lite.Completion'>\nTrue\n"
                self.assertEqual((0, said), (ran.returncode, ran.stdout), ran.stderr)
                self.assertEqual(21, len(server.requests))


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
