"""Whole training steps to measure: trainers built as `ibft-fast train` builds them, the baseline beside them, the gate.

As a script it measures one provider on one shape, in a process of its own, so that no memory and no allocator's cache
is left over from another, and prints the row as JSON; `test_step_gpu.py` runs it so.

    python benchmarks/step_case.py --shape codellama-7b --provider ours --length 2048 --card-gib 8

Legend: N tokens of a step, M of them labelled, T the longest row, D hidden size, F intermediate size, V vocabulary,
R LoRA rank, L layers, Z latent size.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from plain_loop import PlainBatch, PlainLoop, add_lora, load_base
from random_base import SHAPES, as_linear4bit, model_config, random_base, save_4bit

from ibft.config import Config
from ibft.console import Console
from ibft.data.collate import Batch
from ibft.data.encode import EncodedData, Sample
from ibft.load_config import load_config
from ibft.loop import Trainer
from ibft.model import load_model_config, load_tokenizer, resolve_layer
from ibft.noise import Z_STREAM
from ibft.optim import gradient_norms
from ibft.run import Datasets, build_trainer, load_data
from ibft_kernels import noise_key, philox_normal

MIB, GIB = 1 << 20, 1 << 30
PROVIDERS = ("ours", "ours, alpha = 0", "hf", "hf, alpha = 0", "unsloth, alpha = 0")
# What the driver, the CUDA context and a desktop take of a card, and no allocator sees.
CONTEXT_GIB = 0.6

# --- builders -------------------------------------------------------------------------------------


def bundled_config(*overrides: str) -> Config:
    """The bundled run's settings; KL as the released code reduces it, so that one formula holds for both sides."""
    return load_config(None, ["ib.kl_reduction=mean", "runtime.device=cpu", *overrides])[0]


def bundled_data(config: Config) -> tuple[Any, Datasets]:
    """(tokenizer, data) of the bundled run."""
    tokenizer = load_tokenizer(config.model)
    return tokenizer, load_data(config, tokenizer, Console())


def bundled_trainer(config: Config, tokenizer: Any, data: Datasets) -> Trainer:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    return build_trainer(config, tokenizer, data, tapped_layer(config), accelerator, torch.float32)[0]


def bundled_plain_loop(config: Config) -> PlainLoop:
    base = load_base(config.model.name_or_path, dtype=torch.float32, device=torch.device("cpu"))
    return PlainLoop(add_lora(base, config), config, tapped_layer(config), dtype=torch.float32)


def tapped_layer(config: Config, shape: str | None = None) -> int | None:
    if config.ib.alpha == 0:
        return None
    base = load_model_config(config.model) if shape is None else model_config(shape)
    return resolve_layer(config.ib.layer, base.num_hidden_layers)


def shape_config(length: int, *overrides: str) -> Config:
    """QLoRA as on a consumer GPU: one sample of `length` tokens a step, r 32, every linear layer, 8-bit AdamW."""
    settings = [
        "model.name_or_path=random", "data.path=random", f"data.max_length={length}", "data.packing=false",
        "ib.kl_reduction=mean", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=1",
        "train.optim=adamw_8bit", "train.gradient_checkpointing=true", "train.max_steps=1000",
    ]  # fmt: skip
    return load_config(None, [*settings, *overrides])[0]


