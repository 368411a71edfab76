"""The prior's variance, information gain, bounds and calibration: against slow twins and exact quantiles."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import optex
from optex import CommitteeEstimator, CurlFreeEstimator, GradientHistory, HoldLast, SeparableEstimator, small
from optex.theory import Calibration, error_bound, information_gain, stationarity_bound
from tests.references import dense_curl_free, dense_gp
from tests.references import theory as slow


def history_of(points, gradients):
    history = GradientHistory(len(points) + 2, points.shape[1])
    history.append(torch.from_numpy(points), torch.from_numpy(gradients))
    return history


def sample(count, dimension, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimension)), rng.normal(size=(count, dimension))


# ------------------------------------------------------------------ the prior's variance


@pytest.mark.parametrize("mean", ["zero", "last", "gls"])
def test_the_separable_prior_variance_is_the_dense_one(mean):
    points, gradients = sample(7, 5)
    estimator = SeparableEstimator(lengthscale=2.0, noise_variance=1e-2, prior_mean=mean)
    A = dense_gp.matern52(dense_gp.distances(points, points), 2.0) + 1e-2 * np.eye(7)
    ones = np.linalg.solve(A, np.ones(7))
    centre = {"zero": 0.0, "last": gradients[-1], "gls": ones @ gradients / ones.sum()}[mean]
    expected = slow.prior_variance(gradients - centre, A, 7 - (mean != "zero"))
    found = estimator.fit(history_of(points, gradients)).prior_variance()
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "dimension"), [(6, 4), (4, 9), (2, 3)])
@pytest.mark.parametrize("mean", ["zero", "last"])
def test_the_curl_free_prior_variance_is_the_dense_one(count, dimension, mean):
    points, gradients = sample(count, dimension, seed=count)
    estimator = CurlFreeEstimator(lengthscale=3.0, noise_variance=1e-2, prior_mean=mean)
    blocks = [[dense_curl_free.block(x, y, dense_curl_free.matern52, 3.0) for y in points] for x in points]
    A = np.block(blocks) + 1e-2 * np.eye(count * dimension)
    centre = gradients[-1] if mean == "last" else 0.0
    expected = slow.prior_variance(gradients - centre, A, count - (mean == "last"))
    found = estimator.fit(history_of(points, gradients)).prior_variance()
    assert float(found) == pytest.approx(expected, rel=1e-7)


def test_the_committee_has_its_members_and_hold_last_the_samples_variance():
    points, gradients = sample(5, 3)
    history = history_of(points, gradients)
    member = SeparableEstimator(lengthscale=1.0)
    committee = CommitteeEstimator([member]).fit(history)
    assert float(committee.prior_variance()) == float(member.fit(history).prior_variance())
    assert float(HoldLast().fit(history).prior_variance()) == pytest.approx(
        gradients.var(axis=0, ddof=1).mean()
    )


def test_one_pair_tells_no_variance_around_itself():
    history = history_of(*sample(1, 3))
    for estimator in (HoldLast(), CurlFreeEstimator(), SeparableEstimator(prior_mean="gls")):
        assert math.isnan(float(estimator.fit(history).prior_variance()))
    assert float(SeparableEstimator().fit(history).prior_variance()) > 0


@pytest.mark.parametrize("estimator", [SeparableEstimator(prior_mean="gls"), CurlFreeEstimator(), HoldLast()])
def test_the_path_of_accelerators_finds_the_same_variance(estimator):
    pairs = sample(6, 9)
    expected = float(estimator.fit(history_of(*pairs)).prior_variance())
    with small.tensors():
        assert float(estimator.fit(history_of(*pairs)).prior_variance()) == pytest.approx(expected, rel=1e-7)


# ------------------------------------------------------------------ information gain


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 1.0])
def test_the_gain_is_the_log_determinant_and_the_sum_over_variances(noise):
    points = np.cumsum(sample(12, 4)[0], axis=0)
    kernel = partial(dense_gp.matern52, lengthscale=3.0)
    found = information_gain(torch.from_numpy(points), lengthscale=3.0, noise_variance=noise)
    for j in (1, 5, 12):
        expected = slow.information_gain(points[:j], kernel, noise)
        assert float(found.total[j - 1]) == pytest.approx(expected, rel=1e-9)
    variances = slow.sequential_variances(points, kernel, noise)
    np.testing.assert_allclose(found.variances, variances, rtol=1e-7, atol=1e-10)
    assert float(found.total[-1]) == pytest.approx(0.5 * np.log1p(variances / noise).sum(), rel=1e-9)


@pytest.mark.parametrize("noise", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("step", [1e-2, 1.0, 100.0])
def test_the_mean_variance_is_below_its_bound(noise, step):
    points = torch.from_numpy(np.cumsum(step * sample(30, 3)[0], axis=0))
    found = information_gain(points, lengthscale=1.0, noise_variance=noise)
    means = found.variances.cumsum(0) / torch.arange(1, 31)
    assert bool((means <= found.variance_bound * (1 + 1e-9)).all())


def test_points_in_the_low_precision_of_a_far_run_are_told_apart():
    near = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    far = (near + 4096.0).to(torch.float32)
    torch.testing.assert_close(
        information_gain(far, lengthscale=1.0).total, information_gain(near, lengthscale=1.0).total
    )


# ------------------------------------------------------------------ bounds


@pytest.mark.parametrize("dimension", [1, 2, 10, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_error_bound_is_above_the_quantile_and_not_far(dimension, confidence):
    exact = math.sqrt(chi2.ppf(confidence, dimension))
    found = error_bound(1.0, dimension, confidence)
    assert exact <= found <= 3 * exact
    if dimension == 1000:
        assert found <= 1.1 * exact


def test_errors_of_a_process_that_is_as_modelled_are_calibrated():
    # Gradients drawn from the model itself: 200 components of one process.
    rng = np.random.default_rng(0)
    points = rng.normal(size=(12, 200)) / 10
    K = dense_gp.matern52(dense_gp.distances(points, points), 1.5) + 1e-6 * np.eye(12)
    gradients = 3.0 * np.linalg.cholesky(K) @ rng.normal(size=(12, 200))
    posterior = SeparableEstimator(lengthscale=1.5).fit(history_of(points[:8], gradients[:8]))
    calibration = Calibration()
    calibration.record(posterior, torch.from_numpy(points[8:]), torch.from_numpy(gradients[8:]))
    assert math.sqrt(float(posterior.prior_variance())) == pytest.approx(3.0, rel=0.1)
    found = calibration.summary()
    assert found.count == 4
    assert found.ratio == pytest.approx(1.0, abs=0.1)
    assert found.coverage_one == pytest.approx(0.683, abs=0.04)
    assert found.coverage_two == pytest.approx(0.954, abs=0.03)
    assert found.bounded == 1


@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_descent_with_wrong_gradients_stays_below_its_bound(noise, error):
    rng = np.random.default_rng(1)
    eigenvalues, lr, rounds, parallelism = np.linspace(0.01, 1, 20), 0.7, 25, 4
    theta = rng.normal(size=20)
    gap, squares, errors = 0.5 * (eigenvalues * theta**2).sum(), [], []
    for _ in range(rounds * parallelism):
        gradient = eigenvalues * theta
        wrong = error * gradient  # against the way down, and known before the noise
        squares.append(gradient @ gradient)
        errors.append(wrong @ wrong)
        theta = theta - lr * (gradient - wrong + noise * rng.normal(size=20) / math.sqrt(20))
    bound = stationarity_bound(
        rounds,
        parallelism,
        lr=lr,
        gap=gap,
        smoothness=1.0,
        noise_variance=noise**2,
        squared_error=float(np.mean(errors)),
    )
    assert np.mean(squares) <= bound
    assert bound <= 10 * np.mean(squares) + noise**2


# ------------------------------------------------------------------ calibration of runs


def run(estimator, calibration, rounds=12, gradient=None):
    theta = torch.nn.Parameter(torch.linspace(-2, 2, 20, dtype=torch.float64))
    base = torch.optim.Adam([theta], lr=0.05)
    optimizer = optex.OptEx(base, parallelism=3, history_size=6, estimator=estimator, deterministic=True)
    loop = optimizer.rounds(itertools.repeat(None), lambda _: (theta**4).sum())
    reports = loop if calibration is None else calibration.watch(optimizer, loop, gradient)
    return list(itertools.islice(reports, rounds)), theta.detach().clone(), optimizer


@pytest.mark.parametrize(
    "estimator", [None, SeparableEstimator(), CurlFreeEstimator(), HoldLast()], ids=lambda e: type(e).__name__
)
def test_a_watched_run_is_the_same_run(estimator):
    calibration = Calibration()
    watched, end, optimizer = run(estimator, calibration)
    plain, expected, _ = run(estimator, None)
    assert torch.equal(end, expected)
    assert [r.accepted for r in watched] == [r.accepted for r in plain]
    # The first round is one pair, with nothing to be predicted from; it is not counted as skipped.
    predicted = optimizer.history.appended - 1
    assert len(calibration.comparisons) + calibration.skipped == predicted > 20
    assert len(calibration.comparisons) > predicted / 2


def test_measured_gradients_are_the_true_ones_where_they_are_exact():
    asked = []

    def gradient(point):
        asked.append(point)
        return 4 * point**3

    given, measured = Calibration(), Calibration()
    run(CurlFreeEstimator(), given, gradient=gradient)
    run(CurlFreeEstimator(), measured)
    assert len(asked) == len(given.comparisons) + given.skipped
    np.testing.assert_allclose(given.actual, measured.actual, rtol=1e-6)
    np.testing.assert_allclose(given.predicted, measured.predicted)


def test_predictions_are_of_before_the_round():
    # With pairs of the round itself in the history every error would be that of interpolation: nearly none.
    calibration = Calibration()
    run(HoldLast(), calibration)
    assert calibration.comparisons
    assert (calibration.actual > 0).all()


def test_what_cannot_be_said_is_refused_by_name():
    calibration = Calibration()
    with pytest.raises(ValueError, match=r"Calibration.summary: nothing was compared"):
        calibration.summary()
    posterior = SeparableEstimator().fit(history_of(*sample(3, 4)))
    with pytest.raises(ValueError, match=r"Calibration.record: points \(2, 3\)"):
        calibration.record(posterior, torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="information_gain: points must be"):
        information_gain(torch.zeros(3))
    with pytest.raises(ValueError, match="information_gain: noise_variance"):
        information_gain(torch.zeros(3, 1), noise_variance=0.0)
    with pytest.raises(ValueError, match="error_bound: confidence"):
        error_bound(1.0, 2, 1.0)
    with pytest.raises(ValueError, match="stationarity_bound: lr"):
        stationarity_bound(1, 1, lr=2.0, gap=1.0, smoothness=1.0)


def test_points_without_a_standard_deviation_are_counted():
    calibration = Calibration()
    points, gradients = sample(2, 3)
    posterior = CurlFreeEstimator().fit(history_of(points[:1], gradients[:1]))
    calibration.record(posterior, torch.from_numpy(points[1:]), torch.from_numpy(gradients[1:]))
    assert calibration.skipped == 1
    assert not calibration.comparisons


def test_a_history_that_cannot_be_fitted_is_an_error_of_its_own():
    # Iterates of a run that diverged: their inner products are not finite.
    points, gradients = sample(3, 4)
    with np.errstate(all="ignore"), pytest.raises(optex.NotPositiveDefiniteError):
        CurlFreeEstimator().fit(history_of(1e200 * points, gradients))
