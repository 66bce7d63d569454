"""`ibft-fast init` and the generated pages: every key, with its value and its meaning, and nothing that has changed
since."""

import errno
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from ibft import cli_reference, config_reference
from ibft.cli import app
from ibft.config_reference import settings
from ibft.errors import ConfigError
from ibft.load_config import ALIASES, known_keys, load_config, preset_names
from ibft.starter import run_init, starter

DOCS = Path(__file__).parents[1] / "docs"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def line_of(text, key):
    """Of a key in a section, with the comments above it."""
    section, _, name = key.rpartition(".")
    lines = text[text.index(f"\n{section}:\n") :].splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"  {name}: "))
    first = at
    while lines[first - 1].startswith("  # "):
        first -= 1
    return lines[first : at + 1]


@pytest.mark.parametrize("preset", [None, *preset_names()])
def test_the_file_is_the_configuration_of_its_preset(preset, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(starter(preset), encoding="utf-8")
    assert load_config(file, []) == load_config(None, [f"preset={preset}"] if preset else [])
    assert load_config(file, [])[1] == []


def test_a_model_of_ones_own_begins_from_the_defaults(tmp_path):
    """And not from what suits the bundled one."""
    file = tmp_path / "mine.yaml"
    run_init(None, str(file), force=False, model="their/7b: model", data="rows.jsonl")
    expected, _ = load_config(None, ["model.name_or_path='their/7b: model'", "data.path=rows.jsonl"])
    assert load_config(file, [])[0] == expected
    assert expected.train.learning_rate == 1e-4
    text = file.read_text()
    assert "# tiny" not in text
    assert "# Every setting, with its default.\n" in text


def test_a_preset_may_be_given_another_model():
    text = starter("paper-evol", "their/7b")
    assert "  name_or_path: their/7b\n" in text
    assert "# paper-evol" in text
    assert "For a model" not in text


def test_the_bundled_models_values_say_whose_they_are():
    assert "They suit the bundled model of 3.5 M parameters and no other" in starter()
    assert "They suit" not in starter("paper-evol")


def test_every_key_is_in_it_once():
    def keys(tree, prefix=""):
        for name, value in tree.items():
            yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]

    text = starter("paper-evol")
    assert list(keys(yaml.safe_load(text))) == list(known_keys())
    assert max(map(len, starter("authors-code").splitlines())) <= 120


def test_a_key_has_its_meaning_what_it_takes_its_value_and_whether_the_preset_sets_it():
    text = starter("authors-code")
    assert line_of(text, "train.warmup_steps") == [
        "  # Overrides warmup_ratio. [a whole number from 0, or null]",
        "  warmup_steps: null",
    ]
    assert line_of(text, "ib.alpha") == [
        "  # Weight of the whole bottleneck term; 0 is plain QLoRA fine-tuning without any bottleneck cost.",
        "  # [a number from 0]",
        "  alpha: 0.2  # authors-code",
    ]
    assert line_of(text, "lora.use_rslora")[-1] == "  use_rslora: false"
    assert line_of(text, "train.weight_decay")[-1] == "  weight_decay: 0.0  # authors-code"  # as its default is
    assert line_of(starter(), "ib.latent_dim")[-1] == "  latent_dim: 64  # tiny"


def test_its_head_tells_an_editor_where_the_schema_is_and_how_to_make_it():
    first, *rest = starter().splitlines()
    assert first == "# yaml-language-server: $schema=ibft-fast.schema.json"
    assert "`ibft-fast schema -o ibft-fast.schema.json`" in "\n".join(rest[:5])


def test_train_takes_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    made = invoke("init", "--preset", "tiny", "-o", file)
    assert made.exit_code == 0
    assert made.stdout.endswith(f"ibft-fast train {file} --dry-run\n")
    checked = invoke("train", file, "--dry-run", "runtime.device=cpu", "data.max_samples=40")
    assert checked.exit_code == 0, checked.output


def test_a_file_that_is_there_stays_unless_forced(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("mine")
    refused = invoke("init", "-o", file)
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: --out: {file} is there already: choose another name, or overwrite it with --force\n"
    )
    assert file.read_text() == "mine"
    assert invoke("init", "-o", file, "--force").exit_code == 0
    assert file.read_text(encoding="utf-8") == starter()


