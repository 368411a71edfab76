"""Sparse optimal transport against slow twins, closed forms and finite differences."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optex
from optex import ConvergenceWarning, NonFiniteError, OptEx, SemiDualSource, SparseOTLoss, sparse_ot
from optex.solvers import Status
from optex.solvers.transport.projection import dual, semi_dual, sparse_projection
from optex.studies.problems import SparseTransport, make_problem
from tests.references import transport as slow

FORMS = pytest.mark.parametrize("form", ["semi-dual", "dual"])


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


class TestProjection:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(0, 2), st.integers(1, 6))
    def test_is_the_best_of_all_supports(self, scores, mass, k):
        v, k = np.array(scores), min(k, len(scores))
        t = sparse_projection(torch.from_numpy(v), torch.tensor(mass, dtype=torch.float64), k)[0].numpy()
        exact = slow.sparse_projection(v, mass, k)
        assert (t >= 0).all()
        assert (t > 0).sum() <= k
        assert t.sum() == pytest.approx(mass, abs=1e-12)
        assert ((t - v) ** 2).sum() == pytest.approx(((exact - v) ** 2).sum(), abs=1e-9)

    def test_of_equal_scores_the_first_are_kept(self):
        scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 1.0]).double()
        t, threshold = sparse_projection(scores, torch.tensor(0.6).double(), 3)
        torch.testing.assert_close(t, torch.tensor([0, 0.2, 0.2, 0.2, 0, 0]).double())
        assert float(threshold) == pytest.approx(1.8)

    def test_ties_are_the_same_in_any_batch(self):
        scores = torch.randint(0, 3, (40, 7), generator=torch.Generator().manual_seed(0)).double()
        mass = torch.ones(40).double()
        together = sparse_projection(scores, mass, 3)[0]
        alone = torch.stack([sparse_projection(row, one, 3)[0] for row, one in zip(scores, mass, strict=True)])
        assert torch.equal(together, alone)
        traced = torch.vmap(lambda row, one: sparse_projection(row, one, 3, traced=True)[0])(scores, mass)
        assert torch.equal(together, traced)

    def test_far_from_zero_masses_still_add_up(self):
        scores = torch.linspace(0, 3, 50).double() + 1e8
        t = sparse_projection(scores, torch.tensor(0.05, dtype=torch.float64), 9)[0]
        assert float(t.sum()) == pytest.approx(0.05, abs=1e-14)

    def test_no_mass_is_no_plan(self):
        t, threshold = sparse_projection(torch.tensor([1.0, 3.0]), torch.tensor(0.0), 1)
        assert torch.equal(t, torch.zeros(2))
        assert float(threshold) == 3.0


@pytest.mark.parametrize("k", [1, 3, 7])
def test_both_objectives_are_their_twins(k):
    a, b, C = slow.problem(7, 5)
    random = np.random.default_rng(1)
    alpha, beta = random.standard_normal(7), random.standard_normal(5)
    rows, columns, costs = tensors(a, b, C.T)
    value, gradient, plan = slow.semi_dual(alpha, a, b, C, 0.3, k)
    found = semi_dual(torch.from_numpy(alpha), rows, columns, costs, 0.3, k)
    assert float(found.value) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(found.plan.T, plan, atol=1e-12)
    np.testing.assert_allclose(a - found.plan.sum(0).numpy(), gradient, atol=1e-12)
    value, plan = slow.dual(alpha, beta, a, b, C, 0.3, k)
    found = dual(torch.from_numpy(alpha), torch.from_numpy(beta), rows, columns, costs, 0.3, k)
    assert float(found.value) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(found.plan.T, plan, atol=1e-12)


def test_the_best_beta_of_the_dual_is_the_semi_duals():
    a, b, C = slow.problem(7, 5)
    alpha, rows, columns, costs = tensors(np.linspace(-1, 1, 7), a, b, C.T)
    one = semi_dual(alpha, rows, columns, costs, 0.3, 3)
    other = dual(alpha, one.beta, rows, columns, costs, 0.3, 3)
    assert float(other.value) == pytest.approx(float(one.value), rel=1e-12)
    torch.testing.assert_close(one.plan, other.plan)


class TestSolver:
    @FORMS
    def test_without_a_binding_k_it_is_quadratic_transport(self, form):
        a, b, C = slow.problem(8, 5)
        result = sparse_ot(a, b, C, 0.2, 8, form=form)
        assert result.success
        np.testing.assert_allclose(result.x, slow.quadratic(a, b, C, 0.2), atol=1e-9)
        assert result.row_error < 1e-8
        assert result.column_error < 1e-8
        assert abs(result.gap) < 1e-9
        assert result.value == pytest.approx(result.cost + 0.1 * (result.x**2).sum(), abs=1e-9)

    @FORMS
    def test_a_binding_k_is_told(self, form):
        a, b, C = slow.problem(40, 8, uniform=True)
        result = sparse_ot(a, b, C, 20.0, 6, form=form)
        assert result.status == Status.STALLED
        assert "k = 6 binds" in result.message
        assert (result.nonzeros <= 6).all()
        assert (result.nonzeros == (result.x > 0).sum(0)).all()
        assert result.row_error == pytest.approx(np.abs(result.x.sum(1) - a).sum())
        assert result.row_error > 0.01
        if form == "semi-dual":
            np.testing.assert_allclose(result.x.sum(0), b, atol=1e-14)

    def test_the_value_falls_as_k_grows(self):
        a, b, C = slow.problem(30, 6, uniform=True)
        values = [sparse_ot(a, b, C, 1.0, k).value for k in (5, 6, 8, 12, 20, 30)]
        assert all(later <= value + 1e-12 for value, later in itertools.pairwise(values))

    def test_two_points_in_closed_form(self):
        # T = [[t, ½ - t], [½ - t, t]] with costs 0 and 1: γ/2 ‖T‖² + 1 - 2t is least at t = ¼ + 1 / (2 γ).
        C = np.array([[0.0, 1.0], [1.0, 0.0]])
        half = np.array([0.5, 0.5])
        for gamma in (0.5, 2.0, 10.0):
            t = min(0.5, 0.25 + 1 / (2 * gamma))
            result = sparse_ot(half, half, C, gamma, 2)
            np.testing.assert_allclose(result.x, [[t, 0.5 - t], [0.5 - t, t]], atol=1e-9)

    @FORMS
    def test_targets_and_sources_without_mass(self, form):
        a, b, C = slow.problem(6, 4)
        a[2], b[1] = 0.0, 0.0
        result = sparse_ot(a / a.sum(), b / b.sum(), C, 0.5, 6, form=form)
        assert result.success
        assert np.isfinite(result.x).all()
        assert not result.x[2].any()
        assert not result.x[:, 1].any()

    def test_all_costs_equal_is_the_product_of_the_masses(self):
        a, b, C = slow.problem(6, 4)
        for level in (0.0, 3.0):
            result = sparse_ot(a, b, np.full_like(C, level), 0.5, 6)
            exact = slow.quadratic(a, b, np.full_like(C, level), 0.5)
            np.testing.assert_allclose(result.x, exact, atol=1e-9)

    def test_equal_costs_choose_the_first_rows(self):
        third = np.full(3, 1 / 3)
        result = sparse_ot(np.full(6, 1 / 6), third, np.zeros((6, 3)), 1.0, 2, maxiter=1)
        assert (result.x.argmax(0) == 0).all()
        assert not result.x[2:].any()

    def test_units_of_the_costs_do_not_matter(self):
        a, b, C = slow.problem(8, 5)
        plans = [sparse_ot(a, b, scale * C, scale * 0.2, 8) for scale in (1e-12, 1.0, 1e12)]
        assert all(found.success for found in plans)
        for found in plans:
            np.testing.assert_allclose(found.x, plans[1].x, atol=1e-9)

    def test_a_batch_is_its_problems(self):
        a, b, C = slow.problem(6, 4)
        costs = np.stack([[C, C[::-1]], [C[:, ::-1], 2 * C], [C**2, C + 1]])
        result = sparse_ot(a, b, costs, 0.5, 5)
        assert result.x.shape == (3, 2, 6, 4)
        assert result.alpha.shape == (3, 2, 6)
        assert result.beta.shape == (3, 2, 4)
        assert result.nonzeros.shape == (3, 2, 4)
        assert result.value.shape == result.statuses.shape == (3, 2)
        alone = sparse_ot(a, b, costs[2, 1], 0.5, 5)
        assert np.array_equal(result.x[2, 1], alone.x)
        assert result.value[2, 1] == alone.value

    def test_masses_may_be_of_each_problem(self):
        a, b, C = slow.problem(6, 4)
        uniform = np.full(6, 1 / 6)
        result = sparse_ot(np.stack([a, uniform]), b, np.stack([C, C]), 0.5, 6)
        np.testing.assert_allclose(result.x.sum(-1), [a, uniform], atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_answers_are_of_the_costs_kind(self, dtype):
        a, b, C = slow.problem(6, 4)
        found = sparse_ot(a, torch.from_numpy(b), torch.from_numpy(C).to(dtype), 0.5, 6)
        assert found.x.dtype == found.alpha.dtype == found.value.dtype == dtype
        assert found.nonzeros.dtype == torch.int64
        found = sparse_ot(a, b, C.astype(np.float32), 0.5, 6)
        assert found.x.dtype == found.value.dtype == np.float32
        found = sparse_ot([0.5, 0.5], [1.0], [[0], [1]], 0.5, 2)
        assert found.x.dtype == np.float64

    def test_starting_at_the_end_takes_no_step(self):
        a, b, C = slow.problem(8, 5)
        first = sparse_ot(a, b, C, 0.2, 8)
        again = sparse_ot(a, b, C, 0.2, 8, alpha0=first.alpha)
        assert again.nit == 0
        np.testing.assert_allclose(again.x, first.x, atol=1e-12)

    def test_a_loose_tolerance_is_cheaper(self):
        a, b, C = slow.problem(40, 8, uniform=True)
        assert sparse_ot(a, b, C, 20.0, 6, tol=1e-3).nfev < sparse_ot(a, b, C, 20.0, 6).nfev


A, B, COSTS = slow.problem(6, 3)
REFUSED = {
    "negative mass": ({"a": [-0.1, 0.3, 0.2, 0.2, 0.2, 0.2]}, "a must not be negative, got -0.1"),
    "NaN mass": ({"b": [np.nan, 0.5, 0.5]}, "b must not be negative"),
    "masses not of 1": ({"a": np.full(6, 0.2)}, "a must add up to 1, is off by 0.2"),
    "shape of a": ({"a": np.full(5, 0.2)}, r"a must be \[6, 3\]|a must be \[6\]"),
    "batch of masses": ({"a": np.full((2, 6), 1 / 6)}, "a must be"),
    "infinite cost": ({"C": np.where(COSTS > 0.5, np.inf, COSTS)}, "C must be finite"),
    "cost of one dimension": ({"C": COSTS[0]}, r"C must be \[..., m, n\]"),
    "no costs": ({"C": np.zeros((0, 3))}, r"C must be \[..., m, n\]"),
    "gamma": ({"gamma": 0.0}, "gamma must be a finite number above 0"),
    "negative gamma": ({"gamma": -1.0}, "gamma must be a finite number above 0"),
    "overflow": ({"C": COSTS * 1e300, "gamma": 1e-300}, "C / gamma overflows"),
    "k of nothing": ({"k": 0}, "k must be between 1 and 6, got 0"),
    "k past m": ({"k": 7}, "k must be between 1 and 6, got 7"),
    "no number": ({"k": 2.5}, "k must be between 1 and 6"),
    "k that cannot serve": ({"k": 1}, "k = 1 nonzeros in each of 3 columns cannot serve 6 rows .* at least 2"),
    "form": ({"form": "primal"}, "form must be 'semi-dual' or 'dual', got 'primal'"),
    "start": ({"alpha0": np.zeros(5)}, r"alpha0 must be finite and \[6\]"),
    "infinite start": ({"alpha0": np.full(6, np.inf)}, "alpha0 must be finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_solved_is_refused_by_name(name):
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        sparse_ot(**{"a": A, "b": B, "C": COSTS, "gamma": 1.0, "k": 4} | change)


@pytest.mark.parametrize("C", [COSTS + 0j, "costs"])
def test_what_is_no_number_is_refused(C):
    with pytest.raises(TypeError, match="C must be"):
        sparse_ot(A, B, C, 1.0, 4)


def test_a_target_without_mass_serves_nobody():
    with pytest.raises(ValueError, match="in each of 2 columns cannot serve 6 rows"):
        sparse_ot(A, [0.5, 0.5, 0.0], COSTS, 1.0, 2)


class TestLoss:
    @FORMS
    def test_its_gradients_are_those_of_finite_differences(self, form):
        a, b, C = slow.problem(6, 4)
        costs = torch.from_numpy(np.stack([C, C[::-1].copy()])).requires_grad_()
        # Masses stay on the simplex whatever the logits are.
        logits = [torch.from_numpy(np.log(mass)).requires_grad_() for mass in (a, b)]
        loss = SparseOTLoss(0.5, 6, form=form, reduction="sum")
        assert torch.autograd.gradcheck(
            lambda C, u, v: loss(C, u.softmax(0), v.softmax(0)),
            (costs, *logits),
            eps=1e-6,
            atol=1e-7,
            fast_mode=True,
        )

    def test_the_gradient_is_the_plan(self):
        a, b, C = slow.problem(6, 4)
        costs = torch.from_numpy(C).requires_grad_()
        SparseOTLoss(0.5, 6)(costs, *tensors(a, b)).backward()
        assert costs.grad is not None
        assert torch.equal(costs.grad, torch.from_numpy(sparse_ot(a, b, C, 0.5, 6).x))

    def test_reductions(self):
        costs = torch.from_numpy(np.stack([COSTS, 2 * COSTS]))
        values = SparseOTLoss(1.0, 6, reduction="none")(costs)
        assert values.shape == (2,)
        assert SparseOTLoss(1.0, 6)(costs) == values.mean()
        assert SparseOTLoss(1.0, 6, reduction="sum")(costs) == values.sum()
        assert SparseOTLoss(1.0, 6)(costs[0]) == values[0]

    def test_it_trains(self):
        y = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]])
        x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss, base = SparseOTLoss(0.1, 5, tol=1e-6), torch.optim.Adam([x], lr=0.1)
        values = []
        for _ in range(60):
            base.zero_grad()
            value = loss(torch.cdist(x, y).square())
            values.append(value.item())
            value.backward()
            base.step()
        assert values[-1] < 0.1 * values[0]
        assert x.grad is not None
        assert x.grad.dtype == torch.float32

    def test_a_binding_k_warns(self):
        _, _, C = slow.problem(40, 8)
        with pytest.warns(ConvergenceWarning, match="SparseOTLoss: .* k = 6 binds"):
            SparseOTLoss(20.0, 6)(torch.from_numpy(C))

    def test_it_is_not_differentiated_twice(self):
        costs = torch.from_numpy(COSTS).requires_grad_()
        (plan,) = torch.autograd.grad(SparseOTLoss(1.0, 6)(costs), costs, create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            plan.square().sum().backward()

    def test_it_can_be_sent_and_tells_itself(self):
        loss = pickle.loads(pickle.dumps(SparseOTLoss(1.0, 4)))
        assert repr(loss) == "SparseOTLoss(gamma=1, k=4, form='semi-dual')"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gamma": 0}, "SparseOTLoss: gamma must"),
            ({"k": 0}, "SparseOTLoss: k must"),
            ({"form": "x"}, "SparseOTLoss: form must"),
            ({"tol": 2.0}, "SparseOTLoss: tol must"),
            ({"maxiter": 0}, "SparseOTLoss: maxiter must"),
            ({"reduction": "x"}, "SparseOTLoss: reduction must"),
        ],
    )
    def test_arguments_are_refused_by_name(self, change, message):
        with pytest.raises(ValueError, match=message):
            SparseOTLoss(**{"gamma": 1.0, "k": 4} | change)

    def test_what_is_no_tensor_is_refused(self):
        with pytest.raises(TypeError, match="SparseOTLoss: C must be a floating-point tensor"):
            SparseOTLoss(1.0, 4)(COSTS)
        with pytest.raises(TypeError, match="SparseOTLoss: b must be a floating-point tensor"):
            SparseOTLoss(1.0, 4)(torch.from_numpy(COSTS), None, torch.ones(3, dtype=torch.int64))


def gradient_of(alpha):
    assert alpha.grad is not None
    return alpha.grad


class TestSource:
    def made(self, dtype=torch.float64, **options):
        alpha = torch.nn.Parameter(torch.linspace(-0.1, 0.1, 6, dtype=dtype))
        return alpha, SemiDualSource(alpha, A, B, COSTS, **{"gamma": 0.5, "k": 4} | options)

    def test_its_loss_is_minus_the_semi_dual(self):
        alpha, source = self.made()
        loss, noise = source.gradient(None)
        assert noise is not None
        value, gradient, plan = slow.semi_dual(alpha.detach().numpy(), A, B, COSTS, 0.5, 4)
        assert float(loss) == pytest.approx(-value)
        assert float(noise) == 0.0
        np.testing.assert_allclose(gradient_of(alpha).numpy(), -gradient, atol=1e-14)
        np.testing.assert_allclose(source.plan(), plan, atol=1e-14)

    def test_the_noise_is_that_of_all_batches(self):
        alpha, source = self.made(sampled=True)
        whole, exact = self.made()
        exact.gradient(None)
        errors, noises, losses = [], [], []
        for pair in itertools.combinations(range(3), 2):
            loss, noise = source.gradient(torch.tensor(pair))
            errors.append((gradient_of(alpha) - gradient_of(whole)).square().mean())
            noises.append(noise)
            losses.append(loss)
        assert float(torch.stack(noises).mean()) == pytest.approx(float(torch.stack(errors).mean()))
        assert float(torch.stack(losses).mean()) == pytest.approx(float(exact.gradient(None)[0]))
        assert source.gradient(torch.tensor([1]))[1] is None
        _, noise = source.gradient(torch.arange(3))
        assert noise is not None
        assert float(noise) == pytest.approx(0.0, abs=1e-15)

    def test_an_epoch_is_every_column_once(self):
        _, source = self.made(sampled=True)
        drawn = list(itertools.islice(source.batches(1, seed=3), 6))
        assert sorted(torch.cat(drawn[:3]).tolist()) == [0, 1, 2]
        again = list(itertools.islice(source.batches(1, seed=3), 6))
        assert all(torch.equal(one, two) for one, two in zip(drawn, again, strict=True))

    def test_float32_works(self):
        alpha, source = self.made(torch.float32)
        loss, _ = source.gradient(None)
        assert loss.dtype == gradient_of(alpha).dtype == torch.float32

    def test_it_ends_where_the_solver_does(self):
        alpha, source = self.made(k=6)
        optimizer = OptEx(torch.optim.SGD([alpha], lr=0.2), parallelism=4)
        for _ in itertools.islice(optimizer.rounds(itertools.repeat(None), source), 40):
            pass
        result = sparse_ot(A, B, COSTS, 0.5, 6)
        np.testing.assert_allclose(source.plan(), result.x, atol=1e-6)

    def test_what_cannot_work_is_refused(self):
        with pytest.raises(TypeError, match="SemiDualSource: alpha must be"):
            SemiDualSource(np.zeros(6), A, B, COSTS, 1.0, 4)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"SemiDualSource: alpha must be \[6\], got \[5\]"):
            SemiDualSource(torch.zeros(5), A, B, COSTS, 1.0, 4)
        with pytest.raises(ValueError, match="SemiDualSource: C must be one problem"):
            SemiDualSource(torch.zeros(6), A, B, COSTS[None], 1.0, 4)
        with pytest.raises(ValueError, match="SemiDualSource: gamma"):
            self.made(gamma=0)
        alpha, source = self.made(sampled=True)
        for batch in (None, [0, 1], torch.tensor([0.5]), torch.tensor([], dtype=torch.int64)):
            with pytest.raises(TypeError, match="SemiDualSource: with sampled=True a batch is an int64 tensor"):
                source.gradient(batch)
        with pytest.raises(ValueError, match="SemiDualSource: a batch has different columns"):
            source.gradient(torch.tensor([1, 1]))
        for columns in ([0, 3], [-1, 2]):
            with pytest.raises(ValueError, match="SemiDualSource: a batch has columns from 0 to 2, got"):
                source.gradient(torch.tensor(columns))
        with pytest.raises(ValueError, match="SemiDualSource: size must be between 1 and 3"):
            source.batches(4)
        with torch.no_grad():
            alpha[0] = torch.nan
        with pytest.raises(NonFiniteError, match="SemiDualSource: the potential alpha is not finite"):
            source.gradient(torch.tensor([1]))


class TestProblem:
    def test_columns_are_sampled(self):
        problem = make_problem("sparse-transport", sources=12, targets=6, columns=2)
        assert not problem.deterministic
        whole = sum(problem(batch).item() for batch in itertools.islice(problem.batches(), 3)) / 3
        assert whole == pytest.approx(problem.evaluate())

    def test_its_minimum_is_known_where_k_does_not_bind(self):
        assert make_problem("sparse-transport", sources=12, targets=6).minimum is not None
        assert make_problem("sparse-transport", sources=30, targets=6, k=6, gamma=20.0).minimum is None

    def test_source_and_objective_agree(self):
        problem = make_problem("sparse-transport", sources=12, targets=6, k=4)
        assert isinstance(problem, SparseTransport)
        loss, _ = problem.source().gradient(None)
        found, problem.alpha.grad = problem.alpha.grad, None
        problem(None).backward()
        assert float(loss) == pytest.approx(problem.evaluate())
        torch.testing.assert_close(found, gradient_of(problem.alpha))


def test_it_is_at_the_front_door():
    assert {"SemiDualSource", "SparseOTLoss", "sparse_ot"} <= set(optex.__all__)
