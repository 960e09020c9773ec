"""The head's control socket: who is called what, what is taken from devices, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio

from homeinfer.cluster.coordinator.control_desk import ControlDesk, Said, fit_to_print, is_host
from homeinfer.cluster.coordinator.ring_plan import bracketed
from homeinfer.cluster.members import Members
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import MOST_BYTES, PROTOCOL, Beat, DeviceStats, Hello
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import Secure
from homeinfer.cluster.wire.transport import new_keys

HELLO = Hello(PROTOCOL, "1", host="10.0.0.7", weights_port=900)


class Desk:
    """A desk called "home", and what it heard."""

    def __init__(self, secure: Secure, members: Members) -> None:
        self.members = members
        self.said: list[Said] = []
        self.notes: list[str] = []
        self._key = secure.keys.public
        self.desk = ControlDesk(secure, members, "home", 0, self.said.append, self.notes.append, lambda *_gone: None)

    def register(self, name: str, secure: Secure) -> zmq.asyncio.Socket:
        """A device that is paired and connects."""
        self.members.add(name, secure.keys.public)
        return secure.dealer(f"tcp://127.0.0.1:{self.desk.port}", self._key, MOST_BYTES)

    async def until(self, true: Callable[[Desk], bool]) -> None:
        while not true(self):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def a_desk(folder: Path) -> AsyncIterator[tuple[Desk, Secure, Secure]]:
    secures = [Secure(DeviceKeys(*new_keys())) for _ in range(3)]
    desk = Desk(secures[0], Members(folder))
    serving = asyncio.create_task(desk.desk.serve())
    try:
        yield desk, secures[1], secures[2]
    finally:
        serving.cancel()
        for secure in reversed(secures):
            secure.close()


def say(socket: zmq.asyncio.Socket, message: msgspec.Struct) -> None:
    socket.send(control.encode(message))


def test_a_device_keeps_its_name_when_another_one_that_is_called_so_is_paired(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_desk(tmp_path) as (desk, one, other):
            first = desk.register("home", one)
            say(first, HELLO)
            await desk.until(lambda desk: len(desk.said) == 1)
            say(desk.register("home", other), HELLO)
            await desk.until(lambda desk: len(desk.said) == 2)
            say(first, Beat(DeviceStats()))
            await desk.until(lambda desk: len(desk.said) == 3)
            names = [said.device for said in desk.said]
            assert names[0] == names[2] == "home-2"
            assert names[1] not in ("home", "home-2")
            assert [desk.desk.member(name) for name in names[:2]] == list(desk.members.all())

            desk.members.forget(desk.members.all()[0].name)
            assert desk.desk.member("home-2") is None
            assert desk.desk.name_of(other.keys.public) == names[1]

    asyncio.run(asyncio.wait_for(test(), 30))


def test_nothing_counts_before_a_hello_and_what_no_host_or_port_can_be_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_desk(tmp_path) as (desk, one, _):
            socket = desk.register("lap", one)
            say(socket, Beat(DeviceStats()))
            socket.send(b"no message")
            say(socket, msgspec.structs.replace(HELLO, host="evil host", weights_port=1 << 20))
            await desk.until(lambda desk: len(desk.said) == 1)
            hello = desk.said[0].message
            assert isinstance(hello, Hello)
            assert (hello.host, hello.weights_port) == ("127.0.0.1", 0)

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_device_of_another_version_is_refused_with_both_versions_named(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_desk(tmp_path) as (desk, one, _):
            socket = desk.register("lap", one)
            say(socket, Hello(PROTOCOL + 1, "9.9\x1b[31m"))
            refuse = control.from_head((await socket.recv_multipart())[0])
            assert isinstance(refuse, control.Refuse)
            assert f"protocol {PROTOCOL + 1}" in refuse.reason
            assert f"protocol {PROTOCOL})" in refuse.reason
            assert "lap runs homeinfer 9.9\\x1b[31m" in desk.notes[0]
            assert not desk.said

    asyncio.run(asyncio.wait_for(test(), 30))


def test_texts_of_devices_cannot_give_orders_to_a_terminal() -> None:
    sorry = fit_to_print(control.Sorry("load", "no\n\x1b[2Jroom"))
    assert sorry == control.Sorry("load", "no\\n\\x1b[2Jroom")
    said = control.Progress("load", 0.5, "plain")
    assert fit_to_print(said) == said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.77.0.2", True),
        ("laptop", True),
        ("my-laptop.local", True),
        ("a_b.fritz.box", True),
        ("fd00::1", True),
        ("fe80::1%eth0", True),
        ("::1", True),
        ("", False),
        ("evil host", False),
        (".a", False),
        ("-a", False),
        ("a..b", False),
        ("a%b", False),
        (":::::", False),
        ("a:1", False),
        ("fe80::1%eth 0", False),
        ("a\n", False),
        ("a" * 300, False),
    ],
)
def test_what_a_device_calls_its_host_can_be_connected_to(text: str, expected: bool) -> None:
    assert is_host(text) is expected
    if expected:
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"tcp://{bracketed(text)}:9")
