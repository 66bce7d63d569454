"""`ibft-fast doctor`: can this machine train, and what would mend or help it? One line a check.

A check is a function without arguments that returns a `Finding`; one that fails in a way that it does not know is a
line too. Nothing is imported before the check that needs it: a machine without torch is told so.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import typer

from ibft.doctor import gpu, machine, packages, tools
from ibft.doctor.finding import Finding, first_line
from ibft.errors import SetupError
from ibft.output import to_stdout

Check = Callable[[], Finding]
CHECKS: dict[str, Check] = {
    "Python": packages.python,
    "packages": packages.required,
    "torch": packages.torch,
    "NVIDIA driver": gpu.driver,
    "CUDA": gpu.cuda,
    "GPUs": gpu.several,
    "GPU memory": gpu.memory,
    "Triton": gpu.kernels,
    "bitsandbytes": gpu.four_bits,
    "memory": machine.memory,
    "threads": machine.threads,
    "disk: here": machine.here,
    "disk: models": machine.hub_cache,
    "disk: encoded data": machine.encoded_data,
    "hub": tools.hub,
    "sandbox": tools.sandbox,
    "Icarus Verilog": tools.icarus,
}
COLORS = {"ok": "green", "note": "cyan", "warning": "yellow", "missing": "red"}


def run_doctor(checks: Mapping[str, Check], *, as_json: bool = False) -> int:
    """Prints a line of each check as it is done, or all as JSON at the end. The exit code: 0, or 4 where one that
    training needs is missing.

    Raises:
        DataError: stdout is closed, or takes no more.
    """
    found: dict[str, Finding] = {}
    for name, finding in examine(checks):
        found[name] = finding
        if not as_json:
            print_line(name, finding)
    missing = [name for name, finding in found.items() if finding.state == "missing"]
    if as_json:
        rows = [{"check": name, **asdict(finding)} for name, finding in found.items()]
        said = json.dumps({"can_train": not missing, "checks": rows}, indent=2)
    else:
        said = f"ibft-fast train cannot run here: {', '.join(missing)}" if missing else "ibft-fast train can run here"
    to_stdout(f"{said}\n")
    return SetupError.exit_code if missing else 0


def examine(checks: Mapping[str, Check]) -> Iterator[tuple[str, Finding]]:
    """What each check finds. What libraries print or warn of meanwhile does not reach stdout."""
    for name, check in checks.items():
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                finding = check()
            except Exception as error:
                finding = Finding("warning", f"could not be checked: {first_line(error)}")
        yield name, finding


def print_line(name: str, finding: Finding) -> None:
    state = f"{finding.state:<8}"
    if sys.stdout is not None and sys.stdout.isatty():
        state = typer.style(state, fg=COLORS[finding.state])
    to_stdout(f"{state} {name:<19} {finding.found}{f' -> {finding.advice}' if finding.advice else ''}\n")
