"""The figures of a reproduction: which are drawn, from which rows, and what a broken or poor report comes to."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from reproduction_report import make_report
from typer.testing import CliRunner

from ibft.analysis import figures_inside, figures_scores
from ibft.analysis.figures import ENDINGS, FIGURES
from ibft.analysis.figures_run import named_runs, run_figures
from ibft.analysis.figures_scores import NotDrawn
from ibft.cli import app
from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.score_plots import PUBLISHED
from ibft.reproduce.score_table import to_csv, to_markdown

NAMES = [f"{figure.name}{ending}" for figure in FIGURES for ending in ENDINGS]
VERILOG = ("VerilogEval Machine", "VerilogEval Human")


def write(folder: Path, report) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(run, folder, what was printed)."""
    path = tmp_path_factory.mktemp("drawn")
    run = write(path / "tiny", make_report())
    result = CliRunner().invoke(app, ["analyze", "figures", str(run), "-o", str(path / "out")])
    assert result.exit_code == 0, result.output
    return run, path / "out", result.output


def test_each_figure_is_drawn_in_both_formats(drawn):
    _, folder, said = drawn
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, "table.csv", "table.md"])
    for figure in FIGURES:
        assert f"figure: {folder / figure.name}.png, .svg" in said
        assert (folder / f"{figure.name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (folder / f"{figure.name}.svg").read_text()
        assert "<dc:date>" not in svg
        assert "ibft-fast" in svg
    assert "tiny: In the base “memorised” is more memorised than “unseen”" in said


def test_two_runs_have_equal_bytes(drawn, tmp_path):
    run, folder, _ = drawn
    run_figures([str(run / "report.json")], str(tmp_path))
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_what_the_figures_say(drawn):
    _, folder, _ = drawn
    said = {
        "fig1b": ["Pass@10(10), %", "paper, VerilogEval Machine: FT → IB-FT (other models and suite)", "IB-FT, beta 0"],
        "fig2": ["Pass@10(m), %", "twin base"],
        "fig3": ["exists.", "base, memorised against unseen: AUC 1.000 [0.950, 1.000], overlap coefficient 0.00",
                 "base on rest (60)", "FT on the fine-tuning data, all seeds (360)", "lower = more memorised"],
        "fig4": ["FT, random 10 % dropped", "Pass@5(5)", "axes ours"],
        "fig5": ["L2 / norm", "centred angle, °", "layer 3", "axes ours"],
        "fig6": ["temperature 0.2", "temperature 1", "axes ours"],
        "fig7": ["CE, nats a token", "IB-FT", "a figure of ours"],
        "fig8": ["FT from the twin base", "FT from perturbed weights", "a figure of ours"],
    }  # fmt: skip
    for name, texts in said.items():
        svg = (folder / f"{name}.svg").read_text()
        shown = " ".join(part.split("</text>")[0].split(">")[-1] for part in svg.split("<text")[1:])
        for text in texts:
            assert text in shown, name


def test_the_table(drawn):
    _, folder, _ = drawn
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == (10 + 2 * 2) * 16
    row = next(row for row in rows if (row["model"], row["temperature"], row["k"], row["m"]) == ("FT", "0.6", "5", "5"))
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    markdown = (folder / "table.md").read_text()
    value, low, high = (100 * float(row[name]) for name in ("value", "low", "high"))
    line = next(line for line in markdown.split("temperature 0.6")[1].splitlines() if line.startswith("| FT |"))
    assert f"{value:.1f} [{low:.1f}, {high:.1f}]" in line


def test_several_runs_have_folders_and_share_a_table(tmp_path):
    poor = {**make_report(), "counts": [], "memorization": [], "geometry": []}
    runs = [write(tmp_path / name, poor) for name in ("a", "b")]
    run_figures([*map(str, runs)], str(tmp_path / "out"))
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {"table.csv", "table.md", "a/fig7.png", "a/fig7.svg", "b/fig7.png", "b/fig7.svg"}
    reports = {"a": make_report(n=1), "b": make_report(n=1, suites=VERILOG)}
    rows = list(csv.DictReader(io.StringIO(to_csv(reports))))
    assert [row["run"] for row in rows] == ["a"] * 14 + ["b"] * 28
    assert to_markdown(reports).count("\n### ") == 3 + 6


def test_missing_rows_are_a_line_and_no_failure(tmp_path):
    report = {**make_report(), "memorization": [], "deciles": [], "geometry": [], "training": []}
    report["counts"] = [row for row in report["counts"] if row["model"] in ("base", "IB-FT")]
    report["models"] = [model for model in report["models"] if "from" not in model["name"]]
    run, out = write(tmp_path / "run", report), tmp_path / "out"
    out.mkdir()
    (out / "fig4.png").write_bytes(b"of an earlier run")
    result = CliRunner().invoke(app, ["analyze", "figures", str(run), "-o", str(out)])
    assert result.exit_code == 0
    for line in (
        "fig3 is not drawn: no Min-K% scores of the base",
        "fig4 is not drawn: no suite has samples of 2 of FT, “FT, top 10 % dropped”, “FT, random 10 % dropped”",
        "fig5 is not drawn: no hidden states were measured",
        "fig7 is not drawn: no cross-entropy by decile was measured over training",
        "fig8 is not drawn: no model was trained from another start",
        "run: What the base has memorised is not measured; whether fine-tuning solves less for it is not measured",
    ):
        assert line in result.output
    assert {path.name for path in out.glob("*.png")} == {"fig1b.png", "fig2.png", "fig6.png"}


def test_nothing_measured(tmp_path):
    report = {**make_report(), "memorization": [], "deciles": [], "geometry": [], "counts": [], "suites": {}}
    result = CliRunner().invoke(
        app, ["analyze", "figures", str(write(tmp_path / "run", report)), "-o", str(tmp_path / "out")]
    )
    assert result.exit_code == 0
    assert result.output.count("is not drawn") == len(FIGURES)


def test_one_sample_a_problem(tmp_path):
    report = make_report(n=1)
    for draw in (figures_scores.draw_scatter, figures_scores.draw_all_models, figures_scores.draw_temperatures):
        with pytest.raises(NotDrawn, match="needs more than one sample a problem"):
            draw(report)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.update(kind="other"), "kind: Input should be 'ibft-fast reproduction'"),
        (lambda report: report.update(version=2), "version: Input should be 1"),
        (lambda report: report["counts"][3].update(passed=[1]), "counts.3: got 1 tasks, expected the 12 of tiny"),
        (lambda report: report["counts"][0]["passed"].__setitem__(0, 11), "counts.0: got 11 of n = 10 samples passed"),
        (lambda report: report["counts"][0].update(model="x"), "counts.0: no model is named x"),
        (lambda report: report["counts"][0].update(suite="x"), "counts.0: no suite is named x"),
        (lambda report: report["counts"].append(report["counts"][0]), "a second row of model FT, seed 0, suite tiny"),
        (lambda report: report["counts"][0].update(seed=None), "counts.1: FT has rows with a seed and rows without"),
        (lambda report: report["deciles"][0].update(ce=[1.0]), "deciles.0.ce: List should have at least 10 items"),
        (lambda report: report["memorization"][0]["values"].append("x"), "memorization.0.values.60: Input should be a"),
        (lambda report: report["geometry"][0].update(l2={"estimate": float("nan")}), "geometry.0.l2.estimate: Input"),
        (lambda report: report["models"].append(report["models"][0]), "models: two are named base"),
        (lambda report: report.pop("models"), "models: Field required"),
    ],
)
def test_a_broken_report_is_one_line(tmp_path, change, said):
    report = make_report()
    change(report)
    result = CliRunner().invoke(
        app, ["analyze", "figures", str(write(tmp_path / "run", report)), "-o", str(tmp_path / "o")]
    )
    assert result.exit_code == DataError.exit_code
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b"{}"])
def test_no_report(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    result = CliRunner().invoke(app, ["analyze", "figures", str(tmp_path), "-o", str(tmp_path / "o")])
    assert result.exit_code == DataError.exit_code
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / "report.json") in result.stderr


