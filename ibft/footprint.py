"""What a training step holds in memory under a plan, and what it computes: each number has one formula, here.

From the base's config.json and our `Config` alone: no weights, no device. Held against measured steps by
tests/test_plan.py. A step's peak is what stays all the time plus the widest of a few moments:

    always      base, adapters and their shadows, optimizer state, bottleneck, folded head, buffers that are kept
    head        what every block keeps, the logits' chunk, gradients made for the heads
    block i     what blocks 1 .. i keep, and the rest of what block i's backward needs (made again, if not kept)
    fold        all gradients, and the folded head's on its way to the up-projection
    evaluation  no gradients, but its own number of rows

Backward starts at the last block, when nothing is freed yet. So its peak is that of block L as a rule, blocks are
recomputed from the first one up, and the last one comes last: its activations are needed at the peak in any case.

Legend: N tokens of a micro-batch, M of them labelled, T tokens a row, D hidden size, I intermediate size, Q = Hq d and
K = Hkv d widths of queries and of keys (values), R LoRA rank, Z latent size, V vocabulary, L blocks, e bytes an element
of the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ibft.config import BUNDLED, Config
from ibft.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from ibft.data.encode import EncodedData

__all__ = [
    "CUDA_CONTEXT",
    "GIB",
    "Estimate",
    "Load",
    "ModelShape",
    "Plan",
    "Recompute",
    "Setup",
    "estimate",
    "flops",
    "recompute_flops",
]

Recompute = Literal["none", "mlp", "full"]

GIB = 1 << 30
CUDA_CONTEXT = int(0.6 * GIB)  # what driver, context and library workspaces take of a card before the first tensor
IN_FLIGHT = 3  # offloaded block inputs on the device at a time: two on their way out (or back) and the one in use
DATA_BYTES = 8 + 8 + 12 + 1 + 8  # of a token: ids, positions and targets, noise ids of 12, a mask
# The CPU's attention scores so many elements a product, of so many queries a head (ibft/attention_cpu.py, whose import
# takes torch's)
SCORES_BUDGET, BLOCK_TOKENS = 2**18, 48
# The CPU's attention pads segments of like length to the longest (ibft/attention_cpu.py): a tenth as a rule.
CPU_SEGMENT_PADDING = 1.1


# --- the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-family causal LM."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_drops: bool = False

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From a transformers config.

        Raises:
            ConfigError: not of the Llama family. SetupError: sizes that no model has.
        """
        sizes: dict[str, Any] = {
            name: getattr(config, name, None)
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        }
        if missing := [name for name, size in sizes.items() if not isinstance(size, int)]:
            raise ConfigError(
                f"{type(config).__name__} is not of the Llama family: expected a number under {', '.join(missing)}"
            )
        heads = sizes["num_attention_heads"]
        kv_heads = getattr(config, "num_key_value_heads", None)
        sizes["num_key_value_heads"] = heads if kv_heads is None else kv_heads
        if wrong := {name: size for name, size in sizes.items() if size < 1}:
            listed = ", ".join(f"{name}: {size}" for name, size in wrong.items())
            raise SetupError(f"the model's config.json has {listed}; expected 1 or more")
        kind = str(getattr(config, "model_type", ""))
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            hidden=sizes["hidden_size"],
            intermediate=sizes["intermediate_size"],
            layers=sizes["num_hidden_layers"],
            vocab=sizes["vocab_size"],
            heads=heads,
            kv_heads=sizes["num_key_value_heads"],
            head_dim=getattr(config, "head_dim", None) or sizes["hidden_size"] // heads,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            qkv_bias=bias or kind == "qwen2",  # which its config does not say
            out_bias=bias and kind != "qwen2",
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
            attention_drops=bool(getattr(config, "attention_dropout", 0)),
        )

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's linear layers."""
        D, F, Q, K = self.hidden, self.intermediate, self.q_width, self.kv_width
        return {
            "q_proj": (Q, D), "k_proj": (K, D), "v_proj": (K, D), "o_proj": (D, Q),
            "gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F),
        }  # fmt: skip

    @property
    def linear_parameters(self) -> int:
        """Weights of one block's linear layers."""
        return sum(out * width for out, width in self.linears.values())

    @property
    def small_parameters(self) -> int:
        """Norms and biases of the whole model: what is never quantised, embeddings and head apart."""
        D, F, Q, K = self.hidden, self.intermediate, self.q_width, self.kv_width
        block = 2 * D + (Q + 2 * K) * self.qkv_bias + D * self.out_bias + (2 * F + D) * self.mlp_bias
        return self.layers * (block + 2 * self.head_dim * self.qk_norm) + D

    @property
    def table_parameters(self) -> int:
        """One [V, D] table: the embeddings, or the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        tables = self.table_parameters * (1 if self.tied else 2)
        return self.layers * self.linear_parameters + self.small_parameters + tables


# --- the step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What one optimizer step is given, at its widest.

    Attributes:
        rows, length: B and T of a micro-batch. labels: M of a micro-batch. accumulation: micro-batches a step.
        squares: sum of the squared segment lengths of a micro-batch, for attention's arithmetic.
        masked: rows are padded and share an attention mask (not packed, and more than one length).
        eval_rows: rows of an evaluation's batch; 0 without evaluation.
    """

    rows: int
    length: int
    labels: int
    accumulation: int
    squares: int
    masked: bool = False
    eval_rows: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @classmethod
    def of(cls, config: Config, data: EncodedData | None = None) -> Load:
        """Of the configured rows at their full length; of the data's longest and its share of labels, where known."""
        settings, train = config.data, config.train
        rows, length = train.per_device_train_batch_size, settings.max_length
        share, segment = 1.0, float(length)
        masked = not settings.packing and (rows > 1 or settings.pad_to_max_length)
        if data is not None and data.num_tokens:
            lengths = data.lengths
            longest = int(min(length, lengths.sum() if settings.packing else lengths.max()))
            length = length if settings.pad_to_max_length else longest
            share = data.num_label_tokens / data.num_tokens
            segment = float((lengths**2).sum() / lengths.sum())  # of the segment that a token finds itself in
        evaluates = settings.eval_path is not None or settings.path == BUNDLED or settings.val_size > 0
        tokens = rows * length
        return cls(
            rows=rows,
            length=length,
            labels=math.ceil(share * tokens),
            accumulation=train.gradient_accumulation_steps,
            squares=round(tokens * min(segment, length)),
            masked=masked,
            eval_rows=train.per_device_eval_batch_size if evaluates else 0,
        )


