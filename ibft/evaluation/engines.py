"""Who answers prompts: a model of transformers in this process, or any server that speaks OpenAI's protocol.

Both take requests and give raw texts in their order. A request names its temperature and its seed, and the randomness
of an answer comes from that seed alone: one uniform number a token, whatever else is in the batch.

    transformers   token = the first whose cumulative probability exceeds u, tokens in falling order of probability.
                   A row of a padded batch can differ from the same row elsewhere in the last bits of its logits, and
                   so, rarely, in a token: the same text is promised for the same batches on the same machine.
    server         POST /completions, or /chat/completions for the chat style, with the seed (its low 31 bits: what
                   every server can hold). What the server makes of the seed is its own.
"""

import contextlib
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ibft.errors import ConfigError, SetupError
from ibft.evaluation.prompts import Prompt, Stops

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Request:
    """temperature 0: greedy, and the seed has no effect."""

    prompt: Prompt
    temperature: float
    seed: int


class Engine(Protocol):
    def complete(self, requests: Sequence[Request]) -> list[str]:
        """The raw text of each answer, in order: up to the model's own end, a stop (which it may hold) or the limit."""


# -- transformers ------------------------------------------------------------------------------------------------------


@dataclass
class TransformersEngine:
    """model: a causal LM, or a PEFT model around one. A call of `complete` is one batch."""

    model: Any
    tokenizer: Any
    stops: Stops
    max_new_tokens: int
    top_p: float

    def complete(self, requests: Sequence[Request]) -> list[str]:
        from ibft.evaluation.generate import before_stop, continue_prompts, decode_new, pad_id_for, stop_ids_of

        stop_ids = stop_ids_of(self.model, self.tokenizer)
        rows = _Rows(self.tokenizer, requests, stop_ids, self.stops, self.top_p)
        continue_prompts(
            self.model,
            [encode_prompt(self.tokenizer, request.prompt) for request in requests],
            self.max_new_tokens,
            choose=rows.choose,
            all_stopped=rows.all_stopped,
            pad_id=pad_id_for(self.tokenizer, stop_ids),
        )
        return [decode_new(self.tokenizer, before_stop(ids, stop_ids)) for ids in rows.ids]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Raises ConfigError for a chat prompt where the tokenizer has no chat template."""
    text = prompt.text
    if prompt.chat:
        check_chat_template(tokenizer)
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer([text], add_special_tokens=prompt.special_tokens, verbose=False)["input_ids"][0]
    if not ids:
        raise ConfigError("a prompt has no token: it is empty, and the tokenizer puts none in front")
    return ids


def check_chat_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--prompt-style=chat: this model's tokenizer has no chat template; use plain or released")


def choose_tokens(logits: "Tensor", temperatures: Sequence[float], uniforms: Sequence[float], top_p: float) -> "Tensor":
    """The next id of each row: logits [B, V], a temperature and a uniform number in [0, 1) a row -> [B, 1].

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751) by the inverse of the cumulative distribution, in float64:
    kept are the most probable tokens whose probabilities reach top_p together, the first always; of equals the lower id
    comes first. Temperature 0 takes the most probable token.
    """
    import torch

    values, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    device = logits.device
    temperature = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None]
    sampled = temperature > 0
    probabilities = ((values - values[:, :1]) / torch.where(sampled, temperature, 1.0)).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    kept = (cumulative - probabilities < top_p).sum(-1, keepdim=True)
    mass = cumulative.gather(-1, kept - 1)
    place = torch.searchsorted(cumulative, uniform * mass, right=True)
    return ids.gather(-1, torch.where(sampled, torch.minimum(place, kept - 1), 0))


class _Rows:
    """The state of one batch: each row's source of noise, and its ids until it stops."""

    def __init__(
        self, tokenizer: Any, requests: Sequence[Request], stop_ids: set[int], stops: Stops, top_p: float
    ) -> None:
        self.tokenizer, self.stop_ids, self.stops, self.top_p = tokenizer, stop_ids, stops, top_p
        self.temperatures = [request.temperature for request in requests]
        # Python's generator takes all 64 bits of a seed (torch's on the CPU takes 32) and is the same everywhere
        self.noise = [random.Random(request.seed) for request in requests]
        self.ids: list[list[int]] = [[] for _ in requests]
        self.open = set(range(len(requests)))
        # a stop lies within so many tokens, if each is a byte; one more, since decoding may drop a first space
        longest = max((len(stop.encode()) for stop in (*stops.before, *stops.after)), default=0)
        self.tail = longest + 1 if longest else 0

    def choose(self, logits: "Tensor") -> "Tensor":
        uniforms = [source.random() for source in self.noise]
        return choose_tokens(logits, self.temperatures, uniforms, self.top_p)

    def all_stopped(self, ids: "Tensor") -> bool:
        chosen = ids[:, 0].tolist()
        for row in sorted(self.open):
            self.ids[row].append(chosen[row])
            if chosen[row] in self.stop_ids or (self.tail and self.stops.reached(self._last_text(row))):
                self.open.remove(row)
        return not self.open

    def _last_text(self, row: int) -> str:
        return self.tokenizer.decode(self.ids[row][-self.tail :], clean_up_tokenization_spaces=False)


