"""``minimize_equality``: AdaSketch-Newton.

Hong, Na, Mahoney, Kolar: *Constrained Optimization via Exact Augmented Lagrangian and Randomized Iterative
Sketching*, ICML 2023, arXiv 2305.18379.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult

from optex.callback import Callback
from optex.checks import check_callable, check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.solvers.equality.derivatives import OWNER, Array, numbers, read_form, smooth
from optex.solvers.equality.linear import LinearSolver, check_solver
from optex.solvers.equality.newton import Constants, Merit, Newton, Point
from optex.solvers.outcome import check_tolerance

__all__ = ["minimize_equality"]


def minimize_equality(
    f: Callable[..., Any],
    c: Callable[..., Any],
    x0: Any,
    lam0: Any = None,
    *,
    jac: Callable[..., Any] | None = None,
    hess: Callable[..., Any] | None = None,
    constraint_jac: Callable[..., Any] | None = None,
    constraint_hess: Callable[..., Any] | None = None,
    linear_solver: LinearSolver = "minres",
    tol: float = 1e-4,
    maxiter: int = 10_000,
    eta1: float = 1.0,
    eta2: float = 0.1,
    delta: float = 0.1,
    beta: float = 0.1,
    nu: float = 1.5,
    theta: float = 1.0,
    xi_B: float = 0.1,
    inner_maxiter: int = 100_000,
    seed: int | np.random.Generator | None = None,
    callback: Callable[..., Any] | None = None,
) -> OptimizeResult:
    """Minimise f(x) with c(x) = 0 by AdaSketch-Newton: inexact Newton steps on an exact augmented Lagrangian.

    With L(x, λ) = f(x) + λ'c(x) and J the Jacobian of c [m, n], an iteration solves, not exactly,

        [ B  J' ] [ Δx ]     [ ∇_x L ]
        [ J  0  ] [ Δλ ] = - [   c   ]          K d = r

    B is ∇²_xx L, plus (ξ_B + ‖∇²_xx L‖) I where it is not positive on the null space of J. The inner solver
    goes on until ‖K‖ Ψ ‖K d - r‖ ≤ θ δ ‖r‖ with Ψ = 20 max(‖B‖², 1) / (min(σ_min(J)², 1) min(ξ_B, 1)), a bound
    of the inverse. While d does not descend, slope > -η₂/2 ‖r‖², on the merit function

        f + λ'c + η₁/2 ‖c‖² + η₂/2 ‖∇_x L‖²

    η₁ ← ν² η₁, η₂ ← η₂ / ν and δ ← δ / ν⁴; δ is also kept below (½ - β) η₂ / ((1 + η₁ + η₂) Υ² Ψ²), Υ the
    largest of ‖J‖, ‖∇²_xx L‖ and 1, and above 1e-6. Then (x, λ) moves by α d, α halved from 1 on until the
    merit falls by β times what its slope promises. Norms of matrices are Frobenius norms.

    The matrices are dense, in float64 and in main memory: n + m of up to some thousands.

    Args:
        f: of x to a scalar. Without ``jac`` and ``hess`` it is a torch function, for autograd, whatever x0 is.
        c: of x to m numbers, 1 ≤ m ≤ n; a torch function as well unless its derivatives are given.
        x0: where to start, finite. A floating-point tensor of any shape, whose shape, dtype and device points
            have then; anything else is taken as a float64 array [n]: torch functions get float64 tensors of it,
            others arrays.
        lam0: λ to start with [m]; 0 by default.
        jac, hess: ∇f(x) [n] and ∇²f(x) [n, n], both or neither.
        constraint_jac, constraint_hess: J(x) [m, n] and Σ_i v_i ∇²c_i(x) as a function of x and v [m], as of
            ``scipy.optimize.NonlinearConstraint``; both or neither.
        linear_solver: ``"minres"``, SciPy's; ``"direct"``, LAPACK's; and the paper's ``"gv"``, sketches by
            Gaussian vectors, and ``"rk"``, randomized Kaczmarz. The last two take thousands of iterations where
            K is badly conditioned: the accuracy asked for is close to 1e-10 there.
        tol: the largest KKT residual ‖(∇_x L, c)‖ to end with, not relative to anything; below 1.
        maxiter: most iterations.
        eta1, eta2, delta: η₁, η₂ and δ to start with; positive, δ below 1.
        beta: β in (0, ½).
        nu: ν above 1.
        theta: θ in (0, 1].
        xi_B: ξ_B, positive.
        inner_maxiter: most iterations of the inner solver before the slope is looked at.
        seed: of the sketches, or a generator for them; None draws a seed.
        callback: after every iteration ``callback(intermediate_result)``, if that is its parameter's name, with
            the result that stopping now would give, else ``callback(x)``. It stops the run by raising
            ``StopIteration`` or returning True.

    Returns:
        ``scipy.optimize.OptimizeResult``: x and ``lam`` (λ; signs as of trust-constr's ``v``), ``fun``, ``jac``
        (∇f), ``constr`` (c), ``constr_violation`` (largest |c_i|), ``kkt``, ``step`` (the last α), ``eta1``,
        ``eta2``, ``delta``, ``nit``, ``inner_nit``, ``nfev``, ``ncev``, ``nhev``, success, status, message. A
        run that does not converge returns the iterate of least KKT residual; if the constraints seem
        infeasible, which the message then says, that of least ‖c‖.

    Raises:
        TypeError, ValueError: an argument cannot work, or a function answers in a form that cannot.
        RankDeficientError: the rows of J are dependent at x0; later that is a status.
        NonFiniteError: f, c or a derivative is not finite at x0; later that is a status.

    Source: Hong, Na, Mahoney, Kolar, ICML 2023, arXiv 2305.18379; the defaults are the released code's.

    >>> import numpy as np
    >>> import optex
    >>> def f(x):
    ...     return (1 + x[0] ** 2).log() - x[1]
    >>> def c(x):
    ...     return (1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4
    >>> result = optex.minimize_equality(f, c, [2.0, 2.0])
    >>> result.success, result.nit, bool(np.abs(result.x - [0, 3**0.5]).max() < 1e-5)
    (True, 10, True)
    """
    solver = check_solver(linear_solver)
    form, start = read_form(x0)
    tolerance = check_tolerance(OWNER, tol, form.dtype)
    limit = check_integer(OWNER, "maxiter", maxiter)
    constants = Constants(
        beta=check_number(OWNER, "beta", beta, open_below=True, most=0.5, open_above=True),
        nu=check_number(OWNER, "nu", nu, least=1.0, open_below=True),
        theta=check_number(OWNER, "theta", theta, open_below=True, most=1.0),
        xi=check_number(OWNER, "xi_B", xi_B, open_below=True),
        inner_maxiter=check_integer(OWNER, "inner_maxiter", inner_maxiter),
    )
    merit = Merit(
        check_number(OWNER, "eta1", eta1, open_below=True),
        check_number(OWNER, "eta2", eta2, open_below=True),
    )
    first = check_number(OWNER, "delta", delta, open_below=True, most=1.0, open_above=True)
    objective = smooth("f", f, form, jac, _unweighted(hess), ("jac", "hess"))
    constraints = smooth("c", c, form, constraint_jac, constraint_hess, ("constraint_jac", "constraint_hess"))
    check_callable(OWNER, "callback", callback, optional=True)
    told = Callback(callback)
    newton = Newton(objective, constraints, form, solver, merit, first, constants, _generator(seed))
    return newton.run(
        _start(newton, start, lam0), tolerance, limit, lambda result: told.stops(lambda: result) is not None
    )


def _unweighted(hess: Any) -> Any:
    """f's Hessian with the weight that constraints' have."""
    if not callable(hess):
        return hess

    def weighted(x: Any, weights: Any) -> Any:
        answer: Any = hess(x)
        return answer * float(weights[0])

    return weighted


def _start(
    newton: Newton,
    x0: Array,  # [n]
    lam0: Any,
) -> Point:
    """The first point.

    Raises:
        TypeError, ValueError: f is no scalar, c has no constraint or too many, or lam0 does not fit.
        NonFiniteError: f, c or a derivative is not finite.
    """
    point = newton.expand(x0, None)
    m, n = point.c.value.size, x0.size
    if point.f.value.size != 1:
        raise ValueError(
            f"{OWNER}: f must return a scalar, got {point.f.value.size} numbers; sum or average it"
        )
    if m == 0:
        raise ValueError(f"{OWNER}: c returns no constraint; use scipy.optimize.minimize or optex.minimize")
    if m > n:
        raise ValueError(
            f"{OWNER}: c returns {m} constraints on {n} variables; drop those "
            "that follow from others, or fit them with scipy.optimize.least_squares"
        )
    if lam0 is not None:
        lam = numbers(lam0, "lam0").reshape(-1)
        if lam.size != m or not np.isfinite(lam).all():
            raise ValueError(f"{OWNER}: lam0 must be {m} finite numbers, one a constraint, got {shown(lam0)}")
        point = Point(x0, lam, point.f, point.c)
    if not point.finite:
        raise NonFiniteError(
            f"{OWNER}: f, c or a derivative of theirs is NaN or infinite at x0; start where they are defined"
        )
    return point


def _generator(seed: Any) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(None if seed is None else check_integer(OWNER, "seed", seed, least=0))
