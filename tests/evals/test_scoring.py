"""Scores of packed rows against the plain forward pass, whatever the packing."""

from functools import partial

import jax
import numpy as np
import pytest
from random_params import random_params

from nanochat_jax.evals.scoring import Scorer
from nanochat_jax.evals.scoring_batches import (
    MAX_CONTINUATION,
    Span,
    batches_of,
    bucket,
    rows_of,
    shapes_of,
)
from nanochat_jax.gpt import GPT, GPTConfig
from nanochat_jax.sharding import from_logical, make_mesh

VOCAB = 96
CONTEXT = 10_000  # longer than any text here
LONGEST = MAX_CONTINUATION + 150


def random_model(recipe: str):
    config = GPTConfig(
        recipe=recipe, sequence_len=192, vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2,
        n_embd=32, window_pattern="SL",
    )  # fmt: skip
    return GPT(config), random_params(config)


def make_scorer(model, params, n_devices=1, **how):
    mesh = make_mesh(n_devices)
    return Scorer(model, mesh, from_logical(params, mesh), **how)


@pytest.fixture(scope="module", params=["2025", "2026"])
def tiny(request):
    return random_model(request.param)


def plain(model, params, span: Span):
    """(losses, is_argmax) of a span, from the logits of the whole text."""
    padded = np.zeros((1, LONGEST), np.int32)  # on the right, where a causal model does not look
    padded[0, : len(span.tokens)] = span.tokens
    logprobs = np.asarray(log_softmax(model, params, padded))[0, : len(span.tokens)]
    targets = span.tokens[span.start :]
    of_targets = logprobs[span.start - 1 : -1]
    return -of_targets[np.arange(len(targets)), targets], of_targets.argmax(-1) == targets


@partial(jax.jit, static_argnums=0)
def log_softmax(model, params, tokens):
    return jax.nn.log_softmax(model.apply({"params": params}, tokens))


def text(rng, n: int) -> np.ndarray:
    return rng.integers(0, VOCAB, n, dtype=np.int32)


def questions(rng) -> list[list[Span]]:
    def endings(context: int, *lengths: int) -> list[Span]:
        start = text(rng, context)
        return [Span(np.concatenate([start, text(rng, n)]), context) for n in lengths]

    beginnings = [np.concatenate([text(rng, n), text(rng, 1)]) for n in (5, 9)]
    ending = text(rng, 6)
    schema = [Span(np.concatenate([b, ending]), len(b)) for b in beginnings]
    return [
        endings(20, 1, 3, 7, 2),
        endings(300, 5, 2),  # longer than what the model was trained on
        endings(600, 3, 1),  # than what all windows together reach
        endings(1, 4, 4),  # nothing in common but the first token
        endings(40, 30),
        schema,
        [Span(text(rng, 2), 1)],
    ]


@pytest.mark.parametrize("n_devices", [1, 3])
def test_scores_are_those_of_the_whole_text(tiny, n_devices):
    groups = questions(np.random.default_rng(1))
    scorer = make_scorer(*tiny, n_devices, tokens_per_device=512)
    for group, scores in zip(groups, scorer.score(groups), strict=True):
        for span, score in zip(group, scores, strict=True):
            losses, is_argmax = plain(*tiny, span)
            np.testing.assert_allclose(score.losses, losses, atol=2e-5)
            np.testing.assert_array_equal(score.is_argmax, is_argmax)


def test_a_long_ending_is_scored_in_pieces():
    model, params = random_model("2026")
    rng = np.random.default_rng(2)
    long = Span(text(rng, LONGEST), 3)
    short = Span(np.concatenate([long.tokens[:3], text(rng, 2)]), 3)
    assert len(rows_of(0, [long, short], CONTEXT)) == 3
    long_score, short_score = make_scorer(model, params).score([[long, short]])[0]
    np.testing.assert_allclose(long_score.losses, plain(model, params, long)[0], atol=2e-5)
    np.testing.assert_allclose(short_score.losses, plain(model, params, short)[0], atol=2e-5)


def test_every_row_is_in_one_batch_and_batches_keep_the_budget():
    rng = np.random.default_rng(3)
    spans = [Span(text(rng, int(n)), max(1, int(n) - 5)) for n in rng.integers(6, 900, 300)]
    rows = [row for i, span in enumerate(spans) for row in rows_of(i, [span], CONTEXT)]
    batches = batches_of(rows, 32, 4096, 4, CONTEXT)
    span_ids = [each.span_id for _, _, b in batches for row in b for each in row.continuations]
    assert sorted(span_ids) == [(i, 0) for i in range(300)]
    for (width, cont_width), size, batch in batches:
        assert len(batch) <= size
        assert size % 4 == 0
        assert size // 4 * (width + cont_width) <= 4096
        assert all(len(row.prefix) <= width for row in batch)
        assert all(row.n_continued <= cont_width for row in batch)
    padded = sum(size * sum(shape) for shape, size, _ in batches)
    assert padded < 1.6 * sum(len(span.tokens) for span in spans)


def test_a_few_rows_join_the_next_shape_only_where_it_is_cheap():
    def row(length: int, start: int):
        return rows_of(0, [Span(np.zeros(length, np.int32), start)], CONTEXT)[0]

    near, far = row(60, 55), row(3000, 2990)
    assert shapes_of([row(20, 15), near], 32, 1000, CONTEXT) == [(64, 16)] * 2
    assert shapes_of([row(20, 15), far], 32, 1000, CONTEXT) == [(32, 16), (3072, 16)]


@pytest.mark.parametrize("least", [32, 128])
def test_buckets_hold_their_size_and_keep_their_granularity(least):
    for size in range(0, 5000, 7):
        found = bucket(size, least)
        assert size <= found <= max(least, 2 * size)
        assert found % least == 0 or (least == 32 and found % 16 == 0)


def test_a_long_prompt_costs_no_more_than_the_windows_reach():
    model, params = random_model("2026")
    totals = []
    make_scorer(model, params).score(
        [[Span(text(np.random.default_rng(5), 5000), 4990)]],
        lambda done, total: totals.append(total),
    )
    assert sum(model.config.window_sizes) < totals[-1] < 400


def test_equal_questions_compile_one_program():
    model, params = random_model("2025")
    scorer = make_scorer(model, params)
    rng = np.random.default_rng(4)
    for _ in range(2):
        scorer.score([[Span(text(rng, 30), 25)] for _ in range(8)])
    assert scorer.compiled_programs() == 1
    assert scorer.score([]) == []
    assert scorer.score([[]]) == [[]]


def test_bad_spans_are_refused(tiny):
    scorer = make_scorer(*tiny)
    tokens = np.arange(5, dtype=np.int32)
    for start in (0, 5):
        with pytest.raises(ValueError, match="cannot be scored"):
            scorer.score([[Span(tokens, start)]])
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB}"):
        scorer.score([[Span(tokens + VOCAB, 1)]])
