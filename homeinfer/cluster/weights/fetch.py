"""Weights from other devices: from several at once, only so much under way from each, and checked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

import msgspec

from homeinfer.cluster.weights.fetch_headers import fetch_headers
from homeinfer.cluster.weights.fetch_source import Patience, SourceLink
from homeinfer.cluster.weights.messages import PIECE_BYTES
from homeinfer.cluster.weights.rate import RateLimit
from homeinfer.cluster.weights.schedule import Piece, Schedule, Wanted
from homeinfer.cluster.weights.store import Store
from homeinfer.cluster.wire.control import Source
from homeinfer.cluster.wire.secure import Secure
from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable

__all__ = ["FetchProgress", "Fetched", "OnProgress", "Patience", "fetch_headers", "fetch_tensors"]

_SAVE_SECONDS: Final = 3.0
_LOOK_SECONDS: Final = 0.5


class Fetched(msgspec.Struct, frozen=True):
    """nbytes: that came over the network. liars: names of sources that sent wrong bytes, lost: that did not answer at
    some time."""

    nbytes: int = 0
    liars: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class FetchProgress(msgspec.Struct, frozen=True):
    """Bytes, of those tensors that were missing. detail: for the user, such as which source lies."""

    done_bytes: int
    total_bytes: int
    detail: str = ""

    @property
    def share(self) -> float:
        """0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 1.0


OnProgress = Callable[[FetchProgress], None]


async def fetch_tensors(
    secure: Secure,
    store: Store,
    tensors: Sequence[int],
    sources: Sequence[Source],
    limit: RateLimit,
    on_progress: OnProgress = lambda _progress: None,
    patience: Patience | None = None,
) -> Fetched:
    """Get those of these tensors that are missing; an own file's are checked first (store.check does it with progress).
    Sees that the disk has room, and calls on_progress twice a second. Cancelling the task leaves what came, and the
    next call goes on from there.

    Raises HomeinferError, in one line, when some can't be had from any source, or the disk is full.
    """
    missing = await _check_own(store, tensors)
    if not missing:
        return Fetched()
    if store.missing_headers:
        await fetch_headers(secure, store, sources, limit, patience)
    await asyncio.to_thread(store.make_room, missing)
    return await _Fetch(secure, store, missing, sources, limit, on_progress, patience or Patience()).run()


async def _check_own(store: Store, tensors: Sequence[int]) -> tuple[int, ...]:
    stopped = threading.Event()
    try:
        return await asyncio.to_thread(store.check, tensors, stopped=stopped)
    finally:
        stopped.set()  # a cancelled task must not leave a thread behind that reads a whole model


