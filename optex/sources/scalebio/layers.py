"""LISA: a few blocks of a network are trained at a time, drawn anew every so many steps.

Pan et al.: *LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning*,
NeurIPS 2024, arXiv 2403.17919; its use in ScaleBiO: arXiv 2406.19976.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from optex.checks import check_integer, shown

__all__ = ["LayerSampler", "NumberedBatch"]

_OWNER: Final = "LayerSampler"


class NumberedBatch(NamedTuple):
    """A batch that knows which one it is.

    Attributes:
        number: from 0, in the order of the data.
        batch: as it came.
    """

    number: int
    batch: Any


class LayerSampler:
    """Which blocks are trained: γ of them, drawn without replacement, new ones every K batches.

    What lies outside of the blocks (embeddings, the head) is always trained. The draw is a function of ``seed``
    and of the batch's number alone, so that a run that is resumed, a proxy that is evaluated elsewhere and one
    that is evaluated twice all have the same blocks; :meth:`numbered` gives batches their numbers. Two copies
    of a network have draws of their own, as ScaleBiO's w and u have.

    ``requires_grad`` stays as it is, because the list of parameters must not change within a round of
    ``OptEx``. A frozen parameter gets a zero gradient, which is not computed; momentum still moves it for a
    while, and so does weight decay. With ``frozen="none"`` it gets None instead, which torch's optimizers skip,
    as in the paper: use that in a plain loop, where no round spans two draws. Under ``OptEx`` use ``stride=1``,
    because a step on predictions alone has no batch, and so no draw.

    Args:
        path: where in the network the blocks are: the name of a ``ModuleList`` or ``Sequential``, as
            ``"transformer.h"``; its children are the blocks.
        active: γ, how many blocks are trained.
        interval: K, batches between two draws.
        seed: of the draws, not negative.
        frozen: ``"zero"`` or ``"none"``.

    Raises:
        TypeError, ValueError: an argument cannot work.

    Source: Pan et al., arXiv 2403.17919; 2 blocks every 20 steps are those of ScaleBiO's released runs.

    >>> sampler = LayerSampler("blocks", active=2, interval=20)
    >>> sampler.chosen(19, 8) == sampler.chosen(0, 8), sampler.chosen(20, 8) == sampler.chosen(0, 8)
    (True, False)
    """

    def __init__(
        self,
        path: str,
        *,
        active: int = 2,
        interval: int = 20,
        seed: int = 0,
        frozen: Literal["zero", "none"] = "zero",
    ) -> None:
        if not isinstance(path, str) or not path:
            raise TypeError(
                f"{_OWNER}: path must name the container of the blocks, as 'blocks', got {shown(path)}"
            )
        if frozen not in ("zero", "none"):
            raise ValueError(f"{_OWNER}: frozen must be 'zero' or 'none', got {shown(frozen)}")
        self.path = path
        self.active: int = check_integer(_OWNER, "active", active)
        self.interval: int = check_integer(_OWNER, "interval", interval)
        self.seed: int = check_integer(_OWNER, "seed", seed, least=0)
        self.frozen = frozen

    def chosen(self, number: int, blocks: int, copy: int = 0) -> tuple[int, ...]:
        """Indices of the blocks that are trained at a batch.

        Args:
            number: of the batch.
            blocks: how many there are.
            copy: of the network.
        """
        draws = np.random.default_rng([self.seed, number // self.interval, copy])
        return tuple(sorted(int(place) for place in draws.permutation(blocks)[: self.active]))

    def frozen_parameters(self, network: nn.Module, number: int, copy: int = 0) -> list[Tensor]:
        """Parameters of the blocks that are not trained at a batch."""
        blocks = self.blocks(network)
        active = self.chosen(number, len(blocks), copy)
        return [p for place, block in enumerate(blocks) if place not in active for p in block.parameters()]

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The network's blocks, in their order.

        Raises:
            ValueError: there is nothing of that name in it, or fewer blocks than are to be trained.
        """
        try:
            found = list(network.get_submodule(self.path).children())
        except AttributeError as error:
            names = ", ".join(name for name, _ in network.named_children()) or "no children"
            raise ValueError(
                f"{_OWNER}: path {self.path!r} is not in {type(network).__name__}, which has {names}"
            ) from error
        if len(found) < self.active:
            raise ValueError(
                f"{_OWNER}: {self.path!r} has {len(found)} blocks, fewer than active={self.active}; name the "
                "container whose children are the blocks, or lower active"
            )
        return found

    def numbered(self, batches: Iterable[Any], first: int = 0) -> Iterator[NumberedBatch]:
        """The batches with their numbers.

        Args:
            batches: in the order of the data.
            first: number of the first one: ``optimizer.batches_drawn`` in a run that is resumed.
        """
        check_integer(_OWNER, "first", first, least=0)
        for number, batch in enumerate(batches, first):
            yield NumberedBatch(number, batch)
