"""Mid-training and supervised fine-tuning: from a run, a run that answers.

scripts/midtrain.py and scripts/sft.py are the command lines of `finetune`; finetuning_plan.py
decides what they train, on what.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.actions import make_evaluate, make_sample
from nanochat_jax.checkpoint import open_checkpoints
from nanochat_jax.config import FinetuneConfig
from nanochat_jax.data.conversations import (
    COUNTS,
    Rows,
    conversation_loader,
    render_tasks,
)
from nanochat_jax.data.loader import RowLoader
from nanochat_jax.evals.samples import QUESTIONS
from nanochat_jax.finetuning_data import (
    describe_pass,
    mixture,
    put_validation,
    validation_batches,
)
from nanochat_jax.finetuning_plan import Job, StageName, prepare
from nanochat_jax.optim import lr_multiplier, restart_schedules
from nanochat_jax.runs import run_folder
from nanochat_jax.runtime import say
from nanochat_jax.scaling import count_flops_per_token
from nanochat_jax.sharding import from_logical
from nanochat_jax.stage import (
    Evaluate,
    Stage,
    loop_config,
    run_stage,
)
from nanochat_jax.tracking import read_metrics
from nanochat_jax.train import (
    Batch,
    Metrics,
    TrainState,
    abstract_logical_state,
    init_state,
    make_train_step,
    put_arrays,
)


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


def _put(accumulation: int, mesh: Mesh, rows: Rows) -> _Counted:
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
    def rows() -> Iterator[Rows]:
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
