"""Whole training steps as one size grows: the points, and the comparison at each of them.

Around one base point each sweep varies one size: tokens a row T, rows a micro-batch B, layers L, vocabulary V, the
share of labelled positions. At the base point both sides also step without the bottleneck. Rows are samples of full
length, without padding; the gate takes the same rows cut to `GATE` tokens.
"""

from functools import cache

import torch

from benchmarks.steps.random_base import shape_of
from benchmarks.steps.step_case import Base, dtype_of, shape_config
from benchmarks.steps.step_comparison import SIDES, StepComparison, step_providers
from benchmarks.steps.step_rows import Rows, batches_of, random_samples

LLAMA = {"cpu": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 4}}
LLAMA["cuda"] = {}  # as wide as the 7B model that it is made of
POINT = {
    "cpu": {"T": 128, "B": 1, "L": 4, "V": 32000, "labelled": 0.5},
    "cuda": {"T": 2048, "B": 1, "L": 4, "V": 102400, "labelled": 0.5},
}
GATE = {"cpu": 64, "cuda": 256}
# beside the base point
CASES = {
    "cpu": [
        ("T", 256), ("T", 512), ("B", 4), ("L", 8), ("V", 102400), ("V", 151936), ("labelled", 0.1),
        ("labelled", 1.0),
    ],
    "cuda": [
        ("T", 512), ("T", 1024), ("T", 4096), ("T", 8192), ("B", 2), ("B", 4), ("L", 2), ("L", 8), ("V", 32000),
        ("V", 151936), ("labelled", 0.1), ("labelled", 1.0),
    ],
}  # fmt: skip


@cache
def comparison(kind: str, *change: object) -> StepComparison:
    """At the base point but for one size, given as (name, value)."""
    point = POINT[kind] | dict([change] if change else [])
    base = Base(
        f"llama D {LLAMA[kind].get('hidden_size', 4096)}",
        shape_of(
            "deepseek-coder-7b", **LLAMA[kind], num_hidden_layers=point["L"], vocab_size=point["V"],
            max_position_embeddings=8192,
        ),
    )  # fmt: skip
    settings = [f"train.per_device_train_batch_size={point['B']}"]
    if kind == "cpu":
        settings += ["train.gradient_checkpointing=false", "ib.latent_dim=64"]  # Z 256 would be as wide as D
    config = shape_config(point["T"], *settings)

    def rows(length: int):
        data = random_samples(point["V"], length, 2 * point["B"], labelled=point["labelled"])
        return data, Rows("one sample", batches_of(data, config))

    providers = step_providers(base, config, *rows(point["T"]), *rows(GATE[kind]))
    sides = SIDES[:2] if change else SIDES
    dtype = dtype_of(torch.device(kind))
    return StepComparison("step_sweep", base, dtype, {side: providers[side] for side in sides}, rounds=6)
