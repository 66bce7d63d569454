"""Reports of sweeps that were never run."""

from itertools import product

from ibft.sweep.grid import BASELINE, name_of
from ibft.sweep.plan import VALIDATION
from ibft.sweep.report import sentences_of
from ibft.sweep.select import choose, front, make_table, stable

N = 10


def make_report(grid, passed, *, seeds=(0, 1), ks=(1, N), kl=lambda values: 1.0, eval_ce=None, diverged=()):
    """passed: of the values of a cell (none: the baseline), of each problem the samples that pass, None: there are no
    tasks. kl, eval_ce: of the values, a number. diverged: (name of a cell, seed)."""
    values = [{}, *(dict(zip(grid, each, strict=True)) for each in product(*grid.values()))]
    names = [name_of(each) if each else BASELINE for each in values]
    runs = [
        {
            "cell": name, "seed": seed, "diverged": "nan" if (name, seed) in diverged else None, "steps": 2,
            "kl": kl(each) if each else None, "ce": 1.0, "ce_z": None, "active_dims": None,
            "eval_ce": eval_ce(each) + 0.01 * seed if eval_ce else 1.0, "warnings": ["step 1: a warning"],
            "geometry": [],
        }
        for name, each in zip(names, values, strict=True) for seed in seeds
    ]  # fmt: skip
    counts = [
        {"model": name, "seed": seed, "suite": VALIDATION, "temperature": 0.6, "n": N, "passed": passed(each)}
        for name, each in zip(names, values, strict=True)
        for seed in seeds
        if passed(each) is not None and (name, seed) not in diverged
    ]
    report = {
        "grid": grid, "seeds": list(seeds), "ks": list(ks), "temperature": 0.6, "counts": counts, "runs": runs,
        "tasks": {VALIDATION: [f"task {i}" for i in range(len(counts[0]["passed"]))]} if counts else {},
        "cells": [
            {"name": name, "values": each, "baseline": name == BASELINE}
            for name, each in zip(names, values, strict=True)
        ],
    }  # fmt: skip
    report["table"] = make_table(report)
    report["chosen"] = choose(report["table"])
    report["stable"] = stable(report["table"], report["chosen"])
    report["front"] = front(report["table"])
    report["sentences"] = sentences_of(report)
    return report
