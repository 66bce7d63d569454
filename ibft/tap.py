"""Capture one hidden state of a decoder without keeping the others alive.

`output_hidden_states=True` would hold all L+1 of them until the backward; a forward hook on one block holds one tensor,
which that block's output is anyway.
"""

from types import TracebackType
from typing import Any

import torch
from torch import nn

from ibft.errors import ConfigError


def decoder_of(model: nn.Module) -> nn.Module:
    """The Llama-like decoder (embed_tokens, layers, norm) inside a causal LM, PEFT-wrapped or not.

    Raises:
        ConfigError: the model has no such decoder.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    decoder = getattr(base, "model", None)
    if not all(hasattr(decoder, part) for part in ("embed_tokens", "layers", "norm")) or not hasattr(base, "lm_head"):
        raise ConfigError(
            f"{type(base).__name__} is not of the Llama family: "
            "expected model.embed_tokens, model.layers, model.norm and lm_head"
        )
    if any(
        getattr(getattr(base, "config", None), name, None) not in (None, 1, 1.0)
        for name in ("logits_scaling", "logit_scale")
    ):
        raise ConfigError(f"{type(base).__name__} scales its logits, which the objective does not: not supported")
    assert isinstance(decoder, nn.Module)
    return decoder


class HiddenTap:
    """Holds `hidden_states[layer]`, the output of decoder block number `layer` (counted from 1), of the last forward.

        with HiddenTap(model, layer=20) as tap:
            last = model.model(input_ids).last_hidden_state
        tap.hidden        # [B, T, D], part of the autograd graph

    Only forwards inside the `with` are captured. Under gradient checkpointing the block runs again in backward; by then
    the tap is closed, so the tensor that the loss was computed from stays the one held.

    Raises:
        ConfigError: `layer` is not in 1 .. L-1, or the model is not of the Llama family.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        layers = decoder_of(model).layers
        assert isinstance(layers, nn.ModuleList)
        if not 1 <= layer < len(layers):
            raise ConfigError(
                f"ib.layer: got {layer}, expected 1 .. {len(layers) - 1} (the model has {len(layers)} layers)"
            )
        self.layer = layer
        self._block = layers[layer - 1]
        self._hidden: torch.Tensor | None = None
        self._handle: Any = None

    def __enter__(self) -> "HiddenTap":
        self._hidden = None
        self._handle = self._block.register_forward_hook(self._capture)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _capture(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._hidden = output[0] if isinstance(output, tuple) else output

    @property
    def hidden(self) -> torch.Tensor:
        """The captured hidden states [B, T, D]. Raises RuntimeError where no forward ran inside the `with`."""
        if self._hidden is None:
            raise RuntimeError("nothing captured: run the model's forward inside `with tap:` first")
        return self._hidden

    def release(self) -> None:
        """Drop the reference, so that the graph can be freed."""
        self._hidden = None
