"""`ibft-fast evaluate`: samples of a model, verdicts on them, and what they score. Nothing heavy is imported before a
command runs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ibft.commands import Debug, one_line_errors

app = typer.Typer(
    help="Sample a model's solutions, judge them in a sandbox, score Pass@k and Pass@k(m).", no_args_is_help=True
)


class RuleName(StrEnum):
    official = "official"
    strict = "strict"


Suite = Annotated[
    str,
    typer.Option(
        help="humaneval, humaneval-plus, mbpp, mbpp-plus, verilogeval-v1, verilogeval-v2, verilogeval-v2-complete, "
        "gsm8k or jsonl-tests."
    ),
]
Problems = Annotated[
    str | None, typer.Option(help="File of problems or hub id; default the suite's own on the hub.", show_default=False)
]


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder, hub id or bundled:tiny; of a server, the name it knows.")],
    suite: Suite,
    problems: Problems = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter, as a run saves it.")] = None,
    descriptions: Annotated[
        str | None, typer.Option(help="VerilogEval's problem statements: task_id, detail_description.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="File of samples; gone on with if there.")] = Path(
        "samples.jsonl"
    ),
    n: Annotated[int, typer.Option("--n", "-n", help="Samples a problem and temperature.")] = 1,
    temperature: Annotated[str, typer.Option(help="One or more, e.g. 0.2,0.6,1.0; 0: greedy.")] = "0",
    top_p: Annotated[float, typer.Option(help="Nucleus of each token's distribution; 1: all of it.")] = 0.95,
    prompt_style: Annotated[
        str, typer.Option(help="auto (as the adapter was taught), plain, chat, released, alpaca or origen.")
    ] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Sample i of a task has its own seed, drawn from this.")] = 0,
    quantization: Annotated[str, typer.Option(help="none or nf4.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    base_url: Annotated[
        str | None, typer.Option(help="Of an OpenAI-compatible server, e.g. http://localhost:8000/v1.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once, of a server.")] = 8,
    debug: Debug = False,
) -> None:
    """Sample solutions of a suite's problems. Stopped, the same command goes on and gives the same samples.

    Example: `ibft-fast evaluate generate --model Qwen/Qwen2.5-Coder-1.5B --suite humaneval -n 20 --temperature 0.2,0.6`

    Exit codes: 0 done, 2 arguments, 3 data, 4 model, device or server, 130 interrupted.
    """
    with one_line_errors(debug):
        from ibft.evaluation.generate_samples import run_generate

        run_generate(
            model=model, adapter=adapter, suite=suite, problems=problems, descriptions=descriptions, out=str(out), n=n,
            temperature=temperature, prompt_style=prompt_style, max_new_tokens=max_new_tokens, batch_size=batch_size,
            seed=seed, top_p=top_p, quantization=quantization, device=device, base_url=base_url,
            concurrency=concurrency,
        )  # fmt: skip


@app.command()
def judge(
    suite: Suite,
    samples: Annotated[str | None, typer.Option(help="JSON lines: task_id, completion.", show_default=False)] = None,
    problems: Problems = None,
    rule: Annotated[
        RuleName, typer.Option(help="official: the suite's own to the letter; strict: made not to be fooled.")
    ] = RuleName.strict,
    out: Annotated[Path, typer.Option("-o", "--out", help="File of verdicts; gone on with if there.")] = Path(
        "verdicts.jsonl"
    ),
    jobs: Annotated[int | None, typer.Option(help="Samples at once; default one a core.", show_default=False)] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds a sample; default the suite's own.", show_default=False)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="First judge the reference solutions.")] = False,
    unsafe: Annotated[
        bool,
        typer.Option("--run-without-isolation", help="Where no sandbox works: run the programs as you, under limits."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Run each sample against its problem's tests, in a sandbox without network and without your files.

    Example: `ibft-fast evaluate judge --suite humaneval --problems HumanEval.jsonl.gz --samples samples.jsonl`

    Exit codes: 0 done, 2 arguments, 3 data (also: some lines are no samples; the rest is judged), 4 no sandbox or no
    simulator here, 130 interrupted.
    """
    with one_line_errors(debug):
        from ibft.evaluation.judge_files import run_judge

        run_judge(
            suite=suite, problems=problems, samples=samples, out=str(out), rule=rule.value, jobs=jobs, timeout=timeout,
            check=check, allow_limits=unsafe,
        )  # fmt: skip


@app.command()
def score(
    verdicts: Annotated[str, typer.Argument(help="JSON lines: task_id, passed.")],
    k: Annotated[str, typer.Option(help="e.g. 1,5,10.")] = "1",
    baseline: Annotated[str | None, typer.Option(help="Verdicts to compare with, problem by problem.")] = None,
    out: Annotated[str | None, typer.Option("-o", "--out", help="report.json, .csv or .md.")] = None,
    plots: Annotated[str | None, typer.Option(help="Folder for figures.")] = None,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    debug: Debug = False,
) -> None:
    """Unbiased Pass@k and Pass@k(m) (at least m of k samples pass) with intervals, and the difference to a baseline.

    Example: `ibft-fast evaluate score verdicts.jsonl --baseline fine-tuned.jsonl --k 1,5,10 --out report.json`

    Exit codes: 0 done, 2 arguments (also: k above the number of samples), 3 data, 4 no matplotlib for the figures.
    """
    with one_line_errors(debug):
        from ibft.evaluation.score import run_score

        run_score(verdicts, baseline=baseline, ks=k, out=out, plots=plots, seed=seed)


@app.command()
def retain(
    model: Annotated[str, typer.Option(help="Folder, hub id or bundled:tiny.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter, as a run saves it.")] = None,
    tasks: Annotated[str, typer.Option(help="Of lm-evaluation-harness.")] = "mmlu,gsm8k",
    include_path: Annotated[str | None, typer.Option(help="Folder of further tasks.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples; default each task's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions a task; default all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at once.")] = 8,
    quantization: Annotated[str, typer.Option(help="none or nf4.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    baseline: Annotated[str | None, typer.Option(help="An earlier report to compare with.")] = None,
    out: Annotated[str, typer.Option("-o", "--out", help="Report, JSON.")] = "retain.json",
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 0,
    debug: Debug = False,
) -> None:
    """What the model still knows of other things: MMLU, GSM8K, ... by lm-evaluation-harness.

    Example: `ibft-fast evaluate retain --model ID -o base.json`, then the same with
    `--adapter runs/a/adapter --baseline base.json -o tuned.json`

    Exit codes: 0 done, 2 arguments, 3 data, 4 the harness, the model or a task's data is missing.
    """
    with one_line_errors(debug):
        from ibft.evaluation.retain import run_retain

        run_retain(
            model=model, adapter=adapter, tasks=tasks, include_path=include_path, num_fewshot=num_fewshot, limit=limit,
            batch_size=batch_size, quantization=quantization, device=device, baseline=baseline, out=out, seed=seed,
        )  # fmt: skip
