"""Which base and template an adapter's folder stands for: its run's where it lies in one, else what it names itself."""

import json
import os
import shutil

import pytest
from fake_runs import assert_refused, change_settings, cli, save_run

from ibft import chat
from ibft.config import BUNDLED
from ibft.errors import ConfigError
from ibft.tiny import BASE_DIR
from ibft.trained import Trained, find_trained, local_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may change; a checkpoint too."""
    shutil.copytree(made, tmp_path / "run")
    shutil.copytree(made / "adapter", tmp_path / "run/checkpoints/step-3")
    return tmp_path / "run"


def configure(run, **settings):
    path = run / "config.yaml"
    text = path.read_text()
    for key, value in settings.items():
        before = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
        text = text.replace(before, f"{before.partition(':')[0]}: {value}", 1)
    path.write_text(text)


@pytest.mark.parametrize("name", ["", "adapter", "adapter-best", "checkpoints/step-3"])
def test_an_adapter_in_its_run_has_the_runs_base_and_template(run, name):
    shutil.copytree(run / "adapter", run / "adapter-best")
    configure(run, template="alpaca", quantization="none")
    found = find_trained(str(run / name))
    assert (found.base.name_or_path, found.base.quantization, found.template) == (BUNDLED, "none", "alpaca")
    assert found.adapter == run / (name or "adapter")


def test_a_checkpoint_is_asked_and_merged_with_the_runs_template(run, tmp_path, monkeypatch):
    configure(run, template="alpaca")
    asked = []
    monkeypatch.setattr("ibft.evaluation.local_model.LocalModel.load", lambda self: None)
    monkeypatch.setattr(
        chat, "stream_answer", lambda model, tokenizer, ids, *_, **__: asked.append(tokenizer.decode(ids))
    )
    assert cli("generate", run / "checkpoints/step-3", "--prompt", "add").exit_code == 0
    assert asked[0].endswith("### Instruction:\nadd\n\n### Response:\n")
    assert cli("merge", run / "checkpoints/step-3", "-o", tmp_path / "merged", "--no-verify").exit_code == 0
    assert json.loads((tmp_path / "merged/merged.json").read_text())["template"] == "alpaca"


def test_auto_is_the_template_that_the_run_took(run):
    assert find_trained(str(run / "adapter")).template == "released"
    (run / "manifest.json").write_text('{"template": "chat"}')
    for name in ("", "adapter", "checkpoints/step-3"):
        assert find_trained(str(run / name)).template == "chat"


@pytest.mark.parametrize("folder", ["downloaded", "elsewhere/adapter", "checkpoints/step-9"])
def test_a_config_of_something_else_is_no_run(run, tmp_path, folder):
    shutil.copytree(run / "adapter", tmp_path / folder)
    for above in {tmp_path, (tmp_path / folder).parent, tmp_path / folder}:
        (above / "config.yaml").write_text("services: {web: {image: nginx}}\n")
    found = find_trained(str(tmp_path / folder))
    assert (found.base.name_or_path, found.adapter, found.template) == (str(BASE_DIR), tmp_path / folder, "released")


def test_an_adapter_beside_a_run_is_not_the_runs(run):
    """Of a run's config.yaml one knows by the names that a run gives."""
    shutil.copytree(run / "adapter", run / "downloaded")
    configure(run, name_or_path="some/base", template="alpaca")
    found = find_trained(str(run / "downloaded"))
    assert (found.base.name_or_path, found.template) == (str(BASE_DIR), "released")


def test_a_run_of_another_base_is_refused_where_no_move_explains_it(run):
    configure(run, name_or_path="owner/base", path="owner/rows")
    assert find_trained(str(run)).base.name_or_path == "owner/base"  # fetched to BASE_DIR once
    change_settings(run / "adapter", base_model_name_or_path="owner/base")
    assert find_trained(str(run)).base.name_or_path == "owner/base"
    change_settings(run / "adapter", base_model_name_or_path="owner/other")
    with pytest.raises(ConfigError, match=r"config\.yaml is of owner/base, and .*adapter_config\.json of owner/other"):
        find_trained(str(run))
    configure(run, name_or_path=str(BASE_DIR))
    assert find_trained(str(run)).base.name_or_path == str(BASE_DIR)


def test_an_adapter_alone_has_its_own_revision(run, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "alone")
    change_settings(tmp_path / "alone", base_model_name_or_path="owner/base", revision="abc123")
    found = find_trained(str(tmp_path / "alone"))
    assert (found.base.name_or_path, found.base.revision) == ("owner/base", "abc123")


def test_a_template_is_found_from_here_and_beside_the_run(run, tmp_path, monkeypatch):
    source = "Q: {{ prompt }}\nA:"
    configure(run, template="mine.jinja")
    monkeypatch.chdir(tmp_path)
    for command in (["merge", run, "-o", tmp_path / "merged"], ["generate", run, "--prompt", "add"]):
        assert_refused(cli(*command), 2, "run/config.yaml: data.template: no file mine.jinja")
    assert not (tmp_path / "merged").exists()
    (run / "mine.jinja").write_text(source)
    assert find_trained("run/adapter").template == str(tmp_path / "run/mine.jinja")
    (tmp_path / "mine.jinja").write_text("from here")
    assert find_trained("run/adapter").template == "mine.jinja"
    (tmp_path / "mine.jinja").unlink()
    configure(run, template="/somewhere/else/mine.jinja")
    assert cli("merge", "run", "-o", "merged", "--no-verify").exit_code == 0
    assert (tmp_path / "merged/prompt_template.jinja").read_text() == source


def test_a_base_on_disk_is_never_asked_for_on_the_network(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    local_model(Trained(None, find_trained(str(BASE_DIR)).base))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
