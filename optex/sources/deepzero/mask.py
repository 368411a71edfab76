"""Which coordinates are active: drawn anew every few epochs, as many in each layer as its ratio says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optex.checks import (
    check_integer,
    check_number,
    check_parameters,
    saved_entry,
    saved_integer,
    saved_tensor,
    shown,
)

__all__ = ["DynamicMask"]

_OWNER = "DynamicMask"


class DynamicMask:
    """A share of each parameter's coordinates, drawn anew every few epochs.

    Of a parameter with n numbers and the ratio r, ``n - round((1 - r) n)`` are active. Which ones depends on
    ``seed``, on ``epoch // every`` and on the parameter's place: on nothing that has happened before. Set
    ``mask.epoch`` where an epoch begins, between rounds. Weights stay dense; the gradient is masked.

    Args:
        parameters: those of the source, in its order.
        ratios: the active share of each, 0 to 1, as ``zo_grasp_ratios`` answers them; or one number for all
            parameters of two dimensions and more, with the others whole.
        every: epochs from one draw to the next.
        seed: of the draws; not negative.

    Raises:
        ValueError: a ratio is outside of 0 to 1, there is not one for each parameter, no coordinate is active,
            or a count is out of range.

    >>> import torch, optex
    >>> weight, bias = torch.nn.Parameter(torch.zeros(10, 10)), torch.nn.Parameter(torch.zeros(10))
    >>> mask = optex.DynamicMask([weight, bias], 0.05)
    >>> mask.active()[0].tolist(), len(mask.active()[1])
    ([5, 20, 36, 82, 93], 10)
    >>> mask.epoch = 5
    >>> mask.active()[0].tolist()
    [18, 45, 50, 65, 69]

    Source: Chen et al., ICLR 2024, arXiv 2310.02025, section 4: layer-wise ratios are kept, the coordinates are
    drawn at random; every 5 epochs in the authors' code.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        ratios: float | np.floating[Any] | Sequence[float] = 0.1,
        every: int = 5,
        seed: int = 0,
    ) -> None:
        self.shapes: list[tuple[int, ...]] = [tuple(p.shape) for p in check_parameters(_OWNER, parameters)]
        each = (
            [ratios if len(shape) > 1 else 1.0 for shape in self.shapes]
            if isinstance(ratios, (int, float, np.number))
            else ratios
        )
        if not isinstance(each, Iterable):
            raise TypeError(f"{_OWNER}: ratios must be a number, or one a parameter, got {shown(ratios)}")
        self.ratios: list[float] = [check_number(_OWNER, "ratios", ratio, most=1.0) for ratio in each]
        if len(self.ratios) != len(self.shapes):
            raise ValueError(
                f"{_OWNER}: ratios must be one a parameter, {len(self.shapes)}, got {len(self.ratios)}"
            )
        self.every: int = check_integer(_OWNER, "every", every)
        self.seed: int = check_integer(_OWNER, "seed", seed, least=0)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        self.counts: list[int] = [
            n - round((1 - ratio) * n) for n, ratio in zip(sizes, self.ratios, strict=True)
        ]
        if not sum(self.counts):
            raise ValueError(f"{_OWNER}: no coordinate is active at ratios {self.ratios}; raise them")
        # A tensor that is changed in place: evaluators in other processes notice.
        self._epoch = torch.zeros((), dtype=torch.int64)

    @property
    def epoch(self) -> int:
        """The present epoch, from 0; set it where an epoch begins."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(check_integer(_OWNER, "epoch", epoch, least=0))

    def active(self) -> list[Tensor]:  # of [k], int64
        """The present epoch's coordinates of each parameter, ascending, into the parameter as one row."""
        return self.at(self.epoch)

    def at(self, epoch: int) -> list[Tensor]:  # of [k], int64
        """The coordinates of any epoch."""
        draw, found = check_integer(_OWNER, "epoch", epoch, least=0) // self.every, []
        for place, (shape, count) in enumerate(zip(self.shapes, self.counts, strict=True)):
            generator = np.random.Generator(np.random.PCG64([self.seed, draw, place]))
            order = generator.permutation(int(np.prod(shape)))
            found.append(torch.from_numpy(np.sort(order[:count]).astype(np.int64)))
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that decides the coordinates."""
        ratios = torch.tensor(self.ratios, dtype=torch.float64)
        return {"epoch": self.epoch, "every": self.every, "seed": self.seed, "ratios": ratios}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the mask that was saved, ratios and seed included.

        Raises:
            ValueError: the state is of other parameters, or not a mask's; nothing has changed.
        """
        saved = saved_tensor(_OWNER, state, "ratios", (len(self.shapes),))
        every, seed = saved_integer(_OWNER, state, "every", least=1), saved_integer(_OWNER, state, "seed")
        epoch = check_integer(_OWNER, "saved epoch", saved_entry(_OWNER, state, "epoch"), least=0)
        shapes = [torch.empty(shape, device="meta") for shape in self.shapes]
        other = DynamicMask(shapes, saved.tolist(), every, seed)
        self.ratios, self.every, self.seed, self.counts = other.ratios, other.every, other.seed, other.counts
        self.epoch = epoch
