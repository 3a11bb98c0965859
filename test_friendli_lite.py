"""The tests of friendli_lite, and the stand-in container that they run against.

    python3 -m unittest                                              # the tests
    python3 test_friendli_lite.py --demo "Say this is a test!"       # the command line, against a stand-in
    python3 test_friendli_lite.py --serve 8000                       # the stand-in alone, until Ctrl-C

All of it is on 127.0.0.1. Sleep, clock and chance are injected; only what tests the time limits of sockets
waits, for some tenths of a second.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import collections.abc
import contextlib
import copy
import dataclasses
import email.utils
import functools
import gc
import http.client
import importlib
import inspect
import io
import itertools
import json
import logging
import multiprocessing
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
import tracemalloc
import types
import unittest
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock
from urllib.parse import urlsplit

import friendli_lite
from friendli_lite import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    FriendliError,
    complete,
    stream,
)

HERE = os.path.dirname(os.path.abspath(__file__))
TOKEN = "flp_TopSecret0123456789"
CLOSE = "close"  # what a scripted answer returns to have its connection closed


# --- The stand-in container ---


class StandInContainer:
    """A server on a port of its own that answers POST /v1/completions as a Friendli Container does.

    A test may script what comes instead: each item is the answer to one request, either bytes, sent as
    they are, or a function of the connected socket, whose result CLOSE ends the connection.

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
        self._threads = []
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
        """Close all connections, and wait for the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(10)

    def drop_connections(self):
        """Close what is open, as a restart does."""
        with self._lock:
            open_sockets = list(self._sockets)
        for sock in open_sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

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
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        return cls(lines[0], headers, reader.read(int(headers.get("content-length", 0))))


def container_answer(received):
    """Answer as wire.md of the project's design shows: a completion or a stream, 404 or 422."""
    if received.path.partition("?")[0].rpartition("/v1/")[2] != "completions":
        return json_answer({"detail": "Not Found"}, 404)
    try:
        request = received.json
        if ("prompt" in request) == ("tokens" in request):
            raise ValueError("exactly one of prompt and tokens is needed")
    except (TypeError, ValueError) as error:
        return json_answer({"detail": [{"loc": ["body"], "msg": str(error), "type": "value_error"}]}, 422)
    return event_stream(*chunks(request)) if request.get("stream") else json_answer(completion(request))


def words(request):
    """The tokens of the answer: a test, word by word, as many as `max_tokens` allows."""
    sentence = [" This", " is", " a", " test", "!"]
    return sentence[: request.get("max_tokens") or len(sentence)]


def usage(request):
    prompts = request["prompt"] if isinstance(request.get("prompt"), list) else [request.get("prompt") or ""]
    prompt_tokens = len(request.get("tokens") or " ".join(prompts).split())
    completion_tokens = len(words(request)) * (request.get("n") or 1)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def logprobs(texts):
    return {
        "text_offset": list(itertools.accumulate([0, *map(len, texts[:-1])])),
        "token_logprobs": [-0.5] * len(texts),
        "tokens": texts,
        "top_logprobs": [{text: -0.5} for text in texts],
    }


def finish_reason(request):
    return "length" if request.get("max_tokens") == len(words(request)) else "stop"


def completion(request):
    """The body of a completion."""
    texts = words(request)
    choices = [
        {
            "index": index,
            "text": "".join(texts),
            "seed": 42 + index,
            "finish_reason": finish_reason(request),
            "tokens": list(range(len(texts))),
            "logprobs": logprobs(texts) if request.get("logprobs") else None,
        }
        for index in range(request.get("n") or 1)
    ]
    return {
        "id": "cmpl-26a1e10db8544bc3adb488d2d205288b",
        "object": "text_completion",
        "choices": choices,
        "usage": usage(request),
        "model": request.get("model"),
    }


def chunk(choices, **fields):
    """The payload of one event."""
    return {"id": "cmpl-1", "object": "text_completion", "choices": choices, **fields, "created": 1733382157}


def chunks(request):
    """The payloads of a stream, choices interleaved."""
    indexes = range(request.get("n") or 1)
    for token, text in enumerate(words(request)):
        for index in indexes:
            yield chunk(
                [
                    {
                        "index": index,
                        "text": text,
                        "token": token,
                        "finish_reason": None,
                        "logprobs": logprobs([text]) if request.get("logprobs") else None,
                    }
                ]
            )
    for index in indexes:
        yield chunk([{"index": index, "text": "", "finish_reason": finish_reason(request), "logprobs": None}])
    if (request.get("stream_options") or {}).get("include_usage"):
        yield chunk([], usage=usage(request))


def text_chunk(text, index=0):
    """The payload of an event with a text."""
    return chunk([{"index": index, "text": text, "token": 7, "finish_reason": None, "logprobs": None}])


def head(status=200, **headers):
    """The head of an answer; header names with _ for -."""
    lines = [f"HTTP/1.1 {status} Reason", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


def json_answer(payload, status=200, **headers):
    """A whole answer with a JSON body."""
    body = json.dumps(payload).encode()
    return head(status, Content_Type="application/json", Content_Length=len(body), **headers) + body


def sse(*payloads, done=True):
    """The body of an event stream."""
    events = [f"data: {json.dumps(payload, separators=(',', ':'))}\n\n" for payload in payloads]
    return "".join([*events, "data: [DONE]\n\n" if done else ""]).encode()


def chunked(*pieces):
    """Pieces of a body in chunked framing, to its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


def event_stream(*payloads, done=True, framing="chunked"):
    """A whole answer with an event stream; with framing="close" the test must close the connection."""
    return framed(sse(*payloads, done=done), framing, "text/event-stream")


def framed(body, framing, content_type):
    """A whole answer with a body in one of the three framings of HTTP/1.1."""
    if framing == "chunked":
        return head(Content_Type=content_type, Transfer_Encoding="chunked") + chunked(body)
    if framing == "length":
        return head(Content_Type=content_type, Content_Length=len(body)) + body
    return head(Content_Type=content_type, Connection="close") + body


def then_close(data):
    """A scripted answer that ends with the end of its connection."""

    def answer(sock):
        sock.sendall(data)
        return CLOSE

    return answer


# --- Helpers ---


class TestCase(unittest.TestCase):
    """A test with a stand-in container, a small environment, and no idle connection left."""

    def setUp(self):
        saved = dict(os.environ)
        self.addCleanup(os.environ.update, saved)
        self.addCleanup(os.environ.clear)
        for name in list(os.environ):  # urllib reads all of it at each call
            if not name.startswith(("PATH", "PYTHON", "SYSTEMROOT", "TEMP", "TMP")):
                del os.environ[name]
        self.addCleanup(friendli_lite._idle_connections.close)

    def serve(self, *script, **options):
        """Start a stand-in container, and make it the default server."""
        container = StandInContainer(*script, **options)
        self.addCleanup(container.close)
        os.environ["FRIENDLI_SERVER_URL"] = container.url
        return container


def run_cli(*arguments, stdin="", python=sys.executable, **env):
    """Run the command line in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [python, os.path.join(HERE, "friendli_lite.py"), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, **env},
    )


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


# --- What is sent ---

ALL_FIELDS = {
    "prompt": "Say this is a test!",
    "model": "my-adapter",
    "bad_word_tokens": [{"tokens": [1, 2]}],
    "bad_words": ["no"],
    "embedding_to_replace": [0.5, -1.0],
    "encoder_no_repeat_ngram": 1,
    "encoder_repetition_penalty": 1.5,
    "eos_token": [2],
    "forced_output_tokens": [3],
    "frequency_penalty": 0.1,
    "logprobs": 2,
    "max_tokens": 2,
    "max_total_tokens": 20,
    "min_p": 0.1,
    "min_tokens": 1,
    "min_total_tokens": 2,
    "n": 2,
    "no_repeat_ngram": 3,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.1,
    "response_format": {"type": "json_object"},
    "seed": [1, 2],
    "stop": ["\n"],
    "stop_tokens": [{"tokens": [4]}],
    "stream": False,
    "stream_options": {"include_usage": True},
    "temperature": 0.7,
    "token_index_to_replace": [0],
    "top_k": 40,
    "top_p": 0.9,
    "xtc_probability": 0.3,
    "xtc_threshold": 0.4,
}


class RequestTests(TestCase):
    def test_all_33_fields_are_sent_as_given_and_none_is_not(self):
        container = self.serve()
        friendli_lite.complete(ALL_FIELDS)
        tokens = {**ALL_FIELDS, "tokens": [1, 2, 3], "stream": True}
        del tokens["prompt"]
        list(friendli_lite.stream(tokens, max_tokens=None))
        del tokens["max_tokens"]
        self.assertEqual([ALL_FIELDS, tokens], [request.json for request in container.requests])
        self.assertEqual(33, len({**ALL_FIELDS, **tokens}))

    def test_a_request_is_a_prompt_a_mapping_or_a_completion_request(self):
        container = self.serve()
        template = friendli_lite.CompletionRequest(prompt="old", max_tokens=2, extra_body={"new_field": None})
        cases = [
            (("p",), {}, {"prompt": "p"}),
            (("",), {}, {"prompt": ""}),
            ((), {"prompt": ["p", "q"]}, {"prompt": ["p", "q"]}),
            (({"prompt": "p"},), {"n": 1}, {"prompt": "p", "n": 1}),
            (({"prompt": "p", "n": 2},), {"n": 1, "seed": None}, {"prompt": "p", "n": 1}),
            ((template,), {"prompt": "p"}, {"prompt": "p", "max_tokens": 2, "new_field": None}),
            ((template,), {"extra_body": None}, {"prompt": "old", "max_tokens": 2}),
            (
                (template,),
                {"prompt": None, "tokens": [1], "extra_body": {}},
                {"tokens": [1], "max_tokens": 2},
            ),
        ]
        for arguments, fields, body in cases:
            with self.subTest(arguments=arguments, fields=fields):
                friendli_lite.complete(*arguments, **fields)
                self.assertEqual(body, container.requests[-1].json)
        self.assertEqual("old", template.prompt)

    def test_the_three_products_differ_in_url_token_model_and_team(self):
        team = {"X-Friendli-Team": "my-team"}
        for path, arguments in (
            ("", {}),
            ("/serverless", {"token": TOKEN, "model": "meta-llama-3.1-8b-instruct", "headers": team}),
            ("/dedicated", {"token": TOKEN, "model": "ENDPOINT_ID:ADAPTER", "headers": team}),
        ):
            for call, accept in (
                (friendli_lite.complete, "application/json"),
                (friendli_lite.stream, "text/event-stream"),
            ):
                with self.subTest(path=path, call=call.__name__):
                    container = self.serve()
                    result = call("p", server_url=container.url + path, **arguments)
                    getattr(result, "close", str)()
                    received = container.requests[-1]
                    self.assertEqual(("POST", f"{path}/v1/completions"), (received.method, received.path))
                    self.assertEqual(arguments.get("model"), received.json.get("model"))
                    authorization = f"Bearer {TOKEN}" if path else None
                    self.assertEqual(authorization, received.headers.get("authorization"))
                    self.assertEqual("my-team" if path else None, received.headers.get("x-friendli-team"))
                    self.assertEqual(accept, received.headers["accept"])
                    self.assertEqual("identity", received.headers["accept-encoding"])
                    self.assertEqual("application/json", received.headers["content-type"])
                    self.assertEqual(f"127.0.0.1:{container.port}", received.headers["host"])
                    agent = f"friendli_lite/{friendli_lite.__version__}"
                    self.assertEqual(agent, received.headers["user-agent"])

    def test_the_server_url_takes_prefixes_slashes_and_v1(self):
        for url, expected in (
            ("http://h", "http://h/v1/completions"),
            ("http://h:80/", "http://h:80/v1/completions"),
            ("HTTP://h:/", "http://h/v1/completions"),
            ("HTTPS://h/v1", "https://h/v1/completions"),
            ("http://h/a/b/v1/", "http://h/a/b/v1/completions"),
            ("http://[::1]:8000", "http://[::1]:8000/v1/completions"),
            ("", "http://localhost:8000/v1/completions"),
        ):
            with self.subTest(url=url):
                self.assertEqual(expected, friendli_lite._completions_url(url))

    def test_empty_variables_count_as_unset_and_arguments_win(self):
        container = self.serve()
        os.environ["FRIENDLI_TOKEN"] = f" {TOKEN}\r\n"
        friendli_lite.complete("p")
        friendli_lite.complete("p", token="")
        friendli_lite.complete("p", token="other")
        friendli_lite.complete("p", headers={"authorization": "Basic x", "Accept": "a/b"})
        os.environ["FRIENDLI_TOKEN"] = ""
        friendli_lite.complete("p")
        sent = [request.headers.get("authorization") for request in container.requests]
        self.assertEqual([f"Bearer {TOKEN}", None, "Bearer other", "Basic x", None], sent)
        self.assertEqual("a/b", container.requests[3].headers["accept"])
        os.environ["FRIENDLI_SERVER_URL"] = ""
        self.assertEqual("http://localhost:8000/v1/completions", friendli_lite._completions_url(None))

    def test_what_the_caller_passes_is_never_changed(self):
        self.serve()
        headers, request = {"x-a": "b"}, {"prompt": "p", "extra_body": {"z": 1}}
        friendli_lite.complete(request, headers=headers, n=1)
        self.assertEqual(({"x-a": "b"}, {"prompt": "p", "extra_body": {"z": 1}}), (headers, request))

    def test_mistakes_are_named_before_anything_is_sent(self):
        container = self.serve()
        deep = []
        for _ in range(100_000):
            deep = [deep]
        circle = {}
        circle["circle"] = circle
        cases = [
            (TypeError, "unknown field 'max_token'; did you mean 'max_tokens'", ("p",), {"max_token": 1}),
            (TypeError, "unknown field 'temp'; did you mean", ({"prompt": "p", "temp": 1},), {}),
            (TypeError, "did you mean 'timeout='", ("p",), {"timeout_ms": 1}),
            (TypeError, "did you mean 'headers='", ("p",), {"http_headers": 1}),
            (TypeError, "extra_body must be Mapping", ("p",), {"extra_body": "z"}),
            (ValueError, "cannot be sent as JSON", ("p",), {"extra_body": {(): 1}}),
            (TypeError, "unknown field 3", ({"prompt": "p", 3: 1},), {}),
            (TypeError, "given twice", ("p",), {"prompt": "q"}),
            (TypeError, "prompt=[...]", (["p", "q"],), {}),
            (ValueError, "'prompt' cannot be sent as JSON", (), {"prompt": b"p"}),
            (ValueError, "neither was given", (), {}),
            (ValueError, "neither was given", (None,), {"n": 1}),
            (ValueError, "both were given", ("p",), {"tokens": [1]}),
            (ValueError, "extra_body holds 'n'", ("p",), {"extra_body": {"n": 1}}),
            (ValueError, "'temperature' cannot be sent as JSON", ("p",), {"temperature": float("nan")}),
            (ValueError, "'min_p' cannot be sent as JSON", ("p",), {"min_p": float("inf")}),
            (ValueError, "'stop' cannot be sent as JSON", ("p",), {"stop": deep}),
            (ValueError, "'response_format' cannot be sent", ("p",), {"response_format": circle}),
            (TypeError, "server_url must be str", ("p",), {"server_url": 3}),
            (ValueError, "without blank", ("p",), {"server_url": "http://h /"}),
            (ValueError, "without blank", ("p",), {"server_url": "http://h\n"}),
            (ValueError, "ASCII", ("p",), {"server_url": "http://h/\u00e9"}),
            (ValueError, "query", ("p",), {"server_url": "http://h/?a=b"}),
            (ValueError, "fragment", ("p",), {"server_url": "http://h/#stream"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "localhost:8000"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "ftp://h"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "http://"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "http://h:0"}),
            (ValueError, "Port out of range", ("p",), {"server_url": "http://h:99999"}),
            (ValueError, "server_url cannot be", ("p",), {"server_url": "http://h:port"}),
            (ValueError, "Invalid IPv6", ("p",), {"server_url": "http://[::1"}),
            (ValueError, "user:password", ("p",), {"server_url": "http://user:hunter2@h"}),
            (ValueError, "% in the host", ("p",), {"server_url": "http://h%40elsewhere"}),
            (TypeError, "token must be str", ("p",), {"token": 3}),
            (TypeError, "the header 'a' must be str", ("p",), {"headers": {"a": 3}}),
            (TypeError, "the name of a header must be str", ("p",), {"headers": {3: "a"}}),
            (TypeError, "headers must be Mapping", ("p",), {"headers": [("a", "b")]}),
            (ValueError, "the header 'a b' holds", ("p",), {"headers": {"a b": "c"}}),
            (ValueError, "the header 'a' holds", ("p",), {"headers": {"a": "b\r\nc: d"}}),
            (ValueError, "the client's to set", ("p",), {"headers": {"Content-Length": "3"}}),
            (ValueError, "the client's to set", ("p",), {"headers": {"transfer-encoding": "chunked"}}),
            (TypeError, "retries must be RetryConfig or int", ("p",), {"retries": "3"}),
            (TypeError, "retries must be RetryConfig or int", ("p",), {"retries": True}),
            (ValueError, "max_retries must be", ("p",), {"retries": -1}),
            (TypeError, "timeout must be int or float", ("p",), {"timeout": "3"}),
            (ValueError, "timeout", ("p",), {"timeout": 0}),
            (ValueError, "timeout", ("p",), {"timeout": float("nan")}),
            (ValueError, "total_timeout", ("p",), {"total_timeout": float("nan")}),
            (TypeError, "ssl_context must be SSLContext", ("p",), {"ssl_context": "ca.pem"}),
        ]
        for kind, message, arguments, fields in cases:
            for call in (friendli_lite.complete, friendli_lite.stream):
                with self.subTest(message=message, call=call.__name__):
                    with self.assertRaises(kind) as caught:
                        call(*arguments, **fields)
                    self.assertIn(message, str(caught.exception))
                    self.assertNotIn("hunter2", str(caught.exception))
        with self.assertRaisesRegex(ValueError, r"stream=True is for stream\(\)"):
            friendli_lite.complete("p", stream=True)
        with self.assertRaisesRegex(ValueError, r"stream=False is for complete\(\)"):
            friendli_lite.stream("p", stream=False)
        self.assertEqual(0, container.connections)

    def test_a_retry_config_refuses_what_is_no_number_of_seconds(self):
        for name in ("max_retries", "initial_delay", "max_delay", "multiplier", "max_retry_after"):
            for value, kind in ((-1, ValueError), (float("inf"), (TypeError, ValueError)), ("1", TypeError)):
                with self.subTest(name=name, value=value), self.assertRaisesRegex(kind, name):
                    friendli_lite.RetryConfig(**{name: value})
        for fields in ({"status_codes": ["429"]}, {"status_codes": "429"}, {"max_retries": 2.5}):
            with self.subTest(fields=fields), self.assertRaisesRegex(TypeError, next(iter(fields))):
                friendli_lite.RetryConfig(**fields)


