"""`analyze partition`: which rows are in which file, ties, seeds, matched lengths, and what is refused."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ibft.analysis.cli import app
from ibft.analysis.memorization import KIND, Score
from ibft.analysis.min_k import auc, overlap_coefficient
from ibft.analysis.partition import length_matched, partition

# 0.5 four times, so that a tie lies across a border
VALUES = [3.0, 0.5, 7.0, 0.5, 1.0, 9.0, 0.5, 8.0, 0.5, 4.0, 5.0, 6.0, 2.0, 8.5, 3.5, 4.5, 5.5, 6.5, 7.5, 2.5]


def write_scores(path: Path, scores, **header) -> Path:
    """Each row has n_tokens tokens of log-probability -min_k and z -min_k_pp."""
    about = {"kind": KIND, "data": "rows.jsonl", "split": "train", "data_sha256": "ab" * 32, "rows": 99,
             "texts": len(scores), "text": "response", "k": 20.0, **header}  # fmt: skip
    rows = [
        vars(score) | {"log_probs": [-score.min_k] * score.n_tokens, "z_scores": [-score.min_k_pp] * score.n_tokens}
        for score in scores
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [about, *rows]))
    return path


def scores_of(values, *, first: int = 0, step: int = 1) -> list[Score]:
    return [Score(first + step * i, 3 + i % 4, value, -value) for i, value in enumerate(values)]


def run(*arguments):
    return CliRunner().invoke(app, ["partition", *map(str, arguments)], catch_exceptions=False)


def ids_in(folder: Path) -> dict[str, list[int]]:
    return {path.stem: json.loads(path.read_text())["ids"] for path in folder.iterdir()}


def assert_refused(result, code, *parts):
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_files_by_hand(tmp_path):
    """Every third row was scored: ids 10, 13, .. 67. The four of 0.5 are 13, 19, 28 and 34."""
    path = write_scores(tmp_path / "s.jsonl", scores_of(VALUES, first=10, step=3))
    result = run(path, "-o", tmp_path / "parts", "--share", 15)
    assert result.exit_code == 0, result.output
    parts = ids_in(tmp_path / "parts")
    assert parts["most_memorised"] == [13, 19, 28]  # 34 scores the same and comes later
    assert parts["least_memorised"] == [25, 31, 49]  # 9, 8, 8.5
    deciles = [[13, 19], [28, 34], [22, 46], [10, 67], [37, 52], [40, 55], [43, 58], [16, 61], [31, 64], [25, 49]]
    assert [parts[f"decile_{d}"] for d in range(10)] == deciles
    assert len(parts["random"]) == 3
    assert set(parts) == {"most_memorised", "least_memorised", "random", *(f"decile_{d}" for d in range(10))}

    content = json.loads((tmp_path / "parts" / "most_memorised.json").read_text())
    assert {name: value for name, value in content.items() if name != "ids"} == {
        "what": "the 15% most memorised, by min_k (K 20, response)",
        "data": "rows.jsonl", "split": "train", "data_sha256": "ab" * 32, "rows": 99,
    }  # fmt: skip
    assert "20 scored rows of rows.jsonl, by min_k (K 20, response); lower = more memorised" in result.stdout
    assert "13 files in" in result.stdout


def test_by_the_other_score(tmp_path):
    path = write_scores(tmp_path / "s.jsonl", scores_of(VALUES))
    assert (
        run(path, "-o", tmp_path / "a").exit_code == run(path, "-o", tmp_path / "b", "--by", "min_k_pp").exit_code == 0
    )
    a, b = ids_in(tmp_path / "a"), ids_in(tmp_path / "b")
    assert (a["most_memorised"], a["least_memorised"]) == ([1, 3], [5, 13])
    assert (b["most_memorised"], b["least_memorised"]) == ([5, 13], [6, 8])  # min_k_pp = -min_k; ties by number


values = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 7.0]), min_size=10, max_size=60)


@given(values, st.sampled_from([0.1, 10, 33.3, 50, 90]), st.integers(0, 50))
def test_what_holds_for_every_partition(values, share, seed):
    scores = scores_of(values, step=2)
    shuffled = random.Random(seed).sample(scores, len(scores))
    parts = partition(shuffled, share, seed, "min_k")
    assert parts == partition(scores, share, seed, "min_k")
    count = max(1, int(share * 10) * len(values) // 1000)
    for name in ("most_memorised", "least_memorised", "random"):
        assert len({score.id for score in parts[name].scores}) == count
    assert sorted(values_in(parts["most_memorised"].scores)) == sorted(values)[:count]
    assert sorted(values_in(parts["least_memorised"].scores), reverse=True) == sorted(values, reverse=True)[:count]
    deciles = [parts[f"decile_{d}"].scores for d in range(10)]
    assert sorted((score for part in deciles for score in part), key=lambda score: score.id) == scores
    sizes = [len(part) for part in deciles]
    assert max(sizes) - min(sizes) <= 1
    for part, following in pairwise(deciles):
        assert max((score.min_k, score.id) for score in part) < min((score.min_k, score.id) for score in following)
    for part in parts.values():
        assert [score.id for score in part.scores] == sorted(score.id for score in part.scores)


def values_in(scores) -> list[float]:
    return [score.min_k for score in scores]


def test_random_rows_depend_on_the_seed_and_not_on_the_scores():
    drawn = {seed: ids_of(partition(scores_of(VALUES), 25, seed, "min_k")["random"].scores) for seed in range(200)}
    assert drawn[0] == ids_of(partition(scores_of(VALUES[::-1]), 25, 0, "min_k")["random"].scores)
    assert len(set(map(tuple, drawn.values()))) > 190
    times = Counter(i for ids in drawn.values() for i in ids)  # each of 20 rows about 50 times in 200 draws of 5
    assert set(times) == set(range(20))
    assert max(abs(count - 50) for count in times.values()) < 6 * (200 * 0.25 * 0.75) ** 0.5


def ids_of(scores) -> list[int]:
    return [score.id for score in scores]


# --- matched lengths ------------------------------------------------------------------------------


def of_lengths(lengths, first: int = 0) -> list[Score]:
    return [Score(first + i, length, i / 10, i / 20) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 6), max_size=30), st.lists(st.integers(1, 6), max_size=30), st.integers(0, 9))
def test_matched_lengths(a, b, seed):
    ours, theirs = length_matched(of_lengths(a), of_lengths(b, first=100), seed)
    assert Counter(score.n_tokens for score in ours) == Counter(score.n_tokens for score in theirs)
    assert Counter(score.n_tokens for score in ours) == Counter(a) & Counter(b)  # as many as there can be
    assert len(set(ids_of(ours))) == len(ours)
    assert set(ids_of(ours)) <= set(range(len(a)))
    assert set(ids_of(theirs)) <= set(range(100, 100 + len(b)))
    assert ids_of(ours) == sorted(ids_of(ours))
    assert length_matched(of_lengths(a)[::-1], of_lengths(b, first=100), seed) == (ours, theirs)


def test_matching_draws_at_random():
    draws = {tuple(ids_of(length_matched(of_lengths([4] * 9), of_lengths([4] * 3), seed)[0])) for seed in range(60)}
    assert len(draws) > 30
    assert {i for draw in draws for i in draw} == set(range(9))
    assert length_matched(of_lengths([1, 2]), of_lengths([3]), 0) == ([], [])


def test_matched_files(tmp_path):
    ours = write_scores(tmp_path / "a.jsonl", of_lengths([3] * 8 + [5] * 7))
    theirs = [Score(i, length, 0.3 + i / 7, i) for i, length in enumerate([5] * 4 + [3] * 2 + [6] * 9)]
    other = write_scores(tmp_path / "b.jsonl", theirs, data="other.jsonl", rows=15, data_sha256="cd")
    result = run(ours, "-o", tmp_path / "parts", "--match-lengths", other, "--seed", 3)
    assert result.exit_code == 0, result.output
    parts = ids_in(tmp_path / "parts")
    assert parts["matched_other"] == [0, 1, 2, 3, 4, 5]
    assert [i < 8 for i in parts["matched"]] == [True] * 2 + [False] * 4
    content = json.loads((tmp_path / "parts" / "matched_other.json").read_text())
    assert (content["data"], content["data_sha256"], content["rows"]) == ("other.jsonl", "cd", 15)
    a, b = [i / 10 for i in parts["matched"]], [0.3 + i / 7 for i in range(6)]
    assert f"overlap coefficient {overlap_coefficient(a, b):.3f};" in result.stdout
    assert f"{other} scores higher than one of {ours} with probability {auc(b, a):.3f} (AUC)" in result.stdout


# --- what is refused ------------------------------------------------------------------------------


def test_refused(tmp_path):
    path = write_scores(tmp_path / "s.jsonl", scores_of(VALUES))
    lines = path.read_text().splitlines(keepends=True)
    for number, (text, parts) in enumerate(
        [
            ("".join(lines[:-1]), ["holds 19 of 20 scores", "let `analyze memorization` go on"]),
            ("".join([*lines[:-1], lines[-1][:40]]), ["holds 19 of 20 scores", "let `analyze memorization` go on"]),
            ("".join([*lines[:3], lines[2], *lines[4:]]), ["line 4: row 1 after row 1"]),
            ("".join(lines[1:]), ["not a file of scores"]),
            ("", ["holds 0 scores"]),
            ("".join(lines).replace('"min_k": 3.0', '"min_k": "3.0"'), ["line 2: not a row of scores"]),
            ("".join(lines).replace('"min_k": 9.0', '"min_k": NaN'), ["line 7: not a row of scores"]),
            ("".join(lines).replace('"n_tokens": 3', '"n_tokens": 4', 1), ["line 2: not a row of scores"]),
        ]
    ):
        wrong = tmp_path / f"wrong{number}.jsonl"
        wrong.write_text(text)
        assert_refused(run(wrong, "-o", tmp_path / "parts"), 3, str(wrong), *parts)
    assert_refused(run(tmp_path / "no.jsonl", "-o", tmp_path / "parts"), 3, "no.jsonl")
    few = write_scores(tmp_path / "few.jsonl", scores_of(VALUES[:9]))
    assert_refused(run(few, "-o", tmp_path / "parts"), 3, "holds 9 scores, expected ten or more")
    assert_refused(run(path, "-o", path), 3, "--out: ")
    for more, part in [
        (["--share", 0], "--share: got 0"), (["--share", 50.5], "--share: got 50.5"),
        (["--share", "nan"], "--share: got nan"), (["--seed", -1], "--seed: got -1"),
        (["--by", "loss"], "--by: got loss, expected min_k or min_k_pp"),
    ]:  # fmt: skip
        assert_refused(run(path, "-o", tmp_path / "parts", *more), 2, part)
    assert not (tmp_path / "parts").exists()


def test_what_cannot_be_compared(tmp_path):
    path = write_scores(tmp_path / "s.jsonl", scores_of(VALUES))
    for header, part in [({"k": 10.0}, "k 20.0"), ({"text": "whole"}, "text response")]:
        other = write_scores(tmp_path / "other.jsonl", scores_of(VALUES), **header)
        assert_refused(run(path, "-o", tmp_path / "parts", "--match-lengths", other), 3, f"has {part}")
    other = write_scores(tmp_path / "other.jsonl", of_lengths([50] * 10))
    assert_refused(run(path, "-o", tmp_path / "parts", "--match-lengths", other), 3, "no rows of the same length")
