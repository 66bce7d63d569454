"""`IBFTSFTTrainer`: the mixin over TRL's SFTTrainer, for whoever has TRL. Not part of this project's tests."""

from ibft.errors import SetupError
from ibft.integrations.trainer import IBFTMixin

try:
    from trl import SFTTrainer
except ImportError as error:
    raise SetupError(f"IBFTSFTTrainer needs TRL: run `pip install trl` ({error})") from error


class IBFTSFTTrainer(IBFTMixin, SFTTrainer):
    """`trl.SFTTrainer` with an information bottleneck: `IBFTSFTTrainer(model, ..., ib=IBFTConfig(...))`."""
