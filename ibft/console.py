"""What a user sees of a run: a header, a progress bar on a terminal, a line per log step, and the closing table."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ibft.config import Config
from ibft.plan import GIB, Choice

if TYPE_CHECKING:
    import torch

Advance = Callable[..., None]  # (done so far, ...)
LINE_SECONDS = 30  # between lines of progress where there is no terminal


class Console:
    """Everything goes to stdout; errors are the command line's business (stderr).

    to_stderr: all of it goes there, where stdout is for machines. quiet: nothing is shown.
    """

    def __init__(self, *, to_stderr: bool = False, quiet: bool = False) -> None:
        self.rich = RichConsole(highlight=False, soft_wrap=True, stderr=to_stderr, quiet=quiet)

    def notice(self, text: str) -> None:
        self.rich.print(f"note: {text}", style="yellow", markup=False)

    def line(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def data(self, what: str, summary: str) -> None:
        self.rich.print(f"{what}: {summary}", markup=False)

    def header(
        self,
        config: Config,
        *,
        layer: int | tuple[int, ...] | None,
        layers: int,
        device: "torch.device",
        dtype: "torch.dtype",
    ) -> None:
        bits = "4-bit NF4, double quantisation" if config.model.quantization == "nf4" else "not quantised"
        self.rich.print(
            f"model: {config.model.name_or_path}, {bits}, {str(dtype).removeprefix('torch.')} on {device}", markup=False
        )
        self.rich.print(
            f"LoRA: r {config.lora.r}, alpha {config.lora.alpha}, dropout {config.lora.dropout}", markup=False
        )
        self.rich.print(describe_objective(config, layer, layers), markup=False)

    def memory(self, config: Config, choice: Choice) -> None:
        """The plan and its predicted peak; where it does not fit, what would."""
        plan = choice.plan
        if config.train.activation_offloading and not plan.activation_offloading:
            why = "no layer is recomputed" if plan.count("full") == 0 else "the device is the CPU"
            self.notice(f"train.activation_offloading: nothing to offload ({why})")
        if config.model.offload_embeddings and not plan.offload_embeddings:
            self.notice("model.offload_embeddings: nothing to offload (the device is the CPU)")
        of = "" if choice.budget is None else f" of {size(choice.budget)} free"
        if config.runtime.memory_budget is not None:
            of = f" of runtime.memory_budget={config.runtime.memory_budget:g}"
        least = "" if config.train.fused_kernels else "at least "
        self.rich.print(
            f"memory: {least}{size(choice.estimate.total)} predicted{of}; {choice.plan.describe()}", markup=False
        )
        if not choice.fits:
            change = f"this would fit: {' '.join(choice.change)}" if choice.change else "no setting would make it fit"
            self.notice(f"this may run out of memory; {change}")

    def metrics(self, row: dict[str, Any]) -> None:
        if "eval_ce" in row:
            self.rich.print(f"step {row['step']:>5}  held-out CE {row['eval_ce']:.4f}", style="bold")
            return
        parts = [f"step {row['step']:>5}", f"loss {row['loss']:.4f}", f"CE {row['ce']:.4f}"]
        if "kl" in row:
            parts += [f"KL {row['kl']:.4f}", f"CE_z {row['ce_z']:.4f}", f"dims in use {row['active_dims']:.0%}"]
        parts += [f"grad {row['grad_norm_lora']:.3f}"]
        if "grad_norm_bottleneck" in row:
            parts[-1] += f"/{row['grad_norm_bottleneck']:.3f}"
        parts += [f"lr {row['learning_rate']:.1e}", f"{row['tokens_per_second']:,.0f} tok/s"]
        self.rich.print("  ".join(parts), markup=False)

    @contextmanager
    def progress(self, what: str, total: int, *, elsewhere: bool = True) -> Iterator[Advance]:
        """A bar on a terminal, a line every half minute elsewhere (or none); call the yielded function with the number
        done so far.
        """
        if not self.rich.is_terminal:
            yield self._lines(what, total) if elsewhere else lambda *_: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, *_: bar.update(task, completed=done)

    def _lines(self, what: str, total: int) -> Advance:
        last = time.monotonic()

        def advance(done: int, *_: Any) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                self.line(f"{what}: {done:,} of {total:,}")

        return advance

    def result(self, result: dict[str, Any], path: Path, *, kept_best: bool, on_cpu: bool) -> None:
        """on_cpu: the peak is the whole process's, libraries and code included, not that of the tensors alone."""
        first, last = result["first"], result["last"]
        table = Table("", "first", "last", title="result", title_justify="left")
        for key, label in (("loss", "loss"), ("ce", "CE"), ("kl", "KL (nats)"), ("ce_z", "CE_z")):
            if key in first:
                table.add_row(label, f"{first[key]:.4f}", f"{last[key]:.4f}")
        if result["eval_ce"]:
            table.add_row("held-out CE (best)", "", f"{min(result['eval_ce']):.4f}")
        table.add_row("Pass@1", _pass(result["pass_at_1"]["before"]), _pass(result["pass_at_1"]["after"]))
        table.add_row("tokens/s", "", f"{result['tokens_per_second']:,.0f}")
        label = "peak memory of the process" if on_cpu else "peak memory"
        table.add_row(label, "", f"{result['peak_memory_mib']:,.0f} MiB")
        self.rich.print(table)
        if "not_judged" in (result["pass_at_1"]["before"] or {}):
            self.notice(f"Pass@1 not judged: {result['pass_at_1']['before']['not_judged']}")
        best = f" (last), {path}/adapter-best (lowest held-out CE)" if kept_best else ""
        self.rich.print(f"adapter: {path}/adapter{best}", markup=False)
        run = shlex.quote(str(path))
        self.rich.print(
            f"next: ibft-fast generate {run}; ibft-fast report {run}; ibft-fast merge {run} -o merged", markup=False
        )


def size(count: int) -> str:
    """Bytes for people, e.g. "6.9 GiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:,.0f} MiB"


def describe_objective(config: Config, layer: int | tuple[int, ...] | None, layers: int) -> str:
    """One line that settles the published ambiguity: how strongly KL weighs, per token and per latent dimension.

    layer: tapped, or several; None without a bottleneck.
    """
    ib = config.ib
    if layer is None:
        return "objective: CE (ib.alpha = 0: plain fine-tuning, no bottleneck)"
    weight = ib.alpha if ib.kl_reduction == "batchmean" else ib.alpha / ib.latent_dim
    where, whose = f"at layer {layer}", ""
    if isinstance(layer, tuple):
        weight /= len(layer)
        where, whose = f"in the mean over layers {', '.join(map(str, layer))}", " of each layer"
    variant = "" if ib.prior == "standard" else f", {ib.prior} prior"
    variant += ", z = mu" if ib.deterministic else ""
    variant += f", alpha rising over {ib.alpha_warmup_ratio:.0%} of the steps" if ib.alpha_warmup_ratio else ""
    how = "sum over dims, mean over tokens" if ib.kl_reduction == "batchmean" else "mean over dims and tokens"
    return (
        f"objective: CE + {ib.alpha:g} (KL + {ib.beta:g} CE_z) {where} of {layers}, "
        f"Z {ib.latent_dim}, {ib.encoder} encoder{variant}\n"
        f"KL: {how} ({ib.kl_tokens}), so that each token's mean KL weighs {weight:.3g} per latent dimension{whose}"
    )


def _pass(value: dict[str, Any] | None) -> str:
    if value is None:
        return "no tasks"
    if "not_judged" in value:
        return "not judged"
    return f"{value['value']:.1%} ({value['passed']}/{value['tasks']})"
