"""The process that runs llama.cpp for a profile, from outside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from homeinfer.cluster.planning.profile import Gpu
from homeinfer.cluster.wire.transport import Links, Peer, has_ipc
from homeinfer.engine import runtime
from homeinfer.engine.child import Child
from homeinfer.errors import HomeinferError
from homeinfer.profiling import hops
from homeinfer.profiling.timing_messages import (
    Echo,
    Fill,
    Filled,
    FromTimer,
    GpuList,
    ListGpus,
    Refused,
    StreamTimed,
    Timed,
    TimeStream,
    TimeWindow,
    ToTimer,
)

_HOPS = 40
DEFAULT_HOP_MS = 0.3


class Timer:
    """Asks the process and waits for its answer. Every method raises HomeinferError when that has ended."""

    def __init__(self, subject: str) -> None:
        environment = runtime.engine_environment(os.environ)
        self._child = Child(
            "homeinfer.profiling.timer_process",
            verb="time",
            name="the process that times layers",
            subject=subject,
            environment=environment,
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    def fill(self, path: Path) -> None:
        """Write weights into a shadow's file. Raises HomeinferError when the disk is full."""
        self._ask(Fill(str(path)))

    def time(self, request: TimeWindow) -> Timed:
        """Time a shadow. Raises HomeinferError when llama.cpp can't load it, or computes nonsense."""
        said = self._ask(request)
        assert isinstance(said, Timed)
        if not said.is_finite:
            raise HomeinferError("a layer computed numbers that are not finite: the times would mean nothing")
        return said

    def stream_rate(self, request: TimeStream) -> float:
        """Bytes per second at which a shadow can be streamed, 0 where that can't be said. Raises HomeinferError when
        llama.cpp can't load it."""
        said = self._ask(request)
        assert isinstance(said, StreamTimed)
        return said.bytes_per_s

    def gpus(self) -> tuple[Gpu, ...]:
        """ggml's GPUs."""
        said = self._ask(ListGpus())
        assert isinstance(said, GpuList)
        return said.gpus

    def hop_ms(self, folder: Path) -> float:
        """What it costs to send a step to another process of this machine that has gone to sleep, and to wake up: half
        of a round trip of the ring's own messages, whose code weights have swept out of the caches (hops.py)."""
        if not has_ipc() or len(str(folder)) > 80:
            return DEFAULT_HOP_MS
        here, there = f"ipc://{folder}/a", f"ipc://{folder}/b"
        links = Links(here, patience_ms=2000)
        try:
            self._child.send(msgspec.json.encode(Echo(there, here, _HOPS)) + b"\n")
            times = sorted(hops.round_trips(links, Peer(there), _HOPS))
            self._answer()
        finally:
            links.close()
        return times[len(times) // 4] / 2 if times else DEFAULT_HOP_MS

    def _ask(self, request: ToTimer) -> FromTimer:
        self._child.send(msgspec.json.encode(request) + b"\n")
        return self._answer()

    def _answer(self) -> Filled | Timed | StreamTimed | GpuList:
        said = msgspec.json.decode(self._child.receive(), type=FromTimer)
        if isinstance(said, Refused):
            raise HomeinferError(said.message)
        assert isinstance(said, Filled | Timed | StreamTimed | GpuList)
        return said

    def close(self) -> None:
        """End it. Safe to call twice."""
        self._child.end()


@contextlib.contextmanager
def timer(subject: str) -> Iterator[Timer]:
    """A process that times, ended on the way out; `subject` is what its errors are about."""
    process = Timer(subject)
    try:
        yield process
    finally:
        process.close()
