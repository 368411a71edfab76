"""One suite over every problem, and each problem against its closed form."""

import math
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, rosen, rosen_der
from torch.func import functional_call

from optex import OptEx, SequentialEvaluator, VectorizedEvaluator
from optex.sources import ObjectiveSource
from optex.stepping.parameters import ParameterVector
from optex.studies.problems import (
    PROBLEMS,
    Ackley,
    DigitsMLP,
    Function,
    LogisticBreastCancer,
    Quadratic,
    Rosenbrock,
    SparseTransport,
    Sphere,
    make_problem,
    tabular,
)
from optex.studies.problems.control import DeepQLearning
from tests.gradients import grad_of
from tests.models import request

SMALL = {
    "dim": 7,
    "noise": 0.3,
    "batch_size": 16,
    "model": None,
    "width": 8,
    "depth": 1,
    "train_size": 80,
    "held_size": 30,
    "augment": True,
    "layers": 1,
    "heads": 2,
    "context": 9,
    "dropout": 0.0,
    "start": None,
    "size": 8,
    "heaters": 4,
    "heaters_at_once": 2,
    "samples": 3,
    "rows": 20,
    "images": 3,
    "sources": 12,
    "targets": 5,
    "k": None,
    "gamma": None,
    "columns": None,
}
FUNCTIONS = {name: entry.build for name, entry in PROBLEMS.items() if "dim" in entry.options}


def small(name, seed=0, **choices):
    options = {option: SMALL.get(option) for option in PROBLEMS[name].options}
    return make_problem(name, seed=seed, **{**options, **choices})


def flat(problem):
    return torch.cat([p.detach().reshape(-1) for p in problem.parameters()])


def leaves(batches, count):
    parts = [batch if isinstance(batch, tuple) else (batch,) for batch in islice(batches, count)]
    return [leaf for part in parts for leaf in part if leaf is not None]


