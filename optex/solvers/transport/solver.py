"""``sparse_ot``: plans with at most k nonzeros a column."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from optex.checks import check_integer, shown
from optex.solvers.outcome import Status, check_tolerance, outcome
from optex.solvers.transport.arguments import TransportProblem
from optex.solvers.transport.ascent import Ascent, Maximum

__all__ = ["sparse_ot"]

_OWNER: Final = "sparse_ot"
# What a batch came to is the first of these that one of its problems came to.
_WORST: Final = (Status.LIMIT, Status.STALLED, Status.CONVERGED)


def sparse_ot(
    a: Any,
    b: Any,
    C: Any,
    gamma: float,
    k: int,
    *,
    form: Literal["semi-dual", "dual"] = "semi-dual",
    tol: float = 1e-9,
    maxiter: int = 5000,
    alpha0: Any = None,
) -> OptimizeResult:
    """Optimal transport with at most k nonzeros in each column of the plan, by maximising a dual.

        primal      min ⟨T, C⟩ + γ/2 ‖T‖²  over T ≥ 0, T 1 = a, Tᵀ 1 = b, ‖T_j‖₀ ≤ k
        semi-dual   max a·α - Σ_j b_j max_p ⟨α - C_j, p⟩ - γ b_j/2 ‖p‖²,  p in the simplex with ‖p‖₀ ≤ k
        dual        max a·α + b·β - Σ_j ‖top-k [α + β_j - C_j]₊‖² / (2 γ)

    In the semi-dual p is the projection of the k largest entries of (α - C_j) / (b_j γ) onto the simplex, and
    T_j = b_j p_j: columns carry their mass exactly. In the dual T_j = top-k [α + β_j - C_j]₊ / γ. Both are
    concave, whereas the primal is not convex: **where k binds, their maximum is a kink**, the plan there has
    at most k nonzeros, and rows do not carry their mass: ``row_error`` says by how much, and the status is
    STALLED. A larger k or a smaller gamma avoids that. Where k does not bind the plan is that of quadratically
    regularised transport, which with small gamma is sparse by itself.

    SciPy's L-BFGS-B maximises, anew where it stops at a kink. Newton's method finds the last digits, because
    the gradient is piecewise linear.

    Args:
        a: masses of the sources, [m] or [..., m]: not negative, summing to 1 (to 1e-6, which is divided out).
        b: masses of the targets, [n] or [..., n], likewise; a target may have none.
        C: costs, [m, n] or [..., m, n], finite; NumPy's or torch's. All is computed in float64 on its device.
            A batch is solved one by one.
        gamma: γ, positive. The plan's entries are differences of C divided by γ, and about 1 / (m n) where it
            is dense: γ is naturally measured in C times m n.
        k: nonzeros a column, 1 to m; of equal ones the first rows are taken.
        form: which of the two is maximised.
        tol: largest error of a row's mass (in the dual of a column's, too) over the largest mass; the value
            may stagnate at tol² of itself before that is reached.
        maxiter: most iterations of a problem.
        alpha0: potentials to start from, [m] or [..., m]; 0 by default.

    Returns:
        ``OptimizeResult`` with the plan as ``x`` [..., m, n], in C's form, and, each with the batch's shape in
        front: ``value``, of the dual; ``cost``, ⟨T, C⟩; ``gap``, ⟨T, C⟩ + γ/2 ‖T‖² - value, negative where rows
        do not carry their mass; ``alpha`` [m] and ``beta`` [n], the potentials; ``row_error`` and
        ``column_error``, ‖T 1 - a‖₁ and ‖Tᵀ 1 - b‖₁; ``nonzeros`` [n]; ``statuses``. ``nit`` and ``nfev`` are
        of the problem with the most.

    Raises:
        TypeError, ValueError: an argument cannot work: masses that are negative or do not add up to 1, costs
            that are not finite, a k with which k n entries cannot serve m rows.

    >>> import numpy as np, optex
    >>> x, y = np.linspace(0, 1, 6), np.linspace(0, 1, 3)
    >>> a, b, C = np.full(6, 1 / 6), np.full(3, 1 / 3), (x[:, None] - y) ** 2
    >>> result = optex.sparse_ot(a, b, C, gamma=0.1, k=3)
    >>> result.success, result.nonzeros, bool(result.row_error < 1e-8), result.x.sum(0).round(6)
    (True, array([2, 2, 2]), True, array([0.333333, 0.333333, 0.333333]))

    Source: Liu, Puigcerver, Blondel, ICLR 2023, arXiv 2209.15466.
    """
    if form not in ("semi-dual", "dual"):
        raise ValueError(f"{_OWNER}: form must be 'semi-dual' or 'dual', got {shown(form)}")
    goal = check_tolerance(_OWNER, tol, torch.float64)
    most = check_integer(_OWNER, "maxiter", maxiter)
    problem = TransportProblem.read(_OWNER, a, b, C, gamma, k)
    starts = _starts(problem, alpha0)
    maxima = [
        Ascent(mass_a, mass_b, costs, problem.gamma, problem.k, form).maximum(start, goal, most)
        for mass_a, mass_b, costs, start in zip(problem.a, problem.b, problem.costs, starts, strict=True)
    ]
    return _answer(problem, maxima)


def _starts(problem: TransportProblem, alpha0: Any) -> Tensor:  # [batch, m]
    if alpha0 is None:
        return torch.zeros_like(problem.a)
    start = alpha0.detach() if isinstance(alpha0, Tensor) else torch.as_tensor(np.asarray(alpha0))
    m = problem.a.shape[-1]
    if start.shape not in ((m,), (*problem.shape, m)) or not bool(start.isfinite().all()):
        raise ValueError(
            f"{_OWNER}: alpha0 must be finite and {[*problem.shape, m]} or {[m]}, got {list(start.shape)}"
        )
    return start.to(problem.a).reshape(-1, m).expand_as(problem.a)


def _answer(problem: TransportProblem, maxima: list[Maximum]) -> OptimizeResult:
    plan = torch.stack([maximum.found.plan for maximum in maxima])  # [batch, n, m]
    value = torch.stack([maximum.found.value for maximum in maxima])
    cost = (plan * problem.costs).sum((1, 2))
    status = next(status for status in _WORST if any(maximum.status == status for maximum in maxima))
    row_error = (plan.sum(1) - problem.a).abs().sum(1)
    figures = {
        "value": value,
        "cost": cost,
        "gap": cost + problem.gamma / 2 * plan.square().sum((1, 2)) - value,
        "alpha": torch.stack([maximum.alpha for maximum in maxima]),
        "beta": torch.stack([maximum.found.beta for maximum in maxima]),
        "row_error": row_error,
        "column_error": (plan.sum(2) - problem.b).abs().sum(1),
        "nonzeros": (plan > 0).sum(2),
        "statuses": torch.tensor([int(maximum.status) for maximum in maxima]),
    }
    message = ""
    if status == Status.STALLED:
        message = (
            "No more progress was made before the tolerance was reached. Rows are off by "
            f"{float(row_error.max()):.2g} in all: if k = {problem.k} binds, no plan of this many has both "
            "marginals at the maximum; raise k or lower gamma."
        )
    return outcome(
        problem.present(plan.transpose(1, 2).contiguous()),
        status,
        nit=max(maximum.nit for maximum in maxima),
        message=message,
        nfev=max(maximum.nfev for maximum in maxima),
        **{name: problem.present(figure) for name, figure in figures.items()},
    )
