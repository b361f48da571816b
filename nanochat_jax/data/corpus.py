"""Makes shards of documents: your own files, or the prose found on this machine (prose.py).

Documents are ordered by a hash of their text, which shuffles them the same way on every machine and
file system; of equal ones, one is kept. The last twentieth becomes the validation shard. The folder
gets its name only when it is complete.
"""

import hashlib
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import batched, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat_jax.config import base_dir
from nanochat_jax.data.prose import MIN_CHARS, find_prose
from nanochat_jax.data.reader import SUFFIXES, Survey, read_documents, survey
from nanochat_jax.data.shards import BLOCK_DOCS, HUB_DATASETS, LOCAL, shard_name

VAL_SHARE = 0.05
MAX_VAL_DOCS = 8192
SHARD_DOCS = 64 * BLOCK_DOCS
LOCAL_CHARS = 4000  # of a document of `local`, at most
SHARES, MIN_CUT, MAX_CUT = 200, 4000, 100_000  # text files are cut no finer; in characters
GROUP_CHARS = 2**23  # of a row group, about
BUCKETS = 64  # parts of a corpus, sorted in memory one at a time
SCHEMA = pa.schema([("text", pa.string())])


def make_local_dataset() -> Path:
    """The data set `local`: documentation and docstrings of this Python and its packages."""
    return make_dataset(LOCAL, _local_documents)


def _local_documents() -> Iterator[str]:
    for text in find_prose():
        yield from (piece for piece in split_long(text, LOCAL_CHARS) if len(piece) >= MIN_CHARS)


