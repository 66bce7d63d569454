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

from ibft.analysis.geometry import METRICS, draw_weights, measure
from ibft.analysis.geometry_run import choose_layers, measure_layers, number, read_groups, run_geometry
from ibft.data.encode import encode_rows
from ibft.errors import ConfigError, DataError, NonFiniteError
from ibft.tiny import BASE_DIR

SHARED_DATA = Path(os.environ.get("IBFT_DATA", Path(__file__).parents[3] / "shared" / "data"))
NAN = math.nan


def measured(*groups, resamples: int = 200, seed: int = 0):
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    return measure(arrays, draw_weights([len(a) for a in arrays], resamples=resamples, seed=seed))


def clouds(seed: int, sizes=(12, 9, 15), dim: int = 7) -> list[np.ndarray]:
    """Three groups with a large common part."""
    source = np.random.default_rng(seed)
    return [4 + source.normal(size=dim) + source.normal(size=(n, dim)) for n in sizes]


def degrees(u, v) -> float:
    """As in a schoolbook."""
    return math.degrees(math.acos(np.dot(u, v) / (np.linalg.norm(u) * np.linalg.norm(v))))


# --- the metrics ----------------------------------------------------------------------------------

# Means (3, 4), (3, 0) and (0, 4); of each group tr(S) = 2 and n = 2, so that tr(S) / n = 1.
MOST, LEAST, REFERENCE = [[3, 3], [3, 5]], [[2, 0], [4, 0]], [[0, 3], [0, 5]]


def test_worked_by_hand():
    found = measured(MOST, LEAST, REFERENCE)
    scale = ((math.sqrt(18) + math.sqrt(34)) / 2 + 3) / 2  # mean lengths 5.0368 and 3
    assert scale == pytest.approx(4.018398, abs=1e-6)
    # seen from the origin (3, 4) and (3, 0): cos 3/5; seen from (0, 4) it is (3, 0) and (3, -4): 3/5 again
    assert found.sample == pytest.approx([4, 4 / scale, 53.130102, 53.130102], abs=1e-6)
    # |(0, 4)|^2 = 16, less 1 for each group: 14. Sides 25 - 1, 9 - 1; and from (0, 4) 9 - 2 and 25 - 2
    plain = math.degrees(math.acos((24 + 8 - 14) / (2 * math.sqrt(24 * 8))))
    centred = math.degrees(math.acos((7 + 23 - 14) / (2 * math.sqrt(7 * 23))))
    assert (plain, centred) == pytest.approx((49.494650, 50.913841), abs=1e-6)
    assert found.estimate == pytest.approx([math.sqrt(14), math.sqrt(14) / scale, plain, centred], abs=1e-9)


def test_a_resample_worked_by_hand():
    """Of most only its first example, so that its mean is (3, 3). Of each length 1 + 1/2 is taken off for a group."""
    weights = [np.array([[1.0, 0.0]]), np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]])]
    found = measure([np.array(group, dtype=float) for group in (MOST, LEAST, REFERENCE)], weights).replicates
    plain = math.degrees(math.acos((16.5 + 7.5 - 6) / (2 * math.sqrt(16.5 * 7.5))))
    centred = math.degrees(math.acos((7 + 22 - 6) / (2 * math.sqrt(7 * 22))))
    expected = [math.sqrt(6), math.sqrt(6) / ((math.sqrt(18) + 3) / 2), plain, centred]
    assert found == pytest.approx(np.array([expected]), abs=1e-9)


def test_groups_count_alike_whatever_their_size():
    found = measured([[0, 1], [0, 1], [0, 1]], [[3, 0], [3, 0]])
    assert found.sample[:2] == pytest.approx([math.sqrt(10), math.sqrt(10) / 2])


def test_equals_the_plain_definitions():
    for seed in range(20):
        most, least, reference = clouds(seed)
        m, o, c = most.mean(0), least.mean(0), reference.mean(0)
        norm = (np.linalg.norm(most, axis=1).mean() + np.linalg.norm(least, axis=1).mean()) / 2
        l2 = math.sqrt(sum((a - b) ** 2 for a, b in zip(m, o, strict=True)))
        expected = [l2, l2 / norm, degrees(m, o), degrees(m - c, o - c)]
        assert measured(most, least, reference, resamples=1).sample == pytest.approx(expected, rel=1e-9)


