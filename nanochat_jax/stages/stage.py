"""A stage of training from its first check to its last checkpoint: what all stages share.

pretraining.py, finetuning.py and rl.py decide what is trained, on what; `run_stage` does the
rest: checks the run's folder, restores, trains, saves, and says how it ended. scripts/<name>.py is
the command line of a stage.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from math import gcd, lcm
from pathlib import Path
from shlex import quote
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Checkpoints, choose_step, model_meta, open_checkpoints
from nanochat_jax.data.loader import Layout, merge_states
from nanochat_jax.data.shards import Shards
from nanochat_jax.data.text import val_batches
from nanochat_jax.devices import peak_flops
from nanochat_jax.distributed import gather_json, is_main_process, provenance, say, wait_for_all
from nanochat_jax.engine.engine import Engine
from nanochat_jax.evals.bits_per_byte import evaluate
from nanochat_jax.evals.generation import SAMPLING, complete, completion_engine
from nanochat_jax.gpt import GPT, GPTConfig, Params
from nanochat_jax.runs import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    Meter,
    Tracker,
    alone,
    check_free,
    check_same,
    cut_metrics,
    default_run,
    describe,
    make_ready,
    record,
    run_folder,
)
from nanochat_jax.stages.loop import (
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
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import (
    Batch,
    Metrics,
    TrainState,
    abstract_logical_state,
    make_eval_step,
    make_gather,
    make_state_to_logical,
    put_batch,
    state_from_logical,
)

STREAMS = 8  # logical data streams, where the rows of a step allow it
NON_FINITE_FILE = "nonfinite.json"


class Loader(Protocol):
    """What a stage's batches are made from; used in a `with`."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


type Evaluate = Callable[[Params], dict[str, float] | None]
type Sample = Callable[[Params], list[tuple[str, str]]]


@dataclass(frozen=True)
class Stage:
    """A stage decided, and nothing of it begun: what costs time are functions."""

    name: str  # of the script, and in the meta of checkpoints
    config: Any  # the stage's dataclass; has run, resume, overwrite, keep_last, wandb
    folder: Path
    model: GPT
    optimizer: optax.GradientTransformation
    mesh: Mesh
    tokenizer: Tokenizer
    loop: LoopConfig
    identity: dict[str, Any]  # all that decides the numbers; equal before and after a resume
    plan: dict[str, Any]  # the first record of metrics.jsonl
    announce: Callable[[], None]  # says what will be done
    fresh_state: Callable[[], TrainState]
    loader: Callable[[dict[str, Any] | None], Loader]  # from its saved state
    put: Callable[[Any], Any]  # rows of the loader -> a batch on the mesh
    train_step: Callable[[], Callable[[TrainState, Any], tuple[TrainState, Metrics]]]
    evaluate: Callable[[Callable[[], bool]], Evaluate]  # given whether the run is asked to stop
    sample: Callable[[], Sample]
    try_it: str  # the command to try the finished model with
    meta: dict[str, Any] | None = None  # more to say in checkpoints
    facts: Callable[[], dict[str, int | float]] = dict  # more to say at the end


def run_stage(stage: Stage) -> int:
    """Trains, or goes on training; returns the exit code."""
    check_free(stage.folder, stage.config.resume, stage.config.overwrite)
    wait_for_all("checked")
    with alone(stage.folder) if is_main_process() else nullcontext():
        return _run(stage)


def _run(stage: Stage) -> int:
    if is_main_process():
        make_ready(stage.folder, stage.config.overwrite)
        stage.announce()
    meter = Meter(stage.folder, stage.name)
    wait_for_all("ready")
    with Checkpoints(stage.folder, stage.config.keep_last) as checkpoints:
        start = begin(stage, checkpoints)
        tracker = Tracker(
            stage.folder,
            name=stage.config.run,
            config=asdict(stage.config),
            wandb_mode=stage.config.wandb,
            write=is_main_process(),
        )
        try:
            with stop_on_signals() as stop, start.loader:
                outcome = _train(stage, start, checkpoints, tracker, stop)
                checkpoints.wait()  # while signals are still caught
        except NonFiniteError as error:
            return _report_non_finite(stage, error)
        finally:
            tracker.close()
    _report_end(stage, outcome, meter)
    return 0


@dataclass(frozen=True)
class Start:
    """Where training begins: at step 0, or where a checkpoint left off."""

    state: TrainState
    progress: Progress
    loader: Loader


