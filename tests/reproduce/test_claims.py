"""Sentences against the numbers that they are made from, each way round, and where numbers are missing."""

import json
import re

import numpy as np
import pytest
from reproduction_report import LAYERS, SEEDS, make_report

from ibft.reproduce.claims import APART, BARRIER, CONTROLS, EVEN, NEXT, START, TOPICS, TUNED, make_claims, spreads_of
from ibft.reproduce.over_seeds import end_cells
from ibft.reproduce.sentences import in_points, points, range_claim
from ibft.reproduce.separation import separate

TWIN = "FT from the twin base"


def claims_of(topic, **chosen):
    return [claim for claim in make_claims(make_report(**chosen)) if claim["topic"] == topic]


def pass_1(claims, ours, theirs):
    return next(
        claim for claim in claims
        if claim.get("models") == [ours, theirs] and claim["score"] == "Pass@1" and claim["temperature"] == 0.6
    )  # fmt: skip


def without(report, table, **values):
    report[table] = [row for row in report[table] if any(row[name] != value for name, value in values.items())]
    return report


REPORTS = {
    "as the paper has it": {},
    "the other way": {
        "solved": {"FT": 0.8, "IB-FT": 0.3, TWIN: 0.4, "FT from perturbed weights": 0.1},
        "min_k": {"memorised": 3, "rest": 1}, "spread": {"FT": 0.01, "IB-FT": 0.2},
        "width": {"base": 0.2, "FT": 0.1, "IB-FT": 0.4},
    },
    "all alike": {
        "solved": dict.fromkeys(("FT", "IB-FT", TWIN, "FT from perturbed weights"), 0.5),
        "min_k": {"memorised": 2, "rest": 2, "unseen": 2}, "spread": {"FT": 0.1, "IB-FT": 0.1},
    },
    "all solved": {"solved": dict.fromkeys(("base", "FT", "IB-FT", TWIN), 1.0)},
    "no estimates": {"width": {"base": None, "FT": None, "IB-FT": 0.2}},
    "two suites, few samples": {"suites": ("VerilogEval Machine", "VerilogEval Human"), "n": 3},
    "one problem": {"tasks": 1},
}  # fmt: skip


@pytest.mark.parametrize("chosen", REPORTS.values(), ids=REPORTS)
def test_each_sentence_says_what_its_numbers_say(chosen):
    claims = make_claims(make_report(**chosen))
    assert {claim["topic"] for claim in claims} == set(TOPICS)
    assert [claim["topic"] for claim in claims] == sorted((claim["topic"] for claim in claims), key=[*TOPICS].index)
    json.dumps(claims, allow_nan=False)
    for claim in claims:
        text, verdict, value, low, high = (claim[name] for name in ("text", "verdict", "value", "low", "high"))
        assert text.endswith("."), text
        if verdict == "unmeasured":
            assert (value, low, high) == (None, None, None)
            assert "unmeasured" in text
            continue
        expected = claim["expected"]
        if claim["topic"] not in (BARRIER, NEXT) or claim["unit"] == "fraction":
            end = f": {verdict}{'' if expected is None else ', as expected' if verdict == expected else f' (expected: {expected})'}."  # noqa: E501
            assert text.endswith(end), text
        if value is None:
            assert verdict in (
                "exists",
                "not shown",
                "keep",
                "compress less",
                "compress more",
                "more even",
                "less even",
            )
            continue
        assert low is None or low <= value <= high
        middle = 0.5 if claim["unit"] == "AUC" else 0
        above, below = ("more memorised", "less memorised") if middle else ("higher", "lower")
        decided = low is not None and claim.get("seeds") != 1
        if decided and low > middle + 1e-12:
            assert verdict == above
        elif decided and high < middle - 1e-12:
            assert verdict == below
        else:
            assert verdict == "not told apart"
        shown = float(re.search(r": ([+-][\d.e-]+)(?: points| nats| of the mean|°|,)", text)[1]) if not middle else None
        if shown is not None:
            scale = 100 if claim["unit"] == "fraction" else 1
            assert shown == pytest.approx(scale * value, abs=0.051), text


