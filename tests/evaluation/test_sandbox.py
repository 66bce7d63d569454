"""The sandbox in each of its grades: limits, clean-up, what a program sees of its surroundings."""

import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import uuid
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
    return sandbox.run(
        [PYTHON, "-I", "-S", "-c", program], Limits(**{"cpu_seconds": 10} | limits),
        timeout=timeout, output_bytes=output_bytes,
    )  # fmt: skip


def test_output_and_exit_status_come_back(sandbox):
    program = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)"
    assert run(sandbox, program) == Ended(3, b"out\n", b"err\n")


def test_it_reads_what_it_is_sent(sandbox):
    text = b"x" * (3 * MIB)  # more than a pipe holds
    command = [PYTHON, "-I", "-S", "-c", "import sys; print(len(sys.stdin.buffer.read()))"]
    ended = sandbox.run(command, Limits(cpu_seconds=10), timeout=10, stdin=text)
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
program = "open('a', 'wb').write(bytes(9999))"
print(sandbox.run([{PYTHON!r}, "-I", "-c", program], Limits(cpu_seconds=5), timeout=5).stderr)
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


@pytest.mark.parametrize("tier", ["bubblewrap", "namespaces"])
def test_the_folder_as_a_whole_is_bounded(tier):
    if reason := why_not(tier):
        pytest.skip(reason)
    program = """
written = 0
try:
    for number in range(100):
        with open(str(number), "wb", buffering=0) as file:
            written += file.write(bytes(1 << 20))
except OSError as error:
    print(written >> 20, error.strerror)
"""
    assert run(Sandbox(tier), program, folder_bytes=8 * MIB).stdout == b"8 No space left on device\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of system calls are x86_64's")
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("unshare", "272, 0x10000000"), ("setns", "308, 0, 0"), ("mount", "165, 0, b'/tmp', b'tmpfs', 0, 0"),
        ("shmget", "29, 0, 4096, 0o1600"), ("msgget", "68, 0, 0o1600"), ("semget", "64, 0, 1, 0o1600"),
        ("add_key", "248, b'user', b'a', b'b', 1, -3"), ("keyctl", "250, 0, -3, 0"), ("ptrace", "101, 0, 0, 0, 0"),
        ("io_uring_setup", "425, 1, ctypes.create_string_buffer(120)"), ("userfaultfd", "323, 1"),
        ("fsopen", "430, b'tmpfs', 0"),
    ],
)  # fmt: skip
def test_calls_that_reach_past_the_walls(sandbox, call, arguments):
    program = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.syscall({arguments}), ctypes.get_errno(), libc.syscall(39) > 0)"
    )
    assert run(sandbox, program).stdout == b"-1 1 True\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="a second table of system calls is x86_64's")
def test_the_second_table_of_system_calls_is_closed(sandbox):
    program = "import ctypes\nprint('on', flush=True)\nctypes.CDLL(None).syscall(0x40000000 | 57)\nprint('past')"
    ended = run(sandbox, program)
    assert (ended.returncode, ended.stdout) == (-signal.SIGSYS, b"on\n")


def test_nobody_reads_the_memory_of_its_scripts(sandbox):
    """PR_GET_DUMPABLE of the process that holds the secret, and that a debugger of the same user would need."""
    program = b"secret\nimport ctypes\nassert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0\n"
    ended = sandbox.run(["whole.py"], Limits(cpu_seconds=10), timeout=10, stdin=program)
    assert ended.stdout == b"secret"


def test_what_is_killed_takes_its_programs_with_it(sandbox, tmp_path):
    """SIGKILL, after which nobody is left to clean up."""
    mark = f"mark-{uuid.uuid4().hex}"
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from ibft.evaluation.sandbox import Sandbox, Limits
command = [{PYTHON!r}, "-I", "-X", {mark!r}, "-c", "import time; print('on', flush=True); time.sleep(60)"]
with Sandbox({sandbox.tier!r}).started(command, Limits(cpu_seconds=5), stdout=1):
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | {"TMPDIR": str(tmp_path)}) as judge:
        assert judge.stdout.readline() == b"on\n"
        assert with_mark(mark)
        judge.kill()
    deadline = time.monotonic() + 5
    while (left := with_mark(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert sandbox.tier == "limits" or list(tmp_path.iterdir()) == []


def with_mark(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"-X\0{mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


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
