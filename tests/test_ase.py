"""optex.ase: the loop in full as its twin, ASE's contract, and every way to call it wrongly."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.cluster import Icosahedron, Octahedron
from ase.constraints import FixAtoms, FixCartesian, FixedPlane
from ase.filters import FrechetCellFilter, StrainFilter, UnitCellFilter
from ase.io import Trajectory
from ase.io.trajectory import TrajectoryReader
from ase.mep import NEB
from ase.optimize import BFGS
from ase.optimize.optimize import RestartError

import optex
from optex.ase import OptExOptimizer


def copper() -> Atoms:
    return Icosahedron("Cu", 2)


def gold() -> Atoms:
    return Octahedron("Au", 3)


def vacancy() -> Atoms:
    atoms = bulk("Pt", cubic=True) * (2, 2, 2)
    del atoms[0]
    return atoms


def adsorbate() -> Atoms:
    atoms = fcc111("Pt", (2, 2, 3), vacuum=6.0)
    add_adsorbate(atoms, "O", height=1.3, position="fcc")
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() > 1))
    return atoms


SYSTEMS = [copper, gold, vacancy, adsorbate]


def rattled(make: Callable[[], Atoms] = copper, calculator: Any = None, seed: int = 3) -> Atoms:
    atoms = make()
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT() if calculator is None else calculator
    return atoms


def relaxer(atoms: Any, **settings: Any) -> OptExOptimizer:
    return OptExOptimizer(atoms, **{"logfile": None, **settings})


def plain(atoms: Any, **settings: Any) -> OptExOptimizer:
    return relaxer(atoms, parallelism=1, stride=1, **settings)


def largest_force(atoms: Any) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


class Counting(EMT):
    """Counts its calculations, and fails at those that are named."""

    def __init__(self, fail_at: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.calls = 0
        self.fail_at = fail_at

    def calculate(self, *args: Any, **options: Any) -> None:
        self.calls += 1
        if self.calls in self.fail_at:
            raise RuntimeError("the cluster is down")
        super().calculate(*args, **options)


class Pairs(Calculator):
    """Lennard-Jones between all pairs: unlike EMT it has no list of neighbours, whose age sums depend on."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012  (ASE's way to say it)

    def calculate(self, *args: Any, **options: Any) -> None:
        super().calculate(*args, **options)
        assert self.atoms is not None
        gaps = self.atoms.positions[:, None] - self.atoms.positions  # [n, n, 3]
        squares = (gaps**2).sum(2)
        np.fill_diagonal(squares, np.inf)
        sixth = (2.55**2 / squares) ** 3
        self.results["energy"] = 0.2 * float((sixth**2 - 2 * sixth).sum())
        slopes = 4.8 * (sixth**2 - sixth) / squares
        self.results["forces"] = (slopes[:, :, None] * gaps).sum(1)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("make", SYSTEMS)
def test_converges_in_far_fewer_rounds_than_the_plain_optimizer(make: Callable[[], Atoms]) -> None:
    atoms, reference = rattled(make), rattled(make)
    fast = relaxer(atoms)
    assert fast.run(fmax=0.01, steps=100)
    assert not plain(rattled(make)).run(fmax=0.01, steps=2 * fast.rounds)
    BFGS(reference, logfile=None).run(fmax=0.005, steps=300)
    assert largest_force(atoms) < 0.01
    assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=2e-3)


@pytest.mark.parametrize("make", SYSTEMS)
def test_one_image_a_round_with_strides_takes_fewer_calls_than_the_plain_optimizer(
    make: Callable[[], Atoms],
) -> None:
    atoms = rattled(make)
    ahead = relaxer(atoms, parallelism=1)
    assert ahead.run(fmax=0.01, steps=100)
    assert ahead.force_calls == ahead.rounds < ahead.optex.steps_taken
    assert not plain(rattled(make)).run(fmax=0.01, steps=ahead.rounds)


