"""Sketched gradients: what this paper alone promises; tests/test_family_sources.py has what all do."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import optex
from optex.sources.sketched.matrices import MATRICES, Gaussian, walsh_hadamard
from tests.gradients import grad_of
from tests.ranks import run_ranks
from tests.references.sketching import attacked_exactly, dense, exact_epsilon, federated

KINDS = tuple(MATRICES)
every_kind = pytest.mark.parametrize("kind", KINDS)


class TestSketch:
    @every_kind
    @given(
        dimension=st.integers(1, 40),
        share=st.floats(0.01, 1.0),
        seed=st.integers(0, 2**40),
        number=st.integers(0, 2**62),
    )
    @settings(max_examples=25, deadline=None)
    def test_both_maps_are_the_dense_matrix(self, kind, dimension, share, seed, number):
        size = max(1, int(share * dimension))
        sketch, R = optex.Sketch(kind, size, seed), dense(kind, size, dimension, seed, number)
        generator = torch.Generator().manual_seed(1)
        g = torch.randn(3, dimension, generator=generator, dtype=torch.float64)
        y = torch.randn(size, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(sketch.sk(g, number), g @ R.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sketch.desk(y, dimension, number), R.T @ y, rtol=1e-12, atol=1e-12)

    @every_kind
    @pytest.mark.parametrize("dimension", [32, 45])
    def test_mean_and_second_moment_are_those_told(self, kind, dimension):
        sketch, g = optex.Sketch(kind, 8), torch.linspace(-1, 2, dimension, dtype=torch.float64)
        backs = torch.stack([sketch.desk(sketch.sk(g, t), dimension, t) for t in range(1500)])
        moment = sketch.second_moment(dimension)
        assert (backs.mean(0) - g).norm() <= 1.3 * math.sqrt((moment - 1) / 1500) * g.norm()
        assert float(backs.square().sum(1).mean() / g.square().sum()) == pytest.approx(moment, rel=0.06)

    def test_dense_blocks_do_not_show(self, monkeypatch):
        g = torch.linspace(0, 1, 50, dtype=torch.float64)
        for kind in ("gaussian", "ams"):
            monkeypatch.setattr("optex.sources.sketched.matrices._BLOCK", 48)  # blocks of 12 columns
            sketch, R = optex.Sketch(kind, 4, 3), dense(kind, 4, 50, 3, 9)
            torch.testing.assert_close(sketch.sk(g, 9), R @ g)
            torch.testing.assert_close(sketch.desk(R @ g, 50, 9), R.T @ (R @ g))
        assert len(list(Gaussian(4, 50, (0,)).columns())) == 5

    def test_all_of_hadamard_s_rows_are_a_rotation(self):
        sketch, g = optex.Sketch("srht", 64), torch.linspace(-3, 1, 64, dtype=torch.float64)
        torch.testing.assert_close(sketch.desk(sketch.sk(g), 64), g, rtol=1e-14, atol=1e-14)
        assert sketch.second_moment(64) == 1

    @pytest.mark.parametrize("count", [1, 2, 8, 64])
    def test_the_fast_transform_is_the_matrix(self, count):
        x = torch.linspace(-1, 1, 2 * count, dtype=torch.float64).view(2, count)
        H = torch.from_numpy(hadamard(count)).double() / math.sqrt(count)
        torch.testing.assert_close(walsh_hadamard(x), x @ H)
        torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), x)

    @every_kind
    def test_rounds_and_seeds_differ_and_repeat(self, kind):
        g = torch.linspace(0, 1, 32)
        found = [optex.Sketch(kind, 4, seed).sk(g, t) for seed in (0, 1) for t in (0, 1)]
        assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
        assert torch.equal(found[0], optex.Sketch(kind, 4, 0).sk(g, 0))

    @every_kind
    def test_precisions_share_the_matrix(self, kind):
        sketch, g = optex.Sketch(kind, 8), torch.linspace(-1, 1, 40, dtype=torch.float64)
        message = sketch.sk(g.bfloat16(), 3)
        assert message.dtype == torch.bfloat16
        torch.testing.assert_close(message.double(), sketch.sk(g, 3), rtol=0.02, atol=0.05)
        torch.testing.assert_close(sketch.sk(g.float(), 3).double(), sketch.sk(g, 3), rtol=1e-5, atol=1e-5)

    @every_kind
    def test_autograd_is_the_other_map(self, kind):
        sketch, g = optex.Sketch(kind, 5), torch.ones(20, dtype=torch.float64, requires_grad=True)
        y = torch.linspace(1, 2, 5, dtype=torch.float64)
        (sketch.sk(g, 2) @ y).backward()
        torch.testing.assert_close(g.grad, sketch.desk(y, 20, 2))

    @every_kind
    def test_the_global_generators_are_left_alone(self, kind):
        before = torch.get_rng_state()
        optex.Sketch(kind, 4).sk(torch.ones(8))
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("act", "error", "words"),
        [
            (
                lambda: optex.Sketch("fourier", 4),  # pyright: ignore[reportArgumentType]
                ValueError,
                "kind must be one of gaussian, srht",
            ),
            (
                lambda: optex.Sketch("srht", 0),
                ValueError,
                "size must be an integer of at least 1, got 0",
            ),
            (lambda: optex.Sketch("srht", 4, -1), ValueError, "Sketch: seed must be an integer of at least 0"),
            (lambda: optex.Sketch("ams", 4).sk(torch.ones(3)), ValueError, "size is 4 and vectors have 3"),
            (lambda: optex.Sketch("ams", 4).sk(torch.ones(8), -1), ValueError, "number must be an integer"),
            (
                lambda: optex.Sketch("ams", 4).sk([1.0]),  # pyright: ignore[reportArgumentType]
                TypeError,
                "sk takes floating-point tensors",
            ),
            (lambda: optex.Sketch("ams", 4).sk(torch.arange(9)), TypeError, "got torch.int64 (9,)"),
            (lambda: optex.Sketch("ams", 4).desk(torch.ones(3), 9), ValueError, "desk takes rows of 4 numbers"),
            (lambda: optex.Sketch("ams", 4).second_moment(2), ValueError, "lower it, or send them as they are"),
        ],
    )
    def test_what_cannot_work_is_refused(self, act, error, words):
        with pytest.raises(error, match=re.escape(words)):
            act()


def bowl(x):
    return optex.ObjectiveSource(lambda _: 0.5 * x.square().sum(), deterministic=True)


class Noisy(optex.GradientSource):
    """The gradient of ½ ‖x‖², and noise of a variance that it tells, or does not."""

    def __init__(self, x, variance, *, tells=True):
        self.x, self.variance, self.tells = x, variance, tells

    def gradient(self, batch):
        self.x.grad = self.x.detach() + math.sqrt(self.variance) * torch.randn_like(self.x)
        return self.x.detach().square().sum() / 2, torch.tensor(self.variance) if self.tells else None


class TestSource:
    @pytest.mark.parametrize("variance", [0.0, 0.5])
    @every_kind
    def test_the_noise_told_is_the_noise_there_is(self, kind, variance):
        x = nn.Parameter(torch.linspace(0.5, 2, 40))
        source = optex.SketchedSource(Noisy(x, variance), optex.Sketch(kind, 8), [x])
        told, had = 0.0, 0.0
        torch.manual_seed(0)
        for _ in range(1500):
            _, noise = source.gradient(None)
            assert noise is not None
            told += float(noise)
            had += float((grad_of(x) - x.detach()).square().mean())
        assert told / had == pytest.approx(1, abs=0.08)

    def test_noise_is_unknown_where_the_other_source_s_is(self):
        x = nn.Parameter(torch.ones(8))
        source = optex.SketchedSource(Noisy(x, 0.1, tells=False), optex.Sketch("count", 2), [x])
        assert source.gradient(None)[1] is None

    def test_a_fixed_sketch_is_deterministic_and_stays_in_its_rows(self):
        x = nn.Parameter(torch.linspace(1, 2, 16, dtype=torch.float64))
        sketch = optex.Sketch("gaussian", 4)
        source = optex.SketchedSource(bowl(x), sketch, [x], fixed=True)
        assert source.deterministic
        assert source.gradient(None)[1] == 0
        R = dense("gaussian", 4, 16, 0, 0)
        torch.testing.assert_close(x.grad, R.T @ (R @ x.detach()))

    def test_it_says_of_the_other_source_what_that_says(self):
        x, model = nn.Parameter(torch.ones(8)), nn.Linear(2, 1)
        inner = optex.SPSASource(lambda _: x.detach().sum(), [x], queries=3)
        source = optex.SketchedSource(inner, optex.Sketch("count", 2), [x])
        assert (source.evaluations, source.deterministic, source.module) == (6.0, False, None)
        assert source.replica() is None
        inner = optex.ObjectiveSource(model)
        assert optex.SketchedSource(inner, optex.Sketch("count", 2), model.parameters()).module is model

    def test_parameters_without_a_gradient_count_as_zero(self):
        x, idle = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(3, dtype=torch.float64))
        source = optex.SketchedSource(bowl(x), optex.Sketch("gaussian", 4), [x, idle], fixed=True)
        source.gradient(None)
        R = dense("gaussian", 4, 11, 0, 0)
        whole = R.T @ (R @ torch.tensor([1.0] * 8 + [0.0] * 3, dtype=torch.float64))
        torch.testing.assert_close(torch.cat([grad_of(x).double(), grad_of(idle)]), whole, rtol=1e-5, atol=1e-6)
        assert (grad_of(x).dtype, grad_of(idle).dtype) == (torch.float32, torch.float64)

    def test_a_gradient_that_is_not_finite_loses_nothing(self):
        x = nn.Parameter(torch.ones(8))
        source = optex.SketchedSource(
            optex.ObjectiveSource(lambda _: (x.sum() - 8).sqrt() * math.nan), optex.Sketch("srht", 4), [x]
        )
        optimizer = optex.OptEx(torch.optim.SGD([x], lr=0.1), parallelism=2)
        with pytest.raises(optex.NonFiniteError):
            next(optimizer.rounds([None] * 4, source))
        assert torch.equal(x.detach(), torch.ones(8))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"source": len}, TypeError, "wrap an objective in ObjectiveSource"),
            ({"sketch": 8}, TypeError, "sketch must be a Sketch, got int"),
            ({"parameters": torch.ones(8)}, TypeError, "pass [tensor]"),
            ({"parameters": [3]}, TypeError, "floating-point tensors, got int"),
            ({"parameters": []}, ValueError, "hold no number"),
            ({"fixed": 1}, TypeError, "fixed must be True or"),
            ({"sketch": optex.Sketch("ams", 9)}, ValueError, "size is 9 and vectors have 8 numbers"),
        ],
    )
    def test_what_cannot_work_is_refused(self, change, error, words):
        x = nn.Parameter(torch.ones(8))
        given: dict[str, Any] = {"source": bowl(x), "sketch": optex.Sketch("count", 2), "parameters": [x]}
        with pytest.raises(error, match=re.escape(words)):
            optex.SketchedSource(**{**given, **change})

    def test_a_graph_of_it_is_refused(self):
        x = nn.Parameter(torch.ones(8))
        with pytest.raises(ValueError, match="is no derivative"):
            optex.SketchedSource(bowl(x), optex.Sketch("count", 2), [x]).with_graph()


def _trained(rank, plain):
    """Three steps of data parallelism on this rank; the parameters, the bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    parallel = DistributedDataParallel(model)
    state = optex.SketchState(optex.Sketch("srht", 256 if plain else 16, seed=5))
    parallel.register_comm_hook(state, optex.sketched_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for x in torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        optimizer.zero_grad()
        parallel(x[rank]).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy(), state.state_dict()


def _trained_alone():
    """Three steps on one process, without a sketch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for x in torch.randn(3, 2, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        optimizer.zero_grad()
        model(x.flatten(0, 1)).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


class Bucket:
    """What a hook sees of DDP's bucket."""

    def __init__(self, values):
        self.values = values

    def buffer(self):
        return self.values

    def index(self):
        return 3

    def is_last(self):
        return True


def _reduced(rank):
    state = optex.SketchState(optex.Sketch("count", 8, seed=2))
    state.load_state_dict({"number": 4, "bytes_sent": 1, "bytes_plain": 2})
    mine = torch.linspace(rank, rank + 1, 40, dtype=torch.float64)
    bucket: Any = Bucket(mine.clone())
    answer = optex.sketched_hook(state, bucket).wait()
    return answer.numpy(), state.state_dict()


def _ranks(rank):
    return _reduced(rank), _trained(rank, False), _trained(rank, True)


@pytest.fixture(scope="module")
def ranks():
    """What two ranks have to say: starting them takes most of the time."""
    return list(zip(*run_ranks(_ranks, 2), strict=True))


class TestHook:
    def test_what_comes_back_is_the_sketch_of_the_mean(self, ranks):
        (first, state), (second, _) = ranks[0]
        mean = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)
        sketch, number = optex.Sketch("count", 8, seed=2), 4 * 2**20 + 3
        expected = sketch.desk(sketch.sk(mean, number), 40, number)
        assert (first == second).all()
        torch.testing.assert_close(torch.from_numpy(first), expected, rtol=1e-12, atol=1e-12)
        assert state == {"number": 5, "bytes_sent": 1 + 64, "bytes_plain": 2 + 320}

    def test_training_on_two_ranks(self, ranks):
        (one, counts), (other, _) = ranks[1]
        assert (one == other).all()
        assert counts == {"number": 3, "bytes_sent": 3 * 16 * 8, "bytes_plain": 3 * 161 * 8}
        assert abs(one - _trained_alone()).max() > 1e-3  # R has been there

    def test_a_bucket_that_is_short_is_sent_as_it_is(self, ranks):
        (one, counts), (other, _) = ranks[2]
        assert (one == other).all()
        assert abs(one - _trained_alone()).max() < 1e-12
        assert counts["bytes_sent"] == counts["bytes_plain"]

    def test_what_cannot_work_is_refused(self):
        with pytest.raises(TypeError, match="SketchState: sketch must be a Sketch, got str"):
            optex.SketchState("srht")  # pyright: ignore[reportArgumentType]

    def test_a_state_with_a_part_missing_is_refused_and_changes_nothing(self):
        state = optex.SketchState(optex.Sketch("srht", 4))
        with pytest.raises(ValueError, match="SketchState: the saved state has no entry 'bytes_plain'"):
            state.load_state_dict({"number": 3, "bytes_sent": 0})
        assert state.number == 0


