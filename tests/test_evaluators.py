"""Evaluators in this process: the vectorized one as the twin of the sequential one, and the draws of both."""

import pytest
import torch
from torch import nn

from optex import OptEx, SequentialEvaluator, VectorizedEvaluator, WithinTolerance
from optex.evaluators import RandomDraws
from optex.sources import ClosureSource, ObjectiveSource
from optex.stepping import ParameterVector
from tests.models import network, plain_run, regression_batches, request, same, snapshot, squared_error


def points_around(vector, count):
    generator = torch.Generator().manual_seed(0)
    return vector.read() + torch.randn(count, vector.dimension, generator=generator, dtype=vector.dtype)


def dict_batches(count):
    return [{"x": x, "y": [y], "scale": 2.0} for x, y in regression_batches(count)]


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 7])
@pytest.mark.parametrize("kind", ["tuple", "dict", "none", "ragged"])
def test_vectorized_gives_the_sequential_answer(kind, chunk_size):
    model = network()
    vector = ParameterVector(model.parameters())
    error = squared_error(model)
    fixed = regression_batches(1, seed=5)[0]
    batches, objective = {
        "tuple": (regression_batches(5), error),
        "dict": (dict_batches(5), lambda b: b["scale"] * error((b["x"], b["y"][0]))),
        "none": ([None] * 5, lambda _: error(fixed)),
        "ragged": (regression_batches(3) + regression_batches(2, size=3), error),
    }[kind]
    points, before = points_around(vector, 5), snapshot(model)
    source = ObjectiveSource(objective)
    asked = request(source, vector, points, batches)
    expected = SequentialEvaluator().evaluate(asked)
    result = VectorizedEvaluator(model, chunk_size=chunk_size).evaluate(asked)
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.gradients, expected.gradients, rtol=1e-11, atol=1e-13)
    assert result.masks == expected.masks
    assert same(snapshot(model), before)


def test_vectorized_gradients_of_tied_parameters_beside_frozen_ones_are_the_sequential_ones():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.frozen(torch.tanh(self.b(torch.tanh(self.a(x)))))

    model = Tied().double()
    vector = ParameterVector([p for p in model.parameters() if p.requires_grad])
    source, batches = ObjectiveSource(squared_error(model)), regression_batches(4)
    points = points_around(vector, 4)
    asked = request(source, vector, points, batches)
    expected = SequentialEvaluator().evaluate(asked)
    result = VectorizedEvaluator(model).evaluate(asked)
    torch.testing.assert_close(result.gradients, expected.gradients, rtol=1e-11, atol=1e-13)


def test_sequential_restores_parameters_when_the_objective_fails():
    model = network()
    vector, before = ParameterVector(model.parameters()), snapshot(model)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        loss = model(torch.ones(1, 6, dtype=torch.float64)).sum()
        loss.backward()
        return loss

    points = points_around(vector, 4)
    with pytest.raises(KeyboardInterrupt):
        SequentialEvaluator().evaluate(request(ClosureSource(closure), vector, points, [None] * 4))
    assert same(snapshot(model), before)
    assert all(p.grad is None for p in model.parameters())


def dropout_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def test_randomness_is_refused_or_declared():
    model = dropout_network()
    optimizer = OptEx(torch.optim.Adam(model.parameters()), evaluator=VectorizedEvaluator(model))
    with pytest.raises(
        ValueError, match=r"draws random numbers .dropout.. and randomness='error'; pass randomness"
    ):
        next(optimizer.rounds(regression_batches(4), squared_error(model)))
    optimizer.evaluator = VectorizedEvaluator(model, randomness="different")
    next(optimizer.rounds(regression_batches(4), squared_error(model)))
    model.eval()
    optimizer.evaluator = VectorizedEvaluator(model)
    next(optimizer.rounds(regression_batches(4), squared_error(model)))


def test_batch_norm_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = OptEx(torch.optim.Adam(model.parameters()), evaluator=VectorizedEvaluator(model))
    with pytest.raises(
        ValueError,
        match=r"BatchNorm1d '1' updates buffers .BatchNorm's running statistics.*use torch.nn.GroupNorm",
    ):
        next(optimizer.rounds(regression_batches(4), squared_error(model)))
    model.eval()
    next(optimizer.rounds(regression_batches(4), squared_error(model)))
    model.train()
    torch.func.replace_all_batch_norm_modules_(model)
    next(optimizer.rounds(regression_batches(4), squared_error(model)))


def test_a_closure_cannot_be_vectorized():
    model = network()
    optimizer = OptEx(torch.optim.Adam(model.parameters()), evaluator=VectorizedEvaluator(model))
    with pytest.raises(TypeError, match="cannot be vectorized; use rounds"):
        optimizer.step(lambda: 0.0)


def test_a_model_without_the_optimizers_parameters_is_refused():
    optimizer = OptEx(torch.optim.Adam(network().parameters()), evaluator=VectorizedEvaluator(network()))
    with pytest.raises(
        ValueError, match=r"4 of the optimizer's parameters .first: number 0. are not parameters of"
    ):
        next(optimizer.rounds(regression_batches(4), squared_error(network())))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: VectorizedEvaluator(lambda x: x),  # pyright: ignore[reportArgumentType]
            TypeError,
            "model must be a torch.nn.Module, got function",
        ),
        (
            lambda: VectorizedEvaluator(network(), chunk_size=0),
            ValueError,
            "chunk_size must be an integer of at least 1, got 0",
        ),
        (
            lambda: VectorizedEvaluator(network(), randomness="no"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "randomness must be 'error', 'diff",
        ),
    ],
)
def test_errors_name_the_argument(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_dropout_draws_are_pinned_to_their_step(tolerance):
    batches = regression_batches(17)
    plain = dropout_network()
    torch.manual_seed(5)
    trajectory = plain_run(plain, torch.optim.Adam(plain.parameters(), lr=0.02), batches)

    model, masks = dropout_network(), {}

    def remember(module, inputs, output):
        masks.setdefault(step[0], []).append(output == 0)

    model[1].register_forward_hook(remember)
    step, error = [0], squared_error(model)

    def objective(item):
        step[0] = item[0]
        return error(item[1])

    optimizer = OptEx(
        torch.optim.Adam(model.parameters(), lr=0.02), parallelism=4, acceptance=WithinTolerance(tolerance)
    )
    torch.manual_seed(5)
    taken = 0
    for report in optimizer.rounds(enumerate(batches), objective):
        taken += report.accepted
        if tolerance == 0:
            assert same(snapshot(model), trajectory[taken - 1])
    assert max(map(len, masks.values())) > 1  # some step was evaluated more than once
    assert all(torch.equal(mask, first) for first, *more in masks.values() for mask in more)


def test_draws_move_the_generator_on_once():
    draws = RandomDraws()
    torch.manual_seed(0)
    with draws.replayed():
        first = torch.rand(3)
    after = torch.rand(1)
    with draws.replayed():
        again = torch.rand(3)
    later = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(first, again)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(torch.rand(1), later)
