"""Conversations as training rows: rendered, arranged in one of three ways, masked, padded.

    best-fit      whole conversations, the largest that fits first; the rest of a row is padding
    one-per-row   one conversation a row, the rest padding
    stream        conversations as one endless text, cut into rows; every token is supervised, but
                  for messages of weight 0

As with text (loader.py), conversations are divided among a fixed number S of logical streams:
stream s takes the conversations s, s+S, s+2S, … of their endless repetition and fills rows
s·R/S … (s+1)·R/S−1 of each step of R rows. So rows depend only on the conversations, R, T and S,
and a stream resumes exactly from the number of its next conversation and those of its buffer. A
stream that finds nothing to learn in its part of them goes on to the parts of the others.

A conversation longer than a row is cut after the last answer that fits, or dropped. Rows of a
stream without supervised tokens are skipped, so every step has something to learn. All of it is
counted, in the step in which it happens.

Shapes: R rows, T time, C the counts of COUNTS.
"""

import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import grain
import numpy as np

from nanochat_jax.data.loader import Layout, PackedRowsDataset, RowLoader
from nanochat_jax.data.packing import FitBuffer
from nanochat_jax.tokenizer import ConversationError, Tokenizer

COUNTS = ("padding", "dropped", "cut", "skipped")  # tokens, conversations, conversations, rows
PADDING, DROPPED, CUT, SKIPPED = range(len(COUNTS))
BUFFER = 100  # conversations that best-fit chooses among, as in the original
PREFETCH = 16  # conversations that each stream renders ahead
SAMPLE = 2048  # conversations from which the number of rows of an epoch is estimated

log = logging.getLogger(__name__)

type Packing = Literal["best-fit", "one-per-row", "stream"]
type Render = Callable[[Any], tuple[Sequence[int], Sequence[int]]]


class PackedRows(NamedTuple):
    """One process's rows of a step, int32; target −1 is ignored."""

    inputs_RT: np.ndarray
    targets_RT: np.ndarray
    counts_RC: np.ndarray  # padding and losses (COUNTS) on the way to each row


# ---- rendering -------------------------------------------------------------------------------


class ConversationSource(Protocol):
    """What this file needs of tasks (tasks/task.py)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...
    def where(self, i: int) -> str: ...


class Rendered(NamedTuple):
    """A conversation as tokens; empty if it was dropped."""

    ids: np.ndarray  # int32
    mask: np.ndarray  # bool: supervised
    is_cut: bool = False


EMPTY = Rendered(np.zeros(0, np.int32), np.zeros(0, bool))


class RenderedDataset:
    """The conversations of `tasks` as tokens for a packing: random access from any thread.

    `render` gives ids and mask of a conversation, `end_id` ends each answer in the ids. A
    conversation of which it raises a ConversationError is left out; one that cannot be read ends
    the run with a ValueError.
    """

    def __init__(
        self, tasks: ConversationSource, render: Render, end_id: int, packing: Packing, row_len: int
    ):
        if not len(tasks):
            raise ValueError("the tasks have no conversation at all; name others with --tasks")
        self.packing, self.row_len = packing, row_len
        self._tasks, self._render, self._end_id = tasks, render, end_id
        self._has_warned = False

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, i: int) -> Rendered:
        i = int(i)
        conversation = self._read(i)
        try:
            ids, mask = self._render(conversation)
        except ConversationError as error:
            if not self._has_warned:
                log.warning("%s is left out: %s", self._tasks.where(i), error)
            self._has_warned = True
            return EMPTY
        tokens, is_learned = np.asarray(ids, np.int32), np.asarray(mask, bool)
        if self.packing == "stream":
            return Rendered(tokens, is_learned)
        return cut_to_row(tokens, is_learned, self.row_len, self._end_id)

    def has_usable(self) -> bool:
        """Whether any conversation has something to learn in a row."""
        return any(self[i].mask.any() for i in range(len(self)))

    def _read(self, i: int) -> Any:
        """What cannot be read is no conversation to leave out: all others may be lost with it."""
        try:
            return self._tasks[i]
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._tasks.where(i)} cannot be read: {error}") from error


class StreamPart:
    """What a stream takes, by visit: its own part again and again, or all parts in turn."""

    def __init__(self, source: RenderedDataset, index: int, streams: int) -> None:
        self._source, self._index, self._streams = source, index, streams
        self._parts = math.gcd(len(source), streams)  # different ones
        self.length = len(source) // self._parts
        self.takes_all = False

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, visit: int) -> Rendered:
        return self._source[self.number(visit)]

    def number(self, visit: int) -> int:
        """The number of the `visit`-th conversation, from 0."""
        other = int(visit) // self.length % self._parts if self.takes_all else 0
        return (self._index + other + int(visit) * self._streams) % len(self._source)


def render_tasks(
    tasks: ConversationSource, tokenizer: Tokenizer, packing: Packing, sequence_len: int
) -> RenderedDataset:
    """The conversations of tasks in the chat format, for rows of `sequence_len` inputs."""

    def render(conversation: Any) -> tuple[list[int], list[int]]:
        return tokenizer.render_conversation(conversation, max_tokens=sys.maxsize)

    def render_text(conversation: Any) -> tuple[list[int], list[int]]:
        """All of it is learned, but for messages of weight 0."""
        ids, mask = render(conversation)
        if all(message.get("weight") != 0 for message in conversation["messages"]):
            return ids, [1] * len(ids)
        unweighted = [{**message, "weight": 1} for message in conversation["messages"]]
        _, otherwise = render({"messages": unweighted})
        return ids, [int(a == b) for a, b in zip(mask, otherwise, strict=True)]

    return RenderedDataset(
        tasks,
        render_text if packing == "stream" else render,
        tokenizer.special_id("<|assistant_end|>"),
        packing,
        sequence_len + 1,
    )


def cut_to_row(ids: np.ndarray, mask: np.ndarray, row_len: int, end_id: int) -> Rendered:
    """The conversation up to the last answer that ends within the row; nothing if none does."""
    if len(ids) <= row_len:
        return Rendered(ids, mask)
    ends = np.flatnonzero(ids[:row_len] == end_id)
    if not len(ends):
        return EMPTY
    return Rendered(ids[: ends[-1] + 1], mask[: ends[-1] + 1], is_cut=True)


# ---- filling rows ----------------------------------------------------------------------------


class Buffered(NamedTuple):
    """A conversation in a stream's buffer: the `visit`-th that the stream took, from 0."""

    visit: int
    ids: np.ndarray
    mask: np.ndarray


