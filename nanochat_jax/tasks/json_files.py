"""JSON files as people have them: a value in each line, or one array; compressed or not."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanochat_jax.tokenizer import ConversationError

BOM = "\ufeff".encode()
CONSTANT = re.compile(rb"[:,\[]\s*(-?Infinity|NaN)")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by their first bytes


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each conversation with its place in the file, a ConversationError for a line without JSON.

    Raises ValueError with the file where it cannot be read or unpacked, or is an array, or an
    object of several lines, with a fault in it.
    """
    content = _read(path)
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        return
    number, first = lines[0]
    whole = _parse(content)
    if not isinstance(whole, ConversationError):
        yield from _entries(f"line {number}", whole)
    elif first.strip() in (b"[", b"{", b"[{", b"[["):
        raise ValueError(f"{path} is {whole}")
    else:
        yield from ((f"line {number}", _parse(line)) for number, line in lines)


def _entries(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of an array, unless it is the messages of one conversation."""
    if not isinstance(value, list) or not value or any(map(_is_message, value)):
        yield place, value
        return
    yield from ((f"entry {number}", one) for number, one in enumerate(value, 1))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"}.isdisjoint(value)


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file of conversations in it")
    if not path.is_file():
        raise ValueError(f"there is no file {path} with conversations, one in each line")
    try:
        with path.open("rb") as file:
            head = file.read(4)
            found = [kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)]
            file.seek(0)
            return pa.CompressedInputStream(file, found[0]).read() if found else file.read()
    except (OSError, pa.ArrowException) as error:
        detail = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path} cannot be read: {detail}") from None


def _parse(text: bytes) -> Any:
    """The value of a JSON text, or a ConversationError that says why there is none."""
    line, why = 1, ""
    try:
        return json.loads(text.removeprefix(BOM).decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        why = f"not valid Unicode ({error.reason}"
    except json.JSONDecodeError as error:
        line, why = error.lineno, f"not JSON ({error.msg}, column {error.colno}"
    except RecursionError:
        why = "not JSON that can be read (it is nested too deeply"
    except ValueError as error:  # of a constant, or of a number of thousands of digits
        line, why = 1 + _lines_before_constant(text), f"not JSON ({error}"
    return ConversationError(why + (f", line {line})" if b"\n" in text else ")"))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _lines_before_constant(text: bytes) -> int:
    found = CONSTANT.search(text)
    return text.count(b"\n", 0, found.start(1)) if found else 0
