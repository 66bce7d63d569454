"""The benchmarks' own machinery: what is wrong is not timed, what does not fit is a row, ratios are paired by round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import comparison, machine, result_rows
from benchmarks.harness.comparison import Comparison, Found, rotations
from benchmarks.harness.peak_memory import peaks_mib
from benchmarks.harness.providers import Provider, compiled, cut_cross_entropy, liger, unsloth
from benchmarks.harness.session import NotMeasured, Session
from benchmarks.harness.timing import rounds_for, take_turns, times_as_long

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quick_peaks(request, monkeypatch):
    """Measuring memory collects garbage twice a provider: only where a test is about it."""
    if "peaks" not in request.node.name and "honest" not in request.node.name:
        monkeypatch.setattr(comparison, "peaks_mib", lambda prepare, device: (prepare()() and 1.0, 2.0))


def square(t):
    return (t["x"] * t["x"],)


def a_comparison(providers, **changes):
    def inputs(device):
        return {"x": torch.randn(64, 8, device=device).requires_grad_()}

    settings = {"dtype": torch.float32, "inputs": inputs, "seconds": 0.01} | changes
    return Comparison("square", "square", {"N": 64, "D": 8}, providers=providers, **settings)


class Counted:
    """A provider's run that counts its calls."""

    def __init__(self, run):
        self.run, self.calls = run, 0

    def __call__(self, t):
        self.calls += 1
        return self.run(t)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2.0001 * x * dy


WRONG = {
    "a value": lambda t: (t["x"] * t["x"] + 1e-3,),
    "a gradient": lambda t: (WrongGradient.apply(t["x"]),),
    "nan": lambda t: (t["x"] * t["x"] * float("nan"),),
    "a missing output": lambda t: (),
    "a shape": lambda t: (torch.cat([t["x"], t["x"]]).square(),),
}


@pytest.mark.parametrize(("wrong", "mode"), [*((wrong, "full") for wrong in WRONG), ("a gradient", "backward")])
def test_what_is_wrong_is_never_timed(wrong, mode):
    bad = Counted(WRONG[wrong])
    found = a_comparison({"ours": Provider(bad), "eager": Provider(square)}, mode=mode).measure(["ours", "eager"], CPU)
    assert (found["ours"].result, found["ours"].times_ms, found["ours"].peaks) == ("incorrect", [], None)
    assert found["ours"].note
    assert bad.calls == 1  # the gate's
    assert found["eager"].result == "ok"
    assert found["eager"].ours_speedup is None  # nothing to be compared with


def test_low_precision_is_held_to_the_fp32_truth():
    """As good as the reference in that precision, with a small allowance: not as good as fp32, and not anything."""

    def rounded(decimals):
        return Provider(lambda t: ((t["x"] * t["x"] * (1 + decimals)).to(torch.bfloat16),))

    providers = {"eager": Provider(square), "ours": rounded(2e-3), "far": rounded(2e-2)}

    def inputs(_):
        return {"x": torch.randn(64, 8).to(torch.bfloat16)}

    found = a_comparison(providers, dtype=torch.bfloat16, inputs=inputs).measure([*providers], CPU)
    assert {name: one.result for name, one in found.items()} == {"eager": "ok", "ours": "ok", "far": "incorrect"}


def test_the_truth_of_16_bits_is_the_reference_in_fp32():
    """Of a reference that loses most of its bits: what it should have been passes, and its own result is no truth."""

    def lossy(t):
        return ((t["x"] + 256) - 256,)

    def inputs(_):
        return {"x": torch.randn(64, 8).to(torch.bfloat16)}

    providers = {
        "eager": Provider(lossy),
        "exact": Provider(lambda t: (t["x"] * 1,)),
        "far": Provider(lambda t: (-t["x"],)),
    }
    made = a_comparison(providers, dtype=torch.bfloat16, inputs=inputs)
    drawn = inputs(None)
    ((truth,), (allowed,)) = made.truth(drawn, CPU)
    x = drawn["x"].float()
    torch.testing.assert_close(truth, x, rtol=0, atol=256 * 2**-23)
    own_error = float((lossy(drawn)[0].float() - x).norm())
    assert own_error > 0.3 * x.norm()
    assert allowed == pytest.approx(own_error + 5e-3 * float(x.norm()), rel=1e-3)
    found = made.measure([*providers], CPU)
    assert {name: one.result for name, one in found.items()} == {"eager": "ok", "exact": "ok", "far": "incorrect"}