type Take = Callable[[], Buffered]
type Filled = tuple[np.ndarray, np.ndarray]  # ids and mask, at most a row long


class Packer(Protocol):
    """Fills rows with conversations; its buffer and offset are its whole state."""

    offset: int  # used tokens of the buffered conversation; 0 but for `stream`

    def pop_row(self, take: Take) -> Filled: ...
    def buffered(self) -> list[Buffered]: ...
    def push(self, conversations: Sequence[Buffered]) -> None: ...


class BestFit:
    """Repeatedly takes the longest buffered conversation that fits, the earliest of equals."""

    def __init__(self, row_len: int, buffer: int) -> None:
        self._row_len, self._size = row_len, buffer
        self._buffer: FitBuffer[Buffered] = FitBuffer()
        self.offset = 0

    def pop_row(self, take: Take) -> Filled:
        chosen: list[Buffered] = []
        room = self._row_len
        while room:
            while len(self._buffer) < self._size:
                self.push([take()])
            best = self._buffer.pop_largest(at_most=room)
            if best is None:
                break
            chosen.append(best)
            room -= len(best.ids)
        return np.concatenate([c.ids for c in chosen]), np.concatenate([c.mask for c in chosen])

    def buffered(self) -> list[Buffered]:
        return self._buffer.in_order()

    def push(self, conversations: Sequence[Buffered]) -> None:
        for conversation in conversations:
            self._buffer.add(len(conversation.ids), conversation)


class OnePerRow:
    """Each conversation has a row of its own."""

    offset = 0

    def pop_row(self, take: Take) -> Filled:
        conversation = take()
        return conversation.ids, conversation.mask

    def buffered(self) -> list[Buffered]:
        return []

    def push(self, conversations: Sequence[Buffered]) -> None:
        assert not conversations


class TokenStream:
    """One endless text; the last token of a row, which is no input there, begins the next row."""

    def __init__(self, row_len: int) -> None:
        self._row_len = row_len
        self._buffer: list[Buffered] = []  # the conversation in which the next row begins
        self.offset = 0

    def pop_row(self, take: Take) -> Filled:
        parts: list[Filled] = []
        room = self._row_len
        while room:
            if not self._buffer or self.offset == len(self._buffer[0].ids):
                self._buffer, self.offset = [take()], 0
            used = slice(self.offset, self.offset + room)
            parts.append((self._buffer[0].ids[used], self._buffer[0].mask[used]))
            self.offset += len(parts[-1][0])
            room -= len(parts[-1][0])
        self.offset -= 1
        ids, masks = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(masks)

    def buffered(self) -> list[Buffered]:
        return list(self._buffer)

    def push(self, conversations: Sequence[Buffered]) -> None:
        self._buffer = list(conversations)


