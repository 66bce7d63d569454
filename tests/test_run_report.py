"""The page about training runs: the numbers of their files are on it, whatever state a run is in, and nothing else."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, Browser
from run_pages import MANIFEST, RESULT, ROWS, STEP, Page, page_of, report, write_run

from ibft.evaluation.score import run_score
from ibft.objective import ACTIVE_DIM_NATS
from ibft.run_report.curves import IN_USE_NATS, kl_per_dimension
from ibft.run_report.page import make_page
from ibft.run_report.read_run import names_of, read_run, read_runs

# --- what is on it --------------------------------------------------------------------------------


def test_the_numbers_of_a_finished_run_are_on_its_page(tmp_path):
    page = page_of(write_run(tmp_path / "first"))
    assert (page.open, page.wrong) == ([], [])
    facts = {
        "state": "finished", "steps": "20 of 20", "base model": "bundled:tiny", "quantisation": "nf4",
        "objective": "CE + 0.01 (KL + 0.02 CE_z); layer 5, Z 16, linear encoder, KL batchmean",
        "LoRA": "r 16, alpha 32, dropout 0.05", "data": "bundled:tiny", "device": "A card, bfloat16", "seed": "7",
        "training time": "2 h 05 min",
    }  # fmt: skip
    assert dict(page.tables["Run"][1:]) == facts
    lesser = dict(page.tables["Versions and places"][1:])
    assert lesser["commit"] == "0123456789ab with changes"
    assert lesser["versions"] == "torch 2.99.0, triton not installed"
    assert (lesser["data's sha256"], lesser["memory predicted"]) == ("fedcba9876543210", "512 MiB")
    assert dict(page.tables["First → last"]) == {
        "run": "first", "held-out CE, lowest": "0.8125 at step 10", "loss": "2.5 → 1.25", "CE": "1 → 1", "KL": "64 → 8",
        "CE_z": "3 → 3", "dims in use": "87.5 % → 25 %", "grad LoRA": "0.4 → 0.4", "grad bottleneck": "0.02 → 0.02",
        "tokens/s": "1,234", "peak MiB": "713",
    }  # fmt: skip
    assert dict(page.tables["Pass@1, one greedy completion a task"]) == {
        "run": "first", "before": "25.0 % (2 of 8)", "after": "50.0 % (4 of 8)", "change": "+25.0 points",
    }  # fmt: skip
    assert "step 20: over-compression: lower ib.alpha" in page.text
    assert "Peak memory so far MiB" in page.text  # of a chart
    assert "Not logged" not in page.text


def test_each_logged_number_has_a_chart(tmp_path):
    labels = dict(label.split(": ", 1) for label in page_of(write_run(tmp_path / "a")).labels())
    assert labels == {
        "Loss": "a from 2.5 to 1.25", "Cross-entropy (CE)": "a from 1 to 1", "Held-out CE": "a from 0.8125 to 0.9375",
        "KL": "a from 64 to 8", "Cross-entropy from z (CE_z)": "a from 3 to 3",
        "KL per latent dimension": "a from 4 to 0.5", "KL of the middle dimension": "a from 4 to 4",
        "KL of the fullest dimension": "a from 9 to 9", "KL of the emptiest dimension": "a from 0.5 to 0.5",
        "Latent dimensions in use": "a from 87.5 % to 25 %", "|mu|": "a from 0.5 to 0.5",
        "Variance of z": "a from 0.75 to 0.75", "Gradient norm of LoRA": "a from 0.4 to 0.4",
        "Gradient norm of the bottleneck": "a from 0.02 to 0.02", "Learning rate": "a from 0.001 to 0.001",
        "Throughput": "a from 1500 to 1500", "Peak memory so far": "a from 640 to 700",
    }  # fmt: skip


def test_kl_a_dimension_is_the_same_whichever_way_it_is_reduced(tmp_path):
    """Z = 16: a sum of 64 nats over dimensions, or a mean of 4."""
    summed = read_run(write_run(tmp_path / "a"), "a")
    mean_rows = [{**row, "kl": row["kl"] / 16} if "kl" in row else row for row in ROWS]
    mean = read_run(write_run(tmp_path / "b", "ib.kl_reduction=mean", rows=mean_rows), "b")
    assert kl_per_dimension(summed) == kl_per_dimension(mean) == [(1, 4.0), (10, 1.0), (20, 0.5)]


def test_the_threshold_that_the_page_names_is_the_objective_s(tmp_path):
    assert IN_USE_NATS == ACTIVE_DIM_NATS
    assert "its mean KL against N(0, I) is above 0.01 nats" in page_of(write_run(tmp_path / "a")).text


def test_a_run_without_a_bottleneck(tmp_path):
    rows = [{key: row[key] for key in ("step", "loss", "ce", "grad_norm_lora") if key in row} for row in ROWS]
    page = page_of(write_run(tmp_path / "a", "ib.alpha=0", rows=[row for row in rows if "loss" in row]))
    assert page.fact("objective") == ["CE (ib.alpha = 0: plain fine-tuning, no bottleneck)"]
    assert "Not logged: Held-out CE, KL, Cross-entropy from z (CE_z)." in page.text
    assert [row[0] for row in page.tables["First → last"]] == ["run", "loss", "CE", "grad LoRA", "tokens/s", "peak MiB"]


def test_a_few_runs_are_columns_and_many_are_rows(tmp_path):
    runs = [write_run(tmp_path / name) for name in "abcd"]
    assert page_of(*runs[:3]).tables["First → last"][0] == ["run", "a", "b", "c"]
    assert [row[0] for row in page_of(*runs).tables["First → last"]] == ["run", *"abcd"]


def test_of_several_runs_only_settings_that_differ_are_beside_each_other(tmp_path):
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", "ib.alpha=0.05", "train.learning_rate=0.004", manifest=MANIFEST | {"seed": 8})
    page = page_of(first, second)
    assert page.tables["Settings that differ"] == [
        ["setting", "a", "b"], ["ib.alpha", "0.01", "0.05"], ["train.learning_rate", "0.002", "0.004"],
    ]  # fmt: skip
    assert ["ib.beta", "0.02"] in page.tables["Settings"]
    assert [row[0] for row in page.tables["Runs"]] == ["", "state", "objective", "seed"]
    assert page.fact("seed", "Runs") == ["7", "8"]
    assert page.fact("steps", "The same in all runs") == ["20 of 20"]
    legends = [attributes for tag, attributes in page.tags if attributes.get("class") == "legend"]
    assert len(legends) == 4


def test_a_setting_that_an_older_run_does_not_know(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    tree = yaml.safe_load((second / "config.yaml").read_text())
    del tree["train"]["clip_mode"]
    (second / "config.yaml").write_text(yaml.safe_dump(tree))
    assert page_of(first, second).tables["Settings that differ"][1:] == [["train.clip_mode", "per_group", "–"]]


def test_runs_are_called_by_what_their_paths_do_not_share(tmp_path):
    assert names_of([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert names_of([Path("/r/a/seed-0/run"), Path("/r/b/seed-0/run")]) == ["a", "b"]
    assert names_of([Path("/r/a/0/run"), Path("/r/a/1/run"), Path("/r/b/0/run")]) == ["a/0", "a/1", "b/0"]
    assert names_of([Path("/r/a"), Path("/r/a/a")]) == ["/r/a", "/r/a/a"]


def test_scores_that_lie_in_the_folder(tmp_path):
    """Of two problems 1 of 2 and 2 of 2 samples pass: pass@1 is 75 %, Pass@2(2) 50 %."""
    run = write_run(tmp_path / "a")
    verdicts = [("p", True), ("p", False), ("q", True), ("q", True)]
    lines = [{"task_id": task, "passed": passed, "suite": "humaneval"} for task, passed in verdicts]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_score(str(tmp_path / "verdicts.jsonl"), ks="1,2", out=str(run / "evaluation" / "scores.json"))
    retained = {"scores": {"mmlu": {"acc": {"value": 0.625, "stderr": 0.0125}}}, "lm_eval": "0.4.9", "model": "m"}
    (run / "retain.json").write_text(json.dumps(retained))
    (run / "other.json").write_text("[1, 2]")
    page = page_of(run)
    assert page.tables["Scores, in %"] == [
        ["run", "file", "pass@1", "pass@2", "Pass@2(2)", "mmlu acc"],
        ["a", "evaluation/scores.json", "75.0", "100.0", "50.0", ""],
        ["a", "retain.json", "", "", "", "62.5"],
    ]
    assert "2 problems, n = 2; 3 of 4 samples pass, suite humaneval" in page.text
    assert page.tables["what is retained"][1] == ["mmlu", "acc", "0.6250", "0.0125"]


def test_of_many_rows_sixty_are_listed_the_first_and_the_last_among_them(tmp_path):
    page = page_of(write_run(tmp_path / "a", rows=[{**STEP, "step": step} for step in range(1, 201)]))
    assert "a: 200 rows, 60 of them shown" in page.text
    steps = [row[0] for row in page.tables["a"]]
    assert (len(steps), steps[:2], steps[-1]) == (61, ["step", "1"], "200")


def test_steps_that_were_not_finite(tmp_path):
    fault = {"step": 12, "rows": list(range(20)), "error": "e", "parts": {"loss": "nan", "ce": "inf"}, "skipped": True}
    faults = {"faults": [fault, fault | {"step": 15, "rows": [3], "skipped": False}]}
    page = page_of(write_run(tmp_path / "a", result=None, faults=faults))
    assert page.tables["Steps that were not finite"][1:] == [
        ["a", "12", "left out", "loss nan, ce inf", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more"],
        ["a", "15", "ended the run", "loss nan, ce inf", "3"],
    ]
    assert page.fact("state") == ["ended by a step that was not finite"]


# --- whatever state a run is in -------------------------------------------------------------------


def test_a_run_that_has_no_result_yet(tmp_path):
    run = write_run(tmp_path / "a", result=None)
    for name in ("step-20", "step-9", ".step-30", "step-x"):
        (run / "checkpoints" / name).mkdir(parents=True)
    page = page_of(run)
    assert page.fact("state")[0].startswith("under way, or stopped early; last row 19")  # 1970, or the day before
    assert page.fact("training time") == ["21 s from the first row to the last"]
    assert page.fact("checkpoints", "Versions and places") == ["step-9, step-20"]
    assert "No result.json yet, which holds what a run was warned of." in page.text
    assert page.fact("tokens/s", "First → last") == ["1,500"]
    assert page.fact("peak MiB", "First → last") == ["700"]


def test_a_run_that_has_only_begun(tmp_path):
    assert "Nothing is logged yet." in page_of(write_run(tmp_path / "a", rows=[], manifest=None, result=None)).text
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    page = page_of(tmp_path / "b")
    assert "Nothing is logged yet." in page.text
    assert "No configuration could be read." in page.text


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "a", result=None)
    whole = make_page(read_runs([run]))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\n[1]\n{"loss": 3}\n{"step": "4"}\n{"step": true}\n\xff\xfe\n' + b"[" * 9999 + b'\n{"step": 30, "lo'
        )
    read = read_run(run, "a")
    assert read.notes == ["metrics.jsonl: 7 damaged lines left out"]
    assert [row["step"] for row in read.steps] == [1, 10, 20]
    assert make_page([read]).replace("<li>metrics.jsonl: 7 damaged lines left out</li>", "") == whole.replace(
        '<section id="warnings"><h2>Warnings</h2>', '<section id="warnings"><h2>Warnings</h2><ul class="warnings"></ul>'
    )


def test_damaged_lines_of_the_latent_file_are_left_out_and_counted_too(tmp_path):
    """Of three dimensions: no JSON, no step, no list, other lengths, no layer's number. What is no number is a gap."""
    rows = [{"step": 1, "kl": [1, 2, 3]}, {"step": 4, "kl": [1, 1, 1]}, {"step": 2, "kl": [3.0, math.nan, 5.0]}]
    wrong = [{"kl": [1, 2, 3]}, {"step": 3, "kl": 7}, {"step": 3}, {"step": 3, "kl": [1, 2]}, {"step": 3, "kl": []},
             {"step": 3, "kl": [1, 2, 3, 4]}, {"step": 3, "layer": "x", "kl": [1, 2, 3]},
             {"step": "3", "kl": [1, 2, 3]}]  # fmt: skip
    run = write_run(tmp_path / "a", latent=[wrong[3], *rows, *wrong, {"step": 4, "kl": [4, 5, None]}])
    with (run / "latent.jsonl").open("ab") as file:
        file.write(b'\xff\n\n{"step": 5, "kl": [1, 2')
    read = read_run(run, "a")
    assert read.notes == ["latent.jsonl: 11 damaged lines left out"]
    assert read.latent == {None: [(1, [1, 2, 3]), (2, [3.0, None, 5.0]), (4, [4, 5, None])]}
    assert (
        "KL of each latent dimension, layer 5: 3 dimensions; at step 1 from 1 to 3 nats" in page_of(run).text_of_maps()
    )


