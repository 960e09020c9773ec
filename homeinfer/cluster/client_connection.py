"""One client's connection to the coordinator of this machine: blocking, for one thread."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import zmq

from homeinfer.cluster.coordinator.running import RunningCluster, run_folder, running_cluster
from homeinfer.cluster.wire.client import ToClient, encode, to_client
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.errors import HomeinferError

_MOST_BYTES = 64 << 20
_CONNECT_SECONDS = 2.0
_NOTE = "cluster.json"
"""What coordinator.running keeps in the run folder."""


class Connection:
    """A DEALER to the coordinator whose state folder this is. Messages to nobody are not kept for later."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self.heard = time.monotonic()
        """When the last message came; before the first one: when this was made."""
        self.reopen()

    def is_there(self) -> bool:
        """Whether a coordinator's process runs, this one or the next."""
        return running_cluster(self._folder) is not None

    def was_taken_down(self) -> bool:
        """Whether the last one ended on purpose: one that is killed leaves its note behind."""
        return not (run_folder(self._folder) / _NOTE).exists()

    def reopen(self) -> None:
        """A new socket, for a coordinator that may have another address by now. What was under way is lost."""
        self._end_socket(0)
        cluster = running_cluster(self._folder)
        if cluster is not None:
            self._socket = _dealer(self._context, cluster, self._folder)

    def send(self, message: msgspec.Struct) -> bool:
        """False when nobody is there to take it."""
        if self._socket is None or not self.is_there():
            return False
        try:
            self._socket.send(encode(message))
        except zmq.Again:
            return False
        return True

    def receive(self, seconds: float) -> ToClient | None:
        """The next message; None when none came in time. Raises HomeinferError for what is no message."""
        if self._socket is None:
            time.sleep(seconds)
            return None
        if not self._socket.poll(max(0, round(seconds * 1e3))):
            return None
        try:  # libzmq announces a message that never comes where its sender was killed in the middle of it
            message = to_client(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        self.heard = time.monotonic()
        return message

    def close(self) -> None:
        """Safe to call twice. What was sent has a moment to leave."""
        self._end_socket(500)
        self._context.term()

    def _end_socket(self, linger_ms: int) -> None:
        if self._socket is not None:
            self._socket.close(linger=linger_ms)
        self._socket = None


def _dealer(context: zmq.Context[zmq.Socket[bytes]], cluster: RunningCluster, folder: Path) -> zmq.Socket[bytes]:
    opened = context.socket(zmq.DEALER)
    try:
        opened.linger = 0
        opened.immediate = True
        opened.maxmsgsize = _MOST_BYTES
        opened.sndtimeo = int(_CONNECT_SECONDS * 1e3)
        if not cluster.address.startswith("ipc://"):
            keys = own_keys(folder)
            opened.curve_serverkey = cluster.key.encode()
            opened.curve_publickey = keys.public.encode()
            opened.curve_secretkey = keys.secret.encode()
        opened.connect(cluster.address)
    except (zmq.ZMQError, ValueError) as problem:
        opened.close(linger=0)
        raise HomeinferError(f"the cluster on this machine can't be reached at {cluster.address}: {problem}") from None
    except BaseException:  # a socket left open would keep `close` waiting for ever
        opened.close(linger=0)
        raise
    return opened
