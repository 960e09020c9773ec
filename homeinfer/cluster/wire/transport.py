"""Sockets of the ring. Nothing listens in the clear: on one machine they are files that only this user
can open, between machines every socket is CURVE with known keys."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import zmq

from homeinfer.cluster.wire.guard import Guard, count_taken, wire_bytes
from homeinfer.cluster.wire.keepalive import keep_alive
from homeinfer.cluster.wire.ledger import Ledger
from homeinfer.cluster.wire.messages import is_split
from homeinfer.cluster.wire.peers import Keys, Peer, new_keys
from homeinfer.errors import HomeinferError


def has_ipc() -> bool:
    """Whether ZeroMQ has sockets that are files here."""
    return bool(zmq.has("ipc")) and sys.platform != "win32"


__all__ = ["Keys", "Links", "Peer", "has_ipc", "new_keys", "send"]
_ZERO_COPY = 1 << 20
"""Sending without a copy wakes a thread of pyzmq's when the message has left, 0.4 ms: worth it from here on."""
_HANDSHAKE_MS = 5000
_MOST_QUEUED = 64
_MOST_PARTS = 2
_MOST_HELD, _HELD_MESSAGES = 64 << 20, 16
"""Bytes, but at least so many of the largest messages, that one device on the network may have waiting here: more than
a ring has under way (teller: one step of a prompt for each window and one more)."""
_MOST_ANSWER = 1024
"""Bytes of a frame that a connection for sending takes in: handshakes need some hundreds, and nothing else is said."""
_MOST_ANSWERS = 1 << 16


def send(socket: zmq.Socket[bytes], frames: list[Any], flags: int = 0) -> None:
    """Queue a message of one or two frames; a large second one must not change until it has left.

    Waits where the other end broke the protocol; with zmq.NOBLOCK raises zmq.Again there.
    """
    if len(frames) == 1:
        socket.send(frames[0], flags)
    else:
        socket.send(frames[0], zmq.SNDMORE | flags)
        socket.send(frames[1], flags, copy=frames[1].nbytes < _ZERO_COPY)


