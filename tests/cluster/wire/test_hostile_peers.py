"""Paired peers that speak the protocol and mean harm: they take neither memory nor connections beyond a bound, and end
no process; and honest traffic of any size goes on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket as system_socket
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.messages import Cancel, decode, encode
from homeinfer.cluster.wire.secure import Secure, frames_of, received
from homeinfer.cluster.wire.transport import Keys, Links, Peer, new_keys
from tests.cluster.wire.hurt import ANYWHERE, ENOUGH_MS, FLOOD_BYTES, FRAME, MOST_BYTES, Flood, Hurt, hurt, rss
from tests.cluster.wire.own_zmtp import COMMAND, MORE, PING, OwnZmtp, dialled, listening, raw_pair, zmtp_frame


def test_a_message_that_does_not_end_is_cut_off() -> None:
    async def test() -> None:
        async with hurt() as head:
            before = rss()
            async with head.enemy() as peer:
                peer.send(b"hello")
                assert await head.heard() == b"hello"
                flood = Flood(lambda: peer)
                highest = await asyncio.to_thread(flood.highest_rss)
            assert flood.is_cut_off
            assert highest - before < FLOOD_BYTES / 3
            assert await head.works()

    asyncio.run(test())


def test_a_message_that_does_not_end_is_cut_off_while_the_event_loop_is_busy() -> None:
    async def test() -> None:
        async with hurt() as head:
            before = rss()
            async with head.enemy() as peer:
                flood = Flood(lambda: peer)
                highest = flood.highest_rss()  # the loop waits here
            assert flood.is_cut_off
            assert highest - before < FLOOD_BYTES / 3
            assert await head.works()

    asyncio.run(test())


def come_and_go(head: Hurt) -> bool:
    """Send some megabytes of whole messages on each of many connections; whether some are refused."""
    sent = refused = 0
    while sent < FLOOD_BYTES / 3 and refused < 5:
        try:
            with head.dial() as peer:
                for _ in range(40):
                    peer.send(FRAME)
                    sent += len(FRAME)
        except OSError:
            refused += 1
    return refused > 0


def test_who_sends_and_leaves_again_and_again_fills_no_memory_while_nobody_takes() -> None:
    async def test() -> None:
        async with hurt() as head:
            before = rss()
            assert await asyncio.to_thread(come_and_go, head)
            assert rss() - before < FLOOD_BYTES / 6
            while await received(head.socket, 0.2) is not None:
                pass
            assert await head.works()

    asyncio.run(test())


def test_a_ping_behind_messages_that_nobody_takes_ends_no_process() -> None:
    """libzmq 4.3.5 aborts where its own queue is full: Assertion failed: !_io_error."""

    async def test() -> None:
        async with hurt() as head:
            for n in (2, 40, 1000, 3000):
                async with head.enemy() as peer:
                    many = b"".join(peer.message(b"x") for _ in range(n))
                    peer.connection.sendall(many + peer.message(PING, COMMAND) + peer.message(b"last"))
                    await asyncio.sleep(0.1)
                    peer.connection.setsockopt(
                        system_socket.SOL_SOCKET, system_socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
            await asyncio.sleep(0.1)
            assert await head.works()

    asyncio.run(test())


def test_a_ping_before_the_handshake_is_refused() -> None:
    async def test() -> None:
        async with hurt() as head:
            for flags in (0, 4):
                with system_socket.create_connection(("127.0.0.1", head.port), 20) as connection:
                    OwnZmtp(connection, b"DEALER").greet(as_server=False)
                    connection.sendall(zmtp_frame(PING, flags))
                    assert connection.recv(100) == b""
            assert await head.works()

    asyncio.run(test())


def test_who_leaves_in_the_middle_of_a_message_lets_nobody_wait_for_its_end() -> None:
    async def test() -> None:
        own, secure = new_keys(), Secure(DeviceKeys(*new_keys()))
        with listening(raw_pair(*own), b"ROUTER") as (port, accepted):
            socket = secure.dealer(f"tcp://127.0.0.1:{port}", own[0], MOST_BYTES)
            peer = await asyncio.to_thread(accepted)
            peer.send(b"begun", MORE)
            peer.close()
            assert await received(socket, 0.3) is None
            socket.close(linger=0)
        secure.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_one_key_has_only_so_many_connections() -> None:
    async def test() -> None:
        async with hurt() as head, contextlib.AsyncExitStack() as stack:
            peers = []
            for _ in range(20):
                peers.append(await stack.enter_async_context(head.enemy()))
                await head.next_seen()
                peers[-1].send(b"one more")
                assert await head.heard() == b"one more"
            for peer in peers[:12]:
                assert peer.connection.recv(100) == b""
            for peer in peers[12:]:
                peer.send(b"here")
                assert await head.heard() == b"here"

    asyncio.run(test())


def test_a_server_that_does_not_end_its_message_is_cut_off() -> None:
    async def test() -> None:
        own, secure = new_keys(), Secure(DeviceKeys(*new_keys()))
        with listening(raw_pair(*own), b"ROUTER") as (port, accepted):
            before = rss()
            socket = secure.dealer(f"tcp://127.0.0.1:{port}", own[0], MOST_BYTES)
            flood = Flood(accepted)
            highest = await asyncio.to_thread(flood.highest_rss)
            assert flood.is_cut_off
            assert highest - before < FLOOD_BYTES / 3
            socket.close(linger=0)
        secure.close()

    asyncio.run(test())


@pytest.fixture
def friend() -> tuple[str, str]:
    return new_keys()


@pytest.fixture
def device(friend: tuple[str, str]) -> Iterator[tuple[Links, Peer]]:
    """One end of a ring that a friend may send to."""
    own = new_keys()
    with closing(Links(ANYWHERE, Keys(*own, (friend[0],)), max_bytes=MOST_BYTES, patience_ms=ENOUGH_MS)) as links:
        yield links, Peer(links.address, own[0])


def port_of(peer: Peer) -> int:
    return int(peer.address.rpartition(":")[2])


def test_a_device_of_the_ring_cuts_off_a_message_that_does_not_end(
    device: tuple[Links, Peer], friend: tuple[str, str]
) -> None:
    links, peer = device
    before = rss()
    with dialled(port_of(peer), raw_pair(*friend), peer.public or "", b"PUSH") as enemy:
        flood = Flood(lambda: enemy)
        highest = flood.highest_rss()
    assert flood.is_cut_off
    assert highest - before < FLOOD_BYTES / 2
    with closing(Links(ANYWHERE, Keys(*friend, ()))) as other:
        other.send(peer, encode(Cancel(1, 2, 3)))
        assert decode(links.receive() or [])[0] == Cancel(1, 2, 3)


def test_a_device_that_is_sent_to_can_say_nothing(friend: tuple[str, str]) -> None:
    own, before = new_keys(), rss()
    with (
        listening(raw_pair(*own), b"PULL") as (port, accepted),
        closing(Links(ANYWHERE, Keys(*friend, ()))) as links,
    ):
        links.send(Peer(f"tcp://127.0.0.1:{port}", own[0]), encode(Cancel(1, 2, 3)))
        flood = Flood(accepted)
        assert flood.highest_rss() - before < FLOOD_BYTES / 6
        assert flood.is_cut_off


def test_a_ring_cuts_down_a_crowd_of_strangers(device: tuple[Links, Peer], friend: tuple[str, str]) -> None:
    links, peer = device
    with contextlib.ExitStack() as stack, closing(Links(ANYWHERE, Keys(*friend, ()))) as other:
        crowd = [
            stack.enter_context(system_socket.create_connection(("127.0.0.1", port_of(peer)), 20)) for _ in range(200)
        ]
        for each in crowd[:100]:
            while each.recv(1000):
                pass
        other.send(peer, encode(Cancel(1, 2, 3)))
        assert decode(links.receive() or [])[0] == Cancel(1, 2, 3)


SIZES = [0, 1, 200, 221, 222, 223, 224, 255, 256, 8000, 8200, 99_000]


def test_what_is_held_is_counted_to_the_byte() -> None:
    async def test() -> None:
        async with hurt() as head:
            noise, other = random.Random(1), Secure(DeviceKeys(*head.friend))
            socket = other.dealer(f"tcp://127.0.0.1:{head.port}", head.head, MOST_BYTES)
            for n in range(400):
                frames = [bytes(noise.choice(SIZES)) for _ in range(1 + n % 3)]
                await socket.send_multipart(frames)
                got = await head.socket.recv_multipart(copy=False)
                assert [len(frame) for frame in frames_of(got)[1:]] == [len(frame) for frame in frames]
            await head.next_seen()
            head.ledger.look()
            assert 0 < head.ledger.most_held_now() < 2000
            other.close()

    asyncio.run(test())


def test_ordinary_large_traffic_goes_on(device: tuple[Links, Peer], friend: tuple[str, str]) -> None:
    """Several times what may wait, taken a little later than it comes."""
    links, peer = device
    rows = bytes(95_000)
    with closing(Links(ANYWHERE, Keys(*friend, ()))) as other:
        for round_ in range(20):
            for step in range(100):
                other.send(peer, encode(Cancel(round_, step, 0), rows))
            for step in range(100):
                message, got = decode(links.receive() or [])
                assert message == Cancel(round_, step, 0)
                assert len(got) == len(rows)


def test_weights_in_two_frames_go_on_for_ever() -> None:
    async def test() -> None:
        async with hurt() as head:
            other = Secure(DeviceKeys(*head.friend))
            socket = other.dealer(f"tcp://127.0.0.1:{head.port}", head.head, MOST_BYTES)
            await socket.send(b"give")
            to = frames_of(await head.socket.recv_multipart(copy=False))[0].bytes
            for _ in range(10):
                for n in range(50):
                    await head.socket.send_multipart([to, b"%d" % n, FRAME])
                for n in range(50):
                    assert await socket.poll(ENOUGH_MS)
                    assert (await socket.recv_multipart())[0] == b"%d" % n
            other.close()

    asyncio.run(test())
