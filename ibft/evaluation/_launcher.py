"""Runs one candidate program in the fresh interpreter that `judge` starts (`python -I -S` on this file).

Protocol. On stdin: a line `nonce cpu_seconds memory_bytes file_bytes`, then the program's text. On stdout: the nonce
if the program ran to its end, else what stopped it. The program itself gets /dev/null for stdin, stdout and stderr.
Nothing is imported beyond what the interpreter has loaded anyway: the start-up time is that of every verdict.
"""

import os
import resource
import sys


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


def describe(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except BaseException:  # the program's own exception class may fail to print
        return name


def main() -> None:
    header, _, program = sys.stdin.buffer.read().decode().partition("\n")
    nonce, *limits = header.split()
    cpu_seconds, memory_bytes, file_bytes = map(int, limits)
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)

    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_CPU", cpu_seconds)
    limit("RLIMIT_AS", memory_bytes)
    limit("RLIMIT_FSIZE", file_bytes)
    limit("RLIMIT_NOFILE", 32)
    limit("RLIMIT_NPROC", 0)  # no new process or thread; the kernel does not hold root to it

    # Bound before the program runs, which may replace them.
    write, leave = os.write, os._exit
    # A module of its own, so that what looks a class's module up (dataclasses, pickle) finds it.
    module = type(sys)("candidate")
    sys.modules["candidate"] = module
    report = nonce
    try:
        exec(compile(program, "<candidate>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too: leaving early is not passing
        report = f"failed: {describe(error)}"[:300]
    write(verdict, report.encode(errors="replace"))
    leave(0)  # at once: neither the program's threads nor its exit handlers get a say


main()
