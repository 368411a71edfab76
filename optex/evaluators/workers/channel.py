"""Messages over a socket. The program's end never waits, whatever the worker does at its end."""

from __future__ import annotations

import struct
from collections import deque
from socket import socket, socketpair
from typing import Final

__all__ = ["Channel", "receive", "send"]

_LENGTH: Final = struct.Struct("!Q")  # stands before each message
_CHUNK: Final = 2**16  # bytes asked for at once


class Channel:
    """The program's end: messages are sent and replies received as far as that is possible now; no call waits.

    A blocking send would wait for ever for a worker that is stopped: the operating system's buffer does not
    hold a message of several megabytes.

    Attributes:
        socket: the program's end.
        other_end: the worker's end, to be closed here once the worker has it.
    """

    def __init__(self) -> None:
        self.socket: socket
        self.other_end: socket
        self.socket, self.other_end = socketpair()
        self.socket.setblocking(False)
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()

    @property
    def sending(self) -> bool:
        """Is there more to send as soon as the worker takes it?"""
        return bool(self._unsent)

    def post(self, message: bytes) -> None:
        """Send the message, or what the worker takes of it; ``proceed`` sends the rest."""
        self._unsent += [memoryview(_LENGTH.pack(len(message))), memoryview(message)]
        self._send()

    def proceed(self) -> bytes | None:
        """Go on sending and receiving; the reply if it is complete, else None.

        Raises:
            EOFError, OSError: the worker has closed its end, and no complete reply is left.
        """
        self._send()
        ended = self._receive()
        if len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) >= end:
                message = bytes(self._received[_LENGTH.size : end])
                del self._received[:end]
                return message
        if ended:
            raise EOFError
        return None

    def _send(self) -> None:
        try:
            while self._unsent:
                sent = self.socket.send(self._unsent[0])
                self._unsent[0] = self._unsent[0][sent:]
                if not self._unsent[0]:
                    self._unsent.popleft()
        except BlockingIOError:
            pass

    def _receive(self) -> bool:
        """Has the other end been closed?"""
        try:
            while data := self.socket.recv(_CHUNK):
                self._received += data
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self.socket.close()


def send(connection: socket, message: bytes) -> None:
    """The worker's end: wait until the program has taken the message."""
    connection.sendall(_LENGTH.pack(len(message)) + message)


def receive(connection: socket) -> bytes:
    """The worker's end: wait for a message.

    Raises:
        EOFError: the program has closed its end.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket, count: int) -> bytes:
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        received = connection.recv_into(rest)
        if not received:
            raise EOFError
        rest = rest[received:]
    return bytes(data)
