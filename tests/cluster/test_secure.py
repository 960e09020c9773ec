"""Encrypted sockets for asyncio: who isn't allowed hears nothing, and costs little."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket as system_socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import NoReturn, cast

import psutil
import pytest
import zmq
import zmq.asyncio

from homeinfer.cluster.wire import ledger as wire_ledger
from homeinfer.cluster.wire import secure as wire_secure
from homeinfer.cluster.wire.guard import Guard
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import (
    Secure,
    _Counted,
    bound_port,
    frames_of,
    sender_host,
    sender_key,
    tcp_address,
)
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.cluster.wire.zap import zap_reply
from homeinfer.errors import HomeinferError
from tests.support.processes import wait_until

ANYWHERE = "tcp://127.0.0.1:*"
MOST_BYTES = 100_000
ENOUGH_MS, AGAIN_MS = 10_000, 3000
NOTHING_BUT_TIME_MS = 300
"""In which a message that may pass would long have arrived."""


@asynccontextmanager
async def secure(keys: DeviceKeys | None = None) -> AsyncIterator[Secure]:
    sockets = Secure(keys or DeviceKeys(*new_keys()))
    try:
        yield sockets
    finally:
        sockets.close()


class Home:
    """A listener that allows one friend."""

    def __init__(self, listener: Secure, friend: Secure, allowed: set[str]) -> None:
        self.listener, self.friend, self.allowed = listener, friend, allowed
        self.handshakes: list[str] = []
        self._asked = 0
        self.socket = listener.router(ANYWHERE, "test", self.is_allowed, MOST_BYTES)
        self.port = bound_port(self.socket)
        self.address = f"tcp://127.0.0.1:{self.port}"

    def is_allowed(self, key: str) -> bool:
        self.handshakes.append(key)
        return key in self.allowed

    def dial(self, who: Secure | None = None, key: str | None = None) -> zmq.asyncio.Socket:
        dealer = (who or self.friend).dealer(self.address, key or self.listener.keys.public, MOST_BYTES)
        dealer.linger = 0
        return dealer

    def knows_someone(self) -> bool:
        """Whether one who has come is known by name: the first message may be faster than the news of its connection,
        then the next one tells."""
        ledger = cast(_Counted, self.socket).ledger
        if ledger is None:
            return False
        with ledger._lock:
            return any(each.key for each in ledger._going_on())

    async def heard(self, patience_ms: int = ENOUGH_MS) -> list[bytes] | None:
        """The next message without its routing id."""
        if not await self.socket.poll(patience_ms):
            return None
        frames = frames_of(await self.socket.recv_multipart(copy=False))
        return [frame.bytes for frame in frames[1:]]

    async def works(self, dealer: zmq.asyncio.Socket | None = None) -> bool:
        """Whether the friend gets through, and an answer; on a new connection or the dealer's. It asks again, as all do
        here who get no answer: what is under way on a connection that ends is lost."""
        used = dealer or self.dial()
        self._asked += 1
        question = b"still there? %d" % self._asked
        frames: list[zmq.Frame] = []
        while not frames or frames[1].bytes != question:
            await used.send(question)
            if await self.socket.poll(AGAIN_MS):
                frames = frames_of(await self.socket.recv_multipart(copy=False))
        assert sender_key(frames[1]) == self.friend.keys.public
        await self.socket.send_multipart([frames[0].bytes, b"yes"])
        answered = bool(await used.poll(ENOUGH_MS)) and await used.recv_multipart() == [b"yes"]
        if dealer is None:
            used.close()
        return answered


def at_home(test: Callable[[Home], Awaitable[None]]) -> None:
    async def run() -> None:
        async with AsyncExitStack() as stack:
            listener, friend = [await stack.enter_async_context(secure()) for _ in range(2)]
            await test(Home(listener, friend, {friend.keys.public}))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_known_key_gets_through_and_is_named() -> None:
    async def test(home: Home) -> None:
        dealer = home.dial()
        await dealer.send(b"hello")
        frames = frames_of(await home.socket.recv_multipart(copy=False))
        assert frames[1].bytes == b"hello"
        assert [sender_key(frame) for frame in frames] == [home.friend.keys.public] * 2
        assert sender_host(frames[1]) == "127.0.0.1"
        await home.socket.send_multipart([frames[0].bytes, b"welcome"])
        assert await dealer.recv_multipart() == [b"welcome"]

    at_home(test)


def test_an_unknown_key_and_a_wrong_server_key_get_nothing_through() -> None:
    async def test(home: Home) -> None:
        async with secure() as stranger:
            unknown, mistaken = home.dial(stranger), home.dial(key=stranger.keys.public)
            await unknown.send(b"let me in")
            await mistaken.send(b"let me in")
            assert await home.heard(NOTHING_BUT_TIME_MS) is None
            assert not await unknown.poll(0)
            assert not await mistaken.poll(0)
        assert await home.works()

    at_home(test)


def test_a_key_that_becomes_known_gets_through_and_one_that_is_forgotten_no_more() -> None:
    async def test(home: Home) -> None:
        async with secure() as other:
            home.allowed.add(other.keys.public)
            await home.dial(other).send(b"let me in")
            assert await home.heard() == [b"let me in"]
            home.allowed.clear()
            await home.dial(other).send(b"again")
            assert await home.heard(NOTHING_BUT_TIME_MS) is None

    at_home(test)


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.PUSH, zmq.SUB, zmq.REQ])
def test_a_peer_without_encryption_gets_nothing_through(kind: int) -> None:
    async def test(home: Home) -> None:
        with zmq.asyncio.Context() as context, context.socket(kind) as clear:
            clear.linger = 0
            clear.connect(home.address)
            if kind != zmq.SUB:
                sending = asyncio.ensure_future(clear.send(b"in the clear"))
            assert await home.heard(NOTHING_BUT_TIME_MS) is None
            if kind != zmq.SUB:
                sending.cancel()
        assert await home.works()

    at_home(test)


def test_a_guard_that_fails_lets_nobody_in_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: str) -> bool:
        raise RuntimeError("broken")

    async def test(home: Home) -> None:
        other = home.listener.router(ANYWHERE, "test", broken, MOST_BYTES)
        dealer = home.friend.dealer(f"tcp://127.0.0.1:{bound_port(other)}", home.listener.keys.public, MOST_BYTES)
        dealer.linger = 0
        await dealer.send(b"hello")
        while "could not be checked" not in caplog.text:  # it has been asked
            await asyncio.sleep(0.01)
        assert not await other.poll(NOTHING_BUT_TIME_MS)
        assert await home.works()

    at_home(test)


def test_two_routers_of_one_purpose_have_their_own_guards() -> None:
    async def test(home: Home) -> None:
        other = home.listener.router(ANYWHERE, "test", lambda _: False, MOST_BYTES)
        dealer = home.friend.dealer(f"tcp://127.0.0.1:{bound_port(other)}", home.listener.keys.public, MOST_BYTES)
        dealer.linger = 0
        await dealer.send(b"hello")
        assert not await other.poll(NOTHING_BUT_TIME_MS)
        assert await home.works()

    at_home(test)


def test_a_frame_that_is_too_long_is_cut_off() -> None:
    async def test(home: Home) -> None:
        dealer = home.dial()
        await dealer.send_multipart([b"x", bytes(MOST_BYTES + 1)])
        assert await home.heard(NOTHING_BUT_TIME_MS) is None
        await home.dial().send(bytes(MOST_BYTES - 100))
        assert await home.heard() == [bytes(MOST_BYTES - 100)]
        assert await home.works()

    at_home(test)


GREETING = bytes([0xFF, *[0] * 8, 0x7F, 3, 1]) + b"CURVE".ljust(20, b"\0") + bytes(32)


def garbage(seed: int) -> bytes:
    """What a peer that isn't ZeroMQ, or only begins as ZeroMQ, may send."""
    noise = random.Random(seed)
    beginning = [b"", GREETING, GREETING[:11], GREETING + b"\4\xc8\5HELLO", GREETING + b"\6" + b"\xff" * 8][seed % 5]
    return beginning + noise.randbytes(noise.choice([1, 10, 200, 5000]))


