# friendli_lite: Friendli's text completions with Python's standard library alone.
# Copyright (c) 2026 The friendli_lite authors
# SPDX-License-Identifier: MIT (https://opensource.org/license/mit)
"""Text completions of a Friendli Container, in one file that needs nothing installed.

    import friendli_lite

    print(friendli_lite.complete("Say this is a test!", max_tokens=16).text)
    with friendli_lite.stream("Say this is a test!", max_tokens=16) as chunks:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)

The server is $FRIENDLI_SERVER_URL, or http://localhost:8000; the token is $FRIENDLI_TOKEN. Friendli's
hosted products want another `server_url`, a token and a `model`.

Tried again, up to 3 times: the statuses 429, 500, 502, 503 and 504, and connections that fail or
break; never after the first event of a stream, a timeout or a refused certificate (`RetryConfig`).
What fails in the end, also an answer that was cut short, raises a `FriendliError`.

Left out on purpose: chat and all other endpoints, an async API, HTTP/2, a client object.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import dataclasses
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

    # Where a connection leads; calls of the same route may share one: the host with its port, if it has
    # one (for http through a proxy, the proxy's), the proxy to tunnel through for https, the credentials
    # for that, and the context for TLS.
    _Route = tuple[str, tuple[str, int] | None, str | None, ssl.SSLContext | None]
else:
    _ChunkGenerator = Generator  # Python 3.8 cannot subscript it

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "ChunkChoice",
    "Completion",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionRequest",
    "CompletionStream",
    "FriendliError",
    "Logprobs",
    "RetryConfig",
    "Usage",
    "complete",
    "stream",
]
__version__ = "0.1.0"

_DEFAULT_SERVER_URL = "http://localhost:8000"
_JSON_TYPE = "application/json"
_EVENT_STREAM_TYPE = "text/event-stream"

_MAX_CONNECT_SECONDS = 10.0  # a server that takes longer is down
_MAX_WAIT_SECONDS = 1e6  # "no limit": about the longest that a socket can be told
_MAX_IDLE_SECONDS = 4.0  # servers close idle connections after 5 s (uvicorn, Node.js) and more
_MAX_IDLE_CONNECTIONS = 64  # one for each thread of a large pool
_MAX_STALE_SECONDS = 1.0  # a connection that breaks later than this has most likely been served
_MAX_DRAIN_SECONDS = 0.01  # for the bytes behind [DONE]: less than a TLS handshake takes
_KEEP_ALIVE_SECONDS = 60  # below the idle limits of NATs (350 s on AWS)

_PIECE_BYTES = 64 * 1024  # sent or received at once
_MAX_EVENT_BYTES = 16 * 1024**2  # of a line, or without an event; a token's event has about 200
_MAX_COMPLETION_BYTES = 128 * 1024**2
_MAX_PAGE_BYTES = 64 * 1024  # of an error page
_MAX_FRAMING_BYTES = 1024**2  # of headers, 1xx answers and trailers between two pieces of a body
_MAX_QUOTED_CHARACTERS = 500  # of a server's words in a message

_logger = logging.getLogger("friendli_lite")


# --- Errors ---


class FriendliError(Exception):
    """The base of all errors of a call; its text is one line that says what to do next.

    All can be pickled. Beside them a call raises TypeError and ValueError for mistakes of the caller,
    before anything is sent.

    Attributes:
        attempts: how many requests were sent.
        url: where to.
    """

    attempts: int = 0
    url: str = ""

    def __str__(self) -> str:
        prefix = f"POST {self.url}: " if self.url else ""
        suffix = f" (after {self.attempts} attempts)" if self.attempts > 1 else ""
        return prefix + super().__str__() + suffix


class APIStatusError(FriendliError):
    """The server, or a proxy before it, answered with another status than 200.

    Attributes:
        status_code: for example 429.
        headers: of the answer, their names in lower case.
        body: of the answer, as text, up to 64 KiB.
        message: the server's own words, found in the body; "" if there are none.
    """

    def __init__(
        self,
        text: str,
        status_code: int = 0,
        headers: Mapping[str, str] | None = None,
        body: str = "",
        message: str = "",
    ) -> None:
        super().__init__(text)
        self.status_code = status_code
        self.headers = dict(headers or {})
        self.body = body
        self.message = message


class APIConnectionError(FriendliError):
    """There was no connection, or it broke; also a stream that ended before its [DONE]."""


class APITimeoutError(APIConnectionError):
    """The server was silent for `timeout` seconds, or `total_timeout` seconds were spent."""


class APIResponseError(FriendliError):
    """The status was 200, but the answer is no completion, or holds an error in mid-stream.

    Attributes:
        body: what came instead, as text, up to 64 KiB.
    """

    def __init__(self, text: str, body: str = "") -> None:
        super().__init__(text)
        self.body = body[:_MAX_PAGE_BYTES]


# --- What is asked ---


@dataclass
class CompletionRequest:
    """The body of a request; the API reference of Friendli Suite tells more of each field.

    Exactly one of `prompt` and `tokens` is needed. None is not sent: the server's default holds.
    """

    prompt: str | Sequence[str] | None = None  # the text to complete, or a list of texts
    tokens: Sequence[int] | None = None  # the same as token IDs
    model: str | None = None  # LoRA adapter of a container; model or endpoint ID of a hosted product
    bad_word_tokens: Sequence[Mapping[str, Sequence[int]]] | None = None  # as `stop_tokens`; never generated
    bad_words: Sequence[str] | None = None  # texts never to generate
    embedding_to_replace: Sequence[float] | None = None  # embeddings for `token_index_to_replace`, flattened
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
    stream: bool | None = None  # set by `stream()`, refused by `complete()`
    stream_options: Mapping[str, bool] | None = None  # {"include_usage": True} adds a last chunk with `usage`
    temperature: float | None = None  # of the sampling; 0 takes the likeliest token
    token_index_to_replace: Sequence[int] | None = None  # positions of tokens that embeddings replace
    top_k: int | None = None  # sample from the k likeliest tokens
    top_p: float | None = None  # sample from the likeliest tokens of this total probability
    xtc_probability: float | None = None  # how often the likeliest tokens are left out (exclude top choices)
    xtc_threshold: float | None = None  # probability above which a token is left out then
    extra_body: Mapping[str, Any] | None = None  # fields that this version does not know, sent as they are


@dataclass(frozen=True)
class RetryConfig:
    """What is tried again, how often, and after which waits; all times in seconds.

    The wait before retry k (0, 1, ...) is uniform in [0, min(max_delay, initial_delay * multiplier**k)]:
    by default up to 0.5, 1 and 2 s. Source: "full jitter" in "Exponential Backoff And Jitter", AWS
    Architecture Blog. A server's `retry-after-ms` or `Retry-After` replaces it. A wait that does not fit
    into what is left of `total_timeout` is not begun: the error is raised at once.

    Attributes:
        max_retries: tries after the first one.
        initial_delay: longest wait before the first retry.
        max_delay: longest wait before any retry.
        multiplier: growth of the longest wait from a retry to the next.
        max_retry_after: a server that asks for a longer wait gets no retry.
        status_codes: the statuses that are tried again.
        retry_connection_errors: try again where a connection failed or broke.
        retry_timeouts: try again after `timeout`; the server may then generate, and bill, twice.
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
        _check_type("max_retries", self.max_retries, (int,))
        for name in ("max_retries", "initial_delay", "max_delay", "multiplier", "max_retry_after"):
            value = getattr(self, name)
            _check_type(name, value, (int, float))
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number and not negative, not {value}")
        _check_type("status_codes", self.status_codes, (tuple, list, set, frozenset, range))
        for code in self.status_codes:
            _check_type("each of status_codes", code, (int,))


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


