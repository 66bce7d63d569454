"""Verdicts on Verilog designs (VerilogEval v1 and v2), simulated by Icarus Verilog.

official  the suite's rule to the letter: `iverilog -Wall -Winfloop -Wno-timescale -g2012 -s tb`, then `vvp`
          v1: test, prompt and completion; any word on stderr fails; `Mismatches: 0 in N samples` passes
          v2: completion, test and reference; some words fail wherever they stand, warnings do not; a line
          `Mismatches: 0 in N samples` passes
strict    warnings are allowed, and so is a `$display`; what must hold is that the test bench itself has compared as
          many samples as with the reference solution, and found all of them right:

          - its verdict carries a secret that the design is not told, and its modules and instances have secret names,
            so that no hierarchical name of the design reaches them;
          - the design's system tasks and functions are those that compute or print: none ends the simulation, opens a
            file or draws from the test bench's random numbers;
          - what is compiled is what was judged: all macros expanded, comments left out, no other directive left;
          - it forces nothing: an input that it forces would be forced for the reference too. (Driven otherwise, it is
            not: the suite's test benches keep all inputs in variables.)
"""

import math
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ibft.evaluation.python_judge import Verdict, ended_badly
from ibft.evaluation.sandbox import MIB, Ended, Limits, Sandbox, version
from ibft.evaluation.suites import Problem, Rule
from ibft.evaluation.verilogeval_v2 import header_for

