"""The model card of an adapter: README.md with the Hub's metadata, in place of the empty form that PEFT writes.

It says what was optimised, on what, with which settings, what came of it, and how to load it without this package.
Paths of the machine that trained are not in it: of a local file or folder only its name is.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ibft.card_facts import MANIFEST, PARTS, RESULT, SOLVED, sound
from ibft.config import BUNDLED, Config
from ibft.data.sources import looks_like_path
from ibft.output import write_whole

Facts = Mapping[str, Any]
FILE = "README.md"
BEST = "adapter-best"  # the folder of the state with the lowest held-out cross-entropy
PAPER = "[arXiv 2510.16022](https://arxiv.org/abs/2510.16022)"
DTYPES = ("bfloat16", "float16", "float32")


def write_model_card(
    folder: Path, config: Config, *, result: Facts | None = None, manifest: Facts | None = None
) -> Path:
    """Replaces README.md of an adapter folder; whoever finds the file finds all of it.

    Args:
        folder: as `ibft.rundir.write_adapter` leaves it; one named adapter-best is taken for the best state.
        result, manifest: what result.json and manifest.json of the run hold, where there are such. Of what is not such
            as a run writes the card says nothing.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / FILE
    write_whole(path, model_card(config, best=folder.name == BEST, result=result, manifest=manifest))
    return path


def model_card(
    config: Config, *, best: bool = False, result: Facts | None = None, manifest: Facts | None = None
) -> str:
    """Markdown with front matter. best: the state is that of the lowest held-out cross-entropy, not the last."""
    result, manifest = sound(result, RESULT) or {}, sound(manifest, MANIFEST) or {}
    sections = {
        "How to load it": loading(config, manifest),
        "What was optimised": objective(config, manifest),
        "Data": data(config, manifest),
        "Settings": settings(config, manifest),
        "Results": results(config, result, best=best),
        "Limits": limits(config, {} if best else result),
        "Made with": made_with(manifest),
    }
    body = "\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    front = yaml.safe_dump(metadata(config), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {title(config)}\n\n{introduction(config, best=best)}\n{body}"


def metadata(config: Config) -> dict[str, Any]:
    """What the Hub reads. A base or data set that is not on the Hub is not named there."""
    base, rows = hub_id(config.model.name_or_path), hub_id(config.data.path)
    tags = ["ib-ft"] * (config.ib.alpha > 0) + ["qlora"] * (config.model.quantization == "nf4")
    return {
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [*tags, "lora", "code"],
        **({"datasets": [rows]} if rows else {}),
    }


def hub_id(name: str) -> str | None:
    """The name where the hub is asked for it: none of what is bundled, a path, or a file or folder here."""
    if name == BUNDLED or looks_like_path(name):
        return None
    try:
        return None if Path(name).exists() else name
    except OSError:  # a name too long
        return None


def named(name: str) -> str:
    """A hub id as it is; of a local file or folder the last part of its path."""
    if name == BUNDLED:
        return "the tiny model that ibft-fast bundles"
    return code(name) if hub_id(name) else code(Path(name).name or name)


TINY = """
**The base is a Llama of 3.5 million parameters that comes with the package, to try training out. It writes short Python
functions of the kind in its corpus; neither it nor this adapter is of any other use.**
"""


# --- sections -------------------------------------------------------------------------------------


def title(config: Config) -> str:
    method = "IB-FT" if config.ib.alpha > 0 else "Fine-tuning"
    name = config.model.name_or_path
    return f"{method} adapter of {'the bundled tiny base' if name == BUNDLED else code(Path(name).name or name)}"


def introduction(config: Config, *, best: bool) -> str:
    method = (
        f"information-bottleneck fine-tuning (IB-FT, {PAPER})"
        if config.ib.alpha > 0
        else "plain supervised fine-tuning"
    )
    weights = "in 4 bits (NF4, double quantisation)" if config.model.quantization == "nf4" else "not quantised"
    state = "the lowest held-out cross-entropy of the run" if best else "the end of the run"
    revision = f" (revision {code(config.model.revision)})" if config.model.revision else ""
    return (
        f"A LoRA adapter for {named(config.model.name_or_path)}{revision}, the base frozen and {weights}, trained by "
        f"{method}. The weights are those of {state}.\n{TINY if config.model.name_or_path == BUNDLED else ''}"
    )


