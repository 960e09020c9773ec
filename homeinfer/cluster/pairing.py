"""How a device becomes a member: it shows the secret of a code that the head displays, inside CURVE."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import zmq
import zmq.asyncio

import homeinfer
from homeinfer.cluster.discovery import find, own_hosts
from homeinfer.cluster.known_heads import KnownHead
from homeinfer.cluster.members import Member, Members
from homeinfer.cluster.wire.codes import SECRET_BYTES, PairingCode
from homeinfer.cluster.wire.control import PROTOCOL, Name, Port, Text, decoded
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import Secure, bound_port, connect, received, sender_host, sender_key, tcp_address
from homeinfer.errors import HomeinferError

CODE_SECONDS = 600.0
MOST_WRONG = 5
MOST_BYTES = 4096
"""No message of a pairing is larger."""
_HOSTS_IN_CODE = 2
_ASK_AGAIN_SECONDS = 3.0
_PATIENCE_SECONDS = 1.5
_REFUSALS = 3
"""So often, within that time, a port must refuse before nobody waits for it any more."""
_KNOCK_SECONDS = 1.5
"""A port that neither takes a connection nor refuses it for so long is silent."""
_LAST_ANSWER_SECONDS = 0.5
"""Of a socket that is closed at once, the last answer sometimes does not arrive."""
_CLOSING_SECONDS, _LOOK_SECONDS = 5.0, 0.1
"""libzmq lets go of a port some moments after the socket was closed; on a busy machine these are long."""


class ShowSecret(msgspec.Struct, frozen=True, tag="pair"):
    """A device asks to be registered. name: what it would like to be called."""

    protocol: int
    version: Annotated[str, msgspec.Meta(max_length=64)]
    secret: Annotated[bytes, msgspec.Meta(max_length=64)]
    name: Name


class Registered(msgspec.Struct, frozen=True, tag="paired"):
    """It is. name: as what; head: the head's own name; port: of its control socket."""

    name: Name
    head: Name
    port: Port


class NotRegistered(msgspec.Struct, frozen=True, tag="not_paired"):
    """It isn't, and why, for the device's user."""

    reason: Text


_to_head: msgspec.msgpack.Decoder[ShowSecret] = msgspec.msgpack.Decoder(ShowSecret)
_to_device: msgspec.msgpack.Decoder[Registered | NotRegistered] = msgspec.msgpack.Decoder(Registered | NotRegistered)
_encode = msgspec.msgpack.Encoder().encode
OnChange = Callable[[PairingCode | None, str], None]


class PairingDesk:
    """The head's pairing socket: it listens only while there is a code that can be used.

    A code is good for one device, ten minutes, and five wrong secrets. When a device has used one, the next is made at
    once; on_change tells each new code, or None when there is none any more, and why. on_member tells new members.
    """

    def __init__(
        self,
        secure: Secure,
        members: Members,
        *,
        name: str,
        control_port: int,
        port: int,
        hosts: tuple[str, ...] | None = None,
        address: str = "*",
        seconds: float = CODE_SECONDS,
        on_member: Callable[[Member], None] = lambda _: None,
        on_change: OnChange = lambda _, __: None,
    ) -> None:
        """name: the head's. port: to listen on for pairings (0 for a free one). hosts: what codes say of where this
        machine is (own_hosts() if None). seconds: how long a code is good."""
        self._secure, self._members = secure, members
        self._name, self._control_port, self._port = name, control_port, port
        self._hosts, self._address, self._seconds = hosts, address, seconds
        self._on_member, self._on_change = on_member, on_change
        self._socket: zmq.asyncio.Socket | None = None
        self._code: PairingCode | None = None
        self._until = 0.0
        self._closed_at = float("-inf")
        self._wrong = 0
        self._opened = asyncio.Event()

    @property
    def code(self) -> PairingCode | None:
        """The code that can be used now."""
        return self._code if self._code is not None and time.monotonic() < self._until else None

    async def open(self) -> PairingCode:
        """Make a new code; an older one is void. Raises HomeinferError where the port can't be had."""
        if self._socket is None:
            self._socket = await self._listen()
        return self._make_code("a new code")

    async def _listen(self) -> zmq.asyncio.Socket:
        address = f"tcp://{self._address}:{self._port or '*'}"
        while True:
            try:
                return self._secure.router(address, "pairing", lambda _: True, MOST_BYTES)
            except HomeinferError:
                if time.monotonic() > self._closed_at + _CLOSING_SECONDS:
                    raise
            await asyncio.sleep(_LOOK_SECONDS)

    def _make_code(self, why: str) -> PairingCode:
        assert self._socket is not None
        hosts = own_hosts() if self._hosts is None else self._hosts
        port = bound_port(self._socket)
        self._code = PairingCode(
            hosts[:_HOSTS_IN_CODE], port, self._secure.keys.public, secrets.token_bytes(SECRET_BYTES)
        )
        self._until = time.monotonic() + self._seconds
        self._wrong = 0
        self._opened.set()
        self._on_change(self._code, why)
        return self._code

    async def serve(self) -> None:
        """Answer devices, whenever there is a code, for ever."""
        while True:
            await self._opened.wait()
            socket = self._socket
            try:
                if socket is not None:
                    await self._serve_one(socket)
            except (asyncio.CancelledError, zmq.ZMQError):
                task = asyncio.current_task()
                if socket is None or not socket.closed or (task is not None and task.cancelling()):
                    raise

    async def _serve_one(self, socket: zmq.asyncio.Socket) -> None:
        left = self._until - time.monotonic()
        frames = await received(socket, left) if left > 0 else None
        if frames is None and time.monotonic() >= self._until:
            self._void("the pairing code has expired")
            self._stop_listening()
        if frames is None or len(frames) != 2:
            return
        answer = self._answer(frames[1])
        if answer is not None:
            await socket.send_multipart([frames[0].bytes, _encode(answer)])
        if self._wrong >= MOST_WRONG:
            self._void("pairing is closed after five wrong codes")
            await asyncio.sleep(_LAST_ANSWER_SECONDS)
            if self._code is None:
                self._stop_listening()

    def _answer(self, frame: zmq.Frame) -> Registered | NotRegistered | None:
        key = sender_key(frame)
        try:
            asked = decoded(_to_head, frame.buffer, "a pairing message")
        except HomeinferError:
            return None
        try:
            member = self._members.get(key)
            refusal = None if member is not None else self._refusal(asked)
            if refusal is not None:
                return NotRegistered(refusal)
            if member is None:
                member = self._members.add(asked.name, key)
                self._on_member(member)
                self._make_code(f"{member.name} was paired")
        except HomeinferError as problem:
            return NotRegistered(f"the head can't register a device: {problem}"[:2000])
        return Registered(member.name, self._name, self._control_port)

    def _refusal(self, asked: ShowSecret) -> str | None:
        if self.code is None or not hmac.compare_digest(asked.secret, self.code.secret):
            self._wrong += 1
            return "this pairing code was used already, or is an older one: take the code that the head shows now"
        if asked.protocol != PROTOCOL:
            return (
                f"this device runs homeinfer {asked.version} (protocol {asked.protocol}), the head "
                f"{homeinfer.__version__} (protocol {PROTOCOL}): install the same version on both"
            )
        return None

    def _void(self, why: str) -> None:
        if self._code is not None:
            self._code = None
            self._on_change(None, why)

    def _stop_listening(self) -> None:
        self._opened.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._closed_at = time.monotonic()

    def close(self) -> None:
        """Stop listening; the code is void."""
        self._void("pairing is closed")
        self._stop_listening()


