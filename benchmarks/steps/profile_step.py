"""Where the time of a training step goes, by category, as torch's profiler sees it (`make profile`).

    python -m benchmarks.steps.profile_step                          the bundled model on the CPU
    python -m benchmarks.steps.profile_step --shape codellama-7b     a random base of that shape on a GPU
    python -m benchmarks.steps.profile_step ib.alpha=0               settings as `ibft-fast train` takes them

An op's own time (on a GPU: that of the kernels it launched) counts for the nearest scope around it: a registered op of
ours, an autograd node, a range that this script puts around a part of the trainer. Where no scope says more, the op's
name decides: products, or element-wise. A backward node that runs outside its range (autograd's thread on a GPU) is
found by the sequence number that it shares with its forward.

What is left: `other` is what ran and is in no list here: views, allocation, the own time of autograd and of our nodes'
Python. `idle` is the rest of the wall time, in which the profiler saw no op (no kernel): Python, and gaps between
launches. The shares are of the profiled wall time and add up to it; the profiler's own cost inflates `idle` and `other`
most, so the step's time without it is printed too.

Noise that a larger op draws for itself, such as the bottleneck's eps, counts for that op.
"""

import argparse
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.machine import folder_name, where
from benchmarks.harness.result_rows import WHERE, append, commit
from benchmarks.steps.random_base import SHAPES
from benchmarks.steps.step_case import BUNDLED, Base, bundled_config, data_of, shape_config
from benchmarks.steps.step_rows import random_samples
from ibft import loop
from ibft.loop import Trainer

PROFILE_COLUMNS = ("op", "model", "alpha", "category", "result", "ms_a_step", "share", "steps", *WHERE)
CATEGORIES = (
    "products", "dequantisation", "attention", "element-wise", "dropout/noise", "head", "bottleneck", "optimizer",
    "data", "other", "idle",
)  # fmt: skip

# Scopes: the first that matches the nearest name wins.
SCOPES = [
    (category, re.compile(pattern))
    for category, pattern in [
        ("data", r"^range: data|^Memcpy HtoD"),
        ("optimizer", r"^range: optimizer|^Optimizer\.|optimizer_update"),
        ("head", r"^range: head|cross_entrop|scatter_rows|log_softmax|nll_loss"),
        ("bottleneck", r"^range: bottleneck|^ibft_kernels::ib_|^ib_bottleneck|^ib_kl|_ibft_kernels_ib_"),
        ("dequantisation", r"dequant"),
        ("dropout/noise", r"philox|dropout"),
        ("attention", r"[aA]ttention|flash|fmha|^aten::_softmax"),
    ]
]
PRODUCTS = re.compile(r"^aten::(_?addmm_?|mm|bmm|baddbmm_?|addmv_?|mv|dot|linear|matmul)$|gemm|cutlass|cublas")
ELEMENTWISE = re.compile(
    r"^aten::_?(abs|add|addcdiv|addcmul|all|amax|any|arange|argmax|bitwise_\w+|cat|ceil|clamp\w*|clone|copy|cos|cumsum|"
    r"div|embedding|eq|exp|fill|floor|gather|ge|gt|index\w*|isfinite|isnan|le|log|logical_\w+|lt|masked_\w+|max|mean|"
    r"min|mul|ne|neg|norm|linalg_vector_norm|ones_like|pow|reciprocal|remainder|repeat_interleave|rsqrt|rsub|scatter\w*|"
    r"sigmoid\w*|silu\w*|sin|sqrt|sub|sum|tanh|to_copy|tril|triu|where|zero|zeros_like|foreach_\w+|constant_pad_nd|"
    r"pad|stack|repeat|round|square)_?$|^ibft_kernels::|elementwise|reduce_kernel|Memcpy|Memset|^rms_norm|^swiglu"
)


def scope_of(names: Iterable[str]) -> str | None:
    """The category of the nearest scope, names from the op outwards; None where none of them is one."""
    for name in names:
        for category, pattern in SCOPES:
            if pattern.search(name):
                return category
    return None


def category_of(names: list[str], forward: str | None = None) -> str:
    """The category of an op by its name and those around it, outwards; `forward`: the scope of its node's forward."""
    if scope := scope_of(names) or forward:
        return scope
    for name in names:
        if PRODUCTS.search(name):
            return "products"
        if ELEMENTWISE.search(name):
            return "element-wise"
        if name.startswith("aten::"):
            return "other"  # a view or an allocation is not what surrounds it
    return "other"


# --- ranges around parts of the trainer -----------------------------------------------------------


