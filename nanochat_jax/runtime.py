"""What every script does first and last: join the cluster, keep compiled programs, speak to people.

Only process 0 of a cluster run prints. A mistake of the user ends a script with one sentence; a
traceback means a fault of ours.
"""

import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nanochat_jax.config import base_dir
from nanochat_jax.sharding import initialize_distributed

PACKAGE = Path(__file__).resolve().parent
SCRIPTS = PACKAGE.parent / "scripts"
SECONDS_BETWEEN_LINES = 20  # of progress, where there is no terminal
GPU_MEMORY_SHARE = "0.92"  # JAX alone takes 0.75; a training program may have nearly all


def start() -> None:
    """Takes the GPU's memory, joins the other processes, keeps compiled programs for later."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the old name; both are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", GPU_MEMORY_SHARE)
    initialize_distributed()
    jax.config.update("jax_compilation_cache_dir", str(base_dir() / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run_script(main: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Runs a script's main; a mistake of the user becomes one sentence and exit code 1.

    That is a ValueError raised by our own code, or an OSError (no file, no right, no space).
    NANOCHAT_TRACEBACK=1 shows the traceback all the same. `interrupted` is what to say after a
    Ctrl-C that the script has not seen to itself.
    """
    logging.basicConfig()  # unless a library has done so
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("NANOCHAT_TRACEBACK") == "1" or not _is_the_users(error):
            raise
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = interrupted
    else:
        return
    sys.exit(message)  # outside, so that what the error holds on to is gone by then


def _is_the_users(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    parents = Path(frames[-1].filename).resolve().parents if frames else ()
    return PACKAGE in parents or SCRIPTS in parents


def is_main_process() -> bool:
    return jax.process_index() == 0


def say(*lines: Any) -> None:
    """Prints on process 0 only, at once."""
    if is_main_process():
        print(*lines, flush=True)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows on process 0 how far something is: call it with (done, total).

    A bar on a terminal; elsewhere, as in a log file, a line now and then.
    """
    console = Console(stderr=True)
    if not is_main_process() or not console.is_terminal:
        yield _lines_of_progress(name)
        return
    columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines_of_progress(name: str) -> Callable[[int, int], None]:
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() >= told + SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            say(f"{name}: {100 * done / total:.0f} %")

    return tell


def wait_for_all(name: str) -> None:
    """Until every process of a cluster run has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_json(value: Any) -> list[Any]:
    """What every process gave, in their order; all of them must call it.

    JSON, so tuples become lists; NaN stays NaN, and no number loses a bit.
    """
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(encoded)]))[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(encoded)] = encoded
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]


def share_out[T](items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """`work(items)`, a result in JSON for each, done in parts by the processes of a cluster run.

    All of them must call it, and each gets all results.
    """
    n = jax.process_count()
    shares = gather_json(work(items[jax.process_index() :: n]))
    return [shares[i % n][i // n] for i in range(len(items))]


def compute_dtype(name: str) -> Any:
    """The type of matrix products and activations: "auto" is bfloat16 but for a CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is auto, float32 or bfloat16, not {name!r}")
    return jnp.bfloat16 if name == "bfloat16" else jnp.float32


def attention_kernel(name: str, dtype: Any, sequence_len: int, head_dim: int) -> str:
    """The attention to compile: "auto" is cudnn wherever its conditions hold."""
    if name not in ("auto", "blocked", "cudnn"):
        raise ValueError(f"attention is auto, blocked or cudnn, not {name!r}")
    wrong = _why_not_cudnn(dtype, sequence_len, head_dim)
    if name == "cudnn" and wrong:
        raise ValueError(f"attention=cudnn needs {wrong}; use attention=blocked")
    return "blocked" if name == "blocked" or wrong else "cudnn"


def _why_not_cudnn(dtype: Any, sequence_len: int, head_dim: int) -> str | None:
    if "NVIDIA" not in jax.devices()[0].device_kind:
        return f"an NVIDIA GPU, not {jax.devices()[0].device_kind!r}"
    if dtype != jnp.bfloat16:
        return "dtype=bfloat16"
    if sequence_len % 128:
        return f"rows of a multiple of 128 tokens, not {sequence_len}"
    if head_dim % 8 or head_dim > 128:
        return f"heads of a multiple of 8 and at most 128, not {head_dim}"
    return None


def provenance() -> dict[str, Any]:
    """Where something was made: code, versions, devices."""
    packages = ("nanochat-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "commit": _git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "n_devices": jax.device_count(),
        "n_processes": jax.process_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout this runs from, with "+changes" where files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=PACKAGE, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
