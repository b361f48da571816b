"""Continuous batching: many requests share the engine's rows and come and go between chunks.

One round (`step`) frees the slots of cancelled requests, admits waiting ones in the order of their
arrival, appends prompt tokens up to a budget, samples one chunk of tokens for every slot whose
prompt is complete, and delivers to each request what it got. A slot keeps its tokens when its
request is done: the next prompt with the same beginning continues from there.

Any thread may submit and cancel; one thread steps.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from nanochat_jax.engine.decode import DecodeInputs, Sampled
from nanochat_jax.engine.engine import Chunk, Engine, make_engine
from nanochat_jax.engine.requests import Event, Finished, Full, Request, Sample, Stats, Token, check
from nanochat_jax.engine.tools import ToolCall, Tools
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.tokenizer import Tokenizer

PREFILL_TOKENS = 512  # prompt tokens per round and device, so that decoding slots never wait longer
MAX_SKIPPED = 4  # rounds in which shorter prompts may go first
MIN_REUSE = 8  # common tokens that make a slot's old contents worth reusing

log = logging.getLogger(__name__)


@dataclass(eq=False)
class RequestState:
    """A request in progress."""

    request: Request
    listener: Callable[[list[Event]], None]
    cancelled: bool = False
    events: list[Event] = field(default_factory=list)  # of this round


@dataclass(eq=False)
class Group:
    """Samples of one request that share one prefill; no more than there are slots."""

    state: RequestState
    samples: range
    reused: int = 0  # tokens of the prompt that a slot already held


@dataclass(eq=False)
class Slot:
    """What the host knows of a row of the engine."""

    index: int
    cached: list[int] = field(default_factory=list)  # the tokens whose keys and values it holds
    pending: list[int] = field(default_factory=list)  # tokens to append before it may sample
    group: Group | None = None  # None: free
    sample: int = 0
    forks: list["Slot"] = field(default_factory=list)  # get a copy when its prompt is complete
    remaining: int = 0  # tokens it may still emit
    sampled: int = 0
    tool_call: ToolCall | None = None
    skipped: int = 0  # rounds in which other prompts went first
    freed: int = 0  # the round in which it became free

    @property
    def is_decoding(self) -> bool:
        return self.group is not None and not self.pending and self.remaining > 0


class Scheduler:
    """Shares an engine among requests. With a tokenizer, the calculator answers python blocks."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, max_queue: int = 64):
        self.engine = engine
        self._tools = Tools(tokenizer) if tokenizer else None
        self._max_queue = max_queue
        self._slots = [Slot(i) for i in range(engine.n_slots)]
        self._queue: deque[Group] = deque()
        self._changed = threading.Condition()  # guards the queue and the states' `cancelled`
        self._rounds = 0
        self._tokens_generated = self._prompt_tokens = self._cached_prompt_tokens = 0

    # --- for any thread ---------------------------------------------------------------------------

    def submit(self, request: Request, listener: Callable[[list[Event]], None]) -> RequestState:
        """Queues a request; `listener` is called from the stepping thread with its events.

        ValueError for a request that could never run; Full when `max_queue` are waiting.
        """
        check(request, self.engine.vocab_size, self.engine.capacity)
        state = RequestState(request, listener)
        with self._changed:
            if self._waiting() >= self._max_queue:
                raise Full(f"{self._max_queue} requests are waiting already")
            self._enqueue(state)
            self._changed.notify_all()
        return state

    def cancel(self, state: RequestState) -> None:
        """Ends a request before the next chunk; does nothing when it is done."""
        with self._changed:
            state.cancelled = True
            self._changed.notify_all()

    def stats(self) -> Stats:
        with self._changed:
            queued = self._waiting()
        return Stats(
            queued=queued,
            slots=len(self._slots),
            busy_slots=sum(slot.group is not None for slot in self._slots),
            tokens_generated=self._tokens_generated,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
        )

    def _waiting(self) -> int:
        """Requests in the queue; with the lock held."""
        return len({group.state for group in self._queue})

    def _enqueue(self, state: RequestState) -> None:
        n, n_slots = state.request.n, len(self._slots)
        self._queue.extend(
            Group(state, range(first, min(first + n_slots, n))) for first in range(0, n, n_slots)
        )

    # --- for the stepping thread ------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Steps until `stop` is set (which takes effect with any submit, or in half a second)."""
        while not stop.is_set():
            try:
                worked = self.step()
            except Exception:
                log.exception("the engine failed; the requests it was working on end in an error")
                failed = [self._free(slot, "error").state for slot in self._slots if slot.group]
                for slot in self._slots:
                    slot.cached = []  # the rows' contents are lost
                self.engine.reset()
                for state in dict.fromkeys(failed):
                    self._deliver(state)
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
                self._enqueue(RequestState(request, partial(_collect, samples)))
        while self.step():
            pass
        return results

    def step(self) -> bool:
        """One round; False when there was nothing to do."""
        self._rounds += 1
        active = self._drop_cancelled()
        self._admit()
        active += [slot.group.state for slot in self._slots if slot.group]
        if not active:
            return False
        self._prefill()
        if any(slot.is_decoding for slot in self._slots):
            self._decode()
        for state in dict.fromkeys(active):
            self._deliver(state)
        return True

    def _drop_cancelled(self) -> list[RequestState]:
        """Takes cancelled requests out of the queue and their slots."""
        with self._changed:
            waiting = [group for group in self._queue if group.state.cancelled]
            for group in waiting:
                self._queue.remove(group)
            working = [slot for slot in self._slots if slot.group and slot.group.state.cancelled]
        for group in waiting:
            group.state.events += [Finished(i, "cancelled", 0) for i in group.samples]
        for slot in working:
            waiting.append(self._free(slot, "cancelled"))
        return [group.state for group in waiting]

    def _admit(self) -> None:
        """Gives slots to the requests that came first, as long as enough are free."""
        while True:
            free = [slot for slot in self._slots if slot.group is None]
            with self._changed:
                if not self._queue or len(self._queue[0].samples) > len(free):
                    return
                group = self._queue.popleft()
            self._begin(group, free)

    def _begin(self, group: Group, free: list[Slot]) -> None:
        request, prompt = group.state.request, list(group.state.request.prompt)
        if request.max_new_tokens == 0:
            group.state.events += [Finished(i, "length", 0) for i in group.samples]
            return self._deliver(group.state)
        first, group.reused = self._best_slot(prompt, free)
        others = sorted((slot for slot in free if slot is not first), key=lambda slot: slot.freed)
        slots = [first, *others[: len(group.samples) - 1]]
        for slot, sample in zip(slots, group.samples, strict=True):
            slot.group, slot.sample = group, sample
            slot.remaining, slot.sampled, slot.skipped = request.max_new_tokens, 0, 0
            slot.tool_call = ToolCall(self._tools) if request.use_tools and self._tools else None
            slot.pending = prompt  # of a fork: it may not sample before it has its copy
        first.cached, first.pending = first.cached[: group.reused], prompt[group.reused :]
        first.forks = slots[1:]
        self._prompt_tokens += len(prompt)
        self._cached_prompt_tokens += group.reused

    def _best_slot(self, prompt: list[int], free: list[Slot]) -> tuple[Slot, int]:
        """(the free slot that holds most of the prompt, how much); else the one free longest."""
        best, most = min(free, key=lambda slot: slot.freed), 0
        for slot in free:
            common = min(_common_prefix(slot.cached, prompt), len(prompt) - 1)
            can_reuse = common > max(most, MIN_REUSE - 1)
            if can_reuse and self.engine.can_rewind(len(slot.cached), common):
                best, most = slot, common
        return best, most

    # --- prompts ----------------------------------------------------------------------------------

    def _prefill(self) -> None:
        """Appends prompt chunks, one per device and call, until the round's budget is spent."""
        budget = dict.fromkeys(range(self.engine.n_devices), PREFILL_TOKENS)
        skipped = set(self._prefilling())
        while chosen := self._next_to_prefill(budget):
            chunks = []
            for slot in chosen:
                size = min(self.engine.bucket(len(slot.pending)), len(slot.pending))
                part, slot.pending = slot.pending[:size], slot.pending[size:]
                start, slot.cached = len(slot.cached), slot.cached + part
                chunks.append(Chunk(slot.index, start, slot.cached))
                budget[self.engine.device_of(slot.index)] -= size
            self.engine.prefill(chunks)
            skipped -= set(chosen)
            for slot in chosen:
                slot.skipped = 0
                if not slot.pending:
                    self._fork(slot)
        for slot in skipped:
            slot.skipped += 1

    def _prefilling(self) -> list[Slot]:
        """Slots with tokens to append; forks wait for their copy instead."""
        forks = {fork for slot in self._slots for fork in slot.forks}
        return [slot for slot in self._slots if slot.pending and slot not in forks]

    def _next_to_prefill(self, budget: dict[int, int]) -> list[Slot]:
        """For each device with budget left, the slot to continue: the one with the shortest prompt,
        unless another was skipped too often."""
        chosen: dict[int, Slot] = {}
        for slot in sorted(
            self._prefilling(),
            key=lambda s: (-s.skipped if s.skipped >= MAX_SKIPPED else 0, len(s.pending)),
        ):
            device = self.engine.device_of(slot.index)
            if budget[device] > 0:
                chosen.setdefault(device, slot)
        return list(chosen.values())

    def _fork(self, slot: Slot) -> None:
        """The prompt of a slot is complete: its forks get a copy."""
        for fork in slot.forks:
            self.engine.copy(slot.index, fork.index)
            fork.cached, fork.pending = slot.cached, []
        slot.forks = []
        if slot.remaining == 0:  # the calculator's answer was as long as the sample may be
            self._free(slot, "length")

    # --- decoding ---------------------------------------------------------------------------------

    def _decode(self) -> None:
        inputs = DecodeInputs.empty(len(self._slots))
        decoding = [slot for slot in self._slots if slot.is_decoding]
        logprobs = False
        for slot in decoding:
            assert slot.group is not None
            request, i = slot.group.state.request, slot.index
            inputs.running[i] = True
            inputs.remaining[i], inputs.sampled[i] = slot.remaining, slot.sampled
            inputs.stop_ids[i, : len(request.stop_ids)] = request.stop_ids
            if slot.tool_call:
                inputs.pause_id[i] = slot.tool_call.pause_id
            inputs.params.put(i, request.sampling, slot.sample)
            logprobs |= request.top_logprobs > 0
        sampled = self.engine.decode(inputs, self.engine.chunk, logprobs=logprobs)
        for slot in decoding:
            self._take(slot, sampled)

    def _take(self, slot: Slot, sampled: Sampled) -> None:
        """What a slot has sampled in this chunk, and what the calculator adds."""
        assert slot.group is not None
        state, i = slot.group.state, slot.index
        tokens = [int(token) for token in sampled.tokens[i] if token >= 0]
        slot.cached = slot.cached + tokens
        slot.remaining -= len(tokens)
        slot.sampled += len(tokens)
        self._tokens_generated += len(tokens)
        k = state.request.top_logprobs
        for column, token in enumerate(tokens):
            if token in state.request.stop_ids:
                self._free(slot, "stop")
                return
            ids, logprobs = sampled.top_ids[i, column, :k], sampled.top_logprobs[i, column, :k]
            top = tuple(zip(ids.tolist(), logprobs.tolist(), strict=True))
            logprob = float(sampled.logprobs[i, column])
            state.events.append(Token(slot.sample, token, False, logprob, top))
            if slot.tool_call:
                # Only a chunk's last token can close a block, since the row pauses there. Of the
                # answer as much is forced as the sample has room for.
                forced = slot.tool_call.feed(token)[: slot.remaining]
                slot.remaining -= len(forced)
                slot.pending += forced
                state.events += [Token(slot.sample, t, True, float("nan"), ()) for t in forced]
        if not slot.pending and slot.remaining == 0:
            self._free(slot, "length")

    # --- ends -------------------------------------------------------------------------------------

    def _free(self, slot: Slot, reason: str) -> Group:
        """Ends a slot's sample; returns its group. The cached tokens stay until another request
        needs the slot; the pending ones were never appended.
        """
        group = slot.group
        assert group is not None
        group.state.events.append(Finished(slot.sample, reason, group.reused))
        slot.group, slot.tool_call, slot.pending, slot.forks = None, None, [], []
        slot.freed = self._rounds
        return group

    def _deliver(self, state: RequestState) -> None:
        events, state.events = state.events, []
        if not events:
            return
        try:
            state.listener(events)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            self.cancel(state)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    shared = min(len(a), len(b))
    same = np.asarray(a[:shared]) == np.asarray(b[:shared])
    return shared if same.all() else int(same.argmin())


def _collect(samples: list[Sample], events: list[Event]) -> None:
    for event in events:
        sample = samples[event.sample]
        if isinstance(event, Finished):
            sample.reason = event.reason
        else:
            sample.tokens.append(event.id)
            sample.forced.append(event.forced)
            sample.logprobs.append(event.logprob)


def make_scheduler(
    model: GPT, params: Params, tokenizer: Tokenizer, *, max_queue: int = 64, **engine: Any
) -> Scheduler:
    """A scheduler with a new engine, and the calculator.

    `params` are whole, as `load_model` without a mesh returns them; `engine`: see `make_engine`.
    """
    return Scheduler(make_engine(model, params, **engine), tokenizer, max_queue)
