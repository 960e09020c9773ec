"""Pairing: one code, one device, ten minutes, five wrong secrets; and nothing listens when there is no code."""

from __future__ import annotations

import asyncio
import os
import socket as system_socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio

from homeinfer.cluster import pairing
from homeinfer.cluster.members import Member, Members
from homeinfer.cluster.pairing import (
    MOST_BYTES,
    NotRegistered,
    PairingDesk,
    Registered,
    ShowSecret,
    pair,
)
from homeinfer.cluster.wire.codes import PairingCode, decode_code, encode_code
from homeinfer.cluster.wire.control import PROTOCOL
from homeinfer.cluster.wire.keys import DeviceKeys, own_keys
from homeinfer.cluster.wire.secure import Secure, tcp_address
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.errors import HomeinferError

LOOPBACK = ("127.0.0.1",)
ENOUGH_MS = 10_000
NOTHING_BUT_TIME_MS = 300


def fresh_keys() -> DeviceKeys:
    return DeviceKeys(*new_keys())


class Head:
    """A head whose pairing desk is served."""

    def __init__(self, folder: Path, seconds: float = 600, hosts: tuple[str, ...] = LOOPBACK) -> None:
        self.secure = Secure(own_keys(folder))
        self.members = Members(folder)
        self.new: list[Member] = []
        self.changes: list[tuple[PairingCode | None, str]] = []
        self.desk = PairingDesk(
            self.secure,
            self.members,
            name="desktop",
            control_port=47710,
            port=0,
            hosts=hosts,
            address="127.0.0.1",
            seconds=seconds,
            on_member=self.new.append,
            on_change=lambda code, why: self.changes.append((code, why)),
        )
        self.serving = asyncio.create_task(self.desk.serve())

    def close(self) -> None:
        self.serving.cancel()
        self.desk.close()
        self.secure.close()


def with_head(
    folder: Path, test: Callable[[Head], Awaitable[None]], seconds: float = 600, hosts: tuple[str, ...] = LOOPBACK
) -> None:
    async def run() -> None:
        head = Head(folder, seconds, hosts)
        try:
            await test(head)
        finally:
            head.close()

    asyncio.run(asyncio.wait_for(run(), 60))


async def refused(port: int) -> None:
    """Wait until nothing listens on a port any more; the test's time limit is the limit."""
    while True:
        try:
            system_socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:  # it is being closed
            pass
        await asyncio.sleep(0.02)


class Stranger:
    """A peer that says what it likes at a pairing socket."""

    def __init__(self, code: PairingCode) -> None:
        self.keys = fresh_keys()
        self.secure = Secure(self.keys)
        self.dealer: zmq.asyncio.Socket = self.secure.dealer(
            tcp_address("127.0.0.1", code.port), code.key, 2 * MOST_BYTES
        )
        self.dealer.linger = 0

    async def says(self, frame: bytes, patience_ms: int = ENOUGH_MS) -> Registered | NotRegistered | None:
        await self.dealer.send(frame)
        if not await self.dealer.poll(patience_ms):
            return None
        return msgspec.msgpack.decode((await self.dealer.recv_multipart())[0], type=Registered | NotRegistered)

    def close(self) -> None:
        self.secure.close()


def showing(secret: bytes, name: str = "laptop", protocol: int = PROTOCOL) -> bytes:
    return msgspec.msgpack.encode(ShowSecret(protocol, "9.9", secret, name))


