"""Tolerance 0 is the base optimizer's own run, whatever the evaluator, window and schedule do."""

import itertools

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from optex import HoldLast, LowestLoss, OptEx, SeparableEstimator, VectorizedEvaluator, WithinTolerance
from optex.acceptance import Last
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


def schedule(base):
    warm_up = LinearLR(base, 0.1, total_iters=4)
    return SequentialLR(base, [warm_up, CosineAnnealingLR(base, 30)], milestones=[4])


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("parallelism", [2, 5])
def test_tolerance_zero_is_vanilla_bit_for_bit(name, parallelism):
    batches = regression_batches(23)
    plain, model = network(), network()
    base = BASES[name](list(plain.parameters()))
    trajectory = plain_run(plain, base, batches, schedule(base))
    twin = BASES[name](list(model.parameters()))
    optimizer = OptEx(twin, parallelism=parallelism, acceptance=WithinTolerance(0.0), scheduler=schedule(twin))
    steps = 0
    for report in optimizer.rounds(batches, squared_error(model)):
        steps += report.accepted
        assert same(snapshot(model), trajectory[steps - 1])
    assert steps == len(batches)
    assert_same_state(twin, base)


def test_windows_keep_batches_in_order_and_take_all_of_them():
    seen, model = [], network()
    batches = regression_batches(30)
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.01), parallelism=4)
    error = squared_error(model)

    def objective(item):
        seen.append(item[0])
        return error(item[1])

    reports = list(optimizer.rounds(enumerate(batches), objective))
    assert sum(r.accepted for r in reports) == 30
    assert max(r.accepted for r in reports) > 1
    position, expected = 0, []
    for report in reports:
        expected += range(position, min(position + 4, 30))
        position += report.accepted
    assert seen == expected


def test_a_perfect_estimate_is_replayed_whole():
    theta = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=5)
    taken = [r.accepted for r in optimizer.rounds([None] * 25, lambda _: theta @ slope)]
    assert taken[1:-1] == [5] * (len(taken) - 2)
    torch.testing.assert_close(theta.detach(), -2.5 * slope)


def test_tolerance_orders_how_much_is_kept():
    taken = {}
    for tolerance in (0.0, 1.0, 1e9):
        model = network()
        optimizer = OptEx(
            torch.optim.Adam(model.parameters(), lr=0.05), parallelism=6, acceptance=WithinTolerance(tolerance)
        )
        reports = list(itertools.islice(optimizer.rounds(regression_batches(200), squared_error(model)), 20))
        taken[tolerance] = sum(r.accepted for r in reports)
    assert taken[0.0] <= taken[1.0] <= taken[1e9] == 120
    assert taken[0.0] < taken[1e9]


def test_corrected_gradients_are_those_of_the_formula():
    # Replay written out: y_0 = θ, step with g_0, then with g_i + μ(y_i) - μ(x_i), μ fitted to all pairs.
    theta = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    estimator = SeparableEstimator(prior_mean="gls", lengthscale=2.0, noise_variance=1e-4)
    optimizer = OptEx(
        torch.optim.SGD([theta], lr=0.2), parallelism=3, estimator=estimator, acceptance=WithinTolerance(1e9)
    )
    rounds = optimizer.rounds([None] * 12, lambda _: theta.square().square().sum())
    next(rounds)
    start, held, posterior = theta.detach().clone(), optimizer.history, optimizer._fitted()
    proxies = [start]
    for _ in range(2):
        proxies.append(proxies[-1] - 0.2 * posterior.mean(proxies[-1]))
    next(rounds)
    posterior = estimator.fit(held)
    y = start - 0.2 * 4 * start**3
    for proxy in proxies[1:]:
        y = y - 0.2 * (4 * proxy**3 + posterior.mean(y) - posterior.mean(proxy))
    torch.testing.assert_close(theta.detach(), y, rtol=1e-12, atol=1e-12)


def test_absurd_gradients_are_not_believed():
    # A cliff at 1: beyond it the slope is a thousand times larger.
    theta = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=4, estimator=HoldLast())
    cliff = lambda _: torch.where(theta < 0.45, -theta, 1e3 * theta).sum()  # noqa: E731
    reports = list(itertools.islice(optimizer.rounds(itertools.repeat(None), cliff), 2))
    assert reports[0].accepted == 3
    assert reports[1].dropped == (2, 3)  # proxies 0.3 and 0.4 are fine, 0.5 and 0.6 are not
    assert reports[1].accepted == 2
    assert all(optimizer.history.gradients.abs() < 20)


def test_closures_draw_their_own_batches():
    model, batches = network(), iter(regression_batches(40))
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02), parallelism=4)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = squared_error(model)(next(batches))
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert len(calls) == 40
    assert losses == calls[::4]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("acceptance", [WithinTolerance(), Last(), LowestLoss()])
def test_evaluators_give_one_trajectory(acceptance):
    ends = []
    for evaluator in (lambda m: None, VectorizedEvaluator, lambda m: VectorizedEvaluator(m, chunk_size=2)):
        model = network()
        optimizer = OptEx(
            torch.optim.AdamW(model.parameters(), lr=0.02),
            parallelism=5,
            # Noise enough for well conditioned systems: rounding then stays rounding over the rounds.
            estimator=SeparableEstimator(prior_mean="gls", noise_variance=1e-3),
            acceptance=acceptance,
            evaluator=evaluator(model),
        )
        losses = [r.loss for r in optimizer.rounds(regression_batches(61), squared_error(model))]
        ends.append((losses, snapshot(model)))
    for losses, end in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-9)
        for a, b in zip(end, ends[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithinTolerance(-1.0), "WithinTolerance: tolerance must not be negative, got -1.0"),
        (lambda: WithinTolerance(float("nan")), "WithinTolerance: tolerance must not be negative, got nan"),
        (lambda: WithinTolerance(absurd=0), "WithinTolerance: absurd must be positive, got 0"),
        (lambda: Last("first"), "Last: evaluate must be 'all' or 'last', got 'first'"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
