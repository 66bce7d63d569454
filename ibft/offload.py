"""The embedding table in host memory: [V, D], of which a step reads a few thousand rows.

The rows are gathered on the host and sent to the device: N D elements a micro-batch, as much as one block's input. The
trainer gathers them from the ids before these are sent (`rows`), so that no step waits for the device; generation asks
by ids on the device (`forward`) and does wait. The table is frozen and never leaves the host, so it need not be pinned;
the gathered rows are.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ibft.tap import decoder_of

__all__ = ["HostEmbedding", "offload_embeddings"]


class HostEmbedding(nn.Module):
    """Stands in for a frozen `nn.Embedding`; its table is no parameter, so that `.to(device)` leaves it where it is and
    transformers does not take the host for the model's device."""

    def __init__(self, embedding: nn.Embedding, device: torch.device) -> None:
        super().__init__()
        self.table = [embedding.weight.detach().to("cpu")]  # in a list: not registered
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.device = device

    @property
    def weight(self) -> torch.Tensor:
        return self.table[0]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., D] on the device, from ids [...] on the host."""
        if self.device.type != "cuda":
            return F.embedding(ids, self.weight).to(self.device)
        gathered = torch.empty(ids.numel(), self.embedding_dim, dtype=self.weight.dtype, pin_memory=True)
        torch.index_select(self.weight, 0, ids.reshape(-1), out=gathered)
        return gathered.view(*ids.shape, -1).to(self.device, non_blocking=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.rows(input.cpu())


def offload_embeddings(base: nn.Module, device: torch.device) -> HostEmbedding:
    """Move the embedding table of a causal LM to the host."""
    decoder = decoder_of(base)
    embedding, head = decoder.embed_tokens, base.lm_head
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Module)
    assert embedding.weight is not head.weight, "choose_plan refuses tied embeddings"
    decoder.embed_tokens = host = HostEmbedding(embedding, device)
    return host
