"""The head's control socket: which agent is which registered device, what it said, and what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import Callable

import msgspec
import zmq

from homeinfer import __version__
from homeinfer.cluster.members import Member, Members, free_name
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import MOST_FROM_AGENT, PROTOCOL, FromAgent, FromHead, Hello, Refuse
from homeinfer.cluster.wire.secure import Secure, bound_port, frames_of, sender_host, sender_key
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable

_MOST_TEXT = 2000
_LABEL = "[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}([.]{_LABEL})*")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9_.-]{1,32})?")


class Said(msgspec.Struct, frozen=True):
    """What a registered device said. host: where it speaks from; connection: a number for each that it opened."""

    device: str
    key: str
    host: str
    connection: int
    message: FromAgent


class ControlDesk:
    """on_said gets what registered devices say, each after its Hello; on_note a line for the user; on_gone the device
    and the number of a connection that turned out to be closed."""

    def __init__(
        self,
        secure: Secure,
        members: Members,
        head: str,
        port: int,
        on_said: Callable[[Said], None],
        on_note: Callable[[str], None],
        on_gone: Callable[[str, int], None],
    ) -> None:
        """Listens at once. Raises HomeinferError when the port is taken."""
        self._on_gone = on_gone
        self._own, self._members, self._head = secure.keys.public, members, head
        self._on_said, self._on_note = on_said, on_note
        self._connections: dict[str, tuple[int, bytes]] = {}
        self._names: dict[str, str] = {}
        self._number = 0
        self._socket = secure.router(f"tcp://*:{port or '*'}", "control", self._is_allowed, MOST_FROM_AGENT)
        self._socket.router_mandatory = True
        self.port = bound_port(self._socket)

    def _is_allowed(self, key: str) -> bool:
        return key == self._own or self._members.get(key) is not None

    def name_of(self, key: str) -> str | None:
        """What a device is called in this cluster, None for strangers: a member with the head's own name gets a
        number. It is called so for as long as the cluster is up, whoever comes or goes."""
        if key == self._own:
            return self._head
        members = self._members.all()
        registered = {member.key for member in members}
        self._names = {known: name for known, name in self._names.items() if known in registered}
        for member in members:
            if member.key not in self._names:
                taken = [self._head, *self._names.values()]
                self._names[member.key] = free_name(member.name, taken) if member.name in taken else member.name
        return self._names.get(key)

    def member(self, name: str) -> Member | None:
        """The registered device that is called so in this cluster."""
        return next((member for member in self._members.all() if self.name_of(member.key) == name), None)

    async def serve(self) -> None:
        """For ever."""
        while True:
            frames = frames_of(await self._socket.recv_multipart(copy=False))
            if len(frames) != 2:
                continue
            try:
                key, host = sender_key(frames[1]), sender_host(frames[1])
                message = control.from_agent(frames[1].buffer)
            except HomeinferError:
                continue  # no message of this protocol
            name = self.name_of(key)
            if name is not None:  # else it was forgotten meanwhile
                self._take(frames[0].bytes, name, key, host, fit_to_print(message))

    def _take(self, identity: bytes, name: str, key: str, host: str, message: FromAgent) -> None:
        if isinstance(message, Hello):
            if message.protocol != PROTOCOL:
                self._refuse(identity, name, message)
                return
            self._number += 1
            self._connections[name] = (self._number, identity)
            if not is_host(message.host):
                message = msgspec.structs.replace(message, host=host)
            if not 0 <= message.weights_port < 1 << 16:
                message = msgspec.structs.replace(message, weights_port=0)
        known = self._connections.get(name)
        if known is not None and known[1] == identity:
            self._on_said(Said(name, key, host, known[0], message))

    def _refuse(self, identity: bytes, name: str, hello: Hello) -> None:
        reason = (
            f"{name} runs homeinfer {hello.version} (protocol {hello.protocol}), the head {__version__} "
            f"(protocol {PROTOCOL}): install the same version on both"
        )
        self._on_note(reason[:500])
        self._put(identity, Refuse(PROTOCOL, __version__, reason[:2000]))

    def send(self, device: str, message: FromHead) -> None:
        """What can't be sent now is lost, and so, soon, is the device; one whose connection is closed at once."""
        number, identity = self._connections.get(device, (0, b""))
        if number and not self._put(identity, message):
            self._connections.pop(device)
            asyncio.get_running_loop().call_soon(self._on_gone, device, number)

    def _put(self, identity: bytes, message: FromHead) -> bool:
        """False when nobody is there any more."""
        sent = self._socket.send_multipart([identity, control.encode(message)], zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)
        if not sent.done():
            sent.cancel()
            return True
        problem = sent.exception()
        return not isinstance(problem, zmq.ZMQError) or problem.errno != zmq.EHOSTUNREACH


def is_host(text: str) -> bool:
    """Whether it is a name or an address: what is none would end the engines that are told to send there."""
    if ":" not in text:
        return _HOST.fullmatch(text) is not None
    with contextlib.suppress(ValueError):
        return _IPV6.fullmatch(text) is not None and bool(ipaddress.IPv6Address(text))
    return False


def fit_to_print(message: FromAgent) -> FromAgent:
    """The message with nothing in its texts, which users are shown, that a terminal would obey."""
    texts = {name: getattr(message, name) for name in message.__struct_fields__}
    odd = {name: text for name, text in texts.items() if isinstance(text, str) and not text.isprintable()}
    return msgspec.structs.replace(message, **{name: printable(text, _MOST_TEXT) for name, text in odd.items()})
