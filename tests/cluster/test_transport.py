"""Sockets of the ring: closed to everyone else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from homeinfer.cluster.wire.messages import Cancel, decode, encode
from homeinfer.cluster.wire.transport import Keys, Links, Peer, new_keys, send
from homeinfer.errors import HomeinferError
from tests.support.links import next_of

ANYWHERE = "tcp://127.0.0.1:*"
NOTHING_BUT_TIME = 600
"""Milliseconds in which a message that may pass would long have arrived (`next_of` waits longer for one that will)."""


def keys(pair: tuple[str, str], *allowed: str) -> Keys:
    return Keys(*pair, allowed)


@pytest.fixture
def friend() -> tuple[str, str]:
    return new_keys()


@pytest.fixture
def listener(friend: tuple[str, str]) -> Iterator[tuple[Links, Peer]]:
    """Someone who listens on the network to one friend, and how to reach them."""
    mine = new_keys()
    with closing(Links(ANYWHERE, keys(mine, friend[0]), max_bytes=1000, patience_ms=NOTHING_BUT_TIME)) as links:
        yield links, Peer(links.address, mine[0])


def test_known_keys_get_through(listener: tuple[Links, Peer], friend: tuple[str, str]) -> None:
    links, peer = listener
    with closing(Links(ANYWHERE, keys(friend))) as other:
        send(other.sender(peer), encode(Cancel(1, 2, 3), b"rows"))
        message, rows = decode(next_of(links))
    assert message == Cancel(1, 2, 3)
    assert bytes(rows) == b"rows"


def test_an_unknown_key_gets_nothing_through(listener: tuple[Links, Peer], friend: tuple[str, str]) -> None:
    links, peer = listener
    with closing(Links(ANYWHERE, keys(new_keys()))) as stranger:
        send(stranger.sender(peer), encode(Cancel(1, 2, 3)))
        assert links.receive() is None
        with closing(Links(ANYWHERE, keys(friend))) as other:
            send(other.sender(peer), encode(Cancel(4, 5, 6)))
            assert decode(next_of(links))[0] == Cancel(4, 5, 6)
        assert links.receive() is None


def test_a_listener_with_another_key_gets_nothing(listener: tuple[Links, Peer], friend: tuple[str, str]) -> None:
    links, peer = listener
    with closing(Links(ANYWHERE, keys(friend))) as other:
        send(other.sender(Peer(peer.address, new_keys()[0])), encode(Cancel(1, 2, 3)))
        assert links.receive() is None


def test_a_frame_that_is_too_long_is_cut_off(listener: tuple[Links, Peer], friend: tuple[str, str]) -> None:
    links, peer = listener
    with closing(Links(ANYWHERE, keys(friend))) as other:
        send(other.sender(peer), encode(Cancel(1, 2, 3), bytes(1001)))
        assert links.receive() is None
    with closing(Links(ANYWHERE, keys(friend))) as other:
        send(other.sender(peer), encode(Cancel(4, 5, 6), bytes(800)))
        assert decode(next_of(links))[0] == Cancel(4, 5, 6)


def test_the_network_without_keys_is_refused() -> None:
    with pytest.raises(HomeinferError, match=r"^tcp://127\.0\.0\.1:\* would listen in the clear"):
        Links(ANYWHERE)


@pytest.mark.parametrize("public", [None, new_keys()[0]])
def test_reaching_out_without_keys_is_refused_and_closing_works(public: str | None, temp_folder: Path) -> None:
    with (
        pytest.raises(HomeinferError, match="would be reached in the clear"),
        closing(Links(f"ipc://{temp_folder}/me")) as links,
    ):
        links.sender(Peer("tcp://127.0.0.1:9", public))


def test_an_address_in_use_is_refused(listener: tuple[Links, Peer]) -> None:
    taken = listener[0].address
    with pytest.raises(HomeinferError, match=rf"^can't listen at {taken}: Address already in use"):
        Links(taken, keys(new_keys()))


@pytest.mark.parametrize("size", [0, 100, 70_000, 3_000_000])
def test_rows_of_any_size_pass_through_a_file_socket(size: int, temp_folder: Path) -> None:
    rows = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with (
        closing(Links(f"ipc://{temp_folder}/a", patience_ms=30_000)) as receiver,
        closing(Links(f"ipc://{temp_folder}/b")) as sender,
    ):
        for step in range(3):
            send(sender.sender(Peer(receiver.address)), encode(Cancel(1, step, 0), rows))
        for step in range(3):
            message, got = decode(receiver.receive() or [])
            assert message == Cancel(1, step, 0)
            assert bytes(got) == rows


def test_whoever_is_allowed_later_gets_through_without_anybody_waiting(listener: tuple[Links, Peer]) -> None:
    links, peer = listener
    late = new_keys()
    with closing(Links(ANYWHERE, keys(late))) as other:
        for step in range(5):
            other.send(peer, encode(Cancel(1, step, 3)))
            assert links.receive() is None
        links.allow([late[0]])
        assert [decode(next_of(links))[0] for _ in range(5)] == [Cancel(1, step, 3) for step in range(5)]
        other.send(peer, encode(Cancel(4, 5, 6)))
        assert decode(next_of(links))[0] == Cancel(4, 5, 6)


def test_a_connection_that_was_allowed_once_is_not_heard_any_more(
    listener: tuple[Links, Peer], friend: tuple[str, str]
) -> None:
    links, peer = listener
    with closing(Links(ANYWHERE, keys(friend))) as other:
        other.send(peer, encode(Cancel(1, 2, 3)))
        assert decode(next_of(links))[0] == Cancel(1, 2, 3)
        links.allow([])
        other.send(peer, encode(Cancel(4, 5, 6)))
        assert links.receive() is None


def test_a_receiver_that_waits_for_ever_can_be_woken(temp_folder: Path) -> None:
    with closing(Links(f"ipc://{temp_folder}/a")) as links:
        thread = Thread(target=links.wake)
        thread.start()
        assert links.receive() is None
        thread.join()
