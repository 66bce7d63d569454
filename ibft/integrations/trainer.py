"""IB-FT in transformers' Trainer: its loop, its checkpoints, its logs, and our objective.

A mixin before a Trainer in the bases changes what is computed in a training step, and nothing of how it is arranged:

    get_batch_samples    counts the global batch's KL tokens, gives every token the key of its noise, folds the head
    training_step        opens the micro-batch's context until its backward is done (recomputation needs it)
    compute_loss         CE + alpha (KL + beta CE_z) over compacted label rows; while evaluating, the plain CE
    create_optimizer     a parameter group for the bottleneck
    _clip_grad_norm      one norm over model and bottleneck
    _save, _load_*       ib_bottleneck.safetensors beside the adapter
    log                  ce, kl and ce_z beside loss

The Trainer hands over the label tokens of the whole global batch, so its micro-batches' losses add up, however it is
split. The bottleneck is no part of the model: what is saved, merged or generated from is base and LoRA alone.
"""

import logging
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ibft.context import BatchContext, LatentRequest
from ibft.fused import Fused
from ibft.integrations.adopt import adopt, head_of, no_layer_checkpointing
from ibft.integrations.batches import (
    NOISE_COLUMNS,
    check_batch,
    decoder_inputs,
    kl_mask_of,
    noise_ids_of,
    without_noise,
)
from ibft.integrations.config import IBFTConfig
from ibft.integrations.refusals import check_trainer
from ibft.integrations.weights import load_bottleneck, save_bottleneck
from ibft.noise import z_stream
from ibft.objective import IBObjective, LossParts
from ibft.tap import HiddenTap, decoder_of
from ibft_kernels import FoldedHead, Latent

logger = logging.getLogger(__name__)
PARTS = ("ce", "kl", "ce_z")

if TYPE_CHECKING:
    Base = Trainer
else:
    Base = object


