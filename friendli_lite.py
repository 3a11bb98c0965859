# Copyright (c) 2026 The friendli_lite authors
# SPDX-License-Identifier: MIT (https://opensource.org/license/mit)
"""Text completions of a Friendli Container, in one file that needs nothing installed.

    import friendli_lite

    print(friendli_lite.complete("Say this is a test!", max_tokens=16).text)
    with friendli_lite.stream("Say this is a test!", max_tokens=16) as chunks:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)

$FRIENDLI_SERVER_URL (default: http://localhost:8000) and $FRIENDLI_TOKEN are obeyed; `RetryConfig` says what
is tried again. A call that fails, also by an answer that is cut short, raises a `FriendliError`.
Left out on purpose: all other endpoints (chat, too), an async API, HTTP/2, a client object.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import email.utils
import functools
import http.client
import io
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
from urllib.parse import urlsplit

TYPE_CHECKING = False  # true for type checkers; spares the others the import of typing
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, TypeVar

    _T = TypeVar("_T")
    _ChunkGenerator = Generator["CompletionChunk", None, None]
    # The way to a server: scheme, host, proxy, credentials for a tunnel through it, context for TLS
    _Route = tuple[str, str, str | None, str | None, ssl.SSLContext | None]
else:
    _ChunkGenerator = Generator  # Python 3.8 cannot subscript it

__all__ = ["CompletionRequest", "CompletionStream", "RetryConfig", "complete", "stream"]
__all__ += ["ChunkChoice", "Completion", "CompletionChoice", "CompletionChunk", "Logprobs", "Usage"]
__all__ += ["APIConnectionError", "APIResponseError", "APIStatusError", "APITimeoutError", "FriendliError"]
__version__ = "0.1.0"

_DEFAULT_SERVER_URL = "http://localhost:8000"
_MAX_CONNECT_SECONDS = 10.0  # a server that takes longer is down
_MAX_WAIT_SECONDS = 1e6  # "no limit": about the longest that a socket can be told
_MAX_IDLE_SECONDS = 4.0  # servers close at 5 s (uvicorn, Node.js) and more
_MAX_IDLE_CONNECTIONS = 64  # one for each thread of a large pool
_MAX_STALE_SECONDS = 1.0  # a connection that breaks later was most likely served
_MAX_DRAIN_SECONDS = 0.01  # for the bytes behind [DONE]: less than a TLS handshake
_KEEP_ALIVE_SECONDS = 60  # below the idle limits of NATs (350 s on AWS)
_PIECE_BYTES = 64 * 1024  # sent or received at once
_MAX_EVENT_BYTES = 16 * 1024**2  # of a line, or without an event, which has about 200
_MAX_COMPLETION_BYTES = 128 * 1024**2
_MAX_PAGE_BYTES = 64 * 1024  # of an error page
_MAX_FRAMING_BYTES = 1024**2  # of headers, 1xx answers and trailers in a row
_MAX_QUOTED_CHARACTERS = 500  # of a server's words in a message

_logger = logging.getLogger("friendli_lite")
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode  # in ASCII: fit for lone surrogates


# --- Errors ---
class FriendliError(Exception):
    """The base of all errors of a call, after `attempts` requests; its text says what to do next."""

    attempts: int = 0

    def __init__(self, text: str, **details: Any) -> None:
        super().__init__(text)
        vars(self).update(details)


class APIStatusError(FriendliError):
    """The server, or a proxy, answered with another status than 200.

    `headers` have names in lower case, `body` has up to 64 KiB, `message` is the server's own words.
    """

    status_code: int
    headers: dict[str, str]
    body: str
    message: str


class APIConnectionError(FriendliError):
    """There was no connection, or it broke; also a stream that ended before its [DONE]."""


class APITimeoutError(APIConnectionError):
    """The server was silent for `timeout` seconds, or `total_timeout` seconds were spent."""


class APIResponseError(FriendliError):
    """The status was 200, but `body`, up to 64 KiB, is no completion, or an error in mid-stream."""

    body: str = ""


# --- What is asked ---
@dataclass
class CompletionRequest:
    """The body of a request; None is not sent. Source: the API reference of Friendli Suite.

    Exactly one of `prompt` and `tokens` is needed.
    """

    prompt: str | Sequence[str] | None = None  # the text to complete, or several
    tokens: Sequence[int] | None = None  # the same as token IDs
    model: str | None = None  # LoRA adapter of a container; model or endpoint ID of a hosted product
    bad_word_tokens: Sequence[Mapping[str, Sequence[int]]] | None = None  # never generated; as `stop_tokens`
    bad_words: Sequence[str] | None = None  # texts never to generate
    embedding_to_replace: Sequence[float] | None = None  # for `token_index_to_replace`, flattened
    encoder_no_repeat_ngram: int | None = None  # length of n-grams of the input not to repeat
    encoder_repetition_penalty: float | None = None  # for tokens of the input; 1.0 is none
    eos_token: Sequence[int] | None = None  # IDs of tokens that end the generation
    forced_output_tokens: Sequence[int] | None = None  # IDs of the tokens to generate
    frequency_penalty: float | None = None  # for each appearance of a token; above 0 repeats less
    logprobs: int | None = None  # how many of the likeliest tokens to report at each step
    max_tokens: int | None = None  # most tokens to generate
    max_total_tokens: int | None = None  # most tokens of input and output; not with `max_tokens`
    min_p: float | None = None  # least probability of a token, relative to the likeliest
    min_tokens: int | None = None  # fewest tokens to generate; not with `response_format`
    min_total_tokens: int | None = None  # fewest tokens of input and output
    n: int | None = None  # choices to generate for each prompt
    no_repeat_ngram: int | None = None  # length of n-grams of the output not to repeat
    presence_penalty: float | None = None  # for tokens that have appeared; above 0 repeats less
    repetition_penalty: float | None = None  # for tokens that have appeared; 1.0 is none
    response_format: Mapping[str, Any] | None = None  # type: text, json_object, json_schema or regex
    seed: int | Sequence[int] | None = None  # of the sampling; a list has one for each of `n`
    stop: Sequence[str] | None = None  # texts that end the generation
    stop_tokens: Sequence[Mapping[str, Sequence[int]]] | None = None  # [{"tokens": [ID, ...]}] that end it
    stream: bool | None = None  # set by `stream()`; what contradicts the call is refused
    stream_options: Mapping[str, bool] | None = None  # {"include_usage": True}: a last chunk has `usage`
    temperature: float | None = None  # of the sampling; 0 takes the likeliest token
    token_index_to_replace: Sequence[int] | None = None  # positions of tokens that embeddings replace
    top_k: int | None = None  # sample from the k likeliest tokens
    top_p: float | None = None  # sample from the likeliest tokens of this total probability
    xtc_probability: float | None = None  # how often the likeliest are left out (exclude top choices)
    xtc_threshold: float | None = None  # probability above which a token is left out then
    extra_body: Mapping[str, Any] | None = None  # fields that this version does not know, sent as they are


@dataclass(frozen=True)
class RetryConfig:
    """What is tried again, how often, and after which waits, in seconds.

    The wait before retry k (0, 1, ...) is uniform in [0, min(max_delay, initial_delay * multiplier**k)]:
    by default up to 0.5, 1 and 2 s ("Exponential Backoff And Jitter", AWS Architecture Blog: full jitter).
    A server's `retry-after-ms` or `Retry-After` replaces it. One above `max_retry_after` ends the retries,
    as does a wait beyond `total_timeout`. Never tried again are a stream after its first event, a refused
    certificate and, unless `retry_timeouts`, a timeout: the server may generate on, and bill twice.
    """

    max_retries: int = 3
    initial_delay: float = 0.5
    max_delay: float = 8.0
    multiplier: float = 2.0
    max_retry_after: float = 60.0
    status_codes: Sequence[int] = (429, 500, 502, 503, 504)
    retry_connection_errors: bool = True
    retry_timeouts: bool = False

    def __post_init__(self) -> None:
        _check_type("max_retries", self.max_retries, int)
        for name in ("max_retries", "initial_delay", "max_delay", "multiplier", "max_retry_after"):
            value = getattr(self, name)
            _check_type(name, value, int, float)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {value}")
        _check_type("status_codes", self.status_codes, tuple, list, set, frozenset, range)
        for code in self.status_codes:
            _check_type("each of status_codes", code, int)


# --- What is answered: fields that the server left out are None, or an empty list ---
@dataclass
class Usage:
    """How many tokens the call took; `prompt_tokens_details` may hold `cached_tokens`."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: dict[str, Any] | None = None


