"""The training loop that a user would write for IB-FT: transformers, PEFT, bitsandbytes, and the authors' formula.

    logits   = lm_head(h_L)                                  [B, T, V], every position
    mu, lv   = h_l W_mu^T + b_mu, clamp(h_l W_lv^T + b_lv, -4, 4)        h_l = hidden_states[layer]
    logits_z = lm_head(up(mu + exp(lv / 2) eps))             [B, T, V], every position
    L        = CE + alpha (KL + beta CE_z)                   means over this micro-batch; KL over all positions and dims

LoRA is PEFT's, with a dropout mask a module; the base is bitsandbytes' Linear4bit (NF4, double quantisation); attention
is SDPA; AdamW, clipping and a cosine schedule as in any such script. What flatters it: labels are shifted, not both
logits; and PEFT's `prepare_model_for_kbit_training`, which would also blow embeddings, norms and head up to fp32, is
reduced to gradient checkpointing.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ibft.config import Config
from ibft.data.collate import Batch
from ibft.model import resolve_path


@dataclass(frozen=True)
class PlainBatch:
    """What a transformers model takes: `inputs`, and labels [B, T] with -100 where there is none."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    num_tokens: int

    @classmethod
    def of(cls, batch: Batch) -> "PlainBatch":
        """The same rows. Packed ones come with position ids and no mask: transformers makes it block-diagonal."""
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.label_rows + 1] = batch.targets
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if batch.attention_mask is not None:
            inputs["attention_mask"] = batch.attention_mask
        return cls(inputs, labels, batch.num_tokens)

    def to(self, device: torch.device) -> "PlainBatch":
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return PlainBatch(inputs, self.labels.to(device, non_blocking=True), self.num_tokens)


@dataclass
class Losses:
    """`loss` and parts, 0-d with a graph; kl and ce_z are None in plain fine-tuning."""

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor | None = None
    ce_z: torch.Tensor | None = None


class PlainLoop:
    """Model, heads, optimizer and `train_step`.

    Args:
        model: a causal LM with LoRA, from `add_lora`. config: read for the bottleneck's and the optimizer's settings.
        layer: tapped block, None = plain fine-tuning. dtype: of the products: fp32, or bf16 under autocast.
    """

    def __init__(self, model: nn.Module, config: Config, layer: int | None, *, dtype: torch.dtype) -> None:
        from transformers import get_cosine_schedule_with_warmup

        train = config.train
        self.model, self.config, self.layer, self.dtype = model, config, layer, dtype
        self.device = model.get_base_model().lm_head.weight.device
        self.heads: nn.ModuleDict | None = None
        self.lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters = [*self.lora]
        if layer is not None:
            D, Z = model.config.hidden_size, config.ib.latent_dim
            with torch.device(self.device):
                self.heads = nn.ModuleDict({"mu": nn.Linear(D, Z), "logvar": nn.Linear(D, Z), "up": nn.Linear(Z, D)})
            self.parameters += self.heads.parameters()
        common: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
        if train.optim == "adamw_torch_fused":
            self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **common)
        else:
            from bitsandbytes.optim import AdamW8bit

            self.optimizer = AdamW8bit(self.parameters, **common)
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, math.ceil(train.warmup_ratio * train.max_steps), train.max_steps
        )

    def train_step(self, micro_batches: list[PlainBatch]) -> torch.Tensor:
        """One optimizer step; its loss, still on the device."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self.losses(batch.to(self.device)).loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def losses(self, batch: PlainBatch, eps: torch.Tensor | None = None) -> Losses:
        """The objective of one micro-batch; eps [B, T, Z] instead of a draw from torch's generator."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.heads is None:
                ce = self.model(**batch.inputs, labels=batch.labels, use_cache=False).loss
                return Losses(ce, ce)
            output = self.model(**batch.inputs, use_cache=False, output_hidden_states=True)
            ce = cross_entropy(output.logits, batch.labels)
            tapped = output.hidden_states[self.layer]
            mu = self.heads["mu"](tapped)
            logvar = torch.clamp(self.heads["logvar"](tapped), -4, 4)
            z = mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if eps is None else eps.to(mu))
            kl = -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp())
            ce_z = cross_entropy(self.model.get_base_model().lm_head(self.heads["up"](z)), batch.labels)
            ib = self.config.ib
            return Losses(ce + ib.alpha * (kl + ib.beta * ce_z), ce, kl, ce_z)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """In fp32 over logits [B, T, V] at every position, labels [B, T] shifted here: as transformers' own loss does."""
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten())


def add_lora(base: nn.Module, config: Config) -> nn.Module:
    """PEFT's LoRA on a base with Linear4bit layers, from `load_base` or `random_base.as_linear4bit`."""
    from peft import LoraConfig, get_peft_model

    if config.train.gradient_checkpointing is True:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = config.lora
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules),
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(base, settings)


def load_base(name_or_path: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal LM in bitsandbytes' NF4 with double quantisation, as a user loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        resolve_path(name_or_path),
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    )
    model.requires_grad_(False)
    return keep_weights_unpacked(model)


def keep_weights_unpacked(model: nn.Module) -> nn.Module:
    """On some CPUs a no-grad forward of Linear4bit repacks its weight; gradients are then wrong (see `ibft.nf4`)."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
