"""The figures, from the committed rows alone. Imports no torch, and matplotlib only to draw.

    python -m benchmarks.report.plots [--out DIR]       draw results/<device>/plots/*.svg (or DIR/<device>/*.svg)
    python -m benchmarks.report.plots --check           name the figures that are stale; exit 1 where there are any

They lie beside the rows that they show, so that $IBFT_RESULTS moves both and a device's folder goes as a whole. Each
SVG carries a digest of its rows and of this file (metadata, description): what has another one is stale. The bytes
depend on nothing else but matplotlib's version. A figure without rows is not drawn, and a line says so.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import result_rows
from benchmarks.report.tables import groups, main_cases, ours_of, peers, threads
from benchmarks.report.targets import OURS, Row, folders, number, pick, positive, rows_of

STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.labelcolor": "#333333",
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7, "axes.axisbelow": True, "xtick.color": "#333333", "ytick.color": "#333333",
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False, "legend.fontsize": 8.5,
    "lines.linewidth": 1.8, "lines.markersize": 5.5, "svg.fonttype": "none", "svg.hashsalt": "ibft-fast",
}  # fmt: skip
WIDTH = 7.3  # inches of 72 points: 700 px in a browser
GREY = "#767676"
# Okabe and Ito's colours; what is named here looks the same in every figure, the rest take what is left, in order.
LOOKS = {
    "ours": ("#0072B2", "o"), "eager": (GREY, "s"), "released": ("#D55E00", "^"), "torch.compile": ("#009E73", "D"),
    "F.linear_cross_entropy": ("#CC79A7", "v"), "liger": ("#E69F00", "P"), "cut-cross-entropy": ("#56B4E9", "X"),
    "hf": ("#D55E00", "^"), "unsloth": ("#009E73", "D"),
}  # fmt: skip
SPARE = [("#000000", "*"), ("#E69F00", "<"), ("#56B4E9", ">"), ("#CC79A7", "h"), ("#009E73", "d"), (GREY, "p")]


def look_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each series: of ours without the bottleneck those of ours, but dashed."""
    looks, spare = {}, iter(SPARE * 5)
    for name in dict.fromkeys(names):
        provider, _, rest = name.partition(" (")
        colour, marker = LOOKS[provider] if provider in LOOKS and (not rest or WITHOUT in rest) else next(spare)
        dashed = WITHOUT in rest
        looks[name] = {
            "color": colour, "marker": marker, "linestyle": "--" if dashed else "-",
            "markerfacecolor": "white" if dashed else colour, "zorder": 3 if provider == OURS else 2,
        }  # fmt: skip
    return looks


WITHOUT = "no bottleneck"


def series_of(row: Row, rows: Sequence[Row]) -> str:
    """The provider, with what else tells its row from the others'."""
    told = []
    if "alpha" in row and not positive(row["alpha"]):
        told.append(WITHOUT)
    if "layout" in row and len({other["layout"] for other in rows}) > 1:
        told.append(row["layout"])
    return row["provider"] + (f" ({', '.join(told)})" if told else "")


NAMES = {"hf": "transformers + PEFT", "unsloth": "Unsloth", "released": "released way"}


def shown_name(series: str) -> str:
    provider, bracket, rest = series.partition(" (")
    return NAMES.get(provider, provider) + bracket + rest


