"""What goes into a pipeline next, when several answers share it.

Nothing here computes, samples or sends: a Scheduler is asked for work, told when it has come back and which tokens
were chosen. Work comes back in the order in which it went.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np

from homeinfer.engine.edits import KvEdit
from homeinfer.engine.generate import MOST_REPLAYED, makes_room
from homeinfer.engine.memory_slots import Slot, choose_slot
from homeinfer.engine.pipeline import Batch
from homeinfer.engine.request import Finish, FinishReason, Request

_SMALLEST_CHUNK = 32


class Limits(msgspec.Struct, frozen=True):
    """What a pipeline can take. chunk: tokens of a prompt in one step, 0 for as many as make a pipeline of several
    devices fast. ahead: such steps under way at once; groups: decode steps under way at once. replay: of a resumed
    answer, at most so many tokens that were told go one by one, as they went the first time: with other kernels the
    numbers would be a little different, and so, now and then, would be the tokens that follow."""

    n_seq: int
    n_ctx: int
    n_batch: int
    chunk: int = 0
    ahead: int = 1
    groups: int = 1
    replay: int = MOST_REPLAYED


class Work(msgspec.Struct, frozen=True):
    """One thing to send: edits of the memory or a batch."""

    number: int
    edits: tuple[KvEdit, ...] = ()
    batch: Batch | None = None


class Back(msgspec.Struct, frozen=True):
    """What came back. due: (row of its logits, answer) for which a token is to be chosen. prefilled: (answer, tokens of
    its prompt that are in memory). lost: answers of whose earlier work nothing came back; they are over."""

    due: tuple[tuple[int, int], ...] = ()
    prefilled: tuple[tuple[int, int], ...] = ()
    lost: tuple[int, ...] = ()


class _Answer:
    def __init__(self, key: int, prompt: Sequence[int], request: Request, can_shift: bool, shifted: int) -> None:
        self.key = key
        self.prompt = prompt
        self.request = request
        self.can_shift = can_shift
        self.shifted = shifted
        self.written = request.resumed
        self.edits: tuple[KvEdit, ...] = ()
        self.kept = self.sent = self.prefilled = self.chunk = 0
        self.replayed = len(prompt)
        """From here on the prompt's tokens go one by one."""
        self.token: int | None = None


class _UnderWay(msgspec.Struct, frozen=True):
    """slots: those touched, with their epochs then. rows: the answers whose logits are wanted, in order. prefills: the
    answer whose prompt this is a part of, and how many tokens of it. group: decode steps that count as one."""

    kind: Literal["edit", "prefill", "decode"]
    slots: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = ()
    prefills: tuple[int, int] = (-1, 0)
    group: int = 0


