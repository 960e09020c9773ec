"""What a hop to another device takes: a process at each end, the same encryption as the ring's, there and back on one
connection, so that only one end has to be reached."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import zmq

from homeinfer.cluster.agent_jobs import Closed, FromJob, Opened, OpenEnd, Timed, TimeLink
from homeinfer.cluster.wire.guard import Guard, count_taken, wire_bytes
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.ledger import HANDSHAKE_SECONDS
from homeinfer.errors import HomeinferError
from homeinfer.profiling.hops import sweep_memory
from homeinfer.profiling.link_probe import fitted

_TRIPS = 12
_ENOUGH_SECONDS = 2.0
"""For so long messages of one length go there and back; slow links get by with fewer, since answers may need them."""
_PATIENCE_MS = 10_000
_MOST_BYTES, _MOST_HELD = 4 << 20, 16 << 20
_NO_ANSWER = "the other end of a link sent something that is no answer"
_SWEPT = struct.Struct("<d")


def open_end(job: OpenEnd, say: Callable[[FromJob], None]) -> Closed:
    """Send back what comes, with the time that sweeping the caches took meanwhile. Raises HomeinferError."""
    with closing(_End(zmq.ROUTER, job.own)) as end:
        end.bind(job.listen, job.allowed)
        say(Opened(int(end.socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])))
        sweep = sweep_memory()
        try:
            for _ in range((_TRIPS + 1) * len(job.sizes) + 1):
                sender, body = end.received(2)
                if not body:
                    break  # that was all
                begin = time.perf_counter()
                sweep.sum()
                end.send(sender, _SWEPT.pack(time.perf_counter() - begin), body)
        except _Silence:
            raise HomeinferError("nothing came over a link that was to be timed") from None
        return Closed()


def time_link(job: TimeLink) -> Timed:
    """The link to the device where an end is open. Raises HomeinferError when nothing comes back, or something else."""
    with closing(_End(zmq.DEALER, job.own)) as end:
        try:
            end.socket.curve_serverkey = job.server_key.encode()
            end.socket.connect(job.address)
            sweep = sweep_memory()
            times = [_undisturbed(_trips_ms(end, sweep, size)) / 2 for size in job.sizes]
            end.send(b"")  # that was all
        except zmq.ZMQError as problem:
            raise HomeinferError(f"{job.to} can't be reached at {job.address}: {problem.strerror}") from None
        except _Silence:
            raise HomeinferError(
                f"nothing comes back from {job.to} ({job.address}): does its firewall let other devices in?"
            ) from None
    return Timed(fitted(job.to, job.sizes, (times[0], times[1]), job.hop_ms))


class _Silence(Exception):
    """Nothing came in time."""


class _End:
    """A socket of its own context, whose peers are watched."""

    def __init__(self, kind: int, own: DeviceKeys) -> None:
        self._context = zmq.Context()
        self._guard = Guard(self._context)
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.curve_publickey, self.socket.curve_secretkey = own.public.encode(), own.secret.encode()
        self.socket.ipv6 = True
        self.socket.rcvtimeo = self.socket.sndtimeo = _PATIENCE_MS
        self.socket.handshake_ivl = int(HANDSHAKE_SECONDS * 1000)
        self._ledger = self._guard.watch(
            self.socket, _MOST_BYTES, _MOST_HELD, listens=kind == zmq.ROUTER, most_queued=_MOST_HELD // _MOST_BYTES
        )

    def bind(self, address: str, allowed: str) -> None:
        """Listen to one key. Raises HomeinferError."""
        try:
            self._guard.admit(self.socket, "probe", lambda key: key == allowed)
            self.socket.bind(address)
        except zmq.ZMQError as problem:
            raise HomeinferError(f"can't listen at {address} to time a link: {problem.strerror}") from None

    def send(self, *frames: bytes) -> None:
        """Raises _Silence where the other end takes nothing, as when it broke the protocol."""
        try:
            self.socket.send_multipart(frames)
        except zmq.Again:
            raise _Silence from None

    def received(self, n_frames: int) -> list[bytes]:
        """The next message. Raises _Silence, and HomeinferError for one of another number of frames."""
        try:
            frames = self.socket.recv_multipart(copy=False)
        except zmq.Again:
            raise _Silence from None
        on_wire = frames[1:] if self.socket.type == zmq.ROUTER else frames
        count_taken(self._ledger, frames[-1], sum(wire_bytes(len(frame)) for frame in on_wire))
        if len(frames) != n_frames:
            raise HomeinferError(_NO_ANSWER)
        return [frame.bytes for frame in frames]

    def close(self) -> None:
        """What was sent last still leaves, within a second."""
        self.socket.close(linger=1000)
        self._guard.close()
        self._context.term()


def _undisturbed(times: Sequence[float]) -> float:
    """The lower quartile: what else the two machines do makes some trips longer, and none shorter."""
    return sorted(times)[len(times) // 4]


def _trips_ms(end: _End, sweep: Any, nbytes: int) -> list[float]:
    """Round trips of messages of nbytes, without the sweeping, and without the first, which finds connection and
    buffers cold, unless it was slow. Raises _Silence, and HomeinferError for what is no answer."""
    times, body = list[float](), bytes(nbytes)
    while len(times) <= _TRIPS and sum(times) < 1e3 * _ENOUGH_SECONDS:
        sweep.sum()
        begin = time.perf_counter()
        end.send(body)
        swept, back = end.received(2)
        took = time.perf_counter() - begin
        if len(swept) != _SWEPT.size or len(back) != nbytes or not 0 <= _SWEPT.unpack(swept)[0] <= took:
            raise HomeinferError(_NO_ANSWER)
        times.append((took - _SWEPT.unpack(swept)[0]) * 1e3)
    return times[1:] or times