def figure(
    rows: Sequence[Row], height: float, title: str, subtitle: str, *, named: int = 0, **grid: Any
) -> tuple[Any, Any]:
    """(figure, axes); at its top title and device, below them what is fixed, then room for a legend of so many names.
    height: of the axes, in inches."""
    from matplotlib.figure import Figure

    head = HEAD + LINE * -(-named // IN_A_LINE)
    made = Figure(figsize=(WIDTH, head + height), layout="constrained")
    made.get_layout_engine().set(rect=(0, 0, 1, height / (head + height)), w_pad=0.08, h_pad=0.06)
    first, second = (1 - below / (head + height) for below in (0.07, 0.27))
    grey = {"fontsize": 8, "color": GREY, "va": "top"}
    made.text(0.012, first, title, va="top", fontsize=10.5, weight="bold", color="#222222")
    made.text(0.99, first, device_of(rows), ha="right", **grey)
    made.text(0.012, second, subtitle, **grey)
    return made, made.subplots(**grid)


HEAD, LINE, IN_A_LINE = 0.5, 0.2, 4


def legend(made: Any, entries: Sequence[tuple[Any, str]]) -> None:
    """In the room that `figure` left."""
    made.legend(
        *zip(*entries, strict=True), loc="upper left", bbox_to_anchor=(0.005, 1 - (HEAD - 0.06) / made.get_figheight()),
        ncols=IN_A_LINE, columnspacing=1.4, handlelength=1.8, borderaxespad=0, labelspacing=0.25,
    )  # fmt: skip


def plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def logarithmic(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Plain numbers on a logarithmic axis: at those places, or at 1, 2 and 5."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(FixedLocator([*ticks]) if ticks else LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    named = apart(ticks) if ticks else ()
    axis.set_major_formatter(FuncFormatter(lambda value, _: "" if ticks and value not in named else plain(value)))


def apart(ticks: Sequence[float], least: float = 0.17) -> list[float]:
    """The ticks whose names do not run into one another, first and last among them; least: share of the axis."""
    kept, room = [ticks[0]], (ticks[-1] / ticks[0]) ** least
    for tick in ticks[1:-1]:
        if tick >= kept[-1] * room and tick * room <= ticks[-1]:
            kept.append(tick)
    return [*kept, ticks[-1]]


def device_of(rows: Sequence[Row]) -> str:
    first = rows[0]
    return first["device"] + threads(first["threads"])


# --- ops against what the machine can do ----------------------------------------------------------


def labels_of(rows: Sequence[Row]) -> list[str]:
    """Op, mode where it is not both, and of `detail` what not all rows of the op share."""
    labels = []
    for row in rows:
        mine = [other["detail"].split(", ") for other in rows if other["op"] == row["op"]]
        told = [part for part in row["detail"].split(", ") if not all(part in parts for parts in mine)]
        mode = [] if row["mode"] == "full" else [row["mode"]]
        labels.append(", ".join([row["op"], *mode, *told]))
    return labels


def other_of(case: Sequence[Row]) -> Row | None:
    """What ours is shown against: plain PyTorch, or the fastest peer where there is no row of that name."""
    if eager := pick(case, provider="eager", result="ok"):
        return eager[0]
    return next((row for row in case for _, name in peers(case)[:1] if row["provider"] == name), None)


def op_rows(folder: str, column: str) -> list[Row]:
    """Ours and the other of each op's main case where that column says something."""
    found = []
    for case in main_cases(folder):
        ours, other = ours_of(case), other_of(case)
        if ours and number(ours, column) is not None:
            found += [row for row in (ours, other) if row is not None and number(row, column) is not None]
    return found


def by_case(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """(ours, the other) of each case."""
    pairs = []
    for case in groups(rows, "provider"):
        ours = ours_of(case)
        if ours is not None:
            pairs.append((ours, next((row for row in case if row is not ours), None)))
    return pairs


def roofline_rows(folder: str) -> list[Row]:
    """Of ops that compute products: FLOP a byte is known of no other."""
    return [row for row in op_rows(folder, "tflop_per_s") if number(row, "gb_per_s")]


def intensity(row: Row) -> float:
    """FLOP a byte, both the least that the op needs."""
    return 1e3 * (number(row, "tflop_per_s") or 0) / (number(row, "gb_per_s") or 1)


def draw_roofline(rows: Sequence[Row]) -> Any:
    others = " or ".join(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    made, axes = figure(
        rows, 4.1, "Ops with products, against what the machine can do",
        f"filled: ours; hollow: {others or 'none'}; least FLOP and least bytes, where both are known",
    )  # fmt: skip
    cases = by_case(rows)
    colour, small = LOOKS[OURS][0], {"textcoords": "offset points", "fontsize": 8, "color": "#333333"}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = pick(rows, dtype=dtype)
        copy = median(float(row["ceiling_gb_per_s"]) for row in mine) / 1e3
        product = median(float(row["ceiling_tflop_per_s"]) for row in mine)
        xs = [product / copy, *map(intensity, mine)]
        left, right = min(xs) / 4, max(xs) * 8
        axes.plot([left, product / copy, right], [left * copy, product, product], color="#333333", linewidth=1.2)
        axes.annotate(f"product, {dtype}: {product:.3g} TFLOP/s", (right, product), (0, 4), ha="right", **small)
        axes.annotate(f"copy: {1e3 * copy:.3g} GB/s", (left, left * copy), (12, 4), va="center", **small)
    for ours, other in cases:
        x, y = intensity(ours), float(ours["tflop_per_s"])
        if other is not None:
            theirs = float(other["tflop_per_s"])
            axes.plot([x, x], [theirs, y], color="#bbbbbb", linewidth=1, zorder=2)
            axes.plot([x], [theirs], "s", markerfacecolor="white", markeredgecolor=GREY, zorder=3)
        axes.plot([x], [y], "o", color=colour, zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.margins(y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        logarithmic(axis)
    names = labels_of([ours for ours, _ in cases])
    labels = [(intensity(ours), float(ours["tflop_per_s"]), name) for (ours, _), name in zip(cases, names, strict=True)]
    place(made, axes, labels, [(intensity(row), float(row["tflop_per_s"])) for row in rows])
    return made


def place(
    made: Any, axes: Any, labels: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]
) -> None:
    """Writes a label beside each point, at the first of some places where it covers no point, line or other label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(made)
    canvas.draw()
    renderer, dots = canvas.get_renderer(), [axes.transData.transform(point) for point in points]
    frame, taken = axes.get_window_extent(renderer), [text.get_window_extent(renderer) for text in axes.texts]
    lines = [axes.transData.transform_path(line.get_path()) for line in axes.lines if len(line.get_xdata()) > 1]
    heights = [0, *(sign * 10 * step for step in range(1, 12) for sign in (1, -1))]
    for x, y, text in sorted(labels, key=lambda label: (-label[1], label[0])):
        for dx, dy in ((side * 8, dy) for dy in heights for side in (1, -1)):
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha="left" if dx > 0 else "right", va="center",
                fontsize=8, color="#222222",
            )  # fmt: skip
            box = note.get_window_extent(renderer).padded(2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            covers = any(box.overlaps(other) for other in taken) or any(box.contains(*dot) for dot in dots)
            if inside and not covers and not any(line.intersects_bbox(box, filled=False) for line in lines):
                break
            note.remove()
        else:
            continue  # no room: its bar in ceiling_share.svg has its name
        taken.append(box)
        if abs(dy) > 10:
            axes.annotate(
                "", (x, y), (dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip


def draw_shares(rows: Sequence[Row]) -> Any:
    cases = sorted(by_case(rows), key=lambda pair: number(pair[0], "ceiling_share") or 0)
    made, axes = figure(
        rows, 0.5 + 0.36 * len(cases), "How near ops come to what the machine can do",
        "100%: as fast as a copy of the least bytes, or a product of the least FLOP, whichever takes longer",
    )  # fmt: skip
    widest = max(number(row, "ceiling_share") or 0 for row in rows)
    for i, (ours, other) in enumerate(cases):
        for row, y, bar, ink in (
            (ours, i + 0.19, LOOKS[OURS][0], LOOKS[OURS][0]),
            (other, i - 0.19, "#b5b5b5", "#555555"),
        ):
            if row is not None:
                share = number(row, "ceiling_share") or 0
                axes.barh(y, share, 0.36, color=bar, zorder=2)
                axes.text(
                    share + 0.008, y, f"{row['provider']} {share:.0%}", va="center", fontsize=8, color=ink,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                )  # fmt: skip
    axes.axvline(1, color="#333333", linewidth=1, zorder=1)
    axes.set_yticks(range(len(cases)), labels_of([ours for ours, _ in cases]))
    axes.set(xlim=(0, max(1.02, 1.18 * widest)), ylim=(-0.6, len(cases) - 0.4), xlabel="share of the ceiling")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return made


# --- sweeps ---------------------------------------------------------------------------------------


def sweep(rows: Sequence[Row], column: str, *along: str) -> list[Row]:
    """The rows that differ in that column, and in who was measured, and in nothing else but what changes `along`; the
    most of them that there are, from three sizes on."""
    best: list[Row] = []
    for group in groups(rows, column, "provider", "alpha", "layout", *along):
        sizes = {row[column] for row in group}
        if len(sizes) >= 3 and "" not in sizes and len(group) > len(best):
            best = group
    return best


def objective_rows(folder: str, column: str) -> list[Row]:
    return sweep(pick(rows_of(folder, "objective"), mode="full"), column)


def step_rows(folder: str, column: str) -> list[Row]:
    """Tokens may grow along."""
    return sweep(rows_of(folder, "step_sweep"), column, "N")


def draw_sweep(rows: Sequence[Row], column: str, *, title: str, axis: str) -> Any:
    """Time and peak memory, a line a provider; who ran out of memory has a cross at the top."""
    said = []
    for name in (name for name in ("model", "N", "D", "Z", "T", "B", "L", "V", "detail") if name in rows[0]):
        values = {row[name] for row in rows}
        if name != column and len(values) == 1 and values != {""}:
            said.append(*values if name in ("model", "detail") else [f"{name} {value}" for value in values])
    names = [series_of(row, rows) for row in rows]
    looks = look_of(sorted(dict.fromkeys(names), key=lambda name: (not name.startswith(OURS), names.index(name))))
    short = any(row["result"].endswith("out of memory") for row in rows)
    made, both = figure(
        rows, 3.0, title, ", ".join([*said, rows[0]["dtype"]]), named=len(looks) + short, ncols=2
    )  # fmt: skip
    places = sorted({float(row[column]) for row in rows})
    for axes, found, unit in zip(both, ("p50_ms", "peak_mib"), ("ms", "peak MiB"), strict=True):
        axes.set(xlabel=axis, ylabel=unit)
        for name, look in looks.items():
            mine = sorted(
                (row for row, of in zip(rows, names, strict=True) if of == name), key=lambda row: float(row[column])
            )  # fmt: skip
            points = [(float(row[column]), value) for row in mine if (value := number(row, found)) is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], label=shown_name(name), **look)
            crosses = [float(row[column]) for row in mine if row["result"].endswith("out of memory")]
            axes.plot(
                crosses, [0.97] * len(crosses), "x", color=look["color"], markeredgewidth=2,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        if column == "labelled":  # a share: from nothing to all
            axes.set(xticks=places, ylim=(0, 1.14 * axes.dataLim.y1))
        else:
            axes.set(xscale="log", yscale="log")
            axes.margins(y=0.14)
            logarithmic(axes.xaxis, places)
            logarithmic(axes.yaxis)
    entries = [*zip(*both[0].get_legend_handles_labels(), strict=True)]
    if short:
        from matplotlib.lines import Line2D

        entries.append((Line2D([], [], linestyle="", marker="x", color="#333333"), "out of memory"))
    legend(made, entries)
    return made


# --- where a step's time goes, and how long a sample fits -----------------------------------------


def profile_rows(folder: str) -> list[Row]:
    return pick(rows_of(folder, "profile"), result="ok")


def draw_profile(rows: Sequence[Row]) -> Any:
    runs = groups(rows, "category")
    titles = [f"{run[0]['model']}, {'with the bottleneck' if positive(run[0]['alpha']) else WITHOUT}" for run in runs]
    total = {name: sum(number(row, "share") or 0 for row in of) for name, of in by_column(rows, "category").items()}
    order = sorted(total, key=lambda name: total[name])
    made, axes = figure(
        rows, 0.45 + (0.1 + 0.19 * len(runs)) * len(order), "Where a training step's time goes",
        "share of the time under the profiler, and ms a step", named=len(runs),
    )  # fmt: skip
    colours = [LOOKS[OURS][0], "#56B4E9", "#E69F00", "#CC79A7", "#009E73", GREY]
    thick, entries = 0.82 / len(runs), []
    for k, run in enumerate(runs):
        for row in run:
            share, y = number(row, "share") or 0, order.index(row["category"]) + 0.41 - (k + 0.5) * thick
            bar = axes.barh(y, share, thick * 0.94, color=colours[k % len(colours)])
            axes.text(share, y, f" {share:.1%}  {plain(number(row, 'ms_a_step') or 0)} ms", va="center", fontsize=8)
        entries.append((bar, titles[k]))
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="share of a step", xlim=(0, 1.25 * max(number(row, "share") or 0 for row in rows)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    legend(made, entries)
    return made


def ladder_rows(folder: str) -> list[Row]:
    return [row for row in rows_of(folder, "ladder") if row["card_gib"]]


def draw_ladder(rows: Sequence[Row]) -> Any:
    models = by_column(rows, "model")
    looks = look_of(series_of(row, rows) for row in rows)
    made, grid = figure(
        rows, 0.2 + 2.0 * len(models), "The longest sample that a training step takes", "by size of the card",
        named=len(looks), nrows=len(models), squeeze=False,
    )  # fmt: skip
    entries = {}
    for axes, (model, mine) in zip(grid[:, 0], models.items(), strict=True):
        cards = sorted({float(row["card_gib"]) for row in mine})
        names = [name for name in looks if any(series_of(row, rows) == name for row in mine)]
        thick = 0.8 / len(names)
        for row in mine:
            name, longest = series_of(row, rows), number(row, "longest") or 0
            colour, hollow = looks[name]["color"], looks[name]["linestyle"] == "--"
            x = cards.index(float(row["card_gib"])) - 0.4 + (names.index(name) + 0.5) * thick
            bar = axes.bar(x, longest, thick * 0.92, edgecolor=colour, color="white" if hollow else colour)
            axes.text(x, longest, plain(longest) if longest else "none", ha="center", va="bottom", fontsize=8)
            entries[name] = bar
        axes.set_xticks(range(len(cards)), [f"{card:g} GiB" for card in cards])
        axes.set(ylabel="tokens")
        axes.set_title(model)
        axes.margins(y=0.12)
        axes.yaxis.set_major_formatter(plain)
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
    legend(made, [(entries[name], shown_name(name)) for name in looks])
    return made


def by_column(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


# --- all of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    """rows: what a device folder has for it. draw: a figure of those."""

    name: str
    rows: Callable[[str], list[Row]]
    draw: Callable[[Sequence[Row]], Any]


def _sweep(name: str, rows: Callable[..., list[Row]], column: str, title: str, axis: str) -> Plot:
    return Plot(name, partial(rows, column=column), partial(draw_sweep, column=column, title=title, axis=axis))


OBJECTIVE, STEP = "The objective, forward and backward", "A training step"
PLOTS = (
    Plot("roofline", roofline_rows, draw_roofline),
    Plot("ceiling_share", partial(op_rows, column="ceiling_share"), draw_shares),
    _sweep("objective_rows", objective_rows, "N", f"{OBJECTIVE}, by rows", "rows N"),
    _sweep("objective_vocabulary", objective_rows, "V", f"{OBJECTIVE}, by vocabulary", "vocabulary V"),
    _sweep("step_length", step_rows, "T", f"{STEP}, by the length of its rows", "tokens a row T"),
    _sweep("step_batch", step_rows, "B", f"{STEP}, by rows of a micro-batch", "rows of a micro-batch B"),
    _sweep("step_layers", step_rows, "L", f"{STEP}, by layers", "layers L"),
    _sweep("step_vocabulary", step_rows, "V", f"{STEP}, by vocabulary", "vocabulary V"),
    _sweep("step_labelled", step_rows, "labelled", f"{STEP}, by the labelled share", "labelled share of the tokens"),
    Plot("step_breakdown", profile_rows, draw_profile),
    Plot("ladder", ladder_rows, draw_ladder),
)


def digest(rows: Sequence[Row]) -> str:
    """Of what a figure shows and of the code that shows it."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode() + Path(__file__).read_bytes()).hexdigest()


def path_of(folder: str, name: str, out: Path | None) -> Path:
    return (out / folder if out else result_rows.RESULTS / folder / "plots") / f"{name}.svg"


def draw(plot: Plot, rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc is the machine's, not the rows'
        matplotlib.rcParams.update(STYLE)
        about = {"Date": None, "Creator": "benchmarks/report/plots.py", "Description": f"sha256 {digest(rows)}"}
        plot.draw(rows).savefig(path, format="svg", metadata=about)


def check(out: Path | None = None) -> list[str]:
    """What is stale, missing, or left over; [] where all is well."""
    wrong = []
    for folder in folders():
        known = {path_of(folder, plot.name, out): plot.rows(folder) for plot in PLOTS}
        for path, rows in known.items():
            if not path.exists():
                wrong += [f"not drawn: {path}"] if rows else []
            elif not rows:
                wrong.append(f"no rows for it: {path}")
            else:
                found = re.search(r"<dc:description>sha256 (\w+)</dc:description>", path.read_text(encoding="utf-8"))
                if not found or found[1] != digest(rows):
                    wrong.append(f"stale: {path}")
        directory = path_of(folder, "", out).parent
        wrong += [f"drawn by no plot of {Path(__file__).name}: {path}" for path in sorted(directory.glob("*.svg"))
                  if path not in known]  # fmt: skip
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of the committed rows.")
    parser.add_argument("--check", action="store_true", help="draw nothing; exit 1 where a figure is stale")
    parser.add_argument("--out", type=Path, metavar="DIR", help="DIR/<device>/*.svg instead of beside the rows")
    options = parser.parse_args()
    if options.check:
        wrong = check(options.out)
        print("\n".join(wrong) or "all figures are fresh")
        sys.exit(bool(wrong))
    for folder in folders():
        for plot in PLOTS:
            path = path_of(folder, plot.name, options.out)
            if rows := plot.rows(folder):
                draw(plot, rows, path)
                print(path)
            else:
                path.unlink(missing_ok=True)
                print(f"too few rows: {path} is not drawn")


if __name__ == "__main__":
    main()
