"""Which activations a run gives up so that its step fits a memory budget, and what to change where nothing fits.

The formulas are in `ibft.footprint`. Recomputation costs arithmetic, so the planner looks for the mix of modes
(ibft/recompute.py) with the least of it; offloading costs traffic to the host, and comes when that is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ibft.config import Config
from ibft.errors import ConfigError
from ibft.footprint import (
    CUDA_CONTEXT,
    GIB,
    Estimate,
    Load,
    ModelShape,
    Plan,
    Recompute,
    Setup,
    estimate,
    flops,
    recompute_flops,
)

__all__ = [
    "CUDA_CONTEXT",
    "GIB",
    "MARGIN",
    "Choice",
    "Estimate",
    "Load",
    "ModelShape",
    "Plan",
    "Recompute",
    "Setup",
    "changed",
    "choose_plan",
    "estimate",
    "flops",
    "less_memory",
]

MARGIN = 0.05  # of the budget, left free: fragmentation, and what the formulas leave out


@dataclass(frozen=True)
class Choice:
    """A plan, what it is predicted to take, and whether that leaves the margin of the budget (None: not known).

    change: where it does not fit, the overrides that would make it fit; empty if none was found.
    """

    plan: Plan
    estimate: Estimate
    budget: int | None
    fits: bool
    change: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        plan = self.plan
        return {
            "layers": {mode: plan.modes.count(mode) for mode in ("none", "mlp", "full")},
            "activation_offloading": plan.activation_offloading,
            "offload_embeddings": plan.offload_embeddings,
            "predicted_bytes": self.estimate.total,
            "budget_bytes": self.budget,
        }


def choose_plan(s: Setup, budget: int | None) -> Choice:
    """The plan of `train.gradient_checkpointing`; for "auto" the least arithmetic done again that fits.

    Args:
        s: model, configuration, kind of device.
        budget: bytes for tensors (of a card, less `CUDA_CONTEXT`). None: no limit.

    "auto" first looks for the cheapest mix of modes, in operations done again. If even recomputing every block is too
    much, the blocks' inputs wait in host memory, and at last the embeddings: on a GPU, where there is such a place.

    Raises:
        ConfigError: embeddings that are the head too were to be offloaded.
    """
    if s.config.model.offload_embeddings and s.shape.tied:
        raise ConfigError(
            "model.offload_embeddings: this model's embeddings are its head too (tied), which the device needs"
        )
    choice = _best(s, budget)
    return choice if choice.fits else replace(choice, change=_cheapest_change(s, choice.budget or 0))


def less_memory(s: Setup, choice: Choice) -> tuple[str, ...]:
    """What to change where memory has run out though `choice` was to fit: the mildest overrides by which a tenth less
    is predicted; empty where there is none."""
    budget = int(0.9 * choice.estimate.total / (1 - MARGIN))
    smaller = choose_plan(s, budget)
    if not smaller.fits:
        return smaller.change
    card = (budget + (0 if s.on_cpu else CUDA_CONTEXT)) / GIB
    return (f"runtime.memory_budget={card:.3g}",)  # the same settings, more of it recomputed


def _best(s: Setup, budget: int | None) -> Choice:
    found = None
    for plan in _plans(s, budget):
        found = estimate(s, plan)
        if budget is None or found.total <= (1 - MARGIN) * budget:
            return Choice(plan, found, budget, True)
    assert found is not None
    return Choice(plan, found, budget, False)


def _plans(s: Setup, budget: int | None) -> Iterator[Plan]:
    """The plans that are allowed, the most welcome first."""
    train, L = s.config.train, s.shape.layers
    offload = train.activation_offloading and not s.on_cpu
    embeddings = s.config.model.offload_embeddings and not s.on_cpu
    asked = train.gradient_checkpointing
    if asked != "auto":
        mode: Recompute = "none"
        if asked:
            mode = "mlp" if asked == "mlp" else "full"
        if mode == "mlp" and not train.fused_kernels:
            mode = "full"  # as `set_recompute` does: only the fused MLP can
        yield Plan((mode,) * L, offload and mode == "full", embeddings)
        return
    every: Recompute = "full"
    full = Plan((every,) * L, offload, embeddings)
    if train.fused_kernels:  # otherwise more is saved than the formulas know: recompute every block
        yield from _mixes(s, budget, offload, embeddings)
    yield full
    if not s.on_cpu:
        yield replace(full, activation_offloading=True)
        if not s.shape.tied:
            yield replace(full, activation_offloading=True, offload_embeddings=True)


def _mixes(s: Setup, budget: int | None, offload: bool, embeddings: bool) -> Iterator[Plan]:
    """The mix with the least arithmetic done again that fits, if there is one."""
    L, cost = s.shape.layers, recompute_flops(s)

    def plan(full: int, mlp: int) -> Plan:
        counts: dict[Recompute, int] = {"full": full, "mlp": mlp, "none": L - full - mlp}
        modes = tuple(mode for mode, count in counts.items() for _ in range(count))
        return Plan(modes, offload and full > 0, embeddings)

    def fits(full: int, mlp: int) -> bool:
        return budget is None or estimate(s, plan(full, mlp)).total <= (1 - MARGIN) * budget

    best: tuple[int, int, int] | None = None
    for full in range(L + 1):
        if best is not None and full * cost["full"] >= best[0]:
            break
        low, high = 0, L - full  # the fewest blocks that must make gate and up again besides
        if not fits(full, high):
            continue
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(full, middle) else (middle + 1, high)
        again = full * cost["full"] + low * cost["mlp"]
        if best is None or again < best[0]:
            best = again, full, low
    if best is not None:
        yield plan(*best[1:])


def _cheapest_change(s: Setup, budget: int) -> tuple[str, ...]:
    """The first change that makes it fit, in order of least harm; nothing where none does.

    Tried: what changes no gradient, each alone and then together; every other change, alone and beside those; then
    these one after the other, each as far as it goes.
    """

    def fits(overrides: Sequence[str]) -> bool:
        return _best(changed(s, overrides), budget).fits

    harmless, harmful = list(_harmless(s)), list(_harmful(s))
    free = tuple(override for steps in harmless for override in steps[-1])
    candidates = [step for steps in harmless for step in steps] + [free]
    for steps in harmful:
        for step in steps:
            candidates += [step, (*free, *step)]
    together = free
    for steps in harmful:
        candidates += [(*together, *step) for step in steps]
        together = (*together, *steps[-1])
    return next((overrides for overrides in candidates if overrides and fits(overrides)), ())


Steps = Sequence[tuple[str, ...]]  # of one kind of change, the mildest first; each the overrides to type


def _harmless(s: Setup) -> Iterator[Steps]:
    """Changes of memory and time alone."""
    train = s.config.train
    if train.gradient_checkpointing != "auto":
        yield [("train.gradient_checkpointing=auto",)]
    if s.load.eval_rows > 1:
        yield [("train.per_device_eval_batch_size=1",)]
    rows = train.per_device_train_batch_size  # the gradient does not depend on the split
    smaller = [n for n in range(rows - 1, 0, -1) if rows % n == 0]
    if smaller:
        yield [
            (
                f"train.per_device_train_batch_size={n}",
                f"train.gradient_accumulation_steps={train.gradient_accumulation_steps * rows // n}",
            )
            for n in smaller
        ]


def _harmful(s: Setup) -> Iterator[Steps]:
    """Changes of the result too, the least harmful first."""
    train, data, lora = s.config.train, s.config.data, s.config.lora
    if train.optim == "adamw_torch_fused":
        yield [("train.optim=adamw_8bit",)]
    if s.config.model.quantization == "none":
        yield [("model.quantization=nf4",)]
    if s.itemsize == 4:
        yield [("train.mixed_precision=bf16",)]
    lengths = [n for n in (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256) if n < data.max_length]
    ranks = [n for n in (64, 32, 16, 8) if n < lora.r]
    for least in (1 / 2, 0):  # both by half at most, before either by more
        if some := [(f"data.max_length={n}",) for n in lengths if n >= least * data.max_length]:
            yield some
        if some := [(f"lora.r={n}",) for n in ranks if n >= least * lora.r]:
            yield some


def changed(s: Setup, overrides: Sequence[str]) -> Setup:
    """The setup after `section.key=value` overrides; what is known of the data stays, cut to a new length."""
    tree = s.config.model_dump()
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree[section][name] = {"true": True, "false": False}.get(value, value)
    config = Config.model_validate(tree)
    old, train = s.load, config.train
    length = min(old.length, config.data.max_length)
    shrink = train.per_device_train_batch_size * length / old.tokens
    load = replace(
        old,
        rows=train.per_device_train_batch_size,
        length=length,
        labels=math.ceil(old.labels * shrink),
        accumulation=train.gradient_accumulation_steps,
        squares=round(old.squares * shrink),
        eval_rows=min(old.eval_rows, train.per_device_eval_batch_size),
    )
    itemsize = 2 if train.mixed_precision in ("bf16", "fp16") else s.itemsize
    return replace(s, config=config, load=load, itemsize=itemsize)
