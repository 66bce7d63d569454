"""Every `ibft-fast` command of the README and of the pages is run, in the order of its page, or is named here with the
test that runs it. What would be downloaded has a stand-in, and there is less of everything: a step is seconds.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, PAGES, ROOT, commands, own
from typer.testing import CliRunner

from ibft.cli import app
from ibft.errors import SetupError
from ibft.evaluation.verilog_judge import icarus_version
from ibft.tiny import TASKS_DIR

BUNDLED = "bundled:tiny"
ELSEWHERE = {  # begins with -> where it is run, and what shows it
    "train CONFIG.yaml": ("test_cli.py", '"--debug"'),  # the form of a command line
    "train my.yaml train.gradient_accumulation_steps=1": ("test_processes.py", "accelerate.commands.launch"),
    "sweep --grid": ("sweep/test_sweep.py", '"--grid", "ib.alpha='),
    "sweep my.yaml": ("sweep/test_sweep.py", '"--validation"'),
    "reproduce tiny": ("reproduce/test_reproduction.py", 'reproduce_apart("tiny", "--quick"'),
    "reproduce evol": ("reproduce/test_reproduction.py", '"evol", "--dry-run"'),
    "reproduce from": ("reproduce/test_other_domains.py", 'reproduce_apart("from", recipe'),
    "analyze figures": ("analysis/test_figures.py", '"analyze", "figures"'),
    "evaluate generate --model tuned --base-url": ("evaluation/test_generate_samples.py", "base_url="),
}
INSTEAD = {  # of what is there already, or on the hub
    "ID": BUNDLED, "BASE": BUNDLED, "DIR": "merged", "Qwen/Qwen2.5-Coder-1.5B": BUNDLED,
    "model.name_or_path=Qwen/Qwen2.5-Coder-1.5B": f"model.name_or_path={BUNDLED}",
}  # fmt: skip
LESS = {  # begins with -> what is added; the last of an option counts
    "train preset=": f"model.name_or_path={BUNDLED} data.path=rows.jsonl ib.layer=auto runtime.device=cpu"
    " train.per_device_train_batch_size=1 train.gradient_accumulation_steps=1 data.max_length=512 -o runs/preset",
    "train": "train.max_steps=2 train.logging_steps=1 data.max_samples=8 eval.max_tasks=2 eval.max_new_tokens=8",
    "estimate preset=": f"model.name_or_path={BUNDLED} ib.layer=auto",
    "evaluate generate": "--max-new-tokens 16 --batch-size 60",
    "generate": "--max-new-tokens 8",
}
ROWS = [{"instruction": f"Add {n} to x.", "output": f"def add(x):\n    return x + {n}"} for n in range(24)]
PYTHON = {
    "task_id": "HumanEval/0", "prompt": "def add(x, y):\n", "canonical_solution": "    return x + y\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n", "entry_point": "add",
}  # fmt: skip
VERILOG = {
    "task_id": "wire", "prompt": "module top_module (input a, output b);\n",
    "canonical_solution": "assign b = a;\nendmodule\n",
    "test": 'module tb;\n reg a = 1; wire b;\n top_module dut (a, b);\n'
    ' initial #1 $display("Mismatches: %0d in 1 samples", b != a);\nendmodule\n',
}  # fmt: skip


def write_rows(path: Path, *rows: dict) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def what_pages_begin_with(folder: Path) -> None:
    """The files that their commands name as the reader's own, the repository's, or those of runs before."""
    write_rows(folder / "rows.jsonl", *ROWS)
    write_rows(folder / "HumanEval.jsonl.gz", PYTHON)
    write_rows(folder / "VerilogEval_Human.jsonl.gz", VERILOG)
    write_rows(folder / "VerilogDescription_Human.jsonl.gz", {"task_id": "wire", "detail_description": "A wire."})
    (folder / "my.yaml").write_text("data: {path: rows.jsonl}\n")
    tasks = folder / "ibft" / "tiny" / "tasks" / "test.jsonl"
    tasks.parent.mkdir(parents=True)
    tasks.write_text("".join((TASKS_DIR / "test.jsonl").read_text().splitlines(keepends=True)[:3]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that its page does not make."""
    folder = tmp_path_factory.mktemp("trained")
    what_pages_begin_with(folder)
    with pytest.MonkeyPatch.context() as patched:
        result = run(folder, ["train", "my.yaml", "-o", "RUN", "data.val_size=0.25", "train.eval_steps=1"], patched)
    assert result.exit_code == 0, result.output
    return folder / "RUN"


