"""Best-fit packing against the original's output and against a plain scan of the buffer."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.data.packing import (
    BUFFER_ROWS,
    TURNS,
    BestFitPacker,
    ContinuingPacker,
    Document,
    FitBuffer,
)

BOS = 500


def document(position: int, tokens: list[int], row_len: int, visit: int = 0) -> Document:
    return Document(visit, position, len(tokens), np.array(tokens[:row_len], np.int32))


class CyclingSource:
    """Delivers batches of documents in order, for ever, and remembers the last batch it gave."""

    def __init__(self, docs: list[list[int]], batch: int, row_len: int):
        self.batches = [docs[start : start + batch] for start in range(0, len(docs), batch)]
        self.row_len = row_len
        self.calls = 0

    def __call__(self) -> list[Document]:
        batch = self.batches[self.calls % len(self.batches)]
        self.calls += 1
        return [document(i, tokens, self.row_len) for i, tokens in enumerate(batch)]

    def original_state(self) -> list[int]:
        epoch, batch = divmod(self.calls - 1, len(self.batches))
        return [0, batch, epoch + 1]


@pytest.mark.golden
def test_rows_are_those_of_the_original(golden):
    packing = golden.json("packing")
    docs = packing["pretrain"]["docs"]
    assert packing["pretrain"]["runs"]
    for run in packing["pretrain"]["runs"]:
        row_len = run["T"] + 1
        source = CyclingSource(docs, run["tokenizer_batch_size"], row_len)
        packer = BestFitPacker(row_len, run["buffer_size"], source)
        for batch, (inputs, last) in enumerate(
            zip(run["inputs"], run["last_targets"], strict=True)
        ):
            rows = np.stack([packer.row() for _ in range(run["B"])])
            np.testing.assert_array_equal(rows[:, :-1], inputs)
            np.testing.assert_array_equal(rows[:, -1], last)
            assert source.original_state() == run["state"][batch]


# ---- the buffer ------------------------------------------------------------------------------

operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 12)),
        st.tuples(st.just("largest"), st.integers(0, 12)),
        st.tuples(st.just("shortest"), st.just(0)),
        st.tuples(st.just("earliest"), st.just(0)),
    ),
    max_size=80,
)


@given(operations)
def test_buffer_answers_like_a_scan_in_order_of_arrival(steps):
    buffer: FitBuffer[int] = FitBuffer()
    scanned: list[tuple[int, int]] = []  # (length, item) in order of arrival
    for item, (operation, number) in enumerate(steps):
        if operation == "add":
            buffer.add(number, item)
            scanned.append((number, item))
        elif operation == "largest":
            fitting = [entry for entry in scanned if entry[0] <= number]
            best = max(fitting, key=lambda entry: entry[0], default=None)  # the first of equals
            assert buffer.pop_largest(at_most=number) == (best[1] if best else None)
            if best:
                scanned.remove(best)
        elif scanned and operation == "earliest":
            assert buffer.first() == scanned[0][1]
            assert buffer.pop_earliest() == scanned.pop(0)[1]
        elif scanned:
            shortest = min(scanned, key=lambda entry: entry[0])
            assert buffer.pop_shortest() == shortest[1]
            scanned.remove(shortest)
        assert buffer.in_order() == [item for _, item in scanned]
        assert len(buffer) == len(scanned)


# ---- whole rows ------------------------------------------------------------------------------

doc_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def numbered_docs(lengths: list[int]) -> list[list[int]]:
    """Every document is <|bos|> and then tokens that name the document."""
    return [[BOS] + [index] * (length - 1) for index, length in enumerate(lengths)]


@given(doc_lengths, st.integers(2, 24), st.integers(1, 20), st.integers(1, 7))
def test_rows_are_full_start_with_bos_and_hold_what_was_read(lengths, row_len, buffer, batch):
    source = CyclingSource(numbered_docs(lengths), batch, row_len)
    packer = BestFitPacker(row_len, buffer, source)
    rows = [packer.row() for _ in range(15)]
    assert all(row.shape == (row_len,) and row[0] == BOS and row.dtype == np.int32 for row in rows)
    read = sum(
        len(tokens)
        for call in range(source.calls)
        for tokens in source.batches[call % len(source.batches)]
    )
    waiting = sum(doc.length for doc in packer.buffer.in_order())
    assert packer.packed == 15 * row_len
    assert read - waiting == packer.packed + packer.cropped


def passes(docs: list[list[int]], batch: int, row_len: int) -> Iterator[list[Document]]:
    while True:
        for start in range(0, len(docs), batch):
            part = docs[start : start + batch]
            yield [document(start + i, tokens, row_len) for i, tokens in enumerate(part)]
        yield []


@given(doc_lengths, st.integers(2, 24), st.integers(1, 100), st.integers(1, 7))
def test_a_pass_uses_each_document_once_before_the_next_begins(lengths, row_len, buffer, batch):
    docs = numbered_docs(lengths)
    deliver = passes(docs, batch, row_len)
    packer = BestFitPacker(row_len, buffer, lambda: next(deliver))
    used: list[int] = []
    while len(used) < 3 * len(docs):
        row = packer.row()
        starts = np.flatnonzero(row == BOS)
        for start, end in zip(starts, [*starts[1:], row_len], strict=True):
            # A document of one token, or cropped to one, does not say which one it is.
            used.append(int(row[start + 1]) if end > start + 1 else -1)
    for begin in range(0, len(used) - len(docs) + 1, len(docs)):
        named = [name for name in used[begin : begin + len(docs)] if name >= 0]
        assert len(named) == len(set(named))


def test_no_documents_at_all_is_an_error():
    with pytest.raises(ValueError, match="no documents"):
        BestFitPacker(8, 4, list).row()


# ---- documents that continue -----------------------------------------------------------------


class Passes:
    """Delivers a pass over the documents, one by one, and the next when that is used up."""

    def __init__(self, docs: list[list[int]]):
        self.docs, self.read, self.packer = docs, 0, None

    def __call__(self) -> list[Document]:
        visit, position = divmod(self.read, len(self.docs))
        waiting = self.packer.buffer.first()
        if waiting and waiting.visit != visit:
            return []
        self.read += 1
        return [document(position, self.docs[position], 10**9, visit)]


def continuing(docs: list[list[int]], row_len: int, buffer: int = 1000) -> ContinuingPacker:
    source = Passes(docs)
    source.packer = ContinuingPacker(row_len, buffer, source)
    return source.packer


def pieces(row: np.ndarray) -> list[list[int]]:
    """The pieces of a row without their <|bos|>, with which the row has to begin."""
    assert row[0] == BOS
    return [part[1:].tolist() for part in np.split(row, np.flatnonzero(row == BOS)[1:])]


def told_apart(lengths: list[int]) -> list[list[int]]:
    """Documents of which each token says where it stands: 1000 · document + place."""
    return [
        [BOS, *(1000 * (index + 1) + place for place in range(length - 1))]
        for index, length in enumerate(lengths)
    ]


long_lengths = st.lists(st.integers(1, 200), min_size=1, max_size=30)


@settings(deadline=None)
@given(long_lengths, st.integers(2, 24), st.integers(1, 40))
def test_no_token_is_lost_and_each_document_keeps_its_order(lengths, row_len, buffer):
    docs = told_apart(lengths)
    packer = continuing(docs, row_len, buffer)
    content = sum(length - 1 for length in lengths)
    used: list[int] = []
    rows = 0
    while len(used) < 2 * content:
        row = packer.row()
        assert row.shape == (row_len,)
        assert row.dtype == np.int32
        used += [token for piece in pieces(row) for token in piece]
        rows += 1
    expected = [token for doc in docs for token in doc[1:]]
    for begin in (0, content):  # each pass has every token once
        one_pass = used[begin : begin + content]
        assert sorted(one_pass) == expected
        for index in range(len(docs)):
            own = [token for token in one_pass if token // 1000 == index + 1]
            assert own == docs[index][1:]
    assert packer.cropped == 0
    assert packer.packed == row_len * rows


@given(long_lengths, st.integers(2, 24), st.integers(1, 40), st.integers(0, 30))
def test_the_buffer_in_order_of_arrival_is_the_whole_state(lengths, row_len, buffer, n_before):
    packer = continuing(told_apart(lengths), row_len, buffer)
    for _ in range(n_before):
        packer.row()
    other = continuing(told_apart(lengths), row_len, buffer)
    other._refill.read = packer._refill.read
    other.add(packer.buffer.in_order())
    for _ in range(12):
        np.testing.assert_array_equal(other.row(), packer.row())


def test_long_documents_take_turns():
    """Of 40 books none gives a row again before the others of the buffer gave one."""
    packer = continuing(told_apart([900] * 40), 30)
    first = [row[1] // 1000 for row in (packer.row() for _ in range(20 * TURNS))]
    for begin in range(0, len(first), TURNS):
        assert len(set(first[begin : begin + TURNS])) == TURNS


def test_books_among_letters_do_not_hold_them_up():
    """Two books of 15 rows each among 2000 letters are spread over hundreds of rows."""
    letters = [20] * 1000
    packer = continuing(told_apart([900, *letters, 900, *letters]), 64, 100)
    rows = [pieces(packer.row()) for _ in range(500)]
    is_of_book = [[piece[0] // 1000 in (1, 1002) for piece in row if piece] for row in rows]
    assert max(sum(map(sum, is_of_book[at : at + 16])) for at in range(400)) <= 3
    whole = sum(len(piece) == 19 for row in rows for piece in row)
    assert whole > 0.7 * sum(len(row) for row in rows)


@pytest.mark.parametrize("length", [5, 250_000])
def test_the_buffer_is_bounded_however_long_the_documents_are(length):
    doc = np.full(length, 7, np.int32)
    doc[0] = BOS
    packer = ContinuingPacker(257, 1000, lambda: [Document(0, 0, length, doc)])
    for _ in range(400):
        packer.row()
        waiting = packer.buffer.in_order()
        assert len(waiting) <= 1000
        assert len(waiting) <= TURNS or sum(d.left for d in waiting) < (BUFFER_ROWS + 2) * 257


def test_nothing_to_continue_is_an_error():
    with pytest.raises(ValueError, match="no documents"):
        ContinuingPacker(8, 4, list).row()
