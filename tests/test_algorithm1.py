"""OptEx.from_paper against a literal loop, and where it must be the base optimizer itself."""

import itertools

import numpy as np
import pytest
import torch

from optex import HoldLast, OptEx
from tests.bases import BASES
from tests.models import (
    assert_same_state,
    network,
    plain_run,
    regression_batches,
    same,
    snapshot,
    squared_error,
)
from tests.references import algorithm1 as reference

PAIRS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.3), reference.sgd(0.3)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), reference.sgd(0.05, 0.9)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05), reference.adam(0.05)),
}


def objective(theta):
    """A smooth function that is not convex, with a minimum to approach."""
    curvature = torch.linspace(0.1, 1.0, theta.numel(), dtype=theta.dtype)
    return 0.5 * (curvature * theta**2).sum() + 0.3 * torch.cos(2 * theta).sum()


def numpy_gradient(x):
    return np.linspace(0.1, 1.0, len(x)) * x - 0.6 * np.sin(2 * x)


def numpy_loss(x):
    return 0.5 * np.sum(np.linspace(0.1, 1.0, len(x)) * x**2) + 0.3 * np.sum(np.cos(2 * x))


def run(base, rounds, start, **settings):
    theta = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = OptEx.from_paper(base([theta]), **settings)
    reports = itertools.islice(optimizer.rounds(itertools.repeat(None), lambda _: objective(theta)), rounds)
    return np.array([start] + [theta.detach().numpy().copy() for _ in reports])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("selection", ["last", "lowest-loss", "smallest-gradient"])
def test_is_the_literal_loop(pair, selection):
    # σ² = 1e-3 keeps the T0 × T0 systems well conditioned: both sides then agree beyond 1e-9 for 50 rounds.
    base, step = PAIRS[pair]
    start = np.random.default_rng(0).uniform(-2, 2, 30)
    settings = {"parallelism": 4, "history_size": 10, "noise_variance": 1e-3, "selection": selection}
    # Where the best proxy is chosen, SGD has converged after 25 rounds and losses tie to the last bit.
    rounds = 50 if selection == "last" else 25
    ours = run(base, rounds, start, **settings)
    theirs = reference.algorithm1(numpy_gradient, numpy_loss, step, start, rounds, 4, 10, 1e-3, selection)
    assert np.abs(ours[5] - start).max() > 1e-2  # it moves
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_one_gradient_a_round_is_the_base_optimizer(name):
    batches = regression_batches(12)
    plain, model = network(), network()
    base = BASES[name](list(plain.parameters()))
    trajectory = plain_run(plain, base, batches)
    optimizer = OptEx(BASES[name](list(model.parameters())), parallelism=1, stride=1)
    reports = []
    for report, expected in zip(optimizer.rounds(batches, squared_error(model)), trajectory, strict=True):
        reports.append(report)
        assert same(snapshot(model), expected)
    assert [r.accepted for r in reports] == [1] * 12
    assert_same_state(optimizer.base, base)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("make", [OptEx.from_paper, OptEx], ids=["paper", "verified"])
def test_every_base_optimizer_makes_progress(name, make):
    model = network()
    optimizer = make(BASES[name](list(model.parameters())), parallelism=3)
    reports = list(optimizer.rounds(regression_batches(60, size=64), squared_error(model)))
    assert np.mean([r.loss for r in reports[-3:]]) < reports[0].loss
    assert any(r.accepted > 1 for r in reports)


def test_sequential_ablation_evaluates_the_last_proxy_alone():
    theta = torch.nn.Parameter(torch.linspace(-2, 2, 20, dtype=torch.float64))
    optimizer = OptEx.from_paper(torch.optim.SGD([theta], lr=0.3), parallelism=4, evaluate="last")
    reports = list(optimizer.rounds([None] * 40, lambda _: objective(theta)))
    assert [r.evaluated for r in reports] == [1] * 10
    assert len(optimizer.history) == 10
    assert reports[-1].loss < reports[0].loss


def test_selection_keeps_what_it_says():
    # One dimension, minimum at 0, far too large a step: the proxies go 1, -2, 4, ...; the first is the best.
    theta = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = OptEx.from_paper(
        torch.optim.SGD([theta], lr=1.5),
        parallelism=3,
        history_size=9,
        selection="lowest-loss",
        lengthscale=100.0,
    )
    taken = [r.accepted for r in optimizer.rounds([None] * 12, lambda _: theta.square().sum())]
    assert taken[2:] == [1, 1]  # once the model has seen the slope, it never keeps a worse proxy
    assert abs(theta.item()) == pytest.approx(2.0**4)


def test_hold_last_repeats_the_last_gradient():
    # SGD on a linear function: holding the gradient is exact, so N steps a round are N steps of SGD.
    theta = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    optimizer = OptEx(
        torch.optim.SGD([theta], lr=0.1), parallelism=4, stride=1, estimator=HoldLast(), deterministic=True
    )
    taken = [r.accepted for r in optimizer.rounds([None] * 15, lambda _: theta @ slope)]
    assert taken == [1, 4, 4, 4, 2]  # the first round has nothing to hold yet
    torch.testing.assert_close(theta.detach(), -1.5 * slope)