async def pair(code: PairingCode, keys: DeviceKeys, name: str, timeout: float = 15.0) -> KnownHead:
    """Register this device at the head that shows the code. name: what it would like to be called.

    Takes at most `timeout` seconds and two more, and about two where nothing listens at any of the code's addresses.
    Raises HomeinferError: what to check when the head isn't reached, why when it refuses.
    """
    secure = Secure(keys)
    asked = _encode(ShowSecret(PROTOCOL, homeinfer.__version__, code.secret, name[:64] or "device"))
    addresses = [tcp_address(host, code.port) for host in code.hosts]
    found: list[str] = []
    tasks: list[asyncio.Task[Any]] = []
    try:
        socket = secure.dealer(addresses, code.key, MOST_BYTES, waits=True)
        asking = asyncio.create_task(_asked(socket, asked))
        refusing = asyncio.create_task(_all_refuse(code, found))
        tasks += (asking, refusing, asyncio.create_task(_look_elsewhere(socket, code, found)))
        await asyncio.wait((asking, refusing), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise HomeinferError(await _why_silent(code))
        frame = asking.result()
        answer = decoded(_to_device, frame.buffer, "the head's answer")
        reached = sender_host(frame)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        secure.close()
    if isinstance(answer, NotRegistered):
        raise HomeinferError(answer.reason)
    return KnownHead(code.key, tuple(dict.fromkeys((reached, *code.hosts, *found))), answer.port, answer.head)


async def _asked(socket: zmq.asyncio.Socket, message: bytes) -> zmq.Frame:
    """The answer. Asks again after a connection that was lost: who is registered already is told so."""
    while True:
        await socket.send(message)
        if (frames := await received(socket, _ASK_AGAIN_SECONDS)) is not None:
            return frames[-1]


async def _all_refuse(code: PairingCode, found: list[str]) -> None:
    """Until it is clear that nothing listens at the code's addresses, nor is the head known to have another."""
    refused = 0
    while refused < _REFUSALS or found:
        await asyncio.sleep(_PATIENCE_SECONDS / _REFUSALS)
        tried = await _tried(code)
        if "open" in tried:
            await asyncio.Event().wait()
        refused = refused + 1 if set(tried) == {"closed"} else 0


async def _look_elsewhere(socket: zmq.asyncio.Socket, code: PairingCode, found: list[str]) -> None:
    """When the code's addresses don't answer at once, the head may have got another one meanwhile."""
    await asyncio.sleep(_PATIENCE_SECONDS / _REFUSALS)
    head = await find(code.key)
    for host in head.hosts if head is not None else ():
        if host not in code.hosts:
            found.append(host)
            connect(socket, tcp_address(host, code.port))


async def _why_silent(code: PairingCode) -> str:
    hosts = " or ".join(code.hosts)
    tried = await _tried(code)
    if "open" in tried:
        return (
            f"what answers at {hosts} port {code.port} is not the head that made this code: "
            "take the code that the head shows now"
        )
    if "closed" in tried:
        return (
            f"{hosts} is there but takes no new devices on port {code.port}: the code has expired, or cluster up has "
            "ended; get a new code with homeinfer cluster code on the head"
        )
    return (
        f"the head does not answer at {hosts} port {code.port}: check that both devices are on the same network, that "
        f"cluster up is running there, and that its firewall lets TCP ports {code.port - 1} and {code.port} in"
    )


async def _tried(code: PairingCode) -> list[str]:
    return await asyncio.gather(*(_try_tcp(host, code.port) for host in code.hosts))


async def _try_tcp(host: str, port: int) -> str:
    try:
        async with asyncio.timeout(_KNOCK_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return "closed"
    except (OSError, TimeoutError):
        return "silent"
    writer.close()
    return "open"
