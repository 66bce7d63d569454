"""A sweep's figures, from reports that were made up."""

import pytest

from ibft.evaluation.score_plots import save
from ibft.sweep.figures import draw_figures, draw_grid, draw_pareto, measures_of
from tests.sweep.synthetic import make_report

KEYS = {"ib.alpha": [0.01, 0.1], "ib.beta": [0.001, 0.01, 0.1], "ib.layer": [4, [4, 6]]}


def first(report):
    return measures_of(report)[0]


def of_alpha(values):
    return [round(100 * values.get("ib.alpha", 0)), 2, 0]


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_every_figure_is_drawn(keys, tmp_path):
    report = make_report(dict(list(KEYS.items())[:keys]), of_alpha)
    lines = list(draw_figures(report, tmp_path))
    names = ["pareto", "pass-at-1", "pass-at-k", "kl"]
    assert lines == [f"figure: {tmp_path}/{name}.png, .svg" for name in names]
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / f"{name}.svg").read_text()


def test_the_bytes_are_the_report_s(tmp_path):
    report = make_report({"ib.alpha": [0.01, 0.1]}, of_alpha)
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        save(draw_pareto, report, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_one_key_is_a_line_with_its_band():
    report = make_report({"ib.alpha": [0.1, 0.001, 0.01], "ib.beta": [0.1]}, of_alpha)  # beta is no axis
    (axes,) = draw_grid(report, first(report)).axes
    line, baseline = axes.lines
    assert list(line.get_xdata()) == [0.001, 0.01, 0.1]
    assert list(line.get_ydata()) == pytest.approx([100 * (2 + passed) / 30 for passed in (0, 1, 10)])
    assert list(baseline.get_ydata()) == pytest.approx([100 * 2 / 30] * 2)
    assert axes.get_xscale() == "log"


def test_a_key_of_words_is_a_line_over_them():
    report = make_report({"ib.encoder": ["linear", "mlp"], "ib.beta": [0.1]}, lambda values: [len(values), 1])
    (axes,) = draw_grid(report, first(report)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["linear", "mlp"]


def test_three_keys_are_a_panel_each_of_the_last():
    report = make_report(KEYS, lambda values: [values.get("ib.layer") == 4 and values["ib.alpha"] == 0.1, 1])
    made = draw_grid(report, first(report))
    panels = [axes for axes in made.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["layer 4", "layer 4+6"]
    shown = [[text.get_text().rstrip("*") for text in axes.texts] for axes in panels]
    assert shown == [["5.0"] * 3 + ["10.0"] * 3, ["5.0"] * 6]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0.01", "0.1"]


def test_a_diverged_cell_is_hatched():
    report = make_report(dict(list(KEYS.items())[:2]), of_alpha, diverged={("alpha-0.01_beta-0.1", 0)})
    (axes,) = draw_grid(report, first(report)).axes
    assert len(axes.texts) == 5
    assert [patch.get_hatch() for patch in axes.patches].count("///") == 1


def test_the_front_is_a_line_and_the_chosen_is_named():
    report = make_report({"ib.alpha": [0.01, 0.1]}, of_alpha)
    (axes,) = draw_pareto(report).axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"chosen: alpha-0.1", "baseline: plain fine-tuning", "front"} <= set(labels)


def test_what_cannot_be_drawn_is_said_and_removed(tmp_path):
    report = make_report({"ib.alpha": [0.1]}, lambda _: None, eval_ce=lambda _: 1.0)
    (tmp_path / "pareto.png").write_text("old")
    assert list(draw_figures(report, tmp_path)) == [
        "pareto is not drawn: no cell has validation tasks",
        "held-out-ce is not drawn: the grid has one cell",
        "kl is not drawn: the grid has one cell",
    ]
    assert list(tmp_path.iterdir()) == []
    report = make_report({"ib.alpha": [0.01, 0.1]}, of_alpha, ks=(1,))
    assert next(draw_figures(report, tmp_path)) == "pareto is not drawn: it needs a k above 1"
