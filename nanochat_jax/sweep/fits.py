"""What many runs show together: isoFLOP parabolas, power laws with intervals, paired tests.

Approach 2 of Chinchilla (arXiv 2203.15556): for one budget of FLOPs, the loss over the logarithm of
the model's size (or of the tokens it saw) is nearly a parabola, whose lowest point is the best size
for that budget; the best sizes of several budgets lie on a power law. Numbers in, numbers out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t: distribution function, its inverse

from nanochat_jax.evals.bootstrap import CONFIDENCE, RESAMPLES, SEED, Interval, interval

USABLE = 0.9  # share of the resamples that must have a minimum, for an interval to mean something
EXACT_UP_TO = 16  # pairs; beyond, the signs are sampled
SAMPLED_SIGNS = 20_000
ROUND_OFF = 1e-9  # what equal sums may differ by, relatively


# --- one budget: a parabola -----------------------------------------------------------------------


@dataclass(frozen=True)
class Parabola:
    """loss(x) = lowest + curvature · (ln x − ln best)²."""

    best: float
    lowest: float
    curvature: float

    def __call__(self, x):
        return self.lowest + self.curvature * np.log(np.asarray(x) / self.best) ** 2


@dataclass(frozen=True)
class Budget:
    """The runs that spent the same: what was varied (parameters or tokens), and their losses."""

    flops: float
    x: Sequence[float]
    losses: Sequence[float]


def fit_parabola(budget: Budget) -> Parabola:
    """Least squares in ln x. ValueError, saying what is missing, where it has no minimum within x.

    A minimum beyond the smallest or the largest x would be a guess, not a measurement.
    """
    if len(set(budget.x)) < 3:
        raise ValueError(f"a parabola needs 3 sizes, here are {len(set(budget.x))}")
    design, middle = _design(budget.x)
    c, b, a = np.linalg.lstsq(design, np.asarray(budget.losses, float))[0]
    if not a > 0:
        raise ValueError("the losses do not curve upwards")
    place = -b / (2 * a)
    if not np.log(min(budget.x)) < place + middle < np.log(max(budget.x)):
        side = "smaller" if place < 0 else "larger"
        raise ValueError(f"the minimum lies beyond the sizes tried: add {side} ones")
    return Parabola(math.exp(place + middle), float(c - a * place**2), float(a))


def _design(x: Sequence[float]) -> tuple[np.ndarray, float]:
    """Columns 1, u, u² of u = ln x − middle; centred, so that the columns are far from parallel."""
    logs = np.log(np.asarray(x, float))
    middle = float(logs.mean())
    return np.vander(logs - middle, 3, increasing=True), middle


# --- several budgets: power laws ------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient · x^exponent; the 95 % interval of the exponent, None where unknown."""

    exponent: float
    coefficient: float
    interval: Interval | None = None

    def __call__(self, x):
        return self.coefficient * np.asarray(x, float) ** self.exponent


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in logarithms; the interval by resampling the residuals, from 3 points on."""
    law = _line(x, y)
    residuals = np.log(y) - np.log(law(x))
    noise = _resampled([residuals], 2, (len(x), RESAMPLES), SEED)
    if noise is None:
        return law
    slopes = _slopes(np.log(x), np.log(law(x))[:, None] + noise)
    return replace(law, interval=interval(slopes))


def fit_optimum_laws(budgets: Sequence[Budget]) -> tuple[PowerLaw, PowerLaw]:
    """The best x and the lowest loss as powers of the FLOPs: (x ∝ C^a, loss ∝ C^−c).

    Every budget must have a minimum (`fit_parabola`), and there must be two or more. The intervals
    come from the runs' own scatter around the parabolas: their residuals, pooled, are resampled
    and everything is fitted again. Three runs a budget leave no residuals, and so no interval.
    """
    fits = [fit_parabola(budget) for budget in budgets]
    flops = [budget.flops for budget in budgets]
    best, lowest = _line(flops, [f.best for f in fits]), _line(flops, [f.lowest for f in fits])
    resampled = _resampled_minima(budgets, fits)
    if resampled is None:
        return best, lowest
    intervals = [interval(_slopes(np.log(flops), values)) for values in resampled]
    return replace(best, interval=intervals[0]), replace(lowest, interval=intervals[1])


def _line(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    if len(set(x)) < 2:
        raise ValueError(f"a power law needs 2 points, here are {len(set(x))}")
    logs, middle = np.log(y), np.log(x).mean()
    slope = float(_slopes(np.log(x), logs[:, None])[0])
    return PowerLaw(slope, math.exp(logs.mean() - slope * middle))


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes of the least-squares lines through (x, y[:, r]), for every r."""
    centred = x - x.mean()
    return centred @ y / (centred @ centred)


