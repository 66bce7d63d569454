"""The bottleneck's settings for a Hugging Face trainer: the names of `ibft-fast train`'s section `ib`."""

from typing import Any, Literal

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator

from ibft.config import IBConfig, NonNegative
from ibft.errors import ConfigError


class IBFTConfig(IBConfig):
    """alpha, beta, layer, latent_dim, encoder, kl_reduction, learning_rate and the rest of `ibft.config.IBConfig`.

    Raises:
        ConfigError: an unknown name, or a value of the wrong kind or out of range.
    """

    kl_tokens: Literal["real", "response"] = "real"
    """Tokens of the KL: real (what the attention mask shows), response (labelled positions). `all` counts pads, and
    how many there are is a data collator's choice: not to be had here."""
    learning_rate: NonNegative | None = None
    """Of encoder and up-projection; default: the TrainingArguments' learning_rate."""

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, values: Any, handler: ModelWrapValidatorHandler["IBFTConfig"]) -> "IBFTConfig":
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError(_line(error)) from None


def _line(error: ValidationError) -> str:
    """Of the first field that is wrong. A union says one thing a member: each is named once."""
    first, *_ = errors = error.errors()
    key = first["loc"][:1]
    reasons = dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in errors if each["loc"][:1] == key)
    message = " or ".join(reason[0].lower() + reason[1:] for reason in reasons)
    return f"ib.{key[0]}: got {first['input']!r}: {message}" if key else message
