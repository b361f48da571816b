"""The loop on a small real training step: order of events, resuming, stopping, bad numbers."""

import gc
import os
import signal
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.runs import Tracker, cut_metrics, read_metrics
from nanochat_jax.stages.loop import (
    StopRequest,
    garbage_collector_paused,
    stop_on_signals,
    train,
)
from nanochat_jax.stages.saving import LoopProgress, NonFiniteError
from nanochat_jax.stages.settings import RunSettings
from nanochat_jax.train import TrainState

CONFIG = RunSettings(eval_every=4, sample_every=5, save_every=3)
TIMES = {"dt", "tokens_per_s", "data_wait", "mfu", "eta_seconds", "train_seconds"}


class Rows:
    """Rows whose values are the number of the batch; the state is that number."""

    def __init__(self, at: int = 0):
        self.at = at

    def __next__(self) -> np.ndarray:
        self.at += 1
        return np.full((2, 3), self.at - 1, np.float32)

    def get_state(self):
        return {"at": self.at}


@jax.jit
def train_step(state, batch):
    """Follows the batch: loss is the squared distance; not finite at batch 1000."""
    w = state.params["w"]
    loss = jnp.mean((batch - w) ** 2) + jnp.where(batch[0, 0] == 1000, jnp.nan, 0.0)
    params = {"w": w + 0.1 * jnp.mean(batch - w)}
    return TrainState(state.step + 1, params, ()), {"loss": loss, "grad_norm": jnp.abs(w).sum()}


def fresh(step: int = 0):
    return TrainState(jnp.int32(step), {"w": jnp.zeros(3)}, ())


class World:
    """A stage of ten steps that remembers what was saved and in which order things happened."""

    num_steps, tokens_per_step = 10, 32
    flops_per_token, peak_flops = 1e3, 1e9
    defer_metrics = True

    def __init__(self, folder, config=CONFIG):
        self.folder, self.config = folder, config
        self.saved: dict[int, tuple] = {}
        self.events: list[str] = []
        self.before_step = lambda step: None
        self.measure = lambda params: {"bpb": float(params["w"][0]), "tokens": 8}

    def run(self, state=None, progress=None, stop=None, at=None):
        state = fresh() if state is None else state
        rows = Rows(int(state.step) if at is None else at)
        tracker, progress = Tracker(self.folder), progress or LoopProgress()
        try:
            save = partial(self._save, rows)
            return train(self, state, progress, rows, tracker, save, stop or StopRequest())
        finally:
            tracker.close()

    def lr_multiplier(self, step):
        return 1 / (step + 1)

    def put(self, rows):
        return jnp.asarray(rows)

    def train_step(self):
        return self._step

    def resume(self, step: int, **how):
        state, progress, _ = self.saved[step]
        keep = {"train": step - 1, "plan": step} | dict.fromkeys(progress.done, step)
        cut_metrics(self.folder, lambda r: r["step"] <= keep.get(r["kind"], step - 1))
        return self.run(state, progress, **how)

    def trace(self):
        """The records without what depends on the clock."""
        return [
            {name: value for name, value in record.items() if name not in TIMES}
            for record in read_metrics(self.folder)
        ]

    def _step(self, state, batch):
        self.before_step(int(batch[0, 0]))
        self.events.append(f"step {int(batch[0, 0])}")
        return train_step(state, batch)

    def evaluate(self, params, stopped):
        self.events.append("val")
        return self.measure(params)

    def sample(self, params):
        self.events.append("sample")
        return [("a", "b")]

    def _save(self, rows, state, progress):
        self.events.append("save")
        assert int(state.step) not in self.saved
        self.saved[int(state.step)] = (state, progress, rows.get_state())


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_events_come_in_order_and_at_the_end_all_of_them(world):
    outcome = world.run()
    assert int(outcome.state.step) == 10
    assert outcome.stopped_by is None
    steps = [f"step {i}" for i in range(10)]
    assert world.events == [
        "val", *steps[:3], "save", steps[3], "val", steps[4], "sample", steps[5], "save",
        *steps[6:8], "val", steps[8], "save", steps[9], "val", "sample", "save",
    ]  # fmt: skip
    assert {step: state["at"] for step, (_, _, state) in world.saved.items()} == {
        3: 3, 6: 6, 9: 9, 10: 10
    }  # fmt: skip


def test_every_step_is_recorded_with_its_own_numbers(world):
    world.run()
    state, smoothed = fresh(), 0.0
    records = [record for record in read_metrics(world.folder) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(10))
    for step, record in enumerate(records):
        state, metrics = train_step(state, jnp.full((2, 3), step, jnp.float32))
        smoothed = 0.9 * smoothed + 0.1 * float(metrics["loss"])
        assert record["loss"] == float(metrics["loss"])
        assert record["grad_norm"] == float(metrics["grad_norm"])
        assert record["smoothed_loss"] == pytest.approx(smoothed / (1 - 0.9 ** (step + 1)))
        assert record["lr_multiplier"] == 1 / (step + 1)
        assert record["tokens"] == 32 * (step + 1)
        assert record["tokens_per_s"] == pytest.approx(32 / record["dt"])
        assert record["mfu"] == pytest.approx(record["tokens_per_s"] * 1e3 / 1e9)
    assert records[-1]["eta_seconds"] == 0
    counted = sum(record["dt"] for record in records[1:])  # the first step compiles
    assert records[-1]["train_seconds"] == pytest.approx(counted)


