"""The test functions of Moré, Garbow and Hillstrom: sums of squares with standard starts and known minima.

Source: Moré, Garbow, Hillstrom: *Testing Unconstrained Optimization Software*, ACM Transactions on Mathematical
Software 7 (1981), 17-41. Numbers and names of functions, data, starts and minima are those of its section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["FUNCTIONS", "TestFunction"]


@dataclass(frozen=True)
class TestFunction:
    """f(x) = Σ_i r_i(x)², for x [d] of a floating-point dtype; autograd can differentiate the value.

    Attributes:
        number: in the paper.
        name: in the paper.
        residuals: r, of x [d] to [m].
        start: the standard start, d numbers.
        minima: values of f at its known local minima, the lowest first; some are approached at infinity.
        minimizer: where f is lowest, d numbers; None where the paper does not say.
    """

    __test__ = False  # or pytest would collect it by its name

    number: int
    name: str
    residuals: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    minima: tuple[float, ...]
    minimizer: tuple[float, ...] | None = None

    def __call__(
        self,
        x: Tensor,  # [d]
    ) -> Tensor:  # []
        return self.residuals(x).square().sum()

    @property
    def dimension(self) -> int:
        """d, components of x."""
        return len(self.start)


def _count(
    x: Tensor,  # [d]
    last: int,
    first: int = 1,
) -> Tensor:  # [last - first + 1]
    """first, ..., last with the dtype and device of x."""
    return torch.arange(first, last + 1, dtype=x.dtype, device=x.device)


def _rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def _freudenstein_roth(x: Tensor) -> Tensor:
    first = -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1]
    return torch.stack([first, -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def _powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, (-x).exp().sum() - 1.0001])


def _brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def _beale(x: Tensor) -> Tensor:
    return x.new_tensor([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** _count(x, 3))


def _jennrich_sampson(x: Tensor) -> Tensor:
    i = _count(x, 10)
    return 2 + 2 * i - (i * x[0]).exp() - (i * x[1]).exp()


def _helical_valley(x: Tensor) -> Tensor:
    # The paper's θ is arctan(x_2 / x_1) / 2π, plus 1/2 where x_1 < 0.
    half = torch.where(x[0] < 0, 0.5, 0.0)
    theta = torch.atan(x[1] / x[0]) / (2 * math.pi) + half
    return torch.stack([10 * (x[2] - 10 * theta), 10 * (x[:2].square().sum().sqrt() - 1), x[2]])


_BARD: Final = (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def _bard(x: Tensor) -> Tensor:
    u = _count(x, 15)
    v = 16 - u
    return x.new_tensor(_BARD) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


_GAUSSIAN: Final = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989)


def _gaussian(x: Tensor) -> Tensor:
    t = (8 - _count(x, 15)) / 2
    return x[0] * (-x[1] * (t - x[2]) ** 2 / 2).exp() - x.new_tensor(_GAUSSIAN + _GAUSSIAN[-2::-1])


_MEYER: Final = (
    *(34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744),
    *(8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872),
)


def _meyer(x: Tensor) -> Tensor:
    t = 45 + 5 * _count(x, 16)
    return x[0] * (x[1] / (t + x[2])).exp() - x.new_tensor(_MEYER)


def _gulf(x: Tensor) -> Tensor:
    t = _count(x, 99) / 100
    y = 25 + (-50 * t.log()) ** (2 / 3)
    return (-((y - x[1]).abs() ** x[2]) / x[0]).exp() - t


def _box(x: Tensor) -> Tensor:
    t = _count(x, 10) / 10
    return (-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())


def _powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x.reshape(-1, 4).unbind(1)
    parts = [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    return torch.stack(parts, 1).reshape(-1)


def _wood(x: Tensor) -> Tensor:
    parts = [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2]]
    return torch.stack([*parts, 10**0.5 * (x[1] + x[3] - 2), (x[1] - x[3]) / 10**0.5])


_KOWALIK: Final = (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
_OSBORNE_U: Final = (4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def _kowalik_osborne(x: Tensor) -> Tensor:
    u = x.new_tensor(_OSBORNE_U)
    return x.new_tensor(_KOWALIK) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def _brown_dennis(x: Tensor) -> Tensor:
    t = _count(x, 20) / 5
    return (x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2


_OSBORNE_1: Final = (
    *(0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751),
    *(0.718, 0.685, 0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490),
    *(0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406),
)


def _osborne_1(x: Tensor) -> Tensor:
    t = 10 * _count(x, 32, 0)
    return x.new_tensor(_OSBORNE_1) - (x[0] + x[1] * (-t * x[3]).exp() + x[2] * (-t * x[4]).exp())


def _biggs(x: Tensor) -> Tensor:
    t = _count(x, 13) / 10
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y


_OSBORNE_2: Final = (
    *(1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608),
    *(0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661),
    *(0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428),
    *(0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668, 0.645, 0.632, 0.591, 0.559),
    *(0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098, 0.054),
)


def _osborne_2(x: Tensor) -> Tensor:
    t = _count(x, 64, 0) / 10
    bumps = x[1:4, None] * (-x[5:8, None] * (t - x[8:11, None]) ** 2).exp()
    return x.new_tensor(_OSBORNE_2) - (x[0] * (-t * x[4]).exp() + bumps.sum(0))


def _watson(x: Tensor) -> Tensor:
    t = _count(x, 29)[:, None] / 29
    j = _count(x, len(x))
    value = (x * t ** (j - 1)).sum(1)
    slope = ((j - 1) * x)[1:] * t ** (j[1:] - 2)
    return torch.cat([slope.sum(1) - value**2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])


def _extended_rosenbrock(x: Tensor) -> Tensor:
    odd, even = x[::2], x[1::2]
    return torch.stack([10 * (even - odd**2), 1 - odd], 1).reshape(-1)


def _penalty_1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), (x.square().sum() - 0.25)[None]])


def _penalty_2(x: Tensor) -> Tensor:
    a = 1e-5**0.5
    i = _count(x, len(x), 2)
    y = (i / 10).exp() + ((i - 1) / 10).exp()
    rising = a * ((x[1:] / 10).exp() + (x[:-1] / 10).exp() - y)
    falling = a * ((x[1:] / 10).exp() - math.exp(-0.1))
    weights = _count(x, len(x)).flip(0)
    return torch.cat([x[:1] - 0.2, rising, falling, ((weights * x**2).sum() - 1)[None]])


def _variably_dimensioned(x: Tensor) -> Tensor:
    weighed = (_count(x, len(x)) * (x - 1)).sum()
    return torch.cat([x - 1, weighed[None], weighed[None] ** 2])


def _trigonometric(x: Tensor) -> Tensor:
    return len(x) - x.cos().sum() + _count(x, len(x)) * (1 - x.cos()) - x.sin()


def _brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), x.prod()[None] - 1])


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:  # [d], [d]
    """x_{i-1} and x_{i+1}, with zeros beyond the ends."""
    zero = x.new_zeros(1)
    return torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])


def _discrete_boundary_value(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    t = h * _count(x, len(x))
    left, right = _neighbours(x)
    return 2 * x - left - right + h**2 * (x + t + 1) ** 3 / 2


def _discrete_integral_equation(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    t = h * _count(x, len(x))
    cubes = (x + t + 1) ** 3
    before = (t * cubes).cumsum(0)
    after = ((1 - t) * cubes).sum() - ((1 - t) * cubes).cumsum(0)
    return x + h * ((1 - t) * before + t * after) / 2


def _broyden_tridiagonal(x: Tensor) -> Tensor:
    left, right = _neighbours(x)
    return (3 - 2 * x) * x - left - 2 * right + 1


def _broyden_banded(x: Tensor) -> Tensor:
    i = _count(x, len(x))
    apart = i[:, None] - i  # row less column
    band = (apart <= 5) & (apart >= -1) & (apart != 0)
    return x * (2 + 5 * x**2) + 1 - band.to(x.dtype) @ (x * (1 + x))


def _linear_full_rank(x: Tensor) -> Tensor:
    m = 2 * len(x)
    shared = 2 * x.sum() / m + 1
    return torch.cat([x - shared, -shared.expand(m - len(x))])


def _linear_rank_1(x: Tensor) -> Tensor:
    return _count(x, 2 * len(x)) * (_count(x, len(x)) * x).sum() - 1


def _linear_rank_1_with_zeros(x: Tensor) -> Tensor:
    m = 2 * len(x)
    inner = _count(x, m - 2) * (_count(x, len(x) - 1, 2) * x[1:-1]).sum() - 1
    end = x.new_full((1,), -1.0)
    return torch.cat([end, inner, end])


def _chebyquad(x: Tensor) -> Tensor:
    """Means of the shifted Chebyshev polynomials over x, less their integrals over [0, 1]."""
    y = 2 * x - 1
    before, here = torch.ones_like(y), y
    means = []
    for i in range(1, len(x) + 1):
        means.append(here.mean() + (1 / (i**2 - 1) if i % 2 == 0 else 0.0))
        before, here = here, 2 * y * here - before
    return torch.stack(means)


def _interior(count: int) -> list[float]:
    return [i / (count + 1) for i in range(1, count + 1)]


def _arc(count: int) -> list[float]:
    return [t * (t - 1) for t in _interior(count)]


_Row = tuple[str, Callable[[Tensor], Tensor], Sequence[float], Sequence[float], Sequence[float] | None]

# Name, residuals, start, minima, minimizer; in the paper's order.
_ROWS: Final[tuple[_Row, ...]] = (
    ("Rosenbrock", _rosenbrock, [-1.2, 1], [0], [1, 1]),
    ("Freudenstein and Roth", _freudenstein_roth, [0.5, -2], [0, 48.9842], [5, 4]),
    ("Powell badly scaled", _powell_badly_scaled, [0, 1], [0], [1.098159e-5, 9.106147]),
    ("Brown badly scaled", _brown_badly_scaled, [1, 1], [0], [1e6, 2e-6]),
    ("Beale", _beale, [1, 1], [0], [3, 0.5]),
    ("Jennrich and Sampson", _jennrich_sampson, [0.3, 0.4], [124.362], [0.257825, 0.257825]),
    ("Helical valley", _helical_valley, [-1, 0, 0], [0], [1, 0, 0]),
    ("Bard", _bard, [1, 1, 1], [8.21487e-3, 17.4286], None),
    ("Gaussian", _gaussian, [0.4, 1, 0], [1.12793e-8], None),
    ("Meyer", _meyer, [0.02, 4000, 250], [87.9458], None),
    ("Gulf research and development", _gulf, [5, 2.5, 0.15], [0], [50, 25, 1.5]),
    ("Box three-dimensional", _box, [0, 10, 20], [0], [1, 10, 1]),
    ("Powell singular", _powell_singular, [3, -1, 0, 1], [0], [0, 0, 0, 0]),
    ("Wood", _wood, [-3, -1, -3, -1], [0], [1, 1, 1, 1]),
    ("Kowalik and Osborne", _kowalik_osborne, [0.25, 0.39, 0.415, 0.39], [3.07505e-4, 1.02734e-3], None),
    ("Brown and Dennis", _brown_dennis, [25, 5, -5, -1], [85822.2], None),
    ("Osborne 1", _osborne_1, [0.5, 1.5, -1, 0.01, 0.02], [5.46489e-5], None),
    ("Biggs EXP6", _biggs, [1, 2, 1, 1, 1, 1], [0, 5.65565e-3], [1, 10, 1, 5, 4, 3]),
    ("Osborne 2", _osborne_2, [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5], [4.01377e-2], None),
    ("Watson", _watson, [0.0] * 6, [2.28767e-3], None),
    ("Extended Rosenbrock", _extended_rosenbrock, [-1.2, 1] * 5, [0], [1] * 10),
    ("Extended Powell singular", _powell_singular, [3, -1, 0, 1] * 3, [0], [0] * 12),
    ("Penalty I", _penalty_1, list(range(1, 11)), [7.08765e-5], None),
    ("Penalty II", _penalty_2, [0.5] * 10, [2.93660e-4], None),
    ("Variably dimensioned", _variably_dimensioned, [1 - i / 10 for i in range(1, 11)], [0], [1] * 10),
    ("Trigonometric", _trigonometric, [0.1] * 10, [0, 2.79506e-5], [0] * 10),
    ("Brown almost-linear", _brown_almost_linear, [0.5] * 10, [0, 1], [1] * 10),
    ("Discrete boundary value", _discrete_boundary_value, _arc(10), [0], None),
    ("Discrete integral equation", _discrete_integral_equation, _arc(10), [0], None),
    ("Broyden tridiagonal", _broyden_tridiagonal, [-1] * 10, [0], None),
    ("Broyden banded", _broyden_banded, [-1] * 10, [0], None),
    ("Linear, full rank", _linear_full_rank, [1] * 10, [10], [-1] * 10),
    ("Linear, rank 1", _linear_rank_1, [1] * 10, [20 * 19 / (2 * 41)], None),
    ("Linear, rank 1 with zeros", _linear_rank_1_with_zeros, [1] * 10, [(20**2 + 54) / (2 * 37)], None),
    ("Chebyquad", _chebyquad, _interior(8), [3.51687e-3], None),
)

FUNCTIONS: Final[tuple[TestFunction, ...]] = tuple(
    TestFunction(
        number,
        name,
        residuals,
        tuple(map(float, start)),
        tuple(map(float, minima)),
        None if minimizer is None else tuple(map(float, minimizer)),
    )
    for number, (name, residuals, start, minima, minimizer) in enumerate(_ROWS, 1)
)
