"""Best-fit packing against the original's output and against a plain scan of the buffer."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.data.packing import BestFitPacker, Document, FitBuffer

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
    assert read - waiting >= 15 * row_len  # the rest was cropped


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
