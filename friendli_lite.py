# SPDX-FileCopyrightText: 2026 The friendli_lite authors
# SPDX-License-Identifier: MIT-0
# Linters and formatters of a project that vendors this file may skip it. Pyright's strict mode
# complains only about JSON, which has no types.
# ruff: noqa
# fmt: off
# pyright: basic
"""Text completions from a Friendli Container, in one file without dependencies.

    import friendli_lite

    print(friendli_lite.complete("Say this is a test!", max_tokens=16).text)
    with friendli_lite.stream("Say this is a test!", max_tokens=16) as chunks:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)

The server is $FRIENDLI_SERVER_URL, or http://localhost:8000; a token is read from $FRIENDLI_TOKEN.
Failed connections and responses of busy servers are retried, as `RetryConfig` describes. A call
that fails raises a `FriendliError`; so does a response that is cut short.
Left out on purpose: all other endpoints (including chat), an async API, HTTP/2, a client object.
"""

from __future__ import annotations

import atexit
import base64
import codecs
import contextlib
import email.utils
import errno
import functools
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from datetime import timezone
from json.encoder import encode_basestring_ascii
from urllib.parse import unquote, urlsplit

if sys.version_info < (3, 10):  # pragma: no cover
    # For host names; it fails if several threads are the first to import it from a zipped library.
    import encodings.idna

TYPE_CHECKING = False  # true for type checkers; at run time, typing is not imported
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from typing import Any, TypedDict, TypeVar, Unpack  # type: ignore[attr-defined, unused-ignore]

    _T = TypeVar("_T")
    _AnyError = TypeVar("_AnyError", bound=BaseException)
    _ChunkGenerator = Generator["CompletionChunk", None, None]
    # Scheme, host:port, proxy and context: connections of the same route are interchangeable
    _Route = tuple[str, str, "_Proxy | None", "ssl.SSLContext | None"]
else:
    _ChunkGenerator = Generator  # which Python 3.8 cannot subscript

__all__ = [
    "APIConnectionError", "APIResponseError", "APIStatusError", "APITimeoutError", "ChunkChoice",
    "Completion", "CompletionChoice", "CompletionChunk", "CompletionRequest", "CompletionStream",
    "FriendliError", "Logprobs", "RetryConfig", "Usage", "complete", "stream",
]
__version__ = "0.2.0"

_DEFAULT_SERVER_URL = "http://localhost:8000"
_DEFAULT_PORTS = {"http": 80, "https": 443}
_CA_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # OpenSSL reads them by itself
_MAX_CONNECT_SECONDS = 10.0  # a server that takes longer counts as down
_MAX_ADDRESS_SECONDS = 2.5  # for one of several addresses: a lost SYN is sent again after 1 s
_MAX_WAIT_SECONDS = 1e6  # stands for no limit (12 days); sockets do not take much more
_KEEPALIVE_EXPIRY_SECONDS = 4.0  # servers close idle connections after 5 s (uvicorn) or more
_MAX_IDLE_CONNECTIONS = 64  # one for each thread of a large thread pool
_MAX_STALE_SECONDS = 0.3  # a dead connection fails by then; later, the request may have been read
_MAX_DRAIN_SECONDS = 0.01  # for the bytes after [DONE]; a new connection takes longer
_TCP_KEEPALIVE_SECONDS = 60  # below the idle limits of NATs (350 s on AWS)
_RECEIVE_SIZE = 64 * 1024  # bytes received at once
_SEND_SIZE = 16 * 1024  # bytes sent at once: one TLS record, so that progress shows on a slow line
_MAX_HEAD_BYTES = 32 * 1024  # of headers, interim ones included, or of trailers; as nginx
_MAX_HEADERS = 100  # the limit of http.client and Apache
_MAX_EVENT_BYTES = 16 * 1024**2  # of a line, or of lines without an event; most have about 200
_MAX_COMPLETION_BYTES = 32 * 1024**2  # 100,000 tokens with 5 logprobs each take about 20 MB
_MAX_ERROR_BODY_BYTES = 64 * 1024  # of an error page; people read only the first screen
_MAX_QUOTED_CHARACTERS = 500  # of a server's text within a message
_MIN_SECRET_CHARACTERS = 8  # a shorter one ("test", "local") may be a word of other text

_ABORTED = "another thread closed the stream"
_logger = logging.getLogger("friendli_lite")
# ASCII output, so that lone surrogates can be sent
_encode_json = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


# Errors


class FriendliError(Exception):
    """Base class of the errors raised by a call; `attempts` counts the attempts to send it."""

    attempts: int = 0


class APIStatusError(FriendliError):
    """The server or a proxy responded with a status other than 200.

    Attributes:
        status_code: the status.
        headers: the response's headers, names in lower case.
        body: the first 64 KiB of the response's body, as text.
        message: what the server says is wrong, found in the body; "" if it says nothing.
    """

    # The defaults are for pickle, which passes only the text and sets the attributes afterwards.
    def __init__(
        self,
        text: str,
        status_code: int = 0,
        headers: dict[str, str] | None = None,
        body: str = "",
        message: str = "",
    ) -> None:
        super().__init__(text)
        self.status_code = status_code
        self.headers = headers or {}
        self.body = body
        self.message = message


class APIConnectionError(FriendliError):
    """The connection failed or broke, or a stream ended before [DONE]."""


class APITimeoutError(APIConnectionError):
    """No data came for `timeout` seconds, or `total_timeout` or the time to connect ran out."""


class APIResponseError(FriendliError):
    """The response cannot be used: not HTTP, not a completion, or an error in mid-stream.

    Attributes:
        body: the part that shows the fault, as text, cut to 64 KiB; "" if it was too long to keep.
    """

    def __init__(self, text: str, body: str = "") -> None:
        super().__init__(text)
        self.body = body


# Request


def _check_type(name: str, value: object, *types: type) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join(type_.__name__ for type_ in types)
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")


@dataclass
class CompletionRequest:
    """The body of a request; None is not sent. Source: the API reference of Friendli Suite.

    Exactly one of `prompt` and `tokens` is needed. Lengths and limits are in tokens.

    Attributes:
        prompt: text to complete, or a list of several.
        tokens: the same as a list of token IDs.
        model: LoRA adapter of a container; model code or endpoint ID of a hosted product.
        bad_word_tokens: token sequences never to generate, like `stop_tokens`.
        bad_words: texts never to generate.
        embedding_to_replace: embeddings for `token_index_to_replace`, flattened.
        encoder_no_repeat_ngram: length of n-grams of the input not to repeat.
        encoder_repetition_penalty: penalty for tokens of the input; 1.0 is none.
        eos_token: IDs of tokens that end the generation.
        forced_output_tokens: token IDs that the output is forced to have.
        frequency_penalty: penalty for each occurrence of a token; above 0 repeats less.
        logprobs: number of most likely tokens to report at each step.
        max_tokens: maximum length of the output.
        max_total_tokens: maximum length of input and output; not together with `max_tokens`.
        min_p: minimum probability of a token, relative to the most likely one.
        min_tokens: minimum length of the output; not together with `response_format`.
        min_total_tokens: minimum length of input and output.
        n: number of choices to generate for each prompt.
        no_repeat_ngram: length of n-grams of the output not to repeat.
        presence_penalty: penalty for tokens that have occurred; above 0 repeats less.
        repetition_penalty: penalty for tokens that have occurred; 1.0 is none.
        response_format: {"type": ...}: "text", "json_object", "json_schema" or "regex".
        seed: seed of the sampling, or a list with one for each of `n`.
        stop: texts that end the generation.
        stop_tokens: token sequences that end the generation: [{"tokens": [1, 2]}, ...].
        stream: set by `stream()`; False there, or True in `complete()`, is refused.
        stream_options: {"include_usage": True} adds a last chunk with `usage`.
        temperature: randomness of the sampling; 0 takes the most likely token.
        token_index_to_replace: positions of tokens that `embedding_to_replace` replaces.
        top_k: sample from the k most likely tokens.
        top_p: sample from the most likely tokens of this total probability.
        xtc_probability: how often the most likely tokens are left out (exclude top choices).
        xtc_threshold: probability above which a token may be left out.
        extra_body: fields that this version does not know, sent as they are.
    """

    prompt: str | Sequence[str] | None = None
    tokens: Sequence[int] | None = None
    model: str | None = None
    bad_word_tokens: Sequence[Mapping[str, Sequence[int]]] | None = None
    bad_words: Sequence[str] | None = None
    embedding_to_replace: Sequence[float] | None = None
    encoder_no_repeat_ngram: int | None = None
    encoder_repetition_penalty: float | None = None
    eos_token: Sequence[int] | None = None
    forced_output_tokens: Sequence[int] | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    max_total_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    min_total_tokens: int | None = None
    n: int | None = None
    no_repeat_ngram: int | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    response_format: Mapping[str, Any] | None = None
    seed: int | Sequence[int] | None = None
    stop: Sequence[str] | None = None
    stop_tokens: Sequence[Mapping[str, Sequence[int]]] | None = None
    stream: bool | None = None
    stream_options: Mapping[str, bool] | None = None
    temperature: float | None = None
    token_index_to_replace: Sequence[int] | None = None
    top_k: int | None = None
    top_p: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    extra_body: Mapping[str, Any] | None = None


