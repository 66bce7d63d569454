"""Make a causal LM of the user's ready for the objective: keyed dropout, fused layers, a bottleneck and its taps.

All patches are on the instance; a model that was adopted before is adopted anew.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ibft.context import BatchContext
from ibft.errors import ConfigError
from ibft.fused import Fused, fuse
from ibft.integrations.config import IBFTConfig
from ibft.noise import SampleDropout, dropout_stream
from ibft.objective import IBObjective
from ibft.recompute import set_recompute
from ibft.tap import HiddenTap, decoder_of

KEYED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that have a stream of dropout


@dataclass
class Adopted:
    """context: the noise's; fused: None where the model keeps its own forwards; taps: one a bottleneck."""

    context: BatchContext
    fused: Fused | None
    objective: IBObjective
    taps: list[HiddenTap]


def adopt(
    model: nn.Module, ib: IBFTConfig, *, seed: int, device: torch.device, fused_kernels: bool, checkpointing: bool
) -> Adopted:
    """Args: checkpointing: whether the layers are to be recomputed in backward (also where the model asks for it).

    Raises:
        ConfigError: not of the Llama family, a layer that it has not, a head or an adapter that the objective cannot
            read.
    """
    from ibft.model import resolve_layers

    decoder: Any = decoder_of(model)
    check_adapters(model)
    depth, hidden_size = len(decoder.layers), decoder.embed_tokens.embedding_dim
    layers: tuple[int, ...] = ()
    if ib.alpha > 0:
        chosen = resolve_layers(ib.layer, depth)
        layers = chosen if isinstance(chosen, tuple) else (chosen,)
    bottleneck = make_bottlenecks(ib, layers, hidden_size, seed, device)
    objective = IBObjective(bottleneck, alpha=ib.alpha, beta=ib.beta, kl_reduction=ib.kl_reduction)
    context, fused = context_of(model, seed), None
    if fused_kernels:
        key_dropout(decoder, context)
        for key, hook in list(decoder._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Fused):  # of an earlier trainer over this model
                del decoder._forward_pre_hooks[key]
        # the context holds one block's order: of several the hooks take the hidden states
        in_kernel = len(layers) == 1 and ib.encoder != "mlp" and ib.prior == "standard"
        fused = fuse(model, context, tapped_layer=layers[0] if in_kernel else None)
        recomputed = no_layer_checkpointing(decoder) or checkpointing
        set_recompute(model, fused, ["full" if recomputed else "none"] * depth)
    return Adopted(context, fused, objective, [HiddenTap(model, layer) for layer in layers])


def check_adapters(model: nn.Module) -> None:
    """Raises ConfigError: virtual tokens, which only PEFT's own forward adds; a head that is no plain linear layer."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(f"{type(config).__name__}: the objective reads the decoder itself, expected LoRA or none")
    if not isinstance(head := head_of(model), nn.Linear):
        raise ConfigError(f"lm_head: got {type(head).__module__}.{type(head).__name__}, expected it without an adapter")


def head_of(model: nn.Module) -> nn.Module:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head: nn.Module = base.lm_head
    return head


def make_bottlenecks(ib: IBFTConfig, layers: tuple[int, ...], hidden_size: int, seed: int, device: torch.device) -> Any:
    """One, or a ModuleDict of several by layer, or None; the same weights as `ibft-fast train` gives them."""
    from ibft.run import make_bottleneck

    with torch.random.fork_rng(devices=[]):  # whoever draws next draws as if nothing had been made here
        torch.manual_seed(seed)
        made = {str(layer): make_bottleneck(ib, hidden_size).to(device) for layer in layers}
    return nn.ModuleDict(made) if len(made) > 1 else next(iter(made.values()), None)


def context_of(model: nn.Module, seed: int) -> BatchContext:
    """That which the model's dropout reads already, or a new one."""
    return next((each.context for each in model.modules() if isinstance(each, SampleDropout)), BatchContext(seed))


def key_dropout(decoder: Any, context: BatchContext) -> None:
    """LoRA's dropout keyed by the sample, as the fused layers have it: one mask for each input that layers share."""
    from peft.tuners.lora import LoraLayer

    for index, block in enumerate(decoder.layers):
        for name, module in block.named_modules():
            projection = name.rpartition(".")[2]
            if not isinstance(module, LoraLayer) or projection not in KEYED:
                continue
            for adapter, dropout in module.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    stream = dropout_stream(index, projection)
                    module.lora_dropout[adapter] = SampleDropout(dropout.p, context, stream)


def no_layer_checkpointing(decoder: nn.Module) -> bool:
    """Switch off transformers' own, which a fused forward either does not see or would do twice; whether it was on."""
    on = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    return bool(on)
