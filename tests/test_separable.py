import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk

from optex import GradientHistory, SeparableEstimator, small
from optex.estimators.kernels import kernel_named
from optex.estimators.separable import LENGTHSCALE_FACTORS, NOISE_VARIANCES
from tests.references import dense_gp

KINDS = ["random", "duplicates", "collinear"]
REFERENCE_KERNELS = {
    "rbf": lambda ell: sk.RBF(ell),
    "matern-1/2": lambda ell: sk.Matern(ell, nu=0.5),
    "matern-3/2": lambda ell: sk.Matern(ell, nu=1.5),
    "matern-5/2": lambda ell: sk.Matern(ell, nu=2.5),
    "rational-quadratic": lambda ell: sk.RationalQuadratic(ell, alpha=1.0),
}


def sample(kind, size, dimension, seed, dtype=np.float64):
    """Points and gradients [size, d] and two queries [2, d], as float64 numbers that ``dtype`` can hold."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(size, dimension))
    if kind == "duplicates":
        points = points[rng.integers(0, max(1, size // 2), size)]
    if kind == "collinear":
        points = np.linspace(-1, 1, size)[:, None] * points[:1]
    gradients, queries = rng.normal(size=(size, dimension)), rng.normal(size=(2, dimension))
    return tuple(a.astype(dtype).astype(np.float64) for a in (points, gradients, queries))


def history_of(points, gradients, dtype=torch.float64, size=None):
    history = GradientHistory(size or len(points), points.shape[1])
    # Two calls, the later one crossing a moved anchor when the ring is full.
    for half in np.array_split(np.arange(len(points)), 2):
        history.append(torch.from_numpy(points[half]).to(dtype), torch.from_numpy(gradients[half]).to(dtype))
    return history


def relative(result, expected, gradients):
    """Error in units of the numbers that are combined: a prediction near zero is their difference."""
    return np.abs(np.asarray(result) - expected).max() / max(np.abs(expected).max(), np.abs(gradients).max())


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 24),
    st.integers(1, 12),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from(sorted(REFERENCE_KERNELS)),
    st.floats(0.2, 5.0),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.integers(0, 10_000),
)
def test_matches_scikit_learn(kind, size, dimension, dtype, name, lengthscale, noise, seed):
    points, gradients, queries = sample(kind, size, dimension, seed, dtype)
    reference = GaussianProcessRegressor(
        REFERENCE_KERNELS[name](lengthscale),
        alpha=noise,
        optimizer=None,  # pyright: ignore[reportArgumentType]  # its documentation has None
    )
    mean, deviation = reference.fit(points, gradients).predict(queries, return_std=True)
    # The history is float64; the parameters that it is fed need not be.
    history = history_of(points, gradients, torch.float32 if dtype is np.float32 else torch.float64)
    posterior = SeparableEstimator(name, lengthscale, noise).fit(history)
    for i, query in enumerate(torch.from_numpy(queries)):
        assert relative(posterior.mean(query), mean[i].reshape(-1), gradients) < 1e-10
        assert abs(posterior.variance(query).item() - np.min(deviation[i]) ** 2) < 1e-10


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 24),
    st.integers(1, 12),
    st.sampled_from(["zero", "last", "gls"]),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.integers(0, 10_000),
)
def test_matches_the_dense_formula_with_every_prior_mean(kind, size, dimension, prior_mean, noise, seed):
    points, gradients, queries = sample(kind, size, dimension, seed)
    kernel = lambda r: dense_gp.matern52(r, 1.5)  # noqa: E731
    mean, variance = dense_gp.posterior(points, gradients, queries, kernel, noise, prior_mean)
    posterior = SeparableEstimator("matern-5/2", 1.5, noise, prior_mean).fit(
        history_of(points, gradients, size=size + 3)
    )
    for i, query in enumerate(torch.from_numpy(queries)):
        assert relative(posterior.mean(query), mean[i], gradients) < 1e-10
        assert abs(posterior.variance(query).item() - variance[i]) < 1e-9
    change = posterior.mean_difference(torch.from_numpy(queries[0]), torch.from_numpy(queries[1]))
    np.testing.assert_allclose(change.numpy(), mean[0] - mean[1], atol=1e-8 * max(1, np.abs(mean).max()))


@pytest.mark.parametrize("prior_mean", ["zero", "last", "gls"])
@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_error_is_that_of_leaving_one_out(prior_mean, seed):
    points, gradients, _ = sample("random", 9, 4, seed)
    history = history_of(points, gradients, size=12)
    estimator = SeparableEstimator("matern-5/2", prior_mean=prior_mean)
    candidates = [(0.7, 1e-3), (2.0, 1e-2), (5.0, 0.3)]
    errors = estimator._leave_one_out_errors(history, candidates)
    for error, (lengthscale, noise) in zip(errors, candidates, strict=True):
        kernel = lambda r, ell=lengthscale: dense_gp.matern52(r, ell)  # noqa: E731
        expected = dense_gp.leave_one_out_error(points, gradients, kernel, noise, prior_mean)
        assert error.item() == pytest.approx(expected, rel=1e-8)


def test_leave_one_out_picks_the_best_of_its_grid():
    generator = np.random.default_rng(3)
    points = generator.normal(size=(20, 3))
    gradients = np.sin(points) + 0.3 * generator.normal(size=(20, 3))
    history = history_of(points, gradients)
    posterior = SeparableEstimator("matern-5/2", "leave-one-out", "leave-one-out").fit(history)
    unit = SeparableEstimator("matern-5/2").fit(history).lengthscale.item()
    errors = {
        (factor * unit, noise): dense_gp.leave_one_out_error(
            points, gradients, lambda r, ell=factor * unit: dense_gp.matern52(r, ell), noise, "zero"
        )
        for factor in LENGTHSCALE_FACTORS
        for noise in NOISE_VARIANCES
    }
    best = min(errors, key=errors.__getitem__)
    assert (posterior.lengthscale.item(), posterior.noise_variance) == pytest.approx(best)
    assert posterior.noise_variance > 1e-3  # the data are noisy, and it is seen


def test_median_lengthscale():
    points = np.array([[0.0], [1.0], [3.0], [7.0]])  # distances 1 2 3 4 6 7
    posterior = SeparableEstimator().fit(history_of(points, points))
    assert posterior.lengthscale.item() == 3.0


@pytest.mark.parametrize("prior_mean", ["zero", "last", "gls"])
def test_far_from_the_history_it_returns_to_the_prior_mean(prior_mean):
    points, gradients, _ = sample("random", 6, 3, 0)
    history = history_of(points, gradients)
    posterior = SeparableEstimator("rbf", 1.0, 1e-2, prior_mean).fit(history)
    far = posterior.mean(torch.full((3,), 1e3, dtype=torch.float64))
    kernel = lambda r: np.exp(-(r**2) / 2)  # noqa: E731
    expected, _ = dense_gp.posterior(points, gradients, np.full((1, 3), 1e3), kernel, 1e-2, prior_mean)
    np.testing.assert_allclose(far.numpy(), expected[0], rtol=1e-10, atol=1e-12)
    assert posterior.variance(torch.full((3,), 1e3, dtype=torch.float64)) >= 1


def test_a_symmetric_kernel_matrix_without_noise_predicts_the_data():
    points, gradients, _ = sample("random", 5, 3, 0)
    posterior = SeparableEstimator("matern-3/2", 1.0, 0.0).fit(history_of(points, gradients))
    for point, gradient in zip(points, gradients, strict=True):
        np.testing.assert_allclose(posterior.mean(torch.from_numpy(point)).numpy(), gradient, rtol=1e-9)


LENGTHSCALES = "lengthscale must be a number (positive) or one of 'median', 'leave-one-out'"
NOISES = "noise_variance must be a number (not negative) or one of 'leave-one-out'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengthscale": 0.0}, f"{LENGTHSCALES}, got 0.0"),
        ({"lengthscale": np.inf}, f"{LENGTHSCALES}, got inf"),
        ({"lengthscale": "mean"}, f"{LENGTHSCALES}, got 'mean'"),
        ({"lengthscale": None}, f"{LENGTHSCALES}, got None"),
        ({"noise_variance": -1.0}, f"{NOISES}, got -1.0"),
        ({"noise_variance": np.nan}, f"{NOISES}, got nan"),
        ({"noise_variance": "median"}, f"{NOISES}, got 'median'"),
        ({"prior_mean": "first"}, "prior_mean must be 'zero', 'last' or 'gls', got 'first'"),
    ],
)
def test_errors_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'SeparableEstimator: {message}')}$"):
        SeparableEstimator(**settings)


def test_unknown_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match="kernel: 'gauss' is not one of"):
        SeparableEstimator("gauss")


@pytest.mark.parametrize("noise", [0.0, 0, 1e-300, "leave-one-out"])
def test_settings_at_the_ends_of_their_range_are_taken(noise):
    estimator = SeparableEstimator(noise_variance=noise, lengthscale=1)
    assert estimator.assumed_noise_variance == (0.0 if noise == "leave-one-out" else noise)


@pytest.mark.parametrize("prior_mean", ["zero", "last", "gls"])
def test_the_path_of_accelerators_predicts_alike(prior_mean):
    points, gradients, queries = sample("duplicates", 8, 4, 0)
    estimator = SeparableEstimator("matern-5/2", 1.5, 1e-2, prior_mean)

    def answers():
        posterior, query = estimator.fit(history_of(points, gradients, size=11)), torch.from_numpy(queries[0])
        return torch.stack([*posterior.mean(query), posterior.variance(query), posterior.prior_variance()])

    expected = answers()
    with small.tensors():
        torch.testing.assert_close(answers(), expected, rtol=1e-9, atol=1e-12)


def test_kernel_instances_are_taken():
    assert SeparableEstimator(kernel_named("rbf")).kernel == SeparableEstimator("rbf").kernel