def test_a_step_is_read_only_after_the_next_was_dispatched(world, monkeypatch):
    world.config = RunSettings(eval_every=0, sample_every=0, save_every=0)
    log = Tracker.log

    def noted(self, kind, step, **values):
        world.events.append(f"{kind} {step}")
        log(self, kind, step, **values)

    monkeypatch.setattr(Tracker, "log", noted)
    world.run()
    order = {event: i for i, event in enumerate(world.events)}
    for step in range(9):
        assert order[f"train {step}"] > order[f"step {step + 1}"]
        assert f"step {step + 2}" not in order or (
            order[f"train {step}"] < order[f"step {step + 2}"]
        )


@pytest.mark.parametrize("at", [3, 6, 9, 10])
def test_resuming_any_checkpoint_gives_the_trace_of_an_uninterrupted_run(world, at):
    world.run()
    whole = world.trace()
    saved = dict(world.saved)
    world.saved = {at: saved[at]}
    outcome = world.resume(at)
    assert world.trace() == whole
    assert sorted(world.saved) == [step for step in sorted(saved) if step >= at]
    np.testing.assert_array_equal(outcome.state.params["w"], saved[10][0].params["w"])


def test_a_request_to_stop_saves_once_and_the_trace_stays_the_same(world, tmp_path):
    whole = World(tmp_path / "whole")
    whole.folder.mkdir()
    whole.run()
    # 3 and 6 are saved anyway, 4 and 5 are to be measured and sampled, 7 is nothing.
    for at in (3, 4, 5, 6, 7):
        run = World(tmp_path / str(at))
        run.folder.mkdir()
        with stop_on_signals() as stop:

            def send(step, at=at):
                if step == at - 1:
                    os.kill(os.getpid(), signal.SIGTERM)

            run.before_step = send
            outcome = run.run(stop=stop)
        assert (int(outcome.state.step), outcome.stopped_by) == (at, "SIGTERM")
        assert max(run.saved) == at
        run.before_step = lambda step: None
        run.resume(at)
        assert run.trace() == whole.trace()


def test_the_end_of_the_terminal_saves_but_not_under_nohup(world, monkeypatch):
    world.before_step = lambda step: step == 1 and os.kill(os.getpid(), signal.SIGHUP)
    with stop_on_signals() as stop:
        monkeypatch.setattr(os, "write", broken)  # there is no terminal any more
        outcome = world.run(stop=stop)
        os.kill(os.getpid(), signal.SIGHUP)  # shells send a second one
    assert (int(outcome.state.step), outcome.stopped_by, max(world.saved)) == (2, "SIGHUP", 2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal is None
    signal.signal(signal.SIGHUP, before)


def broken(*args):
    raise BrokenPipeError


def test_a_stop_during_measuring_leaves_it_for_the_resumed_run(world):
    with stop_on_signals() as stop:

        def interrupted(params):
            if len(world.events) < 3:
                return {"bpb": 1.0}
            os.kill(os.getpid(), signal.SIGTERM)
            return None

        world.measure = interrupted
        outcome = world.run(stop=stop)
    assert (int(outcome.state.step), outcome.stopped_by) == (4, "SIGTERM")
    assert world.saved[4][1].done == ("save",)
    world.measure = lambda params: {"bpb": 0.5}
    world.resume(4)
    assert [r["step"] for r in world.trace() if r["kind"] == "val"] == [0, 4, 8, 10]


def test_the_second_interrupt_is_not_caught(world):
    handler = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_non_finite_loss_names_step_and_batch_and_saves_nothing_more(world):
    with pytest.raises(NonFiniteError, match="loss is nan at step 2") as caught:
        world.run(at=998)  # its third batch is number 1000
    assert caught.value.loader_state == {"at": 1000}
    assert world.saved == {}
    assert [r["step"] for r in world.trace() if r["kind"] == "train"] == [0, 1]


def test_a_non_finite_gradient_stops_too(world):
    state = replace(fresh(5), params={"w": jnp.array([jnp.inf, 0, 0])})
    with pytest.raises(NonFiniteError, match="at step 5"):
        world.run(state)
    assert world.saved == {}


def test_the_best_bpb_is_kept_over_a_resume(world):
    bpbs = iter([3.0, 1.0, 2.0, 2.5])
    world.measure = lambda params: {"bpb": next(bpbs)}
    outcome = world.run()
    assert (outcome.progress.best_val_bpb, outcome.progress.val_bpb) == (1.0, 2.5)
    assert world.saved[6][1].best_val_bpb == 1.0
    assert "val" not in world.saved[6][1].done  # measured at step 4, not at 6
    assert "val" in world.saved[10][1].done


def test_a_finished_run_has_nothing_left_to_do(world):
    world.run()
    world.events.clear()
    outcome = world.resume(10)
    assert world.events == []
    assert int(outcome.state.step) == 10


def test_smoothing_does_not_depend_on_where_the_run_was_cut(world):
    progress = LoopProgress(smoothed_loss=5.0)
    world.num_steps = 4
    world.config = RunSettings(eval_every=0, sample_every=0, save_every=0)
    world.run(fresh(3), progress)
    record = read_metrics(world.folder)[-1]
    assert record["smoothed_loss"] == pytest.approx((4.5 + 0.1 * 9.0) / (1 - 0.9**4))


def test_the_garbage_collector_is_off_inside_and_as_before_outside():
    with garbage_collector_paused() as collect:
        assert not gc.isenabled()
        collect()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