def literal_run(
    atoms: Atoms, make: Callable[..., torch.optim.Optimizer], maxstep: float, steps: int
) -> list[Any]:
    """Positions at every step of the base optimizer, no step longer than ``maxstep`` for any atom."""
    x = torch.nn.Parameter(torch.from_numpy(atoms.get_positions().ravel()))
    base, positions = make([x]), []
    for _ in range(steps):
        atoms.set_positions(x.detach().numpy().reshape(-1, 3))
        positions.append(atoms.get_positions())
        before = x.detach().clone()
        x.grad = torch.from_numpy(-atoms.get_forces().ravel())
        base.step()
        moved = x.detach() - before
        longest = moved.reshape(-1, 3).norm(dim=1).max().item()
        if longest > maxstep:
            with torch.no_grad():
                x.copy_(before + moved * (maxstep / longest))
    return positions


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("momentum", partial(torch.optim.SGD, lr=0.012, momentum=0.8)),
        ("adam", partial(torch.optim.Adam, lr=0.01)),
        (torch.optim.NAdam, torch.optim.NAdam),
    ],
)
@pytest.mark.parametrize("maxstep", [0.2, 0.01])
def test_one_image_a_round_is_the_base_optimizer_bit_for_bit(name: Any, make: Any, maxstep: float) -> None:
    expected = literal_run(rattled(), make, maxstep, 12)
    atoms, seen = rattled(), []
    optimizer = plain(atoms, optimizer=name, maxstep=maxstep)
    optimizer.attach(lambda: seen.append(atoms.get_positions()))
    optimizer.run(fmax=0.0, steps=11)
    np.testing.assert_array_equal(seen, expected)
    moved = np.linalg.norm(np.diff(expected, axis=0), axis=2)
    assert moved.max() <= maxstep * (1 + 1e-12)


def test_tolerance_of_zero_follows_the_base_optimizer_bit_for_bit() -> None:
    atoms = rattled(calculator=Pairs())
    fast = relaxer(atoms, acceptance=optex.WithinTolerance(0))
    fast.run(fmax=0.0, steps=12)
    taken = fast.optex.steps_taken
    assert taken >= 12
    # The last round has been measured but its steps are not shown, so its start is where the atoms are.
    last = fast.last_report
    assert last is not None
    again = rattled(calculator=Pairs())
    plain(again).run(fmax=0.0, steps=taken - last.accepted)
    np.testing.assert_array_equal(atoms.get_positions(), again.get_positions())


@pytest.mark.parametrize("name", ["nesterov", "adam"])
def test_named_optimizers_relax(name: str) -> None:
    atoms = rattled()
    assert relaxer(atoms, optimizer=name).run(fmax=0.05, steps=200)
    assert largest_force(atoms) < 0.05


def test_counts_are_those_of_the_calculator() -> None:
    calculator = Counting()
    atoms = rattled(calculator=calculator)
    optimizer = relaxer(atoms)
    seen = []
    optimizer.attach(lambda: seen.append((optimizer.rounds, calculator.calls)))
    assert optimizer.run(fmax=0.01, steps=100)
    assert optimizer.force_calls == calculator.calls
    assert optimizer.rounds < optimizer.force_calls <= 4 * optimizer.rounds
    # One entry a round, and one for the end if that is another image of the last round.
    assert len(seen) in (optimizer.rounds, optimizer.rounds + 1)
    # The calculator has just computed the end: its energy and forces cost nothing.
    before = calculator.calls
    atoms.get_potential_energy()
    assert largest_force(atoms) < 0.01
    assert calculator.calls == before


def test_the_end_is_no_higher_than_the_last_start() -> None:
    atoms, energies = rattled(), []
    optimizer = relaxer(atoms, parallelism=8)
    optimizer.attach(lambda: energies.append(atoms.get_potential_energy()))
    assert optimizer.run(fmax=0.03, steps=100)
    assert energies[-1] <= energies[-2]


def test_goes_on_where_it_stopped() -> None:
    whole, parts = rattled(), rattled()
    relaxer(whole).run(fmax=0.0, steps=8)
    optimizer = relaxer(parts)
    for _ in range(8):
        assert not optimizer.run(fmax=0.0, steps=1)
    np.testing.assert_array_equal(parts.get_positions(), whole.get_positions())
    assert (optimizer.rounds, optimizer.nsteps) == (9, 8)


def test_a_converged_run_goes_on_to_smaller_forces() -> None:
    atoms = rattled()
    optimizer = relaxer(atoms)
    assert optimizer.run(fmax=0.1, steps=100)
    calls = optimizer.force_calls
    assert optimizer.run(fmax=0.1, steps=100)  # known already
    assert optimizer.force_calls == calls
    assert optimizer.run(fmax=0.005, steps=100)
    assert largest_force(atoms) < 0.005


def test_irun_yields_once_a_round() -> None:
    optimizer = relaxer(rattled())
    answers = [bool(converged) for converged in optimizer.irun(fmax=0.02, steps=100)]
    assert answers == [False] * optimizer.nsteps + [True]