def test_peers_that_send_garbage_change_nothing() -> None:
    async def test(home: Home) -> None:
        for seed in range(50):
            with (
                system_socket.create_connection(("127.0.0.1", home.port)) as peer,
                suppress(ConnectionError),  # of several at once the oldest are cut off, perhaps before they wrote
            ):
                peer.sendall(garbage(seed))
        assert await home.heard(NOTHING_BUT_TIME_MS) is None
        assert await home.works()

    at_home(test)


def test_a_crowd_of_half_open_connections_is_cut_down_while_a_friend_gets_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (wire_secure, wire_ledger):  # time alone would end them too
        monkeypatch.setattr(module, "HANDSHAKE_SECONDS", 600.0)
    monkeypatch.setattr(wire_secure, "_HANDSHAKE_MS", 600_000)

    async def test(home: Home) -> None:
        early = home.dial()
        while not home.knows_someone():
            assert await home.works(early)
        before = psutil.Process().memory_info().rss
        crowd = []
        for _ in range(300):
            reader, writer = await asyncio.open_connection("127.0.0.1", home.port)
            writer.write(GREETING)
            crowd.append((reader, writer))
        assert await home.works(early)
        assert len(home.handshakes) == 1
        assert await home.works()
        ended = [asyncio.ensure_future(reader.read()) for reader, _ in crowd[:200]]
        await asyncio.gather(*ended)
        assert await home.works()
        assert psutil.Process().memory_info().rss - before < 64 << 20
        for _, writer in crowd:
            writer.close()

    at_home(test)


