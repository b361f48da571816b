"""Pretraining: a configuration becomes a run, from the dial to the last checkpoint.

scripts/pretrain.py is the command line of `pretrain`. `decide` and `build` make exactly the model,
optimizer and step that it trains, for whatever wants to look at them without training.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import partial
from math import gcd, lcm
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from nanochat_jax import scaling
from nanochat_jax.actions import (
    make_evaluate,
    make_sample,
    make_save,
    merge_over_processes,
    validation_rows,
)
from nanochat_jax.checkpoint import Checkpoints, model_meta
from nanochat_jax.config import PretrainConfig
from nanochat_jax.data.loader import RowLoader, train_loader
from nanochat_jax.data.shards import Shards, list_shards
from nanochat_jax.data.streams import Layout
from nanochat_jax.devices import peak_flops
from nanochat_jax.evals.samples import PROMPTS
from nanochat_jax.gpt import GPT
from nanochat_jax.loop import (
    Actions,
    Feed,
    LoopConfig,
    NonFiniteError,
    Outcome,
    Progress,
    StopRequest,
    run_training,
    stop_on_signals,
)
from nanochat_jax.optim import OptimConfig, lr_multiplier, make_optimizer
from nanochat_jax.runs import (
    CONFIG_FILE,
    check_free,
    check_same,
    describe,
    make_ready,
    run_folder,
)
from nanochat_jax.runtime import (
    attention_kernel,
    compute_dtype,
    is_main_process,
    provenance,
    say,
    wait_for_all,
)
from nanochat_jax.sharding import make_mesh
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.tracking import Tracker, cut_metrics
from nanochat_jax.train import (
    TrainState,
    abstract_logical_state,
    init_state,
    make_train_step,
    put_batch,
    state_from_logical,
)

STREAMS = 8  # logical data streams, where the rows of a step allow it
TUNABLE = (  # settings of the recipe that a flag of the same name overrides
    "window_pattern",
    "target_param_data_ratio",
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "weight_decay",
    "warmup_steps",
    "warmdown_ratio",
    "final_lr_frac",
    "grad_clip",
)
NON_FINITE_FILE = "nonfinite.json"


# --- deciding -------------------------------------------------------------------------------------


def decide(config: PretrainConfig, vocab_size: int, n_devices: int) -> scaling.Plan:
    """The plan of a configuration on so many devices; ValueError where it cannot be trained."""
    recipe = scaling.RECIPES.get(config.recipe)
    batch = config.total_batch_size
    return scaling.plan(
        config.depth,
        config.recipe,
        n_kv_head=config.n_kv_head,
        num_iterations=config.num_iterations,
        target_flops=config.target_flops,
        device_batch_size=config.device_batch_size,
        n_devices=n_devices,
        vocab_size=vocab_size,
        sequence_len=config.max_seq_len,
        total_batch_size=batch if batch is not None and batch > 0 else None,
        **_shape(config, recipe.head_dim if recipe else 128),
        **{name: getattr(config, name) for name in TUNABLE},
    )


def _shape(config: PretrainConfig, default_head_dim: int) -> dict[str, Any]:
    """aspect_ratio and head_dim that give the width and heads asked for."""
    if config.n_embd is None and config.n_head is None:
        return {"aspect_ratio": config.aspect_ratio, "head_dim": config.head_dim}
    if config.aspect_ratio is not None:
        raise ValueError("give either aspect_ratio, or n_embd and n_head")
    width = config.n_embd or 64 * config.depth
    head_dim = config.head_dim or default_head_dim
    if config.n_head is not None:
        head_dim = width // config.n_head
    if head_dim < 1 or width % head_dim or (config.n_head or width // head_dim) * head_dim != width:
        raise ValueError(
            f"a width of {width} cannot be cut into whole heads of {head_dim}; give n_embd and "
            "n_head, the first a multiple of the second"
        )
    per_layer = Fraction(width, max(config.depth, 1))
    return {
        "aspect_ratio": int(per_layer) if per_layer.is_integer() else per_layer,
        "head_dim": head_dim,
    }


def build(
    config: PretrainConfig, plan: scaling.Plan
) -> tuple[GPT, optax.GradientTransformation, OptimConfig]:
    """The model and the optimizer of a plan, as they are trained on this machine's devices."""
    dtype = compute_dtype(config.dtype)
    kernel = attention_kernel(
        config.attention, dtype, plan.config.sequence_len, plan.config.head_dim
    )
    optim_config = OptimConfig.from_plan(plan)
    optimizer = make_optimizer(plan.config, optim_config, dtype)
    return GPT(plan.config, dtype, kernel), optimizer, optim_config


