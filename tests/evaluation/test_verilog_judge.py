"""VerilogEval v1's own verdicts and reference solutions, judged again; attacks: test_attacks.py."""

import pytest

from ibft.data.sources import load_rows
from ibft.errors import SetupError
from ibft.evaluation import judge as module
from ibft.evaluation.judge import make_judge
from ibft.evaluation.suites import SUITES, load_problems
from ibft.evaluation.verilog_judge import icarus_version, tokens

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
