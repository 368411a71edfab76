"""An ASE optimizer that evaluates the forces of several images at once: a front door over OptEx, for atoms."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from optex.checks import saved_entry, saved_tensor
from optex.estimators import Estimator
from optex.evaluators import (
    Evaluation,
    EvaluationRequest,
    Evaluator,
    SequentialEvaluator,
    WorkersEvaluator,
    WrappingEvaluator,
)
from optex.optimizer import OptEx
from optex.round import Acceptance, RoundReport
from optex.sources import GradientSource
from optex.stepping import Buffers, ParameterVector, base_optimizer, default_rate

try:
    from ase import Atoms
    from ase.calculators.calculator import PropertyNotImplementedError, compare_atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.filters import Filter, StrainFilter, UnitCellFilter
    from ase.optimize.optimize import Optimizer, RestartError
    from ase.utils.abc import Optimizable
except ImportError as error:
    raise ImportError(
        f"optex.ase needs ASE, 3.26 or later ({error}): pip install 'optex[ase]'"
    ) from error

__all__ = ["OptExOptimizer"]

_OWNER: Final = "OptExOptimizer"
# Å² / eV. Momentum of 0.9 is stable up to a curvature of 3.8 / lr, here 380 eV / Å²: N₂ has about 290.
_RATES: Final[dict[str, float]] = {"sgd": 0.005, "momentum": 0.01, "nesterov": 0.01}
_LARGEST_STEP: Final = 1.0  # Å; ASE's own optimizers warn beyond it


class OptExOptimizer(Optimizer):
    """Relax atoms by rounds of steps of momentum, Adam or another torch optimizer, for ``ase.optimize``.

    A round starts at the atoms' positions x_0, drafts x_{i+1} = step(x_i, ĝ_i) on forces predicted from those
    seen so far, evaluates energy and forces at ``parallelism`` of these images at once, and advances by the
    steps that hold up; :class:`~optex.OptEx` has the algorithm. What ASE counts as a step, logs, writes to the
    trajectory and shows to observers is a round's start, with the energy, forces and (where the calculator has
    found it) stress that were measured there. The run ends at an image that was measured: a round's start, or
    any other image of the round with forces below ``fmax`` and an energy no higher than the start's.

    As in ASE no atom moves farther than ``maxstep`` in a step, and constraints hold as ``atoms`` keeps them.

    Args:
        atoms: an ``ase.Atoms`` with a calculator, or a filter around one, as ``FrechetCellFilter``.
        restart: a file in which the run's state is kept after every round. Where it is there already, the run
            goes on from it; bit for bit if the atoms are where it left them and the calculator answers the same.
            Settings of the optimizer (``lr``, ...) are then the file's.
        logfile, trajectory, append_trajectory: as in ``ase.optimize.BFGS``.
        maxstep: largest distance, in Å, that an atom moves in a step of the optimizer; 0.2 by default.
        optimizer: a key of ``optex.stepping.OPTIMIZERS``, or a function of a list of one parameter (and ``lr``,
            where given) that returns a ``torch.optim.Optimizer``.
        lr: its learning rate; by default 0.01 for momentum, 0.005 for ``"sgd"``, in Å²/eV, and
            ``optex.stepping.default_rate`` for others, which is in Å for Adam and its like.
        parallelism: N, images evaluated at once, at least 1.
        stride, history_size, estimator, acceptance: as in :class:`~optex.OptEx`.
        workers: who computes: so many processes (-1: one a core), a ``concurrent.futures.Executor``, or a
            function like ``map``, as in :class:`~optex.WorkersEvaluator`; None computes here, one image after
            the other, with the atoms' calculator itself. Processes and threads get copies of the calculator,
            made when first needed; processes of our own end with the ``with`` block, ``close()`` or the object.
        options: go to ``ase.optimize.optimize.Optimizer``, as ``loginterval``.

    Attributes:
        rounds: evaluations in turn so far: what the run takes where N images take the time of one.
        force_calls: images evaluated so far.
        optex: the :class:`~optex.OptEx` inside.

    After a run the atoms are where it ended, with their own calculator. Without workers it has just computed
    these atoms if the run has converged; otherwise asking for their energy is one more calculation.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.
        ase.optimize.optimize.RestartError: ``restart`` cannot be gone on from.
        NonFiniteError: at a round, energy or forces at its start are not finite.
        WorkerLostError: at a round, no worker could evaluate its start.

    Source: Shu et al., NeurIPS 2024, Algorithm 1, in the form that :class:`~optex.OptEx` gives it.

    >>> from ase.build import molecule
    >>> from ase.calculators.emt import EMT
    >>> from optex.ase import OptExOptimizer
    >>> atoms = molecule("CH3CH2OH", calculator=EMT())
    >>> optimizer = OptExOptimizer(atoms, parallelism=4, logfile=None)
    >>> bool(optimizer.run(fmax=0.05, steps=100))
    True
    >>> optimizer.rounds < optimizer.optex.steps_taken          # evaluations in turn, against steps of momentum
    True
    """

    def __init__(
        self,
        atoms: Atoms | Filter,
        restart: str | Path | None = None,
        logfile: IO[str] | str | Path | None = "-",
        trajectory: Any = None,
        append_trajectory: bool = False,
        maxstep: float | None = None,
        *,
        optimizer: str | Callable[..., TorchOptimizer] = "momentum",
        lr: float | None = None,
        parallelism: int = 4,
        stride: float | Literal["auto"] = "auto",
        history_size: int | None = None,
        estimator: Estimator | None = None,
        acceptance: Acceptance | None = None,
        workers: int | Executor | Callable[..., Iterable[Any]] | None = None,
        **options: Any,
    ) -> None:
        _check_atoms(atoms)
        self.maxstep = _read_maxstep(self.defaults["maxstep"] if maxstep is None else maxstep)
        inner = _read_workers(workers)
        super().__init__(
            atoms,  # pyright: ignore[reportArgumentType]  (filters too, as in ASE's own optimizers)
            logfile=logfile,
            trajectory=trajectory,
            append_trajectory=append_trajectory,
            **options,
        )
        self.optimizable: Any = _Measured(self, atoms.__ase_optimizable__())
        start = self.optimizable.get_x()
        self._x = nn.Parameter(torch.from_numpy(start.copy()))
        base = _build_base(optimizer, self._x, lr)
        _MaxStep(base, self._x, self.maxstep)
        self._images = _Images(atoms, inner, one_by_one=isinstance(inner, SequentialEvaluator))
        self.optex = OptEx(
            base,
            parallelism=parallelism,
            **({'stride': stride} if 'stride' in OptEx.__init__.__kwdefaults__ else {}),  # TEMPORARY
            history_size=history_size,
            estimator=estimator,
            acceptance=acceptance,
            evaluator=self._images,
            shard=False,  # images are whole
        )
        self.rounds = 0
        self.force_calls = 0
        self._source: _Calculation | None = None
        self._here: _Image | None = None  # measured where the atoms are
        self._placed = start  # where this optimizer has put the atoms, as they give it back
        self.restart = restart
        if restart is not None and Path(restart).is_file():
            self.read()
            self.comm.barrier()

    @property
    def last_report(self) -> RoundReport | None:
        """Of the last round, None before it."""
        return self.optex.last_report

    def measured(self) -> _Image:
        """Energy and forces where the atoms are: known, or of a new round that starts there."""
        target = self.optimizable.inner
        x = target.get_x()
        if self._here is not None and np.array_equal(x, self._here.x):
            return self._here
        if not np.array_equal(x, self._placed):  # somebody else has moved them
            self._move_parameter(x)
            self._placed = x
        source = self._calculation()
        self._images.start_round(None if self.fmax is None else float(self.fmax))
        report = next(self.optex.rounds(itertools.repeat(None), source))
        self.rounds += 1
        self.force_calls += report.evaluated
        self._here = self._images.measured[0]
        return self._here

    def step(self) -> None:
        """Go to the image that ends the run if the round has one, else to the round's end."""
        here = self.measured()
        target = self.optimizable.inner
        found = None if self.fmax is None else self._images.converged(here, float(self.fmax))
        if found is None:
            x = self._x.detach().numpy().copy()
            target.set_x(x)
            self._here, self._placed = None, target.get_x()
            if not np.allclose(self._placed, x, rtol=0, atol=1e-9):  # constraints have a say
                self._move_parameter(self._placed)
        else:
            target.set_x(found.request)
            self._here, self._placed = found, target.get_x()
            found.x = self._placed
            self._move_parameter(found.request)
        self._save()

    def call_observers(self) -> None:
        """Show observers the atoms with what was measured there, whatever the calculator did since."""
        atoms = _atoms_of(self.atoms)
        calculator = atoms.calc
        atoms.calc = self.measured().calculator
        try:
            super().call_observers()
        finally:
            atoms.calc = calculator

    def close(self) -> None:
        """Close files, and end worker processes of our own; a later run starts new ones."""
        super().close()
        images = getattr(self, "_images", None)  # ASE calls this where the constructor has failed, too
        if images is not None and isinstance(images.inner, WorkersEvaluator):
            images.inner.close()

    def _move_parameter(
        self,
        x: np.ndarray,  # [d]
    ) -> None:
        with torch.no_grad():
            self._x.copy_(torch.from_numpy(x))

    def _calculation(self) -> _Calculation:
        atoms = _atoms_of(self.atoms)
        if atoms.calc is None:
            raise ValueError(f"{_OWNER}: atoms have no calculator; set atoms.calc, to EMT() say, before the run")
        if self._source is None or not self._source.serves(atoms):
            stress = isinstance(self.atoms, (StrainFilter, UnitCellFilter))
            self._source = _Calculation(atoms, stress=stress)
        return self._source

    # ------------------------------------------------------------------ restart

    def _save(self) -> None:
        if self.restart is None or self.comm.rank != 0:
            return
        state = {
            "optex": self.optex.state_dict(),
            "x": self._x.detach().clone(),
            "placed": torch.from_numpy(self._placed.copy()),
            "orig_cell": _orig_cell(self.atoms),
        }
        path = Path(self.restart)
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            torch.save(state, beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    def read(self) -> None:
        """Go on from the restart file; positions are the atoms' own.

        Raises:
            RestartError: it is not such a file, or is of another system or optimizer.
        """
        where = f"{_OWNER}: restart file {str(self.restart)!r}"
        try:
            state = torch.load(str(self.restart), weights_only=True)
            x, placed = (saved_tensor(where, state, name, tuple(self._x.shape)) for name in ("x", "placed"))
            if _orig_cell(self.atoms) is not None:
                self.atoms.orig_cell = saved_tensor(where, state, "orig_cell", (3, 3)).numpy()
            self.optex.load_state_dict(saved_entry(where, state, "optex"))
        except Exception as error:
            raise RestartError(
                f"{where} cannot be gone on from ({error}); delete it, or name another one, to start afresh"
            ) from error
        self._placed = placed.numpy()
        self._move_parameter(x.numpy())


# ---------------------------------------------------------------------- images


class _Image:
    """The atoms, or the filter around them, at one point.

    Attributes:
        request: [d], the point asked for.
        x: [d], as the atoms give it back.
        calculator: answers what was measured.
        value, gradient: as the optimizer sees them, after constraints: eV, [d] eV/Å.
    """

    calculator: _MeasuredCalculator
    value: float
    gradient: np.ndarray

    def __init__(
        self,
        target: Any,
        x: np.ndarray,  # [d]
        *,
        at_start: bool,
    ) -> None:
        original = _atoms_of(target).calc
        self._original = original
        self._target = copy.deepcopy(target, {id(original): original})
        self._atoms = _atoms_of(self._target)
        self.optimizable = self._target.__ase_optimizable__()
        if not at_start:  # where the atoms are already, and to the bit
            self.optimizable.set_x(x)
        self.request = x
        self.x = self.optimizable.get_x()

    def input(self) -> Tensor:  # [3 n + 9]
        """Positions and cell."""
        return torch.from_numpy(np.concatenate([self._atoms.positions.ravel(), np.asarray(self._atoms.cell).ravel()]))

    def measure(
        self,
        answer: np.ndarray,  # [3 n + 9], as _Calculation packs it
    ) -> None:
        """Take what the calculator said; constraints and filter make value and gradient of it."""
        forces, stress, energies = answer[:-9].reshape(-1, 3), answer[-9:-3], answer[-3:-1]
        energy, free_energy = (float(e) for e in energies)
        self.calculator = _MeasuredCalculator(
            self._atoms,
            self._original,
            energy=energy,
            free_energy=None if math.isnan(free_energy) else free_energy,
            forces=forces,
            stress=None if np.isnan(stress).any() else stress,
        )
        self._atoms.calc = self.calculator
        self.value = float(self.optimizable.get_value())
        self.gradient = self.optimizable.get_gradient()

    def within(self, fmax: float) -> bool:
        """Are its forces below ``fmax``?"""
        return bool(self.optimizable.converged(self.gradient, fmax))


class _MeasuredCalculator(SinglePointCalculator):
    """Answers what was measured at its atoms; the rest is the original calculator's."""

    def __init__(self, atoms: Atoms, original: Any, **results: Any) -> None:
        super().__init__(atoms, **results)
        self._original = original
        self.name = getattr(original, "name", self.name)

    def get_property(self, name: str, atoms: Any = None, allow_calculation: bool = True) -> Any:
        if name in self.results and not self.check_state(self.atoms if atoms is None else atoms):
            return super().get_property(name, atoms, allow_calculation)
        return self._original.get_property(name, atoms, allow_calculation)

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        return self._original.todict() if hasattr(self._original, "todict") else {}


class _Calculation(GradientSource):
    """The calculator at given positions and cell, without constraints: what is sent to workers.

    It answers in the form of a gradient of ``point``, [3 n + 9] as the positions and the cell: forces, six
    components of the stress, energy, free energy and 0; NaN stands for what the calculator does not have.
    """

    deterministic = True

    def __init__(self, atoms: Atoms, *, stress: bool) -> None:
        self.atoms = atoms.copy()
        self.atoms.set_constraint()
        self.atoms.calc = atoms.calc
        self.stress = stress
        self.point = nn.Parameter(torch.zeros(3 * len(atoms) + 9, dtype=torch.float64))

    def serves(self, atoms: Atoms) -> bool:
        """Would one of these atoms be the same?"""
        changes = compare_atoms(self.atoms, atoms, excluded_properties={"positions", "cell"})
        return self.atoms.calc is atoms.calc and not changes

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        atoms, point = self.atoms, self.point.detach().numpy()
        atoms.positions[:] = point[:-9].reshape(-1, 3)
        atoms.cell[:] = point[-9:].reshape(3, 3)
        forces = atoms.get_forces()  # first: with them calculators find the energy, and not the other way round
        energy = float(atoms.get_potential_energy())
        answer = [forces.ravel(), self._stress(), [energy, self._free_energy(), 0.0]]
        self.point.grad = torch.from_numpy(np.concatenate(answer))
        return torch.tensor(energy, dtype=torch.float64), None

    def _stress(self) -> np.ndarray:  # [6]
        try:
            found = self.atoms.calc.get_property("stress", self.atoms, allow_calculation=self.stress)
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


class _Images(WrappingEvaluator):
    """Makes images of a round's points, has the calculator asked for them, and keeps them.

    Attributes:
        measured: the images of the last round, its start first.
    """

    def __init__(self, target: Any, inner: Evaluator, *, one_by_one: bool) -> None:
        super().__init__(inner)
        self._target = target
        self._one_by_one = one_by_one
        self._fmax: float | None = None
        self._vector: ParameterVector | None = None
        self.measured: list[_Image] = []

    def start_round(self, fmax: float | None) -> None:
        """Of a run to this ``fmax``."""
        self._fmax = fmax

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        source = request.source
        assert isinstance(source, _Calculation)
        if self._vector is None or self._vector.parameters[0] is not source.point:
            self._vector = ParameterVector([source.point])
        images = [
            _Image(self._target, point.numpy().copy(), at_start=i == 0) for i, point in enumerate(request.points)
        ]
        inputs = torch.stack([image.input() for image in images])
        whole = replace(request, vector=self._vector, points=inputs, gradient_hook=None, buffers=Buffers())
        losses = torch.full((len(images),), torch.nan, dtype=torch.float64)
        gradients = torch.zeros_like(request.points)
        self.measured = []
        retried, lost = [], list(range(len(images)))
        size = 1 if self._one_by_one else len(images)
        for first in range(0, len(images), size):
            evaluation = self.inner.evaluate(whole.rows(slice(first, first + size)))
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
                break  # the images left would be in vain
        masks = ((True,),) * len(images)
        return Evaluation(losses, gradients, masks, retried=tuple(retried), lost=tuple(lost))

    def converged(self, start: _Image, fmax: float) -> _Image | None:
        """Of the images within ``fmax`` that are no higher than the start the lowest; None if there is none."""
        found = [image for image in self.measured if image.within(fmax) and image.value <= start.value]
        return min(found, key=lambda image: image.value, default=None)


class _Measured(Optimizable):
    """What ASE's loop sees: the atoms, whose energy and forces come from rounds."""

    def __init__(self, owner: OptExOptimizer, inner: Any) -> None:
        self._owner = owner
        self.inner = inner

    def ndofs(self) -> int:
        return self.inner.ndofs()

    def get_x(self) -> np.ndarray:  # [d]
        return self.inner.get_x()

    def set_x(
        self,
        x: np.ndarray,  # [d]
    ) -> None:
        self.inner.set_x(x)

    def get_gradient(self) -> np.ndarray:  # [d]
        return self._owner.measured().gradient.copy()

    def get_value(self) -> float:
        return self._owner.measured().value

    def iterimages(self) -> Any:
        return self.inner.iterimages()

    def gradient_norm(
        self,
        gradient: np.ndarray,  # [d]
    ) -> float:
        return self.inner.gradient_norm(gradient)


# ---------------------------------------------------------------------- steps and arguments


class _MaxStep:
    """Shortens every step of a base optimizer, drafted or final, so that no atom moves too far."""

    def __init__(
        self,
        base: TorchOptimizer,
        x: Tensor,  # [3 n]
        maxstep: float,
    ) -> None:
        self._x = x
        self._before = x.detach().clone()
        self._maxstep = maxstep
        base.register_step_pre_hook(self._note)
        base.register_step_post_hook(self._shorten)

    def _note(self, *_: Any) -> None:
        self._before.copy_(self._x.detach())

    @torch.no_grad()
    def _shorten(self, *_: Any) -> None:
        step = self._x - self._before
        longest = float(torch.linalg.vector_norm(step.view(-1, 3), dim=1).max())
        if longest > self._maxstep:
            self._x.copy_(self._before + step * (self._maxstep / longest))


def _atoms_of(target: Any) -> Any:
    """The atoms inside filters."""
    while isinstance(target, Filter):
        target = target.atoms
    return target


def _orig_cell(target: Any) -> Tensor | None:  # [3, 3]
    """What the coordinates of a cell filter refer to."""
    found = getattr(target, "orig_cell", None) if isinstance(target, Filter) else None
    return None if found is None else torch.tensor(np.asarray(found, dtype=float))


def _check_atoms(atoms: Any) -> None:
    if not isinstance(atoms, (Atoms, Filter)):
        raise TypeError(
            f"{_OWNER}: atoms must be an ase.Atoms or an ASE filter around one, got {type(atoms).__name__}; "
            "bands of images (NEB) have no energy to go down, use ase.mep.NEB with ase.optimize.FIRE"
        )
    if not len(atoms):
        raise ValueError(f"{_OWNER}: atoms are empty; there is nothing to relax")


def _read_maxstep(maxstep: Any) -> float:
    if isinstance(maxstep, bool) or not isinstance(maxstep, Real) or not 0 < float(maxstep) <= _LARGEST_STEP:
        raise ValueError(
            f"{_OWNER}: maxstep must be a distance in Å above 0 and up to {_LARGEST_STEP:g}, got {maxstep!r}; 0.2 is "
            "ASE's default"
        )
    return float(maxstep)


def _read_workers(workers: Any) -> Evaluator:
    if workers is None or workers is map or (workers == 1 and not isinstance(workers, bool)):
        return SequentialEvaluator()
    return WorkersEvaluator(workers)


def _build_base(
    optimizer: str | Callable[..., TorchOptimizer],
    x: nn.Parameter,  # [d]
    lr: float | None,
) -> TorchOptimizer:
    if not (isinstance(optimizer, str) or callable(optimizer)):
        raise TypeError(
            f"{_OWNER}: optimizer must be a name or a function of a list of one parameter, as 'momentum' or "
            f"torch.optim.Adam, got {type(optimizer).__name__}"
        )
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, Real) or not float(lr) > 0):
        raise ValueError(f"{_OWNER}: lr must be a positive number, in Å²/eV for momentum, got {lr!r}")
    settings = {} if lr is None else {"lr": float(lr)}
    if isinstance(optimizer, str):
        if lr is None:
            settings = {"lr": _RATES.get(optimizer, default_rate(optimizer))}
        try:
            return base_optimizer(optimizer, [x], **settings)
        except ValueError as error:
            raise ValueError(f"{_OWNER}: {error}") from error
    base = optimizer([x], **settings)
    if not isinstance(base, TorchOptimizer):
        raise TypeError(f"{_OWNER}: optimizer must return a torch.optim.Optimizer, got {type(base).__name__}")
    if [id(p) for group in base.param_groups for p in group["params"]] != [id(x)]:
        raise ValueError(f"{_OWNER}: optimizer must be built over the list that it is handed, and nothing else")
    return base
