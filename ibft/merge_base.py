"""The base of a merge: a folder of safetensors in full precision, whose tensors are read one at a time."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

from ibft.config import ModelConfig
from ibft.errors import SetupError
from ibft.trained import read_json

if TYPE_CHECKING:
    from torch import Tensor

FULL_PRECISION = ("BF16", "F16", "F32", "F64")
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
COPIED_FOLDERS = ("chat_templates", "additional_chat_templates")
QUANTISED = "quantization_config"  # of config.json


@dataclass(frozen=True)
class Base:
    """files: which one holds a tensor, in the order of the published files; shapes: of each tensor."""

    name: str
    folder: Path
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: ModelConfig) -> "Base":
        """Finds the safetensors files, fetched where they are on the hub, and reads their headers.

        Raises:
            SetupError: none (merge reads no pickle), damaged, unreachable, not in full precision, or without a weight
            that config.json asks for.
        """
        from safetensors import SafetensorError, safe_open

        files: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            folder = _folder_of(config)
            for path in _weight_files(folder):
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118  not a dict
                        part = file.get_slice(name)
                        if (kind := part.get_dtype()) not in FULL_PRECISION:
                            raise SetupError(f"{path}: {name} is {kind}: merge needs the base in full precision")
                        files[name], shapes[name] = str(path), tuple(part.get_shape())
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            first = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            raise SetupError(f"weights of {config.name_or_path}: {first}") from error
        base = cls(config.name_or_path, folder, files, shapes)
        base._check_whole()
        return base

    def _check_whole(self) -> None:
        """Raises SetupError: the model of config.json has a weight that is not here, or of another size."""
        from ibft.streamed import empty_model

        model = empty_model(self.folder)
        tied = model.all_tied_weights_keys
        for name, weight in model.named_parameters():
            stored = name if name in self.shapes else tied.get(name, name)
            if self.shapes.get(stored) != tuple(weight.shape):
                got = f"{list(self.shapes[stored])}" if stored in self.shapes else "none"
                raise SetupError(f"weights of {self.name}: {name}: got {got}, expected {list(weight.shape)}")

    @contextmanager
    def reading(self) -> "Iterator[Mapping[str, Tensor]]":
        """The tensors by name, on the host, each in its own dtype and read when it is asked for."""
        from safetensors import safe_open

        with ExitStack() as stack:
            sources: dict[str, Any] = {
                path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(self.files.values()))
            }
            yield _Tensors(self.files, sources)

    def copy_others(self, folder: Path, dtype: str) -> bool:
        """Tokenizer, chat templates and generation_config.json as they are published; config.json with its new dtype.

        Returns whether config.json says of weights in full precision that they are quantised; the copy does not.
        """
        within = [path for name in COPIED_FOLDERS for path in (self.folder / name).glob("*")]
        for path in [*(self.folder / name for name in COPIED), *within]:
            if path.is_file():
                copy = folder / path.relative_to(self.folder)
                copy.parent.mkdir(exist_ok=True)
                copyfile(path, copy)
        config = read_json(self.folder / "config.json")
        stale = config.pop(QUANTISED, None) is not None
        named = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
        write_json(folder / "config.json", config | named)
        return stale


class _Tensors(Mapping[str, "Tensor"]):
    def __init__(self, files: Mapping[str, str], sources: Mapping[str, Any]) -> None:
        self.files, self.sources = files, sources

    def __getitem__(self, name: str) -> "Tensor":
        tensor: Tensor = self.sources[self.files[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _folder_of(config: ModelConfig) -> Path:
    """Of a hub id the cache's, with what a merged model needs."""
    from huggingface_hub import snapshot_download
    from transformers.utils import logging

    from ibft.model import resolve_path

    path = Path(resolve_path(config.name_or_path))
    if path.is_dir():
        return path
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # a bar in a log file is noise
    within = [f"{name}/*" for name in COPIED_FOLDERS]
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COPIED, *within]
    return Path(snapshot_download(config.name_or_path, revision=config.revision, allow_patterns=wanted))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SetupError(f"{folder} has no {missing[0]}: merge reads safetensors alone, no pickle")
    return [folder / name for name in names]
