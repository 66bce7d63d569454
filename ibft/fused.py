"""The fast path: a loaded model's attention, MLP and norms replaced, instance by instance, by fused autograd nodes.

    x                 = rms_norm(h)                                  frozen weight: no dW
    q, k, v           = lora_qkv(x)                                  one node, one dropout mask
    q, k              = rotate(q_norm(q), k_norm(k))                 (norms: Qwen3)
    a                 = lora_linear(packed_attention(q, k, v))
    x, h              = add_rms_norm(a, h)
    h                 = h + lora_mlp(x)
    h, z, KL          = ib_lora_mlp(x, h)                            in the tapped block

The parameters stay where PEFT put them, so saving, merging, disabling an adapter and generation work as before. What
the fast path does not know (DoRA, a second adapter, another architecture) keeps PEFT's own forward, and `fuse` says
which module and why. One dropout mask for q, k, v, and one for gate and up: PEFT draws one a module.

Legend: B batch, T positions, N = B*T tokens, D hidden size, d head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ibft.attention import packed_attention
from ibft.bottleneck import autocast_dtype
from ibft.context import BatchContext
from ibft.nf4 import Linear4bitWeight, NF4Linear, is_linear4bit, why_not_nf4
from ibft.noise import SampleDropout
from ibft.tap import decoder_of
from ibft_kernels import (
    Dropout,
    LoraProjection,
    LoraShadow,
    MlpShadow,
    add_rms_norm,
    ib_bottleneck_latent,
    ib_lora_mlp,
    lora_linear,
    lora_mlp,
    lora_qkv,
    refresh_shadows,
    rms_norm,
    rotate,
)

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # whose attention, MLP, norm and block this file knows
ADAPTER = "default"


# --- one linear layer -----------------------------------------------------------------------------


def why_not_linear(module: nn.Module) -> str | None:
    """Why the fast path cannot stand in for this linear layer; None if it can."""
    from peft.tuners.lora import LoraLayer

    base = module
    if isinstance(module, LoraLayer):
        base = module.get_base_layer()
        adapters = list(module.lora_A)
        if adapters != [ADAPTER]:
            return f"adapters {', '.join(adapters)}"
        if module.use_dora.get(ADAPTER):
            return "DoRA"
        if module.lora_variant:
            return f"LoRA variant {type(module.lora_variant[ADAPTER]).__name__}"
        if module.lora_bias.get(ADAPTER):
            return "a bias in LoRA's B"
        if not isinstance(module.lora_dropout[ADAPTER], SampleDropout | nn.Identity):
            return f"{type(module.lora_dropout[ADAPTER]).__name__} in place of SampleDropout"
    if is_linear4bit(base):
        return why_not_nf4(base)
    if type(base) not in (nn.Linear, NF4Linear):
        return f"a {type(base).__module__}.{type(base).__name__}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "base weights that train"
    return None


def projection_of(module: nn.Module) -> LoraProjection:
    """The frozen layer and its adapter, as the kernels read them."""
    lora: Any = module
    base: Any = lora.get_base_layer() if hasattr(lora, "get_base_layer") else lora
    weight = base if isinstance(base, NF4Linear) else Linear4bitWeight(base) if is_linear4bit(base) else base.weight
    if base is lora:
        return LoraProjection(weight, base.bias)
    a, b, scale = lora.lora_A[ADAPTER], lora.lora_B[ADAPTER], lora.scaling[ADAPTER]
    return LoraProjection(weight, base.bias, a.weight, b.weight, scale)


class SharedInput:
    """The linear layers that read one input: their projections, their shadow, their dropout."""

    def __init__(self, *modules: Any) -> None:
        self.modules = modules
        self.projections = [projection_of(module) for module in modules]
        self.base_only = [LoraProjection(p.weight, p.bias) for p in self.projections]
        self.shadow: LoraShadow | None = None
        self.bare: LoraShadow | None = None

    def changed(self) -> bool:
        """Whether PEFT has put other parameters or another scaling into the modules since (a new adapter of the same
        name, `set_scale`).
        """
        for module, p in zip(self.modules, self.projections, strict=True):
            if p.lora_a is not None and (
                module.lora_A[ADAPTER].weight is not p.lora_a
                or module.lora_B[ADAPTER].weight is not p.lora_b
                or module.scaling[ADAPTER] != p.scaling
            ):
                return True
        return False

    @property
    def adapted(self) -> bool:
        """False while PEFT has the adapter disabled, or merged into the base."""
        loras = [module for module in self.modules if hasattr(module, "lora_A")]
        return bool(loras) and not any(module.disable_adapters or module.merged for module in loras)

    def current(self, dtype: torch.dtype) -> tuple[list[LoraProjection], LoraShadow, Dropout | None]:
        """Projections, shadow in `dtype`, and this micro-batch's dropout."""
        if not self.adapted:
            if self.bare is None or self.bare.dtype != dtype:
                self.bare = LoraShadow(self.base_only, dtype)
            return self.base_only, self.bare, None
        if self.changed():
            self.projections, self.shadow = [projection_of(module) for module in self.modules], None
        if self.shadow is None or self.shadow.dtype != dtype:
            self.shadow = LoraShadow(self.projections, dtype)
        return self.projections, self.shadow, self.dropout()

    def dropout(self) -> Dropout | None:
        for module in self.modules:
            if hasattr(module, "lora_dropout") and isinstance(module.lora_dropout[ADAPTER], SampleDropout):
                return module.lora_dropout[ADAPTER].settings()
        return None

    @property
    def foreign(self) -> bool:
        """Whether another adapter than the one that was fused is active: PEFT's own forward must run."""
        loras = [module for module in self.modules if hasattr(module, "lora_A")]
        return any(module.active_adapters != [ADAPTER] and not module.disable_adapters for module in loras)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return autocast_dtype(x.device.type) or x.dtype