@dataclass(frozen=True)
class Setup:
    """A model, a configuration and the kind of device, before any plan. `tapped`: the blocks with a bottleneck."""

    shape: ModelShape
    config: Config
    device: Literal["cpu", "cuda"]
    itemsize: int
    load: Load
    tapped: tuple[int, ...]

    @classmethod
    def of(
        cls, shape: ModelShape, config: Config, device: str, itemsize: int | None = None, load: Load | None = None
    ) -> Setup:
        """itemsize: default that of `train.mixed_precision`, whose auto is bf16 on a GPU and fp32 on a CPU."""
        if itemsize is None:
            wide = {"fp32": True, "auto": device == "cpu"}.get(config.train.mixed_precision, False)
            itemsize = 4 if wide else 2
        layer = round(2 * shape.layers / 3) if config.ib.layer == "auto" else config.ib.layer
        tapped: tuple[int, ...] = layer if isinstance(layer, tuple) else (layer,)
        if config.ib.alpha == 0:
            tapped = ()
        kind: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
        return cls(shape, config, kind, itemsize, Load.of(config) if load is None else load, tapped)

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def by_segments(self) -> bool:
        """Whether training attends by segments: attention's own dropout is left to transformers."""
        return self.config.data.packing and not self.shape.attention_drops

    @property
    def masked(self) -> bool:
        """Whether rows share transformers' attention mask."""
        return self.load.masked or (self.config.data.packing and not self.by_segments)

    def targets(self, *names: str) -> int:
        """How many of these linear layers have LoRA."""
        return sum(name in self.config.lora.target_modules for name in names)

    @property
    def adapter_parameters(self) -> int:
        """LoRA's of one block."""
        return self.config.lora.r * sum(
            out + width for name, (out, width) in self.shape.linears.items() if self.targets(name)
        )

    @property
    def bottleneck_tensors(self) -> list[int]:
        """Elements of each parameter of encoder and up-projection, of all bottlenecks; none without one."""
        D, Z, ib = self.shape.hidden, self.config.ib.latent_dim, self.config.ib
        width = ib.mlp_dim or 2 * Z
        encoder = [2 * Z * D, 2 * Z] if ib.encoder != "mlp" else [width * D, width, 2 * Z * width, 2 * Z]
        return [*encoder, D * Z, D] * len(self.tapped)

    @property
    def folds(self) -> bool:
        """Whether a latent head is one [V, Z] matrix a step, or two products each time."""
        from ibft_kernels import fold_pays

        step_labels = self.load.labels * self.load.accumulation
        return bool(self.tapped) and fold_pays(step_labels, self.shape.hidden, self.config.ib.latent_dim)