def test_nothing_but_damaged_lines_is_no_map_and_no_error(tmp_path):
    run = write_run(tmp_path / "a", latent=[{"step": 1, "kl": None}])
    page = page_of(run)
    assert page.text_of_maps() == ""
    assert "latent.jsonl: 1 damaged line left out" in page.text
    (run / "latent.jsonl").write_text("")
    assert read_run(run, "a").notes == []


def test_a_step_logged_twice_counts_as_it_was_logged_last(tmp_path):
    rows = [*ROWS, {**STEP, "step": 10, "loss": 9.0}]
    assert read_run(write_run(tmp_path / "a", rows=rows), "a").curve("loss") == [(1, 2.5), (10, 9.0), (20, 1.25)]


def test_values_that_are_no_numbers_leave_a_gap(tmp_path):
    odd = [None, "1", True, math.nan, math.inf, 10**400, [1]]
    rows = [{**STEP, "step": step, "loss": value} for step, value in enumerate([1.0, *odd, 2.0])]
    run = read_run(write_run(tmp_path / "a", rows=rows), "a")
    assert run.curve("loss") == [(0, 1.0), *((step, None) for step in range(1, 8)), (8, 2.0)]
    make_page([run])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "12", '{"a": ' * 5000, "\x00", "2020-13-45", "a: b: c", "a: &a [*a]", "a: &a {b: *a}"],
)
def test_other_damaged_files_are_left_out_and_named(tmp_path, content):
    run = write_run(tmp_path / "a", faults={"faults": []})
    names = ("config.yaml", "manifest.json", "result.json", "non_finite.json")
    for name in names:
        (run / name).write_text(content)
    page = page_of(run)
    for name in names:
        assert f"{name} is damaged, and left out" in page.text
    assert page.fact("loss", "First → last") == ["2.5 → 1.25"]


