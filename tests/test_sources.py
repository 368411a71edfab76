"""Sources of gradients: what they declare and tell, and what the estimators make of it."""

import math

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

import optex
from optex import CurlFreeEstimator, GradientHistory, GradientSource, OptEx, SeparableEstimator, small
from optex.estimators.noise import relative_noise
from optex.evaluators import Evaluator, SequentialEvaluator, WrappingEvaluator
from optex.sources import AccumulatingSource, ObjectiveSource
from optex.stepping import ParameterVector
from tests.models import network, regression_batches, request, same, snapshot, squared_error

DIMENSION = 40


class NoisyBowl(GradientSource):
    """½‖θ‖² with Gaussian noise on its gradient, whose variance it may tell."""

    def __init__(self, theta, deviation, *, tells):
        self.theta, self.deviation, self.tells = theta, deviation, tells
        self.generator = torch.Generator().manual_seed(0)

    def gradient(self, batch):
        noise = torch.randn(len(self.theta), generator=self.generator, dtype=torch.float64)
        self.theta.grad = self.theta.detach() + self.deviation * noise
        loss = self.theta.detach().square().sum() / 2
        return loss, torch.tensor(self.deviation**2) if self.tells else None


def bowl(deviation, *, tells, estimator):
    theta = nn.Parameter(torch.linspace(1, 2, DIMENSION, dtype=torch.float64))
    source = NoisyBowl(theta, deviation, tells=tells)
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.05), estimator=estimator)
    reports = list(optimizer.rounds(range(60), source))
    return optimizer, reports


def test_told_noise_is_in_the_history():
    optimizer, _ = bowl(0.3, tells=True, estimator=SeparableEstimator())
    assert not optimizer.history.is_sampled
    assert optimizer.history.tells_noise
    torch.testing.assert_close(optimizer.history.noise_variance, torch.full((16,), 0.09, dtype=torch.float64))


def test_gradients_whose_noise_is_not_told_count_as_sampled():
    optimizer, _ = bowl(0.3, tells=False, estimator=SeparableEstimator())
    assert optimizer.history.is_sampled
    assert not optimizer.history.tells_noise
    assert optimizer.history.noise_variance.isnan().all()


@pytest.mark.parametrize(
    "estimator",
    [SeparableEstimator(prior_mean="gls"), CurlFreeEstimator("rbf", median_multiple=3.0, noise_variance=1e-9)],
)
def test_estimators_smooth_by_the_noise_they_are_told(estimator):
    errors = {}
    for tells in (True, False):
        optimizer, _ = bowl(0.5, tells=tells, estimator=estimator)
        point = optimizer.stepper.point
        predicted = estimator.fit(optimizer.history).mean(point)
        errors[tells] = float((predicted - point).norm())  # the true gradient is the point
    assert errors[True] < 0.8 * errors[False]


