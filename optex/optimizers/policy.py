"""Step rules for sampled gradients, one batch a step: normalised momentum, and recursion with the Hessian.

Fatkhullin, Barakat, Kireeva, He, *Stochastic Policy Gradient Methods: Improved Sample Complexity for
Fisher-non-degenerate Policies*, ICML 2023, arXiv 2302.01734: N-PG-IGT, HARPG and N-HARPG. The extrapolation is
that of Cutkosky and Mehta, *Momentum improves normalized SGD*, ICML 2020, arXiv 2002.03305.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor

from optex.checks import check_number, shown
from optex.errors import NonFiniteError
from optex.optimizers.step_rule import StepRule, all_finite

__all__ = ["HARPG", "NIGT"]

Groups = list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]
_RESTS: Final = ("iterate", "extrapolated")


class _Recursive(StepRule):
    """What both rules share: f = 2 / (t + 2), a direction d, and steps θ ← θ - scale · d.

    Both need the last step, θ_t - θ_{t-1} = -scale · d: with d kept anyway, only the scale is kept for it.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``StepRule`` does; a group added later takes its step count t from the first."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault("t", self.param_groups[0].get("t", 0))

    def _check(self, group: dict[str, Any]) -> None:
        check_number(type(self).__name__, "lr", group["lr"])
        check_number(type(self).__name__, "eta0", group["eta0"], most=1.0, open_below=True)

    @abstractmethod
    def _eta(self, group: dict[str, Any]) -> float:
        """η of the step to come."""

    @abstractmethod
    def _gamma(self, group: dict[str, Any]) -> float | Tensor:
        """γ of the step to come."""

    def _is_normalized(self, group: dict[str, Any]) -> bool:
        return True

    def _moved(self, p: Tensor) -> Tensor | None:
        """θ_t - θ_{t-1}; None where there was no step."""
        state = self.state.get(p)
        return -state["scale"] * state["direction"] if state else None

    def _mixed(self, p: Tensor, gradient: Tensor, eta: float) -> Tensor:
        """The new direction d; the first is the gradient."""
        state = self.state.get(p)
        return torch.lerp(state["direction"], gradient, eta) if state else gradient.clone()

    def _prepare(self, groups: Groups) -> None:
        found = {}
        for group, parameters, gradients in groups:
            eta = self._eta(group)
            for p, gradient in zip(parameters, gradients, strict=True):
                found[p] = self._mixed(p, gradient, eta)
        self._length = self._norm(list(found.values())) if found else None
        self._directions = found

    def _norm(self, directions: Sequence[Tensor]) -> Tensor:  # []
        """Length of all directions together."""
        home = directions[0].device
        norms = torch.stack([norm.to(home) for norm in torch._foreach_norm(list(directions))])
        length = torch.linalg.vector_norm(norms)
        if not torch.compiler.is_compiling() and not bool(length.isfinite()):
            raise NonFiniteError(
                f"{type(self).__name__}: the direction is not finite in length; parameters and state are those "
                "of before the step. Lower the rate, or clip the gradients"
            )
        return length

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        gamma, length = self._gamma(group), self._length
        assert length is not None
        for p in parameters:
            state = self.state[p]
            scale = torch.as_tensor(gamma, dtype=length.dtype, device=length.device)
            if self._is_normalized(group):
                scale = torch.where(length > 0, scale / length, 0.0)  # a direction of length 0 points nowhere
            state["direction"] = self._directions[p]
            state["scale"] = scale.to(p.device, p.dtype)
            self._move(group, p, state)
        reached = {id(p) for p in parameters}
        for p in group["params"]:
            if id(p) not in reached and self.state.get(p):
                self.state[p]["scale"] = torch.zeros_like(self.state[p]["scale"])  # it stood still
        group["t"] += 1

    def _move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        p.sub_(state["scale"] * state["direction"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as ``StepRule.step``."""
        try:
            return super().step(closure)
        finally:
            self._directions, self._length = {}, None

    # Within a step alone; of the class, as copies carry state and groups only.
    _directions: dict[Tensor, Tensor] = {}  # noqa: RUF012
    _length: Tensor | None = None

    @contextmanager
    def _elsewhere(self, shift: Callable[[dict[str, Any], Tensor], Tensor | None]) -> Iterator[None]:
        """The parameters are shifted inside, and back after, to the bit."""
        kept = []
        try:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        if (point := shift(group, p)) is not None:
                            kept.append((p, p.detach().clone()))
                            p.copy_(point)
            yield
        finally:
            with torch.no_grad():
                for p, value in kept:
                    p.copy_(value)


@final
class NIGT(_Recursive):
    """Normalised momentum of gradients at extrapolated points: N-PG-IGT's step rule.

    With f = 2 / (t + 2) at step t = 0, 1, …, η = η₀ f^(4/5) and γ = γ₀ f,

        θ̃ = θ_t + ((1 - η) / η) (θ_t - θ_{t-1}),    d ← (1 - η) d + η ĝ(θ̃),    θ_{t+1} = θ_t - γ d / ‖d‖

    with the norm over all parameters of all groups. On a quadratic objective d is unbiased: the gradient at θ̃
    is ahead of that at θ_t by as much as the old d lags behind. One batch a step is enough, however small; and
    a step is never longer than γ, whatever the gradient.

    Gradients have to be computed at θ̃. Between steps the parameters are at θ_t; ``extrapolate()`` moves them:

        with optimizer.extrapolate():
            source.gradient(None)
        optimizer.step()

    With ``rest="extrapolated"`` they stay at θ̃ between steps, so that other loops work as they are, that of
    ``OptEx`` among them; ``with optimizer.iterate():`` moves them to θ_t.

    Args:
        params: parameters, or groups of them.
        lr: γ₀, at least 0; under torch's name, so that schedules reach it. 0.1 as published.
        eta0: η₀, in (0, 1]; 1 as published.
        rest: ``"iterate"`` or ``"extrapolated"``, where the parameters are between steps; one for all groups.
        maximize: maximise instead.

    Memory: d numbers; d more with ``rest="extrapolated"``.

    Raises:
        ValueError: an argument is out of range; or, in ``step``, the gradient was not computed within
            ``extrapolate()``. Parameters and state are as before.
        NonFiniteError: in ``step``, as in every step rule; also where d is not finite in length.

    >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = NIGT([theta], lr=0.5)
    >>> for _ in range(200):
    ...     with optimizer.extrapolate():
    ...         theta.grad = theta.detach() + 0.0
    ...     optimizer.step()
    >>> bool((theta.detach() - torch.tensor([1.4, 1.8])).norm() < 3)
    True

    Source: Fatkhullin et al., ICML 2023, arXiv 2302.01734, N-PG-IGT.
    """

    _was_there = False  # of the class: whether gradients since the last step were asked for at θ̃

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        eta0: float = 1.0,
        *,
        rest: str = "iterate",
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "eta0": eta0, "rest": rest, "maximize": maximize})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["rest"] not in _RESTS or group["rest"] != self.param_groups[0]["rest"]:
            raise ValueError(
                f"NIGT: rest must be one of {', '.join(_RESTS)}, the same for all groups, "
                f"got {shown(group['rest'])}"
            )

    def _eta(self, group: dict[str, Any]) -> float:
        return group["eta0"] * (2 / (group["t"] + 2)) ** 0.8

    def _gamma(self, group: dict[str, Any]) -> float | Tensor:
        return group["lr"] * (2 / (group["t"] + 2))

    def _ahead(self, group: dict[str, Any]) -> float:
        """How far θ̃ lies ahead of θ_t, in units of the last step."""
        eta = self._eta(group)
        return (1 - eta) / eta

    @contextmanager
    def extrapolate(self) -> Iterator[None]:
        """The parameters are at θ̃ inside, and back where they were after, to the bit."""

        def shift(group: dict[str, Any], p: Tensor) -> Tensor | None:
            moved = self._moved(p) if group["rest"] == "iterate" else None
            return moved if moved is None else p + self._ahead(group) * moved

        with self._elsewhere(shift):
            yield
        self._was_there = True

    @contextmanager
    def iterate(self) -> Iterator[None]:
        """The parameters are θ_t inside, and back where they were after, to the bit."""
        with self._elsewhere(lambda _, p: self.state.get(p, {}).get("iterate")):
            yield

    def _prepare(self, groups: Groups) -> None:
        apart = any(
            group["rest"] == "iterate" and group["t"] and self.state.get(p)
            for group, parameters, _ in groups
            for p in parameters
        )
        if apart and not self._was_there:
            raise ValueError(
                "NIGT: step() needs the gradient at the extrapolated point; compute it within `with "
                "optimizer.extrapolate():`, or build NIGT(..., rest='extrapolated'), as under OptEx"
            )
        super()._prepare(groups)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is called at the extrapolated point. See the class."""
        loss = None
        if closure is not None:
            with self.extrapolate(), torch.enable_grad():
                loss = closure()
        super().step()
        self._was_there = False
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        super()._update(group, parameters, gradients)
        if group["rest"] == "extrapolated":
            ahead = self._ahead(group)  # of the step to come: t is counted
            for p in group["params"]:
                if self.state.get(p):
                    p.copy_(
                        self.state[p]["iterate"] - ahead * self.state[p]["scale"] * self.state[p]["direction"]
                    )

    def _move(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> None:
        if group["rest"] == "iterate":
            super()._move(group, p, state)
        else:
            state["iterate"] = state.get("iterate", p.detach()) - state["scale"] * state["direction"]


@final
class HARPG(_Recursive):
    """Momentum corrected by a product with the Hessian: HARPG, and with ``normalized`` N-HARPG.

    With f = 2 / (t + 2) at step t = 0, 1, … and b uniform in [0, 1],

        θ̂ = b θ_t + (1 - b) θ_{t-1},    c = Ĥ(θ̂) (θ_t - θ_{t-1}),    d ← (1 - η) (d + c) + η ĝ(θ_t)
        HARPG:   θ_{t+1} = θ_t - γ d,          γ = γ₀ √f,  η = η₀ f
        N-HARPG: θ_{t+1} = θ_t - γ d / ‖d‖,    γ = γ₀ f,   η = η₀ f

    The mean of c over b is the whole change of the gradient since the last step, whatever its curvature, so
    that d has no bias; Ĥ and ĝ may each be of one sample. A step is a gradient at θ_t and a product at θ̂:

        source.gradient(None)
        with optimizer.between() as step:
            optimizer.correct(source.hessian_vector(step))
        optimizer.step()

    It is not limited to policies: for a loss that autograd differentiates twice, c is autograd's product.

    Args:
        params: parameters, or groups of them.
        lr: γ₀, at least 0; under torch's name, so that schedules reach it. 0.1 as published.
        eta0: η₀, in (0, 1]; 1 as published.
        normalized: N-HARPG; the norm is over all parameters of all groups.
        maximize: maximise instead; products are then those of the maximised objective, too.

    ``between()`` draws b from torch's global generator. OptEx refuses it as a base, as a step needs the product
    besides a gradient.

    Memory: d numbers.

    Raises:
        ValueError: an argument is out of range; or, in ``step``, no product was handed to ``correct``.
        NonFiniteError: in ``step``, as in every step rule; also where the product, or d in length, is not
            finite.

    >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = HARPG([theta], lr=0.3)
    >>> for _ in range(20):
    ...     theta.grad = theta.detach() + 0.0                # ½ ‖θ‖², whose Hessian is 1
    ...     with optimizer.between() as step:
    ...         optimizer.correct(step)
    ...     optimizer.step()
    >>> bool(theta.norm() < 0.5)
    True

    Source: Fatkhullin et al., ICML 2023, arXiv 2302.01734, (N-)HARPG. Their released code subtracts c.
    """

    _products: dict[Tensor, Tensor] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        eta0: float = 1.0,
        *,
        normalized: bool = False,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "eta0": eta0, "normalized": normalized, "maximize": maximize})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if (
            not isinstance(group["normalized"], bool)
            or group["normalized"] != self.param_groups[0]["normalized"]
        ):
            raise ValueError(
                "HARPG: normalized must be True or False, the same for all groups, "
                f"got {shown(group['normalized'])}"
            )

    def _eta(self, group: dict[str, Any]) -> float:
        return group["eta0"] * 2 / (group["t"] + 2)

    def _gamma(self, group: dict[str, Any]) -> float | Tensor:
        return group["lr"] * (2 / (group["t"] + 2)) ** (1.0 if group["normalized"] else 0.5)

    def _is_normalized(self, group: dict[str, Any]) -> bool:
        return group["normalized"]

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @contextmanager
    def between(self) -> Iterator[list[Tensor]]:
        """The parameters are at θ̂ inside, with a new b, and back after; gives θ_t - θ_{t-1}, by parameter.

        Before the second step it is 0, and no product is needed.
        """
        found = [self._moved(p) for p in self._parameters]
        moved = [torch.zeros_like(p) if m is None else m for p, m in zip(self._parameters, found, strict=True)]
        back = float(torch.rand(()))  # 1 - b
        points = {id(p): p.detach() - back * m for p, m in zip(self._parameters, moved, strict=True)}
        with self._elsewhere(lambda _, p: points[id(p)]):
            yield moved

    def correct(self, products: Sequence[Tensor]) -> None:
        """Tell the next step c.

        Args:
            products: of the Hessian with what ``between`` gave, one tensor a parameter, in its shape.

        Raises:
            ValueError: they are not one tensor a parameter in its shape.
        """
        given = [tuple(product.shape) for product in products]
        wanted = [tuple(p.shape) for p in self._parameters]
        if given != wanted:
            raise ValueError(f"HARPG: correct() needs one product a parameter, of shapes {wanted}, got {given}")
        self._products = {p: c.detach().clone() for p, c in zip(self._parameters, products, strict=True)}

    def _prepare(self, groups: Groups) -> None:
        started = any(self.state.get(p) for _, parameters, _ in groups for p in parameters)
        if started and self._products is None:
            raise ValueError(
                "HARPG: step() needs the product with the Hessian besides the gradient; compute it within "
                "`with optimizer.between() as step:` and hand it to optimizer.correct(). Nothing was changed"
            )
        if self._products is not None and not all_finite(list(self._products.values())):
            raise NonFiniteError(
                "HARPG: the product with the Hessian is not finite; parameters and state are those of before "
                "the step. Lower the rate"
            )
        super()._prepare(groups)

    def _mixed(self, p: Tensor, gradient: Tensor, eta: float) -> Tensor:
        state = self.state.get(p)
        if not state:
            return gradient.clone()
        assert self._products is not None
        # Maximising, the direction is that of the negative objective, whose Hessian has the other sign.
        sign = -1.0 if self._climbs(p) else 1.0
        return torch.lerp(state["direction"] + sign * self._products[p], gradient, eta)

    def _climbs(self, p: Tensor) -> bool:
        return any(
            group["maximize"] for group in self.param_groups if any(p is other for other in group["params"])
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class."""
        loss = super().step(closure)
        self._products = None
        return loss