@dataclass(frozen=True)
class Plan:
    """One mode a block (see ibft/recompute.py), and what waits in host memory."""

    modes: tuple[Recompute, ...]
    activation_offloading: bool = False
    offload_embeddings: bool = False

    def count(self, mode: Recompute) -> int:
        return self.modes.count(mode)

    def describe(self) -> str:
        """For the line that a run prints, e.g. "12 of 30 layers recompute their MLP"."""
        total, parts = len(self.modes), []
        if full := self.count("full"):
            where = "every layer is" if full == total else f"{full} of {total} layers {'is' if full == 1 else 'are'}"
            parts.append(f"{where} recomputed" + (", inputs in host memory" if self.activation_offloading else ""))
        if wide := self.count("mlp"):
            who = "every layer" if wide == total else (f"{wide} more" if full else f"{wide} of {total} layers")
            one = wide in (1, total)
            parts.append(f"{who} {'recomputes its' if one else 'recompute their'} MLP")
        if not parts:
            parts.append("no recomputation")
        if self.offload_embeddings:
            parts.append("embeddings in host memory")
        return "; ".join(parts)


# --- bytes: always there --------------------------------------------------------------------------


def nf4_bytes(out: int, width: int) -> int:
    """A weight in NF4 with double quantisation: 4 bits an element; an absmax a block of 64, itself 8 bits; the absmax
    of 256 of these in fp32; two tables and an offset in fp32.
    """
    blocks = math.ceil(out * width / 64)
    return math.ceil(out * width / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)


def weight_bytes(s: Setup, plan: Plan) -> int:
    """The base on the device. Embeddings and head stay in the compute dtype; tied, they are one table."""
    shape, e = s.shape, s.itemsize
    if s.config.model.quantization == "nf4":
        linears = shape.layers * sum(nf4_bytes(*size) for size in shape.linears.values())
    else:
        linears = shape.layers * shape.linear_parameters * e
    tables = 1 if shape.tied or (plan.offload_embeddings and not s.on_cpu) else 2
    return linears + (shape.small_parameters + tables * shape.table_parameters) * e


def adapter_bytes(s: Setup) -> int:
    """LoRA's masters in fp32, and the shadows in the compute dtype that the products read."""
    return s.shape.layers * s.adapter_parameters * (4 + s.itemsize)


def state_bytes(s: Setup, tensors: Sequence[int]) -> int:
    """Adam's two moments of parameters with so many elements each."""
    if s.config.train.optim == "adamw_torch_fused":
        return 8 * sum(tensors)
    # bitsandbytes: a byte each and an fp32 absmax per 256, but fp32 for tensors below 4096 elements
    return sum(8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in tensors)


def optimizer_bytes(s: Setup) -> int:
    r = s.config.lora.r
    a_and_b = [r * side for name, (out, width) in s.shape.linears.items() if s.targets(name) for side in (width, out)]
    return s.shape.layers * state_bytes(s, a_and_b)


