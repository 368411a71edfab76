"""Images: the atoms at the points of a round, and what was measured there."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import Filter
from ase.utils.abc import Optimizable
from torch import Tensor

from optex.ase.calculation import Calculation
from optex.evaluators import Evaluation, EvaluationRequest, Evaluator, WrappingEvaluator
from optex.stepping import Buffers, ParameterVector

__all__ = ["Image", "Images", "atoms_of"]


def atoms_of(target: Any) -> Any:
    """The atoms inside filters."""
    while isinstance(target, Filter):
        target = target.atoms
    return target


class Image:
    """The atoms, or the filter around them, at one point.

    Attributes:
        request: [d], the point asked for.
        x: [d], that point as the atoms report it, after constraints.
        calculator: answers with what was measured here.
        value, gradient: after constraints, as the optimizer sees them; in eV, and [d] in eV/Å.
    """

    calculator: MeasuredCalculator
    value: float
    gradient: npt.NDArray[np.float64]  # [d]

    def __init__(
        self,
        target: Any,
        x: npt.NDArray[np.float64],  # [d]
        *,
        at_start: bool,
    ) -> None:
        original = atoms_of(target).calc
        self._original = original
        self._target = copy.deepcopy(target, {id(original): original})
        self._atoms = atoms_of(self._target)
        self.optimizable: Optimizable = self._target.__ase_optimizable__()
        if not at_start:  # the atoms are there: setting x again could change its last bits
            self.optimizable.set_x(x)
        self.request: npt.NDArray[np.float64] = x
        self.x: npt.NDArray[np.float64] = self.optimizable.get_x()

    def input(self) -> Tensor:  # [3 n + 9]
        """Positions and cell."""
        return torch.from_numpy(
            np.concatenate([self._atoms.positions.ravel(), np.asarray(self._atoms.cell).ravel()])
        )

    def measure(
        self,
        answer: npt.NDArray[np.float64],  # [3 n + 9], as Calculation packs it
    ) -> None:
        """Store the calculator's answer, and derive value and gradient through constraints and filter."""
        forces, stress, energies = answer[:-9].reshape(-1, 3), answer[-9:-3], answer[-3:-1]
        energy, free_energy = (float(e) for e in energies)
        self.calculator = MeasuredCalculator(
            self._atoms,
            self._original,
            energy=energy,
            free_energy=None if math.isnan(free_energy) else free_energy,
            forces=forces,
            stress=None if np.isnan(stress).any() else stress,
        )
        self._atoms.calc = self.calculator
        self.value = float(self.optimizable.get_value())
        self.gradient = np.asarray(self.optimizable.get_gradient())

    def within(self, fmax: float) -> bool:
        """Whether its forces are below ``fmax``, in eV/Å."""
        return bool(self.optimizable.converged(self.gradient, fmax))


class MeasuredCalculator(SinglePointCalculator):
    """Answers with what was measured at its atoms, and asks the original calculator for the rest."""

    def __init__(self, atoms: Atoms, original: Any, **results: Any) -> None:
        super().__init__(atoms, **results)
        self._original = original
        self.name: str = getattr(original, "name", "unknown")

    def get_property(self, name: str, atoms: Any = None, allow_calculation: bool = True) -> Any:
        if name in self.results and not self.check_state(self.atoms if atoms is None else atoms):
            return super().get_property(name, atoms, allow_calculation)
        return self._original.get_property(name, atoms, allow_calculation)

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        return self._original.todict() if hasattr(self._original, "todict") else {}


class Images(WrappingEvaluator):
    """Makes images of a round's points, evaluates the calculator there, and keeps what was measured.

    Attributes:
        measured: the measured images of the last round, its start first.
    """

    def __init__(self, target: Any, inner: Evaluator, *, one_by_one: bool) -> None:
        super().__init__(inner)
        self._target = target
        self._one_by_one = one_by_one
        self._fmax: float | None = None
        self._vector: ParameterVector | None = None
        self.measured: list[Image] = []

    def start_round(self, fmax: float | None) -> None:
        """Begin a round of a run that ends at forces below ``fmax``, in eV/Å; None where there is no run."""
        self._fmax = fmax

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        source = request.source
        assert isinstance(source, Calculation)
        if self._vector is None or self._vector.parameters[0] is not source.point:
            self._vector = ParameterVector([source.point])
        images = [
            Image(self._target, point.numpy().copy(), at_start=i == 0) for i, point in enumerate(request.points)
        ]
        inputs = torch.stack([image.input() for image in images])
        whole = replace(request, vector=self._vector, points=inputs, gradient_hook=None, buffers=Buffers())
        losses = torch.full((len(images),), torch.nan, dtype=torch.float64)
        gradients = torch.zeros_like(request.points)
        self.measured = []
        retried, lost = [], list(range(len(images)))
        size = 1 if self._one_by_one else len(images)
        for first in range(0, len(images), size):
            try:
                evaluation = self.inner.evaluate(whole.rows(slice(first, first + size)))
            except TypeError as error:
                kind = type(source.atoms.calc).__name__
                error.add_note(
                    f"OptExOptimizer: what is evaluated, and sent to workers, is the calculator, {kind}"
                )
                raise
            retried += [first + i for i in evaluation.retried]
            for i, answer in enumerate(evaluation.gradients):
                if i in evaluation.lost:
                    continue
                image = images[first + i]
                image.measure(answer.numpy())
                losses[first + i] = image.value
                gradients[first + i] = torch.from_numpy(image.gradient)
                lost.remove(first + i)
                self.measured.append(image)
            if self._fmax is not None and self.converged(self.measured[0], self._fmax) is not None:
                break  # the run ends here: nobody needs the images left
        masks = ((True,),) * len(images)
        return Evaluation(losses, gradients, masks, retried=tuple(retried), lost=tuple(lost))

    def converged(self, start: Image, fmax: float) -> Image | None:
        """The lowest image with forces below ``fmax`` and no more energy than the start; None without one."""
        found = [image for image in self.measured if image.within(fmax) and image.value <= start.value]
        return min(found, key=lambda image: image.value, default=None)
