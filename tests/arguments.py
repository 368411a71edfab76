"""Arguments of all kinds, and what counts as a refusal; tests/test_properties*.py draw on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult

from optex import GradientSource, errors, sources
from optex.checks import shown

__all__ = [
    "FLAGS",
    "INF",
    "LONG",
    "NAN",
    "ODD",
    "SMALL",
    "Door",
    "arguments",
    "arguments_of",
    "finite",
    "healthy",
    "merged",
    "odd_calls",
    "refused",
    "sweep",
]

SMALL = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NAN, INF = math.nan, math.inf
FLAGS = (False, True)
# What few arguments are glad of; where one passes (2.5 as a rate, say) the invariants judge.
ODD = (None, True, 0, -1, 2.5, NAN, INF, "strange", (), torch.tensor([1.0, 2.0]), object)
NAMED = tuple(
    kind
    for kind in (*vars(errors).values(), sources.LowerLevelError)
    if isinstance(kind, type) and issubclass(kind, ArithmeticError)
)
LONG = 10**5000  # an integer that no float can hold, and that Python does not write out


def merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Options over those that a call needs; typed loosely, as odd values are to get in."""
    return {**first, **then}


def arguments(good: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Good values for some of the arguments, and for one of them an odd one, or none."""
    some = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in good.items()})
    odd = st.tuples(st.sampled_from(sorted(good)), st.sampled_from(ODD))
    return st.tuples(some, st.none() | odd).map(lambda both: both[0] | (dict([both[1]]) if both[1] else {}))


def refused(call: Callable[[], Any], given_arguments: Any, *others: str) -> tuple[bool, Any]:
    """Whether the call was refused, by an error that names one of its arguments; else what it answers."""
    try:
        return False, call()
    except (TypeError, ValueError, *NAMED) as error:
        if isinstance(error, NAMED) or any(name in str(error) for name in (*given_arguments, *others)):
            return True, None
        error.add_note(f"names no argument of {sorted(given_arguments)}")
        raise


def finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


@dataclass(frozen=True)
class Door:
    """A public callable as the suite calls it.

    Attributes:
        call: by keyword; makes the object and uses it once, and answers what ``healthy`` judges.
        good: values of its arguments that work together; the first of each is what is passed where a test
            tries another argument.
        others: what else a refusal may name, such as an attribute of an argument.
        unswept: arguments whose odd values are handed to the user's functions, which then fail.
        functions: arguments that may be one of the user's functions, beside those where a good value is one.
    """

    call: Callable[..., Any]
    good: Mapping[str, tuple[Any, ...]]
    others: tuple[str, ...] = ()
    unswept: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()

    @property
    def first(self) -> dict[str, Any]:
        return {name: values[0] for name, values in self.good.items()}


def odd_calls(door: Door) -> Iterator[tuple[str, Any]]:
    """Every argument with every odd value, to be put among the first good ones."""
    for name, values in door.good.items():
        # ``object`` can be called; what it then raises is the user's function's error and not the library's.
        function = name in door.functions or any(callable(value) for value in values)
        for odd in () if name in door.unswept else (*ODD, LONG):
            if not (function and odd is object):
                yield name, odd


def arguments_of(door: Door) -> st.SearchStrategy[dict[str, Any]]:
    """Good values of all arguments, and for one of them an odd one, or none."""
    good = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in door.good.items()})
    odd = st.none() | st.sampled_from(list(odd_calls(door)))
    return st.tuples(good, odd).map(lambda both: both[0] | (dict([both[1]]) if both[1] else {}))


def sweep(door: Door) -> None:
    """Call it with every odd value of every argument: it works, with finite answers, or refuses by name."""
    for name, odd in odd_calls(door):
        options = door.first | {name: odd}
        was_refused, answer = refused(lambda options=options: door.call(**options), options, *door.others)
        assert was_refused or healthy(answer), f"{name}={shown(odd)}: {answer!r}"


def try_together(door: Door, data: st.DataObject) -> None:
    """Call it with drawn values of all arguments, one of them odd or none: it works, or refuses by name."""
    options = data.draw(arguments_of(door))
    was_refused, answer = refused(lambda: door.call(**options), options, *door.others)
    assert was_refused or healthy(answer), f"{answer!r}"


def healthy(answer: Any) -> bool:
    """Whether all numbers in it are finite; a source is asked for a gradient first."""
    if isinstance(answer, GradientSource):
        loss, noise = answer.gradient(None)
        return healthy(loss) and (noise is None or healthy(noise))
    if isinstance(answer, torch.Tensor):
        return not answer.is_floating_point() or bool(answer.isfinite().all())
    if isinstance(answer, np.ndarray):
        return answer.dtype.kind != "f" or bool(np.isfinite(answer).all())
    if isinstance(answer, float):
        return math.isfinite(answer)
    if isinstance(answer, torch.nn.Module):
        return finite(answer)
    if isinstance(answer, OptimizeResult):  # its other figures may be NaN where they are not known
        assert answer.get("success") in (None, answer.get("status", 0) == 0)
        return healthy(answer.get("x"))
    if isinstance(answer, Mapping):
        return all(map(healthy, answer.values()))
    if isinstance(answer, (list, tuple)):
        return all(map(healthy, answer))
    return True
