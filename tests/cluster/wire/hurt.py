"""A head with one friend, who may be anything but one, and what flooding it costs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

import psutil

from homeinfer.cluster.wire.keys import DeviceKeys
from homeinfer.cluster.wire.ledger import Ledger
from homeinfer.cluster.wire.secure import Secure, bound_port, received, sender_key
from homeinfer.cluster.wire.transport import new_keys
from tests.cluster.wire.own_zmtp import MORE, OwnZmtp, dialled, raw_pair

MOST_BYTES = 100_000
FLOOD_BYTES = 600_000_000
FRAME = bytes(90_000)
_FRAMES_AT_ONCE, _BREATH_SECONDS = 10, 0.01
"""Most of a gigabit per second: the guard is a thread as others are, and a busy machine lets it wait for some time."""
ANYWHERE = "tcp://127.0.0.1:*"
ENOUGH_MS = 20_000


class Hurt:
    """A friend's keys, and who holds them against the head."""

    def __init__(self, secure: Secure, friend: tuple[str, str]) -> None:
        self.secure, self.friend = secure, friend
        self.head = secure.keys.public
        self.socket = secure.router(ANYWHERE, "test", lambda key: key == friend[0], MOST_BYTES)
        self.port = bound_port(self.socket)
        self._seen = threading.Semaphore(0)
        opened = self.ledger.opened

        def noted(handle: int) -> None:
            opened(handle)
            self._seen.release()

        setattr(self.ledger, "opened", noted)  # noqa: B010

    @property
    def ledger(self) -> Ledger:
        found = getattr(self.socket, "ledger")  # noqa: B009
        assert isinstance(found, Ledger)
        return found

    async def next_seen(self) -> None:
        """Until the guard knows of one more connection: whose a message is that was taken before, nobody remembers."""
        assert await asyncio.to_thread(self._seen.acquire, timeout=ENOUGH_MS / 1000)

    def dial(self) -> contextlib.AbstractContextManager[OwnZmtp]:
        """For another thread: the event loop answers the handshake."""
        return dialled(self.port, raw_pair(*self.friend), self.head)

    @contextlib.asynccontextmanager
    async def enemy(self) -> AsyncIterator[OwnZmtp]:
        opening = self.dial()
        peer = await asyncio.to_thread(opening.__enter__)
        try:
            yield peer
        finally:
            peer.close()

    async def heard(self) -> bytes:
        frames = await received(self.socket, ENOUGH_MS / 1000)
        assert frames is not None
        assert sender_key(frames[1]) == self.friend[0]
        return frames[1].bytes

    async def works(self) -> bool:
        """Whether the friend, or an enemy who mends his ways, gets through."""
        hearing = asyncio.create_task(self.heard())
        await asyncio.sleep(0)
        async with contextlib.AsyncExitStack() as stack:
            peer = await self._let_in(stack)
            peer.send(b"still there?")
            while (said := await hearing) != b"still there?":
                assert said
                hearing = asyncio.create_task(self.heard())
        return True

    async def _let_in(self, stack: contextlib.AsyncExitStack) -> OwnZmtp:
        """An enemy, who as every device comes again where he was cut off with what was there before."""
        until = time.monotonic() + ENOUGH_MS / 1000
        while True:
            try:
                return await stack.enter_async_context(self.enemy())
            except OSError:
                assert time.monotonic() < until
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def hurt() -> AsyncIterator[Hurt]:
    secure = Secure(DeviceKeys(*new_keys()))
    try:
        yield Hurt(secure, new_keys())
    finally:
        secure.close()


def rss() -> int:
    return psutil.Process().memory_info().rss


class Flood:
    """Frames of one message without an end, from a thread, until the other side ends the connection."""

    def __init__(self, peer: Callable[[], OwnZmtp]) -> None:
        self.sent = 0
        self.is_cut_off = False
        self._peer = peer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        peer = self._peer()
        try:
            while self.sent < FLOOD_BYTES:
                for _ in range(_FRAMES_AT_ONCE):
                    peer.send(FRAME, MORE)
                    self.sent += len(FRAME)
                time.sleep(_BREATH_SECONDS)
        except OSError:
            self.is_cut_off = True

    def highest_rss(self, limit: float = 30) -> int:
        """Of this process, until the flood is over."""
        highest, until = rss(), time.monotonic() + limit
        while self._thread.is_alive():
            assert time.monotonic() < until
            time.sleep(0.01)
            highest = max(highest, rss())
        return highest
