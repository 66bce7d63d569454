"""The tapped end of a decoder block as one autograd node: LoRA MLP, residual, and the bottleneck that reads their sum.

    h     = residual + lora_mlp(x)                          hidden_states[layer], which goes on to the layers above
    z, KL = ib_bottleneck(h)                                which goes to the objective

Backward receives all three gradients at once, so `ib_lora_backward` can add the bottleneck's part to what arrives from
above and multiply the sum with the down projection's B in the same visit; the MLP's backward starts from there. The sum
is also the residual's gradient.

It is written into the arriving buffer only where `_ownership.owns` proves that nobody else can read that: the addition
of a residual hands one tensor to two nodes. Saved beside the MLP's tensors: h, which is an output, and mu | logvar.
Legend: N rows (tokens), D hidden size, Z latent size, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._ownership import calibrate, owns
from ._ib_kl_spec import Arguments, check_arguments
from ._rows import as_rows, join_seed, split_seed
from .ib_bottleneck import Latent, _check_encoder, _ib_bottleneck_op, chosen_route
from .ib_lora_backward import ib_lora_backward
from .lora import Dropout, LoraProjection, check_versions, masters_of, versions_of
from .lora_mlp import MlpShadow, MlpSpec, mlp_backward, mlp_forward, mlp_spec

__all__ = ["Tapped", "ib_lora_mlp"]


class Tapped(NamedTuple):
    """hidden [..., D] and latent.z, latent.kl carry gradients."""

    hidden: torch.Tensor
    latent: Latent


class _Noise(NamedTuple):
    """Of the bottleneck: checked arguments, how its KL is reduced, and the route of its forward."""

    arguments: Arguments
    reduction: str
    route: str
    backend: str


class _IBLoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight_2ZD: torch.Tensor,
        bias_2Z: torch.Tensor | None,
        spec: MlpSpec,
        noise: _Noise,
        *masters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Shapes [..., D] in and out: a view between this node and the next would hide who owns the gradient."""
        calibrate()
        h_ND, saved = mlp_forward(as_rows(x), spec)
        h_ND.add_(residual.reshape(h_ND.shape))
        given = noise.arguments
        seed = split_seed(given.seed)
        z, kl, inverse, mulogvar, drawn = _ib_bottleneck_op(
            h_ND, weight_2ZD, bias_2Z, given.ids_N3, given.eps_NZ, given.mask_N, given.normalizer, *seed,
            given.logvar_range, noise.reduction, noise.route,
        )  # fmt: skip
        eps_NZ = drawn if noise.route == "torch" and given.eps_NZ is None else given.eps_NZ
        ctx.spec, ctx.noise, ctx.seed, ctx.lead = spec, noise, seed[1], x.shape[:-1]
        ctx.versions = [versions_of(shadow) for shadow in spec.shadow]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mulogvar)
        ctx.save_for_backward(*saved, h_ND, weight_2ZD, mulogvar, inverse, given.ids_N3, eps_NZ, given.mask_N, seed[0])
        return h_ND.view(residual.shape), z, kl, mulogvar

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        """Bare: a decorator's own frame would hold the gradients too, and `owns` counts references."""
        dh, dz, dkl, _ = grads
        del grads
        if torch.is_grad_enabled():
            raise RuntimeError("ib_lora_mlp is differentiable once: it has no second derivative")
        inplace = dh is not None and owns(dh)
        dh_ND = None if dh is None else as_rows(dh)
        del dh
        spec, noise = ctx.spec, ctx.noise
        *saved, h_ND, weight_2ZD, mulogvar, inverse, ids_N3, eps_NZ, mask_N, seed_tensor = ctx.saved_tensors
        for shadow, versions in zip(spec.shadow, ctx.versions, strict=True):
            check_versions(shadow, versions)
        b_OR = spec.shadow.down.b_OR  # scaled already
        with torch.autocast(h_ND.device.type, enabled=False):
            total, t_NR, dweight, dbias = ib_lora_backward(
                dh_ND, dz, dkl, weight_2ZD, mulogvar, inverse, b_OR[0] if b_OR else None, hidden=h_ND,
                seed=join_seed(seed_tensor, ctx.seed), noise_ids=ids_N3, eps=eps_NZ,
                mask=None if mask_N is None else mask_N.view(torch.bool), logvar_range=noise.arguments.logvar_range,
                reduction=noise.reduction, inplace=inplace, needs_weight=ctx.needs_input_grad[2],
                needs_bias=ctx.needs_input_grad[3], backend=noise.backend,
            )  # fmt: skip
            del dh_ND
            found = mlp_backward(total, tuple(saved), spec, needs_x=ctx.needs_input_grad[0], t_NR=t_NR)
        adapters = (grad for pair in found.adapters for grad in pair)
        dx = None if found.dx is None else found.dx.view(*ctx.lead, found.dx.shape[1])
        dresidual = total.view(*ctx.lead, -1) if ctx.needs_input_grad[1] else None
        return dx, dresidual, dweight, dbias, None, None, *adapters


