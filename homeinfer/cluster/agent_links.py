"""What a hop to another device takes: a process at each end, the same encryption as the ring's, there and back on one
connection, so that only one end has to be reached."""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq
import zmq.auth.thread

from homeinfer.cluster.agent_jobs import Closed, FromJob, Opened, OpenEnd, Timed, TimeLink
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.errors import HomeinferError
from homeinfer.profiling.hops import SWEEP_BYTES
from homeinfer.profiling.link_probe import fitted

_TRIPS = 12
_PATIENCE_MS = 10_000
_MOST_BYTES = 4 << 20
_SWEPT = struct.Struct("<d")


class _Only:
    """zmq.auth's credentials provider: one key may connect."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def callback(self, _domain: str, key: bytes) -> bool:
        return key == self._key


def open_end(job: OpenEnd, say: Callable[[FromJob], None]) -> Closed:
    """Send back what comes, with the time that sweeping the caches took meanwhile. Raises HomeinferError."""
    context = zmq.Context()
    guard = zmq.auth.thread.ThreadAuthenticator(context)
    guard.start()
    guard.configure_curve_callback("probe", credentials_provider=_Only(job.allowed))
    socket = _socket(context, zmq.ROUTER, job.own)
    try:
        socket.curve_server, socket.zap_domain = True, b"probe"
        _bind(socket, job.listen)
        say(Opened(int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])))
        sweep = np.ones(SWEEP_BYTES // 8)
        for _ in range((_TRIPS + 1) * len(job.sizes)):
            sender, body = _received(socket, 2)
            begin = time.perf_counter()
            sweep.sum()
            socket.send_multipart([sender, _SWEPT.pack(time.perf_counter() - begin), body])
        return Closed()
    finally:
        socket.close(linger=1000)
        guard.stop()
        context.term()


def time_link(job: TimeLink) -> Timed:
    """The link to the device where an end is open. Raises HomeinferError when nothing comes back."""
    context = zmq.Context()
    socket = _socket(context, zmq.DEALER, job.own)
    try:
        socket.curve_serverkey = job.server_key.encode()
        socket.connect(job.address)
        sweep = np.ones(SWEEP_BYTES // 8)
        times = [statistics.median(_trips_ms(socket, sweep, size)) / 2 for size in job.sizes]
    except zmq.ZMQError as problem:
        raise HomeinferError(f"{job.to} can't be reached at {job.address}: {problem.strerror}") from None
    except _Silence:
        raise HomeinferError(
            f"nothing comes back from {job.to} ({job.address}): does its firewall let other devices in?"
        ) from None
    finally:
        socket.close(linger=0)
        context.term()
    return Timed(fitted(job.to, job.sizes, (times[0], times[1]), job.hop_ms))


class _Silence(Exception):
    """Nothing came in time."""


def _trips_ms(socket: zmq.Socket[bytes], sweep: Any, nbytes: int) -> list[float]:
    """Round trips of messages of nbytes, without the sweeping, and without the first, which finds connection and
    buffers cold."""
    times, body = [], bytes(nbytes)
    for _ in range(_TRIPS + 1):
        sweep.sum()
        begin = time.perf_counter()
        socket.send(body)
        swept, _ = _received(socket, 2)
        times.append((time.perf_counter() - begin - _SWEPT.unpack(swept)[0]) * 1e3)
    return times[1:]


def _received(socket: zmq.Socket[bytes], n_frames: int) -> list[bytes]:
    if not socket.poll(_PATIENCE_MS):
        raise _Silence
    frames = socket.recv_multipart()
    if len(frames) != n_frames:
        raise HomeinferError("the other end of a link sent something that is no answer")
    return frames


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, own: DeviceKeys) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.curve_publickey, socket.curve_secretkey = own.public.encode(), own.secret.encode()
    socket.ipv6 = True
    socket.maxmsgsize = _MOST_BYTES
    return socket


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as problem:
        raise HomeinferError(f"can't listen at {address} to time a link: {problem.strerror}") from None
