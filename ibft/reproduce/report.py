"""From the results of a reproduction's jobs to report.json, and to what is made of it: figures and the page.

The report holds every number and no clock, path or date: two runs of one recipe on one machine have equal bytes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ibft.console import Console
from ibft.reproduce.place import Place

Tree = dict[str, Any]
KIND = "ibft-fast reproduction"
REPORT, RECIPE, FIGURES, PAGE = "report.json", "recipe.yaml", "figures", "report.html"
WHAT = {
    "base": "before fine-tuning",
    "twin base": "has read as many documents of the same form as the base, but each only once, and no fine-tuning row",
    "perturbed base": "the base with noise on its weights",
}


def make_report(
    place: Place, of_bases: Sequence[Tree], inside: Sequence[Tree], of_models: Sequence[Tree],
    memorised: Sequence[int] | None, threads: int | None,
) -> Tree:  # fmt: skip
    """The tables, without what is computed from them.

    Args:
        of_bases, inside: results of `ask_base` and `look_into_base`, in the order of `place.bases`.
        of_models: of `make_model`, seed by seed in the order of the recipe's models.
        memorised: numbers of the rows that were told to the base; None: nobody knows.
    """
    from ibft.evaluation.generate_samples import versions
    from ibft.rundir import commit_of_source

    recipe = place.recipe
    asked = [
        *((name, None, {**answers, **more}) for name, answers, more in zip(place.bases, of_bases, inside, strict=True)),
        *(
            (model.name, seed, answers)
            for (seed, model), answers in zip(
                ((seed, model) for seed in recipe.seeds for model in recipe.models), of_models, strict=True
            )
        ),
    ]
    rows = {
        table: [
            {"model": name, "seed": seed, **row}
            for name, seed, answers in asked
            for row in rows_of_table(answers, table)
        ]
        for table in ("counts", "deciles", "geometry")
    }
    tasks = {row["suite"]: {"tasks": row["tasks"]} for row in rows["counts"]}
    return {
        "kind": KIND, "version": 1, "name": recipe.name, "what": recipe.what,
        "settings": recipe.model_dump(mode="json"),
        "commit": commit_of_source(), "versions": versions(), "device": device_of(threads), "seeds": list(recipe.seeds),
        "models": [*({"name": name, "what": WHAT[name], "base": None, "changes": {}} for name in place.bases)]
        + [
            {"name": model.name, "what": model.what, "base": model.base, "changes": model.changes}
            for model in recipe.models
        ],
        "suites": tasks,
        "counts": [{key: value for key, value in row.items() if key != "tasks"} for row in rows["counts"]],
        "memorization": [
            {"model": name, "seed": seed, "data": group, "k": recipe.memorization.k, "values": values}
            for name, seed, answers in asked
            for group, values in groups_of(answers["memorization"], memorised)
        ],
        "deciles": rows["deciles"], "geometry": rows["geometry"],
        "training": [
            {"model": name, "seed": seed, **answers["training"]}
            for name, seed, answers in asked
            if "training" in answers
        ],
    }  # fmt: skip


def rows_of_table(answers: Tree, table: str) -> list[Tree]:
    rows: list[Tree] = answers.get(table, [])
    return rows


def groups_of(
    scores: Mapping[str, list[list[float]]], memorised: Sequence[int] | None
) -> Iterator[tuple[str, list[float]]]:
    """(name of the rows, their Min-K%): the fine-tuning rows in two where it is known which the base has read."""
    for name, pairs in scores.items():
        if name != "data":
            yield name, [value for _, value in pairs]
        elif memorised is None:
            yield "fine-tuning data", [value for _, value in pairs]
        else:
            told = set(memorised)
            yield "memorised", [value for number, value in pairs if number in told]
            yield "rest", [value for number, value in pairs if number not in told]


def device_of(threads: int | None) -> str:
    import torch

    from ibft.run import device_name

    if threads is None and torch.cuda.is_available():
        return device_name(torch.device("cuda"))
    return f"CPU ({threads or torch.get_num_threads()} threads a job)"


def write_all(report: Tree, out: Path, console: Console) -> None:
    """report.json with its claims, the figures, the page."""
    from ibft.analysis.figures_run import run_figures
    from ibft.reproduce.claims import make_claims
    from ibft.reproduce.page import write_page

    report["claims"] = make_claims(report)
    recipe = {key: value for key, value in report["settings"].items() if value is not None}
    (out / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (out / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    run_figures([str(out)], str(out / FIGURES))
    write_page(report, out / FIGURES, out / PAGE)
    for claim in report["claims"]:
        console.line(f"- {claim['text']}")
    console.line(f"report: {out / PAGE}; every number: {out / REPORT}; figures: {out / FIGURES}")
