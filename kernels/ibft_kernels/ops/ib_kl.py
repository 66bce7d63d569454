"""The bottleneck's sample z ~ N(mu, exp(logvar)) and its KL(N(mu, exp(logvar)) || N(0, I)), in one visit.

    l     = clamp(logvar, lo, hi)                          gradient as torch.clamp: passes at and inside the bounds
    z     = mu + exp(l / 2) eps                            eps ~ N(0, I), from Philox (see `philox`) or given
    KL    = 1/2 sum_z (exp(l) + mu^2 - 1 - l)              nats per token
    kl    = sum_n mask_n KL_n / denominator                mean: count Z;  batchmean: count;  sum: 1;  none: mask_n KL_n

    dmu     = dz + g mu                                    g_n = dkl mask_n / denominator
    dlogvar = 1/2 (dz eps exp(l / 2) + g (exp(l) - 1))     where lo <= logvar <= hi, else 0

Forward reads mu and logvar and writes z (3 N Z elements), backward reads mu, logvar and dz and writes dmu and dlogvar
(5 N Z): eps is recomputed in registers. The KL is summed in two stages, partials by program and then one program in
fixed order, so the same input gives the same bits; the token count stays on the device. Arithmetic is fp32, float64
for float64 inputs.

The torch path runs the same formulas and saves eps: on a CPU, four bytes an element cost less than
Philox a second time.

Source: arXiv 2510.16022 eq. 4; Kingma and Welling, Auto-Encoding Variational Bayes, appendix B.
Legend: N tokens, Z latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._dispatch import resolve_backend
from .._library import library_op
from ._ib_kl_spec import Spec, check_arguments
from ._ib_kl_triton import backward_triton, forward_triton
from ._rows import SEED_SCHEMA, as_rows, join_seed, split_seed
from .philox import normal_rows

__all__ = ["ib_kl_loss"]


# --- torch path -----------------------------------------------------------------------------------


def _forward_torch(
    spec: Spec, mu_NZ: torch.Tensor, logvar_NZ: torch.Tensor, eps_NZ: torch.Tensor, spare: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    mu, logvar = mu_NZ.to(spec.compute), logvar_NZ.to(spec.compute)
    if spec.logvar_range is not None:
        logvar = logvar.clamp(*spec.logvar_range)
    std = (0.5 * logvar).exp_()
    z_NZ = torch.addcmul(mu, std, eps_NZ.to(spec.compute)).to(mu_NZ.dtype)
    kl_N = std.square_().sub_(logvar).sub_(1.0).addcmul_(mu, mu).sum(dim=1).mul_(0.5)
    mask_N = spare["mask"]
    if mask_N is not None:
        kl_N.masked_fill_(mask_N == 0, 0.0)
    if spec.reduction == "none":
        return z_NZ, kl_N, None
    denominator = torch.ones(1, dtype=spec.compute, device=mu.device)
    if spec.reduction != "sum":
        if spare["normalizer"] is not None:
            denominator.copy_(spare["normalizer"])
        elif mask_N is not None:
            denominator.copy_((mask_N != 0).sum())
        else:
            denominator.fill_(mu.shape[0])
    if spec.reduction == "mean":
        denominator.mul_(mu.shape[1])
    inverse = torch.where(denominator == 0, 0.0, 1.0 / denominator)
    return z_NZ, kl_N.sum() * inverse[0], inverse


def _backward_torch(
    spec: Spec,
    mu_NZ: torch.Tensor,
    logvar_NZ: torch.Tensor,
    eps_NZ: torch.Tensor | None,
    spare: dict[str, Any],
    dz_NZ: torch.Tensor | None,
    dkl: torch.Tensor | None,
    needs: tuple[bool, bool],
) -> list[torch.Tensor | None]:
    g_N1 = None
    if dkl is not None:
        g_N1 = dkl if spare["inverse"] is None else (dkl * spare["inverse"]).expand(mu_NZ.shape[0])
        g_N1 = (g_N1 if spare["mask"] is None else g_N1.masked_fill(spare["mask"] == 0, 0.0))[:, None]
    dz = None if dz_NZ is None else dz_NZ.to(spec.compute)
    dmu = dlogvar = None
    if needs[0]:
        dmu = torch.zeros((), dtype=spec.compute, device=mu_NZ.device).expand(mu_NZ.shape) if dz is None else dz
        if g_N1 is not None:
            dmu = torch.addcmul(dmu, g_N1, mu_NZ.to(spec.compute))
        dmu = dmu.to(mu_NZ.dtype, copy=dmu is dz_NZ)  # an op's output is never its input
    if needs[1]:
        raw = logvar_NZ.to(spec.compute)
        std = raw if spec.logvar_range is None else raw.clamp(*spec.logvar_range)
        std = (0.5 * std).exp_()
        twice = torch.zeros_like(std) if dz is None or eps_NZ is None else eps_NZ.to(spec.compute) * std * dz
        if g_N1 is not None:
            twice.addcmul_(std.square_().sub_(1.0), g_N1)
        twice.mul_(0.5)
        if spec.logvar_range is not None:
            lo, hi = spec.logvar_range
            twice.masked_fill_((raw < lo) | (raw > hi), 0.0)
        dlogvar = twice.to(logvar_NZ.dtype)
    return [dmu, dlogvar]


# --- library and autograd -------------------------------------------------------------------------

_NOISE = f"Tensor? noise_ids, Tensor? eps, Tensor? mask, Tensor? normalizer, {SEED_SCHEMA}"
_SPEC = "float[]? logvar_range, str reduction, str backend"


def _spec(mu: torch.Tensor, logvar_range: Sequence[float] | None, reduction: str, backend: str) -> Spec:
    bounds = None if logvar_range is None else (logvar_range[0], logvar_range[1])
    return Spec(torch.promote_types(mu.dtype, torch.float32), bounds, reduction, backend)


@library_op(
    "ib_kl_loss",
    f"(Tensor mu, Tensor logvar, {_NOISE}, {_SPEC}) -> (Tensor z, Tensor kl, Tensor inverse, Tensor noise)",
)
def _ib_kl_op(mu, logvar, noise_ids, eps, mask, normalizer, seed_tensor, seed, logvar_range, reduction, backend):
    """inverse: 1 / denominator [1], empty for "none". noise: the torch path's own eps [N, Z], else empty."""
    spec, key = _spec(mu, logvar_range, reduction, backend), join_seed(seed_tensor, seed)
    spare = {"ids": noise_ids, "eps": eps, "mask": mask, "normalizer": normalizer}
    noise = torch.empty(0, dtype=torch.float32, device=mu.device)
    if backend == "triton":
        z, kl, inverse = forward_triton(spec, mu, logvar, key, spare)
    else:
        if eps is None:
            eps = noise = normal_rows(key, noise_ids, *mu.shape, mu.device)
        z, kl, inverse = _forward_torch(spec, mu, logvar, eps, spare)
    return z, kl, kl.new_empty(0) if inverse is None else inverse, noise


