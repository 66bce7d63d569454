"""VerilogEval v2: its files, its prompts, and its rule, on a problem made in its form."""

import shutil

import pytest

from ibft.errors import DataError
from ibft.evaluation.judge import make_judge, why_not_judged
from ibft.evaluation.prompts import extract, make_prompt, stops_of
from ibft.evaluation.suites import SUITES, load_problems
from ibft.evaluation.verilog_judge import icarus_version

BENCH = """`timescale 1 ps/1 ps
module stimulus_gen (input clk, output logic [3:0] a);
  initial begin
    repeat (40) @(posedge clk, negedge clk) a <= $urandom;
    $finish;
  end
endmodule

module tb();
  typedef struct packed { int errors; int clocks; } stats;
  stats stats1;
  reg clk = 0;
  initial forever #5 clk = ~clk;
  logic [3:0] a;
  logic [3:0] q_ref, q_dut;
  wire tb_match;
  stimulus_gen stim1 (.clk, .*);
  RefModule good1 (.a, .q(q_ref));
  TopModule top_module1 (.a, .q(q_dut));
  assign tb_match = (q_ref === (q_ref ^ q_dut ^ q_ref));
  always @(posedge clk, negedge clk) begin
    stats1.clocks++;
    if (!tb_match) stats1.errors++;
  end
  final $display("Mismatches: %1d in %1d samples", stats1.errors, stats1.clocks);
  initial begin
    #1000000
    $display("TIMEOUT");
    $finish();
  end
endmodule
"""
HEADER = "module TopModule (\n  input [3:0] a,\n  output [3:0] q\n);\n"
BODY = "  assign q = a + 1;\nendmodule\n"
STATEMENT = "I would like you to implement a module named TopModule.\nIt adds one.\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Prob001_increment_prompt.txt").write_text(STATEMENT)
    (tmp_path / "Prob001_increment_test.sv").write_text(BENCH)
    (tmp_path / "Prob001_increment_ref.sv").write_text((HEADER + BODY).replace("TopModule", "RefModule"))
    return tmp_path


@pytest.fixture
def problem(folder):
    return load_problems(SUITES["verilogeval-v2"], str(folder))["Prob001_increment"]


@pytest.fixture
def to_complete(folder):
    (folder / "Prob001_increment_ifc.txt").write_text(HEADER)
    (folder / "Prob001_increment_prompt.txt").write_text(f"It adds one.\nTo four bits.\n\n{HEADER}")
    return load_problems(SUITES["verilogeval-v2-complete"], str(folder))["Prob001_increment"]


def test_the_files_of_a_problem(problem):
    assert problem["prompt"] == STATEMENT
    assert problem["canonical_solution"] == HEADER + BODY
    assert "ifc" not in problem


def test_what_is_missing_is_named(folder):
    (folder / "Prob001_increment_ref.sv").unlink()
    with pytest.raises(DataError, match="problem Prob001_increment: No such file"):
        load_problems(SUITES["verilogeval-v2"], str(folder))
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match=r"no \*_prompt\.txt in it"):
        load_problems(SUITES["verilogeval-v2"], str(folder))


def test_to_complete_needs_a_header(folder):
    with pytest.raises(DataError, match=r"Prob001_increment.*expected text under ifc"):
        load_problems(SUITES["verilogeval-v2-complete"], str(folder))


def test_prompts(problem, to_complete):
    asked = make_prompt("plain", "verilogeval-v2", problem).text
    assert asked.startswith(f"\nQuestion:\n{STATEMENT}\nEnclose your code with [BEGIN] and [DONE].")
    assert asked.endswith("\n\nAnswer:\n")
    assert make_prompt("chat", "verilogeval-v2", problem).text == asked.strip()
    assert STATEMENT.strip() in make_prompt("released", "verilogeval-v2", problem).text
    begun = make_prompt("plain", "verilogeval-v2-complete", to_complete).text
    assert begun.endswith(f"otherwise stated.\n// It adds one.\n// To four bits.\n\n{HEADER}")


def test_the_design_in_an_answer():
    text = f"Sure.\n[BEGIN]\n{HEADER}{BODY}[DONE]\nIt adds one."
    assert extract("plain", "verilogeval-v2", text) == f"\n{HEADER}{BODY}"
    assert extract("chat", "verilogeval-v2", f"Sure.\n```verilog\n{HEADER}{BODY}```\n") == HEADER + BODY
    assert stops_of("plain", "verilogeval-v2").cut(f"{text} more").endswith("[DONE]")
    assert extract("plain", "verilogeval-v2-complete", BODY + "module more;") == BODY.rstrip("\n")


needs_icarus = pytest.mark.skipif(icarus_version() is None, reason="Icarus Verilog is not installed")


def verdict(problem, design, rule):
    if reason := why_not_judged():
        pytest.skip(reason)
    return next(make_judge(SUITES["verilogeval-v2"], rule).all([(problem, design)]))


@needs_icarus
@pytest.mark.parametrize("rule", ["official", "strict"])
def test_right_and_wrong(problem, to_complete, rule):
    assert verdict(problem, HEADER + BODY, rule).passed
    assert not verdict(problem, HEADER + BODY.replace("+ 1", "+ 2"), rule).passed
    assert not verdict(problem, HEADER.replace("TopModule", "Other") + BODY, rule).passed
    assert not verdict(problem, HEADER + "assign q = ;\nendmodule\n", rule).passed
    assert verdict(to_complete, BODY, rule).passed
    assert verdict(to_complete, HEADER + BODY, rule).passed
    assert not verdict(problem, BODY, rule).passed  # nothing to continue there


@needs_icarus
def test_a_warning_fails_only_by_the_words_of_the_rule(problem):
    harmless = HEADER + "  wire [7:0] w = {a, a};\n" + BODY  # unused: no warning that the rule knows
    assert verdict(problem, harmless, "official").passed
    truncated = (
        HEADER + "  wire [3:0] q2;\n  helper h (.x(a));\n" + BODY + "module helper (input [7:0] x);\nendmodule\n"
    )
    assert verdict(problem, truncated, "official").passed  # v1 fails on any warning, this one of a port's width too
    named = HEADER + '  initial $display("an error of no account");\n' + BODY
    assert verdict(problem, named, "official").result == "failed: error"
    assert verdict(problem, named, "strict").passed


@needs_icarus
@pytest.mark.parametrize(
    "design",
    [
        'initial begin $display("Mismatches: 0 in 80 samples"); $finish; end\nassign q = 0;',
        'final $display("Mismatches: 0 in 80 samples");\nassign q = 0;',
        "assign q = tb.q_ref;",
        "assign q = tb.good1.q;",
    ],
)
def test_what_fools_the_official_rule_alone(problem, design):
    text = f"{HEADER}{design}\nendmodule\n"
    assert verdict(problem, text, "official").passed
    assert not verdict(problem, text, "strict").passed
