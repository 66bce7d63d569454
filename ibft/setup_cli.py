"""`ibft-fast init | schema | doctor`: what comes before a first run."""

from typing import Annotated

import typer

from ibft.commands import Debug, one_line_errors


def init(
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper-origen, paper-evol, authors-code or tiny; default: what `train` does with no argument.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Your model, a hub id or folder: the rest are the defaults for one.", show_default=False),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Your rows: file, folder or hub id.", show_default=False)] = None,
    out: Annotated[str, typer.Option("-o", "--out", help="The file; - for stdout.")] = "config.yaml",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write a configuration to start from: every key, its value, what it means and takes.

    Examples: `ibft-fast init --model Qwen/Qwen2.5-Coder-1.5B --data rows.jsonl`,
    `ibft-fast init --preset paper-evol -o evol.yaml`, then `ibft-fast train evol.yaml --dry-run`.

    Exit codes: 0 done, 2 arguments or a file that is there already, 3 a file that cannot be written.
    """
    with one_line_errors(debug):
        from ibft.starter import run_init

        run_init(preset, out, force=force, model=model, data=data)


def schema(
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="The file; default or -: stdout.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """JSON Schema of a configuration file: editors complete and check one by it.

    Examples: `ibft-fast schema -o ibft-fast.schema.json`, beside a file that `ibft-fast init` has written.

    Exit codes: 0 done, 3 a file that cannot be written.
    """
    with one_line_errors(debug):
        from ibft.config_schema import run_schema

        run_schema(out)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Can this machine train? Versions, GPU, a kernel that runs, memory, disk, hub, sandbox: what is there, and what to
    do where something is not.

    Of the lines, `missing` is what training needs, `warning` what can be mended, `note` what need not be. The hub is
    asked once, unless HF_HUB_OFFLINE is set.

    Examples: `ibft-fast doctor`, `ibft-fast doctor --json`.

    Exit codes: 0 `ibft-fast train` can run here, 4 something that it needs is missing.
    """
    with one_line_errors(debug):
        from ibft.doctor import CHECKS, run_doctor

        code = run_doctor(CHECKS, as_json=as_json)
    raise typer.Exit(code)
