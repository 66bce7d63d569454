"""`ibft-fast generate`: the answers of the model that was trained, framed as in training, as text and nothing else."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from ibft import chat
from ibft.chat import stream_answer
from ibft.cli import app
from ibft.config import BUNDLED, ModelConfig
from ibft.errors import DataError
from ibft.merge import run_merge
from ibft.model import load_base
from ibft.tiny import BASE_DIR
from ibft.trained import find_trained
from ibft_kernels import _dispatch

SETTINGS = [
    "data.max_samples=40", "data.max_length=128", "train.max_steps=3", "train.learning_rate=5e-3", "eval.max_tasks=1",
    "eval.max_new_tokens=1", "train.eval_steps=2", "runtime.device=cpu", "runtime.seed=7",
]  # fmt: skip
PROMPT = "Write a function that returns the sum of two numbers."


def generate(*arguments, given=None):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("chat") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_dispatch, "INTERPRETED", False)  # as conftest.py does for tests alone
        result = CliRunner().invoke(app, ["train", *SETTINGS, "-o", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def prompts_asked(monkeypatch):
    """The ids of each prompt that reaches the model; nothing is loaded."""
    asked = []
    monkeypatch.setattr("ibft.evaluation.local_model.LocalModel.load", lambda self: None)
    monkeypatch.setattr(chat, "stream_answer", lambda model, tokenizer, ids, *rest, **named: asked.append(ids))
    return asked


def by_hand(adapter, count, quantised=True):
    """model.generate on the base that was trained, in PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    if quantised:
        base = load_base(ModelConfig(name_or_path=BUNDLED), dtype=torch.float32, device=torch.device("cpu"))
    else:
        base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([tokenizer(PROMPT + "\n", add_special_tokens=False)["input_ids"]])
    new = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["adapter", "adapter-best"])
def test_a_prompt_gets_the_greedy_answer_of_the_adapter(run, name):
    result = generate(run, "--prompt", PROMPT, "--max-new-tokens", 24, "--adapter", name)
    assert result.exit_code == 0, result.output
    expected = by_hand(run / name, 24)
    assert len(expected) > 20
    assert result.stdout == expected + "\n"
    assert f"run/{name} on 4-bit bundled:tiny, float32 on CPU; template released" in result.stderr


def test_the_two_adapters_of_the_run_answer_otherwise(run):
    """Else the test above could not tell one from the other."""
    assert by_hand(run / "adapter", 24) != by_hand(run / "adapter-best", 24)


def test_a_merged_model_answers_as_base_and_adapter_in_full_precision(run, tmp_path):
    run_merge(str(run), tmp_path / "merged", "fp32", verify=False)
    result = generate(tmp_path / "merged", "--prompt", PROMPT, "--max-new-tokens", 24)
    assert result.exit_code == 0, result.output
    assert result.stdout == by_hand(run / "adapter", 24, quantised=False) + "\n"


def test_each_line_of_a_pipe_is_a_prompt_of_its_own(run):
    alone = [generate(run, "--prompt", text, "--max-new-tokens", 8).stdout for text in ("Write add.", PROMPT)]
    result = generate(run, "--max-new-tokens", 8, given=f"Write add.\n\n  \n{PROMPT}")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(alone)
    assert ">" not in result.stderr


def test_stdin_that_ends_at_once_is_no_error(run, prompts_asked):
    result = generate(run, given="")
    assert (result.exit_code, result.stdout, prompts_asked) == (0, "", [])


def test_ctrl_c_leaves_politely(run, monkeypatch, prompts_asked):
    def read_prompts():
        yield "one"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "read_prompts", read_prompts)
    result = generate(run)
    assert (result.exit_code, len(prompts_asked)) == (0, 1)


def test_the_same_seed_gives_the_same_answers(run):
    def sample(seed):
        arguments = ("--max-new-tokens", 12, "--temperature", 1.5, "--seed", seed)
        result = generate(run, *arguments, given=f"{PROMPT}\n{PROMPT}\n")
        assert result.exit_code == 0, result.output
        return result.stdout

    first = sample(1)
    assert sample(1) == first
    assert sample(2) != first
    half = len(first) // 2
    assert first[:half] != first[half:]  # a prompt that is asked again may get another answer


