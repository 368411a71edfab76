"""The learning rate that ``optex.minimize`` chooses where none is given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import rosen, rosen_der
from torch import Tensor

import optex
from optex.stepping import OPTIMIZERS, default_rate
from optex.studies.problems.more_garbow_hillstrom import FUNCTIONS

START = [-1.2, 1.0, 0.7]


def bowl(x: Any) -> Any:
    return (x**2).sum()


def bowl_gradient(x: Any) -> Any:
    return 2 * x


class Recorded:
    """A function and its gradient, with the points they were asked at."""

    def __init__(self, fun: Any = rosen, jac: Any = rosen_der) -> None:
        self.fun, self.jac = fun, jac
        self.points: list[np.ndarray] = []

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self.points.append(x.copy())
        return float(self.fun(x)), self.jac(x)


# ---------------------------------------------------------------------- the search


@pytest.mark.parametrize("parallelism", [1, 2, 4, 16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_search_brackets_the_best_first_step(parallelism: int, scale: float) -> None:
    # Adam's first step is lr along the sign: to the minimum from 1 · scale, lr = scale.
    recorded = Recorded(bowl, bowl_gradient)
    seen: list[float] = []

    def stop_when_searched(intermediate_result: Any) -> bool:
        seen.append(intermediate_result.nstep)
        return intermediate_result.nstep > 0

    result = optex.minimize(
        recorded, [scale], jac=True, parallelism=parallelism, callback=stop_when_searched, gtol=0
    )
    assert scale / 4 <= 4 * result.lr <= 4 * scale
    trials = [abs(scale - point[0]) for point in recorded.points[1 : 1 + parallelism * (len(seen) - 2)]]
    losses = {rate: (scale - rate) ** 2 for rate in trials}
    assert min(losses, key=lambda rate: losses[rate]) == pytest.approx(4 * result.lr, rel=1e-4)


def test_first_batch_tries_one_rate_for_each_gradient_at_once() -> None:
    recorded = Recorded()
    optex.minimize(recorded, START, jac=True, parallelism=4, maxiter=2)
    gradient = rosen_der(np.array(START))
    assert len(recorded.points) == 5
    for point, rate in zip(recorded.points[1:], 0.01 * 4.0 ** np.array([-2, -1, 0, 1]), strict=True):
        np.testing.assert_allclose(point - START, -rate * np.sign(gradient), rtol=1e-5)


def test_x0_is_evaluated_once() -> None:
    recorded = Recorded()
    result = optex.minimize(recorded, START, jac=True, maxiter=12)
    assert sum(np.array_equal(point, START) for point in recorded.points) == 1
    assert result.nfev == result.njev == len(recorded.points)
    assert result.nit == 12


def test_trials_that_are_not_finite_lose() -> None:
    def cliff(x: np.ndarray) -> tuple[float, np.ndarray]:  # downhill up to a cliff at 0.02
        return (float((x[0] - 0.015) ** 2), 2 * (x - 0.015)) if x[0] < 0.02 else (math.nan, x * math.nan)

    result = optex.minimize(cliff, [0.0], jac=True)
    assert result.success
    assert result.x[0] == pytest.approx(0.015, abs=1e-5)
    assert 0 < result.lr < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_survives_cliffs_wherever_they_are(bad: float) -> None:
    def log_barrier(x: np.ndarray) -> tuple[float, np.ndarray]:
        if (x <= 0).any():
            return bad, np.full_like(x, bad)
        return float((x - np.log(x)).sum()), 1 - 1 / x

    result = optex.minimize(log_barrier, [1e-3, 20.0], jac=True)
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-4)


def test_a_trial_on_a_plateau_above_x0_is_not_a_solution() -> None:
    def hill(x: Tensor) -> Tensor:
        return torch.where(x < 0.001, -x, torch.ones_like(x) * 5.0 + 0 * x).sum()

    result = optex.minimize(hill, [0.0], maxiter=3)
    assert result.fun < 0


def test_stationary_trial_ends_the_run() -> None:
    result = optex.minimize(lambda x: (x - 0.01).square().sum(), [0.0], gtol=1e-6)
    assert (result.status, result.nit, result.nstep) == (0, 2, 0)
    assert result.x[0] == pytest.approx(0.01)


# ---------------------------------------------------------------------- the drive


@pytest.mark.parametrize("number", [5, 16])
@pytest.mark.parametrize("parallelism", [1, 4])
def test_reaches_the_tolerance_on_standard_functions(number: int, parallelism: int) -> None:
    # Beale; Brown and Dennis, where losses of 85822 tell nothing any more long before the gradient is small.
    function = FUNCTIONS[number - 1]
    result = optex.minimize(function, function.start, parallelism=parallelism, maxiter=3000)
    assert result.success
    assert np.abs(result.jac).max() <= 1e-5
    assert result.fun == pytest.approx(function.minima[0], abs=1e-8, rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"muon", "adafactor", "adadelta", "rprop", "asgd"}))
def test_every_named_optimizer_lands_in_a_stretched_bowl(name: str) -> None:
    scales = torch.tensor([1.0, 30.0], dtype=torch.float64)
    result = optex.minimize(lambda x: (scales * (x - 1) ** 2).sum(), [-3.0, 2.5], optimizer=name, tol=1e-4)
    assert result.success
    np.testing.assert_allclose(result.x, 1.0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_named_optimizer_gets_a_rate_and_descends(name: str) -> None:
    start = torch.full((2, 2), 1.5, dtype=torch.float64)  # Muon wants matrices
    result = optex.minimize(bowl, start, optimizer=name, maxiter=40)
    assert result.fun < 1e-2 * bowl(start)
    assert result.lr > 0


def test_goes_back_to_the_best_point_at_a_lower_rate() -> None:
    rates: list[float] = []
    starts: list[np.ndarray] = []
    best: list[np.ndarray] = []
    recorded = Recorded()

    def note(intermediate_result: Any) -> None:
        rates.append(intermediate_result.lr_final)
        best.append(intermediate_result.x)
        starts.append(recorded.points[-min(4, len(recorded.points))])

    optex.minimize(recorded, [-1.2, 1.0], jac=True, stride=1, maxiter=150, callback=note)
    ratios = np.array(rates[1:]) / np.array(rates[:-1])
    cuts = np.flatnonzero(ratios < 0.9)
    assert len(cuts) > 3
    for round_number in cuts[1:]:
        np.testing.assert_array_equal(starts[round_number + 1], best[round_number])
        assert any(ratios[round_number] == pytest.approx(cut) for cut in (0.5, 0.25, 0.1, 0.04, 0.01))
    assert ((ratios < 0.9) | np.isclose(ratios, 1.0) | np.isclose(ratios, 1.1))[5:].all()


@pytest.mark.parametrize("parallelism", [1, 4])
def test_a_rate_that_changes_nothing_ends_the_run(parallelism: int) -> None:
    def shifted(x: Tensor) -> Tensor:
        return (x - math.pi).square().sum() + math.e

    result = optex.minimize(shifted, [1.0], gtol=0, parallelism=parallelism)
    assert result.status in (0, 2)
    assert result.status == 0 or "steps left x as it is" in result.message
    assert result.x[0] == pytest.approx(math.pi, abs=1e-7)


def test_result_is_the_lowest_point_evaluated() -> None:
    recorded = Recorded()
    result = optex.minimize(recorded, START, jac=True, maxiter=60, gtol=0)
    values = [rosen(x) for x in recorded.points]
    assert result.fun == min(values) == rosen(result.x)


# ---------------------------------------------------------------------- who else rules the rate


@pytest.mark.parametrize("lr", [0.001, 0.05])
def test_a_rate_that_is_given_is_kept(lr: float) -> None:
    result = optex.minimize(rosen, START, jac=rosen_der, lr=lr, maxiter=80)
    assert result.lr == result.lr_final == lr


def test_a_scheduler_rules_the_default_rate() -> None:
    def halved(base: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(base, 10, 0.5)

    options: dict[str, Any] = {"jac": rosen_der, "scheduler": halved, "maxiter": 12}
    implicit = optex.minimize(rosen, START, **options)
    explicit = optex.minimize(rosen, START, lr=default_rate("adam"), **options)
    np.testing.assert_array_equal(implicit.x, explicit.x)
    assert implicit.lr == 0.01
    assert implicit.lr_final < 0.01


def test_a_function_builds_the_optimizer_with_its_own_rate() -> None:
    implicit = optex.minimize(rosen, START, jac=rosen_der, optimizer=torch.optim.NAdam, maxiter=12)
    explicit = optex.minimize(rosen, START, jac=rosen_der, optimizer="nadam", lr=2e-3, maxiter=12)
    np.testing.assert_array_equal(implicit.x, explicit.x)
    assert implicit.lr == implicit.lr_final == 2e-3


def test_vectorized_chooses_the_same() -> None:
    def fun(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    one, other = (optex.minimize(fun, START, maxiter=8, evaluator=e) for e in ("sequential", "vectorized"))
    assert one.lr == other.lr
    assert (one.nit, one.nfev) == (other.nit, other.nfev)
    np.testing.assert_allclose(other.x, one.x, rtol=1e-7)


def test_workers_choose_the_same() -> None:
    there = optex.minimize(rosen, START, jac=rosen_der, maxiter=8, workers=map)
    here = optex.minimize(rosen, START, jac=rosen_der, maxiter=8)
    np.testing.assert_array_equal(there.x, here.x)
    assert there.lr == here.lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gets_a_rate_that_descends(dtype: torch.dtype) -> None:
    start = torch.tensor([1.5, -2.0], dtype=dtype)
    result = optex.minimize(bowl, start, maxiter=60)
    assert result.x.dtype == dtype
    assert result.fun < 1e-2


def test_ftol_does_not_stop_the_search() -> None:
    result = optex.minimize(bowl, START, jac=bowl_gradient, ftol=1e-9, gtol=0)
    assert "ftol" in result.message
    assert result.fun < 1e-6
    assert result.nstep > 0


def test_callback_sees_the_search() -> None:
    seen: list[tuple[int, int]] = []

    def note(intermediate_result: Any) -> None:
        seen.append((intermediate_result.nit, intermediate_result.nstep))

    optex.minimize(rosen, START, jac=rosen_der, maxiter=6, callback=note)
    assert [nit for nit, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[0] == (1, 0)
    assert seen[-1][1] > 0
