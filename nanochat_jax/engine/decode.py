"""Generation on the device: prompts into the cache, and a loop that samples token by token.

These are the per-device programs; engine.py compiles them over the mesh. They know the model only
as a function `forward(weights, cache, tokens_RT, counts_R)` that appends each row's first
counts_R tokens and returns the logits (R, V) after the last of them. With every call the host
passes what the rows are to do (`DecodeInputs`); the cache, each row's next logits and the tokens it
has seen stay on the device (`EngineState`).

Shapes: B rows of the cache, R rows being prefilled, T tokens of a chunk, V vocabulary, C tokens of
a decode chunk, A top logprobs, I stop ids.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nanochat_jax.engine.cache import Cache, attend, windows
from nanochat_jax.engine.sampling import BatchedSamplingParams, sample_tokens
from nanochat_jax.gpt import (
    GPT,
    SOFTCAP,
    GPTConfig,
    Params,
    add_previous,
    embed,
    linear,
    lookup_value_embeds,
    norm,
    residual_scalars,
    rotary,
    transform,
    unstack_layers,
)
from nanochat_jax.sharding import SHARD_DIM

MAX_STOP_IDS = 8
MAX_TOP_LOGPROBS = 20  # most likely tokens reported with each sampled one

type ForwardChunk = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


# --- the model with a cache -----------------------------------------------------------------------


def decode_weights(model: GPT, params: Params) -> dict[str, Any]:
    """The parameters as `forward_chunk` takes them: unstacked by layer, in the compute dtype.

    A slice of a stack inside the decode loop would be copied for every token.
    """
    cast = {n: p.astype(model.dtype) if n in SHARD_DIM else p for n, p in params.items()}
    whole = {n: cast[n] for n in ("wte", "lm_head", "smear_gate", "smear_lambda") if n in cast}
    scalars = residual_scalars(model.config, cast)
    return whole | {"layers": unstack_layers(model.config, cast), "scalars": scalars}


def forward_chunk(config: GPTConfig, dtype: Any, weights, cache: Cache, tokens_RT, counts_R):
    """Appends each row's first `counts_R` tokens: (logits (R, V) after the last one, cache).

    Equals the forward pass over the whole row, however it was cut into chunks. Logits of a row
    without new tokens are undefined. Float32, soft-capped.
    """
    keys, values = [], []

    def attend_layer(layer, q, k, v):
        ring = cache.keys[layer], cache.values[layer]
        window = windows(config)[layer]
        out, new_keys, new_values = attend(q, k, v, *ring, cache.lengths_R, counts_R, window)
        keys.append(new_keys)
        values.append(new_values)
        return out

    with jax.named_scope("embed"):
        x = _embed(config, dtype, weights, cache, tokens_RT)
    positions_RT = cache.lengths_R[:, None] + jnp.arange(tokens_RT.shape[1])
    rope = rotary(positions_RT, config.head_dim, config.rope_base)
    layers = lookup_value_embeds(weights["layers"], tokens_RT, dtype)
    x = transform(config, layers, weights["scalars"], x, rope, attend_layer)
    with jax.named_scope("head"):
        end_R = jnp.maximum(counts_R - 1, 0)
        x_RD = jnp.take_along_axis(x, end_R[:, None, None], axis=1)[:, 0]
        logits_RV = linear(x_RD, weights["lm_head"])[:, : config.vocab_size].astype(jnp.float32)
    token_R = jnp.take_along_axis(tokens_RT, end_R[:, None], axis=1)[:, 0]
    last_R = jnp.where(counts_R > 0, token_R, cache.last_R)
    new = Cache(tuple(keys), tuple(values), cache.lengths_R + counts_R, last_R)
    return SOFTCAP * jnp.tanh(logits_RV / SOFTCAP), new


def _embed(config: GPTConfig, dtype, weights, cache: Cache, tokens_RT):
    """The residual stream before the first layer; smear sees the previous chunk's last token."""
    if config.recipe == "2025":
        return norm(embed(weights["wte"], tokens_RT, dtype))
    with_last = jnp.concatenate([cache.last_R[:, None], tokens_RT], axis=1)
    x = norm(embed(weights["wte"], with_last, dtype))
    before = x[:, :-1].at[:, 0].multiply((cache.lengths_R > 0).astype(dtype)[:, None])
    return add_previous(x[:, 1:], before, weights["smear_gate"], weights["smear_lambda"])


