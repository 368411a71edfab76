"""The iteration: a model's directions, made conjugate to the last ones, with the best step along each."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor, nn

from optex.checks import check_integer
from optex.solvers.dcdm.operator import Product, product_of
from optex.solvers.outcome import Status, check_tolerance, outcome

__all__ = ["dcdm"]

_OWNER: Final = "dcdm"
_USELESS: Final = 1e-12  # of a direction's length, or of its cosine with the residual: beneath it is rounding
_FLAT: Final = 1e-14  # of the largest qᵀAq / qᵀq that was seen
_INDEFINITE: Final = 1e-8  # of the same: more than this beneath 0 is no rounding
_PARALLEL: Final = 1e-10
_SINGULAR: Final = (
    "Along the residual qᵀAq = {curvature:.2g} with qᵀq = 1: A is not positive definite, or it is singular and"
    " b is not in its range (for a Neumann problem, subtract b's mean); x is the best iterate."
)


def dcdm(
    A: Any,  # [n, n], or of b's shape to b's shape
    b: Any,  # [...], n numbers
    direction: Callable[[Any], Any],  # of b's shape to b's shape
    *,
    memory: int = 2,
    tol: float = 1e-4,
    maxiter: int = 100,
    x0: Any = None,  # of b's shape
    patience: int | None = 10,
    callback: Callable[..., Any] | None = None,
) -> OptimizeResult:
    """Solve A x = b, A symmetric and positive definite, along directions that a model proposes.

    An iteration asks the model for q = f(r / ‖r‖), makes it A-orthogonal to the last ``memory`` directions p_j,
    and goes to the least error in A's norm along it:

        q ← q - Σ_j p_j (qᵀ A p_j) / (p_jᵀ A p_j)
        x ← x + q (qᵀ r) / (qᵀ A q),   r ← r - A q (qᵀ r) / (qᵀ A q)

    The model that returns what it is given makes this the method of conjugate gradients; one that returns
    c A⁻¹ r ends after one iteration. It is asked for a direction alone: neither length nor sign matter.

    The residual takes the model's place where the model's q is of no use: where qᵀ A q is not positive, q is
    orthogonal to r, or q lies in the span of the last directions. If a model's directions do not halve the
    residual's norm in ``patience`` iterations, the rest of the run is conjugate gradients.

    Args:
        A: tensor, dense or sparse; array; SciPy sparse matrix; ``LinearOperator``; or a function of a vector of
            b's shape, and float64. Positive semidefinite serves as well, where b is in its range.
        b: right-hand side, of any shape; tensor or array. The result has its kind, shape, dtype and device.
        direction: f. A module is called without gradients with a tensor of b's shape in the dtype and on the
            device of its parameters (put it into ``eval`` mode, where that matters); any other function with a
            float64 tensor or array, as b is one.
        memory: directions that a new one is made conjugate to, 0 or more. The paper's: 2.
        tol: of ‖b - A x‖ / ‖b‖. The paper's: 1e-4.
        maxiter: iterations at most. The paper's: 100.
        x0: where to start, 0 if None.
        patience: iterations in which the model has to halve the residual; None trusts it, as the paper does.
        callback: called after every iteration with ``intermediate_result=`` x, ``nit`` and ``residual``; ends
            the run by raising ``StopIteration`` or by returning True.

    Returns:
        SciPy's result. Beside x, ``success``, ``status`` (:class:`~optex.solvers.Status`), ``message`` and
        ``nit``: ``residual`` ‖b - A x‖ / ‖b‖, ``matvecs`` products with A, ``directions`` that the model was
        asked for, and ``fallbacks``, iterations along the residual in place of the model's direction. A
        convergence is confirmed by b - A x itself, and ``residual`` is its own; where that falls no more, the
        status is STALLED. A run that did not converge returns the iterate with the smallest residual by the
        recurrence. After STOPPED and NON_FINITE that is the residual told.

    Raises:
        TypeError: A, b, direction or callback has the wrong type.
        ValueError: A is not square, not symmetric or of another size; b or x0 hold numbers that are not finite;
            a model or an operator returns another shape.
        NotPositiveDefiniteError: the diagonal of a matrix has a negative entry.

    Source: Kaneda et al., ICML 2023, arXiv 2205.10763; the fallbacks are ours.

    >>> A = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    >>> result = dcdm(A, torch.tensor([1.0, 0.0]), lambda r: r)  # conjugate gradients
    >>> result.x, result.nit
    (tensor([0.6667, 0.3333]), 2)
    >>> dcdm(A, torch.tensor([1.0, 0.0]), lambda r: torch.linalg.solve(A.double(), r)).nit
    1
    """
    form = _Form(b)
    memory = check_integer(_OWNER, "memory", memory, least=0)
    tol = check_tolerance(_OWNER, tol, form.dtype)
    maxiter = check_integer(_OWNER, "maxiter", maxiter)
    patience = None if patience is None else check_integer(_OWNER, "patience", patience)
    for name, value in (("direction", direction), ("callback", callback)):
        if not (callable(value) or (name == "callback" and value is None)):
            raise TypeError(f"{_OWNER}: {name} must be callable, got {type(value).__name__}")
    product = product_of(_OWNER, A, form.shape, numpy=form.numpy, device=form.device)
    start = None if x0 is None else form.vector("x0", x0)
    if form.scale == 0:
        return outcome(
            form.like(form.right), Status.CONVERGED, nit=0, residual=0.0, matvecs=0, directions=0, fallbacks=0
        )
    solve = _Solve(product, _Model(direction, form), form.right, start, memory, patience)
    status = solve.run(tol, maxiter, None if callback is None else _Callback(callback, form))
    norm, x = solve.result(status)
    return outcome(
        form.like(x),
        status,
        nit=solve.nit,
        message=solve.message if status == Status.BREAKDOWN else "",
        residual=norm / solve.right_norm,
        matvecs=solve.matvecs,
        directions=solve.model.asked,
        fallbacks=solve.fallbacks,
    )


class _Form:
    """b's kind, shape, dtype and device, and conversions to float64 vectors [n] and back.

    Vectors are divided by a power of two near b's largest entry, so that no square over- or underflows.
    """

    def __init__(self, b: Any) -> None:
        self.numpy = not isinstance(b, Tensor)
        given = self._tensor("b", b)
        self.shape = tuple(given.shape)
        self.device = given.device
        self.dtype = given.dtype if given.is_floating_point() else torch.float64
        if given.numel() == 0:
            raise ValueError(f"{_OWNER}: b is empty, of shape {self.shape}")
        self.scale = 1.0
        whole = self.vector("b", b)
        largest = float(whole.abs().max())
        self.scale = 2.0 ** (math.frexp(largest)[1] - 1) if largest > 0 else 0.0
        self.right = whole / self.scale if largest > 0 else whole

    @staticmethod
    def _tensor(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise TypeError(f"{_OWNER}: {name} must be a real array or tensor, got dtype {array.dtype}")
            value = torch.from_numpy(np.array(array, dtype=None if array.dtype in _FLOATS else np.float64))
        if value.is_complex() or value.layout is not torch.strided:
            raise TypeError(f"{_OWNER}: {name} must be real and dense, got {value.dtype} and {value.layout}")
        return value.detach()

    def vector(self, name: str, value: Any) -> Tensor:  # [n] float64
        found = self._tensor(name, value)
        if tuple(found.shape) != self.shape:
            raise ValueError(f"{_OWNER}: {name} must have b's shape {self.shape}, got {tuple(found.shape)}")
        if not bool(found.isfinite().all()):
            raise ValueError(f"{_OWNER}: {name} holds numbers that are not finite")
        return found.to(self.device, torch.float64).reshape(-1) / self.scale

    def like(self, vector: Tensor) -> Any:  # [n] float64 to b's form
        found = (vector * (self.scale or 1.0)).to(self.dtype).view(self.shape)
        return found.cpu().numpy() if self.numpy else found


_FLOATS: Final = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


class _Model:
    """The model as a function of vectors [n] in float64."""

    def __init__(self, direction: Callable[[Any], Any], form: _Form) -> None:
        self.direction, self.form, self.asked = direction, form, 0
        self.module = isinstance(direction, nn.Module)
        first = next(direction.parameters(), None) if isinstance(direction, nn.Module) else None
        self.to = (form.device, torch.float64) if first is None else (first.device, first.dtype)

    def __call__(self, unit: Tensor) -> Tensor:  # [n] to [n]
        self.asked += 1
        shaped = unit.view(self.form.shape)
        arrays = self.form.numpy and not self.module
        with torch.no_grad():
            answer = self.direction(shaped.clone().numpy() if arrays else shaped.clone().to(*self.to))
        found = torch.as_tensor(answer)
        if tuple(found.shape) != self.form.shape:
            raise ValueError(
                f"{_OWNER}: direction must return b's shape {self.form.shape}, got {tuple(found.shape)}"
            )
        return found.detach().to(self.form.device, torch.float64).reshape(-1)


class _Callback:
    def __init__(self, callback: Callable[..., Any], form: _Form) -> None:
        self.callback, self.form = callback, form

    def stops(self, solve: _Solve) -> bool:
        now = OptimizeResult(x=self.form.like(solve.x), nit=solve.nit, residual=solve.norm / solve.right_norm)
        try:
            return self.callback(intermediate_result=now) is True
        except StopIteration:
            return True


class _Direction(NamedTuple):
    p: Tensor  # [n]
    Ap: Tensor  # [n]
    curvature: float  # pᵀ A p


class _Solve:
    """A run: x, its residual r by recurrence, and the last directions."""

    def __init__(
        self,
        product: Product,
        model: _Model,
        b: Tensor,  # [n]
        start: Tensor | None,  # [n]
        memory: int,
        patience: int | None,
    ) -> None:
        self.product, self.model, self.b, self.patience = product, model, b, patience
        self.kept: deque[_Direction] = deque(maxlen=memory)
        self.nit = self.matvecs = self.fallbacks = 0
        self.steepest = 0.0  # the largest qᵀAq / qᵀq so far
        self.departed = self.plain = False
        self.message = ""
        self.right_norm = float(torch.linalg.vector_norm(b))
        self.x = torch.zeros_like(b) if start is None else start
        self.r = b if start is None else b - self._times(start)
        self.norm = float(torch.linalg.vector_norm(self.r))
        self.norms = [self.norm]
        self.best = (self.norm, self.x)
        self.confirmed = (math.inf, self.x)  # the last iterate of which b - A x itself is known

    def _times(self, v: Tensor) -> Tensor:
        self.matvecs += 1
        return self.product(v)

    def run(self, tol: float, maxiter: int, callback: _Callback | None) -> Status:
        goal = tol * self.right_norm
        if not math.isfinite(self.norm):
            self.best = (self.right_norm, torch.zeros_like(self.b))
            return Status.NON_FINITE
        while True:
            if self.norm <= goal and (status := self._confirm(goal)) is not None:
                return status
            if self.nit == maxiter:
                return Status.LIMIT
            if (status := self._step()) is not None:
                return status
            if callback is not None and callback.stops(self):
                return Status.STOPPED

    def result(self, status: Status) -> tuple[float, Tensor]:  # x: [n]
        """The residual's norm and x: the last iterate, or the best where the run failed."""
        norm, x = (self.norm, self.x) if status in (Status.CONVERGED, Status.STOPPED) else self.best
        if status in (Status.LIMIT, Status.BREAKDOWN):  # known already, or not worth a product
            norm = float(torch.linalg.vector_norm(self.b - self._times(x)))
        return norm, x

    def _confirm(self, goal: float) -> Status | None:
        """What b - A x itself says; the recurrence's residual drifts from it by rounding."""
        if self.nit == 0:
            return Status.CONVERGED
        residual = self.b - self._times(self.x)
        norm = float(torch.linalg.vector_norm(residual))
        if not math.isfinite(norm):
            return Status.NON_FINITE
        self.r, self.norm = residual, norm
        if norm <= goal:
            return Status.CONVERGED
        if norm > 0.5 * self.confirmed[0]:
            self.best = min((norm, self.x), self.confirmed, key=lambda pair: pair[0])
            return Status.STALLED
        self.confirmed = self.best = norm, self.x
        self.kept.clear()
        return None

    def _step(self) -> Status | None:
        unit = self.r / self.norm
        q = unit if self.plain else self.model(unit)
        if not bool(q.isfinite().all()):
            return Status.NON_FINITE
        length = float(torch.linalg.vector_norm(q))
        aligned = self.plain or (length > 0 and abs(float(q @ unit)) >= (1 - _PARALLEL) * length)
        found = self._conjugate(q, unit)
        if isinstance(found, _Direction):
            self.departed |= not aligned
            self.fallbacks += self.plain
        elif not math.isnan(found):  # the model's direction is of no use
            self.fallbacks += not aligned
            found = self._conjugate(unit, unit)
            if isinstance(found, float) and abs(found) <= _INDEFINITE * self.steepest:
                self.kept.clear()
                found = self._conjugate(unit, unit)
        if isinstance(found, _Direction):
            return self._move(found)
        self.message = _SINGULAR.format(curvature=found)
        return Status.NON_FINITE if math.isnan(found) else Status.BREAKDOWN

    def _conjugate(
        self,
        q: Tensor,  # [n]
        unit: Tensor,  # [n]: the residual's direction
    ) -> _Direction | float:
        """The direction, or the curvature of one that is of no use."""
        length = float(torch.linalg.vector_norm(q))
        if not length > 0:
            return 0.0
        q = q / length
        for p, Ap, curvature in reversed(self.kept):
            q = q - p * (float(q @ Ap) / curvature)
        square = float(q @ q)
        if square <= _USELESS**2 or float(q @ unit) ** 2 <= _USELESS**2 * square:
            return 0.0
        Aq = self._times(q)
        curvature = float(q @ Aq)
        if not (math.isfinite(curvature) and math.isfinite(float(torch.linalg.vector_norm(Aq)))):
            return math.nan
        self.steepest = max(self.steepest, curvature / square)
        if curvature <= _FLAT * self.steepest * square:
            return curvature / square
        return _Direction(q, Aq, curvature)

    def _move(self, found: _Direction) -> Status | None:
        step = float(found.p @ self.r) / found.curvature
        x, r = self.x + step * found.p, self.r - step * found.Ap
        norm = float(torch.linalg.vector_norm(r))
        if not (math.isfinite(norm) and bool(x.isfinite().all())):
            return Status.NON_FINITE
        self.x, self.r, self.norm = x, r, norm
        self.nit += 1
        self.norms.append(norm)
        self.best = min(self.best, (norm, x), key=lambda pair: pair[0])
        self.kept.append(found)
        if self.departed and not self.plain and self._slow():
            self.plain = True
            self.kept.clear()  # conjugate gradients need their first direction to be the residual
        return None

    def _slow(self) -> bool:
        window = self.patience
        return window is not None and self.nit >= window and self.norm > 0.5 * self.norms[-1 - window]