def make_packer(packing: Packing, row_len: int, buffer: int) -> Packer:
    if packing == "best-fit":
        return BestFit(row_len, buffer)
    return OnePerRow() if packing == "one-per-row" else TokenStream(row_len)


# ---- one logical stream ----------------------------------------------------------------------


@dataclass(frozen=True)
class ConversationState:
    """Where a stream continues; the fields are those of its JSON."""

    next: int
    held: tuple[int, ...]
    offset: int
    tokens: int  # of those held: detects other conversations or another tokenizer
    fruitful: bool  # whether the stream's own part has something to learn, as far as it is known

    def __deepcopy__(self, memo: dict) -> "ConversationState":
        return self  # immutable; grain copies the state of every step

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "held": list(self.held)}


class ConversationStream:
    """Takes its conversations in order and packs them into its part of every step's rows."""

    def __init__(
        self,
        layout: Layout,
        source: RenderedDataset,
        part: StreamPart,
        rendered: grain.DatasetIterator,
        pad_id: int,
    ) -> None:
        self._layout, self._source, self._part = layout, source, part
        self._rendered, self._pad_id = rendered, pad_id
        self.cut, self.dropped = set[int](), set[int]()  # distinct ones, over all epochs
        self._start(0, is_fruitful=False)

    def _start(self, visit: int, is_fruitful: bool) -> None:
        self._is_fruitful = is_fruitful
        self._part.takes_all = visit >= self._part.length and not is_fruitful
        self._next = visit
        self._rendered.set_state({"next_index": visit})
        self._counts = np.zeros(len(COUNTS), np.int32)
        self._packer = make_packer(
            self._source.packing, self._layout.sequence_len + 1, self._layout.buffer_docs
        )

    @property
    def used(self) -> int:
        """How many conversations have been packed or dropped."""
        return self._next - len(self._packer.buffered())

    def rows(self) -> list[PackedRows]:
        """This stream's rows of a step (each without the axis R), some tokens supervised."""
        for _ in range(len(self._source) + 1):
            rows = [self._row() for _ in range(self._layout.rows // self._layout.streams)]
            if any((targets >= 0).any() for _, targets in rows):
                counts_RC = np.zeros((len(rows), len(COUNTS)), np.int32)
                counts_RC[0] = self._counts
                self._counts[:] = 0
                return [PackedRows(*row, counts_RC[i]) for i, row in enumerate(rows)]
            self._counts[SKIPPED] += len(rows)
            self._counts[PADDING] = 0
        raise ValueError("the conversations have nothing to learn: no message of the assistant")

    def _row(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (T,) each."""
        length, content = self._layout.sequence_len, self._packer.pop_row(self._take)
        ids = np.full(length + 1, self._pad_id, np.int32)
        is_learned = np.zeros(length + 1, bool)
        filled = len(content[0])
        ids[:filled], is_learned[:filled] = content
        self._counts[PADDING] += max(length - filled, 0)
        return ids[:-1], np.where(is_learned, ids, -1)[1:]

    def _take(self) -> Buffered:
        """The next conversation that is not dropped."""
        for _ in range(len(self._source)):
            rendered, number = self._read_next()
            if rendered.is_cut:
                self._counts[CUT] += 1
                self.cut.add(number)
            if len(rendered.ids):
                return Buffered(self._next - 1, rendered.ids, rendered.mask)
            self._counts[DROPPED] += 1
            self.dropped.add(number)
        raise ValueError(
            f"none of {len(self._source):,} conversations can be used in rows of "
            f"{self._layout.sequence_len} tokens: their first answers end beyond that"
        )

    def _read_next(self) -> tuple[Rendered, int]:
        """The next conversation and its number, from all parts once its own has been in vain."""
        is_first_pass = self._next < self._part.length
        if not (is_first_pass or self._is_fruitful or self._part.takes_all):
            self._part.takes_all = True
            self._rendered.set_state({"next_index": self._next})  # forgets what was read ahead
        rendered, number = next(self._rendered), self._part.number(self._next)
        self._is_fruitful |= is_first_pass and bool(rendered.mask.any())
        self._next += 1
        return rendered, number

    def state(self) -> ConversationState:
        held = self._packer.buffered()
        tokens = sum(len(conversation.ids) for conversation in held)
        visits = tuple(conversation.visit for conversation in held)
        return ConversationState(self._next, visits, self._packer.offset, tokens, self._is_fruitful)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from `ConversationState.to_json()`; ValueError if the conversations changed."""
        # A state from before there was `fruitful` is of a stream that found something.
        self._start(state["next"], is_fruitful=state.get("fruitful", True))
        found = [(visit, self._part[visit]) for visit in state["held"]]
        if sum(len(rendered.ids) for _, rendered in found) != state["tokens"]:
            raise ValueError(
                "the conversations of the saved data state have other lengths now: resume with the "
                "tokenizer and the task data that the run was started with"
            )
        self._packer.push(
            [Buffered(visit, rendered.ids, rendered.mask) for visit, rendered in found]
        )
        self._packer.offset = state["offset"]


# ---- all streams of one process --------------------------------------------------------------


def _rendered(part: StreamPart) -> grain.IterDataset:
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
    return grain.MapDataset.source(part).to_iter_dataset(options)


def conversation_loader(
    source: RenderedDataset,
    pad_id: int,
    *,
    rows: int,
    streams: int = 8,
    buffer: int = BUFFER,
    process_index: int = 0,
    process_count: int = 1,
    state: Mapping[str, Any] | None = None,
) -> RowLoader:
    """Endless `PackedRows`, rows // process_count of them a step.

    `rows` counts the whole step over all processes and micro-batches. `state` comes from
    `get_state` (or `merge_states`). ValueError for a layout that does not divide, a state of other
    data, or conversations that cannot be used.
    """
    layout = Layout(rows, source.row_len - 1, streams, buffer)
    owned = layout.owned_streams(process_index, process_count)
    identity = {
        "version": 1,
        "layout": asdict(layout),
        "packing": source.packing,
        "data": f"{len(source)} conversations",
    }
    parts = {index: StreamPart(source, index, streams) for index in owned}
    dataset = PackedRowsDataset(
        {index: _rendered(part) for index, part in parts.items()},
        lambda index, rendered: ConversationStream(layout, source, parts[index], rendered, pad_id),
        lambda rows: PackedRows(*map(np.stack, zip(*rows, strict=True))),
    )
    return RowLoader(dataset, identity, state)


def first_batches(
    source: RenderedDataset, pad_id: int, n_batches: int, **layout: Any
) -> Iterator[PackedRows]:
    """The first `n_batches` of `conversation_loader(source, pad_id, **layout)`."""
    with conversation_loader(source, pad_id, **layout) as loader:
        for _ in range(n_batches):
            yield next(loader)


class PackingStats(NamedTuple):
    """What one epoch of conversations amounts to, estimated from a sample of them."""

    conversations: int
    rows: float  # an estimate unless all were sampled
    padding_share: float
    sampled: int
    counts: dict[str, int]  # COUNTS of the sample
    digest: str  # of the rows of the sample


def estimate_epoch(
    source: RenderedDataset, pad_id: int, sample: int = SAMPLE, buffer: int = BUFFER
) -> PackingStats:
    """Packs the first `sample` conversations, to estimate how many rows all of them make."""
    layout = Layout(1, source.row_len - 1, 1, buffer)
    part = StreamPart(source, 0, 1)
    iterator = _rendered(part).__iter__()
    stream = ConversationStream(layout, source, part, iterator, pad_id)
    n_rows, counts, digest = 0, np.zeros(len(COUNTS), np.int64), hashlib.sha256()
    try:
        while stream.used < min(sample, len(source)):
            row = stream.rows()[0]
            n_rows += 1
            counts += row.counts_RC
            digest.update(row.inputs_RT.tobytes() + row.targets_RT.tobytes())
    finally:
        iterator.close()
    # The buffer takes the conversations of a small file several times; here each counts once.
    counts[DROPPED], counts[CUT] = len(stream.dropped), len(stream.cut)
    return PackingStats(
        len(source),
        n_rows * len(source) / stream.used,
        counts[PADDING] / (n_rows * layout.sequence_len),
        stream.used,
        dict(zip(COUNTS, counts.tolist(), strict=True)),
        digest.hexdigest()[:16],
    )
