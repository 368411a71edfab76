"""``equality_method``: what ``scipy.optimize.minimize`` calls, with derivatives given or by differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
from scipy.optimize import LinearConstraint, NonlinearConstraint, OptimizeResult, approx_fprime

from optex.checks import shown
from optex.solvers.equality.derivatives import Array, numbers
from optex.solvers.equality.function import minimize_equality

__all__ = ["equality_method"]

_OWNER: Final = "equality_method"
_FIRST: Final = float(np.finfo(np.float64).eps ** (1 / 2))
_SECOND: Final = float(np.finfo(np.float64).eps ** (1 / 4))


def equality_method(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    jac: Callable[..., Any] | None = None,
    hess: Callable[..., Any] | None = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Callable[..., Any] | None = None,
    **options: Any,
) -> OptimizeResult:
    """:func:`minimize_equality` as ``scipy.optimize.minimize(..., method=optex.equality_method)`` calls it.

    Functions are SciPy's: NumPy in, NumPy out. Derivatives that are not given are differences: ∂F/∂x_i ≈
    (F(x + h e_i) - F(x)) / h with h = √ε, n evaluations; second derivatives are differences of first ones where
    those are given, and otherwise of values, four to a pair of coordinates, with h = ε^¼ max(1, |x_i|): some
    2 n² evaluations. Differences limit what ``tol`` can be to some 1e-6.

    Args:
        fun, x0, args, jac, hess, callback: as in SciPy.
        hessp: refused; pass hess.
        bounds: refused.
        constraints: one or a sequence, equalities all: dicts ``{"type": "eq", "fun": ..., "jac": ..., "args":
            ...}``, where ``"hess"``, a function of x and v for Σ_i v_i ∇²c_i, is understood as well;
            ``NonlinearConstraint`` and ``LinearConstraint`` with lb = ub.
        options: other arguments of :func:`minimize_equality`; ``tol`` of ``minimize`` is its ``tol``.

    Raises:
        TypeError, ValueError: there is a bound or an inequality, or as in :func:`minimize_equality`.
        RankDeficientError, NonFiniteError: as in :func:`minimize_equality`.

    >>> import optex
    >>> from scipy.optimize import minimize, rosen
    >>> circle = {"type": "eq", "fun": lambda x: x @ x - 1}
    >>> result = minimize(rosen, [0.5, 0.5], method=optex.equality_method, constraints=circle)
    >>> result.success, result.x.round(4)
    (True, array([0.7864, 0.6177]))
    """
    if hessp is not None:
        raise ValueError(f"{_OWNER}: hessp is not used, the Newton system is dense; pass hess, or leave it out")
    if bounds is not None:
        raise ValueError(f"{_OWNER}: bounds cannot be kept; use method='SLSQP' or method='trust-constr'")
    for name in ("constraint_jac", "constraint_hess"):
        if name in options:
            raise TypeError(f"{_OWNER}: {name} is no option; the constraint's dict has 'jac' and 'hess'")
    start = np.atleast_1d(numbers(x0, "x0"))
    arguments = args if isinstance(args, tuple) else (args,)
    given = constraints if isinstance(constraints, (list, tuple)) else [constraints]
    parts = [_read(constraint, start) for constraint in given]
    if not parts:
        raise ValueError(f"{_OWNER}: there are no constraints; use another method, as 'BFGS' or 'trust-exact'")
    objective = _Function(fun, jac, hess, arguments)
    return minimize_equality(
        objective.value,
        lambda x: np.concatenate([part.value(x) for part in parts]),
        start,
        jac=objective.jacobian,
        hess=lambda x: objective.hessian(x, np.ones(1)),
        constraint_jac=lambda x: np.concatenate([part.jacobian(x) for part in parts]),
        constraint_hess=partial(_sum_of_hessians, parts),
        callback=callback,
        **options,
    )


class _Function:
    """F: ℝⁿ → ℝᵏ of NumPy's, and its derivatives: given, or by differences."""

    def __init__(
        self,
        function: Callable[..., Any],
        jac: Any = None,
        hess: Any = None,
        args: tuple[Any, ...] = (),
        aim: float | Array = 0.0,  # [] or [k]
    ) -> None:
        self._function, self._args, self._aim = function, args, aim
        self._jac = jac if callable(jac) else None
        self._hess = hess if callable(hess) else None
        self._weighs = False
        self.size = 0  # k, of the last value

    @classmethod
    def weighted(
        cls, function: Any, jac: Any, hess: Any, args: tuple[Any, ...] = (), aim: float | Array = 0.0
    ) -> _Function:
        """The function of a constraint, whose ``hess`` gets weights."""
        made = cls(function, jac, hess, args, aim)
        made._weighs = True
        return made

    def value(
        self,
        x: Array,  # [n]
    ) -> Array:  # [k]
        answer = numbers(self._function(x.copy(), *self._args), "a function").reshape(-1) - self._aim
        self.size = answer.size
        return answer

    def jacobian(
        self,
        x: Array,  # [n]
    ) -> Array:  # [k, n]
        if self._jac is None:
            return _first_differences(self.value, x)
        return numbers(self._jac(x.copy(), *self._args), "jac").reshape(-1, x.size)

    def hessian(
        self,
        x: Array,  # [n]
        weights: Array,  # [k]
    ) -> Array:  # [n, n]
        """The Hessian of the weighted sum."""
        if self._hess is not None:
            extra = (weights.copy(),) if self._weighs else ()
            answer = numbers(self._hess(x.copy(), *extra, *self._args), "hess", (x.size, x.size))
            return answer if self._weighs else answer * weights[0]
        if self._jac is not None:
            rows = _first_differences(lambda z: weights @ self.jacobian(z), x)
            return (rows + rows.T) / 2
        return _second_differences(lambda z: float(weights @ self.value(z)), x)


