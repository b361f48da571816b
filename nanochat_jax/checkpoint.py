"""Checkpoints: written in the background, whole or not at all. The only file that imports Orbax.

    runs/<name>/            one folder is the model
      config.toml           the configuration that made it
      tokenizer/            a copy of its tokenizer
      metrics.jsonl         every number that the run printed
      checkpoints/<step>/   params, opt_state (arrays); meta, loader (JSON)

Arrays are stored in their logical shapes (train.py), so another number of devices can restore them;
parameters and optimizer state apart, so that inference reads the parameters only. A checkpoint gets
its name when it is complete: one whose process died while writing it is never seen.
"""

import gc
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from nanochat_jax.gpt import GPT, GPTConfig, Params, make_model, param_shapes
from nanochat_jax.runs import CHECKPOINTS_FOLDER, TOKENIZER_FOLDER
from nanochat_jax.sharding import from_logical, logical_shardings, with_shardings
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import TrainState

NO_SPACE = "No space left on device"

# Orbax warns there about what is intended here, and logs a failed save five times before it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one run folder. Every process of a cluster run makes the same calls.

    The last `keep_last` and the best one are kept.
    """

    def __init__(self, run_folder: Path, keep_last: int = 2, read_only: bool = False):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {keep_last}")
        self.folder = run_folder / CHECKPOINTS_FOLDER
        policies = [
            checkpoint_managers.LatestN(keep_last),
            checkpoint_managers.BestN(get_metric_fn=_val_bpb, reverse=True, n=1),
        ]
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=0 if read_only else 1,
                best_fn=_val_bpb,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest validation bits per byte; the latest where none was measured."""
        return self._manager.best_step()

    def save(
        self, state: TrainState, meta: dict[str, Any], loader_state: dict[str, Any] | None
    ) -> None:
        """Begins to save a logical state; returns when its arrays may be overwritten.

        `meta["val_bpb"]`, unless missing or None, ranks the checkpoint. ValueError if the save
        before failed.
        """
        bpb = meta.get("val_bpb")
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(_flat(state.opt_state)),
            meta=ocp.args.JsonSave(meta),
            loader=ocp.args.JsonSave(loader_state or {}),
        )
        metrics = {} if bpb is None else {"val_bpb": bpb}
        with self._writing():
            self._manager.save(int(state.step), args=args, metrics=metrics, force=True)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at a step, in the shapes and shardings of `abstract` (logical)."""
        restored = self._read(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(_flat(abstract.opt_state)),
        )
        opt_state = jax.tree.unflatten(
            jax.tree.structure(abstract.opt_state),
            [restored["opt_state"][name] for name in _flat(abstract.opt_state)],
        )
        step_array = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(step_array, restored["params"], opt_state)

    def restore_params(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> Params:
        """The parameters alone, in the shapes and shardings of `abstract`."""
        return self._read(step, params=ocp.args.StandardRestore(abstract))["params"]

    def meta(self, step: int) -> dict[str, Any]:
        return self._read(step, meta=ocp.args.JsonRestore())["meta"]

    def loader_state(self, step: int) -> dict[str, Any] | None:
        return self._read(step, loader=ocp.args.JsonRestore())["loader"] or None

    def wait(self) -> None:
        """Returns when the running save has ended; raises ValueError if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, step: int, **items: Any) -> Any:
        what = f"checkpoint {self.folder / str(step)} cannot be read"
        advice = "if it is damaged, delete that folder to go back to the one before"
        with _readable_errors(what, advice):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _writing(self) -> AbstractContextManager[None]:
        return _readable_errors(
            f"a checkpoint cannot be written to {self.folder}",
            "those before it are whole: with enough space and permission, continue with --resume",
        )


@contextmanager
def _readable_errors(what: str, advice: str) -> Iterator[None]:
    """Turns every error of Orbax and TensorStore into a ValueError of one sentence."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = NO_SPACE if NO_SPACE in str(error) else lines[0]
        with warnings.catch_warnings():
            # Orbax closes its event loop with coroutines in it that were never awaited; found by
            # the garbage collector later, they would be a warning in the middle of something else.
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        raise ValueError(f"{what} ({reason}); {advice}") from error


def _val_bpb(metrics: dict[str, float]) -> float:
    return metrics.get("val_bpb", math.inf)


def _flat(tree: Any) -> dict[str, Any]:
    """path -> leaf: checkpoints do not depend on optax's classes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# --- one folder is the model ----------------------------------------------------------------------


class LoadedModel(NamedTuple):
    """A model ready to use: `params` are whole, float32, as gpt.py declares them."""

    model: GPT
    params: Params
    tokenizer: Tokenizer
    meta: dict[str, Any]


def load_model(
    run_folder: Path,
    step: int | str | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "auto",
    attention: str = "auto",
) -> LoadedModel:
    """Loads model, parameters, tokenizer and meta from a run's folder; never the optimizer.

    `step` is a number, "last" (also None) or "best". Without a mesh the parameters lie whole on the
    first device; with one they are cut and padded for training and evaluation steps on it. On a GPU
    take attention="blocked" for rows that are not whole 128s long.
    ValueError for a folder without checkpoints or without that step, or with another tokenizer.
    """
    with open_checkpoints(run_folder) as checkpoints:
        chosen = choose_step(checkpoints, step)
        meta = checkpoints.meta(chosen)
        config = GPTConfig(**meta["model"])
        shapes = param_shapes(config)
        whole = dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
        placed = whole if mesh is None else logical_shardings(shapes, mesh)
        params = checkpoints.restore_params(chosen, with_shardings(shapes, placed))
    if mesh is not None:
        params = from_logical(params, mesh)
    tokenizer = Tokenizer.load(run_folder / TOKENIZER_FOLDER)
    trained_with = meta.get("identity", {}).get("tokenizer", {}).get("vocab_size")
    if trained_with not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"{run_folder / TOKENIZER_FOLDER} has {tokenizer.vocab_size:,} tokens, but the model "
            f"was trained with one of {trained_with:,}: put that one back"
        )
    return LoadedModel(make_model(config, dtype, attention), params, tokenizer, meta)


def open_checkpoints(run_folder: Path) -> Checkpoints:
    """The checkpoints of a run, read-only; ValueError if it has none."""
    if not (run_folder / CHECKPOINTS_FOLDER).is_dir():
        raise ValueError(f"{run_folder} holds no checkpoints; train one with scripts/pretrain.py")
    return Checkpoints(run_folder, read_only=True)


def choose_step(checkpoints: Checkpoints, step: int | str | None) -> int:
    """The step that a number, "last" (also None) or "best" means; ValueError names those there."""
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{checkpoints.folder} holds no finished checkpoint")
    wanted = "last" if step is None else str(step)
    named = {"last": steps[-1], "best": checkpoints.best() or steps[-1]}
    named |= {str(number): number for number in steps}
    if wanted not in named:
        listed = ", ".join(map(str, steps))
        raise ValueError(f"{checkpoints.folder} has no step {step}; it has {listed}, last and best")
    return named[wanted]


def model_meta(config: GPTConfig) -> dict[str, Any]:
    """The part of a checkpoint's meta that `load_model` needs."""
    return {"model": asdict(config)}
