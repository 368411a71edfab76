"""Chunks of coordinates over processes: an executor's workers, or the ranks of a process group."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optex.draws import generator_states, set_generator_states
from optex.errors import WorkerLostError
from optex.sources.deepzero.passes import Chunk, Passes, Unperturbed

try:
    import cloudpickle as pickling  # takes lambdas, and what a script or a notebook defines
except ImportError:
    pickling = pickle

__all__ = ["alone", "check_executor", "over_executor", "over_ranks"]

_OWNER = "CoordinateSource"
Answer = tuple[Unperturbed, list[Tensor]]  # the unperturbed pass, and the losses of each chunk [sides, c]


def alone(passes: Passes, batch: Any, chunks: Sequence[Chunk]) -> Answer:
    """All in this process."""
    base = passes.unperturbed(batch)
    return base, [passes.losses(base, batch, chunk) for chunk in chunks]


# ------------------------------------------------------------------ workers


def check_executor(executor: Any) -> None:
    """Refuse what cannot evaluate apart from this process.

    Raises:
        TypeError: it is no executor, or one of threads.
    """
    if executor is None:
        return
    if not isinstance(executor, Executor):
        raise TypeError(
            f"{_OWNER}: executor must be a concurrent.futures.Executor, got {type(executor).__name__}"
        )
    if isinstance(executor, ThreadPoolExecutor):
        raise TypeError(
            f"{_OWNER}: executor is a ThreadPoolExecutor, whose threads share torch's generators and could "
            "draw different dropout; pass a ProcessPoolExecutor, or vectorized=True"
        )


def over_executor(
    executor: Executor, workers: int, passes: Passes, batch: Any, chunks: Sequence[Chunk]
) -> Answer:
    """Chunks dealt out to ``workers`` tasks; the unperturbed pass is made here, meanwhile.

    Raises:
        TypeError: objective or batch cannot be pickled.
        WorkerLostError: a worker died.
    """
    try:
        payload = pickling.dumps((passes, batch))
    except Exception as error:
        raise TypeError(
            f"{_OWNER}: objective, parameters and batch have to be sent to other processes, and cannot be "
            f"({error}); define the objective at the top level of a module, or install cloudpickle"
        ) from error
    pieces = [chunks[first::workers] for first in range(min(workers, len(chunks)))]
    draws, threads = generator_states(), torch.get_num_threads()
    futures: list[Future[list[Tensor]]] = []
    try:
        futures += [executor.submit(_work, payload, list(piece), draws, threads) for piece in pieces]
        base = passes.unperturbed(batch)
        answers = [future.result() for future in futures]
    except BrokenExecutor as error:
        raise WorkerLostError(
            f"{_OWNER}: a worker died ({error}); parameters are as before. Evaluate again with a new executor"
        ) from error
    finally:
        for future in futures:
            future.cancel()
    return base, _woven(answers, len(chunks))


def _work(payload: bytes, chunks: list[Chunk], draws: list[Tensor], threads: int) -> list[Tensor]:
    # A sum over more threads may round otherwise.
    torch.set_num_threads(threads)
    passes, batch = pickle.loads(payload)
    set_generator_states(draws)
    with torch.no_grad():
        return alone(passes, batch, chunks)[1]


def _woven(answers: Sequence[list[Tensor]], count: int) -> list[Tensor]:
    """The losses of all chunks in their order, from n answers that have those of every n-th chunk."""
    return [answers[number % len(answers)][number // len(answers)] for number in range(count)]


# ------------------------------------------------------------------ ranks


def over_ranks(group: Any, passes: Passes, batch: Any, chunks: Sequence[Chunk]) -> Answer:
    """Every n-th chunk on each of n ranks, which all end with all losses.

    Parameters, batch and torch's draws have to be the same on all ranks. That is checked by the unperturbed
    pass, which every rank makes: its losses have to agree.

    Raises:
        RuntimeError: another rank's evaluation failed, or the ranks do not evaluate the same thing.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    failure, base, mine = _attempted(lambda: alone(passes, batch, chunks[rank::size]))
    sides, failed, plain = len(passes.shifts), torch.zeros(size), torch.zeros(size, dtype=torch.float64)
    failed[rank] = failure is not None
    plain[rank] = 0.0 if base is None else base.loss
    rows = [torch.zeros(sides, len(chunk.indices), dtype=torch.float64) for chunk in chunks]
    for number, row in zip(range(rank, len(chunks), size), mine, strict=False):
        rows[number] = row
    sent = torch.cat([failed.double(), plain, *(row.flatten() for row in rows)])
    # Every number comes from one rank and is 0 on the others: the sum has its bits.
    sent = sent.to(passes.parameters[0].device) if dist.get_backend(group) == "nccl" else sent
    dist.all_reduce(sent, group=group)
    failed, plain, losses = sent.cpu().split([size, size, len(sent) - 2 * size])
    if failure is not None:
        raise failure
    assert base is not None
    if failed.any():
        raise RuntimeError(
            f"{_OWNER}: rank {int(failed.nonzero()[0])} of the group could not evaluate its coordinates, and "
            "says why; parameters are as before"
        )
    _check_alike(plain, passes)
    base = Unperturbed(plain[0], base.inputs, base.draws, base.buffers)
    pieces = losses.split([row.numel() for row in rows])
    return base, [piece.view_as(row) for piece, row in zip(pieces, rows, strict=True)]


def _attempted(act: Callable[[], Answer]) -> tuple[Exception | None, Unperturbed | None, list[Tensor]]:
    # A rank that raised here at once would leave the others waiting.
    try:
        return None, *act()
    except Exception as error:  # noqa: BLE001  (raised again once the other ranks know)
        return error, None, []


def _check_alike(
    plain: Tensor,  # [ranks]
    passes: Passes,
) -> None:
    apart = float(plain.max() - plain.min())
    allowed = 64 * torch.finfo(passes.parameters[0].dtype).eps * max(1.0, float(plain.abs().max()))
    if apart > allowed:
        shown = ", ".join(f"{value:.8g}" for value in plain.tolist())
        raise RuntimeError(
            f"{_OWNER}: the ranks' losses at the parameters differ ({shown}); parameters, batch and torch's "
            "seed have to be the same on all of them, since coordinates are split, not data"
        )
