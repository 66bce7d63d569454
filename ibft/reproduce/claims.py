"""What a reproduction shows, in sentences that are made from its numbers (`ibft.reproduce.sentences`).

barrier         the base has memorised a part of the data (Min-K% against rows that it has not seen), and plain
                fine-tuning from it solves fewer tasks than from a twin that has memorised nothing
IB-FT           against plain fine-tuning, at every temperature
controls        variants of IB-FT, and data without the most memorised or without random rows
explanation 1   whether rows of all degrees of memorisation are fitted alike
explanation 2   whether plain fine-tuning widens the distance between the most and the least memorised rows, and IB-FT
                shrinks it
explanation 3   whether the barrier lies in what the weights hold at the start: a twin, perturbed weights
next            over-compression or too little of it, and the setting to change
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ibft.reproduce.over_seeds import (
    Report,
    Seed,
    differences,
    mean_over_seeds,
)
from ibft.reproduce.sentences import (
    SIGNS,
    Claim,
    judged,
    make_claim,
    quoted,
    range_claim,
    score_claims,
    unmeasured,
)
from ibft.reproduce.separation import datasets_of, k_of, scores_on, separate

BARRIER, TUNED, CONTROLS = "barrier", "IB-FT", "controls"
EVEN, APART, START, NEXT = "explanation 1", "explanation 2", "explanation 3", "next"
TOPICS = {
    BARRIER: "The barrier: has the base memorised the data, and does fine-tuning solve less for it?",
    TUNED: "IB-FT against plain fine-tuning",
    CONTROLS: "Controls: what of it does the work?",
    EVEN: "Explanation 1: are rows of all degrees of memorisation fitted alike?",
    APART: "Explanation 2: do the most and the least memorised rows move apart in the hidden states?",
    START: "Explanation 3: does it matter where training starts?",
    NEXT: "What to change next",
}
TOLD = (("memorised", "unseen"), ("memorised", "rest"), ("rest", "unseen"))
PAIRS = (("base", "twin base"), ("FT", "base"), ("IB-FT", "base"), ("IB-FT", "FT"))
Distance = tuple[str, str | None, int, tuple[str | None, ...]]
DISTANCES: dict[str, Distance] = {  # metric -> its name, unit, digits, and what is expected of the PAIRS
    "l2_normalised": ("L2 / norm", None, 3, ("higher", "higher", "lower", "lower")),
    "angle_centred": ("centred angle", "degrees", 1, (None, None, None, None)),
}


def make_claims(report: Report) -> list[Claim]:
    """In the order of TOPICS."""
    return [
        *barrier_claims(report),
        *score_claims(report, TUNED, "IB-FT", "FT", "higher", all_temperatures=True),
        *control_claims(report),
        *evenness_claims(report),
        *distance_claims(report),
        *start_claims(report),
        *next_claims(report),
    ]


# --- the barrier ----------------------------------------------------------------------------------


def barrier_claims(report: Report) -> list[Claim]:
    """First whether there is one, then what that rests on, then the same of other bases."""
    bases = dict.fromkeys(row["model"] for row in report["memorization"] if row["seed"] is None)
    found = [memorised_claim(report, base, *pair) for base in bases for pair in group_pairs(report)]
    memorised = [claim for claim in found if claim]
    if not memorised:
        memorised = [unmeasured(BARRIER, "What the base has memorised", "no Min-K% scores of two groups of rows")]
    if twin := started_from(report, "FT", "twin"):
        solved = score_claims(report, BARRIER, "FT", twin, "lower")
        # what of that was there before fine-tuning
        before = score_claims(report, BARRIER, "base", "twin base")
    else:
        solved = [unmeasured(BARRIER, "FT minus FT from a twin that has memorised nothing", "no such model")]
        before = []
    of_base = [claim for claim in memorised if claim.get("models") in (None, ["base"])]
    return [
        barrier_claim(memorised, solved),
        *of_base,
        *solved,
        *before,
        *(claim for claim in memorised if claim not in of_base),
    ]


def group_pairs(report: Report) -> list[tuple[str, str]]:
    """The first is asked to be the more memorised. Where no base was told a part of the data, all of it against
    others."""
    if "memorised" in (datasets := datasets_of(report)):
        return [*TOLD]
    return [("fine-tuning data", other) for other in datasets if other != "fine-tuning data"]


def memorised_claim(report: Report, model: str, first: str, second: str) -> Claim | None:
    """None where one of the two was not scored."""
    found = separate(scores_on(report, model, first), scores_on(report, model, second))
    if found is None:
        return None
    text = (
        f"{quoted(model)} on {quoted(first)} against {quoted(second)}: Min-{k_of(report):g} % is the lower (more "
        f"memorised) in {found.auc:.1%} of the pairs (AUC), 95 % interval [{found.low:.1%}, {found.high:.1%}], overlap "
        f"coefficient {found.overlap:.2f}, {found.sizes[0]:,} and {found.sizes[1]:,} rows: {found.verdict}."
    )
    return make_claim(
        BARRIER, text, found.verdict, value=found.auc, low=found.low, high=found.high, unit="AUC",
        overlap=found.overlap, models=[model], data=[first, second],
    )  # fmt: skip


def barrier_claim(memorised: Sequence[Claim], solved: Sequence[Claim]) -> Claim:
    """Of the base's first pair of groups and of Pass@1; one suite where fine-tuning solves less is enough."""
    known = next((claim for claim in memorised if claim.get("models") == ["base"]), None)
    of_pass_1 = [claim for claim in solved if claim.get("score") == "Pass@1"]
    lower, others = (
        ", ".join(claim["suite"] for claim in of_pass_1 if (claim["verdict"] == "lower") == wanted)
        for wanted in (True, False)
    )
    if known is None:
        first = "What the base has memorised is not measured"
    else:
        is_not = "" if known["verdict"] == "more memorised" else "not shown to be "
        told, others_than = known["data"]
        first = f"In the base “{told}” is {is_not}more memorised than “{others_than}” (AUC {known['value']:.2f})"
    if not of_pass_1:
        second = "whether fine-tuning solves less for it is not measured"
    elif lower:
        second = f"FT solves less than from the twin on {lower}" + (f", not shown on {others}" if others else "")
    else:
        second = f"FT is not shown to solve less than from the twin on {others}"
    if (known and known["verdict"] != "more memorised") or (of_pass_1 and not lower):
        verdict, end = "not shown", "no barrier is shown"
    elif known is None or not of_pass_1:
        verdict, end = "unmeasured", "whether there is a barrier is unmeasured"
    else:
        verdict, end = "exists", "the barrier exists"
    return make_claim(BARRIER, f"{first}; {second}: {end}.", verdict, expected="exists")