@dataclass
class Logprobs:
    """Natural logarithms of probabilities, an entry for each token in each list."""

    text_offset: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)


@dataclass
class CompletionChoice:
    """One generated text; `finish_reason` is "stop", "length", or what else a server says."""

    index: int | None = None
    text: str = ""
    seed: int | None = None
    finish_reason: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None


class _Answer:
    choices: Sequence[CompletionChoice | ChunkChoice]

    @property
    def text(self) -> str:
        """The text of the first choice, "" if there is none."""
        return self.choices[0].text if self.choices else ""


@dataclass
class Completion(_Answer):
    """A whole answer; `raw` is the decoded object, with what has no field here."""

    id: str | None = None
    object: str | None = None
    choices: list[CompletionChoice] = field(default_factory=list)
    usage: Usage | None = None
    model: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class ChunkChoice:
    """The next piece of a choice; `finish_reason` is None before its end."""

    index: int | None = None
    text: str = ""
    token: int | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


@dataclass
class CompletionChunk(_Answer):
    """One event of a stream; `created` is Unix time in seconds, `raw` the decoded object.

    Chunks of several choices come interleaved; see `choices[0].index`. One with `usage` has no choices.
    """

    id: str | None = None
    object: str | None = None
    choices: list[ChunkChoice] = field(default_factory=list)
    created: int | None = None
    usage: Usage | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


