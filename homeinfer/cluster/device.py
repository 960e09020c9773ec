"""What an engine does with the messages of the ring: its windows, and the answers where it holds the last one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np

from homeinfer.cluster.engine_messages import Hop, Routes, Setup
from homeinfer.cluster.wire.messages import (
    Ask,
    Cancel,
    Edits,
    Failure,
    Finished,
    Message,
    Spent,
    Step,
    Stop,
    Told,
    decode,
    encode,
    first_step,
    logits_of,
)
from homeinfer.cluster.wire.transport import Links, Peer, send
from homeinfer.engine.generate import TokenLoop
from homeinfer.engine.pipeline import Batch, DeviceInfo, Floats, KvEdit
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError


class RingEnds(Exception):
    """A Stop came in the middle of an answer."""


class DeviceFailure(HomeinferError):
    """What another device could not do."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Device:
    """Windows and links of one engine."""

    def __init__(self, setup: Setup, windows: list[LayerWindow], links: Links, routes: Routes) -> None:
        self.epoch = setup.epoch
        self._name = setup.name
        self._links = links
        self._windows = windows
        self._hops = {hop.hop: hop for hop in routes.hops}
        self._head = routes.head
        self._teller = _Teller(self, windows[-1], routes, setup.vocabulary) if routes.n_hops - 1 in self._hops else None

    def run(self) -> None:
        """Serve until a Stop comes."""
        while True:
            arrived = self.receive()
            if arrived is None:
                continue
            message, rows = arrived
            try:
                if isinstance(message, Ask):
                    if self._teller is not None:
                        self._teller.answer(message, rows)
                elif not isinstance(message, Cancel):
                    if self._teller is not None and not isinstance(message, Stop):
                        self._teller.loop.forget()  # somebody else changes the memory
                    self.pass_on(message, rows)
                    if isinstance(message, Stop):
                        return
            except RingEnds:
                return

    def receive(self, *, wait: bool = True) -> tuple[Message, Any] | None:
        """The next message that is of this ring's epoch, or None when what came was none, or nothing came."""
        frames = self._links.receive() if wait else self._links.receive_now()
        if frames is None:
            return None
        try:
            message, rows = decode(frames)
        except HomeinferError:
            return None  # nothing of this ring: nobody to tell
        return (message, rows) if message.epoch == self.epoch else None

    def pass_on(self, message: Message, rows: Any) -> None:
        """Take a message through this device's windows and send it to the next device."""
        if message.hop in self._hops:
            peer, message, rows = self.advance(message, rows)
            self.send(peer or self._head, message, rows)

    def advance(self, message: Message, rows: Any) -> tuple[Peer | None, Message, Any]:
        """A message and its rows behind this device's next windows, and where they go (None: it was the last one)."""
        while message.hop in self._hops:
            hop = self._hops[message.hop]
            message, rows = self._answer(message, rows, hop)
            if hop.next is not None:
                return hop.next, message, rows
        return None, message, rows

    def send(self, peer: Peer, message: Message, rows: Any = b"") -> None:
        send(self._links.sender(peer), encode(message, rows))

    def tell(self, message: Message) -> None:
        """To the head."""
        self.send(self._head, message)

    def failure(self, step: int, problem: HomeinferError) -> Failure:
        """What the head hears of a problem, another device's or this one's."""
        if isinstance(problem, DeviceFailure):
            return msgspec.structs.replace(problem.failure, step=step)
        return Failure(self.epoch, step, 0, self._name, str(problem))

    def _answer(self, message: Message, rows: Any, hop: Hop) -> tuple[Message, Any]:
        window = self._windows[hop.window]
        try:
            if isinstance(message, Step):
                return self._step(message, rows, window)
            if isinstance(message, Edits):
                window.edit(message.edits)
        except HomeinferError as problem:
            return Failure(message.epoch, message.step, message.hop + 1, self._name, str(problem)), b""
        return msgspec.structs.replace(message, hop=message.hop + 1), b""

    def _step(self, step: Step, rows: Any, window: LayerWindow) -> tuple[Message, Any]:
        begin = time.perf_counter()
        if step.width != (0 if window.takes_tokens else window.n_embd):
            raise HomeinferError(f"rows of {step.width} numbers do not fit the window from layer {window.spec.first}")
        out = window.forward_bytes(step.n, step.index, rows)
        spent = Spent(window.computing * 1e6, (time.perf_counter() - begin) * 1e6)
        passed = (*step.spent, spent)
        return Step(step.epoch, step.step, step.hop + 1, step.n, window.width, step.index, passed), out


