"""What the base model reads: documents about the pool's functions, in other presentations than the tasks'.

Most documents are source code, with the description where a programmer would put it (docstring, comment above, comment
inside, comment below), in each block's first wording, and the body often a loop. A small share, `INSTRUCTION_SHARE`,
has the tasks' own form and all wordings, so that the base follows an instruction, if badly: what fine-tuning on the
train tasks is to mend. The rest, `CALLS_SHARE`, only calls functions. No document shows a composition of the train,
validation or test tasks.
"""

import random
from collections.abc import Iterator

from .compose import Composition, function_name
from .generator import instruction, split
from .primitives import FAMILIES

INSTRUCTION_SHARE = 0.015
CALLS_SHARE = 0.25
_EXAMPLES = ("data", "given", "stuff", "source")


def calls(rng: random.Random) -> str:
    """A document that only uses functions: without it, copying a name takes far longer to emerge than programming."""
    names = [function_name(rng) for _ in range(rng.randint(1, 3))]
    lines = [f"print({name}({rng.choice(_EXAMPLES)}))" for _ in range(rng.randint(1, 3)) for name in names]
    return "\n".join([f"from tools import {', '.join(names)}", "", *lines])


def document(composition: Composition, rng: random.Random, instruction_share: float = INSTRUCTION_SHARE) -> str:
    """One document: a function of this composition, presented as code or as an instruction."""
    family, name = composition.family, function_name(rng)
    arg, var = rng.choice(family.args), rng.choice(family.variables)
    if rng.random() < instruction_share:
        return f"{instruction(composition, name, rng)}\n{composition.one_line(name, arg, var)}"
    write = composition.one_line if rng.random() < 0.6 else composition.loop
    code = write(name, arg, var)
    noun, usage = composition.describe(rng, plain=True), f"print({name}({rng.choice(_EXAMPLES)}))"
    match rng.randrange(6):
        case 0:
            head, body = code.split("\n", 1)
            return f'{head}\n    """Return {noun}."""\n{body}'
        case 1:
            return f"# {noun}\n{code}\n\n\n{usage}"
        case 2:
            return composition.loop(name, arg, var, note=composition.order(rng, plain=True))
        case 3:
            return f"{code}\n\n\n# {name} returns {noun}"
        case _:  # twice as frequent: the name has to be copied from the comment
            return f"# {name}: {noun}\n{code}\n\n\n{usage}"


def documents(seed: int, instruction_share: float = INSTRUCTION_SHARE) -> Iterator[str]:
    """An endless stream of documents, `CALLS_SHARE` of them `calls`; all families of functions are equally frequent."""
    rng = random.Random(seed)
    pool = split()["pool"]
    members = [[c for c in pool if c.family is family] for family in FAMILIES]
    while True:
        if rng.random() < CALLS_SHARE:
            yield calls(rng)
        else:
            yield document(rng.choice(rng.choice(members)), rng, instruction_share)