# --- The two calls ---
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
    **fields: Any,
) -> Completion:
    """Ask for a completion, and return it when it is whole.

    Args:
        request: a prompt, a mapping of body fields, or a `CompletionRequest`.
        server_url: default $FRIENDLI_SERVER_URL, then http://localhost:8000.
        token: default $FRIENDLI_TOKEN; "" sends none.
        retries: a `RetryConfig`, or a number of retries.
        timeout: seconds of silence borne from the server; None for no limit. Connecting may take 10 s
            at most, but only the operating system bounds the look-up of the name.
        total_timeout: seconds for the whole call with its retries and waits; None for no limit.
        headers: added to, and winning over, the client's own.
        ssl_context: for a private CA or a client certificate; default: the system's CAs.
        **fields: of the body; they win over `request`, which can thus be a template.

    Raises:
        FriendliError: the call failed; its subclass says how.
        TypeError, ValueError: a mistake in the arguments; nothing was sent.
    """
    limits = _Limits(timeout, total_timeout)
    body = _build_body(request, fields, stream=False)
    headers = _build_headers("application/json", token, headers)
    call = _Call(_completions_url(server_url), headers, body, _retry_config(retries), limits, ssl_context)
    *_, completion = call.run(_read_completion)
    return completion


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
    **fields: Any,
) -> CompletionStream:
    """Ask for a completion, and return its chunks as they come: a generator, for a `with` block.

    Arguments and errors are those of `complete()`; `total_timeout` covers the stream to its end. A request
    that is refused raises here, a stream that is cut before [DONE] raises APIConnectionError in the loop.
    """
    limits = _Limits(timeout, total_timeout)
    body = _build_body(request, fields, stream=True)
    headers = _build_headers("text/event-stream", token, headers)
    call = _Call(_completions_url(server_url), headers, body, _retry_config(retries), limits, ssl_context)
    return CompletionStream(call)


class CompletionStream(_ChunkGenerator):
    """The chunks of an answer: a generator of `CompletionChunk`, and a context manager.

    Its end, an error, the end of the `with` block, `close()` and garbage collection let the connection go.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._chunks = call.run(_read_chunks)
        next(self._chunks)  # sends the request

    def __next__(self) -> CompletionChunk:
        return next(self._chunks)

    def send(self, value: None) -> CompletionChunk:
        """Return the next chunk."""
        return self._chunks.send(value)

    def throw(self, *error: Any) -> CompletionChunk:
        """Raise an error in the generator, which ends it."""
        self.close()
        return super().throw(*error)

    def close(self) -> None:
        """Let the connection go, also while another thread waits for a chunk."""
        try:
            self._chunks.close()
        except ValueError:  # it is running, in another thread
            self._call.abort()

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --- Building the request ---
def _check_type(name: str, value: object, *kinds: type) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def _build_body(request: object, fields: dict[str, Any], stream: bool) -> bytes:
    body = _merge(request, fields)
    if ("prompt" in body) == ("tokens" in body):
        found = "both were" if "tokens" in body else "neither was"
        raise ValueError(f"exactly one of prompt and tokens is needed; {found} given")
    if body.get("stream", stream) != stream:
        raise ValueError(f"stream={body['stream']} is for {'complete' if stream else 'stream'}()")
    if stream:
        body["stream"] = True
    extra = body.pop("extra_body", {})
    _check_type("extra_body", extra, Mapping)
    for name in extra:
        if name in CompletionRequest.__annotations__:
            raise ValueError(f"extra_body holds {name!r}, which is a field of its own")
    members = []
    for name, value in {**body, **extra}.items():
        try:
            members.append(_encode({name: value})[1:-1])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name!r} cannot be sent as JSON: {error}") from None
    return ("{" + ",".join(members) + "}").encode("ascii")


def _merge(request: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a body that are not None, each of which is known."""
    if isinstance(request, str):
        if "prompt" in fields:
            raise TypeError("the prompt was given twice, as request and as prompt=")
        request = {"prompt": request}
    elif isinstance(request, CompletionRequest):
        request = vars(request)
    elif request is not None:
        _check_type("request (a list of prompts is prompt=[...])", request, str, Mapping, CompletionRequest)
    merged = {**(request or {}), **fields}
    known = CompletionRequest.__annotations__
    for name in merged:
        if name not in known:
            import difflib  # only for a mistake

            candidates = [*known, *(f"{argument}=" for argument in complete.__kwdefaults__ or ())]
            nearest = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown field {name!r}; did you mean {nearest!r}? (extra_body takes new ones)")
    return {name: value for name, value in merged.items() if value is not None}


def _completions_url(server_url: str | None) -> str:
    url = server_url or os.environ.get("FRIENDLI_SERVER_URL") or _DEFAULT_SERVER_URL
    _check_type("server_url", url, str)
    if "@" in url:  # not shown: there may be a password
        raise ValueError("server_url must not hold user:password@; use token or headers")
    try:
        parts = urlsplit(url)
        is_url = re.fullmatch(r"(?i:https?)://[!-~]+", url) and not re.search(r"[?#\\]", url)
        if not is_url or not parts.hostname or "%" in parts.netloc or parts.port == 0:
            raise ValueError("not http://host:port, ASCII, without blank, query, fragment and % in the host")
    except ValueError as error:
        raise ValueError(f"server_url cannot be {url!r}: {error}") from None
    prefix = re.sub(r"(/v1)?/*$", "", parts.path)
    return f"{parts.scheme}://{parts.netloc.rstrip(':')}{prefix}/v1/completions"


def _build_headers(accept: str, token: str | None, headers: Mapping[str, str] | None) -> dict[str, str]:
    built = {"Accept": accept, "Accept-encoding": "identity", "Content-type": "application/json"}
    built["User-agent"] = f"friendli_lite/{__version__}"
    token = os.environ.get("FRIENDLI_TOKEN", "") if token is None else token
    _check_type("token", token, str)
    token = token.strip()
    if re.search(r"[^ -~]", token):
        raise ValueError("token holds a character that cannot stand in a header")
    if token:
        built["Authorization"] = f"Bearer {token}"
    _check_type("headers", headers or {}, Mapping)
    for name, value in (headers or {}).items():
        _check_type("the name of a header", name, str)
        _check_type(f"the header {name!r}", value, str)
        # RFC 9110, 5.6.2 (token) and 5.5 (field-value)
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or re.search(r"[^\t -~\x80-\xff]", value):
            raise ValueError(f"the header {name!r} holds a character that cannot stand there")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"the header {name!r} is the client's to set")
        built[name.capitalize()] = value
    return built


