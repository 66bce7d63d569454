"""A resumed run is the run that was never stopped, bit for bit; a state that is not of such a run is refused."""

import json
import math
import signal
from functools import cache
from itertools import islice

import pytest
import torch
from tiny_models import random_samples, randomise_lora, save_tiny_model, tiny_config, tiny_trainer

from ibft.checkpoint import load, save
from ibft.errors import ConfigError
from ibft.loop import count_steps
from ibft.trainer_state import changes, collect, fingerprint, restore

LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]  # four rows a step: two steps an epoch
SETTINGS = [
    "data.packing=false", "lora.dropout=0.3", "lora.r=64", "train.max_steps=6", "train.warmup_steps=2",
    "train.weight_decay=0.1", "lora.target_modules=[q_proj,v_proj,down_proj]",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def new_trainer(folder, *overrides, held_out=None):
    """In a process that has drawn other random numbers before; but LoRA starts the same."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.manual_seed(len(overrides))
    trainer = tiny_trainer(folder, random_samples(LENGTHS), *SETTINGS, *overrides, eval_data=held_out)
    randomise_lora(trainer.model)
    return trainer


def drive(trainer, until):
    """Train to step `until`, as `Trainer.train` does; the learning rates."""
    per_epoch, rates = count_steps(trainer.data, trainer.config), []
    while trainer.step < until:
        steps = trainer.batches(trainer.data, epoch=trainer.epoch, start=trainer.index)
        for micro_batches in islice(steps, until - trainer.step):
            rates.append(trainer.train_step(micro_batches)["learning_rate"])
            trainer.step += 1
            trainer.index += 1
        if trainer.index == per_epoch:
            trainer.epoch, trainer.index = trainer.epoch + 1, 0
    return rates


def through_files(trainer, path):
    """The state as a fresh process reads it."""
    tensors, facts = collect(trainer)

    def fill(folder):
        trainer.model.save_pretrained(folder, save_embedding_layers=False)

    return load(save(path, trainer.step, fill, tensors, facts))


def disturb(trainer):
    """So that nothing of what is restored is there already."""
    with torch.no_grad():
        for parameters in trainer.groups.values():
            for weight in parameters:
                weight.add_(1)


def copies(trainer):
    tensors, facts = collect(trainer)
    return {name: tensor.clone() for name, tensor in tensors.items()}, facts


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """By optimizer: learning rates and state of six steps."""

    @cache
    def run(optim):
        trainer = new_trainer(folder, f"train.optim={optim}")
        return drive(trainer, 6), *copies(trainer)

    return run


@pytest.mark.parametrize("stop", [0, 2, 3])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(folder, tmp_path, uninterrupted, optim, stop):
    rates, expected, expected_facts = uninterrupted(optim)
    first = new_trainer(folder, f"train.optim={optim}")
    rates_before = drive(first, stop)
    tensors, facts = through_files(first, tmp_path)
    second = new_trainer(folder, f"train.optim={optim}", "train.logging_steps=5")
    disturb(second)
    restore(second, tensors, facts)
    assert (second.step, second.epoch, second.index) == (stop, stop // 2, stop % 2)
    assert rates_before + drive(second, 6) == rates
    found, found_facts = copies(second)
    assert_equal(found, expected)
    assert not torch.equal(found["weights/lora/0"], tensors["weights/lora/0"])
    measured = {"seconds": None}
    assert found_facts | measured == expected_facts | measured
    if optim == "adamw_8bit":
        assert found["lora/0/state1"].dtype == torch.uint8  # else the 8 bits were not tested
        state = second.optimizer.optimizer.state
        books = {state[weight]["qmap1"].data_ptr() for weight in second.groups["lora"] if "qmap1" in state[weight]}
        assert len(books) == 1  # shared, as before


@pytest.mark.parametrize("stop", [3, 4])  # in an epoch, and at the end of one, before its evaluation
def test_the_loop_goes_on_where_it_stopped(folder, tmp_path, stop):
    """Losses, norms, rates and held-out losses of every step, with `Trainer.train` itself."""

    def train(trainer, until, rows):
        trainer.on_log = lambda row: rows.append(
            {key: value for key, value in row.items() if key not in ("tokens_per_second", "memory_mib")}
        )
        trainer.on_step = lambda step, _: trainer.interrupt(signal.SIGTERM) if step == until else None
        trainer.train()

    expected, rows, states = [], [], []
    whole, first, second = (new_trainer(folder, held_out=random_samples([9, 20], seed=4)) for _ in range(3))
    train(whole, None, expected)
    first.on_save = lambda name: states.append(through_files(first, tmp_path)) if "checkpoints" in name else None
    train(first, stop, rows)
    restore(second, *states[-1])
    train(second, None, rows)
    assert sum("eval_ce" in row for row in expected) == 3
    assert rows == expected
    assert second.best == whole.best
    assert_equal(collect(second)[0], collect(whole)[0])


def test_the_checkpoint_is_a_plain_adapter_folder_without_the_base(folder, tmp_path):
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    trainer = new_trainer(folder)
    drive(trainer, 1)
    through_files(trainer, tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path / "step-1")).r == 64
    weights = load_peft_weights(str(tmp_path / "step-1"), device="cpu")
    assert torch.equal(
        weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], trainer.groups["lora"][0]
    )
    trained = sum(weight.numel() for parameters in trainer.groups.values() for weight in parameters)
    # weight and two moments, four bytes each, and a step of four bytes a weight; the rest is the header
    size = 12 * trained + 4 * sum(len(parameters) for parameters in trainer.groups.values())
    assert 0 < (tmp_path / "step-1" / "optimizer.safetensors").stat().st_size - size < 50_000


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["ib.alpha=0"], {"weights/lora/0"}),
        (["ib.layer=1,2"], {"weights/bottleneck/7", "bottleneck/7/exp_avg"}),
        (["ib.encoder=random_projection"], {"fixed/encoder.weight", "fixed/encoder.bias", "weights/bottleneck/1"}),
        (["ib.prior=learned_diagonal"], {"weights/bottleneck/5"}),
    ],
)
def test_every_kind_of_bottleneck_is_kept_whole(folder, tmp_path, overrides, names):
    first, second = new_trainer(folder, *overrides), new_trainer(folder, *overrides)
    drive(first, 1)
    disturb(second)
    if second.objective.bottleneck is not None:
        for tensor in second.objective.bottleneck.state_dict().values():
            tensor.zero_()
    restore(second, *through_files(first, tmp_path))
    found = collect(second)[0]
    assert_equal(found, collect(first)[0])
    assert names <= found.keys()


def test_counters_come_back_and_an_infinite_best_too(folder, tmp_path):
    first, second = new_trainer(folder), new_trainer(folder)
    drive(first, 2)
    assert first.window.read()[0] == sum(LENGTHS)  # an epoch
    drive(first, 3)
    first.evaluated = 2
    tensors, facts = through_files(first, tmp_path)
    assert facts["tokens"] == sum(LENGTHS) + first.window.tokens  # and the step since the reading
    assert 0 < first.window.tokens < sum(LENGTHS)
    assert facts["seconds"] > first.window.total_seconds > 0
    assert (facts["step"], facts["epoch"], facts["index"], facts["best"]) == (3, 1, 1, None)
    second.best = 1.0
    restore(second, tensors, facts)
    assert second.best == math.inf
    assert (second.window.total_tokens, second.window.total_seconds) == (facts["tokens"], facts["seconds"])
    assert second.window.tokens == 0
    assert (second.step, second.epoch, second.index, second.evaluated) == (3, 1, 1, 2)
    first.best = 0.1 + 0.2
    _, facts = collect(first)
    restore(second, tensors, json.loads(json.dumps(facts)))
    assert second.best == 0.1 + 0.2


def test_the_loss_scale_comes_back(folder, tmp_path):
    first, second, plain = (new_trainer(folder) for _ in range(3))
    for trainer, scale in ((first, 2.0**9), (second, 2.0**16)):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=50)
    scaler = first.accelerator.scaler
    scaler.scale(torch.zeros(()))
    scaler._growth_tracker.fill_(17)
    tensors, facts = through_files(first, tmp_path)
    restore(second, tensors, facts)
    assert second.accelerator.scaler.state_dict() == scaler.state_dict()
    assert second.accelerator.scaler.get_scale() == 2.0**9
    assert second.accelerator.scaler._get_growth_tracker() == 17
    with pytest.raises(ConfigError, match=r"loss scale of fp16: got .*scale.*, expected none"):
        restore(plain, tensors, facts)


@pytest.mark.gpu
def test_paged_state_and_loss_scale_come_back_on_a_gpu(folder, tmp_path):
    settings = ["runtime.device=cuda", "train.mixed_precision=fp16", "train.optim=paged_adamw_8bit", "lora.r=2048"]
    first, second = new_trainer(folder, *settings), new_trainer(folder, *settings)
    drive(first, 3)
    restore(second, *through_files(first, tmp_path))
    weight = second.groups["lora"][0]
    state = second.optimizer.optimizer.state[weight]
    assert weight.numel() > 1e5
    assert state["state1"].is_paged  # else it was not tested
    assert state["absmax1"].device == weight.device
    assert second.accelerator.scaler.state_dict() == first.accelerator.scaler.state_dict()
    assert_equal(collect(second)[0], collect(first)[0])
    drive(second, 4)
    assert all(torch.isfinite(tensor).all() for name, tensor in collect(second)[0].items() if "weights" in name)


def test_recomputing_changes_no_name(folder):
    """train.gradient_checkpointing may differ between a run and its continuation."""
    first, second = new_trainer(folder), new_trainer(folder, "train.gradient_checkpointing=true")
    drive(first, 1)
    restore(second, *collect(first))
    assert_equal(collect(second)[0], collect(first)[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.r=32"], r"weights/lora/0: got \[64, 64\] float32, expected \[32, 64\] float32"),
        (["train.optim=adamw_8bit"], "lora/0: got , expected step|lora/0: got nothing, expected step"),
        (["ib.alpha=0"], "trained: got lora, bottleneck, expected lora"),
        (
            ["lora.target_modules=[q_proj,v_proj]"],
            r"weights of lora: got .*0.mlp.down_proj.*, expected .*1.self_attn.q",
        ),
        (["runtime.seed=7"], "runtime.seed: got 42, expected 7"),
        (
            ["train.gradient_accumulation_steps=8"],
            "data: got after step 3 epoch 1 and 1 steps of it, expected 1 steps an epoch",
        ),
        (["ib.latent_dim=8"], r"weights/bottleneck/0: got \[32, 64\] float32, expected \[16, 64\] float32"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_no_weight(folder, overrides, message):
    first = new_trainer(folder)
    drive(first, 3)
    state = collect(first)
    other = new_trainer(folder, *overrides)
    before = [weight.detach().clone() for weight in other.groups["lora"]]
    with pytest.raises(ConfigError, match=message) as caught:
        restore(other, *state)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(*pair) for pair in zip(before, other.groups["lora"], strict=True))
    assert other.step == 0


def test_equal_shapes_of_other_modules_do_not_pass(folder):
    first = new_trainer(folder, "lora.target_modules=[q_proj]")
    second = new_trainer(folder, "lora.target_modules=[o_proj]")
    with pytest.raises(ConfigError, match=r"weights of lora: got .*q_proj.*, expected .*o_proj"):
        restore(second, *collect(first))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, facts: tensors.pop("weights/lora/3"), r"weights/lora/3: got nothing, expected \[32, 64\]"),
        (lambda tensors, facts: tensors.pop("bottleneck/0/exp_avg"), "bottleneck/0/exp_avg: got nothing"),
        (lambda tensors, facts: tensors.update(more=torch.ones(2)), r"more: got \[2\] float32, expected nothing"),
        (lambda tensors, facts: tensors.update({"weights/lora/0": torch.ones(64, 64).half()}), "float16, expected"),
        (lambda tensors, facts: facts.pop("step"), "step: Field required"),
        (lambda tensors, facts: facts.update(step="3"), "step: Input should be a valid integer"),
        (lambda tensors, facts: facts.update(epoch=-1), "epoch: Input should be greater than or equal to 0"),
        (lambda tensors, facts: facts.update(best=math.nan), "best: Input should be a finite number"),
        (lambda tensors, facts: facts["schedule"].update(last_lrs=[0.1]), "learning rates: got 1, expected 2"),
        (lambda tensors, facts: facts.update(optimizer=3), "optimizer: Input should be a valid dictionary"),
        (lambda tensors, facts: facts["optimizer"].pop("lora/0"), r"lora/0/step: got \[\] float32, expected nothing"),
    ],
)
def test_a_state_that_lacks_or_garbles_something_is_refused(folder, change, message):
    trainer = new_trainer(folder)
    drive(trainer, 1)
    tensors, facts = copies(trainer)
    change(tensors, facts)
    with pytest.raises(ConfigError, match=message) as caught:
        restore(trainer, tensors, facts)
    assert "\n" not in str(caught.value)


def facts_of(*overrides, data="d", tokenizer="t", base="b"):
    return json.loads(json.dumps(fingerprint(tiny_config("model", *overrides), data, tokenizer, base)))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("ib.alpha=0.2", "ib.alpha: was 0.1, is 0.2"),
        ("ib.layer=1,3", "ib.layer: was 2, is [1, 3]"),
        ("data.fields.prompt=q data.fields.response=a", "data.fields.prompt: was null, is q"),
        ("train.max_steps=30", "train.max_steps: was 3, is 30"),
        ("train.optim=adamw_8bit", "train.optim: was adamw_torch_fused, is adamw_8bit"),
        ("data.packing=false", "data.packing: was true, is false"),
        ("runtime.device=auto", "runtime.device: was cpu, is auto"),
        ("runtime.seed=1", "runtime.seed: was 42, is 1"),
        ("data.eval_path=held_out.jsonl", "data.val_size: was 0.02, is not used"),
        ("model.revision=main", "model.revision: was null, is main"),
    ],
)
def test_what_changes_the_training_is_named(override, line):
    found = changes(facts_of(), facts_of(*override.split()))
    assert line in found
    assert len(found) == len(override.split())


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.save_steps=7", "checkpoint.keep_last=9", "eval.batch_size=3", "train.logging_steps=50",
        "train.eval_steps=2", "train.per_device_eval_batch_size=1", "train.report_to=wandb", "data.path=elsewhere",
        "runtime.memory_budget=8", "data.cache=false", "train.gradient_checkpointing=true",
        "model.offload_embeddings=true", "data.keep_ids=ids.json", "data.drop_ids=ids.json",
    ],
)  # fmt: skip
def test_what_does_not_change_the_training_may_differ(override):
    assert facts_of(override) != {}
    assert changes(facts_of(), facts_of(override)) == []


def test_content_decides_about_data_tokenizer_and_base():
    assert changes(facts_of(), facts_of(data="e", tokenizer="u", base="c")) == [
        "data.sha256: was d, is e", "tokenizer: was t, is u", "base: was b, is c",
    ]  # fmt: skip


def test_a_template_file_counts_by_its_content(tmp_path):
    one, two = tmp_path / "one.jinja", tmp_path / "two.jinja"
    for path in (one, two):
        path.write_text("{{ prompt }}")
    assert changes(facts_of(f"data.template={one}"), facts_of(f"data.template={two}")) == []
    before = facts_of(f"data.template={one}")
    one.write_text("{{ prompt }}!")
    (line,) = changes(before, facts_of(f"data.template={one}"))
    assert line.startswith("data.template: was ")


def test_a_setting_that_only_one_version_knows_is_named():
    old, new = facts_of(), facts_of()
    del old["ib.beta"]
    old["ib.gone"] = None
    assert changes(old, new) == ["ib.beta: was absent, is 0.02", "ib.gone: was null, is absent"]
