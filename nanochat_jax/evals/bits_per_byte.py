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

MAX_IN_FLIGHT = 3  # batches queued on the device


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Nats over a text of `n_bytes` as bits per byte; infinite where there is no text."""
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
        jax.block_until_ready(sums[-MAX_IN_FLIGHT:][0])
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
    """Bits per byte of `gzip -9` on the first `n_bytes` of these shards: a baseline."""
    text, blocks = bytearray(), DocumentBlocks(shards)
    for index in range(len(blocks)):
        text += "\n".join(blocks[index]).encode()
        if len(text) >= n_bytes:
            break
    text = text[:n_bytes]
    return 8 * len(gzip.compress(text, 9)) / len(text) if text else math.inf


# --- the log-probability of every token of a text -------------------------------------------------

BUCKET = 128  # lengths of the pieces are multiples of this, as cuDNN wants them


class TokenLogprobs(NamedTuple):
    """Every token with its log-probability in nats, and the K most likely ones in its place."""

    tokens_T: np.ndarray
    logprobs_T: np.ndarray
    top_TK: np.ndarray  # token ids, the most likely first
    top_logprobs_TK: np.ndarray
    n_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(-float(self.logprobs_T.sum(dtype=np.float64)), self.n_bytes)


def token_logprobs(
    model: GPT, params: Params, tokenizer: Tokenizer, text: str, top: int = 3
) -> TokenLogprobs:
    """How likely whole (unpadded) parameters find each token of a text.

    Texts longer than the trained length are cut into pieces of that length, each scored without
    what comes before it. ValueError for an empty text.
    """
    if not text:
        raise ValueError("an empty text has no tokens to score")
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.int32)
    width = min(model.config.sequence_len, -(-len(tokens) // BUCKET) * BUCKET)
    cuts = [*range(0, len(tokens) - 1, width), len(tokens) - 1]
    pieces = []
    for first, last in pairwise(cuts):
        n = last - first
        padded_BW = np.pad(tokens[first : last + 1], (0, width - n))[None]
        found = _logprobs(model, top, params, padded_BW[:, :-1], padded_BW[:, 1:])
        pieces.append([array[0, :n] for array in jax.device_get(found)])
    logprobs_T, top_TK, top_logprobs_TK = (
        np.concatenate(parts) for parts in zip(*pieces, strict=True)
    )
    return TokenLogprobs(tokens[1:], logprobs_T, top_TK, top_logprobs_TK, len(text.encode()))


@partial(jax.jit, static_argnums=(0, 1))
def _logprobs(model: GPT, top: int, params: Params, tokens_BW, targets_BW):
    logits_BWV: Any = model.apply({"params": params}, tokens_BW)
    logprobs_BWV = jax.nn.log_softmax(logits_BWV)
    of_targets_BW1 = jnp.take_along_axis(logprobs_BWV, targets_BW[..., None], axis=-1)
    top_logprobs_BWK, top_BWK = jax.lax.top_k(logprobs_BWV, top)
    return of_targets_BW1[..., 0], top_BWK, top_logprobs_BWK
