"""What the Trainer does stays what it does: accumulation, checkpoints, evaluation, logs, clipping."""

import pytest
import torch
from hf_trainers import NAMES, Rows, assert_close, hf_trainer, losses, pad, peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from ibft.fused import Fused
from ibft.integrations import IBFTConfig, IBFTTrainer
from ibft.integrations.adopt import make_bottlenecks
from ibft.recompute import Checkpointed
from ibft.tap import decoder_of


def test_a_global_batch_may_be_split_at_will(folder, tmp_path):
    """Losses of later steps depend on every gradient of the earlier ones: dropout and noise go by the global row."""

    def run(rows, accumulation):
        trainer = hf_trainer(
            folder, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        return losses(trainer, (*NAMES, "grad_norm"))

    whole = run(4, 1)
    assert_close(run(1, 4), whole)
    assert_close(run(2, 2), whole)


@pytest.mark.parametrize("fused", [True, False])
def test_resumed_from_a_checkpoint_it_goes_on_as_if_never_stopped(folder, tmp_path, fused):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "fused_kernels": fused}
    straight = hf_trainer(folder, tmp_path, **settings, ib={"learning_rate": 0.05})
    straight.train()
    resumed = hf_trainer(folder, tmp_path, **settings, ib={"learning_rate": 0.05})
    nn.init.zeros_(resumed.bottleneck.up.weight)  # what was not loaded would show
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(straight)
    assert len(losses(resumed)) == 6


def test_what_is_saved_is_an_adapter_and_a_bottleneck(folder, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    trainer = hf_trainer(folder, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "ib_bottleneck.safetensors")
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "encoder.weight": (32, 64), "encoder.bias": (32,), "up.weight": (64, 16), "up.bias": (64,),
    }  # fmt: skip
    assert torch.equal(saved["up.weight"], trainer.bottleneck.up.weight)
    assert not any("bottleneck" in name or "encoder" in name for name, _ in trainer.model.named_parameters())
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    ours = trainer.model.eval()
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)
    assert ours.generate(input_ids=ids, max_new_tokens=3).shape == (1, 7)


def test_the_best_model_comes_back_with_its_bottleneck(folder, tmp_path):
    trainer = hf_trainer(
        folder, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=3e-3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")  # the worst: training lowers the loss
    from safetensors.torch import load_file

    best = load_file(tmp_path / "checkpoint-2" / "ib_bottleneck.safetensors")
    assert torch.equal(best["up.weight"], trainer.bottleneck.up.weight)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_alpha_it_is_the_plain_trainer(folder, tmp_path, accumulation):
    """Training and evaluation; the plain one makes all logits."""
    both = []
    for kind in (Trainer, IBFTTrainer):
        trainer = hf_trainer(
            folder, tmp_path, kind=kind, dropout=0.0, ib={"alpha": 0.0}, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        both.append([row["loss"] for row in trainer.state.log_history if "loss" in row] + [evaluated])
    assert len(both[0]) == 5
    assert_close(both[1], both[0])
    assert trainer.bottleneck is None
    assert [set(row) & set(NAMES) for row in trainer.state.log_history[:1]] == [{"loss", "ce"}]


def test_evaluation_is_the_plain_cross_entropy_and_makes_logits_only_where_they_are_asked_for(folder, tmp_path):
    trainer = hf_trainer(folder, tmp_path, rows=Rows(sample_ids=0), max_steps=1)
    trainer.train()
    made = []
    trainer.model.get_base_model().lm_head.register_forward_hook(lambda *_: made.append(1))
    alone = trainer.evaluate()["eval_loss"]
    assert made == []
    predicted = trainer.predict(Rows(sample_ids=3)[:2])
    assert made
    assert predicted.predictions.shape == (2, 31, 97)
    plain = Trainer(trainer.model, trainer.args, eval_dataset=Rows(), data_collator=pad)
    assert alone == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def test_bf16_evaluates_as_the_plain_trainer_does(folder, tmp_path):
    """Under autocast: fp32 products give another loss."""
    trainer = hf_trainer(folder, tmp_path, bf16=True)
    found = trainer.evaluate()["eval_loss"]
    plain = Trainer(trainer.model, trainer.args, eval_dataset=Rows(), data_collator=pad)
    assert found == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    exact = hf_trainer(folder, tmp_path).evaluate()["eval_loss"]
    assert found != pytest.approx(exact, rel=1e-6)


def test_a_plain_forward_gets_no_column_of_the_noise(folder, tmp_path):
    trainer = hf_trainer(folder, tmp_path)
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.predict(Rows(sample_ids=3)[:2])
    assert seen
    assert all("input_ids" in names and not names & {"sample_ids", "noise_ids"} for names in seen)


def test_within_a_step_outputs_may_be_asked_for(folder, tmp_path):
    trainer = hf_trainer(folder, tmp_path)
    found = []

    def compute_loss(model, inputs, return_outputs=False, **more):
        found.append(type(trainer).compute_loss(trainer, model, inputs, return_outputs=True, **more))
        return found[-1][0]

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(found) == 4
    assert all(outputs["loss"] is loss for loss, outputs in found)


def test_a_step_without_a_label_has_no_loss(folder, tmp_path):
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in Rows()]
    trainer = hf_trainer(folder, tmp_path, rows=rows, max_steps=2)
    trainer.train()
    for loss, ce, kl, ce_z in losses(trainer):
        assert (ce, ce_z) == (0, 0)
        assert loss == pytest.approx(trainer.ib.alpha * kl, rel=1e-5)


def test_a_norm_that_is_only_logged_is_of_model_and_bottleneck_too(folder, tmp_path):
    trainer = hf_trainer(folder, tmp_path, max_steps=1, max_grad_norm=0.0, ib={"alpha": 10.0})
    squares = []

    class Sum(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            groups = ([*trainer.model.parameters()], [*trainer.objective.parameters()])
            squares.extend(sum(p.grad.square().sum().item() for p in g if p.grad is not None) for g in groups)

    trainer.add_callback(Sum())
    trainer.train()
    assert min(squares) > 0.01 * sum(squares)
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)


def test_alpha_rises(folder, tmp_path):
    trainer = hf_trainer(folder, tmp_path, ib={"alpha": 0.3, "alpha_warmup_ratio": 0.5})
    trainer.state.max_steps, found = 5, []
    for trainer.state.global_step in range(5):
        found.append(trainer.alpha)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])  # half of five is rounded up


