"""Causal attention inside each sample of a packed batch, without padding and without an [N, N] mask.

Legend: N = B * T tokens of the flattened batch, S segments, l_s tokens of segment s, Hq query heads, Hkv key and value
heads, G = Hq / Hkv, d head size, W sliding window. For token i of a segment, with j running over that segment alone,

    o_i = sum_j p_ij v_j,    p_i = softmax_j(scale q_i . k_j),    j <= i,    j > i - W where there is a window.

The cost is sum_s l_s^2 rather than N^2 or B T^2: with eight samples in a row an eighth of the masked product. Four ways
to the same numbers, from the fastest to the one that runs anywhere; `choose_way` picks one and says why.

"segments", the CPU's own way, reads like this. Segments of like length are gathered into a batch, padded on the right:
a causal query never looks right, so padding needs no mask, only a zero gradient. Queries are laid out [l, G] within a
key head, so that one product serves the whole group and any run of tokens is a run of rows. Each run of at most
BLOCK_TOKENS queries meets its keys in one product, so a whole row of the softmax is at hand (no running maximum), and
keys after the run or before the window are never touched. Backward recomputes p; only gathered q, k, v are kept.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Segments", "packed_attention"]

BLOCK_TOKENS = 96  # queries of one product
SCORES_BUDGET = 2**18  # scores of one product: 1 MiB of fp32, about a core's cache
LIKE_LENGTHS = 0.8  # segments share a batch if the shortest is at least so much of the longest


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
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # masks, layouts: made once for all layers

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
    # fp32, or a card older than flash attention. Its window argument is left alone: rarely needed, its meaning unsaid.
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
    out: Tensor = varlen_attn(q, k, v, ends, ends, longest, longest, **arguments)
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
    key = ("mask", window, device)
    if key not in segments._cache:
        owner = torch.repeat_interleave(torch.tensor(segments.lengths)).to(device)
        mask = (owner[:, None] == owner).tril_()
        segments._cache[key] = mask if window is None else mask.triu_(1 - window)
    found: Tensor = segments._cache[key]
    return found


# --- the CPU ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bucket:
    """Segments that are computed together: `batch` = their number times Hkv, padded to `length` tokens.

    Its rows in the gathered tensors: queries [batch, length, G] from `query_row`, keys [batch, length] from `key_row`.
    """

    batch: int
    length: int
    query_row: int
    key_row: int

    def queries(self, x: Tensor, group: int) -> Tensor:
        """[rows, d] -> view [batch, length * G, d]."""
        return x[self.query_row :][: self.batch * self.length * group].view(self.batch, -1, x.shape[1])

    def keys(self, x: Tensor) -> Tensor:
        """[rows, d] -> view [batch, length, d]."""
        return x[self.key_row :][: self.batch * self.length].view(self.batch, -1, x.shape[1])

    def blocks(self, window: int | None) -> Iterator[tuple[int, int, int]]:
        """(start, end, first): queries start .. end see keys first .. end."""
        for start in range(0, self.length, BLOCK_TOKENS):
            end = min(start + BLOCK_TOKENS, self.length)
            yield start, end, 0 if window is None else max(0, start - window + 1)


@dataclass(frozen=True)
class _Layout:
    """Where each head of each token goes in the buckets, and back. A row is one head of one token.

    Attributes:
        query_from, key_from: gathered row -> row of q [N * Hq] or of k [N * Hkv]; padding repeats the last token.
        query_to, key_to: the inverse, rows of q or k -> gathered row.
        query_pads: gathered rows that are padding.
    """

    buckets: list[_Bucket]
    query_from: Tensor
    key_from: Tensor
    query_to: Tensor
    key_to: Tensor
    query_pads: Tensor


def _layout(segments: Segments, query_heads: int, kv_heads: int) -> _Layout:
    key = ("layout", query_heads, kv_heads)
    if key not in segments._cache:
        segments._cache[key] = _make_layout(segments, query_heads, kv_heads)
    found: _Layout = segments._cache[key]
    return found


def _make_layout(segments: Segments, query_heads: int, kv_heads: int) -> _Layout:
    lengths = torch.tensor(segments.lengths)
    starts = lengths.cumsum(0) - lengths
    group = query_heads // kv_heads
    heads = torch.arange(query_heads).view(kv_heads, 1, group)
    buckets, query_from, key_from, query_real, key_real = [], [], [], [], []
    query_row = key_row = 0
    for members in _alike(segments.lengths, query_heads):
        longest = segments.lengths[members[0]]
        place = torch.arange(longest)
        token = starts[members, None] + torch.minimum(place, lengths[members, None] - 1)  # [n, longest]
        real = (place < lengths[members, None])[:, None, :, None]
        shape = (len(members), kv_heads, longest, group)
        query_from.append((token[:, None, :, None] * query_heads + heads).flatten())
        key_from.append((token[:, None] * kv_heads + torch.arange(kv_heads)[:, None]).flatten())
        query_real.append(real.expand(shape).flatten())
        key_real.append(real.expand(*shape[:3], 1).flatten())
        buckets.append(_Bucket(len(members) * kv_heads, longest, query_row, key_row))
        query_row, key_row = query_row + len(query_from[-1]), key_row + len(key_from[-1])
    query_rows, key_rows = torch.cat(query_from), torch.cat(key_from)
    real_queries, real_keys = torch.cat(query_real), torch.cat(key_real)
    return _Layout(
        buckets,
        query_from=query_rows,
        key_from=key_rows,
        query_to=_inverse(query_rows, real_queries),
        key_to=_inverse(key_rows, real_keys),
        query_pads=(~real_queries).nonzero().flatten(),
    )


def _alike(lengths: Sequence[int], heads: int) -> list[list[int]]:
    """Indices of `lengths` in groups of like length, each group's longest first and within SCORES_BUDGET."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        scores = heads * longest * min(longest, BLOCK_TOKENS) * (len(groups[-1]) + 1 if groups else 1)
        if groups and lengths[index] >= LIKE_LENGTHS * longest and scores <= SCORES_BUDGET:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _inverse(source: Tensor, real: Tensor) -> Tensor:
    rows = real.nonzero().flatten()
    inverse = torch.empty_like(rows)
    inverse[source[rows]] = rows
    return inverse