def bottleneck_bytes(s: Setup) -> int:
    """Masters, gradients (from the first micro-batch on) and moments: 16 bytes a parameter with 32-bit Adam."""
    return 8 * sum(s.bottleneck_tensors) + state_bytes(s, s.bottleneck_tensors)


def buffer_bytes(s: Setup) -> int:
    """On a GPU one weight at a time is dequantised, into a buffer that all layers share (ibft/nf4.py)."""
    if s.on_cpu or s.config.model.quantization != "nf4":
        return 0
    return max(out * width for out, width in s.shape.linears.values()) * s.itemsize


def data_bytes(s: Setup) -> int:
    """A micro-batch on the device."""
    return s.load.tokens * DATA_BYTES + 16 * s.load.labels


def chunk_bytes(s: Setup, rows: int) -> tuple[int, int]:
    """(bytes of the buffer of logits, rows in it) where `rows` rows have a label."""
    from ibft_kernels.ops.linear_cross_entropy import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES, chunk_rows

    step = chunk_rows(rows, s.shape.vocab, s.itemsize, CPU_CHUNK_BYTES if s.on_cpu else DEVICE_CHUNK_BYTES)
    return step * s.shape.vocab * s.itemsize, step


# --- bytes: what a block keeps for backward -------------------------------------------------------


@dataclass(frozen=True)
class BlockBytes:
    """What a block's nodes save, by part. none = all of it; mlp = without `wide`; full = the input alone."""

    input: int
    attention: int
    mlp: int
    wide: int

    @property
    def whole(self) -> int:
        return self.input + self.attention + self.mlp + self.wide


def block_bytes(s: Setup) -> BlockBytes:
    """Of a block in the middle, all per token but the attention mask.

    An adapted layer saves its input and x A^T (`lora.py`); the torch path also saves dropout's mask, a byte an element,
    which the Triton path makes again. A norm saves its input, shared with the residual stream, and a number a row.
    """
    shape, e, r = s.shape, s.itemsize, s.config.lora.r
    D, F, Q, K = shape.hidden, shape.intermediate, shape.q_width, shape.kv_width
    mask = 1 if s.on_cpu and s.config.lora.dropout > 0 else 0
    qkv, out = s.targets("q_proj", "k_proj", "v_proj"), s.targets("o_proj")
    wide, down = s.targets("gate_proj", "up_proj"), s.targets("down_proj")

    attention = (D * (e + mask) + qkv * r * e if qkv else 0) + (Q * mask + r * e if out else 0)
    attention += _attention_core(s) + D * e + 4  # and the residual stream after it, which the second norm saves
    if shape.qk_norm:
        attention += (Q + K) * e + 4 * (shape.heads + shape.kv_heads)
    mlp = D * e + wide * r * e + (D * mask if wide else 0) + (F * mask + r * e if down else 0)
    N = s.load.tokens
    return BlockBytes(N * (D * e + 4), N * attention + _saved_mask(s), N * mlp, N * 2 * F * e)


def _attention_core(s: Setup) -> int:
    """Bytes a token of q, k, v, the output and the log-sum-exp, in the layout of the kernel that runs."""
    shape, e = s.shape, s.itemsize
    Q, K = shape.q_width, shape.kv_width
    if s.on_cpu and s.by_segments:  # gathered in fp32, padded; backward makes the softmax again
        return round(4 * CPU_SEGMENT_PADDING * (Q + 2 * K)) + (Q * e if s.targets("o_proj") else 0)
    # a GPU's flash attention takes K heads as they are, and so does a CPU; under a mask transformers repeats them, and
    # before Ampere (fp16) and in fp32 the efficient kernel wants them repeated
    as_they_are = not s.masked and (s.on_cpu or (e == 2 and s.config.train.mixed_precision != "fp16"))
    keys = K if as_they_are else Q
    return (Q + 2 * keys + Q) * e + 4 * shape.heads


