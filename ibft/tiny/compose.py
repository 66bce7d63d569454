"""One composition of blocks, as English and as Python.

`describe` gives the nominal phrase ("the sum of the squares of the even numbers in the list"), `order` the same as
steps, `one_line` and `loop` the function's two writings. All choices come from the caller's `random.Random`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from .primitives import FAMILIES, Family, Filter, Fold, Map

# Words that say nothing about a task and hardly occur in its English: what looks like a name is one.
_VERBS = ("get", "make", "find", "build", "run", "do", "solve", "scan", "fetch", "handle", "compute", "process",
          "load", "parse", "render", "track", "merge", "plan", "test", "trace")  # fmt: skip
_NOUNS = ("result", "answer", "output", "data", "thing", "entry", "record", "field", "unit", "block", "stage", "level",
          "figure", "score", "sample", "report", "task", "job", "view", "batch", "signal", "budget", "ticket",
          "profile")  # fmt: skip


def function_name(rng: random.Random) -> str:
    """A name that says nothing about the task, so that a model has to copy it."""
    return f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}"


@dataclass(frozen=True)
class Composition:
    """A filter, a map and a fold of one family."""

    family: Family
    filter: Filter
    map: Map
    fold: Fold

    @property
    def key(self) -> str:
        """Stable identity, `family:filter|map|fold`."""
        return f"{self.family.name}:{self.filter.key}|{self.map.key}|{self.fold.key}"

    def describe(self, rng: random.Random, plain: bool = False) -> str:
        """The result as a noun phrase, e.g. `the sum of the even numbers in the list`.

        `plain` takes each block's first wording; else one is drawn.
        """
        items = f"{_pick(self.filter.nouns, rng, plain)} {self.family.place}"
        noun = _pick(self.map.nouns, rng, plain)
        return _pick(self.fold.nouns, rng, plain).format(items=items, key=noun, mapped=noun.format(items=items))

    def order(self, rng: random.Random, plain: bool = False) -> str:
        """The result as steps, e.g. `keep only the even numbers, square each one, then add them up`."""
        steps = [_pick(block.steps, rng, plain) for block in (self.filter, self.map) if block.steps]
        steps.append(_pick(self.fold.steps, rng, plain).format(key=_pick(self.map.nouns, rng, plain)))
        return steps[0] if len(steps) == 1 else f"{', '.join(steps[:-1])}, then {steps[-1]}"

    def one_line(self, name: str, arg: str, var: str) -> str:
        """The reference solution: a single return where the fold has one, else its loop. Ends without a newline."""
        if not self.fold.code:
            return self.loop(name, arg, var)
        return f"def {name}({arg}):\n    {self._fill(self.fold.code, arg, var)}"

    def loop(self, name: str, arg: str, var: str, note: str = "") -> str:
        """The function written as a loop (as `one_line` where the fold has no loop); `note` becomes a comment."""
        if not self.fold.loop:
            return self.one_line(name, arg, var)
        start, step, result = (self._fill(part, arg, var) for part in self.fold.loop)
        lines = [f"def {name}({arg}):", f"    # {note}"] if note else [f"def {name}({arg}):"]
        lines += [f"    {start}", f"    for {var} in {self._fill('{it}', arg, var)}:"]
        if self.filter.cond:
            lines += [f"        if {self.filter.cond.format(v=var)}:", f"            {step}"]
        else:
            lines += [f"        {step}"]
        return "\n".join([*lines, f"    return {result}"])

    def function(self) -> Callable[[Any], Any]:
        """The reference solution as a callable."""
        namespace: dict[str, Any] = {}
        exec(self.one_line("solution", self.family.args[0], self.family.variables[0]), namespace)
        return namespace["solution"]

    def _fill(self, template: str, arg: str, var: str) -> str:
        element = self.map.expr.format(v=var)
        condition = f" if {self.filter.cond.format(v=var)}" if self.filter.cond else ""
        return template.format(v=var, it=self.family.iterable.format(arg=arg), e=element, if_=condition)


def _pick(wordings: tuple[str, ...], rng: random.Random, plain: bool) -> str:
    return wordings[0] if plain else rng.choice(wordings)


def compositions(family: Family) -> list[Composition]:
    """Every well-typed composition of a family, the plainest first."""
    return [
        Composition(family, f, m, fold)
        for f, m, fold in product(family.filters, family.maps, family.folds)
        if fold.takes in ("any", m.gives)
    ]


def all_compositions() -> list[Composition]:
    """Every well-typed composition of every family; some behave alike (see `generator.distinct`)."""
    return [c for family in FAMILIES for c in compositions(family)]
