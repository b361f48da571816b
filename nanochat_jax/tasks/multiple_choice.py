"""Questions of knowledge with choices: MMLU (2009.03300) and ARC (1803.05457)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat_jax.tasks.rows import Faults, TaskRows, blank_faults
from nanochat_jax.tasks.task import (
    LETTERS,
    Conversation,
    Task,
    check_index,
    exchange,
    is_reference,
    multiple_choice,
)

MMLU_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("subject", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.int64()),
    ]
)
_TEXTS_AND_LABELS = pa.struct([("text", pa.list_(pa.string())), ("label", pa.list_(pa.string()))])
ARC_SCHEMA = pa.schema(
    [("question", pa.string()), ("choices", _TEXTS_AND_LABELS), ("answerKey", pa.string())]
)


class MMLU(Task):
    """Four choices from 57 subjects; the letters are A to D."""

    kind = "categorical"

    def __init__(self, files: Sequence[Path], name: str = "mmlu") -> None:
        self.name = name
        self._rows = TaskRows(name, files, MMLU_SCHEMA, _mmlu_faults)
        self.skipped = self._rows.skipped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        row = self._rows[i]
        question = multiple_choice(row["question"], LETTERS, row["choices"])
        letter = LETTERS[row["answer"]]
        return exchange(question, letter, subject=row["subject"], letters=LETTERS)

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_reference(conversation, completion)


class ARC(Task):
    """School science; each question brings its own letters, three to five, sometimes digits."""

    kind = "categorical"

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name = name
        self._rows = TaskRows(name, files, ARC_SCHEMA, _arc_faults)
        self.skipped = self._rows.skipped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        row = self._rows[i]
        letters = tuple(row["choices"]["label"])
        question = multiple_choice(row["question"], letters, row["choices"]["text"])
        return exchange(question, row["answerKey"], letters=letters)

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_reference(conversation, completion)


def _mmlu_faults(table: pa.Table) -> Faults:
    answer = pc.fill_null(table.column("answer"), -1).to_numpy()
    lengths = pc.fill_null(pc.list_value_length(table.column("choices")), 0).to_numpy()
    number = {int(row): f"{lengths[row]} choices" for row in np.flatnonzero(lengths != 4)}
    outside = np.flatnonzero((answer < 0) | (answer > 3))
    letter = {int(row): f"the answer {answer[row]}, which is none of 0 to 3" for row in outside}
    # The hub's auxiliary_train has no subjects.
    blank = blank_faults(table.select(["question"]))
    return letter | number | _null_choices(table) | blank


def _null_choices(table: pa.Table) -> dict[int, str]:
    choices = table.column("choices")
    is_null = pc.is_null(pc.list_flatten(choices)).to_numpy()
    rows = pc.list_parent_indices(choices).to_numpy()
    return {int(row): "a choice without a text" for row in np.unique(rows[is_null])}


def _arc_faults(table: pa.Table) -> Faults:
    """Checked row by row: there are few thousand of them, and none is like another."""
    rows = zip(
        table.column("choices").to_pylist(), table.column("answerKey").to_pylist(), strict=True
    )
    wrong = {number: why for number, row in enumerate(rows) if (why := _why_not_arc(*row))}
    return wrong | blank_faults(table)


def _why_not_arc(choices: dict[str, list[str | None]] | None, answer: str | None) -> str | None:
    texts, labels = (choices or {}).get("text") or [], (choices or {}).get("label") or []
    if not texts:
        return "no choices"
    if len(texts) != len(labels) or None in texts or None in labels:
        return f"{len(texts)} choices with {len(labels)} letters"
    if answer not in labels:
        return f"the answer {answer!r}, which is none of the letters {', '.join(map(str, labels))}"
    return None