if TYPE_CHECKING:

    class _RequestFields(TypedDict, total=False):
        """The fields of `CompletionRequest`, as keywords of the two calls (PEP 692)."""

        prompt: str | Sequence[str] | None
        tokens: Sequence[int] | None
        model: str | None
        bad_word_tokens: Sequence[Mapping[str, Sequence[int]]] | None
        bad_words: Sequence[str] | None
        embedding_to_replace: Sequence[float] | None
        encoder_no_repeat_ngram: int | None
        encoder_repetition_penalty: float | None
        eos_token: Sequence[int] | None
        forced_output_tokens: Sequence[int] | None
        frequency_penalty: float | None
        logprobs: int | None
        max_tokens: int | None
        max_total_tokens: int | None
        min_p: float | None
        min_tokens: int | None
        min_total_tokens: int | None
        n: int | None
        no_repeat_ngram: int | None
        presence_penalty: float | None
        repetition_penalty: float | None
        response_format: Mapping[str, Any] | None
        seed: int | Sequence[int] | None
        stop: Sequence[str] | None
        stop_tokens: Sequence[Mapping[str, Sequence[int]]] | None
        stream: bool | None
        stream_options: Mapping[str, bool] | None
        temperature: float | None
        token_index_to_replace: Sequence[int] | None
        top_k: int | None
        top_p: float | None
        xtc_probability: float | None
        xtc_threshold: float | None
        extra_body: Mapping[str, Any] | None


@dataclass(frozen=True)
class RetryConfig:
    """Which failures are retried, how often, and after which delays in seconds.

    The delay before retry k = 0, 1, ... is drawn from 0 to `min(max_delay, initial_delay *
    multiplier**k)`: by default from 0 to 0.5, 1 and 2 s (full jitter: "Exponential Backoff And
    Jitter", AWS Architecture Blog). If the server asks for a delay, by `retry-after-ms` or
    `Retry-After`, the two are added. If the sum exceeds what is left of `total_timeout`, the error
    is raised at once. Some failures are never retried: a stream after its first event, a response
    that cannot be read, a refused certificate, and a fault of this machine.

    Attributes:
        max_retries: number of retries; 0 sends one request.
        initial_delay: maximum delay before the first retry.
        max_delay: maximum delay before any retry, unless the server asks for more.
        multiplier: growth of the maximum from retry to retry.
        max_retry_after: if the server asks for more than this, there is no retry.
        status_codes: statuses that are retried.
        retry_connection_errors: whether connections that fail or break are retried.
        retry_timeouts: whether timeouts are retried. The server may still be generating, and a
            retry would be billed again. 504 and 524, a gateway's timeouts, count as timeouts; a
            timeout while connecting counts as a failed connection.
    """

    max_retries: int = 3
    initial_delay: float = 0.5
    max_delay: float = 8.0
    multiplier: float = 2.0
    max_retry_after: float = 60.0
    status_codes: Collection[int] = (408, 429, 500, 502, 503, 520, 521, 522, 523, 529)
    retry_connection_errors: bool = True
    retry_timeouts: bool = False

    def __post_init__(self) -> None:
        _check_type("max_retries", self.max_retries, int)
        for name in ("max_retries", "initial_delay", "max_delay", "multiplier", "max_retry_after"):
            value = getattr(self, name)
            _check_type(name, value, int, float)
            if not 0 <= value <= sys.float_info.max:
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        _check_type("status_codes", self.status_codes, tuple, list, set, frozenset, range)
        for code in self.status_codes:
            _check_type("each of status_codes", code, int)


_DEFAULT_RETRIES = RetryConfig()


# Response types: fields that the server leaves out are None, or an empty list


@dataclass
class Usage:
    """Token counts; `prompt_tokens_details` may hold `cached_tokens`."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: dict[str, Any] | None = None


@dataclass
class Logprobs:
    """Natural logarithms of probabilities; each list has one entry for each token."""

    text_offset: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)


@dataclass
class CompletionChoice:
    """One generated text; `finish_reason` is "stop", "length", or another value of the server."""

    index: int | None = None
    text: str = ""
    seed: int | None = None
    finish_reason: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None


class _HasText:
    choices: Sequence[CompletionChoice | ChunkChoice]

    @property
    def text(self) -> str:
        """The text of the first choice with index 0 or without an index; else ""."""
        for choice in self.choices:
            if choice.index in (0, None):
                return choice.text
        return ""


@dataclass
class Completion(_HasText):
    """A complete response.

    `raw` is the decoded JSON object, with fields that this class lacks; `headers` are the
    response's headers, names in lower case.
    """

    id: str | None = None
    object: str | None = None
    choices: list[CompletionChoice] = field(default_factory=list)
    usage: Usage | None = None
    model: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass
class ChunkChoice:
    """The next part of a choice; `finish_reason` is None before its end."""

    index: int | None = None
    text: str = ""
    token: int | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


@dataclass
class CompletionChunk(_HasText):
    """One event of a stream; `created` is Unix time in seconds, `raw` the decoded JSON object.

    Chunks of several choices come interleaved; see `choices[0].index`. The one with `usage` usually
    has no choices.
    """

    id: str | None = None
    object: str | None = None
    choices: list[ChunkChoice] = field(default_factory=list)
    created: int | None = None
    usage: Usage | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


# The two calls


def complete(
    request: str | Mapping[str, Any] | CompletionRequest | None = None,
    *,
    server_url: str | None = None,
    token: str | None = None,
    retries: RetryConfig | int | None = None,
    timeout: float | None = 600.0,
    total_timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    **fields: Unpack[_RequestFields],
) -> Completion:
    """Request a completion, and return it when it is complete.

    Args:
        request: a prompt, a mapping of body fields, or a `CompletionRequest`.
        server_url: default $FRIENDLI_SERVER_URL, then http://localhost:8000.
        token: default $FRIENDLI_TOKEN; "" sends none.
        retries: a `RetryConfig`, or a number of retries.
        timeout: seconds to wait for the next byte; None waits forever. Connecting takes 10 s at
            most, not counting the DNS lookup, which only the operating system limits.
        total_timeout: seconds for the whole call with its retries and delays; None for no limit.
        headers: extra headers; they override the client's.
        ssl_context: for a private CA or a client certificate; default: the system's CAs.
        **fields: body fields, described in `CompletionRequest`; they override those of `request`,
            which can thus be a template.

    Returns:
        The completion; `.text` is its text.

    Raises:
        FriendliError: the call failed; its subclass says how.
        TypeError, ValueError: an argument or an environment variable is invalid; nothing was sent.
    """
    try:
        return _prepare(
            False, request, fields, server_url, token, headers, retries, timeout, total_timeout,
            ssl_context,
        ).complete()
    except FriendliError as error:
        raise _without_frames(error)
    finally:
        del server_url, token, headers  # error trackers record a traceback's local variables


def stream(
    request: str | Mapping[str, Any] | CompletionRequest | None = None,
    *,
    server_url: str | None = None,
    token: str | None = None,
    retries: RetryConfig | int | None = None,
    timeout: float | None = 600.0,
    total_timeout: float | None = None,
    headers: Mapping[str, str] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    **fields: Unpack[_RequestFields],
) -> CompletionStream:
    """Request a completion, and return its chunks as they arrive: a generator, for a `with` block.

    Arguments and errors are those of `complete()`; `total_timeout` covers the stream to its end. A
    refused request raises here; a stream cut short before [DONE] raises APIConnectionError in the
    loop.
    """
    try:
        call = _prepare(
            True, request, fields, server_url, token, headers, retries, timeout, total_timeout,
            ssl_context,
        )
        return CompletionStream(call.open())
    except FriendliError as error:
        raise _without_frames(error)
    finally:
        del server_url, token, headers


class CompletionStream(_ChunkGenerator):
    """The chunks of a response: a generator of `CompletionChunk`, and a context manager.

    The connection is released at the end of the stream or of the `with` block, by an error, by
    `close()`, and by garbage collection.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._chunks = call.iter_chunks()

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers, names in lower case."""
        return self._call.response.headers

    def __next__(self) -> CompletionChunk:
        try:
            return next(self._chunks)
        except FriendliError as error:
            raise _without_frames(error)

    def send(self, value: None) -> CompletionChunk:
        """Return the next chunk."""
        return next(self)

    def throw(self, *error: Any) -> CompletionChunk:
        """Close the stream, and raise the error as it is."""
        self.close()
        return self._chunks.throw(*error)

    def close(self) -> None:
        """Release the connection, also while another thread waits for a chunk."""
        try:
            self._chunks.close()
        except ValueError:  # it is running, in another thread or under this signal handler
            self._call.abort()
        else:
            self._call.response.close()  # a generator that never started does not run its `with`

    __del__ = close

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _without_frames(error: _AnyError) -> _AnyError:
    """Remove the frames of an error and of its cause: they hold secrets and keep objects alive."""
    for link in (error, error.__cause__):
        if link is not None:
            link.__traceback__ = link.__context__ = None
    return error


# Building the request


def _prepare(
    is_stream: bool,
    request: object,
    fields: Mapping[str, Any],
    server_url: str | None,
    token: str | None,
    headers: Mapping[str, str] | None,
    retries: RetryConfig | int | None,
    timeout: float | None,
    total_timeout: float | None,
    ssl_context: ssl.SSLContext | None,
) -> _Call:
    """Return the call that the arguments describe, once they are all checked."""
    try:
        _check_type("ssl_context", ssl_context, ssl.SSLContext, type(None))
        _check_type("retries", retries, RetryConfig, int, type(None))
        if not isinstance(retries, RetryConfig):
            retries = _DEFAULT_RETRIES if retries is None else RetryConfig(max_retries=retries)
        return _Call(
            url=_completions_url(server_url),
            headers=_build_headers(is_stream, token, headers),
            body=_build_body(request, fields, is_stream),
            retries=retries,
            timeouts=_build_timeouts(timeout, total_timeout),
            ssl_context=ssl_context,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise _without_frames(error)
    finally:
        del server_url, token, headers


def _build_body(request: object, fields: Mapping[str, Any], is_stream: bool) -> bytes:
    body = _collect_fields(request, fields)
    _check_fields(body)
    if body.get("stream", is_stream) != is_stream:
        other = "complete" if is_stream else "stream"
        raise ValueError(f"stream={body['stream']} is for {other}()")
    if is_stream:
        body["stream"] = True
    body.update(body.pop("extra_body", {}))
    members = []
    for name, value in body.items():
        try:
            members.append(f"{encode_basestring_ascii(name)}:{_encode_json(value)}")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name!r} cannot be sent as JSON: {error}") from None
    return ("{" + ",".join(members) + "}").encode("ascii")


def _collect_fields(request: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body fields of a request that are not None; keywords override."""
    if isinstance(request, str):
        if "prompt" in fields:
            raise TypeError("the prompt was given twice, as request and as prompt=")
        request = {"prompt": request}
    elif isinstance(request, CompletionRequest):
        request = vars(request)
    elif request is not None:
        name = "request (a list of prompts is prompt=[...])"
        _check_type(name, request, str, Mapping, CompletionRequest)
    merged: dict[str, Any] = {**(request or {}), **fields}
    for name in merged.keys() - CompletionRequest.__annotations__.keys():
        raise TypeError(f"unknown field {name!r}; {_hint_for_unknown_field(str(name))}")
    return {name: value for name, value in merged.items() if value is not None}