@pytest.mark.parametrize("odd", [None, 3, "text", [], [1], {}, {"x": None}])
def test_files_with_other_content_than_a_run_writes_are_no_reason_to_fail(tmp_path, odd):
    run = write_run(tmp_path / "a")
    (run / "config.yaml").write_text(json.dumps(dict.fromkeys(("ib", "model", "lora", "data", "train"), odd)))
    (run / "manifest.json").write_text(json.dumps(dict.fromkeys(MANIFEST, odd)))
    (run / "result.json").write_text(json.dumps(dict.fromkeys(RESULT, odd)))
    (run / "non_finite.json").write_text(json.dumps({"faults": [odd, {"step": odd, "rows": odd, "parts": odd}]}))
    (run / "scores.json").write_text(json.dumps({"ks": odd, "verdicts": odd, "baseline": odd}))
    (run / "retain.json").write_text(json.dumps({"scores": {"a": odd}, "lm_eval": odd}))
    page = page_of(run)
    assert (page.open, page.wrong) == ([], [])
    assert "scores.json is a damaged report of scores, and left out" in page.text


# --- refusals -------------------------------------------------------------------------------------


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    run, out = write_run(tmp_path / "a"), tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        (tmp_path / "none",): f"{tmp_path / 'none'}: no such folder, expected a run folder",
        (tmp_path / "empty",): f"{tmp_path / 'empty'}: holds no run, expected config.yaml or metrics.jsonl in it",
        (run, tmp_path / "file"): f"{tmp_path / 'file'}: is a file, expected a run folder",
        (run, tmp_path / "empty" / ".." / "a"): f"{tmp_path}/empty/../a: named twice",
    }
    for folders, said in cases.items():
        result = report(*folders, "-o", out)
        assert (result.exit_code, result.stderr) == (2, f"error: {said}\n")
    (tmp_path / "loop").symlink_to("loop")
    result = report(run, tmp_path / "loop", "-o", out)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}/loop: a link that leads nowhere, expected a run folder\n"
    result = report(run, "-o", run / "config.yaml")
    assert result.exit_code == 2
    assert result.stderr.endswith("config.yaml, expected a name that ends with .html or .htm\n")
    assert not out.exists()


