"""Intervals that repeat, cover, and shrink; CORE as the mean of resampled tasks."""

import numpy as np
import pytest

from nanochat_jax.evals.bootstrap import centred, interval, mean_of_centred, resampled_means


def test_an_interval_repeats_and_contains_the_mean():
    values = np.random.default_rng(0).random(200) < 0.3
    first, second = (interval(resampled_means(values)) for _ in range(2))
    assert first == second
    assert first != interval(resampled_means(values, seed=1))
    assert first[0] < values.mean() < first[1]


def test_it_is_as_wide_as_theory_says():
    values = np.arange(1000) % 4 == 0
    low, high = interval(resampled_means(values))
    assert high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 1000) ** 0.5, rel=0.1)


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(300):
        low, high = interval(resampled_means(rng.random(100) < 0.4, resamples=400, seed=seed))
        covered += low <= 0.4 <= high
    assert 0.90 < covered / 300 < 0.985


def test_large_tasks_are_resampled_in_chunks():
    values = np.arange(30_000) % 2
    means = resampled_means(values, resamples=301)
    assert means.shape == (301,)
    assert means.std() == pytest.approx(0.5 / 30_000**0.5, rel=0.15)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_answers_that_are_all_alike_prove_no_certainty(n):
    """The exact interval of n successes of n is 0.025^(1/n) to 1 (Clopper and Pearson, 1934)."""
    low, high = interval(resampled_means(np.ones(n)))
    assert high == 1.0
    assert 1 - low == pytest.approx(1 - 0.025 ** (1 / n), rel=0.3)
    low, high = interval(resampled_means(np.zeros(n)))
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / n), rel=0.3)


def test_absent_answers():
    with pytest.raises(ValueError, match="at least one value"):
        resampled_means(np.array([]))


def test_the_mean_of_tasks_varies_less_than_a_task():
    rng = np.random.default_rng(2)
    tasks = [rng.random(100) < 0.5 for _ in range(16)]
    mean, (low, high) = mean_of_centred(tasks, [0.25] * 16)
    assert mean == pytest.approx(np.mean([centred(task.mean(), 0.25) for task in tasks]))
    alone = interval(centred(resampled_means(tasks[0]), 0.25))
    assert low < mean < high
    assert (alone[1] - alone[0]) / (high - low) == pytest.approx(4, rel=0.2)