# --- the run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything of a run that does not change while it goes on."""

    config: PretrainConfig
    folder: Path
    plan: scaling.Plan
    model: GPT
    optimizer: optax.GradientTransformation
    optim_config: OptimConfig
    mesh: Mesh
    tokenizer: Tokenizer
    shards: Shards
    streams: int

    @property
    def rows(self) -> int:
        """Rows of a step, over all devices and micro-batches."""
        return self.plan.total_batch_size // self.plan.config.sequence_len

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers of the run; equal before and after a resume."""
        files = [*self.shards.train, *self.shards.val]
        ranks = b"".join(len(token).to_bytes(4) + token for token in self.tokenizer.ranks)
        return {
            **model_meta(self.plan.config),
            "optimizer": asdict(self.optim_config),
            "batch": {"tokens": self.plan.total_batch_size, "streams": self.streams},
            "data": {
                "training shards": len(self.shards.train),
                "validation shard": self.shards.val[0].name,
                "names and sizes": _digest([[path.name, path.stat().st_size] for path in files]),
            },
            "tokenizer": {
                "vocab_size": self.tokenizer.vocab_size,
                "tokens": hashlib.sha256(ranks).hexdigest()[:16],
                "pattern": _digest(self.tokenizer.pattern),
            },
            "seed": self.config.seed,
            "dtype": np.dtype(self.model.dtype).name,
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def prepare(config: PretrainConfig) -> Job:
    """Reads and decides all that the run needs, and writes nothing; ValueErrors say what lacks."""
    tokenizer = Tokenizer.load(tokenizer_folder(config.tokenizer))
    shards = list_shards(config.dataset)
    mesh = make_mesh(config.n_devices)
    plan = decide(config, tokenizer.vocab_size, mesh.size)
    model, optimizer, optim_config = build(config, plan)
    rows = plan.total_batch_size // plan.config.sequence_len
    streams = config.data_streams or gcd(lcm(STREAMS, jax.process_count()), rows)
    layout = Layout(rows, plan.config.sequence_len, streams, buffer_docs=0)
    layout.owned_streams(jax.process_index(), jax.process_count())  # ValueError unless they divide
    decided = replace(
        config,
        run=config.run or f"d{config.depth}",
        dtype=cast(Any, np.dtype(model.dtype).name),
        data_streams=streams,
    )
    return Job(
        config=decided,
        folder=run_folder(decided.run),
        plan=plan,
        model=model,
        optimizer=optimizer,
        optim_config=optim_config,
        mesh=mesh,
        tokenizer=tokenizer,
        shards=shards,
        streams=streams,
    )


def pretrain(config: PretrainConfig) -> int:
    """Trains, or goes on training; returns the exit code."""
    job = prepare(config)
    check_free(job.folder, config.resume, config.overwrite)
    wait_for_all("checked")
    if is_main_process():
        make_ready(job.folder, config.overwrite)
        print_plan(job)
    wait_for_all("ready")
    with Checkpoints(job.folder, config.keep_last) as checkpoints:
        start = begin(job, checkpoints)
        tracker = Tracker(
            job.folder,
            name=job.config.run,
            config=asdict(config),
            wandb_mode=config.wandb,
            write=is_main_process(),
        )
        try:
            with stop_on_signals() as stop, start.loader:
                outcome = _train(job, start, checkpoints, tracker, stop)
                checkpoints.wait()  # while signals are still caught
        except NonFiniteError as error:
            return _report_non_finite(job, error)
        finally:
            tracker.close()
    _report_end(job, outcome)
    return 0


@dataclass(frozen=True)
class Start:
    """Where training begins: at step 0, or where a checkpoint left off."""

    state: TrainState
    progress: Progress
    loader: RowLoader


def begin(job: Job, checkpoints: Checkpoints) -> Start:
    """A fresh state, or the last checkpoint's when resuming. Resuming in this order:

    1. the identity is compared before anything is touched; 2. the arrays; 3. the data pipeline;
    4. the records beyond the checkpoint are cut off; 5. configuration and tokenizer are written.
    """
    step = checkpoints.latest()
    meta = checkpoints.meta(step) if step is not None else {}
    loader_state = checkpoints.loader_state(step) if step is not None else None
    if step is None:
        state = init_state(job.model, job.optimizer, job.mesh, jax.random.key(job.config.seed))
        progress = Progress()
    else:
        check_same(job.folder, meta["identity"], job.identity())
        abstract = abstract_logical_state(job.model, job.optimizer, job.mesh)
        state = state_from_logical(job.mesh, checkpoints.restore(step, abstract))
        progress = Progress(**{**meta["progress"], "done": tuple(meta["progress"]["done"])})
    loader = _loader(job, loader_state)
    if is_main_process():
        cut_metrics(job.folder, partial(_is_before, step, progress.done))
        describe(job.folder, replace(job.config, resume=False, overwrite=False), job.tokenizer)
    if job.config.resume:
        say(f"resuming at step {step}" if step else "nothing to resume yet: starting at step 0")
    return Start(state, progress, loader)


def _is_before(step: int | None, done: tuple[str, ...], record: dict[str, Any]) -> bool:
    if step is None:
        return False
    return record["step"] < step or (record["step"] == step and record["kind"] in done)


def _loader(job: Job, state: dict[str, Any] | None) -> RowLoader:
    return train_loader(
        job.shards,
        job.tokenizer,
        rows=job.rows,
        sequence_len=job.plan.config.sequence_len,
        streams=job.streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        state=state,
    )


def _train(
    job: Job, start: Start, checkpoints: Checkpoints, tracker: Tracker, stop: StopRequest
) -> Outcome:
    config, plan = job.config, job.plan
    peak = peak_flops(job.mesh.devices.flat[0].device_kind)
    loop_config = LoopConfig(
        num_steps=plan.num_iterations,
        tokens_per_step=plan.total_batch_size,
        eval_every=config.eval_every,
        sample_every=config.sample_every,
        save_every=config.save_every,
        lr_multiplier=partial(lr_multiplier, job.optim_config),
        flops_per_token=plan.flops_per_token,
        peak_flops=peak * job.mesh.size if peak else None,
    )
    if int(start.state.step) == 0:
        tracker.log("plan", 0, **plan_record(job.plan))
    train_step = make_train_step(
        job.model, job.optimizer, job.mesh, grad_clip=job.optim_config.grad_clip
    )
    feed = Feed(
        start.loader,
        lambda rows: put_batch(rows, accumulation=plan.grad_accum_steps, mesh=job.mesh),
    )
    actions = _actions(job, start.loader, checkpoints, stop)
    return run_training(
        loop_config, start.state, train_step, feed, actions, tracker, start.progress, stop
    )


def _actions(job: Job, loader: RowLoader, checkpoints: Checkpoints, stop: StopRequest) -> Actions:
    config, model, mesh = job.config, job.model, job.mesh
    rows = partial(
        validation_rows,
        job.shards,
        job.tokenizer,
        rows=config.device_batch_size * mesh.size,
        sequence_len=job.plan.config.sequence_len,
        n_tokens=config.eval_tokens,
    )
    return Actions(
        evaluate=make_evaluate(
            model,
            mesh,
            job.tokenizer.token_bytes(),
            rows,
            lambda: stop.signal is not None,
        ),
        sample=make_sample(model, mesh, job.tokenizer, PROMPTS, config.sample_tokens, config.seed),
        save=make_save(
            model,
            job.optimizer,
            mesh,
            checkpoints,
            loader.get_state,
            partial(describe_checkpoint, job, job.identity(), provenance()),
        ),
    )


# --- what the run says and saves of itself --------------------------------------------------------


def describe_checkpoint(
    job: Job, identity: dict[str, Any], made_by: dict[str, Any], step: int, progress: Progress
) -> dict[str, Any]:
    """The meta of a checkpoint: all of a run that is neither an array nor the data's state."""
    return {
        "format": 1,
        "stage": "pretrain",
        "step": step,
        **model_meta(job.plan.config),
        "val_bpb": progress.val_bpb if "val" in progress.done else None,
        "progress": asdict(progress),
        "identity": identity,
        "config": asdict(job.config),
        "plan": plan_record(job.plan),
        "provenance": made_by,
    }


