"""HumanEval: functions to write, judged by running their tests (Chen et al., 2107.03374)."""

import re
from collections.abc import Sequence
from pathlib import Path

from nanochat_jax.sandbox.run import run
from nanochat_jax.tasks.rows import TaskRows, blank_faults, strings
from nanochat_jax.tasks.task import Conversation, Task, check_index, exchange

SCHEMA = strings("prompt", "canonical_solution", "entry_point", "test")
TIMEOUT_S = 5.0

_FENCED = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


class HumanEval(Task):
    """Right is the completion whose program passes the tests to their end, in the sandbox."""

    name, kind = "humaneval", "generative"

    def __init__(self, files: Sequence[Path], *, allow_unsandboxed: bool = False) -> None:
        self._rows = TaskRows(self.name, files, SCHEMA, blank_faults)
        self.skipped, self._allow_unsandboxed = self._rows.skipped, allow_unsandboxed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        row = self._rows[i]
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return exchange(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])

    def where(self, i: int) -> str:
        return self._rows.where(i)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        program = full_program(conversation, completion)
        allow = self._allow_unsandboxed
        return run(program, timeout_s=TIMEOUT_S, allow_unsandboxed=allow).finished


def full_program(conversation: Conversation, completion: str) -> str:
    """The prompt's imports, what the model wrote, the tests, and the call of them."""
    parts = (
        extract_imports(conversation["messages"][0]["content"]),
        extract_program(completion),
        conversation["test"],
        f"check({conversation['entry_point']})\n",
    )
    return "\n\n".join(parts)


def extract_program(completion: str) -> str:
    """The first fenced block, or all of it."""
    found = _FENCED.search(completion)
    return (found[1] if found else completion).strip()


def extract_imports(prompt: str) -> str:
    """The lines that import something, before the first that does anything else."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)
