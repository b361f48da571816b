"""Mid-training and supervised fine-tuning: from a run, a run that answers.

scripts/midtrain.py and scripts/sft.py are the command lines of `finetune`; mixtures.py reads their
tasks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.checkpoint import load_tokenizer, naming_a_whole_one, open_checkpoints
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
from nanochat_jax.data.loader import RowLoader, choose_streams
from nanochat_jax.distributed import say
from nanochat_jax.evals.generation import QUESTIONS
from nanochat_jax.gpt import make_model
from nanochat_jax.optim import OptimConfig, restart_schedules
from nanochat_jax.runs import read_metrics
from nanochat_jax.scaling import count_flops_per_token, grad_accumulation
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.stages.loop import run
from nanochat_jax.stages.mixtures import (
    choose_tasks,
    describe_pass,
    mixture,
    validation_batches,
)
from nanochat_jax.stages.settings import FinetuneConfig
from nanochat_jax.stages.stage import Source, Stage, TrainStep, find_source
from nanochat_jax.tasks.mixture import Mixture
from nanochat_jax.train import (
    Batch,
    Metrics,
    TrainState,
    abstract_logical_state,
    init_state,
    make_train_step,
    put_arrays,
)

type StageName = Literal["midtrain", "sft"]


@dataclass(frozen=True)
class StageDefaults:
    """What a stage does its own way; a flag of the same name overrides it."""

    packing: Packing
    lr_frac: float
    warmdown_ratio: float
    warm_start: bool
    rows: int | None = None  # of a step; None: as many tokens as the source's
    momentum_start: float = 0.85  # of Muon; it rises to MOMENTUM_PEAK


DEFAULTS: dict[tuple[StageName, str], StageDefaults] = {
    ("midtrain", "2025"): StageDefaults("stream", 1.0, 0.2, warm_start=False),
    ("midtrain", "2026"): StageDefaults("stream", 1.0, 0.2, warm_start=True),
    ("sft", "2025"): StageDefaults(
        "one-per-row", 0.02, 1.0, warm_start=False, rows=32, momentum_start=0.95
    ),
    ("sft", "2026"): StageDefaults("best-fit", 0.8, 0.5, warm_start=True),
}
SOURCES: dict[StageName, tuple[str, ...]] = {
    "midtrain": ("pretrain",),
    "sft": ("pretrain", "midtrain"),
}
SUFFIX: dict[StageName, str] = {"midtrain": "-mid", "sft": "-sft"}
MOMENTUM_WARMUP_STEPS = 300
MOMENTUM_PEAK = 0.95


# --- deciding -------------------------------------------------------------------------------------


def make_stage(name: StageName, config: FinetuneConfig) -> "FinetuneStage":
    """Reads and decides all that the run needs; ValueErrors say what is missing."""
    source = find_source(config.source, config.source_step, SOURCES[name])
    if source.meta["stage"] == "rl":
        raise ValueError(
            f"{source.folder} is of reinforcement learning, which has no batch to inherit; name "
            f"the run that it was made from, {source.meta['source']['run']}, with --source"
        )
    gpt_config, mesh = source.gpt_config, make_mesh(config.n_devices)
    config = with_defaults(name, config, source, mesh.size)
    # Not None any more, which the type checker cannot know.
    total_batch_size, device_batch_size, packing = cast(
        tuple[int, int, Packing],
        (config.total_batch_size, config.device_batch_size, config.packing),
    )
    length = gpt_config.sequence_len
    accumulation = grad_accumulation(total_batch_size, device_batch_size, length, mesh.size)
    rows = total_batch_size // length
    tokenizer = load_tokenizer(source.folder, source.meta)
    tasks = choose_tasks(name, gpt_config.recipe, config.tasks, config.val_tasks)
    rendering = render_tasks(_read_training(tasks.train), tokenizer, packing, length)
    found = estimate_epoch(rendering, tokenizer.bos_id)
    steps = config.num_iterations
    if steps is None:
        if config.epochs <= 0:
            raise ValueError(f"epochs must be positive, not {config.epochs}")
        steps = max(1, round(config.epochs * found.rows / rows))
    streams = choose_streams(jax.process_count(), rows, config.data_streams, found.conversations)
    model = make_model(gpt_config, config.dtype, config.attention)
    momentum_start = DEFAULTS[name, gpt_config.recipe].momentum_start
    optim_config = finetune_optimizer(source, config, steps, momentum_start)
    stage = FinetuneStage(
        name=name,
        config=replace(
            config,
            tasks=tasks.train,
            val_tasks=tasks.val,
            data_streams=streams,
            num_iterations=steps,
            dtype=cast(Any, np.dtype(model.dtype).name),
        ),
        model=model,
        tokenizer=tokenizer,
        mesh=mesh,
        optim_config=optim_config,
        num_steps=steps,
        tokens_per_step=total_batch_size,
        flops_per_token=count_flops_per_token(gpt_config),
        source=source,
        rendering=rendering,
        found=found,
        rows=rows,
        streams=streams,
        grad_accum_steps=accumulation,
    )
    return (
        stage
        if stage.can_be_measured()
        else replace(stage, config=replace(stage.config, eval_every=0))
    )


def _read_training(tasks: str) -> Mixture:
    conversations = mixture(tasks, "train")
    for note in conversations.notes:
        say(note)
    return conversations


def with_defaults(
    name: StageName, config: FinetuneConfig, source: Source, n_devices: int
) -> FinetuneConfig:
    """The settings with those of the source and the recipe where none was given, batch included."""
    then, length = source.meta["plan"], source.gpt_config.sequence_len
    defaults = DEFAULTS[name, source.gpt_config.recipe]
    total = defaults.rows * length if defaults.rows else then["total_batch_size"]
    total = total if config.total_batch_size is None else config.total_batch_size
    values = {
        "run": Path(source.name).name.removesuffix(SUFFIX["midtrain"]) + SUFFIX[name],
        "source": source.name,
        "source_step": str(source.step),
        "total_batch_size": total,
        "device_batch_size": min(then["device_batch_size"], max(1, total // (length * n_devices))),
        **{n: getattr(defaults, n) for n in ("packing", "lr_frac", "warmdown_ratio", "warm_start")},
    }
    given = ("source", "source_step")  # their short forms become the checkpoint that was found
    missing = {n: v for n, v in values.items() if n in given or getattr(config, n) in (None, "")}
    return replace(config, **missing)


def finetune_optimizer(
    source: Source, config: FinetuneConfig, num_iterations: int, momentum_start: float
) -> OptimConfig:
    """The source's optimizer with another schedule; in 2026 its rates follow the batch."""
    then = source.optim_config
    growth = (config.total_batch_size / source.meta["plan"]["total_batch_size"]) ** 0.5
    own = {f.name for f in fields(OptimConfig)} & {f.name for f in fields(config)}
    asked = {name: getattr(config, name) for name in own if getattr(config, name) is not None}
    fixed = {
        "num_iterations": num_iterations,
        "momentum_start": momentum_start,
        "momentum_peak": MOMENTUM_PEAK,
        "momentum_final": MOMENTUM_PEAK,
        "momentum_warmup_steps": MOMENTUM_WARMUP_STEPS,
        "batch_lr_scale": then.batch_lr_scale * (growth if then.recipe == "2026" else 1.0),
    }
    return replace(then, **(asked | fixed))


