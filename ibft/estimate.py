"""`ibft-fast estimate`: what a run would take, from no more of the model than its config.json.

The numbers are `ibft.plan`'s.
"""

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from ibft.config import BUNDLED, Config
from ibft.console import Console, size
from ibft.errors import SetupError
from ibft.plan import CUDA_CONTEXT, GIB, MARGIN, Choice, Load, ModelShape, Setup, choose_plan, flops
from ibft.run import choose_dtype, is_local, memory_budget

if TYPE_CHECKING:
    from ibft.data.prepare import Datasets

CARDS = (8, 12, 16, 24, 32, 48, 80)  # GiB of cards that people have
SUSTAINED = 50e12  # FLOP/s of the example where no device can be measured
TYPICAL_PROMPT = 256  # tokens, for the cache of a generation


def run_estimate(config: Config, notices: list[str]) -> None:
    """Print the estimate.

    Raises:
        IBFTError: as `train` would, for what can be seen without weights.
    """
    if config.model.name_or_path == BUNDLED and is_local(config.data.path):
        os.environ["HF_HUB_OFFLINE"] = "1"
    from ibft.model import load_model_config, resolve_layers

    console = Console()
    for notice in notices:
        console.notice(notice)
    device, here = choose_target(config)
    itemsize = choose_dtype(config.train, torch.device(device)).itemsize if here else None
    base = load_model_config(config.model, needs_weights=False)
    if config.ib.alpha > 0:
        resolve_layers(config.ib.layer, base.num_hidden_layers)
    data = find_data(config, console)
    known = None if isinstance(data, str) else data.train
    setup = Setup.of(ModelShape.of(base), config, device, itemsize, Load.of(config, known))
    budget = memory_budget(config, torch.device(device)) if here or config.runtime.memory_budget else None
    choice = choose_plan(setup, budget)

    describe(console, setup)
    console.rich.print(memory_table(setup, choice))
    verdict(console, setup, choice, here)
    if choice.budget is None:
        console.rich.print(cards_table(setup))
    generation_notice(console, setup, choice)
    outlook(console, setup, choice, data, here)


def choose_target(config: Config) -> tuple[str, bool]:
    """("cuda" or "cpu", whether that device is here).

    `runtime.device=auto` without a GPU trains on the CPU; but who asks for another model than the bundled one, or names
    a card's size, asks about a GPU.
    """
    available = torch.cuda.is_available()
    asked = config.runtime.device
    if asked == "auto":
        about_gpu = config.runtime.memory_budget is not None or config.model.name_or_path != BUNDLED
        asked = "cuda" if available or about_gpu else "cpu"
    return asked, asked == "cpu" or available


def find_data(config: Config, console: Console) -> "Datasets | str":
    """The encoded data where files and tokenizer are here; else why they are not known.

    Raises:
        DataError: a file of rows or tasks is missing, malformed or empty.
    """
    from ibft.data.prepare import load_data
    from ibft.data.sources import load_rows
    from ibft.model import load_tokenizer

    path, held_out, tasks = config.data.path, config.data.eval_path, config.eval.tasks
    for file in {path, held_out, tasks} - {BUNDLED}:
        if file is not None and not of_hub(file):
            load_rows(file)
    if of_hub(path):
        return f"{path} is a hub data set: its rows are counted once it is here"
    if held_out is not None and of_hub(held_out):
        config = config.model_copy(update={"data": config.data.model_copy(update={"eval_path": None})})
    try:
        tokenizer = load_tokenizer(config.model, download=False)
    except SetupError:
        base = config.model.name_or_path
        if is_local(base):
            return f"there is no tokenizer in {base}"
        return "the tokenizer is not here: `ibft-fast train --dry-run` with the same arguments fetches it"
    return load_data(config, tokenizer, console)


def of_hub(path: str) -> bool:
    """Whether `load_rows` would ask the hub for it."""
    from ibft.data.sources import looks_like_path

    return not is_local(path) and not looks_like_path(path)


def describe(console: Console, s: Setup) -> None:
    shape, load, config = s.shape, s.load, s.config
    bits = "4-bit NF4" if config.model.quantization == "nf4" else "not quantised"
    where = "a CUDA device" if s.device == "cuda" else "the CPU"
    console.rich.print(
        f"model: {config.model.name_or_path}, {count(shape.parameters)} parameters in {shape.layers} layers; "
        f"{bits}, computing in {dtype_name(s)} on {where}",
        markup=False,
    )
    batches = f"{load.accumulation} micro-batches" if load.accumulation > 1 else "1 micro-batch"
    packed = "packed " if config.data.packing else ""
    rows = f"{load.rows} {packed}rows" if load.rows > 1 else f"1 {packed}row"
    console.rich.print(f"step: {batches} of {rows} of {load.length:,} tokens", markup=False)


