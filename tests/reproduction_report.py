"""A small report of a reproduction, made up: every model, 3 seeds, 12 tasks, 3 temperatures. What it says is chosen by
the caller, so that a claim can be made to come out either way."""

import math
import random
from typing import Any

SEEDS = [0, 1, 2]
TASKS = 12
TEMPERATURES = (0.2, 0.6, 1.0)
MAIN = 0.6  # the others of FT and IB-FT alone
STEPS = (0, 20, 40, 80)
LAYERS = (3, 5)

MODELS = {  # name -> what, base, changes
    "base": ("the base, before fine-tuning", None, {}),
    "FT": ("plain fine-tuning (alpha 0)", "base", {"ib.alpha": 0}),
    "IB-FT": ("information-bottleneck fine-tuning", "base", {"ib.alpha": 0.1}),
    "IB-FT, beta 0": ("without the prediction term", "base", {"ib.beta": 0}),
    "IB-FT, deterministic z": ("without noise", "base", {"ib.deterministic": True}),
    "FT, top 10 % dropped": ("plain, without the most memorised rows", "base", {"data.drop_ids": "most.json"}),
    "FT, random 10 % dropped": ("plain, without as many random rows", "base", {"data.drop_ids": "random.json"}),
    "twin base": ("a base that was not told any of the rows", None, {}),
    "FT from the twin base": ("plain fine-tuning of the twin", "twin base", {"ib.alpha": 0}),
    "FT from perturbed weights": ("plain fine-tuning of the base with noise on its weights", "base", {"ib.alpha": 0}),
}
SOLVED = {  # share of the samples that pass
    "base": 0.15, "FT": 0.45, "IB-FT": 0.7, "IB-FT, beta 0": 0.6, "IB-FT, deterministic z": 0.55,
    "FT, top 10 % dropped": 0.5, "FT, random 10 % dropped": 0.45, "twin base": 0.15, "FT from the twin base": 0.75,
    "FT from perturbed weights": 0.5,
}  # fmt: skip
MIN_K = {"memorised": 0.4, "rest": 2.0, "unseen": 2.1}  # mean of the base's scores
SPREAD = {"FT": 0.1, "IB-FT": 0.03}  # nats between one decile and the next at the end of training
WIDTH = {"base": 0.2, "FT": 0.3, "IB-FT": 0.1}  # L2 / norm


def make_report(
    *, solved: dict[str, float] | None = None, min_k: dict[str, float] | None = None,
    spread: dict[str, float] | None = None, width: dict[str, float | None] | None = None,
    suites: tuple[str, ...] = ("tiny",), n: int = 10, tasks: int = TASKS,
) -> dict[str, Any]:  # fmt: skip
    """Deterministic. solved, min_k, spread, width: instead of the entries of SOLVED, MIN_K, SPREAD, WIDTH."""
    random_ = random.Random(0)
    shares, means = SOLVED | (solved or {}), MIN_K | (min_k or {})
    trained = [name for name in MODELS if name not in ("base", "twin base")]
    return {
        "kind": "ibft-fast reproduction",
        "version": 1,
        "name": "tiny",
        "settings": {"train": {"max_steps": 80, "learning_rate": 3e-3}, "ib": {"layer": 5}, "temperatures": [0.2, 0.6]},
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13.0", "bitsandbytes": None},
        "device": "CPU (1 threads)",
        "seeds": SEEDS,
        "models": [
            {"name": name, "what": what, "base": base, "changes": changes}
            for name, (what, base, changes) in MODELS.items()
        ],
        "suites": {suite: {"tasks": [f"{suite}/test/{i}" for i in range(tasks)]} for suite in suites},
        "counts": [
            {
                "model": name, "seed": seed, "suite": suite, "temperature": temperature, "n": n,
                "passed": passed(random_, shares[name], n, tasks),
            }
            for suite in suites for temperature in TEMPERATURES for name in MODELS
            if temperature == MAIN or name in ("FT", "IB-FT")
            for seed in (SEEDS if name in trained else [None])
        ],
        "memorization": [
            {
                "model": name, "seed": seed, "data": data, "k": 20,
                "values": [abs(random_.gauss(mean * (0.5 if name == "FT" and data != "unseen" else 1), 0.3))
                           for _ in range(60)],
            }
            for name, seeds in (("base", [None]), ("twin base", [None]), ("FT", SEEDS))
            for data, mean in (means | ({"memorised": means["rest"]} if name == "twin base" else {})).items()
            for seed in seeds
        ],
        "deciles": [
            {"model": name, "seed": seed, "step": step, "ce": decile_losses(step, slope, seed)}
            for name, slope in (SPREAD | (spread or {})).items() for seed in SEEDS for step in STEPS[1:]
        ] + [{"model": "base", "seed": None, "step": 0, "ce": decile_losses(0, 0, 0)}],
        "geometry": [
            {"model": name, "seed": seed, "layer": layer} | distances(value, seed)
            for name, value in (WIDTH | (width or {})).items() for layer in LAYERS
            for seed in ([None] if name == "base" else SEEDS)
        ],
        "training": [
            {
                "model": name, "seed": seed, "steps": 80, "eval_ce": 0.05 + 0.001 * seed, "ce": 0.01,
                "kl": 1.6 if name.startswith("IB") else None, "ce_z": 2.5 if name.startswith("IB") else None,
                "active_dims": 0.4 if name.startswith("IB") else None,
                "warnings": ["held-out CE rises: 3 < 5 & falls never"] if (name, seed) == ("FT", 1) else [],
            }
            for name in trained for seed in SEEDS
        ],
    }  # fmt: skip


def passed(random_: random.Random, share: float, n: int, tasks: int) -> list[int]:
    """The tasks differ in how hard they are, alike for every model; of some all samples pass, of others none."""
    hard = [0.8 * math.sin(3 * task) * min(share, 1 - share) ** 0.5 for task in range(tasks)]
    return [sum(random_.random() < share + shift for _ in range(n)) for shift in hard]


def decile_losses(step: int, slope: float, seed: int) -> list[float]:
    """Straight lines over the deciles, from a slope that all share to the model's own."""
    done = step / STEPS[-1]
    start, end = 0.1, slope * (1 + 0.05 * seed)
    return [2 - 1.9 * done + (start + (end - start) * done) * decile for decile in range(10)]


def distances(value: float | None, seed: int | None) -> dict[str, Any]:
    at = None if value is None else value * (1 + 0.02 * (seed or 0))

    def estimate(scale: float) -> dict[str, float | None]:
        if at is None:
            return dict.fromkeys(("sample", "estimate", "low", "high"))
        return {"sample": 1.1 * scale * at, "estimate": scale * at, "low": 0.9 * scale * at, "high": 1.1 * scale * at}

    return {"l2": estimate(20), "l2_normalised": estimate(1), "angle": estimate(40), "angle_centred": estimate(300)}