@_ib_kl_op.register_fake
def _(mu, logvar, noise_ids, eps, mask, normalizer, seed_tensor, seed, logvar_range, reduction, backend):
    rows, compute = reduction == "none", torch.promote_types(mu.dtype, torch.float32)
    kl = mu.new_empty(mu.shape[:1] if rows else (), dtype=compute)
    noise = mu.new_empty(0 if backend == "triton" or eps is not None else mu.shape, dtype=torch.float32)
    return mu.new_empty(mu.shape), kl, kl.new_empty(0 if rows else 1), noise


@library_op(
    "ib_kl_backward",
    "(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor inverse, Tensor? noise_ids, Tensor? eps, Tensor? mask, "
    f"{SEED_SCHEMA}, {_SPEC}, bool needs_mu, bool needs_logvar) -> (Tensor dmu, Tensor dlogvar)",
)
def _ib_kl_backward_op(
    dz, dkl, mu, logvar, inverse, noise_ids, eps, mask, seed_tensor, seed,
    logvar_range, reduction, backend, needs_mu, needs_logvar,
):  # fmt: skip
    spec, key = _spec(mu, logvar_range, reduction, backend), join_seed(seed_tensor, seed)
    spare = {"ids": noise_ids, "eps": eps, "mask": mask, "inverse": None if reduction == "none" else inverse}
    needs = (needs_mu, needs_logvar)
    if backend == "triton":
        grads = backward_triton(spec, mu, logvar, key, spare, dz, dkl, needs)
    else:
        grads = _backward_torch(spec, mu, logvar, eps, spare, dz, dkl, needs)
    dmu, dlogvar = (mu.new_empty(0) if grad is None else grad for grad in grads)
    return dmu, dlogvar