def run(folder: Path, words: list[str], patched: pytest.MonkeyPatch) -> Any:
    from accelerate.state import AcceleratorState

    from ibft_kernels import _dispatch

    AcceleratorState._reset_state(True)
    patched.setattr(_dispatch, "INTERPRETED", False)  # as conftest.py does for tests alone
    patched.chdir(folder)
    line = " ".join(words)
    less = [more for start, more in LESS.items() if line.startswith(start)]
    problems = ["--problems", "HumanEval.jsonl.gz"] if "humaneval" in words and "--problems" not in words else []
    return CliRunner().invoke(app, [*words, *" ".join(less).split(), *problems], input="Add 1 to x.\n")


def isolated() -> bool:
    from ibft.evaluation.sandbox import find_tier

    try:
        return bool(find_tier())
    except SetupError:
        return False


def run_page(page: Path, folder: Path, trained: Path, patched: pytest.MonkeyPatch) -> dict[str, Any]:
    """What came of each command that is run here."""
    what_pages_begin_with(folder)
    for name in ("RUN", "runs/b", "runs/ft", "runs/ib", *(["runs/first"] if page.name == "quick-start.md" else ())):
        shutil.copytree(trained, folder / name)
    results = {}
    for words in map(own, commands(page, "ibft-fast")):
        words, line = [INSTEAD.get(word, word) for word in words], " ".join(words)
        if where := next((where for start, where in ELSEWHERE.items() if line.startswith(start)), None):
            file, shown = where
            assert shown in (ROOT / "tests" / file).read_text(encoding="utf-8"), where
            continue
        if words[:2] in (["evaluate", "judge"], ["evaluate", "score"]):
            if not isolated() or ("verilogeval-v1" in line and icarus_version() is None):
                continue
            for baseline in ("fine-tuned.jsonl", "plain.jsonl") if words[1] == "score" else ():
                shutil.copy(folder / words[2], folder / baseline)
        for new in ("merged", "runs/preset") if words[0] == "merge" or "preset=" in line else ():
            shutil.rmtree(folder / new, ignore_errors=True)
        results[line] = result = run(folder, words, patched)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"
    return results


WITH_COMMANDS = [page for page in PAGES if commands(page, "ibft-fast")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, tmp_path, trained, monkeypatch):
    results = run_page(page, tmp_path, trained, monkeypatch)
    if page != DOCS / "quick-start.md":
        return
    assert len(results) >= 11
    for name in ("runs/second/adapter/adapter_model.safetensors", "runs/plain/result.json", "runs/merged/config.json"):
        assert (tmp_path / name).is_file(), name
    assert len((tmp_path / "runs/first/samples.jsonl").read_text().splitlines()) == 30
    assert "<html" in (tmp_path / "runs/report.html").read_text()
    assert "24 samples" in results["preview data.path=rows.jsonl"].output
    if isolated():
        assert json.loads((tmp_path / "runs/first/scores.json").read_text())["ks"] == [1, 5, 10]


def test_what_is_run_elsewhere_is_on_a_page():
    lines = [" ".join(own(words)) for page in PAGES for words in commands(page, "ibft-fast")]
    for start in ELSEWHERE:
        assert any(line.startswith(start) for line in lines), start
