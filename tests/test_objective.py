"""The trainer's loss and gradients against an independent writing of the formulas, without PEFT."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gradients, random_samples, randomise_lora, save_tiny_model, tiny_trainer

from ibft import IBObjective, InformationBottleneck
from ibft.objective import label_positions, latent_sums
from ibft.tap import decoder_of
from ibft_kernels import Latent, noise_key, philox_normal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def float64_norms(model):
    """transformers' RMSNorm computes in fp32 whatever its input: these instances get a float64 forward."""

    def forward(norm, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(forward, module)


def oracle(trainer, micro_batches, *, alpha, beta, layer, scaling):
    """L = CE + alpha (KL + beta CE_z) as `authors-code` has it, over a whole global batch, and its gradients.

    layer: a number, or a tuple: then KL and CE_z are means over those layers.
    In float64 whatever the trainer's dtype. LoRA is written as W + s B A on a bare transformers model, h as
    hidden_states[layer], full logits at every position.
    """
    peft_model = trainer.model
    bare = peft_model.get_base_model()
    lora, weights = {}, {}
    for name, module in bare.named_modules():
        if hasattr(module, "lora_A"):
            A = module.lora_A["default"].weight.detach().double().requires_grad_()
            B = module.lora_B["default"].weight.detach().double().requires_grad_()
            lora[name] = (A, B)
            weights[name] = module.base_layer.weight.double() + scaling * B @ A
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(bare.config).double()
    float64_norms(plain)
    frozen = {name: value.double() for name, value in bare.named_parameters() if "lora_" not in name}
    parameters = {name.replace(".base_layer", ""): value for name, value in frozen.items()}
    parameters |= {f"{name}.weight": weight for name, weight in weights.items()}

    own = {
        name: value.detach().double().requires_grad_()
        for name, value in trainer.objective.bottleneck.named_parameters()
    }
    tapped = {f"{number}.": number for number in layer} if isinstance(layer, tuple) else {"": layer}
    head = parameters["lm_head.weight"]

    ce = ce_z = kl = 0.0
    labels_in_all = positions_in_all = 0
    for batch in micro_batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_hidden_states": True}
        out = torch.func.functional_call(plain, parameters, kwargs=inputs)
        B, T = batch.input_ids.shape
        labels = torch.full((B * T,), -100)
        labels[batch.label_rows] = batch.targets
        for index, (prefix, number) in enumerate(tapped.items()):
            h = out.hidden_states[number]
            w_mu, w_lv = own[f"{prefix}encoder.weight"].chunk(2)
            b_mu, b_lv = own[f"{prefix}encoder.bias"].chunk(2)
            mu = h @ w_mu.T + b_mu
            logvar = torch.clamp(h @ w_lv.T + b_lv, -4, 4)
            key = noise_key(trainer.config.runtime.seed, index * 2**20)
            z = mu + torch.exp(logvar / 2) * philox_normal(key, batch.noise_ids, mu.shape[-1], dtype=mu.dtype)
            kl = kl + 0.5 * (torch.exp(logvar) + mu**2 - 1 - logvar).sum() / len(tapped)
            logits_z = (z @ own[f"{prefix}up.weight"].T + own[f"{prefix}up.bias"]) @ head.T
            ce_z = ce_z + F.cross_entropy(logits_z.reshape(B * T, -1), labels, reduction="sum") / len(tapped)
        ce = ce + F.cross_entropy(out.logits.reshape(B * T, -1), labels, reduction="sum")
        labels_in_all += int((labels != -100).sum())
        positions_in_all += B * T
    ce, ce_z, kl = ce / labels_in_all, ce_z / labels_in_all, kl / (positions_in_all * mu.shape[-1])
    loss = ce + alpha * (kl + beta * ce_z)
    loss.backward()
    grads = {f"bottleneck.{name}": value.grad for name, value in own.items()}
    for name, (A, B) in lora.items():
        grads[f"base_model.model.{name}.lora_A.default.weight"] = A.grad
        grads[f"base_model.model.{name}.lora_B.default.weight"] = B.grad
    return {"loss": loss, "ce": ce, "kl": kl, "ce_z": ce_z}, grads


AUTHORS_CODE = ["data.packing=false", "data.pad_to_max_length=true", "ib.kl_reduction=mean", "ib.kl_tokens=all"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "fp32"]
)
@settings(max_examples=max(10, settings().max_examples // 5))  # an example is a model
@given(
    lengths=st.lists(st.integers(2, 24), min_size=1, max_size=5),
    micro=st.integers(1, 3),
    latent=st.sampled_from([1, 7, 16]),
    rank=st.sampled_from([1, 4]),
    layer=st.sampled_from([1, 2, (1, 2)]),
    alpha=st.floats(0.01, 2.0),
    beta=st.floats(0.0, 2.0),
    spread=st.sampled_from([1.0, 30.0]),  # 30: many logvar beyond both clamps
)
def test_authors_code_objective_equals_the_formulas(
    folder, dtype, tolerance, lengths, micro, latent, rank, layer, alpha, beta, spread
):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    trainer = tiny_trainer(
        folder, random_samples(lengths, seed=sum(lengths)), *AUTHORS_CODE, "model.quantization=none",
        "lora.dropout=0", "runtime.seed=7",
        "data.max_length=24", f"ib.latent_dim={latent}", f"lora.r={rank}", f"ib.alpha={alpha}",
        f"ib.layer={layer}".replace("(", "[").replace(")", "]"), f"ib.beta={beta}",
        f"train.per_device_train_batch_size={micro}", "train.gradient_accumulation_steps=2", f"lora.alpha={2 * rank}",
    )  # fmt: skip
    randomise_lora(trainer.model)
    for bottleneck in trainer.objective.bottlenecks:
        bottleneck.encoder.weight.data.mul_(spread)
    if dtype == torch.float64:
        trainer.model.double()
        trainer.objective.double()
        float64_norms(trainer.model)
    micro_batches = next(trainer.batches(trainer.data, epoch=0))
    parts = trainer.backward(micro_batches)
    expected, expected_grads = oracle(trainer, micro_batches, alpha=alpha, beta=beta, layer=layer, scaling=2.0)

    # exp(logvar) - 1 - logvar cancels where the KL is small: its terms are near 1, and so is their rounding
    one_digit = {torch.float64: 1e-15, torch.float32: 1.2e-7}[dtype]
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(parts, name), value.detach(), rtol=tolerance, atol=one_digit, check_dtype=False
        )
    found = gradients(trainer)
    assert found.keys() == expected_grads.keys()
    found, expected_grads = split_encoder(found), split_encoder(expected_grads)
    # the gradients of q and k are small differences of large terms (zero, where the only label sees a single key):
    # rounding of the largest gradient's last digit is allowed beside the relative error
    rounding = {torch.float64: 1e-12, torch.float32: 1.2e-7}[dtype] * max(v.norm() for v in expected_grads.values())
    for name, value in expected_grads.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + rounding, name


def split_encoder(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mu and logvar apart: a small gradient must not hide behind a large one."""
    result = {}
    for name, value in grads.items():
        if ".encoder." in name:
            result[f"{name}.mu"], result[f"{name}.logvar"] = value.chunk(2)
        else:
            result[name] = value
    return result


def plain_parts(reduction: str, *, mask=None, encoder="linear"):
    torch.manual_seed(0)
    B, T, D, Z, V = 2, 5, 8, 3, 11
    bottleneck = InformationBottleneck(D, Z, encoder)
    head = torch.nn.Linear(D, V, bias=False)
    h, last = torch.randn(B, T, D), torch.randn(B, T, D)
    labels = torch.randint(0, V, (B, T))
    labels[0, :3] = -100
    objective = IBObjective(bottleneck, alpha=0.5, beta=0.25, kl_reduction=reduction)
    parts = objective(last, h, head, labels=labels, kl_mask=mask, seed=7, collect=True)
    return parts, bottleneck, h, labels


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("encoder", ["linear", "mlp"])
def test_both_reductions_and_encoders(reduction, encoder):
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    parts, bottleneck, h, _ = plain_parts(reduction, mask=mask, encoder=encoder)
    mu, logvar = bottleneck.encoder(h).chunk(2, -1)
    logvar = logvar.clamp(-4, 4)
    kl = 0.5 * (logvar.exp() + mu.square() - 1 - logvar)[mask]
    expected = kl.mean() if reduction == "mean" else kl.sum(-1).mean()
    torch.testing.assert_close(parts.kl, expected.detach())
    torch.testing.assert_close(parts.loss, parts.ce + 0.5 * (parts.kl + 0.25 * parts.ce_z), check_stride=False)


@pytest.mark.parametrize("shared", [False, True])
def test_a_head_with_a_bias(shared):
    """In both cross-entropies, folded for one call, for a step, or (few rows) not at all."""
    torch.manual_seed(0)
    for rows in (3, 60):
        B, D, Z, V = 2, 16, 4, 23
        bottleneck, head = InformationBottleneck(D, Z), torch.nn.Linear(D, V)
        h, last, eps = torch.randn(B, rows, D), torch.randn(B, rows, D), torch.randn(B, rows, Z)
        labels = torch.randint(0, V, (B, rows))
        objective = IBObjective(bottleneck, alpha=0.5, beta=0.25)
        fold = objective.fold(head, B * rows) if shared else None
        assert (fold is not None) == (shared and rows == 60)
        parts = objective(last, h, head, labels=labels, eps=eps, fold=fold)
        mu, logvar = bottleneck.encoder(h).chunk(2, -1)
        z = mu + (logvar.clamp(-4, 4) / 2).exp() * eps
        for hidden, found in ((last, parts.ce), (bottleneck.up(z), parts.ce_z)):
            logits = head(hidden)[:, :-1].flatten(0, 1)
            torch.testing.assert_close(found, F.cross_entropy(logits, labels[:, 1:].flatten()).detach())


def test_latent_statistics_are_of_the_clamped_variance():
    mu, logvar = torch.zeros(1, 3), torch.tensor([[9.0, -9.0, 0.0]])
    sums = latent_sums(Latent(mu, torch.tensor(0.0), mu, logvar), None)
    assert float(sums.var) == pytest.approx(math.exp(4) + math.exp(-4) + 1)


def test_latent_statistics():
    parts, bottleneck, h, _ = plain_parts("mean")
    mu, logvar = bottleneck.encoder(h).detach().chunk(2, -1)
    found = parts.latent_sums.summary(tokens=10)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3] = True
    one_token = plain_parts("mean", mask=mask)[0].latent_sums.summary(tokens=1)
    assert one_token["mu_abs_mean"] == pytest.approx(float(mu[1, 3].abs().mean()), rel=1e-5)
    assert one_token["var_mean"] == pytest.approx(float(logvar[1, 3].exp().mean()), rel=1e-5)
    assert found["mu_abs_mean"] == pytest.approx(float(mu.detach().abs().mean()), rel=1e-5)
    assert found["var_mean"] == pytest.approx(float(logvar.exp().mean()), rel=1e-5)
    per_dim = (0.5 * (logvar.exp() + mu.square() - 1 - logvar)).mean((0, 1))
    assert found["active_dims"] == pytest.approx(float((per_dim > 0.01).float().mean()))
    expected = [float(per_dim.min()), float(per_dim.quantile(0.5)), float(per_dim.max())]
    assert [found[f"kl_dim_{which}"] for which in ("min", "median", "max")] == pytest.approx(expected, rel=1e-5)
    assert parts.latent_sums.on_host().kl_by_dimension(10, [1, 2]) == [
        pytest.approx(one.tolist(), rel=1e-5) for one in per_dim.split([1, len(per_dim) - 1])
    ]


def test_hugging_face_labels_are_shifted():
    rows, targets = label_positions(torch.tensor([[-100, 5, 6], [9, -100, 7]]))
    assert rows.tolist() == [0, 1, 4]
    assert targets.tolist() == [5, 6, 7]  # the first token of a row is never a target


def test_alpha_zero_is_plain_fine_tuning_at_no_cost(folder):
    trainer = tiny_trainer(folder, random_samples([9, 12]), "ib.alpha=0", "lora.dropout=0")
    assert trainer.objective.bottleneck is None
    assert trainer.taps == []
    assert set(trainer.groups) == {"lora"}
    (micro_batches,) = trainer.batches(trainer.data, epoch=0)
    parts = trainer.backward(micro_batches)
    assert parts.loss == parts.ce
    batch = micro_batches[0]
    logits = trainer.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1)[batch.label_rows], batch.targets)
    torch.testing.assert_close(parts.ce, expected.detach(), rtol=1e-5, atol=0)


def test_only_one_hidden_state_is_kept_alive(folder):
    """What autograd keeps with the tap, against what it keeps without: only the bottleneck's own is added."""

    def saved_bytes(*overrides):
        trainer = tiny_trainer(folder, random_samples([40, 40]), "train.gradient_checkpointing=true", *overrides)
        from accelerate.state import AcceleratorState

        (micro_batches,) = trainer.batches(trainer.data, epoch=0)
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        trainer.model.train()
        batch, *_ = micro_batches
        saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with trainer.context.batch(batch.noise_ids, batch.segments, trainer.request(batch, 10)), saving:
            trainer.forward(batch, 10, 10)
        AcceleratorState._reset_state(True)
        return sum(storages.values()), decoder_of(trainer.model)

    without, _ = saved_bytes("ib.alpha=0")
    with_tap, decoder = saved_bytes("ib.layer=1")
    tokens, hidden, latent = 80, 64, 16
    encoder = 4 * (2 * latent * hidden + hidden * latent)
    activations = 4 * tokens * (2 * latent + 3 * latent + hidden + 2 * 97)
    assert with_tap - without <= encoder + activations + 4096
    assert math.isfinite(without)
    assert not decoder.layers[0]._forward_hooks  # the tap has closed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1}, "alpha"),
        ({"beta": -0.5}, "beta"),
        ({"kl_reduction": "sum"}, "kl_reduction"),
        ({"bottleneck": None}, "no bottleneck"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"bottleneck": InformationBottleneck(8, 2), "alpha": 0.1, "beta": 0.1} | change
    with pytest.raises(ValueError, match=message):
        IBObjective(arguments.pop("bottleneck"), **arguments)