def _retry_config(retries: RetryConfig | int | None) -> RetryConfig:
    if retries is None:
        return RetryConfig()
    _check_type("retries", retries, RetryConfig, int)
    return retries if isinstance(retries, RetryConfig) else RetryConfig(max_retries=retries)


# --- The attempts ---
class _Limits:
    """What a call may still take: `timeout` seconds of silence, `total_timeout` in all."""

    def __init__(
        self, timeout: float | None, total_timeout: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.timeout = math.inf if timeout is None else timeout
        self.total_timeout = math.inf if total_timeout is None else total_timeout
        _check_type("timeout", self.timeout, int, float)
        _check_type("total_timeout", self.total_timeout, int, float)
        if not self.timeout > 0 or math.isnan(self.total_timeout):
            raise ValueError("timeout and total_timeout must be seconds, timeout above 0, or None")
        self.clock = clock
        self.start = clock()

    def elapsed(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        return self.total_timeout - self.elapsed()

    def next_wait(self) -> float:
        """Return how many seconds a socket may wait now; raise socket.timeout if none are left."""
        left = self.left()
        if left <= 0:
            raise socket.timeout
        return min(self.timeout, left, _MAX_WAIT_SECONDS)

    def __str__(self) -> str:
        if self.left() > 0:
            return f"the server was silent for timeout={self.timeout:.3g} s"
        if self.total_timeout == -math.inf:
            return "another thread closed the stream"
        return f"total_timeout={self.total_timeout:.3g} s was spent"


@dataclass(repr=False, eq=False)  # repr() would show the token
class _Call:
    """One call: what is sent, how often, and the answer at hand. Tests inject sleep and chance."""

    url: str
    headers: dict[str, str]
    body: bytes
    retries: RetryConfig
    limits: _Limits
    ssl_context: ssl.SSLContext | None
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform
    attempts: int = 0
    response: _Response = field(init=False)

    def __post_init__(self) -> None:
        _check_type("ssl_context", self.ssl_context, ssl.SSLContext, type(None))

    def run(self, read: Callable[[_Response], Iterator[_T]]) -> Generator[_T, None, None]:
        """Yield None at the head of an answer, then what `read` makes of its body; until then, try again."""
        nothing: Any = None
        has_head = has_body = False
        while True:
            try:
                with self._open() as response:
                    self.response = response
                    if response.status != 200:
                        raise _status_error(response, response.connection.peer)
                    if not has_head:
                        has_head = True
                        yield nothing
                    items = read(response)
                    for first in items:
                        has_body = True
                        yield first
                        yield from items
                return
            except FriendliError as error:
                self._explain(error)
                wait = _wait_before_retry(error, self.attempts - 1, self.retries, self.uniform)
                if has_body or wait is None or wait >= self.limits.left():
                    raise
                retry = f"retry {self.attempts} of {self.retries.max_retries}"
                _logger.info("%s: %s in %.2f s", error, retry, wait)
            finally:
                _logger.debug("POST %s: done after %.3f s", self.url, self.limits.elapsed())
            self.sleep(wait)

    def _open(self) -> _Response:
        if self.limits.left() <= 0:
            raise APITimeoutError(str(self.limits))
        self.attempts += 1
        request = urllib.request.Request(self.url, self.body, self.headers, method="POST")
        # It follows no redirect, which would carry the token elsewhere. Made anew, it sees a new HTTP_PROXY.
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler())
        opener.add_handler(_KeepAliveHandler(request.type, request.host, self.limits, self.ssl_context))
        try:
            response: _Response = opener.open(request)
        except ValueError:  # whose text may hold the proxy's password
            raise ValueError("HTTP_PROXY or HTTPS_PROXY is not like http://host:port") from None
        _logger.debug("POST %s: status %d after %.3f s", self.url, response.status, self.limits.elapsed())
        return response

    def _explain(self, error: FriendliError) -> None:
        """Add the URL and the attempts; take out the token, which a server may echo."""
        scheme, _, credentials = self.headers.get("Authorization", "").partition(" ")
        secret = credentials or scheme
        after = f" (after {self.attempts} attempts)" if self.attempts > 1 else ""
        error.args = (_redact(f"POST {self.url}: {error}{after}", secret),)
        error.attempts = self.attempts
        vars(error).update(_redact(vars(error), secret))
        error.__context__ = None  # it may hold what was received

    def abort(self) -> None:
        """End another thread's wait for the answer, and let none follow."""
        self.limits.total_timeout = -math.inf
        with _idle_connections.lock, contextlib.suppress(OSError):
            if not self.response.is_released:
                # Not SSLSocket's own, after which it would send in clear text
                socket.socket.shutdown(self.response.connection.sock, socket.SHUT_RDWR)


def _redact(value: Any, secret: str) -> Any:
    """Return a text, or each of a dict, without a secret, also where it was cut within that."""
    if isinstance(value, dict):
        return {name: _redact(item, secret) for name, item in value.items()}
    if isinstance(value, str):
        for end in range(len(secret), 3, -1):
            value = value.replace(secret[:end] + "..." * (end < len(secret)), "***")
    return value


# --- Retry decisions ---
def _wait_before_retry(
    error: FriendliError, retry: int, config: RetryConfig, uniform: Callable[[float, float], float]
) -> float | None:
    """Return the seconds to wait before retry 0, 1, ..., or None for no retry."""
    if retry >= config.max_retries or not _is_retryable(error, config):
        return None
    asked = _retry_after(error.headers, time.time()) if isinstance(error, APIStatusError) else None
    if asked is not None:
        return asked if asked <= config.max_retry_after else None
    longest = config.max_delay
    with contextlib.suppress(OverflowError):
        longest = min(longest, config.initial_delay * config.multiplier**retry)
    return uniform(0.0, longest)


def _is_retryable(error: FriendliError, config: RetryConfig) -> bool:
    if isinstance(error, APIStatusError):
        return error.status_code in config.status_codes
    if isinstance(error, APITimeoutError):
        return config.retry_timeouts
    is_refused = isinstance(error.__cause__, ssl.SSLCertVerificationError)
    return isinstance(error, APIConnectionError) and config.retry_connection_errors and not is_refused


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), or None for nonsense."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", value):
            return float(value) * unit
    try:
        wait = email.utils.parsedate_to_datetime(value).timestamp() - now
    except (IndexError, OverflowError, TypeError, ValueError):  # email.utils, of odd dates
        return None
    return wait if wait >= 0 else None