class TestPrivacy:
    @pytest.mark.parametrize("releases", [1, 20, 400])
    @pytest.mark.parametrize("multiplier", [1.0, 5.0, 50.0])
    def test_epsilon_lies_between_the_least_and_the_plain_bound(self, releases, multiplier):
        mechanism = optex.GaussianMechanism(1.0, multiplier)
        told, rho = mechanism.epsilon(releases, 1e-5), mechanism.rho(releases)
        least = exact_epsilon(mechanism, releases, 1e-5)
        assert least <= told <= rho + 2 * math.sqrt(rho * math.log(1e5))
        assert told <= 1.3 * least + 0.02

    def test_rho_is_the_renyi_divergence_over_the_order(self):
        # Of N(Δ, z²) from N(0, z²): log E_Q (P/Q)^α / (α - 1), by a sum over a grid.
        mechanism, order = optex.GaussianMechanism(3.0, 2.0, sensitivity=1.5), 2.5
        x = np.linspace(-40, 40, 200001)
        p, q = (np.exp(-((x - mean) ** 2) / 8) / math.sqrt(8 * math.pi) for mean in (1.5, 0.0))
        divergence = math.log((p**order * q ** (1 - order)).sum() * (x[1] - x[0])) / (order - 1)
        assert mechanism.rho(1) * order == pytest.approx(divergence, rel=1e-6)
        assert mechanism.rho(7) == pytest.approx(7 * mechanism.rho(1))

    def test_a_budget_is_kept_and_used(self):
        mechanism = optex.GaussianMechanism.for_budget(2.0, 1e-5, 50, clip=0.1, sensitivity=1.0)
        assert mechanism.epsilon(50, 1e-5) == pytest.approx(2.0, abs=1e-6)
        assert mechanism.epsilon(50, 1e-5) <= 2.0
        assert (mechanism.clip, mechanism.sensitivity) == (0.1, 1.0)

    def test_releases_are_clipped_and_noised(self):
        vectors = torch.stack([torch.full((20000,), 1.0), torch.zeros(20000), torch.full((20000,), 1e-3)])
        mechanism = optex.GaussianMechanism(clip=0.5, noise_multiplier=0.2)
        released = mechanism.release(vectors.double(), torch.Generator().manual_seed(0))
        noise = released - vectors * torch.tensor([[0.5 / math.sqrt(20000)], [1.0], [1.0]])
        assert noise.std(1).numpy() == pytest.approx([0.1] * 3, rel=0.03)
        assert released.isfinite().all()

    def test_nothing_released_is_nothing_spent(self):
        assert optex.GaussianMechanism(1.0, 1.0).epsilon(0, 1e-5) == 0

    @pytest.mark.parametrize(
        ("act", "words"),
        [
            (lambda: optex.GaussianMechanism(0.0, 1.0), "clip must be positive and finite, got 0.0"),
            (lambda: optex.GaussianMechanism(1.0, 0.0), "leave the mechanism out"),
            (lambda: optex.GaussianMechanism(1.0, 1.0, -2.0), "sensitivity must be positive"),
            (
                lambda: optex.GaussianMechanism(1.0, 1.0).epsilon(3, 1.0),
                "delta must be a finite number",
            ),
            (lambda: optex.GaussianMechanism(1.0, 1.0).epsilon(-1, 0.1), "releases must be an integer"),
            (
                lambda: optex.GaussianMechanism.for_budget(0.0, 1e-5, 5, clip=1.0),
                "epsilon must be positive",
            ),
        ],
    )
    def test_what_cannot_work_is_refused(self, act, words):
        with pytest.raises(ValueError, match=words):
            act()


