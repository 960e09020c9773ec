"""The coordinator's end of a ring, for asyncio: many answers at once, and a ring that may be made anew meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from array import array
from collections.abc import Callable, Sequence

from homeinfer.cluster.wire.messages import (
    Ask,
    Cancel,
    Failure,
    Finished,
    Message,
    News,
    Prefilled,
    Told,
    decode,
    encode,
)
from homeinfer.cluster.wire.transport import Keys, Links, Peer
from homeinfer.engine.request import Finish, Request
from homeinfer.errors import HomeinferError

_MOST_BYTES = 1 << 20
"""No message to the coordinator is larger: it gets tokens, never logits."""
_MOST_QUEUED = 4096


class RingFailed(HomeinferError):
    """A device of the ring could not go on with an answer. culprit: the number of the window whose output was at
    fault, where another device says so."""

    def __init__(self, device: str, reason: str, culprit: int | None = None) -> None:
        super().__init__(f"{device}: {reason}")
        self.device = device
        self.reason = reason
        self.culprit = culprit


class RingMoved(HomeinferError):
    """The ring was made anew, or closed, before the answer was whole: ask again."""


class Signs:
    """What was heard of one answer: when last (time.monotonic()), how many of its prompt's tokens are in memory, how
    many tokens were told."""

    def __init__(self) -> None:
        self.last_heard = time.monotonic()
        self.prefilled = 0
        self.told = 0


class RingClient:
    """Asks a ring for answers. All methods are the event loop's; a thread waits for the ring's messages."""

    def __init__(self, listen: str, keys: Keys | None = None) -> None:
        """Listen for the ring's messages at `ipc://FILE` or, with keys, `tcp://HOST:PORT` (port * for a free one).

        Must be made while the loop runs. Raises HomeinferError for a taken address.
        """
        self._loop = asyncio.get_running_loop()
        self._links = Links(listen, keys, max_bytes=_MOST_BYTES, most_queued=_MOST_QUEUED)
        self.address = self._links.address
        self._step = 0
        self._epoch: int | None = None
        self._last: Peer | None = None
        self._can_shift = True
        self._answers: dict[int, _Answering] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, daemon=True, name="ring-client")
        self._thread.start()

    def retarget(
        self, epoch: int, last: Peer, *, can_shift: bool = True, allowed: tuple[str, ...] | None = None
    ) -> None:
        """From now on the ring of this epoch answers, whose last window is behind `last`; answers under way raise
        RingMoved. can_shift: whether all windows' memories can be edited in part. allowed: keys that may send here,
        None for those as before. Raises HomeinferError for an address that can't be reached."""
        self.drop()
        if allowed is not None:
            self._links.allow(allowed)
        self._links.drop_senders()
        self._links.sender(last)
        self._epoch, self._last, self._can_shift = epoch, last, can_shift

    def drop(self) -> None:
        """There is no ring any more: answers under way raise RingMoved, new ones too until the next `retarget`."""
        self._epoch = self._last = None
        for answering in self._answers.values():
            answering.heard.put_nowait(None)
        self._answers.clear()

    @property
    def under_way(self) -> int:
        """Answers that were asked for and are not whole."""
        return len(self._answers)

    def longest_silence(self) -> float:
        """Seconds since the last sign of that answer under way which has been silent the longest; 0.0 without any."""
        now = time.monotonic()
        return max((now - answering.signs.last_heard for answering in self._answers.values()), default=0.0)

    async def answer(
        self,
        prompt: Sequence[int],
        request: Request,
        on_tokens: Callable[[Sequence[Told]], None],
        cancelled: asyncio.Event,
        signs: Signs | None = None,
    ) -> Finish:
        """Let the ring write an answer. on_tokens gets the tokens, in order, as they come; `signs` is kept up
        to date. The ring is told to stop when `cancelled` is set, or this task is cancelled.

        Raises RingFailed when a device can't go on, RingMoved when the ring is made anew meanwhile.
        """
        if self._last is None or self._epoch is None:
            raise RingMoved("there is no ring")
        self._step += 1
        step, answering = self._step, _Answering(signs or Signs())
        answering.signs.last_heard = time.monotonic()
        ask = Ask(self._epoch, step, 0, len(prompt), request, self._can_shift)
        rows = array("i", prompt).tobytes()
        self._answers[step] = answering
        self._send(ask, rows)
        watcher = asyncio.ensure_future(self._watch(cancelled, step))
        try:
            return await self._follow(answering, on_tokens)
        finally:
            watcher.cancel()
            if self._answers.pop(step, None) is not None and not answering.is_over:
                self._send(Cancel(self._epoch, step, 0))

    async def _follow(self, answering: _Answering, on_tokens: Callable[[Sequence[Told]], None]) -> Finish:
        while True:
            match await answering.heard.get():
                case None:
                    raise RingMoved("the ring was made anew")
                case list(told):
                    on_tokens(told)
                case Finished(finish=finish):
                    answering.is_over = True
                    return finish
                case Failure(device=device, message=message, culprit=culprit):
                    answering.is_over = True
                    raise RingFailed(device, message, culprit)

    async def _watch(self, cancelled: asyncio.Event, step: int) -> None:
        await cancelled.wait()
        if step in self._answers and self._epoch is not None:
            self._send(Cancel(self._epoch, step, 0))

    def _send(self, message: Message, rows: bytes = b"") -> None:
        if self._last is not None:
            self._links.send(self._last, encode(message, rows))

    def _listen(self) -> None:
        while not self._is_closed:
            frames = self._links.receive()
            if frames is None:
                continue
            with contextlib.suppress(HomeinferError, RuntimeError):  # no message, or the loop has ended
                message, _ = decode([bytes(frame) for frame in frames])
                self._loop.call_soon_threadsafe(self._heard, message)

    def _heard(self, message: Message) -> None:
        if message.epoch != self._epoch:
            return
        by_answer: dict[int, list[Message]] = {}
        for each in message.items if isinstance(message, News) else (message,):
            by_answer.setdefault(each.step, []).append(each)
        for step, its in by_answer.items():
            if step in self._answers:
                self._answers[step].hear(its)

    def close(self) -> None:
        """Answers under way raise RingMoved; all sockets are closed. Safe to call twice."""
        if self._is_closed:
            return
        self.drop()
        self._is_closed = True
        self._links.wake()
        self._thread.join()
        self._links.close()


class _Answering:
    """One answer under way."""

    def __init__(self, signs: Signs) -> None:
        self.signs = signs
        self.heard: asyncio.Queue[list[Told] | Finished | Failure | None] = asyncio.Queue()
        self.is_over = False

    def hear(self, messages: Sequence[Message]) -> None:
        self.signs.last_heard = time.monotonic()
        told = [message for message in messages if isinstance(message, Told)]
        if told:
            self.signs.told += len(told)
            self.heard.put_nowait(told)
        for message in messages:
            if isinstance(message, Prefilled):
                self.signs.prefilled = message.done
            elif isinstance(message, Finished | Failure):
                self.heard.put_nowait(message)
