"""What mid-training and fine-tuning decide before they begin: source, tasks, batch, schedule.

Learning rates, batch and row length are those of the source run; what changes is in FORMS. Stage by
stage:

    2025: pretrain → midtrain → sft      2026: pretrain → sft
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import model_meta
from nanochat_jax.config import FinetuneConfig
from nanochat_jax.data.conversations import (
    Packing,
    Pass,
    Rendering,
    look_ahead,
    render_tasks,
)
from nanochat_jax.finetuning_data import (
    TaskNames,
    choose_tasks,
    mixture,
    streams_of,
)
from nanochat_jax.gpt import GPT
from nanochat_jax.optim import OptimConfig, make_optimizer
from nanochat_jax.runtime import attention_kernel, compute_dtype
from nanochat_jax.scaling import grad_accumulation
from nanochat_jax.sharding import make_mesh
from nanochat_jax.stage import Source, find_source, streams_for, tokenizer_identity, tokenizer_of
from nanochat_jax.tokenizer import Tokenizer

type StageName = Literal["midtrain", "sft"]


@dataclass(frozen=True)
class Form:
    """What a stage does its own way; a flag of the same name overrides it."""

    packing: Packing
    lr_frac: float
    warmdown_ratio: float
    warm_start: bool
    rows: int | None = None  # of a step; None: as many tokens as the source's
    momentum_start: float = 0.85  # of Muon; it rises to MOMENTUM_PEAK


FORMS: dict[tuple[StageName, str], Form] = {
    ("midtrain", "2025"): Form("stream", 1.0, 0.2, warm_start=False),
    ("midtrain", "2026"): Form("stream", 1.0, 0.2, warm_start=True),
    ("sft", "2025"): Form("one-per-row", 0.02, 1.0, warm_start=False, rows=32, momentum_start=0.95),
    ("sft", "2026"): Form("best-fit", 0.8, 0.5, warm_start=True),
}
SOURCES: dict[StageName, tuple[str, ...]] = {
    "midtrain": ("pretrain",),
    "sft": ("pretrain", "midtrain"),
}
SUFFIX: dict[StageName, str] = {"midtrain": "-mid", "sft": "-sft"}
MOMENTUM_WARMUP_STEPS = 300
MOMENTUM_PEAK = 0.95


# --- the run that it goes on from -----------------------------------------------------------------


def inherit(
    source: Source, config: FinetuneConfig, form: Form, num_iterations: int, batch: int
) -> OptimConfig:
    """The source's optimizer with another schedule; in 2026 its rates follow the batch."""
    then = OptimConfig(**source.meta["identity"]["optimizer"])
    growth = (batch / source.meta["plan"]["total_batch_size"]) ** 0.5
    rates = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "grad_clip")
    asked = {name: getattr(config, name) for name in rates if getattr(config, name) is not None}
    return replace(
        then,
        num_iterations=num_iterations,
        lr_frac=_or(config.lr_frac, form.lr_frac),
        warmup_steps=config.warmup_steps,
        warmdown_ratio=_or(config.warmdown_ratio, form.warmdown_ratio),
        final_lr_frac=config.final_lr_frac,
        weight_decay=config.weight_decay,
        momentum_start=form.momentum_start,
        momentum_peak=MOMENTUM_PEAK,
        momentum_final=MOMENTUM_PEAK,
        momentum_warmup_steps=MOMENTUM_WARMUP_STEPS,
        batch_lr_scale=then.batch_lr_scale * (growth if then.recipe == "2026" else 1.0),
        **asked,
    )


def _or(asked: Any, otherwise: Any) -> Any:
    return otherwise if asked is None else asked


# --- deciding -------------------------------------------------------------------------------------


class Batching(NamedTuple):
    """How a step is divided."""

    total_batch_size: int  # tokens over all devices, padding included
    device_batch_size: int  # rows that a device computes at once
    grad_accum_steps: int