class Links:
    """One process's end of the ring: a socket to receive on, and one for each device to send to.

    For one thread, but for `wake`, which is for one other thread.
    """

    def __init__(
        self,
        listen: str,
        keys: Keys | None = None,
        *,
        max_bytes: int = -1,
        patience_ms: int = -1,
        most_queued: int = _MOST_QUEUED,
    ) -> None:
        """Listen at `ipc://FILE` or `tcp://HOST:PORT` (port * for a free one).

        A peer on the network that sends a frame of more than max_bytes is cut off, and so is one that has more waiting
        here than a ring ever has under way; receive waits patience_ms (-1: for ever). most_queued: messages of one
        sender that wait here, where bytes are not counted (a file, macOS, Windows); further ones wait on its side.
        Raises HomeinferError for tcp without keys, or a taken address.
        """
        self._context = zmq.Context()
        self._guard: Guard | None = None
        self._ledger: Ledger | None = None
        self._most_queued = most_queued
        self._keys = keys
        self._senders: dict[Peer, zmq.Socket[bytes]] = {}
        self._waker: zmq.Socket[bytes] | None = None
        self._allowed = frozenset(keys.allowed if keys else ())
        self._is_file = listen.startswith("ipc://")
        self._receiver: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._receiver.maxmsgsize = max_bytes
        self._receiver.rcvtimeo = patience_ms
        self._receiver.rcvhwm = most_queued
        self._receiver.handshake_ivl = _HANDSHAKE_MS
        self._wake_address = f"inproc://wake-{id(self)}"
        try:
            self._secure(listen, self._receiver, max_bytes)
            self._receiver.bind(self._wake_address)
            self._bind(listen)
        except zmq.ZMQError as problem:
            self.close()
            raise HomeinferError(f"can't listen at {listen}: {problem.strerror}") from problem
        except BaseException:
            self.close()
            raise
        self.address = self._receiver.getsockopt_string(zmq.LAST_ENDPOINT)

    def _secure(self, listen: str, receiver: zmq.Socket[bytes], max_bytes: int) -> None:
        if self._is_file:
            return
        if self._keys is None:
            raise HomeinferError(f"{listen} would listen in the clear: a ring over a network needs keys")
        self._guard = Guard(self._context)
        most_held = max(_MOST_HELD, _HELD_MESSAGES * max_bytes)
        self._ledger = self._guard.watch(receiver, max_bytes, most_held, listens=True, most_queued=self._most_queued)
        receiver.curve_publickey = self._keys.public.encode()
        receiver.curve_secretkey = self._keys.secret.encode()
        self._guard.admit(receiver, "ring", lambda key: key in self._allowed)

    def _bind(self, listen: str) -> None:
        self._receiver.ipv6 = "[" in listen or "//*" in listen
        try:
            self._receiver.bind(listen)
        except zmq.ZMQError:
            if "[" in listen or not self._receiver.ipv6:
                raise
            self._receiver.ipv6 = False  # a system without IPv6
            self._receiver.bind(listen)

    def allow(self, keys: Iterable[str]) -> None:
        """From now on only these public keys may send; what others sent already is dropped unread."""
        self._allowed = frozenset(keys)  # replaced whole: the guard's thread reads it

    def sender(self, peer: Peer) -> zmq.Socket[bytes]:
        """The socket to a peer, for `send`. Raises HomeinferError for a network address without its key."""
        if peer not in self._senders:
            self._senders[peer] = self._connected(peer)
        return self._senders[peer]

    def _connected(self, peer: Peer) -> zmq.Socket[bytes]:
        is_file = peer.address.startswith("ipc://")
        if not is_file and (self._keys is None or peer.public is None):
            raise HomeinferError(f"{peer.address} would be reached in the clear: a ring needs keys there")
        sender: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        sender.linger = 1000
        sender.reconnect_ivl, sender.reconnect_ivl_max = 100, 1000
        sender.sndhwm = 0  # what is sent is bounded by what this device has under way: sending must never wait
        try:
            if not is_file and self._keys is not None and peer.public is not None:
                sender.curve_serverkey = peer.public.encode()
                sender.curve_publickey = self._keys.public.encode()
                sender.curve_secretkey = self._keys.secret.encode()
                keep_alive(sender)
                sender.ipv6 = True
                self._guarded(sender)
            sender.connect(peer.address)
        except zmq.ZMQError as problem:
            sender.close(linger=0)
            raise HomeinferError(f"{peer.address} can't be reached: {problem.strerror}") from problem
        except BaseException:  # a socket left open would keep `close` waiting for ever
            sender.close(linger=0)
            raise
        return sender

    def _guarded(self, sender: zmq.Socket[bytes]) -> None:
        """What the other end says there is never taken, so it may not say much."""
        if self._guard is None:
            self._guard = Guard(self._context)
        self._guard.watch(sender, _MOST_ANSWER, _MOST_ANSWERS, listens=False, most_queued=1)

    def send(self, peer: Peer, frames: list[Any]) -> None:
        """Queue a message for a peer, until that lets this device in. Never waits: a connection over which the peer
        broke the protocol is made anew for it.

        Raises HomeinferError for a network address without its key.
        """
        try:
            send(self.sender(peer), frames, zmq.NOBLOCK)
        except zmq.Again:
            self._senders.pop(peer).close(linger=0)
            with contextlib.suppress(zmq.Again):
                send(self.sender(peer), frames, zmq.NOBLOCK)

    def drop_senders(self) -> None:
        """Forget all connections to others, and what still waits to be sent; the next message makes new ones."""
        for sender in self._senders.values():
            sender.close(linger=0)
        self._senders.clear()

    def receive(self) -> list[Any] | None:
        """The next message's frames, or None when none came within `patience_ms`, or this end was woken."""
        return self._receive(0)

    def receive_now(self) -> list[Any] | None:
        """The next message's frames if it is here already, or None."""
        return self._receive(zmq.NOBLOCK)

    def wake(self) -> None:
        """Let a `receive` of another thread return None, now or when it is next called."""
        if self._waker is None:
            self._waker = self._context.socket(zmq.PUSH)
            self._waker.connect(self._wake_address)
        with contextlib.suppress(zmq.Again):  # so much waits there that it wakes anyway
            self._waker.send(b"", zmq.NOBLOCK)

    def _receive(self, flags: int) -> list[Any] | None:
        try:
            return self._from_file(flags) if self._ledger is None else self._from_network(flags, self._ledger)
        except zmq.Again:
            return None

    def _from_file(self, flags: int) -> list[Any] | None:
        first: Any = self._receiver.recv(flags)
        frames = [first]
        if is_split(first):
            frames.append(self._receiver.recv(copy=False).buffer)
        return frames if len(first) else None

    def _from_network(self, flags: int, ledger: Ledger) -> list[Any] | None:
        first = part = self._first_frame(flags, ledger)
        frames, nbytes = [first.buffer], wire_bytes(len(first))
        while part.more:
            part = self._receiver.recv(copy=False)
            nbytes += wire_bytes(len(part))
            if len(frames) < _MOST_PARTS:
                frames.append(part.buffer)
        count_taken(ledger, first, nbytes)
        return frames if self._may_send(first) else None

    def _first_frame(self, flags: int, ledger: Ledger) -> zmq.Frame:
        try:  # zmq.EVENTS announces a message that never comes where its sender left in the middle of it
            return self._receiver.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            ledger.emptied()
            if flags:
                raise
            return self._receiver.recv(copy=False)

    def _may_send(self, frame: zmq.Frame) -> bool:
        """Whether a message is from someone who may send: a connection outlives the permission it was made with."""
        try:
            return frame.get("User-Id") in self._allowed
        except zmq.ZMQError:
            return False

    def close(self) -> None:
        """Close all sockets; what was queued still leaves, within a second."""
        self._receiver.close(linger=0)
        if self._waker is not None:
            self._waker.close(linger=0)
        for sender in self._senders.values():
            sender.close()
        if self._guard is not None:
            self._guard.close()
        self._context.term()
