"""The gate of whole steps: a step that computes something else than the baseline is not timed.

One micro-batch by ours and by the baseline: the same weights, the same eps, no dropout. Compared are the losses and the
whole gradient, in norm: of LoRA, which PEFT names alike on both sides, and of the bottleneck.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.steps.plain_loop import PlainBatch, PlainLoop
from benchmarks.steps.step_case import Base, dtype_of, free, with_settings
from ibft.config import Config
from ibft.data.collate import Batch
from ibft.data.encode import EncodedData
from ibft.loop import Trainer
from ibft.noise import Z_STREAM
from ibft_kernels import noise_key, philox_normal

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """Of one micro-batch. losses: by name. gradients: of each group by the parameter's name, on the host in fp32."""

    losses: dict[str, float]
    gradients: dict[str, Tensors]


@dataclass(frozen=True)
class Allowed:
    """How far ours may be off, of the baseline's: losses and gradient norms, and a gradient as a vector."""

    value: float
    gradient: float


# of bf16 no more is asked than the rounding of two different orders of computing leaves
ALLOWED = {torch.float32: Allowed(1e-5, 1e-5), torch.bfloat16: Allowed(3e-2, 1e-1)}


def wrong_step(base: Base, config: Config, data: EncodedData, batch: Batch, device: torch.device) -> str:
    """What is wrong with ours on this micro-batch; empty where nothing is. The two sides need not fit together."""
    assert config.ib.kl_reduction == "mean", "the baseline has one formula"
    config = with_settings(config, lora={"dropout": 0.0})
    everywhere = torch.ones_like(batch.kl_mask)  # the baseline knows no mask there
    batch = replace(batch, kl_mask=everywhere, num_kl_tokens=everywhere.numel())

    trainer = base.trainer(config, data, device)
    spread_lora(trainer)
    ours, weights = outcome_of_ours(trainer, batch), weights_of(trainer)
    del trainer
    free()
    loop = base.loop(config, device)
    load_weights(loop, weights)
    theirs = outcome_of_plain(loop, batch)
    return difference(ours, theirs, ALLOWED[dtype_of(device)])


def difference(ours: Outcome, theirs: Outcome, allowed: Allowed) -> str:
    for name, truth in reversed(theirs.losses.items()):  # the parts say more than their sum
        if not abs(ours.losses[name] - truth) <= allowed.value * abs(truth):
            return f"{name}: ours {ours.losses[name]:.6g}, plain {truth:.6g}, allowed {allowed.value:g} of it"
    for group, truth in theirs.gradients.items():
        found = ours.gradients[group]
        if found.keys() != truth.keys():
            return f"gradient of {group}: of {', '.join(sorted(found.keys() ^ truth.keys()))} on one side alone"
        norms = norm(found), norm(truth)
        off = norm({name: found[name] - truth[name] for name in truth})
        if not abs(norms[0] - norms[1]) <= allowed.value * norms[1]:
            return f"norm of the gradient of {group}: ours {norms[0]:.6g}, plain {norms[1]:.6g}"
        if not off <= allowed.gradient * norms[1]:
            return f"gradient of {group}: off by {off:.3g} of {norms[1]:.3g}, allowed {allowed.gradient:g} of it"
    return ""


def norm(tensors: Tensors) -> float:
    return float(torch.stack([x.norm() for x in tensors.values()]).norm())


def spread_lora(trainer: Trainer) -> None:
    """LoRA's B starts at zero, where its A has no gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.groups["lora"]:
        if not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


# --- the two sides --------------------------------------------------------------------------------


def outcome_of_ours(trainer: Trainer, batch: Batch) -> Outcome:
    trainer.model.train()
    parts = trainer.backward([batch])
    gradients = {"lora": gradients_of(trainer.model)}
    losses = {"loss": float(parts.loss.detach()), "CE": float(parts.ce.detach())}
    if (bottleneck := trainer.objective.bottleneck) is not None:
        losses |= {"KL": float(parts.kl.detach()), "CE_z": float(parts.ce_z.detach())}
        gradients["bottleneck"] = as_heads(gradients_of(bottleneck))
    return Outcome(losses, gradients)


def outcome_of_plain(loop: PlainLoop, batch: Batch) -> Outcome:
    """With the eps that ours drew."""
    loop.model.train()
    runtime, ib = loop.config.runtime, loop.config.ib
    eps = philox_normal(noise_key(runtime.seed, Z_STREAM), batch.noise_ids.view(-1, 3), ib.latent_dim)
    eps = eps.view(*batch.input_ids.shape, -1).to(loop.device)
    parts = loop.losses(PlainBatch.of(batch).to(loop.device), eps)
    parts.loss.backward()
    gradients = {"lora": gradients_of(loop.model)}
    losses = {"loss": float(parts.loss.detach()), "CE": float(parts.ce.detach())}
    if loop.heads is not None:
        losses |= {"KL": float(parts.kl.detach()), "CE_z": float(parts.ce_z.detach())}
        gradients["bottleneck"] = gradients_of(loop.heads)
    return Outcome(losses, gradients)


def gradients_of(module: torch.nn.Module) -> Tensors:
    return {name: p.grad.float().cpu() for name, p in module.named_parameters() if p.grad is not None}


def as_heads(bottleneck: Tensors) -> Tensors:
    """Our bottleneck's tensors under the baseline's names: its encoder makes mu and logvar in one product."""
    named = {f"up.{kind}": bottleneck[f"up.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        named[f"mu.{kind}"], named[f"logvar.{kind}"] = bottleneck[f"encoder.{kind}"].chunk(2)
    return named


Weights = tuple[Tensors, Tensors | None]  # LoRA's as PEFT saves them, the bottleneck's


def weights_of(trainer: Trainer) -> Weights:
    from peft import get_peft_model_state_dict

    def on_host(state: Any) -> Tensors:
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    adapter = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    bottleneck = trainer.objective.bottleneck
    return on_host(adapter), None if bottleneck is None else as_heads(on_host(bottleneck.state_dict()))


def load_weights(loop: PlainLoop, weights: Weights) -> None:
    from peft import set_peft_model_state_dict

    adapter, heads = weights
    result = set_peft_model_state_dict(loop.model, adapter)
    assert not result.unexpected_keys, result.unexpected_keys
    if loop.heads is not None:
        assert heads is not None
        loop.heads.load_state_dict(heads)
