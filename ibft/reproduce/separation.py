"""How far apart two groups of Min-K% scores lie, with an interval. Lower = more memorised.

    auc      P(a < b) + P(a = b) / 2 for a score of each group: above 1/2 where the first is the more memorised
    overlap  the area under both histograms (`ibft.analysis.min_k.overlap_coefficient`)

low, high: 95 % interval of the AUC, from the variance of its two sides (DeLong et al. 1988): of the share of b above
each a, and of the share of a below each b. Where all of one group lie below all of the other, neither varies, and the
rule of three stands in: none of n scores is out of place, so that at 95 % at most 3 / n of such scores are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ibft.analysis.min_k import auc, overlap_coefficient

Report = Mapping[str, Any]
NORMAL = 1.959964  # 97.5 % of a normal distribution lie below


@dataclass(frozen=True)
class Separation:
    auc: float
    low: float
    high: float
    overlap: float
    sizes: tuple[int, int]

    @property
    def verdict(self) -> str:
        """What the interval says of the first group."""
        if self.low > 0.5:
            return "more memorised"
        return "less memorised" if self.high < 0.5 else "not told apart"


def separate(a: Sequence[float], b: Sequence[float]) -> Separation | None:
    """None where a group has fewer than two scores, and so no variance."""
    if min(len(a), len(b)) < 2:
        return None
    value = auc(b, a)
    above_a = 1 - _share_below(b, a)
    below_b = _share_below(a, b)
    variance = above_a.var(ddof=1) / len(a) + below_b.var(ddof=1) / len(b)
    reach = NORMAL * float(np.sqrt(variance)) if variance > 0 else min(1.0, 3 / min(len(a), len(b)))
    return Separation(
        value, max(0.0, value - reach), min(1.0, value + reach), overlap_coefficient(a, b), (len(a), len(b))
    )


def _share_below(group: Sequence[float], values: Sequence[float]) -> Any:
    """Of each value, the share of the group below it, equal ones half."""
    ordered = np.sort(group)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(ordered))


def scores_on(report: Report, model: str, data: str) -> list[float]:
    """Min-K% of a model on a data set, those of all its seeds together; [] where not measured."""
    where = model, data, k_of(report)
    rows = [row for row in report["memorization"] if (row["model"], row["data"], row["k"]) == where]
    return [value for row in rows for value in row["values"] if value is not None]


def datasets_of(report: Report) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(row["data"] for row in report["memorization"]))


def k_of(report: Report) -> float | None:
    """K of the report's Min-K%; the first of several."""
    return report["memorization"][0]["k"] if report["memorization"] else None
