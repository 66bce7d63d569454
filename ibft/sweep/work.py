"""The jobs of a sweep: a cell's run of one seed, with what is asked of it; the test tasks, asked of few.

Files of a job's folder, beside done.json and log.txt: run/ (the training run), samples-t*.jsonl and verdicts-t*.jsonl,
geometry.json; test/ is the folder of the second job.

`here`, in both: where things lie, and what else is this machine's; no part of what the job is.
"""

import json
from pathlib import Path
from typing import Any

from ibft.errors import NonFiniteError
from ibft.experiment.measure import RUN, Model, Suite, count_passes, geometry, train

Tree = dict[str, Any]


def run_cell(folder: Path, *, config: Tree, seed: int, tasks: Tree | None, groups: Tree | None, here: Tree) -> Tree:
    """A fine-tuning, and what it is worth on the validation tasks. A loss that is no number is an answer too.

    config: resolved. tasks: fields of `Suite`. groups: of rows, for geometry; each None: nothing is asked.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in flat(config)]
    overrides += [f"runtime.seed={seed}"]
    overrides += [f"{key}={json.dumps(value)}" for key, value in here["data"].items()]
    try:
        ended = train(folder, overrides)
    except NonFiniteError as error:
        return {"diverged": str(error)}
    counts = None if tasks is None else count(folder, folder, config, seed, tasks, here)
    found = None
    if groups is not None:
        data = here["data"].get("data.path", config["data"]["path"])
        found = geometry(
            model_of(config, folder), data, here["most"], here["least"], folder / "geometry.json", layers="auto",
            pool="mean", max_length=config["data"]["max_length"],
        )  # fmt: skip
    return {"training": ended, "counts": counts, "geometry": found}


def ask_test(folder: Path, *, config: Tree, seed: int, tasks: Tree, here: Tree) -> Tree:
    """The run of the folder above, on the test tasks."""
    return {"counts": count(folder, folder.parent, config, seed, tasks, here)}


def count(folder: Path, trained: Path, config: Tree, seed: int, tasks: Tree, here: Tree) -> Tree:
    settings = tasks | {"temperatures": tuple(tasks["temperatures"]), "problems": here["problems"]}
    suite = Suite(**settings)
    (counted,) = count_passes(model_of(config, trained), suite, folder, seed=seed, jobs=here["judge_jobs"])
    return counted


def model_of(config: Tree, folder: Path) -> Model:
    model = config["model"]
    return Model(model["name_or_path"], str(folder / RUN / "adapter"), model["quantization"])


def flat(config: Tree) -> list[tuple[str, Any]]:
    """section.key and value of each."""
    return [
        (f"{section}.{key}" if key else section, value)
        for section, content in config.items()
        for key, value in (content.items() if isinstance(content, dict) else [("", content)])
    ]
