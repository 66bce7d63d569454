"""How well a model knows a text by heart, from what it thought of each token; and how far two groups of scores differ.

    Min-K%    -1/m sum log p(x_t | x_<t)     over the m least likely tokens (Shi et al. 2024, arXiv 2310.16789)
    Min-K%++  -1/m sum z_t                   over the m lowest z_t (Zhang et al. 2024, arXiv 2404.02936)
    z_t       (log p(x_t | x_<t) - mu_t) / sigma_t, mu_t and sigma_t of the log-probabilities that the model gave there
    m         max(1, floor(K n / 100)) of the text's n tokens

Both have the sign of IB-FT's paper: LOWER = MORE MEMORISED. (The two papers that they come from have it the other way.)
Pure functions of plain numbers.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

BINS = 50


def lowest_count(n: int, k: float) -> int:
    """max(1, floor(k n / 100)), k as it is written: 29 % of 100 are 29, which they are not in binary fractions.

    Raises:
        ValueError: n is below 1, or k not above 0 and at most 100.
    """
    if n < 1:
        raise ValueError(f"n: got {n}, expected 1 or more")
    if not 0 < k <= 100:
        raise ValueError(f"k: got {k}, expected more than 0 and at most 100 %")
    return max(1, math.floor(Fraction(str(k)) * n / 100))


def min_k(log_probs: Sequence[float], k: float) -> float:
    """Mean negative log-probability, in nats, of the k % least likely tokens of a text.

    Raises:
        ValueError: no token, or k out of range.
    """
    return _mean_of_lowest_negated(log_probs, k)


def min_k_pp(z_scores: Sequence[float], k: float) -> float:
    """Mean negative z of the k % of a text's tokens with the lowest. Raises ValueError as `min_k`."""
    return _mean_of_lowest_negated(z_scores, k)


def _mean_of_lowest_negated(values: Sequence[float], k: float) -> float:
    count = lowest_count(len(values), k)
    return 0.0 - math.fsum(sorted(values)[:count]) / count  # 0.0 - 0.0 is 0.0, -(0.0) would be -0.0


def auc(a: Sequence[float], b: Sequence[float]) -> float:
    """P(A > B) + P(A = B) / 2 for one value of each drawn at random: 1/2 where the two cannot be told apart.

    By ranks, O(n log n), counted in whole numbers and divided once.

    Raises:
        ValueError: one of them is empty.
    """
    _check_both(a, b)
    merged = sorted([(value, True) for value in a] + [(value, False) for value in b])
    halves = below = start = 0  # below: of b, less than the values at hand
    while start < len(merged):
        end = start
        while end < len(merged) and merged[end][0] == merged[start][0]:
            end += 1
        of_a = sum(is_a for _, is_a in merged[start:end])
        of_b = end - start - of_a
        halves += of_a * (2 * below + of_b)
        below += of_b
        start = end
    return halves / (2 * len(a) * len(b))


def overlap_coefficient(a: Sequence[float], b: Sequence[float], bins: int = BINS) -> float:
    """The area under both of two histograms: 1 where they are the same, 0 where they share no bin.

    Each is normalised to 1; the bins are common to both, equally wide, from the least to the greatest value of all.
    With few values the histograms are ragged, and the overlap comes out too small: compare groups of hundreds. Values
    far out (Min-K%++ where a model was sure, and wrong) widen all bins, and it comes out too large: there see `auc`.

    Raises:
        ValueError: one of them is empty, or bins is below 1.
    """
    _check_both(a, b)
    if bins < 1:
        raise ValueError(f"bins: got {bins}, expected 1 or more")
    low, high = min(*a, *b), max(*a, *b)

    def histogram(values: Sequence[float]) -> list[Fraction]:
        counts = [0] * bins
        for value in values:
            # the greatest value belongs to the last bin; where all are equal, all belong to the first
            counts[min(int((value - low) / (high - low) * bins), bins - 1) if high > low else 0] += 1
        return [Fraction(count, len(values)) for count in counts]

    return float(sum(map(min, histogram(a), histogram(b))))


def _check_both(a: Sequence[float], b: Sequence[float]) -> None:
    if not a or not b:
        raise ValueError(f"a and b: got {len(a)} and {len(b)} values, expected 1 or more of each")
