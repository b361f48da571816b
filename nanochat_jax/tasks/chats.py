"""Conversations written by others: SmolTalk from the hub, and JSON files of your own."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat_jax.tasks.rows import Faults, RowTask, is_blank
from nanochat_jax.tasks.task import (
    Conversation,
    Skipped,
    Task,
    check_index,
    report_skipped,
    why_unusable,
)

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


class SmolTalk(RowTask):
    """General conversations with an assistant (smol-smoltalk, 2502.02737)."""

    name, kind = "smoltalk", "generative"
    schema = pa.schema([("messages", pa.list_(_MESSAGE))])

    def conversation(self, row: dict[str, Any]) -> Conversation:
        return row

    def find_faults(self, table: pa.Table) -> Faults:
        """`why_unusable`, asked only about the few rows that fail a check of whole columns."""
        faults, first = dict[int, str](), 0
        for chunk in table.column("messages").chunks:
            for row in _suspicious(chunk):
                if why := why_unusable(chunk[int(row)].as_py()):
                    faults[first + int(row)] = why
            first += len(chunk)
        return faults


def _suspicious(messages: pa.ListArray) -> np.ndarray:
    """Rows that are not simply question, answer, question, answer, …, none of them empty."""
    lengths = pc.fill_null(pc.list_value_length(messages), 0).to_numpy(zero_copy_only=False)
    row = pc.list_parent_indices(messages).to_numpy()
    flat = pc.list_flatten(messages)
    content = pa.chunked_array([pc.struct_field(flat, "content")])
    roles = pc.struct_field(flat, "role")
    is_system, is_user, is_assistant = (
        pc.fill_null(pc.equal(roles, role), False).to_numpy(zero_copy_only=False)
        for role in ("system", "user", "assistant")
    )
    starts = np.cumsum(lengths) - lengths
    position = np.arange(len(row)) - starts[row]
    is_system &= position == 0
    has_system = np.zeros(len(lengths), bool)
    has_system[row[is_system]] = True
    is_users_turn = (position - has_system[row]) % 2 == 0
    right = is_system | np.where(is_users_turn, is_user, is_assistant)
    wrong = ~right | is_blank(content)
    is_short = lengths < 2 + has_system
    return np.union1d(np.flatnonzero(is_short), row[wrong])


class CustomJSON(Task):
    """A file with a conversation in each line: a JSON array of messages.

    An object with such an array under "messages" is accepted, too. Only the positions of the lines
    are kept in memory. Unusable lines are reported in one warning and listed in `skipped`.
    """

    kind = "generative"

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or f"json:{path}"
        if not path.is_file():
            raise ValueError(f"there is no file {path} with conversations, one in each line")
        self._starts, self._lines = array("q"), array("q")
        self.skipped = list(self._find_lines())
        total = len(self._starts) + len(self.skipped)
        if not total:
            raise ValueError(f"{path} is empty; write a JSON array of messages in each line")
        report_skipped(self.name, self.skipped, total)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        with self.path.open("rb") as file:
            file.seek(self._starts[i])
            return {"messages": _messages(file.readline())}

    def where(self, i: int) -> str:
        return f"{self.path}, line {self._lines[i]}"

    def _find_lines(self) -> Iterator[Skipped]:
        """Records the positions of the usable lines, and yields the others."""
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    if why := _why_unusable_line(line):
                        yield Skipped(f"{self.path}, line {number}", why)
                    else:
                        self._starts.append(start)
                        self._lines.append(number)
                start += len(line)


def _messages(line: bytes) -> Any:
    value = json.loads(line.decode("utf-8-sig"))
    return value.get("messages") if isinstance(value, dict) else value


def _why_unusable_line(line: bytes) -> str | None:
    try:
        messages = _messages(line)
        json.dumps(messages, ensure_ascii=False).encode()  # JSON can spell lone surrogates
    except UnicodeError as error:
        return f"not valid Unicode ({error})"
    except (ValueError, RecursionError):
        return "not JSON; a line must be a whole array of messages"
    return why_unusable(messages)
