"""Engines that a test joins to one ring after the other, and asks for many answers at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import msgspec

from homeinfer.cluster.engine_messages import Pace, Routes, Setup
from homeinfer.cluster.engine_process import EngineProcess
from homeinfer.cluster.local import RingOptions, window_specs
from homeinfer.cluster.planning.plan import Wire
from homeinfer.cluster.ring_client import RingClient, Signs
from homeinfer.cluster.ring_start import routes
from homeinfer.cluster.wire.transport import Keys, Peer, new_keys
from homeinfer.engine.request import Finish, Request, Sampling
from homeinfer.engine.window_spec import WindowSpec
from homeinfer.model.header import Header
from homeinfer.model.window_plan import n_layers

GREEDY = Sampling(temperature=0)
LOOPBACK = "tcp://127.0.0.1:*"


class AsyncRing:
    """Engine processes on loopback with keys, the coordinator's client in front of them. names: for each engine its
    windows [first, last)."""

    def __init__(self, header: Header, windows: Sequence[Sequence[tuple[int, int]]], options: RingOptions) -> None:
        self.header = header
        self.options = options
        self.engines: list[EngineProcess] = []
        self.windows = [list(each) for each in windows]
        self.keys = [new_keys() for _ in range(len(windows) + 1)]
        self.epoch = 0
        self.wire: Wire = "f32"
        mine = self.keys[-1]
        self.client = RingClient(LOOPBACK, Keys(*mine, tuple(public for public, _ in self.keys)))

    def start(self, number: int) -> None:
        """Start engine `number`, again if it was running."""
        specs = window_specs(self.header, cuts(self.header, self.windows), self.options)
        named = {(spec.first, spec.last): spec for spec in specs}
        its: tuple[WindowSpec, ...] = tuple(named[edges] for edges in self.windows[number])
        keys = Keys(*self.keys[number], ())
        vocabulary = self.header.files[0].path
        setup = Setup(f"device-{number + 1}", LOOPBACK, its, keys, vocabulary, wire=self.wire)
        self.engines[number : number + 1] = [EngineProcess(setup)]

    @property
    def peers(self) -> list[Peer]:
        return [Peer(e.address or "", public) for e, (public, _) in zip(self.engines, self.keys, strict=False)]

    @property
    def head(self) -> Peer:
        return Peer(self.client.address, self.keys[-1][0])

    async def route(self, pace: Pace | None = None) -> None:
        """Join the engines to a ring of a new epoch."""
        await until(lambda: all(engine.address for engine in self.engines), self.engines)
        self.epoch += 1
        hops = sorted((first, d, i) for d, each in enumerate(self.windows) for i, (first, _) in enumerate(each))
        order = [(device, window) for _, device, window in hops]
        for engine, its in zip(self.engines, routes(order, self.peers, self.head, self.epoch, pace), strict=True):
            engine.route(its)
        await until(lambda: all(engine.joined == self.epoch for engine in self.engines), self.engines)
        self.client.retarget(self.epoch, self.peers[order[-1][0]])

    def route_of(self, number: int) -> Routes:
        """What engine `number` was told last."""
        hops = sorted((first, d, i) for d, each in enumerate(self.windows) for i, (first, _) in enumerate(each))
        return routes([(d, w) for _, d, w in hops], self.peers, self.head, self.epoch)[number]

    async def answer(
        self,
        prompt: Sequence[int],
        request: Request,
        stop: asyncio.Event | None = None,
        tokens: list[int] | None = None,
        signs: Signs | None = None,
    ) -> tuple[list[int], Finish]:
        """An answer's tokens, also those in `tokens` before it failed, and how it ended."""
        told = [] if tokens is None else tokens
        cancelled = stop or asyncio.Event()
        finish = await asyncio.wait_for(
            self.client.answer(
                prompt, request, lambda came: told.extend(each.token for each in came), cancelled, signs
            ),
            60,
        )
        return told, finish

    def close(self) -> None:
        self.client.close()
        for engine in self.engines:
            engine.close()


def cuts(header: Header, windows: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """All windows in the order of the layers."""
    found = sorted(edges for each in windows for edges in each)
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert found[-1][1] == n_layers(header)
    return found


async def until(true: object, engines: Sequence[EngineProcess] = (), seconds: float = 60) -> None:
    """Look again and again; AssertionError when it does not become true, HomeinferError when an engine is gone."""
    assert callable(true)
    deadline = time.monotonic() + seconds
    while not true():
        for engine in engines:
            engine.check()
        assert time.monotonic() < deadline, f"not true after {seconds:.0f} seconds"
        await asyncio.sleep(0.01)


class KeptRing:
    """A ring that several tests use one after the other, each as a new epoch, with the loop that it lives in."""

    def __init__(self, header: Header, windows: Sequence[Sequence[tuple[int, int]]], options: RingOptions) -> None:
        self._runner = asyncio.Runner()
        self._windows, self._options = windows, options
        self.ring = self._runner.run(self._start(header))

    async def _start(self, header: Header) -> AsyncRing:
        ring = AsyncRing(header, self._windows, self._options)
        for number in range(len(self._windows)):
            ring.start(number)
        return ring

    def run(self, test: Callable[[AsyncRing], Coroutine[None, None, None]], pace: Pace | None = None) -> None:
        """Run a test of at most two minutes; an engine that the test before has ended is started again."""

        async def joined() -> None:
            for number, engine in enumerate(self.ring.engines):
                if engine.problem() is not None:
                    self.ring.start(number)
            await self.ring.route(pace)
            await test(self.ring)

        self._runner.run(asyncio.wait_for(joined(), 120))

    def close(self) -> None:
        self.ring.close()
        self._runner.close()


@asynccontextmanager
async def async_ring(
    header: Header,
    windows: Sequence[Sequence[tuple[int, int]]],
    options: RingOptions,
    pace: Pace | None = None,
    wire: Wire = "f32",
) -> AsyncIterator[AsyncRing]:
    """A ring that is ready, and its end."""
    ring = AsyncRing(header, windows, options)
    ring.wire = wire
    try:
        for number in range(len(windows)):
            ring.start(number)
        await ring.route(pace)
        yield ring
    finally:
        ring.close()


def greedy(limit: int, **others: object) -> Request:
    """A greedy request."""
    return msgspec.structs.replace(Request(GREEDY, limit), **others)
