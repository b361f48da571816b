"""Greedy generation without a cache, which the engine is compared with."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.gpt import GPT, Params

BUCKET = 128  # token buffers are multiples of this: few shapes to compile


@partial(jax.jit, static_argnums=0)
def _next_tokens(model: GPT, params: Params, tokens_BS, lengths_B):
    logits_BSV = model.apply({"params": params}, tokens_BS)
    return jnp.argmax(logits_BSV[jnp.arange(len(lengths_B)), lengths_B - 1], axis=-1)


def generate(
    model: GPT,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
) -> list[list[int]]:
    """The new tokens of each prompt, up to the first stop token. Every token costs a forward pass
    over all rows, padded on the right, which a causal model does not see."""
    lengths_B = np.array([len(prompt) for prompt in prompts])
    size = -(-(lengths_B.max() + max_new_tokens) // BUCKET) * BUCKET
    tokens_BS = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows_B = np.arange(len(prompts))
    for i in range(max_new_tokens):
        tokens_BS[rows_B, lengths_B + i] = _next_tokens(model, params, tokens_BS, lengths_B + i)
    new = [
        row[n : n + max_new_tokens].tolist() for row, n in zip(tokens_BS, lengths_B, strict=True)
    ]
    ends = [next((i for i, t in enumerate(row) if t in stop_ids), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]
