"""Who is compared, and why one of them cannot be here."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

Run = Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]
OURS = "ours"


@dataclass(frozen=True)
class Provider:
    """One way to compute what a comparison compares.

    run: inputs by name to outputs; under autograd, unless the comparison says that it does the whole.
    calls: how many of the things that the row is about one run does; its time is divided by that.
    gate: False for a bound that computes something else, such as a bare product; it is timed unchecked.
    timed: False for one that is only the reference of others.
    compiled: through torch.compile, made anew for each comparison.
    package, module: distribution and module that must be installed. beside: further packages whose versions count.
    gpu_only: has no CPU kernels.
    obstacle_: further reasons, asked for a device.
    """

    run: Run
    calls: int = 1
    gate: bool = True
    timed: bool = True
    compiled: bool = False
    package: str | None = None
    beside: tuple[str, ...] = ()
    module: str | None = None
    gpu_only: bool = False
    obstacle_: Callable[[torch.device], str | None] | None = None

    def obstacle(self, device: torch.device) -> str | None:
        """Why it is not measured here; None where it is."""
        if not self.timed:
            return "it is the reference only, and not timed"
        if self.gpu_only and device.type != "cuda":
            return f"{self.package or 'it'} has GPU kernels only"
        if self.package and find_spec(self.module or self.package) is None:
            return f"{self.package} is not installed"
        if self.compiled and device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            return "torch.compile needs a C++ compiler on a CPU, and there is none"
        return self.obstacle_(device) if self.obstacle_ else None

    def ready(self) -> Run:
        """What is called."""
        if not self.compiled:
            return self.run
        torch.compiler.reset()  # else the ninth shape of one function would silently run uncompiled
        return torch.compile(self.run, dynamic=False)


def compiled(provider: Provider) -> Provider:
    return replace(provider, compiled=True)


def liger(run: Run, **options: Any) -> Provider:
    return Provider(run, package="liger-kernel", module="liger_kernel", gpu_only=True, **options)


def cut_cross_entropy(run: Run, **options: Any) -> Provider:
    return Provider(run, package="cut-cross-entropy", module="cut_cross_entropy", gpu_only=True, **options)


def unsloth(run: Run, **options: Any) -> Provider:
    return Provider(run, package="unsloth", gpu_only=True, **options)


def torch_linear_cross_entropy(run: Run, **options: Any) -> Provider:
    def obstacle(_: torch.device) -> str | None:
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            return None
        return f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 has)"

    return Provider(run, obstacle_=obstacle, **options)
