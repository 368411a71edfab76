"""Deep conjugate directions: the iteration, its fallbacks, the loss, Ritz vectors, the network."""

import copy
import importlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch
from scipy.sparse.linalg import aslinearoperator, cg

from optex import NotPositiveDefiniteError
from optex.solvers import DCDMLoss, DirectionNetwork, Status, dcdm, ritz_vectors
from optex.studies.poisson import Poisson, obstacles
from tests.gradients import grad_of
from tests.references.dcdm import conjugate_gradients, deep_conjugate_directions, direction_loss

F64 = torch.float64


def laplacian(size):
    """Of a square without obstacles, and a random right-hand side [size, size]."""
    problem = Poisson(np.zeros((size, size), dtype=bool))
    return problem.matrix, problem.random_right_hand_side(0)


def definite(n=12, seed=0):
    random = np.random.default_rng(seed)
    rows = random.normal(size=(n, n))
    return rows @ rows.T + 0.1 * np.eye(n), random.normal(size=n)


def iterates(A, b, direction, **options):
    found = [np.zeros_like(b)]
    result = dcdm(
        A, b, direction, callback=lambda intermediate_result: found.append(intermediate_result.x), **options
    )
    return found, result


def own(r):
    return r


# ---------------------------------------------------------------------- the iteration


