"""What was trained, found by its folder: an adapter and its base, or a whole model that `ibft-fast merge` has written.

run folder      config.yaml (base, 4 bits or not, template) and adapter/ or adapter-best/
adapter folder  where it lies in its run the same; alone the base that adapter_config.json names, in 4 bits
merged folder   what `ibft-fast merge` has written; merged.json names the template
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibft.config import ModelConfig
from ibft.errors import ConfigError, SetupError
from ibft.evaluation.local_model import ADAPTER_FILES, LocalModel
from ibft.rundir import template_of

ADAPTERS = ("adapter", "adapter-best")
MERGED = "merged.json"  # what a merged folder was made of
NAMED_TEMPLATES = ("released", "alpaca", "chat")  # every other is a file
TEMPLATE = "prompt_template.jinja"  # a run's own template in a merged folder


@dataclass(frozen=True)
class Trained:
    """adapter: its folder; None: a whole model, as `merge` writes it. template: prompts were framed by, a name as in
    `data.template`, but never auto."""

    adapter: Path | None
    base: ModelConfig
    template: str = "released"


def find_trained(path: str, name: str | None = None) -> Trained:
    """What lies in a run folder, an adapter's folder or a merged folder. name: of a run's adapters; default "adapter".

    Raises:
        ConfigError: none of the three, no such adapter in it, or settings that cannot be read. SetupError: damaged.
    """
    folder = Path(path).expanduser()
    try:
        is_run, has_manifest, is_adapter, is_model = (
            (folder / each).is_file() for each in ("config.yaml", "manifest.json", ADAPTER_FILES[0], "config.json")
        )
    except OSError as error:  # a locked folder, a name too long
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    if name is not None and name not in ADAPTERS:
        raise ConfigError(f"--adapter: got {name}, expected {' or '.join(ADAPTERS)}")
    if name is not None and not is_run:
        raise ConfigError(f"--adapter={name} chooses within a run folder, and {path} is none (it has no config.yaml)")
    if is_run and (name is not None or has_manifest or not is_adapter):
        return _of_adapter(folder / (name or ADAPTERS[0]), folder)
    if is_adapter:
        return _of_adapter(folder, _run_of(folder))
    if is_model:
        base = ModelConfig(name_or_path=os.path.abspath(folder), quantization="none")
        return Trained(None, base, _template_of_merged(folder))
    what = "neither a run folder nor an adapter nor a model" if folder.is_dir() else "no folder"
    raise ConfigError(f"{path}: {what}; expected RUN (with config.yaml), RUN/adapter or what `merge` has written")


def _run_of(adapter: Path) -> Path | None:
    """The run that it lies in, as RUN/adapter, RUN/adapter-best or RUN/checkpoints/step-N; None: it is alone."""
    whole = Path(os.path.abspath(adapter))
    if whole.name in ADAPTERS:
        run = whole.parent
    elif whole.parent.name == "checkpoints" and whole.name.startswith("step-"):
        run = whole.parent.parent
    else:
        return None
    return run if all((run / each).is_file() for each in ("config.yaml", "manifest.json")) else None


def _of_adapter(adapter: Path, run: Path | None) -> Trained:
    """With base and template of its run; alone, with the base that it names."""
    if missing := [each for each in ADAPTER_FILES if not (adapter / each).is_file()]:
        saved = run is not None and (run / "checkpoints").is_dir()
        hint = "; a checkpoint is an adapter too: name RUN/checkpoints/step-N" if saved else ""
        raise ConfigError(f"{adapter} has no {', '.join(missing)}{hint}")
    settings = read_json(adapter / ADAPTER_FILES[0])
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if run is not None:
        from ibft.load_config import load_config

        config = load_config(run / "config.yaml", [])[0]
        base = config.model.name_or_path
        if isinstance(name, str) and name != base and _on_hub(name) and _on_hub(base):
            raise ConfigError(f"{run / 'config.yaml'} is of {base}, and {adapter / ADAPTER_FILES[0]} of {name}")
        named = config.data.template
        return Trained(adapter, config.model, template_of(adapter) if named == "auto" else _found_template(named, run))
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise ConfigError(f"{adapter / ADAPTER_FILES[0]} names no base: expected base_model_name_or_path")
    return Trained(adapter, ModelConfig(name_or_path=name, revision=revision))


def _on_hub(name: str) -> bool:
    """Two such names are of two bases. A path may be another way to the same one, moved or fetched since."""
    from ibft.model_card import hub_id

    return "/" in name and hub_id(name) is not None


def _found_template(name: str, run: Path) -> str:
    """A name as it is; of a file its path. Raises ConfigError: no such file, from here or beside config.yaml."""
    if name in NAMED_TEMPLATES:
        return name
    for path in (Path(name).expanduser(), run / name, run / Path(name).name):
        if path.is_file():
            return str(path)
    where = run / "config.yaml"
    raise ConfigError(f"{where}: data.template: no file {name} from here, nor beside it: put a copy there")


def _template_of_merged(folder: Path) -> str:
    if not (folder / MERGED).is_file():
        return "released"
    name = str(read_json(folder / MERGED).get("template", "released"))
    return str(folder / name) if name == TEMPLATE else name


def read_json(path: Path) -> dict[str, Any]:
    """Raises SetupError: unreadable, or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SetupError(f"{path}: got a {type(content).__name__}, expected an object")
    return content


def local_model(trained: Trained) -> LocalModel:
    """On the GPU where there is one, in the precision that training takes there.

    Raises:
        SetupError: no such base. ConfigError: not of the Llama family.
    """
    import torch

    from ibft.config import TrainConfig
    from ibft.model import load_model_config, load_tokenizer, resolve_path
    from ibft.run import choose_dtype

    if Path(resolve_path(trained.base.name_or_path)).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is on disk: no library need ask the network for anything
    base = trained.base.model_copy(update={"attn_implementation": "sdpa"})  # which every device has
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions = getattr(load_model_config(base), "max_position_embeddings", None)
    adapter = None if trained.adapter is None else str(trained.adapter)
    return LocalModel(base, adapter, device, choose_dtype(TrainConfig(), device), load_tokenizer(base), positions)