@dataclass
class Completion:
    """A whole answer; `raw` is the decoded object, with what has no field here."""

    id: str | None = None
    object: str | None = None
    choices: list[CompletionChoice] = field(default_factory=list)
    usage: Usage | None = None
    model: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The text of the first choice, "" if there is none."""
        return self.choices[0].text if self.choices else ""


@dataclass
class ChunkChoice:
    """The next piece of a choice; `finish_reason` is None before its end."""

    index: int | None = None
    text: str = ""
    token: int | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


@dataclass
class CompletionChunk:
    """One event of a stream; `created` is Unix time in seconds, `raw` the decoded object.

    With `n` above 1 or several prompts, chunks of different `choices[0].index` are interleaved. A chunk
    with `usage` has no choices.
    """

    id: str | None = None
    object: str | None = None
    choices: list[ChunkChoice] = field(default_factory=list)
    created: int | None = None
    usage: Usage | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """The text of the first choice, "" if there is none."""
        return self.choices[0].text if self.choices else ""


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
            at most, beside the look-up of the name, which only the operating system bounds.
        total_timeout: seconds for the whole call with its retries and waits; None for no limit.
        headers: added to, and winning over, the client's own.
        ssl_context: for a private CA or a client certificate; default: the system's CAs.
        **fields: of the body; they win over the same of `request`, which can thus be a template.

    Raises:
        FriendliError: the call failed; which of its subclasses says how.
        TypeError, ValueError: a mistake in the arguments; nothing was sent.
    """
    call = _Call(
        url=_completions_url(server_url),
        body=_build_body(request, fields, stream=False),
        headers=_build_headers(_JSON_TYPE, token, headers),
        retries=_retry_config(retries),
        limits=_Limits(timeout, total_timeout),
        ssl_context=ssl_context,
    )
    completion = call.run(_read_completion)
    call.close()
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
    """Ask for a completion, and return its chunks as they come.

    The request is sent at once, so that one that is refused raises here. Arguments and errors are those
    of `complete()`; `total_timeout` covers the stream to its end.

    Returns:
        A generator of `CompletionChunk`, for a `with` block. It ends when the server has said [DONE]; a
        stream that is cut before raises APIConnectionError in the iteration.
    """
    call = _Call(
        url=_completions_url(server_url),
        body=_build_body(request, fields, stream=True),
        headers=_build_headers(_EVENT_STREAM_TYPE, token, headers),
        retries=_retry_config(retries),
        limits=_Limits(timeout, total_timeout),
        ssl_context=ssl_context,
    )
    return CompletionStream(call, call.run(_open_chunks))


class CompletionStream(_ChunkGenerator):
    """The chunks of an answer: a generator of `CompletionChunk`, and a context manager.

    The connection is let go at the end, by an exception, by leaving the `with` block, by `close()` and
    by garbage collection. `close()` also ends another thread's wait for the next chunk, which then
    raises APIConnectionError; a wait between two tries it ends only when that is over.
    """

    def __init__(self, call: _Call, chunks: _ChunkGenerator) -> None:
        self._call = call
        self._chunks = _retry_until_first(call, chunks)

    def __next__(self) -> CompletionChunk:
        return next(self._chunks)

    def send(self, value: None) -> CompletionChunk:
        """Return the next chunk; `value` has no meaning."""
        return self._chunks.send(value)

    def throw(self, *error: Any) -> CompletionChunk:
        """Raise an error where the generator stands, which ends it."""
        return self._chunks.throw(*error)

    def close(self) -> None:
        """Let the connection go."""
        try:
            self._chunks.close()
        except ValueError:  # it is running, in another thread
            self._call.abort()
        else:
            self._call.close()

    def __enter__(self) -> CompletionStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


