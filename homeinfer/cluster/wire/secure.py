"""Sockets between machines for asyncio: CURVE, and whoever's key is not allowed hears nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
from collections.abc import Sequence
from typing import Any, NoReturn

import zmq
import zmq.asyncio

from homeinfer.cluster.wire.guard import Guard, OnEvent, count_taken, wire_bytes
from homeinfer.cluster.wire.keepalive import keep_alive
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.ledger import HANDSHAKE_SECONDS, Ledger
from homeinfer.cluster.wire.zap import ASKED_AT, IsAllowed, ask_at_door, zap_reply
from homeinfer.errors import HomeinferError

_HANDSHAKE_MS = int(HANDSHAKE_SECONDS * 1000)
_LINGER_MS = 1000
_MOST_HELD, _LEAST_HELD = 32 << 20, 1 << 18
"""Bytes that one peer may have waiting here, unread; no message needs more room than a few frames of the largest."""
_QUEUE = 1000


def tcp_address(host: str, port: int | str) -> str:
    """ZeroMQ's address of a host by name, IPv4 or IPv6; port * for a free one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def bound_port(socket: zmq.asyncio.Socket) -> int:
    """The port on which a socket listens."""
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def sender_key(frame: zmq.Frame) -> str:
    """The public key (Z85), proven in the handshake, of who sent a frame that came out of a Secure.router's
    recv_multipart(copy=False). Raises HomeinferError for a frame that came another way."""
    return _property(frame, "User-Id")


