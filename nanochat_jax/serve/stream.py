"""From the scheduler's thread to the client: the text of running answers, as server-sent events.

The scheduler's thread never waits for a client: it puts its events into a queue, whose length the
limit on new tokens bounds, and a client that reads slowly finds them there.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanochat_jax.engine.requests import Event, Finished, Full, Request, Token
from nanochat_jax.engine.scheduler import RequestState
from nanochat_jax.serve.errors import GONE, ApiError, bad_request, internal_error, unavailable
from nanochat_jax.serve.middleware import record_of
from nanochat_jax.serve.service import Service
from nanochat_jax.serve.text import AnswerReader, TextPiece, merge

type Json = dict[str, Any]


class Update(NamedTuple):
    """What happened to one choice: more text, and why it ended if it did."""

    choice: int
    pieces: list[TextPiece]
    finish: str | None  # "stop" or "length"


@dataclass
class Choice:
    """A sample as the client sees it."""

    reader: AnswerReader
    began: float = 0.0  # when its first token came
    last: float = 0.0
    tokens: int = 0
    finish: str | None = None


class Generation:
    """The answers to one HTTP request; choice p·n + s is sample s of prompt p.

    `start` it, then read `updates` or the `whole` within `running`, which always frees its slots.
    """

    def __init__(self, service: Service, requests: Sequence[Request], stop: Sequence[str]) -> None:
        self.service, self._requests = service, requests
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.completion_tokens = self._cached_tokens = 0
        self._arrived = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, list[Event]]] = asyncio.Queue()
        self._tickets: list[RequestState] = []
        n = requests[0].n * len(requests)
        self.choices = [Choice(AnswerReader(service.tokenizer, stop)) for _ in range(n)]

    def start(self) -> None:
        """Queues all prompts or none; ApiError 400, 429 or 503."""
        if self.service.draining:
            raise unavailable("the server is shutting down", "shutting_down", retry_after=10)
        if self.service.worker.phase == "failed":
            message = "the engine has failed and must be restarted"
            raise unavailable(message, "failed", retry_after=60)
        try:
            for index, request in enumerate(self._requests):
                listener = partial(self._hand_over, index * request.n)
                self._tickets.append(self.service.scheduler.submit(request, listener))
        except Full:
            self.cancel()
            message = "the server has as many requests as it can queue; try again a little later"
            headers = {"Retry-After": str(self.service.metrics.retry_after())}
            raise ApiError(429, message, code="queue_full", headers=headers) from None
        except ValueError as error:
            self.cancel()
            raise bad_request(str(error)) from None

    def cancel(self) -> None:
        """Frees the slots of what still runs; may be called at any time, and again."""
        for ticket in self._tickets:
            self.service.scheduler.cancel(ticket)

    @asynccontextmanager
    async def running(self, scope: Scope, receive: Receive) -> AsyncIterator[None]:
        """Ends the generation with the block, or as soon as the client has gone."""
        record = record_of(scope)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            record.gone = True
            self.cancel()

        watcher = asyncio.create_task(watch())
        self.service.running.add(self.cancel)
        try:
            yield
        finally:
            watcher.cancel()
            self.cancel()
            self.service.running.discard(self.cancel)
            record.prompt_tokens = self.prompt_tokens
            record.completion_tokens = self.completion_tokens
            self.service.metrics.request_took(time.monotonic() - self._arrived)

    async def updates(self) -> AsyncIterator[Update]:
        """Every change of a choice, until all have ended; ApiError where the model did not end it.

        One update may hold many tokens: all that a choice got in one round of the scheduler.
        """
        while any(choice.finish is None for choice in self.choices):
            first_choice, events = await self._events.get()
            for update in self._digest(first_choice, events):
                self._check_finish(update.finish)
                yield update
        self.cancel()  # samples beyond their stop string

    async def whole(self) -> list[Update]:
        """All updates of every choice as one."""
        pieces: list[list[TextPiece]] = [[] for _ in self.choices]
        async for update in self.updates():
            pieces[update.choice] += update.pieces
        return [Update(i, pieces[i], choice.finish) for i, choice in enumerate(self.choices)]

    def usage(self) -> Json:
        """The tokens of this HTTP request so far, as OpenAI writes them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _hand_over(self, first_choice: int, events: list[Event]) -> None:
        """Called by the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (first_choice, events))

    def _digest(self, first_choice: int, events: list[Event]) -> list[Update]:
        """Updates of the choices that these events are about, one for each."""
        pieces: dict[int, list[TextPiece]] = {}
        for event in events:
            choice = self.choices[first_choice + event.sample]
            if choice.finish is not None:
                continue  # a sample continues after its stop string, until all have ended
            found = pieces.setdefault(first_choice + event.sample, [])
            found += (
                self._add(choice, event) if isinstance(event, Token) else self._end(choice, event)
            )
        self.service.metrics.count_tokens(sum(isinstance(event, Token) for event in events))
        return [
            Update(index, merge(found), self.choices[index].finish)
            for index, found in pieces.items()
            if found or self.choices[index].finish
        ]

    def _add(self, choice: Choice, token: Token) -> list[TextPiece]:
        choice.last = time.monotonic()
        if not choice.tokens:
            choice.began = choice.last
            self.service.metrics.time_to_first_token.observe(choice.began - self._arrived)
        choice.tokens += 1
        self.completion_tokens += 1
        pieces = choice.reader.add(token)
        if choice.reader.stopped:
            self._close(choice, "stop")
        return pieces

    def _end(self, choice: Choice, finished: Finished) -> list[TextPiece]:
        if finished.sample == 0:
            self._cached_tokens += finished.cached_tokens
        self._close(choice, finished.reason)
        return choice.reader.finish()

    def _close(self, choice: Choice, reason: str) -> None:
        choice.finish = reason
        if choice.tokens > 1:
            mean = (choice.last - choice.began) / (choice.tokens - 1)
            self.service.metrics.time_per_token.observe(mean)

    def _check_finish(self, reason: str | None) -> None:
        if reason == "error":
            raise internal_error()
        if reason == "cancelled":
            if self.service.draining:
                raise unavailable("the server was shut down", "shutting_down", retry_after=10)
            raise ApiError(GONE, "the client has gone")


class EventStream(Response):
    """Server-sent events made of JSON objects, ended by [DONE]; an error after the start is one."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[Json]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: str) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with self._generation.running(scope, receive):
            await send(start)
            try:
                async for event in self._events:
                    await write(_json(event))
                await write("[DONE]")
            except ApiError as error:
                await write(_json(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