def test_small_angles_are_exact():
    angle = measured([[1e3, 0]] * 2, [[1e3, 1e-5]] * 2, resamples=1).sample[2]
    assert angle == pytest.approx(math.degrees(1e-8), rel=1e-6)


def all_of(geometry) -> np.ndarray:
    return np.concatenate([geometry.sample[None], geometry.estimate[None], geometry.replicates])


def test_a_rotation_changes_nothing():
    groups = clouds(3)
    rotation, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(7, 7)))
    assert all_of(measured(*(g @ rotation for g in groups))) == pytest.approx(all_of(measured(*groups)), abs=1e-9)


def test_a_factor_changes_l2_alone():
    groups = clouds(3)
    expected = all_of(measured(*groups)) * [7, 1, 1, 1]
    assert all_of(measured(*(7 * g for g in groups))) == pytest.approx(expected, abs=1e-9)


def test_a_shift_changes_neither_l2_nor_the_centred_angle():
    groups = clouds(3)
    before, after = all_of(measured(*groups)), all_of(measured(*(g + np.arange(7) for g in groups)))
    assert after[:, [0, 3]] == pytest.approx(before[:, [0, 3]], abs=1e-9)
    assert abs(after[0, 2] - before[0, 2]) > 1


# --- the bootstrap --------------------------------------------------------------------------------


def test_the_interval_is_the_percentile_of_resamples_drawn_one_by_one():
    """Another writing: indices instead of weights, a loop, and the excess by numpy's covariance."""
    groups = clouds(5)
    weights = draw_weights([12, 9, 15], resamples=300, seed=11)
    excess = [np.trace(np.cov(g.T)) / len(g) for g in groups]
    twice = [e + e * (len(g) - 1) / len(g) for e, g in zip(excess, groups, strict=True)]
    rows = []
    for r in range(300):
        drawn = [np.repeat(g, np.rint(w[r] * len(g)).astype(int), axis=0) for g, w in zip(groups, weights, strict=True)]
        assert [len(d) for d in drawn] == [12, 9, 15]
        m, o, _ = (d.mean(0) for d in drawn)
        apart = max(0.0, (m - o) @ (m - o) - twice[0] - twice[1])
        a, b = m @ m - twice[0], o @ o - twice[1]
        norm = (np.linalg.norm(drawn[0], axis=1).mean() + np.linalg.norm(drawn[1], axis=1).mean()) / 2
        cosine = (a + b - apart) / (2 * math.sqrt(a * b))
        rows.append([math.sqrt(apart), math.sqrt(apart) / norm, math.degrees(math.acos(min(1.0, cosine)))])
    report = measure(groups, weights).report()
    for name, column in zip(METRICS, np.array(rows).T, strict=False):
        low, high = np.percentile(column, [2.5, 97.5])
        assert (report[name]["low"], report[name]["high"]) == pytest.approx((low, high), rel=1e-9, abs=1e-6), name
        assert low < high


def test_one_seed_gives_one_interval():
    groups = clouds(5)
    first = measured(*groups, seed=3).report()
    assert measured(*groups, seed=3).report() == first
    other = measured(*groups, seed=4).report()
    assert other["l2"]["low"] != first["l2"]["low"]
    assert other["l2"]["estimate"] == first["l2"]["estimate"]


def test_every_example_is_drawn_as_often():
    weights = draw_weights([5, 8], resamples=20_000, seed=0)
    assert [w.shape for w in weights] == [(20_000, 5), (20_000, 8)]
    for w in weights:
        assert np.allclose(w.sum(1), 1)
        assert w.mean(0) == pytest.approx(1 / w.shape[1], abs=4 / w.shape[1] / math.sqrt(20_000))
        n = w.shape[1]
        assert (n * w).var(0) == pytest.approx(1 - 1 / n, rel=0.05)  # binomial


