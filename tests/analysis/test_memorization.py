"""`analyze memorization` on files: what is scored, a stop and going on, another K, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model_config
from typer.testing import CliRunner

from ibft.analysis import memorization
from ibft.analysis.cli import app
from ibft.analysis.memorization import read_scores
from ibft.errors import DataError
from ibft.tiny import BASE_DIR, task_file

SHARED_DATA = Path(os.environ.get("IBFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
PROMPTS = ["Add two numbers.", "Sort a list\nof words.", "Say hello.", "Count the letters of a word."]
ANSWERS = ["def add(a, b):\n    return a + b", "sorted(words)", "hello", "return {c: w.count(c) for c in w}", "", "x"]
ROWS = [{"instruction": PROMPTS[i % 4], "output": ANSWERS[i % 6] + " # ok" * (i % 3)} for i in range(11)]
ROWS[4] = {"instruction": PROMPTS[0], "input": "1, 2", "output": ""}  # nothing to score
SCORED = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path: Path) -> tuple[dict, list[dict]]:
    header, *rows = map(json.loads, path.read_text().splitlines())
    return header, rows


def run(*arguments):
    result = CliRunner().invoke(app, ["memorization", *map(str, arguments)], catch_exceptions=False)
    return result


def score(*arguments):
    result = run("--device", "cpu", *arguments)
    assert result.exit_code == 0, result.output
    return result


def assert_refused(result, code, *parts):
    assert result.exit_code == code, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE_DIR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> str:
    """A random model with sharp opinions, in fp32, with the bundled tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_model_config(layers=2, std=0.2)
    config.vocab_size = len(tokenizer)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def by_hand(model, tokenizer, prompt: str, response: str, k: int, text: str = "response") -> tuple[int, float, float]:
    """(tokens, Min-K%, Min-K%++) from one text's full logits in float64: another writing."""
    before = tokenizer(prompt + "\n", add_special_tokens=False)["input_ids"] if prompt else []
    ids = before + tokenizer(response, add_special_tokens=False)["input_ids"]
    first = 1 if text == "whole" else len(before)
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1].double(), -1).numpy()
    p = np.exp(log_p)
    mean = (p * log_p).sum(1)
    sigma = np.sqrt((p * log_p**2).sum(1) - mean**2)
    of_tokens = log_p[np.arange(len(ids) - 1), ids[1:]][first - 1 :]
    z = (of_tokens - mean[first - 1 :]) / sigma[first - 1 :]
    count = max(1, len(z) * k // 100)
    return len(z), -np.sort(of_tokens)[:count].mean(), -np.sort(z)[:count].mean()


def load(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_rows(path: Path, expected: dict[int, tuple[int, float, float]]):
    _, rows = lines_of(path)
    assert [row["id"] for row in rows] == list(expected)
    for row, (n, min_k, min_k_pp) in zip(rows, expected.values(), strict=True):
        assert row["n_tokens"] == n == len(row["log_probs"]) == len(row["z_scores"])
        assert row["min_k"] == pytest.approx(min_k, abs=2e-6)  # fp32, and 6 decimals
        assert row["min_k_pp"] == pytest.approx(min_k_pp, rel=1e-5, abs=2e-6)


# --- what is scored -------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "k"), [("response", 20), ("whole", 30)])
def test_rows_against_full_logits(folder, tokenizer, data, tmp_path, text, k):
    result = score("--model", folder, "--data", data, "-o", tmp_path / "s.jsonl", "--text", text, "-k", k)
    model = load(folder)
    scored = SCORED if text == "response" else range(11)
    pairs = {i: (row["instruction"] + ("\n" + row["input"] if "input" in row else ""), row["output"])
             for i, row in enumerate(ROWS)}  # fmt: skip
    assert_rows(tmp_path / "s.jsonl", {i: by_hand(model, tokenizer, *pairs[i], k, text) for i in scored})
    told = [line for line in result.stdout.splitlines() if line.startswith(("memorization:", "note:", "scores:"))]
    assert told == [
        f"memorization: {data}, {len(scored)} of 11 rows ({text}); {folder} (float32 on CPU)",
        *(["note: rows without a token to score, left out: 1"] if text == "response" else []),
        f"scores: {len(scored)} in {tmp_path}/s.jsonl, {len(scored)} of them new; "
        "lower = more memorised, rows count from 0",
    ]
    assert f"Min-{k}%++" in result.stdout


def test_header(folder, data, tmp_path):
    score("--model", folder, "--data", data, "-o", tmp_path / "s.jsonl", "--limit", 7)
    header, rows = lines_of(tmp_path / "s.jsonl")
    assert header.pop("versions")["torch"] == torch.__version__
    assert header == {
        "kind": "ibft-fast memorization scores", "model": folder, "adapter": None, "adapter_sha256": None,
        "data": str(data), "split": "train", "rows": 11, "limit": 7, "texts": 6, "text": "response", "k": 20.0,
        "data_sha256": hashlib.sha256(json.dumps(ROWS, sort_keys=True).encode()).hexdigest(),
        "max_length": 2048, "batch_tokens": 8192, "quantization": "none", "device": "float32 on CPU",
    }  # fmt: skip
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 5, 6]


def test_question_and_answer_and_plain_text(folder, tokenizer, tmp_path):
    rows = [{"question": PROMPTS[0], "answer": ANSWERS[0]}, {"text": ANSWERS[3]},
            {"prompt": PROMPTS[2], "completion": ANSWERS[1], "text": "not this"}]  # fmt: skip
    data = write_rows(tmp_path / "rows.jsonl", rows)
    score("--model", folder, "--data", data, "-o", tmp_path / "s.jsonl", "--text", "whole")
    pairs = [(PROMPTS[0], ANSWERS[0]), ("", ANSWERS[3]), (PROMPTS[2], ANSWERS[1])]
    model = load(folder)
    expected = {i: by_hand(model, tokenizer, *pair, 20, "whole") for i, pair in enumerate(pairs)}
    assert_rows(tmp_path / "s.jsonl", expected)
    score("--model", folder, "--data", write_rows(tmp_path / "qa.jsonl", rows[:1]), "-o", tmp_path / "qa-s.jsonl")
    assert_rows(tmp_path / "qa-s.jsonl", {0: by_hand(model, tokenizer, *pairs[0], 20)})
    assert_refused(
        run("--model", folder, "--data", data, "-o", tmp_path / "r.jsonl"), 3, "row 2 is a text without a response",
        "--text whole",
    )  # fmt: skip


def test_cut_on_the_right(folder, tokenizer, tmp_path):
    row = {"prompt": PROMPTS[0], "completion": "a b c d e f g h i j k l m n o p"}
    data = write_rows(tmp_path / "rows.jsonl", [row, {"prompt": "a long prompt " * 9, "completion": "x"}])
    prompt = len(tokenizer(PROMPTS[0] + "\n")["input_ids"])
    result = score("--model", folder, "--data", data, "-o", tmp_path / "s.jsonl", "--max-length", prompt + 3)
    score("--model", folder, "--data", data, "-o", tmp_path / "whole.jsonl")
    (cut,), (whole, _) = lines_of(tmp_path / "s.jsonl")[1], lines_of(tmp_path / "whole.jsonl")[1]
    assert (cut["id"], cut["n_tokens"]) == (0, 3)
    assert cut["log_probs"] == pytest.approx(whole["log_probs"][:3], abs=1e-5)
    assert "rows without a token to score, left out: 1" in result.stdout
    assert f"texts cut to {prompt + 3} tokens: 1" in result.stdout


def test_batches_and_the_order_of_rows_do_not_matter(folder, data, tmp_path):
    files = {"one": ["--batch-tokens", 1], "few": ["--batch-tokens", 60], "all": []}
    for name, more in files.items():
        score("--model", folder, "--data", data, "-o", tmp_path / f"{name}.jsonl", *more)
    turned = write_rows(tmp_path / "turned-rows.jsonl", ROWS[::-1])
    score("--model", folder, "--data", turned, "-o", tmp_path / "turned.jsonl")
    _, expected = lines_of(tmp_path / "one.jsonl")
    found = {name: lines_of(tmp_path / f"{name}.jsonl")[1] for name in ("few", "all")}
    found["turned"] = [row | {"id": 10 - row["id"]} for row in lines_of(tmp_path / "turned.jsonl")[1]][::-1]
    for rows in found.values():
        for row, same in zip(rows, expected, strict=True):
            assert (row["id"], row["n_tokens"]) == (same["id"], same["n_tokens"])
            for name in ("min_k", "min_k_pp", "log_probs", "z_scores"):
                assert row[name] == pytest.approx(same[name], abs=1e-5)


def test_an_adapter(folder, tokenizer, data, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(load(folder), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = ["--model", folder, "--data", data, "--limit", 4]
    score(*arguments, "-o", tmp_path / "s.jsonl", "--adapter", tmp_path / "adapter")
    expected = {i: by_hand(adapted.eval(), tokenizer, *ROWS[i].values(), 20) for i in range(4)}
    assert_rows(tmp_path / "s.jsonl", expected)
    score(*arguments, "-o", tmp_path / "plain.jsonl")
    plain = lines_of(tmp_path / "plain.jsonl")[1]
    assert all(abs(row["min_k"] - expected[row["id"]][1]) > 1e-3 for row in plain)
    header, _ = lines_of(tmp_path / "s.jsonl")
    assert len(header["adapter_sha256"]) == 64
    result = run(*arguments, "--device", "cpu", "-o", tmp_path / "s.jsonl")
    assert_refused(result, 3, "adapter was ", "adapter_sha256 was ")


def test_nf4_on_the_bundled_base_and_tasks(tokenizer, tmp_path):
    """Quantised, after one pass and after another, the model is the one that the project's loader makes."""
    from ibft.config import ModelConfig
    from ibft.model import load_base

    arguments = ["--model", "bundled:tiny", "--data", "bundled:tiny", "--split", "validation", "--limit", 5]
    score(*arguments, "-o", tmp_path / "nf4.jsonl", "--quantization", "nf4")
    score(*arguments, "-o", tmp_path / "none.jsonl")
    tasks = [json.loads(line) for line in task_file("validation").read_text().splitlines()]
    base = load_base(ModelConfig(), dtype=torch.float32, device=torch.device("cpu"))
    for _ in range(2):
        expected = {i: by_hand(base, tokenizer, tasks[i]["instruction"], tasks[i]["output"], 20) for i in range(5)}
        rows = lines_of(tmp_path / "nf4.jsonl")[1]
        for row, (n, min_k, min_k_pp) in zip(rows, expected.values(), strict=True):
            assert (row["n_tokens"], row["min_k"]) == (n, pytest.approx(min_k, abs=1e-5))
            assert row["min_k_pp"] == pytest.approx(min_k_pp, rel=1e-3, abs=1e-4)  # z divides by a small sigma
    plain = lines_of(tmp_path / "none.jsonl")[1]
    assert any(abs(row["min_k"] - other["min_k"]) > 1e-2 for row, other in zip(rows, plain, strict=True))
    assert lines_of(tmp_path / "nf4.jsonl")[0]["quantization"] == "nf4"


@pytest.mark.skipif(
    not (SHARED_DATA / "code_alpaca_2k.json.gz").is_file(), reason="needs code_alpaca_2k.json.gz (see IBFT_DATA)"
)
def test_real_rows(tmp_path):
    data = SHARED_DATA / "code_alpaca_2k.json.gz"
    score("--model", "bundled:tiny", "--data", data, "--limit", 20, "-o", tmp_path / "s.jsonl")
    header, scores = read_scores(str(tmp_path / "s.jsonl"))
    assert (header["rows"], [each.id for each in scores]) == (2017, list(range(20)))
    assert all(each.min_k > 3 for each in scores)  # the bundled base knows none of it


# --- a stop, and going on -------------------------------------------------------------------------


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(memorization, "WINDOW", 3)


def test_cut_off_anywhere_and_gone_on_with(folder, data, tmp_path, small_windows):
    arguments = ["--model", folder, "--data", data, "--batch-tokens", 60, "-o", tmp_path / "s.jsonl"]
    score(*arguments)
    whole = (tmp_path / "s.jsonl").read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 1 + len(SCORED)
    for length in (0, 10, ends[0] - 1, ends[0], ends[0] + 40, ends[2], ends[4] - 1, ends[4] + 1, ends[9] + 200):
        (tmp_path / "s.jsonl").write_bytes(whole[:length])
        result = score(*arguments)
        assert (tmp_path / "s.jsonl").read_bytes() == whole
        there = sum(end <= length for end in ends[1:])
        assert (f"holds {there} of them already" in result.stdout) == (there > 0)
        assert f", {len(SCORED) - there} of them new" in result.stdout


def test_killed_and_gone_on_with(folder, data, tmp_path, small_windows, monkeypatch):
    arguments = ["--model", folder, "--data", data, "--device", "cpu", "--batch-tokens", 60]
    score(*arguments, "-o", tmp_path / "whole.jsonl")
    real, calls = memorization.score_in_batches, []

    def dies(*given):
        for found in real(*given):
            calls.append(found)
            if len(calls) == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(memorization, "score_in_batches", dies)
    result = run(*arguments, "-o", tmp_path / "s.jsonl")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert [row["id"] for row in lines_of(tmp_path / "s.jsonl")[1]] == SCORED[:3]
    with pytest.raises(DataError, match="holds 3 of 10 scores; let `analyze memorization` go on"):
        read_scores(str(tmp_path / "s.jsonl"))
    monkeypatch.setattr(memorization, "score_in_batches", real)
    score(*arguments, "-o", tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("weights loaded for nothing"))
    assert ", 0 of them new" in score(*arguments, "-o", tmp_path / "s.jsonl").stdout


def test_other_settings_are_named(folder, data, tmp_path):
    arguments = ["--model", folder, "--data", data, "--device", "cpu", "-o", tmp_path / "s.jsonl"]
    score(*arguments)
    before = (tmp_path / "s.jsonl").read_bytes()
    for more, *parts in [
        (["-k", 10], "(k was 20.0, is 10.0)", "--rescore"), (["--text", "whole"], 'text was "response", is "whole"'),
        (["--max-length", 99], "(max_length was 2048, is 99)"), (["--limit", 9], "limit was null, is 9"),
        (["--batch-tokens", 7], "(batch_tokens was 8192, is 7)"),
        (["--quantization", "nf4"], '(quantization was "none", is "nf4")'),
    ]:  # fmt: skip
        assert_refused(run(*arguments, *more), 3, "made with other settings", *parts)
    write_rows(data, [*ROWS[:10], {"prompt": "another", "completion": "row"}])
    assert_refused(run(*arguments), 3, "(data_sha256 was ")
    assert (tmp_path / "s.jsonl").read_bytes() == before


def test_another_k_without_the_model(folder, data, tmp_path):
    arguments = ["--model", folder, "--data", data]
    for k in (20, 50, 7.5):
        score(*arguments, "-o", tmp_path / f"{k}.jsonl", "-k", k)
    for k in (50, 7.5, 20):
        result = run("--rescore", tmp_path / "20.jsonl", "-k", k, "-o", tmp_path / f"re{k}.jsonl")
        assert result.exit_code == 0, result.output
        assert f"Min-{k:g}%, nats" in result.stdout
        assert (tmp_path / f"re{k}.jsonl").read_bytes() == (tmp_path / f"{k}.jsonl").read_bytes()
    assert (tmp_path / "20.jsonl").read_bytes() != (tmp_path / "re50.jsonl").read_bytes()
    assert_refused(run("--rescore", tmp_path / "20.jsonl", "-o", tmp_path / "50.jsonl"), 2, "is there already")
    assert_refused(run("--rescore", tmp_path / "20.jsonl", "-o", tmp_path / "n.jsonl", *arguments), 2, "leave out")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (["{"], ["rows.jsonl:1: malformed JSON"]),
        ([json.dumps(ROWS[0]), json.dumps({"instruction": "a"})], ["row 2 has the keys instruction;", "question"]),
        ([json.dumps({"question": "a", "answer": 3})], ["row 1: answer is int, expected a string"]),
        ([json.dumps({"instruction": "a", "output": None})], ["row 1: output is NoneType, expected a string"]),
        ([json.dumps({"prompt": "a", "completion": ""})] * 2, ["none of the 2 rows has a token to score"]),
    ],
)
def test_malformed_data(folder, tmp_path, rows, parts):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    result = run("--model", folder, "--data", data, "--device", "cpu", "-o", tmp_path / "s.jsonl")
    assert_refused(result, 3, *parts)
    assert not (tmp_path / "s.jsonl").exists()


def test_another_file_is_left_alone(folder, data, tmp_path):
    arguments = ["--model", folder, "--data", data, "--device", "cpu"]
    rows = data.read_bytes()
    assert_refused(run(*arguments, "-o", data), 3, "not a file of scores")
    assert data.read_bytes() == rows
    (tmp_path / "s.jsonl").write_text("my notes")
    assert_refused(run(*arguments, "-o", tmp_path / "s.jsonl"), 3, "holds something else than scores")
    assert (tmp_path / "s.jsonl").read_text() == "my notes"
    score(*arguments, "-o", tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_text().splitlines(keepends=True)
    for wrong, message in [(lines[2], "is not the row that belongs there"), ('{"id": 0}\n', "not a row of scores")]:
        text = lines[0] + wrong
        (tmp_path / "t.jsonl").write_text(text)
        assert_refused(run(*arguments, "-o", tmp_path / "t.jsonl"), 3, "t.jsonl, line 2", message)
        assert (tmp_path / "t.jsonl").read_text() == text


def test_arguments(folder, data, tmp_path):
    arguments = ["--model", folder, "--data", data, "-o", tmp_path / "s.jsonl"]
    for more, part in [
        (["-k", 0], "--k: got 0"), (["-k", 101], "--k: got 101"), (["-k", "nan"], "--k: got nan"),
        (["--limit", 0], "--limit: got 0"), (["--max-length", 1], "--max-length: got 1"),
        (["--batch-tokens", 0], "--batch-tokens: got 0"), (["--text", "prompt"], "--text: got prompt"),
        (["--quantization", "int8"], "--quantization: got int8"), (["--device", "tpu"], "--device: got tpu"),
        (["--adapter", tmp_path], "--adapter: "), (["--model", tmp_path / "no"], "--model: no folder"),
        (["--data", "bundled:tiny", "--split", "dev"], "--split: got dev"), (["-o", tmp_path], "is a folder"),
    ]:  # fmt: skip
        assert_refused(run(*arguments, *more), 2, part)
    assert_refused(run("--data", data, "-o", tmp_path / "s.jsonl"), 2, "name --model and --data; or --rescore FILE")
    assert_refused(run("--rescore", tmp_path / "no.jsonl", "-o", tmp_path / "s.jsonl"), 3, "no.jsonl")
    assert not (tmp_path / "s.jsonl").exists()


def test_a_model_that_gives_nan(folder, tokenizer, data, tmp_path):
    model = load(folder)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = run("--model", tmp_path / "model", "--data", data, "--device", "cpu", "-o", tmp_path / "s.jsonl")
    assert_refused(result, 5, "not finite")
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 1


def test_out_of_memory(folder, data, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ibft.analysis.token_scores.score_batch", fails)
    result = run("--model", folder, "--data", data, "--device", "cpu", "-o", tmp_path / "s.jsonl")
    assert_refused(result, 6, "try a smaller --batch-tokens")


def test_help_imports_no_torch():
    probe = """
import sys
from ibft.analysis.cli import app
for name in ("memorization", "partition"):
    try:
        app([name, "--help"])
    except SystemExit as end:
        assert end.code == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert "Lower = more memorised" in done.stdout
