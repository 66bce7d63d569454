"""First in the sandbox: limits this process, then becomes the program (`python -I -S enter.py SETTINGS COMMAND...`).

SETTINGS: `cpu_seconds,memory_bytes,file_bytes,open_files,processes`; processes 0: none can be started, threads can.
COMMAND: a program and its arguments, or a script of this folder (`tester.py`), which is run in this interpreter: the
time that an interpreter takes to start is that of every verdict.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

THREADS = 256  # of a program that may start no process
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 4, 22, 38, 2
SIGKILL = 9
CLONE_THREAD, AF_UNIX = 0x10000, 1
EPERM, EACCES, ENOSYS = 1, 13, 38
# audit architecture, clone, clone3, socket, and the calls that are refused: fork and vfork; unshare, setns; mount,
# umount2, pivot_root; shmget, shmat, msgget, semget (memory that no limit counts, and that outlives a process);
# add_key, request_key, keyctl (what the next sample could read); bpf, perf_event_open, userfaultfd, ptrace
CALLS = {
    "x86_64": (
        0xC000003E, 56, 435, 41,
        (57, 58, 272, 308, 165, 166, 155, 29, 30, 68, 64, 248, 249, 250, 321, 298, 323, 101),
    ),
    "aarch64": (
        0xC00000B7, 220, 435, 198, (97, 268, 40, 39, 41, 194, 196, 186, 190, 217, 218, 219, 280, 241, 282, 117),
    ),
}  # fmt: skip
# the same on both: io_uring_* (sockets past this filter); open_tree, move_mount, fsopen, fsconfig, fsmount, and
# mount_setattr
NEW_CALLS = (425, 426, 427, 428, 429, 430, 431, 432, 442)


def limit(name: str, value: int) -> None:
    """Lower a resource limit, soft and hard, to `value`, or to the hard limit where that is lower already."""
    which = getattr(resource, name, None)
    if which is None:  # the platform does not have it
        return
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the wall-clock limit of the parent still holds
        if sys.platform.startswith("linux"):
            raise


def forbid_processes() -> bool:
    """From now on: no new process (threads may be), no socket but a local one, no namespace, no mount, no key, no
    memory beyond the limits. False where the system cannot.

    A filter of system calls, since the limit of processes does not hold root.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in CALLS:
        return False
    architecture, clone, clone3, socket, refused = CALLS[platform.machine()]
    load, equal, at_least, has_bits, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse = {error: 0x50000 | error for error in (EPERM, EACCES, ENOSYS)}
    program: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (end, 0, 0, kill),  # x32, a second table of calls
    ]  # fmt: skip
    for call in (*refused, *NEW_CALLS):
        program += [(equal, 0, 1, call), (end, 0, 0, refuse[EPERM])]
    program += [(equal, 0, 1, clone3), (end, 0, 0, refuse[ENOSYS])]  # its flags lie in memory: callers fall back
    for call, test, value, error in ((clone, has_bits, CLONE_THREAD, EPERM), (socket, equal, AF_UNIX, EACCES)):
        program += [
            (equal, 0, 4, call), (load, 0, 0, 16), (test, 0, 1, value), (end, 0, 0, allow), (end, 0, 0, refuse[error]),
        ]  # fmt: skip
    program.append((end, 0, 0, allow))
    code = b"".join(struct.pack("HBBI", *one) for one in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0) == 0


def main() -> None:
    settings, program, *arguments = sys.argv[1:]
    cpu_seconds, memory_bytes, file_bytes, open_files, processes = map(int, settings.split(","))
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_CPU", cpu_seconds)
    limit("RLIMIT_AS", memory_bytes)
    limit("RLIMIT_FSIZE", file_bytes)
    limit("RLIMIT_NOFILE", open_files)
    limit("RLIMIT_NPROC", processes or (THREADS if forbid_processes() else 0))
    if sys.platform.startswith("linux"):
        prctl = ctypes.CDLL(None).prctl
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # whoever waits for it is killed: nobody else would end it
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody of the same user reads this one's memory
    if not program.endswith(".py"):
        os.execv(program, [program, *arguments])
    folder = os.path.dirname(os.path.abspath(__file__))
    path = os.path.join(folder, program)
    with open(path, encoding="utf-8") as file:
        code = compile(file.read(), path, "exec")
    sys.path.insert(0, folder)
    sys.argv = [path, *arguments]
    exec(code, {"__name__": "__main__", "__file__": path})


if __name__ == "__main__":
    main()
