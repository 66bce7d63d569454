"""The scores against hand-made counts, and how often their interval holds the truth."""

import numpy as np
import pytest
from reproduction_report import make_report

from ibft.reproduce import over_seeds
from ibft.reproduce.over_seeds import (
    Passes,
    compare,
    differences,
    end_cells,
    main_temperature,
    mean_over_seeds,
    pair_seeds,
    passes_of,
    score,
    score_rows,
    verdict_of,
)

PASS_1, ALL_4 = (1, 1), (4, 4)


def passes(*by_seed: list[int], seeds: tuple[int | None, ...] | None = None, n: int = 4) -> Passes:
    return Passes(seeds or tuple(range(len(by_seed))), tuple((n, tuple(counts)) for counts in by_seed))


def test_scores_by_hand():
    """Pass@1 is c / n. Pass@4(4) of four samples: all of them pass."""
    first, last = score(passes([4, 2, 0], [4, 4, 1]), [PASS_1, ALL_4])
    assert first.value == pytest.approx((6 / 12 + 9 / 12) / 2)
    assert first.by_seed == pytest.approx((0.5, 0.75))
    assert last.value == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert (first.problems, first.seeds) == (3, 2)


def test_the_interval_by_hand():
    """Two problems and two seeds, one pass of the four: the mean of a resample is v w, v the share of that seed in it
    and w that of that problem; each is 1 in 1 case of 4, so that 1 of 16 are 1; 7 of 16 are 0."""
    (scored,) = score(passes([0, 4], [0, 0]), [PASS_1])
    assert (scored.value, scored.low, scored.high) == (0.25, 0, 1)
    # one problem of four, with all seeds: binomial(4, 1/4) / 4; at most 1/2 in 94.9 %, at most 3/4 in 99.6 %
    (scored,) = score(passes(*[[4, 0, 0, 0]] * 4), [PASS_1])
    assert (scored.value, scored.low, scored.high) == (0.25, 0, 0.75)


def test_both_levels_are_drawn():
    """Only the seeds differ, or only the problems do: the interval is the range of the three, or that of a binomial."""
    (of_seeds,) = score(passes([0] * 40, [2] * 40, [4] * 40), [PASS_1])
    assert (of_seeds.low, of_seeds.high) == pytest.approx((0, 1))
    (of_problems,) = score(passes(*[[0, 4] * 20] * 3), [PASS_1])
    assert (of_problems.low, of_problems.high) == pytest.approx((0.35, 0.65), abs=0.026)  # 1/2 -+ 1.96 sqrt(1/160)


def test_a_difference_leaves_out_what_is_hard_for_both():
    ours, theirs = passes([4, 2, 1, 3], [3, 1, 0, 4]), passes([3, 1, 0, 2], [2, 0, 0, 3])
    (found,) = compare(ours, theirs, [PASS_1])
    assert found.value == pytest.approx((4 + 3) / 16 / 2)
    assert found.low == pytest.approx(0.1875, abs=0.07)
    assert found.low > 0
    (same,) = compare(ours, ours, [PASS_1])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_model_without_seeds_is_the_same_for_all():
    base = passes([1, 0, 0, 1], seeds=(None,))
    ours = passes([2, 1, 1, 2], [4, 3, 3, 4])
    (found,) = compare(ours, base, [PASS_1])
    assert found.by_seed == pytest.approx((0.25, 0.75))
    assert found.seeds == 2
    (turned,) = compare(base, ours, [PASS_1])
    assert (turned.value, turned.low, turned.high) == pytest.approx((-found.value, -found.high, -found.low))
    assert score(base, [PASS_1])[0].seeds == 0


def test_seeds_are_paired_by_their_number():
    ours, theirs = passes([4, 4], [0, 0], seeds=(5, 7)), passes([0, 0], [4, 4], [0, 0], seeds=(7, 5, 9))
    (found,) = compare(ours, theirs, [PASS_1])
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert compare(ours, passes([4, 4], seeds=(1,)), [PASS_1]) is None
    assert pair_seeds([None], [0, 1]) == [(None, 0), (None, 1)]
    assert pair_seeds([None], [None]) == [(None, None)]