def begin(stage: Stage, checkpoints: Checkpoints) -> Start:
    """A fresh state, or the last checkpoint's when resuming. Resuming in this order:

    1. the identity is compared before anything is touched; 2. the arrays; 3. the data pipeline;
    4. the records beyond the checkpoint are cut off; 5. configuration and tokenizer are written.
    """
    step = checkpoints.latest()
    meta = checkpoints.meta(step) if step is not None else {}
    loader_state = checkpoints.loader_state(step) if step is not None else None
    if step is None:
        state, progress = stage.fresh_state(), Progress()
    else:
        check_same(stage.folder, meta["identity"], stage.identity)
        abstract = abstract_logical_state(stage.model, stage.optimizer, stage.mesh)
        state = state_from_logical(stage.mesh, checkpoints.restore(step, abstract))
        progress = Progress(**{**meta["progress"], "done": tuple(meta["progress"]["done"])})
    loader = stage.loader(loader_state)
    if is_main_process():
        cut_metrics(stage.folder, partial(_is_before, step, progress.done))
        describe(
            stage.folder, replace(stage.config, resume=False, overwrite=False), stage.tokenizer
        )
    if stage.config.resume:
        say(f"resuming at step {step}" if step else "nothing to resume yet: starting at step 0")
    return Start(state, progress, loader)


def _is_before(step: int | None, done: tuple[str, ...], record: dict[str, Any]) -> bool:
    if step is None:
        return False
    return record["step"] < step or (record["step"] == step and record["kind"] in done)


def _train(
    stage: Stage, start: Start, checkpoints: Checkpoints, tracker: Tracker, stop: StopRequest
) -> Outcome:
    if int(start.state.step) == 0:
        tracker.log("plan", 0, **stage.plan)
    actions = Actions(
        evaluate=stage.evaluate(lambda: stop.signal is not None),
        sample=stage.sample(),
        save=make_save(
            stage.model,
            stage.optimizer,
            stage.mesh,
            checkpoints,
            start.loader.get_state,
            partial(describe_checkpoint, stage, provenance()),
        ),
    )
    feed = Feed(start.loader, stage.put)
    return run_training(
        stage.loop, start.state, stage.train_step(), feed, actions, tracker, start.progress, stop
    )


# --- what stages decide alike ---------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The checkpoint whose model is trained further."""

    name: str
    folder: Path
    step: int
    meta: dict[str, Any]

    @property
    def gpt_config(self) -> GPTConfig:
        return GPTConfig(**self.meta["model"])


def find_source(name: str, step: str, stages: Sequence[str]) -> Source:
    """The checkpoint asked for; of no name, that of the newest run of one of the `stages`."""
    name = name or default_run(stages)
    folder = run_folder(name)
    with open_checkpoints(folder) as checkpoints:
        chosen = choose_step(checkpoints, step)
        return Source(name, folder, chosen, checkpoints.meta(chosen))


def tokenizer_of(source: Source) -> Tokenizer:
    """ValueError where it is not the one that the source was trained with."""
    tokenizer = Tokenizer.load(source.folder / TOKENIZER_FOLDER)
    found = tokenizer_identity(tokenizer)
    if source.meta["identity"].get("tokenizer", found) != found:
        raise ValueError(
            f"{source.folder / TOKENIZER_FOLDER} is not the tokenizer that {source.name} was "
            "trained with; put that one back"
        )
    return tokenizer


def streams_for(rows: int, asked: int | None) -> int:
    """Logical data streams for a step of so many rows; ValueError where processes cannot share."""
    streams = asked or gcd(lcm(STREAMS, jax.process_count()), rows)
    layout = Layout(rows, sequence_len=1, streams=streams, buffer_docs=0)
    layout.owned_streams(jax.process_index(), jax.process_count())
    return streams


def loop_config(config: Any, mesh: Mesh, **how: Any) -> LoopConfig:
    """The intervals of a stage's configuration, the speed of its devices, and `how` it goes."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return LoopConfig(
        eval_every=config.eval_every,
        sample_every=config.sample_every,
        save_every=config.save_every,
        peak_flops=peak * mesh.size if peak else None,
        **how,
    )


def digest(value: Any) -> str:
    """A short name for JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What of a tokenizer decides the numbers of a run."""
    ranks = b"".join(len(token).to_bytes(4) + token for token in tokenizer.ranks)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokens": hashlib.sha256(ranks).hexdigest()[:16],
        "pattern": digest(tokenizer.pattern),
    }


# --- what a stage says and saves of itself --------------------------------------------------------


def describe_checkpoint(
    stage: Stage, made_by: dict[str, Any], step: int, progress: Progress
) -> dict[str, Any]:
    """The meta of a checkpoint: all of a run that is neither an array nor the data's state."""
    return {
        "format": 1,
        "stage": stage.name,
        "step": step,
        **model_meta(stage.model.config),
        "val_bpb": progress.val_bpb if "val" in progress.done else None,
        "progress": asdict(progress),
        "identity": stage.identity,
        "config": asdict(stage.config),
        "plan": stage.plan,
        "provenance": made_by,
        **(stage.meta or {}),
    }


def _report_non_finite(stage: Stage, error: NonFiniteError) -> int:
    """Writes down which batch it was; returns the exit code."""
    path = stage.folder / NON_FINITE_FILE
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


