"""Timing links: slow ones get by with few messages, which answers may be waiting behind."""

from __future__ import annotations

import threading
import time
from itertools import groupby

import zmq

from homeinfer.cluster.agent_jobs import Closed, OpenEnd, TimeLink
from homeinfer.cluster.agent_links import open_end, time_link
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.transport import new_keys

SIZES = (100, 10_000)


class Echo(threading.Thread):
    """Another device's end, for whoever comes, which takes so many seconds for each message."""

    def __init__(self, keys: DeviceKeys, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds = seconds
        self.heard: list[int] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey, self._socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")

    def run(self) -> None:
        while not self.heard or self.heard[-1]:
            sender, body = self._socket.recv_multipart()
            self.heard.append(len(body))
            if body:
                time.sleep(self._seconds)
                self._socket.send_multipart([sender, bytes(8), body])
        self._socket.close(linger=1000)
        self._context.term()


def test_a_slow_link_is_timed_with_few_messages() -> None:
    own, other = (DeviceKeys(*new_keys()) for _ in range(2))
    echo = Echo(other, 1.1)
    echo.start()
    link = time_link(TimeLink("box", f"tcp://127.0.0.1:{echo.port}", other.public, own, SIZES, 0.0)).link
    echo.join(20)
    assert [size for size, _ in groupby(echo.heard)] == [100, 10_000, 0]
    assert max(map(echo.heard.count, SIZES)) <= 2  # one where it took as long as two should
    assert link.to == "box"
    assert link.latency_s > 0.5


def test_the_end_of_a_link_that_was_timed_closes_at_once() -> None:
    own, other = (DeviceKeys(*new_keys()) for _ in range(2))
    opened = threading.Event()
    ports: list[int] = []
    closed: list[Closed] = []

    def say(message: object) -> None:
        ports.append(getattr(message, "port"))  # noqa: B009
        opened.set()

    def serve() -> None:
        closed.append(open_end(OpenEnd("tcp://127.0.0.1:*", other, own.public, SIZES), say))

    end = threading.Thread(target=serve, daemon=True)
    end.start()
    assert opened.wait(20)
    time_link(TimeLink("box", f"tcp://127.0.0.1:{ports[0]}", other.public, own, SIZES, 0.0))
    end.join(20)
    assert closed == [Closed()]
