"""Checkpoints: exact, kept and deleted by rule, for any number of devices, safe against kill -9."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_optim import for_recipe

from nanochat_jax.checkpoint import Checkpoints, load_model, model_meta
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.optim import make_optimizer
from nanochat_jax.runs import DamagedError
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train import (
    TrainState,
    abstract_logical_state,
    init_state,
    make_state_to_logical,
    make_train_step,
    put_batch,
)

# 3 layers: no number of devices but 1 divides the stacks, so padding is always there.
CONFIG = GPTConfig(
    sequence_len=16, vocab_size=300, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L"
)
MODEL = GPT(CONFIG)
OPTIMIZER = make_optimizer(CONFIG, for_recipe("2026", 20))
ROWS = np.random.default_rng(0).integers(0, 300, (4, 8, 17), dtype=np.int32)


class Run:
    """A tiny training run on so many devices."""

    def __init__(self, n_devices: int):
        self.mesh = make_mesh(n_devices)
        self.step = make_train_step(MODEL, OPTIMIZER, self.mesh)
        self.abstract = abstract_logical_state(MODEL, OPTIMIZER, self.mesh)

    def fresh(self):
        return init_state(MODEL, OPTIMIZER, self.mesh, jax.random.key(0))

    def train(self, state, first: int, count: int):
        losses = []
        for rows in ROWS[first : first + count]:
            state, metrics = self.step(state, put_batch(rows, 1, self.mesh))
            losses.append(float(metrics["loss"]))
        return state, losses

    def logical(self, state):
        return make_state_to_logical(MODEL, OPTIMIZER, self.mesh)(state)

    def restore(self, checkpoints, step):
        return from_logical(checkpoints.restore(step, self.abstract), self.mesh)


@pytest.fixture(scope="module")
def run1():
    return Run(1)


@pytest.fixture(scope="module")
def run2():
    return Run(2)


def numpy_state(run, state):
    return jax.tree.map(np.asarray, run.logical(state))


def test_training_continues_exactly_where_it_was_saved(run1, tmp_path):
    state, _ = run1.train(run1.fresh(), 0, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run1.logical(state), {"note": "x"}, {"at": [1, 2]})
        # One device pads nothing: the very arrays being written are given away to the next step.
        state, losses = run1.train(state, 2, 2)
        end = numpy_state(run1, state)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2]
        assert checkpoints.meta(2) == {"note": "x"}
        assert checkpoints.loader_state(2) == {"at": [1, 2]}
        restored = run1.restore(checkpoints, 2)
    assert int(restored.step) == 2
    restored, again = run1.train(restored, 2, 2)
    assert again == losses
    jax.tree.map(np.testing.assert_array_equal, numpy_state(run1, restored), end)


def test_another_number_of_devices_restores_the_same_arrays(run1, run2, tmp_path):
    state, _ = run2.train(run2.fresh(), 0, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(run2.logical(state), {}, None)
        checkpoints.wait()
        for other in (run1, Run(8)):
            restored = other.restore(checkpoints, 1)
            jax.tree.map(
                np.testing.assert_array_equal,
                numpy_state(other, restored),
                numpy_state(run2, state),
            )


def small_state(step: int):
    abstract = abstract_logical_state(MODEL, OPTIMIZER, make_mesh(1))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    return replace(zeros, step=jnp.int32(step))


def test_the_last_k_and_the_best_are_kept(tmp_path):
    state = small_state(0)
    bpbs = {1: 3.0, 2: 1.5, 3: None, 4: 2.0, 5: 1.9, 6: None}
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step, bpb in bpbs.items():
            checkpoints.save(replace(state, step=jnp.int32(step)), {"val_bpb": bpb}, None)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert (checkpoints.best(), checkpoints.latest()) == (2, 6)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"2", "5", "6"}
    with Checkpoints(tmp_path) as checkpoints:  # known from the disk alone
        assert (checkpoints.best(), checkpoints.latest()) == (2, 6)


def test_the_best_of_unmeasured_checkpoints_is_the_latest(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(small_state(step), {}, None)
        checkpoints.wait()
        assert checkpoints.steps() == [3]
        assert checkpoints.best() == 3


KILLED_WHILE_WRITING = """
import os, signal, sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.train import TrainState

