"""Makes shards of documents: your own files, or the prose found on this machine (prose.py).

Documents are ordered by a hash of their text, which shuffles them the same way on every machine and
file system; of equal ones, one is kept. The last twentieth becomes the validation shard. The folder
gets its name only when it is complete.
"""

import hashlib
import json
import re
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import batched, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat_jax.config import base_dir
from nanochat_jax.data.prose import MIN_CHARS, find_prose
from nanochat_jax.data.shards import (
    BLOCK_DOCS,
    HUB_DATASETS,
    LOCAL,
    read_shard,
    shard_name,
)

VAL_SHARE = 0.05
MAX_VAL_DOCS = 8192
SHARD_DOCS = 64 * BLOCK_DOCS
DOCUMENT_CHARS = 4000  # longer text files are cut, since packing would crop most of them
BUCKETS = 64  # parts of a corpus, sorted in memory one at a time
SCHEMA = pa.schema([("text", pa.string())])


def make_local_dataset() -> Path:
    """The data set `local`: documentation and docstrings of this Python and its packages."""
    return make_dataset(LOCAL, _local_documents)


def _local_documents() -> Iterator[str]:
    for text in find_prose():
        yield from (piece for piece in split_long(text) if len(piece) >= MIN_CHARS)


def convert_folder(source: Path, name: str) -> Path:
    """Makes the data set `name` from the .parquet, .jsonl, .txt and .md files below `source`."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name in {*HUB_DATASETS, LOCAL}:
        raise ValueError(
            f"{name!r} cannot name a data set of yours: use letters, digits, '_', '-' and '.', "
            f"and none of {', '.join([*HUB_DATASETS, LOCAL])}"
        )
    return make_dataset(name, lambda: read_documents(source))


def make_dataset(name: str, find_documents: Callable[[], Iterable[str]]) -> Path:
    """Writes base_data/<name>/shard_*.parquet unless it is there; returns the folder.

    Waits for another process that makes the same data set; what a killed one left is deleted.
    """
    folder = base_dir() / "base_data" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        if not folder.exists():
            unfinished = folder.parent / f".{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                write_shards(find_documents(), unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


# ---- your own text ---------------------------------------------------------------------------


def read_documents(source: Path) -> Iterator[str]:
    """The documents below a folder, by file name.

    .parquet: the column `text`; .jsonl: the key `text` of each line; .txt and .md: the file, cut at
    blank lines where it is longer than 4000 characters. Hidden and other files are skipped.
    Raises ValueError naming the file, and the line in a .jsonl, that cannot be used.
    """
    readers: dict[str, Callable[[Path], Iterable[str]]] = {
        ".parquet": read_shard,
        ".jsonl": _read_jsonl,
        ".txt": _read_text,
        ".md": _read_text,
    }
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name one with {', '.join(readers)} files")
    below = sorted(path for path in source.rglob("*") if path.is_file())
    usable = [
        path
        for path in below
        if path.suffix.lower() in readers
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not usable:
        raise ValueError(f"there are no {', '.join(readers)} files in {source}")
    for path in usable:
        for text in readers[path.suffix.lower()](path):
            if text.strip():
                yield text


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of_line(line, f"{path}, line {number}")


def _text_of_line(line: bytes, where: str) -> str:
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        text.encode("utf-8")  # JSON can spell surrogates, text files cannot hold them
    except UnicodeError as error:
        raise ValueError(f"{where}: not valid Unicode ({error})") from None
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object ({error})") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f'{where}: expected an object with a string under "text"') from None
    return text


def _read_text(path: Path) -> list[str]:
    try:
        return split_long(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 (byte {error.start}); convert it") from None


def split_long(text: str, limit: int = DOCUMENT_CHARS) -> list[str]:
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


def write_shards(documents: Iterable[str], folder: Path) -> None:
    """Shuffles, deduplicates and writes documents as shards, the last one for validation.

    Only a 64th of the text is in memory at a time. Raises ValueError for fewer than two documents.
    """
    buckets = folder / "buckets"
    buckets.mkdir()
    count = _fill_buckets(documents, buckets)
    if count < 2:
        raise ValueError(
            "a data set needs at least two different documents, one of them for validation, "
            f"but there {'is only one' if count else 'are none'}"
        )
    shuffled = _by_hash(buckets)
    train_docs = count - min(max(round(count * VAL_SHARE), 1), MAX_VAL_DOCS)
    halves = (islice(shuffled, train_docs), shuffled)
    for index, texts in enumerate(part for half in halves for part in batched(half, SHARD_DOCS)):
        write_shard(folder / shard_name(index), texts)
    shutil.rmtree(buckets)


def write_shard(path: Path, texts: Iterable[str]) -> None:
    """One Parquet file of the published layout: row groups of 1024 documents, zstd."""
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=3) as writer:
        for group in batched(texts, BLOCK_DOCS):
            writer.write_table(pa.table({"text": group}, schema=SCHEMA))


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
