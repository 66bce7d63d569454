"""The cells of a sweep: the grid's values, their names, and what is refused before anything runs."""

import pytest

from ibft.errors import ConfigError
from ibft.sweep.grid import BASELINE, load_base, make_cells, read_grid, suggested_grid
from ibft.sweep.plan import resolve


def cells_of(*options, overrides=(), path=None):
    return make_cells(path, list(overrides), read_grid(options)[0], resolve)


def test_values_are_yaml_between_brackets():
    grid, notices = read_grid(["ib.layer=4,[4,6],auto", "lora.use_rslora=true,false"])
    assert grid == {"ib.layer": [4, [4, 6], "auto"], "lora.use_rslora": [True, False]}
    assert notices == []


def test_common_names_are_taken_with_a_notice():
    assert read_grid(["alpha=0.1"]) == ({"ib.alpha": [0.1]}, ["alpha is ib.alpha here"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["ib.alhpa=1"], "did you mean 'ib.alpha'"),
        (["ib=1"], "expected a section"),
        (["ib.alpha"], "expected KEY=V1,V2"),
        (["ib.alpha="], "expected KEY=V1,V2"),
        (["ib.layer=[4,5"], "expected KEY=V1,V2"),
        (["ib.alpha=0.1,,0.2"], "expected KEY=V1,V2"),
        (["ib.alpha=0.1", "alpha=0.2"], "ib.alpha is there twice"),
        (["seed=0,1"], "seeds from --seeds"),
        (["eval.max_new_tokens=1,2"], "asked alike"),
    ],
)
def test_a_bad_grid_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        read_grid(options)


def test_the_suggested_grid_is_the_paper_s_and_scales_with_depth():
    assert suggested_grid(30) == {
        "ib.alpha": [0.01, 0.05, 0.1, 0.5, 1], "ib.beta": [0.001, 0.01, 0.05, 0.1], "ib.layer": [10, 15, 20, 25],
    }  # fmt: skip
    assert suggested_grid(8)["ib.layer"] == [3, 4, 5, 7]
    assert suggested_grid(4)["ib.layer"] == [1, 2, 3]  # doubles dropped
    assert suggested_grid(2)["ib.layer"] == [1]  # never the last block


def test_a_cell_for_each_combination_and_the_baseline():
    baseline, cells = cells_of("ib.alpha=0.05,0.1", "ib.layer=5,[4,6]", overrides=["ib.beta=0.03"])
    names = ["alpha-0.05_layer-5", "alpha-0.05_layer-4+6", "alpha-0.1_layer-5", "alpha-0.1_layer-4+6"]
    assert [cell.name for cell in cells] == names
    assert cells[1].values == {"ib.alpha": 0.05, "ib.layer": [4, 6]}
    assert (cells[1].config.ib.alpha, cells[1].config.ib.layer, cells[1].config.ib.beta) == (0.05, (4, 6), 0.03)
    assert (baseline.name, baseline.values, baseline.config.ib.alpha) == (BASELINE, {}, 0)


def test_names_keep_their_sections_where_leaves_are_alike():
    _, (cell,) = cells_of("ib.alpha=0.1", "lora.alpha=16", "model.quantization=none")
    assert cell.name == "ib.alpha-0.1_lora.alpha-16_quantization-none"


def test_a_file_and_its_overrides_are_under_every_cell(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("ib: {beta: 0.5, latent_dim: 32}\ntrain: {max_steps: 7}\n")
    baseline, (cell,) = cells_of("ib.alpha=0.1", path=str(file), overrides=["ib.beta=0.6"])
    for each in (baseline, cell):
        assert (each.config.ib.beta, each.config.ib.latent_dim, each.config.train.max_steps) == (0.6, 32, 7)


def test_what_belongs_to_one_run_is_left_out_and_said():
    config, notices = load_base(None, ["seed=3", "eval.tasks=mine.jsonl"])
    assert [notice.split(":")[0] for notice in notices[1:]] == [
        "runtime.seed is left out", "eval.tasks is left out",
    ]  # fmt: skip
    assert (resolve(config).runtime.seed, resolve(config).eval.tasks) == (0, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["ib.alpha=0.1,nonsense"], "ib.alpha: got 'nonsense'"),
        (["ib.alpha=0.1,-1"], "ib.alpha: got -1"),
        (["ib.layer=4,8"], "ib.layer: got 8, expected 1 .. 7"),
        (["ib.alpha=0,0.1"], "the baseline that a sweep always runs"),
        (["ib.alpha=0.1,0.10"], "are the settings of alpha-0.1 again"),
        (["ib.layer=5,auto"], "are the settings of layer-5 again"),
        (["ib.kl_tokens=real,all"], "ib.kl_tokens=all counts pads"),
    ],
)
def test_every_cell_is_checked(options, said):
    with pytest.raises(ConfigError, match=said):
        cells_of(*options)