def plan_record(plan: scaling.Plan) -> dict[str, Any]:
    """The numbers of a plan."""
    simple = {f.name: getattr(plan, f.name) for f in fields(plan)}
    return {
        **{name: value for name, value in simple.items() if isinstance(value, int | float | str)},
        "total_tokens": plan.total_tokens,
        "total_flops": plan.total_flops,
        "params": {**asdict(plan.params), "total": plan.params.total},
    }


def print_plan(job: Job) -> None:
    """The dial: every derived number with its formula."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in scaling.explain(job.plan):
        table.add_row(*column)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    kind = job.mesh.devices.flat[0].device_kind
    say(
        f"{job.mesh.size} × {kind}, {np.dtype(job.model.dtype).name}, attention "
        f"{job.model.attention}, {len(job.shards.train)} training shards, {job.streams} streams"
    )
    say(f"everything is kept in {job.folder}")


def _report_non_finite(job: Job, error: NonFiniteError) -> int:
    """Writes down which batch it was; returns the exit code."""
    path = job.folder / NON_FINITE_FILE
    record = {
        "step": error.step,
        "what": error.what,
        "loader": merge_over_processes(error.origin),
    }
    if is_main_process():
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(
            f"error: {error}; {path} describes the batch. Nothing was overwritten: --resume goes "
            "on from the last checkpoint, with a lower learning rate only as another --run",
            file=sys.stderr,
        )
    return 1


def _report_end(job: Job, outcome: Outcome) -> None:
    step, progress = int(outcome.state.step), outcome.progress
    best = f", best {progress.best_val_bpb:.6f} bits per byte" if progress.best_val_bpb else ""
    minutes = f"{progress.train_seconds / 60:.2f} min of training"
    memory = (job.mesh.local_devices[0].memory_stats() or {}).get("peak_bytes_in_use")
    say(f"{step} steps, {step * job.plan.total_batch_size:,} tokens, {minutes}{best}")
    if memory:
        say(f"peak memory {memory / 2**30:.2f} GiB a device")
    if step == job.plan.num_iterations:
        say(f"finished; try it: python scripts/generate.py --run {job.config.run}")
    elif outcome.stopped_by:
        say(
            f"stopped by {outcome.stopped_by} after step {step} of {job.plan.num_iterations}; "
            f"saved. Continue with: python scripts/pretrain.py --config {job.folder / CONFIG_FILE} "
            "--resume"
        )
