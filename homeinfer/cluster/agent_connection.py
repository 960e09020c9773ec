"""An agent's connection to the head: made, watched, and made again for ever."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket as sockets
import time
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import LOST_SECONDS, MOST_BYTES, Bye, FromAgent, FromHead, Hello, Refuse, Welcome
from homeinfer.cluster.wire.ledger import HANDSHAKE_SECONDS
from homeinfer.cluster.wire.secure import Secure, frames_of, tcp_address
from homeinfer.errors import HomeinferError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0
_KNOCK_SECONDS = 2.0
_FIND_SECONDS = 60.0
_LAST_WORD_MS, _LAST_TRY_MS = 1000, 100
"""What was said last has so long to go out: on a connection that works, and otherwise."""


Reached = Literal["nothing", "port", "refusal", "head"]
"""How far a connection came: to nothing; to something that listens and says nothing, as a head does to strangers; to
who breaks off at once, as a head does whose key is another; into the head."""


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
        self._secure, self._key = secure, head.key
        self._known = tuple((host, head.port) for host in head.hosts)
        self._places = self._known
        self._hello, self._on_seek, self._find = hello, on_seek, find
        self._socket: zmq.asyncio.Socket | None = None
        self._is_member = False
        self._linger_ms = 0
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
            host, port = self._places[turn % len(self._places)]
            self._on_seek(host, "", self.away_seconds)
            was_member, left, reason = await self._talk(host, port, heard)
            if left is not None:
                return left
            self._on_seek(host, reason, self.away_seconds)
            turn = turn if was_member else turn + 1
            if was_member or turn % len(self._places) == 0:
                await self._pause(0 if was_member else turn // len(self._places))

    async def _pause(self, rounds: int) -> None:
        """What is found may be anybody's word: it comes before the known addresses, and never in their place."""
        is_time = rounds >= 2 and time.monotonic() - self._found > _FIND_SECONDS
        if is_time and self._find is not None:
            self._found = time.monotonic()
            hosts, port = await self._find()
            if hosts:
                self._places = tuple(dict.fromkeys((*((host, port) for host in hosts), *self._known)))
        await asyncio.sleep(min(_FIRST_PAUSE * 2 ** min(rounds, 10), _LONGEST_PAUSE))

    async def _talk(self, host: str, port: int, heard: Callable[[FromHead], None]) -> tuple[bool, Left | None, str]:
        """One connection: whether it came to a Welcome, how the head ended it, why it is lost otherwise."""
        try:
            own = await asyncio.to_thread(own_address, host, port)
        except OSError as problem:
            return False, None, _unreachable(host, port, problem)
        watch = _Watch()
        try:
            opened = self._secure.dealer(tcp_address(host, port), self._key, MOST_BYTES, on_event=watch.saw)
        except HomeinferError as problem:
            return False, None, str(problem)
        self._socket = opened
        try:
            self._put(self._hello(own))
            left = await self._listen(opened, watch, host, heard)
            was_member = self._is_member
        finally:
            self._socket, self._is_member = None, False
            opened.close(linger=self._linger_ms)
        if left is not None or was_member:
            return was_member, left, "" if left is not None else f"{host} is gone"
        return False, None, await why_silent(host, port, watch.reached)

    async def _listen(
        self, opened: zmq.asyncio.Socket, watch: _Watch, host: str, heard: Callable[[FromHead], None]
    ) -> Left | None:
        """Until the head leaves, or is silent for too long (None)."""
        while True:
            frame = await _next(opened, watch.broken, self._patience(watch))
            if frame is None:
                if self._is_member or watch.broken.is_set() or self._patience(watch) <= 0:
                    return None
                continue  # it has connected only meanwhile
            with contextlib.suppress(HomeinferError):  # a newer head may say what this agent does not know
                message = control.from_head(frame)
                self._heard = time.monotonic()
                if isinstance(message, Refuse | Bye):
                    return Left(message.reason, isinstance(message, Refuse))
                if isinstance(message, Welcome):
                    self._is_member, self.host = True, host
                if self._is_member:
                    heard(message)

    def _patience(self, watch: _Watch) -> float:
        """Seconds until the head is taken for gone. Without a Welcome no other sign of life counts: the Hello may have
        been lost."""
        return LOST_SECONDS if self._is_member else max(watch.since + LOST_SECONDS - time.monotonic(), 0)

    def _put(self, message: FromAgent) -> bool:
        if self._socket is None:
            return False
        sent = self._socket.send(control.encode(message), zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)  # done already: it was sent, or could not be without waiting
        return sent.exception() is None

    def leave(self, reason: str) -> None:
        """Say Bye, before `run` is cancelled; it gets a moment to go out, for which Secure.close waits."""
        if self._put(Bye(reason)):
            self._linger_ms = _LAST_WORD_MS if self._is_member else _LAST_TRY_MS


