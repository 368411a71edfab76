"""Forward passes with one coordinate shifted: in turn or many at once, whole or from a block on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optex.draws import generator_states, set_generator_states
from optex.functional import called_with, parameter_names
from optex.sources.interface import scalar_loss

__all__ = ["BlockLoss", "Chunk", "Passes", "Unperturbed", "coordinate"]

_OWNER = "CoordinateSource"


def _first(batch: Any) -> Tensor:
    return batch[0]


class BlockLoss(nn.Module):
    """The loss of blocks that follow each other, which can be entered at any of them.

    A coordinate of block i leaves the input of block i as it is: ``CoordinateSource`` evaluates the blocks from
    i on alone, on the inputs that one unperturbed pass has kept.

    Args:
        blocks: modules from one tensor to another.
        loss: of the last block's output and the batch; a scalar.
        inputs: of the batch, the first block's input; by default ``batch[0]``.

    Raises:
        TypeError: a block is no module, or ``loss`` or ``inputs`` cannot be called.
        ValueError: there is no block.

    >>> import torch, optex
    >>> blocks = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> objective = optex.BlockLoss(blocks, lambda out, batch: (out - batch[1]).square().mean())
    >>> source = optex.CoordinateSource(objective, blocks.parameters())
    >>> source.evaluations                       # 1 + 9 whole passes + 4 of a third
    11.333333333333334
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module] | nn.Sequential,
        loss: Callable[[Tensor, Any], Tensor],
        inputs: Callable[[Any], Tensor] = _first,
    ) -> None:
        super().__init__()
        if isinstance(blocks, nn.Module) and not isinstance(blocks, nn.Sequential):
            raise TypeError(
                "BlockLoss: blocks must be torch.nn.Sequential or a list of modules, got "
                f"{type(blocks).__name__}"
            )
        try:
            parts = list(blocks)
        except TypeError as error:
            raise TypeError(
                f"BlockLoss: blocks must be a list of modules, got {type(blocks).__name__}"
            ) from error
        if not parts:
            raise ValueError("BlockLoss: blocks is empty; give at least one module")
        for part in parts:
            if not isinstance(part, nn.Module):
                raise TypeError(f"BlockLoss: blocks must be torch.nn.Module, got {type(part).__name__}")
        for name, function in (("loss", loss), ("inputs", inputs)):
            if not callable(function):
                raise TypeError(f"BlockLoss: {name} must be callable, got {type(function).__name__}")
        self.blocks: nn.Sequential = blocks if isinstance(blocks, nn.Sequential) else nn.Sequential(*parts)
        self.loss = loss
        self.inputs = inputs

    def forward(self, batch: Any, start: int = 0, value: Tensor | None = None) -> Tensor:  # []
        """The loss; with ``value`` as the input of block ``start``, from there on."""
        output = self.inputs(batch) if value is None else value
        for block in list(self.blocks)[start:]:
            output = block(output)
        return self.loss(output, batch)

    def entries(self, parameters: Sequence[Tensor]) -> list[int]:
        """The first block that each parameter is in; 0 for those in no block."""
        owners: dict[int, int] = {}
        for number, block in enumerate(self.blocks):
            for p in block.parameters():
                owners.setdefault(id(p), number)
        return [owners.get(id(p), 0) for p in parameters]


@dataclass(frozen=True)
class Chunk:
    """Coordinates of one parameter whose losses are evaluated together.

    Attributes:
        place: of the parameter among all.
        indices: [c], ascending, into the parameter as one row.
    """

    place: int
    indices: Tensor


@dataclass(frozen=True)
class Unperturbed:
    """What one pass at the parameters' values leaves behind.

    Attributes:
        loss: [], float64.
        inputs: of those blocks that are entered, by number; empty for objectives that have none.
        draws: the states of torch's generators at the entry of those blocks; under 0 at the pass's start.
        buffers: those that the pass has changed, each with its value before.
    """

    loss: Tensor
    inputs: dict[int, Tensor]
    draws: dict[int, list[Tensor]]
    buffers: list[tuple[Tensor, Tensor]]


