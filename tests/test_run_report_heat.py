"""The map of the KL of each latent dimension: which row, column and colour a number has, and what is said of it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_pages import MANIFEST, page_of, write_run

from ibft.run_report.chart import HEIGHT, WIDTH
from ibft.run_report.heat import COLUMNS, ROWS, drawn, heat_of, heats, level, scale_of_colours
from ibft.run_report.read_run import Run, read_runs

LATENT = [{"step": 1, "kl": [8.0, 4.0]}, {"step": 20, "kl": [0.25, 0.5]}]


def test_rows_are_dimensions_the_fullest_at_the_last_step_on_top():
    heat = heat_of("n", [(100, [1.0, 2.0, 3.0]), (110, [10.0, 1.0, 5.0])])
    assert heat.groups == [[0], [2], [1]]
    assert heat.cells == [[1.0, 10.0], [3.0, 5.0], [2.0, 1.0]]
    assert heat.edges == [-5.0, 5.0, 15.0]
    assert heat_of("n", [(7, [1.0])]).edges == [-0.5, 0.5]


def test_of_many_dimensions_a_row_is_the_mean_of_as_many_neighbours():
    """130 in rows of 3, and one is left: KL 130, 129, 128 on top, alone 1 at the bottom."""
    heat = heat_of("n", [(1, [float(kl) for kl in range(1, 131)])])
    assert (len(heat.groups), heat.dims) == (44, 130)
    assert (heat.groups[0], heat.cells[0]) == ([129, 128, 127], [129.0])
    assert (heat.groups[-1], heat.cells[-1]) == ([0], [1.0])
    svg = drawn(heat, scale_of_colours([1.0, 129.0]))
    assert "n, nats, log scale; each row the mean of 3 of 130 dimensions, the last of 1</figcaption>" in svg
    assert "<title>dimensions 129, 128, 127: 129 nats at step 1</title>" in svg
    even = drawn(heat_of("n", [(1, [1.0] * 256)]), scale_of_colours([1.0]))
    assert "each row the mean of 4 of 256 dimensions</figcaption>" in even
    assert even.count("<title>") == ROWS
    assert "mean" not in drawn(heat_of("n", [(1, [1.0] * 64)]), scale_of_colours([1.0]))


def test_of_many_steps_a_column_is_the_mean_of_its_own():
    """6,000 steps in 60 columns of 100: 0 to 99 in the first, 5,900 to 5,999 in the last."""
    heat = heat_of("n", [(step, [float(step)]) for step in range(6000)])
    assert (len(heat.cells[0]), len(heat.edges)) == (COLUMNS, COLUMNS + 1)
    assert (heat.cells[0][0], heat.cells[0][-1]) == (49.5, 5949.5)
    assert heat.edges[:2] == pytest.approx([-0.5, 99.5])


def test_a_missing_number_is_no_part_of_a_mean_and_leaves_a_gap():
    heat = heat_of("n", [(0, [None, None]), (1, [None, 2.0])])
    assert heat.groups == [[1], [0]]
    assert heat.cells == [[None, 2.0], [None, None]]
    svg = drawn(heat, scale_of_colours([2.0]))
    assert len(re.findall(r"<g><title>.*?</g>", svg)) == 2
    assert "<g><title>dimension 0</title></g>" in svg
    wide = heat_of("n", [(0, [1.0, None] * 64)])
    assert wide.cells[:32] == [[1.0]] * 32  # two of a row
    assert wide.cells[32:] == [[None]] * 32


def test_colours_go_by_the_logarithm_from_the_least_to_the_greatest():
    scale = scale_of_colours([0.0, 1.0, 100.0])
    assert (scale.low, scale.high) == (1.0, 100.0)
    assert [level(kl, scale) for kl in (-1.0, 0.0, 1.0, 10.0, 99.0, 100.0, 1e9)] == [0, 0, 0, 8, 16, 16, 16]
    lowest = scale_of_colours([1e-9, 10.0])
    assert lowest.low == pytest.approx(1e-4)  # five decades
    assert level(1e-9, lowest) == 0
    alike = scale_of_colours([4.0])
    assert (alike.low, alike.high) == (pytest.approx(4 / 10**0.5), pytest.approx(4 * 10**0.5))
    assert scale_of_colours([0.0]).log


def test_boxes_lie_where_their_steps_and_dimensions_are():
    """The plane is 296 wide from x = 48, two rows of 24 from y = 8; neighbours of a colour are one box."""
    heat = heat_of("n", [(0, [1.0, 10.0]), (10, [1.0, 100.0])])
    svg = drawn(heat, scale_of_colours([1.0, 10.0, 100.0]))
    assert (
        '<g><title>dimension 1: 100 nats at step 10</title><path class="k8" d="M48.0 8.0H196.0V32.0H48.0z"/>'
        '<path class="k16" d="M196.0 8.0H344.0V32.0H196.0z"/></g>'
        '<g><title>dimension 0: 1 nats at step 10</title><path class="k0" d="M48.0 32.0H344.0V56.0H48.0z"/></g>'
    ) in svg
    assert 'x="122.0" y="71.0" text-anchor="middle">0</text>' in svg  # step 0 in the middle of its column
    assert re.findall(r'y="121.0" text-anchor="middle">(.*?)<', svg) == ["1", "10", "100"]  # of the legend
    assert 'y="105.0" text-anchor="end">nats</text>' in svg
    assert len(set(re.findall(r'<path class="(k\d+)" d="M\S+ 96.0', svg))) == 17


def test_a_run_s_page_has_a_map_a_layer_and_says_which(tmp_path):
    one = page_of(write_run(tmp_path / "one", latent=LATENT))
    assert one.text_of_maps().endswith(
        "KL of each latent dimension, layer 5: 2 dimensions; at step 1 from 4 to 8 nats; "
        "at step 20 from 0.25 to 0.5 nats"
    )
    two = [{**row, "layer": layer} for row in LATENT for layer in (12, 4)]
    page = page_of(tmp_path / "one", write_run(tmp_path / "two", latent=two), write_run(tmp_path / "none"))
    maps = [label.split(":")[0] for label in page.labels() if label.startswith("KL of each")]
    assert maps == [
        f"KL of each latent dimension, {name}" for name in ("one, layer 5", "two, layer 4", "two, layer 12")
    ]
    assert "KL of each latent dimension two, layer 12, nats, log scale" in page.text
    assert (page.open, page.wrong) == ([], [])


def test_without_the_file_there_is_no_map_and_no_word_of_one(tmp_path):
    assert "each latent dimension" not in page_of(write_run(tmp_path / "a")).text
    layers = page_of(write_run(tmp_path / "b", latent=LATENT, manifest=MANIFEST | {"ib_layer": None}))
    assert "KL of each latent dimension: 2 dimensions" in layers.text_of_maps()


def test_all_maps_of_a_page_have_one_scale(tmp_path):
    few = [{"step": 1, "kl": [0.01]}]
    runs = read_runs(
        [write_run(tmp_path / "a", latent=few), write_run(tmp_path / "b", latent=[{"step": 1, "kl": [1.0]}])]
    )
    assert re.findall(r'</title><path class="(k\d+)"', heats(runs)) == ["k0", "k16"]


KL = st.one_of(st.none(), st.floats(-3.5e38, 3.5e38), st.sampled_from([0.0, 5e-324, 1e-46, 3.5e38]))


@given(
    st.dictionaries(
        st.one_of(st.integers(-9, 200), st.integers(-(10**38), 10**38)), st.lists(KL, min_size=3, max_size=3),
        min_size=1, max_size=70,
    )
)  # fmt: skip
def test_whatever_the_numbers_all_is_drawn_within_the_frame(found):
    svg = heats([Run(None, "n", latent={None: sorted(found.items())})])
    places = re.findall(r'M(-?[\d.]+) (-?[\d.]+)(?:H(-?[\d.]+)V(-?[\d.]+))?|<text x="(.*?)" y="(.*?)"', svg)
    assert len(places) > 20
    for place in places:
        x, y = ([float(one) for one in place[start::2] if one] for start in (0, 1))
        assert 0 <= min(x) <= max(x) <= WIDTH
        assert 0 <= min(y) <= max(y) <= HEIGHT
