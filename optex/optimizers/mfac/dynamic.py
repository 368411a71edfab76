"""M-FAC, the optimizer: steps with the inverse Fisher matrix of the last m gradients.

Source: Frantar, Kurtic, Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
NeurIPS 2021, arXiv 2107.03356 (the dynamic algorithm; constants as in the authors' released code).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any, Final

import torch
from torch import Tensor

from optex import linalg
from optex.checks import check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.optimizers.mfac.fisher import row_coefficients
from optex.optimizers.step_rule import FreezingStepRule

__all__ = ["MFAC"]

Group = tuple[dict[str, Any], list[Tensor], list[Tensor]]
_MEMORY: Final = ("window", "gram", "step")
_SHARED: Final = ("window_size", "damping", "window_dtype")  # there is one Fisher matrix for all groups


class MFAC(FreezingStepRule):
    """Steps with the inverse of the empirical Fisher matrix of the last m gradients (equation 1 of the paper).

    G has the last k = min(t, m) gradients as rows, the one of this step, g, among them:

        F = λ I + (1/k) GᵀG          u = F⁻¹ g          θ ← θ - lr · u

    As g is row j of G, u = k Gᵀ (k λ I + GGᵀ)⁻¹ e_j, with a k × k system and without cancellation. GGᵀ is kept
    up to date: a step reads the window once for the products with the new row, and once for u. There is one
    matrix for the parameters of all groups; a parameter without a gradient in a step counts as zeros there, and
    stays where it is.

    gᵀu < k always: to first order a step changes the loss by less than lr · m, however small λ is. If
    ``window_size`` grows by a factor, divide the rate by that factor.

    Memory, in numbers: m · d for the window (in ``window_dtype``), m² in float64 for GGᵀ, 2 · d within a step,
    d for momentum. Under ``OptEx`` the window once more, so that a round can be taken back.

    Args:
        params: parameters, or groups of them; frozen ones take space in the window as well.
        lr: learning rate, at least 0.
        window_size: m, how many gradients the Fisher matrix is made of; one for all groups. 1024 as published.
        damping: λ, above 0; one for all groups. Gradients of full batches, which differ by little, need about
            1e-2: with the published 1e-5 steps along their differences become far too long.
        momentum: μ of v ← μ v + (1 - μ) u, which then takes u's place; in [0, 1).
        weight_decay: at least 0; added to the gradient before it enters the window, as the released code does.
        decoupled_weight_decay: take θ ← (1 - lr · weight_decay) θ instead, which the Fisher matrix does not
            scale.
        window_dtype: of the window; None is the parameters'. ``torch.bfloat16`` halves the memory of float32
            and rounds all gradients to about three digits.
        maximize: maximise instead.

    Raises:
        ValueError: a setting is out of range, or differs among groups where there is one for all.
        TypeError: a parameter is complex, or, in ``step``, a gradient sparse.
        NonFiniteError: in a step, before anything moves: a gradient is not finite, or its square overflows.
        NotPositiveDefiniteError: likewise, where λ is so far below the rounding of GGᵀ that jitter (with a
            ``JitterWarning``) does not help.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    >>> optimizer = MFAC([theta], lr=1.0, window_size=2, damping=1e-9)
    >>> theta.grad = theta.detach().clone()
    >>> optimizer.step()          # of one gradient: g / (λ + ‖g‖²), here g / 25
    >>> theta.detach()
    tensor([2.8800, 3.8400], dtype=torch.float64)

    Source: arXiv 2107.03356. Defaults are those of the authors' code.
    """

    # torch pickles state and groups alone: what a step needs for a moment has its empty value in the class.
    _directions: tuple[list[Tensor], ...] = ()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        window_size: int = 1024,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        window_dtype: torch.dtype | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "window_size": window_size,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "window_dtype": window_dtype,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. The window starts afresh, as the new parameters' past gradients are not known.

        Zeros in their place would say that the loss does not depend on them, and the next step would be up to
        1/λ times the gradient.

        Raises:
            ValueError, TypeError: a setting is out of range or differs from the other groups' where there is
                one for all, or a parameter is complex; no group was added.
        """
        super().add_param_group(param_group)
        for entries in self.state.values():
            for name in _MEMORY:
                entries.pop(name, None)

    def _check(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        check_number(owner, "lr", group["lr"])
        check_integer(owner, "window_size", group["window_size"])
        check_number(owner, "damping", group["damping"], open_below=True)
        check_number(owner, "momentum", group["momentum"], most=1.0, open_above=True)
        check_number(owner, "weight_decay", group["weight_decay"])
        dtype = group["window_dtype"]
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"{owner}: window_dtype must be None or a floating-point dtype, got {shown(dtype)}"
            )
        for name in _SHARED:
            if group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"{owner}: {name} is one for all groups, as there is one Fisher matrix; got "
                    f"{group[name]!r} beside {self.param_groups[0][name]!r}. Set it as an argument of {owner}"
                )

    # ------------------------------------------------------------------ a step

    def _prepare(self, groups: list[Group]) -> None:
        if not groups:
            return
        memory = self._memory()
        row = self._row(groups, memory["window"])
        direction = self._direction(row, memory)
        pieces = dict(zip(self._parameters(), direction.split(self._sizes()), strict=True))
        self._directions = tuple(
            [pieces[p].view_as(p).to(p.device, p.dtype) for p in parameters] for _, parameters, _ in groups
        )

    def _row(
        self,
        groups: list[Group],
        window: Tensor,  # [m, d]
    ) -> Tensor:  # [d], as the window holds it
        """The gradients of all parameters, one after the other, with weight decay if it is not decoupled."""
        row = window.new_zeros(window.shape[1])
        pieces = dict(zip(self._parameters(), row.split(self._sizes()), strict=True))
        for group, parameters, gradients in groups:
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_copy_([pieces[p].view_as(p) for p in parameters], gradients)
        return row

    def _direction(
        self,
        row: Tensor,  # [d]
        memory: dict[str, Tensor],
    ) -> Tensor:  # [d], float32 at least
        """F⁻¹ g with g in the row of the oldest gradient, where it stays unless steps are drafted.

        A drafted step is the one that its gradient would cause if it were measured: g is in F for this step,
        and the window stays as it is. F₀, without g, would give the same direction, as F⁻¹ g = F₀⁻¹ g /
        (1 + gᵀF₀⁻¹g / k) (Sherman and Morrison), but the length would not be bounded: the part of g outside
        the other rows' span would be 1/λ times as long.
        """
        window, group = memory["window"], self.param_groups[0]
        seen = int(memory["step"])
        place, filled = seen % len(window), min(seen + 1, len(window))
        with linalg.threads_for(window.shape[1]):
            # The window keeps its old row until the system is solved: a failure then leaves no trace.
            products = linalg.inner_products(window[:filled], row[None])[:, 0]
            products[place] = linalg.inner_products(row[None], row[None])[0, 0]
            if not bool(products.isfinite().all()):  # LAPACK factorises infinities without an error
                raise NonFiniteError(
                    f"{type(self).__name__}: squares of the gradients overflow; parameters and state are those "
                    "of before the step. Scale the loss down, or clip the gradients"
                )
            gram = memory["gram"][:filled, :filled].clone()
            gram[place] = gram[:, place] = products
            coefficients = row_coefficients(gram, place, group["damping"])
            if self._frozen:
                own = coefficients[place].clone()
                coefficients[place] = 0
                direction = linalg.combine_rows(coefficients[None], window[:filled])[0]
                return direction.add_(row * own.to(direction.dtype))
            window[place] = row
            memory["gram"][:filled, :filled] = gram
            memory["step"] += 1
            return linalg.combine_rows(coefficients[None], window[:filled])[0]

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        steps, self._directions = self._directions[0], self._directions[1:]
        if group["momentum"]:
            for p in parameters:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            torch._foreach_lerp_(buffers, steps, 1 - group["momentum"])
            steps = buffers
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, torch._foreach_mul(steps, group["lr"]))

    # ------------------------------------------------------------------ the window

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _sizes(self) -> list[int]:
        return [p.numel() for p in self._parameters()]

    def _memory(self) -> dict[str, Tensor]:
        """Window, Gram matrix and number of gradients so far, kept as state of the first parameter."""
        parameters, settings = self._parameters(), self.param_groups[0]
        memory = self.state[parameters[0]]
        if "window" not in memory:
            size, device = settings["window_size"], parameters[0].device
            dtype = settings["window_dtype"] or reduce(torch.promote_types, (p.dtype for p in parameters))
            memory["window"] = torch.zeros(size, sum(self._sizes()), dtype=dtype, device=device)
            memory["gram"] = torch.zeros(size, size, dtype=torch.float64, device=device)
            memory["step"] = torch.zeros((), dtype=torch.int64)
        return memory

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, the window with it.

        Raises:
            ValueError: it is of other groups or parameters, or its window has another size.
        """
        saved = {}
        for entries in state_dict["state"].values():
            saved.update({name: entries[name] for name in _MEMORY if name in entries})
        size, width = state_dict["param_groups"][0].get("window_size"), sum(self._sizes())
        if saved and tuple(saved["window"].shape) != (size, width):
            raise ValueError(
                f"{type(self).__name__}: the saved window is {tuple(saved['window'].shape)}, and these "
                f"parameters need {(size, width)}; load the state of the same parameters in the same order"
            )
        super().load_state_dict(state_dict)
        if saved:  # torch gives all state its parameter's dtype
            first = self._parameters()[0]
            memory = self.state[first]
            memory["window"] = saved["window"].to(first.device, copy=True)
            memory["gram"] = saved["gram"].to(first.device, copy=True)
            memory["step"] = saved["step"].to("cpu", copy=True)
