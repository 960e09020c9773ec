"""The head's end of a ring: a Pipeline whose layers are in other processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from homeinfer.cluster.wire.messages import (
    Edits,
    Failure,
    Payload,
    Spent,
    Step,
    Stop,
    decode,
    encode,
    first_payload,
    logits_of,
)
from homeinfer.cluster.wire.transport import Links, Peer
from homeinfer.engine.pipeline import Batch, DeviceInfo, Floats, KvEdit
from homeinfer.errors import HomeinferError

_CHECK_MS = 200


class RingShape(msgspec.Struct, frozen=True):
    """What the head knows of a ring: `hops` windows in order, the first behind `first`."""

    epoch: int
    hops: int
    first: Peer
    n_vocab: int
    n_ctx: int
    n_batch: int
    can_shift: bool
    devices: tuple[DeviceInfo, ...]


class RingPipeline:
    """Sends batches into the ring and waits for what comes back (homeinfer.engine.pipeline.Pipeline).

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
        """What the last batch cost each window."""
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

    def forward(self, batch: Batch) -> Floats:
        """Once around the ring: float32 [wanted, n_vocab]. Raises HomeinferError when a device can't or is gone."""
        n = len(batch.tokens)
        self._step += 1
        step = Step(self._shape.epoch, self._step, hop=0, n=n, width=0)
        self._links.send(self._shape.first, encode(step, first_payload(batch)))
        payload = self._await(self._step)
        if payload is None or payload.rows.shape != (int(np.count_nonzero(batch.wanted)), self.n_vocab):
            raise HomeinferError("the last device sent back something other than the logits it was asked for")
        return logits_of(payload)

    def edit(self, edits: Sequence[KvEdit]) -> None:
        """Once around the ring; returns when every window has done it. Raises HomeinferError."""
        self._step += 1
        self._links.send(self._shape.first, encode(Edits(self._shape.epoch, self._step, 0, tuple(edits))))
        self._await(self._step)

    def _await(self, step: int) -> Payload | None:
        """The answer to a step; what belongs to an earlier, interrupted one is dropped."""
        while True:
            frames = self._links.receive(_CHECK_MS)
            if frames is None:
                self._check()
                continue
            message, payload = decode(frames)
            if message.epoch != self._shape.epoch or isinstance(message, Stop) or message.step != step:
                continue
            if isinstance(message, Failure):
                raise HomeinferError(f"{message.device}: {message.message}")
            if isinstance(message, Step):
                self.spent = message.spent
            return payload

    def close(self) -> None:
        """End the ring and its devices. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(HomeinferError):
            self._links.send(self._shape.first, encode(Stop(self._shape.epoch, 0)))
        self._on_close()
        self._links.close()
