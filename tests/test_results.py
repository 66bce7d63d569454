"""What the committed rows are turned into: README.md's tables and the figures are fresh, a stale one is found, and
targets are judged by what the rows say. The committed rows themselves repeat within 15 %.

Made-up rows are written by the benchmarks' own writer, into a folder of the test.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness import result_rows
from benchmarks.harness.result_rows import OP_COLUMNS, STEP_COLUMNS
from benchmarks.report import plots, tables, targets

ROOT = Path(__file__).parents[1]
CPU, GPU = "cpu-x86_64", "NVIDIA-Made-Up"
WHERE = {"device": "made-up device", "threads": "2", "versions": "torch=0", "commit": "abc1234", "time": "then"}
LADDER_COLUMNS = (
    "op", "provider", "model", "alpha", "dtype", "card_gib",
    "result", "longest", "peak_mib", "peak_reserved_mib", "tokens_per_s", *result_rows.WHERE,
)  # fmt: skip
PROFILE_COLUMNS = ("op", "model", "alpha", "category", "result", "ms_a_step", "share", "steps", *result_rows.WHERE)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def rows_of_op(op, ms, *, peaks=None, byte=0.0, flop=0.0, mode="full", **sizes):
    """A row a provider; ms: of each, or the result of one that has no time."""
    copy, product = 2e10, 1e11  # the ceilings
    for provider, time in ms.items():
        row = {"op": op, "provider": provider, "mode": mode, "dtype": "float32", **sizes, **WHERE}
        if isinstance(time, str):
            yield row | {"result": time}
            continue
        seconds = time / 1e3
        row |= {"result": "ok", "p50_ms": time, "rounds": 7, "peak_mib": (peaks or {}).get(provider, 10)}
        row |= {"ceiling_gb_per_s": copy / 1e9, "ceiling_share": f"{max(byte / copy, flop / product) / seconds:.3f}"}
        if not isinstance(ms["ours"], str):
            row["ours_speedup"] = f"{time / ms['ours']:.3f}"
        if byte:
            row["gb_per_s"] = byte / seconds / 1e9
        if flop:
            row |= {"tflop_per_s": flop / seconds / 1e12, "ceiling_tflop_per_s": product / 1e12}
        yield row


def row_of_step(provider, alpha=0.01, *, ms=500.0, result="ok", **changes):
    row = {
        "op": "step", "provider": provider, "model": "bundled", "layout": "packed", "alpha": alpha, "N": 2000, "T": 512,
        "B": 1, "L": 4, "V": 507, "labelled": 0.5, "dtype": "float32", "result": result, **WHERE,
    }  # fmt: skip
    if result == "ok":
        row |= {"p50_ms": ms, "rounds": 14, "peak_mib": ms / 2, "tokens_per_s": 1e6 / ms}
    return row | changes


def four_sides(**changes):
    """Ours and the baseline, with and without the bottleneck, in turns."""
    size = float(changes.get("T", 512)) * float(changes.get("L", 4)) / 4
    for alpha in (0.01, 0):
        for provider, times in (("ours", 1 if alpha else 0.97), ("hf", 1.6 if alpha else 1.5)):
            yield row_of_step(provider, alpha, ms=times * size, ours_speedup=times, **changes)


MAIN = {
    CPU: {"N": 2048, "D": 1024, "V": 32768, "Z": 256, "detail": "labelled 0.5"},
    GPU: {"N": 4096, "D": 4096, "V": 102400, "Z": 256, "detail": "labelled 0.5"},
}
RELEASED = {"ours": 850.0, "released": 3400.0, "eager": 1100.0}


def objective(ms, peaks=None, folder=CPU, **sizes):
    return rows_of_op("ib_objective", ms, peaks=peaks, byte=3e8, flop=1e11, **MAIN[folder] | sizes)


def write(bench, rows, *, folder=CPU, columns=OP_COLUMNS):
    return result_rows.append(folder, bench, columns, rows)


def write_all(folder=CPU):
    """Something for every table and figure."""
    write_ops(folder)
    write_objective(folder)
    write_steps(folder)


def write_ops(folder):
    philox, given = {"ours": 40.0, "eager": 95.0, "torch.compile": 35.0}, {"ours": 9.0, "eager": 30.0}
    for noise, ms in (("philox", philox), ("given", given)):
        for N, scale in ((8192, 1), (64, 1 / 128)):
            times = {provider: scale * time for provider, time in ms.items()}
            rows = rows_of_op("ib_kl_loss", times, byte=8e7 * scale, N=N, Z=256, detail=f"noise {noise}")
            write("ib_kl", rows, folder=folder)
    for dropout in ("", ", dropout 0.05"):
        detail = f"inner 2048, R 32{dropout}"
        rows = rows_of_op("lora_mlp", {"ours": 240.0, "eager": 265.0}, flop=2e10, N=2048, detail=detail)
        write("lora", rows, folder=folder)
    ms = {"ours": 645.0, "direct, chunked": 1880.0, "direct": 2000.0, "ours, 8 micro-batches": 455.0}
    rows = rows_of_op("folded_cross_entropy", ms, byte=3e8, flop=5e10, N=2048, D=2048, V=32768, Z=256)
    write("latent_head", rows, folder=folder)
    ms = {"ours": 15.0, "product": 7.0, "eager": 16.0}
    for mode in ("forward", "full"):
        rows = rows_of_op("ib_bottleneck", ms, byte=2e7, flop=1e9, N=2048, D=1024, Z=256, mode=mode)
        write("ib_bottleneck", rows, folder=folder)


def write_objective(folder):
    """The main case, three numbers of rows, three vocabularies."""
    write("objective", objective(RELEASED, {"ours": 190, "released": 1050, "eager": 400}, folder), folder=folder)
    for N in (256, 512, 1024):
        ms = {"ours": N / 5.0, "released": N * 0.9 if N < 1024 else "out of memory", "eager": N / 4.0}
        peaks = {"ours": 50 + N / 20, "released": N, "eager": N / 2}
        write("objective", objective(ms, peaks, N=N, D=512, V=16384), folder=folder)
    for V in (32768, 65536, 98304):
        ms, peaks = {"ours": V / 300, "released": V / 90}, {"ours": 70, "released": V / 200}
        write("objective", objective(ms, peaks, N=256, D=256, V=V), folder=folder)


def write_steps(folder):
    padded = [
        row_of_step("hf", layout="padded to longest", T=96, ms=800, ours_speedup=1.53),
        row_of_step("released", layout="padded to 2048", T=2048, ms=5800, ours_speedup=92.9),
    ]
    write("step", [*four_sides(), *padded], folder=folder, columns=STEP_COLUMNS)
    write("real_data", four_sides(model="real"), folder=folder, columns=STEP_COLUMNS)
    sweeps = {"T": (128, 256, 512), "B": (1, 2, 4), "L": (2, 4, 8), "V": (507, 8192, 32768), "labelled": (0.1, 0.5, 1)}
    for column, values in sweeps.items():
        for value in values:
            tokens = 512 * value if column == "B" else value if column == "T" else 512
            rows = four_sides(model="random", **{column: value, "N": tokens})
            write("step_sweep", rows, folder=folder, columns=STEP_COLUMNS)
    shares = {"products": 0.5, "attention": 0.2, "dropout/noise": 0.18, "idle": 0.12}
    found = {"result": "ok", "steps": 5, **WHERE}
    rows = (
        {"op": "profile", "model": "bundled", "alpha": 0.01, "category": name, "ms_a_step": 500 * share, "share": share}
        for name, share in shares.items()
    )
    write("profile", (row | found for row in rows), folder=folder, columns=PROFILE_COLUMNS)
    rows = []
    for model, need in (("7b", 6), ("34b", 20)):
        for provider, alpha, scale in (("ours", 0.01, 300), ("ours", 0, 310), ("hf", 0.01, 120)):
            row = {"op": "ladder", "provider": provider, "model": model, "alpha": alpha, "dtype": "bfloat16", **WHERE}
            for card in (8, 24, 48):
                longest = max(0, scale * (card - need))
                result = "ok" if longest else "out of memory"
                rows.append(row | {"card_gib": card, "result": result, "longest": longest})
    write("ladder", rows, folder=folder, columns=LADDER_COLUMNS)


# --- the committed rows ---------------------------------------------------------------------------


def test_the_tables_of_the_readme_are_fresh():
    assert tables.check() == [], "run: python -m benchmarks.report.tables"


def test_the_figures_are_fresh():
    assert plots.check() == [], "run: python -m benchmarks.report.plots"


def test_the_committed_ratios_repeat_within_15_percent():
    """Two runs of the same code on the same machine."""
    found = [pair for folder in targets.folders("cpu") for pair in tables.pairs(folder)]
    assert {target.bench for target in targets.TARGETS if target.on == "cpu"} <= {pair.bench for pair in found}
    once = [str(pair) for pair in found if pair.apart is None]
    assert not once, f"{len(once)} of {len(found)} have no second run by the same code: " + "; ".join(once)
    apart = [f"{pair} ({pair.apart:.0%})" for pair in found if pair.apart > 0.15]
    assert not apart, f"{len(apart)} of {len(found)} do not repeat: " + "; ".join(apart)


# --- no torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["plots", "tables", "targets"])
def test_no_torch_is_imported(module):
    heavy = "{'torch', 'matplotlib', 'numpy'}"
    code = f"import sys, benchmarks.report.{module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "[]\n"


# --- tables ---------------------------------------------------------------------------------------


@pytest.fixture
def readme(results, tmp_path):
    """Of every table a part, filled from made-up rows of two runs."""
    write_all()
    write_all()
    path = tmp_path / "README.md"
    parts = [f"Words.\n\n<!-- table: {name} -->\n<!-- /table -->\n" for name in tables.NAMED]
    path.write_text(tables.rewritten("\n".join(parts)), encoding="utf-8")
    return path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text, old
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_rewriting_is_done_once_and_leaves_the_words_alone(readme):
    text = readme.read_text(encoding="utf-8")
    assert tables.check(readme) == []
    assert tables.rewritten(text) == text
    assert text.count("Words.") == text.count("<!-- table: ") == text.count("<!-- /table -->") == len(tables.NAMED)


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ("| 3,400 | 4.00x |", "| 3,400 | 4.10x |", "objective"),
        ("products 50 %", "products 60 %", "profile"),
        ("| at least 3.5x | 4.00x, met |", "| at least 3.5x | 4.01x, met |", "targets"),
        ("| padded to 2048 | with | 172 | 92.9x |", "| padded to 2048 | with | 172 | 93.9x |", "step"),
        ("**torch.compile 0.875x**", "torch.compile 1.875x", "ops"),
        ("were measured twice", "were measured thrice", "repeat"),
        ("(real, packed)", "(made up)", "real-data"),
    ],
)
def test_an_edited_number_is_found(readme, old, new, stale):
    edit(readme, old, new)
    assert tables.check(readme) == [f"stale: {stale}"]


def test_a_changed_row_is_found(readme):
    write("objective", objective(RELEASED | {"released": 3500.0}))
    # a new ratio, and another agreement with the run before
    assert tables.check(readme) == [f"stale: {name}" for name in ("objective", "repeat", "targets")]


def test_a_missing_part_and_an_open_one_are_found(readme):
    edit(readme, "<!-- table: profile -->", "")
    wrong = tables.check(readme)
    assert wrong[0] == "no part of README.md: profile"
    assert "without the other" in wrong[1]


def test_a_table_may_be_on_any_of_the_pages_with_links_from_its_folder(readme):
    page = readme.parent / "docs" / "benchmarks.md"
    page.parent.mkdir()
    text = readme.read_text(encoding="utf-8")
    (part,) = (found[0] for found in tables.MARKED.finditer(text) if found["name"] == "objective")
    readme.write_text(text.replace(part, ""), encoding="utf-8")
    assert tables.check(readme) == ["no part of README.md: objective"]
    page.write_text(tables.rewritten(part, page), encoding="utf-8")
    assert tables.check(readme, page) == []
    assert "](../benchmarks/results/" in page.read_text(encoding="utf-8")
    page.write_text(part, encoding="utf-8")
    assert tables.check(readme, page) == ["stale: objective"]


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="got table 'speed', expected one of step, "):
        tables.rewritten("<!-- table: speed -->\n<!-- /table -->\n")


def test_check_says_what_is_stale_and_exits_with_1(readme, results):
    def run(*options):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.report.tables", readme, *options], cwd=ROOT,
            capture_output=True, text=True, check=False, env=os.environ | {"IBFT_RESULTS": str(results)},
        )  # fmt: skip

    assert run("--check").returncode == 0
    edit(readme, "4.00x", "4.10x")
    done = run("--check")
    assert (done.returncode, done.stdout) == (1, "stale: objective\n")
    assert "4.10x" in readme.read_text(encoding="utf-8")
    assert run().returncode == 0
    assert "4.10x" not in readme.read_text(encoding="utf-8")


def test_what_the_tables_say(readme):
    text = readme.read_text(encoding="utf-8")
    for line in (
        "| the released way | 3,400 | 4.00x | 1,050 | 5.53x |",
        "| `ib_kl_loss`, noise philox, N 8192, Z 256 | 40 | **torch.compile 0.875x** | 10 % |",
        "A peer is faster than ours in 2 of the 16 cases measured: `ib_kl_loss`, noise philox, N 8192, Z 256 "
        "(torch.compile 0.875x); `ib_kl_loss`, noise philox, N 64, Z 256 (torch.compile 0.875x).",
        "| `ib_bottleneck`, N 2048, D 1024, Z 256 | 15 | eager 1.07x | 67 %; product 0.467x |",
        "The bottleneck adds 3.1 % to a step of ours (bundled, packed).",
        "products 50 %, attention 20 %, dropout/noise 18 %, idle 12 %.",
        "made-up device, 2 threads, at abc1234 ([rows](benchmarks/results/cpu-x86_64/objective.csv))",
    ):
        assert line in text, line
    assert text.count("\nunmeasured: no rows of a GPU\n") == len(tables.TABLES)
    # of the sizes of an op the longest alone, and no row of a sweep
    assert "| `ib_kl_loss`, noise given, N 64" not in text
    assert text.count("| `ib_objective`") == 1


def test_a_gpu_gets_tables_of_its_own(results):
    write_all(GPU)
    both = tables.render("objective", None)
    assert both.startswith("unmeasured: no rows of a CPU\n\n")
    assert tables.NO_GPU not in both
    assert tables.render("step", "gpu").startswith("made-up device")
    assert f"| target on a GPU | asked | {GPU} |" in tables.render("targets", "gpu")


def test_a_part_may_be_of_one_kind_of_device(results):
    write_all()
    text = "<!-- table: step gpu -->\n{}<!-- /table -->\n"
    assert tables.rewritten(text.format("old\n")) == text.format(tables.NO_GPU + "\n")
    assert tables.NO_GPU not in tables.render("step", "cpu")


def test_who_ran_out_of_memory_is_in_the_table(results):
    write("objective", objective({"ours": 850.0, "released": "out of memory"}, {"ours": 190}))
    said = tables.render("objective", "cpu")
    assert "| the released way | out of memory | out of memory | out of memory |  |" in said


def test_rows_of_older_columns_count_as_none(results):
    path = results / CPU / "objective.csv"
    path.parent.mkdir(parents=True)
    path.write_text("op,provider,p50_ms\nib_objective,ours,1\n")
    assert tables.render("objective", "cpu") == "unmeasured: no rows of a CPU\n"


# --- two runs -------------------------------------------------------------------------------------


def two_runs(first, second, **where):
    for ms, changes in ((first, {}), (second, where)):
        write("objective", (row | changes for row in objective({"ours": 100.0, "released": ms})))
    (pair,) = tables.pairs(CPU)
    return pair


@pytest.mark.parametrize(("second", "apart"), [(360.0, 0.2), (250.0, 0.2), (300.0, 0.0)])
def test_two_runs_are_apart_by_what_the_larger_exceeds_the_smaller(results, second, apart):
    assert two_runs(300.0, second).apart == pytest.approx(apart)
    assert f"the worst {tables.percent(apart)} (`ib_objective`, labelled 0.5" in tables.render("repeat", "cpu")


@pytest.mark.parametrize("column", ["commit", "device", "threads", "versions"])
def test_other_code_or_another_machine_is_no_second_run(results, column):
    pair = two_runs(300.0, 600.0, **{column: "another"})
    assert (pair.apart, pair.ratio) == (None, 6.0)
    assert "none of 1 was measured twice" in tables.render("repeat", "cpu")


# --- targets --------------------------------------------------------------------------------------


def write_near_the_targets(by):
    """Rows by which every target is reached `by` times; not quite where that is below 1."""
    for folder, times, share in ((CPU, 3.5, 1 / 3), (GPU, 4, 1 / 8)):
        ms, peaks = {"ours": 100.0, "released": 100 * times * by}, {"ours": 100, "released": 100 / share * by}
        write("objective", objective(ms, peaks, folder), folder=folder)
    ms = {"ours": 100.0, "direct, chunked": 250 * by}
    write("latent_head", rows_of_op("folded_cross_entropy", ms, N=2048, D=2048, V=32768, Z=256))
    ms, peaks = {"ours": 100.0, "direct": 400 * by, "ours, 8 micro-batches": 80.0}, {"ours": 10, "direct": 100 * by}
    rows = rows_of_op("folded_cross_entropy", ms, peaks=peaks, N=4096, D=4096, V=102400, Z=256)
    write("latent_head", rows, folder=GPU)
    for noise, share in (("given", 0.9), ("philox", 0.6)):
        ms, byte = {"ours": 10.0, "torch.compile": 13 * by}, share * by * 10e-3 * 2e10
        write("ib_kl", rows_of_op("ib_kl_loss", ms, byte=byte, N=262144, detail=f"noise {noise}"), folder=GPU)
    rows = rows_of_op("ib_bottleneck", {"ours": 110.0, "product": 100 * by}, N=8192, D=4096, Z=256, mode="forward")
    write("ib_bottleneck", rows, folder=GPU)
    steps = [
        row_of_step("ours", ours_speedup=1),
        row_of_step("hf", ours_speedup=1.2 * by),
        row_of_step("ours", 0, ours_speedup=by / 1.1),
    ]
    write("step", steps, columns=STEP_COLUMNS)

    def sample(length, provider, alpha=0.1, **changes):
        sizes = {"model": "deepseek-coder-7b", "layout": "one sample", "T": length, "N": length}
        return row_of_step(provider, alpha, **sizes | changes)

    turns = [
        sample(4096, "ours", ours_speedup=1),
        sample(4096, "hf", ours_speedup=1.3 * by),
        sample(2048, "ours", ours_speedup=1),
        sample(2048, "ours", 0, ours_speedup=by / 1.02),
    ]
    write("step_turns", turns, folder=GPU, columns=STEP_COLUMNS)
    steps = [sample(4096, "ours", ms=100, ceiling_share=0.6 * by), sample(4096, "unsloth", 0, ms=100 * by)]
    for model, card in (("deepseek-coder-7b", 8), ("34b", 24), ("70b", 48)):
        steps.append(sample(2048, "ours", model=model, card_gib=card, result="ok" if by > 1 else "out of memory"))
    write("step", steps, folder=GPU, columns=STEP_COLUMNS)


@pytest.mark.parametrize(("by", "verdict"), [(1.01, "met"), (0.99, "missed")])
def test_every_target_is_met_a_percent_above_and_missed_a_percent_below(results, by, verdict):
    write_near_the_targets(by)
    found = [*targets.evaluate(CPU), *targets.evaluate(GPU)]
    assert [target for target, *_ in found] == [*targets.TARGETS]
    assert {target.name: judged for target, _, judged in found if judged != verdict} == {}


def test_without_rows_every_target_is_unmeasured(results):
    for folder in (CPU, GPU):
        assert {(value, verdict) for _, value, verdict in targets.evaluate(folder)} == {(None, "unmeasured")}


def judged(name):
    return next((value, verdict) for target, value, verdict in targets.evaluate(CPU) if target.name == name)


@pytest.mark.parametrize(
    ("ms", "verdict"),
    [
        ({"ours": "incorrect", "released": 400.0}, "missed"),
        ({"ours": "out of memory"}, "missed"),
        ({"ours": "reference out of memory"}, "unmeasured"),
        ({"ours": 100.0, "released": "out of memory"}, "unmeasured"),
        ({"ours": 100.0, "eager": 400.0}, "unmeasured"),
    ],
)
def test_a_fault_of_ours_misses_and_one_of_a_peer_tells_nothing(results, ms, verdict):
    write("objective", objective(ms))
    assert judged("objective, against the released way") == (None, verdict)


def test_the_worst_of_several_cases_counts_and_the_last_row_of_each(results):
    name = "what the bottleneck adds to a step"
    for tokens, times in ((1000, 0.5), (1000, 0.95), (2000, 0.8)):
        steps = [row_of_step("ours", N=tokens), row_of_step("ours", 0, ours_speedup=times, N=tokens)]
        write("step", steps, columns=STEP_COLUMNS)
    assert judged(name) == (pytest.approx(0.25), "missed")
    write("step", [row_of_step("ours", 0, ours_speedup=0.95, N=2000)], columns=STEP_COLUMNS)
    assert judged(name) == (pytest.approx(1 / 0.95 - 1), "met")


def test_the_worst_of_several_cases_counts_where_more_is_better(results):
    for tokens, times in ((1000, 1.5), (2000, 1.1), (3000, 1.9)):
        steps = [row_of_step("ours", N=tokens), row_of_step("hf", ours_speedup=times, N=tokens)]
        write("step", steps, columns=STEP_COLUMNS)
    name = "step, against transformers + PEFT + bitsandbytes, the same packed rows"
    assert judged(name) == (pytest.approx(1.1), "missed")


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plot", plots.PLOTS, ids=lambda plot: plot.name)
def test_a_figure_is_drawn_from_rows_the_same_each_time(results, tmp_path, plot):
    write_all()
    rows = plot.rows(CPU)
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        plots.draw(plot, rows, path)
    svg = paths[0].read_text(encoding="utf-8")
    assert paths[1].read_text(encoding="utf-8") == svg
    assert f"<dc:description>sha256 {plots.digest(rows)}</dc:description>" in svg
    assert "<dc:date>" not in svg
    words = {
        "roofline": ["FLOP per byte", "TFLOP/s", "copy: 20 GB/s", "ib_objective", "folded_cross_entropy"],
        "ceiling_share": ["lora_mlp, dropout 0.05", "ours 44%", "direct, chunked 27%"],
        "objective_rows": ["released way", "out of memory", "1,024", "peak MiB", "D 512, Z 256, V 16384, labelled 0.5"],
        "objective_vocabulary": ["98,304", "N 256, D 256"],
        "step_breakdown": ["dropout/noise", "20.0%  100 ms"],
        "ladder": ["24 GiB", "5,400", "none", "34b"],
    }.get(plot.name, ["transformers + PEFT (no bottleneck)", "peak MiB"])
    for word in words:
        assert re.search(rf"<text [^>]*>[^<]*{re.escape(word)}", svg), word  # as text, not as shapes


@pytest.mark.parametrize(
    "plot", [plot for plot in plots.PLOTS if isinstance(plot.draw, partial)], ids=lambda plot: plot.name
)
def test_a_sweep_shows_time_on_one_axis_and_memory_on_the_other(results, plot):
    write_all()
    rows, column = plot.rows(CPU), plot.draw.keywords["column"]
    for axes, name, found in zip(plot.draw(rows).axes, ("ms", "peak MiB"), ("p50_ms", "peak_mib"), strict=True):
        assert axes.get_ylabel() == name
        lines = [line for line in axes.lines if line.get_transform() == axes.transData]
        shown = sorted((x, y) for line in lines for x, y in line.get_xydata())
        expected = sorted((float(row[column]), float(row[found])) for row in rows if row[found])
        assert len(expected) >= 3
        assert shown == expected


def stand_in(folder=CPU):
    """Files with the digests of the figures: all that `check` reads of them."""
    for plot in plots.PLOTS:
        path = plots.path_of(folder, plot.name, None)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<dc:description>sha256 {plots.digest(plot.rows(folder))}</dc:description>")


def test_a_stale_figure_is_found(results):
    write_all()
    assert len(plots.check()) == len(plots.PLOTS)
    stand_in()
    assert plots.check() == []
    rows = [{**row, "share": 0.6} for row in targets.rows_of(CPU, "profile") if row["category"] == "products"]
    write("profile", rows, columns=PROFILE_COLUMNS)
    folder = results / CPU / "plots"
    assert plots.check() == [f"stale: {folder / 'step_breakdown.svg'}"]
    stand_in()
    (results / CPU / "ladder.csv").unlink()
    (folder / "roofline.svg").unlink()
    (folder / "pie.svg").touch()
    assert plots.check() == [
        f"not drawn: {folder / 'roofline.svg'}",
        f"no rows for it: {folder / 'ladder.svg'}",
        f"drawn by no plot of plots.py: {folder / 'pie.svg'}",
    ]


def test_other_drawing_code_makes_every_figure_stale(results, tmp_path, monkeypatch):
    write_all()
    stand_in()
    changed = tmp_path / "plots.py"
    changed.write_bytes(Path(plots.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(plots, "__file__", str(changed))
    assert len(plots.check()) == len(plots.PLOTS)


def test_without_rows_nothing_is_drawn_and_a_line_says_so(results, tmp_path, monkeypatch, capsys):
    write("objective", objective({"ours": 1.0}, N=7))
    monkeypatch.setattr(plots, "PLOTS", [plot for plot in plots.PLOTS if plot.name == "ladder"])
    monkeypatch.setattr(sys, "argv", ["plots.py", "--out", str(tmp_path / "out")])
    plots.main()
    path = tmp_path / "out" / CPU / "ladder.svg"
    assert capsys.readouterr().out == f"too few rows: {path} is not drawn\n"
    assert not path.exists()
    monkeypatch.setattr(sys, "argv", ["plots.py", "--check", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        plots.main()
    assert stopped.value.code == 0
