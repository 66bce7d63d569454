"""The run's configuration: typed, frozen, unknown keys refused. Every field says what it means.

Sources, each overriding the one before: defaults, the bundled model's settings (only where that model is trained), a
preset, the YAML file, `section.key=value` overrides. Loading is in `ibft.load_config`; this file imports no torch.
"""

from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

BUNDLED = "bundled:tiny"  # the base model and the tasks that come with the package

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class ModelConfig(Section):
    name_or_path: str = BUNDLED
    """Hub id or local folder of a Llama-family causal LM (llama, deepseek-coder, codellama, qwen2/2.5/3, mistral)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    quantization: Literal["nf4", "none"] = "nf4"
    """nf4: 4 bits with double quantisation (QLoRA); none: the weights as they are."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """transformers' attention implementation: for padded rows, for generation (eager means sdpa on the fused path),
    and for all with train.fused_kernels=false. Packed rows the fused path attends to by segments itself, whatever is
    set here. flash with data.packing needs batches of one row, which is for what is not fused: the whole model with
    train.fused_kernels=false, or a layer that a run leaves to transformers."""
    offload_embeddings: bool = False
    """Keep the embedding table in host memory and look ids up there (a GPU's memory only; not with tied embeddings).
    train.gradient_checkpointing=auto does so by itself where nothing else makes the step fit."""


class FieldsConfig(Section):
    """Which keys of a row to take for what, where the formats do not know them: prompt and response (and input), or
    messages, or text."""

    prompt: str | None = None
    """Key of what is asked."""
    input: str | None = None
    """Key of a further input to it."""
    response: str | None = None
    """Key of the answer."""
    messages: str | None = None
    """Key of a conversation."""
    text: str | None = None
    """Key of a text that is taught whole."""

    @model_validator(mode="after")
    def _whole(self) -> "FieldsConfig":
        given = set(self.model_dump(exclude_none=True))
        if given and given not in ({"prompt", "response"}, {"prompt", "input", "response"}, {"messages"}, {"text"}):
            raise ValueError(
                f"data.fields: got {', '.join(sorted(given))}, expected prompt and response (and input), or messages, "
                "or text"
            )
        return self

    def given(self) -> dict[str, str]:
        """Name that `ibft.data.formats` knows -> key of the row."""
        names = {"prompt": "instruction", "response": "output"}
        return {names.get(name, name): key for name, key in self.model_dump(exclude_none=True).items()}


class DataConfig(Section):
    path: str = BUNDLED
    """Training rows: a .json, .jsonl, .csv, .tsv, .parquet or .arrow file (each also .gz), a folder of such, or a hub
    id."""
    split: str = "train"
    """Split of a hub data set or of a folder."""
    fields: FieldsConfig = FieldsConfig()
    """Keys of a row that are named otherwise than the formats know them."""
    template: str = "auto"
    """released: prompt, newline, response; alpaca; chat: the tokenizer's chat template; or a .jinja file.
    auto: released, and chat for conversations."""
    labels: Literal["response", "assistant", "all"] = "assistant"
    """What is taught: the last response, every turn of the assistant (the same where there is one), or every token."""
    eval_path: str | None = None
    """Held-out rows; if absent, `val_size` of the training rows are held out."""
    eval_split: str | None = None
    """Split of eval_path (which may be the same hub data set or folder as path); default: that of the training rows."""
    val_size: Share = 0.02
    """Share of the rows held out where there is no eval_path (at least 1, at most 512 rows); 0: no evaluation.
    The bundled data have held-out rows of their own."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens of the longest row."""
    truncation: Literal["right", "left", "drop", "split"] = "right"
    """Of longer samples: cut on the right or the left, dropped, or split into several; what is lost is counted."""
    packing: bool = True
    """Several samples a row, with block-diagonal attention: no padding, and a sample never sees its neighbours."""
    group_by_length: bool = False
    """Without packing: rows of like length meet in a step, so that less is padding; the order is less random."""
    pad_to_max_length: bool = False
    """Pad each row to max_length (the released code) instead of to the longest of its batch."""
    add_eos: bool = True
    """Teach the end-of-sequence token after the response."""
    keep_ids: str | None = None
    """File of row numbers (`analyze partition` writes such): train on these rows alone."""
    drop_ids: str | None = None
    """The same: leave these rows out."""
    max_samples: PositiveInt | None = None
    """Use only the first rows (of those that are left)."""
    deduplicate: bool = False
    """Leave out rows that say the same as an earlier one: the same prompt and response, messages or text."""
    decontaminate: tuple[str, ...] = ()
    """Leave out rows that share a long run of words with these evaluation problems: SUITE=FILE (as `ibft-fast
    decontaminate --against` has them) or a file; several with commas between."""
    cache: bool = True
    """Keep encoded data in ~/.cache/ibft-fast (or $IBFT_CACHE), and take them from there."""

    @field_validator("decontaminate", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(entry.strip() for entry in value.split(",") if entry.strip() not in ("", "none"))
        return value or ()


class LoraConfig(Section):
    r: PositiveInt = 32
    """Rank."""
    alpha: PositiveInt = 32
    """Scale: what LoRA adds is multiplied by alpha / r."""
    dropout: Share = 0.05
    """One mask per shared input (q/k/v; gate/up), keyed by the sample."""
    target_modules: Annotated[tuple[Projection, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers that get LoRA; all-linear: every one of these."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_or_several(cls, value: object) -> object:
        if isinstance(value, str):
            return get_args(Projection) if value == "all-linear" else tuple(name.strip() for name in value.split(","))
        return value

    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""


class IBConfig(Section):
    alpha: NonNegative = 0.1
    """Weight of the whole bottleneck term; 0 is plain QLoRA fine-tuning without any bottleneck cost."""
    beta: NonNegative = 0.02
    """Weight of the prediction loss from z, within the bottleneck term."""
    layer: PositiveInt | Literal["auto"] | Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = "auto"
    """Tapped decoder block, counted from 1, as in hidden_states; auto = round(2L/3) (20 of 30). Several, as 4,6: each
    gets a bottleneck of its own, and the bottleneck term is their mean. A list of one is its number."""
    latent_dim: PositiveInt = 256
    """Z."""
    alpha_warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the steps over which alpha rises linearly to its value."""
    encoder: Literal["linear", "mlp", "random_projection"] = "linear"
    """linear: the released code; mlp: the paper's words; random_projection: none is learned, mu is a fixed orthonormal
    projection of the hidden state, the variance 1 (a control)."""
    deterministic: bool = False
    """z = mu, without noise; the KL stays (a control)."""
    prior: Literal["standard", "learned_diagonal", "mixture"] = "standard"
    """standard: N(0, I), the paper's. learned_diagonal: one Gaussian, trained. mixture: of Gaussians, trained; its KL
    is estimated from the one sample. The last two are computed outside the fused kernels."""
    prior_components: PositiveInt = 10
    """Gaussians of the mixture."""
    mlp_dim: PositiveInt | None = None
    """Hidden width of the mlp encoder; default 2Z."""
    kl_reduction: Literal["batchmean", "mean"] = "batchmean"
    """batchmean: sum over dims, mean over tokens (paper, eq. 4); mean: over both (released code), Z times weaker."""
    kl_tokens: Literal["real", "all", "response"] = "real"
    """Tokens of the KL: real (no pads), all (pads too; needs pad_to_max_length), response (labelled positions)."""
    learning_rate: NonNegative | None = None
    """Of encoder and up-projection; default: train.learning_rate."""

    @field_validator("layer", mode="wrap")
    @classmethod
    def _one_or_several(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        if isinstance(value, str) and "," in value:
            value = value.split(",")
        try:
            layer = handler(value)
        except ValidationError:
            raise ValueError("expected auto, a number from 1, or several as in 4,6") from None
        if not isinstance(layer, tuple):
            return layer
        if len(set(layer)) < len(layer):
            raise ValueError("expected each layer once")
        return layer[0] if len(layer) == 1 else tuple(sorted(layer))


class TrainConfig(Section):
    max_steps: PositiveInt | Literal[-1] = -1
    """Optimizer steps; -1: num_train_epochs decides."""
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3
    """Passes over the training rows."""
    per_device_train_batch_size: PositiveInt = 1
    """Rows per micro-batch."""
    gradient_accumulation_steps: PositiveInt = 4
    """Micro-batches per optimizer step. The gradient does not depend on how a global batch is split."""
    learning_rate: NonNegative = 1e-4
    """The highest, after warm-up."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps over which the learning rate rises to its value."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Overrides warmup_ratio."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """The optimizer: AdamW, with states in fp32 or in 8 bits, paged ones may move to host memory."""
    adam_beta1: Share = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: Share = 0.999
    """Decay of the mean of their squares."""
    adam_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """Added to the root of that mean."""
    skip_non_finite: Annotated[int, Field(ge=0)] = 0
    """Steps with a loss or gradient that is not finite to leave out before a run ends with exit code 5; their rows are
    in non_finite.json."""
    auto_micro_batch: bool = False
    """Out of memory: go on with micro-batches of half the rows and twice as many; the gradient is the same."""
    max_grad_norm: NonNegative = 1.0
    """Gradient clipping; 0: none."""
    clip_mode: Literal["joint", "per_group"] = "joint"
    """joint: one norm over everything; per_group: LoRA and bottleneck clipped apart."""
    fused_kernels: bool = True
    """Fused attention, MLP, norms and tap; false: transformers' and PEFT's own modules, for comparison."""
    gradient_checkpointing: bool | Literal["auto", "mlp"] = "auto"
    """Which activations to make again in backward instead of keeping them: true: every layer's; false: none;
    mlp: every layer's gate and up, the two widest; auto: as few as the memory budget demands, none where all fits."""
    activation_offloading: bool = False
    """Keep the inputs of recomputed layers in host memory between forward and backward (a GPU's memory only).
    gradient_checkpointing=auto does so by itself where recomputing every layer is not enough."""
    mixed_precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where a GPU has it, else fp16; fp32 on a CPU. (accelerate's `no` is fp32.)"""
    logging_steps: PositiveInt = 10
    """Steps from one log line to the next."""
    eval_steps: PositiveInt | None = None
    """Evaluate on the held-out rows every so many steps; default: after each epoch. Always at the end."""
    per_device_eval_batch_size: PositiveInt = 4
    """Rows per batch of an evaluation."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers beside metrics.jsonl."""

    @field_validator("gradient_checkpointing", mode="wrap")
    @classmethod
    def _switch_or_word(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        # of a union pydantic names its members one after the other
        try:
            return handler(value)
        except ValidationError:
            raise ValueError("expected true, false, auto or mlp") from None

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_fp32(cls, value: object) -> object:
        # YAML reads a bare `no` as false
        return "fp32" if value in (False, "no") else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        """`tensorboard`, `tensorboard,wandb` and `none` as Hugging Face takes them."""
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip() not in ("", "none"))
        return value or ()


class EvalConfig(Section):
    tasks: str | None = None
    """JSON lines of tasks (task_id, instruction, entry_point, test) for Pass@1 before and after training."""
    max_tasks: PositiveInt | None = None
    """Use only the first tasks."""
    max_new_tokens: PositiveInt = 512
    """Longest answer."""
    batch_size: PositiveInt = 64
    """Tasks that are answered at once."""
    run_without_isolation: bool = False
    """Where no sandbox works: run what the model writes as you, under resource limits alone."""


class CheckpointConfig(Section):
    save_steps: Annotated[int, Field(ge=0)] = 0
    """Save a checkpoint to go on from every so many steps; 0: only when stopped, and the adapters, best and last."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep; older ones are deleted."""


class RuntimeConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of initial weights, dropout, noise and the order of rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where torch finds one."""
    memory_budget: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)] | None = None
    """GiB of the device to plan for, as if it were a card of that size; default: what is free when the run starts."""
    deterministic: bool = False
    """torch's deterministic algorithms alone: on one machine with the same versions, the same bits each time."""


class Config(Section):
    version: Literal[1] = 1
    """Of this format."""
    preset: str | None = None
    """Settings to begin with; what is set beside it counts more."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    ib: IBConfig = IBConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.data.packing and self.data.pad_to_max_length:
            raise ValueError("data.pad_to_max_length pads rows that data.packing fills: set one of them to false")
        if self.ib.alpha > 0 and self.ib.kl_tokens == "all" and not self.data.pad_to_max_length:
            raise ValueError(
                "ib.kl_tokens=all counts pads, so it needs rows of one length: "
                "set data.packing=false data.pad_to_max_length=true"
            )
        if self.data.packing and self.model.attn_implementation.startswith("flash"):
            # transformers recognises packed rows for flash attention only in batches of one; which layers it attends
            # for is known only when the model is fused
            rows = (self.train.per_device_train_batch_size, self.train.per_device_eval_batch_size)
            if rows != (1, 1):
                raise ValueError(
                    f"model.attn_implementation={self.model.attn_implementation} with data.packing needs "
                    "train.per_device_train_batch_size=1 and train.per_device_eval_batch_size=1"
                )
        if self.train.activation_offloading and self.train.gradient_checkpointing in (False, "mlp"):
            raise ValueError(
                "train.activation_offloading moves the inputs of recomputed layers, and "
                f"train.gradient_checkpointing={str(self.train.gradient_checkpointing).lower()} has none: "
                "set it to true or auto"
            )
        if self.data.path == BUNDLED != self.model.name_or_path:
            raise ValueError("data.path is required with a model of your own (a file or a hub id)")
        return self
