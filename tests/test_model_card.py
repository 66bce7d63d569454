"""The card of an adapter: the Hub can read it, its numbers are the run's, and its program loads the adapter."""

import json
import re
from contextlib import chdir

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from ibft.cli import app
from ibft.load_config import load_config
from ibft.model_card import model_card, table, write_model_card
from ibft.run_report.curves import GRADIENTS, LATENT, LOSS, SPEED
from ibft.run_report.page import make_page
from ibft.run_report.read_run import read_run
from ibft_kernels import _dispatch

SETTINGS = [
    "data.max_samples=40", "data.max_length=128", "train.max_steps=2", "train.logging_steps=1", "eval.max_tasks=1",
    "eval.max_new_tokens=1", "runtime.device=cpu",
]  # fmt: skip
HUB = ["model.name_or_path=owner/base-7b", "data.path=owner/rows"]
RESULT = {
    "steps": 1200, "eval_ce": [0.75, 0.5, 0.625], "last": {"ce": 0.25, "kl": 12.5, "ce_z": None, "active_dims": 0.5},
    "pass_at_1": {
        "before": {"passed": 2, "tasks": 16, "value": 0.125}, "after": {"passed": 8, "tasks": 16, "value": 0.5},
    },
    "warnings": ["step 30: loss spike:\n# 9 after 1"],
}  # fmt: skip
MANIFEST = {
    "data_sha256": "feedbeef", "ib_layer": 20, "dtype": "float16", "commit": "0123abcd", "device": "A card",
    "versions": {"torch": "2.99.0", "triton": None}, "processes": 3,
}  # fmt: skip


def card(*overrides, **facts):
    return model_card(load_config(None, list(overrides))[0], **facts)


def front(text):
    """The metadata as the Hub reads them."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def rows_of(text):
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Really trained, with cards as a run would write them."""
    out = tmp_path_factory.mktemp("card") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_dispatch, "INTERPRETED", False)  # as conftest.py does for tests alone
        trained = CliRunner().invoke(app, ["train", *SETTINGS, "-o", str(out)])
    assert trained.exit_code == 0, trained.output
    config = load_config(out / "config.yaml", [])[0]
    facts = {name: json.loads((out / f"{name}.json").read_text()) for name in ("result", "manifest")}
    for name in ("adapter", "adapter-best"):
        assert write_model_card(out / name, config, **facts) == out / name / "README.md"
    return out


# --- a trained adapter ----------------------------------------------------------------------------


def test_the_card_takes_the_place_of_peft_s_form(run):
    text = (run / "adapter" / "README.md").read_text()
    assert "More Information Needed" not in text
    assert not list((run / "adapter").glob(".*"))
    assert front(text) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["ib-ft", "qlora", "lora", "code"],
    }  # fmt: skip
    assert "a Llama of 3.5 million parameters" in text
    assert "`pip install ibft-fast` brings it" in text
    result = json.loads((run / "result.json").read_text())
    rows = rows_of(text)
    assert rows["steps"] == "2"
    assert rows["KL, last step"] == f"{result['last']['kl']:.4g}"
    assert rows["held-out cross-entropy, nats per label token"] == f"{result['eval_ce'][-1]:.4f}"


def test_the_hub_s_own_reader_takes_the_card(run):
    from huggingface_hub import ModelCard

    read = ModelCard.load(run / "adapter" / "README.md", ignore_metadata_errors=False)
    assert read.data.library_name == "peft"
    whole = ModelCard(card(*HUB, "model.revision=abc"))
    assert (whole.data.base_model, whole.data.datasets) == ("owner/base-7b", ["owner/rows"])
    assert whole.text.lstrip().startswith("# IB-FT adapter of `base-7b`")