def classifier_gradient(weights, label):
    """Of a softmax classifier [classes, inputs + 1] at one sample."""

    def gradient(x):
        extended = torch.cat([x, torch.ones(1, dtype=x.dtype)])
        error = torch.softmax(weights @ extended, 0) - nn.functional.one_hot(torch.tensor(label), len(weights))
        return torch.outer(error, extended).flatten()

    return gradient


class TestLeakage:
    def setup_method(self):
        generator = torch.Generator().manual_seed(0)
        self.secret = torch.rand(12, generator=generator, dtype=torch.float64)
        weights = torch.randn(5, 13, generator=generator, dtype=torch.float64)
        self.gradient = classifier_gradient(0.3 * weights, 2)
        self.start = torch.full((12,), 0.5, dtype=torch.float64)

    def error(self, found):
        return float((found.data - self.secret).norm() / self.secret.norm())

    def test_a_gradient_tells_its_sample(self):
        y = self.gradient(self.secret)
        torch.testing.assert_close(attacked_exactly(y, 5), self.secret)
        found = optex.leakage_attack(self.gradient, y, self.start)
        assert self.error(found) < 1e-4
        assert found.mismatch < 1e-5
        assert list(found.history) == sorted(found.history, reverse=True)

    @every_kind
    def test_so_does_its_sketch_with_as_many_numbers_as_the_sample_twice(self, kind):
        sketch = optex.Sketch(kind, 24, seed=1)
        y = sketch.sk(self.gradient(self.secret), 3)
        found = optex.leakage_attack(self.gradient, y, self.start, sketch=sketch, number=3)
        assert self.error(found) < 1e-3

    def test_fewer_numbers_than_the_sample_do_not(self):
        sketch = optex.Sketch("gaussian", 4)
        y = sketch.sk(self.gradient(self.secret))
        found = optex.leakage_attack(self.gradient, y, self.start, sketch=sketch)
        assert found.mismatch < 1e-3  # these data explain the message
        assert self.error(found) > 0.1  # and are others

    def test_noise_before_the_sketch_hides(self):
        sketch, mechanism = optex.Sketch("gaussian", 24), optex.GaussianMechanism(1.0, 1.0)
        y = mechanism.release(self.gradient(self.secret), torch.Generator().manual_seed(2))
        found = optex.leakage_attack(self.gradient, sketch.sk(y), self.start, sketch=sketch)
        assert self.error(found) > 0.3

    @pytest.mark.parametrize(
        ("act", "error", "words"),
        [
            (
                lambda t, y: optex.leakage_attack(3, y, t.start),  # pyright: ignore[reportArgumentType]
                TypeError,
                "gradient must be callable, got int",
            ),
            (
                lambda t, y: optex.leakage_attack(
                    t.gradient,
                    y,
                    t.start,
                    sketch="ams",  # pyright: ignore[reportArgumentType]
                ),
                TypeError,
                "a Sketch or",
            ),
            (lambda t, y: optex.leakage_attack(t.gradient, y, t.start, steps=0), ValueError, "steps must be"),
            (lambda t, y: optex.leakage_attack(t.gradient, y, t.start, lr=0.0), ValueError, "lr must be"),
            (lambda t, y: optex.leakage_attack(t.gradient, y[:9], t.start), ValueError, "has 9 numbers, and"),
            (
                lambda t, y: optex.leakage_attack(lambda x: t.gradient(x).detach(), y, t.start),
                ValueError,
                "with a graph",
            ),
            (lambda t, y: optex.leakage_attack(t.gradient, 0 * y, t.start), optex.NonFiniteError, "length 0.0"),
            (
                lambda t, y: optex.leakage_attack(lambda x: t.gradient(x) * math.nan, y, t.start),
                optex.NonFiniteError,
                "not finite at the start",
            ),
        ],
    )
    def test_what_cannot_work_is_refused(self, act, error, words):
        with pytest.raises(error, match=re.escape(words)):
            act(self, self.gradient(self.secret).detach())