class IBFTMixin(Base):
    """Put it before `transformers.Trainer`, or a subclass of it, in a class's bases.

    Args (beside the Trainer's):
        ib: the bottleneck's settings; default: `IBFTConfig()`, the paper's weights at two thirds of the depth.
        fused_kernels: fused attention, MLP, norms and tap, and LoRA dropout keyed by the sample; False: the model's own
            forwards. What the fast path does not know keeps its own; a warning says what and why.

    Attributes:
        objective: the `IBObjective`, with its bottleneck. fused: `ibft.fused.Fused`, or None.

    Raises:
        ConfigError: a setting of `ib` or of the Trainer that does not go together with the model or the objective.
        SetupError: several processes or GPUs.
    """

    loss_is_scaled_for_ga = True  # for releases of transformers that ask

    def __init__(self, *args: Any, ib: IBFTConfig | None = None, fused_kernels: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ib = ib or IBFTConfig()
        check_trainer(self, bottleneck=self.ib.alpha > 0, fused_kernels=fused_kernels)
        self.model_accepts_loss_kwargs = True  # so that it counts the global batch's labels
        adopted = adopt(
            self.causal_lm,
            self.ib,
            seed=self.args.seed,
            device=self.args.device,
            fused_kernels=fused_kernels,
            checkpointing=bool(self.args.gradient_checkpointing),
        )
        self.context: BatchContext = adopted.context
        self.fused: Fused | None = adopted.fused
        self.objective: IBObjective = adopted.objective
        self.taps: list[HiddenTap] = adopted.taps
        self.epochs = Epochs()
        self.add_callback(self.epochs)
        if self.fused is not None:
            self.add_callback(OwnCheckpointing())
            for notice in self.fused.notices():
                logger.warning(notice)
        self._plain = IBObjective(None, alpha=0.0)
        self._kl_tokens = torch.ones(())  # of the global batch under way
        self._folds: list[FoldedHead | None] = []
        self._micro_batches = 0  # of it, still to come
        self._sums: Tensor | float = 0.0  # of `PARTS`, since the last log
        self._steps = 0

    @property
    def bottleneck(self) -> nn.Module | None:
        return self.objective.bottleneck

    @property
    def causal_lm(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    # --- the step ---------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, each with its `noise_ids`, and the label tokens of them all."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self.begin_step(batches, num_items)
        return batches, num_items

    def begin_step(self, batches: list[Any], label_tokens: Any) -> None:
        self.objective.zero_grad()  # the Trainer knows of the model's gradients alone
        self.objective.alpha = self.alpha
        self._steps, self._micro_batches = self._steps + 1, len(batches)
        rows = 0
        for batch in batches:
            check_batch(batch)
            batch["noise_ids"] = noise_ids_of(
                batch, epoch=self.epochs.number, step=self.state.global_step, first_row=rows
            )
            rows += len(batch["input_ids"])
        counts = torch.stack([kl_mask_of(batch, self.ib.kl_tokens).sum() for batch in batches])
        self._kl_tokens = counts.sum().clamp(min=1)
        with self.accelerator.autocast():
            head, tokens = head_of(self.causal_lm), int(label_tokens)
            self._folds = [self.objective.fold(head, tokens, index) for index in range(len(self.taps))]

    @property
    def alpha(self) -> float:
        """Of the step to come."""
        rising = math.ceil(self.ib.alpha_warmup_ratio * self.state.max_steps)
        return self.ib.alpha * min(1.0, (self.state.global_step + 1) / max(rising, 1))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch, forward and backward; `inputs` as `get_batch_samples` gives them."""
        inputs = self._prepare_inputs(inputs)
        with self.context.batch(inputs["noise_ids"], None, self.request(inputs)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches -= 1
        if self._micro_batches == 0:
            for fold in self._folds:
                if fold is not None:
                    fold.backward()
        return loss

    def request(self, inputs: Any) -> LatentRequest | None:
        """What the tapped block is asked for, where it is fused with the bottleneck."""
        if self.fused is None or not self.fused.taps_fused:
            return None
        return self.objective.request(
            kl_mask=kl_mask_of(inputs, self.ib.kl_tokens),
            seed=self.context.key(z_stream(0)),
            noise_ids=inputs["noise_ids"],
            kl_normalizer=self._kl_tokens,
        )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Inside `training_step` the objective's share of this micro-batch; else the Trainer's own loss."""
        if self.context.noise_ids is None:
            plain = without_noise(inputs)
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch=num_items_in_batch)
        parts = self.micro_batch_loss(inputs, num_items_in_batch)
        self._sums = self._sums + torch.stack([getattr(parts, name).float() for name in PARTS])
        return (parts.loss, {"loss": parts.loss}) if return_outputs else parts.loss

    def micro_batch_loss(self, inputs: Any, label_tokens: Any) -> LossParts:
        """label_tokens: of the whole global batch; without any its loss is zero, not 0 / 0. None: this one's own."""
        if isinstance(label_tokens, Tensor):
            label_tokens = label_tokens.clamp(min=1)
        with self.accelerator.autocast():  # the decoder is called itself: no wrapper of the model's forward is met
            last, tapped = self.hidden_states(inputs)
            parts: LossParts = self.objective(
                last,
                tapped,
                head_of(self.causal_lm),
                labels=inputs["labels"],
                kl_mask=kl_mask_of(inputs, self.ib.kl_tokens),
                seed=[self.context.key(z_stream(index)) for index in range(len(self.taps))],
                noise_ids=inputs["noise_ids"],
                label_normalizer=label_tokens,
                kl_normalizer=self._kl_tokens,
                fold=self._folds,
            )
            return parts

    def hidden_states(self, inputs: Any) -> tuple[Tensor, list[Tensor | Latent]]:
        """[B, T, D] after the final norm, and of each tapped layer; no logits."""
        decoder = decoder_of(self.causal_lm)
        if self.context.request is not None:
            last = decoder(**decoder_inputs(inputs), use_cache=False).last_hidden_state
            assert self.context.request.latent is not None
            return last, [self.context.request.latent]
        with ExitStack() as open_taps:
            for tap in self.taps:
                open_taps.enter_context(tap)
            last = decoder(**decoder_inputs(inputs), use_cache=False).last_hidden_state
        tapped: list[Tensor | Latent] = [tap.hidden for tap in self.taps]
        for tap in self.taps:
            tap.release()
        return last, tapped

    # --- optimizer --------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, and a last parameter group for the bottleneck (with the arguments' weight decay)."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        fresh = [each for each in self.objective.parameters() if each.requires_grad and id(each) not in known]
        if fresh:
            rate = self.args.learning_rate if self.ib.learning_rate is None else self.ib.learning_rate
            optimizer.add_param_group({"params": fresh, "lr": rate, "weight_decay": self.args.weight_decay})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(nn.ModuleList([model, self.objective]))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(nn.ModuleList([model, self.objective]), grad_norm=grad_norm)

    # --- evaluation -------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Where only the loss is asked for, no logits are made: the mean cross-entropy of the batch's label tokens."""
        if not prediction_loss_only or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        check_batch(inputs)
        with torch.no_grad(), self.accelerator.autocast():
            last = decoder_of(self.causal_lm)(**decoder_inputs(inputs), use_cache=False).last_hidden_state
            return self._plain(last, None, head_of(self.causal_lm), labels=inputs["labels"]).ce, None, None

    # --- files and logs ---------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns  # the dataset's columns that reach the collator
        columns += [name for name in NOISE_COLUMNS if name not in columns]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.bottleneck is not None and self.args.should_save:
            save_bottleneck(output_dir or str(self.args.output_dir), self.bottleneck)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.bottleneck is not None:
            load_bottleneck(resume_from_checkpoint, self.bottleneck)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.bottleneck is not None:
            load_bottleneck(str(self.state.best_model_checkpoint), self.bottleneck)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of ce, kl and ce_z over the steps since the last training log."""
        if "loss" in logs and self._steps and isinstance(self._sums, Tensor):
            means = dict(zip(PARTS, (self._sums / self._steps).tolist(), strict=True))
            logs |= means if self.bottleneck is not None else {"ce": means["ce"]}
            self._sums, self._steps = 0.0, 0
        super().log(logs, *args, **kwargs)


class IBFTTrainer(IBFTMixin, Trainer):
    """`transformers.Trainer` for a causal LM of the Llama family, with an information bottleneck: see `IBFTMixin`."""


class Epochs(TrainerCallback):
    """Counts passes over the data from 0. `state.epoch` does so only where the Trainer knows how long one is: of an
    iterable data set it takes `max_steps` for the length.
    """

    number = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number = int(state.epoch or 0) - 1  # more than 0: resumed

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.number += 1


class OwnCheckpointing(TrainerCallback):
    """The fused layers have gradient checkpointing of their own; the Trainer switches the model's on in `train`."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        no_layer_checkpointing(decoder_of(model))
