"""Where a run goes on: which checkpoint `--resume` means, whether it is of this run, and what to do without one.

never   a folder that holds a run is refused
auto    the newest whole checkpoint of the run folder; without any, from the beginning, and said so
PATH    that checkpoint (RUN/checkpoints/step-N), or the newest of that run
"""

import hashlib
from pathlib import Path
from typing import Any

from ibft import checkpoint
from ibft.config import BUNDLED, Config
from ibft.errors import ConfigError, SetupError
from ibft.rundir import RunDir

Facts = dict[str, Any]


def open_run(out: Path | None, resume: str) -> tuple[RunDir, str]:
    """The run folder, and how it goes on: never, auto, or a checkpoint's path.

    Raises:
        ConfigError: `never` and the folder holds a run; `auto` without a folder; a path that is none of the two.
    """
    if resume == "never":
        return RunDir(out), resume
    if resume == "auto":
        if out is None:
            raise ConfigError("--resume auto: name the run folder with -o")
        return RunDir(out, resumes=True), resume
    path = Path(resume).expanduser()
    if (path / checkpoint.MANIFEST).exists() or path.name.startswith("step-"):
        return RunDir(out or path.resolve().parent.parent, resumes=True), str(path)
    run = RunDir(path, resumes=True)
    if not run.holds_run or out not in (None, path):
        raise ConfigError(f"--resume: got {resume}, expected never, auto, a run folder or RUN/checkpoints/step-N")
    return run, "auto"


def find_checkpoint(run: RunDir, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None: there is none yet; and what to tell the user.

    Raises:
        ConfigError: the one that was named is not whole, or the run is finished and has none.
        SetupError: checkpoints, and not one of them whole.
    """
    if resume == "never" or (resume == "auto" and not run.holds_run):
        return None, []
    if resume != "auto":
        if reason := checkpoint.verify(Path(resume)):
            raise ConfigError(f"--resume: {resume} is no whole checkpoint: {reason}")
        named, newest = Path(resume).resolve(), checkpoint.latest(run.checkpoints)[0]
        if newest is not None and named.parent == newest.parent.resolve() and named.name != newest.name:
            raise ConfigError(
                f"--resume: {run.path} holds newer checkpoints ({newest.name}): name another folder with -o, or "
                "delete them"
            )
        return Path(resume), []
    found, warnings = checkpoint.latest(run.checkpoints)
    if found is None and warnings:
        raise SetupError(f"{run.path}: no checkpoint is whole ({warnings[0]}): start anew in another folder")
    if found is None and run.finished:
        raise ConfigError(f"{run.path} is finished, and holds no checkpoint: name another folder with -o")
    if found is None:
        warnings.append(f"{run.path} holds no checkpoint yet: the run starts from the beginning")
    return found, [f"warning: {line}" for line in warnings]


def check_same_run(folder: Path, old: Any, new: Facts, *, force: bool) -> list[str]:
    """Notices of what differs, where `force` goes on in spite of it.

    Raises:
        ConfigError: configuration, data, tokenizer or base are not those of the checkpoint.
    """
    from ibft.trainer_state import changes

    if not isinstance(old, dict):
        raise ConfigError(f"{folder}: does not say what run it is of")
    different = changes(old, new)
    if different and not force:
        shown = "; ".join(different[:4]) + (f"; and {len(different) - 4} more" if len(different) > 4 else "")
        raise ConfigError(f"{folder} is of another run: {shown} (--force-resume goes on with what is now)")
    return [f"--force-resume: {line}" for line in different]


def identity_of_base(config: Config, base_config: Any) -> str:
    """A hub commit; of a local folder the sizes of its files and a hash of its configuration."""
    if config.model.name_or_path == BUNDLED:
        return BUNDLED
    if commit := getattr(base_config, "_commit_hash", None):
        return str(commit)
    folder = Path(config.model.name_or_path).expanduser()
    try:
        sizes = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.suffix == ".safetensors")
        content = (folder / "config.json").read_bytes()
    except OSError:
        return config.model.name_or_path
    return hashlib.sha256(content + repr(sizes).encode()).hexdigest()
