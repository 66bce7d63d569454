"""The training loop: `train()` reads as verbs, and gradients are exact whatever the micro-batch.

A global batch is normalised by its *true* number of label tokens (the KL by its own count), known on the CPU before
the first micro-batch runs. So splitting it 1 x 8 or 8 x 1, or over several processes, changes nothing but rounding, and
every micro-batch's loss simply adds up.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ibft.config import Config
from ibft.context import BatchContext, LatentRequest
from ibft.data.collate import Batch, num_steps_per_epoch, places_of_epoch, steps_of_epoch
from ibft.data.encode import EncodedData
from ibft.errors import NonFiniteError
from ibft.fused import Fused
from ibft.memory import peak_memory_mib
from ibft.noise import z_stream
from ibft.objective import IBObjective, LatentSums, LossParts
from ibft.offload import HostEmbedding
from ibft.optim import Groups, clip_gradients, gradient_norms
from ibft.processes import largest, sum_step, sum_values
from ibft.tap import HiddenTap, decoder_of
from ibft_kernels import FoldedHead, Latent

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

Row = dict[str, Any]
MIN_LOSS_SCALE = 1.0  # an fp16 scaler that has backed off this far will not recover


@dataclass
class Trainer:
    """One run's moving parts and the verbs over them. Built by `ibft.run`; tests build it by hand.

    Through `on_log`, `on_latent`, `on_save` and `on_step` metrics.jsonl, latent.jsonl, trackers, disk and progress bar
    hear of it.
    """

    config: Config
    model: "PeftModel"
    objective: IBObjective
    taps: list[HiddenTap]  # one a bottleneck: none with alpha = 0
    context: BatchContext
    fused: Fused
    groups: Groups
    optimizer: Any
    scheduler: Any
    accelerator: "Accelerator"
    data: EncodedData
    eval_data: EncodedData | None
    pad_id: int
    total_steps: int
    embeddings: HostEmbedding | None = None  # where the table stays in host memory
    on_log: Callable[[Row], None] = lambda row: None
    on_latent: Callable[[Row], None] = lambda row: None  # a bottleneck's row of a logged step
    on_save: Callable[[str], None] = lambda name: None
    on_step: Callable[[int, Row], None] = lambda step, row: None

    on_fault: Callable[[Row], None] = lambda facts: None  # a step that is not finite
    on_notice: Callable[[str], None] = lambda text: None
    should_stop: Callable[[], bool] = lambda: False  # asked between steps, as a file STOP answers it

    step: int = 0
    epoch: int = 0
    index: int = 0
    """Optimizer steps taken in this epoch. With epoch and the seed all that says which samples come next."""
    evaluated: int = 0
    """Step of the last held-out evaluation."""
    best: float = math.inf
    skipped: int = 0
    """Steps that were not finite and left out."""
    signalled: int = 0
    """Number of the signal that this process was sent."""
    shape: torch.Size | None = None
    """[B, T] of the last micro-batch begun."""
    interrupted: signal.Signals | None = None
    """What the run stops for, in all its processes."""
    micro_rows: int = field(init=False)
    accumulation: int = field(init=False)
    """Micro-batches of a step, those of all processes."""
    window: "Window" = field(init=False)

    def __post_init__(self) -> None:
        self.window = Window(self.accelerator.device)
        self.micro_rows = self.config.train.per_device_train_batch_size
        self.accumulation = self.config.train.gradient_accumulation_steps * self.accelerator.num_processes

    def train(self) -> None:
        """Run to `total_steps`, or to an interrupt; the last state is saved either way.

        Raises:
            NonFiniteError: a loss, gradient, weight or held-out loss is not finite; nothing of it is saved.
        """
        steps_per_epoch = count_steps(self.data, self.config, self.accelerator.num_processes)
        assert steps_per_epoch > 0, "encode_rows refuses data without samples"
        self.window.restart()  # the clock starts here, not at the building of the trainer
        self.between_steps(steps_per_epoch)  # what a stop has kept from being done after the last one
        while self.step < self.total_steps and not self.interrupted:
            for micro_batches in self.batches(self.data, epoch=self.epoch, start=self.index):
                row, fits = None, True
                try:
                    row = self.step_or_skip(micro_batches)
                except torch.OutOfMemoryError:
                    fits = False
                    if self.smaller_micro_batch() is None:
                        raise
                if not fits:  # out here nothing holds the step's tensors any more
                    self.halve_micro_batch()
                    break  # and the same step again
                self.step += 1
                self.index += 1
                if row is not None and self.logs(self.step):
                    self.log(row)
                self.on_step(self.step, row or {})
                self.between_steps(steps_per_epoch)
                if self.interrupted or self.step == self.total_steps:
                    break
                if self.due(self.config.checkpoint.save_steps):
                    self.save(f"checkpoints/step-{self.step}")
            if self.index == steps_per_epoch:
                self.epoch, self.index = self.epoch + 1, 0
        if self.interrupted or self.config.checkpoint.save_steps > 0:
            self.save(f"checkpoints/step-{self.step}")
        self.save("adapter")

    def between_steps(self, steps_per_epoch: int) -> None:
        """Evaluate where that is due and not done, unless the run is to stop."""
        if self.heed() or self.step == 0 or self.evaluated == self.step:
            return
        if self.due(self.config.train.eval_steps or steps_per_epoch) or self.step == self.total_steps:
            self.evaluate_and_keep_best()

    def heed(self) -> bool:
        """Whether to stop: for a signal to any of the processes, or what `should_stop` says in any."""
        asked = self.signalled or (signal.SIGTERM if self.should_stop() else 0)
        if self.interrupted is None and (asked := largest(self.accelerator, asked)):
            self.interrupted = signal.Signals(asked)
        return self.interrupted is not None

    def step_or_skip(self, micro_batches: list[Batch]) -> Row | None:
        """The step's metrics; None of one that is not finite, where the run may go on without it.

        Raises:
            NonFiniteError: `train.skip_non_finite` such steps have been left out already.
        """
        try:
            return self.train_step(micro_batches)
        except NonFiniteError as error:
            self.skipped += 1
            goes_on = self.skipped <= self.config.train.skip_non_finite
            self.on_fault({
                "step": self.step + 1, "epoch": self.epoch, "rows": self.rows_of(micro_batches), "error": str(error),
                "parts": {name: str(value) for name, value in error.parts.items()}, "skipped": goes_on,
            })  # fmt: skip
            if not goes_on:
                raise
            self.optimizer.zero_grad()
            self.scheduler.step()  # the schedule is one of steps
            return None

    def rows_of(self, micro_batches: list[Batch]) -> list[int]:
        """Numbers of the data's rows, from 0, that a step was made of."""
        settings = self.config.data
        grouped = settings.group_by_length and not settings.packing
        step_rows = self.micro_rows * self.accumulation
        order = places_of_epoch(
            self.data, epoch=self.epoch, seed=self.config.runtime.seed, rows_per_step=step_rows if grouped else None
        )
        places = {place for batch in micro_batches for place in batch.noise_ids[..., 1].unique().tolist()}
        return [int(self.data.samples.rows[order[place]]) for place in sorted(places)]

    def smaller_micro_batch(self) -> int | None:
        """Half the rows, or the next divisor below; None where that is not allowed, or there is one row."""
        rows = self.micro_rows
        if not self.config.train.auto_micro_batch:
            return None
        return next((number for number in range(rows // 2, 0, -1) if rows % number == 0), None)

    def halve_micro_batch(self) -> None:
        """After running out of memory: smaller micro-batches from now on, as many more. The gradient stays the same."""
        smaller = self.smaller_micro_batch()
        assert smaller is not None
        self.micro_rows, self.accumulation = smaller, self.accumulation * (self.micro_rows // smaller)
        self.optimizer.zero_grad()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        self.on_notice(
            f"out of memory in step {self.step + 1}: going on with {smaller} rows a micro-batch and "
            f"{self.accumulation} micro-batches a step, the same global batch"
        )

    def train_step(self, micro_batches: list[Batch]) -> Row:
        """One optimizer step over a global batch; its metrics, still on the device.

        Raises:
            NonFiniteError: before the optimizer touches anything.
        """
        self.model.train()
        self.objective.alpha = self.alpha
        parts = self.backward(micro_batches, collect=self.logs(self.step + 1))
        norms = gradient_norms(self.groups)
        if self.check_finite(parts, norms):
            clip_gradients(self.groups, norms, self.config.train)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # by the fp16 loss scaler
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.window.add(micro_batches)
        kl_tokens = sum(batch.num_kl_tokens for batch in micro_batches)
        return {"parts": parts, "norms": norms, "kl_tokens": kl_tokens, "learning_rate": rate}

    @property
    def alpha(self) -> float:
        """Of the step to come, a function of its number."""
        rising = math.ceil(self.config.ib.alpha_warmup_ratio * self.total_steps)
        return self.config.ib.alpha * min(1.0, (self.step + 1) / max(rising, 1))

    def backward(self, micro_batches: list[Batch], *, collect: bool = False) -> LossParts:
        """Accumulate the gradient of a global batch (scaled by the fp16 scaler where there is one, then unscaled).

        micro_batches: the whole step's; of several processes each takes its share.

        Returns the loss parts of the whole global batch.
        """
        label_tokens = sum(batch.num_label_tokens for batch in micro_batches)
        kl_tokens = sum(batch.num_kl_tokens for batch in micro_batches)
        with self.accelerator.autocast():
            folds = [self.objective.fold(self.lm_head, label_tokens, index) for index in range(len(self.taps))]
        total = self.objective.nothing(self.accelerator.device, collect=collect)
        with self.fused.held():
            for batch in self.share(micro_batches):
                batch = self.to_device(batch)
                request = self.request(batch, kl_tokens)
                with self.context.batch(batch.noise_ids, batch.segments, request):
                    parts = self.forward(batch, label_tokens, kl_tokens, folds, collect)
                    self.accelerator.backward(parts.loss)
                total = total + parts.detached()
        for fold in folds:
            if fold is not None:
                fold.backward()
        if self.accelerator.num_processes > 1:
            weights = [weight for params in self.groups.values() for weight in params]
            total = total.with_values(sum_step(weights, total.values))
        self.accelerator.unscale_gradients()  # after the sum: whether one overflowed is the same in every process
        return total

    def share(self, micro_batches: list[Batch]) -> list[Batch]:
        """This process's of a step's; at the end of an epoch there may be none."""
        return micro_batches[self.accelerator.process_index :: self.accelerator.num_processes]

    def to_device(self, batch: Batch) -> Batch:
        """With the embeddings of its ids, where their table is on the host: looked up before the ids leave it."""
        self.shape = batch.input_ids.shape
        embeds = None if self.embeddings is None else self.embeddings.rows(batch.input_ids)
        return replace(batch.to(self.accelerator.device, non_blocking=True), embeds=embeds)

    def request(self, batch: Batch, kl_tokens: int) -> LatentRequest | None:
        """What the tapped block is asked for, where it is fused with the bottleneck."""
        if not self.fused.taps_fused:
            return None
        return self.objective.request(
            kl_mask=batch.kl_mask,
            seed=self.context.key(z_stream(0)),
            noise_ids=batch.noise_ids,
            kl_normalizer=kl_tokens,
        )

    def forward(
        self,
        batch: Batch,
        label_tokens: int,
        kl_tokens: int,
        folds: list[FoldedHead | None] | None = None,
        collect: bool = False,
    ) -> LossParts:
        """One micro-batch's share of the step's loss; inside `context.batch`."""
        with self.accelerator.autocast():
            tapped: list[torch.Tensor | Latent]
            if self.context.request is not None:
                last = self.last_hidden(batch)
                assert self.context.request.latent is not None
                tapped = [self.context.request.latent]
            else:
                with ExitStack() as open_taps:
                    for tap in self.taps:
                        open_taps.enter_context(tap)
                    last = self.last_hidden(batch)
                tapped = [tap.hidden for tap in self.taps]
                for tap in self.taps:
                    tap.release()
            return self.objective(
                last,
                tapped,
                self.lm_head,
                label_rows=batch.label_rows,
                targets=batch.targets,
                kl_mask=batch.kl_mask,
                seed=[self.context.key(z_stream(index)) for index in range(len(self.taps))],
                noise_ids=batch.noise_ids,
                label_normalizer=label_tokens,
                kl_normalizer=kl_tokens,
                fold=folds,
                collect=collect,
            )

    @property
    def lm_head(self) -> torch.nn.Module:
        head = self.model.get_base_model().lm_head
        assert isinstance(head, torch.nn.Module)
        return head

    def last_hidden(self, batch: Batch) -> torch.Tensor:
        """[B, T, D] after the final norm. Without logits: only labelled rows need them."""
        mask = batch.attention_mask
        if batch.segments is not None and self.fused.packs:
            # attention goes by segments; a mask of four dimensions keeps transformers from making its own
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
        output = decoder_of(self.model)(
            input_ids=batch.input_ids if batch.embeds is None else None,
            inputs_embeds=batch.embeds,
            position_ids=batch.position_ids,
            attention_mask=mask,
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean cross-entropy (nats per label token) on the held-out rows; None: stopped in the middle of it."""
        assert self.eval_data is not None
        self.model.eval()
        total = torch.zeros((), device=self.accelerator.device)
        tokens = 0
        plain = IBObjective(None, alpha=0.0)
        for batches in self.batches(self.eval_data, epoch=0, evaluation=True):
            if self.heed():
                return None
            for batch in self.share(batches):
                batch = self.to_device(batch)
                with self.accelerator.autocast(), self.context.batch(batch.noise_ids, batch.segments):
                    last = self.last_hidden(batch)
                    total += plain(
                        last, None, self.lm_head, label_rows=batch.label_rows, targets=batch.targets, label_normalizer=1
                    ).ce
            tokens += sum(batch.num_label_tokens for batch in batches)
        return float(sum_values(self.accelerator, total)) / tokens

    def evaluate_and_keep_best(self) -> None:
        if self.eval_data is None:
            return
        with self.window.paused():
            value = self.evaluate()
            if value is None:
                return
            self.evaluated = self.step
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"step {self.step}: the held-out cross-entropy is {value}; this state is not saved"
                )
            self.on_log({"step": self.step, "eval_ce": value})
            if value < self.best:
                self.best = value
                self.save("adapter-best")

    def save(self, name: str) -> None:
        """Hand the state to `on_save`, unless a weight is not finite: such a file would only look like a result."""
        weights = [parameter.detach() for params in self.groups.values() for parameter in params]
        if not bool(torch.stack([torch.isfinite(weight).all() for weight in weights]).all()):
            raise NonFiniteError(f"step {self.step}: a weight is not finite; {name} is not saved")
        self.on_save(name)

    def log(self, row: Row) -> None:
        """Bring the metrics to the host (with the finiteness check, the only regular synchronisation), hand them on."""
        parts: LossParts = row["parts"]
        tokens, seconds = self.window.read()
        values: Row = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": float(parts.loss),
            "ce": float(parts.ce),
        }
        if self.objective.bottleneck is not None:
            values |= {"kl": float(parts.kl), "ce_z": float(parts.ce_z)}
            assert parts.latent_sums is not None
            sums = parts.latent_sums.on_host()
            values |= sums.summary(row["kl_tokens"])
            self.log_latent(sums, row["kl_tokens"])
        values |= {f"grad_norm_{name}": float(norm) for name, norm in row["norms"].items()}
        values |= {
            "learning_rate": row["learning_rate"],
            "tokens_per_second": tokens / seconds,
            "memory_mib": peak_memory_mib(self.accelerator.device),
        }
        self.on_log(values)

    def log_latent(self, sums: LatentSums, tokens: int) -> None:
        """The KL of each latent dimension (nats per token), with the layer where there are several bottlenecks."""
        several = self.objective.bottleneck if isinstance(self.objective.bottleneck, torch.nn.ModuleDict) else None
        layers = [{"layer": int(layer)} for layer in several] if several is not None else [{}]
        widths = [bottleneck.latent_dim for bottleneck in self.objective.bottlenecks]
        for layer, kl_Z in zip(layers, sums.kl_by_dimension(tokens, widths), strict=True):
            self.on_latent({"step": self.step, **layer, "kl": kl_Z})

    def check_finite(self, parts: LossParts, norms: dict[str, torch.Tensor]) -> bool:
        """True if loss and gradients are finite. One synchronisation a step: a poisoned run stops at once.

        Under fp16 a non-finite *gradient* is the loss scaler's business (it skips the step and backs off): False, and
        an error only if the scale has already sunk to nothing.

        Raises:
            NonFiniteError: naming the parts.
        """
        values = {"loss": parts.loss, "ce": parts.ce, "kl": parts.kl, "ce_z": parts.ce_z}
        values |= {f"gradient of {name}": norm for name, norm in norms.items()}
        if bool(torch.isfinite(torch.stack([value.float() for value in values.values()])).all()):
            return True
        bad = [name for name, value in values.items() if not math.isfinite(float(value))]
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(float(parts.loss)) and scaler.get_scale() > MIN_LOSS_SCALE:
            return False
        raise NonFiniteError(
            f"step {self.step + 1}: not finite: {', '.join(bad)}; no weight was changed by this step",
            {name: float(value) for name, value in values.items()},
        )

    def batches(self, data: EncodedData, *, epoch: int, evaluation: bool = False, start: int = 0) -> Any:
        """Optimizer steps of an epoch from number `start` on, each a list of micro-batches; evaluation: in order, one
        micro-batch a process each."""
        train, settings = self.config.train, self.config.data
        return steps_of_epoch(
            data,
            epoch=epoch,
            seed=self.config.runtime.seed,
            micro_rows=train.per_device_eval_batch_size if evaluation else self.micro_rows,
            accumulation=self.accelerator.num_processes if evaluation else self.accumulation,
            packing=settings.packing,
            max_length=settings.max_length,
            kl_tokens="real" if evaluation else self.config.ib.kl_tokens,
            pad_to=settings.max_length if settings.pad_to_max_length else None,
            pad_id=self.pad_id,
            shuffle=not evaluation,
            grouped=settings.group_by_length,
            start=start,
        )

    def due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def logs(self, step: int) -> bool:
        """Whether step number `step` (from 1) is logged: every `logging_steps`, the first and the last."""
        return step % self.config.train.logging_steps == 0 or step in (1, self.total_steps)

    def interrupt(self, number: int, _frame: Any = None) -> None:
        """Signal handler: stop after the step under way. A second signal stops at once."""
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = number


def count_steps(data: EncodedData, config: Config, processes: int = 1) -> int:
    """Optimizer steps of one epoch."""
    return num_steps_per_epoch(
        data,
        micro_rows=config.train.per_device_train_batch_size,
        accumulation=config.train.gradient_accumulation_steps * processes,
        packing=config.data.packing,
        max_length=config.data.max_length,
    )


def count_all_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of a run."""
    whole = math.ceil(config.train.num_train_epochs * steps_per_epoch)
    return whole if config.train.max_steps == -1 else config.train.max_steps


class Window:
    """Real tokens and seconds of training since the last reading, and in all; evaluation does not count."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total_tokens, self.total_seconds = 0, 0.0
        self.tokens, self.start = 0, time.perf_counter()

    def restart(self) -> None:
        self.tokens, self.start = 0, self.now()

    def add(self, micro_batches: list[Batch]) -> None:
        self.tokens += sum(batch.num_tokens for batch in micro_batches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        since = self.now()
        yield
        self.start += self.now() - since

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def read(self) -> tuple[int, float]:
        tokens, seconds = self.tokens, self.now() - self.start
        self.total_tokens += tokens
        self.total_seconds += seconds
        self.tokens, self.start = 0, time.perf_counter()
        return tokens, seconds