def _saved_mask(s: Setup) -> int:
    """Padded rows, and packed ones with dropout, attend under a mask [B, T, T], which each block saves as an additive
    one. With dropout a CPU saves each head's probabilities instead, before and after it, and what it multiplied by."""
    scores = s.load.rows * s.load.length**2 * s.itemsize
    if s.on_cpu and s.shape.attention_drops:
        return 3 * s.shape.heads * scores
    return scores if s.masked else 0


def latent_bytes(s: Setup, mode: Recompute) -> int:
    """mu | logvar and z, beside what the tapped block keeps; the torch path keeps the noise too, unless the block that
    it is part of is run again (of several layers each latent is made outside its block)."""
    ib, e = s.config.ib, s.itemsize
    again = mode == "full" and len(s.tapped) == 1
    token = 3 * ib.latent_dim * e + (4 * ib.latent_dim if s.on_cpu and not again else 0)
    if ib.encoder == "mlp":  # the hidden layer before and after GELU, and h in fp32 where it is cast
        token += 2 * (ib.mlp_dim or 2 * ib.latent_dim) * e
    return s.load.tokens * token


def kept_bytes(s: Setup, plan: Plan) -> list[int]:
    """What each block keeps between forward and backward."""
    block = block_bytes(s)
    stream = s.load.tokens * s.shape.hidden * s.itemsize
    kept, offloaded = [], 0
    for index, mode in enumerate(plan.modes):
        size = {"none": block.whole, "mlp": block.whole - block.wide, "full": stream}[mode]
        if index == 0 and mode != "full":
            size -= block.input  # nothing below the first block trains, so its norm saves nothing
        if mode == "full" and plan.activation_offloading and not s.on_cpu:
            offloaded += 1
            size = stream if offloaded <= IN_FLIGHT else 0
        if index + 1 in s.tapped:
            size += latent_bytes(s, mode)
        kept.append(size)
    return kept


def stem_bytes(s: Setup) -> int:
    """What no block owns: the last block's output, which the final norm saves; rotation's tables; on a CPU the
    attention's indices (there and back, 8 bytes)."""
    shape, e = s.shape, s.itemsize
    token = shape.hidden * e + 4 + 2 * shape.head_dim * e
    if s.on_cpu and s.by_segments:
        token += 2 * 8 * (shape.heads + shape.kv_heads)
    return s.load.tokens * token


# --- bytes: while a step runs ---------------------------------------------------------------------


def work_bytes(s: Setup) -> int:
    """The widest moment of a block's backward, above all that its nodes save: either

    the down projection's: the gradient that arrives [N, D]; dh [N, I]; the adapter's share of it, before and after
    dropout, which is added into it (on a CPU the mask goes through fp32, and a weight is made dense each time);

    or attention's, when the MLP's part is freed already.
    """
    shape, e, load, block = s.shape, s.itemsize, s.load, block_bytes(s)
    D, F, Q, K, N = shape.hidden, shape.intermediate, shape.q_width, shape.kv_width, load.tokens
    share = 0
    if s.targets("down_proj") and s.config.lora.dropout > 0:
        share = e + (4 + (e if e < 4 else 0) if s.on_cpu else e)
    least = 0
    if s.on_cpu:  # a dense weight, or SwiGLU's scratch (ibft_kernels/ops/swiglu.py)
        dense = F * D * e if s.config.model.quantization == "nf4" else 0
        least = max(dense, (8 if e == 4 else 16) * min(N * F, 1 << 18))
    down = N * (D + F) * e + max(N * F * share, least)
    if s.on_cpu:  # dO, dQ, dK, dV gathered, and dQ on its way back
        attention = round(4 * N * (CPU_SEGMENT_PADDING * (2 * Q + 2 * K) + Q))
    else:  # dO, dQ, dK, dV, and dQ's sum in fp32
        attention = N * ((2 * Q + 2 * K) * e + 4 * Q)
    attention += N * D * e - block.mlp - block.wide
    return max(down, attention)


