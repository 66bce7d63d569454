"""The oracle: the names and signatures of `ibft_kernels` in obvious PyTorch under plain autograd. Slow, and meant to
be read.

`backend` is accepted, so that a test can swap an op for its twin, and not looked at. Arguments are not checked.
"""

from .dropout import philox_dropout
from .ib_kl import ib_kl_loss
from .philox import noise_key, philox_normal

__all__ = ["ib_kl_loss", "noise_key", "philox_dropout", "philox_normal"]
