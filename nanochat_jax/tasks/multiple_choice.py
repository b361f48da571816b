"""Multiple-choice questions of knowledge: MMLU (2009.03300) and ARC (1803.05457)."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat_jax.tasks.rows import Faults, RowTask, blank_faults
from nanochat_jax.tasks.task import (
    LETTERS,
    Conversation,
    exchange,
    multiple_choice,
)

_TEXTS_AND_LABELS = pa.struct([("text", pa.list_(pa.string())), ("label", pa.list_(pa.string()))])


class MMLU(RowTask):
    """Four choices from 57 subjects; the letters are A to D."""

    name, kind = "mmlu", "categorical"
    schema = pa.schema(
        [
            ("question", pa.string()),
            ("subject", pa.string()),
            ("choices", pa.list_(pa.string())),
            ("answer", pa.int64()),
        ]
    )

    def conversation(self, row: dict[str, Any]) -> Conversation:
        question = multiple_choice(row["question"], LETTERS, row["choices"])
        letter = LETTERS[row["answer"]]
        return exchange(question, letter, subject=row["subject"], letters=LETTERS)

    def find_faults(self, table: pa.Table) -> Faults:
        answer = pc.fill_null(table.column("answer"), -1).to_numpy()
        lengths = pc.fill_null(pc.list_value_length(table.column("choices")), 0).to_numpy()
        number = {int(row): f"{lengths[row]} choices" for row in np.flatnonzero(lengths != 4)}
        outside = np.flatnonzero((answer < 0) | (answer > 3))
        letter = {int(row): f"the answer {answer[row]}, which is none of 0 to 3" for row in outside}
        # The hub's auxiliary_train has no subjects.
        blank = blank_faults(table.select(["question"]))
        return letter | number | _null_choices(table) | blank


class ARC(RowTask):
    """School science; each question brings its own letters, three to five, sometimes digits."""

    kind = "categorical"
    schema = pa.schema(
        [("question", pa.string()), ("choices", _TEXTS_AND_LABELS), ("answerKey", pa.string())]
    )

    def conversation(self, row: dict[str, Any]) -> Conversation:
        letters = tuple(row["choices"]["label"])
        question = multiple_choice(row["question"], letters, row["choices"]["text"])
        return exchange(question, row["answerKey"], letters=letters)

    def find_faults(self, table: pa.Table) -> Faults:
        """Checked row by row: they are a few thousand, in many shapes."""
        choices, answers = (table.column(name).to_pylist() for name in ("choices", "answerKey"))
        whys = map(_why_not_arc, choices, answers)
        return {number: why for number, why in enumerate(whys) if why} | blank_faults(table)


def _null_choices(table: pa.Table) -> dict[int, str]:
    choices = table.column("choices")
    is_null = pc.is_null(pc.list_flatten(choices)).to_numpy()
    rows = pc.list_parent_indices(choices).to_numpy()
    return {int(row): "a choice without a text" for row in np.unique(rows[is_null])}


def _why_not_arc(choices: dict[str, list[str | None]] | None, answer: str | None) -> str | None:
    texts, labels = (choices or {}).get("text") or [], (choices or {}).get("label") or []
    if not texts:
        return "no choices"
    if len(texts) != len(labels) or None in texts or None in labels:
        return f"{len(texts)} choices with {len(labels)} letters"
    if answer not in labels:
        return f"the answer {answer!r}, which is none of the letters {', '.join(map(str, labels))}"
    return None
