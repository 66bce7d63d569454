import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibft.errors import ConfigError, DataError, SetupError
from ibft.evaluation.prompts import Prompt
from ibft.evaluation.sample_file import SampleFile, all_wanted, seed_of

SETTINGS = {"model": "m", "prompt_style": "plain", "n": 3, "temperatures": [0.2, 1.0], "batch_size": 4}
TASKS = ["t/0", "t/1", "ü/2"]
PROMPTS = {name: Prompt(f"prompt of {name}") for name in TASKS}
WANTED = all_wanted(TASKS, 3, [0.2, 1.0], 0)


class FakeEngine:
    """Answers with all that it is asked, and with the batch around it: another batching gives another file."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.calls: list[int] = []
        self.dies_at = dies_at

    def complete(self, requests):
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append(len(requests))
        around = [request.seed % 1000 for request in requests]
        return [f"```\n{r.prompt.text}, {r.temperature}, {r.seed}, {around}\n```\nwords\u2028é" for r in requests]


def fill(path, engine, *, batch_size: int = 4, settings=SETTINGS, wanted=WANTED) -> int:
    file = SampleFile(path)
    done = file.begin(settings, wanted)
    file.fill(lambda: engine, PROMPTS, wanted, done, style="plain", suite="jsonl-tests", batch_size=batch_size)
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "s.jsonl"
    fill(path, FakeEngine())
    return path.read_bytes()


def test_seeds():
    digest = hashlib.sha256(b"7:HumanEval/3:0.6:11").digest()
    assert seed_of(7, "HumanEval/3", 0.6, 11) == int.from_bytes(digest[:8], "big")
    assert len({w.seed for w in WANTED}) == 18
    assert seed_of(0, "t/0", 0.2, 1) in [w.seed for w in WANTED]


def test_order_and_rows(whole):
    rows = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    order = [(t, name, i) for t in (0.2, 1.0) for name in TASKS for i in range(3)]
    assert [(row["temperature"], row["task_id"], row["sample"]) for row in rows] == order
    assert list(rows[0]) == ["task_id", "sample", "temperature", "seed", "completion", "raw", "prompt_style"]
    for row in rows:
        assert row["seed"] == seed_of(0, row["task_id"], row["temperature"], row["sample"])
        assert row["raw"] == f"```\n{row['completion']}```\nwords\u2028é"
        assert row["completion"].startswith(f"prompt of {row['task_id']}, {row['temperature']}, {row['seed']}, ")


@pytest.mark.parametrize("batches", range(5))
def test_killed_after_some_batches_and_gone_on_with(tmp_path, whole, batches):
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill(path, FakeEngine(dies_at=batches))
    assert path.read_bytes().count(b"\n") == 4 * batches
    engine = FakeEngine()
    assert fill(path, engine) == 4 * batches
    assert path.read_bytes() == whole
    assert engine.calls == [4, 4, 4, 4, 2][batches:]


@given(st.data())
@settings(max_examples=40)
def test_cut_off_anywhere_and_gone_on_with(tmp_path_factory, whole, data):
    path = tmp_path_factory.mktemp("cut") / "s.jsonl"
    fill(path, FakeEngine())
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    engine = FakeEngine()
    assert fill(path, engine) == whole[:size].count(b"\n")
    assert path.read_bytes() == whole
    kept = whole[:size].count(b"\n")
    assert sum(engine.calls) == (18 - kept // 4 * 4 if kept < 18 else 0)  # the batch that is torn is made as a whole


def test_what_is_complete_needs_no_engine(tmp_path, whole):
    path = tmp_path / "s.jsonl"
    fill(path, FakeEngine())
    file = SampleFile(path)
    assert file.begin(SETTINGS, WANTED) == 18
    file.fill(lambda: pytest.fail("loaded"), PROMPTS, WANTED, 18, style="plain", suite="mbpp", batch_size=4)
    assert path.read_bytes() == whole


def test_progress_and_the_count_of_empty_completions(tmp_path):
    class Silent:
        def complete(self, requests):
            return [" \n" if r.temperature < 1 else "x" for r in requests]

    file, seen = SampleFile(tmp_path / "s"), []
    done = file.begin(SETTINGS, WANTED)
    empty = file.fill(
        Silent, PROMPTS, WANTED, done, style="plain", suite="mbpp", batch_size=4, progress=lambda *a: seen.append(a)
    )
    assert empty == 9
    assert seen == [(4, 18), (8, 18), (12, 18), (16, 18), (18, 18)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "other"}, 'model was "m", is "other"'),
        ({"batch_size": 8, "n": 4}, "n was 3, is 4; batch_size was 4, is 8"),
        ({"temperatures": [0.2]}, r"temperatures was \[0.2, 1.0\], is \[0.2\]"),
        ({"top_p": 0.5}, "top_p was null, is 0.5"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(tmp_path, change, told):
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill(path, FakeEngine(dies_at=1))
    path.write_bytes(path.read_bytes() + b'{"torn')
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=told) as caught:
        fill(path, FakeEngine(), settings={**SETTINGS, **change})
    assert "seed" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_tuples_and_lists_are_the_same_setting(tmp_path):
    fill(tmp_path / "s", FakeEngine(), settings={**SETTINGS, "temperatures": (0.2, 1.0)})
    assert fill(tmp_path / "s", FakeEngine(), settings=SETTINGS) == 18


def test_an_empty_start_takes_other_settings(tmp_path):
    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill(path, FakeEngine(dies_at=0))
    fill(path, FakeEngine(), settings={**SETTINGS, "model": "other"})
    assert json.loads((tmp_path / "s.jsonl.json").read_text())["model"] == "other"


def test_files_of_others_are_left_alone(tmp_path):
    path, beside = tmp_path / "s.jsonl", tmp_path / "s.jsonl.json"
    for content in (b"notes", b"notes\n", b'{"task_id": "t/0"}\n'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="is there without its settings"):
            fill(path, FakeEngine())
        assert path.read_bytes() == content
    path.unlink()
    for content in (b"[1]", b"{", b'{"mine": 1}', b"\xff"):
        beside.write_bytes(content)
        with pytest.raises(ConfigError, match=r"s\.jsonl\.json, where the settings belong, is another file"):
            fill(path, FakeEngine())
        assert beside.read_bytes() == content
        assert not path.exists()


@pytest.mark.parametrize(
    ("change", "kind", "told"),
    [
        (lambda lines: [lines[1], lines[0]], ConfigError, "line 1 is not the sample that belongs there"),
        (lambda lines: [lines[0], lines[0]], ConfigError, "line 2 is not the sample that belongs there"),
        (lambda lines: [*lines, lines[0]], ConfigError, "line 19 is not"),
        (lambda lines: [lines[0].replace(b'"seed": ', b'"seed": 1')], ConfigError, "line 1 is not"),
        (lambda lines: [lines[0], b"{"], DataError, "line 2: expected a sample as a JSON object"),
        (lambda lines: [b"3"], DataError, "line 1: expected"),
        (lambda lines: [lines[0], b""], DataError, "line 2: expected"),
    ],
)
def test_other_rows_are_refused(tmp_path, whole, change, kind, told):
    path = tmp_path / "s.jsonl"
    fill(path, FakeEngine())
    content = b"".join(line + b"\n" for line in change(whole.split(b"\n")[:-1]))
    path.write_bytes(content)
    with pytest.raises(kind, match=told):
        fill(path, FakeEngine())
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(SetupError, match=r"--out: .*No such file or directory"):
        fill(tmp_path / "no" / "s.jsonl", FakeEngine())