def convert_folder(source: Path, name: str, listed: Callable[[str], None] = print) -> Path:
    """Makes the data set `name` of the files with text below `source`, which are `listed` first.

    Where they are named after splits, those for validation become the validation shard.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name in {*HUB_DATASETS, LOCAL}:
        raise ValueError(
            f"{name!r} cannot name a data set of yours: use letters, digits, '_', '-' and '.', "
            f"and none of {', '.join([*HUB_DATASETS, LOCAL])}"
        )
    found = taken_files(source)
    for line in (f"{source}:", *found.lines()):
        listed(line)
    skipped: list[Path] = []
    folder = make_dataset(
        name,
        lambda: read_texts(found, found.train, skipped),
        lambda: read_texts(found, found.val, skipped),
    )
    if skipped:
        listed(f"  {len(skipped):,} documents without text skipped, the first in {skipped[0]}")
    return folder


def make_dataset(
    name: str,
    find_documents: Callable[[], Iterable[str]],
    find_validation: Callable[[], Iterable[str]] = tuple,
) -> Path:
    """Writes base_data/<name>/shard_*.parquet unless it is there; returns the folder.

    Without documents for validation a twentieth of the others serves. Waits for another process
    that makes the same data set; what a killed one left is deleted.
    """
    folder = base_dir() / "base_data" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if not folder.exists():
            unfinished = folder.parent / f".{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                write_shards(find_documents(), unfinished, find_validation())
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


# ---- your own text ---------------------------------------------------------------------------


def taken_files(source: Path) -> Survey:
    """The files below a folder that a data set is made of; ValueError where there are none."""
    kinds = ", ".join(SUFFIXES)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name one with {kinds} files")
    found = survey(source)
    if not found.train:
        passed = "".join(f"; {path.name}: {why}" for path, why in found.passed_over[:3])
        raise ValueError(f"there are no {kinds} files to train on in {source}{passed}")
    return found


def read_texts(found: Survey, paths: Sequence[Path], skipped: list[Path]) -> Iterator[str]:
    """The documents of these files; `skipped` gets the file of each that has no text.

    A text file of more than a 200th of all the text is cut at blank lines: the part for validation
    consists of whole documents, and one file alone has to give both.
    """
    whole = sum(path.stat().st_size for path in (*found.train, *found.val))
    limit = min(max(whole // SHARES, MIN_CUT), MAX_CUT)
    for path in paths:
        is_plain = not {".txt", ".md"}.isdisjoint(suffix.lower() for suffix in path.suffixes)
        for text in read_documents(path):
            if not text.strip():
                skipped.append(path)
            pieces = split_long(text, limit) if is_plain else [text]
            yield from (piece for piece in pieces if piece.strip())


def split_long(text: str, limit: int) -> list[str]:
    """Cuts a text into pieces of at most `limit` characters, at a blank line where there is one.

    Otherwise at the end of a line, at a space, or as a last resort anywhere. White space at a cut
    is dropped. Every piece but the last is at least half the limit long.
    """
    pieces, start = [], 0
    while len(text) - start > limit:
        first, last = start + max(1, limit // 2), start + limit
        cuts = (text.rfind(mark, first, last) for mark in ("\n\n", "\n", " "))
        end = next((cut for cut in cuts if cut > 0), last)
        pieces.append(text[start:end])
        while end < len(text) and text[end].isspace():
            end += 1
        start = end
    pieces.append(text[start:])
    return [piece for piece in pieces if piece] or [text]


# ---- writing ---------------------------------------------------------------------------------


def write_shards(documents: Iterable[str], folder: Path, validation: Iterable[str] = ()) -> None:
    """Shuffles, deduplicates and writes documents as shards, the last one for validation.

    Only a 64th of the text is in memory at a time. Raises ValueError for fewer than two documents.
    """
    buckets, val_buckets = folder / "buckets", folder / "validation"
    buckets.mkdir()
    val_buckets.mkdir()
    count, val_count = _fill_buckets(documents, buckets), _fill_buckets(validation, val_buckets)
    if count + val_count < 2 or not count:
        raise ValueError(
            "a data set needs at least two different documents, one of them for validation, "
            f"but there {'is only one' if count else 'are none'}"
        )
    shuffled = _by_hash(buckets)
    train_docs = count - min(max(round(count * VAL_SHARE), 1), MAX_VAL_DOCS)
    halves: tuple[Iterator[str], Iterator[str]] = (islice(shuffled, train_docs), shuffled)
    if val_count:
        halves = shuffled, islice(_by_hash(val_buckets), MAX_VAL_DOCS)
    for index, texts in enumerate(part for half in halves for part in batched(half, SHARD_DOCS)):
        write_shard(folder / shard_name(index), texts)
    shutil.rmtree(buckets)
    shutil.rmtree(val_buckets)


def write_shard(path: Path, texts: Iterable[str]) -> None:
    """One Parquet file of the published layout: row groups of 1024 documents, zstd.

    Groups of long documents have fewer, since one is in memory at a time. A flipped bit is noticed
    when its page is read.
    """
    with pq.ParquetWriter(
        path, SCHEMA, compression="zstd", compression_level=3, write_page_checksum=True
    ) as writer:
        for group in _groups(texts):
            writer.write_table(pa.table({"text": group}, schema=SCHEMA))


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    chars = 0
    for text in texts:
        group.append(text)
        chars += len(text)
        if len(group) == BLOCK_DOCS or chars >= GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _fill_buckets(documents: Iterable[str], folder: Path) -> int:
    """Distributes documents by the top bits of their hash; returns the number of distinct ones."""
    hashes = array("Q")
    waiting: list[list[str]] = [[] for _ in range(BUCKETS)]
    with ExitStack() as files:
        writers = [
            files.enter_context(pq.ParquetWriter(folder / f"{index:02d}", SCHEMA))
            for index in range(BUCKETS)
        ]

        def flush(index: int) -> None:
            writers[index].write_table(pa.table({"text": waiting[index]}, schema=SCHEMA))
            waiting[index].clear()

        for text in documents:
            hashes.append(_hash(text))
            index = hashes[-1] * BUCKETS >> 64
            waiting[index].append(text)
            if len(waiting[index]) == BLOCK_DOCS:
                flush(index)
        for index in range(BUCKETS):
            flush(index)
    return len(np.unique(np.frombuffer(hashes, dtype=np.uint64))) if hashes else 0


def _by_hash(folder: Path) -> Iterator[str]:
    for bucket in sorted(folder.iterdir()):
        texts = pq.read_table(bucket).column("text").to_pylist()
        yield from dict(sorted((_hash(text), text) for text in texts)).values()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
