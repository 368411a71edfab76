"""Gradients in workers: the sequential evaluator's run, to the bit, whoever computes it and whatever breaks."""

from __future__ import annotations

import copy
import faulthandler
import functools
import gc
import importlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import rosen, rosen_der
from torch import Tensor, nn

import optex
from optex import OptEx, WithinTolerance, WorkerLostError, WorkersEvaluator
from optex.evaluators.workers import foresight, process_pool
from optex.evaluators.workers import objective as objectives
from optex.sources import ObjectiveSource
from optex.stepping.parameters import ParameterVector
from tests.models import network, regression_batches, request, same, snapshot, weight_of

START = [-1.2, 1.0, 0.7]
forkserver = multiprocessing.get_context("forkserver")


def rosen_with_gradient(x: np.ndarray, scale: float = 1.0) -> tuple[float, np.ndarray]:
    return scale * rosen(x), scale * rosen_der(x)


def torch_rosen(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


class SquaredError:
    """An objective with its model, as one picklable thing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, batch: Any) -> Tensor:
        return (self.model(batch[0]) - batch[1]).square().mean()


def processes_of(evaluator: WorkersEvaluator) -> list[BaseProcess]:
    """Those that compute for this evaluator; several may run, and nothing public tells them apart."""
    pool = evaluator._pool
    assert isinstance(pool, process_pool.ProcessPool)
    return [worker.process for worker in pool._workers]


def same_result(ours: Any, theirs: Any) -> None:
    np.testing.assert_array_equal(ours.x, theirs.x)
    np.testing.assert_array_equal(ours.jac, theirs.jac)
    assert (ours.fun, ours.nit, ours.nstep, ours.nfev) == (theirs.fun, theirs.nit, theirs.nstep, theirs.nfev)


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkersEvaluator]:
    with WorkersEvaluator(2) as evaluator:
        yield evaluator


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, forkserver) as executor:
        yield executor


# ---------------------------------------------------------------------- whoever computes


def in_turn(function: Callable[..., Any], items: Any) -> Iterator[Any]:
    return map(function, items)


def check_minimize(workers: Any) -> None:
    """A given gradient, an argument, autograd: each run is that without workers."""
    options: dict[str, Any] = {"lr": 0.01, "maxiter": 8, "parallelism": 5}
    same_result(
        optex.minimize(rosen_with_gradient, START, (0.5,), jac=True, workers=workers, **options),
        optex.minimize(rosen_with_gradient, START, (0.5,), jac=True, **options),
    )
    start = torch.tensor(START, dtype=torch.float32)
    ours = optex.minimize(lambda x: torch_rosen(x), start, workers=workers, **options)
    theirs = optex.minimize(torch_rosen, start, **options)
    assert torch.equal(ours.x, theirs.x)
    assert ours.fun == theirs.fun


def test_our_own_processes() -> None:
    check_minimize(2)
    assert not [child for child in multiprocessing.active_children() if child.name == "optex-worker"]


@pytest.mark.parametrize("workers", [1, map, in_turn])
def test_one_process_or_none(workers: Any) -> None:
    check_minimize(workers)


def test_thread_pool() -> None:
    with ThreadPoolExecutor(3) as executor:
        check_minimize(executor)
        assert executor.submit(abs, -1).result() == 1  # the caller's pool is left open


def test_map_of_threads() -> None:
    with ThreadPool(3) as threads:
        check_minimize(threads.map)


def test_threads_share_the_function() -> None:
    met, lock = set(), threading.Lock()  # a lock cannot be copied or pickled
    barrier = threading.Barrier(3, timeout=60)

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        if x[0] != START[0]:  # the first round has one point
            barrier.wait()
        with lock:
            met.add(threading.get_ident())
        return rosen_with_gradient(x)

    with ThreadPoolExecutor(3) as executor:
        ours = optex.minimize(fun, START, jac=True, lr=0.01, maxiter=6, parallelism=3, workers=executor)
    assert len(met) == 3
    theirs = optex.minimize(rosen_with_gradient, START, jac=True, lr=0.01, maxiter=6, parallelism=3)
    np.testing.assert_array_equal(ours.x, theirs.x)


def test_process_pool(pool: ProcessPoolExecutor) -> None:
    check_minimize(pool)


def test_map_of_processes() -> None:
    with forkserver.Pool(2) as processes:
        check_minimize(processes.map)


def test_loky() -> None:
    loky = pytest.importorskip("loky")
    executor = loky.get_reusable_executor(2)
    check_minimize(executor)
    executor.shutdown(wait=True)


def test_dask() -> None:
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        check_minimize(client.get_executor())


def test_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves where other tests keep the cores busy
    from ray.util.multiprocessing import Pool

    root = str(Path(__file__).parents[1])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": root}},  # where the workers find this module
    )
    try:
        check_minimize(Pool(2).map)
    finally:
        ray.shutdown()


def test_mpi(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("no mpiexec: pip install mpich, or another MPI")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from mpi4py.futures import MPIPoolExecutor
        from scipy.optimize import rosen, rosen_der
        import optex

        if __name__ == "__main__":
            options = {"jac": rosen_der, "lr": 0.01, "maxiter": 8, "parallelism": 5}
            with MPIPoolExecutor() as executor:
                ours = optex.minimize(rosen, [-1.2, 1.0, 0.7], workers=executor, **options)
                ranks = executor.num_workers
            theirs = optex.minimize(rosen, [-1.2, 1.0, 0.7], **options)
            print(ranks, (ours.x == theirs.x).all(), ours.nfev == theirs.nfev)
        """)
    )
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True).stdout
    as_root = ["--allow-run-as-root", "--oversubscribe"] if "Open" in version else []
    command = [mpiexec, *as_root, "-n", "4", sys.executable, "-m", "mpi4py.futures", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["3", "True", "True"], ran.stderr


# ---------------------------------------------------------------------- models


def trained(
    make: Callable[[], nn.Module],
    batches: list[Any],
    evaluator: Any = None,
    *,
    tolerance: float = 2.0,
    objective: Callable[[nn.Module], Any] = SquaredError,
) -> tuple[list[Tensor], list[optex.RoundReport], Tensor]:
    """Parameters after a run, its reports, and where it left torch's generator."""
    model = make()
    optimizer = OptEx(
        torch.optim.Adam(model.parameters(), lr=0.02),
        evaluator=evaluator,
        acceptance=WithinTolerance(tolerance),
    )
    torch.manual_seed(5)
    reports = list(optimizer.rounds(batches, objective(model)))
    return snapshot(model), reports, torch.get_rng_state()


def same_run(ours: Any, theirs: Any) -> None:
    assert same(ours[0], theirs[0])
    assert [report.accepted for report in ours[1]] == [report.accepted for report in theirs[1]]
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine.losses, other.losses, rtol=0, atol=0)
    assert torch.equal(ours[2], theirs[2])


