"""SwiGLU forward, and forward and backward in one visit: two steps of an MLP whose backward is one autograd node.

    s = silu(gate) = gate sigma,   sigma = 1 / (1 + exp(-gate))
    h = s up                                                s rounded to the dtype before the product, as transformers
    dup   = dh s
    dgate = dh up silu'(gate),     silu' = sigma (1 + gate (1 - sigma))

Computed in fp32, float64 for float64; each gradient rounds once. `swiglu_backward_` also makes h anew, for the down
projection's LoRA gradient, so that h is not saved: it lies where dh was, dgate where gate and dup where up were. Each
of the three is read once and written once, and no other memory is taken on the Triton path (a few rows on the torch
path). Forward reads two and writes one. Neither has an autograd formula: who calls them knows what to save.
Legend: N rows, I columns.
"""

from __future__ import annotations

from typing import Any

import torch

from .._dispatch import resolve_backend
from .._launch import launch_shape, tile_blocks
from .._library import library_op
from .._triton import tl, triton
from ._rows import FLOATS, as_rows

__all__ = ["swiglu_backward_", "swiglu_forward"]

# Elements that the torch path works on at once: on a CPU its buffers stay in cache, a GPU wants length.
CPU_CHUNK, DEVICE_CHUNK = 1 << 18, 1 << 22


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _tile(n_rows, n_columns, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr):
    rows_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    return rows_n[:, None], columns_i[None, :], (rows_n < n_rows)[:, None] & (columns_i < n_columns)[None, :]


@triton.jit
def _silu(gate):
    """(silu, sigma), for both kernels: the h of backward is forward's to the bit."""
    sigma = 1.0 / (1.0 + tl.exp(-gate))
    return gate * sigma, sigma


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    n_rows,
    n_columns,
    stride_gn,
    stride_un,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows, columns, mask_ni = _tile(n_rows, n_columns, BLOCK_N, BLOCK_I)
    gate = tl.load(gate_ptr + rows * stride_gn + columns, mask=mask_ni).to(COMPUTE)
    up = tl.load(up_ptr + rows * stride_un + columns, mask=mask_ni).to(COMPUTE)
    s, _ = _silu(gate)
    h = s.to(h_ptr.dtype.element_ty).to(COMPUTE) * up
    tl.store(h_ptr + rows * n_columns + columns, h.to(h_ptr.dtype.element_ty), mask=mask_ni)