def loading(config: Config, manifest: Facts) -> str:
    """Plain PEFT: a program that runs in the adapter's folder."""
    model, template = config.model, config.data.template
    bundled, base, four_bits = model.name_or_path == BUNDLED, hub_id(model.name_or_path), model.quantization == "nf4"
    dtype = f"torch.{manifest.get('dtype') if manifest.get('dtype') in DTYPES else DTYPES[0]}"
    settings = "BASE_DIR" if bundled else json.dumps(base or f"PATH/TO/{Path(model.name_or_path).name}")
    settings += f", revision={json.dumps(model.revision)}" if model.revision and base else ""
    settings += f", dtype={dtype}{', quantization_config=four_bits' if four_bits else ''}"
    program = PROGRAM.format(
        bits_import=", BitsAndBytesConfig" if four_bits else "",
        base_import="from ibft.tiny import BASE_DIR\n" if bundled else "",
        four_bits=FOUR_BITS.format(dtype=dtype) if four_bits else "",
        settings=settings,
        prompt=CHAT_PROMPT if template == "chat" else PROMPT,
    )
    notes = ["The bundled base is not on the Hub: `pip install ibft-fast` brings it."] if bundled else []
    notes += ["Without `four_bits` it is not quite the base that was trained on."] if four_bits else []
    return f"```python\n{program}```\n\n{' '.join([*notes, prompt_form(template)])}\n"


PROGRAM = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{bits_import}
{base_import}
adapter = "."  # this folder, or its id on the Hub
{four_bits}base = AutoModelForCausalLM.from_pretrained({settings})
model = PeftModel.from_pretrained(base, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)

instruction = "Write a Python function that reverses a string."
{prompt}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
FOUR_BITS = """\
four_bits = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype}
)
"""
PROMPT = 'prompt = instruction + "\\n"'
CHAT_PROMPT = """\
messages = [{"role": "user", "content": instruction}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"""


def prompt_form(template: str) -> str:
    """What stood before a response in training."""
    known = {
        "auto": "the instruction and a newline; before an answer of a conversation the tokenizer's chat template",
        "released": "the instruction and a newline",
        "chat": "the tokenizer's chat template",
        "alpaca": "Stanford Alpaca's frame (`### Instruction:`, `### Response:`), which is to be used here too",
    }
    own = f"what the template {code(Path(template).name)} makes of a row, which is to be used here too"
    return f"What stood before a response in training: {known.get(template, own)}."


def objective(config: Config, manifest: Facts) -> str:
    ib = config.ib
    if ib.alpha == 0:
        return "Cross-entropy (CE) of the taught tokens, without a bottleneck (`ib.alpha=0`).\n"
    layer = manifest.get("ib_layer") or ib.layer
    where = ", ".join(map(str, layer)) if isinstance(layer, list | tuple) else layer
    how = "summed over the latent dimensions" if ib.kl_reduction == "batchmean" else "the mean over latent dimensions"
    counted = {"real": "every token", "all": "every token, pads too", "response": "the taught tokens"}[ib.kl_tokens]
    prior = "N(0, I)" if ib.prior == "standard" else "p(z)"
    variant = "" if ib.prior == "standard" else f" The prior p(z) is trained: {ib.prior.replace('_', ' ')}."
    variant += " z is mu, without noise." if ib.deterministic else ""
    variant += f" alpha rose over {ib.alpha_warmup_ratio:.0%} of the steps." if ib.alpha_warmup_ratio else ""
    return (
        f"    L = CE + {ib.alpha:g} (KL(q(z | h) || {prior}) + {ib.beta:g} CE_z)\n\n"
        f"h is the output of decoder layer {where} (from 1), z has {ib.latent_dim} dimensions, its encoder is "
        f"{ib.encoder.replace('_', ' ')}. The KL is {how} and averaged over {counted}; CE_z is the cross-entropy of "
        f"the taught tokens as the frozen head predicts them from z.{variant}\n"
    )


def data(config: Config, manifest: Facts) -> str:
    settings = config.data
    rows = "the tasks that ibft-fast bundles" if settings.path == BUNDLED else named(settings.path)
    parts = [f"Rows: {rows}, split {code(settings.split)}"]
    parts += [f"held out: {named(settings.eval_path)}"] if settings.eval_path else []
    parts += [f"at most {settings.max_samples:,} rows"] if settings.max_samples else []
    parts += ["equal rows once"] if settings.deduplicate else []
    parts += ["without rows that share text with evaluation problems"] if settings.decontaminate else []
    parts += [f"sha256 {code(str(manifest['data_sha256']))}"] if manifest.get("data_sha256") else []
    return "; ".join(parts) + ".\n"