# --- The connection ---

# The last four are of int() and email.parser, to which http.client hands what it reads.
_TRANSPORT_ERRORS = (OSError, http.client.HTTPException, ValueError, TypeError, OverflowError, RecursionError)


@contextlib.contextmanager
def _connection_errors(what: str, why_late: object, advice: str = "") -> Iterator[None]:
    """Raise APIConnectionError for an error of the transport; an OSError is its cause."""
    try:
        yield
    except _TRANSPORT_ERRORS as error:
        if isinstance(error, (socket.timeout, TimeoutError)):
            raise APITimeoutError(f"{what}: {why_late}{advice}") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, ssl.SSLError):
            reason = f"TLS failed: {getattr(error, 'verify_message', '') or error.reason or error}"
            advice = "; see server_url, and pass ssl_context, or name a file with the CA in SSL_CERT_FILE"
        cause = error if isinstance(error, OSError) else None  # others may hold what was received
        raise APIConnectionError(f"{what}: {_one_line(reason)}{advice}") from cause


class _KeepAliveHandler(urllib.request.BaseHandler):
    """Sends a request over an idle connection if one is alive, else over a new one."""

    def __init__(self, scheme: str, host: str, limits: _Limits, ssl_context: ssl.SSLContext | None) -> None:
        self.scheme, self.host, self.limits, self.ssl_context = scheme, host, limits, ssl_context

    def http_open(self, request: urllib.request.Request) -> _Response:
        if request.type != self.scheme or not re.fullmatch("[!-~]+", request.host):
            raise ValueError  # the proxy is to be spoken to by TLS, or has no name; _Call words it
        proxy = request.host if request.host != self.host else None  # it has taken the host's place
        is_https = self.scheme == "https"
        credentials = request.headers.pop("Proxy-authorization", None) if is_https else None  # for a tunnel
        route = (self.scheme, self.host, proxy, credentials, self.ssl_context)
        start = self.limits.elapsed()
        idle = _idle_connections.take(route)
        if idle is not None:
            try:
                return self._exchange(idle, request)
            except APIConnectionError as error:
                is_late = self.limits.elapsed() - start > _MAX_STALE_SECONDS
                is_broken = isinstance(error.__cause__, (ConnectionError, ssl.SSLError))
                if is_late or not is_broken or idle.received:
                    raise  # else it was closed while the request was on its way, and not even seen
        return self._exchange(_Connection(route, self.limits), request)

    https_open = http_open

    def _exchange(self, connection: _Connection, request: urllib.request.Request) -> _Response:
        body: Any = request.data
        headers = {"Host": self.host, **request.headers, "Content-length": str(len(body))}
        with _connection_errors(f"no answer{connection.via}", self.limits):
            return connection.exchange(self.limits, f"POST {request.selector}", headers, body)


