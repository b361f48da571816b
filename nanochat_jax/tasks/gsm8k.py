"""GSM8K: sums in words for children, solved with the calculator (Cobbe et al., 2110.14168)."""

import re
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.tasks.rows import TaskRows, blank_faults, strings
from nanochat_jax.tasks.task import (
    Conversation,
    Part,
    Task,
    check_index,
    exchange,
    is_reference_number,
    python,
    text,
)

_CALL = re.compile(r"<<([^>]+)>>")


class GSM8K(Task):
    """Right is the completion whose number after "#### " equals the reference's."""

    name, kind = "gsm8k", "generative"

    def __init__(self, files: Sequence[Path]) -> None:
        schema = strings("question", "answer")
        self._rows = TaskRows(self.name, files, schema, blank_faults)
        self.skipped = self._rows.skipped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        row = self._rows[i]
        return exchange(row["question"], parse_answer(row["answer"]))

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_reference_number(conversation, completion)


def parse_answer(answer: str) -> list[Part]:
    """Text and calls in alternation: <<12/60=0.2>> calls the calculator with 12/60."""
    parts = []
    for index, piece in enumerate(_CALL.split(answer)):
        if index % 2 == 0:
            parts.append(text(piece))
        else:
            expression, _, output = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts += python(expression, output)
    return parts
