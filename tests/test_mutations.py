"""Whatever stands in a configuration, in rows or in a checkpoint: an answer in one line with the right exit code, and
nothing damaged."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ibft import checkpoint
from ibft.cli import app
from ibft.tiny import task_file
from ibft_kernels import _dispatch

CONFIG = """\
data: {path: rows.jsonl, max_length: 128, val_size: 0, cache: false, template: auto}
ib: {alpha: 0.01, beta: 0.02, layer: 5}
train: {max_steps: 2, learning_rate: 1.0e-3}
checkpoint: {save_steps: 1}
eval: {max_tasks: 1, max_new_tokens: 1}
runtime: {seed: 3, deterministic: true}
"""
BYTES = b"\x00\xff\n\r\t \"'{}[]:,#&*!|>%@`-0123456789abcdefnulltrue.\\\xe2\x80\xa8"

edits = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["cut", "put", "swap"]), st.integers(1, 9), st.binary(max_size=6)
              | st.lists(st.sampled_from(list(BYTES)), max_size=6).map(bytes)),
    min_size=1, max_size=4,
)  # fmt: skip


def mutated(content: bytes, changes) -> bytes:
    for place, how, length, new in changes:
        place %= len(content) + 1
        if how == "cut":
            content = content[:place] + content[place + length :]
        elif how == "put":
            content = content[:place] + new + content[place:]
        else:
            content = content[:place] + new + content[place + len(new) :]
    return content


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_answered(result):
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 2, 3, 4), result.output
    assert "Traceback" not in result.output
    if result.exit_code:
        errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert result.output.splitlines()[-1] == errors[0]  # one line, and the last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("mutations")
    lines = task_file("train").read_bytes().splitlines(keepends=True)[:8]
    (made / "rows.jsonl").write_bytes(b"".join(lines))
    (made / "run.yaml").write_text(CONFIG)
    return made


@given(edits)
def test_configurations(folder, monkeypatch, changes):
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_bytes(mutated(CONFIG.encode(), changes))
    before = files_of(folder)
    assert_answered(CliRunner().invoke(app, ["train", "run.yaml", "--dry-run", "-o", "out"]))
    assert files_of(folder) == before


@given(edits)
def test_rows(folder, monkeypatch, changes):
    monkeypatch.chdir(folder)
    (folder / "run.yaml").write_text(CONFIG)
    lines = task_file("train").read_bytes().splitlines(keepends=True)[:8]
    (folder / "rows.jsonl").write_bytes(mutated(b"".join(lines), changes))
    before = files_of(folder)
    assert_answered(CliRunner().invoke(app, ["train", "run.yaml", "--dry-run", "-o", "out"]))
    assert files_of(folder) == before
    (folder / "rows.jsonl").write_bytes(b"".join(lines))


@pytest.fixture(scope="module")
def run(folder):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(_dispatch, "INTERPRETED", False)
        (folder / "run.yaml").write_text(CONFIG)
        result = CliRunner().invoke(app, ["train", "run.yaml", "-o", "run"])
    assert result.exit_code == 0, result.output
    return folder / "run"


@given(st.integers(0, 10**6), edits)
def test_checkpoints(run, tmp_path_factory, which, changes):
    """The newest, changed in one file: the one before is found, or it itself where nothing that counts has changed."""
    copy = tmp_path_factory.mktemp("copy") / "checkpoints"
    shutil.copytree(run / "checkpoints", copy)
    newest = copy / "step-2"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    file = files[which % len(files)]
    before = file.read_bytes()
    file.write_bytes(mutated(before, changes))
    same = file.read_bytes() == before
    found, warnings = checkpoint.latest(copy)
    if found == newest:
        assert same or file.name == checkpoint.MANIFEST  # a manifest may be written otherwise and say the same
        tensors, facts = checkpoint.load(found)
        assert facts["step"] == 2
        assert tensors
    else:
        assert found == copy / "step-1"
        assert len(warnings) == 1
        assert "\n" not in warnings[0]
    shutil.rmtree(copy)


def test_a_checkpoint_of_nonsense_facts_is_refused(run, folder, monkeypatch):
    """Whole by its manifest, and another program's."""
    import hashlib

    copy = folder / "other"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(".lock"))
    state = copy / "checkpoints" / "step-2" / checkpoint.STATE
    content = b'{"run": {}}'
    state.write_bytes(content)
    manifest = state.with_name(checkpoint.MANIFEST)
    told = json.loads(manifest.read_text())
    told["files"][checkpoint.STATE] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(told))
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["train", "run.yaml", "-o", "other", "--resume", "auto"])
    assert result.exit_code == 2
    assert "is of another run" in result.output
    result = CliRunner().invoke(app, ["train", "run.yaml", "-o", "other", "--resume", "auto", "--force-resume"])
    assert result.exit_code == 2
    assert "the checkpoint's state: " in result.output
