"""The processes of a run: joining a cluster, sharing results, and where something was made.

Only process 0 prints. jax is imported inside the functions, so that a script without jax can use
cli.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nanochat_jax.config import base_dir

PACKAGE = Path(__file__).resolve().parent
GPU_MEMORY_SHARE = "0.92"  # JAX alone takes 0.75; a training program may have nearly all


def start() -> None:
    """Takes the GPU's memory, joins the other processes of a cluster run, caches compiled programs.

    A cluster run is recognised by Slurm with several tasks, or by JAX_COORDINATOR_ADDRESS with
    JAX_NUM_PROCESSES and JAX_PROCESS_ID (torchrun-like launchers, Kubernetes).
    """
    import jax

    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the old name; both are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", GPU_MEMORY_SHARE)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    jax.config.update("jax_compilation_cache_dir", str(base_dir() / "jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def is_main_process() -> bool:
    jax = sys.modules.get("jax")  # a process that has not imported it has joined no cluster
    return jax is None or jax.process_index() == 0


def say(*lines: Any) -> None:
    """Prints on process 0 only, without buffering."""
    if is_main_process():
        print(*lines, flush=True)


def warn(*lines: Any) -> None:
    """As `say`, on standard error: standard output may be an answer that goes on to a program."""
    if is_main_process():
        print(*lines, file=sys.stderr, flush=True)


def wait_for_all(name: str) -> None:
    """Returns when every process of a cluster run has called it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather_json(value: Any) -> list[Any]:
    """The values of all processes, in their order; every process must call it.

    They travel as JSON: tuples become lists, NaN stays NaN, and no number loses a bit.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(encoded)]))[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(encoded)] = encoded
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]


def share_out[T](items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
    """`work(items)`, a JSON value for each, computed in parts by the processes of a cluster run.

    Every process must call it, and gets all results.
    """
    import jax

    n = jax.process_count()
    shares = gather_json(work(items[jax.process_index() :: n]))
    return [shares[i % n][i // n] for i in range(len(items))]


def provenance() -> dict[str, Any]:
    """Where something was made: code, versions, devices."""
    import jax

    packages = ("nanochat-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "commit": _git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "cpu_cores": cpu_cores(),
        "n_devices": jax.device_count(),
        "n_processes": jax.process_count(),
    }


def cpu_cores() -> int:
    """The cores that this process may use: XLA divides its sums among as many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this runs from, with "+changes" if files differ from it."""

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