def test_every_pass_over_a_stream_has_noise_of_its_own(folder, tmp_path):
    """The Trainer knows of no epoch there before `max_steps`."""
    rows = Rows(sample_ids=0)[:4]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    trainer = hf_trainer(folder, tmp_path, rows=Stream(), max_steps=6)
    seen = []
    trainer.request = lambda inputs: seen.append(tuple(inputs["noise_ids"][:, 0, :2].flatten().tolist()))
    trainer.fused.taps_fused = False
    trainer.train()
    assert seen == [
        (epoch, 0, epoch, 1) if half == 0 else (epoch, 2, epoch, 3) for epoch in range(3) for half in (0, 1)
    ]


def test_logs_are_means_over_the_steps_since_the_last(folder, tmp_path):
    each = hf_trainer(folder, tmp_path)
    each.train()
    pairs = hf_trainer(folder, tmp_path, logging_steps=2)
    pairs.train()
    rows = torch.tensor(losses(each), dtype=torch.float64)
    assert_close(losses(pairs), rows.view(2, 2, -1).mean(1).tolist())
    alpha, beta = each.ib.alpha, each.ib.beta
    assert_close((rows[:, 1] + alpha * (rows[:, 2] + beta * rows[:, 3])).tolist(), rows[:, 0].tolist())


@pytest.mark.parametrize(("rate", "expected"), [(None, 1e-2), (0.3, 0.3)])
def test_the_bottleneck_has_a_parameter_group_and_a_rate_of_its_own(folder, tmp_path, rate, expected):
    trainer = hf_trainer(folder, tmp_path, ib={"learning_rate": rate}, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    *_, last = optimizer.param_groups
    assert (last["lr"], last["weight_decay"]) == (expected, 0.1)
    assert {id(p) for p in last["params"]} == {id(p) for p in trainer.bottleneck.parameters()}
    assert len(trainer.create_optimizer().param_groups) == len(optimizer.param_groups) == 3  # a second `train`


def test_one_norm_clips_model_and_bottleneck(folder, tmp_path):
    trainer = hf_trainer(folder, tmp_path, max_steps=1, max_grad_norm=1e-3)
    norms = []

    def measure(args, state, control, **_):
        every = [*trainer.model.parameters(), *trainer.bottleneck.parameters()]
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in every if p.grad is not None]))

    trainer.callback_handler.callbacks[-1].on_pre_optimizer_step = measure
    trainer.train()
    assert float(norms[0]) == pytest.approx(1e-3, rel=1e-3)
    assert float(trainer.bottleneck.up.weight.grad.norm()) > 0


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_checkpointing_changes_no_loss(folder, tmp_path, fused):
    """Fused layers are recomputed by our own; the Trainer's own switch would not reach them, or do it twice."""
    kept = hf_trainer(folder, tmp_path, fused_kernels=fused, dropout=0.0)
    kept.train()
    recomputed = hf_trainer(folder, tmp_path, fused_kernels=fused, dropout=0.0, gradient_checkpointing=True)
    recomputed.train()
    assert_close(losses(recomputed), losses(kept))
    blocks = decoder_of(recomputed.model).layers
    assert [isinstance(block.forward, Checkpointed) for block in blocks] == [fused] * 3
    assert [bool(getattr(block, "gradient_checkpointing", False)) for block in blocks] == [not fused] * 3


def test_a_second_trainer_over_the_model_adopts_it_anew(folder, tmp_path):
    model = peft_model(folder, dropout=0.1)
    first = hf_trainer(folder, tmp_path, model=model, ib={"layer": 1}, gradient_checkpointing=True)
    second = hf_trainer(folder, tmp_path, model=model, ib={"layer": 2})
    assert second.context is first.context  # the dropout's
    hooks = decoder_of(model)._forward_pre_hooks.values()
    assert [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), Fused)] == [second.fused]
    fresh = hf_trainer(folder, tmp_path)
    second.train()
    fresh.train()
    assert losses(second) == losses(fresh)


def test_every_weight_of_a_model_without_an_adapter_trains(folder, tmp_path):
    """The fast path leaves such layers alone, and says so."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = hf_trainer(folder, tmp_path, model=model, learning_rate=1e-3)
    assert "base weights that train" in " ".join(trainer.fused.notices())
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert losses(trainer, ["ce"])[-1] < losses(trainer, ["ce"])[0]
    assert not torch.equal(model.lm_head.weight, before)
    trainer.save_model(str(tmp_path / "full"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "full")  # no bottleneck among its weights
    assert (tmp_path / "full" / "ib_bottleneck.safetensors").exists()


def test_a_bottleneck_begins_alike_whatever_was_drawn_before():
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        following = torch.random.get_rng_state()
        made.append(make_bottlenecks(IBFTConfig(latent_dim=4), (1,), 8, 42, torch.device("cpu")).up.weight)
        assert torch.equal(torch.random.get_rng_state(), following)
    assert torch.equal(*made)
