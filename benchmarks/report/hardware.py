"""The table of docs/hardware.md: what a training step of each published shape is predicted to take.

    python -m benchmarks.report.hardware            rewrite the part between the page's table marks
    python -m benchmarks.report.hardware --check    exit 1 where that part is stale

By the formulas that `ibft-fast estimate` prints (`ibft.plan`), from each model's config.json alone: nothing in it is
measured, and it needs neither weights nor a GPU.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.harness.result_rows import ROOT
from benchmarks.report.tables import MARKED, table
from benchmarks.steps.random_base import SHAPES, model_config
from ibft.estimate import CARDS, extra_share
from ibft.load_config import load_config
from ibft.plan import CUDA_CONTEXT, GIB, MARGIN, ModelShape, Setup, choose_plan

PAGE = ROOT / "docs" / "hardware.md"
MODELS = tuple(name for name in SHAPES if name != "tiny")
SETTINGS = ("model.name_or_path=a-model", "data.path=some-rows", "train.optim=adamw_8bit")
HEAD = (
    "shape",
    "parameters",
    "smallest card",
    "peak on it",
    "arithmetic done again",
    "plan on it",
    "card for keeping all",
)


def setup_of(name: str, *overrides: str) -> Setup:
    """One row of 2,048 tokens a micro-batch, as by default; on a CUDA device, in bf16."""
    config, _ = load_config(None, [*SETTINGS, *overrides])
    return Setup.of(ModelShape.of(model_config(name)), config, "cuda")


def line(name: str) -> list[str]:
    """The table's, of one shape; GiB with the CUDA context."""
    setup = setup_of(name)
    card, choice = next(
        (card, choice) for card in CARDS if (choice := choose_plan(setup, card * GIB - CUDA_CONTEXT)).fits
    )
    return [
        f"`{name}`",
        f"{setup.shape.parameters / 1e9:.2f} B",
        f"{card} GiB",
        f"{(choice.estimate.total + CUDA_CONTEXT) / GIB:.1f} GiB",
        f"{100 * extra_share(setup, choice):.0f} %",
        choice.plan.describe(),
        without_a_plan(name),
    ]


def without_a_plan(name: str) -> str:
    """The smallest card on which every activation is kept."""
    total = choose_plan(setup_of(name, "train.gradient_checkpointing=false"), None).estimate.total
    fitting = (card for card in CARDS if total <= (1 - MARGIN) * (card * GIB - CUDA_CONTEXT))
    card = next(fitting, None)
    return f"above {CARDS[-1]} GiB" if card is None else f"{card} GiB"


def rewritten(page: str) -> str:
    """The page with its table made anew."""
    lines = table(HEAD, map(line, MODELS))
    return MARKED.sub(lambda part: f"{part[1]}{lines}\n{part[5]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of docs/hardware.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where it is stale")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    page = options.page.read_text(encoding="utf-8")
    fresh = rewritten(page)
    if options.check:
        sys.exit(0 if fresh == page else f"{options.page}: the table is stale: python -m benchmarks.report.hardware")
    options.page.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
