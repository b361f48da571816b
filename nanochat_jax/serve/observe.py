"""Around every request: an id, headers, a line in the log, a count, and an answer when we fail.

Plain ASGI, as in guards.py: Starlette's BaseHTTPMiddleware would hide from a route that its client
has gone.
"""

import json
import logging
import re
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.serve.errors import GONE, INTERNAL
from nanochat_jax.serve.metrics import Metrics

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
            await INTERNAL.response()(scope, receive, with_headers)
        finally:
            status = status or GONE
            self.metrics.requests.labels(_route(scope), status).inc()
            if self.log:
                _write_line(scope, record, status, time.monotonic() - began)


def _route(scope: Scope) -> str:
    """The pattern of the address, of which there are few, unlike addresses."""
    route = scope.get("route")
    return getattr(route, "path", "none")


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
    with suppress(OSError):  # nobody reads it any more, or the disk is full
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