_FIELDS_OF_OTHER_CLIENTS = {
    "api_key": "use token=",
    "base_url": "use server_url=",
    "extra_headers": "use headers=",
    "http_headers": "use headers=",
    "max_completion_tokens": "use max_tokens=",
    "messages": "chat is left out; pass a prompt",
    "timeout_ms": "use timeout=, in seconds",
}


def _hint_for_unknown_field(name: str) -> str:
    import difflib  # needed only for a mistake

    known = [*CompletionRequest.__annotations__, *map("{}=".format, complete.__kwdefaults__ or ())]
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"did you mean {near[0]!r}?" if near else "extra_body takes new ones"
    return _FIELDS_OF_OTHER_CLIENTS.get(name, guess)


def _check_fields(body: Mapping[str, Any]) -> None:
    """Refuse what a server would refuse with a less helpful 422."""
    if ("prompt" in body) == ("tokens" in body):
        found = "both were" if "tokens" in body else "neither was"
        raise ValueError(f"exactly one of prompt and tokens is needed; {found} given")
    types = CompletionRequest.__annotations__  # as text, by `from __future__ import annotations`
    for name, value in body.items():
        if isinstance(value, str) and types[name].startswith("Sequence[str]"):
            raise TypeError(f"{name} must be a list of strings: {name}={json.dumps([value])}")
    _check_type("extra_body", body.get("extra_body", {}), Mapping)
    for name in types.keys() & body.get("extra_body", {}):
        raise ValueError(f"extra_body holds {name!r}, which is a field of its own")


_HOST = r"(?:\[[\da-f:.]+\]|(?:[\w-]{1,63}\.)*[\w-]{1,63}\.?)"
_PORT = r"(?!6553[6-9]|655[4-9]\d|65[6-9]\d\d|6[6-9]\d{3}|[7-9]\d{4})[1-9]\d{0,4}"  # to 65535
# A path may hold printable ASCII but #, ? and \
_SERVER_URL = re.compile(
    rf"(https?)://({_HOST}(?::{_PORT})?):?"
    r"((?:/+[!\"$-.0->@-\[\]-~]+)*?)(?:/+v1(?:/+completions)?)?/*",
    re.IGNORECASE | re.ASCII,
)
_SERVER_URL_MISTAKES = (  # a pattern, and what is wrong with a URL in which it is found
    (r"\A\Z", "it is empty"),
    (r"[\0- \x7f]", "it holds a blank or a control character"),
    (r"[^!-~]", "it holds a character that is not ASCII"),
    (r"(?i)\A(?!https?://)", "it must begin with http:// or https://"),
    (r"\\", "it holds a backslash"),
    (r"\?", "it has a query"),
    (r"#", "it has a fragment"),
    (r"\A\w+://([:/]|\Z)", "it has no host"),
    (r"\A\w+://[^/]*%", "it has % in its host"),
    (rf"(?i)\A\w+://(?!{_HOST}(:|/|\Z))", "it has an invalid host"),
    (r"", "it has an invalid port"),
)


def _completions_url(server_url: str | None) -> str:
    """Return the URL to post to; `server_url` may end in a slash, in /v1, or in the whole path."""
    if server_url is None:
        server_url = os.environ.get("FRIENDLI_SERVER_URL") or _DEFAULT_SERVER_URL
    _check_type("server_url", server_url, str)
    if "@" in server_url:  # not shown: there may be a password
        raise ValueError("server_url must not hold user:password@; use token or headers")
    match = _SERVER_URL.fullmatch(server_url)
    if match is None:
        mistakes = (text for sign, text in _SERVER_URL_MISTAKES if re.search(sign, server_url))
        raise ValueError(f"server_url cannot be {server_url!r}: {next(mistakes)}")
    scheme, host, prefix = match.groups()
    return f"{scheme.lower()}://{host}{prefix}/v1/completions"


_TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)


def _build_headers(
    is_stream: bool, token: str | None, headers: Mapping[str, str] | None
) -> dict[str, str]:
    built = {
        "Accept": "text/event-stream" if is_stream else "application/json",
        "Accept-encoding": "identity",
        "Content-type": "application/json",
        "User-agent": f"friendli_lite/{__version__}",
    }
    token = os.environ.get("FRIENDLI_TOKEN", "") if token is None else token
    _check_type("token", token, str)
    token = token.strip()
    if re.search(r"[^ -~]", token):
        raise ValueError("token has a character that headers must not have")
    if token:
        built["Authorization"] = f"Bearer {token}"
    _check_type("headers", headers or {}, Mapping)
    for name, value in (headers or {}).items():
        _check_type("the name of a header", name, str)
        _check_type(f"header {name!r}", value, str)
        # RFC 9110, 5.6.2 and 5.5
        if not _TOKEN.fullmatch(name) or re.search(r"[^\t -~\x80-\xff]", value):
            raise ValueError(f"header {name!r} has a character that headers must not have")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"header {name!r} is set by the client")
        built[name.capitalize()] = value  # in urllib's spelling, so that it overrides
    return built


def _build_timeouts(timeout: float | None, total_timeout: float | None) -> _Timeouts:
    silence = math.inf if timeout is None else timeout
    total = math.inf if total_timeout is None else total_timeout
    _check_type("timeout", silence, int, float)
    _check_type("total_timeout", total, int, float)
    if not silence > 0 or total != total:  # NaN
        raise ValueError("timeout and total_timeout must be seconds, timeout above 0, or None")
    total = max(-_MAX_WAIT_SECONDS, min(total, _MAX_WAIT_SECONDS))
    return _Timeouts(min(silence, _MAX_WAIT_SECONDS), total)


# Sending with retries


