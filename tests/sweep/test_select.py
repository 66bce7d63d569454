"""Which cell is chosen, which cannot be told from it, and what is said of them, from counts that were made up."""

import csv
import io

import pytest

from ibft.sweep.grid import BASELINE
from ibft.sweep.plan import TEST
from ibft.sweep.report import add_test, sentences_of, table_of, to_csv
from tests.sweep.synthetic import N, make_report

GRID = {"ib.alpha": [0.01, 0.1, 0.5]}


def by_alpha(numbers, otherwise):
    return lambda values: numbers.get(values.get("ib.alpha"), otherwise)


def test_the_highest_mean_pass_at_1_is_chosen():
    report = make_report(GRID, by_alpha({0.1: [9, 5, 0, 4], 0.5: [10, 0, 0, 0]}, [3, 3, 3, 3]))
    assert report["chosen"] == "alpha-0.1"
    assert report["table"][2]["scores"][0]["value"] == pytest.approx(18 / 40)


def test_the_baseline_is_never_chosen():
    report = make_report(GRID, by_alpha({None: [10] * 4}, [1, 0, 0, 0]))
    assert report["chosen"] != BASELINE
    assert BASELINE not in report["stable"]


def test_a_tie_goes_to_pass_at_k_k_then_to_fewer_nats():
    even, uneven = [5, 5, 5, 5], [10, 10, 0, 0]  # one Pass@1, but only the second has problems solved every time
    assert make_report(GRID, by_alpha({0.5: uneven}, even))["chosen"] == "alpha-0.5"
    nats = by_alpha({0.1: 2.0}, 3.0)
    assert make_report(GRID, by_alpha({}, even), kl=nats)["chosen"] == "alpha-0.1"


def test_the_stable_region_is_what_overlaps_the_best():
    best, near, far = [9] * 10 + [8] * 10, [9] * 9 + [8] * 11, [0] * 19 + [1]
    report = make_report(GRID, by_alpha({0.01: best, 0.1: near}, far))
    assert report["stable"] == ["alpha-0.01", "alpha-0.1"]
    low, high = (report["table"][i]["scores"][0][end] for i, end in ((1, "low"), (2, "high")))
    assert low <= high < 1
    assert report["table"][3]["scores"][0]["high"] < low


def test_a_diverged_cell_is_neither_chosen_nor_stable():
    counts = by_alpha({0.1: [10] * 4, 0.5: [5] * 4}, [1] * 4)
    report = make_report(GRID, counts, diverged={("alpha-0.1", 1)})
    assert report["chosen"] == "alpha-0.5"
    assert "alpha-0.1" not in report["stable"] + report["front"]
    assert report["table"][2]["diverged"] == [1]
    assert report["sentences"][0] == "The loss was no number in a run of alpha-0.1."


def test_without_any_cell_left_nothing_is_chosen():
    every = {(f"alpha-{alpha:g}", 0) for alpha in GRID["ib.alpha"]}
    report = make_report(GRID, lambda _: [5] * 4, diverged=every)
    assert (report["chosen"], report["stable"]) == (None, [])
    assert report["sentences"][-1] == "No cell can be chosen: none has a number to choose it by."


def test_without_tasks_the_held_out_loss_chooses_and_the_report_says_so():
    ces = {0.01: 1.0, 0.1: 0.5, 0.5: 0.505}
    report = make_report(GRID, lambda _: None, eval_ce=by_alpha(ces, 0.1))
    assert report["chosen"] == "alpha-0.1"
    assert report["stable"] == ["alpha-0.1", "alpha-0.5"]  # 0.50 .. 0.51 and 0.505 .. 0.515
    assert report["sentences"][0].startswith("There are no validation tasks")
    assert "Chosen by held-out cross-entropy, 2 seeds: alpha-0.1 (0.5050 [0.5000, 0.5100] nats)." in report["sentences"]


def test_the_front_is_what_none_beats_in_both():
    counts = {None: [0] * 4, 0.01: [5] * 4, 0.1: [10, 2, 2, 2], 0.5: [10, 9, 0, 0]}
    report = make_report(GRID, lambda values: counts[values.get("ib.alpha")])
    assert report["front"] == ["alpha-0.5", "alpha-0.01"]  # Pass@1 0.475 and 0.5, Pass@10(10) 0.25 and 0


def test_the_chosen_is_held_against_the_baseline_on_the_test_tasks():
    report = make_report(GRID, by_alpha({0.1: [9] * 4}, [1] * 4))
    assert sentences_of(report)[-1] == "alpha-0.1 minus baseline on the test tasks: unmeasured (no test tasks)."
    tasks = [f"other {i}" for i in range(20)]
    asked = [(cell, seed) for cell in (BASELINE, "alpha-0.1") for seed in (0, 1)]
    passed = {BASELINE: [2] * 20, "alpha-0.1": [6] * 20}
    counted = [{"counts": {"temperature": 0.6, "n": N, "tasks": tasks, "passed": passed[cell]}} for cell, _ in asked]
    add_test(report, asked, counted)
    assert sentences_of(report)[-2] == (
        "alpha-0.1 minus baseline on the test tasks, Pass@1: +40.0 points, 95 % interval [40.0, 40.0], 20 problems, "
        "2 seeds, 2 of them above 0 (60.0 against 20.0 %): higher."
    )
    assert report["chosen"] == "alpha-0.1"
    assert report["tasks"][TEST] == tasks


def test_a_row_a_run():
    report = make_report(GRID, by_alpha({0.1: [10, 0]}, [5, 0]), diverged={("alpha-0.5", 0)})
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert [(row["cell"], row["seed"]) for row in rows] == [(run["cell"], str(run["seed"])) for run in report["runs"]]
    of = {(row["cell"], row["seed"]): row for row in rows}
    assert of["alpha-0.1", "1"]["validation Pass@10(10)"] == "0.5"
    assert of["alpha-0.1", "1"]["chosen"] == "1"
    assert (of["alpha-0.5", "0"]["diverged"], of["alpha-0.5", "0"]["validation Pass@1"]) == ("1", "")
    assert of["baseline", "0"]["ib.alpha"] == ""


def test_the_table_has_the_best_first_after_the_baseline():
    report = make_report(GRID, by_alpha({0.1: [9] * 4, 0.5: [5] * 4}, [1] * 4))
    made = table_of(report)
    assert list(made.columns[0].cells) == [BASELINE, "alpha-0.1", "alpha-0.5", "alpha-0.01"]
    assert list(made.columns[-1].cells)[1] == "chosen, on the front"