def test_runs_have_names_of_their_own(tmp_path):
    assert list(named_runs([str(tmp_path / "a"), str(tmp_path / "b" / "report.json"), str(tmp_path / "c.json")])) == [
        *"abc"
    ]
    with pytest.raises(ConfigError, match="both named a"):
        named_runs(["a", str(tmp_path / "a")])
    with pytest.raises(ConfigError, match="at least one"):
        named_runs([])


def test_a_folder_that_cannot_be_written(tmp_path):
    run = write(tmp_path / "run", make_report())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        run_figures([str(run)], str(tmp_path / "file"))


def test_no_matplotlib(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="analyze figures needs matplotlib"):
        run_figures(["absent"], "out")


# --- what is drawn --------------------------------------------------------------------------------


def points_of(axes):
    """label -> (x, y) of lines of one point."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == 1]
    return {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines}


def test_points_lie_where_they_should():
    report = make_report()
    points = points_of(figures_scores.draw_scatter(report).axes[0])
    passed = np.array([
        row["passed"] for row in report["counts"] if (row["model"], row["temperature"]) == ("IB-FT", 0.6)
    ])  # fmt: skip
    assert points["IB-FT"] == pytest.approx((100 * passed.mean() / 10, 100 * (passed == 10).mean()))
    assert set(points) >= {model["name"] for model in report["models"]}


def test_published_points_are_the_suites_own():
    machine, human = figures_scores.draw_scatter(make_report(suites=VERILOG)).axes
    for axes, name in ((machine, "Machine"), (human, "Human")):
        papers = {label: place for label, place in points_of(axes).items() if label.startswith("paper")}
        (x, y) = PUBLISHED[name][1][1], PUBLISHED[name][10][1]
        assert papers == {f"paper, VerilogEval {name}: FT → IB-FT": (x, y)}
    tiny = points_of(figures_scores.draw_scatter(make_report()).axes[0])
    assert sum("(other models and suite)" in label for label in tiny) == 2
    few = points_of(figures_scores.draw_scatter(make_report(n=3)).axes[0])
    assert not any("paper" in label for label in few)  # it has no Pass@3(3)


def test_models_look_different():
    looks = figures_scores.look_of(make_report())
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks) == 10
    assert looks["FT"]["marker"] != looks["IB-FT"]["marker"]


def test_densities_are_of_the_groups():
    groups = dict(figures_inside.density_groups(make_report()))
    assert [len(scores) for scores in groups.values()] == [60, 60, 60, 360]
    axes = figures_inside.draw_densities(make_report()).axes[0]
    stairs = [patch for patch in axes.patches if patch.get_label().startswith("base on memorised")]
    values, edges, _ = stairs[0].get_data()
    assert (values * np.diff(edges)).sum() == pytest.approx(1)
    assert np.average((edges[1:] + edges[:-1]) / 2, weights=values) == pytest.approx(
        np.mean(groups["base on memorised"]), abs=0.05
    )


def test_deciles_are_means_over_seeds():
    report = make_report()
    steps, losses = figures_inside.decile_curves(report, "FT")
    assert list(steps) == [0, 20, 40, 80]
    end = [row["ce"] for row in report["deciles"] if (row["model"], row["step"]) == ("FT", 80)]
    assert losses[-1] == pytest.approx(np.mean(end, axis=0))
    report["deciles"] = [row | {"ce": [None, *row["ce"][1:]]} for row in report["deciles"]]
    assert np.isnan(figures_inside.decile_curves(report, "FT")[1][:, 0]).all()
    figures_inside.draw_deciles(report)


def test_a_dot_a_seed_and_none_without_an_estimate():
    report = make_report(width={"FT": None})
    axes = figures_inside.draw_geometry(report).axes[0]
    dots = [line for line in axes.lines if line.get_label() == "layer 3"]
    assert [len(line.get_xdata()) for line in dots] == [1, 0, 3]  # base, FT, IB-FT
