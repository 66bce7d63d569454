"""What a model is asked, where its answer ends, and which part of the answer is judged.

    plain     the text that a base model continues: HumanEval's prompt as it is; MBPP's task and asserts as a docstring;
              a Verilog module's header, its description in front as a comment; `Question: ... Answer:` for GSM8K
    released  the instruction and a newline, no special tokens: what training teaches (`ibft.data.encode`)
    alpaca    the instruction in Alpaca's frame: what training teaches with data.template=alpaca
    chat      the instruction as a user's message, in the model's own chat template
    origen    OriGen's: `### Instruction: ... {description}\\n### Response: {module header}` (henryen/OriGen)

A plain or origen prompt ends in the midst of code, so that generation has to be stopped by the text; the others end
where the model ends them. This file imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ibft.errors import ConfigError, DataError
from ibft.evaluation.suites import Problem

Style = Literal["plain", "chat", "released", "alpaca", "origen"]
STYLES: tuple[Style, ...] = get_args(Style)

FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
AS_DESIGNER = (
    "Please act as a professional Verilog designer and provide Verilog code based on the given description. "
    "{description}"
)


@dataclass(frozen=True)
class Prompt:
    """`text` is a user's message where `chat`. special_tokens: whether the tokenizer puts its own (BOS) in front."""

    text: str
    chat: bool = False
    special_tokens: bool = True


@dataclass(frozen=True)
class Stops:
    """An answer ends before the first of `before` that it holds, or after the first of `after`."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def reached(self, text: str) -> bool:
        return any(stop in text for stop in (*self.before, *self.after))

    def cut(self, text: str) -> str:
        ends = [text.find(stop) for stop in self.before]
        ends += [place + len(stop) for stop in self.after if (place := text.find(stop)) >= 0]
        return text[: min((end for end in ends if end >= 0), default=len(text))]


# HumanEval's are those of Chen et al. 2021 (arXiv 2107.03374), section 3.1; MBPP's go with a docstring prompt, whose
# code begins at the start of a line. A completion of VerilogEval v1 is the rest of one module.
CONTINUES_CODE: Mapping[str, Stops] = {
    "humaneval": Stops(before=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    "mbpp": Stops(before=("\nclass", "\nassert", '\n"""', "\nprint", "\nif")),
    "verilogeval-v1": Stops(after=("endmodule",)),
    "verilogeval-v2-complete": Stops(after=("endmodule",)),
}

ANSWERS: Mapping[str, Stops] = {
    "gsm8k": Stops(before=("\nQuestion:",)),
    "verilogeval-v2": Stops(before=("\nQuestion:",), after=("[DONE]",)),
}
# the words of VerilogEval v2 (Pinckney et al. 2024, arXiv 2408.11053), without its in-context examples and rules
SPEC_TO_RTL = (
    "\nQuestion:\n{statement}\n\nEnclose your code with [BEGIN] and [DONE]. Only output the code snippet\n"
    "and do NOT output anything else.\n\nAnswer:\n"
)
TO_COMPLETE = (
    "// Implement the Verilog module based on the following description. Assume that signals are positive clock/clk "
    "triggered unless otherwise stated.\n"
)


def asked_as(suite: str) -> str:
    """EvalPlus asks what the suites ask that it extends, and tests the answers further."""
    return suite.removesuffix("-plus")


def choose_style(name: str, suite: str, *, template: str | None) -> Style:
    """`auto`: an adapter is asked as it was taught, a base by the plain text, but for jsonl-tests (released).

    template: in which the adapter was trained (`ibft.rundir.template_of`); None without an adapter.

    Raises:
        ConfigError: an unknown name; origen for another suite than VerilogEval; `auto` for a template of a file.
    """
    if name == "auto":
        if template is None:
            return "released" if suite == "jsonl-tests" else "plain"
        taught = "released" if template == "auto" else template
        if taught not in STYLES:
            raise ConfigError(
                f"this adapter was trained with data.template={template}: name a --prompt-style of {', '.join(STYLES)}"
            )
        return next(style for style in STYLES if style == taught)
    if name not in STYLES:
        raise ConfigError(f"--prompt-style: got {name}, expected auto, {', '.join(STYLES)}")
    if name == "origen" and suite != "verilogeval-v1":
        raise ConfigError(f"--prompt-style=origen asks for Verilog: expected --suite verilogeval-v1, got {suite}")
    return next(style for style in STYLES if style == name)


