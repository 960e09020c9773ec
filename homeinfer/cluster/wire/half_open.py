"""Connections that may not have shown a key yet: few at a time, so that a crowd of them takes neither files nor memory.

libzmq gives a connection some seconds for its handshake, but sets no limit to how many there are meanwhile, and does
not say which of them passed: so all that are younger count, until a message came through. A device that is cut off in
a crowd comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket as system_socket
import time
from collections.abc import Iterator
from itertools import count
from weakref import WeakSet

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

HANDSHAKE_SECONDS = 5.0
"""What a peer has for the handshake; libzmq cuts it off then."""
_MOST, _LEAST = 64, 16
_MOST_BYTES = 64 << 20
"""What they may hold together in frames that have only begun: libzmq makes room for a frame when its length is said."""
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_numbers: Iterator[int] = count()
_watching: WeakSet[HalfOpen] = WeakSet()


class HalfOpen:
    """Watches one listening socket, and cuts off the oldest young connection where there are too many."""

    def __init__(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket, most_bytes: int) -> None:
        """Before the socket is bound, so that nothing is missed. most_bytes: of a frame."""
        self._watched = socket
        self._most = max(_LEAST, min(_MOST, _MOST_BYTES // most_bytes))
        self._young: dict[int, tuple[int, float]] = {}
        self._task: asyncio.Task[None] | None = None
        endpoint = f"inproc://half-open-{next(_numbers)}"
        socket.monitor(endpoint, _EVENTS)
        self._events: zmq.asyncio.Socket = context.socket(zmq.PAIR)
        self._events.rcvhwm = 100_000
        self._events.connect(endpoint)
        _watching.add(self)

    def start(self) -> None:
        """From now on, in the running event loop, until the socket is closed."""
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            event = parse_monitor_message(await self._events.recv_multipart())
            if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                self._events.close(linger=0)
                return
            self._saw(event["event"], event["value"])

    def _saw(self, event: int, handle: int) -> None:
        self._young.pop(handle, None)
        if event != zmq.EVENT_ACCEPTED:
            return
        number = _identity(handle)
        if number is None:
            return
        now = time.monotonic()
        self._young[handle] = (number, now)
        while len(self._young) > self._most:
            oldest = next(iter(self._young))
            number, since = self._young.pop(oldest)
            if now - since < HANDSHAKE_SECONDS:
                _cut_off(oldest, number)

    @property
    def closed(self) -> bool:
        """Whether there is nothing to watch any more."""
        return self._watched.closed and self._events.closed

    def passed(self, handle: int) -> None:
        """A message came through this connection."""
        self._young.pop(handle, None)

    def close(self) -> None:
        """Stop watching."""
        if self._task is not None:
            self._task.cancel()
        if not self._watched.closed:
            self._watched.disable_monitor()
        self._events.close(linger=0)


def passed(message: zmq.Frame) -> None:
    """A message came out of a watched socket: its connection is no longer half open."""
    with contextlib.suppress(zmq.ZMQError):
        handle = int(message.get("__fd"))
        for each in _watching:
            each.passed(handle)


def _identity(handle: int) -> int | None:
    """What tells a connection from a later one with the same handle; None where the system has nothing of the kind."""
    if os.name != "posix":
        return None
    try:
        return os.fstat(handle).st_ino
    except OSError:
        return None


def _cut_off(handle: int, number: int) -> None:
    """End a connection under libzmq, which then cleans up, unless another has taken its handle meanwhile."""
    try:
        own = os.dup(handle)
    except OSError:
        return
    if _identity(own) != number:
        os.close(own)
        return
    with system_socket.socket(fileno=own) as connection, contextlib.suppress(OSError):
        connection.shutdown(system_socket.SHUT_RDWR)
