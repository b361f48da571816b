"""The training loop: `run(stage)` locks the run's folder, begins or resumes, trains, and saves.

Batches go in; numbers, samples and checkpoints come out. The metrics of a step are read while the
device computes the next one, so the device never waits for Python.
"""

import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from shlex import quote
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.distributed import is_main_process, say, wait_for_all
from nanochat_jax.runs import (
    CONFIG_FILE,
    Meter,
    Tracker,
    check_unused,
    clear_run,
    lock_run,
    record,
)
from nanochat_jax.stages.saving import (
    LoopProgress,
    NonFiniteError,
    Save,
    begin,
    make_save,
    report_non_finite,
)
from nanochat_jax.stages.stage import Loader, Stage
from nanochat_jax.train import Metrics, TrainState

SMOOTHING = 0.9  # of the loss that is printed
COLLECT_EVERY = 5000  # steps between collections of cyclic garbage


class Trained(NamedTuple):
    """How the loop ended."""

    state: TrainState
    progress: LoopProgress
    stopped_by: str | None  # the signal that ended the run early


def run(stage: Stage) -> int:
    """Trains a stage, or resumes it; returns the exit code."""
    config, folder, is_first = stage.config, stage.folder, is_main_process()
    # 1. The folder is this run's, and no other process writes into it.
    check_unused(folder, config.resume, config.overwrite)
    wait_for_all("checked")
    with lock_run(folder) if is_first else nullcontext():
        if is_first:
            clear_run(folder, config.overwrite)
            stage.announce()
        meter = Meter(folder, stage.name)
        wait_for_all("ready")
        with Checkpoints(folder, config.keep_last) as checkpoints:
            # 2. A fresh state, or the last checkpoint's.
            state, progress, loader = begin(stage, checkpoints)
            tracker = Tracker(
                folder,
                name=config.run,
                config=asdict(config),
                wandb_mode=config.wandb,
                write=is_first,
            )
            # 3. The loop; the last checkpoint is on disk before signals are no longer caught.
            try:
                with stop_on_signals() as stop, loader:
                    if int(state.step) == 0:
                        tracker.log("plan", 0, **stage.plan_record())
                    save = make_save(stage, checkpoints, loader)
                    trained = train(stage, state, progress, loader, tracker, save, stop)
                    checkpoints.wait()
            except NonFiniteError as error:
                return report_non_finite(stage, error)
            finally:
                tracker.close()
        # 4. What was trained, and what to do next.
        report_end(stage, trained, meter)
    return 0


def train(
    stage: Stage,
    state: TrainState,
    progress: LoopProgress,
    loader: Loader,
    tracker: Tracker,
    save: Save,
    stop: "StopRequest",
) -> Trained:
    """Trains from `state.step` to `stage.num_steps`.

    After each step, in this order, on which resuming relies: (1) measure, (2) sample, (3) save,
    each when it is due and not already done at this step; a request to stop skips to (3) and ends
    the run; (4) train one step. Raises NonFiniteError before anything of that step is saved.
    """
    step, train_step = int(state.step), stage.train_step()
    logger = MetricsLogger(stage, tracker, progress)
    with garbage_collector_paused() as collect:
        while True:
            due, stopping = events_due(stage, step), stop.asked(step)
            if due or stopping:
                logger.flush()
                for event in due:
                    if event in logger.progress.done or stop.asked(step):
                        continue
                    if event == "val":
                        measure(stage, state, step, logger, stop)
                    elif event == "sample":
                        show_samples(stage, state, step, logger)
                stopping = stop.asked(step)
                saving = ("save" in due or stopping) and step > 0
                if saving and "save" not in logger.progress.done:
                    logger.done("save")
                    save(state, logger.progress)
                collect()
            if stopping or step >= stage.num_steps:
                return Trained(state, logger.progress, stop.reason() if stopping else None)
            began, loader_state = time.perf_counter(), loader.get_state()
            batch = stage.put(next(loader))
            waited = time.perf_counter() - began
            state, metrics = train_step(state, batch)
            logger.record(step, metrics, loader_state, began, waited)
            if not stage.defer_metrics:
                logger.flush()
            step += 1
            if logger.counted == 1 or step % COLLECT_EVERY == 0:
                collect()


