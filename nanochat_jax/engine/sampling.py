"""Choosing the next token: temperature, top-k, top-p, min-p, repetition penalty, seeds.

Every row has its own settings and its own key, and what a row draws depends on nothing else: a
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

CANDIDATES = (64, 256)  # for a top_k up to these so many are picked: a full sort costs far more


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens; ValueError names a setting outside its range."""

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together have this probability
    min_p: float = 0.0  # only those with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides the logits of tokens that were there before
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


class Choices(NamedTuple):
    """The settings of all rows, as arrays (B,): NumPy's on the host, JAX's in a program."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    seed: Any  # uint32 (B, 2): the high and the low half
    sample: Any  # which of a request's samples

    @classmethod
    def empty(cls, rows: int) -> "Choices":
        """Greedy for every row."""
        floats, ints = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
        return cls(
            floats, ints, floats + 1, floats.copy(), floats + 1, np.zeros((rows, 2), np.uint32),
            ints.copy(),
        )  # fmt: skip

    def put(self, row: int, sampling: Sampling, sample: int) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
            getattr(self, name)[row] = getattr(sampling, name)
        seed = sampling.seed % 2**64
        self.seed[row] = seed >> 32, seed % 2**32
        self.sample[row] = sample


def draw(logits_BV, seen_BV, choices: Choices, drawn_B) -> jax.Array:
    """The next token of every row, int32 (B,).

    `seen_BV` tells the tokens that the repetition penalty is for (arXiv 1909.05858), `drawn_B` how
    many tokens the row has drawn before. The filters apply in the order of Sampling's fields.
    """
    penalty = choices.repetition_penalty[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    chosen_B = _likeliest(logits_BV)
    for rows_B, path in _paths(choices, logits_BV.shape[-1]):
        drawn = partial(path, logits_BV, choices, drawn_B)
        found_B = jax.lax.cond(jnp.any(rows_B), drawn, lambda old=chosen_B: old)
        chosen_B = jnp.where(rows_B, found_B, chosen_B)
    return chosen_B


def _likeliest(logits_BV) -> jax.Array:
    """The first arg-max; as two plain reductions, which a CPU does ten times faster than one."""
    is_best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(is_best_BV, ids_V, ids_V[-1]), axis=-1)


def _paths(choices: Choices, vocab_size: int) -> list[tuple[jax.Array, Callable]]:
    """(rows, how they draw) for all rows that are not greedy; the cheapest way for each.

    A row's own settings choose it, never its neighbours': each way spends random numbers its way.
    """
    is_random_B, k_B = choices.temperature > 0, choices.top_k
    is_free_B = (k_B == 0) & (choices.top_p >= 1) & (choices.min_p <= 0)
    paths: list[tuple[jax.Array, Callable]] = [(is_random_B & is_free_B, _draw_from_all)]
    rest_B = is_random_B & ~is_free_B
    for size in CANDIDATES:
        if size < vocab_size:
            fits_B = (k_B > 0) & (k_B <= size)
            paths.append((rest_B & fits_B, partial(_draw_among, size)))
            rest_B &= ~fits_B
    return [*paths, (rest_B, partial(_draw_among, vocab_size))]


def _draw_from_all(logits_BV, choices: Choices, drawn_B) -> jax.Array:
    """Without any filter."""
    safe_B1 = jnp.where(choices.temperature > 0, choices.temperature, 1.0)[:, None]
    drawn = jax.vmap(jax.random.categorical)(_keys(choices, drawn_B), logits_BV / safe_B1)
    return drawn.astype(jnp.int32)


def _draw_among(candidates: int, logits_BV, choices: Choices, drawn_B) -> jax.Array:
    """One of each row's `candidates` likeliest tokens, after all filters."""
    values_BC, ids_BC = jax.lax.top_k(logits_BV, candidates)
    safe_B1 = jnp.where(choices.temperature > 0, choices.temperature, 1.0)[:, None]
    top_k_B1 = jnp.where(choices.top_k > 0, choices.top_k, candidates)[:, None]
    keep_BC = jnp.arange(candidates) < top_k_B1
    scaled_BC = jnp.where(keep_BC, values_BC / safe_B1, -jnp.inf)
    p_BC = jax.nn.softmax(scaled_BC, axis=-1)
    before_BC = jnp.cumsum(p_BC, axis=-1) - p_BC
    keep_BC = (before_BC < choices.top_p[:, None]) & (p_BC >= choices.min_p[:, None] * p_BC[:, :1])
    keep_BC = keep_BC.at[:, 0].set(True)  # top_p = 0 leaves the likeliest
    scaled_BC = jnp.where(keep_BC, scaled_BC, -jnp.inf)
    rank_B = jax.vmap(jax.random.categorical)(_keys(choices, drawn_B), scaled_BC)
    return jnp.take_along_axis(ids_BC, rank_B[:, None], axis=-1)[:, 0]


def _keys(choices: Choices, drawn_B) -> jax.Array:
    keys_B = jax.random.wrap_key_data(choices.seed, impl="threefry2x32")
    for number_B in (choices.sample, drawn_B):
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, number_B)
    return keys_B
