"""IBFTTrainer trains what our loop trains, goes on from the Trainer's checkpoints, and refuses what it cannot do."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_models import FakeTokenizer, random_samples, save_tiny_model, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ibft.context import BatchContext
from ibft.data.collate import collate
from ibft.data.prepare import Datasets
from ibft.errors import ConfigError, DataError, SetupError
from ibft.fused import Fused, fuse
from ibft.integrations import IBFTConfig, IBFTTrainer
from ibft.integrations.adopt import make_bottlenecks
from ibft.integrations.batches import kl_mask_of, noise_ids_of
from ibft.load_config import load_config
from ibft.model import add_lora, load_base, load_model_config, resolve_layers
from ibft.recompute import Checkpointed
from ibft.run import build_trainer
from ibft.tap import decoder_of

DOC = Path(__file__).parents[1] / "docs" / "integrations.md"
LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("loss", "ce", "kl", "ce_z")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def arguments(out, **more):
    common = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "seed": 42,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        "save_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(str(out), **common | more)


def losses(trainer, names=NAMES):
    return [[row[name] for name in names] for row in trainer.state.log_history if "loss" in row]


def assert_close(found, expected, tolerance=1e-5):
    left, right = (torch.tensor(rows, dtype=torch.float64) for rows in (found, expected))
    torch.testing.assert_close(left, right, rtol=tolerance, atol=0)


# --- against our loop -----------------------------------------------------------------------------


def as_columns(batch):
    """A `Batch` as a data collator would give it."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.label_rows + 1] = batch.targets
    return {
        "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids,
        "labels": labels, "noise_ids": batch.noise_ids,
    }  # fmt: skip


def loop_losses(config, data):
    """Rows of the loop that `ibft-fast train` runs, and the batches that it took."""
    from accelerate import Accelerator

    layer = resolve_layers(config.ib.layer, load_model_config(config.model).num_hidden_layers)
    bf16 = config.train.mixed_precision == "bf16"
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    datasets = Datasets(data, None, "")
    loop, _ = build_trainer(config, FakeTokenizer(), datasets, layer, accelerator, DTYPES[bf16])
    rows = []
    loop.on_log = lambda row: rows.append([row[name] for name in (*NAMES, "learning_rate")])
    loop.train()
    epochs = range(loop.epoch + 1)
    return rows, [batch for epoch in epochs for step in loop.batches(data, epoch=epoch) for batch in step]


@pytest.mark.parametrize(
    ("base", "steps", "accumulation", "settings"),
    [
        ("bundled", 20, 1, ["ib.layer=auto", "train.per_device_train_batch_size=1"]),
        ("random", 20, 2, ["ib.kl_tokens=response", "ib.kl_reduction=mean", "ib.alpha_warmup_ratio=0.5"]),
        ("random", 6, 2, ["ib.encoder=mlp", "train.fused_kernels=false"]),
        ("random", 5, 4, ["ib.layer=1,2", "train.gradient_checkpointing=true"]),
        ("random", 4, 2, ["ib.encoder=mlp", "train.mixed_precision=bf16"]),
    ],
)
def test_the_losses_are_those_of_our_loop(folder, tmp_path, base, steps, accumulation, settings):
    """A 4-bit base, keyed dropout, noise that follows the sample, unequal counts in every micro-batch."""
    common = [
        f"train.max_steps={steps}", "train.logging_steps=1", "train.per_device_train_batch_size=2",
        f"train.gradient_accumulation_steps={accumulation}", "train.lr_scheduler_type=cosine", "train.warmup_steps=2",
        "train.clip_mode=joint", "train.max_grad_norm=0.5", "data.packing=false", "runtime.device=cpu", "ib.alpha=0.1",
        "lora.dropout=0.1", *settings,
    ]  # fmt: skip
    config = load_config(None, common)[0] if base == "bundled" else tiny_config(folder, *common)
    expected, batches = loop_losses(config, random_samples(LENGTHS))
    assert len(expected) == steps

    bf16 = config.train.mixed_precision == "bf16"
    quantised = load_base(config.model, dtype=DTYPES[bf16], device=torch.device("cpu"))
    trainer = IBFTTrainer(
        add_lora(quantised, config.lora, context=BatchContext(config.runtime.seed)),
        arguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
            learning_rate=config.train.learning_rate, lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=0.5,
            train_sampling_strategy="sequential", gradient_checkpointing=config.train.gradient_checkpointing is True,
            bf16=bf16,
        ),
        train_dataset=[as_columns(batch) for batch in batches],
        data_collator=lambda items: items[0],
        ib=IBFTConfig(**config.ib.model_dump()),
        fused_kernels=config.train.fused_kernels,
    )  # fmt: skip
    trainer.train()
    assert_close(losses(trainer, (*NAMES, "learning_rate")), expected)


