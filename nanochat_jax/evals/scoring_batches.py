"""Spans to rows to batches: what scoring.py runs, as NumPy arrays.

Shapes: B rows, P tokens of a prefix, C tokens of all continuations of a row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_CONTINUATION = 512  # tokens of a row's continuations: attention among them is quadratic
MIN_CONTINUATION = 16
SMALL_SHARE = 1 / 500  # of all tokens: leaves CORE some 20 shapes and a quarter of padding

type Shape = tuple[int, int]  # (P, C)


class Span(NamedTuple):
    """tokens[start:] are to be scored, given all before them; 1 ≤ start < len(tokens)."""

    tokens: np.ndarray  # int32 (T,)
    start: int


class SpanScore(NamedTuple):
    """One number for each scored token of a span."""

    losses: np.ndarray  # float32: −log p, nats
    is_argmax: np.ndarray  # bool: whether it is the most likely token there

    @property
    def mean_loss(self) -> float:
        return float(self.losses.mean())


# --- spans to rows --------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """Tokens behind a row's prefix; all after the first `skip` + 1 are scored."""

    tokens: np.ndarray
    skip: int
    span_id: tuple[int, int]  # (group, span) that the scores belong to
    offset: int = 0  # where they begin among the span's scores


class ScoringRow(NamedTuple):
    prefix: np.ndarray
    continuations: list[Continuation]
    first_position: int = 0  # of the prefix in the whole text

    @property
    def n_continued(self) -> int:
        return sum(len(each.tokens) for each in self.continuations)


def rows_of(group: int, spans: Sequence[Span], context_len: int) -> list[ScoringRow]:
    """One row for all spans of a group that begin alike, else at least one for each.

    Only the last `context_len` tokens of each prefix are kept.
    """
    first = spans[0].tokens
    # The last common token begins every continuation: its logits score the second token.
    cut = min(min(common_length(first, span.tokens), span.start) for span in spans) - 1
    continuations = [
        Continuation(span.tokens[cut:], span.start - 1 - cut, (group, i))
        for i, span in enumerate(spans)
    ]
    rows = [ScoringRow(first[: max(cut, 0)], continuations)]
    if cut < 0 or rows[0].n_continued > MAX_CONTINUATION:
        rows = [row for i, span in enumerate(spans) for row in _rows_of_span(span, (group, i))]
    return [
        row._replace(
            prefix=row.prefix[-context_len:], first_position=max(0, len(row.prefix) - context_len)
        )
        for row in rows
    ]


def _rows_of_span(span: Span, span_id: tuple[int, int]) -> Iterator[ScoringRow]:
    """A span alone, in rows of limited length: each begins where the one before it ended."""
    end = len(span.tokens)
    for first in range(span.start - 1, end - 1, MAX_CONTINUATION - 1):
        tokens = span.tokens[first : min(first + MAX_CONTINUATION, end)]
        continuation = Continuation(tokens, 0, span_id, first + 1 - span.start)
        yield ScoringRow(span.tokens[:first], [continuation])


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common from the left."""
    shared = min(len(a), len(b))
    different = a[:shared] != b[:shared]
    return int(different.argmax()) if different.any() else shared


def bucket(size: int, least: int) -> int:
    """The first of least, 2·least, 3·least, 4·least, 6·least, 8·least, … that holds `size`."""
    power = least
    while size > power:
        if power > least and size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


# --- rows to batches ------------------------------------------------------------------------------


class ScoringBatch(NamedTuple):
    """Rows of one shape as arrays, int32, padded on the right."""

    prefix_BP: Any
    prefix_length_B: Any
    first_position_B: Any  # of the prefix in the whole text
    token_BC: Any  # of the continuations
    before_BC: Any  # the token before each of them; −1 for none
    position_BC: Any
    segment_BC: Any  # number of the continuation in its row; −1 is padding
    target_BC: Any  # the token to score after each; −1 for none


def shapes_of(
    rows: Sequence[ScoringRow], min_prefix: int, budget: int, context_len: int
) -> list[Shape]:
    """The shape of each row, whose prefix has at most `context_len` tokens.

    Compiling a shape is expensive, so its rows join the next larger one in use where that adds
    little padding: one batch of it, or a small share of all there is to compute.
    """
    widest = -(-context_len // min_prefix) * min_prefix
    exact = [
        (
            min(widest, bucket(len(row.prefix), min_prefix)),
            bucket(row.n_continued, MIN_CONTINUATION),
        )
        for row in rows
    ]
    counts = Counter(exact)
    allowed = max(budget, SMALL_SHARE * sum(map(sum, exact)))
    moved: dict[Shape, Shape] = {}
    for shape in sorted(counts, key=sum):
        larger = [s for s in counts if s != shape and s[0] >= shape[0] and s[1] >= shape[1]]
        joined = min(larger, key=sum, default=shape)
        if joined != shape and counts[shape] * (sum(joined) - sum(shape)) <= allowed:
            moved[shape] = joined
            counts[joined] += counts.pop(shape)
    # From the largest down, so that each shape points straight to its last one.
    for shape in reversed(moved):
        moved[shape] = moved.get(moved[shape], moved[shape])
    return [moved.get(shape, shape) for shape in exact]


def batches_of(
    rows: Sequence[ScoringRow], min_prefix: int, budget: int, n_devices: int, context_len: int
) -> list[tuple[Shape, int, list[ScoringRow]]]:
    """(shape, rows of the batch as compiled, the rows), the largest shapes first.

    `budget` is in tokens of one device, padding included; batches of one shape are equally full.
    """
    by_shape: dict[Shape, list[ScoringRow]] = {}
    for row, shape in zip(rows, shapes_of(rows, min_prefix, budget, context_len), strict=True):
        by_shape.setdefault(shape, []).append(row)
    batches = []
    for shape in sorted(by_shape, key=sum, reverse=True):
        of_shape = by_shape[shape]
        at_most = max(1, budget // sum(shape)) * n_devices
        n_batches = -(-len(of_shape) // at_most)
        size = -(-len(of_shape) // (n_batches * n_devices)) * n_devices
        for first in range(0, len(of_shape), size):
            batches.append((shape, size, of_shape[first : first + size]))
    return batches


def fill(shape: Shape, size: int, rows: Sequence[ScoringRow]) -> ScoringBatch:
    """The arrays of a batch of `size` rows; missing rows are padding."""
    P, C = shape
    batch = ScoringBatch(
        np.zeros((size, P), np.int32),
        *(np.zeros(size, np.int32) for _ in range(2)),
        *(np.zeros((size, C), np.int32) for _ in range(3)),
        *(np.full((size, C), -1, np.int32) for _ in range(2)),
    )
    for b, row in enumerate(rows):
        length = len(row.prefix)
        batch.prefix_BP[b, :length] = row.prefix
        batch.prefix_length_B[b] = length
        batch.first_position_B[b] = row.first_position
        end = 0
        for number, (tokens, skip, _, _) in enumerate(row.continuations):
            first, end = end, end + len(tokens)
            here = (b, slice(first, end))
            batch.token_BC[here] = tokens
            batch.before_BC[here] = [row.prefix[-1] if length else -1, *tokens[:-1]]
            batch.position_BC[here] = row.first_position + length + np.arange(len(tokens))
            batch.segment_BC[here] = number
            batch.target_BC[b, first + skip : end - 1] = tokens[skip + 1 :]
    return batch
