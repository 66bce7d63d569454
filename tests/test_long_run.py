"""Thousands of steps, with evaluations and saves: memory and file handles stay what they were."""

import os
import random

import pytest
import torch
from safetensors.torch import save as to_bytes
from tiny_models import random_samples, save_tiny_model, tiny_trainer

from ibft import checkpoint
from ibft.trainer_state import collect


def resident_kib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.timeout(3600)  # of `make soak`
def test_neither_memory_nor_handles_grow(tmp_path, soaking):
    """`make soak`: 5,000 steps, below 2 %; otherwise 150, below 5 %."""
    steps, limit = (5000, 1.02) if soaking else (150, 1.05)
    chance = random.Random(0)
    data = random_samples([chance.randint(8, 60) for _ in range(40)])
    trainer = tiny_trainer(
        save_tiny_model(tmp_path / "base"), data, f"train.max_steps={steps}", "checkpoint.save_steps=25",
        "train.eval_steps=50", "train.learning_rate=1e-4", "train.logging_steps=10", eval_data=random_samples([20] * 4),
    )  # fmt: skip
    seen, adapter = [], to_bytes({"weight": torch.ones(2)})

    def save(name):
        if name.startswith("checkpoints/"):
            tensors, facts = collect(trainer)
            write = lambda folder: (folder / checkpoint.ADAPTER).write_bytes(adapter)  # noqa: E731
            checkpoint.save(tmp_path / "checkpoints", trainer.step, write, tensors, facts)
            checkpoint.keep(tmp_path / "checkpoints", last=2)
            seen.append((trainer.step, resident_kib(), handles()))

    trainer.on_save = save
    trainer.train()
    warm, *_, last = [row for row in seen if row[0] >= min(100, steps // 2)]
    assert last[0] == steps
    assert last[1] < limit * warm[1], f"{warm[1]:,} KiB after step {warm[0]}, {last[1]:,} after step {last[0]}"
    assert last[2] == warm[2]
