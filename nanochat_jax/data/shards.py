"""Which Parquet shards belong to a data set, and reading documents out of them.

A data set is a folder of files shard_00000.parquet … with a column `text`, a document per row. The
last file is the validation shard, the others are for training. `scripts/download.py` downloads or
makes such folders; any other such folder can be named by its path.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.config import named_folder

BLOCK_DOCS = 1024  # documents in a row group of the published shards; at most so many in a block


class HubDataset(NamedTuple):
    """A data set on the hub: shard_00000 … shard_<last>, the last one for validation."""

    repo_id: str
    last_shard: int


HUB_DATASETS = {
    "climbmix": HubDataset("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": HubDataset("karpathy/fineweb-edu-100b-shuffle", 1821),
}
LOCAL = "local"  # the text found on this machine; see corpus.py


class Shards(NamedTuple):
    """The Parquet files of a data set, in the order in which they are read."""

    train: list[Path]
    val: list[Path]


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def dataset_folder(dataset: str | Path) -> Path:
    """The folder of a data set: a name stands for base_data/<name>, a path for itself."""
    named = named_folder("base_data", dataset)
    is_data_set = dataset in HUB_DATASETS or dataset == LOCAL or named.is_dir()
    return named if is_data_set else Path(dataset).expanduser()


def list_shards(dataset: str | Path) -> Shards:
    """The shards of a data set by name or folder, the last one (by name) for validation.

    Raises ValueError, saying what to do, when the folder or the validation shard is missing or
    there are fewer than two shards.
    """
    folder = dataset_folder(dataset)
    hint = _how_to_get(str(dataset))
    if not folder.is_dir():
        raise ValueError(f"there is no data set at {folder}; {hint}")
    files = sorted(path for path in folder.glob("[!.]*.parquet") if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no .parquet shards; {hint}")
    if dataset in HUB_DATASETS:
        pinned = shard_name(HUB_DATASETS[str(dataset)].last_shard)
        if files[-1].name != pinned:
            raise ValueError(f"the validation shard {folder / pinned} is missing; {hint}")
    if len(files) < 2:
        raise ValueError(
            f"{folder} holds only one shard, {files[0].name}, but the last one is for "
            f"validation and at least one more is needed for training; {hint}"
        )
    return Shards(train=files[:-1], val=files[-1:])


def _how_to_get(dataset: str) -> str:
    if dataset in HUB_DATASETS:
        return f"run `python scripts/download.py --dataset {dataset} --shards 8`"
    if dataset == LOCAL:
        return "run `python scripts/download.py --dataset local`"
    return (
        "make shards of your own text with `python scripts/download.py --from FOLDER --name NAME`, "
        f"or use one of the data sets {', '.join([*HUB_DATASETS, LOCAL])}"
    )


# ---- reading ---------------------------------------------------------------------------------


class TextBlock(NamedTuple):
    """A run of consecutive documents inside one row group: the unit in which text is read."""

    path: Path
    row_group: int
    start: int
    docs: int


class DocumentBlocks:
    """Random access to the blocks of a list of shards (a grain data source).

    A row group of up to 1024 documents, as in the published shards, is one block. Larger ones are
    cut, and all are cut further until there are `min_blocks`, so that so many streams can read
    different text whatever the row groups of the files. Raises ValueError naming the file that is
    unreadable, empty or without a text column.
    """

    def __init__(self, paths: Sequence[Path], min_blocks: int = 1) -> None:
        with ThreadPoolExecutor(8) as pool:
            footers = list(pool.map(read_footer, paths))
        self._footers = dict(zip(paths, footers, strict=True))
        counts = [
            [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            for footer in footers
        ]
        # Identifies the text by the names of the files and the sizes of their row groups.
        named = [(path.name, sizes) for path, sizes in zip(paths, counts, strict=True)]
        self.fingerprint = hashlib.sha256(repr(named).encode()).hexdigest()[:16]
        self.blocks = _cut(paths, counts, min_blocks)
        self._recent: dict[tuple[Path, int], pa.ChunkedArray] = {}  # large row groups just decoded
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> list[str]:
        """The documents of a block, in order."""
        block = self.blocks[index]
        return _texts(self._row_group(block).slice(block.start, block.docs))

    def pick(self, index: int, positions: Sequence[int]) -> list[str]:
        """Some documents of a block, by their positions in it."""
        block = self.blocks[index]
        return _texts(self._row_group(block).take([block.start + at for at in positions]))

    def _row_group(self, block: TextBlock) -> pa.ChunkedArray:
        key = (block.path, block.row_group)
        footer = self._footers[block.path]
        if footer.row_group(block.row_group).num_rows <= BLOCK_DOCS:
            return _read_row_group(*key, footer)
        with self._lock:  # a large row group is decoded once for all of its blocks
            if key not in self._recent:
                while len(self._recent) >= 2:
                    self._recent.pop(next(iter(self._recent)))
                self._recent[key] = _read_row_group(*key, footer)
            return self._recent[key]


def read_footer(path: Path) -> pq.FileMetaData:
    """A shard's footer; ValueError when it cannot be read, is empty or has no `text` of strings."""
    try:
        with pq.ParquetFile(path) as file:
            schema, footer = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    if "text" not in schema.names:
        columns = ", ".join(schema.names) or "none"
        raise ValueError(
            f"{path} has no column `text` (its columns: {columns}); rename the one to use"
        )
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"the column `text` of {path} holds {kind}, not strings")
    if footer.num_rows == 0:
        raise ValueError(f"{path} holds no documents; delete it")
    return footer


def read_shard(path: Path) -> Iterator[str]:
    """The documents of one file, in order; ValueError naming the file if it is damaged."""
    footer = read_footer(path)
    for row_group in range(footer.num_row_groups):
        yield from _texts(_read_row_group(path, row_group, footer))


def _read_row_group(path: Path, row_group: int, footer: pq.FileMetaData) -> pa.ChunkedArray:
    try:
        with pq.ParquetFile(path, metadata=footer) as file:
            return file.read_row_group(row_group, columns=["text"], use_threads=False).column(0)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error, f" at row group {row_group}") from None


def _unreadable(path: Path, error: Exception, where: str = "") -> ValueError:
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(
        f"{path} cannot be read as Parquet{where} ({detail}); if it was cut off, delete it and "
        "fetch or make it again with scripts/download.py"
    )


def _texts(column: pa.ChunkedArray) -> list[str]:
    return [text or "" for text in column.to_pylist()]  # a null is a document without text


def _cut(paths: Sequence[Path], counts: Sequence[list[int]], min_blocks: int) -> list[TextBlock]:
    size = BLOCK_DOCS
    while True:
        blocks = [
            TextBlock(path, row_group, start, min(size, rows - start))
            for path, sizes in zip(paths, counts, strict=True)
            for row_group, rows in enumerate(sizes)
            for start in range(0, rows, size)
        ]
        if len(blocks) >= min_blocks:
            return blocks
        if size == 1:
            raise ValueError(
                f"{paths[0].parent} has {len(blocks)} documents for {min_blocks} streams to share; "
                "add text, or use fewer streams"
            )
        size //= 2