# --- Building the request ---


def _check_type(name: str, value: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def _build_body(request: object, fields: dict[str, Any], stream: bool) -> bytes:
    """Return the JSON of a request, over which `fields` win."""
    merged = _merge(request, fields)
    if (merged.prompt is None) == (merged.tokens is None):
        found = "neither was" if merged.prompt is None else "both were"
        raise ValueError(f"exactly one of prompt and tokens is needed; {found} given")
    if merged.stream not in (None, stream):
        raise ValueError(f"stream={merged.stream} is for {'complete' if stream else 'stream'}()")
    merged.stream = stream or merged.stream
    body = dict(vars(merged))
    extra = body.pop("extra_body") or {}
    _check_type("extra_body", extra, (Mapping,))
    for name in extra:
        _check_type("a name in extra_body", name, (str,))
        if name in body:
            raise ValueError(f"extra_body holds {name!r}, which is a field of its own")
    return _encode({**{name: value for name, value in body.items() if value is not None}, **extra})


def _merge(request: object, fields: dict[str, Any]) -> CompletionRequest:
    if isinstance(request, CompletionRequest):
        given = vars(request)
    elif isinstance(request, Mapping):
        given = dict(request)
    elif isinstance(request, str):
        if "prompt" in fields:
            raise TypeError("the prompt was given twice, as request and as prompt=")
        given = {"prompt": request}
    elif request is None:
        given = {}
    else:
        _check_type("request (a list of prompts is prompt=[...])", request, (str, Mapping, CompletionRequest))
    merged = {**given, **fields}
    known = [f.name for f in dataclasses.fields(CompletionRequest)]
    for name in merged:
        if name not in known:
            import difflib  # only for a mistake

            arguments = complete.__kwdefaults__ or {}
            if name in arguments:
                raise TypeError(f"{name} is an argument of the call, not a field of its request")
            candidates = [*known, *arguments]
            nearest = difflib.get_close_matches(str(name), candidates, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"unknown field {name!r}; did you mean {nearest!r}? (Newer fields go into extra_body.)"
            )
    return CompletionRequest(**merged)


def _encode(body: dict[str, Any]) -> bytes:
    """Return the JSON of a body; it is ASCII, so that lone surrogates can be sent, too."""
    members = []
    for name, value in body.items():
        try:
            members.append(f"{_encode_value(name)}:{_encode_value(value)}")
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name!r} cannot be sent as JSON: {error}") from None
    return f"{{{','.join(members)}}}".encode("ascii")


