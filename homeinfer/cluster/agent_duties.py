"""What an agent does for the head: an answer to each of its messages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from homeinfer.cluster.agent_engine import Engine, Place
from homeinfer.cluster.agent_jobs import (
    Cut,
    MeasureDevice,
    ModelHere,
    Opened,
    OpenEnd,
    Profiled,
    Share,
    Timed,
    TimeLink,
    Windows,
)
from homeinfer.cluster.agent_options import AgentEvent, Trouble, Working
from homeinfer.cluster.agent_stats import Meter
from homeinfer.cluster.agent_tasks import Tasks
from homeinfer.cluster.agent_weights import Weights
from homeinfer.cluster.agent_windows import remove_unused
from homeinfer.cluster.agent_work import work
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import FromAgent, FromHead, Part, Progress, Sorry, Task
from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.secure import tcp_address
from homeinfer.errors import HomeinferError
from homeinfer.profiling.machine import usable_memory

_SAY_SECONDS = 0.2
"""How far a task is gets told so often."""


class Device(msgspec.Struct, frozen=True):
    """What its duties need to know of a device. listen: where its sockets listen; windows: where window files are."""

    keys: DeviceKeys
    n_threads: int
    listen: str
    windows: Path


class Duties:
    """One device's. `say` tells the head, `on_event` whoever watches."""

    def __init__(
        self,
        device: Device,
        weights: Weights,
        meter: Meter,
        say: Callable[[FromAgent], object],
        on_event: Callable[[AgentEvent], None],
    ) -> None:
        self._device, self._weights, self._meter = device, weights, meter
        self._say, self._on_event = say, on_event
        self.engine = Engine(say, on_event, meter)
        self._tasks = Tasks(self._failed)
        self._name = "device"
        self._cut_last: tuple[Part, ModelHere, Windows] | None = None
        self._told = 0.0

    def heard(self, message: FromHead) -> None:
        """Begin what a message asks for; nothing here waits."""
        start = self._tasks.start
        match message:
            case control.Welcome(name):
                self._name = name
            case control.Know(manifest, head):
                start("know", message, lambda: self._know(manifest, head))
            case control.Measure(digest, fresh):
                start("measure", message, lambda: self._measure(digest, fresh))
            case control.Fetch():
                start("fetch", message, lambda: self._fetch(message))
            case control.Limit(most_bytes_per_s):
                self._weights.limit(most_bytes_per_s)
            case control.Load(epoch, part):
                self.engine.renew(epoch, part)
                start("load", part, lambda: self._load(part))
            case control.Route():
                self.engine.route(message)
            case control.Unload():
                start("load", None, self.engine.unload)
            case control.Probe():
                start(f"probe {message.id}", message, lambda: self._probe(message))
            case control.Echo():
                start(f"echo {message.id}", message, lambda: self._echo(message))
            case _:
                pass

    async def _know(self, manifest: control.Manifest, head: control.Source) -> None:
        if not self._weights.knows(manifest):
            await self._tasks.stop("fetch", "measure")
        self._say(await self._weights.know(manifest, head))

    async def _measure(self, digest: str, fresh: bool) -> None:
        await self._model(digest)
        job = MeasureDevice(await self._weights.model(), self._name, self._device.n_threads, fresh)

        def tell(note: Share | Opened) -> None:
            if isinstance(note, Share):
                self._progress("measure", note.share, note.detail)

        environment = {**os.environ, "HOMEINFER_WINDOWS": str(self._device.windows)}
        done = await work(job, tell, environment)
        assert isinstance(done, Profiled)
        self._progress("measure", 1.0, "")
        # what the engine has now can be used for the next plan
        # asked again: while it measured, the process that measures had some of it
        memory_bytes = max(done.profile.memory_bytes, usable_memory()) + self._meter.engine_bytes
        self._say(control.Measured(digest, msgspec.structs.replace(done.profile, memory_bytes=memory_bytes)))

    async def _fetch(self, fetch: control.Fetch) -> None:
        await self._model(fetch.digest)
        self._say(await self._weights.fetch(fetch, self._progress))

    async def _load(self, part: Part) -> None:
        await self._model(part.digest)
        place = Place(self._name, self._device.listen, self._device.keys)
        await self.engine.load(part, place, lambda: self._cut(part))

    async def _cut(self, part: Part) -> Windows:
        """A part's windows; those of the last part at once, when an engine with an equal one has crashed."""
        model = await self._weights.model()
        if self._cut_last is not None and self._cut_last[:2] == (part, model) and _are_there(self._cut_last[2].paths):
            return self._cut_last[2]
        job = Cut(model, part.runs, part.options, self._device.n_threads, str(self._device.windows))

        def tell(note: Share | Opened) -> None:
            if isinstance(note, Share):
                self._progress("cut", note.share, note.detail)

        done = await work(job, tell)
        assert isinstance(done, Windows)
        self._progress("cut", 1.0, "")
        remove_unused(self._device.windows, done.paths)
        self._cut_last = part, model, done
        return done

    async def _probe(self, probe: control.Probe) -> None:
        address = tcp_address(probe.host, probe.port)
        done = await work(TimeLink(probe.to, address, probe.key, self._device.keys, probe.sizes, probe.hop_ms))
        assert isinstance(done, Timed)
        self._say(control.Probed(probe.id, done.link))

    async def _echo(self, echo: control.Echo) -> None:
        def tell(note: Share | Opened) -> None:
            if isinstance(note, Opened):
                self._say(control.Echoing(echo.id, note.port))

        await work(OpenEnd(self._device.listen, self._device.keys, echo.key, echo.sizes), tell)

    async def _model(self, digest: str) -> None:
        """Wait until the model is known. Raises HomeinferError when it is another one."""
        await self._tasks.wait("know")
        if self._weights.manifest.digest != digest:
            raise HomeinferError("the head asks for another model than the one that it named")

    def _progress(self, task: Task, share: float, detail: str) -> None:
        now = time.monotonic()
        if share < 1 and now - self._told < _SAY_SECONDS:
            return
        self._told = now
        self._say(Progress(task, min(max(share, 0.0), 1.0), detail[:2000]))
        self._on_event(Working(task, share, detail))

    def _failed(self, kind: str, reason: str) -> None:
        about, _, number = kind.partition(" ")
        self._say(Sorry(about, reason[:2000], int(number) if number else None))
        self._on_event(Trouble(reason))

    async def unload(self) -> None:
        """End the engine, or what was to become one."""
        await self._tasks.stop("load")
        await self.engine.unload()

    async def close(self) -> None:
        """End all of it; nothing stays."""
        await self._tasks.stop()
        await self.engine.unload()


def _are_there(paths: tuple[str, ...]) -> bool:
    return all(Path(path).is_file() for path in paths)