@pytest.mark.parametrize(
    ("solved", "verdict", "said"),
    [
        ({"FT": 0.5, "IB-FT": 0.9}, "keep", "solves more than FT: nothing calls for a change."),
        ({"FT": 0.9, "IB-FT": 0.3}, "compress less", "fewer than FT: over-compression does that; lower ib.alpha or"),
        ({"FT": 1.0, "IB-FT": 1.0}, "compress more", "no more than FT: too little compression does that, or no bar"),
        ({"base": 1.0, "FT": 0.0, "IB-FT": 0.0}, "compress less", "On tiny at Pass@1 IB-FT solves fewer than the base"),
        # the base solves more at Pass@1 alone: of few tasks, but in one sample of ten
        (
            {"base": 0.3, "FT": 0.02, "IB-FT": 0.02},
            "compress less",
            "On tiny at Pass@1 IB-FT solves fewer than the base",
        ),
    ],
)
def test_what_to_change_next(solved, verdict, said):
    (claim,) = claims_of(NEXT, solved=solved)
    assert claim["verdict"] == verdict
    assert said in claim["text"]
    assert ("Pass@10(10)" in claim["text"]) == ("base" not in solved)


def test_nothing_is_said_of_what_to_change_without_samples():
    (claim,) = (c for c in make_claims(without(make_report(), "counts", model="IB-FT")) if c["topic"] == NEXT)
    assert claim["verdict"] == "unmeasured"


def test_the_sentence_in_full():
    report = make_report()
    text = pass_1(make_claims(report), "IB-FT", "FT")["text"]
    by_seed = [
        np.mean([np.array(row["passed"]) for row in report["counts"] if (row["model"], row["seed"], row["temperature"]) == (name, seed, 0.6)]) / 10  # noqa: E501
        for name in ("IB-FT", "FT") for seed in SEEDS
    ]  # fmt: skip
    value = 100 * (np.mean(by_seed[:3]) - np.mean(by_seed[3:]))
    assert re.fullmatch(
        rf"IB-FT minus FT on Pass@1, tiny, temperature 0\.6: \+{value:.1f} points, 95 % interval \[\d+\.\d, \d+\.\d\], "
        r"12 problems, 3 seeds, 3 of them above 0: higher, as expected\.",
        text,
    )


def test_verdicts_turn_with_the_numbers():
    for solved, verdict in ((0.9, "higher"), (0.1, "lower")):
        claims = make_claims(make_report(solved={"FT": 0.5, "IB-FT": solved}))
        assert pass_1(claims, "IB-FT", "FT")["verdict"] == verdict
    same = make_report()
    for row in same["counts"]:
        row["passed"] = [5] * 12
    found = pass_1(make_claims(same), "IB-FT", "FT")
    assert (found["verdict"], found["value"]) == ("not told apart", 0)
    assert "+0.0 points, 95 % interval [0.0, 0.0], 12 problems, 3 seeds: not told apart" in found["text"]


@pytest.mark.parametrize(
    ("min_k", "twin", "verdict", "said"),
    [
        (0.4, 0.8, "exists", "is more memorised than “unseen” (AUC 1.00); FT solves less than from the twin on tiny"),
        (0.4, 0.45, "not shown", "is more memorised than “unseen” (AUC 1.00); FT is not shown to solve less"),
        (2.1, 0.8, "not shown", "is not shown to be more memorised than “unseen” (AUC 0.40)"),
        (4.0, 0.8, "not shown", "is not shown to be more memorised than “unseen” (AUC 0.0"),
    ],
)
def test_a_barrier_needs_both(min_k, twin, verdict, said):
    first = claims_of(BARRIER, min_k={"memorised": min_k}, solved={"FT": 0.45, TWIN: twin})[0]
    assert first["verdict"] == verdict
    assert said in first["text"]


def test_a_barrier_on_one_of_two_suites():
    report = make_report(suites=("A", "B"), solved={"FT": 0.4, TWIN: 0.9})
    for row in report["counts"]:
        if row["suite"] == "B":
            row["passed"] = [5] * 12
    first = make_claims(report)[0]
    assert "FT solves less than from the twin on A, not shown on B: the barrier exists." in first["text"]


