"""`ibft-fast reproduce ... --dry-run`: the steps of a reproduction, their arithmetic, time and memory. Nothing is made.

Times of training and scoring are floors: arithmetic over the rate of one large product on the device that is here, or
over 50 TFLOP/s where a GPU is asked about and none is here. Sampling reads all weights for every token of a batch: its
floor is bytes over 1 TB/s, a fast consumer card's. Judging and loading are not in them. Of a base that no file here
describes nothing is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.table import Table

from ibft.config import BUNDLED, Config
from ibft.console import Console, size
from ibft.errors import IBFTError
from ibft.estimate import SUSTAINED, choose_target, duration, find_data, flop, measured_rate
from ibft.load_config import load_config
from ibft.plan import Choice, Load, ModelShape, Setup, choose_plan, flops
from ibft.reproduce.recipe import BASES, Recipe, overrides_of
from ibft.run import memory_budget

BANDWIDTH = 1e12  # bytes/s of the example card


@dataclass(frozen=True)
class Step:
    """what: for people. work: FLOP in all. moved: bytes of weights read while sampling. None: not known."""

    what: str
    count: str
    work: float | None = None
    moved: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Known:
    """Of the base and the data, as far as files here tell."""

    setup: Setup
    choice: Choice
    rows: int | None
    tokens: int | None
    steps: int | None


def show_steps(recipe: Recipe, out: Path, *, workers: int) -> None:
    """Raises IBFTError: as training would refuse the settings."""
    console = Console()
    config, _ = load_config(None, overrides_of(recipe.train))
    device, here = choose_target(config)
    rate = SUSTAINED
    known: Known | None = None
    try:
        known = look(config, device, here, console)
    except IBFTError as error:
        console.notice(f"sizes unknown: {error}")
    if known is not None and here:
        rate = measured_rate(known.setup)[0]
    console.line(f"reproduce {recipe.name}: {recipe.what}")
    console.line(f"in {out}; {workers} at once; nothing is made by a dry run")
    table = Table(box=SIMPLE)
    for heading in ("step", "number", "arithmetic", "at least", "tensors"):
        table.add_column(heading, no_wrap=True)
    total = 0.0
    for step in steps_of(recipe, config, known):
        seconds = None if step.work is None else step.work / rate + (step.moved or 0) / BANDWIDTH
        total += seconds or 0
        table.add_row(
            step.what,
            step.count,
            "unknown" if step.work is None else flop(step.work),
            "unknown" if seconds is None else duration(seconds / workers),
            "unknown" if step.memory is None else size(int(step.memory)),
        )
    console.rich.print(table)
    measured = f"measured: {recipe.measured}" if recipe.measured else "measured: never at this size"
    at = f"{rate / 1e12:.3g} TFLOP/s " + ("as one large product runs here" if known and here else "(an example)")
    least = f"at least {duration(total / workers)} at {at}" if known and total else "time unknown"
    console.line(f"{least}; {measured}")


def look(config: Config, device: str, here: bool, console: Console) -> Known:
    """Raises IBFTError: the base's config.json cannot be had."""
    from ibft.loop import count_steps
    from ibft.model import load_model_config

    base = load_model_config(config.model, needs_weights=False)
    data = find_data(config, console)
    train = None if isinstance(data, str) else data.train
    setup = Setup.of(ModelShape.of(base), config, device, 4 if device == "cpu" else 2, Load.of(config, train))
    budget = memory_budget(config, torch.device(device)) if here or config.runtime.memory_budget else None
    steps = config.train.max_steps if config.train.max_steps != -1 else None
    if steps is None and train is not None:
        steps = -int(-config.train.num_train_epochs * count_steps(train, config) // 1)
    rows, tokens = (None, None) if train is None else (len(train.samples), train.num_tokens)
    return Known(setup, choose_plan(setup, budget), rows, tokens, steps)


def steps_of(recipe: Recipe, config: Config, known: Known | None) -> Iterator[Step]:
    bases, models = (len(BASES) if recipe.bases else 1), len(recipe.models) * len(recipe.seeds)
    parameters = float(known.setup.shape.parameters) if known else None
    peak = float(known.choice.estimate.total) if known else None
    weights = peak and float(known.choice.estimate.lines["base weights"]) if known else None
    if recipe.bases:
        tokens = 2048 * recipe.bases.steps
        work = 2 * 6 * parameters * tokens if parameters else None
        yield Step("make bases", f"2 of {recipe.bases.steps} steps", work, memory=20 * (parameters or 0))
    per_step = sum(flops(known.setup, known.choice.plan).values()) if known else None
    steps = known.steps if known else None
    shown = f"{models} runs" + (f" of {steps:,} steps" if steps else "")
    yield Step("train", shown, models * steps * per_step if steps and per_step else None, memory=peak)

    passes = bases + models
    tokens_of_rows = known.tokens if known else None
    scored_runs = len(recipe.scored) * len(recipe.seeds)
    # Min-K% and the response's cross-entropy of each base and scored run, this over training too; hidden states of all
    looks = 2 * (bases + scored_runs) + scored_runs * ((steps or 0) // recipe.score_steps) + passes
    work = 2 * parameters * tokens_of_rows * looks if parameters and tokens_of_rows else None
    yield Step("score, look inside", f"{looks:,} passes of the rows", work, memory=weights)

    samples, batches = 0, 0.0
    for suite in recipe.suites.values():
        problems = problems_of(suite.suite, suite.problems, suite.max_problems)
        drawn = problems * suite.n * (passes + (1 + scored_runs) * len(suite.more_temperatures))
        samples += drawn
        batches += drawn / suite.batch_size * suite.max_new_tokens
    longest = max((suite.max_new_tokens for suite in recipe.suites.values()), default=0)
    work = 2 * parameters * samples * longest if parameters else None
    if samples:
        yield Step("sample and judge", f"{samples:,} samples", work, moved=batches * (weights or 0), memory=weights)


# where no file is here
PROBLEMS = {
    "humaneval": 164, "humaneval-plus": 164, "mbpp": 500, "mbpp-plus": 378, "verilogeval-v1": 156,
    "verilogeval-v1-machine": 143, "gsm8k": 1319,
}  # fmt: skip


def problems_of(suite: str, path: str | None, limit: int | None) -> int:
    from ibft.tiny import task_file

    if path == BUNDLED:
        count = len(task_file("test").read_text(encoding="utf-8").splitlines())
    elif path is not None and Path(path).expanduser().is_file():
        from ibft.data.sources import load_rows

        count = len(load_rows(path))
    else:
        count = PROBLEMS.get("verilogeval-v1-machine" if path and "machine" in path.lower() else suite, 0)
    return min(count, limit or count)
