"""Several bottleneck layers: one objective of a loss's size, and every promise of a single one.

The loss and its gradients are held against the formulas in tests/test_objective.py.
"""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import gradients, random_samples, randomise_lora, save_tiny_model, tiny_config, tiny_trainer
from typer.testing import CliRunner

from ibft import IBObjective, InformationBottleneck
from ibft.cli import app
from ibft.noise import dropout_stream, z_stream
from ibft.objective import latent_sums

LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def fresh_trainer(folder, *overrides):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return tiny_trainer(folder, random_samples(LENGTHS), "lora.dropout=0.3", *overrides)


def first_gradient(folder, *overrides):
    trainer = fresh_trainer(folder, "ib.layer=1,2", *overrides)
    randomise_lora(trainer.model)
    trainer.model.train()
    parts = trainer.backward(next(trainer.batches(trainer.data, epoch=1)))
    return gradients(trainer), parts


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_a_list_of_one_is_its_number_bit_for_bit(folder):
    runs = []
    for layer in ("2", "[2]", '["2"]'):
        rows, trainer = [], fresh_trainer(folder, f"ib.layer={layer}")
        trainer.on_log = rows.append
        trainer.train()
        named = [*trainer.model.named_parameters(), *trainer.objective.bottleneck.named_parameters()]
        losses = [{name: row[name] for name in ("loss", "ce", "kl", "ce_z", "active_dims")} for row in rows]
        runs.append((losses, {name: weight.detach() for name, weight in named if weight.requires_grad}))
    (losses, weights), *others = runs
    assert len(losses) == 3
    assert losses[2]["loss"] != losses[0]["loss"]
    for other_losses, other_weights in others:
        assert other_losses == losses
        assert other_weights.keys() == weights.keys()
        assert all(torch.equal(other_weights[name], value) for name, value in weights.items())


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_is_exact(folder, packing):
    """1 x 4 and 2 x 2: the same gradient, with unequal lengths, noise and dropout on."""
    common = [f"data.packing={packing}", "data.max_length=32"]
    runs = [
        first_gradient(
            folder, *common, f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={steps}"
        )
        for rows, steps in ((4, 1), (2, 2), (1, 4))
    ]
    (expected, whole), *others = runs
    for found, parts in others:
        assert_same(found, expected)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=0)


def test_recomputation_and_the_order_of_the_list_change_nothing(folder):
    expected, whole = first_gradient(folder)
    for other in ("train.gradient_checkpointing=true", "train.gradient_checkpointing=mlp", "ib.layer=[2,1]"):
        found, parts = first_gradient(folder, other)
        assert_same(found, expected)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)


def test_no_two_streams_are_the_same():
    dropouts = {dropout_stream(layer, name) for layer in range(1000) for name in ("q_proj", "o_proj", "down_proj")}
    bottlenecks = [z_stream(index) for index in range(1000)]
    assert bottlenecks[0] == 0
    assert len(set(bottlenecks)) == 1000
    assert dropouts.isdisjoint(bottlenecks)
    assert max(bottlenecks) < 2**31  # a key of 64 bits, signed


def test_each_layer_has_its_own_noise(folder):
    """With equal weights in both and a variance of 1, z differs from mu by eps alone."""
    trainer = fresh_trainer(folder, "ib.layer=1,2")
    drawn = []
    for bottleneck in trainer.objective.bottlenecks:
        torch.nn.init.zeros_(bottleneck.encoder.weight)
        torch.nn.init.zeros_(bottleneck.encoder.bias)
        bottleneck.register_forward_hook(lambda _module, _args, latent: drawn.append(latent.z.detach()))
    trainer.backward(next(trainer.batches(trainer.data, epoch=0))[:1])
    one, two = (z.flatten() for z in drawn)
    assert float(one.std()) == pytest.approx(1, abs=0.1)
    assert abs(float((one * two).mean())) < 5 / math.sqrt(one.numel())


def of_two(*, tapped=None, **options):
    torch.manual_seed(0)
    B, T, D, Z, V = 2, 5, 8, 3, 11
    bottlenecks = torch.nn.ModuleDict({"4": InformationBottleneck(D, Z), "6": InformationBottleneck(D, Z)})
    head, last = torch.nn.Linear(D, V), torch.randn(B, T, D)
    hidden, labels = [torch.randn(B, T, D) for _ in range(2)], torch.randint(0, V, (B, T))
    objective = IBObjective(bottlenecks, alpha=0.5, beta=0.25)
    parts = objective(last, hidden if tapped is None else tapped, head, labels=labels, **options)
    return parts, objective.bottlenecks, hidden


