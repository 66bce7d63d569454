"""An IBFTTrainer as its users make one: transformers and PEFT, and rows of ids and labels."""

import torch
from tiny_models import random_samples
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ibft.integrations import IBFTConfig, IBFTTrainer

LENGTHS = [5, 31, 12, 24, 9, 17, 28, 3]
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("loss", "ce", "kl", "ce_z")


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


def as_columns(batch):
    """A `Batch` as a data collator would give it."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.label_rows + 1] = batch.targets
    return {
        "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids,
        "labels": labels, "noise_ids": batch.noise_ids,
    }  # fmt: skip


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
