"""What the history may leave out, and what then comes of the predictions."""

import copy
import itertools

import pytest
import torch
from torch import nn

from optex import CommitteeEstimator, CurlFreeEstimator, GradientHistory, HoldLast, OptEx, SeparableEstimator
from optex.evaluators import SequentialEvaluator
from optex.problems import make_problem
from optex.vectors import Coordinates
from tests.models import network, regression_batches, same, snapshot, squared_error


def rows(count, dimension, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------------- sketches


def test_a_sketch_is_heaps_of_components_with_random_signs():
    history = GradientHistory(3, 10, sketch=4)
    points = rows(2, 10)
    history.append(points, points)
    gap = (points[0] - points[1]) * history._signs
    expected = torch.stack([gap[i::4].sum() for i in range(4)])
    torch.testing.assert_close(history.displacement(points[0]), expected)
    assert set(history._signs.tolist()) == {-1, 1}


def test_sketched_distances_are_right_in_the_mean_and_as_close_as_said():
    ratios = []
    for seed in range(60):
        history = GradientHistory(4, 5000, sketch=200)
        points = rows(4, 5000, seed)
        history.append(points, points)
        exact = (points[0] - points[3]).square().sum()
        ratios.append(float(history.pairwise_squared_distances()[0, 3] / exact))
    ratios = torch.tensor(ratios)
    assert abs(ratios.mean() - 1) < 0.05
    assert 0.05 < ratios.std() < 0.2  # √(2 / 200) = 0.1


@pytest.mark.parametrize("moves", [0, 40])
def test_a_sketch_follows_the_anchor(moves):
    # The map is linear: what is stored is the sketch of the displacement from wherever the anchor is now.
    history, points = GradientHistory(5, 30, sketch=7), []
    for i in range(3 + moves):
        points.append(rows(2, 30, i) * 1e-3 + i)
        history.append(points[-1], points[-1])
    assert (history.anchor - points[0][-1]).norm() >= moves
    last = torch.cat(points)[-5:]
    slots = [(history.appended - 5 + i) % 5 for i in range(5)]
    folded = (last - history.anchor) * history._signs
    folded = torch.stack([folded[:, i::7].sum(1) for i in range(7)], 1)
    torch.testing.assert_close(history.displacements[slots], folded)
    query = rows(3, 30, 99) * 1e-3 + moves
    gaps = (history.locate(query).offsets[:, None] - history.displacements).square().sum(2)
    torch.testing.assert_close(history.locate(query).squared_distances, gaps)


def test_a_sketch_as_long_as_the_iterate_is_no_sketch():
    assert GradientHistory(2, 5, sketch=5).sketch is None


def test_estimators_that_need_displacements_refuse_a_sketch():
    history = GradientHistory(3, 10, sketch=4)
    history.append(rows(2, 10), rows(2, 10, 1))
    with pytest.raises(ValueError, match=r"a sketch does not hold the displacements .* use SeparableEstimator"):
        CurlFreeEstimator().fit(history).mean(rows(1, 10)[0])


def test_training_with_a_sketch_and_its_checkpoint():
    def start():
        problem = make_problem("digits-mlp", seed=0)
        return problem, OptEx(torch.optim.Adam(problem.parameters(), lr=1e-3), sketch=256)

    problem, optimizer = start()
    assert isinstance(optimizer.estimator, CommitteeEstimator)
    assert any(isinstance(member, SeparableEstimator) for member in optimizer.estimator.members)
    before = problem.evaluate()
    rounds = optimizer.rounds(problem.batches(), problem)
    taken = [report.accepted for report in itertools.islice(rounds, 12)]
    assert problem.evaluate() < before
    assert sum(taken) > 30
    assert optimizer.history.displacements.shape == (16, 256)
    other, twin = start()
    other.load_state_dict(problem.state_dict())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rest = itertools.islice(other.batches(), twin.batches_drawn, None)
    resumed = twin.rounds(rest, other)
    for _ in range(4):
        next(rounds), next(resumed)
    assert same(snapshot(problem), snapshot(other))
    with pytest.raises(ValueError, match="build it with the same history_size, sketch and parameters"):
        OptEx(torch.optim.Adam(other.parameters())).load_state_dict(copy.deepcopy(optimizer.state_dict()))


# ---------------------------------------------------------------------- some parameters


def test_coordinates_select_and_embed():
    coordinates = Coordinates([2, 3, 1, 4], [False, True, False, True])
    whole = torch.arange(20.0).reshape(2, 10)
    assert coordinates.dimension == 7
    assert coordinates.select(whole).tolist() == [[2, 3, 4, 6, 7, 8, 9], [12, 13, 14, 16, 17, 18, 19]]
    rest = torch.full((10,), -1.0)
    back = coordinates.embed(coordinates.select(whole), rest)
    inside = [2, 3, 4, 6, 7, 8, 9]
    assert torch.equal(back[:, inside], whole[:, inside])
    assert back[:, [0, 1, 5]].eq(-1).all()
    assert rest.eq(-1).all()


def test_outside_the_chosen_parameters_the_last_gradient_is_held():
    model, seen = network(), []
    chosen = [model[0].weight, model[2].bias]

    class Recording(SequentialEvaluator):
        def evaluate(self, source, vector, points, batches, draws):
            result = super().evaluate(source, vector, points, batches, draws)
            seen.append((points.clone(), result.gradients.clone()))
            return result

    fixed = regression_batches(1)[0]
    error = squared_error(model)
    optimizer = OptEx(
        torch.optim.SGD(model.parameters(), lr=0.05),
        parallelism=3,
        estimator=SeparableEstimator(prior_mean="gls"),
        evaluator=Recording(),
        history_parameters=chosen,
    )
    rounds = optimizer.rounds([None] * 30, lambda _: error(fixed))
    for _ in range(4):
        next(rounds)
    flags = torch.cat([torch.full((p.numel(),), any(p is q for q in chosen)) for p in model.parameters()])
    assert optimizer.history.dimension == int(flags.sum())
    posterior = optimizer._fitted()
    inner = SeparableEstimator(prior_mean="gls").fit(optimizer.history)
    point, origin = seen[-1][0][1], seen[-1][0][2]
    mean, change = posterior.mean(point), posterior.mean_difference(point, origin)
    assert torch.equal(mean[~flags], seen[-1][1][-1][~flags])
    assert torch.equal(mean[flags], inner.mean(point[flags]))
    assert torch.equal(change[flags], inner.mean_difference(point[flags], origin[flags]))
    assert change[~flags].eq(0).all()
    assert posterior.variance(point) == inner.variance(point[flags])


def test_history_of_all_parameters_is_the_plain_one():
    taken = []
    for choose in (lambda model: None, lambda model: model.parameters()):
        model = network()
        optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02), history_parameters=choose(model))
        list(optimizer.rounds(regression_batches(40), squared_error(model)))
        taken.append(snapshot(model))
    for left, right in zip(*taken, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_restricted_checkpoint_continues_bit_for_bit():
    def start():
        model = network()
        base = torch.optim.Adam(model.parameters(), lr=0.02)
        return model, OptEx(base, history_parameters=[model[0].weight])

    batches = regression_batches(60)
    model, optimizer = start()
    rounds = optimizer.rounds(batches, squared_error(model))
    for _ in range(5):
        next(rounds)
    other, twin = start()
    other.load_state_dict(model.state_dict())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = twin.rounds(itertools.islice(batches, twin.batches_drawn, None), squared_error(other))
    for _ in range(5):
        next(rounds), next(resumed)
    assert same(snapshot(model), snapshot(other))


def test_errors_name_the_argument():
    model = network()
    base = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="none of history_parameters is a trainable parameter of base"):
        OptEx(base, history_parameters=[nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="OptEx: sketch must be an integer of at least 1, got 0"):
        OptEx(base, sketch=0)
    with pytest.raises(ValueError, match="GradientHistory: sketch must be at least 1, or None, got 0"):
        GradientHistory(2, 3, sketch=0)


# ---------------------------------------------------------------------- dtype


@pytest.mark.parametrize("estimator", [CurlFreeEstimator(noise_variance=1e-2), HoldLast(), None])
def test_a_bfloat16_history_trains_nearly_as_well(estimator):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem("digits-mlp", seed=0)
        optimizer = OptEx(
            torch.optim.Adam(problem.parameters(), lr=1e-3), estimator=estimator, history_dtype=dtype
        )
        for _ in itertools.islice(optimizer.rounds(problem.batches(), problem), 15):
            pass
        assert optimizer.history.gradients.dtype == dtype
        losses.append(problem.evaluate())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
