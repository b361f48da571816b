"""The key/value cache: the keys and values of a row's tokens so far, and attention to them.

Each layer keeps a ring of min(capacity, window + 1) positions per row: position p lies in slot
p mod S, and what the layer's window no longer reaches is overwritten. Nothing else is stored about
positions: the row's length determines which position every slot holds.

Shapes: R rows, T new tokens, S slots of a layer, N query heads, K key/value heads, G = N/K, H head
dim.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from nanochat_jax.gpt import GPTConfig


@struct.dataclass
class Cache:
    """The state of R rows. Every leaf has the rows first."""

    keys: tuple[jax.Array, ...]  # (R, K, S, H) of every layer, in the compute dtype
    values: tuple[jax.Array, ...]
    lengths_R: jax.Array  # int32: tokens so far
    # The token before the next one: smear needs its embedding, and an id survives a rewind.
    last_R: jax.Array


def windows(config: GPTConfig) -> tuple[int, ...]:
    """How far each layer looks back: as in training, also in rows longer than those of training."""
    return tuple(min(window, config.sequence_len) for window in config.window_sizes)


def ring_sizes(config: GPTConfig, capacity: int) -> tuple[int, ...]:
    """Positions that each layer keeps, for rows of at most `capacity` tokens."""
    return tuple(min(capacity, window + 1) for window in windows(config))


def empty_cache(config: GPTConfig, rows: int, capacity: int, dtype: Any) -> Cache:
    shapes = [
        (rows, config.n_kv_head, size, config.head_dim) for size in ring_sizes(config, capacity)
    ]
    keys, values = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
    return Cache(keys, values, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))


def can_rewind(config: GPTConfig, capacity: int, length: int, start: int) -> bool:
    """Whether a row of `length` tokens can be cut back to its first `start` and continued.

    It can unless a ring has overwritten a position that the token at `start` still attends to.
    """
    reaches = zip(ring_sizes(config, capacity), windows(config), strict=True)
    return all(length <= size + max(0, start - window) for size, window in reaches)


def attend(q_RTNH, k_RTKH, v_RTKH, keys_RKSH, values_RKSH, lengths_R, counts_R, window: int):
    """Appends the first `counts_R` new keys and values of each row, and attends.

    Returns (outputs (R, T, N, H), keys, values). New token i of a row is at position lengths_R + i
    and attends to what its window reaches: cached positions, new ones before it, itself.
    """
    if q_RTNH.shape[1] == 1:  # its window fits the ring, which may be written before it is read
        put = partial(_append_one, lengths_R=lengths_R, counts_R=counts_R)
        keys, values = put(keys_RKSH, k_RTKH[:, 0]), put(values_RKSH, v_RTKH[:, 0])
        # Without this XLA may recompute the update in every kernel that reads it, from a copy.
        keys, values = jax.lax.optimization_barrier((keys, values))
        return _attend_one(q_RTNH, keys, values, lengths_R), keys, values
    out = _attend_chunk(q_RTNH, k_RTKH, v_RTKH, keys_RKSH, values_RKSH, lengths_R, window)
    return out, *_append(keys_RKSH, values_RKSH, k_RTKH, v_RTKH, lengths_R, counts_R)


def _append_one(ring_RKSH, new_RKH, *, lengths_R, counts_R):
    """Always writes (a row without a new token gets its old value): a conditional write would make
    XLA copy the whole ring."""
    at = (jnp.arange(len(lengths_R)), slice(None), lengths_R % ring_RKSH.shape[2])
    old_RKH = ring_RKSH.at[at].get(mode="promise_in_bounds")
    value_RKH = jnp.where(counts_R[:, None, None] > 0, new_RKH, old_RKH)
    return ring_RKSH.at[at].set(value_RKH, mode="promise_in_bounds", unique_indices=True)


def _append(keys_RKSH, values_RKSH, k_RTKH, v_RTKH, lengths_R, counts_R):
    R, T = k_RTKH.shape[:2]
    S = keys_RKSH.shape[2]
    i_T = jnp.arange(T)
    # Of more tokens than the ring has slots only the last ones are written; slot S does not exist.
    written_RT = (i_T < counts_R[:, None]) & (i_T >= counts_R[:, None] - S)
    slot_RT = jnp.where(written_RT, (lengths_R[:, None] + i_T) % S, S)
    at = (jnp.arange(R)[:, None], slice(None), slot_RT)
    return keys_RKSH.at[at].set(k_RTKH, mode="drop"), values_RKSH.at[at].set(v_RTKH, mode="drop")


def _attend_one(q_R1NH, keys_RKSH, values_RKSH, lengths_R):
    """One new token per row, already in the ring."""
    R, _, N, H = q_R1NH.shape
    K, S = keys_RKSH.shape[1:3]
    q_RKGH = q_R1NH.reshape(R, K, N // K, H)
    scores_RKGS = _einsum32("rkgh,rksh->rkgs", q_RKGH, keys_RKSH) * H**-0.5
    age_RS = (lengths_R[:, None] - jnp.arange(S)) % S  # distance to the token in each slot
    seen_RS = age_RS <= lengths_R[:, None]
    masked = jnp.where(seen_RS[:, None, None], scores_RKGS, -jnp.inf)
    p = jax.nn.softmax(masked, axis=-1).astype(q_R1NH.dtype)
    return jnp.einsum("rkgs,rksh->rkgh", p, values_RKSH).reshape(q_R1NH.shape)


def _attend_chunk(q_RTNH, k_RTKH, v_RTKH, keys_RKSH, values_RKSH, lengths_R, window: int):
    """Several new tokens per row, not yet in the ring: one softmax over the ring and themselves."""
    R, T, N, H = q_RTNH.shape
    K, S = keys_RKSH.shape[1:3]
    q_RTKGH = q_RTNH.reshape(R, T, K, N // K, H)
    old = _einsum32("rtkgh,rksh->rkgts", q_RTKGH, keys_RKSH)
    new = _einsum32("rtkgh,rukh->rkgtu", q_RTKGH, k_RTKH)
    i_T = jnp.arange(T)
    last_R1 = lengths_R[:, None] - 1
    age_RS = (last_R1 - jnp.arange(S)) % S  # distance to the last cached token
    distance_RTS = age_RS[:, None] + 1 + i_T[:, None]
    sees_old = (age_RS <= last_R1)[:, None] & (distance_RTS <= window)
    distance_TT = i_T[:, None] - i_T
    sees_new = (distance_TT >= 0) & (distance_TT <= window)
    masked = (jnp.where(sees_old[:, None, None], old, -jnp.inf), jnp.where(sees_new, new, -jnp.inf))
    scores = jnp.concatenate(masked, axis=-1) * H**-0.5
    p = jax.nn.softmax(scores, axis=-1).astype(q_RTNH.dtype)
    out = jnp.einsum("rkgts,rksh->rtkgh", p[..., :S], values_RKSH)
    out += jnp.einsum("rkgtu,rukh->rtkgh", p[..., S:], v_RTKH)
    return out.reshape(R, T, N, H)


_einsum32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
