"""The process of the test: `tester.py CALLS ANSWERS`, the file descriptors of the candidate's process.

On stdin JSON: `program` of the candidate; `before`, code that the test relies on (the prompt's helpers, imports);
`test`, the code of the test; `call`, the statement that runs it; `names` that the candidate defines; `packages` that
both may import. On stdout JSON: `passed` and `result`.

The test runs here, with stand-ins for the candidate's names that call them over there: what it compares is plain data
that this process has made, so only it can find that the test holds.
"""

import builtins
import json
import os
import sys

import packages
import wire


class CandidateFault(BaseException):
    """Not an Exception: a test that catches all of those must not take it for an answer."""


ENDING = (StopIteration, StopAsyncIteration)  # raised anew, they would end a loop of the test's early


class Candidate:
    """faults: what no test may pass over, not by a bare `except` either."""

    def __init__(self, calls, answers):
        self.calls, self.answers, self.faults = calls, answers, []

    def fault(self, text):
        self.faults.append(CandidateFault(text[:300]))
        return self.faults[-1]

    def ask(self, *message):
        """(value, arguments); raises what the candidate raised, as the nearest built-in exception."""
        try:
            wire.send(self.calls, message)
            reply = wire.receive(self.answers)
            if not isinstance(reply, dict):
                raise wire.Closed("a frame of another kind")
            if "unsendable" in reply:
                raise self.fault(f"it returned {str(reply['unsendable'])[:200]}, which the test cannot be given")
            if "error" in reply:
                nearest, name, text = map(str, reply["error"])
                kind = getattr(builtins, nearest, None)
                if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, ENDING):
                    raise self.fault(f"{name}: {text}")  # SystemExit and its like
                raise _made(kind, name, text)
            return reply["value"], reply["arguments"]
        except wire.Closed as error:
            raise self.fault(str(error)) from None
        except (KeyError, TypeError, ValueError) as error:
            if hasattr(error, "of_the_candidate"):
                raise
            raise self.fault("a frame of another kind") from None

    def get(self, name):
        return self.decode(self.ask("get", name)[0])

    def decode(self, data):
        try:
            return wire.decode(data, self.function)
        except wire.Closed as error:
            raise self.fault(str(error)) from None

    def function(self, number):
        def call(*arguments, **named):
            try:
                sent = wire.encode(arguments), wire.encode(named)
            except wire.NotPlain as error:
                raise self.fault(f"the test passes {error}, which the candidate cannot be given") from None
            value, after = self.ask("call", number, *sent)
            for given, now in zip(arguments, self.decode(after), strict=False):
                wire.refill(given, now)
            return self.decode(value)

        return call


def _made(kind, name, text):
    try:
        error = kind(text)
    except TypeError:  # UnicodeDecodeError and others want more
        error = Exception(text)
    error.of_the_candidate = name
    return error


def describe(error):
    name = getattr(error, "of_the_candidate", type(error).__name__)
    return f"failed: {error}" if isinstance(error, CandidateFault) else f"failed: {name}: {error}"


def main():
    job = json.loads(sys.stdin.buffer.read())
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    candidate = Candidate(*map(int, sys.argv[1:]))
    module = type(sys)("test")
    sys.modules["test"] = module
    try:
        if folders := job["packages"]:
            packages.allow(folders)
            candidate.ask("run", f"__import__('packages').allow({folders!r})")
        candidate.ask("run", job["program"])
        run(job["before"], module)
        for name in job["names"]:
            setattr(module, name, candidate.get(name))
        run(job["test"], module)
        run(job["call"], module)
        if candidate.faults:
            raise candidate.faults[0]
        verdict = {"passed": True, "result": "passed"}
    except BaseException as error:
        verdict = {"passed": False, "result": describe(error)[:300]}
    os.write(report, json.dumps(verdict).encode())
    os._exit(0)


def run(code, module):
    exec(compile(code, "<test>", "exec", dont_inherit=True), module.__dict__)


main()