DIM, N = 120, 40
SPREAD = np.linspace(0.6, 1.4, DIM)
SPREAD[1:4] = 2  # as in a language model, groups differ where examples differ anyway
CENTRES = np.zeros((3, DIM))
CENTRES[:, 0] = 10
CENTRES[0, 1], CENTRES[1, 2], CENTRES[2, 3] = 6, 5.5, 5
STRETCH = np.linspace(1.5, 0.5, DIM)  # of the second model against the first
OWN = np.zeros(DIM)  # what it adds of its own to each example, on average nothing
OWN[1:4] = 2


def draw_groups(source, sizes=(N, N, 2 * N), centres=CENTRES) -> list[np.ndarray]:
    return [centre + SPREAD * source.normal(size=(n, DIM)) for centre, n in zip(centres, sizes, strict=False)]


def second_view(group: np.ndarray, source) -> np.ndarray:
    return group * STRETCH + OWN * source.normal(size=group.shape)


def truth(centres, view) -> np.ndarray:
    """Exact but for the mean length of a vector, of 20,000 drawn."""
    m, o, c = centres
    norm = sum(np.linalg.norm(view(g), axis=1).mean() for g in draw_groups(np.random.default_rng(99), [20_000] * 2)) / 2
    l2 = np.linalg.norm(m - o)
    return np.array([l2, l2 / norm, degrees(m, o), degrees(m - c, o - c)])


@pytest.fixture(scope="module")
def trials():
    """300 times three samples, seen by two models: (value's name -> [300, 4] estimate, low, high), plain intervals."""
    source = np.random.default_rng(1)
    found: dict[str, list] = {"first": [], "second": [], "difference": []}
    samples, plain = [], []
    for trial in range(300):
        groups = draw_groups(source)
        weights = draw_weights([len(g) for g in groups], resamples=200, seed=trial)
        first, second = measure(groups, weights), measure([second_view(g, source) for g in groups], weights)
        for name, geometry in (("first", first), ("second", second), ("difference", second - first)):
            report = geometry.report()
            found[name].append([[report[m][key] for m in METRICS] for key in ("estimate", "low", "high")])
        samples.append(first.sample)
        l2 = np.linalg.norm(weights[0] @ groups[0] - weights[1] @ groups[1], axis=1)
        plain.append(np.percentile(l2, [2.5, 97.5]))
    return {name: np.array(rows, dtype=float) for name, rows in found.items()}, np.array(samples), np.array(plain)


def test_intervals_cover_the_truth_as_often_as_they_say(trials):
    """0.95 +- three standard errors of 300 trials: 0.912 to 0.988."""
    found, _, _ = trials
    first = truth(CENTRES, lambda group: group)
    second = truth(CENTRES * STRETCH, lambda group: second_view(group, np.random.default_rng(98)))
    for name, true in (("first", first), ("second", second), ("difference", second - first)):
        _, low, high = found[name].swapaxes(0, 1)
        covered = ((low <= true) & (true <= high)).mean(0)
        assert ((covered >= 0.912) & (covered <= 0.988)).all(), (name, covered)


def test_without_the_correction_they_would_not(trials):
    """Why `estimate` is not simply the sample's value, and `low`, `high` not its percentiles."""
    found, samples, plain = trials
    true = np.linalg.norm(CENTRES[0] - CENTRES[1])
    assert ((plain[:, 0] <= true) & (true <= plain[:, 1])).mean() < 0.7
    square = found["first"][:, 0, 0] ** 2
    error = square.std() / math.sqrt(300)
    assert square.mean() == pytest.approx(true**2, abs=3 * error)
    assert (samples[:, 0] ** 2).mean() > true**2 + 10 * error


def test_of_one_population_the_distance_is_nothing():
    source = np.random.default_rng(2)
    found = [measured(*draw_groups(source, centres=CENTRES[[0, 0, 2]]), seed=i) for i in range(100)]
    estimates, lows = ([geometry.report()["l2"][key] for geometry in found] for key in ("estimate", "low"))
    assert 0.3 < np.mean(np.array(estimates) == 0) < 0.7
    assert np.mean(np.array(lows) == 0) >= 0.95
    # though any two samples are some way apart: of two groups tr(S) / n each
    squares = np.mean([geometry.sample[0] ** 2 for geometry in found])
    assert squares == pytest.approx(2 * np.square(SPREAD).sum() / N, rel=0.05)


