"""The oracle: the names and signatures of `ibft_kernels` in obvious PyTorch under plain autograd. Slow, and meant to
be read.

`backend` is accepted, so that a test can swap an op for its twin, and not looked at. Arguments are not checked.
"""

from .dropout import philox_dropout
from .ib_bottleneck import ib_bottleneck
from .ib_kl import ib_kl_loss
from .ib_lora_backward import ib_lora_backward
from .linear_cross_entropy import fold_head, folded_cross_entropy, linear_cross_entropy
from .lora import ib_lora_mlp, lora_linear, lora_mlp, lora_qkv
from .nf4 import nf4_dequantize
from .objective import ib_objective
from .philox import noise_key, philox_normal
from .rms_norm import add_rms_norm, rms_norm
from .rope import rotate
from .swiglu import swiglu_backward_, swiglu_forward

__all__ = [
    "add_rms_norm",
    "fold_head",
    "folded_cross_entropy",
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
    "noise_key",
    "philox_dropout",
    "philox_normal",
    "rms_norm",
    "rotate",
    "swiglu_backward_",
    "swiglu_forward",
]