folder = Path(sys.argv[1])
big = lambda fill: TrainState(jnp.int32(fill), {"wte": jnp.full((8000, 1000), fill, jnp.float32)},
                              {"mu": {"wte": jnp.full((8000, 1000), -fill, jnp.float32)}})

def kill_when_a_draft_appears():
    while not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith("2.")]:
        pass
    os.kill(os.getpid(), signal.SIGKILL)

checkpoints = Checkpoints(folder)
checkpoints.save(big(1), {"step": 1}, None)
checkpoints.wait()
threading.Thread(target=kill_when_a_draft_appears, daemon=True).start()
checkpoints.save(big(2), {"step": 2}, None)
checkpoints.wait()
"""


def test_kill_9_during_a_write_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    drafts = [path for path in (tmp_path / "checkpoints").iterdir() if path.name != "1"]
    assert drafts  # the write really was under way
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert checkpoints.meta(1) == {"step": 1}
        placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = {"wte": jax.ShapeDtypeStruct((8000, 1000), jnp.float32, sharding=placed)}
        assert (np.asarray(checkpoints.restore_params(1, abstract)["wte"]) == 1).all()
        # The step whose write was cut off can be written again.
        checkpoints.save(small_state(2), {}, None)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_a_full_disk_is_reported_in_one_sentence(tmp_path, capfd):
    """Simulated by a limit on the size of files; what was saved before stays intact."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    big = {"wte": jnp.asarray(rng.normal(size=(400, 400)), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small_state(1), {}, None)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        checkpoints.save(TrainState(jnp.int32(2), big, {"mu": big}), {}, None)
        try:
            with pytest.raises(
                ValueError, match=r"a checkpoint cannot be written to .*checkpoints"
            ):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "orbax" not in capfd.readouterr().err  # no traceback of theirs
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """A run with two checkpoints, at steps 3 and 4."""
    folder = tmp_path_factory.mktemp("sealed")
    with Checkpoints(folder) as checkpoints:
        for step in (3, 4):
            ones = {"wte": jnp.full((8, 8), step, jnp.float32)}
            state = TrainState(jnp.int32(step), ones, {"mu": ones})
            checkpoints.save(state, {"x": 1, "val_bpb": 1.0 * step}, {"at": step})
    return folder


@pytest.fixture
def copy(sealed, tmp_path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "copy"))


def read_all(folder: Path, step: int):
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = {"wte": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=placed)}
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=placed)
    with Checkpoints(folder) as checkpoints:
        checkpoints.check(step)
        checkpoints.meta(step), checkpoints.loader_state(step)
        return checkpoints.restore(step, TrainState(count, leaf, {"mu": leaf})).params["wte"]


def flip(path: Path, where: float = 0.5) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_refused_and_the_file_named(copy):
    checkpoint = copy / "checkpoints" / "4"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    parts = {path.relative_to(checkpoint).parts[0] for path in files}
    assert {"params", "opt_state", "meta", "loader", "metrics", "SHA256SUMS"} <= parts
    assert (np.asarray(read_all(copy, 4)) == 4).all()
    for path in files:
        whole = path.read_bytes()
        for where in (0, 0.3, 0.99):
            flip(path, where)
            with pytest.raises(DamagedError, match="/checkpoints/4/") as refused:
                read_all(copy, 4)
            assert path.name in str(refused.value)
        path.write_bytes(whole)
    assert (np.asarray(read_all(copy, 4)) == 4).all()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    (path.parent / "more").write_bytes(b"")


def swap(path: Path) -> None:
    shutil.copy(str(path).replace("/4/", "/3/"), path)


def hollow(path: Path) -> None:
    shutil.rmtree(path.parents[1])
    path.parents[1].mkdir()


