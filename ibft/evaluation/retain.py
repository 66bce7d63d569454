"""`ibft-fast evaluate retain`: does the model still know what it knew before? General tasks of lm-evaluation-harness.

The harness asks and scores; this loads the model as the other commands do, writes what was found, and holds it against
an earlier report: the base's, or plain fine-tuning's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.local_model import LocalModel, check_adapter

Scores = dict[str, dict[str, dict[str, float | None]]]  # task -> metric -> value and stderr


def run_retain(
    *, model: str, adapter: str | None = None, tasks: str = "mmlu,gsm8k", include_path: str | None = None,
    num_fewshot: int | None = None, limit: int | None = None, batch_size: int = 8, quantization: str = "none",
    device: str = "auto", baseline: str | None = None, out: str = "retain.json", seed: int = 0,
) -> None:  # fmt: skip
    """Scores the model on tasks, and prints them beside a baseline's.

    Args:
        model, adapter, quantization, device: as `evaluate generate`.
        tasks: names of the harness, with commas between them. include_path: folder of further tasks (YAML).
        num_fewshot: examples before each question; default the task's own. limit: questions a task; None: all.
        baseline: an earlier report of the same tasks. out: the report, JSON.

    Raises:
        ConfigError: an argument is out of range, or a task is unknown.
        DataError: the baseline cannot be read, or has other tasks, another limit or other examples.
        SetupError: lm-evaluation-harness is missing; no such model, device or data set.
    """
    for option, value, least in (
        ("--limit", limit, 1),
        ("--batch-size", batch_size, 1),
        ("--num-fewshot", num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{option}: got {value}, expected {least} or more")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks: got {tasks!r}, expected names with commas between them")
    settings: dict[str, Any] = {"tasks": names, "num_fewshot": num_fewshot, "limit": limit}
    before = read_report(baseline, settings) if baseline else None
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SetupError(
            "evaluate retain needs lm-evaluation-harness: pip install -e '.[retain]' in a clone"
        ) from error
    from ibft.console import Console

    console = Console()
    manager = TaskManager(include_path=include_path)
    known = {*manager.all_tasks}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--tasks: lm-evaluation-harness {lm_eval.__version__} has no task {', '.join(unknown)}")
    adapter_hash = None if adapter is None else check_adapter(adapter)
    here = LocalModel.of(model, adapter, quantization, device)
    by = f"{model} + {adapter}" if adapter else model
    console.line(f"retain: {', '.join(names)}; {by} ({here.name()}), lm-evaluation-harness {lm_eval.__version__}")
    try:
        host = HFLM(pretrained=here.load(), tokenizer=here.tokenizer, batch_size=batch_size, device=here.device.type)
        found = lm_eval.simple_evaluate(
            model=host, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:  # a task's data set
        raise SetupError(f"the data of {', '.join(names)} cannot be had: {str(error).partition(chr(10))[0]}") from error
    scores = scores_of(found["results"])
    report = settings | {
        "model": model, "adapter": adapter, "adapter_sha256": adapter_hash, "quantization": quantization,
        "device": here.name(), "seed": seed, "lm_eval": lm_eval.__version__, "scores": scores,
    }  # fmt: skip
    show(scores, before, console)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: {error.strerror or error}") from error
    console.line(f"report: {out}")


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Of the harness's results, whose keys read `metric,filter` and `metric_stderr,filter`."""
    scores: Scores = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric} ({kind})"
            error = float(stderr) if isinstance(stderr, int | float) else None
            scores.setdefault(task, {})[name] = {"value": float(value), "stderr": error}
    return scores


def read_report(path: str, settings: Mapping[str, Any]) -> Scores:
    try:
        report = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"--baseline: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"--baseline: {path} is not JSON: {error}") from error
    if not isinstance(report, dict) or not isinstance(report.get("scores"), dict):
        raise DataError(f"--baseline: {path} is no report of evaluate retain")
    for name, value in settings.items():
        if report.get(name) != value:
            raise DataError(f"--baseline: {path} has {name} {report.get(name)}, this has {value}")
    scores: Scores = report["scores"]
    return scores


def show(scores: Scores, before: Scores | None, console: Any) -> None:
    """console: an `ibft.console.Console`."""
    from rich.box import SIMPLE
    from rich.table import Table

    columns = ["task", "metric", "score", "standard error"] + (["baseline", "difference"] if before else [])
    table = Table(*columns, box=SIMPLE)
    for task, metrics in scores.items():
        for metric, found in metrics.items():
            value, stderr = found["value"] or 0.0, found["stderr"]
            row = [task, metric, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}"]
            if before:
                earlier = before.get(task, {}).get(metric, {}).get("value")
                row += ["", ""] if earlier is None else [f"{earlier:.4f}", f"{value - earlier:+.4f}"]
            table.add_row(*row)
    console.rich.print(table)
