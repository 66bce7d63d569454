"""The model under evaluation in this process: a folder, a hub id or the bundled one, an adapter, 4 bits or not."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.config import ModelConfig, TrainConfig
from ibft.errors import ConfigError, SetupError

if TYPE_CHECKING:
    import torch


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class LocalModel:
    """What can be refused before any weight is loaded has been. positions: the longest sequence; None: not said."""

    config: ModelConfig
    adapter: str | None
    device: "torch.device"
    dtype: "torch.dtype"
    tokenizer: Any
    positions: int | None

    @classmethod
    def of(cls, model: str, adapter: str | None, quantization: str, device: str) -> "LocalModel":
        """Raises ConfigError: no such folder. SetupError: no such model on the hub, or no CUDA device."""
        import torch

        from ibft.model import load_model_config, load_tokenizer, resolve_path
        from ibft.run import choose_dtype

        folder = resolve_path(model)
        if folder.startswith((".", "/")) and not Path(folder).is_dir():
            raise ConfigError(f"--model: no folder {model}")
        if device == "cuda" and not torch.cuda.is_available():
            raise SetupError("--device=cuda, but torch finds no CUDA device (--device=auto falls back to the CPU)")
        chosen = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
        config = ModelConfig(name_or_path=model, quantization="nf4" if quantization == "nf4" else "none")
        positions = getattr(load_model_config(config), "max_position_embeddings", None)
        dtype = choose_dtype(TrainConfig(), chosen)
        return cls(config, adapter, chosen, dtype, load_tokenizer(config), positions)

    def name(self) -> str:
        from ibft.run import device_name

        number = str(self.dtype).removeprefix("torch.")
        return f"{number} on {device_name(self.device) if self.device.type == 'cuda' else 'CPU'}"

    def load(self) -> Any:
        """Raises SetupError: no such weights, or an adapter that is not for them."""
        from ibft.model import load_base

        model: Any = load_base(self.config, dtype=self.dtype, device=self.device)
        if self.adapter is None:
            return model
        from peft import PeftModel
        from safetensors import SafetensorError

        try:
            return PeftModel.from_pretrained(model, str(Path(self.adapter).expanduser()))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:  # other sizes, other layers, another format
            first = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            raise SetupError(
                f"--adapter: {self.adapter} does not go with {self.config.name_or_path}: {first}"
            ) from error
        except SafetensorError as error:
            raise SetupError(f"{self.adapter}: damaged: {' '.join(str(error).split())}") from error


def check_adapter(adapter: str) -> str:
    """The hash of its weights. Raises ConfigError: not the folder of an adapter, or one with pickled weights."""
    folder = Path(adapter).expanduser()
    if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        inside = folder / "adapter"
        hint = f" (a run's is in {inside})" if all((inside / name).is_file() for name in ADAPTER_FILES) else ""
        raise ConfigError(f"--adapter: {adapter} has no {', '.join(missing)}{hint}")
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