_encode_value = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def _completions_url(server_url: str | None) -> str:
    if server_url is not None:
        _check_type("server_url", server_url, (str,))
    url = server_url or os.environ.get("FRIENDLI_SERVER_URL") or _DEFAULT_SERVER_URL
    if "@" in url:  # not shown: there may be a password
        raise ValueError("server_url must not hold user:password@; use token or headers")
    if not url.isascii() or re.search(r"[\x00-\x20\x7f?#\\]", url):
        raise ValueError(f"server_url must be ASCII, without blanks, query and fragment, not {url!r}")
    try:
        parts = urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna")  # as the look-up of the name will do
    except ValueError as error:
        raise ValueError(f"server_url {url!r} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise ValueError(f"server_url must be like http://host:port or https://host, not {url!r}")
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        path = path[: -len("/v1")]
    return f"{parts.scheme}://{parts.netloc}{path}/v1/completions"


def _build_headers(accept: str, token: str | None, headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers of a request, their names in Title-Case."""
    python = ".".join(map(str, sys.version_info[:2]))
    merged = {
        "Accept": accept,
        "Content-Type": _JSON_TYPE,
        "User-Agent": f"friendli_lite/{__version__} Python/{python}",
    }
    token = os.environ.get("FRIENDLI_TOKEN", "") if token is None else token
    _check_type("token", token, (str,))
    token = re.sub(r"^bearer(\s+|$)", "", token.strip(), flags=re.IGNORECASE)
    if re.search(r"[^\x20-\x7e]", token):
        raise ValueError("token holds a character that cannot stand in a header")
    if token:
        merged["Authorization"] = f"Bearer {token}"
    headers = {} if headers is None else headers
    _check_type("headers", headers, (Mapping,))
    for name, value in headers.items():
        _check_type("the name of a header", name, (str,))
        _check_type(f"the header {name!r}", value, (str,))
        # RFC 9110, 5.6.2 (token) and 5.5 (field-value)
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
            raise ValueError(f"{name!r} cannot be the name of a header")
        if re.search(r"[^\t\x20-\x7e\x80-\xff]", value):
            raise ValueError(f"the header {name!r} holds a character that cannot stand there")
        if name.lower() in ("content-length", "transfer-encoding"):
            raise ValueError(f"the header {name!r} is the client's to set")
        merged[name.title()] = value
    return merged


def _retry_config(retries: RetryConfig | int | None) -> RetryConfig:
    if retries is None:
        return RetryConfig()
    _check_type("retries", retries, (RetryConfig, int))
    return retries if isinstance(retries, RetryConfig) else RetryConfig(max_retries=retries)


# --- The attempts ---


class _Limits:
    """How long a call may still take: `timeout` seconds of silence, `total_timeout` in all."""

    def __init__(
        self,
        timeout: float | None,
        total_timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.timeout = math.inf if timeout is None else timeout
        self.total_timeout = math.inf if total_timeout is None else total_timeout
        _check_type("timeout", self.timeout, (int, float))
        _check_type("total_timeout", self.total_timeout, (int, float))
        if not self.timeout > 0 or math.isnan(self.total_timeout):
            raise ValueError("timeout and total_timeout must be seconds, timeout above 0, or None")
        self._clock = clock
        self._start = clock()

    def elapsed(self) -> float:
        return self._clock() - self._start

    def left(self) -> float:
        return self.total_timeout - self.elapsed()

    def next_wait(self) -> float:
        """Return how many seconds a socket may wait now; raise socket.timeout if none are left."""
        left = self.left()
        if left <= 0:
            raise socket.timeout
        return min(self.timeout, left, _MAX_WAIT_SECONDS)

    def connect_limits(self) -> _Limits:
        return _Limits(None, min(_MAX_CONNECT_SECONDS, self.timeout, self.left()), self._clock)

    def __str__(self) -> str:
        if self.left() <= 0:
            return f"total_timeout={self.total_timeout:.3g} s was spent"
        return f"the server was silent for timeout={self.timeout:.3g} s"


@dataclass(repr=False, eq=False)  # repr() would show the token
class _Call:
    """One call: what is sent, how often, and the answer at hand. Tests inject sleep and chance."""

    url: str
    body: bytes
    headers: dict[str, str]
    retries: RetryConfig
    limits: _Limits
    ssl_context: ssl.SSLContext | None
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform
    attempts: int = 0
    response: _Response | None = None
    is_aborted: bool = False

    def __post_init__(self) -> None:
        if self.ssl_context is not None:
            _check_type("ssl_context", self.ssl_context, (ssl.SSLContext,))

    def run(self, read: Callable[[_Response], _T]) -> _T:
        """Send, and return what `read` makes of the answer; try again as `retries` says."""
        while True:
            try:
                return read(self._send())
            except FriendliError as error:
                self.wait_for_retry(error)
            except BaseException:
                self.close()
                raise

    def _send(self) -> _Response:
        if self.limits.left() <= 0:
            raise APITimeoutError(str(self.limits))
        self.attempts += 1
        _logger.debug("POST %s: try %d, %d bytes", self.url, self.attempts, len(self.body))
        # The opener follows no redirect, which would carry the token elsewhere, and raises for no
        # status. It is made anew, so that a change of HTTP_PROXY and the like is seen.
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.ProxyHandler())
        opener.add_handler(_KeepAliveHandler(self.limits, self.ssl_context))
        request = _Request(self.url, self.body, self.headers, method="POST")
        try:
            response: _Response | None = opener.open(request)
        except (ValueError, http.client.InvalidURL):
            response = None  # and no word of the error, which may hold the proxy's password
        if response is None:
            raise ValueError("HTTP_PROXY or HTTPS_PROXY is not like http://host:port")
        self.response = response
        if self.is_aborted:
            raise APIConnectionError("closed by another thread")
        _logger.debug("POST %s: status %d after %.3f s", self.url, response.status, self.limits.elapsed())
        if response.status != http.HTTPStatus.OK:
            is_forwarded = request.proxy and request.tunnel is None
            who = f"the server, or the proxy {request.proxy}," if is_forwarded else "the server"
            error = _status_error(response, who)
            response.release()
            raise error
        return response

    def wait_for_retry(self, error: FriendliError) -> None:
        """Sleep before the next try, or raise the error if there shall be none."""
        self.close()
        self.complete_error(error)
        wait = _wait_before_retry(error, self.attempts - 1, self.retries, self.uniform)
        if wait is None or wait >= self.limits.left() or self.is_aborted:
            raise error
        _logger.info("%s: retry %d of %d in %.2f s", error, self.attempts, self.retries.max_retries, wait)
        self.sleep(wait)
        if self.is_aborted:
            raise error

    def complete_error(self, error: FriendliError) -> None:
        """Add the URL and the attempts, and take out the token, if a server has echoed it."""
        error.url = self.url
        error.attempts = self.attempts
        authorization = self.headers.get("Authorization", "")
        secret = authorization.partition(" ")[2] or authorization
        if secret:
            error.args = tuple(_redact(text, secret) for text in error.args)
            for fields in (vars(error), getattr(error, "headers", {})):
                for name, value in fields.items():
                    fields[name] = _redact(value, secret) if isinstance(value, str) else value

    def close(self) -> None:
        """Let the answer go, and its connection, unless that was released for other calls."""
        if self.response is not None:
            _logger.debug("POST %s: done after %.3f s", self.url, self.limits.elapsed())
            self.response.discard()
            self.response = None

    def abort(self) -> None:
        """Make another thread's wait for the answer end."""
        self.is_aborted = True
        response = self.response
        if response is not None:
            response.channel.abort()


def _redact(text: str, secret: str) -> str:
    for end in range(len(secret), 3, -1):  # also where the text was cut within the secret
        text = text.replace(secret[:end] + "..." * (end < len(secret)), "***")
    return text


# --- Retry decisions ---


def _wait_before_retry(
    error: FriendliError, retry: int, config: RetryConfig, uniform: Callable[[float, float], float]
) -> float | None:
    """Return the seconds to wait before retry 0, 1, ..., or None for no retry."""
    if retry >= config.max_retries or not _is_retryable(error, config):
        return None
    if isinstance(error, APIStatusError):
        asked = _retry_after(error.headers, time.time())
        if asked is not None:
            return asked if asked <= config.max_retry_after else None
    return uniform(0.0, _longest_delay(retry, config))


def _is_retryable(error: FriendliError, config: RetryConfig) -> bool:
    if isinstance(error, APIStatusError):
        return error.status_code in config.status_codes
    if isinstance(error, APITimeoutError):
        return config.retry_timeouts
    if isinstance(error, APIConnectionError):
        refused = isinstance(error.__cause__, ssl.SSLCertVerificationError)
        return config.retry_connection_errors and not refused
    return False


def _longest_delay(retry: int, config: RetryConfig) -> float:
    try:
        return min(config.max_delay, config.initial_delay * config.multiplier**retry)
    except OverflowError:
        return config.max_delay


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3), or None for nonsense."""
    for name, seconds in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", value):
            return float(value) * seconds
    try:
        date = email.utils.parsedate_tz(value)
        wait = email.utils.mktime_tz(date) - now if date else -1.0
    except (IndexError, OverflowError, TypeError, ValueError):  # email.utils, of odd dates
        return None
    return wait if wait >= 0 else None


# --- The connection ---


# For broken connections and broken HTTP; the last line is what int() and email.parser raise of it.
_TRANSPORT_ERRORS = (
    *(OSError, http.client.HTTPException),
    *(ValueError, TypeError, OverflowError, RecursionError),
)


def _connection_error(what: str, error: Exception, limits: object, advice: str = "") -> APIConnectionError:
    """Return the error that stands for one of the transport.

    That is its cause only where it cannot hold what a server has sent, and with it the token.
    """
    if isinstance(error, (socket.timeout, TimeoutError)):
        return APITimeoutError(f"{what}: {limits}{advice}")
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = f"the certificate was refused: {error.verify_message}"
        advice = "; pass ssl_context, or name a file with its CA in SSL_CERT_FILE"
    elif isinstance(error, ssl.SSLError):
        reason = f"TLS failed: {error.reason or error}"
        advice = "; see server_url and ssl_context"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, http.client.IncompleteRead):
            reason = "the connection was closed before its end"
    failure = APIConnectionError(f"{what}: {_one_line(reason)}{advice}")
    failure.__cause__ = error if isinstance(error, OSError) else None
    return failure


class _Request(urllib.request.Request):
    """A request that says which proxy it goes through; urllib's own keeps that private."""

    proxy: str | None = None
    tunnel: str | None = None  # the proxy, for https; for http it gets the request itself

    def set_proxy(self, host: str, type: str) -> None:
        self.proxy = host
        if self.type == "https":
            self.tunnel = host
        else:
            super().set_proxy(host, type)


class _KeepAliveHandler(urllib.request.BaseHandler):
    """Sends a request over an idle connection if one is alive, else over a new one."""

    def __init__(self, limits: _Limits, ssl_context: ssl.SSLContext | None) -> None:
        self._limits = limits
        self._ssl_context = ssl_context

    def http_open(self, request: _Request) -> _Response:
        return self._send(request, (request.host, None, None, None))

    def https_open(self, request: _Request) -> _Response:
        tunnel = credentials = None
        if request.tunnel is not None:
            proxy = http.client.HTTPConnection(request.tunnel)  # for its reading of host:port
            tunnel = (proxy.host, proxy.port)
            credentials = request.get_header("Proxy-authorization")
            request.remove_header("Proxy-authorization")
        try:
            context = self._ssl_context or _default_ssl_context()
        except OSError as error:  # SSLKEYLOGFILE cannot be written, for example
            raise _connection_error("cannot set up TLS", error, self._limits) from error
        return self._send(request, (request.host, tunnel, credentials, context))

    def _send(self, request: _Request, route: _Route) -> _Response:
        idle = _idle_connections.take(route)
        if idle is not None:
            sent = self._limits.elapsed()
            try:
                return self._exchange(idle, request)
            except APIConnectionError as error:
                is_late = self._limits.elapsed() - sent > _MAX_STALE_SECONDS
                is_broken = isinstance(error.__cause__, (ConnectionError, ssl.SSLError))
                if is_late or not is_broken or (idle.channel and idle.channel.received):
                    raise  # else it was closed while the request was on its way, and not even seen
        return self._exchange(_Connection(route), request)

    def _exchange(self, connection: _Connection, request: _Request) -> _Response:
        via = f" through the proxy {request.proxy}" if request.proxy else ""
        patience = f"it took over {self._limits.connect_limits().total_timeout:.3g} s"
        try:
            return connection.exchange(request, self._limits)
        except _TRANSPORT_ERRORS as error:
            if connection.channel is not None:
                failure = _connection_error(f"no answer{via}", error, self._limits)
            else:
                advice = "; see HTTP_PROXY and HTTPS_PROXY" if via else "; is it up? see server_url"
                failure = _connection_error(f"cannot connect{via}", error, patience, advice)
        raise failure  # not in the except block, whose error would become its context


class _Connection(http.client.HTTPConnection):
    """A connection that can serve many calls, one at a time."""

    def __init__(self, route: _Route) -> None:
        host, self.tunnel, self.tunnel_credentials, self.ssl_context = route
        self.default_port = http.client.HTTPS_PORT if self.ssl_context else http.client.HTTP_PORT
        super().__init__(host)
        self.response_class = _Response
        self.route = route
        self.channel: _Channel | None = None
        self.is_reusable = True
        self.idle_since = 0.0

    def exchange(self, request: _Request, limits: _Limits) -> _Response:
        """Connect if need be, send a request, and return the answer when its head is in."""
        self.channel = self.sock = self.channel or self._open_channel(limits.connect_limits())
        self.channel.limits = limits
        self.channel.received = 0
        self.channel.in_head = True
        headers = {name.title(): value for name, value in request.header_items()}
        try:
            try:
                self.request("POST", request.selector, request.data, headers)
            except ConnectionError:
                self.is_reusable = False  # but there may be an answer: 413 before all was read
            response = self.getresponse()
        except BaseException:
            self.channel.disconnect()
            raise
        assert isinstance(response, _Response)
        response.connection = self
        return response

    def _open_channel(self, limits: _Limits) -> _Channel:
        """Connect: TCP, then the proxy's tunnel, then TLS."""
        host, port = self.tunnel or (self.host, self.port)
        sock = _open_socket(host, port, limits)
        try:
            _set_options(sock)
            if self.tunnel:
                self._open_tunnel(_Channel(sock, limits), f"the proxy {host}:{port}")
            if self.ssl_context:
                sock.settimeout(limits.next_wait())
                sock = self.ssl_context.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        return _Channel(sock, limits)

    def _open_tunnel(self, channel: _Channel, who: str) -> None:
        """Have the proxy connect to the host (RFC 9110, 9.3.6), or raise its refusal."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = f"CONNECT {host}:{self.port} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
        if self.tunnel_credentials:
            head += f"Proxy-Authorization: {self.tunnel_credentials}\r\n"
        channel.sendall(f"{head}\r\n".encode("latin-1"))
        response = _Response(channel, method="CONNECT")
        response.begin()
        if response.status != http.HTTPStatus.OK:
            raise _status_error(response, who, "; see HTTPS_PROXY")

    def is_alive(self, last_response: _Response, limits: _Limits) -> bool:
        """Take in what is left of the last answer; tell whether the server keeps the connection."""
        channel = last_response.channel
        channel.limits = limits
        try:
            while last_response.read1(_PIECE_BYTES):
                pass
            is_whole = not last_response.length
            last_response.close()  # http.client sends no request before that
            return is_whole and channel.is_quiet()
        except _TRANSPORT_ERRORS:
            return False


def _open_socket(host: str, port: int, limits: _Limits) -> socket.socket:
    """Connect to the first address that accepts, within the limits for all of them."""
    failure = OSError("the name has no address")
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            return socket.create_connection((str(address[0]), port), limits.next_wait())
        except OSError as error:
            failure = error
    raise failure


def _set_options(sock: socket.socket) -> None:
    """Send without delay, and show middleboxes a sign of life through a long silence."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):  # Linux, macOS, both
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _KEEP_ALIVE_SECONDS)


