"""The fused LoRA+IB backward: a decoder block's output gradient meets the bottleneck's and the block's own LoRA's.

At the tap a block ends in a LoRA layer, and the bottleneck reads what it adds to the residual:

    h = residual + x W^T + s (x A^T) B^T                   down_proj with LoRA; B [D, R]
    [mu | logvar] = h W_enc^T + b,  z, kl                  `ib_bottleneck`

In backward g = dL/dh arrives from the layers above, dz and dkl from the objective:

    dmu, dlogvar                                           as in `ib_kl`, from the saved mu | logvar; noise recomputed
    total = g + dmu W_mu + dlogvar W_lv                    [N, D], the residual's gradient and the LoRA layer's
    dlora = s total B                                      [N, R], the gradient of x A^T: what dA and dx need
    dW_enc = [dmu | dlogvar]^T h      db = sum_n [dmu | dlogvar]_n      where they are asked for

Routes, as in `ib_bottleneck`:
    fused     one kernel: it walks hidden's columns once, and multiplies each tile of total with its tile of B while the
              tile is on chip. Where hidden's columns are split between programs, each stores its part of dlora, and one
              sum adds the parts in a fixed order: no atomics, the same bits every time
    product   `ib_kl`'s kernel for dmu and dlogvar, the library's products for the rest
    torch     the same products around `ib_kl`'s torch path: what a CPU runs

Elements moved and FLOPs, of the kernel and of separate calls (the bottleneck's backward, then total @ B):

    both         read g (N D), write total (N D); read mu | logvar and dz (3 N Z), W_enc (2 Z D) and B (D R); write
                 dlora (N R); 4 N Z D + 2 N D R FLOPs
    separate     total is read again for the product with B: N D more; with the library's products dmu | dlogvar are
                 also written and read (4 N Z), by three launches
    fused        one launch, and neither; where columns are split, dlora's parts in fp32 besides

At N = 8192, D = 4096, Z = 256, R = 32 in 16 bits: 145 MiB fused, 225 MiB with the library's products; 36.5 GFLOP. But a
row tile of the kernel reads all of W_enc, N / BLOCK_N times 2 Z D elements through the L2 cache, where the library's
products are tiled both ways: which route is the faster must be measured, and the launch file says what was found.

Source: arXiv 2510.16022 eq. 4; Hu et al., LoRA, arXiv 2106.09685.
Legend: N tokens, D hidden size, Z latent size, R LoRA rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._library import library_op
from ._ib_bottleneck_triton import backward_fused
from ._ib_kl_spec import check_arguments
from ._rows import FLOATS, SEED_SCHEMA, as_rows, join_seed, split_seed
from .ib_bottleneck import _spec, chosen_route, encoder_gradients, latent_gradients, write_hidden_gradient
from .philox import normal_rows

__all__ = ["IBLoraGradients", "ib_lora_backward"]


class IBLoraGradients(NamedTuple):
    """dhidden [N, D], the total; dlora [N, R], or None without a LoRA layer; dweight [2Z, D], dbias [2Z], if needed."""

    dhidden: torch.Tensor
    dlora: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None


# --- routes ---------------------------------------------------------------------------------------


def _lora_product(total_ND: torch.Tensor, lora_DR: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * total @ B in B's dtype. Into a given tensor: autocast would choose another dtype."""
    dlora_NR = total_ND.new_empty(total_ND.shape[0], lora_DR.shape[1], dtype=lora_DR.dtype)
    total_ND = total_ND.to(lora_DR.dtype)
    if scaling == 1.0:
        return torch.mm(total_ND, lora_DR, out=dlora_NR)
    # beta = 0: what dlora holds is not read; alpha: scaled before it is rounded
    return torch.addmm(dlora_NR, total_ND, lora_DR, beta=0.0, alpha=scaling, out=dlora_NR)


def _gradients(
    total_ND, g_ND, dz_NZ, dkl, h_ND, w_2ZD, mulogvar_N2Z, inverse, lora_DR, noise_ids, eps, mask, scaling,
    seed_tensor, seed, logvar_range, reduction, route, needs_weight, needs_bias,
):  # fmt: skip
    """(dlora, dW, db), each empty if not needed. The total is written to `total`, which `g` may be itself."""
    dtype, key, n_latent = mulogvar_N2Z.dtype, join_seed(seed_tensor, seed), w_2ZD.shape[0] // 2
    n_rank = None if lora_DR is None else lora_DR.shape[1]
    spec = _spec(mulogvar_N2Z, n_latent, logvar_range, reduction, route, n_rank)
    spare = {"ids": noise_ids, "eps": eps, "mask": mask, "inverse": None if reduction == "none" else inverse}
    w_low = w_2ZD.to(dtype).contiguous()
    lora_low = None if lora_DR is None else lora_DR.to(dtype).contiguous()
    if spec.backend == "fused":
        pair_N2Z, dlora_NR = backward_fused(
            spec, mulogvar_N2Z, w_low, key, spare, dz_NZ, dkl, total_ND, g_ND=g_ND,
            keep=needs_weight or needs_bias, lora_DR=lora_low, scaling=scaling,
        )  # fmt: skip
    else:
        if spec.backend == "torch" and eps is None and dz_NZ is not None:
            spare["eps"] = normal_rows(key, noise_ids, mulogvar_N2Z.shape[0], n_latent, mulogvar_N2Z.device)
        pair_N2Z = latent_gradients(spec, mulogvar_N2Z, key, spare, dz_NZ, dkl)
        write_hidden_gradient(total_ND, g_ND, pair_N2Z, w_low)
        dlora_NR = None if lora_low is None else _lora_product(total_ND, lora_low, scaling)
    dlora_NR = mulogvar_N2Z.new_empty(0) if dlora_NR is None else dlora_NR
    return dlora_NR, *encoder_gradients(pair_N2Z, h_ND, w_2ZD, needs_weight, needs_bias)