def events_due(stage: Stage, step: int) -> list[str]:
    """What is due once `step` updates have been made, in order; an interval of 0 means never."""
    config, last = stage.config, step == stage.num_steps
    every = {"val": config.eval_every, "sample": config.sample_every, "save": config.save_every}
    due = [event for event, n in every.items() if n > 0 and (last or step % n == 0)]
    if step == 0:  # an untrained model is worth measuring (it shows a fault early), no more
        return [event for event in due if event == "val"]
    return [*due, "save"] if last and "save" not in due else due


def measure(
    stage: Stage, state: TrainState, step: int, logger: "MetricsLogger", stop: "StopRequest"
) -> None:
    result = stage.evaluate(state.params, lambda: stop.signal is not None)
    if result is None:
        return
    if "bpb" not in result:
        logger.tracker.log("val", step, **result)
        say(f"step {step:05d} | " + ", ".join(f"{n} {v:.4f}" for n, v in result.items()))
        return logger.done("val")
    bpb, best = result["bpb"], logger.progress.best_val_bpb
    best = bpb if best is None else min(best, bpb)
    logger.tracker.log("val", step, **result, best_bpb=best)
    say(f"step {step:05d} | validation: {bpb:.6f} bits per byte (best {best:.6f})")
    logger.done("val", val_bpb=bpb, best_val_bpb=best)


def show_samples(stage: Stage, state: TrainState, step: int, logger: "MetricsLogger") -> None:
    samples = stage.sample(state.params)
    for prompt, text in samples:
        say(f"step {step:05d} | {prompt!r} → {text!r}")
    logger.tracker.log("sample", step, texts=[[prompt, text] for prompt, text in samples])
    logger.done("sample")


