"""Randomness that follows the sample (DESIGN: noise is a function of epoch, sample and position, not of the batch).

Every random draw of a training step has a *stream*: 0 for the bottleneck's eps, one for each LoRA input. The Philox
key is (run seed, stream) and its counter (epoch, sample, position, column), so masks and noise do not depend on
micro-batch size, accumulation, packing, rank or resume.
"""

import torch
from torch import nn

from ibft_kernels import noise_key, philox_dropout

Z_STREAM = 0

# one dropout mask for each *shared input*: q, k, v read the same tensor, and so do gate and up
_INPUT_OF = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
INPUTS_PER_LAYER = 4


def dropout_stream(layer: int, projection: str) -> int:
    """Stream of the input of `projection` ("q_proj" ... "down_proj") in decoder layer `layer` (from 0)."""
    return 1 + INPUTS_PER_LAYER * layer + _INPUT_OF[projection]


class NoiseContext:
    """Where the modules of a model find the noise ids of the micro-batch under way.

    The trainer sets `noise_ids` [B, T, 3] int32 before each forward; it must stay until that micro-batch's backward has
    ended, because gradient checkpointing runs the forward again.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.noise_ids: torch.Tensor | None = None

    def key(self, stream: int) -> int:
        return noise_key(self.seed, stream)


class SampleDropout(nn.Module):
    """LoRA dropout with a Philox mask keyed by the sample; the identity in evaluation mode."""

    def __init__(self, p: float, context: NoiseContext, stream: int) -> None:
        super().__init__()
        self.p, self.context, self.stream = p, context, stream

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        if self.context.noise_ids is None:
            raise RuntimeError(
                "dropout needs the micro-batch's noise ids: set NoiseContext.noise_ids before the forward"
            )
        return philox_dropout(x, self.p, seed=self.context.key(self.stream), noise_ids=self.context.noise_ids)

    def extra_repr(self) -> str:
        return f"p={self.p}, stream={self.stream}"