@pytest.mark.parametrize("memory", [0, 1, 2, 5])
def test_every_iterate_is_that_of_the_slow_twin(memory):
    A, b = definite()
    scale = np.linspace(0.5, 2.0, 12)

    def direction(r):  # nothing symmetric or linear
        return scale * r + 0.3 * np.abs(r)

    fast, _ = iterates(A, b, direction, memory=memory, maxiter=8, tol=1e-12, patience=None)
    slow = deep_conjugate_directions(A, b, direction, memory=memory, steps=8)
    assert len(fast) == 9
    for one, two in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_the_residual_as_direction_is_conjugate_gradients(factor):
    A, b = definite()
    fast, result = iterates(A, b, lambda r: factor * r, maxiter=9, tol=1e-12)
    assert result.fallbacks == 0
    for one, two in zip(fast, conjugate_gradients(A, b, 9), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_as_many_iterations_as_scipy(size):
    A, b = laplacian(size)
    counted = []
    cg(A, b.ravel(), rtol=1e-4, callback=counted.append)
    result = dcdm(A, b, own, maxiter=1000)
    assert result.nit == len(counted)
    assert result.matvecs == result.nit + 1  # one to confirm
    np.testing.assert_allclose(result.x.ravel(), counted[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, -1e-30, 1e30])
def test_the_inverse_ends_after_one_iteration(factor):
    A, b = definite()
    result = dcdm(A, b, lambda r: factor * np.linalg.solve(A, r), tol=1e-10)
    assert (result.nit, result.success, result.directions) == (1, True, 1)
    np.testing.assert_allclose(result.x, np.linalg.solve(A, b), rtol=1e-8)


def test_matrices_operators_and_functions_have_the_same_answer():
    A, b = definite()
    matrix = torch.from_numpy(A)
    x = dcdm(A, b, own, tol=1e-12).x
    arrays = [
        scipy.sparse.csr_array(A),
        scipy.sparse.csc_matrix(A),
        aslinearoperator(A),
        lambda v: A @ v,
        matrix,
    ]
    for form in [*arrays, matrix.to_sparse()]:
        found = dcdm(form, b, own, tol=1e-12)
        assert found.success
        assert isinstance(found.x, np.ndarray)
        np.testing.assert_allclose(found.x, x, rtol=1e-9)
    tensors = [
        matrix,
        matrix.to_sparse(),
        lambda v: matrix @ v,
        A,
        scipy.sparse.csr_array(A),
        aslinearoperator(A),
    ]
    for form in tensors:
        found = dcdm(form, torch.from_numpy(b), own, tol=1e-12)
        assert found.x.dtype == F64
        np.testing.assert_allclose(found.x.numpy(), x, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kind_shape_and_dtype_stay(dtype):
    A, b = laplacian(6)
    for right in (b.astype(dtype), torch.from_numpy(b.astype(dtype))):
        result = dcdm(A, right, own)
        assert type(result.x) is type(right)
        assert result.x.dtype == right.dtype
        assert result.x.shape == right.shape
    assert dcdm(A, np.ones(36, dtype=np.int64), own).x.dtype == np.float64


def test_a_network_in_single_precision_serves_a_recurrence_in_double():
    A, b = laplacian(8)
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, r):
            seen.append((r.dtype, torch.is_grad_enabled()))
            return self.factor * r

    result = dcdm(A, b, Watched(), tol=1e-12, maxiter=200)
    assert set(seen) == {(torch.float32, False)}
    assert result.success
    assert np.linalg.norm(A @ result.x.ravel() - b.ravel()) <= 1e-12 * np.linalg.norm(b)


def test_it_starts_where_it_is_told():
    A, b = definite()
    x = np.linalg.solve(A, b)
    assert dcdm(A, b, own, x0=x, tol=1e-8).nit == 0
    near = dcdm(A, b, own, x0=x + 1e-6, tol=1e-10)
    assert near.success
    np.testing.assert_allclose(near.x, x, rtol=1e-8)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_right_hand_sides_of_any_size(scale):
    A, b = definite()
    result = dcdm(A, b / np.abs(b).max() * scale, own, tol=1e-10)
    assert result.success
    np.testing.assert_allclose(result.x / scale, np.linalg.solve(A, b / np.abs(b).max()), rtol=1e-6)


def test_zero_is_solved_by_zero():
    A, b = definite()
    for right in (0 * b, torch.zeros(12)):
        result = dcdm(A, right, own, x0=right + 1)
        assert (result.nit, result.success, result.residual) == (0, True, 0.0)
        assert not result.x.any()


def test_callbacks_see_every_iterate_and_may_stop():
    A, b = definite()
    seen = []

    def told(intermediate_result):
        seen.append((intermediate_result.nit, intermediate_result.residual))
        return len(seen) == 3

    result = dcdm(A, b, own, tol=1e-12, callback=told)
    assert result.status == Status.STOPPED
    assert [nit for nit, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == result.residual

    def raises(intermediate_result):
        raise StopIteration

    assert dcdm(A, b, own, tol=1e-12, callback=raises).nit == 1


# ---------------------------------------------------------------------- where the model is of no use


@pytest.mark.parametrize(
    "useless",
    [
        pytest.param(lambda r: 0 * r, id="zero"),
        pytest.param(lambda r: np.eye(1, 12, 3)[0] * r[0] - np.eye(1, 12)[0] * r[3], id="orthogonal to r"),
    ],
)
def test_the_residual_takes_the_place_of_a_useless_direction(useless):
    A, b = definite()
    result = dcdm(A, b, useless, tol=1e-10, maxiter=60)
    plain = dcdm(A, b, own, tol=1e-10, maxiter=60)
    assert result.success
    assert result.fallbacks >= result.nit - 2  # what is orthogonal to r but for rounding may pass near the end
    np.testing.assert_allclose(result.x, plain.x, rtol=1e-8)


def test_a_direction_in_the_span_of_the_last_ones_is_replaced():
    A, b = definite()
    first = np.random.default_rng(1).normal(size=12)
    result = dcdm(A, b, lambda r: first, tol=1e-8, maxiter=300)
    assert result.success
    assert result.fallbacks >= result.nit // 3


def test_slow_progress_ends_in_conjugate_gradients():
    A, b = laplacian(16)
    random = np.random.default_rng(0)

    def noise(r):
        return random.normal(size=r.shape)

    result = dcdm(A, b, noise, patience=10, maxiter=200)
    plain = dcdm(A, b, own, maxiter=200)
    assert result.success
    assert result.directions == 10
    assert result.nit <= 10 + 1.5 * plain.nit
    assert result.fallbacks == result.nit - 10
    trusting = dcdm(A, b, noise, patience=None, maxiter=200)
    assert trusting.status == Status.LIMIT
    assert trusting.fallbacks == 0


def test_slow_conjugate_gradients_are_left_alone():
    A, b = laplacian(64)
    with_patience, without = (dcdm(A, b, own, patience=patience, maxiter=400) for patience in (1, None))
    assert with_patience.nit == without.nit
    assert with_patience.fallbacks == 0


def test_neumann_problems_need_a_right_hand_side_in_the_range():
    n = 30
    dense = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    dense[0, 0] = dense[-1, -1] = 1.0
    A, b = scipy.sparse.csr_array(dense), np.random.default_rng(0).normal(size=n)
    for direction in (own, lambda r: r + 1.0):  # the second is in the null space for a good part
        solved = dcdm(A, b - b.mean(), direction, tol=1e-8)
        assert solved.success
        assert np.isfinite(solved.x).all()
    unsolvable = dcdm(A, b, own, tol=1e-8)
    assert not unsolvable.success
    assert unsolvable.residual <= 1.0
    broken = dcdm(A, np.ones(n), own)
    assert broken.status == Status.BREAKDOWN
    assert "mean" in broken.message
    assert not broken.x.any()


def test_indefinite_matrices_break_down_or_are_refused():
    A, b = definite()
    indefinite = A - 3 * np.eye(12)
    assert indefinite.diagonal().min() > 0
    result = dcdm(indefinite, b, own, tol=1e-10)
    assert result.status == Status.BREAKDOWN
    assert "not positive definite" in result.message
    with pytest.raises(NotPositiveDefiniteError, match="-A x = -b"):
        dcdm(-A, b, own)
    with pytest.raises(NotPositiveDefiniteError):
        dcdm(torch.from_numpy(-A).to_sparse(), torch.from_numpy(b), own)


def test_a_tolerance_beneath_rounding_stalls():
    n = 40
    A, b = scipy.linalg.hilbert(n) + 1e-6 * np.eye(n), np.random.default_rng(0).normal(size=n)
    result = dcdm(A, b, own, tol=1e-14, maxiter=3000)
    assert result.status == Status.STALLED, result.message
    assert not result.success
    # What is told is b - A x itself, not the recurrence's residual, which is within the tolerance.
    assert 1e-14 < result.residual < 1e-9
    assert result.residual == pytest.approx(np.linalg.norm(b - A @ result.x) / np.linalg.norm(b), rel=1e-3)


def test_a_run_at_its_limit_tells_the_residual_itself():
    n = 40
    A, b = scipy.linalg.hilbert(n) + 1e-6 * np.eye(n), np.random.default_rng(0).normal(size=n)
    by_recurrence = []
    result = dcdm(
        A,
        b,
        own,
        tol=1e-14,
        maxiter=60,
        callback=lambda intermediate_result: by_recurrence.append(intermediate_result.residual),
    )
    assert result.status == Status.LIMIT
    assert result.residual == pytest.approx(np.linalg.norm(b - A @ result.x) / np.linalg.norm(b), rel=1e-3)
    assert result.residual > 100 * min(by_recurrence)


def test_nan_from_the_model_or_the_operator_is_a_status():
    A, b = definite()
    for operator, model in (
        (A, lambda r: r * np.nan),
        (lambda v: v * np.nan, own),
        (lambda v: v * np.inf, own),
    ):
        result = dcdm(operator, b, model)
        assert result.status == Status.NON_FINITE
        assert np.isfinite(result.x).all()
    started = dcdm(lambda v: v * np.nan, b, own, x0=b)
    assert started.status == Status.NON_FINITE
    assert not started.x.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"A": np.ones((3, 4))}, ValueError, "square"),
        ({"A": np.eye(5)}, ValueError, r"A is \[5, 5\]"),
        ({"A": np.triu(np.ones((12, 12)))}, ValueError, "symmetric"),
        ({"A": scipy.sparse.csr_array(np.triu(np.ones((12, 12))))}, ValueError, "symmetric"),
        ({"A": torch.triu(torch.ones(12, 12)).to_sparse()}, ValueError, "symmetric"),
        ({"A": np.eye(12) * 1j}, TypeError, "real"),
        ({"A": torch.eye(12) * 1j}, TypeError, "real"),
        ({"A": np.eye(12) * np.nan}, ValueError, "finite"),
        ({"A": "matrix"}, TypeError, "LinearOperator"),
        ({"A": lambda v: v[:3]}, ValueError, "has shape"),
        ({"A": aslinearoperator(1j * np.eye(12))}, TypeError, "real"),
        ({"b": np.ones(12) * 1j}, TypeError, "b must be a real"),
        ({"b": torch.ones(12) * 1j}, TypeError, "b must be real"),
        ({"b": np.full(12, np.nan)}, ValueError, "b holds"),
        ({"b": np.ones(0), "A": own}, ValueError, "empty"),
        ({"x0": np.ones(3)}, ValueError, "x0 must have"),
        ({"x0": np.full(12, np.inf)}, ValueError, "x0 holds"),
        ({"direction": 3}, TypeError, "direction"),
        ({"direction": lambda r: r[:3]}, ValueError, "direction must return"),
        ({"callback": 3}, TypeError, "callback"),
        ({"memory": -1}, ValueError, "memory"),
        ({"patience": 0}, ValueError, "patience"),
        ({"tol": 1e-10, "b": np.ones(12, dtype=np.float32)}, ValueError, "tol"),
    ],
)
def test_what_cannot_be_solved_is_refused_by_name(change, error, words):
    A, b = definite()
    with pytest.raises(error, match=words):
        dcdm(**{"A": A, "b": b, "direction": own} | change)


