"""The guard's thread ends with the sockets that it watches, whatever it was busy with when it was closed."""

from __future__ import annotations

import os
import socket as system_socket
import threading

import psutil
import pytest
import zmq

from homeinfer.cluster.wire.connection import seen
from homeinfer.cluster.wire.guard import Guard

PATIENCE_SECONDS = 20
MOST = 4096


def test_a_socket_watched_while_the_guard_is_busy_and_closes_keeps_no_context_open() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guard = Guard(context)
    is_busy, may_go_on = threading.Event(), threading.Event()

    def busy(_: int) -> None:
        is_busy.set()
        may_go_on.wait(PATIENCE_SECONDS)

    first = context.socket(zmq.ROUTER)
    guard.watch(first, MOST, MOST, listens=True, most_queued=2, on_event=busy)
    port = first.bind_to_random_port("tcp://127.0.0.1")
    with system_socket.create_connection(("127.0.0.1", port)):
        assert is_busy.wait(PATIENCE_SECONDS)
        second = context.socket(zmq.ROUTER)
        guard.watch(second, MOST, MOST, listens=True, most_queued=2)
        closing = threading.Thread(target=guard.close, daemon=True)
        closing.start()
        closing.join(0.1)  # it has said so, and waits for the thread
        may_go_on.set()
        closing.join(PATIENCE_SECONDS)
        assert not closing.is_alive()
    first.close(linger=0)
    second.close(linger=0)
    ending = threading.Thread(target=context.term, daemon=True)
    ending.start()
    ending.join(PATIENCE_SECONDS)
    assert not ending.is_alive()


def test_the_others_are_watched_on_where_one_can_not_be_told_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    is_broken, is_told = threading.Event(), threading.Event()

    def broken(_: int) -> None:
        is_broken.set()
        raise RuntimeError("broken")

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guard = Guard(context)
    for on_event in (broken, lambda _: is_told.set()):
        socket = context.socket(zmq.ROUTER)
        guard.watch(socket, MOST, MOST, listens=True, most_queued=2, on_event=on_event)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        system_socket.create_connection(("127.0.0.1", port)).close()
        assert (is_broken if on_event is broken else is_told).wait(PATIENCE_SECONDS)
    guard.close()
    context.destroy(linger=0)
    assert "could not be told" in caplog.text


def test_a_number_that_is_something_else_s_by_now_is_left_alone() -> None:
    """libzmq may have closed a connection before the guard hears that it was made."""
    here, there = os.pipe()
    before = psutil.Process().num_fds()
    assert seen(here) is None
    os.write(there, b"x")
    assert os.read(here, 1) == b"x"
    assert psutil.Process().num_fds() <= before
    os.close(here)
    os.close(there)
