"""What every solver of the family promises: one suite over the table."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch

from optex.solvers import Status
from tests.family import SOLVERS

every = pytest.mark.parametrize("name", SOLVERS)
# What each solver that takes a function calls it.
FUNCTIONS = {name: row.function for name, row in SOLVERS.items() if row.function is not None}


def arrays(value):
    """All numbers in an argument, or in a result's x, as NumPy arrays."""
    if isinstance(value, (tuple, list)):
        return [array for entry in value for array in arrays(entry)]
    if isinstance(value, torch.Tensor):
        return [value.detach().to_dense().numpy()]
    if scipy.sparse.issparse(value):
        return [value.toarray()]
    return [np.asarray(value)] if isinstance(value, (np.ndarray, float, int)) else []


def equal(one, two):
    pairs = list(zip(arrays(one), arrays(two), strict=True))
    return bool(pairs) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def finite(value):
    return all(np.isfinite(array).all() for array in arrays(value))


def spoiled(function, calls):
    """The function, which answers NaN after so many calls."""
    count = 0

    def answer(*arguments):
        nonlocal count
        count += 1
        value = function(*arguments)
        return value if count <= calls else value * float("nan")

    return answer


@every
def test_it_solves_its_problem(name):
    row = SOLVERS[name]
    result = row.solve(**row.make())
    assert result.success, result.message
    assert result.status == Status.CONVERGED
    assert row.error(result) <= row.tolerance


@every
def test_the_same_problem_has_the_same_answer_bit_for_bit(name):
    row = SOLVERS[name]
    assert equal(row.solve(**row.make()).x, row.solve(**row.make()).x)


@every
def test_what_it_is_given_stays_as_it_was(name):
    row = SOLVERS[name]
    given = row.make()
    before = {key: copy.deepcopy(value) for key, value in given.items() if arrays(value)}
    row.solve(**given)
    assert before
    assert all(equal(given[key], value) for key, value in before.items())


@every
def test_a_limit_is_a_status_and_leaves_the_best_iterate(name):
    row = SOLVERS[name]
    result = row.solve(**row.make(), maxiter=1)
    assert not result.success
    assert result.status == Status.LIMIT
    assert result.nit == 1
    assert "maxiter" in result.message
    assert finite(result.x)


@every
@pytest.mark.parametrize("tol", [0.0, -1.0, float("nan"), 1.5, 1e-20, "small"])
def test_a_tolerance_that_cannot_be_reached_is_refused(name, tol):
    row = SOLVERS[name]
    with pytest.raises(ValueError, match="tol"):
        row.solve(**row.make(), tol=tol)


@every
@pytest.mark.parametrize("maxiter", [0, -1, 1.5, True])
def test_a_limit_that_is_none_is_refused(name, maxiter):
    row = SOLVERS[name]
    with pytest.raises(ValueError, match="maxiter"):
        row.solve(**row.make(), maxiter=maxiter)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_from_the_function_ends_with_a_finite_iterate(name):
    row, function = SOLVERS[name], FUNCTIONS[name]
    given = row.make()
    given[function] = spoiled(given[function], 2)
    result = row.solve(**given)
    assert not result.success
    assert result.status == Status.NON_FINITE
    assert finite(result.x)


@every
def test_a_result_can_be_sent(name):
    row = SOLVERS[name]
    result = row.solve(**row.make())
    assert equal(pickle.loads(pickle.dumps(result)).x, result.x)