@dataclass(frozen=True)
class Job:
    """Everything of a run that does not change while it goes on."""

    stage: StageName
    config: FinetuneConfig
    source: Source
    model: GPT
    optimizer: optax.GradientTransformation
    optim_config: OptimConfig
    mesh: Mesh
    tokenizer: Tokenizer
    tasks: TaskNames
    rendering: Rendering
    found: Pass
    batching: Batching
    streams: int

    @property
    def sequence_len(self) -> int:
        return self.model.config.sequence_len

    @property
    def rows(self) -> int:
        """Rows of a step, over all devices and micro-batches."""
        return self.batching.total_batch_size // self.sequence_len

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers of the run; equal before and after a resume."""
        return {
            **model_meta(self.model.config),
            "source": {"run": self.source.name, "step": self.source.step},
            "warm_start": self.config.warm_start,
            "optimizer": asdict(self.optim_config),
            "batch": {"tokens": self.batching.total_batch_size, "streams": self.streams},
            "data": {
                "tasks": self.tasks.train,
                "validation tasks": self.tasks.val,
                "packing": self.rendering.packing,
                "conversations": self.found.conversations,
                "first rows": self.found.digest,
            },
            "tokenizer": tokenizer_identity(self.tokenizer),
            "seed": self.config.seed,
            "dtype": np.dtype(self.model.dtype).name,
        }


def prepare(stage: StageName, config: FinetuneConfig) -> Job:
    """Reads and decides all that the run needs, and writes nothing; ValueErrors say what lacks."""
    source = find_source(config.source, config.source_step, SOURCES[stage])
    if source.meta["stage"] == "rl":
        raise ValueError(
            f"{source.folder} is of reinforcement learning, which has no batch to inherit; name "
            f"the run that it was made from, {source.meta['source']['run']}, with --source"
        )
    gpt_config = source.gpt_config
    form = FORMS[stage, gpt_config.recipe]
    mesh = make_mesh(config.n_devices)
    batching = _batching(source, config, form, mesh.size)
    rows = batching.total_batch_size // gpt_config.sequence_len
    tokenizer = tokenizer_of(source)
    tasks = choose_tasks(stage, gpt_config.recipe, config.tasks, config.val_tasks)
    packing = config.packing or form.packing
    rendering = render_tasks(
        mixture(tasks.train, "train"), tokenizer, packing, gpt_config.sequence_len
    )
    found = look_ahead(rendering, tokenizer.bos_id)
    steps = _num_iterations(config, found, rows)
    streams = streams_for(rows, config.data_streams or streams_of(found.conversations, rows))
    dtype = compute_dtype(config.dtype)
    kernel = attention_kernel(config.attention, dtype, gpt_config.sequence_len, gpt_config.head_dim)
    optim_config = inherit(source, config, form, steps, batching.total_batch_size)
    decided = replace(
        config,
        run=config.run or Path(source.name).name.removesuffix(SUFFIX["midtrain"]) + SUFFIX[stage],
        source=source.name,
        source_step=str(source.step),
        warm_start=_or(config.warm_start, form.warm_start),
        tasks=tasks.train,
        val_tasks=tasks.val,
        packing=packing,
        data_streams=streams,
        num_iterations=steps,
        device_batch_size=batching.device_batch_size,
        total_batch_size=batching.total_batch_size,
        dtype=cast(Any, np.dtype(dtype).name),
    )
    return Job(
        stage=stage,
        config=decided,
        source=source,
        model=GPT(gpt_config, dtype, kernel),
        optimizer=make_optimizer(gpt_config, optim_config, dtype),
        optim_config=optim_config,
        mesh=mesh,
        tokenizer=tokenizer,
        tasks=tasks,
        rendering=rendering,
        found=found,
        batching=batching,
        streams=streams,
    )


def _batching(source: Source, config: FinetuneConfig, form: Form, n_devices: int) -> Batching:
    """The source's batch, or what was asked for; ValueError where it does not divide."""
    length, then = source.gpt_config.sequence_len, source.meta["plan"]
    of_form = form.rows * length if form.rows else then["total_batch_size"]
    total = _or(config.total_batch_size, of_form)
    at_once = _or(config.device_batch_size, then["device_batch_size"])
    if config.device_batch_size is None:
        at_once = min(at_once, max(1, total // (length * n_devices)))
    accumulation = grad_accumulation(total, at_once, length, n_devices)
    return Batching(total, at_once, accumulation)


def _num_iterations(config: FinetuneConfig, found: Pass, rows: int) -> int:
    if config.num_iterations is not None:
        return config.num_iterations
    if config.epochs <= 0:
        raise ValueError(f"epochs must be positive, not {config.epochs}")
    return max(1, round(config.epochs * found.rows / rows))
