"""The data of a run: what is chosen, the cache, and what a second start does not do again."""

import copy
import errno
import json
import multiprocessing
import os
import shutil
import threading
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from ibft.console import Console
from ibft.data import cache, prepare
from ibft.data.encode import EncodedData
from ibft.data.prepare import load_data
from ibft.data.samples import Sample
from ibft.errors import DataError
from ibft.load_config import load_config
from ibft.tiny import BASE_DIR

ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(40)]


@pytest.fixture
def data_file(tmp_path, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_DIR)


def load(path, tokenizer, *overrides):
    config, _ = load_config(None, [f"data.path={path}", "data.max_length=128", "data.val_size=0", *overrides])
    return load_data(config, tokenizer, Console())


def cached(tmp_path):
    return sorted(folder.name for folder in (tmp_path / "cache" / "data").glob("*"))


def no_tokenizing(monkeypatch):
    monkeypatch.setattr(prepare, "encode_rows", lambda *_, **__: pytest.fail("tokenised again"))
    monkeypatch.setattr(prepare, "load_rows", lambda *_, **__: pytest.fail("read again"))


def test_a_second_start_reads_the_cache(data_file, tokenizer, monkeypatch, capsys):
    first = load(data_file, tokenizer)
    assert "format: instruction + output; template auto, labels: assistant" in capsys.readouterr().out
    no_tokenizing(monkeypatch)
    second = load(data_file, tokenizer)
    out = capsys.readouterr().out
    assert "40 samples" in out
    assert "(cached)" in out
    assert "format: instruction + output" in out
    assert list(second.train.samples) == list(first.train.samples)
    assert second.sha256 == first.sha256
    assert second.train.summary() == first.train.summary()


def test_without_the_cache_nothing_is_kept(data_file, tokenizer, tmp_path):
    load(data_file, tokenizer, "data.cache=false")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        "data.max_length=32", "data.add_eos=false", "data.template=alpaca", "data.labels=all", "data.truncation=drop",
        "data.max_samples=7", "data.deduplicate=true", "data.fields={prompt: output, response: instruction}",
    ],
)  # fmt: skip
def test_what_changes_the_samples_changes_the_key(data_file, tokenizer, tmp_path, change):
    load(data_file, tokenizer)
    load(data_file, tokenizer, change)
    assert len(cached(tmp_path)) == 2


def test_content_ids_template_and_tokenizer_are_in_the_key(data_file, tokenizer, tmp_path):
    ids, template = tmp_path / "ids.json", tmp_path / "t.jinja"
    for k, text in enumerate(("{{ prompt }}:", "{{ prompt }};")):
        template.write_text(text)
        load(data_file, tokenizer, f"data.template={template}")
        ids.write_text(json.dumps({"ids": [k]}))
        load(data_file, tokenizer, f"data.drop_ids={ids}")
    assert len(cached(tmp_path)) == 4
    other = AutoTokenizer.from_pretrained(BASE_DIR)
    other.add_tokens(["question"])
    load(data_file, other)
    data_file.write_text(json.dumps(ROWS[0]) + "\n")
    assert len(load(data_file, tokenizer).train.samples) == 1
    assert len(cached(tmp_path)) == 6


@pytest.mark.parametrize("harm", ["cut", "flipped", "no meta", "meta of another kind"])
def test_a_damaged_cache_is_made_again(data_file, tokenizer, tmp_path, harm):
    first = load(data_file, tokenizer)
    (key,) = cached(tmp_path)
    folder = tmp_path / "cache" / "data" / key
    ids = (folder / "ids.npy").read_bytes()
    match harm:
        case "cut":
            (folder / "ids.npy").write_bytes(ids[:-8])
        case "flipped":
            (folder / "ids.npy").write_bytes(ids[:-1] + bytes([ids[-1] ^ 1]))
        case "no meta":
            (folder / "meta.json").unlink()
        case _:
            (folder / "meta.json").write_text("[]")
    again = load(data_file, tokenizer)
    assert list(again.train.samples) == list(first.train.samples)
    assert (folder / "ids.npy").read_bytes() == ids
    assert cached(tmp_path) == [key]


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(data_file, tokenizer, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert len(load(data_file, tokenizer).train.samples) == 40
    assert "note: the encoded data could not be cached: " in capsys.readouterr().out


def test_faults_leave_nothing_behind(data_file, tokenizer, tmp_path):
    data_file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": 3}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: row 2: output is int, expected a string"):
        load(data_file, tokenizer)
    assert cached(tmp_path) == []


