"""The engine of a device, as its agent sees it: started, watched, routed, kept while it is of use, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from homeinfer.cluster.agent_jobs import Windows
from homeinfer.cluster.agent_options import AgentEvent, EngineNow, Working
from homeinfer.cluster.agent_stats import Meter, oom_kills
from homeinfer.cluster.agent_tasks import to_the_end
from homeinfer.cluster.wire.control import (
    EngineGone,
    EngineStatus,
    FromAgent,
    Joined,
    Listening,
    Loaded,
    Neighbour,
    Part,
    Progress,
    Route,
)
from homeinfer.cluster.wire.keys import DeviceKeys

if TYPE_CHECKING:
    from homeinfer.cluster.engine_messages import Routes
    from homeinfer.cluster.engine_process import EngineProcess

_IDLE_SECONDS, _BUSY_SECONDS = 1.0, 0.02
_BLIND_SECONDS = 0.25
"""Where the system does not tell that a process has ended, it is looked at so often."""
_GATHER_MS = 40.0
"""Nobody reads faster than so."""
_NO_MEMORY = ("no memory", "failed to allocate", "bad_alloc", "cannot allocate", "unable to allocate", "memoryerror")

Prepare = Callable[[], Awaitable[Windows]]


class Place(msgspec.Struct, frozen=True):
    """Who the engine is and where it listens."""

    name: str
    listen: str
    keys: DeviceKeys


class Engine:
    """At most one engine process. `say` tells the head, `on_event` whoever watches."""

    def __init__(
        self, say: Callable[[FromAgent], object], on_event: Callable[[AgentEvent], None], meter: Meter
    ) -> None:
        self._say, self._on_event, self._meter = say, on_event, meter
        self._process: EngineProcess | None = None
        self._part: Part | None = None
        self._wanted: Part | None = None
        self._closing: asyncio.Future[None] | None = None
        self._epoch = 0
        self._route: Route | None = None
        self._told: set[str] = set()
        self._share = -1.0
        self._oom_kills = 0
        self._changed = asyncio.Event()
        self._end: int | None = None
        """A file descriptor that tells of the process's end at once, where the system has such."""

    @property
    def status(self) -> EngineStatus | None:
        """What is loaded and running, None while nothing is."""
        process, part = self._process, self._part
        if process is None or part is None or process.ready is None or process.address is None:
            return None
        return EngineStatus(part, port_of(process.address), process.ready.n_vocab, process.ready.can_shift)

    @property
    def is_there(self) -> bool:
        """Whether a process runs, loaded or not."""
        return self._process is not None

    @property
    def files(self) -> tuple[str, ...]:
        """Files that the process has open."""
        return () if self._process is None else tuple(window.path for window in self._process.setup.windows)

    def renew(self, epoch: int, part: Part) -> None:
        """A new epoch, in which only an engine with this part is of use: where that listens and what it has loaded is
        told again."""
        self._epoch, self._wanted, self._told, self._share = epoch, part, set(), -1.0
        if self._route is not None and self._route.epoch < epoch:
            self._route = None
        self._changed.set()

    async def load(self, part: Part, place: Place, prepare: Prepare) -> None:
        """Run an engine with this part: the one that runs, if it has an equal part, else a new one, of which there is
        no more than one at a time. `prepare` makes its windows. Raises HomeinferError when it can't be started;
        cancelling leaves none behind."""
        if self._process is not None and self._part == part and self._process.problem() is None:
            return
        await self.unload()
        self._on_event(EngineNow("loading", layers_of(part)))
        windows = await prepare()
        process = await _started(part, place, windows)
        self._process, self._part, self._oom_kills = process, part, oom_kills()
        self._meter.follow(process.pid)
        self._notice_end(process.pid)
        if self._route is not None:
            process.route(routes_of(self._route))
        self._changed.set()

    def route(self, route: Route) -> None:
        """Tell the engine where its messages go, now or when it has been started."""
        if self._route is not None and route.epoch < self._route.epoch:
            return
        self._route = route
        self._told.discard("joined")
        self._changed.set()
        if self._process is not None and self._part == self._wanted:
            self._process.route(routes_of(route))

    async def unload(self) -> None:
        """End the engine, if there is one."""
        process, self._process, self._part = self._process, None, None
        if self._closing is not None:
            await asyncio.shield(self._closing)
        if process is not None:
            self._forget_process()
            await to_the_end(asyncio.to_thread(process.close))
            self._on_event(EngineNow("none"))

    def _notice_end(self, pid: int) -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._end = os.pidfd_open(pid)
                asyncio.get_running_loop().add_reader(self._end, self._has_ended, self._end)

    def _has_ended(self, end: int) -> None:
        asyncio.get_running_loop().remove_reader(end)
        self._changed.set()

    def _forget_process(self) -> None:
        self._meter.follow(None)
        end, self._end = self._end, None
        if end is not None:
            asyncio.get_running_loop().remove_reader(end)
            os.close(end)

    async def watch(self) -> None:
        """Tell what becomes of the engine; for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause):
                    await self._changed.wait()
                await asyncio.sleep(_BUSY_SECONDS)
            self._changed.clear()
            self._look()

    @property
    def _pause(self) -> float:
        if self._process is None:
            return _IDLE_SECONDS
        is_busy = "loaded" not in self._told or (self._route is not None and "joined" not in self._told)
        if is_busy and self._part == self._wanted:
            return _BUSY_SECONDS
        return _IDLE_SECONDS if self._end is not None else _BLIND_SECONDS

    def _look(self) -> None:
        process, part = self._process, self._part
        if process is None or part is None:
            return
        problem = process.problem()
        if problem is not None:
            self._gone(process, part, problem)
        elif part == self._wanted:
            self._tell(process, part)

    def _tell(self, process: EngineProcess, part: Part) -> None:
        if process.address is not None and self._is_news("listening"):
            self._say(Listening(self._epoch, port_of(process.address)))
        if process.ready is None:
            self._tell_share(process.share)
        elif self._is_news("loaded"):
            self._say(Progress("load", 1.0))
            self._on_event(Working("load", 1.0))
            self._on_event(EngineNow("ready", layers_of(part)))
            self._say(Loaded(self._epoch, process.ready.n_vocab, process.ready.can_shift))
        if self._route is not None and process.joined == self._route.epoch and self._is_news("joined"):
            self._on_event(EngineNow("joined", layers_of(part)))
            self._say(Joined(self._route.epoch))

    def _is_news(self, what: str) -> bool:
        is_news = what not in self._told
        self._told.add(what)
        return is_news

    def _tell_share(self, share: float) -> None:
        if share - self._share >= 0.01:
            self._share = share
            self._say(Progress("load", share))
            self._on_event(Working("load", share))

    def _gone(self, process: EngineProcess, part: Part, problem: str) -> None:
        self._process = self._part = None
        self._forget_process()
        is_memory = is_about_memory(problem, oom_kills() - self._oom_kills)
        self._on_event(EngineNow("gone", layers_of(part), problem))
        if part == self._wanted:
            self._say(EngineGone(self._epoch, problem[:2000], is_memory))
        # a hung one takes seconds to end
        self._closing = asyncio.get_running_loop().run_in_executor(None, process.close)


async def _started(part: Part, place: Place, windows: Windows) -> EngineProcess:
    """Raises HomeinferError, and leaves no process when it is cancelled."""
    starting = asyncio.ensure_future(asyncio.to_thread(_start, part, place, windows))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await to_the_end(_ended(starting))
        raise


async def _ended(starting: asyncio.Future[EngineProcess]) -> None:
    process = await starting
    await asyncio.to_thread(process.close)


def _start(part: Part, place: Place, windows: Windows) -> EngineProcess:
    from homeinfer.cluster.engine_messages import Setup
    from homeinfer.cluster.engine_process import EngineProcess
    from homeinfer.cluster.wire.peers import Keys
    from homeinfer.engine.window_spec import WindowSpec

    setup = Setup(
        name=place.name,
        listen=place.listen,
        windows=msgspec.json.decode(windows.specs, type=tuple[WindowSpec, ...]),
        keys=Keys(place.keys.public, place.keys.secret, ()),
        vocabulary=windows.vocabulary if part.has_last else "",
        stream_bytes=part.stream_bytes,
        wire=part.options.wire,
    )
    return EngineProcess(setup)


def routes_of(route: Route) -> Routes:
    """What the engine is told."""
    from homeinfer.cluster.engine_messages import Hop, Pace, Routes
    from homeinfer.cluster.wire.peers import Peer

    def peer(neighbour: Neighbour) -> Peer:
        return Peer(neighbour.address, neighbour.key)

    return Routes(
        epoch=route.epoch,
        hops=tuple(Hop(hop.hop, hop.window, None if hop.next is None else peer(hop.next)) for hop in route.hops),
        n_hops=route.n_hops,
        head=peer(route.head),
        first=None if route.first is None else peer(route.first),
        allowed=route.allowed,
        pace=Pace(route.chunk, route.ahead, route.groups, route.replay, _GATHER_MS),
    )


def port_of(address: str) -> int:
    """The port in an engine's address."""
    return int(address.rpartition(":")[2])


def layers_of(part: Part) -> tuple[tuple[int, int], ...]:
    return tuple((run.first, run.last) for run in part.runs)


def is_about_memory(problem: str, oom_kills: int) -> bool:
    """Whether an engine ended for want of memory: by what it said last, or because the kernel ended some process
    meanwhile, and the engine was killed."""
    said = problem.lower()
    is_killed = "killed by sigkill" in said and oom_kills > 0
    return is_killed or any(words in said for words in _NO_MEMORY)
