import json

import pytest
import torch

from ibft.config import BUNDLED
from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.engines import ServerEngine, TransformersEngine
from ibft.evaluation.generate import generate
from ibft.evaluation.generate_samples import parse_temperatures, run_generate

TASKS = [
    {"task_id": f"t/{i}", "instruction": text, "entry_point": "f", "test": ""}
    for i, text in enumerate(["a", "write a function", "sum\nof two"])
]


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def problems(tmp_path) -> str:
    return write_rows(tmp_path / "problems.jsonl", TASKS)


@pytest.fixture
def folder(model, tokenizer, tmp_path) -> str:
    """The tiny model on disk, in fp32."""
    model.float().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def sample(folder, problems, out, **changes) -> list[dict]:
    settings = {"suite": "jsonl-tests", "max_new_tokens": 6, "device": "cpu", **changes}
    run_generate(model=folder, problems=problems, out=str(out), **settings)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_greedy_samples_are_those_of_a_training_run(model, tokenizer, folder, problems, tmp_path, capsys):
    rows = sample(folder, problems, tmp_path / "s.jsonl")
    expected = generate(model, tokenizer, [task["instruction"] for task in TASKS], max_new_tokens=6)
    assert [row["raw"] for row in rows] == expected
    assert all(expected)
    assert [(row["task_id"], row["sample"], row["temperature"]) for row in rows] == [
        (f"t/{i}", 0, 0.0) for i in range(3)
    ]
    assert {row["prompt_style"] for row in rows} == {"released"}
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "generate: jsonl-tests, 3 problems, n 1, temperature 0: 3 samples; released prompts; "
        f"{folder} (float32 on CPU)",
        f"samples: 3 in {tmp_path}/s.jsonl, 3 of them new",
    ]
    settings = json.loads((tmp_path / "s.jsonl.json").read_text())
    assert {"model", "adapter", "suite", "prompt_style", "n", "temperatures", "top_p", "max_new_tokens", "seed",
            "batch_size", "engine", "versions", "quantization", "device"} < set(settings)  # fmt: skip
    assert (settings["engine"], settings["versions"]["torch"]) == ("transformers", torch.__version__)


def test_stopped_and_gone_on_with(folder, problems, tmp_path, monkeypatch, capsys):
    """Sampled in fp32, batches of 4 across problems and temperatures: the file is the same to the byte."""
    settings = {"n": 3, "temperature": "0.6,1.0", "batch_size": 4, "prompt_style": "plain"}
    rows = sample(folder, problems, tmp_path / "whole.jsonl", **settings)
    assert len({row["raw"] for row in rows}) > 10
    complete = TransformersEngine.complete
    calls = []

    def dies(self, requests):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(requests))
        return complete(self, requests)

    out = tmp_path / "s.jsonl"
    monkeypatch.setattr(TransformersEngine, "complete", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(folder, problems, out, **settings)
    assert f"note: what was generated is in {out}; the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(TransformersEngine, "complete", complete)
    with out.open("rb+") as file:
        file.truncate(len(out.read_bytes()) - 300)  # the last lines are torn
    capsys.readouterr()
    sample(folder, problems, out, **settings)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "of them already" in capsys.readouterr().out
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("weights loaded for nothing"))
    sample(folder, problems, out, **settings)
    with pytest.raises(ConfigError, match=r"made with other settings .seed was 0, is 1."):
        sample(folder, problems, out, **settings, seed=1)
    write_rows(tmp_path / "problems.jsonl", [*TASKS[:2], {**TASKS[2], "instruction": "Another"}])
    with pytest.raises(ConfigError, match=r"made with other settings .prompts_sha256 was"):
        sample(folder, problems, out, **settings)


