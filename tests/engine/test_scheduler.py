"""Several answers on one pipeline, which is a list of tokens for each sequence: each comes out as if it were alone."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.engine.edits import KvEdit, Remove, Shift
from homeinfer.engine.generate import plan_shift, resumed_context
from homeinfer.engine.pipeline import Batch
from homeinfer.engine.request import Finish, Request, Sampling
from homeinfer.engine.scheduler import Limits, Scheduler, Work, chunk_of

END = 3
N_CTX = 40
Cells = list[tuple[int, int]]
"""(position, token) of one sequence."""


def request(limit: int = 20, **others: object) -> Request:
    return msgspec.structs.replace(Request(Sampling(temperature=0), limit, ends=(END,)), **others)


def next_token(context: Sequence[int]) -> int:
    """The language model of these tests: it looks at everything in its memory."""
    return sum((i + 3) * (token + 7) for i, token in enumerate(context)) % 23


def alone(prompt: Sequence[int], asked: Request) -> list[int]:
    """What an answer should be."""
    context, told = list(prompt), list[int]()
    while len(told) < asked.limit:
        token = next_token(context)
        if token in asked.ends:
            break
        told.append(token)
        if len(context) >= N_CTX:
            _, leave = plan_shift(len(context), asked.keep)
            del context[asked.keep : asked.keep + leave]
        context.append(token)
    return told


class Memory:
    """A pipeline's memory, which takes only what continues it."""

    def __init__(self) -> None:
        self.cells: dict[int, Cells] = {}
        self.spoiled: set[int] = set()
        """Sequences that a step which failed has left some windows with, and others without."""

    def edit(self, edits: Sequence[KvEdit]) -> None:
        for edit in edits:
            cells = self.cells.get(edit.sequence, [])
            if edit == Remove(edit.sequence):
                self.spoiled.discard(edit.sequence)
            match edit:
                case Remove(_, start, end):
                    cells = [(p, t) for p, t in cells if not (start <= p and (end < 0 or p < end))]
                case Shift(_, start, end, delta):
                    cells = [(p + delta if start <= p < end else p, t) for p, t in cells]
            self.cells[edit.sequence] = cells

    def forward(self, batch: Batch) -> list[int] | None:
        """The tokens that the wanted rows' logits stand for, None where the step can't be done."""
        touched = set(batch.sequences.tolist())
        steps = np.diff(batch.sequences)
        assert not steps.any() or (steps == 1).all(), "llama.cpp takes neighbouring sequences only"
        if touched & self.spoiled:
            self.spoiled |= touched
            return None
        chosen = []
        rows = zip(batch.tokens.tolist(), batch.positions.tolist(), batch.sequences.tolist(), batch.wanted, strict=True)
        for token, position, sequence, wanted in rows:
            cells = self.cells.setdefault(sequence, [])
            assert sorted(p for p, _ in cells) == list(range(position)), "a hole, or a token at a taken place"
            assert position < N_CTX
            cells.append((position, token))
            if wanted:
                chosen.append(next_token([t for _, t in sorted(cells)]))
        return chosen


