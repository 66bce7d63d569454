"""Whether a merged model is base + adapter: logits of both, and how far they are from those of the 4-bit base."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ibft.config import ModelConfig
from ibft.console import size
from ibft.errors import SetupError
from ibft.evaluation.local_model import LocalModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROMPTS = (
    "Write a function that returns the sum of two numbers.\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "module top_module(input clk, input d, output reg q);\n    always @(posedge clk)",
)
LARGE = 4_000_000_000  # parameters beyond which a CPU is too slow for a check that nobody has asked for


@dataclass(frozen=True)
class Difference:
    """Of two models' logits, absolute. same_argmax: share of the positions with the same most probable token."""

    largest: float
    mean: float
    same_argmax: float
    positions: int

    @classmethod
    def of(cls, one: "Tensor", other: "Tensor") -> "Difference":
        """Logits [N, V]."""
        gap = (one - other).abs()
        same = (one.argmax(-1) == other.argmax(-1)).double().mean()
        return cls(float(gap.max()), float(gap.mean()), float(same), len(one))

    def describe(self) -> str:
        return (
            f"at most {self.largest:.3g} apart, {self.mean:.3g} in the mean; the same most probable token at "
            f"{self.same_argmax:.1%} of {self.positions} positions"
        )


def verify_merge(here: LocalModel, merged: Path) -> "dict[str, Difference]":
    """The merged model beside base + adapter in plain PEFT, and beside the 4-bit base + adapter if that was trained.

    All compute in fp32, so that the differences are those of the weights. One model at a time is in memory.
    """
    import torch

    here = replace(here, dtype=torch.float32)
    whole = replace(here, config=here.config.model_copy(update={"quantization": "none"}))
    alone = replace(whole, adapter=None, config=ModelConfig(name_or_path=str(merged), quantization="none"))
    logits = _logits(alone)
    found = {"the full-precision base + adapter": Difference.of(logits, _logits(whole))}
    if here.config.quantization == "nf4":
        found["the 4-bit base + adapter, as trained"] = Difference.of(logits, _logits(here))
    return found


def _logits(here: LocalModel) -> "Tensor":
    """Of every position of the prompts: [N, V] fp32 on the CPU."""
    import torch

    model = here.load().eval()
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([here.tokenizer(prompt)["input_ids"]], device=here.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)


def where_to_verify(parameters: int, wanted: bool | None) -> "tuple[torch.device | None, str]":
    """A device that holds a whole model in fp32; or None and why not. Raises SetupError: none, and it is `wanted`."""
    import torch

    from ibft.memory import free_memory

    if wanted is False:
        return None, "--no-verify"
    need, reason = 5 * parameters, ""  # 4 bytes each, and the adapter and one layer's work beside them
    for kind in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        device = torch.device(kind)
        free = free_memory(device)
        if free is not None and free < need:
            reason = f"a whole model in fp32 takes {size(need)}, and {size(free)} are free"
        elif kind == "cpu" and parameters > LARGE and wanted is None:
            reason = f"{parameters:,} parameters take long on a CPU (--verify does it all the same)"
        else:
            return device, ""
    if wanted:
        raise SetupError(f"--verify: {reason}")
    return None, reason