# --- scores ---------------------------------------------------------------------------------------


def control_claims(report: Report) -> list[Claim]:
    """Each variant from the same base minus IB-FT and minus FT; without the most memorised rows minus without random
    ones."""
    base = next((model["base"] for model in report["models"] if model["name"] == "FT"), None)
    variants = [
        model["name"]
        for model in report["models"]
        if base and model["base"] == base and model["name"] not in ("FT", "IB-FT") and " from " not in model["name"]
    ]
    dropped = [name for name in variants if name.endswith("dropped")]
    pairs = [(name, "IB-FT") for name in variants] + [(name, "FT") for name in variants]
    pairs += [(a, b) if "top" in a else (b, a) for a, b in combinations(dropped, 2)]
    return [claim for a, b in pairs for claim in score_claims(report, CONTROLS, a, b)]


def start_claims(report: Report) -> list[Claim]:
    """FT against FT from the twin is a claim about the barrier."""
    perturbed, twin = started_from(report, "FT", "perturbed"), started_from(report, "FT", "twin")
    pairs = [(perturbed, "FT"), ("IB-FT", twin), (started_from(report, "IB-FT", "twin"), twin)]
    claims = [claim for ours, theirs in pairs if ours and theirs for claim in score_claims(report, START, ours, theirs)]
    for start, model in (("perturbed weights", perturbed), ("a twin that has memorised nothing", twin)):
        if model is None:
            claims.append(unmeasured(START, f"FT from {start}", "no such model"))
    return claims