def _resampled_minima(
    budgets: Sequence[Budget], fits: Sequence[Parabola]
) -> tuple[np.ndarray, np.ndarray] | None:
    """ln best and ln lowest, (budgets, resamples) each; None where too few have a minimum."""
    residuals = [np.asarray(b.losses) - fit(b.x) for b, fit in zip(budgets, fits, strict=True)]
    best, lowest = [], []
    for index, (budget, fit) in enumerate(zip(budgets, fits, strict=True)):
        noise = _resampled(residuals, 3, (len(budget.x), RESAMPLES), SEED + index)
        if noise is None:
            return None
        design, middle = _design(budget.x)
        c, b, a = np.linalg.pinv(design) @ (fit(budget.x)[:, None] + noise)
        a = np.where(a > 0, a, np.nan)
        best.append(middle - b / (2 * a))
        least = c - b**2 / (4 * a)
        lowest.append(np.log(np.where(least > 0, least, np.nan)))
    values = np.array([best, lowest])
    usable = np.isfinite(values).all(axis=(0, 1))
    return None if usable.mean() < USABLE else (values[0][:, usable], values[1][:, usable])


def _resampled(
    residuals: Sequence[np.ndarray], fitted: int, shape: tuple[int, int], seed: int
) -> np.ndarray | None:
    """Residuals sampled with replacement from all fits together, scaled up to the true errors.

    Residuals of n points and k = `fitted` parameters are too small by sqrt((n − k) / n).
    """
    pool = [r * math.sqrt(len(r) / (len(r) - fitted)) for r in residuals if len(r) > fitted]
    if not pool:
        return None
    return np.random.default_rng(seed).choice(np.concatenate(pool), shape)


# --- two variants, the same seeds -----------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """How b differs from a, pair by pair (b − a)."""

    pairs: int
    mean: float
    interval: Interval  # of the mean, by Student's t
    t: float | None  # None: all differences are the same
    p_t: float
    p_permutation: float  # over all ways to swap a and b within pairs
    smallest_p: float  # that the permutation test can give with so many pairs


def paired_test(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Two-sided tests of whether a and b differ. ValueError for fewer than two pairs."""
    differences = np.asarray(b, float) - np.asarray(a, float)
    n = len(differences)
    if n < 2:
        raise ValueError(f"a paired test needs 2 seeds that finished in both, here are {n}")
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n)
    # Differences of equal numbers may leave round-off.
    round_off = ROUND_OFF * float(np.abs([*a, *b]).max())
    t = None if error <= round_off else mean / error
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    return Paired(
        pairs=n,
        mean=mean,
        interval=(mean - half, mean + half),
        t=t,
        p_t=float(abs(mean) <= round_off) if t is None else 2 * float(stdtr(n - 1, -abs(t))),
        p_permutation=_permutation_p(differences),
        smallest_p=2.0 ** (1 - n) if n <= EXACT_UP_TO else 1 / (SAMPLED_SIGNS + 1),
    )


def _permutation_p(differences: np.ndarray) -> float:
    """The share of sign flips whose sum is as far from 0 as what was seen (Fisher, 1935)."""
    n = len(differences)
    seen = abs(differences.sum()) * (1 - ROUND_OFF)
    if n <= EXACT_UP_TO:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ differences) >= seen).mean())
    signs = np.random.default_rng(SEED).choice([-1, 1], (SAMPLED_SIGNS, n))
    return float((1 + (np.abs(signs @ differences) >= seen).sum()) / (1 + SAMPLED_SIGNS))
