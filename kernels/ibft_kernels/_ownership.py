"""May a backward write into a tensor that it was handed? Only if nobody else can still read it.

`owns`: autograd gives one and the same tensor to every input of an addition, so the gradient that reaches a node may
also wait for a residual's; adding into it would corrupt that one. A gradient is ours alone if its tensor, its storage
and its Python object are referred to as often as one is that was made for a single consumer: measured once, on a graph
whose gradient is known to be nobody else's. Whatever raises a count (a waiting branch, a hook that kept it, a view, a
caller's `grad_outputs`) makes the answer no, and so does an interpreter or engine that counts in another way.

`graph_is_kept`: a backward may overwrite what its own forward saved only if no second backward will read it.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch

__all__ = ["calibrate", "graph_is_kept", "owns"]

_measured: list[tuple[int, int, int]] = []


def _counts(x: Any) -> tuple[int, int]:
    """References to the tensor and to its storage."""
    return x._use_count(), torch._C._storage_Use_Count(x.untyped_storage()._cdata)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (grad,) = grads
        del grads
        _record(grad)
        return grad


def _record(grad: torch.Tensor) -> None:
    _measured.append((*_counts(grad), sys.getrefcount(grad)))


@cache
def calibrate() -> tuple[int, int, int] | None:
    """The counts of a gradient made for one consumer alone; None where they cannot be read. Call it in a forward."""
    needed = hasattr(torch.Tensor, "_use_count"), hasattr(torch._C, "_storage_Use_Count"), hasattr(sys, "getrefcount")
    if not all(needed):
        return None
    # as if nobody had called: gradient checkpointing would count what the probe saves, and miss it in recomputation
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), nothing:
        x = torch.ones(2, 2, requires_grad=True)
        torch.autograd.backward((_Probe.apply(x) @ torch.ones(2, 2)).sum())
    return _measured.pop()


def owns(grad: torch.Tensor) -> bool:
    """Whether the running backward, which holds `grad` in one local name, may overwrite it.

    The name must be the only one: unpack it from the arguments and delete those (`(grad, *_) = grads; del grads`).
    """
    expected = calibrate()
    return (
        expected is not None
        and not torch.is_grad_enabled()  # a double backward records what it is handed
        and grad.is_contiguous()
        and (*_counts(grad), sys.getrefcount(grad)) == expected
    )


def graph_is_kept() -> bool:
    """Whether the backward that is running was called with retain_graph=True; True where torch does not say."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
