"""Continuous batching: many requests share the engine's rows and come and go between chunks.

One round (`step`) frees the rows of cancelled requests, admits waiting ones in the order of their
arrival, appends prompt tokens up to a budget, draws one chunk of tokens for all rows that are
ready, and tells each request what it got. A row keeps what it holds when its request is done: the
next prompt that begins the same way goes on from there.

Any thread may submit and cancel; one thread steps.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from nanochat_jax.engine.decode import Control, Drawn
from nanochat_jax.engine.engine import Chunk, Engine, make_engine
from nanochat_jax.engine.requests import Event, Finished, Full, Request, Sample, Stats, Token, check
from nanochat_jax.engine.tools import Block, Tools
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.tokenizer import Tokenizer

PREFILL_TOKENS = 512  # prompt tokens a round and device: those who wait for a chunk wait no longer
PATIENCE = 4  # rounds in which shorter prompts may go first
MIN_REUSE = 8  # tokens in common that make an old row worth going on from

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Ticket:
    """A request on its way."""

    request: Request
    listener: Callable[[list[Event]], None]
    cancelled: bool = False
    unfinished: int = 0  # samples without a Finished event
    events: list[Event] = field(default_factory=list)  # of this round


@dataclass(eq=False)
class Group:
    """Samples of one request that start from one prefill; no more than there are rows."""

    ticket: Ticket
    samples: range
    reused: int = 0  # tokens of the prompt that an old row held


@dataclass(eq=False)
class Row:
    """What the host knows of a row of the engine."""

    index: int
    kept: list[int] = field(default_factory=list)  # the tokens whose keys and values it holds
    todo: list[int] = field(default_factory=list)  # tokens to append before it may draw
    group: Group | None = None  # whom it works for
    sample: int = 0
    followers: list["Row"] = field(default_factory=list)  # get a copy when its prompt is in
    left: int = 0  # tokens it may still give
    drawn: int = 0
    block: Block | None = None
    waited: int = 0  # rounds in which other prompts went first
    freed: int = 0  # when it became free, for choosing the one that was free longest

    @property
    def draws(self) -> bool:
        return self.group is not None and not self.todo and self.left > 0


class Scheduler:
    """Shares an engine among requests. `tools` answers python blocks; without them nobody does."""

    def __init__(self, engine: Engine, *, tools: Tools | None = None, max_queue: int = 64):
        self.engine = engine
        self._tools, self._max_queue = tools, max_queue
        self._rows = [Row(i) for i in range(engine.slots)]
        self._queue: deque[Group] = deque()
        self._changed = threading.Condition()  # guards the queue and the tickets' `cancelled`
        self._rounds = 0
        self._tokens_generated = self._prompt_tokens = self._cached_prompt_tokens = 0

    # --- for any thread ---------------------------------------------------------------------------

    def submit(self, request: Request, listener: Callable[[list[Event]], None]) -> Ticket:
        """Queues a request; `listener` is called from the stepping thread with its events.

        ValueError for a request that could never run; Full when `max_queue` are waiting.
        """
        check(request, self.engine.vocab_size, self.engine.capacity)
        ticket = Ticket(request, listener, unfinished=request.n)
        with self._changed:
            if self._waiting() >= self._max_queue:
                raise Full(f"{self._max_queue} requests are waiting already")
            self._enqueue(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request before the next chunk; nothing happens when it is done."""
        with self._changed:
            ticket.cancelled = True
            self._changed.notify_all()

    def stats(self) -> Stats:
        with self._changed:
            queued = self._waiting()
        return Stats(
            queued=queued,
            slots=len(self._rows),
            busy_slots=sum(row.group is not None for row in self._rows),
            tokens_generated=self._tokens_generated,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
        )

    def _waiting(self) -> int:
        """Requests in the queue; with the lock held."""
        return len({id(group.ticket) for group in self._queue})

    def _enqueue(self, ticket: Ticket) -> None:
        n, at_once = ticket.request.n, len(self._rows)
        self._queue.extend(
            Group(ticket, range(first, min(first + at_once, n))) for first in range(0, n, at_once)
        )

    # --- for the stepping thread ------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set (wake it with any submit or within half a second)."""
        while not stop.is_set():
            try:
                worked = self.step()
            except Exception:
                log.exception("the engine failed; the requests it worked on are given up")
                self._give_up()
                continue
            if not worked:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or stop.is_set(), timeout=0.5)

    def generate(self, requests: Iterable[Request]) -> list[list[Sample]]:
        """Runs requests to their end: the samples of each, in their order. For scripts."""
        results = []
        with self._changed:
            for request in requests:
                check(request, self.engine.vocab_size, self.engine.capacity)
                samples = [Sample() for _ in range(request.n)]
                results.append(samples)
                listener = _collector(samples)
                self._enqueue(Ticket(request, listener, unfinished=request.n))
        while self.step():
            pass
        return results

    def step(self) -> bool:
        """One round; False when there was nothing to do."""
        self._rounds += 1
        tickets = self._drop_cancelled()
        self._admit()
        tickets |= {id(row.group.ticket): row.group.ticket for row in self._rows if row.group}
        if not tickets:
            return False
        self._prefill()
        if any(row.draws for row in self._rows):
            self._decode()
        for ticket in tickets.values():
            self._deliver(ticket)
        return True

    def _drop_cancelled(self) -> dict[int, Ticket]:
        """Frees what cancelled requests hold."""
        with self._changed:
            waiting = [group for group in self._queue if group.ticket.cancelled]
            for group in waiting:
                self._queue.remove(group)
            working = [row for row in self._rows if row.group and row.group.ticket.cancelled]
        for group in waiting:
            for sample in group.samples:
                self._finish_sample(group.ticket, sample, "cancelled", 0)
        dropped = [group.ticket for group in waiting]
        for row in working:
            assert row.group is not None
            dropped.append(row.group.ticket)
            self._free(row, "cancelled")
        return {id(ticket): ticket for ticket in dropped}

    def _admit(self) -> None:
        """Gives rows to the requests that came first, as long as there are enough of them."""
        while True:
            free = [row for row in self._rows if row.group is None]
            with self._changed:
                if not self._queue or len(self._queue[0].samples) > len(free):
                    return
                group = self._queue.popleft()
            self._begin(group, free)

    def _begin(self, group: Group, free: list[Row]) -> None:
        request, prompt = group.ticket.request, list(group.ticket.request.prompt)
        if request.max_new_tokens == 0:
            for sample in group.samples:
                self._finish_sample(group.ticket, sample, "length", 0)
            return self._deliver(group.ticket)
        first, group.reused = self._best_row(prompt, free)
        others = sorted((row for row in free if row is not first), key=lambda row: row.freed)
        rows = [first, *others[: len(group.samples) - 1]]
        for row, sample in zip(rows, group.samples, strict=True):
            row.group, row.sample = group, sample
            row.left, row.drawn, row.waited = request.max_new_tokens, 0, 0
            row.block = Block(self._tools) if request.use_tools and self._tools else None
            row.todo = prompt  # of a follower: it may not draw before it has its copy
        first.kept, first.todo = first.kept[: group.reused], prompt[group.reused :]
        first.followers = rows[1:]
        self._prompt_tokens += len(prompt)
        self._cached_prompt_tokens += group.reused

    def _best_row(self, prompt: list[int], free: list[Row]) -> tuple[Row, int]:
        """(the free row that has most of the prompt, how much); else the one free longest."""
        best, most = min(free, key=lambda row: row.freed), 0
        for row in free:
            common = min(_common_prefix(row.kept, prompt), len(prompt) - 1)
            if common > max(most, MIN_REUSE - 1) and self.engine.can_rewind(len(row.kept), common):
                best, most = row, common
        return best, most

    # --- prompts ----------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Appends prompt chunks, one a device and call, until the round's budget is spent."""
        budget = dict.fromkeys(range(self.engine.n_devices), PREFILL_TOKENS)
        passed_over = set(self._filling())
        while chosen := self._next_to_fill(budget):
            chunks = []
            for row in chosen:
                size = min(self.engine.bucket(len(row.todo)), len(row.todo))
                part, row.todo = row.todo[:size], row.todo[size:]
                last = row.kept[-1] if row.kept else 0
                chunks.append(Chunk(row.index, len(row.kept), last, part, row.kept + part))
                row.kept = row.kept + part
                budget[self.engine.device_of(row.index)] -= size
            self.engine.prefill(chunks)
            passed_over -= set(chosen)
            for row in chosen:
                row.waited = 0
                if not row.todo:
                    self._lead(row)
        for row in passed_over:
            row.waited += 1

    def _filling(self) -> list[Row]:
        """Rows with tokens to append; followers wait for their copy."""
        followers = {id(follower) for row in self._rows for follower in row.followers}
        return [row for row in self._rows if row.todo and id(row) not in followers]

    def _next_to_fill(self, budget: dict[int, int]) -> list[Row]:
        """For each device with budget left the row to go on with: the shortest, unless one has
        waited too long."""
        chosen: dict[int, Row] = {}
        filling = self._filling()
        filling.sort(key=lambda row: (-row.waited if row.waited >= PATIENCE else 0, len(row.todo)))
        for row in filling:
            device = self.engine.device_of(row.index)
            if budget[device] > 0:
                chosen.setdefault(device, row)
        return list(chosen.values())

    def _lead(self, row: Row) -> None:
        """The prompt of a row is in: its followers get a copy."""
        for follower in row.followers:
            self.engine.copy(row.index, follower.index)
            follower.kept, follower.todo = row.kept, []
        row.followers = []
        if row.left == 0:  # the calculator's answer took the last places
            self._free(row, "length")

    # --- drawing ----------------------------------------------------------------------------------

    def _decode(self) -> None:
        control = Control.empty(len(self._rows))
        drawing = [row for row in self._rows if row.draws]
        explain = 0
        for row in drawing:
            assert row.group is not None
            request = row.group.ticket.request
            control.running[row.index] = True
            control.left[row.index], control.drawn[row.index] = row.left, row.drawn
            control.stop_ids[row.index, : len(request.stop_ids)] = request.stop_ids
            if row.block is not None and self._tools is not None:
                control.pause_id[row.index] = self._tools.python_end
            control.choices.put(row.index, request.sampling, row.sample)
            explain = max(explain, request.alternatives)
        drawn = self.engine.decode(control, self.engine.chunk, explain=explain > 0)
        for row in drawing:
            self._take(row, drawn)

    def _take(self, row: Row, drawn: Drawn) -> None:
        """What a row has drawn in this chunk."""
        assert row.group is not None
        ticket = row.group.ticket
        tokens = [int(token) for token in drawn.tokens[row.index] if token >= 0]
        row.kept = row.kept + tokens
        row.left -= len(tokens)
        row.drawn += len(tokens)
        self._tokens_generated += len(tokens)
        for column, token in enumerate(tokens):
            if token in ticket.request.stop_ids:
                return self._free(row, "stop")
            logprob = float(drawn.logprobs[row.index, column])
            told = _alternatives(drawn, row.index, column, ticket.request.alternatives)
            ticket.events.append(Token(row.sample, token, False, logprob, told))
            row.todo += self._force(row, token)
        if not row.todo and row.left == 0:
            self._free(row, "length")

    def _force(self, row: Row, token: int) -> list[int]:
        """The calculator's answer, as far as it may be given; it comes after a chunk's last token.

        Only that token can close a block, since the row pauses there.
        """
        if row.block is None:
            return []
        assert row.group is not None
        answer = row.block.feed(token)[: row.left]
        row.left -= len(answer)
        for forced in answer:
            row.group.ticket.events.append(Token(row.sample, forced, True, float("nan"), ()))
        return answer

    # --- ends -------------------------------------------------------------------------------------

    def _free(self, row: Row, reason: str) -> None:
        """Ends a row's sample; what it holds stays until another request needs the row.

        The tokens in `todo` are not in the row.
        """
        group = row.group
        assert group is not None
        self._finish_sample(group.ticket, row.sample, reason, group.reused)
        row.group, row.block, row.todo, row.followers = None, None, [], []
        row.freed = self._rounds

    def _finish_sample(self, ticket: Ticket, sample: int, reason: str, cached: int) -> None:
        ticket.unfinished -= 1
        ticket.events.append(Finished(sample, reason, cached))

    def _deliver(self, ticket: Ticket) -> None:
        events, ticket.events = ticket.events, []
        if not events:
            return
        try:
            ticket.listener(events)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            self.cancel(ticket)

    def _give_up(self) -> None:
        """After a failure: the rows' contents are lost, and so are the requests in them."""
        tickets = {id(row.group.ticket): row.group.ticket for row in self._rows if row.group}
        for row in self._rows:
            if row.group is not None:
                self._free(row, "error")
            row.kept = []
        self.engine.reset()
        for ticket in tickets.values():
            self._deliver(ticket)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = min(len(a), len(b))
    same = np.asarray(a[:shared]) == np.asarray(b[:shared])
    return shared if same.all() else int(same.argmin())


def _alternatives(drawn: Drawn, row: int, column: int, k: int) -> tuple[tuple[int, float], ...]:
    ids = drawn.alternative_ids[row, column, :k].tolist()
    return tuple(zip(ids, drawn.alternative_logprobs[row, column, :k].tolist(), strict=True))


def _collector(samples: list[Sample]) -> Callable[[list[Event]], None]:
    def listener(events: list[Event]) -> None:
        for event in events:
            sample = samples[event.sample]
            if isinstance(event, Finished):
                sample.reason = event.reason
            else:
                sample.tokens.append(event.id)
                sample.forced.append(event.forced)
                sample.logprobs.append(event.logprob)

    return listener


# --- From a checkpoint to a scheduler that generates ---


def make_scheduler(
    model: GPT,
    params: Params,
    tokenizer: Tokenizer,
    *,
    slots: int = 8,
    chunk: int = 16,
    max_queue: int = 64,
    mesh: Mesh | None = None,
) -> Scheduler:
    """A scheduler with the calculator; `params` are whole, as `load_model` without a mesh reads."""
    engine = make_engine(model, params, slots=slots, chunk=chunk, mesh=mesh)
    return Scheduler(engine, tools=Tools(tokenizer), max_queue=max_queue)