class _Teller:
    """The token loop on the device that holds the last window: a Pipeline from the inside of the ring.

    Its steps are numbered downwards from -1, so that they are never taken for the head's.
    """

    def __init__(self, device: Device, last: LayerWindow, routes: Routes, vocabulary: str) -> None:
        self._device = device
        self._spec = last.spec
        self._n_hops = routes.n_hops
        self._first = routes.first
        self._step = 0
        self._asked = 0
        self._is_cancelled = False
        self._untold: list[Told] = []
        self._spent: tuple[Spent, ...] = ()
        self._back = 0.0
        self.can_shift = True
        """Said by the head in the request's stead: edits that a window can't do fail there."""
        self.n_vocab = last.n_vocab
        self.loop = TokenLoop(self, _ModelVocabulary(vocabulary, last.n_vocab))

    @property
    def n_ctx(self) -> int:
        return self._spec.n_ctx

    @property
    def n_batch(self) -> int:
        return self._spec.n_batch

    @property
    def devices(self) -> tuple[DeviceInfo, ...]:
        return ()

    def answer(self, ask: Ask, rows: Any) -> None:
        """Write an answer for the head. Raises RingEnds when the ring ends meanwhile."""
        self._asked, self._is_cancelled = ask.step, False
        self.can_shift = ask.can_shift
        try:
            prompt = _prompt(ask, rows, self.n_ctx)
            finish = self.loop.run(prompt, ask.request, self._on_token, self._cancelled)
            self._tell_tokens()
            self._device.tell(Finished(self._device.epoch, ask.step, 0, finish))
        except HomeinferError as problem:
            self._tell_tokens()
            self._device.tell(self._device.failure(ask.step, problem))

    def forward(self, batch: Batch) -> Floats:
        """Once around the ring (homeinfer.engine.pipeline.Pipeline)."""
        message, rows = self._around(*first_step(self._device.epoch, self._next_step(), batch))
        if isinstance(message, Step):
            self._spent = message.spent
        self._back = time.perf_counter()
        return logits_of(message, rows, int(np.count_nonzero(batch.wanted)), self.n_vocab)

    def edit(self, edits: Sequence[KvEdit]) -> None:
        """Once around the ring; returns when every window has done it."""
        self._around(Edits(self._device.epoch, self._next_step(), 0, tuple(edits)), b"")

    def close(self) -> None:
        """The ring is not this end's to close."""

    def _next_step(self) -> int:
        self._step -= 1
        return self._step

    def _around(self, message: Message, rows: Any) -> tuple[Message, Any]:
        if self._first is None:
            self._tell_tokens()  # nobody else computes meanwhile
            peer, message, rows = self._device.advance(message, rows)
            if peer is None:
                return _checked(message, rows)
            self._device.send(peer, message, rows)
        else:
            self._device.send(self._first, message, rows)
        self._tell_tokens()
        return self._await()

    def _await(self) -> tuple[Message, Any]:
        while True:
            arrived = self._device.receive()
            if arrived is None or self._heard(arrived[0]):
                continue
            message, rows = arrived
            if message.step != self._step:
                continue  # of an answer that failed
            peer, message, rows = self._device.advance(message, rows)
            if peer is None and message.hop == self._n_hops:
                return _checked(message, rows)
            if peer is not None:
                self._device.send(peer, message, rows)

    def _heard(self, message: Message) -> bool:
        """Whether a message was for the teller itself."""
        if isinstance(message, Cancel):
            self._is_cancelled |= message.step == self._asked
        elif isinstance(message, Stop):
            self._device.pass_on(message, b"")
            raise RingEnds
        return isinstance(message, Cancel | Ask)

    def _cancelled(self) -> bool:
        if self._first is None:
            while (arrived := self._device.receive(wait=False)) is not None:
                self._heard(arrived[0])
        return self._is_cancelled

    def _on_token(self, token: int) -> None:
        choosing = (time.perf_counter() - self._back) * 1e6
        self._untold.append(Told(self._device.epoch, self._asked, 0, token, self._spent, choosing))

    def _tell_tokens(self) -> None:
        """Only when the next step is on its way: what the head does with a token is nobody's to wait for."""
        for told in self._untold:
            self._device.tell(told)
        self._untold.clear()


class _ModelVocabulary:
    """Loaded from the model when a grammar first asks for it: windows have none."""

    def __init__(self, path: str, n_vocab: int) -> None:
        self._path = path
        self.n_vocab = n_vocab

    @cached_property
    def vocab(self) -> Any:
        self._tokenizer = Tokenizer(self._path)
        return self._tokenizer.vocab


def _checked(message: Message, rows: Any) -> tuple[Message, Any]:
    if isinstance(message, Failure):
        raise DeviceFailure(message)
    return message, rows


def _prompt(ask: Ask, rows: Any, n_ctx: int) -> list[int]:
    """The prompt's tokens. Raises HomeinferError for one that is not what the Ask says, or too long."""
    if not 0 < ask.n < n_ctx or memoryview(rows).nbytes != 4 * ask.n:
        raise HomeinferError(f"a prompt of {ask.n} tokens does not fit a context of {n_ctx}")
    tokens: list[int] = np.frombuffer(rows, np.int32).tolist()
    return tokens
