"""IBFTTrainer trains what the loop of `ibft-fast train` trains."""

import pytest
import torch
from hf_trainers import DTYPES, LENGTHS, NAMES, arguments, as_columns, assert_close, losses
from tiny_models import FakeTokenizer, random_samples, tiny_config

from ibft.context import BatchContext
from ibft.data.prepare import Datasets
from ibft.integrations import IBFTConfig, IBFTTrainer
from ibft.load_config import load_config
from ibft.model import add_lora, load_base, load_model_config, resolve_layers
from ibft.run import build_trainer


def loop_losses(config, data):
    """Rows of the loop that `ibft-fast train` runs, and the batches that it took."""
    from accelerate import Accelerator

    layer = resolve_layers(config.ib.layer, load_model_config(config.model).num_hidden_layers)
    bf16 = config.train.mixed_precision == "bf16"
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    datasets = Datasets(data, None, "")
    loop, _ = build_trainer(config, FakeTokenizer(), datasets, layer, accelerator, DTYPES[bf16])
    rows = []
    loop.on_log = lambda row: rows.append([row[name] for name in (*NAMES, "learning_rate")])
    loop.train()
    epochs = range(loop.epoch + 1)
    return rows, [batch for epoch in epochs for step in loop.batches(data, epoch=epoch) for batch in step]


@pytest.mark.parametrize(
    ("base", "steps", "accumulation", "settings"),
    [
        ("bundled", 20, 1, ["ib.layer=auto", "train.per_device_train_batch_size=1"]),
        ("random", 20, 2, ["ib.kl_tokens=response", "ib.kl_reduction=mean", "ib.alpha_warmup_ratio=0.5"]),
        ("random", 6, 2, ["ib.encoder=mlp", "train.fused_kernels=false"]),
        ("random", 5, 4, ["ib.layer=1,2", "train.gradient_checkpointing=true"]),
        ("random", 4, 2, ["ib.encoder=mlp", "train.mixed_precision=bf16"]),
        ("random", 4, 2, ["ib.prior=learned_diagonal"]),
    ],
)
def test_the_losses_are_those_of_our_loop(folder, tmp_path, base, steps, accumulation, settings):
    """A 4-bit base, keyed dropout, noise that follows the sample, unequal counts in every micro-batch."""
    common = [
        f"train.max_steps={steps}", "train.logging_steps=1", "train.per_device_train_batch_size=2",
        f"train.gradient_accumulation_steps={accumulation}", "train.lr_scheduler_type=cosine", "train.warmup_steps=2",
        "train.clip_mode=joint", "train.max_grad_norm=0.5", "data.packing=false", "runtime.device=cpu", "ib.alpha=0.1",
        "lora.dropout=0.1", *settings,
    ]  # fmt: skip
    config = load_config(None, common)[0] if base == "bundled" else tiny_config(folder, *common)
    expected, batches = loop_losses(config, random_samples(LENGTHS))
    assert len(expected) == steps

    bf16 = config.train.mixed_precision == "bf16"
    quantised = load_base(config.model, dtype=DTYPES[bf16], device=torch.device("cpu"))
    trainer = IBFTTrainer(
        add_lora(quantised, config.lora, context=BatchContext(config.runtime.seed)),
        arguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
            learning_rate=config.train.learning_rate, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.5,
            train_sampling_strategy="sequential", gradient_checkpointing=config.train.gradient_checkpointing is True,
            bf16=bf16,
        ),
        train_dataset=[as_columns(batch) for batch in batches],
        data_collator=lambda items: items[0],
        ib=IBFTConfig(**config.ib.model_dump()),
        fused_kernels=config.train.fused_kernels,
    )  # fmt: skip
    trainer.train()
    assert_close(losses(trainer, (*NAMES, "learning_rate")), expected)
