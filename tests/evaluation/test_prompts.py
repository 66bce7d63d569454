import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibft.data.sources import load_rows
from ibft.errors import ConfigError, DataError
from ibft.evaluation.prompts import (
    STYLES,
    Prompt,
    Stops,
    choose_style,
    extract,
    make_prompt,
    rest_of_module,
    stops_of,
)
from ibft.evaluation.suites import SUITES, load_problems
from ibft.rundir import template_of
from ibft.tiny import task_file

SHARED_DATA = Path(os.environ.get("IBFT_DATA", Path(__file__).parents[3] / "shared" / "data"))

HUMANEVAL = {"task_id": "h/0", "prompt": 'def f(x):\n    """Add {1}."""\n', "entry_point": "f", "test": ""}
MBPP = {"task_id": "m/0", "text": "Write f.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
VERILOG = {"task_id": "v/0", "prompt": "module top_module (\n\tinput a,\n\toutput b);\n", "test": ""}
GSM8K = {"task_id": "g/0", "question": "How many?", "answer": "#### 3"}
TASK = {"task_id": "t/0", "instruction": "Write f.", "entry_point": "f", "test": ""}
SAID = (
    "Please act as a professional Verilog designer and provide Verilog code based on the given description. Invert a."
)
MBPP_ASKED = (
    "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:\n\n"
    "assert f(1) == 2\nassert f(2) == 3"
)
HUMANEVAL_ASKED = 'Complete the following Python function.\n\ndef f(x):\n    """Add {1}."""'


@pytest.mark.parametrize(
    ("style", "suite", "problem", "text"),
    [
        ("plain", "humaneval", HUMANEVAL, HUMANEVAL["prompt"]),
        ("plain", "mbpp", MBPP, '"""\nWrite f.\nassert f(1) == 2\nassert f(2) == 3\n"""\n'),
        ("plain", "mbpp", {**MBPP, "text": None, "prompt": "P"}, '"""\nP\nassert f(1) == 2\nassert f(2) == 3\n"""\n'),
        ("plain", "verilogeval-v1", VERILOG, "// Invert a.\nmodule top_module (\n\tinput a,\n\toutput b);\n"),
        ("plain", "gsm8k", GSM8K, "Question: How many?\nAnswer:"),
        ("plain", "jsonl-tests", TASK, "Write f."),
        ("plain", "jsonl-tests", {**TASK, "input": "x = 1"}, "Write f.\nx = 1"),
        ("plain", "jsonl-tests", {**TASK, "instruction": None, "prompt": "P", "input": ""}, "P"),
        ("released", "humaneval", HUMANEVAL, HUMANEVAL_ASKED + "\n"),
        ("released", "mbpp", MBPP, MBPP_ASKED + "\n"),
        ("released", "verilogeval-v1", VERILOG, f"{SAID}\nmodule top_module (\n\tinput a,\n\toutput b);\n"),
        ("released", "gsm8k", GSM8K, "How many?\n"),
        ("released", "jsonl-tests", TASK, "Write f.\n"),
        ("chat", "humaneval", HUMANEVAL, HUMANEVAL_ASKED),
        ("chat", "mbpp", MBPP, MBPP_ASKED),
        ("chat", "verilogeval-v1", VERILOG, f"{SAID}\nmodule top_module (\n\tinput a,\n\toutput b);"),
        ("chat", "gsm8k", GSM8K, "How many?\nEnd with a line `#### ` and the number alone."),
        ("chat", "jsonl-tests", TASK, "Write f."),
        (
            "origen",
            "verilogeval-v1",
            VERILOG,
            f"### Instruction: {SAID}\n### Response: module top_module (\n\tinput a,\n\toutput b);\n",
        ),
    ],
)
def test_exact_prompts(style, suite, problem, text):
    expected = Prompt(text, chat=style == "chat", special_tokens=style in ("plain", "origen"))
    assert make_prompt(style, suite, problem, "Invert a.") == expected


def test_descriptions():
    """Plain: as a comment, lines that are comments already left alone; OriGen's: to the letter."""
    told = " Invert {a}.\n\n// a | b\n"
    assert make_prompt("plain", "verilogeval-v1", VERILOG, told).text.startswith(
        "// Invert {a}.\n//\n// a | b\nmodule top_module"
    )
    assert f"description. {told}\n### Response: module" in make_prompt("origen", "verilogeval-v1", VERILOG, told).text
    assert make_prompt("plain", "verilogeval-v1", VERILOG).text == VERILOG["prompt"]
    for style in ("origen", "released", "chat"):
        with pytest.raises(ConfigError, match=f"--prompt-style={style} .* needs --descriptions FILE"):
            make_prompt(style, "verilogeval-v1", VERILOG)


def test_released_prompts_are_those_of_training():
    from ibft.data.encode import SEPARATOR, to_prompt_response

    row = {**TASK, "input": "x = 1", "output": "def f(): ..."}
    assert make_prompt("released", "jsonl-tests", row).text == to_prompt_response(row)[0] + SEPARATOR


@pytest.mark.parametrize("extra", ["", "x = 1"])
def test_alpaca_prompts_are_those_of_training(extra):
    from ibft.data.formats import read_row
    from ibft.data.templates import Template

    row = {**TASK, "input": extra, "output": "def f(): ..."}
    pair, _ = read_row(row)
    assert make_prompt("alpaca", "jsonl-tests", row).text == Template("alpaca").prompt(pair)
    assert ("### Input:\nx = 1" in make_prompt("alpaca", "jsonl-tests", row).text) == bool(extra)


@pytest.mark.parametrize(
    ("template", "formats", "asked"),
    [
        ("auto", {"instruction + output": 3}, "released"),
        ("auto", {"messages": 2, "prompt + completion (messages)": 1}, "chat"),
        ("auto", {"messages": 2, "instruction + output": 1}, "released"),
        ("auto", {}, "released"),
        ("alpaca", {"messages": 2}, "alpaca"),
    ],
)
def test_auto_asks_as_the_rows_were_taught(template, formats, asked):
    from ibft.data.templates import template_in_use

    assert template_in_use(template, formats) == asked


@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/step-4"])
def test_an_adapter_is_asked_as_its_run_was_taught(tmp_path, adapter):
    (tmp_path / "run" / adapter).mkdir(parents=True)
    assert template_of(tmp_path / "run" / adapter) == "released"
    (tmp_path / "run" / "manifest.json").write_text('{"template": "alpaca"}')
    assert template_of(tmp_path / "run" / adapter) == "alpaca"


@pytest.mark.parametrize(("suite", "problem"), [("jsonl-tests", {"task_id": "t/9"}), ("mbpp", {**MBPP, "text": 3})])
def test_problems_without_a_text(suite, problem):
    with pytest.raises(DataError, match=f"problem {problem['task_id']}: expected text under "):
        make_prompt("plain", suite, problem)


def test_the_bundled_tasks_are_problems_by_their_name():
    problems = load_problems(SUITES["jsonl-tests"], "bundled:tiny")
    assert list(problems) == [row["task_id"] for row in load_rows(str(task_file("test")))]


def test_choose_style():
    plain = {name for name in SUITES if choose_style("auto", name, template=None) == "plain"}
    assert plain == SUITES.keys() - {"jsonl-tests"}
    assert choose_style("auto", "jsonl-tests", template=None) == "released"
    for template in ("auto", "released", "alpaca", "chat"):
        taught = "released" if template == "auto" else template
        assert {choose_style("auto", suite, template=template) for suite in SUITES} == {taught}
    assert [choose_style(style, "verilogeval-v1", template="x.jinja") for style in STYLES] == list(STYLES)
    with pytest.raises(ConfigError, match=r"trained with data.template=x\.jinja: name a --prompt-style of plain, chat"):
        choose_style("auto", "mbpp", template="x.jinja")
    expected = "--prompt-style: got phi, expected auto, plain, chat, released, alpaca, origen"
    with pytest.raises(ConfigError, match=expected):
        choose_style("phi", "mbpp", template=None)
    with pytest.raises(ConfigError, match="expected --suite verilogeval-v1, got mbpp"):
        choose_style("origen", "mbpp", template=None)


def test_stops():
    stops = Stops(before=("\ndef", "\n#"), after=("end",))
    assert stops.cut("x = 1\n# a\ndef f") == "x = 1"
    assert stops.cut("x\nendmodule\n# a") == "x\nend"
    assert stops.cut("# a") == "# a"
    assert stops.cut("") == Stops().cut("") == ""
    assert [stops.reached(text) for text in ("x\nde", "x\ndef", "xend", "")] == [False, True, True, False]


@given(st.text(alphabet="ab\n#", max_size=12))
def test_a_cut_text_holds_no_stop_but_at_its_end(text):
    stops = Stops(before=("\n#",), after=("ab",))
    cut = stops.cut(text)
    assert text.startswith(cut)
    assert "\n#" not in cut
    assert "ab" not in cut[:-1]
    assert stops.reached(text) == (cut != text or cut.endswith("ab"))


@pytest.mark.parametrize(
    ("suite", "raw", "completion"),
    [
        ("humaneval", "    return 1\n\ndef g():\n    pass", "    return 1\n"),
        ("humaneval", "    return 1\nclass A:", "    return 1"),
        ("humaneval", "    return 1\n# Test\n", "    return 1"),
        ("humaneval", "    return 1\nif __name__ == '__main__':", "    return 1"),
        ("humaneval", "    return 1\nprint(f(2))", "    return 1"),
        ("humaneval", "    # first\n    if x:\n        print(x)\n    return 1", None),
        ("humaneval", "def f(x):\n    return 1", None),
        ("humaneval", "    return 1\n```\nThat is:\n```python\nno\n```", "    return 1"),
        ("mbpp", "def g(x):\n    return x\ndef f(x):\n    return g(x)\nassert f(1) == 2", None),
        ("mbpp", 'def f(x): ...\n"""\nNext task', "def f(x): ..."),
        ("mbpp", "```python\ndef f(x): ...\n```\nwords", "def f(x): ...\n"),
        ("gsm8k", " 3 + 4 = 7\n#### 7\n\nQuestion: Next?\nAnswer: 9\n#### 9", " 3 + 4 = 7\n#### 7\n"),
        ("jsonl-tests", "def f():\n    pass\nprint(1)", None),
        ("jsonl-tests", "Here:\n```python\ndef f(): ...\n```\n", "def f(): ...\n"),
        ("verilogeval-v1", "\tassign b = ~a;\nendmodule\n\nmodule next(\n", "\tassign b = ~a;\nendmodule\n"),
        ("verilogeval-v1", "\tassign b = ~a;\n", None),
    ],
)
def test_plain_answers(suite, raw, completion):
    if suite == "mbpp" and completion is None:
        completion = raw.partition("\nassert")[0]
    assert extract("plain", suite, raw) == (raw if completion is None else completion)


@pytest.mark.parametrize("style", ["chat", "released"])
@pytest.mark.parametrize(
    ("suite", "raw", "completion"),
    [
        (
            "humaneval",
            "Sure:\n```python\ndef g(): ...\ndef f(x): ...\nprint(1)\n```\nDone.",
            "def g(): ...\ndef f(x): ...\nprint(1)\n",
        ),
        ("humaneval", "def g(): ...\n\ndef f(x): ...\n", None),
        ("mbpp", "```\ndef f(x): ...", "def f(x): ..."),
        ("gsm8k", "```\n3\n```\n#### 7\n\nQuestion: no", None),
        (
            "verilogeval-v1",
            "Here:\n```verilog\nmodule top_module (input a, output b);\n  assign b = ~a;\nendmodule\n```\nIt inverts.",
            "\n  assign b = ~a;\nendmodule\n",
        ),
    ],
)
def test_answers_that_the_model_ends(style, suite, raw, completion):
    assert stops_of(style, suite) == Stops()
    assert extract(style, suite, raw) == (raw if completion is None else completion)


def test_origen_answers_end_like_plain_ones():
    assert (
        extract("origen", "verilogeval-v1", "\tx;\nendmodule\n### Instruction: more endmodule") == "\tx;\nendmodule\n"
    )


BODY = "\n  assign b = ~a;\nendmodule\n"
HELPER = "module helper(input c);\nendmodule"
HEADERS = [
    "module top_module(input a, output b);",
    "module top_module (\n\tinput a,  // the input; of one bit\n\toutput b /* ( ; */\n);",
    "module top_module // ; here\n  #(parameter N = 4, parameter M = (N * 2))\n  (input [N-1:0] a, output b);",
    "module  top_module\n(\n  a,\n  b\n);",
    "module top_module;",
    "// module top_module(input a, output b);\nmodule top_module(input a, output b);",
    "/* module top_module( */ module top_module(input a, output b);",
    '`timescale 1ns/1ps\n// "unclosed\nmodule top_module(input a, output b);',
    "The module top_module inverts a; it is a module (a small one).\n\nmodule top_module(input a, output b);",
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_repeated_header_is_stripped(header):
    assert rest_of_module(header + BODY) == BODY
    assert rest_of_module(header + BODY + "\nThis module inverts.") == BODY


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (BODY, BODY),
        (BODY.rstrip(), BODY),
        (
            "  // module top_module(input a);\n  assign b = ~a; // endmodule\nendmodule : top_module",
            "  // module top_module(input a);\n  assign b = ~a; // endmodule\nendmodule\n",
        ),
        ('  initial $display("endmodule"); \\endmodule = 1; `endmodule\nendmodule\n', None),
        ("  assign b = ~a;\n", None),
        ("", None),
        (f"{BODY}\n{HEADERS[0]}\n  assign b = a;\nendmodule", BODY),  # a second one
        (f"{BODY}// it helps\n{HELPER}\n{HELPER}\nwords endmodule", f"{BODY}// it helps\n{HELPER}\n{HELPER}\n"),
        (f"{BODY}words\n{HELPER}", BODY),
        (f"{BODY}module helper(input c);", BODY),  # cut off
        (f"{HELPER}\nmodule other;\nendmodule\n{HEADERS[0]}{BODY}", f"{BODY}\n{HELPER}\n\nmodule other;\nendmodule\n"),
        (f"{HELPER}\n{HEADERS[1]}{BODY}{HELPER}", f"{BODY}{HELPER}\n\n{HELPER}\n"),
        ("module top_module(input a,", ""),
        ("module top_module_2(input a);\nendmodule", None),
    ],
)
def test_rest_of_module(text, kept):
    assert rest_of_module(text) == (text if kept is None else kept)