def test_a_barrier_that_is_not_measured():
    report = without(make_report(), "counts", model=TWIN)
    first = make_claims(report)[0]
    assert first["verdict"] == "unmeasured"
    assert "whether fine-tuning solves less for it is not measured" in first["text"]
    report["memorization"] = []
    assert "What the base has memorised is not measured" in make_claims(report)[0]["text"]
    # what is measured can still say no
    report = make_report(min_k={"memorised": 2.1})
    report["models"] = [model for model in report["models"] if "twin" not in model["name"]]
    assert make_claims(report)[0]["verdict"] == "not shown"


def test_full_size_data_is_held_against_the_comparison():
    report = make_report()
    for row in report["memorization"]:
        row["data"] = {"memorised": "fine-tuning data", "rest": "TOFU", "unseen": "more"}[row["data"]]
    found = [claim["data"] for claim in make_claims(report) if claim.get("models") == ["base"]]
    assert found == [["fine-tuning data", "TOFU"], ["fine-tuning data", "more"]]


def test_controls():
    found = {tuple(claim["models"]) for claim in claims_of(CONTROLS)}
    top, random = "FT, top 10 % dropped", "FT, random 10 % dropped"
    variants = ("IB-FT, beta 0", "IB-FT, deterministic z", top, random)
    assert found == {(name, other) for name in variants for other in ("IB-FT", "FT")} | {(top, random)}


def test_each_start():
    found = {tuple(claim["models"]) for claim in claims_of(START)}
    assert found == {("FT from perturbed weights", "FT"), ("IB-FT", TWIN)}
    report = make_report()
    report["models"].append({"name": "IB-FT from the twin base", "what": "", "base": "twin base", "changes": {}})
    for row in [row for row in report["counts"] if row["model"] == TWIN]:
        report["counts"].append(row | {"model": "IB-FT from the twin base"})
    assert pass_1(make_claims(report), "IB-FT from the twin base", TWIN)["value"] == 0
    report["models"] = report["models"][:3]
    assert [claim["verdict"] for claim in make_claims(report) if claim["topic"] == START] == ["unmeasured"] * 2


def test_evenness_by_hand():
    """Ten losses in a line, one `slope` apart: their standard deviation is slope sqrt(99 / 12), their mean 4.5 slopes
    above the first, which is 0.1 at the end."""
    deviation = (99 / 12) ** 0.5
    report = make_report(spread={"FT": 0.2, "IB-FT": 0.05})
    spreads = spreads_of(report, "FT")[0]
    assert spreads.last == pytest.approx((0.2 * deviation, 0.2 * deviation / (0.1 + 4.5 * 0.2)))
    assert spreads.mean[0] == pytest.approx((0.1 + 0.2) / 2 * deviation)
    says_end, end, share, says_whole, whole, _ = (claim for claim in make_claims(report) if claim["topic"] == EVEN)
    assert end["value"] == pytest.approx(-0.15 * 1.05 * deviation)
    assert (end["low"], end["high"]) == pytest.approx((-0.15 * 1.1 * deviation, -0.15 * deviation))
    of_seeds = [
        deviation * (slope / (0.1 + 4.5 * slope) - 4 * slope / (0.1 + 18 * slope)) for slope in (0.05, 0.0525, 0.055)
    ]
    assert share["value"] == pytest.approx(np.mean(of_seeds))
    assert whole["value"] == pytest.approx(end["value"] / 2)
    assert (end["verdict"], end["seeds"]) == ("lower", 3)
    assert (says_end["verdict"], says_whole["verdict"]) == ("more even", "more even")


