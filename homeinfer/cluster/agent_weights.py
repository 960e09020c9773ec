"""A device's weights: what is on its disk, what it serves, what it fetches."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from homeinfer.cluster.agent_jobs import ModelHere
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.serve import WeightsServer
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Fetch, Holds, Manifest, Source, Task
from homeinfer.errors import HomeinferError
from homeinfer.memory import give_back

if TYPE_CHECKING:
    from homeinfer.cluster.members import Members
    from homeinfer.cluster.weights.fetch import FetchProgress
    from homeinfer.cluster.wire.secure import Secure

OnProgress = Callable[[Task, float, str], None]


class Allowed:
    """Whose keys may fetch weights: `always`, those that the head named last (`keys`), and on the head itself all
    registered members."""

    def __init__(self, always: frozenset[str], members: Members | None = None) -> None:
        self._always, self._members = always, members
        self.keys: frozenset[str] = frozenset()

    def __call__(self, key: str) -> bool:
        return key in self._always or key in self.keys or (self._members is not None and bool(self._members.get(key)))


class Weights:
    """One device's. `is_allowed` says whose key may fetch from here; the server listens at once."""

    def __init__(
        self, secure: Secure, folder: Path, models: tuple[str, ...], listen: str, is_allowed: Callable[[str], bool]
    ) -> None:
        """Raises HomeinferError when it can't listen."""
        self._secure, self._folder = secure, folder
        self._limit = RateLimit()
        self._store = Store(folder, tuple(Path(model) for model in models))
        self._server = WeightsServer(secure, listen, is_allowed, self._store, self._limit)

    @property
    def port(self) -> int:
        return self._server.port

    def limit(self, most_bytes_per_s: int) -> None:
        """How fast weights come and go from now on; 0 for no limit."""
        self._limit.set(most_bytes_per_s)

    async def serve(self) -> None:
        """Until cancelled."""
        await self._server.serve()

    async def know(self, manifest: Manifest, head: Source) -> Holds:
        """This is the cluster's model. Raises HomeinferError when its headers can't be had."""
        await asyncio.to_thread(self._store.know, manifest)
        if self._store.missing_headers:
            from homeinfer.cluster.weights.fetch import fetch_headers

            await fetch_headers(self._secure, self._store, (head,), self._limit)
        give_back()  # a header takes tens of megabytes while it is read
        return self.holds()

    def knows(self, manifest: Manifest) -> bool:
        """Whether this is the cluster's model already."""
        return self._store.manifest == manifest

    def holds(self) -> Holds:
        """What of the model is here. Raises HomeinferError when no model is known."""
        return Holds(self.manifest.digest, self._store.holds(), self._store.disk_free())

    @property
    def manifest(self) -> Manifest:
        """The cluster's model. Raises HomeinferError while none is known."""
        if self._store.manifest is None:
            raise HomeinferError("this device was not told which model the cluster runs")
        return self._store.manifest

    async def model(self) -> ModelHere:
        """For a process that works with the model, as it is on the disk now. Raises HomeinferError while none is
        known."""
        await asyncio.to_thread(self._store.save)
        return ModelHere(self.manifest, str(self._store.path()), self._store.holds(), str(self._folder))

    async def fetch(self, fetch: Fetch, on_progress: OnProgress) -> Holds:
        """Check what is on this disk and get the rest. Raises HomeinferError when some can't be had; cancelling leaves
        what came, to be resumed."""
        self.limit(fetch.most_bytes_per_s)
        missing = await self._checked(fetch.tensors, on_progress)
        if missing:
            from homeinfer.cluster.weights.fetch import fetch_tensors

            def tell(progress: FetchProgress) -> None:
                on_progress("fetch", progress.share, progress.detail)

            await fetch_tensors(self._secure, self._store, missing, fetch.sources, self._limit, tell)
            on_progress("fetch", 1.0, "")
        give_back()
        return self.holds()

    async def _checked(self, tensors: tuple[int, ...], on_progress: OnProgress) -> tuple[int, ...]:
        """Which of them must be fetched."""
        if not self._store.missing(tensors):
            return ()
        loop, stopped = asyncio.get_running_loop(), threading.Event()

        def tell(share: float) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_progress, "check", share, "")

        try:
            return await asyncio.to_thread(self._store.check, tensors, tell, stopped)
        finally:
            stopped.set()

    def close(self) -> None:
        self._store.close()
