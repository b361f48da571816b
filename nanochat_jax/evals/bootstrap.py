"""Confidence intervals of means by the bootstrap: how much a score would move with other questions.

The questions are resampled with replacement many times, and the interval lies between percentiles
of the means (Efron, 1979). The seed is fixed: equal results have equal intervals.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 1234
CHUNK = 4_000_000  # numbers sampled in one go: 32 MB

type Interval = tuple[float, float]


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Means of `resamples` samples of the values, each of their number; (resamples,).

    Values are between 0 and 1. Where all are equal, their opposite is added to those sampled from:
    100 right answers of 100 do not prove that a wrong one is impossible, and the interval becomes
    about that of the rule of three. ValueError if there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value")
    rng = np.random.default_rng(seed)
    values = np.asarray(values, np.float64)
    pool = values if np.ptp(values) else np.append(values, 1 - values[0])
    rows = max(1, CHUNK // n)
    sizes = [min(rows, resamples - first) for first in range(0, resamples, rows)]
    samples = (pool[rng.integers(0, len(pool), (size, n))] for size in sizes)
    return np.concatenate([sample.mean(axis=1) for sample in samples])


def interval(means: np.ndarray) -> Interval:
    """(low, high): the percentiles of the resampled means that enclose CONFIDENCE of them."""
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [outside, 100 - outside])
    return float(low), float(high)


def centred(accuracy, baseline: float):
    """An accuracy, or an array of them, as a share of the way from guessing (0) to perfect (1)."""
    return (accuracy - baseline) / (1 - baseline)


def mean_of_centred(
    values: Sequence[np.ndarray], baselines: Sequence[float], seed: int = SEED
) -> tuple[float, Interval]:
    """The mean over tasks of their centred accuracies, and its interval.

    The questions of each task are resampled apart: tasks are fixed, questions are a sample.
    """
    tasks = list(zip(values, baselines, strict=True))
    mean = float(np.mean([centred(np.mean(task), baseline) for task, baseline in tasks]))
    resampled = [
        centred(resampled_means(task, seed=seed + i), baseline)
        for i, (task, baseline) in enumerate(tasks)
    ]
    return mean, interval(np.mean(resampled, axis=0))
