"""``cbo_minimize``: consensus-based optimization, particles that move towards their own consensus.

Riedl, Klock, Geldhauser, Fornasier: *Gradient is All You Need?*, arXiv 2306.09778; anisotropic noise: Carrillo,
Jin, Li, Zhu: *A consensus-based global optimization method for high dimensional machine learning problems*,
arXiv 1909.09249.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from numbers import Real
from typing import Any, Literal

import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from optex.callback import Callback
from optex.checks import check_callable, check_integer, check_positive, shown
from optex.errors import NonFiniteError, WorkerLostError, warn
from optex.minimizers.arguments import check_disp
from optex.minimizers.points import Points, read_points
from optex.sources.consensus import Consensus

__all__ = ["cbo_minimize"]

_OWNER = "cbo_minimize"


def cbo_minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    particles: int | None = None,
    spread: float | None = None,
    alpha: float = 100.0,
    sigma: float = 1.6,
    drift: float = 1.0,
    dt: float = 0.01,
    noise: Literal["isotropic", "anisotropic"] = "isotropic",
    vectorized: bool = False,
    workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
    seed: int | None = None,
    callback: Callable[..., Any] | None = None,
    maxiter: int = 250,
    xtol: float = 1e-10,
    disp: bool = False,
) -> OptimizeResult:
    """Minimise a function by consensus-based optimization: values alone, no gradients.

    N particles v_i move by Euler-Maruyama steps towards their consensus c, with noise that grows with the
    distance from it:

        c   = Σ_i w_i v_i,   w_i = exp(-α f(v_i)) / Σ_j exp(-α f(v_j))
        v_i ← v_i - λ dt (v_i - c) + σ √dt D_i ξ_i,   ξ_i ~ N(0, I)

    with D_i = ‖v_i - c‖ for isotropic noise, the diagonal matrix of v_i - c for anisotropic noise. With
    isotropic noise paths of particles contract if λ > σ² (d - 2) / 2, with anisotropic noise for every σ: take
    the latter in more than a few dimensions.

    Args:
        fun: ``fun(x, *args)``, one number; with ``vectorized`` ``fun(points, *args)``, [n] at points [n, d].
            Every call gets a copy of its own. A point where it is NaN or infinite has no weight.
        x0: where to start. [d]: particles are drawn from N(x0, spread² I). [n, d]: the particles themselves. A
            floating-point tensor: ``fun`` gets, and the result holds, tensors of its dtype and device; anything
            else is taken as a float64 array.
        args: further arguments of ``fun``.
        particles: N, at least 2; 200 by default.
        spread: standard deviation of the first particles, positive; 0.5 by default.
        alpha: α, positive, in units of 1 / fun: particles that are worse than the best by much more than 1 / α
            do not count.
        sigma: σ, not negative; 0 does not explore.
        drift: λ, positive.
        dt: length of a step, positive; λ dt is at most 1.
        noise: as above.
        vectorized: as above; all particles are evaluated in one call.
        workers: evaluate the particles of a step at once, as in :func:`optex.minimize`: a number of processes
            (-1: one per core), a ``concurrent.futures.Executor``, or a function like ``map``. A point that gets
            no answer at the second try either counts as one where fun is NaN.
        seed: of the particles' random numbers; None takes them from torch's global generator. The run does not
            depend on ``workers``.
        callback: after every step ``callback(intermediate_result)`` if that is its parameter's name, with the
            result that stopping now would give, else ``callback(x)`` with its x. It stops the run by raising
            ``StopIteration`` or returning True.
        maxiter: most steps, at least 1; a step is N evaluations.
        xtol: stop when no component of a particle is further than ``xtol · max(1, ‖c‖_∞)`` from the consensus:
            nothing moves any more.
        disp: print at the end how it went.

    Returns:
        ``scipy.optimize.OptimizeResult``: ``x`` and ``fun``: the last consensus, which is evaluated, or the
        best particle so far if that is lower; ``consensus`` and ``consensus_fun``;
        ``effective_sample_size`` of the last step, ``1 / Σ w_i²``; ``radius``, the largest distance of a
        component to the consensus; ``population`` [n, d] and ``population_energies`` [n] of the last step,
        ``nit``, ``nfev``, ``nlost`` (points without an answer), ``success``, ``status``, ``message``. Status 0:
        within xtol; 1: maxiter reached, as the paper's runs end; 2: fun is finite at no particle any more; 3:
        workers no longer answer; 99: stopped by ``callback``.

    Raises:
        TypeError, ValueError: an argument cannot work, or ``fun`` answers in a wrong form.
        NonFiniteError: fun is NaN or infinite at all the first particles.
        WorkerLostError: no worker could evaluate the first of them.

    Source: Riedl, Klock, Geldhauser, Fornasier, arXiv 2306.09778; the defaults are those of its figure.

    >>> import numpy as np
    >>> import optex
    >>> def rippled(x):                                           # [n, 2], many local minima, the least at 0
    ...     return (x**2 + 2.5 * (1 - np.cos(2 * np.pi * x))).sum(1)
    >>> result = optex.cbo_minimize(rippled, [4.0, 4.0], vectorized=True, seed=0)
    >>> bool(np.abs(result.consensus).max() < 0.1), result.nfev
    (True, 50001)
    """
    settings = _Settings(alpha, sigma, drift, dt, noise, xtol)
    steps = check_integer(_OWNER, "maxiter", maxiter)
    check_disp(_OWNER, disp)
    check_callable(_OWNER, "callback", callback, optional=True)
    generator = _generator(seed)
    form, start = read_points(_OWNER, x0, particles, spread, generator)
    settings.warn_of_flight(start.shape[1])
    arguments = args if isinstance(args, tuple) else (args,)
    with Points(_OWNER, fun, arguments, form, vectorized=vectorized, workers=workers) as points:
        swarm = _Swarm(points, start, settings, generator)
        result = swarm.until(steps, Callback(callback))
    if disp:
        print(
            f"{result.message}\n         Function value: {result.fun:.6g}\n         Iterations: {result.nit}\n"
            f"         Function evaluations: {result.nfev}\n         Radius: {result.radius:.3g}\n"
            f"         Effective sample size: {result.effective_sample_size:.1f}"
        )
    return result


def _generator(seed: Any) -> torch.Generator:
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return torch.Generator().manual_seed(check_integer(_OWNER, "seed", seed, least=0, most=2**63 - 1))


def _not_negative(name: str, value: Any) -> float:
    nothing = isinstance(value, Real) and not isinstance(value, bool) and value == 0
    return 0.0 if nothing else check_positive(_OWNER, name, value)


class _Settings:
    """The constants of a run, checked."""

    def __init__(self, alpha: Any, sigma: Any, drift: Any, dt: Any, noise: Any, xtol: Any) -> None:
        self.alpha = check_positive(_OWNER, "alpha", alpha)
        self.sigma = _not_negative("sigma", sigma)
        self.drift = check_positive(_OWNER, "drift", drift)
        self.dt = check_positive(_OWNER, "dt", dt)
        self.xtol = _not_negative("xtol", xtol)
        if noise not in ("isotropic", "anisotropic"):
            raise ValueError(f"{_OWNER}: noise must be 'isotropic' or 'anisotropic', got {shown(noise)}")
        self.isotropic = noise == "isotropic"
        if self.drift * self.dt > 1:
            raise ValueError(
                f"{_OWNER}: drift * dt must be at most 1, got {self.drift * self.dt:g}: particles would jump "
                "past their consensus; take a smaller dt"
            )

    def warn_of_flight(self, dimension: int) -> None:
        """Warn where isotropic noise in this dimension drives particles apart."""
        # By Itô's formula log ‖v - c‖ drifts by -λ + σ² (d - 2) / 2 a unit of time where c stands still.
        if self.isotropic and self.sigma * self.sigma * (dimension - 2) >= 2 * self.drift:
            largest = math.sqrt(2 * self.drift / (dimension - 2))
            warn(
                f"{_OWNER}: isotropic noise with sigma = {self.sigma:g} drives particles apart in {dimension} "
                f"dimensions; use noise='anisotropic', or a sigma below {largest:.2g}",
                RuntimeWarning,
            )


class _Swarm:
    """The particles, their values and consensus, and the steps they take."""

    def __init__(self, points: Points, start: Tensor, settings: _Settings, generator: torch.Generator) -> None:
        self._points = points
        self._settings = settings
        self._generator = generator
        self._next = start  # [N, d]
        self._taken = 0
        self._best = math.inf
        self._best_point = start[0]
        self._measure()

    def until(self, maxiter: int, callback: Callback) -> OptimizeResult:
        """Steps until the particles agree, the callback stops them or ``maxiter`` is reached."""
        while True:
            self._move()
            self._taken += 1
            if stopped := callback.stops(self._unfinished):
                return self._ended(99, stopped)
            if self._radius <= self._settings.xtol * max(1.0, float(self._consensus.abs().max())):
                return self._ended(0, "Optimization terminated successfully: the particles are within xtol.")
            if self._taken == maxiter:
                return self._ended(1, "Maximum number of iterations has been exceeded.")
            try:
                self._measure()
            except NonFiniteError as error:
                return self._ended(2, str(error))
            except WorkerLostError as error:
                return self._ended(3, str(error), evaluate=False)

    def _measure(self) -> None:
        """Energies, weights and consensus of the particles where they are now."""
        energies = self._points.values(self._next)
        # A particle at infinity must not draw the consensus there, whatever value fun has at it.
        energies = torch.where(self._next.isfinite().all(1), energies, math.nan)
        agreed = Consensus.of(energies, self._settings.alpha, _OWNER)
        self._particles, self._energies, self._size = self._next, energies, agreed.effective_sample_size
        self._consensus = agreed.mean(self._particles)
        differences = (self._particles - self._consensus).abs()
        self._radius = float(differences[differences.isfinite().all(1)].max())
        self._note(energies, self._particles)

    def _note(
        self,
        energies: Tensor,  # [n]
        points: Tensor,  # [n, d]
    ) -> None:
        ranked = torch.where(energies < math.inf, energies, math.inf)
        least = int(ranked.argmin())
        if float(ranked[least]) < self._best:
            self._best, self._best_point = float(ranked[least]), points[least]

    def _move(self) -> None:
        settings, away = self._settings, self._particles - self._consensus
        shaken = torch.randn(away.shape, generator=self._generator, dtype=torch.float64).to(away)
        reach = torch.linalg.vector_norm(away, dim=1, keepdim=True) if settings.isotropic else away
        kick = settings.sigma * math.sqrt(settings.dt) * reach * shaken
        self._next = self._particles - settings.drift * settings.dt * away + kick

    def _ended(self, status: int, message: str, *, evaluate: bool = True) -> OptimizeResult:
        """The result, with the last consensus evaluated."""
        value = math.nan
        if evaluate:
            point = self._consensus[None]
            try:
                energies = self._points.values(point)
            except WorkerLostError as error:
                return self._ended(3, str(error), evaluate=False)
            value = float(energies[0])
            self._note(energies, point)
        return self._result(status, message, value)

    def _unfinished(self) -> OptimizeResult:
        return self._result(1, "The run has not ended.")

    def _result(self, status: int, message: str, value: float = math.nan) -> OptimizeResult:
        form = self._points.form
        return OptimizeResult(
            x=form.present(self._best_point),
            fun=self._best,
            consensus=form.present(self._consensus),
            consensus_fun=value,
            effective_sample_size=self._size,
            radius=self._radius,
            population=form.present(self._particles),
            population_energies=form.present(self._energies),
            nit=self._taken,
            nfev=self._points.count,
            nlost=self._points.lost,
            success=status == 0,
            status=status,
            message=message,
        )
