"""What the base model reads: documents about the pool's functions, in other presentations than the tasks'.

Most documents are source code, with the description where a programmer would put it (docstring, comment above, comment
inside, comment below) and the body often a loop. A small share, `INSTRUCTION_SHARE`, has the tasks' own form, so that
the base can follow an instruction, if badly. No document shows a composition of the train, validation or test tasks.
"""

import random
from collections.abc import Iterator

from .compose import Composition, function_name
from .generator import instruction, split
from .primitives import FAMILIES

INSTRUCTION_SHARE = 0.02
_EXAMPLES = ("data", "given", "stuff", "source")


def document(composition: Composition, rng: random.Random, instruction_share: float = INSTRUCTION_SHARE) -> str:
    """One document: a function of this composition, presented in one of six ways."""
    family, name = composition.family, function_name(rng)
    arg, var = rng.choice(family.args), rng.choice(family.variables)
    if rng.random() < instruction_share:
        return f"{instruction(composition, name, rng)}\n{composition.one_line(name, arg, var)}"
    write = composition.one_line if rng.random() < 0.6 else composition.loop
    code = write(name, arg, var)
    match rng.randrange(5):
        case 0:
            head, body = code.split("\n", 1)
            return f'{head}\n    """Return {composition.describe(rng)}."""\n{body}'
        case 1:
            return f"# {composition.describe(rng)}\n{code}"
        case 2:
            return composition.loop(name, arg, var, note=composition.order(rng))
        case 3:
            return f"# {name}: {composition.describe(rng)}\n{code}\n\n\nprint({name}({rng.choice(_EXAMPLES)}))"
        case _:
            return f"{code}\n\n\n# {name} returns {composition.describe(rng)}"


def documents(seed: int, instruction_share: float = INSTRUCTION_SHARE) -> Iterator[str]:
    """An endless stream of documents; every family is equally frequent, each with its pool's compositions at random."""
    rng = random.Random(seed)
    pool = split()["pool"]
    members = [[c for c in pool if c.family is family] for family in FAMILIES]
    while True:
        yield document(rng.choice(rng.choice(members)), rng, instruction_share)
