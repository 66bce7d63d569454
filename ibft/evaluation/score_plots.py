"""The figures of a report of `evaluate score`, as SVG. The bytes depend on the report and on matplotlib's version only.

pass_at_k_m.svg   Pass@k(m) over m, a line a k, a panel a temperature; the baseline's are dashed
fig1b.svg         as Fig. 1(b) of arXiv 2510.16022: Pass@k(k) over Pass@1, with the paper's points on VerilogEval v1
"""

import importlib.util
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ibft.errors import DataError, SetupError

Report = Mapping[str, Any]

STYLE: Any = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.labelcolor": "#333333",
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "xtick.color": "#333333", "ytick.color": "#333333",
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.8, "lines.markersize": 5.5, "svg.fonttype": "none", "svg.hashsalt": "ibft-fast",
}  # fmt: skip
WIDTH = 7.3  # inches of 72 points: 700 px in a browser
GREY = "#767676"
# Okabe and Ito's colours; markers too, so that print without colour tells the lines apart
LOOKS = [("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#000000", "s")]

# Read from Fig. 1(b), in percent, each +-0.2: OriGen's data, VerilogEval v1; (fine-tuning, IB-FT) by k of Pass@k(k).
PUBLISHED = {
    "Machine": {1: (67.9, 75.8), 5: (54.9, 71.4), 10: (49.6, 69.2)},
    "Human": {1: (42.6, 52.0), 5: (31.3, 49.2), 10: (27.6, 48.0)},
}


def need_matplotlib(what: str = "--plots") -> None:
    """Raises SetupError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SetupError(f"{what} needs matplotlib: pip install matplotlib")


def draw_plots(report: Report, folder: str) -> list[str]:
    """Draws both; a line for each says where it is, or why it is not drawn.

    Raises:
        DataError: the folder cannot be written.
    """
    lines = []
    for name, draw in (("pass_at_k_m.svg", draw_triangle), ("fig1b.svg", draw_scatter)):
        path = Path(folder) / name
        if name == "fig1b.svg" and max(report["ks"]) == 1:
            lines.append(f"{path} is not drawn: it needs a k above 1")
            continue
        save(draw, report, path)
        lines.append(f"plot: {path}")
    return lines


def save(draw: Callable[[Report], Any], report: Report, *paths: Path) -> None:
    """Draws once and writes each path, as its ending says. The bytes depend on no clock and no matplotlibrc.

    Raises:
        DataError: a file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc is the machine's, not the report's
        matplotlib.rcParams.update(STYLE)
        made = draw(report)
        for path in paths:
            about = {"Date": None, "Creator": "ibft-fast"} if path.suffix == ".svg" else {}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.savefig(path, dpi=150, metadata=about)
            except OSError as error:
                raise DataError(f"{path}: {error.strerror or error}") from error


