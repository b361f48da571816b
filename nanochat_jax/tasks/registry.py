"""Tasks by their names on the command line and in presets.

    gsm8k, mmlu, mmlu-aux, arc-easy, arc-challenge, humaneval, smoltalk     from the hub
    spellingbee, spelling                                                   of a list of words
    identity, json:PATH                                                     files of conversations
    arithmetic, counting, spelling-local, choice, identity-local, dialogue  made here, no network

A file whose name has commas, brackets or asterisks goes in quotes, and quotes in it are doubled:
json:"one, two [3].jsonl". In a shell the whole goes in quotes of the other kind, and in a TOML file
too: tasks = 'json:"one, two.jsonl",gsm8k'.

`prepare([("gsm8k", "train"), …])` downloads the data that tasks lack; `make_task` makes one task.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from nanochat_jax.tasks.arithmetic import sample_arithmetic
from nanochat_jax.tasks.chats import CustomJSON, SmolTalk
from nanochat_jax.tasks.choice import sample_choice
from nanochat_jax.tasks.dialogue import is_last_answer, sample_dialogue
from nanochat_jax.tasks.gsm8k import GSM8K
from nanochat_jax.tasks.humaneval import HumanEval
from nanochat_jax.tasks.identity import sample_identity, says_its_name
from nanochat_jax.tasks.mixture import Slice
from nanochat_jax.tasks.multiple_choice import ARC, MMLU
from nanochat_jax.tasks.sources import (
    HUB_TASKS,
    IDENTITY,
    WORD_LIST,
    Source,
    fetch,
    lacking,
    task_data_dir,
    verified,
)
from nanochat_jax.tasks.spelling import (
    SimpleSpelling,
    SpellingBee,
    read_words,
    sample_counting,
    sample_spelling,
)
from nanochat_jax.tasks.synthetic import SPLITS, Judge, Sampler, Synthetic
from nanochat_jax.tasks.task import Kind, Task, is_reference, is_reference_number

type Named = tuple[str, str]  # a task and a split

FROM_HUB: dict[str, Callable[[Sequence[Path]], Task]] = {
    "smoltalk": SmolTalk,
    "mmlu": MMLU,
    "mmlu-aux": partial(MMLU, name="mmlu-aux"),
    "gsm8k": GSM8K,
    "arc-easy": partial(ARC, name="arc-easy"),
    "arc-challenge": partial(ARC, name="arc-challenge"),
    "humaneval": HumanEval,
}
OF_WORDS: dict[str, Callable[[list[str], str, int | None], Task]] = {
    "spellingbee": SpellingBee,
    "spelling": SimpleSpelling,
}
_SYNTHETIC: tuple[tuple[str, Kind, Sampler, Judge], ...] = (
    ("arithmetic", "generative", sample_arithmetic, is_reference_number),
    ("counting", "generative", sample_counting, is_reference_number),
    ("spelling-local", "generative", sample_spelling, is_reference),
    ("choice", "categorical", sample_choice, is_reference),
    ("identity-local", "generative", sample_identity, says_its_name),
    ("dialogue", "generative", sample_dialogue, is_last_answer),
)
# Called with a split and a limit. A class of your own gets its name here.
MADE_HERE: dict[str, Callable[[str, int | None], Task]] = {
    row[0]: partial(Synthetic, *row) for row in _SYNTHETIC
}
JSON = "json:"
QUOTED = """"(?:[^"]|"")*"|'(?:[^']|'')*'"""
_NAMED = re.compile(rf"\s*({JSON}(?:{QUOTED})[^,]*|[^,]*)(,?)")


def split_names(text: str) -> list[str]:
    """The tasks of a line of text, with commas between them that are not in a quoted file name."""
    names, position, comma = [], 0, ","
    while comma:
        match = _NAMED.match(text, position)
        assert match is not None  # the pattern matches anything
        names.append(match[1].strip())
        position, comma = match.end(), match[2]
    return names


def json_path(name: str) -> Path:
    """The file that json:PATH or json:"PATH" names."""
    path = name.removeprefix(JSON)
    if re.fullmatch(QUOTED, path):
        path = path[1:-1].replace(2 * path[0], path[0])
    return Path(path).expanduser()


def make_task(
    name: str,
    split: str = "train",
    *,
    limit: int | None = None,
    allow_unsandboxed: bool = False,
) -> Task:
    """A task by its name; its data is downloaded if it is not there.

    `limit` takes the first examples; of a synthetic task, it is the number of examples. ValueError
    names the known tasks or the splits of this one, or says why its data is not available.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves nothing of {name}")
    source = source_of(name, split)
    files: list[Path] = []
    if source is not None:
        prepare([(name, split)])
        files = verified(source)
    if name in MADE_HERE:
        return MADE_HERE[name](split, limit)
    if name in OF_WORDS:
        return OF_WORDS[name](read_words(WORD_LIST.path), split, limit)
    if source is None:
        task: Task = CustomJSON(json_path(name))
    elif source is IDENTITY:
        task = CustomJSON(IDENTITY.path, name)
    elif name == "humaneval":
        task = HumanEval(files, allow_unsandboxed=allow_unsandboxed)
    else:
        task = FROM_HUB[name](files)
    return task if limit is None else Slice(task, stop=limit)


def source_of(name: str, split: str) -> Source | None:
    """The data that a task needs; None for one that needs none. ValueError as `make_task`."""
    if name in FROM_HUB:
        return HUB_TASKS[name].split(name, split)
    splits = ("train",) if name == "identity" or name.startswith(JSON) else SPLITS
    if name not in OF_WORDS and name not in MADE_HERE and splits == SPLITS:
        known = (*FROM_HUB, *OF_WORDS, "identity", *MADE_HERE, f'{JSON}"FILE"')
        raise ValueError(f"there is no task {name!r}; there are {', '.join(known)}")
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}, not {split!r}")
    if name == "identity":
        return IDENTITY
    return WORD_LIST if name in OF_WORDS else None


def missing(tasks: Iterable[Named]) -> list[str]:
    """The data that some tasks lack, as paths in the folder of task data."""
    sources = [source_of(name, split) for name, split in tasks]
    return [str(source) for source in lacking(one for one in sources if one is not None)]


def prepare(tasks: Iterable[Named]) -> None:
    """Downloads what `tasks` lack; ValueError if something is lacking and HF_HUB_OFFLINE=1."""
    tasks = list(tasks)
    lack = missing(tasks)
    if not lack:
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ValueError(
            f"{task_data_dir()} lacks {', '.join(lack)}; run scripts/prefetch.py where there is a "
            "network and copy the folder here"
        )
    sources = [source_of(name, split) for name, split in tasks]
    fetch((one for one in sources if one is not None), wait=True)