class _Connection(io.RawIOBase):
    """A connection for many calls, one at a time, within their limits.

    For http.client's HTTPResponse it is the socket, and the raw file that makefile() buffers.
    """

    def __init__(self, route: _Route, limits: _Limits) -> None:
        """Connect: TCP, then the proxy's tunnel, then TLS."""
        self.route = route
        scheme, host, proxy, credentials, context = route
        server, next_hop = urlsplit(f"//{host}"), urlsplit(f"//{proxy or host}")
        port = next_hop.port or (80 if proxy or scheme == "http" else 443)
        seconds = min(_MAX_CONNECT_SECONDS, limits.timeout, limits.left())
        limits = _Limits(None, seconds)
        self.via = f" through the proxy {proxy}" if proxy else ""
        self.peer = f"the server, or the proxy {proxy}," if proxy and scheme == "http" else "the server"
        advice = "; see HTTP_PROXY and HTTPS_PROXY" if proxy else "; is it up? see server_url"
        with _connection_errors(f"cannot connect{self.via}", f"it took over {seconds:.3g} s", advice):
            self.sock = _open_socket(str(next_hop.hostname), port, limits)
            try:
                if scheme == "https":
                    if proxy:
                        self._open_tunnel(host if server.port else f"{host}:443", credentials, limits)
                    context = context or _default_ssl_context()
                    self.sock.settimeout(limits.next_wait())
                    self.sock = context.wrap_socket(self.sock, server_hostname=server.hostname)
            except BaseException:
                self.sock.close()
                raise

    def _open_tunnel(self, target: str, credentials: str | None, limits: _Limits) -> None:
        """Have the proxy connect to the target (RFC 9110, 9.3.6), or raise its refusal."""
        headers = {"Host": target, **({"Proxy-Authorization": credentials} if credentials else {})}
        response = self.exchange(limits, f"CONNECT {target}", headers)
        response.will_close = response.is_released = True  # what comes of the connection is decided here
        if response.status != 200:
            raise _status_error(response, f"the proxy {self.route[2]}", "; see HTTPS_PROXY")

    def exchange(self, limits: _Limits, start: str, headers: dict[str, str], body: bytes = b"") -> _Response:
        """Send a request, and return the answer when its head is in."""
        self.limits = limits
        self.received = 0  # bytes since the request, or since the last piece of a body
        self.may_end = False  # a closed connection is the end of the answer
        lines = [f"{start} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
        try:
            with contextlib.suppress(ConnectionError):  # there may be an answer: 413 before all was read
                self._send("\r\n".join(lines).encode("latin-1") + body)
            response = _Response(self)
            response.begin()
            limits.next_wait()  # the call may have been closed while it waited
            return response
        except BaseException:
            self.sock.close()
            raise

    def _timed(self) -> socket.socket:
        """Return the socket, which waits no longer than the limits allow now."""
        seconds = self.limits.next_wait()
        if seconds != self.sock.gettimeout():  # setting it costs a system call
            self.sock.settimeout(seconds)
        return self.sock

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # each piece that the server takes is a sign of life
            left = left[self._timed().send(left[:_PIECE_BYTES]) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, _PIECE_BYTES)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._timed().recv_into(buffer)
        if not count and not self.may_end:  # http.client would take it for the end of the head, or the body
            raise http.client.RemoteDisconnected("the server closed the connection")
        self.received += count
        if self.received > _MAX_FRAMING_BYTES:
            raise http.client.HTTPException(f"over {_MAX_FRAMING_BYTES} bytes of headers or trailers")
        return count

    def close(self) -> None:
        """Do nothing: http.client closes its file after each answer; the socket lives on."""


def _open_socket(host: str, port: int, limits: _Limits) -> socket.socket:
    """Connect to the first address that accepts, within the limits for all of them."""
    failure = OSError("the name has no address")
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            sock = socket.create_connection((str(address[0]), port), limits.next_wait())
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # Linux, macOS, both
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _KEEP_ALIVE_SECONDS)
        return sock
    raise failure


class _Response(http.client.HTTPResponse):
    """An answer whose body is to be read; its close() closes the connection, unless that was released."""

    idle_since: float
    is_released = False

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self.connection: _Connection = connection

    def begin(self) -> None:
        """Read the head, behind all interim answers: http.client skips 100, but not 103."""
        super().begin()
        while self.status // 100 == 1 and self.status != 101:
            vars(self)["headers"] = None  # or begin() would not begin again
            super().begin()

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the body as they arrive; raise APIConnectionError unless it is whole."""
        self.connection.may_end = self.length is None and not self.chunked
        with _connection_errors("the answer broke off", self.connection.limits):
            while True:
                piece = self.read1(_PIECE_BYTES)
                if self.chunked and (self.chunk_left or 0) < 0:  # which http.client takes
                    raise ValueError("a chunk has a size below 0")
                if not piece:
                    return
                self.connection.received = 0
                yield piece

    def release(self) -> None:
        """Leave the connection to other calls, after the end of the body or its [DONE]."""
        if not self.will_close and self.status != 101:  # after which another protocol is spoken
            _idle_connections.put(self)

    def close(self) -> None:
        if not self.is_released:  # or it may be in the hands of another thread
            super().close()
            self.connection.sock.close()

    def leaves_alive(self, limits: _Limits) -> bool:
        """Take in what is left of the answer; tell whether the connection is alive, or close it."""
        self.connection.limits = limits
        with contextlib.suppress(APIConnectionError, OSError):
            for _ in self.pieces():
                pass
            self.connection.sock.settimeout(0)
            try:
                self.connection.sock.recv(1)  # nothing from a closed one, or what nobody has asked for
            except (BlockingIOError, ssl.SSLWantReadError):  # quiet, perhaps after session tickets of TLS
                return True
        self.connection.sock.close()
        return False


class _IdleConnections:
    """The last answers of the connections that serve no call, the longest idle first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self._idle: list[_Response] = []

    def put(self, response: _Response) -> None:
        response.idle_since = self.clock()
        with self.lock:
            response.is_released = True
            self._idle.append(response)
            self.close(_MAX_IDLE_CONNECTIONS, _MAX_IDLE_SECONDS)

    def take(self, route: _Route) -> _Connection | None:
        """Return the connection of this route that was used last, if any is alive."""
        limits = _Limits(None, _MAX_DRAIN_SECONDS)
        while True:
            with self.lock:
                self.close(_MAX_IDLE_CONNECTIONS, _MAX_IDLE_SECONDS)
                found = next((idle for idle in reversed(self._idle) if idle.connection.route == route), None)
                if found is None:
                    return None
                self._idle.remove(found)
            if found.leaves_alive(limits):
                return found.connection

    def close(self, most: int = 0, longest: float = 0.0) -> None:
        """Close those that are too many, or idle for too many seconds."""
        oldest = self.clock() - longest
        with self.lock:
            while self._idle[most:] or (self._idle and self._idle[0].idle_since < oldest):
                self._idle.pop(0).connection.sock.close()

    def forget_after_fork(self) -> None:
        """In a child after a fork, drop the parent's lock and connections, which stay open there."""
        self.lock = threading.RLock()
        self.close()


