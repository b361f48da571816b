"""Which Parquet shards belong to a data set, and reading their documents in blocks.

A data set is a folder of files shard_00000.parquet … with a column `text`, a document per row. The
last file is the validation shard, the others are for training. `scripts/download.py` downloads or
makes such folders; any other folder of Parquet files can be named by its path. Where its files are
named after splits (train-00000-of-00002.parquet, validation/…) these say what is for what.
"""

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from nanochat_jax.config import named_folder
from nanochat_jax.data.reader import PARQUET, Survey, read_footer, read_row_group, survey, texts_of

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
    found = survey_shards(dataset)
    return Shards(found.train, found.val)


def survey_shards(dataset: str | Path) -> Survey:
    """The part that each Parquet file of a data set plays; ValueErrors as of `list_shards`."""
    folder = dataset_folder(dataset)
    hint = _how_to_get(str(dataset))
    if not folder.is_dir():
        raise ValueError(f"there is no data set at {folder}; {hint}")
    found = survey(folder, PARQUET)
    if dataset in HUB_DATASETS:
        pinned = folder / shard_name(HUB_DATASETS[str(dataset)].last_shard)
        if found.train[-1:] != [pinned]:
            raise ValueError(f"the validation shard {pinned} is missing; {hint}")
    else:
        found = _without_empty(found)
    if not found.train:
        others = ", ".join(sorted({why for path, why in found.passed_over if _is_parquet(path)}))
        only = f" to train on ({others} passed over)" if others or found.val else ""
        raise ValueError(f"{folder} holds no .parquet shards{only}; {hint}")
    if not found.val and len(found.train) > 1:
        found = found._replace(train=found.train[:-1], val=found.train[-1:])
    if not found.val:
        raise ValueError(
            f"{folder} holds only one shard, {found.train[0].name}, but the last one is for "
            f"validation and at least one more is needed for training; {hint}"
        )
    return found


def _without_empty(found: Survey) -> Survey:
    """Files without documents, as Spark writes them, are none."""
    empty = [path for path in (*found.train, *found.val) if not read_footer(path).num_rows]
    return found._replace(
        train=[path for path in found.train if path not in empty],
        val=[path for path in found.val if path not in empty],
        passed_over=[*found.passed_over, *((path, "no documents") for path in empty)],
    )


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in PARQUET


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
    unreadable, without a text column, or not the one any more that it was at first.
    """

    def __init__(self, paths: Sequence[Path], min_blocks: int = 1) -> None:
        with ThreadPoolExecutor(8) as pool:
            footers = list(pool.map(read_footer, paths))
        self._footers = dict(zip(paths, footers, strict=True))
        self._versions = {path: _version(path) for path in paths}
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
        return texts_of(self._row_group(block).slice(block.start, block.docs))

    def pick(self, index: int, positions: Sequence[int]) -> list[str]:
        """Some documents of a block, by their positions in it."""
        block = self.blocks[index]
        return texts_of(self._row_group(block).take([block.start + at for at in positions]))

    def _row_group(self, block: TextBlock) -> pa.ChunkedArray:
        key = (block.path, block.row_group)
        footer = self._footers[block.path]
        if footer.row_group(block.row_group).num_rows <= BLOCK_DOCS:
            return self._read(*key)
        with self._lock:  # a large row group is decoded once for all of its blocks
            if key not in self._recent:
                while len(self._recent) >= 2:
                    self._recent.pop(next(iter(self._recent)))
                self._recent[key] = self._read(*key)
            return self._recent[key]

    def _read(self, path: Path, row_group: int) -> pa.ChunkedArray:
        if _version(path) != self._versions[path]:
            raise ValueError(
                f"{path} has changed or gone while it was in use; put the file back that the "
                "run began with, then --resume"
            )
        return read_row_group(path, row_group, self._footers[path])


def _version(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None for a file that is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _cut(paths: Sequence[Path], counts: Sequence[list[int]], min_blocks: int) -> list[TextBlock]:
    size = BLOCK_DOCS
    while True:
        blocks = [
            TextBlock(path, row_group, start, min(size, rows - start))
            for path, sizes in zip(paths, counts, strict=True)
            for row_group, rows in enumerate(sizes)
            for start in range(0, rows, size)
        ]
        if len(blocks) >= max(min_blocks, 1):
            return blocks
        if size == 1:
            raise ValueError(
                f"{paths[0].parent} has {len(blocks)} documents for {min_blocks} streams to share; "
                "add text, or use fewer streams"
            )
        size //= 2