# --- a 4-bit base of bitsandbytes' own ------------------------------------------------------------


def bnb_model(folder, dropout=0.0, **quantised):
    """As a QLoRA user makes it: bitsandbytes' layers, PEFT over them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | quantised
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=four_bits, device_map={"": "cpu"}
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see ibft.nf4: its repacking would spoil the comparison
    torch.manual_seed(5)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    adapter = LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, adapter)


def test_bitsandbytes_own_layers_are_fused(folder, tmp_path):
    """The same losses as by PEFT's and bitsandbytes' forwards; the modules stay theirs."""
    from peft.tuners.lora.bnb import Linear4bit

    both = []
    for fused in (True, False):
        trainer = hf_trainer(folder, tmp_path, model=bnb_model(folder), fused_kernels=fused)
        assert sum(isinstance(module, Linear4bit) for module in trainer.model.modules()) == 21
        if fused:
            assert trainer.fused.left_alone == {}
            assert trainer.fused.taps_fused
        trainer.train()
        both.append(losses(trainer, (*NAMES, "grad_norm")))
    assert len(both[0]) == 4
    assert_close(*both)


def test_its_bytes_may_change(folder):
    """Merging quantises anew: another parameter. The adapter is forgotten and the bytes are not."""
    from tiny_models import randomise_lora

    model = bnb_model(folder).eval()
    randomise_lora(model)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits
        fuse(model, BatchContext(0))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
        model.merge_adapter()
        merged = model(ids).logits
        plain = bnb_model(folder).eval()
        randomise_lora(plain)
        plain.merge_adapter()
        torch.testing.assert_close(merged, plain(ids).logits, rtol=1e-5, atol=1e-6)
        assert (merged - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        ({"bnb_4bit_use_double_quant": False}, "nf4 without double quantisation, expected nf4"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4 with double quantisation, expected nf4"),
        ({"bnb_4bit_quant_storage": torch.float32}, "stored as torch.float32, expected bnb_4bit_quant_storage"),
    ],
)
def test_four_bits_of_another_kind_keep_their_forward(folder, tmp_path, caplog, quantised, said):
    trainer = hf_trainer(folder, tmp_path, model=bnb_model(folder, **quantised), max_steps=1)
    assert len(trainer.fused.left_alone) == 6
    (notice,) = trainer.fused.notices()
    assert said in notice
    assert notice in caplog.text
    trainer.train()
    assert len(losses(trainer)) == 1


# --- what the Trainer does ------------------------------------------------------------------------


class Rows(list):
    """Rows of ids and labels; of some of them a part is a prompt."""

    def __init__(self, **more):
        samples = random_samples(LENGTHS).samples
        super().__init__(
            {"input_ids": list(s.input_ids), "labels": [-100] * s.prompt_length + list(s.input_ids)[s.prompt_length :]}
            | {name: value + place for name, value in more.items()}
            for place, s in enumerate(samples)
        )


def pad(items, side="right"):
    longest = max(len(item["input_ids"]) for item in items)

    def row(values, filler):
        more = [filler] * (longest - len(values))
        return values + more if side == "right" else more + values

    batch = {
        "input_ids": torch.tensor([row(item["input_ids"], 0) for item in items]),
        "labels": torch.tensor([row(item["labels"], -100) for item in items]),
        "attention_mask": torch.tensor([row([1] * len(item["input_ids"]), 0) for item in items]),
    }
    if "sample_ids" in items[0]:
        batch["sample_ids"] = torch.tensor([item["sample_ids"] for item in items])
    return batch


def peft_model(folder, *, dropout=0.0, adapter=None):
    """As a user makes it: transformers and PEFT, nothing of ours."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = adapter or PeftLora(r=4, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, adapter)