# --- the state of the rows ------------------------------------------------------------------------


@struct.dataclass
class EngineState:
    """What stays on the device; every leaf has the rows first."""

    cache: Any
    logits_BV: jax.Array  # float32: of the next token
    seen_BV: jax.Array  # bool: tokens in the row, for the repetition penalty


class DecodeInputs(NamedTuple):
    """What the rows are to do in one decode call (NumPy arrays)."""

    running: Any  # bool (B,): rows that sample tokens
    remaining: Any  # int32 (B,): tokens the row may still sample
    sampled: Any  # int32 (B,): tokens it has sampled before
    stop_ids: Any  # int32 (B, I), padded with −1: end the row
    pause_id: Any  # int32 (B,), −1 for none: pauses the row until the host has looked at it
    params: BatchedSamplingParams

    @classmethod
    def empty(cls, rows: int) -> "DecodeInputs":
        ints = np.zeros(rows, np.int32)
        stop_ids = np.full((rows, MAX_STOP_IDS), -1, np.int32)
        running, params = np.zeros(rows, bool), BatchedSamplingParams.empty(rows)
        return cls(running, ints, ints.copy(), stop_ids, ints - 1, params)


class Sampled(NamedTuple):
    """Tokens of one decode call; those of a row are the first ones that are not −1."""

    tokens: jax.Array  # int32 (B, C)
    logprobs: jax.Array  # float32 (B, C): of the model alone, before temperature and filters
    top_ids: jax.Array  # int32 (B, C, A)
    top_logprobs: jax.Array  # float32 (B, C, A)


class PrefillInputs(NamedTuple):
    """Prompt tokens for R rows, one of each device."""

    rows: Any  # int32 (R,): which row of the cache; one that does not exist is skipped
    starts: Any  # int32 (R,): how many of the row's tokens stay
    lasts: Any  # int32 (R,): the last of these
    tokens: Any  # int32 (R, T)
    counts: Any  # int32 (R,): how many of `tokens` are not padding
    seen: Any  # bool (R, V): the tokens of the whole row


# --- the programs ---------------------------------------------------------------------------------


def prefill(
    forward: ForwardChunk, weights, state: EngineState, inputs: PrefillInputs
) -> EngineState:
    """Cuts the rows back to their first `starts` tokens and appends the new ones."""
    cache = jax.tree.map(lambda leaf: leaf.at[inputs.rows].get(mode="clip"), state.cache)
    cache = cache.replace(lengths_R=inputs.starts, last_R=inputs.lasts)
    logits_RV, cache = forward(weights, cache, inputs.tokens, inputs.counts)
    return _write_rows(state, inputs.rows, EngineState(cache, logits_RV, inputs.seen))


def copy_row(state: EngineState, source: jax.Array, target: jax.Array, axis: str) -> EngineState:
    """Copies row `source` (R = 1), from the device that holds it, to row `target` of another or the
    same device. On all other devices the indices are out of range.
    """
    is_here = source[0] < state.logits_BV.shape[0]

    def fetch(leaf):
        row = leaf.at[source].get(mode="clip")
        summable = row.astype(jnp.int32) if row.dtype == bool else row
        found = jax.lax.psum(jnp.where(is_here, summable, jnp.zeros_like(summable)), axis)
        return found.astype(leaf.dtype)

    return _write_rows(state, target, jax.tree.map(fetch, state))


