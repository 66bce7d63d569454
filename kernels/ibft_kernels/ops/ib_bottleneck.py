"""The bottleneck at one tap: encoder product, sample z, and KL, from hidden states to hidden states' gradient.

    [mu | logvar] = h W^T + b                              W [2Z, D]: mu rows, then logvar rows
    z, kl         = ib_kl_loss(mu, logvar)                 its mathematics, its noise

    dh = dmu W_mu + dlogvar W_lv        dW = [dmu | dlogvar]^T h        db = sum_n [dmu | dlogvar]_n
                                                           dmu, dlogvar as in `ib_kl`

Saved: hidden (for dW) and mu | logvar [N, 2Z] in hidden's dtype; the noise is recomputed (the torch path, on which
Philox costs more than the bytes, saves it). dmu and dlogvar are rounded to hidden's dtype before they are multiplied.

Three routes, one result up to rounding:
    fused     one kernel forward, on whose fp32 accumulator z and KL are taken; one kernel backward, in which dmu and
              dlogvar never leave the chip (unless dW needs them) while hidden's columns pass: `_ib_bottleneck_triton`
    product   the library's matrix products around `ib_kl`'s kernels: for float64, for a latent too wide for the chip,
              and where nobody has measured the fused kernels ahead (launch/<architecture>.json)
    torch     the library's products around `ib_kl`'s torch path: what a CPU runs

`ib_bottleneck_backward_` adds dh into a gradient that already lies in memory, as the tap inside a model needs.

Source: arXiv 2510.16022 eq. 4; Kingma and Welling, Auto-Encoding Variational Bayes, appendix B.
Legend: N tokens, D hidden size, Z latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._dispatch import resolve_backend
from .._launch import launch_shape
from .._library import library_op
from ._ib_bottleneck_triton import backward_fused, fits_on_chip, forward_fused
from ._ib_kl_spec import Spec, check_arguments
from ._ib_kl_triton import backward_triton, forward_triton
from ._rows import FLOATS, SEED_SCHEMA, as_rows, join_seed, product, split_seed
from .ib_kl import _backward_torch, _forward_torch
from .philox import normal_rows

__all__ = ["Latent", "ib_bottleneck", "ib_bottleneck_latent"]


class Latent(NamedTuple):
    """z and kl carry gradients; mu [..., Z] and the unclamped logvar [..., Z], in hidden's dtype, are for logging."""

    z: torch.Tensor
    kl: torch.Tensor
    mu: torch.Tensor
    logvar: torch.Tensor


# --- routes ---------------------------------------------------------------------------------------


def chosen_route(backend: str, device: torch.device, dtype: torch.dtype, op: str = "ib_bottleneck") -> str:
    """The route that a caller's `backend` asks for: "auto" on a device takes what launch/<architecture>.json says."""
    resolved = resolve_backend(backend, device)
    if resolved == "torch" or backend == "triton":
        return "torch" if resolved == "torch" else "fused"
    return launch_shape(op, device, dtype)["route"]


def _resolve_route(route: str, hidden: torch.Tensor, n_latent: int, n_rank: int | None = None) -> str:
    """Which of "torch", "fused" and "product" runs: the one asked for, where it can. n_rank: `ib_lora_backward`'s."""
    fits = route != "fused" or fits_on_chip(hidden.device, hidden.dtype, n_latent, n_rank)
    return route if fits else "product"


def _spec(
    hidden: torch.Tensor,
    n_latent: int,
    bounds: Sequence[float] | None,
    reduction: str,
    route: str,
    n_rank: int | None = None,
) -> Spec:
    compute = torch.promote_types(hidden.dtype, torch.float32)
    logvar_range = None if bounds is None else (bounds[0], bounds[1])
    return Spec(compute, logvar_range, reduction, _resolve_route(route, hidden, n_latent, n_rank))


