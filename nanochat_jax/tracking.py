"""Numbers for later: metrics.jsonl always, Weights & Biases when asked.

metrics.jsonl has one JSON object a line, with "kind" (train, val, …) and "step": for "train" the
batch that gave the loss, for all others the number of updates made. After a resume the lines beyond
the restored step are cut off, so the file reads like that of a run that was never interrupted.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_id.txt"
WANDB_PROJECT = "nanochat_jax"

Record = dict[str, Any]
WandbMode = Literal["disabled", "offline", "online"]


class Tracker:
    """Writes records to a run's folder. `write=False` (processes other than the first) is mute."""

    def __init__(
        self,
        run_folder: Path,
        *,
        name: str = "",
        config: dict[str, Any] | None = None,
        wandb_mode: WandbMode = "disabled",
        write: bool = True,
    ):
        path = run_folder / FILE
        self._file = path.open("a", encoding="utf-8") if write else None
        asked = write and wandb_mode != "disabled"
        self._wandb = _start_wandb(run_folder, name, config or {}, wandb_mode) if asked else None

    def log(self, kind: str, step: int, **values: Any) -> None:
        """One record; on disk when this returns. Non-finite numbers become null."""
        if self._file is None:
            return
        record = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            numbers = {f"{kind}/{n}": v for n, v in values.items() if isinstance(v, int | float)}
            self._wandb.log({"step": step, **numbers})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run_folder: Path) -> list[Record]:
    """All records of a run; a line torn by a sudden end is left out."""
    return [record for record, _ in _records(run_folder / FILE)]


def cut_metrics(run_folder: Path, keep: Callable[[Record], bool], file: str = FILE) -> None:
    """Removes the records that `keep` refuses, and torn lines, in one atomic replacement."""
    path = run_folder / file
    if not path.exists():
        return
    draft = path.with_suffix(".tmp")
    kept = [line for record, line in _records(path) if keep(record)]
    draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(draft, path)


def _records(path: Path) -> Iterator[tuple[Record, str]]:
    # Bytes, not text: a torn line can end inside a character.
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
            if isinstance(record, dict) and {"kind", "step"} <= record.keys():
                yield record, line.decode()
        except ValueError:
            continue


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value


def _start_wandb(run_folder: Path, name: str, config: dict[str, Any], mode: WandbMode) -> Any:
    import wandb  # slow to import, and not everybody wants it

    id_file = run_folder / WANDB_ID_FILE
    run_id = id_file.read_text().strip() if id_file.exists() else uuid4().hex[:8]
    id_file.write_text(run_id)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
        name=name,
        id=run_id,
        config=config,
        dir=str(run_folder),
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
