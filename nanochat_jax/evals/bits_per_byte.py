"""Bits per byte: the loss per byte of text rather than per token, so vocabularies can be compared.

Σ nats / (ln 2 · Σ bytes), both over the target tokens that stand for text: special tokens and
masked targets count in neither.
"""

import gzip
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.data.shards import DocumentBlocks
from nanochat_jax.gpt import GPT, Params
from nanochat_jax.tokenizer import Tokenizer

AHEAD = 3  # batches that the device may have before it at once


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Nats over a text of so many bytes, in bits per byte; infinite where there is no text."""
    return nats / (math.log(2) * n_bytes) if n_bytes else math.inf


def evaluate(
    eval_step: Callable[[Params, Any, Any], dict[str, jax.Array]],
    params: Params,
    batches: Iterable[Any],
    token_bytes_V: Any,
) -> dict[str, float]:
    """Runs `eval_step` (train.make_eval_step) over all batches.

    Returns "bpb", "loss" (nats per supervised token), and the counts "tokens" and "bytes". The sums
    of the batches are added in float64.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, batch, token_bytes_V))
        jax.block_until_ready(sums[-AHEAD:][0])
    sums = jax.device_get(sums)
    nats, n_bytes, loss, tokens = (
        math.fsum(float(batch[name]) for batch in sums)
        for name in ("nats", "bytes", "loss_sum", "tokens")
    )
    return {
        "bpb": bits_per_byte(nats, n_bytes),
        "loss": loss / max(tokens, 1),
        "tokens": int(tokens),
        "bytes": int(n_bytes),
    }


def gzip_bits_per_byte(shards: Sequence[Path], n_bytes: int) -> float:
    """What `gzip -9` needs for the documents of these shards, cut to `n_bytes`: a yardstick."""
    text, blocks = bytearray(), DocumentBlocks(shards)
    for index in range(len(blocks)):
        text += "\n".join(blocks[index]).encode()
        if len(text) >= n_bytes:
            break
    text = text[:n_bytes]
    return 8 * len(gzip.compress(text, 9)) / len(text) if text else math.inf


# --- How a model reads a text of one's own: what it expected at every token, and bits ---

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
