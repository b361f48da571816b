"""The one reader of corpus text: which files of a folder are taken, and the documents in them.

Everything that reads text to train on goes through this file: the tokenizer's trainer, the input
pipeline (shards.py) and `download.py --from` (corpus.py).

    .parquet           a column of strings, whatever wrote it
    .jsonl .ndjson     an object with a string in each line, or one array of them; also .json
    .txt .md           the file
    .gz .zst           after any of the last two

A document without text (a null, blanks) is an empty string here; who reads skips it.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PARQUET, JSON_LINES, PLAIN = (".parquet",), (".jsonl", ".ndjson", ".json"), (".txt", ".md")
SUFFIXES = (*PARQUET, *JSON_LINES, *PLAIN)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_NAMES = ("text", "content", "document", "body")  # the first of these that a file has
SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}
SPLITS["test"] = "test"
SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)
LISTED = 8  # files of a kind that a listing names


# ---- the files of a folder -------------------------------------------------------------------


class Survey(NamedTuple):
    """The part that each file of a folder plays."""

    folder: Path
    train: list[Path]
    val: list[Path]
    passed_over: list[tuple[Path, str]]  # and why

    def lines(self) -> list[str]:
        """What is taken and what is not, for people."""
        taken = {"training": self.train, "validation": self.val}
        lines = [f"  {part}: {self._names(paths)}" for part, paths in taken.items() if paths]
        reasons = dict.fromkeys(why for _, why in self.passed_over)
        for reason in reasons:
            paths = [path for path, why in self.passed_over if why == reason]
            lines.append(f"  passed over ({reason}): {self._names(paths)}")
        return lines

    def _names(self, paths: Sequence[Path]) -> str:
        named = ", ".join(str(path.relative_to(self.folder)) for path in paths[:LISTED])
        return named + (f" and {len(paths) - LISTED:,} more" if len(paths) > LISTED else "")


def survey(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> Survey:
    """The files with text below a folder, by name, and the part that their names give them.

    train-00000-of-00002.parquet, val.jsonl or dev/a.txt belong to a split. Those of a test split
    are for neither part. A file of no split is for training.
    """
    found = Survey(folder, [], [], [])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    has_records = any(_kind(path) in (*PARQUET, *JSON_LINES) for path in files)
    for path in files:
        split = _split(path.relative_to(folder))
        if why := _reason_to_pass(path, folder, suffixes, has_records):
            found.passed_over.append((path, why))
        elif split == "test":
            found.passed_over.append((path, "test split"))
        else:
            (found.val if split == "val" else found.train).append(path)
    return found


def _kind(path: Path) -> str:
    """The suffix that says what is in the file."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def _reason_to_pass(
    path: Path, folder: Path, suffixes: Sequence[str], has_records: bool
) -> str | None:
    if any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
        return "hidden"
    if _kind(path) not in suffixes or (_kind(path) == ".parquet" and path.suffix in COMPRESSIONS):
        return f"none of {', '.join(suffixes)}"
    if re.match(r"(licen[cs]e|copying|notice)\b", path.name, re.IGNORECASE):
        return "licence"
    if has_records and re.match(r"(readme|dataset_infos?)\b", path.name, re.IGNORECASE):
        return "about the data set"
    return None


def _split(path: Path) -> str | None:
    """The split that a file's name begins with, or that a folder on the way to it is called."""
    named = SPLIT_NAME.match(path.name)
    folders = [SPLITS[part.lower()] for part in path.parts[:-1] if part.lower() in SPLITS]
    return SPLITS[named[1].lower()] if named else (folders[-1] if folders else None)


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file, in order; ValueError with the file, and the row that is wrong."""
    if _kind(path) in PARQUET:
        footer = read_footer(path)
        for row_group in range(footer.num_row_groups):
            yield from texts_of(read_row_group(path, row_group, footer))
    elif _kind(path) in PLAIN:
        yield _read_text(path)
    else:
        yield from _read_json(path)


# ---- Parquet ---------------------------------------------------------------------------------


def read_footer(path: Path) -> pq.FileMetaData:
    """A file's footer; ValueError when it cannot be read or has no column of texts."""
    try:
        with pq.ParquetFile(path) as file:
            schema, footer = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    text_column(schema, path)
    return footer


