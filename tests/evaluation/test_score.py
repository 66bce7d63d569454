import csv
import gzip
import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.passk import pass_at_k_m
from ibft.evaluation.score import count_verdicts, make_report, parse_ks, run_score
from ibft.evaluation.score_tables import few_ms

SHARED_DATA = Path(os.environ.get("IBFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
VERILOG = {"suite": "verilogeval-v1", "rule": "official", "sandbox": "namespaces", "icarus": "11.0"}


@pytest.fixture
def verdicts(tmp_path):
    """Writes a file of verdicts: of each problem (n, c), and what every row says besides."""

    def write(name: str, counts: dict[str, tuple[int, int]], *, more: str = "", **said) -> str:
        rows = [
            {"task_id": task_id, "sample": i, "passed": i < c, "result": "", **said}
            for task_id, (n, c) in counts.items()
            for i in range(n)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
        return str(path)

    return write


def report_of(path: str, baseline: str | None = None, ks: str = "1", seed: int = 0):
    return make_report(count_verdicts(path), count_verdicts(baseline) if baseline else None, parse_ks(ks), seed)


def value(scores, k, m=1, name="value"):
    return next(score[name] for score in scores if (score["k"], score["m"]) == (k, m))


# --- scores ---------------------------------------------------------------------------------------


def test_scores_are_means_over_problems(verdicts):
    """A problem with more samples weighs no more than another."""
    report = report_of(verdicts("v.jsonl", {"a": (4, 2), "b": (10, 10), "c": (5, 0)}), ks="3,1")
    (entry,) = report["verdicts"]["temperatures"]
    assert (entry["problems"], entry["samples"], entry["passed"]) == (3, 19, 12)
    assert value(entry["scores"], 1) == pytest.approx((0.5 + 1 + 0) / 3)
    for m in (1, 2, 3):
        expected = sum(pass_at_k_m(n, c, 3, m) for n, c in ((4, 2), (10, 10), (5, 0))) / 3
        assert value(entry["scores"], 3, m) == pytest.approx(expected)
    assert [(score["k"], score["m"]) for score in entry["scores"]] == [(1, 1), (3, 1), (3, 2), (3, 3)]
    assert value(entry["scores"], 1, name="low") == 0
    assert value(entry["scores"], 1, name="high") == 1


def test_one_problem_has_no_interval(verdicts, capsys):
    path = verdicts("v.jsonl", {"a": (4, 1)})
    (score,) = report_of(path)["verdicts"]["temperatures"][0]["scores"]
    assert score == {"k": 1, "m": 1, "value": 0.25, "low": None, "high": None}
    run_score(path, baseline=path)
    assert re.search(r"pass@1 +25\.0 +25\.0 +\+0\.0 *$", capsys.readouterr().out, re.MULTILINE)


def test_order_of_the_rows_changes_nothing(verdicts, tmp_path):
    path = Path(verdicts("v.jsonl", {"b": (3, 1), "a": (4, 3), "c": (3, 0)}))
    shuffled = tmp_path / "w.jsonl"
    shuffled.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    first, second = (report_of(str(file), ks="1,2")["verdicts"] for file in (path, shuffled))
    assert first["temperatures"] == second["temperatures"]
    assert first["problems"] == second["problems"]


def test_published_verdicts(capsys):
    """A file of others: nothing but task_id, completion, result, passed."""
    path = SHARED_DATA / "origen_verilogeval_human_verdicts.jsonl.gz"
    if not path.exists():
        pytest.skip(f"real data not found at {SHARED_DATA} (set IBFT_DATA)")
    (entry,) = report_of(str(path))["verdicts"]["temperatures"]
    assert (entry["temperature"], entry["problems"], entry["passed"]) == (None, 156, 86)
    assert value(entry["scores"], 1) == pytest.approx(86 / 156, abs=1e-15)
    run_score(str(path))
    assert "86 of 156 samples pass" in capsys.readouterr().out


def test_each_temperature_apart_and_the_best_named(verdicts, tmp_path, capsys):
    cold = Path(verdicts("cold", {"a": (4, 4), "b": (4, 0)}, temperature=0.2)).read_text()
    path = verdicts("v.jsonl", {"a": (4, 2), "b": (4, 1)}, temperature=0.8, more=cold)
    report = report_of(path, ks="1,2")
    low, high = report["verdicts"]["temperatures"]
    assert (low["temperature"], high["temperature"]) == (0.2, 0.8)
    assert [value(entry["scores"], 2, 2) for entry in (low, high)] == pytest.approx([1 / 2, 1 / 12])
    assert [value(entry["scores"], 2, 1) for entry in (low, high)] == pytest.approx([1 / 2, (5 / 6 + 1 / 2) / 2])
    best = {(cell["k"], cell["m"]): cell for cell in report["verdicts"]["best_over_temperatures"]}
    assert best[1, 1]["temperature"] == best[2, 2]["temperature"] == 0.2
    assert best[2, 1]["temperature"] == 0.8
    assert best[2, 1]["value"] == value(high["scores"], 2, 1)
    assert any("optimistic" in note for note in report["notes"])
    run_score(path, ks="1,2")
    shown = capsys.readouterr().out
    assert "best over temperatures (optimistic)" in shown
    assert re.search(r"pass@2 +66\.7 +0\.8", shown)


# --- against a baseline ---------------------------------------------------------------------------


def test_difference_takes_a_problem_from_both_files(verdicts):
    """One more sample of four passes on each problem: nothing varies, though each score does."""
    ours, theirs = {f"t{c}": (4, c + 1) for c in range(4)}, {f"t{c}": (4, c) for c in range(4)}
    report = report_of(verdicts("ours.jsonl", ours), verdicts("theirs.jsonl", dict(reversed(theirs.items()))))
    (pair,) = report["difference"]
    assert pair["scores"] == [{"k": 1, "m": 1, "value": 0.25, "low": 0.25, "high": 0.25}]
    scores = report["verdicts"]["temperatures"][0]["scores"]
    assert value(scores, 1, name="high") - value(scores, 1, name="low") > 0.4


def test_difference_has_a_sign_and_an_interval(verdicts, capsys):
    ours, theirs = {f"t{i}": (2, 2) for i in range(8)}, {f"t{i}": (2, 2 * (i < 3)) for i in range(8)}
    paths = verdicts("ours.jsonl", ours), verdicts("theirs.jsonl", theirs)
    report = report_of(*paths, ks="2")
    (better,), (worse,) = report["difference"], report_of(*paths[::-1], ks="2")["difference"]
    assert value(better["scores"], 2, 2) == 5 / 8 == -value(worse["scores"], 2, 2)
    assert 0 < value(better["scores"], 2, 2, "low") < 5 / 8 < value(better["scores"], 2, 2, "high") <= 1
    run_score(*paths[:1], baseline=paths[1], ks="2")
    assert re.search(r"Pass@2\(2\) +100\.0 \[100\.0, 100\.0\] +37\.5 \[.*\+62\.5 \[\+", capsys.readouterr().out)


def test_same_temperatures_are_compared(verdicts):
    counts, fewer = {"a": (2, 2), "b": (2, 1)}, {"a": (2, 1), "b": (2, 0)}
    hot = Path(verdicts("hot", counts, temperature=0.8)).read_text()
    ours = verdicts("ours.jsonl", counts, temperature=0.2, more=hot)
    report = report_of(ours, verdicts("theirs.jsonl", fewer, temperature=0.8))
    assert [(pair["temperature"], pair["baseline_temperature"]) for pair in report["difference"]] == [(0.8, 0.8)]
    assert value(report["difference"][0]["scores"], 1) == 0.5
    assert "compared at temperature 0.8; the other temperatures are in one file only" in report["notes"]
    (pair,) = report_of(verdicts("one.jsonl", fewer, temperature=0.8), ours)["difference"]
    assert (pair["baseline_temperature"], value(pair["scores"], 1)) == (0.8, -0.5)
    with pytest.raises(DataError, match=r"no temperature is in both files \(temperature 0.2, temperature 0.8 against "):
        report_of(ours, verdicts("third.jsonl", fewer, temperature=0.5))


def test_one_temperature_each_is_compared_whatever_it_is(verdicts):
    paths = verdicts("a.jsonl", {"a": (2, 2)}, temperature=0.2), verdicts("b.jsonl", {"a": (2, 1)}, temperature=0)
    report = report_of(*paths)
    assert [(pair["temperature"], pair["baseline_temperature"]) for pair in report["difference"]] == [(0.2, 0)]
    assert report["notes"] == ["compared: temperature 0.2 with the baseline's temperature 0"]


@pytest.mark.parametrize(("name", "other"), [("suite", "humaneval"), ("rule", "strict")])
def test_baseline_of_another_suite_or_rule_is_refused(verdicts, name, other):
    ours = verdicts("ours.jsonl", {"a": (1, 1)}, **VERILOG)
    with pytest.raises(DataError, match=f"theirs.jsonl has {name} {other}, .*ours.jsonl has {VERILOG[name]}"):
        report_of(ours, verdicts("theirs.jsonl", {"a": (1, 1)}, **VERILOG | {name: other}))


@pytest.mark.parametrize(("name", "other"), [("sandbox", "limits"), ("icarus", "12.0"), ("rule", None)])
def test_other_tools_are_told(verdicts, name, other, capsys):
    paths = [
        verdicts("ours.jsonl", {"a": (1, 1)}, **VERILOG),
        verdicts("theirs.jsonl", {"a": (1, 1)}, **VERILOG | {name: other}),
    ]
    run_score(paths[0], baseline=paths[1])
    assert f"note: {name}: {VERILOG[name]}, of the baseline {other or 'not said'}" in capsys.readouterr().out
    assert report_of(paths[0], paths[0])["notes"] == []


def test_baseline_with_other_problems_is_refused(verdicts):
    ours, theirs = (
        verdicts("ours.jsonl", {"a": (1, 1), "b": (1, 1)}),
        verdicts("theirs.jsonl", {"b": (1, 1), "c": (1, 0)}),
    )
    with pytest.raises(DataError, match=r"1 only in .*ours.jsonl \(a\), 1 only in .*theirs.jsonl \(c\)"):
        report_of(ours, theirs)
    with pytest.raises(DataError, match=r"same problems; 1 only in .*ours.jsonl \(a\)$"):
        report_of(ours, verdicts("fewer.jsonl", {"b": (1, 1)}))


# --- refusals -------------------------------------------------------------------------------------


def test_k_above_the_fewest_samples_is_refused(verdicts):
    path = verdicts("v.jsonl", {"a": (10, 2), "few": (4, 1), "b": (10, 3)}, temperature=0.2)
    with pytest.raises(ConfigError, match=r"got 5, but few has n = 4 samples at temperature 0.2 in .*v.jsonl"):
        run_score(path, ks="1,5")
    enough = verdicts("w.jsonl", {"a": (5, 2), "few": (5, 1), "b": (5, 3)}, temperature=0.2)
    with pytest.raises(ConfigError, match=r"few has n = 4 samples .*v.jsonl"):
        run_score(enough, baseline=path, ks="5")


@pytest.mark.parametrize("ks", ["", "0", "1,,5", "-1", "1.5", "five", "1;5", "1_0", "²", "9" * 5000])
def test_ks_that_are_no_numbers_are_refused(ks):
    with pytest.raises(ConfigError, match="--k: got"):
        run_score("absent.jsonl", ks=ks)


def test_ks_are_sorted_and_each_once():
    assert parse_ks(" 10, 1,5,1 ") == [1, 5, 10]


@pytest.mark.parametrize("out", ["report.txt", "report", "report.JSON"])
def test_unknown_ending_is_refused_before_anything_is_read(out):
    with pytest.raises(ConfigError, match=r"expected a name that ends with .json, .csv, .md"):
        run_score("absent.jsonl", out=out)


def test_seed_below_zero_is_refused():
    with pytest.raises(ConfigError, match="--seed: got -1"):
        run_score("absent.jsonl", seed=-1)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "holds no verdict"),
        ([{"task_id": "a", "passed": True}, {"task_id": "a"}], "line 2: expected an object with task_id and passed"),
        ([{"task_id": "a", "passed": True, "sample": 1}] * 2, "line 2: sample 1 of a was on line 1 already"),
        ([{"task_id": "a", "passed": True, "rule": rule} for rule in ("strict", "official")], "more than one rule"),
        ([{"task_id": "a", "passed": True, "suite": suite} for suite in ("mbpp", None)], r"one suite \(mbpp, none\)"),
        ([{"task_id": "a", "passed": True, "temperature": "hot"}], "line 1: temperature is 'hot', expected a number"),
        ([{"task_id": "a", "passed": True, "temperature": float("nan")}], "line 1: temperature is nan"),
        (
            [{"task_id": name, "passed": True, "temperature": t} for name, t in (("a", 0.2), ("a", 0.8), ("b", 0.8))],
            "no sample of b at temperature 0.2, but there are some at another",
        ),
    ],
)  # fmt: skip
def test_faulty_files_are_refused(tmp_path, rows, line):
    path = tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=line):
        run_score(str(path))


