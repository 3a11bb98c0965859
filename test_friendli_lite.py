"""The tests of friendli_lite, and the stand-in container that they run against.

    python3 -m unittest                                              # the tests
    python3 test_friendli_lite.py --demo "Say this is a test!"       # the command line, against a stand-in
    python3 test_friendli_lite.py --serve 8000                       # the stand-in alone, until Ctrl-C

All of it is on 127.0.0.1, and nothing waits for real time: sleep, clock and chance are injected.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copy
import email.utils
import io
import itertools
import json
import logging
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

import friendli_lite

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
        busiest: the most requests that one connection ever had at a time.
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
    """A test with a stand-in container, no environment of the client's, and no idle connection left."""

    def setUp(self):
        saved = dict(os.environ)
        self.addCleanup(os.environ.update, saved)
        self.addCleanup(os.environ.clear)
        for name in list(os.environ):
            if name.startswith("FRIENDLI_") or name.lower().endswith("_proxy"):
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
                    self.assertEqual("application/json", received.headers["content-type"])
                    self.assertEqual(f"127.0.0.1:{container.port}", received.headers["host"])
                    self.assertTrue(received.headers["user-agent"].startswith("friendli_lite/"))

    def test_the_server_url_takes_prefixes_slashes_and_v1(self):
        for url, expected in (
            ("http://h", "http://h/v1/completions"),
            ("http://h:80/", "http://h:80/v1/completions"),
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
        friendli_lite.complete("p", token="bearer  other")
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
            (TypeError, "did you mean 'timeout'", ("p",), {"timeout_ms": 1}),
            (TypeError, "did you mean 'headers'", ("p",), {"http_headers": 1}),
            (TypeError, "extra_body must be Mapping", ("p",), {"extra_body": "z"}),
            (TypeError, "unknown field 3", ({"prompt": "p", 3: 1},), {}),
            (TypeError, "given twice", ("p",), {"prompt": "q"}),
            (TypeError, "prompt=[...]", (["p", "q"],), {}),
            (TypeError, "'prompt' cannot be sent as JSON", (), {"prompt": b"p"}),
            (ValueError, "neither was given", (), {}),
            (ValueError, "neither was given", (None,), {"n": 1}),
            (ValueError, "both were given", ("p",), {"tokens": [1]}),
            (ValueError, "extra_body holds 'n'", ("p",), {"extra_body": {"n": 1}}),
            (ValueError, "'temperature' cannot be sent as JSON", ("p",), {"temperature": float("nan")}),
            (ValueError, "'min_p' cannot be sent as JSON", ("p",), {"min_p": float("inf")}),
            (ValueError, "'stop' cannot be sent as JSON", ("p",), {"stop": deep}),
            (ValueError, "'response_format' cannot be sent", ("p",), {"response_format": circle}),
            (TypeError, "server_url must be str", ("p",), {"server_url": 3}),
            (ValueError, "without blanks", ("p",), {"server_url": "http://h /"}),
            (ValueError, "without blanks", ("p",), {"server_url": "http://h\n"}),
            (ValueError, "ASCII", ("p",), {"server_url": "http://h/\u00e9"}),
            (ValueError, "query", ("p",), {"server_url": "http://h/?a=b"}),
            (ValueError, "fragment", ("p",), {"server_url": "http://h/#stream"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "localhost:8000"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "ftp://h"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "http://"}),
            (ValueError, "http://host:port", ("p",), {"server_url": "http://h:0"}),
            (ValueError, "is no URL", ("p",), {"server_url": "http://h:99999"}),
            (ValueError, "is no URL", ("p",), {"server_url": "http://h:port"}),
            (ValueError, "is no URL", ("p",), {"server_url": "http://[::1"}),
            (ValueError, "is no URL", ("p",), {"server_url": "http://a..b"}),
            (ValueError, "user:password", ("p",), {"server_url": "http://user:hunter2@h"}),
            (TypeError, "token must be str", ("p",), {"token": 3}),
            (TypeError, "the header 'a' must be str", ("p",), {"headers": {"a": 3}}),
            (TypeError, "the name of a header must be str", ("p",), {"headers": {3: "a"}}),
            (ValueError, "'a b' cannot be the name", ("p",), {"headers": {"a b": "c"}}),
            (ValueError, "the header 'a' holds", ("p",), {"headers": {"a": "b\r\nc: d"}}),
            (ValueError, "the client's to set", ("p",), {"headers": {"Content-Length": "3"}}),
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
            for value, kind in ((-1, ValueError), (float("inf"), ValueError), ("1", TypeError)):
                with self.subTest(name=name, value=value), self.assertRaisesRegex(kind, name):
                    friendli_lite.RetryConfig(**{name: value})
        with self.assertRaisesRegex(TypeError, "status_codes must be int, not str"):
            friendli_lite.RetryConfig(status_codes=["429"])


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
                result = call.run(friendli_lite._read_completion)
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
        self.assertEqual(8.0, friendli_lite._longest_delay(4000, config))
        self.assertEqual(0.5, friendli_lite._longest_delay(0, config))

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
        for status, advice in ((401, "FRIENDLI_TOKEN"), (404, "see model and server_url"), (429, "retries")):
            with self.subTest(status=status):
                self.serve(json_answer({}, status))
                with self.assertRaisesRegex(friendli_lite.APIStatusError, advice):
                    friendli_lite.complete("p", retries=0)

    def test_errors_survive_pickling_and_copying(self):
        status = friendli_lite.APIStatusError("text", 503, {"a": "b"}, "body", "words")
        response = friendli_lite.APIResponseError("text", "body")
        for error in (
            status,
            response,
            friendli_lite.FriendliError("text"),
            friendli_lite.APIConnectionError("text"),
            friendli_lite.APITimeoutError("text"),
        ):
            error.attempts, error.url = 3, "http://h/v1/completions"
            for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
                self.assertEqual((type(error), str(error), vars(error)), (type(twin), str(twin), vars(twin)))
        self.assertEqual("POST http://h/v1/completions: text (after 3 attempts)", str(status))

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
            try:
                status = friendli_lite.main(arguments)
            except SystemExit as exit_:
                status = exit_.code
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
        for part in ("try 1", "status 503", "retry 1 of 3", "try 2", "status 200 after", "done after"):
            self.assertIn(part, said)
        self.assertNotIn(TOKEN, said)
        self.assertNotIn("secret prompt", said)

    def test_ctrl_c_is_exit_status_130_without_a_traceback(self):
        def interrupt(sock):
            os.kill(os.getpid(), signal.SIGINT)
            sock.sendall(event_stream())  # wakes the client, if it waited before the signal came

        self.serve(interrupt)
        status, _, err = self.run_main("p")
        self.assertEqual((130, ""), (status, err))

    def test_a_closed_pipe_ends_it_quietly(self):
        self.serve()
        with subprocess.Popen(
            [sys.executable, os.path.join(HERE, "friendli_lite.py"), "p"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            process.stdout.close()
            self.assertEqual(b"", process.stderr.read())
        self.assertEqual(0, process.returncode)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_said(self):
        self.serve()
        with open("/dev/full", "w") as full:
            ran = subprocess.run(
                [sys.executable, os.path.join(HERE, "friendli_lite.py"), "p"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        self.assertEqual(1, ran.returncode)
        self.assertTrue(ran.stderr.startswith("friendli_lite: cannot write: "), ran.stderr)

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


# --- Run as a program ---


def demo(arguments):
    """Run the command line against a stand-in container."""
    with StandInContainer() as container:
        os.environ["FRIENDLI_SERVER_URL"] = container.url
        os.environ["NO_PROXY"] = "127.0.0.1"
        return friendli_lite.main(arguments)


def serve(port=8000):
    """Keep a stand-in container running until Ctrl-C."""
    with StandInContainer(port=int(port)) as container:
        print(f"A stand-in container answers at {container.url}; Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--demo"]:
        sys.exit(demo(sys.argv[2:]))
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve(*sys.argv[2:3]))
    unittest.main()
