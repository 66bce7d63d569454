"""The memory planner: its predictions against measured steps, its choices, and what it says of published models."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_samples, save_tiny_model, tiny_model_config, tiny_trainer

from benchmarks.harness.peak_memory import live_bytes, tensor_storages
from ibft import attention_cpu, footprint
from ibft.errors import ConfigError
from ibft.load_config import load_config
from ibft.plan import (
    CUDA_CONTEXT,
    GIB,
    Load,
    ModelShape,
    Plan,
    Setup,
    changed,
    choose_plan,
    estimate,
    flops,
    less_memory,
)
from ibft.recompute import set_recompute
from ibft.tiny import BASE_DIR
from ibft_kernels._workspace import release_logits_buffer

SHAPES = {
    "deepseek-coder-7b": ModelShape(4096, 11008, 30, 102_400, 32, 32, 128),
    "codellama-34b": ModelShape(8192, 22016, 48, 32_016, 64, 8, 128),
    "llama-3-70b": ModelShape(8192, 28672, 80, 128_256, 64, 8, 128),
    "qwen2.5-1.5b": ModelShape(1536, 8960, 28, 151_936, 12, 2, 128, tied=True, qkv_bias=True),
}


def setup_of(shape, *overrides, device="cuda"):
    config = load_config(None, ["model.name_or_path=x", "data.path=y", *overrides])[0]
    return Setup.of(SHAPES.get(shape, shape), config, device)


# --- against what is measured ---------------------------------------------------------------------


@pytest.fixture
def only_new():
    """The collector forgets what was there before: tensors of other tests do not count, and collecting is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Measured:
    """A trainer, and the live bytes of its training step and of its forward, in one mode after the other."""

    def __init__(self, folder, *overrides, packing, alpha, length=256, padding=0, accumulation=1):
        from accelerate.state import AcceleratorState
        from transformers import AutoConfig

        AcceleratorState._reset_state(True)
        release_logits_buffer()
        lengths = [length * 3 // 10, length * 4 // 10, length // 3] * 8 if packing else [length - padding, length] * 2
        self.trainer = tiny_trainer(
            folder, random_samples(lengths), f"data.max_length={length}", f"data.packing={packing}",
            f"ib.alpha={alpha}", "ib.latent_dim=64", "lora.r=16", "lora.dropout=0.05",
            "train.per_device_train_batch_size=2", f"train.gradient_accumulation_steps={accumulation}", *overrides,
            eval_data=random_samples(lengths * 2),
        )  # fmt: skip
        self.step = next(iter(self.trainer.batches(self.trainer.data, epoch=0)))
        batch = max(self.step, key=lambda batch: batch.num_label_tokens)
        shape = ModelShape.of(AutoConfig.from_pretrained(folder))
        squares = sum(n * n for n in batch.segments.lengths) if packing else 2 * length**2
        load = Load(2, batch.input_ids.shape[1], batch.num_label_tokens, accumulation, squares, masked=padding > 0)
        itemsize = 2 if self.trainer.config.train.mixed_precision == "bf16" else 4
        self.setup = Setup.of(shape, self.trainer.config, "cpu", itemsize, load)

    def in_mode(self, mode):
        """(total of a step, kept between forward and backward), in bytes."""
        trainer, layers = self.trainer, self.setup.shape.layers
        set_recompute(trainer.model, trainer.fused, [mode] * layers)
        trainer.train_step(self.step)  # makes the optimizer's state and the shadows
        held = sum(storage.nbytes() for storage in tensor_storages().values())
        peak, _ = live_bytes(lambda: trainer.train_step(self.step))
        outputs = []
        batch = self.step[0]
        request = trainer.request(batch, batch.num_kl_tokens)
        context = trainer.context.batch(batch.noise_ids, batch.segments, request)
        with trainer.fused.held(), context, trainer.accelerator.autocast():
            _, left = live_bytes(lambda: outputs.append(trainer.last_hidden(batch)))
        return held + peak, left - outputs[0].nbytes

    def check(self, modes=("none", "mlp", "full"), tolerance=0.1):
        for mode in modes:
            total, kept = self.in_mode(mode)
            predicted = estimate(self.setup, Plan((mode,) * self.setup.shape.layers))
            print(f"{mode}: total {predicted.total / total:.3f}, kept {predicted.kept / kept:.3f} of what was measured")
            assert predicted.total == pytest.approx(total, rel=tolerance), mode
            assert predicted.kept == pytest.approx(kept, rel=tolerance), mode
            gc.collect()

    def evaluation(self, rows):
        """(measured, predicted) bytes of an evaluation with so many rows a batch."""
        trainer = self.trainer
        trainer.train_step(self.step)
        trainer.evaluate()
        held = sum(storage.nbytes() for storage in tensor_storages().values())
        peak, _ = live_bytes(trainer.evaluate)
        batches = trainer.batches(trainer.eval_data, epoch=0, evaluation=True)
        load, longest = self.setup.load, max(batch.input_ids.shape[1] for (batch,) in batches)
        load = replace(load, length=longest, labels=round(load.labels * longest / load.length), eval_rows=rows)
        setup = replace(self.setup, load=load)
        predicted = estimate(setup, Plan(("full",) * setup.shape.layers))
        assert predicted.moment == "evaluation"
        print(f"evaluation: total {predicted.total / (held + peak):.3f} of what was measured")
        return held + peak, predicted.total


@pytest.mark.parametrize("alpha", [0.1, 0])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.usefixtures("only_new")
def test_the_bundled_model_takes_what_is_predicted(packing, alpha):
    """Within 10 %, total and kept activations, by the bytes that torch's allocator had handed out."""
    Measured(str(BASE_DIR), "ib.layer=5", packing=packing, alpha=alpha, length=192).check()


@pytest.mark.parametrize(("mode", "latent", "accumulation"), [("none", 96, 1), ("full", 96, 1), ("full", 64, 4)])
@pytest.mark.usefixtures("only_new")
def test_several_bottlenecks_take_what_is_predicted(mode, latent, accumulation):
    """Six of them, folded with Z 64, so that they are a tenth of the step and more."""
    measured = Measured(
        str(BASE_DIR), "ib.layer=2,3,4,5,6,7", f"ib.latent_dim={latent}", packing=True, alpha=0.1, length=192,
        accumulation=accumulation,
    )  # fmt: skip
    plan, setup = Plan((mode,) * measured.setup.shape.layers), measured.setup
    assert setup.folds == (latent == 64)
    total, _ = measured.in_mode(mode)
    predicted, of_one = (estimate(each, plan).total for each in (setup, replace(setup, tapped=(5,))))
    print(f"{mode}: total {predicted / total:.3f} of what was measured; of one {of_one / total:.3f}")
    assert predicted == pytest.approx(total, rel=0.1)
    assert of_one < 0.91 * total


@pytest.mark.usefixtures("only_new")
def test_another_family_takes_what_is_predicted(tmp_path):
    """Biases on q, k and v; two query heads a key head."""
    Measured(save_tiny_model(tmp_path, "qwen2", hidden=128, layers=4), packing=True, alpha=0.1).check()


@pytest.mark.usefixtures("only_new")
def test_q_and_k_norms_and_16_bits_take_what_is_predicted(tmp_path):
    folder = save_tiny_model(tmp_path, "qwen3", hidden=128, layers=4)
    Measured(folder, "train.mixed_precision=bf16", packing=True, alpha=0.1).check(("none", "full"))


@pytest.mark.usefixtures("only_new")
def test_a_mask_of_padded_rows_takes_what_is_predicted():
    """Each block saves it, and transformers repeats the heads of keys and values under it."""
    Measured(str(BASE_DIR), "ib.layer=5", packing=False, alpha=0.1, padding=40).check(("mlp",))


@pytest.mark.usefixtures("only_new")
def test_without_quantisation_with_8_bit_moments_and_fewer_adapters():
    Measured(
        str(BASE_DIR), "ib.layer=5", "model.quantization=none", "train.optim=adamw_8bit",
        "lora.target_modules=[q_proj,v_proj,down_proj]", "lora.dropout=0", packing=True, alpha=0.1,
    ).check(("none", "mlp"))  # fmt: skip


@pytest.mark.usefixtures("only_new")
def test_gradients_of_earlier_micro_batches_take_what_is_predicted(tmp_path):
    """From the second micro-batch on every block's lie there: with r 128 a seventh of the step."""
    folder = save_tiny_model(tmp_path, "qwen2", hidden=128, layers=4)
    Measured(folder, "lora.r=128", packing=True, alpha=0.1, accumulation=4).check(("full",))


@pytest.mark.usefixtures("only_new")
def test_attention_dropout_takes_what_is_predicted(tmp_path):
    """Packed rows then attend under transformers' mask, and a CPU keeps the probabilities."""
    folder = save_tiny_model(tmp_path, "qwen2", hidden=128, layers=4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    Measured(folder, packing=True, alpha=0.1).check(("none",))


@pytest.mark.parametrize(("packing", "padding"), [(True, 0), (False, 40)])
@pytest.mark.usefixtures("only_new")
def test_an_evaluation_takes_what_is_predicted(tmp_path, packing, padding):
    """Narrow and with a high rank, where adapters and attention count most."""
    folder = save_tiny_model(tmp_path, "qwen2", hidden=128, layers=2)
    overrides = ["ib.layer=1", "lora.r=64", "train.per_device_eval_batch_size=8"]
    measured, predicted = Measured(folder, *overrides, packing=packing, padding=padding, alpha=0.1).evaluation(8)
    assert predicted == pytest.approx(measured, rel=0.1)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_parameters_are_counted_as_transformers_does(family):
    from transformers import AutoModelForCausalLM

    config = tiny_model_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert ModelShape.of(config).parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("shape", "billions", "card", "most"),
    [("deepseek-coder-7b", 6.91, 8, 0.05), ("codellama-34b", 33.74, 24, 0.05), ("llama-3-70b", 70.55, 48, 0.05)],
)
def test_published_models_fit_the_cards_they_are_meant_for(shape, billions, card, most):
    """One row of 2,048 tokens, 8-bit moments, r 32: on the card, with the margin to spare."""
    setup = setup_of(shape, "train.optim=adamw_8bit")
    assert setup.shape.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    choice = choose_plan(setup, card * GIB - CUDA_CONTEXT)
    print(f"{shape}: {choice.estimate.total / GIB:.2f} GiB; {choice.plan.describe()}; {choice.estimate.lines}")
    assert choice.fits
    assert choice.estimate.total <= (1 - most) * (card * GIB - CUDA_CONTEXT)
    assert not choose_plan(setup, card * GIB // 2).fits


def test_bytes_of_a_7b_by_hand():
    """The lines that a reader can check on paper."""
    setup = setup_of("deepseek-coder-7b", "train.optim=adamw_8bit", "ib.alpha=0")
    lines = estimate(setup, Plan(("full",) * 30)).lines
    linears = 30 * (4 * 4096**2 + 3 * 4096 * 11008)
    packed = linears / 2 + linears / 64 + linears / 64 / 256 * 4
    assert lines["base weights"] == pytest.approx(packed + 2 * 2 * 102_400 * 4096, rel=1e-3)
    adapters = 30 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert lines["adapters"] == adapters * 6
    assert lines["gradients"] <= adapters * 4
    assert lines["optimizer state"] == pytest.approx(adapters * (2 + 8 / 256), rel=1e-3)
    assert lines["bottleneck"] == lines["folded head"] == 0
    # the inputs of 30 blocks and of the final norm, and rotation's tables
    inputs = 31 * 2048 * 4096 * 2 + 2048 * 2 * 128 * 2
    assert lines["kept activations"] == pytest.approx(inputs, rel=1e-3)


def test_what_a_gpu_holds_by_hand():
    """The terms that no step on a CPU has, or that others hide; one row of 2,048 tokens of a 7B in 16 bits."""
    stream = 2048 * 4096 * 2
    setup = setup_of("deepseek-coder-7b", "ib.alpha=0", "train.gradient_accumulation_steps=1", "data.val_size=0")
    assert int(0.6 * GIB) == CUDA_CONTEXT  # as the README says
    assert footprint.buffer_bytes(setup) == 11008 * 4096 * 2
    everything = Plan(("full",) * 30)
    dense = replace(setup, config=setup_of("deepseek-coder-7b", "ib.alpha=0", "model.quantization=none").config)
    working = [estimate(s, everything).lines["working memory"] for s in (setup, dense)]
    assert working[0] - working[1] == 11008 * 4096 * 2

    # attention's backward, where the MLP is narrow: dO, dQ, dK, dV; dQ's sum in fp32; the stream's gradient; less the
    # MLP's norm, x A^T, gate and up, which are free by then
    narrow = replace(setup, shape=replace(setup.shape, intermediate=64))
    freed = 2 * 4096 + 3 * 32 * 2 + 2 * 64 * 2
    assert footprint.work_bytes(narrow) == 2048 * (4 * 4096 * 2 + 4 * 4096 + 2 * 4096 - freed)

    offloaded = replace(everything, activation_offloading=True)
    assert footprint.kept_bytes(setup, offloaded) == [stream] * 3 + [0] * 27
    assert estimate(setup, everything).host == 0
    assert estimate(setup, offloaded).host == 30 * stream
    table = 102_400 * 4096 * 2
    last = replace(offloaded, offload_embeddings=True)
    assert estimate(setup, last).host == 30 * stream + table
    lines = [estimate(setup, plan).lines["base weights"] for plan in (offloaded, last)]
    assert lines[0] - lines[1] == table

    adapters = 4 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    accumulated = setup_of("deepseek-coder-7b", "ib.alpha=0", "data.val_size=0")  # 4 micro-batches
    assert "layer 30" in estimate(setup, everything).moment
    assert estimate(setup, everything).lines["gradients"] == adapters
    assert estimate(accumulated, everything).lines["gradients"] == 30 * adapters


def test_an_mlp_encoder_and_an_evaluation_by_hand():
    linear, mlp = (setup_of("deepseek-coder-7b", f"ib.encoder={encoder}") for encoder in ("linear", "mlp"))
    for mode in ("none", "full"):  # its hidden layer, 2 Z = 512 wide, before and after GELU
        assert footprint.latent_bytes(mlp, mode) - footprint.latent_bytes(linear, mode) == 2048 * 2 * 512 * 2
    wide = setup_of("deepseek-coder-7b", "train.per_device_eval_batch_size=64", "data.val_size=0.1")
    found = estimate(wide, Plan(("full",) * 30))
    assert found.moment == "evaluation"
    a_token = (6 * 4096 + 3 * 11008 + 3 * 32 + 2 * 128) * 2 + 37  # 37: ids, positions, targets, noise ids, a mask
    assert found.lines["working memory"] == 64 * 2048 * a_token + 11008 * 4096 * 2
    drops = replace(linear, shape=replace(linear.shape, attention_drops=True))
    masks = [footprint.block_bytes(s).attention for s in (drops, linear)]
    assert masks[0] - masks[1] == 2048**2 * 2
    for name in ("SCORES_BUDGET", "BLOCK_TOKENS"):
        assert getattr(footprint, name) == getattr(attention_cpu, name)


def test_a_change_changes_what_a_step_is_given():
    setup = setup_of("deepseek-coder-7b", "train.per_device_train_batch_size=4")
    setup = replace(setup, load=replace(setup.load, labels=6000, squares=8_000_000))
    other = changed(setup, ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=8"])
    assert other.load == replace(setup.load, rows=2, accumulation=8, labels=3000, squares=4_000_000)
    other = changed(setup, ["data.max_length=512", "train.per_device_eval_batch_size=1"])
    assert other.load == replace(setup.load, length=512, labels=1500, squares=2_000_000, eval_rows=1)


@pytest.mark.parametrize("mode", ["none", "mlp", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_longer_rows_and_more_layers_take_more(device, mode):
    def total(length, layers):
        shape = replace(SHAPES["deepseek-coder-7b"], layers=layers)
        setup = setup_of(shape, f"data.max_length={length}", device=device)
        return estimate(setup, Plan((mode,) * layers)).total

    by_length = [total(length, 12) for length in (128, 512, 1024, 2048, 8192)]
    by_layers = [total(1024, layers) for layers in (4, 5, 12, 30)]
    assert by_length == sorted(set(by_length))
    assert by_layers == sorted(set(by_layers))


def test_flops_of_a_7b_are_about_six_a_parameter_and_token():
    """4 N P of the frozen base, and recomputation a third and more of that."""
    setup = setup_of("deepseek-coder-7b", "ib.alpha=0", "train.gradient_accumulation_steps=1")
    parts = flops(setup, Plan(("full",) * 30))
    linears = 30 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parts["base"] == pytest.approx(4 * 2048 * linears, rel=0.01)
    assert parts["head"] == 4 * 2048 * 4096 * 102_400
    assert parts["recomputation"] == pytest.approx(2 * 2048 * linears, rel=0.1)
    assert flops(setup, Plan(("none",) * 30))["recomputation"] == 0
    assert flops(setup, Plan(("mlp",) * 30))["recomputation"] == 30 * 2 * 2048 * 2 * 4096 * 11008


# --- the choice -----------------------------------------------------------------------------------

cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(sorted(SHAPES)),
        "length": st.sampled_from([256, 1024, 2048, 8192]),
        "rows": st.sampled_from([1, 2, 4]),
        "alpha": st.sampled_from([0, 0.1]),
        "optim": st.sampled_from(["adamw_torch_fused", "adamw_8bit"]),
        "device": st.sampled_from(["cpu", "cuda"]),
    }
)


few = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)  # deep models take 50 ms each


def drawn_setup(drawn):
    return setup_of(
        drawn["shape"], f"data.max_length={drawn['length']}", f"train.per_device_train_batch_size={drawn['rows']}",
        f"ib.alpha={drawn['alpha']}", f"train.optim={drawn['optim']}", device=drawn["device"],
    )  # fmt: skip


@few
@given(cases, st.floats(0.5, 200), st.floats(1, 2))
def test_more_memory_never_means_more_recomputation(drawn, gib, factor):
    setup = drawn_setup(drawn)
    tight, wide = (choose_plan(setup, int(budget * GIB)) for budget in (gib, gib * factor))
    assert wide.fits or not tight.fits
    again = [flops(setup, choice.plan)["recomputation"] for choice in (tight, wide)]
    assert again[1] <= again[0]
    if wide.plan.activation_offloading or wide.plan.offload_embeddings:
        assert tight.plan.activation_offloading


@few
@given(cases, st.floats(0.5, 200))
def test_what_is_said_to_fit_fits_and_what_is_advised_too(drawn, gib):
    setup, budget = drawn_setup(drawn), int(gib * GIB)
    choice = choose_plan(setup, budget)
    assert len(choice.plan.modes) == setup.shape.layers
    if choice.fits:
        assert choice.estimate.total <= budget
        assert choice.change == ()
    elif choice.change:
        other = changed(setup, choice.change)
        assert choose_plan(other, budget).fits
        old, new = setup.config.train, other.config.train
        assert (
            new.per_device_train_batch_size * new.gradient_accumulation_steps
            == old.per_device_train_batch_size * old.gradient_accumulation_steps
        )
        # the overrides are what a user can type
        load_config(None, ["model.name_or_path=x", "data.path=y", *choice.change])


def test_the_mix_is_the_cheapest_that_fits():
    """Against every mix there is, on a small depth."""
    setup = setup_of(replace(SHAPES["deepseek-coder-7b"], layers=6), "train.optim=adamw_8bit")
    totals = [estimate(setup, Plan((mode,) * 6)).total for mode in ("full", "none")]
    for share in (0.02, 0.2, 0.4, 0.6, 0.8, 0.99):
        budget = int((totals[0] + share * (totals[1] - totals[0])) / 0.95) + 1
        plans = [
            Plan(("full",) * full + ("mlp",) * mlp + ("none",) * (6 - full - mlp))
            for full in range(7)
            for mlp in range(7 - full)
        ]
        costs = [flops(setup, plan)["recomputation"] for plan in plans if estimate(setup, plan).total <= 0.95 * budget]
        choice = choose_plan(setup, budget)
        assert flops(setup, choice.plan)["recomputation"] == min(costs)


def test_the_order_of_the_last_resorts():
    """All blocks, then their inputs to the host, then the embeddings; on a CPU there is no such place."""
    setup = setup_of("llama-3-70b", "train.optim=adamw_8bit", "train.per_device_eval_batch_size=1")
    everything = Plan(("full",) * 80)
    plans = [
        everything,
        replace(everything, activation_offloading=True),
        replace(everything, activation_offloading=True, offload_embeddings=True),
    ]
    totals = [estimate(setup, plan).total for plan in plans]
    assert totals == sorted(totals, reverse=True)
    for plan, total in zip(plans, totals, strict=True):
        chosen = choose_plan(setup, int(total / 0.95) + 1).plan
        assert replace(chosen, modes=plan.modes) == plan
        assert set(chosen.modes[:-1]) == {"full"}  # the last block's are needed at the peak in any case
    lacking = choose_plan(setup, int(0.9 * totals[-1]))
    assert not lacking.fits
    assert lacking.plan == plans[-1]
    on_cpu = choose_plan(replace(setup, device="cpu"), 1 * GIB)
    assert on_cpu.plan == everything
    tied = choose_plan(setup_of("qwen2.5-1.5b"), GIB // 2)
    assert tied.plan.activation_offloading
    assert not tied.plan.offload_embeddings


def test_after_running_out_the_mildest_change_takes_a_tenth_less():
    """First more is recomputed, at the same result; with all of it recomputed, fewer rows a micro-batch."""
    setup = setup_of("deepseek-coder-7b", "train.gradient_checkpointing=auto", "train.per_device_train_batch_size=4")
    roomy = choose_plan(setup, None)
    (override,) = less_memory(setup, roomy)
    key, _, gib = override.partition("=")
    assert key == "runtime.memory_budget"
    after = choose_plan(setup, int(float(gib) * GIB) - CUDA_CONTEXT)
    assert after.fits
    assert after.estimate.total <= 0.91 * roomy.estimate.total
    asked = setup_of("deepseek-coder-7b", "train.gradient_checkpointing=true", "train.per_device_train_batch_size=4")
    assert less_memory(asked, choose_plan(asked, None))[:1] == ("train.gradient_checkpointing=auto",)


def test_what_is_asked_for_is_planned():
    shape = "deepseek-coder-7b"
    for asked, mode in (("true", "full"), ("false", "none"), ("mlp", "mlp")):
        assert set(choose_plan(setup_of(shape, f"train.gradient_checkpointing={asked}"), None).plan.modes) == {mode}
    offloaded = ["train.gradient_checkpointing=true", "train.activation_offloading=true"]
    assert choose_plan(setup_of(shape, *offloaded), None).plan.activation_offloading
    assert not choose_plan(setup_of(shape, *offloaded, device="cpu"), None).plan.activation_offloading
    assert choose_plan(setup_of(shape, "model.offload_embeddings=true"), None).plan.offload_embeddings
    unfused = setup_of(shape, "train.fused_kernels=false")
    assert set(choose_plan(unfused, 500 * GIB).plan.modes) == {"full"}
    with pytest.raises(ConfigError, match=r"model\.offload_embeddings.*tied"):
        choose_plan(setup_of("qwen2.5-1.5b", "model.offload_embeddings=true"), None)
    assert choose_plan(setup_of(shape), None).plan.describe() == "no recomputation"
    assert Plan(("full", "mlp", "none")).describe() == "1 of 3 layers is recomputed; 1 more recomputes its MLP"
    assert Plan(("mlp", "mlp", "none")).describe() == "2 of 3 layers recompute their MLP"
    assert Plan(("full",) * 3, True, True).describe() == (
        "every layer is recomputed, inputs in host memory; embeddings in host memory"
    )


def test_the_load_is_that_of_the_data():
    """Longest row, share of labels, mean square of the segments."""
    config = load_config(None, ["model.name_or_path=x", "data.path=y", "data.max_length=64"])[0]
    data = random_samples([10, 30], prompt_share=0.5)
    packed = Load.of(config, data)
    assert (packed.length, packed.labels, packed.squares) == (40, 20, round(40 * (100 + 900) / 40))
    padded = Load.of(load_config(None, ["model.name_or_path=x", "data.path=y", "data.packing=false"])[0], data)
    assert padded.length == 30
    assert Load.of(config).labels == Load.of(config).tokens == 64


def test_a_container_limits_what_is_free(tmp_path):
    from ibft.memory import _container_room, free_memory

    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert _container_room(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_room(tmp_path) is None
    assert _container_room(tmp_path / "absent") is None
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50


def test_what_a_gpu_has_free(monkeypatch):
    """What the driver says, and what this process has reserved and not used."""
    from ibft.memory import free_memory

    for name, value in (("mem_get_info", (1000, 5000)), ("memory_reserved", 300), ("memory_allocated", 120)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert free_memory(torch.device("cuda")) == 1180


def test_the_budget_of_a_run():
    from ibft.run import memory_budget

    runtime = SimpleNamespace(memory_budget=8.0)
    config = SimpleNamespace(runtime=runtime)
    assert memory_budget(config, torch.device("cpu")) == 8 * GIB
    assert memory_budget(config, torch.device("cuda")) == 8 * GIB - CUDA_CONTEXT
