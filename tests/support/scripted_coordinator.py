"""A coordinator that says what a test tells it to: a real socket at the place where clients look for one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from homeinfer.cluster.coordinator.running import RunningCluster, remove_running, run_folder, write_running
from homeinfer.cluster.wire.client import (
    ClusterStatus,
    DeviceStatus,
    FromClient,
    Open,
    Status,
    Watch,
    encode,
    from_client,
)
from homeinfer.folders import private_folder
from homeinfer.process_start import process_start

Script = Callable[[FromClient], Sequence[msgspec.Struct]]


def ready_status(model: Path, **changes: object) -> ClusterStatus:
    """Of two devices that have loaded a model."""
    status = ClusterStatus(
        state="ready",
        model=model.stem,
        model_path=str(model),
        epoch=1,
        n_ctx=256,
        sequences=1,
        devices=(
            DeviceStatus("desk", "ready", is_head=True, host="10.0.0.1", layers=((0, 10), (20, 30))),
            DeviceStatus("laptop", "ready", host="10.0.0.2", layers=((10, 20),)),
        ),
        pid=os.getpid(),
    )
    return msgspec.structs.replace(status, **changes)


class ScriptedCoordinator:
    """Answers Open and Watch with its status, and everything else with what `script` returns; keeps what it was
    told. May be stopped and started again, as a coordinator that was killed. after_status: what its status is once it
    has told of the one before."""

    def __init__(self, folder: Path, status: ClusterStatus, script: Script) -> None:
        self.status, self.script = status, script
        self.after_status: ClusterStatus | None = None
        self.heard: list[FromClient] = []
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    def start(self) -> None:
        """Listen; returns when clients can find it."""
        private_folder(self._folder)
        address = f"ipc://{private_folder(run_folder(self._folder))}/clients.sock"
        self._context = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.bind(address)
        self._ends.clear()
        self._thread = threading.Thread(target=self._serve, args=(socket,))
        self._thread.start()
        model = self.status.model_path
        write_running(self._folder, RunningCluster(os.getpid(), process_start(), address, "", model))

    def stop(self, *, leaves_note: bool = False) -> None:
        """Stop listening; returns when the socket's file is gone, so that it can't be the next one's that goes."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
        if self._context is not None:
            self._context.term()
            self._context = None
        if not leaves_note:
            remove_running(self._folder)

    def close(self) -> None:
        self.stop()

    def _serve(self, socket: zmq.Socket[bytes]) -> None:
        with contextlib.closing(socket):
            socket.linger = 200
            while not self._ends.is_set():
                if not socket.poll(20):
                    continue
                client, frame = socket.recv_multipart()
                message = from_client(frame)
                self.heard.append(message)
                for answer in self._answers(message):
                    socket.send_multipart([client, encode(answer)])

    def _answers(self, message: FromClient) -> Sequence[msgspec.Struct]:
        if not isinstance(message, Open | Watch):
            return self.script(message)
        told = Status(self.status)
        if self.after_status is not None:
            self.status, self.after_status = self.after_status, None
        return [told]
