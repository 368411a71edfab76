"""Modules called with other parameters: a layer that stands twice, weights that are tied, and who calls so."""

import copy

import pytest
import torch
from torch import nn

import optex
from optex.evaluators import SequentialEvaluator, VectorizedEvaluator
from optex.functional import called_with
from optex.sources import ObjectiveSource
from optex.stepping import ParameterVector
from tests.gradients import grad_of
from tests.models import regression_batches, request, same, snapshot


class Twice(nn.Module):
    """A loss whose layer is registered under two names, with a weight that another layer shares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.tied, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.tied.weight = self.first.weight
        self.double()

    def forward(self, batch):
        x, y = batch
        inner = torch.tanh(self.again(torch.tanh(self.first(x))))
        return (self.last(torch.tanh(self.tied(inner))) - y).square().mean()


def own(model):
    return [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


def test_called_with_is_the_module_with_other_values():
    model, (batch,) = Twice(), regression_batches(1)
    names, before = own(model), snapshot(model)
    values = {name: torch.randn_like(p) for name, p in model.named_parameters() if "last" not in name}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(values.get(name, p))
    torch.testing.assert_close(called_with(model, values, batch), other(batch), rtol=0, atol=0)
    assert own(model) == names
    assert same(snapshot(model), before)


def test_called_with_puts_parameters_back_after_an_error():
    model = Twice()
    names = own(model)
    with pytest.raises(TypeError, match="cannot unpack"):
        called_with(model, {name: p.detach() * 2 for name, p in model.named_parameters()}, None)
    assert own(model) == names


@pytest.mark.parametrize("source", [optex.SPSASource, optex.CoordinateSource])
def test_losses_at_once_are_those_in_turn(source):
    answers = []
    for vectorized in (False, True):
        model, (batch,) = Twice(), regression_batches(1)
        names = own(model)
        torch.manual_seed(1)
        loss, _ = source(model, model.parameters(), vectorized=vectorized).gradient(batch)
        assert own(model) == names
        answers.append([loss, *(p.grad for p in model.parameters())])
    for left, right in zip(*answers, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_per_sample_gradients_are_the_backward_pass():
    model, (batch,) = Twice(), regression_batches(1)
    names = own(model)
    model(batch).backward()
    expected = [grad_of(p).clone() for p in model.parameters()]
    model.zero_grad()
    optex.PerSampleSource(model, model).gradient(batch)
    assert own(model) == names
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-11, atol=1e-13)


def test_vectorized_evaluations_are_the_sequential_ones():
    model, batches = Twice(), regression_batches(3)
    names, vector = own(model), ParameterVector(model.parameters())
    points = vector.read() + torch.randn(3, vector.dimension, dtype=torch.float64)
    asked = request(ObjectiveSource(model), vector, points, batches)
    expected, found = SequentialEvaluator().evaluate(asked), VectorizedEvaluator(model).evaluate(asked)
    assert own(model) == names
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-11, atol=1e-13)


def test_a_streamed_block_keeps_its_parameters():
    layer = nn.Linear(5, 5)
    streamed = nn.Sequential(nn.Sequential(layer, nn.Tanh(), layer), nn.Linear(5, 5)).double()
    plain = copy.deepcopy(streamed)
    names, x = own(streamed), torch.randn(8, 5, dtype=torch.float64)
    streamer = optex.optimizers.BlockStreamer(streamed, lr=0.02)
    other = optex.optimizers.MeZO(plain.parameters(), lr=0.02, exact=True)
    for seed in range(3):
        streamer.step(x, lambda out: out.square().mean(), seed=seed)
        other.step(lambda: plain(x).square().mean(), seed=seed)
    streamer.flush()
    assert own(streamed) == names
    assert same(snapshot(streamed), snapshot(plain))
