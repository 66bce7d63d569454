"""What is asked of a model in an experiment, each question in a function that finds what an earlier call has answered.

Each is one command of `ibft-fast` with its file in the model's folder: `train`, `analyze memorization`, `evaluate
generate` and `judge`, `analyze geometry`. Nothing here has a clock in its result: the same settings give the same
numbers.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.analysis.memorization import rows_of, run_memorization
from ibft.evaluation.suites import Rule
from ibft.load_config import load_config

Tree = dict[str, Any]
RUN, CHECKPOINTS, SCORES, SAMPLES = "run", "run/checkpoints", "scores", "samples"  # in a model's folder
ENDED_WITH = ("ce", "kl", "ce_z", "active_dims")


@dataclass(frozen=True)
class Model:
    """A base (folder, hub id, `bundled:tiny`) and an adapter on it, if any, as they are loaded."""

    base: str
    adapter: str | None
    quantization: str


@dataclass(frozen=True)
class Suite:
    """Problems, and how their samples are drawn. problems: None for the suite's own on the hub."""

    suite: str
    n: int
    temperatures: tuple[float, ...]
    problems: str | None = None
    descriptions: str | None = None
    prompt_style: str = "auto"
    max_new_tokens: int = 512
    batch_size: int = 16
    rule: Rule = "strict"


def train(folder: Path, overrides: list[str]) -> Tree:
    """`ibft-fast train` with these section.key=value; the run in folder/run. How it ended.

    A run that was stopped begins again, and what was asked of its adapter is forgotten.
    """
    from ibft.run import run_training

    run = folder / RUN
    if not (run / "result.json").exists():
        for old in (run, folder / SCORES, folder / SAMPLES):
            shutil.rmtree(old, ignore_errors=True)
        config, notices = load_config(None, overrides)
        if code := run_training(config, run, notices=notices):
            raise SystemExit(code)  # interrupted
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    last = result["last"]
    return {
        "steps": result["steps"],
        "eval_ce": result["eval_ce"][-1] if result["eval_ce"] else None,
        **{name: last.get(name) for name in ENDED_WITH},
        "warnings": result["warnings"],
    }


def score(model: Model, data: str, out: Path, *, text: str, k: float, max_length: int, batch_tokens: int) -> None:
    """Min-K% of each row, to `out`."""
    run_memorization(
        model=model.base, adapter=model.adapter, quantization=model.quantization, data=data, out=str(out), text=text,
        k=k, max_length=max_length, batch_tokens=batch_tokens,
    )  # fmt: skip


def ce_of_groups(scores: Path, groups: Sequence[Sequence[int]]) -> list[float | None]:
    """Mean cross-entropy, nats a scored token, of the rows of each group; None: none of them has a score."""
    _header, *scored = rows_of(str(scores))
    rows = {row["id"]: row["log_probs"] for row in scored}
    found: list[float | None] = []
    for group in groups:
        log_probs = [value for number in group for value in rows.get(number, ())]
        found.append(-sum(log_probs) / len(log_probs) if log_probs else None)
    return found


def count_passes(model: Model, suite: Suite, folder: Path, *, seed: int, jobs: int | None = None) -> list[Tree]:
    """`n` samples of each problem at each temperature, judged: {temperature, n, tasks, passed} of each temperature.

    jobs: samples judged at once; default one a core.
    """
    from ibft.evaluation.generate_samples import run_generate
    from ibft.evaluation.judge_files import run_judge
    from ibft.evaluation.score import count_verdicts

    folder.mkdir(parents=True, exist_ok=True)
    counted = []
    for temperature in suite.temperatures:
        samples, verdicts = (str(folder / f"{kind}-t{temperature:g}.jsonl") for kind in ("samples", "verdicts"))
        run_generate(
            model=model.base, adapter=model.adapter, quantization=model.quantization, suite=suite.suite,
            problems=suite.problems, descriptions=suite.descriptions, out=samples, n=suite.n,
            temperature=f"{temperature:g}", prompt_style=suite.prompt_style, max_new_tokens=suite.max_new_tokens,
            batch_size=suite.batch_size, seed=seed,
        )  # fmt: skip
        run_judge(suite=suite.suite, problems=suite.problems, samples=samples, out=verdicts, rule=suite.rule, jobs=jobs)
        (counts,) = count_verdicts(verdicts).counts.values()
        counted.append(
            {"temperature": temperature, "n": suite.n, "tasks": list(counts), "passed": [c for _, c in counts.values()]}
        )
    return counted


def geometry(
    model: Model, data: str, most: str, least: str, out: Path, *, layers: str, pool: str, max_length: int
) -> list[Tree]:
    """Distances and angles of the most and the least memorised rows: {layer, l2, l2_normalised, ...} of each layer."""
    from ibft.analysis.geometry_run import run_geometry

    run_geometry(
        models={"model": (model.base, model.adapter)}, quantization=model.quantization, data=data, most=most,
        least=least, layers=layers, pool=pool, max_length=max_length, out=str(out),
    )  # fmt: skip
    report = json.loads(out.read_text(encoding="utf-8"))
    return [{name: value for name, value in row.items() if name != "model"} for row in report["results"]]
