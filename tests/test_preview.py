"""`ibft-fast preview`: what would be taught, without weights."""

import json

import pytest
from typer.testing import CliRunner

from ibft.cli import app


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    given = [{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "long", "output": "x " * 200}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*given, {"instruction": "none", "output": ""}]))
    return path


def preview(*arguments, charset="utf-8"):
    return CliRunner(charset=charset).invoke(app, ["preview", *map(str, arguments)])


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_bundled_tasks(monkeypatch):
    monkeypatch.setattr("ibft.model.load_base", lambda *_, **__: pytest.fail("loaded weights"))
    result = preview("-n", 2)
    assert result.exit_code == 0, result.output
    assert result.output.count("--- row ") == 2
    assert "⟦def " in result.output
    assert "no problem found" in result.output
    assert "packing: 516 samples in " in result.output
    assert "first" not in result.output  # all rows were seen


def test_what_is_taught_is_marked_and_the_first_problem_said(rows):
    result = preview(f"data.path={rows}", "data.max_length=64", "data.val_size=0")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "add 1 2 ⟦3<|endoftext|>⟧" in text or "⟦3" in text
    assert "first problem: " in text
    assert "of the label tokens are lost at data.max_length=64" in text
    assert "1 rows have an empty response, the first is row 3" in text


def test_for_machines(rows):
    result = preview(f"data.path={rows}", "data.val_size=0", "-n", 1, "--json")
    found = json.loads(result.stdout)
    assert (found["rows"], found["samples"], len(found["shown"])) == (3, 2, 1)
    (sample,) = found["shown"]
    assert [piece["taught"] for piece in sample["pieces"]] == [False, True]
    assert sample["pieces"][0]["text"] == "add\n1 2\n"
    assert sample["pieces"][1]["text"].startswith("3")
    assert sample["tokens"] > sample["label_tokens"] > 0
    assert sum(count for *_, count in found["lengths"]["histogram"]) == 2
    assert found["packing"]["packed"]["rows"] == 1
    assert found["formats"] == {"instruction + input + output": 1, "instruction + output": 2}


def test_only_the_first_rows_are_tokenised(rows):
    found = json.loads(preview(f"data.path={rows}", "data.val_size=0", "--rows", 1, "--json").stdout)
    assert (found["rows"], found["first_rows"]) == (1, 1)
    found = json.loads(preview(f"data.path={rows}", "data.val_size=0", "data.max_samples=1", "--json").stdout)
    assert (found["rows"], found["first_rows"]) == (1, None)


def test_figures_of_the_first_rows_alone_say_so_and_name_no_setting_that_nobody_set(tmp_path):
    path = save(tmp_path / "rows.jsonl", [{"instruction": f"q{k}", "output": f"a{k}"} for k in range(9)])
    said = preview(f"data.path={path}", "data.val_size=0", "data.packing=false", "--rows", 8).output
    assert "rows: 8 of 9 rows (--rows)" in said
    assert "of the first 8 rows alone (--rows 0: of all):" in said
    assert "steps an epoch of these 8 rows; data.packing is off" in said
    assert "max_samples" not in said
    said = preview(f"data.path={path}", "data.val_size=0", "data.max_samples=5", "--rows", 8).output
    assert "rows: 5 of 9 rows (data.max_samples)" in said
    assert "first 5 rows" not in said
    assert "steps an epoch of" not in said


@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_any_encoding_of_the_terminal_will_do(tmp_path, charset):
    path = save(tmp_path / "rows.jsonl", [{"instruction": "größe 数", "output": "é"}])
    result = preview(f"data.path={path}", "data.val_size=0", charset=charset)
    assert (result.exit_code, result.exception) == (0, None)
    assert "[[" in result.output
    assert "##" in result.output
    assert ("größe ?" if charset == "latin-1" else "gr??e ?") in result.output
    result = preview(f"data.path={path}", "data.val_size=0", "--json", charset=charset)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["shown"][0]["pieces"][0]["text"] == "größe 数\n"


def test_what_would_steer_the_terminal_is_spelled_out(tmp_path):
    given = "a\x1b[31mred\x07\r\x9b1m\u202eb\n\tc"
    path = save(tmp_path / "rows.jsonl", [{"instruction": given, "output": "x"}])
    said = preview(f"data.path={path}", "data.val_size=0").output
    assert "a\\x1b[31mred\\x07\\r\\x9b1m\\u202eb\n" in said
    assert not set("\x1b\x07\x9b\u202e") & set(said)


def test_rows_are_counted_from_1(rows):
    said = preview(f"data.path={rows}", "data.val_size=0").output
    assert "--- row 1: " in said
    assert "--- row 2: " in said
    assert "--- row 0: " not in said


def test_no_length_is_in_two_bins():
    from ibft.data.encode import EncodedData
    from ibft.data.samples import Sample
    from ibft.preview import lengths_of

    def bins(*lengths):
        return lengths_of(EncodedData.of([Sample([1] * length, 1) for length in lengths]))["histogram"]

    assert bins(5, 5) == [[5, 5, 2]]
    assert bins(*range(1, 13)) == [[k, k, 1] for k in range(1, 13)]
    # 15 lengths in bins of 2: the last holds the longest alone
    assert bins(*range(1, 16)) == [*([k, k + 1, 2] for k in range(1, 15, 2)), [15, 15, 1]]
    assert bins(55, 63, 64, 150)[:2] == [[55, 62, 1], [63, 70, 2]]  # 96 lengths, 8 a bin
    assert bins(55, 63, 64, 150)[-1] == [143, 150, 1]


def test_a_file_of_rows_is_no_configuration(rows):
    result = preview(rows)
    assert result.exit_code == 2
    assert (
        f"rows.jsonl: got a .jsonl file, expected the settings as .yaml; a file of rows is named by data.path={rows}"
        in (result.output)
    )
    as_list = rows.with_suffix(".json")
    as_list.write_text('[{"instruction": "a"}]')
    assert f"expected sections with keys; a file of rows is named by data.path={as_list}" in preview(as_list).output
    as_list.write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    assert f"a file of rows is named by data.path={as_list}" in preview(as_list).output
    settings = rows.with_name("settings.json")
    settings.write_text(json.dumps({"data": {"path": str(rows)}}))
    assert preview(settings).exit_code == 0


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ('{"instruction": "a"}\n', 3, "row 1 has the keys instruction; expected instruction + output"),
        ('{"instruction": "a", \n', 3, "rows.jsonl:1: malformed JSON"),
        ("", 3, "the data set is empty"),
    ],
)
def test_faults_are_found_before_any_weight(rows, content, code, said):
    rows.write_text(content)
    result = preview(f"data.path={rows}")
    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output


def test_fields_that_are_not_whole(rows):
    result = preview(f"data.path={rows}", "data.fields.prompt=q")
    assert result.exit_code == 2
    assert "data.fields: got prompt, expected prompt and response (and input), or messages, or text" in result.output


def test_a_key_that_does_not_exist(rows):
    result = preview(f"data.path={rows}", "data.tempalte=alpaca")
    assert result.exit_code == 2
    assert "did you mean 'data.template'" in result.output