@torch.compiler.disable
def ib_lora_mlp(
    x: torch.Tensor,
    residual: torch.Tensor,
    gate: LoraProjection,
    up: LoraProjection,
    down: LoraProjection,
    encoder_weight: torch.Tensor,
    encoder_bias: torch.Tensor | None,
    *,
    dropout: Dropout | None = None,
    down_dropout: Dropout | None = None,
    shadow: MlpShadow | None = None,
    recompute: bool = False,
    seed: int | torch.Tensor | None = None,
    noise_ids: torch.Tensor | None = None,
    eps: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    logvar_range: tuple[float, float] | None = (-4.0, 4.0),
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    backend: str = "auto",
) -> Tapped:
    """residual + lora_mlp(x), and the bottleneck on it.

    Args:
        x, gate, up, down, dropout, down_dropout, shadow, recompute: as in `lora_mlp`.
        residual: [..., D], x's dtype.
        encoder_weight, encoder_bias: [2Z, D] and [2Z] or None; seed, noise_ids, eps, mask, logvar_range, reduction,
        normalizer: as in `ib_bottleneck`.
        backend: "auto", "triton" or "torch".

    Returns:
        hidden [..., D], and the latent as `ib_bottleneck_latent` gives it. Differentiable once.

    Raises:
        ValueError, RuntimeError: as `lora_mlp` and `ib_bottleneck`.
    """
    spec = mlp_spec(x, gate, up, down, dropout, down_dropout, shadow, recompute, backend)
    if residual.shape != (*x.shape[:-1], down.weight.shape[0]) or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: expected {(*x.shape[:-1], down.weight.shape[0])} in {x.dtype}, "
            f"got {tuple(residual.shape)} in {residual.dtype}"
        )
    _check_encoder(residual, encoder_weight, encoder_bias)
    lead, n_latent = x.shape[:-1], encoder_weight.shape[0] // 2
    stand_in = x.detach().new_empty(()).expand(*lead, n_latent)
    arguments = check_arguments(stand_in, stand_in, seed, noise_ids, eps, mask, logvar_range, reduction, normalizer)
    noise = _Noise(arguments, reduction, chosen_route(backend, x.device, x.dtype), backend)
    with torch.autocast(x.device.type, enabled=False):
        hidden, z_NZ, kl, mulogvar_N2Z = _IBLoraMlp.apply(
            x, residual, encoder_weight, encoder_bias, spec, noise, *masters_of(gate, up, down)
        )
    mu, logvar = mulogvar_N2Z.detach().view(*lead, 2 * n_latent).chunk(2, dim=-1)
    kl = kl.view(lead) if reduction == "none" else kl
    return Tapped(hidden, Latent(z_NZ.view(*lead, n_latent), kl, mu, logvar))
