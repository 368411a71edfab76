"""Consensus-based optimization: the source against closed forms, the swarm against its slow twin."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import optex
from optex.sources.consensus import Consensus
from tests.gradients import grad_of
from tests.references.consensus import Bowl, cbo_step, consensus, proximal_gradient, rippled, rippled_at

HESSIAN = torch.diag(torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64))


def parameter(*values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def bowl(**options):
    x = parameter(2.0, -1.0, 1.0)
    options = {"alpha": 4.0, "sigma": 0.3, "vectorized": True, **options}
    return x, optex.ConsensusSource(Bowl(HESSIAN), [x], **options)


class TestConsensus:
    def test_is_the_twins(self):
        generator = torch.Generator().manual_seed(0)
        points = torch.randn(9, 2, generator=generator, dtype=torch.float64)
        energies = torch.randn(9, generator=generator, dtype=torch.float64) * 3
        energies[2], energies[5] = math.nan, math.inf
        centre, weights, soft = consensus(points.tolist(), energies.tolist(), 1.7)
        found = Consensus.of(energies, 1.7, "test")
        assert found.weights.tolist() == pytest.approx(weights, rel=1e-12)
        assert found.mean(points).tolist() == pytest.approx(centre, rel=1e-12)
        assert float(found.soft_minimum) == pytest.approx(soft, rel=1e-12)
        assert found.effective_sample_size == pytest.approx(1 / sum(w * w for w in weights))

    @pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
    @pytest.mark.parametrize("alpha", [1e-9, 1.0, 1e15])
    def test_no_scale_overflows(self, offset, alpha):
        energies = torch.tensor([0.0, 1.0, 800.0, 5e4], dtype=torch.float64) + offset
        found = Consensus.of(energies, alpha, "test")
        assert float(found.weights.sum()) == pytest.approx(1)
        assert found.weights.argmax() == 0
        assert float(energies.min()) <= float(found.soft_minimum) <= float(energies.mean())

    def test_equal_energies_count_alike(self):
        found = Consensus.of(torch.full((7,), 3.0), 100.0, "test")
        assert found.effective_sample_size == pytest.approx(7)
        assert float(found.soft_minimum) == pytest.approx(3)

    def test_a_sample_without_weight_may_be_anywhere(self):
        found = Consensus.of(torch.tensor([0.0, math.nan]), 1.0, "test")
        rows = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
        assert found.mean(rows).tolist() == [1.0, 2.0]

    def test_nothing_to_agree_on_is_an_error(self):
        with pytest.raises(
            optex.NonFiniteError, match="test: the objective is NaN or infinite at all 3 samples"
        ):
            Consensus.of(torch.tensor([math.nan, math.inf, math.nan]), 1.0, "test")
        with pytest.raises(optex.NonFiniteError, match="minus infinity"):
            Consensus.of(torch.tensor([0.0, -math.inf]), 1.0, "test")


REFUSED_BY_THE_SOURCE = {
    "objective": (
        lambda x: optex.ConsensusSource(3, [x]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "objective must be callable, got int",
    ),
    "one tensor": (lambda x: optex.ConsensusSource(len, x), TypeError, r"pass \[tensor\]"),
    "integers": (
        lambda x: optex.ConsensusSource(len, [torch.arange(3)]),
        TypeError,
        "must be floating-point tensors, got a tensor of torch.int64",
    ),
    "strings": (
        lambda x: optex.ConsensusSource(len, ["x"]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "tensors, got str",
    ),
    "no parameters": (lambda x: optex.ConsensusSource(len, []), ValueError, "hold no number"),
    "one sample": (
        lambda x: optex.ConsensusSource(len, [x], samples=1),
        ValueError,
        "samples must be an integer of at least 2, got 1",
    ),
    "odd pairs": (
        lambda x: optex.ConsensusSource(len, [x], samples=5, antithetic=True),
        ValueError,
        "samples must be even",
    ),
    "alpha": (lambda x: optex.ConsensusSource(len, [x], alpha=0), ValueError, "alpha must be positive"),
    "sigma": (
        lambda x: optex.ConsensusSource(len, [x], sigma=math.nan),
        ValueError,
        "sigma must be positive and finite, got nan",
    ),
    "lost sigma": (
        lambda x: optex.ConsensusSource(lambda _: x.sum(), [x], sigma=1e-20).gradient(None),
        ValueError,
        "sigma = 1e-20 is lost in the rounding of parameters of torch.float64",
    ),
    "nowhere defined": (
        lambda x: optex.ConsensusSource(lambda _: x.sum() * math.nan, [x], samples=4).gradient(None),
        optex.NonFiniteError,
        "NaN or infinite at all 4 samples",
    ),
    "shape": (
        lambda x: optex.ConsensusSource(lambda p, _: p, [x], vectorized=True).gradient(None),
        ValueError,
        r"one number for each of 200 points, got shape \(200, 2\)",
    ),
    "kind": (
        lambda x: optex.ConsensusSource(lambda p, _: "no", [x], vectorized=True).gradient(None),
        TypeError,
        "must return one real number a point, got str",
    ),
    "complex": (
        lambda x: optex.ConsensusSource(lambda p, _: p[:, 0] * 1j, [x], vectorized=True).gradient(None),
        TypeError,
        "must return real numbers",
    ),
    "a loss that is no scalar": (
        lambda x: optex.ConsensusSource(lambda _: x * 2, [x]).gradient(None),
        ValueError,
        "the loss must be a scalar",
    ),
}


class TestSource:
    def test_is_the_twins_lock_step(self):
        x, source = bowl(samples=12)
        for seed in range(4):
            torch.manual_seed(seed)
            loss, _ = source.gradient(None)
            torch.manual_seed(seed)
            points = x.detach() + 0.3 * torch.randn(12, 3, dtype=torch.float64)
            energies = Bowl(HESSIAN)(points)
            centre, weights, soft = consensus(points.tolist(), energies.tolist(), 4.0)
            expected = (x.detach() - torch.tensor(centre, dtype=torch.float64)) / (4.0 * 0.3**2)
            torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)
            assert float(loss) == pytest.approx(soft, rel=1e-12)
            assert source.effective_sample_size == pytest.approx(1 / sum(w * w for w in weights))

    @pytest.mark.parametrize("antithetic", [False, True])
    def test_many_samples_are_the_proximal_gradient(self, antithetic):
        x, source = bowl(samples=400_000, alpha=2.0, sigma=0.5, antithetic=antithetic)
        torch.manual_seed(0)
        source.gradient(None)
        exact = proximal_gradient(HESSIAN, x.detach(), source.hopping_rate)
        assert (grad_of(x) - exact).norm() < 0.02 * exact.norm()
        assert (grad_of(x) - HESSIAN @ x.detach()).norm() > 0.2 * exact.norm()  # τ = 0.5 is not small

    def test_sgd_at_the_hopping_rate_is_consensus_hopping(self):
        x, source = bowl(samples=50)
        start = x.detach().clone()
        torch.manual_seed(3)
        source.gradient(None)
        torch.optim.SGD([x], lr=source.hopping_rate).step()
        torch.manual_seed(3)
        points = start + 0.3 * torch.randn(50, 3, dtype=torch.float64)
        centre, _, _ = consensus(points.tolist(), Bowl(HESSIAN)(points).tolist(), 4.0)
        assert x.tolist() == pytest.approx(centre, rel=1e-10)

    def test_one_by_one_is_the_same_as_in_one_call(self):
        a, b = parameter(2.0, -1.0), parameter(1.0)
        torch.manual_seed(0)
        one = optex.ConsensusSource(Bowl(HESSIAN, [a, b]), [a, b], alpha=4.0, sigma=0.3, samples=30)
        first = one.gradient(None)
        x, source = bowl(samples=30)
        torch.manual_seed(0)
        second = source.gradient(None)
        torch.testing.assert_close(torch.cat([grad_of(a), grad_of(b)]), grad_of(x))
        torch.testing.assert_close(first, second)
        assert torch.equal(torch.cat([a, b]), x)

    def test_an_objective_that_fails_leaves_the_parameters_alone(self):
        x = parameter(1.0, 2.0)

        def fails(batch):
            raise RuntimeError("out of fuel")

        with pytest.raises(RuntimeError, match="out of fuel"):
            optex.ConsensusSource(fails, [x], samples=4).gradient(None)
        assert x.tolist() == [1.0, 2.0]

    def test_pairs_cancel_where_energies_hardly_differ(self):
        spreads = []
        for antithetic in (False, True):
            x, source = bowl(samples=20, alpha=0.1, sigma=0.05, antithetic=antithetic)
            torch.manual_seed(0)
            answers = []
            for _ in range(60):
                source.gradient(None)
                answers.append(grad_of(x).clone())
            spreads.append(float(torch.stack(answers).std(0).norm()))
        assert spreads[1] < spreads[0] / 20

    @pytest.mark.parametrize("antithetic", [False, True])
    def test_told_noise_is_the_noise(self, antithetic):
        x, source = bowl(samples=500, alpha=2.0, sigma=0.2, antithetic=antithetic)
        torch.manual_seed(0)
        answers, told = [], []
        for _ in range(300):
            _, noise = source.gradient(None)
            assert noise is not None
            told.append(float(noise))
            answers.append(grad_of(x).clone())
        found = float(torch.stack(answers).var(0).mean())
        assert np.mean(told) == pytest.approx(found, rel=0.2)

    def test_noise_is_unknown_where_few_samples_decide(self):
        _, source = bowl(samples=50, alpha=100.0, sigma=1.0)
        torch.manual_seed(0)
        _, noise = source.gradient(None)
        assert source.effective_sample_size is not None
        assert source.effective_sample_size < 20
        assert noise is None

    def test_samples_where_the_objective_is_undefined_have_no_weight(self):
        x = parameter(0.5)
        source = optex.ConsensusSource(
            lambda points, _: points[:, 0].log(), [x], samples=300, alpha=1.0, sigma=0.3, vectorized=True
        )
        torch.manual_seed(0)
        loss, noise = source.gradient(None)
        assert loss.isfinite()
        assert grad_of(x).isfinite().all()
        assert noise is not None
        assert noise.isfinite()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_gradients_have_the_parameters_dtype(self, dtype):
        x = parameter(1.0, -1.0, dtype=dtype)
        seen = []

        def objective(points, _):
            seen.append(points.dtype)
            return points.square().sum(1)

        source = optex.ConsensusSource(objective, [x], samples=2000, alpha=1.0, sigma=0.5, vectorized=True)
        torch.manual_seed(0)
        loss, _ = source.gradient(None)
        assert grad_of(x).dtype == dtype
        assert seen == [dtype]
        assert loss.dtype == torch.float64
        # (I + τ A)⁻¹ A x with A = 2, τ = 1/4
        assert grad_of(x).tolist() == pytest.approx([4 / 3, -4 / 3], rel=0.2)

    def test_dtypes_may_differ(self):
        a, b = parameter(1.0), parameter(2.0, dtype=torch.float32)
        torch.manual_seed(0)
        optex.ConsensusSource(lambda _: a.sum() ** 2 + b.sum() ** 2, [a, b], samples=5).gradient(None)
        assert (grad_of(a).dtype, grad_of(b).dtype) == (torch.float64, torch.float32)

    def test_the_objective_may_write_into_its_points_and_answer_in_numpy(self):
        x = parameter(1.0, 2.0)

        def objective(points, _):
            values = points.square().sum(1).numpy()
            points.zero_()
            return values[:, None]

        source = optex.ConsensusSource(objective, [x], samples=9, alpha=1.0, vectorized=True)
        torch.manual_seed(0)
        source.gradient(None)
        assert grad_of(x).norm() > 0

    def test_batches_reach_the_objective(self):
        x, batches = parameter(1.0), []
        source = optex.ConsensusSource(lambda batch: batches.append(batch) or x.sum() ** 2, [x], samples=3)
        source.gradient("a")
        assert batches == ["a"] * 3
        assert source.evaluations == 3
        assert not source.deterministic

    def test_a_module_is_known(self):
        module = torch.nn.Linear(2, 1)
        assert optex.ConsensusSource(module, module.parameters()).module is module

    @pytest.mark.parametrize("name", REFUSED_BY_THE_SOURCE)
    def test_refuses(self, name):
        call, error, message = REFUSED_BY_THE_SOURCE[name]
        x = parameter(1.0, 2.0)
        with pytest.raises(error, match=message):
            call(x)
        assert x.tolist() == [1.0, 2.0]
        assert x.grad is None


REFUSED_BY_THE_DOOR = {
    "fun": ({"fun": 3}, TypeError, "cbo_minimize: fun must be callable, got int"),
    "x0": ({"x0": "here"}, TypeError, "x0 must be a real array or tensor"),
    "complex": ({"x0": torch.tensor([1j])}, TypeError, "x0 must be a real, dense tensor"),
    "cube": ({"x0": np.zeros((2, 2, 2))}, ValueError, r"particles \[n, d\], got shape \(2, 2, 2\)"),
    "empty": ({"x0": np.zeros(0)}, ValueError, "got shape"),
    "not finite": ({"x0": (math.nan, 1.0)}, ValueError, "x0 has components that are not finite"),
    "one particle": ({"particles": 1}, ValueError, "particles must be an integer of at least 2, got 1"),
    "one row": ({"x0": np.zeros((1, 2)), "particles": None}, ValueError, "rows of x0 must be an integer"),
    "rows and number": ({"x0": np.zeros((3, 2))}, ValueError, "has the particles already"),
    "spread": ({"spread": -1}, ValueError, "spread must be positive and finite, got -1"),
    "alpha": ({"alpha": math.inf}, ValueError, "alpha must be positive and finite, got inf"),
    "sigma": ({"sigma": -1}, ValueError, "sigma must be positive"),
    "drift": ({"drift": 0}, ValueError, "drift must be positive"),
    "dt": ({"dt": True}, ValueError, "dt must be positive"),
    "long steps": ({"dt": 1.5}, ValueError, r"drift \* dt must be at most 1, got 1.5"),
    "xtol": ({"xtol": -1.0}, ValueError, "xtol must be positive"),
    "noise": ({"noise": "white"}, ValueError, "'isotropic' or 'anisotropic', got 'white'"),
    "maxiter": ({"maxiter": 0}, ValueError, "maxiter must be an integer of at least 1"),
    "seed": ({"seed": -1}, ValueError, "seed must be between 0"),
    "callback": ({"callback": 3}, TypeError, "callback must be callable or None, got int"),
    "both": ({"workers": 2}, ValueError, "vectorized=True evaluates all points in one call"),
    "workers": (
        {"fun": rippled_at, "vectorized": False, "workers": 0}, ValueError, "workers must be at least 1"
    ),
    "answer": ({"fun": lambda p: p}, ValueError, "fun must return one number for each of 30 points"),
    "scalar": ({"fun": lambda x: x, "vectorized": False}, ValueError, "must be a scalar"),
    "none": ({"fun": lambda x: None, "vectorized": False}, TypeError, "must return the loss"),
    "nowhere": (
        {"fun": lambda p: p[:, 0] * math.nan},
        optex.NonFiniteError,
        "cbo_minimize: the objective is NaN or infinite at all 30",
    ),
}  # fmt: skip


def run(fun=rippled, x0=(1.0, 1.0), **options):
    options = {"vectorized": fun is rippled, "seed": 0, "maxiter": 40, "particles": 30, **options}
    return optex.cbo_minimize(fun, list(x0) if isinstance(x0, tuple) else x0, **options)


class TestMinimize:
    @pytest.mark.parametrize("noise", ["isotropic", "anisotropic"])
    def test_is_the_twins_lock_step(self, noise):
        generator = torch.Generator().manual_seed(7)
        points = (2.0 + 0.4 * torch.randn(6, 2, generator=generator, dtype=torch.float64)).tolist()
        seen = []
        optex.cbo_minimize(
            rippled, [2.0, 2.0], particles=6, spread=0.4, alpha=3.0, sigma=1.3, drift=1.1, dt=0.02, noise=noise,
            vectorized=True, seed=7, maxiter=25,
            callback=lambda intermediate_result: seen.append(intermediate_result),
        )  # fmt: skip
        assert len(seen) == 25
        for result in seen:
            energies = rippled(np.array(points)).tolist()
            centre, weights, _ = consensus(points, energies, 3.0)
            np.testing.assert_allclose(result.population, points, rtol=1e-9)
            np.testing.assert_allclose(result.consensus, centre, rtol=1e-9)
            assert result.effective_sample_size == pytest.approx(1 / sum(w * w for w in weights))
            normal = torch.randn(6, 2, generator=generator, dtype=torch.float64).tolist()
            points = cbo_step(
                points, centre, normal, drift=1.1, sigma=1.3, dt=0.02, isotropic=noise == "isotropic"
            )

    def test_without_noise_particles_only_contract(self):
        start = np.random.default_rng(0).uniform(-1, 1, (5, 3))
        result = optex.cbo_minimize(rippled, start, sigma=0, vectorized=True, dt=0.5, maxiter=200)
        assert result.success
        assert result.status == 0
        assert result.radius <= 1e-10
        assert result.nit < 200
        assert result.nfev == 5 * result.nit + 1
        assert (result.consensus >= start.min(0)).all()
        assert (result.consensus <= start.max(0)).all()

    def test_finds_the_least_of_many_minima(self):
        result = run(x0=(3.0, 3.0), particles=200, maxiter=250)
        assert np.abs(result.consensus).max() < 0.2
        assert result.status == 1
        assert not result.success
        assert result.nfev == 200 * 250 + 1
        assert result.fun == rippled_at(result.x)
        assert result.fun <= result.consensus_fun == rippled_at(result.consensus)
        assert result.fun <= result.population_energies.min()
        assert result.nlost == 0

    def test_anisotropic_noise_serves_many_dimensions(self):
        start = np.random.default_rng(0).uniform(-3, 3, (100, 12))
        result = optex.cbo_minimize(
            lambda p: (p**2).sum(1), start, noise="anisotropic", sigma=5.0, vectorized=True, seed=0, maxiter=300
        )
        assert np.abs(result.consensus).max() < 0.1

    def test_isotropic_noise_in_many_dimensions_is_warned_of(self):
        with pytest.warns(RuntimeWarning, match="drives particles apart in 20 dimensions.*a sigma below 0.33"):
            run(x0=(1.0,) * 20, maxiter=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(x0=(1.0,) * 20, maxiter=2, sigma=0.3)

    def test_one_point_at_a_time_is_the_same_run(self):
        together, apart = run(), run(rippled_at)
        np.testing.assert_allclose(together.consensus, apart.consensus, rtol=1e-12)
        assert together.nfev == apart.nfev

    def test_workers_are_the_same_run(self):
        alone = run(rippled_at, maxiter=6)
        with ThreadPoolExecutor(2) as threads:
            shared = run(rippled_at, maxiter=6, workers=threads)
        processes = run(rippled_at, maxiter=6, workers=2)
        for result in (shared, processes):
            np.testing.assert_allclose(result.population, alone.population, rtol=1e-12)
            assert result.fun == pytest.approx(alone.fun)
            assert (result.nfev, result.nlost) == (alone.nfev, 0)

    def test_a_point_that_a_worker_cannot_answer_counts_as_nan(self):
        def fragile(x):
            if x[0] < 0.3:
                raise RuntimeError("no answer")
            return rippled_at(x)

        start = np.linspace(1.0, 0.1, 10)[:, None] * np.ones(2)
        with ThreadPoolExecutor(2) as threads:
            result = run(fragile, x0=start, particles=None, maxiter=3, sigma=0.1, workers=threads)
        assert result.nlost > 0
        assert np.isnan(result.population_energies).any()
        assert np.isfinite(result.consensus).all()

    def test_tensors_in_tensors_out(self):
        seen = set()

        def fun(points):
            seen.add((points.dtype, tuple(points.shape[1:]), points.requires_grad))
            return points.square().sum(1)

        start = torch.tensor([1.0, 2.0], requires_grad=True)
        result = optex.cbo_minimize(fun, start, vectorized=True, seed=1, maxiter=5)
        assert seen == {(torch.float32, (2,), False)}
        assert result.x.dtype == torch.float32
        assert result.population.shape == (200, 2)
        with ThreadPoolExecutor(1) as threads:
            other = optex.cbo_minimize(lambda x: x.square().sum(), start, seed=1, maxiter=5, workers=threads)
        torch.testing.assert_close(other.consensus, result.consensus)

    def test_further_arguments_reach_the_function(self):
        shifted = run(lambda x, b: ((x - b) ** 2).sum(), args=3.0, maxiter=5)
        assert shifted.population_energies[0] == pytest.approx(((shifted.population[0] - 3.0) ** 2).sum())

    def test_the_seed_decides(self):
        assert run().fun == run().fun
        assert run().fun != run(seed=1).fun
        torch.manual_seed(5)
        first = run(seed=None).fun
        torch.manual_seed(5)
        assert run(seed=None).fun == first

    def test_particles_where_the_function_is_undefined_have_no_weight(self):
        def root(points):
            with np.errstate(invalid="ignore"):
                return np.sqrt(points[:, 0]) + points[:, 0] ** 2

        result = run(root, x0=(0.3,), vectorized=True, spread=0.5, maxiter=60)
        assert np.isfinite(result.consensus).all()
        assert result.x[0] < 0.2

    def test_a_function_that_ends_nowhere_defined_gives_what_was_found(self):
        calls = []

        def dies(points):
            calls.append(1)
            return rippled(points) if len(calls) < 4 else np.full(len(points), np.nan)

        result = run(dies, vectorized=True)
        assert result.status == 2
        assert "NaN or infinite at all 30" in result.message
        assert np.isfinite(result.fun)

    def test_flown_particles_do_not_harm_the_others(self):
        start = np.array([[1.0, 1.0], [1e200, 1e200], [1.1, 0.9], [-1e300, 1e300]])
        with np.errstate(over="ignore", invalid="ignore"):
            result = run(x0=start, particles=None, sigma=50.0, maxiter=30)
        assert np.isfinite(result.fun)

    def test_callbacks_stop_it(self):
        points = []
        result = run(callback=lambda x: points.append(x) or len(points) == 3)
        assert (result.status, result.nit) == (99, 3)
        assert "returned True" in result.message

        def stops(intermediate_result):
            raise StopIteration

        assert run(callback=stops).status == 99

    def test_workers_that_are_lost_at_once_are_an_error(self):
        def lost(function, tasks):
            raise OSError("no connection")

        with pytest.raises(optex.WorkerLostError):
            run(rippled_at, workers=lost)

    def test_workers_that_are_lost_later_leave_what_was_found(self):
        calls = []

        def later(function, tasks):
            calls.append(1)
            if len(calls) > 3:
                raise OSError("no connection")
            return list(map(function, tasks))

        result = run(rippled_at, workers=later)
        assert result.status == 3
        assert np.isfinite(result.fun)

    def test_shows_how_it_went(self, capsys):
        run(disp=True, maxiter=2)
        assert "Function evaluations: 61" in capsys.readouterr().out

    @pytest.mark.parametrize("name", REFUSED_BY_THE_DOOR)
    def test_refuses(self, name):
        options, error, message = REFUSED_BY_THE_DOOR[name]
        with pytest.raises(error, match=message):
            run(**{"vectorized": True, **options})
