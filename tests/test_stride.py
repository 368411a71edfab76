import copy
import itertools
import math

import pytest
import torch
from torch import nn

import optex
from optex import OptEx, RoundReport, SeparableEstimator, WithinTolerance, WorkersEvaluator
from optex.evaluators import VectorizedEvaluator
from optex.round.stride import LARGEST_ERROR, Stride
from optex.round.surprise import Surprises
from optex.studies.problems import make_problem
from optex.vector_space import VectorSpace
from tests.models import assert_equal_trees, network, regression_batches, snapshot, squared_error


def smooth(batch=None):
    """A bowl of eight parameters, as its own objective."""
    theta = nn.Parameter(torch.linspace(-1, 2, 8, dtype=torch.float64))
    curvature = torch.logspace(-2, 0, 8, dtype=torch.float64)
    return theta, lambda _: 0.5 * (curvature * theta.square()).sum()


def run(parallelism, *, steps=60, lr=0.05, **options):
    theta, objective = smooth()
    optimizer = OptEx(torch.optim.Adam([theta], lr=lr), parallelism=parallelism, deterministic=True, **options)
    return theta, optimizer, list(optimizer.rounds([None] * steps, objective))


# ---------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("value", "count"), list(itertools.product((1.0, 1.4, 2.0, 3.7, 16.0), (1, 2, 3, 5, 8)))
)
def test_evaluated_steps_are_spread_from_the_first_to_the_last(value, count):
    stride = Stride(value=value)
    positions = stride.positions(count)
    assert len(positions) == len(set(positions)) == count
    assert positions == sorted(positions)
    assert positions[0] == 0
    assert stride.steps(count) >= count
    if count > 1:
        assert positions[-1] == stride.steps(count) - 1
        gaps = [b - a for a, b in itertools.pairwise(positions)]
        assert max(gaps) - min(gaps) <= 1


def test_deterministic_strides_follow_what_is_kept():
    stride = Stride(most=8.0, value=2.0)
    nothing = Surprises()
    assert stride.after(4, 8, nothing, deterministic=True).value > 2.0
    assert stride.after(4, 6, nothing, deterministic=True).value == 1.5
    assert stride.after(4, 1, nothing, deterministic=True).value == 1.0
    assert stride.after(4, 8, Surprises(0.6, 0.0), deterministic=True).value == 2.0
    assert stride.after(4, 8, Surprises(1.2, 0.0), deterministic=True).value == 1.0
    for _ in range(20):
        stride = stride.after(4, stride.steps(4), nothing, deterministic=True)
    assert stride.value == 8.0


@pytest.mark.parametrize(
    ("error", "noise", "value", "grows"),
    [
        (0.4, 0.0, 4.0, 1),
        (0.55, 0.0, 4.0, 0),  # between bearable and not
        (0.7, 0.0, 4.0, -1),
        (0.7, 2.0, 4.0, 1),  # four samples of that noise would be off by more
        (0.7, 2.0, 16.0, 1 if 0.49 <= 0.25 + 2 / 16 else -1),  # sixteen would not
        (0.9, 1e6, 2.0, 0),
        (1.0, 1e6, 2.0, -1),  # however noisy: such a prediction is no gradient
        (math.inf, math.inf, 2.0, -1),
        (math.nan, math.nan, 2.0, 0),
    ],
)
def test_sampled_strides_follow_the_error_without_noise(error, noise, value, grows):
    after = Stride(value=value).after(1, int(value), Surprises(error, noise), deterministic=False)
    assert (after.value > value) - (after.value < value) == grows
    assert LARGEST_ERROR < 1


