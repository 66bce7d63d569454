"""`ibft-fast merge`: the adapter added into the full-precision base, as a model folder that any server reads.

    W' = W + scale * B A        scale = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); W [out, in],
                                A [r, in], B [out, r]; the sum in fp32, then rounded once to the chosen dtype

The base is read tensor by tensor and written shard by shard: one shard (4 GB) is all that memory holds. Training saw
the base in 4 bits, so that the merged model stands on other weights than those that the adapter was trained on: the
check at the end says what that changes, apart from the error of the merge itself.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ibft.config import BUNDLED
from ibft.console import Console
from ibft.errors import ConfigError, SetupError
from ibft.evaluation.local_model import ADAPTER_FILES
from ibft.hashes import hash_file
from ibft.merge_base import QUANTISED, Base, write_json
from ibft.merge_check import Difference, verify_merge
from ibft.merge_target import filling, fresh_folder_of
from ibft.model_card import hub_id
from ibft.trained import MERGED, NAMED_TEMPLATES, TEMPLATE, Trained, find_trained, local_model, read_json

if TYPE_CHECKING:
    from torch import Tensor

SHARD = "4GB"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FLOATS = ("float32", "bfloat16", "float16", "float64")  # of A and B
PREFIX = "base_model.model."  # of every name in PEFT's files
LARGEST = 1e30  # of lora_alpha: what fp32 can still scale by
# settings of an adapter that leave W + scale * B A as it is; every other one must be off
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def run_merge(
    run: str, out: Path, dtype: str = "bf16", *, verify: bool = True, max_shard_size: int | str = SHARD
) -> None:
    """Write the merged model of `run` (see `ibft.trained.find_trained`) to `out`, all of it or nothing.

    verify: compare tensors and logits at the end (see `ibft.merge_check`).

    Raises:
        ConfigError: no adapter in `run`; `out` holds something. SetupError: no such base, or one that is quantised;
        an adapter that is damaged, of another base or of an unknown kind; no room; the result is not base + adapter.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: got {dtype}, expected {', '.join(DTYPES)}")
    target, fresh = fresh_folder_of(out)
    trained = find_trained(run)
    if trained.adapter is None:
        raise ConfigError(f"{run} is a whole model: there is no adapter to merge (no {ADAPTER_FILES[0]})")
    loras = read_adapter(trained.adapter)
    here = local_model(trained)
    base = Base.of(trained.base)
    check_pair(base, loras, trained.adapter)
    parameters = sum(map(math.prod, base.shapes.values()))
    console = Console()
    console.line(f"merge: {trained.adapter} ({len(loras)} matrices) into {trained.base.name_or_path}, {dtype}")
    with filling(target, fresh, room=parameters * {"fp32": 4}.get(dtype, 2)):
        files = write_weights(base, loras, fresh, dtype, max_shard_size, console)
        if base.copy_others(fresh, DTYPES[dtype]):
            console.notice(f"config.json names a {QUANTISED}, but the weights are in full precision: left out")
        found: dict[str, Difference] = {}
        if verify:
            found = verify_merge(here, base, fresh, console)
        else:
            console.notice("not verified: --no-verify")
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

    rank, scale = _rank_and_scale(folder / ADAPTER_FILES[0])
    path = folder / ADAPTER_FILES[1]
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SetupError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    loras = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(f"{stem}.lora_B.weight", None)
        if b is None or a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            shapes = f"A {list(a.shape)} and B {None if b is None else list(b.shape)}"
            raise SetupError(f"{path}: {stem}: got {shapes}, expected rank {rank} in both ({ADAPTER_FILES[0]})")
        for tensor in (a, b):
            if (kind := str(tensor.dtype).removeprefix("torch.")) not in FLOATS:
                raise SetupError(f"{path}: {stem}: got {kind}, expected {', '.join(FLOATS)}")
        if not stem.startswith(PREFIX):  # PEFT would find none of it
            raise SetupError(f"{path}: got {name}, expected names that begin with {PREFIX}")
        loras[stem.removeprefix(PREFIX) + ".weight"] = Lora(a.float(), b.float(), scale)
    if tensors or not loras:
        raise SetupError(f"{path}: got {next(iter(tensors), 'no tensor')}, expected pairs of lora_A and lora_B alone")
    return loras


