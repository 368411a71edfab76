"""AdaHessian: Adam, with the squared Hessian diagonal in place of the squared gradient.

Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, *ADAHESSIAN: An Adaptive Second Order Optimizer for Machine
Learning*, AAAI 2021, arXiv 2006.00719. The diagonal is Hutchinson's: Bekas, Kokiopoulou, Saad, *An estimator
for the diagonal of a matrix*, Applied Numerical Mathematics 57 (2007).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor

from optex.checks import check_integer, check_number, shown
from optex.errors import NonFiniteError
from optex.optimizers.step_rule import FreezingStepRule, all_finite

__all__ = ["AVERAGES", "BLOCKS", "AdaHessian", "hutchinson_diagonal"]

AVERAGES: Final = ("absolute", "signed")
BLOCKS: Final = ("none", "kernels", "rows")

Groups = list[tuple[dict[str, Any], list[Tensor], list[Tensor]]]


@torch.no_grad()
def hutchinson_diagonal(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],  # of the parameters' shapes, with their graph
    probes: int = 1,
) -> list[Tensor]:  # of the parameters' shapes
    """Hutchinson's estimate of a Hessian's diagonal: the mean of z ⊙ (H z) over random signs z.

    It is unbiased; the variance of entry i, with one probe, is Σ_{j ≠ i} H_ij². The signs come from torch's
    global generators. The gradients' graph is freed.

    Args:
        parameters: those that the Hessian is taken in.
        gradients: of one scalar, by ``backward(create_graph=True)`` or ``autograd.grad`` with it. One without
            a graph is constant where others have one: its row of the Hessian is zero.
        probes: how many z, at least 1; each costs about as much as a gradient.

    Raises:
        ValueError: no gradient has a graph, or ``probes`` is below 1.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> (gradient,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    >>> hutchinson_diagonal([x], [gradient])               # of a diagonal Hessian it is exact
    [tensor([ 6., 12.])]
    """
    check_integer("hutchinson_diagonal", "probes", probes)
    rows = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    if not rows:
        raise ValueError(
            "hutchinson_diagonal: no gradient has a graph to differentiate again; compute them by "
            "backward(create_graph=True). (A loss that is linear in all parameters has none either)"
        )
    total = [torch.zeros_like(p) for p in parameters]
    for number in range(probes):
        signs = [_signs(p) for p in parameters]
        products = torch.autograd.grad(
            [gradients[i] for i in rows],
            list(parameters),
            [signs[i] for i in rows],
            retain_graph=number + 1 < probes,
            allow_unused=True,
            materialize_grads=True,
        )
        torch._foreach_addcmul_(total, signs, list(products), value=1 / probes)
    return total


def _signs(
    like: Tensor,  # [...]
) -> Tensor:  # [...], each -1 or 1
    return torch.randint(0, 2, like.shape, dtype=like.dtype, device=like.device).mul_(2).sub_(1)


def _averaged(
    diagonal: Tensor,  # [...]
    average: str,
    block: str | int,
) -> Tensor:  # [...]
    """Every entry replaced by its block's mean."""
    values = diagonal.abs() if average == "absolute" else diagonal
    if isinstance(block, int):
        return _in_runs(values, block) if values.ndim > 1 else values
    first = {"none": values.ndim, "kernels": 2, "rows": 1 if values.ndim == 2 else 2}[block]
    if first >= values.ndim:
        return values
    return values.mean(tuple(range(first, values.ndim)), keepdim=True).expand_as(values).contiguous()


def _in_runs(
    values: Tensor,  # [...]
    length: int,
) -> Tensor:  # [...]
    flat = values.reshape(-1)
    whole = len(flat) // length * length
    runs = [flat[:whole].view(-1, length), flat[whole:].view(1, -1)]  # the last run may be shorter
    means = [run.mean(1, keepdim=True).expand_as(run).reshape(-1) for run in runs if run.numel()]
    return torch.cat(means).view(values.shape)


class AdaHessian(FreezingStepRule):
    """Adam with a running mean of the squared, block-averaged Hessian diagonal as second moment.

    With g the gradient, z one vector of random signs, H the Hessian, and D of the step::

        D = block mean of |z ⊙ H z|                          average="absolute", the released code
        D = block mean of  z ⊙ H z                           average="signed", the paper
        m = β₁ m + (1 - β₁) g          v = β₂ v + (1 - β₂) D²
        θ = θ - lr · ( (m / (1 - β₁ᵗ)) / ((v / (1 - β₂ᵗ))^(k/2) + ε) + λ θ )

    The gradients have to come with their graph: ``loss.backward(create_graph=True)``. A step costs about two
    gradients, and afterwards ``.grad`` is detached from its graph, which would otherwise never be freed. A
    piecewise linear network (ReLU) has no second derivatives of its own: H is then the loss's curvature seen
    through it, and zero where the loss is piecewise linear, too; the step is then lr · m / ε, far too long.

    Memory: two numbers a parameter, and the graph of the gradient until the step.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate, at least 0. Unlike Adam's it is relative: 1 is Newton's step on a diagonal quadratic.
        betas: decay of the means of g and D², each in [0, 1).
        eps: ε, above 0.
        weight_decay: λ, decoupled, at least 0.
        hessian_power: k, in [0, 1]; 1 is the Hessian, 0 is gradient descent with momentum.
        average: ``"absolute"`` averages magnitudes, ``"signed"`` the entries themselves, whose noise cancels.
            Without blocks both are the same, as D is squared.
        block: what is averaged over. ``"kernels"``: all dimensions after the second, the entries of a
            convolution's kernel. ``"rows"``: these, and rows of matrices. A number: runs of as many consecutive
            entries, the last may be shorter; vectors are left alone. ``"none"``: nothing.
        maximize: maximise instead.

    Raises:
        ValueError: an argument is out of range; or, in ``step``, no gradient has a graph.
        TypeError: a parameter is complex, or, in ``step``, a gradient sparse.
        NonFiniteError: in ``step``, as in every step rule; also where a product with the Hessian is not
            finite.

    The random signs come from torch's global generators, one draw a parameter: ``torch.manual_seed`` repeats a
    run, a checkpoint needs the generators' states, and ``OptEx`` pins the draws of each step. Seed several
    ranks alike.

    >>> theta = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = AdaHessian([theta], lr=1.0, betas=(0.0, 0.999))
    >>> loss = (torch.tensor([100.0, 0.01]) * theta**2).sum()
    >>> (theta.grad,) = torch.autograd.grad(loss, theta, create_graph=True)
    >>> optimizer.step()
    >>> theta.detach().abs().max() < 0.02                  # whatever the scales
    tensor(True)

    Source: arXiv 2006.00719, Algorithm 1, and the constants of the released code.
    """

    needs_graph = True
    # Of the class: copies and pickles of an optimizer carry its state and groups alone.
    _recalled: list[Tensor | None] | None = None
    _measured: dict[Tensor, Tensor] | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        average: str = "absolute",
        block: str | int = "kernels",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "average": average,
            "block": block,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        check_number("AdaHessian", "lr", group["lr"])
        check_number("AdaHessian", "eps", group["eps"], open_below=True)
        check_number("AdaHessian", "weight_decay", group["weight_decay"])
        check_number("AdaHessian", "hessian_power", group["hessian_power"], most=1.0)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"AdaHessian: betas must be two numbers, as (0.9, 0.999), got {shown(betas)}")
        for i, beta in enumerate(betas):
            check_number("AdaHessian", f"betas[{i}]", beta, most=1.0, open_above=True)
        if group["average"] not in AVERAGES:
            raise ValueError(
                f"AdaHessian: average must be one of {', '.join(AVERAGES)}, got {shown(group['average'])}"
            )
        block = group["block"]
        if block not in BLOCKS and (isinstance(block, (bool, str)) or not isinstance(block, int) or block < 1):
            raise ValueError(
                f"AdaHessian: block must be one of {', '.join(BLOCKS)}, or how many entries are averaged over, "
                f"at least 1, got {shown(block)}"
            )

    # ------------------------------------------------------------------ under OptEx

    @torch.no_grad()
    def observe(self) -> list[Tensor | None]:
        """D at the evaluation that left the parameters' ``.grad``, for each parameter that has one.

        The gradients lose their graph. One whose D is not finite becomes NaN: the evaluation is then refused as
        a whole.

        Raises:
            ValueError: as in ``step``.
        """
        pairs = [(group, p) for group in self.param_groups for p in group["params"]]
        measured = self._measure([(group, p) for group, p in pairs if p.grad is not None])
        for p, diagonal in measured.items():
            p.grad = torch.where(diagonal.isfinite(), cast(Tensor, p.grad), torch.nan)
        return [measured.get(p) for _, p in pairs]

    def recall(self, observation: list[Tensor | None]) -> None:
        """Give the next step its D, so that it needs no graph."""
        self._recalled = observation

    # ------------------------------------------------------------------ step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class.

        Args:
            closure: clears the gradients, calls ``backward(create_graph=True)``, returns the loss; called once.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError, TypeError, NonFiniteError: as the class says; parameters and state are as before.
        """
        try:
            return super().step(closure)
        finally:
            self._recalled = self._measured = None

    def _prepare(self, groups: Groups) -> None:
        if self._frozen:  # a parameter without any measured curvature does not move: no step length is known
            self._measured = {}
            return
        if self._recalled is None:
            self._measured = self._measure([(group, p) for group, parameters, _ in groups for p in parameters])
        else:
            whole = [p for group in self.param_groups for p in group["params"]]
            pairs = zip(whole, self._recalled, strict=True)
            self._measured = {p: diagonal for p, diagonal in pairs if diagonal is not None}
        if not self._measured or torch.compiler.is_compiling():
            return
        if not all_finite(list(self._measured.values())):
            raise NonFiniteError(
                "AdaHessian: the product of the Hessian with a random vector is not finite, though the "
                "gradients are; parameters and state are those of before the step. Smooth the objective "
                "(a square root at 0 has no curvature), or lower the rate"
            )

    @torch.no_grad()
    def _measure(self, pairs: list[tuple[dict[str, Any], Tensor]]) -> dict[Tensor, Tensor]:
        """D of every parameter that requires a gradient; the gradients' graph is freed."""
        pairs = [(group, p) for group, p in pairs if p.requires_grad]
        parameters = [p for _, p in pairs]
        gradients = [cast(Tensor, p.grad) for p in parameters]
        if not any(gradient.requires_grad for gradient in gradients):
            # torch's distributed checkpoints step at rate 0, to have the state made.
            if all(float(group["lr"]) == 0 for group, _ in pairs):
                return {}
            raise ValueError(
                "AdaHessian: no gradient has a graph, and a step needs products with the Hessian; call "
                "loss.backward(create_graph=True) before each step. (A loss that is linear in all parameters "
                "has none either: it has no curvature)"
            )
        diagonals = hutchinson_diagonal(parameters, gradients)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.detach()  # otherwise parameter and gradient keep each other alive
        return {
            p: _averaged(diagonal, group["average"], group["block"])
            for (group, p), diagonal in zip(pairs, diagonals, strict=True)
        }

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        measured = self._measured or {}
        beta1, beta2 = group["betas"]
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(
                    step=0,
                    curvature_step=0,  # drafted steps leave v alone, so that its mean is over fewer
                    exp_avg=torch.zeros_like(p, memory_format=torch.preserve_format),
                    exp_hessian_diag_sq=torch.zeros_like(p, memory_format=torch.preserve_format),
                )
            self.state[p]["step"] += 1
            self.state[p]["curvature_step"] += p in measured
        averages = [self.state[p]["exp_avg"] for p in parameters]
        torch._foreach_mul_(averages, beta1)
        torch._foreach_add_(averages, gradients, alpha=1 - beta1)
        if known := [p for p in parameters if p in measured]:
            squares = [self.state[p]["exp_hessian_diag_sq"] for p in known]
            diagonals = [measured[p] for p in known]
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, diagonals, diagonals, value=1 - beta2)
        if moving := [p for p in parameters if self.state[p]["curvature_step"]]:
            self._move(group, moving)

    def _move(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        corrections = [1 - beta2 ** state["curvature_step"] for state in states]
        denominators = torch._foreach_div([state["exp_hessian_diag_sq"] for state in states], corrections)
        torch._foreach_pow_(denominators, group["hessian_power"] / 2)
        torch._foreach_add_(denominators, group["eps"])
        steps = torch._foreach_div([state["exp_avg"] for state in states], denominators)
        torch._foreach_mul_(steps, [1 / (1 - beta1 ** state["step"]) for state in states])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-lr)
