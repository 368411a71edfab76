"""The iterative Newton method, the predictors beside it, and the similarity of their errors."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import optex
from optex.solvers import (
    Status,
    gradient_descent_predictor,
    iterative_newton_predictor,
    newton_schulz_inverse,
    online_gradient_descent_predictor,
    similarity_of_errors,
)
from tests.references import newton_schulz as twin

INITS = ("trace", "norm")


def gram(d=6, n=12, seed=0, dtype=torch.float64):
    inputs = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (inputs.T @ inputs).to(dtype)


def conditioned(kappa, d=10):
    basis, _ = torch.linalg.qr(gram(d, 2 * d))
    values = torch.logspace(0, -np.log10(kappa), d, dtype=torch.float64)
    matrix = basis @ (values[:, None] * basis.T)
    return (matrix + matrix.T) / 2


def tasks(batch=3, n=7, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch, n, d, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ torch.randn(batch, d, 1, generator=generator, dtype=torch.float64))[..., 0]


# ------------------------------------------------------------------ the inverse


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_iterates_are_the_twins(init, count):
    S = gram()
    first = np.eye(6) / float(S.trace()) if init == "trace" else S.T / torch.linalg.norm(S @ S.T)
    expected = twin.inverse(S.numpy(), np.asarray(first), count)
    found = newton_schulz_inverse(S, init=init, maxiter=count, tol=1e-15)
    assert found.nit == count
    assert np.allclose(found.x, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("init", INITS)
def test_the_error_is_squared(init):
    S, errors = gram(), []
    newton_schulz_inverse(S, init=init, callback=lambda now: errors.append(torch.eye(6) - S @ now.x))
    assert len(errors) > 5
    for before, after in pairwise(errors):
        assert float((after - before @ before).abs().max()) <= 1e-12


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("init", INITS)
def test_it_is_the_inverse(dtype, close, init):
    S = gram(dtype=dtype)
    found = newton_schulz_inverse(S, init=init)
    assert found.success
    assert found.x.dtype == dtype
    assert float(found.residual) <= torch.finfo(dtype).eps ** 0.5
    assert torch.allclose(found.x, torch.linalg.inv(S), rtol=close, atol=close * float(found.x.abs().max()))


def test_iterations_by_condition_number():
    for kappa in (1e2, 1e4, 1e6):
        S = conditioned(kappa)
        assert newton_schulz_inverse(S).nit <= np.log2(kappa) + 8
        assert newton_schulz_inverse(S, init="norm").nit <= 2 * np.log2(kappa) + 8


def test_numpy_in_numpy_out():
    S = np.stack([gram().numpy(), gram(seed=1).numpy()])
    found = newton_schulz_inverse(S)
    assert isinstance(found.x, np.ndarray)
    assert isinstance(found.residual, np.ndarray)
    assert found.residual.shape == found.statuses.shape == (2,)
    assert np.allclose(found.x, np.linalg.inv(S), rtol=1e-6, atol=1e-8)


def test_a_batch_is_its_matrices_one_by_one():
    batch = torch.stack([gram(), conditioned(1e5, 6), torch.eye(6, dtype=torch.float64)]).reshape(3, 1, 6, 6)
    found = newton_schulz_inverse(batch)
    singles = [newton_schulz_inverse(S[0]) for S in batch]
    assert found.x.shape == batch.shape
    assert found.nit == max(single.nit for single in singles)
    for x, single in zip(found.x, singles, strict=True):
        assert torch.allclose(x[0], single.x, rtol=1e-9, atol=1e-12)


def test_any_invertible_matrix_from_the_norm():
    S = torch.tensor([[0.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    found = newton_schulz_inverse(S, init="norm")
    assert found.success
    assert torch.allclose(found.x, torch.linalg.inv(S))


def test_sizes_near_the_ends_of_the_range():
    for size in (1e-30, 1e30):
        found = newton_schulz_inverse(gram(dtype=torch.float32) * size, init="norm")
        assert found.success
        assert torch.allclose(found.x * size, torch.linalg.inv(gram(dtype=torch.float32)), rtol=1e-2, atol=1e-3)


def test_one_number_takes_no_iteration():
    found = newton_schulz_inverse(np.array([[4.0]]))
    assert found.success
    assert found.nit == 0
    assert found.x[0, 0] == 0.25


@pytest.mark.parametrize("scale", [1e-3, 0.5, 0.999])
def test_scales_below_the_boundary(scale):
    S = gram()
    boundary = float(2 / torch.linalg.matrix_norm(S, 2) ** 2)
    assert newton_schulz_inverse(S, init=scale * boundary).success


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_the_boundary_is_refused(scale):
    S = gram()
    boundary = float(2 / torch.linalg.matrix_norm(S, 2) ** 2)
    with pytest.raises(ValueError, match="init must be below 2"):
        newton_schulz_inverse(S, init=scale * boundary)


def test_a_warm_start_takes_few_iterations():
    S = gram()
    near = S + 0.01 * torch.eye(6)
    found = newton_schulz_inverse(near, init=torch.linalg.inv(S))
    assert found.success
    assert found.nit < newton_schulz_inverse(near).nit / 2
    with pytest.raises(ValueError, match="converge surely"):
        newton_schulz_inverse(S, init=torch.zeros_like(S))
    with pytest.raises(ValueError, match="of S's shape, dtype and device"):
        newton_schulz_inverse(S, init=torch.eye(5, dtype=torch.float64))


def test_a_singular_matrix_stalls_at_its_pseudo_inverse():
    S = gram(n=4)
    found = newton_schulz_inverse(S, init="norm")
    assert not found.success
    assert found.status == Status.STALLED
    assert found.nit < 40  # long before rounding has grown
    assert torch.allclose(found.x, torch.linalg.pinv(S, rtol=1e-10), rtol=1e-8, atol=1e-10)
    assert float(found.residual) == pytest.approx((2 / 6) ** 0.5)


def test_a_singular_matrix_from_the_trace_ends_with_finite_numbers():
    found = newton_schulz_inverse(gram(n=4))
    assert found.status in (Status.STALLED, Status.BREAKDOWN)
    assert bool(found.x.isfinite().all())


def test_the_iteration_without_the_rule_diverges():
    S = gram(n=4).numpy()
    first = S / np.linalg.norm(S @ S)
    settled, later = (twin.inverse(S, first, count) for count in (20, 70))
    assert np.linalg.norm(later) > 10 * np.linalg.norm(settled)


def test_a_tolerance_beneath_rounding_stalls_with_the_best():
    found = newton_schulz_inverse(conditioned(1e6), tol=1e-15)
    assert found.status == Status.STALLED
    assert found.nit < 40
    assert float(found.residual) < 1e-9


def test_an_indefinite_matrix_breaks_down_from_the_trace_and_converges_from_the_norm():
    S = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    found = newton_schulz_inverse(S)
    assert found.status == Status.BREAKDOWN
    assert "norm" in found.message
    assert bool(found.x.isfinite().all())
    assert newton_schulz_inverse(S, init="norm").success


def test_the_worst_of_a_batch_is_its_status():
    found = newton_schulz_inverse(torch.stack([gram(), gram(n=4)]), init="norm")
    assert found.status == Status.STALLED
    assert found.statuses.tolist() == [Status.CONVERGED, Status.STALLED]
    assert torch.allclose(found.x[0], torch.linalg.inv(gram()), rtol=1e-6, atol=1e-9)


def test_a_callback_can_stop():
    def stop(now):
        assert now.x.shape == (6, 6)
        return now.nit == 3

    def raising(now):
        raise StopIteration

    found = newton_schulz_inverse(gram(), callback=stop)
    assert found.status == Status.STOPPED
    assert int(found.statuses) == Status.STOPPED
    assert found.nit == 3
    assert newton_schulz_inverse(gram(), callback=raising).nit == 1


@pytest.mark.parametrize(
    ("S", "keywords", "error", "says"),
    [
        ([[1.0]], {}, TypeError, "a tensor or a NumPy array, got list"),
        (np.eye(2, dtype=int), {}, TypeError, "dense float32 or float64, got torch.int64"),
        (np.ones((2, 3)), {}, ValueError, "square"),
        (np.ones(2), {}, ValueError, "square"),
        (np.zeros((0, 0)), {}, ValueError, "square"),
        (np.array([[np.nan]]), {}, ValueError, "not finite"),
        (np.zeros((2, 2)), {}, optex.RankDeficientError, "matrix of zeros"),
        (np.array([[1.0, 1.0], [0.0, 1.0]]), {}, ValueError, 'needs symmetric S.*"norm"'),
        (-np.eye(2), {}, optex.NotPositiveDefiniteError, "diagonal entry is not positive"),
        (np.eye(2), {"init": "ones"}, ValueError, 'init must be "trace", "norm"'),
        (np.eye(2), {"init": -1.0}, ValueError, "init must be a finite number above 0"),
        (np.eye(2), {"init": None}, ValueError, "init must be a finite number above 0"),
        (np.eye(2), {"callback": 3}, TypeError, "callback must be callable"),
    ],
)
def test_what_cannot_work_is_refused(S, keywords, error, says):
    with pytest.raises(error, match=says):
        newton_schulz_inverse(S, **keywords)


def test_gradients_are_not_followed():
    S = gram().requires_grad_()
    assert not newton_schulz_inverse(S).x.requires_grad


# ------------------------------------------------------------------ predictors


@pytest.mark.parametrize("init", ["norm", "trace"])
def test_newton_is_the_twins(init):
    inputs, targets = tasks()
    found = iterative_newton_predictor(inputs, targets, 6, init=init)
    for x, y, one in zip(inputs.numpy(), targets.numpy(), found.numpy(), strict=True):
        assert np.allclose(one, twin.newton_predictions(x, y, 6, init), rtol=1e-9, atol=1e-12)


def test_descent_is_the_twins():
    inputs, targets = tasks()
    found = gradient_descent_predictor(inputs, targets, 5, lr=0.05)
    for x, y, one in zip(inputs.numpy(), targets.numpy(), found.numpy(), strict=True):
        assert np.allclose(one, twin.descent_predictions(x, y, 5, 0.05), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["constant", "decaying", "normalised"])
def test_online_descent_is_the_twins(rule):
    inputs, targets = tasks()
    found = online_gradient_descent_predictor(inputs, targets, 3, lr=0.2, rule=rule)
    for x, y, one in zip(inputs.numpy(), targets.numpy(), found.numpy(), strict=True):
        assert np.allclose(one, twin.online_predictions(x, y, 3, 0.2, rule), rtol=1e-9, atol=1e-12)


def test_similarity_is_the_twins():
    inputs, targets = tasks()
    first = iterative_newton_predictor(inputs, targets, 3)
    second = gradient_descent_predictor(inputs, targets, 4)
    found = similarity_of_errors(first, second, targets)
    assert found.shape == (4, 5)
    assert np.allclose(found, twin.similarity(first.numpy(), second.numpy(), targets.numpy()))
    assert torch.allclose(similarity_of_errors(first, first, targets).diagonal(), torch.ones(4).double())


def test_newton_goes_to_least_squares_of_least_norm():
    inputs, targets = tasks()
    found = iterative_newton_predictor(inputs, targets, 40)[:, -1]
    for t in range(1, 7):
        weights = torch.linalg.lstsq(inputs[:, :t], targets[:, :t, None], driver="gelsd").solution[..., 0]
        assert torch.allclose(found[:, t], (weights * inputs[:, t]).sum(-1), atol=1e-6)


@pytest.mark.parametrize(
    "predict",
    [
        lambda x, y: iterative_newton_predictor(x, y, 4),
        lambda x, y: gradient_descent_predictor(x, y, 4),
        lambda x, y: online_gradient_descent_predictor(x, y, 2, lr=0.1),
    ],
)
def test_no_place_sees_its_own_target_or_later_ones(predict):
    inputs, targets = tasks()
    changed = targets.clone()
    changed[:, 4:] += 1
    before, after = predict(inputs, targets), predict(inputs, changed)
    assert torch.equal(before[..., :5], after[..., :5])
    assert not torch.equal(before[..., 5:], after[..., 5:])
    assert before[..., 0].eq(0).all()


def test_one_sequence_needs_no_batch():
    inputs, targets = tasks()
    found = iterative_newton_predictor(inputs[0], targets[0], 4)
    assert torch.allclose(found, iterative_newton_predictor(inputs, targets, 4)[0])
    assert similarity_of_errors(found, found, targets[0]).shape == (5, 5)


@pytest.mark.parametrize(
    "predict", [iterative_newton_predictor, gradient_descent_predictor, online_gradient_descent_predictor]
)
def test_predictors_refuse_by_name(predict):
    inputs, targets = tasks()
    name = predict.__name__
    with pytest.raises(TypeError, match=f"{name}: inputs must be a floating-point tensor, got ndarray"):
        predict(inputs.numpy(), targets, 2)
    with pytest.raises(TypeError, match=f"{name}: inputs and targets must be of one dtype"):
        predict(inputs, targets.float(), 2)
    with pytest.raises(ValueError, match=f"{name}: inputs must be .*targets"):
        predict(inputs, targets[:, :2], 2)
    with pytest.raises(ValueError, match=f"{name}: targets holds numbers that are not finite"):
        predict(inputs, targets * float("inf"), 2)
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        predict(inputs, targets, 0)


def test_settings_of_predictors_are_checked():
    inputs, targets = tasks()
    with pytest.raises(ValueError, match='init must be "norm" or "trace"'):
        iterative_newton_predictor(inputs, targets, 2, init="one")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lr must be a finite number above 0"):
        gradient_descent_predictor(inputs, targets, 2, lr=0.0)
    with pytest.raises(ValueError, match="rule must be one of constant, decaying, normalised"):
        online_gradient_descent_predictor(inputs, targets, rule="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="lr must be a finite number above 0 and at most 2"):
        online_gradient_descent_predictor(inputs, targets, rule="normalised", lr=2.5)


def test_similarity_refuses_what_does_not_fit():
    _, targets = tasks()
    fits = targets[:, None]
    with pytest.raises(ValueError, match=r"first must be \[..., k, n\]"):
        similarity_of_errors(targets[:, :, None], fits, targets)
    with pytest.raises(ValueError, match="n at least 2"):
        similarity_of_errors(fits[..., :1], fits[..., :1], targets[:, :1])
    with pytest.raises(TypeError, match="first must be of targets' dtype"):
        similarity_of_errors(fits.float(), fits, targets)
    with pytest.raises(ValueError, match="second holds numbers that are not finite"):
        similarity_of_errors(fits, fits / 0, targets)
