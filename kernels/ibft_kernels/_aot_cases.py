"""What `aot` compiles: each kernel with the argument types of a training step (Z = 256), one entry a kernel.

An entry's `arguments` maps (element type, launch shape) to one value a parameter: a type as a string, None for an
absent pointer, and for a constexpr its value. num_warps and num_stages go from the shape to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ._launch import tile_blocks
from ._triton import tl
from .ops._cross_entropy_triton import cross_entropy_kernel, scatter_rows_kernel
from .ops._ib_bottleneck_triton import ib_bottleneck_backward_kernel, ib_bottleneck_forward_kernel, rank_block
from .ops._ib_kl_triton import ib_kl_backward_kernel, ib_kl_forward_kernel, ib_kl_reduce_kernel
from .ops._philox_triton import philox_kernel
from .ops.dropout import dropout_kernel
from .ops.nf4 import EXACT, nf4_dequantize_kernel
from .ops.rms_norm import WIDEST, rms_norm_backward_kernel, rms_norm_forward_kernel, row_blocks
from .ops.rope import head_blocks, rotate_kernel
from .ops.swiglu import swiglu_backward_kernel, swiglu_forward_kernel

__all__ = ["CASES", "DTYPES", "Case"]

DTYPES = ("fp16", "bf16", "fp32")
LATENT, HIDDEN = 256, 4096

KEY = {"ids_ptr": "*i32", "seed_ptr": None, "seed_lo": "i32", "seed_hi": "i32"}
SIZES = {"n_rows": "i32", "n_columns": "i32"}


@dataclass(frozen=True)
class Case:
    """A kernel, its entry in launch/*.json without the bits, and what its binary must contain.

    dot: tensor-core instructions, for 16-bit elements from sm_80 on (Triton 3.9 compiles `tl.dot` for sm_75 to plain
    multiply-adds, fp16 too). wide: global loads of 128 bits or more.
    """

    kernel: Any
    launch: str
    arguments: Callable[[str, dict[str, Any]], dict[str, Any]]
    dtypes: tuple[str, ...] = DTYPES
    dot: bool = False
    wide: bool = True
    # launch options beside the shape's, or what makes them of it
    options: dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]] = field(default_factory=dict)


def _philox(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    rows, columns = tile_blocks(shape["TILE"], LATENT)
    return {"out_ptr": element, **KEY, **SIZES, "NORMAL": True, "BLOCK_N": rows, "BLOCK_C": columns}


def _dropout(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    rows, columns = tile_blocks(shape["TILE"], LATENT)
    return {
        "x_ptr": element, "y_ptr": element, **KEY, "threshold": "i32", **SIZES, "stride_xn": "i32",
        "stride_yn": "i32", "ADD": True, "COMPUTE": tl.float32, "BLOCK_N": rows, "BLOCK_C": columns,
    }  # fmt: skip


def _ib_kl(shape: dict[str, Any]) -> dict[str, Any]:
    rows, columns = tile_blocks(shape["TILE"], LATENT)
    return {
        "mask_ptr": "*u8", "eps_ptr": None, **KEY, **SIZES, "stride_mun": "i32", "stride_lvn": "i32",
        "stride_epsn": "i32", "COMPUTE": tl.float32, "LO": -4.0, "HI": 4.0, "BLOCK_N": rows, "BLOCK_Z": columns,
    }  # fmt: skip


def _ib_kl_forward(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "mu_ptr": element, "logvar_ptr": element, "z_ptr": element, "row_kl_ptr": None, "partial_kl_ptr": "*fp32",
        "partial_count_ptr": "*i32", **_ib_kl(shape),
    }  # fmt: skip


def _ib_kl_backward(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "mu_ptr": element, "logvar_ptr": element, "dz_ptr": element, "dkl_ptr": "*fp32", "inverse_ptr": "*fp32",
        "dmu_ptr": element, "dlogvar_ptr": element, "stride_dzn": "i32", "stride_dn": "i32", **_ib_kl(shape),
    }  # fmt: skip


def _ib_kl_reduce(_: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "partial_kl_ptr": "*fp32", "partial_count_ptr": "*i32", "normalizer_ptr": None, "kl_ptr": "*fp32",
        "inverse_ptr": "*fp32", "n_partials": "i32", **SIZES, "COMPUTE": tl.float32, "DIVIDE_BY_COUNT": True,
        "DIVIDE_BY_Z": True, "BLOCK": shape["BLOCK"],
    }  # fmt: skip


def _ib_bottleneck(shape: dict[str, Any]) -> dict[str, Any]:
    """Z is as wide as BLOCK_Z allows. fp32 without TF32, torch's default."""
    blocks = {name: size for name, size in shape.items() if name.startswith("BLOCK")}
    return {
        "mask_ptr": "*u8", "eps_ptr": None, **KEY, "n_rows": "i32", "n_latent": "i32", "n_hidden": "i32",
        "stride_epsn": "i32", "LO": -4.0, "HI": 4.0, "PRECISION": "ieee", **blocks,
    }  # fmt: skip


def _ib_bottleneck_forward(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "h_ptr": element, "w_ptr": element, "b_ptr": "*fp32", "z_ptr": element, "mulogvar_ptr": element,
        "row_kl_ptr": None, "partial_kl_ptr": "*fp32", "partial_count_ptr": "*i32", "stride_hn": "i32",
        **_ib_bottleneck(shape),
    }  # fmt: skip


def _ib_bottleneck_backward(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "mulogvar_ptr": element, "dz_ptr": element, "dkl_ptr": "*fp32", "inverse_ptr": "*fp32", "w_ptr": element,
        "g_ptr": element, "dh_ptr": element, "lora_ptr": None, "dlora_ptr": None, "dmulogvar_ptr": element,
        "n_rank": "i32", "split_tiles": "i32", "stride_dzn": "i32", "stride_gn": "i32", "stride_dhn": "i32",
        "scaling": "fp32", "BLOCK_R": 16, **_ib_bottleneck(shape),
    }  # fmt: skip


def _ib_lora_backward(element: str, shape: dict[str, Any], rank: int = 32) -> dict[str, Any]:
    """dlora as split columns have it."""
    given = {"lora_ptr": element, "dlora_ptr": "*fp32", "BLOCK_R": rank_block(shape, rank)}
    return _ib_bottleneck_backward(element, shape) | given


def _cross_entropy(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    """As the folded latent head calls it; the main head's lacks the bias, an evaluation's the gradient."""
    return {
        "logits_ptr": element, "bias_ptr": "*fp32", "labels_ptr": "*i64", "loss_ptr": "*fp32", "n_columns": "i32",
        "stride_n": "i32", "ignore_index": "i32", "COMPUTE": tl.float32, "GRADIENT": True, "BLOCK_V": shape["BLOCK_V"],
    }  # fmt: skip


def _scatter_rows(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    rows, columns = tile_blocks(shape["TILE"], HIDDEN)
    return {
        "src_ptr": element, "scale_ptr": "*fp32", "rows_ptr": "*i64", "out_ptr": element, **SIZES,
        "stride_scale": "i32", "COMPUTE": tl.float32, "BLOCK_N": rows, "BLOCK_C": columns,
    }  # fmt: skip


def _nf4_dequantize(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "packed_ptr": "*u8", "absmax_ptr": "*u8", "code_ptr": "*fp32", "offset_ptr": "*fp32",
        "nested_absmax_ptr": "*fp32", "nested_code_ptr": "*fp32", "out_ptr": element, "n_weights": "i32",
        "n_bytes": "i32", "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "BLOCK_B": shape["TILE"] // 32,
    }  # fmt: skip


def _row_blocks(shape: dict[str, Any], columns: int) -> dict[str, Any]:
    return {name: size for name, size in row_blocks(shape, columns).items() if name.startswith("BLOCK")}


def _row_warps(columns: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda shape: {"num_warps": row_blocks(shape, columns)["num_warps"]}


def _rms_norm_forward(element: str, shape: dict[str, Any], *, columns: int = HIDDEN) -> dict[str, Any]:
    return {
        "x_ptr": element, "residual_ptr": element, "weight_ptr": element, "y_ptr": element, "h_ptr": element,
        "rstd_ptr": "*fp32", **SIZES, "stride_xn": "i32", "stride_rn": "i32", "COMPUTE": tl.float32, "EPS": 1e-5,
        **_row_blocks(shape, columns),
    }  # fmt: skip


def _rms_norm_backward(element: str, shape: dict[str, Any], *, columns: int = HIDDEN) -> dict[str, Any]:
    return {
        "dy_ptr": element, "dh_ptr": element, "h_ptr": element, "weight_ptr": element, "rstd_ptr": "*fp32",
        "dx_ptr": element, **SIZES, "stride_dyn": "i32", "stride_dhn": "i32", "stride_hn": "i32",
        "COMPUTE": tl.float32, **_row_blocks(shape, columns),
    }  # fmt: skip


def _swiglu(shape: dict[str, Any]) -> dict[str, Any]:
    rows, columns = tile_blocks(shape["TILE"], 4 * HIDDEN)
    return {
        **SIZES, "stride_gn": "i32", "stride_un": "i32", "COMPUTE": tl.float32, "BLOCK_N": rows, "BLOCK_I": columns,
    }  # fmt: skip


def _swiglu_forward(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {"gate_ptr": element, "up_ptr": element, "h_ptr": element, **_swiglu(shape)}


def _swiglu_backward(element: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {"dh_ptr": element, "gate_ptr": element, "up_ptr": element, "stride_dn": "i32", **_swiglu(shape)}


def _rotate(
    element: str, shape: dict[str, Any], *, d: int = 128, n_k_heads: int | str = "i32", fewest: int = 8
) -> dict[str, Any]:
    return {
        "q_ptr": element, "q_out_ptr": element, "k_ptr": element, "k_out_ptr": element, "cos_ptr": element,
        "sin_ptr": element, "n_rows": "i32", "n_q_heads": "i32", "n_k_heads": n_k_heads, "stride_qn": "i32",
        "stride_qh": "i32", "stride_kn": "i32", "stride_kh": "i32", "stride_cosn": "i32", "stride_sinn": "i32",
        "COMPUTE": tl.float32, "TRANSPOSED": False, "HALF": d // 2, **head_blocks(shape["TILE"], fewest, d // 2),
    }  # fmt: skip


CASES: dict[str, Case] = {
    "philox_normal": Case(philox_kernel, "philox", _philox, wide=False),  # it stores, and loads three words a row
    "philox_dropout": Case(dropout_kernel, "dropout", _dropout),
    "ib_kl_forward": Case(ib_kl_forward_kernel, "ib_kl", _ib_kl_forward),
    "ib_kl_backward": Case(ib_kl_backward_kernel, "ib_kl", _ib_kl_backward),
    # the partials are fp32 whatever the inputs are, and their number is no multiple of anything
    "ib_kl_reduce": Case(ib_kl_reduce_kernel, "ib_kl_reduce", _ib_kl_reduce, dtypes=("fp32",), wide=False),
    "ib_bottleneck_forward": Case(
        ib_bottleneck_forward_kernel, "ib_bottleneck_forward", _ib_bottleneck_forward, dot=True
    ),
    "ib_bottleneck_backward": Case(
        ib_bottleneck_backward_kernel, "ib_bottleneck_backward", _ib_bottleneck_backward, dot=True
    ),
    # an argument of 1 is a constant to Triton, which the interpreter does not show
    "ib_bottleneck_backward:Z=1": Case(
        ib_bottleneck_backward_kernel,
        "ib_bottleneck_backward",
        lambda element, shape: _ib_bottleneck_backward(element, shape | {"BLOCK_Z": 16}) | {"n_latent": 1},
        wide=False,
    ),
    "ib_lora_backward": Case(
        ib_bottleneck_backward_kernel,
        "ib_lora_backward_fused",
        _ib_lora_backward,
        dot=True,
    ),
    "ib_lora_backward:widest": Case(
        ib_bottleneck_backward_kernel,
        "ib_lora_backward_fused",
        lambda element, shape: _ib_lora_backward(element, shape, shape["BLOCK_R"]),
        dtypes=("bf16", "fp32"),
        dot=True,
    ),
    "ib_lora_backward:Z=R=1": Case(
        ib_bottleneck_backward_kernel,
        "ib_lora_backward_fused",
        lambda element, shape: _ib_lora_backward(element, shape | {"BLOCK_Z": 16}, 1) | {"n_latent": 1, "n_rank": 1},
        dtypes=("fp16",),
        wide=False,
    ),
    "cross_entropy": Case(cross_entropy_kernel, "cross_entropy", _cross_entropy),
    "cross_entropy:no_bias": Case(
        cross_entropy_kernel, "cross_entropy", lambda *given: _cross_entropy(*given) | {"bias_ptr": None}
    ),
    "cross_entropy:loss_only": Case(
        cross_entropy_kernel, "cross_entropy", lambda *given: _cross_entropy(*given) | {"GRADIENT": False}
    ),
    "scatter_rows": Case(scatter_rows_kernel, "scatter_rows", _scatter_rows),
    # a lane loads as many bytes as it can store weights at once: 4 to 16
    "nf4_dequantize": Case(nf4_dequantize_kernel, "nf4_dequantize", _nf4_dequantize, wide=False, options=EXACT),
    "rms_norm_forward": Case(rms_norm_forward_kernel, "rms_norm", _rms_norm_forward, options=_row_warps(HIDDEN)),
    "rms_norm_backward": Case(rms_norm_backward_kernel, "rms_norm", _rms_norm_backward, options=_row_warps(HIDDEN)),
    # a thread of a block of 1,024 has 64 registers
    "rms_norm_forward:widest": Case(
        rms_norm_forward_kernel,
        "rms_norm",
        lambda *given: _rms_norm_forward(*given, columns=WIDEST),
        dtypes=("fp32",),
        options=_row_warps(WIDEST),
    ),
    "rms_norm_backward:widest": Case(
        rms_norm_backward_kernel,
        "rms_norm",
        lambda *given: _rms_norm_backward(*given, columns=WIDEST),
        dtypes=("fp32",),
        options=_row_warps(WIDEST),
    ),
    # a query head, without a residual
    "rms_norm_forward:C=64": Case(
        rms_norm_forward_kernel,
        "rms_norm",
        lambda *given: _rms_norm_forward(*given, columns=64) | {"residual_ptr": None, "h_ptr": None},
        dtypes=("bf16",),
    ),
    "rms_norm_backward:C=1": Case(
        rms_norm_backward_kernel,
        "rms_norm",
        lambda *given: _rms_norm_backward(*given, columns=1) | {"n_columns": 1, "stride_hn": 1, "dh_ptr": None},
        dtypes=("bf16",),
        wide=False,
    ),
    "swiglu_forward": Case(swiglu_forward_kernel, "swiglu", _swiglu_forward),
    "swiglu_backward": Case(swiglu_backward_kernel, "swiglu", _swiglu_backward),
    "rotate": Case(rotate_kernel, "rotate", _rotate),
    "rotate:backward": Case(
        rotate_kernel, "rotate", lambda *given: _rotate(*given) | {"TRANSPOSED": True}, dtypes=("bf16",)
    ),
    # one key head is a constant to Triton; fp32 tables, and a head that no power of two holds exactly
    "rotate:Hkv=1,d=80": Case(
        rotate_kernel,
        "rotate",
        lambda *given: _rotate(*given, d=80, n_k_heads=1, fewest=1) | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"},
        dtypes=("bf16",),
    ),
    # the gradient of q alone, and what a thread holds of the widest head
    "rotate:q,d=256": Case(
        rotate_kernel,
        "rotate",
        lambda *given: _rotate(*given, d=256, n_k_heads=0) | {"k_ptr": None, "k_out_ptr": None, "TRANSPOSED": True},
        dtypes=("fp16",),
    ),
}
