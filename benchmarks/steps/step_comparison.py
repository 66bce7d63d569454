"""One comparison of whole training steps: the gate, then times in turns, peaks, and the rows.

    rows of tokens -> gate of ours against the baseline -> warm-up -> peak memory -> rounds in drawn turns

It is to steps what `comparison.Comparison` is to ops. Providers may step over different rows, so what is compared is
the time of a real token. `ours_speedup` is against ours *with* the bottleneck in every row: of ours without it, it
says what the bottleneck costs.

Legend: D hidden size, F intermediate size, V vocabulary, L layers, Q and KV widths of queries and of keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.harness.comparison import Found, is_out_of_memory
from benchmarks.harness.machine import back_heap, matmul_rate
from benchmarks.harness.peak_memory import peaks_mib
from benchmarks.harness.providers import OURS, Provider
from benchmarks.harness.result_rows import STEP_COLUMNS
from benchmarks.harness.timing import take_turns, timed_ms, times_as_long
from benchmarks.steps.step_case import Base, Loop, Step, free, step_of, with_settings
from benchmarks.steps.step_gate import wrong_step
from benchmarks.steps.step_rows import Rows, squares
from ibft.config import Config
from ibft.data.encode import EncodedData

WARMUP = 1  # and two steps more that are measured for their peak (on a GPU one)


@dataclass(frozen=True)
class StepProvider(Provider):
    """One way to take the steps. run: makes it on a device; providers with the same `run` share what it makes.

    name: in the column `provider`. rows: what it steps over. wrong: the gate; what is wrong with it on a device, empty
    where nothing is. rounds: at most so many.
    """

    run: Callable[[torch.device], Loop]
    name: str = field(kw_only=True)
    config: Config = field(kw_only=True)
    rows: Rows = field(kw_only=True)
    wrong: Callable[[torch.device], str] = field(default=lambda device: "", kw_only=True)
    rounds: int | None = field(default=None, kw_only=True)


def step_providers(
    base: Base, config: Config, data: EncodedData, rows: Rows, gate_data: EncodedData, gate_rows: Rows
) -> dict[str, StepProvider]:
    """Ours and the baseline, with the bottleneck and without, on the same rows; ours is gated on the first micro-batch
    of `gate_rows`, which are of `gate_data`."""
    found = {}
    for suffix, one in {"": config, WITHOUT: with_settings(config, ib={"alpha": 0.0})}.items():
        found |= {
            OURS + suffix: StepProvider(
                partial(base.trainer, one, data), name=OURS, config=one, rows=rows,
                wrong=partial(wrong_step, base, one, gate_data, gate_rows.batches[0]),
            ),
            "hf" + suffix: StepProvider(
                partial(base.loop, one), name="hf", config=one, rows=rows, package="transformers",
                beside=("peft", "bitsandbytes"),
            ),
        }  # fmt: skip
    return found


WITHOUT = ", alpha = 0"
SIDES = (OURS, "hf", OURS + WITHOUT, "hf" + WITHOUT)


@dataclass
class StepFound(Found):
    """tokens: real ones of each round. flop_per_token: that such a step needs (`step_flop`)."""

    tokens: list[int] = field(default_factory=list)
    flop_per_token: float = 0.0
    padding: float = 0.0

    @property
    def ms_per_token(self) -> list[float]:
        return [ms / tokens for ms, tokens in zip(self.times_ms, self.tokens, strict=True)]


@dataclass(frozen=True)
class StepComparison:
    """The steps of one base on a kind of device. rounds: of each provider that sets no fewer; card_gib: of the card
    that a process is held to."""

    bench: str
    base: Base
    dtype: torch.dtype
    providers: Mapping[str, StepProvider]
    rounds: int = 14
    card_gib: int | None = None

    columns = STEP_COLUMNS
    one_thread = False

    def key(self, device: torch.device) -> tuple[object, ...]:
        return (self.bench, device, *(tuple(self.row(name).items()) for name in self.providers))

    def title(self) -> str:
        first = self.row(next(iter(self.providers)))
        sizes = ", ".join(f"{name} {first[name]}" for name in ("N", "T", "B", "L", "V", "labelled"))
        padding = {p.rows.layout: f"{p.rows.layout} {p.rows.padding:.0%}" for p in self.providers.values()}
        return f"step of {self.base.name}: {sizes}, {first['dtype']}; padding: {', '.join(padding.values())}"

    def row(self, name: str) -> dict[str, object]:
        """What the row says was measured."""
        provider, sizes = self.providers[name], self.base.sizes
        return {
            "op": "step", "provider": provider.name, "model": self.base.name,
            "alpha": f"{provider.config.ib.alpha:g}", **provider.rows.columns, "L": sizes.num_hidden_layers,
            "V": sizes.vocab_size, "card_gib": self.card_gib or "", "dtype": str(self.dtype)[6:],
        }  # fmt: skip

    def rates(self, found: StepFound, device: torch.device) -> dict[str, object]:
        """The columns of rates and of the ceiling; {} where no time is known."""
        if not found.times_ms:
            return {}
        tokens_per_s, ceiling = 1e3 / median(found.ms_per_token), matmul_rate(device, self.dtype)
        flop_per_s = tokens_per_s * found.flop_per_token
        return {
            "padding": f"{found.padding:.3f}", "tokens_per_s": f"{tokens_per_s:.1f}",
            "tflop_per_s": f"{flop_per_s / 1e12:.4g}",
            "ceiling_tflop_per_s": f"{ceiling / 1e12:.4g}", "ceiling_share": f"{flop_per_s / ceiling:.3f}",
        }  # fmt: skip

    def measure(self, names: Sequence[str], device: torch.device, *, rounds: int | None = None) -> dict[str, StepFound]:
        """Of each provider by name. Raises whatever ours raises, memory apart; a peer that fails is a row."""
        found: dict[str, StepFound] = {}
        ready: dict[str, Step] = {}
        made: dict[Any, Loop] = {}
        for name in names:
            provider = self.providers[name]
            free()  # what the one before left
            try:
                if stopped := stopped_by_gate(provider, device):
                    found[name] = stopped
                    continue
                if provider.run not in made:
                    made[provider.run] = provider.run(device)
                step = step_of(made[provider.run], provider.rows.steps)
                for i in range(WARMUP):
                    step(i)
                found[name] = StepFound("ok", peaks=peaks_mib(lambda step=step: partial(step, 0), device))
                ready[name] = step
            except Exception as error:
                made.pop(provider.run, None)
                found[name] = found_of(error, ours=provider.name == OURS)
        self.time(ready, found, device, rounds or self.rounds)
        return found

    def time(self, ready: Mapping[str, Step], found: dict[str, StepFound], device: torch.device, rounds: int) -> None:
        """Fills in the times of those that are ready. Who takes fewer rounds than others takes part in the first."""

        def turn(name: str, i: int) -> float | None:
            if found[name].result != "ok":
                return None
            try:
                ms = timed_ms([lambda: found[name].tokens.append(ready[name](i))], device)
            except Exception as error:  # it fitted before the others were there
                if not is_out_of_memory(error):
                    raise
                found[name] = StepFound("out of memory")
                return None
            found[name].times_ms.append(ms)
            return ms

        if device.type == "cpu":
            back_heap()
        mine = {name: min(rounds, self.providers[name].rounds or rounds) for name in ready}
        done = 0
        for count in sorted({*mine.values()}):
            still = [name for name in ready if mine[name] >= count]
            take_turns({name: lambda i, name=name, done=done: turn(name, done + i) for name in still}, count - done)
            done = count
        for name in ready:
            if not found[name].times_ms:
                continue
            found[name].flop_per_token = flop_per_token(self.base, self.providers[name])
            found[name].padding = self.providers[name].rows.padding
            if found.get(OURS) and found[OURS].times_ms:
                theirs = found[name].ms_per_token
                ours = found[OURS].ms_per_token[: len(theirs)]
                found[name].ours_speedup = times_as_long(theirs[: len(ours)], ours)


def stopped_by_gate(provider: StepProvider, device: torch.device) -> StepFound | None:
    """What keeps it from being timed; None where it is right."""
    try:
        wrong = provider.wrong(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return StepFound("reference out of memory", "ours and the baseline were not compared: one of them did not fit")
    return StepFound("incorrect", wrong) if wrong else None


def found_of(error: Exception, *, ours: bool) -> StepFound:
    """The row of a failure. Raises it again where it is ours, memory apart."""
    if is_out_of_memory(error):
        return StepFound("out of memory")
    if ours:
        raise error
    return StepFound("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def flop_per_token(base: Base, provider: StepProvider) -> float:
    rows = provider.rows
    labels = sum(batch.num_label_tokens for batch in rows.batches)
    return step_flop(
        base.sizes, rows.tokens, sum(map(squares, rows.batches)), labels, provider.config.lora.r,
        again=provider.config.train.gradient_checkpointing is True,
    ) / rows.tokens  # fmt: skip


def step_flop(sizes: Any, tokens: int, squared: int, labels: int, rank: int, *, again: bool) -> float:
    """Floating-point operations that QLoRA of every linear layer needs for so many tokens; the same for every provider.

    A frozen weight takes two products (forward, dx), and the first block's q, k, v have no dx; LoRA takes three pairs;
    causal attention is half of T^2, two products forward and four backward; the head reads the labelled rows, forward
    and dx. `again`: every block's forward runs a second time. The bottleneck and whatever else a provider computes are
    not counted.

    Args:
        sizes: transformers' configuration. squared: sum of the samples' squared lengths. labels: labelled positions.
    """
    D, F, L = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    head_dim = getattr(sizes, "head_dim", None) or D // sizes.num_attention_heads
    Q, KV = sizes.num_attention_heads * head_dim, sizes.num_key_value_heads * head_dim
    shapes = [(D, Q), (D, KV), (D, KV), (Q, D), (D, F), (D, F), (F, D)]
    frozen = 2 * sum(i * o for i, o in shapes)
    lora = 2 * rank * sum(i + o for i, o in shapes)
    forwards = 2 if again else 1
    linear = L * ((forwards + 1) * frozen + (forwards + 2) * lora) - 2 * D * (Q + 2 * KV)
    attention = L * (forwards + 2) * 2 * Q
    return tokens * linear + squared * attention + labels * 4 * D * sizes.vocab_size
