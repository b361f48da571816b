"""Simple generation: for every new token the whole sequence goes through the model again.

No cache, so nothing to get wrong: this is what the fast engine is compared with, and what a
training run writes its samples with. The loop runs on the device; a batch of prompts of different
lengths is padded on the right, which a causal model does not see.

Shapes: B prompts, S length of the token buffer, W tokens that the model sees at once, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.gpt import GPT, SOFTCAP, Params, linear
from nanochat_jax.sharding import SHARD_DIM

BUCKET = 128  # buffer lengths are multiples of this: few shapes to compile, and what cuDNN wants


class Tokens(NamedTuple):
    """The loop's state."""

    drawn: jax.Array  # int32 scalar: tokens drawn for each row so far
    tokens_BS: jax.Array
    lengths_B: jax.Array
    done_B: jax.Array  # rows that drew a stop token


def generate(
    model: GPT,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_ids: Sequence[int] = (),
    context: int | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt: at most `max_new_tokens`, ending before the first stop token.

    `params` are whole (unpadded) parameters. Temperature 0 takes the likeliest token; otherwise one
    is drawn among the `top_k` likeliest (None: all). Row i draws with fold_in(key, i), so that its
    tokens do not depend on the rows beside it. The model sees the last `context` tokens (default:
    the length it was trained on). ValueError for an empty prompt, an unknown token, or a negative
    temperature.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k)
    longest = max(len(prompt) for prompt in prompts)
    capacity = -(-(longest + max_new_tokens) // BUCKET) * BUCKET
    tokens_BS = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    final = _generate(
        model,
        min(context or model.config.sequence_len, capacity),
        top_k,
        params,
        Tokens(*map(jnp.asarray, (0, tokens_BS, lengths_B, np.zeros(len(prompts), bool)))),
        np.int32(max_new_tokens),
        np.float32(temperature),
        key,
        np.array(stop_ids, np.int32),
    )
    filled, ends = np.asarray(final.tokens_BS), np.asarray(final.lengths_B)
    return [
        row[start:end].tolist() for row, start, end in zip(filled, lengths_B, ends, strict=True)
    ]


def sample(logits_BV: jax.Array, keys_B: jax.Array, temperature: jax.Array, top_k: int | None):
    """One token a row, int32 (B,): arg-max at temperature 0, else drawn among the top k."""
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    safe = jnp.where(temperature > 0, temperature, 1.0)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV / safe)
    return jnp.where(temperature > 0, drawn_B, greedy_B).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(model, window, top_k, params, start: Tokens, limit, temperature, key, stop_ids):
    # Cast once: inside the loop every token would pay for it.
    weights = {n: p.astype(model.dtype) if n in SHARD_DIM else p for n, p in params.items()}
    row_keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(start.lengths_B)))

    def unfinished(state: Tokens):
        return (state.drawn < limit) & ~jnp.all(state.done_B)

    def step(state: Tokens) -> Tokens:
        logits_BV = next_logits(model, weights, state.tokens_BS, state.lengths_B, window)
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, state.drawn)
        new_B = sample(logits_BV, keys_B, temperature, top_k)
        done_B = state.done_B | jnp.isin(new_B, stop_ids)
        rows_B = jnp.arange(len(new_B))
        kept_B = state.tokens_BS[rows_B, state.lengths_B]
        tokens_BS = state.tokens_BS.at[rows_B, state.lengths_B].set(
            jnp.where(done_B, kept_B, new_B)
        )
        return Tokens(state.drawn + 1, tokens_BS, state.lengths_B + ~done_B, done_B)

    return jax.lax.while_loop(unfinished, step, start)


def next_logits(
    model: GPT, weights: Params, tokens_BS: jax.Array, lengths_B: jax.Array, window: int
) -> jax.Array:
    """Logits (B, V) of the token after each row's first `lengths_B` tokens, of which the model
    sees the last `window`."""
    starts_B = jnp.maximum(lengths_B - window, 0)
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=window)
    seen_BW = jax.vmap(cut)(tokens_BS, starts_B)
    hidden_BWD: Any = model.apply({"params": weights}, seen_BW, method="hidden")
    last_BD = hidden_BWD[jnp.arange(len(lengths_B)), lengths_B - starts_B - 1]
    logits_BV = linear(last_BD, weights["lm_head"])[:, : model.config.vocab_size]
    return SOFTCAP * jnp.tanh(logits_BV.astype(jnp.float32) / SOFTCAP)


def _check(model: GPT, prompts, max_new_tokens: int, temperature: float, top_k) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token; <|bos|> alone will do")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, not {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    tokens = np.concatenate([np.asarray(prompt) for prompt in prompts])
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(
            f"a prompt has token {tokens.max()} for a vocabulary of {model.config.vocab_size}; "
            "was it encoded with another tokenizer?"
        )
