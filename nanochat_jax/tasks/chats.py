"""Conversations written by others: SmolTalk from the hub, and JSON files of your own."""

import json
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat_jax.tasks.formats import Read, read_conversation
from nanochat_jax.tasks.json_files import read_values
from nanochat_jax.tasks.rows import Faults, RowTask, is_blank
from nanochat_jax.tasks.task import (
    Conversation,
    Skipped,
    Task,
    check_index,
    report_skipped,
    why_unusable,
)
from nanochat_jax.tokenizer import ConversationError

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
    """A file of conversations in the formats of formats.py.

    A JSON object or array of messages in each line, or one JSON array of conversations, compressed
    with gzip or Zstandard or not. The file is read once, so that a run never sees another state of
    it; what cannot be used is reported in one warning and listed in `skipped`.
    """

    kind = "generative"

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or f"json:{path}"
        self._rendered, self._ends = bytearray(), array("q", [0])  # JSON takes a third of objects
        self._places: list[str] = []
        self.skipped = []
        formats: Counter[str] = Counter()
        for place, value in read_values(path):
            try:
                read = _usable(value)
            except ConversationError as error:
                self.skipped.append(Skipped(f"{path}, {place}", str(error)))
            else:
                formats[read.format] += 1
                self._add(place, read.messages)
        total = len(self) + len(self.skipped)
        if not total:
            raise ValueError(f"{path} is empty; write a conversation in each line")
        report_skipped(self.name, self.skipped, total)
        self.notes = [f"{path}: " + " and ".join(f"{n:,} as {f}" for f, n in formats.items())]

    def _add(self, place: str, messages: list[dict[str, Any]]) -> None:
        self._rendered += json.dumps(messages, ensure_ascii=False).encode()
        self._ends.append(len(self._rendered))
        self._places.append(place)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        return {"messages": json.loads(self._rendered[self._ends[i] : self._ends[i + 1]])}

    def where(self, i: int) -> str:
        return f"{self.path}, {self._places[i]}"


def _usable(value: Any) -> Read:
    if isinstance(value, ConversationError):
        raise value
    read = read_conversation(value)
    try:
        json.dumps(read.messages, ensure_ascii=False).encode()
    except UnicodeError as error:  # JSON can spell lone surrogates
        raise ConversationError(f"not valid Unicode ({error})") from None
    if why := why_unusable(read.messages):
        raise ConversationError(why)
    return read
