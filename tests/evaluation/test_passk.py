from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.evaluation.passk import pass_at_k


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_equals_counting_all_draws(arguments):
    n, c, k = arguments
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_known_values():
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10_000, 1, 10) == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 6), (5, 2, 0), (5, 6, 1), (5, -1, 1), (0, 0, 1)])
def test_refuses(n, c, k):
    with pytest.raises(ValueError, match="got"):
        pass_at_k(n, c, k)
