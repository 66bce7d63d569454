"""What an IBFTTrainer cannot do is refused in one line."""

import pytest
import torch
from hf_trainers import Rows, arguments, hf_trainer, pad, peft_model
from transformers import TrainingArguments

from ibft.errors import ConfigError, DataError, SetupError
from ibft.integrations import IBFTConfig, IBFTTrainer
from ibft.integrations.refusals import check_trainer


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


@pytest.mark.parametrize("engine", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_engines_that_shard_are_refused(folder, tmp_path, engine):
    trainer = hf_trainer(folder, tmp_path)
    check_trainer(trainer, bottleneck=True, fused_kernels=True)
    setattr(trainer, engine, True)
    with pytest.raises(SetupError, match="and neither deepspeed nor fsdp"):
        check_trainer(trainer, bottleneck=True, fused_kernels=True)


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
    with pytest.raises(ConfigError, match="torch_compile: not supported, expected False"):
        hf_trainer(folder, tmp_path, torch_compile=True)
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


def test_a_collator_that_makes_no_mapping_is_a_data_error(folder, tmp_path):
    said = "the data collator made a tuple, expected a mapping with input_ids and labels"
    with pytest.raises(DataError, match=said):
        hf_trainer(folder, tmp_path, collator=lambda items: tuple(pad(items).values())).train()


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
