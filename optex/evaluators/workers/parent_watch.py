"""Ends a worker process with its program, however the program ends and whatever the worker is doing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing.connection import wait
from threading import Thread
from typing import Final

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["end_with_program"]

_EXIT_CODE: Final = 1


def end_with_program() -> None:
    """From now on this worker process ends when the program that started it does.

    A worker that computes does not read its connection, so it would not notice the connection's end. Instead a
    thread waits for the program's end: for multiprocessing's sentinel, a pipe that the program holds open, and
    on Linux also for the process itself, as other forks of the program may hold that pipe open, too.
    """
    program = multiprocessing.parent_process()
    if program is None:
        return
    signs = [program.sentinel]
    try:
        signs.append(os.pidfd_open(program.pid))  # type: ignore[arg-type]  (None is for processes not started)
    except ProcessLookupError:
        os._exit(_EXIT_CODE)
    except (AttributeError, OSError):  # not Linux, or not allowed
        pass
    Thread(target=_exit_after, args=(signs,), daemon=True, name="optex-parent-watch").start()
    _be_killed_after(program.sentinel)


def _exit_after(signs: list[int]) -> None:
    wait(signs)
    os._exit(_EXIT_CODE)


def _be_killed_after(sentinel: int) -> None:
    """Let a Linux kernel kill this process when the sentinel's other end is closed.

    The thread that waits cannot run during a computation that holds Python's global interpreter lock.
    """
    if fcntl is None or not hasattr(fcntl, "F_SETSIG"):
        return
    with suppress(OSError):
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