@contextmanager
def ranges(trainer: Trainer) -> Iterator[None]:
    """Names the parts of a step that no op's name tells: on this trainer's parts and, meanwhile, in `ibft.loop`."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"range: {name}"):
                return function(*args, **kwargs)

        return run

    def fold(*args: Any, **kwargs: Any) -> Any:
        made = original_fold(*args, **kwargs)
        if made is not None:
            made.backward = named("head", made.backward)
        return made

    original_fold = trainer.objective.fold
    with ExitStack() as stack:
        for name in ("gradient_norms", "clip_gradients"):
            stack.enter_context(mock.patch.object(loop, name, named("optimizer", getattr(loop, name))))
        for owner, name, category in [
            (trainer, "check_finite", "optimizer"),
            (trainer.optimizer, "step", "optimizer"),
            (trainer.optimizer, "zero_grad", "optimizer"),
            (trainer.scheduler, "step", "optimizer"),
            (trainer.objective, "forward", "bottleneck"),  # but for the ops of the heads in it, which are nearer
        ]:
            stack.enter_context(mock.patch.object(owner, name, named(category, getattr(owner, name))))
        stack.enter_context(mock.patch.object(trainer.objective, "fold", named("head", fold)))
        yield


# --- accounting -----------------------------------------------------------------------------------


def times_by_category(events: Sequence[Any], wall_us: float, *, on_gpu: bool) -> dict[str, float]:
    """Microseconds of each category; they add up to the wall time."""
    totals = dict.fromkeys(CATEGORIES, 0.0)
    host = [event for event in events if event.device_type == DeviceType.CPU]
    forwards = forward_scopes(host)
    for event in host:
        names, forward = names_outwards(event), forward_of(event, forwards)
        if not on_gpu:
            totals[category_of(names, forward)] += event.self_cpu_time_total
        for kernel in event.kernels:
            totals[category_of([kernel.name, *names], forward)] += kernel.duration
    if on_gpu:  # kernels that the profiler could not trace back to an op
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        totals["other"] += sum(e.self_device_time_total for e in kernels) - sum(totals.values())
    totals["idle"] = wall_us - sum(totals.values())
    return totals


def forward_scopes(host: list[Any]) -> dict[int, str | None]:
    """Of each autograd node, by its sequence number, the scope in which the forward made it.

    Ops that make no node carry the number of the next one, so the last event with a number is the node's own.
    """
    scopes: dict[int, str | None] = {}
    for event in sorted(host, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::") and "Backward" not in event.name:
            scopes[event.sequence_nr] = scope_of(names_outwards(event))
    return scopes


def forward_of(event: Any, scopes: dict[int, str | None]) -> str | None:
    """What `forward_scopes` knows of the autograd node in which the event ran."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return scopes.get(event.sequence_nr)
        event = event.cpu_parent
    return None


def names_outwards(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


# --- the run --------------------------------------------------------------------------------------


def profiled(trainer: Trainer, steps: int, warmup: int = 3) -> tuple[dict[str, float], float, float]:
    """(microseconds a step by category, wall time of a step under the profiler, and without it: both in ms)."""
    device = trainer.accelerator.device
    on_gpu = device.type == "cuda"
    epochs = itertools.count()
    stream = (step for epoch in epochs for step in trainer.batches(trainer.data, epoch=epoch))

    def run() -> None:
        with record_function("range: data"):
            micro_batches = next(stream)
        trainer.train_step(micro_batches)
        trainer.step += 1  # as `train()` does

    def wall_ms(count: int) -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    wall_ms(warmup)
    without = wall_ms(steps) / steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ranges(trainer), profile(activities=activities) as profiler:
        wall = wall_ms(steps)
    totals = times_by_category(profiler.events(), 1e3 * wall, on_gpu=on_gpu)
    return {category: us / steps for category, us in totals.items()}, wall / steps, without


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time of a training step by category.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run")
    parser.add_argument("--shape", choices=SHAPES, help="a random base of that shape; default: the bundled model")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a step, with --shape")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.shape is None:
        base, device = BUNDLED, torch.device("cpu")
        config = bundled_config(*options.overrides)
        data = data_of(config)
    else:
        base, device = Base.of(options.shape), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = shape_config(options.length, *options.overrides)
        data = random_samples(base.sizes.vocab_size, options.length, 4)
    totals, wall, without = profiled(base.trainer(config, data, device), options.steps)
    common = {
        "op": "profile", "model": base.name, "alpha": f"{config.ib.alpha:g}", "result": "ok", "steps": options.steps,
        **where(device), "commit": commit(), "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }  # fmt: skip
    rows = []
    print(f"{'category':16} {'ms a step':>10} {'share':>8}")
    for category, us in totals.items():
        share = us / 1e3 / wall
        print(f"{category:16} {us / 1e3:10.1f} {share:8.1%}")
        rows.append(common | {"category": category, "ms_a_step": f"{us / 1e3:.3f}", "share": f"{share:.4f}"})
    append(folder_name(device), "profile", PROFILE_COLUMNS, rows)
    print(f"{'sum':16} {sum(totals.values()) / 1e3:10.1f} {sum(totals.values()) / 1e3 / wall:8.1%}")
    print(f"a step took {wall:.0f} ms under the profiler, {without:.0f} ms without it")


if __name__ == "__main__":
    main()
