"""One comparison of an op: the gate, then times in turns, peaks, and the rows.

    inputs -> gate against the reference in fp32 -> warm-up -> peak memory -> rounds in drawn turns

A provider whose outputs or gradients are wrong is not timed: its row says `incorrect`. One that runs out of memory has
a row that says so.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch

from benchmarks.harness.machine import back_heap, copy_rate, matmul_rate
from benchmarks.harness.peak_memory import MIB, peaks_mib
from benchmarks.harness.providers import OURS, Provider, Run
from benchmarks.harness.result_rows import OP_COLUMNS, percentiles
from benchmarks.harness.timing import rounds_for, take_turns, timed_ms, times_as_long

Mode = Literal["forward", "backward", "full"]
MODES: tuple[Mode, ...] = ("forward", "backward", "full")
Tensors = dict[str, Any]


@dataclass
class Found:
    """What came of one provider: `result`, times of its rounds, peaks of one call above what was there before it."""

    result: Literal["ok", "incorrect", "out of memory", "reference out of memory", "failed"]
    note: str = ""
    times_ms: list[float] = field(default_factory=list)
    peaks: tuple[float, float] | None = None  # MiB allocated and reserved
    ours_speedup: float | None = None  # how many times as long as ours, the median of the rounds

    def columns(self) -> dict[str, object]:
        speedup = {} if self.ours_speedup is None else {"ours_speedup": f"{self.ours_speedup:.3f}"}
        peaks = {} if self.peaks is None else dict(zip(PEAKS, (f"{mib:.1f}" for mib in self.peaks), strict=True))
        return {"result": self.result} | percentiles(self.times_ms) | speedup | peaks


PEAKS = ("peak_mib", "peak_reserved_mib")


@dataclass(frozen=True)
class Comparison:
    """An op at one size.

    bench: name of the CSV. sizes: values of the columns N, D, Z, V and detail.
    inputs: a fresh set on a device; tensors that require a gradient are the leaves, in order. Drawn after a seed.
    reference: the provider that is judged against in fp32. tolerance: how far an output or gradient may be off, in
    norm, relative to the truth's; in 16 bits, on top of the reference's own error.
    whole: run does forward and backward and returns outputs and gradients. consumes: inputs that
    such a run writes over: it gets copies, made outside of the time.
    bytes, flop: the least that the op has to move and to compute: the same for every provider.
    """

    bench: str
    op: str
    sizes: Mapping[str, object]
    dtype: torch.dtype
    inputs: Callable[[torch.device], Tensors]
    providers: Mapping[str, Provider]
    reference: str = "eager"
    mode: Mode = "full"
    tolerance: float | None = None  # 1e-5, or 5e-3 in 16 bits; 0: the same numbers
    whole: bool = False
    consumes: Sequence[str] = ()
    bytes: float = 0
    flop: float = 0
    seconds: float = 2.0  # of timing, as far as the least number of rounds allows

    columns = OP_COLUMNS

    @property
    def one_thread(self) -> bool:
        """On a CPU: what is bound by memory alone. Two threads of a virtual machine share a core or lie far apart, as
        its host likes at the moment, and such an op is twice as fast or slow for it."""
        return not self.flop

    def key(self, device: torch.device) -> tuple[object, ...]:
        return (self.bench, self.op, self.mode, *self.sizes.items(), self.dtype, device)

    def title(self) -> str:
        sizes = (value if name == "detail" else f"{name} {value}" for name, value in self.sizes.items() if value)
        return f"{self.op}, {self.mode}: {', '.join(sizes)}, {str(self.dtype)[6:]}"

    def row(self, name: str) -> dict[str, object]:
        """What the row says was measured."""
        return {"op": self.op, "provider": name, "mode": self.mode, **self.sizes, "dtype": str(self.dtype)[6:]}

    def rates(self, found: Found, device: torch.device) -> dict[str, object]:
        """The columns of rates and of the ceilings that they are held to; {} where no time is known."""
        times = percentiles(found.times_ms)
        if not times or not (self.bytes or self.flop):
            return {}
        seconds = float(times["p50_ms"]) / 1e3
        copy, product = copy_rate(device), matmul_rate(device, self.dtype)
        floor = max(self.bytes / copy, self.flop / product)
        rates: dict[str, object] = {"ceiling_gb_per_s": f"{copy / 1e9:.4g}", "ceiling_share": f"{floor / seconds:.3f}"}
        if self.bytes:
            rates["gb_per_s"] = f"{self.bytes / seconds / 1e9:.4g}"
        if self.flop:
            rates["tflop_per_s"] = f"{self.flop / seconds / 1e12:.4g}"
            rates["ceiling_tflop_per_s"] = f"{product / 1e12:.4g}"
        return rates

    def measure(self, names: Sequence[str], device: torch.device, *, rounds: int | None = None) -> dict[str, Found]:
        """Of each provider by name. Raises whatever ours raises, memory apart; a peer that fails is a row."""
        found: dict[str, Found] = {}
        ready: dict[str, Run] = {}
        try:
            sets = [self.drawn(device, 0)]
            sets += [self.drawn(device, i) for i in range(1, rotations(sets[0], device))]
            truth = self.truth(sets[0], device)
            for tensors in sets[1:]:  # now, or whoever comes to them first would be timed drawing them
                if UPSTREAM in sets[0]:
                    tensors[UPSTREAM] = [torch.randn_like(x) for x in sets[0][UPSTREAM]]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return {name: Found("reference out of memory") for name in names}  # unchecked is untimed
        for name in names:
            provider = self.providers[name]
            try:
                run = provider.ready()
                if not provider.gate or (name == self.reference and self.dtype == torch.float32):
                    self.call(run, sets[0])()  # what it is judged by is itself; the first call is never timed
                elif wrong := self.wrong(run, sets[0], *truth):
                    found[name] = Found("incorrect", wrong)
                    continue
                ready[name] = run
                found[name] = Found("ok", peaks=peaks_mib(lambda run=run: self.call(run, sets[0]), device))
            except Exception as error:
                if is_out_of_memory(error):
                    found[name] = Found("out of memory")
                elif name.startswith(OURS):
                    raise
                else:
                    found[name] = Found("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        self.time(ready, sets, found, device, rounds)
        return found

    def time(
        self,
        ready: Mapping[str, Run],
        sets: Sequence[Tensors],
        found: dict[str, Found],
        device: torch.device,
        rounds: int | None,
    ) -> None:
        """Fills in the times of those that passed the gate. A first round is a warm-up and tells how long a call is."""
        repeats = dict.fromkeys(ready, 1)

        def turn(name: str, i: int) -> float | None:
            try:
                calls = [self.call(ready[name], sets[(i + k) % len(sets)]) for k in range(repeats[name])]
                return timed_ms(calls, device) / self.providers[name].calls
            except Exception as error:  # it fitted once; what the others hold by now may be what it lacks
                if not is_out_of_memory(error):
                    raise
                found[name] = Found("out of memory")
                return None

        run = {name: partial(turn, name) for name in ready}
        once = {name: self.providers[name].calls * ms for name, times in take_turns(run, 1).items() for ms in times}
        repeats = {name: max(1, min(20, math.ceil(TURN_MS / ms))) for name, ms in once.items()}
        count = rounds or rounds_for(sum(ms * repeats[name] for name, ms in once.items()), self.seconds)
        if device.type == "cpu":
            back_heap()
        times = take_turns({name: run[name] for name in once}, count)
        for name, times_ms in times.items():
            found[name].times_ms = times_ms
            if OURS in times:
                found[name].ours_speedup = times_as_long(times_ms, times[OURS])

    # --- calls ------------------------------------------------------------------------------------

    def drawn(self, device: torch.device, seed: int) -> Tensors:
        torch.manual_seed(seed)
        return self.inputs(device)

    def call(self, run: Run, tensors: Tensors) -> Callable[[], tuple[torch.Tensor, ...]]:
        """What is timed, of this mode; whatever has to be there first is done now."""
        if self.consumes:
            tensors = tensors | {name: tensors[name].detach().clone() for name in self.consumes}
        leaves = [x for x in tensors.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        if self.whole or self.mode == "forward" or not leaves:
            return lambda: run(tensors)
        if self.mode == "full":
            return lambda: with_gradients(run(tensors), leaves, tensors)
        outputs = run(tensors)
        upstream_of(outputs, tensors)
        return lambda: with_gradients(outputs, leaves, tensors)

    # --- the gate ---------------------------------------------------------------------------------

    def truth(self, tensors: Tensors, device: torch.device) -> tuple[list[torch.Tensor], list[float]]:
        """(outputs and gradients of the reference in fp32, how far each may be off)."""
        run = self.providers[self.reference].run
        half = self.dtype != torch.float32
        native = self.call(run, tensors)()
        exact = [x.detach() for x in (self.call(run, upcast(tensors))() if half else native)]
        tolerance = (5e-3 if half else 1e-5) if self.tolerance is None else self.tolerance
        allowed = [tolerance * float(x.norm()) for x in exact]
        if half:
            allowed = [a + distance(n, x) for a, n, x in zip(allowed, native, exact, strict=True)]
        return exact, allowed

    def wrong(self, run: Run, tensors: Tensors, truth: list[torch.Tensor], allowed: list[float]) -> str:
        """What is wrong with its outputs and gradients; empty where nothing is."""
        try:
            made = self.call(run, tensors)()
        except Mismatch as error:
            return str(error)
        if len(made) != len(truth):
            return f"{len(made)} outputs and gradients, expected {len(truth)}"
        for i, (x, exact, limit) in enumerate(zip(made, truth, allowed, strict=True)):
            off = distance(x, exact)
            if not off <= limit:
                return f"output or gradient {i} is off by {off:.3g} of {float(exact.norm()):.3g}, allowed {limit:.3g}"
        return ""


UPSTREAM = "upstream"  # among the inputs
TURN_MS = 5.0  # shorter calls are repeated within a turn


def each(cases: Mapping[str, Sequence[object]], providers: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises a test with `device` (a fixture), `case` and `provider`: the cases of "cpu", and those of "cuda",
    which are GPU tests; the providers of one case follow one another."""
    parameters = []
    for device, mine in cases.items():
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for case in mine:
            parameters += [
                pytest.param(device, case, name, id=f"{device}-{name_of(case)}-{name}", marks=marks)
                for name in providers
            ]
    return pytest.mark.parametrize(("device", "case", "provider"), parameters, indirect=["device"])