# -- server ------------------------------------------------------------------------------------------------------------

MOST_STOPS = 4  # OpenAI's limit; the text is cut here in any case
PASSING = (TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError)  # no refused connection
SHOWN = 200  # characters of a server's answer in a message


@dataclass
class ServerEngine:
    """base_url: up to and with `/v1`. concurrency: requests at once. timeout: seconds until an answer is there.

    `OPENAI_API_KEY` is sent as bearer where it is set, to this server only: redirections are not followed. Of the stops
    those are sent before which an answer ends: a server leaves a stop out of its text. It tokenises by itself, so that
    it decides whether a BOS comes first.
    """

    base_url: str
    model: str
    stops: Stops
    max_new_tokens: int
    top_p: float
    concurrency: int = 8
    timeout: float = 600.0
    tries: int = 6
    first_wait: float = 1.0

    def __post_init__(self) -> None:
        try:
            address = urllib.parse.urlsplit(self.base_url)
            host = address.hostname if address.scheme in ("http", "https") and address.port != 0 else None
        except ValueError:  # no number where the port should be
            host = None
        if not host:
            raise ConfigError(f"--base-url: got {self.base_url}, expected http://HOST:PORT/v1 or https://...")
        # a proxy that the environment names knows nothing of this machine's own addresses
        own = host in ("localhost", "127.0.0.1", "::1")
        proxies = [urllib.request.ProxyHandler({})] if own else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def engine(self) -> "ServerEngine":
        return self

    def complete(self, requests: Sequence[Request]) -> list[str]:
        """Raises SetupError: the server cannot be reached, refuses, or answers what is no completion."""
        with ThreadPoolExecutor(self.concurrency) as pool:  # after a failure `map` cancels what has not begun
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> str:
        body: dict[str, Any] = {
            "model": self.model, "max_tokens": self.max_new_tokens, "temperature": request.temperature,
            "top_p": self.top_p, "seed": request.seed % 2**31, "n": 1, "stream": False,
        }  # fmt: skip
        if self.stops.before:
            body["stop"] = list(self.stops.before[:MOST_STOPS])
        if request.prompt.chat:
            body["messages"] = [{"role": "user", "content": request.prompt.text}]
            return self._text(self._post("/chat/completions", body), "message", "content")
        body["prompt"] = request.prompt.text
        return self._text(self._post("/completions", body), "text")

    def _post(self, path: str, body: dict[str, Any]) -> str:
        """The answer's text. 429, 5xx, timeouts and broken connections are tried again, waiting ever longer."""
        url = self.base_url.rstrip("/") + path
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            headers["Authorization"] = f"Bearer {key}"
        tried = 0
        while True:
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return str(answer.read().decode("utf-8", "replace"))
            except urllib.error.HTTPError as error:
                fault = f"answers {error.code} {error.reason}{_body_of(error)}"
                again = error.code == 429 or error.code >= 500
            except OSError as error:
                reason = getattr(error, "reason", error)
                fault = f"cannot be reached: {reason}"
                again = isinstance(reason, PASSING)
            except http.client.HTTPException as error:
                fault, again = f"breaks off in the middle of an answer ({type(error).__name__})", True
            except ValueError:  # its text could show the key
                raise SetupError(f"{url}: nothing can be sent there: look at --base-url and OPENAI_API_KEY") from None
            tried += 1
            if not again or tried >= self.tries:
                raise SetupError(f"{url} {fault}")
            time.sleep(self.first_wait * 2 ** (tried - 1))

    def _text(self, answer: str, *names: str) -> str:
        """choices[0] by these names; null is no text (a chat model that said nothing)."""
        shown = answer[:SHOWN].strip() or "nothing"
        try:
            value = json.loads(answer)["choices"][0]
            for name in names:
                value = value[name]
        except json.JSONDecodeError:
            raise SetupError(f"{self.base_url} answers no JSON: {shown}") from None
        except (KeyError, IndexError, TypeError):
            raise SetupError(f"{self.base_url} answers without choices[0].{'.'.join(names)}: {shown}") from None
        if value is not None and not isinstance(value, str):
            raise SetupError(f"{self.base_url} answers without text: {shown}")
        return value or ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the redirection is raised as the error that it then is."""


def _body_of(error: urllib.error.HTTPError) -> str:
    """The first line of what the server says of its refusal."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        lines = error.read(10_000).decode("utf-8", "replace").strip().splitlines()
        return f": {lines[0][:SHOWN]}" if lines else ""
    return ""
