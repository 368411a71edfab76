"""Tolerance 0 is the base optimizer's own run, whatever the evaluator, window and schedule do."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from optex import (
    HoldLast,
    LowestLoss,
    NonFiniteError,
    NotPositiveDefiniteError,
    OptEx,
    SeparableEstimator,
    VectorizedEvaluator,
    WithinTolerance,
)
from optex.estimators.hold_last import _HeldGradient
from optex.round import Last, RoundRecord
from optex.sources import ObjectiveSource
from optex.stepping import ParameterVector, Stepper
from optex.studies.problems import make_problem
from optex.vector_space import VectorSpace
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
    if name == "adam-tensor-lr" and torch.__version__ < "2.7":
        pytest.skip("torch 2.6: SequentialLR makes a tensor lr and its initial_lr one tensor, and spoils both")
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
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.01), parallelism=4, stride=1)
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
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=5, stride=1, deterministic=True)
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
        torch.optim.SGD([theta], lr=0.05),
        parallelism=3,
        estimator=estimator,
        acceptance=WithinTolerance(1e9, adaptive=False),
        stride=1,
        deterministic=True,
    )
    rounds = optimizer.rounds([None] * 20, lambda _: theta.square().square().sum())
    for _ in range(3):
        next(rounds)
    start, held, posterior = theta.detach().clone(), optimizer.history, optimizer._rounds.predictor.posterior()
    assert posterior is not None
    proxies = [start]
    for _ in range(2):
        proxies.append(proxies[-1] - 0.05 * posterior.mean(proxies[-1]))
    next(rounds)
    posterior = estimator.fit(held)
    y = start - 0.05 * 4 * start**3
    for proxy in proxies[1:]:
        y = y - 0.05 * (4 * proxy**3 + posterior.mean(y) - posterior.mean(proxy))
    torch.testing.assert_close(theta.detach(), y, rtol=1e-12, atol=1e-12)


NOT_ASKED = ObjectiveSource(torch.sum)


def record_of(steps, gaps, posterior=None):
    """A round whose exact steps are these, from 0, each proxy beside the point that they lead to."""
    theta = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    base = torch.optim.SGD([theta], lr=1.0)
    stepper, positions = Stepper(base, ParameterVector([theta])), range(len(steps))
    record = RoundRecord(0, NOT_ASKED, [], len(steps), positions, stepper, VectorSpace(1), None)
    steps = torch.tensor(steps, dtype=torch.float64)
    reached = torch.cat([steps.new_zeros(1), steps.cumsum(0)])[:-1]
    record.gradients = -steps[:, None]
    record.proxies = (reached + torch.tensor([0.0, *gaps], dtype=torch.float64))[:, None]
    record.usable, record.posterior = [True] * len(steps), posterior
    return record


@pytest.mark.parametrize(
    ("steps", "gap", "accepted"),
    [
        ([1.0, 10.0, 1.0], 2.0, 3),
        ([1.0, 10.0, 1.0], 3.0, 2),  # steps that grow: the first is the measure, not the last
        ([10.0, 1.0, 1.0], 2.0, 3),
        ([10.0, 1.0, 1.0], 3.0, 2),  # steps that shrink: the last is
        ([10.0, 1.0, 10.0, 1.0], 3.0, 3),  # and in between, neither is
        ([10.0, 10.0, 1.0], 3.0, 3),
        ([10.0, 10.0, 1.0], 20.0, 3),
        ([10.0, 10.0, 1.0], 20.1, 2),
    ],
)
def test_distance_is_measured_in_the_shortest_step_so_far(steps, gap, accepted):
    # Every proxy but the last is where the replay comes by.
    record = record_of(steps, [0.0] * (len(steps) - 2) + [gap])
    assert WithinTolerance(2.0, adaptive=False).replay(record) == accepted
    assert record.stepper.point.item() == sum(steps[:accepted])


class ConstantChange(_HeldGradient):
    """Holds the last gradient, and takes one amount for the change to anywhere, its own place included."""

    amount = 0.0

    def differences(self, locations, origins):
        return torch.full_like(locations.points, self.amount)


@dataclass(frozen=True)
class Changing(HoldLast):
    amount: float = 0.0

    def fit(self, history):
        posterior = ConstantChange(history)
        posterior.amount = self.amount
        return posterior


@pytest.mark.parametrize("amount", [torch.nan, torch.inf, 1e308])
@pytest.mark.parametrize("parallelism", [2, 4])
def test_corrections_that_are_not_finite_leave_the_exact_first_step(amount, parallelism):
    plain, model, batches = network(), network(), regression_batches(6)
    # Groups that differ: what is linear and of one kind asks for coefficients, not for differences.
    decays = (0.01, 0.0, 0.0, 0.0)
    base, twin = (
        torch.optim.SGD(
            [{"params": [p], "weight_decay": d} for p, d in zip(each.parameters(), decays, strict=True)],
            lr=10.0,  # 10 times 1e308 is not finite either
            momentum=0.9,
        )
        for each in (plain, model)
    )
    optimizer = OptEx(
        twin,
        parallelism=parallelism,
        estimator=Changing(amount),
        acceptance=WithinTolerance(1e9, adaptive=False),
    )
    report = next(optimizer.rounds(batches, squared_error(model)))
    assert report.accepted == 1
    assert report.dropped == ()
    plain_run(plain, base, batches[:1])
    assert same(snapshot(model), snapshot(plain))
    assert_same_state(twin, base)


def test_where_a_gradient_was_measured_it_is_not_corrected():
    # A constant gradient is predicted exactly, so every proxy is a point of vanilla's; what the estimator takes
    # for the change from a point to itself, rounding as a rule, must not get in.
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    plain, theta = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    base = torch.optim.Adam([plain], lr=0.1)
    for _ in range(9):
        plain.grad = slope.clone()
        base.step()
    optimizer = OptEx(
        torch.optim.Adam([theta], lr=0.1),
        parallelism=4,
        estimator=Changing(1e-3),
        acceptance=WithinTolerance(0.0),
        deterministic=True,
    )
    reports = list(optimizer.rounds([None] * 9, lambda _: theta @ slope))
    assert [report.accepted for report in reports] == [1, 4, 4]
    assert torch.equal(theta, plain)


def test_absurd_gradients_count_as_implausible():
    # A cliff at 1: beyond it the slope is a thousand times larger.
    theta = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=4, estimator=HoldLast(), deterministic=True)
    cliff = lambda _: torch.where(theta < 0.25, -theta, 1e3 * theta).sum()  # noqa: E731
    reports = list(itertools.islice(optimizer.rounds(itertools.repeat(None), cliff), 2))
    assert reports[1].dropped == (2, 3)  # proxies 0.1 and 0.2 are fine, 0.3 and 0.4 are not
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
    assert losses == calls[::4]  # of each round's first point; every evaluation drew a batch
    assert len(calls) == 40
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
        (lambda: WithinTolerance(absurd=0.5), "WithinTolerance: absurd must be at least 1, .*got 0.5"),
        (
            lambda: Last("first"),  # pyright: ignore[reportArgumentType]
            "Last: evaluate must be 'all' or 'last', got 'first'",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def measured_round(distances, wrong, *, usable=None):
    """A round whose steps have length 1 and whose predictions were wrong by that much, relatively."""
    count = len(distances)
    proxies = torch.arange(count + 1.0, dtype=torch.float64)[:, None]
    gradients = torch.ones(count + 1, 1, dtype=torch.float64)
    theta = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    stepper = Stepper(torch.optim.SGD([theta], lr=1.0), ParameterVector([theta]))
    record = RoundRecord(
        0, NOT_ASKED, [], count + 1, range(count + 1), stepper, VectorSpace(gradients.shape[1]), None
    )
    record.proxies, record.gradients = proxies, gradients
    record.drafted = gradients[:-1] * (1 + torch.tensor(wrong, dtype=torch.float64)[:, None])
    record.usable = [True] * (count + 1) if usable is None else usable
    record.evaluated, record.predicted = range(count + 1), list(range(count))
    record.distances = [None if r is None else torch.tensor(r, dtype=torch.float64) for r in distances]
    return record


@pytest.mark.parametrize(
    ("distances", "wrong", "expected"),
    [
        ([1.0], [0.5], 1.0),  # wrong by the bearable half at one step: one step
        ([2.0, 2.0, 2.0], [0.5, 0.1, 1.0], 2.0),  # the median of 2, 10 and 1
        ([1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 1.0], 0.5),  # the far one says nothing
        ([1.0], [0.125], 2.8284271247461903),  # half way, in logarithms, from 2 to 4
        ([1.0], [1e-9], 8.0),  # the bound is 32
        ([1.0], [1e9], 0.1),
        ([None, 1.0], [1e9, 0.5], 1.0),  # a minibatch never seen before is no evidence
        ([0.0, 1.0], [1e9, 0.5], 1.0),  # nor is no distance
        ([None], [0.0], 2.0),
    ],
)
def test_tolerance_is_what_the_evidence_bears(distances, wrong, expected):
    rule = WithinTolerance()
    rule._learn(measured_round(distances, wrong))
    assert rule.tolerance == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::optex.JitterWarning", "ignore::optex.ConvergenceWarning")
def test_momentum_in_a_narrow_valley_does_not_diverge():
    # With a fixed tolerance of 2 this run is lost within a few rounds; vanilla converges.
    ends = {}
    for name, acceptance in {"adaptive": None, "fixed": WithinTolerance(adaptive=False)}.items():
        problem = make_problem("rosenbrock", dim=1000, seed=0)
        base = torch.optim.SGD(problem.parameters(), lr=0.3, momentum=0.9)
        optimizer = OptEx(base, parallelism=5, acceptance=acceptance, deterministic=True)
        try:
            for _ in itertools.islice(optimizer.rounds(problem.batches(), problem), 40):
                pass
            ends[name] = problem.evaluate()
        except (NonFiniteError, NotPositiveDefiniteError):
            ends[name] = float("inf")
    assert ends["adaptive"] < 2.0
    assert ends["fixed"] > 100


@pytest.mark.parametrize(("lookahead", "expected"), [(None, {16}), (2.0, {1, 4, 6, 8, 10, 12, 14, 16})])
def test_lookahead_limits_what_is_evaluated(lookahead, expected):
    model = network()
    acceptance = WithinTolerance(0.5, adaptive=False, lookahead=lookahead)
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02), parallelism=16, acceptance=acceptance)
    reports = list(itertools.islice(optimizer.rounds(regression_batches(300), squared_error(model)), 20))
    assert {r.evaluated for r in reports} <= expected
    for before, after in itertools.pairwise(reports):
        if lookahead:
            assert after.evaluated == min(16, max(4, 2 * before.accepted))


@pytest.mark.parametrize(
    ("lookahead", "kept", "expected"),
    [
        (1.5, 5, 8),  # 7.5 steps
        (1.25, 5, 7),  # 6.25
        (1.01, 10, 11),
        (2.0, 5, 10),
        (1.0, 7, 7),
        (1.5, 2, 4),  # the least
        (1.5, 12, 16),  # the most
        (1.5, None, 16),  # before the first round
    ],
)
def test_parts_of_a_step_ahead_count_as_one(lookahead, kept, expected):
    rule = WithinTolerance(lookahead=lookahead)
    rule.load_state_dict({"tolerance": 2.0, "kept": kept, "length": 0.0})
    assert rule.ahead(16) == expected


def test_a_round_is_taken_back_from_its_end():
    calls, record = [], record_of([1.0], [])

    def interrupted():
        calls.append("interrupted")
        if calls.count("interrupted") == 1:
            raise KeyboardInterrupt

    record.undo += [lambda: calls.append("first"), interrupted, lambda: calls.append("last")]
    with pytest.raises(KeyboardInterrupt):
        record.take_back()
    assert calls == ["last", "interrupted"]
    record.take_back()  # goes on with what was not finished
    assert calls == ["last", "interrupted", "interrupted", "first"]
    assert record.undo == []
