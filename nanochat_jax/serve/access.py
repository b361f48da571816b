"""Who may ask, and how often: API keys and a token bucket for each."""

import hashlib
import hmac
import math
import os
import time
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat_jax.serve.errors import ApiError
from nanochat_jax.serve.observe import record_of

KEYS_VARIABLE = "NANOCHAT_API_KEYS"
# What answers without a key: the page, which asks for one, and what tells of the server's health.
PUBLIC = ("/", "/health", "/ready", "/openapi.json", "/favicon.ico")
PUBLIC_FOLDER = "/static/"
MAX_BUCKETS = 10_000


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


class ApiKeys:
    """Compares in constant time: hashes of equal length, and always with every key."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def name_of(self, given: bytes) -> str | None:
        """The short hash of a key, which the log may show; None for one that is not accepted."""
        digest = hashlib.sha256(given).digest()
        found = [hmac.compare_digest(digest, known) for known in self._hashes]
        return digest.hex()[:8] if any(found) else None


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
        self._forget_full(now)
        return 0

    def _forget_full(self, now: float) -> None:
        if len(self._buckets) > MAX_BUCKETS:
            recent = {name: b for name, b in self._buckets.items() if now - b[1] < 60}
            self._buckets = recent


class Gate:
    """Lets through who has a key and does not ask too often; public addresses always."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, rate: RateLimit) -> None:
        self.app, self.keys, self.rate = app, keys, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else "/"
        if path not in PUBLIC and not path.startswith(PUBLIC_FOLDER):
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if self.keys:
            record_of(scope).key = name = self._name(Headers(scope=scope).get("authorization", ""))
        else:
            name = (scope.get("client") or ("",))[0]
        if scope["method"] == "POST" and (seconds := self.rate.wait_for(name, time.monotonic())):
            message = f"more than {self.rate.per_minute} requests a minute; wait {seconds} s"
            headers = {"Retry-After": str(seconds)}
            raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    def _name(self, authorization: str) -> str:
        scheme, _, key = authorization.partition(" ")
        name = self.keys.name_of(key.strip().encode("latin-1"))  # as HTTP headers are decoded
        if scheme.lower() != "bearer" or name is None:
            message = "this server needs an API key: send it as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        return name
