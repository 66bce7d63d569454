"""Triton kernels for information-bottleneck fine-tuning. Knows torch and triton only; works without triton
(backend="torch").

Every op takes `backend="auto" | "triton" | "torch"` and has a twin of the same name in `ibft_kernels.reference`:
plain PyTorch autograd, the oracle that the tests and benchmarks hold it against.
"""

from .ops.dropout import philox_dropout
from .ops.fold import FoldedHead, fold_head, fold_pays, folded_cross_entropy
from .ops.ib_bottleneck import Latent, ib_bottleneck, ib_bottleneck_latent
from .ops.ib_kl import ib_kl_loss
from .ops.ib_lora_backward import IBLoraGradients, ib_lora_backward
from .ops.ib_lora_mlp import Tapped, ib_lora_mlp
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.lora import Dropout, LoraProjection, LoraShadow, lora_linear, lora_qkv, refresh_shadows
from .ops.lora_mlp import MlpShadow, lora_mlp
from .ops.nf4 import nf4_dequantize
from .ops.objective import Linear, ObjectiveParts, ib_objective
from .ops.philox import noise_key, philox_normal
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rope import rotate
from .ops.swiglu import swiglu_backward_, swiglu_forward

__all__ = [
    "Dropout",
    "FoldedHead",
    "IBLoraGradients",
    "Latent",
    "Linear",
    "LoraProjection",
    "LoraShadow",
    "MlpShadow",
    "ObjectiveParts",
    "Tapped",
    "add_rms_norm",
    "fold_head",
    "fold_pays",
    "folded_cross_entropy",
    "ib_bottleneck",
    "ib_bottleneck_latent",
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
    "refresh_shadows",
    "rms_norm",
    "rotate",
    "swiglu_backward_",
    "swiglu_forward",
]
