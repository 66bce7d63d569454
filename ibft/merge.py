"""`ibft-fast merge`: the adapter added into the full-precision base, as a model folder that any server reads.

    W' = W + scale * B A        scale = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); W [out, in],
                                A [r, in], B [out, r]; the sum in fp32, then rounded once to the chosen dtype

The base is read tensor by tensor and written shard by shard: one shard (4 GB) is all that memory holds. Training saw
the base in 4 bits, so that the merged model stands on other weights than those that the adapter was trained on: the
check at the end says what that changes, apart from the error of the merge itself.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibft.checkpoint import os_errors
from ibft.config import ModelConfig
from ibft.console import Console, size
from ibft.errors import ConfigError, SetupError
from ibft.evaluation.local_model import ADAPTER_FILES
from ibft.hashes import hash_file
from ibft.merge_check import Difference, verify_merge, where_to_verify
from ibft.trained import MERGED, TEMPLATE, Trained, find_trained, local_model, read_json

if TYPE_CHECKING:
    from torch import Tensor

SHARD = "4GB"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FULL_PRECISION = ("BF16", "F16", "F32", "F64")
# settings of an adapter that leave W + scale * B A as it is; every other one must be off
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def run_merge(
    run: str, out: Path, dtype: str = "bf16", *, verify: bool | None = None, max_shard_size: int | str = SHARD
) -> None:
    """Write the merged model of `run` (see `ibft.trained.find_trained`) to `out`, all of it or nothing.

    verify: compare logits at the end; None: where memory suffices and the base is not large.

    Raises:
        ConfigError: no adapter in `run`; `out` holds something. SetupError: no such base, or one that is quantised;
        an adapter that is damaged, of another base or of an unknown kind; no room.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: got {dtype}, expected {', '.join(DTYPES)}")
    target = _empty_target(out)
    trained = find_trained(run)
    if trained.adapter is None:
        raise ConfigError(f"{run} is a whole model: there is no adapter to merge (no {ADAPTER_FILES[0]})")
    loras = read_adapter(trained.adapter)
    here = local_model(trained)
    base = Base.of(trained.base)
    base.check(loras, trained.adapter)
    parameters = sum(map(math.prod, base.shapes.values()))
    device, reason = where_to_verify(parameters, verify)
    console = Console()
    console.line(f"merge: {trained.adapter} ({len(loras)} matrices) into {trained.base.name_or_path}, {dtype}")
    with _new_folder(target, room=parameters * {"fp32": 4}.get(dtype, 2)) as fresh:
        files = write_weights(base, loras, fresh, dtype, max_shard_size, console)
        base.copy_others(fresh, DTYPES[dtype])
        found: dict[str, Difference] = {}
        if device is None:
            console.notice(f"not verified: {reason}")
        else:
            found = verify_merge(replace(here, device=device), fresh)
        _write_facts(fresh, trained, dtype, found)
        for file in fresh.glob("*.safetensors"):  # safetensors writes for the owner's eyes alone; servers read here
            shutil.copymode(fresh / MERGED, file)
    console.line(f"merged: {parameters:,} parameters, {files} file{'s'[: files > 1]} of weights: {target}")
    for name, difference in found.items():
        console.line(f"logits beside {name}: {difference.describe()}")


# --- the adapter ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """a [r, in], b [out, r], fp32."""

    a: "Tensor"
    b: "Tensor"
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, weight: "Tensor") -> "Tensor":
        """weight [out, in] -> fp32 [out, in]."""
        import torch

        return torch.addmm(weight.float(), self.b, self.a, alpha=self.scale)