@pytest.mark.usefixtures("made_up_data")
@pytest.mark.parametrize("name", PROBLEMS)
class TestEveryProblem:
    def test_is_the_same_when_built_twice(self, name):
        first, second = small(name), small(name)
        assert torch.equal(flat(first), flat(second))
        for a, b in zip(leaves(first.batches(), 3), leaves(second.batches(), 3), strict=True):
            assert torch.equal(a, b)

    def test_another_seed_is_another_start(self, name):
        assert not torch.equal(flat(small(name, seed=0)), flat(small(name, seed=1)))

    def test_every_call_of_batches_starts_anew(self, name):
        problem = small(name)
        first = leaves(problem.batches(), 3)
        assert bool(first) == (next(problem.batches()) is not None)
        for a, b in zip(first, leaves(problem.batches(), 3), strict=True):
            assert torch.equal(a, b)

    def test_reset_goes_back_to_the_start(self, name):
        problem = small(name)
        start, loss = flat(problem), problem.evaluate()
        with torch.no_grad():
            for parameter in problem.parameters():
                parameter.add_(1)
        # What an agent was paid is of the past, and a constant does nothing to a potential.
        if not isinstance(problem, (DeepQLearning, SparseTransport)):
            assert problem.evaluate() != loss
        problem.reset()
        assert torch.equal(flat(problem), start)
        assert problem.evaluate() == loss

    def test_leaves_the_global_random_state_alone(self, name):
        before = torch.get_rng_state()
        problem = small(name)
        leaves(problem.batches(), 3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_names_itself(self, name):
        problem = small(name)
        assert problem.name == name
        assert problem.dimension == len(flat(problem))

    def test_starts_above_its_minimum(self, name):
        problem = small(name)
        assert math.isfinite(problem.evaluate())
        assert problem.minimum is None or problem.evaluate() > problem.minimum

    def test_a_deterministic_gradient_does_not_depend_on_the_batch(self, name):
        noiseless: dict[str, Any] = {"noise": 0.0} if "noise" in PROBLEMS[name].options else {}
        problem = small(name, **noiseless)
        source, gradients = problem.source(), []
        for batch in islice(problem.batches(), 3):
            problem.zero_grad()
            source.gradient(batch)
            gradients.append(torch.cat([grad_of(p).reshape(-1) for p in problem.parameters()]))
        same = torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
        assert problem.deterministic is same

    def test_gradient_is_that_of_finite_differences(self, name):
        problem = small(name).double()
        batch = next(problem.batches())
        names = [key for key, _ in problem.named_parameters()]

        def loss(*values):
            return functional_call(problem, dict(zip(names, values, strict=True)), (batch,))

        values = [p.detach().clone().requires_grad_() for p in problem.parameters()]
        assert torch.autograd.gradcheck(loss, values, fast_mode=True)

    def test_vectorized_gradients_equal_sequential_ones(self, name):
        problem = small(name)
        vector, source = ParameterVector(problem.parameters()), ObjectiveSource(problem)
        generator = torch.Generator().manual_seed(0)
        shifts = torch.randn(3, vector.dimension, generator=generator, dtype=vector.dtype)
        points, batches = vector.read() + 0.1 * shifts, list(islice(problem.batches(), 3))
        expected = SequentialEvaluator().evaluate(request(source, vector, points, batches))
        found = VectorizedEvaluator(problem).evaluate(request(source, vector, points, batches))
        torch.testing.assert_close(found.gradients, expected.gradients)
        torch.testing.assert_close(found.losses, expected.losses.to(found.losses.dtype))
        assert torch.equal(vector.read(), flat(problem))

    def test_rounds_agree_between_evaluators(self, name):
        ends = []
        for make_evaluator in (lambda problem: SequentialEvaluator(), VectorizedEvaluator):
            problem = small(name)
            base = torch.optim.SGD(problem.parameters(), lr=1e-3)
            optimizer = OptEx(base, parallelism=3, evaluator=make_evaluator(problem))
            for _ in islice(optimizer.rounds(problem.batches(), problem), 4):
                pass
            ends.append(flat(problem))
        torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("build", FUNCTIONS.values(), ids=FUNCTIONS.keys())
class TestEveryFunction:
    def test_minimum_is_at_the_minimizer(self, build):
        problem = build(dim=5)
        with torch.no_grad():
            problem.theta.copy_(problem.minimizer())
        assert problem.evaluate() == pytest.approx(problem.minimum, abs=1e-14)

    def test_gradient_at_the_minimizer_is_zero(self, build):
        problem = build(dim=5)
        with torch.no_grad():
            problem.theta.copy_(problem.minimizer())
        problem(None).backward()
        assert torch.allclose(problem.theta.grad, torch.zeros(5, dtype=torch.float64), atol=1e-14)

    def test_starts_inside_its_box(self, build):
        problem = build(dim=1000)
        largest = problem.theta.detach().abs().max()
        assert 0.99 * problem.radius < largest < problem.radius

    def test_without_noise_batches_are_none(self, build):
        assert list(islice(build(dim=3).batches(), 3)) == [None] * 3

    def test_noise_makes_it_random(self, build):
        assert build(dim=3).deterministic
        assert not build(dim=3, noise=0.1).deterministic

    def test_noise_is_added_to_the_gradient(self, build):
        problem = build(dim=4000, noise=0.5)
        noise = next(problem.batches())
        (exact,) = torch.autograd.grad(problem(None), problem.theta)
        (noisy,) = torch.autograd.grad(problem(noise), problem.theta)
        torch.testing.assert_close(noisy - exact, noise)
        assert float(noise.std()) == pytest.approx(0.5, rel=0.05)
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.05)

    def test_evaluation_has_no_noise(self, build):
        assert build(dim=9, noise=10.0).evaluate() == build(dim=9).evaluate()

    def test_noise_leaves_the_start_alone(self, build):
        assert torch.equal(build(dim=9, noise=10.0, seed=3).theta, build(dim=9, seed=3).theta)

    def test_takes_a_dtype(self, build):
        problem = build(dim=9, noise=0.1, dtype=torch.float32)
        assert problem(next(problem.batches())).dtype == torch.float32


vectors = st.lists(st.floats(-3, 3), min_size=2, max_size=12).map(np.array)


class TestClosedForms:
    @given(vectors)
    @settings(max_examples=30, deadline=None)
    def test_values(self, x):
        theta = torch.tensor(x)
        d = len(x)
        root = math.sqrt(np.mean(x**2))
        ackley = -20 * math.exp(-0.2 * root) - math.exp(np.mean(np.cos(2 * math.pi * x))) + 20 + math.e
        spectrum = 100.0 ** (np.arange(d) / (d - 1) - 1)
        expected = {
            Sphere(dim=d): root,
            Ackley(dim=d): ackley,
            Rosenbrock(dim=d): rosen(x) / (d - 1),
            Quadratic(dim=d, condition=100.0): 0.5 * np.sum(spectrum * x**2),
        }
        for problem, value in expected.items():
            assert float(problem.value(theta)) == pytest.approx(value, rel=1e-12, abs=1e-12)

    def test_rosenbrock_gradient(self):
        problem = Rosenbrock(dim=8)
        problem(None).backward()
        assert problem.theta.grad is not None
        expected = rosen_der(problem.theta.detach().numpy()) / 7
        np.testing.assert_allclose(problem.theta.grad.numpy(), expected)

    def test_quadratic_gradient_and_condition(self):
        problem = Quadratic(dim=8, condition=50.0)
        problem(None).backward()
        assert problem.theta.grad is not None
        assert torch.equal(problem.theta.grad, problem.eigenvalues * problem.theta.detach())
        assert float(problem.eigenvalues[0]) == pytest.approx(1 / 50)
        assert float(problem.eigenvalues[-1]) == 1.0

    def test_logistic_minimum_is_what_scipy_finds(self):
        problem = LogisticBreastCancer(l2=1e-2)
        parameters = list(problem.parameters())

        def loss_and_gradient(x):
            values = torch.tensor(x)
            with torch.no_grad():
                problem.weight.copy_(values[:-1])
                problem.bias.copy_(values[-1])
            loss = problem(None)
            return loss.item(), torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]
            ).numpy()

        found = minimize(loss_and_gradient, np.zeros(31), jac=True, method="BFGS", options={"gtol": 1e-8})
        assert found.fun == pytest.approx(problem.minimum, rel=1e-12)