# ---------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_the_slow_twin():
    A, _ = definite()
    random = np.random.default_rng(0)
    q, b = random.normal(size=(2, 5, 12))
    matrix = torch.from_numpy(A)
    forms = [matrix, matrix.to_sparse(), A, scipy.sparse.csr_array(A), lambda rows: rows @ matrix]
    for form in forms:
        found = DCDMLoss(form).double()(torch.from_numpy(q), torch.from_numpy(b))
        assert float(found) == pytest.approx(direction_loss(A, q, b), rel=1e-5)  # held in float32 until then


def test_the_loss_asks_for_the_inverse_up_to_a_factor():
    A, _ = definite()
    b = torch.randn(4, 12, dtype=F64, generator=torch.Generator().manual_seed(0))
    q = b @ torch.linalg.inv(torch.from_numpy(A)) * torch.tensor([[1.0], [-2.0], [1e5], [1e-5]])
    assert float(DCDMLoss(lambda rows: rows @ torch.from_numpy(A))(q, b)) < 1e-12


def test_the_losss_gradient():
    A, _ = definite(4)
    loss = DCDMLoss(scipy.sparse.csr_array(A)).double()
    q, b = torch.randn(2, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda rows: loss(rows, b), q.requires_grad_())


def test_a_direction_without_a_best_step_counts_the_right_hand_side():
    loss = DCDMLoss(torch.eye(3))
    q = torch.zeros(1, 3, requires_grad=True)
    found = loss(q, torch.tensor([[3.0, 4.0, 0.0]]))
    found.backward()
    assert found.item() == 25.0
    assert not grad_of(q).isnan().any()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: DCDMLoss(torch.eye(3))(torch.ones(2, 3), torch.ones(2, 4)), ValueError),
        (lambda: DCDMLoss(torch.eye(3))(torch.ones(3), torch.ones(3)), ValueError),
        (lambda: DCDMLoss(torch.eye(3))(torch.ones(2, 4), torch.ones(2, 4)), ValueError),
        (lambda: DCDMLoss(aslinearoperator(np.eye(3))), TypeError),
        (lambda: DCDMLoss(np.triu(np.ones((3, 3)))), ValueError),
        (lambda: DCDMLoss(-np.eye(3)), NotPositiveDefiniteError),
    ],
)
def test_what_the_loss_refuses(call, error):
    with pytest.raises(error, match="DCDMLoss"):
        call()


