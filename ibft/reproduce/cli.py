"""`ibft-fast reproduce`. Nothing heavy is imported before a command runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ibft.commands import Debug, one_line_errors

app = typer.Typer(help="The paper's pipeline, from a recipe to a report.", no_args_is_help=True)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", help="Folder; default reproductions/<recipe>.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show the steps, their time and memory.")]
Jobs = Annotated[int | None, typer.Option(help="Models at once; default one a core, on a GPU one.", show_default=False)]


@app.command()
def tiny(
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Little of everything, in under three minutes.")] = False,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """On the bundled base and tasks, two CPU cores and no network: does a base that has memorised a quarter of the rows
    face a barrier, and does IB-FT break it? Under an hour.

    Stopped, the same command goes on. A job has one thread, so that the numbers do not depend on how many run at once;
    --jobs defaults to one a core. key=value changes the recipe (seeds=[0,1], bases.steps=50) or training
    (ib.alpha=0.05).

    Examples: `ibft-fast reproduce tiny --quick`, `ibft-fast reproduce tiny -o reproductions/a05 ib.alpha=0.05`

    Exit codes: 0 done, 2 arguments, 3 data, 4 no sandbox or no figures here, 5 non-finite loss, 6 out of memory,
    130/143 interrupted.
    """
    reproduce("tiny-quick" if quick else "tiny", overrides, out, jobs, dry_run, debug)


@app.command()
def origen(overrides: Overrides = None, out: Out = None, dry_run: DryRun = False, debug: Debug = False) -> None:
    """At full size on one GPU: OriGen's Verilog data, VerilogEval v1 Machine and Human.

    Stopped, the same command goes on. --dry-run needs no GPU and downloads no weights.

    Exit codes: as `reproduce tiny`.
    """
    reproduce("origen", overrides, out, None, dry_run, debug)


@app.command()
def evol(overrides: Overrides = None, out: Out = None, dry_run: DryRun = False, debug: Debug = False) -> None:
    """At full size on one GPU: Evol-CodeAlpaca's data, HumanEval.

    Stopped, the same command goes on. --dry-run needs no GPU and downloads no weights.

    Exit codes: as `reproduce tiny`.
    """
    reproduce("evol", overrides, out, None, dry_run, debug)


@app.command("from")
def from_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.yaml), or the name of a shipped one: gsm8k, text.")],
    overrides: Overrides = None,
    out: Out = None,
    jobs: Jobs = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """The same pipeline from a recipe of your own: another model, other data, other problems, no line of code.

    Start from a copy of a shipped one (ibft/recipes): gsm8k for mathematics, text for plain text, evol for Python.

    Exit codes: as `reproduce tiny`.
    """
    reproduce(recipe, overrides, out, jobs, dry_run, debug)


def reproduce(
    recipe: str, overrides: list[str] | None, out: Path | None, jobs: int | None, dry_run: bool, debug: bool
) -> None:
    with one_line_errors(debug):
        from ibft.errors import ConfigError
        from ibft.reproduce.recipe import load_recipe

        if jobs is not None and jobs < 1:
            raise ConfigError(f"--jobs: got {jobs}, expected 1 or more")
        chosen = load_recipe(recipe, overrides or [])
        folder = out or Path("reproductions") / chosen.name
        import torch

        on_gpu = torch.cuda.is_available() and chosen.train.get("runtime.device") != "cpu"
        workers, threads = jobs or (1 if on_gpu else os.cpu_count() or 1), None if on_gpu else 1
        if dry_run:
            from ibft.reproduce.steps import show_steps

            show_steps(chosen, folder, workers=workers)
            return
        from ibft.reproduce.run import run_reproduction

        run_reproduction(chosen, folder, workers=workers, threads=threads)
