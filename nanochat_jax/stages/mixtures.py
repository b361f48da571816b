"""What mid-training and fine-tuning read: tasks by a line of text, mixed, rendered, looked at.

    smoltalk,mmlu-aux*3,gsm8k*4,spellingbee[2000]

names tasks of tasks/registry.py; NAME*N is seen N times a pass, NAME[N] is its first N examples.
"""

import re
from collections.abc import Iterator
from math import ceil, lcm
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

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
from nanochat_jax.tasks.registry import make_task, missing, prepare, source_of
from nanochat_jax.tasks.task import Task
from nanochat_jax.train import Batch, put_arrays

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
TEST_TASKS = {"mmlu-aux": "mmlu"}  # the task that has a test part, where it is another
VAL_EVERY = 20  # one example in so many
VAL_SAMPLE = 512  # validation conversations that tell how many rows all of them make

_TASK = re.compile(r"(?P<name>[^\[\]*]+)(\[(?P<limit>[1-9]\d*)\])?(\*(?P<times>[1-9]\d*))?")


class Listed(NamedTuple):
    """A task as it was named."""

    name: str
    limit: int | None = None
    times: int = 1

    def __str__(self) -> str:
        part = "" if self.limit is None else f"[{self.limit}]"
        return f"{self.name}{part}" + (f"*{self.times}" if self.times > 1 else "")


class TaskNames(NamedTuple):
    """What is trained and measured on."""

    train: str
    val: str


def parse_tasks(text: str) -> list[Listed]:
    """The tasks of a line of text; ValueError shows how they are named."""
    found = []
    for word in text.split(","):
        match = _TASK.fullmatch(word.strip())
        if match is None:
            raise ValueError(
                f"cannot read the task {word.strip()!r} of {text!r}; tasks are named like "
                "smoltalk,mmlu-aux*3,gsm8k[1000]"
            )
        limit, times = (match[group] and int(match[group]) for group in ("limit", "times"))
        found.append(Listed(match["name"].strip(), limit or None, times or 1))
    return found


def choose_tasks(stage: str, recipe: str, tasks: str, val_tasks: str) -> TaskNames:
    """The tasks asked for, or the recipe's where their data is there, or the embedded ones.

    The data of those asked for is fetched. ValueError where that is not possible.
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
    """The tasks in equal parts, as they are measured on."""
    names = (TEST_TASKS.get(one.name, one.name) for one in parse_tasks(tasks))
    return ",".join(dict.fromkeys(names))


def _named(tasks: TaskNames) -> list[tuple[str, str]]:
    train = [(one.name, "train") for one in parse_tasks(tasks.train)]
    return train + [(one.name, _test_split(one.name)) for one in parse_tasks(tasks.val)]


def mixture(tasks: str, split: Literal["train", "test"]) -> Mixture:
    """The tasks of a line of text, shuffled together once, with a fixed seed.

    Of a task without a test part, as a file of conversations is, the last twentieth is kept for it,
    and one conversation at least.
    """
    made = [(_part(one, split), one.times) for one in parse_tasks(tasks)]
    return Mixture([task for task, times in made for _ in range(times)])


def _part(one: Listed, split: str) -> Task:
    if _test_split(one.name) == "test":
        return make_task(one.name, split, limit=one.limit)
    whole = make_task(one.name, "train", limit=one.limit)
    kept = len(whole) - max(1, len(whole) // VAL_EVERY)
    if not kept:
        raise ValueError(f"{one} has a single conversation; at least 2 are needed, one to measure")
    return Slice(whole, 0, kept) if split == "train" else Slice(whole, kept)


def _test_split(name: str) -> str:
    try:
        source_of(name, "test")
    except ValueError:  # there is no such part; that there is no such task, the other split tells
        return "train"
    return "test"


# --- what the model is measured on ----------------------------------------------------------------


def validation_batches(
    source: RenderedDataset, pad_id: int, *, rows: int, n_tokens: int
) -> Iterator[PackedRows]:
    """This process's validation rows, in batches of `rows` over all processes.

    About one pass, and `n_tokens` at most, but never less than one round of the streams; the same
    rows on any number of devices, as long as nothing has to be rounded.
    """
    length, streams = (
        source.row_len - 1,
        choose_streams(jax.process_count(), n_examples=len(source)),
    )
    round_rows = lcm(rows, streams)
    one_pass = ceil(estimate_epoch(source, pad_id, VAL_SAMPLE).rows)
    rounds = first_batches(
        source,
        pad_id,
        max(1, min(n_tokens // length, one_pass) // round_rows),
        rows=round_rows,
        streams=streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (part for whole in rounds for part in split_rows(whole, round_rows // rows))


def split_rows(rows: PackedRows, parts: int) -> list[PackedRows]:
    """Equal parts, in order."""
    return [PackedRows(*arrays) for arrays in zip(*(np.split(a, parts) for a in rows), strict=True)]


def put_validation(rows: PackedRows, accumulation: int, mesh: Mesh) -> Batch:
    return Batch(*put_arrays((rows.inputs_RT, rows.targets_RT), accumulation, mesh))


# --- what is said of it ---------------------------------------------------------------------------


def describe_pass(found: PackingStats, packing: Packing) -> str:
    """One sentence on the conversations and what they amount to."""
    sure = found.sampled >= found.conversations
    about = "" if sure else f" (estimated from the first {found.sampled:,})"
    told = [
        f"{found.conversations:,} conversations make {ceil(found.rows):,} rows, {packing}{about}",
        f"padding {100 * found.padding_share:.1f} %",
    ]
    lost = {
        "dropped": found.counts["dropped"],
        "cut after an answer": found.counts["cut"],
        "rows skipped, with nothing to learn": found.counts["skipped"],
    }
    return ", ".join(told + [f"{n:,} {what}" for what, n in lost.items() if n])
