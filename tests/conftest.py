"""Fixtures shared by all tests: simulated devices, files beside the repository, scripts, tiny runs.

`golden` and `real_data` skip with a reason where their folders are absent; under CI=true they fail
instead, so that a green CI run means they ran. `call` runs a script in this process. `tiny_base` is
a base directory with a pretrained run and a fine-tuned one, made once a session for every test that
reads a run; `tiny_copy` is a copy of it, for a test that writes.
"""

import io
import json
import os
import runpy
import shutil
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock
from script_runs import ROOT, make_base

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

# A shell that runs the tests in the background has them ignore Ctrl-C, and all they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Compiling is most of the time these tests take: a quarter of it goes with LLVM's expensive passes.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # the scripts', too: they share the programs
# Programs compiled by an earlier run of the tests are used again.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def outside_folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not folder.is_dir():
        message = f"{folder} is not there; set {variable} to a folder of that format"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


class Golden:
    """Reads one family of reference files: `golden.json(name)`, `golden.npz(name)`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def json(self, name: str):
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def npz(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{name}.npz") as archive:
            return dict(archive)


@pytest.fixture(scope="session")
def golden() -> Golden:
    """Outputs of the original code; see the marker `golden`."""
    return Golden(outside_folder("NANOCHAT_GOLDEN", "golden"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real text, evaluation bundle and tokenizer files (NANOCHAT_TEST_DATA)."""
    return outside_folder("NANOCHAT_TEST_DATA", "data")


# --- scripts, and runs that they made -------------------------------------------------------------


def run_here(patch: pytest.MonkeyPatch, script: str, *args: str) -> object:
    """Runs a script in this process; its exit code, or the sentence that it ends with."""
    patch.setattr(sys, "argv", [script, *args])
    try:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def call(monkeypatch, capsys):
    """call("script.py", "--flag=1"): what it prints, or the error that it ends with."""

    def run(script: str, *args: str) -> str:
        code = run_here(monkeypatch, script, *args)
        out, err = capsys.readouterr()
        return code if isinstance(code, str) else err if code else out

    return run


TINY_STEPS = 6
# The rates are high enough for a few steps to teach something.
TINY_BASE = """--run=base --dataset=tiny --tokenizer=tiny --depth=2 --n-embd=32 --n-head=2
    --max-seq-len=256 --total-batch-size=1024 --matrix-lr=0.044 --embedding-lr=0.27
    --unembedding-lr=0.08 --warmup-steps=2"""
TINY_CHAT = "--run=chat --source=base --tasks=arithmetic[60]"
TINY = """--num-iterations=6 --device-batch-size=4 --save-every=3 --eval-every=3 --eval-tokens=2048
    --sample-every=0 --n-devices=1"""


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A base directory with the runs "base" and "chat" (made from it), to be read only.

    Each has checkpoints at steps 3 and 6 (TINY_STEPS). The processes of pytest-xdist share it. Data
    set and tokenizer are called "tiny".
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "tiny_base"
    with (
        FileLock(shared / "tiny_base.lock"),
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(io.StringIO()),  # else each failing test would show it
    ):
        if not (folder / "runs" / "chat").is_dir():
            make_base(folder)
            patch.setenv("NANOCHAT_BASE_DIR", str(folder))
            assert run_here(patch, "pretrain.py", *TINY_BASE.split(), *TINY.split()) == 0
            assert run_here(patch, "sft.py", *TINY_CHAT.split(), *TINY.split()) == 0
    return folder


@pytest.fixture
def tiny_copy(tiny_base, tmp_path, monkeypatch) -> Path:
    """A copy of `tiny_base` that a test may write to, as the base directory."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder, symlinks=True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder
