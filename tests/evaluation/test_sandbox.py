"""The sandbox in each of its grades: limits, clean-up, what a program sees of its surroundings."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from ibft.errors import SetupError
from ibft.evaluation import sandbox as module
from ibft.evaluation.sandbox import MIB, Ended, Limits, Sandbox, find_tier, why_not

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems enforce less")
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture(params=["bubblewrap", "namespaces", "limits"])
def sandbox(request):
    if reason := why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return Sandbox(request.param)


def run(sandbox: Sandbox, program: str, *, timeout: float = 10.0, output_bytes: int = MIB, **limits: int) -> Ended:
    """Of a Python program that may print."""
    with sandbox.folder() as folder:
        return sandbox.run(
            [PYTHON, "-I", "-S", "-c", program], folder, Limits(**{"cpu_seconds": 10} | limits),
            timeout=timeout, output_bytes=output_bytes,
        )  # fmt: skip


def test_output_and_exit_status_come_back(sandbox):
    program = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)"
    assert run(sandbox, program) == Ended(3, b"out\n", b"err\n")


def test_it_reads_what_it_is_sent(sandbox):
    text = b"x" * (3 * MIB)  # more than a pipe holds
    with sandbox.folder() as folder:
        command = [PYTHON, "-I", "-S", "-c", "import sys; print(len(sys.stdin.buffer.read()))"]
        ended = sandbox.run(command, folder, Limits(cpu_seconds=10), timeout=10, stdin=text)
    assert ended == Ended(0, b"%d\n" % len(text), b"")


def test_a_signal_is_told_from_an_exit(sandbox):
    assert run(sandbox, "import os\nos.kill(os.getpid(), 11)").returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time\ntime.sleep(60)", "import os\nos.closerange(0, 9)\nwhile 1: pass"]
)
def test_timeout(sandbox, program):
    start = time.monotonic()
    assert run(sandbox, program, timeout=0.5).killed == "timed out"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_capped(sandbox, stream):
    ended = run(sandbox, f"import sys\nwhile True: sys.{stream}.write('x' * 10**5)", output_bytes=10**5, timeout=20)
    assert ended.killed == "too much output"
    assert max(len(ended.stdout), len(ended.stderr)) == 10**5


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("x = bytearray(2 << 30)", b"MemoryError"),
        ("open('a', 'wb').write(bytes(20 << 20))", b"File too large"),
        ("fs = [open('/dev/null') for _ in range(80)]", b"Too many open files"),
        ("import os\nos.fork()", b"Operation not permitted"),
        ("import os\nos.posix_spawn('/bin/true', ['true'], {})", b"Operation not permitted"),
        ("import socket\nsocket.socket()", b"Permission denied"),
    ],
)
def test_limits(sandbox, program, said):
    ended = run(sandbox, program)
    assert ended.returncode == 1
    assert said in ended.stderr


def test_threads_can_be_started(sandbox):
    program = "import threading\nt = threading.Thread(target=print, args=('on',))\nt.start()\nt.join()"
    assert run(sandbox, program).stdout == b"on\n"


def test_processes_can_be_allowed(sandbox):
    assert (
        run(sandbox, "import os\nprint(os.waitpid(os.fork() or os._exit(7), 0)[1] >> 8)", processes=64).stdout == b"7\n"
    )


def test_limits_are_hard(sandbox):
    program = """
import resource as r
for name in ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE"):
    print(name, *r.getrlimit(getattr(r, f"RLIMIT_{name}")))
"""
    lines = [line.split() for line in run(sandbox, program).stdout.decode().splitlines()]
    most = {"CPU": 10, "AS": 1 << 30, "FSIZE": 16 * MIB, "NOFILE": 64, "NPROC": 256, "CORE": 0}
    assert [name for name, *_ in lines] == [*most]
    assert all(soft == hard and 0 <= int(hard) <= most[name] for name, soft, hard in lines), lines


def test_a_lower_hard_limit_is_respected(tmp_path):
    """Under a lower limit of files than the sandbox would set, it runs all the same."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ibft.evaluation.sandbox import Sandbox, Limits
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sandbox = Sandbox("limits")
with sandbox.folder() as folder:
    program = "open('a', 'wb').write(bytes(9999))"
    print(sandbox.run([{PYTHON!r}, "-I", "-c", program], folder, Limits(cpu_seconds=5), timeout=5).stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "File too large" in done.stdout, done.stderr


def test_the_environment_is_empty_and_the_folder_private(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    program = """
import os
print(set(os.environ) - {"LC_CTYPE", "PWD", "SHLVL", "_", "OLDPWD"}, os.listdir())
"""
    assert run(sandbox, program).stdout == b"set() []\n"


@pytest.mark.parametrize("tier", ["bubblewrap", "namespaces"])
def test_of_the_system_only_what_programs_need_is_there(tier, tmp_path):
    if reason := why_not(tier):
        pytest.skip(reason)
    (tmp_path / "mine").write_text("x")
    hidden = [str(tmp_path / "mine"), "/etc/passwd", __file__, "/sys/class/net"]
    program = f"""
import os
print([path for path in {hidden!r} if os.path.exists(path)])
print(*os.listdir("/"))
print(sum(name.isdigit() for name in os.listdir("/proc")))
"""
    found, top, processes = run(Sandbox(tier), program).stdout.decode().splitlines()
    assert found == "[]"
    system = {path.split("/")[1] for path in module.SYSTEM}
    needed = {Path(path).parts[1] for path in Sandbox(tier).readable}
    assert {*top.split()} <= system | needed | {"dev", "proc", "tmp", "ibft-sample"}
    assert int(processes) <= 3


@pytest.mark.parametrize("ending", ["pass", "1 / 0", "os._exit(0)", "while True: pass"])
def test_the_folder_is_removed(sandbox, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run(sandbox, f"import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.chmod('a', 0)\n{ending}", timeout=1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_folder_is_not_followed_on_removal(sandbox, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    run(sandbox, f"import os\nos.symlink({str(tmp_path / 'kept')!r}, 'link')\nos.makedirs('d')\nos.chmod('d', 0)")
    assert (tmp_path / "kept/file").read_text() == "x"


def test_without_isolation_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    why_not.cache_clear()
    with pytest.raises(SetupError, match=r"bwrap is not installed.*unshare is not installed.*--run-without-isolation"):
        find_tier()
    assert find_tier(allow_limits=True) == "limits"
    monkeypatch.setattr(module, "ENTRY", ("/no/such/python",))
    why_not.cache_clear()
    with pytest.raises(SetupError, match="no process can be started"):
        find_tier(allow_limits=True)
    monkeypatch.setattr(module, "ENTRY", ("/bin/false",))
    why_not.cache_clear()
    with pytest.raises(SetupError, match="an empty program ended with 1"):
        find_tier(allow_limits=True)
    why_not.cache_clear()