@pytest.mark.parametrize("damage", [cut, Path.unlink, grow, swap, hollow])
@pytest.mark.parametrize("name", ["meta/metadata", "loader/metadata", "params/_METADATA"])
def test_damage_of_any_kind_is_refused(copy, damage, name):
    if damage is swap and name == "params/_METADATA":
        name = "params/array_metadatas/process_0"  # two steps' _METADATA are equal
    path = copy / "checkpoints" / "4" / name
    before = path.read_bytes()
    damage(path)
    if damage is swap and path.read_bytes() == before:
        pytest.skip("the files of both steps are equal")
    with pytest.raises(DamagedError, match="/checkpoints/4"):
        read_all(copy, 4)
    assert (np.asarray(read_all(copy, 3)) == 3).all()


def test_missing_checksums_are_no_old_checkpoint(copy, capsys):
    (copy / "checkpoints" / "4" / "SHA256SUMS").unlink()
    with pytest.raises(DamagedError, match="SHA256SUMS is missing"):
        read_all(copy, 4)
    assert "not verified" not in "".join(capsys.readouterr())


def make_old(checkpoint: Path) -> None:
    """As it was saved before there were checksums."""
    (checkpoint / "SHA256SUMS").unlink()
    about = checkpoint / "_CHECKPOINT_METADATA"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"custom_metadata": {}}))


def test_a_checkpoint_from_before_loads_and_one_line_says_that_it_is_not_verified(copy, capsys):
    old = copy / "checkpoints" / "4"
    make_old(old)
    assert (np.asarray(read_all(copy, 4)) == 4).all()
    assert capsys.readouterr().err.count("not verified") == 1
    for data in (old / "params" / "d").iterdir():
        data.write_bytes(b"")
    with pytest.raises(DamagedError, match="checkpoints/4/params cannot be read"):
        read_all(copy, 4)
    (old / "meta" / "metadata").write_text('{"x":')
    with pytest.raises(DamagedError, match="checkpoints/4/meta/metadata is damaged"):
        Checkpoints(copy).meta(4)


def test_sha256sum_can_check_a_checkpoint(copy):
    command = ["sha256sum", "--quiet", "--strict", "--check", "SHA256SUMS"]
    where = copy / "checkpoints" / "4"
    assert subprocess.run(command, cwd=where, check=False).returncode == 0
    flip(where / "loader" / "metadata")
    assert subprocess.run(command, cwd=where, check=False, capture_output=True).returncode == 1


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    bad = {"wte": jnp.full((8, 8), 1.0).at[3, 3].set(jnp.nan)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(4), bad, {"mu": bad}), {}, None)
    with pytest.raises(DamagedError, match="checkpoints/4: wte are not finite"):
        read_all(tmp_path, 4)


def test_a_clock_that_jumps_by_an_hour_at_every_look_ends_no_save(tmp_path, monkeypatch):
    clock, hours = time.time, iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: clock() + 3600 * next(hours))
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(small_state(step), {}, None)
            checkpoints.wait()
    assert next(hours) > 2  # Orbax looks at it
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_a_run_folder_is_a_model(run2, tmp_path):
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    tokenizer.save(tmp_path / "tokenizer")
    state, _ = run2.train(run2.fresh(), 0, 1)
    later, _ = run2.train(run2.fresh(), 0, 2)
    with Checkpoints(tmp_path) as checkpoints:
        for each, bpb in ((state, 1.0), (later, 2.0)):
            meta = model_meta(CONFIG) | {"val_bpb": bpb}
            checkpoints.save(run2.logical(each), meta, None)
    for step, want in (("best", state), (1, state), ("1", state), ("last", later), (None, later)):
        loaded = load_model(tmp_path, step)
        assert loaded.model.config == CONFIG
        assert loaded.tokenizer.vocab_size == tokenizer.vocab_size
        for name, array in run2.logical(want).params.items():
            np.testing.assert_array_equal(loaded.params[name], array)
    on_mesh = load_model(tmp_path, mesh=make_mesh(8)).params
    assert on_mesh["fc"].shape[0] == 8  # padded for the training and evaluation steps
    np.testing.assert_array_equal(on_mesh["fc"][:3], loaded.params["fc"])
    with pytest.raises(ValueError, match="no step 7; it has 1, 2, last and best"):
        load_model(tmp_path, 7)
    with pytest.raises(ValueError, match="holds no checkpoints"):
        load_model(tmp_path / "elsewhere")
