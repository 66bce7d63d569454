"""The IB-FT objective: L = CE + alpha (KL + beta CE_z) (arXiv 2510.16022; docs/method.md).

Legend: B batch, T positions, N = B*T, M label tokens, D hidden size, Z latent size, V vocabulary.

The mathematics and its kernels are `ibft_kernels.ib_objective`; here the modules of a model meet them. Both
cross-entropies look only at the M positions whose next token is a label, and the [M, V] logits never exist.

Several layers, a bottleneck each: L = CE + alpha/n sum_l (KL_l + beta CE_z,l): alpha weighs the same whatever n.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, cast

import torch
from torch import nn

from ibft.bottleneck import LOGVAR_RANGE, InformationBottleneck, autocast_dtype
from ibft.context import LatentRequest
from ibft_kernels import (
    FoldedHead,
    Latent,
    Linear,
    fold_pays,
    folded_cross_entropy,
    ib_objective,
    linear_cross_entropy,
)

ACTIVE_DIM_NATS = 0.01  # a latent dimension is in use if its mean KL exceeds this


@dataclass
class LossParts:
    """`loss` carries the graph; the parts are detached scalars. `kl` and `ce_z` are means over the bottlenecks, zero
    without one."""

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    ce_z: torch.Tensor
    latent_sums: "LatentSums | None" = None

    def detached(self) -> "LossParts":
        return replace(self, loss=self.loss.detach())

    def __add__(self, other: "LossParts") -> "LossParts":
        """Micro-batches of one step, each normalised by the whole step's counts, add up."""
        sums = self.latent_sums
        if sums is not None and other.latent_sums is not None:
            sums = sums + other.latent_sums
        return LossParts(self.loss + other.loss, self.ce + other.ce, self.kl + other.kl, self.ce_z + other.ce_z, sums)

    @property
    def values(self) -> torch.Tensor:
        """[n] all of its numbers in fp32, for a sum over processes."""
        parts = [self.loss, self.ce, self.kl, self.ce_z]
        if self.latent_sums is not None:
            parts += [self.latent_sums.mu_abs, self.latent_sums.var, self.latent_sums.kl_Z]
        return torch.cat([part.detach().float().reshape(-1) for part in parts])

    def with_values(self, values: torch.Tensor) -> "LossParts":
        """The same parts, of other `values`."""
        loss, ce, kl, ce_z, *rest = values.split([1, 1, 1, 1, 1, 1, len(values) - 6] if self.latent_sums else 1)
        sums = LatentSums(rest[2], rest[0][0], rest[1][0]) if rest else None
        return LossParts(loss[0], ce[0], kl[0], ce_z[0], sums)


