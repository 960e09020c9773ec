"""Sockets of the ring. Nothing listens in the clear: on one machine they are files that only this user
can open, between machines every socket is CURVE with known keys."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import zmq
import zmq.auth.thread

from homeinfer.cluster.wire.messages import is_split
from homeinfer.errors import HomeinferError


class Keys(msgspec.Struct, frozen=True):
    """A device's CURVE key pair, Z85 text, and the public keys that may send to it."""

    public: str
    secret: str
    allowed: tuple[str, ...]


class Peer(msgspec.Struct, frozen=True):
    """Where to send: an address, and for tcp the receiver's public key."""

    address: str
    public: str | None = None


def new_keys() -> tuple[str, str]:
    """A fresh CURVE key pair: (public, secret)."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def has_ipc() -> bool:
    """Whether ZeroMQ has sockets that are files here."""
    return bool(zmq.has("ipc")) and sys.platform != "win32"


_ZERO_COPY = 1 << 20
"""Sending without a copy wakes a thread of pyzmq's when the message has left, 0.4 ms: worth it from here on."""


def send(socket: zmq.Socket[bytes], frames: list[Any]) -> None:
    """Queue a message of one or two frames; a large second one must not change until it has left."""
    if len(frames) == 1:
        socket.send(frames[0])
    else:
        socket.send(frames[0], zmq.SNDMORE)
        socket.send(frames[1], copy=frames[1].nbytes < _ZERO_COPY)


class Links:
    """One process's end of the ring: a socket to receive on, and one for each device to send to."""

    def __init__(self, listen: str, keys: Keys | None = None, *, max_bytes: int = -1, patience_ms: int = -1) -> None:
        """Listen at `ipc://FILE` or `tcp://HOST:PORT` (port * for a free one).

        A peer that sends a frame of more than max_bytes is cut off; receive waits patience_ms (-1: for ever).
        Raises HomeinferError for tcp without keys, or a taken address.
        """
        self._context = zmq.Context()
        self._keys = keys
        self._senders: dict[Peer, zmq.Socket[bytes]] = {}
        self._authenticator: zmq.auth.thread.ThreadAuthenticator | None = None
        self._receiver: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._receiver.maxmsgsize = max_bytes
        self._receiver.rcvtimeo = patience_ms
        try:
            self._secure(listen, self._receiver)
            self._receiver.bind(listen)
        except HomeinferError:
            self.close()
            raise
        except zmq.ZMQError as problem:
            self.close()
            raise HomeinferError(f"can't listen at {listen}: {problem.strerror}") from problem
        self.address = self._receiver.getsockopt_string(zmq.LAST_ENDPOINT)

    def _secure(self, listen: str, receiver: zmq.Socket[bytes]) -> None:
        if listen.startswith("ipc://"):
            return
        if self._keys is None:
            raise HomeinferError(f"{listen} would listen in the clear: a ring over a network needs keys")
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("ring", credentials_provider=_Allowed(self._keys.allowed))
        receiver.curve_server = True
        receiver.curve_publickey = self._keys.public.encode()
        receiver.curve_secretkey = self._keys.secret.encode()
        receiver.zap_domain = b"ring"

    def sender(self, peer: Peer) -> zmq.Socket[bytes]:
        """The socket to a peer, for `send`. Raises HomeinferError for a network address without its key."""
        if peer not in self._senders:
            is_file = peer.address.startswith("ipc://")
            if not is_file and (self._keys is None or peer.public is None):
                raise HomeinferError(f"{peer.address} would be reached in the clear: a ring needs keys there")
            sender: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
            sender.linger = 1000
            if not is_file and self._keys is not None and peer.public is not None:
                sender.curve_serverkey = peer.public.encode()
                sender.curve_publickey = self._keys.public.encode()
                sender.curve_secretkey = self._keys.secret.encode()
            sender.connect(peer.address)
            self._senders[peer] = sender
        return self._senders[peer]

    def receive(self) -> list[Any] | None:
        """The next message's frames, or None when none came within `patience_ms`."""
        return self._receive(0)

    def receive_now(self) -> list[Any] | None:
        """The next message's frames if it is here already, or None."""
        return self._receive(zmq.NOBLOCK)

    def _receive(self, flags: int) -> list[Any] | None:
        try:
            first = self._receiver.recv(flags)
        except zmq.Again:
            return None
        if not is_split(first):
            return [first]
        frames: list[Any] = [first]
        while self._receiver.getsockopt(zmq.RCVMORE):
            frames.append(self._receiver.recv(copy=False).buffer)
        return frames

    def close(self) -> None:
        """Close all sockets; what was queued still leaves, within a second."""
        self._receiver.close(linger=0)
        for sender in self._senders.values():
            sender.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()


class _Allowed:
    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = frozenset(key.encode() for key in keys)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether the client with this key (Z85) may send: zmq.auth's credentials provider."""
        return key in self._keys
