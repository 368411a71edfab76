"""Gradients from losses alone: simultaneous perturbation, at any number of random directions.

Spall, *Multivariate stochastic approximation using a simultaneous perturbation gradient approximation*, IEEE
Trans. Automatic Control 37 (1992), with normal directions and seeds as in Malladi et al., *Fine-Tuning Language
Models with Just Forward Passes*, NeurIPS 2023, arXiv 2305.17333, Definition 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optex.checks import check_flag, check_integer, check_number, check_parameters
from optex.draws import generator_states, set_generator_states
from optex.functional import called_with, parameter_names
from optex.optimizers.mezo.directions import direction, finite_loss, fresh_seed
from optex.sources.interface import GradientSource

__all__ = ["SPSASource"]

_REMEDY = "parameters are as before. Check the batch, or lower epsilon or the rate"


class SPSASource(GradientSource):
    """The mean of two-point estimates along random directions; no backward pass.

    With z_k ~ N(0, I), k = 1 … n::

        ĝ = (1/n) Σ_k s_k z_k,    s_k = (L(θ + εz_k) - L(θ - εz_k)) / (2ε)

    E ĝ = ∇L + O(ε²), and its noise is ``E‖ĝ - ∇L‖² = (d + 1) ‖∇L‖² / n``: one direction tells a d-th part of
    the gradient. From n = 2 on the spread of the s_k z_k gives an unbiased estimate of that noise, which is
    reported as its variance. Directions come from one seed a call, drawn from torch's global generator; all
    evaluations of a call draw the same dropout. The loss reported is the mean of those evaluated.

    A call holds ĝ, a copy of the parameters, which are put back to the bit, and one direction of one parameter;
    no activations for a backward pass. For steps without even that memory see ``MeZO``.

    Args:
        objective: the scalar loss of a batch at the parameters' present values; never differentiated, and may
            be an accuracy or the answer of another program.
        parameters: those that are optimised.
        epsilon: how far the loss is probed, positive; 1e-3 is the paper's.
        queries: directions a call, n.
        vectorized: all evaluations at once, by ``torch.func.vmap``. ``objective`` has to be a module that owns
            the parameters. Costs 2 n copies of them, or ``chunk`` copies.
        chunk: how many evaluations at once, where ``vectorized``; None is all.

    Raises:
        TypeError: the objective cannot be called, parameters are no floating-point tensors, or ``vectorized``
            was asked for of what is no module with these parameters.
        ValueError: epsilon is not positive, or a count is below 1.
        NonFiniteError: in a call, a loss is NaN or infinite; parameters and gradients are as before.

    >>> import torch, optex
    >>> _ = torch.manual_seed(0)
    >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    >>> source = optex.SPSASource(lambda _: x.square().sum(), [x], queries=2000)
    >>> loss, variance = source.gradient(None)
    >>> bool((x.grad - 2 * x).norm() < 0.5), bool(0.03 < variance < 0.05)    # (d + 1) ‖∇L‖² / (n d) = 0.039
    (True, True)

    Source: Malladi et al., NeurIPS 2023, arXiv 2305.17333, Definition 1.
    """

    def __init__(
        self,
        objective: Callable[[Any], Any],
        parameters: Iterable[Tensor],
        epsilon: float = 1e-3,
        queries: int = 1,
        *,
        vectorized: bool = False,
        chunk: int | None = None,
    ) -> None:
        if not callable(objective):
            raise TypeError(f"SPSASource: objective must be callable, got {type(objective).__name__}")
        self.objective = objective
        self.parameters: list[Tensor] = check_parameters("SPSASource", parameters)
        self.epsilon: float = check_number("SPSASource", "epsilon", epsilon, open_below=True)
        self.queries: int = check_integer("SPSASource", "queries", queries)
        self.chunk: int | None = chunk if chunk is None else check_integer("SPSASource", "chunk", chunk)
        self.vectorized: bool = check_flag("SPSASource", "vectorized", vectorized)
        self.module: nn.Module | None = objective if isinstance(objective, nn.Module) else None
        self.evaluations: float = 2.0 * self.queries
        self._names = parameter_names("SPSASource", self.module, self.parameters) if vectorized else []

    @torch.no_grad()
    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        seed = fresh_seed()
        values = self._at_once(batch, seed) if self.vectorized else self._in_turn(batch, seed)
        scalars = [(ahead - behind) / (2 * self.epsilon) for ahead, behind in values]
        noise = self._estimate(seed, scalars)
        loss = sum(ahead + behind for ahead, behind in values) / self.evaluations
        first = self.parameters[0]
        return torch.tensor(loss, dtype=first.dtype, device=first.device), noise

    def _in_turn(self, batch: Any, seed: int) -> list[tuple[float, float]]:  # queries
        kept = [p.detach().clone() for p in self.parameters]
        draws, found = generator_states(), []
        try:
            for query in range(self.queries):
                pair = []
                for side, name in ((1, "ahead"), (-1, "behind")):
                    for place, (p, value) in enumerate(zip(self.parameters, kept, strict=True)):
                        z = direction(seed, query, place, value)
                        torch.add(value, z, alpha=side * self.epsilon, out=p)
                    set_generator_states(draws)
                    loss = self.objective(batch)
                    pair.append(finite_loss("SPSASource", loss, f"{name} along direction {query}", _REMEDY))
                found.append((pair[0], pair[1]))
        finally:
            for p, value in zip(self.parameters, kept, strict=True):
                p.copy_(value)
        return found

    def _at_once(self, batch: Any, seed: int) -> list[tuple[float, float]]:  # queries
        sides = [(query, side) for query in range(self.queries) for side in (1, -1)]
        size, draws, found = self.chunk or len(sides), generator_states(), []
        for start in range(0, len(sides), size):
            part = sides[start : start + size]
            set_generator_states(draws)
            for (query, side), loss in zip(part, self._swapped(batch, seed, part), strict=True):
                where = f"{'ahead' if side > 0 else 'behind'} along direction {query}"
                found.append(finite_loss("SPSASource", loss, where, _REMEDY))
        return list(zip(found[::2], found[1::2], strict=True))

    def _swapped(self, batch: Any, seed: int, sides: Sequence[tuple[int, int]]) -> Tensor:  # [sides]
        """The losses at some of the points, the parameters swapped under ``torch.func``."""
        module = self.module
        assert module is not None
        points = {
            name: torch.stack(
                [
                    torch.add(p.detach(), direction(seed, query, place, p), alpha=side * self.epsilon)
                    for query, side in sides
                ]
            )
            for place, (name, p) in enumerate(zip(self._names, self.parameters, strict=True))
        }
        run = torch.vmap(lambda point: called_with(module, point, batch), randomness="same")
        return run(points)

    def _estimate(self, seed: int, scalars: Sequence[float]) -> Tensor | None:  # []
        """Leave ĝ in the gradients; the variance of one of its components, where there are two directions."""
        count, spread, dimension = len(scalars), 0.0, 0
        for place, p in enumerate(self.parameters):
            total, squares = torch.zeros_like(p), torch.zeros((), dtype=torch.float64, device=p.device)
            for query, scalar in enumerate(scalars):
                z = direction(seed, query, place, p)
                total.add_(z, alpha=scalar / count)
                squares += scalar**2 * z.double().square().sum()
            p.grad = total
            # Σ‖g_k - ĝ‖² = Σ‖g_k‖² - n ‖ĝ‖²
            spread = spread + (squares - count * total.double().square().sum()).cpu()
            dimension += p.numel()
        if count < 2:
            return None
        first = self.parameters[0]
        variance = torch.as_tensor(spread / (dimension * count * (count - 1)))
        return variance.clamp_min(0).to(first.device, first.dtype)
