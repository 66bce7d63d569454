"""ibft-fast: information-bottleneck fine-tuning (IB-FT, arXiv 2510.16022) of code LLMs.

`from ibft import ib_kl_loss` imports torch and triton; nothing of transformers, peft or bitsandbytes.
Names resolve on first use (PEP 562), so that `ibft-fast --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "ib_kl_loss": "ibft_kernels",
    "philox_normal": "ibft_kernels",
    "InformationBottleneck": "ibft.bottleneck",
    "IBObjective": "ibft.objective",
    "LossParts": "ibft.objective",
    "HiddenTap": "ibft.tap",
}

__all__ = [
    "HiddenTap",
    "IBObjective",
    "InformationBottleneck",
    "LossParts",
    "__version__",
    "ib_kl_loss",
    "philox_normal",
]

if TYPE_CHECKING:
    from ibft.bottleneck import InformationBottleneck
    from ibft.objective import IBObjective, LossParts
    from ibft.tap import HiddenTap
    from ibft_kernels import ib_kl_loss, philox_normal


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ibft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
