"""The figures of a sweep, from its report alone, as PNG and SVG:

pareto        Pass@1 against Pass@k(k), a point a cell, with the front that no cell beats
pass-at-1, pass-at-k, kl, held-out-ce
              over the grid: of one key a line with its interval; of two a heat map; of more a heat map for each
              combination of the others' values. Keys with a single value are no axis.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ibft.analysis.figures import draw_each
from ibft.analysis.figures_scores import NotDrawn, legend_below
from ibft.evaluation.score_plots import GREY, LOOKS, figure
from ibft.sweep.grid import BASELINE, short_keys
from ibft.sweep.plan import VALIDATION

Report = Mapping[str, Any]
BLUE, RED, GREEN = (colour for colour, _ in LOOKS[:3])
COLUMNS = 2  # panels side by side
CELL = 0.34  # inches of a heat map's row
MANY = 10  # the largest value over the smallest, from which a scale is logarithmic
INTERVAL = "95 % interval over tasks and seeds"


NOTHING = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Measure:
    """of: value, low, high of a row of the table, None where it has none."""

    file: str
    label: str
    spread: str
    form: str
    of: Callable[[Report], tuple[float, float, float] | None]


def measures_of(report: Report) -> list[Measure]:
    """Scores where there are tasks, else held-out cross-entropy; and KL."""
    found = []
    if VALIDATION in report["tasks"]:
        k = report["ks"][-1]
        found.append(Measure("pass-at-1", "Pass@1, %", INTERVAL, ".1f", lambda row: percents(row, 0)))
        if k > 1:
            found.append(Measure("pass-at-k", f"Pass@{k}({k}), %", INTERVAL, ".1f", lambda row: percents(row, -1)))
    else:
        found.append(Measure("held-out-ce", "held-out cross-entropy, nats", "range over seeds", ".3f", nats("eval_ce")))
    return [*found, Measure("kl", "KL, nats a token", "range over seeds", ".3g", nats("kl"))]


def percents(row: Report, i: int) -> tuple[float, float, float] | None:
    if not row["scores"]:
        return None
    found = row["scores"][i]
    low, high = (found["value"] if end is None else end for end in (found["low"], found["high"]))
    return 100 * found["value"], 100 * low, 100 * high


def nats(name: str) -> Callable[[Report], tuple[float, float, float] | None]:
    return lambda row: None if row[name] is None else (row[name]["value"], row[name]["low"], row[name]["high"])


def draw_figures(report: Report, folder: Path) -> Iterator[str]:
    """See `draw_each`."""
    draws: dict[str, Callable[[Report], Any]] = {"pareto": draw_pareto}
    draws |= {measure.file: partial(draw_grid, measure=measure) for measure in measures_of(report)}
    return draw_each(draws, report, folder)


def draw_pareto(report: Report) -> Any:
    k = report["ks"][-1]
    rows = [row for row in report["table"] if row["scores"]]
    if not rows:
        raise NotDrawn("no cell has validation tasks")
    if k == 1:
        raise NotDrawn("it needs a k above 1")
    subtitle = f"{len(report['tasks'][VALIDATION])} validation tasks; bars: {INTERVAL}"
    made, axes = figure(4.4, f"Solved in every one of {k} samples, over solved in one", subtitle)
    for row in rows:
        look = {"color": GREY, "marker": "o", "label": "cell", "zorder": 2}
        if row["cell"] in report["stable"]:
            look |= {"color": GREEN, "label": "stable cell", "zorder": 3}
        if row["baseline"]:
            look |= {"color": RED, "marker": "^", "label": "baseline: plain fine-tuning", "zorder": 4}
        if row["cell"] == report["chosen"]:
            look |= {"color": BLUE, "marker": "D", "label": f"chosen: {row['cell']}", "zorder": 5}
        marked = row["baseline"] or row["cell"] == report["chosen"]
        (x, *ends_x), (y, *ends_y) = (percents(row, i) or NOTHING for i in (0, -1))
        around = {"xerr": sides(x, *ends_x), "yerr": sides(y, *ends_y), "elinewidth": 1.2 if marked else 0.5}
        axes.errorbar(x, y, linestyle="none", alpha=1 if marked else 0.6, **around, **look)
    by_name = {row["cell"]: row for row in rows}
    points = [[(percents(by_name[name], i) or NOTHING)[0] for i in (0, -1)] for name in report["front"]]
    axes.plot(*zip(*points, strict=True), color="black", linewidth=1, linestyle=":", label="front", zorder=1)
    axes.set(xlabel="Pass@1, %", ylabel=f"Pass@{k}({k}), %")
    legend_below(made, [axes])
    return made


def sides(value: float, low: float, high: float) -> list[list[float]]:
    """As error bars take them; an interval need not hold the mean of few."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def draw_grid(report: Report, measure: Measure) -> Any:
    grid = {key: values for key, values in report["grid"].items() if len(values) > 1}
    if not grid:
        raise NotDrawn("the grid has one cell")
    if not any(measure.of(row) for row in report["table"] if not row["baseline"]):
        raise NotDrawn(f"no cell has a number of {measure.label}")
    return draw_line(report, measure, grid) if len(grid) == 1 else draw_heat(report, measure, grid)