def _rank_and_scale(path: Path) -> tuple[int, float]:
    """Of an adapter's settings. Raises SetupError: of a kind that cannot be merged, or not such as PEFT writes them."""
    settings = read_json(path)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    rooted = settings.get("use_rslora", False)
    bias = settings.get("bias", "none") == "none"
    unknown = [key for key, value in settings.items() if value and key not in NEUTRAL and not (key == "bias" and bias)]
    if settings.get("peft_type") != "LORA" or settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        unknown.append("peft_type" if settings.get("peft_type") != "LORA" else "init_lora_weights")
    if unknown:
        told = ", ".join(f"{key}={settings.get(key)}" for key in unknown)
        raise SetupError(f"{path}: merge knows plain LoRA alone, got {told}")
    # a bool is an int, and JSON as Python reads it has NaN and infinities
    if (
        bool in (type(rank), type(alpha))
        or not isinstance(rank, int)
        or not isinstance(alpha, int | float)
        or rank < 1
        or not abs(alpha) < LARGEST
    ):
        raise SetupError(f"{path}: got r {rank} and lora_alpha {alpha}, expected two finite numbers")
    if not isinstance(rooted, bool | None):
        raise SetupError(f"{path}: got use_rslora {rooted!r}, expected true or false")
    return rank, alpha / (math.sqrt(rank) if rooted else rank)


def check_pair(base: Base, loras: Mapping[str, Lora], adapter: Path) -> None:
    """Raises SetupError: the adapter is of another base."""
    for name, lora in loras.items():
        if base.shapes.get(name) != lora.shape:
            got = f"{list(base.shapes[name])}" if name in base.shapes else "none"
            raise SetupError(
                f"{adapter} does not go with {base.name}: {name}: the base has {got}, the adapter is for "
                f"{list(lora.shape)}"
            )


# --- writing --------------------------------------------------------------------------------------


def write_weights(
    base: Base, loras: Mapping[str, Lora], folder: Path, dtype: str, max_shard_size: int | str, console: Console
) -> int:
    """The merged tensors, in the base's order; how many files they took. Raises SetupError: one is not finite."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    kind = getattr(torch, DTYPES[dtype])
    planned = {name: torch.empty(shape, dtype=kind, device="meta") for name, shape in base.shapes.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_shard_size)
    done = 0
    with base.reading() as weights, console.progress("merging", len(planned)) as advance:
        for filename, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                weight = weights[name]
                merged = loras[name].added_to(weight) if name in loras else weight
                shard[name] = merged.to(kind).contiguous()
                if not shard[name].isfinite().all():
                    why = f"beyond {dtype}: use --dtype bf16 or fp32" if merged.isfinite().all() else "not finite"
                    raise SetupError(f"{name}: merged, it has values that are {why}")
                advance(done := done + 1)
            save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return len(split.filename_to_tensors)


def _write_facts(folder: Path, trained: Trained, dtype: str, found: Mapping[str, Difference]) -> None:
    """What the folder was made of, without paths of this machine; a template of the user's own goes with it."""
    assert trained.adapter is not None
    base, template = trained.base.name_or_path, trained.template
    if template not in NAMED_TEMPLATES:
        shutil.copyfile(template, folder / TEMPLATE)
        template = TEMPLATE
    facts = {
        "base": base if base == BUNDLED or hub_id(base) else Path(base).name, "revision": trained.base.revision,
        "adapter": trained.adapter.resolve().name, "adapter_sha256": hash_file(trained.adapter / ADAPTER_FILES[1]),
        "dtype": dtype, "template": template,
        "verified": {name: asdict(difference) for name, difference in found.items()},
    }  # fmt: skip
    write_json(folder / MERGED, facts)
