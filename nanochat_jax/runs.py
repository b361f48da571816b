"""A run's folder: who may write into it, and whether what is there can be continued.

runs/<name>/ is described in checkpoint.py. What decides the numbers of a run (its identity) is
saved with every checkpoint and compared when the run is resumed; everything else may change.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat_jax.checkpoint import FOLDER, TOKENIZER_FOLDER, open_checkpoints
from nanochat_jax.config import base_dir, to_toml
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.tracking import FILE

CONFIG_FILE, LOCK_FILE = "config.toml", ".lock"


def run_folder(name: str | Path) -> Path:
    """Where a run lives: a name stands for runs/<name>, anything with a slash for itself."""
    if isinstance(name, str) and "/" not in name and name not in ("", ".", ".."):
        return base_dir() / "runs" / name
    return Path(name).expanduser()


def default_run(stages: Sequence[str] = ()) -> str:
    """The name of the run that was written to last, of those stages; ValueError if there is none.

    No stage named: of any.
    """
    folder = base_dir() / "runs"
    found = [path for path in folder.glob(f"*/{FOLDER}") if any(path.iterdir())]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if not stages or _stage_of(path.parent) in stages:
            return path.parent.name
    of = f" of the stage {' or '.join(stages)}" if stages else ""
    raise ValueError(f"there is no run{of} in {folder}; train one: bash speedrun.sh")


def _stage_of(folder: Path) -> str | None:
    """The stage of a run's last finished checkpoint; None where it has none."""
    with open_checkpoints(folder) as checkpoints:
        step = checkpoints.latest()
        return None if step is None else checkpoints.meta(step).get("stage")


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """ValueError when a run is there and it was not said what to do with it."""
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it: choose one of them")
    if _is_run(folder) and not (resume or overwrite):
        raise ValueError(
            f"the run {folder} exists already: continue it with --resume, choose another name with "
            "--run, or delete it and start again with --overwrite"
        )
    if overwrite and Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--overwrite would delete {folder.resolve()}, and you are in it: name another --run"
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it; ValueError where one does.

    The lock ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training the run {folder}: wait for its end or stop it, or "
                "choose another name with --run"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def make_ready(folder: Path, overwrite: bool) -> None:
    """Empties the folder, but for its lock, if `overwrite`; for one process only."""
    for path in folder.iterdir() if overwrite and _is_run(folder) else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _is_run(folder: Path) -> bool:
    """Whether anything is there that it would be a pity to lose."""
    records, checkpoints = folder / FILE, folder / FOLDER
    has_records = records.exists() and records.stat().st_size > 0
    return has_records or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def describe(folder: Path, config: Any, tokenizer: Tokenizer) -> None:
    """Writes what is the run's besides numbers and checkpoints: its configuration and tokenizer."""
    tokenizer.save(folder / TOKENIZER_FOLDER)
    draft = folder / (CONFIG_FILE + ".tmp")
    draft.write_text(to_toml(config), encoding="utf-8")
    draft.replace(folder / CONFIG_FILE)


def check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError, naming every difference, unless two identities are equal as JSON."""
    now = json.loads(json.dumps(now))
    differences = list(_differences(then, now, ""))
    if differences:
        raise ValueError(
            f"the run {folder} cannot be continued like this: {'; '.join(differences)}. Repeat its "
            f"settings with --config {folder / CONFIG_FILE} --resume, or choose another --run"
        )


def _differences(then: Any, now: Any, where: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            name = f"{where} {key}".strip()
            yield from _differences(then.get(key), now.get(key), name)
    elif then != now:
        yield f"{where} was {then}, now {now}"
