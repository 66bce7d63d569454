"""README.md and the pages of docs/, and the commands that are on them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {DOCS / "cli.md", DOCS / "config.md"}
PAGES = [ROOT / "README.md", *sorted(set(DOCS.glob("*.md")) - GENERATED)]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


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
