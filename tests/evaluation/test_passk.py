from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.evaluation.passk import estimate_means, pass_at_k, pass_at_k_all_m, pass_at_k_m

COUNTS = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


@given(COUNTS)
def test_equals_counting_all_draws(arguments):
    n, c, k = arguments
    passing = [sum(draw) for draw in combinations([1] * c + [0] * (n - c), k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(j >= 1 for j in passing) / len(passing), abs=1e-15)
    for m in range(1, k + 1):
        assert pass_at_k_m(n, c, k, m) == pytest.approx(sum(j >= m for j in passing) / len(passing), abs=1e-15)


def exact(n: int, c: int, k: int, m: int) -> Fraction:
    """One draw after another: chances[j] that j of those so far pass."""
    chances = [Fraction(1)] + [Fraction(0)] * k
    for drawn in range(k):
        after = [Fraction(0)] * (k + 1)
        for j in range(drawn + 1):
            if chances[j]:
                passes = Fraction(c - j, n - drawn)
                after[j] += chances[j] * (1 - passes)
                if passes:
                    after[j + 1] += chances[j] * passes
        chances = after
    return sum(chances[m:], Fraction(0))


@pytest.mark.parametrize("c", [0, 1, 3, 100, 199, 200])
@pytest.mark.parametrize(("k", "ms"), [(1, [1]), (10, [1, 5, 10]), (100, [1, 2, 50, 99, 100])])
def test_exact_at_200_samples(c, k, ms):
    for m in ms:
        assert abs(Fraction(pass_at_k_m(200, c, k, m)) - exact(200, c, k, m)) <= Fraction(1, 10**12)


def test_exact_where_all_samples_are_drawn():
    """k = n leaves nothing to chance."""
    for c in (0, 1, 120, 200):
        assert pass_at_k_all_m(200, c, 200) == (1.0,) * c + (0.0,) * (200 - c)


@given(COUNTS)
def test_one_of_k_is_pass_at_k_and_more_are_rarer(arguments):
    n, c, k = arguments
    values = pass_at_k_all_m(n, c, k)
    assert values[0] == pass_at_k(n, c, k)  # to the bit
    assert list(values) == sorted(values, reverse=True)
    assert len(values) == k
    assert sum(values) == pytest.approx(k * c / n)  # the expected number that passes


def test_known_values():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10_000, 1, 10) == 1e-3  # 1 - C(9999, 10) / C(10000, 10) in doubles would lose three digits
    assert pass_at_k_m(10, 9, 10, 10) == 0
    assert pass_at_k_m(4, 2, 2, 2) == pytest.approx(1 / 6)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 2, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_refuses(n, c, k):
    with pytest.raises(ValueError, match="got"):
        pass_at_k(n, c, k)
    with pytest.raises(ValueError, match="got"):
        pass_at_k_m(n, c, k, 1)


@pytest.mark.parametrize("m", [0, 3])
def test_refuses_m(m):
    with pytest.raises(ValueError, match=f"m: got {m}, expected 1 to k = 2"):
        pass_at_k_m(5, 2, 2, m)


def quantile(problems: int, passed: int, level: float) -> float:
    """Exactly, of the mean of a resample: that of a binomial count."""
    share, below = passed / problems, 0.0
    for count in range(problems + 1):
        below += comb(problems, count) * share**count * (1 - share) ** (problems - count)
        if below >= level:
            return count / problems
    return 1.0


# Cases where no cumulative probability comes within 0.005 of 0.025 or 0.975: 3 standard deviations of 10,000 resamples.
@pytest.mark.parametrize(("problems", "passed"), [(2, 1), (5, 1), (12, 6), (20, 19), (29, 17), (31, 9)])
def test_interval_is_that_of_all_resamples(problems, passed):
    (found,) = estimate_means([[1.0] * passed + [0.0] * (problems - passed)], seed=1)
    assert found.value == pytest.approx(passed / problems)
    assert (found.low, found.high) == pytest.approx(
        (quantile(problems, passed, 0.025), quantile(problems, passed, 0.975)), abs=1e-12
    )


def test_interval_covers_the_truth_as_often_as_it_says():
    samples_SP = np.random.default_rng(5).beta(0.6, 1.2, size=(1000, 60))  # mean 1/3
    found = estimate_means(samples_SP.tolist(), seed=2, resamples=1500)
    assert 0.92 < np.mean([one.low <= 1 / 3 <= one.high for one in found]) < 0.965


def test_interval_depends_on_the_seed_alone():
    values = [[0.1, 0.5, 0.9, 0.3], [0.0, 0.2, 0.4, 0.8]]
    assert estimate_means(values, seed=3, resamples=99) == estimate_means(values, seed=3, resamples=99)
    assert estimate_means(values, seed=3, resamples=99) != estimate_means(values, seed=4, resamples=99)
    first = estimate_means(values[1:], seed=3, resamples=99)
    assert first == estimate_means(values, seed=3, resamples=99)[1:]  # all columns see the same draws


def test_many_problems_are_resampled_in_blocks(monkeypatch):
    values = [[1.0] * 9 + [0.0] * 22]
    monkeypatch.setattr("ibft.evaluation.passk.BLOCK", 31 * 7)  # the last block is not full
    (found,) = estimate_means(values, seed=1)
    assert (found.low, found.high) == pytest.approx((quantile(31, 9, 0.025), quantile(31, 9, 0.975)))


def test_one_problem_has_no_interval():
    (found,) = estimate_means([[0.5]], seed=0)
    assert (found.value, found.low, found.high) == (0.5, None, None)
