"""Batches of indices whose size may change at any time, for a ``DataLoader`` or a plain loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sized
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import Sampler

from optex.batching.adadagrad import BatchSizeController, BatchSizeTest
from optex.batching.statistics import GradientStatistics
from optex.checks import check_flag, check_integer, saved_entry, saved_integer

__all__ = ["AdaptiveBatches", "TellsNoise"]

_REMEMBERED = 1024  # sizes of the last batches drawn; OptEx has a few times its parallelism under way


@runtime_checkable
class TellsNoise(Protocol):
    """What ``AdaptiveBatches`` reads of a round's report; ``optex.RoundReport`` has it."""

    @property
    def accepted(self) -> int:
        """Steps kept; 0 where the round was skipped."""
        ...

    @property
    def noise_variance(self) -> float:
        """Of one component, averaged over the round's gradients; NaN where the source tells none."""
        ...

    @property
    def gradient_norm(self) -> float:
        """Length of the gradient at the round's start."""
        ...

    @property
    def dimension(self) -> int:
        """How many components a gradient has."""
        ...

    @property
    def batch_numbers(self) -> tuple[int, ...]:
        """The batches of the round's gradients, numbered from 0 in the order they were drawn."""
        ...


class AdaptiveBatches(Sampler[list[int]]):
    """Lists of indices, drawn without replacement epoch by epoch, of a size that a test on gradients sets.

    A ``batch_sampler`` for ``torch.utils.data.DataLoader``, or something to loop over. Each ``iter``
    continues where drawing stopped and ends with the epoch. The size is looked up when a batch is drawn: a new
    one holds for all batches not drawn yet. (Workers of a DataLoader draw ahead by ``prefetch_factor``
    batches each, OptEx by its ``parallelism``.) An epoch's order depends on its number and the seed alone,
    whatever the sizes.

    Args:
        data: what the indices are of, or how many there are, at least 2.
        batch_size: at the start, at least 2.
        maximum: largest size; None is all the data.
        test: proposes sizes; None is ``NormTest()``.
        growth: largest factor a step, above 1; see ``BatchSizeController``.
        shuffle: a new order in every epoch; otherwise 0, 1, 2, ...
        drop_last: leave out the rest of an epoch that is smaller than a batch. Otherwise the rest is a batch;
            a single sample, whose gradient has no variance, joins the batch before.
        seed: of the orders, at least 0.

    Attributes:
        controller: decides on the size.
        epoch: the one that is being drawn, from 0.
        batches_drawn, samples_drawn: since the first epoch.

    Raises:
        ValueError: an argument is out of range.
        TypeError: ``shuffle`` or ``drop_last`` is no flag, or ``test`` no ``BatchSizeTest``.

    In a plain loop:

    >>> import torch, optex
    >>> from optex.batching import AdaptiveBatches, NormTest
    >>> _ = torch.manual_seed(0)
    >>> inputs, model = torch.randn(600, 3), torch.nn.Linear(3, 1)
    >>> targets = inputs.sum(1, keepdim=True) + torch.randn(600, 1)
    >>> source = optex.PerSampleSource(lambda b: (model(b[0]) - b[1]).square().mean(), model)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    >>> batches = AdaptiveBatches(600, batch_size=8, test=NormTest(eta=0.5))
    >>> for indices in batches:
    ...     loss, statistics = source.measure((inputs[indices], targets[indices]))  # leaves the gradient
    ...     optimizer.step()
    ...     size = batches.update(statistics)
    >>> batches.batches_drawn < 600 / 8, size > 8
    (True, True)
    """

    def __init__(
        self,
        data: Sized | int,
        batch_size: int,
        *,
        maximum: int | None = None,
        test: BatchSizeTest | None = None,
        growth: float = 2.0,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        owner = type(self).__name__
        self.count: int = check_integer(owner, "data", len(data) if isinstance(data, Sized) else data, least=2)
        largest = self.count if maximum is None else maximum
        check_integer(owner, "maximum", largest, least=2, most=self.count)
        check_integer(owner, "batch_size", batch_size, least=2, most=largest)
        self.controller: BatchSizeController = BatchSizeController(
            batch_size, largest, test=test, growth=growth
        )
        self.shuffle: bool = check_flag(owner, "shuffle", shuffle)
        self.drop_last: bool = check_flag(owner, "drop_last", drop_last)
        self.seed: int = check_integer(owner, "seed", seed, least=0)
        self.epoch: int = 0
        self.batches_drawn: int = 0
        self.samples_drawn: int = 0
        self._place = 0  # in the epoch's order
        self._sizes: deque[int] = deque(maxlen=_REMEMBERED)  # of the last batches drawn

    @property
    def batch_size(self) -> int:
        """Samples in the next batch; may be set."""
        return self.controller.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.controller.batch_size = size

    def __iter__(self) -> Iterator[list[int]]:
        """The batches left in this epoch."""
        epoch = self.epoch
        order = self._order(epoch)
        while self.epoch == epoch:
            batch = self._next(order)
            if batch:
                yield batch

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.count))
        # A generator an epoch, so that where drawing stands is two numbers.
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
        return torch.randperm(self.count, generator=generator).tolist()

    def _next(self, order: list[int]) -> list[int]:
        """The next batch, empty where the rest of the epoch is dropped; the place moves on."""
        size, left = self.batch_size, self.count - self._place
        if self.drop_last and left < size:
            size = 0
        elif left - size <= 1 and not self.drop_last:
            size = left
        batch = order[self._place : self._place + size]
        self._place += size
        if not size or self._place == self.count:
            self.epoch, self._place = self.epoch + 1, 0
        if batch:
            self.batches_drawn += 1
            self.samples_drawn += len(batch)
            self._sizes.append(len(batch))
        return batch

    def __len__(self) -> int:
        """Batches left in the epoch at the present size."""
        left = self.count - self._place
        whole, rest = divmod(left, self.batch_size)
        return whole + (not self.drop_last and (rest > 1 or (rest == 1 and not whole)))

    def update(self, told: GradientStatistics | TellsNoise) -> int:
        """The size for batches not drawn yet, after this gradient or round.

        Args:
            told: statistics of a batch's gradient (``PerSampleSource.measure``), or the report of a round of
                ``OptEx``, run on this sampler's batches from the first on with a source that tells its noise. A
                round that was skipped changes nothing.

        Raises:
            ValueError: no noise was told, or the round's batches are not this sampler's.
            TypeError: ``told`` is neither.
        """
        if isinstance(told, GradientStatistics):
            return self.controller.update(told)
        if not isinstance(told, TellsNoise):
            raise TypeError(
                "AdaptiveBatches.update: told must be GradientStatistics or the report of a round, got "
                f"{type(told).__name__}"
            )
        if not told.accepted:
            return self.batch_size
        if math.isnan(told.noise_variance):
            raise ValueError(
                "AdaptiveBatches.update: the round's source told no noise; give OptEx.rounds a source that "
                "does: optex.PerSampleSource(objective, model), or AccumulatingSource with its parameters"
            )
        size = self._size_of(told.batch_numbers)
        return self.controller.update(
            GradientStatistics.of_noise(told.noise_variance, told.dimension, told.gradient_norm, size)
        )

    def _size_of(self, numbers: tuple[int, ...]) -> float:
        """The harmonic mean of the sizes of a round's batches: the report averages V / b over them."""
        first = self.batches_drawn - len(self._sizes)
        if not numbers or min(numbers) < first or max(numbers) >= self.batches_drawn:
            raise ValueError(
                f"AdaptiveBatches.update: the round's batches {numbers} are not among the last ones drawn "
                f"here, {first} to {self.batches_drawn - 1}; hand this sampler's own batches to OptEx.rounds, "
                "from the first on"
            )
        return len(numbers) / sum(1 / self._sizes[number - first] for number in numbers)

    def state_dict(self) -> dict[str, Any]:
        """Where drawing stands: seed, epoch, place, counts, and the sizes of the last batches."""
        return {
            "controller": self.controller.state_dict(),
            "count": self.count,
            "seed": self.seed,
            "epoch": self.epoch,
            "place": self._place,
            "batches_drawn": self.batches_drawn,
            "samples_drawn": self.samples_drawn,
            "sizes": list(self._sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state: the batches that follow are those that would have followed.

        Raises:
            ValueError: it is cut short, or of other data or another seed; nothing is changed.
        """
        owner = f"{type(self).__name__}.load_state_dict"
        for name, own in (("count", self.count), ("seed", self.seed)):
            if saved_entry(owner, state, name) != own:
                raise ValueError(f"{owner}: saved {name} is {state[name]!r}, and this sampler's is {own}")
        found = {
            name: saved_integer(owner, state, name) for name in ("epoch", "batches_drawn", "samples_drawn")
        }
        place = check_integer(
            owner, "saved place", saved_entry(owner, state, "place"), least=0, most=self.count - 1
        )
        sizes = [check_integer(owner, "saved sizes", size) for size in saved_entry(owner, state, "sizes")]
        if len(sizes) > found["batches_drawn"]:
            raise ValueError(f"{owner}: saved sizes are of {len(sizes)} batches, and fewer were drawn")
        self.controller.load_state_dict(saved_entry(owner, state, "controller"))
        for name, value in found.items():
            setattr(self, name, value)
        self._place, self._sizes = place, deque(sizes, maxlen=_REMEMBERED)