_idle_connections = _IdleConnections()
atexit.register(_idle_connections.close)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows does not fork
    os.register_at_fork(after_in_child=_idle_connections.forget_after_fork)


def _default_ssl_context() -> ssl.SSLContext:
    with _idle_connections.lock:
        return _build_ssl_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=1)
def _build_ssl_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """Read the system's CAs, which takes 20 ms; OpenSSL looks at the two variables by itself."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


# --- Reading the answer ---

_LATE_FAILURE = "the server failed after it had answered 200"
_ADVICE = {401: "token", 403: "token", 404: "model and server_url", 407: "HTTP_PROXY", 429: "retries"}


def _status_error(response: _Response, who: str, advice: str = "") -> APIStatusError:
    status = response.status
    headers = {name.lower(): value for name, value in response.headers.items()}
    page = _read_page(response)[:_MAX_PAGE_BYTES].decode("utf-8", "replace")
    message = _server_message(page)
    text = f"{who} answered {status} {_one_line(response.reason)}"
    if "location" in headers:
        text += f", a redirect to {_one_line(headers['location'])} that is not followed; see server_url"
    if message:
        text += f": {message}"
    if "retry-after" in headers:
        text += f" (Retry-After: {_one_line(headers['retry-after'])})"
    if status in _ADVICE:
        advice = advice or f"; see {_ADVICE[status]}"
    return APIStatusError(text + advice, status_code=status, headers=headers, body=page, message=message)


def _read_page(response: _Response) -> bytes:
    """Return the start of a body that is no completion, even if it breaks off."""
    page = b""
    with contextlib.suppress(APIConnectionError):
        pieces = response.pieces()
        while len(page) < _MAX_PAGE_BYTES and (piece := next(pieces, b"")):
            page += piece
        response.release()  # what is left of a longer one is taken in, or given up, before the next call
    return page


def _server_message(page: str) -> str:
    """Return the server's own words, out of JSON of any form, HTML or plain text, on one line."""
    try:
        return _one_line(_words(json.loads(page)))
    except (ValueError, RecursionError):
        return _one_line(re.sub(r"<[^<>]*>", " ", page))


def _words(payload: Any) -> str:
    """Return the text in an error's payload: seen are error, detail, message and msg, nested."""
    if isinstance(payload, list):
        return "; ".join(filter(None, map(_words, payload)))
    if not isinstance(payload, dict):
        return "" if payload is None else str(payload)
    words = next(filter(None, (_words(payload.get(k)) for k in ("error", "detail", "message", "msg"))), "")
    location = payload.get("loc")
    return f"{'.'.join(map(str, location))}: {words}" if isinstance(location, list) else words


def _one_line(text: str) -> str:
    """Return text that is fit for a message: short, printable, on one line."""
    printable = (c if c.isprintable() else " " for c in text[: 8 * _MAX_QUOTED_CHARACTERS])
    line = " ".join("".join(printable).split())
    return line if len(line) <= _MAX_QUOTED_CHARACTERS else line[:_MAX_QUOTED_CHARACTERS] + "..."


def _expect(media_type: str, response: _Response) -> None:
    """Refuse an answer that says that it is something else, as a login page does."""
    found = response.headers.get("Content-Type", media_type).partition(";")[0].strip().lower()
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        found += f" in {encoding}"
    if found != media_type:
        what = f"the answer is {found}, not {media_type}; see server_url"
        raise _response_error(what, _read_page(response))


def _response_error(what: str, body: bytes | bytearray) -> APIResponseError:
    page = body[:_MAX_PAGE_BYTES].decode("utf-8", "replace")
    return APIResponseError(_one_line(f"{what}: {_server_message(page) or page}"), body=page)


def _read_completion(response: _Response) -> Iterator[Completion]:
    _expect("application/json", response)
    body = bytearray()
    for piece in response.pieces():
        body += piece
        if len(body) > _MAX_COMPLETION_BYTES:
            raise APIResponseError(f"the answer has over {_MAX_COMPLETION_BYTES} bytes")
    completion = _parse(body, _completion)
    response.release()
    yield completion


def _read_chunks(response: _Response) -> Iterator[CompletionChunk]:
    _expect("text/event-stream", response)
    for event, data in _read_events(response.pieces()):
        if event == "error":
            raise _response_error(_LATE_FAILURE, data)
        yield _parse(data, _chunk)
    response.release()


