"""ibft-fast: information-bottleneck fine-tuning (IB-FT, arXiv 2510.16022) of code LLMs.

`from ibft import ib_kl_loss` imports torch and triton; nothing of transformers, peft or bitsandbytes.
Names resolve on first use (PEP 562), so that `ibft-fast --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "ib_kl_loss": "ibft_kernels",
    "FoldedHead": "ibft_kernels",
    "Linear": "ibft_kernels",
    "fold_head": "ibft_kernels",
    "folded_cross_entropy": "ibft_kernels",
    "ib_bottleneck": "ibft_kernels",
    "ib_objective": "ibft_kernels",
    "LoraProjection": "ibft_kernels",
    "ib_lora_backward": "ibft_kernels",
    "ib_lora_mlp": "ibft_kernels",
    "lora_linear": "ibft_kernels",
    "lora_mlp": "ibft_kernels",
    "lora_qkv": "ibft_kernels",
    "nf4_dequantize": "ibft_kernels",
    "rms_norm": "ibft_kernels",
    "rotate": "ibft_kernels",
    "Dropout": "ibft_kernels",
    "LoraShadow": "ibft_kernels",
    "MlpShadow": "ibft_kernels",
    "linear_cross_entropy": "ibft_kernels",
    "philox_normal": "ibft_kernels",
    "BatchContext": "ibft.context",
    "fuse": "ibft.fused",
    "InformationBottleneck": "ibft.bottleneck",
    "IBObjective": "ibft.objective",
    "LossParts": "ibft.objective",
    "HiddenTap": "ibft.tap",
}

__all__ = [
    "BatchContext",
    "Dropout",
    "FoldedHead",
    "HiddenTap",
    "IBObjective",
    "InformationBottleneck",
    "Linear",
    "LoraProjection",
    "LoraShadow",
    "LossParts",
    "MlpShadow",
    "__version__",
    "fold_head",
    "folded_cross_entropy",
    "fuse",
    "ib_bottleneck",
    "ib_kl_loss",
    "ib_lora_backward",
    "ib_lora_mlp",
    "ib_objective",
    "linear_cross_entropy",
    "lora_linear",
    "lora_mlp",
    "lora_qkv",
    "nf4_dequantize",
    "philox_normal",
    "rms_norm",
    "rotate",
]

if TYPE_CHECKING:
    from ibft.bottleneck import InformationBottleneck
    from ibft.context import BatchContext
    from ibft.fused import fuse
    from ibft.objective import IBObjective, LossParts
    from ibft.tap import HiddenTap
    from ibft_kernels import (
        Dropout,
        FoldedHead,
        Linear,
        LoraProjection,
        LoraShadow,
        MlpShadow,
        fold_head,
        folded_cross_entropy,
        ib_bottleneck,
        ib_kl_loss,
        ib_lora_backward,
        ib_lora_mlp,
        ib_objective,
        linear_cross_entropy,
        lora_linear,
        lora_mlp,
        lora_qkv,
        nf4_dequantize,
        philox_normal,
        rms_norm,
        rotate,
    )


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ibft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
