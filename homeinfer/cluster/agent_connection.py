"""An agent's connection to the head: made, watched, and made again for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket as sockets
import time
from collections.abc import Awaitable, Callable

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import LOST_SECONDS, MOST_BYTES, Bye, FromAgent, FromHead, Hello, Refuse, Welcome
from homeinfer.cluster.wire.secure import Secure, tcp_address
from homeinfer.errors import HomeinferError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0
_KNOCK_SECONDS = 2.0
_FIND_SECONDS = 60.0
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class HeadAddress(msgspec.Struct, frozen=True):
    """Where a head may be, and the key that proves it."""

    hosts: tuple[str, ...]
    port: int
    key: str


class Left(msgspec.Struct, frozen=True):
    """The head ended it: by Refuse (is_refused) or Bye."""

    reason: str
    is_refused: bool


OnSeek = Callable[[str, str, float], None]
"""Called with the host that is being tried, why it did not answer ("" so far), and the seconds since the head was
last heard of."""


class Connection:
    """One head's. `find` says where else it may be when no address answers."""

    def __init__(
        self,
        secure: Secure,
        head: HeadAddress,
        hello: Callable[[str], Hello],
        on_seek: OnSeek,
        find: Callable[[], Awaitable[tuple[tuple[str, ...], int]]] | None = None,
    ) -> None:
        """`hello` makes a connection's first message from the address that this device has towards the head."""
        self._secure, self._head = secure, head
        self._hello, self._on_seek, self._find = hello, on_seek, find
        self._socket: zmq.asyncio.Socket | None = None
        self._is_member = False
        self._heard = time.monotonic()
        self._found = -_FIND_SECONDS
        self.host = ""
        """Where the head was reached last."""

    @property
    def is_member(self) -> bool:
        """Whether the head has said Welcome on the connection that there is now."""
        return self._is_member

    @property
    def away_seconds(self) -> float:
        """Since the head was heard last."""
        return time.monotonic() - self._heard

    def send(self, message: FromAgent) -> bool:
        """Queue a message for the head, when there is one; what it missed it asks for again."""
        return self._is_member and self._put(message)

    async def run(self, heard: Callable[[FromHead], None]) -> Left:
        """Talk to the head, find it again whenever it is lost, until it says that this device may go."""
        turn = 0
        while True:
            hosts = self._head.hosts
            host = hosts[turn % len(hosts)]
            self._on_seek(host, "", self.away_seconds)
            was_member, left, reason = await self._talk(host, heard)
            if left is not None:
                return left
            self._on_seek(host, reason, self.away_seconds)
            turn = turn if was_member else turn + 1
            if was_member or turn % len(hosts) == 0:
                await self._pause(0 if was_member else turn // len(hosts))

    async def _pause(self, rounds: int) -> None:
        is_time = rounds >= 2 and time.monotonic() - self._found > _FIND_SECONDS
        if is_time and self._find is not None:
            self._found = time.monotonic()
            hosts, port = await self._find()
            if hosts:
                every = dict.fromkeys((*hosts, *self._head.hosts))
                self._head = msgspec.structs.replace(self._head, hosts=tuple(every), port=port)
        await asyncio.sleep(min(_FIRST_PAUSE * 2 ** min(rounds, 10), _LONGEST_PAUSE))

    async def _talk(self, host: str, heard: Callable[[FromHead], None]) -> tuple[bool, Left | None, str]:
        """One connection: whether it came to a Welcome, how the head ended it, why it is lost otherwise."""
        try:
            own = await asyncio.to_thread(own_address, host, self._head.port)
        except OSError as problem:
            return False, None, _unreachable(host, self._head.port, problem)
        try:
            opened = self._secure.dealer(tcp_address(host, self._head.port), self._head.key, MOST_BYTES)
        except HomeinferError as problem:
            return False, None, str(problem)
        watch = _Watch(opened)
        self._socket = opened
        try:
            self._put(self._hello(own))
            left = await self._listen(opened, watch, host, heard)
            was_member = self._is_member
        finally:
            self._socket, self._is_member = None, False
            watch.close()
            opened.close(linger=0)
        if left is not None or was_member:
            return was_member, left, "" if left is not None else f"{host} is gone"
        return False, None, await why_silent(host, self._head.port, has_connected=watch.has_connected)

    async def _listen(
        self, opened: zmq.asyncio.Socket, watch: _Watch, host: str, heard: Callable[[FromHead], None]
    ) -> Left | None:
        """Until the head leaves, or is silent for too long (None)."""
        begin = time.monotonic()
        while True:
            # without a Welcome no other sign of life counts: the Hello may have been lost
            left = LOST_SECONDS if self._is_member else max(begin + LOST_SECONDS - time.monotonic(), 0)
            frame = await _next(opened, watch.broken, left)
            if frame is None:
                return None
            with contextlib.suppress(HomeinferError):  # a newer head may say what this agent does not know
                message = control.from_head(frame)
                self._heard = time.monotonic()
                if isinstance(message, Refuse | Bye):
                    return Left(message.reason, isinstance(message, Refuse))
                if isinstance(message, Welcome):
                    self._is_member, self.host = True, host
                if self._is_member:
                    heard(message)

    def _put(self, message: FromAgent) -> bool:
        if self._socket is None:
            return False
        sent = self._socket.send(control.encode(message), zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)  # done already: it was sent, or could not be without waiting
        return sent.exception() is None

    async def leave(self, reason: str) -> None:
        """Say Bye; what is queued gets a moment to go out."""
        if self._put(Bye(reason)):
            await asyncio.sleep(0.1)


async def _next(opened: zmq.asyncio.Socket, broken: asyncio.Event, seconds: float) -> bytes | None:
    """The next message of one frame, or None when the connection broke or was silent for so long."""
    receiving = asyncio.ensure_future(opened.recv_multipart())
    breaking = asyncio.ensure_future(broken.wait())
    try:
        done, _ = await asyncio.wait({receiving, breaking}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if receiving not in done:
            return None
        frames = receiving.result()
        return frames[0] if len(frames) == 1 else b""
    finally:
        breaking.cancel()
        receiving.cancel()


class _Watch:
    """What ZeroMQ notices of a connection: TCP says at once when the other process has ended."""

    def __init__(self, watched: zmq.asyncio.Socket) -> None:
        self.broken = asyncio.Event()
        self.has_connected = False
        self._watched = watched
        self._monitor = watched.get_monitor_socket(_EVENTS)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == zmq.EVENT_CONNECTED:
                self.has_connected = True
            elif event == zmq.EVENT_DISCONNECTED:
                self.broken.set()

    def close(self) -> None:
        self._task.cancel()
        self._watched.disable_monitor()
        self._monitor.close(linger=0)


def own_address(host: str, port: int) -> str:
    """The address that this device has towards another one; nothing is sent. Raises OSError without a way there."""
    family, kind, protocol, _, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_DGRAM)[0]
    with sockets.socket(family, kind, protocol) as asked:
        asked.connect(address)
        return str(asked.getsockname()[0])


async def why_silent(host: str, port: int, *, has_connected: bool) -> str:
    """Why a head did not answer, and what to check, in one line."""
    if not has_connected:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _KNOCK_SECONDS)
            writer.close()
        except ConnectionRefusedError:
            return (
                f"{host} is there, but nothing listens at its port {port}: start `homeinfer cluster up` on it (with "
                "the same --port)"
            )
        except (OSError, TimeoutError) as problem:
            return _unreachable(host, port, problem)
    return (
        f"{host} doesn't answer this device: another head may run there, or this one's keys are new, or it has "
        "forgotten this device; join again with a new code (`homeinfer cluster code` on the head)"
    )


def _unreachable(host: str, port: int, problem: Exception) -> str:
    why = getattr(problem, "strerror", None) or "no answer"
    return (
        f"{host} can't be reached ({why}): is it on, is it in the same network, and does its firewall let TCP port "
        f"{port} in?"
    )
