"""Blocked attention against a dense softmax with the mask written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.attention import BLOCK, causal_attention


def dense(q, k, v, window):
    _, T, N, H = q.shape
    k, v = (jnp.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / H**0.5
    distance = np.arange(T)[:, None] - np.arange(T)
    scores = jnp.where((distance >= 0) & (distance <= window), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


def random_qkv(T, N, K, H=8, B=2):
    keys = jax.random.split(jax.random.key(T), 3)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H)]
    return [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]


@settings(max_examples=12, deadline=None)
@given(
    T=st.sampled_from([1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7]),
    window=st.sampled_from([0, 1, 50, BLOCK, 10**6]),
    heads=st.sampled_from([(2, 2), (4, 2), (4, 1)]),
)
def test_outputs_and_gradients_equal_dense_attention(T, window, heads):
    qkv = random_qkv(T, *heads)
    weight = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def value(attend):
        return jax.jit(jax.value_and_grad(lambda args: jnp.sum(weight * attend(*args))))(qkv)

    blocked = value(lambda q, k, v: causal_attention(q, k, v, window, "blocked"))
    expected = value(lambda q, k, v: dense(q, k, v, window))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), blocked, expected
    )


def test_bfloat16_keeps_its_dtype_and_stays_close():
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(200, 4, 2, H=64))
    out = causal_attention(q, k, v, 64, "blocked")
    assert out.dtype == jnp.bfloat16
    expected = dense(*(x.astype(jnp.float32) for x in (q, k, v)), 64)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'blocked' or 'cudnn', not 'flash'"):
        causal_attention(*random_qkv(4, 2, 2), 4, "flash")
