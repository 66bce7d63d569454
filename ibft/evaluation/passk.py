"""pass@k and Pass@k(m) of one problem, and their mean over problems with an interval.

    pass@k      the probability that at least one of k samples passes
    Pass@k(m)   the probability that at least m of them do; Pass@k(1) is pass@k

n: samples of a problem, c: those of them that pass; the k are drawn from the n without replacement. All counting is in
integers and divided once, so that each value is the double nearest to the exact one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import comb

LEVEL = 0.95
RESAMPLES = 10_000
BLOCK = 1 << 20  # draws held at once


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate from n samples of one problem, c of which pass: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.

    Raises:
        ValueError: k is not in 1 .. n, or c not in 0 .. n.
    """
    check_counts(n, c, k)
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_at_k_m(n: int, c: int, k: int, m: int) -> float:
    """Unbiased estimate that at least m of k samples pass: sum over j >= m of C(c, j) C(n-c, k-j) / C(n, k).

    Equals G-Pass@k of Liu et al. 2024 (arXiv 2412.13147) at its threshold tau = m / k.

    Raises:
        ValueError: as pass_at_k; m is not in 1 .. k.
    """
    if not 1 <= m <= k:
        raise ValueError(f"m: got {m}, expected 1 to k = {k}")
    return pass_at_k_all_m(n, c, k)[m - 1]


@cache
def pass_at_k_all_m(n: int, c: int, k: int) -> tuple[float, ...]:
    """Pass@k(m) for m = 1 .. k. Raises ValueError as pass_at_k."""
    check_counts(n, c, k)
    exactly = [comb(c, j) * comb(n - c, k - j) for j in range(k, 0, -1)]  # draws with j passes, most first
    at_least = list(accumulate(exactly))
    draws = comb(n, k)
    return tuple(count / draws for count in reversed(at_least))


def check_counts(n: int, c: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k}, expected 1 to n = {n} (pass@k needs at least k samples a problem)")
    if not 0 <= c <= n:
        raise ValueError(f"c: got {c}, expected 0 to n = {n}")


@dataclass(frozen=True)
class Estimate:
    """A mean over problems. low, high: its interval; None where there is a single problem, of which nothing varies."""

    value: float
    low: float | None
    high: float | None


def estimate_means(columns: Sequence[Sequence[float]], *, seed: int, resamples: int = RESAMPLES) -> list[Estimate]:
    """Mean of each column and its percentile bootstrap interval (95 %), problems drawn with replacement.

    Every resample draws the same problems for all columns; so do two calls with one seed and as many problems.

    Args:
        columns: [S][P], S scores of P problems.
        seed: 0 or more.
    """
    import numpy as np

    values_SP = np.array(columns, dtype=np.float64)
    problems = values_SP.shape[1]
    means = [float(column.mean()) for column in values_SP]
    if problems == 1:
        return [Estimate(mean, None, None) for mean in means]
    generator = np.random.default_rng(seed)
    means_SR = np.empty((len(means), resamples))
    step = max(1, BLOCK // problems)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn_RP = generator.integers(problems, size=(stop - start, problems))
        for means_R, values_P in zip(means_SR, values_SP, strict=True):
            means_R[start:stop] = values_P[drawn_RP].mean(axis=1)
    low_S, high_S = np.quantile(means_SR, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return [Estimate(*row) for row in zip(means, low_S.tolist(), high_S.tolist(), strict=True)]
