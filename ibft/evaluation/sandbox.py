"""A closed room for programs that nobody has read: one fresh process each, in three grades of isolation.

    bubblewrap   `bwrap`: own processes, no network, and of the file system only what the program needs, read-only:
                 not the user's home, not another sample's folder
    namespaces   the same by the kernel's user namespaces (`unshare` of util-linux), where bubblewrap is not installed
    limits       resource limits alone: the program can read what the user can read. Only where the caller asks for it.

In each: a session of its own, an empty environment, a private working folder, hard limits of CPU time, memory, file
size, open files, processes and core, capped output, no new process (a filter of system calls, where the kernel has
one), and at the end or the timeout the whole process group is killed, which takes a namespace's processes with it. So
does the death of the process that started it. The folder lies in memory, bounded, and is gone with the namespace; under
`limits` it is a temporary one, and only each file in it is bounded.
"""

import contextlib
import functools
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ibft.errors import SetupError

Tier = Literal["bubblewrap", "namespaces", "limits"]
INSIDE = Path(__file__).with_name("inside")
MIB = 1 << 20
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", "/nix/store")
COVERED = ("/proc/sys", "/proc/irq", "/proc/bus", "/proc/acpi", "/proc/scsi")  # of the host: root could write there
SCRATCH = str(64 * MIB)  # of /tmp and /dev/shm, each
HOME = "/ibft-sample"  # of a program: a name that hides nothing that it needs
DEVICES = ("null", "zero", "random", "urandom")
ENTRY = (sys.executable and os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8")


@dataclass(frozen=True)
class Limits:
    """Of each process. folder_bytes: of all files in its working folder. processes 0: it can start none; threads it
    can."""

    cpu_seconds: int
    memory_bytes: int = 1 << 30  # address space, interpreter included
    file_bytes: int = 16 * MIB
    folder_bytes: int = 64 * MIB
    open_files: int = 64
    processes: int = 0

    def __str__(self) -> str:
        settings = (self.cpu_seconds, self.memory_bytes, self.file_bytes, self.open_files, self.processes)
        return ",".join(map(str, settings))


@dataclass
class Ended:
    """How a process ended: `returncode` (negative: by that signal), why it was killed, what it wrote, up to a cap."""

    returncode: int
    stdout: bytes
    stderr: bytes
    killed: Literal["", "timed out", "too much output"] = ""


@dataclass(frozen=True)
class Sandbox:
    """tier: as `find_tier` says. readable: files and folders that programs may read, beside the system's."""

    tier: Tier
    readable: tuple[str, ...] = field(default_factory=lambda: (*python_folders(), str(INSIDE)))

    @contextlib.contextmanager
    def started(
        self, command: Sequence[str], limits: Limits, *, pass_fds: Sequence[int] = (), **streams: int
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A process in its room; at the end of the block both are gone.

        command: a program with its arguments, or a script of `inside`. streams: as Popen's, else /dev/null.
        """
        entry = [*ENTRY, str(INSIDE / "enter.py"), str(limits), *command]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL) | streams
        folder = tempfile.mkdtemp(prefix="ibft-judge-") if self.tier == "limits" else None
        try:
            process = subprocess.Popen(
                [*self.walls(limits.folder_bytes), *entry], cwd=folder or "/", env={}, start_new_session=True,
                pass_fds=pass_fds, **streams,
            )  # type: ignore[call-overload]  # fmt: skip
            try:
                yield process
            finally:
                end(process)
        finally:
            if folder is not None:
                remove(folder)

    def run(
        self, command: Sequence[str], limits: Limits, *, timeout: float, stdin: bytes = b"", output_bytes: int = MIB
    ) -> Ended:
        """From start to end; output_bytes: of stdout and of stderr each, more of them ends it."""
        pipe = subprocess.PIPE
        with self.started(command, limits, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            return talk(process, stdin, timeout, output_bytes)

    def walls(self, folder_bytes: int) -> list[str]:
        """The command that a program's own follows."""
        if self.tier == "limits":
            return []
        links = [path for path in SYSTEM if os.path.islink(path)]
        bound = [path for path in (*SYSTEM, *self.readable) if os.path.exists(path) and path not in links]
        covered = [path for path in COVERED if os.path.isdir(path)]
        if self.tier == "bubblewrap":
            return [
                shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--die-with-parent",
                "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox",
                "--proc", "/proc", *(word for path in covered for word in ("--tmpfs", path, "--remount-ro", path)),
                "--dev", "/dev", "--size", SCRATCH, "--tmpfs", "/dev/shm", "--size", SCRATCH, "--tmpfs", "/tmp",
                *(word for path in bound for word in ("--ro-bind", path, path)),
                *(word for path in links for word in ("--symlink", os.readlink(path), path)),
                "--size", str(folder_bytes), "--tmpfs", HOME, "--chdir", HOME, "--remount-ro", "/dev",
                "--remount-ro", "/", "--",
            ]  # fmt: skip
        script = ROOM.format(
            bound=" ".join(map(shlex.quote, bound)), links=" ".join(map(shlex.quote, links)),
            devices=" ".join(DEVICES), covered=" ".join(covered), scratch=SCRATCH, size=folder_bytes, home=HOME,
        )  # fmt: skip
        return [
            shutil.which("setpriv") or "setpriv", "--pdeathsig", "KILL", shutil.which("unshare") or "unshare",
            "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child",
            "/bin/sh", "-c", script, "sh",
        ]  # fmt: skip


# A new root, for this process and its children alone, on a folder that every system has and no program needs.
ROOM = """
set -e
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs -o size=4m tmpfs /sys
cd /sys
mkdir -p proc dev tmp .{home} old
mount -t tmpfs -o size={scratch},mode=1777 tmpfs tmp
for path in {bound}; do
  if [ -d "$path" ]; then mkdir -p ".$path"; else mkdir -p ".$(dirname "$path")"; : > ".$path"; fi
  mount --rbind "$path" ".$path"
  mount -o remount,bind,ro,nosuid,nodev ".$path" 2>/dev/null || mount -o remount,bind,ro ".$path"
done
for path in {links}; do cp -P "$path" ".$path"; done
for name in {devices}; do : > "dev/$name"; mount --bind "/dev/$name" "dev/$name"; done
mount -t proc proc proc
for path in {covered}; do mount -t tmpfs -o ro,size=4k tmpfs ".$path"; done
[ ! -e proc/sysrq-trigger ] || mount --bind /dev/null proc/sysrq-trigger
mount -t tmpfs -o size={size},mode=700 tmpfs .{home}
pivot_root . old
umount -l old
rmdir old
mount -o remount,ro /
cd {home}
# not exec: this shell stays the first process, whom no signal of its own kills
setpriv --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@" || exit $?
"""


def python_folders() -> list[str]:
    """Where the interpreter and its standard library lie, without those of virtual environments."""
    real = os.path.realpath(sys.executable)
    return [path for path in (sys.base_prefix, os.path.dirname(os.path.dirname(real))) if not path.startswith("/usr")]


def talk(process: subprocess.Popen[bytes], message: bytes, timeout: float, output_bytes: int) -> Ended:
    """Sends `message`, and gathers what comes back until both streams end, the time is up or the cap is reached."""
    deadline = time.monotonic() + timeout
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    received: dict[object, bytearray] = {stream: bytearray() for stream in streams}
    left = memoryview(message)
    killed: Literal["", "timed out", "too much output"] = ""
    with selectors.DefaultSelector() as selector:
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE)
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while any(key.fileobj in received for key in selector.get_map().values()):
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events and time.monotonic() >= deadline:
                killed = "timed out"
                break
            for key, _ in events:
                if key.fileobj is process.stdin:
                    try:
                        left = left[os.write(key.fd, left) :] if left else left
                    except BrokenPipeError:  # it does not read; its exit status says why
                        left = left[:0]
                    if not left:
                        selector.unregister(key.fileobj)
                        with contextlib.suppress(BrokenPipeError):
                            process.stdin.close()  # type: ignore[union-attr]
                    continue
                chunk = os.read(key.fd, 1 << 16)
                received[key.fileobj] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(received[key.fileobj]) > output_bytes:
                    killed = "too much output"
            if killed:
                break
    if not killed:  # both streams are closed; it may go on without them
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            killed = "timed out"
    end(process)
    stdout, stderr = (bytes(received.get(x, b"")[:output_bytes]) for x in (process.stdout, process.stderr))
    code = process.returncode
    code = 128 - code if 128 < code < 160 else code  # bwrap and setpriv hand a signal on as 128 + its number
    killed = "timed out" if code == -signal.SIGXCPU else killed
    return Ended(code, stdout, stderr, killed)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills its whole group, reaps it, closes its streams; does nothing where that has been done."""
    # Before wait(): until the leader is reaped, nobody else can get its group's number. A leader that is already
    # exiting keeps its status.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def remove(folder: str) -> None:
    """Also what a program has made unreadable, or nested deeper than Python can recurse: `rm` can."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        subprocess.run([*command, "--", folder], stderr=subprocess.DEVNULL, check=False)
        if not os.path.lexists(folder):
            return


def find_tier(*, allow_limits: bool = False) -> Tier:
    """The best that works here. Raises SetupError where none isolates and `allow_limits` is not given."""
    reasons = []
    for tier in ("bubblewrap", "namespaces"):
        if not (reason := why_not(tier)):
            return tier
        reasons.append(f"{tier}: {reason}")
    if not allow_limits:
        raise SetupError(
            f"no sandbox for programs here ({'; '.join(reasons)}); install bubblewrap (Debian: apt-get install"
            " bubblewrap), or let them run as you, without isolation (evaluate judge: --run-without-isolation; train:"
            " eval.run_without_isolation=true)"
        )
    if reason := why_not("limits"):
        raise SetupError(f"no program can be run under limits here: {reason}")
    return "limits"


@functools.cache
def why_not(tier: Tier) -> str | None:
    """Why programs cannot be run in this tier on this machine; None where they can: an empty one has been."""
    tool = {"bubblewrap": "bwrap", "namespaces": "unshare"}.get(tier)
    if tool and shutil.which(tool) is None:
        return f"{tool} is not installed"
    if os.name != "posix":
        return f"{sys.platform} has no process limits"
    if not sys.executable:
        return "the path of the Python interpreter is unknown"
    sandbox = Sandbox(tier)
    try:
        made = sandbox.run(["whole.py"], Limits(cpu_seconds=60), timeout=60, stdin=b"ready\n")
    except OSError as error:
        return f"no process can be started: {error}"
    if made.stdout == b"ready":
        return None
    said = made.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"an empty program ended with {made.killed or made.returncode}"


def version(command: Sequence[str]) -> str | None:
    """First line that it prints; None where it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    made = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return (made.stdout or made.stderr).partition("\n")[0].strip()


__all__ = ["Ended", "Limits", "Sandbox", "Tier", "end", "find_tier", "talk", "version", "why_not"]
