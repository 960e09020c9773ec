"""What each peer of a socket makes libzmq hold: how many connections, and how many bytes that nobody has taken.

libzmq bounds single frames and the number of whole messages, but neither connections nor a message of endless frames.
And it must never find its queue full: 4.3.5 ends the process (Assertion failed: !_io_error) where a peer's PING waits
behind a full queue, and the peer leaves. So queues have no bound there, and who has too much here is cut off.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from homeinfer.cluster.wire.connection import Connection, seen

HANDSHAKE_SECONDS = 5.0
"""What a peer has for the handshake; libzmq cuts it off then."""
_MOST_CONNECTIONS = 256
_MOST_OF_ONE_KEY = 8
_MOST_YOUNG, _LEAST_YOUNG = 64, 16
_YOUNG_BYTES = 64 << 20
"""What connections may hold together in frames that have only begun, before they have shown a key: libzmq makes room
for a frame when its length is said, and does not say which handshakes are over, so all that are younger count."""


class Ledger:
    """The connections of one socket. Two threads use it: one takes messages, one watches.

    A device that is cut off in a crowd comes back; what it had under way is lost, as with a cable that is pulled.
    """

    def __init__(self, most_bytes: int, most_held: int, *, listens: bool) -> None:
        """most_bytes: of a frame; most_held: bytes that one key's connections may have waiting, and all together that
        have not shown one; listens: peers come here, and not this socket to them."""
        self._most_held, self._listens = most_held, listens
        self._most_young = max(_LEAST_YOUNG, min(_MOST_YOUNG, _YOUNG_BYTES // most_bytes))
        self._connections: dict[int, Connection] = {}
        self._taken: dict[int, int] = {}
        """Of each file descriptor, also before its connection was seen here."""
        self._left: dict[str | None, int] = {}
        """What connections that are closed may have left in the queue."""
        self._is_empty = False
        self._came = 0
        self._lock = threading.Lock()

    def opened(self, handle: int) -> None:
        """libzmq has a new connection, with this file descriptor."""
        with self._lock:
            self._forget(handle)
            connection = seen(handle)
            if connection is None:
                return
            self._connections[handle] = connection
            self._settle()
            if self._left.get(None, 0) > self._most_held:  # who comes and goes at once leaves no time to look
                connection.end()
            if self._listens:
                now = time.monotonic()
                _end_oldest(self._going_on(), _MOST_CONNECTIONS)
                young = (each for each in self._going_on() if each.key is None and now - each.since < HANDSHAKE_SECONDS)
                _end_oldest(young, self._most_young)

    def closed(self, handle: int) -> None:
        """libzmq has ended it."""
        with self._lock:
            connection = self._connections.get(handle)
            if connection is not None:
                self._look_at(handle, connection)
                self._left[connection.key] = self._left.get(connection.key, 0) + connection.held
            self._forget(handle)
            self._taken.pop(handle, None)

    def took(self, handle: int, nbytes: int) -> bool:
        """A message of so many bytes on the wire was taken. Whether nobody has said yet whose connection that is."""
        with self._lock:
            self._is_empty = False
            self._taken[handle] = self._taken.get(handle, 0) + nbytes
            connection = self._connections.get(handle)
            return connection is not None and connection.key is None

    def name(self, handle: int, key: str) -> None:
        """Whose connection it is."""
        with self._lock:
            connection = self._connections.get(handle)
            if connection is not None:
                connection.key = key
                _end_oldest((each for each in self._going_on() if each.key == key), _MOST_OF_ONE_KEY)

    def emptied(self) -> None:
        """No whole message is waiting: whoever takes them waits for the next."""
        self._is_empty = True

    def look(self) -> int:
        """End the connections of those who have too much here. The bytes that came since it was called last."""
        with self._lock:
            self._settle()
            before, self._came = self._came, 0
            for handle, connection in self._connections.items():
                self._look_at(handle, connection)
            held = dict(self._left)
            for connection in sorted(self._going_on(), key=lambda each: each.held):
                held[connection.key] = held.get(connection.key, 0) + connection.held
                if connection.held and held[connection.key] > self._most_held:
                    connection.end()
            return max(self._came - before, 0)

    def most_held_now(self) -> int:
        """Bytes that one connection had waiting when they were last looked at."""
        with self._lock:
            return max((connection.held for connection in self._connections.values()), default=0)

    @property
    def is_idle(self) -> bool:
        """Whether there is no connection to look at."""
        return not self._connections

    @property
    def has_young(self) -> bool:
        """Whether a connection is no older than a handshake may take."""
        with self._lock:
            now = time.monotonic()
            return any(now - each.since < HANDSHAKE_SECONDS for each in self._connections.values())

    def close(self) -> None:
        """Forget all connections."""
        with self._lock:
            for handle in list(self._connections):
                self._forget(handle)

    def _settle(self) -> None:
        if self._is_empty:
            self._left.clear()

    def _look_at(self, handle: int, connection: Connection) -> None:
        received = connection.received()
        if not received:
            return
        taken = min(self._taken.get(handle, 0), received)
        self._came += received
        self._taken[handle] = taken  # more than was received were another's, that had this number before
        connection.held = received - taken

    def _going_on(self) -> list[Connection]:
        return [each for each in self._connections.values() if not each.is_ended]

    def _forget(self, handle: int) -> None:
        connection = self._connections.pop(handle, None)
        if connection is not None:
            connection.close()


def _end_oldest(connections: Iterable[Connection], most: int) -> None:
    every = list(connections)
    for connection in every[: max(0, len(every) - most)]:
        connection.end()
