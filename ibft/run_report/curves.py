"""Which charts the page has: of each logged number one, with a line a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ibft.run_report.chart import LONG, Line, chart, sample
from ibft.run_report.read_run import Points, Run, finite

IN_USE_NATS = 0.01  # as `ibft.objective.ACTIVE_DIM_NATS`, whose module would load torch


@dataclass(frozen=True)
class Curve:
    """key: of a logged row; or `of` makes the points of a run."""

    title: str
    unit: str
    key: str = ""
    of: Callable[[Run], Points] | None = None
    zero: bool = False
    percent: bool = False

    def points(self, run: Run) -> Points:
        return self.of(run) if self.of else run.curve(self.key)


def kl_per_dimension(run: Run) -> Points:
    """Nats per token and latent dimension, whichever way the run's KL is reduced; empty where it does not say."""
    dims, reduction = finite(run.setting("ib.latent_dim")), run.setting("ib.kl_reduction")
    if not dims or reduction not in ("batchmean", "mean"):
        return []
    share = dims if reduction == "batchmean" else 1
    return [(step, None if value is None else value / share) for step, value in run.curve("kl")]


LOSS = (
    Curve("Loss", "", "loss"),
    Curve("Cross-entropy (CE)", "nats", "ce"),
    Curve("Held-out CE", "nats", "eval_ce"),
    Curve("KL", "nats", "kl"),
    Curve("Cross-entropy from z (CE_z)", "nats", "ce_z"),
)
LATENT = (
    Curve("KL per latent dimension", "nats, mean", of=kl_per_dimension),
    Curve("KL of the middle dimension", "nats, median", "kl_dim_median"),
    Curve("KL of the fullest dimension", "nats", "kl_dim_max"),
    Curve("KL of the emptiest dimension", "nats", "kl_dim_min"),
    Curve("Latent dimensions in use", "", "active_dims", percent=True),
    Curve("|mu|", "mean", "mu_abs_mean"),
    Curve("Variance of z", "mean", "var_mean"),
)
GRADIENTS = (
    Curve("Gradient norm of LoRA", "before clipping", "grad_norm_lora"),
    Curve("Gradient norm of the bottleneck", "before clipping", "grad_norm_bottleneck"),
    Curve("Learning rate", "of LoRA", "learning_rate", zero=True),
)
SPEED = (
    Curve("Throughput", "tokens per second", "tokens_per_second", zero=True),
    Curve("Peak memory so far", "MiB", "memory_mib", zero=True),
)
LOSS_NOTE = (
    "CE and CE_z are in nats per label token; the KL in nats per token, summed over the latent dimensions "
    "(ib.kl_reduction=batchmean) or their mean (mean)."
)
LONG_NOTE = "Of a long run the line is a mean over neighbouring steps, and pale what they span."
LATENT_NOTE = (
    f"A dimension is in use where its mean KL against N(0, I) is above {IN_USE_NATS:g} nats. |mu| and the variance are "
    "means over all dimensions and tokens; dimensions are those of all bottlenecks, where there are several."
)


def charts(curves: Sequence[Curve], runs: Sequence[Run], note: str = "") -> str:
    """With a legend where there are several runs; what no run has logged is named. All span the same steps."""
    every = [row["step"] for run in runs for row in (*run.steps, *run.evaluations)] or [0]
    steps = range(min(every), max(every) + 1)
    drawn: list[str] = []
    absent: list[str] = []
    for curve in curves:
        lines = [Line(run.name, number, curve.points(run)) for number, run in enumerate(runs)]
        figure = chart(curve.title, lines, steps, unit=curve.unit, zero=curve.zero, percent=curve.percent)
        (drawn if figure else absent).append(figure or curve.title)
    parts = [legend(runs) if drawn else "", f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""]
    if any(len(run.steps) > LONG for run in runs):
        note = f"{note} {LONG_NOTE}".strip()
    parts += [f'<p class="reading">{escape(note)}</p>' if drawn and note else ""]
    parts += [f"<p>Not logged: {escape(', '.join(absent))}.</p>" if absent else ""]
    return "".join(parts)


def legend(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    entries = "".join(f"<li>{sample(number)}<span>{escape(run.name)}</span></li>" for number, run in enumerate(runs))
    return f'<ul class="legend">{entries}</ul>'
