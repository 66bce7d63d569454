"""How far apart two groups of examples lie in a model: distances and angles between group means, with intervals.

A group is one vector x_i [D] an example (see `ibft.analysis.hidden_states`), m its mean. Of the groups `most` and
`least`, and of a third, the reference, whose mean is c:

    l2              |m_most - m_least|
    l2_normalised   l2 / s,  s = half of (mean of |x_i| over most + mean of |x_i| over least): each group counts alike,
                    whatever its size. It does not change when a model's vectors are all scaled, which l2 does
    angle           degrees between m_most and m_least, seen from the origin. Vectors of a language model share a large
                    common part, so that this angle is small whatever the groups are
    angle_centred   degrees between m_most - c and m_least - c: 0 where both groups depart from ordinary examples in the
                    same direction, 180 where in opposite ones

Why c is the mean of other examples, in the same model: seen from the mean of the two groups themselves two groups are
always 180 degrees apart, in the base model too if theirs is taken there; and seen from the base's mean a fine-tuned
model's two groups lie the same way, because fine-tuning moves all examples alike.

A mean of n examples lies off its population's mean by about sqrt(tr(S) / n), S the covariance, in a direction of its
own, so that groups drawn from one population are some way apart, and any two groups further than their populations. All
metrics are made of five squared lengths, |m_most - m_least|^2, |m_most - c|^2, |m_least - c|^2, |m_most|^2 and
|m_least|^2, and each of them is too large by tr(S) / n of every group in it, on average. Hence two values:

    sample      of these very examples
    estimate    of the populations: the five lengths less that excess. 0 where two means are no further apart than
                chance puts them; an angle is None where a side of it is no longer than chance makes it

low, high: percentile bootstrap interval (95 %) about `estimate`, examples drawn with replacement within each group. A
resample of a sample adds the excess once more, so that twice of it is taken off here: left in, the interval lies too
high, and for groups of some ten to some hundred examples it misses the truth far more often than 5 times in 100
(tests/analysis/test_geometry.py). Where chance makes much of a length, the interval is wider than it need be. A
resample in which an angle has no value counts as 0 degrees for `low` and as 180 for `high`.

Legend: n examples of a group, D hidden size, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
METRICS = ("l2", "l2_normalised", "angle", "angle_centred")
BLOCK = 100  # resamples at once: their means are [BLOCK, D]
LENGTHS = ((0, 1), (0, 2), (1, 2), (0,), (1,))  # which groups' means (most, least, reference) make each squared length
ROUNDING = 1e-24  # a squared length below this part of a group's squared norm is that between equal means


@dataclass(frozen=True)
class Geometry:
    """In the order of METRICS; NaN: no value. Of a difference: the first model's less the second's.

    Attributes:
        sample, estimate: [4].
        replicates: [R, 4], estimates of the resamples.
        widest: [2, 4], what a replicate without a value may be at the least and at the most.
    """

    sample: Array
    estimate: Array
    replicates: Array
    widest: Array

    def __sub__(self, other: "Geometry") -> "Geometry":
        """Resample by resample: both must have been measured with the same weights."""
        return Geometry(
            self.sample - other.sample,
            self.estimate - other.estimate,
            self.replicates - other.replicates,
            self.widest - other.widest[::-1],
        )

    def report(self) -> dict[str, dict[str, float | None]]:
        """metric -> sample, estimate, low, high; None: no value, and no interval where there is no estimate."""
        tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        found = {}
        for i, name in enumerate(METRICS):
            row = {"sample": self.sample[i], "estimate": self.estimate[i], "low": np.nan, "high": np.nan}
            if np.isfinite(row["estimate"]):
                values_R = self.replicates[:, i]
                for side, tail, widest in zip(("low", "high"), tails, self.widest[:, i], strict=True):
                    row[side] = np.quantile(np.where(np.isnan(values_R), widest, values_R), tail)
            found[name] = {key: _or_none(value) for key, value in row.items()}
        return found


def draw_weights(sizes: Sequence[int], *, resamples: int, seed: int) -> list[Array]:
    """For each group [R, n], the share that each example has in each resample: how often it was drawn, over n."""
    generator = np.random.default_rng(seed)
    return [generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in sizes]


def measure(groups: Sequence[Array], weights: Sequence[Array]) -> Geometry:
    """Of one model and layer. The same weights for all of them make their differences paired.

    Args:
        groups: most, least and, for the centred angle, reference; each [n, D], n >= 1. A group of one example has no
            spread, so that what it is part of has no estimate.
        weights: of the same groups, see `draw_weights`.

    Raises:
        ValueError: neither two nor three groups, an empty one, or one of another size than its weights.
    """
    sizes = [len(group_nD) for group_nD in groups]
    of_weights = [weight_Rn.shape[1] for weight_Rn in weights]
    if len(sizes) not in (2, 3) or 0 in sizes or of_weights != sizes:
        raise ValueError(f"groups: got {sizes} examples and weights of {of_weights}, expected the same two or three")
    norms = [np.linalg.norm(group_nD, axis=1) for group_nD in groups[:2]]
    tiny = ROUNDING * max(float(np.square(norms_n).mean()) for norms_n in norms)
    excess = [_excess(group_nD) for group_nD in groups]
    # a resample's mean has the spread of the resampled examples, S (n - 1) / n^2, on top of theirs
    twice = [value * (2 - 1 / n) for value, n in zip(excess, sizes, strict=True)]

    lengths = _squared_lengths([group_nD.mean(0) for group_nD in groups])
    scale = (norms[0].mean() + norms[1].mean()) / 2
    replicates = []
    for start in range(0, len(weights[0]), BLOCK):
        block = [weight_Rn[start : start + BLOCK] for weight_Rn in weights]
        means = [weight_Rn @ group_nD for weight_Rn, group_nD in zip(block, groups, strict=True)]
        scales_R = (block[0] @ norms[0] + block[1] @ norms[1]) / 2
        replicates.append(_metrics(_squared_lengths(means) - _sums(twice), scales_R, tiny))
    return Geometry(
        sample=_metrics(lengths, scale, tiny),
        estimate=_metrics(lengths - _sums(excess), scale, tiny),
        replicates=np.concatenate(replicates),
        widest=np.array([[0.0, 0.0, 0.0, 0.0], [np.inf, np.inf, 180.0, 180.0]]),
    )


def _excess(group_nD: Array) -> float:
    """tr(S) / n, S without bias; NaN for one example."""
    n = len(group_nD)
    return float(np.square(group_nD - group_nD.mean(0)).sum()) / (n - 1) / n if n > 1 else np.nan


def _squared_lengths(means: Sequence[Array]) -> Array:
    """[..., 5] as LENGTHS, from means [..., D]; NaN where there is no reference."""
    found = []
    for pair in LENGTHS:
        if max(pair) >= len(means):
            found.append(np.full(means[0].shape[:-1], np.nan))
        else:
            found.append(np.square(means[pair[0]] - means[pair[1]] if len(pair) == 2 else means[pair[0]]).sum(-1))
    return np.stack(found, axis=-1)


def _sums(excess: Sequence[float]) -> Array:
    """[5] as LENGTHS: of the groups in each."""
    return np.array([sum(excess[group] for group in pair if group < len(excess)) for pair in LENGTHS])


def _metrics(lengths_5: Array, scale: Array | float, tiny: float) -> Array:
    """[..., 4] as METRICS, from squared lengths [..., 5] and scales [...]; what is at most `tiny` counts as 0."""
    apart, most_c, least_c, most_0, least_0 = np.moveaxis(np.where(lengths_5 <= tiny, 0.0, lengths_5), -1, 0)
    l2 = np.sqrt(apart)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0: no value
        return np.stack([l2, l2 / scale, _angle(apart, most_0, least_0), _angle(apart, most_c, least_c)], axis=-1)


def _angle(opposite: Array, side: Array, other: Array) -> Array:
    """Degrees, of a triangle with these squared sides. By the half angle, which keeps small angles exact."""
    a, b = np.sqrt(side), np.sqrt(other)
    half_sine_squared = (opposite - (a - b) ** 2) / (4 * a * b)
    degrees = np.degrees(2 * np.arcsin(np.sqrt(np.clip(half_sine_squared, 0, 1))))
    return np.where((side > 0) & (other > 0), degrees, np.nan)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
