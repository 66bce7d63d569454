"""Causal attention inside each sample of a packed batch, without padding and without an [N, N] mask.

Legend: N = B * T tokens of the flattened batch, S segments, l_s tokens of segment s, Hq query heads, Hkv key and value
heads, G = Hq / Hkv, d head size, W sliding window. For token i of a segment, with j running over that segment alone,

    o_i = sum_j p_ij v_j,    p_i = softmax_j(scale q_i . k_j),    j <= i,    j > i - W where there is a window.

The cost is sum_s l_s^2 rather than N^2 or B T^2: with eight samples in a row an eighth of the masked product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Segments", "packed_attention"]


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
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False)  # made once for all layers; not moved by `to`

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
    return "segments" if q.device.type == "cpu" else "mask"


def _segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    out: Tensor = _PerSegment.apply(q, k, v, segments, scale, window)
    return out


def _mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    mask = _block_mask(segments, window, q.device)
    q_HND, k_HND, v_HND = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_HND, k_HND, v_HND, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


Way = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None], Tensor]
WAYS: dict[str, Way] = {"segments": _segments, "mask": _mask}


def _grouped(x: Tensor, start: int, end: int, kv_heads: int) -> Tensor:
    """[N, H, d] -> a view [Hkv, G, l, d] of rows start .. end."""
    return x[start:end].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _band_mask(segments: Segments, length: int, window: int | None, like: Tensor) -> Tensor | None:
    if window is None or length <= window:
        return None
    key = ("band", length, window, like.dtype)
    if key not in segments._masks:
        band = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        segments._masks[key] = torch.zeros(length, length, dtype=like.dtype).masked_fill_(~band, float("-inf"))
    return segments._masks[key]


class _PerSegment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        out = q.new_empty(q.shape)
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        logsumexps = []
        for start, end in pairwise(accumulate(segments.lengths, initial=0)):
            q_s, k_s, v_s = (_grouped(x, start, end, kv_heads) for x in (q, k, v))
            shape = (-1, group, -1, -1)
            mask = _band_mask(segments, end - start, window, q)
            out_s, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_s, k_s.expand(shape), v_s.expand(shape), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            _grouped(out, start, end, kv_heads).copy_(out_s)
            logsumexps.append(lse)
        ctx.save_for_backward(q, k, v, out, *logsumexps)
        ctx.settings = segments, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        q, k, v, out, *logsumexps = ctx.saved_tensors
        segments, scale, window = ctx.settings
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        for (start, end), lse in zip(
            pairwise(accumulate(segments.lengths, initial=0)), logsumexps, strict=True
        ):
            q_s, k_s, v_s, o_s, g_s = (_grouped(x, start, end, kv_heads) for x in (q, k, v, out, grad))
            shape = (-1, group, -1, -1)
            mask = _band_mask(segments, end - start, window, q)
            dq_s, dk_s, dv_s = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g_s, q_s, k_s.expand(shape), v_s.expand(shape), o_s, lse, 0.0, mask is None, attn_mask=mask, scale=scale
            )
            _grouped(dq, start, end, kv_heads).copy_(dq_s)
            torch.sum(dk_s, 1, keepdim=True, out=_grouped(dk, start, end, kv_heads))
            torch.sum(dv_s, 1, keepdim=True, out=_grouped(dv, start, end, kv_heads))
        return dq, dk, dv, None, None, None


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Tensor:
    """[N, N] bool, True where row's token sees column's token."""
    key = ("block", window, device)
    if key not in segments._masks:
        n = segments.num_tokens
        owner = torch.repeat_interleave(torch.tensor(segments.lengths)).to(device)
        mask = (owner[:, None] == owner).tril_()
        segments._masks[key] = mask if window is None else mask.triu_(1 - window)
        assert segments._masks[key].shape == (n, n)
    return segments._masks[key]


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
