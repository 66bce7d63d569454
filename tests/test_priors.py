"""Variants of the bottleneck: each KL against its formula, each control against what it says."""

import math

import pytest
import torch
from tiny_models import gradients, random_samples, save_tiny_model, tiny_trainer

from ibft import InformationBottleneck
from ibft.bottleneck import reduced
from ibft.priors import LearnedDiagonalPrior, MixturePrior

N, Z, K = 7, 5, 3
VARIANTS = [
    ["ib.encoder=random_projection"],
    ["ib.deterministic=true"],
    ["ib.prior=learned_diagonal"],
    ["ib.prior=mixture", "ib.prior_components=3"],
    ["ib.beta=0"],
    ["ib.alpha_warmup_ratio=0.5"],
    ["ib.prior=mixture", "ib.deterministic=true", "ib.encoder=mlp"],
    ["ib.layer=1,2"],
    ["ib.layer=1,2", "ib.prior=mixture", "ib.encoder=mlp"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(prior):
    """Trained a little, in float64."""
    prior = prior.double()
    for seed, parameter in enumerate(prior.parameters()):
        parameter.data.add_(0.3 * normals(*parameter.shape, seed=seed + 10))
    return prior


def test_the_diagonal_kl_is_that_of_torch_distributions():
    prior = perturbed(LearnedDiagonalPrior(Z))
    mu, logvar = normals(N, Z), normals(N, Z, seed=1)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    p = torch.distributions.Normal(prior.mean, (prior.logvar / 2).exp())
    expected = torch.distributions.kl_divergence(q, p).sum(-1)
    torch.testing.assert_close(prior.kl(mu, logvar, mu), expected, rtol=1e-12, atol=1e-12)


def test_the_diagonal_prior_begins_at_the_standard_one():
    mu, logvar = normals(N, Z), normals(N, Z, seed=1)
    standard = 0.5 * (logvar.exp() + mu.square() - 1 - logvar).sum(-1)
    torch.testing.assert_close(LearnedDiagonalPrior(Z).double().kl(mu, logvar, mu), standard, rtol=1e-12, atol=1e-12)


def test_the_mixture_kl_is_that_of_torch_distributions():
    prior = perturbed(MixturePrior(Z, K))
    mu, logvar, z = normals(N, Z), normals(N, Z, seed=1), normals(N, Z, seed=2)
    each = torch.distributions.Independent(torch.distributions.Normal(prior.means, (prior.logvars / 2).exp()), 1)
    p = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=prior.logits), each)
    q = torch.distributions.Independent(torch.distributions.Normal(mu, (logvar / 2).exp()), 1)
    torch.testing.assert_close(prior.kl(mu, logvar, z), q.log_prob(z) - p.log_prob(z), rtol=1e-10, atol=1e-10)


def test_a_mixture_of_one_is_the_diagonal_prior_on_average():
    mixture, diagonal = perturbed(MixturePrior(Z, 1)), LearnedDiagonalPrior(Z).double()
    diagonal.mean.data.copy_(mixture.means[0])
    diagonal.logvar.data.copy_(mixture.logvars[0])
    mu, logvar = normals(1, Z), normals(1, Z, seed=1)
    draws = 40_000
    z = mu + (logvar / 2).exp() * normals(draws, Z, seed=3)
    estimates = mixture.kl(mu.expand(draws, Z), logvar.expand(draws, Z), z)
    error = estimates.std() / math.sqrt(draws)
    assert abs(estimates.mean() - diagonal.kl(mu, logvar, mu)) < 4 * error < 0.1


@pytest.mark.parametrize(
    ("reduction", "normalizer"),
    [("mean", None), ("mean", 40), ("batchmean", None), ("batchmean", 40), ("sum", None), ("none", None)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_are_those_of_the_op(reduction, masked, normalizer):
    """With the standard normal written as a prior, the module gives what it gives without one."""
    torch.manual_seed(0)
    plain = InformationBottleneck(12, Z).double()
    other = InformationBottleneck(12, Z, prior=LearnedDiagonalPrior(Z)).double()
    other.load_state_dict(plain.state_dict(), strict=False)
    hidden, eps = normals(2, N, 12), normals(2, N, Z, seed=4)
    mask = torch.arange(2 * N).view(2, N) % 3 != 0 if masked else None
    found, expected = (
        m(hidden, eps=eps, mask=mask, reduction=reduction, normalizer=normalizer) for m in (other, plain)
    )
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.z, expected.z, rtol=1e-12, atol=1e-12)


def test_a_mask_of_nothing():
    assert reduced(torch.ones(3), torch.zeros(3, dtype=torch.bool), "batchmean", None, Z) == 0


def test_the_projection_is_orthonormal_and_stays(folder):
    bottleneck = InformationBottleneck(64, 16, "random_projection")
    rows = bottleneck.encoder.weight[:16]
    torch.testing.assert_close(rows @ rows.T, torch.eye(16))
    hidden = normals(3, 64).float()
    latent = bottleneck(hidden, seed=1, reduction="none")
    torch.testing.assert_close(latent.kl, 0.5 * (hidden @ rows.T).square().sum(-1))  # variance 1
    trainer = tiny_trainer(folder, random_samples([20] * 8), "ib.encoder=random_projection")
    before = trainer.objective.bottleneck.encoder.weight.clone()
    trainer.train()
    assert torch.equal(trainer.objective.bottleneck.encoder.weight, before)
    assert not any("encoder" in name for name in gradients(trainer))
    with pytest.raises(ValueError, match="at most hidden_size 8"):
        InformationBottleneck(8, 9, "random_projection")


def test_deterministic_is_mu():
    bottleneck = InformationBottleneck(64, 16, deterministic=True)
    latent = bottleneck(normals(3, 64).float(), seed=1)
    assert torch.equal(latent.z, latent.mu)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_fused_or_not_they_train_alike(folder, variant):
    """20 steps: finite, falling, and the same with transformers' own modules."""
    losses = []
    for fused in ("true", "false"):
        rows = []
        trainer = tiny_trainer(
            folder, random_samples([20, 30, 25, 28]), *variant, "train.max_steps=20", "lora.dropout=0.1",
            f"train.fused_kernels={fused}", "train.gradient_accumulation_steps=2",
        )  # fmt: skip
        trainer.on_log = rows.append
        trainer.train()
        losses.append([row["loss"] for row in rows if "loss" in row])
        parts = [row["ce"] + trainer.config.ib.alpha * row["kl"] for row in rows if "loss" in row]
        assert len(losses[-1]) == 20
        assert all(map(math.isfinite, losses[-1]))
        assert sum(parts[-3:]) < sum(parts[:3])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)


def test_alpha_rises_to_its_value(folder):
    trainer = tiny_trainer(
        folder, random_samples([20] * 8), "ib.alpha=0.2", "ib.alpha_warmup_ratio=0.5", "train.max_steps=8",
        "ib.beta=0.5",
    )  # fmt: skip
    rows = []
    trainer.on_log = rows.append
    trainer.train()
    alphas = [(row["loss"] - row["ce"]) / (row["kl"] + 0.5 * row["ce_z"]) for row in rows if "loss" in row]
    assert alphas == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2], rel=1e-3)
