"""A run of one checkpoint in a base directory of its own, for the tests of scripts."""

from pathlib import Path

import numpy as np

from nanochat_jax.checkpoint import Checkpoints, model_meta
from nanochat_jax.gpt import GPT
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import TrainState

ROOT = Path(__file__).resolve().parent.parent.parent
STEP = 5


def make_run(base: Path, model: GPT, params, tokenizer: Tokenizer) -> Path:
    """The folder of the run "tiny", at step STEP."""
    folder = base / "runs" / "tiny"
    tokenizer.save(folder / "tokenizer")
    with Checkpoints(folder, 1) as checkpoints:
        state = TrainState(np.int32(STEP), params, {"count": np.int32(STEP)})
        checkpoints.save(state, {"step": STEP, **model_meta(model.config)}, None)
        checkpoints.wait()
    cache = ROOT / ".pytest_cache" / "jax"  # what conftest.py uses
    cache.mkdir(parents=True, exist_ok=True)
    (base / "jax_cache").symlink_to(cache)
    return folder
