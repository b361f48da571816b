"""Causal attention with a left window, one function for each way of computing it.

Shapes: B batch, T time, N query heads, K key/value heads (N a multiple of K), H head dim.
A query at position i sees keys j with 0 <= i − j <= window, so window + 1 keys, itself included.

* `blocked`: plain XLA for every device. Blocks of queries, each against only the keys that its
  window reaches; the backward pass recomputes the probabilities from the saved log-sum-exp, so
  nothing of size T×T is kept (FlashAttention's recomputation, arXiv 2205.14135).
* `cudnn`: the fused kernels of an NVIDIA GPU (bfloat16, T a multiple of 128).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128  # queries per block; measured best on CPU between 64 and 128


def causal_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, implementation: str
) -> jax.Array:
    """Softmax(q·k / sqrt(H)) · v over the window, as (B, T, N, H) in q's dtype.

    `implementation` is "blocked" or "cudnn"; both mean the same mathematics.
    """
    if implementation == "cudnn":
        reach = None if window >= q_BTNH.shape[1] else (window, 0)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=reach, implementation="cudnn"
        )
    if implementation != "blocked":
        raise ValueError(f"attention is 'blocked' or 'cudnn', not {implementation!r}")
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out_BKGTH = _blocked(q_BKGTH, k_BKTH, v_BKTH, window)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# --- blocked --------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(q_BKGTH, k_BKTH, v_BKTH, window):
    return _blocked_forward(q_BKGTH, k_BKTH, v_BKTH, window)[0]


def _blocked_forward(q_BKGTH, k_BKTH, v_BKTH, window):
    outs, logsums = [], []
    for queries, keys in _blocks(q_BKGTH.shape[3], window):
        v = v_BKTH[:, :, keys]
        scores = _scores(q_BKGTH[:, :, :, queries], k_BKTH[:, :, keys], queries, keys, window)
        logsum = jax.nn.logsumexp(scores, axis=-1)
        p = jnp.exp(scores - logsum[..., None]).astype(v.dtype)
        outs.append(jnp.einsum("bkgts,bksh->bkgth", p, v))
        logsums.append(logsum)
    out = jnp.concatenate(outs, axis=3)
    return out, (q_BKGTH, k_BKTH, v_BKTH, out, logsums)


def _blocked_backward(window, saved, dout):
    q, k, v, out, logsums = saved
    scale = q.shape[-1] ** -0.5
    # Σ_s p·dp of each query, needed by the softmax's derivative, equals out·dout.
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dqs = []
    for (queries, keys), logsum in zip(_blocks(q.shape[3], window), logsums, strict=True):
        q_b, dout_b, k_b = q[:, :, :, queries], dout[:, :, :, queries], k[:, :, keys]
        p = jnp.exp(_scores(q_b, k_b, queries, keys, window) - logsum[..., None])
        dp = _einsum32("bkgth,bksh->bkgts", dout_b, v[:, :, keys])
        ds = (p * (dp - delta[:, :, :, queries, None]) * scale).astype(q.dtype)
        dqs.append(jnp.einsum("bkgts,bksh->bkgth", ds, k_b))
        dk = _add_at(dk, keys, _einsum32("bkgts,bkgth->bksh", ds, q_b))
        dv = _add_at(dv, keys, _einsum32("bkgts,bkgth->bksh", p.astype(v.dtype), dout_b))
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(T: int, window: int) -> list[tuple[slice, slice]]:
    """(queries, keys that any of them sees), in order."""
    return [
        (slice(start, min(start + BLOCK, T)), slice(max(0, start - window), min(start + BLOCK, T)))
        for start in range(0, T, BLOCK)
    ]


def _scores(q_BKGtH, k_BKsH, queries: slice, keys: slice, window: int):
    """Scaled scores in float32, −inf where a query does not see a key."""
    scores = _einsum32("bkgth,bksh->bkgts", q_BKGtH, k_BKsH) * q_BKGtH.shape[-1] ** -0.5
    distance = jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)
    return jnp.where((distance >= 0) & (distance <= window), scores, -jnp.inf)


def _add_at(total_BKTH, keys: slice, part_BKsH):
    """total.at[:, :, keys].add(part), where all the keys are no index: the empty one that `at`
    makes of them crashes the compiler of JAX 0.11.2 in a program for several devices."""
    if part_BKsH.shape == total_BKTH.shape:
        return total_BKTH + part_BKsH
    return total_BKTH.at[:, :, keys].add(part_BKsH)


_einsum32 = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention_kernel(name: str, dtype: Any, sequence_len: int, head_dim: int) -> str:
    """The attention to compile: "auto" is cudnn wherever its conditions hold."""
    if name not in ("auto", "blocked", "cudnn"):
        raise ValueError(f"attention is auto, blocked or cudnn, not {name!r}")
    wrong = _why_not_cudnn(dtype, sequence_len, head_dim)
    if name == "cudnn" and wrong:
        raise ValueError(f"attention=cudnn needs {wrong}; use attention=blocked")
    return "blocked" if name == "blocked" or wrong else "cudnn"


def _why_not_cudnn(dtype: Any, sequence_len: int, head_dim: int) -> str | None:
    if "NVIDIA" not in jax.devices()[0].device_kind:
        return f"an NVIDIA GPU, not {jax.devices()[0].device_kind!r}"
    if dtype != jnp.bfloat16:
        return "dtype=bfloat16"
    if sequence_len % 128:
        return f"rows of a multiple of 128 tokens, not {sequence_len}"
    if head_dim % 8 or head_dim > 128:
        return f"heads of a multiple of 8 and at most 128, not {head_dim}"
    return None
