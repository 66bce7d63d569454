"""The documentation holds: links lead somewhere, commands parse, messages are those of the source, numbers those of the
committed files.

docs/cli.md and docs/config.md are made from the program, and have tests of their own.
"""

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, GENERATED, PAGES, ROOT, blocks, commands, own, text_of
from typer.main import get_command

from benchmarks.report import hardware
from ibft import errors
from ibft.cli import app
from ibft.load_config import ALIASES, known_keys, load_config, preset_names
from ibft.sweep.grid import read_grid

LINKED = [*PAGES, *sorted(GENERATED), *sorted(DOCS.glob("decisions/*.md")), ROOT / "CHANGELOG.md"]
SECTIONS = "model|data|lora|ib|train|eval|checkpoint|runtime"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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
