"""The jobs of a reproduction: what is done in a process of its own for each base and for each model of each seed.

Files of a job's folder, beside done.json and log.txt: model/ (a base that was made), run/ (the training run), scores/
(Min-K% and cross-entropy of each row), samples/ (with verdicts), geometry.json.

`here`, in every job: where things lie, and what else is this machine's; no part of what the job is.
"""

import json
from pathlib import Path
from typing import Any

from ibft.data.sources import load_rows
from ibft.experiment.measure import (
    CHECKPOINTS,
    RUN,
    SAMPLES,
    SCORES,
    Model,
    Suite,
    ce_of_groups,
    count_passes,
    geometry,
    score,
    train,
)

Tree = dict[str, Any]
DECILES = [f"decile_{d}" for d in range(10)]
RESPONSES = "scores/response.jsonl"  # of a base, before training


def make_base(folder: Path, *, kind: str, bases: Tree, here: Tree) -> Tree:
    """kind: base, twin base or perturbed base, which is made of the one in `source`. Writes folder/model."""
    from ibft.tiny.memorise import choose_memorised, perturb, read_on

    model = folder / "model"
    if kind == "perturbed base":
        perturb(Path(here["source"]), model, noise=bases["noise"], seed=bases["seed"])
        return {}
    rows = load_rows(here["data"])
    numbers = choose_memorised(len(rows), bases["memorised_share"], bases["seed"])
    told = [rows[number] for number in numbers] if kind == "base" else None
    loss = read_on(
        told, model, share=bases["reading_share"], steps=bases["steps"],
        learning_rate=bases["learning_rate"], seed=bases["seed"],
    )  # fmt: skip
    return {"loss": loss, "memorised": numbers if told else []}


def ask_base(folder: Path, *, model: Tree, asked: Tree, thorough: bool, here: Tree) -> Tree:
    """Its scores of the fine-tuning rows and of the comparison sets, and how many samples of each problem pass."""
    base = Model(**model, base=here["base"], adapter=None)
    ce_of_rows(base, asked, here, folder / RESPONSES)
    return {
        "counts": count_all(base, asked, here, folder, thorough=thorough, seed=0),
        "memorization": score_all(base, asked, here, folder),
    }


def look_into_base(folder: Path, *, model: Tree, asked: Tree, here: Tree) -> Tree:
    """What needs the parts of the rows, which are made of its scores."""
    base = Model(**model, base=here["base"], adapter=None)
    scores = Path(here["asked"]) / RESPONSES
    return {
        "geometry": geometry_of(base, asked, here, folder),
        "deciles": [{"step": 0, "ce": ce_of_groups(scores, deciles(here))}],
    }


def make_model(
    folder: Path, *, overrides: list[str], seed: int, drop: str | None, model: Tree, asked: Tree, scored: bool,
    here: Tree,
) -> Tree:  # fmt: skip
    """One fine-tuning, and what is asked of it; of a scored one all that is asked of a base too."""
    named = {"model.name_or_path": here["base"], "data.path": here["data"], "data.eval_path": here["eval"]}
    if drop is not None:
        named["data.drop_ids"] = str(Path(here["parts"]) / f"{drop}.json")
    overrides = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in named.items() if value is not None)]
    ended = train(folder, overrides)
    tuned = Model(**model, base=here["base"], adapter=str(folder / RUN / "adapter"))
    return {
        "training": ended,
        "counts": count_all(tuned, asked, here, folder, thorough=scored, seed=seed),
        "memorization": score_all(tuned, asked, here, folder) if scored else {},
        "deciles": deciles_over_training(model, asked, here, folder, ended["steps"]) if scored else [],
        "geometry": geometry_of(tuned, asked, here, folder),
    }


def deciles_over_training(model: Tree, asked: Tree, here: Tree, folder: Path, last_step: int) -> list[Tree]:
    """Of each checkpoint of the run, and of its end."""
    adapters = {int(path.name.split("-")[1]): path for path in (folder / CHECKPOINTS).glob("step-*")}
    adapters[last_step] = folder / RUN / "adapter"
    found = []
    for step in sorted(adapters):
        scores = folder / SCORES / f"step-{step}.jsonl"
        tuned = Model(**model, base=here["base"], adapter=str(adapters[step]))
        ce_of_rows(tuned, asked, here, scores)
        found.append({"step": step, "ce": ce_of_groups(scores, deciles(here))})
    return found


def deciles(here: Tree) -> list[list[int]]:
    return [json.loads((Path(here["parts"]) / f"{name}.json").read_text(encoding="utf-8"))["ids"] for name in DECILES]


def ce_of_rows(model: Model, asked: Tree, here: Tree, out: Path) -> None:
    """Of what fine-tuning teaches, whatever text Min-K% is of."""
    out.parent.mkdir(parents=True, exist_ok=True)
    score(model, here["data"], out, **{**asked["scoring"], "text": asked["taught"]})


def score_all(model: Model, asked: Tree, here: Tree, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(row, Min-K%) of the fine-tuning rows (under "data") and of each comparison set."""
    from ibft.analysis.memorization import read_scores

    (folder / SCORES).mkdir(parents=True, exist_ok=True)
    found = {}
    for number, (name, data) in enumerate({"data": here["data"], **here["comparison"]}.items()):
        out = folder / SCORES / ("data.jsonl" if number == 0 else f"comparison-{number}.jsonl")
        score(model, data, out, **asked["scoring"])
        found[name] = [(each.id, each.min_k) for each in read_scores(str(out))[1]]
    return found


def count_all(model: Model, asked: Tree, here: Tree, folder: Path, *, thorough: bool, seed: int) -> list[Tree]:
    found = []
    for name, settings in asked["suites"].items():
        temperatures = [settings["temperature"], *(settings["more_temperatures"] if thorough else ())]
        keys = ("suite", "n", "descriptions", "prompt_style", "max_new_tokens", "batch_size", "rule")
        suite = Suite(
            temperatures=tuple(dict.fromkeys(temperatures)),
            problems=here["problems"][name],
            **{key: settings[key] for key in keys},
        )
        counted = count_passes(model, suite, folder / SAMPLES / name, seed=seed, jobs=here["judge_jobs"])
        found += [{"suite": name, **row} for row in counted]
    return found


def geometry_of(model: Model, asked: Tree, here: Tree, folder: Path) -> list[Tree]:
    parts = Path(here["parts"])
    return geometry(
        model, here["data"], str(parts / "most_memorised.json"), str(parts / "least_memorised.json"),
        folder / "geometry.json", max_length=asked["scoring"]["max_length"], **asked["geometry"],
    )  # fmt: skip