def test_files_that_cannot_be_read_or_written_are_refused(verdicts, tmp_path):
    with pytest.raises(DataError, match="absent"):
        run_score(str(tmp_path / "absent.jsonl"))
    path = verdicts("v.jsonl", {"a": (2, 1), "b": (2, 1)})
    with pytest.raises(DataError, match=r"v.jsonl"):
        run_score(path, out=f"{path}/report.json")
    with pytest.raises(DataError, match=r"v.jsonl"):
        run_score(path, plots=path)


# --- files ----------------------------------------------------------------------------------------


def test_json_holds_everything(verdicts, tmp_path):
    counts = {"a": (7, 3), "b": (7, 1)}
    path = verdicts("v.jsonl", counts, temperature=0.2, **VERILOG)
    outs = [tmp_path / "new" / "first.json", tmp_path / "second.json", tmp_path / "third.json"]
    for out, seed in zip(outs, (7, 7, 8), strict=True):
        run_score(path, baseline=path, ks="1,3", out=str(out), seed=seed)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    report = json.loads(outs[0].read_text())
    assert report == report_of(path, path, "1,3", 7)  # every double as it was
    assert report["bootstrap"] == {"level": 0.95, "resamples": 10_000, "seed": 7}
    assert json.loads(outs[2].read_text())["bootstrap"]["seed"] == 8
    section = report["verdicts"]
    assert {name: section[name] for name in VERILOG} == VERILOG
    assert section["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert section["problems"][0] == {
        "task_id": "a", "temperature": 0.2, "n": 7, "c": 3, "pass@1": 3 / 7, "pass@3": pass_at_k_m(7, 3, 3, 1),
        "Pass@1(1)": 3 / 7, "Pass@3(1)": pass_at_k_m(7, 3, 3, 1), "Pass@3(2)": pass_at_k_m(7, 3, 3, 2),
        "Pass@3(3)": pass_at_k_m(7, 3, 3, 3),
    }  # fmt: skip


