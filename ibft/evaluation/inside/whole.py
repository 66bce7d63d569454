"""Program and test in one process, as the suites' own harnesses run them: `whole.py`.

On stdin: a line with a secret and, after a space, the packages that the program may import, if any (JSON of what
`packages.allow` takes); then the program's text. On stdout: the secret if the program ran to its end, else what stopped
it. The program gets /dev/null for stdin, stdout and stderr.
"""

import os
import sys


def describe(error):
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except BaseException:  # the program's own exception class may fail to print
        return name


def main():
    first, _, program = sys.stdin.buffer.read().decode().partition("\n")
    secret, _, folders = first.partition(" ")
    if folders:  # imported for those alone: the time that this takes to start is that of every verdict
        import json

        import packages

        packages.allow(json.loads(folders))
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    # Bound before the program runs, which may replace them.
    write, leave = os.write, os._exit
    module = type(sys)("candidate")  # of its own, so that what looks a class's module up (dataclasses) finds it
    sys.modules["candidate"] = module
    report = secret
    try:
        exec(compile(program, "<candidate>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too: leaving early is not passing
        report = f"failed: {describe(error)}"[:300]
    write(verdict, report.encode(errors="replace"))
    leave(0)  # at once: neither the program's threads nor its exit handlers get a say


main()