def latent_gradients(
    spec: Spec,
    mulogvar_N2Z: torch.Tensor,
    seed: int | torch.Tensor,
    spare: dict[str, torch.Tensor | None],
    dz_NZ: torch.Tensor | None,
    dkl: torch.Tensor | None,
) -> torch.Tensor:
    """dmu | dlogvar [N, 2Z] by `ib_kl`'s kernels or, on the torch route, its formulas."""
    mu_NZ, logvar_NZ = mulogvar_N2Z.chunk(2, dim=1)
    pair_N2Z = torch.empty_like(mulogvar_N2Z)
    both, halves = (True, True), pair_N2Z.chunk(2, dim=1)
    if spec.backend == "product":
        backward_triton(spec, mu_NZ, logvar_NZ, seed, spare, dz_NZ, dkl, both, halves)
    else:
        grads = _backward_torch(spec, mu_NZ, logvar_NZ, spare["eps"], spare, dz_NZ, dkl, both)
        for half_NZ, grad_NZ in zip(halves, grads, strict=True):
            assert grad_NZ is not None
            half_NZ.copy_(grad_NZ)
    return pair_N2Z


def write_hidden_gradient(
    dh_ND: torch.Tensor, g_ND: torch.Tensor | None, pair_N2Z: torch.Tensor, w_2ZD: torch.Tensor
) -> None:
    """dh = g + [dmu | dlogvar] W by the library's products; g may be dh itself, and None is nothing."""
    if g_ND is None:
        torch.mm(pair_N2Z, w_2ZD, out=dh_ND)
    elif dh_ND.dtype == pair_N2Z.dtype:
        torch.addmm(g_ND, pair_N2Z, w_2ZD, out=dh_ND)
    else:
        torch.add(g_ND, product(pair_N2Z, w_2ZD, dh_ND.dtype), out=dh_ND)


def encoder_gradients(
    pair_N2Z: torch.Tensor | None, h_ND: torch.Tensor | None, w_2ZD: torch.Tensor, needs_weight: bool, needs_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dW, db) in the weight's dtype, each empty if not needed."""
    dw_2ZD, db_2Z = w_2ZD.new_empty(0), w_2ZD.new_empty(0)
    if needs_weight:
        assert pair_N2Z is not None
        assert h_ND is not None
        dw_2ZD = product(pair_N2Z.t(), h_ND, w_2ZD.dtype)
    if needs_bias:
        assert pair_N2Z is not None
        compute = torch.promote_types(pair_N2Z.dtype, torch.float32)
        db_2Z = pair_N2Z.sum(dim=0, dtype=compute).to(w_2ZD.dtype)
    return dw_2ZD, db_2Z


