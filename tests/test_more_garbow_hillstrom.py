"""The test functions of Moré, Garbow and Hillstrom against the numbers that are published of them."""

import numpy as np
import pytest
import scipy.optimize
import torch

from optex.studies.problems.more_garbow_hillstrom import FUNCTIONS, TestFunction

# ‖r‖ at the standard starts of those that MINPACK's test programs run, as these print it, and f at others' in
# closed form.
NORMS = {
    "Rosenbrock": 4.919350,
    "Freudenstein and Roth": 20.01249,
    "Helical valley": 50.0,
    "Powell singular": 14.66288,
    "Bard": 6.456136,
    "Kowalik and Osborne": 0.07289151,
    "Meyer": 41153.47,
    "Watson": 5.477226,
    "Box three-dimensional": 32.11158,
    "Jennrich and Sampson": 64.58570,
    "Brown and Dennis": 2815.438,
    "Osborne 1": 0.9375640,
    "Osborne 2": 1.446865,
    "Chebyquad": 0.1965139,
    "Brown almost-linear": 16.53022,
    "Linear, full rank": 50**0.5,
}
VALUES = {
    "Wood": 19192.0,
    "Beale": 14.203125,
    "Brown badly scaled": 999998000003.0,
    "Extended Rosenbrock": 121.0,
}

each = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_published_values_are_of_functions_that_there_are() -> None:
    assert NORMS.keys() | VALUES.keys() <= {function.name for function in FUNCTIONS}


@each
def test_value_at_the_start_is_the_published_one(function: TestFunction) -> None:
    start = float(function(tensor(function.start)))
    assert start > function.minima[0]
    if function.name in NORMS:
        assert start**0.5 == pytest.approx(NORMS[function.name], rel=2e-6)
    if function.name in VALUES:
        assert start == pytest.approx(VALUES[function.name], rel=1e-12)


@each
def test_least_squares_from_the_start_ends_at_a_published_minimum(function: TestFunction) -> None:
    def residuals(x: np.ndarray) -> np.ndarray:
        return function.residuals(tensor(x)).numpy()

    def jacobian(x: np.ndarray) -> np.ndarray:
        return torch.func.jacrev(function.residuals)(tensor(x)).numpy()

    found = scipy.optimize.least_squares(
        residuals,
        function.start,
        jacobian,  # pyright: ignore[reportArgumentType] - SciPy takes a function, its stubs a word alone
        method="lm",
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    assert any(2 * found.cost == pytest.approx(least, rel=1e-5, abs=1e-13) for least in function.minima)


@each
def test_value_at_the_minimizer_is_the_lowest(function: TestFunction) -> None:
    if function.minimizer is None:
        pytest.skip("the paper does not say where it is")
    assert len(function.minimizer) == function.dimension
    value = float(function(tensor(function.minimizer)))
    assert value == pytest.approx(function.minima[0], rel=1e-5, abs=1e-13)


@each
def test_gradient_is_that_of_differences(function: TestFunction) -> None:
    # Off the start, where some of them have kinks or symmetries.
    x = tensor(function.start) * 1.01 + 0.01
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    for i in range(function.dimension):
        step = 1e-6 * max(1.0, abs(float(x[i])))
        ends = [x.clone() for _ in range(2)]
        ends[0][i] += step
        ends[1][i] -= step
        slope = (float(function(ends[0])) - float(function(ends[1]))) / (2 * step)
        scale = float(gradient.abs().max())
        rounding = 1e-15 * float(function(x)) / step
        assert float(gradient[i]) == pytest.approx(slope, rel=1e-4, abs=1e-6 * scale + 10 * rounding)


def test_numbers_are_the_papers() -> None:
    assert [function.number for function in FUNCTIONS] == list(range(1, 36))
    dimensions = [function.dimension for function in FUNCTIONS[:20]]
    assert dimensions == [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6, 11, 6]


@each
def test_keeps_dtype(function: TestFunction) -> None:
    x = torch.tensor(function.start, dtype=torch.float32)
    assert function(x).dtype == torch.float32