def test_more_even_is_what_both_measures_call_so():
    """A loss that is four times as high and a spread that is twice as wide: less even in nats, more even as a share."""
    report = make_report()
    for row in report["deciles"]:
        if row["model"] != "base":
            low, step = (2.0, 0.2) if row["model"] == "IB-FT" else (0.5, 0.1)
            row["ce"] = [low + step * decile for decile in range(10)]
    says, nats, share = [claim for claim in make_claims(report) if claim["topic"] == EVEN][:3]
    assert (nats["verdict"], share["verdict"], says["verdict"]) == ("higher", "lower", "not shown")
    assert "the spread is higher in nats and lower as a share: not shown (expected: more even)." in says["text"]
    for row in report["deciles"]:
        if row["model"] == "IB-FT":
            row["ce"] = [0.1 + decile for decile in range(10)]
    assert next(claim["verdict"] for claim in make_claims(report) if claim["topic"] == EVEN) == "less even"


def test_uneven_steps_weigh_by_their_length():
    spreads = {0: 1, 10: 3, 100: 3}
    rows = [{"model": "FT", "seed": 0, "step": step, "ce": [0, 2 * std] * 5} for step, std in spreads.items()]
    report = {"models": [{"name": "base", "base": None}, {"name": "FT", "base": "base"}], "deciles": rows}

    def in_nats():
        last, mean = spreads_of(report, "FT")[0]
        return last[0], mean[0]

    expected = pytest.approx((3, (10 * 2 + 90 * 3) / 100))
    assert in_nats() == expected
    report["deciles"] = [rows[0] | {"model": "base", "seed": None}, *rows[1:]]
    assert in_nats() == expected
    report["deciles"] = rows[:1]
    assert in_nats() == pytest.approx((1, 1))
    report["deciles"] = [rows[0] | {"ce": [None] * 10}]
    assert spreads_of(report, "FT") == {}


def test_distances_against_the_base():
    for metric, scale in (("L2 / norm", 1), ("centred angle", 300)):
        found = [claim for claim in claims_of(APART) if metric in claim["text"]]
        assert len(found) == 3 * len(LAYERS)
        ft, ib, between = found[:3]
        assert ft["value"] == pytest.approx(scale * (0.3 * 1.02 - 0.2))
        assert ib["value"] == pytest.approx(scale * (0.1 * 1.02 - 0.2))
        assert between["value"] == pytest.approx(scale * -0.2 * 1.02)
        assert [claim["verdict"] for claim in (ft, ib, between)] == ["higher", "lower", "lower"]
    assert [claim["verdict"] for claim in claims_of(APART, width={"FT": None})][:3] == [
        "unmeasured",
        "lower",
        "unmeasured",
    ]


def test_the_twin_says_what_of_a_distance_is_memory():
    report = make_report()
    for row in [row for row in report["geometry"] if row["model"] == "base"]:
        narrow = {
            name: {key: value / 2 for key, value in row[name].items()} for name in ("l2_normalised", "angle_centred")
        }
        report["geometry"].append(row | narrow | {"model": "twin base"})
    found = [claim for claim in make_claims(report) if claim["topic"] == APART]
    assert len(found) == 2 * 4 * len(LAYERS)
    assert found[0]["text"].startswith("base minus twin base on the L2 / norm")
    assert found[0]["value"] == pytest.approx(0.1)
    assert (found[0]["verdict"], found[0]["expected"]) == ("not told apart", "higher")
    assert "measured once" in found[0]["text"]  # one base, one twin: no range


def test_one_training_seed_tells_no_scores_apart():
    report = make_report(solved={"FT": 0.1, "IB-FT": 0.9})
    for table in ("counts", "deciles", "geometry", "memorization", "training"):
        report[table] = [row for row in report[table] if row["seed"] in (None, 0)]
    claims = make_claims(report)
    found = pass_1(claims, "IB-FT", "FT")
    assert found["low"] > 0
    assert (found["verdict"], found["seeds"]) == ("not told apart", 1)
    assert next(claim for claim in claims if claim["topic"] == NEXT)["verdict"] == "unmeasured"


