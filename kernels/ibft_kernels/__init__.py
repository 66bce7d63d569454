"""Triton kernels for information-bottleneck fine-tuning. Knows torch and triton only; works without triton
(backend="torch").

Every op takes `backend="auto" | "triton" | "torch"` and has a twin of the same name in `ibft_kernels.reference`:
plain PyTorch autograd, the oracle that the tests and benchmarks hold it against.
"""

from .ops.dropout import philox_dropout
from .ops.fold import FoldedHead, fold_head, fold_pays, folded_cross_entropy
from .ops.ib_bottleneck import Latent, ib_bottleneck, ib_bottleneck_latent
from .ops.ib_kl import ib_kl_loss
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.nf4 import nf4_dequantize
from .ops.objective import Linear, ObjectiveParts, ib_objective
from .ops.philox import noise_key, philox_normal

__all__ = [
    "FoldedHead",
    "Latent",
    "Linear",
    "ObjectiveParts",
    "fold_head",
    "fold_pays",
    "folded_cross_entropy",
    "ib_bottleneck",
    "ib_bottleneck_latent",
    "ib_kl_loss",
    "ib_objective",
    "linear_cross_entropy",
    "nf4_dequantize",
    "noise_key",
    "philox_dropout",
    "philox_normal",
]
