"""What an engine does with the messages of the ring: its windows, and the answers where it holds the last one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from homeinfer.cluster.engine_messages import Hop, Routes, Setup
from homeinfer.cluster.teller import ModelVocabulary, Teller
from homeinfer.cluster.wire.messages import Edits, Failure, Message, News, Prefilled, Spent, Step, Told, decode, encode
from homeinfer.cluster.wire.rows import pack, unpack
from homeinfer.cluster.wire.transport import Links, Peer
from homeinfer.engine.edits import Remove
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError

LOST = "a step was lost on its way around the ring"


class Device:
    """Windows and links of one engine, and their place in the ring of the present epoch."""

    def __init__(
        self,
        setup: Setup,
        windows: list[LayerWindow],
        links: Links,
        ordered: deque[Routes],
        on_joined: Callable[[int], None],
    ) -> None:
        """ordered: where another thread puts Routes, and then wakes the links; on_joined hears their epochs."""
        self._setup = setup
        self._links = links
        self._windows = windows
        self._on_joined = on_joined
        self._ordered = ordered
        self._vocabulary = ModelVocabulary(setup.vocabulary, windows[-1].n_vocab)
        self._routes: Routes | None = None
        self._hops: dict[int, Hop] = {}
        self._passed: dict[int, tuple[int, int]] = {}
        """Of each hop: the last steps that went through, the teller's (-1, -2, ...) and the head's (upwards)."""
        self._teller: Teller | None = None

    @property
    def name(self) -> str:
        return self._setup.name

    @property
    def epoch(self) -> int:
        return -1 if self._routes is None else self._routes.epoch

    def run(self) -> NoReturn:
        """Serve, for ever."""
        while True:
            while self._ordered:
                self._join(self._ordered.popleft())
            has_work = self._teller is not None and self._teller.has_work()
            arrived = self._receive(wait=not has_work)
            if arrived is not None:
                self._handle(*arrived)
            elif self._teller is not None and has_work:
                self._teller.launch()

    def _join(self, routes: Routes) -> None:
        """Leave whatever was under way, with an empty memory."""
        self._routes = routes
        self._hops = {hop.hop: hop for hop in routes.hops}
        self._passed = dict.fromkeys(self._hops, (0, 0))
        self._links.allow(routes.allowed)
        self._links.drop_senders()
        for window in self._windows:
            window.edit([Remove(sequence) for sequence in range(window.spec.n_seq)])
        if self._teller is not None:
            self._teller.close()
        holds_last = routes.n_hops - 1 in self._hops
        self._teller = Teller(self, self._windows, routes, self._vocabulary) if holds_last else None
        self._on_joined(routes.epoch)

    def _receive(self, *, wait: bool) -> tuple[Message, Any] | None:
        """The next message that is of this ring's epoch, or None when what came was none, or nothing came."""
        frames = self._links.receive() if wait else self._links.receive_now()
        if frames is None:
            return None
        try:
            message, rows = decode(frames)
        except HomeinferError:
            return None  # nothing of this ring: nobody to tell
        return (message, rows) if message.epoch == self.epoch else None

    def _handle(self, message: Message, rows: Any) -> None:
        if isinstance(message, Step | Edits | Failure):
            if message.hop in self._hops:
                self._arrived(message, rows)
        elif self._teller is not None and not isinstance(message, News | Told | Prefilled):
            self._teller.hear(message, rows)

    def _arrived(self, message: Step | Edits | Failure, rows: Any) -> None:
        """What was here before must not change the memory again, nor may what comes behind something lost."""
        down, up = self._passed[message.hop]
        if message.step > up:
            self._passed[message.hop] = down, message.step
            self.pass_on(message, rows)
        elif message.step < down - 1:
            self.pass_on(Failure(self.epoch, message.step, message.hop, self.name, LOST, message.hop - 1), b"")
        elif message.step == down - 1:
            self._passed[message.hop] = message.step, up
            self.pass_on(message, rows)

    def pass_on(self, message: Message, rows: Any, *, is_own: bool = False) -> None:
        """Take a message through this device's windows and send it to the next device, or to where its step came
        from. is_own: it starts here."""
        hop: Hop | None = None
        while message.hop in self._hops:
            hop = self._hops[message.hop]
            message, rows = self._through(message, rows, hop, is_own=is_own)
            is_own = True
            if hop.next is not None:
                self.send(hop.next, message, self._packed(message, rows))
                return
        if self._teller is None or hop is None:
            return
        if message.step < 0:
            self._teller.back(message, rows)
        else:
            self._teller.forget()  # somebody else changes the memory
            self.tell(message, rows)

    def _packed(self, message: Message, rows: Any) -> Any:
        is_hidden = isinstance(message, Step) and message.width
        return pack(self._setup.wire, rows, message.width) if isinstance(message, Step) and is_hidden else rows

    def send(self, peer: Peer, message: Message, rows: Any = b"") -> None:
        """Queue a message; never waits."""
        self._links.send(peer, encode(message, rows))

    def tell(self, message: Message, rows: Any = b"") -> None:
        """To the head."""
        if self._routes is not None:
            self.send(self._routes.head, message, rows)

    def _through(self, message: Message, rows: Any, hop: Hop, *, is_own: bool) -> tuple[Message, Any]:
        window = self._windows[hop.window]
        culprit = None
        try:
            if isinstance(message, Step):
                if not is_own:
                    culprit = message.hop - 1
                    rows = self._believed(message, rows, window)
                    culprit = None
                return self._step(message, rows, window)
            if isinstance(message, Edits):
                window.edit(message.edits)
        except HomeinferError as problem:
            return Failure(message.epoch, message.step, message.hop + 1, self.name, str(problem), culprit), b""
        return msgspec.structs.replace(message, hop=message.hop + 1), b""

    def _believed(self, step: Step, rows: Any, window: LayerWindow) -> Any:
        """Rows from another device: hidden states are unpacked and looked at. Raises HomeinferError."""
        if window.takes_tokens:
            return rows
        if step.width != window.n_embd:
            raise HomeinferError(f"rows of {step.width} numbers came for layer {window.spec.first}")
        if step.n > window.spec.n_batch:
            raise HomeinferError(f"{step.n} rows came for layer {window.spec.first}, {window.spec.n_batch} at most fit")
        try:
            return unpack(self._setup.wire, rows, step.n, step.width)
        except HomeinferError as problem:
            raise HomeinferError(f"what came for layer {window.spec.first} can't be used: {problem}") from None

    def _step(self, step: Step, rows: Any, window: LayerWindow) -> tuple[Message, Any]:
        begin = time.perf_counter()
        if step.width != (0 if window.takes_tokens else window.n_embd):
            raise HomeinferError(f"rows of {step.width} numbers do not fit the window from layer {window.spec.first}")
        out = window.forward_bytes(step.n, step.index, rows)
        spent = Spent(window.computing * 1e6, (time.perf_counter() - begin) * 1e6)
        passed = (*step.spent, spent)
        return Step(step.epoch, step.step, step.hop + 1, step.n, window.width, step.index, passed), out