def head_bytes(s: Setup) -> tuple[int, int]:
    """(head, fold) at the head: forward makes the gradients of the labelled rows a chunk at a time, backward lays them
    out for all rows, and adds the folded head's to those of earlier micro-batches."""
    shape, e, load = s.shape, s.itemsize, s.load
    D, V, N, M = shape.hidden, shape.vocab, load.tokens, load.labels
    chunk, rows = chunk_bytes(s, M)
    direct = 1 if s.folds else 1 + len(s.tapped)  # unfolded, every head reads [M, D]
    forward = N * D * e + direct * M * D * e + rows * D * e + (0 if s.on_cpu else chunk)
    scaled = M * D * (4 + (e if e < 4 else 0)) if s.on_cpu else 0
    backward = direct * M * D * e + scaled + N * D * e
    head = max(forward, backward) + (chunk if s.on_cpu else 0)
    if not s.folds:
        return head, 0
    # dM of this micro-batch, scaled where it lies
    return head, fold_bytes(s) + 4 * V * s.config.ib.latent_dim * len(s.tapped)


def fold_bytes(s: Setup, *, gradient: bool = True) -> int:
    """M [V, Z] in the compute dtype, its bias, and M's gradient in fp32, which grows over the micro-batches; of each
    bottleneck.
    """
    if not s.folds:
        return 0
    V, Z = s.shape.vocab, s.config.ib.latent_dim
    return len(s.tapped) * (V * Z * s.itemsize + 4 * V + (4 * V * Z + 4 * V if gradient else 0))


def evaluation_bytes(s: Setup) -> tuple[int, int]:
    """(work, head) of an evaluation, which keeps nothing for a backward. Either

    the MLP's down projection: the embeddings, the block's input, the stream after attention, its norm, the output and
    the adapter's share of it [N, D]; gate, up and h [N, I]; x A^T of all three; or

    attention: the first two and the first norm [N, D]; q before and after rotation, k, v, and the kernel's own copies.
    """
    shape, e, r, load = s.shape, s.itemsize, s.config.lora.r, s.load
    D, F, Q, K, N = shape.hidden, shape.intermediate, shape.q_width, shape.kv_width, load.eval_rows * load.length
    packed = s.on_cpu and s.config.data.packing
    dense = D * F * e if s.on_cpu and s.config.model.quantization == "nf4" else 0
    adapted = s.targets("gate_proj", "up_proj", "down_proj") * r
    mlp = N * (6 * D + 3 * F + adapted) * e + dense
    own = N * Q * e
    if packed:  # q, k, v and the output gathered in fp32, and a block's scores
        own = round(4 * CPU_SEGMENT_PADDING * N * (2 * Q + 2 * K))
        own += 4 * max(SCORES_BUDGET, shape.heads * BLOCK_TOKENS * load.length)
    attention = N * (3 * D + 2 * Q + 2 * K) * e + own
    token = 2 * shape.head_dim * e + (16 * (shape.heads + shape.kv_heads) if packed else 0)  # as in `stem_bytes`
    chunk, _ = chunk_bytes(s, math.ceil(N * load.labels / load.tokens))
    mask = N * load.length if s.masked else 0
    return max(mlp, attention) + N * (token + DATA_BYTES) + mask, chunk


@dataclass(frozen=True)
class Estimate:
    """Bytes by category at the step's widest moment; they add up to `total`.

    kept: what all blocks keep between forward and backward. host: bytes that wait in host memory.
    """

    lines: dict[str, int]
    moment: str
    kept: int
    host: int

    @property
    def total(self) -> int:
        return sum(self.lines.values())


