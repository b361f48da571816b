"""Checkpoints: written in the background, whole or not at all. The only file that imports Orbax.

    runs/<name>/            one folder is the model
      config.toml           the configuration that made it
      tokenizer/            a copy of its tokenizer
      metrics.jsonl         every number that the run printed
      checkpoints/<step>/   params, opt_state (arrays); meta, loader (JSON); SHA256SUMS
      checkpoints/damaged-<step>/  what a resumed run found damaged: kept aside, never read

Arrays are stored in their logical shapes (train.py), so another number of devices can restore them;
parameters and optimizer state apart, so that inference reads the parameters only. A checkpoint gets
its name when it is complete and on the disk with its checksums (`seal` in runs.py): one whose
process died while writing it is never seen. Whatever is read of one is compared with them first.
"""

import asyncio
import gc
import hashlib
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from nanochat_jax.config import sync_folder
from nanochat_jax.distributed import is_main_process, wait_for_all, warn
from nanochat_jax.gpt import GPT, GPTConfig, Params, make_model, param_shapes
from nanochat_jax.runs import (
    CHECKPOINTS_FOLDER,
    CHECKSUMS_FILE,
    TOKENIZER_FOLDER,
    DamagedError,
    check_seal,
    checkpoint_steps,
    digest,
    read_json,
    seal,
)
from nanochat_jax.sharding import from_logical, logical_shardings, with_shardings
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import TrainState

PARTS = ("params", "opt_state", "meta", "loader", "metrics")
SEALED = {"checksums": CHECKSUMS_FILE}  # says that there were some, should they be missing
CENTURY = 100 * 365 * 24 * 3600
NO_SPACE = "No space left on device"

# Orbax warns there about what is intended here, and logs a failed save five times before it raises.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint's draft, which gets its name once it is on the disk with its checksums."""

    async def finalize(self) -> None:
        final = self.get_final()
        whole = final.parent / f"{self.get().name}.whole"
        self._final_path = whole
        await super().finalize()  # Orbax writes its last files, and renames
        await asyncio.to_thread(seal, Path(whole))
        whole.rename(final)
        self._final_path = final
        sync_folder(Path(final.parent))