def draw_line(report: Report, measure: Measure, grid: Mapping[str, Sequence[Any]]) -> Any:
    ((key, values),) = grid.items()
    rows = {text(row["values"][key]): row for row in report["table"] if not row["baseline"]}
    found = [(value, measure.of(rows[text(value)])) for value in values]
    found = [(value, numbers) for value, numbers in found if numbers]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if numeric:
        found.sort(key=lambda pair: pair[0])
    xs = [value if numeric else text(value) for value, _ in found]
    middle, low, high = zip(*(numbers for _, numbers in found if numbers), strict=True)
    made, axes = figure(3.2, f"{measure.label}, over {key}", about(report, measure))
    axes.plot(xs, middle, "o-", color=BLUE)
    axes.fill_between(xs, low, high, color=BLUE, alpha=0.15, linewidth=0)
    if len(xs) == 1:  # a band of one point would not be seen
        axes.plot([xs[0]] * 2, [low[0], high[0]], color=BLUE, alpha=0.4)
    if of_baseline := baseline_of(report, measure):
        axes.axhline(of_baseline[0], color=RED, linestyle="--", label=BASELINE)
        axes.legend()
    if numeric and is_wide(values):
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=measure.label)
    return made


def draw_heat(report: Report, measure: Measure, grid: Mapping[str, Sequence[Any]]) -> Any:
    """The first key downwards, the second across, a panel for each combination of the others."""
    from matplotlib.colors import LogNorm, Normalize

    (down, across, *others), shorts = grid, dict(zip(grid, short_keys(grid), strict=True))
    rows = {tuple(text(row["values"][key]) for key in grid): row for row in report["table"] if not row["baseline"]}
    found = [numbers[0] for row in rows.values() if (numbers := measure.of(row))]
    scale = (LogNorm if is_wide(found) else Normalize)(min(found), max(found))
    panels = list(product(*(grid[key] for key in others)))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    height = (CELL * len(grid[down]) + 0.75) * lines
    subtitle = f"{about(report, measure)}; framed: chosen, *: stable"
    made, axes_of = figure(height, measure.label, subtitle, nrows=lines, ncols=columns, squeeze=False)
    for axes in axes_of.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(axes_of.flat, panels, strict=False):
        axes.set_title(", ".join(f"{shorts[key]} {text(value)}" for key, value in zip(others, panel, strict=True)))
        for (y, first), (x, second) in product(enumerate(grid[down]), enumerate(grid[across])):
            draw_cell(report, measure, axes, x, y, rows.get(tuple(map(text, (first, second, *panel)))), scale)
        axes.set(xlim=(-0.5, len(grid[across]) - 0.5), ylim=(len(grid[down]) - 0.5, -0.5))
        axes.set_xticks(range(len(grid[across])), map(text, grid[across]))
        axes.set_yticks(range(len(grid[down])), map(text, grid[down]))
        axes.set(xlabel=shorts[across], ylabel=shorts[down])
        axes.grid(False)
        axes.tick_params(length=0)
    return made


def draw_cell(
    report: Report, measure: Measure, axes: Any, x: int, y: int, row: Report | None, scale: Callable[[float], float]
) -> None:
    """A square of the value's colour with the value in it; one without a value is hatched."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    numbers = measure.of(row) if row else None
    if row is None or numbers is None:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor=GREY, hatch="///", linewidth=0))
        return
    share = float(scale(numbers[0]))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colormaps["viridis"](share), linewidth=0))
    if row["cell"] == report["chosen"]:
        axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=RED, linewidth=2, zorder=3))
    star = "*" if row["cell"] in report["stable"] else ""
    colour = "black" if share > 0.55 else "white"
    axes.text(x, y, f"{numbers[0]:{measure.form}}{star}", ha="center", va="center", fontsize=8, color=colour)


def about(report: Report, measure: Measure) -> str:
    parts = [f"{len(report['seeds'])} seed{'' if len(report['seeds']) == 1 else 's'}"]
    if VALIDATION in report["tasks"]:
        parts.insert(0, f"{len(report['tasks'][VALIDATION])} validation tasks")
    if found := baseline_of(report, measure):
        low, high = (f"{end:{measure.form}}" for end in found[1:])
        parts.append(f"baseline {found[0]:{measure.form}} [{low}, {high}] ({measure.spread})")
    return "; ".join(parts)


def baseline_of(report: Report, measure: Measure) -> tuple[float, float, float] | None:
    return next((measure.of(row) for row in report["table"] if row["baseline"]), None)


def is_wide(values: Sequence[float]) -> bool:
    """Better seen on a logarithmic scale."""
    return min(values) > 0 and max(values) / min(values) >= MANY


def text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
