"""Tiny random models of the Llama family, trainers built on them, and batches: what the trainer's tests share."""

import torch
from torch import nn

from ibft.config import Config
from ibft.data.encode import EncodedData
from ibft.data.prepare import Datasets
from ibft.data.samples import Sample
from ibft.load_config import load_config
from ibft.loop import Trainer
from ibft.run import build_trainer

VOCAB = 97


def tiny_model_config(model_type: str = "llama", *, layers: int = 3, hidden: int = 64, std: float = 0.02):
    """A transformers config; hidden and intermediate sizes are multiples of NF4's block of 64.

    "deepseek" is DeepSeek-Coder's kind of Llama: linear RoPE scaling and its own base.
    """
    from transformers import AutoConfig

    scaling = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0}}
    return AutoConfig.for_model(
        "llama" if model_type == "deepseek" else model_type,
        **(scaling if model_type == "deepseek" else {}),
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        initializer_range=std,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


def save_tiny_model(folder, model_type: str = "llama", **sizes) -> str:
    """Random weights on disk."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_model_config(model_type, **sizes), dtype=torch.float32)
    for name, parameter in model.named_parameters():  # initialised alike, they would test nothing
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
        elif "norm" in name:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    for parameter in model.parameters():  # so that a 16-bit and a 32-bit run start from the same numbers
        parameter.data.copy_(parameter.to(torch.bfloat16))
    model.save_pretrained(folder)
    return str(folder)


def random_samples(lengths, *, prompt_share: float = 0.4, seed: int = 0) -> EncodedData:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        samples.append(Sample(input_ids=ids, prompt_length=max(1, int(prompt_share * length))))
    return EncodedData.of(samples, rows=len(samples))


class FakeTokenizer:
    """All that the trainer asks of a tokenizer when its data are ids already."""

    pad_token_id, eos_token_id = 0, 1


def tiny_config(folder: str, *overrides: str) -> Config:
    base = [
        f"model.name_or_path={folder}",
        "data.path=unused",
        "data.max_length=64",
        "ib.latent_dim=16",
        "ib.layer=2",
        "lora.r=4",
        "train.max_steps=3",
        "train.learning_rate=1e-2",
        "train.mixed_precision=fp32",
        "train.gradient_checkpointing=false",
        "train.logging_steps=1",
        "runtime.device=cpu",
    ]
    return load_config(None, [*base, *overrides])[0]


def tiny_trainer(folder: str, data: EncodedData, *overrides: str, eval_data: EncodedData | None = None) -> Trainer:
    """A trainer as `ibft-fast train` builds it, in fp32 on the CPU unless overridden."""
    from accelerate import Accelerator

    config = tiny_config(folder, *overrides)
    precision = config.train.mixed_precision
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[precision]
    on_cpu = config.runtime.device == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no" if precision == "fp32" else precision)
    layer = None if config.ib.alpha == 0 else config.ib.layer
    trainer, _ = build_trainer(config, FakeTokenizer(), Datasets(data, eval_data, ""), layer, accelerator, dtype)
    return trainer


def randomise_lora(model: nn.Module, *, seed: int = 3) -> None:
    """LoRA's B starts at zero, where A has no gradient: make both count."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise.to(parameter) * 0.1)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of every trainable gradient, by name."""
    named = [*trainer.model.named_parameters()]
    if trainer.objective.bottleneck is not None:
        named += [(f"bottleneck.{name}", p) for name, p in trainer.objective.bottleneck.named_parameters()]
    return {name: p.grad.detach().clone() for name, p in named if p.requires_grad and p.grad is not None}
