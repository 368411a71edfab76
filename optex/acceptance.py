"""Acceptance: which of a round's steps are kept, and with which gradients they are taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from optex.estimators import Posterior
from optex.vectors import Walk

__all__ = [
    "SELECTIONS",
    "Acceptance",
    "Last",
    "LowestLoss",
    "MeasuredRound",
    "SmallestGradient",
    "WithinTolerance",
]


@dataclass(frozen=True)
class MeasuredRound:
    """A round after its gradients came in, as an acceptance rule sees it.

    Attributes:
        walk: the base optimizer, marked at the round's start; it may stand where the draft left it.
        proxies: [n, d], the points drafted; row 0 is the round's start.
        drafted: [n - 1, d], the gradients predicted and used in the draft.
        losses: [n], NaN where not evaluated.
        gradients: [n, d], true gradients at the proxies.
        usable: n flags: evaluated, loss and gradient finite, gradient believed.
        posterior: the estimator fitted to the history with this round's pairs in it; None without one.
    """

    walk: Walk
    proxies: Tensor
    drafted: Tensor
    losses: Tensor
    gradients: Tensor
    usable: Sequence[bool]
    posterior: Posterior | None


class Acceptance(ABC):
    """Takes a round's final steps.

    Attributes:
        keeps_window: steps not accepted keep their minibatch and their measured gradient for later rounds;
            otherwise a round uses its minibatches up.
    """

    keeps_window: bool = False

    def evaluated(self, count: int) -> range:
        """Which of the ``count`` proxies need a true gradient; all of them unless a rule says otherwise."""
        return range(count)

    def believed(
        self,
        gradients: Tensor,  # [n, d]
    ) -> Tensor:  # [n] bool
        """Which gradients may be remembered and used, beyond being finite."""
        return torch.ones(len(gradients), dtype=torch.bool, device=gradients.device)

    @abstractmethod
    def advance(self, measured: MeasuredRound) -> int:
        """Leave the walk where the round ends; how many steps from its start that is, at least one."""


class _Selection(Acceptance):
    """The paper's rules: one true step from one of the proxies, reached by the steps that were drafted."""

    @abstractmethod
    def choose(self, measured: MeasuredRound) -> int:
        """Index of the proxy to go on from, one that is usable."""

    def advance(self, measured: MeasuredRound) -> int:
        chosen = self.choose(measured)
        walk = measured.walk
        if walk.taken != chosen:
            walk.rewind()
            for gradient in measured.drafted[:chosen]:
                walk.step(gradient)
        walk.step(measured.gradients[chosen])
        return chosen + 1


def _best(values: Tensor, usable: Sequence[bool]) -> int:
    mask = torch.tensor(usable, device=values.device)
    return int(torch.where(mask, values, torch.inf).argmin())


class Last(_Selection):
    """Keep the last proxy's true step (Algorithm 1's default).

    Args:
        evaluate: ``"all"`` proxies (the paper), or the ``"last"`` alone, which is its sequential ablation:
            one gradient a round, N - 1 steps taken on predictions.
    """

    def __init__(self, evaluate: Literal["all", "last"] = "all") -> None:
        if evaluate not in ("all", "last"):
            raise ValueError(f"Last: evaluate must be 'all' or 'last', got {evaluate!r}")
        self.evaluate = evaluate

    def evaluated(self, count: int) -> range:
        return range(count - 1, count) if self.evaluate == "last" else range(count)

    def choose(self, measured: MeasuredRound) -> int:
        return max(i for i, usable in enumerate(measured.usable) if usable)


class LowestLoss(_Selection):
    """Keep the true step from the proxy with the smallest loss."""

    def choose(self, measured: MeasuredRound) -> int:
        return _best(measured.losses, measured.usable)


class SmallestGradient(_Selection):
    """Keep the true step from the proxy with the smallest gradient norm."""

    def choose(self, measured: MeasuredRound) -> int:
        return _best(torch.linalg.vector_norm(measured.gradients, dim=1), measured.usable)


class WithinTolerance(Acceptance):
    """Replay the base optimizer's own steps with true gradients, as far as they were measured nearby.

    Step 0 uses its exact gradient. Step i ≥ 1, at y_i, uses the gradient measured at the proxy x_i plus the
    estimator's difference, ``g_i + μ(y_i) - μ(x_i)``; the replay stops before the first step with
    ``‖y_i - x_i‖ > tolerance · ‖y_i - y_{i-1}‖``. With tolerance 0 the trajectory is the base optimizer's.

    Args:
        tolerance: how far, in steps, a gradient may have been measured from where it is used; ≥ 0.
        absurd: a gradient more than this many times longer than step 0's ends the replay.
    """

    keeps_window = True

    def __init__(self, tolerance: float = 2.0, *, absurd: float = 20.0) -> None:
        if not tolerance >= 0:
            raise ValueError(f"WithinTolerance: tolerance must not be negative, got {tolerance}")
        if not absurd > 0:
            raise ValueError(f"WithinTolerance: absurd must be positive, got {absurd}")
        self.tolerance = tolerance
        self.absurd = absurd

    def believed(self, gradients: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(gradients, dim=1)
        return norms <= self.absurd * norms[0].clamp_min(torch.finfo(norms.dtype).tiny)

    def advance(self, measured: MeasuredRound) -> int:
        walk = measured.walk
        walk.rewind()
        before = measured.proxies[0]
        walk.step(measured.gradients[0])
        for i in range(1, len(measured.proxies)):
            if not measured.usable[i]:
                break
            here, proxy = walk.point, measured.proxies[i]
            if not (here - proxy).norm() <= self.tolerance * (here - before).norm():
                break
            before = here
            gradient = measured.gradients[i]
            if measured.posterior is not None:
                gradient = gradient + measured.posterior.mean_difference(here, proxy)
            walk.step(gradient)
        if walk.taken > 1 and not walk.point.isfinite().all():
            # A correction went wrong; step 0 is exact, whatever the estimator said.
            walk.rewind()
            walk.step(measured.gradients[0])
        return walk.taken


SELECTIONS: Final[dict[str, type[_Selection]]] = {
    "last": Last,
    "lowest-loss": LowestLoss,
    "smallest-gradient": SmallestGradient,
}