def _read_events(pieces: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the event and data of each server-sent event, up to [DONE].

    So is a field named "error" (older llama.cpp). The rules quoted are of "Interpreting an event stream" in
    https://html.spec.whatwg.org/multipage/server-sent-events.html.
    """
    event = ""
    data: list[bytes] = []
    size = 0
    for lines in _read_lines(pieces):
        for line in lines:
            size += len(line) + 1
            if not line:
                # "If the data buffer is an empty string, ... return"; but an error needs no data.
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
    raise APIConnectionError("the stream was cut: it ended before [DONE]")


def _read_lines(pieces: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines that each piece completes, without their ends: LF, CRLF or CR."""
    unfinished = bytearray()
    after_cr = False
    at_start = True
    for piece in pieces:
        if after_cr and piece.startswith(b"\n"):
            piece = piece[1:]  # the rest of a CRLF
        after_cr = piece.endswith(b"\r")
        lines = piece.splitlines()  # of bytes: at LF, CRLF and CR alone
        rest = lines.pop() if lines and not piece.endswith((b"\n", b"\r")) else b""
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


# --- From JSON to dataclasses: what raises a ValueError becomes an APIResponseError in _parse() ---
def _parse(data: bytes | bytearray, build: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        text = data.decode().strip()
        raw, end = _decode(text)
        if end != len(text) or not isinstance(raw, dict):
            raise ValueError("it is not one object")
        if raw.get("error") is None:
            return build(raw)
    except (ValueError, RecursionError) as error:
        raise _response_error(f"the answer is no completion: {error}", data) from None
    raise _response_error(_LATE_FAILURE, data)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


def _completion(raw: dict[str, Any]) -> Completion:
    parts, usage = _parts(raw)
    choices = []
    for choice, text, reason, logprobs in parts:
        checked = {**choice, "text": text, "finish_reason": reason, "logprobs": logprobs}
        choices.append(_build(CompletionChoice, checked))
    return _build(Completion, {**raw, "choices": choices, "usage": usage, "raw": raw})


def _chunk(raw: dict[str, Any]) -> CompletionChunk:
    parts, usage = _parts(raw)
    choices = []
    for choice, text, reason, logprobs in parts:
        choices.append(ChunkChoice(choice.get("index"), text, choice.get("token"), reason, logprobs))
    return CompletionChunk(raw.get("id"), raw.get("object"), choices, raw.get("created"), usage, raw)


def _parts(raw: dict[str, Any]) -> tuple[list[tuple[dict[str, Any], str, str | None, Any]], Usage | None]:
    """Return each choice with its text, finish_reason and logprobs, and the usage, all of them checked."""
    choices = raw.get("choices")
    if not isinstance(choices, list):
        raise ValueError("it has no list of choices")
    parts = []
    for choice in choices:
        if not isinstance(choice, dict):
            raise ValueError("a choice is no object")
        text, reason, logprobs = choice.get("text"), choice.get("finish_reason"), choice.get("logprobs")
        if reason in ("null", ""):  # seen for null
            reason = None
        if text is None and reason:  # only the end of a choice may lack it
            text = ""
        if not isinstance(text, str) or not (reason is None or isinstance(reason, str)):
            raise ValueError("a choice has no text, or a finish_reason that is none")
        parts.append((choice, text, reason, None if logprobs is None else _build(Logprobs, logprobs)))
    usage = raw.get("usage")
    return parts, None if usage is None else _build(Usage, usage)


def _build(kind: type[_T], value: Any) -> _T:
    """Return a JSON object as a dataclass, without what is null or has no field."""
    if not isinstance(value, dict):
        raise ValueError(f"{kind.__name__} is no object")
    known = kind.__annotations__
    return kind(**{name: item for name, item in value.items() if name in known and item is not None})


# --- The command line ---
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 1 (failed), 2 (wrong usage) or 130 (Ctrl-C), or return."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        _logger.setLevel(logging.DEBUG)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    try:
        _print_completion(options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    except BrokenPipeError:  # the reader has enough; what is buffered must not be tried again at exit
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
        description="Complete PROMPT, or stdin. FRIENDLI_SERVER_URL and FRIENDLI_TOKEN are obeyed.",
        epilog="examples:\n"
        '  friendli_lite --max-tokens 16 "Say this is a test!"\n'
        "  friendli_lite --set 'stop=[\"\\n\"]' --json < prompt.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", default="-", help=argparse.SUPPRESS)
    add("--model", help="LoRA adapter, model or endpoint ID")
    add("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    add("--temperature", type=float, metavar="T", help="of the sampling")
    add("--set", action="append", default=[], metavar="NAME=JSON", help="any other field of the request")
    add("--server-url", metavar="URL", help=f"default: {_DEFAULT_SERVER_URL}")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds of silence (default: 600)")
    add("--total-timeout", type=float, metavar="S", help="seconds for everything")
    add("--retries", type=int, metavar="N", help="retries after a failure (default: 3)")
    add("--no-stream", action="store_true", help="print the completion when it is whole")
    add("--json", action="store_true", help="print the raw object, one a line for a stream")
    add("--verbose", action="store_true", help="tell of requests and retries on stderr")
    add("--version", action="version", version=f"friendli_lite {__version__}")
    return parser


def _print_completion(options: argparse.Namespace) -> None:
    how = {name: getattr(options, name) for name in ("server_url", "timeout", "total_timeout", "retries")}
    body = _body_fields(options)
    for answer in [complete(body, **how)] if options.no_stream else stream(body, **how):
        if options.json:
            print(json.dumps(answer.raw), flush=True)
        elif answer.choices and not answer.choices[0].index:  # of several choices, the first
            print(answer.text, end="", flush=True)
    if not options.json:
        print(flush=True)


def _body_fields(options: argparse.Namespace) -> dict[str, Any]:
    body = {name: getattr(options, name) for name in ("model", "max_tokens", "temperature")}
    for setting in options.set:
        name, _, value = setting.partition("=")
        try:
            body[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"--set takes NAME=JSON, not {setting!r}") from None
    if options.prompt != "-":
        body["prompt"] = options.prompt
    elif "prompt" not in body and "tokens" not in body:
        body["prompt"] = sys.stdin.read() if sys.stdin else ""
    return body


if __name__ == "__main__":
    main()