def test_atoms_moved_between_runs_are_taken_where_they_are() -> None:
    atoms = rattled()
    optimizer = relaxer(atoms)
    optimizer.run(fmax=0.01, steps=100)
    atoms.rattle(0.05, seed=9)
    there = atoms.get_positions()
    seen: list[Any] = []
    optimizer.attach(lambda: seen.append(atoms.get_positions()))
    run = optimizer.irun(fmax=0.01, steps=100)
    assert not next(run)
    np.testing.assert_array_equal(atoms.get_positions(), there)
    assert list(run)[-1]
    assert largest_force(atoms) < 0.01


def test_a_calculator_set_after_the_optimizer_is_used() -> None:
    atoms = rattled()
    atoms.calc = None
    optimizer = relaxer(atoms)
    atoms.calc = EMT()
    assert optimizer.run(fmax=0.05, steps=100)


# ---------------------------------------------------------------------- constraints and cells


@pytest.mark.parametrize(
    "constraint",
    [FixAtoms([0, 5]), FixCartesian(2, (True, False, True)), FixedPlane(3, (1, 0, 0))],
    ids=lambda constraint: type(constraint).__name__,
)
def test_constraints_hold_exactly(constraint: Any) -> None:
    atoms = copper()
    atoms.rattle(0.1, seed=3)
    atoms.set_constraint(constraint)
    atoms.calc = EMT()
    start = atoms.get_positions()
    optimizer = relaxer(atoms)
    optimizer.attach(lambda: held(atoms, start, constraint))
    assert optimizer.run(fmax=0.02, steps=100)
    held(atoms, start, constraint)
    assert np.abs(atoms.get_positions() - start).max() > 0.05


def held(atoms: Atoms, start: np.ndarray, constraint: Any) -> None:
    moved = atoms.get_positions() - start
    if isinstance(constraint, FixAtoms):
        assert not moved[constraint.index].any()
    elif isinstance(constraint, FixCartesian):
        assert not moved[2, [0, 2]].any()
    else:
        assert abs(moved[3, 0]) < 1e-12


def test_forces_of_fixed_atoms_reach_observers_whole() -> None:
    atoms = rattled(adsorbate)
    fixed = atoms.constraints[0].index
    optimizer, seen = relaxer(atoms), []
    optimizer.attach(lambda: seen.append((atoms.get_forces(), atoms.get_forces(apply_constraint=False))))
    optimizer.run(fmax=0.05, steps=2)
    assert len(seen) >= 2
    for constrained, raw in seen:
        assert not constrained[fixed].any()
        assert np.abs(raw[fixed]).max() > 0.01


@pytest.mark.parametrize("kind", [FrechetCellFilter, UnitCellFilter])
def test_cells_relax(kind: Any) -> None:
    def strained() -> Atoms:
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell.array * 1.04, scale_atoms=True)
        atoms.rattle(0.03, seed=1)
        atoms.calc = EMT()
        return atoms

    atoms, reference = strained(), strained()
    fast, slow = relaxer(kind(atoms), lr=0.005), plain(kind(strained()), lr=0.005)
    assert fast.run(fmax=0.005, steps=100)
    assert not slow.run(fmax=0.005, steps=2 * fast.rounds)
    BFGS(kind(reference), logfile=None).run(fmax=1e-4)
    assert atoms.cell.volume == pytest.approx(reference.cell.volume, rel=2e-3)
    assert np.abs(atoms.get_stress()).max() < 2e-3


def test_strain_alone_relaxes() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array * 1.03, scale_atoms=True)
    atoms.calc = EMT()
    assert relaxer(StrainFilter(atoms), lr=0.002).run(fmax=0.01, steps=200)
    assert np.abs(atoms.get_stress()).max() < 1e-3


# ---------------------------------------------------------------------- workers


@pytest.mark.parametrize(("make", "workers"), [(adsorbate, "threads"), (adsorbate, "map"), (copper, 2)])
def test_workers_change_nothing(make: Callable[[], Atoms], workers: Any) -> None:
    alone, shared = rattled(make, Pairs()), rattled(make, Pairs())
    sequential = relaxer(alone)
    sequential.run(fmax=0.0, steps=6)
    with ThreadPoolExecutor(3) as threads:
        chosen = {"threads": threads, "map": lambda *task: list(map(*task))}.get(workers, workers)
        with relaxer(shared, workers=chosen) as optimizer:
            optimizer.run(fmax=0.0, steps=6)
            assert optimizer.last_report is not None
            assert not optimizer.last_report.lost
    np.testing.assert_array_equal(shared.get_positions(), alone.get_positions())
    assert (optimizer.rounds, optimizer.force_calls) == (sequential.rounds, sequential.force_calls)