# --- What is answered ---


class AnswerTests(TestCase):
    def test_a_completion_has_all_that_the_server_said(self):
        self.serve()
        completion = friendli_lite.complete("Say this", logprobs=1, n=2, model="adapter")
        self.assertEqual(" This is a test!", completion.text)
        self.assertEqual([0, 1], [choice.index for choice in completion.choices])
        choice = completion.choices[1]
        self.assertEqual((43, "stop", [0, 1, 2, 3, 4]), (choice.seed, choice.finish_reason, choice.tokens))
        self.assertEqual([0, 5, 8, 10, 15], choice.logprobs.text_offset)
        self.assertEqual([" This", " is", " a", " test", "!"], choice.logprobs.tokens)
        self.assertEqual({" This": -0.5}, choice.logprobs.top_logprobs[0])
        self.assertEqual(friendli_lite.Usage(2, 10, 12, {"cached_tokens": 0}), completion.usage)
        self.assertEqual(("text_completion", "adapter"), (completion.object, completion.model))
        self.assertEqual("cmpl-26a1e10db8544bc3adb488d2d205288b", completion.id)
        self.assertNotIn("raw", repr(completion))

    def test_a_stream_has_all_that_the_server_said(self):
        self.serve()
        options = {"max_tokens": 1, "logprobs": 1, "stream_options": {"include_usage": True}}
        with friendli_lite.stream("p", **options) as stream:
            first, last, usage = stream
        choice = friendli_lite.ChunkChoice(0, " This", 0, None, first.choices[0].logprobs)
        self.assertEqual([choice], first.choices)
        self.assertEqual([-0.5], choice.logprobs.token_logprobs)
        self.assertEqual(("cmpl-1", "text_completion", 1733382157), (first.id, first.object, first.created))
        self.assertEqual(("", "length"), (last.text, last.choices[0].finish_reason))
        self.assertNotIn("raw", repr(last))
        self.assertEqual(([], "", 2), (usage.choices, usage.text, usage.usage.total_tokens))

    def test_other_servers_fields_are_kept_and_missing_ones_are_none(self):
        answer = {
            "choices": [{"text": "t", "finish_reason": "abort"}],
            "usage": {"total_tokens": 3, "more": 1},
            "system_fingerprint": "b1",
            "error": None,
        }
        self.serve(json_answer(answer), json_answer({"choices": []}))
        completion = friendli_lite.complete("p")
        choice = friendli_lite.CompletionChoice(None, "t", None, "abort", [], None)
        usage = friendli_lite.Usage(total_tokens=3)
        self.assertEqual(friendli_lite.Completion(choices=[choice], usage=usage, raw=answer), completion)
        self.assertEqual(answer, completion.raw)
        self.assertEqual("", friendli_lite.complete("p").text)

    def test_the_end_of_a_choice_may_lack_a_text(self):
        answer = {"choices": [{"finish_reason": "stop"}]}
        self.serve(json_answer(answer), event_stream(answer))
        self.assertEqual("", friendli_lite.complete("p").choices[0].text)
        self.assertEqual([""], [part.choices[0].text for part in friendli_lite.stream("p")])

    def test_text_is_that_of_the_first_choice_and_empty_by_default(self):
        for answer, choice in (
            (friendli_lite.Completion, friendli_lite.CompletionChoice),
            (friendli_lite.CompletionChunk, friendli_lite.ChunkChoice),
        ):
            self.assertEqual("a", answer(choices=[choice(text="a"), choice(text="b")]).text)
            self.assertEqual("", choice().text)

    def test_no_finish_reason_is_none_however_it_is_spelled(self):
        for spelled in (None, "null", ""):
            with self.subTest(spelled=spelled):
                payload = text_chunk("t")
                payload["choices"][0]["finish_reason"] = spelled
                self.serve(event_stream(payload))
                (only,) = friendli_lite.stream("p")
                self.assertIsNone(only.choices[0].finish_reason)

    def test_chunks_arrive_while_the_server_still_sends(self):
        acknowledged = threading.Semaphore(0)

        def answer(sock):
            sock.sendall(head(Content_Type="text/event-stream", Connection="close"))
            for text in "abc":
                sock.sendall(sse(text_chunk(text), done=False))
                if not acknowledged.acquire(timeout=10):
                    return CLOSE  # the client waits for more than an event
            sock.sendall(b"data: [DONE]\n\n")
            return CLOSE

        self.serve(answer)
        texts = []
        for part in friendli_lite.stream("p"):
            texts.append(part.text)
            acknowledged.release()
        self.assertEqual(["a", "b", "c"], texts)

    def test_a_stream_is_a_generator_and_a_context_manager(self):
        self.serve()
        with friendli_lite.stream("p") as stream:
            self.assertIsInstance(stream, collections.abc.Generator)
            self.assertIs(stream, iter(stream))
            self.assertEqual([" This", " is"], [next(stream).text, stream.send(None).text])
            with self.assertRaises(KeyError):
                stream.throw(KeyError("thrown"))
            self.assertEqual([], list(stream))
        with friendli_lite.stream("p") as stream:
            thrown = friendli_lite.APIConnectionError("thrown")  # which is not tried again
            with self.assertRaises(friendli_lite.APIConnectionError) as caught:
                stream.throw(thrown)
            self.assertEqual(("thrown", []), (str(caught.exception), list(stream)))


# --- Retries: waits are recorded, chance is told ---


def prepared(container, retries=None, total_timeout=None, draw=1.0, clock=time.monotonic):
    """A call whose sleeps are recorded, and in which chance draws a fraction of what it may."""
    call = friendli_lite._Call(
        url=friendli_lite._completions_url(container.url),
        body=b'{"prompt": "p"}',
        headers={"Authorization": f"Bearer {TOKEN}"},
        retries=friendli_lite._retry_config(retries),
        limits=friendli_lite._Limits(600.0, total_timeout, clock),
        ssl_context=None,
    )
    waits = []
    call.sleep = waits.append
    call.uniform = lambda low, high: low + draw * (high - low)
    return call, waits


class RetryTests(TestCase):
    def waits(self, *answers, **options):
        """Make a call that gets these answers; return its waits, and its result or error."""
        with StandInContainer(*answers) as container:
            call, waits = prepared(container, **options)
            try:
                result = next(filter(None, call.run(friendli_lite._read_completion)))
            except friendli_lite.FriendliError as error:
                result = error
            self.assertEqual(call.attempts, len(container.requests))
            return waits, result

    def test_the_waits_grow_to_the_longest_with_full_jitter(self):
        unavailable = [json_answer({}, 503)] * 7
        for draw, expected in ((1.0, [0.5, 1, 2, 4, 8, 8]), (0.5, [0.25, 0.5, 1, 2, 4, 4]), (0, [0] * 6)):
            with self.subTest(draw=draw):
                waits, error = self.waits(*unavailable, retries=6, draw=draw)
                self.assertEqual(expected, waits)
                self.assertEqual((503, 7), (error.status_code, error.attempts))
                self.assertIn("(after 7 attempts)", str(error))

    def test_the_default_is_three_retries_of_the_five_statuses(self):
        for status in (429, 500, 502, 503, 504):
            with self.subTest(status=status):
                waits, result = self.waits(*[json_answer({}, status)] * 3)
                self.assertEqual(([0.5, 1, 2], " This is a test!"), (waits, result.text))
        for status in (204, 301, 400, 401, 404, 422, 501):
            with self.subTest(status=status):
                waits, error = self.waits(head(status, Content_Length=0), retries=3)
                self.assertEqual(([], status, 1), (waits, error.status_code, error.attempts))

    def test_the_longest_delay_never_overflows(self):
        config = friendli_lite.RetryConfig(max_retries=5000)
        error = friendli_lite.APIConnectionError("")
        for retry, longest in ((0, 0.5), (4, 8.0), (4000, 8.0)):
            wait = friendli_lite._wait_before_retry(error, retry, config, lambda low, high: high)
            self.assertEqual(longest, wait)

    def test_a_server_may_ask_for_a_wait(self):
        now = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT
        for headers, expected in (
            ({"retry-after": "7"}, 7.0),
            ({"retry-after": " 0 "}, 0.0),
            ({"retry-after": "1.5"}, 1.5),
            ({"retry-after-ms": "250"}, 0.25),
            ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
            ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
            ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 30.0),
            ({"retry-after": "Wed, 21 Oct 2015 09:28:30 +0200"}, 30.0),
            ({"retry-after": "Wed, 21 Oct 2015 07:27:59 GMT"}, None),
            ({"retry-after": "Wed, 99 Oct 99999 07:28:30 GMT"}, None),
            ({"retry-after": "-1"}, None),
            ({"retry-after": "nan"}, None),
            ({"retry-after": "inf"}, None),
            ({"retry-after": "1e3"}, None),
            ({"retry-after": "soon"}, None),
            ({"retry-after": ""}, None),
            ({}, None),
        ):
            with self.subTest(headers=headers):
                self.assertEqual(expected, friendli_lite._retry_after(headers, now))

    def test_what_a_server_asks_for_replaces_the_backoff_up_to_a_limit(self):
        asks = [json_answer({"message": "slow down"}, 429, Retry_After=s) for s in ("60", "nonsense", "61")]
        waits, error = self.waits(*asks)
        self.assertEqual([60, 1.0], waits)
        self.assertIn("slow down (Retry-After: 61)", str(error))
        self.assertEqual("slow down", error.message)
        date = email.utils.formatdate(time.time() + 30, usegmt=True)
        ((wait,), _) = self.waits(json_answer({}, 503, Retry_After=date))
        self.assertTrue(28 < wait <= 30, wait)

    def test_a_wait_that_does_not_fit_is_not_begun(self):
        for total_timeout, expected in ((4.0, [3]), (3.0, []), (2.9, [])):
            with self.subTest(total_timeout=total_timeout):
                answers = [json_answer({}, 503, Retry_After=3)] * 2
                waits, error = self.waits(*answers, retries=1, total_timeout=total_timeout, clock=lambda: 0.0)
                self.assertEqual(expected, waits)
                self.assertIsInstance(error, friendli_lite.APIStatusError)

    def test_broken_connections_are_tried_again_where_wanted(self):
        cut = then_close(head(Content_Type="application/json", Content_Length=100) + b"{")
        waits, result = self.waits(then_close(b""), cut)
        self.assertEqual(([0.5, 1], " This is a test!"), (waits, result.text))
        config = friendli_lite.RetryConfig(retry_connection_errors=False)
        waits, error = self.waits(cut, retries=config)
        self.assertEqual(([], 1), (waits, error.attempts))
        self.assertIsInstance(error, friendli_lite.APIConnectionError)

    def test_a_wrong_answer_is_not_tried_again(self):
        waits, error = self.waits(json_answer({"choices": None}))
        self.assertEqual([], waits)
        self.assertIsInstance(error, friendli_lite.APIResponseError)

    def test_timeouts_are_tried_again_only_where_asked(self):
        error = friendli_lite.APITimeoutError("")
        for config, expected in (
            (friendli_lite.RetryConfig(), False),
            (friendli_lite.RetryConfig(retry_timeouts=True), True),
        ):
            self.assertEqual(expected, friendli_lite._is_retryable(error, config))

    def test_a_stream_is_tried_again_until_its_first_event(self):
        container = self.serve(
            json_answer({}, 503),
            then_close(event_stream(done=False)),
            then_close(head(Content_Type="text/event-stream", Connection="close") + b": ping\n\ndata: {"),
        )
        config = friendli_lite.RetryConfig(initial_delay=0)
        with friendli_lite.stream("p", retries=config) as stream:
            self.assertEqual(2, len(container.requests))
            self.assertEqual(" This is a test!", "".join(part.text for part in stream))
        self.assertEqual(4, len(container.requests))

    def test_close_from_another_thread_ends_a_try_whose_answer_is_still_to_come(self):
        def head_after_close(sock):
            stream.close()
            return hang(STREAM_HEAD)(sock)

        with StandInContainer(then_close(event_stream(done=False)), head_after_close) as container:
            call, _ = prepared(container)
            stream = friendli_lite.CompletionStream(call)
            self.assertRaises(friendli_lite.APIConnectionError, next, stream)

    def test_close_from_another_thread_leaves_alone_what_was_released(self):
        def take_over_and_close(seconds):
            (idle,) = friendli_lite._idle_connections._idle
            thread = threading.Thread(target=stream.close)
            thread.start()
            thread.join()
            self.assertTrue(idle.leaves_alive(friendli_lite._Limits(None, 1)))

        with StandInContainer(then_close(event_stream(done=False)), json_answer({}, 503)) as container:
            call, _ = prepared(container)
            stream = friendli_lite.CompletionStream(call)
            waits = iter([lambda seconds: None, take_over_and_close])
            call.sleep = lambda seconds: next(waits)(seconds)
            self.assertRaises(friendli_lite.APIConnectionError, next, stream)
            self.assertEqual(2, len(container.requests))

    def test_close_from_another_thread_ends_a_wait_for_a_retry(self):
        def close_meanwhile(seconds):
            thread = threading.Thread(target=stream.close)
            thread.start()
            thread.join()

        with StandInContainer(then_close(event_stream(done=False))) as container:
            call, _ = prepared(container)
            stream = friendli_lite.CompletionStream(call)
            call.sleep = close_meanwhile
            with self.assertRaisesRegex(friendli_lite.APIConnectionError, "another thread closed the stream"):
                next(stream)
            self.assertEqual(1, len(container.requests))

    def test_a_stream_is_never_tried_again_after_its_first_event(self):
        container = self.serve(then_close(event_stream(text_chunk("a"), done=False)))
        texts = []
        with self.assertRaises(friendli_lite.APIConnectionError) as caught:
            for part in friendli_lite.stream("p", retries=friendli_lite.RetryConfig(initial_delay=0)):
                texts.append(part.text)
        self.assertEqual((["a"], 1), (texts, len(container.requests)))
        self.assertEqual(1, caught.exception.attempts)
        self.assertIn(container.url, str(caught.exception))

    def test_each_retry_is_logged_with_cause_wait_and_number(self):
        with self.assertLogs("friendli_lite", "INFO") as logs:
            self.waits(json_answer({"message": TOKEN}, 503))
        (line,) = logs.output
        for part in ("503", "retry 1 of 3", "in 0.50 s"):
            self.assertIn(part, line)
        self.assertNotIn(TOKEN, line)


