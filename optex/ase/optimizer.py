"""OptExOptimizer: rounds of OptEx in the loop, the logs and the files of ``ase.optimize``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from ase.filters import Filter, StrainFilter, UnitCellFilter
from ase.optimize.optimize import Optimizer, RestartError
from ase.utils.abc import Optimizable
from torch import Tensor, nn
from torch.optim import Optimizer as TorchOptimizer

from optex.ase.arguments import (
    OWNER,
    MaxStep,
    Relaxable,
    build_base,
    check_atoms,
    read_maxstep,
    read_workers,
)
from optex.ase.calculation import Calculation
from optex.ase.images import Image, Images, atoms_of
from optex.checks import saved_entry, saved_tensor
from optex.estimators import Estimator
from optex.evaluators import SequentialEvaluator, WorkersEvaluator
from optex.optimizer import OptEx
from optex.round import Acceptance, RoundReport

__all__ = ["OptExOptimizer"]


class OptExOptimizer(Optimizer):
    """Relax atoms by rounds of steps of momentum, Adam or another torch optimizer, for ``ase.optimize``.

    A round starts at the atoms' positions x_0, drafts x_{i+1} = step(x_i, ĝ_i) on forces predicted from those
    seen so far, evaluates energy and forces at ``parallelism`` of these images at once, and advances by the
    steps that ``acceptance`` keeps; :class:`~optex.OptEx` has the algorithm. What ASE counts as a step, logs,
    writes to the trajectory and shows to observers is a round's start, with the energy, forces and (where the
    calculator has found it) stress that were measured there. The run ends at an image that was measured: a
    round's start, or any other image of the round with forces below ``fmax`` and no more energy than the start.

    As in ASE no atom moves farther than ``maxstep`` in a step, and constraints hold as ``atoms`` keeps them.

    Args:
        atoms: an ``ase.Atoms`` with a calculator, or a filter around one, as ``FrechetCellFilter``.
        restart: a file to which the run's state is written after every round. If the file exists, the run
            resumes from it, bit for bit if the atoms are where the last run left them and the calculator
            answers the same. Settings of the optimizer (``lr``, ...) are then the file's.
        logfile, trajectory, append_trajectory: as in ``ase.optimize.BFGS``.
        maxstep: largest distance, in Å, that an atom moves in a step of the optimizer; 0.2 by default.
        optimizer: a key of ``optex.stepping.OPTIMIZERS`` (``"momentum"`` and ``"nesterov"`` take 0.8 here),
            or a function of a list of one parameter (and ``lr``, where given) that returns a
            ``torch.optim.Optimizer``.
        lr: its learning rate. For momentum 0.012 Å²/eV by default, stable for bonds as stiff as that of N₂; for
            ``"sgd"`` and ``"nesterov"`` 0.006; for others ``optex.stepping.default_rate``, in Å for Adam.
        parallelism: N, images evaluated at once, at least 1.
        stride, history_size, estimator, acceptance: as in :class:`~optex.OptEx`.
        workers: a number of processes (-1: one per core), a ``concurrent.futures.Executor``, or a function
            like ``map``, as in :class:`~optex.WorkersEvaluator`; None computes in this process, one image after
            the other, with the atoms' calculator itself. Processes and threads get copies of the calculator,
            made when first needed; processes started for it end with the ``with`` block, ``close()`` or the
            object.
        options: keyword arguments of ``ase.optimize.optimize.Optimizer``, such as ``loginterval``.

    Attributes:
        rounds: taken so far: the length of the run in evaluations where N images take the time of one.
        force_calls: images evaluated so far.
        optex: the :class:`~optex.OptEx` inside.

    After a run the atoms are where it ended, with their own calculator. If the run converged without workers,
    the calculator still has their results; otherwise asking for their energy is one more calculation.

    Raises:
        TypeError, ValueError: an argument cannot work; the message names it and the remedy.
        ase.optimize.optimize.RestartError: the run cannot resume from ``restart``.
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
        atoms: Relaxable,
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
        check_atoms(atoms)
        self.maxstep: float = read_maxstep(self.defaults["maxstep"] if maxstep is None else maxstep)
        inner = read_workers(workers)
        super().__init__(
            atoms,  # pyright: ignore[reportArgumentType]  (filters too, as in ASE's own optimizers)
            logfile=logfile,
            trajectory=trajectory,
            append_trajectory=append_trajectory,
            **options,
        )
        self.optimizable: Measured = Measured(self, atoms.__ase_optimizable__())
        start = self.optimizable.get_x()
        self._x = nn.Parameter(torch.from_numpy(start.copy()))
        base = build_base(optimizer, self._x, lr)
        MaxStep(base, self._x, self.maxstep)
        self._images = Images(atoms, inner, one_by_one=isinstance(inner, SequentialEvaluator))
        self.optex: OptEx = OptEx(
            base,
            parallelism=parallelism,
            stride=stride,
            history_size=history_size,
            estimator=estimator,
            acceptance=acceptance,
            evaluator=self._images,
            shard=False,  # an image needs the whole vector
        )
        self.rounds: int = 0
        self.force_calls: int = 0
        self._source: Calculation | None = None
        self._here: Image | None = None  # measured where the atoms are
        # Where this optimizer put the atoms, as they report it: tells whether somebody else has moved them.
        self._placed: npt.NDArray[np.float64] = start
        self.restart = restart
        if restart is not None and Path(restart).is_file():
            self.read()
            self.comm.barrier()

    @property
    def last_report(self) -> RoundReport | None:
        """The last round's report, None before it; images that the run's end spared are among its ``lost``."""
        return self.optex.last_report

    def measured(self) -> Image:
        """The image where the atoms are: the one measured there before, or the start of a new round."""
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

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (ASE's own only raises)
        """Move the atoms to the image that ends the run if the round has one, else to the round's end."""
        here = self.measured()
        target = self.optimizable.inner
        found = None if self.fmax is None else self._images.converged(here, float(self.fmax))
        if found is None:
            x = self._x.detach().numpy().copy()
            target.set_x(x)
            self._here, self._placed = None, target.get_x()
            if not np.allclose(self._placed, x, rtol=0, atol=1e-9):  # constraints changed it
                self._move_parameter(self._placed)
        else:
            target.set_x(found.request)
            self._here, self._placed = found, target.get_x()
            found.x = self._placed
            self._move_parameter(found.request)
        self._save()

    def call_observers(self) -> None:
        """Show observers the atoms with what was measured there, whatever the calculator did since."""
        atoms = atoms_of(self.atoms)
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
        x: npt.NDArray[np.float64],  # [d]
    ) -> None:
        with torch.no_grad():
            self._x.copy_(torch.from_numpy(x))

    def _calculation(self) -> Calculation:
        atoms = atoms_of(self.atoms)
        if atoms.calc is None:
            raise ValueError(f"{OWNER}: atoms have no calculator; set atoms.calc, to EMT() say, before the run")
        if self._source is None or not self._source.serves(atoms):
            stress = isinstance(self.atoms, (StrainFilter, UnitCellFilter))
            self._source = Calculation(atoms, stress=stress)
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
        """Resume from the restart file; the positions stay those of the atoms.

        Raises:
            RestartError: it is not such a file, or is of another system or optimizer.
        """
        where = f"{OWNER}: restart file {str(self.restart)!r}"
        try:
            state = torch.load(str(self.restart), weights_only=True)
            x, placed = (saved_tensor(where, state, name, tuple(self._x.shape)) for name in ("x", "placed"))
            if _orig_cell(self.atoms) is not None:
                target: Any = self.atoms
                target.orig_cell = saved_tensor(where, state, "orig_cell", (3, 3)).numpy()
            self.optex.load_state_dict(saved_entry(where, state, "optex"))
        except Exception as error:
            reason = str(error).partition("\n")[0]  # torch's own advice follows
            raise RestartError(
                f"{where} cannot be resumed from ({reason}); delete it, or name another one, to start afresh"
            ) from error
        self._placed = placed.numpy()
        self._move_parameter(x.numpy())