def test_a_lost_image_costs_nothing_but_itself() -> None:
    atoms, lost = rattled(calculator=Counting(fail_at=(4, 5, 6))), []  # once more than it is tried again
    with ThreadPoolExecutor(1) as threads:
        optimizer = relaxer(atoms, workers=threads)
        optimizer.attach(lambda: lost.extend(optimizer.last_report.lost if optimizer.last_report else ()))
        assert optimizer.run(fmax=0.02, steps=100)
    assert len(lost) == 1
    assert largest_force(atoms) < 0.02


def test_a_calculator_that_cannot_be_copied_is_named() -> None:
    calculator = Pairs()
    calculator.lock = threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]
    atoms = rattled(calculator=calculator)
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        relaxer(atoms, workers=lambda *task: list(map(*task))).run()
    assert caught.value.__notes__[-1].endswith("sent to workers, is the calculator, Pairs")


def test_a_calculator_that_fails_leaves_the_atoms_at_the_start_of_the_round() -> None:
    whole, starts = rattled(), []
    undisturbed = relaxer(whole)
    undisturbed.attach(lambda: starts.append(whole.get_positions()))
    undisturbed.run(fmax=0.01, steps=100)
    atoms = rattled(calculator=Counting(fail_at=(10,)))
    optimizer, seen = relaxer(atoms), []
    optimizer.attach(lambda: seen.append(atoms.get_positions()))
    with pytest.raises(RuntimeError, match="cluster is down"):
        optimizer.run(fmax=0.01, steps=100)
    assert len(seen) > 1
    # A start is shown once it is measured: the failed round's is the next that would have been.
    np.testing.assert_allclose(atoms.get_positions(), starts[len(seen)], rtol=0, atol=1e-9)
    assert isinstance(atoms.calc, Counting)
    assert optimizer.run(fmax=0.01, steps=100)  # the next try works


# ---------------------------------------------------------------------- what ASE users expect


def written_to(path: Path) -> list[Any]:
    """All images of a trajectory."""
    with Trajectory(str(path)) as reader:
        assert isinstance(reader, TrajectoryReader)
        return list(reader)


def test_trajectory_has_what_was_measured(tmp_path: Path) -> None:
    calculator = Counting()
    atoms = rattled(calculator=calculator)
    path = tmp_path / "run.traj"
    with relaxer(atoms, trajectory=str(path)) as optimizer:
        assert optimizer.run(fmax=0.02, steps=100)
    assert calculator.calls == optimizer.force_calls
    images = written_to(path)
    assert len(images) == optimizer.nsteps + 1
    for image in images:
        fresh = image.copy()
        fresh.calc = EMT()
        assert image.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(image.get_forces(), fresh.get_forces(), atol=1e-10)
    np.testing.assert_array_equal(images[-1].positions, atoms.positions)
    assert largest_force(images[-1]) < 0.02


def test_trajectory_of_a_cell_has_stress(tmp_path: Path) -> None:
    atoms = bulk("Cu", a=3.7, cubic=True)
    atoms.calc = EMT()
    path = tmp_path / "cell.traj"
    relaxer(FrechetCellFilter(atoms), trajectory=str(path), lr=0.005).run(fmax=0.05, steps=30)
    first = written_to(path)[0]
    fresh = first.copy()
    fresh.calc = EMT()
    np.testing.assert_allclose(first.get_stress(), fresh.get_stress(), atol=1e-12)


