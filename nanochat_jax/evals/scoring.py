"""How likely a model finds given tokens: what CORE, multiple choice and lm-evaluation-harness ask.

A question is a group of spans, usually one text with several endings. Their common beginning goes
through the model once, as the prefix of a row, without what lies beyond the reach of the windows.
The continuations, where the spans differ, are packed behind it, and none sees another. Only
continuations meet the head, so the logits of a prefix are never computed. Rows of all questions are
sorted into few shapes, each compiled once, with as many rows as a token budget allows.

Shapes: B rows, P tokens of a prefix, C tokens of a row's continuations, N query heads, K key/value
heads, G = N/K, H head dim, V vocabulary.
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
from nanochat_jax.evals.scoring_batches import (
    ScoringBatch,
    ScoringRow,
    Span,
    SpanScore,
    batches_of,
    fill,
    rows_of,
)
from nanochat_jax.gpt import (
    GPT,
    SOFTCAP,
    Params,
    add_previous,
    embed,
    linear,
    lookup_value_embeds,
    norm,
    residual_scalars,
    rotary,
    softcap_cross_entropy,
    transform,
    unstack_layers,
)
from nanochat_jax.sharding import AXIS, REPLICATED, shard_map
from nanochat_jax.train import make_gather

MAX_IN_FLIGHT = 3  # batches queued on the devices
MIN_PREFIX = {"blocked": 32, "cudnn": 128}  # cuDNN wants multiples of 128

type ProgressCallback = Callable[[int, int], object]  # (done, total)


# --- on the device --------------------------------------------------------------------------------


def _score_rows(model: GPT, weights: Params, rows: ScoringBatch):
    """(losses, is_argmax), both (B, C), at every target: the per-device program."""
    config = model.config
    layers = unstack_layers(config, weights)
    keys: list[jax.Array] = []
    values: list[jax.Array] = []
    prefix_positions_BP = rows.first_position_B[:, None] + jnp.arange(rows.prefix_BP.shape[1])

    def attend_prefix(layer, q, k, v):
        keys.append(k)
        values.append(v)
        return causal_attention(q, k, v, config.window_sizes[layer], model.attention)

    def attend_continuations(layer, q, k, v):
        sees = _visible(rows, prefix_positions_BP, config.window_sizes[layer])
        return _attend_continuations(q, k, v, keys[layer], values[layer], sees)

    def run(tokens, before, positions, attend):
        x = _embed(model, weights, tokens, before)
        # Behind a barrier the angles are computed once, not fused into every layer again.
        rope = jax.lax.optimization_barrier(rotary(positions, config.head_dim, config.rope_base))
        found = lookup_value_embeds(layers, tokens, model.dtype)
        return transform(config, found, residual_scalars(config, weights), x, rope, attend)

    with jax.named_scope("prefix"):
        before_BP = jnp.pad(rows.prefix_BP[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        run(rows.prefix_BP, before_BP, prefix_positions_BP, attend_prefix)
    with jax.named_scope("continuations"):
        x_BCD = run(rows.token_BC, rows.before_BC, rows.position_BC, attend_continuations)
    with jax.named_scope("head"):
        logits_BCV = linear(x_BCD, weights["lm_head"])[..., : config.vocab_size]
        losses_BC = softcap_cross_entropy(logits_BCV, rows.target_BC)
        capped = SOFTCAP * jnp.tanh(logits_BCV.astype(jnp.float32) / SOFTCAP)
        is_argmax_BC = jnp.argmax(capped, axis=-1) == rows.target_BC
    return tuple(jax.lax.all_gather(x, AXIS, tiled=True) for x in (losses_BC, is_argmax_BC))


def _embed(model: GPT, weights: Params, tokens_BT, before_BT):
    """The stream before the first layer, given the token before each."""
    x_BTD = norm(embed(weights["wte"], tokens_BT, model.dtype))
    if model.config.recipe == "2025":
        return x_BTD
    exists = (before_BT >= 0).astype(model.dtype)[..., None]
    before_BTD = norm(embed(weights["wte"], jnp.maximum(before_BT, 0), model.dtype)) * exists
    return add_previous(x_BTD, before_BTD, weights["smear_gate"], weights["smear_lambda"])


def _visible(rows: ScoringBatch, prefix_positions_BP, window: int):
    """Whether each token of the continuations sees each of the prefix and of them, (B, C, P + C).

    It sees the prefix and its own continuation up to itself, as far back as the window.
    """
    position, segment = rows.position_BC, rows.segment_BC
    in_prefix = jnp.arange(rows.prefix_BP.shape[1]) < rows.prefix_length_B[:, None]
    old = in_prefix[:, None] & (position[..., None] - prefix_positions_BP[:, None] <= window)
    distance = position[:, :, None] - position[:, None]
    same = segment[:, :, None] == segment[:, None]
    return jnp.concatenate([old, same & (distance >= 0) & (distance <= window)], axis=-1)


def _attend_continuations(q_BCNH, k_BCKH, v_BCKH, keys_BPKH, values_BPKH, sees):
    B, C, N, H = q_BCNH.shape
    K, width = keys_BPKH.shape[2], keys_BPKH.shape[1]
    q_BCKGH = q_BCNH.reshape(B, C, K, N // K, H)
    old = _einsum32("bckgh,bpkh->bkgcp", q_BCKGH, keys_BPKH)
    new = _einsum32("bckgh,bukh->bkgcu", q_BCKGH, k_BCKH)
    scores = jnp.concatenate([old, new], axis=-1) * H**-0.5
    scores = jnp.where(sees[:, None, None], scores, -jnp.inf)
    p = jax.nn.softmax(scores, axis=-1).astype(q_BCNH.dtype)
    out = jnp.einsum("bkgcp,bpkh->bckgh", p[..., :width], values_BPKH)
    out += jnp.einsum("bkgcu,bukh->bckgh", p[..., width:], v_BCKH)
    return out.reshape(B, C, N, H)


_einsum32 = partial(jnp.einsum, preferred_element_type=jnp.float32)


# --- the scorer -----------------------------------------------------------------------------------


class Scorer:
    """A model on a mesh, ready to score.

    `params` are sharded over the mesh as for training steps (load_model with the mesh);
    `tokens_per_device` limits a batch, padding included. Every process of a cluster run must make
    the same calls, and gets all results.
    """

    def __init__(self, model: GPT, mesh: Mesh, params: Params, *, tokens_per_device: int = 16384):
        self.model, self._mesh, self._budget = model, mesh, tokens_per_device
        # Every layer looks back its window, and smear, before them, one token further: nothing
        # before that changes a score. What is left keeps its positions, since float32 rounds the
        # angles of late ones and the scores should be those of the whole text.
        self._context_len = sum(model.config.window_sizes) + 1
        self._rows = NamedSharding(mesh, P(AXIS))
        self._weights = make_gather(model, mesh)(params)
        local, in_specs = partial(_score_rows, model), (REPLICATED, P(AXIS))
        sharded = shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED)
        self._program: Any = jax.jit(sharded)

    def score(
        self,
        groups: Sequence[Sequence[Span]],
        progress: ProgressCallback = lambda done, total: None,
    ) -> list[list[SpanScore]]:
        """The scores of every span of every group, in their order.

        `progress(done, total)` counts tokens, padding included. ValueError for a span without
        scored tokens or with tokens outside the vocabulary.
        """
        results = [[self._empty_score(span) for span in group] for group in groups]
        nonempty = ((g, group) for g, group in enumerate(groups) if group)
        rows = [row for g, group in nonempty for row in rows_of(g, group, self._context_len)]
        for batch, losses_BC, is_argmax_BC in self._run(rows, progress):
            for row, losses_C, is_argmax_C in zip(batch, losses_BC, is_argmax_BC, strict=False):
                end = 0
                for tokens, skip, (group, span), offset in row.continuations:
                    first, end = end, end + len(tokens)
                    place = slice(offset, offset + len(tokens) - 1 - skip)
                    score = results[group][span]
                    score.losses[place] = losses_C[first + skip : end - 1]
                    score.is_argmax[place] = is_argmax_C[first + skip : end - 1]
        return results

    def _empty_score(self, span: Span) -> SpanScore:
        """Room for the scores of a span that can be scored."""
        if not 1 <= span.start < len(span.tokens):
            raise ValueError(
                f"a span of {len(span.tokens)} tokens cannot be scored from number {span.start} "
                "on: something must come before what is scored, and something must be scored"
            )
        vocab_size = self.model.config.vocab_size
        if span.tokens.min() < 0 or span.tokens.max() >= vocab_size:
            raise ValueError(
                f"a text has token {span.tokens.max()} for a vocabulary of {vocab_size}; was it "
                "encoded with another tokenizer?"
            )
        n = len(span.tokens) - span.start
        return SpanScore(np.zeros(n, np.float32), np.zeros(n, bool))

    def _run(self, rows: Sequence[ScoringRow], progress: ProgressCallback) -> Iterator[tuple]:
        """(rows, losses, is_argmax) of every batch, with a few batches queued on the devices."""
        least = MIN_PREFIX[self.model.attention]
        batches = batches_of(rows, least, self._budget, self._mesh.size, self._context_len)
        sizes = [size * sum(shape) for shape, size, _ in batches]
        in_flight: deque[tuple] = deque()
        done = 0
        for (shape, size, of_batch), tokens in zip(batches, sizes, strict=True):
            placed = jax.tree.map(self._put, fill(shape, size, of_batch))
            in_flight.append((of_batch, tokens, self._program(self._weights, placed)))
            while len(in_flight) > (0 if of_batch is batches[-1][2] else MAX_IN_FLIGHT):
                finished, tokens, found = in_flight.popleft()
                yield finished, *jax.device_get(found)
                done += tokens
                progress(done, sum(sizes))

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, self._rows, lambda at: array[at])

    def compiled_programs(self) -> int:
        """How many shapes have been compiled so far."""
        return self._program._cache_size()