def finetune(name: StageName, config: FinetuneConfig) -> int:
    """Trains, or resumes; returns the exit code."""
    return run(make_stage(name, config))


# --- the stage ------------------------------------------------------------------------------------


class CountedBatch(NamedTuple):
    batch: Batch
    counts_C: jax.Array  # COUNTS of the whole step


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuneStage(Stage):
    prompts = QUESTIONS
    chat = True

    config: FinetuneConfig
    source: Source
    tokens_per_step: int
    rendering: RenderedDataset
    found: PackingStats
    rows: int  # of a step, over all devices and micro-batches
    streams: int
    grad_accum_steps: int

    def fingerprint(self) -> dict[str, Any]:
        return {
            **super().fingerprint(),
            "warm_start": self.config.warm_start,
            "batch": {"tokens": self.tokens_per_step, "streams": self.streams},
            "data": {
                "tasks": self.config.tasks,
                "validation tasks": self.config.val_tasks,
                "packing": self.rendering.packing,
                "conversations": self.found.conversations,
                "first rows": self.found.digest,
            },
        }

    def plan_record(self) -> dict[str, Any]:
        tokens = self.tokens_per_step * self.num_steps
        return {
            "num_iterations": self.num_steps,
            "total_batch_size": self.tokens_per_step,
            "device_batch_size": self.config.device_batch_size,
            "grad_accum_steps": self.grad_accum_steps,
            "n_devices": self.mesh.size,
            "total_tokens": tokens,
            "flops_per_token": self.flops_per_token,
            "total_flops": self.flops_per_token * tokens,
            "conversations": self.found.conversations,
            "rows_per_pass": self.found.rows,
            "padding_share": self.found.padding_share,
        }

    def announce(self) -> None:
        optim, config = self.optim_config, self.config
        say(f"from {self.source.folder}, step {self.source.step}")
        say(f"tasks {self.config.tasks}; measured on {self.config.val_tasks}")
        say(describe_pass(self.found, self.rendering.packing))
        say(
            f"{self.num_steps:,} steps of {self.rows} rows of {self.model.config.sequence_len} "
            f"tokens ({self.grad_accum_steps} × {config.device_batch_size} rows × "
            f"{self.mesh.size} devices)"
        )
        moments = "its optimizer's moments kept" if config.warm_start else "new optimizer moments"
        say(
            f"learning rates × {optim.lr_frac:g} of the base run's, falling to "
            f"{optim.final_lr_frac:g} over the last {100 * optim.warmdown_ratio:.0f} %, {moments}"
        )
        self.say_devices(f", {self.streams} streams")

    def try_it(self) -> str:
        return f'python scripts/chat.py --run {quote(self.config.run)} -p "What is 12 * 7?"'

    def initial_state(self) -> TrainState:
        """Step 0: the source's parameters, with its optimizer's moments or without any."""
        abstract = abstract_logical_state(self.model, self.optimizer, self.mesh)
        step = self.source.step
        with open_checkpoints(self.source.folder) as found, naming_a_whole_one(found, step):
            if not self.config.warm_start:
                fresh = init_state(self.model, self.optimizer, self.mesh, jax.random.key(0))
                params = found.restore_params(step, cast(Any, abstract.params))
                return replace(fresh, params=from_logical(params, self.mesh))
            saved = found.restore(step, abstract)
        begun = TrainState(0 * saved.step, saved.params, restart_schedules(saved.opt_state))
        return from_logical(begun, self.mesh)

    def loader(self, state: dict[str, Any] | None) -> RowLoader:
        return conversation_loader(
            self.rendering,
            self.tokenizer.bos_id,
            rows=self.rows,
            streams=self.streams,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            state=state,
        )

    def put(self, rows: PackedRows) -> CountedBatch:
        inputs, targets, counts_ABC = put_arrays(rows, self.grad_accum_steps, self.mesh)
        return CountedBatch(Batch(inputs, targets), sum_counts(counts_ABC))

    def train_step(self) -> TrainStep:
        grad_clip = self.optim_config.grad_clip
        step = make_train_step(self.model, self.optimizer, self.mesh, grad_clip=grad_clip)

        def counted_step(state: TrainState, counted: CountedBatch) -> tuple[TrainState, Metrics]:
            state, metrics = step(state, counted.batch)
            counts = dict(zip(COUNTS, counted.counts_C, strict=True))
            padding_share = counts.pop("padding") / self.tokens_per_step
            return state, {**metrics, "padding_share": padding_share, **counts}

        return counted_step

    @cached_property
    def validation(self) -> RenderedDataset:
        """Read once: a run is measured on the same conversations whatever becomes of their file."""
        return render_tasks(
            mixture(self.config.val_tasks, "test"),
            self.tokenizer,
            self.rendering.packing,
            self.model.config.sequence_len,
        )

    def can_be_measured(self) -> bool:
        """Whether validation has something to learn; says so where it is wanted and has not."""
        if not self.config.eval_every or self.validation.has_usable():
            return True
        say(
            f"warning: none of the {len(self.validation):,} conversations kept for validation "
            f"fits a row of {self.model.config.sequence_len} tokens, so the run is not measured; "
            "name others with --val-tasks"
        )
        return False

    def validation_rows(self) -> Iterator[PackedRows]:
        source = self.validation
        rows = self.rows // self.grad_accum_steps  # of a micro-batch, over all devices
        n_tokens = self.config.eval_tokens
        return validation_batches(source, self.tokenizer.bos_id, rows=rows, n_tokens=n_tokens)

    def put_validation(self, rows: PackedRows, accumulation: int, mesh: Mesh) -> Batch:
        return Batch(*put_arrays((rows.inputs_RT, rows.targets_RT), accumulation, mesh))

    def totals(self) -> dict[str, int | float]:
        """What all steps together have learned from, and left out."""
        steps = [record for record in read_metrics(self.folder) if record["kind"] == "train"]

        def total(name: str) -> int:
            return int(sum(record[name] for record in steps))

        return {
            "supervised_tokens": total("supervised_tokens"),
            "padding_share": round(sum(r["padding_share"] for r in steps) / max(len(steps), 1), 4),
            "dropped_conversations": total("dropped"),
            "cut_conversations": total("cut"),
            "skipped_rows": total("skipped"),
        }


@jax.jit
def sum_counts(counts_ABC: jax.Array) -> jax.Array:
    return jnp.sum(counts_ABC, (0, 1))
