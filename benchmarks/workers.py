"""What worker processes cost, survive and save.

    python benchmarks/workers.py sleep  --json results/workers/sleep.json
    python benchmarks/workers.py killed --json results/workers/killed.json
    python benchmarks/workers.py heat   --json results/workers/heat.json
    python benchmarks/workers.py report

``sleep``: a gradient that sleeps 0.2 s, N = 8, eight workers of each kind: seconds a round. ``killed``: 200
rounds, in every tenth of which a worker is killed while it evaluates, against the same rounds undisturbed.
``heat``: the inverse problem of ``examples/heat.py`` with two workers at N = 4 until J is as low as vanilla
Adam's after 150 rounds; vanilla and optex take turns, so that whatever else the machine does slows both.
``report``: the three JSON files put into docs/workers.md and results/README.md.

Every process computes in one thread. MPI has its own launcher: ``mpiexec -n 9 python -m mpi4py.futures
benchmarks/workers.py sleep --kinds mpi``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import optex
from optex.studies.records import this_machine
from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "workers"
sys.path.insert(0, str(ROOT / "examples"))

import heat  # noqa: E402  (an example, no part of the package)

# ---------------------------------------------------------------------- kinds of workers


def processes(count: int, _: ExitStack) -> int:
    """Our own."""
    return count


def threads(count: int, stack: ExitStack) -> Any:
    """``concurrent.futures.ThreadPoolExecutor``."""
    return stack.enter_context(ThreadPoolExecutor(count))


def process_pool(count: int, stack: ExitStack) -> Any:
    """``concurrent.futures.ProcessPoolExecutor``."""
    return stack.enter_context(ProcessPoolExecutor(count, multiprocessing.get_context("forkserver")))


def loky(count: int, stack: ExitStack) -> Any:
    """joblib's pool."""
    from loky import get_reusable_executor

    return stack.enter_context(get_reusable_executor(count, timeout=600))