def stops_of(style: Style, suite: str) -> Stops:
    suite = asked_as(suite)
    if style in ("plain", "origen"):
        return ANSWERS.get(suite) or CONTINUES_CODE.get(suite, Stops())
    return Stops()


def make_prompt(style: Style, suite: str, problem: Problem, description: str | None = None) -> Prompt:
    """description: the problem statement of a VerilogEval problem, whose own text is only a module's header.

    Raises:
        ConfigError: the style needs a description. DataError: the problem lacks its text.
    """
    suite = asked_as(suite)
    if style == "plain":
        return Prompt(_plain(suite, problem, description))
    if style == "origen":
        said = AS_DESIGNER.format(description=_needed(description, style))
        return Prompt(f"### Instruction: {said}\n### Response: {problem['prompt']}")
    instruction = _instruction(style, suite, problem, description)
    if style == "alpaca":
        from ibft.data.formats import Pair
        from ibft.data.templates import Template

        extra = problem.get("input") if suite == "jsonl-tests" else None  # which the frame has a place of its own for
        asked = Pair(instruction, "", instruction)
        if isinstance(extra, str) and extra:
            asked = Pair(instruction, "", instruction.removesuffix(f"\n{extra}"), extra)
        return Prompt(Template("alpaca").prompt(asked), special_tokens=False)
    if style == "released":
        return Prompt(instruction + "\n", special_tokens=False)
    if suite == "gsm8k":
        instruction += "\nEnd with a line `#### ` and the number alone."
    return Prompt(instruction, chat=True, special_tokens=False)


def extract(style: Style, suite: str, raw: str) -> str:
    """The part of a model's answer that the suite judges; see `ibft.evaluation.judge`.

    The answer up to its stop; of that the inside of the first ``` fence, where it has one. Where the prompt ends in the
    midst of code only an answer that begins with a fence is in one: another fence ends it. HumanEval's whole functions
    stay as they are (Python takes the later definition); of VerilogEval's see `rest_of_module`. GSM8K's is all text.
    """
    suite = asked_as(suite)
    text = stops_of(style, suite).cut(raw)
    if suite == "gsm8k":
        return text
    if suite == "verilogeval-v2" and "[BEGIN]" in text:
        return text.partition("[BEGIN]")[2].partition("[DONE]")[0]
    in_code = style in ("plain", "origen") and suite in CONTINUES_CODE and not text.lstrip().startswith("```")
    code = text.partition("\n```")[0] if in_code else extract_code(text)
    return rest_of_module(code) if suite == "verilogeval-v1" else code


def extract_code(completion: str) -> str:
    """The inside of the first ``` fence (to the end where it is not closed); without a fence, the text itself."""
    match = FENCE.search(completion)
    return match.group(1) if match else completion


def _plain(suite: str, problem: Problem, description: str | None) -> str:
    if suite == "mbpp":
        asserts = "\n".join(problem["test_list"])
        return f'"""\n{_text(problem, "text", "prompt")}\n{asserts}\n"""\n'
    if suite == "gsm8k":
        return f"Question: {problem['question']}\nAnswer:"
    if suite == "verilogeval-v1" and description is not None:
        # some lines of the suite's own statements are comments already
        lines = [line if line.startswith("//") else f"// {line}".rstrip() for line in description.strip().split("\n")]
        return "\n".join([*lines, problem["prompt"]])
    if suite == "verilogeval-v2":
        return SPEC_TO_RTL.format(statement=problem["prompt"].strip())
    if suite == "verilogeval-v2-complete":
        said, module, header = problem["prompt"].partition("module TopModule")
        lines = [f"// {line}".rstrip() for line in said.strip().split("\n")]
        return TO_COMPLETE + "\n".join([*lines, "", module + header])
    return _task(problem) if suite == "jsonl-tests" else problem["prompt"]


def _instruction(style: Style, suite: str, problem: Problem, description: str | None) -> str:
    if suite == "humaneval":
        return f"Complete the following Python function.\n\n{problem['prompt'].rstrip()}"
    if suite == "mbpp":  # the words of Austin et al. 2021 (arXiv 2108.07732), section 4
        asserts = "\n".join(problem["test_list"])
        task = _text(problem, "text", "prompt")
        return (
            f"You are an expert Python programmer, and here is your task: {task} "
            f"Your code should pass these tests:\n\n{asserts}"
        )
    if suite == "verilogeval-v1":
        said = AS_DESIGNER.format(description=_needed(description, style))
        return f"{said}\n{problem['prompt'].rstrip()}"
    if suite == "verilogeval-v2" and style == "chat":
        return SPEC_TO_RTL.format(statement=problem["prompt"].strip()).strip()
    if suite in ("verilogeval-v2", "verilogeval-v2-complete"):
        return AS_DESIGNER.format(description=problem["prompt"].strip())
    return problem["question"] if suite == "gsm8k" else _task(problem)


