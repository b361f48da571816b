"""The training step: accumulation, devices, masks and padding never change the mathematics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_optim import for_recipe
from random_params import random_params

from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.optim import make_optimizer
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.train import (
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_state_to_logical,
    make_train_step,
    put_batch,
)

CONFIG = {"sequence_len": 32, "vocab_size": 96, "n_layer": 3}
CONFIG |= {"n_head": 2, "n_kv_head": 1, "n_embd": 32}
KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).integers(0, 96, (3, 16, 33)).astype(np.int32)


def build(recipe, n_devices):
    config = GPTConfig(recipe=recipe, **CONFIG)
    model = GPT(config)
    optimizer = make_optimizer(config, for_recipe(recipe, 10))
    return model, optimizer, make_mesh(n_devices)


def initial_state(model, optimizer, mesh):
    """Nothing zero: at the recipe's own start the 2026 scalars have gradients of pure round-off,
    which AdamW turns into steps of full size, and no two summation orders agree on them."""
    params = random_params(model.config)
    return from_logical(TrainState(jnp.int32(0), params, optimizer.init(params)), mesh)


def run(recipe, n_devices, accumulation, rows=ROWS, grad_clip=0.0):
    """Losses, gradient norms and final logical state of a few steps."""
    model, optimizer, mesh = build(recipe, n_devices)
    step = make_train_step(model, optimizer, mesh, grad_clip)
    state = initial_state(model, optimizer, mesh)
    metrics = []
    for step_rows in rows:
        state, step_metrics = step(state, put_batch(step_rows, accumulation, mesh))
        metrics.append({name: float(value) for name, value in step_metrics.items()})
    return metrics, make_state_to_logical(model, optimizer, mesh)(state)


def test_the_loss_of_many_equal_tokens_has_no_drift():
    """Before its first step the 2025 model gives every token the same probability."""
    model, optimizer, mesh = build("2025", 1)
    batch = put_batch(np.concatenate(ROWS), 1, mesh)
    eval_step = make_eval_step(model, mesh)
    state = init_state(model, optimizer, mesh, KEY)
    sums = eval_step(state.params, batch, jnp.ones(96, jnp.int32))
    assert float(sums["nats"]) == pytest.approx(48 * 32 * np.log(96), rel=2e-7)
    _, metrics = make_train_step(model, optimizer, mesh, 0.0)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(np.log(96), rel=2e-7)


@pytest.fixture(scope="module")
def reference():
    return {recipe: run(recipe, 1, 1) for recipe in ("2025", "2026")}


@pytest.mark.parametrize(
    ("recipe", "n_devices", "accumulation"),
    [("2026", 1, 4), ("2026", 8, 1), ("2026", 4, 2), ("2025", 8, 2)],
)
def test_devices_and_micro_batches_change_nothing(recipe, n_devices, accumulation, reference):
    """6 matrices of qo, 3 of fc: neither 4 nor 8 devices divide them, so this covers padding."""
    expected, expected_state = reference[recipe]
    metrics, state = run(recipe, n_devices, accumulation)
    for ours, one in zip(metrics, expected, strict=True):
        assert ours["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert ours["supervised_tokens"] == 16 * 32
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected_state)


def test_the_step_has_no_empty_arrays():
    """Indices along whole axes are such; JAX 0.11.2 crashes compiling them for several devices."""
    model, optimizer, mesh = build("2026", 2)
    step = make_train_step(model, optimizer, mesh)
    batch = put_batch(ROWS[0], 2, mesh)
    assert "tensor<0x" not in step.lower(abstract_state(model, optimizer, mesh), batch).as_text()


def test_a_state_moves_to_another_number_of_devices(reference):
    """Saved after two steps on 8 devices, continued on 2: the third loss is that of one device."""
    model, optimizer, mesh = build("2026", 2)
    _, saved = run("2026", 8, 1, ROWS[:2])
    moved = jax.tree.map(np.asarray, saved)
    state = from_logical(moved, mesh)
    _, metrics = make_train_step(model, optimizer, mesh)(state, put_batch(ROWS[2], 1, mesh))
    assert float(metrics["loss"]) == pytest.approx(reference["2026"][0][2]["loss"], abs=1e-5)


def test_masked_targets_weigh_nothing_however_they_are_spread():
    """Ignoring half a batch equals training on the other half."""
    half = ROWS[:1, :8]
    masked = np.concatenate([half, ROWS[:1, 8:]], axis=1)
    model, optimizer, mesh = build("2026", 4)
    step = make_train_step(model, optimizer, mesh)
    fresh = partial(initial_state, model, optimizer, mesh)
    batch = put_batch(masked[0], 2, mesh)
    keep = np.arange(16).reshape(2, 8)[..., None] < 8
    batch = batch._replace(targets_ABT=jnp.where(keep, batch.targets_ABT, -1))
    _, ours = step(fresh(), batch)
    _, expected = step(fresh(), put_batch(half[0], 1, mesh))
    assert ours["supervised_tokens"] == 8 * 32
    np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(ours["grad_norm"], expected["grad_norm"], rtol=1e-5)


def test_a_batch_without_supervised_tokens_has_loss_zero():
    model, optimizer, mesh = build("2026", 2)
    batch = put_batch(ROWS[0], 1, mesh)
    batch = batch._replace(targets_ABT=jnp.full_like(batch.targets_ABT, -1))
    state = init_state(model, optimizer, mesh, KEY)
    state, metrics = make_train_step(model, optimizer, mesh)(state, batch)
    assert metrics["loss"] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


def test_clipping_shrinks_the_gradient_and_reports_the_norm_before():
    (plain,), state = run("2025", 4, 1, ROWS[:1])
    (clipped,), shrunk = run("2025", 4, 1, ROWS[:1], grad_clip=plain["grad_norm"] / 2)
    assert clipped == plain
    for before, after in zip(
        *map(jax.tree.leaves, (state.opt_state, shrunk.opt_state)), strict=True
    ):
        if before.ndim:  # first moments are linear in the gradient, second moments quadratic
            ratio = np.linalg.norm(after) / np.linalg.norm(before)
            assert ratio == pytest.approx(0.5, rel=1e-4) or ratio == pytest.approx(0.25, rel=1e-4)


def test_evaluation_sums_nats_and_bytes_over_text_only():
    model, optimizer, mesh = build("2026", 4)
    params = initial_state(model, optimizer, mesh).params
    token_bytes = np.arange(96, dtype=np.int32) % 5  # every fifth token stands for no text
    batch = put_batch(ROWS[0], 2, mesh)
    batch = batch._replace(targets_ABT=batch.targets_ABT.at[0, 0].set(-1))
    sums = make_eval_step(model, mesh)(params, batch, jnp.asarray(token_bytes))
    logical = {"params": params | {"qo": params["qo"][:6], "kv": params["kv"][:6]}}
    logical["params"] |= {"fc": params["fc"][:3], "proj": params["proj"][:3]}
    inputs, targets = (np.asarray(x).reshape(16, 32) for x in batch)
    losses = np.asarray(model.apply(logical, inputs, targets, method="losses"))
    text = (targets >= 0) & (token_bytes[targets] > 0)
    np.testing.assert_allclose(sums["nats"], losses[text].sum(), rtol=1e-5)
    assert sums["bytes"] == token_bytes[targets[text]].sum()
    assert sums["tokens"] == 15 * 32
    np.testing.assert_allclose(sums["loss_sum"], losses.sum(), rtol=1e-5)
