"""One logical stream of the input: its blocks of text in order, tokenised and packed into rows.

Stream s of S reads the blocks s, s+S, s+2S, … of the endless repetition of all blocks. A document
is identified by (visit, position): it is in the visit-th block that the stream reads, at that
position. The next document and those in the packing buffer are all that a stream needs to resume.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from nanochat_jax.data.loader import Layout, PackedRowsDataset, RowLoader
from nanochat_jax.data.packing import BestFitPacker, Document
from nanochat_jax.data.shards import DocumentBlocks, Shards, read_footer

REFILL_DOCS = 128  # documents that enter the packing buffer together, as in the original
VISIT, POSITION, LENGTH = map(itemgetter, range(3))  # of a Document; a state reads thousands


class BatchEncoder(Protocol):
    """What the loader needs of a tokenizer."""

    def encode_batch(
        self, texts: list[str], *, prepend_bos: bool = ..., threads: int = ...
    ) -> list[list[int]]: ...


class BlockEncoder:
    """Turns the texts of a block into (length, the first `row_len` token ids) pairs.

    It runs in grain's threads; tiktoken releases the GIL.
    """

    def __init__(self, tokenizer: BatchEncoder, row_len: int, threads: int) -> None:
        self._tokenizer = tokenizer
        self._row_len = row_len
        self._threads = threads

    def __call__(self, texts: list[str]) -> list[tuple[int, np.ndarray]]:
        ids = self._tokenizer.encode_batch(texts, prepend_bos=True, threads=self._threads)
        return [(len(doc), np.array(doc[: self._row_len], dtype=np.int32)) for doc in ids]


def stream_text(blocks: DocumentBlocks, index: int, streams: int, passes: bool) -> grain.MapDataset:
    """Every `streams`-th block from `index` on: of the endless text, or of each pass by itself."""
    text = grain.MapDataset.source(blocks)
    if passes:
        return text[index::streams].repeat(reseed_each_epoch=False)
    return text.repeat(reseed_each_epoch=False)[index::streams]


@dataclass(frozen=True)
class StreamState:
    """Where a stream continues: its next document, and its buffer in order of arrival."""

    visit: int
    position: int
    buffer: tuple[Document, ...]

    def __deepcopy__(self, memo: dict) -> "StreamState":
        return self  # immutable; grain copies the state of every step

    def to_json(self) -> dict[str, Any]:
        """The buffer as [visit, [positions…]] pairs: arrival is by visit, then by position.

        `tokens` sums the lengths of the buffered documents: another tokenizer gives another sum.
        """
        visits = groupby(self.buffer, key=VISIT)
        return {
            "next": [self.visit, self.position],
            "tokens": sum(map(LENGTH, self.buffer)),
            "buffer": [[visit, list(map(POSITION, documents))] for visit, documents in visits],
        }


class Stream:
    """One logical stream: reads its blocks and packs their documents into rows.

    With `passes` an epoch of its blocks is packed to the last document before the next begins.
    """

    def __init__(
        self,
        index: int,
        layout: Layout,
        blocks: DocumentBlocks,
        encode: BlockEncoder,
        encoded: grain.DatasetIterator,
        passes: bool,
    ) -> None:
        self._index, self._layout, self._blocks, self._encode = index, layout, blocks, encode
        self._encoded = encoded
        self._blocks_per_pass = len(range(index, len(blocks), layout.streams)) if passes else None
        self._start(0, 0)

    def _start(self, visit: int, position: int) -> None:
        self._visit, self._position = visit, position
        self._pass_began = visit
        self._block: list[tuple[int, np.ndarray]] | None = None
        self._encoded.set_state({"next_index": visit})
        row_len = self._layout.sequence_len + 1
        self.packer = BestFitPacker(row_len, self._layout.buffer_docs, self._refill)

    def rows(self) -> list[np.ndarray]:
        """This stream's rows of a step."""
        return [self.packer.row() for _ in range(self._layout.rows // self._layout.streams)]

    def state(self) -> StreamState:
        return StreamState(self._visit, self._position, tuple(self.packer.buffer.in_order()))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from `StreamState.to_json()`; ValueError if the text has changed."""
        self._start(*state["next"])
        texts: list[str] = []
        refs: list[tuple[int, int]] = []
        for visit, positions in state["buffer"]:
            block = (self._index + visit * self._layout.streams) % len(self._blocks)
            texts += self._blocks.pick(block, positions)
            refs += [(visit, position) for position in positions]
        encoded = self._encode(texts)
        documents = [Document(*ref, *pair) for ref, pair in zip(refs, encoded, strict=True)]
        if sum(document.length for document in documents) != state["tokens"]:
            raise ValueError(
                "the documents of the saved data state have other lengths now: resume with the "
                "tokenizer and the shards that the run was started with"
            )
        self.packer.add(documents)

    def _refill(self) -> list[Document]:
        if self._at_end_of_pass():
            self._pass_began = self._visit
            return []
        if self._block is None:
            self._block = next(self._encoded)
        start = self._position
        part = self._block[start : start + REFILL_DOCS]
        documents = [Document(self._visit, start + i, *pair) for i, pair in enumerate(part)]
        self._position += len(part)
        if self._position == len(self._block):
            self._visit, self._position, self._block = self._visit + 1, 0, None
        return documents

    def _at_end_of_pass(self) -> bool:
        if self._blocks_per_pass is None or self._block is not None:
            return False
        return self._visit % self._blocks_per_pass == 0 and self._visit != self._pass_began


# ---- what the training loop calls ------------------------------------------------------------


def train_loader(
    shards: Shards,
    tokenizer: BatchEncoder,
    *,
    rows: int,
    sequence_len: int,
    streams: int = 8,
    buffer_docs: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
    state: Mapping[str, Any] | None = None,
) -> RowLoader:
    """Endless training rows, (rows // process_count, T+1) int32 a step.

    `rows` counts the whole optimizer step over all processes and micro-batches; it must be a
    multiple of `streams`, and that a multiple of `process_count`. `state` comes from `get_state`
    (or `merge_states`). Raises ValueError for a layout that does not divide, an unreadable shard,
    or a state of other data.
    """
    layout = Layout(rows, sequence_len, streams, buffer_docs)
    owned = layout.owned_streams(process_index, process_count)
    return _row_loader(shards.train, tokenizer, layout, owned, passes=False, state=state)


def val_batches(
    shards: Shards,
    tokenizer: BatchEncoder,
    *,
    rows: int,
    sequence_len: int,
    n_batches: int,
    streams: int = 8,
    buffer_docs: int = 1000,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[np.ndarray]:
    """The first `n_batches` batches of validation rows, (rows // process_count, T+1) int32 each.

    Always the same ones. Every document is used once before the text repeats; the first n rows are
    the same set of rows for every batch size that is a multiple of `streams`, and for every number
    of processes. Where `rows` is no multiple of `streams`, or there are fewer
    documents than streams, the largest common divisor that suits is used instead.
    """
    documents = sum(read_footer(path).num_rows for path in shards.val)
    most = math.gcd(rows, streams)
    streams = max(s for s in range(1, most + 1) if most % s == 0 and s <= documents)
    layout = Layout(rows, sequence_len, streams, buffer_docs)
    owned = layout.owned_streams(process_index, process_count)
    with _row_loader(shards.val, tokenizer, layout, owned, passes=True) as loader:
        for _ in range(n_batches):
            yield next(loader)


def _row_loader(
    paths: Sequence[Path],
    tokenizer: BatchEncoder,
    layout: Layout,
    owned: range,
    *,
    passes: bool,
    state: Mapping[str, Any] | None = None,
) -> RowLoader:
    blocks = DocumentBlocks(paths, min_blocks=layout.streams)
    # The cores this process may use, where the system can tell (macOS cannot).
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = 1 if passes else len(owned)  # blocks that are tokenised side by side
    encode = BlockEncoder(tokenizer, layout.sequence_len + 1, max(1, cores // workers))
    identity = {"version": 1, "layout": asdict(layout), "data": blocks.fingerprint}
    # A pass may end soon: its blocks are tokenised when needed, by all threads of the encoder.
    ahead = 0 if passes else 1
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    inputs = {
        index: stream_text(blocks, index, layout.streams, passes)
        .map(encode)
        .to_iter_dataset(options)
        for index in owned
    }

    def make_stream(index: int, encoded: grain.DatasetIterator) -> Stream:
        return Stream(index, layout, blocks, encode, encoded, passes)

    return RowLoader(PackedRowsDataset(inputs, make_stream), identity, state)
