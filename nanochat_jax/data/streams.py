"""One logical stream of the input: its blocks of text in order, tokenised and packed into rows.

Stream s of S reads the blocks s, s+S, s+2S, … of the endless repetition of all blocks. A document
is named by (visit, position): the how-many-th block of the stream it is in, and its place there.
From the next document and the names of those in the packing buffer a stream continues exactly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol

import grain
import numpy as np

from nanochat_jax.data.packing import BestFitPacker, Document
from nanochat_jax.data.shards import DocumentBlocks

REFILL_DOCS = 128  # documents that enter the packing buffer at once, as in the original
VISIT, POSITION, LENGTH = map(itemgetter, range(3))  # of a Document; a state reads thousands


class Encoder(Protocol):
    """What the loader asks of a tokenizer."""

    def encode_batch(
        self, texts: list[str], *, prepend_bos: bool = ..., threads: int = ...
    ) -> list[list[int]]: ...


@dataclass(frozen=True)
class Layout:
    """Everything on which the rows depend besides the data and the tokenizer."""

    rows: int  # of one step, over all processes and micro-batches
    sequence_len: int
    streams: int
    buffer_docs: int

    def owned_streams(self, process_index: int, process_count: int) -> range:
        """The streams of one process; ValueError when rows, streams and processes do not divide."""
        if self.rows % self.streams:
            raise ValueError(
                f"{self.rows} rows a step cannot be divided among {self.streams} streams; "
                f"use {math.gcd(self.rows, self.streams)} streams, or another batch size"
            )
        if self.streams % process_count:
            raise ValueError(
                f"{self.streams} streams cannot be divided among {process_count} processes; "
                "use a number of streams that is a multiple of the number of processes"
            )
        owned = self.streams // process_count
        return range(process_index * owned, (process_index + 1) * owned)


class BlockEncoder:
    """Turns the texts of a block into (length, the first `row_len` token ids) pairs.

    It runs in the threads that grain keeps; tiktoken lets go of the GIL meanwhile.
    """

    def __init__(self, tokenizer: Encoder, row_len: int, threads: int) -> None:
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
    """What a stream will do next: its next document, and what waits in its buffer, by arrival."""

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
    """One logical stream: follows its blocks and packs their documents into rows.

    With `passes` a pass over its blocks is packed to the last document before the next begins.
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

    @property
    def used_tokens(self) -> int:
        return self.packer.used_tokens

    @property
    def cropped_tokens(self) -> int:
        return self.packer.cropped_tokens

    def rows(self) -> list[np.ndarray]:
        """This stream's part of a step."""
        return [self.packer.row() for _ in range(self._layout.rows // self._layout.streams)]

    def state(self) -> StreamState:
        return StreamState(self._visit, self._position, tuple(self.packer.buffer.in_order()))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `StreamState.to_json()`; ValueError when the text is not the same."""
        self._start(*state["next"])
        texts: list[str] = []
        refs: list[tuple[int, int]] = []
        for visit, positions in state["buffer"]:
            texts += self._blocks.pick(self._block_of(visit), positions)
            refs += [(visit, position) for position in positions]
        encoded = self._encode(texts)
        documents = [Document(*ref, *pair) for ref, pair in zip(refs, encoded, strict=True)]
        if sum(document.length for document in documents) != state["tokens"]:
            raise ValueError(
                "the documents of the saved data state have other lengths now: resume with the "
                "tokenizer and the shards that the run was started with"
            )
        self.packer.add(documents)

    def _block_of(self, visit: int) -> int:
        return (self._index + visit * self._layout.streams) % len(self._blocks)

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
