"""`ibft-fast sweep`. Nothing heavy is imported before the command runs."""

from pathlib import Path
from typing import Annotated

import typer

from ibft.commands import Debug, one_line_errors
from ibft.evaluation.cli import RuleName

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [section.key=value ...]", show_default=False)
]


def sweep(
    arguments: Arguments = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="A key's values; default the paper's of alpha, beta, layer.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of training and sampling, each of every cell.")] = "0,1,2",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; gone on with if it holds this sweep.")] = Path(
        "sweep"
    ),
    suite: Annotated[str, typer.Option(help="Of the tasks; see `evaluate generate`.")] = "jsonl-tests",
    validation: Annotated[
        str | None, typer.Option(help="Tasks to choose a cell by; default the bundled data's.", show_default=False)
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Other tasks, asked of the chosen cell and the baseline.", show_default=False)
    ] = None,
    descriptions: Annotated[
        str | None, typer.Option(help="VerilogEval's problem statements, of all tasks.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Samples a task.")] = 10,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 0.6,
    k: Annotated[str | None, typer.Option(help="Of Pass@k(k), as 1,5,10; default 1,10.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest completion; default eval.max_new_tokens.", show_default=False)
    ] = None,
    rule: Annotated[RuleName, typer.Option(help="Of the judge.")] = RuleName.strict,
    most: Annotated[
        str | None, typer.Option(help="Ids of the most memorised rows, for geometry.", show_default=False)
    ] = None,
    least: Annotated[str | None, typer.Option(help="Ids of the least memorised rows.", show_default=False)] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at once; default one a core, on a GPU one.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the runs, make nothing.")] = False,
    debug: Debug = False,
) -> None:
    """A grid of runs, every cell with every seed: which weights and layer of the bottleneck to take.

    The cell is chosen on the validation tasks, and it and plain fine-tuning are then compared on the test tasks, which
    nothing else sees. Without tasks the held-out cross-entropy chooses. Stopped, the same command goes on. Values are
    YAML, as between brackets: `--grid ib.layer=4,[4,6]` are two.

    Examples: `ibft-fast sweep --dry-run`, `ibft-fast sweep --grid ib.alpha=0.005,0.01,0.05 --seeds 0,1 -o sweeps/a`,
    `ibft-fast sweep my.yaml --suite humaneval --validation dev.jsonl --test test.jsonl --grid ib.layer=16,20`

    Exit codes: 0 done, 2 arguments or configuration, 3 data, 4 no sandbox, device or figures here, 6 out of memory,
    130/143 interrupted.
    """
    with one_line_errors(debug):
        from ibft.errors import ConfigError
        from ibft.sweep.plan import Asked, plan_sweep

        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs: got {jobs}, expected 1 or more")
        given = list(arguments or [])
        has_file = bool(given) and ("=" not in given[0] or given[0].endswith((".yaml", ".yml")))
        path = given.pop(0) if has_file else None
        asked = Asked(suite, validation, test, descriptions, n, temperature, k, max_new_tokens, rule.value, most, least)
        planned, notices = plan_sweep(path, given, grid or [], seeds, asked, out)
        from ibft.console import Console

        for notice in notices:
            Console().notice(notice)
        if dry_run:
            from ibft.sweep.outlook import show_sweep

            show_sweep(planned, jobs=jobs)
            return
        from ibft.sweep.run import run_sweep

        run_sweep(planned, jobs=jobs)
