"""The bottleneck beside an adapter: `ib_bottleneck.safetensors`, as every run folder has it (`ibft.rundir`)."""

from pathlib import Path

from torch import nn

from ibft.errors import ConfigError, DataError
from ibft.rundir import BOTTLENECK_FILE


def _prefix(bottleneck: nn.Module) -> str:
    return "layers." if isinstance(bottleneck, nn.ModuleDict) else ""


def save_bottleneck(folder: str | Path, bottleneck: nn.Module) -> None:
    from safetensors.torch import save_file

    state = bottleneck.state_dict(prefix=_prefix(bottleneck))
    on_host = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(on_host, Path(folder) / BOTTLENECK_FILE)


def load_bottleneck(folder: str | Path, bottleneck: nn.Module) -> None:
    """Raises DataError: no such file, or a damaged one. ConfigError: of a bottleneck of other layers or sizes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / BOTTLENECK_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {BOTTLENECK_FILE}: expected a checkpoint that was written with a bottleneck"
        )
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    expected = bottleneck.state_dict(prefix=_prefix(bottleneck))
    for key in sorted(expected.keys() | found.keys()):
        was, needed = (tuple(state[key].shape) if key in state else None for state in (found, expected))
        if was != needed:
            raise ConfigError(f"{path}: {key}: got {was or 'none'}, expected {needed or 'none'} by the settings of ib")
    bottleneck.load_state_dict({key.removeprefix(_prefix(bottleneck)): value for key, value in found.items()})