class _Timeouts:
    """The time that a call has left: `timeout` s for the next bytes, `total_timeout` s in all."""

    def __init__(
        self, timeout: float, total_timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timeout = timeout
        self.total_timeout = total_timeout
        self.clock = clock
        self._start = clock()
        self._total_comes_first = False  # of the two limits

    def elapsed(self) -> float:
        return self.clock() - self._start

    def remaining(self) -> float:
        return self.total_timeout - self.elapsed()

    def for_socket(self) -> float:
        """Return how many seconds a socket may wait now; raise socket.timeout if none are left."""
        remaining = self.remaining()
        if remaining <= 0:
            raise socket.timeout("timed out")
        self._total_comes_first = remaining < self.timeout
        return min(self.timeout, remaining)

    def message(self, verb: str = "received") -> str:
        """Return the end of an error message: which limit was spent."""
        if self._total_comes_first or self.remaining() <= 0:  # a socket may wake up a bit early
            return f": total_timeout={self.total_timeout:g} s was spent"
        return f": no data {verb} for timeout={self.timeout:g} s"


class _ConnectTimeouts(_Timeouts):
    """The time that connecting has left: `total_timeout` is 10 s, or less if the call has less."""

    def __init__(self, call: _Timeouts) -> None:
        seconds, self._limit = min(  # the shortest, and its name
            (_MAX_CONNECT_SECONDS, "the limit for connecting"),
            (call.timeout, "timeout"),
            (max(0.0, call.remaining()), "total_timeout"),
        )
        super().__init__(math.inf, seconds, call.clock)

    def message(self, verb: str = "received") -> str:
        return f" within {round(self.total_timeout, 3):g} s ({self._limit})"


@dataclass(repr=False, eq=False)  # repr() would show the token
class _Call:
    """One call: what is sent, its timeouts, its attempts. Tests replace `sleep` and `uniform`."""

    url: str
    headers: dict[str, str]
    body: bytes
    retries: RetryConfig
    timeouts: _Timeouts
    ssl_context: ssl.SSLContext | None
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform
    attempts: int = 0  # to send the request, with those that replaced a dead idle connection
    retry: int = 0  # retries begun
    was_sent: bool = False  # whether the last request may have reached a server
    was_aborted: bool = False
    shut_down: Callable[[], None] | None = None  # of the connection in use
    response: _Response = field(init=False)

    def complete(self) -> Completion:
        while True:
            try:
                with contextlib.closing(self._send()) as response:
                    completion = _read_completion(response)
                if self.timeouts.remaining() <= 0:  # the JSON may have taken its time
                    raise APITimeoutError(f"the response came too late{self.timeouts.message()}")
                self._log("done")
                return completion
            except FriendliError as error:
                self._wait_or_raise(error)

    def open(self) -> _Call:
        """Send the request until the head of a stream has arrived."""
        while True:
            try:
                self.response = self._send()
                return self
            except FriendliError as error:
                self._wait_or_raise(error)

    def iter_chunks(self) -> _ChunkGenerator:
        """Yield the chunks of the open response; before the first one, a failure is retried."""
        has_begun = False
        while True:
            try:
                with contextlib.closing(self.response):
                    for chunk in _read_chunks(self.response):
                        has_begun = True
                        yield chunk
                self._log("done")
                return
            except FriendliError as error:
                self._wait_or_raise(error, is_final=has_begun)
            self.open()

    def abort(self) -> None:
        """Have the thread that reads raise an error, and let no attempt follow."""
        self.was_aborted = True
        if self.shut_down is not None:
            self.shut_down()

    def _send(self) -> _Response:
        """Send the request once, and return the response if its status is 200."""
        if self.was_aborted:
            raise APIConnectionError(_ABORTED)
        if self.timeouts.remaining() <= 0:
            raise APITimeoutError(f"the request was not sent{self.timeouts.message()}")
        self.attempts += 1
        self.was_sent = False
        response: _Response = _opener.open(_Request(self))
        self._log(f"status {response.status}")
        if response.status != 200:
            raise _status_error(response, f"the server{response.connection.via}")
        return response

    def _wait_or_raise(self, error: FriendliError, is_final: bool = False) -> None:
        """Wait until it is time for the next attempt; raise the error if there is none."""
        _without_frames(error)  # before it is logged: a handler may keep it
        if self.was_aborted:  # the connection broke because of that
            error = APIConnectionError(_ABORTED)
        attempts = f" (after {self.attempts} attempts)" if self.attempts > 1 else ""
        error.args = (f"POST {self.url}: {error}{attempts}",)
        error.attempts = self.attempts
        delay = _retry_delay(error, self.retry, self.was_sent, self.retries, self.uniform)
        if is_final or self.was_aborted or delay is None or delay >= self.timeouts.remaining():
            self._log("failed")
            raise error
        self.retry += 1
        text = "%s; retry %d of %d in %.2f s"
        _logger.info(text, error, self.retry, self.retries.max_retries, delay)
        self.sleep(delay)

    def _log(self, event: str) -> None:
        _logger.debug("POST %s: %s after %.3f s", self.url, event, self.timeouts.elapsed())


# Retry decisions


def _retry_delay(
    error: FriendliError,
    retry: int,
    was_sent: bool,
    config: RetryConfig,
    uniform: Callable[[float, float], float],
) -> float | None:
    """Return the seconds to wait before retry 0, 1, ..., or None for no retry."""
    if retry >= config.max_retries or not _is_retryable(error, was_sent, config):
        return None
    retry_after = _retry_after(getattr(error, "headers", {}), time.time())
    if retry_after > config.max_retry_after:
        return None
    max_delay = config.max_delay if config.initial_delay else 0.0  # even where the power overflows
    with contextlib.suppress(OverflowError):
        max_delay = min(max_delay, config.initial_delay * config.multiplier**retry)
    # The jitter is added, so that threads refused together do not come back together.
    return min(retry_after + uniform(0.0, max_delay), _MAX_WAIT_SECONDS)


def _is_retryable(error: FriendliError, was_sent: bool, config: RetryConfig) -> bool:
    if isinstance(error, APIStatusError):
        was_timeout = error.status_code in (504, 524)
        return error.status_code in config.status_codes or (was_timeout and config.retry_timeouts)
    if isinstance(error, APITimeoutError) and was_sent:
        return config.retry_timeouts
    return (
        isinstance(error, APIConnectionError)
        and config.retry_connection_errors
        and not _permanent_hint(error.__cause__)
    )


def _retry_after(headers: Mapping[str, str], now: float) -> float:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3); 0 for nonsense."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]+(\.[0-9]*)?", value):
            return float(value) * unit
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - now)
    except Exception:  # email.utils raises many things for an odd date, on 3.8 UnboundLocalError
        return 0.0


# The transport
#
# urllib's opener passes a request to our handler, which takes an idle connection from the pool or
# opens a new one. Only a connection waits for a socket; a response reads from its connection. Both
# belong to one call until the response is closed. If it was read to its end, its connection goes
# back to the pool.
#
# Where the standard library falls short:
# - http.client drops every header after a malformed line, so that a lost Transfer-Encoding turns
#   framing into text. It takes a closed connection for the end of a body, and takes a chunk size
#   below 0. It wraps what a signal handler raises. The response is therefore read here.
# - ssl raises SSLEOFError where a plain socket raises BrokenPipeError (3.10 to 3.12).
# - ssl leaves the socket open if a signal handler raises during the handshake in wrap_socket().
# - OpenSSL is silent about a CA file that it cannot open.
# - urllib's ProxyHandler matches NO_PROXY by text, splits a password at "/" and "@", and lets a
#   variable named DEFAULT_PROXY reroute every request.
# - A TimeoutError may be the socket's or a signal handler's; `_is_foreign()` tells them apart.


_CREDENTIAL_NAME = re.compile("key|token|secret|auth|cookie|pass", re.IGNORECASE)
_CREDENTIAL_END = re.compile(r"[\s;,=]+")  # a server may echo x alone of "Bearer x" or "a=x; b=y"


class _Secrets:
    """The credentials that a call sends, to be taken out of what comes back."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        values = {
            spelling.lower()
            for name, value in headers.items()
            if _CREDENTIAL_NAME.search(name)
            for part in [value, *_CREDENTIAL_END.split(value)]
            if len(part) >= _MIN_SECRET_CHARACTERS
            for spelling in (part, part.replace("/", "\\/"))  # as it is, and in JSON
        }
        self._values = sorted(values, key=len, reverse=True)  # one may begin another
        self.has_token = "Authorization" in headers

    def redact(self, text: str, is_cut: bool = False) -> str:
        """Replace the credentials in a text, in any letter case; drop a part of one at a cut."""
        text = text.replace("\u0130", "I")  # the one character whose lower case is two
        lowered = text.lower()
        for value in self._values:
            kept, position = [], 0  # in linear time: where `lowered` is split, `text` is cut
            for piece in lowered.split(value):
                kept.append(text[position : position + len(piece)])
                position += len(piece) + len(value)
            text, lowered = "***".join(kept), lowered.replace(value, "***")
        if not is_cut:
            return text
        starts = (value[:length] for value in self._values for length in range(len(value)))
        dropped = max((len(start) for start in starts if lowered.endswith(start)), default=0)
        return text[: len(text) - dropped]


class _Request(urllib.request.Request):
    """A request that carries its call to the transport."""

    def __init__(self, call: _Call) -> None:
        super().__init__(call.url, headers=call.headers, method="POST")
        self.call = call
        self.proxy = _find_proxy(self.type, self.host)
        proxy_headers = self.proxy.headers if self.proxy else {}
        self.secrets = _Secrets({**call.headers, **proxy_headers})
        self.add_unredirected_header("Host", self.host)
        self.add_unredirected_header("Content-length", str(len(call.body)))
        if self.type == "http":
            self.unredirected_hdrs.update(proxy_headers)

    def encode(self) -> bytes:
        target = self.full_url if self.proxy and self.type == "http" else self.selector
        return _encode_head(f"POST {target}", dict(self.header_items())) + self.call.body


def _encode_head(request: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of a request; callers keep it in no variable, which would show the token."""
    lines = [f"{request} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


class _KeepAliveHandler(urllib.request.BaseHandler):
    """Sends a request over an idle connection if one is alive, else over a new one."""

    def http_open(self, request: _Request) -> _Response:
        call = request.call
        route = (request.type, request.host, request.proxy, call.ssl_context)
        idle = _pool.acquire(route)
        if idle is not None:
            start = call.timeouts.elapsed()
            try:
                return idle.exchange(request)
            except APIConnectionError as error:
                # A server may close an idle connection while the request is on its way. It has
                # hardly read it then, so it is sent again, and this does not count as a retry.
                is_late = call.timeouts.elapsed() - start > _MAX_STALE_SECONDS
                if is_late or idle.has_received or isinstance(error, APITimeoutError):
                    raise
            call.attempts += 1
            call.was_sent = False
        return _Connection(route, request).exchange(request)

    https_open = http_open


_opener = urllib.request.OpenerDirector()  # it follows no redirect, and knows no file: or ftp:
_opener.add_handler(_KeepAliveHandler())


@dataclass
class _Proxy:
    address: str  # host:port
    headers: dict[str, str] = field(repr=False)  # its Proxy-Authorization
    source: str  # what names it: a variable, or the system's settings


_PROXY_URL = rf"(?ia)(?:http://)?(?:([^:@/\s]*)(?::([^@/\s]*))?@)?({_HOST}(?::{_PORT})?)/?"
_PROXY_VARIABLES = {
    "http": (("http_proxy", "HTTP_PROXY"), ("all_proxy", "ALL_PROXY")),
    "https": (("https_proxy", "HTTPS_PROXY"), ("all_proxy", "ALL_PROXY")),
}


def _find_proxy(scheme: str, host: str) -> _Proxy | None:
    """Return the proxy for a server, from the environment or else from the system's settings."""
    for name, capital in _PROXY_VARIABLES[scheme]:
        variable = capital if os.environ.get(name) is None else name  # even if it is empty
        if os.environ.get(variable) and not _is_httpoxy(variable):
            if _is_excluded(scheme, host):
                return None
            # The value may hold a password, and is kept in no variable.
            return _parse_proxy(re.fullmatch(_PROXY_URL, os.environ.get(variable, "")), variable)
    proxy = _system_proxy(scheme, host)
    return None if proxy and _is_excluded(scheme, host) else proxy


def _is_httpoxy(variable: str) -> bool:
    """Tell whether a CGI script's client may have set it, by a header "Proxy:"."""
    is_capital = variable == "HTTP_PROXY" or os.name == "nt"  # where both spellings are one
    return is_capital and variable.lower() == "http_proxy" and "REQUEST_METHOD" in os.environ


def _parse_proxy(match: re.Match[str] | None, source: str) -> _Proxy:
    if match is None:
        raise ValueError(
            f"{source} must be like http://host:port or http://user:password@host:port,"
            " where a password has %40 for @ and %2F for /"
        )
    user, password, address = match.groups()
    credentials = unquote(f"{user or ''}:{password or ''}", errors="surrogateescape")
    encoded = base64.b64encode(credentials.encode("utf-8", "surrogateescape")).decode()
    headers = {} if user is None else {"Proxy-authorization": f"Basic {encoded}"}
    return _Proxy(address, headers, source)


@functools.lru_cache(maxsize=64)  # a look-up takes milliseconds, so each is made once
def _system_proxy(scheme: str, host: str) -> _Proxy | None:
    """Return the proxy that the settings of macOS or Windows name."""
    # Other systems have no settings: dict() is empty. A value may hold a password, as above.
    on_windows: Any = getattr(urllib.request, "getproxies_registry", dict)
    settings = getattr(urllib.request, "getproxies_macosx_sysconf", on_windows)
    if scheme not in settings() or urllib.request.proxy_bypass(host):
        return None
    match = re.fullmatch(_PROXY_URL, settings()[scheme])
    return _parse_proxy(match, "the system's proxy settings")


# [address] or host, with a port or without; or else an IPv6 address or a range
_NO_PROXY_ENTRY = r"(?:\[([^\]\s,]+)\]|([^:\s,]+))(?::(\d+))?(?![^\s,])|([^\s,]+)"


def _is_excluded(scheme: str, host: str) -> bool:
    """Tell whether NO_PROXY names a server: by its name or domain, its address, a range, or `*`."""
    server = urlsplit(f"//{host}")
    name, server_port = str(server.hostname).rstrip("."), server.port or _DEFAULT_PORTS[scheme]
    entries = os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).lower()
    return any(
        port in ("", str(server_port)) and _matches_host(bracketed or plain or other, name)
        for bracketed, plain, port, other in re.findall(_NO_PROXY_ENTRY, entries)
    )


