"""Whether a merged model is base + adapter, by every tensor and by logits; and how far it is from the 4-bit base.

Two independent ways to the same numbers: what has been written is read back, and the sum is PEFT's own. Both must agree
to one rounding, or the merge fails. Weights stay in their files (`ibft.streamed`), so that this takes the memory of a
few matrices and the adapter, whatever the base.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.config import ModelConfig
from ibft.console import Console
from ibft.errors import SetupError
from ibft.evaluation.local_model import LocalModel
from ibft.merge_base import Base

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PROMPTS = (
    "Write a function that returns the sum of two numbers.\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "module top_module(input clk, input d, output reg q);\n    always @(posedge clk)",
)
FULL, QUANTISED = "the full-precision base + adapter", "the 4-bit base + adapter, as trained"
PIECE = 2**24  # elements of a tensor that are compared at once
SUM = 2**-18  # how far two orders of adding in fp32 may lie apart, of the largest value: 64 roundings
LOGITS = 1e-3  # of the mean logit: what fp32 computing may change through all layers
ROUNDINGS = 8  # of 16-bit weights, of the mean logit: what all layers may add up to; found: 0.3 in 8 layers


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


def verify_merge(here: LocalModel, base: Base, merged: Path, console: Console) -> dict[str, Difference]:
    """The merged folder beside base + adapter in plain PEFT, and beside the 4-bit base + adapter if that was trained.

    here: the adapter and what it was trained on. All compute in fp32, so that the differences are those of the weights.

    Raises:
        SetupError: the merged model is not base + adapter, beyond what rounding to its dtype explains.
    """
    import torch

    assert here.adapter is not None
    adapter = Path(here.adapter)
    written = Base.of(ModelConfig(name_or_path=str(merged), quantization="none"))
    dtype = check_tensors(base, written, adapter, console)
    device = device_for(max(map(math.prod, base.shapes.values())))
    ids = [here.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    kinds: dict[str, tuple[Base, Path | None, bool]] = {"": (written, None, False), FULL: (base, adapter, False)}
    if here.config.quantization == "nf4":
        kinds[QUANTISED] = base, adapter, True
    logits: dict[str, Tensor] = {}
    with console.progress("verifying", len(kinds) * len(base.shapes)) as advance:
        ran = iter(range(1, 1 + len(kinds) * len(base.shapes)))
        for name, (source, worn, in_4_bits) in kinds.items():
            logits[name] = streamed_logits(source, worn, ids, device, in_4_bits, lambda: advance(next(ran, 0)))
    found = {name: Difference.of(logits[""], logits[name]) for name in kinds if name}
    usual = float(logits[FULL].abs().mean())
    allowed = usual * max(LOGITS, 0 if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps / 2)
    if not found[FULL].mean <= allowed:
        raise SetupError(
            f"not merged: its logits are {found[FULL].mean:.3g} from those of {FULL} in the mean, "
            f"and rounding explains {allowed:.3g}"
        )
    return found


def check_tensors(base: Base, merged: Base, adapter: Path, console: Console) -> "torch.dtype":
    """Each written tensor is what PEFT adds to the base's, rounded once; returns the dtype.

    Raises:
        SetupError: one is not.
    """
    from peft.tuners.lora import LoraLayer

    from ibft.streamed import empty_model, own_name, wear

    layers: Mapping[str, Any] = {
        own_name(f"{name}.weight"): module
        for name, module in wear(empty_model(base.folder), adapter).named_modules()
        if isinstance(module, LoraLayer)
    }
    with base.reading() as plain, merged.reading() as written:
        if plain.keys() != written.keys():
            name = min(plain.keys() ^ written.keys())
            raise SetupError(f"not merged: {name} is in one of {base.name} and the merged model alone")
        with console.progress("comparing", len(plain)) as advance:
            for done, name in enumerate(plain, 1):
                delta = layers[name].get_delta_weight("default") if name in layers else None
                if why := _not_rounded_once(written[name], plain[name], delta):
                    raise SetupError(f"not merged: {name} is not base + adapter: {why}")
                advance(done)
        return written[name].dtype


def _not_rounded_once(written: "Tensor", plain: "Tensor", delta: "Tensor | None") -> str:
    """Why not; "" where it is."""
    import torch

    info, plain, written = torch.finfo(written.dtype), torch.atleast_1d(plain), torch.atleast_1d(written)
    piece = max(1, PIECE // max(1, math.prod(plain.shape[1:])))
    for start in range(0, len(plain), piece):
        rows = slice(start, start + piece)
        expected = plain[rows].float()
        size = expected.abs().max()
        if delta is not None:
            size = size + delta[rows].abs().max()
            expected = expected + delta[rows]
        off = (written[rows].float() - expected).abs_()
        power = torch.frexp(expected).exponent  # a number below 2^power has bits down to 2^power eps / 2
        allowed = torch.ldexp(torch.full_like(off, info.eps / 4), power) + SUM * size + info.smallest_normal * info.eps
        if not (off <= allowed).all():
            return f"{float(off.max()):.3g} apart"
    return ""


def streamed_logits(
    base: Base,
    adapter: Path | None,
    prompts: list[list[int]],
    device: "torch.device",
    in_4_bits: bool,
    ran: Callable[[], object],
) -> "Tensor":
    """Of every position of the prompts: [N, V] fp32 on the CPU. Rows are padded behind, where causal rows look not."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from ibft.streamed import empty_model, stream, wear

    model = empty_model(base.folder)
    if adapter is not None:
        model = wear(model, adapter)
    ids_BT = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    with base.reading() as weights, torch.no_grad():
        stream(model, weights, device, in_4_bits=in_4_bits, ran=ran)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return torch.cat([row[: len(prompt)] for row, prompt in zip(logits_BTV, prompts, strict=True)]).cpu()


def device_for(largest: int) -> "torch.device":
    """The GPU where it has room for a matrix of so many elements and the work on it, else the CPU."""
    import torch

    from ibft.memory import free_memory

    if torch.cuda.is_available():
        device = torch.device("cuda")
        free = free_memory(device)
        if free is not None and free > 2**30 + 24 * largest:
            return device
    return torch.device("cpu")