def test_out_of_memory_and_failure_are_rows_and_ours_may_not_fail():
    def no_memory(_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: ...")

    def broken(_):
        raise TypeError("unexpected keyword\nand a second line")

    providers = {
        "eager": Provider(square), "ours": Provider(no_memory), "gone": Provider(broken), "ok": Provider(square),
    }  # fmt: skip
    found = a_comparison(providers).measure([*providers], CPU)
    assert {name: one.result for name, one in found.items()} == {
        "eager": "ok", "ours": "out of memory", "gone": "failed", "ok": "ok",
    }  # fmt: skip
    assert found["gone"].note == "TypeError: unexpected keyword"
    with pytest.raises(TypeError):
        a_comparison(providers | {"ours": Provider(broken)}).measure(["ours"], CPU)
    unchecked = a_comparison(providers | {"eager": Provider(no_memory)}).measure(["ok"], CPU)
    assert (unchecked["ok"].result, unchecked["ok"].times_ms) == ("reference out of memory", [])


def test_running_out_of_memory_between_rounds_is_a_row_too():
    def once(t):
        once.calls += 1
        if once.calls > 6:
            raise torch.OutOfMemoryError
        return square(t)

    once.calls = 0
    found = a_comparison({"ours": Provider(square), "eager": Provider(square), "late": Provider(once)}).measure(
        ["ours", "late"], CPU
    )
    assert (found["late"].result, found["late"].times_ms) == ("out of memory", [])
    assert found["ours"].result == "ok"
    assert len(found["ours"].times_ms) >= 5


def test_an_honest_row():
    """Times, the ratio to ours, peaks, and rates against ceilings that were measured."""
    N, D = 2048, 512

    def inputs(device):
        return {"x": torch.randn(N, D, device=device).requires_grad_()}

    def wasteful(t):
        return (sum(t["x"] * t["x"] for _ in range(6)) / 6,)

    made = a_comparison(
        {"ours": Provider(square), "eager": Provider(wasteful)}, inputs=inputs, bytes=3 * 4 * N * D, flop=1e6
    )
    found = made.measure(["ours", "eager"], CPU)
    row = made.row("eager") | found["eager"].columns() | made.rates(found["eager"], CPU)
    assert (row["op"], row["provider"], row["mode"], row["N"], row["dtype"]) == (
        "square",
        "eager",
        "full",
        64,
        "float32",
    )
    assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    assert int(row["rounds"]) == len(found["eager"].times_ms) >= 5
    assert float(row["ours_speedup"]) > 1.5
    assert float(row["peak_mib"]) > found["ours"].peaks[0] >= 2 * 4 * N * D / 2**20  # the output and a gradient
    seconds = float(row["p50_ms"]) / 1e3
    assert float(row["gb_per_s"]) == pytest.approx(3 * 4 * N * D / seconds / 1e9, rel=0.01)
    floor = 3 * 4 * N * D / float(row["ceiling_gb_per_s"]) / 1e9
    assert float(row["ceiling_share"]) == pytest.approx(floor / seconds, abs=6e-4)
    assert 0 < float(row["ceiling_share"]) < 1
    assert set(row) <= set(result_rows.OP_COLUMNS)


def test_one_run_may_be_several_of_the_things_a_row_is_about():
    def eight(t):
        for _ in range(8):
            x = t["x"].detach() @ t["x"].detach().T
        return (x,)

    def inputs(_):
        return {"x": torch.randn(512, 512)}

    providers = {"ours": Provider(eight), "shared": Provider(eight, calls=8)}
    found = a_comparison(providers, inputs=inputs, reference="ours", seconds=0.2).measure([*providers], CPU)
    assert found["shared"].ours_speedup == pytest.approx(1 / 8, rel=0.4)


def test_what_a_run_writes_over_is_fresh_each_time():
    def in_place(t):
        return (t["x"].mul_(2.0),)

    def inputs(_):
        return {"x": torch.ones(8)}

    providers = {"ours": Provider(in_place), "eager": Provider(lambda t: (t["x"] * 2.0,))}
    made = a_comparison(providers, inputs=inputs, whole=True, consumes=("x",))
    assert made.measure([*providers], CPU)["ours"].result == "ok"


def test_backward_alone_is_timed_without_its_forward(monkeypatch):
    """The forward is done before the clock starts: counted by which of the two ran inside it."""
    inside: list[str] = []
    original = comparison.timed_ms

    def watch(calls, device):
        inside.clear()
        return original(calls, device)

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            inside.append("forward")
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            inside.append("backward")
            return 2 * ctx.saved_tensors[0] * dy

    monkeypatch.setattr(comparison, "timed_ms", watch)
    providers = {"ours": Provider(lambda t: (Marked.apply(t["x"]),)), "eager": Provider(square)}
    for mode, seen in {"forward": {"forward"}, "backward": {"backward"}, "full": {"forward", "backward"}}.items():
        made = a_comparison(providers, mode=mode, reference="eager")
        assert made.measure(["ours"], CPU)["ours"].result == "ok"
        assert set(inside) == seen


def test_inputs_rotate_until_they_exceed_a_cache():
    assert rotations({"x": torch.empty(16 << 18)}, CPU) == 4  # 16 MiB each, 64 in all
    assert rotations({"x": torch.empty(1 << 26)}, CPU) == 1
    assert rotations({"x": torch.empty(4)}, CPU) == 4  # at the most


def test_turns_are_drawn_and_ratios_paired_by_round():
    order: list[str] = []

    def run(name):
        return lambda i: order.append(name) or float(i + 1) * (2 if name == "b" else 1)

    times = take_turns({name: run(name) for name in "abc"}, 40)
    assert times["a"] == [float(i + 1) for i in range(40)]
    assert times_as_long(times["b"], times["a"]) == 2.0
    first = {order[3 * i] for i in range(40)}
    assert first == {"a", "b", "c"}
    assert all(len(set(order[3 * i : 3 * i + 3])) == 3 for i in range(40))
    assert (rounds_for(1000, 2), rounds_for(0.001, 2), rounds_for(100, 2)) == (5, 60, 20)


def test_what_ours_keeps_between_calls_counts_each_time():
    """The buffer of logits, cold or warm."""
    from ibft_kernels import linear_cross_entropy

    hidden, weight, labels = torch.randn(512, 8), torch.randn(4096, 8), torch.randint(4096, (512,))

    def prepare():
        return lambda: linear_cross_entropy(hidden, weight, labels)

    cold = peaks_mib(prepare, CPU)[0]
    prepare()()
    assert peaks_mib(prepare, CPU)[0] == pytest.approx(cold, rel=0.01)
    assert cold > 4  # 8 MiB of logits, or what the budget allows of them


def test_allocated_and_reserved_keep_their_columns():
    columns = Found("ok", times_ms=[1.0], peaks=(3.0, 5.0)).columns()
    assert (columns["peak_mib"], columns["peak_reserved_mib"]) == ("3.0", "5.0")


def test_the_ratio_is_the_median_of_the_rounds_and_of_ours():
    """Not a ratio of medians, and against ours wherever ours stands in the mapping."""
    found = {name: Found("ok") for name in ("first", "ours")}
    made = a_comparison({"first": Provider(square), "ours": Provider(square)}, reference="first")
    times = {"first": [1.0, 10.0, 100.0], "ours": [1.0, 2.0, 400.0]}
    original, comparison.take_turns = comparison.take_turns, lambda *_: times
    try:
        made.time(dict.fromkeys(found, square), [{}], found, CPU, 3)
    finally:
        comparison.take_turns = original
    assert found["first"].ours_speedup == 1.0  # 1, 5 and 0.25; of medians it would be 5
    assert found["ours"].ours_speedup == 1.0


@pytest.mark.parametrize(("flop", "expected"), [(0, 1), (1e9, 2)])
def test_what_memory_bounds_has_one_thread_on_a_cpu_and_its_row_says_so(tmp_path, monkeypatch, flop, expected):
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    seen = set()

    def run(t):
        seen.add(torch.get_num_threads())
        return square(t)

    made = a_comparison({"ours": Provider(run), "eager": Provider(square)}, flop=flop, seconds=0.01)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Session().found(made, CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {expected}
    rows = [row for path in tmp_path.rglob("*.csv") for row in result_rows.read(path)]
    assert {row["threads"] for row in rows} == {str(expected)}


def test_every_set_of_inputs_is_used():
    seen = set()

    def run(t):
        seen.add(t["x"].data_ptr())
        return square(t)

    a_comparison({"ours": Provider(run), "eager": Provider(square)}, seconds=0.05).measure(["ours"], CPU)
    assert len(seen) == 4


def test_peaks_are_of_the_call_alone():
    def prepare():
        held = torch.ones(1 << 20)  # before the call: 4 MiB that do not count
        return lambda: held + torch.ones(1 << 21).sum()

    allocated, resident = peaks_mib(prepare, CPU)
    assert 8 <= allocated < 14
    assert resident < 40


class Work(TorchDispatchMode):
    """What goes in and out of the calls below it: bytes read and written by copies, FLOP of products."""

    def __init__(self):
        super().__init__()
        self.bytes = self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.bytes += args[0].nbytes + args[1].nbytes
        elif func is torch.ops.aten.mm.out:
            (m, k), n = args[0].shape, args[1].shape[1]
            self.flop += 2 * m * k * n
        return out


@pytest.mark.parametrize("kind", ["bytes", "flop"])
def test_ceilings_are_the_work_of_a_call_by_its_time(monkeypatch, kind):
    """Of the calls after the first three, which warm up; the clock is made up."""
    done = []

    def timed_ms(calls, device):
        if not done:
            with Work() as work:
                calls[0]()
            done.append(getattr(work, kind))
        else:
            done.append(None)
        return 9000.0 if len(done) <= 3 else 250.0

    monkeypatch.setattr(machine, "timed_ms", timed_ms)
    monkeypatch.setattr(machine, "_copy_rate", machine._copy_rate.__wrapped__)  # made-up rates are not kept
    rate = machine.copy_rate(CPU) if kind == "bytes" else machine.matmul_rate.__wrapped__(CPU, torch.float32)
    assert len(done) > 10
    assert done[0] > 1e8
    assert rate == pytest.approx(done[0] / 0.25)


FAULTS = """
import ctypes, resource, torch
from benchmarks.harness.machine import back_heap, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB, dropped at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = [faults() for _ in range(2)][1]
keep_freed_memory()
faults()
ctypes.CDLL(None).malloc_trim(0)
back_heap()
print(fresh, *(faults() for _ in range(3)))
"""


def test_a_timed_call_on_a_cpu_waits_for_no_pages():
    """Those that the measurement of peaks gave back are there again, and those of a tensor that is dropped stay."""
    made = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    fresh, *backed = map(int, made.stdout.split())
    assert fresh > 1000
    assert max(backed) < 50


def test_a_provider_says_why_it_cannot_run(monkeypatch):
    for peer in (liger(square), cut_cross_entropy(square), unsloth(square)):
        assert "GPU kernels only" in peer.obstacle(CPU)
    assert Provider(square, package="no-such-thing", module="no_such_thing").obstacle(CPU) == (
        "no-such-thing is not installed"
    )
    assert Provider(square).obstacle(CPU) is None
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in compiled(Provider(square)).obstacle(CPU)
    assert "GPU kernels only" in liger(square).obstacle(CPU)


# --- rows -----------------------------------------------------------------------------------------

COLUMNS = ("op", "N", "result", "p50_ms", "commit")


def test_rows_keep_the_last_two_of_a_key(tmp_path, monkeypatch):
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    for n, ms in [(1, 5), (1, 6), (2, 9), (1, 7)]:
        path = result_rows.append("dev", "bench", COLUMNS, [{"op": "a", "N": n, "result": "ok", "p50_ms": ms}])
    rows = result_rows.read(path)
    assert [(row["N"], row["p50_ms"]) for row in rows] == [("1", "6"), ("2", "9"), ("1", "7")]
    assert [(row["N"], row["p50_ms"]) for row in result_rows.latest(rows)] == [("1", "7"), ("2", "9")]
    with pytest.raises(ValueError, match=r"bench: got columns M, expected op, N, result"):
        result_rows.append("dev", "bench", COLUMNS, [{"op": "a", "M": 1}])
    assert result_rows.read(path) == rows
    result_rows.append("dev", "bench", (*COLUMNS, "time"), [{"op": "b"}])
    assert [row["op"] for row in result_rows.read(path)] == ["b"]  # other columns: other code


def test_percentiles():
    assert result_rows.percentiles([]) == {}
    assert result_rows.percentiles([4.0, 1.0, 2.0, 3.0])["p50_ms"] == "2.5"


def test_the_commit_is_the_last_one_of_the_measured_code(tmp_path, monkeypatch):
    """Not HEAD, and "-dirty" where that code has been changed since: an edit or a new file, but no prose or figure."""
    monkeypatch.setattr(result_rows, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # as within a hook

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def committed(path, text):
        write(path, text)
        git("add", path)
        git("commit", "-q", "-m", path)
        return git("rev-parse", "HEAD")

    git("init", "-q")
    for path in ("ibft/a.py", "kernels/ops/k.py", "benchmarks/steps/s.py", "kernels/launch/l.json"):
        last = committed(path, "1")
        assert last.startswith(result_rows.commit())
        assert len(result_rows.commit()) >= 7
    for path in ("README.md", "benchmarks/report/p.py", "benchmarks/results/r.csv", "tests/t.py"):
        assert not committed(path, "1").startswith(result_rows.commit())
        write(path, "2")
        assert last.startswith(result_rows.commit())
    clean = result_rows.commit()
    for path, before in (("ibft/a.py", "1"), ("kernels/launch/l.json", "1"), ("ibft/new.py", None)):
        write(path, "2")
        assert result_rows.commit() == f"{clean}-dirty", path
        write(path, before) if before else (tmp_path / path).unlink()
        assert result_rows.commit() == clean


def test_without_git_the_commit_is_a_hash_of_the_code(tmp_path, monkeypatch):
    (tmp_path / "ibft").mkdir()
    source = tmp_path / "ibft" / "a.py"
    source.write_text("x = 1")
    monkeypatch.setattr(result_rows, "ROOT", tmp_path)
    monkeypatch.setattr(result_rows, "_git", lambda *_: "")
    before = result_rows.commit()
    assert before.startswith("src-")
    assert result_rows.commit() == before
    source.write_text("x = 2")
    assert result_rows.commit() != before


# --- through pytest -------------------------------------------------------------------------------

WRONG_KERNEL = """
import pytest, torch
from benchmarks.harness.comparison import Comparison, each
from benchmarks.harness.providers import Provider
PROVIDERS = {
    "ours": Provider(lambda t: (t["x"] * 1.01,)), "eager": Provider(lambda t: (t["x"] * 1.0,)),
    "peer": Provider(lambda t: (t["x"] * 2.0,)),
    "liger": Provider(lambda t: (t["x"],), package="liger-kernel", gpu_only=True),
}
def made(case):
    return Comparison("wrong", "scale", {"N": case}, torch.float32, lambda d: {"x": torch.ones(case)}, PROVIDERS)
@pytest.mark.part("ops")
@each({"cpu": [3]}, PROVIDERS)
def test_scale(compare, device, provider, case):
    compare(made(case), provider)
@pytest.mark.part("heads")
@each({"cuda": [4]}, PROVIDERS)
def test_other(compare, device, provider, case):
    compare(made(case), provider)
"""


def run_pytest(folder, *options):
    (folder / "test_wrong.py").write_text(WRONG_KERNEL)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-rs", "-v", *options, "test_wrong.py"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "IBFT_RESULTS": str(folder / "results")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = [row for path in folder.glob("results/*/wrong.csv") for row in result_rows.read(path)]
    return done, {row["provider"]: row for row in rows}


def test_an_injected_wrong_kernel_fails_the_benchmark_and_its_row_says_so(tmp_path):
    done, rows = run_pytest(tmp_path, "--benchmark-json=times.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (rows["ours"]["result"], rows["ours"]["p50_ms"], rows["ours"]["peak_mib"]) == ("incorrect", "", "")
    assert rows["peer"]["result"] == "incorrect"
    assert rows["eager"]["result"] == "ok"
    assert float(rows["eager"]["p50_ms"]) > 0
    assert rows["eager"]["versions"].startswith("torch=")
    assert "liger" not in rows
    outcomes = {line.split("::")[1].split(" ")[0]: line for line in done.stdout.splitlines() if "::" in line}
    assert "FAILED" in outcomes["test_scale[cpu-3-ours]"]
    assert "PASSED" in outcomes["test_scale[cpu-3-eager]"]
    assert "SKIPPED" in outcomes["test_scale[cpu-3-peer]"]
    assert "incorrect: output or gradient 0 is off by" in done.stdout
    assert "liger-kernel has GPU kernels only" in done.stdout
    assert "torch finds no CUDA device" in done.stdout or torch.cuda.is_available()
    # pytest-benchmark has the same times
    (timed,) = json.loads((tmp_path / "times.json").read_text())["benchmarks"]
    assert timed["name"] == "test_scale[cpu-3-eager]"
    assert timed["stats"]["rounds"] == int(rows["eager"]["rounds"]) >= 5
    assert 1e3 * timed["stats"]["median"] == pytest.approx(float(rows["eager"]["p50_ms"]), rel=1e-3)


def test_a_part_is_chosen_by_name(tmp_path):
    done, rows = run_pytest(tmp_path, "--part", "heads")
    assert done.returncode == 0
    assert rows == {}
    assert "4 skipped" in done.stdout
    assert "4 deselected" in done.stdout


def test_what_was_measured_is_left_out_and_the_budget_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)

    def session(commit, **options):
        made = Session(rounds=3, **options)
        made.commit = commit
        return made

    run = Counted(square)
    made = a_comparison({"ours": Provider(run), "eager": Provider(square)})
    first = session("abc")
    assert first.found(made, CPU)["ours"].result == "ok"
    assert first.found(made, CPU) is first.found(made, CPU)  # once a run
    calls = run.calls
    with pytest.raises(NotMeasured, match="measured at abc already"):
        session("abc", resume=True).found(made, CPU)
    assert run.calls == calls
    session("abc").found(made, CPU)  # --resume was not asked for
    session("abd", resume=True).found(made, CPU)  # another commit
    assert run.calls == 3 * calls
    for _ in range(2):
        session("abd-dirty", resume=True).found(made, CPU)  # not known to be the same code
    assert run.calls == 5 * calls
    calls = run.calls
    made_wrong = a_comparison({"ours": Provider(lambda t: (t["x"] * 0,)), "eager": Provider(square)}, mode="forward")
    for _ in range(2):  # a fault is told of each time
        assert session("abc", resume=True).found(made_wrong, CPU)["ours"].result == "incorrect"
    other = session("abc", resume=True)
    monkeypatch.setattr("benchmarks.harness.machine._version", lambda package: "other")
    other.found(made, CPU)  # of another torch nothing is known
    assert run.calls > calls
    calls = run.calls
    late = session("abe", budget=0.0)
    for _ in range(2):
        with pytest.raises(NotMeasured, match="run the same again to go on"):
            late.found(made, CPU)
    assert len(late.left) == 1
    assert run.calls == calls


def test_ours_that_raises_fails_once_and_leaves_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)

    def broken(_):
        raise TypeError("unexpected keyword")

    run = Counted(broken)
    made = a_comparison({"ours": Provider(run), "eager": Provider(square)})
    session = Session(rounds=3)
    for _ in range(2):
        with pytest.raises(TypeError):
            session.found(made, CPU)
    assert run.calls == 1
    ((row,),) = [result_rows.read(path) for path in tmp_path.glob("*/*.csv")]
    assert (row["provider"], row["result"], row["p50_ms"]) == ("ours", "failed", "")


def test_a_trial_leaves_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    made = a_comparison({"ours": Provider(square), "eager": Provider(square)})
    assert Session(rounds=2, keep=False).found(made, CPU)["ours"].result == "ok"
    assert not [*tmp_path.iterdir()]
    Session(keep=False).found(made, CPU)
    assert len([*tmp_path.glob("*/*.csv")]) == 1