def dropout_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_models_in_processes(processes: WorkersEvaluator, dtype: torch.dtype) -> None:
    batches = regression_batches(13, dtype=dtype)
    make = functools.partial(network, dtype=dtype)
    same_run(trained(make, batches, processes), trained(make, batches))


def test_models_in_threads() -> None:
    batches = regression_batches(13)
    with ThreadPoolExecutor(3) as executor, WorkersEvaluator(executor) as evaluator:
        same_run(trained(network, batches, evaluator), trained(network, batches))


def test_models_in_the_processes_of_an_executor(pool: ProcessPoolExecutor) -> None:
    batches = regression_batches(13)
    with WorkersEvaluator(pool) as evaluator:
        same_run(trained(dropout_network, batches, evaluator), trained(dropout_network, batches))


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
@pytest.mark.parametrize("sizes", [[8] * 17, [8, 3, 8, 8, 1, 5, 8, 8, 2, 8, 8, 8, 7]])
def test_dropout_draws_what_it_would_in_turn(
    processes: WorkersEvaluator, sizes: list[int], tolerance: float
) -> None:
    batches = [regression_batches(1, seed, size)[0] for seed, size in enumerate(sizes)]
    ours, theirs = (
        trained(dropout_network, batches, evaluator, tolerance=tolerance) for evaluator in (processes, None)
    )
    same_run(ours, theirs)
    assert not torch.equal(ours[2], torch.Generator().manual_seed(5).get_state())  # it did draw


