"""Mid-training and supervised fine-tuning: from a run, a run that answers.

scripts/midtrain.py and scripts/sft.py are the command lines of `finetune`; finetuning.py
decides what they train, on what.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.attention import attention_kernel
from nanochat_jax.checkpoint import model_meta, open_checkpoints
from nanochat_jax.data.conversations import (
    COUNTS,
    PackedRows,
    Packing,
    PackingStats,
    RenderedDataset,
    conversation_loader,
    estimate_epoch,
    render_tasks,
)
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.distributed import say
from nanochat_jax.evals.generation import QUESTIONS
from nanochat_jax.gpt import GPT, compute_dtype
from nanochat_jax.optim import OptimConfig, lr_multiplier, make_optimizer, restart_schedules
from nanochat_jax.runs import read_metrics, run_folder
from nanochat_jax.scaling import count_flops_per_token, grad_accumulation
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.stages.mixtures import (
    TaskNames,
    choose_tasks,
    describe_pass,
    mixture,
    put_validation,
    streams_of,
    validation_batches,
)
from nanochat_jax.stages.settings import FinetuneConfig
from nanochat_jax.stages.stage import (
    Evaluate,
    Source,
    Stage,
    find_source,
    loop_config,
    make_evaluate,
    make_sample,
    run_stage,
    streams_for,
    tokenizer_identity,
    tokenizer_of,
)
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import (
    Batch,
    Metrics,
    TrainState,
    abstract_logical_state,
    init_state,
    make_train_step,
    put_arrays,
)

# --- What mid-training and fine-tuning decide before they begin: source, tasks, batch ---

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
    rendering: RenderedDataset
    found: PackingStats
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
    found = estimate_epoch(rendering, tokenizer.bos_id)
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


def _num_iterations(config: FinetuneConfig, found: PackingStats, rows: int) -> int:
    if config.num_iterations is not None:
        return config.num_iterations
    if config.epochs <= 0:
        raise ValueError(f"epochs must be positive, not {config.epochs}")
    return max(1, round(config.epochs * found.rows / rows))


def finetune(stage: StageName, config: FinetuneConfig) -> int:
    """Trains, or goes on training; returns the exit code."""
    return run_stage(_stage(prepare(stage, config)))


def _stage(job: Job) -> Stage:
    config = job.config
    folder = run_folder(config.run)
    return Stage(
        name=job.stage,
        config=config,
        folder=folder,
        model=job.model,
        optimizer=job.optimizer,
        mesh=job.mesh,
        tokenizer=job.tokenizer,
        loop=loop_config(
            config,
            job.mesh,
            num_steps=job.optim_config.num_iterations,
            tokens_per_step=job.batching.total_batch_size,
            lr_multiplier=partial(lr_multiplier, job.optim_config),
            flops_per_token=count_flops_per_token(job.model.config),
        ),
        identity=job.identity(),
        plan=plan_record(job),
        announce=partial(_announce, job),
        fresh_state=partial(fresh_state, job),
        loader=partial(_loader, job),
        put=partial(_put, job.batching.grad_accum_steps, job.mesh),
        train_step=partial(_train_step, job),
        evaluate=partial(_evaluate, job),
        sample=lambda: make_sample(
            job.model, job.mesh, job.tokenizer, QUESTIONS, config.sample_tokens, config.seed,
            chat=True,
        ),
        try_it=f'python scripts/chat.py --run {quote(config.run)} -p "What is 12 * 7?"',
        meta={"source": {"run": job.source.name, "step": job.source.step}},
        facts=partial(_facts, folder),
    )  # fmt: skip


def fresh_state(job: Job) -> TrainState:
    """Step 0: the source's parameters, with its optimizer's moments or without any."""
    with open_checkpoints(job.source.folder) as checkpoints:
        abstract = abstract_logical_state(job.model, job.optimizer, job.mesh)
        if not job.config.warm_start:
            fresh = init_state(job.model, job.optimizer, job.mesh, jax.random.key(0))
            params = checkpoints.restore_params(job.source.step, cast(Any, abstract.params))
            return TrainState(fresh.step, from_logical(params, job.mesh), fresh.opt_state)
        saved = checkpoints.restore(job.source.step, abstract)
    begun = TrainState(0 * saved.step, saved.params, restart_schedules(saved.opt_state))
    return from_logical(begun, job.mesh)


def _loader(job: Job, state: dict[str, Any] | None) -> RowLoader:
    return conversation_loader(
        job.rendering,
        job.tokenizer.bos_id,
        rows=job.rows,
        streams=job.streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        state=state,
    )


class _Counted(NamedTuple):
    batch: Batch
    counts_C: jax.Array  # COUNTS of the whole step


def _put(accumulation: int, mesh: Mesh, rows: PackedRows) -> _Counted:
    inputs, targets, counts = put_arrays(rows, accumulation, mesh)
    return _Counted(Batch(inputs, targets), _total(counts))


@jax.jit
def _total(counts_ABC: jax.Array) -> jax.Array:
    return jnp.sum(counts_ABC, (0, 1))


def _train_step(job: Job) -> Callable[[TrainState, _Counted], tuple[TrainState, Metrics]]:
    step = make_train_step(job.model, job.optimizer, job.mesh, grad_clip=job.optim_config.grad_clip)

    def run(state: TrainState, fed: _Counted) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, fed.batch)
        counts = dict(zip(COUNTS, fed.counts_C, strict=True))
        padding_share = counts.pop("padding") / job.batching.total_batch_size
        return state, {**metrics, "padding_share": padding_share, **counts}

    return run


def _evaluate(job: Job, stopped: Callable[[], bool]) -> Evaluate:
    def rows() -> Iterator[PackedRows]:
        source = render_tasks(
            mixture(job.tasks.val, "test"), job.tokenizer, job.rendering.packing, job.sequence_len
        )
        at_once = job.batching.device_batch_size * job.mesh.size
        n_tokens = job.config.eval_tokens
        return validation_batches(source, job.tokenizer.bos_id, rows=at_once, n_tokens=n_tokens)

    return make_evaluate(
        job.model, job.mesh, job.tokenizer.token_bytes(), rows, stopped, put_validation
    )


# --- what the run says of itself ------------------------------------------------------------------


def plan_record(job: Job) -> dict[str, Any]:
    """The numbers of the run."""
    tokens = job.batching.total_batch_size * job.optim_config.num_iterations
    flops = count_flops_per_token(job.model.config)
    return {
        "num_iterations": job.optim_config.num_iterations,
        "total_batch_size": job.batching.total_batch_size,
        "device_batch_size": job.batching.device_batch_size,
        "grad_accum_steps": job.batching.grad_accum_steps,
        "n_devices": job.mesh.size,
        "total_tokens": tokens,
        "flops_per_token": flops,
        "total_flops": flops * tokens,
        "conversations": job.found.conversations,
        "rows_per_pass": job.found.rows,
        "padding_share": job.found.padding_share,
    }


def _announce(job: Job) -> None:
    optim, config = job.optim_config, job.config
    say(f"from {job.source.folder}, step {job.source.step}")
    say(f"tasks {job.tasks.train}; measured on {job.tasks.val}")
    say(describe_pass(job.found, job.rendering.packing))
    say(
        f"{optim.num_iterations:,} steps of {job.rows} rows of {job.sequence_len} tokens "
        f"({job.batching.grad_accum_steps} × {job.batching.device_batch_size} rows × "
        f"{job.mesh.size} devices)"
    )
    moments = "its optimizer's moments go on" if config.warm_start else "new optimizer moments"
    say(
        f"learning rates × {optim.lr_frac:g} of the base run's, falling to "
        f"{optim.final_lr_frac:g} over the last {100 * optim.warmdown_ratio:.0f} %, {moments}"
    )
    kind = job.mesh.devices.flat[0].device_kind
    say(
        f"{job.mesh.size} × {kind}, {np.dtype(job.model.dtype).name}, attention "
        f"{job.model.attention}, {job.streams} streams"
    )
    say(f"everything is kept in {run_folder(config.run)}")


def _facts(folder: Path) -> dict[str, int | float]:
    """What all steps together have learned from, and left out."""
    steps = [record for record in read_metrics(folder) if record["kind"] == "train"]

    def total(name: str) -> int:
        return int(sum(record[name] for record in steps))

    return {
        "supervised_tokens": total("supervised_tokens"),
        "padding_share": round(sum(r["padding_share"] for r in steps) / max(len(steps), 1), 4),
        "dropped_conversations": total("dropped"),
        "cut_conversations": total("cut"),
        "skipped_rows": total("skipped"),
    }