def test_csv_is_the_table_of_problems(verdicts, tmp_path):
    path, out = verdicts("v.jsonl", {"a,b": (6, 2), "c": (7, 7)}), tmp_path / "table.csv"
    run_score(path, ks="1,2", out=str(out))
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "task_id",
        "temperature",
        "n",
        "c",
        "pass@1",
        "pass@2",
        "Pass@1(1)",
        "Pass@2(1)",
        "Pass@2(2)",
    ]
    assert [(row["task_id"], row["temperature"], row["n"], row["c"]) for row in rows] == [
        ("a,b", "", "6", "2"), ("c", "", "7", "7"),
    ]  # fmt: skip
    assert float(rows[0]["pass@1"]) == 2 / 6
    assert float(rows[0]["Pass@2(2)"]) == pass_at_k_m(6, 2, 2, 2)


def test_markdown_has_whole_tables(verdicts, tmp_path):
    path, out = verdicts("v.jsonl", {"a|b": (15, 15), "c": (15, 15)}), tmp_path / "report.md"
    run_score(path, baseline=path, ks="1,15", out=str(out))
    text = out.read_text()
    assert "| Pass@15(15) | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | +0.0 [+0.0, +0.0] |" in text
    assert all(f"| m = {m} | {'100.0' if m == 1 else ''} | 100.0 |" in text for m in range(1, 16))
    assert "| a\\|b |  | 15 | 15 | 1.0000 | 1.0000 | 1.0000 |" in text
    assert "2412.13147" in text


