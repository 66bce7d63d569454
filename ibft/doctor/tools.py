"""What a run may want beside the machine: the hub, a sandbox for code under test, Icarus Verilog."""

import re
import urllib.error
import urllib.request
from threading import Thread

from ibft.doctor.finding import Finding, first_line
from ibft.errors import SetupError

SECONDS = 4  # for the hub
OLDEST_ICARUS = 11


def hub() -> Finding:
    """Whether models and data can be fetched. Never more than a warning: without it local folders and the cache do."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("note", "HF_HUB_OFFLINE is set, so it is not asked: models and data are local or in the cache")
    token = get_token()
    answer = ask(f"{constants.ENDPOINT}/api/whoami-v2" if token else constants.ENDPOINT, token)
    if isinstance(answer, str):
        return Finding("note", f"{constants.ENDPOINT} cannot be reached ({answer}): local models and the cache do")
    if token and answer == 401:
        return Finding("warning", f"{constants.ENDPOINT} refuses the token", "hf auth login")
    if answer >= 400:
        return Finding("note", f"{constants.ENDPOINT} answers {answer}: try again later")
    if not token:
        return Finding("ok", f"{constants.ENDPOINT} answers; no token", "gated models need one: hf auth login")
    return Finding("ok", f"{constants.ENDPOINT} answers, and takes the token")


def ask(url: str, token: str | None) -> int | str:
    """The status that a server answers with, or why there is none. A resolver of names knows no time limit: hence the
    thread, which is left behind."""
    answers: list[int | str] = []
    thread = Thread(target=lambda: answers.append(status(url, token)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answers[0] if answers else f"no answer within {SECONDS} s"


def status(url: str, token: str | None) -> int | str:
    try:
        request = urllib.request.Request(url)
        if token:
            request.add_unredirected_header("Authorization", f"Bearer {token}")  # for this server alone
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except Exception as error:  # of a socket, TLS, a proxy, a server that speaks something else
        return first_line(getattr(error, "reason", error))


def sandbox() -> Finding:
    """Pass@1 of a run and `evaluate judge` run what a model has written."""
    from ibft.evaluation.sandbox import find_tier

    try:
        tier = find_tier()
    except SetupError as error:
        return Finding("warning", first_line(str(error)), "training does without: Pass@1 is then not judged")
    return Finding("ok", f"{tier}: programs under test are isolated")


def icarus() -> Finding:
    from ibft.evaluation.verilog_judge import icarus_version

    install = f"VerilogEval alone needs it, {OLDEST_ICARUS} or newer (Debian: apt-get install iverilog)"
    said = icarus_version()
    if said is None:
        return Finding("warning", "iverilog or vvp is not installed", install)
    number = re.search(r"version (\d+)", said)
    if number is None or int(number[1]) < OLDEST_ICARUS:
        return Finding("warning", said or "iverilog does not say its version", install)
    return Finding("ok", said)
