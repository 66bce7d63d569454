"""The run directory: what a run leaves behind.

    config.yaml        the resolved configuration; `ibft-fast train RUN/config.yaml` repeats the run
    manifest.json      versions, commit, data hash, device, seed
    metrics.jsonl      one JSON object a log step; evaluations have eval_* keys
    latent.jsonl       the KL of each latent dimension at the same steps; with several bottlenecks a line a layer
    adapter/           last state: PEFT adapter, ib_bottleneck.safetensors, tokenizer, a model card (README.md)
    adapter-best/      the same, lowest held-out cross-entropy
    checkpoints/step-N/  what a run goes on from (`ibft.checkpoint`)
    non_finite.json    rows and loss parts of steps that were not finite
    STOP               made by anyone, ends the run as a signal does
    result.json        first and last losses, throughput, memory, Pass@1

Safetensors and JSON only: no pickle is ever written or loaded.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ibft.checkpoint import os_errors, share
from ibft.config import Config
from ibft.errors import ConfigError, DataError, SetupError
from ibft.lock import hold

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import ModuleDict
    from transformers import PreTrainedTokenizerBase

    from ibft.bottleneck import InformationBottleneck

BOTTLENECK_FILE = "ib_bottleneck.safetensors"
METRICS = "metrics.jsonl"
LATENT = "latent.jsonl"
_PACKAGES = (
    "ibft-fast",
    "torch",
    "triton",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "safetensors",
)


class RunDir:
    """Paths and writers of one run.

    resumes: it may hold a run, which is gone on with.

    Raises:
        ConfigError: the folder already holds a run, or is a file. SetupError: it cannot be written.
    """

    def __init__(self, path: Path | None, *, resumes: bool = False) -> None:
        self.path = Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S") if path is None else path
        try:
            self.holds_run = (self.path / "config.yaml").exists() or (self.path / "metrics.jsonl").exists()
            if self.holds_run and not resumes:
                raise ConfigError(
                    f"{self.path} already holds a run: go on with it by --resume auto, or choose another folder with -o"
                )
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"{self.path} is a file, expected a folder")
            above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
                raise SetupError(f"cannot write the run folder {self.path}: no right to write in {above}")
        except OSError as error:
            raise SetupError(f"cannot write the run folder {self.path}: {error.strerror or error}") from error

    def create(self) -> None:
        """Make the folder and take its lock; before this, nothing is written.

        Raises:
            SetupError: it cannot be written. ConfigError: another process writes in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            (self.path / METRICS).touch(exist_ok=self.holds_run)
        except (OSError, DataError) as error:
            raise SetupError(
                f"cannot write the run folder {self.path}: {getattr(error, 'strerror', None) or error}"
            ) from error

    def lock(self) -> None:
        """Raises ConfigError: another process writes in the folder. DataError: it cannot be written."""
        hold(self.path)

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapters(self) -> list[Path]:
        """Of the last state and of the best, those that there are."""
        return [folder for name in ("adapter", "adapter-best") if (folder := self.path / name).is_dir()]

    @property
    def manifest(self) -> dict[str, Any]:
        """As `write_manifest` has left it; empty before."""
        path = self.path / "manifest.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def rewind(self, step: int, evaluated: int) -> list[dict[str, Any]]:
        """The logged rows up to a checkpoint. Those after it are taken away, of latent.jsonl too: they will come again.

        evaluated: step of the last evaluation that the checkpoint knows of.
        """
        if (self.path / LATENT).exists():
            self._keep(LATENT, lambda row: step)
        return self._keep(METRICS, lambda row: evaluated if "eval_ce" in row else step)

    def _keep(self, name: str, last: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
        """Of a file's rows those up to their `last` step; what is no row of a step goes."""
        kept = []
        for line in (self.path / name).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # the half of a line that a kill left
                continue
            if isinstance(row, dict) and type(row.get("step")) is int and row["step"] <= last(row):
                kept.append(row)
        fresh = self.path / f".{name}.new"
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(fresh, self.path / name)
        return kept

    def write_config(self, config: Config) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def write_manifest(self, **facts: Any) -> None:
        manifest = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "commit": commit_of_source(),
            "versions": {name: _version(name) for name in _PACKAGES},
            **facts,
        }
        self.write_json("manifest.json", manifest)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        fresh = self.path / f".{name}.new"  # whoever finds the file finds all of it
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, self.path / name)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl; on disk when this returns, so that a killed run keeps its curve."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            # JSON has no infinity: an fp16 step that the loss scaler skips has such a gradient norm
            finite = {
                key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()
            }
            file.write(json.dumps({**finite, "time": round(time.time(), 3)}) + "\n")

    def log_latent(self, row: dict[str, Any]) -> None:
        """Append one row to latent.jsonl, to four digits. A run without a bottleneck has no such file."""
        digits = [float(f"{kl:.4g}") if isfinite(kl) else None for kl in row["kl"]]
        with (self.path / LATENT).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "kl": digits}) + "\n")

    def save_adapter(
        self,
        name: str,
        model: "PeftModel",
        bottleneck: "InformationBottleneck | ModuleDict | None",
        tokenizer: "PreTrainedTokenizerBase",
    ) -> Path:
        """Write adapter, bottleneck and tokenizer to `name`, replacing the old ones once the new are whole."""
        target = self.path / name
        fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():  # else a kill between the two renames below left the only good copy under the old name
            shutil.rmtree(old, ignore_errors=True)
        fresh.mkdir(parents=True)
        with os_errors():
            write_adapter(fresh, model, bottleneck, tokenizer)
            share(fresh)
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
        shutil.rmtree(old, ignore_errors=True)
        return target


def template_of(adapter: Path) -> str:
    """How the run that the adapter lies in (as RUN/adapter or RUN/checkpoints/step-N) framed its prompts, by the name
    of `data.template`; "released" for an adapter of elsewhere."""
    for folder in (adapter.parent, adapter.parent.parent):
        try:
            name = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["template"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return str(name)
    return "released"


def write_adapter(
    folder: Path,
    model: "PeftModel",
    bottleneck: "InformationBottleneck | ModuleDict | None",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Into an empty folder. Several bottlenecks, by layer: `layers.<number>.` before each one's keys."""
    from safetensors.torch import save_file
    from torch.nn import ModuleDict

    # embeddings are never trained; "auto" would ask the hub for the base's vocabulary at every save
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    if bottleneck is not None:
        state = bottleneck.state_dict(prefix="layers." if isinstance(bottleneck, ModuleDict) else "")
        on_host = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(on_host, folder / BOTTLENECK_FILE)
    tokenizer.save_pretrained(str(folder))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit_of_source() -> str | None:
    """The commit of the source tree that is running, if it is one; then "-dirty" where the code is not that one's."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=False).stdout
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "ibft", "kernels"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit.strip()}{'-dirty' if changed.strip() else ''}" if commit.strip() else None
