"""`ibft-fast sweep --dry-run`: the cells, and the least time that training them takes. Nothing is made.

The time is `estimate`'s floor: the arithmetic of a step over the rate of one large product on the device that is here,
or over 50 TFLOP/s where a GPU is asked about and none is here. Sampling, judging and loading come on top.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.box import SIMPLE
from rich.table import Table

from ibft.config import Config
from ibft.console import Console
from ibft.estimate import SUSTAINED, choose_target, duration, find_data, measured_rate
from ibft.plan import Load, ModelShape, Setup, choose_plan, flops
from ibft.sweep.plan import Sweep
from ibft.sweep.run import describe

if TYPE_CHECKING:
    from ibft.data.encode import EncodedData


@dataclass(frozen=True)
class Known:
    """Of what a run trains, and on what; data, steps: None where no file here tells."""

    shape: ModelShape
    data: "EncodedData | None"
    steps: int | None

    @classmethod
    def of(cls, config: Config, console: Console) -> "Known":
        from ibft.loop import count_steps
        from ibft.model import load_model_config

        shape = ModelShape.of(load_model_config(config.model, needs_weights=False))
        found = find_data(config, console)
        data = None if isinstance(found, str) else found.train
        steps = config.train.max_steps if config.train.max_steps != -1 else None
        if steps is None and data is not None:
            steps = -int(-config.train.num_train_epochs * count_steps(data, config) // 1)
        return cls(shape, data, steps)


def show_sweep(sweep: Sweep, *, jobs: int | None) -> None:
    """Raises IBFTError: the data cannot be read."""
    console = Console()
    device, here = choose_target(sweep.base)
    if device == "cpu":
        torch.set_num_threads(1)  # as a run of a sweep has
    workers = jobs or (1 if device == "cuda" else os.cpu_count() or 1)
    known: dict[str, Known] = {}  # most grids have one base and one data set: they are read once
    rate = 0.0 if here else SUSTAINED
    total: float | None = 0.0
    table = Table("cell", "runs", "steps", "training one, at least", box=SIMPLE)
    for cell in (sweep.baseline, *sweep.cells):
        of = cell.config.model_dump_json(include={"model", "data", "train"})
        if of not in known:
            known[of] = Known.of(cell.config, console)
        shape, data, steps = vars(known[of]).values()
        setup = Setup.of(shape, cell.config, device, load=Load.of(cell.config, data))
        rate = rate or measured_rate(setup)[0]
        seconds = steps * sum(flops(setup, choose_plan(setup, None).plan).values()) / rate if steps else None
        total = None if seconds is None or total is None else total + seconds * len(sweep.seeds)
        shown = ("unknown", "unknown") if seconds is None else (f"{steps:,}", duration(seconds))
        table.add_row(cell.name, str(len(sweep.seeds)), *shown)
    console.rich.print(table)
    console.line(describe(sweep))
    if sweep.tasks:
        console.line(f"each is sampled {sweep.tasks.n} times a validation task, which is not in the time")
    if total is not None:
        at = "as one large product runs here" if here else "an example: no CUDA device is here"
        console.line(
            f"training: at least {duration(total / workers)}, {workers} at once, at {rate / 1e12:.3g} TFLOP/s ({at})"
        )
    console.notice("dry run: every cell's configuration, the data and the tasks are in order; nothing was made")
