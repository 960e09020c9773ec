"""Devices that exchange weights, all in this process: real sockets, real files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path

from homeinfer.cluster.weights.manifest import make_manifest, needed_tensors
from homeinfer.cluster.weights.messages import PIECE_BYTES
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.serve import WeightsServer
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Manifest, Source
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import Secure
from homeinfer.cluster.wire.transport import new_keys
from homeinfer.model.header import Header, read_header

SLOW = 15_000_000
"""Bytes per second, so that a fetch of some layers takes long enough for something to happen in it."""


class LyingStore(Store):
    """Its weights are wrong in one bit of each piece."""

    def read(self, digest: str, file: int, offset: int, nbytes: int) -> bytes | None:
        data = super().read(digest, file, offset, nbytes)
        if data is None or self.manifest is None or offset < self.manifest.files[file].header_bytes:
            return data
        return bytes([data[0] ^ 1]) + data[1:]


class Peer:
    """A device with a store and a server, which serves whoever is not in `refused`."""

    def __init__(self, name: str, store: Store, most_bytes_per_s: int = 0) -> None:
        self.name = name
        self.keys = DeviceKeys(*new_keys())
        self.secure = Secure(self.keys)
        self.store = store
        self.limit = RateLimit(most_bytes_per_s)
        self.refused: set[str] = set()
        self._serving: asyncio.Task[None] | None = None
        self.port = 0

    def serve(self) -> Peer:
        """From now on, and again after `stop` on the same port."""
        address = f"tcp://127.0.0.1:{self.port or '*'}"
        self.server = WeightsServer(self.secure, address, lambda key: key not in self.refused, self.store, self.limit)
        self.port = self.server.port
        self._serving = asyncio.create_task(self.server.serve())
        return self

    async def stop(self) -> None:
        """And wait until libzmq has let go of the port."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
            self._serving = None
            await until(lambda: is_free(self.port))

    def source(self, tensors: Iterable[int] | None = None) -> Source:
        held = tuple(self.store.holds() if tensors is None else tensors)
        return Source(self.name, "127.0.0.1", self.port, self.keys.public, held)


@contextlib.asynccontextmanager
async def peers() -> AsyncIterator[Callable[..., Peer]]:
    """Makes Peers, and ends them."""
    made: list[Peer] = []

    def make(name: str, store: Store, most_bytes_per_s: int = 0) -> Peer:
        made.append(Peer(name, store, most_bytes_per_s))
        return made[-1]

    try:
        yield make
    finally:
        for peer in made:
            await peer.stop()
            peer.store.close()
            peer.secure.close()


def is_free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


def holding(store: Store, manifest: Manifest) -> Store:
    """A store that knows the model and has found it."""
    store.know(manifest)
    assert store.check(range(len(manifest.tensors))) == ()
    return store


def fill(store: Store, model: Path, tensors: Iterable[int]) -> None:
    """Headers and tensors from the original file, as a fetch would write them."""
    manifest = store.manifest
    assert manifest is not None
    data = model.read_bytes()
    for file in store.missing_headers:
        store.write_header(file, data[: manifest.files[file].header_bytes])
    for number in tensors:
        tensor = manifest.tensors[number]
        whole = data[tensor.offset : tensor.offset + tensor.nbytes]
        for offset in range(0, tensor.nbytes, PIECE_BYTES):
            store.write(number, offset, whole[offset : offset + PIECE_BYTES])
        assert store.finish(number)


class Model:
    """The small model, and the layers that most tests fetch: 18 MB."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)
        self.manifest: Manifest = make_manifest(self.header, folder=folder)
        self.tensors = needed_tensors(self.header, self.manifest, 3, 8)
        self.nbytes = sum(self.manifest.tensors[n].nbytes for n in self.tensors)


def empty(model: Model, folder: Path) -> Store:
    store = Store(folder)
    store.know(model.manifest)
    return store


def full(model: Model, folder: Path, kind: Callable[[Path, Sequence[Path]], Store] = Store) -> Store:
    return holding(kind(folder, [model.path]), model.manifest)


def assert_right(model: Model, store: Store, tensors: Sequence[int]) -> None:
    """Byte for byte, as the file on disk says."""
    assert set(tensors) <= set(store.holds())
    ours = Path(store.header().files[0].path).read_bytes()
    for n in tensors:
        tensor = model.manifest.tensors[n]
        assert hashlib.sha256(ours[tensor.offset : tensor.offset + tensor.nbytes]).hexdigest() == tensor.digest


def run(test: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 180))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.01)
