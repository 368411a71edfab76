import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optex import CurlFreeEstimator, GradientHistory, small
from optex.estimators.curl_free import NOISE_FLOOR, _directions
from tests.references import dense_curl_free as dense
from tests.test_estimators_noise import by_pairs
from tests.test_separable import KINDS, history_of, sample

PROFILES = {"rbf": dense.rbf, "matern-5/2": dense.matern52}


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from(sorted(PROFILES)),
    st.sampled_from(["last", "gls", "zero"]),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from(["dense", "cg"]),
    st.integers(0, 10_000),
)
def test_matches_the_dense_system(kind, size, dimension, name, prior_mean, noise, solver, seed):
    points, gradients, queries = sample(kind, size, dimension, seed)
    means = {"last": gradients[-1], "zero": np.zeros(dimension)}
    means["gls"] = dense.least_squares_mean(points, gradients, PROFILES[name], 1.5, noise)
    mean = means[prior_mean]
    estimator = CurlFreeEstimator(name, 1.5, noise_variance=noise, prior_mean=prior_mean, solver=solver)
    posterior = estimator.fit(history_of(points, gradients, size=size + 2))
    results = []
    for query in queries:
        expected, covariance = dense.posterior(points, gradients, query, PROFILES[name], 1.5, noise, mean)
        results.append(expected)
        scale = max(np.abs(expected).max(), np.abs(gradients).max())
        assert np.abs(posterior.mean(torch.from_numpy(query)).numpy() - expected).max() < 1e-8 * scale
        assert posterior.variance(torch.from_numpy(query)).item() == pytest.approx(
            np.trace(covariance) / dimension, abs=1e-8
        )
    change = posterior.mean_difference(*torch.from_numpy(queries)).numpy()
    np.testing.assert_allclose(change, results[0] - results[1], atol=1e-8 * max(1, np.abs(results).max()))
    assert not posterior.mean_difference(*torch.from_numpy(queries[[0, 0]])).any()


@pytest.mark.parametrize("kernel", ["rbf", "matern-5/2", "rational-quadratic"])
def test_solvers_agree_on_a_run_with_a_long_history(kernel):
    # Iterates of gradient descent, T0 = 40: nearly collinear at the end, as in real runs.
    curvature = torch.logspace(-2, 0, 60, dtype=torch.float64)
    theta = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    history = GradientHistory(40, 60)
    for _ in range(40):
        history.append(theta[None], (curvature * theta)[None])
        theta = theta - 0.9 * curvature * theta
    answers = [
        CurlFreeEstimator(kernel, noise_variance=1e-4, solver=solver).fit(history).mean(theta)
        for solver in ("dense", "cg")
    ]
    assert (answers[0] - answers[1]).norm() < 1e-8 * answers[0].norm()
    assert (answers[0] - curvature * theta).norm() < 0.1 * (curvature * theta).norm()


def test_large_systems_go_to_conjugate_gradients_and_small_ones_do_not(monkeypatch):
    from optex.estimators import curl_free

    calls = []
    real = small.conjugate_gradients
    monkeypatch.setattr(small, "conjugate_gradients", lambda *a: calls.append(1) or real(*a))
    points, gradients, _ = sample("random", 20, 50, 0)
    for limit, expected in ((20 * 19, 0), (20 * 19 - 1, 1)):
        monkeypatch.setattr(curl_free, "DENSE_LIMIT", limit)
        for estimator, wanted in (
            (CurlFreeEstimator(noise_variance=1e-2), expected),
            (CurlFreeEstimator(noise_variance=1e-2, solver="cg"), 1),
            (CurlFreeEstimator(noise_variance=1e-2, solver="dense"), 0),
        ):
            calls.clear()
            estimator.fit(history_of(points, gradients))
            assert len(calls) == wanted