class _Channel(io.RawIOBase):
    """A socket as http.client uses it, where no send or receive waits longer than the limits allow."""

    def __init__(self, sock: socket.socket, limits: _Limits) -> None:
        self._sock = sock
        self.limits = limits
        self.received = 0  # bytes since the request, or since the last piece of a body
        self.in_head = True

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # each piece that the server takes is a sign of life
            self._set_timeout()
            view = view[self._sock.send(view[:_PIECE_BYTES]) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._set_timeout()
        count = self._sock.recv_into(buffer)
        if not count and self.in_head:  # which http.client would take for the end of the head
            raise http.client.RemoteDisconnected("the connection was closed before an answer")
        self.received += count
        if self.received > _MAX_FRAMING_BYTES:
            raise http.client.HTTPException(f"over {_MAX_FRAMING_BYTES} bytes of headers or trailers")
        return count

    def _set_timeout(self) -> None:
        seconds = self.limits.next_wait()
        if seconds != self._sock.gettimeout():  # setting it costs a system call
            self._sock.settimeout(seconds)

    def is_quiet(self) -> bool:
        """Tell whether the server has neither closed nor sent what nobody asked for."""
        self._sock.settimeout(0)
        try:
            self._sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):  # after TLS session tickets, too
            return True
        return False

    def close(self) -> None:
        """Do nothing: http.client closes its file after each answer, but the socket lives on."""

    def disconnect(self) -> None:
        self._sock.close()

    def abort(self) -> None:
        """End another thread's wait."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class _Response(http.client.HTTPResponse):
    """An answer whose body is still to be read, and what becomes of its connection then."""

    connection: _Connection
    is_released = False

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.channel: _Channel = sock

    def begin(self) -> None:
        """Read the head, behind all interim answers: http.client passes over 100, but not 103."""
        super().begin()
        while self.status // 100 == 1 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            vars(self)["headers"] = None  # or begin() would not begin again
            super().begin()
        self.channel.in_head = False

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the body as they arrive; raise APIConnectionError unless it is whole."""
        failure = None
        try:
            while True:
                piece = self.read1(_PIECE_BYTES)
                if self.chunked and (self.chunk_left or 0) < 0:  # which http.client takes
                    raise ValueError("a chunk has a size below 0")
                if not piece:
                    break
                self.channel.received = 0
                yield piece
        except _TRANSPORT_ERRORS as error:
            failure = _connection_error("the answer broke off", error, self.channel.limits)
        if failure is not None:
            raise failure
        if self.length:  # read1() takes a closed connection for the end
            raise APIConnectionError(f"the answer was cut, {self.length} bytes before its end")

    def release(self) -> None:
        """Leave the connection to other calls, when the answer was read to its end or its [DONE]."""
        self.is_released = True
        if self.will_close or not self.connection.is_reusable:
            self.channel.disconnect()
        else:
            _idle_connections.put(self.connection, self)

    def discard(self) -> None:
        """Close the connection, unless it was left to other calls."""
        if not self.is_released:
            self.close()
            self.channel.disconnect()


