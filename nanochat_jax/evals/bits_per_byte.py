"""Bits per byte: the loss per byte of text rather than per token, so vocabularies can be compared.

Σ nats / (ln 2 · Σ bytes), both over the target tokens that stand for text: special tokens and
masked targets count in neither.
"""

import gzip
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.data.shards import DocumentBlocks
from nanochat_jax.gpt import Params

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
