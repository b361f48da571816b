"""The Rust crate rustbpe/, compiled (border: rustbpe/src/py.rs)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypedDict

class Trained(TypedDict):
    ranks: list[bytes]  # the token of every rank: 256 bytes, then one token per merge
    documents: int
    chars: int
    bytes: int
    chunks: int  # distinct ones
    count_seconds: float
    merge_seconds: float

def train(
    texts: Iterable[str] | None,
    parquet: Sequence[Path],
    *,
    column: str,
    pattern: str,
    vocab_size: int,
    doc_cap: int | None,
    max_chars: int | None,
    threads: int | None,  # None: as many as there are cores
    progress: Callable[[str, int, int], object] | None,
) -> Trained:
    """Learns a byte-pair encoding from `texts`, or from a column of Parquet files if that is None.

    Pairs merge in the order of their counts, the smaller pair of ids first among equals; fewer than
    `vocab_size` ranks come back when nothing is left to merge. The GIL is free except while the
    iterator runs. `progress` hears ("count", characters, max_chars or 0) and ("merge", done, total)
    about ten times a second; what it raises, or Ctrl-C, ends the training. ValueError says what is
    wrong with the input, naming the file.
    """
