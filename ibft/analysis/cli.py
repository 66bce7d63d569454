"""`ibft-fast analyze`: what a model knows by heart, and what fine-tuning did to it. Nothing heavy is imported before a
command runs."""

from pathlib import Path
from typing import Annotated

import typer

from ibft.commands import Debug, one_line_errors
from ibft.errors import ConfigError

app = typer.Typer(help="Score how well a model knows its data by heart; split the data by it.", no_args_is_help=True)


@app.command()
def memorization(
    model: Annotated[str | None, typer.Option(help="Folder, hub id or bundled:tiny.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="File, hub id or bundled:tiny: rows as training takes them, of question and answer, or of text.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter, as a run saves it.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="File of scores; gone on with if there.")] = Path(
        "scores.jsonl"
    ),
    text: Annotated[
        str, typer.Option(help="response: its tokens, given the prompt; whole: all tokens but the first.")
    ] = "response",
    k: Annotated[float, typer.Option("--k", "-k", help="Percent of a text's tokens, the least likely.")] = 20,
    quantization: Annotated[str, typer.Option(help="none or nf4.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Tokens at once, padding included.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Longer texts are cut to so many tokens.")] = 2048,
    split: Annotated[str, typer.Option(help="Of a hub data set or bundled:tiny.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Only the first rows; default all.")] = None,
    rescore: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Scores that get another --k, written to --out; without any model."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Min-K% Prob and Min-K%++ of each row: how well the model knows it by heart. Lower = more memorised.

    The end-of-sequence token is not scored. Stopped, the same command goes on and gives the same file. Each line holds
    its row's number in the data (from 0), both scores, and the log-probability of every token.

    Examples: `ibft-fast analyze memorization --model ID --adapter runs/a/adapter --data rows.jsonl`,
    `ibft-fast analyze memorization --rescore scores.jsonl -k 10 -o scores-10.jsonl`

    Exit codes: 0 done, 2 arguments, 3 data (also: the file was made with other settings), 4 model or device, 5 the
    model gives NaN, 6 out of memory, 130 interrupted.
    """
    with one_line_errors(debug):
        from ibft.analysis.memorization import run_memorization

        run_memorization(
            model=model, data=data, adapter=adapter, out=str(out), text=text, k=k, quantization=quantization,
            device=device, batch_tokens=batch_tokens, max_length=max_length, split=split, limit=limit, rescore=rescore,
        )  # fmt: skip


@app.command()
def partition(
    scores: Annotated[str, typer.Argument(help="File of scores, as `analyze memorization` writes it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the files of ids.")],
    share: Annotated[float, typer.Option(help="Percent of the rows, of most, least and random.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the random rows and of the matching.")] = 0,
    by: Annotated[str, typer.Option(help="min_k or min_k_pp.")] = "min_k",
    match_lengths: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Other scores: also write rows of both, as many of each length."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Split scored rows into most and least memorised, deciles, and a random control: a JSON file of row numbers each.

    Example: `ibft-fast analyze partition scores.jsonl --share 10 -o parts`

    Exit codes: 0 done, 2 arguments, 3 data.
    """
    with one_line_errors(debug):
        from ibft.analysis.partition import run_partition

        run_partition(scores, out=str(out), share=share, seed=seed, by=by, match_lengths=match_lengths)


@app.command()
def geometry(
    model: Annotated[str, typer.Option(help="Folder, hub id or bundled:tiny: the base.")],
    data: Annotated[str, typer.Option(help="File, hub id or bundled:tiny: rows as training takes them.")],
    most: Annotated[str, typer.Option(help="File of the ids of the most memorised rows, as `partition` writes it.")],
    least: Annotated[str, typer.Option(help="The same, of the least memorised.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="One more model, the base with it; again for more.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="The same, of ordinary rows: where angles are seen from; default drawn.")
    ] = None,
    layers: Annotated[str, typer.Option(help="auto (that of ib.layer=auto), all, or numbers: 5,10,20.")] = "auto",
    pool: Annotated[str, typer.Option(help="Of a response's tokens: mean or last.")] = "mean",
    quantization: Annotated[str, typer.Option(help="none or nf4.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 8,
    max_length: Annotated[int, typer.Option(help="Longer samples are cut to so many tokens.")] = 2048,
    split: Annotated[str, typer.Option(help="Of a hub data set or bundled:tiny.")] = "train",
    bootstrap: Annotated[int, typer.Option(help="Resamples of the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the resamples and of the reference drawn.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Report, JSON.")] = Path("geometry.json"),
    debug: Debug = False,
) -> None:
    """How far apart the most and the least memorised rows lie in the hidden states of a base and of its fine-tunings.

    Example: `ibft-fast analyze geometry --model ID --adapter FT=runs/ft/adapter --adapter IB-FT=runs/ib/adapter
    --data rows.jsonl --most parts/most_memorised.json --least parts/least_memorised.json`

    Exit codes: 0 done, 2 arguments, 3 data, 4 model or device, 5 the model gives NaN, 6 out of memory.
    """
    with one_line_errors(debug):
        from ibft.analysis.geometry_run import run_geometry

        run_geometry(
            models=named_models(model, adapter or []), data=data, most=most, least=least, reference=reference,
            layers=layers, pool=pool, quantization=quantization, device=device, batch_size=batch_size,
            max_length=max_length, split=split, bootstrap=bootstrap, seed=seed, out=str(out),
        )  # fmt: skip


@app.command()
def figures(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folder of a reproduction, or its report.json.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; of several runs one in it each.")] = Path("figures"),
    debug: Debug = False,
) -> None:
    """Draw a reproduction's figures (PNG and SVG) and its table of scores (CSV, Markdown), from its report alone.

    Example: `ibft-fast analyze figures runs/tiny -o figures`

    Exit codes: 0 done (a figure without rows is not drawn, and a line says so), 2 arguments, 3 data, 4 no matplotlib.
    """
    with one_line_errors(debug):
        from ibft.analysis.figures_run import run_figures

        run_figures(runs, str(out))


def named_models(model: str, adapters: list[str]) -> dict[str, tuple[str, str | None]]:
    """Of `--adapter NAME=DIR`. Raises ConfigError: no name, or one that is taken."""
    models: dict[str, tuple[str, str | None]] = {"base": (model, None)}
    for text in adapters:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--adapter: got {text}, expected NAME=DIR")
        if name in models:
            raise ConfigError(f"--adapter: two models are named {name}")
        models[name] = (model, folder)
    return models