def test_the_program_on_the_card_loads_the_adapter_in_plain_peft(run, capsys):
    text = (run / "adapter" / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "dtype=torch.float32" in program
    names = {}
    with chdir(run / "adapter"):
        exec(program.replace("max_new_tokens=256", "max_new_tokens=2"), names)
    assert capsys.readouterr().out.endswith("\n")
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    loaded = {key.replace(".default", ""): value for key, value in names["model"].state_dict().items()}
    assert len(saved) > 100
    assert all(loaded[key].equal(value) for key, value in saved.items())
    assert names["model"].get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype.itemsize == 1  # 4 bits


def test_every_curve_of_the_page_is_of_a_number_that_a_run_logs(run):
    """And the page of a trained run has them all."""
    logged = {key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    shown = {curve.key for curves in (LOSS, LATENT, GRADIENTS, SPEED) for curve in curves if curve.key}
    assert shown <= logged
    page = make_page([read_run(run, "run")])
    assert "Not logged" not in page
    assert page.count("<figure") == len(shown) + 2  # KL a dimension is made of two; the map is of another file
    assert "2 of 2" in page
    assert "finished" in page


# --- words and numbers ----------------------------------------------------------------------------


def test_what_is_on_the_hub_is_named_for_the_hub():
    assert front(card(*HUB, "model.quantization=none", "ib.alpha=0")) == {
        "base_model": "owner/base-7b", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["lora", "code"], "datasets": ["owner/rows"],
    }  # fmt: skip


def test_plain_fine_tuning_in_four_bits_is_tagged_so():
    assert front(card(*HUB, "ib.alpha=0"))["tags"] == ["qlora", "lora", "code"]


def test_a_name_that_no_file_can_have_is_not_looked_for_on_the_hub():
    assert "datasets" not in front(card(HUB[0], f"data.path={'n' * 300}"))


def test_a_local_base_has_no_revision_in_the_program():
    program = re.search(
        r"```python\n(.*?)```", card(HUB[1], "model.name_or_path=./base", "model.revision=v1"), re.DOTALL
    )[1]
    assert 'from_pretrained("PATH/TO/base", dtype=' in program


def test_the_interval_of_a_few_tasks_is_rounded_up():
    after = {"passed": 5, "tasks": 10, "value": 0.5}
    text = card(*HUB, result={"pass_at_1": {"after": after}})
    assert "over 10 tasks its 95 % interval is up to 32 points" in text  # 100 / sqrt(10) = 31.6


def test_of_what_is_no_hub_id_only_the_last_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "rows").write_text("")
    text = card("model.name_or_path=here/base", "data.path=rows", "data.eval_path=/secret/place/held.jsonl")
    assert set(front(text)) == {"library_name", "pipeline_tag", "tags"}
    assert "secret" not in text
    assert str(tmp_path) not in text
    assert "`base`" in text
    assert "Rows: `rows`, split `train`; held out: `held.jsonl`." in text
    assert 'from_pretrained("PATH/TO/base", dtype=torch.bfloat16' in text


def test_the_results_and_settings_are_those_of_the_run():
    text = card(*HUB, "train.learning_rate=2e-4", "train.num_train_epochs=1.5", result=RESULT, manifest=MANIFEST)
    rows = rows_of(text)
    assert {name: rows[name] for name in list(rows)[-7:]} == {
        "steps": "1,200", "held-out cross-entropy, nats per label token": "0.6250", "CE, last step": "0.25",
        "KL, last step": "12.5", "share of latent dimensions in use, last step": "0.5",
        "Pass@1 before training": "12.5% (2 of 16 tasks)", "Pass@1 after training": "50.0% (8 of 16 tasks)",
    }  # fmt: skip
    assert rows["LoRA"] == "r 32, alpha 32, dropout 0.05"
    assert rows["length"] == "1.5 epochs"
    assert rows["batch"] == "12 rows of at most 2,048 tokens, packed"  # 1 row, 4 micro-batches, 3 processes
    assert rows["learning rate"] == "0.0002, cosine"
    assert rows["learning rate of the bottleneck"] == "0.0002"
    assert "over 16 tasks its 95 % interval is up to 25 points either way" in text
    assert "- step 30: loss spike: # 9 after 1\n" in text
    assert "decoder layer 20 (from 1), z has 256 dimensions" in text
    assert "    L = CE + 0.1 (KL(q(z | h) || N(0, I)) + 0.02 CE_z)\n" in text
    assert "sha256 `feedbeef`" in text
    assert text.endswith("torch 2.99.0; commit `0123abcd`; on A card.\n")
    assert "dtype=torch.float16" in text


def test_the_best_state_is_not_given_the_last_one_s_results(run):
    text = card(*HUB, best=True, result=RESULT, manifest=MANIFEST)
    assert rows_of(text)["held-out cross-entropy, nats per label token"] == "0.5000"
    assert "Pass@1" not in text
    assert "the lowest held-out cross-entropy of the run" in text
    assert "the lowest held-out cross-entropy of the run" in (run / "adapter-best" / "README.md").read_text()
    assert "the end of the run" in (run / "adapter" / "README.md").read_text()


def test_a_run_that_was_stopped_has_no_results():
    assert "The run has left none." in card(*HUB)
    assert "Pass@1" not in card(*HUB, result=RESULT | {"pass_at_1": {"before": None, "after": {"not_judged": "why"}}})


HUGE = pytest.param(10**400, id="no float holds it")


@pytest.mark.parametrize("odd", [None, "x", 5, -1, HUGE, float("nan"), True, [], ["a"], [[0.5]], {}, {"after": []}])
def test_of_damaged_facts_the_card_tells_the_sound_ones(odd):
    """Whichever is damaged, the others are on it as before."""
    config = load_config(None, HUB)[0]
    whole = rows_of(model_card(config, result=RESULT, manifest=MANIFEST))
    assert model_card(config, result=odd, manifest=odd).startswith("---\n")
    for name in RESULT:
        result = RESULT | {name: odd}
        assert model_card(config, best=True, result=result, manifest=MANIFEST)
        assert ("1,200" in model_card(config, result=result, manifest=MANIFEST)) == (name != "steps")
    for name in MANIFEST:
        told = model_card(config, result=RESULT, manifest=MANIFEST | {name: odd})
        assert rows_of(told)["steps"] == "1,200"
        assert ("A card" in told) == (name != "device")
    before, after = RESULT["pass_at_1"]["before"], RESULT["pass_at_1"]["after"]
    for name in after:
        told = rows_of(
            model_card(config, result=RESULT | {"pass_at_1": {"before": before, "after": after | {name: odd}}})
        )
        assert told["Pass@1 before training"] == whole["Pass@1 before training"]
    for name in RESULT["last"]:
        told = rows_of(model_card(config, result=RESULT | {"last": RESULT["last"] | {name: odd}}))
        assert told["steps"] == "1,200"


def test_facts_of_another_kind_are_left_out():
    rows = rows_of(card(*HUB, result=RESULT | {"eval_ce": [0.5, "a"], "warnings": 5, "steps": "x", "last": 1}))
    assert list(rows)[-2:] == ["Pass@1 before training", "Pass@1 after training"]
    assert not {"steps", "held-out cross-entropy, nats per label token", "KL, last step"} & set(rows)
    text = card(*HUB, manifest={"processes": "x", "ib_layer": ["a"], "versions": [], "dtype": "int8", "commit": 5})
    assert rows_of(text)["batch"].startswith("4 rows")
    assert "decoder layer auto (from 1)" in text
    assert "dtype=torch.bfloat16" in text
    assert text.endswith("## Made with\n\nibft-fast.\n")
    assert "The run has left none." in card(*HUB, result={"steps": "x"})


def test_plain_fine_tuning_has_no_bottleneck():
    text = card(*HUB, "ib.alpha=0")
    assert "# Fine-tuning adapter of `base-7b`" in text
    assert "Cross-entropy (CE) of the taught tokens, without a bottleneck" in text
    assert "ib_bottleneck" not in text
    assert "learning rate of the bottleneck" not in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ib.kl_reduction=mean", "ib.kl_tokens=response"],
         "The KL is the mean over latent dimensions and averaged over the taught tokens"),
        (["ib.prior=learned_diagonal"], "The prior p(z) is trained: learned diagonal."),
        (["ib.deterministic=true", "ib.alpha_warmup_ratio=0.25"],
         "z is mu, without noise. alpha rose over 25% of the steps."),
        (["ib.kl_tokens=real"], "averaged over every token; CE_z"),
        (["ib.kl_tokens=all", "data.packing=false", "data.pad_to_max_length=true"],
         "averaged over every token, pads too; CE_z"),
        (["ib.prior=learned_diagonal"], "(KL(q(z | h) || p(z)) + "),
        (["ib.layer=4,6"], "decoder layer 4, 6 (from 1)"),
        (["data.template=auto"], 'prompt = instruction + "\\n"'),
        (["data.template=auto"], "the instruction and a newline; before an answer of a conversation the"),
        (["data.max_samples=5000"], "; at most 5,000 rows."),
        (["data.deduplicate=true"], "split `train`; equal rows once."),
        (["data.decontaminate=humaneval"], "split `train`; without rows that share text with evaluation problems."),
        (["ib.learning_rate=1e-3"], "| learning rate of the bottleneck | 0.001 |"),
        (["lora.use_rslora=true"], "dropout 0.05, rsLoRA |"),
        (["lora.target_modules=[q_proj,v_proj]"], "| LoRA on | q_proj, v_proj |"),
        (["train.max_steps=5000"], "| length | 5,000 steps |"),
        (["train.max_grad_norm=0.5", "train.clip_mode=per_group"], "| gradient clipping | 0.5, per group |"),
        (["train.lr_scheduler_type=linear"], ", linear |"),
        (["data.packing=false"], "tokens |"),
        (["runtime.seed=77"], "| seed | 77 |"),
        (["ib.encoder=random_projection"], "its encoder is random projection"),
        (["data.template=chat"], "apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"),
        (["data.template=alpaca"], "Stanford Alpaca's frame"),
        (["data.template=/secret/own.jinja"], "what the template `own.jinja` makes of a row"),
        (["model.quantization=none"], "from_pretrained(\"owner/base-7b\", dtype=torch.bfloat16)\n"),
        (["model.revision=v1"], "from_pretrained(\"owner/base-7b\", revision=\"v1\", dtype=torch.bfloat16"),
    ],
)  # fmt: skip
def test_variants_are_said(overrides, said):
    text = card(*HUB, *overrides)
    assert said in text
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(program, "card", "exec")
    quantised = "model.quantization=none" not in overrides
    for words in ("four_bits = ", "Without `four_bits`", "in 4 bits (NF4", "rounded to 4 bits"):
        assert (words in text) == quantised
    assert ("revision `v1`" in text) == ("model.revision=v1" in overrides)
    assert ("comes with the package" in text, "`pip install ibft-fast` brings it" in text) == (False, False)


def test_odd_names_stay_words():
    """None ends the code they stand in, opens a heading, or is an element."""
    config = load_config(None, [*HUB])[0]
    odd = 'x`y\n# z ``` <b> " | \udcff'
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"name_or_path": odd, "revision": odd}),
        "data": config.data.model_copy(update={"path": odd, "split": odd}),
    })  # fmt: skip
    text = model_card(config, manifest={"commit": odd, "device": odd, "versions": {odd: odd}})
    assert "\n# z" not in text.partition("# IB-FT")[2]
    assert '```` x`y # z ``` <b> " | \udcff ````' in text
    assert 'on x`y # z ``` &lt;b> " |' in text
    assert front(text)["base_model"] == odd
    compile(re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1], "card", "exec")


def test_a_bar_in_a_value_opens_no_column():
    assert table({"name": "a|b"}).endswith("| name | a\\|b |\n")


def test_a_card_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="none"):
        write_model_card(tmp_path / "none", load_config(None, HUB)[0])
