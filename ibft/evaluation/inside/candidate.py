"""The process of the code under test: `candidate.py`, frames on stdin and stdout.

Its first frame is the program; it answers each later one, a call of one of the program's names, with the value and what
has become of the arguments. What the program prints goes nowhere.
"""

import os
import sys

import wire


def main():
    calls, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    send, receive, encode, decode = wire.send, wire.receive, wire.encode, wire.decode
    module = type(sys)("candidate")  # of its own, so that what looks a class's module up (dataclasses) finds it
    sys.modules["candidate"] = module
    kept = []

    def keep(function):
        kept.append(function)
        return len(kept) - 1

    def name_of(error):
        """The nearest built-in class, its own name, and what it says."""
        built_in = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")
        try:
            return [built_in, type(error).__name__, str(error)[:300]]
        except BaseException:
            return [built_in, type(error).__name__, ""]

    def answer(message):
        what, *rest = message
        if what == "run":
            exec(compile(rest[0], "<candidate>", "exec", dont_inherit=True), module.__dict__)
            return None, None
        if what == "get":
            if rest[0] not in module.__dict__:
                raise NameError(f"name {rest[0]!r} is not defined")
            return encode(module.__dict__[rest[0]], keep), None
        function, arguments, named = kept[rest[0]], decode(rest[1]), decode(rest[2])
        value = encode(function(*arguments, **named), keep)
        return value, encode(arguments)

    while True:
        try:
            message = receive(calls)
        except wire.Closed:
            return
        try:
            value, arguments = answer(message)
            reply = {"value": value, "arguments": arguments}
        except wire.NotPlain as error:
            reply = {"unsendable": str(error)}
        except BaseException as error:  # SystemExit too: leaving early is not passing
            reply = {"error": name_of(error)}
        try:
            send(answers, reply)
        except wire.NotPlain as error:
            send(answers, {"unsendable": str(error)})


main()
