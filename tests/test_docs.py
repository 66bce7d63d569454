"""The documentation holds: links lead somewhere, commands parse, messages are those of the source, numbers those of the
committed files; and the quick start runs, command by command.

docs/cli.md and docs/config.md are made from the program, and have tests of their own.
"""

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.report import hardware
from ibft import errors
from ibft.cli import app
from ibft.load_config import ALIASES, known_keys, load_config, preset_names
from ibft.sweep.grid import read_grid
from ibft.tiny import TASKS_DIR

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {DOCS / "cli.md", DOCS / "config.md"}
PAGES = [ROOT / "README.md", *sorted(set(DOCS.glob("*.md")) - GENERATED)]
LINKED = [*PAGES, *sorted(GENERATED), *sorted(DOCS.glob("decisions/*.md")), ROOT / "CHANGELOG.md"]
SECTIONS = "model|data|lora|ib|train|eval|checkpoint|runtime"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# --- links ----------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    if page in GENERATED and not page.exists():
        pytest.skip("not made yet")
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", text_of(target), re.MULTILINE)), link


@each_page
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:tests|ibft|benchmarks|kernels|docs)/[\w/.-]+)`", text_of(page)):
        assert (ROOT / name).exists(), name


def test_the_index_names_every_page():
    index = text_of(DOCS / "README.md")
    for page in sorted(DOCS.glob("*.md")):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


# --- commands -------------------------------------------------------------------------------------


def blocks(page: Path) -> Iterator[list[str]]:
    """Lines of each block of code, fenced or indented; a line that ends with a backslash goes on."""
    text = re.sub(r"\\\n\s*", "", text_of(page))
    fenced = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for found in fenced.finditer(text):
        yield found[1].splitlines()
    for block in re.findall(r"(?:^ {4}.*\n)+", fenced.sub("", text), re.MULTILINE):
        yield [line[4:] for line in block.splitlines()]


def commands(page: Path, program: str) -> list[list[str]]:
    """Words after `program` of every line that begins with it; what follows a pipe, < or # is not its own."""
    found = []
    for line in (line for block in blocks(page) for line in block):
        begins = re.match(rf"(?:\.venv/bin/)?{program} (.*)", line)
        through = re.search(r"-m ibft\.cli (.*)", line) if program == "ibft-fast" else None
        if match := begins or through:
            words = shlex.split(match[1], comments=True)
            ends = next((i for i, word in enumerate(words) if word in ("<", "|", "&&")), len(words))
            found.append(words[:ends])
    return found


def own(words: list[str]) -> list[str]:
    """Without the brackets of what may be left out, and without dots that stand for more."""
    if any(word.startswith("[") for word in words):
        words = [word.strip("[]") for word in words]
    values = {i + 1 for i, word in enumerate(words) if word.startswith("-")}  # of an option: dots are a text there
    return [word for i, word in enumerate(words) if word != "section.key=value" and (word != "..." or i in values)]


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of a command line. Raises where the program would refuse it, but for what it finds in files."""
    command, name, rest = get_command(app), "ibft-fast", list(words)
    while group := getattr(command, "commands", None):
        command, name = group[rest[0]], rest.pop(0)
    return command.make_context(name, rest).params


@each_page
def test_every_command_parses_and_its_settings_are_accepted(page):
    for words in map(own, commands(page, "ibft-fast")):
        given = parse(words)
        settings = [word for word in given.get("arguments") or [] if not word.endswith((".yaml", ".yml"))]
        load_config(None, settings)
        if given.get("grid"):
            read_grid(given["grid"])


def test_a_command_that_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "    ibft-fast train --dryrun\n\n    ibft-fast evaluate juge\n\n```\nibft-fast estimate --memory\n```\n"
    )
    found = commands(page, "ibft-fast")
    assert len(found) == 3
    for words in found:
        with pytest.raises(Exception, match=r"dryrun|juge|memory"):
            parse(words)


@each_page
def test_what_is_named_within_the_text_exists(page):
    text, known = text_of(page), {*known_keys(), *ALIASES}
    for key in re.findall(rf"`((?:{SECTIONS})\.[a-z_.]+[a-z_])(?:=[^`]*)?`", text):
        assert key in known or key.endswith(".csv"), key
    assert set(re.findall(r"preset=([a-z-]+)", text)) <= set(preset_names())
    for line in re.findall(r"`ibft-fast ([a-z][^`]*)`", text):
        command = get_command(app)
        for word in line.split():
            if not (group := getattr(command, "commands", None)):
                break
            command = group[word]


@each_page
def test_make_targets_and_modules_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    named = [words.split() for words in re.findall(r"`make ([^`]*)`", text_of(page))] + commands(page, "make")
    for words in named:
        assert {word for word in words if "=" not in word and word != "..."} <= targets, words
    for module in re.findall(r"python -m ((?:ibft|benchmarks)[\w.]*)", text_of(page)):
        assert importlib.util.find_spec(module), module


# --- the quick start, really ----------------------------------------------------------------------

QUICK = DOCS / "quick-start.md"
NOT_RUN = {  # begins with -> why
    "train model.name_or_path=": "downloads a model",
    "estimate model.name_or_path=": "downloads a model's config.json",
    "generate runs/mine": "asks the model that is not trained here",
}
FEWER = {  # begins with -> what the test adds, so that a step is seconds and not minutes; the last of an option counts
    "train": ("train.max_steps=2 train.logging_steps=1 data.max_samples=8 eval.max_tasks=2 eval.max_new_tokens=8"),
    "evaluate generate": "--problems few.jsonl --max-new-tokens 24 --batch-size 40",
    "evaluate judge": "--problems few.jsonl",
    "generate": "--max-new-tokens 8",
}
ROWS = [{"instruction": f"Add {n} to x.", "output": f"def add(x):\n    return x + {n}"} for n in range(4)]


def added(words: list[str], table: dict[str, str]) -> str | None:
    return next((more for start, more in table.items() if " ".join(words).startswith(start)), None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, list[tuple[str, Any]]]:
    """The folder, and what came of each command in the order of the page."""
    from accelerate.state import AcceleratorState

    from ibft_kernels import _dispatch

    folder, results = tmp_path_factory.mktemp("quick"), []
    tasks = (TASKS_DIR / "test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (folder / "few.jsonl").write_text("\n".join(tasks) + "\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_dispatch, "INTERPRETED", False)  # as conftest.py does for tests alone
        patched.chdir(folder)
        for words in commands(QUICK, "ibft-fast"):
            if added(words, NOT_RUN):
                continue
            AcceleratorState._reset_state(True)
            more = (added(words, FEWER) or "").split()
            results.append((" ".join(words), CliRunner().invoke(app, [*words, *more])))
    return folder, results


def isolated() -> bool:
    from ibft.evaluation.sandbox import find_tier

    try:
        return bool(find_tier())
    except errors.SetupError:
        return False


def test_the_quick_start_runs(quick):
    folder, results = quick
    assert len(results) == 10
    for line, result in results:
        if line.startswith(("evaluate judge", "evaluate score")) and not isolated():
            continue  # no program is run here
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"
    for name in ("runs/first/adapter/adapter_model.safetensors", "runs/plain/result.json", "merged/config.json"):
        assert (folder / name).is_file(), name
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 30
    assert "<html" in (folder / "report.html").read_text()
    preview = next(result for line, result in results if line.startswith("preview"))
    assert "Add 3 to x." in preview.output
    if isolated():
        scores = json.loads((folder / "score.json").read_text())
        assert scores["ks"] == [1, 5, 10]


def test_what_is_not_run_is_on_the_page():
    lines = [" ".join(words) for words in commands(QUICK, "ibft-fast")]
    for start in NOT_RUN:
        assert sum(line.startswith(start) for line in lines) == 1, start


# --- Python ---------------------------------------------------------------------------------------

READ_ONLY = {  # first line of an indented snippet -> why nothing runs it
    "from ibft.integrations import IBFTConfig, IBFTSFTTrainer": "TRL is no dependency",
}


@each_page
def test_every_python_snippet_is_executed_or_has_a_reason(page):
    text = text_of(page)
    marked = re.findall(r"<!-- executed by (tests/[\w/.]+) -->\n```python\n", text)
    assert len(marked) == text.count("```python\n"), "a snippet that no test executes"
    for test in marked:
        assert re.search(rf"\b{re.escape(page.name)}\b", text_of(ROOT / test)), test
    for block in blocks(page):
        if block and block[0].startswith(("from ", "import ")) and "```python\n" + block[0] not in text:
            assert block[0] in READ_ONLY, block[0]
            compile("\n".join(block), page.name, "exec")


def test_the_snippet_of_the_method_runs():
    (code,) = re.findall(r"```python\n(.*?)```", text_of(DOCS / "method.md"), re.DOTALL)
    assert code.count("assert ") == 4
    exec(compile(code, "method.md", "exec"), {})


# --- messages -------------------------------------------------------------------------------------


@cache
def messages() -> list[tuple[str, frozenset[int]]]:
    """Every text of the source, with a NUL where a value goes in, and the exit codes of the errors it is given to."""
    codes = {kind.__name__: kind.exit_code for kind in errors.IBFTError.__subclasses__()}
    found: dict[str, set[int]] = {}
    for file in sorted((ROOT / "ibft").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(text_of(file))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) not in docstrings and (text := _template(node)) is not None:
                found.setdefault(text, set())
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            # what a field's validator raises reaches the user as a ConfigError
            code = 2 if name == "ValueError" and file.name == "config.py" else codes.get(name)
            if code is not None:
                for part in ast.walk(node):
                    if (text := _template(part)) is not None:
                        found.setdefault(text, set()).add(code)
    return [(text, frozenset(given)) for text, given in found.items()]


def _template(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return None


def quoted(page: Path) -> Iterator[tuple[str, int | None]]:
    """Messages of the page's tables that have a column of that name, and the exit code of the section."""
    code, inside = None, False
    for line in text_of(page).splitlines():
        if line.startswith("## "):
            said = re.match(r"## Exit code (\d+)", line)
            code = int(said[1]) if said else None
        inside = line.startswith("| message |") or (inside and line.startswith("|"))
        if inside:
            for message in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                yield message, code


@pytest.mark.parametrize("name", ["troubleshooting.md", "choosing.md"])
def test_every_message_is_in_the_source_with_its_exit_code(name):
    found = list(quoted(DOCS / name))
    assert len(found) >= 6
    for message, code in found:
        parts = [part for part in message.split("…") if part.strip()]
        assert sum(map(len, parts)) >= 10, message
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        places = [codes for text, codes in messages() if pattern.search(text)]
        assert places, message
        known = frozenset().union(*places)
        assert code is None or not known or code in known, (message, known)


# --- numbers --------------------------------------------------------------------------------------


def rows_of(text: str) -> list[list[str]]:
    """Cells of each line of a table, but for the rule below its head."""
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if re.match(r"\| (?!---)", line)
    ]


def test_the_measured_table_is_the_report_s():
    section = text_of(DOCS / "choosing.md").split("## What was measured here")[1].partition("\n## ")[0]
    whole = text_of(DOCS / "reproduction/tiny/table.md").split("temperature 0.6")[1].partition("###")[0]
    head, *lines = rows_of(whole)
    given = {name: dict(zip(head, values, strict=True)) for name, *values in lines}  # its first head is empty
    (_, *columns), *shown = rows_of(section)
    assert len(shown) == 5
    for name, *values in shown:
        assert values == [given[name][column] for column in columns], name


def test_the_claims_are_the_report_s_own_sentences():
    report = json.loads(text_of(DOCS / "reproduction/tiny/report.json"))
    listed = re.findall(
        r"^- (.*)$", text_of(DOCS / "claims.md").split("own sentences:")[1].split("\n## ")[0], re.MULTILINE
    )
    assert len(listed) == 12
    assert set(listed) <= {claim["text"] for claim in report["claims"]}
    # choosing.md: no run of it was warned
    assert [run["warnings"] for run in report["training"]] == [[]] * len(report["training"])


def test_the_published_points_are_those_of_the_figure():
    from ibft.evaluation.score_plots import PUBLISHED

    rows = {row[0]: row[1:] for row in rows_of(text_of(DOCS / "claims.md"))}
    for name, points in PUBLISHED.items():
        assert rows[name] == [f"{first}, {last}" for first, last in points.values()]


def test_the_table_of_cards_is_what_the_planner_says():
    page = text_of(DOCS / "hardware.md")
    assert hardware.rewritten(page) == page
    assert "| `deepseek-coder-7b` | 6.91 B | 8 GiB | 7.6 GiB |" in page  # as in tests/test_estimate.py


def test_the_suggested_values_are_those_of_the_sweep():
    from ibft.sweep.grid import ALPHAS, BETAS, LAYERS

    rows = {row[0]: row[1].replace("**", "") for row in rows_of(text_of(DOCS / "choosing.md")) if len(row) == 2}
    for key, values in (("alpha", ALPHAS), ("beta", BETAS), ("layer", LAYERS)):
        assert rows[f"`ib.{key}`"].startswith(", ".join(f"{value:g}" for value in values)), key
    assert len(ALPHAS) * len(BETAS) * len(LAYERS) == 80
    assert "80 cells" in text_of(DOCS / "choosing.md")


# --- about the project ----------------------------------------------------------------------------


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    project = text_of(ROOT / "pyproject.toml")
    assert f'version = "{citation["version"]}"' in project
    assert f'license = "{citation["license"]}"' in project
    assert citation["authors"] == [{"name": "The ibft-fast authors"}]
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2510.16022"
    assert f"## {citation['version']} " in text_of(ROOT / "CHANGELOG.md")