def dask(count: int, stack: ExitStack) -> Any:
    """Two of Dask's worker processes, of several threads each."""
    from distributed import Client, LocalCluster

    quiet: dict[str, Any] = {"dashboard_address": None}  # Dask takes None, and its annotation leaves it out
    cluster = LocalCluster(n_workers=2, threads_per_worker=-(-count // 2), **quiet)
    return stack.enter_context(Client(stack.enter_context(cluster))).get_executor()


def ray(count: int, stack: ExitStack) -> Any:
    """Ray's pool of actors."""
    import ray
    from ray.util.multiprocessing import Pool

    path = str(ROOT / "examples")
    ray.init(num_cpus=count, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    stack.callback(ray.shutdown)
    return Pool(count).map


def mpi(_: int, stack: ExitStack) -> Any:
    """The ranks that ``mpiexec`` started."""
    from mpi4py.futures import MPIPoolExecutor

    return stack.enter_context(MPIPoolExecutor())


KINDS: dict[str, Callable[[int, ExitStack], Any]] = {
    function.__name__: function for function in (processes, threads, process_pool, loky, dask, ray, mpi)
}

# ---------------------------------------------------------------------- a gradient that sleeps


def sleepy_sphere(x: np.ndarray, seconds: float) -> tuple[float, np.ndarray]:
    """‖x‖² and its gradient, after a nap."""
    time.sleep(seconds)
    return float(x @ x), 2 * x


def sleep(kinds: list[str]) -> dict[str, Any]:
    """Seconds a round of N = 8 once all workers run, and those of the first rounds, in which they start."""
    count, nap, warm_up, rounds = 8, 0.2, 4, 16
    measured = {}
    for kind in kinds:
        ticks = [time.perf_counter()]
        with ExitStack() as stack:
            pool = KINDS[kind](count, stack)
            optex.minimize(
                sleepy_sphere,
                np.ones(100),
                (nap,),
                jac=True,
                lr=0.01,
                parallelism=count,
                maxiter=warm_up + rounds,
                callback=lambda _, ticks=ticks: ticks.append(time.perf_counter()),
                workers=pool,
            )
        seconds = [after - before for before, after in itertools.pairwise(ticks)]
        measured[kind] = {
            "median": statistics.median(seconds[warm_up:]),
            "slowest": max(seconds[warm_up:]),
            "first rounds": sum(seconds[:warm_up]),
        }
        print(
            f"{kind:13s} a round: median {measured[kind]['median']:.3f} s, slowest "
            f"{measured[kind]['slowest']:.3f} s; the first {warm_up}: {measured[kind]['first rounds']:.1f} s",
            flush=True,
        )
    return {"parallelism": count, "nap": nap, "rounds": rounds, "kinds": measured}


# ---------------------------------------------------------------------- workers that are killed


def fatal_rosenbrock(x: np.ndarray, marker: str) -> tuple[float, np.ndarray]:
    """Rosenbrock's function; the worker that finds the marker file removes it and kills itself."""
    time.sleep(0.01)
    try:
        Path(marker).unlink()
    except FileNotFoundError:
        pass
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    inner = x[1:] - x[:-1] ** 2
    gradient = np.zeros_like(x)
    gradient[:-1] = -400 * x[:-1] * inner - 2 * (1 - x[:-1])
    gradient[1:] += 200 * inner
    return float((100 * inner**2 + (1 - x[:-1]) ** 2).sum()), gradient


def killed() -> dict[str, Any]:
    """The same rounds with a worker killed in every tenth, and with none."""
    rounds, every = 200, 10
    runs: dict[bool, Any] = {}
    seconds: dict[bool, float] = {}
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "marker"
        for deadly in (False, True):
            count = itertools.count(1)

            def mark(_: Any, deadly: bool = deadly, count: Any = count) -> None:
                nonlocal kills
                if deadly and next(count) % every == every - 1:
                    kills += 1
                    marker.touch()

            started = time.perf_counter()
            runs[deadly] = optex.minimize(
                fatal_rosenbrock,
                np.linspace(-1, 1, 50),
                (str(marker),),
                jac=True,
                lr=0.01,
                maxiter=rounds,
                callback=mark,
                workers=4,
            )
            seconds[deadly] = time.perf_counter() - started
        left = marker.exists()
    same = bool(np.array_equal(runs[False].x, runs[True].x)) and not left
    print(
        f"{rounds} rounds, {kills} workers killed: {seconds[True]:.1f} s, undisturbed {seconds[False]:.1f} s; "
        f"the same result to the bit: {same}; f = {runs[True].fun:.6f} and {runs[False].fun:.6f}"
    )
    return {
        "rounds": rounds,
        "killed": kills,
        "seconds": seconds[True],
        "seconds in peace": seconds[False],
        "same": same,
        "fun": [runs[True].fun, runs[False].fun],
        "steps": [runs[True].nstep, runs[False].nstep],
    }


# ---------------------------------------------------------------------- heat conduction


def heat_conduction(kinds: list[str], repeats: int, size: int, rates: list[float]) -> dict[str, Any]:
    """Seconds until vanilla's final J, against vanilla's own; starting the workers is timed apart."""
    rounds, workers, parallelism = 150, 2, 4
    misfit = heat.Misfit(heat.Plate(size=size))
    gradient = min(_timed(lambda: misfit(np.zeros(size**2)))[0] for _ in range(5))
    print(f"{size**2} unknowns, one gradient: {1e3 * gradient:.0f} ms", flush=True)
    heat.vanilla(misfit, rounds=1, lr=0.1)  # torch imports much of itself at the first step
    runs: list[dict[str, Any]] = []
    start: dict[str, float] = {}
    with ExitStack() as stack:
        evaluators = {}
        for kind in kinds:
            evaluators[kind] = stack.enter_context(
                optex.WorkersEvaluator(KINDS[kind](workers, stack), threads=1)
            )
            warm_up = {"rounds": 3, "lr": 0.05, "parallelism": parallelism, "evaluator": evaluators[kind]}
            start[kind], _ = _timed(lambda warm_up=warm_up: heat.solve(misfit, **warm_up))
        for repeat, lr, kind in itertools.product(range(repeats), rates, kinds):
            plain = heat.vanilla(misfit, rounds=rounds, lr=lr)
            until = plain.values[-1]
            quasi = heat.quasi_newton(misfit, until=until, evaluations=rounds)
            ours = heat.solve(
                misfit, rounds=rounds, until=until, lr=lr, parallelism=parallelism, evaluator=evaluators[kind]
            )
            run = {
                "kind": kind,
                "lr": lr,
                "repeat": repeat,
                "J": [plain.values[-1], ours.values[-1]],
                "rounds": [plain.result.nit, ours.result.nit],
                "steps": [plain.result.nstep, ours.result.nstep],
                "seconds": [plain.seconds[-1], ours.seconds[-1]],
                "ratio": ours.seconds[-1] / plain.seconds[-1],
                "L-BFGS": {
                    "J": quasi.values[-1],
                    "evaluations": quasi.result.nit,
                    "seconds": quasi.seconds[-1],
                    "ratio": quasi.seconds[-1] / plain.seconds[-1],
                },
            }
            runs.append(run)
            print(
                f"{kind:10s} lr {lr:g}: vanilla {run['rounds'][0]} rounds, {run['seconds'][0]:.1f} s; optex "
                f"{run['rounds'][1]} rounds, {run['seconds'][1]:.1f} s; ratio {run['ratio']:.2f}; L-BFGS "
                f"{quasi.result.nit} evaluations, {quasi.seconds[-1]:.1f} s",
                flush=True,
            )
    print("; ".join(f"starting {kind} and 3 rounds took {seconds:.1f} s" for kind, seconds in start.items()))
    return {
        "size": size,
        "gradient": gradient,
        "parallelism": parallelism,
        "workers": workers,
        "start and three rounds": start,
        "runs": runs,
    }


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    answer = function()
    return time.perf_counter() - started, answer


# ---------------------------------------------------------------------- the pages

NAMES = {
    "processes": "processes of our own",
    "threads": "threads",
    "process_pool": "`ProcessPoolExecutor`",
    "loky": "loky",
    "dask": "Dask",
    "ray": "Ray",
    "mpi": "MPI",
}


def report() -> None:
    """Fill the pages from what was measured."""
    slept, ended, solved = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("sleep", "killed", "heat")
    )
    fill(ROOT / "docs" / "workers.md", {"sleep": sleep_table(slept, "../results/workers")})
    parts = (heat_words(solved, "workers"), sleep_table(slept, "workers"), killed_words(ended, "workers"))
    fill(ROOT / "results" / "README.md", {"workers": "\n\n".join(parts)})


def machine(result: dict[str, Any]) -> str:
    """What a measurement ran on."""
    before, after = result["meta"]["load"]
    return f"{result['meta']['machine']}, load {before:.1f} before and {after:.1f} after"


def sleep_table(result: dict[str, Any], folder: str) -> str:
    """What was run, and a row for each kind of workers; ``folder`` is where the page finds the JSON."""
    rows = [
        (NAMES[kind], f"{seconds['median']:.3f}", f"{seconds['slowest']:.3f}", f"{seconds['first rounds']:.1f}")
        for kind, seconds in result["kinds"].items()
    ]
    head = ("workers", "seconds a round, median", "slowest", "the first four rounds, start included")
    return (
        f"A gradient that sleeps {result['nap']:g} s, N = {result['parallelism']}, as many workers, "
        f"{result['rounds']} rounds ([sleep.json]({folder}/sleep.json); {machine(result)}):\n\n"
        + markdown_table(head, rows)
    )


def killed_words(result: dict[str, Any], folder: str) -> str:
    """Whether killed workers changed the result."""
    same = "the same bits as" if result["same"] else "**another result than**"
    return (
        f"{result['rounds']} rounds in which {result['killed']} workers are killed end with {same} those in "
        f"which none is ([killed.json]({folder}/killed.json); {machine(result)})."
    )


def heat_words(result: dict[str, Any], folder: str) -> str:
    """Rounds and seconds of optex against vanilla's, over all repeats."""
    lines = []
    for kind, lr in dict.fromkeys((run["kind"], run["lr"]) for run in result["runs"]):
        runs = [run for run in result["runs"] if (run["kind"], run["lr"]) == (kind, lr)]
        ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(run["ratio"] for run in runs))
        plain, ours = (statistics.median(run["rounds"][i] for run in runs) for i in (0, 1))
        lines.append(
            f"On {NAMES[kind]}, with lr {lr:g}, `optex` reaches the loss of vanilla Adam after {plain:.0f} "
            f"rounds in {ours:.0f}; its seconds over vanilla's, run by run: {ratios}."
        )
        beside = [run["L-BFGS"] for run in runs if "L-BFGS" in run]
        if beside:
            reached = all(entry["J"] <= run["J"][0] for entry, run in zip(beside, runs, strict=True))
            count = statistics.median(entry["evaluations"] for entry in beside)
            ratios = ", ".join(f"{entry['ratio']:.2f}" for entry in sorted(beside, key=lambda e: e["ratio"]))
            verb = "does so" if reached else "does not get there"
            lines.append(
                f"SciPy's L-BFGS, one evaluation after the other in one process, {verb} in {count:.0f} "
                f"evaluations; its seconds over vanilla's: {ratios}."
            )
    return (
        "The inverse heat-conduction problem of [`examples/heat.py`](../examples/heat.py), "
        f"{result['size'] ** 2:,} unknowns, a gradient of {1e3 * result['gradient']:.0f} ms on one thread, "
        f"N = {result['parallelism']}, {result['workers']} workers ([heat.json]({folder}/heat.json); "
        f"{machine(result)}). {' '.join(lines)}"
    )


# ---------------------------------------------------------------------- the command line


def main() -> None:
    """Measure, print and write; or report what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sleep", "killed", "heat", "report"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="of workers")
    parser.add_argument("--repeats", type=int, default=3, help="of heat")
    parser.add_argument("--size", type=int, default=128, help="of heat: cells along each side")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.05], help="of heat")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "report":
        report()
        return
    torch.set_num_threads(1)
    threadpool_limits(1)
    before = os.getloadavg()
    if options.what == "sleep":
        result = sleep(options.kinds or ["processes", "threads", "process_pool", "loky", "dask", "ray"])
    elif options.what == "killed":
        result = killed()
    else:
        result = heat_conduction(
            options.kinds or ["processes", "ray"], options.repeats, options.size, options.lr
        )
    if options.json:
        meta = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": this_machine(),
            "load": [round(load[0], 1) for load in (before, os.getloadavg())],  # a minute's, before and after
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"meta": meta, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
