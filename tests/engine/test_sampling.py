"""The filters mean what they say, in their order, and rows do not influence each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.engine.sampling import (
    CANDIDATES,
    BatchedSamplingParams,
    SamplingParams,
    sample_tokens,
)

P = np.array([0.5, 0.3, 0.15, 0.05])
ROWS = 4000
sample_rows = jax.jit(sample_tokens)


def shares(sampling: SamplingParams, seen=(), logits=None) -> np.ndarray:
    """The frequency of each token over many rows with different seeds."""
    logits = np.log(P) if logits is None else logits
    params = BatchedSamplingParams.empty(ROWS)
    for row in range(ROWS):
        params.put(row, sampling, row)
    seen_BV = np.zeros((ROWS, len(logits)), bool)
    seen_BV[:, list(seen)] = True
    tiled = np.tile(np.float32(logits), (ROWS, 1))
    tokens = sample_rows(tiled, seen_BV, params, np.zeros(ROWS, np.int32))
    return np.bincount(tokens, minlength=len(logits)) / ROWS


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(), P),
        (SamplingParams(temperature=0.5), P**2 / (P**2).sum()),
        (SamplingParams(top_k=2), [0.625, 0.375, 0, 0]),
        (SamplingParams(top_k=1), [1, 0, 0, 0]),
        (SamplingParams(top_k=100), P),
        (SamplingParams(top_k=10**6), P),
        (SamplingParams(top_p=0.79), [0.625, 0.375, 0, 0]),  # 0.5 alone does not reach it
        (SamplingParams(top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (SamplingParams(top_p=0.0), [1, 0, 0, 0]),
        (SamplingParams(min_p=0.31), [0.625, 0.375, 0, 0]),  # of the largest, 0.5
        (SamplingParams(top_k=3, top_p=0.8), [0.625, 0.375, 0, 0]),  # top_p of what top_k left
        (SamplingParams(temperature=0.0), [1, 0, 0, 0]),
        (SamplingParams(temperature=0.0, top_k=3, top_p=0.9), [1, 0, 0, 0]),
    ],
)
def test_the_shares_of_the_tokens(sampling, expected):
    np.testing.assert_allclose(shares(sampling), expected, atol=0.03)


def test_the_repetition_penalty_is_for_tokens_seen_and_pushes_both_signs_down():
    logits = np.array([1.0, 1.0, -1.0, -1.0])
    odds = np.exp([0.5, 1.0, -2.0, -1.0])
    got = shares(SamplingParams(repetition_penalty=2.0), seen=[0, 2], logits=logits)
    np.testing.assert_allclose(got, odds / odds.sum(), atol=0.03)
    greedy = shares(SamplingParams(temperature=0, repetition_penalty=2.0), seen=[0], logits=logits)
    assert greedy.tolist() == [0, 1, 0, 0]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_row_samples_the_same_whatever_its_neighbours_do(data):
    """Also where the number of candidates changes."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    logits = rng.normal(0, 1, (3, CANDIDATES[-1] + 44)).astype(np.float32)
    seen = np.zeros(logits.shape, bool)
    setting = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0]),
        top_k=st.sampled_from([0, 1, *(k + d for k in CANDIDATES for d in (0, 1))]),
        top_p=st.sampled_from([1.0, 0.5]),
        seed=st.integers(0, 2**64 - 1),
    )
    mine, others = data.draw(setting), data.draw(st.lists(setting, min_size=2, max_size=2))
    results = []
    for neighbours in ([SamplingParams(temperature=0)] * 2, others):
        params = BatchedSamplingParams.empty(3)
        for row, sampling in enumerate([mine, *neighbours]):
            params.put(row, sampling, 5)
        results.append(int(sample_rows(logits, seen, params, np.full(3, 7, np.int32))[0]))
    assert results[0] == results[1]


def test_seed_sample_and_position_each_change_the_tokens():
    def tokens(seed=1, sample=0, start=0):
        params = BatchedSamplingParams.empty(50)
        for row in range(50):
            params.put(row, SamplingParams(seed=seed), sample)
        logits = jnp.zeros((50, 1000))
        return np.asarray(sample_rows(logits, logits > 1, params, start + np.arange(50))).tolist()

    assert tokens() == tokens()
    different = [
        tokens(),
        tokens(seed=2),
        tokens(seed=1 + 2**32),
        tokens(sample=1),
        tokens(start=50),
    ]
    assert len({tuple(row) for row in different}) == len(different)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("repetition_penalty", 0.0),
        ("seed", 2**64),
    ],
)
def test_a_setting_outside_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})