def test_draws_are_foreseen(processes: WorkersEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = dropout_network(), regression_batches(4)
    vector, source = ParameterVector(model.parameters()), ObjectiveSource(SquaredError(model))
    points = vector.read().expand(4, -1)
    evaluator = WorkersEvaluator(in_turn)
    calls = []
    monkeypatch.setattr(
        evaluator._pool, "run", lambda *args, run=evaluator._pool.run: calls.append(1) or run(*args)
    )
    for _ in range(2):
        evaluator.evaluate(request(source, vector, points, batches))
    assert len(calls) == 2 + 1  # only the very first round had to find out how much is drawn


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["rand", "bernoulli", "randperm", "random"]), st.integers(1, 3000)),
        max_size=5,
    ),
    st.integers(0, 9),
)
def test_draws_between_two_states_of_the_generator(drawn: list[tuple[str, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = generator.get_state()
    for kind, count in drawn:
        {
            "rand": lambda n: torch.rand(n, generator=generator),
            "bernoulli": lambda n: torch.empty(n).bernoulli_(0.3, generator=generator),
            "randperm": lambda n: torch.randperm(n, generator=generator),
            "random": lambda n: torch.empty(n, dtype=torch.int32).random_(generator=generator),
        }[kind](count)
    end = generator.get_state()
    count = foresight._draws_between(start, end)
    assert count is not None
    assert torch.equal(foresight._advanced(start, count), end)


def test_draws_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "_MOST_DRAWS", 10_000)
    seeded = [torch.Generator().manual_seed(seed).get_state() for seed in (0, 1)]
    assert foresight._draws_between(*seeded) is None


def test_normal_draws_that_cannot_be_foreseen(processes: WorkersEvaluator) -> None:
    def noisy(model: nn.Module) -> Any:
        error = SquaredError(model)
        return lambda batch: error(batch) * (1 + 0.1 * torch.randn(()))  # keeps a spare number for later

    batches = regression_batches(9)
    ours, theirs = (trained(network, batches, evaluator, objective=noisy) for evaluator in (processes, None))
    same_run(ours, theirs)


def test_random_draws_are_refused_in_threads() -> None:
    with (
        ThreadPoolExecutor(3) as executor,
        pytest.raises(ValueError, match=r"draws random numbers .*in threads; use processes"),
    ):
        trained(dropout_network, regression_batches(5), WorkersEvaluator(executor))


def test_a_closure_and_its_optimizer(processes: WorkersEvaluator) -> None:
    def run(evaluator: Any) -> list[Tensor]:
        model, (batch,) = network(), regression_batches(1)
        optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=0.02), evaluator=evaluator)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(batch[0]) - batch[1]).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
        return snapshot(model)

    assert same(run(processes), run(None))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tokens of the objectives made from now on."""
    made: list[str] = []
    plain = objectives.SharedObjective.__init__

    def counting(self: Any, *args: Any) -> None:
        plain(self, *args)
        made.append(self.token)

    monkeypatch.setattr(objectives.SharedObjective, "__init__", counting)
    return made


def test_objective_is_sent_again_when_it_has_changed(
    processes: WorkersEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)

    def run(evaluator: Any) -> list[Tensor]:
        model = dropout_network()
        weight = weight_of(model[2])
        weight.requires_grad_(False)
        optimizer = OptEx(
            torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02), evaluator=evaluator
        )
        torch.manual_seed(5)
        objective = SquaredError(model)
        for number, _ in enumerate(optimizer.rounds(regression_batches(30), objective)):
            if number == 1:
                model.eval()
            if number == 3:
                with torch.no_grad():
                    weight.mul_(2)
        return snapshot(model)

    assert same(run(processes), run(None))
    assert len(made) == 3


def test_batch_norm_is_refused(processes: WorkersEvaluator) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()

    with pytest.raises(ValueError, match=r"BatchNorm1d .* updates buffers.*use torch.nn.GroupNorm"):
        trained(normed, regression_batches(5), processes)
    trained(lambda: normed().eval(), regression_batches(5), processes)


def test_default_dtype_is_that_of_the_caller(processes: WorkersEvaluator) -> None:
    def objective(model: nn.Module) -> Any:
        return lambda batch: (model(batch[0]) - torch.tensor(0.1)).square().mean()

    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = (
            trained(network, regression_batches(5), evaluator, objective=objective)
            for evaluator in (processes, None)
        )
    finally:
        torch.set_default_dtype(torch.float32)
    same_run(ours, theirs)


def test_threads_of_workers(pool: ProcessPoolExecutor) -> None:
    def threads(x: Tensor) -> Tensor:
        return (x * 0).sum() + torch.get_num_threads()

    for evaluator, expected in ((WorkersEvaluator(2, threads=3), 3), (WorkersEvaluator(pool, threads=2), 2)):
        with evaluator:
            assert optex.minimize(threads, [1.0], evaluator=evaluator, maxiter=1).fun == expected
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("workers", [2, in_turn])
def test_threads_of_the_program_take_turns(workers: Any) -> None:
    scales, options = (0.5, 1.0), {"jac": True, "lr": 0.01, "maxiter": 6, "parallelism": 4}
    theirs = [optex.minimize(rosen_with_gradient, START, (scale,), **options) for scale in scales]
    together = threading.Barrier(2)

    def run(scale: float) -> Any:
        together.wait(60)
        return optex.minimize(rosen_with_gradient, START, (scale,), evaluator=evaluator, **options)

    with WorkersEvaluator(workers) as evaluator, ThreadPoolExecutor(2) as threads:
        for ours, other in zip(threads.map(run, scales), theirs, strict=True):
            same_result(ours, other)


def test_closing_waits_for_the_evaluation_under_way() -> None:
    begun, order = threading.Event(), []

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        begun.set()
        time.sleep(0.3)
        order.append("evaluated")
        return rosen_with_gradient(x)

    evaluator = WorkersEvaluator(in_turn)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(optex.minimize, fun, START, jac=True, maxiter=1, evaluator=evaluator)
        assert begun.wait(60)
        evaluator.close()
        assert order == ["evaluated"]
        assert future.result().nit == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda evaluator: pickle.loads(pickle.dumps(evaluator))])
def test_a_copy_has_processes_of_its_own(processes: WorkersEvaluator, copied: Any) -> None:
    options: dict[str, Any] = {"jac": rosen_der, "lr": 0.01, "maxiter": 3}
    optex.minimize(rosen, START, evaluator=processes, **options)  # so that there is something not to be copied
    others = {process.pid for process in processes_of(processes)}
    with copied(processes) as evaluator:
        same_result(
            optex.minimize(rosen, START, evaluator=evaluator, **options),
            optex.minimize(rosen, START, **options),
        )
        running = processes_of(evaluator)
        assert len(running) == 2
        assert not others & {process.pid for process in running}
        evaluator.close()
        assert not any(process.is_alive() for process in running)
    assert len(processes_of(processes)) == 2
    assert all(process.is_alive() for process in processes_of(processes))


def test_a_generator_that_nothing_draws_from_is_left_alone(processes: WorkersEvaluator) -> None:
    model = network()
    vector, source = ParameterVector(model.parameters()), ObjectiveSource(SquaredError(model))
    batches = regression_batches(2)

    class Meanwhile(WorkersEvaluator):  # another thread draws while the workers evaluate
        def _run(self, *args: Any, **options: Any) -> Any:
            torch.rand(3)
            return super()._run(*args, **options)

    evaluator = Meanwhile(in_turn)
    torch.manual_seed(5)
    evaluator.evaluate(request(source, vector, vector.read().expand(2, -1), batches))
    found = torch.get_rng_state()
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(found, torch.get_rng_state())


# ---------------------------------------------------------------------- accidents


class Troubled(SquaredError):  # noqa: N818  (no exception)
    """Each batch has a folder; whoever evaluates it takes a file from it, if there is one, and fails."""

    def __call__(self, batch: Any) -> Tensor:
        x, y, folder, kind = batch
        for file in Path(folder).glob("*"):
            file.unlink()
            accident(kind)
            break
        return super().__call__((x, y))


def accident(kind: str) -> None:
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "ended":
        sys.exit(3)
    if kind == "hangs":
        time.sleep(600)
    raise KeyError("mesh")


def troubled_batches(folder: Path, count: int, kind: str, accidents: dict[int, int]) -> list[Any]:
    """Batches of which some meet with accidents: {step: how many}."""
    batches = []
    for step, (x, y) in enumerate(regression_batches(count)):
        own = folder / str(step)
        own.mkdir()
        for number in range(accidents.get(step, 0)):
            (own / str(number)).touch()
        batches.append((x, y, str(own), kind))
    return batches


def trouble_left(folder: Path) -> int:
    return sum(1 for file in folder.glob("*/*"))


@pytest.mark.parametrize(("kind", "timeout"), [("killed", None), ("ended", 60), ("raises", None), ("hangs", 3)])
def test_an_accident_costs_a_second_try_and_nothing_else(
    tmp_path: Path, kind: str, timeout: float | None
) -> None:
    batches = troubled_batches(
        tmp_path, 15, kind, {0: 1, 6: 1} if kind == "hangs" else {0: 1, 5: 1, 6: 1, 11: 1}
    )
    with WorkersEvaluator(2, timeout=timeout) as evaluator:
        ours = trained(network, batches, evaluator, objective=Troubled)
    assert not trouble_left(tmp_path)
    same_run(ours, trained(network, regression_batches(15)))
    assert ours[1][0].retried[0] == 0
    assert sum(bool(report.retried) for report in ours[1]) >= 2
    assert not any(report.lost or report.dropped for report in ours[1])


@pytest.mark.parametrize("kind", ["killed", "raises"])
def test_a_point_lost_for_good_is_done_without(tmp_path: Path, kind: str) -> None:
    batches = troubled_batches(tmp_path, 15, kind, {6: 2})
    with WorkersEvaluator(2) as evaluator:
        ours = trained(network, batches, evaluator, tolerance=0.0, objective=Troubled)
    theirs = trained(network, regression_batches(15), tolerance=0.0)
    assert same(ours[0], theirs[0])
    (report,) = [report for report in ours[1] if report.lost]
    assert report.lost == (3,)  # step 6, drafted as the last of four
    assert set(report.retried) >= {3}
    assert report.losses.isnan().tolist() == [False, False, False, True]
    assert report.dropped == ()
    assert report.evaluated == 3


def test_an_error_of_the_objective_comes_through_with_its_traceback(tmp_path: Path) -> None:
    batches = troubled_batches(tmp_path, 5, "raises", {0: 10})
    model = network()
    before = snapshot(model)
    with WorkersEvaluator(2) as evaluator:
        optimizer = OptEx(torch.optim.Adam(model.parameters()), evaluator=evaluator)
        with pytest.raises(KeyError, match="mesh") as caught:
            next(optimizer.rounds(batches, Troubled(model)))
    assert 'raise KeyError("mesh")' in str(caught.value.__cause__)
    assert trouble_left(tmp_path) == 8  # tried twice, not for ever
    assert same(snapshot(model), before)


def test_a_round_without_its_start_leaves_everything_as_it_was(tmp_path: Path) -> None:
    batches = troubled_batches(tmp_path, 15, "killed", {4: 0})
    model = network()
    with WorkersEvaluator(2) as evaluator:
        optimizer = OptEx(
            torch.optim.Adam(model.parameters(), lr=0.02), evaluator=evaluator, acceptance=WithinTolerance(0)
        )
        rounds = optimizer.rounds(batches, Troubled(model))
        next(rounds)
        before = snapshot(model)
        for number in range(2):
            (tmp_path / "1" / str(number)).touch()  # the next round's start
        with pytest.raises(WorkerLostError, match=r"no gradient at the round's start.*exit code -9"):
            next(rounds)
        assert same(snapshot(model), before)
        left = itertools.islice(batches, 5, None)  # four were in hand, and wait
        for _ in optimizer.rounds(left, Troubled(model)):
            pass
    assert same(snapshot(model), trained(network, regression_batches(15), tolerance=0.0)[0])


def dies_beyond(x: np.ndarray, limit: float) -> tuple[float, np.ndarray]:
    if x[0] > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return float((x**2).sum() - 10 * x[0]), 2 * x - [10.0]


def test_minimize_keeps_what_it_has_when_workers_are_lost() -> None:
    result = optex.minimize(dies_beyond, [0.0], (1.0,), jac=True, lr=0.1, workers=2)
    assert (result.status, result.success) == (3, False)
    assert "no gradient at the round's start" in result.message
    assert 0.8 < result.x[0] <= 1.0
    assert result.fun == dies_beyond(result.x, 1.0)[0]
    with pytest.raises(WorkerLostError):
        optex.minimize(dies_beyond, [2.0], (1.0,), jac=True, workers=2)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End pytest, with a traceback, where the block hangs."""
    assert sys.__stderr__ is not None
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def large_round(evaluator: optex.Evaluator) -> Any:
    """Four points, on batches that no buffer of the operating system holds."""
    model = network()
    vector, source = ParameterVector(model.parameters()), ObjectiveSource(SquaredError(model))
    batches = [regression_batches(1, seed, 50_000)[0] for seed in range(4)]
    points = vector.read() + torch.arange(4)[:, None]
    return evaluator.evaluate(request(source, vector, points, batches))


