"""One HTTP request's work on the scheduler: events of its thread become updates in the event loop.

The scheduler's thread never waits for a client: it hands over what it drew, and a client that reads
slowly finds it in a queue, whose length the limit on new tokens bounds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from nanochat_jax.engine.requests import Event, Finished, Full, Request, Token
from nanochat_jax.engine.scheduler import Scheduler, Ticket
from nanochat_jax.serve.conversation import AnswerReader, Piece
from nanochat_jax.serve.errors import ApiError, bad_request
from nanochat_jax.serve.metrics import Metrics
from nanochat_jax.tokenizer import Tokenizer


class Update(NamedTuple):
    """What happened to one choice: more text, and why it ended if it did."""

    choice: int
    pieces: list[Piece]
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
        pieces: dict[int, list[Piece]] = {}
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

    def _add(self, choice: Choice, token: Token) -> list[Piece]:
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

    def _end(self, choice: Choice, finished: Finished) -> list[Piece]:
        if finished.sample == 0:
            self.usage.cached += finished.cached_tokens
        self._close(choice, finished.reason)
        return choice.reader.finish()

    def _close(self, choice: Choice, reason: str) -> None:
        choice.finish = reason
        if choice.tokens > 1:
            mean = (choice.last - choice.began) / (choice.tokens - 1)
            self.metrics.time_per_token.observe(mean)


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one type as one piece: a chunk of tokens is one message to the client."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].type == piece.type:
            last = merged.pop()
            piece = Piece(piece.type, last.text + piece.text, last.tokens + piece.tokens)
        merged.append(piece)
    return merged