def settings(config: Config, manifest: Facts) -> str:
    lora, train, ib = config.lora, config.train, config.ib
    rate = train.learning_rate if ib.learning_rate is None else ib.learning_rate
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * (manifest.get("processes") or 1)
    values = {
        "LoRA": f"r {lora.r}, alpha {lora.alpha}, dropout {lora.dropout:g}{', rsLoRA' if lora.use_rslora else ''}",
        "LoRA on": ", ".join(lora.target_modules),
        "length": f"{train.max_steps:,} steps" if train.max_steps > 0 else f"{train.num_train_epochs:g} epochs",
        "batch": f"{rows} rows of at most {config.data.max_length:,} tokens{', packed' if config.data.packing else ''}",
        "optimizer": f"{train.optim}, weight decay {train.weight_decay:g}",
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler_type}",
        **({"learning rate of the bottleneck": f"{rate:g}"} if ib.alpha > 0 else {}),
        "gradient clipping": f"{train.max_grad_norm:g}, {train.clip_mode.replace('_', ' ')}",
        "seed": str(config.runtime.seed),
    }
    return table(values)


def results(config: Config, result: Facts, *, best: bool) -> str:
    """Of the best state its cross-entropy alone: the rest of result.json is of the last one."""
    held_out = result.get("eval_ce") or []
    if best:
        return table({"held-out cross-entropy, nats per label token": f"{min(held_out):.4f}"}) if held_out else ""
    if not result:
        return "The run has left none.\n"
    last, tasks = result.get("last") or {}, result.get("pass_at_1") or {}
    values = {"steps": f"{result['steps']:,}"} if "steps" in result else {}
    values |= {"held-out cross-entropy, nats per label token": f"{held_out[-1]:.4f}"} if held_out else {}
    values |= {f"{name}, last step": f"{last[key]:.4g}" for key, name in PARTS.items() if last.get(key) is not None}
    for when in ("before", "after"):
        side = tasks.get(when) or {}
        if side.keys() == SOLVED.keys():
            values[f"Pass@1 {when} training"] = f"{side['value']:.1%} ({side['passed']} of {side['tasks']} tasks)"
    warned = "".join(f"- {one_line(text)}\n" for text in result.get("warnings") or ())
    return table(values) + (f"\nWarnings of the run:\n\n{warned}" if warned else "")


def limits(config: Config, result: Facts) -> str:
    lines = [
        "It works with its base alone, whose licence and limits hold for it too, as do those of the data.",
        "Nothing but what stands under Results was measured: not other tasks or languages, not safety.",
        "What it writes may be wrong or harmful: run such code in a sandbox only.",
    ]
    if config.ib.alpha > 0:
        lines.append("The bottleneck (`ib_bottleneck.safetensors`) took part in training only; nothing needs it here.")
    if config.model.quantization == "nf4":
        lines.append("It was fitted to weights rounded to 4 bits; on unrounded ones, or merged, it is a little off.")
    if tasks := ((result.get("pass_at_1") or {}).get("after") or {}).get("tasks"):
        points = math.ceil(100 / math.sqrt(tasks))  # 2 sqrt(p (1 - p) / n) at p = 1/2
        lines.append(
            f"Pass@1 is of one seed; over {tasks} tasks its 95 % interval is up to {points} points either way."
        )
    return "".join(f"- {line}\n" for line in lines)


def made_with(manifest: Facts) -> str:
    versions = {name: version for name, version in (manifest.get("versions") or {}).items() if version}
    parts = ", ".join(f"{one_line(name)} {one_line(version)}" for name, version in versions.items())
    commit = f"; commit {code(str(manifest['commit']))}" if manifest.get("commit") else ""
    device = f"; on {one_line(manifest['device'])}" if manifest.get("device") else ""
    return f"{parts or 'ibft-fast'}{commit}{device}.\n"


# --- Markdown -------------------------------------------------------------------------------------


def table(values: Mapping[str, str]) -> str:
    rows = "".join(f"| {name} | {one_line(value).replace('|', chr(92) + '|')} |\n" for name, value in values.items())
    return f"| | |\n|---|---|\n{rows}"


def one_line(value: Any) -> str:
    """None that opens a heading or a table, and no element of HTML."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def code(text: str) -> str:
    """Between more backticks than it has in a row."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"