class Ring:
    """A scheduler and its pipeline, from which work comes back later, or as a failure. Answers that fail are asked
    again with what they had told."""

    def __init__(self, limits: Limits, seed: int = 0, failing: float = 0.0) -> None:
        self.scheduler = Scheduler(limits)
        self.memory = Memory()
        self.random = random.Random(seed)
        self.failing = failing
        self.under_way: deque[tuple[Work, list[int] | None]] = deque()
        self.told: dict[int, list[int]] = {}
        self.asked: dict[int, tuple[list[int], Request]] = {}
        self.ended: dict[int, Finish] = {}
        self.sent: list[Work] = []
        self.attempts: dict[int, int] = {}
        self._keys = 0

    def ask(self, prompt: Sequence[int], asked: Request) -> int:
        number = len(self.asked)
        self.asked[number], self.told[number] = (list(prompt), asked), []
        self._again(number)
        return number

    def _again(self, number: int) -> None:
        prompt, asked = self.asked[number]
        told = self.told[number]
        asked = msgspec.structs.replace(asked, resumed=len(told))
        context, shifted = resumed_context([*prompt, *told], asked, N_CTX, True)
        self._keys += 1
        self.attempts[self._keys] = number
        self.scheduler.ask(self._keys, context, asked, can_shift=True, shifted=shifted)

    def launch(self) -> bool:
        work = self.scheduler.next()
        if work is None:
            return False
        self.sent.append(work)
        self.memory.edit(work.edits)
        if work.batch is not None and self.random.random() < self.failing:
            self.memory.spoiled.update(work.batch.sequences.tolist())
        self.under_way.append((work, self.memory.forward(work.batch) if work.batch is not None else []))
        return True

    def arrive(self) -> bool:
        if not self.under_way:
            return False
        work, tokens = self.under_way.popleft()
        if tokens is None:
            for key in self.scheduler.failed(work.number):
                self._again(self.attempts.pop(key))
            return True
        for row, key in self.scheduler.back(work.number).due:
            self._choose(key, tokens[row])
        return True

    def _choose(self, key: int, token: int) -> None:
        number = self.attempts[key]
        reason = self.scheduler.is_due(key)
        if reason is None and token in self.asked[number][1].ends:
            reason = "stop"
        elif reason is None:
            self.told[number].append(token)
            reason = self.scheduler.chosen(key, token)
        if reason is not None:
            self._over(key, self.scheduler.end(key, reason))

    def _over(self, key: int, finish: Finish | None) -> None:
        assert finish is not None
        self.ended[self.attempts.pop(key)] = finish

    def cancel(self, number: int) -> None:
        for key, its in list(self.attempts.items()):
            if its == number:
                self._over(key, self.scheduler.end(key, "cancelled"))

    def run(self) -> None:
        """Until all answers are over: sends and arrivals as chance has it."""
        while self.scheduler.has_work() or self.under_way:
            if self.random.random() < 0.5 or not self.launch():
                self.arrive()


limits = st.builds(
    Limits,
    n_seq=st.integers(1, 4),
    n_ctx=st.just(N_CTX),
    n_batch=st.integers(1, 40),
    chunk=st.integers(0, 12),
    ahead=st.integers(1, 5),
    groups=st.integers(1, 3),
    replay=st.sampled_from([0, 5, 1024]),
)
prompts = st.lists(st.integers(4, 9), min_size=1, max_size=N_CTX - 1)
requests = st.builds(
    request,
    st.integers(0, 70),
    keep=st.integers(0, 8),
    fresh=st.booleans(),
    session=st.sampled_from(["", "a", "b"]),
)
asked_for = st.lists(st.tuples(prompts, requests), min_size=1, max_size=6)


@settings(deadline=None)
@given(limits, asked_for, st.integers(0, 1000))
def test_every_answer_is_what_it_would_be_alone(
    its: Limits, questions: list[tuple[list[int], Request]], seed: int
) -> None:
    ring = Ring(its, seed)
    for prompt, asked in questions:
        ring.ask(prompt, asked)
        for _ in range(ring.random.randint(0, 9)):
            ring.launch() or ring.arrive()
    ring.run()
    for number, (prompt, asked) in enumerate(questions):
        assert ring.told[number] == alone(prompt, asked)
        assert ring.ended[number].reason == ("length" if len(ring.told[number]) == asked.limit else "stop")


@settings(deadline=None)
@given(limits, asked_for, st.integers(0, 1000))
def test_answers_that_fail_and_are_asked_again_come_out_the_same(
    its: Limits, questions: list[tuple[list[int], Request]], seed: int
) -> None:
    ring = Ring(its, seed, failing=0.05)
    for prompt, asked in questions:
        ring.ask(prompt, asked)
    ring.run()
    assert [ring.told[number] for number in range(len(questions))] == [alone(*question) for question in questions]


@settings(deadline=None)
@given(limits, asked_for, st.integers(0, 1000), st.data())
def test_stopping_some_answers_leaves_the_others_right(
    its: Limits, questions: list[tuple[list[int], Request]], seed: int, data: st.DataObject
) -> None:
    ring = Ring(its, seed)
    numbers = [ring.ask(prompt, asked) for prompt, asked in questions]
    stopped = data.draw(st.sets(st.sampled_from(numbers)))
    for number in sorted(stopped):
        for _ in range(ring.random.randint(0, 12)):
            ring.launch() or ring.arrive()
        ring.cancel(number)
    ring.run()
    for number, (prompt, asked) in enumerate(questions):
        whole = alone(prompt, asked)
        assert ring.told[number] == (whole[: len(ring.told[number])] if number in stopped else whole)
    assert not ring.scheduler.has_work()


