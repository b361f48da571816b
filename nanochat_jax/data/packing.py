"""Best-fit packing: documents of any length become rows of one length that start with <|bos|>.

Nothing is padded, and each token can attend to its document's beginning, or to that of its piece.
Two packers differ in what happens to a document that does not fit:

`BestFitPacker`, the original's: the longest document of a buffer that still fits into the row is
taken, again and again; when none fits, the shortest one is cropped to fill the row exactly. At 2048
tokens that loses about a third of the published text; of a book it keeps the first row.

`ContinuingPacker` loses nothing: a row begins with the document that has waited longest, whole or
in part; then again the longest that fits is taken, and when none fits, the beginning of the
shortest. What is left of a document waits behind all others, with <|bos|> in front. So the pieces
of long documents take turns, and the buffer has one entry for each document, however long.

The buffer (`FitBuffer`) knows nothing about rows: conversations, which are padded rather than
cropped, are packed with the same search.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

ARRIVAL_BITS = 64  # a key of the buffer is length · 2^64 + arrival number
# A continuing packer's buffer: rows of text to choose from, and documents to take turns. More would
# only delay the later pieces of long documents, and a short run would learn from beginnings alone.
BUFFER_ROWS, TURNS = 64, 8

type LongDocuments = Literal["crop", "continue"]


class Document(NamedTuple):
    """A tokenised document and where it came from.

    `tokens` starts with <|bos|> and may be cut to the row length where no more of it is ever used;
    `length` is the number of tokens before that cut, by which documents are compared.
    """

    visit: int  # which block of its stream, counted over the endless repetition
    position: int  # which document of the block
    length: int
    tokens: np.ndarray  # (length,) int32, or cut
    offset: int = 0  # tokens already used, <|bos|> not counted

    @property
    def left(self) -> int:
        """Tokens of the piece that is left, its <|bos|> included."""
        return self.length - self.offset

    def piece(self, n: int) -> list[np.ndarray]:
        """The first n of these."""
        return [self.tokens[:1], self.tokens[self.offset + 1 : self.offset + n]]


class FitBuffer[T]:
    """Items ordered by length, then by arrival: both searches are one bisection.

    The answers are those of a scan in order of arrival that keeps the first best item.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._items: dict[int, tuple[int, T]] = {}  # with their keys, in order of arrival
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, item: T) -> None:
        key = (length << ARRIVAL_BITS) + self._arrivals
        insort(self._keys, key)
        self._items[self._arrivals] = key, item
        self._arrivals += 1

    def pop_largest(self, at_most: int) -> T | None:
        """Takes out the longest item of at most that length, the earliest among equals."""
        end = bisect_left(self._keys, (at_most + 1) << ARRIVAL_BITS)
        if end == 0:
            return None
        length = self._keys[end - 1] >> ARRIVAL_BITS
        return self._pop(bisect_left(self._keys, length << ARRIVAL_BITS, 0, end))

    def pop_shortest(self) -> T:
        """Takes out the shortest item, the earliest among equals; IndexError when empty."""
        return self._pop(0)

    def pop_earliest(self) -> T:
        """Takes out the item that arrived first; IndexError when empty."""
        key = next((key for key, _ in self._items.values()), 0)
        return self._pop(bisect_left(self._keys, key))

    def first(self) -> T | None:
        """The item that arrived first, left where it is."""
        return next((item for _, item in self._items.values()), None)

    def in_order(self) -> list[T]:
        """The items in order of arrival; added again in that order they give the same answers."""
        return [item for _, item in self._items.values()]

    def _pop(self, index: int) -> T:
        key = self._keys.pop(index)
        return self._items.pop(key & ((1 << ARRIVAL_BITS) - 1))[1]


class BestFitPacker:
    """Packs the documents that `refill` delivers into rows of `row_len` tokens.

    `refill()` returns the next few documents. It is called until the buffer holds `buffer_docs` of
    them, before each choice. An empty list marks the end of a pass over the text: from there on
    the buffer is used up to its last document before the next pass is begun.
    """

    def __init__(
        self, row_len: int, buffer_docs: int, refill: Callable[[], Sequence[Document]]
    ) -> None:
        self.row_len = row_len
        self.buffer_docs = buffer_docs
        self.buffer: FitBuffer[Document] = FitBuffer()
        self.packed = self.cropped = 0  # tokens so far
        self._refill = refill
        self._draining = False

    def add(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self.buffer.add(document.length, document)

    def row(self) -> np.ndarray:
        """The next row, (row_len,) int32; ValueError when two passes in a row hold no document."""
        parts: list[np.ndarray] = []
        remaining = self.row_len
        while remaining:
            self._top_up()
            document = self.buffer.pop_largest(at_most=remaining)
            if document is None:
                document = self.buffer.pop_shortest()
                self.cropped += document.length - remaining
            parts.append(document.tokens[:remaining])
            remaining -= min(document.length, remaining)
        self.packed += self.row_len
        return np.concatenate(parts)

    def _top_up(self) -> None:
        if self._draining and len(self.buffer):
            return
        self._draining = False
        while len(self.buffer) < self.buffer_docs and not self._draining:
            documents = self._refill()
            if not documents and not len(self.buffer):
                documents = self._refill()  # the pass and the buffer ended together
                if not documents:
                    raise ValueError("there are no documents to pack")
            self.add(documents)
            self._draining = not documents


class ContinuingPacker:
    """Packs documents into rows of `row_len` ≥ 2 tokens, and long ones into several.

    `refill()` returns the next few documents, or none while those in the buffer have to be used up
    first. It is called before each choice, until the buffer holds enough. A row may end with a
    <|bos|> whose document begins in a later row.
    """

    cropped = 0

    def __init__(
        self, row_len: int, buffer_docs: int, refill: Callable[[], Sequence[Document]]
    ) -> None:
        self.row_len = row_len
        self.buffer_docs = buffer_docs
        self.buffer: FitBuffer[Document] = FitBuffer()
        self.packed = 0
        self._waiting = 0  # tokens in the buffer
        self._refill = refill

    def add(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self.buffer.add(document.left, document)
            self._waiting += document.left

    def row(self) -> np.ndarray:
        """The next row, (row_len,) int32; ValueError where there is no document."""
        parts: list[np.ndarray] = []
        remaining = self.row_len
        while remaining:
            self._top_up()
            document = self._choose(remaining)
            self._waiting -= document.left
            n = min(document.left, remaining)
            parts += document.piece(n)
            remaining -= n
            if n < document.left:
                self.add([document._replace(offset=document.offset + n - 1)])
        self.packed += self.row_len
        return np.concatenate(parts)

    def _choose(self, remaining: int) -> Document:
        if remaining == self.row_len:
            return self.buffer.pop_earliest()
        return self.buffer.pop_largest(at_most=remaining) or self.buffer.pop_shortest()

    def _top_up(self) -> None:
        while self._is_low():
            documents = self._refill()
            if not documents and not len(self.buffer):
                raise ValueError("there are no documents to pack")
            if not documents:
                return
            self.add(documents)

    def _is_low(self) -> bool:
        documents = len(self.buffer)
        few = documents < TURNS or self._waiting < BUFFER_ROWS * self.row_len
        return documents < self.buffer_docs and few


type Packer = BestFitPacker | ContinuingPacker
PACKERS: dict[LongDocuments, type[BestFitPacker] | type[ContinuingPacker]] = {
    "crop": BestFitPacker,
    "continue": ContinuingPacker,
}