def hf_trainer(folder, out, *, kind=IBFTTrainer, model=None, dropout=0.1, ib=None, collator=pad, rows=None, **more):
    options = {}
    if kind is not Trainer:
        options["ib"] = IBFTConfig(**{"layer": 2, "latent_dim": 16, **(ib or {})})
        options["fused_kernels"] = more.pop("fused_kernels", True)
    return kind(
        model or peft_model(folder, dropout=dropout), arguments(out, **more), train_dataset=rows or Rows(),
        eval_dataset=Rows(), data_collator=collator, **options,
    )  # fmt: skip


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


# --- noise and tokens -----------------------------------------------------------------------------


def test_noise_follows_the_sample_or_the_place_in_the_global_batch():
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": torch.tensor([[1] * 4, [0, 0, 1, 1]])}
    by_place = noise_ids_of(batch, epoch=1, step=7, first_row=6)
    assert by_place.dtype == torch.int32
    assert by_place[0].tolist() == [[7, 6, 0], [7, 6, 1], [7, 6, 2], [7, 6, 3]]
    assert by_place[1].tolist() == [[7, 7, 0], [7, 7, 0], [7, 7, 0], [7, 7, 1]]  # pads on the left move nothing
    by_sample = noise_ids_of(batch | {"sample_ids": torch.tensor([40, 8])}, epoch=1, step=7, first_row=6)
    assert by_sample[:, 2:].tolist() == [[[1, 40, 2], [1, 40, 3]], [[1, 8, 0], [1, 8, 1]]]
    given = torch.arange(24).view(2, 4, 3)
    assert noise_ids_of(batch | {"noise_ids": given}, epoch=1, step=7, first_row=6).tolist() == given.tolist()


def test_sample_ids_give_the_noise_that_ibft_fast_train_gives():
    samples = random_samples([5, 9]).samples
    batch = collate([[(3, samples[0])], [(0, samples[1])]], epoch=2, pad_id=0, kl_tokens="real")
    columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "sample_ids": torch.tensor([3, 0])}
    assert torch.equal(noise_ids_of(columns, epoch=2, step=9, first_row=0), batch.noise_ids)


@pytest.mark.parametrize("tokens", ["real", "response"])
def test_the_tokens_of_the_kl_are_those_of_our_batches(tokens):
    samples = list(enumerate(random_samples([5, 9, 3]).samples))
    batch = collate([[each] for each in samples], epoch=0, pad_id=0, kl_tokens=tokens)
    assert torch.equal(kl_mask_of(as_columns(batch), tokens), batch.kl_mask)
    if tokens == "real":
        assert kl_mask_of({"input_ids": batch.input_ids}, tokens).all()


def test_padding_on_the_left_changes_no_loss(folder, tmp_path):
    def run(side):
        collator = lambda items: pad(items, side) | {"position_ids": positions(pad(items, side))}  # noqa: E731
        trainer = hf_trainer(folder, tmp_path, collator=collator, max_steps=2)
        trainer.train()
        return losses(trainer)

    def positions(batch):
        return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    assert_close(run("left"), run("right"), 1e-4)


def test_packed_rows_do_not_see_each_other(folder, tmp_path):
    """Position ids that begin anew, and no attention mask, as packing collators give them."""
    samples = list(enumerate(random_samples([9, 20, 5]).samples))
    apart = collate([[each] for each in samples], epoch=0, pad_id=0, kl_tokens="real")
    packed = collate([samples], epoch=0, pad_id=0, kl_tokens="real", packed=True)

    def run(batch):
        columns = {name: value for name, value in as_columns(batch).items() if value is not None}
        trainer = hf_trainer(folder, tmp_path, rows=[columns] * 2, collator=lambda items: items[0], max_steps=2)
        trainer.train()
        return losses(trainer)

    assert_close(run(packed), run(apart), 2e-5)


