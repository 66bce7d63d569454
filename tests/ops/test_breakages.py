"""Every kernel broken on purpose, one way at a time: a named test must fail each time (the list: breakages.py)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from breakages import BREAKAGES

NAMES = [breakage.name for breakage in BREAKAGES]
SHARES = 4  # in the order of the list: the tests of one kernel without a breakage run once or twice


def test_the_list_is_long_and_has_no_double():
    assert len(NAMES) == len(set(NAMES)) >= 141


@pytest.mark.parametrize("share", range(SHARES))
def test_each_breakage_is_caught(share, soaking):
    """In a process of its own: its children are forked, which a process with torch's threads must not be.

    `make soak`: all of them; otherwise every tenth.
    """
    chosen = NAMES if soaking else NAMES[::10]
    names = chosen[share * len(chosen) // SHARES : (share + 1) * len(chosen) // SHARES]
    command = [sys.executable, str(Path(__file__).with_name("breakages.py")), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(re.findall(r"^caught    (.+)$", done.stdout, re.M)) == sorted(names)
