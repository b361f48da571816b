"""Generation on the device: prompts into the cache, and a loop that draws tokens one by one.

These are the per-device programs; engine.py compiles them over the mesh. They know the model only
as a function `extend(weights, cache, tokens_RT, counts_R)` that appends each row's first counts_R
tokens and returns the logits (R, V) after the last of them. The host says with every call what the
rows are to do (`Control`); what stays on the device are the cache, each row's next logits, and the
tokens it has seen (`Slots`).

Shapes: B rows of the cache, R rows being prefilled, T tokens of a chunk, V vocabulary, C tokens of
a decode chunk, A alternatives, I stop ids.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nanochat_jax.engine.cache import Cache, attend, windows
from nanochat_jax.engine.sampling import Choices, draw
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

STOP_IDS = 8  # stop tokens a row may have
ALTERNATIVES = 20  # likeliest tokens that are told beside the chosen one

type Extend = Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


# --- the model with a cache -----------------------------------------------------------------------


def decode_weights(model: GPT, params: Params) -> dict[str, Any]:
    """The parameters as `extend_cache` wants them: of each layer apart, in the compute dtype.

    A slice of a stack inside the loop would be copied for every token.
    """
    cast = {n: p.astype(model.dtype) if n in SHARD_DIM else p for n, p in params.items()}
    whole = {n: cast[n] for n in ("wte", "lm_head", "smear_gate", "smear_lambda") if n in cast}
    scalars = residual_scalars(model.config, cast)
    return whole | {"layers": unstack_layers(model.config, cast), "scalars": scalars}


def extend_cache(config: GPTConfig, dtype: Any, weights, cache: Cache, tokens_RT, counts_R):
    """Appends each row's first `counts_R` tokens: (logits (R, V) after the last one, cache).

    Equals the forward pass over the whole row, however it was cut into chunks. Logits of a row
    without new tokens mean nothing. Float32, soft-capped.
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
    """The stream before the first layer; smear sees the last token of the chunk before."""
    if config.recipe == "2025":
        return norm(embed(weights["wte"], tokens_RT, dtype))
    with_last = jnp.concatenate([cache.last_R[:, None], tokens_RT], axis=1)
    x = norm(embed(weights["wte"], with_last, dtype))
    before = x[:, :-1].at[:, 0].multiply((cache.lengths_R > 0).astype(dtype)[:, None])
    return add_previous(x[:, 1:], before, weights["smear_gate"], weights["smear_lambda"])


# --- the state of the rows ------------------------------------------------------------------------


@struct.dataclass
class Slots:
    """What stays on the device; every leaf has the rows first."""

    cache: Any
    logits_BV: jax.Array  # float32: of the next token
    seen_BV: jax.Array  # bool: tokens in the row, for the repetition penalty


class Control(NamedTuple):
    """What the rows are to do in one decode call, said by the host (as NumPy arrays)."""

    running: Any  # bool (B,): draws tokens
    left: Any  # int32 (B,): tokens it may still draw
    drawn: Any  # int32 (B,): tokens it has drawn before
    stop_ids: Any  # int32 (B, I), filled up with −1: end the row
    pause_id: Any  # int32 (B,), −1 for none: stops the row until the host has looked at it
    choices: Choices

    @classmethod
    def empty(cls, rows: int) -> "Control":
        ints = np.zeros(rows, np.int32)
        stop_ids = np.full((rows, STOP_IDS), -1, np.int32)
        running = np.zeros(rows, bool)
        return cls(running, ints, ints.copy(), stop_ids, ints - 1, Choices.empty(rows))


class Drawn(NamedTuple):
    """Tokens of one decode call; those of a row are the first ones that are not −1."""

    tokens: jax.Array  # int32 (B, C)
    logprobs: jax.Array  # float32 (B, C): of the model alone, before temperature and filters
    alternative_ids: jax.Array  # int32 (B, C, A)
    alternative_logprobs: jax.Array  # float32 (B, C, A)


class Piece(NamedTuple):
    """Prompt tokens for R rows, one of each device."""

    rows: Any  # int32 (R,): which row of the cache; one that does not exist is skipped
    starts: Any  # int32 (R,): how many of the row's tokens stay
    lasts: Any  # int32 (R,): the last of these
    tokens: Any  # int32 (R, T)
    counts: Any  # int32 (R,): how many of `tokens` count
    seen: Any  # bool (R, V): the tokens of the whole row


def empty_slots(cache: Any, rows: int, vocab_size: int) -> Slots:
    shape = (rows, vocab_size)
    return Slots(cache, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))


# --- the programs ---------------------------------------------------------------------------------