# --- Errors ---


class ErrorTests(TestCase):
    def test_an_answer_before_all_was_sent_is_read_where_the_connection_broke(self):
        """As 413 may come."""
        container = self.serve(json_answer({"error": "too large"}, 413))
        send = friendli_lite._Connection._send

        def break_after_it(connection, data):
            send(connection, data)
            raise BrokenPipeError

        patch = mock.patch.object(friendli_lite._Connection, "_send", break_after_it)
        with patch, self.assertRaisesRegex(friendli_lite.APIStatusError, "too large"):
            friendli_lite.complete("p")
        self.assertEqual(1, len(container.requests))

    def test_the_headers_of_an_error_are_whole_and_its_text_is_one_short_line(self):
        long = "a  b" * 500
        self.serve(json_answer({}, 302, Location=long, X_Long=long))
        with self.assertRaises(friendli_lite.APIStatusError) as caught:
            friendli_lite.complete("p")
        self.assertEqual([long] * 2, [caught.exception.headers[name] for name in ("location", "x-long")])
        self.assertLess(len(str(caught.exception)), 1000)

    def test_no_server_is_an_error_that_says_where_how_often_and_what_to_set(self):
        container = self.serve()
        container.close()
        for call in (friendli_lite.complete, friendli_lite.stream):
            with self.assertRaises(friendli_lite.APIConnectionError) as caught:
                call("p", retries=friendli_lite.RetryConfig(initial_delay=0))
            for part in (container.url, "refused", "after 4 attempts", "server_url"):
                self.assertIn(part, str(caught.exception))

    def test_the_servers_own_words_are_found_in_any_body(self):
        long = "x" * 10_000
        located = [{"loc": ["body", "prompt"], "msg": "none is not allowed", "type": "type_error"}, "more"]
        for body, message in (
            ('{"detail": "no such model"}', "no such model"),
            (json.dumps({"detail": located}), "body.prompt: none is not allowed; more"),
            ('{"error": {"message": "overloaded", "code": 3}}', "overloaded"),
            ('{"error": "overloaded"}', "overloaded"),
            ('{"error": {"code": 3}, "message": "outer"}', "outer"),
            ('{"message": "quota\\nspent\\u001b[31m"}', "quota spent [31m"),
            ("[]", ""),
            ("{}", ""),
            ("null", ""),
            ("3", "3"),
            ("plain\r\n text", "plain text"),
            ("<html><title>502</title><p>Bad Gateway</p></html>", "502 Bad Gateway"),
            ("", ""),
            ("[" * 5000, "[" * 500 + "..."),
            (json.dumps({"error": long}), long[:500] + "..."),
        ):
            with self.subTest(body=body[:60]):
                self.serve(framed(body.encode(), "length", "text/plain").replace(b" 200 ", b" 400 "))
                with self.assertRaises(friendli_lite.APIStatusError) as caught:
                    friendli_lite.complete("p")
                error = caught.exception
                self.assertEqual((400, body, message), (error.status_code, error.body, error.message))
                self.assertIn(message, str(error))
                self.assertEqual("text/plain", error.headers["content-type"])
                self.assertEqual(1, len(str(error).splitlines()))

    def test_some_statuses_come_with_advice(self):
        for status, advice in ((401, "see token"), (404, "see model and server_url"), (429, "retries")):
            with self.subTest(status=status):
                self.serve(json_answer({}, status))
                with self.assertRaisesRegex(friendli_lite.APIStatusError, advice):
                    friendli_lite.complete("p", retries=0)

    def test_errors_survive_pickling_and_copying(self):
        details = {"status_code": 503, "headers": {"a": "b"}, "body": "body", "message": "words"}
        status = friendli_lite.APIStatusError("text", **details)
        response = friendli_lite.APIResponseError("text", body="body")
        for error in (
            status,
            response,
            friendli_lite.FriendliError("text"),
            friendli_lite.APIConnectionError("text"),
            friendli_lite.APITimeoutError("text"),
        ):
            error.attempts = 3
            for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
                self.assertEqual((type(error), str(error), vars(error)), (type(twin), str(twin), vars(twin)))
        self.assertEqual({**details, "attempts": 3}, vars(status))
        error = friendli_lite.FriendliError("text")
        self.assertEqual(("text", 0), (str(error), error.attempts))

    def test_tls_that_cannot_be_set_up_is_an_error_of_the_connection(self):
        os.environ["SSLKEYLOGFILE"] = os.path.join(HERE, "no", "such", "folder")
        friendli_lite._build_ssl_context.cache_clear()
        url = self.serve().url.replace("http", "https")
        with self.assertRaisesRegex(friendli_lite.APIConnectionError, "cannot connect: No such file"):
            friendli_lite.complete("p", server_url=url, retries=0)

    def test_a_spent_total_timeout_sends_nothing(self):
        container = self.serve()
        for total_timeout in (0, -1.5):
            with self.assertRaises(friendli_lite.APITimeoutError) as caught:
                friendli_lite.complete("p", total_timeout=total_timeout)
            self.assertEqual(0, caught.exception.attempts)
        self.assertEqual(0, container.connections)


# --- The command line ---


class CommandLineTests(TestCase):
    def run_main(self, *arguments, stdin=""):
        """Run the command line in this process; return its exit status, stdout and stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(stdin)))
            status = exit_status_of_main(arguments)
        return status, out.getvalue(), err.getvalue()

    def test_it_prints_a_stream_or_a_completion(self):
        container = self.serve()
        text = " This is a test!\n"
        self.assertEqual((0, text, ""), self.run_main("p"))
        self.assertEqual((0, text, ""), self.run_main("--no-stream", "p"))
        self.assertEqual((0, text, ""), self.run_main("--set", "n=2", "p"))
        self.assertEqual((0, text, ""), self.run_main(stdin="from stdin\n"))
        self.assertEqual((0, text, ""), self.run_main("-", stdin="from stdin\n"))
        prompts = [request.json["prompt"] for request in container.requests]
        self.assertEqual(["p", "p", "p", "from stdin\n", "from stdin\n"], prompts)

    def test_options_become_fields(self):
        container = self.serve()
        self.run_main(
            *("--model", "m", "--max-tokens", "2", "--temperature", "0.5", "--set", 'stop=["a=b"]'),
            *("--set", "seed=3", "--timeout", "5", "--total-timeout", "6", "--retries", "0", "p"),
            *("--server-url", container.url + "/prefix/"),
        )
        expected = {"model": "m", "max_tokens": 2, "temperature": 0.5, "stop": ["a=b"], "seed": 3}
        self.assertEqual({**expected, "prompt": "p", "stream": True}, container.requests[0].json)
        self.assertEqual("/prefix/v1/completions", container.requests[0].path)

    def test_a_prompt_or_tokens_may_be_set(self):
        container = self.serve()
        for field, value in (("tokens", [1, 2]), ("prompt", ["p", "q"])):
            self.assertEqual(0, self.run_main("--set", f"{field}={json.dumps(value)}")[0])
            self.assertEqual({field: value, "stream": True}, container.requests[-1].json)

    def test_json_is_the_raw_object_or_one_a_line(self):
        self.serve()
        _, out, _ = self.run_main("--json", "--no-stream", "p")
        self.assertEqual(completion({"prompt": "p"}), json.loads(out))
        _, out, _ = self.run_main("--json", "p")
        self.assertEqual(list(chunks({"prompt": "p"})), [json.loads(line) for line in out.splitlines()])

    def test_failures_are_one_line_and_exit_status_1(self):
        self.serve(json_answer({"detail": "no such model"}, 404))
        status, out, err = self.run_main("p")
        self.assertEqual((1, ""), (status, out))
        self.assertRegex(err, r"\Afriendli_lite: POST http://.*404.*no such model.*\n\Z")
        self.assertNotIn("attempts", err)  # there was one
        status, _, err = self.run_main("--total-timeout", "0", "p")
        self.assertEqual((1, True), (status, "total_timeout=0 s was spent" in err))

    def test_wrong_usage_is_exit_status_2(self):
        container = self.serve()
        for arguments, message in (
            (("--set", "max_token=3", "p"), "did you mean 'max_tokens'"),
            (("--set", "stop", "p"), "NAME=JSON"),
            (("--set", "stop=[", "p"), "NAME=JSON"),
            (("--set", "tokens=[1]", "p"), "both were given"),
            (("--set", 'token="flp"', "p"), "unknown field 'token'"),
            (("--retries", "-1", "p"), "max_retries"),
            (("--timeout", "0", "p"), "timeout"),
            (("--server-url", "nowhere", "p"), "server_url"),
            (("--no-such-option", "p"), "unrecognized"),
        ):
            with self.subTest(arguments=arguments):
                status, out, err = self.run_main(*arguments)
                self.assertEqual((2, ""), (status, out))
                self.assertIn(message, err)
        self.assertEqual(0, container.connections)

    def test_verbose_tells_of_requests_and_retries_but_not_of_token_and_prompt(self):
        self.serve(json_answer({}, 503, Retry_After=0))
        logger = logging.getLogger("friendli_lite")
        self.addCleanup(logger.setLevel, logger.level)
        os.environ["FRIENDLI_TOKEN"] = TOKEN
        with self.assertLogs("friendli_lite", "DEBUG") as logs:
            self.run_main("--verbose", "a secret prompt")
        said = "\n".join(logs.output)
        for part in ("status 503", "retry 1 of 3", "status 200 after", "done after"):
            self.assertIn(part, said)
        self.assertNotIn(TOKEN, said)
        self.assertNotIn("secret prompt", said)

    def test_ctrl_c_is_exit_status_130_without_a_traceback(self):
        def interrupt(sock):
            os.kill(os.getpid(), signal.SIGINT)
            sock.sendall(event_stream())  # wakes the client, if it waited before the signal came

        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored under nohup
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
        reader, writer = os.pipe()
        os.close(reader)
        self.assertEqual((0, ""), self.run_main_to(os.fdopen(writer, "w")))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_said(self):
        self.serve()
        for options in ((), ("--json",), ("--no-stream",)):
            with self.subTest(options=options):
                status, err = self.run_main_to(os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"), *options)
                self.assertEqual(1, status)
                self.assertRegex(err, r"\Afriendli_lite: .*No space left on device\n\Z")

    def test_the_demo_and_the_module_run_as_the_readme_says(self):
        demo = [sys.executable, os.path.join(HERE, "test_friendli_lite.py"), "--demo", "Say this is a test!"]
        ran = subprocess.run(demo, capture_output=True, text=True)
        self.assertEqual((0, " This is a test!\n", ""), (ran.returncode, ran.stdout, ran.stderr))
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(sys, "argv", ["friendli_lite", "--version"]))
            out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(self.assertRaises(SystemExit))
            runpy.run_path(os.path.join(HERE, "friendli_lite.py"), run_name="__main__")
        self.assertEqual(f"friendli_lite {friendli_lite.__version__}\n", out.getvalue())


# --- Connections ---

TEXT = " This is a test!"
ANSWER = json_answer(completion({}))
STREAM = event_stream(*chunks({}))
JSON_HEAD = head(Content_Type="application/json", Content_Length=100_000)
STREAM_HEAD = head(Content_Type="text/event-stream", Transfer_Encoding="chunked")


def text_of_completion(*args, **options):
    return friendli_lite.complete(*args, **options).text


def text_of_stream(*args, **options):
    with friendli_lite.stream(*args, **options) as stream:
        return "".join(chunk.text for chunk in stream)


CALLS = (text_of_completion, text_of_stream)

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
    """Make a CA and certificates, once for all tests; return a function from "ca.pem" to its path."""
    if shutil.which("openssl") is None:
        raise unittest.SkipTest("there is no openssl command to make certificates with")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = functools.partial(os.path.join, folder.name)
    with open(path("config"), "w") as config:
        config.write(OPENSSL_CONFIG)

    def openssl(name, hosts, command):
        env = {**os.environ, "NAME": name, "HOSTS": hosts}
        command = ["openssl", *command.format(name=name).split()]
        subprocess.run(command, cwd=folder.name, env=env, check=True, capture_output=True)

    here = "DNS:localhost,IP:127.0.0.1"
    new = "req -config config -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -keyout {name}.key "
    openssl("ca", here, new + "-x509 -days 2 -extensions ca -out {name}.pem")
    openssl("self-signed", here, new + "-x509 -days 2 -extensions leaf -out {name}.pem")
    sign = "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile config "
    elsewhere = "DNS:elsewhere.invalid"
    for name, hosts, days in [
        ("server", here, 2),
        ("expired", here, -1),
        ("elsewhere", elsewhere, 2),
        ("client", elsewhere, 2),
    ]:
        openssl(name, hosts, new + "-new -out {name}.csr")
        openssl(name, hosts, sign + f"-extensions leaf -days {days} -out {name}.pem")
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


class Proxy(StandInContainer):
    """A proxy for http, by absolute URI, and for https, by CONNECT; `seen` is what came through tunnels."""

    def __init__(self, user_password=None, refusal=None):
        self.seen = b""
        self._refusal = refusal
        self._credentials = user_password and "Basic " + base64.b64encode(user_password.encode()).decode()
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


def hang(data=b""):
    """A scripted answer that stops after some bytes, until the client leaves."""

    def answer(sock):
        sock.sendall(data)
        sock.recv(1)
        return CLOSE

    return answer


def trickle(data, more):
    """A scripted answer that goes on, a piece every 25 ms, until the client leaves."""

    def answer(sock):
        while True:
            sock.sendall(data if not more_follows else more)
            more_follows.append(True)
            time.sleep(0.025)

    more_follows = []
    return answer


def fin(sock):
    """A scripted answer: none, and the connection is closed."""
    sock.shutdown(socket.SHUT_RDWR)
    return CLOSE


def rst(sock):
    """The same, by a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(sock.detach())
    return CLOSE