def _matches_host(pattern: str, host: str) -> bool:
    import ipaddress  # needed only where there are a proxy and NO_PROXY

    try:
        return pattern == "*" or ipaddress.ip_address(host) in ipaddress.ip_network(pattern, False)
    except ValueError:  # one of the two is a name; an address is in no domain
        is_address = host.rpartition(".")[2].isdigit()
        return not is_address and f".{host}".endswith(f".{pattern.lstrip('*').strip('.')}")


class _Connection:
    """One TCP or TLS connection, perhaps through a tunnel; nothing else waits for a socket."""

    idle_since: tuple[float, ...] = ()  # one time for each clock of the pool
    has_received = False  # a byte of the current response
    _sock: Any = None

    def __init__(self, route: _Route, request: _Request) -> None:
        self.route = scheme, host, proxy, context = route
        self.via = f" through the proxy {proxy.address}" if proxy else ""
        self._owner = os.getpid()
        self._begin(request, _ConnectTimeouts(request.call.timeouts))
        try:
            if scheme == "https" and context is None:
                context = _default_ssl_context(*map(os.environ.get, _CA_VARIABLES))
            hop, hop_scheme = (proxy.address, "http") if proxy else (host, scheme)
            self._connect(hop, _DEFAULT_PORTS[hop_scheme])
            if scheme == "https" and proxy:
                self._open_tunnel(host, proxy)
            if scheme == "https" and context:
                self._start_tls(host, context)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            if _permanent_hint(error):
                _default_ssl_context.cache_clear()  # the CA file may not have been readable then
            raise self._failure("cannot connect", error, _connect_hint(error, route))

    def _begin(self, request: _Request, timeouts: _Timeouts) -> None:
        """Serve a request from now on, unless its call was aborted meanwhile."""
        self.timeouts = timeouts
        self.secrets = request.secrets
        self._claim = threading.Lock()  # of this use; whoever acquires it decides how it ends
        request.call.shut_down = functools.partial(self.shut_down, self._claim)
        if request.call.was_aborted:
            self.shut_down(self._claim)

    def _connect(self, hop: str, default_port: int) -> None:
        """Connect to the first address that accepts; each gets a share of the time that is left."""
        next_hop = urlsplit(f"//{hop}")
        port = next_hop.port or default_port
        addresses = [*socket.getaddrinfo(str(next_hop.hostname), port, type=socket.SOCK_STREAM)]
        while addresses:
            family, kind, protocol, _, address = addresses.pop(0)
            try:
                self._sock = socket.socket(family, kind, protocol)
                seconds = self.timeouts.for_socket()
                share = min(seconds / (len(addresses) + 1), _MAX_ADDRESS_SECONDS)
                self._sock.settimeout(share if addresses else seconds)
                self._sock.connect(address)
                _set_socket_options(self._sock)
                return
            except OSError as error:
                self.close()
                if not addresses or self._is_foreign(error):
                    raise
        raise OSError("the name has no address")

    def _start_tls(self, host: str, context: ssl.SSLContext) -> None:
        # A trailing dot is for DNS, and not part of a name in TLS (RFC 6066, 3).
        name = str(urlsplit(f"//{host}").hostname).rstrip(".")
        self._sock.settimeout(self.timeouts.for_socket())
        self._sock = context.wrap_socket(
            self._sock, server_hostname=name, do_handshake_on_connect=False
        )
        self._sock.do_handshake()

    def _open_tunnel(self, host: str, proxy: _Proxy) -> None:
        """Have the proxy connect to the server (RFC 9110, 9.3.6), or raise its refusal."""
        target = host if urlsplit(f"//{host}").port else f"{host}:443"
        response = self._exchange(
            memoryview(_encode_head(f"CONNECT {target}", {"Host": target, **proxy.headers})),
            is_tunnel=True,
        )
        if not 200 <= response.status < 300:
            raise _status_error(response, f"the proxy {proxy.address}", f"; check {proxy.source}")

    def exchange(self, request: _Request) -> _Response:
        """Send a request, and return the response when its head has arrived."""
        self._begin(request, request.call.timeouts)
        request.call.was_sent = True
        return self._exchange(memoryview(request.encode()))  # its repr() shows no token

    def _exchange(self, message: memoryview, is_tunnel: bool = False) -> _Response:
        self.has_received = False
        try:
            self._send(message)
            return _Response(self, is_tunnel)
        except BaseException:
            self.close()
            raise

    def _send(self, message: memoryview) -> None:
        try:
            # A server may respond early, and close: with 413, say. That response is read.
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while message:  # each part that is accepted restarts the timeout
                    message = message[self._ready_socket().send(message[:_SEND_SIZE]) :]
        except OSError as error:
            raise self._failure("the request could not be sent", error, verb="accepted")

    def receive(self, may_end: bool = False) -> bytes:
        """Return the bytes that arrive next; b"" only where the connection may end."""
        try:
            data: bytes = self._ready_socket().recv(_RECEIVE_SIZE)
            if not data and not may_end:
                raise ConnectionResetError("the server closed the connection")
        except OSError as error:
            what = "the response was cut short" if self.has_received else "no response"
            raise self._failure(what, error)
        self.has_received = True
        return data

    def _ready_socket(self) -> Any:
        """Return the socket, which waits no longer than the timeouts allow now."""
        self._sock.settimeout(self.timeouts.for_socket())
        return self._sock

    def _failure(
        self, what: str, error: OSError, hint: str = "", verb: str = "received"
    ) -> Exception:
        """Return the error to raise for a socket's; a signal handler's is returned as it is."""
        if self._is_foreign(error):
            return error
        if isinstance(error, (socket.timeout, TimeoutError)) and error.errno is None:
            return APITimeoutError(f"{what}{self.via}{self.timeouts.message(verb)}{hint}")
        failure = APIConnectionError(f"{what}{self.via}: {_reason(error)}{hint}")
        failure.__cause__ = error
        return failure

    def _is_foreign(self, error: OSError) -> bool:
        """Tell whether a signal handler raised it: no limit was spent, and the text is no socket's.

        ETIMEDOUT, which has an errno, is the network's.
        """
        is_ours = str(error).endswith("timed out") or self.timeouts.remaining() <= 0
        return isinstance(error, TimeoutError) and error.errno is None and not is_ours

    def is_alive(self) -> bool:
        """Tell whether an idle connection is open and quiet; data on it could be no response."""
        try:
            self._sock.settimeout(0)
            self._sock.recv(1)
        except OSError as error:  # "would block": no data, or only session tickets of TLS
            return isinstance(error, (BlockingIOError, ssl.SSLWantReadError))
        return False

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def claim(self) -> bool:
        """Tell whether the caller may decide what becomes of the connection."""
        return self._claim.acquire(blocking=False)

    def shut_down(self, claim: threading.Lock) -> None:
        """Wake up the thread that waits for the socket; that thread closes it."""
        # SSLSocket.shutdown() drops TLS, and later data would go in clear text. In a forked child
        # it would end the parent's stream.
        is_ours = claim.acquire(blocking=False) and self._owner == os.getpid()
        if is_ours and self._sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)


