"""pass@k: the probability that at least one of k samples of a problem passes."""

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate from n samples of one problem, c of which pass: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1. Exact integers up to the division.

    Raises:
        ValueError: k is not in 1 .. n, or c not in 0 .. n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: got {k}, expected 1 to n = {n} (pass@k needs at least k samples a problem)")
    if not 0 <= c <= n:
        raise ValueError(f"c: got {c}, expected 0 to n = {n}")
    return 1.0 - comb(n - c, k) / comb(n, k)
