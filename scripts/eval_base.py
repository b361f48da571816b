"""Measures a base model: bits per byte of validation text, beside gzip's, and samples.

    python scripts/eval_base.py --run d12
    python scripts/eval_base.py --run d12 --step best --eval bpb --dataset fineweb-edu

What it finds is printed, written to runs/NAME/eval_base.json, and is its last line as JSON.
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from nanochat_jax.actions import make_evaluate, make_sample, validation_rows
from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.config import parse
from nanochat_jax.data.shards import list_shards
from nanochat_jax.evals.bits_per_byte import gzip_bits_per_byte
from nanochat_jax.evals.samples import PROMPTS
from nanochat_jax.runs import run_folder
from nanochat_jax.runtime import is_main_process, run_script, say, start
from nanochat_jax.sharding import make_mesh


@dataclass(frozen=True)
class EvalBaseConfig:
    """What to measure."""

    run: str = "d20"
    """Name of the run, or its folder."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    eval: str = "bpb,sample"
    """What to do: bpb, sample, or both with a comma between."""
    dataset: str | None = None
    """Data set whose validation shard is measured (that of the run)."""
    eval_tokens: int = 20 * 524288
    """Tokens of it."""
    device_batch_size: int = 32
    """Rows that a device computes at once."""
    n_devices: int | None = None
    """Devices to use (all)."""
    sample_tokens: int = 64
    """Tokens of each sample."""
    seed: int = 42
    """Seed of the samples."""


def main() -> None:
    config = parse(EvalBaseConfig, description=__doc__)
    wanted = [name.strip() for name in config.eval.split(",")]
    unknown = sorted(set(wanted) - EVALS.keys())
    if unknown:
        raise ValueError(f"--eval knows {', '.join(EVALS)}, not {', '.join(unknown)}")
    start()
    mesh = make_mesh(config.n_devices)
    folder = run_folder(config.run)
    loaded = load_model(folder, config.step, mesh=mesh)
    say(f"{folder}, step {loaded.meta['step']}")
    result: dict[str, Any] = {"run": config.run, "step": loaded.meta["step"]}
    for name in wanted:
        result |= EVALS[name](config, loaded, mesh)
    if is_main_process():
        (folder / "eval_base.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    say(json.dumps(result, ensure_ascii=False))


def measure_bpb(config: EvalBaseConfig, loaded: LoadedModel, mesh: Mesh) -> dict[str, Any]:
    shards = list_shards(config.dataset or loaded.meta["config"]["dataset"])
    rows = partial(
        validation_rows,
        shards,
        loaded.tokenizer,
        rows=config.device_batch_size * mesh.size,
        sequence_len=loaded.model.config.sequence_len,
        n_tokens=config.eval_tokens,
    )
    found = make_evaluate(loaded.model, mesh, loaded.tokenizer.token_bytes(), rows)(loaded.params)
    assert found is not None  # nobody stops it
    gzip = gzip_bits_per_byte(shards.val, int(found["bytes"]))
    say(f"validation: {found['bpb']:.4f} bits per byte; gzip -9 needs {gzip:.4f} on such text")
    say(f"  over {found['tokens']:,} tokens, {found['bytes']:,} bytes of {shards.val[0].name}")
    return {"bpb": found["bpb"], "gzip_bpb": gzip, "tokens": found["tokens"]}


def write_samples(config: EvalBaseConfig, loaded: LoadedModel, mesh: Mesh) -> dict[str, Any]:
    prompts = [*PROMPTS, "", ""]
    sample = make_sample(
        loaded.model, mesh, loaded.tokenizer, prompts, config.sample_tokens, config.seed
    )
    samples = sample(loaded.params)
    for prompt, text in samples:
        say(f"--- {prompt or '(from nothing)'}\n{prompt}{text}")
    return {"samples": [[prompt, text] for prompt, text in samples]}


EVALS = {"bpb": measure_bpb, "sample": write_samples}

if __name__ == "__main__":
    run_script(main)
