"""`analyze geometry` as a command: layers, files of ids, and whole runs on the bundled base."""

import hashlib
import json
import math
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import randomise_lora

from ibft.analysis.geometry import METRICS, draw_weights
from ibft.analysis.geometry_run import choose_layers, measure_layers, number, read_groups, run_geometry
from ibft.data.encode import encode_rows
from ibft.errors import ConfigError, DataError, NonFiniteError
from ibft.tiny import BASE_DIR

SHARED_DATA = Path(os.environ.get("IBFT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def degrees(u, v) -> float:
    """As in a schoolbook."""
    return math.degrees(math.acos(np.dot(u, v) / (np.linalg.norm(u) * np.linalg.norm(v))))


# --- arguments and ids ----------------------------------------------------------------------------


def test_layers():
    assert choose_layers("auto", 30) == [20]
    assert choose_layers("all", 3) == [0, 1, 2, 3]
    assert choose_layers("20", 30) == [20]
    assert choose_layers("5, 0,30,5", 30) == [5, 0, 30]
    assert choose_layers([2, 1], 3) == [2, 1]
    for text, message in (
        ("31", r"--layers: got 31, expected 0 \.\. 30 \(the model has 30 layers\)"),
        ("-1", "--layers: got -1, expected 0"),
        ("last", "--layers: got last, expected auto, all or numbers"),
        ("", "--layers: got , expected auto"),
        ("2,", "--layers: got 2,, expected auto"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_layers(text, 30)
    with pytest.raises(ConfigError, match="--layers"):
        choose_layers([], 30)


def save_ids(folder: Path, name: str, ids, **more) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"ids": ids, **more}))
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "is not JSON: "),
        ("[1, 2]", 'has no list of ids: expected {"ids": [numbers of rows, from 0]}'),
        ('{"id": [1]}', "has no list of ids"),
        ('{"ids": 3}', "has no list of ids"),
        ('{"ids": []}', "has an empty list of ids"),
        ('{"ids": [1, "2"]}', "has the id '2', expected whole numbers"),
        ('{"ids": [1, 2.0]}', "has the id 2.0, expected whole numbers"),
        ('{"ids": [true]}', "has the id True, expected whole numbers"),
        ('{"ids": [0, 20]}', "has id 20, but rows.json has the rows 0 .. 19"),
        ('{"ids": [-1]}', "has id -1, but rows.json has the rows 0 .. 19"),
        ('{"ids": [4, 5, 4]}', "has id 4 twice"),
        ('{"ids": [7, 3]}', "has id 3, which --most has too"),
    ],
)
def test_files_of_ids_that_are_refused(tmp_path, content, message):
    path = tmp_path / "least.json"
    if content is not None:
        path.write_text(content)
    files = {"most": save_ids(tmp_path, "most", [3, 1]), "least": str(path), "reference": None}
    with pytest.raises(DataError) as caught:
        read_groups(files, [{}] * 20, "rows.json", 0)
    assert str(caught.value).startswith("--least: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_reference_is_drawn_from_the_others(tmp_path):
    files = {"most": save_ids(tmp_path, "most", [3, 1]), "least": save_ids(tmp_path, "least", [19, 0, 8], more=1)}

    def drawn(seed: int, rows: int = 20) -> list[int]:
        found = read_groups({**files, "reference": None}, [{}] * rows, "rows.json", seed)
        assert (found["most"].numbers, found["least"].numbers) == ([3, 1], [19, 0, 8])
        return found["reference"].numbers

    assert len(drawn(0)) == 5
    assert drawn(0) == drawn(0) != drawn(1)
    seen = {number for seed in range(50) for number in drawn(seed)}
    assert seen == set(range(20)) - {0, 1, 3, 8, 19}
    given = read_groups({**files, "reference": save_ids(tmp_path, "r", [5])}, [{}] * 20, "rows.json", 0)
    assert given["reference"].numbers == [5]
    with pytest.raises(DataError, match=r"--reference: .* has id 8, which --least has too"):
        read_groups({**files, "reference": save_ids(tmp_path, "r", [8])}, [{}] * 20, "rows.json", 0)


def test_numbers_as_the_table_shows_them():
    values = [136.42, 8.8349, 0.07081, -0.5, 0.0, 3e-7, None]
    assert [number(value) for value in values] == ["136", "8.83", "0.0708", "-0.500", "0", "3.00e-07", "none"]
    assert number(8.8349, sign=True) == "+8.83"


def test_states_that_are_not_finite():
    groups = {"most": FakeGroup(2), "least": FakeGroup(2)}
    states = torch.ones(2, 4, 3)
    states[1, 3, 0] = math.inf
    with pytest.raises(NonFiniteError, match="FT: the hidden states of layer 9 are not all finite"):
        measure_layers("FT", states, groups, [7, 9], draw_weights([2, 2], resamples=3, seed=0))


class FakeGroup:
    def __init__(self, count: int) -> None:
        self.samples = dict.fromkeys(range(count))


# --- a whole run ----------------------------------------------------------------------------------

MODEL = "bundled:tiny"
ROWS = [{"instruction": f"Add {i}", "output": f"def add_{i}(x):\n    return x + {i}" * (1 + i % 3)} for i in range(24)]
MOST_IDS, LEAST_IDS = [0, 5, 2, 9, 14, 21], [1, 3, 22, 7]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folders = {}
    for seed, name in enumerate(("FT", "IB-FT")):
        model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"))
        randomise_lora(model, seed=seed)
        folders[name] = str(tmp_path_factory.mktemp("adapters") / name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return {
        "data": str(folder / "rows.json"),
        "most": save_ids(folder, "most", MOST_IDS),
        "least": save_ids(folder, "least", LEAST_IDS),
    }


def run(files, folder: Path, models=None, **changes) -> dict:
    out = folder / "geometry.json"
    settings = {"layers": "5", "device": "cpu", "bootstrap": 100, **files, **changes}
    run_geometry(models=models or {"base": (MODEL, None)}, out=str(out), **settings)
    return json.loads(out.read_text())


def by_model(report: dict, layer: int) -> dict:
    return {entry["model"]: entry for entry in report["results"] if entry["layer"] == layer}


def test_a_run_equals_another_writing(files, adapters, tmp_path, capsys):
    """One sample at a time through PEFT's model, transformers' hidden states, plain numpy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = {"base": (MODEL, None)} | {name: (MODEL, folder) for name, folder in adapters.items()}
    report = run(files, tmp_path, models, layers="all", pool="mean")
    assert report["layers"] == list(range(9))
    reference = report["groups"]["reference"]["ids"]
    assert len(set(reference)) == 10
    assert not set(reference) & {*MOST_IDS, *LEAST_IDS}

    samples = encode_rows(ROWS, AutoTokenizer.from_pretrained(BASE_DIR), max_length=2048).samples
    for name, (_, adapter) in models.items():
        model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
        inner = model.model
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        means = []
        for ids in (MOST_IDS, LEAST_IDS, reference):
            vectors = []
            for i in ids:
                with torch.no_grad():
                    states = inner(torch.tensor([samples[i].input_ids]), output_hidden_states=True).hidden_states
                vectors.append(torch.stack([s[0, samples[i].prompt_length :].mean(0) for s in states[:-1]]).double())
            means.append(torch.stack(vectors).numpy())
        for layer in (0, 1, 5, 7):
            most, least, others = (group[:, layer] for group in means)
            m, o, c = most.mean(0), least.mean(0), others.mean(0)
            scale = (np.linalg.norm(most, axis=1).mean() + np.linalg.norm(least, axis=1).mean()) / 2
            l2 = np.linalg.norm(m - o)
            expected = [l2, l2 / scale, degrees(m, o), degrees(m - c, o - c)]
            found = [by_model(report, layer)[name][metric]["sample"] for metric in METRICS]
            assert found == pytest.approx(expected, rel=1e-4), (name, layer)
    base, tuned, ib = by_model(report, 5).values()
    assert len({base["l2"]["sample"], tuned["l2"]["sample"], ib["l2"]["sample"]}) == 3  # the adapters count
    assert by_model(report, 0)["base"]["l2"] == by_model(report, 0)["FT"]["l2"]  # no adapter on the embeddings

    pairs = [(entry["model"], entry["minus"]) for entry in report["differences"] if entry["layer"] == 5]
    assert pairs == [("FT", "base"), ("IB-FT", "base"), ("IB-FT", "FT")]
    for entry in report["differences"]:
        of = by_model(report, entry["layer"])
        for metric in METRICS:
            less = of[entry["model"]][metric]["sample"] - of[entry["minus"]][metric]["sample"]
            assert entry[metric]["sample"] == pytest.approx(less, abs=1e-12)
    printed = capsys.readouterr().out
    assert "6 most, 4 least, 10 reference" in printed
    assert "8 of 8" in printed
    assert f"[{number(base['l2_normalised']['low'])}, {number(base['l2_normalised']['high'])}]" in printed


def test_the_report_says_what_it_was_made_of(files, adapters, tmp_path, capsys):

    from ibft.evaluation.local_model import check_adapter

    models = {"base": (MODEL, None), "IB-FT": (MODEL, adapters["IB-FT"])}
    report = run(files, tmp_path, models, layers="auto", pool="last", seed=5, batch_size=3)
    assert report["models"] == [
        {"name": "base", "model": MODEL, "adapter": None, "adapter_sha256": None},
        {"name": "IB-FT", "model": MODEL, "adapter": adapters["IB-FT"],
         "adapter_sha256": check_adapter(adapters["IB-FT"])},
    ]  # fmt: skip
    expected = {
        "data": files["data"], "rows": 24, "pool": "last", "layers": [5], "depth": 8, "batch_size": 3,
        "max_length": 2048, "add_eos": True, "split": "train", "quantization": "none", "device": "float32 on CPU",
        "bootstrap": {"level": 0.95, "resamples": 100, "seed": 5}, "notes": [],
        "data_sha256": hashlib.sha256(json.dumps(ROWS, sort_keys=True).encode()).hexdigest(),
    }  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    most = report["groups"]["most"]
    assert (most["file"], most["n"], most["ids"], most["dropped"]) == (files["most"], 6, MOST_IDS, [])
    assert most["sha256"] == hashlib.sha256(Path(files["most"]).read_bytes()).hexdigest()
    assert report["groups"]["reference"]["file"] is None
    assert {"torch", "transformers", "peft", "numpy"} <= report["versions"].keys()
    printed = capsys.readouterr().out
    assert "layer 5 of 8" in printed
    assert "IB-FT - base" in printed
    assert number(report["results"][0]["l2"]["sample"]) in printed


def test_the_batch_size_changes_nothing(files, adapters, tmp_path):
    models = {"FT": (MODEL, adapters["FT"])}
    one, many = (run(files, tmp_path, models, layers="1,8", batch_size=size) for size in (1, 20))
    for a, b in zip(one["results"], many["results"], strict=True):
        for metric in METRICS:
            values = [list(entry[metric].values()) for entry in (a, b)]
            assert np.array(values[0], dtype=float) == pytest.approx(
                np.array(values[1], dtype=float), rel=1e-4, abs=1e-5, nan_ok=True
            )


def test_four_bits(files, adapters, tmp_path):
    models = {"FT": (MODEL, adapters["FT"])}
    plain, quantised = (run(files, tmp_path, models, quantization=q)["results"][0] for q in ("none", "nf4"))
    assert quantised["l2"]["sample"] != plain["l2"]["sample"]
    assert quantised["l2"]["sample"] == pytest.approx(plain["l2"]["sample"], rel=0.3)


def test_rows_that_max_length_leaves_without_a_label_are_named(files, tmp_path, capsys):
    lengths = [len(s.input_ids) for s in encoded_rows(2048)]
    prompt = max(s.prompt_length for s in encoded_rows(2048))
    rows = [*ROWS[:9], {"instruction": "long " * 40, "output": "x"}, *ROWS[10:]]  # row 9 is of most
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    report = run({**files, "data": str(data)}, tmp_path, max_length=prompt + 5)
    assert report["groups"]["most"]["dropped"] == [9]
    assert report["groups"]["most"]["ids"] == [i for i in MOST_IDS if i != 9]
    assert report["groups"]["most"]["n"] == 5
    assert report["groups"]["least"]["truncated"] == sum(lengths[i] > prompt + 5 for i in LEAST_IDS) > 0
    assert "note: most: 1 row left out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"--most: none of the 6 rows has a token of its response within"):
        run(files, tmp_path, max_length=2)


def encoded_rows(max_length: int):
    from transformers import AutoTokenizer

    return encode_rows(ROWS, AutoTokenizer.from_pretrained(BASE_DIR), max_length=max_length).samples


def test_without_other_rows_there_is_no_reference(files, tmp_path):
    rest = [i for i in range(24) if i not in MOST_IDS]
    report = run({**files, "least": save_ids(tmp_path, "rest", rest)}, tmp_path)
    assert report["results"][0]["angle_centred"] == dict.fromkeys(("sample", "estimate", "low", "high"))
    assert report["results"][0]["angle"]["low"] is not None
    assert report["notes"] == ["no row is left for the reference, so that there is no centred angle"]


def test_ids_of_other_data_are_noticed(files, tmp_path):
    report = run({**files, "least": save_ids(tmp_path, "least", LEAST_IDS, data_sha256="ab")}, tmp_path)
    assert len(report["notes"]) == 1
    assert "was made for other data" in report["notes"][0]
    right = save_ids(tmp_path, "least", LEAST_IDS, data_sha256=report["data_sha256"])
    assert run({**files, "least": right}, tmp_path)["notes"] == []


def test_one_model_is_in_memory_at_a_time(files, adapters, tmp_path, monkeypatch):
    from ibft.evaluation.local_model import LocalModel

    alive: list[weakref.ref] = []
    load = LocalModel.load

    def watched(self):
        assert [ref() for ref in alive] == [None] * len(alive)
        model = load(self)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(LocalModel, "load", watched)
    models = {name: (MODEL, folder) for name, folder in adapters.items()}
    run(files, tmp_path, models | {"base": (MODEL, None)})
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pool": "max"}, ConfigError, "--pool: got max, expected mean or last"),
        ({"quantization": "int8"}, ConfigError, "--quantization: got int8"),
        ({"device": "tpu"}, ConfigError, "--device: got tpu"),
        ({"bootstrap": 99}, ConfigError, "--bootstrap: got 99, expected 100 or more"),
        ({"batch_size": 0}, ConfigError, "--batch-size: got 0"),
        ({"max_length": 1}, ConfigError, "--max-length: got 1, expected 2 or more"),
        ({"seed": -1}, ConfigError, "--seed: got -1"),
        ({"layers": "9"}, ConfigError, r"--layers: got 9, expected 0 \.\. 8"),
        ({"models": {"FT": (MODEL, "/nowhere")}}, ConfigError, "--adapter: /nowhere has no adapter_config.json"),
        ({"models": {"x": ("/nowhere", None)}}, ConfigError, "--model: no folder /nowhere"),
        ({"data": "/nowhere.json"}, DataError, "/nowhere.json"),
    ],
)
def test_refusals_come_before_any_weight_is_loaded(files, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(error, match=message) as caught:
        run({**files, **{k: v for k, v in changes.items() if k != "models"}}, tmp_path, changes.get("models"))
    assert "\n" not in str(caught.value)


def test_a_report_that_cannot_be_written_is_refused_first(files, tmp_path, monkeypatch):
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="--out: no folder"):
        run(files, tmp_path / "missing")


def test_a_malformed_row_is_named_by_its_id(files, tmp_path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([*ROWS[:3], {"query": "x"}, *ROWS[4:]]))
    with pytest.raises(DataError, match=r"rows\.json, id 3: a row has the keys query; expected instruction"):
        run({**files, "data": str(data)}, tmp_path)


def test_models_that_cannot_be_compared(files, tmp_path):
    folder = tmp_path / "deeper"
    shutil.copytree(BASE_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(ConfigError, match="other has 7 layers of size 192, base has 8 of 192"):
        run(files, tmp_path, {"base": (MODEL, None), "other": (str(folder), None)})
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="other turns the samples into other tokens than base"):
        run(files, tmp_path, {"base": (MODEL, None), "other": (str(folder), None)})


@pytest.mark.skipif(
    not (SHARED_DATA / "code_alpaca_2k.json.gz").is_file(), reason="needs code_alpaca_2k.json.gz (see IBFT_DATA)"
)
def test_real_rows(tmp_path):
    """Short against long responses: they lie apart, and more so than two groups of short ones."""
    from ibft.data.sources import load_rows

    data = str(SHARED_DATA / "code_alpaca_2k.json.gz")
    rows = load_rows(data)[:60]
    order = sorted(range(60), key=lambda i: len(rows[i]["output"]))
    short, others, long = order[:20], order[20:40], order[40:]

    def distance(most: list[int], least: list[int]) -> float:
        files = {"most": most, "least": least, "reference": others}
        paths = {name: save_ids(tmp_path, name, ids) for name, ids in files.items()}
        report = run({"data": data, **paths}, tmp_path, max_length=160)
        return report["results"][0]["l2_normalised"]["estimate"]

    apart = distance(short, long)
    assert apart > 0.1
    assert distance(short[::2], short[1::2]) < apart