def sender_host(frame: zmq.Frame) -> str:
    """The IP address that a frame came from. Raises HomeinferError as sender_key."""
    address = ipaddress.ip_address(_property(frame, "Peer-Address").partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:
        raise HomeinferError("a message came without its sender's key") from None


class Secure:
    """A device's encrypted sockets, all in one ZeroMQ context. Make and close it where the event loop runs."""

    def __init__(self, keys: DeviceKeys) -> None:
        self.keys = keys
        self._context: zmq.Context[Any] = zmq.Context()
        self._guard = Guard(self._context)
        self._sockets: list[_Counted] = []
        self._is_allowed: dict[bytes, IsAllowed] = {}
        self._zap = zmq.asyncio.Socket(self._context, zmq.REP)
        self._zap.bind(ASKED_AT)
        self._answering = asyncio.create_task(self._answer_zap())

    def router(
        self, address: str, domain: str, is_allowed: IsAllowed, most_bytes: int, *, most_unsent: int = _QUEUE
    ) -> zmq.asyncio.Socket:
        """A ROUTER that listens at tcp://HOST:PORT (HOST * for all, IPv6 in brackets; PORT * for a free one).

        is_allowed is asked, with the key (Z85) that a peer has proven to hold, at each of its handshakes: connections
        that exist stay, so ask again (sender_key) where a device may have been forgotten meanwhile. No frame may have
        more than most_bytes; who sends one is cut off. most_unsent: messages that wait for one peer to take them;
        further ones are dropped. (Never change that of a socket in use: where a connection ends meanwhile, libzmq
        4.3.5 crashes.) domain: what this is for, in errors and logs. Raises HomeinferError where it can't listen.
        """
        socket = self._socket(zmq.ROUTER, most_bytes)
        socket.sndhwm = most_unsent
        zap_domain = f"{domain}.{len(self._is_allowed)}".encode()
        self._is_allowed[zap_domain] = is_allowed
        ask_at_door(socket, zap_domain)
        try:
            socket.bind(address)
        except zmq.ZMQError as problem:
            socket.close(linger=0)
            raise HomeinferError(_cannot_listen(address, domain, problem)) from None
        return socket

    def dealer(
        self,
        address: str | Sequence[str],
        server_key: str,
        most_bytes: int,
        *,
        waits: bool = False,
        on_event: OnEvent = lambda _: None,
    ) -> zmq.asyncio.Socket:
        """A DEALER to who listens at an address (or the first of several that answers) and holds server_key.

        It connects, and after a loss connects again, for ever. waits: messages are sent when the other end has shown
        its key, and wait here until then; otherwise they queue. on_event: Guard.watch. Raises HomeinferError for what
        is no address.
        """
        socket = self._socket(zmq.DEALER, most_bytes, on_event)
        socket.curve_serverkey = server_key.encode()
        socket.immediate = waits
        try:
            for one in [address] if isinstance(address, str) else address:
                connect(socket, one)
        except HomeinferError:
            socket.close(linger=0)
            raise
        return socket

    def _socket(self, kind: int, most_bytes: int, on_event: OnEvent = lambda _: None) -> _Counted:
        self._sockets = [socket for socket in self._sockets if not socket.closed]
        try:
            with contextlib.ExitStack() as opened:
                socket = opened.enter_context(_Counted(self._context, kind))
                self._set_up(socket, kind, most_bytes, on_event)
                opened.pop_all()
        except zmq.ZMQError as problem:
            raise HomeinferError(
                f"this device can't open another connection ({problem.strerror}): close other programs"
            ) from None
        self._sockets.append(socket)
        return socket

    def _set_up(self, socket: _Counted, kind: int, most_bytes: int, on_event: OnEvent) -> None:
        socket.curve_publickey = self.keys.public.encode()
        socket.curve_secretkey = self.keys.secret.encode()
        socket.ipv6 = True
        socket.linger = _LINGER_MS
        socket.sndhwm = _QUEUE
        socket.handshake_ivl = _HANDSHAKE_MS
        keep_alive(socket)
        socket.reconnect_ivl, socket.reconnect_ivl_max = 200, 1000
        socket.connect_timeout = 5000
        most_held = max(3 * most_bytes, _LEAST_HELD, min(64 * most_bytes, _MOST_HELD))
        socket.ledger = self._guard.watch(
            socket,
            most_bytes,
            most_held,
            listens=kind == zmq.ROUTER,
            most_queued=max(2, min(_QUEUE, _MOST_HELD // most_bytes)),
            on_event=on_event,
        )

    async def _answer_zap(self) -> None:
        while True:
            request = await self._zap.recv_multipart()
            await self._zap.send_multipart(zap_reply(request, self._is_allowed))

    def close(self) -> None:
        """Close all sockets; what they still have to send leaves within a second or not at all."""
        self._answering.cancel()
        for socket in self._sockets:
            socket.close()
        self._zap.close(linger=0)
        self._guard.close()
        self._context.term()


class _Counted(zmq.asyncio.Socket):
    """Tells the guard's ledger of each message that is taken, by recv_multipart only."""

    ledger: Ledger | None = None

    def recv(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("use recv_multipart: it counts")

    def recv_multipart(  # type: ignore[override]
        self, flags: int = 0, copy: bool = True, track: bool = False
    ) -> asyncio.Future[Any]:
        received = asyncio.ensure_future(super().recv_multipart(flags, copy=False, track=track))
        if received.done():
            self._took(received)
        else:
            if self.ledger is not None:
                self.ledger.emptied()
            received.add_done_callback(self._took)
        return asyncio.ensure_future(_as_bytes(received)) if copy else received

    def _took(self, received: asyncio.Future[Any]) -> None:
        if self.ledger is not None and not received.cancelled() and received.exception() is None:
            frames = frames_of(received.result())
            on_wire = frames[1:] if self.type == zmq.ROUTER else frames  # ROUTER's first is its own
            count_taken(self.ledger, frames[-1], sum(wire_bytes(len(frame)) for frame in on_wire))


async def _as_bytes(received: asyncio.Future[Any]) -> list[bytes]:
    return [frame.bytes for frame in await received]


def connect(socket: zmq.asyncio.Socket, address: str) -> None:
    """Connect to one more address. Raises HomeinferError for what is none."""
    try:
        socket.connect(address)
    except zmq.ZMQError as problem:
        raise HomeinferError(f"{address.removeprefix('tcp://')} is no address: {problem.strerror}") from None


def _cannot_listen(address: str, domain: str, problem: zmq.ZMQError) -> str:
    where = address.removeprefix("tcp://")
    if problem.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program: no {domain} socket can listen there; choose another port"
    return f"can't listen at {where} ({domain}): {problem.strerror}"


async def received(socket: zmq.asyncio.Socket, seconds: float) -> list[zmq.Frame] | None:
    """The next message, None when none came in time."""
    receiving = asyncio.ensure_future(socket.recv_multipart(copy=False))
    try:
        await asyncio.wait({receiving}, timeout=max(0.0, seconds))
        return frames_of(receiving.result()) if receiving.done() else None
    finally:
        receiving.cancel()


def frames_of(message: Any) -> list[zmq.Frame]:
    """A message as recv_multipart(copy=False) gave it, typed."""
    return [frame for frame in message if isinstance(frame, zmq.Frame)]