def _first_differences(
    function: Callable[[Array], Array],
    x: Array,  # [n]
) -> Array:  # [k, n]
    return np.asarray(approx_fprime(x, function, _FIRST), dtype=np.float64).reshape(-1, x.size)


def _second_differences(
    function: Callable[[Array], float],
    x: Array,  # [n]
) -> Array:  # [n, n]
    """(F(+,+) - F(+,-) - F(-,+) + F(-,-)) / (4 h_i h_j) for each pair of coordinates."""
    steps = np.diag(_SECOND * np.maximum(1.0, np.abs(x)))
    matrix = np.empty((x.size, x.size))
    for i, first in enumerate(steps):
        for j, second in enumerate(steps[: i + 1]):
            ends = (function(x + a * first + b * second) * a * b for a in (1, -1) for b in (1, -1))
            matrix[i, j] = matrix[j, i] = sum(ends) / (4 * first[i] * second[j])
    return matrix


def _sum_of_hessians(
    parts: list[_Function],
    x: Array,  # [n]
    weights: Array,  # [m]
) -> Array:  # [n, n]
    shares = np.split(weights, np.cumsum([part.size for part in parts])[:-1])
    return sum((part.hessian(x, share) for part, share in zip(parts, shares, strict=True)), np.zeros(1))


def _read(
    constraint: Any,
    start: Array,  # [n]
) -> _Function:
    """One constraint in SciPy's forms.

    Raises:
        TypeError, ValueError: it has none of these forms, or is no equality.
    """
    if isinstance(constraint, LinearConstraint):
        matrix = np.atleast_2d(numbers(constraint.A, "A"))
        _check_equal(constraint.lb, constraint.ub)
        zeros = np.zeros((start.size, start.size))
        aim = np.broadcast_to(numbers(constraint.lb, "lb"), matrix.shape[:1])
        return _Function.weighted(lambda x: matrix @ x, lambda _: matrix, lambda _, __: zeros, aim=aim)
    if isinstance(constraint, NonlinearConstraint):
        _check_equal(constraint.lb, constraint.ub)
        aim = numbers(constraint.lb, "lb")
        return _Function.weighted(constraint.fun, constraint.jac, constraint.hess, aim=aim)
    if not isinstance(constraint, dict) or not callable(constraint.get("fun")):
        raise TypeError(
            f"{_OWNER}: constraints must be dicts with 'type' and 'fun', NonlinearConstraint or "
            f"LinearConstraint, got {shown(constraint)}"
        )
    if constraint.get("type") != "eq":
        raise ValueError(
            f"{_OWNER}: constraints must have type 'eq', got {shown(constraint.get('type'))}; {_INEQUALITY}"
        )
    args = constraint.get("args", ())
    return _Function.weighted(constraint["fun"], constraint.get("jac"), constraint.get("hess"), tuple(args))


_INEQUALITY: Final = "inequalities cannot be kept: use method='SLSQP' or method='trust-constr'"


def _check_equal(lb: Any, ub: Any) -> None:
    if not bool(np.all(np.equal(lb, ub))):
        raise ValueError(f"{_OWNER}: constraints must be equalities, lb = ub, got {lb} and {ub}; {_INEQUALITY}")
