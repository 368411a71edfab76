"""How a replay takes its steps: their lengths, and the gradients that they use."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol

from torch import Tensor

from optex.estimators.history import Locations
from optex.round.record import RoundRecord

__all__ = ["Replay", "Vectors"]


class Replay(Protocol):
    """Steps from a round's start with the gradients that were measured in it."""

    def lengths(self, rows: list[int]) -> tuple[float, list[float]]:
        """How long the last step was, and how far the proxies in these rows are from here."""
        ...

    def corrected(self, row: int, gap: float) -> Any:
        """The gradient measured at a row's proxy, with the predicted change to here, which is ``gap`` away."""
        ...

    def predicted(self) -> tuple[Any, float]:
        """The gradient predicted here, and its length."""
        ...

    def step(self, gradient: Any, *, measured: bool) -> None:
        """A step with such a gradient; ``measured`` says whether one was measured for this step."""
        ...

    def finish(self) -> None:
        """Leave the stepper at the point of the last step."""
        ...


class Vectors:
    """A replay with vectors as they are, for any base optimizer."""

    def __init__(self, record: RoundRecord) -> None:
        self._record = record
        self._before = record.proxies[0]
        self._row = 0  # that the next measured step uses
        self.step(record.gradients[0], measured=True)

    def lengths(self, rows: list[int]) -> tuple[float, list[float]]:
        here, record = self._record.stepper.point, self._record
        gaps = [here - record.proxies[row] for row in rows]
        step, *distances = record.space.norms([here - self._before, *gaps]).tolist()
        self._before = here
        return step, distances

    def corrected(self, row: int, gap: float) -> Tensor:
        record, gradient = self._record, self._record.gradients[row]
        self._row = row
        if record.posterior is None or not gap > 0:
            return gradient
        here = record.posterior.locate(self._before[None])
        return gradient + record.posterior.differences(here, self._origin(row))[0]

    def _origin(self, row: int) -> Locations:
        """The proxy of a row, which the history holds unless it is a short one."""
        record = self._record
        assert record.posterior is not None
        point, slot, history = record.proxies[row], record.slots.get(row), record.posterior.history
        return history.locate(point[None]) if slot is None else history.locate_stored(slot, point)

    def predicted(self) -> tuple[Tensor, float]:
        record = self._record
        assert record.posterior is not None
        self._before = record.stepper.point
        gradient = record.posterior.mean(self._before)
        return gradient, float(record.space.norms([gradient])[0])

    def step(self, gradient: Tensor, *, measured: bool) -> None:
        stepper = self._record.stepper
        if measured:
            stepper.recall(self._record.observations, self._row)
        with nullcontext() if measured else stepper.drafting():
            stepper.step(gradient)

    def finish(self) -> None:
        pass