class TestDigits:
    def test_an_epoch_shows_no_digit_twice(self):
        problem = DigitsMLP(batch_size=100)
        inputs = torch.cat([batch[0] for batch in islice(problem.batches(), 14)])
        rows = {tuple(row) for row in inputs.tolist()}
        assert len(rows) == 1400

    def test_two_epochs_differ(self):
        problem = DigitsMLP(batch_size=1437)
        first, second = islice(problem.batches(), 2)
        assert not torch.equal(first[1], second[1])
        assert torch.equal(first[1].sort().values, second[1].sort().values)

    def test_the_split_is_the_same_for_every_seed(self):
        assert torch.equal(DigitsMLP(seed=0).test_inputs, DigitsMLP(seed=1).test_inputs)

    def test_learns(self):
        problem = DigitsMLP()
        untrained = problem.test_error()
        optimizer = torch.optim.Adam(problem.parameters(), lr=0.01)
        for batch in islice(problem.batches(), 100):
            optimizer.zero_grad()
            problem(batch).backward()
            optimizer.step()
        assert untrained > 0.7
        assert problem.test_error() < 0.15

    def test_evaluates_all_training_digits(self):
        problem = DigitsMLP(batch_size=1437)
        assert problem(next(problem.batches())).item() == pytest.approx(problem.evaluate(), rel=1e-5)


REFUSALS = {
    "unknown": (lambda: make_problem("nope"), "'nope' is not one of sphere, ackley"),
    "dim of a data set": (lambda: make_problem("digits-mlp", dim=3), "digits-mlp has no dim .* batch_size"),
    "noise of a data set": (
        lambda: make_problem("logistic-breast-cancer", noise=0.1),
        "no noise to choose; it takes nothing but the seed",
    ),
    "batches of a function": (lambda: make_problem("sphere", batch_size=3), "sphere has no batch_size"),
    "half a dimension": (
        lambda: Sphere(dim=2.5),  # pyright: ignore[reportArgumentType]
        "Sphere: dim must be an integer of at least 1, got 2.5",
    ),
    "no dimension": (lambda: Sphere(dim=0), "Sphere: dim must be an integer of at least 1, got 0"),
    "one dimension": (lambda: Rosenbrock(dim=1), "Rosenbrock: dim must be an integer of at least 2, got 1"),
    "negative noise": (lambda: Ackley(dim=2, noise=-1), "Ackley: noise must be .* got -1"),
    "noise that is not a number": (lambda: Ackley(dim=2, noise=math.nan), "Ackley: noise"),
    "condition": (lambda: Quadratic(dim=2, condition=0.5), "Quadratic: condition must be .* got 0.5"),
    "seed": (lambda: Sphere(dim=2, seed=-1), "Sphere: seed must be .* got -1"),
    "l2": (lambda: LogisticBreastCancer(l2=0), "LogisticBreastCancer: l2 must be positive"),
    "batch size": (lambda: DigitsMLP(batch_size=1438), "batch_size must be between 1 and 1437, got 1438"),
}


@pytest.mark.parametrize(("build", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_with_a_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["logistic-breast-cancer", "digits-mlp"])
def test_without_scikit_learn_says_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(tabular, "breast_cancer", tabular.breast_cancer.__wrapped__)
    monkeypatch.setattr(tabular, "_digits", tabular._digits.__wrapped__)
    with pytest.raises(ModuleNotFoundError, match=r"pip install optex\[studies\]") as caught:
        make_problem(name)
    assert "\n" not in str(caught.value)


def test_functions_default_to_double_precision():
    assert all(build(dim=3).theta.dtype == torch.float64 for build in FUNCTIONS.values())
    assert all(isinstance(build, type) and issubclass(build, Function) for build in FUNCTIONS.values())
