"""What both endpoints share in answering: waiting for a generation, whole or as an event stream,
while watching whether the client is still there."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat_jax.serve.conversation import Piece
from nanochat_jax.serve.errors import GONE, INTERNAL, ApiError, unavailable
from nanochat_jax.serve.generation import Generation
from nanochat_jax.serve.observe import record_of
from nanochat_jax.serve.service import Service

type Json = dict[str, Any]


@dataclass(frozen=True)
class Envelope:
    """What every object of one reply begins with."""

    prefix: str
    object: str
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[Json], kind: str = "", **more: Any) -> Json:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.object + kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


@asynccontextmanager
async def running(
    service: Service, generation: Generation, scope: Scope, receive: Receive
) -> AsyncIterator[None]:
    """Ends the generation with the block, or as soon as the client has gone."""
    record = record_of(scope)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        record.gone = True
        generation.cancel()

    watcher = asyncio.create_task(watch())
    service.running.add(generation)
    try:
        yield
    finally:
        watcher.cancel()
        generation.cancel()
        service.running.discard(generation)
        usage = generation.usage
        record.prompt_tokens, record.completion_tokens = usage.prompt, usage.completion
        service.metrics.request_took(time.monotonic() - generation.arrived)


def check_finish(reason: str | None, service: Service) -> None:
    """ApiError for an answer that ended otherwise than by the model."""
    if reason == "error":
        raise INTERNAL
    if reason == "cancelled":
        if service.draining:
            raise unavailable("the server was shut down", "shutting_down", retry_after=10)
        raise ApiError(GONE, "the client has gone")


async def whole_answer(service: Service, generation: Generation) -> list[tuple[list[Piece], str]]:
    """The pieces of every choice, and why it ended."""
    pieces: list[list[Piece]] = [[] for _ in range(generation.n_choices)]
    finish = [""] * len(pieces)
    async for update in generation.updates():
        check_finish(update.finish, service)
        pieces[update.choice] += update.pieces
        finish[update.choice] = update.finish or ""
    return list(zip(pieces, finish, strict=True))


class EventStream(Response):
    """Server-sent events made of JSON objects, ended by [DONE]; an error after the start is one."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, generation: Generation, events: AsyncIterator[Mapping[str, Any]]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._generation, self._events = service, generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with running(self._service, self._generation, scope, receive):
            await send(start)
            await self._send_events(_writer(send))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, write: Callable[[str], Awaitable[None]]) -> None:
        try:
            async for event in self._events:
                await write(_json(event))
        except ApiError as error:
            await write(_json(error.body()))
        else:
            await write("[DONE]")


def _writer(send: Send) -> Callable[[str], Awaitable[None]]:
    async def write(data: str) -> None:
        body = f"data: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})

    return write


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