# --- differences, and what has no value -----------------------------------------------------------


def test_differences_are_paired():
    groups = clouds(6)
    one, double = measured(*groups), measured(*(2 * g for g in groups))
    nothing = (one - one).report()
    assert all(value == 0 for metric in nothing.values() for value in metric.values())
    report, difference = one.report(), (double - one).report()
    for key in ("sample", "estimate", "low", "high"):  # 2 x less x is x, in every resample
        assert difference["l2"][key] == pytest.approx(report["l2"][key])
        assert difference["l2_normalised"][key] == pytest.approx(0, abs=1e-12)
    assert (one - double).report()["l2"]["low"] == pytest.approx(-report["l2"]["high"])


def test_without_a_reference_there_is_no_centred_angle():
    most, least, _ = clouds(7)
    report = measured(most, least).report()
    assert set(report["angle_centred"].values()) == {None}
    assert None not in report["l2"].values()
    both = measured(*clouds(7))
    assert both.report()["l2"]["sample"] == report["l2"]["sample"]


def test_one_example_has_no_interval():
    report = measured([[3, 4]], LEAST, REFERENCE).report()
    for name, value in (("l2", 4), ("angle", 53.130102), ("angle_centred", 53.130102)):
        none = {"estimate": None, "low": None, "high": None}
        assert report[name] == {"sample": pytest.approx(value, abs=1e-6), **none}
    only_reference = measured(MOST, LEAST, [[0, 4]]).report()
    assert only_reference["angle_centred"]["estimate"] is None
    assert only_reference["angle"]["low"] is not None


def test_equal_vectors():
    """Embeddings of the EOS token: all the same, and equal means up to rounding."""
    same = np.full((7, 5), 0.1) * [1, 2, 3, 4, 5]
    report = measured(same[:3], same, same[:6]).report()
    assert set(report["l2"].values()) == set(report["angle"].values()) == {0}
    assert set(report["angle_centred"].values()) == {None}
    nothing = measured(0 * same, 0 * same).report()
    assert set(nothing["l2"].values()) == {0}
    assert set(nothing["l2_normalised"].values()) == set(nothing["angle"].values()) == {None}


def test_an_angle_that_chance_decides_may_be_anything():
    """Two far groups and a third whose mean is nearly that of most: the side from it to most is chance."""
    source = np.random.default_rng(0)
    most, least, reference = source.normal(size=(3, 30, 6))
    least[:, 0] += 9
    reference[:, 0] += 0.45
    geometry = measured(most, least, reference)
    assert geometry.report()["angle_centred"] == {
        "sample": pytest.approx(geometry.sample[3]), "estimate": pytest.approx(geometry.estimate[3]),
        "low": 0, "high": 180,
    }  # fmt: skip
    assert 0.025 < np.isnan(geometry.replicates[:, 3]).mean() < 0.9
    difference = (geometry - measured(most, least, reference - 3)).report()["angle_centred"]
    assert (difference["low"], difference["high"]) == (-180, 180)


@pytest.mark.parametrize("groups", [[MOST], [MOST, np.zeros((0, 2))], [MOST, LEAST, REFERENCE, MOST]])
def test_other_groups_are_refused(groups):
    arrays = [np.asarray(group, dtype=float) for group in groups]
    with pytest.raises(ValueError, match="groups: got"):
        measure(arrays, [np.full((3, len(a)), 1 / max(len(a), 1)) for a in arrays])


def test_weights_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"groups: got \[2, 2\] examples and weights of \[2, 3\]"):
        measure([np.array(MOST), np.array(LEAST)], draw_weights([2, 3], resamples=5, seed=0))


# --- the command's function: arguments and ids ----------------------------------------------------


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


# --- the command's function: a whole run ----------------------------------------------------------

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
    import hashlib

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
    data.write_text(json.dumps([*ROWS[:3], {"text": "x"}, *ROWS[4:]]))
    with pytest.raises(DataError, match=r"rows\.json, id 3: a row has the keys text; expected instruction"):
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
