"""Questions to rows to batches: what scoring.py runs, as NumPy arrays.

Shapes: B rows, P tokens of a prefix, C tokens of a row's tails.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_TAIL = 512  # tokens of a row's tails; each of them is compared with each
LEAST_TAIL = 16
SMALL_SHARE = 1 / 500  # of all tokens: leaves CORE some 20 shapes and a quarter of padding
EVERYTHING = int(np.iinfo(np.int32).max)

type Shape = tuple[int, int]  # (P, C)


class Span(NamedTuple):
    """tokens[start:] are to be scored, given all before them; 1 ≤ start < len(tokens)."""

    tokens: np.ndarray  # int32 (T,)
    start: int


class Score(NamedTuple):
    """What the model says of a span's scored tokens, one number each."""

    losses: np.ndarray  # float32: −log p, nats
    hits: np.ndarray  # bool: whether it is the likeliest token there

    @property
    def mean_loss(self) -> float:
        return float(self.losses.mean())


# --- questions to rows ----------------------------------------------------------------------------


class Tail(NamedTuple):
    """Tokens behind a row's prefix; all after the first `skip` + 1 are scored."""

    tokens: np.ndarray
    skip: int
    owner: tuple[int, int]  # (group, span) that the scores belong to
    at: int = 0  # where they begin among the span's scores


class Row(NamedTuple):
    prefix: np.ndarray
    tails: list[Tail]
    first: int = 0  # position of the prefix's first token in the whole text

    @property
    def tail_tokens(self) -> int:
        return sum(len(tail.tokens) for tail in self.tails)


def rows_of(group: int, spans: Sequence[Span], reach: int = EVERYTHING) -> list[Row]:
    """One row for all spans of a question where their beginning is the same, else one for each.

    Of each prefix the last `reach` tokens are kept.
    """
    return [
        row._replace(prefix=row.prefix[-reach:], first=max(0, len(row.prefix) - reach))
        for row in _whole_rows(group, spans)
    ]


def _whole_rows(group: int, spans: Sequence[Span]) -> list[Row]:
    # The last common token is every tail's first: its logits score the second.
    cut = min(_common_prefix(spans), *(span.start for span in spans)) - 1
    tails = [
        Tail(span.tokens[cut:], span.start - 1 - cut, (group, i)) for i, span in enumerate(spans)
    ]
    row = Row(spans[0].tokens[: max(cut, 0)], tails)
    if cut >= 0 and row.tail_tokens <= MAX_TAIL:
        return [row]
    return [part for i, span in enumerate(spans) for part in _pieces(span, (group, i))]


def _pieces(span: Span, owner: tuple[int, int]) -> Iterator[Row]:
    """A span alone, in rows whose tails are not too long: each goes on where the last one ended."""
    end = len(span.tokens)
    for first in range(span.start - 1, end - 1, MAX_TAIL - 1):
        tail = span.tokens[first : min(first + MAX_TAIL, end)]
        yield Row(span.tokens[:first], [Tail(tail, 0, owner, first + 1 - span.start)])


def _common_prefix(spans: Sequence[Span]) -> int:
    first, *others = (span.tokens for span in spans)
    return min((common_length(first, other) for other in others), default=len(first))


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows have in common from the left."""
    shared = min(len(a), len(b))
    different = a[:shared] != b[:shared]
    return int(different.argmax()) if different.any() else shared


def bucket(size: int, least: int) -> int:
    """The first of least, 2·least, 3·least, 4·least, 6·least, 8·least, … that holds `size`."""
    power = least
    while True:
        for step in (power, power * 3 // 2):
            if size <= step and (step == power or power > least):
                return step
        power *= 2


# --- rows to batches ------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of one shape as arrays, int32, padded on the right."""

    prefix_BP: Any
    prefix_length_B: Any
    first_B: Any  # position of the prefix's first token
    tail_BC: Any
    before_BC: Any  # the token before each of the tail; −1 for none
    position_BC: Any
    segment_BC: Any  # which tail of the row; −1 is padding
    target_BC: Any  # the token to score behind each; −1 for none


def shapes_of(
    rows: Sequence[Row], least_prefix: int, budget: int, reach: int = EVERYTHING
) -> list[Shape]:
    """The shape of each row, whose prefix has at most `reach` tokens.

    Compiling a shape is dear, so its rows join the next larger one in use where that adds little
    padding: a batch of it, or a small share of all there is to compute.
    """
    widest = -(-reach // least_prefix) * least_prefix
    prefixes = [min(widest, bucket(len(row.prefix), least_prefix)) for row in rows]
    tails = [bucket(row.tail_tokens, LEAST_TAIL) for row in rows]
    exact = list(zip(prefixes, tails, strict=True))
    counts = Counter(exact)
    allowed = max(budget, SMALL_SHARE * sum(map(sum, exact)))
    moved: dict[Shape, Shape] = {}
    for shape in sorted(counts, key=sum):
        larger = [s for s in counts if s != shape and s[0] >= shape[0] and s[1] >= shape[1]]
        joined = min(larger, key=sum, default=shape)
        if joined != shape and counts[shape] * (sum(joined) - sum(shape)) <= allowed:
            moved[shape] = joined
            counts[joined] += counts.pop(shape)
    return [_follow(moved, shape) for shape in exact]


def _follow(moved: dict[Shape, Shape], shape: Shape) -> Shape:
    while shape in moved:
        shape = moved[shape]
    return shape


def batches_of(
    rows: Sequence[Row], least_prefix: int, budget: int, n_devices: int, reach: int = EVERYTHING
) -> list[tuple[Shape, int, list[Row]]]:
    """(shape, rows of the batch as compiled, the rows), the largest shapes first.

    `budget` is in tokens, padding included, for a device; the batches of a shape are equally full.
    """
    by_shape: dict[Shape, list[Row]] = {}
    for row, shape in zip(rows, shapes_of(rows, least_prefix, budget, reach), strict=True):
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


def fill(shape: Shape, size: int, rows: Sequence[Row]) -> Batch:
    """The arrays of a batch of `size` rows; those that are missing are padding."""
    width, tail_width = shape
    batch = Batch(
        np.zeros((size, width), np.int32),
        *(np.zeros(size, np.int32) for _ in range(2)),
        *(np.zeros((size, tail_width), np.int32) for _ in range(3)),
        *(np.full((size, tail_width), -1, np.int32) for _ in range(2)),
    )
    for b, row in enumerate(rows):
        length = len(row.prefix)
        batch.prefix_BP[b, :length] = row.prefix
        batch.prefix_length_B[b] = length
        batch.first_B[b] = row.first
        at = 0
        for number, tail in enumerate(row.tails):
            here = (b, slice(at, at + len(tail.tokens)))
            batch.tail_BC[here] = tail.tokens
            before = row.prefix[-1] if length else -1
            batch.before_BC[here] = [before, *tail.tokens[:-1]]
            batch.position_BC[here] = row.first + length + np.arange(len(tail.tokens))
            batch.segment_BC[here] = number
            batch.target_BC[b, at + tail.skip : here[1].stop - 1] = tail.tokens[tail.skip + 1 :]
            at = here[1].stop
    return batch
