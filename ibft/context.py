"""What the modules of a model need to know of the micro-batch under way, beyond what transformers hands them.

The trainer opens a micro-batch before each forward and closes it after that micro-batch's backward: until then gradient
checkpointing may run the forward again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ibft.attention import Segments
from ibft_kernels import Latent, Linear, noise_key


@dataclass
class LatentRequest:
    """Asks the tapped block for the bottleneck's latent; the block puts it into `latent` in the first forward."""

    encoder: Linear
    settings: dict[str, Any]  # seed, noise_ids, mask, logvar_range, reduction, normalizer of `ib_bottleneck`
    latent: Latent | None = None


@dataclass
class BatchContext:
    """One run's: the seed, and what is current.

    Attributes:
        seed: the run's; every stream of random numbers has its own key (`ibft.noise`).
        noise_ids: [B, T, 3] int32 of the micro-batch.
        segments: of a packed micro-batch; None: transformers' attention mask rules.
        request: the tapped block's order, where it is fused with the bottleneck.
    """

    seed: int
    noise_ids: torch.Tensor | None = field(default=None, repr=False)
    segments: Segments | None = field(default=None, repr=False)
    request: LatentRequest | None = field(default=None, repr=False)

    def key(self, stream: int) -> int:
        return noise_key(self.seed, stream)

    @contextmanager
    def batch(
        self, noise_ids: torch.Tensor, segments: Segments | None, request: LatentRequest | None = None
    ) -> Iterator[None]:
        self.noise_ids, self.segments, self.request = noise_ids, segments, request
        try:
            yield
        finally:
            self.noise_ids = self.segments = self.request = None
