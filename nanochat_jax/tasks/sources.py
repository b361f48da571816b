"""The data that tasks are made of: where it is, and downloading and checking it.

All of it is in one folder, task_data in the base directory or what NANOCHAT_TASK_DATA names; copied
to a machine without a network, it is complete there. Data sets of the hub are in
<org>--<name>/<subset>/<split>/00000.parquet …, with a manifest.json that lists their names; single
files are at the top.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_jax.config import base_dir, write_atomically
from nanochat_jax.data.download import Download, HubFile, endpoint, sha256_of

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class HubSplit(NamedTuple):
    """One split of one subset of a data set."""

    repo_id: str
    subset: str
    split: str

    def __str__(self) -> str:
        return f"{self.repo_id.replace('/', '--')}/{self.subset}/{self.split}"

    @property
    def folder(self) -> Path:
        return task_data_dir() / str(self)

    def files(self) -> list[Path]:
        """Its Parquet files in order; empty if one that the manifest names is missing."""
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            return []
        try:
            names = json.loads(manifest.read_text(encoding="utf-8"))
            paths = [self.folder / name for name in names]
        except (ValueError, TypeError):
            raise ValueError(
                f"{manifest} is not a list of file names; delete it and run scripts/prefetch.py"
            ) from None
        return paths if all(path.is_file() for path in paths) else []


class HubTask(NamedTuple):
    """The data of a task; `splits` maps our names of splits to the hub's."""

    repo_id: str
    subset: str
    splits: dict[str, str]

    def split(self, task: str, name: str) -> HubSplit:
        if name not in self.splits:
            raise ValueError(f"{task} has the splits {', '.join(self.splits)}, not {name!r}")
        return HubSplit(self.repo_id, self.subset, self.splits[name])


