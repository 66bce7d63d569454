"""What the benchmarks are meant to show, as data, and what the committed rows say of it. Imports no torch.

A target reads the last row of each key of one CSV. Where its filter leaves several cases the worst of them counts;
a row of ours that says it was wrong or did not fit misses the target; what no row tells is unmeasured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import result_rows

Row = dict[str, str]
Condition = str | float | Callable[[str], bool]
Where = dict[str, Condition]
Verdict = Literal["met", "missed", "unmeasured"]
OURS = "ours"
FAULTS = ("incorrect", "out of memory", "failed")  # not "reference out of memory": that says nothing of the provider

# --- rows -----------------------------------------------------------------------------------------


def folders(kind: Literal["cpu", "gpu"] | None = None) -> list[str]:
    """The device folders that hold rows, by name; of one kind, or of both."""
    if not result_rows.RESULTS.exists():
        return []
    found = sorted(path.name for path in result_rows.RESULTS.iterdir() if any(path.glob("*.csv")))
    return [name for name in found if kind in (None, kind_of(name))]


def kind_of(folder: str) -> Literal["cpu", "gpu"]:
    return "cpu" if folder.startswith("cpu-") else "gpu"


def benches(folder: str) -> list[str]:
    return sorted(path.stem for path in (result_rows.RESULTS / folder).glob("*.csv"))


def all_rows(folder: str, bench: str) -> list[Row]:
    """In the order in which they were written. Files of older code, which had other columns, count as empty:
    the next run of that benchmark replaces them."""
    rows = result_rows.read(result_rows.path_of(folder, bench))
    return rows if rows and {"result", "versions", "time"} <= rows[0].keys() else []


def rows_of(folder: str, bench: str) -> list[Row]:
    """The last row of each key."""
    return result_rows.latest(all_rows(folder, bench))


def number(row: Row | None, column: str) -> float | None:
    """None where the row, or its column, is not there or blank."""
    text = row.get(column, "") if row else ""
    return float(text) if text else None


def pick(rows: Sequence[Row], **where: Condition) -> list[Row]:
    """The rows whose columns are equal to, or fulfil, what is asked; numbers are compared as numbers."""
    return [row for row in rows if all(_holds(row.get(name, ""), asked) for name, asked in where.items())]


def _holds(text: str, asked: Condition) -> bool:
    if callable(asked):
        return asked(text)
    if isinstance(asked, str):
        return text == asked
    return text != "" and float(text) == asked


def positive(text: str) -> bool:
    return text != "" and float(text) > 0


# --- what a target's value is ---------------------------------------------------------------------

Value = Callable[[Sequence[Row]], float | None]  # of the rows of one case; None: they do not tell


def one(rows: Sequence[Row], **where: Condition) -> Row | None:
    """The row that was asked for, if its result is ok."""
    return next(iter(pick(rows, result="ok", **where)), None)


def speedup(provider: str) -> Value:
    """How many times as long as ours that provider takes."""
    return lambda rows: number(one(rows, provider=provider), "ours_speedup")


def times_of(bound: str) -> Value:
    """How many times as long as that bound ours takes."""

    def value(rows: Sequence[Row]) -> float | None:
        times = number(one(rows, provider=bound), "ours_speedup")
        return 1 / times if times else None

    return value


def ratio(column: str, above: Where, below: Where) -> Value:
    """A column of the one row over that of the other."""

    def value(rows: Sequence[Row]) -> float | None:
        top, bottom = number(one(rows, **above), column), number(one(rows, **below), column)
        return top / bottom if top is not None and bottom else None

    return value


def peak(provider: str, *, ours: str = OURS) -> Value:
    """Our peak memory over that provider's."""
    return ratio("peak_mib", {"provider": ours}, {"provider": provider})


def share_of_ceiling(rows: Sequence[Row]) -> float | None:
    return number(one(rows, provider=OURS), "ceiling_share")


