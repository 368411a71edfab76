"""Rounds whose time beyond gradients, memory and traffic benchmarks/overhead.py measures."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
from torch import Tensor
from traffic import STATES, Setting, least_rows, memory_rows, round_work, total

import optex

__all__ = ["METHODS", "Bowl", "counted", "make_optimizer", "measure_point"]

ITEM: Final = 4  # bytes of a float32
RATES: Final = {"sgd": 0.02, "momentum": 0.01, "adam": 0.001}  # small: rounds are kept whole
BASES: Final = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}
METHODS: Final[dict[str, Callable[[], optex.Estimator]]] = {
    "separable": optex.SeparableEstimator,
    "curl-free": optex.CurlFreeEstimator,
    "hold-last": optex.HoldLast,
    "default": optex.CommitteeEstimator,
}


class Bowl(optex.GradientSource):
    """½ Σ c_i θ_i² / d, its gradient written down: what is measured is all that is not the gradient."""

    deterministic = True

    def __init__(self, theta: Tensor) -> None:
        self._theta = theta
        self._curvatures = torch.linspace(0.5, 1.5, len(theta))

    def gradient(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        point = self._theta.detach()
        self._theta.grad = point * self._curvatures
        return point @ self._theta.grad / (2 * len(point)), None


def make_optimizer(
    method: str, optimizer: str, theta: Tensor, parallelism: int, history: int, stride: int
) -> optex.OptEx:
    """OptEx around the base optimizer; ``stride`` is its bound."""
    base = BASES[optimizer]([theta], lr=RATES[optimizer])
    if method == "optex-paper":
        return optex.OptEx.from_paper(base, parallelism, history, deterministic=True)
    return optex.OptEx(
        base,
        parallelism=parallelism,
        stride=stride,
        history_size=history,
        estimator=METHODS[method](),
        deterministic=True,
    )


def measure_point(point: dict[str, Any], *, rounds: int, threads: int) -> dict[str, Any]:
    """Time, traffic and memory of one setting's rounds, each measured in a process of its own.

    Args:
        point: method, optimizer, dimension, parallelism, history, stride.
        rounds: watched after those that fill the history.
        threads: torch's.
    """
    plain = _apart(_plain_peak, point, threads)
    return {**point, **_apart(_timed, point, rounds, threads, plain)}


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function answers in a process of its own: peaks of memory are a process's, and no allocator has
    been warmed up by what was measured before.

    They are forked from a server that has imported much and computed nothing, which takes no time, and leaves
    them without the threads that a caller may have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["optex", "optex.studies.plots"]
    )  # these scripts' own folder it does not see
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, function, arguments))
    child.start()
    theirs.close()  # or the answer of one that was killed would be waited for
    try:
        return ours.recv()
    except EOFError:
        raise MemoryError(f"the process that measured {arguments[0]} has ended without an answer") from None
    finally:
        child.join()


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def _start(point: dict[str, Any], threads: int) -> tuple[torch.nn.Parameter, Bowl]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    theta = torch.nn.Parameter(torch.rand(point["dimension"]) * 4 - 2)
    return theta, Bowl(theta)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _plain_peak(point: dict[str, Any], threads: int) -> int:
    """Of the base optimizer's own loop."""
    theta, bowl = _start(point, threads)
    base = BASES[point["optimizer"]]([theta], lr=RATES[point["optimizer"]])
    for _ in range(3):
        bowl.gradient(None)
        base.step()
    return _peak()


def _timed(point: dict[str, Any], rounds: int, threads: int, plain: int) -> dict[str, Any]:
    theta, bowl = _start(point, threads)
    wrapped = make_optimizer(
        point["method"],
        point["optimizer"],
        theta,
        point["parallelism"],
        point["history"],
        point["stride"],
    )
    reports = wrapped.rounds(itertools.repeat(None), bowl)
    for _ in range(-(-point["history"] // point["parallelism"]) + 1):  # the first has one pair to remember
        next(reports)
    judged, moves, seen = _judged(wrapped), 0, []
    for _ in range(rounds):
        anchor = wrapped.history.anchor
        seen.append(next(reports))
        moves += wrapped.history.anchor is not anchor
    peak = _peak()  # before the bandwidth is measured
    times = [1e3 * report.overhead_seconds for report in seen]
    return {
        "median": statistics.median(times),
        "minimum": min(times),
        "rounds": rounds,
        "accepted": statistics.mean(report.accepted for report in seen),
        "drafted": statistics.mean(report.drafted for report in seen),
        "moves": moves / rounds,
        "judged": (_judged(wrapped) - judged) / rounds,
        "peak_bytes": peak - plain,
        "base_step": _step_milliseconds(point, theta),
        **_bandwidth(point["dimension"], point["history"]),
    }


def _step_milliseconds(point: dict[str, Any], theta: torch.nn.Parameter) -> float:
    """Of the base optimizer, at best: what a round's steps would take by themselves."""
    alone = torch.nn.Parameter(theta.detach().clone())
    alone.grad = torch.ones_like(alone)
    base = BASES[point["optimizer"]]([alone], lr=RATES[point["optimizer"]])
    base.step()  # which makes the state
    return 1e3 * _best(base.step)


def _judged(wrapped: optex.OptEx) -> int:
    return int(wrapped.estimator.state_dict().get("judged", 0))


def _bandwidth(dimension: int, history: int) -> dict[str, float]:
    """Bytes a second, at best, of ``rows @ vector``, which reads [T0, d], and of a copy of [T0, d]."""
    rows, vector = torch.ones(history, dimension), torch.ones(dimension)
    copy, size = torch.empty_like(rows), rows.numel() * ITEM
    read, copied = _best(lambda: rows @ vector), _best(lambda: copy.copy_(rows))
    return {"read_bandwidth": size / read, "copy_bandwidth": 2 * size / copied}


def _best(work: Callable[[], object], seconds: float = 0.15) -> float:
    times, started = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return min(times)


def counted(point: dict[str, Any]) -> dict[str, float]:
    """What the formulas say of a point: bytes and calls a round, the least possible, and memory; NaN for none.

    Rounds of N = 1 without strides are the base optimizer's own.
    """
    steps = point["parallelism"] * point["stride"]
    setting = Setting(
        point["method"],
        point["history"],
        point["parallelism"],
        steps,
        STATES[point["optimizer"]],
        point.get("moves", 0.0),
        point.get("judged", 0.5),
    )
    row = point["dimension"] * ITEM
    if steps == 1:
        return {"bytes": math.nan, "calls": math.nan, "least_bytes": math.nan, "memory_bytes": math.nan}
    work = total(round_work(setting).values())
    return {
        "bytes": work.rows * row,
        "calls": work.calls,
        "least_bytes": least_rows(setting) * row,
        "memory_bytes": memory_rows(setting) * row,
    }