def test_screen_shows_the_triangle_and_few_rows_of_a_large_one(verdicts, capsys):
    run_score(verdicts("v.jsonl", {"a": (30, 20), "b": (30, 30)}), ks="1,30")
    shown = capsys.readouterr().out
    assert re.findall(r"m = (\d+)", shown) == ["1", "2", "5", "10", "20", "30"]
    assert re.search(r"m = 1 +83\.3 +100\.0", shown)
    assert re.search(r"m = 30 +50\.0", shown)
    assert few_ms(12) == list(range(1, 13))


def test_names_with_odd_characters(tmp_path, capsys):
    """Brackets are no markup; a lone surrogate, which no file can hold, is written as its escape."""
    path = tmp_path / "v[bold].jsonl"
    path.write_text(json.dumps({"task_id": "[red]\ud800", "passed": True}) + "\n")
    for name in ("r.json", "r.csv", "r.md"):
        run_score(str(path), out=str(tmp_path / name))
        assert "\\ud800" in (tmp_path / name).read_text()
    assert re.search(r"^ +v\[bold\]\.jsonl", capsys.readouterr().out, re.MULTILINE)  # the head of the table


def test_gzipped_verdicts(verdicts, tmp_path):
    path = verdicts("v.jsonl", {"a": (2, 1)})
    packed = tmp_path / "v.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert report_of(str(packed))["verdicts"]["problems"] == report_of(path)["verdicts"]["problems"]


