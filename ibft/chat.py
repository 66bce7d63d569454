"""`ibft-fast generate`: what a run has learned to say, for one prompt or for one after another.

Each prompt stands alone, framed as in training. Text appears as soon as it is certain: the whole answer is decoded
again at every token, since a token alone may be part of a letter, and a tokenizer of SentencePiece's kind drops the
first space of whatever it is given, the indentation of a line of code for one.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ibft.console import Console
from ibft.errors import ConfigError, DataError, OutOfMemoryError
from ibft.evaluation.local_model import LocalModel
from ibft.output import to_stdout
from ibft.trained import find_trained, local_model

if TYPE_CHECKING:
    from torch import Tensor


def run_generate(
    run: str,
    prompt: str | None,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    adapter: str | None = None,
) -> None:
    """The answer to `prompt` on stdout; without one, to each line of stdin until it ends or Ctrl-C.

    Greedy at temperature 0. One source of randomness serves all answers: the same prompts in the same order get the
    same answers. Everything but answers goes to stderr.

    Raises:
        ConfigError: an argument is out of range, or `run` holds nothing to generate with. DataError: a prompt that is
        no text, or that its template refuses; stdin or stdout is closed, or takes no more. SetupError: no such base, or
        damaged weights. OutOfMemoryError.
    """
    from ibft.data.encode import encode_prompts
    from ibft.data.templates import choose_template
    from ibft.evaluation.engines import choose_tokens
    from ibft.evaluation.generate_samples import check_numbers

    check_numbers(n=1, max_new_tokens=max_new_tokens, batch_size=1, concurrency=1, seed=seed, top_p=top_p)
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"--temperature: got {temperature}, expected a number from 0")
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt is empty")
    if prompt is None and sys.stdin is None:
        raise DataError("standard input is closed, and there is no --prompt")
    to_stdout("")  # refused before a model is loaded
    trained = find_trained(run, adapter)
    here = local_model(trained)
    template = choose_template(trained.template, here.tokenizer)
    console = Console(to_stderr=True)
    bits = "4-bit " if trained.base.quantization == "nf4" else ""
    on = f"{trained.adapter} on {bits}{trained.base.name_or_path}" if trained.adapter else trained.base.name_or_path
    console.line(f"generate: {on}, {here.name()}; template {template.name}")
    noise = random.Random(seed)

    def answer(model: Any, prompt: str) -> None:
        prompt_ids = encode_prompts([_checked(prompt)], here.tokenizer, template)[0]
        if here.positions and len(prompt_ids) + max_new_tokens > here.positions:
            console.notice(f"a prompt of {len(prompt_ids):,} tokens: the model has {here.positions:,} positions in all")
        stream_answer(
            model, here.tokenizer, prompt_ids, max_new_tokens,
            choose=lambda logits: choose_tokens(logits, [temperature], [noise.random()], top_p), show=to_stdout,
        )  # fmt: skip
        to_stdout("\n")

    with _out_of_memory(here):
        model = here.load()
        if prompt is not None:
            answer(model, prompt)
            return
        if sys.stdin.isatty():
            console.line("each line is a prompt of its own; Ctrl-D or Ctrl-C leaves")
        try:
            for line in read_prompts():
                answer(model, line)
        except KeyboardInterrupt:
            to_stdout("\n")


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    choose: "Callable[[Tensor], Tensor]",
    show: Callable[[str], None],
) -> str:
    """The text after the prompt, up to a stop id or max_new_tokens. show: called with each further piece of it.

    choose: logits [1, V] -> the next id [1, 1], on the same device.
    """
    from ibft.evaluation.generate import continue_prompts, decode_new, pad_id_for, stop_ids_of

    stop_ids = stop_ids_of(model, tokenizer)
    ids: list[int] = []
    shown = ""

    def stopped(new: "Tensor") -> bool:
        nonlocal shown
        if int(new) in stop_ids:
            return True
        ids.append(int(new))
        text = decode_new(tokenizer, ids)
        if not text.endswith("\ufffd"):  # a letter that lacks some of its bytes yet
            show(text[len(shown) :])
            shown = text
        return False

    pad_id = pad_id_for(tokenizer, stop_ids)
    continue_prompts(model, [prompt_ids], max_new_tokens, choose=choose, all_stopped=stopped, pad_id=pad_id)
    text = decode_new(tokenizer, ids)
    show(text[len(shown) :])
    return text


def read_prompts() -> Iterator[str]:
    """Lines of stdin that are not blank. At a terminal they can be edited, and earlier ones called back."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        with suppress(ImportError):  # not on every system
            import readline  # noqa: F401  `input` edits with it once it is there
    while True:
        try:
            line = input("> " if asks else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError("standard input: not UTF-8 text") from error
        if line.strip():
            yield line


@contextmanager
def _out_of_memory(here: LocalModel) -> Iterator[None]:
    """Raises OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one too
        if "out of memory" in str(error) or "DefaultCPUAllocator" in str(error):
            raise OutOfMemoryError(f"out of memory on {here.device}: try a smaller --max-new-tokens") from error
        raise


def _checked(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes that the shell handed on as they are
        raise DataError("the prompt is not UTF-8 text") from error
    return prompt
