"""HumanEval: functions to write, judged by running their tests (Chen et al., 2107.03374)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.sandbox.run import run
from nanochat_jax.tasks.rows import RowTask, strings
from nanochat_jax.tasks.task import Conversation, exchange

TIMEOUT_S = 5.0

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(RowTask):
    """A completion is right if its program passes all tests, run in the sandbox."""

    name, kind = "humaneval", "generative"
    schema = strings("prompt", "canonical_solution", "entry_point", "test")

    def __init__(self, files: Sequence[Path], *, allow_unsandboxed: bool = False) -> None:
        super().__init__(files)
        self._allow_unsandboxed = allow_unsandboxed

    def conversation(self, row: dict[str, Any]) -> Conversation:
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return exchange(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        program = full_program(conversation, completion)
        allow = self._allow_unsandboxed
        return run(program, timeout_s=TIMEOUT_S, allow_unsandboxed=allow).finished


def full_program(conversation: Conversation, completion: str) -> str:
    """The prompt's imports, the model's program, the tests, and the call that runs them."""
    parts = (
        extract_imports(conversation["messages"][0]["content"]),
        extract_program(completion),
        conversation["test"],
        f"check({conversation['entry_point']})\n",
    )
    return "\n\n".join(parts)


def extract_program(completion: str) -> str:
    """The first fenced block, else the whole completion."""
    found = _FENCED.search(completion)
    return (found[1] if found else completion).strip()


def extract_imports(prompt: str) -> str:
    """The import lines before the first line of another kind."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)