def test_sees_through_symmetry_what_the_separable_kernel_cannot():
    # F = θ₀ θ₁. Along the first axis only the second component of the gradient changes; a curl-free field
    # must then change in its first component along the second axis, where nothing was ever measured.
    points = np.array([[t, 0.0] for t in (-1.0, 0.0, 1.0)])
    history = history_of(points, points[:, ::-1].copy())
    query = torch.tensor([0.0, 0.5], dtype=torch.float64)
    from optex import SeparableEstimator

    curl_free = CurlFreeEstimator("rbf", 3.0).fit(history).mean(query)
    separable = SeparableEstimator("rbf", 3.0, prior_mean="gls").fit(history).mean(query)
    assert curl_free[0].item() == pytest.approx(0.5, abs=0.05)
    assert abs(separable[0].item()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_never_fails_on_a_run_that_converges(dtype, size):
    # Steps shrink to nothing and the span loses its rank. No warning either.
    theta = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=dtype)
    history = GradientHistory(size, 500, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(100):
            history.append(theta[None], theta[None])
            if step % 10 == 9:
                posterior = CurlFreeEstimator().fit(history)
                prediction = posterior.mean(theta * 0.9)
                assert prediction.isfinite().all()
                # The noise is relative to the largest gradient held, and so is what is promised.
                largest = history.gradients.norm(dim=1).max()
                assert (prediction - 0.9 * theta).norm() <= 3e-3 * largest
            theta = theta * 0.7


@pytest.mark.parametrize("prior_mean", ["zero", "last"])
def test_a_narrow_valley_keeps_its_short_direction(prior_mean):
    # F = θ₀ θ₁ / w at points (t, w s): the Gram matrix sees the second axis as w² = 1e-10 of the first, and
    # what the first component is between the points is known from the second alone.
    width = 1e-5
    t, s = np.random.default_rng(0).normal(size=(2, 6))
    points, gradients = np.stack([t, width * s], 1), np.stack([s, t / width], 1)
    query = np.array([0.3, 0.4 * width])
    mean = gradients[-1] if prior_mean == "last" else np.zeros(2)
    expected, _ = dense.posterior(points, gradients, query, dense.rbf, 3.0, 1e-4, mean)
    estimator = CurlFreeEstimator("rbf", 3.0, noise_variance=1e-4, prior_mean=prior_mean)
    result = estimator.fit(history_of(points, gradients)).mean(torch.from_numpy(query)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-4)  # each component by its own size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 12])
def test_directions_end_where_rounding_begins(dtype, count):
    # Sums of half-precision products are taken in float32, so their Gram matrix is as good as float32's.
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    cutoff = 7.0 * count**0.5 * eps
    eigenvalues = torch.zeros(count, dtype=torch.float64)
    eigenvalues[:3] = torch.tensor([7.0, 3 * cutoff, cutoff / 3])
    basis, scales = _directions(eigenvalues.diag().numpy(), dtype)
    assert (scales**2).tolist() == pytest.approx([3 * cutoff, 7.0], rel=1e-3)
    assert np.abs(basis).argmax(0).tolist() == [1, 0]


@pytest.mark.parametrize("rounding", [0.0, -1e-30])
def test_iterates_at_one_point_have_no_directions(rounding):
    basis, scales = _directions(rounding * np.eye(3), torch.float32)
    assert basis.shape == (3, 0)
    assert not len(scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise_variance", [0.0, 0.1])
def test_noise_is_at_least_what_the_history_cannot_resolve(dtype, noise_variance):
    # One pair, asked at its own iterate: what is left of the variance is σ² / (1 + σ²).
    history = GradientHistory(2, 5, dtype=dtype)
    history.append(torch.ones(1, 5, dtype=dtype), torch.ones(1, 5, dtype=dtype))
    posterior = CurlFreeEstimator("rbf", 1.0, noise_variance=noise_variance).fit(history)
    noise = max(noise_variance, NOISE_FLOOR * torch.finfo(dtype).eps)
    variance = posterior.variance(torch.ones(5, dtype=dtype)).item()
    assert variance == pytest.approx(noise / (1 + noise), rel=1e-6, abs=4e-16)


def test_half_precision_history():
    points, gradients, _ = sample("random", 8, 300, 0)
    history = GradientHistory(8, 300, dtype=torch.bfloat16)
    history.append(torch.from_numpy(points), torch.from_numpy(gradients))
    exact = CurlFreeEstimator(noise_variance=0.1).fit(history_of(points, gradients))
    rough = CurlFreeEstimator(noise_variance=0.1).fit(history)
    query = torch.from_numpy(points[:2].mean(0))
    torch.testing.assert_close(rough.mean(query), exact.mean(query), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kernel": "matern-3/2"},
            "kernel Matern32() is not twice differentiable at 0; use 'rbf', 'matern-5/2' or "
            "'rational-quadratic'",
        ),
        ({"lengthscale": 0.0}, "lengthscale must be positive and finite, got 0.0"),
        ({"median_multiple": -1.0}, "median_multiple must be positive and finite, got -1.0"),
        ({"median_multiple": None}, "median_multiple must be positive and finite, got None"),
        ({"noise_variance": -1e-3}, "noise_variance must be a finite number at least 0, got -0.001"),
        ({"prior_mean": "ols"}, "prior_mean must be 'last', 'gls' or 'zero', got 'ols'"),
        ({"solver": "lu"}, "solver must be 'auto', 'dense' or 'cg', got 'lu'"),
    ],
)
def test_errors_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'CurlFreeEstimator: {message}')}$"):
        CurlFreeEstimator(**settings)