def dtype_name(s: Setup) -> str:
    if s.itemsize == 4:
        return "fp32"
    return "fp16" if s.config.train.mixed_precision == "fp16" else "bf16"


def memory_table(s: Setup, choice: Choice) -> Table:
    """Bytes by category at the step's peak; on a GPU with what its context takes."""
    lines = dict(choice.estimate.lines)
    if s.device == "cuda":
        lines["CUDA context"] = CUDA_CONTEXT
    total = sum(lines.values())
    unit, name = (GIB, "GiB") if total >= 4 * GIB else (1 << 20, "MiB")
    shape, config = s.shape, s.config
    dtype = dtype_name(s)
    adapters = shape.layers * s.adapter_parameters
    linears = f"{count(shape.layers * shape.linear_parameters)} parameters in 4 bits, embeddings and head in {dtype}"
    several = f"{len(s.tapped)} layers, each " if len(s.tapped) > 1 else ""
    notes = {
        "base weights": linears if config.model.quantization == "nf4" else f"in {dtype}",
        "adapters": f"LoRA r {config.lora.r}: {count(adapters)} parameters in fp32, and a copy in {dtype}",
        "gradients": "of the adapters, in fp32",
        "optimizer state": config.train.optim,
        "bottleneck": f"{several}Z {config.ib.latent_dim}; gradients and optimizer state too",
        "kept activations": f"of {s.load.tokens:,} tokens, from forward to backward",
        "working memory": f"at the widest moment: {choice.estimate.moment}",
        "head": "logits, a chunk at a time, and their rows' gradients",
        "folded head": f"{several}{shape.vocab:,} x {config.ib.latent_dim} for the latent, and its gradient",
        "data": "ids, positions, noise keys",
        "CUDA context": "driver and libraries, before the first tensor",
    }
    table = Table("memory", f"{name}", "", title="peak of a training step, predicted", title_justify="left")
    table.columns[1].justify = "right"
    for line, taken in lines.items():
        if taken:
            table.add_row(line, f"{taken / unit:,.2f}", notes[line])
    table.add_section()
    table.add_row("total", f"{total / unit:,.2f}", "", style="bold")
    return table


def verdict(console: Console, s: Setup, choice: Choice, here: bool) -> None:
    again = extra_share(s, choice)
    cost = f" (+{again:.0%} arithmetic)" if again else ""
    console.rich.print(f"plan: {choice.plan.describe()}{cost}", markup=False)
    if choice.estimate.host:
        console.rich.print(f"host memory: {size(choice.estimate.host)}, pinned", markup=False)
    if not s.config.train.fused_kernels:
        console.notice("train.fused_kernels=false keeps more than this: the numbers are of the fused path")
    if choice.budget is None:
        return
    context = CUDA_CONTEXT if s.device == "cuda" else 0
    taken, room = size(choice.estimate.total + context), size(choice.budget + context)
    named = f"of {room}" if s.config.runtime.memory_budget is not None or not here else f"of the {room} free here"
    if choice.fits:
        console.rich.print(f"fits: {taken} {named}", style="green", markup=False)
        return
    left = f"of which {MARGIN:.0%} are left free for fragmentation"
    console.rich.print(f"does not fit: {taken} {named}, {left}", style="red", markup=False)
    if choice.change:
        console.rich.print(f"the cheapest change that fits: {' '.join(choice.change)}", markup=False)
    else:
        console.rich.print("no setting makes it fit: it wants a larger device or a smaller base", markup=False)


def extra_share(s: Setup, choice: Choice) -> float:
    """Arithmetic done again, as a share of the rest."""
    parts = flops(s, choice.plan)
    again = parts.pop("recomputation")
    return again / sum(parts.values())


