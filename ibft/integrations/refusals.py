"""What a Hugging Face Trainer may be asked for and the objective would not do: refused before anything is trained."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ibft.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from transformers import Trainer


def check_trainer(trainer: "Trainer", *, bottleneck: bool, fused_kernels: bool) -> None:
    """Raises ConfigError or SetupError: what the Trainer was asked for and the objective would not do."""
    args = trainer.args
    if args.world_size > 1 or args.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise SetupError(
            f"got {args.world_size} processes and {args.n_gpu} GPUs, expected one device: set CUDA_VISIBLE_DEVICES=0, "
            "and neither deepspeed nor fsdp"
        )
    recompute = args.gradient_checkpointing_kwargs
    reentrant = isinstance(recompute, dict) and bool(recompute.get("use_reentrant"))
    asked: Iterable[tuple[str, bool, str]] = (
        ("model_init", trainer.model_init is not None, "a model"),
        ("label_smoothing_factor", args.label_smoothing_factor != 0, "0"),
        ("compute_loss_func", trainer.compute_loss_func is not None, "none: the objective is the loss"),
        (
            "optimizers: a scheduler",
            bottleneck and trainer.lr_scheduler is not None,
            "the optimizer alone: the bottleneck adds a group to it",
        ),
        (
            "torch_compile",
            bool(args.torch_compile),
            "False: the objective calls the decoder, which would not be compiled",
        ),
        ("use_reentrant=True", reentrant and not fused_kernels, "False: the tapped layer must keep its graph"),
    )
    for name, wrong, expected in asked:
        if wrong:
            raise ConfigError(f"{name}: not supported, expected {expected}")
