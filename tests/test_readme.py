"""The README's code runs, and its commands exist."""

import json
import re
from pathlib import Path

import pytest
import torch

from ibft.load_config import known_keys, preset_names
from ibft.reproduce.claims import make_claims

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run(capsys):
    """One after the other, as a reader would paste them."""
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    torch.manual_seed(0)
    names: dict = {}
    for code in examples:
        assert code.count("\n") <= 35
        exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out == "[]\n"  # nothing was left alone
    tuned = [p for p in names["tuned"].parameters() if p.requires_grad]
    assert len(tuned) == 2 * 3 * 6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned)
    assert torch.isfinite(names["parts"].loss)
    assert names["parts"].kl > 0
    assert names["z"].shape == (10, 16)


def test_its_make_targets_presets_keys_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^    |`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"train", "test", "venv", "soak", "gpu-test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert set(re.findall(r"preset=([a-z-]+)", README)) <= set(preset_names())
    mentioned = set(re.findall(r"`((?:ib|train|lora|data|model)\.[a-z_]+)(?:=\d+)?`", README))
    assert len(mentioned) >= 6
    assert mentioned <= set(known_keys())
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`(tests/[\w/.]+)`", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("code", range(2, 7))
def test_exit_codes_are_those_of_the_errors(code):
    from ibft import errors

    codes = {kind.exit_code for kind in errors.IBFTError.__subclasses__()}
    assert code in codes
    assert re.search(rf"\b{code} [a-z]", README.split("Exit codes:")[1])


def test_what_it_says_came_out_is_what_the_report_says():
    report = json.loads((ROOT / "docs/reproduction/tiny/report.json").read_text(encoding="utf-8"))
    quoted = re.findall(
        r"^- (.*)$", README.split("in the report's own sentences:")[1].split("At this size")[0], re.MULTILINE
    )
    assert len(quoted) == 3
    assert set(quoted) <= {claim["text"] for claim in report["claims"]}
    assert make_claims(report) == report["claims"]
