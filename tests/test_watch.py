"""Each known failure raises its own warning, and a healthy run none."""

import pytest
from typer.testing import CliRunner

from ibft.cli import app
from ibft.load_config import load_config
from ibft.watch import Watch, solves_fewer

HEALTHY = [(1, 0.12, 590, 1.0), (2, 0.13, 300, 1.0), (3, 0.11, 80, 0.9), (4, 0.1, 20, 0.8), (5, 0.1, 15, 0.8)]


def warnings(rows, *overrides, total_steps=6):
    watch = Watch(load_config(None, ["ib.alpha=0.1", *overrides])[0], total_steps)
    found = []
    for step, ce, kl, used in rows:
        assert watch.see({"step": step, "eval_ce": 9.0}) == []
        loss = ce + watch.config.ib.alpha * kl
        found += watch.see({"step": step, "loss": loss, "ce": ce, "kl": kl, "active_dims": used})
    return found


def test_a_healthy_run_and_one_without_a_bottleneck():
    assert warnings(HEALTHY) == []
    assert Watch(load_config(None, ["ib.alpha=0"])[0], 3).see({"step": 1, "loss": 5.0, "ce": 5.0}) == []


def test_over_compression_by_the_loss():
    rows = [(1, 0.12, 590, 1.0), *((step, 1.5 + step, 20, 1.0) for step in range(2, 7))]
    assert warnings(rows) == [
        "over-compression: CE rose from 0.12 to 3.5 nats while KL fell; lower ib.alpha or raise ib.beta"
    ]
    assert warnings([(step, ce, 600, used) for step, ce, _, used in rows[:4]]) == []  # KL has not fallen
    assert warnings([(1, 4.0, 590, 1.0), *((step, 4.4, 20, 1.0) for step in range(2, 5))]) == []  # not twice as high


def test_over_compression_by_the_dimensions():
    rows = [(step, 0.1, 4, 0.04) for step in range(1, 5)]
    assert warnings(rows) == ["over-compression: 4% of the latent dimensions in use; lower ib.alpha or raise ib.beta"]
    assert warnings([*rows[:3], (4, 0.1, 4, 0.06)]) == []


@pytest.mark.parametrize(
    ("before", "after", "tasks", "warns"),
    [(0.5, 0.3, 128, True), (0.5, 0.4, 128, False), (0.5, 0.3, 16, False), (0.5, 0.7, 128, False), (1, 0.9, 64, True)],
)
def test_over_compression_by_what_is_solved(before, after, tasks, warns):
    """Two standard errors of the difference; at 128 tasks and a half about 12 points."""
    text = solves_fewer({"value": before, "tasks": tasks}, {"value": after, "tasks": tasks})
    assert text == (
        f"over-compression: Pass@1 fell from {before:.1%} to {after:.1%}; lower ib.alpha or raise ib.beta"
        if warns
        else None
    )


def test_what_was_not_solved_or_not_judged_says_nothing():
    judged = {"value": 0.5, "tasks": 128}
    assert solves_fewer(None, judged) is None
    assert solves_fewer({"not_judged": "no sandbox"}, judged) is None
    assert solves_fewer(judged, {"not_judged": "no sandbox"}) is None


def test_hardly_any_compression():
    rows = [(step, 0.1, 100, 1.0) for step in range(1, 7)]
    said = "hardly any compression: alpha KL is 0.10% of CE; raise ib.alpha or lower ib.beta"
    assert warnings(rows, "ib.alpha=1e-6") == [said]
    assert warnings(rows, "ib.alpha=1e-6", "ib.alpha_warmup_ratio=0.9") == []
    assert warnings(rows, "ib.alpha=1e-5") == []
    assert warnings([(step, 0.1, 0.5, 1.0) for step in range(1, 7)], "ib.alpha=1e-6") == []


def test_an_unstable_encoder_is_said_once_and_alone():
    rows = [(1, 0.1, 590, 1.0), (2, 0.1, 5900, 1.0), (3, 0.2, 9e5, 1.0), *((n, 3.0, 9e4 / n, 1.0) for n in range(4, 9))]
    found = warnings(rows, "ib.learning_rate=2", "train.clip_mode=joint", total_steps=90)
    advice = "lower ib.learning_rate (now 2) or set train.clip_mode=per_group"
    assert found == [f"unstable encoder: KL rose from 590 to 9e+05 nats; {advice}"]


def test_a_loss_spike_is_one_against_the_usual():
    watch = Watch(load_config(None, ["ib.alpha=0"])[0], 20)
    losses = [
        9.0,
        1.0,
        1.1,
        1.0,
        0.9,
        1.0,
        2.9,
        1.0,
        3.1,
        9.0,
    ]  # 9 at the start has nothing before it; 2.9 is below 3 x
    found = [watch.see({"step": step, "loss": loss, "ce": loss}) for step, loss in enumerate(losses, 1)]
    advice = "look at the rows of this step, or lower train.learning_rate"
    assert found == [[]] * 8 + [[f"loss spike: 3.1 after 1; {advice}"], []]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["ib.alpha=100"], "over-compression"),
        (["ib.alpha=1e-6"], "hardly any compression"),
        (["ib.learning_rate=10"], "unstable encoder"),
    ],
)
def test_real_runs(tmp_path, overrides, said):
    """The bundled base; the preset's ib.learning_rate is 0.01."""
    arguments = ["train", "train.max_steps=24", "train.logging_steps=2", "eval.max_tasks=1", "eval.max_new_tokens=4",
                 "train.per_device_train_batch_size=2"]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, *overrides, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    names = ("over-compression", "hardly any compression", "unstable encoder")
    assert [name for name in names if f"{name}:" in text] == ([said] if said else [])
