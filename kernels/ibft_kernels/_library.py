"""Where ops are registered with torch.library, so that torch.compile and autograd see one node each.

Two kinds, because `register_autograd` refuses ops that write to an argument: functional ops, which carry autograd, and
buffer-writing ones (their names end in "_"), which the backward of the former calls. Integers that change from step to
step would be compiled in as constants; a seed or a normalizer that does should come as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

__all__ = ["NAMESPACE", "library_op"]

NAMESPACE = __name__.partition(".")[0]  # of the package: a copy under another name registers beside it


def library_op(name: str, schema: str, *, mutates: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.custom_op` in this package's namespace; `schema` as in native_functions.yaml, without the name.

    Explicit schemas, since inferring one from annotations depends on the torch version. The op runs with its tensors'
    GPU as the current one: Triton launches on the current device, wherever the pointers lead.
    """

    def register(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def on_their_device(*arguments: Any) -> Any:
            device = _device_of(arguments)
            if device is None or device.type != "cuda":
                return function(*arguments)
            with torch.cuda.device(device):
                return function(*arguments)

        return torch.library.custom_op(f"{NAMESPACE}::{name}", on_their_device, mutates_args=mutates, schema=schema)

    return register


def _device_of(arguments: Iterable[Any]) -> torch.device | None:
    """Of the first tensor, which may be the first of a list."""
    for argument in arguments:
        first = argument[0] if isinstance(argument, list) and argument else argument
        if isinstance(first, torch.Tensor):
            return first.device
    return None
