"""MKOR-H's rule: once the loss falls much more slowly than at its fastest, use the base optimizer alone."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["MEMORY", "SLOW", "judged", "noted", "watch"]

MEMORY: Final = 0.95  # decay of the running mean of losses
SLOW: Final = 0.1  # share of the fastest decrease below which a period is slow


def watch() -> dict[str, Any]:
    """The rule's state before the first loss, in plain numbers."""
    return {"mean": None, "last": None, "best": None, "slow": 0, "switched": False}


def noted(state: dict[str, Any], loss: Tensor) -> dict[str, Any]:
    """The state with one more loss in the running mean; one that is not finite is ignored.

    >>> float(noted(noted(watch(), torch.tensor(1.0)), torch.tensor(3.0))["mean"])
    1.1
    """
    mean = loss.detach().to(torch.float64)
    if state["mean"] is not None:
        before = state["mean"].to(mean.device)
        mixed = torch.where(before.isfinite(), MEMORY * before + (1 - MEMORY) * mean, mean)
        mean = torch.where(mean.isfinite(), mixed, before)
    return {**state, "mean": mean}


def judged(state: dict[str, Any]) -> dict[str, Any]:
    """The state after a period: ``switched`` once the decrease was slow in two periods in a row.

    With E the running mean at a period's end, r = (E_before - E) / |E_before|; slow is r < SLOW * max r.

    >>> state = watch()
    >>> for mean in (4.0, 2.0, 1.95, 1.9):
    ...     state = judged({**state, "mean": torch.tensor(mean)})
    >>> state["best"], state["slow"], state["switched"]
    (0.5, 2, True)
    """
    mean = None if state["mean"] is None else float(state["mean"])
    if mean is None or state["last"] is None:
        return {**state, "last": mean}
    rate = (state["last"] - mean) / max(abs(state["last"]), torch.finfo(torch.float64).tiny)
    best = rate if state["best"] is None else max(state["best"], rate)
    slow = state["slow"] + 1 if rate < SLOW * best else 0
    return {**state, "last": mean, "best": best, "slow": slow, "switched": state["switched"] or slow >= 2}