def cards_table(s: Setup) -> Table:
    """The plan on each size of card, where none is named and none is here."""
    title = "on a card of (--memory GIB), with train.gradient_checkpointing=auto"
    table = Table("card", "peak", "arithmetic", "plan", title=title, title_justify="left")
    for card in CARDS:
        setup = replace(s, config=with_auto(s.config))
        choice = choose_plan(setup, card * GIB - CUDA_CONTEXT)
        if choice.fits:
            share = extra_share(setup, choice)
            again = f"+{share:.0%}" if share else ""
            table.add_row(f"{card} GiB", size(choice.estimate.total + CUDA_CONTEXT), again, choice.plan.describe())
        else:
            change = f"fits with {' '.join(choice.change)}" if choice.change else "does not fit"
            table.add_row(f"{card} GiB", "", "", change)
        if choice.fits and choice.plan.count("none") == s.shape.layers:
            break  # larger ones do the same
    return table


def with_auto(config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": "auto"})})


def generation_notice(console: Console, s: Setup, choice: Choice) -> None:
    """Pass@1 before and after training keeps a cache of keys and values, which can be larger than a training step."""
    config = s.config
    if config.eval.tasks is None or choice.budget is None:
        return
    one = (config.eval.max_new_tokens + TYPICAL_PROMPT) * s.shape.layers * 2 * s.shape.kv_width * s.itemsize
    weights = choice.estimate.lines["base weights"] + choice.estimate.lines["adapters"]
    room = max(1, int(((1 - MARGIN) * choice.budget - weights) / one))
    if config.eval.batch_size > room:
        console.notice(
            f"generating for Pass@1 keeps up to {size(config.eval.batch_size * one)} of keys and values with "
            f"eval.batch_size={config.eval.batch_size} and prompts of {TYPICAL_PROMPT} tokens: "
            f"eval.batch_size={room} fits"
        )


def outlook(console: Console, s: Setup, choice: Choice, data: "Datasets | str", here: bool) -> None:
    """Disk, steps, arithmetic and time."""
    from ibft.loop import count_steps

    config = s.config
    adapter = 4 * (s.shape.layers * s.adapter_parameters + sum(s.bottleneck_tensors))
    copies = 2 + (config.checkpoint.keep_last if config.checkpoint.save_steps else 0)
    kept = f"{copies} adapters (last, best" + (f", {copies - 2} checkpoints" if copies > 2 else "") + ")"
    base = (
        "the base is a local folder"
        if is_local(config.model.name_or_path)
        else f"{2 * s.shape.parameters / 1e9:,.1f} GB to download for the base, unless it is cached "
        f"({count(s.shape.parameters)} parameters x 2 bytes)"
    )
    console.rich.print(f"disk: {base}; {kept} of {adapter / 1e6:,.0f} MB", markup=False)

    train, steps = config.train, None
    if train.max_steps != -1:
        steps = train.max_steps
        console.rich.print(f"steps: {steps:,} (train.max_steps)", markup=False)
    elif isinstance(data, str):
        console.rich.print(f"steps: unknown; {data}", markup=False)
    else:
        epoch = count_steps(data.train, config)
        steps = -int(-train.num_train_epochs * epoch // 1)
        console.rich.print(f"steps: {steps:,} ({train.num_train_epochs:g} epochs of {epoch:,})", markup=False)

    parts = flops(s, choice.plan)
    total = sum(parts.values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items() if value > 0.005 * total)
    console.rich.print(f"arithmetic: {flop(total)} a step ({shares})", markup=False)
    if not here:
        console.rich.print(
            f"time: unknown, no CUDA device here; one that sustains {SUSTAINED / 1e12:.0f} TFLOP/s would take "
            f"{times(total / SUSTAINED, steps)}",
            markup=False,
        )
        return
    rate, edge = measured_rate(s)
    console.rich.print(
        f"time: at least {times(total / rate, steps)}: a {edge} x {edge} product in {dtype_name(s)} runs at "
        f"{flop(rate)}/s here, and no step keeps that up",
        markup=False,
    )


def times(step: float, steps: int | None) -> str:
    """Of seconds a step."""
    return f"{duration(step)} a step" + (f", {duration(steps * step)} in all" if steps else "")


def measured_rate(s: Setup) -> tuple[float, int]:
    """(FLOP/s of one square product on the device that is here, its edge): the best of five."""
    device = torch.device(s.device)
    dtype: Any = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype_name(s)]
    edge = 4096 if s.device == "cuda" else 1024
    a = torch.randn(edge, edge, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        if s.device == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * edge**3 / best, edge


def count(number: float) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def flop(number: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}FLOP"
    return f"{number / 1e6:.3g} MFLOP"


def duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
