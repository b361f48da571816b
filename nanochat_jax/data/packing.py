"""Best-fit packing: documents of any length become rows of one length that start with <|bos|>.

The longest document of a buffer that still fits into the row is taken, again and again; when none
fits, the shortest one is cropped to fill the row exactly. Nothing is padded; at 2048 tokens about a
third of all tokens is cropped, and in return each token can attend to its document's beginning.

The buffer (`FitBuffer`) knows nothing about rows: conversations, which are padded rather than
cropped, are packed with the same search.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ARRIVAL_BITS = 64  # a key of the buffer is length · 2^64 + arrival number


class Document(NamedTuple):
    """A tokenised document and where it came from.

    `tokens` starts with <|bos|> and may be cut to the row length, since no row can hold more of it;
    `length` is the number of tokens before that cut, by which documents are compared.
    """

    visit: int  # which block of its stream, counted over the endless repetition
    position: int  # which document of the block
    length: int
    tokens: np.ndarray  # (min(length, row length),) int32


class FitBuffer[T]:
    """Items ordered by length, then by arrival: both searches are one bisection.

    The answers are those of a scan in order of arrival that keeps the first best item.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []
        self._items: dict[int, T] = {}  # a dict keeps the order of arrival
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, item: T) -> None:
        insort(self._keys, (length << ARRIVAL_BITS) + self._arrivals)
        self._items[self._arrivals] = item
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

    def in_order(self) -> list[T]:
        """The items in order of arrival; added again in that order they give the same answers."""
        return list(self._items.values())

    def _pop(self, index: int) -> T:
        key = self._keys.pop(index)
        return self._items.pop(key & ((1 << ARRIVAL_BITS) - 1))


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
            parts.append(document.tokens[:remaining])
            remaining -= min(document.length, remaining)
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