# ---------------------------------------------------------------------- Ritz vectors


def test_all_ritz_vectors_are_the_eigenvectors():
    A, _ = definite(20)
    found = ritz_vectors(A, 20)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(A), rtol=1e-9)
    np.testing.assert_allclose(found.vectors @ found.vectors.mT, np.eye(20), atol=1e-12)
    np.testing.assert_allclose(
        A @ found.vectors.numpy().T, found.vectors.numpy().T * found.values.numpy(), atol=1e-9
    )


def test_some_of_them_reach_both_ends_and_stay_orthonormal():
    A, _ = laplacian(20)
    found = ritz_vectors(A, 60, shape=(20, 20))
    assert found.vectors.shape == (60, 20, 20)
    rows = found.vectors.flatten(1)
    np.testing.assert_allclose(rows @ rows.mT, np.eye(60), atol=1e-12)
    projected = rows.numpy() @ (A @ rows.numpy().T)
    np.testing.assert_allclose(projected, np.diag(found.values.numpy()), atol=1e-10)
    exact = 4 - 2 * np.cos(np.pi * np.arange(1, 21) / 21)[:, None] - 2 * np.cos(np.pi * np.arange(1, 21) / 21)
    assert found.values[0] == pytest.approx(exact.min(), rel=1e-3)
    assert found.values[-1] == pytest.approx(exact.max(), rel=1e-3)


