"""Fixtures shared by all tests: eight simulated devices, the golden folder and the real data.

Tests that want files beside the repository skip with a reason where those are absent; under CI=true
they fail instead, so that a green CI run means they ran.
"""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)

# A shell that runs the tests in the background has them ignore Ctrl-C, and all they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
# Compiling is most of the time these tests take: a quarter of it goes with LLVM's expensive passes.
jax.config.update("jax_disable_most_optimizations", True)
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
