"""A run's folder: its lock, its files, its records, and whether it can be resumed.

runs/<name>/ is described in checkpoint.py. All that a run's results depend on (its fingerprint) is
saved with every checkpoint and compared when the run is resumed; everything else may change.
"""

import ctypes
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock, Timeout

from nanochat_jax.config import base_dir, named_folder, sync_folder, to_toml, write_atomically
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CONFIG_FILE, LOCK_FILE = "config.toml", ".lock"
CHECKPOINTS_FOLDER, TOKENIZER_FOLDER = "checkpoints", "tokenizer"


def run_folder(name: str | Path) -> Path:
    """Where a run lives: a name stands for runs/<name>, anything with a slash for itself."""
    return named_folder("runs", name)


def default_run(stages: Sequence[str] = ()) -> str:
    """The name of the run that was written to last, of those stages; ValueError if there is none.

    No stage named: of any.
    """
    folder = base_dir() / "runs"
    found = [path for path in folder.glob(f"*/{CHECKPOINTS_FOLDER}") if any(path.iterdir())]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if not stages or read_meta(path.parent).get("stage") in stages:
            return path.parent.name
    of = f" of the stage {' or '.join(stages)}" if stages else ""
    raise ValueError(f"there is no run{of} in {folder}; train one: bash speedrun.sh")


def check_unused(folder: Path, resume: bool, overwrite: bool) -> None:
    """ValueError when the folder holds a run and neither flag says what to do with it."""
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
def lock_run(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it; ValueError where one does.

    The lock ends with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another process is training the run {folder}: wait for its end or stop it, or "
            "choose another name with --run"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def clear_run(folder: Path, overwrite: bool) -> None:
    """Empties the folder, but for its lock, if `overwrite`; called by one process."""
    for path in folder.iterdir() if overwrite and _is_run(folder) else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _is_run(folder: Path) -> bool:
    """Whether the folder holds records or checkpoints."""
    records, checkpoints = folder / METRICS_FILE, folder / CHECKPOINTS_FOLDER
    has_records = records.exists() and records.stat().st_size > 0
    return has_records or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def write_run_files(folder: Path, config: Any, tokenizer: Tokenizer) -> None:
    """Writes the run's configuration and tokenizer."""
    tokenizer.save(folder / TOKENIZER_FOLDER)
    write_atomically(folder / CONFIG_FILE, to_toml(config))


def check_fingerprint(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError, naming every difference, unless two fingerprints are equal as JSON."""
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


# --- what is read is what was written -------------------------------------------------------------

CHECKSUMS_FILE = "SHA256SUMS"  # of sha256sum's format, so that it can check them, too
CHECKPOINT_FILE = "_CHECKPOINT_METADATA"  # Orbax's; names the checksums of a checkpoint with them


class DamagedError(ValueError):
    """A file is missing, or not what was written; the message names it."""


def seal(folder: Path) -> None:
    """Brings a folder to the disk: its files, CHECKSUMS_FILE with their digests, its names."""
    files, folders = _content(folder)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(partial(_digest, sync=True), files))
    for path in reversed(folders):
        sync_folder(path)
    lines = (f"{d}  {path.relative_to(folder)}\n" for d, path in zip(digests, files, strict=True))
    write_atomically(folder / CHECKSUMS_FILE, "".join(lines))


def check_seal(folder: Path, parts: Sequence[str] = ()) -> bool:
    """Compares a checkpoint with its checksums: its own files, and those in `parts` (all folders).

    False for one from before there were checksums. DamagedError names a file that was changed, is
    missing, or too much.
    """
    if not (folder / CHECKPOINT_FILE).is_file():
        raise DamagedError(f"{folder} is no whole checkpoint: it has no {CHECKPOINT_FILE}")
    listed = folder / CHECKSUMS_FILE
    if not listed.is_file():
        custom = read_json(folder / CHECKPOINT_FILE).get("custom_metadata")
        if custom == {"checksums": CHECKSUMS_FILE}:
            raise DamagedError(f"{listed} is missing")
        return False

    def is_read(path: Path) -> bool:
        inside = path.relative_to(folder).parts
        return not parts or len(inside) == 1 or inside[0] in parts

    expected = {path: d for path, d in _read_checksums(listed).items() if is_read(path)}
    found = [path for path in _content(folder)[0] if is_read(path)]
    for path in sorted({*expected} ^ {*found}):
        what = "is missing" if path in expected else f"is not in {CHECKSUMS_FILE}"
        raise DamagedError(f"{path} {what}")
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(found, pool.map(_digest, found), strict=True):
            if digest != expected[path]:
                raise DamagedError(f"{path} is damaged: its checksum is not the one in {listed}")
    return True


def digest(value: Any) -> str:
    """A short name for JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _content(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder and below, but for its checksums; and the folders, itself first."""
    found = sorted({*folder.rglob("*")} - {folder / CHECKSUMS_FILE})
    folders = [path for path in found if path.is_dir() and not path.is_symlink()]
    return [path for path in found if path not in {*folders}], [folder, *folders]


def _read_checksums(path: Path) -> dict[Path, str]:
    try:
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        return {path.parent / name: digest for digest, name in lines}
    except ValueError:
        raise DamagedError(f"{path} is damaged: it is not a list of checksums") from None


def _digest(path: Path, sync: bool = False) -> str:
    try:
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None


# --- what the report reads ------------------------------------------------------------------------

REPORT_FOLDER = "report"


def record(folder: Path, stage: str, values: dict[str, Any]) -> None:
    """Writes a stage's section: `values`, numbers and texts by name, replace what was there.

    One process of a run calls it. Names that the summary knows: core, core_tasks, bpb, chatcore,
    chat_tasks, core_interval …; seconds, kwh; all others are shown as they are.
    """
    (folder / REPORT_FOLDER).mkdir(parents=True, exist_ok=True)
    _write_json(folder / REPORT_FOLDER / f"{stage}.json", values)


def record_evaluation(path: Path, found: dict[str, Any]) -> None:
    """Writes the evaluation of a checkpoint beside earlier ones of the same checkpoint.

    A mean over tasks that are not all of those in the file is left out.
    """
    before = read_sound(path)
    if before.get("step") != found["step"]:
        before = {}
    whole = before | found
    if "chat_tasks" in found:
        whole["chat_tasks"] = before.get("chat_tasks", {}) | found["chat_tasks"]
        if len(whole["chat_tasks"]) > len(found["chat_tasks"]):
            whole = {name: value for name, value in whole.items() if "mean_centred" not in name}
    _write_json(path, whole)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=1, ensure_ascii=False))


class Meter:
    """What a stage costs: wall seconds, and kWh of the GPUs, with those of its earlier sessions.

    Made when a stage begins; `read()` at its end gives values for `record`.
    """

    def __init__(self, folder: Path, stage: str):
        self._before = read_sound(folder / REPORT_FOLDER / f"{stage}.json")
        self._began, self._kwh = monotonic(), gpu_kwh()

    def read(self) -> dict[str, float]:
        taken = {"seconds": monotonic() - self._began}
        kwh = gpu_kwh()
        if kwh is not None and self._kwh is not None:
            taken["kwh"] = kwh - self._kwh
        return {name: self._before.get(name, 0.0) + value for name, value in taken.items()}


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of which a run has checkpoints, ascending."""
    paths = [path for path in (folder / CHECKPOINTS_FOLDER).glob("*") if path.is_dir()]
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and str(int(p.name)) == p.name)


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta of a run's last checkpoint that is not damaged (a warning says which is)."""
    for step in reversed(checkpoint_steps(folder)):
        checkpoint = folder / CHECKPOINTS_FOLDER / str(step)
        try:
            check_seal(checkpoint, ("meta",))
            if meta := read_json(checkpoint / "meta" / "metadata"):
                return meta
        except DamagedError as damage:
            log.warning("%s", damage)
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is no file, DamagedError where it holds no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} is damaged: it holds no JSON object")
    return value


def read_sound(path: Path) -> dict[str, Any]:
    """As `read_json`, but a damaged file is put aside: {} after a warning that says so."""
    try:
        return read_json(path)
    except DamagedError as damage:
        kept = path.with_name(f"{path.name}.damaged")
        path.replace(kept)
        log.warning("%s; kept as %s, and left out", damage, kept)
        return {}


# --- energy: NVML's counter, through the driver's library alone -----------------------------------

MILLIJOULES_PER_KWH = 3.6e9


def gpu_kwh() -> float | None:
    """Kilowatt-hours that all GPUs of this machine have consumed since their driver was loaded.

    The difference of two readings is what was consumed between them. None where no GPU has a
    counter (there is no GPU, or it is older than Volta).
    """
    nvml, count = _nvml(), ctypes.c_uint()
    if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    millijoules = []
    for index in range(count.value):
        device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        failed = failed or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy))
        if not failed:
            millijoules.append(energy.value)
    return sum(millijoules) / MILLIJOULES_PER_KWH if millijoules else None


