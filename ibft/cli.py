"""The command line. Nothing heavy is imported until a command runs: `ibft-fast --help` answers at once."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ibft.errors import EXIT_INTERRUPTED, IBFTError

app = typer.Typer(
    name="ibft-fast",
    help="Information-bottleneck fine-tuning (IB-FT) of code LLMs in 4 bits, on one GPU or none.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _commands() -> None:
    """Keeps `train` a sub-command while it is the only one."""


@app.command()
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [section.key=value ...]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Run directory; default runs/<time>.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fine-tune. With no argument: the bundled tiny model on the bundled tasks, offline, in a few minutes on a CPU.

    Examples: `ibft-fast train preset=paper-evol`, `ibft-fast train my.yaml ib.alpha=0.2 -o runs/a02`,
    `ibft-fast train model.name_or_path=Qwen/Qwen2.5-Coder-1.5B data.path=rows.jsonl`.

    Exit codes: 0 done, 2 configuration, 3 data, 4 environment, 5 non-finite loss,
    6 out of memory, 130/143 interrupted and saved.
    """
    given = list(arguments or [])
    config_file = None
    if given and ("=" not in given[0] or given[0].endswith((".yaml", ".yml"))):
        config_file = given.pop(0)
    try:
        from ibft.load_config import load_config

        config, notices = load_config(config_file, given)
        # transformers 5.23 deprecates names that transformers 5.17 and PEFT still need: nothing a user can act on
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
        from ibft.run import run_training

        code = run_training(config, out, dry_run=dry_run, notices=notices)
    except IBFTError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
