"""Bring up the engine processes of a ring and join them, wherever the head can start processes."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from homeinfer.cluster.engine_messages import Hop, Pace, Routes, Setup
from homeinfer.cluster.engine_process import EngineProcess
from homeinfer.cluster.hops import onward
from homeinfer.cluster.planning.plan import Wire
from homeinfer.cluster.ring import CHECK_MS, RingPipeline, RingShape
from homeinfer.cluster.wire.transport import Keys, Links, Peer, has_ipc, new_keys
from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.errors import HomeinferError

HEAD = "head"


class DeviceStart(msgspec.Struct, frozen=True):
    """A device of a ring that is to be started.

    windows: what it loads, in the order of the ring. listen: where its engine takes messages ("" for a file that
    only this user can open). launch: words before the command of its engine, for other hosts. stream_bytes: memory
    for the weights of its windows that are not resident; 0 leaves those to the page cache.
    """

    name: str
    windows: tuple[WindowSpec, ...]
    listen: str = ""
    launch: tuple[str, ...] = ()
    stream_bytes: int = 0


class RingStart(msgspec.Struct, frozen=True):
    """A ring that is to be started.

    vocabulary: a file with the model's tokens. most_bytes: the largest message that the head may get. head_listen:
    as a device's `listen`. wire: how hidden states go from device to device. pace: how the ring is fed.
    """

    devices: tuple[DeviceStart, ...]
    vocabulary: str
    most_bytes: int
    head_listen: str = ""
    wire: Wire = "f32"
    pace: Pace = Pace()

    @property
    def hops(self) -> list[tuple[int, int]]:
        """(device, its window) in the order of the layers."""
        found = [(w.first, d, i) for d, device in enumerate(self.devices) for i, w in enumerate(device.windows)]
        return [(device, index) for _, device, index in sorted(found)]


def start_ring(
    ring: RingStart,
    on_load: Callable[[list[float]], None] = lambda _shares: None,
) -> RingPipeline:
    """Start the engines and join them. on_load gets each device's share of weights loaded.

    Raises HomeinferError when an engine does not come up; nothing stays behind.
    """
    starter = _Starter(ring)
    try:
        starter.start()
        return starter.join(on_load)
    except BaseException:
        starter.close()
        raise


def routes(
    hops: Sequence[tuple[int, int]], peers: Sequence[Peer], head: Peer, epoch: int = 0, pace: Pace | None = None
) -> list[Routes]:
    """What each device (peers[i]) does with the messages of a ring whose windows are `hops`, (device, window)."""
    allowed = tuple(key for key in (head.public, *(peer.public for peer in peers)) if key)
    first, teller = hops[0][0], hops[-1][0]
    made = []
    for device in range(len(peers)):
        mine = tuple(Hop(hop, i, None if to is None else peers[to]) for hop, i, to in onward(hops, device))
        start = None if first == teller else peers[first]
        made.append(Routes(epoch, mine, len(hops), head, start, allowed, pace or Pace()))
    return made


def _socket_folder() -> Path | None:
    """A folder that only this user can enter, or None where sockets can't be files in it."""
    fits = len(tempfile.gettempdir()) < 60  # the system's limit for the whole path is 104 to 108 bytes
    return Path(tempfile.mkdtemp(prefix="homeinfer-")) if has_ipc() and fits else None


class _Starter:
    """The processes, sockets and folder of a ring while it comes up, and their end."""

    def __init__(self, ring: RingStart) -> None:
        self._ring = ring
        self._epoch = time.time_ns() & 0x7FFFFFFFFFFF
        listens = {HEAD: ring.head_listen, **{device.name: device.listen for device in ring.devices}}
        self._folder = None if all(listens.values()) else _socket_folder()
        self._listens = {name: listen or self._file_or_loopback(name) for name, listen in listens.items()}
        has_network = any(not listen.startswith("ipc://") for listen in self._listens.values())
        self._keys = {name: new_keys() if has_network else ("", "") for name in listens}
        self._engines: list[EngineProcess] = []
        try:
            patience = {"max_bytes": ring.most_bytes, "patience_ms": CHECK_MS}
            self._links = Links(self._listens[HEAD], self._keys_of(HEAD), **patience)
        except HomeinferError:
            self.end_devices()
            raise

    def _file_or_loopback(self, name: str) -> str:
        return f"ipc://{self._folder / name}" if self._folder else "tcp://127.0.0.1:*"

    def _keys_of(self, name: str) -> Keys | None:
        public, secret = self._keys[name]
        return Keys(public, secret, tuple(p for p, _ in self._keys.values())) if public else None

    def start(self) -> None:
        for device in self._ring.devices:
            setup = Setup(
                name=device.name,
                listen=self._listens[device.name],
                windows=device.windows,
                keys=self._keys_of(device.name),
                vocabulary=self._ring.vocabulary,
                stream_bytes=device.stream_bytes,
                wire=self._ring.wire,
            )
            self._engines.append(EngineProcess(setup, device.launch))

    def join(self, on_load: Callable[[list[float]], None]) -> RingPipeline:
        self._wait(lambda engine: engine.address is not None, lambda _shares: None)
        peers = [Peer(e.address or "", self._keys[e.setup.name][0] or None) for e in self._engines]
        head = Peer(self._links.address, self._keys[HEAD][0] or None)
        hops = self._ring.hops
        for engine, its in zip(self._engines, routes(hops, peers, head, self._epoch, self._ring.pace), strict=True):
            engine.route(its)
        self._wait(lambda engine: engine.joined == self._epoch, on_load)
        ready = [engine.ready for engine in self._engines if engine.ready is not None]
        teller = hops[-1][0]
        last = self._ring.devices[teller].windows[hops[-1][1]]
        shape = RingShape(
            epoch=self._epoch,
            first=peers[hops[0][0]],
            last=peers[teller],
            n_vocab=ready[teller].n_vocab,
            n_ctx=last.n_ctx,
            n_batch=last.n_batch,
            can_shift=all(r.can_shift for r in ready),
            devices=tuple(
                DeviceInfo(device.name, [(w.first, w.last) for w in device.windows]) for device in self._ring.devices
            ),
        )
        return RingPipeline(shape, self._links, self._check, self.end_devices)

    def _wait(self, done: Callable[[EngineProcess], bool], on_load: Callable[[list[float]], None]) -> None:
        while not all(done(engine) for engine in self._engines):
            self._check()
            on_load([1.0 if engine.ready else engine.share for engine in self._engines])
            time.sleep(0.02)

    def _check(self) -> None:
        for engine in self._engines:
            engine.check()

    def end_devices(self) -> None:
        for engine in self._engines:
            engine.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        self.end_devices()
        with contextlib.suppress(HomeinferError):
            self._links.close()