# --- library --------------------------------------------------------------------------------------

_SAVED = (
    "Tensor? dz, Tensor? dkl, Tensor? hidden, Tensor weight, Tensor mulogvar, Tensor inverse, Tensor? lora_b, "
    "Tensor? noise_ids, Tensor? eps, Tensor? mask, float scaling, "
    f"{SEED_SCHEMA}, float[]? logvar_range, str reduction, str route, bool needs_weight, bool needs_bias"
)


@library_op(
    "ib_lora_backward",
    f"(Tensor? dhidden, {_SAVED}) -> (Tensor total, Tensor dlora, Tensor dweight, Tensor dbias)",
)
def _ib_lora_backward_op(dhidden, dz, dkl, hidden, weight, mulogvar, *rest):
    """The total in dhidden's dtype, without it in mulogvar's; what is not needed is empty."""
    like = mulogvar if dhidden is None else dhidden
    total_ND = like.new_empty(mulogvar.shape[0], weight.shape[1])
    return total_ND, *_gradients(total_ND, dhidden, dz, dkl, hidden, weight, mulogvar, *rest)


@_ib_lora_backward_op.register_fake
def _(dhidden, dz, dkl, hidden, weight, mulogvar, *rest):
    like = mulogvar if dhidden is None else dhidden
    return like.new_empty(mulogvar.shape[0], weight.shape[1]), *_fake_gradients(weight, mulogvar, *rest)