# --- plots ----------------------------------------------------------------------------------------


def test_plots_are_the_same_twice(verdicts, tmp_path):
    paths = verdicts("a.jsonl", {"a": (10, 9), "b": (10, 5)}), verdicts("b.jsonl", {"a": (10, 9), "b": (10, 2)})
    for folder in ("one", "two"):
        run_score(paths[0], baseline=paths[1], ks="1,10", plots=str(tmp_path / folder))
    for name in ("pass_at_k_m.svg", "fig1b.svg"):
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "two" / name).read_text()
        assert "<dc:date>" not in text
    assert "k = 10" in (tmp_path / "one" / "pass_at_k_m.svg").read_text()


@pytest.mark.parametrize(
    ("suite", "ks", "axis", "published"),
    [
        ("verilogeval-v1", "1,5,10,11", "Pass@10(10)", True),
        ("verilogeval-v1", "5", "Pass@5(5)", True),
        ("verilogeval-v1", "1,7", "Pass@7(7)", False),  # the figure has no such point
        ("humaneval", "1,10", "Pass@10(10)", False),
    ],
)
def test_published_points_only_beside_what_they_measure(verdicts, tmp_path, suite, ks, axis, published):
    path = verdicts("v.jsonl", {"a": (11, 9), "b": (11, 5)}, suite=suite)
    run_score(path, ks=ks, plots=str(tmp_path))
    text = (tmp_path / "fig1b.svg").read_text()
    assert f">{axis}, %<" in text
    assert ">Pass@1, %<" in text
    assert text.count("read from the figure") == (2 if published else 0)  # Machine, Human
    assert "ours, verdicts" in text


def test_points_lie_where_they_should(verdicts):
    from ibft.evaluation.score_plots import draw_scatter

    counts = {"a": (10, 10), "b": (10, 5)}
    cold, hot = ({"suite": "verilogeval-v1", "temperature": temperature} for temperature in (0.2, 0.8))
    worst = Path(verdicts("worst", {"a": (10, 0), "b": (10, 0)}, **hot)).read_text()
    path = verdicts("v.jsonl", counts, more=worst, **cold)
    baseline = verdicts("b.jsonl", {"a": (10, 1), "b": (10, 2)}, **cold)
    axes = draw_scatter(report_of(path, baseline, "10")).axes[0]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    expected = [(67.9, 49.6), (75.8, 69.2), (42.6, 27.6), (52.0, 48.0), (15, 0), (75, 50), (0, 0)]
    assert points == [pytest.approx(point) for point in expected]


def test_a_scatter_of_one_sample_is_not_drawn(verdicts, tmp_path, capsys):
    run_score(verdicts("v.jsonl", {"a": (1, 1), "b": (1, 0)}), plots=str(tmp_path))
    assert "fig1b.svg is not drawn: it needs a k above 1" in capsys.readouterr().out
    assert not (tmp_path / "fig1b.svg").exists()
    assert (tmp_path / "pass_at_k_m.svg").exists()


def test_missing_matplotlib_is_said_before_anything_is_read(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install matplotlib"):
        run_score("absent.jsonl", plots="plots")