def many_times(key, barrier, folder):
    import os

    os.environ["IBFT_CACHE"] = folder
    from ibft.data.encode import EncodedData
    from ibft.data.samples import Sample

    data = EncodedData.of([Sample(list(range(1000)), 3)] * 50)
    barrier.wait()
    for _ in range(20):
        fault = cache.write(key, data, {"notes": []})
        assert fault is None, fault
        found = cache.read(key)
        assert found is not None
        assert found[0].num_tokens == 50_000


def test_two_processes_with_one_key(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=many_times, args=("k" * 64, barrier, str(tmp_path))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [folder.name for folder in (tmp_path / "data").iterdir()] == ["k" * 64]


def test_who_comes_second_waits_and_reads_what_the_first_made(data_file, tokenizer, monkeypatch, capsys, tmp_path):
    """As the processes of one run do. The second comes while the first tokenises."""
    load(data_file, tokenizer)
    (key,) = cached(tmp_path)
    made, begun, ends = cache.read(key), threading.Event(), threading.Event()
    shutil.rmtree(tmp_path / "cache")

    def first():
        with cache.turn(key, lambda: pytest.fail("waited for none")):
            begun.set()
            assert ends.wait(60)
            assert cache.write(key, *made) is None

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    no_tokenizing(monkeypatch)
    monkeypatch.setattr(Console, "notice", lambda self, text: (ends.set(), print(text)))
    second = load(data_file, tokenizer)
    thread.join()
    assert list(second.train.samples) == list(made[0].samples)
    out = capsys.readouterr().out
    assert "another process prepares this training data: waiting for it" in out
    assert "(cached)" in out
    assert cached(tmp_path) == [key]


def test_held_out_rows_of_another_split(data_file, tokenizer, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in {"train": ROWS[:30], "validation": ROWS[30:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(folder, tokenizer, f"data.eval_path={folder}", "data.eval_split=validation")
    assert (len(data.train.samples), len(data.held_out.samples)) == (30, 10)
    same = load(folder, tokenizer, f"data.eval_path={folder}")
    assert len(same.held_out.samples) == 30


def rows_at(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("setting", ["drop_ids", "keep_ids"])
def test_a_missing_file_of_ids_is_refused_though_the_rows_are_cached(data_file, tokenizer, tmp_path, setting):
    load(data_file, tokenizer)
    with pytest.raises(DataError, match=rf"data.{setting}: .*none.json: No such file"):
        load(data_file, tokenizer, f"data.{setting}={tmp_path}/none.json")


def test_special_tokens_that_a_chat_template_writes_are_in_the_key(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))
    tokenizer = copy.deepcopy(tokenizer)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = rows_at(tmp_path / "rows.jsonl", [{"messages": turns}])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for bos in (tokenizer.pad_token, tokenizer.eos_token):
        tokenizer.bos_token = bos
        assert tokenizer.decode(load(path, tokenizer).train.samples[0].input_ids).startswith(f"{bos}[user]")


TASK = " ".join(f"w{i}" for i in range(20))


def test_problems_below_a_folder_with_an_equals_sign_are_in_the_key(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))
    path = rows_at(tmp_path / "rows.jsonl", [{"instruction": TASK, "output": "x"}, *ROWS[:1]])
    (tmp_path / "k=1").mkdir()
    problems = rows_at(tmp_path / "k=1" / "p.jsonl", [{"q": "nothing that any of the rows has in common with this"}])
    assert len(load(path, tokenizer, f"data.decontaminate=['{problems}']").train.samples) == 2
    rows_at(problems, [{"q": TASK}])
    assert len(load(path, tokenizer, f"data.decontaminate=['{problems}']").train.samples) == 1


def test_a_folder_of_problems_is_in_the_key_whatever_its_files_are(data_file, tokenizer, tmp_path):
    folder = tmp_path / "v2"
    folder.mkdir()
    module = "module top; endmodule"
    for name, text in {"prompt.txt": "I would like a module", "ref.sv": module, "test.sv": module}.items():
        (folder / f"Prob001_zero_{name}").write_text(text)
    for _ in range(2):
        assert len(load(data_file, tokenizer, f"data.decontaminate=[verilogeval-v2={folder}]").train.samples) == 40
    assert len(cached(tmp_path)) == 1
    (folder / "Prob001_zero_prompt.txt").write_text("I would like another module")
    load(data_file, tokenizer, f"data.decontaminate=[verilogeval-v2={folder}]")
    assert len(cached(tmp_path)) == 2


def test_the_kind_of_a_file_is_in_the_key(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_text("prompt,response\nx\ty,z\n")
    load(tmp_path / "a.csv", tokenizer)
    with pytest.raises(DataError, match=r"a\.tsv:2"):
        load(tmp_path / "a.tsv", tokenizer)


def test_a_process_that_comes_second_to_the_rename_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path))
    data, rename = EncodedData.of([Sample([1, 2], 1)]), os.rename

    def late(fresh, folder):
        rename(fresh, folder)  # the other process was quicker
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(os, "rename", late)
    assert cache.write("k" * 64, data, {}) is None


def test_parts_of_a_row_are_not_held_out_from_each_other(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("IBFT_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": f"q{k}", "output": " ".join(f"{k} {i}" for i in range(60))} for k in range(10)]
    path = rows_at(tmp_path / "rows.jsonl", rows)
    data = load(path, tokenizer, "data.max_length=32", "data.truncation=split", "data.val_size=0.3")
    trained, held_out = (set(part.samples.rows.tolist()) for part in (data.train, data.held_out))
    assert (len(trained), len(held_out), trained & held_out) == (7, 3, set())
    assert len(data.held_out.samples) > 3


@pytest.mark.parametrize("setting", ["data.drop_ids", "data.deduplicate"])
def test_a_row_keeps_its_number_where_others_are_left_out(data_file, tokenizer, tmp_path, setting):
    """In messages, and in what a fault of training names."""
    value = "true"
    if setting == "data.drop_ids":
        value = str(rows_at(tmp_path / "ids.json", [{"ids": [1]}]))
    rows_at(data_file, [ROWS[0], ROWS[0], ROWS[1], ROWS[2]])
    assert load(data_file, tokenizer, f"{setting}={value}").train.samples.rows.tolist() == [0, 2, 3]
    rows_at(data_file, [ROWS[0], ROWS[0], ROWS[1], {"instruction": "a", "output": 3}])
    with pytest.raises(DataError, match="row 4: output is int"):
        load(data_file, tokenizer, f"{setting}={value}")


def test_equal_rows_once(data_file, tokenizer, capsys):
    data_file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:3], ROWS[1], ROWS[0]]))
    data = load(data_file, tokenizer, "data.deduplicate=true")
    assert data.train.samples.rows.tolist() == [0, 1, 2]
    assert "rows: 3 of 5 rows (data.deduplicate)" in capsys.readouterr().out


def test_held_out_samples_are_the_same_each_time(data_file, tokenizer):
    a, b = (load(data_file, tokenizer, "data.val_size=0.2", "data.cache=false") for _ in range(2))
    assert len(a.held_out.samples) == 8
    assert list(a.held_out.samples) == list(b.held_out.samples)
    both = np.concatenate([a.train.samples.rows, a.held_out.samples.rows])
    assert sorted(both.tolist()) == list(range(40))


def test_a_second_start_of_many_rows_is_fast(data_file, tokenizer, monkeypatch):
    """A smaller kind of the 200,000 rows of benchmarks: reading is far quicker than making."""
    data_file.write_text(
        "".join(json.dumps({"prompt": f"p {i} " * 30, "response": "r " * 60}) + "\n" for i in range(4000))
    )
    times = []
    for _ in range(2):
        started = time.process_time()
        load(data_file, tokenizer)
        times.append(time.process_time() - started)
    assert times[1] < times[0] / 4
