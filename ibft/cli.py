"""The command line. Nothing heavy is imported until a command runs: `ibft-fast --help` answers at once."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibft.analysis.cli import app as analyze
from ibft.commands import Debug, one_line_errors
from ibft.evaluation.cli import app as evaluate
from ibft.reproduce.cli import app as reproduce
from ibft.sweep.cli import sweep

if TYPE_CHECKING:
    from ibft.config import Config

app = typer.Typer(
    name="ibft-fast",
    help="Information-bottleneck fine-tuning (IB-FT) of code LLMs in 4 bits, on one GPU or none.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluate, name="evaluate")
app.add_typer(analyze, name="analyze")
app.add_typer(reproduce, name="reproduce")
app.command()(sweep)

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [section.key=value ...]", show_default=False)
]


@app.command()
def train(
    arguments: Arguments = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Run directory; default runs/<time>.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune. With no argument: the bundled tiny model on the bundled tasks, offline, in a few minutes on a CPU.

    Examples: `ibft-fast train preset=paper-evol`, `ibft-fast train my.yaml ib.alpha=0.2 -o runs/a02`,
    `ibft-fast train model.name_or_path=Qwen/Qwen2.5-Coder-1.5B data.path=rows.jsonl`.

    Exit codes: 0 done, 2 configuration, 3 data, 4 environment, 5 non-finite loss,
    6 out of memory, 130/143 interrupted and saved.
    """
    with one_line_errors(debug):
        config, notices = _configure(arguments)
        from ibft.run import run_training

        code = run_training(config, out, dry_run=dry_run, notices=notices)
    raise typer.Exit(code)


@app.command()
def estimate(
    arguments: Arguments = None,
    memory: Annotated[
        float | None,
        typer.Option(
            "--memory", metavar="GIB", help="Plan for a card of this size (runtime.memory_budget).", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """What `train` with the same arguments would take: memory, disk, steps, arithmetic; and whether it fits.

    Reads (of a hub id: downloads) no more of the base than its config.json, and needs no GPU.

    Examples: `ibft-fast estimate preset=paper-evol --memory 24`, `ibft-fast estimate my.yaml train.optim=adamw_8bit`.

    Exit codes: 0 done, 2 configuration, 3 data, 4 environment.
    """
    with one_line_errors(debug):
        config, notices = _configure(arguments, [] if memory is None else [f"runtime.memory_budget={memory}"])
        from ibft.estimate import run_estimate

        run_estimate(config, notices)


def _configure(arguments: list[str] | None, options: Sequence[str] = ()) -> "tuple[Config, list[str]]":
    """The configuration that the arguments name, and notices. options: overrides that come last."""
    given = list(arguments or [])
    config_file = None
    if given and ("=" not in given[0] or given[0].endswith((".yaml", ".yml"))):
        config_file = given.pop(0)
    given += options
    from ibft.load_config import load_config

    loaded = load_config(config_file, given)
    # transformers 5.23 deprecates names that transformers 5.17 and PEFT still need: nothing a user can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    return loaded


def main() -> None:
    app()


if __name__ == "__main__":
    main()