def _set_socket_options(sock: socket.socket) -> None:
    """Send at once, notice a slow line, and survive the idle limit of NATs."""
    options = [
        ("IPPROTO_TCP", "TCP_NODELAY", 1),
        ("IPPROTO_TCP", "TCP_NOTSENT_LOWAT", _SEND_SIZE),  # a large buffer would hide a stall
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
        ("IPPROTO_TCP", "TCP_KEEPIDLE", _TCP_KEEPALIVE_SECONDS),  # Linux
        ("IPPROTO_TCP", "TCP_KEEPALIVE", _TCP_KEEPALIVE_SECONDS),  # macOS
        ("IPPROTO_TCP", "TCP_KEEPINTVL", _TCP_KEEPALIVE_SECONDS),
    ]
    for level, name, value in options:
        with contextlib.suppress(OSError, AttributeError):  # a platform may lack it
            sock.setsockopt(getattr(socket, level), getattr(socket, name), value)


@functools.lru_cache(maxsize=1)
def _default_ssl_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """Return a context with the system's CAs; cached, since reading them takes 20 ms."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


# RFC 9112: 4, 5 and 7.1
_STATUS_LINE = re.compile(rb"HTTP/1\.(\d) ([1-9]\d\d)(?: ([^\0\r]*))?")
_FIELD_LINE = re.compile(rb"([\w!#$%&'*+.^`|~-]+):([^\0\r]*)")
_CHUNK_HEADER = re.compile(rb"\r?\n([\da-fA-F]{1,99})[ \t]*(?:;[^\0\r\n]*)?\r?\n")


class _Response:
    """One response, read after RFC 9112 (sections in parentheses): its head, then its body."""

    def __init__(self, connection: _Connection, is_tunnel: bool = False) -> None:
        self.connection = connection
        self.secrets = connection.secrets  # the connection's next call has others
        self.is_complete = self._is_closed = False
        self._buffer, self._position = b"", 0  # received bytes; those before _position are consumed
        self._max_bytes = _MAX_HEAD_BYTES  # of the lines to come
        self._read_head()
        while self.status < 200 and self.status != 101:  # an interim response (RFC 9110, 15.2)
            self._read_head()
        self._frame_body(is_tunnel)

    def _read_head(self) -> None:
        """Read a status line (4) and the header fields."""
        protocol = b"HTTP/1."
        while not self._unread().startswith(protocol):
            if not protocol.startswith(self._unread()):  # refuse at once: a line end may never come
                raise self._malformed("something other than HTTP/1.x", self._unread())
            self._receive()
        match = self._match(_STATUS_LINE, self._read_line(), "a malformed status line")
        self._version, self.status = match[1], int(match[2])
        self.reason = (match[3] or b"").decode("latin-1")
        self.headers = self._read_fields()

    def _read_fields(self) -> dict[str, str]:
        """Read the header fields of a head, or the trailers, up to the blank line (5)."""
        fields: dict[str, str] = {}
        name = ""
        for _ in range(_MAX_HEADERS + 1):
            line = self._read_line()
            if not line:
                return fields
            if name and line[:1] in (b" ", b"\t"):  # a folded line (5.2)
                more = self._match(rb"[^\0\r]*", line, "a malformed header")[0].decode("latin-1")
                fields[name] = f"{fields[name]} {more.strip()}".strip()
                continue
            match = self._match(_FIELD_LINE, line, "a malformed header")
            name = match[1].decode().lower()
            value = match[2].strip(b" \t").decode("latin-1")
            fields[name] = f"{fields[name]}, {value}" if name in fields else value  # RFC 9110, 5.3
        raise self._malformed(f"over {_MAX_HEADERS} headers", line)

    def _read_line(self) -> bytes:
        """Return the next line without its end, which is CRLF or a bare LF (2.2)."""
        while b"\n" not in self._unread() and len(self._unread()) <= self._max_bytes:
            self._receive()
        end = self._buffer.find(b"\n", self._position)
        line = self._buffer[self._position : end if end >= 0 else None]
        self._max_bytes -= len(line) + 1
        if self._max_bytes < 0:
            raise self._malformed(f"over {_MAX_HEAD_BYTES} bytes of headers", line)
        self._position = end + 1
        return line[:-1] if line.endswith(b"\r") else line

    def _receive(self, may_end: bool = False) -> None:
        """Append the bytes that arrive next to those that were not read."""
        self._buffer = self._unread() + self.connection.receive(may_end)
        self._position = 0

    def _unread(self) -> bytes:
        return self._buffer[self._position :]

    def _frame_body(self, is_tunnel: bool) -> None:
        """Find out where the body ends (6.3), and whether the connection persists (9.3)."""
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        options = [name.strip() for name in self.headers.get("connection", "").lower().split(",")]
        has_body = self.status not in (101, 204, 304) and not (is_tunnel and self.status < 300)
        self._is_chunked = has_body and coding is not None
        self._is_close_delimited = has_body and coding is None and length is None
        self._remaining = sys.maxsize if self._is_close_delimited else 0  # of the body or the chunk
        if self._is_chunked:
            value = str(coding).encode("latin-1")
            self._match(rb"(?i)chunked", value, "an unknown transfer-encoding")
            self._buffer, self._position = b"\r\n" + self._unread(), 0  # as after a chunk
        elif has_body and length is not None:
            same = rb"(\d{1,99})(?:[ \t]*,[ \t]*\1)*"  # "60, 60" is 60
            match = self._match(same, length.encode("latin-1"), "an invalid length")
            self._remaining = int(match[1])
        self._is_persistent = (
            "close" not in options
            and (self._version != b"0" or "keep-alive" in options)
            and not (is_tunnel or self.status == 101 or self._is_close_delimited)
            and not (coding is not None and (length is not None or self._version == b"0"))
        )

    def read(self) -> bytes:
        """Return the bytes of the body that arrive next, b"" at its end."""
        if self._is_chunked and not self._remaining and not self.is_complete:
            self._remaining = self._read_chunk_header()
        if self._remaining and self._position == len(self._buffer):
            self._receive(may_end=self._is_close_delimited)
        data = self._buffer[self._position : self._position + self._remaining]
        self._position += len(data)
        self._remaining -= len(data)
        self.is_complete = not data
        return data

    def _read_chunk_header(self) -> int:
        """Read the line end after a chunk and the size of the next (7.1), or the trailers."""
        while not (match := _CHUNK_HEADER.match(self._buffer, self._position)):
            # The line end before the size has 2 bytes at most; a later one ends a wrong line.
            if len(self._unread()) > _MAX_HEAD_BYTES or b"\n" in self._unread()[2:]:
                raise self._malformed("a malformed chunk", self._unread().lstrip())
            self._receive()
        self._position = match.end()
        size = int(match[1], 16)
        if size == 0:
            self._max_bytes = _MAX_HEAD_BYTES
            self._read_fields()
        return size

    def _match(
        self, pattern: bytes | re.Pattern[bytes], line: bytes, what: str
    ) -> re.Match[bytes]:
        match = re.fullmatch(pattern, line)
        if match is None:
            raise self._malformed(what, line)
        return match

    def _malformed(self, what: str, line: bytes) -> APIResponseError:
        self._is_persistent = False
        quoted = self.secrets.redact(line.partition(b"\n")[0].decode("latin-1"), is_cut=True)
        text = f"the server{self.connection.via} sent {what}: {_one_line(repr(quoted))}"
        return APIResponseError(text, quoted[:_MAX_ERROR_BODY_BYTES])

    def drain(self) -> None:
        """Receive the rest at once, so that the connection can be kept; give up after 10 ms."""
        self.connection.timeouts = _Timeouts(_MAX_DRAIN_SECONDS, _MAX_DRAIN_SECONDS)
        with contextlib.suppress(FriendliError):
            while self.read():
                pass

    def close(self) -> None:
        """Leave the connection to the pool if it is idle now; else close it."""
        if self._is_closed:
            return
        self._is_closed = True
        is_idle = self.is_complete and self._is_persistent and not self._unread()
        if self.connection.claim() and is_idle:
            _pool.release(self.connection)
        else:
            self.connection.close()


class _ConnectionPool:
    """Idle connections. It needs no lock: whoever removes a connection owns it."""

    def __init__(self, *clocks: Callable[[], float]) -> None:
        self._clocks = clocks  # one may stop while a machine sleeps or a Lambda is frozen
        self._idle: dict[_Connection, bool] = {}  # a set, in the order of use

    def acquire(self, route: _Route) -> _Connection | None:
        """Return the connection of this route that was used last, if one is alive."""
        for connection in reversed(list(self._idle)):
            if connection.route == route and self._idle.pop(connection, False):
                if not self._has_expired(connection) and connection.is_alive():
                    return connection
                connection.close()
        return None

    def release(self, connection: _Connection) -> None:
        """Keep a connection for later calls, and close those that are too many or too old."""
        connection.idle_since = tuple(clock() for clock in self._clocks)
        self._idle[connection] = True
        surplus = len(self._idle) - _MAX_IDLE_CONNECTIONS
        for position, idle in enumerate(list(self._idle)):
            if (position < surplus or self._has_expired(idle)) and self._idle.pop(idle, False):
                idle.close()

    def close(self) -> None:
        """Close all; after a fork, those of the parent stay open there."""
        for connection in list(self._idle):
            if self._idle.pop(connection, False):
                connection.close()

    def _has_expired(self, connection: _Connection) -> bool:
        seconds = (clock() - since for clock, since in zip(self._clocks, connection.idle_since))
        return max(seconds) > _KEEPALIVE_EXPIRY_SECONDS


_pool = _ConnectionPool(time.monotonic, time.time)
atexit.register(_pool.close)  # else Python warns of unclosed sockets at exit
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows does not fork
    os.register_at_fork(after_in_child=_pool.close)


# Error texts


def _status_error(response: _Response, who: str, hint: str = "") -> APIStatusError:
    """Return the error for a response with a status other than 200, whose body is read for it."""
    redact = response.secrets.redact
    headers = {redact(name): redact(value) for name, value in response.headers.items()}
    body = _excerpt(response, _read_page(response), is_page=True)
    message = _one_line(redact(_error_message(body)))  # again: unescaping may have restored one
    status = f"{who} responded with {response.status} {_one_line(redact(response.reason))}".rstrip()
    text = f"{status}: {message}" if message else status
    if "retry-after" in headers:
        text += f" (Retry-After: {_one_line(headers['retry-after'])})"
    text += hint or _status_hint(response.status, headers, response.secrets.has_token)
    return APIStatusError(text, response.status, headers, body, message)


_STATUS_HINTS = {
    401: "; check the token argument or $FRIENDLI_TOKEN",
    403: "; check the token argument or $FRIENDLI_TOKEN",
    404: "; check model and server_url",
    407: "; check the user and password of the proxy",
    429: "; send fewer requests at a time, or pass a larger retries=",
}


def _status_hint(status: int, headers: Mapping[str, str], has_token: bool) -> str:
    if status in (401, 403) and not has_token:
        return "; no token was sent; set FRIENDLI_TOKEN or pass token="
    if 300 <= status < 400 and "location" in headers:
        target = _one_line(headers["location"])
        return f"; redirects are not followed: check server_url, the redirect leads to {target}"
    return _STATUS_HINTS.get(status, "")


def _response_error(
    response: _Response, what: str, data: bytes | bytearray, is_page: bool = False
) -> APIResponseError:
    """Return the error for a status of 200 whose body is not what was asked for."""
    body = _excerpt(response, data, is_page)
    text = f"{what}: {_error_message(body).strip() or body.strip() or '(empty)'}"
    return APIResponseError(_one_line(response.secrets.redact(text)), body)


def _read_page(response: _Response) -> bytearray:
    """Return the start of a body, or what came before it broke."""
    page = bytearray()
    with contextlib.closing(response):
        with contextlib.suppress(FriendliError):
            while len(page) <= _MAX_ERROR_BODY_BYTES and (data := response.read()):
                page += data
        response.drain()
    return page


def _excerpt(response: _Response, body: bytes | bytearray, is_page: bool) -> str:
    """Return the first 64 KiB of a body as text, without credentials or parts of them."""
    is_long = len(body) > _MAX_ERROR_BODY_BYTES
    if is_page and _compression(response):  # which nobody asked for, and nobody could read
        size = f"over {_MAX_ERROR_BODY_BYTES}" if is_long else len(body)
        return f"a body in {_compression(response)} of {size} bytes"
    start = body[:_MAX_ERROR_BODY_BYTES]
    text = _decode_page(start, response.headers) if is_page else start.decode("utf-8", "replace")
    is_cut = is_long or (is_page and not response.is_complete)
    return response.secrets.redact(text, is_cut)


_COMPRESSIONS = ("br", "compress", "deflate", "gzip", "zstd")


def _compression(response: _Response) -> str:
    codings = re.findall(r"\w+", response.headers.get("content-encoding", "").lower())
    return ", ".join(name for name in codings if name in _COMPRESSIONS)


def _decode_page(page: bytes | bytearray, headers: Mapping[str, str]) -> str:
    """Decode a page by its BOM or null bytes, or else by the charset of its Content-Type."""
    charset: str = json.detect_encoding(page)
    pattern = r"(?i)charset\s*=\s*[\"']?(?!punycode|[\w-]*escape)([\w.:-]+)"  # not for pages
    match = re.search(pattern, headers.get("content-type", ""))
    charset = match[1] if match and charset == "utf-8" else charset  # which stands for neither
    try:
        return page.decode(charset, "replace")
    except Exception:  # an unknown charset, or a codec that raises something else
        return page.decode("utf-8", "replace")


# Keys, in lower case, of messages; and of codes, which are shown if there is no message
_MESSAGE_KEYS = (
    "title", "error", "errors", "fault", "detail", "details", "message", "msg", "reason",
    "description", "errormessage", "error_message", "error_description", "faultstring",
)
_CODE_KEYS = ("error", "errors", "fault", "code", "type")
# Comments, scripts, styles, tags, and numeric references too long for html.unescape()
_MARKUP = (  # compiled only where there is a page
    r"(?is)<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)|</?[a-z!?][^<>]*>|&#\w{9,};?"
)


def _error_message(body: str) -> str:
    """Return what a server says is wrong, found in JSON of any shape, HTML or plain text."""
    try:
        payload = json.loads(body)
        message = _find_message(payload, _MESSAGE_KEYS) or _find_message(payload, _CODE_KEYS)
        return message or (body if payload else "")
    except (ValueError, RecursionError):
        import html  # needed only here

        return html.unescape(re.sub(_MARKUP, " ", body))


def _find_message(payload: Any, keys: Sequence[str]) -> str:
    """Return the texts in an error's payload that stand under these keys, nested or not."""
    if isinstance(payload, list):
        return "; ".join(filter(None, (_find_message(item, keys) for item in payload)))
    if not isinstance(payload, dict):
        return "" if payload is None or isinstance(payload, bool) else str(payload).strip()
    fields = {name.lower(): value for name, value in payload.items()}
    found = dict.fromkeys(_find_message(fields.get(key), keys) for key in keys)  # each text once
    message = ": ".join(filter(None, found))
    location = fields.get("loc")
    if message and isinstance(location, list):
        return f"{'.'.join(map(str, location))}: {message}"
    return message