@pytest.mark.parametrize("stopped", [1, 2])
@pytest.mark.parametrize("same_objective", [True, False])
def test_stopped_workers_are_replaced(
    stopped: int, same_objective: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if same_objective:
        monkeypatch.setattr(objectives.SharedObjective, "serves", lambda *args: True)
    expected = large_round(optex.SequentialEvaluator())
    with WorkersEvaluator(2, timeout=4) as evaluator:
        large_round(evaluator)
        for process in processes_of(evaluator)[:stopped]:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
        with within(120):
            found = large_round(evaluator)
        assert found.retried or (stopped, same_objective) == (1, False)  # the other one did all
    assert not found.lost
    assert torch.equal(found.gradients, expected.gradients)


def test_a_stopped_worker_does_not_keep_the_program(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, signal
        import optex
        from scipy.optimize import rosen, rosen_der

        if __name__ == "__main__":
            evaluator = optex.WorkersEvaluator(2)
            optex.minimize(rosen, [1.0, 2.0], jac=rosen_der, maxiter=3, evaluator=evaluator)
            for worker in evaluator._pool._workers:
                os.kill(worker.process.pid, signal.SIGSTOP)
        """)
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr


def test_a_start_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "_START_SECONDS", 2.0)
    with WorkersEvaluator(1) as evaluator:
        large_round(evaluator)  # the fork server runs
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGSTOP)
    try:
        with (
            within(120),
            pytest.raises(WorkerLostError, match=r"could not be started .*start within 2 sec"),
        ):
            large_round(WorkersEvaluator(2, timeout=1))
    finally:
        os.kill(server, signal.SIGCONT)


def slow_to_load() -> None:
    time.sleep(600)


class SlowToLoad:
    def __reduce__(self) -> Any:
        return slow_to_load, ()

    def __call__(self, x: Tensor) -> Tensor:
        return x.sum()


def test_an_objective_that_takes_too_long_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "_START_SECONDS", 2.0)
    with (
        WorkersEvaluator(2, timeout=1) as evaluator,
        within(120),
        pytest.raises(WorkerLostError, match="did not load the objective within 2 seconds"),
    ):
        optex.minimize(SlowToLoad(), [1.0], evaluator=evaluator)


def test_a_broken_executor(tmp_path: Path, pool: ProcessPoolExecutor) -> None:
    batches = troubled_batches(tmp_path, 9, "killed", {5: 1})
    with pytest.raises(WorkerLostError, match="rebuild= can make a new one"):
        trained(network, batches, WorkersEvaluator(pool), objective=Troubled)


def test_a_broken_executor_that_can_be_rebuilt(tmp_path: Path) -> None:
    made: list[Executor] = []

    def rebuild() -> Executor:
        made.append(ProcessPoolExecutor(2, forkserver))
        return made[-1]

    batches = troubled_batches(tmp_path, 9, "killed", {5: 1})
    with WorkersEvaluator(rebuild=rebuild) as evaluator:
        ours = trained(network, batches, evaluator, objective=Troubled)
    same_run(ours, trained(network, regression_batches(9)))
    assert len(made) == 2
    with pytest.raises(RuntimeError, match="shutdown"):
        made[-1].submit(abs, 1)


def test_a_thread_that_hangs() -> None:
    release, calls = threading.Event(), itertools.count()

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        if next(calls) == 6:
            release.wait(600)
        return rosen_with_gradient(x)

    options: dict[str, Any] = {"jac": True, "lr": 0.01, "maxiter": 5}
    first = ThreadPoolExecutor(4)
    evaluator = WorkersEvaluator(first, timeout=3, rebuild=lambda: ThreadPoolExecutor(4))
    try:
        with evaluator:
            ours = optex.minimize(fun, START, evaluator=evaluator, **options)
        same_result(ours, optex.minimize(rosen_with_gradient, START, **options))
    finally:
        release.set()
        first.shutdown()


def test_a_map_that_fails() -> None:
    def broken(function: Any, items: Any) -> Any:
        raise ConnectionError("head node")

    with pytest.raises(WorkerLostError, match="the map function failed") as caught:
        optex.minimize(rosen, START, jac=rosen_der, workers=broken)
    assert isinstance(caught.value.__cause__, ConnectionError)


def gone(group: int, within: float) -> bool:
    """Has every process of a group ended?"""
    for _ in range(int(within / 0.05)):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_interrupt_leaves_the_last_accepted_step_and_no_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import signal, time, torch, optex

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
        theta = torch.nn.Parameter(torch.full((3,), 2.0))

        def objective(batch):
            if batch == 6:
                time.sleep(600)
            return theta.square().sum()

        if __name__ == "__main__":
            optimizer = optex.OptEx(torch.optim.SGD([theta], lr=0.1), evaluator=optex.WorkersEvaluator(3))
            kept = theta.detach().clone()
            try:
                for report in optimizer.rounds(range(100), objective):
                    kept = theta.detach().clone()
                    print("round", report.number, flush=True)
            except KeyboardInterrupt:
                print("interrupted", torch.equal(kept, theta), flush=True)
        """)
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "round 0\n"
            time.sleep(1)  # into the round that would not end, as far as workers are concerned
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0
            assert output.splitlines()[-1] == "interrupted True"
            assert gone(process.pid, within=20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


ENDLESS = """
import os, re, signal, sys, time
from pathlib import Path
import torch, optex

for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # nohup, say, leaves it ignored

folder, theta = Path(sys.argv[1]), torch.nn.Parameter(torch.full((3,), 2.0))

def objective(batch):
    (folder / str(os.getpid())).touch()
    if batch == 1:
        time.sleep(600)
    if batch == 2:
        re.match("(a+)+$", "a" * 60 + "b")  # keeps the global interpreter lock
    while batch == 3:
        torch.ones(300, 300) @ torch.ones(300, 300)
    return theta.square().sum()  # and wait for the others

if __name__ == "__main__":
    evaluator = optex.WorkersEvaluator(4)
    optimizer = optex.OptEx(torch.optim.SGD([theta], lr=0.1), evaluator=evaluator)
    for _ in optimizer.rounds(range(100), objective):
        pass
"""


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended, whenever its new parent looks after it


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGHUP, True)]
)
def test_workers_end_with_the_program_however_it_ends(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    script, seen = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(ENDLESS)
    seen.mkdir()
    with tempfile.TemporaryDirectory() as temporary:  # a short name, as a socket's has to be
        command = [sys.executable, str(script), str(seen)]
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # which torch leaves in the temporary folder
        environment = {**os.environ, "TMPDIR": temporary, **caches}
        process = subprocess.Popen(command, start_new_session=True, env=environment)
        try:
            for _ in range(1200):
                if len(list(seen.iterdir())) == 4:
                    break
                time.sleep(0.05)
            time.sleep(0.5)
            workers = [int(file.name) for file in seen.iterdir()]
            assert [running(pid) for pid in workers] == [True] * 4
            (os.killpg if whole_group else os.kill)(process.pid, number)
            assert process.wait(10) == -number
            time.sleep(2)
            assert not [pid for pid in workers if running(pid)]
            assert gone(process.pid, within=20)
            assert not list(Path(temporary).iterdir())
            assert not list(Path("/dev/shm").glob(f"pym-{process.pid}-*"))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_what_the_fork_server_does_is_done_nowhere_else() -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    importlib.import_module("optex.evaluators.workers.fork_server")
    assert [signal.getsignal(number) for number in numbers] == before


def is_deaf(x: np.ndarray) -> tuple[float, np.ndarray]:
    return float(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN), 0 * x


def test_workers_do_not_ignore_what_the_fork_server_ignores() -> None:
    assert optex.minimize(is_deaf, START, jac=True, workers=2, maxiter=1).fun == 0.0


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    before, others, known = (
        set(memory.glob("*")),
        multiprocessing.active_children(),
        set(objectives._OBJECTIVES),
    )
    evaluator = WorkersEvaluator(2)
    trained(network, regression_batches(5), evaluator)
    running = [child for child in multiprocessing.active_children() if child not in others]
    assert [child.name for child in running] == ["optex-worker"] * 2
    del evaluator
    gc.collect()
    assert not any(child.is_alive() for child in running)
    assert set(objectives._OBJECTIVES) <= known
    assert not [path for path in set(memory.glob("*")) - before if path.name.startswith(("psm_", "pym-"))]


def test_closed_evaluator_starts_anew() -> None:
    options: dict[str, Any] = {"jac": rosen_der, "lr": 0.01, "maxiter": 3}
    theirs = optex.minimize(rosen, START, **options)
    evaluator, seen = WorkersEvaluator(2), set()
    for _ in range(2):
        same_result(optex.minimize(rosen, START, evaluator=evaluator, **options), theirs)
        running = processes_of(evaluator)
        assert [process.is_alive() for process in running] == [True, True]
        seen |= {process.pid for process in running}
        evaluator.close()
        evaluator.close()
        assert not any(process.is_alive() for process in running)
    assert len(seen) == 4


# ---------------------------------------------------------------------- the heat-conduction example


@pytest.fixture
def heat(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("heat")


def test_adjoint_gradient_is_that_of_finite_differences(heat: Any) -> None:
    misfit = heat.Misfit(heat.Plate(size=10, steps=4, spacing=3))
    generator = np.random.default_rng(0)
    m = 0.5 * generator.standard_normal(100)
    _, gradient = misfit(m)
    differences = [(misfit(m + 1e-5 * unit)[0] - misfit(m - 1e-5 * unit)[0]) / 2e-5 for unit in np.eye(100)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-5, atol=1e-6)


def test_plate_conducts_as_the_continuum_does(heat: Any) -> None:
    plate = heat.Plate(size=16)
    differences, means = plate.differences()
    stiffness = (differences.T @ scipy.sparse.diags_array(means @ np.ones(16**2)) @ differences).toarray()
    modes = np.linalg.eigvalsh(stiffness)
    np.testing.assert_allclose(modes[:4], np.pi**2 * np.array([2, 5, 5, 8]), rtol=0.02)
    np.testing.assert_allclose(means.sum(axis=0), 2.0)  # each cell's area, once along either axis


def test_heat_example_runs(
    heat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "heat.png"
    monkeypatch.setattr(sys, "argv", ["heat.py", "--size", "16", "--rounds", "24", "--plot", str(picture)])
    heat.main()
    lines = capsys.readouterr().out.splitlines()
    found = [float(re.search(r"J = ([\d.]+) in", line)[1]) for line in lines[1:3]]  # type: ignore[index]
    start, _ = heat.Misfit(heat.Plate(size=16))(np.zeros(16**2))
    assert found[1] <= found[0] < 0.6 * start
    rounds = [int(re.search(r"in (\d+) rounds", line)[1]) for line in lines[1:3]]  # type: ignore[index]
    assert rounds[0] == 24
    assert rounds[1] < 12
    assert picture.stat().st_size > 10_000


# ---------------------------------------------------------------------- what cannot work


def test_a_function_that_cannot_be_sent_is_named_with_the_remedy() -> None:
    lock = threading.Lock()

    def locked(x: Tensor) -> Tensor:
        with lock:
            return torch_rosen(x)

    with pytest.raises(
        TypeError, match=r"fun cannot be sent to other processes .*top level.*ThreadPoolExecutor"
    ):
        optex.minimize(locked, START, workers=2)


def test_an_objective_that_cannot_be_sent_is_named() -> None:
    lock, model = threading.Lock(), network()
    optimizer = OptEx(torch.optim.Adam(model.parameters()), evaluator=WorkersEvaluator(2))
    with pytest.raises(TypeError, match="objective cannot be sent"):
        next(optimizer.rounds(regression_batches(4), lambda batch: SquaredError(model)(batch) * lock.locked()))


def test_batches_that_cannot_be_sent_are_named() -> None:
    lock, model = threading.Lock(), network()
    optimizer = OptEx(torch.optim.Adam(model.parameters()), evaluator=WorkersEvaluator(2))
    with pytest.raises(TypeError, match="a batch of type lock cannot be sent to workers"):
        next(optimizer.rounds([lock] * 4, SquaredError(model)))


def test_without_cloudpickle(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        sys.modules["cloudpickle"] = None
        import optex

        def fun(x):
            return (x**2).sum()

        if __name__ == "__main__":
            ours = optex.minimize(fun, [1.0, 2.0], maxiter=3, workers=2)
            print((ours.x == optex.minimize(fun, [1.0, 2.0], maxiter=3).x).all())
            try:
                optex.minimize(lambda x: fun(x), [1.0, 2.0], workers=2)
            except TypeError as error:
                print("install cloudpickle for lambdas" in str(error))
        """)
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True", "True"], ran.stderr


def test_a_script_that_does_not_guard_its_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import optex

        def fun(x):
            return (x**2).sum()

        optex.minimize(fun, [1.0, 2.0], workers=2)
        """)
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert "WorkerLostError" in ran.stderr
    assert "if __name__ == '__main__'" in ran.stderr


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({"workers": 0}, ValueError, "workers must be at least 1, or -1 for all cores, got 0"),
    "negative": ({"workers": -2}, ValueError, "workers must be at least 1, or -1"),
    "a flag": (
        {"workers": True},
        TypeError,
        "workers must be an integer, a concurrent.futures.Executor .*True",
    ),
    "a name": ({"workers": "ray"}, TypeError, "workers must be .* 'ray'"),
    "timeout": (
        {"workers": 2, "timeout": 0},
        ValueError,
        "timeout must be a positive number of seconds, got 0",
    ),
    "timeout of a map": (
        {"workers": map, "timeout": 1},
        ValueError,
        "a map function cannot keep a timeout",
    ),
    "threads": ({"workers": 2, "threads": 0}, ValueError, "threads must be an integer of at least 1, got 0"),
    "rebuild": ({"rebuild": 3}, TypeError, "rebuild must be a function without arguments, got 3"),
    "rebuild of processes": ({"workers": 2, "rebuild": list}, ValueError, "rebuild is for an executor"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument(case: str) -> None:
    arguments, kind, text = ERRORS[case]
    with pytest.raises(kind, match=text):
        WorkersEvaluator(**arguments)


def test_accelerators_are_sent_elsewhere() -> None:
    vector = ParameterVector([nn.Parameter(torch.empty(2, device="meta"))])
    with pytest.raises(ValueError, match=r"must be on the CPU, got meta; .*VectorizedEvaluator"):
        WorkersEvaluator(in_turn).evaluate(
            request(ObjectiveSource(lambda _: torch.ones(())), vector, torch.ones(1, 2), [0])
        )


def test_workers_default_to_the_cores() -> None:
    for evaluator in (WorkersEvaluator(), WorkersEvaluator(-1)):
        assert isinstance(evaluator._pool, process_pool.ProcessPool)  # which starts none before it is used
        assert evaluator._pool._count == len(os.sched_getaffinity(0))