@_ib_kl_backward_op.register_fake
def _(dz, dkl, mu, logvar, *settings):
    return tuple(mu.new_empty(mu.shape if need else 0) for need in settings[-2:])


def _setup_context(ctx, inputs, output):
    mu, logvar, noise_ids, eps, mask, _, seed_tensor, ctx.seed, *ctx.settings = inputs
    _, _, inverse, noise = output
    if eps is None and ctx.settings[-1] == "torch":
        eps = noise
    ctx.mark_non_differentiable(inverse, noise)
    ctx.set_materialize_grads(False)  # a gradient that does not arrive stays None: no zero tensor is made or read
    ctx.save_for_backward(mu, logvar, inverse, noise_ids, eps, mask, seed_tensor)


def _backward(ctx, dz, dkl, *_):
    *tensors, seed_tensor = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    dz = None if dz is None else as_rows(dz)
    dkl = None if dkl is None else dkl.contiguous()
    grads = _ib_kl_backward_op(dz, dkl, *tensors, seed_tensor, ctx.seed, *ctx.settings, *needs)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 9


_ib_kl_op.register_autograd(_backward, setup_context=_setup_context)


# --- public ---------------------------------------------------------------------------------------


def ib_kl_loss(
    mu: torch.Tensor,
    logvar: torch.Tensor,
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
    """Sample the bottleneck's latent and take its KL against N(0, I), with gradients through both.

    Args:
        mu, logvar: [..., Z], one floating dtype. Halves of one [..., 2Z] tensor are read in place.
        seed: 64-bit key (`noise_key`): an int, or a one-element int64 tensor, which is not copied to the host. None
            draws one from torch's CPU generator, so `torch.manual_seed` works and two calls differ.
        noise_ids: int32 [..., 3] = (epoch, sample, position) of each token; default (0, 0, row number).
        eps: [..., Z] noise to use instead of the generator's; no gradient flows into it.
        mask: bool [...], the tokens that the KL counts; z is computed everywhere.
        logvar_range: bounds (lo, hi) that logvar is clamped to, in z and in the KL; None: no clamp.
        reduction: "mean" over counted tokens and dimensions; "batchmean": sum over dimensions, mean over counted
            tokens (not `nn.KLDivLoss`'s, which divides by rows); "sum"; "none".
        normalizer: replaces the token count of "mean" and "batchmean", with that of a whole optimizer step for one: a
            number or a one-element tensor, a constant to autograd. 0 gives KL 0, as an empty mask does.
        backend: "auto", "triton" or "torch".

    Returns:
        z [..., Z] in mu's dtype, and kl in nats, fp32 (float64 for float64 inputs): 0-d, or for "none" [...] per
        token, 0 where the mask is false. Both differentiable once.

    Raises:
        ValueError: a wrong shape, dtype, device or range.
        RuntimeError: the triton backend was asked for and cannot run here.
    """
    arguments = check_arguments(mu, logvar, seed, noise_ids, eps, mask, logvar_range, reduction, normalizer)
    z_NZ, kl, _, _ = _ib_kl_op(
        as_rows(mu), as_rows(logvar), arguments.ids_N3, arguments.eps_NZ, arguments.mask_N, arguments.normalizer,
        *split_seed(arguments.seed), arguments.logvar_range, reduction, resolve_backend(backend, mu.device),
    )  # fmt: skip
    return z_NZ.view(mu.shape), kl.view(mu.shape[:-1]) if reduction == "none" else kl
