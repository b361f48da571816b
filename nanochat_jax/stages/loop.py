"""The training loop that pre-, mid- and fine-training share.

Batches go in; numbers, samples and checkpoints come out. What a stage trains, measures and saves is
given to `run_training` as functions, so the loop runs in a test as it runs on a cluster. It reads
the metrics of a step while the device computes the next one, so the device never waits for Python.
"""

import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.distributed import say
from nanochat_jax.gpt import Params
from nanochat_jax.runs import Tracker
from nanochat_jax.train import Metrics, TrainState

SMOOTHING = 0.9  # of the loss that is printed
COLLECT_EVERY = 5000  # steps between collections of cyclic garbage


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often, and what a step is worth. An interval of 0 or less means never."""

    num_steps: int
    tokens_per_step: int | None  # None: it varies, the step's metrics tell their "tokens"
    eval_every: int = 0
    sample_every: int = 0
    save_every: int = 0  # besides the end, which is always saved
    lr_multiplier: Callable[[int], float] = lambda step: 1.0
    flops_per_token: float = 0.0
    peak_flops: float | None = None  # of all devices together; None: no MFU
    at_once: bool = False  # record a step before the next begins: where steps wait for the device

    def duties(self, step: int) -> list[str]:
        """What is due once `step` updates have been made, in order."""
        every = {"val": self.eval_every, "sample": self.sample_every, "save": self.save_every}
        last = step == self.num_steps
        due = [d for d, n in every.items() if n > 0 and (last or step % n == 0)]
        if step == 0:  # an untrained model is worth measuring (a fault shows at once), no more
            return [duty for duty in due if duty == "val"]
        return [*due, "save"] if last and "save" not in due else due


@dataclass(frozen=True)
class Progress:
    """What the host knows besides the state; saved with every checkpoint."""

    smoothed_loss: float = 0.0  # exponential average, biased towards 0
    train_seconds: float = 0.0  # without compiling, measuring, sampling and saving
    val_bpb: float | None = None
    best_val_bpb: float | None = None
    done: tuple[str, ...] = ()  # duties of the present step that need no repetition


class Actions(NamedTuple):
    """What a stage does when it is due. `evaluate` may return None when told to stop."""

    evaluate: Callable[[Params], dict[str, float] | None]
    sample: Callable[[Params], list[tuple[str, str]]]  # (prompt, completion)
    save: Callable[[TrainState, Progress], None]


class Fed(NamedTuple):
    batch: Any
    origin: dict[str, Any]  # the loader's state before this batch: it identifies the batch
    began: float  # seconds on the clock of time.perf_counter
    waited: float  # seconds that rows and their way to the device took


class RowSource(Protocol):
    def __next__(self) -> np.ndarray: ...
    def get_state(self) -> dict[str, Any]: ...


class Feed:
    """Rows of the loader -> batches on the mesh."""

    def __init__(self, loader: RowSource, put: Callable[[np.ndarray], Any]):
        self._loader, self._put = loader, put

    def next(self) -> Fed:
        began = time.perf_counter()
        origin = self._loader.get_state()
        batch = self._put(next(self._loader))
        return Fed(batch, origin, began, time.perf_counter() - began)


class NonFiniteError(Exception):
    """A loss or a gradient is NaN or infinite; `origin` identifies the batch."""

    def __init__(self, step: int, what: str, origin: dict[str, Any]):
        super().__init__(f"{what} at step {step}")
        self.step, self.what, self.origin = step, what, origin


class Outcome(NamedTuple):
    state: TrainState
    progress: Progress
    stopped_by: str | None  # the signal that ended the run early


# --- the loop -------------------------------------------------------------------------------------


def run_training(
    config: LoopConfig,
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    feed: Feed,
    actions: Actions,
    tracker: Tracker,
    progress: Progress | None = None,
    stop: "StopRequest | None" = None,
) -> Outcome:
    """Trains from `state.step` to `config.num_steps`.

    After each step, in this order, on which resuming relies: (1) measure, (2) sample, (3) save,
    each when it is due and not already done at this step; a request to stop skips to (3) and ends
    the run; (4) train one step. Raises NonFiniteError before anything of that step is saved.
    """
    stop = stop or StopRequest()
    step = int(state.step)
    journal = Journal(config, tracker, progress or Progress())
    with garbage_collector_paused() as collect:
        while True:
            duties, stopping = config.duties(step), stop.asked(step)
            if duties or stopping:
                journal.settle()
                stopping = _do(duties, state, step, actions, journal, tracker, stop)
                collect()
            if stopping or step >= config.num_steps:
                return Outcome(state, journal.progress, stop.reason() if stopping else None)
            fed = feed.next()
            state, metrics = train_step(state, fed.batch)
            journal.follow(step, metrics, fed)
            if config.at_once:
                journal.settle()
            step += 1
            if journal.counted == 1 or step % COLLECT_EVERY == 0:
                collect()


def _do(
    duties: list[str],
    state: TrainState,
    step: int,
    actions: Actions,
    journal: "Journal",
    tracker: Tracker,
    stop: "StopRequest",
) -> bool:
    """Does what is due and not done yet; returns whether the run ends here, saved, on request."""
    for duty in duties:
        if duty in journal.progress.done or duty == "save" or stop.asked(step):
            continue
        if duty == "val":
            _measure(state, step, actions, journal, tracker)
        else:
            _show_samples(state, step, actions, journal, tracker)
    stopping = stop.asked(step)
    if ("save" in duties or stopping) and "save" not in journal.progress.done and step > 0:
        journal.finish("save")
        actions.save(state, journal.progress)
    return stopping


def _measure(state, step: int, actions: Actions, journal: "Journal", tracker: Tracker) -> None:
    result = actions.evaluate(state.params)
    if result is None:
        return
    if "bpb" not in result:
        tracker.log("val", step, **result)
        say(f"step {step:05d} | " + ", ".join(f"{n} {v:.4f}" for n, v in result.items()))
        return journal.finish("val")
    bpb, best = result["bpb"], journal.progress.best_val_bpb
    best = bpb if best is None else min(best, bpb)
    tracker.log("val", step, **result, best_bpb=best)
    say(f"step {step:05d} | validation: {bpb:.6f} bits per byte (best {best:.6f})")
    journal.finish("val", val_bpb=bpb, best_val_bpb=best)


def _show_samples(state, step: int, actions: Actions, journal: "Journal", tracker: Tracker) -> None:
    samples = actions.sample(state.params)
    for prompt, text in samples:
        say(f"step {step:05d} | {prompt!r} → {text!r}")
    tracker.log("sample", step, texts=[[prompt, text] for prompt, text in samples])
    journal.finish("sample")


# --- the journal ----------------------------------------------------------------------------------


@dataclass
class Journal:
    """Turns the metrics of steps into records and lines, one step behind the device."""

    config: LoopConfig
    tracker: Tracker
    progress: Progress
    counted: int = 0  # steps recorded by this process
    _seconds: float = 0.0  # their time, without the first one, which compiles
    _ready: float = 0.0  # when the last recorded step was seen to be finished
    _pending: tuple[int, Metrics, Fed] | None = field(default=None)

    def follow(self, step: int, metrics: Metrics, fed: Fed) -> None:
        """Takes note of a step just dispatched and records the one before it."""
        self.settle()
        self._pending = step, metrics, fed
        self.progress = replace(self.progress, done=())

    def finish(self, duty: str, **values: Any) -> None:
        """Takes note of a duty done at the present step."""
        self.progress = replace(self.progress, done=(*self.progress.done, duty), **values)

    def settle(self) -> None:
        """Waits for the step that is still unrecorded, if any, and records it."""
        if self._pending is None:
            return
        (step, metrics, fed), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        dt, self._ready = now - max(self._ready, fed.began), now
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise NonFiniteError(step, f"{name} is {values[name]}", fed.origin)
        self._record(step, values, dt, fed.waited)

    def _record(self, step: int, values: dict[str, float], dt: float, waited: float) -> None:
        first = self.counted == 0
        self.counted += 1
        self._seconds += 0.0 if first else dt
        smoothed = SMOOTHING * self.progress.smoothed_loss + (1 - SMOOTHING) * values["loss"]
        seconds = self.progress.train_seconds + (0.0 if first else dt)
        self.progress = replace(self.progress, smoothed_loss=smoothed, train_seconds=seconds)
        record = {
            **values,
            "smoothed_loss": smoothed / (1 - SMOOTHING ** (step + 1)),
            "lr_multiplier": self.config.lr_multiplier(step),
            **self._speed(step, self.config.tokens_per_step or values["tokens"], dt, waited),
            "train_seconds": seconds,
        }
        if self.config.tokens_per_step is not None:
            record["tokens"] = self.config.tokens_per_step * (step + 1)
        self.tracker.log("train", step, **record)
        say(progress_line(step, self.config.num_steps, record))

    def _speed(self, step: int, tokens: float, dt: float, waited: float) -> dict[str, float]:
        tokens_per_s = tokens / dt
        speed = {"dt": dt, "tokens_per_s": tokens_per_s, "data_wait": waited}
        if self.config.peak_flops and self.config.flops_per_token:
            speed["mfu"] = self.config.flops_per_token * tokens_per_s / self.config.peak_flops
        if self.counted > 1:
            left = self.config.num_steps - step - 1
            speed["eta_seconds"] = left * self._seconds / (self.counted - 1)
        return speed


def progress_line(step: int, num_steps: int, record: dict[str, float]) -> str:
    """One line of a run's output: what has just been recorded."""
    parts = [
        f"step {step:05d}/{num_steps:05d} ({100 * step / num_steps:.2f}%)",
        f"loss {record['loss']:.6f} (smoothed {record['smoothed_loss']:.6f})",
        f"lrm {record['lr_multiplier']:.2f}",
        f"dt {record['dt'] * 1e3:.2f} ms (data {record['data_wait'] * 1e3:.2f})",
        f"{record['tokens_per_s']:,.0f} tok/s",
    ]
    if "grad_norm" in record:
        parts.insert(2, f"norm {record['grad_norm']:.4f}")
    if "reward" in record:
        parts.insert(1, f"reward {record['reward']:.4f}")
    if "mfu" in record:
        parts.append(f"mfu {100 * record['mfu']:.2f}%")
    if "eta_seconds" in record:
        parts.append(f"eta {record['eta_seconds'] / 60:.1f} min")
    return " | ".join(parts)


# --- stopping and tidying -------------------------------------------------------------------------


class StopRequest:
    """Whether the run has been asked to end. All processes of a cluster get the same answer."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._agreed: dict[int, bool] = {}

    def asked(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.signal is not None
        if step not in self._agreed:
            # JAX's coordinator sees the signal of any process and picks a step for all of them.
            self._agreed = {step: multihost_utils.reached_preemption_sync_point(step)}
        return self._agreed[step]

    def reason(self) -> str:
        return self.signal or "SIGTERM"


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM and the first Ctrl-C ask the loop to save and end; a second one ends it at once."""
    stop = StopRequest()
    if jax.process_count() > 1:  # there the signal belongs to JAX's coordinator
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.signal = signal.Signals(number).name
        # os.write: print cannot be called while a print is being interrupted.
        os.write(2, f"\n{stop.signal}: finishing this step, then saving\n".encode())
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def garbage_collector_paused() -> Iterator[Callable[[], None]]:
    """Collects cyclic garbage (up to 500 ms each time) only when the yielded function is called."""

    def collect() -> None:
        gc.collect()
        gc.freeze()

    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
