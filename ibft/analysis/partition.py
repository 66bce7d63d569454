"""`ibft-fast analyze partition`: which rows a model knows by heart, which not, and controls, as lists of row numbers.

A file of ids is one JSON object:

    {"what": text for people, "data": path or hub id, "split": its split, "data_sha256": of all rows of the data (as in
     a run's manifest), "rows": how many these are, "ids": [row numbers in the data, from 0, ascending]}

    most_memorised.json    the --share % of the scored rows with the lowest scores
    least_memorised.json   as many with the highest
    random.json            as many drawn at random from all scored rows, the control for both
    decile_0.json .. 9     all scored rows in ten parts, from the most memorised to the least
    matched.json, matched_other.json    with --match-lengths: rows of the two files, as many of each length

Rows of equal scores are taken in the order of their numbers. A row without a score is in no file.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.analysis.memorization import Header, Score, read_scores
from ibft.analysis.min_k import auc, lowest_count, overlap_coefficient
from ibft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ibft.console import Console

BY = ("min_k", "min_k_pp")


@dataclass(frozen=True)
class Part:
    """what: said of it in its file. scores: of its rows, by ascending number."""

    what: str
    scores: list[Score]


def run_partition(
    scores: str, *, out: str, share: float = 10, seed: int = 0, by: str = "min_k", match_lengths: str | None = None
) -> None:
    """Writes the files of ids of the scores in `scores` to the folder `out`, and prints what is in them.

    Args:
        share: percent of the rows. seed: of the random rows and of the matching. by: min_k or min_k_pp.
        match_lengths: another file of scores, of the same K and kind of text.

    Raises:
        ConfigError: an argument is out of range.
        DataError: a file cannot be read, is not whole, has fewer than ten scores, or cannot be compared; `out` cannot
            be written.
    """
    if by not in BY:
        raise ConfigError(f"--by: got {by}, expected {' or '.join(BY)}")
    if not 0 < share <= 50:
        raise ConfigError(
            f"--share: got {share:g}, expected more than 0 and at most 50 (percent): groups do not overlap"
        )
    if seed < 0:
        raise ConfigError(f"--seed: got {seed}, expected 0 or more")
    header, found = read_scores(scores)
    if len(found) < 10:
        raise DataError(f"{scores}: holds {len(found)} scores, expected ten or more")
    parts = {name: (header, part) for name, part in partition(found, share, seed, by).items()}
    matched = None
    if match_lengths is not None:
        other, theirs = read_scores(match_lengths)
        check_comparable(scores, header, match_lengths, other)
        matched = length_matched(found, theirs, seed)
        if not matched[0]:
            raise DataError(f"--match-lengths: {scores} and {match_lengths} have no rows of the same length")
        parts["matched"] = header, Part(f"random, lengths matched with {match_lengths}", matched[0])
        parts["matched_other"] = other, Part(f"random, lengths matched with {scores}", matched[1])

    from ibft.console import Console

    console = Console()
    k = f"K {header['k']:g}, {header['text']}"
    console.line(f"partition: {len(found):,} scored rows of {header['data']}, by {by} ({k}); lower = more memorised")
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (of, part) in parts.items():
            (folder / f"{name}.json").write_text(id_file(of, part, f"by {by} ({k})"), encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out: {out}: {error.strerror or error}") from error
    show(parts, console, by)
    if matched:
        a, b = ([value_of(score, by) for score in side] for side in matched)
        console.line(
            f"matched: overlap coefficient {overlap_coefficient(a, b):.3f}; a row of {match_lengths} scores higher "
            f"than one of {scores} with probability {auc(b, a):.3f} (AUC)"
        )
    console.line(f"ids: {len(parts)} files in {out}, rows count from 0")


def value_of(score: Score, by: str) -> float:
    return score.min_k if by == "min_k" else score.min_k_pp


def partition(scores: Sequence[Score], share: float, seed: int, by: str) -> dict[str, Part]:
    """By the name of its file, without the ending. Raises ValueError: no score, or share out of range."""
    ranked = sorted(scores, key=lambda score: (value_of(score, by), score.id))
    count, n = lowest_count(len(ranked), share), len(ranked)
    drawn = drawn_at_random(scores, count, f"random rows, seed {seed}")
    parts = {
        "most_memorised": Part(f"the {share:g}% most memorised", ranked[:count]),
        "least_memorised": Part(f"the {share:g}% least memorised", ranked[n - count :]),
        "random": Part(f"{share:g}% at random, seed {seed}", drawn),
    }
    for d in range(10):
        what = f"decile {d} of 0 (most memorised) .. 9 (least)"
        parts[f"decile_{d}"] = Part(what, ranked[d * n // 10 : (d + 1) * n // 10])
    return {name: Part(part.what, sorted(part.scores, key=by_number)) for name, part in parts.items()}


def by_number(score: Score) -> int:
    return score.id


def drawn_at_random(scores: Sequence[Score], count: int, key: str) -> list[Score]:
    """`count` of them, by ascending number. It depends on their numbers and on the key, not on their order; and on
    `random.random()`, the one method whose sequence Python guarantees from version to version."""
    rng = random.Random(key)
    lots = [(rng.random(), score) for score in sorted(scores, key=by_number)]
    return sorted((score for _, score in sorted(lots, key=lambda lot: lot[0])[:count]), key=by_number)


def length_matched(a: Sequence[Score], b: Sequence[Score], seed: int) -> tuple[list[Score], list[Score]]:
    """The largest subsets of both with as many texts of each length in tokens, drawn at random, by ascending number.

    Scores depend on the length, so that two data sets whose texts differ in it would seem to differ in how well they
    are known. Empty where no length occurs in both.
    """
    by_length: tuple[dict[int, list[Score]], dict[int, list[Score]]] = {}, {}
    for side, scores in zip(by_length, (a, b), strict=True):
        for score in scores:
            side.setdefault(score.n_tokens, []).append(score)
    matched: tuple[list[Score], list[Score]] = [], []
    for length in sorted(by_length[0].keys() & by_length[1].keys()):
        count = min(len(side[length]) for side in by_length)
        for name, side, found in zip("ab", by_length, matched, strict=True):
            found += drawn_at_random(side[length], count, f"matched lengths, {name}, {length} tokens, seed {seed}")
    return sorted(matched[0], key=by_number), sorted(matched[1], key=by_number)


def check_comparable(path: str, header: Mapping[str, Any], other_path: str, other: Mapping[str, Any]) -> None:
    for name in ("k", "text"):
        if header.get(name) != other.get(name):
            raise DataError(f"--match-lengths: {path} has {name} {header.get(name)}, {other_path} {other.get(name)}")


def id_file(header: Header, part: Part, how: str) -> str:
    about = {name: header.get(name) for name in ("data", "split", "data_sha256", "rows")}
    return json.dumps({"what": f"{part.what}, {how}", **about, "ids": [score.id for score in part.scores]}) + "\n"


def show(parts: Mapping[str, tuple[Header, Part]], console: "Console", by: str) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("", "rows", "lowest", "mean", "highest", "mean tokens", box=SIMPLE)
    for name, (_, part) in parts.items():
        n, values = len(part.scores), [value_of(score, by) for score in part.scores]
        cells = [f"{value:.4f}" for value in (min(values), sum(values) / n, max(values))]
        table.add_row(name, f"{n:,}", *cells, f"{sum(score.n_tokens for score in part.scores) / n:.0f}")
    console.rich.print(table)
