"""The problems with models of their own: heat conduction, variational inference, a Gaussian process."""

import importlib
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal

from optex.studies.problems import (
    BayesianLogistic,
    GaussianProcessHyperparameters,
    HeatConduction,
    make_problem,
)
from optex.studies.problems.heat import Plate
from optex.studies.problems.images import FashionMNIST
from optex.studies.problems.tabular import breast_cancer, scikit_learn_arrays
from optex.studies.problems.text import Shakespeare


class TestHeat:
    def test_is_the_examples_problem(self, monkeypatch):
        # Written twice, as the example is to be copied whole: two programs that have to agree.
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
        heat = importlib.import_module("heat")
        twin = heat.Misfit(heat.Plate(size=10, steps=8, spacing=3))
        plate = Plate(10, 4, steps=8, spacing=3)
        sys.modules.pop("heat")
        np.testing.assert_array_equal(plate.truth(), twin.plate.truth())
        np.testing.assert_array_equal(plate.readings, twin.readings)
        m = 0.4 * np.random.default_rng(1).standard_normal(100)
        value, gradient = twin(m)
        assert plate.value(m) == pytest.approx(value, rel=1e-12)
        found = plate.value_and_gradient(m, np.arange(4))
        assert found[0] == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(found[1], gradient, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("heaters", [4, 9, 16])
    def test_sampled_gradients_are_the_whole_one_on_average(self, heaters):
        whole = HeatConduction(size=8, heaters=heaters)
        some = HeatConduction(size=8, heaters=heaters, heaters_at_once=1)
        whole(None).backward()
        gradients = []
        for heater in range(heaters):
            (found,) = torch.autograd.grad(some(torch.tensor([heater])), some.log_conductivity)
            gradients.append(found)
        assert whole.log_conductivity.grad is not None
        torch.testing.assert_close(torch.stack(gradients).mean(0), whole.log_conductivity.grad)
        assert some.evaluate() == whole.evaluate() == pytest.approx(whole(None).item())

    def test_heaters_are_drawn_without_replacement_and_evenly(self):
        problem = HeatConduction(size=6, heaters=4, heaters_at_once=3)
        drawn = [batch for batch in islice(problem.batches(), 400) if batch is not None]
        batches = torch.stack(drawn)
        assert batches.shape == (400, 3)
        assert all(len(set(batch)) == 3 for batch in batches.tolist())
        counts = torch.bincount(batches.flatten(), minlength=4)
        assert 260 < counts.min() <= counts.max() < 340  # 300 each; a deviation of 8.7

    def test_the_truth_fits_the_readings(self):
        problem = HeatConduction(size=12)
        start = problem.evaluate()
        with torch.no_grad():
            problem.log_conductivity.copy_(torch.from_numpy(problem.plate.truth()))
        assert 0.4 < problem.evaluate() < 0.8 < start / 10  # half of what noise explains, and the jumps

    def test_points_without_end_have_a_loss_that_is_not_finite(self):
        problem = HeatConduction(size=6)
        with torch.no_grad():
            problem.log_conductivity[3] = math.inf
        assert math.isnan(problem.evaluate())
        assert math.isnan(problem(None).item())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 3}, "HeatConduction: size must be .* got 3"),
            ({"heaters": 5}, "heaters must be 4, 9 or 16, got 5"),
            ({"heaters_at_once": 5}, "heaters_at_once must be .* got 5"),
            ({"heaters_at_once": 0}, "heaters_at_once must be .* got 0"),
        ],
    )
    def test_refuses_with_a_reason(self, options, message):
        with pytest.raises(ValueError, match=message):
            make_problem("heat", **options)


