"""Fixtures of the task tests: a cache of task data with rows of the test's own."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.tasks.sources import HUB_TASKS, _add_to_manifest


@pytest.fixture(autouse=True)
def task_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for task data, and no network."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_TASK_DATA", str(tmp_path / "task_data"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "task_data"


@pytest.fixture
def put_rows(task_data: Path) -> Callable[..., list[Path]]:
    """put_rows("gsm8k", "test", rows, …) writes one Parquet file per list of rows."""

    def put(task: str, split: str, *files: Sequence[dict]) -> list[Path]:
        source = HUB_TASKS[task].split(task, split)
        source.folder.mkdir(parents=True)
        names = [f"{at:05d}.parquet" for at in range(len(files))]
        for name, rows in zip(names, files, strict=True):
            pq.write_table(pa.Table.from_pylist(list(rows)), source.folder / name)
        (source.folder / "manifest.json").write_text(json.dumps(names))
        _add_to_manifest({f"{source}/{name}": "made by a test" for name in names})
        return source.files()

    return put