def report_end(stage: Stage, trained: Trained, meter: Meter) -> None:
    step, progress = int(trained.state.step), trained.progress
    best = f", best {progress.best_val_bpb:.6f} bits per byte" if progress.best_val_bpb else ""
    tokens = f", {step * stage.tokens_per_step:,} tokens" if stage.tokens_per_step else ""
    say(f"{step} steps{tokens}, {progress.train_seconds / 60:.2f} min of training{best}")
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if memory:
        say(f"peak memory {memory / 2**30:.2f} GiB a device")
    if is_main_process():
        totals = stage.totals()
        values = {"steps": step, "best_bpb": progress.best_val_bpb, **totals, **meter.read()}
        record(stage.folder, stage.name, {n: v for n, v in values.items() if v is not None})
        if totals:
            say(", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in totals.items()))
    if step == stage.num_steps:
        say(f"finished; try it: {stage.try_it()}")
    elif trained.stopped_by:
        saved = "saved" if step else "nothing to save yet"
        say(
            f"stopped by {trained.stopped_by} after step {step} of {stage.num_steps}; {saved}. "
            f"Continue with: python scripts/{stage.name}.py "
            f"--config {quote(str(stage.folder / CONFIG_FILE))} --resume"
        )


# --- metrics --------------------------------------------------------------------------------------


class MetricsLogger:
    """Turns the metrics of steps into records and lines, one step behind the device."""

    def __init__(self, stage: Stage, tracker: Tracker, progress: LoopProgress):
        self.stage, self.tracker, self.progress = stage, tracker, progress
        self.counted = 0  # steps recorded by this process
        self._seconds = 0.0  # their time, without the first one, which compiles
        self._ready = 0.0  # when the last recorded step was seen to be finished
        self._pending: Callable[[], None] | None = None  # records the step dispatched last

    def record(
        self,
        step: int,
        metrics: Metrics,
        loader_state: dict[str, Any],
        began: float,
        waited: float,
    ) -> None:
        """Takes note of a step just dispatched, and records the one before it.

        `loader_state` is that before its batch; `began` is on the clock of time.perf_counter;
        `waited` is the seconds that its rows and their way to the device took.
        """
        self.flush()
        self._pending = partial(self._record, step, metrics, loader_state, began, waited)
        self.progress = replace(self.progress, done=())

    def done(self, event: str, **values: Any) -> None:
        """Takes note of an event done at the present step."""
        self.progress = replace(self.progress, done=(*self.progress.done, event), **values)

    def flush(self) -> None:
        """Waits for the step that is still unrecorded, if any, and records it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending()

    def _record(self, step: int, metrics: Metrics, loader_state, began: float, waited: float):
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        dt, self._ready = now - max(self._ready, began), now
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values.get(name, 0.0)):
                raise NonFiniteError(step, f"{name} is {values[name]}", loader_state)
        self.counted += 1
        counted_dt = dt if self.counted > 1 else 0.0
        self._seconds += counted_dt
        smoothed = SMOOTHING * self.progress.smoothed_loss + (1 - SMOOTHING) * values["loss"]
        seconds = self.progress.train_seconds + counted_dt
        self.progress = replace(self.progress, smoothed_loss=smoothed, train_seconds=seconds)
        per_step = self.stage.tokens_per_step
        entry = {
            **values,
            "smoothed_loss": smoothed / (1 - SMOOTHING ** (step + 1)),
            "lr_multiplier": self.stage.lr_multiplier(step),
            **self._speed(step, per_step or values["tokens"], dt, waited),
            "train_seconds": seconds,
        }
        if per_step is not None:
            entry["tokens"] = per_step * (step + 1)
        self.tracker.log("train", step, **entry)
        say(progress_line(step, self.stage.num_steps, entry))

    def _speed(self, step: int, tokens: float, dt: float, waited: float) -> dict[str, float]:
        tokens_per_s = tokens / dt
        speed = {"dt": dt, "tokens_per_s": tokens_per_s, "data_wait": waited}
        if self.stage.peak_flops and self.stage.flops_per_token:
            speed["mfu"] = self.stage.flops_per_token * tokens_per_s / self.stage.peak_flops
        if self.counted > 1:
            left = self.stage.num_steps - step - 1
            speed["eta_seconds"] = left * self._seconds / (self.counted - 1)
        return speed


def progress_line(step: int, num_steps: int, entry: dict[str, float]) -> str:
    """One line of a run's output: what has just been recorded."""
    parts = [
        f"step {step:05d}/{num_steps:05d} ({100 * step / num_steps:.2f}%)",
        f"loss {entry['loss']:.6f} (smoothed {entry['smoothed_loss']:.6f})",
        f"lrm {entry['lr_multiplier']:.2f}",
        f"dt {entry['dt'] * 1e3:.2f} ms (data {entry['data_wait'] * 1e3:.2f})",
        f"{entry['tokens_per_s']:,.0f} tok/s",
    ]
    if "grad_norm" in entry:
        parts.insert(2, f"norm {entry['grad_norm']:.4f}")
    if "reward" in entry:
        parts.insert(1, f"reward {entry['reward']:.4f}")
    if "mfu" in entry:
        parts.append(f"mfu {100 * entry['mfu']:.2f}%")
    if "eta_seconds" in entry:
        parts.append(f"eta {entry['eta_seconds'] / 60:.1f} min")
    return " | ".join(parts)


# --- stopping and garbage -------------------------------------------------------------------------


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
    """SIGTERM, the first Ctrl-C and the terminal's end (SIGHUP) ask the loop to save and end.

    The second Ctrl-C or SIGTERM ends it.
    """
    stop = StopRequest()
    if jax.process_count() > 1:  # there the signal belongs to JAX's coordinator
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.signal = signal.Signals(number).name
        # os.write: print cannot be called while a print is being interrupted.
        with suppress(OSError):  # there may be no terminal any more
            os.write(2, f"\n{stop.signal}: finishing this step, then saving\n".encode())
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else before[number])

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        numbers.append(signal.SIGHUP)
    before: dict[int, Any] = {number: signal.signal(number, ask) for number in numbers}
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
