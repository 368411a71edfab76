"""``policy_gradient``: train a policy in an environment, by the paper's methods or their rivals.

Fatkhullin, Barakat, Kireeva, He, *Stochastic Policy Gradient Methods: Improved Sample Complexity for
Fisher-non-degenerate Policies*, ICML 2023, arXiv 2302.01734.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.callback import stops_by_result
from optex.checks import check_callable, check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.minimizers.arguments import check_disp
from optex.optimizers import HARPG, NIGT
from optex.sources import Environment, GymnasiumEnvironment, TrajectorySource
from optex.stepping.bases import base_optimizer

__all__ = ["policy_gradient"]

_OWNER: Final = "policy_gradient"
_METHODS: Final = ("n-pg-igt", "harpg", "n-harpg", "pg", "reinforce")
Method = Literal["n-pg-igt", "harpg", "n-harpg", "pg", "reinforce"]


def policy_gradient(
    policy: nn.Module,
    environment: Environment | str,
    method: Method = "n-pg-igt",
    *,
    steps: int = 100,
    environment_steps: int | None = None,
    trajectories: int = 10,
    discount: float = 0.99,
    lr: float | None = None,
    eta0: float = 1.0,
    optimizer: str = "sgd",
    estimator: Literal["gpomdp", "reinforce"] = "gpomdp",
    baseline: bool | None = None,
    seed: int | None = None,
    callback: Callable[[OptimizeResult], Any] | None = None,
    disp: bool = False,
) -> OptimizeResult:
    """Raise a policy's return, step by step, each from trajectories of its own.

    ========== ======================================================================= ====================
    method     a step                                                                  trajectories a step
    ========== ======================================================================= ====================
    n-pg-igt   normalised momentum, gradients at extrapolated points: ``NIGT``         n
    harpg      momentum corrected by a product with the Hessian: ``HARPG``             2 n
    n-harpg    the same, normalised                                                    2 n
    pg         one of ``optimizer`` along the policy gradient                          n
    reinforce  the same, with the other trajectories' mean as baseline                 n
    ========== ======================================================================= ====================

    Args:
        policy: a module that answers observations with a distribution of actions, as
            :class:`~optex.TrajectorySource` has it. It is changed in place.
        environment: to act in; a string is the name of a Gymnasium environment.
        method: as above.
        steps: most steps, at least 1.
        environment_steps: no step begins after as many steps of the environment; None is no limit.
        trajectories: n, for each gradient and for each product with the Hessian.
        discount: γ, in (0, 1]; 0.99 is the paper's.
        lr: the rate, γ₀ of the paper's methods; None is their 0.1, and 0.01 for pg and reinforce.
        eta0: η₀ of the paper's methods, in (0, 1].
        optimizer: of pg and reinforce, a name of ``optex list``.
        estimator: as in :class:`~optex.TrajectorySource`.
        baseline: as there; None is True for reinforce alone.
        seed: of torch's global generator during the run; afterwards the generator is put back. None draws from
            the generator as it is.
        callback: ``callback(result)`` after every step, with the result that stopping now would give; True or
            ``StopIteration`` stops.
        disp: print at the end how it went.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``policy``; ``returns`` (a list: for each step the mean return of its
        trajectories, not discounted) and ``env_steps`` (steps of the environment up to and with these);
        ``discounted``, the same of the discounted returns; ``fun``, minus the last of these; ``nit`` steps;
        ``nenv`` steps of the environment in all; ``success``, ``status`` and ``message``. Status 0: all steps
        taken, or the environment's; 2: something was not finite, and the policy is as before that step; 99:
        stopped by ``callback``. Nothing here knows whether a policy is optimal.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.
        ModuleNotFoundError: ``environment`` is a string, and Gymnasium is not installed.

    Source: Fatkhullin et al., ICML 2023, arXiv 2302.01734.

    >>> import torch, optex
    >>> _ = torch.manual_seed(1)
    >>> policy = optex.GaussianPolicy(1, 1, hidden=(), deviation=0.5)
    >>> result = optex.policy_gradient(policy, optex.LinearQuadratic(), lr=0.2, steps=40, seed=0)
    >>> result.nit, result.nenv, result.returns[-1] > -14
    (40, 8000, True)
    """
    if method not in _METHODS:
        raise ValueError(f"{_OWNER}: method must be one of {', '.join(_METHODS)}, got {shown(method)}")
    check_integer(_OWNER, "steps", steps)
    if environment_steps is not None:
        check_integer(_OWNER, "environment_steps", environment_steps)
    check_disp(_OWNER, disp)
    check_callable(_OWNER, "callback", callback, optional=True)
    task = GymnasiumEnvironment(environment) if isinstance(environment, str) else environment
    source = TrajectorySource(
        policy,
        task,
        trajectories,
        discount,
        estimator=estimator,
        baseline=method == "reinforce" if baseline is None else baseline,
    )
    rule = _rule(source.parameters, method, lr, eta0, optimizer)
    run = _Run(source, rule, method, steps, math.inf if environment_steps is None else environment_steps)
    if seed is None:
        result = run.until_done(callback)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(check_integer(_OWNER, "seed", seed, least=0, most=2**63 - 1))
            result = run.until_done(callback)
    if disp:
        print(
            f"{result.message}\n         Return: {result.returns[-1] if result.returns else math.nan:.6g}\n"
            f"         Iterations: {result.nit}\n         Environment steps: {result.nenv}"
        )
    return result


def _rule(parameters: Sequence[Tensor], method: Method, lr: Any, eta0: Any, optimizer: str) -> Optimizer:
    if lr is not None:
        check_number(_OWNER, "lr", lr)
    if method in ("pg", "reinforce"):
        return base_optimizer(optimizer, parameters, lr=0.01 if lr is None else lr)
    rate = 0.1 if lr is None else lr
    if method == "n-pg-igt":
        return NIGT(parameters, rate, eta0)
    return HARPG(parameters, rate, eta0, normalized=method == "n-harpg")


class _Run:
    """Steps of one method, and what was measured on the way."""

    def __init__(
        self, source: TrajectorySource, rule: Optimizer, method: Method, steps: int, most: float
    ) -> None:
        self._source, self._rule, self._method, self._steps, self._most = source, rule, method, steps, most
        self._returns: list[float] = []
        self._discounted: list[float] = []
        self._env_steps: list[int] = []
        self._taken = 0

    def until_done(self, callback: Callable[[OptimizeResult], Any] | None) -> OptimizeResult:
        while self._taken < self._steps and self._source.environment_steps < self._most:
            kept = [p.detach().clone() for p in self._source.parameters]
            try:
                self._step()
            except NonFiniteError as error:
                self._restore(kept)
                return self._result(2, str(error))
            if not all(bool(p.isfinite().all()) for p in self._source.parameters):
                self._restore(kept)
                return self._result(2, f"The policy is not finite after {self._taken} steps; lower lr.")
            if callback is not None and stops_by_result(callback, self._result(99, "The run has not ended.")):
                return self._result(99, "The callback asked to stop.")
        return self._result(0, "All steps were taken.")

    def _step(self) -> None:
        source, rule = self._source, self._rule
        if isinstance(rule, NIGT):
            with rule.extrapolate():
                self._measure()
        else:
            self._measure()
        if isinstance(rule, HARPG):
            with rule.between() as moved:
                rule.correct(source.hessian_vector(moved))
        rule.step()
        self._taken += 1

    def _measure(self) -> None:
        loss, _ = self._source.gradient(None)
        self._returns.append(self._source.mean_return)
        self._discounted.append(-float(loss))
        self._env_steps.append(self._source.environment_steps)

    @torch.no_grad()
    def _restore(self, kept: list[Tensor]) -> None:
        for p, value in zip(self._source.parameters, kept, strict=True):
            p.copy_(value)

    def _result(self, status: int, message: str) -> OptimizeResult:
        return OptimizeResult(
            policy=self._source.policy,
            method=self._method,
            returns=list(self._returns),
            discounted=list(self._discounted),
            env_steps=list(self._env_steps),
            fun=-self._discounted[-1] if self._discounted else math.nan,
            nit=self._taken,
            nenv=self._source.environment_steps,
            success=status == 0,
            status=status,
            message=message,
        )
