"""Parameters as one flat vector, and a base optimizer that can walk ahead and come back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from optex.vector_space import Space

__all__ = ["Fork", "ParameterVector", "Settings", "Walk"]

Presence = tuple[bool, ...]


class ParameterVector:
    """The trainable parameters of an optimizer, read and written as one vector of length ``dimension``.

    The vector's dtype is the widest among the parameters, float32 at least, so that reading loses nothing;
    its device is the first parameter's. ``buffers`` are what an evaluation changes beside the gradients;
    None where it is not known what that is.
    """

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor] | None = None) -> None:
        self.parameters = list(parameters)
        self.buffers = None if buffers is None else list(buffers)
        self.sizes = [p.numel() for p in self.parameters]
        self.dimension = sum(self.sizes)
        self.dtype = torch.float32
        for p in self.parameters:
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._space = Space(self.dimension)

    @property
    def whole(self) -> ParameterVector:
        """The vector of the parameters themselves, which is this one unless it is a slice of them."""
        return self

    @property
    def space(self) -> Space:
        """Where the vector lives, and how to sum over its coordinates."""
        return self._space

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        return [v.view(p.shape) for v, p in zip(vector.split(self.sizes), self.parameters, strict=True)]

    def read(self) -> Tensor:  # [d]
        """The parameters' values, copied."""
        return self._flatten([p.detach() for p in self.parameters])

    @torch.no_grad()
    def write(
        self,
        vector: Tensor,  # [d]
    ) -> None:
        """Copy a vector into the parameters, each in its own dtype."""
        torch._foreach_copy_(self.parameters, self._pieces(vector))

    def read_buffers(self) -> list[Tensor]:
        """The buffers' values, copied."""
        return [buffer.detach().clone() for buffer in self.buffers or ()]

    @torch.no_grad()
    def write_buffers(self, values: Sequence[Tensor]) -> None:
        """Copy values into the buffers."""
        for buffer, value in zip(self.buffers or (), values, strict=True):
            buffer.copy_(value)

    def read_gradients(self) -> tuple[Tensor, Presence]:  # [d], one flag a parameter
        """The parameters' ``.grad`` as a vector, zero where there is none, and which ones there are."""
        present = tuple(p.grad is not None for p in self.parameters)
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters]
        return self._flatten(pieces), present

    def write_gradients(
        self,
        vector: Tensor,  # [d]
        present: Presence,
    ) -> None:
        """Set every ``.grad`` from a copy of the vector; None where not present."""
        for p, piece, there in zip(self.parameters, self._pieces(vector.clone()), present, strict=True):
            piece = piece.to(p.device, p.dtype)
            # Fused optimizers step through memory: a gradient has to lie in it as its parameter does.
            laid_out = piece if p.is_contiguous() else torch.empty_like(p).copy_(piece)
            p.grad = laid_out if there else None

    def clear_gradients(self) -> None:
        """Set every ``.grad`` to None."""
        for p in self.parameters:
            p.grad = None

    def _flatten(self, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat([piece.reshape(-1).to(self.device, self.dtype) for piece in pieces])


def _copy_value(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class Settings:
    """The hyperparameters of a base optimizer's groups, saved."""

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


class Fork:
    """All that a step of the base optimizer changes, saved: parameters, state, hyperparameters, schedule.

    Memory: the parameters and the base optimizer's state once more (for Adam 3 · d numbers).
    """

    def __init__(self, base: Optimizer, scheduler: LRScheduler | None) -> None:
        self._base = base
        self._scheduler = scheduler
        self._values = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]
        self._settings = Settings(base)
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
        self._settings.restore()
        for p in [p for p in self._base.state if p not in self._state]:
            del self._base.state[p]
        for p, saved in self._state.items():
            live = self._base.state[p]
            for key in [key for key in live if key not in saved]:
                del live[key]
            _restore_entries(live, saved)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(copy.deepcopy(self._schedule))  # type: ignore[arg-type]


def _restore_entries(live: dict[str, Any], saved: dict[str, Any]) -> None:
    # In place where possible: captured graphs and schedulers hold on to the live tensors.
    for key, value in saved.items():
        there = live.get(key)
        if isinstance(value, Tensor) and isinstance(there, Tensor) and there.shape == value.shape:
            there.copy_(value)
        else:
            live[key] = _copy_value(value)


class Walk:
    """A base optimizer taken for a walk: steps with gradients that are handed to it, and the way back.

    The scheduler, if any, ticks after every step, so that each step has its own learning rate whether it is
    drafted or final.
    """

    def __init__(self, base: Optimizer, vector: ParameterVector, scheduler: LRScheduler | None = None) -> None:
        self._base = base
        self._scheduler = scheduler
        self.vector = vector
        self.present: Presence = (True,) * len(vector.parameters)
        self.taken = 0  # steps since the mark
        self._start = self.mark()

    def mark(self) -> Fork:
        """Remember this place; ``rewind`` comes back to it."""
        self._start = Fork(self._base, self._scheduler)
        self.taken = 0
        return self._start

    def rewind(self) -> None:
        """Back to the mark, bit for bit."""
        self._start.restore()
        self.taken = 0

    def step(
        self,
        gradient: Tensor,  # [d]
    ) -> None:
        """One step of the base optimizer (and its schedule) with this gradient."""
        self.vector.write_gradients(gradient, self.present)
        self._take()

    def step_with_current_gradients(self) -> None:
        """One step with whatever the parameters' ``.grad`` hold."""
        self._take()

    def _take(self) -> None:
        self._step_base()
        if self._scheduler is not None:
            self._scheduler.step()
        self.taken += 1

    def _step_base(self) -> None:
        self._base.step()

    def gather(self) -> None:
        """Make the parameters whole where they are split among processes; every one of them has to."""

    def arrive(
        self,
        point: Tensor,  # [d]
    ) -> None:
        """Put the parameters here."""
        self.vector.write(point)

    def dissolve(self) -> None:
        """Give parameters and state back to the base optimizer, where they are not its own."""

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's."""
        return self._base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state of the base optimizer."""
        self._base.load_state_dict(state)

    @property
    def point(self) -> Tensor:  # [d]
        """Where the walk stands, copied."""
        return self.vector.read()
