"""A model whose weights stay in their files: each is in memory while its module runs, whatever the model's size.

The forward is the model's own, with its masks and rotary embeddings. All compute in fp32.
"""

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibft.errors import SetupError
from ibft.nf4 import NF4Linear

Weights = Mapping[str, Tensor]  # read as they are asked for, on the host, each in its own float dtype
HEAD = "lm_head.weight"
PIECE = 2**26  # elements of the head's weight that are in fp32 at once: 256 MiB


def empty_model(folder: Path) -> Any:
    """The causal language model of a folder's config.json, its weights on the meta device, its buffers real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def wear(model: Any, adapter: Path) -> Any:
    """An empty model in PEFT's own LoRA layers, the adapter's weights real, in fp32 on the host.

    Raises:
        SetupError: an adapter that is not for it, or damaged.
    """
    from peft import PeftConfig, get_peft_model, load_peft_weights
    from safetensors import SafetensorError

    try:
        worn = get_peft_model(model, PeftConfig.from_pretrained(str(adapter)), low_cpu_mem_usage=True)
        state = load_peft_weights(str(adapter), device="cpu")
        # PEFT's own loader would move what it has read to the meta device, where the base is
        named = {re.sub(r"\.(lora_[AB])\.", r".\1.default.", name): value.float() for name, value in state.items()}
        unknown = worn.load_state_dict(named, strict=False, assign=True).unexpected_keys
        empty = [name for name, value in worn.named_parameters() if "lora_" in name and value.is_meta]
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SetupError(f"{adapter}: {' '.join(str(error).split())}") from error
    if unknown or empty:
        raise SetupError(
            f"{adapter} does not go with its base: PEFT finds no place or no value for {(unknown + empty)[0]}"
        )
    return worn.requires_grad_(False).eval()


def own_name(name: str) -> str:
    """Of a weight inside PEFT's layers, as the base names it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def stream(model: Any, weights: Weights, device: torch.device, *, in_4_bits: bool, ran: Callable[[], Any]) -> None:
    """Lets every module of an empty model fetch its own weights for the time of its forward.

    Args:
        model: as it is, or worn by an adapter, whose weights move to the device.
        in_4_bits: linear layers but for the head hold what NF4 leaves of their weights, as `ibft.model.load_base`'s do.
        ran: called after each module that has weights of the base.
    """
    if in_4_bits:  # on some CPUs it warns at import that an optional kernel of its own is absent: ours does not need it
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    tied = model.all_tied_weights_keys
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for prefix, module in model.named_modules():
        if ".lora_" in prefix:
            module.to(device)
            continue
        names = {key: own_name(f"{prefix}.{key}") for key, _ in module.named_parameters(recurse=False)}
        if not names:
            continue
        module.register_forward_hook(lambda *_: ran())
        if names.get("weight") == HEAD:
            module.forward = partial(_head, weights, HEAD if HEAD in weights else tied[HEAD], device)
        else:
            _lend(module, weights, names, device, in_4_bits)


def _lend(module: nn.Module, weights: Weights, names: dict[str, str], device: torch.device, in_4_bits: bool) -> None:
    empty = dict(module.named_parameters(recurse=False))
    rows_only = isinstance(module, nn.Embedding)  # few of them are looked up: the whole stays as it is in the file

    def fetch(*_: Any) -> None:
        for key, name in names.items():
            weight = weights[name].to(device)
            weight = weight if rows_only else weight.float()
            if in_4_bits and isinstance(module, nn.Linear) and key == "weight":
                weight = NF4Linear.quantize(weight).dequantize(torch.float32)
            setattr(module, key, nn.Parameter(weight, requires_grad=False))

    def give_back(_module: nn.Module, _args: Any, output: Any) -> Any:
        for key, parameter in empty.items():
            setattr(module, key, parameter)
        return output.float() if rows_only else output

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(give_back)


def _head(weights: Weights, name: str, device: torch.device, hidden: Tensor) -> Tensor:
    """hidden [..., D] -> logits [..., V], its weight in fp32 piece by piece."""
    weight = weights[name]
    return torch.cat(
        [F.linear(hidden, rows.to(device).float()) for rows in weight.split(max(1, PIECE // weight.shape[1]))], dim=-1
    )
