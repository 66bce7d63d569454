"""A comparison as a claim: its number, the interval, a verdict that the interval decides, and the sentence of them.

A claim is a dict, so that a report can carry it:

    topic                what it is about
    text                 the sentence
    value, low, high     the number and its interval, in `unit` (fraction, nats, degrees, AUC); None: there is none
    verdict              higher, lower, not told apart: the interval lies above 0, below it, or holds it
    expected             the verdict that the paper leads one to expect, None where it leads to none
    and what was compared: models, suite, ...

Scores have an interval over problems and seeds, other numbers their range over seeds; `ibft.reproduce.over_seeds` says
what these can carry. Each is taken alone: of twenty comparisons without any difference one is told apart by chance.
Where rows are missing the verdict is unmeasured, and the sentence says which.
"""

from collections.abc import Mapping
from typing import Any

from ibft.reproduce.over_seeds import (
    ROUNDING,
    Report,
    Scored,
    Seed,
    compare,
    end_cells,
    main_temperature,
    mean_over_seeds,
    passes_of,
    score_name,
    temperatures_of,
    verdict_of,
)

Claim = dict[str, Any]
SIGNS = {None: "", "nats": " nats", "degrees": "°", "of the mean": " of the mean"}


def make_claim(topic: str, text: str, verdict: str, **more: Any) -> Claim:
    nothing = dict.fromkeys(("value", "low", "high", "unit", "expected"))
    return {"topic": topic, "text": text, "verdict": verdict} | nothing | more


def unmeasured(topic: str, what: str, why: str) -> Claim:
    return make_claim(topic, f"{what}: unmeasured ({why}).", "unmeasured")


def score_claims(
    report: Report, topic: str, ours: str, theirs: str, expected: str | None = None, *, all_temperatures: bool = False
) -> list[Claim]:
    """Ours minus theirs at Pass@1 and Pass@k(k), on every suite at its main temperature, then at the others."""
    if not report["suites"]:
        return [unmeasured(topic, f"{quoted(ours)} minus {quoted(theirs)}", "no samples")]
    places = [(suite, main_temperature(report, suite)) for suite in report["suites"]]
    if all_temperatures:
        others = [(suite, t) for suite in report["suites"] for t in temperatures_of(report, suite)]
        places += [place for place in others if place not in places]
    return [
        claim
        for suite, temperature in places
        for claim in claims_at(report, topic, ours, theirs, suite, temperature, expected)
    ]


def claims_at(
    report: Report, topic: str, ours: str, theirs: str, suite: str, temperature: float | None, expected: str | None
) -> list[Claim]:
    """Where both were not sampled at a temperature that is not the main one, nothing is said of it. With one training
    seed nothing is told apart: an interval over problems says nothing of another training."""
    what, where = f"{quoted(ours)} minus {quoted(theirs)}", suite
    if temperature is not None:
        where += f", temperature {temperature:g}"
    mine, other = (passes_of(report, model, suite, temperature) for model in (ours, theirs))
    if mine is None or other is None:
        missing = [quoted(name) for name, passes in ((ours, mine), (theirs, other)) if passes is None]
        if len(missing) == 2 and temperature != main_temperature(report, suite):
            return []
        return [unmeasured(topic, f"{what} on {where}", f"no samples of {' and '.join(missing)}")]
    cells = end_cells(min(mine.n, other.n))
    found = compare(mine, other, cells)
    if found is None:
        return [unmeasured(topic, f"{what} on {where}", "no seed in common")]
    claims = []
    for cell, scored in zip(cells, found, strict=True):
        verdict = "not told apart" if scored.seeds == 1 else verdict_of(scored.low, scored.high)
        name = score_name(cell)
        claims.append(make_claim(
            topic, f"{what} on {name}, {where}: {in_points(scored)}: {judged(verdict, expected)}", verdict,
            value=scored.value, low=scored.low, high=scored.high, unit="fraction", expected=expected,
            models=[ours, theirs], score=name, suite=suite, temperature=temperature, problems=scored.problems,
            seeds=scored.seeds,
        ))  # fmt: skip
    return claims


def range_claim(
    topic: str, what: str, by_seed: Mapping[Seed, float | None], unit: str | None, digits: int, each: str,
    expected: str | None = None,
) -> Claim:  # fmt: skip
    """Told apart where the differences of all seeds, two at least, have one sign. each: the two sides, in words."""
    found = mean_over_seeds(by_seed)
    if found is None:
        return unmeasured(topic, what, "no estimate of both with one seed")
    verdict = verdict_of(found.low, found.high) if found.seeds > 1 else "not told apart"
    once = "measured once" if None in by_seed else "1 seed"
    over = f"range [{found.low:.{digits}f}, {found.high:.{digits}f}] of {found.seeds} seeds"
    text = f"{what}: {found.value:+.{digits}f}{SIGNS[unit]}, {over if found.seeds > 1 else once} ({each})"
    return make_claim(
        topic, f"{text}: {judged(verdict, expected)}", verdict, value=found.value, low=found.low, high=found.high,
        unit=unit, expected=expected, seeds=found.seeds,
    )  # fmt: skip


# --- words ----------------------------------------------------------------------------------------


def judged(verdict: str, expected: str | None) -> str:
    if expected is None:
        return f"{verdict}."
    return f"{verdict}, as expected." if verdict == expected else f"{verdict} (expected: {expected})."


def in_points(scored: Scored) -> str:
    parts = [f"{points(scored.value, sign=True)} points"]
    if scored.low is None or scored.high is None:
        parts.append("no interval")
    else:
        parts.append(f"95 % interval [{points(scored.low)}, {points(scored.high)}]")
    parts.append(counted(scored.problems, "problem"))
    if scored.seeds:
        parts.append(counted(scored.seeds, "seed"))
    if scored.seeds > 1 and abs(scored.value) > ROUNDING:
        same = sum(abs(value) > ROUNDING and (value > 0) == (scored.value > 0) for value in scored.by_seed)
        parts.append(f"{same} of them {'above' if scored.value > 0 else 'below'} 0")
    return ", ".join(parts)


def points(fraction: float, *, sign: bool = False) -> str:
    """Percentage points; what would round to 0 and is not keeps one digit."""
    value = 0.0 if abs(fraction) <= ROUNDING else 100 * fraction
    digits = ".1f" if value == 0 or abs(value) >= 0.05 else ".1g"
    return f"{value:{'+' if sign else ''}{digits}}"


def quoted(name: str) -> str:
    """In quotation marks where it has several words, so that one sees where it ends."""
    return f"“{name}”" if " " in name else name


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
