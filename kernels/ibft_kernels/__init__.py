"""Triton kernels for information-bottleneck fine-tuning. Knows torch and triton only; works without triton
(backend="torch").

Every op takes `backend="auto" | "triton" | "torch"` and has a twin of the same name in `ibft_kernels.reference`:
plain PyTorch autograd, the oracle that the tests and benchmarks hold it against.
"""

from .ops.dropout import philox_dropout
from .ops.ib_kl import ib_kl_loss
from .ops.philox import noise_key, philox_normal

__all__ = ["ib_kl_loss", "noise_key", "philox_dropout", "philox_normal"]
