"""Imported by multiprocessing's fork server, which then leaves nothing in the temporary folder.

The fork server listens at a socket in a temporary folder of the program. The program removes both when it
exits, but not when a signal ends it. The fork server outlives the program and its workers, so it can remove
them in that case. Like multiprocessing's resource tracker it ignores signals that are sent to the whole process
group. Imported anywhere else, this module does nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Final

__all__: list[str] = []

_SERVER: Final = os.getpid()


def _leave_nothing_behind() -> None:
    atexit.register(_remove_socket)  # the server's forks leave by os._exit and do not run it
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGHUP)}

    def restore() -> None:
        if os.getppid() == _SERVER:  # in a fork of the server, not in a fork of such a fork
            for number, handler in before.items():
                signal.signal(number, handler)

    os.register_at_fork(after_in_child=restore)


def _remove_socket() -> None:
    if hasattr(sys, "last_type"):  # an error ended the server; the program lives and needs the folder
        return
    address = getattr(forkserver._forkserver, "_forkserver_address", None)  # set by the server's main function
    if isinstance(address, str) and address.startswith(os.sep):  # an abstract socket is no file
        with suppress(OSError):
            Path(address).unlink(missing_ok=True)
            Path(address).parent.rmdir()  # only if nobody else has left something there


if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):  # how the server is started
    _leave_nothing_behind()