def test_logfile_reads_as_ases(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    atoms = rattled()
    optimizer = relaxer(atoms, logfile=str(log))
    optimizer.run(fmax=0.02, steps=100)
    head, *lines = log.read_text().splitlines()
    assert head.split() == ["Step", "Time", "Energy", "fmax"]
    assert len(lines) == optimizer.nsteps + 1
    name, step, _, energy, fmax = lines[-1].split()
    assert (name, int(step)) == ("OptExOptimizer:", optimizer.nsteps)
    assert float(energy) == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert float(fmax) == pytest.approx(largest_force(atoms), abs=1e-6)


def test_atoms_keep_their_calculator() -> None:
    atoms = rattled()
    calculator = atoms.calc
    optimizer = relaxer(atoms)
    optimizer.run(fmax=0.05, steps=3)
    assert atoms.calc is calculator


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_restart_is_the_same_run_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    def run(atoms: Atoms, steps: int, restart: Path | None) -> OptExOptimizer:
        result = relaxer(atoms, optimizer=optimizer, restart=restart)
        result.run(fmax=0.0, steps=steps)
        return result

    whole = rattled(calculator=Pairs())
    run(whole, 11, None)
    atoms = rattled(calculator=Pairs())
    file = tmp_path / "run.pt"
    run(atoms, 5, file)
    again = atoms.copy()
    again.calc = Pairs()
    run(again, 6, file)
    np.testing.assert_array_equal(again.get_positions(), whole.get_positions())
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_restart_of_a_cell_goes_on_in_the_same_coordinates(tmp_path: Path) -> None:
    def cell() -> Atoms:
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell.array * 1.04, scale_atoms=True)
        atoms.calc = EMT()
        return atoms

    whole, atoms, file = cell(), cell(), tmp_path / "cell.pt"
    relaxer(FrechetCellFilter(whole), lr=0.005).run(fmax=0.0, steps=8)
    relaxer(FrechetCellFilter(atoms), lr=0.005, restart=file).run(fmax=0.0, steps=4)
    again = atoms.copy()
    again.calc = EMT()
    relaxer(FrechetCellFilter(again), restart=file).run(fmax=0.0, steps=4)
    np.testing.assert_allclose(again.cell.array, whole.cell.array, rtol=0, atol=1e-9)


@pytest.mark.parametrize("content", [b"", b"{}", "other"])
def test_broken_restart_files_are_refused_by_name(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "run.pt"
    if content == "other":
        relaxer(rattled(gold), restart=file).run(fmax=0.0, steps=1)
    else:
        assert isinstance(content, bytes)
        file.write_bytes(content)
    with pytest.raises(RestartError, match=r"OptExOptimizer: restart file .*run\.pt.* delete it"):
        relaxer(rattled(), restart=file)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "bfgs"}, "OptExOptimizer: optimizer: 'bfgs' is not one of sgd, momentum"),
        ({"optimizer": 3}, "OptExOptimizer: optimizer must be a name or a function .* got int"),
        ({"optimizer": lambda x: x}, "OptExOptimizer: optimizer must return a torch.optim.Optimizer, got list"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS cannot be the base"),
        ({"lr": -0.1}, "OptExOptimizer: lr must be a positive number, in Å²/eV for momentum, got -0.1"),
        ({"maxstep": 0}, "OptExOptimizer: maxstep must be a distance in Å above 0 and up to 1, got 0"),
        ({"maxstep": 3.0}, "maxstep must be .* got 3.0; 0.2 is ASE's default"),
        ({"maxstep": "far"}, "maxstep must be .* got 'far'"),
        ({"stride": 0.5}, "stride must be 'auto' or a finite number of at least 1, got 0.5"),
        ({"parallelism": 0}, "parallelism must be an integer of at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, or -1 for all cores, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        relaxer(rattled(), **settings)


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    other = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="must be built over the list that it is handed"):
        relaxer(rattled(), optimizer=lambda _: torch.optim.SGD([other]))


def test_atoms_without_a_calculator_are_refused_at_the_run() -> None:
    optimizer = relaxer(copper())
    with pytest.raises(ValueError, match=r"OptExOptimizer: atoms have no calculator; set atoms\.calc"):
        optimizer.run()


@pytest.mark.parametrize(
    "atoms",
    [3, NEB([copper(), copper(), copper()], method="improvedtangent"), Atoms()],
    ids=["number", "band", "none"],
)
def test_what_is_not_atoms_is_refused(atoms: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="OptExOptimizer: atoms "):
        relaxer(atoms)


def test_forces_that_are_not_finite_end_the_run() -> None:
    class Broken(EMT):
        def calculate(self, *args: Any, **options: Any) -> None:
            super().calculate(*args, **options)
            self.results["energy"] = self.results["free_energy"] = float("nan")

    with pytest.raises(optex.NonFiniteError, match="loss"):
        relaxer(rattled(calculator=Broken())).run()


def test_without_ase_the_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["optex", "ase"]]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("ase.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ase", None)
    with pytest.raises(
        ImportError, match=r"optex\.ase needs ASE, 3\.27 or later .* pip install 'optex\[ase\]'"
    ):
        importlib.import_module("optex.ase")


def test_an_ase_whose_gradients_are_forces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[:2] == ["optex", "ase"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "3.26.0")
    with pytest.raises(ImportError, match=r"needs ASE, 3\.27 or later, and this is 3\.26\.0: pip install"):
        importlib.import_module("optex.ase")


def test_nothing_else_imports_ase() -> None:
    package = Path(optex.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name != "ase":
            assert not re.search(r"^\s*(from|import) (optex\.)?ase\b", path.read_text(), re.MULTILINE), path