PIECES = ["module ", "endmodule\n", "top_module", "a", "(", ";", "//", "/*", "*/", '"', "\n"]


@given(st.lists(st.sampled_from(PIECES), max_size=25).filter(lambda pieces: pieces.count("top_module") <= 1))
def test_what_is_kept_of_a_module_is_kept_again(pieces):
    rest = rest_of_module("".join(pieces))
    assert rest_of_module(rest) == rest


@pytest.fixture(scope="module")
def verilog_problems():
    path = SHARED_DATA / "VerilogEval_Human.jsonl.gz"
    if not path.exists():
        pytest.skip(f"real data not found at {SHARED_DATA} (set IBFT_DATA)")
    return load_rows(str(path)) + load_rows(str(path.with_name("VerilogEval_Machine.jsonl.gz")))


def test_real_solutions_stay_what_they_are(verilog_problems):
    """Whether a model repeats the header or not, what follows it comes out, but for what is behind the last module."""
    for problem in verilog_problems:
        solution = problem["canonical_solution"]
        expected = solution[: solution.rindex("endmodule")] + "endmodule\n"
        assert rest_of_module(solution) == expected
        after_header = problem["prompt"].rpartition(";")[2]
        assert rest_of_module(problem["prompt"] + solution) == after_header + expected


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="needs Icarus Verilog")
def test_a_helper_before_the_header_still_compiles(tmp_path):
    answer = (
        "module helper(input c, output d);\n  assign d = ~c;\nendmodule\n"
        "module top_module(input a, output b);\n  helper h(.c(a), .d(b));\nendmodule\n"
    )
    file = tmp_path / "a.sv"
    file.write_text(VERILOG["prompt"] + extract("chat", "verilogeval-v1", answer))
    done = subprocess.run(["iverilog", "-g2012", "-o", str(tmp_path / "a"), str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