class _IdleConnections:
    """The open connections that serve no call, with their last answers, the longest idle first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self._idle: list[tuple[_Connection, _Response]] = []

    def put(self, connection: _Connection, last_response: _Response) -> None:
        connection.idle_since = self.clock()
        with self.lock:
            self._idle.append((connection, last_response))
            self._close_old()

    def take(self, route: _Route) -> _Connection | None:
        """Return the connection of this route that was used last, if any is alive."""
        limits = _Limits(None, _MAX_DRAIN_SECONDS)
        while True:
            with self.lock:
                self._close_old()
                entry = next((entry for entry in reversed(self._idle) if entry[0].route == route), None)
                if entry is None:
                    return None
                self._idle.remove(entry)
            connection, last_response = entry
            if connection.is_alive(last_response, limits):
                return connection
            last_response.channel.disconnect()

    def _close_old(self) -> None:
        oldest = self.clock() - _MAX_IDLE_SECONDS
        while self._idle[:-_MAX_IDLE_CONNECTIONS] or (self._idle and self._idle[0][0].idle_since < oldest):
            self._idle.pop(0)[1].channel.disconnect()

    def close(self) -> None:
        with self.lock:
            while self._idle:
                self._idle.pop()[1].channel.disconnect()

    def forget_after_fork(self) -> None:
        """In a child after a fork, drop the parent's connections, which stay open there, and its lock."""
        self.lock = threading.Lock()
        self.close()


