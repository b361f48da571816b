"""Tasks made of rows of Parquet files, in a fixed random order, the unusable ones left out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat_jax.tasks.task import Conversation, Skipped, Task, check_index, report_skipped

SHUFFLE_SEED = 42

type Faults = Mapping[int, str]


class RowTask(Task):
    """A task whose examples are the usable rows of Parquet files.

    A subclass sets `schema` and writes `conversation`. Unusable rows are reported in one warning
    and listed in `skipped`. The table stays in Arrow's memory; only the row asked for becomes
    Python. Raises ValueError naming the file that cannot be read as `schema`.
    """

    schema: pa.Schema

    def __init__(self, files: Sequence[Path], name: str | None = None) -> None:
        if name is not None:
            self.name = name
        tables = [_read(path, self.schema) for path in files]
        self._files, self._ends = list(files), np.cumsum([table.num_rows for table in tables])
        self._table = pa.concat_tables(tables)
        faults = self.find_faults(self._table)
        self.skipped = [Skipped(self._place(row), why) for row, why in sorted(faults.items())]
        report_skipped(self.name, self.skipped, self._table.num_rows)
        order = np.random.default_rng(SHUFFLE_SEED).permutation(self._table.num_rows)
        self._order = order[~np.isin(order, list(faults))] if faults else order

    def find_faults(self, table: pa.Table) -> Faults:
        """Which rows are unusable, by number, and why."""
        return blank_faults(table)

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The example that a row, as a dictionary of the columns, stands for."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, i: int) -> Conversation:
        check_index(i, len(self))
        return self.conversation(self._table.slice(int(self._order[i]), 1).to_pylist()[0])

    def where(self, i: int) -> str:
        return self._place(int(self._order[i]))

    def _place(self, row: int) -> str:
        file = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[file - 1]) if file else 0
        return f"{self._files[file]}, row {row - first + 1}"


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            lacking = [name for name in schema.names if name not in file.schema_arrow.names]
            if lacking:
                there = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path} has no column {', '.join(lacking)}; it has {there}")
            table = file.read(columns=schema.names)
            if unread := _unread_fields(table.schema, schema):
                raise ValueError(f"{path} has fields that are not read: {', '.join(unread)}")
    except (pa.ArrowException, OSError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as Parquet ({detail}); delete its folder and fetch it again "
            "with scripts/prefetch.py"
        ) from None
    try:
        return table.select(schema.names).cast(schema)
    except pa.ArrowException as error:
        raise ValueError(f"{path} has columns of other types than it should: {error}") from None


def _unread_fields(found: pa.Schema, wanted: pa.Schema) -> list[str]:
    """Fields within the columns that a cast would drop; they could change what is learned."""
    return [
        f"{name}.{leaf}"
        for name in wanted.names
        for leaf in sorted(_leaves(found.field(name).type) - _leaves(wanted.field(name).type))
    ]


def _leaves(kind: pa.DataType) -> set[str]:
    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)}
    return _leaves(kind.value_type) if hasattr(kind, "value_type") else set()


def is_blank(column: pa.ChunkedArray) -> np.ndarray:
    """Which strings of a column are null or only white space: (rows,) bool."""
    length = pc.utf8_length(pc.utf8_trim_whitespace(column))
    return pc.equal(pc.fill_null(length, 0), 0).to_numpy()


def strings(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])


def blank_faults(table: pa.Table) -> dict[int, str]:
    """Rows in which a column of strings is empty."""
    columns = [field.name for field in table.schema if pa.types.is_string(field.type)]
    blank = {name: np.flatnonzero(is_blank(table.column(name))) for name in columns}
    return {int(row): f"an empty {name}" for name, rows in blank.items() for row in rows}