def test_logged_values_are_means_over_the_layers():
    seed = [7, 8]
    parts, bottlenecks, hidden = of_two(seed=seed, collect=True)
    latents = [each(h, seed=s, reduction="batchmean") for each, h, s in zip(bottlenecks, hidden, seed, strict=True)]
    torch.testing.assert_close(parts.kl, (latents[0].kl + latents[1].kl).detach() / 2)
    torch.testing.assert_close(parts.loss, parts.ce + 0.5 * (parts.kl + 0.25 * parts.ce_z), check_stride=False)
    tokens = latents[0].z[..., 0].numel()
    apart = [latent_sums(latent, None).summary(tokens) for latent in latents]
    together = parts.latent_sums.summary(tokens)
    assert together["kl_dim_max"] == pytest.approx(max(each["kl_dim_max"] for each in apart))
    for name in ("mu_abs_mean", "var_mean", "active_dims"):
        assert together[name] == pytest.approx((apart[0][name] + apart[1][name]) / 2, rel=1e-5), name


def test_the_bundled_base_learns_and_leaves_both_layers_weights(tmp_path):
    run = tmp_path / "run"
    settings = [
        "ib.layer=4,6",
        "train.max_steps=20",
        "train.logging_steps=1",
        "train.gradient_accumulation_steps=1",
        "data.max_length=128",
    ]
    arguments = ["train", *settings, "eval.max_tasks=1", "eval.max_new_tokens=4", "runtime.device=cpu", "-o", str(run)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "CE_z) in the mean over layers 4, 6 of 8, Z 64" in result.output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < sum(losses[:3]) / 2
    assert json.loads((run / "manifest.json").read_text())["ib_layer"] == [4, 6]
    latent = [json.loads(line) for line in (run / "latent.jsonl").read_text().splitlines()]
    assert [(row["step"], row["layer"]) for row in latent] == [(n, layer) for n in range(1, 21) for layer in (4, 6)]
    assert {len(row["kl"]) for row in latent} == {64}
    of_step = {n: [sum(row["kl"]) for row in latent if row["step"] == n] for n in range(1, 21)}
    assert all(sum(of_step[row["step"]]) / 2 == pytest.approx(row["kl"], rel=1e-3) for row in rows if "loss" in row)
    assert all(one != other for one, other in of_step.values())
    assert yaml.safe_load((run / "config.yaml").read_text())["ib"]["layer"] == [4, 6]

    names = {"encoder.weight", "encoder.bias", "up.weight", "up.bias"}
    saved = load_file(run / "adapter" / "ib_bottleneck.safetensors")
    assert saved.keys() == {f"layers.{layer}.{name}" for layer in (4, 6) for name in names}
    twin = InformationBottleneck(192, 64)
    for layer in (4, 6):
        prefix = f"layers.{layer}."
        twin.load_state_dict({name.removeprefix(prefix): saved[name] for name in saved if name.startswith(prefix)})
    assert not torch.equal(saved["layers.4.up.weight"], saved["layers.6.up.weight"])


def test_the_estimate_and_a_dry_run_take_them():
    one, two = (
        CliRunner().invoke(app, ["estimate", f"ib.layer={layer}", "runtime.device=cpu"], catch_exceptions=False)
        for layer in ("4", "4,6")
    )
    assert one.exit_code == two.exit_code == 0
    assert "2 layers, each Z 64" in two.output

    def line(output, name):
        return next(float(row.split("│")[2]) for row in output.splitlines() if row.startswith(f"│ {name} "))

    for name in ("bottleneck", "folded head"):
        assert line(two.output, name) == pytest.approx(2 * line(one.output, name), abs=0.02)
    result = CliRunner().invoke(app, ["train", "--dry-run", "ib.layer=[4,6]", "runtime.device=cpu"])
    assert result.exit_code == 0, result.output
    assert "layers 4, 6 of 8" in result.output


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_a_member_beyond_the_depth_is_named(command):
    arguments = [command, "ib.layer=4,8", "runtime.device=cpu"]
    result = CliRunner().invoke(app, arguments + ["--dry-run"] * (command == "train"))
    assert result.exit_code == 2
    assert "ib.layer: got 8, expected 1 .. 7 (the model has 8 layers)" in result.output


def test_lists_that_do_not_match_are_refused():
    one = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="tapped: got 1, expected 2, one a bottleneck"):
        of_two(tapped=one)
    with pytest.raises(ValueError, match="seed: got 1, expected 2, one a bottleneck"):
        of_two(seed=7)
    with pytest.raises(ValueError, match="there is no bottleneck"):
        IBObjective(torch.nn.ModuleDict(), alpha=0.1)


def test_without_alpha_there_is_none(folder):
    trainer = fresh_trainer(folder, "ib.layer=1,2", "ib.alpha=0")
    assert trainer.taps == []
    assert trainer.objective.bottleneck is None
    assert tiny_config(folder, "ib.layer=1,2").ib.layer == (1, 2)