def _write_rows(state: EngineState, rows_R, new: EngineState) -> EngineState:
    # Without this XLA would read the rows while writing them, and copy the whole cache to do so.
    state, new = jax.lax.optimization_barrier((state, new))
    return jax.tree.map(lambda leaf, row: leaf.at[rows_R].set(row, mode="drop"), state, new)


class _Loop(NamedTuple):
    """What the decode loop carries."""

    step: jax.Array
    state: EngineState
    running: jax.Array
    remaining: jax.Array
    sampled: jax.Array
    out: Sampled


def decode(
    forward: ForwardChunk,
    chunk: int,
    weights,
    state: EngineState,
    inputs: DecodeInputs,
    limit,
    logprobs,
) -> tuple[EngineState, Sampled]:
    """Samples up to `limit` (at most `chunk`) tokens for every running row.

    A row ends at a stop token, at its pause token, or with none remaining; that token is emitted
    and appended too. The top logprobs are zeros unless `logprobs`.
    """
    rows = inputs.running.shape[0]
    out = Sampled(
        jnp.full((rows, chunk), -1, jnp.int32),
        jnp.zeros((rows, chunk), jnp.float32),
        jnp.zeros((rows, chunk, MAX_TOP_LOGPROBS), jnp.int32),
        jnp.zeros((rows, chunk, MAX_TOP_LOGPROBS), jnp.float32),
    )

    def is_running(loop: _Loop):
        return (loop.step < limit) & jnp.any(loop.running)

    step = partial(_step, forward, weights, inputs, logprobs)
    start = _Loop(jnp.int32(0), state, inputs.running, inputs.remaining, inputs.sampled, out)
    end = jax.lax.while_loop(is_running, step, start)
    return end.state, end.out


def _step(forward: ForwardChunk, weights, inputs: DecodeInputs, logprobs, loop: _Loop) -> _Loop:
    state, running_B = loop.state, loop.running
    tokens_B = sample_tokens(state.logits_BV, state.seen_BV, inputs.params, loop.sampled)
    out = _emit(loop, tokens_B, logprobs)
    ends_B = jnp.any(tokens_B[:, None] == inputs.stop_ids, axis=1) | (tokens_B == inputs.pause_id)
    logits_BV, cache = forward(weights, state.cache, tokens_B[:, None], running_B.astype(jnp.int32))
    logits_BV = jnp.where(running_B[:, None], logits_BV, state.logits_BV)
    rows_B = jnp.arange(len(tokens_B))
    seen_BV = state.seen_BV.at[rows_B, tokens_B].max(running_B)
    remaining_B = loop.remaining - running_B
    return _Loop(
        loop.step + 1,
        EngineState(cache, logits_BV, seen_BV),
        running_B & ~ends_B & (remaining_B > 0),
        remaining_B,
        loop.sampled + running_B,
        out,
    )


def _emit(loop: _Loop, tokens_B, logprobs) -> Sampled:
    """Writes the step's tokens and their log-probabilities into column `step`."""
    logits_BV = loop.state.logits_BV
    logsum_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    token_logits_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)
    n_top = min(MAX_TOP_LOGPROBS, logits_BV.shape[-1])

    def top():
        values_BA, ids_BA = jax.lax.top_k(logits_BV, n_top)
        return ids_BA, values_BA - logsum_B1

    def zeros():
        shape = (len(tokens_B), n_top)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    # Only the step's column goes through the condition: whatever does is copied.
    ids_BA, logprobs_BA = jax.lax.cond(logprobs, top, zeros)
    emitted_B = jnp.where(loop.running, tokens_B, -1)
    return Sampled(
        loop.out.tokens.at[:, loop.step].set(emitted_B),
        loop.out.logprobs.at[:, loop.step].set((token_logits_B1 - logsum_B1)[:, 0]),
        loop.out.top_ids.at[:, loop.step, :n_top].set(ids_BA),
        loop.out.top_logprobs.at[:, loop.step, :n_top].set(logprobs_BA),
    )