def test_files_that_cannot_be_read_or_written(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    result = report(run, "-o", tmp_path / "file" / "page.html")
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    (run / "result.json").unlink()
    (run / "result.json").mkdir()
    result = report(run, "-o", tmp_path / "page.html")
    assert (result.exit_code, result.stderr) == (3, f"error: {run}/result.json: Is a directory\n")
    long = report(tmp_path / ("n" * 300), "-o", tmp_path / "page.html")
    assert long.exit_code in (2, 3)
    assert len(long.stderr.splitlines()) == 1


def test_the_command_says_where_the_page_is(tmp_path):
    run = write_run(tmp_path / "a", result=None)
    (run / "manifest.json").write_text("{")
    result = report(run, "-o", tmp_path / "new" / "page.html")
    assert result.exit_code == 0, result.output
    assert f"note: {run}: manifest.json is damaged, and left out" in result.stdout
    assert f"report: {tmp_path}/new/page.html" in result.stdout
    assert (tmp_path / "new" / "page.html").read_text() == make_page(read_runs([run]))


def test_a_home_that_the_shell_left_is_meant(tmp_path, monkeypatch):
    """As it does in --out=~/page.html."""
    run = write_run(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert report(run, "--out=~/page.html").exit_code == 0
    assert (tmp_path / "home" / "page.html").is_file()
    assert not (tmp_path / "~").exists()


# --- nothing but itself ---------------------------------------------------------------------------

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;"


def hostile_runs(tmp_path):
    """Two runs, of two bottlenecks each, with markup wherever a file or a name can hold text."""
    rows = [{**row, EVIL: 1.0} for row in ROWS]
    manifest = {
        **{key: EVIL for key, value in MANIFEST.items() if isinstance(value, str)}, "versions": {EVIL: EVIL},
        "ib_layer": [EVIL], "seed": EVIL,
    }  # fmt: skip
    result = RESULT | {
        "warnings": [EVIL, {EVIL: EVIL}],
        "pass_at_1": {"before": {"not_judged": EVIL}, "after": {"value": 1, "tasks": EVIL}},
    }  # fmt: skip
    faults = {"faults": [{"step": EVIL, "rows": [EVIL], "parts": {EVIL: EVIL}}]}
    runs = []
    for name in ('<b>"a', '<b>"b'):
        latent = [{"step": 1, "layer": layer, "kl": [0.5, 0.25], EVIL: EVIL} for layer in (4, 6)]
        run = write_run(tmp_path / name, rows=rows, manifest=manifest, result=result, faults=faults, latent=latent)
        tree = yaml.safe_load((run / "config.yaml").read_text())
        tree["model"] |= {"name_or_path": EVIL, "revision": EVIL}
        tree["data"]["path"], tree["ib"]["encoder"], tree["lora"]["r"] = EVIL, EVIL, EVIL
        tree[EVIL] = {EVIL: name}
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
        retained = {"scores": {EVIL: {EVIL: {"value": 0.5, "stderr": None}}}, "lm_eval": EVIL, "model": EVIL}
        (run / "<i>.json").write_text(json.dumps(retained))
        runs.append(run)
    return runs


def test_nothing_of_a_file_becomes_markup(tmp_path):
    page = page_of(*hostile_runs(tmp_path))
    assert (page.open, page.wrong) == ([], [])
    assert {tag for tag, _ in page.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "p", "nav", "a", "main", "section", "h2",
        "div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "ul", "li", "span", "code",
        "figure", "figcaption", "b", "svg", "g", "path", "circle", "text",
    }  # fmt: skip
    assert {name for _, attributes in page.tags for name in attributes} == {
        "lang", "charset", "name", "content", "href", "id", "class", "tabindex", "role", "scope", "viewbox", "d", "x",
        "y", "cx", "cy", "r", "text-anchor", "aria-label", "aria-hidden",
    }  # fmt: skip
    assert page.text.count(EVIL) > 30
    assert len([tag for tag, _ in page.tags if tag == "b"]) == 17 + 4  # of charts and maps, none of a name


def test_nor_does_the_name_of_a_single_run(tmp_path):
    """It is the page's title, which several runs' names are not."""
    name = "<script>alert(1)"
    page = page_of(write_run(tmp_path / name))
    assert (page.open, page.wrong) == ([], [])
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(f"Training run {name}") == 2  # of the tab, and above the page


def test_the_page_names_no_other_place(tmp_path):
    html = make_page(read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")]))
    page = Page(html)
    assert not re.search(r"https?:|//|url\(|@import|@font-face", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} == set(ids)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


COLOURS = """[...document.querySelectorAll('body, figure.chart text, figure.chart g, .grid')].map(
    e => { const s = getComputedStyle(e); return [s.backgroundColor, s.color, s.fill, s.stroke].join() }
)"""


BAR = "[...document.querySelectorAll('figure.heat')[0].querySelectorAll('g:last-of-type path')].map("
BAR += "e => getComputedStyle(e).fill)"


def test_in_a_browser_it_opens_alone_and_fits_a_phone_in_light_and_dark(tmp_path, browser):
    """Long words wherever a name can stand; everything unfolded."""
    word = "a" * 120
    long = [{**STEP, "step": step, "loss": 1.0 + step % 7} for step in range(1500)]
    plain = write_run(
        tmp_path / word, f"model.name_or_path={word}", "data.path=/x", rows=long, manifest=MANIFEST | {"device": word},
        result=RESULT | {"warnings": [word]},
        latent=[{"step": step, "kl": [step * 1.2**dim for dim in range(100)]} for step in range(1, 1500, 10)],
    )  # fmt: skip
    pages = {"alone.html": [plain], "several.html": [plain, *hostile_runs(tmp_path)]}
    seen, bars = {}, {}
    for name, runs in pages.items():
        path = tmp_path / name
        path.write_text(make_page(read_runs(runs)), encoding="utf-8")
        for scheme in ("light", "dark"):
            for width in (360, 900):
                browser.open(path, width, scheme)
                browser.value("document.querySelectorAll('details').forEach(each => each.open = true)?.x ?? 0")
                assert browser.value("[document.documentElement.scrollWidth <= innerWidth, innerWidth]") == [
                    True,
                    width,
                ]
                requests = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
                assert requests == [path.as_uri()]
                assert browser.said("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []
                least = (
                    "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
                )
                assert browser.value(least) > 9  # pixels of a letter's box
            seen[name, scheme] = browser.value(COLOURS)
            bars[scheme] = browser.value(BAR)
    light, dark = seen["alone.html", "light"], seen["alone.html", "dark"]
    assert (light[0].split(",rgb")[0], dark[0].split(",rgb")[0]) == ("rgb(255, 255, 255)", "rgb(20, 23, 27)")
    assert len(light) > 100
    assert len(set(bars["light"])) == 17
    assert bars["dark"] == bars["light"][::-1]  # the least is next to the paper
    assert not [each for each, other in zip(light, dark, strict=True) if each == other]
