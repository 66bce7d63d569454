"""The metrics of two groups of vectors and their bootstrap intervals."""

import math

import numpy as np
import pytest

from ibft.analysis.geometry import METRICS, draw_weights, measure

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
