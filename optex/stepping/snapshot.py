"""All that a step of the base optimizer changes, saved so that it can be put back bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Hyperparameters", "Snapshot"]


def _copy_value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _restore_entries(live: dict[str, Any], saved: dict[str, Any]) -> None:
    # In place where possible: captured graphs and schedulers hold on to the live tensors.
    for key, value in saved.items():
        there = live.get(key)
        if isinstance(value, Tensor) and isinstance(there, Tensor) and there.shape == value.shape:
            there.copy_(value)
        else:
            live[key] = _copy_value(value)


class Hyperparameters:
    """The settings of a base optimizer's groups, saved."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._groups = [
            {key: _copy_value(value) for key, value in group.items() if key != "params"}
            for group in base.param_groups
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back; may be called again."""
        for group, settings in zip(self._base.param_groups, self._groups, strict=True):
            _restore_entries(group, settings)


class Snapshot:
    """Parameters, state, hyperparameters and schedule of a base optimizer, saved.

    Memory: the parameters and the base optimizer's state once more (for Adam 3 · d numbers).
    """

    def __init__(self, base: Optimizer, scheduler: LRScheduler | None) -> None:
        self._base = base
        self._scheduler = scheduler
        self._values = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]
        self._hyperparameters = Hyperparameters(base)
        self._state = {
            p: {key: _copy_value(value) for key, value in entries.items()} for p, entries in base.state.items()
        }
        self._schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the base optimizer and its parameters back to where they were; may be called again."""
        for group, values in zip(self._base.param_groups, self._values, strict=True):
            if values:
                torch._foreach_copy_(group["params"], values)
        self._hyperparameters.restore()
        for p in [p for p in self._base.state if p not in self._state]:
            del self._base.state[p]
        for p, saved in self._state.items():
            live = self._base.state[p]
            for key in [key for key in live if key not in saved]:
                del live[key]
            _restore_entries(live, saved)
        if self._scheduler is not None and self._schedule is not None:
            self._scheduler.load_state_dict(copy.deepcopy(self._schedule))