async def _next(opened: zmq.asyncio.Socket, broken: asyncio.Event, seconds: float) -> bytes | None:
    """The next message of one frame, or None when the connection broke or was silent for so long."""
    receiving = asyncio.ensure_future(opened.recv_multipart(copy=False))
    breaking = asyncio.ensure_future(broken.wait())
    try:
        done, _ = await asyncio.wait({receiving, breaking}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if receiving not in done:
            return None
        frames = frames_of(receiving.result())
        return frames[0].bytes if len(frames) == 1 else b""
    finally:
        breaking.cancel()
        receiving.cancel()


class _Watch:
    """What ZeroMQ notices of a connection: TCP says at once when the other process has ended."""

    def __init__(self) -> None:
        self.broken = asyncio.Event()
        self.reached: Reached = "nothing"
        self.since = time.monotonic()
        """When it was begun; as soon as there is a connection, when that was made."""
        self._loop = asyncio.get_running_loop()

    def saw(self, event: int) -> None:
        """For another thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._note, event)

    def _note(self, event: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self.reached, self.since = "port", time.monotonic()
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.reached = "head"
        elif event == zmq.EVENT_DISCONNECTED:
            is_early = time.monotonic() - self.since < HANDSHAKE_SECONDS / 2
            self.reached = "refusal" if self.reached == "port" and is_early else self.reached
            self.broken.set()


def own_address(host: str, port: int) -> str:
    """The address that this device has towards another one; nothing is sent. Raises OSError without a way there."""
    try:
        family, kind, protocol, _, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_DGRAM)[0]
    except UnicodeError:
        raise OSError(errno.EINVAL, "no name of a host") from None
    with sockets.socket(family, kind, protocol) as asked:
        asked.connect(address)
        return str(asked.getsockname()[0])


async def why_silent(host: str, port: int, reached: Reached) -> str:
    """Why a head did not answer, and what to check, in one line."""
    if reached == "refusal":
        return (
            f"{host} doesn't answer this device: another head runs there, or this one's keys are new; join again with "
            "a new code (`homeinfer cluster code` on the head)"
        )
    if reached == "nothing":
        try:
            async with asyncio.timeout(_KNOCK_SECONDS):
                _, writer = await asyncio.open_connection(host, port)
            writer.close()
        except ConnectionRefusedError:
            return (
                f"{host} is there, but nothing listens at its port {port}: start `homeinfer cluster up` on it (with "
                "the same --port)"
            )
        except (OSError, TimeoutError) as problem:
            return _unreachable(host, port, problem)
    if reached == "port":
        return (
            f"{host} doesn't answer this device: the head may be starting, or busy; if this goes on, it has forgotten "
            "this device; join again with a new code (`homeinfer cluster code` on the head)"
        )
    return f"{host} is there, but says nothing yet: the head may be starting, or busy"


def _unreachable(host: str, port: int, problem: Exception) -> str:
    why = getattr(problem, "strerror", None) or "no answer"
    return (
        f"{host} can't be reached ({why}): is it on, is it in the same network, and does its firewall let TCP port "
        f"{port} in?"
    )