class Passes:
    """Evaluates losses at points that differ from the parameters in one coordinate.

    All passes draw the same dropout and start from the same buffers; parameters come back to the bit. It can be
    pickled, with the objective, and then evaluates at copies of the parameters.

    Args:
        objective: the loss of a batch.
        parameters: in the order in which ``Chunk.place`` counts.
        mu: how far a coordinate is shifted.
        central: to both sides.
        vectorized: a chunk in one ``torch.vmap``; the objective is then a module that owns the parameters.
        reuse: enter a ``BlockLoss`` at the parameter's block.
    """

    def __init__(
        self,
        objective: Callable[[Any], Any],
        parameters: Sequence[Tensor],
        *,
        mu: float,
        central: bool,
        vectorized: bool,
        reuse: bool,
    ) -> None:
        self.objective = objective
        self.parameters: list[Tensor] = list(parameters)
        self.shifts: tuple[float, ...] = (mu, -mu) if central else (mu,)
        self.chain: BlockLoss | None = objective if reuse and isinstance(objective, BlockLoss) else None
        self.module: nn.Module | None = objective if isinstance(objective, nn.Module) else None
        count = len(self.parameters)
        self.entries: list[int] = [0] * count if self.chain is None else self.chain.entries(self.parameters)
        self.names: list[str] | None = (
            parameter_names(_OWNER, self.module, self.parameters) if vectorized else None
        )

    def share(self, place: int) -> float:
        """The part of a pass that a coordinate of this parameter costs, counted in blocks."""
        blocks = 1 if self.chain is None else len(self.chain.blocks)
        return (blocks - self.entries[place]) / blocks

    def unperturbed(self, batch: Any) -> Unperturbed:
        """One pass at the parameters' values; torch's generators and buffers move on as by any forward pass."""
        buffers = [] if self.module is None else [(b, b.clone()) for b in self.module.buffers()]
        inputs: dict[int, Tensor] = {}
        draws = {0: generator_states()}
        if self.chain is None:
            loss = self.objective(batch)
        else:
            value = self.chain.inputs(batch)
            for number, block in enumerate(self.chain.blocks):
                if number in self.entries:
                    # A block may change its input in place.
                    inputs[number], draws[number] = value.clone(), generator_states()
                value = block(value)
            loss = self.chain.loss(value, batch)
        moved = [(b, before) for b, before in buffers if not torch.equal(b, before)]
        return Unperturbed(_doubled(loss), inputs, draws, moved)

    def differences(self, chunk: Chunk) -> Tensor:  # [sides, c], float64
        """How far the chunk's coordinates are shifted in the parameter's precision: μ, up to rounding.

        Raises:
            ValueError: rounding leaves a coordinate where it is.
        """
        values, shifted = self._shifted(chunk)
        steps = shifted.double() - values.double()
        lost = (steps == 0).any(0).nonzero()
        if len(lost):
            first = int(lost[0])
            raise ValueError(
                f"{_OWNER}: mu = {self.shifts[0]:g} is lost in the rounding of {values.dtype} beside "
                f"{float(values[first]):g}, at {coordinate(chunk, first)}; raise mu, or use float32 parameters"
            )
        return steps.cpu()

    def losses(self, base: Unperturbed, batch: Any, chunk: Chunk) -> Tensor:  # [sides, c], float64
        """The losses with one coordinate shifted, the others as they are."""
        _, shifted = self._shifted(chunk)
        with _Kept(base.buffers):
            if self.names is not None:
                return torch.stack([self._at_once(base, batch, chunk, row) for row in shifted])
            return torch.stack([self._in_turn(base, batch, chunk, row) for row in shifted])

    def _shifted(self, chunk: Chunk) -> tuple[Tensor, Tensor]:  # [c], [sides, c]
        values = self.parameters[chunk.place].detach().flatten()[chunk.indices]
        return values, torch.stack([values + shift for shift in self.shifts])

    def _enter(self, base: Unperturbed, batch: Any, place: int) -> tuple[Any, ...]:
        """Put generators and buffers where they were at the parameter's block; the objective's arguments."""
        start = self.entries[place]
        set_generator_states(base.draws[start])
        for buffer, before in base.buffers:
            buffer.copy_(before)
        return (batch,) if self.chain is None else (batch, start, base.inputs[start].clone())

    def _in_turn(self, base: Unperturbed, batch: Any, chunk: Chunk, shifted: Tensor) -> Tensor:  # [c]
        p, found = self.parameters[chunk.place], []
        values = p.detach().flatten()[chunk.indices]
        for index, value, aside in zip(chunk.indices.tolist(), values, shifted, strict=True):
            where = tuple(int(i) for i in np.unravel_index(index, tuple(p.shape)))
            try:
                p[where] = aside
                found.append(_doubled(self.objective(*self._enter(base, batch, chunk.place))))
            finally:
                p[where] = value
        return torch.stack(found)

    def _at_once(self, base: Unperturbed, batch: Any, chunk: Chunk, shifted: Tensor) -> Tensor:  # [c]
        module, names, p = self.module, self.names, self.parameters[chunk.place]
        assert module is not None
        assert names is not None
        points = p.detach().flatten().repeat(len(shifted), 1)  # [c, numbers of p]
        points[torch.arange(len(shifted)), chunk.indices] = shifted
        arguments = self._enter(base, batch, chunk.place)

        def loss(point: Tensor) -> Tensor:  # p's shape -> []
            return called_with(module, {names[chunk.place]: point}, *arguments)

        found = torch.vmap(loss, randomness="same")(points.view(-1, *p.shape))
        if found.shape != shifted.shape or found.is_complex():
            raise ValueError(
                f"{_OWNER}: the loss must be a real scalar, got shape {tuple(found.shape[1:])} of "
                f"{found.dtype}; reduce it, with .mean() or .sum()"
            )
        return found.double().cpu()


