"""The method as a ``torch.optim.Optimizer`` that evaluates its closure several times a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from optex.checks import check_integer, check_number, shown
from optex.errors import ConvergenceWarning, NonFiniteError, warn
from optex.optimizers.gns.curvature import Curvature, NoCurvature
from optex.optimizers.gns.derivatives import flatten, gauss_newton_product, hessian_product, parts
from optex.optimizers.gns.metric import Metric
from optex.optimizers.gns.products import ProductCurvature
from optex.optimizers.gns.search import SearchSettings, StepSearch, Trial

__all__ = ["GNS"]

Evaluated = tuple[Tensor, Tensor | None, list[Tensor | None]]  # loss [], outputs, gradients

_NAMED: Final = ("exact", "gauss-newton", "none")
_CLOSURE: Final = (
    "GNS: step needs a closure that returns the loss, as lambda: loss(model(x), y); it is evaluated at "
    "several points a step"
)


class GNS(Optimizer):
    """Newton's method regularised by the gradient's norm over γ, the gradient-normalized smoothness.

        λ = ‖g‖* / (γ + eps),   h = -(H + λ B)⁻¹ g,   taken where   f(x) - f(x + h) ≥ ‖∇f(x + h)‖*² / (8 λ)

    (Algorithm 1.) A step tries γ, γ/2, γ/4, ... until one is taken, and the next begins with twice that. The
    loss falls with every step, and there is no learning rate to set. The closure is evaluated once at the
    parameters and once a trial: it must give the same loss at the same parameters, so a minibatch stays fixed
    for a step.

    The closure **returns the loss and need not backpropagate**. One that does, as for torch's optimizers,
    serves as well; with ``"exact"`` it has to call ``loss.backward(create_graph=True)``.

    Args:
        params: tensors, or one group of them.
        curvature: H. ``"exact"``: the Hessian, by products through autograd, and conjugate gradients.
            ``"gauss-newton"``: Jᵀ H J with J of the model's outputs and H of the loss by them; the closure
            returns ``(loss, outputs)`` and does not backpropagate. ``"none"``: H = 0, the normalized gradient
            method. A function without arguments returns a :class:`Curvature` at the parameters' present values,
            over all of them one after the other.
        metric: B, as :class:`Metric` takes it: None is the identity.
        smoothness: the first γ.
        least_smoothness: γ is at least this after a step.
        eps: added to γ in λ.
        trials: at most in a step.
        cg_tolerance, cg_iterations: of the conjugate gradients, as in :class:`ProductCurvature`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; complex parameters; more than
            one group.

    Source: Semenov, Jaggi, Doikov, ICLR 2026, arXiv 2506.13710, Algorithm 1.

    >>> import torch
    >>> from optex.optimizers import GNS
    >>> x = torch.nn.Parameter(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    >>> optimizer = GNS([x])
    >>> for _ in range(60):
    ...     _ = optimizer.step(lambda: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2)
    >>> bool((x.detach() - 1).norm() < 1e-5)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        curvature: Literal["exact", "gauss-newton", "none"] | Callable[[], Curvature] = "exact",
        *,
        metric: Any = None,
        smoothness: float = 1.0,
        least_smoothness: float = 1e-9,
        eps: float = 1e-8,
        trials: int = 41,
        cg_tolerance: float = 0.1,
        cg_iterations: int = 200,
    ) -> None:
        if not (callable(curvature) or curvature in _NAMED):
            raise ValueError(
                f"GNS: curvature must be one of {', '.join(map(repr, _NAMED))} or a function that returns an "
                f"optex.optimizers.Curvature, got {shown(curvature)}"
            )
        self._curvature = curvature
        self._metric = metric if isinstance(metric, Metric) else Metric(metric)
        settings = {
            "smoothness": smoothness,
            "least_smoothness": least_smoothness,
            "eps": eps,
            "trials": trials,
            "cg_tolerance": cg_tolerance,
            "cg_iterations": cg_iterations,
        }
        super().__init__(params, settings)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only groups and state of an optimizer.
        own = {"_curvature": self._curvature, "_metric": self._metric}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add the only group.

        Raises:
            TypeError, ValueError: it is not the first, holds complex parameters, or a setting out of range.
        """
        if self.param_groups:
            raise ValueError(
                "GNS: takes one parameter group, as the curvature couples all parameters, and got another; put "
                "all parameters into one"
            )
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[0])
        except BaseException:
            self.param_groups.clear()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        if any(p.is_complex() for p in group["params"]):
            raise TypeError("GNS: complex parameters; optimise torch.view_as_real(parameter) instead")
        check_number("GNS", "smoothness", group["smoothness"], open_below=True)
        _search_settings(group).check("GNS")
        check_number("GNS", "cg_tolerance", group["cg_tolerance"], most=1.0, open_above=True)
        check_integer("GNS", "cg_iterations", group["cg_iterations"])
        self._metric.check("GNS", sum(p.numel() for p in group["params"] if p.requires_grad))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the parameters' ``.grad`` are then those at the new point.

        Args:
            closure: returns the loss, or ``(loss, outputs)`` for ``"gauss-newton"``.

        Returns:
            The loss before the step, detached.

        Raises:
            NonFiniteError: loss or gradient at the parameters is NaN or infinite; a gradient is named.
            TypeError, ValueError: there is no closure, or it returns no scalar or leaves no gradient to work
                with. Whatever is raised, parameters and state are those of before the step.

        Warns:
            ConvergenceWarning: no trial was taken, because the loss cannot be lowered in this precision or is
                not the same at each evaluation. Parameters and state are those of before the step.
        """
        if closure is None:
            raise TypeError(_CLOSURE)
        group = self.param_groups[0]
        parameters = [p for p in group["params"] if p.requires_grad]
        if not parameters:
            raise ValueError("GNS: no parameter requires a gradient; there is nothing to optimise")
        loss, outputs, gradients = self._evaluate(closure, parameters, first=True)
        self._check_finite(loss, gradients)
        gradient = flatten(gradients, parameters)
        metric = self._metric
        metric.check("GNS", len(gradient))  # parameters may have been frozen since
        if metric.dual_norm(gradient) > 0:
            curvature = self._curvature_here(loss, outputs, gradients, parameters)
            state = self.state.get(group["params"][0], {})
            now, settings = float(state.get("smoothness", group["smoothness"])), _search_settings(group)
            search = StepSearch(curvature, metric, float(loss), gradient, now, settings)
            taken = self._search(search, closure, parameters)
            if taken is None:
                warn(
                    f"GNS: none of {settings.trials} trials lowered the loss {float(loss):.6g} enough (norm of "
                    f"the gradient {metric.dual_norm(gradient):.3g}); the parameters stay. At a minimum the "
                    "precision is used up; elsewhere check that the closure gives the same loss at every call",
                    ConvergenceWarning,
                )
            else:
                trial, gradients = taken
                self._displace(parameters, trial.step)
                self.state[group["params"][0]] = {
                    "step": state.get("step", torch.tensor(0.0)) + 1,
                    "smoothness": torch.tensor(search.following(trial), dtype=torch.float64),
                }
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = None if g is None else g.detach()
        return loss.detach()

    def _search(
        self, search: StepSearch, closure: Callable[[], Any], parameters: list[Tensor]
    ) -> tuple[Trial, list[Tensor | None]] | None:
        """The trial to take and the gradients there; the parameters are put back, whatever happens."""
        # .data hides the change from autograd: products with the Hessian still need the first graph.
        before = [p.data.clone() for p in parameters]
        while trials := search.next(1):
            try:
                self._displace(parameters, trials[0].step)
                loss, _, gradients = self._evaluate(closure, parameters, first=False)
            finally:
                for p, values in zip(parameters, before, strict=True):
                    p.data.copy_(values)
            gradients = [None if g is None else g.detach() for g in gradients]
            if search.accepts(trials[0], float(loss), flatten(gradients, parameters)):
                return trials[0], gradients
        return None

    def _displace(
        self,
        parameters: list[Tensor],
        step: Tensor,  # [d]
    ) -> None:
        for p, piece in zip(parameters, parts(step, parameters), strict=True):
            p.data.add_(piece)

    def _curvature_here(
        self,
        loss: Tensor,  # []
        outputs: Tensor | None,
        gradients: list[Tensor | None],
        parameters: list[Tensor],
    ) -> Curvature:
        group = self.param_groups[0]
        limits = {"tolerance": group["cg_tolerance"], "iterations": group["cg_iterations"]}
        if self._curvature == "none":
            return NoCurvature()
        if self._curvature == "exact":
            if not any(g is not None and g.requires_grad for g in gradients):
                raise ValueError(
                    "GNS: the gradient does not depend on the parameters as far as autograd sees, so there is "
                    "no Hessian; use curvature='none', or a function that returns a Curvature"
                )
            return ProductCurvature(hessian_product(gradients, parameters), **limits)
        if self._curvature == "gauss-newton":
            assert outputs is not None
            return ProductCurvature(gauss_newton_product(loss, outputs, parameters), **limits)
        found = self._curvature() if callable(self._curvature) else None
        if not isinstance(found, Curvature):
            raise TypeError(
                f"GNS: curvature must return an optex.optimizers.Curvature, got {type(found).__name__}; a "
                "matrix is DenseCurvature(matrix)"
            )
        return found

    # ------------------------------------------------------------------ evaluations

    def _evaluate(self, closure: Callable[[], Any], parameters: list[Tensor], *, first: bool) -> Evaluated:
        """Loss, outputs and gradients at the parameters; ``first`` in a step keeps the graph that H needs."""
        for p in parameters:
            p.grad = None
        pairs = self._curvature == "gauss-newton"
        exact = self._curvature == "exact" and first
        with torch.enable_grad():
            loss, outputs = _read_answer(closure(), pairs=pairs)
            gradients: list[Tensor | None] = [p.grad for p in parameters]
            if all(g is None for g in gradients):
                if not loss.requires_grad:
                    raise ValueError(
                        "GNS: the closure's loss carries no graph and no parameter received a gradient; "
                        "compute the loss from the parameters this optimizer was built with"
                    )
                keep = exact or (pairs and first)
                gradients = list(
                    torch.autograd.grad(
                        loss, parameters, create_graph=exact, retain_graph=keep, allow_unused=True
                    )
                )
            elif pairs or (exact and not any(g is not None and g.requires_grad for g in gradients)):
                raise ValueError(
                    f"GNS: the closure backpropagated, and curvature {self._curvature!r} needs the graph; "
                    "leave backward() out of the closure"
                    + (", or call backward(create_graph=True)" if exact else "")
                )
        if any(g is not None and g.layout is not torch.strided for g in gradients):
            raise TypeError(
                "GNS: a gradient is sparse, and steps need dense ones; build the embedding with sparse=False"
            )
        return loss, outputs, gradients

    def _check_finite(
        self,
        loss: Tensor,  # []
        gradients: list[Tensor | None],
    ) -> None:
        where = "parameters and state are those of before the step. Check data and start"
        for i, g in enumerate(gradients):
            if g is not None and not bool(g.isfinite().all()):
                raise NonFiniteError(
                    f"GNS: the gradient of parameter {i} {tuple(g.shape)} is not finite; {where}"
                )
        if not bool(loss.isfinite()):
            raise NonFiniteError(f"GNS: the loss is {float(loss):g}; {where}")


def _search_settings(group: dict[str, Any]) -> SearchSettings:
    return SearchSettings(group["least_smoothness"], group["eps"], group["trials"])


def _read_answer(answer: Any, *, pairs: bool) -> tuple[Tensor, Tensor | None]:
    """What a closure returned, as loss and outputs."""
    outputs = None
    if pairs:
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Tensor)):
            raise TypeError(
                "GNS: curvature 'gauss-newton' needs a closure that returns (loss, outputs), the model's "
                f"outputs as one tensor, got {type(answer).__name__}"
            )
        answer, outputs = answer
    try:
        loss = answer if isinstance(answer, Tensor) else torch.tensor(float(answer), dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"GNS: the closure must return the loss, got {type(answer).__name__}") from error
    if loss.numel() != 1 or loss.is_complex():
        raise ValueError(
            f"GNS: the loss must be a real scalar, got {loss.dtype} {tuple(loss.shape)}; reduce it with .mean()"
        )
    return loss.reshape(()), outputs