class Later:
    """A scripted answer of some bytes and, when the test says `now()`, another."""

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
        assert self._done.wait(5)


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


def shown(error):
    """All that a report may show of an error and of those behind it."""
    errors, pending = [], [error]
    while pending:
        error = pending.pop()
        if error is not None and error not in errors:
            errors.append(error)
            pending += [error.__cause__, error.__context__]
    return "\n".join(f"{error} {error!r} {vars(error)}" for error in errors)


class ConnectionTestCase(TestCase):
    """A test whose calls carry TOKEN: no error and no log may show it, and no socket may stay open."""

    def setUp(self):
        super().setUp()
        os.environ["FRIENDLI_TOKEN"] = TOKEN
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
        friendli_lite._idle_connections.close()
        gc.collect(1)
        self.assertEqual([], [str(warning.message) for warning in warned])

    def failure(self, kind, call=text_of_completion, **options):
        """Make a call that must fail with exactly this error, which must not show the token."""
        with self.assertRaises(kind) as caught:
            call(**{"prompt": "x", "retries": 0, "timeout": 5, **options})
        self.assertIs(kind, type(caught.exception))
        self.assertNotIn(TOKEN, shown(caught.exception))
        return caught.exception

    def call(self, times=1, call=text_of_completion, **options):
        """Make calls that must succeed at the first try."""
        for _ in range(times):
            self.assertEqual(TEXT, call("x", **{"retries": 0, "timeout": 5, **options}))

    @contextlib.contextmanager
    def case(self, *names):
        """Run a case of a table, and leave no idle connection to the next."""
        with self.subTest(" ".join(map(str, names))):
            yield
        friendli_lite._idle_connections.close()

    @contextlib.contextmanager
    def within(self, seconds):
        start = time.monotonic()
        yield
        self.assertLess(time.monotonic() - start, seconds)

    @contextlib.contextmanager
    def each(self, scheme, *script):
        """Run a case with a server of this scheme; yield it, and the options for calls of it."""
        options = {"ssl_context": client_tls()} if scheme == "https" else {}
        with self.case(scheme, *script), self.serve(*script, tls=server_tls() if options else None) as server:
            yield server, options


class ReuseTests(ConnectionTestCase):
    def test_ten_calls_in_a_row_are_one_connection(self):
        by_length = event_stream(*chunks({}), framing="length")
        for call, answer in zip(CALLS + CALLS[1:], [ANSWER, STREAM, by_length]):
            with self.case(call.__name__, answer), self.serve(*[answer] * 10) as server:
                self.call(10, call)
                self.assertEqual((10, 1), (len(server.requests), server.connections))

    def test_over_tls_they_are_one_handshake_for_session_tickets_are_no_sign_of_death(self):
        for call in CALLS:
            tls = server_tls()
            context = client_tls()
            with self.case(call.__name__), self.serve(tls=tls) as server:
                self.call(10, call, ssl_context=context)
                self.assertEqual((1, 1), (server.connections, tls.session_stats()["accept_good"]))

    def test_a_stream_does_not_wait_for_the_bytes_after_done_but_the_next_call_takes_them_in(self):
        for framing in ("chunked", "length"):
            answer = event_stream(*chunks({}), framing=framing)
            end = answer.index(b"[DONE]\n") + len(b"[DONE]\n")
            later = Later(answer[:end], answer[end:])
            with self.case(framing), self.serve(later) as server:
                with self.within(1):
                    self.call(call=text_of_stream)
                later.now()
                self.call()
                self.assertEqual(1, server.connections)

    def test_bytes_after_done_that_do_not_come_are_waited_for_for_10_ms_in_all(self):
        with self.serve(*[hang(STREAM[:-5])] * 20) as server:
            for stream in [friendli_lite.stream("x") for _ in range(20)]:
                list(stream)
            with self.within(0.1):
                self.call()
            self.assertEqual(21, server.connections)

    def test_a_server_that_closes_after_its_answer_is_obeyed(self):
        close = json_answer(completion({}), Connection="close")
        old = ANSWER.replace(b"HTTP/1.1", b"HTTP/1.0")
        kept = json_answer(completion({}), Connection="keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
        for answer, connections in [(close, 3), (old, 3), (kept, 1)]:
            with self.case(answer), self.serve(*[answer] * 3) as server:
                self.call(3)
                self.assertEqual(connections, server.connections)

    def test_after_an_error_a_connection_is_reused_if_its_answer_was_whole(self):
        large = head(503, Content_Length=200_000) + b"x" * 200_000
        broken = head(503, Transfer_Encoding="chunked") + b"nonsense\r\n"
        for name, answer, connections in [
            ("whole", json_answer({}, 503), 1),
            ("large", large, 1),
            ("broken", broken, 2),
        ]:
            with self.case(name), self.serve(answer) as server:
                self.failure(friendli_lite.APIStatusError)
                self.call()
                self.assertEqual(connections, server.connections)

    def test_a_stream_that_is_left_early_closes_its_connection(self):
        def answer(sock):
            sock.sendall(STREAM[:-40])
            sock.settimeout(5)
            left.append(sock.recv(1))
            return CLOSE

        left = []
        for leave in (friendli_lite.CompletionStream.close, id):  # id: it is left to garbage collection
            with self.case(leave), self.serve(answer) as server:
                stream = friendli_lite.stream("x")
                next(stream)
                leave(stream)
                del stream
                server.close()
                self.assertEqual(b"", left.pop())

    def test_calls_by_other_contexts_and_proxies_get_connections_of_their_own(self):
        one, other = client_tls(), client_tls()
        with Proxy() as proxy, self.serve(tls=server_tls()) as server:
            for connections, context, proxy_url in [
                (1, one, ""),
                (2, other, ""),
                (2, one, ""),
                (3, one, proxy.url),
                (4, one, proxy.url.replace("//", "//user:password@")),
                (4, one, ""),
            ]:
                os.environ["HTTPS_PROXY"] = proxy_url
                self.call(ssl_context=context)
                self.assertEqual(connections, server.connections)

    def test_the_default_ports_are_80_and_443(self):
        def no_address(host, port, **options):
            asked.append((host, port))
            return []

        asked = []
        with mock.patch.object(socket, "getaddrinfo", no_address):
            for url in ("http://h", "https://h", "https://h:8443"):
                self.failure(friendli_lite.APIConnectionError, server_url=url)
            os.environ["HTTPS_PROXY"] = "http://proxy"
            self.failure(friendli_lite.APIConnectionError, server_url="https://h")
        self.assertEqual([("h", 80), ("h", 443), ("h", 8443), ("proxy", 80)], asked)

    def test_the_longest_idle_are_closed_first(self):
        pool = friendli_lite._IdleConnections(lambda: 0.0)
        answers = [mock.Mock() for _ in range(3)]
        with mock.patch.object(friendli_lite, "_MAX_IDLE_CONNECTIONS", 2):
            for answer in answers:
                pool.put(answer)
        self.assertEqual([1, 0, 0], [answer.connection.sock.close.call_count for answer in answers])

    def test_the_pool_is_bounded(self):
        with mock.patch.object(friendli_lite, "_MAX_IDLE_CONNECTIONS", 3), self.serve() as server:
            for stream in [friendli_lite.stream("x") for _ in range(8)]:
                list(stream)
            deadline = time.monotonic() + 5
            while len(server._sockets) != 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            self.assertEqual((3, 8), (len(server._sockets), server.connections))

    def test_tcp_keep_alive_is_on_at_60_s_where_the_platform_lets_it_be_set(self):
        def create_connection(*args, create=socket.create_connection, **options):
            sockets.append(create(*args, **options))
            return sockets[0]

        sockets = []
        with mock.patch.object(socket, "create_connection", create_connection), self.serve():
            self.call()
        self.assertTrue(sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):
            if hasattr(socket, name):
                self.assertEqual(60, sockets[0].getsockopt(socket.IPPROTO_TCP, getattr(socket, name)), name)


class DeadConnectionTests(ConnectionTestCase):
    def test_an_idle_connection_that_the_server_has_closed_is_replaced(self):
        for scheme, end in itertools.product(["http", "https"], [fin, rst]):
            later = Later(ANSWER, end)
            with self.each(scheme, later) as (server, options):
                self.call(**options)
                later.now()
                self.call(**options)
                self.assertEqual((2, 2), (len(server.requests), server.connections))

    def test_a_restart_is_not_noticed(self):
        with self.serve() as server:
            self.call(2)
        with self.serve(port=server.port) as restarted:
            self.call()
        self.assertEqual((2, 1), (len(server.requests), len(restarted.requests)))

    def test_one_that_is_closed_at_the_very_moment_is_replaced_if_no_byte_of_an_answer_came(self):
        for scheme, end in itertools.product(["http", "https"], [fin, rst]):
            with self.each(scheme, ANSWER, end) as (server, options):
                self.call(2, **options)
                self.assertEqual((3, 2), (len(server.requests), server.connections))

    def test_over_tls_one_that_ends_with_an_alert_is_replaced_too(self):
        def alert(sock):
            os.write(sock.fileno(), b"\x15\x03\x03\x00\x02\x02\x50")  # past the encryption
            return CLOSE

        with self.each("https", ANSWER, alert) as (server, options):
            self.call(2, **options)
            self.assertEqual((3, 2), (len(server.requests), server.connections))

    def test_one_that_breaks_late_has_most_likely_been_served_and_is_not_replaced(self):
        def end_late(sock):
            time.sleep(0.1)
            return CLOSE

        patch = mock.patch.object(friendli_lite, "_MAX_STALE_SECONDS", 0.05)
        with patch, self.serve(ANSWER, end_late) as server:
            self.call()
            self.failure(friendli_lite.APIConnectionError)
            self.assertEqual((2, 1), (len(server.requests), server.connections))

    def test_after_a_byte_of_an_answer_or_on_a_fresh_one_the_request_is_not_sent_again(self):
        half_a_head = head(Content_Type="application/json")[:-2]
        for script in ([ANSWER, then_close(b"H")], [ANSWER, then_close(half_a_head)], [fin], [rst]):
            with self.case(script), self.serve(*script) as server:
                self.call(len(script) - 1)
                self.assertEqual(1, self.failure(friendli_lite.APIConnectionError).attempts)
                self.assertEqual((len(script), 1), (len(server.requests), server.connections))

    def test_bytes_that_nobody_asked_for_end_a_connection(self):
        later = Later(ANSWER, json_answer(completion({"max_tokens": 1})))
        with self.serve(later) as server:
            self.call()
            later.now()
            self.call()
            self.assertEqual(2, server.connections)

    def test_one_that_has_rested_for_longer_than_servers_keep_them_is_not_used(self):
        for rest, connections in [(3.9, 1), (4.1, 2), (3600.0, 2)]:
            clock = mock.Mock(return_value=1000.0)
            patch = mock.patch.object(friendli_lite._idle_connections, "clock", clock)
            with patch, self.case(rest), self.serve() as server:
                self.call()
                clock.return_value += rest
                self.call()
                self.assertEqual(connections, server.connections)


class ThreadsAndProcessesTests(ConnectionTestCase):
    def test_32_threads_with_50_calls_each_get_the_answers_to_their_own_questions(self):
        logging.getLogger("friendli_lite").setLevel(logging.INFO)

        def ask(thread):
            names = [f"{thread}/{number}" for number in range(50)]
            return [friendli_lite.complete("x", model=name, retries=0).model == name for name in names]

        with self.serve() as server, ThreadPoolExecutor(32) as pool:
            self.assertEqual([[True] * 50] * 32, list(pool.map(ask, range(32))))
            self.assertEqual(1600, len(server.requests))
            self.assertLessEqual(server.connections, 200)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no os.fork()")
    def test_a_forked_child_touches_no_connection_of_its_parent(self):
        later = Later(STREAM[:-40], STREAM[-40:])
        with self.serve(later) as server:
            stream = friendli_lite.stream("x")
            text = next(stream).text
            self.call()
            self.assertEqual(0, exit_status(lambda: (stream.close(), self.call())))
            later.now()
            self.assertEqual(TEXT, text + "".join(chunk.text for chunk in stream))
            self.call(2)
            self.assertEqual((5, 3), (len(server.requests), server.connections))

    def test_what_a_child_does_first_is_to_let_go_of_connections_and_lock(self):
        with self.serve() as server:
            self.call()
            with friendli_lite._idle_connections.lock:  # as if another thread had held it
                friendli_lite._idle_connections.forget_after_fork()
            self.call()
            self.assertEqual(2, server.connections)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no os.fork()")
    def test_a_fork_while_another_thread_looks_for_a_connection_leaves_no_lock_behind(self):
        def clock():
            if threading.current_thread() is thread:
                looking.set()
                go_on.wait(5)
            return time.monotonic()

        looking, go_on = threading.Event(), threading.Event()
        thread = threading.Thread(target=self.call)
        with mock.patch.object(friendli_lite._idle_connections, "clock", clock), self.serve():
            thread.start()
            self.assertTrue(looking.wait(5))
            self.assertEqual(0, exit_status(self.call))
            go_on.set()
            thread.join(5)


class TimeTests(ConnectionTestCase):
    def check_limits(self, cases):
        """Run calls that time out, all at once; each must take as long as its limit says."""

        def run(name, url, call, options):
            start = time.monotonic()
            with self.assertRaises(friendli_lite.APITimeoutError, msg=name) as caught:
                call(**{"prompt": "x", "server_url": url, "retries": 0, **options})
            return time.monotonic() - start, caught.exception

        with ThreadPoolExecutor(len(cases)) as pool:
            futures = [pool.submit(run, *case) for case in cases]
        for (name, _, _, options), future in zip(cases, futures):
            limit = options.get("total_timeout") or options["timeout"]
            with self.case(name, limit):
                elapsed, error = future.result()
                self.assertTrue(limit - 0.02 < elapsed < limit + 0.3, f"{elapsed} s: {error}")
                self.assertNotIn(TOKEN, shown(error))

    def test_either_limit_bounds_silence(self):
        event = chunked(sse(text_chunk("a"), done=False))[:-5]
        complete, stream = CALLS
        answers = [
            ("no word", complete, hang()),
            ("half a head", complete, hang(b"HTTP/1.1 200 OK\r\nContent-")),
            ("a head", complete, hang(JSON_HEAD)),
            ("half a body", complete, hang(JSON_HEAD + b"{")),
            ("the head of a stream", stream, hang(STREAM_HEAD)),
            ("an event", stream, hang(STREAM_HEAD + event)),
            ("half a chunk", stream, hang(STREAM_HEAD + b"ff\r\ndata: ")),
        ]
        with contextlib.ExitStack() as stack:
            quiet, full = listener(stack), listener(stack, backlog=0)
            cases = []
            for limit in ({"timeout": 0.12}, {"timeout": 5, "total_timeout": 0.12}):
                cases += [(name, self.serve(answer).url, call, limit) for name, call, answer in answers]
                cases.append(("a handshake", quiet.replace("http", "https"), complete, limit))
                cases.append(("a connect", full, complete, limit))
                cases.append(("an upload", quiet, complete, {**limit, "prompt": "x" * 6_000_000}))
            retries = friendli_lite.RetryConfig(9, initial_delay=0, retry_timeouts=True)
            limits = {"retries": retries, "timeout": 0.04, "total_timeout": 0.12}
            cases.append(("retries", quiet, stream, limits))
            self.check_limits(cases)

    def test_connecting_has_a_limit_of_its_own_and_none_is_no_limit(self):
        self.serve()
        self.call(timeout=None)
        with contextlib.ExitStack() as stack, self.within(1):
            stack.enter_context(mock.patch.object(friendli_lite, "_MAX_CONNECT_SECONDS", 0.1))
            url = listener(stack, backlog=0)
            error = self.failure(friendli_lite.APITimeoutError, server_url=url)
        self.assertIn("cannot connect: it took over 0.1 s", str(error))

    def test_a_limit_says_which_one_was_spent(self):
        clock = mock.Mock(return_value=0.0)
        limits = friendli_lite._Limits(0.2, 0.9, clock)
        self.assertEqual("the server was silent for timeout=0.2 s", str(limits))
        self.assertEqual(0.2, limits.next_wait())
        clock.return_value = 0.9
        self.assertEqual("total_timeout=0.9 s was spent", str(limits))
        self.assertRaises(socket.timeout, limits.next_wait)

    def test_total_timeout_bounds_a_trickle_which_is_no_silence(self):
        complete, stream = CALLS
        limits = {"timeout": 0.15, "total_timeout": 0.25}
        cases = [
            (name, self.serve(trickle(start, more)).url, call, limits)
            for name, call, start, more in [
                ("a header", complete, b"HTTP/1.1 200 OK\r\nA: ", b"a"),
                ("interim answers", complete, head(103), head(103)),
                ("a body", complete, JSON_HEAD, b" "),
                ("a stream", stream, STREAM_HEAD, b"1\r\nd\r\n"),
                ("a chunk size", stream, STREAM_HEAD, b"0"),
                ("comments", stream, STREAM_HEAD, chunked(b": ping\n\n")[:-5]),
                ("events", stream, STREAM_HEAD, chunked(sse(text_chunk("a"), done=False))[:-5]),
            ]
        ]
        if shutil.which("openssl"):
            server = self.serve(trickle(JSON_HEAD, b" "), tls=server_tls())
            cases.append(("over TLS", server.url, complete, {**limits, "ssl_context": client_tls()}))
        self.check_limits(cases)

    def test_an_error_page_that_does_not_end_is_shown_as_far_as_it_came(self):
        page = head(500, Content_Length=99) + b"out of order"
        for limit, answer in [("timeout", hang(page)), ("total_timeout", trickle(page, b"!"))]:
            with self.case(limit), self.serve(answer), self.within(0.5):
                error = self.failure(friendli_lite.APIStatusError, **{limit: 0.06})
                self.assertIn("out of order", error.message)

    def test_a_wait_that_does_not_fit_is_not_begun(self):
        retries = friendli_lite.RetryConfig(max_retries=1000, initial_delay=0.01, max_delay=0.01)
        with self.serve(json_answer({}, 503, Retry_After=1)) as server, self.within(0.3):
            error = self.failure(friendli_lite.APIStatusError, total_timeout=0.9, retries=retries)
            self.assertEqual((1, 1), (error.attempts, len(server.requests)))
        with self.serve(*[json_answer({}, 503)] * 1000), self.within(0.5):
            with self.assertRaises(friendli_lite.FriendliError) as caught:
                friendli_lite.complete("x", total_timeout=0.1, retries=retries)
            self.assertGreater(caught.exception.attempts, 3)


class ProxyTests(ConnectionTestCase):
    def through(self, url, user_password=""):
        """Have all calls go through a proxy, from now on."""
        url = url.replace("//", f"//{user_password}@") if user_password else url
        os.environ.update(HTTP_PROXY=url, HTTPS_PROXY=url)

    def test_http_is_forwarded_and_https_is_tunnelled_over_one_connection(self):
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options), Proxy() as proxy:
                self.through(proxy.url)
                for call in CALLS:
                    self.call(3, call, **options)
                self.assertEqual((6, 1), (len(server.requests), proxy.connections))
                self.assertEqual({f"Bearer {TOKEN}"}, {r.headers["authorization"] for r in server.requests})
                first = proxy.requests[0]
                if scheme == "http":
                    self.assertEqual(f"{server.url}/v1/completions", first.path)
                else:
                    self.assertEqual([("CONNECT", f"127.0.0.1:{server.port}")], [(first.method, first.path)])
                    self.assertNotIn(TOKEN, str(first.headers))
                    self.assertGreater(len(proxy.seen), 1000)
                    self.assertNotIn(TOKEN.encode(), proxy.seen)

    def test_user_and_password_are_for_the_proxy_alone(self):
        for scheme in ("http", "https"):
            with self.each(scheme) as (server, options), Proxy("user:pass word") as proxy:
                self.through(proxy.url, "user:pass%20word")
                self.call(2, **options)
                if scheme == "https":
                    self.assertNotIn("proxy-authorization", server.requests[0].headers)
                for wrong in ("", "user:wrong-secret"):
                    self.through(proxy.url, wrong)
                    error = self.failure(friendli_lite.APIStatusError, **options)
                    self.assertEqual((407, "who are you?"), (error.status_code, error.message))
                    self.assertIn(f"the proxy 127.0.0.1:{proxy.port}", str(error))
                    self.assertNotIn("wrong-secret", shown(error))
                self.assertEqual(2, len(server.requests))

    def test_an_ipv6_address_is_tunnelled_to_in_brackets(self):
        with Proxy(refusal=json_answer({}, 502)) as proxy:
            self.through(proxy.url)
            self.failure(friendli_lite.APIStatusError, server_url="https://[::1]:8443")
            (first,) = proxy.requests
            self.assertEqual(("[::1]:8443", "[::1]:8443"), (first.path, first.headers["host"]))
            self.failure(friendli_lite.APIStatusError, server_url="https://friendli.invalid:")
            target = "friendli.invalid:443"
            self.assertEqual((target, {"host": target}), (proxy.requests[1].path, proxy.requests[1].headers))

    def test_no_proxy_is_heeded_at_each_call(self):
        for scheme in ("http", "https"):
            with self.each(scheme) as (_, options), Proxy() as proxy:
                self.through(proxy.url)
                for no_proxy, connections in [("127.0.0.1", 0), ("", 1)]:
                    os.environ["NO_PROXY"] = no_proxy
                    self.call(**options)
                    self.assertEqual(connections, proxy.connections)

    def test_one_that_refuses_or_is_silent_is_named(self):
        for scheme, (kind, refusal) in itertools.product(
            ["http", "https"],
            [
                (friendli_lite.APIStatusError, json_answer({"error": "no"}, 403, Connection="close")),
                (friendli_lite.APIStatusError, json_answer({"error": "no gateway"}, 502)),
                (friendli_lite.APIConnectionError, b""),
                (friendli_lite.APIConnectionError, b"SSH-2.0-OpenSSH\r\n"),
            ],
        ):
            with self.case(scheme, refusal), Proxy(refusal=refusal) as proxy:
                self.through(proxy.url)
                error = self.failure(kind, server_url=f"{scheme}://friendli.invalid")
                self.assertIn(f"the proxy 127.0.0.1:{proxy.port}", str(error))
        for scheme in ("http", "https"):
            with self.case(scheme), contextlib.ExitStack() as stack, self.within(0.5):
                self.through(listener(stack))
                url = f"{scheme}://friendli.invalid"
                error = self.failure(friendli_lite.APITimeoutError, server_url=url, timeout=0.1)
                self.assertIn("the proxy 127.0.0.1", str(error))
                late = "it took over 0.1 s" if scheme == "https" else "silent for timeout=0.1 s"
                self.assertIn(late, str(error))
                stack.close()
                error = self.failure(friendli_lite.APIConnectionError, server_url=url)
                self.assertIn("the proxy 127.0.0.1", str(error))

    def test_one_that_is_no_url_is_a_mistake_of_the_caller_and_its_password_is_not_shown(self):
        for scheme, proxy in itertools.product(
            ["http", "https"],
            ["http://user:top-secret", "http://", "http://%0d%0a:80"],  # without a host
        ):
            with self.case(scheme, proxy):
                self.through(proxy)
                error = self.failure(ValueError, server_url=f"{scheme}://friendli.invalid")
                self.assertIn("HTTPS_PROXY", str(error))
                self.assertNotIn("top-secret", str(error))
        os.environ["HTTP_PROXY"] = "https://127.0.0.1:1"  # it would get what is for http://... by TLS
        self.failure(ValueError, server_url="http://friendli.invalid")