@triton.jit(do_not_specialize=["n_rows"])
def swiglu_backward_kernel(
    dh_ptr,  # h when done
    gate_ptr,  # dgate when done
    up_ptr,  # dup when done
    n_rows,
    n_columns,
    stride_dn,
    stride_gn,
    stride_un,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A lane reads its three elements before it writes them, and no other lane touches those."""
    rows, columns, mask_ni = _tile(n_rows, n_columns, BLOCK_N, BLOCK_I)
    dh_ptrs, gate_ptrs = dh_ptr + rows * stride_dn + columns, gate_ptr + rows * stride_gn + columns
    up_ptrs = up_ptr + rows * stride_un + columns
    element = gate_ptr.dtype.element_ty
    dh = tl.load(dh_ptrs, mask=mask_ni).to(COMPUTE)
    gate = tl.load(gate_ptrs, mask=mask_ni).to(COMPUTE)
    up = tl.load(up_ptrs, mask=mask_ni).to(COMPUTE)
    s, sigma = _silu(gate)
    h = s.to(element).to(COMPUTE) * up
    dgate = dh * up * (sigma * (1.0 + gate * (1.0 - sigma)))
    tl.store(dh_ptrs, h.to(element), mask=mask_ni)
    tl.store(gate_ptrs, dgate.to(element), mask=mask_ni)
    tl.store(up_ptrs, (dh * s).to(element), mask=mask_ni)


# --- launchers ------------------------------------------------------------------------------------


def _common(x_NI: torch.Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and what both kernels take."""
    n_rows, n_columns = x_NI.shape
    shape = launch_shape("swiglu", x_NI.device, x_NI.dtype)
    block_n, block_i = tile_blocks(shape.pop("TILE"), n_columns)
    compute = tl.float64 if x_NI.dtype == torch.float64 else tl.float32
    sizes = {"n_rows": n_rows, "n_columns": n_columns, "COMPUTE": compute, "BLOCK_N": block_n, "BLOCK_I": block_i}
    return (triton.cdiv(n_rows, block_n), triton.cdiv(n_columns, block_i)), sizes | shape


def launch_swiglu_forward(gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
    h_NI = torch.empty(gate_NI.shape, dtype=gate_NI.dtype, device=gate_NI.device)
    if h_NI.numel():
        grid, common = _common(h_NI)
        swiglu_forward_kernel[grid](
            gate_NI, up_NI, h_NI, stride_gn=gate_NI.stride(0), stride_un=up_NI.stride(0), **common
        )
    return h_NI


def launch_swiglu_backward_(dh_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> None:
    if dh_NI.numel():
        grid, common = _common(dh_NI)
        swiglu_backward_kernel[grid](
            dh_NI, gate_NI, up_NI, stride_dn=dh_NI.stride(0), stride_gn=gate_NI.stride(0), stride_un=up_NI.stride(0),
            **common,
        )  # fmt: skip


# --- torch path -----------------------------------------------------------------------------------


def _row_chunks(x_NI: torch.Tensor) -> list[slice]:
    n_rows, columns = x_NI.shape
    rows = max(1, (CPU_CHUNK if x_NI.device.type == "cpu" else DEVICE_CHUNK) // max(1, columns))
    return [slice(first, min(first + rows, n_rows)) for first in range(0, n_rows, rows)]


def _forward_torch(gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
    """torch's silu computes 16-bit inputs in fp32 and rounds once."""
    h_NI = torch.empty(gate_NI.shape, dtype=gate_NI.dtype, device=gate_NI.device)
    for rows in _row_chunks(h_NI):
        h_ni = h_NI[rows]
        torch.ops.aten.silu.out(gate_NI[rows], out=h_ni)
        h_ni.mul_(up_NI[rows])
    return h_NI


def _backward_torch_(dh_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> None:
    dtype = gate_NI.dtype
    narrow = dtype in (torch.float16, torch.bfloat16)
    visit, n_scratch, compute = (_visit_narrow_, 4, torch.float32) if narrow else (_visit_, 2, dtype)
    chunks = _row_chunks(gate_NI)
    rows = chunks[0].stop if chunks else 0
    scratch = torch.empty(n_scratch, rows, gate_NI.shape[1], dtype=compute, device=gate_NI.device)
    for chunk in chunks:
        visit(dh_NI[chunk], gate_NI[chunk], up_NI[chunk], *scratch[:, : chunk.stop - chunk.start])


def _visit_(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, s: torch.Tensor, product: torch.Tensor) -> None:
    torch.ops.aten.silu.out(gate, out=s)
    torch.mul(dh, up, out=product)
    torch.ops.aten.silu_backward.grad_input(product, gate, grad_input=gate)
    torch.mul(s, up, out=product)
    torch.mul(s, dh, out=up)
    dh.copy_(product)


def _visit_narrow_(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    s: torch.Tensor,
    product: torch.Tensor,
    wide_dh: torch.Tensor,
    wide_gate: torch.Tensor,
) -> None:
    """As `_visit_` with fp32 scratch. A ninth slower than rounding every intermediate, which needs no scratch."""
    wide_dh.copy_(dh)
    wide_gate.copy_(gate)
    torch.ops.aten.silu.out(wide_gate, out=s)
    product.copy_(up).mul_(wide_dh)
    dh.copy_(s).mul_(up)
    up.copy_(s.mul_(wide_dh))
    gate.copy_(torch.ops.aten.silu_backward.grad_input(product, wide_gate, grad_input=product))


# --- library --------------------------------------------------------------------------------------


@library_op("swiglu_forward", "(Tensor gate, Tensor up, str backend) -> Tensor")
def _forward_op(gate, up, backend):
    return (launch_swiglu_forward if backend == "triton" else _forward_torch)(gate, up)


@_forward_op.register_fake
def _(gate, up, backend):
    return gate.new_empty(gate.shape)


@library_op(
    "swiglu_backward_",
    "(Tensor(a!) dh, Tensor(b!) gate, Tensor(c!) up, str backend) -> ()",
    mutates=["dh", "gate", "up"],
)
def _backward_op(dh, gate, up, backend):
    _check_apart(dh=dh, gate=gate, up=up)
    (launch_swiglu_backward_ if backend == "triton" else _backward_torch_)(dh, gate, up)


@_backward_op.register_fake
def _(dh, gate, up, backend):
    return None


# --- public ---------------------------------------------------------------------------------------


def _check(first: str, **tensors: torch.Tensor) -> None:
    expected = tensors[first]
    if expected.dim() != 2 or expected.dtype not in FLOATS:
        raise ValueError(
            f"{first}: expected a floating tensor [N, I], got {expected.dtype} of shape {tuple(expected.shape)}"
        )
    for name, x in tensors.items():
        if x.shape != expected.shape or x.dtype != expected.dtype or x.device != expected.device:
            raise ValueError(
                f"{name}: expected {expected.dtype} of shape {tuple(expected.shape)} on {expected.device}, as {first}, "
                f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )


def _span(x: torch.Tensor) -> tuple[int, int]:
    """Bytes [first, last) that a [N, I] tensor with adjacent columns lies in."""
    n_rows, columns = x.shape
    first = x.data_ptr()
    return first, first + ((n_rows - 1) * x.stride(0) + columns) * x.element_size()


def _apart(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether no element is shared: disjoint ranges, or columns of one buffer side by side. Where strides differ, a
    range in common is taken for an overlap.
    """
    (x_first, x_last), (y_first, y_last) = _span(x), _span(y)
    if x_last <= y_first or y_last <= x_first:
        return True
    if x.shape[0] == 1 or x.stride(0) != y.stride(0):
        return False
    stride, width = x.stride(0) * x.element_size(), x.shape[1] * x.element_size()
    return width <= (y_first - x_first) % stride <= stride - width


def _check_apart(**tensors: torch.Tensor) -> None:
    """ValueError unless every element has memory of its own. Here, as the op runs: a traced tensor has no address."""
    items = list(tensors.items())
    if not items[0][1].numel():
        return
    for i, (name, x) in enumerate(items):
        n_rows, columns = x.shape
        if n_rows > 1 and x.stride(0) < columns:
            raise ValueError(f"{name}: expected rows that do not overlap, got strides {x.stride()}")
        for other, y in items[:i]:
            if not _apart(x, y):
                raise ValueError(f"{name}: expected memory apart from {other}'s, got tensors that overlap")


def swiglu_forward(gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up, rounded as transformers' MLP rounds. No autograd formula.

    Args:
        gate, up: [N, I], one floating dtype; rows may be strided (a half of a [N, 2I] tensor).
        backend: "auto", "triton" or "torch".

    Returns:
        [N, I], contiguous, dtype of `gate`.

    Raises:
        ValueError: a wrong shape, dtype or device.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    _check("gate", gate=gate, up=up)
    return _forward_op(as_rows(gate), as_rows(up), resolve_backend(backend, gate.device))


def swiglu_backward_(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto") -> None:
    """Overwrite dh with h = silu(gate) * up, gate with its gradient and up with its gradient, in one visit.

    Args:
        dh: [N, I], the gradient that arrives at h.
        gate, up: [N, I], what the forward saw. All three: one floating dtype, adjacent columns, rows may be strided
            (halves of one [N, 2I] tensor), no memory shared.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: a wrong shape, dtype, device or stride, or tensors that overlap; nothing is written.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    _check("gate", dh=dh, gate=gate, up=up)
    for name, x in (("dh", dh), ("gate", gate), ("up", up)):
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"{name}: expected adjacent columns, got strides {x.stride()}")
    _backward_op(dh, gate, up, resolve_backend(backend, gate.device))
