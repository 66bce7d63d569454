"""`ibft-fast evaluate generate`: from a model and a suite's problems to a file of samples that the judge takes."""

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ibft.config import BUNDLED
from ibft.errors import ConfigError, DataError
from ibft.evaluation.engines import Engine, ServerEngine, TransformersEngine, check_chat_template, encode_prompt
from ibft.evaluation.local_model import LocalModel, check_adapter
from ibft.evaluation.prompts import Prompt, Style, choose_style, make_prompt, stops_of
from ibft.evaluation.sample_file import SampleFile, all_wanted
from ibft.evaluation.suites import Suite, load_problems, suite_of
from ibft.rundir import template_of

PACKAGES = ("ibft-fast", "torch", "transformers", "peft", "bitsandbytes")
QUANTIZATIONS = ("none", "nf4")
DEVICES = ("auto", "cpu", "cuda")


def run_generate(
    *,
    model: str,
    adapter: str | None = None,
    suite: str,
    problems: str | None = None,
    descriptions: str | None = None,
    out: str,
    n: int = 1,
    temperature: str = "0",
    prompt_style: str = "auto",
    max_new_tokens: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    top_p: float = 0.95,
    quantization: str = "none",
    device: str = "auto",
    base_url: str | None = None,
    concurrency: int = 8,
) -> None:
    """n samples of each problem at each temperature, written to `out`; a file that a stop left is gone on with.

    Args:
        model: folder, hub id or `bundled:tiny`; with `base_url` the name that the server knows.
        adapter: folder of a PEFT adapter, as a run saves it.
        suite: see `ibft.evaluation.suites`. problems: file or hub id; default the suite's own on the hub.
        descriptions: rows of task_id and detail_description: VerilogEval's problem statements.
        temperature: one or more, separated by commas; 0 is greedy and allows one sample a problem.
        prompt_style: see `ibft.evaluation.prompts`.
        batch_size: samples at once; with a server, samples written at once.
        top_p: nucleus of each token's distribution; 0.95 is usual for sampled code, 1 keeps it whole.
        quantization: none or nf4. device: auto, cpu, cuda. bf16 on a GPU that has it, else fp16; fp32 on a CPU.
        base_url: of an OpenAI-compatible server, e.g. http://localhost:8000/v1. concurrency: requests at once.

    Raises:
        ConfigError: an argument is out of range or contradicts another; `out` was made with other settings.
        DataError: problems or descriptions cannot be read. SetupError: no such model, device or server.
    """
    chosen = suite_of(suite)
    temperatures = parse_temperatures(temperature, n)
    check_numbers(
        n=n, max_new_tokens=max_new_tokens, batch_size=batch_size, concurrency=concurrency, seed=seed, top_p=top_p
    )
    check_choice("--quantization", quantization, QUANTIZATIONS)
    check_choice("--device", device, DEVICES)
    template = None if adapter is None else template_of(Path(adapter).expanduser())
    style = choose_style(prompt_style, suite, template=template)
    path = check_out(out)
    if base_url is not None and (adapter is not None or quantization != "none" or device != "auto"):
        raise ConfigError(
            "--adapter, --quantization and --device are the server's business with --base-url: leave them out"
        )
    if descriptions is not None and suite != "verilogeval-v1":
        raise ConfigError(f"--descriptions: only verilogeval-v1 has them apart, got --suite {suite}")
    adapter_hash = None if adapter is None else check_adapter(adapter)

    from ibft.console import Console

    console = Console()
    prompts = load_prompts(chosen, problems, descriptions, style)
    wanted = all_wanted(list(prompts), n, temperatures, seed)
    settings: dict[str, Any] = {
        "model": model, "adapter": adapter, "adapter_sha256": adapter_hash, "suite": suite, "prompt_style": style,
        "prompts_sha256": hash_prompts(prompts), "n": n, "temperatures": temperatures, "top_p": top_p,
        "max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    stops = stops_of(style, suite)
    start: Callable[[], Engine]
    if base_url is None:
        if model == BUNDLED and problems is not None and Path(problems).expanduser().exists():
            os.environ["HF_HUB_OFFLINE"] = "1"  # all is on disk: no library need ask the network for anything
        here = LocalModel.of(model, adapter, quantization, device)
        if style == "chat":
            check_chat_template(here.tokenizer)
        start = lambda: TransformersEngine(here.load(), here.tokenizer, stops, max_new_tokens, top_p)  # noqa: E731
        settings |= {
            "engine": "transformers",
            "quantization": quantization,
            "device": here.name(),
            "versions": versions(),
        }
        where = here.name() if quantization == "none" else f"{quantization}, {here.name()}"
        lengths = [len(encode_prompt(here.tokenizer, prompt)) for prompt in prompts.values()]
        notice = too_long(lengths, max_new_tokens, here.positions)
    else:
        server = ServerEngine(base_url, model, stops, max_new_tokens, top_p, concurrency)
        start, notice = (lambda: server), None
        settings |= {"engine": base_url, "versions": {"ibft-fast": versions()["ibft-fast"]}}
        where = base_url
    file = SampleFile(path)
    done = file.begin(settings, wanted)
    by = f"{model} + {adapter}" if adapter else model
    console.line(
        f"generate: {suite}, {len(prompts):,} problems, n {n:,}, temperature {temperature}: {len(wanted):,} samples; "
        f"{style} prompts; {by} ({where})"
    )
    if done:
        console.notice(f"{out} holds {done:,} of them already")
    if notice:
        console.notice(notice)
    with console.progress("generating", len(wanted)) as advance:
        advance(done)
        try:
            empty = file.fill(
                start, prompts, wanted, done, style=style, suite=suite, batch_size=batch_size, progress=advance
            )
        except KeyboardInterrupt:
            console.notice(f"what was generated is in {out}; the same command goes on")
            raise
    told = f"; {empty:,} of the new ones are empty" if empty else ""
    console.line(f"samples: {len(wanted):,} in {out}, {len(wanted) - done:,} of them new{told}")


def too_long(lengths: Sequence[int], max_new_tokens: int, positions: int | None) -> str | None:
    """A notice where prompts leave no room for their completions."""
    count = sum(length + max_new_tokens > positions for length in lengths) if positions else 0
    if not count:
        return None
    return f"{count:,} prompts with --max-new-tokens {max_new_tokens:,} go beyond the model's {positions:,} positions"


def load_prompts(suite: Suite, problems: str | None, descriptions: str | None, style: Style) -> dict[str, Prompt]:
    """By task_id, in the order of the problems.

    Raises:
        ConfigError, DataError: as `load_problems`, `load_descriptions` and `make_prompt`.
    """
    found = load_problems(suite, problems)
    told = {} if descriptions is None else load_descriptions(descriptions, found)
    return {name: make_prompt(style, suite.name, problem, told.get(name)) for name, problem in found.items()}


def load_descriptions(path: str, task_ids: Mapping[str, Any]) -> dict[str, str]:
    """The statement of every task. Raises DataError where one has none."""
    from ibft.data.sources import load_rows

    texts = {str(row.get("task_id")): row.get("detail_description") for row in load_rows(path)}
    missing = [name for name in task_ids if not isinstance(texts.get(name), str)]
    if missing:
        raise DataError(
            f"--descriptions: {path} has no detail_description for {len(missing):,} of the problems, e.g. {missing[0]}"
        )
    return {name: str(texts[name]) for name in task_ids}


def hash_prompts(prompts: Mapping[str, Prompt]) -> str:
    rows = [[name, prompt.text, prompt.chat, prompt.special_tokens] for name, prompt in prompts.items()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def parse_temperatures(text: str, n: int) -> list[float]:
    """Raises ConfigError: no number, negative, named twice, or 0 for more than one sample."""
    expected = f"--temperature: got {text}, expected numbers from 0 separated by commas"
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(expected) from None
    if not all(math.isfinite(each) and each >= 0 for each in found):
        raise ConfigError(expected)
    if len(set(found)) < len(found):
        raise ConfigError(f"--temperature: got {text}, one of them twice")
    if 0 in found and n > 1:
        raise ConfigError(
            f"--temperature 0 is greedy, so that all samples of a problem are the same: expected --n 1, got {n}"
        )
    return [abs(each) for each in found]  # -0.0 reads as 0


def check_numbers(*, n: int, max_new_tokens: int, batch_size: int, concurrency: int, seed: int, top_p: float) -> None:
    """Raises ConfigError for the first that is out of range."""
    at_least_one = {
        "--n": n, "--max-new-tokens": max_new_tokens, "--batch-size": batch_size, "--concurrency": concurrency,
    }  # fmt: skip
    for option, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{option}: got {value}, expected 1 or more")
    if seed < 0:
        raise ConfigError(f"--seed: got {seed}, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p: got {top_p}, expected more than 0 and at most 1")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{option}: got {value}, expected {' or '.join(choices)}")


def check_out(out: str) -> Path:
    """Raises ConfigError for what cannot be a file of samples."""
    path = Path(out).expanduser()
    if path.name.endswith(".gz"):
        raise ConfigError(f"--out: got {out}, expected a file that can be added to: not a compressed one")
    try:
        if path.is_dir():
            raise ConfigError(f"--out: {out} is a folder, expected a file")
        if not path.parent.is_dir():
            raise ConfigError(f"--out: no folder {path.parent}")
    except OSError as error:  # a locked folder, a name too long
        raise ConfigError(f"--out: {out}: {error.strerror or error}") from error
    return path


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
