"""Sockets between machines for asyncio: CURVE, and whoever's key is not allowed hears nothing."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils import z85

from homeinfer.cluster.wire.half_open import HANDSHAKE_SECONDS, HalfOpen, passed
from homeinfer.cluster.wire.keepalive import keep_alive
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.errors import HomeinferError

_HANDSHAKE_MS = int(HANDSHAKE_SECONDS * 1000)
_LINGER_MS = 1000
_RECEIVED_BYTES = 32 << 20
"""What one connection may have waiting here, unread, in messages of one frame."""
_QUEUE = 1000
_REFUSED = b"300"
"""ZAP's "try again later": the only status that libzmq doesn't tell the refused one."""

IsAllowed = Callable[[str], bool]
_log = logging.getLogger(__name__)


def tcp_address(host: str, port: int | str) -> str:
    """ZeroMQ's address of a host by name, IPv4 or IPv6; port * for a free one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def bound_port(socket: zmq.asyncio.Socket) -> int:
    """The port on which a socket listens."""
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def sender_key(frame: zmq.Frame) -> str:
    """The public key (Z85), proven in the handshake, of who sent a frame that came out of a Secure.router's
    recv_multipart(copy=False). Raises HomeinferError for a frame that came another way."""
    key = _property(frame, "User-Id")
    passed(frame)
    return key


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
        self._context = zmq.asyncio.Context()
        self._sockets: list[zmq.asyncio.Socket] = []
        self._guards: dict[bytes, IsAllowed] = {}
        self._half_open: list[HalfOpen] = []
        self._zap: zmq.asyncio.Socket = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._answering = asyncio.create_task(self._answer_zap())

    def router(self, address: str, domain: str, is_allowed: IsAllowed, most_bytes: int) -> zmq.asyncio.Socket:
        """A ROUTER that listens at tcp://HOST:PORT (HOST * for all, IPv6 in brackets; PORT * for a free one).

        is_allowed is asked, with the key (Z85) that a peer has proven to hold, at each of its handshakes: connections
        that exist stay, so ask again (sender_key) where a device may have been forgotten meanwhile. No frame may have
        more than most_bytes; who sends one is cut off. domain: what this is for, in errors and logs. Raises
        HomeinferError where it can't listen.
        """
        socket = self._socket(zmq.ROUTER, most_bytes)
        zap_domain = f"{domain}.{len(self._guards)}".encode()
        self._guards[zap_domain] = is_allowed
        socket.curve_server = True
        socket.zap_domain = zap_domain
        half_open = HalfOpen(self._context, socket, most_bytes)
        try:
            socket.bind(address)
        except zmq.ZMQError as problem:
            half_open.close()
            socket.close(linger=0)
            raise HomeinferError(_cannot_listen(address, domain, problem)) from None
        half_open.start()
        self._half_open = [*(each for each in self._half_open if not each.closed), half_open]
        return socket

    def dealer(
        self, address: str | Sequence[str], server_key: str, most_bytes: int, *, waits: bool = False
    ) -> zmq.asyncio.Socket:
        """A DEALER to who listens at an address (or the first of several that answers) and holds server_key.

        It connects, and after a loss connects again, for ever. waits: messages are sent when the other end has shown
        its key, and wait here until then; otherwise they queue. Raises HomeinferError for what is no address.
        """
        socket = self._socket(zmq.DEALER, most_bytes)
        socket.curve_serverkey = server_key.encode()
        socket.immediate = waits
        for one in [address] if isinstance(address, str) else address:
            connect(socket, one)
        return socket

    def _socket(self, kind: int, most_bytes: int) -> zmq.asyncio.Socket:
        self._sockets = [socket for socket in self._sockets if not socket.closed]
        socket: zmq.asyncio.Socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.curve_publickey = self.keys.public.encode()
        socket.curve_secretkey = self.keys.secret.encode()
        socket.ipv6 = True
        socket.linger = _LINGER_MS
        socket.maxmsgsize = most_bytes
        socket.rcvhwm = max(2, min(_QUEUE, _RECEIVED_BYTES // most_bytes))
        socket.sndhwm = _QUEUE
        socket.handshake_ivl = _HANDSHAKE_MS
        keep_alive(socket)
        socket.reconnect_ivl, socket.reconnect_ivl_max = 200, 5000
        socket.connect_timeout = 5000
        return socket

    async def _answer_zap(self) -> None:
        while True:
            request = await self._zap.recv_multipart()
            await self._zap.send_multipart(zap_reply(request, self._guards))

    def close(self) -> None:
        """Close all sockets; what they still have to send leaves within a second or not at all."""
        self._answering.cancel()
        for half_open in self._half_open:
            half_open.close()
        for socket in self._sockets:
            socket.close()
        self._zap.close(linger=0)
        self._context.term()


def connect(socket: zmq.asyncio.Socket, address: str) -> None:
    """Connect to one more address. Raises HomeinferError for what is none."""
    try:
        socket.connect(address)
    except zmq.ZMQError as problem:
        raise HomeinferError(f"{address.removeprefix('tcp://')} is no address: {problem.strerror}") from None


def zap_reply(request: Sequence[bytes], guards: dict[bytes, IsAllowed]) -> list[bytes]:
    """The answer (RFC 27) to what libzmq asks about a peer in a handshake; guards by ZAP domain. What isn't CURVE, or
    whose guard fails, is refused."""
    version, request_id, domain, _address, _identity, mechanism, *credentials = request
    guard = guards.get(domain)
    if guard is None or mechanism != b"CURVE" or [len(key) for key in credentials] != [32]:
        return [version, request_id, _REFUSED, b"", b"", b""]
    key: str = z85.encode(credentials[0]).decode()
    if not _passes(guard, key):
        return [version, request_id, _REFUSED, b"", b"", b""]
    return [version, request_id, b"200", b"OK", key.encode(), b""]


def _passes(guard: IsAllowed, key: str) -> bool:
    try:
        return guard(key)
    except Exception:  # a guard that fails must neither let in nor end the task that all handshakes wait for
        _log.exception("a device could not be checked")
        return False


def _cannot_listen(address: str, domain: str, problem: zmq.ZMQError) -> str:
    where = address.removeprefix("tcp://")
    if problem.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program: no {domain} socket can listen there; choose another port"
    return f"can't listen at {where} ({domain}): {problem.strerror}"


def frames_of(message: Any) -> list[zmq.Frame]:
    """A message as recv_multipart(copy=False) gave it, typed."""
    return [frame for frame in message if isinstance(frame, zmq.Frame)]
