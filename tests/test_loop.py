"""The loop's promises: exact accumulation, packing that changes nothing, evaluation without a trace, one curve."""

import math
import time

import pytest
import torch
from tiny_models import gradients, random_samples, randomise_lora, save_tiny_model, tiny_trainer

from ibft.data.collate import collate
from ibft.data.order import epoch_order
from ibft.errors import NonFiniteError
from ibft.loop import Window
from ibft.nf4 import NF4Linear
from ibft.tap import HiddenTap, decoder_of
from ibft_kernels import _dispatch

LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def first_gradient(folder, *overrides, lengths=LENGTHS):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    trainer = tiny_trainer(folder, random_samples(lengths), "lora.dropout=0.3", *overrides)
    randomise_lora(trainer.model)
    trainer.model.train()
    parts = trainer.backward(next(trainer.batches(trainer.data, epoch=1)))
    return gradients(trainer), parts


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_fold_a_step_sent_before_the_gradients_are_unscaled(folder, monkeypatch, precision):
    """One fold in the step's precision, used by every micro-batch, sent between the last of them and the unscaling."""
    from ibft_kernels import FoldedHead
    from ibft_kernels.ops import fold as fold_module

    events, dtypes, uses = [], [], []
    trainer = tiny_trainer(
        folder, random_samples(LENGTHS), f"train.mixed_precision={precision}", "data.packing=false",
        "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=4",
    )  # fmt: skip
    made, sent, backward = fold_module.fold_head, FoldedHead.backward, trainer.accelerator.backward
    monkeypatch.setattr(fold_module, "fold_head", lambda *a: events.append("fold") or made(*a))
    monkeypatch.setattr(
        FoldedHead, "backward", lambda f: events.append("send") or dtypes.append(f.weight.dtype) or sent(f)
    )
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: events.append("backward") or backward(loss))
    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", lambda: events.append("unscale"))
    forward = trainer.objective.forward
    monkeypatch.setattr(trainer.objective, "forward", lambda *a, **k: uses.append(k["fold"]) or forward(*a, **k))
    trainer.model.train()
    trainer.backward(next(trainer.batches(trainer.data, epoch=0)))
    assert events == ["fold", *["backward"] * 4, "send", "unscale"]
    assert dtypes == [{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]]
    assert len(uses) == 4
    assert all(use is uses[0] and use[0] is not None for use in uses)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("split", [(1, 8), (2, 4), (3, 3)])
def test_accumulation_is_exact(folder, packing, checkpointing, split):
    """1 x 8 and 8 x 1: the same gradient, with unequal lengths, noise and dropout on."""
    common = [f"data.packing={packing}", f"train.gradient_checkpointing={checkpointing}", "data.max_length=32"]
    lengths = LENGTHS if not packing else [*LENGTHS, *LENGTHS]

    def run(micro, accumulation):
        overrides = [f"train.per_device_train_batch_size={micro}", f"train.gradient_accumulation_steps={accumulation}"]
        return first_gradient(folder, *common, *overrides, lengths=lengths)

    micro, accumulation = split
    expected, whole = run(micro * accumulation, 1)
    found, parts = run(micro, accumulation)
    assert_same(found, expected)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=0)


def test_packing_changes_no_gradient(folder):
    """One step of the same samples, packed and one a row: noise and dropout follow the sample."""
    padded, _ = first_gradient(folder, "data.packing=false", "train.gradient_accumulation_steps=8")
    packed, _ = first_gradient(folder, "data.packing=true", "data.max_length=64", "train.gradient_accumulation_steps=8")
    assert_same(packed, padded)


