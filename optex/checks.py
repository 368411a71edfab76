"""Checks of arguments and of saved states, with one wording for every room."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "as_float",
    "check_callable",
    "check_device",
    "check_flag",
    "check_integer",
    "check_kind",
    "check_number",
    "check_parameters",
    "check_positive",
    "check_real",
    "saved_entry",
    "saved_integer",
    "saved_number",
    "saved_tensor",
    "shown",
]

_SHOWN = 80  # characters of a value in a message


def shown(value: Any) -> str:
    """The value as messages have it: on one line, and cut short where it is long.

    >>> shown("yes"), shown(10**400)[-8:], shown(10**5000)
    ("'yes'", '00000...', 'an integer of 16610 bits')
    """
    try:
        text = " ".join(repr(value).splitlines())
    except ValueError:  # what Python says of an integer of more digits than it writes
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def check_integer(owner: str | None, name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """The value as an int.

    Args:
        owner: class or function whose argument it is, for the message; None where the name says enough.
        name: of the argument.
        value: what came; NumPy's integers pass, booleans do not.
        least, most: the smallest and the largest value allowed.

    Raises:
        ValueError: it is no integer, or out of this range.

    >>> check_integer("OptEx", "parallelism", 4)
    4
    """
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else least - 1
    if number < least or number > (sys.maxsize if most is None else most):
        wanted = f"an integer of at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(
            f"{f'{name}:' if owner is None else f'{owner}: {name}'} must be {wanted}, got {shown(value)}"
        )
    return number


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    least: float = 0.0,
    most: float = math.inf,
    open_below: bool = False,
    open_above: bool = False,
) -> float:
    """The value as a float.

    Args:
        owner: the class, for the message.
        name: of the argument.
        value: what came; a tensor of one number passes, booleans and NaN do not.
        least, most: the range; infinity never passes.
        open_below, open_above: whether ``least`` and ``most`` themselves are outside the range.

    Raises:
        ValueError: it is no number in this range.

    >>> check_number("OptEx", "lr", 0.1, open_below=True)
    0.1
    """
    plain = isinstance(value, Real) and not isinstance(value, bool)
    scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    number = as_float(value) if plain or scalar else math.nan
    inside = (number > least if open_below else number >= least) and (
        number < most if open_above else number <= most
    )
    if not (inside and math.isfinite(number)):
        below = f"{'above' if open_below else 'at least'} {least:g}"
        above = "" if most == math.inf else f" and {'below' if open_above else 'at most'} {most:g}"
        raise ValueError(f"{owner}: {name} must be a finite number {below}{above}, got {shown(value)}")
    return number


def as_float(value: Any) -> float:
    """The value as a float; an integer too long for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_real(owner: str, name: str, value: Any) -> float:
    """The value as a float: any real number passes that is no boolean; the range is the caller's to check.

    Raises:
        ValueError: it is no real number.

    >>> check_real("WithinTolerance", "tolerance", 2)
    2.0
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{owner}: {name} must be a number, got {shown(value)}")
    return as_float(value)


def check_positive(owner: str, name: str, value: Any, remedy: str = "") -> float:
    """The value as a positive, finite float; any real number passes, booleans do not.

    Raises:
        ValueError: it is not; ``remedy``, if any, ends the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < as_float(value) < math.inf:
        raise ValueError(
            f"{owner}: {name} must be positive and finite, got {shown(value)}" + f"; {remedy}" * bool(remedy)
        )
    return float(value)


def check_flag(owner: str, name: str, value: Any) -> bool:
    """The value, which has to be True or False: a tensor or a string would be taken by its truth value.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {shown(value)}")
    return value


def check_callable(owner: str, name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse a value that cannot be called; None passes where it is ``optional``.

    Raises:
        TypeError: it cannot be called.
    """
    if not (callable(value) or (optional and value is None)):
        wanted = "callable or None" if optional else "callable"
        raise TypeError(f"{owner}: {name} must be {wanted}, got {type(value).__name__}")


def check_device(owner: str, name: str, value: Any) -> torch.device:
    """The device, which this machine has; torch's default one for None.

    Raises:
        ValueError: it is no device, or none of this machine.
    """
    try:
        return torch.empty(0, device=value).device
    # AssertionError is what torch raises for a kind of device that it was not built for.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: {name} must be a torch.device of this machine or the name of one, got {shown(value)} "
            f"({error})"
        ) from None


def check_kind(owner: str, name: str, value: Any, kind: type, wanted: str) -> None:
    """Refuse a value that is neither None nor of the kind.

    Raises:
        TypeError: with ``wanted`` as what to pass instead.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {shown(value)}")


def check_parameters(owner: str, parameters: Any) -> list[Tensor]:
    """The parameters as a list.

    Raises:
        TypeError: they are one tensor, a module, or hold something other than floating-point tensors.
        ValueError: they hold no number.
    """
    if isinstance(parameters, (Tensor, nn.Module)):
        came, remedy = (
            ("one tensor", "[tensor]")
            if isinstance(parameters, Tensor)
            else ("a module", "module.parameters()")
        )
        raise TypeError(f"{owner}: parameters must be a list of tensors, got {came}; pass {remedy}")
    try:
        found = list(parameters)
    except TypeError as error:
        raise TypeError(
            f"{owner}: parameters must be a list of tensors, got {type(parameters).__name__}"
        ) from error
    for p in found:
        if not isinstance(p, Tensor) or not p.is_floating_point():
            came = f"a tensor of {p.dtype}" if isinstance(p, Tensor) else type(p).__name__
            raise TypeError(f"{owner}: parameters must be floating-point tensors, got {came}")
    if not sum(p.numel() for p in found):
        raise ValueError(f"{owner}: the parameters hold no number; there is nothing to optimise")
    return found


def saved_entry(owner: str, state: Any, name: str) -> Any:
    """An entry of a saved state.

    Raises:
        ValueError: the state is no dict, or has no such entry.
    """
    if not isinstance(state, dict) or name not in state:
        raise ValueError(f"{owner}: the saved state has no entry {name!r}; it was cut short, or is another's")
    return state[name]


def saved_tensor(
    owner: str, state: Any, name: str, shape: tuple[int, ...], *, finite: bool = True
) -> Tensor:  # of this shape
    """An entry of a saved state that has to be a floating-point tensor of this shape.

    Raises:
        ValueError: it is not, or is not finite where it has to be.
    """
    value = saved_entry(owner, state, name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
        came = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise ValueError(f"{owner}: saved {name} must be a floating-point tensor {shape}, got {came}")
    if finite and not bool(value.isfinite().all()):
        raise ValueError(f"{owner}: saved {name} holds numbers that are not finite")
    return value


def saved_integer(owner: str, state: Any, name: str, *, least: int = 0) -> int:
    """An entry of a saved state that has to be an integer of at least ``least``, as ``check_integer``."""
    return check_integer(owner, f"saved {name}", saved_entry(owner, state, name), least=least)


def saved_number(owner: str, state: Any, name: str, *, least: float) -> float:
    """An entry of a saved state that has to be a number of at least ``least``.

    Raises:
        ValueError: it is not.
    """
    value = saved_entry(owner, state, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ValueError(f"{owner}: saved {name} must be a number of at least {least:g}, got {shown(value)}")
    return float(value)
