"""Recomputation and offloading change no bit of a gradient, and leave nothing behind."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_fused import LENGTHS
from tiny_models import gradients, random_samples, randomise_lora, save_tiny_model, tiny_trainer

from ibft import run
from ibft.offload import HostEmbedding, offload_embeddings
from ibft.plan import Plan
from ibft.recompute import LEAVING, Checkpointed, HostCopies, set_recompute
from ibft.tap import decoder_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"), layers=5)


def trainer_of(folder, *overrides, modes=None, copies=None):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    trainer = tiny_trainer(
        folder, random_samples(LENGTHS), "lora.dropout=0.3", "train.per_device_train_batch_size=2",
        "train.gradient_accumulation_steps=3", *overrides,
    )  # fmt: skip
    if modes:
        set_recompute(trainer.model, trainer.fused, modes, copies=copies)
    randomise_lora(trainer.model)
    trainer.model.train()
    return trainer


def one_step(trainer):
    parts = trainer.backward(next(trainer.batches(trainer.data, epoch=1)))
    return {"loss": parts.loss.detach(), **gradients(trainer)}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("packing", [True, False])
def test_modes_and_offloading_change_no_bit(folder, packing):
    """Which plan a run gets depends on free memory: what it computes must not. Several micro-batches a step."""
    settings = [f"data.packing={packing}", "data.max_length=48"]
    expected = one_step(trainer_of(folder, *settings))
    for modes in (["mlp"] * 5, ["full"] * 5, ["full", "none", "full", "mlp", "full"]):
        for copies in (None, HostCopies(CPU)):
            assert_same_bits(one_step(trainer_of(folder, *settings, modes=modes, copies=copies)), expected)


def test_copies_are_taken_and_fetched_in_order_and_nothing_stays(folder, monkeypatch):
    """Backward asks from the top; each asks for the next below; nothing is alive when the step is over."""
    from ibft.recompute import _HostCopy

    log, alive = [], []
    take, fetch, release = HostCopies.take, _HostCopy.fetch, _HostCopy.release

    def logged_take(copies, x, *, first):
        copy = take(copies, x, first=first)
        copy.name = 0 if first else copy.below.name + 1
        log.append(f"take {copy.name}")
        alive.append(weakref.ref(copy))
        return copy

    def logged_fetch(copy):
        if copy.back is None and copy.host is not None:
            log.append(f"fetch {copy.name}")
        fetch(copy)

    monkeypatch.setattr(HostCopies, "take", logged_take)
    monkeypatch.setattr(_HostCopy, "fetch", logged_fetch)
    monkeypatch.setattr(_HostCopy, "release", lambda c: log.append(f"leave {c.name}") or release(c))
    copies = HostCopies(CPU)
    trainer = trainer_of(folder, modes=["full"] * 5, copies=copies)
    batches = next(trainer.batches(trainer.data, epoch=1))
    trainer.backward(batches)
    forward = [word for i in range(5) for word in (f"take {i}", f"leave {i}")]
    assert log == (forward + [f"fetch {i}" for i in (4, 3, 2, 1, 0)]) * len(batches)
    gc.collect()
    assert not copies.leaving
    assert not any(copy() for copy in alive)


def test_only_the_originals_that_are_leaving_stay_in_the_forward(folder):
    copies = HostCopies(CPU)
    graph = torch.randn(4, 8, requires_grad=True)
    originals, taken = [], []
    for i in range(6):
        x = graph * (i + 1)
        originals.append(weakref.ref(x.untyped_storage()))
        taken.append(copies.take(x, first=i == 0))
        assert taken[-1].get() is x
        taken[-1].release()
        del x
    gc.collect()
    assert [storage() is not None for storage in originals] == [False] * (6 - LEAVING) + [True] * LEAVING
    for i in reversed(range(6)):
        back = taken[i].get()
        assert torch.equal(back, graph * (i + 1))
        assert back.is_leaf
        assert back.requires_grad
    assert not copies.leaving
    with pytest.raises(RuntimeError, match="asked for twice"):
        taken[0].get()


def test_an_interrupted_step_leaves_nothing_for_the_next(folder):
    """An exception between forward and backward: the next step's gradient is the same, and no entry of the old is
    asked for or kept."""
    expected = one_step(trainer_of(folder))
    copies = HostCopies(CPU)
    trainer = trainer_of(folder, modes=["full"] * 5, copies=copies)
    stale = []
    take = copies.take
    copies.take = lambda x, *, first: stale.append(take(x, first=first)) or stale[-1]
    backward = trainer.accelerator.backward

    def broken(loss):
        raise RuntimeError("between forward and backward")

    trainer.accelerator.backward = broken
    with pytest.raises(RuntimeError, match="between"):
        one_step(trainer)
    trainer.accelerator.backward = backward
    assert len(stale) == 5
    seen, old = [weakref.ref(copy) for copy in stale], set(map(id, stale))
    stale.clear()
    copies.take = take
    assert_same_bits(one_step(trainer), expected)
    gc.collect()
    assert not copies.leaving
    assert not any(ref() is not None and id(ref()) in old for ref in seen)


def test_evaluation_offloads_nothing(folder):
    copies = HostCopies(CPU)
    trainer = trainer_of(folder, modes=["full"] * 5, copies=copies)
    trainer.eval_data = random_samples([9, 20])
    trainer.evaluate()
    assert not copies.leaving
    assert copies.last() is None


def test_the_trainer_follows_the_configuration(folder, monkeypatch):
    """auto under a budget that no mix fits recomputes every block; with room it recomputes nothing."""

    def modes(*overrides):
        blocks = decoder_of(trainer_of(folder, *overrides).model).layers
        return [isinstance(block.forward, Checkpointed) for block in blocks], [
            block.mlp.forward.recompute for block in blocks
        ]

    assert modes("train.gradient_checkpointing=auto", "runtime.memory_budget=4") == ([False] * 5, [False] * 5)
    assert modes("train.gradient_checkpointing=auto", "runtime.memory_budget=0.0001") == ([True] * 5, [False] * 5)
    assert modes("train.gradient_checkpointing=mlp") == ([False] * 5, [True] * 5)
    assert modes("train.gradient_checkpointing=true") == ([True] * 5, [False] * 5)


def test_the_trainer_offloads_what_the_plan_says(folder, monkeypatch):
    """`build_trainer` hands the plan's offloading on, to the blocks and to the loop's own lookup, for the same bits."""
    plan = Plan(("full",) * 5, activation_offloading=True, offload_embeddings=True)
    expected = one_step(trainer_of(folder))
    monkeypatch.setattr(run, "choose_plan", lambda *_: SimpleNamespace(plan=plan))
    trainer = trainer_of(folder)
    decoder = decoder_of(trainer.model)
    assert all(isinstance(block.forward.copies, HostCopies) for block in decoder.layers)
    assert isinstance(trainer.embeddings, HostEmbedding)
    assert decoder.embed_tokens is trainer.embeddings
    assert_same_bits(one_step(trainer), expected)


def test_modes_replace_each_other(folder):
    trainer = trainer_of(folder, modes=["full"] * 5)
    set_recompute(trainer.model, trainer.fused, ["full", "none", "mlp", "none", "full"])
    blocks = decoder_of(trainer.model).layers
    assert [isinstance(block.forward, Checkpointed) for block in blocks] == [True, False, False, False, True]
    assert not isinstance(blocks[0].forward.forward, Checkpointed)


# --- embeddings -----------------------------------------------------------------------------------


def test_host_embeddings_change_no_bit(folder):
    """The trainer looks rows up before the ids leave the host; generation and evaluation by the ids."""
    plain, hosted = trainer_of(folder), None
    expected = one_step(plain)
    plain.eval_data = random_samples([9, 20])
    held_out = plain.evaluate()
    ids = torch.tensor([[4, 5, 6, 7]])
    written = plain.model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False)

    hosted = trainer_of(folder)
    hosted.embeddings = offload_embeddings(hosted.model.get_base_model(), CPU)
    assert decoder_of(hosted.model).embed_tokens is hosted.embeddings
    asked = []
    hosted.embeddings.register_forward_pre_hook(lambda *_: asked.append(1))
    assert_same_bits(one_step(hosted), expected)
    hosted.eval_data = random_samples([9, 20])
    assert hosted.evaluate() == held_out
    assert not asked  # a device would have been waited for
    assert torch.equal(hosted.model.eval().generate(input_ids=ids, max_new_tokens=6, do_sample=False), written)
    assert asked


def test_a_host_embedding_is_no_parameter():
    """`.to` leaves the table on the host, and transformers does not find it when it asks where the model is."""
    embedding = torch.nn.Embedding(10, 4)
    host = HostEmbedding(embedding, CPU)
    assert not list(host.parameters())
    assert not host.state_dict()
    ids = torch.tensor([[1, 2], [9, 0]])
    assert torch.equal(host(ids), embedding(ids))
    assert torch.equal(host.to("meta").rows(ids), embedding(ids))


# --- a GPU's streams, told by a stand-in ----------------------------------------------------------


class FakeCuda:
    """Enough of torch for `HostCopies` on a device: copies are done at once, and every wait is written down."""

    Tensor = torch.Tensor

    def __init__(self):
        self.log, self.depth = [], 0
        fake = self

        class Stream:
            def __init__(self, *_):
                self.name = "side"

            def wait_stream(self, other):
                fake.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                fake.log.append(f"{self.name} waits for event {event.number}")

        class Event:
            count = 0

            def record(self, stream):
                Event.count += 1
                self.number = Event.count
                fake.log.append(f"{stream.name} records {self.number}")

        class Within:
            def __init__(self, stream):
                assert stream.name == "side"

            def __enter__(self):
                fake.depth += 1

            def __exit__(self, *_):
                fake.depth -= 1

        main = Stream()
        main.name = "main"
        self.cuda = SimpleNamespace(Stream=Stream, Event=Event, stream=Within, current_stream=lambda *_: main)

    def empty(self, shape, dtype, pin_memory=False, device=None):
        assert self.depth == 0  # memory of the main stream, which its own order protects
        return torch.empty(shape, dtype=dtype)


def test_the_streams_wait_for_each_other(monkeypatch):
    """An original is let go only after the main stream waits for its copy; a copy is read only after it arrived; the
    side stream starts neither before what the main stream has enqueued."""
    from ibft import recompute

    fake = FakeCuda()
    monkeypatch.setattr(recompute, "torch", fake)
    copies = HostCopies(SimpleNamespace(type="cuda"))
    values = [torch.full((2, 3), float(i)) for i in range(4)]
    taken = []
    for i, x in enumerate(values):
        taken.append(copies.take(x.clone(), first=i == 0))
        taken[-1].get()
        taken[-1].release()
    out = [f"{words} {i + 1}" if words.endswith("records") else words for i in range(4)
           for words in ("side waits for main", "side records")]  # fmt: skip
    # two have left by the end: after their copies, and one block later each
    assert fake.log == [*out[:6], "main waits for event 1", *out[6:], "main waits for event 2"]
    assert [copy.original is None for copy in taken] == [True, True, False, False]
    fake.log.clear()
    back = [taken[i].get() for i in (3, 2, 1, 0)]
    assert [float(x[0, 0]) for x in back] == [3, 2, 1, 0]
    assert fake.log == [
        "main waits for event 4", "main waits for event 3",  # still here: only their copies must end
        "side waits for main", "side records 5",  # 1 is fetched while 2 is in backward
        "side waits for main", "side records 6", "main waits for event 5",  # then 0, while 1 is
        "main waits for event 6",
    ]  # fmt: skip
