"""The figures of a reproduction's scores. Each takes its report and gives a matplotlib figure.

A model looks the same in all of them: colour, marker and hatch by its place in the report, so that print without colour
tells them apart. What the paper leaves open (which models share a figure, axes, the size of a group) is ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ibft.evaluation.score_plots import GREY, LOOKS, PUBLISHED, draw_pair, figure
from ibft.reproduce.claims import started_from
from ibft.reproduce.over_seeds import (
    Passes,
    Report,
    Scored,
    end_cells,
    ks_of,
    main_temperature,
    passes_of,
    score,
    score_name,
    temperatures_of,
)
from ibft.reproduce.sentences import quoted

Look = dict[str, Any]
Temperatures = Mapping[str, float | None]  # of each suite
FIXED = {"base": LOOKS[5], "FT": LOOKS[1], "IB-FT": LOOKS[0]}
INTERVAL = "95 % interval over problems and seeds"
BANDS = ("FT", "IB-FT")  # ten bands on each other show nothing
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


class NotDrawn(Exception):
    """Why a figure cannot be drawn from this report."""


def look_of(report: Report) -> dict[str, Look]:
    """Of each model; those after the sixth are hollow and dashed."""
    spare = iter([(*LOOKS[i], hollow) for hollow in (False, True) for i in range(len(LOOKS))] * 9)
    looks = {}
    for model in report["models"]:
        name = model["name"]
        colour, marker, hollow = (*FIXED[name], False) if name in FIXED else next(spare)
        while name not in FIXED and not hollow and (colour, marker) in FIXED.values():
            colour, marker, hollow = next(spare)
        looks[name] = {
            "color": colour, "marker": marker, "markerfacecolor": "white" if hollow else colour,
            "linestyle": "--" if hollow else "-",
        }  # fmt: skip
    return looks


def main_temperatures(report: Report) -> Temperatures:
    return {suite: main_temperature(report, suite) for suite in report["suites"]}


def measured(
    report: Report, models: Sequence[str], temperatures: Temperatures, *, least: int = 1
) -> dict[str, dict[str, Passes]]:
    """suite -> model -> what was counted. Raises NotDrawn where no suite has so many of the models."""
    found = {
        suite: {name: passes for name in models if (passes := passes_of(report, name, suite, temperature))}
        for suite, temperature in temperatures.items()
    }
    found = {suite: by_model for suite, by_model in found.items() if len(by_model) >= least}
    if not found:
        of = "any model" if list(models) == names_of(report) else f"{least} of {', '.join(map(quoted, models))}"
        raise NotDrawn(f"no suite has samples of {of}")
    return found


def largest_k(found: Mapping[str, Mapping[str, Passes]]) -> int:
    """Of the paper's, that all have the samples for. Raises NotDrawn: only k = 1."""
    k = ks_of(min(passes.n for by_model in found.values() for passes in by_model.values()))[-1]
    if k == 1:
        raise NotDrawn("it needs more than one sample a problem")
    return k


