"""An inverse problem of physics: the conductivity of a plate from measured temperatures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from typing import Any, Final, final

import numpy as np
import scipy.sparse as sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import splu
from torch import Tensor, nn

from optex.checks import check_integer, shown
from optex.studies.problems.interface import Problem, seeded_generator

__all__ = ["HeatConduction", "Plate"]

_DURATION: Final = 0.1  # of one heater's experiment; at κ = 1 heat crosses the plate in about 1
_NOISE: Final = 1e-3  # σ, of a reading, in units of the temperature
_SMOOTHNESS: Final = 1e-3  # α
_LARGEST: Final = 30.0  # |log κ|; a κ of 1e13 beside one of 1e-13 exhausts double precision


def _can_conduct(m: NDArray[np.float64]) -> bool:
    """Whether the equations can be solved in double precision; where runs diverge they cannot."""
    return bool(np.abs(m).max() <= _LARGEST)  # False for NaN


class Plate:
    """A 1 × 1 plate of n × n cells with heaters, thermometers and their readings; J and its gradient.

    Finite volumes and implicit Euler, (I + τ K) u_{t+1} = u_t + τ f with K = Dᵀ diag(W κ) D: D takes
    differences across the faces between cells, W the mean of κ on the two sides of a face. The gradient is that
    of the adjoint method,

        (I + τ K) λ_t = λ_{t+1} + Sᵀ (S u_t - readings_t) / (σ² count),   ∂J/∂κ = -τ Wᵀ Σ_t (D λ_t) ∘ (D u_t),

    and costs one sparse LU factorisation and two marches in time. J is that of :class:`HeatConduction`.

    Args:
        size: n.
        heaters: how many, a square number; they are evenly placed.
        steps: of time.
        spacing: cells between thermometers, along each side.

    Attributes:
        size, steps: as given.
        differences: D, sparse [2n(n + 1), n²].
        means: W, sparse [2n(n + 1), n²].
        neighbours: differences of neighbouring cells, sparse [2n(n - 1), n²].
        heaters: [n², heaters], the heat source f of each.
        thermometers: indices of their cells, S.
        readings: [steps, thermometers, heaters].
    """

    def __init__(self, size: int, heaters: int, steps: int, spacing: int) -> None:
        self.size: int = size
        self.steps: int = steps
        across = np.eye(size + 1, size) - np.eye(size + 1, size, -1)
        # A face on the rim has a cell on one side alone, whose centre is half as far away.
        mean = abs(across) / 2
        across[[0, -1]] *= 2
        self.differences: sparse.csr_array = size * _along_both(across)
        self.means: sparse.csr_array = _along_both(mean)
        self.neighbours: sparse.csr_array = _along_both(np.eye(size - 1, size, 1) - np.eye(size - 1, size))
        side = math.isqrt(heaters)
        centres = (np.arange(side) + 0.5) / side
        y, x = self._centres()
        spots = [(x - a) ** 2 + (y - b) ** 2 for a in centres for b in centres]
        warmth = [50 * np.exp(-spot / 0.005).ravel() for spot in spots]
        self.heaters: NDArray[np.float64] = np.stack(warmth, axis=1)
        along = np.arange(spacing // 2, size, spacing)
        self.thermometers: NDArray[np.int64] = (along[:, None] * size + along[None, :]).ravel()
        clean = self._march(self.truth(), np.arange(heaters))[0][:, self.thermometers]
        noise = np.random.default_rng(0).standard_normal(clean.shape)
        self.readings: NDArray[np.float64] = clean + _NOISE * noise

    def _centres(self) -> tuple[NDArray[np.float64], ...]:  # y and x of the cells, each [n, n]
        return np.meshgrid(*[(np.arange(self.size) + 0.5) / self.size] * 2, indexing="ij")

    def truth(self) -> NDArray[np.float64]:  # [n²]
        """log κ of the plate that was measured: a spot that conducts well, one that does not, and a bar."""
        y, x = self._centres()
        good = 1.2 * np.exp(-((x - 0.3) ** 2 + (y - 0.65) ** 2) / 0.02)
        bad = -1.2 * np.exp(-((x - 0.7) ** 2 + (y - 0.6) ** 2) / 0.015)
        bar = 0.8 * ((abs(y - 0.25) < 0.06) & (abs(x - 0.5) < 0.3))
        return (good + bad + bar).ravel()

    def _march(
        self,
        m: NDArray[np.float64],  # [n²]
        chosen: NDArray[np.int64],  # [k]
    ) -> tuple[NDArray[np.float64], Any]:  # temperatures [steps, n², k], and I + τ K factorised
        tau, heaters = _DURATION / self.steps, self.heaters[:, chosen]
        stiffness = self.differences.T @ sparse.diags_array(self.means @ np.exp(m)) @ self.differences
        matrix = splu((sparse.eye_array(len(m)) + tau * stiffness).tocsc(), permc_spec="MMD_AT_PLUS_A")
        temperatures = np.empty((self.steps, *heaters.shape))
        now = np.zeros_like(heaters)
        for step in range(self.steps):
            now = temperatures[step] = matrix.solve(now + tau * heaters)
        return temperatures, matrix

    def value(
        self,
        m: NDArray[np.float64],  # [n²]
    ) -> float:
        """J, with all heaters; infinite where the equations cannot be solved."""
        chosen = np.arange(self.heaters.shape[1])
        if not _can_conduct(m):
            return math.inf
        residuals = self._march(m, chosen)[0][:, self.thermometers] - self.readings
        jumps = self.neighbours @ m
        return float(0.5 * (residuals**2).mean() / _NOISE**2 + 0.5 * _SMOOTHNESS * (jumps**2).sum())

    def value_and_gradient(
        self,
        m: NDArray[np.float64],  # [n²]
        chosen: NDArray[np.int64],  # [k]
    ) -> tuple[float, NDArray[np.float64]]:  # J, [n²]
        """J and its gradient with the chosen heaters alone: unbiased where these are drawn at random."""
        if not _can_conduct(m):
            return math.inf, np.full_like(m, math.nan)
        temperatures, matrix = self._march(m, chosen)
        residuals = temperatures[:, self.thermometers] - self.readings[:, :, chosen]
        weight, jumps = 1 / (_NOISE**2 * residuals.size), self.neighbours @ m
        value = 0.5 * weight * (residuals**2).sum() + 0.5 * _SMOOTHNESS * (jumps**2).sum()
        through_faces, adjoint = np.zeros(2 * self.size * (self.size + 1)), np.zeros_like(temperatures[0])
        for state, residual in zip(temperatures[::-1], residuals[::-1], strict=True):
            adjoint[self.thermometers] += weight * residual
            adjoint = matrix.solve(adjoint)
            through_faces += ((self.differences @ adjoint) * (self.differences @ state)).sum(axis=1)
        data = -_DURATION / self.steps * np.exp(m) * (self.means.T @ through_faces)
        return float(value), data + _SMOOTHNESS * (self.neighbours.T @ jumps)


def _along_both(matrix: NDArray[np.float64]) -> sparse.csr_array:
    """A matrix that does to all rows and to all columns of cells what ``matrix`` does to one row."""
    unit = sparse.eye_array(matrix.shape[1])
    return sparse.csr_array(sparse.vstack([sparse.kron(unit, matrix), sparse.kron(matrix, unit)]))


class _Misfit(torch.autograd.Function):
    """J and its gradient by the adjoint, for autograd and for torch.func."""

    @staticmethod
    def forward(
        m: Tensor,  # [n²]
        chosen: Tensor,  # [k], int64
        plate: Plate,
    ) -> tuple[Tensor, Tensor]:  # [], [n²]
        if not bool(m.isfinite().all()):  # SuperLU would end the process
            return m.new_tensor(math.nan), torch.full_like(m, math.nan)
        value, gradient = plate.value_and_gradient(m.detach().double().numpy(), chosen.numpy())
        return m.new_tensor(value), torch.from_numpy(gradient).to(m)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return cotangents[0] * gradient, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        plate = args[2]
        points, choices = (
            values.expand(info.batch_size, -1) if dim is None else values.movedim(dim, 0)
            for values, dim in zip(args[:2], in_dims[:2], strict=True)
        )
        answers = [_Misfit.apply(*pair, plate) for pair in zip(points, choices, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*answers, strict=True)), (0, 0)


@final
class HeatConduction(Problem):
    """Inverse heat conduction: m = log κ on n × n cells from noisy readings of thermometers.

    Heaters warm a plate, one after the other. With readings r, whose noise has standard deviation σ,
    temperatures u(m), and S that selects the thermometers' cells,

        J(m) = 1/(2 σ² count) Σ (S u(m) - r)² + α/2 Σ over neighbours (m_i - m_j)²,    σ = α = 1e-3.

    A gradient uses ``heaters_at_once`` of the heaters, drawn without replacement: it is unbiased, and exact if
    it uses all of them. There are eight time steps, and a thermometer on every third cell in each direction.
    The readings are the same for every seed.

    Args:
        seed: of the start, one log κ in (-½, ½) for all cells, and of the heaters drawn.
        size: n, 4 to 256.
        heaters: how many there are: 4, 9 or 16.
        heaters_at_once: how many a gradient uses, from 1 on; None is all.

    Raises:
        ValueError: an argument is out of range.

    >>> problem = HeatConduction(size=12)
    >>> problem.deterministic, HeatConduction(size=12, heaters_at_once=1).deterministic
    (True, False)
    """

    name = "heat"

    def __init__(
        self, seed: int = 0, size: int = 24, heaters: int = 4, heaters_at_once: int | None = None
    ) -> None:
        super().__init__(seed)
        check_integer("HeatConduction", "size", size, least=4, most=256)
        if heaters not in (4, 9, 16):
            raise ValueError(f"HeatConduction: heaters must be 4, 9 or 16, got {shown(heaters)}")
        at_once = heaters if heaters_at_once is None else heaters_at_once
        check_integer("HeatConduction", "heaters_at_once", at_once, most=heaters)
        self.heaters: int = heaters
        self.heaters_at_once: int = at_once
        self.plate: Plate = _plate(size, heaters)
        self.log_conductivity: nn.Parameter = nn.Parameter(torch.empty(size**2, dtype=torch.float64))
        self.reset()

    def forward(
        self,
        batch: Tensor | None,  # [heaters_at_once], int64
    ) -> Tensor:
        chosen = torch.arange(self.heaters) if batch is None else batch
        return _Misfit.apply(self.log_conductivity, chosen, self.plate)[0]

    def batches(self) -> Iterator[Tensor | None]:
        return repeat(None) if self.deterministic else self._drawn()

    def _drawn(self) -> Iterator[Tensor]:
        generator = seeded_generator(self.seed, "batches")
        while True:
            yield torch.randperm(self.heaters, generator=generator)[: self.heaters_at_once]

    @torch.no_grad()
    def evaluate(self) -> float:
        if not bool(self.log_conductivity.isfinite().all()):
            return math.nan
        return self.plate.value(self.log_conductivity.double().numpy())

    @torch.no_grad()
    def reset(self) -> None:
        start = torch.rand((), generator=seeded_generator(self.seed, "start"), dtype=torch.float64) - 0.5
        self.log_conductivity.fill_(start)

    @property
    def deterministic(self) -> bool:
        return self.heaters_at_once == self.heaters


@lru_cache(maxsize=4)
def _plate(size: int, heaters: int) -> Plate:
    return Plate(size, heaters, steps=8, spacing=3)