def estimate(s: Setup, plan: Plan) -> Estimate:
    """The predicted peak of `train`, from the second step on (the first has no optimizer state yet)."""
    if len(plan.modes) != s.shape.layers:
        raise ValueError(f"plan: expected {s.shape.layers} modes, got {len(plan.modes)}")
    always = {
        "base weights": weight_bytes(s, plan),
        "adapters": adapter_bytes(s),
        "optimizer state": optimizer_bytes(s),
        "bottleneck": bottleneck_bytes(s),
        "data": data_bytes(s),
    }
    kept, block, stem, work = kept_bytes(s, plan), block_bytes(s), stem_bytes(s), work_bytes(s)
    buffer, logits = buffer_bytes(s), chunk_bytes(s, s.load.labels)[0] if s.on_cpu else 0
    adapters, layers = 4 * s.adapter_parameters, s.shape.layers
    earlier = s.load.accumulation > 1  # micro-batches have left gradients of every block

    head, fold = head_bytes(s)
    moments: dict[str, dict[str, int]] = {
        "the head": {
            "gradients": adapters * layers if earlier else 0, "kept activations": sum(kept) + stem,
            "working memory": buffer, "head": head, "folded head": fold,
        }
    }  # fmt: skip
    below = 0
    for index, size in enumerate(kept):
        below += size
        again = block.whole - size if plan.modes[index] != "none" else 0
        moments[f"the backward of layer {index + 1}"] = {
            "gradients": adapters * (layers if earlier else layers - index),
            "kept activations": below + stem,
            "working memory": buffer + work + max(0, again),
            "head": logits,
            "folded head": fold_bytes(s),
        }
    if s.folds:
        V, Z, D, e = s.shape.vocab, s.config.ib.latent_dim, s.shape.hidden, s.itemsize
        moments["the folded head's backward"] = {
            "gradients": adapters * layers,
            "working memory": buffer,
            "head": logits,
            "folded head": fold_bytes(s) + (V * Z * e if e < 4 else 0) + D * Z * (4 + e),
        }
    if s.load.eval_rows:
        eval_work, eval_head = evaluation_bytes(s)
        moments["evaluation"] = {"working memory": buffer + eval_work, "head": max(eval_head, logits)}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    offloaded = plan.count("full") * s.load.tokens * s.shape.hidden * s.itemsize if plan.activation_offloading else 0
    table = s.shape.table_parameters * s.itemsize if plan.offload_embeddings else 0
    order = (
        "base weights", "adapters", "gradients", "optimizer state", "bottleneck", "kept activations",
        "working memory", "head", "folded head", "data",
    )  # fmt: skip
    found = always | moments[moment]
    return Estimate({name: found.get(name, 0) for name in order}, moment, sum(kept) + stem, offloaded + table)


# --- arithmetic -----------------------------------------------------------------------------------


def recompute_flops(s: Setup) -> dict[Recompute, int]:
    """Of one block and micro-batch, what each mode does again: gate and up without their adapters; or the block."""
    N, shape = s.load.tokens, s.shape
    whole = N * 2 * (shape.linear_parameters + s.adapter_parameters) + 2 * shape.q_width * s.load.squares
    return {"none": 0, "mlp": 4 * N * shape.hidden * shape.intermediate, "full": whole}


def flops(s: Setup, plan: Plan) -> dict[str, int]:
    """Floating-point operations of an optimizer step, by part.

    A frozen weight takes two products of 2 N P (forward, dx), the first block's q, k, v only the first; an adapter
    three pairs; causal attention half of T^2, forward two products and backward five; the head forward and dh for the
    labelled rows.
    """
    shape, load, ib = s.shape, s.load, s.config.ib
    D, V, N, M, L, Z = shape.hidden, shape.vocab, load.tokens, load.labels, shape.layers, ib.latent_dim
    again = recompute_flops(s)
    no_dx = sum(shape.linears[name][0] for name in ("q_proj", "k_proj", "v_proj")) * D
    parts = {
        "base": 2 * N * (2 * L * shape.linear_parameters - no_dx),
        "adapters": 6 * N * L * s.adapter_parameters,
        "attention": 7 * shape.q_width * load.squares * L,
        "head": 4 * M * D * V,
        "recomputation": sum(again[mode] for mode in plan.modes),
    }
    count = len(s.tapped)
    if count:
        encoders = sum(s.bottleneck_tensors) - count * (D * Z + D)
        heads = count * (6 * M * Z * V if s.folds else 4 * M * D * V + 6 * M * D * Z)
        parts["bottleneck"] = 6 * N * encoders + heads
    parts = {name: value * load.accumulation for name, value in parts.items()}
    if s.folds:
        parts["bottleneck"] += count * 4 * D * Z * V
    return parts