def added_by_the_bottleneck(rows: Sequence[Row]) -> float | None:
    """The share of a step that alpha > 0 adds to one of ours without; by rounds where they were taken in turns, else
    by tokens a second."""
    without, with_it = one(rows, provider=OURS, alpha=0.0), one(rows, provider=OURS, alpha=positive)
    if not without or not with_it:
        return None
    if times := number(without, "ours_speedup"):
        return 1 / times - 1
    rates = number(without, "tokens_per_s"), number(with_it, "tokens_per_s")
    return rates[0] / rates[1] - 1 if rates[0] and rates[1] else None


def against_ours(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as long as ours with the bottleneck it takes for a token: by rounds where they were taken in
    turns, else by tokens a second, of the same sizes on the same card."""
    if (stated := number(row, "ours_speedup")) is not None:
        return stated
    same: Where = {name: row[name] for name in ("model", "T", "L", "V", "card_gib", "dtype")}
    ours = one(rows, provider=OURS, alpha=positive, **same)
    rates = number(ours, "tokens_per_s"), number(row, "tokens_per_s")
    return rates[0] / rates[1] if rates[0] and rates[1] else None


def step_of(provider: str, alpha: Condition = positive) -> Value:
    """How many times as long as ours with the bottleneck its step takes for a token."""

    def value(rows: Sequence[Row]) -> float | None:
        row = one(rows, provider=provider, alpha=alpha)
        return against_ours(row, rows) if row else None

    return value


def fits(rows: Sequence[Row]) -> float | None:
    """1 where a row says that it ran. One that says otherwise has missed the target before this is asked."""
    return 1.0 if one(rows, provider=OURS) else None


# --- targets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """name: as README.md has it. where: the rows of results/<device>/<bench>.csv that it reads, all providers'.
    unit: of value and threshold when shown: times, a percentage, or whether it ran at all."""

    name: str
    on: Literal["cpu", "gpu"]
    bench: str
    where: Where
    value: Value
    comparison: Literal[">=", "<="]
    threshold: float
    unit: Literal["x", "%", "runs"] = "x"

    def judge(self, rows: Sequence[Row]) -> tuple[float | None, Verdict]:
        """Of the last rows of the target's benchmark."""
        mine = pick(rows, **self.where)
        if any(row["result"] in FAULTS for row in mine if row["provider"].startswith(OURS)):
            return None, "missed"
        cases: dict[tuple[str, ...], list[Row]] = {}
        for row in mine:
            cases.setdefault(result_rows.key(row | {"provider": "", "alpha": ""}), []).append(row)
        found = [value for case in cases.values() if (value := self.value(case)) is not None]
        if not found:
            return None, "unmeasured"
        if self.comparison == ">=":
            worst = min(found)
            return worst, "met" if worst >= self.threshold else "missed"
        worst = max(found)
        return worst, "met" if worst <= self.threshold else "missed"


EIGHT = "ours, 8 micro-batches"
OBJECTIVE_CPU: Where = {"N": 2048.0, "D": 1024.0, "V": 32768.0, "Z": 256.0, "detail": "labelled 0.5", "mode": "full"}
OBJECTIVE_GPU: Where = {"N": 4096.0, "D": 4096.0, "V": 102400.0, "Z": 256.0, "detail": "labelled 0.5", "mode": "full"}
HEAD_CPU: Where = {"N": 2048.0, "D": 2048.0, "V": 32768.0, "Z": 256.0, "mode": "full"}
FULL: Where = {"mode": "full"}
PACKED: Where = {"layout": "packed"}
WITH: Where = {"alpha": positive}
LARGE: Where = {"mode": "full", "N": 262144.0}  # smaller ones stay in a GPU's cache, which no copy rate bounds
STEP_2K: Where = {"model": "deepseek-coder-7b", "T": 2048.0, "card_gib": ""}
STEP_4K: Where = {"model": "deepseek-coder-7b", "T": 4096.0, "card_gib": ""}


def on_card(model: str, gib: float) -> Where:
    return {"model": model, "T": 2048.0, "card_gib": gib, "alpha": positive}


PEERS = "transformers + PEFT + bitsandbytes"
TARGETS = (
    Target("objective, against the released way", "cpu", "objective", OBJECTIVE_CPU, speedup("released"), ">=", 3.5),
    Target("its peak memory, of the released way's", "cpu", "objective", OBJECTIVE_CPU, peak("released"), "<=", 1 / 3),
    Target(
        "folded latent head, against the direct one in the same chunks", "cpu", "latent_head", HEAD_CPU,
        speedup("direct, chunked"), ">=", 2.5,
    ),
    Target(f"step, against {PEERS}, the same packed rows", "cpu", "step", PACKED, step_of("hf"), ">=", 1.2),
    Target("what the bottleneck adds to a step", "cpu", "step", PACKED, added_by_the_bottleneck, "<=", 0.10, "%"),
    Target(
        "`ib_kl_loss`, 262,144 rows, noise given: share of the copy's rate", "gpu", "ib_kl",
        LARGE | {"detail": "noise given"}, share_of_ceiling, ">=", 0.9, "%",
    ),
    Target(
        "the same, noise drawn", "gpu", "ib_kl", LARGE | {"detail": "noise philox"}, share_of_ceiling, ">=", 0.6, "%",
    ),
    Target(
        "`ib_kl_loss`, any size, either noise, against torch.compile", "gpu", "ib_kl", FULL, speedup("torch.compile"),
        ">=", 1.3,
    ),
    Target(
        "`ib_bottleneck` forward, of the bare product's time", "gpu", "ib_bottleneck", {"mode": "forward"},
        times_of("product"), "<=", 1.1,
    ),
    Target("folded latent head, against the direct one", "gpu", "latent_head", FULL, speedup("direct"), ">=", 4),
    Target("its peak memory, of the direct one's", "gpu", "latent_head", FULL, peak("direct"), "<=", 0.1),
    Target(
        "the same head, one fold for 8 micro-batches", "gpu", "latent_head", FULL,
        ratio("ours_speedup", {"provider": "direct"}, {"provider": EIGHT}), ">=", 5,
    ),
    Target("objective, against the released way", "gpu", "objective", OBJECTIVE_GPU, speedup("released"), ">=", 4),
    Target("its peak memory, of the released way's", "gpu", "objective", OBJECTIVE_GPU, peak("released"), "<=", 1 / 8),
    Target(
        f"7B step of 4,096 tokens, against {PEERS}", "gpu", "step_turns", STEP_4K, step_of("hf"), ">=", 1.3,
    ),
    Target(
        "the same with the bottleneck, against Unsloth without (separate processes)", "gpu", "step", STEP_4K,
        step_of("unsloth", 0.0), ">=", 1.0,
    ),
    Target("its share of the product's rate", "gpu", "step", STEP_4K | WITH, share_of_ceiling, ">=", 0.6, "%"),
    Target(
        "what the bottleneck adds to a 7B step of 2,048 tokens", "gpu", "step_turns", STEP_2K, added_by_the_bottleneck,
        "<=", 0.02, "%",
    ),
    Target("7B, 2,048 tokens, on 8 GiB", "gpu", "step", on_card("deepseek-coder-7b", 8), fits, ">=", 1, "runs"),
    Target("34B, 2,048 tokens, on 24 GiB", "gpu", "step", on_card("34b", 24), fits, ">=", 1, "runs"),
    Target("70B, 2,048 tokens, on 48 GiB", "gpu", "step", on_card("70b", 48), fits, ">=", 1, "runs"),
)  # fmt: skip


def evaluate(folder: str) -> list[tuple[Target, float | None, Verdict]]:
    """Of a device folder, each target of its kind of device, in order."""
    mine = [target for target in TARGETS if target.on == kind_of(folder)]
    return [(target, *target.judge(rows_of(folder, target.bench))) for target in mine]