CENTRES = [np.linspace(0, c, 12) for c in (1.0, 2.0, -4.0)]
WEIGHTS = np.linspace(0.5, 1.5, 12)


def quadratic(x, centre):
    return float(0.5 * (WEIGHTS * (x - centre) ** 2).sum()), WEIGHTS * (x - centre)


def noisy_quadratic(x, centre):
    return 0.5 * ((x - centre) ** 2).sum() + 0.1 * torch.randn(()) * x.sum()


def halves(rows, generator):
    return rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 2]]


def mean_square(x, rows):
    return 0.5 * (x - rows).square().sum(1).mean()


class TestFederated:
    @pytest.mark.parametrize("kind", [None, *KINDS])
    @pytest.mark.parametrize("local_steps", [1, 3])
    def test_rounds_are_those_of_the_plain_loop(self, kind, local_steps):
        sketch = None if kind is None else optex.Sketch(kind, 5, seed=2)
        walked = []
        result = optex.federated_minimize(
            quadratic,
            np.ones(12),
            CENTRES,
            jac=True,
            lr=0.2,
            local_steps=local_steps,
            sketch=sketch,
            maxiter=20,
            callback=lambda x: walked.append(x.copy()),
        )
        server_lr = 1.0 if sketch is None else 1 / sketch.second_moment(12)
        expected = federated(
            lambda x, c: torch.from_numpy(quadratic(x.numpy(), c)[1]),
            np.ones(12),
            CENTRES,
            lr=0.2,
            local_steps=local_steps,
            server_lr=server_lr,
            sketch=sketch,
            rounds=20,
        )
        for x, twin in zip(walked, expected, strict=True):
            np.testing.assert_allclose(x, twin.numpy(), rtol=1e-10, atol=1e-12)
        numbers = 12 if sketch is None else 5
        assert (result.uploaded, result.downloaded) == (20 * 8 * numbers, 20 * 8 * numbers)
        assert (result.nit, result.status, result.success, result.nlost) == (20, 1, False, 0)

    def test_the_minimum_is_found_through_a_channel_of_a_third(self):
        result = optex.federated_minimize(
            quadratic, np.ones(12), CENTRES, jac=True, lr=0.5, sketch=optex.Sketch("srht", 4), maxiter=2000
        )
        assert result.success
        np.testing.assert_allclose(result.x, np.mean(CENTRES, 0), atol=1e-4)
        assert result.fun == pytest.approx(np.mean([quadratic(result.x, c)[0] for c in CENTRES]))
        np.testing.assert_allclose(result.jac, WEIGHTS * (result.x - np.mean(CENTRES, 0)), atol=1e-12)

    @pytest.mark.parametrize("privacy", [None, optex.GaussianMechanism(1.0, 0.1)])
    def test_stopped_and_resumed_and_on_workers_it_is_one_run(self, privacy):
        rows = [torch.randn(6, 9, generator=torch.Generator().manual_seed(c)) + c for c in range(3)]
        options: dict[str, Any] = {
            "lr": 0.3,
            "local_steps": 2,
            "sample": halves,
            "sketch": optex.Sketch("count", 3),
            "privacy": privacy,
            "seed": 4,
            "gtol": 0.0,
        }

        def run(x, rounds, **more):
            return optex.federated_minimize(mean_square, x, rows, maxiter=rounds, **options, **more)

        whole = run(torch.zeros(9), 9)
        part = run(torch.zeros(9), 4)
        rest = run(part.x, 5, first_round=4)
        assert torch.equal(whole.x, rest.x)
        assert whole.losses == part.losses + rest.losses
        assert whole.rho == rest.rho
        assert (whole.rho is None) == (privacy is None)
        with ThreadPoolExecutor(2) as threads:
            assert torch.equal(run(torch.zeros(9), 9, workers=threads).x, whole.x)
        other = optex.federated_minimize(mean_square, torch.zeros(9), rows, maxiter=9, **{**options, "seed": 5})
        assert not torch.equal(other.x, whole.x)

    def test_what_fun_draws_is_a_function_of_the_seed(self):
        def run(seed):
            centres = [torch.full((4,), float(c)) for c in range(2)]
            return optex.federated_minimize(
                noisy_quadratic, torch.zeros(4), centres, lr=0.1, maxiter=5, seed=seed
            ).x

        before = torch.get_rng_state()
        first = run(0)
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(3)
        assert torch.equal(first, run(0))
        assert not torch.equal(first, run(1))

    def test_a_run_that_diverges_ends_with_the_last_finite_point(self):
        result = optex.federated_minimize(
            mean_square,
            torch.ones(9),
            [torch.zeros(2, 9)],
            lr=1.0,
            server_lr=1e30,
            sketch=optex.Sketch("gaussian", 2),
        )
        assert result.status == 2
        assert not result.success
        assert "lower" in result.message.lower()
        assert result.x.isfinite().all()

    def test_a_client_that_answers_nan_is_named(self):
        def broken(x, centre):
            value, slope = quadratic(x, centre)
            return (math.nan if centre[-1] == 2.0 else value), slope

        result = optex.federated_minimize(broken, np.ones(12), CENTRES, jac=True, lr=0.1)
        assert result.status == 2
        assert "in round 0 client 1 has a loss or a gradient that is not finite" in result.message
        assert (result.x == 1).all()

    def test_a_callback_stops_it(self):
        def stop(intermediate_result):
            return intermediate_result.nit == 3

        result = optex.federated_minimize(quadratic, np.ones(12), CENTRES, jac=True, lr=0.1, callback=stop)
        assert (result.status, result.nit) == (99, 3)

    def test_it_prints_when_asked(self, capsys):
        optex.federated_minimize(quadratic, np.ones(12), CENTRES, jac=True, lr=0.1, maxiter=2, disp=True)
        assert "Bytes sent by a client: 192, received: 192" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"clients": 3}, TypeError, "clients must be a sequence"),
            ({"clients": []}, ValueError, "there are no clients"),
            ({"lr": 0.0}, ValueError, "lr must be positive"),
            ({"server_lr": -1.0}, ValueError, "server_lr must be positive"),
            ({"local_steps": 0}, ValueError, "local_steps must be an integer of at least 1"),
            ({"sketch": "srht"}, TypeError, "sketch must be a Sketch or None"),
            ({"sketch": optex.Sketch("srht", 13)}, ValueError, "size is 13 and vectors have 12"),
            ({"privacy": 1.0}, TypeError, "privacy must be a GaussianMechanism or None"),
            ({"sample": 3}, TypeError, "sample must be callable or None"),
            ({"callback": 3}, TypeError, "callback must be callable or None"),
            ({"seed": -1}, ValueError, "seed must be"),
            ({"first_round": -1}, ValueError, "first_round must be"),
            ({"maxiter": 0}, ValueError, "maxiter must be"),
            ({"gtol": -1.0}, ValueError, "gtol must be"),
            ({"fun": 3}, TypeError, "fun must be callable"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options, error, words):
        given: dict[str, Any] = {
            "fun": quadratic,
            "x0": np.ones(12),
            "clients": CENTRES,
            "lr": 0.1,
            "jac": True,
        }
        with pytest.raises(error, match=words):
            optex.federated_minimize(**{**given, **options})
