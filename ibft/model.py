"""The model of a run: a frozen base, really 4-bit, LoRA by PEFT, and dropout keyed by the sample.

Every patch is on the instance that was loaded; no class of transformers or PEFT is changed.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibft.config import BUNDLED, LoraConfig, ModelConfig
from ibft.context import BatchContext
from ibft.errors import ConfigError, SetupError
from ibft.footprint import ModelShape
from ibft.nf4 import adopt_linear4bit
from ibft.noise import SampleDropout, dropout_stream
from ibft.tap import decoder_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"


def resolve_path(name_or_path: str) -> str:
    """The bundled base's folder for its name; `~` expanded; anything else unchanged."""
    from ibft.tiny import BASE_DIR

    if name_or_path == BUNDLED:
        return str(BASE_DIR)
    return os.path.expanduser(name_or_path) if name_or_path.startswith("~") else name_or_path


def load_model_config(config: ModelConfig, *, needs_weights: bool = True) -> Any:
    """The base's transformers configuration (a small file), read before any weights.

    needs_weights: whether a local folder must have them too.

    Raises:
        SetupError: missing, gated or unreachable; a local folder without a model; sizes that no model has.
        ConfigError: not of the Llama family.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = resolve_path(config.name_or_path)
    _check_local_folder(path, needs_weights)
    # a config class checks its fields' types, and computes with what it is given: no head to divide by, for one
    with _hub_errors(path, StrictDataclassError, ArithmeticError, AttributeError, TypeError):
        found = AutoConfig.from_pretrained(path, revision=config.revision)
    ModelShape.of(found)
    return found


def load_tokenizer(config: ModelConfig, *, download: bool = True) -> "PreTrainedTokenizerBase":
    """The base's tokenizer, slow or fast, as it is published. download: whether it may come from the hub.

    Raises:
        SetupError: missing, gated or unreachable.
    """
    from transformers import AutoTokenizer

    path = resolve_path(config.name_or_path)
    with _hub_errors(path):
        return AutoTokenizer.from_pretrained(path, revision=config.revision, local_files_only=not download)


def pad_id_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any id does where the tokenizer has no pad token: pads are masked by position, not by id."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def load_base(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """The frozen base on `device`: linear layers in NF4 (or `dtype` with quantization=none), the rest in `dtype`.

    Raises:
        SetupError: see `load_model_config`. ConfigError: not of the Llama family.
    """
    from accelerate.hooks import remove_hook_from_submodules
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a bar in a log file is noise
    path = resolve_path(config.name_or_path)
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "revision": config.revision}
    if config.quantization == "nf4":
        kwargs["quantization_config"] = _nf4_settings(dtype)
    with _hub_errors(path):
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=config.attn_implementation, **kwargs)
    decoder_of(model)
    # for a quantised model transformers lets accelerate hook every module to move its inputs: here all is on one device
    remove_hook_from_submodules(model)
    if config.quantization == "nf4" and adopt_linear4bit(model) == 0:
        raise ConfigError(f"{config.name_or_path}: no linear layer was quantised; set model.quantization=none")
    model.requires_grad_(False)
    return model


def add_lora(model: "PreTrainedModel", config: LoraConfig, *, context: BatchContext) -> "PeftModel":
    """Trainable LoRA (fp32 masters) on the chosen projections, its dropout keyed by the sample.

    Initialised from torch's CPU generator, seeded with the run's seed, so that it is the same on every device.

    Raises:
        ConfigError: the model lacks one of the projections.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := set(config.target_modules) - names:
        raise ConfigError(f"lora.target_modules: the model has no {', '.join(sorted(missing))}")
    settings = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        use_rslora=config.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(context.seed)
    wrapped = get_peft_model(model, settings, adapter_name=ADAPTER)
    assert isinstance(wrapped, nn.Module)
    for index, layer in enumerate(decoder_of(wrapped).layers):  # type: ignore[arg-type]
        for name, module in layer.named_modules():
            if isinstance(module, LoraLayer):
                if config.dropout > 0:
                    stream = dropout_stream(index, name.rpartition(".")[2])
                    module.lora_dropout[ADAPTER] = SampleDropout(config.dropout, context, stream)
                # autocast casts where a product needs it; PEFT's own cast would first blow x up to fp32
                module.cast_input_dtype_enabled = False
    return wrapped  # type: ignore[return-value]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def resolve_layer(layer: int | str, num_layers: int) -> int:
    """The tapped block: `auto` = round(2L/3).

    Raises:
        ConfigError: outside 1 .. L-1.
    """
    chosen = round(2 * num_layers / 3) if layer == "auto" else int(layer)
    if not 1 <= chosen < num_layers:
        raise ConfigError(f"ib.layer: got {chosen}, expected 1 .. {num_layers - 1} (the model has {num_layers} layers)")
    return chosen


def resolve_layers(layer: int | str | tuple[int, ...], num_layers: int) -> int | tuple[int, ...]:
    """`resolve_layer` of one, or of each of several."""
    if isinstance(layer, tuple):
        return tuple(resolve_layer(each, num_layers) for each in layer)
    return resolve_layer(layer, num_layers)


def _nf4_settings(dtype: torch.dtype) -> Any:
    # on some CPUs bitsandbytes warns at import that an optional kernel of its own is absent: ours does not need it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _check_local_folder(path: str, needs_weights: bool) -> None:
    folder = Path(path)
    if not folder.is_dir():
        if path.startswith((".", "/")):
            raise SetupError(f"model.name_or_path: no folder {path}")
        return
    if not (folder / "config.json").is_file():
        raise SetupError(f"model folder {path} has no config.json")
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if needs_weights and not weights:
        raise SetupError(f"model folder {path} has no weights: expected *.safetensors")


@contextmanager
def _hub_errors(path: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what the hub, transformers and safetensors raise for a model that cannot be had into `SetupError`."""
    from safetensors import SafetensorError

    kinds: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, *also)

    try:
        yield
    except kinds as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise
        raise SetupError(f"model {path} {_why(path, error)}") from error


def _why(path: str, error: Exception) -> str:
    from huggingface_hub import errors as hub

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(link, types) for link in chain)

    if caused_by(hub.GatedRepoError):
        return "is gated: accept its terms on its page, then run `hf auth login`"
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
        return "is neither a local folder nor a hub id that you can see (private? run `hf auth login`)"
    if caused_by(hub.RevisionNotFoundError):
        return "has no such revision"
    if not os.path.isdir(path) and isinstance(error, OSError):
        return f"is neither a local folder nor reachable: check the network, or fetch it once with `hf download {path}`"
    if isinstance(error, ArithmeticError | AttributeError | TypeError):
        return f"has a config.json that transformers cannot take: {str(error).splitlines()[0]}"
    lines = str(error).strip().splitlines()
    return f"cannot be loaded: {' '.join(line.strip() for line in lines[:2])}"