def test_of_a_tiny_nucleus_only_the_likeliest_token_is_left(run):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12)
    greedy = generate(run, *arguments).stdout
    hot = ("--temperature", 1.5, "--seed", 1)
    assert generate(run, *arguments, *hot, "--top-p", 1e-6).stdout == greedy
    assert generate(run, *arguments, *hot, "--top-p", 1).stdout != greedy


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_one_line(run, error, prompts_asked, monkeypatch):
    def stream_answer(*_, **__):
        raise error

    monkeypatch.setattr(chat, "stream_answer", stream_answer)
    result = generate(run, "--prompt", "add")
    assert result.exit_code == 6
    assert result.stderr.splitlines()[-1] == "error: out of memory on cpu: try a smaller --max-new-tokens"


def test_an_error_of_another_kind_keeps_its_traceback(run, prompts_asked, monkeypatch):
    def stream_answer(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(chat, "stream_answer", stream_answer)
    assert isinstance(generate(run, "--prompt", "add").exception, RuntimeError)


def test_an_answer_that_may_not_fit_into_the_positions_is_told_of(run, prompts_asked):
    positions = json.loads((BASE_DIR / "config.json").read_text())["max_position_embeddings"]
    prompt = "add " * 20
    generate(run, "--prompt", prompt)
    count = len(prompts_asked[0])
    notice = f"note: a prompt of {count} tokens: the model has {positions:,} positions in all"
    for left, told in ((positions - count, False), (positions - count + 1, True)):
        result = generate(run, "--prompt", prompt, "--max-new-tokens", left)
        assert result.exit_code == 0
        assert (notice in result.stderr) == told


@pytest.mark.parametrize(("stream", "said"), [("stdin", "standard input is closed"), ("stdout", "standard output is")])
def test_a_closed_stream_is_refused_before_anything_is_loaded(stream, said, monkeypatch):
    monkeypatch.setattr(sys, stream, None)
    with pytest.raises(DataError, match=said):
        chat.run_generate("nowhere", None, max_new_tokens=1, temperature=0, top_p=1, seed=0)


def test_a_prompt_is_framed_by_the_template_of_the_run(run, tmp_path, prompts_asked):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("template: auto", "template: alpaca"))
    for folder in (run, tmp_path / "run", tmp_path / "run/adapter-best"):
        assert generate(folder, "--prompt", "add").exit_code == 0
    texts = [AutoTokenizer.from_pretrained(BASE_DIR).decode(ids) for ids in prompts_asked]
    assert texts[0] == "add\n"
    assert texts[1].endswith("### Instruction:\nadd\n\n### Response:\n")
    assert texts[2] == texts[1]


def test_an_adapter_alone_names_its_base(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "alone")
    found = find_trained(str(tmp_path / "alone"))
    assert (found.base.name_or_path, found.base.quantization, found.template) == (str(BASE_DIR), "nf4", "released")
    settings = json.loads((tmp_path / "alone/adapter_config.json").read_text())
    (tmp_path / "alone/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    result = generate(tmp_path / "alone", "--prompt", "add")
    assert result.exit_code == 2
    assert "names no base" in result.stderr


def test_half_a_letter_is_never_shown():
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    text = "  é = '\u20ac'\n    return"
    script = iter([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    model = load_base(ModelConfig(quantization="none"), dtype=torch.float32, device=torch.device("cpu"))
    pieces: list[str] = []
    answer = stream_answer(
        model, tokenizer, [5], 100, choose=lambda logits: torch.tensor([[next(script)]]), show=pieces.append
    )
    assert answer == "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5  # as they come


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--temperature", "nan"], "--temperature: got nan"),
        (["--temperature", "-1"], "--temperature: got -1"),
        (["--top-p", "0"], "--top-p: got 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--adapter", "best"], "--adapter: got best, expected adapter or adapter-best"),
    ],
)
def test_bad_arguments_are_refused(run, arguments, told):
    result = generate(run, *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert told in result.stderr


def test_what_cannot_be_asked_is_refused(run, tmp_path):
    for folder, told in [(tmp_path, "neither a run folder nor"), (tmp_path / "x", "no folder"), (BASE_DIR, "none")]:
        result = generate(folder, "--prompt", "add", *(["--adapter", "adapter"] if folder == BASE_DIR else []))
        assert result.exit_code == 2, result.output
        assert told in result.stderr
    result = generate(run, "--prompt", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert result.exit_code == 3
    assert "the prompt is not UTF-8 text" in result.stderr
    shutil.copytree(run / "adapter", tmp_path / "alone")
    weights = tmp_path / "alone/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = generate(tmp_path / "alone", "--prompt", "add")
    assert result.exit_code == 4
    assert "alone: damaged" in result.stderr
