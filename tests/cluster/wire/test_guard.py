"""The guard's thread ends with the sockets that it watches, whatever it was busy with when it was closed."""

from __future__ import annotations

import socket as system_socket
import threading

import zmq

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