def test_decode_steps_of_all_answers_go_together() -> None:
    ring = Ring(Limits(n_seq=3, n_ctx=N_CTX, n_batch=16))
    for start in (4, 5, 6):
        ring.ask([start] * 3, request(8, ends=()))
    while ring.launch() or ring.arrive():
        pass
    widths = [len(set(w.batch.sequences.tolist())) for w in ring.sent if w.batch is not None]
    assert max(widths) == 3
    assert all(len(told) == 8 for told in ring.told.values())


def test_a_prompts_parts_follow_each_other_and_running_answers_go_on_between_them() -> None:
    ring = Ring(Limits(n_seq=2, n_ctx=N_CTX, n_batch=16, chunk=4, ahead=3))
    first = ring.ask([5, 6], request(30, ends=()))
    while len(ring.told[first]) < 2:
        ring.launch() or ring.arrive()
    ring.ask([7] * 36, request(2))
    before = len(ring.told[first])
    most = 0
    while sum(len(w.batch.tokens) == 4 for w in ring.sent if w.batch is not None) < 9:
        while ring.launch():
            pass
        most = max(most, sum(w.batch is not None and len(w.batch.tokens) == 4 for w, _ in ring.under_way))
        ring.arrive()
    assert most == 3
    assert len(ring.told[first]) >= before + 2


@pytest.mark.parametrize(
    ("replay", "parts"),
    [(8, [8, 8, 8, 1, 1, 1, 1, 1]), (5, [8, 8, 8, 1, 1, 1, 1, 1]), (4, [8, 8, 8, 5]), (0, [8, 8, 8, 5])],
)
def test_what_was_told_goes_one_by_one_as_it_did_the_first_time(replay: int, parts: list[int]) -> None:
    scheduler = Scheduler(Limits(n_seq=1, n_ctx=N_CTX, n_batch=16, chunk=8, ahead=3, replay=replay))
    scheduler.ask(1, [5] * 29, request(resumed=5), can_shift=True)
    sent, ahead, prefilled = list[int](), 0, 0
    while sum(sent) < 29:
        numbers = []
        while (work := scheduler.next()) is not None:
            assert work.batch is not None
            sent.append(len(work.batch.tokens))
            assert work.batch.wanted.any() == (sum(sent) == 29)
            numbers.append(work.number)
        ahead = max(ahead, len(numbers))
        for number in numbers:
            ((_, prefilled),) = scheduler.back(number).prefilled
    assert (sent, ahead, prefilled) == (parts, 3, 29)


def test_the_prompt_before_it_has_the_parts_that_it_had_the_first_time() -> None:
    its = Limits(n_seq=1, n_ctx=1024, n_batch=128, ahead=3)
    for told in (0, 1, 90, 400):
        scheduler = Scheduler(its)
        scheduler.ask(1, [5] * (500 + told), request(resumed=told), can_shift=True)
        work = scheduler.next()
        assert work is not None
        assert work.batch is not None
        assert len(work.batch.tokens) == chunk_of(500, its)


def test_groups_share_the_answers() -> None:
    ring = Ring(Limits(n_seq=4, n_ctx=N_CTX, n_batch=16, groups=2))
    for start in range(4):
        ring.ask([4 + start], request(12, ends=()))
    while ring.launch() or ring.arrive():
        pass
    full = [w for w in ring.sent[12:-8] if w.batch is not None]
    assert {len(w.batch.tokens) for w in full if w.batch is not None} == {2}


def test_a_step_that_did_not_come_back_ends_its_answer_when_a_later_one_does() -> None:
    scheduler = Scheduler(Limits(n_seq=2, n_ctx=N_CTX, n_batch=16, ahead=2))
    for key in (1, 2):
        scheduler.ask(key, [5, 6], request(), can_shift=True)
    first, second = scheduler.next(), scheduler.next()
    assert first is not None
    assert second is not None
    back = scheduler.back(second.number)
    assert (back.lost, back.due) == ((1,), ((0, 2),))
    assert scheduler.back(first.number).due == ()
    assert scheduler.back(second.number).due == ()


@pytest.mark.parametrize(("tokens", "ahead", "expected"), [(2048, 4, 94), (512, 4, 64), (20, 4, 20), (2048, 1, 512)])
def test_prompts_are_cut_so_that_all_devices_work(tokens: int, ahead: int, expected: int) -> None:
    assert chunk_of(tokens, Limits(n_seq=1, n_ctx=4096, n_batch=512, ahead=ahead)) == expected
