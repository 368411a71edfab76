"""How wrong predictions are, from inner products: as the predictions themselves, written out, say."""

import contextlib

import pytest
import torch

from optex import CurlFreeEstimator, GradientHistory, HoldLast, SeparableEstimator, small
from optex.estimators.arrivals import Arrivals
from optex.estimators.judgement import squared_errors

ESTIMATORS = (CurlFreeEstimator(noise_variance=1e-2), HoldLast(), SeparableEstimator(prior_mean="gls"))


def rows(count, seed, dtype=torch.float64):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fitted(estimators=ESTIMATORS, *, pairs=4, dtype=torch.float64):
    history = GradientHistory(6, 5, dtype=dtype)
    history.append(rows(pairs, 0), rows(pairs, 1))
    return history, [estimator.fit(history) for estimator in estimators]


def pair(seed):
    """A point and a gradient that were measured elsewhere before."""
    return rows(1, seed)[0], rows(1, seed + 1)[0]


def written_out(posteriors, points, gradients, held):
    """‖μ(x) - g‖², or ‖g' + μ(x) - μ(x') - g‖² where the step had been measured at x' before."""
    found = torch.empty(len(posteriors), len(points), dtype=torch.float64)
    for m, posterior in enumerate(posteriors):
        for i, (point, gradient) in enumerate(zip(points, gradients, strict=True)):
            predicted = posterior.mean(point)
            if held[i] is not None:
                origin, before = held[i]
                predicted = before + predicted - posterior.mean(origin)
            found[m, i] = (predicted - gradient).square().sum()
    return found


HELD = [
    [None, None, None],
    [None, pair(20), None],
    [pair(20), None, pair(30)],
    [pair(20), pair(30), pair(40)],
]


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("as_on_accelerators", [False, True])
def test_errors_are_those_of_the_predictions_written_out(held, as_on_accelerators):
    with small.tensors() if as_on_accelerators else contextlib.nullcontext():
        history, posteriors = fitted()
        points, gradients = rows(3, 7), rows(3, 8)
        found = squared_errors(posteriors, Arrivals(history, points, gradients), held)
        assert found.dtype == torch.float64
        expected = written_out(posteriors, points, gradients, held)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_members_and_of_pairs(count):
    history, posteriors = fitted(ESTIMATORS[:count])
    points, gradients = rows(count, 7), rows(count, 8)
    held = [pair(20), None][:count]
    found = squared_errors(posteriors, Arrivals(history, points, gradients), held)
    torch.testing.assert_close(found, written_out(posteriors, points, gradients, held), rtol=1e-9, atol=1e-12)


def test_what_came_in_fewer_digits_is_judged_as_it_is():
    history, posteriors = fitted()
    points, gradients = rows(2, 7), rows(2, 8, torch.float32)
    held = [None, (rows(1, 20)[0], rows(1, 21, torch.float32)[0])]
    found = squared_errors(posteriors, Arrivals(history, points, gradients), held)
    wide = [None, (held[1][0], held[1][1].double())]
    expected = written_out(posteriors, points, gradients.double(), wide)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_exact_prediction_is_wrong_by_the_rounding_of_the_products(elsewhere):
    # Holding the newest gradient where it is measured again: terms of length ‖g‖ twice, or four times.
    history, posteriors = fitted((HoldLast(),))
    gradient = rows(4, 1)[-1]
    held = [(rows(1, 20)[0], gradient)] if elsewhere else [None]
    found = squared_errors(posteriors, Arrivals(history, rows(1, 7), gradient[None]), held)
    rounding = 16 * 2.0**-52
    # There the prediction's own terms cancel: what is left is g' and g.
    expected = rounding * (2 * gradient.norm()) ** 2
    torch.testing.assert_close(found, expected.expand(1, 1), rtol=1e-6, atol=0)


def test_nothing_is_left_of_a_judgement_in_what_is_remembered():
    history, posteriors = fitted()
    arrivals = Arrivals(history, rows(2, 7), rows(2, 8))
    twin = GradientHistory(6, 5)
    twin.append(rows(4, 0), rows(4, 1))
    squared_errors(posteriors, arrivals, [None, pair(20)])
    history.append(arrivals.points, arrivals.gradients, arrivals=arrivals)
    twin.append(arrivals.points, arrivals.gradients)
    for name in ("displacements", "gradients"):
        assert torch.equal(getattr(history, name), getattr(twin, name))
    for name in ("iterate_gram", "gradient_gram", "cross_gram"):
        torch.testing.assert_close(getattr(history, name), getattr(twin, name), rtol=1e-12, atol=1e-12)
