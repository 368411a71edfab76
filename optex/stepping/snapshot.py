"""All that a step of the base optimizer changes, saved so that it can be put back bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["TORCHS_OWN", "Hyperparameters", "Settings", "Snapshot"]


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


# Attributes that torch itself keeps in an optimizer; no step changes them, but for state and groups.
TORCHS_OWN: Final = frozenset(vars(torch.optim.SGD([torch.zeros(1)]))) | {"step", "_opt_called"}


class Attributes:
    """What a base optimizer keeps in attributes of its own, outside state and groups: counters, lists, tensors.

    Numbers, strings, tensors and containers of these are saved. An object of another kind is put back where a
    step replaced it; a step that changes one in place is refused, as that could not be taken back. An optimizer
    that it wraps, and whose state it shares, is saved in the same way.
    """

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        own = {name: value for name, value in vars(base).items() if name not in TORCHS_OWN}
        self._saved = {name: _copy_plain(value) for name, value in own.items() if _is_plain(value)}
        self._others = {name: value for name, value in own.items() if name not in self._saved}
        wrapped = {name: value for name, value in self._others.items() if _is_wrapped(value, base)}
        self._wrapped = [Attributes(value) for value in wrapped.values()]
        self._fingerprints = {
            name: _fingerprint(value) for name, value in self._others.items() if name not in wrapped
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back; may be called again."""
        live = vars(self._base)
        for name in [name for name in live if name not in TORCHS_OWN]:
            if name not in self._saved and name not in self._others:
                delattr(self._base, name)
        for name, value in self._others.items():
            setattr(self._base, name, value)
        for name, value in self._saved.items():
            there = live.get(name)
            if isinstance(value, Tensor) and isinstance(there, Tensor) and there.shape == value.shape:
                there.copy_(value)
            else:
                setattr(self._base, name, _copy_plain(value))
        for attributes in self._wrapped:
            attributes.restore()

    def check(self) -> None:
        """Refuse steps that changed an object which is not saved.

        Raises:
            TypeError: they did; the message names the attribute.
        """
        for attributes in self._wrapped:
            attributes.check()
        for name, fingerprint in self._fingerprints.items():
            value = self._others[name]
            if _fingerprint(value) != fingerprint:
                kind = type(self._base).__name__
                raise TypeError(
                    f"OptEx: a step of {kind} changes its attribute {name!r} ({type(value).__name__}) in "
                    "place, and that cannot be taken back; keep what a step changes in state, in the groups, "
                    "or in plain numbers and tensors"
                )


def _is_wrapped(value: Any, base: Optimizer) -> bool:
    return isinstance(value, Optimizer) and value is not base and value.state is base.state


def _fingerprint(value: Any) -> bytes | None:
    """The object's content as bytes; None where it cannot be pickled, or is a function."""
    if callable(value):
        return None
    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001  (any object may refuse in its own way)
        return None


_Plain = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(map(_is_plain, value))
    # A parameter is the snapshot's already, and a copy of it would be another one.
    return isinstance(value, _Plain) and not isinstance(value, torch.nn.Parameter)


def _copy_plain(value: Any) -> Any:
    return copy.deepcopy(value.detach()) if isinstance(value, Tensor) else copy.deepcopy(value)


class Settings:
    """Hyperparameters, further attributes and schedule of a base optimizer, saved."""

    def __init__(self, base: Optimizer, scheduler: LRScheduler | None) -> None:
        self._scheduler = scheduler
        self._hyperparameters = Hyperparameters(base)
        self._attributes = Attributes(base)
        self._schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def check(self) -> None:
        """Refuse steps since then that could not be taken back; as ``Attributes.check``."""
        self._attributes.check()

    def restore(self) -> None:
        """Put them back; may be called again."""
        self._hyperparameters.restore()
        self._attributes.restore()
        if self._scheduler is not None and self._schedule is not None:
            self._scheduler.load_state_dict(copy.deepcopy(self._schedule))


class Snapshot:
    """Parameters, state, hyperparameters, further attributes and schedule of a base optimizer, saved.

    Memory: the parameters and the base optimizer's state once more (for Adam 3 · d numbers).
    """

    def __init__(self, base: Optimizer, scheduler: LRScheduler | None) -> None:
        self._base = base
        self._values = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]
        self._settings = Settings(base, scheduler)
        _check_entries(base)
        self._state = {
            p: {key: _copy_value(value) for key, value in entries.items()} for p, entries in base.state.items()
        }

    def check(self) -> None:
        """Refuse steps since then that could not be taken back; as ``Attributes.check``."""
        self._settings.check()

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the base optimizer and its parameters back to where they were; may be called again."""
        for group, values in zip(self._base.param_groups, self._values, strict=True):
            if values:
                torch._foreach_copy_(group["params"], values)
        self._settings.restore()
        for p in [p for p in self._base.state if p not in self._state]:
            del self._base.state[p]
        for p, saved in self._state.items():
            live = self._base.state[p]
            for key in [key for key in live if key not in saved]:
                del live[key]
            _restore_entries(live, saved)


def _check_entries(base: Optimizer) -> None:
    for entries in base.state.values():
        if not isinstance(entries, dict):
            raise TypeError(
                f"OptEx: {type(base).__name__} keeps a {type(entries).__name__} as the state of a parameter, "
                "where torch's optimizers keep a dict; wrap it in one, as state[p] = {'value': ...}"
            )