def suite_panels(found: Mapping[str, Any], height: float, title: str, subtitle: str) -> tuple[Any, dict[str, Any]]:
    """(figure, suite -> axes): a panel a suite, two in a row."""
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    made, grid = figure(height * rows, title, subtitle, nrows=rows, ncols=columns, squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    panels = dict(zip(found, grid.flat, strict=False))
    if len(found) > 1:
        for suite, axes in panels.items():
            axes.set_title(suite)
    return made, panels


def about(report: Report, found: Mapping[str, Mapping[str, Passes]], temperatures: Temperatures, *more: str) -> str:
    """What is fixed in a figure, in one line."""
    problems = {suite: len(report["suites"][suite]["tasks"]) for suite in found}
    parts = [", ".join(f"{suite} ({count} problems)" for suite, count in problems.items())]
    at = dict.fromkeys(f"{t:g}" for suite in found if (t := temperatures[suite]) is not None)
    if at:
        parts.append(f"temperature {', '.join(at)}")
    return "; ".join([*parts, *more])


def legend_below(made: Any, axes: Sequence[Any], columns: int = 3) -> None:
    """One for all panels, each name once."""
    entries = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    made.legend(entries.values(), entries.keys(), loc="outside lower left", ncols=columns, columnspacing=1.4)


def names_of(report: Report) -> list[str]:
    return [model["name"] for model in report["models"]]


# --- the figures ----------------------------------------------------------------------------------


def draw_scatter(report: Report) -> Any:
    temperatures = main_temperatures(report)
    found = measured(report, names_of(report), temperatures)
    k = largest_k(found)
    looks = look_of(report)
    subtitle = about(report, found, temperatures, f"{INTERVAL}; arrow: FT → IB-FT")
    made, panels = suite_panels(found, 4.6, f"Solved in every one of {k} samples, over solved in one", subtitle)
    for suite, axes in panels.items():
        draw_published(axes, suite, k)
        places = {}
        for name, passes in found[suite].items():
            x, y = score(passes, [(1, 1), (k, k)])
            places[name] = place = 100 * x.value, 100 * y.value
            look = looks[name] | {"linestyle": "none"}
            axes.errorbar(*place, xerr=reach(x), yerr=reach(y), fmt="none", ecolor=look["color"], alpha=0.35, zorder=2)
            axes.plot(*([value] for value in place), label=name, clip_on=False, zorder=4, **look)
        if {"FT", "IB-FT"} <= places.keys():
            arrow = {"arrowstyle": "->", "color": "#333333", "linewidth": 1.3, "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", places["IB-FT"], places["FT"], arrowprops=arrow, zorder=3)
        axes.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, zorder=1)
        axes.set(xlabel="Pass@1, %", ylabel=f"Pass@{k}({k}), %", xlim=(0, 100), ylim=(0, 100))
    legend_below(made, made.axes, 2)
    return made


def draw_published(axes: Any, suite: str, k: int) -> None:
    """The paper's points, of its own suite alone where this is it."""
    for (name, points), marker in zip(PUBLISHED.items(), ("s", "^"), strict=True):
        ours = suite == f"VerilogEval {name}"
        if k not in points or (suite.startswith("VerilogEval ") and not ours):
            continue
        label = f"paper, VerilogEval {name}: FT → IB-FT"
        (x0, x1), (y0, y1) = points[1], points[k]
        draw_pair(axes, (x0, y0), (x1, y1), "#999999", marker, label if ours else f"{label} (other models and suite)")


def reach(scored: Scored) -> list[list[float]] | None:
    """From the value to both ends of its interval, in percent; None without one."""
    if scored.low is None or scored.high is None:
        return None
    return [[100 * max(0.0, scored.value - scored.low)], [100 * max(0.0, scored.high - scored.value)]]


def draw_all_models(report: Report) -> Any:
    temperatures = main_temperatures(report)
    found = measured(report, names_of(report), temperatures)
    k = largest_k(found)
    bands = f"{INTERVAL} of {' and '.join(BANDS)}, as band; the others': table.csv"
    subtitle = about(report, found, temperatures, bands)
    looks = look_of(report)
    made, panels = suite_panels(found, 4.4, f"At least m of {k} samples pass", subtitle)
    for suite, axes in panels.items():
        for name, passes in found[suite].items():
            draw_line(axes, name, passes, k, looks[name], band=name in BANDS)
        set_m_axes(axes, k)
    legend_below(made, made.axes)
    return made


def draw_temperatures(report: Report) -> Any:
    temperatures = temperatures_of(report)
    by_temperature = {}
    for temperature in temperatures:
        try:
            by_temperature[temperature] = measured(
                report, ["FT", "IB-FT"], dict.fromkeys(report["suites"], temperature)
            )
        except NotDrawn:
            continue
    if not by_temperature:
        raise NotDrawn("no suite has samples of FT or IB-FT")
    k = min(largest_k(found) for found in by_temperature.values())
    suites = list(dict.fromkeys(suite for found in by_temperature.values() for suite in found))
    looks = look_of(report)
    made, grid = figure(
        2.9 * len(suites), f"At least m of {k} samples pass, by temperature",
        "; ".join(f"{suite} ({len(report['suites'][suite]['tasks'])} problems)" for suite in suites)
        + f"; band: {INTERVAL}; axes ours",
        nrows=len(suites), ncols=len(by_temperature), squeeze=False, sharey=True,
    )  # fmt: skip
    for row, suite in zip(grid, suites, strict=True):
        for axes, (temperature, found) in zip(row, by_temperature.items(), strict=True):
            for name, passes in found.get(suite, {}).items():
                draw_line(axes, name, passes, k, looks[name])
            set_m_axes(axes, k)
            axes.set_title("no temperature" if temperature is None else f"temperature {temperature:g}")
            axes.set_ylabel("")
        row[0].set_ylabel(f"{suite}\nPass@{k}(m), %")
    legend_below(made, made.axes)
    return made


