"""The command line. Nothing heavy is imported until a command runs: `ibft-fast --help` answers at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibft.analysis.cli import app as analyze
from ibft.commands import Debug, one_line_errors
from ibft.data.overlap import N
from ibft.errors import ConfigError
from ibft.evaluation.cli import app as evaluate
from ibft.reproduce.cli import app as reproduce
from ibft.setup_cli import doctor, init, schema
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


def print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"ibft-fast {version('ibft-fast')}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Before any command."""


app.add_typer(evaluate, name="evaluate")
app.add_typer(analyze, name="analyze")
app.add_typer(reproduce, name="reproduce")

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [section.key=value ...]", show_default=False)
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Tokenise again (data.cache=false).")]
CACHE_OFF, DETERMINISTIC = ("data.cache=false",), ("runtime.deterministic=true",)
PREVIEWED_ROWS = 2000


@app.command()
def train(
    arguments: Arguments = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Run directory; default runs/<time>.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the newest whole checkpoint of -o; never; or a checkpoint's path.")
    ] = "never",
    force_resume: Annotated[
        bool, typer.Option("--force-resume", help="Go on though configuration, data, tokenizer or base differ.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits each time (runtime.deterministic=true).")
    ] = False,
    no_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """Fine-tune. With no argument: the bundled tiny model on the bundled tasks, offline, in a few minutes on a CPU.

    Examples: `ibft-fast train preset=paper-evol`, `ibft-fast train my.yaml ib.alpha=0.2 -o runs/a02`,
    `ibft-fast train model.name_or_path=Qwen/Qwen2.5-Coder-1.5B data.path=rows.jsonl`.

    Exit codes: 0 done, 2 configuration, 3 data, 4 environment, 5 non-finite loss,
    6 out of memory, 130/138/143 interrupted and saved (`--resume auto -o RUN` goes on).
    """
    with one_line_errors(debug):
        options = [*(CACHE_OFF if no_cache else ()), *(DETERMINISTIC if deterministic else ())]
        config, notices = _configure(arguments, options)
        from ibft.run import run_training

        code = run_training(config, out, dry_run=dry_run, resume=resume, force_resume=force_resume, notices=notices)
    raise typer.Exit(code)


@app.command()
def preview(
    arguments: Arguments = None,
    count: Annotated[int, typer.Option("-n", help="Samples to show.", min=0)] = 3,
    rows: Annotated[
        int, typer.Option(help="Only the first rows are tokenised; 0: all of them.", min=0)
    ] = PREVIEWED_ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: JSON on stdout, words on stderr.")] = False,
    no_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """What `train` with the same arguments would teach: samples with what is taught of them marked, lengths, packing,
    and the first problem. Needs the tokenizer, and no weights.

    Examples: `ibft-fast preview preset=paper-evol`, `ibft-fast preview data.path=rows.jsonl data.template=alpaca -n 5`.

    Exit codes: 0 done, 2 configuration, 3 data, 4 environment.
    """
    with one_line_errors(debug):
        config, notices = _configure(arguments, CACHE_OFF if no_cache else [])
        from ibft.preview import run_preview

        run_preview(config, count=count, rows=rows, as_json=as_json, notices=notices)


@app.command()
def decontaminate(
    data: Annotated[
        str | None, typer.Option(help="Rows: file, folder, hub id or bundled:tiny.", show_default=False)
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", help="SUITE=FILE of evaluation problems, or a file of rows; several.", show_default=False
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a hub data set or bundled:tiny.")] = "train",
    n: Annotated[int, typer.Option("-n", help="Words in a row that a row shares with a problem.")] = N,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="File of the rows to drop, for data.drop_ids.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Rows of training data that give evaluation problems away, and rows that are there twice.

    Examples: `ibft-fast decontaminate --data rows.jsonl --against humaneval=HumanEval.jsonl.gz -o drop.json`, then
    `ibft-fast train data.path=rows.jsonl data.drop_ids=drop.json`.

    Exit codes: 0 done, 2 arguments, 3 data, 4 environment.
    """
    with one_line_errors(debug):
        if data is None:
            raise ConfigError("--data: name a file, a folder, a hub id or bundled:tiny")
        from ibft.data.decontaminate import run_decontaminate

        run_decontaminate(data, against or [], split=split, n=n, out=out)


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


@app.command()
def merge(
    run: Annotated[str, typer.Argument(help="Run folder (its adapter/), or an adapter's folder.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the merged model.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    verify: Annotated[
        bool, typer.Option(help="Compare every tensor, and logits, before the folder gets its name.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Add the adapter into the full-precision base: a model folder for vLLM, llama.cpp, Ollama (docs/deploy.md).

    Takes a few GB of memory, whatever the base. All of it is written, or nothing.

    Examples: `ibft-fast merge runs/a -o merged`, `ibft-fast merge runs/a/adapter-best -o best --dtype fp16`.

    Exit codes: 0 done, 2 arguments, 4 base or adapter missing or damaged, no room on the disk, or a merge that
    does not stand the comparison.
    """
    with one_line_errors(debug):
        from ibft.merge import run_merge

        run_merge(run, out, dtype, verify=verify)


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="Run folder, an adapter's folder, or a merged model.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option(help="Default: each line of stdin is one, until it ends.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of each token's distribution; 1: all of it.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same prompts in the same order get the same answers.")] = 0,
    adapter: Annotated[
        str | None,
        typer.Option(help="Of a run folder: adapter (the last, the default) or adapter-best.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Ask a trained model, with the run's own template: one prompt, or one after another at a terminal or from a pipe.

    Examples: `ibft-fast generate runs/a --prompt "Write a function that adds two numbers."`,
    `ibft-fast generate runs/a --temperature 0.8`, `ibft-fast generate merged < prompts.txt`.

    Exit codes: 0 done (stdin has ended, or Ctrl-C at a prompt), 2 arguments, 3 a prompt that is no text or that the
    template refuses, 4 base or adapter missing or damaged, 6 out of memory, 130 interrupted.
    """
    with one_line_errors(debug):
        from ibft.chat import run_generate

        run_generate(
            run, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            adapter=adapter,
        )  # fmt: skip


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The page, .html.")] = Path("report.html"),
    debug: Debug = False,
) -> None:
    """One HTML page about one or several training runs: curves, warnings, scores, and the settings that differ.

    It needs no network and holds no script. A run that is under way or stopped early is shown as far as it is.

    Examples: `ibft-fast report runs/a`, `ibft-fast report runs/a runs/b -o compare.html`.

    Exit codes: 0 done, 2 arguments or a folder without a run, 3 a file that cannot be read or written.
    """
    with one_line_errors(debug):
        from ibft.run_report.page import run_report

        run_report(runs, out)


for command in (sweep, init, schema, doctor):  # after those that most people come for: `--help` has this order
    app.command()(command)


def _configure(arguments: list[str] | None, options: Sequence[str] = ()) -> "tuple[Config, list[str]]":
    """The configuration that the arguments name, and notices. options: overrides that come last."""
    given = list(arguments or [])
    config_file = None
    if given and ("=" not in given[0] or given[0].endswith((".yaml", ".yml"))):
        if given[1:2] == ["="]:
            raise ConfigError(f"got {' '.join(given[:3])!r}, expected section.key=value, without spaces")
        config_file = given.pop(0)
    given += options
    from ibft.load_config import load_config

    return load_config(config_file, given)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