def test_each_suite_has_its_own_temperature():
    report = make_report(suites=("A", "B"))
    report["settings"]["suites"] = {"A": {"temperature": 0.6}, "B": {"temperature": 0}}
    for row in report["counts"]:
        if row["suite"] == "B":
            row["temperature"] = {0.6: 0.0}.get(row["temperature"], row["temperature"])
    claims = make_claims(report)
    assert not [claim["text"] for claim in claims if claim["verdict"] == "unmeasured"]
    found = {(claim["suite"], claim["temperature"]) for claim in claims if claim["topic"] == CONTROLS}
    assert found == {("A", 0.6), ("B", 0.0)}


def test_a_single_seed_tells_nothing_apart():
    claim = range_claim(APART, "x", {0: 0.5}, None, 2, "a 1, b 0.5")
    assert (claim["verdict"], claim["text"]) == ("not told apart", "x: +0.50, 1 seed (a 1, b 0.5): not told apart.")
    assert range_claim(APART, "x", {0: 0.5, 1: 0.1}, None, 2, "")["verdict"] == "higher"
    assert range_claim(APART, "x", {0: 0.5, 1: -0.1}, None, 2, "")["verdict"] == "not told apart"


@pytest.mark.parametrize("table", ["counts", "memorization", "deciles", "geometry", "suites", "models"])
def test_what_is_missing_is_said_or_left_out(table):
    report = make_report()
    report[table] = type(report[table])()
    claims = make_claims(report)
    topics = {
        "counts": TUNED, "memorization": BARRIER, "deciles": EVEN, "geometry": APART, "suites": TUNED, "models": START,
    }  # fmt: skip
    assert {claim["verdict"] for claim in claims if claim["topic"] == topics[table]} >= {"unmeasured"}
    assert not any("nan" in claim["text"] or "None" in claim["text"] for claim in claims)


def test_no_samples_of_one_model():
    report = without(make_report(), "counts", model="IB-FT")
    found = [claim["text"] for claim in make_claims(report) if claim["topic"] == TUNED]
    assert found == [
        f"IB-FT minus FT on tiny, temperature {temperature}: unmeasured (no samples of IB-FT)."
        for temperature in ("0.6", "0.2", "1")
    ]


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.0312, "3.1"), (-0.2, "-20.0"), (0, "0.0"), (-1e-17, "0.0"), (0.0004, "0.04"), (-4e-4, "-0.04")],
)
def test_what_is_not_nothing_does_not_round_to_it(fraction, shown):
    assert points(fraction) == shown


def test_few_words_for_one_problem():
    from ibft.reproduce.over_seeds import Passes, score

    (scored,) = score(Passes((None,), ((4, (2,)),)), end_cells(1))
    assert in_points(scored) == "+50.0 points, no interval, 1 problem"


# --- Min-K% ---------------------------------------------------------------------------------------


def test_separation_by_hand():
    """Of six pairs five have the first lower, one is equal. Shares of b above each a: 1, 5/6; of a below each b: 3/4,
    1, 1."""
    found = separate([1.0, 2.0], [2.0, 3.0, 4.0])
    assert found.auc == pytest.approx(5.5 / 6)
    reach = 1.959964 * ((1 / 72) / 2 + (1 / 48) / 3) ** 0.5
    assert (found.low, found.high) == pytest.approx((5.5 / 6 - reach, 1))
    assert (found.sizes, found.verdict) == ((2, 3), "more memorised")
    assert separate([1.0], [2.0, 3.0]) is None


def test_two_rows_apart_are_no_proof():
    assert separate([1.0, 1.1], [2.0, 2.1]).verdict == "not told apart"
    apart = separate([1.0 + i / 100 for i in range(20)], [2.0 + i / 100 for i in range(30)])
    assert (apart.auc, apart.low, apart.high, apart.overlap) == (1, 1 - 3 / 20, 1, 0)
    assert separate([2.0 + i for i in range(9)], [-2.0 - i for i in range(9)]).verdict == "less memorised"


def test_how_often_the_auc_interval_holds_the_truth():
    generator, held = np.random.default_rng(0), 0
    for _ in range(300):
        found = separate(generator.normal(0, 1, 60).tolist(), generator.normal(1, 1, 60).tolist())
        held += found.low <= 0.76025 <= found.high  # normal distribution at 1 / sqrt(2)
    assert 0.91 <= held / 300 <= 0.98
