"""SOR, SSOR-PCG, the best ω, and the tuner."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optex
from optex import NotPositiveDefiniteError
from optex.solvers import BanditTuner, Status, optimal_omega, sor, ssor_pcg
from optex.solvers.relaxation.chebcb import ChebCB
from optex.solvers.relaxation.system import DenseMatrix, DeviceMatrix, SparseMatrix
from optex.solvers.relaxation.tsallis import TsallisINF
from tests.models import assert_equal_trees
from tests.references.relaxation import (
    ChebTwin,
    TsallisTwin,
    laplacian,
    pcg_iterates,
    sor_iterates,
)

BOTH = pytest.mark.parametrize("solve", [sor, ssor_pcg])


def system(side=6, shift=0.2, seed=0):
    A = laplacian(side) + shift * np.eye(side**2)
    x = np.random.default_rng(seed).normal(size=side**2)
    return A, A @ x, x


FORMS = {
    "array": np.array,
    "list": np.ndarray.tolist,
    "csr": scipy.sparse.csr_array,
    "csc matrix": scipy.sparse.csc_matrix,
    "coo": scipy.sparse.coo_array,
    "tensor": torch.tensor,
    "sparse coo tensor": lambda A: torch.tensor(A).to_sparse_coo(),
    "sparse csr tensor": lambda A: torch.tensor(A).to_sparse_csr(),
    "sparse csc tensor": lambda A: torch.tensor(A).to_sparse_csc(),
}


# ---------------------------------------------------------------------- solvers


@pytest.mark.parametrize("omega", [0.3, 1.0, 1.5, 1.9])
def test_sor_is_youngs_sweep(omega):
    A, b, _ = system()
    found = [np.zeros(len(b))]
    sor(A, b, omega, tol=1e-14, maxiter=30, callback=lambda now: found.append(now.x))
    expected = sor_iterates(A, b, omega, len(found) - 1)
    assert len(found) > 20
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("omega", [0.5, 1.0, 1.7])
def test_pcg_is_the_least_error_over_krylovs_space(omega):
    A, b, _ = system()
    found = [np.zeros(len(b))]
    ssor_pcg(A, b, omega, tol=1e-12, maxiter=8, callback=lambda now: found.append(now.x))
    np.testing.assert_allclose(found, pcg_iterates(A, b, omega, 8), rtol=1e-8, atol=1e-9)


@BOTH
@pytest.mark.filterwarnings("ignore:Sparse CS")  # torch's, that they are in beta
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_one_answer(solve, form):
    A, b, x = system()
    right = torch.tensor(b) if "tensor" in form else b
    result = solve(FORMS[form](A), right, 1.4, tol=1e-10)
    assert result.success
    assert type(result.x) is type(right)
    np.testing.assert_allclose(np.asarray(result.x), x, rtol=1e-7)
    reference = solve(A, b, 1.4, tol=1e-10)
    assert result.nit == reference.nit
    assert result.residual_norm <= 1e-10 * np.linalg.norm(b) * 1.01


@BOTH
def test_large_sparse_is_as_small_dense(solve):
    A, b, x = system(side=12)  # past the size up to which a sparse matrix is made dense
    sparse, dense = solve(scipy.sparse.coo_array(A), b, 1.5), solve(A, b, 1.5)
    assert sparse.nit == dense.nit
    np.testing.assert_allclose(sparse.x, dense.x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sparse.x, x, rtol=1e-5, atol=1e-6)


def test_matrices_agree_with_each_other():
    A, b, _ = system(side=3)
    A[0, 5] = 0.25  # no symmetry
    pair = np.repeat([[0], [1]], 2, axis=1)
    twice = scipy.sparse.coo_array((np.ones(2), (pair[0], pair[0])), shape=A.shape)  # entries given twice
    kinds = [DenseMatrix(A), SparseMatrix(scipy.sparse.csr_array(A)), DeviceMatrix(torch.tensor(A))]
    assert SparseMatrix(twice).diagonal[0] == 2
    for matrix in kinds:
        right = torch.tensor(b) if isinstance(matrix, DeviceMatrix) else b
        lower = np.tril(A, -1) + np.diag(np.diag(A)) / 1.3
        triangle = matrix.triangle(1.3)
        np.testing.assert_allclose(triangle.solve(right), np.linalg.solve(lower, b), rtol=1e-12)
        np.testing.assert_allclose(triangle.solve_transposed(right), np.linalg.solve(lower.T, b), rtol=1e-12)
        np.testing.assert_allclose(matrix.product(right), A @ b, rtol=1e-12)
        np.testing.assert_allclose(matrix.norm(right), np.linalg.norm(b), rtol=1e-12)
        np.testing.assert_allclose(matrix.diagonal, np.diag(A))
        np.testing.assert_allclose(matrix.asymmetry(), (0.25, 4.2))
        assert matrix.finite()


@BOTH
def test_tensors_on_an_accelerator_go_the_same_way(solve, monkeypatch):
    A, b, x = system()
    monkeypatch.setattr(
        "optex.solvers.relaxation.system.DenseMatrix", lambda array: DeviceMatrix(torch.tensor(array))
    )
    given_b = torch.tensor(b)
    monkeypatch.setattr(
        "optex.solvers.relaxation.system._vector",
        lambda owner, name, value, *rest: torch.as_tensor(value).clone(),
    )
    result = solve(torch.tensor(A), given_b, 1.4)
    assert result.success
    assert isinstance(result.x, torch.Tensor)
    np.testing.assert_allclose(result.x, x, rtol=1e-5, atol=1e-6)


@BOTH
def test_float32_stays_float32(solve):
    A, b, x = system()
    result = solve(torch.tensor(A, dtype=torch.float32), torch.tensor(b, dtype=torch.float32), 1.4, tol=1e-5)
    assert result.success
    assert result.x.dtype == torch.float32
    np.testing.assert_allclose(result.x, x, rtol=1e-3, atol=1e-3)


@BOTH
def test_a_tolerance_beneath_the_precision_is_refused(solve):
    A, b, _ = system()
    with pytest.raises(ValueError, match=r"torch\.float32 resolves"):
        solve(A.astype(np.float32), b.astype(np.float32), 1.4)


@BOTH
def test_precisions_that_differ_and_integers_are_solved_in_double(solve):
    A, b, _ = system()
    assert solve(A.astype(np.float32), b, 1.4).x.dtype == np.float64
    assert solve(np.eye(3, dtype=int), [1, 2, 3], 1.0).x.tolist() == [1.0, 2.0, 3.0]


@BOTH
def test_zero_is_answered_at_once(solve):
    A, b, _ = system()
    result = solve(A, 0 * b, 1.4, x0=b)
    assert (result.success, result.nit, result.residual_norm) == (True, 0, 0.0)
    assert not result.x.any()
    assert "zero" in result.message


@BOTH
def test_a_solution_to_start_from_is_returned(solve):
    A, b, x = system()
    result = solve(A, b, 1.4, x0=x)
    assert (result.success, result.nit) == (True, 0)
    assert np.array_equal(result.x, x)
    assert result.x is not x
    warm = solve(A, b, 1.4, x0=x + 1e-5)
    assert warm.nit < solve(A, b, 1.4).nit


@BOTH
def test_one_unknown(solve):
    assert solve([[2.0]], [3.0], 1.0).x.tolist() == [1.5]


@BOTH
def test_gradients_do_not_flow(solve):
    A, b, _ = system()
    result = solve(torch.tensor(A, requires_grad=True), torch.tensor(b, requires_grad=True), 1.4)
    assert result.success
    assert not result.x.requires_grad


@BOTH
def test_the_callback_stops(solve):
    A, b, _ = system()

    def raises(intermediate_result):
        raise StopIteration

    for callback, nit in ((lambda now: now.nit == 3, 3), (raises, 1)):
        result = solve(A, b, 1.4, callback=callback)
        assert (result.status, result.nit) == (Status.STOPPED, nit)
    assert solve(A, b, 1.4, callback=lambda now: None).success


@BOTH
def test_rounding_is_a_stall(solve):
    A = 2 * np.eye(40) - np.eye(40, k=1) - np.eye(40, k=-1)
    b = A @ np.sin(np.pi * np.arange(1, 41) / 41)  # a hundredth of what A's entries make of x
    result = solve(A, b, 1.85, tol=2.3e-16)
    assert result.status == Status.STALLED
    assert result.nit < 2000
    assert result.residual_norm <= 1e-12 * np.linalg.norm(b)
    assert result.residual_norm == pytest.approx(np.linalg.norm(b - A @ result.x), rel=0.1)


def test_divergence_is_a_breakdown_with_the_best_iterate():
    A = np.array([[1.0, 3.0], [3.0, 1.0]])
    result = sor(A, np.array([1.0, 0.0]), 1.5)
    assert result.status == Status.BREAKDOWN
    assert "does not converge" in result.message
    assert result.residual_norm == pytest.approx(min(result.residual_norms))
    assert np.isfinite(result.x).all()


def test_overflow_is_not_finite():
    A = np.array([[1.0, 1e200], [1e200, 1.0]])
    result = sor(A, np.array([1.0, 1.0]), 1.0)
    assert result.status == Status.NON_FINITE
    assert np.isfinite(result.x).all()
    result = sor(np.array([[1e-200, 1.0], [0.0, 1e-200]]), np.array([1.0, 1e200]), 1.0)
    assert result.status == Status.NON_FINITE
    assert np.isfinite(result.x).all()


def test_what_is_left_of_nothing_is_a_breakdown():
    A, b, _ = system()
    result = ssor_pcg(A, 1e-300 * b, 1.4)
    assert result.status == Status.BREAKDOWN
    assert sor(A, 1e-300 * b, 1.4).success


def test_sor_takes_matrices_without_symmetry():
    A = np.array([[4.0, 1.0, 0.0], [-2.0, 5.0, 1.0], [0.0, 3.0, 6.0]])
    np.testing.assert_allclose(sor(A, A @ np.ones(3), 1.0).x, 1.0, rtol=1e-7)


@pytest.mark.parametrize("omega", [0.0, 2.0, -1.0, 2.5, float("nan"), "1", True])
@BOTH
def test_omega_out_of_range(solve, omega):
    with pytest.raises(ValueError, match=r"omega must be a finite number above 0 and below 2"):
        solve(np.eye(2), np.ones(2), omega)


EYE, ONES, HOLLOW = np.eye(3), np.ones(3), np.diag([1.0, 0.0, 1.0])


@BOTH
@pytest.mark.parametrize(
    ("error", "match", "A", "b"),
    [
        (ValueError, "square matrix, got shape \\(2, 3\\)", np.ones((2, 3)), ONES),
        (ValueError, "square matrix, got shape \\(3,\\)", ONES, ONES),
        (ValueError, "zero on its diagonal, at row 1", HOLLOW, ONES),
        (ValueError, "zero on its diagonal, at row 1", scipy.sparse.csr_array(HOLLOW), ONES),
        (ValueError, "zero on its diagonal, at row 1", torch.tensor(HOLLOW).to_sparse(), ONES),
        (ValueError, "A holds numbers that are NaN", np.full((3, 3), np.inf), ONES),
        (
            ValueError,
            "A holds numbers that are NaN",
            scipy.sparse.diags_array(np.full(200, np.nan)),
            np.ones(200),
        ),
        (ValueError, "b must have shape \\(3,\\)", EYE, np.ones(2)),
        (ValueError, "b must have shape \\(3,\\)", EYE, np.ones((3, 1))),
        (ValueError, "b holds numbers that are NaN", EYE, np.full(3, np.nan)),
        (TypeError, "must be real, of float32 or float64, got complex128", 1j * EYE, ONES),
        (TypeError, "got float16", torch.eye(3, dtype=torch.float16), ONES),
        (TypeError, "got float16", torch.eye(3, dtype=torch.bfloat16), ONES),
        (TypeError, "a product alone has no diagonal", lambda x: x, ONES),
        (ValueError, "norm of b overflows", EYE, np.full(3, 1.7e308)),
    ],
)
def test_systems_that_are_refused(solve, error, match, A, b):
    with pytest.raises(error, match=match):
        solve(A, b, 1.0)


@BOTH
def test_callbacks_and_starts_that_are_refused(solve):
    with pytest.raises(TypeError, match="callback must be callable"):
        solve(EYE, ONES, 1.0, callback=3)
    with pytest.raises(ValueError, match="x0 must have shape"):
        solve(EYE, ONES, 1.0, x0=np.ones(2))


def test_matrices_that_are_not_positive_definite_are_refused():
    with pytest.raises(ValueError, match="must be symmetric, but entries of A - Aᵀ are as large as 2"):
        ssor_pcg(np.array([[2.0, 1.0], [-1.0, 2.0]]), np.ones(2))
    with pytest.raises(ValueError, match="must be symmetric"):
        ssor_pcg(scipy.sparse.csr_array(np.eye(200) + np.eye(200, k=1)), np.ones(200))
    with pytest.raises(NotPositiveDefiniteError, match="its diagonal has -1 at row 1"):
        ssor_pcg(np.diag([1.0, -1.0]), np.ones(2))
    with pytest.raises(NotPositiveDefiniteError, match="along a direction p"):
        ssor_pcg(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([1.0, -1.0]))
    with pytest.raises(NotPositiveDefiniteError, match="spectral radius 2"):
        optimal_omega(np.array([[1.0, 2.0], [2.0, 1.0]]))


@pytest.mark.parametrize("side", [5, 20])
def test_the_best_omega_in_closed_form(side):
    expected = 2 / (1 + np.sin(np.pi / (side + 1)))
    A = scipy.sparse.csr_array(laplacian(side))
    assert optimal_omega(A) == pytest.approx(expected, abs=1e-9)
    assert optimal_omega(torch.tensor(A.toarray()).to_sparse()) == pytest.approx(expected, abs=1e-9)
    b = np.random.default_rng(0).normal(size=side**2)
    counts = [sor(A, b, expected + step).nit for step in (-0.1, 0.0, 0.1)]
    assert min(counts) == counts[1]


def test_the_paper_omega():
    assert abs(optimal_omega(laplacian(10)) - 2 / (1 + np.sin(np.pi / 11))) < 1e-10


# ---------------------------------------------------------------------- tuner


def costs_of(context, grid):
    return 5 + 40 * (grid - 1 - 0.6 * context) ** 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.05, 1), st.none() | st.floats(0, 100)), max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_tsallis_probabilities_are_those_by_bisection(seen):
    learner, twin = TsallisINF(4), TsallisTwin(4)
    for action, chance, cost in seen:
        learner.learn(None, action, chance, cost)
        twin.seen.append((action, chance, cost))
    np.testing.assert_allclose(learner.probabilities(None), twin.probabilities(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("features", [1, 4])
def test_chebcb_walks_with_its_twin(features):
    random = np.random.default_rng(1)
    grid = np.linspace(1, 1.6, 4)
    learner, twin = ChebCB(4, (0.0, 1.0), features), ChebTwin(4, (0.0, 1.0), features)
    for step in range(80):
        context = random.uniform(-0.1, 1.1)
        chances = learner.probabilities(context)
        np.testing.assert_allclose(chances, twin.probabilities(context), rtol=1e-5, atol=1e-9)
        action = int(random.integers(4))
        cost = (
            None if step % 9 == 4 else float(costs_of(np.clip(context, 0, 1), grid)[action] + random.normal())
        )
        learner.learn(context, action, chances[action], cost)
        twin.observe(context, action, cost)


def play(tuner, count, contexts=None, unit=1.0):
    random = np.random.default_rng(5)
    chosen = []
    for _ in range(count):
        context = random.uniform(0, 1)
        value = tuner.suggest(context)
        tuner.observe(unit * float(costs_of(context, value) + random.uniform(0, 1)))
        chosen.append(value)
    return chosen


def make(method, seed: Any = 0, grid=(1.0, 1.2, 1.4, 1.6)):
    return BanditTuner(grid, method, contexts=(0.0, 1.0) if method == "chebcb" else None, features=4, seed=seed)


METHODS = pytest.mark.parametrize("method", ["tsallis-inf", "chebcb"])


@METHODS
@pytest.mark.parametrize("unit", [2.0**-40, 2.0**60])
def test_choices_do_not_depend_on_the_unit_of_costs(method, unit):
    assert play(make(method), 150) == play(make(method), 150, unit=unit)


def test_chebcb_learns_what_is_best_at_each_context():
    tuner = make("chebcb")
    play(tuner, 600)
    assert [tuner.best(c) for c in (0.0, 0.35, 0.65, 1.0)] == [1.0, 1.2, 1.4, 1.6]
    assert tuner.best(-3.0) == tuner.best(0.0)  # what lies outside counts as the end
    assert tuner.probabilities(0.35)[1] > 0.8


def test_tsallis_finds_the_best_fixed_value():
    tuner = make("tsallis-inf")
    chosen = play(tuner, 600)
    assert tuner.best() in (1.2, 1.4)
    assert np.mean([value in (1.2, 1.4) for value in chosen[300:]]) > 0.8


@METHODS
def test_failures_cost_as_the_worst_and_leave_the_scale(method):
    tuner = make(method)
    tuner.suggest(0.5)
    tuner.observe(failed=True)  # before anything is known of costs
    for _ in range(300):
        value = tuner.suggest(0.5)
        tuner.observe(10_000.0 if value == 1.6 else 3 + value, failed=value == 1.6)
    assert tuner.best(0.5) == 1.0
    state = tuner.state_dict()["learner"]
    assert state["worst"] < 5


@METHODS
def test_costs_that_are_all_zero_leave_probabilities(method):
    tuner = make(method)
    for _ in range(30):
        tuner.suggest(0.5)
        tuner.observe(0.0)
    assert np.isclose(sum(tuner.probabilities(0.5)), 1)


@METHODS
@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_a_saved_tuner_goes_on_as_it_would_have(method, pending, bits):
    whole = make(method, np.random.Generator(bits(3)))
    play(whole, 50)
    if pending:
        whole.suggest(0.4)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make(method, np.random.Generator(bits(9)))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for tuner in (whole, resumed):
        if pending:
            tuner.observe(7.0)
    assert play(whole, 50) == play(resumed, 50)


@METHODS
def test_states_that_are_refused_change_nothing(method):
    saved, tuner = make(method), make(method, 1)
    play(saved, 20)
    before = copy.deepcopy(tuner.state_dict())
    good = saved.state_dict()
    cases = [
        ("saved grid", make(method, grid=(1.0, 1.5)).state_dict()),
        ("saved method", make("chebcb" if method == "tsallis-inf" else "tsallis-inf").state_dict()),
        ("no entry 'learner'", {k: v for k, v in good.items() if k != "learner"}),
        ("no entry 'settings'", {}),
        ("saved pending", {**good, "pending": [99, 0.5, 0.5]}),
        ("saved pending", {**good, "pending": "later"}),
        ("saved pending", {**good, "pending": [0, 0.0, 0.5]}),
        (
            "saved generator",
            {
                **good,
                "generator": make(method, np.random.Generator(np.random.MT19937())).state_dict()["generator"],
            },
        ),
        ("saved time", {**good, "learner": {**good["learner"], "time": 0}}),
        ("saved worst", {**good, "learner": {**good["learner"], "worst": -1.0}}),
    ]
    for match, state in cases:
        with pytest.raises(ValueError, match=match):
            tuner.load_state_dict(state)
        assert_equal_trees(tuner.state_dict(), before)
    assert play(tuner, 20) == play(make(method, 1), 20)


def test_the_grid_comes_back_as_it_was_given():
    tuner = BanditTuner([1, 2, 8], seed=0)
    assert isinstance(tuner.suggest(), int)
    assert tuner.grid == [1, 2, 8]
    assert BanditTuner(np.linspace(0, 1, 3), seed=0).grid == [0.0, 0.5, 1.0]
    assert BanditTuner(torch.tensor([1.0, 2.0]), seed=0).grid == [1.0, 2.0]


def test_suggesting_and_observing_take_turns():
    tuner = make("tsallis-inf")
    with pytest.raises(RuntimeError, match="nothing was suggested; call suggest first"):
        tuner.observe(1.0)
    tuner.suggest()
    with pytest.raises(RuntimeError, match="not known yet; call observe, or forget"):
        tuner.suggest()
    tuner.forget()
    tuner.suggest()
    tuner.observe(1.0)
    with pytest.raises(RuntimeError, match="nothing was suggested"):
        tuner.observe(1.0)


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -0.1, None, True, "3"])
def test_costs_that_are_no_numbers_are_refused_and_the_suggestion_waits(cost):
    tuner = make("tsallis-inf")
    tuner.suggest()
    with pytest.raises(ValueError, match=r"cost must be a finite number of at least 0.*failed=True"):
        tuner.observe(cost)
    assert tuner.state_dict()["pending"] is not None
    tuner.observe(torch.tensor(2.0))
    assert tuner.state_dict()["pending"] is None


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("two values at least", {"grid": [1.0]}),
        ("two values at least", {"grid": []}),
        ("increase from value to value", {"grid": [1.0, 1.0]}),
        ("increase from value to value", {"grid": [2.0, 1.0]}),
        ("every value of grid must be a finite number", {"grid": [1.0, float("nan")]}),
        ("every value of grid must be a finite number", {"grid": ["a", "b"]}),
        ("method must be one of tsallis-inf, chebcb", {"method": "ucb"}),
        (r"contexts must be \(low, high\)", {"method": "chebcb"}),
        ("low below high", {"method": "chebcb", "contexts": (1.0, 1.0)}),
        ("contexts must be a finite number", {"method": "chebcb", "contexts": (0.0, float("inf"))}),
        ("features must be an integer", {"method": "chebcb", "contexts": (0.0, 1.0), "features": 0}),
        ("least must be a finite number", {"least": float("nan")}),
        ("seed must be an integer", {"seed": -1}),
    ],
)
def test_tuners_that_are_refused(match, arguments):
    with pytest.raises(ValueError, match=match):
        BanditTuner(**{"grid": [1.0, 2.0], **arguments})


def test_contexts_that_are_refused():
    tuner = make("chebcb")
    with pytest.raises(ValueError, match="needs the problem's context"):
        tuner.suggest()
    with pytest.raises(ValueError, match="context must be a finite number"):
        tuner.suggest(float("nan"))
    assert tuner.suggest(0.3) in tuner.grid


def test_choices_are_those_of_the_seed():
    assert play(make("tsallis-inf", 4), 40) == play(make("tsallis-inf", 4), 40)
    assert play(make("tsallis-inf", 4), 40) != play(make("tsallis-inf", 5), 40)


def test_without_a_seed_choices_are_those_of_torchs_generator():
    torch.manual_seed(0)
    first = play(make("tsallis-inf", None), 40)
    torch.manual_seed(0)
    assert first == play(make("tsallis-inf", None), 40)


def test_a_generator_is_drawn_from_as_its_seed_would_be():
    shared = np.random.default_rng(2)
    assert play(make("tsallis-inf", shared), 40) == play(make("tsallis-inf", 2), 40)


def test_a_tuner_brings_sor_near_its_best():
    random = np.random.default_rng(0)
    base, eye = laplacian(4), np.eye(16)
    tuner = BanditTuner(np.linspace(1, 1.8, 5), "chebcb", contexts=(-0.3, 1.0), features=3, least=1, seed=0)
    ratios = []
    for _ in range(150):
        c = random.uniform(-0.3, 1.0)
        A, b = base + c * eye, random.normal(size=16)
        taken = optex.sor(A, b, tuner.suggest(c)).nit
        tuner.observe(taken)
        ratios.append(taken / optex.sor(A, b, optimal_omega(A)).nit)
    assert np.mean(ratios[75:]) < 1.3
