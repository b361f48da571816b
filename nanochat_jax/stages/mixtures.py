"""The data of mid-training and fine-tuning: a mixture of tasks, written as a line of text.

    smoltalk,mmlu-aux*3,gsm8k*4,spellingbee[2000]

names tasks of tasks/registry.py; NAME*N is seen N times an epoch, NAME[N] is its first N examples.
A file name with commas, brackets or asterisks is quoted: json:"one, two.jsonl"*3.
"""

import re
from collections.abc import Iterator
from math import ceil, lcm
from typing import Literal, NamedTuple

import jax
import numpy as np

from nanochat_jax.data.conversations import (
    PackedRows,
    Packing,
    PackingStats,
    RenderedDataset,
    estimate_epoch,
    first_batches,
)
from nanochat_jax.data.loader import choose_streams
from nanochat_jax.distributed import say
from nanochat_jax.tasks.mixture import Mixture, Slice
from nanochat_jax.tasks.registry import (
    JSON,
    QUOTED,
    make_task,
    missing,
    prepare,
    source_of,
    split_names,
)
from nanochat_jax.tasks.task import Task

# (stage, recipe) -> training and validation tasks of the original.
_VAL = "smoltalk,mmlu[5200],gsm8k[420]"
RECIPE_TASKS = {
    ("midtrain", "2025"): ("smoltalk,mmlu-aux,gsm8k", _VAL),
    ("midtrain", "2026"): ("smoltalk,mmlu-aux,gsm8k", _VAL),
    ("sft", "2025"): ("arc-easy,arc-challenge,gsm8k,smoltalk[10000]", "smoltalk,gsm8k[420]"),
    ("sft", "2026"): ("smoltalk,mmlu-aux*3,gsm8k*4", _VAL),
}
EMBEDDED_TASKS = (
    "arithmetic[18000],dialogue[6000],counting[6000],spelling-local[6000],choice[4000],"
    "identity-local[2000]"
)
TEST_TASKS = {"mmlu-aux": "mmlu"}  # what a task without a test split is measured on
VAL_EVERY = 20  # of other tasks without one, one example in so many is for validation

VAL_SAMPLE = 512  # validation conversations from which their number of rows is estimated

_TASK = re.compile(
    rf"(?P<name>{JSON}(?:{QUOTED})|[^\[\]*]+)"
    r"(\[(?P<limit>[1-9]\d*)\])?(\*(?P<times>[1-9]\d*))?"
)


class TaskSpec(NamedTuple):
    """A task with the part of it that is wanted."""

    name: str
    limit: int | None = None
    times: int = 1

    def __str__(self) -> str:
        part = "" if self.limit is None else f"[{self.limit}]"
        return f"{self.name}{part}" + (f"*{self.times}" if self.times > 1 else "")


class TaskNames(NamedTuple):
    """The tasks of training and of validation, as lines of text."""

    train: str
    val: str


def parse_tasks(text: str) -> list[TaskSpec]:
    """The tasks of a line of text; ValueError shows how they are named."""
    found = []
    for word in split_names(text):
        match = _TASK.fullmatch(word)
        if match is None:
            raise ValueError(
                f"cannot read the task {word!r} of {text!r}; tasks are named like smoltalk,"
                'mmlu-aux*3,gsm8k[1000],json:"one, two.jsonl"'
            )
        limit, times = (match[group] and int(match[group]) for group in ("limit", "times"))
        found.append(TaskSpec(match["name"].strip(), limit or None, times or 1))
    return found


def choose_tasks(stage: str, recipe: str, tasks: str, val_tasks: str) -> TaskNames:
    """The tasks that the user names, or the recipe's if their data is there, or the embedded ones.

    The data of those that the user names is downloaded. ValueError where that is not possible.
    """
    if tasks:
        chosen = TaskNames(tasks, val_tasks or _same_tasks(tasks))
    else:
        chosen = TaskNames(*RECIPE_TASKS[stage, recipe])
        if lacking := missing(_named(chosen)):
            say(f"no data of {', '.join(lacking)}, so the tasks are those that need none;")
            say("python scripts/prefetch.py fetches it, --tasks names other tasks")
            chosen = TaskNames(EMBEDDED_TASKS, _same_tasks(EMBEDDED_TASKS))
        chosen = chosen._replace(val=val_tasks or chosen.val)
    prepare(_named(chosen))
    return chosen


def _same_tasks(tasks: str) -> str:
    """The tasks to validate on, in equal parts."""
    names = (TEST_TASKS.get(one.name, one.name) for one in parse_tasks(tasks))
    return ",".join(dict.fromkeys(names))


def _named(tasks: TaskNames) -> list[tuple[str, str]]:
    train = [(one.name, "train") for one in parse_tasks(tasks.train)]
    return train + [(one.name, _test_split(one.name)) for one in parse_tasks(tasks.val)]


def mixture(tasks: str, split: Literal["train", "test"]) -> Mixture:
    """The tasks of a line of text, shuffled together once, with a fixed seed.

    A task without a test split, as a file of conversations, keeps its last twentieth for it, and at
    least one conversation.
    """
    made = [(_part(one, split), one.times) for one in parse_tasks(tasks)]
    return Mixture([task for task, times in made for _ in range(times)])


def _part(one: TaskSpec, split: str) -> Task:
    if _test_split(one.name) == "test":
        return make_task(one.name, split, limit=one.limit)
    whole = make_task(one.name, "train", limit=one.limit)
    kept = len(whole) - max(1, len(whole) // VAL_EVERY)
    if not kept:
        raise ValueError(
            f"{one} has a single conversation; at least 2 are needed, one of them for validation"
        )
    return Slice(whole, 0, kept) if split == "train" else Slice(whole, kept)


def _test_split(name: str) -> str:
    try:
        source_of(name, "test")
    except ValueError:  # no such split; no such task is an error with "train", too
        return "train"
    return "test"


# --- validation and the log -----------------------------------------------------------------------


def validation_batches(
    source: RenderedDataset, pad_id: int, *, rows: int, n_tokens: int
) -> Iterator[PackedRows]:
    """This process's validation rows, in batches of `rows` over all processes.

    About one epoch, and `n_tokens` at most, but never less than one round of the streams; the same
    rows on any number of devices, as long as nothing has to be rounded.
    """
    streams = choose_streams(jax.process_count(), n_examples=len(source))
    round_rows = lcm(rows, streams)
    epoch_rows = ceil(estimate_epoch(source, pad_id, VAL_SAMPLE).rows)
    wanted = min(n_tokens // (source.row_len - 1), epoch_rows)
    rounds = first_batches(
        source,
        pad_id,
        max(1, wanted // round_rows),
        rows=round_rows,
        streams=streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for whole in rounds:
        parts = (np.split(array, round_rows // rows) for array in whole)
        yield from (PackedRows(*arrays) for arrays in zip(*parts, strict=True))


def describe_pass(found: PackingStats, packing: Packing) -> str:
    """One sentence for the log: how many rows the conversations make, and what is lost."""
    sure = found.sampled >= found.conversations
    about = "" if sure else f" (estimated from the first {found.sampled:,})"
    parts = [
        f"{found.conversations:,} conversations make {ceil(found.rows):,} rows, {packing}{about}",
        f"padding {100 * found.padding_share:.1f} %",
    ]
    lost = {
        "dropped": found.counts["dropped"],
        "cut after an answer": found.counts["cut"],
        "rows skipped, with nothing to learn": found.counts["skipped"],
    }
    return ", ".join(parts + [f"{n:,} {what}" for what, n in lost.items() if n])
