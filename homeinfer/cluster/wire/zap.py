"""Who may come in (ZAP, RFC 27): in each CURVE handshake libzmq asks inside its context whether a key is allowed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq
from zmq.utils import z85

ASKED_AT = "inproc://zeromq.zap.01"
"""Where libzmq asks: one REP socket of a context answers."""
_REFUSED = b"300"
"""ZAP's "try again later": the only status that libzmq doesn't tell the refused one."""
_LEAST_FRAMES = 6
_AT_ONCE = 100

IsAllowed = Callable[[str], bool]
"""Of a public key, Z85, that a peer has proven to hold."""
_log = logging.getLogger(__name__)


class Door:
    """Answers for one context; made before a socket asks there that is bound, which then finds it in any case."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._allowed: dict[bytes, IsAllowed] = {}
        with contextlib.ExitStack() as opened:
            self.socket = opened.enter_context(context.socket(zmq.REP))
            self.socket.bind(ASKED_AT)
            opened.pop_all()

    def admit(self, socket: zmq.Socket[Any], domain: str, is_allowed: IsAllowed) -> None:
        """Before the socket is bound: from now on, who comes to it is let in if is_allowed says so, in the thread that
        answers. domain: no other socket's of the context."""
        self._allowed[domain.encode()] = is_allowed
        ask_at_door(socket, domain.encode())

    def answer(self) -> None:
        """What was asked by now; of a crowd the first."""
        for _ in range(_AT_ONCE):
            if not self.socket.poll(0):
                break
            self.socket.send_multipart(zap_reply(self.socket.recv_multipart(), self._allowed))

    def close(self) -> None:
        """From now on nobody comes in."""
        self.socket.close(linger=0)


def ask_at_door(socket: zmq.Socket[Any], domain: bytes) -> None:
    """Make a socket a CURVE server that lets nobody in without asking."""
    socket.curve_server = True
    socket.zap_domain = domain
    socket.zap_enforce_domain = True  # otherwise libzmq lets everybody in while nobody is there to be asked


def zap_reply(request: Sequence[bytes], guards: Mapping[bytes, IsAllowed]) -> list[bytes]:
    """The answer to what libzmq asks about a peer in a handshake; guards by ZAP domain. What isn't CURVE, or whose
    guard fails, is refused."""
    if len(request) < _LEAST_FRAMES:
        return [b"1.0", request[1] if len(request) > 1 else b"", _REFUSED, b"", b"", b""]
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
    except Exception:  # a guard that fails must neither let in nor end the task or thread that all handshakes wait for
        _log.exception("a device could not be checked")
        return False