def gaussian_field(count, deviations, lengthscale=1.0, seed=0):
    """Gradients drawn from the separable prior itself, with noise of these deviations."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 4000, generator=generator, dtype=torch.float64) / math.sqrt(4000)
    squared = torch.cdist(points, points).square()
    covariance = torch.exp(-squared / 2 / lengthscale**2) + 1e-10 * torch.eye(count, dtype=torch.float64)
    normal = torch.randn(count, 4000, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 4000, generator=generator, dtype=torch.float64)
    gradients = 3.0 * torch.linalg.cholesky(covariance) @ normal + torch.tensor(deviations)[:, None] * noise
    return points, gradients, covariance


def test_noise_is_put_in_units_of_the_prior():
    deviations = [0.6, 1.2, 0.6, 2.4, 1.2, 0.6]
    points, gradients, covariance = gaussian_field(6, deviations)
    history = GradientHistory(6, 4000)
    history.append(points, gradients, [deviation**2 for deviation in deviations])
    found = relative_noise(history, history.representatives, covariance.numpy(), 1e-6)
    expected = np.square(deviations) / 9.0  # the prior's variance is 3²
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0)


def test_gradients_that_are_all_noise_are_averaged():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(8, 50, generator=generator, dtype=torch.float64)
    gradients = 1 + torch.randn(8, 50, generator=generator, dtype=torch.float64)
    history = GradientHistory(8, 50)
    history.append(points, gradients, [1.0] * 8)
    mean = SeparableEstimator(prior_mean="gls").fit(history).mean(points[0])
    assert (mean - gradients.mean(0)).abs().max() < 0.25 * gradients.std()


def test_one_pair_with_told_noise_can_be_fitted():
    history = GradientHistory(4, 3)
    history.append(torch.ones(1, 3), torch.ones(1, 3), [0.5])
    for estimator in (SeparableEstimator(prior_mean="gls"), CurlFreeEstimator()):
        assert estimator.fit(history).mean(torch.zeros(3)).isfinite().all()


def test_merged_pairs_average_their_noise():
    history = GradientHistory(4, 3)
    history.append(torch.ones(3, 3), torch.eye(3), [1.0, 2.0, 3.0])
    assert len(history.representatives) == 1
    assert float(history.noise_variance[history.representatives[0]]) == pytest.approx(6 / 9)
    history.append(torch.ones(1, 3), torch.ones(1, 3), [math.nan])
    assert history.noise_variance[history.representatives[0]].isnan()


# ---------------------------------------------------------------- accumulation


def gradients_of(parameters):
    """Copies of them, of parameters that all have one."""
    assert all(p.grad is not None for p in parameters)
    return [p.grad.clone() for p in parameters]


def micro_batches(count):
    return [list(zip(x.split(1), y.split(1), strict=True)) for x, y in regression_batches(count, size=8)]


def test_accumulation_tells_the_noise_of_the_mean():
    model = network()
    parameters = list(model.parameters())
    error, batch = squared_error(model), micro_batches(1)[0]
    loss, variance = AccumulatingSource(error, parameters).gradient(batch)
    accumulated = gradients_of(parameters)
    rows = []
    for micro_batch in batch:
        for p in parameters:
            p.grad = None
        error(micro_batch).backward()
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients_of(parameters)]))
    rows = torch.stack(rows)
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in accumulated]), rows.mean(0))
    torch.testing.assert_close(variance, rows.var(0).mean() / len(rows))
    for p in parameters:
        p.grad = None
    plain, unknown = AccumulatingSource(error).gradient(batch)
    assert unknown is None
    assert torch.equal(plain, loss)
    assert same(gradients_of(parameters), accumulated)  # to the bit


def test_accumulation_trains_with_what_it_tells():
    ends = {}
    for tells in (True, False):
        model = network()
        source = AccumulatingSource(squared_error(model), list(model.parameters()) if tells else None)
        optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02))
        list(optimizer.rounds(micro_batches(60), source))
        assert optimizer.history.tells_noise == tells
        held = regression_batches(1, seed=9, size=200)[0]
        ends[tells] = squared_error(model)(held).item()
    start = squared_error(network())(held).item()
    assert ends[True] < 0.7 * start
    assert ends[True] < 1.1 * ends[False]


# ---------------------------------------------------------------- evaluators hand on what sources tell


@pytest.mark.parametrize(
    "make", [SequentialEvaluator, lambda: optex.WorkersEvaluator(lambda f, t: [*map(f, t)])]
)
def test_noise_comes_through(make):
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    source, vector = NoisyBowl(theta, 0.5, tells=True), ParameterVector([theta])
    found = make().evaluate(request(source, vector, torch.ones(2, 3, dtype=torch.float64), [0, 1]))
    assert found.noise_variance.tolist() == [0.25, 0.25]
    source.tells = False
    found = make().evaluate(request(source, vector, torch.ones(2, 3, dtype=torch.float64), [0, 1]))
    assert found.noise_variance is None


def test_evaluators_wrap_evaluators():
    class Counting(WrappingEvaluator):
        points = 0

        def evaluate(self, request):
            self.points += len(request)
            return self.inner.evaluate(request)

    inner = Counting(SequentialEvaluator())
    outer = Counting(inner)
    batches, ends, evaluated = regression_batches(20), [], 0
    for evaluator in (SequentialEvaluator(), outer):
        model = network()
        optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02), evaluator=evaluator)
        evaluated = sum(report.evaluated for report in optimizer.rounds(batches, squared_error(model)))
        ends.append(snapshot(model))
    assert same(*ends)
    assert outer.points == inner.points == evaluated


@pytest.mark.parametrize("make", [lambda m: SequentialEvaluator(), optex.VectorizedEvaluator])
def test_the_hook_runs_at_every_point_of_every_evaluator(make):
    model = network()
    vector, seen = ParameterVector(model.parameters()), []

    def hook():
        seen.append(vector.read())
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)

    points = vector.read() + torch.arange(3, dtype=torch.float64)[:, None]
    source = ObjectiveSource(squared_error(model))
    plain = make(model).evaluate(request(source, vector, points, regression_batches(3)))
    hooked = make(model).evaluate(request(source, vector, points, regression_batches(3), gradient_hook=hook))
    assert torch.equal(torch.stack(seen), points)
    assert torch.equal(hooked.gradients, 0.5 * plain.gradients)


# ---------------------------------------------------------------- threads


class Watching(optex.HoldLast):
    """Notes how many threads torch has where it is asked."""

    threads = None

    def fit(self, history):
        type(self).threads = torch.get_num_threads()
        return super().fit(history)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("size", "threads"), [(100, 1), (40_000, 2)])
def test_short_rounds_are_on_one_thread_and_gradients_on_the_users(size, threads):
    theta, seen = nn.Parameter(torch.ones(size)), []

    class Noting(Evaluator):
        def evaluate(self, request):
            seen.append(torch.get_num_threads())
            return SequentialEvaluator().evaluate(request)

    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), estimator=Watching(), evaluator=Noting())
    list(optimizer.rounds(range(6), lambda _: theta.square().sum()))
    assert Watching.threads == threads
    assert set(seen) == {2}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_small_systems_are_solved_on_one_thread(monkeypatch):
    seen, during, plain = [], [], small._potrf
    threads = lambda: {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}  # noqa: E731

    def noting(*arguments, **options):
        seen.append(threads())
        return plain(*arguments, **options)

    def objective(i):
        during.append(threads())
        return (theta - i).square().mean()

    monkeypatch.setattr(small, "_potrf", noting)
    theta = nn.Parameter(torch.ones(40_000))
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1))
    with threadpool_limits(2, user_api="blas"):
        list(optimizer.rounds(range(12), objective))
    assert seen
    assert all(each == {1} for each in seen)
    assert all(each == {2} for each in during)


@pytest.mark.parametrize("source", [optex.SPSASource, optex.ConsensusSource, optex.CoordinateSource])
@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (torch.nn.Linear(2, 1), TypeError, r"got a module; pass module.parameters\(\)"),
        (torch.ones(2), TypeError, r"got one tensor; pass \[tensor\]"),
        (3, TypeError, "must be a list of tensors, got int"),
        ([torch.ones(2, dtype=torch.int64)], TypeError, "floating-point tensors, got a tensor of torch.int64"),
        ([torch.ones(0)], ValueError, "hold no number"),
    ],
    ids=["module", "tensor", "number", "integers", "empty"],
)
def test_what_are_no_parameters_is_refused_by_name(source, parameters, error, message):
    with pytest.raises(error, match=f"{source.__name__}: .*parameters .*{message}"):
        source(lambda _: torch.zeros(()), parameters)
