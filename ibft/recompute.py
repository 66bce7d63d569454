"""Which activations a decoder block keeps for backward, block by block: memory against arithmetic.

    none    keep everything
    mlp     keep everything but gate and up, the two widest: the fused MLP makes them again (2/9 of its products)
    full    keep the block's input alone, and run the block again in backward (gradient checkpointing)

With offloading, the inputs that `full` keeps wait in pinned host memory: copied out on a side stream while the next
blocks run, and back while the block above is in backward. `ibft.plan` chooses the modes.
"""

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch.utils.checkpoint import checkpoint

from ibft.fused import Fused
from ibft.plan import Recompute
from ibft.tap import decoder_of

__all__ = ["HostCopies", "Recompute", "set_recompute"]

LEAVING = 2  # originals that stay on the device while their copies are on the way out


class HostCopies:
    """Inputs of checkpointed blocks, in host memory between forward and backward.

    An entry lives as long as the graph that will ask for it: each is held by its block's checkpoint, and by nothing
    here but the few that are still leaving. A forward that never meets its backward leaves no entry behind.

    The caching allocator gives freed memory to whoever asks next, in the order of the main stream. So before an
    original is let go, the main stream waits for its copy, which began some blocks ago. (`record_stream` would hold
    the memory until the *host* sees the copy done: the host runs ahead by a whole forward, so nothing would be freed.)
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.leaving: deque[_HostCopy] = deque()
        self.last: Callable[[], _HostCopy | None] = lambda: None  # a weak reference

    def take(self, x: torch.Tensor, *, first: bool) -> "_HostCopy":
        """An entry for a block's input; `first`: of the lowest checkpointed block, where a forward begins."""
        if first:  # whatever an abandoned forward left
            while self.leaving:
                self.leaving.popleft().let_go()
        copy = _HostCopy(self, x, None if first else self.last())
        self.last = weakref.ref(copy)
        return copy


class _HostCopy:
    """One input: the original in the forward, then its copy on the host, then back for the recomputation."""

    def __init__(self, copies: HostCopies, x: torch.Tensor, below: "_HostCopy | None") -> None:
        self.copies, self.below = copies, below
        self.original: torch.Tensor | None = x
        self.requires_grad, self.device = x.requires_grad, x.device
        self.released = False
        self.host: torch.Tensor | None = None
        self.back: torch.Tensor | None = None
        self.left: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None

    def get(self) -> torch.Tensor:
        """The input: as it came in the forward, with its graph; a leaf with the same values in the recomputation."""
        if not self.released:
            assert self.original is not None
            return self.original
        self.fetch()
        if self.below is not None:
            self.below.fetch()  # what backward asks for next
        x, self.back = self.back, None
        if x is None:
            raise RuntimeError("an offloaded input was asked for twice: backward runs once (no retain_graph)")
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        return x.requires_grad_(self.requires_grad)

    def release(self) -> None:
        """Start the copy to the host. The original goes once `LEAVING` others have started after it."""
        assert self.original is not None
        x = self.original = self.original.detach()  # its memory alone: the graph is the blocks' business
        self.released = True
        stream = self.copies.stream
        if stream is None:
            self.host = x.clone()
        else:
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                self.host.copy_(x, non_blocking=True)
                self.left = torch.cuda.Event()
                self.left.record(stream)
        leaving = self.copies.leaving
        leaving.append(self)
        while len(leaving) > LEAVING:
            leaving.popleft().let_go()

    def let_go(self) -> None:
        """Free the original, after its copy is done."""
        if self.left is not None:
            torch.cuda.current_stream(self.device).wait_event(self.left)
        self.original = None

    def fetch(self) -> None:
        """Start the copy back, once; an original that is still here is taken as it is."""
        if self.back is not None or self.host is None:
            return
        host, self.host, stream = self.host, None, self.copies.stream
        if self.original is not None:
            self.copies.leaving.remove(self)
            self.back = self.original
            self.let_go()
        elif stream is None:
            self.back = host
        else:
            # made on the main stream, which waits for the copy before it reads, and so before it can give it away
            self.back = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self.back.copy_(host, non_blocking=True)
                self.arrived = torch.cuda.Event()
                self.arrived.record(stream)


def set_recompute(
    model: torch.nn.Module, fused: Fused, modes: Sequence[Recompute], *, copies: HostCopies | None = None
) -> None:
    """Give every decoder block its mode, one an entry of `modes`; `copies`: offload the inputs of the full ones.

    A block whose MLP is not fused keeps everything or nothing: "mlp" becomes "full" there. A block with attention
    dropout keeps its input on the device. A second call replaces the first's modes.

    Raises:
        ValueError: as many modes as blocks are expected, each of them known.
    """
    blocks: Any = decoder_of(model).layers
    if len(modes) != len(blocks) or any(mode not in get_args(Recompute) for mode in modes):
        raise ValueError(f"modes: got {list(modes)}, expected {len(blocks)} of {', '.join(get_args(Recompute))}")
    first = True
    for block, mlp, mode in zip(blocks, fused.mlps, modes, strict=True):
        if mlp is not None:
            mlp.recompute = mode == "mlp"
        if isinstance(block.forward, Checkpointed):
            block.forward = block.forward.forward
        if mode == "full" or (mode == "mlp" and mlp is None):
            block.forward = Checkpointed(block, block.forward, copies, first=first)
            first = False


class Checkpointed:
    """Stands in for a block's forward: keeps its input, on the device or the host, and runs it again in backward."""

    def __init__(self, block: Any, forward: Callable[..., Any], copies: HostCopies | None, *, first: bool) -> None:
        self.block, self.forward, self.copies, self.first = block, forward, copies, first
        # the only randomness of torch's own generator: LoRA's and the bottleneck's are keyed
        self.dropout = float(getattr(block.self_attn, "attention_dropout", 0.0)) > 0

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(hidden_states, *args, **kwargs)
        settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.dropout}
        # checkpoint saves the generators of the devices that it sees tensors of: with dropout it must see one
        if self.copies is None or self.dropout:
            return checkpoint(self.forward, hidden_states, *args, **settings, **kwargs)
        held = self.copies.take(hidden_states, first=self.first)
        out = checkpoint(lambda: self.forward(held.get(), *args, **kwargs), **settings)
        held.release()
        return out
