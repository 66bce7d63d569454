"""The 4-bit linear layer: NF4 with double quantisation (QLoRA, arXiv 2305.14314), exactly bitsandbytes' values.

    y = x dequantize(W)^T + b        dx = dy dequantize(W)        W is frozen: no dW

Why not `bitsandbytes.nn.Linear4bit` itself: its no-grad forward on CPUs with AVX512-BF16 repacks the weight in place,
after which training gradients are wrong and saved weights differ (seen with 0.50). Here one forward serves training,
evaluation, generation and gradient checkpointing on every backend; it only reads the packed bytes. bitsandbytes still
quantises (while transformers streams the weights in, so a full-precision copy of the model never exists). On a CPU it
still dequantises; on a CUDA device `ibft_kernels.nf4_dequantize` does, to the same bits, in memory that layers share.
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ibft_kernels import nf4_dequantize

_kept: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}  # by stream too; each as large as its largest use


def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """At least `numel` elements for one weight at a time. The same memory serves all layers that a stream runs:
    the product that reads one weight is enqueued before the next overwrites it.
    """
    key = device, dtype, torch.cuda.current_stream(device).cuda_stream
    if key not in _kept or _kept[key].numel() < numel:
        _kept.pop(key, None)  # before the larger one is made
        with torch.inference_mode(False):  # made in generation, it must still be writable in training
            _kept[key] = torch.empty(numel, dtype=dtype, device=device)
    return _kept[key]


def release_dense_buffers() -> None:
    """Give the kept buffers back: a measurement's business, since the next use makes them again."""
    _kept.clear()


class _FrozenLinear(torch.autograd.Function):
    """Saves neither x (the weight is frozen) nor the dequantised weight (made again in backward: 16 bits against 4)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "NF4Linear") -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (grad_y,) = grads
        return grad_y @ ctx.layer.dequantize(grad_y.dtype) if ctx.needs_input_grad[0] else None, None


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is held in NF4 with double quantisation.

    A subclass of `nn.Linear` so that PEFT wraps it with its ordinary LoRA layer. `weight` holds the packed bytes
    [out*in/2, 1] uint8; the remaining quantisation state is in buffers and moves with `.to(device)`.
    """

    absmax: torch.Tensor
    code: torch.Tensor
    offset: torch.Tensor
    nested_absmax: torch.Tensor
    nested_code: torch.Tensor

    def __init__(self, packed: torch.Tensor, quant_state: Any, bias: torch.Tensor | None) -> None:
        """`packed` and `quant_state` as `bitsandbytes.functional.quantize_4bit(..., compress_statistics=True)` returns.

        Raises:
            ValueError: not NF4, or not double-quantised.
        """
        if quant_state.quant_type != "nf4" or not quant_state.nested:
            raise ValueError(
                f"got {quant_state.quant_type} with double quantisation {quant_state.nested}, "
                "expected nf4 with double quantisation True"
            )
        nn.Module.__init__(self)
        self.out_features, self.in_features = quant_state.shape
        self.blocksize = quant_state.blocksize
        self.nested_blocksize = quant_state.state2.blocksize
        self.weight = nn.Parameter(packed.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("absmax", quant_state.absmax)
        self.register_buffer("code", quant_state.code)
        self.register_buffer("offset", quant_state.offset)
        self.register_buffer("nested_absmax", quant_state.state2.absmax)
        self.register_buffer("nested_code", quant_state.state2.code)

    @classmethod
    def quantize(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> "NF4Linear":
        """Quantise a dense weight [out, in] (fp32, fp16 or bf16), blocks of 64, their absmax in blocks of 256."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.detach(), compress_statistics=True, quant_type="nf4")
        return cls(packed, state, bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), of the weight that the bytes stand for."""
        return self.out_features, self.in_features

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] in `dtype`. On a CUDA device it lies in a buffer that the next layer's overwrites:
        enqueue what reads it on the current stream before anything is dequantised again there, or clone it.
        """
        if self.weight.is_cuda:
            return self._dequantize_into_buffer(dtype)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        assert self.nested_absmax.dtype == torch.float32, "the quantisation state must stay in fp32"
        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=self.code,
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=QuantState(
                absmax=self.nested_absmax, code=self.nested_code, blocksize=self.nested_blocksize, dtype=torch.float32
            ),
        )
        return dequantize_4bit(self.weight.data, state)

    def _dequantize_into_buffer(self, dtype: torch.dtype) -> torch.Tensor:
        return nf4_dequantize(
            self.weight.detach(), self.absmax, self.code, self.offset, self.nested_absmax, self.nested_code,
            shape=self.shape, dtype=dtype, blocksize=self.blocksize, nested_blocksize=self.nested_blocksize,
            out=_buffer(math.prod(self.shape), dtype, self.weight.device),
        )  # fmt: skip

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _FrozenLinear.apply(input, self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"


def is_linear4bit(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' own 4-bit layer, which is there only if somebody has imported that library."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def why_not_nf4(layer: Any) -> str | None:
    """Why an `NF4Linear` cannot hold what this `bitsandbytes.nn.Linear4bit` holds; None if it can."""
    state = layer.weight.quant_state
    if state is None:
        return "4-bit weights that are not quantised yet: move the model to its device first"
    if state.quant_type != "nf4" or not state.nested:
        double = "with" if state.nested else "without"
        return f"{state.quant_type} {double} double quantisation, expected nf4 with bnb_4bit_use_double_quant"
    if layer.weight.dtype != torch.uint8:
        return f"4-bit weights stored as {layer.weight.dtype}, expected bnb_4bit_quant_storage torch.uint8"
    return None


class Linear4bitWeight:
    """The weight [out, in] of a `bitsandbytes.nn.Linear4bit` that stays in its model, as the fused layers read it.

    Copies nothing. Merging and moving give the layer other bytes, so its present ones are asked for at each use.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._of: Any = None
        self._nf4: NF4Linear

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """As `NF4Linear.dequantize`."""
        weight = self.layer.weight
        if self._of is not weight or self._nf4.weight.data_ptr() != weight.data_ptr():
            self._of, self._nf4 = weight, NF4Linear(weight.data, weight.quant_state, None)
        return self._nf4.dequantize(dtype)


def adopt_linear4bit(model: nn.Module) -> int:
    """Replace, in place, every `bitsandbytes.nn.Linear4bit` of `model` by an `NF4Linear` over the same bytes.

    Must run before the first forward (see the module docstring). Returns how many were replaced.
    """
    from bitsandbytes.nn import Linear4bit

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name, module in found:
        parent_name, _, child_name = name.rpartition(".")
        owned = NF4Linear(module.weight.data, module.weight.quant_state, module.bias)  # type: ignore[attr-defined]
        setattr(model.get_submodule(parent_name), child_name, owned)
    return len(found)
