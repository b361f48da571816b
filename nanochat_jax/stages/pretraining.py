"""Pretraining: a configuration becomes a run, from the dial to the last checkpoint.

scripts/pretrain.py is the command line of `pretrain`. `decide` and `build` make exactly the model,
optimizer and step that it trains, for whatever wants to look at them without training.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from nanochat_jax import scaling
from nanochat_jax.attention import attention_kernel
from nanochat_jax.checkpoint import model_meta
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.data.shards import Shards, list_shards
from nanochat_jax.data.text import train_loader
from nanochat_jax.distributed import say
from nanochat_jax.evals.generation import PROMPTS
from nanochat_jax.gpt import GPT, compute_dtype
from nanochat_jax.optim import OptimConfig, lr_multiplier, make_optimizer
from nanochat_jax.runs import run_folder
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stages.settings import PretrainConfig
from nanochat_jax.stages.stage import (
    Evaluate,
    Stage,
    digest,
    loop_config,
    make_evaluate,
    make_sample,
    run_stage,
    streams_for,
    tokenizer_identity,
    validation_rows,
)
from nanochat_jax.tokenizer import Tokenizer, tokenizer_folder
from nanochat_jax.train import init_state, make_train_step, put_batch

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
        return {
            **model_meta(self.plan.config),
            "optimizer": asdict(self.optim_config),
            "batch": {"tokens": self.plan.total_batch_size, "streams": self.streams},
            "data": {
                "training shards": len(self.shards.train),
                "validation shard": self.shards.val[0].name,
                "names and sizes": digest([[path.name, path.stat().st_size] for path in files]),
            },
            "tokenizer": tokenizer_identity(self.tokenizer),
            "seed": self.config.seed,
            "dtype": np.dtype(self.model.dtype).name,
        }


def prepare(config: PretrainConfig) -> Job:
    """Reads and decides all that the run needs, and writes nothing; ValueErrors say what lacks."""
    tokenizer = Tokenizer.load(tokenizer_folder(config.tokenizer))
    shards = list_shards(config.dataset)
    mesh = make_mesh(config.n_devices)
    plan = decide(config, tokenizer.vocab_size, mesh.size)
    model, optimizer, optim_config = build(config, plan)
    rows = plan.total_batch_size // plan.config.sequence_len
    streams = streams_for(rows, config.data_streams)
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
    return run_stage(_stage(prepare(config)))


def _stage(job: Job) -> Stage:
    config, plan, mesh = job.config, job.plan, job.mesh
    return Stage(
        name="pretrain",
        config=config,
        folder=job.folder,
        model=job.model,
        optimizer=job.optimizer,
        mesh=mesh,
        tokenizer=job.tokenizer,
        loop=loop_config(
            config,
            mesh,
            num_steps=plan.num_iterations,
            tokens_per_step=plan.total_batch_size,
            lr_multiplier=partial(lr_multiplier, job.optim_config),
            flops_per_token=plan.flops_per_token,
        ),
        identity=job.identity(),
        plan=plan_record(plan),
        announce=partial(print_plan, job),
        fresh_state=lambda: init_state(job.model, job.optimizer, mesh, jax.random.key(config.seed)),
        loader=partial(_loader, job),
        put=lambda rows: put_batch(rows, accumulation=plan.grad_accum_steps, mesh=mesh),
        train_step=lambda: make_train_step(
            job.model, job.optimizer, mesh, grad_clip=job.optim_config.grad_clip
        ),
        evaluate=partial(_evaluate, job),
        sample=lambda: make_sample(
            job.model, mesh, job.tokenizer, PROMPTS, config.sample_tokens, config.seed
        ),
        try_it=f"python scripts/generate.py --run {quote(config.run)}",
    )


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


def _evaluate(job: Job, stopped: Callable[[], bool]) -> Evaluate:
    rows = partial(
        validation_rows,
        job.shards,
        job.tokenizer,
        rows=job.config.device_batch_size * job.mesh.size,
        sequence_len=job.plan.config.sequence_len,
        n_tokens=job.config.eval_tokens,
    )
    return make_evaluate(job.model, job.mesh, job.tokenizer.token_bytes(), rows, stopped)


# --- what the run says of itself ------------------------------------------------------------------


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