class _Kept:
    """A context that puts buffers and torch's generators back at its end."""

    def __init__(self, buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._buffers = buffers

    def __enter__(self) -> None:
        self._after = [(b, b.clone()) for b, _ in self._buffers]
        self._draws = generator_states()

    def __exit__(self, *_: object) -> None:
        set_generator_states(self._draws)
        for buffer, value in self._after:
            buffer.copy_(value)


def coordinate(chunk: Chunk, number: int) -> str:
    """Which coordinate that is, in words."""
    return f"coordinate {int(chunk.indices[number])} of parameter {chunk.place}"


def chunks_of(active: Sequence[Tensor], size: int) -> Iterator[Chunk]:
    """The active coordinates [k] of each parameter, in pieces of a size.

    The pieces do not depend on how many processes share the work, so neither do the bits of the losses.
    """
    for place, indices in enumerate(active):
        for part in indices.split(size) if len(indices) else ():
            yield Chunk(place, part)


def _doubled(loss: Any) -> Tensor:  # [], float64
    return scalar_loss(loss, "objective").detach().double().cpu()


def first_non_finite(
    losses: Sequence[Tensor],  # of [sides, c]
    chunks: Sequence[Chunk],
    shifts: Sequence[float],
) -> str | None:
    """Which coordinate has the first loss that is NaN or infinite, in words; None where all are finite."""
    for values, chunk in zip(losses, chunks, strict=True):
        wrong = (~values.isfinite()).nonzero()
        if len(wrong):
            side, number = wrong[0].tolist()
            value = float(values[side, number])
            shown = "nan" if math.isnan(value) else f"{value}"
            return f"the loss is {shown} with {coordinate(chunk, number)} shifted by {shifts[side]:+g}"
    return None