def _report_end(stage: Stage, outcome: Outcome, meter: Meter) -> None:
    step, progress, planned = int(outcome.state.step), outcome.progress, stage.loop.num_steps
    best = f", best {progress.best_val_bpb:.6f} bits per byte" if progress.best_val_bpb else ""
    minutes = f"{progress.train_seconds / 60:.2f} min of training"
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    per_step = stage.loop.tokens_per_step
    tokens = f", {step * per_step:,} tokens" if per_step else ""
    say(f"{step} steps{tokens}, {minutes}{best}")
    if memory:
        say(f"peak memory {memory / 2**30:.2f} GiB a device")
    if is_main_process():
        facts = stage.facts()
        told = {"steps": step, "best_bpb": progress.best_val_bpb, **facts, **meter.read()}
        record(stage.folder, stage.name, {n: v for n, v in told.items() if v is not None})
        if facts:
            say(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in facts.items()))
    if step == planned:
        say(f"finished; try it: {stage.try_it}")
    elif outcome.stopped_by:
        say(
            f"stopped by {outcome.stopped_by} after step {step} of {planned}; saved. Continue "
            f"with: python scripts/{stage.name}.py "
            f"--config {quote(str(stage.folder / CONFIG_FILE))} --resume"
        )


# --- What a stage does besides training steps: measure, write samples, save. The loop ---

VAL_STREAMS = 8  # logical streams that validation text is divided into


def validation_rows(
    shards: Shards, tokenizer: Tokenizer, *, rows: int, sequence_len: int, n_tokens: int
) -> Iterator[np.ndarray]:
    """This process's validation rows, in batches of `rows` over all processes.

    Together `n_tokens`, rounded down to whole rounds of the streams: the same text on any number of
    devices, as long as nothing has to be rounded.
    """
    streams = lcm(VAL_STREAMS, jax.process_count())
    at_once = lcm(rows, streams)
    rounds = val_batches(
        shards,
        tokenizer,
        rows=at_once,
        sequence_len=sequence_len,
        n_batches=max(1, n_tokens // (at_once * sequence_len)),
        streams=streams,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return (part for whole in rounds for part in np.split(whole, at_once // rows))


def make_evaluate(
    model: GPT,
    mesh: Mesh,
    token_bytes: np.ndarray,
    rows: Callable[[], Iterable[Any]],
    stopped: Callable[[], bool] = lambda: False,
    put: Callable[[Any, int, Mesh], Batch] = put_batch,
) -> Callable[[Params], dict[str, float] | None]:
    """The function from a state's parameters to bits per byte over `rows()`; None when stopped.

    `rows` gives this process's rows of each batch, which `put` brings on the mesh; they must always
    be the same, and are read once. `stopped` is asked between batches; in a cluster it must always
    say no.
    """
    eval_step = make_eval_step(model, mesh)
    kept: list[Any] = []  # tokenising them again each time would cost more than the model

    def run(params: Params) -> dict[str, float] | None:
        if not kept:
            kept.extend(takewhile(lambda _: not stopped(), rows()))
        batches = (put(part, 1, mesh) for part in kept if not stopped())
        result = evaluate(eval_step, params, batches, token_bytes)
        if stopped():
            kept.clear()  # they may not be all
            return None
        return result

    return run


def make_sample(
    model: GPT,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n_tokens: int,
    seed: int,
    *,
    chat: bool = False,
) -> Callable[[Params], list[tuple[str, str]]]:
    """The function from a state's parameters to (prompt, completion) pairs; [] but on process 0.

    With `chat` the prompts are questions, and the completions the assistant's answers.
    """
    gather = make_gather(model, mesh)
    engines: list[Engine] = []  # made once: its programs are compiled once

    def run(params: Params) -> list[tuple[str, str]]:
        whole = gather(params)
        if not is_main_process():
            return []
        one_device = {name: array.addressable_data(0) for name, array in whole.items()}
        if engines:
            engines[0].load_weights(one_device)
        else:
            engines.append(
                completion_engine(model, one_device, tokenizer, prompts, n_tokens, chat=chat)
            )
        engine = engines[0]
        sampling = replace(SAMPLING, seed=seed)
        texts = complete(
            engine, tokenizer, prompts, max_new_tokens=n_tokens, sampling=sampling, chat=chat
        )
        engine.free()  # its memory is the training's
        return list(zip(prompts, texts, strict=True))

    return run


def make_save(
    model: GPT,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    loader_state: Callable[[], dict[str, Any]],
    describe: Callable[[int, Progress], dict[str, Any]],
) -> Callable[[TrainState, Progress], None]:
    """The function that begins to save a state, with what `describe(step, progress)` says of it.

    Parameters that are not finite are never saved: NonFiniteError.
    """
    to_logical = make_state_to_logical(model, optimizer, mesh)
    all_finite = jax.jit(lambda params: jnp.all(jnp.stack([jnp.isfinite(p).all() for p in params])))

    def run(state: TrainState, progress: Progress) -> None:
        step = int(state.step)
        if not all_finite(list(state.params.values())):
            raise NonFiniteError(step, "a parameter is not finite", loader_state())
        checkpoints.save(
            to_logical(state), describe(step, progress), merge_over_processes(loader_state())
        )

    return run


def merge_over_processes(loader_state: dict[str, Any]) -> dict[str, Any]:
    """The data states of all processes as one; every process must call it."""
    return merge_states(gather_json(loader_state))