class Checkpoints:
    """The checkpoints of one run folder. Every process of a cluster run makes the same calls.

    The last `keep_last` and the best one are kept. All that reads raises a DamagedError that names
    the file where one is not what was saved; one line says so if a checkpoint has no checksums.
    """

    def __init__(self, run_folder: Path, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {keep_last}")
        self.folder = run_folder / CHECKPOINTS_FOLDER
        self._run, self._keep_last = run_folder, keep_last
        self._checked: set[tuple[int, str]] = set()  # steps and their parts
        self._unsealed: set[int] = set()

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Writes and deletes. Made when the first is written, without those that are damaged."""
        self.set_aside(*filter(self._is_unranked, self.steps()))
        policies = [
            checkpoint_managers.LatestN(self._keep_last),
            checkpoint_managers.BestN(get_metric_fn=_val_bpb, reverse=True, n=1),
        ]
        return ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_val_bpb,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                temporary_path_class=SealedPath,
                # Orbax waits by the wall clock: a computer that slept would be a timeout.
                async_options=ocp.AsyncOptions(
                    timeout_secs=CENTURY, create_directories_asynchronously=False
                ),
            ),
        )

    def prepare(self) -> None:
        """Removes drafts that a sudden end has left; else the first save would."""
        assert self._manager

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, ascending."""
        return checkpoint_steps(self._run)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest validation bits per byte; the latest where none was measured."""
        return min(self.steps(), key=lambda step: (self._bpb(step), -step), default=None)

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
            self._manager.save(
                int(state.step), args=args, metrics=metrics, force=True, custom_metadata=SEALED
            )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at a step, in the shapes and shardings of `abstract` (logical)."""
        self.check(step, "params", "opt_state")
        params = self.restore_params(step, cast(Any, abstract.params))
        saved = self._arrays(step, "opt_state", _flat(abstract.opt_state))
        opt_state = jax.tree.unflatten(
            jax.tree.structure(abstract.opt_state),
            [saved[name] for name in _flat(abstract.opt_state)],
        )
        step_array = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(step_array, params, opt_state)

    def restore_params(self, step: int, abstract: dict[str, jax.ShapeDtypeStruct]) -> Params:
        """The parameters alone, in the shapes and shardings of `abstract`; all of them finite."""
        params = self._arrays(step, "params", abstract)
        bad = [name for name, finite in _are_finite(params).items() if not finite]
        if bad:
            raise DamagedError(f"{self.folder / str(step)}: {', '.join(bad)} are not finite")
        return params

    def meta(self, step: int, *needed: str) -> dict[str, Any]:
        """What was saved as meta; DamagedError where one of the `needed` keys is missing."""
        return self._json(step, "meta", *needed)

    def loader_state(self, step: int) -> dict[str, Any] | None:
        return self._json(step, "loader") or None

    def check(self, step: int, *parts: str) -> None:
        """Compares those parts of a checkpoint with its checksums, none is all; each only once."""
        new = [part for part in parts or PARTS if (step, part) not in self._checked]
        if not new or step in self._unsealed:
            return
        if check_seal(self.folder / str(step), new if parts else ()):
            self._checked |= {(step, part) for part in new}
        else:
            warn(
                f"{self.folder / str(step)} is not verified: it is from before there were checksums"
            )
            self._unsealed.add(step)

    def set_aside(self, *steps: int) -> list[Path]:
        """Renames checkpoints so that nothing counts them; where they are now."""
        taken = len(list(self.folder.glob("damaged-*")))
        names = [self.folder / f"damaged-{step}-{taken + i}" for i, step in enumerate(steps)]
        wait_for_all("named")
        if is_main_process():
            for step, path in zip(steps, names, strict=True):
                (self.folder / str(step)).rename(path)
        wait_for_all("set aside")
        return names

    def wait(self) -> None:
        """Returns when the running save has ended; raises ValueError if it failed."""
        if "_manager" in vars(self):
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        if "_manager" in vars(self):
            with self._writing():
                self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _arrays(self, step: int, part: str, abstract: dict[str, Any]) -> Any:
        self.check(step, part)
        path = self.folder / str(step) / part
        # Without checksums an error is all that tells of damage; with them it is something else.
        damage = DamagedError if step in self._unsealed else ValueError
        with _readable_errors(f"checkpoint {path} cannot be read", "is it damaged?", damage):
            handler = ocp.Checkpointer(ocp.StandardCheckpointHandler())
            return handler.restore(path.absolute(), args=ocp.args.StandardRestore(abstract))

    def _json(self, step: int, part: str, *needed: str) -> dict[str, Any]:
        self.check(step, part)
        path = self.folder / str(step) / part / ("metrics" if part == "metrics" else "metadata")
        found = read_json(path)
        if missing := [key for key in needed if key not in found]:
            raise DamagedError(f"{path} is damaged or missing: it lacks {', '.join(missing)}")
        return found

    def _bpb(self, step: int) -> float:
        return _val_bpb(self._json(step, "metrics"))

    def _is_unranked(self, step: int) -> bool:
        """Whether it is so damaged that Orbax could not even rank it; says so."""
        try:
            self._bpb(step)
        except DamagedError as damage:
            warn(f"WARNING: {damage}; it is put aside")
            return True
        return False

    def _writing(self) -> AbstractContextManager[None]:
        return _readable_errors(
            f"a checkpoint cannot be written to {self.folder}",
            "those before it are whole: with enough space and permission, continue with --resume",
        )


@contextmanager
def _readable_errors(what: str, advice: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turns every error of Orbax and TensorStore into one sentence."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = NO_SPACE if NO_SPACE in str(error) else lines[0]
        with warnings.catch_warnings():
            # Orbax closes its event loop with coroutines in it that were never awaited; found by
            # the garbage collector later, they would be a warning in the middle of something else.
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        raise kind(f"{what} ({reason}); {advice}") from error


def _val_bpb(metrics: dict[str, float]) -> float:
    return metrics.get("val_bpb", math.inf)


@jax.jit
def _are_finite(params: Params) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in params.items()}


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
        with naming_a_whole_one(checkpoints, chosen):
            meta = checkpoints.meta(chosen, "model")
            config = GPTConfig(**meta["model"])
            shapes = param_shapes(config)
            whole = dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
            placed = whole if mesh is None else logical_shardings(shapes, mesh)
            params = checkpoints.restore_params(chosen, with_shardings(shapes, placed))
    if mesh is not None:
        params = from_logical(params, mesh)
    tokenizer = load_tokenizer(run_folder, meta)
    return LoadedModel(make_model(config, dtype, attention), params, tokenizer, meta)


def load_tokenizer(run_folder: Path, meta: dict[str, Any]) -> Tokenizer:
    """A run's copy of its tokenizer; ValueError where it is not what the run was trained with."""
    folder = run_folder / TOKENIZER_FOLDER
    tokenizer = Tokenizer.load(folder)
    trained_with = meta.get("identity", {}).get("tokenizer")
    if trained_with is None:
        warn(f"{folder} is not verified: the checkpoint does not say which tokenizer it needs")
    elif trained_with != tokenizer_fingerprint(tokenizer):
        size = trained_with.get("vocab_size")
        raise ValueError(
            f"{folder} is not the tokenizer that {run_folder.name} was trained with, or is damaged "
            f"(it has {tokenizer.vocab_size} tokens, that one {size}): put that one back"
        )
    return tokenizer


def tokenizer_fingerprint(tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts of a tokenizer that a run's results depend on."""
    ranks = b"".join(len(token).to_bytes(4) + token for token in tokenizer.ranks)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokens": hashlib.sha256(ranks).hexdigest()[:16],
        "pattern": digest(tokenizer.pattern),
    }


def open_checkpoints(run_folder: Path) -> Checkpoints:
    """The checkpoints of a run, to be read; ValueError if it has none."""
    if not (run_folder / CHECKPOINTS_FOLDER).is_dir():
        raise ValueError(f"{run_folder} holds no checkpoints; train one with scripts/pretrain.py")
    return Checkpoints(run_folder)


@contextmanager
def naming_a_whole_one(checkpoints: Checkpoints, step: int) -> Iterator[None]:
    """Adds to the error of a damaged checkpoint which step can be used instead."""
    try:
        yield
    except DamagedError as damage:
        advice = "none of the run's other checkpoints is whole"
        for other in reversed(checkpoints.steps()):
            with suppress(DamagedError):
                if other != step:
                    checkpoints.check(other, "params", "meta")
                    advice = f"step {other} is whole (--step {other}, --source-step {other})"
                    break
        raise DamagedError(f"{damage}; {advice}") from None


def choose_step(checkpoints: Checkpoints, step: int | str | None) -> int:
    """The step that a number, "last" (also None) or "best" means; ValueError names those there."""
    steps = checkpoints.steps()
    if not steps:
        raise ValueError(f"{checkpoints.folder} holds no finished checkpoint")
    wanted = "last" if step is None else str(step)
    named = {"last": steps[-1], **{str(number): number for number in steps}}
    if wanted == "best":
        return checkpoints.best() or steps[-1]
    if wanted not in named:
        listed = ", ".join(map(str, steps))
        raise ValueError(f"{checkpoints.folder} has no step {step}; it has {listed}, last and best")
    return named[wanted]


def model_meta(config: GPTConfig) -> dict[str, Any]:
    """The part of a checkpoint's meta that `load_model` needs."""
    return {"model": asdict(config)}