def test_a_name_that_resolves_and_ipv6_are_addresses_too() -> None:
    async def test(home: Home) -> None:
        everywhere = home.listener.router("tcp://*:*", "test", home.allowed.__contains__, MOST_BYTES)
        for host in ("localhost", "127.0.0.1", *own_loopback6()):
            address = tcp_address(host, bound_port(everywhere))
            dealer = home.friend.dealer(address, home.listener.keys.public, MOST_BYTES)
            await dealer.send(host.encode())
            assert await everywhere.poll(ENOUGH_MS)
            frames = frames_of(await everywhere.recv_multipart(copy=False))
            assert frames[1].bytes == host.encode()
            assert sender_host(frames[1]) in ("127.0.0.1", "::1")

    at_home(test)


def own_loopback6() -> list[str]:
    """::1, where this machine has it."""
    addresses = (address.address for each in psutil.net_if_addrs().values() for address in each)
    return ["::1"] if "::1" in addresses else []


def test_the_first_of_several_addresses_that_answers_is_used() -> None:
    async def test(home: Home) -> None:
        with system_socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            addresses = [f"tcp://127.0.0.1:{closed.getsockname()[1]}", home.address]
            dealer = home.friend.dealer(addresses, home.listener.keys.public, MOST_BYTES, waits=True)
            for n in range(3):
                await dealer.send(b"%d" % n)
                assert await home.heard() == [b"%d" % n]

    at_home(test)


def test_a_port_that_is_taken_and_a_wrong_address_are_one_clear_line() -> None:
    async def test(home: Home) -> None:
        with pytest.raises(
            HomeinferError, match=rf"^127\.0\.0\.1:{home.port} is in use by another program: no control"
        ):
            home.listener.router(home.address, "control", lambda _: True, MOST_BYTES)
        with pytest.raises(HomeinferError, match=r"^can't listen at 192\.0\.2\.1:\* \(control\): Cannot assign"):
            home.listener.router("tcp://192.0.2.1:*", "control", lambda _: True, MOST_BYTES)
        with pytest.raises(HomeinferError, match=r"^nowhere is no address"):
            home.friend.dealer("tcp://nowhere", home.listener.keys.public, MOST_BYTES)
        assert await home.works()

    at_home(test)


def test_closing_leaves_no_socket_thread_or_file() -> None:
    process = psutil.Process()

    async def test(home: Home) -> None:
        assert await home.works()

    at_home(test)
    fds, threads = process.num_fds(), process.num_threads()
    for _ in range(3):
        at_home(test)
    # the system counts a thread that was waited for a moment longer
    wait_until(lambda: process.num_fds() <= fds and process.num_threads() <= threads)


@pytest.mark.parametrize(
    "change",
    [{3: b"other"}, {6: b"NULL"}, {7: b"short"}],
    ids=["domain", "mechanism", "key"],
)
def test_zap_refuses_silently_what_is_not_a_known_key(change: dict[int, bytes]) -> None:
    key = os.urandom(32)
    request = [b"1.0", b"7", b"test", b"127.0.0.1", b"", b"CURVE", key]
    guards = {b"test": lambda _: True}
    assert zap_reply(request, guards)[2] == b"200"
    changed = [change.get(n, frame) for n, frame in enumerate(request, 1)]
    assert zap_reply(changed, guards) == [b"1.0", b"7", b"300", b"", b"", b""]


def test_a_connection_that_could_not_be_opened_takes_nothing_away_from_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a real limit of descriptors libzmq itself sometimes aborts: here only the guard finds none left."""
    made: list[zmq.Socket[bytes]] = []

    def none_left(_: Guard, socket: zmq.Socket[bytes], *_args: object, **_options: object) -> NoReturn:
        made.append(socket)
        raise zmq.ZMQError(errno.EMFILE)

    async def test() -> None:
        async with secure() as sockets:
            with monkeypatch.context() as patch:
                patch.setattr(Guard, "watch", none_left)
                with pytest.raises(HomeinferError, match=r"can't open another connection .*: close other programs"):
                    sockets.dealer("tcp://127.0.0.1:9", sockets.keys.public, MOST_BYTES)
            assert [socket.closed for socket in made] == [True]
            assert not sockets.dealer("tcp://127.0.0.1:9", sockets.keys.public, MOST_BYTES).closed

    asyncio.run(asyncio.wait_for(test(), 60))