def test_a_code_that_was_typed_makes_a_device_a_member(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        keys = fresh_keys()
        known = await pair(decode_code(encode_code(code).lower()), keys, "Anna's laptop")
        assert (known.key, known.hosts, known.port, known.name) == (head.secure.keys.public, LOOPBACK, 47710, "desktop")
        assert head.members.get(keys.public) == Member("Anna-s-laptop", keys.public)
        assert head.new == list(head.members.all())

    with_head(tmp_path, test)


def test_a_used_code_is_void_and_the_next_one_is_there_at_once(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        await pair(code, fresh_keys(), "laptop")
        with pytest.raises(HomeinferError, match=r"^this pairing code was used already, or is an older one"):
            await pair(code, fresh_keys(), "thief")
        assert head.desk.code is not None
        assert head.desk.code.secret != code.secret
        await pair(head.desk.code, fresh_keys(), "laptop")
        assert [member.name for member in head.members.all()] == ["laptop", "laptop-2"]
        assert [why for _, why in head.changes] == ["a new code", "laptop was paired", "laptop-2 was paired"]

    with_head(tmp_path, test)


def test_a_device_that_is_a_member_may_ask_again_and_stays_what_it_is(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        keys = fresh_keys()
        first = await pair(code, keys, "laptop")
        again = await pair(code, keys, "other name")
        assert first == again
        assert len(head.members.all()) == len(head.new) == 1

    with_head(tmp_path, test)


def test_five_wrong_secrets_close_the_desk(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        for _ in range(5):
            wrong = msgspec.structs.replace(code, secret=os.urandom(8))
            with pytest.raises(HomeinferError, match="was used already, or is an older one"):
                await pair(wrong, fresh_keys(), "thief")
        assert head.changes[-1] == (None, "pairing is closed after five wrong codes")
        await refused(code.port)
        with pytest.raises(HomeinferError, match="is there but takes no new devices on port"):
            await pair(code, fresh_keys(), "laptop", timeout=0.5)
        assert head.members.all() == ()
        reopened = await head.desk.open()
        await pair(reopened, fresh_keys(), "laptop")

    with_head(tmp_path, test)


def test_an_expired_code_lets_nobody_in_and_nothing_listens(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        while head.changes[-1][0] is not None:
            await asyncio.sleep(0.05)
        assert head.desk.code is None
        assert head.changes[-1][1] == "the pairing code has expired"
        await refused(code.port)
        with pytest.raises(HomeinferError, match="the code has expired, or cluster up has ended"):
            await pair(code, fresh_keys(), "laptop", timeout=0.5)
        assert head.members.all() == ()

    with_head(tmp_path, test, seconds=0.3)


def test_nothing_listens_before_a_code_is_asked_for(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        assert head.desk.code is None
        code = await head.desk.open()
        head.desk.close()
        await refused(code.port)

    with_head(tmp_path, test)


def test_a_desk_opens_again_on_its_port_right_after_it_was_closed(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        port = (await head.desk.open()).port
        desk = PairingDesk(
            head.secure, head.members, name="x", control_port=1, port=port, hosts=LOOPBACK, address="127.0.0.1"
        )
        head.desk.close()
        await refused(port)
        for _ in range(3):
            assert (await desk.open()).port == port
            desk.close()

    with_head(tmp_path, test)


def test_a_desk_that_was_closed_can_be_opened_again(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        await head.desk.open()
        await asyncio.sleep(0.05)
        head.desk.close()
        await asyncio.sleep(0.05)
        await pair(await head.desk.open(), fresh_keys(), "laptop")
        assert [why for _, why in head.changes] == [
            "a new code",
            "pairing is closed",
            "a new code",
            "laptop was paired",
        ]

    with_head(tmp_path, test)


NONSENSE = [
    b"",
    b"\x00",
    b"\xc1" * 100,
    b"\x91" * 1000,
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    msgspec.msgpack.encode({"type": "pair"}),
    msgspec.msgpack.encode({"type": "pair", "protocol": "x", "version": 1, "secret": 2, "name": []}),
    msgspec.msgpack.encode({"type": "pair", "protocol": 1, "version": "", "secret": bytes(65), "name": "x"}),
    msgspec.msgpack.encode({"type": "pair", "protocol": 1, "version": "", "secret": b"", "name": "x" * 65}),
    msgspec.msgpack.encode({"type": "paired", "name": "x", "head": "y", "port": 1}),
    bytes(MOST_BYTES),
]


def test_random_frames_get_no_answer_and_cost_no_try(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        stranger = Stranger(code)
        for frame in NONSENSE:
            await stranger.dealer.send(frame)
        await stranger.dealer.send_multipart([b"a", b"b", b"c"])
        assert not await stranger.dealer.poll(NOTHING_BUT_TIME_MS)
        assert head.members.all() == ()
        await pair(code, fresh_keys(), "laptop")
        stranger.close()

    with_head(tmp_path, test)


def test_oversized_frames_are_cut_off_and_others_go_on(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        stranger = Stranger(code)
        assert await stranger.says(bytes(MOST_BYTES + 1), NOTHING_BUT_TIME_MS) is None
        stranger.close()
        await pair(code, fresh_keys(), "laptop")

    with_head(tmp_path, test)


def test_a_device_of_another_version_is_told_both_and_may_come_again(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        stranger = Stranger(code)
        answer = await stranger.says(showing(code.secret, protocol=PROTOCOL + 1))
        assert isinstance(answer, NotRegistered)
        assert answer.reason.startswith(f"this device runs homeinfer 9.9 (protocol {PROTOCOL + 1}), the head ")
        assert head.members.all() == ()
        assert await stranger.says(showing(code.secret)) == Registered("laptop", "desktop", 47710)
        stranger.close()

    with_head(tmp_path, test)


def test_a_wrong_secret_hears_nothing_of_the_head(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        stranger = Stranger(code)
        answer = await stranger.says(showing(b"", protocol=PROTOCOL + 1))
        assert isinstance(answer, NotRegistered)
        assert "desktop" not in answer.reason
        assert "protocol" not in answer.reason
        stranger.close()

    with_head(tmp_path, test)


def test_a_head_that_cannot_write_its_list_says_so_to_the_device(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        (tmp_path / "members.json").mkdir()
        with pytest.raises(HomeinferError, match=r"^the head can't register a device: .*members\.json"):
            await pair(code, fresh_keys(), "laptop")
        assert head.new == []
        (tmp_path / "members.json").rmdir()
        await pair(code, fresh_keys(), "laptop")

    with_head(tmp_path, test)


def test_the_codes_second_address_serves_where_the_first_does_not(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        code = await head.desk.open()
        assert (await pair(code, fresh_keys(), "laptop")).hosts == ("127.0.0.1", "127.0.0.99")

    with_head(tmp_path, test, hosts=("127.0.0.99", "127.0.0.1"))


def test_addresses_that_all_refuse_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "_PATIENCE_SECONDS", 0.3)

    async def test() -> None:
        with system_socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            code = PairingCode(("127.0.0.1", "127.0.0.99"), closed.getsockname()[1], new_keys()[0], bytes(8))
            with pytest.raises(HomeinferError, match="is there but takes no new devices on port"):
                await pair(code, fresh_keys(), "laptop", timeout=300)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_an_address_that_refuses_does_not_end_the_search_at_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairing, "_PATIENCE_SECONDS", 0.3)

    async def test(head: Head) -> None:
        code = await head.desk.open()
        head.desk.close()
        await refused(code.port)
        asking = asyncio.create_task(
            pair(msgspec.structs.replace(code, hosts=("127.0.0.1", "head.invalid")), fresh_keys(), "laptop")
        )
        await asyncio.sleep(1)
        assert not asking.done()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    with_head(tmp_path, test)


def test_what_is_not_the_head_of_the_code_is_told_so() -> None:
    async def test() -> None:
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        code = PairingCode(LOOPBACK, port, new_keys()[0], bytes(8))
        with pytest.raises(HomeinferError, match=rf"^what answers at 127\.0\.0\.1 port {port} is not the head"):
            await pair(code, fresh_keys(), "laptop", timeout=0.5)
        server.close()

    asyncio.run(test())


def test_a_head_that_is_not_reached_comes_with_what_to_check() -> None:
    code = PairingCode(("head.invalid",), 47711, new_keys()[0], bytes(8))
    with pytest.raises(HomeinferError, match=r"same network.*cluster up is running.*firewall .* 47710 and 47711"):
        asyncio.run(pair(code, fresh_keys(), "laptop", timeout=0.5))


def test_a_pairing_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    async def test(head: Head) -> None:
        with system_socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            desk = PairingDesk(
                head.secure, head.members, name="x", control_port=1, port=port, hosts=LOOPBACK, address="127.0.0.1"
            )
            with pytest.raises(HomeinferError, match=rf"^127\.0\.0\.1:{port} is in use by another program"):
                await desk.open()

    with_head(tmp_path, test)
