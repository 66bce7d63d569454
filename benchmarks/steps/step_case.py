"""What is trained in the benchmarks of whole steps: trainers as `ibft-fast train` builds them, and the baseline.

`Base` is the bundled model, or a random base of some shape (`random_base`); of either it makes our trainer and
`plain_loop`'s loop over the same bytes.
"""

import gc
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.steps.plain_loop import PlainBatch, PlainLoop, add_lora, load_base
from benchmarks.steps.random_base import SHAPES, Shape, as_linear4bit, model_config, random_base, save_4bit
from benchmarks.steps.step_rows import PAD_ID
from ibft.config import Config
from ibft.console import Console
from ibft.data.collate import Batch
from ibft.data.encode import EncodedData
from ibft.data.prepare import Datasets, load_data
from ibft.load_config import load_config
from ibft.loop import Trainer
from ibft.model import load_model_config, load_tokenizer, resolve_layer
from ibft.run import build_trainer

Loop = Trainer | PlainLoop
Step = Callable[[int], int]  # does a whole optimizer step on batch number i; returns its real tokens


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Base:
    """A base model in 4 bits. name: as rows have it. shape: of a random one; None: the bundled model."""

    name: str
    shape: Shape | None = None

    @classmethod
    def of(cls, shape: str) -> "Base":
        """The random base of a shape in `SHAPES`."""
        assert shape in SHAPES, shape
        return cls(shape, shape)

    @cached_property
    def sizes(self) -> Any:
        """transformers' configuration."""
        return load_model_config(Config().model) if self.shape is None else model_config(self.shape)

    def layer(self, config: Config) -> int | None:
        """The tapped block."""
        return resolve_layer(config.ib.layer, self.sizes.num_hidden_layers) if config.ib.alpha > 0 else None

    def trainer(self, config: Config, data: EncodedData, device: torch.device) -> Trainer:
        """By `build_trainer`; of a random base only the loading of a checkpoint is replaced. The memory planner reads
        the lengths of the data."""
        from accelerate import Accelerator

        dtype = dtype_of(device)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no" if dtype == torch.float32 else "bf16")

        def load(_config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
            return random_base(self.shape, dtype=dtype, device=device)

        tokenizer: Any = SimpleNamespace(pad_token_id=PAD_ID, eos_token_id=1)
        with nullcontext() if self.shape is None else mock.patch("ibft.model.load_base", load):
            return build_trainer(
                config, tokenizer, Datasets(data, None, ""), self.layer(config), accelerator, dtype
            )[0]  # fmt: skip

    def loop(self, config: Config, device: torch.device) -> PlainLoop:
        """The baseline on the same bytes, in bitsandbytes' own layers."""
        dtype = dtype_of(device)
        if self.shape is None:
            base = load_base(config.model.name_or_path, dtype=dtype, device=device)
        else:
            base = as_linear4bit(random_base(self.shape, dtype=dtype, device=device), dtype)
        return PlainLoop(add_lora(base, config), config, self.layer(config), dtype=dtype)

    def unsloth_loop(self, config: Config, device: torch.device) -> PlainLoop:
        """Plain fine-tuning by Unsloth on the same bytes, which reach it through a checkpoint on disk, as its users'
        do. With dropout 0: its fast path has none. Not run yet: no GPU with Unsloth was at hand.
        """
        from unsloth import FastLanguageModel

        dtype, length, lora = dtype_of(device), config.data.max_length, config.lora
        with tempfile.TemporaryDirectory() as folder:
            base = as_linear4bit(random_base(self.shape, dtype=dtype, device=device), dtype)
            save_4bit(base, folder)
            load_tokenizer(Config().model).save_pretrained(folder)  # it wants one; none of its ids is used
            del base
            model, _ = FastLanguageModel.from_pretrained(
                model_name=folder, max_seq_length=length, dtype=dtype, load_in_4bit=True
            )
        model = FastLanguageModel.get_peft_model(
            model, r=lora.r, lora_alpha=lora.alpha, lora_dropout=0, target_modules=list(lora.target_modules),
            bias="none", use_gradient_checkpointing="unsloth", max_seq_length=length,
        )  # fmt: skip
        return PlainLoop(model, config, None, dtype=dtype)


BUNDLED = Base("bundled")

# --- settings -------------------------------------------------------------------------------------


def bundled_config(*overrides: str) -> Config:
    """The bundled run's settings; KL as the released code reduces it, so that one formula holds for both sides."""
    return load_config(None, ["ib.kl_reduction=mean", "runtime.device=cpu", *overrides])[0]


def shape_config(length: int, *overrides: str) -> Config:
    """QLoRA as on a consumer GPU: one sample of `length` tokens a step, r 32, every linear layer, 8-bit AdamW, every
    block recomputed. There are no held-out rows."""
    settings = [
        "model.name_or_path=random", "data.path=random", f"data.max_length={length}", "data.packing=false",
        "data.val_size=0", "ib.kl_reduction=mean", "train.per_device_train_batch_size=1",
        "train.gradient_accumulation_steps=1", "train.optim=adamw_8bit", "train.gradient_checkpointing=true",
        "train.max_steps=1000",
    ]  # fmt: skip
    return load_config(None, [*settings, *overrides])[0]


def data_of(config: Config) -> EncodedData:
    """The training rows that a configuration names, in the bundled model's tokens."""
    return load_data(config, load_tokenizer(Config().model), Console()).train


def with_settings(config: Config, **sections: dict[str, Any]) -> Config:
    """E.g. `with_settings(config, lora={"dropout": 0.0})`."""
    tree = config.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    return Config.model_validate(tree)


# --- steps ----------------------------------------------------------------------------------------


def step_of(loop: Loop, steps: Sequence[list[Batch]]) -> Step:
    """Steps over these batches, in turn."""
    if isinstance(loop, Trainer):

        def of_ours(i: int) -> int:
            micro_batches = steps[i % len(steps)]
            loop.train_step(micro_batches)
            loop.step += 1  # as `train()` does: its number decides which steps gather what the logs show
            return sum(batch.num_tokens for batch in micro_batches)

        return of_ours
    # labels are laid out beforehand: a data loader's work, as the collator's is of ours
    prepared = [[PlainBatch.of(batch) for batch in micro_batches] for micro_batches in steps]

    def of_plain(i: int) -> int:
        micro_batches = prepared[i % len(prepared)]
        loop.train_step(micro_batches)
        return sum(batch.num_tokens for batch in micro_batches)

    return of_plain


def free() -> None:
    """Give back what nothing holds any more, the allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