def test_rests_are_longer_each_time_until_there_is_a_gain():
    wrong, right, stride, rests = Surprises(1.0, 5.0), Surprises(0.1, 5.0), Stride(), []
    for _ in range(450):
        if stride.rest:
            rests.append(stride.rest)
            stride = stride.rested()
        else:
            stride = stride.after(1, 1, wrong, deterministic=False)
    assert [length for length in rests if length in (16, 64, 256)] == [16, 64, 16, 256, 64, 16]
    assert Stride().loaded(stride.state_dict()) == stride
    woken = stride.after(1, 1, right, deterministic=False)
    assert (woken.watched, woken.pause) == (0, 16)
    assert Stride().after(4, 1, wrong, deterministic=False).watched == 0  # rounds of several are never plain


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_errors_are_found_beneath_the_noise(wrong):
    generator, d = torch.Generator().manual_seed(0), 20_000
    true = torch.randn(d, generator=generator, dtype=torch.float64)
    bias = wrong * torch.randn(d, generator=generator, dtype=torch.float64)
    surprises, space = Surprises(), VectorSpace(d)
    last = true + 3 * torch.randn(d, generator=generator, dtype=torch.float64)
    for _ in range(30):
        gradient = true + 3 * torch.randn(d, generator=generator, dtype=torch.float64)
        surprises = surprises.averaged(space, (true + bias)[None], torch.stack([last, gradient]), [1])
        last = gradient
    assert float((true + bias - last).norm() / last.norm()) > 0.9  # what a single comparison says
    assert surprises.relative_error == pytest.approx(wrong, abs=0.15)
    assert surprises.relative_noise == pytest.approx(9, rel=0.1)
    assert Surprises.loaded(surprises.state_dict()) == surprises


def test_gradients_with_nothing_in_common_are_no_signal():
    surprises, space, up = Surprises(), VectorSpace(2), torch.ones(1, 2, dtype=torch.float64)
    for _ in range(5):
        surprises = surprises.averaged(space, up, torch.cat([up, -up]), [0])
    assert surprises.relative_error == math.inf


# ---------------------------------------------------------------------- rounds


def test_one_gradient_a_round_takes_several_steps():
    _, optimizer, reports = run(1)
    assert optimizer.batches_drawn == len(reports) == 60
    assert optimizer.steps_taken == sum(report.accepted for report in reports) > 180
    assert reports[0].evaluated == 2  # one to see whether it is deterministic
    for report in reports[1:]:
        assert report.evaluated == 1
        assert 1 <= report.accepted <= report.drafted <= 16
        assert report.stride == report.drafted


def test_a_number_bounds_the_stride():
    for bound, parallelism in ((2.5, 1), (2.5, 4), (3, 2)):
        _, _, reports = run(parallelism, stride=bound)
        assert max(report.drafted for report in reports) == int(bound * parallelism)


@pytest.mark.parametrize("parallelism", [1, 3])
def test_stride_and_tolerance_can_be_turned_off(parallelism):
    theta, objective = smooth()
    plain = torch.optim.Adam([theta], lr=0.05)
    trajectory = []
    for _ in range(40):
        plain.zero_grad()
        objective(None).backward()
        plain.step()
        trajectory.append(theta.detach().clone())
    theta, optimizer, _ = run(parallelism, steps=40, acceptance=WithinTolerance(0.0))
    assert optimizer.steps_taken == 40
    assert torch.equal(theta.detach(), trajectory[-1])
    if parallelism == 1:
        theta, optimizer, _ = run(1, steps=40, stride=1)
        assert torch.equal(theta.detach(), trajectory[-1])


def test_steps_that_were_not_evaluated_are_those_of_the_formula():
    # One gradient: y_0 = θ, a step with g_0, then with g_0 + μ(y_i) - μ(y_0), μ fitted to all pairs.
    theta, objective = smooth()
    estimator = SeparableEstimator(prior_mean="gls", lengthscale=2.0, noise_variance=1e-4)
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=1, deterministic=True, estimator=estimator)
    rounds = optimizer.rounds([None] * 30, objective)
    for _ in range(8):
        next(rounds)
    start = theta.detach().clone()
    report = next(rounds)
    assert report.accepted > 3
    posterior = optimizer._rounds.predictor.posterior()
    assert posterior is not None
    curvature = torch.logspace(-2, 0, 8, dtype=torch.float64)
    y = start - 0.1 * curvature * start
    for _ in range(report.accepted - 1):
        y = y - 0.1 * (curvature * start + posterior.mean(y) - posterior.mean(start))
    torch.testing.assert_close(theta.detach(), y, rtol=1e-12, atol=1e-12)


