"""How likely a model finds given tokens: what CORE, multiple choice and lm-evaluation-harness ask.

A question is a group of spans, usually one text with several endings. Their common beginning goes
through the model once, as the prefix of a row, without what lies beyond the windows' reach; what
differs are the tails, packed behind it, each blind to the others. Only tails meet the head, so no
logits of a prefix are ever made. Rows of all questions are sorted into few shapes, each compiled
once, with as many rows as a token budget lets.

Shapes: B rows, P tokens of a prefix, C tokens of a row's tails, N query heads, K key/value heads,
G = N/K, H head dim, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax.attention import causal_attention
from nanochat_jax.evals.scoring_batches import Batch, Row, Score, Span, batches_of, fill, rows_of
from nanochat_jax.gpt import (
    GPT,
    SOFTCAP,
    GPTConfig,
    Params,
    add_before,
    embed,
    linear,
    look_up,
    norm,
    residual_scalars,
    rotary,
    softcap_cross_entropy,
    transform,
    unstack_layers,
)
from nanochat_jax.sharding import AXIS, REPLICATED
from nanochat_jax.train import make_gather

AHEAD = 3  # batches that the devices may have before them at once
LEAST_PREFIX = {"blocked": 32, "cudnn": 128}  # cuDNN wants multiples of 128

type Progress = Callable[[int, int], object]


# --- on the device --------------------------------------------------------------------------------


def _score_rows(model: GPT, weights: Params, rows: Batch):
    """(losses, hits), both (B, C), at every target: the per-device program."""
    config = model.config
    layers = unstack_layers(config, weights)
    keys: list[jax.Array] = []
    values: list[jax.Array] = []

    def attend_prefix(layer, q, k, v):
        keys.append(k)
        values.append(v)
        return causal_attention(q, k, v, config.window_sizes[layer], model.attention)

    def attend_tail(layer, q, k, v):
        return _attend_tail(q, k, v, keys[layer], values[layer], rows, config.window_sizes[layer])

    def run(tokens, before, positions, attend):
        x = _embed(model, weights, tokens, before)
        # Behind a barrier the angles are computed once, not fused into every layer again.
        rope = jax.lax.optimization_barrier(rotary(positions, config.head_dim, config.rope_base))
        found = look_up(layers, tokens, model.dtype)
        return transform(config, found, residual_scalars(config, weights), x, rope, attend)

    with jax.named_scope("prefix"):
        before_BP = jnp.pad(rows.prefix_BP[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        run(rows.prefix_BP, before_BP, _prefix_positions(rows), attend_prefix)
    with jax.named_scope("tails"):
        x_BCD = run(rows.tail_BC, rows.before_BC, rows.position_BC, attend_tail)
    with jax.named_scope("head"):
        logits_BCV = linear(x_BCD, weights["lm_head"])[..., : config.vocab_size]
        losses_BC = softcap_cross_entropy(logits_BCV, rows.target_BC)
        capped = SOFTCAP * jnp.tanh(logits_BCV.astype(jnp.float32) / SOFTCAP)
        hits_BC = jnp.argmax(capped, axis=-1) == rows.target_BC
    return tuple(jax.lax.all_gather(x, AXIS, tiled=True) for x in (losses_BC, hits_BC))


def _prefix_positions(rows: Batch):
    return rows.first_B[:, None] + jnp.arange(rows.prefix_BP.shape[1])


def _embed(model: GPT, weights: Params, tokens_BT, before_BT):
    """The stream before the first layer, where the token before each is told."""
    x_BTD = norm(embed(weights["wte"], tokens_BT, model.dtype))
    if model.config.recipe == "2025":
        return x_BTD
    there = (before_BT >= 0).astype(model.dtype)[..., None]
    before_BTD = norm(embed(weights["wte"], jnp.maximum(before_BT, 0), model.dtype)) * there
    return add_before(x_BTD, before_BTD, weights["smear_gate"], weights["smear_lambda"])


def _attend_tail(q_BCNH, k_BCKH, v_BCKH, keys_BPKH, values_BPKH, rows: Batch, window: int):
    """Each token of a tail sees the prefix and its own tail up to itself, as far as its window."""
    B, C, N, H = q_BCNH.shape
    K, width = keys_BPKH.shape[2], keys_BPKH.shape[1]
    q_BCKGH = q_BCNH.reshape(B, C, K, N // K, H)
    old = _einsum32("bckgh,bpkh->bkgcp", q_BCKGH, keys_BPKH)
    new = _einsum32("bckgh,bukh->bkgcu", q_BCKGH, k_BCKH)
    scores = jnp.concatenate([old, new], axis=-1) * H**-0.5
    sees = jnp.concatenate(_visible(rows, window), axis=-1)
    scores = jnp.where(sees[:, None, None], scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1).astype(q_BCNH.dtype)
    out = jnp.einsum("bkgcp,bpkh->bckgh", p[..., :width], values_BPKH)
    out += jnp.einsum("bkgcu,bukh->bckgh", p[..., width:], v_BCKH)
    return out.reshape(B, C, N, H)


def _visible(rows: Batch, window: int):
    """What each token of the tails sees: of the prefix (B, C, P), of the tails (B, C, C)."""
    position, segment = rows.position_BC, rows.segment_BC
    in_prefix = jnp.arange(rows.prefix_BP.shape[1]) < rows.prefix_length_B[:, None]
    old = in_prefix[:, None] & (position[..., None] - _prefix_positions(rows)[:, None] <= window)
    distance = position[:, :, None] - position[:, None]
    same = segment[:, :, None] == segment[:, None]
    return old, same & (distance >= 0) & (distance <= window)


_einsum32 = partial(jnp.einsum, preferred_element_type=jnp.float32)


# --- the scorer -----------------------------------------------------------------------------------


class Scorer:
    """A model on a mesh, ready to score.

    `params` are cut over the mesh as for training steps (load_model with the mesh);
    `tokens_per_device` limits a batch, padding included. Every process of a cluster run must make
    the same calls, and gets all results.
    """

    def __init__(self, model: GPT, mesh: Mesh, params: Params, *, tokens_per_device: int = 16384):
        self.model, self._mesh, self._budget = model, mesh, tokens_per_device
        self._rows = NamedSharding(mesh, P(AXIS))
        self._weights = make_gather(model, mesh)(params)
        self._program: Any = jax.jit(
            jax.shard_map(
                partial(_score_rows, model),
                mesh=mesh,
                in_specs=(REPLICATED, P(AXIS)),
                out_specs=REPLICATED,
                check_vma=False,
            )
        )

    def score(
        self, groups: Sequence[Sequence[Span]], progress: Progress = lambda done, total: None
    ) -> list[list[Score]]:
        """The scores of every span of every group, in their order.

        `progress(done, total)` counts tokens, padding included. ValueError for a span without
        scored tokens or with tokens outside the vocabulary.
        """
        for group in groups:
            for span in group:
                _check(span, self.model.config.vocab_size)
        results = [[_blank(span) for span in group] for group in groups]
        reach = _reach(self.model.config)
        rows = [row for g, group in enumerate(groups) if group for row in rows_of(g, group, reach)]
        for batch, losses_BC, hits_BC in self._run(rows, reach, progress):
            for row, losses_C, hits_C in zip(batch, losses_BC, hits_BC, strict=False):
                _take(row, losses_C, hits_C, results)
        return results

    def _run(self, rows: Sequence[Row], reach: int, progress: Progress) -> Iterator[tuple]:
        """(rows, losses, hits) of every batch; the devices work ahead of who reads them."""
        least = LEAST_PREFIX[self.model.attention]
        batches = batches_of(rows, least, self._budget, self._mesh.size, reach)
        sizes = [size * sum(shape) for shape, size, _ in batches]
        ahead: deque[tuple] = deque()
        done = 0
        for (shape, size, of_batch), tokens in zip(batches, sizes, strict=True):
            placed = jax.tree.map(self._put, fill(shape, size, of_batch))
            ahead.append((of_batch, tokens, self._program(self._weights, placed)))
            while len(ahead) > (0 if of_batch is batches[-1][2] else AHEAD):
                finished, tokens, found = ahead.popleft()
                yield finished, *jax.device_get(found)
                done += tokens
                progress(done, sum(sizes))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda at: array[at])

    def compiled_programs(self) -> int:
        """How many shapes were compiled so far."""
        return self._program._cache_size()


def _reach(config: GPTConfig) -> int:
    """How many tokens before a tail can change what the model says of it.

    Every layer looks back its window; smear, before them, one token further. What is left keeps
    its positions: float32 rounds the angles of late ones, and scores should be those of the whole.
    """
    return sum(config.window_sizes) + 1


def _check(span: Span, vocab_size: int) -> None:
    if not 1 <= span.start < len(span.tokens):
        raise ValueError(
            f"a span of {len(span.tokens)} tokens cannot be scored from number {span.start} on: "
            "something must come before what is scored, and something must be scored"
        )
    if span.tokens.min() < 0 or span.tokens.max() >= vocab_size:
        raise ValueError(
            f"a text has token {span.tokens.max()} for a vocabulary of {vocab_size}; was it "
            "encoded with another tokenizer?"
        )


def _blank(span: Span) -> Score:
    n = len(span.tokens) - span.start
    return Score(np.zeros(n, np.float32), np.zeros(n, bool))


def _take(row: Row, losses_C, hits_C, results: list[list[Score]]) -> None:
    """Hands a row's scores to the spans they belong to."""
    first = 0
    for tail in row.tails:
        found = slice(first + tail.skip, first + len(tail.tokens) - 1)
        group, span = tail.owner
        score = results[group][span]
        place = slice(tail.at, tail.at + found.stop - found.start)
        score.losses[place], score.hits[place] = losses_C[found], hits_C[found]
        first += len(tail.tokens)
