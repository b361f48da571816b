"""How a model reads a text of one's own: what it expected at every token, and bits per byte.

The text stands behind <|bos|>. What is longer than the rows of the training is read in pieces of
that length, each behind the last token of the one before.

Shapes: B rows (here one), W tokens of a piece, T tokens of the text, K alternatives.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.evals.bits_per_byte import bits_per_byte
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.tokenizer import Tokenizer

BUCKET = 128  # piece lengths are multiples of this, as cuDNN wants them


class Reading(NamedTuple):
    """Every token with its log-probability in nats, and the likeliest ones, likeliest first."""

    tokens_T: np.ndarray
    log_p_T: np.ndarray
    best_TK: np.ndarray
    best_log_p_TK: np.ndarray
    n_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(-float(self.log_p_T.sum(dtype=np.float64)), self.n_bytes)


def read(
    model: GPT, params: Params, tokenizer: Tokenizer, text: str, alternatives: int = 3
) -> Reading:
    """The reading of a text by whole (unpadded) parameters; ValueError for an empty text."""
    if not text:
        raise ValueError("an empty text has no token that could be expected")
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    width = min(model.config.sequence_len, -(-len(tokens) // BUCKET) * BUCKET)
    cuts = [*range(0, len(tokens) - 1, width), len(tokens) - 1]
    pieces = [
        _read_piece(model, alternatives, params, tokens[first : last + 1], width)
        for first, last in pairwise(cuts)
    ]
    log_p_T, best_TK, best_log_p_TK = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    return Reading(tokens[1:], log_p_T, best_TK, best_log_p_TK, len(text.encode()))


def _read_piece(model: GPT, k: int, params: Params, tokens: np.ndarray, width: int):
    """(log_p, best, best_log_p) of all tokens but the first."""
    n = len(tokens) - 1
    padded_BW = np.pad(tokens, (0, width - n))[None]
    found = jax.device_get(_expect(model, k, params, padded_BW[:, :-1], padded_BW[:, 1:]))
    return [array[0, :n] for array in found]


@partial(jax.jit, static_argnums=(0, 1))
def _expect(model: GPT, k: int, params: Params, tokens_BW, targets_BW):
    logits_BWV: Any = model.apply({"params": params}, tokens_BW)
    log_p_BWV = jax.nn.log_softmax(logits_BWV)
    log_p_BW1 = jnp.take_along_axis(log_p_BWV, targets_BW[..., None], axis=-1)
    best_log_p_BWK, best_BWK = jax.lax.top_k(log_p_BWV, k)
    return log_p_BW1[..., 0], best_BWK, best_log_p_BWK
