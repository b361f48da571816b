"""One HTTP request's work on the scheduler: events of its thread become updates in the event loop.

The scheduler's thread never waits for a client: it hands over what it drew, and a client that reads
slowly finds it in a queue, whose length the limit on new tokens bounds.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat_jax.engine.requests import Event, Finished, Full, Request, Token
from nanochat_jax.engine.scheduler import Scheduler, Ticket
from nanochat_jax.serve.errors import GONE, INTERNAL, ApiError, bad_request, unavailable
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.serve.middleware import record_of
from nanochat_jax.serve.service import Service
from nanochat_jax.serve.text import AnswerReader, TextPiece
from nanochat_jax.tokenizer import Tokenizer


class Update(NamedTuple):
    """What happened to one choice: more text, and why it ended if it did."""

    choice: int
    pieces: list[TextPiece]
    finish: str | None  # "stop", "length", "cancelled", "error"


@dataclass
class Choice:
    """A sample as the client sees it."""

    reader: AnswerReader
    began: float = 0.0  # when its first token came
    last: float = 0.0
    tokens: int = 0
    finish: str | None = None


@dataclass
class Usage:
    """Tokens of a whole HTTP request."""

    prompt: int
    completion: int = 0
    cached: int = 0

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(eq=False)
class Generation:
    """The prompts of one HTTP request under way; choice p·n + s is sample s of prompt p.

    `start` it, read `updates`, and in any case `cancel` it in the end.
    """

    scheduler: Scheduler
    requests: Sequence[Request]
    tokenizer: Tokenizer
    stops: Sequence[str]
    metrics: Metrics
    arrived: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(request.prompt) for request in self.requests))
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        n = self.requests[0].n
        self._choices = [
            Choice(AnswerReader(self.tokenizer, self.stops)) for _ in range(n * len(self.requests))
        ]

    @property
    def n_choices(self) -> int:
        return len(self._choices)

    def start(self) -> None:
        """Queues all prompts or none; ApiError 400 or 429."""
        try:
            for index, request in enumerate(self.requests):
                listener = partial(self._hand_over, index * request.n)
                self._tickets.append(self.scheduler.submit(request, listener))
        except Full:
            self.cancel()
            message = "the server has as many requests as it can queue; try again a little later"
            headers = {"Retry-After": str(self.metrics.retry_after())}
            raise ApiError(429, message, code="queue_full", headers=headers) from None
        except ValueError as error:
            self.cancel()
            raise bad_request(str(error)) from None

    def cancel(self) -> None:
        """Frees the slots of what still runs; may be called at any time, and again."""
        for ticket in self._tickets:
            self.scheduler.cancel(ticket)

    def _hand_over(self, first_choice: int, events: list[Event]) -> None:
        """Called by the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (first_choice, events))

    async def updates(self) -> AsyncIterator[Update]:
        """Every change of a choice, until all have ended."""
        while any(choice.finish is None for choice in self._choices):
            first_choice, events = await self._events.get()
            for update in self._digest(first_choice, events):
                yield update
        self.cancel()  # samples beyond their stop string

    def _digest(self, first_choice: int, events: list[Event]) -> list[Update]:
        """Updates of the choices that these events are about, one for each."""
        pieces: dict[int, list[TextPiece]] = {}
        for event in events:
            index = first_choice + event.sample
            if self._choices[index].finish is not None:
                continue  # a sample goes on after its stop string, until all have ended
            found = pieces.setdefault(index, [])
            if isinstance(event, Token):
                found += self._add(self._choices[index], event)
            else:
                found += self._end(self._choices[index], event)
        self.metrics.speed.add(sum(isinstance(event, Token) for event in events))
        return [
            Update(index, merge(found), self._choices[index].finish)
            for index, found in pieces.items()
            if found or self._choices[index].finish
        ]

    def _add(self, choice: Choice, token: Token) -> list[TextPiece]:
        now = time.monotonic()
        if not choice.tokens:
            choice.began = now
            self.metrics.time_to_first_token.observe(now - self.arrived)
        choice.last = now
        choice.tokens += 1
        self.usage.completion += 1
        pieces = choice.reader.add(token)
        if choice.reader.stopped:
            self._close(choice, "stop")
        return pieces

    def _end(self, choice: Choice, finished: Finished) -> list[TextPiece]:
        if finished.sample == 0:
            self.usage.cached += finished.cached_tokens
        self._close(choice, finished.reason)
        return choice.reader.finish()

    def _close(self, choice: Choice, reason: str) -> None:
        choice.finish = reason
        if choice.tokens > 1:
            mean = (choice.last - choice.began) / (choice.tokens - 1)
            self.metrics.time_per_token.observe(mean)


def merge(pieces: Sequence[TextPiece]) -> list[TextPiece]:
    """Neighbours of one type as one piece: a chunk of tokens is one message to the client."""
    merged: list[TextPiece] = []
    for piece in pieces:
        if merged and merged[-1].type == piece.type:
            last = merged.pop()
            piece = TextPiece(piece.type, last.text + piece.text, last.tokens + piece.tokens)
        merged.append(piece)
    return merged


# --- What both endpoints share in answering: waiting for a generation, whole or as an ---

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
    service.running.add(generation.cancel)
    try:
        yield
    finally:
        watcher.cancel()
        generation.cancel()
        service.running.discard(generation.cancel)
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


async def whole_answer(
    service: Service, generation: Generation
) -> list[tuple[list[TextPiece], str]]:
    """The pieces of every choice, and why it ended."""
    pieces: list[list[TextPiece]] = [[] for _ in range(generation.n_choices)]
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
