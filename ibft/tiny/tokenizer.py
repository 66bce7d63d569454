"""Trains the tiny base's tokenizer: byte-level BPE, lossless on any text, with no token added before or after it."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024, max_length: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts`.

    Args:
        texts: the documents that decide the merges; all 256 bytes are in the vocabulary whatever they hold.
        vocab_size: tokens in all, the two special ones (ids 0 EOS, 1 padding) included.
        max_length: the model's context, in tokens.

    Raises:
        ValueError: `vocab_size` cannot hold the bytes and the special tokens.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least 258 (256 bytes, 2 special tokens)")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
