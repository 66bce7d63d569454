"""The KL of each latent dimension over time as inline SVG, a heat map: to the right steps, downwards dimensions, the
fullest at the last step on top. What lines of the least, the middle and the most cannot show: how many dimensions
empty, when, and whether it is the same ones all along.

All maps of a page have one logarithmic scale of colours, so that runs and layers compare.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from ibft.run_report.chart import (
    BOTTOM,
    LEFT,
    RIGHT,
    SMALLEST,
    TOP,
    WIDTH,
    Scale,
    log_ticks,
    nice,
    read,
    scale_of_steps,
    short,
)
from ibft.run_report.read_run import Latent, Run

COLUMNS, ROWS = 60, 64  # at most drawn
LEVELS = 17  # of style.py: colours
PLANE = 192  # height of the map, in user units; of few dimensions TALLEST each
TALLEST = 24
LEGEND = 34  # height of what says the colours
DECADES = 5  # of the scale: what is below has the lowest colour
TITLE = "KL of each latent dimension"
NOTE = (
    "To the right steps, downwards latent dimensions by their KL at the last step, the fullest on top. Nats per token, "
    "against N(0, I), as means over the steps of a column; colours are on a log scale, one for all maps here, and the "
    "lowest is also of what lies below it."
)


@dataclass(frozen=True)
class Heat:
    """A map before it is drawn: C columns, R rows.

    edges: [C + 1] between which the columns lie, in steps after the first one that was logged.
    groups: [R] numbers of the dimensions in a row, from 0.
    cells: [R][C] nats; None: no number.
    """

    name: str
    edges: list[float]
    groups: list[list[int]]
    cells: list[list[float | None]]
    points: Latent

    @property
    def dims(self) -> int:
        return sum(map(len, self.groups))


def heats(runs: Sequence[Run]) -> str:
    """A map a run and layer; nothing of runs that did not log it."""
    made = [
        heat_of(", ".join(filter(None, [run.name if len(runs) > 1 else "", layer_name(run, layer)])), points)
        for run in runs
        for layer, points in run.latent.items()
    ]
    if not made:
        return ""
    scale = scale_of_colours([kl for heat in made for row in heat.cells for kl in row if kl is not None])
    figures = "".join(drawn(heat, scale) for heat in made)
    return f'<div class="charts">{figures}</div><p class="reading">{escape(NOTE)}</p>'


def layer_name(run: Run, layer: int | None) -> str:
    """layer: None where the run has one bottleneck, whose layer its manifest knows."""
    known = run.manifest.get("ib_layer") if layer is None else layer
    return f"layer {known}" if type(known) is int else ""


# --- from rows to cells ---------------------------------------------------------------------------


def heat_of(name: str, points: Latent) -> Heat:
    """Dimensions by their last KL; where they are too many for a row each, as many a row as are needed."""
    last = [-math.inf if kl is None else kl for kl in points[-1][1]]
    order = sorted(range(len(last)), key=lambda dim: -last[dim])
    size = -(-len(order) // ROWS)
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    columns = columns_of(points)
    middles = [sum(step - points[0][0] for step, _ in column) / len(column) for column in columns]
    cells = [[mean([kl[dim] for _, kl in column for dim in group]) for column in columns] for group in groups]
    return Heat(name, edges_of(middles), groups, cells, points)


def columns_of(points: Latent) -> list[Latent]:
    """A column a logged step; of more than `COLUMNS` steps those that lie in equal parts of the way."""
    if len(points) <= COLUMNS:
        return [[point] for point in points]
    first, way = points[0][0], points[-1][0] - points[0][0]
    found: dict[int, Latent] = {}
    for point in points:
        found.setdefault(min((point[0] - first) * COLUMNS // way, COLUMNS - 1), []).append(point)
    return list(found.values())


def edges_of(middles: Sequence[float]) -> list[float]:
    """Half-way between neighbours; the outer columns are as wide outwards as inwards."""
    between = [(one + other) / 2 for one, other in pairwise(middles)]
    if not between:
        return [middles[0] - 0.5, middles[0] + 0.5]
    return [2 * middles[0] - between[0], *between, 2 * middles[-1] - between[-1]]


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def scale_of_colours(values: Sequence[float]) -> Scale:
    """From the least KL, or `DECADES` below the greatest, to the greatest; at least a decade."""
    above = [value for value in values if value > SMALLEST]
    high = max(above, default=1.0)
    low = max(min(above, default=high), high * 10.0**-DECADES)
    if high < 10 * low:
        beyond = math.sqrt(10 * low / high)
        low, high = low / beyond, high * beyond
    return Scale(low, high, True, log_ticks(low, high))


def level(kl: float, scale: Scale) -> int:
    """Which colour, 0 the lowest."""
    return 0 if kl <= scale.low else min(int(scale.share(kl) * LEVELS), LEVELS - 1)


# --- drawing --------------------------------------------------------------------------------------


def drawn(heat: Heat, scale: Scale) -> str:
    height = min(PLANE, TALLEST * heat.dims)
    size = len(heat.groups[0])
    rest = f", the last of {len(heat.groups[-1])}" if len(heat.groups[-1]) < size else ""
    grouped = f"each row the mean of {size} of {heat.dims} dimensions{rest}" if size > 1 else ""
    words = ", ".join(filter(None, [heat.name, "nats", "log scale"])) + (f"; {grouped}" if grouped else "")
    return (
        f'<figure class="chart heat"><figcaption><b>{TITLE}</b> {escape(words)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {TOP + height + BOTTOM + LEGEND}" role="img" '
        f'aria-label="{escape(described(heat))}">'
        f"{rows(heat, scale, height)}{axes(heat, height)}{legend(scale, TOP + height + BOTTOM)}</svg></figure>"
    )


def described(heat: Heat) -> str:
    """For those who do not see: between what the dimensions lie at the first step and at the last."""
    said = []
    for step, kl in (heat.points[0], heat.points[-1]) if len(heat.points) > 1 else heat.points:
        there = [value for value in kl if value is not None]
        said += [f"at step {step:,} from {read(min(there))} to {read(max(there))} nats"] if there else []
    named = ", ".join(filter(None, [TITLE, heat.name]))
    return f"{named}: {'; '.join([f'{heat.dims} dimensions', *said])}"


def across(heat: Heat, after: float) -> float:
    """after: steps after the first one."""
    return LEFT + (after - heat.edges[0]) / (heat.edges[-1] - heat.edges[0]) * (WIDTH - LEFT - RIGHT)


def rows(heat: Heat, scale: Scale, height: float) -> str:
    """Each says which dimensions it is of."""
    x = [across(heat, edge) for edge in heat.edges]
    parts, above = [], 0
    for group, cells in zip(heat.groups, heat.cells, strict=True):
        top, bottom = (TOP + height * dims / heat.dims for dims in (above, above + len(group)))
        above += len(group)
        last = mean([heat.points[-1][1][dim] for dim in group])
        said = f"dimension{'' if len(group) == 1 else 's'} {', '.join(map(str, group))}"
        said += "" if last is None else f": {read(last)} nats at step {heat.points[-1][0]:,}"
        parts.append(f"<g><title>{said}</title>{row(x, top, bottom, cells, scale)}</g>")
    return "".join(parts)


def row(x: Sequence[float], top: float, bottom: float, cells: Sequence[float | None], scale: Scale) -> str:
    """Neighbours of one colour are one box, and all boxes of a colour one path."""
    boxes: dict[int, str] = {}
    levels = [None if kl is None else level(kl, scale) for kl in cells]
    first = 0
    for end in range(1, len(levels) + 1):
        found = levels[first]
        if end < len(levels) and levels[end] == found:
            continue
        if found is not None:
            boxes[found] = boxes.get(found, "") + box(x[first], x[end], top, bottom)
        first = end
    return "".join(f'<path class="k{found}" d="{path}"/>' for found, path in boxes.items())


def box(left: float, right: float, top: float, bottom: float) -> str:
    return f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}z"


def axes(heat: Heat, height: float) -> str:
    """To the left ranks of the dimensions, below steps."""
    marks, texts = [], []
    every = max(1, round(nice(heat.dims / 5)))
    for rank in [1, *range(every, heat.dims + 1, every)] if every > 1 else range(1, heat.dims + 1):
        y = TOP + height * (rank - 0.5) / heat.dims
        marks.append(f"M{LEFT - 4} {y:.1f}h4")
        texts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(rank)}</text>')
    steps = [step for step, _ in heat.points]
    for tick in scale_of_steps(range(steps[0], steps[-1] + 1)).ticks:
        x = across(heat, tick - steps[0])
        marks.append(f"M{x:.1f} {TOP + height:.1f}v4")
        texts.append(f'<text x="{x:.1f}" y="{TOP + height + 15:.1f}" text-anchor="middle">{short(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    texts.append(f'<text x="{middle}" y="{TOP + height + BOTTOM - 4:.1f}" text-anchor="middle">step</text>')
    frame = box(LEFT, WIDTH - RIGHT, TOP, TOP + height)
    return f'<path class="grid" d="{frame}{"".join(marks)}"/>{"".join(texts)}'


def legend(scale: Scale, top: float) -> str:
    """The colours in a bar, and which KL they stand for."""
    wide, marks, texts = WIDTH - LEFT - RIGHT, [], []
    edges = [LEFT + wide * index / LEVELS for index in range(LEVELS + 1)]
    bar = "".join(
        f'<path class="k{index}" d="{box(edges[index], edges[index + 1], top + 4, top + 14)}"/>'
        for index in range(LEVELS)
    )
    for tick in scale.ticks:
        x = LEFT + scale.share(tick) * wide
        marks.append(f"M{x:.1f} {top + 14:.1f}v4")
        texts.append(f'<text x="{x:.1f}" y="{top + 29:.1f}" text-anchor="middle">{short(tick)}</text>')
    texts.append(f'<text x="{LEFT - 6}" y="{top + 13:.1f}" text-anchor="end">nats</text>')
    return f'<g>{bar}</g><path class="grid" d="{"".join(marks)}"/>{"".join(texts)}'
