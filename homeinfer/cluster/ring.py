"""The head's end of a ring: a Pipeline and a Teller whose layers are in other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from homeinfer.cluster.ring_steps import first_step, logits_of
from homeinfer.cluster.wire.messages import (
    Ask,
    Cancel,
    Edits,
    Failure,
    Finished,
    Message,
    News,
    Spent,
    Step,
    Told,
    decode,
    encode,
)
from homeinfer.cluster.wire.transport import Links, Peer
from homeinfer.engine.device_info import DeviceInfo
from homeinfer.engine.edits import KvEdit
from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.engine.request import Finish, Request
from homeinfer.errors import HomeinferError

CHECK_MS = 200
"""How long the head waits before it looks whether all devices are still there."""


class RingShape(msgspec.Struct, frozen=True):
    """What the head knows of a ring: its first window is behind `first`, its last one behind `last`."""

    epoch: int
    first: Peer
    last: Peer
    n_vocab: int
    n_ctx: int
    n_batch: int
    can_shift: bool
    devices: tuple[DeviceInfo, ...]


class RingPipeline:
    """Asks the ring for answers (homeinfer.engine.answers.Teller), whose token loop runs on the device with the last
    window; or sends batches into it and waits for what comes back (homeinfer.engine.pipeline.Pipeline).

    `check` is called while waiting, a few times a second, and raises when a device is gone; `on_close`
    ends the devices.
    """

    def __init__(self, shape: RingShape, links: Links, check: Callable[[], None], on_close: Callable[[], None]) -> None:
        self._shape = shape
        self._links = links
        self._check = check
        self._on_close = on_close
        self._step = 0
        self.spent: tuple[Spent, ...] = ()
        """What the last batch, or the last token's, cost each window."""
        self.choosing = 0.0
        """Microseconds in which the last token was chosen."""
        self._closed = False

    @property
    def n_vocab(self) -> int:
        return self._shape.n_vocab

    @property
    def n_ctx(self) -> int:
        return self._shape.n_ctx

    @property
    def n_batch(self) -> int:
        return self._shape.n_batch

    @property
    def can_shift(self) -> bool:
        return self._shape.can_shift

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        return self._shape.devices

    def tell(
        self,
        prompt: Sequence[int],
        request: Request,
        on_token: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Finish:
        """Let the ring write an answer. Raises HomeinferError when a device can't or is gone."""
        self._step += 1
        ask = Ask(self._shape.epoch, self._step, 0, len(prompt), request, self.can_shift)
        self._links.send(self._shape.last, encode(ask, np.asarray(prompt, np.int32).tobytes()))
        try:
            return self._follow(self._step, on_token, cancelled)
        except BaseException:
            self._cancel(self._step)  # whoever asked hears of it no more
            raise

    def _follow(self, step: int, on_token: Callable[[int], None], cancelled: Callable[[], bool]) -> Finish:
        is_cancelled = False
        while True:
            if not is_cancelled and cancelled():
                is_cancelled = True
                self._cancel(step)
            for message, _ in self._heard(step):
                if isinstance(message, Finished):
                    return message.finish
                if isinstance(message, Told) and not is_cancelled:
                    self.spent, self.choosing = message.spent, message.choosing
                    on_token(message.token)

    def _cancel(self, step: int) -> None:
        self._links.send(self._shape.last, encode(Cancel(self._shape.epoch, step, 0)))

    def forward(self, batch: Batch) -> Floats:
        """Once around the ring: float32 [wanted, n_vocab]. Raises HomeinferError when a device can't or is gone."""
        self._step += 1
        self._links.send(self._shape.first, encode(*first_step(self._shape.epoch, self._step, batch)))
        message, rows = self._await(self._step)
        return logits_of(message, rows, int(np.count_nonzero(batch.wanted)), self.n_vocab)

    def edit(self, edits: Sequence[KvEdit]) -> None:
        """Once around the ring; returns when every window has done it. Raises HomeinferError."""
        self._step += 1
        self._links.send(self._shape.first, encode(Edits(self._shape.epoch, self._step, 0, tuple(edits))))
        self._await(self._step)

    def _await(self, step: int) -> tuple[Message, memoryview]:
        """The answer to a step."""
        while True:
            for message, rows in self._heard(step):
                if isinstance(message, Step):
                    self.spent = message.spent
                return message, rows

    def _heard(self, step: int) -> Iterator[tuple[Message, memoryview]]:
        """What comes next about a step, which may be nothing for a while; what belongs to an earlier, interrupted one
        is dropped. Raises HomeinferError for a failure in it, and when a device is gone."""
        frames = self._links.receive()
        if frames is None:
            self._check()
            return
        message, rows = decode(frames)
        if message.epoch != self._shape.epoch:
            return
        for each in message.items if isinstance(message, News) else (message,):
            if each.step == step:
                if isinstance(each, Failure):
                    raise HomeinferError(f"{each.device}: {each.message}")
                yield each, rows

    def close(self) -> None:
        """End the ring and its devices. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._on_close()
        self._links.close()
