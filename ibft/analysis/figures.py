"""The figures of a reproduction, from its report alone: which there are, what they show, and their files.

Each is written as PNG and as SVG; the bytes depend on the report and on matplotlib's version only. fig1b to fig6 are
those of the paper (arXiv 2510.16022), with our axes where it leaves them open; fig7 and fig8 are ours.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.analysis.figures_inside import draw_deciles, draw_densities, draw_geometry
from ibft.analysis.figures_scores import (
    NotDrawn,
    draw_all_models,
    draw_dropped,
    draw_scatter,
    draw_starts,
    draw_temperatures,
)
from ibft.evaluation.score_plots import save
from ibft.reproduce.over_seeds import Report

ENDINGS = (".png", ".svg")


@dataclass(frozen=True)
class Figure:
    """draw: of a report; raises NotDrawn where it has not the rows."""

    name: str
    caption: str
    draw: Callable[[Report], Any]


FIGURES = (
    Figure("fig1b", "Pass@k(k) over Pass@1 of every model. Grey: what the paper has, read from its figure (±0.2).",
           draw_scatter),
    Figure("fig2", "The share of problems of which at least m of k samples pass.", draw_all_models),
    Figure("fig3", "Densities of Min-K% over rows. Where the groups compared are texts of another kind, a part of the "
           "distance is that of the kinds.", draw_densities),
    Figure("fig4", "Plain fine-tuning on all rows, without the most memorised ones, and without as many random ones.",
           draw_dropped),
    Figure("fig5", "How far apart the most and the least memorised rows lie, by model; what an estimate and a centred "
           "angle are: ibft/analysis/geometry.py.", draw_geometry),
    Figure("fig6", "At least m of k samples pass, at each temperature.", draw_temperatures),
    Figure("fig7", "Cross-entropy of the fine-tuning rows over training, by decile of the base's memorisation. Lines "
           "that lie together: all rows are fitted evenly.", draw_deciles),
    Figure("fig8", "Where training starts: the base that has memorised rows, the same with noise on its weights, and a "
           "twin that has not memorised any.", draw_starts),
)  # fmt: skip


def draw_figures(report: Report, folder: Path) -> Iterator[str]:
    """All of FIGURES; see `draw_each`."""
    return draw_each({figure.name: figure.draw for figure in FIGURES}, report, folder)


def draw_each(draws: Mapping[str, Callable[[Report], Any]], report: Report, folder: Path) -> Iterator[str]:
    """A line for each says where it is, or why it is not drawn; what an earlier call left of the latter is removed.

    Args:
        draws: by name; each raises NotDrawn where the report has not the rows.

    Raises:
        DataError: the folder cannot be written.
    """
    for name, draw in draws.items():
        paths = [folder / f"{name}{ending}" for ending in ENDINGS]
        try:
            save(draw, report, *paths)
        except NotDrawn as why:
            for path in paths:
                path.unlink(missing_ok=True)
            yield f"{name} is not drawn: {why}"
        else:
            yield f"figure: {paths[0]}, {ENDINGS[1]}"
