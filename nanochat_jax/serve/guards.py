"""What a request must pass before its route: the name it was sent to, and the size of its body."""

import asyncio
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.serve.errors import ApiError

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
CLOSE = {"Connection": "close"}  # what is left of the body would be taken for the next request
HEAR_OUT = 64  # times the limit is read, and thrown away, before the connection is cut


class HostCheck:
    """Refuses names of other machines, by which a web page could reach a server that is only meant
    for this one (DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = re.sub(r":\d*$", "", Headers(scope=scope).get("host", "")).lower()
            if host not in self.hosts:
                message = "this server is not known by that name; see --allowed-hosts"
                await ApiError(403, message, code="unknown_host").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Reads the whole body before the route runs: no more than so many bytes, in so much time."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.seconds):
                body = await self._read(Headers(scope=scope), receive)
        except TimeoutError:
            message = f"the body did not arrive within {self.seconds} seconds"
            await ApiError(408, message, headers=CLOSE).response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except ClientGone:
            pass
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        announced = headers.get("content-length", "")
        is_too_large = announced.isdigit() and int(announced) > self.max_bytes
        if is_too_large and headers.get("expect", "").lower() == "100-continue":
            raise self._too_large()  # it asked before sending
        body = bytearray()
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size <= self.max_bytes:
                body += chunk
            # Many clients only listen for an answer when they have sent all; hear them out.
            if not message.get("more_body", False) or size > HEAR_OUT * self.max_bytes:
                break
        if size > self.max_bytes:
            raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than the {self.max_bytes:,} bytes that are allowed here"
        return ApiError(413, message, code="body_too_large", headers=CLOSE)


class ClientGone(Exception):
    """The connection ended before the body did."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, then whatever follows."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
