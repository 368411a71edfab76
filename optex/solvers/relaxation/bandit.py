"""A tuner of any number that can be set: it suggests a value, is told what it cost, and learns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, Final, Literal, SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optex.checks import as_float, check_integer, saved_entry, saved_integer, saved_number, shown
from optex.solvers.relaxation.chebcb import ChebCB
from optex.solvers.relaxation.learner import Learner
from optex.solvers.relaxation.tsallis import TsallisINF

__all__ = ["BanditTuner"]

_OWNER: Final = "BanditTuner"
_METHODS: Final = ("tsallis-inf", "chebcb")


class BanditTuner:
    """Chooses a setting for each of a sequence of problems, from what earlier choices cost.

    ``suggest`` a value, run with it, ``observe`` the cost: iterations, seconds, gradients, whatever is to be
    small and not negative. ``"tsallis-inf"`` comes to cost little more than the best single value of the grid
    does, with no assumption on the problems. ``"chebcb"`` is told a number with each problem, its context, and
    learns which value is best at which context; costs have to be smooth in it.

    Args:
        grid: values to choose from, at least two, increasing; ``suggest`` returns them as they are here.
        method: as above; the paper has both.
        contexts: of ChebCB, the interval (low, high) in which contexts are; what lies outside counts as its
            end.
        features: of ChebCB, m ≥ 1: Chebyshev polynomials of degrees below m.
        least: the least cost that is possible; 1 for iterations. It is subtracted from all costs.
        seed: of the choices: an integer, or a ``numpy.random.Generator``, which then is drawn from. None takes
            one from torch's global generator.

    Raises:
        TypeError, ValueError: an argument cannot work.

    Source: Khodak, Chow, Balcan, Talwalkar, arXiv 2310.02246; see ``TsallisINF`` and ``ChebCB`` in
    ``optex.solvers.relaxation``.

    >>> tuner = BanditTuner([0.5, 1.0, 1.5], seed=0)
    >>> for _ in range(200):
    ...     setting = tuner.suggest()
    ...     tuner.observe(10 + 40 * abs(setting - 1.0))
    >>> tuner.best()
    1.0
    """

    def __init__(
        self,
        grid: Sequence[Any] | NDArray[Any] | Tensor,
        method: Literal["tsallis-inf", "chebcb"] = "tsallis-inf",
        *,
        contexts: tuple[float, float] | None = None,
        features: int = 6,
        least: float = 0.0,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self._grid = _read_grid(grid)
        if method not in _METHODS:
            raise ValueError(f"{_OWNER}: method must be one of {', '.join(_METHODS)}, got {shown(method)}")
        self._least = _number("least", least)
        self._contextual = method == "chebcb"
        self._contexts = _read_contexts(contexts) if self._contextual or contexts is not None else None
        count = check_integer(_OWNER, "features", features)
        self._learner: Learner = TsallisINF(len(self._grid))
        if self._contextual and self._contexts is not None:
            self._learner = ChebCB(len(self._grid), self._contexts, count)
        self._settings = {
            "method": method,
            "grid": [float(value) for value in self._grid],
            "contexts": self._contexts,
            "features": count if self._contextual else None,
            "least": self._least,
        }
        self._generator = _generator(seed)
        self._pending: tuple[int, float, float | None] | None = None

    @property
    def grid(self) -> list[Any]:
        """The values that it chooses from."""
        return list(self._grid)

    def suggest(self, context: float | None = None) -> Any:
        """A value of the grid to run the next problem with.

        Args:
            context: of that problem, which ChebCB needs and Tsallis-INF does not look at.

        Raises:
            RuntimeError: the last suggestion was not observed.
            ValueError: the context is missing, or no finite number.
        """
        if self._pending is not None:
            raise RuntimeError(
                f"{_OWNER}.suggest: what {self._grid[self._pending[0]]!r} cost, the last suggestion, is not "
                "known yet; call observe, or forget if it was not used"
            )
        context = self._read(context)
        chances = self._learner.probabilities(context)
        edges = chances.cumsum()
        action = min(int(edges.searchsorted(self._generator.random() * edges[-1], "right")), len(edges) - 1)
        self._pending = (action, float(chances[action]), context)
        return self._grid[action]

    def observe(self, cost: SupportsFloat | None = None, *, failed: bool = False) -> None:
        """Learn what the last suggestion cost.

        Args:
            cost: not below ``least``.
            failed: the run stopped at a limit, or broke down. Its cost, which may then be left out, says
                little: it counts as much as the worst run that did not fail, and leaves the scale of costs as
                it is.

        Raises:
            RuntimeError: nothing was suggested.
            ValueError: the cost is no finite number of at least ``least``.
        """
        if self._pending is None:
            raise RuntimeError(f"{_OWNER}.observe: nothing was suggested; call suggest first")
        paid = None if failed else _number("cost", cost, self._least, "; pass failed=True if the run failed")
        action, chance, context = self._pending
        self._learner.learn(context, action, chance, None if paid is None else paid - self._least)
        self._pending = None

    def forget(self) -> None:
        """Drop the last suggestion, if it was not observed: nothing was run with it."""
        self._pending = None

    def best(self, context: float | None = None) -> Any:
        """The value that seems best by now (at this context, for ChebCB), without exploring further.

        Raises:
            ValueError: as ``suggest``.
        """
        return self._grid[self._learner.best(self._read(context))]

    def probabilities(self, context: float | None = None) -> list[float]:
        """The probabilities with which ``suggest`` would choose each value of the grid.

        Raises:
            ValueError: as ``suggest``.
        """
        return self._learner.probabilities(self._read(context)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Everything that choices depend on: numbers, strings and tensors, for ``torch.save``."""
        bits = self._generator.bit_generator
        return {
            "settings": dict(self._settings),
            "learner": self._learner.state(),
            "generator": _plain(bits.state),
            "pending": None if self._pending is None else list(self._pending),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the tuner that this was saved from would; nothing changes if it cannot.

        Raises:
            ValueError: it is no such state, or that of a tuner with another grid, method, or generator.
        """
        settings = saved_entry(_OWNER, state, "settings")
        for name, value in self._settings.items():
            saved = saved_entry(_OWNER, settings, name)
            if (tuple(saved) if isinstance(saved, list) and name == "contexts" else saved) != value:
                raise ValueError(
                    f"{_OWNER}: saved {name} is {saved!r}, this tuner's {value!r}; make one like that"
                )
        learner = self._learner.restored(_OWNER, saved_entry(_OWNER, state, "learner"))
        pending = self._restored_pending(saved_entry(_OWNER, state, "pending"))
        try:
            self._generator.bit_generator.state = _arrays(saved_entry(_OWNER, state, "generator"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{_OWNER}: the saved generator is not a {type(self._generator.bit_generator).__name__}; pass "
                f"seed=a generator of the kind that was saved ({error})"
            ) from error
        self._learner, self._pending = learner, pending

    def _restored_pending(self, saved: Any) -> tuple[int, float, float | None] | None:
        if saved is None:
            return None
        if not isinstance(saved, (list, tuple)) or len(saved) != 3:
            raise ValueError(
                f"{_OWNER}: saved pending must be None or (index, chance, context), got {shown(saved)}"
            )
        entries = dict(zip(("pending index", "pending chance"), saved[:2], strict=True))
        action = saved_integer(_OWNER, entries, "pending index")
        chance = saved_number(_OWNER, entries, "pending chance", least=0.0)
        if action >= len(self._grid) or not 0 < chance <= 1 + 1e-9:
            raise ValueError(
                f"{_OWNER}: saved pending must be None or (index, chance, context), got {shown(saved)}"
            )
        return action, chance, self._read(saved[2])

    def _read(self, context: Any) -> float | None:
        if not self._contextual:
            return None
        if context is None:
            raise ValueError(f"{_OWNER}: ChebCB needs the problem's context; pass suggest(context)")
        assert self._contexts is not None
        low, high = self._contexts
        return min(high, max(low, _number("context", context, -math.inf)))


def _read_grid(grid: Any) -> list[Any]:
    given = grid.tolist() if isinstance(grid, (np.ndarray, torch.Tensor)) else grid
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{_OWNER}: grid must be a list of values, got {shown(grid)}")
    values = list(given)
    if len(values) < 2:
        raise ValueError(f"{_OWNER}: grid must hold two values at least, got {shown(values)}")
    numbers = [_number("every value of grid", value, -math.inf) for value in values]
    if any(right <= left for left, right in pairwise(numbers)):
        raise ValueError(f"{_OWNER}: grid must increase from value to value, got {shown(values)}; sort it")
    return values


def _read_contexts(contexts: Any) -> tuple[float, float]:
    if not isinstance(contexts, (tuple, list)) or len(contexts) != 2:
        raise ValueError(
            f"{_OWNER}: contexts must be (low, high), the interval in which contexts are, got {shown(contexts)}"
        )
    low, high = (_number("contexts", end, -math.inf) for end in contexts)
    if not low < high:
        raise ValueError(f"{_OWNER}: contexts must be (low, high) with low below high, got {shown(contexts)}")
    return low, high


def _number(name: str, value: Any, least: float = -math.inf, remedy: str = "") -> float:
    """A real number, NumPy's and tensors of one number too, as a float."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    number = (
        as_float(value) if isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) else math.nan
    )
    if not (math.isfinite(number) and number >= least):
        above = f" of at least {least:g}" if math.isfinite(least) else ""
        raise ValueError(f"{_OWNER}: {name} must be a finite number{above}, got {shown(value)}{remedy}")
    return number


def _generator(seed: Any) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):
        return seed
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    return np.random.default_rng(check_integer(_OWNER, "seed", seed, least=0))


def _plain(state: Any) -> Any:
    """A bit generator's state with tensors for arrays, as torch.load(weights_only=True) takes it."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    # Only Mersenne's twister and Philox have arrays; torch has no unsigned ones of all widths.
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _arrays(value) for key, value in state.items()}
    return np.array(state, dtype=np.uint64) if isinstance(state, list) else state