def test_equal_eigenvalues_and_null_spaces():
    values = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 3.0], dtype=F64)
    found = ritz_vectors(torch.diag(values), 6)
    np.testing.assert_allclose(found.values, [1, 1, 1, 3], rtol=1e-12)
    problem = Poisson(obstacles((10, 10), 2, 0))
    assert len(ritz_vectors(problem.matrix, 100).values) == problem.fluid.sum() < 100


def test_right_hand_sides_weigh_the_low_end():
    A, _ = laplacian(10)
    found = ritz_vectors(A, 100, shape=(10, 10))
    rows = found.right_hand_sides(2000, seed=3)
    assert rows.shape == (2000, 10, 10)
    np.testing.assert_allclose(rows.flatten(1).norm(dim=1), 1.0, rtol=1e-12)
    spread = (rows.flatten(1) @ found.vectors.flatten(1).mT).square().mean(0).sqrt()
    assert float(spread[:55].mean() / spread[55:].mean()) == pytest.approx(9.0, rel=0.05)
    assert torch.equal(rows, found.right_hand_sides(2000, seed=3))
    assert not torch.equal(rows, found.right_hand_sides(2000, seed=4))


def test_functions_and_seeds():
    A, _ = definite()
    matrix = torch.from_numpy(A)
    given = ritz_vectors(lambda v: (matrix @ v.reshape(12)).reshape(3, 4), 5, shape=(3, 4), seed=1)
    assert torch.equal(given.values, ritz_vectors(lambda v: matrix @ v, 5, shape=(12,), seed=1).values)
    np.testing.assert_allclose(given.values, ritz_vectors(A, 5, seed=1).values, rtol=1e-10)
    assert not torch.equal(given.values, ritz_vectors(A, 5, seed=2).values)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ritz_vectors(np.eye(3), 4), ValueError, "count"),
        (lambda: ritz_vectors(np.eye(3), 0), ValueError, "count"),
        (lambda: ritz_vectors(own, 2), ValueError, "shape"),
        (lambda: ritz_vectors(np.eye(3), 2, shape=(2, 2)), ValueError, r"A is \[3, 3\]"),
        (lambda: ritz_vectors(np.zeros((3, 3)), 2), ValueError, "not 0"),
        (lambda: ritz_vectors(lambda v: v * np.nan, 2, shape=(3,)), ValueError, "finite"),
        (lambda: ritz_vectors(np.array([[1.0, 2.0], [2.0, 1.0]]), 2), NotPositiveDefiniteError, "Ritz value"),
        (lambda: ritz_vectors(np.eye(3), 2).right_hand_sides(0), ValueError, "count"),
        (lambda: ritz_vectors(np.eye(3), 2).right_hand_sides(1, weight=0), ValueError, "weight"),
        (lambda: ritz_vectors(np.eye(3), 2).right_hand_sides(1, low=2), ValueError, "low"),
    ],
)
def test_what_ritz_vectors_refuse(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 3), (6, 5, 4)])
@pytest.mark.parametrize("levels", [1, 2])
def test_directions_have_the_residuals_shape(grid, levels):
    network = DirectionNetwork(len(grid), channels=3, levels=levels)
    assert network(torch.randn(grid)).shape == grid
    batch = torch.randn(2, 3, *grid)
    torch.testing.assert_close(network(batch)[1, 2], network(batch[1, 2]))