class TLSTests(ConnectionTestCase):
    def test_a_certificate_that_is_not_to_be_trusted_is_refused_and_not_tried_again(self):
        for name, context, reason in [
            ("self-signed", client_tls(), "self[- ]signed"),
            ("elsewhere", client_tls(), "not valid for '127.0.0.1'"),
            ("expired", client_tls(), "expired"),
            ("server", None, "unable to get|self[- ]signed"),  # the system does not know its CA
        ]:
            with self.case(name), self.serve(tls=server_tls(name)) as server:
                error = self.failure(friendli_lite.APIConnectionError, ssl_context=context, retries=3)
                self.assertRegex(str(error), f"TLS failed: .*({reason}).*ssl_context")
                self.assertEqual((1, 1, 0), (error.attempts, server.connections, len(server.requests)))

    def test_a_server_that_speaks_no_tls_or_leaves_is_a_connection_error(self):
        def accept(server, answer):
            with contextlib.closing(server.accept()[0]) as sock:
                answer(sock)

        def rst_in_the_handshake(sock):
            sock.recv(1)  # a RST before it makes wrap_socket() of CPython leave a socket open
            rst(sock)

        for answer in (then_close(b"HTTP/1.1 400 Bad Request\r\n\r\n"), fin, rst_in_the_handshake):
            with self.case(answer), socket.create_server(("127.0.0.1", 0)) as server:
                server.settimeout(5)
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(accept, server, answer)
                    url = f"https://127.0.0.1:{server.getsockname()[1]}"
                    self.failure(friendli_lite.APIConnectionError, server_url=url)

    def test_a_client_certificate_is_shown_where_one_is_asked_for(self):
        path, context = certificates(), client_tls()
        with self.serve(tls=server_tls(client_ca=path("ca.pem"))) as server:
            self.failure(friendli_lite.APIConnectionError, ssl_context=context)
            self.assertEqual([], server.requests)
            context.load_cert_chain(path("client.pem"), path("client.key"))
            self.call(3, ssl_context=context)
            self.assertEqual(2, server.connections)

    def test_the_default_context_takes_a_private_ca_from_ssl_cert_file_and_is_built_once_for_https(self):
        def answer(sock):
            protocols.append(sock.selected_alpn_protocol())
            sock.sendall(ANSWER)

        protocols = []
        path = certificates()
        os.environ["SSL_CERT_FILE"] = shutil.copy(path("ca.pem"), path("copy.pem"))
        with mock.patch.object(ssl, "create_default_context", wraps=ssl.create_default_context) as build:
            with self.serve():
                self.call()
            self.assertEqual(0, build.call_count)
            tls = server_tls()
            tls.set_alpn_protocols(["h2", "http/1.1"])
            with self.serve(answer, tls=tls), ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: self.call(2), range(8)))
            self.assertEqual(1, build.call_count)
            self.assertEqual(["http/1.1"], protocols)
            for name in ("SSL_CERT_DIR", "SSL_CERT_FILE"):
                before = friendli_lite._default_ssl_context()
                os.environ[name] = path(".")
                self.assertIsNot(before, friendli_lite._default_ssl_context(), name)

    def test_close_from_another_thread_leaves_a_connection_encrypted(self):
        """SSLSocket.shutdown() would make it a plain socket first."""
        with self.serve(hang(STREAM_HEAD), tls=server_tls()), ThreadPoolExecutor(1) as pool:
            stream = friendli_lite.stream("x", ssl_context=client_tls(), timeout=5)
            waiting = pool.submit(self.assertRaises, friendli_lite.APIConnectionError, next, stream)
            while not stream._chunks.gi_running:
                time.sleep(0.001)
            with mock.patch.object(ssl.SSLSocket, "shutdown") as shutdown, self.within(1):
                stream.close()
                waiting.result(5)
            self.assertFalse(shutdown.called)


class TokenTests(ConnectionTestCase):
    def test_it_goes_to_the_server_that_was_named_and_not_where_a_redirect_leads(self):
        for status, call in itertools.product([301, 302, 303, 307, 308], CALLS):
            with self.case(status, call), self.serve() as other:
                with self.serve(head(status, Location=other.url, Content_Length=0)) as server:
                    error = self.failure(friendli_lite.APIStatusError, call, retries=3)
                self.assertEqual((status, 1, 1), (error.status_code, error.attempts, len(server.requests)))
                self.assertIn(other.url, str(error))
                self.assertEqual(f"Bearer {TOKEN}", server.requests[0].headers["authorization"])
                self.assertEqual(0, other.connections)

    def test_a_server_that_echoes_it_gets_it_into_no_error_and_no_log(self):
        status = friendli_lite.APIStatusError, text_of_completion
        connection = friendli_lite.APIConnectionError, text_of_completion
        response = friendli_lite.APIResponseError, text_of_completion
        stream = friendli_lite.APIResponseError, text_of_stream
        retries = friendli_lite.RetryConfig(1, initial_delay=0)
        json_chunked = head(Content_Type="application/json", Transfer_Encoding="chunked")
        for name, (kind, call), answer in [
            ("JSON", status, json_answer({"error": f"no {TOKEN}!"}, 503)),
            ("a reason", status, f"HTTP/1.1 503 {TOKEN}\r\nContent-Length: 0\r\n\r\n".encode()),
            ("a header", status, json_answer({}, 401, X_Echo=f"Bearer {TOKEN}")),
            ("a redirect", status, json_answer({}, 302, Location=f"http://a/?k={TOKEN}")),
            ("a long page", status, json_answer({"error": "x" * 490 + TOKEN}, 401)),
            ("a status line", connection, then_close(f"{TOKEN} nonsense\r\n\r\n".encode())),
            ("a chunk size", connection, then_close(json_chunked + f"{TOKEN}\r\n".encode())),
            ("a content type", response, head(Content_Type=TOKEN, Content_Length=0)),
            ("a wrong answer", response, json_answer({"headers": TOKEN})),
            ("HTML", stream, then_close(framed(f"<b>{TOKEN}</b>".encode(), "close", "text/html"))),
            ("an event", stream, STREAM_HEAD + chunked(sse({"error": {"message": TOKEN}}))),
        ]:
            with self.case(name), self.serve(answer, answer):
                self.assertNotIn(TOKEN[:10], str(self.failure(kind, call, retries=retries)))
        self.assertIn("***", self.log.getvalue())

    def test_what_it_is_replaced_in_is_else_as_it_was(self):
        page = {"error": "no 0000, body, message or 401"}
        for authorization, shown in [("0", page["error"]), ("Bearer n", page["error"]), ("0000", "no ***")]:
            with self.case(authorization), self.serve(json_answer(page, 401)) as server:
                headers = {"Authorization": authorization}
                error = self.failure(friendli_lite.APIStatusError, headers=headers)
                self.assertIn(f"POST {server.url}/v1/completions: the server answered 401", str(error))
                self.assertEqual(
                    ["attempts", "body", "headers", "message", "status_code"], sorted(vars(error))
                )
                self.assertEqual(
                    (401, 1, shown), (error.status_code, error.attempts, error.message[: len(shown)])
                )

    def test_one_that_cannot_stand_in_a_header_is_refused_unseen(self):
        with self.serve() as server:
            tokens = [f"{TOKEN}\n.", f"{TOKEN}\r\nX: y", f"é{TOKEN}", f"\0{TOKEN}"]
            for token, call in itertools.product(tokens, CALLS):
                with self.case(ascii(token)):
                    self.failure(ValueError, call, token=token)
                    os.environ["FRIENDLI_TOKEN"] = token.replace("\0", "\x01")
                    self.failure(ValueError, call)
            self.assertEqual(0, server.connections)
            for token in (f"{TOKEN}\n", f" {TOKEN}\r\n"):
                self.call(token=token)
                self.assertEqual(f"Bearer {TOKEN}", server.requests[-1].headers["authorization"])

    def test_it_is_not_in_the_repr_of_a_stream(self):
        with self.serve(), friendli_lite.stream("x") as stream:
            self.assertNotIn(TOKEN, repr(stream) + repr(vars(stream)) + repr(list(stream)))

    def test_the_command_line_does_not_print_it(self):
        with self.serve(json_answer({"error": f"no {TOKEN}"}, 401)) as server:
            run = run_cli("--verbose", "x")
        self.assertEqual(f"Bearer {TOKEN}", server.requests[0].headers["authorization"])
        self.assertIn("401", run.stderr)
        self.assertNotIn(TOKEN, run.stdout + run.stderr)


