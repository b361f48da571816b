"""The model against the original's numbers, and properties that must hold for any numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from nanochat_jax.gpt import GPT, GPTConfig, init_params, softcap_cross_entropy
from nanochat_jax.interop.names import params_from_torch
from nanochat_jax.train import sum_of


def load(golden, recipe):
    arrays, about = golden.npz(f"gpt{recipe}_forward"), golden.json(f"gpt{recipe}_forward")
    model = GPT(GPTConfig(recipe=recipe, **about["config"]))
    return model, arrays, about


def from_torch(model, arrays, prefix):
    named = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return params_from_torch(model.config, named)


@pytest.mark.golden
@pytest.mark.parametrize("recipe", ["2025", "2026"])
def test_logits_losses_and_gradients_equal_the_original(golden, recipe):
    model, arrays, about = load(golden, recipe)
    params = from_torch(model, arrays, "param/")
    tokens, targets = arrays["tokens"], arrays["targets"]

    def mean_loss(params):
        losses = model.apply({"params": params}, tokens, targets, method="losses")
        return sum_of(losses) / np.sum(targets >= 0), losses

    (loss, losses), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
    logits = jax.jit(model.apply)({"params": params}, tokens)
    # Twice what float32 differs from float64 in the original (golden/README, tolerances).
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(losses, arrays["losses"], atol=6e-6, rtol=0)
    assert abs(loss - about["mean_loss"]) < 1.5e-6
    for name, expected in from_torch(model, arrays, "grad/").items():
        worst = np.abs(gradients[name] - expected).max() / np.abs(expected).max()
        assert worst < (1.5e-5 if name == "backout_lambda" else 4e-6), (name, worst)


@pytest.mark.golden
def test_windows_apply_beyond_the_training_length(golden):
    model, arrays, about = load(golden, "2026")
    assert [list(w) for w in about["window_sizes"]] == [[w, 0] for w in model.config.window_sizes]
    params = from_torch(model, arrays, "param/")
    logits = jax.jit(model.apply)({"params": params}, arrays["long_tokens"])
    np.testing.assert_allclose(logits[:, -64:], arrays["long_logits_last64"], atol=1e-5, rtol=0)


SMALL = {
    "sequence_len": 32,
    "vocab_size": 50,
    "n_layer": 3,
    "n_head": 2,
    "n_kv_head": 1,
    "n_embd": 32,
}


def small_model(recipe):
    model = GPT(GPTConfig(recipe=recipe, **SMALL))
    return model, random_params(model.config)


@pytest.mark.parametrize("recipe", ["2025", "2026"])
def test_causality_is_exact(recipe):
    """An output's gradient is exactly zero in every row that only later tokens read."""
    model, params = small_model(recipe)
    tokens = np.random.default_rng(2).permutation(50)[None, :20]  # all different

    @jax.jit
    def gradient_of_output_at(t):
        stream = lambda p: model.apply({"params": p}, tokens, method="hidden")  # noqa: E731
        gradients = jax.grad(lambda p: jnp.sum(stream(p)[0, t] ** 3))(params)
        return [gradients[name] for name in ("wte", "value_embeds") if name in gradients]

    for t in (0, 7, 18):
        for table in gradient_of_output_at(t):
            assert np.all(table[..., tokens[0, t + 1 :], :] == 0.0)
            assert np.any(table[..., tokens[0, t], :] != 0.0)


@pytest.mark.parametrize("recipe", ["2025", "2026"])
def test_a_prefix_has_the_logits_it_has_inside_a_longer_text(recipe):
    model, params = small_model(recipe)
    logits = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    tokens = np.random.default_rng(5).integers(0, 50, (1, 32))
    for length in (1, 2, 17):
        prefix = logits(tokens[:, :length])
        np.testing.assert_allclose(prefix, logits(tokens)[:, :length], atol=2e-5)


def test_losses_ignore_masked_targets_and_padding_columns():
    model, params = small_model("2026")
    tokens = jnp.zeros((1, 8), jnp.int32)
    targets = jnp.array([[-1, 3, -1, 49, 0, -1, 1, 2]])
    losses = jax.jit(partial(model.apply, method="losses"))({"params": params}, tokens, targets)
    logits = jax.jit(model.apply)({"params": params}, tokens)
    assert logits.shape == (1, 8, 50)
    expected = -jax.nn.log_softmax(logits)[0, np.arange(8), targets[0]]
    np.testing.assert_allclose(losses[0], jnp.where(targets[0] >= 0, expected, 0), atol=2e-6)


def test_cross_entropy_is_finite_for_extreme_logits():
    """Capped at ±15 the sum of exponentials neither overflows nor vanishes."""
    logits = jnp.array([[[1e4, -1e4, 0.0], [-1e30, -1e30, -1e30]]])
    losses, pull = jax.vjp(lambda z: softcap_cross_entropy(z, jnp.array([[1, 2]])), logits)
    assert np.all(np.isfinite(losses))
    assert np.all(np.isfinite(pull(jnp.ones_like(losses))[0]))
    np.testing.assert_allclose(losses[0], [30.0, np.log(3)], rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recipe": "2024"}, "recipe is '2025' or '2026'"),
        ({"n_embd": 30}, "n_embd=30"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head=4 must be a multiple of n_kv_head=3"),
        ({"window_pattern": "SXL"}, "made of S and L"),
    ],
)
def test_impossible_shapes_are_refused_in_one_sentence(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(SMALL | wrong))


def test_initial_values_follow_the_recipe():
    model = GPT(GPTConfig(n_layer=4, n_embd=128, n_head=2, n_kv_head=2, vocab_size=4096))
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    bound = (3 / 128) ** 0.5
    assert np.all(params["qo"][1::2] == 0)
    assert np.all(params["proj"] == 0)
    for name, low, high in [("kv", -bound, bound), ("fc", -0.4 * bound, 0.4 * bound)]:
        values = params[name]
        assert low <= values.min() < 0.99 * low
        assert 0.99 * high < values.max() <= high
    assert abs(np.std(params["wte"]) - 0.8) < 0.01
    assert abs(np.std(params["lm_head"]) - 0.001) < 2e-5
    np.testing.assert_allclose(
        params["resid_lambdas"], [1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]
    )
    np.testing.assert_allclose(params["x0_lambdas"], [0.2, 0.15, 0.1, 0.05], rtol=1e-6)
    assert params["smear_lambda"] == 0
    assert params["backout_lambda"] == np.float32(0.2)
