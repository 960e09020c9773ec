"""The socket for chat, run, bench and status: a file that only this user can open, or CURVE on the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from homeinfer.cluster.wire.client import FromClient, encode, from_client
from homeinfer.cluster.wire.secure import Secure
from homeinfer.cluster.wire.transport import has_ipc
from homeinfer.errors import HomeinferError

_MOST_BYTES = 16 << 20
"""A prompt of a million tokens takes 5 MB."""
_LONGEST_PATH = 100
"""The system's limit for a socket's path is 104 to 108 bytes."""
_MOST_QUEUED = 10_000


class Clients:
    """Give it a handler: what a client said, and who it was."""

    def __init__(self, secure: Secure, folder: Path, handle: Callable[[bytes, FromClient], None]) -> None:
        """folder: private, for the socket's file. Raises HomeinferError when it can't listen."""
        self._handle = handle
        self._context: zmq.asyncio.Context | None = None
        path = folder / "clients.sock"
        if has_ipc() and len(str(path)) < _LONGEST_PATH:
            path.unlink(missing_ok=True)
            self._path: Path | None = path
            self._socket = self._at_file(path)
        else:
            self._path = None
            own = secure.keys.public
            self._socket = secure.router("tcp://127.0.0.1:*", "clients", lambda key: key == own, _MOST_BYTES)
        self._socket.router_mandatory = True
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _at_file(self, path: Path) -> zmq.asyncio.Socket:
        self._context = zmq.asyncio.Context()
        socket: zmq.asyncio.Socket = self._context.socket(zmq.ROUTER)
        socket.maxmsgsize, socket.linger, socket.sndhwm = _MOST_BYTES, 500, _MOST_QUEUED
        try:
            socket.bind(f"ipc://{path}")
            path.chmod(0o600)
        except (zmq.ZMQError, OSError) as problem:
            socket.close(linger=0)
            self._context.term()
            raise HomeinferError(f"{path}: can't listen there for chat and run: {problem}") from None
        return socket

    async def serve(self) -> None:
        """For ever."""
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 2:
                continue
            try:
                message = from_client(frames[1])
            except HomeinferError:
                continue  # nobody who speaks this protocol
            self._handle(frames[0], message)

    def send(self, client: bytes, message: msgspec.Struct) -> bool:
        """False when the client is gone, or does not take what it is sent."""
        sent = self._socket.send_multipart([client, encode(message)], zmq.NOBLOCK)
        assert isinstance(sent, asyncio.Future)  # done: it was sent, or can't be without waiting
        if not sent.done():
            sent.cancel()
            return False
        return sent.exception() is None

    def close(self) -> None:
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._context is not None:
            self._context.term()
