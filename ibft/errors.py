"""Errors that a user can mend. Each carries the exit code that the command line ends with (docs: README, exit codes).

Whatever is raised as an `IBFTError` is shown as one line on stderr; anything else is a bug and keeps its traceback.
"""

from collections.abc import Mapping

EXIT_INTERRUPTED = 130  # SIGINT; 143 for SIGTERM


class IBFTError(Exception):
    """Base class. `exit_code` is the process's exit status when the error reaches the command line."""

    exit_code = 1


class ConfigError(IBFTError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""

    exit_code = 2


class DataError(IBFTError):
    """Training or evaluation data is missing, malformed or empty."""

    exit_code = 3


class SetupError(IBFTError):
    """The machine or the model lacks something: no CUDA, no weights, a gated or unreachable hub id."""

    exit_code = 4


class NonFiniteError(IBFTError):
    """A loss or gradient is NaN or infinite (after the fp16 scaler's own back-offs). parts: of the loss, and norms."""

    exit_code = 5

    def __init__(self, message: str, parts: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.parts = dict(parts or {})


class OutOfMemoryError(IBFTError):
    """The device has not enough memory for the configured step."""

    exit_code = 6
