"""What lasts beyond a session: how a run begins or resumes, what it saves, and a loss that is NaN.

Everything of a checkpoint but its format, which is checkpoint.py's.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from shlex import quote
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanochat_jax.checkpoint import Checkpoints, model_meta
from nanochat_jax.config import write_atomically
from nanochat_jax.data.loader import merge_states
from nanochat_jax.distributed import (
    cpu_cores,
    gather_json,
    is_main_process,
    provenance,
    say,
)
from nanochat_jax.runs import (
    CONFIG_FILE,
    DamagedError,
    check_fingerprint,
    cut_metrics,
    read_sound,
    write_run_files,
)
from nanochat_jax.scaling import RECIPES
from nanochat_jax.sharding import from_logical
from nanochat_jax.stages.stage import Loader, Stage
from nanochat_jax.train import TrainState, abstract_logical_state, make_state_to_logical

NON_FINITE_FILE = "nonfinite.json"
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")


@dataclass(frozen=True)
class LoopProgress:
    """What the host knows besides the state; saved with every checkpoint."""

    smoothed_loss: float = 0.0  # exponential average, biased towards 0
    train_seconds: float = 0.0  # without compiling, measuring, sampling and saving
    val_bpb: float | None = None
    best_val_bpb: float | None = None
    done: tuple[str, ...] = ()  # events of the present step that need no repetition


class NonFiniteError(Exception):
    """A loss, gradient or parameter is NaN or infinite; `loader_state` identifies the batch."""

    def __init__(self, step: int, what: str, loader_state: dict[str, Any]):
        super().__init__(f"{what} at step {step}")
        self.step, self.what, self.loader_state = step, what, loader_state


type Save = Callable[[TrainState, LoopProgress], None]


def begin(stage: Stage, checkpoints: Checkpoints) -> tuple[TrainState, LoopProgress, Loader]:
    """A fresh state, or that of the newest whole checkpoint when resuming. Resuming in this order:

    1. the fingerprint is compared before anything is touched; 2. the arrays; 3. the data pipeline;
    4. the records beyond the checkpoint are cut off; 5. configuration and tokenizer are written.
    """
    saved = newest_whole(stage, checkpoints)
    if saved is None:
        step, state, progress, loader_state = None, stage.initial_state(), LoopProgress(), None
    else:
        step, state, progress, loader_state = saved[:4]
    warn_of_another_end(stage, step or 0, saved.meta if saved else {})
    loader = stage.loader(loader_state)
    checkpoints.prepare()

    def is_before(record: dict[str, Any]) -> bool:
        if step is None:
            return False
        at_step = record["step"] == step and record["kind"] in progress.done
        return record["step"] < step or at_step

    if is_main_process():
        cut_metrics(stage.folder, is_before)
        settings = replace(stage.config, resume=False, overwrite=False)
        write_run_files(stage.folder, settings, stage.tokenizer)
    if stage.config.resume:
        say(f"resuming at step {step}" if step else "nothing to resume yet: starting at step 0")
    return state, progress, loader


class SavedRun(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: TrainState
    progress: LoopProgress
    loader_state: dict[str, Any] | None
    meta: dict[str, Any]


def newest_whole(stage: Stage, checkpoints: Checkpoints) -> SavedRun | None:
    """What the newest checkpoint that is not damaged holds; None for a run without checkpoints.

    Those after it are put aside, loudly. ValueError, and nothing is touched, if all are damaged.
    """
    damages: dict[int, str] = {}
    for step in reversed(checkpoints.steps()):
        try:
            saved = read_checkpoint(stage, checkpoints, step)
        except DamagedError as error:
            damages[step] = str(error)
            continue
        for path, damage in zip(checkpoints.set_aside(*damages), damages.values(), strict=True):
            say(f"WARNING: {damage}; kept as {path}, the run goes back to step {step}")
        return saved
    if damages:
        found = "; ".join(damages.values())
        raise ValueError(
            f"the run {stage.folder} has no checkpoint that is whole: {found}. Start again with "
            "--overwrite or another --run"
        )
    return None


def read_checkpoint(stage: Stage, checkpoints: Checkpoints, step: int) -> SavedRun:
    """What the loop goes on with; DamagedError where a part of it is not what was saved."""
    checkpoints.check(step)
    meta = checkpoints.meta(step, "identity", "progress")
    loader_state = checkpoints.loader_state(step)
    check_fingerprint(stage.folder, meta["identity"], stage.fingerprint())
    abstract = abstract_logical_state(stage.model, stage.optimizer, stage.mesh)
    state = from_logical(checkpoints.restore(step, abstract), stage.mesh)
    progress = LoopProgress(**{**meta["progress"], "done": tuple(meta["progress"]["done"])})
    return SavedRun(step, state, progress, loader_state, meta)


def warn_of_another_end(stage: Stage, step: int, meta: dict[str, Any]) -> None:
    """Says what will not be as it was, or will be, although nobody wants it."""
    then, now = meta.get("provenance", {}).get("cpu_cores"), cpu_cores()
    if then not in (None, now) and jax.default_backend() == "cpu":
        say(f"WARNING: saved on {then} CPU cores, resumed on {now}: the last digits will differ")
    burnt = read_sound(stage.folder / NON_FINITE_FILE)
    if burnt.get("step", -1) >= step:
        say(
            f"WARNING: this run has met {burnt['what']} at step {burnt['step']}, and will again "
            f"unless the fault was the machine's; {lower_rates(stage)}"
        )


def make_save(stage: Stage, checkpoints: Checkpoints, loader: Loader) -> Save:
    """The function that begins to save a state.

    Parameters that are not finite are never saved: NonFiniteError.
    """
    to_logical = make_state_to_logical(stage.model, stage.optimizer, stage.mesh)
    all_finite = jax.jit(lambda params: jnp.all(jnp.stack([jnp.isfinite(p).all() for p in params])))
    # All of a run that is neither an array nor the data's state, nor changes from step to step.
    constant = {
        "format": 1,
        "stage": stage.name,
        **model_meta(stage.model.config),
        "identity": stage.fingerprint(),
        "config": asdict(stage.config),
        "plan": stage.plan_record(),
        "provenance": provenance(),
        **({"source": stage.source_meta} if stage.source else {}),
    }

    def save(state: TrainState, progress: LoopProgress) -> None:
        step = int(state.step)
        if not all_finite(list(state.params.values())):
            raise NonFiniteError(step, "a parameter is not finite", loader.get_state())
        meta = {
            **constant,
            "step": step,
            "val_bpb": progress.val_bpb if "val" in progress.done else None,
            "progress": asdict(progress),
        }
        checkpoints.save(to_logical(state), meta, merge_over_processes(loader.get_state()))

    return save


def merge_over_processes(loader_state: dict[str, Any]) -> dict[str, Any]:
    """The data states of all processes as one; every process must call it."""
    return merge_states(gather_json(loader_state))


def report_non_finite(stage: Stage, error: NonFiniteError) -> int:
    """Writes down which batch it was; returns the exit code."""
    path = stage.folder / NON_FINITE_FILE
    loader_state = merge_over_processes(error.loader_state)
    found = {"step": error.step, "what": error.what, "loader": loader_state}
    if is_main_process():
        write_atomically(path, json.dumps(found, indent=1))
        print(
            f"error: {error}; {path} describes the batch. Nothing was overwritten, but --resume "
            f"would repeat the same steps to the same end; {lower_rates(stage)}",
            file=sys.stderr,
        )
    return 1


def lower_rates(stage: Stage) -> str:
    """The way out of a loss that is not finite: the command of a run with a tenth of the rates.

    At most the recipe's own: far too high ones are back in their range at once.
    """
    optim, recipe = stage.optim_config, RECIPES[stage.optim_config.recipe]
    rates = {name: (getattr(optim, name), getattr(recipe, name)) for name in RATES}
    if stage.source is None:
        lower = {name: min(rate / 10, usual) for name, (rate, usual) in rates.items() if rate}
    else:  # its share of the source's rates, and those that it has set itself
        lower = {"lr_frac": min(optim.lr_frac, 1.0) / 10}
        lower |= {
            name: usual
            for name, (rate, usual) in rates.items()
            if rate > usual and getattr(stage.config, name, None) is not None
        }
    flags = " ".join(f"--{name.replace('_', '-')} {rate:.3g}" for name, rate in lower.items())
    return (
        "start another run with lower learning rates, here a tenth: "
        f"python scripts/{stage.name}.py --config {quote(str(stage.folder / CONFIG_FILE))} "
        f"--run {quote(stage.config.run + '-lower')} {flags}"
    )
