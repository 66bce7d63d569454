"""Verdicts on answers that are numbers (GSM8K): nothing is run.

official  the first `#### number` of the completion is that of the answer, commas left out, as text: the rule of
          openai/grade-school-math
strict    it names one such number alone, and that equals the answer's: not one of several guesses
"""

import re
from decimal import Decimal, InvalidOperation

from ibft.evaluation.python_judge import Verdict
from ibft.evaluation.suites import Problem, Rule

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def judge_answer(problem: Problem, completion: str, rule: Rule) -> Verdict:
    expected, found = (
        [text.replace(",", "") for text in ANSWER.findall(each)] for each in (problem["answer"], completion)
    )
    if not expected:
        return Verdict(False, "the problem's answer has no line #### number")
    if not found:
        return Verdict(False, "failed: no line #### number")
    if rule == "official":
        return passed_or(found[0] == expected[0], found[0], expected[0])
    numbers = {number(text) for text in found}
    if len(numbers) > 1:
        return Verdict(False, f"failed: {len(numbers)} different answers")
    return passed_or(None not in numbers and numbers == {number(expected[0])}, found[0], expected[0])


def number(text: str) -> Decimal | None:
    try:
        return Decimal(text.rstrip("."))
    except InvalidOperation:
        return None


def passed_or(passed: bool, found: str, expected: str) -> Verdict:
    return Verdict(True, "passed") if passed else Verdict(False, f"failed: {found}, expected {expected}")