def test_noise_by_sample_does_not_depend_on_who_is_in_the_batch(folder, tmp_path):
    """The second epoch draws anew; a sample's noise in an epoch is its own. `sample_ids` pass the Trainer's filter."""
    seen = {}
    for size in (2, 4):
        trainer = hf_trainer(
            folder, tmp_path, rows=Rows(sample_ids=10), per_device_train_batch_size=size, max_steps=-1,
            num_train_epochs=2,
        )  # fmt: skip
        keys = seen[size] = set()
        original = trainer.micro_batch_loss

        def spy(inputs, label_tokens, keys=keys, original=original):
            keys.update((int(e), int(s), ids[0].item()) for (e, s, _), ids in zip(
                inputs["noise_ids"][:, 0], inputs["input_ids"], strict=True
            ))  # fmt: skip
            return original(inputs, label_tokens)

        trainer.micro_batch_loss = spy
        trainer.train()
    assert seen[2] == seen[4]
    assert sorted((epoch, sample) for epoch, sample, _ in seen[2]) == [(e, 10 + k) for e in (0, 1) for k in range(8)]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"alpha": -1}, "ib.alpha: got -1: input should be greater than or equal to 0"),
        ({"layer": 0}, "ib.layer: got 0: expected auto, a number from 1, or several as in 4,6"),
        ({"kl_tokens": "all"}, "ib.kl_tokens: got 'all': input should be 'real' or 'response'"),
        ({"lear": 1}, "ib.lear: got 1: extra inputs are not permitted"),
    ],
)
def test_settings_that_are_wrong_are_one_line(values, said):
    with pytest.raises(ConfigError) as caught:
        IBFTConfig(**values)
    assert str(caught.value) == said


@pytest.mark.parametrize("layer", [3, 30, (1, 3)])
def test_a_layer_that_the_model_has_not(folder, tmp_path, layer):
    with pytest.raises(ConfigError, match=r"ib.layer: got (3|30), expected 1 .. 2 \(the model has 3 layers\)"):
        hf_trainer(folder, tmp_path, ib={"layer": layer})


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("n_gpu", 2)])
def test_several_devices_are_refused(folder, tmp_path, monkeypatch, name, value):
    """Before anything of the model is touched."""
    monkeypatch.setattr(TrainingArguments, name, property(lambda self: value))
    model = peft_model(folder)
    with pytest.raises(
        SetupError, match=r"got \d processes and \d GPUs, expected one device: set CUDA_VISIBLE_DEVICES=0"
    ):
        hf_trainer(folder, tmp_path, model=model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_the_objective_cannot_do_is_refused(folder, tmp_path):
    from peft import LoraConfig as PeftLora
    from peft import PromptTuningConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ConfigError, match="label_smoothing_factor: not supported, expected 0"):
        hf_trainer(folder, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="use_reentrant=True: not supported, expected False"):
        hf_trainer(
            folder, tmp_path, fused_kernels=False, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
    model = peft_model(folder)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    ready = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"data_collator": pad, "train_dataset": Rows(), "ib": IBFTConfig(latent_dim=8)}
    with pytest.raises(ConfigError, match="optimizers: a scheduler: not supported, expected the optimizer alone"):
        IBFTTrainer(model, arguments(tmp_path), optimizers=(optimizer, ready), **options)
    alone = IBFTTrainer(model, arguments(tmp_path, max_steps=1), optimizers=(optimizer, None), **options)
    alone.train()
    assert len(optimizer.param_groups) == 2
    for asked in ({"model": model, "compute_loss_func": print}, {"model_init": lambda: peft_model(folder)}):
        with pytest.raises(ConfigError, match=f"{list(asked)[-1]}: not supported"):
            IBFTTrainer(args=arguments(tmp_path), **asked, **options)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="PromptTuningConfig: the objective reads the decoder itself"):
        hf_trainer(folder, tmp_path, model=peft_model(folder, adapter=prompt))
    head = PeftLora(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"lm_head: got .*Linear, expected it without an adapter"):
        hf_trainer(folder, tmp_path, model=peft_model(folder, adapter=head))
    small = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=97))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel is not of the Llama family"):
        hf_trainer(folder, tmp_path, model=small)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: batch.pop("labels"), "the data collator made input_ids, attention_mask: expected also labels"),
        (
            lambda batch: batch.update(labels=batch["labels"][:, 1:]),
            r"labels: got shape \(2, \d+\), expected \(2, \d+\)",
        ),
        (lambda batch: batch.update(noise_ids=batch["input_ids"]), r"noise_ids: got shape .* expected \(2, \d+, 3\)"),
    ],
)
def test_a_batch_that_is_wrong_is_a_data_error(folder, tmp_path, change, said):
    def collator(items):
        batch = pad(items)
        change(batch)
        return batch

    with pytest.raises(DataError, match=said):
        hf_trainer(folder, tmp_path, collator=collator).train()