def _fake_gradients(weight, mulogvar, inverse, lora_b, *rest):
    dlora = mulogvar.new_empty(0 if lora_b is None else (mulogvar.shape[0], lora_b.shape[1]))
    needs_weight, needs_bias = rest[-2:]
    return (
        dlora,
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


@library_op(
    "ib_lora_backward_",
    f"(Tensor(a!) dhidden, {_SAVED}) -> (Tensor dlora, Tensor dweight, Tensor dbias)",
    mutates=("dhidden",),
)
def _ib_lora_backward_into_op(dhidden, *rest):
    """Adds the bottleneck's part into `dhidden`, which then holds the total."""
    return _gradients(dhidden, dhidden, *rest)


@_ib_lora_backward_into_op.register_fake
def _(dhidden, dz, dkl, hidden, weight, mulogvar, *rest):
    return _fake_gradients(weight, mulogvar, *rest)


# --- public ---------------------------------------------------------------------------------------


def _check(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], device: torch.device, *dtypes) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def _check_tensors(dhidden, dz, dkl, weight, mulogvar, inverse, lora_b, hidden, reduction, inplace, needs_weight):
    """Nothing is written before every tensor is seen to fit."""
    if mulogvar.dim() != 2 or mulogvar.shape[1] < 2 or mulogvar.shape[1] % 2:
        raise ValueError(f"mulogvar: expected shape [N, 2Z] with Z >= 1, got {tuple(mulogvar.shape)}")
    if mulogvar.dtype not in FLOATS:
        raise ValueError(f"mulogvar: expected a floating dtype, got {mulogvar.dtype}")
    (n_rows, n_pair), dtype, device = mulogvar.shape, mulogvar.dtype, mulogvar.device
    if weight.dim() != 2 or weight.shape[0] != n_pair or weight.shape[1] < 1:
        raise ValueError(f"weight: expected shape [{n_pair}, D] with D >= 1, got {tuple(weight.shape)}")
    wider = tuple(x for x in FLOATS if torch.promote_types(x, dtype) == x)
    compute = torch.promote_types(dtype, torch.float32)
    width = weight.shape[1]
    _check("weight", weight, (n_pair, width), device, *wider)
    _check("dhidden", dhidden, (n_rows, width), device, dtype, compute)
    _check("dz", dz, (n_rows, n_pair // 2), device, dtype)
    _check("dkl", dkl, (n_rows,) if reduction == "none" else (), device, compute)
    _check("hidden", hidden, (n_rows, width), device, dtype)
    if reduction != "none" and dkl is not None:
        _check("inverse", inverse, (1,), device, compute)
    if lora_b is not None:
        if lora_b.dim() != 2 or lora_b.shape[0] != width or lora_b.shape[1] < 1:
            raise ValueError(f"lora_b: expected shape [{width}, R] with R >= 1, got {tuple(lora_b.shape)}")
        _check("lora_b", lora_b, tuple(lora_b.shape), device, *wider)
    if needs_weight and hidden is None:
        raise ValueError("hidden: expected the encoder's input, which the weight's gradient needs, got None")
    if inplace and dhidden is None:
        raise ValueError("dhidden: expected the buffer that inplace=True writes to, got None")
    if inplace and n_rows > 0:
        apart, overlap = width > 1 and dhidden.stride(1) != 1, n_rows > 1 and dhidden.stride(0) < width
        if apart or overlap:
            raise ValueError(
                f"dhidden: expected adjacent columns and rows that do not overlap, got strides {dhidden.stride()}"
            )


def ib_lora_backward(
    dhidden: torch.Tensor | None,
    dz: torch.Tensor | None,
    dkl: torch.Tensor | None,
    weight: torch.Tensor,
    mulogvar: torch.Tensor,
    inverse: torch.Tensor,
    lora_b: torch.Tensor | None,
    *,
    hidden: torch.Tensor | None = None,
    scaling: float = 1.0,
    seed: int | torch.Tensor | None = None,
    noise_ids: torch.Tensor | None = None,
    eps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    logvar_range: tuple[float, float] | None = (-4.0, 4.0),
    reduction: str = "mean",
    inplace: bool = False,
    needs_weight: bool = False,
    needs_bias: bool = False,
    backend: str = "auto",
) -> IBLoraGradients:
    """The backward of `ib_bottleneck` at a decoder block's output, joined with that of the block's last LoRA layer.

    Args:
        dhidden: [N, D], the gradient that arrives at hidden from the layers above; hidden's dtype, or fp32 for a 16-bit
            one. None: nothing arrives.
        dz: [N, Z], hidden's dtype, or None: nothing arrives through z.
        dkl: fp32 (float64 for float64), 0-d, or [N] for reduction "none"; None: nothing arrives through kl.
        weight: [2Z, D], the encoder's; hidden's dtype or a wider one.
        mulogvar, inverse: [N, 2Z] in hidden's dtype and [1], as the registered op `ib_bottleneck` returns them.
        lora_b: B [D, R], hidden's dtype or a wider one, from which it is rounded. None: the layer has no LoRA.
        hidden: [N, D], for `needs_weight` alone.
        scaling: of the LoRA layer, alpha / r.
        seed, noise_ids, eps, mask, logvar_range, reduction: what the forward had. `seed` is an int or a one-element
            tensor, and needed only where `dz` is given and `eps` is not.
        inplace: add into `dhidden`, whose columns must be adjacent: the caller owns it.
        needs_weight, needs_bias: whether to compute dweight and dbias.
        backend: as in `ib_bottleneck`.

    Returns:
        dhidden: the total [N, D], `dhidden` itself if inplace; dlora: scaling * total @ B [N, R], accumulated in fp32,
        in hidden's dtype, or None; dweight and dbias in the weight's dtype, or None. Not differentiable.

    Raises:
        ValueError: a wrong shape, dtype, device or range, or no noise to recompute dlogvar with.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    _check_tensors(dhidden, dz, dkl, weight, mulogvar, inverse, lora_b, hidden, reduction, inplace, needs_weight)
    if dz is not None and seed is None and eps is None:
        raise ValueError("seed: expected the forward's seed, or its eps: dz needs that noise, got None")
    mu, logvar = mulogvar.detach().chunk(2, dim=1)
    arguments = check_arguments(
        mu, logvar, 0 if seed is None else seed, noise_ids, eps, mask, logvar_range, reduction, None
    )
    route = chosen_route(backend, mulogvar.device, mulogvar.dtype, "ib_lora_backward")
    saved = (
        None if dz is None else as_rows(dz), None if dkl is None else dkl.contiguous(),
        None if hidden is None else as_rows(hidden), weight, mulogvar.contiguous(), inverse, lora_b,
        arguments.ids_N3, arguments.eps_NZ, arguments.mask_N, float(scaling), *split_seed(arguments.seed),
        arguments.logvar_range, reduction, route, needs_weight, needs_bias,
    )  # fmt: skip
    if inplace:
        assert dhidden is not None
        total, (dlora, dweight, dbias) = dhidden, _ib_lora_backward_into_op(dhidden, *saved)
    else:
        total, dlora, dweight, dbias = _ib_lora_backward_op(None if dhidden is None else as_rows(dhidden), *saved)
    return IBLoraGradients(
        total, None if lora_b is None else dlora, dweight if needs_weight else None, dbias if needs_bias else None
    )