MISMATCHES = re.compile(r"Mismatches: ([0-9]*) in ([0-9]*) samples")
REPORT = '"Mismatches: %1d in %1d samples"'
EXPANDED_BYTES, OUTPUT_BYTES = 4 * MIB, 16 * MIB
FILE_BYTES = 256 * MIB  # test benches write what an oscilloscope would show
NOT_COMPILED = 97  # how inside/icarus.py ends then
DIRECTIVES = frozenset({"`timescale", "`default_nettype", "`resetall", "`celldefine", "`endcelldefine"})
FORCING = frozenset({"force", "release"})
RENAMED = frozenset({"tb", "reference_module", "RefModule", "stimulus_gen", "stim1", "good1", "top_module1"})
# v2: a line with one of these decides, whatever comes after it; a line with one of the others does at the end
DECISIVE_V2 = (
    "syntax error",
    "error: This assignment requires an explicit cast",
    "error: Sized numeric constant must have a size greater than zero",
    "warning: always_comb process has no sensitivities",
    "found no sensitivities so it will never trigger",
    "is declared here as wire",
    "Unknown module type",
    "Unable to bind wire/reg/memory `clk'",
    "TIMEOUT",
)
FAILING_V2 = ("Unable to bind wire/reg", "error")
MATCHED_V2 = re.compile(r"Mismatches: 0+ in \d+ samples$")
TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?(?:\*/|\Z))
      | (?P<text>"(?:\\.|[^"\\\n])*")
      | (?P<escaped>\\[^\s]+)
      | (?P<system>\$[A-Za-z0-9_$]+)
      | (?P<directive>`[A-Za-z_][\w$]*)
      | (?P<number>(?:
            '[sS]?(?: [bB]\s*[01xXzZ?_]+ | [oO]\s*[0-7xXzZ?_]+ | [hH]\s*[0-9a-fA-FxXzZ?_]+
                    | [dD]\s*(?: [0-9][0-9_]* | [xXzZ?]_* ) )
          | '[01xXzZ]
          | [0-9][0-9_]*(?:\.[0-9][0-9_]*)?(?:[eE][+-]?[0-9][0-9_]*)?
        )(?P<glued>[\w$]*))
      | (?P<name>[A-Za-z_][\w$]*)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
KINDS = ("space", "text", "escaped", "system", "directive", "number", "name", "other")
UNITS = frozenset({"s", "ms", "us", "ns", "ps", "fs"})
HARMLESS = frozenset(
    """
    $display $displayb $displayo $displayh $write $writeb $writeo $writeh $strobe $strobeb $strobeo $strobeh
    $monitor $monitorb $monitoro $monitorh $info $warning $error $sformatf $sformat
    $signed $unsigned $cast $clog2 $bits $typename $isunbounded $countones $countbits $onehot $onehot0 $isunknown
    $left $right $low $high $increment $size $dimensions $unpacked_dimensions
    $time $stime $realtime $rtoi $itor $realtobits $bitstoreal $shortrealtobits $bitstoshortreal
    $abs $min $max $floor $ceil $pow $sqrt $ln $log10 $exp $sin $cos $tan $asin $acos $atan $atan2 $hypot
    $sinh $cosh $tanh $asinh $acosh $atanh
    """.split()  # noqa: SIM905
)


def icarus_version() -> str | None:
    """Of `iverilog -V`; None where it is not installed."""
    return version(["iverilog", "-V"]) if shutil.which("vvp") else None


@dataclass
class VerilogJudge:
    """Judges designs; of each problem it simulates the reference solution once, for `strict`."""

    sandbox: Sandbox
    timeout: float
    samples: dict[str, int] = field(default_factory=dict)

    def judge(self, problem: Problem, completion: str, rule: Rule) -> Verdict:
        try:
            completion.encode()
        except UnicodeEncodeError as error:
            return Verdict(False, f"failed: not UTF-8 text: {error.reason}")
        if rule == "official":
            return (self.official_v2 if "ref" in problem else self.official_v1)(problem, completion)
        name = problem["task_id"]
        if name not in self.samples:
            found = self.reference_samples(problem)
            if isinstance(found, str):
                return Verdict(False, f"failed: the reference solution itself fails here: {found}")
            self.samples[name] = found
        return self.strict(problem, completion, self.samples[name])

    def official_v1(self, problem: Problem, completion: str) -> Verdict:
        text = f"{problem['test']}\n{problem['prompt']}\n{completion}"
        made = self.icarus("simulate", text, time.monotonic() + self.timeout, "tb")
        if made.killed:
            return Verdict(False, made.killed)
        said = made.stderr.decode(errors="replace")
        if "syntax error" in said:
            return Verdict(False, "failed: syntax error.")
        if said:
            return Verdict(False, "failed: compile error.")
        found = MISMATCHES.search(made.stdout.decode(errors="replace"))
        if found is None:
            return Verdict(False, "failed: info string not matched.")
        wrong, total = found.groups()
        return Verdict(True, "passed") if wrong == "0" else Verdict(False, f"failed: {wrong} out of {total} samples.")

    def official_v2(self, problem: Problem, completion: str) -> Verdict:
        text = f"{header_for(completion, problem)}\n{completion}\n{problem['test']}\n{problem['ref']}"
        made = self.icarus("simulate", text, time.monotonic() + self.timeout, "tb")
        if made.killed:
            return Verdict(False, made.killed)
        matched, failing = False, ""
        for line in (made.stderr + made.stdout).decode(errors="replace").splitlines():
            if found := next((words for words in DECISIVE_V2 if words in line), None):
                return Verdict(False, f"failed: {found}")
            failing = failing or next((words for words in FAILING_V2 if words in line), "")
            matched = matched or bool(MATCHED_V2.match(line))
        if failing or not matched:
            return Verdict(False, f"failed: {failing or 'mismatches, or no count of them'}")
        return Verdict(True, "passed")

    def reference_samples(self, problem: Problem) -> int | str:
        """How many samples the test bench compares with the reference solution; or why it does not pass."""
        found = self.counted(problem, problem["canonical_solution"])
        if isinstance(found, str):
            return found
        wrong, total = found
        return total if wrong == 0 and total > 0 else f"{wrong} mismatches in {total} samples"

    def strict(self, problem: Problem, completion: str, expected: int) -> Verdict:
        found = self.counted(problem, completion)
        if isinstance(found, str):
            return Verdict(False, found)
        wrong, total = found
        if total != expected:
            return Verdict(False, f"failed: {total} samples were compared, {expected} with the reference solution")
        return Verdict(True, "passed") if wrong == 0 else Verdict(False, f"failed: {wrong} out of {total} samples.")

    def counted(self, problem: Problem, completion: str) -> tuple[int, int] | str:
        """(wrong, compared) samples by the strict rule; or why there is no such count."""
        deadline = time.monotonic() + self.timeout
        bench = Bench()
        border = f"border_{secrets.token_hex(16)}"
        test, head = problem["test"], problem["prompt"]
        if "ref" in problem:  # v2
            test, head = f"{test}\n{problem['ref']}", header_for(completion, problem)
        made = self.icarus("expand", f"{test}\n{border}\n{head}\n{completion}", deadline)
        if made.killed == "timed out":
            return made.killed
        if made.killed or made.returncode != 0:
            return "failed: it cannot be preprocessed"
        test, _, design = made.stdout.decode(errors="replace").partition(border)  # the first: what the design includes
        text, faults = checked(design)  #                                           comes after it
        if faults:
            return f"failed: it uses {', '.join(faults)}"
        made = self.icarus("simulate", bench.renamed(test) + text, deadline, bench.top)
        if fault := ended_badly(made):
            return fault
        if made.returncode == NOT_COMPILED:
            return "failed: syntax error." if b"syntax error" in made.stderr else "failed: compile error."
        found = bench.verdict(made)
        return f"failed: {found}" if isinstance(found, str) else found

    def icarus(self, what: Literal["expand", "simulate"], text: str, deadline: float, *top: str) -> Ended:
        """Runs `inside/icarus.py`."""
        command = ["icarus.py", what, shutil.which("iverilog") or "iverilog", shutil.which("vvp") or "vvp", *top]
        limits = Limits(math.ceil(self.timeout) + 1, file_bytes=FILE_BYTES, folder_bytes=FILE_BYTES, processes=4096)
        output = EXPANDED_BYTES if what == "expand" else OUTPUT_BYTES
        timeout = max(0.0, deadline - time.monotonic())
        return self.sandbox.run(command, limits, timeout=timeout, stdin=text.encode(), output_bytes=output)


@dataclass
class Bench:
    """Secret names and a secret word for a test bench, drawn after its file and the design's are preprocessed."""

    names: str = field(default_factory=lambda: secrets.token_hex(8))
    secret: str = field(default_factory=lambda: secrets.token_hex(16))  # another: `%m` tells a design the names

    @property
    def top(self) -> str:
        return f"tb_{self.names}"

    def renamed(self, test: str) -> str:
        parts = [f"{text}_{self.names}" if kind == "name" and text in RENAMED else text for kind, text in tokens(test)]
        return "".join(parts).replace(REPORT, f'"{self.secret} %1d %1d\\n"')

    def verdict(self, made: Ended) -> tuple[int, int] | str:
        """(wrong, compared) samples, by the one line that only the test bench can have written."""
        found = re.findall(rf"{self.secret} +(\d+) +(\d+)", made.stdout.decode(errors="replace"))
        if len(found) != 1:
            return "more than one verdict" if found else "the test bench did not come to its verdict"
        return int(found[0][0]), int(found[0][1])


def checked(design: str) -> tuple[str, list[str]]:
    """(the preprocessed design without its comments, what it uses and may not, sorted).

    Icarus takes `\\$name` for the system task, ends an escaped name at a control character, leaves out the rest of a
    line after directives that it does not know, and reads `1_force` as a number and a keyword: none of those may be
    there.
    """
    faults = set()
    bare = "".join(" " if text.startswith(("//", "/*")) else text for _, text in tokens(design))
    for kind, text in tokens(bare):
        if kind == "space":
            if set(text) - set(" \t\n\r"):
                faults.add("a control character")
            continue
        if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
            faults.add("a control character")
        if (
            (kind == "system" and text not in HARMLESS)
            or (kind == "escaped" and text.startswith("\\$"))
            or (kind == "directive" and text not in DIRECTIVES)
            or (kind == "name" and text in FORCING)
        ):
            faults.add(text)
        if kind == "other" and text in '"`\\':
            faults.add(f"a stray {text}")
        if kind == "number" and (glued := TOKEN.fullmatch(text)["glued"]) and glued not in UNITS:  # type: ignore[index]
            faults.add(f"a number and {glued} in one")
    return bare, sorted(faults)


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each token of Verilog, spaces and comments too."""
    for found in TOKEN.finditer(text):
        yield next(kind for kind in KINDS if found[kind] is not None), found[0]
