"""Where ``minimize_gns`` gets curvature from: a Hessian, its products, autograd, or the caller's function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from optex.checks import shown
from optex.optimizers.gns import Curvature, DenseCurvature, NoCurvature, ProductCurvature, hessian_product
from optex.optimizers.gns.metric import real_tensor
from optex.sources.functions import PointForm, differentiated

__all__ = ["Second"]


class Second:
    """The curvature at any point, as the arguments of ``minimize_gns`` define it.

    Attributes:
        count: calls of ``hess`` or ``curvature``, and products with the Hessian.

    Raises:
        TypeError, ValueError: no argument defines the curvature, or two do; or a setting is out of range.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        jac: Callable[..., Any] | Literal[True] | None,
        hess: Callable[..., Any] | None,
        hessp: Callable[..., Any] | None,
        curvature: str | Callable[..., Curvature],
        args: tuple[Any, ...],
        form: PointForm,
        tolerance: float,
        iterations: int,
    ) -> None:
        for name, function in (("hess", hess), ("hessp", hessp)):
            if not (function is None or callable(function)):
                raise TypeError(
                    f"minimize_gns: {name} must be a function, got {shown(function)}; there are no finite "
                    "differences"
                )
        if not (callable(curvature) or curvature in ("exact", "none")):
            raise ValueError(
                "minimize_gns: curvature must be 'exact', 'none' or a function of x that returns an "
                f"optex.optimizers.Curvature, got {shown(curvature)}"
            )
        if curvature != "exact" and not (hess is hessp is None):
            raise ValueError("minimize_gns: curvature and hess or hessp both say what H is; leave one out")
        if curvature == "exact" and jac is not None and hess is hessp is None:
            raise ValueError(
                "minimize_gns: there is no Hessian: pass hess=, hessp=, a function as curvature=, or "
                "curvature='none'; or write fun in torch and leave out jac, and autograd has its products"
            )
        ProductCurvature(torch.clone, tolerance=tolerance, iterations=iterations)  # checks both
        self._fun, self._torch = fun, jac is None
        self._hess, self._hessp, self._curvature = hess, hessp, curvature
        self._args, self._form = args, form
        self._limits: dict[str, Any] = {"tolerance": tolerance, "iterations": iterations}
        self.count: int = 0

    def at(
        self,
        point: Tensor,  # [d]
    ) -> Curvature:
        """H at the point.

        Raises:
            TypeError, ValueError: a function answers in a wrong form.
        """
        if callable(self._curvature):
            self.count += 1
            return self._told(self._curvature(self._handed(point), *self._args))
        if self._curvature == "none":
            return NoCurvature()
        if self._hess is not None:
            self.count += 1
            answer = _numbers(self._hess(self._handed(point), *self._args), "hess", point.numel() ** 2)
            return DenseCurvature(answer.reshape(point.numel(), point.numel()).to(point))
        product = self._given(point) if self._hessp is not None else self._by_autograd(point)

        def counted(vector: Tensor) -> Tensor:
            self.count += 1
            return product(vector)

        return ProductCurvature(counted, **self._limits)

    def _handed(
        self,
        values: Tensor,  # [d]
    ) -> Any:  # [...]
        """A copy in the form that ``fun`` gets points in."""
        if not self._torch:
            return self._form.present(values)
        return values.reshape(self._form.shape).to(self._form.dtype, copy=True)

    def _told(self, answer: Any) -> Curvature:
        if not isinstance(answer, Curvature):
            raise TypeError(
                "minimize_gns: curvature must return an optex.optimizers.Curvature, got "
                f"{type(answer).__name__}; a matrix is DenseCurvature(matrix)"
            )
        return answer

    def _given(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        def product(vector: Tensor) -> Tensor:
            assert self._hessp is not None
            answer = self._hessp(self._handed(point), self._handed(vector), *self._args)
            return _numbers(answer, "hessp", point.numel()).reshape(-1).to(point)

        return product

    def _by_autograd(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        x = point.reshape(self._form.shape).to(self._form.dtype)
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            _, gradient = differentiated(self._fun, self._args, leaf, create_graph=True)
        if not gradient.requires_grad:
            raise ValueError(
                "minimize_gns: fun's gradient does not depend on x as far as autograd sees (a torch.autograd."
                "Function whose backward pass cannot be differentiated?); pass hess=, hessp= or curvature="
            )
        product = hessian_product([gradient], [leaf])
        return lambda vector: product(vector).to(point)


def _numbers(value: Any, name: str, count: int) -> Tensor:
    """A function's answer as a tensor of ``count`` real numbers."""
    answer = real_tensor("minimize_gns", f"what {name} returns", value)
    if answer.numel() != count:
        raise ValueError(f"minimize_gns: {name} must return {count} numbers, got shape {tuple(answer.shape)}")
    return answer
