"""A ring of devices that are all on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from homeinfer.cluster.engine_messages import Hop, Routes, Setup
from homeinfer.cluster.engine_process import EngineProcess
from homeinfer.cluster.ring import CHECK_MS, RingPipeline, RingShape
from homeinfer.cluster.wire.transport import Keys, Links, Peer, has_ipc, new_keys
from homeinfer.engine.embedding import embedding_source
from homeinfer.engine.pipeline import DeviceInfo
from homeinfer.engine.window import WindowSpec
from homeinfer.errors import HomeinferError
from homeinfer.model.architectures import input_scale
from homeinfer.model.header import Header
from homeinfer.model.window_file import Progress, cut_windows, default_folder
from homeinfer.model.window_plan import n_layers, split_layers

_HEAD = "head"


class RingOptions(msgspec.Struct, frozen=True):
    """How a local ring is made. n_ctx 0: what the model was trained with, 4,096 at most."""

    devices: int = 1
    n_ctx: int = 0
    n_batch: int = 512
    n_seq: int = 1
    n_threads: int = 0
    gpu_layers: int = 0
    resident: bool = True
    flash_attention: bool = False
    network: bool = False


def context_length(header: Header, wanted: int) -> int:
    """Positions of a sequence: what was asked for, or the model's own up to 4,096."""
    trained = int(header.arch_get("context_length", 0))
    return wanted or min(trained or 4096, 4096)


def threads(wanted: int) -> int:
    """Threads of an engine: what was asked for, or one per core that this process may use."""
    if wanted > 0:
        return wanted
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def window_specs(
    header: Header, windows: Sequence[tuple[int, int]], options: RingOptions, progress: Progress | None = None
) -> list[WindowSpec]:
    """The windows' files, written where they are missing, and how to load each. Raises HomeinferError."""
    n = n_layers(header)
    whole = len(windows) == 1
    folder = default_folder()
    paths = [Path(header.files[0].path)] if whole else cut_windows(header, tuple(windows), folder, progress)
    return [
        WindowSpec(
            path=str(path),
            first=first,
            last=last,
            n_layer=n,
            n_ctx=context_length(header, options.n_ctx),
            embedding_length=int(header.arch_get("embedding_length", 0)),
            embedding=embedding_source(header) if first == 0 and not whole else None,
            input_scale=1.0 if whole else input_scale(header, first),
            resident=options.resident,
            gpu_layers=options.gpu_layers,
            n_batch=options.n_batch,
            n_seq=options.n_seq,
            n_threads=threads(options.n_threads),
            flash_attention=options.flash_attention,
        )
        for (first, last), path in zip(windows, paths, strict=True)
    ]


def start_local_ring(
    header: Header,
    options: RingOptions,
    *,
    on_cut: Progress | None = None,
    on_load: Callable[[list[float]], None] = lambda _shares: None,
) -> RingPipeline:
    """Start `options.devices` engine processes on this machine and join them to a ring.

    on_cut gets the bytes written for missing window files, on_load each device's share of weights loaded.
    Raises HomeinferError when the model can't be cut so, or an engine does not come up; nothing stays behind.
    """
    specs = window_specs(header, split_layers(header, options.devices), options, on_cut)
    starter = _Starter(header, specs, most_logits(header, options), network=options.network)
    try:
        starter.start()
        return starter.join(on_load)
    except BaseException:
        starter.close()
        raise


def _socket_folder() -> Path | None:
    """A folder that only this user can enter, or None where sockets can't be files in it."""
    fits = len(tempfile.gettempdir()) < 60  # the system's limit for the whole path is 104 to 108 bytes
    return Path(tempfile.mkdtemp(prefix="homeinfer-")) if has_ipc() and fits else None


def most_logits(header: Header, options: RingOptions) -> int:
    """Bytes of the largest message that may come back to the head: a row of logits for each token of a batch."""
    embedding = header.tensor("token_embd.weight")
    n_vocab = embedding.shape[-1] if embedding is not None else 1 << 20
    return options.n_batch * n_vocab * 4 + (1 << 16)


class _Starter:
    """The processes, sockets and folder of a ring while it comes up, and their end."""

    def __init__(self, header: Header, specs: list[WindowSpec], most_bytes: int, *, network: bool) -> None:
        self._specs = specs
        self._vocabulary = header.files[0].path
        self._epoch = time.time_ns() & 0x7FFFFFFFFFFF
        self._names = [f"device-{i + 1}" for i in range(len(specs))]
        self._folder = None if network else _socket_folder()
        self._keys = dict.fromkeys((*self._names, _HEAD), ("", "")) if self._folder else self._make_keys()
        self._engines: list[EngineProcess] = []
        try:
            self._links = Links(self._listen(_HEAD), self._keys_of(_HEAD), max_bytes=most_bytes, patience_ms=CHECK_MS)
        except HomeinferError:
            self.end_devices()
            raise

    def _make_keys(self) -> dict[str, tuple[str, str]]:
        return {name: new_keys() for name in (*self._names, _HEAD)}

    def _listen(self, name: str) -> str:
        return f"ipc://{self._folder / name}" if self._folder else "tcp://127.0.0.1:*"

    def _keys_of(self, name: str) -> Keys | None:
        public, secret = self._keys[name]
        allowed = tuple(p for p, _ in self._keys.values())
        return Keys(public, secret, allowed) if public else None

    def _peer(self, name: str, address: str) -> Peer:
        return Peer(address, self._keys[name][0] or None)

    def start(self) -> None:
        for name, spec in zip(self._names, self._specs, strict=True):
            setup = Setup(name, self._epoch, self._listen(name), (spec,), self._keys_of(name), self._vocabulary)
            self._engines.append(EngineProcess(setup))

    def join(self, on_load: Callable[[list[float]], None]) -> RingPipeline:
        self._wait(lambda engine: engine.address is not None, lambda _shares: None)
        peers = [self._peer(e.setup.name, e.address or "") for e in self._engines]
        peers.append(self._peer(_HEAD, self._links.address))
        n = len(self._engines)
        for hop, engine in enumerate(self._engines):
            following = peers[hop + 1] if hop + 1 < n else None
            first = peers[0] if n > 1 else None
            engine.route(Routes((Hop(hop, 0, following),), n, peers[n], first))
        self._wait(lambda engine: engine.ready is not None, on_load)
        ready = [engine.ready for engine in self._engines if engine.ready is not None]
        shape = RingShape(
            epoch=self._epoch,
            first=peers[0],
            last=peers[n - 1],
            n_vocab=ready[-1].n_vocab,
            n_ctx=self._specs[0].n_ctx,
            n_batch=self._specs[0].n_batch,
            can_shift=all(r.can_shift for r in ready),
            devices=tuple(
                DeviceInfo(name, [(s.first, s.last)]) for name, s in zip(self._names, self._specs, strict=True)
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
