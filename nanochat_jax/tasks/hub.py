"""Which data the tasks are made of, and where it lies.

That is one folder, task_data below the base directory or what NANOCHAT_TASK_DATA names; copying it
brings all the data to a machine without a network. Data sets of the hub lie in
<org>--<name>/<subset>/<split>/00000.parquet …, with a manifest.json beside them that lists their
names; single files lie at the top.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.config import base_dir

MANIFEST = "manifest.json"


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
        """Its Parquet files in order; none when one that the manifest names is not there."""
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


class HubDataset(NamedTuple):
    """A task's data: `splits` are ours and what the hub calls them."""

    repo_id: str
    subset: str
    splits: dict[str, str]

    def split(self, task: str, name: str) -> HubSplit:
        if name not in self.splits:
            raise ValueError(f"{task} has the splits {', '.join(self.splits)}, not {name!r}")
        return HubSplit(self.repo_id, self.subset, self.splits[name])


_ALL = {"train": "train", "validation": "validation", "test": "test"}
HUB_TASKS = {
    "smoltalk": HubDataset(
        "HuggingFaceTB/smol-smoltalk", "default", {"train": "train", "test": "test"}
    ),
    "mmlu": HubDataset(
        "cais/mmlu", "all", {"test": "test", "validation": "validation", "dev": "dev"}
    ),
    "mmlu-aux": HubDataset("cais/mmlu", "all", {"train": "auxiliary_train"}),
    "gsm8k": HubDataset("openai/gsm8k", "main", {"train": "train", "test": "test"}),
    "arc-easy": HubDataset("allenai/ai2_arc", "ARC-Easy", _ALL),
    "arc-challenge": HubDataset("allenai/ai2_arc", "ARC-Challenge", _ALL),
    "humaneval": HubDataset("openai/openai_humaneval", "openai_humaneval", {"test": "test"}),
}


class SingleFile(NamedTuple):
    """A file from elsewhere."""

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