def prefill(extend: Extend, weights, slots: Slots, piece: Piece) -> Slots:
    """Cuts the rows back to their first `starts` tokens and appends the piece's."""
    cache = jax.tree.map(lambda leaf: leaf.at[piece.rows].get(mode="clip"), slots.cache)
    cache = cache.replace(lengths_R=piece.starts, last_R=piece.lasts)
    logits_RV, cache = extend(weights, cache, piece.tokens, piece.counts)
    return _put(slots, piece.rows, Slots(cache, logits_RV, piece.seen))


def copy_row(slots: Slots, source: jax.Array, target: jax.Array, axis: str) -> Slots:
    """Copies row `source` (R = 1) of the device that has it to `target` of that which has it.

    On every other device the rows named are ones that do not exist.
    """
    is_here = source[0] < slots.logits_BV.shape[0]

    def fetch(leaf):
        row = leaf.at[source].get(mode="clip")
        summable = row.astype(jnp.int32) if row.dtype == bool else row
        found = jax.lax.psum(jnp.where(is_here, summable, jnp.zeros_like(summable)), axis)
        return found.astype(leaf.dtype)

    return _put(slots, target, jax.tree.map(fetch, slots))


def _put(slots: Slots, rows_R, new: Slots) -> Slots:
    # Else XLA reads the rows while it writes them, and copies the whole cache to be able to.
    slots, new = jax.lax.optimization_barrier((slots, new))
    return jax.tree.map(lambda leaf, row: leaf.at[rows_R].set(row, mode="drop"), slots, new)


class _Loop(NamedTuple):
    """What the decode loop carries."""

    step: jax.Array
    slots: Slots
    running: jax.Array
    left: jax.Array
    drawn: jax.Array
    out: Drawn


def decode(
    extend: Extend, chunk: int, weights, slots: Slots, control: Control, limit, explain
) -> tuple[Slots, Drawn]:
    """Draws up to `limit` (at most `chunk`) tokens for every running row.

    A row ends at a stop token, at its pause token, or with nothing left; that token is told and
    appended too. The alternatives are zeros unless `explain`.
    """
    rows = control.running.shape[0]
    out = Drawn(
        jnp.full((rows, chunk), -1, jnp.int32),
        jnp.zeros((rows, chunk), jnp.float32),
        jnp.zeros((rows, chunk, ALTERNATIVES), jnp.int32),
        jnp.zeros((rows, chunk, ALTERNATIVES), jnp.float32),
    )

    def goes_on(loop: _Loop):
        return (loop.step < limit) & jnp.any(loop.running)

    step = partial(_step, extend, weights, control, explain)
    start = _Loop(jnp.int32(0), slots, control.running, control.left, control.drawn, out)
    end = jax.lax.while_loop(goes_on, step, start)
    return end.slots, end.out


def _step(extend: Extend, weights, control: Control, explain, loop: _Loop) -> _Loop:
    slots, running_B = loop.slots, loop.running
    tokens_B = draw(slots.logits_BV, slots.seen_BV, control.choices, loop.drawn)
    out = _tell(loop, tokens_B, explain)
    ends_B = jnp.any(tokens_B[:, None] == control.stop_ids, axis=1) | (tokens_B == control.pause_id)
    logits_BV, cache = extend(weights, slots.cache, tokens_B[:, None], running_B.astype(jnp.int32))
    logits_BV = jnp.where(running_B[:, None], logits_BV, slots.logits_BV)
    rows_B = jnp.arange(len(tokens_B))
    seen_BV = slots.seen_BV.at[rows_B, tokens_B].max(running_B)
    left_B = loop.left - running_B
    return _Loop(
        loop.step + 1,
        Slots(cache, logits_BV, seen_BV),
        running_B & ~ends_B & (left_B > 0),
        left_B,
        loop.drawn + running_B,
        out,
    )


def _tell(loop: _Loop, tokens_B, explain) -> Drawn:
    """Writes the step's tokens and their probabilities into column `step`."""
    logits_BV = loop.slots.logits_BV
    logsum_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    chosen_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)
    few = min(ALTERNATIVES, logits_BV.shape[-1])

    def likeliest():
        values_BA, ids_BA = jax.lax.top_k(logits_BV, few)
        return ids_BA, values_BA - logsum_B1

    def nothing():
        shape = (len(tokens_B), few)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    # Only the step's column goes through the condition: what does is copied.
    ids_BA, logprobs_BA = jax.lax.cond(explain, likeliest, nothing)
    shown_B = jnp.where(loop.running, tokens_B, -1)
    return Drawn(
        loop.out.tokens.at[:, loop.step].set(shown_B),
        loop.out.logprobs.at[:, loop.step].set((chosen_B1 - logsum_B1)[:, 0]),
        loop.out.alternative_ids.at[:, loop.step, :few].set(ids_BA),
        loop.out.alternative_logprobs.at[:, loop.step, :few].set(logprobs_BA),
    )