def draw_line(axes: Any, name: str, passes: Passes, k: int, look: Look, *, band: bool = True) -> None:
    """Pass@k(m) over m."""
    ms = range(1, k + 1)
    found = score(passes, [(k, m) for m in ms])
    axes.plot(ms, [100 * one.value for one in found], label=name, clip_on=False, **look)
    if band and found[0].low is not None:
        low, high = ([100 * getattr(one, end) for one in found] for end in ("low", "high"))
        axes.fill_between(ms, low, high, color=look["color"], alpha=0.12, linewidth=0)


def set_m_axes(axes: Any, k: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="m", ylabel=f"Pass@{k}(m), %", ylim=(0, 102), xlim=(0.8, k + 0.2))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))


def draw_dropped(report: Report) -> Any:
    dropped = [name for name in names_of(report) if name.endswith("dropped")]
    if not dropped:
        raise NotDrawn("no model was trained without a part of the data")
    return draw_bars(
        report, ["FT", *dropped], "Fine-tuning without the most memorised rows, and without random ones", "axes ours"
    )


def draw_starts(report: Report) -> Any:
    others = [started_from(report, tuning, start) for start in ("perturbed", "twin") for tuning in ("FT", "IB-FT")]
    models = [name for name in ("FT", "IB-FT", *others) if name]
    if not any(others):
        raise NotDrawn("no model was trained from another start")
    return draw_bars(
        report, models, "Fine-tuning from a base that has memorised, and from other starts", "a figure of ours"
    )


def draw_bars(report: Report, models: Sequence[str], title: str, ours: str) -> Any:
    """Pass@1 and Pass@k(k), a bar a model."""
    temperatures = main_temperatures(report)
    found = measured(report, models, temperatures, least=2)
    absent = [name for name in models if not any(name in by_model for by_model in found.values())]
    subtitle = about(
        report, found, temperatures, f"{INTERVAL}; a dot a seed; {ours}",
        *([f"not measured: {', '.join(absent)}"] if absent else []),
    )  # fmt: skip
    looks = look_of(report)
    made, panels = suite_panels(found, 3.6, title, subtitle)
    for suite, axes in panels.items():
        by_model = found[suite]
        cells = end_cells(min(passes.n for passes in by_model.values()))
        width = 0.84 / len(by_model)
        for i, (name, passes) in enumerate(by_model.items()):
            colour = looks[name]["color"]
            for x, scored in enumerate(score(passes, cells)):
                at, value = x - 0.42 + (i + 0.5) * width, 100 * scored.value
                look = {"edgecolor": colour, "linewidth": 1.2, "hatch": HATCHES[i % len(HATCHES)]}
                axes.bar(at, value, width * 0.92, color="white", label=name, **look)
                axes.bar(at, value, width * 0.92, color=colour, alpha=0.3, linewidth=0)
                if ends := reach(scored):
                    axes.errorbar(at, value, yerr=ends, fmt="none", ecolor="#222222", capsize=3, linewidth=1.2)
                of_seeds = [100 * one for one in scored.by_seed]
                axes.plot([at + 0.2 * width] * len(of_seeds), of_seeds, ".", color=GREY, markersize=4)
        axes.set_xticks(range(len(cells)), [score_name(cell) for cell in cells])
        axes.set(ylabel="%", ylim=(0, 102))
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
    legend_below(made, made.axes, 2)
    return made
