"""Causal attention inside each sample of a packed batch, without padding and without an [N, N] mask.

Legend: N = B * T tokens of the flattened batch, S segments, l_s tokens of segment s, Hq query heads, Hkv key and value
heads, G = Hq / Hkv, d head size, W sliding window. For token i of a segment, with j running over that segment alone,

    o_i = sum_j p_ij v_j,    p_i = softmax_j(scale q_i . k_j),    j <= i,    j > i - W where there is a window.

The cost is sum_s l_s^2 rather than N^2 or B T^2: with eight samples in a row an eighth of the masked product. Four ways
to the same numbers: two of CUDA's fused kernels, the CPU's own (ibft/attention_cpu.py), and a mask where nothing else
serves; `choose_way` picks one and says why. flash-attn is not needed: torch has its kernels.
"""

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ibft.attention_cpu import segment_attention

__all__ = ["Segments", "packed_attention"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the segments of a flattened batch begin and end. Padding is a segment of its own.

    Attributes:
        lengths: tokens of each segment, in flattened order; they sum to N. Known on the host: no step asks the device.
        cu_seqlens: [S + 1] int32, 0 and the running sum of lengths.
        max_length: the longest segment.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_length: int
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Segments":
        """Segments of these lengths, on the CPU.

        Raises:
            ValueError: no segment, or an empty one.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: got {list(lengths)}, expected at least one segment, each of 1 token or more")
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), cu_seqlens, max(lengths))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), called once for this key: masks and layouts serve every layer of a micro-batch."""
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Segments":
        """The same segments with cu_seqlens on `device`."""
        return Segments(self.lengths, self.cu_seqlens.to(device, non_blocking=non_blocking), self.max_length)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention within each segment; see the module's docstring.

    Args:
        q: [N, Hq, d]; any view whose last dimension is adjacent in memory.
        k, v: [N, Hkv, d], the same; Hkv divides Hq.
        segments: on q's device; they cover N.
        scale: factor of q . k.
        window: a token sees the last `window` tokens, itself included (transformers' sliding_window); None = all.

    Returns:
        [N, Hq * d], contiguous, of q's dtype; differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other or the segments.
    """
    _check(q, k, v, segments, window)
    if window is not None and segments.max_length <= window:
        window = None
    way = WAYS[choose_way(q, window)]
    return way(q, k, v, segments, scale, window).reshape(len(q), -1)


def choose_way(q: Tensor, window: int | None) -> str:
    """The name in WAYS of the fastest way that can serve q; window is None where it binds no segment."""
    if q.device.type == "cpu":
        return "segments"
    if q.device.type != "cuda" or q.shape[-1] % 8:
        return "mask"  # the fused kernels below are CUDA's and want heads that are multiples of 8
    half = q.dtype in (torch.float16, torch.bfloat16)
    ampere = torch.cuda.get_device_capability(q.device) >= (8, 0)
    # beyond 192 flash attention has no backward on consumer cards
    if half and ampere and q.shape[-1] <= 192 and _varlen_serves(window):
        return "varlen"
    # fp32, or a card older than flash attention. It has an argument for a window too, but says nowhere what it counts.
    if window is None and (q.dtype in (torch.float16, torch.float32) or (half and ampere)):
        return "efficient"
    return "mask"


# --- CUDA ------------------------------------------------------------------------------------------------------------


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """Flash attention over cu_seqlens, from torch itself."""
    from torch.nn.attention.varlen import varlen_attn

    arguments: dict[str, Any] = {"scale": scale}
    if "window_size" in _varlen_arguments():
        # flash attention counts the keys to the left of the query, the query not included; -1: all of them
        arguments["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    else:
        arguments["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _varlen_arguments():
            arguments["enable_gqa"] = True
        else:
            k, v = _repeat_heads(k, v, q.shape[1])
    ends, longest = segments.cu_seqlens, segments.max_length
    out = varlen_attn(q, k, v, ends, ends, longest, longest, **arguments)
    assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp is asked for
    return out


@cache
def _varlen_arguments() -> frozenset[str]:
    """Keyword arguments of torch's varlen_attn, which grew from release to release; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_serves(window: int | None) -> bool:
    found = _varlen_arguments()
    causal = "window_size" in found or (window is None and "is_causal" in found)
    return causal and "scale" in found and torch.backends.cuda.is_flash_attention_available()


def _efficient(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """The memory-efficient kernel over cu_seqlens, as torch's nested tensors call it: fp32, and cards before Ampere.

    FlexAttention would serve too, after a compilation by inductor and a block mask for each batch.
    """
    assert window is None, "choose_way gives windows to others"
    if q.shape[1] != k.shape[1]:
        k, v = _repeat_heads(k, v, q.shape[1])
    ends, longest, causal_from_top_left = segments.cu_seqlens, segments.max_length, 1
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, ends, ends, longest, longest, 0.0, causal_from_top_left, True, scale=scale
    )[0]
    return out[0]


def _repeat_heads(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return k.repeat_interleave(heads // k.shape[1], 1), v.repeat_interleave(heads // v.shape[1], 1)


# --- anywhere --------------------------------------------------------------------------------------------------------


def _mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """SDPA under an [N, N] mask: quadratic in the batch, so only where nothing else serves."""
    mask = _block_mask(segments, window, q.device)
    q_HND, k_HND, v_HND = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_HND, k_HND, v_HND, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Tensor:
    """[N, N] bool, True where the row's token sees the column's."""

    def make() -> Tensor:
        owner = torch.repeat_interleave(torch.tensor(segments.lengths)).to(device)
        mask = (owner[:, None] == owner).tril_()
        return mask if window is None else mask.triu_(1 - window)

    return segments.cached(("mask", window, device), make)


Way = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None], Tensor]
WAYS: dict[str, Way] = {"varlen": _varlen, "efficient": _efficient, "segments": segment_attention, "mask": _mask}


def _check(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, expected [N, Hq, d], [N, Hkv, d] twice"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"heads: got {q.shape[1]} of q and {k.shape[1]} of k, expected a multiple")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v, segments.cu_seqlens)}) > 1:
        raise ValueError(
            f"q, k, v, segments: got dtypes {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}, "
            f"{segments.cu_seqlens.device}, expected one dtype and one device"
        )
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("q, k, v: got a strided last dimension, expected it adjacent in memory")
    if segments.num_tokens != q.shape[0]:
        raise ValueError(f"segments: got {segments.num_tokens} tokens, expected those of q, {q.shape[0]}")
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected 1 or more")
