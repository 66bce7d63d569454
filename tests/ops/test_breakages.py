"""Every kernel broken on purpose, one way at a time: a named test must fail each time (the list: breakages.py)."""

import re
import subprocess
import sys
from pathlib import Path

from breakages import BREAKAGES


def test_each_breakage_is_caught():
    """In a process of its own: its children are forked, which a process with torch's threads must not be."""
    script = Path(__file__).with_name("breakages.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    caught = re.findall(r"^caught    (.+)$", done.stdout, re.M)
    assert sorted(caught) == sorted(b.name for b in BREAKAGES)
    assert len(set(caught)) >= 141