def _gradients(
    dh_ND, dz_NZ, dkl, h_ND, w_2ZD, mulogvar_N2Z, inverse, noise_ids, eps, mask, seed_tensor, seed,
    logvar_range, reduction, route, needs_weight, needs_bias, *, add,
):  # fmt: skip
    """(dW, db), each empty if not needed. Hidden's gradient is written to dh, or added to what it holds; None: not."""
    dtype, key = mulogvar_N2Z.dtype, join_seed(seed_tensor, seed)
    spec = _spec(mulogvar_N2Z, w_2ZD.shape[0] // 2, logvar_range, reduction, route)
    spare = {"ids": noise_ids, "eps": eps, "mask": mask, "inverse": None if reduction == "none" else inverse}
    w_low = w_2ZD.to(dtype).contiguous()
    if spec.backend == "fused":
        keep = needs_weight or needs_bias
        g_ND = dh_ND if add else None
        pair_N2Z, _ = backward_fused(spec, mulogvar_N2Z, w_low, key, spare, dz_NZ, dkl, dh_ND, g_ND=g_ND, keep=keep)
    else:
        pair_N2Z = latent_gradients(spec, mulogvar_N2Z, key, spare, dz_NZ, dkl)
        if dh_ND is not None:
            write_hidden_gradient(dh_ND, dh_ND if add else None, pair_N2Z, w_low)
    return encoder_gradients(pair_N2Z, h_ND, w_2ZD, needs_weight, needs_bias)


# --- library and autograd -------------------------------------------------------------------------

_SPEC = "float[]? logvar_range, str reduction, str route"
_SAVED = "Tensor? hidden, Tensor weight, Tensor mulogvar, Tensor inverse, Tensor? noise_ids, Tensor? eps, Tensor? mask"


@library_op(
    "ib_bottleneck",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? noise_ids, Tensor? eps, Tensor? mask, Tensor? normalizer, "
    f"{SEED_SCHEMA}, {_SPEC}) -> (Tensor z, Tensor kl, Tensor inverse, Tensor mulogvar, Tensor noise)",
)
def _ib_bottleneck_op(
    hidden, weight, bias, noise_ids, eps, mask, normalizer, seed_tensor, seed, logvar_range, reduction, route
):
    """Rows [N, D]. inverse: 1 / denominator [1], empty for "none". noise: the torch route's own eps, else empty."""
    n_latent, key = weight.shape[0] // 2, join_seed(seed_tensor, seed)
    spec = _spec(hidden, n_latent, logvar_range, reduction, route)
    spare = {"ids": noise_ids, "eps": eps, "mask": mask, "normalizer": normalizer}
    noise = torch.empty(0, dtype=torch.float32, device=hidden.device)
    w_low = weight.to(hidden.dtype).contiguous()
    if spec.backend == "fused":
        z, kl, inverse, mulogvar = forward_fused(spec, hidden, w_low, bias, key, spare)
    else:
        mulogvar = hidden.new_empty(hidden.shape[0], weight.shape[0])  # given: autocast would choose another dtype
        if bias is None:
            torch.mm(hidden, w_low.t(), out=mulogvar)
        else:
            torch.addmm(bias.to(hidden.dtype), hidden, w_low.t(), out=mulogvar)
        mu, logvar = mulogvar.chunk(2, dim=1)
        if spec.backend == "product":
            z, kl, inverse = forward_triton(spec, mu, logvar, key, spare)
        else:
            if eps is None:
                eps = noise = normal_rows(key, noise_ids, *mu.shape, mu.device)
            z, kl, inverse = _forward_torch(spec, mu, logvar, eps, spare)
    return z, kl, kl.new_empty(0) if inverse is None else inverse, mulogvar, noise


@_ib_bottleneck_op.register_fake
def _(hidden, weight, bias, noise_ids, eps, mask, normalizer, seed_tensor, seed, logvar_range, reduction, route):
    n_rows, n_latent, by_row = hidden.shape[0], weight.shape[0] // 2, reduction == "none"
    kl = hidden.new_empty((n_rows,) if by_row else (), dtype=torch.promote_types(hidden.dtype, torch.float32))
    drawn = route == "torch" and eps is None
    noise = hidden.new_empty((n_rows, n_latent) if drawn else (0,), dtype=torch.float32)
    mulogvar = hidden.new_empty(n_rows, 2 * n_latent)
    return hidden.new_empty(n_rows, n_latent), kl, kl.new_empty(0 if by_row else 1), mulogvar, noise


def _fake_gradients(weight, needs_weight, needs_bias):
    sizes = weight.shape if needs_weight else 0, weight.shape[0] if needs_bias else 0
    return weight.new_empty(sizes[0]), weight.new_empty(sizes[1])


@library_op(
    "ib_bottleneck_backward",
    f"(Tensor? dz, Tensor? dkl, {_SAVED}, {SEED_SCHEMA}, {_SPEC}, bool needs_hidden, bool needs_weight, "
    "bool needs_bias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
def _ib_bottleneck_backward_op(dz, dkl, hidden, weight, mulogvar, *rest):
    """What is not needed is empty. `hidden` may be None where the weight's gradient is not needed."""
    *settings, needs_hidden, needs_weight, needs_bias = rest
    dh_ND = mulogvar.new_empty(mulogvar.shape[0], weight.shape[1]) if needs_hidden else None
    saved = hidden, weight, mulogvar, *settings
    grads = _gradients(dh_ND, dz, dkl, *saved, needs_weight, needs_bias, add=False)
    return mulogvar.new_empty(0) if dh_ND is None else dh_ND, *grads


@_ib_bottleneck_backward_op.register_fake
def _(dz, dkl, hidden, weight, mulogvar, *rest):
    dh_ND = mulogvar.new_empty((mulogvar.shape[0], weight.shape[1]) if rest[-3] else (0,))
    return dh_ND, *_fake_gradients(weight, *rest[-2:])


def _check_saved(dz, hidden, weight, mulogvar, *, needs_weight: bool) -> None:
    """The buffer-writing op may be called by hand: nothing is added before all its tensors are seen to fit."""
    n_rows, n_latent = mulogvar.shape[0], weight.shape[0] // 2
    expected = {"mulogvar": (mulogvar, (n_rows, 2 * n_latent)), "dz": (dz, (n_rows, n_latent))}
    expected["hidden"] = (hidden, (n_rows, weight.shape[1]))
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
            raise ValueError(f"{name}: expected shape {shape} with adjacent columns, got {tuple(tensor.shape)}")
        if tensor.dtype != mulogvar.dtype or tensor.device != weight.device:
            raise ValueError(
                f"{name}: expected {mulogvar.dtype} on {weight.device}, got {tensor.dtype} on {tensor.device}"
            )
    if needs_weight and hidden is None:
        raise ValueError("hidden: expected the encoder's input, which the weight's gradient needs, got None")


@library_op(
    "ib_bottleneck_backward_",
    f"(Tensor(a!) dhidden, Tensor? dz, Tensor? dkl, {_SAVED}, {SEED_SCHEMA}, {_SPEC}, bool needs_weight, "
    "bool needs_bias) -> (Tensor dweight, Tensor dbias)",
    mutates=("dhidden",),
)
def _ib_bottleneck_backward_into_op(dhidden, dz, dkl, hidden, weight, mulogvar, *settings):
    """Adds hidden's gradient into `dhidden` [N, D]: hidden's dtype or fp32, adjacent columns, rows of any stride."""
    shape = (mulogvar.shape[0], weight.shape[1])
    _check_saved(dz, hidden, weight, mulogvar, needs_weight=settings[-2])
    if dhidden.shape != shape or dhidden.stride(1) != 1:
        got = f"{tuple(dhidden.shape)}, strides {dhidden.stride()}"
        raise ValueError(f"dhidden: expected shape {shape} with adjacent columns, got {got}")
    if dhidden.dtype not in (mulogvar.dtype, torch.promote_types(mulogvar.dtype, torch.float32)):
        raise ValueError(f"dhidden: expected {mulogvar.dtype}, or torch.float32 for a 16-bit one, got {dhidden.dtype}")
    if dhidden.device != mulogvar.device:
        raise ValueError(f"dhidden: expected device {mulogvar.device}, got {dhidden.device}")
    return _gradients(dhidden, dz, dkl, hidden, weight, mulogvar, *settings, add=True)


@_ib_bottleneck_backward_into_op.register_fake
def _(dhidden, dz, dkl, hidden, weight, *rest):
    return _fake_gradients(weight, *rest[-2:])


def _setup_context(ctx, inputs, output):
    hidden, weight, _, noise_ids, eps, mask, _, seed_tensor, ctx.seed, *ctx.settings = inputs
    _, _, inverse, mulogvar, noise = output
    if eps is None and ctx.settings[-1] == "torch":
        eps = noise
    ctx.mark_non_differentiable(inverse, mulogvar, noise)
    ctx.set_materialize_grads(False)  # a gradient that does not arrive stays None: no zero tensor is made or read
    hidden = hidden if ctx.needs_input_grad[1] else None  # a frozen encoder keeps no activation
    ctx.save_for_backward(hidden, weight, mulogvar, inverse, noise_ids, eps, mask, seed_tensor)


def _autograd_backward(ctx, dz, dkl, *_):
    *tensors, seed_tensor = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    dz = None if dz is None else as_rows(dz)
    dkl = None if dkl is None else dkl.contiguous()
    grads = _ib_bottleneck_backward_op(dz, dkl, *tensors, seed_tensor, ctx.seed, *ctx.settings, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 9


_ib_bottleneck_op.register_autograd(_autograd_backward, setup_context=_setup_context)


# --- public ---------------------------------------------------------------------------------------


def _check_encoder(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: expected shape [..., D] with D >= 1, got {tuple(hidden.shape)}")
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden: expected a floating dtype, got {hidden.dtype}")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < 2 or weight.shape[0] % 2:
        raise ValueError(f"weight: expected shape [2Z, {width}] with Z >= 1, got {tuple(weight.shape)}")
    if weight.dtype not in FLOATS or torch.promote_types(weight.dtype, hidden.dtype) != weight.dtype:
        raise ValueError(f"weight: expected hidden's dtype {hidden.dtype} or a wider one, got {weight.dtype}")
    if weight.device != hidden.device:
        raise ValueError(f"weight: expected device {hidden.device}, got {weight.device}")
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias: expected weight's dtype {weight.dtype}, got {bias.dtype}")
    if bias.device != hidden.device:
        raise ValueError(f"bias: expected device {hidden.device}, got {bias.device}")


def ib_bottleneck_latent(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    seed: int | torch.Tensor | None = None,
    noise_ids: torch.Tensor | None = None,
    eps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    logvar_range: tuple[float, float] | None = (-4.0, 4.0),
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    backend: str = "auto",
) -> Latent:
    """As `ib_bottleneck`, which gives the first two fields; backward reads mu and logvar: do not write to them."""
    _check_encoder(hidden, weight, bias)
    lead, n_latent = hidden.shape[:-1], weight.shape[0] // 2
    stand_in = hidden.detach().new_empty(()).expand(*lead, n_latent)  # mu's shape, dtype and device, in one element
    arguments = check_arguments(stand_in, stand_in, seed, noise_ids, eps, mask, logvar_range, reduction, normalizer)
    route = chosen_route(backend, hidden.device, hidden.dtype)  # not in the op: a search times it with its autograd
    z_NZ, kl, _, mulogvar_N2Z, _ = _ib_bottleneck_op(
        as_rows(hidden), weight, bias, arguments.ids_N3, arguments.eps_NZ, arguments.mask_N, arguments.normalizer,
        *split_seed(arguments.seed), arguments.logvar_range, reduction, route,
    )  # fmt: skip
    mu, logvar = mulogvar_N2Z.detach().view(*lead, 2 * n_latent).chunk(2, dim=-1)
    return Latent(z_NZ.view(*lead, n_latent), kl.view(lead) if reduction == "none" else kl, mu, logvar)


def ib_bottleneck(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    seed: int | torch.Tensor | None = None,
    noise_ids: torch.Tensor | None = None,
    eps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    logvar_range: tuple[float, float] | None = (-4.0, 4.0),
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode hidden states to a Gaussian, sample the latent and take its KL against N(0, I), with every gradient.

    Args:
        hidden: [..., D], floating. Rows with adjacent columns and one stride are read in place.
        weight: [2Z, D], mu rows, then logvar rows; hidden's dtype or a wider one, from which it is rounded for the
            products. Gradients of weight and bias come in the weight's dtype.
        bias: [2Z] in the weight's dtype, or None.
        seed, noise_ids, eps, mask, logvar_range, reduction, normalizer: as in `ib_kl_loss`.
        backend: "triton": the fused kernels (the library's products, where those cannot run: float64, or Z above 256
            in 16 bits and 128 in 32); "torch"; "auto": on a GPU, the faster of the two as far as it was measured.

    Returns:
        z [..., Z] in hidden's dtype, and kl in nats, fp32 (float64 for float64 inputs): 0-d, or for "none" [...] per
        token, 0 where the mask is false. Both differentiable once.

    Raises:
        ValueError: a wrong shape, dtype, device or range.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    latent = ib_bottleneck_latent(
        hidden, weight, bias, seed=seed, noise_ids=noise_ids, eps=eps, mask=mask, logvar_range=logvar_range,
        reduction=reduction, normalizer=normalizer, backend=backend,
    )  # fmt: skip
    return latent.z, latent.kl