def test_a_checkpoint_of_another_bottleneck_is_refused(folder, tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    hf_trainer(folder, tmp_path, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    other = hf_trainer(folder, tmp_path, ib={"latent_dim": 8}, max_steps=2)
    with pytest.raises(ConfigError, match=r"encoder.bias: got \(32,\), expected \(16,\) by the settings of ib"):
        other.train(resume_from_checkpoint=str(checkpoint))
    file = checkpoint / "ib_bottleneck.safetensors"
    file.write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"ib_bottleneck.safetensors cannot be read"):
        hf_trainer(folder, tmp_path, max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    file.unlink()
    with pytest.raises(DataError, match=r"checkpoint-1 holds no ib_bottleneck.safetensors"):
        hf_trainer(folder, tmp_path, max_steps=2).train(resume_from_checkpoint=str(checkpoint))


# --- imports, TRL, the page -----------------------------------------------------------------------


def test_nothing_of_transformers_is_imported_before_a_trainer_is_named():
    code = (
        "import sys; from ibft import ib_kl_loss; import ibft.integrations; from ibft.integrations import IBFTConfig; "
        "print([name for name in ('transformers', 'peft', 'trl', 'bitsandbytes') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_the_trainer_for_trl_needs_trl_and_is_the_mixin_over_its_own(folder, tmp_path, monkeypatch):
    """A stand-in for TRL: TRL itself is not among the test dependencies."""
    import ibft.integrations

    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "ibft.integrations.sft", raising=False)
    with pytest.raises(SetupError, match="IBFTSFTTrainer needs TRL: run `pip install trl`"):
        _ = ibft.integrations.IBFTSFTTrainer
    monkeypatch.setitem(sys.modules, "trl", types.SimpleNamespace(SFTTrainer=type("SFTTrainer", (Trainer,), {})))
    trainer = hf_trainer(folder, tmp_path, kind=ibft.integrations.IBFTSFTTrainer, max_steps=1)
    trainer.train()
    assert losses(trainer)[0][2] > 0
    monkeypatch.delitem(sys.modules, "ibft.integrations.sft")


def snippets():
    return re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    code, _ = snippets()
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, str(DOC), "exec"), names)
    rows = [row for row in names["trainer"].state.log_history if "kl" in row]
    assert rows[-1]["ce"] < rows[0]["ce"]
    assert (tmp_path / "adapter" / "ib_bottleneck.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_the_pages_model_in_four_bits_is_fused(folder, tmp_path):
    """With a folder for the model's name."""
    names: dict = {}
    exec(compile(snippets()[1].replace("Qwen/Qwen2.5-Coder-7B", str(folder)), str(DOC), "exec"), names)
    trainer = hf_trainer(folder, tmp_path, model=names["model"], bf16=True, max_steps=1)
    trainer.train()
    assert trainer.fused.left_alone == {}
    assert losses(trainer)[0][2] > 0
