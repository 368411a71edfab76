import numpy as np
import pytest
import torch

from optex.estimators.kernels import KERNELS, RationalQuadratic, kernel_named


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("lengthscale", [0.3, 1.0, 7.0])
def test_derivatives_match_autograd(name, lengthscale):
    kernel = kernel_named(name)
    squared = torch.logspace(-3, 2, 40, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(kernel.value(squared, lengthscale).sum(), squared)
    (second,) = torch.autograd.grad(kernel.derivative(squared, lengthscale).sum(), squared)
    torch.testing.assert_close(kernel.derivative(squared, lengthscale), first, rtol=1e-10, atol=1e-300)
    torch.testing.assert_close(kernel.second_derivative(squared, lengthscale), second, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("name", KERNELS)
def test_one_at_zero_and_decreasing(name):
    squared = torch.linspace(0, 50, 200, dtype=torch.float64)
    values = kernel_named(name).value(squared, 2.0)
    assert values[0] == 1
    assert (values.diff() < 0).all()


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("rbf", -1 / 8, 1 / 64),
        ("matern-1/2", -torch.inf, torch.inf),
        ("matern-3/2", -3 / 8, torch.inf),
        ("matern-5/2", -5 / 24, 25 / 192),
        ("rational-quadratic", -1 / 8, 1 / 32),
    ],
)
def test_derivatives_at_zero_are_their_limits(name, first, second):
    zero, kernel = torch.zeros(1, dtype=torch.float64), kernel_named(name)
    assert kernel.derivative(zero, 2.0).item() == pytest.approx(first)
    assert kernel.second_derivative(zero, 2.0).item() == pytest.approx(second)


def test_rational_quadratic_tends_to_the_rbf():
    squared = torch.linspace(0, 9, 20, dtype=torch.float64)
    torch.testing.assert_close(
        RationalQuadratic(1e7).value(squared, 1.5),
        kernel_named("rbf").value(squared, 1.5),
        rtol=1e-5,
        atol=1e-6,
    )


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"kernel: 'gauss' is not one of rbf, matern-1/2"):
        kernel_named("gauss")
    with pytest.raises(ValueError, match="RationalQuadratic: alpha must be positive and finite, got 0"):
        RationalQuadratic(0)


@pytest.mark.parametrize("name", ["rbf", "matern-5/2", "rational-quadratic"])
def test_profiles_are_the_derivatives_over_that_at_zero(name):
    kernel, squared, lengthscale = kernel_named(name), np.array([0.0, 1e-6, 0.3, 2.0, 50.0]), np.float64(0.7)
    first, second = kernel.profiles(squared, lengthscale)
    at_zero = kernel.derivative(np.zeros(1), lengthscale)
    np.testing.assert_allclose(first, kernel.derivative(squared, lengthscale) / at_zero, rtol=1e-13)
    np.testing.assert_allclose(second, 2 * kernel.second_derivative(squared, lengthscale) / at_zero, rtol=1e-13)
