"""Checks the arguments of OptExOptimizer and builds its base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Final, Protocol

import torch
from ase import Atoms
from ase.filters import Filter
from ase.utils.abc import Optimizable
from torch import Tensor, nn
from torch.optim import Optimizer

from optex.checks import shown
from optex.evaluators import Evaluator, SequentialEvaluator, WorkersEvaluator
from optex.stepping import ObservesEvaluations, base_optimizer, default_rate

__all__ = ["OWNER", "MaxStep", "Relaxable", "build_base", "check_atoms", "read_maxstep", "read_workers"]

OWNER: Final = "OptExOptimizer"
# Rates in Å²/eV. With momentum β steps are stable up to a curvature of 2 (1 + β) / lr, here 300 eV/Å²: the
# stretch of N₂ has about 290, metals have less than 30. A mode of curvature κ decays fastest where
# lr · κ = (1 - √β)²: with β = 0.8 at 0.9 eV/Å², about the softest of a metal, with 0.9 at 0.2 eV/Å².
_SETTINGS: Final[dict[str, dict[str, float]]] = {
    "sgd": {"lr": 0.006},
    "momentum": {"lr": 0.012, "momentum": 0.8},
    "nesterov": {"lr": 0.006, "momentum": 0.8},
}
_LARGEST_STEP: Final = 1.0  # Å; ASE's own optimizers warn beyond it


class Relaxable(Protocol):
    """What ASE's optimizers move: an ``ase.Atoms``, or an ASE filter around one."""

    def __len__(self) -> int: ...
    def __ase_optimizable__(self) -> Optimizable: ...


class MaxStep:
    """Shortens every step of a base optimizer, drafted or final, so that no atom moves too far."""

    def __init__(
        self,
        base: Optimizer,
        x: Tensor,  # [3 n]
        maxstep: float,
    ) -> None:
        self._x = x
        self._before = x.detach().clone()
        self._maxstep = maxstep
        base.register_step_pre_hook(self._note)
        base.register_step_post_hook(self._shorten)

    def _note(self, *_: Any) -> None:
        self._before.copy_(self._x.detach())

    @torch.no_grad()
    def _shorten(self, *_: Any) -> None:
        step = self._x - self._before
        longest = float(torch.linalg.vector_norm(step.view(-1, 3), dim=1).max())
        if longest > self._maxstep:
            self._x.copy_(self._before + step * (self._maxstep / longest))


def check_atoms(atoms: Any) -> None:
    """Refuse what cannot be relaxed.

    Raises:
        TypeError: it is neither atoms nor a filter.
        ValueError: there are no atoms.
    """
    if not isinstance(atoms, (Atoms, Filter)):
        raise TypeError(
            f"{OWNER}: atoms must be an ase.Atoms or an ASE filter around one, got {type(atoms).__name__}; "
            "for a band of images, which has no single energy, use ase.mep.NEB with ase.optimize.FIRE"
        )
    if not len(atoms):
        raise ValueError(f"{OWNER}: atoms must hold at least one atom, got none; there is nothing to relax")


def read_maxstep(maxstep: Any) -> float:
    """``maxstep`` as a float, in Å.

    Raises:
        ValueError: it is not a number above 0 and up to 1.
    """
    if isinstance(maxstep, bool) or not isinstance(maxstep, Real) or not 0 < float(maxstep) <= _LARGEST_STEP:
        raise ValueError(
            f"{OWNER}: maxstep must be a distance in Å above 0 and up to {_LARGEST_STEP:g}, got "
            f"{shown(maxstep)}; 0.2 is ASE's default"
        )
    return float(maxstep)


def read_workers(workers: Any) -> Evaluator:
    """The evaluator that ``workers`` stands for."""
    if workers is None or workers is map or (workers == 1 and not isinstance(workers, bool)):
        return SequentialEvaluator()
    return WorkersEvaluator(workers)


def build_base(
    optimizer: str | Callable[..., Optimizer],
    x: nn.Parameter,  # [d]
    lr: float | None,
) -> Optimizer:
    """The base optimizer over the positions, by its name or from the caller's function.

    Raises:
        TypeError, ValueError: it cannot be built, or not over x alone, or needs more than a gradient.
    """
    if not (isinstance(optimizer, str) or callable(optimizer)):
        raise TypeError(
            f"{OWNER}: optimizer must be a name or a function of a list of one parameter, as 'momentum' or "
            f"torch.optim.Adam, got {type(optimizer).__name__}"
        )
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, Real) or not float(lr) > 0):
        raise ValueError(f"{OWNER}: lr must be a positive number, in Å²/eV for momentum, got {shown(lr)}")
    settings = {} if lr is None else {"lr": float(lr)}
    if isinstance(optimizer, str):
        settings = _SETTINGS.get(optimizer, {"lr": default_rate(optimizer)}) | settings
        try:
            base = base_optimizer(optimizer, [x], **settings)
        except ValueError as error:
            raise ValueError(f"{OWNER}: {error}") from error
    else:
        base = optimizer([x], **settings)
    if not isinstance(base, Optimizer):
        raise TypeError(f"{OWNER}: optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    if [id(p) for group in base.param_groups for p in group["params"]] != [id(x)]:
        raise ValueError(f"{OWNER}: optimizer must be built over the list that it is handed, and nothing else")
    if isinstance(base, ObservesEvaluations):
        raise ValueError(
            f"{OWNER}: optimizer {type(base).__name__} needs more of an evaluation than its gradient, and "
            "calculators give forces alone; take 'momentum' or 'adam'"
        )
    return base