@dataclass
class LatentSums:
    """Sums over the KL's tokens, to be divided by their number at the end of the step (device tensors: no sync)."""

    kl_Z: torch.Tensor  # [Z] nats; of n bottlenecks [n Z], so that what `summary` says is the mean over them
    mu_abs: torch.Tensor  # [] sum over tokens and dims
    var: torch.Tensor  # [] sum over tokens and dims

    def __add__(self, other: "LatentSums") -> "LatentSums":
        return LatentSums(self.kl_Z + other.kl_Z, self.mu_abs + other.mu_abs, self.var + other.var)

    def beside(self, other: "LatentSums") -> "LatentSums":
        """With another bottleneck's, of the same tokens."""
        return LatentSums(torch.cat((self.kl_Z, other.kl_Z)), self.mu_abs + other.mu_abs, self.var + other.var)

    def on_host(self) -> "LatentSums":
        """Synchronises; what is asked of the copy does not any more."""
        return LatentSums(self.kl_Z.cpu(), self.mu_abs.cpu(), self.var.cpu())

    def kl_by_dimension(self, tokens: int, widths: Sequence[int]) -> list[list[float]]:
        """Mean KL (nats per token) of each latent dimension, a list a bottleneck. widths: Z of each. Synchronises."""
        return [part.tolist() for part in (self.kl_Z / max(tokens, 1)).split(list(widths))]

    def summary(self, tokens: int) -> dict[str, float]:
        """Mean |mu|, mean variance, the share of latent dimensions in use, and the mean KL (nats per token) of the
        dimension with the least, the middle and the most of it. Synchronises."""
        count = max(tokens, 1)
        dims = self.kl_Z.numel()
        kl_Z = (self.kl_Z / count).sort().values.tolist()
        return {
            "mu_abs_mean": float(self.mu_abs) / (count * dims),
            "var_mean": float(self.var) / (count * dims),
            "active_dims": sum(kl > ACTIVE_DIM_NATS for kl in kl_Z) / dims,
            "kl_dim_min": kl_Z[0],
            "kl_dim_median": (kl_Z[(dims - 1) // 2] + kl_Z[dims // 2]) / 2,
            "kl_dim_max": kl_Z[-1],
        }


def label_positions(labels: torch.Tensor, ignore_index: int = -100) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face labels [B, T] (unshifted) to (rows [M], targets [M]): position b*T+t predicts labels[b, t+1].

    Synchronises the device; a data loader that knows the rows on the CPU passes them instead.
    """
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index).reshape(-1)
    rows = (following != ignore_index).nonzero().squeeze(1)
    return rows, following[rows]


class IBObjective(nn.Module):
    """CE, KL and CE_z in one call; usable in any training step (see README).

    Args:
        bottleneck: the module, or None for plain fine-tuning (then no bottleneck cost at all); for several layers an
        `nn.ModuleDict` of such modules. alpha, beta: the weights in L = CE + alpha (KL + beta CE_z). kl_reduction:
        "batchmean" (sum over dims, mean over tokens: eq. 4) or "mean" (over tokens and dims: the released code).

    Raises:
        ValueError: negative alpha or beta; alpha > 0 without a bottleneck.
    """

    def __init__(
        self,
        bottleneck: InformationBottleneck | nn.ModuleDict | None,
        *,
        alpha: float = 0.1,
        beta: float = 0.02,
        kl_reduction: Literal["mean", "batchmean"] = "batchmean",
    ) -> None:
        super().__init__()
        if alpha < 0 or beta < 0:
            raise ValueError(f"got alpha {alpha} and beta {beta}, expected both >= 0")
        if kl_reduction not in ("mean", "batchmean"):
            raise ValueError(f"got kl_reduction {kl_reduction!r}, expected 'mean' or 'batchmean'")
        self.bottleneck = bottleneck if alpha > 0 else None
        if alpha > 0 and not self.bottlenecks:
            raise ValueError(f"alpha is {alpha} but there is no bottleneck")
        self.alpha, self.beta = alpha, beta
        self.kl_reduction: Literal["mean", "batchmean"] = kl_reduction

    @property
    def bottlenecks(self) -> list[InformationBottleneck]:
        """One a layer."""
        if isinstance(self.bottleneck, nn.ModuleDict):
            return [cast(InformationBottleneck, each) for each in self.bottleneck.values()]
        return [] if self.bottleneck is None else [self.bottleneck]

    def nothing(self, device: torch.device, *, collect: bool = False) -> LossParts:
        """Parts of no micro-batch, to which those of some add up."""
        zero = torch.zeros((), device=device)
        width = sum(bottleneck.latent_dim for bottleneck in self.bottlenecks)
        sums = LatentSums(torch.zeros(width, device=device), zero, zero) if collect and width else None
        return LossParts(zero, zero, zero, zero, sums)

    def fold(self, lm_head: nn.Module, label_tokens: int, index: int = 0) -> FoldedHead | None:
        """The latent head folded once for all micro-batches of an optimizer step with `label_tokens` label tokens;
        index: of which bottleneck.

        Hand it to each `forward`, and call its `backward` after the last micro-batch's. None where folding does not
        pay (few tokens, a wide latent) or there is no bottleneck. Call it under the same autocast as `forward`.
        """
        if self.bottleneck is None:
            return None
        up = self.bottlenecks[index].up
        if not fold_pays(label_tokens, *up.weight.shape):
            return None
        head = _head(lm_head)
        return FoldedHead(head.weight, up.weight, up.bias, head.bias)

    def request(
        self,
        *,
        kl_mask: torch.Tensor | None,
        seed: int | torch.Tensor,
        noise_ids: torch.Tensor,
        kl_normalizer: int | float | torch.Tensor,
    ) -> LatentRequest | None:
        """The order to a fused tapped block, for which `forward` then takes the latent; arguments as there. None
        without a bottleneck, with several, or where the kernels do not hold all of it (`InformationBottleneck.fuses`).
        """
        if not isinstance(self.bottleneck, InformationBottleneck) or not self.bottleneck.fuses:
            return None
        encoder = self.bottleneck.encoder_head
        noise: dict[str, Any] = {"seed": seed, "noise_ids": noise_ids}
        if self.bottleneck.deterministic:
            dtype = autocast_dtype(noise_ids.device.type) or encoder.weight.dtype
            noise = {"eps": self.bottleneck.no_noise(noise_ids.new_empty((), dtype=dtype).expand(noise_ids.shape))}
        return LatentRequest(
            Linear(encoder.weight, encoder.bias),
            {
                **noise, "mask": kl_mask, "logvar_range": LOGVAR_RANGE, "reduction": self.kl_reduction,
                "normalizer": kl_normalizer,
            },
        )  # fmt: skip

    def forward(
        self,
        last_hidden: torch.Tensor,
        tapped: torch.Tensor | Latent | list[torch.Tensor | Latent] | None,
        lm_head: nn.Module,
        *,
        labels: torch.Tensor | None = None,
        label_rows: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        kl_mask: torch.Tensor | None = None,
        seed: int | torch.Tensor | list[int] | list[torch.Tensor] | None = None,
        noise_ids: torch.Tensor | None = None,
        eps: torch.Tensor | list[torch.Tensor] | None = None,
        label_normalizer: int | float | torch.Tensor | None = None,
        kl_normalizer: int | float | torch.Tensor | None = None,
        fold: FoldedHead | list[FoldedHead | None] | None = None,
        collect: bool = False,
    ) -> LossParts:
        """The loss of one micro-batch.

        Args:
            last_hidden: [B, T, D] after the final norm. tapped: [B, T, D] hidden_states[layer], or the latent that a
            fused block made of them; None without bottleneck. lm_head: an `nn.Linear`, frozen or not. labels: [B, T] as
            Hugging Face has them; or `label_rows` [M] (flat b*T+t, increasing) with `targets` [M], already shifted.
            kl_mask: [B, T] bool, the tokens of the KL; None for all positions. seed, noise_ids, eps: of the noise, as
            in `ib_kl_loss`.
            label_normalizer: label tokens of the *whole optimizer step*, so that accumulation is exact; default M.
            kl_normalizer: the same for the KL's tokens; default: those of kl_mask. fold: the step's `fold(...)`;
            default: each call folds for itself, or not. collect: also return `latent_sums` for logging.
            With several bottlenecks tapped, seed, eps and fold are lists, in the order of the bottlenecks.

        Raises:
            ValueError: neither or both ways of giving labels; no tapped hidden states where a bottleneck needs them;
            a list that is not as long as there are bottlenecks; an lm_head that is no `nn.Linear`.
        """
        if (labels is None) == (label_rows is None or targets is None):
            raise ValueError("expected either labels, or label_rows and targets")
        if labels is not None:
            label_rows, targets = label_positions(labels)
        assert label_rows is not None
        assert targets is not None
        head = _head(lm_head)
        last_hidden = last_hidden.to(head.weight.dtype)
        if self.bottleneck is None:
            ce = linear_cross_entropy(
                last_hidden, head.weight, targets, bias=head.bias, rows=label_rows, normalizer=label_normalizer
            )
            zero = torch.zeros((), device=ce.device)
            return LossParts(ce, ce.detach(), zero, zero)
        if tapped is None:
            raise ValueError("the bottleneck needs the tapped hidden states, got None")
        latents = self._latents(tapped, seed, eps, noise_ids=noise_ids, mask=kl_mask, normalizer=kl_normalizer)
        (first, *others), folds, count = self.bottlenecks, self._each("fold", fold), len(latents)
        encoder, up = first.encoder_head, first.up
        parts = ib_objective(
            last_hidden,
            latents[0],
            targets,
            rows=label_rows,
            head=head,
            encoder=Linear(encoder.weight, encoder.bias),
            up=Linear(up.weight, up.bias) if folds[0] is None else folds[0],
            alpha=self.alpha / count,
            beta=self.beta,
            normalizer=label_normalizer,
        )
        loss, kl, ce_z = parts.loss, parts.kl.detach(), parts.ce_z.detach()
        for bottleneck, latent, own_fold in zip(others, latents[1:], folds[1:], strict=True):
            z = latent.z.to(last_hidden.dtype)
            own_ce_z = latent_cross_entropy(
                z, bottleneck.up, head, own_fold, targets, rows=label_rows, normalizer=label_normalizer
            )
            loss = loss + self.alpha / count * (latent.kl + self.beta * own_ce_z)
            kl, ce_z = kl + latent.kl.detach(), ce_z + own_ce_z.detach()
        sums = reduce(LatentSums.beside, (latent_sums(latent, kl_mask) for latent in latents)) if collect else None
        return LossParts(loss, parts.ce.detach(), kl / count, ce_z / count, sums)

    def _latents(self, tapped: Any, seed: Any, eps: Any, **settings: Any) -> list[Latent]:
        """What each bottleneck makes of its hidden states, but for latents that are made already."""
        tapped, seed, eps = self._each("tapped", tapped), self._each("seed", seed), self._each("eps", eps)
        return [
            each
            if isinstance(each, Latent)
            else bottleneck(each, seed=own_seed, eps=own_eps, reduction=self.kl_reduction, **settings)
            for bottleneck, each, own_seed, own_eps in zip(self.bottlenecks, tapped, seed, eps, strict=True)
        ]

    def _each(self, name: str, value: Any) -> list[Any]:
        """One entry a bottleneck; None is each one's default."""
        count = len(self.bottlenecks)
        entries = value if isinstance(value, list) else [value] * (count if value is None else 1)
        if len(entries) != count:
            raise ValueError(f"{name}: got {len(entries)}, expected {count}, one a bottleneck")
        return entries


def latent_cross_entropy(
    z: torch.Tensor, up: nn.Linear, head: Linear, fold: FoldedHead | None, targets: torch.Tensor, **options: Any
) -> torch.Tensor:
    """CE_z alone, by the step's fold where there is one. options: of `linear_cross_entropy`."""
    if fold is not None:
        return linear_cross_entropy(z, fold.weight, targets, bias=fold.bias, **options)
    return folded_cross_entropy(z, up.weight, up.bias, head.weight, targets, head_bias=head.bias, **options)


def _head(lm_head: nn.Module) -> Linear:
    """Weight and bias of the language-model head, in the autocast region's dtype where there is one."""
    if not isinstance(lm_head, nn.Linear):
        raise ValueError(f"lm_head: expected torch.nn.Linear (no adapter, not quantised), got {type(lm_head).__name__}")
    dtype = autocast_dtype(lm_head.weight.device.type) or lm_head.weight.dtype
    return Linear(lm_head.weight.to(dtype), lm_head.bias)


@torch.no_grad()
def latent_sums(latent: Latent, mask: torch.Tensor | None) -> LatentSums:
    """What the logs show of a latent, summed over the counted tokens."""
    mu = latent.mu.detach().float().flatten(0, -2)
    logvar = latent.logvar.detach().float().flatten(0, -2).clamp(*LOGVAR_RANGE)
    weight = torch.ones_like(mu[:, :1]) if mask is None else mask.reshape(-1, 1).to(mu.dtype)
    var = logvar.exp()
    kl_Z = (0.5 * (var + mu.square() - 1 - logvar) * weight).sum(0)
    return LatentSums(kl_Z, (mu.abs() * weight).sum(), (var * weight).sum())
