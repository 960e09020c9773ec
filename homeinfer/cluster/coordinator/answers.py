"""The answers that clients asked for: queued, written by the ring, kept on disk, asked again after a change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from homeinfer.cluster.coordinator.answer_rules import Failures, Patience, after_failure, again, is_plain_step, is_whole
from homeinfer.cluster.coordinator.journal import Journal, Kept
from homeinfer.cluster.coordinator.speed import Speed
from homeinfer.cluster.ring_client import RingClient, RingFailed, RingMoved, Signs
from homeinfer.cluster.wire.client import (
    AnswerDone,
    AnswerFailed,
    AskAnswer,
    CancelAnswer,
    Notice,
    Resume,
    Tokens,
    Unknown,
)
from homeinfer.cluster.wire.messages import Told
from homeinfer.engine.request import Finish
from homeinfer.errors import HomeinferError

LISTEN_SECONDS = 120.0
"""An answer that nobody has listened to for so long is ended."""
_KEEP_SECONDS = 600.0
_MOST_KEPT = 200
_MOST_WAITING = 64


class Trouble(msgspec.Struct, frozen=True):
    """Why an answer gets no further. is_silent: nothing was heard of it; culprit: the number of the window whose output
    was at fault, where that is known."""

    why: str
    is_silent: bool = False
    culprit: int | None = None


class Send(Protocol):
    def __call__(self, client: bytes, message: msgspec.Struct) -> bool:
        """False when the client is gone."""
        ...


class Entry:
    """One answer. It is under way while it has a task, over when it has a finish or failed."""

    def __init__(self, number: int, ask: AskAnswer, told: tuple[int, ...] = (), finish: Finish | None = None) -> None:
        self.number, self.ask = number, ask
        self.told, self.finish = list(told), finish
        self.failed: str | None = None
        self.client: bytes | None = None
        self.listened = time.monotonic()
        self.ended = time.monotonic()
        self.cancelled = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.signs = Signs()
        self.before = len(told)
        self.stalls = 0
        self.failures = Failures()

    @property
    def is_over(self) -> bool:
        return self.finish is not None or self.failed is not None


class Answers:
    """on_trouble asks for the ring to be made anew; on_busy(n) says how many answers are written or wait."""

    def __init__(
        self,
        journal: Journal,
        send: Send,
        *,
        n_ctx: int,
        sequences: int,
        step_seconds: float,
        on_trouble: Callable[[Trouble], None],
        on_busy: Callable[[int], None],
    ) -> None:
        self._journal, self._send = journal, send
        self._n_ctx, self._sequences, self._step_seconds = n_ctx, sequences, step_seconds
        self._on_trouble, self._on_busy = on_trouble, on_busy
        self._entries: dict[str, Entry] = {}
        self._number = 0
        self._ring: RingClient | None = None
        self._n_vocab = 0
        self._patience = Patience(0.0, 0.0)
        self.speed = Speed()
        self.answered = 0
        for kept in journal.load():
            self._restore(kept)

    @property
    def unfinished(self) -> int:
        return sum(not entry.is_over for entry in self._entries.values())

    @property
    def under_way(self) -> int:
        return sum(entry.task is not None for entry in self._entries.values())

    def ask(self, client: bytes, ask: AskAnswer) -> None:
        """A new answer; one that is known already is told from its beginning."""
        if ask.id in self._entries:
            self.resume(client, Resume(ask.id, 0))
            return
        problem = self._problem(ask)
        if problem is None:
            try:
                self._journal.begin(ask)
            except OSError as error:
                problem = f"the head's disk takes no more: {error.strerror}; make room there"
        if problem is not None:
            self._send(client, AnswerFailed(ask.id, problem))
            return
        entry = self._add(ask)
        entry.client = client
        self._start()
        if self._ring is not None and self.under_way >= self._sequences and entry.task is None:
            self._send(client, Notice(f"others are being answered, {self._sequences} at a time: this waits its turn"))

    def resume(self, client: bytes, resume: Resume) -> None:
        """Tell the tokens that a client has not got; from now on it listens."""
        entry = self._entries.get(resume.id)
        if entry is None:
            self._send(client, Unknown(resume.id))
            return
        entry.client, entry.listened = client, time.monotonic()
        start = min(max(resume.have, 0), len(entry.told))
        if start < len(entry.told):
            self._tell(entry, Tokens(resume.id, start, tuple(entry.told[start:])))
        self._tell_end(entry)

    def cancel(self, cancel: CancelAnswer) -> None:
        entry = self._entries.get(cancel.id)
        if entry is None or entry.is_over:
            return
        entry.cancelled.set()
        if entry.task is None:
            self._finish(entry, Finish("cancelled", 0, 0))

    def serve(self, ring: RingClient, n_vocab: int, patience: Patience) -> None:
        """The ring is ready."""
        self._ring, self._n_vocab, self._patience = ring, n_vocab, patience
        self._start()

    def halt(self) -> None:
        """The ring is of no use: what it was asked for waits for the next one."""
        ring, self._ring = self._ring, None
        self.speed.other_ring()
        if ring is not None:
            ring.drop()

    def notice(self, text: str) -> None:
        """A line for everybody who waits for an answer."""
        for client in {entry.client for entry in self._entries.values() if not entry.is_over}:
            if client is not None:
                self._send(client, Notice(text))

    def tick(self, now: float) -> None:
        """A few times a second: who is stuck, who has gone, what is old."""
        for entry in list(self._entries.values()):
            if entry.is_over:
                if now - entry.ended > _KEEP_SECONDS:
                    self._forget(entry)
            elif entry.client is None and now - entry.listened > LISTEN_SECONDS:
                self.cancel(CancelAnswer(entry.ask.id))
        over = sorted((entry for entry in self._entries.values() if entry.is_over), key=lambda entry: entry.ended)
        for entry in over[:-_MOST_KEPT]:
            self._forget(entry)
        self._look_for_stuck(now)

    def woke(self, now: float) -> None:
        """This process itself stood still: nobody was silent meanwhile."""
        for entry in self._entries.values():
            entry.signs.last_heard = now

    def end(self, reason: str) -> None:
        """Nothing more is written, on purpose: whoever waits is told so."""
        self.halt()
        for entry in list(self._entries.values()):
            if not entry.is_over:
                self._fail(entry, reason)

    async def close(self) -> None:
        """What is not whole stays in the journal."""
        self.halt()
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._journal.close_all()
        for entry in self._entries.values():
            if entry.is_over:
                self._journal.forget(entry.ask.id)

    def _restore(self, kept: Kept) -> None:
        entry = self._add(kept.ask, kept.told, kept.finish)
        if not entry.is_over and is_whole(entry.told, kept.ask.request):
            self._finish(entry, Finish("length", 0, 0))

    def _add(self, ask: AskAnswer, told: tuple[int, ...] = (), finish: Finish | None = None) -> Entry:
        self._number += 1
        self._entries[ask.id] = entry = Entry(self._number, ask, told, finish)
        self._on_busy(self.unfinished)
        return entry

    def _problem(self, ask: AskAnswer) -> str | None:
        n = len(ask.prompt)
        if not n:
            return "the prompt is empty: there is nothing to answer"
        if n >= self._n_ctx:
            return (
                f"the prompt has {n:,} tokens, the cluster's context {self._n_ctx:,}: shorten it, or cluster up --ctx"
            )
        if self._n_vocab and max(ask.prompt) >= self._n_vocab:
            return f"the prompt has a token {max(ask.prompt)}, and the cluster's model only {self._n_vocab:,}"
        if self.unfinished >= _MOST_WAITING:
            return f"{_MOST_WAITING} answers wait already: ask again later"
        return None

    def _start(self) -> None:
        """Ask the ring for those that wait, oldest first, as many as it has room for."""
        waiting = sorted(
            (e for e in self._entries.values() if e.task is None and not e.is_over), key=lambda e: e.number
        )
        for entry in waiting[: max(0, self._sequences - self.under_way)]:
            if self._ring is not None:
                problem = self._late_problem(entry)
                if problem is not None:
                    self._fail(entry, problem)
                    continue
                entry.signs, entry.before = Signs(), len(entry.told)
                entry.task = asyncio.create_task(self._write(entry, self._ring))

    def _late_problem(self, entry: Entry) -> str | None:
        """What could not be known when it was asked, before the model was loaded."""
        if max(entry.ask.prompt) >= self._n_vocab or len(entry.ask.prompt) >= self._n_ctx:
            return f"the prompt doesn't fit the cluster's model ({self._n_vocab:,} tokens, context {self._n_ctx:,})"
        return None

    async def _write(self, entry: Entry, ring: RingClient) -> None:
        prompt, request = again(entry.ask.prompt, entry.told, entry.ask.request, entry.ask.session)
        trouble: Trouble | None = None
        try:
            finish = await ring.answer(
                prompt,
                request,
                lambda told: self._told(entry, told),
                entry.cancelled,
                entry.signs,
            )
            self._finish(entry, finish)
        except RingMoved:
            pass
        except RingFailed as problem:
            trouble = self._failed(entry, problem)
        except (HomeinferError, OSError) as problem:
            self._fail(entry, f"the answer can't be written: {problem}")
        finally:
            entry.task = None
            if entry.cancelled.is_set() and not entry.is_over:
                self._finish(entry, Finish("cancelled", 0, 0))
        if trouble is not None:
            self._on_trouble(trouble)
        self._start()

    def _told(self, entry: Entry, told: Sequence[Told]) -> None:
        tokens = tuple(each.token for each in told)
        self._journal.tokens(entry.ask.id, tokens)  # before anybody is told
        start, now = len(entry.told), time.monotonic()
        entry.told += tokens
        entry.stalls = 0
        for number, each in enumerate(told, start):
            behind = len(entry.ask.prompt) + number
            is_as_planned = is_plain_step(number - entry.before, behind, self._patience.behind)
            self.speed.token(now, each.spent, is_alone=is_as_planned and self.under_way == 1)
        self._tell(entry, Tokens(entry.ask.id, start, tokens))

    def _failed(self, entry: Entry, problem: RingFailed) -> Trouble | None:
        """Why the ring is to be made anew, None when it need not be."""
        has_begun = entry.signs.prefilled > 0 or bool(entry.told) or problem.culprit is not None
        entry.failures, what = after_failure(entry.failures, problem.reason, len(entry.told), has_begun=has_begun)
        if what == "give up":
            self._fail(entry, str(problem))
        return Trouble(str(problem), culprit=problem.culprit) if what == "anew" else None

    def _look_for_stuck(self, now: float) -> None:
        running = [entry for entry in self._entries.values() if entry.task is not None]
        reading = sum(len(e.ask.prompt) + len(e.told) - e.signs.prefilled for e in running if not e.signs.told)
        for entry in running:
            patience = self._patience.seconds(self._step_seconds, max(reading, 0), len(running), entry.stalls)
            if now - entry.signs.last_heard > patience:
                entry.stalls += 1
                self._on_trouble(
                    Trouble(f"the ring was silent for {now - entry.signs.last_heard:.0f} s", is_silent=True)
                )
                return

    def _tell(self, entry: Entry, message: msgspec.Struct) -> None:
        if entry.client is None:
            return
        if self._send(entry.client, message):
            entry.listened = time.monotonic()
        else:
            entry.client, entry.listened = None, time.monotonic()

    def _finish(self, entry: Entry, finish: Finish) -> None:
        entry.finish = finish
        self._journal.finish(entry.ask.id, finish)
        self._over(entry)

    def _fail(self, entry: Entry, reason: str) -> None:
        entry.failed = reason
        self._journal.forget(entry.ask.id)
        self._over(entry)

    def _over(self, entry: Entry) -> None:
        entry.ended = time.monotonic()
        self.answered += entry.failed is None
        self._tell_end(entry)
        self._on_busy(self.unfinished)

    def _tell_end(self, entry: Entry) -> None:
        if entry.failed is not None:
            self._tell(entry, AnswerFailed(entry.ask.id, entry.failed[:2000]))
        elif entry.finish is not None:
            self._tell(entry, AnswerDone(entry.ask.id, len(entry.told), entry.finish))

    def _forget(self, entry: Entry) -> None:
        self._journal.forget(entry.ask.id)
        self._entries.pop(entry.ask.id, None)
