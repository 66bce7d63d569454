"""Which activations a decoder block keeps for backward, block by block: memory against arithmetic.

    none    keep everything
    mlp     keep everything but gate and up, the two widest: the fused MLP makes them again (2/9 of its products)
    full    keep the block's input alone, and run the block again in backward (gradient checkpointing)

With offloading, the inputs that `full` keeps wait in pinned host memory: copied out on a side stream while the next
blocks run, and back while the block above is in backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint

from ibft.fused import Fused
from ibft.tap import decoder_of

Recompute = Literal["none", "mlp", "full"]

__all__ = ["HostCopies", "Recompute", "set_recompute"]


class HostCopies:
    """Inputs of checkpointed blocks, in host memory between forward and backward."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.held: list[_HostCopy] = []

    def take(self, x: torch.Tensor) -> "_HostCopy":
        copy = _HostCopy(self, len(self.held), x)
        self.held.append(copy)
        return copy


class _HostCopy:
    """One input: the original until `release`, then its copy on the host, then back."""

    def __init__(self, copies: HostCopies, index: int, x: torch.Tensor) -> None:
        self.copies, self.index, self.original = copies, index, x
        self.host: torch.Tensor | None = None
        self.back: torch.Tensor | None = None
        self.arrived: torch.cuda.Event | None = None

    def get(self) -> torch.Tensor:
        """The input: as it came in the forward, with its graph; a leaf with the same values in the recomputation."""
        if self.original is not None:
            return self.original
        self.fetch()
        if self.index > 0:
            self.copies.held[self.index - 1].fetch()  # what backward asks for next
        del self.copies.held[self.index :]
        x, self.back = self.back, None
        if self.arrived is not None:
            torch.cuda.current_stream().wait_event(self.arrived)
        assert x is not None
        return x.requires_grad_(self.requires_grad)

    def release(self) -> None:
        """Start the copy to the host and let the original go."""
        x, self.original, stream = self.original, None, self.copies.stream
        self.requires_grad, self.device = x.requires_grad, x.device
        x = x.detach()
        if stream is None:
            self.host = x.clone()
            return
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is lent again only after the copy

    def fetch(self) -> None:
        """Start the copy back, once."""
        if self.back is not None or self.host is None:
            return
        host, self.host, stream = self.host, None, self.copies.stream
        if stream is None:
            self.back = host
            return
        self.back = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.back.copy_(host, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record(stream)
        self.back.record_stream(stream)


def set_recompute(
    model: torch.nn.Module, fused: Fused, modes: Sequence[Recompute], *, copies: HostCopies | None = None
) -> None:
    """Give every decoder block its mode, one an entry of `modes`; `copies`: offload the inputs of the full ones.

    A block whose MLP is not fused keeps everything or nothing: "mlp" becomes "full" there. Call it once a model.

    Raises:
        ValueError: as many modes as blocks are expected, each of them known.
    """
    blocks: Any = decoder_of(model).layers
    if len(modes) != len(blocks) or any(mode not in get_args(Recompute) for mode in modes):
        raise ValueError(f"modes: got {list(modes)}, expected {len(blocks)} of {', '.join(get_args(Recompute))}")
    for block, mlp, mode in zip(blocks, fused.mlps, modes, strict=True):
        if mlp is not None:
            mlp.recompute = mode == "mlp"
        if mode == "full" or (mode == "mlp" and mlp is None):
            block.forward = _checkpointed(block, block.forward, copies)


def _checkpointed(block: Any, forward: Callable[..., Any], copies: HostCopies | None) -> Callable[..., Any]:
    dropout = float(getattr(block.self_attn, "attention_dropout", 0.0))

    def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(hidden_states, *args, **kwargs)
        # the only randomness of torch's own generator is attention dropout: LoRA's and the bottleneck's are keyed
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout > 0}
        if copies is None:
            return checkpoint(forward, hidden_states, *args, **settings, **kwargs)
        held = copies.take(hidden_states)
        out = checkpoint(lambda: forward(held.get(), *args, **kwargs), **settings)
        held.release()
        return out

    return run
