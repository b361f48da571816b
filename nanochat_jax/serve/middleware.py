"""What a request passes before its route: the log, the host's name, API keys, rates and sizes."""

import asyncio
import hashlib
import hmac
import json
import logging
import math
import os
import re
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.serve.errors import GONE, ApiError, internal_error
from nanochat_jax.serve.metrics import Metrics

KEYS_VARIABLE = "NANOCHAT_API_KEYS"
# What needs no key: the page, which asks for one, and the health of the server.
PUBLIC = ("/", "/health", "/ready", "/openapi.json", "/favicon.ico")
PUBLIC_FOLDER = "/static/"
MAX_BUCKETS = 10_000
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
CLOSE = {"Connection": "close"}  # what is left of the body would be taken for the next request
HEAR_OUT = 64  # times the limit is read, and thrown away, before the connection is cut


# --- around every request: an id, headers, a line in the log, a count, and an answer --------------

# Nothing but our own files: neither other hosts, nor inline code, nor frames.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = logging.getLogger(__name__)


@dataclass
class Record:
    """What is known of a request when it has ended; routes add to it."""

    request_id: str
    key: str | None = None  # the short hash of its API key
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    gone: bool = False  # the client left before the end


def record_of(scope: Scope) -> Record:
    return scope["state"]["record"]


class Observe:
    """Gives every request an id, counts it, and writes one line of JSON when it has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics, log: bool) -> None:
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if SANE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        began, status = time.monotonic(), None

        async def with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception:
            if status is not None:
                raise  # too late for another answer: the connection is cut
            log.exception("request %s failed", record.request_id)
            await internal_error().response()(scope, receive, with_headers)
        finally:
            status = status or GONE
            # The pattern of the address, of which there are few, unlike addresses.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            if self.log:
                _write_line(scope, record, status, time.monotonic() - began)


def _write_line(scope: Scope, record: Record, status: int, seconds: float) -> None:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": record.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(seconds * 1000, 1),
        "key": record.key,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
    }
    if record.gone:
        line["gone"] = True
    with suppress(OSError):  # the reader has gone, or the disk is full
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


# --- what may refuse a request ------------------------------------------------------------------


class Check:
    """Lets an HTTP request pass, or answers it with the ApiError that `check` raises."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                receive = await self.check(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        """What the application is to receive from."""
        raise NotImplementedError


class HostCheck(Check):
    """Refuses names of other machines, by which a web page could reach a server that is only meant
    for this one (DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        super().__init__(app)
        self.hosts = {host.lower() for host in hosts}

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        if re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower() not in self.hosts:
            message = "this server is not known by that name; see --allowed-hosts"
            raise ApiError(403, message, code="unknown_host")
        return receive


class Gate(Check):
    """Lets through who has a key and does not ask too often; public addresses always.

    Keys are compared in constant time: hashes of equal length, and always with every key.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], per_minute: int) -> None:
        super().__init__(app)
        self.rate = RateLimit(per_minute)
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        path = scope["path"]
        if path in PUBLIC or path.startswith(PUBLIC_FOLDER):
            return receive
        if self._hashes:
            record_of(scope).key = name = self._name(Headers(scope=scope).get("authorization", ""))
        else:
            name = (scope.get("client") or ("",))[0]
        if scope["method"] == "POST" and (seconds := self.rate.wait_for(name, time.monotonic())):
            message = f"more than {self.rate.per_minute} requests a minute; wait {seconds} s"
            headers = {"Retry-After": str(seconds)}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)
        return receive

    def _name(self, authorization: str) -> str:
        """The short hash of a key, which the log may show; ApiError 401 for any other."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()  # as headers are decoded
        found = [hmac.compare_digest(digest, known) for known in self._hashes]
        if scheme.lower() != "bearer" or not any(found):
            message = "this server needs an API key: send it as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        return digest.hex()[:8]


def read_keys(path: str) -> tuple[str, ...]:
    """Keys of a file (one a line, lines with # are comments) and of the environment (commas).

    ValueError for a file that holds none.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if path:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        in_file = [line.strip() for line in lines if not line.startswith("#")]
        if not any(in_file):
            raise ValueError(f"{path} holds no API key; write one a line, or leave out the file")
        keys += in_file
    return tuple(dict.fromkeys(key for key in keys if key))


class RateLimit:
    """A bucket of `per_minute` requests for every name, which fills again within a minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # name: requests left, when

    def wait_for(self, name: str, now: float) -> int:
        """0 and one request less in the bucket, or the seconds until there is one again."""
        if not self.per_minute:
            return 0
        left, then = self._buckets.get(name, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        if left < 1:
            return math.ceil((1 - left) * 60 / self.per_minute)
        self._buckets[name] = left - 1, now
        if len(self._buckets) > MAX_BUCKETS:  # those that are full again are as good as forgotten
            self._buckets = {name: b for name, b in self._buckets.items() if now - b[1] < 60}
        return 0


class BodyLimit(Check):
    """Reads the whole body before the route runs: no more than so many bytes, in so much time."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        super().__init__(app)
        self.max_bytes, self.seconds = max_bytes, seconds

    async def check(self, scope: Scope, receive: Receive) -> Receive:
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(Headers(scope=scope), receive)
        except TimeoutError:
            message = f"the body did not arrive within {self.seconds} seconds"
            raise ApiError(408, message, headers=CLOSE) from None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        return replay

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        message = f"the body is larger than the {self.max_bytes:,} bytes that are allowed here"
        too_large = ApiError(413, message, code="body_too_large", headers=CLOSE)
        announced = headers.get("content-length", "")
        is_too_large = announced.isdigit() and int(announced) > self.max_bytes
        if is_too_large and headers.get("expect", "").lower() == "100-continue":
            raise too_large  # it asked before sending
        body, size, more = bytearray(), 0, True
        # Many clients only listen for an answer when they have sent all; hear them out.
        while more and size <= HEAR_OUT * self.max_bytes:
            part = await receive()
            if part["type"] == "http.disconnect":
                raise ApiError(GONE, "the client has gone")
            chunk, more = part.get("body", b""), part.get("more_body", False)
            size += len(chunk)
            if size <= self.max_bytes:
                body += chunk
        if size > self.max_bytes:
            raise too_large
        return bytes(body)