def random_data(shape: str, length: int, count: int) -> Datasets:
    """`count` samples of `length` random ids, the second half of each a response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, SHAPES[shape]["vocab_size"], (count, length), generator=generator).tolist()
    return Datasets(EncodedData([Sample(row, length // 2) for row in ids], rows=count), None, "")


def shape_trainer(shape: str, config: Config, data: Datasets, device: torch.device, dtype: torch.dtype) -> Trainer:
    """`build_trainer` on a random base: only the loading of a checkpoint is replaced."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no" if dtype == torch.float32 else "bf16")

    def load(_config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
        return random_base(shape, dtype=dtype, device=device)

    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    with mock.patch("ibft.model.load_base", load):
        return build_trainer(config, tokenizer, data, tapped_layer(config, shape), accelerator, dtype)[0]


def shape_plain_loop(shape: str, config: Config, device: torch.device, dtype: torch.dtype) -> PlainLoop:
    """The baseline on the same bytes."""
    base = as_linear4bit(random_base(shape, dtype=dtype, device=device), dtype)
    return PlainLoop(add_lora(base, config), config, tapped_layer(config, shape), dtype=dtype)


def unsloth_loop(shape: str, config: Config, device: torch.device, dtype: torch.dtype) -> PlainLoop:
    """Plain fine-tuning by Unsloth on the same bytes, which reach it through a checkpoint on disk, as its users' do.

    With dropout 0: its fast path has none. This function has not been run: no GPU with Unsloth was at hand.
    """
    from unsloth import FastLanguageModel

    length, lora = config.data.max_length, config.lora
    with tempfile.TemporaryDirectory() as folder:
        base = as_linear4bit(random_base(shape, dtype=dtype, device=device), dtype)
        save_4bit(base, folder)
        load_tokenizer(Config().model).save_pretrained(folder)  # it wants one; none of its ids is used
        del base
        model, _ = FastLanguageModel.from_pretrained(
            model_name=folder, max_seq_length=length, dtype=dtype, load_in_4bit=True
        )
    model = FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.alpha, lora_dropout=0, target_modules=list(lora.target_modules), bias="none",
        use_gradient_checkpointing="unsloth", max_seq_length=length,
    )  # fmt: skip
    return PlainLoop(model, config, None, dtype=dtype)


# --- the gate -------------------------------------------------------------------------------------


def check(
    make_ours: Callable[[], Trainer], make_plain: Callable[[], PlainLoop], *, rel: float
) -> dict[str, tuple[float, float]]:
    """One micro-batch by ours, then by the baseline: the same weights, the same eps, no dropout. (ours, plain) of CE,
    KL, CE_z and of the gradient's norm by group. The two need not fit into memory together.

    Raises:
        AssertionError: one of them differs by more than `rel` of the baseline's.
    """
    trainer = make_ours()
    config = trainer.config
    assert (config.lora.dropout, config.ib.kl_reduction) == (0, "mean"), "the two sides would compute different things"
    batch = next(iter(trainer.batches(trainer.data, epoch=0)))[0]
    everywhere = torch.ones_like(batch.kl_mask)
    batch = replace(batch, kl_mask=everywhere, num_kl_tokens=everywhere.numel())
    _spread_lora(trainer)
    ours = _losses_of_ours(trainer, batch)
    weights = _weights(trainer)
    del trainer
    _free()
    plain = make_plain()
    _load_weights(plain, weights)
    seed = noise_key(config.runtime.seed, Z_STREAM)
    eps = philox_normal(seed, batch.noise_ids.view(-1, 3), config.ib.latent_dim).view(*batch.input_ids.shape, -1)
    theirs = _losses_of_plain(plain, PlainBatch.of(batch).to(plain.device), eps.to(plain.device))
    pairs = {name: (ours[name], theirs[name]) for name in ours}
    for name, (found, truth) in pairs.items():
        assert abs(found - truth) <= rel * abs(truth), f"{name}: ours {found}, plain {truth}, expected within {rel:g}"
    return pairs


