"""Randomness that follows the sample: noise is a function of epoch, sample and position, not of the batch.

Every random draw of a training step has a *stream*: 0 for the bottleneck's eps (`z_stream` for those of several), one
for each LoRA input. The Philox key is (run seed, stream) and its counter (epoch, sample, position, column), so masks
and noise do not depend on micro-batch size, accumulation, packing, rank or resume.
"""

import torch
from torch import nn

from ibft.context import BatchContext
from ibft_kernels import Dropout, philox_dropout

Z_STREAM = 0

# one dropout mask for each *shared input*: q, k, v read the same tensor, and so do gate and up
_INPUT_OF = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
INPUTS_PER_LAYER = 4
BETWEEN_BOTTLENECKS = 2**20  # streams, more than LoRA inputs take


def z_stream(index: int) -> int:
    """Stream of the eps of bottleneck number `index` (from 0)."""
    return Z_STREAM + BETWEEN_BOTTLENECKS * index


def dropout_stream(layer: int, projection: str) -> int:
    """Stream of the input of `projection` ("q_proj" ... "down_proj") in decoder layer `layer` (from 0)."""
    return 1 + INPUTS_PER_LAYER * layer + _INPUT_OF[projection]


class SampleDropout(nn.Module):
    """LoRA dropout with a Philox mask keyed by the sample; the identity in evaluation mode.

    The module drops for PEFT's own forward; the fused layers ask it for `settings`.
    """

    def __init__(self, p: float, context: BatchContext, stream: int) -> None:
        super().__init__()
        self.p, self.context, self.stream = p, context, stream

    def settings(self) -> Dropout | None:
        """p, key and noise ids of the micro-batch under way; None in evaluation mode."""
        if not self.training:
            return None
        if self.context.noise_ids is None:
            raise RuntimeError(
                "dropout needs the micro-batch's noise ids: run the forward inside BatchContext.batch "
                "(a model that an IBFTTrainer has adopted trains in none but an IBFTTrainer)"
            )
        return Dropout(self.p, self.context.key(self.stream), self.context.noise_ids)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        settings = self.settings()
        return x if settings is None else philox_dropout(x, self.p, seed=settings.seed, noise_ids=settings.noise_ids)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"