def test_one_problem_has_no_interval():
    (scored,) = score(passes([4], [2]), [PASS_1])
    assert (scored.value, scored.low, scored.high) == (0.75, None, None)


def test_the_same_each_time_and_other_with_another_seed():
    counts = passes(*np.random.default_rng(0).integers(5, size=(3, 30)).tolist())
    assert score(counts, [PASS_1, ALL_4]) == score(counts, [PASS_1, ALL_4])
    assert score(counts, [PASS_1]) != score(counts, [PASS_1], seed=1)


@pytest.mark.parametrize(
    ("problems", "of_seeds", "of_problems", "least", "most"),
    [
        (128, 0.0, 0.3, 0.91, 0.98),  # the problems carry the spread
        (128, 0.1, 0.3, 0.79, 0.90),  # the seeds carry twice as much
        (128, 0.3, 0.01, 0.69, 0.81),  # the seeds carry all: range of three values, 3 / 4
    ],
)
def test_how_often_the_interval_holds_the_truth(problems, of_seeds, of_problems, least, most):
    """As the module says: near 95 % where problems carry the spread, near 75 % where three seeds do."""
    generator, truths = np.random.default_rng(1), 300
    held = 0
    for _ in range(truths):
        values_SP = generator.normal(0, of_seeds, (3, 1)) + generator.normal(0, of_problems, (1, problems))
        (found,) = over_seeds._estimate(values_SP[None], (0, 1, 2), seed=0)
        held += found.low <= 0 <= found.high
    assert least <= held / truths <= most


def test_rows_of_a_report():
    report = make_report()
    rows = score_rows(report)
    assert len(rows) == (10 + 2 * 2) * (1 + 5 + 10)
    row = next(row for row in rows if (row["model"], row["temperature"], row["k"]) == ("FT", 0.6, 1))
    counted = [row["passed"] for row in report["counts"] if (row["model"], row["temperature"]) == ("FT", 0.6)]
    assert row["value"] == pytest.approx(np.mean(counted) / 10)
    assert row["low"] < row["value"] < row["high"]
    assert (row["problems"], row["seeds"], row["n"]) == (12, 3, 10)


def test_what_is_measured_most_is_the_main_temperature():
    report = make_report()
    assert main_temperature(report, "tiny") == 0.6
    report["counts"] = [row for row in report["counts"] if row["model"] in ("FT", "IB-FT")]
    assert main_temperature(report, "tiny") == 0.2
    assert main_temperature(report, "another") is None
    report["settings"]["suites"] = {"tiny": {"temperature": 1}}  # what the recipe says comes first
    assert main_temperature(report, "tiny") == 1.0
    report["counts"], report["settings"] = [], {}
    assert main_temperature(report, "tiny") is None
    assert passes_of(report, "FT", "tiny", 0.6) is None


@pytest.mark.parametrize(("n", "cells"), [(1, [(1, 1)]), (3, [(1, 1), (3, 3)]), (7, [(1, 1), (5, 5)])])
def test_no_more_than_the_samples_carry(n, cells):
    assert end_cells(n) == cells


def test_numbers_over_seeds():
    found = mean_over_seeds({0: 1.0, 1: None, 2: 4.0})
    assert (found.value, found.low, found.high, found.seeds) == (2.5, 1, 4, 2)
    assert mean_over_seeds({0: None}) is None
    assert differences({0: 3.0, 1: None, 2: 1.0}, {None: 1.0}) == {0: 2.0, 1: None, 2: 0.0}
    assert differences({0: 3.0}, {1: 1.0}) == {}


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.2, "higher"), (-0.2, -0.1, "lower"), (-0.1, 0.1, "not told apart"), (0.0, 0.1, "not told apart"),
        (-0.1, -1e-17, "not told apart"), (None, None, "not told apart"),
    ],
)  # fmt: skip
def test_the_interval_decides(low, high, verdict):
    assert verdict_of(low, high) == verdict