def test_a_file_that_cannot_be_written_over_stays(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused = invoke("init", "-o", file, "--force")
    assert (refused.exit_code, refused.stderr) == (3, f"error: {file}: No space left on device\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"mine.yaml": "mine"}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for command in ("init", "schema"):
        assert invoke(command, f"--out=~/new/{command}").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert sorted(path.name for path in (tmp_path / "home" / "new").iterdir()) == ["init", "schema"]


def test_a_dash_is_stdout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = invoke("init", "--preset", "paper-origen", "-o", "-")
    assert printed.stdout == starter("paper-origen")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--preset", "paper"], 2, "preset: got 'paper', expected one of"),
        (["-o", "."], 2, "is a folder"),
        (["--preset", ""], 2, "--preset: got '', expected one of authors-code, "),
        (["--preset", "null"], 2, "--preset: got 'null', expected one of authors-code, "),
        (["-o", "blocked/config.yaml"], 3, "blocked/config.yaml: "),
        (["-o", "n" * 300], 3, "nnn: File name too long"),
        (["-o", "a\0b"], 3, "a\\x00b: embedded null byte"),
    ],
)
def test_what_cannot_be_written_is_one_line(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("blocked").write_text("a file")
    refused = invoke("init", *arguments)
    assert refused.exit_code == code
    assert refused.stderr.count("\n") == 1
    assert words in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]


def test_the_help_names_the_presets():
    page = cli_reference.reference()
    described = page[page.index("## `ibft-fast init`") :]
    line = next(line for line in described.splitlines() if "`--preset" in line)
    assert all(name in line for name in preset_names())


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "module"), [("config.md", config_reference), ("cli.md", cli_reference)])
def test_a_committed_page_is_what_its_module_prints(page, module):
    committed = (DOCS / page).read_text(encoding="utf-8")
    assert committed == module.reference(), f"python -m {module.__name__} > docs/{page}"


def test_settings_are_said_in_words():
    said = {setting.key: setting for setting in settings()}
    assert list(said) == list(known_keys())
    expected = {
        "version": "1",
        "preset": "authors-code, paper-evol, paper-origen, tiny or null",
        "data.packing": "true or false",
        "data.fields.prompt": "text or null",
        "data.val_size": "a number from 0 below 1",
        "lora.r": "a whole number from 1",
        "ib.layer": "a whole number from 1, auto, or a list of: a whole number from 1",
        "train.max_steps": "a whole number from 1, or -1",
        "train.gradient_checkpointing": "true, false, auto or mlp",
        "train.report_to": "a list of: tensorboard, wandb, mlflow or trackio",
        "runtime.memory_budget": "a number above 0 to 1048576, or null",
    }
    assert {key: said[key].values for key in expected} == expected
    assert said["ib.beta"].meaning == "Weight of the prediction loss from z, within the bottleneck term."
    assert (said["ib.beta"].default, said["ib.beta"].section) == (0.02, "ib")
    assert (said["data.fields.text"].section, said["version"].section) == ("data", "")


def test_the_page_of_settings_has_the_names_of_other_trainers():
    rows = {row.split(" | ")[0].strip("| `"): row for row in config_reference.reference().splitlines() if "|" in row}
    assert set(known_keys()) <= set(rows)
    for alias, key in ALIASES.items():
        assert f"`{alias}`" in rows[key].split(" | ")[-1]
    found = [cell.strip() for cell in rows["train.adam_epsilon"].strip("|").split("|")]
    assert found == ["`train.adam_epsilon`", "a number above 0", "`1e-08`", "Added to the root of that mean.", ""]


def test_the_page_of_commands_has_every_command_and_option():
    page = cli_reference.reference()
    for command in ("train", "init", "schema", "doctor", "evaluate judge", "analyze memorization", "reproduce origen"):
        assert f"## `ibft-fast {command}`\n" in page, command
    assert "* `--dry-run`: Check everything, train nothing." in page
    assert "default runs/&lt;time>" in page
    assert "..." not in page[page.index("**Commands**") : page.index("## `ibft-fast")]


def test_a_preset_that_is_not_there_is_a_fault_of_the_configuration():
    with pytest.raises(ConfigError, match="paper-origen"):
        starter("nothing")
