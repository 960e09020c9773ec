"""One TCP connection of libzmq's, seen from outside: how much it has received, and a way to end it."""

from __future__ import annotations

import array
import contextlib
import os
import socket as system_socket
import struct
import sys
import time

if sys.platform == "linux":
    import fcntl
    import termios

CAN_COUNT = sys.platform == "linux"
"""Whether the system says how many bytes a connection has received. Where not (macOS, Windows), only queues of whole
messages are bounded: a paired peer's endless message is not noticed, nor is the process safe from its PING (ledger)."""

_AT_ONCE = struct.pack("@ii", 1, 0)
_RECEIVED = struct.Struct("@Q")
_RECEIVED_AT = 128
"""struct tcp_info: tcpi_bytes_received, since Linux 4.1."""


class Connection:
    """Holds a file descriptor of its own: libzmq's may be closed at any time, and its number be another's."""

    def __init__(self, own: int) -> None:
        self._socket = system_socket.socket(
            system_socket.AF_INET, system_socket.SOCK_STREAM, system_socket.IPPROTO_TCP, fileno=own
        )
        self.since = time.monotonic()
        self.key: str | None = None
        """Whose it is: known when its first message was taken."""
        self.held = 0
        """Bytes in libzmq that nobody has taken yet, when they were last looked at."""
        self.is_ended = False

    def received(self) -> int:
        """Bytes that libzmq has read from it so far; 0 where the system doesn't say."""
        if sys.platform != "linux":
            return 0
        waiting = array.array("i", [0])
        try:
            info = self._socket.getsockopt(system_socket.IPPROTO_TCP, system_socket.TCP_INFO, 256)
            fcntl.ioctl(self._socket, termios.FIONREAD, waiting)
        except OSError:
            return 0
        if len(info) < _RECEIVED_AT + _RECEIVED.size:
            return 0
        return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) - waiting[0]

    def end(self) -> None:
        """Break it under libzmq, which notices and cleans up."""
        self.is_ended = True
        with contextlib.suppress(OSError):
            # the other end hears of it at once, even where it sends more than there is room for
            self._socket.setsockopt(system_socket.SOL_SOCKET, system_socket.SO_LINGER, _AT_ONCE)
            self._socket.shutdown(system_socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def seen(handle: int) -> Connection | None:
    """The connection with this file descriptor of libzmq's; None where it is gone already. One that can't be watched,
    for want of file descriptors, is ended."""
    if os.name != "posix":
        return None
    try:
        own = os.dup(handle)
    except OSError:
        with contextlib.suppress(OSError):
            passing = system_socket.socket(system_socket.AF_INET, system_socket.SOCK_STREAM, fileno=handle)
            try:
                passing.shutdown(system_socket.SHUT_RDWR)
            finally:
                passing.detach()
        return None
    try:
        return Connection(own)
    except OSError:  # libzmq has closed it meanwhile, and its number is something else's
        os.close(own)
        return None