_ALL = {"train": "train", "validation": "validation", "test": "test"}
HUB_TASKS = {
    "smoltalk": HubTask(
        "HuggingFaceTB/smol-smoltalk", "default", {"train": "train", "test": "test"}
    ),
    "mmlu": HubTask("cais/mmlu", "all", {"test": "test", "validation": "validation", "dev": "dev"}),
    "mmlu-aux": HubTask("cais/mmlu", "all", {"train": "auxiliary_train"}),
    "gsm8k": HubTask("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "arc-easy": HubTask("allenai/ai2_arc", "ARC-Easy", _ALL),
    "arc-challenge": HubTask("allenai/ai2_arc", "ARC-Challenge", _ALL),
    "humaneval": HubTask("openai/openai_humaneval", "openai_humaneval", {"test": "test"}),
}


class SingleFile(NamedTuple):
    """A file that is not on the hub."""

    name: str
    url: str

    def __str__(self) -> str:
        return self.name

    @property
    def path(self) -> Path:
        return task_data_dir() / self.name

    def files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else []


type Source = HubSplit | SingleFile

WORD_LIST = SingleFile(
    "words_alpha.txt",
    "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt",
)
_NANOCHAT_FILES = "https://karpathy-public.s3.us-west-2.amazonaws.com"
IDENTITY = SingleFile(
    "identity_conversations.jsonl", f"{_NANOCHAT_FILES}/identity_conversations.jsonl"
)
CORE_BUNDLE = SingleFile("eval_bundle.zip", f"{_NANOCHAT_FILES}/eval_bundle.zip")


def task_data_dir() -> Path:
    named = os.environ.get("NANOCHAT_TASK_DATA")
    return Path(named).expanduser() if named else base_dir() / "task_data"


# ---- downloading -----------------------------------------------------------------------------

REVISION = "refs/convert/parquet"  # the branch in which the hub keeps every data set as Parquet


def lacking(sources: Iterable[Source]) -> list[Source]:
    """The sources of which a file is missing."""
    return [source for source in dict.fromkeys(sources) if not source.files()]


def fetch(sources: Iterable[Source], *, workers: int = 8, wait: bool = False) -> None:
    """Downloads what is missing, and adds it to the manifest.

    Another process that downloads is an error, unless `wait` is set. Raises ValueError, in one
    sentence, when a server cannot be reached, lacks a file or delivers other bytes than announced,
    or when the disk is full.
    """
    sources = list(sources)
    if not lacking(sources):
        return
    download = Download(
        task_data_dir(),
        without_network=f"or copy {task_data_dir()} from a machine where scripts/prefetch.py ran",
        with_less_space="make room",
        workers=workers,
    )
    with download.lock(timeout=-1 if wait else 0):
        wanted = lacking(sources)
        splits = {one: _announced(download, one) for one in wanted if isinstance(one, HubSplit)}
        files = {name: file for split in splits.values() for name, file in split.items()}
        download.fetch(files)
        urls = {name: file.url for name, file in files.items()}
        for one in wanted:
            if isinstance(one, SingleFile):
                download.fetch_url(one.url, one.name)
                urls[one.name] = one.url
        _add_to_manifest(urls)
        for split, names in splits.items():  # only now the split counts as complete
            _write_json(split.folder / MANIFEST, [Path(name).name for name in names])


def _announced(download: Download, split: HubSplit) -> dict[str, HubFile]:
    """The Parquet files of a split, by their names below the folder of task data."""
    folder = f"{split.subset}/{split.split}"
    found = download.list_files(split.repo_id, folder, REVISION)
    paths = sorted(path for path in found if path.endswith(".parquet"))
    if not paths:
        raise ValueError(
            f"{endpoint()} has no Parquet files for {folder} in the data set {split.repo_id}"
        )
    return {f"{split}/{at:05d}.parquet": found[path] for at, path in enumerate(paths)}


# ---- the manifest ----------------------------------------------------------------------------


def check(sources: Iterable[Source]) -> tuple[list[str], list[str]]:
    """What is wrong with the data of some sources, and which of their files have no checksum.

    Compares every file with the manifest; needs no network.
    """
    manifest, wrong, unknown = read_manifest(), [], []
    for source in dict.fromkeys(sources):
        files = source.files()
        if not files:
            wrong.append(f"{source} is missing")
        for path in files:
            name = path.relative_to(task_data_dir()).as_posix()
            if name not in manifest:
                unknown.append(name)
            elif why := _why_altered(path, manifest[name]):
                wrong.append(f"{name} {why}")
    return wrong, unknown


def verified(source: Source) -> list[Path]:
    """The files of a source, those in the manifest compared with it, once a process.

    ValueError names a file that has changed since it was downloaded.
    """
    files = source.files()
    for path in files:
        stat = path.stat()
        _verify(path, stat.st_size, stat.st_mtime_ns)
    return files


@cache
def _verify(path: Path, *state: int) -> None:
    """`state` is what changes with the file; an error is not kept."""
    entry = read_manifest().get(path.relative_to(task_data_dir()).as_posix())
    if entry is None:
        log.warning("%s is not verified: %s does not have it", path, MANIFEST)
    elif why := _why_altered(path, entry):
        raise ValueError(f"{path} {why}; delete it and run scripts/prefetch.py")


def _why_altered(path: Path, entry: dict[str, Any]) -> str | None:
    size = path.stat().st_size
    if size != entry["size"]:
        return f"has {size:,} bytes instead of {entry['size']:,}"
    return (
        None
        if sha256_of(path) == entry["sha256"]
        else "has other content than when it was downloaded"
    )


def read_manifest() -> dict[str, dict[str, Any]]:
    """name → {"size", "sha256", "url"}; empty before the first download."""
    path = task_data_dir() / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = {name: dict(entry) for name, entry in manifest["files"].items()}
        if any(not {"size", "sha256"} <= entry.keys() for entry in entries.values()):
            raise KeyError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged; delete it and run scripts/prefetch.py") from None
    return entries


def _add_to_manifest(urls: Mapping[str, str]) -> None:
    """Adds files by their names; `urls` says where they came from."""
    manifest = read_manifest()
    for name, url in urls.items():
        path = task_data_dir() / name
        size = path.stat().st_size
        manifest[name] = {"size": size, "sha256": sha256_of(path), "url": url}
    _write_json(task_data_dir() / MANIFEST, {"files": dict(sorted(manifest.items()))})


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")
