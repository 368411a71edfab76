"""The calculator as a source of gradients, for this process and for others."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError, compare_atoms
from torch import Tensor, nn

from optex.sources import GradientSource

__all__ = ["Calculation"]


class Calculation(GradientSource):
    """The calculator at given positions and cell, without constraints: what is sent to workers.

    ``point`` [3 n + 9] holds the positions and the cell, in Å. Its gradient is no derivative here: it carries
    the calculator's answer, which are the forces [3 n] in eV/Å, six components of the stress in eV/Å³, energy
    and free energy in eV, and a 0. NaN stands for what the calculator does not have.
    """

    deterministic: bool = True

    def __init__(self, atoms: Atoms, *, stress: bool) -> None:
        self.atoms: Atoms = atoms.copy()
        self.atoms.set_constraint()
        self.atoms.calc = atoms.calc
        self.stress: bool = stress
        self.point: nn.Parameter = nn.Parameter(torch.zeros(3 * len(atoms) + 9, dtype=torch.float64))

    def serves(self, atoms: Atoms) -> bool:
        """Whether a ``Calculation`` of these atoms would be this one, but for positions and cell."""
        changes = compare_atoms(self.atoms, atoms, excluded_properties={"positions", "cell"})
        return self.atoms.calc is atoms.calc and not changes

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        atoms, point = self.atoms, self.point.detach().numpy()
        atoms.positions[:] = point[:-9].reshape(-1, 3)
        atoms.set_cell(point[-9:].reshape(3, 3))
        forces = atoms.get_forces()  # first: with them calculators find the energy, not the other way round
        energy = float(atoms.get_potential_energy())
        answer = [forces.ravel(), self._stress(), [energy, self._free_energy(), 0.0]]
        self.point.grad = torch.from_numpy(np.concatenate(answer))
        return torch.tensor(energy, dtype=torch.float64), None

    def _stress(self) -> npt.NDArray[np.float64]:  # [6]
        try:
            calculator: Any = self.atoms.calc
            found = calculator.get_property("stress", self.atoms, allow_calculation=self.stress)
        except PropertyNotImplementedError:
            if self.stress:
                raise
            found = None
        return np.full(6, np.nan) if found is None else np.asarray(found, dtype=float)

    def _free_energy(self) -> float:
        try:
            return float(self.atoms.get_potential_energy(force_consistent=True))
        except PropertyNotImplementedError:
            return math.nan

    def replica(self) -> tuple[GradientSource, list[Tensor]]:
        twin = copy.deepcopy(self)
        return twin, [twin.point]
