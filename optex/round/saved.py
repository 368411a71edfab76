"""Entries of a saved run, checked before anything of it is taken over."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from optex.checks import saved_entry, saved_integer, shown
from optex.evaluators import RandomDraws
from optex.round.stride import Stride
from optex.round.surprise import Surprises
from optex.round.window import PlannedStep, Progress
from optex.stepping import GradientMask, ParameterVector

__all__ = ["OWNER", "load_generators", "load_mask", "load_progress"]

OWNER: Final = "OptEx.load_state_dict"


def load_progress(state: Any, vector: ParameterVector, stride: Stride) -> Progress:
    """The saved progress of the run, with its window.

    Raises:
        ValueError: an entry is missing or of another kind.
    """
    window = saved_entry(OWNER, state, "window")
    if not isinstance(window, (list, tuple)):
        raise ValueError(f"{OWNER}: saved window must be a list of planned steps, got {type(window).__name__}")
    rounds, steps, drawn = (
        saved_integer(OWNER, state, name) for name in ("rounds", "steps_taken", "batches_drawn")
    )
    steps_ahead = tuple(_load_step(i, entry, vector) for i, entry in enumerate(window))
    numbers = [step.number for step in steps_ahead if step.number is not None]
    if numbers != sorted(set(numbers)) or any(number >= drawn for number in numbers):
        raise ValueError(f"{OWNER}: saved window has batches {numbers} of {drawn} drawn; they do not fit")
    surprises = Surprises.loaded(saved_entry(OWNER, state, "surprises"))
    stride = stride.loaded(saved_entry(OWNER, state, "stride"))
    return Progress(rounds, steps, drawn, steps_ahead, surprises, stride)


def _load_step(i: int, entry: Any, vector: ParameterVector) -> PlannedStep:
    if not isinstance(entry, (list, tuple)) or len(entry) != 4:
        raise ValueError(
            f"{OWNER}: step {i} of the saved window must be (batch, number, measured, draws), got "
            f"{_short(entry)}"
        )
    batch, number, measured, draws = entry
    where = f"step {i} of the saved window"
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{OWNER}: {where} must have a batch number, got {shown(number)}")
    if measured is not None:
        measured = _load_measured(where, measured, vector)
    return PlannedStep(
        batch, number, measured, RandomDraws(None if draws is None else _generators(where, draws))
    )


def _load_measured(where: str, measured: Any, vector: ParameterVector) -> tuple[Tensor, Tensor]:  # [width] each
    pair = measured if isinstance(measured, (list, tuple)) else ()
    shape = (vector.space.dimension,)
    if len(pair) != 2 or any(not isinstance(row, Tensor) or tuple(row.shape) != shape for row in pair):
        raise ValueError(f"{OWNER}: {where} must hold a point and a gradient {shape}, got {_short(measured)}")
    if not all(row.is_floating_point() for row in pair):
        raise ValueError(
            f"{OWNER}: {where} must hold floating-point numbers, got {[row.dtype for row in pair]}"
        )
    point, gradient = (vector.space.local(row.to(vector.device)).to(vector.dtype) for row in pair)
    if not bool(vector.space.finite(torch.stack([point, gradient])).all()):
        raise ValueError(f"{OWNER}: {where} holds numbers that are not finite")
    return point, gradient


def load_mask(state: Any, count: int) -> GradientMask:
    """Which of ``count`` parameters get gradients.

    Raises:
        ValueError: the entry is not one flag a parameter.
    """
    mask = saved_entry(OWNER, state, "mask")
    flags = isinstance(mask, (list, tuple)) and all(isinstance(flag, bool) for flag in mask)
    if not flags or len(mask) != count:
        raise ValueError(f"{OWNER}: saved mask must be {count} flags, one a parameter, got {_short(mask)}")
    return tuple(mask)


def load_generators(state: Any) -> list[Tensor]:
    """The saved states of torch's random generators.

    Raises:
        ValueError: the generators cannot be set to them.
    """
    return _generators("saved random", saved_entry(OWNER, state, "random"))


def _generators(where: str, states: Any) -> list[Tensor]:
    try:
        torch.Generator().set_state(states[0].cpu())
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the state
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{OWNER}: {where} must be states of torch's generators, got {_short(states)}"
        ) from error
    return list(states)


def _short(value: Any) -> str:
    return repr(value)[:60]