def figure(height: float, title: str, subtitle: str, **grid: Any) -> tuple[Any, Any]:
    """(figure, axes) with room for the title and the lines of the subtitle. height: of the axes, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = [line for part in subtitle.split("\n") for line in textwrap.wrap(part, CHARACTERS)]
    head = HEAD + LINE * (len(lines) - 1)
    below = ConstrainedLayoutEngine(rect=(0, 0, 1, height / (head + height)), w_pad=0.08, h_pad=0.06)
    made = Figure(figsize=(WIDTH, head + height), layout=below)
    first, second = (1 - below / (head + height) for below in (0.07, 0.27))
    made.text(0.012, first, title, va="top", fontsize=10.5, weight="bold", color="#222222")
    made.text(0.012, second, "\n".join(lines), va="top", fontsize=8, color=GREY, linespacing=1.25)
    return made, made.subplots(**grid)


HEAD, LINE = 0.5, 0.145  # inches
CHARACTERS = 116  # of a subtitle's line


def draw_triangle(report: Report) -> Any:
    from matplotlib.ticker import MaxNLocator

    panels = report["verdicts"]["temperatures"]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    subtitle = f"{problems_of(report)}; band: {report['bootstrap']['level']:.0%} interval over problems"
    if report["baseline"]:
        subtitle += "; dashed: baseline"
    made, grid = figure(
        3.4 * rows, "At least m of k samples pass", subtitle, nrows=rows, ncols=columns, squeeze=False, sharey=True
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        theirs = compared_with(report, panel["temperature"])
        for i, k in enumerate(report["ks"]):
            colour, marker = LOOKS[i % len(LOOKS)]
            look = {"color": colour, "marker": marker, "markevery": max(1, k // 20)}
            scores = of_k(panel, k)
            ms = [score["m"] for score in scores]
            axes.plot(ms, percents(scores, "value"), label=f"k = {k}", **look)
            if scores[0]["low"] is not None:
                if k == 1:  # a band of one point would not be seen
                    axes.plot([1, 1], [100 * scores[0]["low"], 100 * scores[0]["high"]], color=colour, alpha=0.4)
                axes.fill_between(
                    ms, percents(scores, "low"), percents(scores, "high"), color=colour, alpha=0.12, linewidth=0
                )
            if theirs:
                axes.plot(ms, percents(of_k(theirs, k), "value"), linestyle="--", markerfacecolor="white", **look)
        axes.set(xlabel="m", ylabel="Pass@k(m), %", ylim=(0, 102))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=11, integer=True))
        axes.tick_params(labelleft=True)
        if panel["temperature"] is not None:
            axes.set_title(f"temperature {panel['temperature']:g}")
        axes.legend()
    return made


def draw_scatter(report: Report) -> Any:
    """Ours hollow for the baseline and filled for the verdicts, as the paper's points for fine-tuning and IB-FT."""
    k = 10 if 10 in report["ks"] else max(report["ks"])
    suite = report["verdicts"]["suite"]
    published = suite == "verilogeval-v1" and all(k in points for points in PUBLISHED.values())
    subtitle = problems_of(report)
    if published or report["baseline"]:
        subtitle += "; hollow: fine-tuning, or the baseline; filled: IB-FT, or the verdicts"
    made, axes = figure(4.6, f"Solved in every one of {k} samples, over solved in one", subtitle)
    if published:
        for (name, points), marker in zip(PUBLISHED.items(), ("s", "^"), strict=True):
            (x0, x1), (y0, y1) = points[1], points[k]
            draw_pair(axes, (x0, y0), (x1, y1), GREY, marker, f"paper, {name}: FT → IB-FT (read from the figure, ±0.2)")
    panels = report["verdicts"]["temperatures"]
    for i, panel in enumerate(panels):
        colour, marker = LOOKS[i % len(LOOKS)]
        theirs = compared_with(report, panel["temperature"])
        label = "baseline → verdicts" if theirs else "verdicts"
        if panel["temperature"] is not None:
            label += f", temperature {panel['temperature']:g}"
        start = place_of(report["baseline"], theirs, k) if theirs else None
        draw_pair(axes, start, place_of(report["verdicts"], panel, k), colour, marker, f"ours, {label}")
    axes.set(xlabel="Pass@1, %", ylabel=f"Pass@{k}({k}), %", xlim=(0, 100), ylim=(0, 100))
    axes.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, zorder=1)
    axes.text(
        98, 97, f"Pass@{k}({k}) = Pass@1", fontsize=8, color=GREY, ha="right", va="top",
        rotation=45, rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    axes.legend(loc="upper left")
    return made


def draw_pair(
    axes: Any, start: tuple[float, float] | None, end: tuple[float, float], colour: str, marker: str, label: str
) -> None:
    """An arrow from a hollow to a filled point; without a start the filled point alone."""
    if start:
        axes.plot(*([value] for value in start), marker, color=colour, markerfacecolor="white", clip_on=False, zorder=3)
        arrow = {"arrowstyle": "->", "color": colour, "linewidth": 1.3, "shrinkA": 4, "shrinkB": 4}
        axes.annotate("", end, start, arrowprops=arrow)
    axes.plot(*([value] for value in end), marker, color=colour, label=label, clip_on=False, zorder=3)


def compared_with(report: Report, temperature: float | None) -> Any:
    """What the report says of the baseline at the temperature that this one is compared with, or None."""
    for pair in report["difference"] or ():
        if pair["temperature"] == temperature:
            return next(
                panel
                for panel in report["baseline"]["temperatures"]
                if panel["temperature"] == pair["baseline_temperature"]
            )
    return None


def of_k(panel: Report, k: int) -> list[Any]:
    return [score for score in panel["scores"] if score["k"] == k]


def percents(scores: Sequence[Report], name: str) -> list[float]:
    return [100 * score[name] for score in scores]


def place_of(section: Report, panel: Report, k: int) -> tuple[float, float]:
    """(Pass@1, Pass@k(k)) in percent. Pass@1 from the counts: it need not be among the ks."""
    shares = [row["c"] / row["n"] for row in section["problems"] if row["temperature"] == panel["temperature"]]
    return 100 * sum(shares) / len(shares), 100 * of_k(panel, k)[-1]["value"]


def problems_of(report: Report) -> str:
    verdicts = report["verdicts"]
    count = f"{verdicts['temperatures'][0]['problems']} problems"
    return f"{verdicts['suite']}, {count}" if verdicts["suite"] else count
