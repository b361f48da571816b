"""GSM8K: grade-school word problems, solved with the calculator (Cobbe et al., 2110.14168)."""

import re
from typing import Any

from nanochat_jax.tasks.rows import RowTask, strings
from nanochat_jax.tasks.task import (
    Conversation,
    Part,
    exchange,
    is_reference_number,
    python,
    text,
)

_CALL = re.compile(r"<<([^>]+)>>")


class GSM8K(RowTask):
    """A completion is right if its number after "#### " equals the reference's."""

    name, kind = "gsm8k", "generative"
    schema = strings("question", "answer")

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return exchange(row["question"], parse_answer(row["answer"]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_reference_number(conversation, completion)


def parse_answer(answer: str) -> list[Part]:
    """Alternating text and calls: <<12/60=0.2>> calls the calculator with 12/60."""
    parts = []
    for index, piece in enumerate(_CALL.split(answer)):
        if index % 2 == 0:
            parts.append(text(piece))
        else:
            expression, _, output = piece.rpartition("=") if "=" in piece else (piece, "", "")
            parts += python(expression, output)
    return parts
