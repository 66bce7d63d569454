"""Optimizer and schedule: two parameter groups, LoRA and bottleneck, so that norms, clipping and rates can differ."""

import math
from typing import Any

import torch
from torch import nn

from ibft.config import TrainConfig

Groups = dict[str, list[nn.Parameter]]  # "lora" and, with a bottleneck, "bottleneck"


def make_optimizer(
    groups: Groups, config: TrainConfig, *, bottleneck_lr: float | None, device: torch.device
) -> tuple[Any, list[str]]:
    """The configured AdamW over the groups, and notices for the user.

    Paged optimizers page between GPU and host memory; on a CPU there is nothing to page, so the plain 8-bit one is
    used.
    """
    rates = {
        "lora": config.learning_rate,
        "bottleneck": config.learning_rate if bottleneck_lr is None else bottleneck_lr,
    }
    parameter_groups = [{"params": params, "lr": rates[name], "name": name} for name, params in groups.items()]
    common: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_torch_fused":
        return torch.optim.AdamW(parameter_groups, fused=True, **common), []
    import bitsandbytes.optim as bnb

    if config.optim == "paged_adamw_8bit" and device.type == "cuda":
        return bnb.PagedAdamW8bit(parameter_groups, **common), []
    notices = []
    if config.optim == "paged_adamw_8bit":
        notices.append("train.optim=paged_adamw_8bit: there is no GPU memory to page on a CPU; using adamw_8bit")
    return bnb.AdamW8bit(parameter_groups, **common), notices


def make_scheduler(optimizer: Any, config: TrainConfig, total_steps: int) -> Any:
    """Warm-up, then cosine, linear or constant, over `total_steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * total_steps)
    kind = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)


def gradient_norms(groups: Groups) -> dict[str, torch.Tensor]:
    """L2 norm of each group's gradients, on the device."""
    return {
        name: torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        for name, params in groups.items()
    }


def clip_gradients(groups: Groups, norms: dict[str, torch.Tensor], config: TrainConfig) -> None:
    """Scale gradients down to `max_grad_norm`: over all groups at once, or each apart."""
    if config.max_grad_norm == 0:
        return
    joint = torch.stack(list(norms.values())).norm()
    for name, params in groups.items():
        norm = norms[name] if config.clip_mode == "per_group" else joint
        torch.nn.utils.clip_grads_with_norm_(params, config.max_grad_norm, norm)