def _task(problem: Problem) -> str:
    """As training reads a row: the instruction, and alpaca's `input` below it."""
    extra = problem.get("input")
    return _text(problem, "instruction", "prompt") + (f"\n{extra}" if isinstance(extra, str) and extra else "")


def _text(problem: Problem, *names: str) -> str:
    found = next((problem[name] for name in names if isinstance(problem.get(name), str)), None)
    if found is None:
        raise DataError(f"problem {problem['task_id']}: expected text under {' or '.join(names)}")
    return found


def _needed(description: str | None, style: Style) -> str:
    if description is None:
        raise ConfigError(
            f"--prompt-style={style} for verilogeval-v1 needs --descriptions FILE (the problem statements)"
        )
    return description


# -- Verilog -----------------------------------------------------------------------------------------------------------

# comments and texts are passed over; what is left comes word by word, else sign by sign
_VERILOG = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)|\"(?:\\.|[^\"\\\n])*\"|(?P<token>[\\`$]?\w+|[^\w\s])", re.DOTALL)

Token = tuple[str, int, int]  # text, start, end


def rest_of_module(text: str) -> str:
    """What follows the header of `top_module`, up to its `endmodule`, then its helper modules.

    A header that the answer repeats is stripped: what is judged is the problem's own header and this. Helper modules
    stay: those that follow the module with nothing but comments between, and those before the repeated header, which
    are put behind. What else is around the modules (words, directives, a second top_module) is left out. Without the
    `endmodule` the text stays to its end, and fails.
    """
    tokens = [(m["token"], m.start("token"), m.end("token")) for m in _VERILOG.finditer(text) if m["token"]]
    header = _repeated_header(tokens)
    if header is None:
        first, start, before = 0, 0, []
    else:
        semicolon = next((k for k in range(header, len(tokens)) if tokens[k][0] == ";"), None)
        if semicolon is None:  # cut off within the header
            return ""
        first, start, before = semicolon + 1, tokens[semicolon][2], _modules(tokens[:header])
    last = _end_of_module(tokens, first)
    if last is None:
        return text[start:]
    end = tokens[last][2]
    while _named(tokens, last + 1) not in (None, "top_module"):
        following = _end_of_module(tokens, last + 2)
        if following is None:
            break
        last, end = following, tokens[following][2]
    parts = [text[start:end], *(text[tokens[a][1] : tokens[b][2]] for a, b in before)]
    return "\n\n".join(parts) + "\n"


def _named(tokens: list[Token], k: int) -> str | None:
    """The name, where tokens[k] begins a module: `module NAME` and one of `(`, `#`, `;`. Words alone do not."""
    texts = [token[0] for token in tokens[k : k + 3]]
    return texts[1] if len(texts) == 3 and texts[0] == "module" and texts[2] in ("(", "#", ";") else None


def _end_of_module(tokens: list[Token], k: int) -> int | None:
    """The place of the `endmodule` that closes the module in which tokens[k] stands."""
    depth = 1
    for place in range(k, len(tokens)):
        if tokens[place][0] == "endmodule":
            depth -= 1
        elif _named(tokens, place):
            depth += 1
        if depth == 0:
            return place
    return None


def _repeated_header(tokens: list[Token]) -> int | None:
    """The place of the first `module top_module`, unless a body has ended before it: then it begins a second one."""
    depth = 0
    for place, (text, _, _) in enumerate(tokens):
        name = _named(tokens, place)
        if name == "top_module":
            return place
        depth += (name is not None) - (text == "endmodule")
        if depth < 0:
            return None
    return None


def _modules(tokens: list[Token]) -> list[tuple[int, int]]:
    """(first, last) token of each whole module."""
    found = []
    place = 0
    while place < len(tokens):
        last = _end_of_module(tokens, place + 1) if _named(tokens, place) else None
        if last is not None:
            found.append((place, last))
            place = last
        place += 1
    return found
