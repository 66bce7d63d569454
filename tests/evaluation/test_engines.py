import copy
import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from ibft.errors import ConfigError, SetupError
from ibft.evaluation.engines import Request, ServerEngine, TransformersEngine, choose_tokens, encode_prompt
from ibft.evaluation.generate import generate
from ibft.evaluation.prompts import Prompt, Stops

# -- the sampler -------------------------------------------------------------------------------------------------------


def draws(logits: torch.Tensor, temperature: float, top_p: float, count: int, seed: int = 7) -> list[int]:
    source = random.Random(seed)
    uniforms = [source.random() for _ in range(count)]
    return choose_tokens(logits.expand(count, -1), [temperature] * count, uniforms, top_p)[:, 0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_distribution_is_softmax_within_the_nucleus(temperature, top_p):
    """Chi-square at a fixed seed, against the definition computed in plain Python."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.3, -0.4, 1.9, 0.0])
    weights = (logits.double() / temperature).exp()
    probabilities = (weights / weights.sum()).tolist()
    nucleus, mass = set(), 0.0
    for i in sorted(range(8), key=lambda i: -probabilities[i]):
        if mass < top_p:
            nucleus.add(i)
            mass += probabilities[i]
    assert (len(nucleus) < 8) == (top_p < 1)
    count = 20_000
    found = Counter(draws(logits, temperature, top_p, count))
    assert set(found) == nucleus
    chi_square = sum(
        (found[i] - count * probabilities[i] / mass) ** 2 / (count * probabilities[i] / mass) for i in nucleus
    )
    assert chi_square < 26  # 7 degrees of freedom: 24.3 is exceeded with probability 0.001


def test_known_draws():
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    for uniform, token in [(0.0, 0), (0.499, 0), (0.501, 2), (0.799, 2), (0.801, 1), (1 - 2**-53, 1)]:
        assert choose_tokens(logits, [1.0], [uniform], 1.0).item() == token
    for uniform, token in [(0.62, 0), (0.63, 2), (1 - 2**-53, 2)]:  # kept: 0.5 and 0.3
        assert choose_tokens(logits, [1.0], [uniform], 0.7).item() == token
    for top_p, kept in [(1e-9, {0}), (0.49, {0}), (0.51, {0, 2}), (0.79, {0, 2}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2})]:
        assert set(draws(logits, 1.0, top_p, 200)) == kept
    flat = torch.zeros(1, 4)
    assert [choose_tokens(flat, [1.0], [u], 0.5).item() for u in (0.0, 0.6)] == [0, 1]  # of equals the lower id


def test_greedy_rows_and_extreme_temperatures():
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf], [5.0, 4.0, 4.9, 300.0]])
    assert choose_tokens(logits, [0.0, 0.0], [0.99, 0.99], 1.0).tolist() == [[1], [3]]
    assert choose_tokens(logits, [1e-320, 1e-3], [0.99, 0.99], 1.0).tolist() == [[1], [3]]
    assert choose_tokens(logits, [1e300, 0.0], [0.99, 0.5], 1.0).tolist() == [[0], [3]]  # never what has no probability


def test_a_row_does_not_see_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(9, 50)
    temperatures = [0.0, 0.2, 1.0] * 3
    uniforms = [random.Random(i).random() for i in range(9)]
    together = choose_tokens(logits, temperatures, uniforms, 0.9)
    alone = [choose_tokens(logits[i : i + 1], temperatures[i : i + 1], uniforms[i : i + 1], 0.9) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))


def test_half_precision_logits_are_sampled_from_as_they_are():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert draws(logits, 1.0, 0.95, 500) == draws(logits.double(), 1.0, 0.95, 500)


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(model):
    """It writes printable ASCII alone, so that a token is a character."""
    others = torch.arange(model.config.vocab_size) >= 94  # the first ids are ! to ~
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.masked_fill(others, -torch.inf))
    return model


def request(text: str, temperature: float = 1.0, seed: int = 0, **rest) -> Request:
    return Request(Prompt(text, **rest), temperature, seed)


def engine(model, tokenizer, *, stops: Stops | None = None, max_new_tokens: int = 12, top_p: float = 0.95):
    return TransformersEngine(model, tokenizer, stops or Stops(), max_new_tokens, top_p)


TEXTS = [("a", 1.0), ("write a function", 0.7), ("sum\nof two", 0.0), ("bb", 1.3), ("a", 1.0), ("a longer prompt", 0.2)]
REQUESTS = [request(text, temperature, seed) for seed, (text, temperature) in enumerate(TEXTS)]


def test_greedy_released_prompts_give_what_training_runs_judge(model, tokenizer):
    texts = ["a", "write a function", "sum\nof two"]
    found = engine(model, tokenizer).complete([request(t + "\n", 0.0, special_tokens=False) for t in texts])
    assert found == generate(model, tokenizer, texts, max_new_tokens=12)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batch_and_order_change_no_text(model, tokenizer, size):
    """The noise is the row's own. Float64 here: in lower precision the logits can differ in the last bits."""
    whole = engine(model, tokenizer).complete(REQUESTS)
    order = [4, 1, 5, 0, 3, 2]
    parts = [order[i : i + size] for i in range(0, 6, size)]
    found = {
        i: text
        for part in parts
        for i, text in zip(part, engine(model, tokenizer).complete([REQUESTS[i] for i in part]), strict=True)
    }
    assert [found[i] for i in range(6)] == whole
    assert whole[0] != whole[4]  # another seed alone
    other = [Request(r.prompt, r.temperature, r.seed + 100) for r in REQUESTS]
    changed = engine(model, tokenizer).complete(other)
    assert changed[2] == whole[2]
    assert changed[0] != whole[0]


def test_all_64_bits_of_a_seed_count(model, tokenizer):
    texts = engine(model, tokenizer).complete([request("a", seed=seed) for seed in (5, 5 + 2**32, 5 + 2**63, 5)])
    assert len(set(texts)) == 3
    assert texts[0] == texts[3]


def test_a_row_ends_with_its_stop_and_the_others_go_on(model, tokenizer):
    plain = engine(model, tokenizer, max_new_tokens=40).complete(REQUESTS)
    stop = plain[3][5:8]
    assert stop not in plain[1]
    stopped = engine(model, tokenizer, max_new_tokens=40, stops=Stops(before=(stop,))).complete(REQUESTS)
    assert stopped == [text[: text.find(stop) + 3] if stop in text else text for text in plain]
    assert stopped[3] == plain[3][: plain[3].find(stop) + 3]
    assert engine(model, tokenizer, max_new_tokens=40, stops=Stops(after=(stop,))).complete(REQUESTS) == stopped


def test_generation_ends_once_all_rows_have_stopped(model, tokenizer):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    plain = engine(model, tokenizer, max_new_tokens=30).complete([request("a")])[0]
    assert len(calls) == 30
    calls.clear()
    engine(model, tokenizer, max_new_tokens=30, stops=Stops(before=(plain[4],))).complete([request("a")])
    assert len(calls) == plain.index(plain[4]) + 1


def test_eos_ends_a_row_and_is_no_text(model, tokenizer):
    plain = engine(model, tokenizer, max_new_tokens=20).complete(REQUESTS)
    model.generation_config.eos_token_id = tokenizer(plain[0][6])["input_ids"][0]
    assert engine(model, tokenizer, max_new_tokens=20).complete(REQUESTS)[0] == plain[0][: plain[0].index(plain[0][6])]


def test_chat_prompts_go_through_the_template(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    ids = encode_prompt(chatty, Prompt("hi", chat=True, special_tokens=False))
    assert chatty.decode(ids) == "[user]hi[a]"
    with pytest.raises(ConfigError, match="--prompt-style=chat: this model's tokenizer has no chat template"):
        encode_prompt(tokenizer, Prompt("hi", chat=True))


def test_special_tokens_only_where_they_belong(tokenizer):
    from tokenizers import processors

    with_bos = copy.deepcopy(tokenizer)
    eos = (with_bos.eos_token, with_bos.eos_token_id)
    with_bos._tokenizer.post_processor = processors.TemplateProcessing(single=f"{eos[0]} $A", special_tokens=[eos])
    plain = tokenizer(["hi"])["input_ids"][0]
    assert encode_prompt(with_bos, Prompt("hi")) == [eos[1], *plain]
    assert encode_prompt(with_bos, Prompt("hi", special_tokens=False)) == plain
    with pytest.raises(ConfigError, match="no token"):
        encode_prompt(tokenizer, Prompt(""))


# -- server ------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers as OpenAI's protocol has it. `faults`: functions of the handler, for the next requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict] = []
        self.faults: list = []
        self.lock = threading.Lock()
        self.together = self.most_together = 0
        self.gate: threading.Barrier | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_) -> None:
        """A client that hangs up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            fault = self.server.faults.pop(0) if self.server.faults else None
            self.server.together += 1
            self.server.most_together = max(self.server.most_together, self.server.together)
        if self.server.gate is not None:
            self.server.gate.wait(5)
        try:
            if fault is not None:
                fault(self)
            elif self.path == "/v1/completions":
                self.reply(200, {"choices": [{"text": f"<{body['prompt']}>", "finish_reason": "stop"}]})
            elif self.path == "/v1/chat/completions":
                message = {"role": "assistant", "content": f"({body['messages'][0]['content']})"}
                self.reply(200, {"choices": [{"message": message}]})
            else:
                self.reply(404, {"error": "no such path"})
        finally:
            with self.server.lock:
                self.server.together -= 1

    def reply(self, status: int, content, **headers: str) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def status(code: int, content="busy\nsecond line", **headers):
    return lambda handler: handler.reply(code, content, **headers)


def hang_up(handler) -> None:
    handler.connection.close()


def break_off(handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.wfile.flush()
    handler.connection.shutdown(2)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(server: Server, **changes) -> ServerEngine:
    settings = {"stops": Stops(), "max_new_tokens": 99, "top_p": 0.9, "first_wait": 0.001, "tries": 3, **changes}
    return ServerEngine(server.url, "some/model", **settings)


def test_what_a_server_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stops = Stops(before=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), after=("endmodule",))
    assert client(server, stops=stops).complete([request("é", 0.6, 2**63 + 5)]) == ["<é>"]
    common = {"model": "some/model", "max_tokens": 99, "top_p": 0.9, "n": 1, "stream": False, "seed": 5}
    assert server.seen.pop() == {
        "path": "/v1/completions", "key": None, "prompt": "é", "temperature": 0.6,
        "stop": ["\nclass", "\ndef", "\n#", "\nif"], **common,
    }  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    assert client(server).complete([request("hi", 0.0, 2**31 + 5, chat=True)]) == ["(hi)"]
    messages = [{"role": "user", "content": "hi"}]
    assert server.seen.pop() == {
        "path": "/v1/chat/completions", "key": "Bearer secret", "messages": messages, "temperature": 0.0, **common,
    }  # fmt: skip


def test_answers_come_in_order_from_several_requests_at_once(server):
    server.gate = threading.Barrier(4)  # opens only when four are there together
    texts = [str(i) for i in range(12)]
    assert client(server, concurrency=4).complete([request(text) for text in texts]) == [f"<{text}>" for text in texts]
    assert server.most_together == 4
    assert client(server).complete([]) == []


@pytest.mark.parametrize("fault", [status(429), status(500), status(503), hang_up, break_off])
def test_what_passes_is_tried_again(server, fault):
    server.faults = [fault, fault]
    assert client(server).complete([request("hi")]) == ["<hi>"]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        (status(400, "bad prompt\nmore"), "/v1/completions answers 400 Bad Request: bad prompt$", 1),
        (status(401, ""), "answers 401 Unauthorized$", 1),
        (status(404, "x" * 999), "answers 404 Not Found: x{200}$", 1),
        (status(302, "", Location="/v1/elsewhere"), "answers 302 Found$", 1),
        (status(429), "answers 429 Too Many Requests: busy$", 3),
        (status(500), "answers 500 Internal Server Error: busy$", 3),
        (hang_up, "/v1/completions cannot be reached: ", 3),
        (break_off, r"breaks off in the middle of an answer \(IncompleteRead\)$", 3),
        (status(200, "<html>"), "answers no JSON: <html>$", 1),
        (status(200, ""), "answers no JSON: nothing$", 1),
        (status(200, {"choices": []}), r"answers without choices\[0\].text: ", 1),
        (status(200, "[1]"), r"answers without choices\[0\].text: \[1\]$", 1),
        (status(200, {"choices": [{"text": 3}]}), "answers without text: ", 1),
    ],
)
def test_refusals(server, fault, message, requests):
    server.faults = [fault] * 9
    with pytest.raises(SetupError, match=message) as caught:
        client(server).complete([request("hi")])
    assert str(caught.value).startswith(server.url)
    assert "\n" not in str(caught.value)
    assert len(server.seen) == requests


def test_a_chat_model_may_say_nothing(server):
    server.faults = [status(200, {"choices": [{"message": {"content": None}}]})]
    assert client(server).complete([request("hi", chat=True)]) == [""]


def test_one_that_does_not_answer_in_time(server):
    released = threading.Event()
    server.faults = [lambda handler: released.wait(5)] * 2
    try:
        with pytest.raises(SetupError, match="cannot be reached: timed out"):
            client(server, timeout=0.05, tries=2).complete([request("hi")])
    finally:
        released.set()
    assert len(server.seen) == 2


def test_after_a_failure_nothing_more_is_asked(server):
    server.faults = [status(400)] * 100
    with pytest.raises(SetupError):
        client(server, concurrency=2).complete([request("hi")] * 100)
    assert len(server.seen) < 20


def test_waits_double(server, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    server.faults = [status(503)] * 4
    client(server, tries=5, first_wait=0.5).complete([request("hi")])
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_no_proxy_is_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert client(server).complete([request("hi")]) == ["<hi>"]


def test_addresses():
    server = Server()
    url = server.url
    server.server_close()
    with pytest.raises(SetupError, match=f"^{url}/completions cannot be reached: .*refused"):
        ServerEngine(url + "/", "m", Stops(), 9, 1.0).complete([request("hi")])  # at once, not after all the waits
    for bad in ("localhost:8000", "ftp://host/v1", "http://", "", "http://host:port/v1"):
        with pytest.raises(ConfigError, match=r"--base-url: got .* expected http://HOST:PORT/v1"):
            ServerEngine(bad, "m", Stops(), 9, 1.0)


def test_a_key_that_cannot_be_sent_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "top\nsecret")
    with pytest.raises(SetupError) as caught:
        client(server).complete([request("hi")])
    assert "secret" not in str(caught.value)
    assert "OPENAI_API_KEY" in str(caught.value)