JSON = "application/json"
EVENTS = "text/event-stream"
FRAMINGS = ("chunked", "length", "close")
MEDIA_TYPES = {complete: JSON, stream: EVENTS}
ONE = b'{"choices":[{"text":"a"}]}'
TEST = " This is a test!"  # what the stand-in completes
MUTANTS = int(os.environ.get("FRIENDLI_LITE_FUZZ", 5000))  # setUp() clears the environment


def outcome(call):
    """Return the texts that a call without retries gave, and its error or None."""
    texts = []
    try:
        answer = call("x", retries=0, timeout=5, total_timeout=5)
        texts.extend(part.text for part in ([answer] if call is complete else answer))
    except FriendliError as error:
        return texts, error
    return texts, None


def payload(call, data):
    """The body of an answer that holds the JSON of a completion, or a stream that has it as an event."""
    return data if call is complete else b"data: " + data + b"\n\ndata: [DONE]\n\n"


class WireTestCase(TestCase):
    """A test of what becomes of scripted bytes."""

    def setUp(self):
        super().setUp()
        self.container = self.serve()

    def answer(self, call, answer):
        """Return the outcome of a call that is answered by a function, or by bytes and a close."""
        self.container.script(answer if callable(answer) else then_close(answer))
        return outcome(call)

    def check_error(self, kind, result, *words):
        """Check that an outcome is an error that says why, on one line; a timeout was a hang."""
        texts, error = result
        self.assertIs(type(error), kind, (texts, error))
        self.assertRegex(str(error), r"\APOST http://\S+: .{1,900}\Z")
        for word in words:
            self.assertIn(word, str(error))

    def check_next_call(self):
        """Check that nothing of the last answer is taken for the next."""
        self.assertEqual(outcome(complete), ([TEST], None))


# --- The reader ---

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
    "data with a colon": (b"data: 1:2\n\n", [("", b"1:2")]),
    "several data lines": (b"data: 1\ndata:\ndata\ndata: 2\n\n", [("", b"1\n\n\n2")]),
    "no data": (b"data\n\ndata:\n\nevent: a\n\ndata: 1\n\n", [("", b"1")]),
    "blank lines": (b"\n\n\ndata: 1\n\n\n\n", [("", b"1")]),
    "other fields": (
        b"event: a\nid: 7\nretry: 1\nother: x\nalone\ndata: 1\n\ndata: 2\n\n",
        [("a", b"1"), ("", b"2")],
    ),
    "names that only look like data": (b"Data: 1\ndata : 2\n data: 3\ndata2: 4\ndata: 5\n\n", [("", b"5")]),
    "an error field": (b"error: 1\n\nerror\n\n", [("error", b"1"), ("error", b"")]),
    "an error without data": (b"event: error\n\n", [("error", b"")]),
    "separators of other kinds": (
        "data: a\u2028b\u2029c\u0085d\ve\ff\x1cg\n\n".encode(),
        [("", "a\u2028b\u2029c\u0085d\ve\ff\x1cg".encode())],
    ),
    "characters of many bytes": ("data: é한😀\n\n".encode(), [("", "é한😀".encode())]),
    "[DONE] within data": (
        b"data: 1\ndata: [DONE]\n\ndata: [DONE]x\n\n",
        [("", b"1\n[DONE]"), ("", b"[DONE]x")],
    ),
}


