"""A peer with a ZMTP stack of its own (RFC 23 and 26): it has the right keys, and says what libzmq never would.

Its cryptography is the libsodium that libzmq itself was loaded with.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket as system_socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
from zmq.utils import z85

from homeinfer.cluster.wire.transport import new_keys

_GREETING = bytes([0xFF, *[0] * 8, 0x7F, 3, 1]) + b"CURVE".ljust(20, b"\0")
MORE, COMMAND = 1, 2
"""Flags of a message inside its encryption."""
PING = b"\x04PING\0\0"


def _sodium() -> ctypes.CDLL:
    paths = {Path(each.path) for each in psutil.Process().memory_maps() if "sodium" in Path(each.path).name}
    return ctypes.CDLL(str(next(iter(paths))))


_library = _sodium()


def _box(plain: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    out = ctypes.create_string_buffer(len(plain) + 16)
    assert _library.crypto_box_easy(out, plain, ctypes.c_ulonglong(len(plain)), nonce, public, secret) == 0
    return out.raw


def _unbox(boxed: bytes, nonce: bytes, public: bytes, secret: bytes) -> bytes:
    out = ctypes.create_string_buffer(len(boxed) - 16)
    assert _library.crypto_box_open_easy(out, boxed, ctypes.c_ulonglong(len(boxed)), nonce, public, secret) == 0
    return out.raw


class Pair(NamedTuple):
    """Keys as 32 bytes each."""

    public: bytes
    secret: bytes


def raw_pair(public: str, secret: str) -> Pair:
    return Pair(z85.decode(public), z85.decode(secret))


def zmtp_frame(body: bytes, flags: int = 0) -> bytes:
    """As it stands on the wire. flags: 4 for a command."""
    long = len(body) > 255
    return bytes([flags | (2 if long else 0)]) + (struct.pack(">Q" if long else ">B", len(body))) + body


def _metadata(kind: bytes) -> bytes:
    fields = ((b"Socket-Type", kind), (b"Identity", b""))
    return b"".join(bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in fields)


class OwnZmtp:
    """One connection after its handshake."""

    def __init__(self, connection: system_socket.socket, kind: bytes) -> None:
        self.connection = connection
        self._kind = kind
        self._stream = connection.makefile("rb")
        self._short = Pair(*map(z85.decode, new_keys()))
        self._count = 0
        self._theirs = b""
        self._side = b"C"

    def connect(self, own: Pair, server: bytes) -> None:
        """The client's handshake."""
        self.initiate(own, server)
        assert self._next_frame()[:6] == b"\x05READY"

    def initiate(self, own: Pair, server: bytes) -> None:
        """The client's part of it: whether it is let in is up to the server now."""
        self.greet(as_server=False)
        box = _box(bytes(64), b"CurveZMQHELLO---" + self._nonce(), server, self._short.secret)
        hello = b"\x05HELLO\1\0" + bytes(72) + self._short.public + self._last_nonce() + box
        self.connection.sendall(zmtp_frame(hello, 4))
        welcome = self._next_frame()
        assert welcome[:8] == b"\x07WELCOME"
        inside = _unbox(welcome[24:], b"WELCOME-" + welcome[8:24], server, self._short.secret)
        self._theirs, cookie = inside[:32], inside[32:]
        vouch = _box(self._short.public + server, b"VOUCH---" + bytes(16), self._theirs, own.secret)
        plain = own.public + bytes(16) + vouch + _metadata(self._kind)
        box = _box(plain, b"CurveZMQINITIATE" + self._nonce(), self._theirs, self._short.secret)
        self.connection.sendall(zmtp_frame(b"\x08INITIATE" + cookie + self._last_nonce() + box, 4))

    def heard_to_the_end(self) -> bytes:
        """What the other side sends from now on until it closes the connection."""
        return self._stream.read()

    def accept(self, own: Pair) -> None:
        """The server's handshake; whoever comes is let in."""
        self._side = b"S"
        self.greet(as_server=True)
        hello = self._next_frame()
        assert hello[:6] == b"\x05HELLO"
        self._theirs = hello[80:112]
        box = _box(self._short.public + bytes(96), b"WELCOME-" + bytes(16), self._theirs, own.secret)
        self.connection.sendall(zmtp_frame(b"\x07WELCOME" + bytes(16) + box, 4))
        assert self._next_frame()[:9] == b"\x08INITIATE"
        box = _box(_metadata(self._kind), b"CurveZMQREADY---" + self._nonce(), self._theirs, self._short.secret)
        self.connection.sendall(zmtp_frame(b"\x05READY" + self._last_nonce() + box, 4))

    def greet(self, *, as_server: bool) -> None:
        self.connection.sendall(_GREETING + bytes([as_server]) + bytes(31))
        self._exactly(64)

    def message(self, payload: bytes, flags: int = 0) -> bytes:
        """An encrypted frame as it stands on the wire, to be sent in this order."""
        nonce = b"CurveZMQMESSAGE" + self._side + self._nonce()
        box = _box(bytes([flags]) + payload, nonce, self._theirs, self._short.secret)
        return zmtp_frame(b"\x07MESSAGE" + nonce[16:] + box)

    def send(self, payload: bytes, flags: int = 0) -> None:
        self.connection.sendall(self.message(payload, flags))

    def _nonce(self) -> bytes:
        self._count += 1
        return self._last_nonce()

    def _last_nonce(self) -> bytes:
        return struct.pack(">Q", self._count)

    def _next_frame(self) -> bytes:
        flags = self._exactly(1)
        (length,) = struct.unpack(">Q", self._exactly(8)) if flags[0] & 2 else self._exactly(1)
        return self._exactly(length)

    def _exactly(self, n: int) -> bytes:
        read = self._stream.read(n)
        if len(read) < n:
            raise ConnectionAbortedError("the other end closed the connection")
        return read

    def close(self) -> None:
        self._stream.close()
        self.connection.close()


@contextlib.contextmanager
def listening(own: Pair, kind: bytes) -> Iterator[tuple[int, Callable[[], OwnZmtp]]]:
    """The port of a listener on the loopback, and what waits for the next who comes."""
    peers: list[OwnZmtp] = []

    def accepted() -> OwnZmtp:
        connection, _ = listener.accept()
        connection.settimeout(30)
        peers.append(OwnZmtp(connection, kind))
        peers[-1].accept(own)
        return peers[-1]

    with system_socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener.getsockname()[1], accepted
    for peer in peers:
        peer.close()


@contextlib.contextmanager
def dialled(port: int, own: Pair, server_key: str, kind: bytes = b"DEALER") -> Iterator[OwnZmtp]:
    """Connected to a listener on the loopback that allows its key."""
    peer = OwnZmtp(system_socket.create_connection(("127.0.0.1", port), 30), kind)
    try:
        peer.connect(own, z85.decode(server_key))
        yield peer
    finally:
        peer.close()


def heard_by_a_stranger(port: int, server_key: str, kind: bytes, own: Pair | None = None) -> bytes:
    """All that a listener on the loopback says after the handshake to one whose key it does not allow: on a connection
    that waits, and on one over which a message is sent nevertheless."""
    heard = b""
    for message in (b"", b"let me in"):
        peer = OwnZmtp(system_socket.create_connection(("127.0.0.1", port), 30), kind)
        try:
            peer.initiate(own or raw_pair(*new_keys()), z85.decode(server_key))
            with contextlib.suppress(ConnectionError) if message else contextlib.nullcontext():
                if message:
                    peer.send(message)
                heard += peer.heard_to_the_end()
        finally:
            peer.close()
    return heard