def test_unknown_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match="kernel: 'gauss' is not one of"):
        CurlFreeEstimator("gauss")


@pytest.mark.parametrize(("dimension", "count"), [(1, 3), (2, 5), (3, 3), (6, 4)])
@pytest.mark.parametrize("solver", ["dense", "cg"])
def test_the_path_of_accelerators_predicts_alike(dimension, count, solver):
    points, gradients, queries = sample("random", count, dimension, 0)
    estimator = CurlFreeEstimator("rbf", 1.5, noise_variance=1e-2, solver=solver)

    def answers():
        posterior = estimator.fit(history_of(points, gradients, size=count + 2))
        query = torch.from_numpy(queries[0])
        return torch.stack([*posterior.mean(query), posterior.variance(query), posterior.prior_variance()])

    expected = answers()
    with small.tensors():
        torch.testing.assert_close(answers(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("told", [0.02, 0.5])
def test_noise_that_is_told_is_put_in_units_of_the_prior(told):
    # A component's correlation differs by direction: what counts is its mean over the components.
    points, gradients, queries = sample("random", 5, 3, 1)
    history = GradientHistory(5, 3)
    history.append(torch.from_numpy(points), torch.from_numpy(gradients), [told] * 5)
    correlations = [[np.trace(dense.block(x, y, dense.rbf, 1.5)) / 3 for y in points] for x in points]
    (noise, *_) = by_pairs(torch.from_numpy(gradients), [told] * 5, np.array(correlations), 1e-6)
    expected, _ = dense.posterior(points, gradients, queries[0], dense.rbf, 1.5, noise, np.zeros(3))
    posterior = CurlFreeEstimator("rbf", 1.5, prior_mean="zero").fit(history)
    np.testing.assert_allclose(posterior.mean(torch.from_numpy(queries[0])).numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("prior_mean", ["last", "gls"])
def test_where_the_noise_is_told_the_last_gradient_is_no_mean(prior_mean):
    points, gradients, queries = sample("random", 5, 3, 1)
    history = GradientHistory(5, 3)
    history.append(torch.from_numpy(points), torch.from_numpy(gradients), [0.1] * 5)
    answers = [
        CurlFreeEstimator("rbf", 1.5, prior_mean=mean).fit(history).mean(torch.from_numpy(queries[0]))
        for mean in (prior_mean, "gls")
    ]
    assert torch.equal(*answers)


def test_fits_that_differ_in_noise_alone_share_what_does_not_depend_on_it():
    points, gradients, queries = sample("random", 6, 4, 2)
    history, query = history_of(points, gradients), torch.from_numpy(queries[0])
    for noise in (1e-4, 1e-1):
        for kernel, lengthscale in (("rbf", 1.5), ("matern-5/2", 1.5), ("rbf", 3.0)):
            estimator = CurlFreeEstimator(kernel, lengthscale, noise_variance=noise)
            alone = estimator.fit(history_of(points, gradients)).mean(query)
            torch.testing.assert_close(estimator.fit(history).mean(query), alone, rtol=1e-9, atol=1e-12)