def text_column(schema: pa.Schema, path: Path) -> str:
    """The column with the documents: `text`, another usual name, or the only one of strings."""
    named = [name for name in TEXT_NAMES if name in schema.names]
    if named and not _is_text(schema.field(named[0]).type):
        kind = schema.field(named[0]).type
        raise ValueError(f"the column `{named[0]}` of {path} holds {kind}, not strings")
    usable = [field.name for field in schema if _is_text(field.type)]
    if not named and len(usable) != 1:
        columns = ", ".join(schema.names) or "none"
        raise ValueError(
            f"{path} has no column `text` (its columns: {columns}); rename the one to use"
        )
    return named[0] if named else usable[0]


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def read_row_group(path: Path, row_group: int, footer: pq.FileMetaData) -> pa.ChunkedArray:
    """The texts of one row group as large_string, known to be UTF-8."""
    try:
        with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
            column = text_column(file.schema_arrow, path)
            table = file.read_row_group(row_group, columns=[column], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error, f" at row group {row_group}") from None
    column = table.column(0)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    raw = column.cast(pa.large_binary())
    try:
        return raw.cast(pa.large_string())  # this cast, unlike reading, checks the bytes
    except pa.ArrowInvalid:
        before = sum(footer.row_group(group).num_rows for group in range(row_group))
        raise _not_utf8(path, raw, before) from None


def texts_of(column: pa.ChunkedArray) -> list[str]:
    return [text or "" for text in column.to_pylist()]


def _not_utf8(path: Path, raw: pa.ChunkedArray, before: int) -> ValueError:
    for row, value in enumerate(raw, start=before + 1):
        try:
            (value.as_py() or b"").decode()
        except UnicodeDecodeError as error:
            what = f"not valid UTF-8 (byte {error.start}); convert it"
            return ValueError(f"{path}, row {row}: {what}")
    raise AssertionError("Arrow and Python disagree about UTF-8")


def _unreadable(path: Path, error: Exception, where: str = "") -> ValueError:
    detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ValueError(
        f"{path} cannot be read as Parquet{where} ({detail}); if it was cut off, delete it and "
        "fetch or make it again with scripts/download.py"
    )


# ---- JSON and plain text ---------------------------------------------------------------------


def open_unpacked(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name ends in .gz or .zst."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    file = path.open("rb")
    return io.BufferedReader(pa.CompressedInputStream(file, compression)) if compression else file


def _read_text(path: Path) -> str:
    try:
        with open_unpacked(path) as file:
            content = file.read()
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 (byte {error.start}); convert it") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def _read_json(path: Path) -> Iterator[str]:
    name: str | None = None  # of the text, as the first object has it
    for where, value in _values(path):
        name = name or _text_name(value)
        text = value.get(name, 0) if isinstance(value, dict) else 0
        if not isinstance(text, str | None):
            raise ValueError(f'{where}: expected an object with a string under "{name or "text"}"')
        try:
            (text or "").encode()  # JSON can spell surrogates, text files cannot hold them
        except UnicodeError as error:
            raise ValueError(f"{where}: not valid Unicode ({error})") from None
        yield text or ""


def _text_name(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    strings = [key for key, text in value.items() if isinstance(text, str)]
    named = [name for name in TEXT_NAMES if name in value]
    return named[0] if named else (strings[0] if len(strings) == 1 else None)


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Each value with its place: of every line, or of the array that the file is."""
    try:
        with open_unpacked(path) as file:
            if _is_array(file):
                entries = _parse(file.read(), str(path))
                yield from ((f"{path}, entry {n}", entry) for n, entry in enumerate(entries, 1))
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parse(line, where)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def _is_array(file: IO[bytes]) -> bool:
    """Whether the first line, which may be the only one, opens an array of objects."""
    head = file.peek(64)[:64].decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")  # type: ignore[attr-defined]
    return head.startswith("[") and head[1:].lstrip().startswith(("{", "]"))


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid Unicode ({error})") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object ({error})") from None
