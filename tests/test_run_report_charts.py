"""The charts of the page about training runs: what is drawn lies where its numbers have it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.run_report.chart import HEIGHT, LONG, WIDTH, Line, chart, scale_of


def paths(svg):
    return re.findall(r'<g class="c\d d\d">.*?</g>', svg)


def test_points_lie_where_the_scale_has_them():
    """The plane is 296 wide from x = 48, 156 high from y = 164 upwards; the scale goes from 0 to 10."""
    svg = chart("t", [Line("n", 0, [(0, 0.0), (5, 10.0), (10, 2.5)])], range(11))
    assert 'd="M48.0 164.0h0L196.0 8.0L344.0 125.0"' in svg
    assert re.findall(r"<title>(.*?)</title>", svg) == ["n, step 0: 0", "n, step 5: 10", "n, step 10: 2.5"]
    assert 'y="168.0" text-anchor="end">0</text>' in svg
    assert 'x="107.2" y="179" text-anchor="middle">2</text>' in svg
    assert "log scale" not in svg


def test_a_gap_breaks_the_line():
    svg = chart("t", [Line("n", 0, [(0, 0.0), (5, None), (10, 10.0)])], range(11))
    assert 'd="M48.0 164.0h0M344.0 8.0h0"' in svg


def test_values_a_hundred_times_apart_have_a_logarithmic_scale():
    """1 to 100 with a margin of 4 % of two powers of ten at both ends: 10 in the middle, at y = 86."""
    svg = chart("t", [Line("n", 0, [(0, 1.0), (5, 10.0), (10, 100.0)])], range(11), unit="nats")
    assert "nats, log scale" in svg
    assert "L196.0 86.0" in svg
    assert "log" not in chart("t", [Line("n", 0, [(0, 1.0), (10, 99.0)])], range(11))
    assert "log" not in chart("t", [Line("n", 0, [(0, 1.0), (10, 100.0)])], range(11), zero=True)
    assert "log" not in chart("t", [Line("n", 0, [(0, 0.0), (10, 100.0)])], range(11))


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.2, 0.9], [0.2, 0.4, 0.6, 0.8, 1.0]), ([3.0, 3.0], [2.6, 2.8, 3.0, 3.2, 3.4]),
        ([0.0], [-1.0, -0.5, 0.0, 0.5, 1.0]),
        ([-7.0, 12.0], [-10.0, -5.0, 0.0, 5.0, 10.0, 15.0]), ([1.0, 1000.0], [1.0, 10.0, 100.0, 1000.0]),
    ],
)  # fmt: skip
def test_ticks_are_round_numbers(values, ticks):
    assert scale_of(values).ticks == pytest.approx(ticks)


def test_next_to_nothing_has_no_powers_of_ten():
    assert not scale_of([5e-324, 1.0]).log
    assert not scale_of([1e-46, 3e38]).log
    assert len(scale_of([1e-44, 3e38]).ticks) == 6


NUMBERS = st.one_of(
    st.none(), st.floats(-3.5e38, 3.5e38), st.sampled_from([0.0, 5e-324, -5e-324, 1e-310, 1e-44, 1e-46, 3.5e38])
)


@given(
    st.lists(
        st.tuples(st.integers(-(10**9), 10**9), NUMBERS), min_size=1, max_size=9, unique_by=lambda point: point[0]
    ),
    st.booleans(),
)
def test_whatever_the_values_all_is_drawn_within_the_frame(points, zero):
    points = sorted(points)
    svg = chart("t", [Line("n", 0, points)], range(points[0][0], points[-1][0] + 1), zero=zero)
    assert (svg == "") == all(value is None for _, value in points)
    places = re.findall(r'[ML](\S+) (-?[\d.]+)|cx="(.*?)" cy="(.*?)"|<text x="(.*?)" y="(.*?)"', svg)
    for found in places:
        x, y = map(float, filter(None, found))
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert svg.count("<text") <= 30


def test_a_long_line_keeps_its_spike_and_shows_its_mean():
    """Of 10,000 steps at 1, one is 5: pale it reaches the top; the line, a mean of 125 steps, rises to 1.032."""
    points = [(step, 5.0 if step == 7000 else 1.0) for step in range(10_000)]
    assert len(points) > LONG
    svg = chart("t", [Line("n", 0, points)], range(10_000), zero=True)
    pale, line = re.findall(r'<path(?: class="pale")? d="(.*?)"', paths(svg)[0])
    heights = [[float(y) for y in re.findall(r"[ML]\S+ ([\d.]+)", path)] for path in (pale, line)]
    assert min(heights[0]) == 8.0  # of 5
    assert len(heights[1]) == 80
    assert min(heights[1]) == pytest.approx(164 - 156 * 1.032 / 5, abs=0.051)
    assert len(svg) < 20_000
    assert "<circle" not in svg


def test_many_lines_all_look_different():
    svg = chart("t", [Line(f"n{number}", number, [(0, 1.0), (1, 2.0)]) for number in range(30)], range(2))
    assert len({re.search(r'class="(.*?)"', line)[1] for line in paths(svg)}) == 30
