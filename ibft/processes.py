"""Several processes of one run, as `accelerate launch` starts them, and the little that they must share.

Each holds the whole model and state, reads the whole data, and takes every n-th micro-batch of a step. As a
micro-batch's loss is normalised by the counts of the whole step, which every process knows from the data, the gradients
of all are *summed*, once a step: no wrapper around the model, no average. The first process alone writes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ibft.errors import SetupError

if TYPE_CHECKING:
    from accelerate import Accelerator

# The first process judges code and writes checkpoints while others wait for it. One that dies is not waited for: its
# connections close, and the launcher ends the rest.
PATIENCE = timedelta(hours=6)


def rank() -> int:
    """Number of this process among all, from 0, as the launcher says it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The same among those of this machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sum_step(parameters: Iterable[nn.Parameter], values: Tensor) -> Tensor:
    """Sum gradients over the processes, in place, and the scalars of `values` [n] with them: one reduction a step.

    A parameter has a gradient afterwards where any process had one for it.

    Returns:
        values [n], summed.

    Raises:
        SetupError: another process is gone.
    """
    weights = list(parameters)
    present = values.new_tensor([float(weight.grad is not None) for weight in weights])
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), present, values])
    del grads
    for weight in weights:
        weight.grad = None  # before the sum: the flat copy is all there is now
    with together():
        torch.distributed.all_reduce(flat)  # in place; accelerator.reduce would copy it
    *summed, present, values = flat.split([*(weight.numel() for weight in weights), len(weights), len(values)])
    for weight, grad, has in zip(weights, summed, present.tolist(), strict=True):
        if has:
            weight.grad = grad.view_as(weight)
    return values


def sum_values(accelerator: "Accelerator", values: Tensor) -> Tensor:
    """The tensor summed over the processes. Raises SetupError: another process is gone."""
    if accelerator.num_processes > 1:
        with together():
            torch.distributed.all_reduce(values)
    return values


def largest(accelerator: "Accelerator", number: int) -> int:
    """Of the numbers that the processes bring. Raises SetupError: another process is gone."""
    if accelerator.num_processes == 1:
        return number
    brought = torch.tensor([number], device=accelerator.device)
    with together():
        torch.distributed.all_reduce(brought, torch.distributed.ReduceOp.MAX)
    return int(brought)


def of_first(values: list[Any]) -> list[Any]:
    """What the first process gave. Raises SetupError: it is gone."""
    from accelerate.utils import broadcast_object_list

    with together():
        broadcast_object_list(values)
    return values


def share_weights(accelerator: "Accelerator", weights: Iterable[Tensor]) -> None:
    """Makes all processes' weights those of the first, in place. Raises SetupError: another process is gone."""
    if accelerator.num_processes == 1:
        return
    with together(), torch.no_grad():
        for weight in weights:
            torch.distributed.broadcast(weight.detach(), 0)


@contextmanager
def together() -> Iterator[None]:
    """Around what all processes do: the loss of one ends the others by one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise SetupError(f"another process of this run is gone: {reason}; --resume auto goes on") from error
