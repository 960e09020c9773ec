"""What a hop of the ring costs beside the wire: both ends of a ping-pong of steps.

A decode step sweeps interpreter, sockets and kernel out of the caches, which makes a hop several times slower than a
ping-pong by itself; so both ends read as much memory before each message as the caches hold.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from homeinfer.cluster.wire.messages import Step, decode, encode
from homeinfer.cluster.wire.transport import Links, Peer, send
from homeinfer.profiling.machine import usable_memory

SWEEP_BYTES = 96 << 20
"""More than the last-level cache's share that a home processor gives to one program."""
_SHARE_OF_MEMORY = 8
_SWEPT = struct.Struct("<d")


def sweep_memory() -> npt.NDArray[np.float64]:
    """What is read before each message."""
    return np.ones(sweep_bytes(usable_memory()) // 8)


def sweep_bytes(room: int) -> int:
    """How much that is where so many bytes of memory are free: nothing else may be pushed out for it."""
    return min(SWEEP_BYTES, max(room, 0) // _SHARE_OF_MEMORY)


def round_trips(links: Links, peer: Peer, count: int, nbytes: int = 8192) -> Iterator[float]:
    """Milliseconds of so many round trips of hidden states of nbytes, without the sweeping; ends early when nobody
    answers."""
    sweep = sweep_memory()
    for number in range(count):
        sweep.sum()
        begin = time.perf_counter()
        _pass_on(links, peer, number, 0.0, bytes(nbytes))
        frames = links.receive()
        if frames is None:
            return
        message, _ = decode(frames)
        took = time.perf_counter() - begin
        if isinstance(message, Step):
            yield (took - _SWEPT.unpack(message.index)[0]) * 1e3


def echo(links: Links, peer: Peer, count: int) -> None:
    """The other end: what it swept away meanwhile is said in the message."""
    sweep = sweep_memory()
    for _ in range(count):
        frames = links.receive()
        if frames is None:
            return
        message, rows = decode(frames)
        begin = time.perf_counter()
        sweep.sum()
        _pass_on(links, peer, message.step, time.perf_counter() - begin, rows)


def _pass_on(links: Links, peer: Peer, number: int, swept: float, rows: Any) -> None:
    send(links.sender(peer), encode(Step(0, number, 0, 1, 0, _SWEPT.pack(swept)), rows))