class _Scores:
    """The scores of one block at a time, and the bias that hides what a query may not see."""

    def __init__(self, layout: _Layout, group: int, scale: float, window: int | None, like: Tensor) -> None:
        self.group, self.scale = group, scale
        longest = layout.buckets[0].length
        block, last_start = min(longest, BLOCK_TOKENS), (longest - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        self.size = max(b.batch * min(b.length, BLOCK_TOKENS) * group * b.length for b in layout.buckets)
        # columns: the keys from `before` ahead of a block's first query to the block's last query
        self.before = last_start if window is None else min(last_start, window - 1)
        back = torch.arange(block)[:, None] + self.before - torch.arange(self.before + block)
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        bias = like.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        self.bias = bias.repeat_interleave(group, 0)
        self.like = like

    def buffer(self) -> Tensor:
        return self.like.new_empty(self.size)

    def probabilities(self, q: Tensor, k: Tensor, buffer: Tensor) -> Tensor:
        """softmax(scale q k^T) [batch, rows, keys] of one block, written into the buffer."""
        rows, keys = q.shape[1], k.shape[1]
        out = buffer[: len(q) * rows * keys].view(len(q), rows, keys)
        first = self.before + rows // self.group - keys
        bias = self.bias[:rows, first : first + keys]
        torch.baddbmm(bias, q, k.transpose(1, 2), alpha=self.scale, out=out)
        return torch.softmax(out, -1, out=out)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        layout = _layout(segments, q.shape[1], k.shape[1])
        group = q.shape[1] // k.shape[1]
        queries, keys, values = _gather(q, layout.query_from), _gather(k, layout.key_from), _gather(v, layout.key_from)
        out = torch.empty_like(queries)
        scores = _Scores(layout, group, scale, window, queries)
        buffer = scores.buffer()
        for bucket in layout.buckets:
            q_b, o_b = (bucket.queries(x, group) for x in (queries, out))
            k_b, v_b = (bucket.keys(x) for x in (keys, values))
            for start, end, first in bucket.blocks(window):
                rows = slice(start * group, end * group)
                p = scores.probabilities(q_b[:, rows], k_b[:, first:end], buffer)
                torch.bmm(p, v_b[:, first:end], out=o_b[:, rows])
        ctx.save_for_backward(queries, keys, values)
        ctx.settings = layout, scores, window, q.dtype
        return _scatter(out, layout.query_to, q.shape, q.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        layout, scores, window, dtype = ctx.settings
        group = scores.group
        grads = _gather(grad, layout.query_from).index_fill_(0, layout.query_pads, 0)
        d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        buffer, d_buffer = scores.buffer(), scores.buffer()
        for bucket in layout.buckets:
            q_b, g_b, dq_b = (bucket.queries(x, group) for x in (queries, grads, d_queries))
            k_b, v_b, dk_b, dv_b = (bucket.keys(x) for x in (keys, values, d_keys, d_values))
            for start, end, first in bucket.blocks(window):
                rows, seen = slice(start * group, end * group), slice(first, end)
                q_t, g_t = q_b[:, rows], g_b[:, rows]
                p = scores.probabilities(q_t, k_b[:, seen], buffer)
                dv_b[:, seen].baddbmm_(p.transpose(1, 2), g_t)
                ds = torch.bmm(g_t, v_b[:, seen].transpose(1, 2), out=d_buffer[: p.numel()].view(p.shape))
                torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
                torch.bmm(ds, k_b[:, seen], out=dq_b[:, rows])
                dk_b[:, seen].baddbmm_(ds.transpose(1, 2), q_t)
        shape_q, shape_k = grad.shape, (grad.shape[0], grad.shape[1] // group, grad.shape[2])
        return (
            _scatter(d_queries.mul_(scores.scale), layout.query_to, shape_q, dtype),
            _scatter(d_keys.mul_(scores.scale), layout.key_to, shape_k, dtype),
            _scatter(d_values, layout.key_to, shape_k, dtype),
            None,
            None,
            None,
        )


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """[N, H, d] -> [rows, d], at least fp32: a 16 bit product on a CPU is slower and worse."""
    gathered = x.reshape(-1, x.shape[-1]).index_select(0, rows)
    return gathered.to(torch.promote_types(x.dtype, torch.float32))


def _scatter(x: Tensor, rows: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return x.index_select(0, rows).view(shape).to(dtype)


def _segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    out: Tensor = _SegmentAttention.apply(q, k, v, segments, scale, window)
    return out


Way = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None], Tensor]
WAYS: dict[str, Way] = {"varlen": _varlen, "efficient": _efficient, "segments": _segments, "mask": _mask}


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
