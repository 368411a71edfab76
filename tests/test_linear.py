"""Rounds of linear base optimizers in small algebra are those of walking."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from optex import CurlFreeEstimator, HoldLast, Last, LowestLoss, OptEx, SeparableEstimator, WithinTolerance
from optex.estimators.interface import Coefficients
from optex.round import acceptance as acceptance_module
from optex.round import linear
from optex.round import round as round_module
from optex.round.linear import LinearReplay, draft_linearly
from optex.stepping import FlatStepper, ParameterVector
from optex.stepping.linear import linear_rule

SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "maximize": True},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.01},
]
# Well-conditioned ones: others make much of rounding.
ESTIMATORS = [
    CurlFreeEstimator(noise_variance=1e-2),
    SeparableEstimator(noise_variance=1e-2),
    SeparableEstimator(noise_variance=1e-2, prior_mean="gls"),
    HoldLast(),
]


@pytest.fixture(autouse=True)
def any_length(monkeypatch):
    monkeypatch.setattr(linear, "SHORTEST", 1)


@pytest.fixture
def walking(monkeypatch):
    """Switch small algebra off."""

    def switch():
        monkeypatch.setattr(round_module, "linear_rule", lambda *_: None)
        monkeypatch.setattr(acceptance_module, "linear_replay", lambda *_: None)

    return switch


def model(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator, dtype=dtype)) for size in ((50,), (7, 3))]


def squares_of(parameters):
    """The sum of their squares, as an objective."""
    return lambda _: torch.cat([p.flatten() for p in parameters]).square().sum()


def optimizer_of(parameters, settings, **options):
    return OptEx(torch.optim.SGD(parameters, **settings), **{"parallelism": 4, **options})


def run(settings, rounds=6, dtype=torch.float64, *, deterministic=True, **options):
    parameters = model(dtype)
    optimizer = optimizer_of(parameters, settings, deterministic=deterministic, **options)
    sign = -1 if settings.get("maximize") else 1
    scales = torch.linspace(0.1, 2, 50, dtype=dtype)

    def objective(batch):
        first, second = parameters
        loss = (scales * first.square()).sum() / 2 + second.square().sum() + 0.1 * torch.cos(first).sum()
        return sign * (loss if batch is None else loss + 0.1 * (first * torch.sin(batch * scales)).sum())

    batches = itertools.repeat(None) if deterministic else itertools.count()
    reports = list(itertools.islice(optimizer.rounds(batches, objective), rounds))
    state = [optimizer.base.state[p].get("momentum_buffer") for p in parameters]
    gradients = [p.grad for p in parameters]
    return reports, [*(p.detach() for p in parameters), *gradients, *(b for b in state if b is not None)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: f"{type(e).__name__}")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("stride", "rounds", "tolerance"), [(1, 3, 1e-10), (3, 3, 1e-10), (1, 8, 1e-7), (3, 8, 1e-7)]
)
def test_runs_are_those_of_walking(walking, settings, estimator, deterministic, stride, rounds, tolerance):
    # A fit makes more of rounding than a round does, and the next one of that.
    options = {"estimator": estimator, "deterministic": deterministic, "stride": stride, "rounds": rounds}
    ours, values = run(settings, **options)
    walking()
    plainly, expected = run(settings, **options)
    assert [r.accepted for r in ours] == [r.accepted for r in plainly]
    for left, right in zip(values, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    for left, right in zip(ours, plainly, strict=True):
        torch.testing.assert_close(left.losses, right.losses, rtol=tolerance, atol=tolerance)
        assert left.prediction_error == pytest.approx(right.prediction_error, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("acceptance", [Last(), LowestLoss(), WithinTolerance(0.0), WithinTolerance(0.3)])
def test_every_acceptance_takes_the_same_steps(walking, acceptance):
    options = {"acceptance": acceptance, "estimator": ESTIMATORS[0], "stride": 1, "rounds": 3}
    ours, values = run(SETTINGS[2], **options)
    walking()
    plainly, expected = run(SETTINGS[2], **options)
    assert [r.accepted for r in ours] == [r.accepted for r in plainly]
    for left, right in zip(values, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_steps_that_were_measured_before_are_corrected_alike(walking):
    # A tolerance this small keeps few steps; the others are in the next round's window with what was measured.
    options = {
        "acceptance": WithinTolerance(0.05, adaptive=False),
        "estimator": ESTIMATORS[0],
        "stride": 1,
        "rounds": 5,
    }
    ours, values = run(SETTINGS[2], deterministic=False, **options)
    walking()
    plainly, expected = run(SETTINGS[2], deterministic=False, **options)
    kept = [r.accepted for r in ours]
    assert kept == [r.accepted for r in plainly]
    assert min(kept) < 4
    for left, right in zip(values, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_no_step_is_walked(monkeypatch):
    calls, real = [], FlatStepper.step
    monkeypatch.setattr(FlatStepper, "step", lambda self, gradient: calls.append(1) or real(self, gradient))
    run(SETTINGS[2], rounds=2, estimator=ESTIMATORS[0], stride=1)
    before = len(calls)
    reports, _ = run(SETTINGS[2], rounds=8, estimator=ESTIMATORS[0], stride=1)
    single = sum(r.accepted == 1 for r in reports[2:])
    assert len(calls) - 2 * before == single


@pytest.mark.parametrize(
    ("change", "linear"),
    [
        (lambda groups: None, True),
        (lambda groups: groups[1].update(lr=0.2), False),
        (lambda groups: groups[0].update(lr=torch.tensor(0.1)), False),
        (lambda groups: groups[1].update(momentum=0.5), False),
    ],
)
def test_groups_that_differ_are_walked(change, linear):
    parameters = model()
    base = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1, momentum=0.9)
    change(base.param_groups)
    assert (linear_rule(base, ParameterVector(parameters)) is not None) == linear
    assert linear_rule(torch.optim.Adam(parameters), ParameterVector(parameters)) is None


def test_schedules_are_walked(monkeypatch):
    calls = []
    monkeypatch.setattr(round_module, "draft_linearly", lambda *a: calls.append(1) or draft_linearly(*a))
    real = LinearReplay.__init__
    monkeypatch.setattr(LinearReplay, "__init__", lambda *a: calls.append(2) or real(*a))
    for scheduled, expected in ((False, {1, 2}), (True, set())):
        calls.clear()
        parameters = model()
        base = torch.optim.SGD(parameters, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.99) if scheduled else None
        optimizer = OptEx(base, scheduler=scheduler, deterministic=True)
        list(optimizer.rounds(itertools.repeat(None, 20), squares_of(parameters)))
        assert set(calls) == expected


def test_short_vectors_and_long_drafts_are_walked(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, "SHORTEST", 4097)
    monkeypatch.setattr(
        round_module, "draft_linearly", lambda *a: calls.append(a[0].positions[-1]) or draft_linearly(*a)
    )
    for size in (4096, 5000):
        theta = nn.Parameter(torch.linspace(-1, 1, size))
        optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), deterministic=True)
        rounds = optimizer.rounds(itertools.repeat(None), lambda _, theta=theta: theta.square().sum() / 2)
        assert max(report.drafted for report in itertools.islice(rounds, 8)) > 17
        assert bool(calls) == (size > 4096)
    assert max(calls) <= 16


@dataclass(frozen=True)
class Changing(HoldLast):
    """Predicts something else whenever it is asked."""

    amount: float = 0.0

    def fit(self, history):
        posterior, calls = super().fit(history), itertools.count(1)
        posterior.coefficients = lambda locations: Coefficients(
            np.full((1, history.size), self.amount * next(calls))
        )
        return posterior


@pytest.mark.parametrize("amount", [math.nan, math.inf, 1e308])
def test_corrections_that_are_not_finite_leave_the_exact_first_step(amount):
    parameters, twins = model(), model()
    wide = WithinTolerance(1e9, adaptive=False)
    optimizer = optimizer_of(
        parameters, SETTINGS[2], estimator=Changing(amount), acceptance=wide, deterministic=True, stride=1
    )
    base = torch.optim.SGD(twins, **SETTINGS[2])
    rounds = optimizer.rounds(itertools.repeat(None), squares_of(parameters))
    for _ in range(3):
        assert next(rounds).accepted == 1
        base.zero_grad()
        squares_of(twins)(None).backward()
        base.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, twins, strict=True))
