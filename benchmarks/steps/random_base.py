"""Bases of the published shapes with random weights, made on the device already in 4 bits.

Speed and memory depend on shapes and bytes, not on what a model has learned; so a 70 B base needs neither a download
nor, for a moment, a full-precision copy. Every frozen linear layer of the decoder blocks is an `NF4Linear` over random
bytes; embeddings, norms and lm_head are in the compute dtype.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ibft.nf4 import NF4Linear

Shape = str | Mapping[str, Any]  # a name in SHAPES, or settings as they have

_LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
_CODELLAMA = {"rope_theta": 1e6, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5}

# From the config.json of each model.
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-coder-7b": {  # deepseek-ai/deepseek-coder-7b-instruct-v1.5
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    },
    "codellama-7b": {  # codellama/CodeLlama-7b-Instruct-hf
        "vocab_size": 32016, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, **_CODELLAMA,
    },
    "llama3-8b": {  # meta-llama/Meta-Llama-3-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, **_LLAMA3,
    },
    "qwen2.5-coder-1.5b": {  # Qwen/Qwen2.5-Coder-1.5B
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "34b": {  # codellama/CodeLlama-34b-hf
        "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48,
        "num_attention_heads": 64, "num_key_value_heads": 8, **_CODELLAMA,
    },
    "70b": {  # meta-llama/Meta-Llama-3-70B
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, **_LLAMA3,
    },
    "tiny": {  # no published model: every branch of this file, on a CPU
        "model_type": "qwen2", "vocab_size": 507, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def shape_of(name: str, **changes: Any) -> dict[str, Any]:
    """One of `SHAPES` with other sizes.

    Raises:
        ValueError: it has no setting of that name.
    """
    if unknown := changes.keys() - SHAPES[name].keys():
        raise ValueError(f"{name}: got {', '.join(sorted(unknown))}, expected some of {', '.join(SHAPES[name])}")
    return SHAPES[name] | changes


def model_config(shape: Shape) -> Any:
    """The transformers configuration of a shape."""
    from transformers import AutoConfig

    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    settings = {"model_type": "llama", "tie_word_embeddings": False, **sizes}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def random_base(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0, attn_implementation: str = "sdpa"
) -> Any:
    """A frozen causal LM of that shape on `device`; the same bytes for the same seed and device."""
    from transformers import AutoModelForCausalLM

    config = model_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    generator = torch.Generator(device).manual_seed(seed)
    _replace(model.model.layers, nn.Linear, lambda layer: random_nf4(layer, generator, dtype))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_dense(parameter, generator, dtype), requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.device(device):  # its frequencies are a buffer that no checkpoint holds
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    return model.requires_grad_(False)


def random_nf4(layer: nn.Linear, generator: torch.Generator, dtype: torch.dtype) -> NF4Linear:
    """Random bytes for a linear layer of that shape; its weights are spread as D^-1/2 is, D the width of its input.

    absmax: 8 bits each over a nested absmax that varies it by up to 30 %, with the offset as its mean; never negative.
    """
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    device = generator.device
    numel = layer.out_features * layer.in_features
    code = get_4bit_type("nf4", device=device)
    blocks = math.ceil(numel / 64)
    absmax = layer.in_features**-0.5 / float(code.square().mean().sqrt())
    nested = QuantState(
        absmax=torch.full((math.ceil(blocks / 256),), 0.3 * absmax, device=device),
        code=create_dynamic_map().to(device),
        blocksize=256,
        dtype=torch.float32,
    )

    def bytes_(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device, generator=generator)

    state = QuantState(
        absmax=bytes_(blocks),
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=code,
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.tensor(absmax, device=device),
        state2=nested,
    )
    bias = None if layer.bias is None else torch.zeros(layer.out_features, dtype=dtype, device=device)
    return NF4Linear(bytes_(math.ceil(numel / 2), 1), state, bias)


def _dense(parameter: torch.Tensor, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Ones for a norm; for embeddings and head, D^-1/2 times a normal variate."""
    value = torch.ones(parameter.shape, dtype=dtype, device=generator.device)
    return value if parameter.dim() == 1 else value.normal_(0, parameter.shape[1] ** -0.5, generator=generator)


def as_linear4bit(model: Any, dtype: torch.dtype) -> Any:
    """Replace, in place, every `NF4Linear` by bitsandbytes' own `Linear4bit` over the same bytes, for products in
    `dtype`: `adopt_linear4bit` undone, for the baseline."""
    from benchmarks.steps.plain_loop import keep_weights_unpacked

    _replace(model, NF4Linear, lambda layer: _linear4bit(layer, dtype))
    model.is_loaded_in_4bit = True  # PEFT asks for it before it takes its own 4-bit LoRA layer
    return keep_weights_unpacked(model)


def save_4bit(model: Any, folder: str) -> None:
    """Write a model of `as_linear4bit` as the 4-bit checkpoint that transformers loads."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=model.dtype
    )
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)
    model.save_pretrained(folder)


def _linear4bit(layer: NF4Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    state = QuantState(
        absmax=layer.absmax,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=layer.code,
        blocksize=layer.blocksize,
        quant_type="nf4",
        dtype=dtype,
        offset=layer.offset,
        state2=QuantState(
            absmax=layer.nested_absmax, code=layer.nested_code, blocksize=layer.nested_blocksize, dtype=torch.float32
        ),
    )
    with torch.device("meta"):
        twin = Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
    twin.weight = Params4bit(
        layer.weight.data, requires_grad=False, quant_state=state, quant_type="nf4", module=twin, bnb_quantized=True
    )
    twin.quant_state = state
    twin.bias = layer.bias
    return twin


def _replace(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    for name, module in [*model.named_modules()]:
        if type(module) is kind:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
