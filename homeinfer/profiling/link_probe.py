"""What a hop from one device to another takes, over the ring's own sockets: a process at each end.

python -m homeinfer.profiling.link_probe    (a Listen line on stdin, an address back, a Play line, then Trips)
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from homeinfer.cluster.planning.profile import Link
from homeinfer.cluster.wire.transport import Keys, Links, Peer, new_keys
from homeinfer.errors import HomeinferError
from homeinfer.profiling import hops

_TRIPS = 12
_PATIENCE_MS = 10_000
_MOST_BYTES = 1 << 26


class Listen(msgspec.Struct, frozen=True):
    """Where one end listens (tcp://HOST:*), and its keys."""

    address: str
    keys: Keys


class Play(msgspec.Struct, frozen=True):
    """The other end. sizes: bytes of hidden states, each sent `trips` times; is_echo: this end sends them back."""

    peer: Peer
    sizes: tuple[int, ...]
    trips: int
    is_echo: bool


class End:
    """A process at one end, which the words of `launch` start where it belongs."""

    def __init__(self, launch: Sequence[str], listen: Listen) -> None:
        self._process = subprocess.Popen(
            [*launch, sys.executable, "-P", "-m", "homeinfer.profiling.link_probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.address = msgspec.json.decode(self._ask(listen), type=str)

    def _ask(self, message: msgspec.Struct) -> bytes:
        self.say(message)
        return self.hear()

    def say(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # that it is gone is what hear() says
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def hear(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HomeinferError("the process that times a link has ended: look at the other device and the network")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure_link(
    name: str,
    here: tuple[Sequence[str], str],
    there: tuple[Sequence[str], str],
    sizes: tuple[int, int],
    hop_ms: float,
) -> Link:
    """The link to device `name`. here, there: how to start a process at each end, and where it listens. sizes: bytes of
    a token's hidden state and of a prefill chunk's, between which a line is drawn; hop_ms: what the receiver's own work
    takes of that (DeviceProfile.hop_ms).

    Raises HomeinferError when an end does not come up, or nothing comes back.
    """
    pairs = [new_keys(), new_keys()]
    allowed = tuple(public for public, _ in pairs)
    ends: list[End] = []
    try:
        for (launch, address), (public, secret) in zip((here, there), pairs, strict=True):
            ends.append(End(launch, Listen(address, Keys(public, secret, allowed))))
        ends[1].say(Play(Peer(ends[0].address, pairs[0][0]), sizes, _TRIPS, is_echo=True))
        ends[0].say(Play(Peer(ends[1].address, pairs[1][0]), sizes, _TRIPS, is_echo=False))
        times = msgspec.json.decode(ends[0].hear(), type=tuple[float, ...])
    finally:
        for end in ends:
            end.close()
    if len(times) != len(sizes):
        raise HomeinferError(f"nothing comes back from {name}: look at the network")
    return fitted(name, sizes, (times[0], times[1]), hop_ms)


def fitted(name: str, sizes: tuple[int, int], times_ms: tuple[float, float], hop_ms: float) -> Link:
    """The line through two one-way times, with no latency below nothing."""
    seconds = max(times_ms[1] - times_ms[0], 1e-3) / 1e3
    rate = (sizes[1] - sizes[0]) / seconds
    return Link(name, rate, max(0.0, (times_ms[0] - hop_ms) / 1e3 - sizes[0] / rate))


def main() -> None:
    listen = msgspec.json.decode(sys.stdin.buffer.readline(), type=Listen)
    links = Links(listen.address, listen.keys, max_bytes=_MOST_BYTES, patience_ms=_PATIENCE_MS)
    print(msgspec.json.encode(links.address).decode(), flush=True)
    play = msgspec.json.decode(sys.stdin.buffer.readline(), type=Play)
    if play.is_echo:
        hops.echo(links, play.peer, play.trips * len(play.sizes))
    else:
        times = [tuple(hops.round_trips(links, play.peer, play.trips, size)) for size in play.sizes]
        print(msgspec.json.encode([statistics.median(some) / 2 for some in times if some]).decode(), flush=True)
    sys.stdin.buffer.readline()
    links.close()


if __name__ == "__main__":
    main()