def started_from(report: Report, tuning: str, start: str) -> str | None:
    """The model of that tuning from another start, as FT from the twin, FT from perturbed weights."""
    names = [model["name"] for model in report["models"]]
    return next((name for name in names if name.startswith(f"{tuning} from ") and start in name), None)


# --- cross-entropies and distances ----------------------------------------------------------------


def evenness_claims(report: Report) -> list[Claim]:
    """IB-FT minus FT on the spread (standard deviation) of the ten deciles' CE, in nats and as a share of their mean.

    The first grows with the loss itself, the second as it falls: rows are fitted more (less) evenly where both say so.
    """
    runs = {model: spreads_of(report, model) for model in ("FT", "IB-FT")}
    if missing := [model for model, spreads in runs.items() if not spreads]:
        return [unmeasured(EVEN, "The spread of CE over the deciles", f"no deciles of {' and '.join(missing)}")]
    claims = []
    for when, name in (("at the end of training", "last"), ("as a mean over training", "mean")):
        both = []
        for unit, digits, words in (("nats", 4, ""), ("of the mean", 3, " as a share of their mean")):
            of = {
                model: {seed: getattr(spread, name)[unit == "of the mean"] for seed, spread in spreads.items()}
                for model, spreads in runs.items()
            }
            what = f"IB-FT minus FT on the spread of CE over ten deciles of memorisation{words}, {when}"
            each = f"{means(of, unit, digits)}; lower is more even"
            both.append(range_claim(EVEN, what, differences(of["IB-FT"], of["FT"]), unit, digits, each))
        claims += [even_claim(both, when), *both]
    return claims


def even_claim(both: Sequence[Claim], when: str) -> Claim:
    """What the two measures say together."""
    verdicts = {claim["verdict"] for claim in both}
    found = {"lower": "more even", "higher": "less even"}.get(verdicts.pop() if len(verdicts) == 1 else "")
    if found:
        text = f"IB-FT fits the deciles {'more' if found == 'more even' else 'less'} evenly than FT {when}"
    else:
        said = " and ".join(
            f"{claim['verdict']} {where}" for claim, where in zip(both, ("in nats", "as a share"), strict=True)
        )
        text = f"Whether IB-FT fits the deciles more evenly than FT {when} is not shown: the spread is {said}"
    verdict = found or "not shown"
    return make_claim(EVEN, f"{text}: {judged(verdict, 'more even')}", verdict, expected="more even")


class Spreads(NamedTuple):
    """(standard deviation in nats, the same over the mean) of the deciles' CE: at a run's last step, and its mean over
    the steps, by straight lines between those measured."""

    last: tuple[float, float]
    mean: tuple[float, float]


def spreads_of(report: Report, model: str) -> dict[Seed, Spreads]:
    """Of each seed."""
    by_seed: dict[Seed, list[tuple[int, float, float]]] = {}
    for row in decile_rows(report, model):
        if None not in row["ce"]:
            deviation, mean = float(np.std(row["ce"])), float(np.mean(row["ce"]))
            by_seed.setdefault(row["seed"], []).append((row["step"], deviation, deviation / mean if mean else 0.0))
    found = {}
    for seed, rows in by_seed.items():
        steps, *kinds = zip(*sorted(rows), strict=True)
        length = steps[-1] - steps[0]
        last = kinds[0][-1], kinds[1][-1]
        over = tuple(float(np.trapezoid(kind, steps)) / length for kind in kinds) if length else last
        found[seed] = Spreads(last, (over[0], over[1]))
    return found