def test_sampled_steps_in_between_take_the_prediction():
    theta, objective = smooth()
    generator = torch.Generator().manual_seed(0)
    noise = 1e-2 * torch.randn(60, 8, generator=generator, dtype=torch.float64)
    optimizer = OptEx(
        torch.optim.SGD([theta], lr=0.05),
        parallelism=1,
        estimator=SeparableEstimator(prior_mean="gls", lengthscale=2.0, noise_variance=1e-2),
    )
    rounds = optimizer.rounds(noise, lambda row: objective(None) + row @ theta)
    start, report, number = theta.detach().clone(), next(rounds), 0
    while report.accepted < 3:
        start, report, number = theta.detach().clone(), next(rounds), number + 1
    posterior = optimizer._rounds.predictor.posterior()
    assert posterior is not None
    curvature = torch.logspace(-2, 0, 8, dtype=torch.float64)
    y = start - 0.05 * (curvature * start + noise[number])
    for _ in range(report.accepted - 1):
        y = y - 0.05 * posterior.mean(y)
    torch.testing.assert_close(theta.detach(), y, rtol=1e-12, atol=1e-12)


def test_noise_that_drowns_the_gradient_leaves_the_base_optimizer_alone():
    generator = torch.Generator().manual_seed(0)
    theta = nn.Parameter(torch.ones(200, dtype=torch.float64))
    noise = torch.randn(150, 200, generator=generator, dtype=torch.float64)
    optimizer = OptEx(torch.optim.Adam([theta], lr=1e-3), parallelism=1)
    reports = list(optimizer.rounds(noise, lambda row: 1e-3 * theta.square().sum() + 30 * row @ theta))
    assert sum(report.accepted for report in reports) <= 1.1 * len(reports)
    assert optimizer.history.appended < 0.9 * len(reports)  # rests, in which nothing is remembered


def test_prediction_error_is_free_of_noise():
    problem = make_problem("digits-mlp", seed=0, batch_size=32)
    optimizer = OptEx(torch.optim.Adam(problem.parameters(), lr=1e-3), parallelism=1, history_size=32)
    reports = list(itertools.islice(optimizer.rounds(problem.batches(), problem), 26))
    late = reports[16:]
    assert sum(float(report.relative_errors.mean()) for report in late) / 10 > 0.75
    assert sum(report.prediction_error for report in late) / 10 < 0.6
    assert max(report.stride for report in late) > 4


# ---------------------------------------------------------------------- promises with K > N


def sampled(parallelism=2, **options):
    model = network()
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, OptEx(base, parallelism=parallelism, model=model, **options)


def numbered(count):
    return list(enumerate(regression_batches(count)))


@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_only_evaluated_steps_draw_batches_and_all_of_them_do(parallelism):
    model, optimizer = sampled(parallelism)
    error, seen = squared_error(model), []

    def objective(item):
        seen.append(item[0])
        return error(item[1])

    reports: list[RoundReport] = list(optimizer.rounds(numbered(90), objective))
    assert optimizer.batches_drawn == 90
    assert sorted(set(seen)) == list(range(90))
    assert list(dict.fromkeys(seen)) == list(range(90))  # first met in order
    assert optimizer.steps_taken == sum(report.accepted for report in reports) > 120
    assert max(report.drafted / report.evaluated for report in reports) > 1