def feedings(data):
    """Yield the ways to read bytes: whole, each on its own, and split at every position in turn."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for position in range(1, len(data)):
        yield [data[:position], data[position:]]


class ReaderTests(WireTestCase):
    def test_events_are_the_same_however_their_bytes_arrive(self):
        for name, (data, events) in READER_CASES.items():
            for pieces in feedings(data + b"data: [DONE]\n\ndata: late\n\n"):
                with self.subTest(name, pieces=pieces):
                    self.assertEqual(list(friendli_lite._read_events(pieces)), events)

    def test_chunks_are_the_same_however_the_network_cuts_them(self):
        texts = ["é한", "\u2028\u0085", "😀\v", ""]
        events = (f"data: {json.dumps(text_chunk(text), ensure_ascii=False)}\r\n\r\n" for text in texts)
        body = b"\xef\xbb\xbf: ping\r" + "".join(events).encode() + b"data: [DONE]\n\n"
        in_chunks_of_one = head(Transfer_Encoding="chunked") + chunked(*(bytes([byte]) for byte in body))

        def trickle(sock):
            for byte in framed(body, "length", EVENTS):
                sock.sendall(bytes([byte]))
                time.sleep(0)  # or the network would join more of them
            return CLOSE

        for answer in (in_chunks_of_one, trickle, *(framed(body, framing, EVENTS) for framing in FRAMINGS)):
            with self.subTest(answer=answer):
                self.assertEqual(self.answer(stream, answer), (texts, None))


# --- The end ---


class EndTests(WireTestCase):
    def test_done_ends_a_stream_in_all_its_spellings(self):
        one = sse(text_chunk("a"), done=False)
        for end in ("\n\n", "\r\n\r\n", "\r\r", "\n", "\r", "", " \n\n", "\n\ndata: {\n\n"):
            for start in ("data: ", "data:", "data:  ", ": ping\n\ndata: "):
                for framing in FRAMINGS:
                    body = one + f"{start}[DONE]{end}".encode()
                    with self.subTest(body=body, framing=framing):
                        self.assertEqual(self.answer(stream, framed(body, framing, EVENTS)), (["a"], None))

    def test_done_ends_a_stream_that_is_not_closed_and_has_no_blank_line(self):
        finished = threading.Event()

        def hold(sock):
            sock.sendall(framed(sse(done=False) + b"data: [DONE]\n", "close", EVENTS))
            return finished.wait(5) and CLOSE

        self.assertEqual(self.answer(stream, hold), ([], None))
        finished.set()

    def test_an_answer_cut_at_any_byte_is_an_error_after_the_chunks_that_came(self):
        event = b'data: {"choices":[{"text":"a"}]}\n\n'
        recorded = {
            complete: [b'{"choices":', b'[{"text":"a"}]}'],
            stream: [event, event, b"data: [DONE]\n\n"],
        }
        for (call, pieces), framing in itertools.product(recorded.items(), FRAMINGS):
            data = framed(b"".join(pieces), framing, MEDIA_TYPES[call])
            if framing == "chunked":  # a cut between chunks is a cut between events
                data = head(Content_Type=MEDIA_TYPES[call], Transfer_Encoding="chunked") + chunked(*pieces)
            end = len(data)
            if call is stream:  # [DONE] is an end without a last chunk
                end = data.index(b"[DONE]") + len(b"[DONE]") + (framing != "close")  # else with its line end
            for cut in range(len(data)):
                with self.subTest(call=call.__name__, framing=framing, cut=data[:cut]):
                    texts, error = self.answer(call, data[:cut])
                    whole = cut >= end
                    self.assertEqual(len(texts), data[:cut].count(b"}\n\n") if call is stream else whole)
                    only_json_tells = (call, framing) == (complete, "close") and b"\r\n\r\n" in data[:cut]
                    kind = APIResponseError if only_json_tells else APIConnectionError
                    self.assertIs(type(error), type(None) if whole else kind)

    def test_an_answer_cut_within_a_chunk_says_so(self):
        result = self.answer(complete, framed(ONE, "chunked", JSON)[:-9])
        self.check_error(APIConnectionError, result, "broke off: the server closed the connection")

    def test_a_reset_connection_is_an_error_after_the_chunks_that_came(self):
        for framing in FRAMINGS:
            delivered = threading.Event()
            data = framed(sse(text_chunk("a"), text_chunk("b")), framing, EVENTS)

            def reset(sock, data=data, delivered=delivered):
                sock.sendall(data[: data.index(b"\n\n") + 9])
                delivered.wait(5)
                return rst(sock)

            with self.subTest(framing):
                self.container.script(reset)
                with stream("x", retries=0, timeout=5) as chunks:
                    self.assertEqual(next(chunks).text, "a")
                    delivered.set()
                    with self.assertRaises(APIConnectionError) as caught:
                        next(chunks)
                    self.assertIs(type(caught.exception), APIConnectionError)
                    self.assertEqual(list(chunks), [])
        self.check_error(APIConnectionError, self.answer(complete, rst))


class MidStreamErrorTests(WireTestCase):
    FORMS = {
        "an error object": b'data: {"error": {"message": "out of memory", "code": 500}}\n\n',
        "an error that is a text": b'data: {"error": "out of memory"}\n\n',
        "an error next to choices": b'data: {"choices": [], "error": {"detail": "out of memory"}}\n\n',
        "an error event with JSON": b'event: error\ndata: {"message": "out of memory"}\n\n',
        "an error event with text": b"event: error\ndata: out of memory\n\n",
        "an error event whose name comes last": b"data: out of memory\nevent: error\n\n",
        "an error field": b'error: {"code": 500, "message": "out of memory"}\n\n',
        "an error field with text": b"error:out of memory\n\n",
    }

    def test_an_error_in_a_stream_is_an_error_with_the_words_of_the_server(self):
        for name, form in self.FORMS.items():
            for start, before in ((b"", []), (sse(text_chunk("a"), done=False), ["a"])):
                for end in (b"", b"data: [DONE]\n\n"):
                    with self.subTest(name, start=start, end=end):
                        result = self.answer(stream, framed(start + form + end, "length", EVENTS))
                        self.assertEqual(result[0], before)
                        self.check_error(APIResponseError, result, "the server failed", "out of memory")
                        self.assertIn(result[1].body, form.decode())
                        self.assertIn("out of memory", result[1].body)

    def test_an_error_event_without_a_message_is_an_error(self):
        for form in (
            b"event: error\n\n",
            b"error\n\n",
            b"event: error\ndata: [DONE]\n\n",
            b'data: {"error": {}}\n\n',
            b"event: error\ndata: " + ONE + b"\n\n",
        ):
            with self.subTest(form):
                body = form + b"data: [DONE]\n\n"
                self.check_error(APIResponseError, self.answer(stream, framed(body, "length", EVENTS)))


# --- Broken payloads and broken HTTP ---


class PayloadTests(WireTestCase):
    BROKEN = [
        *(b"hello", b"{", b'{"choices":[]', b'{"choices":[]} x', b'{"choices":[]}{}', b"{'choices':[]}"),
        *(b"null", b"true", b"7", b'"choices"', b"[]", b'[{"choices":[]}]', b"{}"),
        *(b'{"choices":%b}' % value for value in (b"null", b"7", b'"a"', b'{"text":"a"}')),
        *(b'{"choices":[%b]}' % choice for choice in (b"null", b"7", b'"a"', b"[]", b"{}")),
        *(b'{"choices":[{"text":%b}]}' % text for text in (b"null", b"7", b"[]", b'{"a":"b"}')),
        *(
            b'{"choices":[{"text":"a","%b":%b}]}' % f
            for f in ((b"finish_reason", b"7"), (b"logprobs", b"[]"))
        ),
        *(b'{"choices":[{"text":"a"}],"usage":%b}' % usage for usage in (b"7", b'"a"', b"[]")),
        *(b'{"choices":[{"text":"a"}],"a":%b}' % number for number in (b"NaN", b"Infinity", b"-Infinity")),
        *(b'{"choices":[{"text":"\xff"}]}', b'{"choices":[{"text":"\xed\xa0\x80"}]}', "{}".encode("utf-16")),
        *(b"[" * 200_000, b'{"error":' * 200_000, b'{"choices":[{"text":"a"}],"a":' + b"[" * 200_000),
    ]

    def test_a_broken_payload_is_an_error_that_shows_it(self):
        for call, content_type in MEDIA_TYPES.items():
            for data in self.BROKEN:
                with self.subTest(call=call.__name__, data=data[:99]):
                    texts, error = self.answer(call, framed(payload(call, data), "length", content_type))
                    self.check_error(APIResponseError, (texts, error), "no completion")
                    self.assertEqual(texts, [])
                    self.assertEqual(error.body, data[:65536].decode("utf-8", "replace"))

    def test_an_error_in_place_of_a_completion_is_an_error_with_its_words(self):
        for data in (
            b'{"error":"too hot"}',
            b'{"error":{"message":"too hot"}}',
            b'{"choices":[],"error":["too hot"]}',
        ):
            with self.subTest(data):
                texts, error = self.answer(complete, framed(data, "length", JSON))
                self.check_error(APIResponseError, (texts, error), "too hot")
                self.assertEqual(error.body, data.decode())

    def test_what_only_looks_broken_is_taken(self):
        text = b'{"choices":[{"text":"a"%b}],"error":null}'
        for call, content_type in MEDIA_TYPES.items():
            for more in (
                b"",
                b',"finish_reason":"null"',
                b',"logprobs":null,"usage":{}',
                b',"a":{"error":1}',
            ):
                with self.subTest(call=call.__name__, more=more):
                    answer = framed(payload(call, text % more), "length", content_type)
                    self.assertEqual(self.answer(call, answer), (["a"], None))

    def test_an_answer_of_another_kind_is_an_error_that_says_what_came(self):
        page = b"<html><title>Please</title>\n<p>log in"
        for call, content_type in MEDIA_TYPES.items():
            body = payload(call, ONE)
            zipped = head(Content_Type=content_type, Content_Encoding="gzip", Content_Length=len(body)) + body
            other = JSON if call is stream else EVENTS
            for name, answer, kind, *words in [
                (
                    "HTML",
                    framed(page, "length", "text/html; charset=utf-8"),
                    APIResponseError,
                    "text/html",
                    "Please log in",
                ),
                ("gzip", zipped, APIResponseError, f"{content_type} in gzip"),
                ("of the other call", framed(body, "length", other), APIResponseError, other),
                (
                    "an error of the other call",
                    framed(b'{"error":"hot"}', "chunked", other),
                    APIResponseError,
                    "hot",
                ),
                ("204", head(204), APIStatusError, "204"),
                ("a status of 200 and more", head(206, Content_Length=0), APIStatusError, "206"),
                (
                    "empty",
                    framed(b"", "length", content_type),
                    APIResponseError if call is complete else APIConnectionError,
                ),
            ]:
                with self.subTest(name, call=call.__name__):
                    result = self.answer(call, answer)
                    self.check_error(kind, result, *words)
                    if name == "HTML":
                        self.assertEqual(page.decode(), result[1].body)


class BrokenHTTPTests(WireTestCase):
    OK = b"HTTP/1.1 200 OK\r\n"
    BROKEN = {
        "nothing": b"",
        "blank lines": b"\r\n\r\n",
        "another protocol": b"SSH-2.0-OpenSSH_9.9\r\n",
        "binary": b"\x15\x03\x01\x00\x02\x02\x46" * 99,
        "a page without a head": b"<html>hello",
        "a status line cut short": b"HTTP/1.1",
        "a status cut short": b"HTTP/1.1 2",
        "a status that is no number": b"HTTP/1.1 two OK\r\n\r\n",
        "a status of other digits": "HTTP/1.1 ²⁰⁰ OK\r\n\r\n".encode(),
        "a status out of range": b"HTTP/1.1 99999 OK\r\n\r\n",
        "a status line of 200,000 bytes": b"HTTP/1.1 200 " + b"O" * 200_000,
        "a header of 200,000 bytes": OK + b"A: " + b"b" * 200_000 + b"\r\n\r\n",
        "5,000 headers": OK + b"A: b\r\n" * 5000 + b"\r\n",
        "headers nested in headers": OK + b"Content-Type: message/rfc822\r\r" * 2000 + b"\r\n\r\n",
        "a parameter of a header given twice": OK
        + b"Content-Type: multipart/x; boundary*=; boundary*1=\r\n\r\n",
        "a chunk size that is no number": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello",
        "a chunk size below 0": OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n%b",
        "a chunk size far below 0": OK + b"Transfer-Encoding: chunked\r\n\r\n-%b\r\n%%b" % (b"f" * 40),
        "a chunk size of 200,000 bytes": OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 200_000,
        "a chunk without an end": OK + b"Transfer-Encoding: chunked\r\n\r\n%b\r\n%%b" % (b"f" * 40),
        "no chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n",
        "too great a Content-Length": OK + b"Content-Length: 9999\r\n\r\n",
    }

    def test_broken_http_is_a_connection_error_and_leaves_nothing_behind(self):
        for call, (name, data) in itertools.product(MEDIA_TYPES, self.BROKEN.items()):
            with self.subTest(name, call=call.__name__):
                body = payload(call, ONE).replace(b"data: [DONE]\n\n", b"")
                self.check_error(APIConnectionError, self.answer(call, data.replace(b"%b", body)))
                self.check_next_call()
                friendli_lite._idle_connections.close()  # or a call that gets no byte is sent again

    def test_a_stream_in_a_chunk_of_a_size_below_0_is_an_error(self):
        answer = head(Content_Type=EVENTS, Transfer_Encoding="chunked") + b"-1\r\n" + payload(stream, ONE)
        self.check_error(APIConnectionError, self.answer(stream, answer))

    def test_after_101_another_protocol_is_spoken_and_no_call_follows(self):
        result = self.answer(complete, lambda sock: sock.sendall(head(101, Upgrade="x")))
        self.check_error(APIStatusError, result, "101")
        self.check_next_call()
        self.assertEqual(self.container.connections, 2)

    def test_a_wrong_content_length_is_an_error(self):
        for call in MEDIA_TYPES:
            body = payload(call, ONE)
            for length in (0, 7, len(ONE) - 1, *([len(body) + 1, 10**30] if call is complete else [])):
                with self.subTest(call=call.__name__, length=length):
                    cut = call is stream or length > len(body)
                    answer = head(Content_Type=MEDIA_TYPES[call], Content_Length=length) + body
                    kind = APIConnectionError if cut else APIResponseError
                    self.check_error(kind, self.answer(call, answer))
                    self.check_next_call()

    def test_what_follows_an_answer_is_not_taken_for_the_next(self):
        forged = json_answer({"choices": [{"text": "forged"}]})
        for call, extra in itertools.product(
            MEDIA_TYPES, (forged, forged * 100, b"-" + b"f" * 40 + b"\r\na", b"zz\r\n")
        ):
            data = payload(call, ONE)
            whole = framed(data, "chunked", MEDIA_TYPES[call]), framed(data, "length", MEDIA_TYPES[call])
            for answer in (
                (*whole, whole[0][:-5]) if call is stream else whole
            ):  # [DONE] is an end without a last chunk
                with self.subTest(answer=answer, extra=extra[:50]):
                    self.container.script(answer + extra)
                    self.assertEqual(outcome(call), (["a"], None))
                    self.check_next_call()

    def test_interim_answers_and_trailers_are_passed_over_and_the_connection_is_kept(self):
        interim = head(100) + head(103, Link="</a>; rel=preload") + head(199) + head(102) + head(100)
        for call, content_type in MEDIA_TYPES.items():
            body = payload(call, ONE)
            with_trailers = (
                framed(body, "chunked", content_type)[:-2] + b"Server-Timing: a\r\nDigest: b\r\n\r\n"
            )
            for answer in (interim + framed(body, "length", content_type), with_trailers):
                with self.subTest(call=call.__name__, answer=answer):
                    self.container.script(answer)
                    self.assertEqual(outcome(call), (["a"], None))
        self.assertEqual(self.container.connections, 1)


# --- Endless answers ---


def endless(start, piece):
    """Answer with a start, and with a piece again and again, until the client leaves."""

    def answer(sock):
        sock.sendall(start)
        while True:
            sock.sendall(piece)

    return answer


class EndlessTests(WireTestCase):
    LIMIT = 64 * 1024
    COMPLETION = head(Content_Type=JSON)
    STREAM = head(Content_Type=EVENTS)
    IN_CHUNKS = head(Content_Type=EVENTS, Transfer_Encoding="chunked")
    CASES = {
        "a line": (stream, STREAM + b"data: ", b"a" * 65536, "_MAX_EVENT_BYTES", APIResponseError),
        "a line in small chunks": (
            stream,
            IN_CHUNKS,
            chunked(b"ab")[:-5] * 9999,
            "_MAX_EVENT_BYTES",
            APIResponseError,
        ),
        "data lines": (stream, STREAM, b"data: a\n" * 8192, "_MAX_EVENT_BYTES", APIResponseError),
        "comments": (stream, STREAM, b": ping\n\n" * 8192, "_MAX_EVENT_BYTES", APIResponseError),
        "JSON": (complete, COMPLETION + b"[", b" " * 65536, "_MAX_COMPLETION_BYTES", APIResponseError),
        "interim answers": (complete, b"", head(100) * 999, "_MAX_FRAMING_BYTES", APIConnectionError),
        "early hints": (complete, b"", head(103) * 999, "_MAX_FRAMING_BYTES", APIConnectionError),
        "trailers": (
            stream,
            IN_CHUNKS + b"0\r\n",
            b"A: b\r\n" * 999,
            "_MAX_FRAMING_BYTES",
            APIConnectionError,
        ),
        "an error page": (complete, head(500), b"a" * 65536, "_MAX_PAGE_BYTES", APIStatusError),
        "a login page": (
            stream,
            head(Content_Type="text/html"),
            b"a" * 65536,
            "_MAX_PAGE_BYTES",
            APIResponseError,
        ),
    }

    def test_an_endless_answer_ends_in_an_error_within_bounded_memory(self):
        self.check_next_call()  # what it imports is not counted
        for name, (call, start, piece, limit, kind) in self.CASES.items():
            with self.subTest(name), mock.patch.object(friendli_lite, limit, self.LIMIT):
                tracemalloc.start()
                try:
                    _, error = result = self.answer(call, endless(start, piece))
                    self.check_error(kind, result)
                    if kind is APIResponseError and limit != "_MAX_PAGE_BYTES":
                        self.assertEqual("", error.body)
                    self.assertLess(tracemalloc.get_traced_memory()[1], 32 * self.LIMIT)
                finally:
                    tracemalloc.stop()
                self.check_next_call()

    def test_the_limits_are_those_that_the_documentation_names(self):
        names = ("_MAX_EVENT_BYTES", "_MAX_COMPLETION_BYTES", "_MAX_PAGE_BYTES")
        self.assertEqual([getattr(friendli_lite, n) for n in names], [16 * 1024**2, 128 * 1024**2, 64 * 1024])

    def test_an_answer_within_the_limits_is_taken(self):
        data = ONE + b" " * (self.LIMIT - 100)
        with mock.patch.multiple(
            friendli_lite, _MAX_EVENT_BYTES=self.LIMIT, _MAX_COMPLETION_BYTES=self.LIMIT
        ):
            self.assertEqual(self.answer(complete, framed(data, "length", JSON)), (["a"], None))
            events = (b"data: " + data + b"\n\n") * 2 + payload(stream, data)
            self.assertEqual(self.answer(stream, framed(events, "length", EVENTS)), (["a", "a", "a"], None))


# --- Consumers ---


def open_descriptors():
    return len(os.listdir("/dev/fd"))


def leave_block(chunks):
    with chunks:
        next(chunks)


class ConsumerTests(TestCase):
    LEFT = {"before its start": id, "in its middle": next}
    ENDED = {
        "closed before its start": friendli_lite.CompletionStream.close,
        "closed twice": lambda chunks: (next(chunks), chunks.close(), chunks.close()),
        "left with its block": leave_block,
        "broken off by an exception": lambda chunks: (next(chunks), chunks.throw(ZeroDivisionError())),
        "broken off by Ctrl-C": lambda chunks: (next(chunks), chunks.throw(KeyboardInterrupt())),
        "read to its end": list,
    }

    def test_two_thousand_streams_left_in_every_way_leave_no_descriptor_open(self):
        gc.disable()  # it would hide what is not let go at once
        self.addCleanup(gc.enable)
        before = open_descriptors()
        container = self.serve(*[event_stream(*[text_chunk("a")] * 2)] * 2000)
        for name, leave in {**self.LEFT, **self.ENDED}.items():
            with self.subTest(name):
                for _ in range(250):
                    chunks = stream("x")
                    with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt):
                        leave(chunks)
                    if name in self.ENDED:
                        self.assertEqual(list(chunks), [])
                    del chunks
        friendli_lite._idle_connections.close()
        container.close()
        self.assertEqual(open_descriptors(), before)
        self.assertEqual(len(container.requests), 2000)

    @unittest.skipUnless(hasattr(signal, "pthread_kill"), "there is no other way to press Ctrl-C here")
    def test_ctrl_c_while_waiting_gets_through_and_leaves_no_descriptor_open(self):
        self.addCleanup(
            signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler)
        )
        before = open_descriptors()
        for start, call in ((b"", complete), (b"", stream), (head(Content_Type=EVENTS), stream)):

            def press(sock, start=start):
                sock.sendall(start)
                time.sleep(0.02)  # until the client waits
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                sock.recv(1)  # until the client has left
                return CLOSE

            with StandInContainer(press) as container, self.assertRaises(KeyboardInterrupt):
                list(call("x", server_url=container.url, retries=0, timeout=2))
        self.assertEqual(open_descriptors(), before)


# --- Fuzz ---


SCRAPS = [
    *(
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xe2\x80\xa8",
        b":",
        b'"',
        b"\\",
        b"{",
        b"}",
    ),
    *(b"[", b"]", b",", b"null", b"NaN", b"-", b"1e999", b"9" * 5000, b"[" * 5000, b'"\\ud800"', b"[DONE]"),
    *(b"data: ", b"data: [DONE]\n\n", b"event: error\n", b"error: ", b'"error":', b'"choices":', b'"text":'),
]
REQUEST = {"prompt": "x", "n": 2, "logprobs": 1, "max_tokens": 2, "stream_options": {"include_usage": True}}
RECORDED = [
    sse(*chunks(REQUEST)),
    sse(*chunks({})).replace(b"\n", b"\r\n"),
    json.dumps(completion(REQUEST)).encode(),
]


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


def read_pieces(pieces):
    """Return the chunks that the reader and the parser find, and the words of the error that ends them."""
    found = []
    try:
        for event, data in friendli_lite._read_events(pieces):
            found.append((event, friendli_lite._parse(data, friendli_lite._chunk)))
    except FriendliError as error:
        return found, str(error)
    return found, None


class FuzzTests(unittest.TestCase):
    def check_mutant(self, dice):
        data = dice.choice(RECORDED)
        for _ in range(dice.randrange(1, 5)):
            data = mutate(dice, data) or b"\n"
        cuts = sorted({0, *dice.choices(range(len(data)), k=dice.randrange(9)), len(data)})
        found, error = read_pieces([data[start:end] for start, end in zip(cuts, cuts[1:])])
        self.assertEqual((found, error), read_pieces([data]), "the pieces make a difference")
        self.assertTrue(error or b"[DONE]" in data, "a short success")
        answers = [chunk for _, chunk in found]
        with contextlib.suppress(FriendliError):
            answers.append(friendli_lite._parse(bytearray(data), friendli_lite._completion))
        for answer in answers:
            self.assertIsInstance(answer.text, str)

    def test_only_friendli_errors_escape_whatever_the_bytes_are(self):
        for seed in range(MUTANTS):
            try:
                self.check_mutant(random.Random(seed))
            except Exception as error:
                raise AssertionError(f"self.check_mutant(random.Random({seed})) fails: {error!r}") from error


README_ANSWER = " This is a test!"


# --- The README ---


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def readme_blocks():
    """Return the Python blocks, each with the output that is shown below it, or ""."""
    return re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", readme(), re.DOTALL)


def readme_block(text):
    """Return the one Python block that holds a text."""
    (block,) = [code for code, _ in readme_blocks() if text in code]
    return block


def run_block(code):
    """Run a block as a program would, and return its namespace and what it printed."""
    names = {"__name__": "readme"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    return types.SimpleNamespace(**names), printed.getvalue()


class ReadmeTests(TestCase):
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

    def test_every_block_runs_and_prints_what_is_shown_below_it(self):
        self.addCleanup(logging.root.setLevel, logging.root.level)
        self.addCleanup(setattr, logging.root, "handlers", logging.root.handlers[:])
        container = self.serve()
        for code, shown in readme_blocks():
            if "import many" in code or "from ._vendor" in code:
                continue  # these need files, and have tests of their own
            if "to_thread" in code and sys.version_info < (3, 9):
                continue
            with self.subTest(code=code), contextlib.redirect_stderr(io.StringIO()):
                container.requests.clear()
                printed = run_block(code)[1].rstrip("\n")
                is_program = "def ask" not in code and "def lambda" not in code
                wanted = README_ANSWER if is_program and "print(" in code else ""
                self.assertEqual(shown.rstrip("\n") or wanted, printed)
                self.assertEqual(is_program, bool(container.requests))

    def test_the_first_screen_names_the_two_commands_and_the_first_program(self):
        lines = readme().splitlines()[:25]
        self.assertIn('    python3 test_friendli_lite.py --demo "Say this is a test!"', lines)
        self.assertIn("    python3 -m unittest", lines)
        self.assertIn("```python", lines)

    def test_the_vendored_file_works_in_a_package_and_under_any_name(self):
        with open(friendli_lite.__file__, encoding="utf-8") as file:
            module = file.read()
        (version,) = [line for line in module.splitlines() if line.startswith("__version__")]
        self.assertEqual(f'__version__ = "{friendli_lite.__version__}"', version)
        self.assertIn(f"`{version}`", readme())
        self.assertIn(f"- {friendli_lite.__version__}: ", readme())
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
                copied._idle_connections.close()
                error = pickle.loads(pickle.dumps(caught.exception))
                self.assertIs(copied.APIStatusError, type(error))
                self.assertEqual((404, "no"), (error.status_code, error.message))

    def test_the_error_example_prints_what_happened(self):
        for answer, printed in (
            (json_answer({"detail": "no such model"}, 404), "refused with 404: no such model\n"),
            (event_stream(), "failed after 1 attempts: POST "),
        ):
            with self.subTest(printed=printed):
                self.serve(answer)
                self.assertEqual(printed, run_block(readme_block("refused with"))[1][: len(printed)])

    def test_the_tables_name_every_parameter_default_field_and_error(self):
        text = readme()
        rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", text.partition("## Parameters")[2], re.M))
        for call in (friendli_lite.complete, friendli_lite.stream):
            parameters = list(inspect.signature(call).parameters.values())[:-1]
            self.assertEqual([parameter.name for parameter in parameters], list(rows))
            for parameter in parameters:
                if isinstance(parameter.default, float):
                    self.assertEqual(f"`{parameter.default}`", rows[parameter.name])
        fields = re.search(r"The fields, described.*?: (.*?)\. Fields that", text, re.DOTALL).group(1)
        names = [field.name for field in dataclasses.fields(friendli_lite.CompletionRequest)]
        self.assertEqual(names, [*fields.replace("`", "").split(), "extra_body"])
        for name in friendli_lite.__all__:
            if name.endswith("Error") and name != "FriendliError":
                self.assertIn(f"\n| `{name}`", text)

    def test_the_worked_numbers_are_those_of_the_default_retries(self):
        text = " ".join(readme().split())
        shown = re.search(r"`(RetryConfig\(max_retries=[^`]*\))`\. The", text).group(1)
        config = eval(shown, {"RetryConfig": friendli_lite.RetryConfig})
        self.assertEqual(friendli_lite.RetryConfig(), config)
        for field in dataclasses.fields(config):
            self.assertIn(f"{field.name}=", shown)
        waits = [config.initial_delay * config.multiplier**k for k in range(config.max_retries)]
        self.assertLessEqual(waits[-1], config.max_delay)
        self.assertIn("doubles: {:g}, {:g}, {:g} s".format(*waits), text)
        self.assertIn(f"add at most {sum(waits):g} s", text)
        self.assertIn(f"ends after {9 + waits[0] + 9:g} s at the latest", text)
        self.assertTrue(30 <= config.max_retry_after < 61)

    def test_lambda_invocations_share_a_connection_and_answer_errors(self):
        code = readme_block("def lambda_handler")
        self.assertLess(len(code.splitlines()), 25)
        lambda_handler = run_block(code)[0].lambda_handler
        os.environ["FRIENDLI_TOKEN"] = TOKEN
        for prompt, milliseconds, script, status, said, sent in (
            ("Hi", 5000, [], 200, f'"text": "{README_ANSWER}"', 2),
            ("Hi", 5000, [json_answer({"detail": "no such model"}, 404)] * 2, 502, "no such model", 2),
            ("Hi", 999, [], 504, "total_timeout", 0),
            (None, 5000, [], 400, "a prompt is needed", 0),
        ):
            with self.subTest(status=status):
                container = self.serve(*script)
                context = mock.Mock(get_remaining_time_in_millis=lambda left=milliseconds: left)
                for _ in range(2):
                    answer = lambda_handler({"prompt": prompt}, context)
                    self.assertEqual(status, answer["statusCode"])
                    self.assertIn(said, json.dumps(json.loads(answer["body"])))
                self.assertEqual((min(sent, 1), sent), (container.connections, len(container.requests)))
                for received in container.requests:
                    self.assertEqual(f"Bearer {TOKEN}", received.headers["authorization"])

    def test_the_examples_of_the_official_documentation_send_what_they_say(self):
        container = self.serve()
        run_block(readme_block("with res as event_stream"))
        expected = [{"stream": stream, "prompt": "Say this is a test!"} for stream in (False, True)]
        self.assertEqual(expected, [received.json for received in container.requests])

    def test_the_async_generator_neither_blocks_the_loop_nor_keeps_the_connection(self):
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
        astream = run_block(readme_block("async def astream"))[0].astream
        self.serve(answer)
        self.assertEqual(["a", "b"], asyncio.run(main(astream)))
        self.assertTrue(client_left.wait(10))

    def test_many_prompts_come_back_in_order_with_their_errors(self):
        code = readme_block("def ask_all")
        self.assertLess(len(code.splitlines()), 20)
        ask_all = run_block(code)[0].ask_all
        prompts = [f"prompt {number}" for number in range(40)]
        container = self.serve()
        echo = mock.patch(f"{words.__module__}.words", lambda request: [request["prompt"]])
        with echo, contextlib.redirect_stderr(io.StringIO()) as progress:
            answers = ask_all(prompts)
        self.assertEqual(prompts, [answer.text for answer in answers])
        self.assertLessEqual(container.connections, 16)
        self.assertEqual("39 of 40\r40 of 40\r", progress.getvalue()[-18:])
        self.serve(json_answer({"detail": "too long"}, 422))
        with contextlib.redirect_stderr(io.StringIO()):
            error, answer = ask_all(["a", "b"], threads=1)
        self.assertEqual(("too long", README_ANSWER), (error.message, answer.text))

    def test_requests_answers_and_errors_cross_processes_under_dask(self):
        self.make_folder({"many.py": readme_block("def ask_all")})
        sys.modules["dask"] = sys.modules["dask.distributed"] = types.SimpleNamespace(Client=SpawningClient)
        container = self.serve(json_answer({"detail": "too long"}, 422))
        ask_everywhere = run_block(readme_block("import many"))[0].ask_everywhere
        requests = [friendli_lite.CompletionRequest(prompt="a", seed=[1]), {"prompt": "b"}, "c"]
        error, *answers = ask_everywhere(requests, "tcp://scheduler:8786")
        self.assertEqual(["a", "b", "c"], [received.json["prompt"] for received in container.requests])
        self.assertEqual([friendli_lite.Completion] * 2, [type(answer) for answer in answers])
        self.assertEqual([README_ANSWER] * 2, [answer.text for answer in answers])
        self.assertIs(friendli_lite.APIStatusError, type(error))
        self.assertEqual((422, "too long", 1), (error.status_code, error.message, error.attempts))
        self.assertIn(container.url, str(error))


class SpawningClient(contextlib.ExitStack):
    """What the README uses of Dask's client, with one worker: a process that inherits nothing."""

    def __init__(self, scheduler):
        super().__init__()
        self._pool = self.enter_context(multiprocessing.get_context("spawn").Pool(1))

    def upload_file(self, path):
        os.stat(path)

    def map(self, function, items):
        return [self._pool.apply_async(function, (item,)) for item in items]

    def gather(self, futures):
        results = [future.get(60) for future in futures]
        self._pool.close()
        self._pool.join()
        return results