def test_a_dropout_mask_is_shared_by_the_readers_of_one_input_and_by_nobody_else(folder):
    trainer = tiny_trainer(folder, random_samples([8]), "lora.dropout=0.5")
    streams: dict[int, set[str]] = {}
    for name, module in trainer.model.named_modules():
        if type(module).__name__ == "SampleDropout":
            streams.setdefault(module.stream, set()).add(name.split("layers.")[1].split(".lora_dropout")[0])
    assert 0 not in streams  # the bottleneck's own
    assert sorted(map(sorted, streams.values())) == sorted(
        sorted(f"{layer}.{name}" for name in names)
        for layer in range(3)
        for names in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        )
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_and_generation_leave_no_trace(folder, precision):
    """Between two training steps, an evaluation and a generation change no gradient bit and no quantised byte."""
    from accelerate.state import AcceleratorState

    def second_gradient(*, disturb):
        AcceleratorState._reset_state(True)
        data = random_samples(LENGTHS)
        trainer = tiny_trainer(
            folder,
            data,
            f"train.mixed_precision={precision}",
            "lora.dropout=0.3",
            eval_data=random_samples([9, 20], seed=4),
        )
        steps = list(trainer.batches(data, epoch=0)) + list(trainer.batches(data, epoch=1))
        trainer.train_step(steps[0])
        before = packed_bytes(trainer.model)
        if disturb:
            assert math.isfinite(trainer.evaluate())
            with trainer.accelerator.autocast():
                trainer.model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        trainer.model.train()
        trainer.backward(steps[1])
        after = packed_bytes(trainer.model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return gradients(trainer)

    expected, found = second_gradient(disturb=False), second_gradient(disturb=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def packed_bytes(model):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    assert len(layers) == 21
    return {
        f"{name}.{key}": value.clone() for name, layer in layers.items() for key, value in layer.state_dict().items()
    }


def test_triton_and_torch_ops_train_the_same_curve(folder, monkeypatch):
    """Five steps with the kernels under the interpreter, and with the ops' torch path."""
    from accelerate.state import AcceleratorState

    def curve(interpreted):
        monkeypatch.setattr(_dispatch, "INTERPRETED", interpreted)
        AcceleratorState._reset_state(True)
        trainer = tiny_trainer(
            folder, random_samples(LENGTHS), "train.max_steps=5", "data.packing=false", "lora.dropout=0.1",
            "train.gradient_accumulation_steps=2", "lora.target_modules=[q_proj,v_proj,down_proj]",
        )  # fmt: skip
        rows = []
        trainer.on_log = rows.append
        trainer.train()
        return rows

    by_torch, by_triton = curve(False), curve(True)
    assert len(by_torch) == 5
    for key in ("loss", "ce", "kl", "ce_z", "grad_norm_lora", "grad_norm_bottleneck"):
        left, right = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for rows in (by_torch, by_triton))
        torch.testing.assert_close(left, right, rtol=2e-4, atol=0)
    assert by_torch[-1]["ce"] < by_torch[0]["ce"]


def test_the_kernels_really_ran_in_the_interpreter():
    """Guards the test above: what it switches is what `auto` obeys."""
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels run on it, not in the interpreter")
    assert _dispatch.resolve_backend("auto", torch.device("cpu")) == "torch"  # the autouse fixture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "INTERPRETED", True)
        assert _dispatch.resolve_backend("auto", torch.device("cpu")) == "triton"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_family_trains(tmp_path, family):
    folder = save_tiny_model(tmp_path, family)
    trainer = tiny_trainer(folder, random_samples(LENGTHS), "train.max_steps=8", "train.gradient_checkpointing=true")
    rows = []
    trainer.on_log = rows.append
    trainer.train()
    assert rows[-1]["ce"] < rows[1]["ce"] - 0.1
    assert all(
        math.isfinite(row["loss"]) and row["grad_norm_lora"] > 0 and row["grad_norm_bottleneck"] > 0 for row in rows
    )


def test_the_tap_is_hidden_states_at_the_layer(folder):
    trainer = tiny_trainer(folder, random_samples([9]))
    model, ids = trainer.model.eval(), torch.tensor([[4, 5, 6, 7]])
    for layer in (1, 2):
        with HiddenTap(model, layer) as tap:
            states = decoder_of(model)(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(tap.hidden, states[layer])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizers_train(folder, optim):
    trainer = tiny_trainer(folder, random_samples(LENGTHS), f"train.optim={optim}", "train.max_steps=6")
    rows = []
    trainer.on_log = rows.append
    trainer.train()
    assert rows[-1]["ce"] < rows[0]["ce"]


@pytest.mark.parametrize(("mode", "expected"), [("joint", None), ("per_group", 0.01)])
def test_clipping(folder, mode, expected):
    from ibft.optim import clip_gradients, gradient_norms

    trainer = tiny_trainer(folder, random_samples(LENGTHS), f"train.clip_mode={mode}", "train.max_grad_norm=0.01")
    trainer.backward(next(trainer.batches(trainer.data, epoch=0)))
    before = gradient_norms(trainer.groups)
    clip_gradients(trainer.groups, before, trainer.config.train)
    after = gradient_norms(trainer.groups)
    joint = math.hypot(*(float(norm) for norm in before.values()))
    for name, norm in after.items():
        target = expected if expected else float(before[name]) / joint * 0.01
        assert float(norm) == pytest.approx(target, rel=1e-4)


def test_learning_rates_warm_up_and_decay_and_the_bottleneck_has_its_own(folder):
    trainer = tiny_trainer(
        folder, random_samples(LENGTHS * 4), "train.max_steps=10", "train.warmup_ratio=0.2",
        "train.lr_scheduler_type=linear", "ib.learning_rate=0.5",
    )  # fmt: skip
    rates = []
    trainer.on_log = lambda row: rates.append(row["learning_rate"])
    trainer.train()
    assert rates == pytest.approx([0.0, 0.5e-2, 1e-2, *(1e-2 * left / 8 for left in range(7, 0, -1))])
    assert trainer.optimizer.param_groups[1]["initial_lr"] == 0.5


def test_a_poisoned_step_stops_before_the_optimizer(folder):
    trainer = tiny_trainer(folder, random_samples(LENGTHS))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.objective.bottleneck.up.bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 1: not finite: loss, ce_z"):
        trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_steps_equal_a_loop_written_by_hand(folder):
    """Order, epochs, dropout, cleared gradients, clipping, weight decay, cosine; an evaluation after each step."""
    from accelerate.state import AcceleratorState

    settings = [
        "runtime.seed=7", "train.max_steps=6", "train.weight_decay=0.1", "train.max_grad_norm=0.05", "lora.dropout=0.3",
        "train.eval_steps=1", "train.warmup_steps=2", "data.packing=false", "train.adam_beta2=0.9",
    ]  # fmt: skip
    data = random_samples(LENGTHS)
    trainer = tiny_trainer(folder, data, *settings, eval_data=random_samples([9], seed=3))
    rows = []
    trainer.on_log = lambda row: rows.append(row) if "loss" in row else None
    trainer.train()

    AcceleratorState._reset_state(True)
    twin = tiny_trainer(folder, data, *settings)
    lora = [p for p in twin.model.parameters() if p.requires_grad]
    bottleneck = list(twin.objective.bottleneck.parameters())
    optimizer = torch.optim.AdamW([*lora, *bottleneck], lr=1e-2, betas=(0.9, 0.9), weight_decay=0.1)
    twin.model.train()
    for step in range(6):
        epoch, within = divmod(step, 2)  # eight rows, four a step
        order = epoch_order(8, seed=7, epoch=epoch)
        indexed = [(place, data.samples[index]) for place, index in enumerate(order)][4 * within : 4 * within + 4]
        batches = [collate([[one]], epoch=epoch, pad_id=0, kl_tokens="real") for one in indexed]
        twin.backward(batches)
        norms = [torch.stack([p.grad.norm() for p in group]).norm() for group in (lora, bottleneck)]
        assert rows[step]["grad_norm_lora"] == pytest.approx(float(norms[0]), rel=1e-4)
        assert rows[step]["grad_norm_bottleneck"] == pytest.approx(float(norms[1]), rel=1e-4)
        torch.nn.utils.clip_grad_norm_([*lora, *bottleneck], 0.05)
        scale = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * scale
        optimizer.step()
        for parameter in [*lora, *bottleneck]:
            parameter.grad = None
    expected = dict(twin.model.named_parameters()) | dict(twin.objective.bottleneck.named_parameters())
    found = dict(trainer.model.named_parameters()) | dict(trainer.objective.bottleneck.named_parameters())
    for name, value in expected.items():
        if value.requires_grad:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_seed_reaches_noise_dropout_and_order(folder):
    """From equal weights and data, another seed gives another gradient: with noise alone, and with dropout alone."""

    def gradient(seed, *overrides):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        trainer = tiny_trainer(
            folder, random_samples(LENGTHS), f"runtime.seed={seed}", "data.packing=false", *overrides
        )
        randomise_lora(trainer.model)
        trainer.model.train()
        for parameter in trainer.objective.bottleneck.parameters() if trainer.objective.bottleneck else ():
            parameter.data.fill_(0.01)
        rows = [[(place, sample)] for place, sample in enumerate(trainer.data.samples)]
        trainer.backward([collate(rows, epoch=0, pad_id=0, kl_tokens="real")])
        order = [batch.targets.tolist() for step in trainer.batches(trainer.data, epoch=0) for batch in step]
        return gradients(trainer), order

    for overrides in (["lora.dropout=0"], ["lora.dropout=0.3", "ib.alpha=0"]):
        (one, order_one), (two, order_two), (again, _) = (gradient(seed, *overrides) for seed in (1, 2, 1))
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert any(not torch.allclose(one[name], two[name], rtol=1e-3) for name in one)
        assert order_one != order_two


def test_evaluation_is_the_mean_over_label_tokens(folder):
    held_out = random_samples([9, 20, 31], seed=4)
    trainer = tiny_trainer(folder, random_samples([8]), eval_data=held_out)
    total = tokens = 0
    for sample in held_out.samples:
        ids = torch.tensor([sample.input_ids])
        logits = trainer.model.eval()(ids).logits[0, sample.first_label - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, sample.first_label :], reduction="sum"))
        tokens += sample.num_labels
    assert trainer.evaluate() == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize(("checkpointing", "runs"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_each_block_again(folder, checkpointing, runs):
    trainer = tiny_trainer(folder, random_samples([8]), f"train.gradient_checkpointing={checkpointing}")
    trainer.model.train()
    calls = []
    decoder_of(trainer.model).layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    trainer.backward(next(trainer.batches(trainer.data, epoch=0)))
    assert len(calls) == runs


def test_epochs_give_the_number_of_steps(folder):
    trainer = tiny_trainer(folder, random_samples([8] * 9), "train.max_steps=-1", "train.num_train_epochs=1.5",
                           "data.packing=false")  # fmt: skip
    assert trainer.total_steps == 5  # nine rows, four a step: three steps an epoch


def test_throughput_counts_training_alone():
    window = Window(torch.device("cpu"))
    with window.paused():
        time.sleep(0.2)
    _, seconds = window.read()
    assert seconds < 0.1


def test_nothing_that_is_not_finite_is_saved(folder):
    trainer = tiny_trainer(
        folder, random_samples(LENGTHS), "train.max_steps=1", "train.warmup_ratio=0", "train.learning_rate=1e30",
        "train.max_grad_norm=0", eval_data=random_samples([9], seed=3),
    )  # fmt: skip
    saved = []
    trainer.on_save = saved.append
    with pytest.raises(NonFiniteError, match="held-out cross-entropy"):
        trainer.train()
    next(iter(trainer.groups["lora"])).data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="a weight is not finite"):
        trainer.save("adapter")
    assert saved == []


def test_best_and_last_are_saved(folder):
    trainer = tiny_trainer(
        folder, random_samples(LENGTHS), "train.max_steps=4", "train.eval_steps=1", "checkpoint.save_steps=2",
        eval_data=random_samples([12], seed=9),
    )  # fmt: skip
    saved, losses = [], []
    trainer.on_save = saved.append
    trainer.on_log = lambda row: losses.append(row["eval_ce"]) if "eval_ce" in row else None
    trainer.train()
    assert saved[-1] == "adapter"
    assert [name for name in saved if name.startswith("checkpoints")] == ["checkpoints/step-2", "checkpoints/step-4"]
    improvements = sum(loss < min(losses[:index], default=math.inf) for index, loss in enumerate(losses))
    assert saved.count("adapter-best") == improvements
    assert trainer.best == min(losses)
