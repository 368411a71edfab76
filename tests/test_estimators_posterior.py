"""What all posteriors do with their coefficients, and the one that holds the last gradient."""

import contextlib
import math

import pytest
import torch

from optex import GradientHistory, HoldLast, small
from optex.estimators.interface import Coefficients, Posterior
from optex.small import array


def rows(count, seed, dtype=torch.float64):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def history_of(count=3, noise=None):
    history = GradientHistory(4, 5)
    history.append(rows(count, 0), rows(count, 1), noise)
    return history


class Made(Posterior):
    """Predicts with coefficients that depend on the point: smooth functions of its norm."""

    kinds = 3

    def coefficients(self, locations):
        norms = torch.as_tensor(locations.norms)
        steps = torch.arange(1.0, 5.0, dtype=torch.float64)
        on_g, on_d = (torch.sin(norms[:, None] * steps + shift) for shift in (0.0, 1.0))
        if self.kinds == 1:
            return Coefficients(array(on_g))
        return Coefficients(array(on_g), array(on_d), array(torch.cos(norms)))

    def variance(self, point):
        return torch.ones((), dtype=torch.float64)


class OnGradients(Made):
    kinds = 1


def written_out(posterior, points):
    """μ(θ) = a(θ)ᵀ G + b(θ)ᵀ D + c(θ) ξ."""
    history = posterior.history
    found = posterior.coefficients(history.locate(points))
    result = torch.as_tensor(found.on_gradients) @ history.gradients
    if found.on_displacements is not None:
        offsets = points - history.reference
        result = result + torch.as_tensor(found.on_displacements) @ history.displacements
        result = result + torch.as_tensor(found.on_offsets)[:, None] * offsets
    return result


@pytest.mark.parametrize("kind", [Made, OnGradients])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("as_on_accelerators", [False, True])
def test_predictions_are_combinations_of_rows_and_offsets(kind, count, as_on_accelerators):
    posterior, points, origins = kind(history_of()), rows(count, 5), rows(count, 6)
    with small.tensors() if as_on_accelerators else contextlib.nullcontext():
        here, there = posterior.locate(points), posterior.locate(origins)
        expected, before = written_out(posterior, points), written_out(posterior, origins)
        torch.testing.assert_close(posterior.means(here), expected, rtol=1e-12, atol=1e-12)
        changes = posterior.differences(here, there)
        torch.testing.assert_close(changes, expected - before, rtol=1e-12, atol=1e-12)
        assert not posterior.differences(here, here).any()
        torch.testing.assert_close(posterior.mean(points[0]), expected[0], rtol=1e-12, atol=1e-12)
        change = posterior.mean_difference(points[0], origins[0])
        torch.testing.assert_close(change, (expected - before)[0], rtol=1e-12, atol=1e-12)


def test_near_points_differ_by_what_is_between_them_to_the_last_digit():
    # c ξ - c' ξ' would lose what the offsets have in common.
    class Linear(Made):
        def coefficients(self, locations):
            nothing = torch.zeros(len(locations), 4, dtype=torch.float64)
            return Coefficients(array(nothing), array(nothing), array(nothing[:, 0] + 0.1))

    history = GradientHistory(4, 5)
    history.append(torch.zeros(1, 5, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64))
    origin = 1e8 + rows(1, 5)[0]
    point = origin + 2.0**-20
    for count in (1, 2):
        here, there = (history.locate(x.expand(count, 5).contiguous()) for x in (point, origin))
        change = Linear(history).differences(here, there)
        torch.testing.assert_close(change, torch.full((count, 5), 0.1 * 2.0**-20).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Made, HoldLast])
@pytest.mark.parametrize("count", [1, 2])
def test_predictions_come_in_the_points_precision(kind, count):
    history = history_of()
    posterior = kind(history) if kind is Made else HoldLast().fit(history)
    points = rows(count, 5, torch.float32)
    exact = posterior.means(posterior.locate(points.double()))
    for predicted in (posterior.means(posterior.locate(points)), posterior.mean(points[0])[None]):
        assert predicted.dtype == torch.float32
        torch.testing.assert_close(predicted.double(), exact[: len(predicted)], rtol=1e-5, atol=1e-5)
    assert posterior.differences(posterior.locate(points), posterior.locate(points)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("as_on_accelerators", [False, True])
def test_rows_of_fewer_digits_give_predictions_of_as_many(count, dtype, as_on_accelerators):
    history = GradientHistory(4, 5, dtype=dtype)
    history.append(rows(3, 0), rows(3, 1))
    exact = GradientHistory(4, 5)
    exact.append(rows(3, 0), rows(3, 1))
    points = rows(count, 5)
    with small.tensors() if as_on_accelerators else contextlib.nullcontext():
        posterior, twin = Made(history), Made(exact)
        found, expected = (each.means(each.locate(points)) for each in (posterior, twin))
    assert found.dtype == torch.float64
    rounding = 0.1 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("count", [2, 4])
def test_the_prior_variance_is_the_sample_variance_of_a_component(count):
    history = history_of(count)
    expected = rows(count, 1).var(0).mean()  # with n - 1
    assert Made(history).prior_variance().item() == pytest.approx(expected.item(), rel=1e-12)


def test_pairs_at_one_iterate_count_once_in_the_prior_variance():
    history, points, gradients = GradientHistory(5, 5), rows(3, 0), rows(4, 1)
    history.append(points[[0, 1, 0, 2]], gradients)
    merged = torch.stack([(gradients[0] + gradients[2]) / 2, gradients[1], gradients[3]])
    assert Made(history).prior_variance().item() == pytest.approx(merged.var(0).mean().item(), rel=1e-12)


def test_one_pair_tells_no_prior_variance():
    assert math.isnan(Made(history_of(1)).prior_variance())


def test_equal_gradients_have_a_prior_variance_of_zero():
    history = GradientHistory(3, 5)
    history.append(rows(3, 0), (0.1 * torch.ones(3, 5)).double())
    variance = Made(history).prior_variance().item()
    assert 0 <= variance < 1e-15


# ---------------------------------------------------------------------- holding the last gradient


@pytest.mark.parametrize("pairs", [1, 3, 4])
@pytest.mark.parametrize("as_on_accelerators", [False, True])
def test_the_newest_gradient_is_predicted_everywhere(pairs, as_on_accelerators):
    history = history_of(pairs)
    history.append(rows(1, 8), rows(1, 9))
    with small.tensors() if as_on_accelerators else contextlib.nullcontext():
        posterior = HoldLast().fit(history)
        here, there = posterior.locate(rows(2, 5)), posterior.locate(rows(2, 6))
        assert torch.equal(posterior.means(here), rows(1, 9).expand(2, 5))
        found = torch.as_tensor(posterior.coefficients(here).on_gradients)
        assert torch.equal(found @ history.gradients, rows(1, 9).expand(2, 5))
        assert isinstance(posterior.coefficients(here).on_gradients, torch.Tensor) == as_on_accelerators
        assert torch.equal(posterior.differences(here, there), torch.zeros(2, 5, dtype=torch.float64))


def test_holding_the_last_gradient_says_nothing_of_its_error():
    posterior = HoldLast().fit(history_of())
    variance = posterior.variance(rows(1, 5, torch.float32)[0])
    assert variance.dtype == torch.float64
    assert variance == 1
    assert posterior.variance(torch.empty(5, device="meta")).device.type == "meta"
