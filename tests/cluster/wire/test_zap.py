"""Nothing answers an unpaired peer: looked at byte by byte, at each kind of socket that listens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import zmq

from homeinfer.cluster import agent_links
from homeinfer.cluster.agent_jobs import TimeLink
from homeinfer.cluster.wire.guard import Guard
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.messages import Cancel, decode, encode
from homeinfer.cluster.wire.secure import Secure, bound_port, received
from homeinfer.cluster.wire.transport import Keys, Links, new_keys
from homeinfer.cluster.wire.zap import ASKED_AT, ask_at_door
from homeinfer.errors import HomeinferError
from homeinfer.profiling.hops import sweep_memory
from tests.cluster.wire.own_zmtp import dialled, heard_by_a_stranger, listening, raw_pair, zmtp_frame
from tests.support.links import next_of

ANYWHERE = "tcp://127.0.0.1:*"
PATIENCE_SECONDS = 20
NOTHING_BUT_TIME_MS = 300
MOST = 4096
MESSAGE = encode(Cancel(1, 2, 3))[0]


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_a_ring_says_nothing_to_a_stranger() -> None:
    own, friend = new_keys(), new_keys()
    with closing(Links(ANYWHERE, Keys(*own, (friend[0],)), max_bytes=MOST, patience_ms=NOTHING_BUT_TIME_MS)) as links:
        assert heard_by_a_stranger(port_of(links.address), own[0], b"PUSH") == b""
        assert links.receive() is None
        with dialled(port_of(links.address), raw_pair(*friend), own[0], b"PUSH") as peer:
            peer.send(MESSAGE)
            assert decode(next_of(links))[0] == Cancel(1, 2, 3)


def test_who_is_allowed_from_now_on_is_let_in_and_who_was_before_is_told_nothing() -> None:
    own, before, now = new_keys(), new_keys(), new_keys()
    with closing(
        Links(ANYWHERE, Keys(*own, (before[0],)), max_bytes=MOST, patience_ms=PATIENCE_SECONDS * 1000)
    ) as links:
        port = port_of(links.address)
        assert heard_by_a_stranger(port, own[0], b"PUSH", raw_pair(*now)) == b""
        links.allow([now[0]])
        assert heard_by_a_stranger(port, own[0], b"PUSH", raw_pair(*before)) == b""
        with dialled(port, raw_pair(*now), own[0], b"PUSH") as peer:
            peer.send(MESSAGE)
            assert decode(links.receive() or [])[0] == Cancel(1, 2, 3)


def test_the_end_of_a_link_says_nothing_to_a_stranger() -> None:
    own, friend = DeviceKeys(*new_keys()), new_keys()
    with closing(agent_links._End(zmq.ROUTER, own)) as end:
        end.bind(ANYWHERE, friend[0])
        port = port_of(end.socket.getsockopt_string(zmq.LAST_ENDPOINT))
        assert heard_by_a_stranger(port, own.public, b"DEALER") == b""
        assert not end.socket.poll(NOTHING_BUT_TIME_MS)
        with dialled(port, raw_pair(*friend), own.public) as peer:
            peer.send(b"friend")
            assert end.received(2)[1] == b"friend"


def test_a_head_says_nothing_to_a_stranger() -> None:
    async def test() -> None:
        secure = Secure(DeviceKeys(*new_keys()))
        socket = secure.router(ANYWHERE, "test", lambda _: False, MOST)
        said = await asyncio.to_thread(heard_by_a_stranger, bound_port(socket), secure.keys.public, b"DEALER")
        assert said == b""
        assert await received(socket, NOTHING_BUT_TIME_MS / 1000) is None
        secure.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_nobody_is_let_in_while_nobody_is_there_to_be_asked() -> None:
    own, secret = new_keys()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.curve_publickey, socket.curve_secretkey = own.encode(), secret.encode()
        ask_at_door(socket, b"test")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        assert heard_by_a_stranger(port, own, b"DEALER") == b""
        assert not socket.poll(NOTHING_BUT_TIME_MS)


@contextmanager
def guarded(is_allowed: object) -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], Guard, zmq.Socket[bytes], int, str]]:
    """A socket that a guard lets people in to; all ends, whatever is under way."""
    own, secret = new_keys()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guard = Guard(context)
    socket = context.socket(zmq.ROUTER)
    socket.curve_publickey, socket.curve_secretkey = own.encode(), secret.encode()
    guard.watch(socket, MOST, MOST, listens=True, most_queued=2)
    guard.admit(socket, "test", is_allowed)  # type: ignore[arg-type]

    def end() -> None:
        socket.close(linger=0)
        guard.close()
        context.term()

    try:
        yield context, guard, socket, socket.bind_to_random_port("tcp://127.0.0.1"), own
    finally:
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        ending.join(PATIENCE_SECONDS)
    assert not ending.is_alive()


def test_what_is_no_question_is_refused_and_the_next_one_is_answered() -> None:
    friend = new_keys()
    with guarded(lambda key: key == friend[0]) as (context, _, socket, port, own):
        with context.socket(zmq.REQ) as asking:
            asking.connect(ASKED_AT)
            for question in ([b""], [b"1.0", b"7"], [b"1.0", b"7", b"test", b"", b"", b"CURVE"], [b"x"] * 20):
                asking.send_multipart(question)
                assert asking.poll(PATIENCE_SECONDS * 1000)
                assert asking.recv_multipart()[2:] == [b"300", b"", b"", b""]
        with dialled(port, raw_pair(*friend), own) as peer:
            peer.send(b"hello")
            assert socket.poll(PATIENCE_SECONDS * 1000)


def knock(port: int, server_key: str) -> None:
    """As a stranger, at a door that may close at any moment."""
    with contextlib.suppress(OSError):
        heard_by_a_stranger(port, server_key, b"DEALER")


def test_the_end_waits_for_nobody_who_is_just_asking_to_be_let_in() -> None:
    is_asked, may_go_on = threading.Event(), threading.Event()

    def slow(_: str) -> bool:
        is_asked.set()
        return may_go_on.wait(PATIENCE_SECONDS)

    with guarded(slow) as (_, _, _, port, own):
        strangers = [threading.Thread(target=knock, args=(port, own), daemon=True) for _ in range(3)]
        for stranger in strangers:
            stranger.start()
        assert is_asked.wait(PATIENCE_SECONDS)
        threading.Timer(0.2, may_go_on.set).start()
    for stranger in strangers:
        stranger.join(PATIENCE_SECONDS)
        assert not stranger.is_alive()


def test_timing_a_link_to_one_who_breaks_the_protocol_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = (DeviceKeys(*new_keys()) for _ in range(2))
    problems: list[str] = []
    is_broken = threading.Event()

    def swept_later() -> Any:  # the timing begins when the protocol is broken
        assert is_broken.wait(PATIENCE_SECONDS)
        return sweep_memory()

    monkeypatch.setattr(agent_links, "_PATIENCE_MS", 500)
    monkeypatch.setattr(agent_links, "sweep_memory", swept_later)

    def time_link(port: int) -> None:
        job = TimeLink("box", f"tcp://127.0.0.1:{port}", other.public, own, (100, 1000), 0.0)
        with pytest.raises(HomeinferError) as problem:
            agent_links.time_link(job)
        problems.append(str(problem.value))

    with listening(raw_pair(other.public, other.secret), b"ROUTER") as (port, accepted):
        timing = threading.Thread(target=time_link, args=(port,), daemon=True)
        timing.start()
        accepted().connection.sendall(zmtp_frame(b"garbage"))
        is_broken.set()
        timing.join(PATIENCE_SECONDS)
    assert problems[0].startswith("nothing comes back from box")
