"""`ibft-fast reproduce`: the paper's pipeline, from a recipe to a report of every number, figures and a page.

    bases     made (tiny alone), each scored for memorisation, sampled and judged
    parts     the most and least memorised rows, deciles and random rows, by the base's Min-K%
    models    each model of each seed: trained, sampled, judged, scored, and measured in its hidden states
    report    report.json, figures/, report.html

A folder a base and a model; what is whole in one is not made again, so that the same command goes on after a stop. Two
runs with the same seeds on the same machine give the same report.json, byte by byte.
"""

import os
from pathlib import Path
from typing import Any

from ibft.console import Console
from ibft.experiment.begin import begin
from ibft.experiment.jobs import Job, run_jobs
from ibft.reproduce.place import Place, check, gather, hash_files
from ibft.reproduce.recipe import ModelRecipe, Recipe, overrides_of
from ibft.reproduce.work import ask_base, look_into_base, make_base, make_model

Tree = dict[str, Any]
ALL = 10**6  # checkpoints


def run_reproduction(recipe: Recipe, out: Path, *, workers: int, threads: int | None) -> None:
    """Makes the reproduction in `out`, or goes on with it.

    Args:
        workers: jobs at once. threads: of torch in each; the numbers depend on it, so that it is part of the settings.

    Raises:
        ConfigError: `out` holds something else. IBFTError: whatever a job raises, with the job's name before it.
    """
    console = Console()
    check(recipe)
    settings = {
        "recipe": recipe.model_dump(mode="json", exclude={"what", "measured"}), "threads": threads,
        "files": hash_files(recipe),
    }  # fmt: skip
    begin(out, settings, file="recipe.json", what="reproduction")
    place = gather(recipe, out, judge_jobs=max(1, (os.cpu_count() or 1) // workers))
    run = lambda jobs, what: run_jobs(jobs, workers=workers, threads=threads, console=console, what=what)  # noqa: E731
    made = run([making(place, name) for name in place.bases[:2]], "bases") if recipe.bases else []
    if recipe.bases:
        run([making(place, name) for name in place.bases[2:]], "perturbed base")
    of_bases = run([asking(place, name) for name in place.bases], "questions to the bases")
    split(place)
    inside = run([looking(place, name) for name in place.bases], "hidden states of the bases")
    of_models = run([training(place, model, seed) for seed in recipe.seeds for model in recipe.models], "models")
    from ibft.reproduce.report import make_report, write_all

    memorised = made[0]["memorised"] if made else None
    write_all(make_report(place, of_bases, inside, of_models, memorised, threads), out, console)


def making(place: Place, name: str) -> Job:
    assert place.recipe.bases is not None
    source = None if name != "perturbed base" else place.base("base")
    arguments = {"kind": name, "bases": place.recipe.bases.model_dump(mode="json")}
    return Job(
        f"making the {name}", place.folder(name) / "made", make_base, arguments, place.here(name) | {"source": source}
    )


def asking(place: Place, name: str) -> Job:
    arguments = {"model": place.model, "asked": place.asked(), "thorough": name == "base"}
    return Job(name, place.folder(name) / "asked", ask_base, arguments, place.here(name))


def looking(place: Place, name: str) -> Job:
    arguments = {"model": place.model, "asked": place.asked()}
    return Job(name, place.folder(name) / "inside", look_into_base, arguments, place.here(name))


def training(place: Place, model: ModelRecipe, seed: int) -> Job:
    recipe = place.recipe
    scored = model.name in recipe.scored
    settings = {**recipe.train, **model.changes, "runtime.seed": seed}
    if scored:
        settings |= {"checkpoint.save_steps": recipe.score_steps, "checkpoint.keep_last": ALL}
    arguments = {
        "overrides": overrides_of(settings), "seed": seed, "drop": model.drop, "model": place.model,
        "asked": place.asked(), "scored": scored,
    }  # fmt: skip
    return Job(
        f"{model.name}, seed {seed}", place.folder(model.name, seed), make_model, arguments, place.here(model.base)
    )


def split(place: Place) -> None:
    """The rows by how well the base knows them: parts/*.json."""
    from ibft.analysis.partition import run_partition

    share = place.recipe.memorization.share
    run_partition(str(place.folder("base") / "asked" / "scores" / "data.jsonl"), out=str(place.parts), share=share)
