"""One logical stream of the input: its blocks of text in order, tokenised and packed into rows.

Stream s of S reads the blocks s, s+S, s+2S, … of the endless repetition of all blocks. A document
is identified by (visit, position): it is in the visit-th block that the stream reads, at that
position. The next document and those in the packing buffer, each with how much of it is used, are
all that a stream needs to resume.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from nanochat_jax.data.loader import Layout, PackedRowsDataset, RowLoader
from nanochat_jax.data.packing import PACKERS, BestFitPacker, Document, LongDocuments, Packer
from nanochat_jax.data.reader import read_footer
from nanochat_jax.data.shards import DocumentBlocks, Shards

BUFFER_DOCS = 1000
REFILL_DOCS = 128  # documents that enter a cropping packer's buffer together, as in the original
ENCODED_CHARS = 2**22  # characters tokenised together: token ids as Python lists need much memory
VISIT, POSITION, LENGTH = map(itemgetter, range(3))  # of a Document; a state reads thousands
SAMPLE_DOCS, SAMPLE_CHARS = 2048, 2**23  # enough to measure what cropping loses


class BatchEncoder(Protocol):
    """What the loader needs of a tokenizer."""

    def encode_batch(
        self, texts: list[str], *, prepend_bos: bool = ..., threads: int = ...
    ) -> list[list[int]]: ...


class BlockEncoder:
    """Turns the texts of a block into (length, token ids) pairs: the first `row_len` ids, or all.

    It runs in grain's threads; tiktoken releases the GIL.
    """

    def __init__(self, tokenizer: BatchEncoder, row_len: int | None, threads: int) -> None:
        self._tokenizer = tokenizer
        self._row_len = row_len
        self._threads = threads

    def __call__(self, texts: list[str]) -> list[tuple[int, np.ndarray]]:
        return [pair for part in _parts(texts) for pair in self._encode(part)]

    def _encode(self, texts: list[str]) -> list[tuple[int, np.ndarray]]:
        ids = self._tokenizer.encode_batch(texts, prepend_bos=True, threads=self._threads)
        return [(len(doc), np.array(doc[: self._row_len], dtype=np.int32)) for doc in ids]


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """The texts in order, cut into lists of at most ENCODED_CHARS, or of one text."""
    part: list[str] = []
    n_chars = 0
    for text in texts:
        n_chars += len(text)
        if part and n_chars > ENCODED_CHARS:
            yield part
            part, n_chars = [], len(text)
        part.append(text)
    yield part


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
    packed: int  # tokens of all rows so far, and those cropped
    cropped: int

    def __deepcopy__(self, memo: dict) -> "StreamState":
        return self  # immutable; grain copies the state of every step

    def to_json(self) -> dict[str, Any]:
        """The buffer as [visit, [positions…]] pairs, in order of arrival.

        `tokens` sums the lengths of the buffered documents: another tokenizer gives another sum.
        """
        visits = groupby(self.buffer, key=VISIT)
        offsets = [document.offset for document in self.buffer]
        return {
            "next": [self.visit, self.position],
            "tokens": sum(map(LENGTH, self.buffer)),
            "buffer": [[visit, list(map(POSITION, documents))] for visit, documents in visits],
            **({"offsets": offsets} if any(offsets) else {}),
            "packed": self.packed,
            "cropped": self.cropped,
        }


class Stream:
    """One logical stream: reads its blocks and packs their documents into rows.

    With `passes` an epoch of its blocks is packed to the last document before the next begins.
    Where documents continue, none is read again before it is used up: of a short text the buffer
    would hold several copies, which would repeat each other's rows.
    """

    def __init__(
        self,
        index: int,
        layout: Layout,
        blocks: DocumentBlocks,
        encode: BlockEncoder,
        encoded: grain.DatasetIterator,
        passes: bool,
        long_documents: LongDocuments,
    ) -> None:
        self._index, self._layout, self._blocks, self._encode = index, layout, blocks, encode
        self._encoded = encoded
        self._long_documents: LongDocuments = long_documents
        self._passes = passes
        n, streams = len(blocks), layout.streams
        # Visits until the stream meets its first block again.
        self._period = len(range(index, n, streams)) if passes else n // math.gcd(n, streams)
        self._start(0, 0)

    def _start(self, visit: int, position: int) -> None:
        self._visit, self._position = visit, position
        self._pass_began = visit
        self._block: list[tuple[int, np.ndarray]] | None = None
        self._encoded.set_state({"next_index": visit})
        row_len = self._layout.sequence_len + 1
        make_packer = PACKERS[self._long_documents]
        self.packer: Packer = make_packer(row_len, self._layout.buffer_docs, self._refill)

    def rows(self) -> list[np.ndarray]:
        """This stream's rows of a step."""
        return [self.packer.row() for _ in range(self._layout.rows // self._layout.streams)]

    def state(self) -> StreamState:
        packer = self.packer
        buffered = tuple(packer.buffer.in_order())
        return StreamState(self._visit, self._position, buffered, packer.packed, packer.cropped)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from `StreamState.to_json()`; ValueError if the text has changed."""
        self._start(*state["next"])
        refs = [(visit, at) for visit, positions in state["buffer"] for at in positions]
        encoded = dict(zip(sorted(refs), self._encode(self._texts(sorted(refs))), strict=True))
        offsets = state.get("offsets") or repeat(0, len(refs))
        documents = [
            Document(*ref, *encoded[ref], offset) for ref, offset in zip(refs, offsets, strict=True)
        ]
        if sum(document.length for document in documents) != state["tokens"]:
            raise ValueError(
                "the documents of the saved data state have other lengths now: resume with the "
                "tokenizer and the shards that the run was started with"
            )
        self.packer.add(documents)
        # States from before these were counted lack them: then they count from here on.
        self.packer.packed, self.packer.cropped = state.get("packed", 0), state.get("cropped", 0)

    def _texts(self, refs: list[tuple[int, int]]) -> list[str]:
        """The documents of (visit, position) pairs in ascending order: each block is read once."""
        texts: list[str] = []
        for visit, of_visit in groupby(refs, key=VISIT):
            block = (self._index + visit * self._layout.streams) % len(self._blocks)
            texts += self._blocks.pick(block, list(map(POSITION, of_visit)))
        return texts

    def _refill(self) -> list[Document]:
        if self._must_wait():
            return []
        if self._block is None:
            self._block = next(self._encoded)
        start = self._position
        docs = REFILL_DOCS if self._long_documents == "crop" else 1
        part = self._block[start : start + docs]
        documents = [Document(self._visit, start + i, *pair) for i, pair in enumerate(part)]
        self._position += len(part)
        if self._position == len(self._block):
            self._visit, self._position, self._block = self._visit + 1, 0, None
        return documents

    def _must_wait(self) -> bool:
        """Whether documents in the buffer have to be used up before more are read."""
        if self._long_documents == "continue":
            last = (self._visit - self._period, self._position)  # when the next one was read before
            if self._passes:  # or the last of the pass before
                last = (self._visit // self._period * self._period, -1)
            return any((doc.visit, doc.position) <= last for doc in self.packer.buffer.in_order())
        is_new = self._passes and self._block is None and self._visit % self._period == 0
        if not is_new or self._visit == self._pass_began:
            return False
        self._pass_began = self._visit
        return True


# ---- what the training loop calls ------------------------------------------------------------


def train_loader(
    shards: Shards,
    tokenizer: BatchEncoder,
    *,
    rows: int,
    sequence_len: int,
    streams: int = 8,
    buffer_docs: int = BUFFER_DOCS,
    long_documents: LongDocuments = "crop",
    process_index: int = 0,
    process_count: int = 1,
    state: Mapping[str, Any] | None = None,
) -> "TextLoader":
    """Endless training rows, (rows // process_count, T+1) int32 a step.

    `rows` counts the whole optimizer step over all processes and micro-batches; it must be a
    multiple of `streams`, and that a multiple of `process_count`. What becomes of documents longer
    than a row: see packing.py. `state` comes from `get_state` (or `merge_states`). Raises
    ValueError for a layout that does not divide, an unreadable shard, or a state of other data.
    """
    layout = Layout(rows, sequence_len, streams, buffer_docs)
    owned = layout.owned_streams(process_index, process_count)
    return _text_loader(
        shards.train,
        tokenizer,
        layout,
        owned,
        passes=False,
        long_documents=long_documents,
        state=state,
    )


def val_batches(
    shards: Shards,
    tokenizer: BatchEncoder,
    *,
    rows: int,
    sequence_len: int,
    n_batches: int,
    streams: int = 8,
    buffer_docs: int = BUFFER_DOCS,
    long_documents: LongDocuments = "crop",
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
    with _text_loader(
        shards.val, tokenizer, layout, owned, passes=True, long_documents=long_documents
    ) as loader:
        for _ in range(n_batches):
            yield next(loader)


def cropped_share(shards: Shards, tokenizer: BatchEncoder, sequence_len: int) -> float:
    """The share of all tokens that cropping loses, measured on the first training documents."""
    blocks, threads = DocumentBlocks(shards.train), os.cpu_count() or 1
    texts: list[str] = []
    n_chars = 0
    for text in chain.from_iterable(blocks[index] for index in range(len(blocks))):
        if texts and (len(texts) == SAMPLE_DOCS or n_chars + len(text) > SAMPLE_CHARS):
            break
        texts.append(text)
        n_chars += len(text)
    encoded = BlockEncoder(tokenizer, sequence_len + 1, threads)(texts)
    documents = [Document(0, at, *pair) for at, pair in enumerate(encoded)]
    lots = [documents[at : at + REFILL_DOCS] for at in range(0, len(documents), REFILL_DOCS)]
    # After the empty list the buffer is used up; then the last row is filled.
    deliver = chain(lots, [[]], repeat(documents))
    packer = BestFitPacker(sequence_len + 1, BUFFER_DOCS, lambda: next(deliver))
    total = sum(document.length for document in documents)
    while packer.packed + packer.cropped < total:
        packer.row()
    return packer.cropped / (packer.cropped + packer.packed)


class TextLoader(RowLoader):
    """A loader of text, which knows how much of it was cropped."""

    @property
    def cropped_and_packed(self) -> tuple[int, int]:
        """Tokens cropped, and tokens of all rows, of this process's streams up to the last step."""
        states = self._iterator.get_state()["streams"].values()
        return sum(state.cropped for state in states), sum(state.packed for state in states)


def _text_loader(
    paths: Sequence[Path],
    tokenizer: BatchEncoder,
    layout: Layout,
    owned: range,
    *,
    passes: bool,
    long_documents: LongDocuments,
    state: Mapping[str, Any] | None = None,
) -> TextLoader:
    blocks = DocumentBlocks(paths, min_blocks=layout.streams)
    # The cores this process may use, where the system can tell (macOS cannot).
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = 1 if passes else len(owned)  # blocks that are tokenised side by side
    row_len = layout.sequence_len + 1 if long_documents == "crop" else None
    encode = BlockEncoder(tokenizer, row_len, max(1, cores // workers))
    identity = {
        "version": 1,
        "layout": asdict(layout),
        "data": blocks.fingerprint,
        "long_documents": long_documents,
    }
    if state is not None:
        state = {"long_documents": "crop", **state}  # states from before that was a choice
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
        return Stream(index, layout, blocks, encode, encoded, passes, long_documents)

    return TextLoader(PackedRowsDataset(inputs, make_stream), identity, state)