class TestBayesianLogistic:
    def test_the_objective_is_what_the_gradients_sample(self):
        problem = BayesianLogistic(samples=20_000)
        with torch.no_grad():
            losses = torch.stack([problem(batch) for batch in islice(problem.batches(), 5)])
        error = float(losses.std()) / math.sqrt(5)
        assert problem.evaluate() == pytest.approx(float(losses.mean()), abs=5 * error)
        assert error < 1e-2 * problem.evaluate()

    @pytest.mark.parametrize("log_deviation", [-8.0, -2.0, -0.5, 0.5])
    def test_the_quadrature_is_the_integral(self, log_deviation):
        problem = BayesianLogistic()
        with torch.no_grad():
            problem.mean.normal_(generator=torch.Generator().manual_seed(0))
            problem.log_deviation.fill_(log_deviation)
        expected = 0.0
        for row, label in zip(problem.design[:4], problem.labels[:4], strict=True):
            mean = float(row @ problem.mean.detach())
            deviation = math.exp(log_deviation) * float(row.norm())

            def integrand(z, mean=mean, deviation=deviation, label=label):
                density = math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
                logit = mean + deviation * z
                return density * (np.logaddexp(0, logit) - float(label) * logit)

            expected += quad(integrand, -12, 12, epsabs=1e-12, limit=500)[0] / 4
        problem.design, problem.labels = problem.design[:4], problem.labels[:4]
        found = problem.evaluate() - float(problem.divergence().detach()) / 4
        assert found == pytest.approx(expected, rel=1e-6)

    def test_the_divergence_is_torchs(self):
        problem = BayesianLogistic(prior_deviation=0.7, seed=3)
        q = torch.distributions.Normal(problem.mean, problem.log_deviation.exp())
        prior = torch.distributions.Normal(0.0, 0.7)
        expected = torch.distributions.kl_divergence(q, prior).sum()
        torch.testing.assert_close(problem.divergence(), expected)

    def test_draws_as_many_as_it_says(self):
        assert next(BayesianLogistic(samples=7).batches()).shape == (7, 31)
        assert BayesianLogistic().dimension == 62
        assert len(breast_cancer()[1]) == len(BayesianLogistic().labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 0}, "BayesianLogistic: samples must be .* got 0"),
            ({"prior_deviation": 0.0}, "prior_deviation must be positive and finite, got 0.0"),
        ],
    )
    def test_refuses_with_a_reason(self, options, message):
        with pytest.raises(ValueError, match=message):
            BayesianLogistic(**options)


class TestGaussianProcess:
    def test_is_the_density_of_the_targets(self):
        problem = GaussianProcessHyperparameters(seed=2, rows=30)
        inputs, targets = (values[:30] for values in scikit_learn_arrays("load_diabetes", "here"))
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
        targets = (targets - targets.mean()) / targets.std()
        lengths = problem.log_lengthscales.detach().exp().numpy()
        scaled = inputs / lengths
        squares = ((scaled[:, None] - scaled[None]) ** 2).sum(-1)
        signal, noise = (float(p.detach().exp()) for p in (problem.log_signal, problem.log_noise))
        covariance = signal**2 * np.exp(-0.5 * squares) + (noise**2 + 1e-6) * np.eye(30)
        expected = -multivariate_normal(np.zeros(30), covariance).logpdf(targets) / 30
        assert problem.evaluate() == pytest.approx(expected, rel=1e-10)

    def test_a_covariance_that_cannot_be_factorised_has_no_loss(self):
        problem = GaussianProcessHyperparameters(rows=30)
        with torch.no_grad():
            problem.log_signal.fill_(40.0)  # the noise is lost in the rounding
            problem.log_lengthscales.fill_(20.0)
            problem.log_noise.fill_(-40.0)
        assert math.isnan(problem.evaluate())
        problem(None).backward()
        assert problem.log_signal.grad is not None
        assert problem.log_signal.grad.isnan()

    def test_has_twelve_parameters_and_takes_rows(self):
        assert GaussianProcessHyperparameters().dimension == 12
        assert len(GaussianProcessHyperparameters(rows=50).targets) == 50
        with pytest.raises(ValueError, match=r"GaussianProcessHyperparameters: rows must be .* got 443"):
            GaussianProcessHyperparameters(rows=443)


@pytest.mark.usefixtures("made_up_data")
def test_a_test_size_takes_the_first_images():
    whole, part = FashionMNIST(batch_size=10), FashionMNIST(batch_size=10, test_size=10)
    images, labels = part._tensors("test")
    wrong = part.logits(part._prepared(images[:10], labels[:10])[0]).argmax(1) != labels[:10]
    assert part.test_error() == float(wrong.double().mean())
    assert part.test_error() != whole.test_error()
    with pytest.raises(ValueError, match=r"test_size must be .* got 41"):
        make_problem("fashion-mnist", batch_size=10, test_size=41)


@pytest.mark.usefixtures("made_up_data")
def test_a_test_size_takes_some_of_the_text():
    text: dict[str, Any] = {"layers": 1, "heads": 2, "width": 8, "context": 9}
    assert Shakespeare(**text).test_error() != Shakespeare(**text, test_size=2).test_error()
    with pytest.raises(ValueError, match=r"test_size must be .* got 34"):
        make_problem("shakespeare", **text, test_size=34)


def test_plates_that_conduct_beyond_all_measure_are_not_finite():
    problem = make_problem("heat", seed=0, size=8)
    with torch.no_grad():
        next(problem.parameters()).fill_(1e4)
    assert problem.evaluate() == float("inf")
    loss = problem(next(problem.batches()))
    loss.backward()
    assert loss.item() == float("inf")
    gradient = next(problem.parameters()).grad
    assert gradient is not None
    assert gradient.isnan().all()