class Scheduler:
    """Answers that wait, run and end on the sequences of one pipeline."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.groups = limits.groups
        """Decode steps under way at once; may be changed at any time."""
        self._slots = [Slot(i) for i in range(limits.n_seq)]
        self._waiting: deque[_Answer] = deque()
        self._running: dict[int, tuple[_Answer, Slot]] = {}
        self._under_way: dict[int, _UnderWay] = {}
        self._held: deque[list[int]] = deque()
        """Sequences of the present group whose step has not gone yet: a step takes neighbouring ones only."""
        self._number = self._clock = self._group = 0

    def ask(self, key: int, prompt: Sequence[int], request: Request, *, can_shift: bool, shifted: int = 0) -> None:
        """A new answer. prompt: what is to be in the context (generate.resumed_context); shifted: tokens that left it
        already. can_shift: whether the memory can be edited in part."""
        self._waiting.append(_Answer(key, prompt, request, can_shift, shifted))

    def forget(self) -> None:
        """Somebody else changed the memory: what is in it is not known."""
        for slot in self._slots:
            slot.is_stale = True

    def has_work(self) -> bool:
        """Whether `next` would give some."""
        if self._waiting and len(self._running) < len(self._slots):
            return True
        answers = [answer for answer, _ in self._running.values()]
        return bool(
            any(answer.edits for answer in answers)
            or (
                (self._held or self._groups_under_way() < self.groups)
                and any(answer.token is not None for answer in answers)
            )
            or (self._count("prefill") < self._limits.ahead and any(a.sent < len(a.prompt) for a in answers))
        )

    def next(self) -> Work | None:
        """What to send now, None when there is nothing, or enough is under way."""
        self._admit()
        return self._edit() or self._decode() or self._prefill()

    def back(self, number: int) -> Back:
        """Work that has come back; nothing for a number that is not under way."""
        if number not in self._under_way:
            return Back()
        lost = self._drop_before(number)
        done = self._under_way.pop(number)
        return Back(self._due(done), self._prefilled(done), lost)

    def failed(self, number: int) -> tuple[int, ...]:
        """Work that could not be done: the answers that are over by it."""
        if number not in self._under_way:
            return ()
        lost = self._drop_before(number)
        return (*lost, *self._spoil(self._under_way.pop(number)))

    def is_due(self, key: int) -> FinishReason | None:
        """Why an answer takes no further token, or None."""
        answer, _ = self._running[key]
        return "length" if answer.written >= answer.request.limit else None

    def chosen(self, key: int, token: int) -> FinishReason | None:
        """The next token of an answer, to be sent when there is room; or why the answer ends with it."""
        answer, slot = self._running[key]
        answer.written += 1
        if answer.written >= answer.request.limit:
            return "length"
        if len(slot.cached) >= self._limits.n_ctx:
            if not makes_room(answer.request, self._limits.n_ctx, answer.can_shift):
                return "length"
            answer.edits, leave = slot.shift(answer.request.keep)
            answer.shifted += leave
        answer.token = token
        return None

    @property
    def decoding(self) -> int:
        """Answers whose prompt is in memory, or on its way."""
        return sum(answer.sent == len(answer.prompt) for answer, _ in self._running.values())

    @property
    def is_calm(self) -> bool:
        """Whether no prompts are under way."""
        return self.decoding == len(self._running) and not self._count("prefill")

    def end(self, key: int, reason: FinishReason) -> Finish | None:
        """An answer is over, whatever of it is under way; None for one that there is not."""
        for answer in self._waiting:
            if answer.key == key:
                self._waiting.remove(answer)
                return Finish(reason, 0, answer.shifted)
        if key not in self._running:
            return None
        answer, slot = self._running.pop(key)
        if answer.edits:
            slot.is_stale = True  # planned, and now never sent
        slot.key = None
        return Finish(reason, answer.kept, answer.shifted)

    def fail(self, key: int) -> None:
        """An answer is over, and its memory is not to be used."""
        if key in self._running:
            self._running[key][1].is_stale = True
        self.end(key, "cancelled")

    def _admit(self) -> None:
        while self._waiting:
            answer = self._waiting[0]
            slot = choose_slot(self._slots, answer.prompt, answer.request)
            if slot is None:
                return
            self._waiting.popleft()
            self._clock += 1
            slot.used, slot.key = self._clock, answer.key
            answer.edits, answer.kept = slot.prepare(answer.prompt, answer.request, answer.can_shift)
            answer.sent = answer.prefilled = answer.kept
            answer.replayed = _replayed(answer, self._limits)
            answer.chunk = chunk_of(answer.replayed - answer.kept, self._limits)
            self._running[answer.key] = answer, slot

    def _edit(self) -> Work | None:
        for answer, slot in self._running.values():
            if answer.edits:
                edits, answer.edits = answer.edits, ()
                return self._launch(_UnderWay("edit", ((slot.sequence, slot.epoch),)), edits=edits)
        return None

    def _decode(self) -> Work | None:
        if not self._held and self._groups_under_way() < self.groups:
            ready = sorted(slot.sequence for answer, slot in self._running.values() if answer.token is not None)
            share = min(math.ceil(self.decoding / self.groups), self._limits.n_batch)
            self._held.extend(longest_first(ready, share))
            self._group += bool(ready)
        while self._held:
            sequences = self._held.popleft()
            answers = [self._running[key] for i in sequences if (key := self._slots[i].key) in self._running]
            ready_ones = [(answer, slot) for answer, slot in answers if answer.token is not None]
            if len(ready_ones) == len(sequences):
                return self._decode_step(ready_ones)
            self._held.extendleft(reversed(neighbours([slot.sequence for _, slot in ready_ones])))
        return None

    def _decode_step(self, ready: list[tuple[_Answer, Slot]]) -> Work:
        batch = Batch(
            tokens=np.array([answer.token for answer, _ in ready], np.int32),
            positions=np.array([len(slot.cached) for _, slot in ready], np.int32),
            sequences=np.array([slot.sequence for _, slot in ready], np.int32),
            wanted=np.ones(len(ready), np.bool_),
        )
        for answer, slot in ready:
            slot.append([answer.token or 0])
            answer.token = None
        touched = tuple((slot.sequence, slot.epoch) for _, slot in ready)
        keys = tuple(answer.key for answer, _ in ready)
        return self._launch(_UnderWay("decode", touched, keys, group=self._group), batch=batch)

    def _groups_under_way(self) -> int:
        return len({what.group for what in self._under_way.values() if what.kind == "decode"})

    def _prefill(self) -> Work | None:
        if self._count("prefill") >= self._limits.ahead:
            return None
        for answer, slot in self._running.values():
            if answer.sent < len(answer.prompt):
                tokens = _next_part(answer)
                answer.sent += len(tokens)
                is_end = answer.sent == len(answer.prompt)
                batch = Batch.of(tokens, len(slot.cached), slot.sequence, last_only=is_end)
                slot.append(tokens)
                rows = (answer.key,) if is_end else ()
                touched, part = ((slot.sequence, slot.epoch),), (answer.key, len(tokens))
                return self._launch(_UnderWay("prefill", touched, rows, part), batch=batch)
        return None

    def _launch(self, what: _UnderWay, edits: tuple[KvEdit, ...] = (), batch: Batch | None = None) -> Work:
        self._number += 1
        self._under_way[self._number] = what
        return Work(self._number, edits, batch)

    def _count(self, kind: str) -> int:
        return sum(what.kind == kind for what in self._under_way.values())

    def _due(self, done: _UnderWay) -> tuple[tuple[int, int], ...]:
        return tuple((row, key) for row, key in enumerate(done.rows) if key in self._running)

    def _prefilled(self, done: _UnderWay) -> tuple[tuple[int, int], ...]:
        key, tokens = done.prefills
        if key not in self._running:
            return ()
        answer, _ = self._running[key]
        answer.prefilled += tokens
        return ((key, answer.prefilled),)

    def _drop_before(self, number: int) -> tuple[int, ...]:
        lost = [older for older in self._under_way if older < number]
        return tuple(key for older in lost for key in self._spoil(self._under_way.pop(older)))

    def _spoil(self, what: _UnderWay) -> Iterator[int]:
        """The slots that this work touched hold nobody knows what; the answers that have them now are over."""
        for sequence, epoch in what.slots:
            slot = self._slots[sequence]
            if slot.epoch == epoch:
                slot.is_stale = True
                if slot.key is not None:
                    yield slot.key
                    self.end(slot.key, "cancelled")


def _replayed(answer: _Answer, limits: Limits) -> int:
    """Where the tokens begin that go one by one. A context that was shifted is not to be had again that way."""
    n, resumed = len(answer.prompt), answer.request.resumed
    return n - resumed if resumed <= limits.replay and not answer.shifted else n


def _next_part(answer: _Answer) -> Sequence[int]:
    """The tokens of the prompt that go next, together."""
    begin, last = answer.sent, answer.replayed
    return answer.prompt[begin : min(begin + answer.chunk, last) if begin < last else begin + 1]


def neighbours(sequences: Sequence[int]) -> list[list[int]]:
    """Rising numbers, cut where one is left out."""
    runs: list[list[int]] = []
    for number in sequences:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def longest_first(sequences: Sequence[int], most: int) -> list[list[int]]:
    """So many of rising numbers, in as few runs of neighbours as may be."""
    chosen, left = [], most
    for run in sorted(neighbours(sequences), key=len, reverse=True):
        if left:
            chosen.append(run[:left])
            left -= len(chosen[-1])
    return chosen


def chunk_of(tokens: int, limits: Limits) -> int:
    """Tokens of a prompt in one step. Where devices can work at the same time, so few that all soon have some, and so
    many that each step is worth its way: some thirty tokens' time, which makes the square root the best."""
    if limits.chunk or limits.ahead == 1:
        return min(limits.chunk or limits.n_batch, limits.n_batch)
    size = min(_SMALLEST_CHUNK * math.ceil(2 * math.sqrt(max(1, tokens)) / _SMALLEST_CHUNK), limits.n_batch)
    return max(1, math.ceil(tokens / math.ceil(max(1, tokens) / size)))
