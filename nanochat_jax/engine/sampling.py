"""Choosing the next token: temperature, top-k, top-p, min-p, repetition penalty, seeds.

Every row has its own settings and its own key, and what a row samples depends on nothing else: a
request gives the same tokens alone or among others.

Shapes: B rows, V vocabulary, C candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A top_k up to one of these looks at only that many candidates: a full sort is far more expensive.
CANDIDATES = (64, 256)


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples its tokens; ValueError names a setting outside its range."""

    temperature: float = 1.0  # 0: the most likely token (argmax)
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # only the most likely that together have this probability
    min_p: float = 0.0  # only those with at least this share of the largest probability
    repetition_penalty: float = 1.0  # divides the logits of tokens already in the row
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 2**31 - 1),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("seed", -(2**63), 2**64 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses nan
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")


class BatchedSamplingParams(NamedTuple):
    """The settings of all rows, as arrays (B,): NumPy's on the host, JAX's in a program."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any  # uint32 (B, 2): the high and the low half
    sample: Any  # which of a request's samples

    @classmethod
    def empty(cls, rows: int) -> "BatchedSamplingParams":
        """Greedy for every row."""
        floats, ints = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
        seeds = np.zeros((rows, 2), np.uint32)
        return cls(floats, ints, floats + 1, floats.copy(), floats + 1, seeds, ints.copy())

    def put(self, row: int, params: SamplingParams, sample: int) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            getattr(self, name)[row] = getattr(params, name)
        seed = params.seed % 2**64
        self.seed[row] = seed >> 32, seed % 2**32
        self.sample[row] = sample


def sample_tokens(logits_BV, seen_BV, params: BatchedSamplingParams, sampled_B) -> jax.Array:
    """The next token of every row, int32 (B,).

    `seen_BV` marks the tokens that the repetition penalty applies to (arXiv 1909.05858),
    `sampled_B` counts the tokens that the row has sampled before. The filters apply in the order of
    SamplingParams' fields.
    """
    penalty = params.repetition_penalty[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    tokens_B = _argmax(logits_BV)
    for rows_B, path in _paths(params, logits_BV.shape[-1]):
        take_path = partial(path, logits_BV, params, sampled_B)
        found_B = jax.lax.cond(jnp.any(rows_B), take_path, lambda old=tokens_B: old)
        tokens_B = jnp.where(rows_B, found_B, tokens_B)
    return tokens_B


def _argmax(logits_BV) -> jax.Array:
    """The first argmax; as two plain reductions, which a CPU does ten times faster than one."""
    is_best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(is_best_BV, ids_V, ids_V[-1]), axis=-1)


def _paths(params: BatchedSamplingParams, vocab_size: int) -> list[tuple[jax.Array, Callable]]:
    """(rows, how they sample) for all rows that are not greedy; the cheapest way for each.

    The choice depends on the row's own settings, never on its neighbours': the ways use different
    random numbers.
    """
    is_random_B, k_B = params.temperature > 0, params.top_k
    is_free_B = (k_B == 0) & (params.top_p >= 1) & (params.min_p <= 0)
    paths: list[tuple[jax.Array, Callable]] = [(is_random_B & is_free_B, _sample_from_all)]
    rest_B = is_random_B & ~is_free_B
    for size in CANDIDATES:
        if size < vocab_size:
            fits_B = (k_B > 0) & (k_B <= size)
            paths.append((rest_B & fits_B, partial(_sample_filtered, size)))
            rest_B &= ~fits_B
    return [*paths, (rest_B, partial(_sample_filtered, vocab_size))]


def _sample_from_all(logits_BV, params: BatchedSamplingParams, sampled_B) -> jax.Array:
    """Without any filter."""
    safe_B1 = jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    tokens_B = jax.vmap(jax.random.categorical)(_keys(params, sampled_B), logits_BV / safe_B1)
    return tokens_B.astype(jnp.int32)


def _sample_filtered(
    candidates: int, logits_BV, params: BatchedSamplingParams, sampled_B
) -> jax.Array:
    """One of each row's `candidates` most likely tokens, after all filters."""
    values_BC, ids_BC = jax.lax.top_k(logits_BV, candidates)
    safe_B1 = jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    top_k_B1 = jnp.where(params.top_k > 0, params.top_k, candidates)[:, None]
    keep_BC = jnp.arange(candidates) < top_k_B1
    scaled_BC = jnp.where(keep_BC, values_BC / safe_B1, -jnp.inf)
    p_BC = jax.nn.softmax(scaled_BC, axis=-1)
    before_BC = jnp.cumsum(p_BC, axis=-1) - p_BC
    keep_BC = (before_BC < params.top_p[:, None]) & (p_BC >= params.min_p[:, None] * p_BC[:, :1])
    keep_BC = keep_BC.at[:, 0].set(True)  # top_p = 0 leaves the most likely
    scaled_BC = jnp.where(keep_BC, scaled_BC, -jnp.inf)
    rank_B = jax.vmap(jax.random.categorical)(_keys(params, sampled_B), scaled_BC)
    return jnp.take_along_axis(ids_BC, rank_B[:, None], axis=-1)[:, 0]


def _keys(params: BatchedSamplingParams, sampled_B) -> jax.Array:
    keys_B = jax.random.wrap_key_data(params.seed, impl="threefry2x32")
    for number_B in (params.sample, sampled_B):
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, number_B)
    return keys_B