def name_of(case: object) -> str:
    return "-".join(map(str, case)) if isinstance(case, tuple) else str(case)


def with_gradients(
    outputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor], tensors: Tensors
) -> tuple[torch.Tensor, ...]:
    gradients = torch.autograd.grad(outputs, leaves, upstream_of(outputs, tensors), allow_unused=True)
    return *outputs, *(g for g in gradients if g is not None)


def upstream_of(outputs: tuple[torch.Tensor, ...], tensors: Tensors) -> list[torch.Tensor]:
    """Gradients of the outputs, drawn once of each set of inputs: the same for all providers."""
    if UPSTREAM not in tensors:
        tensors[UPSTREAM] = [torch.randn_like(x) if x.dim() else torch.full_like(x, 0.7) for x in outputs]
    found, expected = ([tuple(x.shape) for x in each] for each in (outputs, tensors[UPSTREAM]))
    if found != expected:
        raise Mismatch(f"outputs of shapes {found}, expected {expected}")
    return [given.to(x.dtype) for given, x in zip(tensors[UPSTREAM], outputs, strict=True)]


class Mismatch(Exception):
    """Outputs that no comparison is possible with."""


def upcast(tensors: Tensors) -> Tensors:
    """fp32 twins of the tensors in 16 bits; leaves stay leaves."""

    def twin(x: Any) -> Any:
        if isinstance(x, list):
            return [twin(y) for y in x]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().float().requires_grad_(x.requires_grad)

    return {name: twin(x) for name, x in tensors.items()}


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.detach().float() - exact).norm()) if x.shape == exact.shape else math.inf


def rotations(tensors: Tensors, device: torch.device) -> int:
    """How many sets of inputs it takes that a call does not find its own in a cache."""
    held = sum(x.nbytes for x in tensors.values() if isinstance(x, torch.Tensor))
    return max(1, min(4, math.ceil((256 if device.type == "cuda" else 64) * MIB / max(held, 1))))


def is_out_of_memory(error: Exception) -> bool:
    """The allocators of torch raise what is named so, or a RuntimeError; a library or the driver only say so."""
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)
