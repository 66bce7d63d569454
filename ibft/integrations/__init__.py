"""IB-FT in the trainers of others: transformers' Trainer and TRL's SFTTrainer (docs/integrations.md).

Names resolve on first use, so that importing this package imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "IBFTConfig": "ibft.integrations.config",
    "IBFTMixin": "ibft.integrations.trainer",
    "IBFTTrainer": "ibft.integrations.trainer",
    "IBFTSFTTrainer": "ibft.integrations.sft",  # not in __all__: a star import must not need TRL
}

__all__ = ["IBFTConfig", "IBFTMixin", "IBFTTrainer"]

if TYPE_CHECKING:
    from ibft.integrations.config import IBFTConfig
    from ibft.integrations.trainer import IBFTMixin, IBFTTrainer


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ibft.integrations' has no attribute {name!r}")