# --- The module's own help and log ---


class HelpTests(TestCase):
    def test_the_log_shows_url_status_and_times_but_no_secret(self):
        for call in (lambda **o: friendli_lite.complete(**o), lambda **o: list(friendli_lite.stream(**o))):
            container = self.serve()
            with self.subTest(), self.assertLogs("friendli_lite", logging.DEBUG) as log:
                call(prompt="my secret prompt", token=TOKEN)
                text = "\n".join(log.output)
                self.assertIn(f"{container.url}/v1/completions: status 200", text)
                self.assertEqual(2, len(re.findall(r"\d\.\d+ s\b", text)), f"first byte and total in: {text}")
                self.assertNotRegex(text, f"{TOKEN}|secret prompt")

    def test_help_documents_every_public_name(self):
        for name in friendli_lite.__all__:
            public = getattr(friendli_lite, name)
            with self.subTest(name=name):
                self.assertNotRegex(
                    inspect.getdoc(public) or "", rf"\A({name}\(|\Z)"
                )  # or dataclass wrote it
                for attribute, value in vars(public).items():
                    if inspect.isclass(public) and (callable(value) or isinstance(value, property)):
                        self.assertTrue(attribute.startswith("_") or value.__doc__, attribute)
        text = pydoc.render_doc(friendli_lite, renderer=pydoc.plaintext)
        for word in ("seconds", "Raises:", "Architecture Blog", "Friendli Suite", "$FRIENDLI_TOKEN"):
            self.assertIn(word, text)

    def test_the_limit_of_silence_is_that_of_the_functions(self):
        default = inspect.signature(friendli_lite.stream).parameters["timeout"].default
        self.assertEqual(default, friendli_lite._parser().parse_args([]).timeout)

    def test_each_option_has_its_help_and_each_value_a_name(self):
        for action in friendli_lite._parser()._actions:
            with self.subTest(action.dest):
                self.assertTrue(action.help)
                self.assertTrue(action.metavar or action.nargs == 0 or action.dest in ("model", "prompt"))

    def test_the_options_fit_a_terminal_and_their_two_examples_work(self):
        os.environ.update(COLUMNS="80", NO_COLOR="1")
        with contextlib.redirect_stdout(io.StringIO()) as printed, self.assertRaises(SystemExit):
            friendli_lite.main(["--help"])
        lines = printed.getvalue().splitlines()
        container = self.serve()
        examples = [shlex.split(line) for line in lines[lines.index("examples:") + 1 :]]
        for program, *arguments in examples:
            with self.subTest(arguments=arguments), contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual("friendli_lite", program)
                with mock.patch("sys.stdin", io.StringIO("Say this is a test!")):
                    arguments = arguments[: arguments.index("<")] if "<" in arguments else arguments
                    self.assertEqual(0, exit_status_of_main(arguments))
        prompts = [received.json["prompt"] for received in container.requests]
        self.assertEqual(["Say this is a test!"] * 2, prompts)
        self.assertLessEqual(max(map(len, lines)), 80)
        self.assertLessEqual(len(lines), 24)


# --- A stranger's machine ---


class StrangersMachineTests(TestCase):
    def test_any_text_can_be_a_prompt(self):
        container = self.serve()
        for name, prompt in (
            ("empty", ""),
            ("lone surrogates", "a\ud800b\udcff"),
            ("other characters", "\0\x7f\u2028\u00e9\U0001f600"),
            ("10 MB", "0123456789" * 10**6),
        ):
            with self.subTest(name):
                self.assertEqual(README_ANSWER, friendli_lite.complete(prompt).text)
                self.assertTrue(container.requests.pop().json["prompt"] == prompt)  # no diff of 10 MB

    def test_it_runs_isolated_from_a_read_only_folder_and_from_a_zip(self):
        container = self.serve()
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        read_only, archive = os.path.join(folder, "read_only"), os.path.join(folder, "bundle.zip")
        os.mkdir(read_only)
        shutil.copy(friendli_lite.__file__, read_only)
        open(os.path.join(read_only, "__pycache__"), "w").close()  # not even root can write into it
        os.chmod(read_only, 0o555)
        self.addCleanup(os.chmod, read_only, 0o755)
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.write(friendli_lite.__file__, "friendli_lite.py")
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import friendli_lite;"
            "print(friendli_lite.__file__); friendli_lite.main(['Hi'])"
        )
        env = {"LC_ALL": "C", "FRIENDLI_SERVER_URL": container.url}  # and neither HOME nor PATH
        if "SYSTEMROOT" in os.environ:  # Windows opens no socket without
            env["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
        for place in (read_only, archive):
            with self.subTest(os.path.basename(place)):
                command = [sys.executable, "-I", "-S", "-W", "error", "-c", program, place]
                ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
                expected = os.path.join(place, "friendli_lite.py") + f"\n{README_ANSWER}\n"
                self.assertEqual((0, expected, ""), (ran.returncode, ran.stdout, ran.stderr))

    def test_a_terminal_that_knows_ascii_alone_shows_escapes(self):
        container = self.serve(event_stream(text_chunk("caf\u00e9 \U0001f600 \ud800")))
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
        ran = run_cli(stdin="Hi", **env)
        self.assertEqual(("caf\\xe9 \\U0001f600 \\ud800\n", ""), (ran.stdout, ran.stderr))
        self.assertEqual("Hi", container.requests[0].json["prompt"])

    def test_a_pipe_gets_each_chunk_as_it_comes(self):
        reader_has_it = threading.Event()

        def answer(sock):
            sock.sendall(head(Content_Type="text/event-stream") + sse(text_chunk("first"), done=False))
            sock.sendall(sse(text_chunk(" second" if reader_has_it.wait(10) else " too late")))
            return CLOSE

        self.serve(answer)
        os.environ.pop("PYTHONUNBUFFERED", None)  # would do what is tested here
        command = [sys.executable, friendli_lite.__file__, "Hi"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            self.assertEqual(b"first", process.stdout.read(5))
            reader_has_it.set()
            self.assertEqual([b"second"], process.stdout.read().split())
        self.assertEqual(0, process.returncode)
        reader_has_it.clear()
        self.serve(answer)
        with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE) as process:
            self.assertEqual(text_chunk("first"), json.loads(process.stdout.readline()))
            reader_has_it.set()
            self.assertEqual(text_chunk(" second"), json.loads(process.stdout.read()))

    def test_closed_standard_streams_do_no_harm(self):
        self.addCleanup(setattr, logging.root, "handlers", logging.root.handlers[:])
        self.addCleanup(logging.getLogger("friendli_lite").setLevel, logging.NOTSET)
        for closed, arguments, script, status, printed in (
            ("stdout", ["Hi"], [], 0, ""),
            ("stderr", ["Hi"], [json_answer({"detail": "no"}, 422)], 1, ""),  # an error is no output
            ("stderr", ["Hi", "--verbose"], [], 0, f"{README_ANSWER}\n"),
            ("stdin", ["Hi"], [], 0, f"{README_ANSWER}\n"),
            ("stdin", [], [], 0, f"{README_ANSWER}\n"),  # an empty prompt
        ):
            container = self.serve(*script)
            streams = {"stdin": io.StringIO(), "stdout": io.StringIO(), "stderr": io.StringIO()}
            with self.subTest(closed=closed, arguments=arguments):
                with mock.patch.multiple(sys, **{**streams, closed: None}):  # as Python itself says it
                    self.assertEqual(status, exit_status_of_main(arguments))
                self.assertEqual(printed, streams["stdout"].getvalue())
                self.assertEqual(1, len(container.requests))


# --- Run as a program ---


def demo(arguments):
    """Run the command line against a stand-in container."""
    with StandInContainer() as container:
        os.environ["FRIENDLI_SERVER_URL"] = container.url
        os.environ["NO_PROXY"] = "127.0.0.1"
        friendli_lite.main(arguments)


def serve(port=8000):
    """Keep a stand-in container running until Ctrl-C."""
    with StandInContainer(port=int(port)) as container:
        print(f"A stand-in container answers at {container.url}; Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--demo"]:
        demo(sys.argv[2:])
    elif sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:3])
    else:
        unittest.main()