def _one_line(text: str) -> str:
    """Return text that is fit for a message: short, printable, on one line."""
    # Blanks are joined, so more is looked at than is kept; all of a page would take too long.
    printable = (c if c.isprintable() else " " for c in text[: 8 * _MAX_QUOTED_CHARACTERS])
    line = " ".join("".join(printable).split())
    return line if len(line) <= _MAX_QUOTED_CHARACTERS else line[:_MAX_QUOTED_CHARACTERS] + "..."


def _reason(error: OSError) -> str:
    """Return what the operating system or OpenSSL says."""
    text = re.sub(r"\A\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return _one_line(f"TLS failed: {text}" if isinstance(error, ssl.SSLError) else text)


# Errors that no retry can fix: a pattern for the text, and a hint
_LOCAL_ERRNOS = "|".join(
    str(getattr(errno, name))
    for name in ("EACCES", "EISDIR", "EMFILE", "ENFILE", "ENOENT", "ENOMEM", "ENOTDIR", "EPERM")
)
_PERMANENT_ERRORS = (
    (r"mismatch|not valid for", "check the host in server_url"),
    (r"expired|not yet valid", "check this machine's clock, or have the certificate renewed"),
    (r"CERTIFICATE_VERIFY", "pass ssl_context, or name a file with its CA in SSL_CERT_FILE"),
    (r"WRONG_VERSION|HTTP_REQUEST|RECORD_LAYER", "the server does not speak TLS, try http://"),
    (rf"\A\[Errno ({_LOCAL_ERRNOS})\]", "this machine is at fault, not the server"),
)


def _permanent_hint(error: object) -> str:
    """Return the hint for an error that no retry can fix, "" for others."""
    text = "" if isinstance(error, socket.gaierror) else str(error)  # it has numbers of its own
    return next((hint for pattern, hint in _PERMANENT_ERRORS if re.search(pattern, text)), "")


def _connect_hint(error: OSError, route: _Route) -> str:
    *_, proxy, context = route
    is_refused = isinstance(error, ssl.SSLCertVerificationError) and context is None
    for name in (*_CA_VARIABLES, "SSLKEYLOGFILE"):
        path = os.environ.get(name)
        if path and (error.filename == path or (is_refused and not os.access(path, os.R_OK))):
            return f"; {name} names {path}, which cannot be opened"
    hint = f"check {proxy.source}" if proxy else "is the server up? check server_url"
    return f"; {_permanent_hint(error) or hint}"


# Reading the body


_LATE_FAILURE = "the server failed after status 200"


def _read_completion(response: _Response) -> Completion:
    _check_content_type(response, "application/json")
    body = bytearray()
    while data := response.read():
        body += data
        if len(body) > _MAX_COMPLETION_BYTES:
            raise APIResponseError(f"the response has over {_MAX_COMPLETION_BYTES} bytes")
    completion = _parse(response, body.lstrip(codecs.BOM_UTF8), _completion)
    completion.headers = response.headers
    return completion


def _read_chunks(response: _Response) -> Iterator[CompletionChunk]:
    _check_content_type(response, "text/event-stream")
    for event, data in _iter_events(iter(response.read, b"")):
        if event == "error":
            raise _response_error(response, _LATE_FAILURE, data)
        yield _parse(response, data, _chunk)
    response.drain()


def _check_content_type(response: _Response, expected: str) -> None:
    """Refuse a response that says that it is something else, as a login page does."""
    media_type = re.split("[;,]", response.headers.get("content-type", ""))[0].strip().lower()
    found = " in ".join(filter(None, (media_type or expected, _compression(response))))
    if found != expected:
        what = f"the response is {found}, not {expected}; check server_url"
        raise _response_error(response, what, _read_page(response), is_page=True)


# Server-sent events; the rules quoted are of "Interpreting an event stream" in
# https://html.spec.whatwg.org/multipage/server-sent-events.html


def _iter_events(chunks: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the event and the data of each server-sent event, up to [DONE].

    A field named "error" is taken as an event of that name (older llama.cpp).
    """
    event = ""
    data: list[bytes] = []
    size = 0
    for lines in _iter_lines(chunks):
        for line in lines:
            size += len(line) + 1
            if not line:
                # "If the data buffer is an empty string, ... return"; an error needs no data.
                if any(data) or event == "error":
                    yield event, b"\n".join(data)
                    size = 0
                event, data = "", []
                continue
            # "Collect the characters on the line before the first U+003A COLON character (:)"
            # "If value starts with a U+0020 SPACE character, remove it from value."
            name, _, value = line.partition(b":")
            if value[:1] == b" ":
                value = value[1:]
            if name == b"data":
                if not data and value.strip() == b"[DONE]" and event != "error":
                    return
                data.append(value)
            elif name == b"event":
                event = value.decode("utf-8", "replace")
            elif name == b"error":
                yield "error", value
            # "Otherwise: The field is ignored." So is a comment, whose name is empty.
        if size > _MAX_EVENT_BYTES:
            raise APIResponseError(f"the stream has over {_MAX_EVENT_BYTES} bytes without an event")
    raise APIConnectionError("the stream was cut short: it ended before [DONE]")


def _iter_lines(chunks: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines that each chunk completes, without their ends: LF, CRLF or CR."""
    unfinished = bytearray()
    after_cr = False
    at_start = True
    for chunk in chunks:
        if after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the LF of a CRLF that was split
        after_cr = chunk.endswith(b"\r")
        lines = chunk.splitlines()  # of bytes: at LF, CRLF and CR alone
        rest = lines.pop() if lines and not chunk.endswith((b"\n", b"\r")) else b""
        if lines and unfinished:
            lines[0] = bytes(unfinished) + lines[0]
            unfinished.clear()
        if lines and at_start:
            # "one leading U+FEFF BYTE ORDER MARK character is stripped"
            lines[0] = lines[0][3:] if lines[0].startswith(codecs.BOM_UTF8) else lines[0]
            at_start = False
        unfinished += rest
        if len(unfinished) > _MAX_EVENT_BYTES:
            raise APIResponseError(f"the stream has a line of over {_MAX_EVENT_BYTES} bytes")
        yield lines
    yield [bytes(unfinished)] if unfinished else []


# From JSON to dataclasses: a ValueError becomes an APIResponseError in _parse()


def _parse(
    response: _Response, data: bytes | bytearray, build: Callable[[dict[str, Any]], _T]
) -> _T:
    try:
        text = data.decode().strip()
        raw, end = _decode_json(text)
        if end != len(text) or not isinstance(raw, dict):
            raise ValueError("it is not one object")
        if raw.get("error") is None:
            return build(raw)
    except (ValueError, RecursionError) as error:
        raise _response_error(response, f"the response is no completion: {error}", data) from None
    raise _response_error(response, _LATE_FAILURE, data)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode_json = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


def _completion(raw: dict[str, Any]) -> Completion:
    choices = [
        CompletionChoice(
            index=choice.get("index"),
            text=text,
            seed=choice.get("seed"),
            finish_reason=reason,
            tokens=choice.get("tokens") or [],
            logprobs=logprobs,
        )
        for choice, text, reason, logprobs in _choices(raw, is_chunk=False)
    ]
    usage = None if raw.get("usage") is None else _from_json(Usage, raw["usage"])
    return Completion(raw.get("id"), raw.get("object"), choices, usage, raw.get("model"), raw)


def _chunk(raw: dict[str, Any]) -> CompletionChunk:
    choices = []  # a comprehension would take longer before Python 3.12
    for choice, text, reason, logprobs in _choices(raw, is_chunk=True):
        index, token = choice.get("index"), choice.get("token")
        choices.append(ChunkChoice(index, text, token, reason, logprobs))
    usage = None if raw.get("usage") is None else _from_json(Usage, raw["usage"])
    created = raw.get("created")
    return CompletionChunk(raw.get("id"), raw.get("object"), choices, created, usage, raw)


def _choices(
    raw: dict[str, Any], is_chunk: bool
) -> list[tuple[dict[str, Any], str, str | None, Logprobs | None]]:
    """Return each choice with its text, finish_reason and logprobs, once these are checked."""
    choices = raw.get("choices")
    if not isinstance(choices, list):
        raise ValueError("it has no list of choices")
    checked = []
    for choice in choices:
        if not isinstance(choice, dict):
            raise ValueError("a choice is no object")
        text, reason = choice.get("text"), choice.get("finish_reason")
        if reason in ("null", ""):  # some servers send these for null
            reason = None
        if text is None and ("message" in choice or "delta" in choice):
            raise ValueError("it has the shape of chat, another endpoint; check server_url")
        if text is None and is_chunk and (reason or raw.get("usage") is not None):
            text = ""  # at the end of a choice, or of the stream
        if not isinstance(text, str) or not (reason is None or isinstance(reason, str)):
            raise ValueError("a choice has no text, or a finish_reason that is no string")
        logprobs = choice.get("logprobs")
        parsed = None if logprobs is None else _from_json(Logprobs, logprobs)
        checked.append((choice, text, reason, parsed))
    return checked


def _from_json(kind: type[_T], value: Any) -> _T:
    """Build a dataclass from a JSON object; null and unknown fields are left out."""
    if not isinstance(value, dict):
        raise ValueError(f"{kind.__name__} is no object")
    known = kind.__annotations__
    return kind(**{k: item for k, item in value.items() if k in known and item is not None})


# The command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 1 (failed), 2 (wrong usage) or 130 (Ctrl-C), or return."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        _logger.setLevel(logging.DEBUG)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    try:
        _print_completion(options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    except BrokenPipeError:  # the reader has enough; what is buffered must not be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FriendliError, OSError) as error:
        sys.exit(f"friendli_lite: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    import argparse  # not needed by those who import this module

    parser = argparse.ArgumentParser(
        prog="friendli_lite",
        usage="%(prog)s [options] [PROMPT]",
        description="Complete PROMPT, or stdin. Reads FRIENDLI_SERVER_URL and FRIENDLI_TOKEN.",
        epilog="examples:\n"
        '  friendli_lite --max-tokens 16 "Say this is a test!"\n'
        "  friendli_lite --set 'stop=[\"\\n\"]' --json < prompt.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", default="-", help=argparse.SUPPRESS)
    options: dict[str, dict[str, Any]] = {
        "--model": {"help": "LoRA adapter, model code or endpoint ID"},
        "--max-tokens": {"type": int, "metavar": "N", "help": "maximum length of the output"},
        "--temperature": {"type": float, "metavar": "T", "help": "randomness of the sampling"},
        "--set": {"action": "append", "default": [], "metavar": "NAME=JSON", "help": "other field"},
        "--server-url": {"metavar": "URL", "help": f"default: {_DEFAULT_SERVER_URL}"},
        "--timeout": {"type": float, "default": 600.0, "metavar": "S", "help": "seconds for data"},
        "--total-timeout": {"type": float, "metavar": "S", "help": "seconds for everything"},
        "--retries": {"type": int, "metavar": "N", "help": "retries after a failure (default: 3)"},
        "--no-stream": {"action": "store_true", "help": "print the text at once, not as it comes"},
        "--json": {"action": "store_true", "help": "print the raw object, one a line for a stream"},
        "--verbose": {"action": "store_true", "help": "report requests and retries on stderr"},
        "--version": {"action": "version", "version": f"friendli_lite {__version__}"},
    }
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    return parser


def _print_completion(options: argparse.Namespace) -> None:
    keywords = {
        name: getattr(options, name)
        for name in ("server_url", "timeout", "total_timeout", "retries")
    }
    body = _body_fields(options)
    answers = [complete(body, **keywords)] if options.no_stream else stream(body, **keywords)
    end = "\n" if options.json else ""
    try:
        for answer in answers:
            print(json.dumps(answer.raw) if options.json else answer.text, end=end, flush=True)
    finally:
        if not options.json:
            print(flush=True)  # also after text that is cut short


def _body_fields(options: argparse.Namespace) -> dict[str, Any]:
    body = {name: getattr(options, name) for name in ("model", "max_tokens", "temperature")}
    body.update(map(_parse_setting, options.set))
    if options.prompt != "-":
        body["prompt"] = options.prompt
    elif "prompt" not in body and "tokens" not in body:
        body["prompt"] = _read_stdin()
    prompts, n = body.get("prompt"), body.get("n")
    has_several = isinstance(prompts, list) and len(prompts) > 1
    if not options.json and (has_several or (isinstance(n, int) and n > 1)):
        raise ValueError("several choices need --json, because they arrive interleaved")
    return body


def _parse_setting(setting: str) -> tuple[str, Any]:
    """Return the name and the value of a --set option."""
    name, _, value = setting.partition("=")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        is_list = CompletionRequest.__annotations__.get(name, "").startswith("Sequence[str]")
        example = f"{name}={json.dumps([value] if is_list else value)}"
        was_meant_as_json = value[:1] in ("", "[", "{", '"')
        hint = "" if was_meant_as_json else f"; a text needs quotes: --set '{example}'"
        raise ValueError(f"--set takes NAME=JSON, not {setting!r}{hint}") from None


def _read_stdin() -> str:
    """Return stdin, as UTF-8 whatever the locale, without its BOM and one final line end."""
    if sys.stdin is None:  # it is closed
        return ""
    buffer = getattr(sys.stdin, "buffer", None)
    text = buffer.read().decode("utf-8-sig") if buffer else sys.stdin.read()
    return re.sub(r"\r?\n\Z", "", text)


if __name__ == "__main__":
    main()