def test_an_adapter(model, tokenizer, folder, problems, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "run" / "adapter")
    adapter = str(tmp_path / "run" / "adapter")
    plain = sample(folder, problems, tmp_path / "plain.jsonl")
    rows = sample(folder, problems, tmp_path / "s.jsonl", adapter=adapter)
    expected = generate(adapted, tokenizer, [task["instruction"] for task in TASKS], max_new_tokens=6)
    assert [row["raw"] for row in rows] == expected != [row["raw"] for row in plain]
    assert {row["prompt_style"] for row in rows} == {"released"}
    with pytest.raises(
        ConfigError, match=r"--adapter: .*run has no adapter_config.json, .* \(a run's is in .*adapter\)"
    ):
        sample(folder, problems, tmp_path / "s2.jsonl", adapter=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"--adapter: /no has no adapter_config.json, adapter_model.safetensors$"):
        sample(folder, problems, tmp_path / "s2.jsonl", adapter="/no")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # trained on meanwhile
    with pytest.raises(ConfigError, match="adapter_sha256 was"):
        sample(folder, problems, tmp_path / "s.jsonl", adapter=adapter)
    with pytest.raises(SetupError, match=f"--adapter: {adapter} does not go with {BUNDLED}: "):
        sample(BUNDLED, problems, tmp_path / "s3.jsonl", adapter=adapter)


def test_the_bundled_base_in_four_bits(problems, tmp_path, monkeypatch):
    from ibft.nf4 import NF4Linear

    seen = []
    complete = TransformersEngine.complete
    monkeypatch.setattr(
        TransformersEngine, "complete", lambda self, batch: seen.append(self.model) or complete(self, batch)
    )
    sample(BUNDLED, problems, tmp_path / "s.jsonl", quantization="nf4", max_new_tokens=2)
    assert any(isinstance(module, NF4Linear) for module in seen[0].modules())
    settings = json.loads((tmp_path / "s.jsonl.json").read_text())
    assert (settings["quantization"], settings["model"]) == ("nf4", BUNDLED)


def test_a_server_is_asked_for_all_and_no_model_is_loaded(problems, tmp_path, monkeypatch):
    asked = []

    def complete(self, requests):
        asked.append((self.base_url, self.model, self.concurrency, self.top_p, self.max_new_tokens, len(requests)))
        return [f"{request.prompt.text}{request.temperature}" for request in requests]

    monkeypatch.setattr(ServerEngine, "complete", complete)
    monkeypatch.setattr("ibft.model.load_tokenizer", lambda *_, **__: pytest.fail("loaded"))
    rows = sample(
        "their/model", problems, tmp_path / "s.jsonl", base_url="http://localhost:1/v1", concurrency=3, n=2,
        temperature="0.5", batch_size=4, top_p=0.8, device="auto", prompt_style="chat",
    )  # fmt: skip
    assert [row["raw"] for row in rows] == [f"{task['instruction']}0.5" for task in TASKS for _ in range(2)]
    assert asked == [("http://localhost:1/v1", "their/model", 3, 0.8, 6, size) for size in (4, 2)]
    assert json.loads((tmp_path / "s.jsonl.json").read_text())["engine"] == "http://localhost:1/v1"


def test_descriptions_are_joined_by_task(tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        ServerEngine, "complete", lambda _, requests: [prompts.append(r.prompt.text) or "x endmodule" for r in requests]
    )
    header = "module top_module(input a, output b);\n"
    problems = write_rows(tmp_path / "p.jsonl", [{"task_id": name, "prompt": header, "test": ""} for name in "ab"])
    told = [{"task_id": name, "detail_description": f"It is {name}."} for name in "cba"]
    descriptions = write_rows(tmp_path / "d.jsonl", told)
    common = {"suite": "verilogeval-v1", "base_url": "http://localhost:1/v1", "device": "auto"}
    rows = sample("m", problems, tmp_path / "s", descriptions=descriptions, prompt_style="origen", **common)
    assert [text.partition("description. ")[2] for text in prompts] == [
        f"It is {name}.\n### Response: {header}" for name in "ab"
    ]
    assert rows[0]["completion"] == "x endmodule\n"
    prompts.clear()
    sample("m", problems, tmp_path / "s2", **common)
    assert prompts == [header] * 2
    with pytest.raises(ConfigError, match="--prompt-style=origen for verilogeval-v1 needs --descriptions"):
        sample("m", problems, tmp_path / "s3", prompt_style="origen", **common)
    write_rows(tmp_path / "d.jsonl", told[:2])
    with pytest.raises(DataError, match=r"d.jsonl has no detail_description for 1 of the problems, e.g. a$"):
        sample("m", problems, tmp_path / "s3", descriptions=descriptions, **common)