def _spread_lora(trainer: Trainer) -> None:
    """LoRA's B starts at zero, where its A has no gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.groups["lora"]:
        if not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _losses_of_ours(trainer: Trainer, batch: Batch) -> dict[str, float]:
    trainer.model.train()
    parts = trainer.backward([batch])
    norms = gradient_norms(trainer.groups)
    values = {"CE": parts.ce, "KL": parts.kl, "CE_z": parts.ce_z}
    values |= {f"gradient of {name}": norm for name, norm in norms.items()}
    return {name: float(value.detach()) for name, value in values.items()}


def _losses_of_plain(plain: PlainLoop, batch: PlainBatch, eps: torch.Tensor) -> dict[str, float]:
    plain.model.train()
    losses = plain.losses(batch, eps)
    losses.loss.backward()
    assert plain.heads is not None
    norms = gradient_norms({"lora": plain.lora, "bottleneck": [*plain.heads.parameters()]})
    values = {"CE": losses.ce, "KL": losses.kl, "CE_z": losses.ce_z}
    values |= {f"gradient of {name}": norm for name, norm in norms.items()}
    return {name: float(value.detach()) for name, value in values.items()}


Weights = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # LoRA's as PEFT saves them, the bottleneck's


def _weights(trainer: Trainer) -> Weights:
    from peft import get_peft_model_state_dict

    bottleneck = trainer.objective.bottleneck
    assert bottleneck is not None
    adapter = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
    return tuple(  # type: ignore[return-value]
        {name: value.detach().cpu().clone() for name, value in state.items()}
        for state in (adapter, bottleneck.state_dict())
    )


def _load_weights(plain: PlainLoop, weights: Weights) -> None:
    from peft import set_peft_model_state_dict

    adapter, bottleneck = weights
    result = set_peft_model_state_dict(plain.model, adapter)
    assert not result.unexpected_keys, result.unexpected_keys
    assert plain.heads is not None
    state = {"up.weight": bottleneck["up.weight"], "up.bias": bottleneck["up.bias"]}
    for kind in ("weight", "bias"):
        state[f"mu.{kind}"], state[f"logvar.{kind}"] = bottleneck[f"encoder.{kind}"].chunk(2)
    plain.heads.load_state_dict(state)


# --- measuring ------------------------------------------------------------------------------------

Step = Callable[[int], int]  # does a whole optimizer step on batch number i; returns its real tokens


def step_of_ours(trainer: Trainer, batches: Sequence[list[Batch]]) -> Step:
    def step(i: int) -> int:
        micro_batches = batches[i % len(batches)]
        trainer.train_step(micro_batches)
        trainer.step += 1  # as `train()` does: its number decides which steps gather what the logs show
        return sum(batch.num_tokens for batch in micro_batches)

    return step


def step_of_plain(plain: PlainLoop, batches: Sequence[list[Batch]]) -> Step:
    """Labels are laid out beforehand: a data loader's work, as the collator's is of ours."""
    prepared = [[PlainBatch.of(batch) for batch in micro_batches] for micro_batches in batches]

    def step(i: int) -> int:
        micro_batches = prepared[i % len(prepared)]
        plain.train_step(micro_batches)
        return sum(batch.num_tokens for batch in micro_batches)

    return step


def shape_step(shape: str, provider: str, config: Config, device: torch.device, dtype: torch.dtype) -> Step:
    """Raises ModuleNotFoundError where Unsloth was asked for and is not installed."""
    data = random_data(shape, config.data.max_length, count=4)
    if provider.startswith("ours"):
        trainer = shape_trainer(shape, config, data, device, dtype)
        return step_of_ours(trainer, list(trainer.batches(data.train, epoch=0)))
    plain = (unsloth_loop if provider.startswith("unsloth") else shape_plain_loop)(shape, config, device, dtype)
    return step_of_plain(plain, batches_of(data, config))


def batches_of(data: Datasets, config: Config) -> list[list[Batch]]:
    """As `Trainer.batches` makes them, for the baseline, which has no trainer."""
    settings = SimpleNamespace(config=config, pad_id=0)
    return list(Trainer.batches(settings, data.train, epoch=0))  # type: ignore[arg-type]


def timed_ms(step: Callable[[], object], device: torch.device) -> float:
    """Of one call, by CUDA events on a GPU, where it is waited for."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    step()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after)


def step_flop(shape: str, tokens: int, length: int, labelled: int, rank: int) -> float:
    """Floating-point operations that a QLoRA step needs, blocks checkpointed; the same for every provider.

    A frozen weight takes three products (forward, again in backward, dx), and the first block's q, k, v have no dx;
    LoRA takes four pairs; causal attention is half of T^2, forward twice and backward as two forwards; the head reads
    the labelled rows, forward and dx. The bottleneck and whatever else a provider computes are not counted.
    """
    c = model_config(shape)
    D, F, L = c.hidden_size, c.intermediate_size, c.num_hidden_layers
    head_dim = getattr(c, "head_dim", None) or D // c.num_attention_heads
    Q, KV = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
    shapes = [(D, Q), (D, KV), (D, KV), (Q, D), (D, F), (D, F), (F, D)]
    frozen = sum(i * o for i, o in shapes)
    without_dx = D * (Q + 2 * KV)
    lora = rank * sum(i + o for i, o in shapes)
    attention = 4 * (2 * length * Q)  # a token: two products of 2 * T/2 * Q, four times over
    return tokens * (L * (6 * frozen + 8 * lora + attention) - 2 * without_dx) + labelled * 4 * D * c.vocab_size


