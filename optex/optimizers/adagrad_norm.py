"""AdaGrad-Norm: one step size for all parameters, from the lengths of all gradients so far.

Ward, Wu, Bottou: *AdaGrad stepsizes: sharp convergence over nonconvex landscapes*, ICML 2019 and JMLR 21(219),
2020, arXiv 1806.01811, Algorithm 1. It is the scalar step rule of AdAdaGrad (Lau, Liu, Kolar, arXiv
2402.11215), whose batch sizes are in ``optex.batching``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optex.checks import check_number
from optex.errors import NonFiniteError
from optex.optimizers.step_rule import StepRule

__all__ = ["AdaGradNorm"]

_ENTRY = "accumulator"


class AdaGradNorm(StepRule):
    """A step along the gradient, over the root of the sum of all squared gradient norms: AdaGrad of one number.

    ``S_t = S_{t-1} + ‖g_t‖²``, ``θ_t = θ_{t-1} - lr · g_t / √S_t`` (Ward, Wu, Bottou, Algorithm 1, with their
    ``b_t² = S_t``). The norm is of the whole gradient, that is over all parameters of all groups together, and
    there is one S, kept as a tensor in the first group under ``"accumulator"``; rates may differ from group to
    group. Any ``lr`` converges on smooth objectives; one that is too large costs steps at first, until S has
    grown.

    Args:
        params: parameters, or groups of them.
        lr: η, at least 0; 1 as published. A step is never longer than it.
        initial_accumulator: S_0, above 0; 0.01 as in AdAdaGrad's experiments.
        maximize: maximise instead.

    Raises:
        ValueError: an argument is out of range, or a group has an accumulator of its own.
        TypeError: a parameter is complex, or, in ``step``, a gradient sparse.
        NonFiniteError: in ``step``, a gradient or the norm of all gradients is not finite.

    Memory: one number.

    >>> import torch
    >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = AdaGradNorm([theta], lr=1.0, initial_accumulator=75.0)
    >>> (theta.square().sum() / 2).backward()           # the gradient is (3, 4), its squared norm 25
    >>> optimizer.step()
    >>> theta.data                                      # (3, 4) - (3, 4) / √100
    tensor([2.7000, 3.6000])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1.0,
        initial_accumulator: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        start = check_number(type(self).__name__, "initial_accumulator", initial_accumulator, open_below=True)
        super().__init__(params, {"lr": lr, "maximize": maximize})
        device = next((p.device for group in self.param_groups for p in group["params"]), torch.device("cpu"))
        # In float32 small gradients would be lost beside a large sum; Apple's devices have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.param_groups[0][_ENTRY] = torch.full((), start, dtype=dtype, device=device)

    def _check(self, group: dict[str, Any]) -> None:
        check_number(type(self).__name__, "lr", group["lr"])
        for name in ("initial_accumulator", _ENTRY):
            if name in group:
                raise ValueError(
                    f"{type(self).__name__}: a group has {name!r}, and there is one accumulator for all "
                    "groups; set initial_accumulator where the optimizer is made"
                )

    @property
    def accumulator(self) -> Tensor:  # []
        """S, the squared norms of all gradients so far and S_0."""
        return self.param_groups[0][_ENTRY]

    def _prepare(self, groups: list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]) -> None:
        total = self.accumulator
        gradients = [gradient for _, _, found in groups for gradient in found]
        if not gradients:
            return
        added = torch.stack([norm.to(total) for norm in _norms(gradients)]).square_().sum()
        if not torch.compiler.is_compiling() and not bool(added.isfinite()):
            raise NonFiniteError(
                f"{type(self).__name__}: the gradient is not finite in length: its squares overflow, and no "
                "step would be left after it. Parameters and state are those of before the step. Lower the "
                "rate, or clip the gradients"
            )
        total += added

    def _update(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],  # of the parameters' shapes
    ) -> None:
        # Stays on the device, so that nothing waits for it; in the gradients' dtype foreach is one kernel.
        scale = -group["lr"] / self.accumulator.sqrt()
        double = any(gradient.dtype == torch.float64 for gradient in gradients)
        scale = scale.to(gradients[0].device, torch.float64 if double else torch.float32)
        torch._foreach_add_(parameters, torch._foreach_mul(gradients, scale))


def _norms(gradients: list[Tensor]) -> list[Tensor]:  # of []
    """The gradients' norms, in any order; those of half precision are computed in float32."""
    half = [g for g in gradients if g.element_size() < 4]
    if not half:
        return list(torch._foreach_norm(gradients))
    full = [g for g in gradients if g.element_size() >= 4]
    return [*torch._foreach_norm(half, dtype=torch.float32), *(torch._foreach_norm(full) if full else ())]
