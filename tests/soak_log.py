"""Reads `make soak`'s output: shows it, and keeps in tests/soak.log what a reader of the repository wants to know."""

import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

KEPT = re.compile(r"passed|failed|error|^\d+\.\d+s (call|setup)|^(FAILED|ERROR)", re.IGNORECASE)

lines = []
for line in sys.stdin:
    print(line, end="", flush=True)
    if KEPT.search(line) and "::" not in line.split(" ")[0]:
        lines.append(line.rstrip())
packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers", "peft", "bitsandbytes"))
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
header = [
    f"make soak of {commit.strip()}: property tests with 500 examples each",
    f"Python {platform.python_version()}, {packages}",
    "",
]
Path(__file__).with_name("soak.log").write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")