def test_the_published_network_has_as_many_weights():
    def weights(dimension):
        return sum(p.numel() for p in DirectionNetwork(dimension).parameters())

    filters = 16 * 16 * 27 + 16
    assert weights(3) == (16 * 27 + 16) + 12 * filters + 17
    assert weights(2) == (16 * 9 + 16) + 12 * (16 * 16 * 9 + 16) + 17


def test_the_network_refuses_what_is_no_grid():
    with pytest.raises(ValueError, match="dimension"):
        DirectionNetwork(1)
    with pytest.raises(ValueError, match="levels"):
        DirectionNetwork(2, levels=0)
    with pytest.raises(ValueError, match="DirectionNetwork"):
        DirectionNetwork(3)(torch.ones(4, 4))


def test_a_network_trained_for_seconds_beats_conjugate_gradients():
    problem = Poisson(np.zeros((6, 6), dtype=bool))
    torch.manual_seed(0)
    network, loss = DirectionNetwork(2, channels=8), DCDMLoss(problem.matrix)
    rows = ritz_vectors(problem.matrix, 36, shape=(6, 6)).right_hand_sides(512).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(200):
        batch = rows.roll(-32 * step, 0)[:32]
        optimizer.zero_grad()
        loss(network(batch), batch).backward()
        optimizer.step()
    before = copy.deepcopy(network.state_dict())
    b = problem.random_right_hand_side(0)
    learned, plain = dcdm(problem.matrix, b, network), dcdm(problem.matrix, b, own)
    assert learned.success
    assert learned.nit < plain.nit
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


# ---------------------------------------------------------------------- the problem


@pytest.mark.parametrize("shape", [(7, 6), (5, 4, 3)])
def test_the_poisson_matrix_without_obstacles_is_the_kronecker_sum(shape):
    found = Poisson(np.zeros(shape, dtype=bool)).matrix.toarray()
    lines = [2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1) for n in shape]
    whole = 0
    for axis, line in enumerate(lines):
        factor = np.ones((1, 1))
        for other, n in enumerate(shape):
            factor = np.kron(factor, line if other == axis else np.eye(n))
        whole = whole + factor
    np.testing.assert_array_equal(found, whole)


def test_walls_let_nothing_through():
    solid = np.zeros((6, 6), dtype=bool)
    solid[2:4, 2:4] = True
    problem = Poisson(solid)
    A = problem.matrix.toarray()
    assert np.array_equal(A, A.T)
    assert not A[solid.ravel()].any()
    inner = A[np.ix_(problem.fluid.ravel(), problem.fluid.ravel())]
    assert np.array_equal(inner, problem.definite().toarray())
    assert np.linalg.eigvalsh(inner).min() > 0
    sums = A.sum(1).reshape(6, 6)
    assert (sums[1:-1, 1:-1] == 0).all()  # constants pass everywhere but at the rim
    enclosed = np.zeros((7, 7), dtype=bool)
    enclosed[2:5, 2:5] = True
    enclosed[3, 3] = False
    assert Poisson(enclosed).solid[3, 3]


# ---------------------------------------------------------------------- the training script


def test_the_training_script_writes_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    script = importlib.import_module("direction_network")
    before = torch.get_num_threads()
    path = tmp_path / "made" / "weights.pt"
    small = ["--layouts", "2", "--channels", "2", "--steps", "3", "--batch", "2"]
    try:
        script.main(["--grid", "8", "8", *small, "--out", str(path)])
    finally:
        torch.set_num_threads(before)
    assert "layout 1000:" in capsys.readouterr().out
    network = script.load(path)
    assert not network.training
    problem = script.layout((8, 8), 1003)
    assert problem.solid.any()
    direction = script.masked(network, problem)(problem.random_right_hand_side(0))
    assert not direction[problem.solid].any()
    again, _ = script.train([script.layout((8, 8), s) for s in range(2)], channels=2, steps=3, batch=2, lr=2e-3)
    for one, two in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