_idle_connections = _IdleConnections()


def _default_ssl_context() -> ssl.SSLContext:
    with _idle_connections.lock:
        return _build_ssl_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=1)
def _build_ssl_context(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """Read the system's CAs, which takes 20 ms; OpenSSL looks at the two variables by itself."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


atexit.register(_idle_connections.close)
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows does not fork
    os.register_at_fork(after_in_child=_idle_connections.forget_after_fork)


# --- Reading the answer ---


def _status_error(response: _Response, who: str, advice: str = "") -> APIStatusError:
    """Read an answer other than 200 into an error."""
    page = _read_page(response)
    message = _server_message(page)
    headers = {name.lower(): value for name, value in response.headers.items()}
    text = _one_line(f"{who} answered {response.status} {response.reason}")
    if "location" in headers:
        text += f", a redirect to {_one_line(headers['location'])} that is not followed; see server_url"
    if message:
        text += f": {message}"
    if "retry-after" in headers:
        text += f" (Retry-After: {_one_line(headers['retry-after'])})"
    text += advice or _ADVICE.get(response.status, "")
    return APIStatusError(text, response.status, headers, page, message)


_ADVICE = {
    401: "; see token and FRIENDLI_TOKEN",
    403: "; see token and FRIENDLI_TOKEN",
    404: "; see model and server_url",
    407: "; see HTTP_PROXY and HTTPS_PROXY",
    429: "; send less at a time, or raise retries",
}


def _read_page(response: _Response) -> str:
    """Return the start of a body that is no completion; what breaks it is not worth an error."""
    page = b""
    try:
        for piece in response.pieces():
            page += piece
            if len(page) >= _MAX_PAGE_BYTES:
                break
    except APIConnectionError:
        response.will_close = True
    return page[:_MAX_PAGE_BYTES].decode("utf-8", "replace")


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
    words = "".join(c if c.isprintable() else " " for c in text[: 8 * _MAX_QUOTED_CHARACTERS]).split()
    line = " ".join(words)
    return line if len(line) <= _MAX_QUOTED_CHARACTERS else line[:_MAX_QUOTED_CHARACTERS] + "..."


def _expect(media_type: str, response: _Response) -> None:
    """Refuse an answer that says that it is something else, as a login page does."""
    found = response.headers.get("Content-Type", media_type).partition(";")[0].strip().lower()
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if found != media_type or encoding != "identity":
        page = _read_page(response)
        encoded = "" if encoding == "identity" else f" in {encoding}, which was not asked for"
        text = f"the answer is {found}{encoded}, not {media_type}; see server_url: "
        raise APIResponseError(_one_line(text + _server_message(page)), page)


def _read_completion(response: _Response) -> Completion:
    _expect(_JSON_TYPE, response)
    body = bytearray()
    for piece in response.pieces():
        body += piece
        if len(body) > _MAX_COMPLETION_BYTES:
            raise APIResponseError(f"the answer has over {_MAX_COMPLETION_BYTES} bytes")
    completion = _parse(body, _completion)
    response.release()
    return completion


def _retry_until_first(call: _Call, chunks: _ChunkGenerator) -> _ChunkGenerator:
    """Yield the chunks of an answer; until the first of them the call may be tried again."""
    try:
        while True:
            try:
                first = next(chunks, None)
                break
            except FriendliError as error:
                call.wait_for_retry(error)
                chunks = call.run(_open_chunks)
        if first is not None:
            yield first
            yield from chunks
    except FriendliError as error:
        call.complete_error(error)
        raise
    finally:
        call.close()


def _open_chunks(response: _Response) -> _ChunkGenerator:
    _expect(_EVENT_STREAM_TYPE, response)
    return _read_chunks(response)


def _read_chunks(response: _Response) -> _ChunkGenerator:
    for event, data in _read_events(response.pieces()):
        if event == "error":
            raise _error_in_answer(data)
        yield _parse(data, _chunk)
    response.release()


def _read_events(pieces: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the event and data of each server-sent event, up to [DONE].

    A field named "error" (older llama.cpp) is yielded as an event of that name. The rules quoted are of
    https://html.spec.whatwg.org/multipage/server-sent-events.html, "Interpreting an event stream".

    Raises:
        APIConnectionError: the bytes ended before [DONE].
        APIResponseError: over 16 MiB came without an event.
    """
    event = ""
    data: list[bytes] = []
    size = 0
    for lines in _read_lines(pieces):
        size += sum(map(len, lines), len(lines))
        for line in lines:
            if not line:
                # Beyond "If the data buffer is an empty string, ... return": blank data, seen as a sign
                # of life, is no event, but an error without data is one.
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
            # "Otherwise: The field is ignored." A comment has an empty name, and is ignored, too.
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


# --- From JSON to dataclasses: ValueError for what is wrong, which _parse() makes an APIResponseError ---


def _parse(data: bytes | bytearray, build: Callable[[dict[str, Any]], _T]) -> _T:
    try:
        text = data.decode().strip()
        raw, end = _decoder.raw_decode(text)
        if end != len(text) or not isinstance(raw, dict):
            raise ValueError("it is not one object")
        if raw.get("error") is None:
            return build(raw)
        failure = _error_in_answer(data)
    except (ValueError, RecursionError) as error:
        page = data[:_MAX_PAGE_BYTES].decode("utf-8", "replace")
        failure = APIResponseError(_one_line(f"the answer is no completion: {error}: {page}"), page)
    raise failure  # not in the except block, whose error would become its context


def _error_in_answer(payload: bytes | bytearray) -> APIResponseError:
    text = payload.decode("utf-8", "replace")
    return APIResponseError(f"the server failed after it had answered 200: {_server_message(text)}", text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def _completion(raw: dict[str, Any]) -> Completion:
    choices = []
    for choice in _choices(raw):
        reason = _finish_reason(choice)
        logprobs = _optional(Logprobs, choice.get("logprobs"))
        tokens = choice.get("tokens") or []
        seed = choice.get("seed")
        choices.append(CompletionChoice(choice.get("index"), _text(choice), seed, reason, tokens, logprobs))
    usage = _optional(Usage, raw.get("usage"))
    return Completion(raw.get("id"), raw.get("object"), choices, usage, raw.get("model"), raw)


def _chunk(raw: dict[str, Any]) -> CompletionChunk:
    choices = []
    for choice in _choices(raw):
        reason = _finish_reason(choice)
        logprobs = _optional(Logprobs, choice.get("logprobs"))
        choices.append(ChunkChoice(choice.get("index"), _text(choice), choice.get("token"), reason, logprobs))
    usage = _optional(Usage, raw.get("usage"))
    return CompletionChunk(raw.get("id"), raw.get("object"), choices, raw.get("created"), usage, raw)


def _choices(raw: dict[str, Any]) -> list[dict[str, Any]]:
    choices = raw.get("choices")
    if not isinstance(choices, list):
        raise ValueError("it has no list of choices")
    for choice in choices:
        if not isinstance(choice, dict):
            raise ValueError("a choice is no object")
    return choices


def _text(choice: dict[str, Any]) -> str:
    """Return the text, which only the end of a choice may lack."""
    text = choice.get("text")
    if isinstance(text, str):
        return text
    if text is None and _finish_reason(choice):
        return ""
    raise ValueError("a choice has no text")


def _finish_reason(choice: dict[str, Any]) -> str | None:
    """Return the reason; for none yet, "null" and "" were seen beside null."""
    reason = choice.get("finish_reason")
    if reason is None or reason in ("null", ""):
        return None
    if not isinstance(reason, str):
        raise ValueError("a finish_reason is no string")
    return reason


def _optional(kind: type[_T], value: Any) -> _T | None:
    """Return an object as the dataclass that it is, or None where there is none."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{kind.__name__} is no object")
    known = kind.__annotations__
    return kind(**{name: item for name, item in value.items() if name in known and item is not None})


# --- The command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0, 1 (failed), 2 (wrong usage) or 130 (Ctrl-C)."""
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
    except FriendliError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader has enough; what is buffered must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _complain(f"cannot read or write: {error}")
    except KeyboardInterrupt:
        return 130
    return 0


def _complain(text: str) -> int:
    if sys.stderr is not None:  # closed; print() would turn to stdout
        print(f"friendli_lite: {text}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    import argparse  # not needed by those who import this module

    parser = argparse.ArgumentParser(
        prog="friendli_lite",
        usage="%(prog)s [options] [PROMPT]",
        add_help=False,
        description="Print a completion. FRIENDLI_SERVER_URL and FRIENDLI_TOKEN are obeyed.",
        epilog="examples:\n"
        '  friendli_lite --max-tokens 16 "Say this is a test!"\n'
        "  friendli_lite --set 'stop=[\"\\n\"]' --json < prompt.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("arguments").add_argument
    add("prompt", nargs="?", default="-", metavar="PROMPT", help="the text to complete; -: read stdin")
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
    add("--version", action="version", version=f"friendli_lite {__version__}", help="print the version")
    add("-h", "--help", action="help", help="print this help")
    return parser


def _print_completion(options: argparse.Namespace) -> None:
    body = _body_fields(options)
    arguments = {
        "server_url": options.server_url,
        "timeout": options.timeout,
        "total_timeout": options.total_timeout,
        "retries": options.retries,
    }
    if options.no_stream:
        completion = complete(body, **arguments)
        print(json.dumps(completion.raw) if options.json else completion.text, flush=True)
        return
    with stream(body, **arguments) as chunks:
        for chunk in chunks:
            if options.json:
                print(json.dumps(chunk.raw), flush=True)
            elif chunk.choices and not chunk.choices[0].index:  # of several choices, the first
                print(chunk.text, end="", flush=True)
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
    sys.exit(main())