class _Fetch:
    """One call of fetch_tensors."""

    def __init__(
        self,
        secure: Secure,
        store: Store,
        missing: Sequence[int],
        sources: Sequence[Source],
        limit: RateLimit,
        on_progress: OnProgress,
        patience: Patience,
    ) -> None:
        self._secure, self._store, self._limit = secure, store, limit
        self._on_progress, self._patience = on_progress, patience
        self._manifest = store.known()
        self._sources = {source.name: source for source in sources if source.key != secure.keys.public}
        wanted = [Wanted(n, self._manifest.tensors[n].nbytes, store.pieces(n)) for n in missing]
        self._schedule = Schedule(wanted, {name: source.tensors for name, source in self._sources.items()})
        self._total = sum(one.nbytes for one in wanted)
        self._nbytes = 0
        self._liars: list[str] = []
        self._lost: dict[str, None] = {}
        self._detail = ""
        self._changed = asyncio.Event()
        self._moved_at = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> Fetched:
        for tensor in self._schedule.whole():
            self._start(self._check(tensor))
        for source in self._sources.values():
            self._start(self._work(source))
        try:
            await self._wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            with contextlib.suppress(HomeinferError):
                await asyncio.shield(asyncio.to_thread(self._store.save))
        self._tell()
        return Fetched(self._nbytes, tuple(self._liars), tuple(self._lost))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _wait(self) -> None:
        """Until all is here. Raises what a task raised, or that it can't be had."""
        saved_at = told_at = time.monotonic()
        while not self._schedule.is_done:
            self._changed.clear()
            await _set_within(self._changed, _LOOK_SECONDS)
            for task in [task for task in self._tasks if task.done()]:
                self._tasks.discard(task)
                task.result()
            self._check_hope()
            if time.monotonic() - told_at >= _LOOK_SECONDS:
                self._tell()
                told_at = time.monotonic()
            if time.monotonic() - saved_at > _SAVE_SECONDS:
                await asyncio.to_thread(self._store.save)
                saved_at = time.monotonic()

    def _tell(self) -> None:
        missing = 0
        for n in self._schedule.left:
            nbytes = self._manifest.tensors[n].nbytes
            missing += max(0, nbytes - len(self._store.pieces(n)) * PIECE_BYTES)
        self._on_progress(FetchProgress(self._total - missing, self._total, self._detail))

    def _check_hope(self) -> None:
        nobody = self._schedule.nobody_has()
        if nobody:
            raise HomeinferError(self._cannot(nobody))
        if time.monotonic() - self._moved_at > self._patience.give_up:
            raise HomeinferError(self._cannot(self._schedule.left))

    def _cannot(self, tensors: Sequence[int]) -> str:
        first = printable(self._manifest.tensors[tensors[0]].name)
        why = [f"{name} sent wrong bytes" for name in self._liars]
        why += [f"{name} did not answer" for name in self._lost if name not in self._liars]
        reason = ", ".join(why) or "no device that was asked has them"
        return (
            f"{len(tensors)} tensors of the model ({first} …) can't be got from other devices: {reason}; "
            "see that a device with the model is on, then start again"
        )

    async def _work(self, source: Source) -> None:
        """Ask one source, until nothing is left or it has proven a liar; after a silence again from the start."""
        while not self._schedule.is_done and source.name not in self._liars and self._schedule.serves(source.name):
            try:
                link = SourceLink(self._secure, source)
            except HomeinferError:
                self._lost[source.name] = None
                self._schedule.drop_for_good(source.name)
                return
            try:
                is_answering = await self._talk(link)
            except _LieError as problem:
                self._lied(source.name, str(problem))
                return
            finally:
                link.close()
                self._schedule.drop(source.name)
                self._changed.set()
            if not is_answering:
                self._lost[source.name] = None
                self._detail = f"{source.name} does not answer"
                await asyncio.sleep(self._patience.retry)

    async def _talk(self, link: SourceLink) -> bool:
        """False: the source fell silent. True: nothing is left for it."""
        name = link.source.name
        while not self._schedule.is_done and name not in self._liars:
            await self._ask(link)
            if not link.under_way:
                if not self._schedule.serves(name):
                    return True
                await asyncio.sleep(_LOOK_SECONDS / 5)
                continue
            try:
                answer = await link.answer(self._patience.silence)
            except HomeinferError as problem:
                raise _LieError(str(problem)) from None
            if answer is None:
                return False
            await self._take(name, *answer)
        return True

    async def _ask(self, link: SourceLink) -> None:
        """As much as may be under way: little, with rests, while the rate is limited, as it is while answers are being
        written."""
        while link.has_credit(is_polite=self._limit.most_bytes_per_s > 0):
            if self._limit.most_bytes_per_s:
                await self._waited(self._limit.rest(link.rest_seconds(time.monotonic())))
            piece = self._schedule.next(link.source.name, time.monotonic())
            if piece is None:
                return
            await self._waited(self._limit.take(piece.nbytes))
            tensor = self._manifest.tensors[piece.tensor]
            await link.ask(self._manifest.digest, tensor.file, tensor.offset + piece.offset, piece.nbytes, piece)

    async def _waited(self, turn: Coroutine[Any, Any, None]) -> None:
        """Wait for one's turn, which is no silence."""
        began = time.monotonic()
        await turn
        self._moved_at += time.monotonic() - began

    async def _take(self, name: str, piece: Piece, data: memoryview | None) -> None:
        self._moved_at = time.monotonic()
        if data is None:
            self._schedule.refused(name, piece)
            return
        self._nbytes += len(data)
        if self._schedule.take(name, piece):
            await asyncio.to_thread(self._store.write, piece.tensor, piece.offset, data)
            if self._schedule.arrived(name, piece):
                self._start(self._check(piece.tensor))

    async def _check(self, tensor: int) -> None:
        if await asyncio.to_thread(self._store.finish, tensor):
            self._schedule.right(tensor)
        else:
            liar = self._schedule.wrong(tensor)
            if liar is not None:
                self._lied(liar, f"the digest of {printable(self._manifest.tensors[tensor].name)} is wrong")
        self._changed.set()

    def _lied(self, name: str, how: str) -> None:
        """Never asked again in this fetch."""
        if name not in self._liars:
            self._liars.append(name)
        self._detail = f"{name} sent wrong weights ({how}): others are asked instead"
        self._schedule.drop_for_good(name)
        self._changed.set()


class _LieError(Exception):
    """A source sent what no honest one sends."""


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):  # asyncio.wait_for would lose a cancellation at the event
            await event.wait()