def test_chat_without_a_template_is_refused_before_weights_are_loaded(folder, problems, tmp_path, monkeypatch):
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"--prompt-style=chat: .* no chat template"):
        sample(folder, problems, tmp_path / "s.jsonl", prompt_style="chat")
    assert not (tmp_path / "s.jsonl").exists()


def test_prompts_beyond_the_models_positions_are_told(folder, problems, tmp_path, capsys):
    sample(folder, problems, tmp_path / "s.jsonl", max_new_tokens=6)
    assert "positions" not in capsys.readouterr().out
    long = write_rows(tmp_path / "long.jsonl", [*TASKS, {**TASKS[0], "task_id": "t/9", "instruction": "x" * 251}])
    sample(folder, long, tmp_path / "s2.jsonl", max_new_tokens=6)
    assert "1 prompts with --max-new-tokens 6 go beyond the model's 256 positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "apps"}, "--suite: got apps"),
        ({"n": 0}, "--n: got 0, expected 1 or more"),
        ({"n": 2}, "--temperature 0 is greedy.*expected --n 1, got 2"),
        ({"temperature": "0.2,hot"}, "--temperature: got 0.2,hot, expected numbers from 0"),
        ({"batch_size": 0}, "--batch-size: got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens: got 0"),
        ({"concurrency": 0}, "--concurrency: got 0"),
        ({"seed": -1}, "--seed: got -1, expected 0 or more"),
        ({"top_p": 0.0}, "--top-p: got 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "--top-p: got 1.1"),
        ({"top_p": float("nan")}, "--top-p: got nan"),
        ({"quantization": "int8"}, "--quantization: got int8, expected none or nf4"),
        ({"device": "tpu"}, "--device: got tpu, expected auto or cpu or cuda"),
        ({"prompt_style": "phi"}, "--prompt-style: got phi"),
        ({"prompt_style": "origen"}, "--prompt-style=origen asks for Verilog"),
        ({"descriptions": "d.jsonl"}, "--descriptions: only verilogeval-v1"),
        ({"base_url": "localhost", "device": "auto"}, "--base-url: got localhost"),
        ({"base_url": "http://h/v1", "device": "auto", "quantization": "nf4"}, "are the server's business"),
        ({"base_url": "http://h/v1", "device": "auto", "adapter": "a"}, "are the server's business"),
        ({"model": "./no-such-folder"}, "--model: no folder ./no-such-folder"),
    ],
)
def test_arguments_refused(problems, tmp_path, changes, message):
    model = changes.pop("model", BUNDLED)
    with pytest.raises(ConfigError, match=message):
        sample(model, problems, tmp_path / "s.jsonl", **changes)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["problems.jsonl"]


def test_out_refused(problems, tmp_path):
    for out, message in [
        (tmp_path / "s.jsonl.gz", "not a compressed one"), (tmp_path, "is a folder, expected a file"),
        (tmp_path / "no" / "s.jsonl", "--out: no folder .*no$"), (tmp_path / ("x" * 300), "--out: .*too long"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            sample(BUNDLED, problems, out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_where_there_is_none(problems, tmp_path):
    with pytest.raises(SetupError, match="--device=cuda, but torch finds no CUDA device"):
        sample(BUNDLED, problems, tmp_path / "s.jsonl", device="cuda")


def test_temperatures():
    assert parse_temperatures("0.2, 0.6,1", 20) == [0.2, 0.6, 1.0]
    assert parse_temperatures("0,0.5", 1) == [0.0, 0.5]
    assert str(parse_temperatures("-0", 1)) == "[0.0]"
    for text in ("", "0.2,", "-1", "nan", "inf", "0.2;0.6"):
        with pytest.raises(ConfigError, match="--temperature: got"):
            parse_temperatures(text, 1)
    with pytest.raises(ConfigError, match=r"got 0.2,0.20, one of them twice"):
        parse_temperatures("0.2,0.20", 1)