@cache
def _nvml() -> Any:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return nvml if nvml.nvmlInit_v2() == 0 else None


# --- metrics.jsonl always, Weights & Biases when asked --------------------------------------------

METRICS_FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_id.txt"
WANDB_PROJECT = "nanochat_jax"

Record = dict[str, Any]
WandbMode = Literal["disabled", "offline", "online"]


class Tracker:
    """Writes records to a run's folder; `write=False`, of all processes but the first: nothing."""

    def __init__(
        self,
        run_folder: Path,
        *,
        name: str = "",
        config: dict[str, Any] | None = None,
        wandb_mode: WandbMode = "disabled",
        write: bool = True,
    ):
        path = run_folder / METRICS_FILE
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
    return [record for record, _ in _records(run_folder / METRICS_FILE)]


def cut_metrics(run_folder: Path, keep: Callable[[Record], bool], file: str = METRICS_FILE) -> None:
    """Removes the records that `keep` refuses, and torn lines, in one atomic replacement."""
    path = run_folder / file
    if not path.exists():
        return
    kept = [line for record, line in _records(path) if keep(record)]
    write_atomically(path, "".join(line + "\n" for line in kept))


def _records(path: Path) -> Iterator[tuple[Record, str]]:
    """Records and their lines. A line torn by a sudden end is the last; others are warned of."""
    # Bytes, not text: a torn line can end inside a character.
    *lines, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last], 1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and {"kind", "step"} <= record.keys()):
                raise ValueError("no record")
            yield record, line.decode()
        except ValueError:
            if number <= len(lines):
                log.warning("%s: line %d is damaged and left out", path, number)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value


def _start_wandb(run_folder: Path, name: str, config: dict[str, Any], mode: WandbMode) -> Any:
    import wandb  # slow to import, and optional

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