def read_adapter(folder: Path) -> dict[str, Lora]:
    """By the name of the base's weight. Raises SetupError: damaged, or of a kind that cannot be merged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = read_json(folder / ADAPTER_FILES[0])
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    bias = settings.get("bias", "none") == "none"
    unknown = [key for key, value in settings.items() if value and key not in NEUTRAL and not (key == "bias" and bias)]
    if settings.get("peft_type") != "LORA" or settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        unknown.append("peft_type" if settings.get("peft_type") != "LORA" else "init_lora_weights")
    if unknown:
        told = ", ".join(f"{key}={settings.get(key)}" for key in unknown)
        raise SetupError(f"{folder / ADAPTER_FILES[0]}: merge knows plain LoRA alone, got {told}")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise SetupError(f"{folder / ADAPTER_FILES[0]}: got r {rank} and lora_alpha {alpha}, expected two numbers")
    path = folder / ADAPTER_FILES[1]
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SetupError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    loras = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(f"{stem}.lora_B.weight", None)
        if b is None or a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            shapes = f"A {list(a.shape)} and B {None if b is None else list(b.shape)}"
            raise SetupError(f"{path}: {stem}: got {shapes}, expected rank {rank} in both ({ADAPTER_FILES[0]})")
        loras[stem.removeprefix("base_model.model.") + ".weight"] = Lora(a.float(), b.float(), scale)
    if tensors or not loras:
        raise SetupError(f"{path}: got {next(iter(tensors), 'no tensor')}, expected pairs of lora_A and lora_B alone")
    return loras


# --- the base -------------------------------------------------------------------------------------


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
            SetupError: none (merge reads no pickle), damaged, unreachable, or not in full precision.
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
        return cls(config.name_or_path, folder, files, shapes)

    def check(self, loras: Mapping[str, Lora], adapter: Path) -> None:
        """Raises SetupError: the adapter is of another base."""
        for name, lora in loras.items():
            if self.shapes.get(name) != lora.shape:
                got = f"{list(self.shapes[name])}" if name in self.shapes else "none"
                raise SetupError(
                    f"{adapter} does not go with {self.name}: {name}: the base has {got}, the adapter is for "
                    f"{list(lora.shape)}"
                )

    def copy_others(self, folder: Path, dtype: str) -> None:
        """Tokenizer, chat template and generation_config.json as they are published; config.json but for its dtype."""
        for name in COPIED:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        config = read_json(self.folder / "config.json")
        named = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
        _write_json(folder / "config.json", config | named)


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
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COPIED]
    return Path(snapshot_download(config.name_or_path, revision=config.revision, allow_patterns=wanted))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SetupError(f"{folder} has no {missing[0]}: merge reads safetensors alone, no pickle")
    return [folder / name for name in names]


# --- writing --------------------------------------------------------------------------------------


def write_weights(
    base: Base, loras: Mapping[str, Lora], folder: Path, dtype: str, max_shard_size: int | str, console: Console
) -> int:
    """The merged tensors, in the base's order; how many files they took. Raises SetupError: one is not finite."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import safe_open
    from safetensors.torch import save_file

    kind = getattr(torch, DTYPES[dtype])
    planned = {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in base.shapes.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    done = 0
    with ExitStack() as stack, console.progress("merging", len(planned)) as advance:
        sources: dict[str, Any] = {
            path: stack.enter_context(safe_open(path, "pt")) for path in sorted(set(base.files.values()))
        }
        for filename, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                weight = sources[base.files[name]].get_tensor(name)
                merged = loras[name].added_to(weight) if name in loras else weight
                shard[name] = merged.to(kind).contiguous()
                if not shard[name].isfinite().all():
                    why = f"beyond {dtype}: use --dtype bf16 or fp32" if merged.isfinite().all() else "not finite"
                    raise SetupError(f"{name}: merged, it has values that are {why}")
                advance(done := done + 1)
            save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(split.filename_to_tensors)


def _write_facts(folder: Path, trained: Trained, dtype: str, found: Mapping[str, Difference]) -> None:
    """What the folder was made of; a template of the user's own goes with it."""
    assert trained.adapter is not None
    template, own = trained.template, Path(trained.template).expanduser()
    if template not in ("released", "alpaca", "chat") and own.is_file():
        shutil.copyfile(own, folder / TEMPLATE)
        template = TEMPLATE
    facts = {
        "base": trained.base.name_or_path, "revision": trained.base.revision, "adapter": str(trained.adapter),
        "adapter_sha256": hash_file(trained.adapter / ADAPTER_FILES[1]), "dtype": dtype, "template": template,
        "verified": {name: asdict(difference) for name, difference in found.items()},
    }  # fmt: skip
    _write_json(folder / MERGED, facts)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _empty_target(out: Path) -> Path:
    """Raises ConfigError: it is a file, or a folder that holds something."""
    try:
        target = out.expanduser().resolve()
        if target.exists() and not target.is_dir():
            raise ConfigError(f"--out: {out} is a file, expected a folder")
        if target.is_dir() and any(target.iterdir()):
            raise ConfigError(f"--out: {out} is not empty: choose another folder")
    except (OSError, RuntimeError) as error:  # a locked folder, a name too long, no such user's home
        raise ConfigError(f"--out: {out}: {getattr(error, 'strerror', None) or error}") from error
    return target


@contextmanager
def _new_folder(target: Path, *, room: int) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its name at the end; after a fault nothing of it is left.

    Raises:
        SetupError: fewer than `room` bytes are free, or the disk's own fault.
    """
    fresh = target.with_name(f".{target.name}.new")
    try:
        with os_errors():
            shutil.rmtree(fresh, ignore_errors=True)  # of a merge that was killed
            fresh.mkdir(parents=True)
            if (free := shutil.disk_usage(fresh).free) < room:
                raise SetupError(f"{target} takes {size(room)}, and {size(free)} are free there")
            yield fresh
            os.replace(fresh, target)
    except OSError as error:
        raise SetupError(f"{target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