class Measured(Optimizable):
    """What ASE's loop sees: the atoms, whose energy and forces come from rounds."""

    def __init__(self, owner: OptExOptimizer, inner: Optimizable) -> None:
        self._owner = owner
        self.inner: Optimizable = inner

    def ndofs(self) -> int:
        return self.inner.ndofs()

    def get_x(self) -> npt.NDArray[np.float64]:  # [d]
        return self.inner.get_x()

    def set_x(
        self,
        x: npt.NDArray[np.float64],  # [d]
    ) -> None:
        self.inner.set_x(x)

    def get_gradient(self) -> npt.NDArray[np.float64]:  # [d]  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._owner.measured().gradient.copy()

    def get_value(self) -> float:
        return self._owner.measured().value

    def iterimages(self) -> Any:
        return self.inner.iterimages()

    def gradient_norm(
        self,
        gradient: npt.NDArray[np.float64],  # [d]
    ) -> float:
        return self.inner.gradient_norm(gradient)


def _orig_cell(target: Any) -> Tensor | None:  # [3, 3]
    """The reference cell of a cell filter's coordinates, in Å; None where there is none."""
    found = getattr(target, "orig_cell", None) if isinstance(target, Filter) else None
    return None if found is None else torch.tensor(np.asarray(found, dtype=float))