def decile_rows(report: Report, model: str) -> list[Mapping[str, Any]]:
    """Of a fine-tuned model, with its base's at step 0 for each seed that has none of its own there."""
    rows = [row for row in report["deciles"] if row["model"] == model]
    base = next((one["base"] for one in report["models"] if one["name"] == model), None)
    begun = {row["seed"] for row in rows if row["step"] == 0}
    for first in report["deciles"]:
        if first["model"] == base and first["step"] == 0:
            rows += [{**first, "seed": seed} for seed in sorted({row["seed"] for row in rows} - begun)]
    return rows


def distance_claims(report: Report) -> list[Claim]:
    """The base minus its twin, FT and IB-FT minus the base, and IB-FT minus FT, at each layer. What the twin has of a
    distance is of the rows themselves: it has memorised neither group."""
    layers = sorted({row["layer"] for row in report["geometry"]})
    if not layers:
        return [unmeasured(APART, "The distance between the most and the least memorised rows", "no hidden states")]
    models = [name for pair in PAIRS for name in pair]
    there = {row["model"] for row in report["geometry"]} | {"base", "FT", "IB-FT"}
    claims = []
    for metric, (name, unit, digits, expected) in DISTANCES.items():
        for layer in layers:
            of = {model: estimates_of(report, model, layer, metric) for model in models}
            for (ours, theirs), wanted in zip(PAIRS, expected, strict=True):
                if theirs not in there:
                    continue
                what = f"{ours} minus {theirs} on the {name} of the most and the least memorised rows, layer {layer}"
                each = means({model: of[model] for model in (theirs, ours)}, unit, digits)
                by_seed = differences(of[ours], of[theirs])
                claims.append(range_claim(APART, what, by_seed, unit, digits, each, wanted))
    return claims


def estimates_of(report: Report, model: str, layer: int, metric: str) -> dict[Seed, float | None]:
    rows = [row for row in report["geometry"] if (row["model"], row["layer"]) == (model, layer)]
    return {row["seed"]: (row.get(metric) or {}).get("estimate") for row in rows}


def means(of: Mapping[str, Mapping[Seed, float | None]], unit: str | None, digits: int) -> str:
    found = {model: mean_over_seeds(values) for model, values in of.items()}
    return ", ".join(f"{model} {mean.value:.{digits}f}{SIGNS[unit]}" for model, mean in found.items() if mean)


# --- what to change -------------------------------------------------------------------------------

LESS, MORE = "lower ib.alpha or raise ib.beta", "raise ib.alpha or lower ib.beta"


def next_claims(report: Report) -> list[Claim]:
    """On every suite, from IB-FT against plain fine-tuning where all of k samples must pass, and against its base."""
    found = []
    for suite in report["suites"]:
        against = {
            name: [
                claim
                for claim in score_claims(report, NEXT, "IB-FT", name)
                if claim["verdict"] != "unmeasured" and claim["suite"] == suite
            ]
            for name in ("FT", "base")
        }
        if not against["FT"]:
            found.append(unmeasured(NEXT, f"Whether to compress more or less on {suite}", "no samples of IB-FT and FT"))
            continue
        tuned, score = against["FT"][-1], against["FT"][-1]["score"]
        if tuned["seeds"] == 1:
            found.append(
                unmeasured(NEXT, f"Whether to compress more or less on {suite}", "one seed tells nothing apart")
            )
            continue
        if tuned["verdict"] == "lower":
            what, verdict = f"fewer than FT: over-compression does that; {LESS}", "compress less"
        elif against["base"] and against["base"][0]["verdict"] == "lower":
            score = against["base"][0]["score"]
            what, verdict = f"fewer than the base: over-compression does that; {LESS}", "compress less"
        elif tuned["verdict"] == "higher":
            what, verdict = "more than FT: nothing calls for a change", "keep"
        else:
            what = f"no more than FT: too little compression does that, or no barrier to break; {MORE}"
            verdict = "compress more"
        found.append(make_claim(NEXT, f"On {suite} at {score} IB-FT solves {what}.", verdict, suite=suite))
    return found or [unmeasured(NEXT, "Whether to compress more or less", "no samples")]
