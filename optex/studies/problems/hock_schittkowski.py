"""Equality-constrained problems of Hock and Schittkowski, with their starts and minima.

Source: Hock, Schittkowski: *Test Examples for Nonlinear Programming Codes*, Lecture Notes in Economics and
Mathematical Systems 187, Springer, 1981. Numbers, starts and minima are theirs. Names with LNP are those of
CUTEst, for the same problem with its active inequalities as equalities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["PROBLEMS", "EqualityProblem"]


@dataclass(frozen=True)
class EqualityProblem:
    """min f(x) subject to c(x) = 0; autograd can differentiate both.

    Attributes:
        name: HS and its number.
        objective: f, of x [n] to [].
        constraints: c, of x [n] to [m].
        start: n numbers.
        least: f at the published solution.
    """

    name: str
    objective: Callable[[Tensor], Tensor]
    constraints: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    least: float


PROBLEMS: Final[dict[str, EqualityProblem]] = {}

_Make = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def _problem(name: str, start: tuple[float, ...], least: float) -> Callable[[_Make], _Make]:
    """A decorator that enters a problem, given by a function from x to f and a list of constraints."""

    def enter(function: _Make) -> _Make:
        PROBLEMS[name] = EqualityProblem(
            name, lambda x: function(x)[0], lambda x: torch.stack(function(x)[1]), start, least
        )
        return function

    return enter


@_problem("HS6", (-1.2, 1.0), 0.0)
def _hs6(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return (1 - x[0]) ** 2, [10 * (x[1] - x[0] ** 2)]


@_problem("HS7", (2.0, 2.0), -math.sqrt(3))
def _hs7(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return torch.log(1 + x[0] ** 2) - x[1], [(1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4]


@_problem("HS8", (2.0, 1.0), -1.0)
def _hs8(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return 0 * x[0] - 1, [x[0] ** 2 + x[1] ** 2 - 25, x[0] * x[1] - 9]


@_problem("HS9", (0.0, 0.0), -0.5)
def _hs9(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    wave = torch.sin(math.pi * x[0] / 12) * torch.cos(math.pi * x[1] / 16)
    return wave, [4 * x[0] - 3 * x[1]]


@_problem("HS26", (-2.6, 2.0, 2.0), 0.0)
def _hs26(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4, [(1 + x[1] ** 2) * x[0] + x[2] ** 4 - 3]


@_problem("HS27", (2.0, 2.0, 2.0), 0.04)
def _hs27(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return 0.01 * (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2, [x[0] + x[2] ** 2 + 1]


@_problem("HS28", (-4.0, 1.0, 1.0), 0.0)
def _hs28(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2, [x[0] + 2 * x[1] + 3 * x[2] - 1]


@_problem("HS39", (2.0, 2.0, 2.0, 2.0), -1.0)
def _hs39(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    return -x[0], [x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2]


@_problem("HS40", (0.8, 0.8, 0.8, 0.8), -0.25)
def _hs40(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    c = [x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]]
    return -x[0] * x[1] * x[2] * x[3], c


@_problem("HS42", (1.0, 1.0, 1.0, 1.0), 28 - 10 * math.sqrt(2))
def _hs42(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - 1) ** 2 + (x[1] - 2) ** 2 + (x[2] - 3) ** 2 + (x[3] - 4) ** 2
    return f, [x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2]


@_problem("HS46", (math.sqrt(2) / 2, 1.75, 0.5, 2.0, 2.0), 0.0)
def _hs46(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6
    return f, [x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 1, x[1] + x[2] ** 4 * x[3] ** 2 - 2]


@_problem("HS47", (2.0, math.sqrt(2), -1.0, 2 - math.sqrt(2), 0.5), 0.0)
def _hs47(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 3 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4
    return f, [x[0] + x[1] ** 2 + x[2] ** 3 - 3, x[1] - x[2] ** 2 + x[3] - 1, x[0] * x[4] - 1]


@_problem("HS48", (3.0, 5.0, -3.0, 2.0, -2.0), 0.0)
def _hs48(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2
    return f, [x.sum() - 5, x[2] - 2 * (x[3] + x[4]) + 3]


@_problem("HS49", (10.0, 7.0, 2.0, -3.0, 0.8), 0.0)
def _hs49(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6
    return f, [x[0] + x[1] + x[2] + 4 * x[3] - 7, x[2] + 5 * x[4] - 6]


@_problem("HS50", (35.0, -31.0, 11.0, 5.0, -5.0), 0.0)
def _hs50(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 2
    return f, [x[i] + 2 * x[i + 1] + 3 * x[i + 2] - 6 for i in range(3)]


@_problem("HS51", (2.5, 0.5, 2.0, -1.0, 0.5), 0.0)
def _hs51(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2
    return f, [x[0] + 3 * x[1] - 4, x[2] + x[3] - 2 * x[4], x[1] - x[4]]


@_problem("HS52", (2.0, 2.0, 2.0, 2.0, 2.0), 1859 / 349)
def _hs52(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (4 * x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2
    return f, [x[0] + 3 * x[1], x[2] + x[3] - 2 * x[4], x[1] - x[4]]


_A, _B = math.asin(math.sqrt(1 / 4.2)), math.asin(math.sqrt(5 / 7.2))


@_problem("HS56", (1.0, 1.0, 1.0, _A, _A, _A, _B), -3.456)
def _hs56(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    squares = torch.sin(x[3:]) ** 2
    last = x[0] + 2 * x[1] + 2 * x[2] - 7.2 * squares[3]
    return -x[0] * x[1] * x[2], [*(x[:3] - 4.2 * squares[:3]), last]


@_problem("HS61", (0.0, 0.0, 0.0), -143.6461422)
def _hs61(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = 4 * x[0] ** 2 + 2 * x[1] ** 2 + 2 * x[2] ** 2 - 33 * x[0] + 16 * x[1] - 24 * x[2]
    return f, [3 * x[0] - 2 * x[1] ** 2 - 7, 4 * x[0] - x[2] ** 2 - 11]


@_problem("HS77", (2.0, 2.0, 2.0, 2.0, 2.0), 0.24150513)
def _hs77(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6
    first = x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * math.sqrt(2)
    return f, [first, x[1] + x[2] ** 4 * x[3] ** 2 - 8 - math.sqrt(2)]


@_problem("HS78", (-2.0, 1.5, 2.0, -1.0, -1.0), -2.91970041)
def _hs78(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    c = [x @ x - 10, x[1] * x[2] - 5 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1]
    return x.prod(), c


@_problem("HS79", (2.0, 2.0, 2.0, 2.0, 2.0), 0.0787768209)
def _hs79(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4
    root = math.sqrt(2)
    c = [x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * root, x[1] - x[2] ** 2 + x[3] + 2 - 2 * root, x[0] * x[4] - 2]
    return f, c


@_problem("HS100LNP", (1.0, 2.0, 0.0, 4.0, 0.0, 1.0, 1.0), 680.6300573)
def _hs100(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    f = (x[0] - 10) ** 2 + 5 * (x[1] - 12) ** 2 + x[2] ** 4 + 3 * (x[3] - 11) ** 2 + 10 * x[4] ** 6
    f = f + 7 * x[5] ** 2 + x[6] ** 4 - 4 * x[5] * x[6] - 10 * x[5] - 8 * x[6]
    first = 2 * x[0] ** 2 + 3 * x[1] ** 4 + x[2] + 4 * x[3] ** 2 + 5 * x[4] - 127
    second = 4 * x[0] ** 2 + x[1] ** 2 - 3 * x[0] * x[1] + 2 * x[2] ** 2 + 5 * x[5] - 11 * x[6]
    return f, [first, second]


_ENERGIES: Final = (-6.089, -17.164, -34.054, -5.914, -24.721, -14.986, -24.1, -10.708, -26.662, -22.179)


@_problem("HS111LNP", (-2.3,) * 10, -47.76109026)
def _hs111(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = torch.exp(x)
    f = (y * (x.new_tensor(_ENERGIES) + x - torch.log(y.sum()))).sum()
    c = [
        y[0] + 2 * y[1] + 2 * y[2] + y[5] + y[9] - 2,
        y[3] + 2 * y[4] + y[5] + y[6] - 1,
        y[2] + y[6] + y[7] + 2 * y[8] + y[9] - 1,
    ]
    return f, c
