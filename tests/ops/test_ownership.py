"""`owns`: yes for a gradient that nobody else can read, no for every way that somebody can."""

import pytest
import torch

from ibft_kernels._ownership import calibrate, graph_is_kept, owns

answers: list[bool] = []
kept: list[bool] = []
W = torch.eye(4)


class Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        calibrate()
        return x * 1

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        del grads
        answers.append(owns(grad))
        kept.append(graph_is_kept())
        return grad


def ask(loss, **settings):
    answers.clear()
    kept.clear()
    loss.backward(**settings)
    (answer,) = answers
    return answer


@pytest.fixture
def x():
    return torch.randn(3, 4, requires_grad=True)


def residual_and_norm(h):
    return ((h + torch.tanh(h) @ W) @ W).sum()


def test_it_can_be_asked_here():
    assert calibrate() is not None


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_calibration_in_any_context(context):
    with context():
        assert calibrate.__wrapped__() == calibrate()


def test_calibration_inside_a_checkpoint(x):
    """The first step of a process may be a checkpointed one: what the probe saves is none of the checkpoint's."""

    def block(x):
        calibrate()
        return torch.tanh(Node.apply(x) @ W)

    calibrate.cache_clear()
    assert ask((torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) @ W).sum())


def test_owned(x):
    assert ask((Node.apply(x) @ W).sum())
    assert ask(residual_and_norm(Node.apply(x)))
    h = Node.apply(x)
    assert ask((h @ W + h * h + h.exp()).sum())
    assert ask(residual_and_norm(torch.utils.checkpoint.checkpoint(Node.apply, x, use_reentrant=False)))


def test_a_residual_that_waits(x):
    other = torch.tanh(x)
    assert not ask(((Node.apply(x) + other) @ W).sum())
    other = torch.tanh(x)
    assert not ask((torch.add(other, Node.apply(x)).view(-1) @ torch.ones(12)).sum())


def test_a_residual_that_a_python_node_hands_on(x):
    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, grad):
            return grad, grad

    other = torch.tanh(x)
    assert not ask((Add.apply(Node.apply(x), other) @ W).sum())


def test_views_and_expanded_gradients(x):
    assert not ask(Node.apply(x).sum())
    assert not ask((Node.apply(x).view(2, 6) ** 2).sum())


def test_somebody_kept_it(x):
    held = []
    h = Node.apply(x)
    h.register_hook(held.append)
    assert not ask((h @ W).sum())
    y = torch.tanh(x)
    s = Node.apply(x) + y
    s.register_hook(lambda g: held.append(g.detach()))
    assert not ask((s @ W).sum())


def test_the_caller_gave_it(x):
    given = torch.ones(3, 4)
    answers.clear()
    Node.apply(x).backward(given)
    assert answers == [False]


def test_a_retained_gradient_is_a_copy(x):
    """Writing into an owned gradient does not change what retain_grad shows."""

    class Scribble(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, *grads):
            (grad,) = grads
            del grads
            answers.append(owns(grad))
            return grad.mul_(0) if answers[-1] else grad * 0

    h = Scribble.apply(x)
    h.retain_grad()
    ask((h @ (2 * W)).sum())
    assert torch.equal(h.grad, torch.full((3, 4), 2.0))


def test_a_double_backward_owns_nothing(x):
    assert not ask((Node.apply(x) @ W).square().sum(), create_graph=True)


def test_kept_graphs(x):
    loss = (Node.apply(x) @ W).sum()
    ask(loss, retain_graph=True)
    assert kept == [True]
    ask(loss)
    assert kept == [False]


@pytest.mark.parametrize("held", ["storage", "object"])
def test_each_count_counts(x, held):
    """One more reference to the storage alone, or to the Python object alone, is seen; of the tensor: a residual's."""
    kept = []

    class Holder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calibrate()
            return x * 1

        @staticmethod
        def backward(ctx, *grads):
            (grad,) = grads
            del grads
            kept.append(grad if held == "object" else grad.detach())
            answers.append(owns(grad))
            return grad * 1

    answers.clear()
    residual_and_norm(Holder.apply(x)).backward()
    assert answers == [False]


@pytest.mark.parametrize("kind", ["view", "strided"])
def test_a_gradient_that_is_not_dense_is_not_owned(kind):
    """Even where nobody else holds it: what is added must lie in adjacent memory that is this tensor's own."""

    def made_of(grad):
        return (grad * 1).view(3, 4) if kind == "view" else torch.empty_strided((3, 4), (1, 3)).copy_(grad)

    class Give(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return made_of(grad)

    x = torch.randn(3, 4, requires_grad=True)
    assert not ask(Give.apply(Node.apply(x)).sin().sum())