def test_schedules_count_steps():
    model = network()
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(base, 0.999)
    optimizer = OptEx(base, parallelism=2, scheduler=schedule)
    list(optimizer.rounds(regression_batches(60), squared_error(model)))
    assert optimizer.steps_taken > 60
    assert schedule.last_epoch == optimizer.steps_taken
    assert base.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.999**optimizer.steps_taken)


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_checkpoint_goes_on_bit_for_bit(parallelism):
    batches = regression_batches(80)
    model, whole = sampled(parallelism)
    list(whole.rounds(batches, squared_error(model)))
    first, optimizer = sampled(parallelism)
    reports = list(itertools.islice(optimizer.rounds(batches, squared_error(first)), 20))
    assert max(report.drafted / report.evaluated for report in reports) > 1
    second, resumed = sampled(parallelism)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    list(resumed.rounds(batches[resumed.batches_drawn :], squared_error(second)))
    assert_equal_trees(second.state_dict(), model.state_dict())
    assert_equal_trees(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_round_that_fails_loses_nothing(parallelism):
    batches = regression_batches(60)
    model, whole = sampled(parallelism)
    list(whole.rounds(batches, squared_error(model)))
    twin, optimizer = sampled(parallelism)
    error, calls = squared_error(twin), itertools.count()

    def objective(batch):
        if next(calls) % 17 == 16:
            raise ConnectionError("the cluster is gone")
        return error(batch)

    left = iter(batches)
    while True:
        try:
            for _ in optimizer.rounds(left, objective):
                pass
            break
        except ConnectionError:
            continue
    assert next(calls) > 60
    assert_equal_trees(twin.state_dict(), model.state_dict())
    assert_equal_trees(optimizer.state_dict(), whole.state_dict())


def test_workers_and_vmap_see_the_evaluated_steps_alone():
    def ends(evaluator, **options):
        model = network()
        optimizer = OptEx(
            torch.optim.Adam(model.parameters(), lr=1e-3),
            parallelism=2,
            # Noise enough for well conditioned systems: rounding then stays rounding over the rounds.
            estimator=SeparableEstimator(prior_mean="gls", noise_variance=1e-2),
            evaluator=evaluator(model),
            deterministic=True,
        )
        list(optimizer.rounds(regression_batches(1) * 40, squared_error(model)))
        assert optimizer.steps_taken > 44
        return snapshot(model)

    expected = ends(lambda model: None)
    with WorkersEvaluator(2) as evaluator:
        for a, b in zip(ends(lambda model: evaluator), expected, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(ends(VectorizedEvaluator), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_buffers_count_the_steps_that_were_evaluated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=1e-4), parallelism=1, model=model)
    list(optimizer.rounds(regression_batches(50), squared_error(model)))
    assert optimizer.steps_taken > 50
    assert model[1].num_batches_tracked == 50


def test_closures_stride_too():
    theta, objective = smooth()
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=1, deterministic=True)

    def closure():
        optimizer.zero_grad()
        loss = objective(None)
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    assert optimizer.steps_taken > 60


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("stride", "kind", "message"),
    [
        (0.5, ValueError, r"OptEx: stride must be 'auto' or a finite number of at least 1, got 0\.5"),
        (math.inf, ValueError, "OptEx: stride must be 'auto' or a finite number of at least 1, got inf"),
        (math.nan, ValueError, "OptEx: stride must be 'auto' or a finite number of at least 1, got nan"),
        (True, TypeError, "OptEx: stride must be 'auto', or how many steps .* got True"),
        ("bold", TypeError, "OptEx: stride must be 'auto', or how many steps .* got 'bold'"),
    ],
)
def test_errors_name_the_stride(stride, kind, message):
    theta, _ = smooth()
    with pytest.raises(kind, match=message):
        OptEx(torch.optim.SGD([theta], lr=0.1), stride=stride)


def test_a_stride_needs_an_acceptance_that_has_one():
    theta, _ = smooth()
    for acceptance in (WithinTolerance(0.0), optex.Last()):
        with pytest.raises(ValueError, match=r"OptEx: stride 4 would take steps .* pass stride=1, or"):
            OptEx(torch.optim.SGD([theta], lr=0.1), stride=4, acceptance=acceptance)
        OptEx(torch.optim.SGD([theta], lr=0.1), stride=1, acceptance=acceptance)


def test_saved_strides_are_checked():
    model, optimizer = sampled()
    list(optimizer.rounds(regression_batches(10), squared_error(model)))
    for entry, value in (("stride", {"value": 0.5}), ("surprises", {"products": [1.0], "rounds": 1})):
        state = copy.deepcopy(optimizer.state_dict())
        state["optex"][entry] = value
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match="saved"):
            optimizer.load_state_dict(state)
        assert_equal_trees(optimizer.state_dict(), before)
