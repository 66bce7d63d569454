"""A chart of lines over steps as inline SVG: its colours are the page's, light or dark, and it shrinks with the page.

Lines differ in colour and in dashes. The vertical scale is logarithmic where the largest value is a hundred times the
smallest. A long line is drawn twice: pale the least and the greatest value of each column, so that no spike is lost,
and over them the mean of some columns at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ibft.run_report.read_run import Points

WIDTH, HEIGHT = 360, 200  # user units: about a phone's pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 8, 36  # margins
LOG_FROM = 100.0  # largest to smallest value
SMALLEST = 1e-45  # of a float32: what is nearer to 0 is drawn as 0
LONG = 2 * (WIDTH - LEFT - RIGHT)  # points from which a line is drawn twice
MEANS = 80  # of a long line
DOTTED = 60  # a line of so many points shows each, with its value
COLOURS, DASHES = 6, 5  # of style.py; a line's look is both, so that thirty lines differ
NAMED = 6  # lines in the description for those who do not see


@dataclass(frozen=True)
class Line:
    """look: which colour and dashes, from 0."""

    name: str
    look: int
    points: Points


@dataclass(frozen=True)
class Scale:
    """low < high: its ends. Values between them go to 0 .. 1."""

    low: float
    high: float
    log: bool
    ticks: list[float]

    def share(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str, lines: Sequence[Line], steps: range, *, unit: str = "", zero: bool = False, percent: bool = False
) -> str:
    """A figure, or nothing where no line has a value.

    steps: those that it spans. zero: the scale has 0 in it. percent: values are shares, the scale 0 to 100 %.
    """
    values = [value for line in lines for _, value in line.points if value is not None]
    if not values:
        return ""
    across = scale_of_steps(steps)
    up = Scale(0.0, 1.0, False, [0.0, 0.25, 0.5, 0.75, 1.0]) if percent else scale_of(values, zero=zero)
    words = ", ".join(filter(None, [unit, "log scale" if up.log else ""]))
    drawn = "".join(drawn_line(line, across, up, percent) for line in lines)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> {escape(words)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described(title, lines, percent))}">'
        f"{axes(across, up, percent)}{drawn}</svg></figure>"
    )


def described(title: str, lines: Sequence[Line], percent: bool) -> str:
    """First and last value of each line."""
    said = []
    for line in lines:
        values = [value for _, value in line.points if value is not None]
        if values:
            said.append(f"{line.name} from {read(values[0], percent)} to {read(values[-1], percent)}")
    more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return f"{title}: {'; '.join(said[:NAMED])}{more}"


# --- scales ---------------------------------------------------------------------------------------


def scale_of(values: Sequence[float], *, zero: bool = False) -> Scale:
    """Linear ends are ticks; logarithmic ones lie a little beyond the values."""
    low, high = min(values), max(values)
    if not zero and low > SMALLEST and high >= LOG_FROM * low:
        beyond = (high / low) ** 0.04
        low, high = low / beyond, high * beyond
        return Scale(low, high, True, log_ticks(low, high))
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, SMALLEST):  # next to equal, or all next to 0
        beyond = 0.1 * size if size > SMALLEST else 1.0
        low, high = low - beyond, high + beyond
    step = nice((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, False, [index * step for index in range(first, last + 1)])


def scale_of_steps(steps: range) -> Scale:
    """It ends where they do."""
    low, high = steps[0], steps[-1]
    if low == high:
        return Scale(low - 1, high + 1, False, [low])
    step = max(1, round(nice((high - low) / 5)))
    return Scale(low, high, False, [float(tick) for tick in range(-(-low // step) * step, high + 1, step)])


def nice(size: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten, from `size` on."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= size * (1 - 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, of many only every n-th; of few also 2 and 5 times them."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(powers) > 2:
        return [10.0**power for power in powers[:: -(-len(powers) // 6)]]
    each = [times * 10.0**power for power in range(powers.start - 1, powers.stop) for times in (1, 2, 5)]
    return [tick for tick in each if low <= tick <= high]


# --- drawing --------------------------------------------------------------------------------------


def place(across: Scale, up: Scale, step: float, value: float) -> tuple[float, float]:
    x = LEFT + across.share(step) * (WIDTH - LEFT - RIGHT)
    return x, HEIGHT - BOTTOM - up.share(value) * (HEIGHT - TOP - BOTTOM)


def axes(across: Scale, up: Scale, percent: bool) -> str:
    rules, texts = [], []
    for tick in up.ticks:
        _, y = place(across, up, across.low, tick)
        rules.append(f"M{LEFT} {y:.1f}H{WIDTH - RIGHT}")
        texts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{short(tick, percent)}</text>')
    for tick in across.ticks:
        x, _ = place(across, up, tick, up.low)
        rules.append(f"M{x:.1f} {HEIGHT - BOTTOM}v4")
        texts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>')
    texts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return f'<path class="grid" d="{"".join(rules)}"/>{"".join(texts)}'


def drawn_line(line: Line, across: Scale, up: Scale, percent: bool) -> str:
    """With dots that say their values where they are few."""
    if len(line.points) > LONG:
        pale = path_of(extremes(line.points, across), across, up, ' class="pale"')
        parts = [pale, path_of(means(line.points, across), across, up)]
    else:
        parts = [path_of(line.points, across, up)]
    for step, value in line.points if len(line.points) <= DOTTED else ():
        if value is not None:
            x, y = place(across, up, step, value)
            said = escape(f"{line.name}, step {step:,}: {read(value, percent)}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"><title>{said}</title></circle>')
    return f'<g class="{look(line.look)}">{"".join(parts)}</g>'


def path_of(points: Points, across: Scale, up: Scale, attributes: str = "") -> str:
    """Broken where values are missing; a value between two that are is a dot."""
    moves, pen_down = [], False
    for step, value in points:
        if value is not None:
            x, y = place(across, up, step, value)
            moves.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}{'' if pen_down else 'h0'}")
        pen_down = value is not None
    return f'<path{attributes} d="{"".join(moves)}"/>'


def by_column(points: Points, across: Scale, columns: int) -> Iterator[Points]:
    found: dict[int, Points] = {}
    for point in points:
        found.setdefault(min(int(across.share(point[0]) * columns), columns - 1), []).append(point)
    yield from found.values()


def extremes(points: Points, across: Scale) -> Points:
    """Of each column the least, the greatest and a missing value, in their order."""
    kept: Points = []
    for column in by_column(points, across, WIDTH - LEFT - RIGHT):
        there = sorted((value, step) for step, value in column if value is not None)
        ends = {(step, value) for value, step in (*there[:1], *there[-1:])}
        kept += sorted([*ends, *[point for point in column if point[1] is None][:1]], key=lambda point: point[0])
    return kept


def means(points: Points, across: Scale) -> Points:
    """Of some columns at once, in their middle; missing values do not count."""
    kept: Points = []
    for column in by_column(points, across, MEANS):
        there = [value for _, value in column if value is not None]
        kept.append((column[len(column) // 2][0], sum(there) / len(there) if there else None))
    return kept


def look(number: int) -> str:
    return f"c{number % COLOURS} d{number % DASHES}"


def sample(number: int) -> str:
    """A piece of a line, for a legend."""
    return f'<svg viewBox="0 0 30 8" aria-hidden="true"><g class="{look(number)}"><path d="M1 4H29"/></g></svg>'


def read(value: float, percent: bool = False) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:.4g}"


def short(value: float, percent: bool = False) -> str:
    """A tick's label, of at most some six letters."""
    if percent:
        return f"{100 * value:.6g}%"
    if 1e4 <= abs(value) < 1e12:
        size, letter = next(pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= pair[0])
        return f"{value / size:.6g}{letter}"
    return f"{value:.6g}"
