"""Bits per byte against the original's, on any number of devices, and where there is no text."""

import math

import jax
import numpy as np
import pytest

from nanochat_jax.evals.bits_per_byte import bits_per_byte, evaluate
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.interop.names import params_from_torch
from nanochat_jax.sharding import from_logical, make_mesh
from nanochat_jax.train import Batch, make_eval_step, put_batch


def test_one_bit_for_each_byte():
    assert bits_per_byte(math.log(2) * 100, 100) == pytest.approx(1.0)
    assert bits_per_byte(0.0, 0) == math.inf


@pytest.fixture(scope="module")
def original(golden):
    meta, arrays = golden.json("loss_eval"), golden.npz("loss_eval")
    config = GPTConfig(**golden.json("gpt2026_forward")["config"])
    weights = golden.npz("gpt2026_forward")
    params = params_from_torch(
        config, {n[6:]: w for n, w in weights.items() if n.startswith("param/")}
    )
    return meta, arrays, GPT(config), params


@pytest.mark.golden
@pytest.mark.parametrize("n_devices", [1, 3])
def test_the_original_s_figures(original, n_devices):
    meta, arrays, model, params = original
    rows = len(arrays["x0"])
    if rows % n_devices:
        pytest.skip(f"{rows} rows cannot be divided among {n_devices} devices")
    mesh = make_mesh(n_devices)
    eval_step = make_eval_step(model, mesh)
    on_mesh = from_logical(params, mesh)

    def batch(index, targets=None):
        inputs = arrays[f"x{index}"][None]
        return Batch(inputs, arrays[f"y{index}"][None] if targets is None else targets)

    def bpb(*batches):
        return evaluate(eval_step, on_mesh, batches, arrays["token_bytes"])

    special = np.flatnonzero(arrays["token_bytes"] == 0)[0]
    shape = (1, *arrays["y0"].shape)
    cases = {
        "both": [batch(0), batch(1)],
        "first_only": [batch(0)],
        "second_only": [batch(1)],
        "all_ignored": [batch(0, np.full(shape, -1, np.int32))],
        "only_special_targets": [batch(0, np.full(shape, special, np.int32))],
    }
    for name, batches in cases.items():
        assert bpb(*batches)["bpb"] == pytest.approx(float(meta["bpb"][name]), rel=2e-6), name
    both = bpb(batch(0), batch(1))
    assert both["tokens"] == sum((arrays[f"y{i}"] >= 0).sum() for i in (0, 1))
    supervised = np.concatenate([arrays[f"losses{i}"][arrays[f"y{i}"] >= 0] for i in (0, 1)])
    assert both["loss"] == pytest.approx(supervised.mean(dtype=np.float64), rel=2e-6)


def test_many_batches_are_added_exactly():
    """Float32 would lose the small addends."""

    def eval_step(params, batch, token_bytes):
        return {"nats": np.float32(batch), "bytes": 1, "loss_sum": np.float32(batch), "tokens": 1}

    result = evaluate(eval_step, {}, [1e8, *[1.0] * 1000], None)
    assert result["loss"] == pytest.approx((1e8 + 1000) / 1001, rel=1e-12)


def test_no_batches():
    assert evaluate(lambda *_: {}, {}, [], None)["bpb"] == math.inf


def test_rows_of_text_and_their_bytes():
    """A model that knows nothing pays log2(V) bits a token, over the bytes of text targets."""
    config = GPTConfig(
        sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32,
        window_pattern="L",
    )  # fmt: skip
    model, mesh = GPT(config), make_mesh(2)
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 1), np.int32)))
    zeros = {n: np.zeros(leaf.shape, np.float32) for n, leaf in fresh["params"].items()}
    token_bytes = np.full(64, 2, np.int32)
    token_bytes[63] = 0  # special
    rows = np.random.default_rng(0).integers(0, 64, (4, 9), dtype=np.int32)
    batches = [put_batch(rows, 1, mesh)]
    result = evaluate(make_eval_step(model, mesh), from_logical(zeros, mesh), batches, token_bytes)
    text = (rows[:, 1:] != 63).sum()
    assert result["bytes"] == 2 * text
    assert result["bpb"] == pytest.approx(6 / 2, rel=1e-5)
    assert result["loss"] == pytest.approx(math.log(64), rel=1e-5)
