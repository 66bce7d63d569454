"""VerilogEval v1's own verdicts and reference solutions, judged again; attacks: test_attacks.py."""

import re

import pytest

from ibft.data.sources import load_rows
from ibft.errors import SetupError
from ibft.evaluation import judge as module
from ibft.evaluation.judge import make_judge
from ibft.evaluation.sandbox import Ended, Sandbox
from ibft.evaluation.suites import SUITES, load_problems
from ibft.evaluation.verilog_judge import Bench, VerilogJudge, checked, icarus_version, tokens

VERILOG = SUITES["verilogeval-v1"]
needs_icarus = pytest.mark.skipif(icarus_version() is None, reason="Icarus Verilog is not installed")
# of these the suite's own test bench or solution does not compile with Icarus 11
NOT_WITH_ICARUS_11 = {"human": {"review2015_fancytimer", "review2015_fsm"}, "machine": set()}


def test_without_icarus_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "icarus_version", lambda: None)
    with pytest.raises(SetupError, match="apt-get install iverilog"):
        make_judge(VERILOG, "official")


@needs_icarus
def test_the_published_verdicts(shared_data):
    """OriGen's greedy completions: 86 of 156 pass."""
    problems = load_problems(VERILOG, shared_data("VerilogEval_Human.jsonl.gz"))
    published = load_rows(shared_data("origen_verilogeval_human_verdicts.jsonl.gz"))
    judge = make_judge(VERILOG, "official", allow_limits=True)
    found = [*judge.all([(problems[row["task_id"]], row["completion"]) for row in published])]
    assert [row["task_id"] for row, v in zip(published, found, strict=True) if v.passed != row["passed"]] == []
    assert (len(found), sum(v.passed for v in found)) == (156, 86)


@needs_icarus
@pytest.mark.skipif("version 11." not in (icarus_version() or ""), reason="other versions pass others")
@pytest.mark.parametrize("kind", ["human", "machine"])
@pytest.mark.parametrize("rule", ["official", "strict"])
def test_the_reference_solutions_pass(shared_data, kind, rule, soaking):
    problems = [*load_problems(VERILOG, shared_data(f"VerilogEval_{kind.title()}.jsonl.gz")).values()]
    if not soaking:
        problems = problems[:: 12 if rule == "strict" else 24]
    judge = make_judge(VERILOG, rule, allow_limits=True)
    found = judge.all([(problem, problem["canonical_solution"]) for problem in problems])
    failed = {problem["task_id"] for problem, v in zip(problems, found, strict=True) if not v.passed}
    assert failed == NOT_WITH_ICARUS_11[kind] & {problem["task_id"] for problem in problems}


@pytest.mark.parametrize(
    ("reference", "sample", "result"),
    [
        ((0, 20), (0, 20), "passed"),
        ((0, 20), (1, 20), "failed: 1 out of 20 samples."),
        ((0, 20), (0, 5), "failed: 5 samples were compared, 20 with the reference solution"),
        ((0, 0), (0, 0), "failed: the reference solution itself fails here: 0 mismatches in 0 samples"),
        ((1, 20), (0, 20), "failed: the reference solution itself fails here: 1 mismatches in 20 samples"),
    ],
)
def test_as_many_samples_as_with_the_reference_must_be_compared(monkeypatch, reference, sample, result):
    counts = iter([reference, sample])
    monkeypatch.setattr(VerilogJudge, "counted", lambda *_: next(counts))
    problem = {"task_id": "t", "prompt": "", "test": "", "canonical_solution": ""}
    assert VerilogJudge(Sandbox("limits"), 1.0).judge(problem, "", "strict").result == result


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("x {} 0 20\n", (0, 20)),
        ("Mismatches: 0 in 20 samples", "the test bench did not come to its verdict"),
        ("{0} 0 20\n{0} 0 20\n", "more than one verdict"),
    ],
)
def test_the_verdict_is_the_one_line_with_the_secret(said, found):
    bench = Bench()
    assert bench.verdict(Ended(0, said.format(bench.secret).encode(), b"")) == found


def test_all_names_of_the_test_bench_are_secret():
    bench = Bench()
    text = bench.renamed("module tb(); stimulus_gen stim1(); reference_module good1(); top_module top_module1();")
    names = ("tb", "stimulus_gen", "stim1", "reference_module", "good1", "top_module1")
    assert all(re.search(rf"\b{name}_{bench.names}\b", text) and not re.search(rf"\b{name}\b", text) for name in names)
    assert "top_module " in text


@pytest.mark.parametrize(
    "word", ["force", "release", "$finish", "$random", "$fopen", "\\$finish ", "`uselib", "\x08", '"', "\\"]
)
def test_words_that_no_design_may_use(word):
    assert checked(f"assign q = 0; {word} a;")[1]
    assert checked("assign q = 0; // force\n")[1] == []


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a // $finish\nb", "name space name"),
        ("a /* $finish\n*/ b", "name space name"),
        ("/* open", "space"),
        (r'"\" $finish" $display', "text space system"),
        (r"\$finish a", "escaped space name"),
        ("`X(a) $``a", "directive other name other space other other directive"),
        ("$finish;", "system other"),
    ],
)
def test_tokens(text, kinds):
    """What spaces and comments hide is no token."""
    found = []
    for kind, _ in tokens(text):
        if found[-1:] != [kind] or kind != "space":
            found.append(kind)
    assert " ".join(found) == kinds
