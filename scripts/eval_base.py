"""Measures a base model: CORE, bits per byte of validation text beside gzip's, and samples.

    python scripts/eval_base.py --run d12
    python scripts/eval_base.py --run d12 --eval core --bundle ~/eval_bundle.zip --max-per-task 500
    python scripts/eval_base.py --run d12 --step best --eval bpb --dataset fineweb-edu

What it finds is printed, written to runs/NAME/eval_base.json as soon as an evaluation is finished,
and is its last line as JSON. CORE's table is written to runs/NAME/eval_core.csv too.
"""

import json
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from nanochat_jax.checkpoint import LoadedModel, load_model
from nanochat_jax.cli import progress_bar, run_script
from nanochat_jax.config import parse
from nanochat_jax.data.shards import list_shards
from nanochat_jax.distributed import is_main_process, say, start
from nanochat_jax.evals.bits_per_byte import evaluate, gzip_bits_per_byte
from nanochat_jax.evals.core import comparison, core_csv, core_json, evaluate_core
from nanochat_jax.evals.core_tasks import find_bundle, how_to_get, read_bundle
from nanochat_jax.evals.generation import PROMPTS
from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.runs import record_evaluation, run_folder
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.pretraining import long_documents_of
from nanochat_jax.stages.stage import make_sample, validation_rows
from nanochat_jax.train import make_eval_step, put_batch


@dataclass(frozen=True)
class EvalBaseConfig:
    """What to measure."""

    run: str = "d20"
    """Name of the run, or its folder."""
    step: str = "last"
    """Which checkpoint: a step, last or best."""
    eval: str | None = None
    """What to do: core, bpb, sample, with commas between (all; core if its bundle is there)."""
    bundle: str | None = None
    """Folder or zip file of the CORE tasks (eval_bundle, .zip or not, in the base directory)."""
    max_per_task: int = -1
    """Questions of each CORE task (all); their examples come from among them."""
    dataset: str | None = None
    """Data set whose validation shard is measured (that of the run)."""
    eval_tokens: int = 20 * 524288
    """Tokens of it."""
    device_batch_size: int = 32
    """Rows of the trained length that a device computes together."""
    n_devices: int | None = None
    """Devices to use (all)."""
    sample_tokens: int = 64
    """Tokens of each sample."""
    seed: int = 42
    """Seed of the samples."""


def main() -> None:
    config = parse(EvalBaseConfig, "eval_base", description=__doc__)
    wanted = choose_evaluations(config)
    start()
    mesh = make_mesh(config.n_devices)
    folder = run_folder(config.run)
    loaded = load_model(folder, config.step, mesh=mesh)
    say(f"{folder}, step {loaded.meta['step']}")
    if "bpb" in wanted and not data_set(config, loaded):
        raise ValueError(f"{config.run} was not trained on a data set; name one with --dataset")
    result: dict[str, Any] = {"run": config.run, "step": loaded.meta["step"]}
    for name in wanted:
        result |= EVALS[name](config, loaded, mesh)
        if is_main_process():
            record_evaluation(folder / "eval_base.json", result)
    say(json.dumps(result, ensure_ascii=False))


def choose_evaluations(config: EvalBaseConfig) -> list[str]:
    """The names of the evaluations; ValueError for one that cannot be done."""
    bundle = find_bundle(config.bundle)
    if config.max_per_task == 0:
        raise ValueError("--max-per-task 0 leaves no question; leave it out for all")
    if config.eval is None:
        if bundle is None:
            say(f"CORE is left out: its bundle is not there; {how_to_get()}")
        return [name for name in EVALS if name != "core" or bundle is not None]
    wanted = [name.strip() for name in config.eval.split(",")]
    unknown = sorted(set(wanted) - EVALS.keys())
    if unknown:
        raise ValueError(f"--eval knows {', '.join(EVALS)}, not {', '.join(unknown)}")
    if "core" in wanted and bundle is None:
        raise ValueError(f"there is no CORE bundle; {how_to_get()}")
    return wanted


def measure_core(config: EvalBaseConfig, loaded: LoadedModel, mesh: Mesh) -> dict[str, Any]:
    path = find_bundle(config.bundle)
    assert path is not None  # choose_evaluations has checked
    bundle = read_bundle(path)
    budget = config.device_batch_size * loaded.model.config.sequence_len
    scorer = Scorer(loaded.model, mesh, loaded.params, tokens_per_device=budget)
    with progress_bar("CORE") as progress:
        results = evaluate_core(
            scorer, loaded.tokenizer, bundle, max_per_task=config.max_per_task, progress=progress
        )
    found = core_json(results)
    say(comparison(found, bundle.published))
    if is_main_process():
        path = run_folder(config.run) / "eval_core.csv"
        path.write_text(core_csv(results), encoding="utf-8")
    return found | {"core_max_per_task": config.max_per_task}


def data_set(config: EvalBaseConfig, loaded: LoadedModel) -> str:
    return config.dataset or loaded.meta["config"].get("dataset", "")


def measure_bpb(config: EvalBaseConfig, loaded: LoadedModel, mesh: Mesh) -> dict[str, Any]:
    shards = list_shards(data_set(config, loaded))
    rows = validation_rows(
        shards,
        loaded.tokenizer,
        rows=config.device_batch_size * mesh.size,
        sequence_len=loaded.model.config.sequence_len,
        n_tokens=config.eval_tokens,
        long_documents=long_documents_of(loaded.meta, data_set(config, loaded)),
    )
    batches = (put_batch(part, 1, mesh) for part in rows)
    eval_step = make_eval_step(loaded.model, mesh)
    found = evaluate(eval_step, loaded.params, batches, loaded.tokenizer.token_bytes())
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


EVALS = {"core": measure_core, "bpb": measure_bpb, "sample": write_samples}

if __name__ == "__main__":
    run_script(main, "interrupted; eval_base.json has the evaluations that were finished")