def matmul_ceiling(device: torch.device, size: int = 8192) -> float:
    """FLOP/s of the library's bf16 product of two square matrices: the most that any step could reach here."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = [timed_ms(lambda: torch.mm(a, b, out=out), device) for _ in range(23)]
    return 2 * size**3 / (median(times[3:]) / 1e3)


def step_columns(**known: object) -> dict[str, object]:
    """The columns of step.csv, the same on every device; blank where they say nothing."""
    names = (
        "provider", "alpha", "model", "layout", "N", "T", "dtype", "card_gib", "result", "rounds", "tokens_per_s",
        "ours_over_this", "tflop_per_s", "ceiling_tflop_per_s", "peak_mib", "peak_reserved_mib",
    )  # fmt: skip
    assert not known.keys() - set(names), known.keys() - set(names)
    return {"op": "step"} | {name: known.get(name, "") for name in names}


def run_case(
    shape: str, provider: str, length: int, device: torch.device, *, card_gib: int | None, warmup: int, rounds: int
) -> tuple[dict[str, object], list[float]]:
    """(columns, times in ms) of one provider; on a GPU in bf16, held to a card of that size. Out of memory is a row.

    Peaks are those of the whole process, the building of the model included, above what it held before.
    """
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = shape_config(length, *(["ib.alpha=0"] if provider.endswith("alpha = 0") else []))
    held = (0, 0)
    if on_gpu:
        total = torch.cuda.mem_get_info(device)[1]
        if card_gib is not None:
            torch.cuda.set_per_process_memory_fraction((card_gib - CONTEXT_GIB) * GIB / total, device)
        held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    times: list[float] = []
    result, tokens = "ok", length
    try:
        tokens, times = _warm_and_timed(shape_step(shape, provider, config, device, dtype), device, warmup, rounds)
    except torch.OutOfMemoryError:
        result = "out of memory"
    peaks = {}
    if on_gpu:
        peaks["peak_mib"] = f"{(torch.cuda.max_memory_allocated(device) - held[0]) / MIB:.0f}"
        peaks["peak_reserved_mib"] = f"{(torch.cuda.max_memory_reserved(device) - held[1]) / MIB:.0f}"
    _free()
    rates = {}
    if times:
        seconds = median(times) / 1e3
        rates["tokens_per_s"] = f"{tokens / seconds:.1f}"
        flop = step_flop(shape, tokens, length, tokens // 2, config.lora.r)
        rates["tflop_per_s"] = f"{flop / seconds / 1e12:.3g}"
        if on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            rates["ceiling_tflop_per_s"] = f"{matmul_ceiling(device) / 1e12:.3g}"
    columns = step_columns(
        provider=provider, alpha=config.ib.alpha, model=shape, layout="one sample", N=tokens, T=length,
        dtype=str(dtype)[6:], card_gib=card_gib or "", result=result, rounds=len(times), **rates, **peaks,
    )  # fmt: skip
    return columns, times


def _warm_and_timed(step: Step, device: torch.device, warmup: int, rounds: int) -> tuple[int, list[float]]:
    """(real tokens of a step, time of each round in ms)."""
    for i in range(warmup):
        step(i)
    tokens: list[int] = []
    times = [timed_ms(lambda i=i: tokens.append(step(i)), device) for i in range(rounds)]
    return tokens[0], times


def check_shape(shape: str, device: torch.device, *, length: int = 256) -> dict[str, tuple[float, float]]:
    """The gate on a shape: fp32 agrees to 1e-4; of bf16 no more is asked than the two sides' rounding leaves."""
    dtype, rel = (torch.bfloat16, 3e-2) if device.type == "cuda" else (torch.float32, 1e-4)
    config = shape_config(length, "lora.dropout=0")
    data = random_data(shape, length, count=1)
    return check(
        lambda: shape_trainer(shape, config, data, device, dtype),
        lambda: shape_plain_loop(shape, config, device, dtype),
        rel=rel,
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one provider's training step on one shape.")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--provider", choices=(*PROVIDERS, "gate"), required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--card-gib", type=int, help="hold it to a card of that size, less what a context takes of it")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.provider == "gate":
        print(json.dumps(check_shape(options.shape, device)))
        return
    columns, times = run_case(
        options.shape, options.provider, options.length, device, card_gib=options.card_gib, warmup=options.warmup,
        rounds=options.rounds,
    )  # fmt: skip
    print(json.dumps({"columns": columns, "times_ms": times}))


if __name__ == "__main__":
    main()
