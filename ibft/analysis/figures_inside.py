"""The figures of what a reproduction's models know by heart, of where rows lie in their hidden states, of how their
losses fall. Each takes the report and gives a matplotlib figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ibft.analysis.figures_scores import NotDrawn, legend_below, names_of
from ibft.evaluation.score_plots import LOOKS, figure
from ibft.reproduce.claims import barrier_claims, decile_rows, estimates_of, group_pairs
from ibft.reproduce.over_seeds import Report, mean_over_seeds
from ibft.reproduce.separation import datasets_of, k_of, scores_on, separate

BARS = 30
DASHES = ("-", "--", "-.", ":", (0, (1, 1)), (0, (6, 1)))
TOLD = ("memorised", "rest", "fine-tuning data")
METRICS = {
    "l2": "L2", "l2_normalised": "L2 / norm", "angle": "angle, °", "angle_centred": "centred angle, °",
}  # fmt: skip
LAYERS_SHOWN = 3


def draw_densities(report: Report) -> Any:
    """The subtitle says whether there is a barrier, and how far apart the groups are."""
    groups = density_groups(report)
    values = [value for _, scores in groups for value in scores]
    edges = np.histogram_bin_edges(values, BARS)
    lines = [barrier_claims(report)[0]["text"]]
    apart = {pair: separate(*(scores_on(report, "base", data) for data in pair)) for pair in group_pairs(report)}
    lines += [
        f"base, {first} against {second}: AUC {found.auc:.3f} [{found.low:.3f}, {found.high:.3f}], overlap coefficient "
        f"{found.overlap:.2f}"
        for (first, second), found in apart.items() if found
    ]  # fmt: skip
    made, axes = figure(3.6, f"What is known by heart: Min-{k_of(report):g} % of each row", "\n".join(lines))
    for (name, scores), (colour, _), style in zip(
        groups, LOOKS, ("-", "--", "-.", ":", (0, (1, 1)), "-"), strict=False
    ):
        density, _ = np.histogram(scores, edges, density=True)
        axes.stairs(density, edges, color=colour, linestyle=style, linewidth=1.8, label=f"{name} ({len(scores):,})")
        axes.stairs(density, edges, color=colour, fill=True, alpha=0.1)
    axes.set(xlabel=f"Min-{k_of(report):g} %, nats: lower = more memorised", ylabel="density")
    axes.legend()
    return made


def density_groups(report: Report) -> list[tuple[str, list[float]]]:
    """(name, scores): the base on each data set, FT with all its seeds on the fine-tuning data. Raises NotDrawn."""
    groups = [(f"base on {data}", scores_on(report, "base", data)) for data in datasets_of(report)]
    if not any(scores for _, scores in groups):
        raise NotDrawn("no Min-K% scores of the base")
    tuned = [value for data in TOLD for value in scores_on(report, "FT", data)]
    groups.append(("FT on the fine-tuning data, all seeds", tuned))
    return [(name, scores) for name, scores in groups if scores]


def draw_geometry(report: Report) -> Any:
    """A dot a seed; the base's interval is the grey band."""
    layers = sorted({row["layer"] for row in report["geometry"]})
    shown = layers if len(layers) <= LAYERS_SHOWN else [layers[0], layers[len(layers) // 2], layers[-1]]
    models = [name for name in names_of(report) if any(row["model"] == name for row in report["geometry"])]
    if not models:
        raise NotDrawn("no hidden states were measured")
    subtitle = "estimates; a dot a seed; line and band: the base and its 95 % interval over rows"
    if shown != layers:
        subtitle += f"; layers {', '.join(map(str, shown))} of {len(layers)}"
    made, grid = figure(
        0.9 + 2 * (0.5 + 0.3 * len(models)), "The most against the least memorised rows, in the hidden states",
        f"{subtitle}\naxes ours; how many rows are the most and the least memorised is the recipe's share",
        nrows=2, ncols=2, sharey=True,
    )  # fmt: skip
    for axes, (metric, name) in zip(grid.flat, METRICS.items(), strict=True):
        for i, layer in enumerate(shown):
            colour, marker = LOOKS[i]
            shift = 0.5 * (i + 0.5) / len(shown) - 0.25
            draw_base(axes, report, layer, metric, colour)
            for y, model in enumerate(models):
                values = [value for value in estimates_of(report, model, layer, metric).values() if value is not None]
                axes.plot(
                    values, [y + shift] * len(values), marker, color=colour, alpha=0.75, markersize=4.5,
                    label=f"layer {layer}",
                )  # fmt: skip
        axes.set(xlabel=name)
        axes.margins(x=0.08)
        axes.set_yticks(range(len(models)), models)
        axes.tick_params(axis="y", length=0)
    grid[0, 0].set_ylim(len(models) - 0.5, -0.5)
    legend_below(made, made.axes)
    return made


def draw_base(axes: Any, report: Report, layer: int, metric: str, colour: str) -> None:
    for row in report["geometry"]:
        found = row.get(metric) or {}
        if (row["model"], row["layer"]) == ("base", layer) and found.get("estimate") is not None:
            axes.axvline(found["estimate"], color=colour, linewidth=1, alpha=0.6, zorder=1)
            if found.get("low") is not None and found.get("high") is not None:
                axes.axvspan(found["low"], found["high"], color=colour, alpha=0.08, linewidth=0, zorder=0)


def draw_deciles(report: Report) -> Any:
    """Logarithmic where the losses are of very different sizes."""
    curves = {name: decile_curves(report, name) for name in names_of(report)}
    curves = {name: curve for name, curve in curves.items() if len(curve[0]) > 1}
    if not curves:
        raise NotDrawn("no cross-entropy by decile was measured over training")
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.88, 10))
    values = [loss for _, losses in curves.values() for loss in losses.flat if not np.isnan(loss)]
    made, grid = figure(
        3.6, "How the cross-entropy falls, by how much the base has memorised of a row",
        "deciles of the fine-tuning rows by the base's Min-K%, 0 = most memorised; mean over seeds; a figure of ours",
        ncols=len(curves), squeeze=False, sharey=True,
    )  # fmt: skip
    for axes, (model, (steps, losses)) in zip(grid[0], curves.items(), strict=True):
        for decile in range(10):
            marker = LOOKS[decile % len(LOOKS)][1]
            axes.plot(steps, losses[:, decile], marker=marker, markersize=4, color=colours[decile], label=str(decile))
        axes.set_title(model)
        axes.set(xlabel="step")
    if values and min(values) > 0 and max(values) > 20 * min(values):
        grid[0, 0].set_yscale("log")
        grid[0, 0].yaxis.set_major_formatter("{x:g}")
    grid[0, 0].set_ylabel("CE, nats a token")
    legend_below(made, made.axes, 10)
    return made


def decile_curves(report: Report, model: str) -> tuple[Sequence[int], Any]:
    """(steps, [steps, 10] means over seeds); NaN where there is none."""
    rows = decile_rows(report, model)
    steps = sorted({row["step"] for row in rows})
    losses = np.full((len(steps), 10), np.nan)
    for i, step in enumerate(steps):
        for decile in range(10):
            found = mean_over_seeds({row["seed"]: row["ce"][decile] for row in rows if row["step"] == step})
            if found:
                losses[i, decile] = found.value
    return steps, losses
