"""Runs a function of a module on several gloo ranks of this machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A server that has torch in memory forks the ranks: importing it for each would take most of a test's time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.tensor", "torch.distributed.checkpoint", "optex"])


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What ``function(rank, *args)`` returned on each rank; fails with the traceback of one that failed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    answers = _CONTEXT.Queue()
    ranks = [
        _CONTEXT.Process(target=_run, args=(function, rank, size, port, answers, args), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    results, deadline = {}, time.monotonic() + timeout
    try:
        while len(results) < size and time.monotonic() < deadline:
            running = any(process.is_alive() for process in ranks)
            try:
                rank, result, error = answers.get(timeout=0.2)
            except queue.Empty:
                if running:
                    continue
                break  # a rank ended without an answer: it was killed
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
    finally:
        for process in ranks:
            process.join(max(deadline - time.monotonic(), 0) if len(results) == size else 0)
            process.kill()
    assert time.monotonic() < deadline, f"only ranks {sorted(results)} ended within {timeout} s"
    return [results.get(rank) for rank in range(size)]  # None of a rank that was made to die


def _run(function, rank, size, port, answers, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        answers.put((rank, function(rank, *args), None))
    except BaseException:  # noqa: BLE001  (any failure of a rank is the test's)
        answers.put((rank, None, traceback.format_exc()))
    with contextlib.suppress(RuntimeError):  # of ranks that were made to die
        dist.barrier()  # one that leaves early could cut off a message that another still waits for
    dist.destroy_process_group()
