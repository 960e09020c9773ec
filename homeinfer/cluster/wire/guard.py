"""A thread that watches the connections of sockets (ledger.Ledger), so that no peer takes memory or files beyond a
bound, and lets in whom they allow (zap.Door), whatever the process itself is busy with."""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import zmq

from homeinfer.cluster.wire.connection import CAN_COUNT
from homeinfer.cluster.wire.ledger import Ledger
from homeinfer.cluster.wire.zap import Door, IsAllowed

_LOOK_MS, _QUIET_MS = 100, 250
"""What comes within this time may go beyond a bound, 12 MB at a gigabit per second; longer where it was quiet."""
_QUIET_BYTES = 1 << 20
"""An answer's tokens are quiet: looking takes time of the processor that computes the next one."""
_OPENED = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED
_EVENTS = _OPENED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
_EVENT = struct.Struct("=hi")
"""Kind and file descriptor. (zmq.utils.monitor reads it too, but imports asyncio, which engines do not use.)"""
_numbers: Iterator[int] = count()
OnEvent = Callable[[int], None]
_Watched = tuple[Ledger, OnEvent]
_log = logging.getLogger(__name__)


class Guard:
    """Of the sockets of one context, which are all made and closed by one thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._new: deque[tuple[zmq.Socket[bytes], _Watched]] = deque()
        self._watched: dict[zmq.Socket[bytes], _Watched] = {}
        self._door: Door | None = None
        self._is_closing = False
        address = f"inproc://guard-{next(_numbers)}"
        with contextlib.ExitStack() as opened:  # what is left open would keep the context from ending for ever
            self._woken: zmq.Socket[bytes] = opened.enter_context(context.socket(zmq.PAIR))
            self._waker: zmq.Socket[bytes] = opened.enter_context(context.socket(zmq.PAIR))
            self._woken.bind(address)
            self._waker.connect(address)
            self._thread = threading.Thread(target=self._run, daemon=True, name="guard")
            self._thread.start()
            opened.pop_all()

    def watch(
        self,
        socket: zmq.Socket[Any],
        most_bytes: int,
        most_held: int,
        *,
        listens: bool,
        most_queued: int,
        on_event: OnEvent = lambda _: None,
    ) -> Ledger:
        """Before the socket is bound or connected; until it is closed. Whoever takes messages from it tells the ledger.

        most_bytes: of a frame; most_held: ledger.Ledger; most_queued: messages of one peer that wait here where the
        system can't say how many bytes do. on_event gets zmq.EVENT_CONNECTED, EVENT_HANDSHAKE_SUCCEEDED and
        EVENT_DISCONNECTED (EVENT_ACCEPTED), in the guard's thread.
        """
        socket.maxmsgsize = most_bytes
        socket.rcvhwm = 0 if CAN_COUNT else most_queued
        ledger = Ledger(most_bytes, most_held, listens=listens)
        endpoint = f"inproc://guarded-{next(_numbers)}"
        with contextlib.ExitStack() as opened:  # first who hears: libzmq waits for ever to tell nobody of an end
            events: zmq.Socket[bytes] = opened.enter_context(self._context.socket(zmq.PAIR))
            events.rcvhwm = 100_000
            events.connect(endpoint)
            socket.monitor(endpoint, _EVENTS)
            opened.pop_all()
        self._new.append((events, (ledger, on_event)))
        self._wake()
        return ledger

    def admit(self, socket: zmq.Socket[Any], domain: str, is_allowed: IsAllowed) -> None:
        """Before the socket, which is to be a CURVE server, is bound: let in only whom is_allowed names; the others are
        told nothing. It is asked in the guard's thread. domain: no other socket's of this context."""
        if self._door is None:
            self._door = Door(self._context)
        self._door.admit(socket, domain, is_allowed)
        self._wake()

    def _run(self) -> None:
        try:
            self._watch_all()
        finally:
            self._close_all()
            self._woken.close(linger=0)

    def _close_all(self) -> None:
        """Also what was made just before the end: left open, it would keep the context from ending for ever."""
        self._taken_in()
        for events in list(self._watched):
            self._stop(events)
        if self._door is not None:
            self._door.close()

    def _watch_all(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        patience: int | None = None
        while not self._is_closing:
            ready = dict(poller.poll(patience))
            if ready.pop(self._woken, 0):
                self._woken.recv()
            if self._door is not None:
                poller.register(self._door.socket, zmq.POLLIN)
                ready.pop(self._door.socket, 0)
                self._door.answer()
            for events in self._taken_in():
                poller.register(events, zmq.POLLIN)
            for events in ready:
                if not self._heard(events):
                    poller.unregister(events)
            ledgers = [ledger for ledger, _ in self._watched.values() if not ledger.is_idle]
            came = max((ledger.look() for ledger in ledgers), default=0)
            is_quiet = came < _QUIET_BYTES and not any(ledger.has_young for ledger in ledgers)
            patience = None if not ledgers else _QUIET_MS if is_quiet else _LOOK_MS

    def _taken_in(self) -> list[zmq.Socket[bytes]]:
        """The sockets' events that are watched from now on."""
        new = []
        while self._new:
            events, watched = self._new.popleft()
            self._watched[events] = watched
            new.append(events)
        return new

    def _heard(self, events: zmq.Socket[bytes]) -> bool:
        """Take in what happened to a socket; False when it was closed."""
        ledger, on_event = self._watched[events]
        while events.poll(0):
            kind, handle = _EVENT.unpack(events.recv_multipart()[0])
            if kind == zmq.EVENT_MONITOR_STOPPED:
                self._stop(events)
                return False
            if kind & _OPENED:
                ledger.opened(handle)
            elif kind == zmq.EVENT_DISCONNECTED:
                ledger.closed(handle)
            try:
                on_event(kind)
            except Exception:  # everybody's handshakes wait for this thread
                _log.exception("what happened to a connection could not be told")
        return True

    def _stop(self, events: zmq.Socket[bytes]) -> None:
        ledger, _ = self._watched.pop(events)
        ledger.close()
        events.close(linger=0)

    def _wake(self) -> None:
        with contextlib.suppress(zmq.Again):  # it has much to see already
            self._waker.send(b"", zmq.NOBLOCK)

    def close(self) -> None:
        """Stop watching, and let nobody in any more; the sockets stay. Safe to call twice."""
        if not self._waker.closed:
            self._is_closing = True
            self._wake()
            self._thread.join()
            self._waker.close(linger=0)
            self._close_all()  # what was made when the thread had failed


def count_taken(ledger: Ledger, frame: zmq.Frame, nbytes: int) -> None:
    """Tell the ledger of a message that was taken: one of its frames, and all their wire_bytes."""
    try:
        handle = int(frame.get("__fd"))
    except zmq.ZMQError:
        return  # of this process itself
    if ledger.took(handle, nbytes):
        ledger.name(handle, _key(frame))


def _key(frame: zmq.Frame) -> str:
    """Whom a frame is from; "" for the one whom this socket itself called."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def wire_bytes(nbytes: int) -> int:
    """What a frame of so many bytes takes in CURVE: flags and length, then MESSAGE, nonce, authenticator and flags."""
    boxed = nbytes + 33
    return boxed + (2 if boxed < 256 else 9)
