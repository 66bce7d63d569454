"""`ibft-fast sweep`: the runs of a grid, the cell that does best on validation tasks, and it on the test tasks.

    DIR/sweep.json, sweep.csv   every number; a row a run
    DIR/figures/
    DIR/runs/<cell>/seed-<s>/   run/ as `train` leaves it, samples, verdicts; test/ of the chosen cell and the baseline
    DIR/settings.json           whose sweep it is

What is whole is not made again, so that the same command goes on after a stop. The test tasks are asked of two cells
alone, once it is known which: nothing is chosen by them.
"""

import json
import os
from pathlib import Path
from typing import Any

from ibft.console import Console
from ibft.errors import DataError
from ibft.experiment.begin import begin
from ibft.experiment.jobs import Job, run_jobs
from ibft.reproduce.sentences import counted
from ibft.sweep.grid import Cell
from ibft.sweep.plan import TEST, VALIDATION, Sweep, config_of, tasks_of
from ibft.sweep.work import ask_test, run_cell

Tree = dict[str, Any]
WIDE = 160  # letters of a table's line in a file, which has no edge


def run_sweep(sweep: Sweep, *, jobs: int | None) -> None:
    """Makes the sweep in its folder, or goes on with it.

    Args:
        jobs: runs at once; default one a core, on a GPU one.

    Raises:
        ConfigError: the folder holds something else. SetupError: no matplotlib, no such device. IBFTError: whatever a
            job raises, with its name before it.
    """
    from ibft.evaluation.score_plots import need_matplotlib
    from ibft.run import choose_device

    need_matplotlib("sweep")
    on_gpu = choose_device(sweep.base).type == "cuda"
    workers, threads = jobs or (1 if on_gpu else os.cpu_count() or 1), None if on_gpu else 1
    console = Console()
    begin(sweep.out, sweep.settings(threads), file="settings.json", what="sweep")
    console.line(describe(sweep))
    judge_jobs = max(1, (os.cpu_count() or 1) // workers)

    def run(made: list[Job], what: str) -> list[Tree]:
        return run_jobs(made, workers=workers, threads=threads, console=console, what=what)

    results = run([cell_job(sweep, cell, seed, judge_jobs) for cell, seed in sweep.runs], "runs")

    from ibft.sweep.report import add_test, make_report

    report = make_report(sweep, threads, results)
    if TEST in sweep.splits and report["chosen"]:
        asked = [
            (cell, seed)
            for (cell, seed), result in zip(sweep.runs, results, strict=True)
            if cell.name in (sweep.baseline.name, report["chosen"]) and "diverged" not in result
        ]
        counted = run([test_job(sweep, cell, seed, judge_jobs) for cell, seed in asked], "test tasks")
        add_test(report, [(cell.name, seed) for cell, seed in asked], counted)
    write_all(report, sweep.out, console)


def describe(sweep: Sweep) -> str:
    cells, seeds = (counted(len(each), what) for each, what in ((sweep.cells, "cell"), (sweep.seeds, "seed")))
    grid = " x ".join(f"{len(values)} of {key}" for key, values in sweep.grid.items())
    return f"sweep: {cells} ({grid}) and the baseline, {seeds}: {len(sweep.runs):,} runs, in {sweep.out}"


def folder_of(sweep: Sweep, cell: Cell, seed: int) -> Path:
    return sweep.out / "runs" / cell.name / f"seed-{seed}"


def cell_job(sweep: Sweep, cell: Cell, seed: int, judge_jobs: int) -> Job:
    arguments = {
        "config": config_of(cell.config), "seed": seed, "tasks": tasks_of(sweep.tasks),
        "groups": list(sweep.groups) if sweep.groups else None,
    }  # fmt: skip
    here = here_of(sweep, cell, VALIDATION, judge_jobs)
    return Job(f"{cell.name}, seed {seed}", folder_of(sweep, cell, seed), run_cell, arguments, here)


def test_job(sweep: Sweep, cell: Cell, seed: int, judge_jobs: int) -> Job:
    arguments = {"config": config_of(cell.config), "seed": seed, "tasks": tasks_of(sweep.tasks)}
    folder = folder_of(sweep, cell, seed) / "test"
    return Job(f"{cell.name}, seed {seed}", folder, ask_test, arguments, here_of(sweep, cell, TEST, judge_jobs))


def here_of(sweep: Sweep, cell: Cell, split: str, judge_jobs: int) -> Tree:
    """Bundled rows go by their files' names: under the bundled name `train` would ask the test tasks at every end."""
    from ibft.config import BUNDLED
    from ibft.tiny import task_file

    data = {}
    if cell.config.data.path == BUNDLED:
        held_out = cell.config.data.eval_path
        data = {
            "data.path": str(task_file("train")),
            "data.eval_path": str(task_file("validation")) if held_out in (None, BUNDLED) else held_out,
        }
    return {"data": data, "problems": sweep.splits.get(split), "judge_jobs": judge_jobs, **(sweep.groups or {})}


def write_all(report: Tree, out: Path, console: Console) -> None:
    """sweep.json, sweep.csv, figures/; the table, and what they say in sentences."""
    from ibft.sweep.figures import draw_figures
    from ibft.sweep.report import sentences_of, table_of, to_csv

    report["sentences"] = sentences_of(report)
    texts = {"sweep.json": json.dumps(report, indent=1, allow_nan=False) + "\n", "sweep.csv": to_csv(report)}
    try:
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}") from error
    drawn = list(draw_figures(report, out / "figures"))
    if not console.rich.is_terminal:
        console.rich.width = WIDE
    console.rich.print(table_of(report))
    for sentence in report["sentences"]:
        console.line(f"- {sentence}")
    for line in drawn:
        console.line(line)
    console.line(f"every number: {out / 'sweep.json'}; a row a run: {out / 'sweep.csv'}")