# --- modules --------------------------------------------------------------------------------------


class FusedNorm:
    """Stands in for the forward of a frozen RMSNorm."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.norm.weight, self.norm.variance_epsilon)


class FusedAttention:
    """Stands in for the forward of a Llama-like attention module."""

    def __init__(self, attention: Any, context: BatchContext) -> None:
        self.attention, self.context = attention, context
        self.qkv = SharedInput(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = SharedInput(attention.o_proj)
        self.window = getattr(attention, "sliding_window", None)
        if type(attention).__name__.startswith("Mistral"):
            self.window = getattr(attention.config, "sliding_window", None)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As the module's own: [B, T, D] to ([B, T, D], None)."""
        if self.qkv.foreign or self.out.foreign:
            return type(self.attention).forward(
                self.attention, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        module, d = self.attention, self.attention.head_dim
        B, T, _ = hidden_states.shape
        x = hidden_states.to(compute_dtype(hidden_states))
        projections, shadow, dropout = self.qkv.current(x.dtype)
        q, k, v = (y.view(B * T, -1, d) for y in lora_qkv(x, *projections, dropout=dropout, shadow=shadow))
        if hasattr(module, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        cos, sin = (table.expand(B, -1, -1).reshape(B * T, d).to(q.dtype) for table in position_embeddings)
        q, k = rotate(q, k, cos, sin)

        segments = self.context.segments
        if segments is not None and past_key_values is None and not (module.training and module.attention_dropout):
            attended = packed_attention(q, k, v, segments, scale=module.scaling, window=self.window).view(B, T, -1)
        else:
            q, k, v = (y.view(B, T, -1, d).transpose(1, 2) for y in (q, k, v))
            attended = self._masked(q, k, v, attention_mask, past_key_values, **kwargs).reshape(B, T, -1)
        (projection,), shadow, dropout = self.out.current(x.dtype)
        return lora_linear(attended, projection, dropout=dropout, shadow=shadow), None

    def _masked(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, cache: Any, **kwargs: Any
    ) -> torch.Tensor:
        """transformers' attention function, with its mask: padded rows, and generation."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        module = self.attention
        if cache is not None:
            k, v = cache.update(k, v, module.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, ALL_ATTENTION_FUNCTIONS["sdpa"]
        )
        out, _ = attend(
            module, q, k, v, mask, dropout=module.attention_dropout if module.training else 0.0,
            scaling=module.scaling, sliding_window=self.window, **kwargs,
        )  # fmt: skip
        return out


class FusedMlp:
    """Stands in for the forward of a gated MLP; `recompute` frees gate and up until backward."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self.wide, self.down = SharedInput(mlp.gate_proj, mlp.up_proj), SharedInput(mlp.down_proj)
        self.recompute = False

    def arguments(self, x: torch.Tensor) -> tuple[list[LoraProjection], dict[str, Any]]:
        wide, wide_shadow, dropout = self.wide.current(x.dtype)
        down, down_shadow, down_dropout = self.down.current(x.dtype)
        return [*wide, *down], {
            "dropout": dropout, "down_dropout": down_dropout, "shadow": MlpShadow(wide_shadow, down_shadow),
            "recompute": self.recompute,
        }  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.wide.foreign or self.down.foreign:
            return type(self.mlp).forward(self.mlp, x)
        x = x.to(compute_dtype(x))
        projections, settings = self.arguments(x)
        return lora_mlp(x, *projections, **settings)

    def tapped(self, x: torch.Tensor, residual: torch.Tensor, context: BatchContext) -> torch.Tensor:
        """residual + mlp(x) [B, T, D], and the latent that the context asks for."""
        request = context.request
        assert request is not None
        dtype = compute_dtype(x)
        if residual.dtype == dtype and not (self.wide.foreign or self.down.foreign):
            x = x.to(dtype)
            projections, settings = self.arguments(x)
            hidden, latent = ib_lora_mlp(x, residual, *projections, *request.encoder, **settings, **request.settings)
        else:  # a wider residual stream than the products, or another adapter
            hidden = residual + self(x)
            latent = ib_bottleneck_latent(hidden.to(dtype), *request.encoder, **request.settings)
        if request.latent is None:  # a recomputation in backward gives its own: the loss has the first
            request.latent = latent
        return hidden


class FusedBlock:
    """Stands in for the forward of a decoder block whose parts are all fused."""

    def __init__(self, block: Any, mlp: FusedMlp, context: BatchContext, *, tapped: bool) -> None:
        self.block, self.mlp, self.context, self.tapped = block, mlp, context, tapped

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        block = self.block
        attended, _ = block.self_attn(block.input_layernorm(hidden_states), *args, **kwargs)
        norm = block.post_attention_layernorm
        # the residual stream keeps its dtype, as transformers' does under autocast
        attended = attended.to(hidden_states.dtype)
        x, hidden = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
        if self.tapped and self.context.request is not None:
            return self.mlp.tapped(x, hidden, self.context)
        return hidden + block.mlp(x)


# --- a model --------------------------------------------------------------------------------------


@dataclass
class Fused:
    """What `fuse` did to a model.

    taps_fused: the tapped block answers `BatchContext.request`. packs: every attention reads `BatchContext.segments`,
    so transformers need make no mask.
    """

    shared: list[SharedInput] = field(default_factory=list)
    mlps: list[FusedMlp | None] = field(default_factory=list)  # one a layer
    left_alone: dict[str, str] = field(default_factory=dict)  # module: why
    taps_fused: bool = False
    packs: bool = True
    _held: bool = False

    def refresh(self) -> None:
        """Round the masters for the products: before the first micro-batch of a step, and before an evaluation."""
        if not self._held:
            refresh_shadows(shared.shadow for shared in self.shared if shared.shadow is not None)

    def before_forward(self, *_: Any) -> None:
        """The decoder's forward pre-hook; a method, so that a copied or pickled model has its own."""
        self.refresh()

    def notices(self) -> list[str]:
        """One line a reason for what was left alone, naming the modules."""
        lines = []
        for reason in dict.fromkeys(self.left_alone.values()):
            names = [name for name, why in self.left_alone.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{names[0]}{more}: PEFT's own forward, without the fused kernels ({reason})")
        return lines

    @contextmanager
    def held(self) -> Iterator[None]:
        """No refresh inside: between the micro-batches of a step the masters do not change."""
        self.refresh()
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before


def fuse(model: nn.Module, context: BatchContext, *, tapped_layer: int | None = None) -> Fused:
    """Give every module of `model` that the fast path knows its fused forward; the others keep theirs.

    Args:
        model: a PEFT-wrapped (or plain) Llama-family causal LM, frozen but for LoRA.
        context: the run's; the modules look there for noise ids, segments and the tap's request.
        tapped_layer: the block (counted from 1) that `ib_lora_mlp` ends, or None.

    The masters are rounded before every forward of the decoder, except inside `Fused.held()`.
    """
    decoder: Any = decoder_of(model)
    fused = Fused()
    for index, block in enumerate(decoder.layers):
        attention, mlp = _fuse_attention(block, context, fused, index), _fuse_mlp(block, fused, index)
        fused.mlps.append(mlp)
        norms = all(
            _fuse_norm(getattr(block, name), fused, f"layers.{index}.{name}")
            for name in ("input_layernorm", "post_attention_layernorm")
        )
        if attention and mlp is not None and norms and _known(block, "DecoderLayer"):
            tapped = index + 1 == tapped_layer
            block.forward = FusedBlock(block, mlp, context, tapped=tapped)
            fused.taps_fused = fused.taps_fused or tapped
    _fuse_norm(decoder.norm, fused, "norm")
    decoder.register_forward_pre_hook(fused.before_forward)
    return fused


def _known(module: nn.Module, suffix: str) -> bool:
    return type(module).__name__ in {f"{family}{suffix}" for family in FAMILIES}


def _refused(modules: Sequence[nn.Module]) -> str | None:
    return next((why for module in modules if (why := why_not_linear(module)) is not None), None)


def _fuse_attention(block: Any, context: BatchContext, fused: Fused, index: int) -> bool:
    attention, name = block.self_attn, f"layers.{index}.self_attn"
    if not _known(attention, "Attention"):
        why: str | None = f"the architecture {type(attention).__name__}"
    else:
        why = _refused([attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj])
    if why is None and not all(
        _fuse_norm(getattr(attention, norm), fused, f"{name}.{norm}")
        for norm in ("q_norm", "k_norm")
        if hasattr(attention, norm)
    ):
        why = "its q and k norms"
    if why is not None:
        fused.left_alone[name], fused.packs = why, False
        return False
    if attention.attention_dropout:  # only transformers' attention drops, and under a mask of its own
        fused.packs = False
    attention.forward = stand_in = FusedAttention(attention, context)
    fused.shared += [stand_in.qkv, stand_in.out]
    return True


def _fuse_mlp(block: Any, fused: Fused, index: int) -> FusedMlp | None:
    mlp, name = block.mlp, f"layers.{index}.mlp"
    if not _known(mlp, "MLP"):
        why: str | None = f"the architecture {type(mlp).__name__}"
    elif not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
        why = f"the activation {type(mlp.act_fn).__name__}"
    else:
        why = _refused([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
    if why is not None:
        fused.left_alone[name] = why
        return None
    stand_in = FusedMlp(mlp)
    mlp.forward = stand_in
    fused.shared += [stand_in.wide, stand_in.down]
    return stand_in


def _fuse_norm(norm: Any, fused: Fused, name: str) -> bool:
    if not _known(norm, "RMSNorm"):
        fused.left_alone[name] = f"the architecture {type(norm).__name__}"
        return False
    if norm.weight.requires_grad:
        fused.left_alone[name] = "a norm that trains"
        return False
    norm.forward = FusedNorm(norm)
    return True
