"""Which of several memories an answer gets, and what of it serves."""

from __future__ import annotations

import msgspec
import pytest

from homeinfer.engine.edits import Remove
from homeinfer.engine.memory_slots import Slot, choose_slot
from homeinfer.engine.request import Request, Sampling


def request(**others: object) -> Request:
    return msgspec.structs.replace(Request(Sampling(temperature=0), 20), **others)


def slot(sequence: int, cached: list[int], session: str = "", used: int = 0) -> Slot:
    made = Slot(sequence)
    made.append(cached)
    made.session, made.used = session, used
    return made


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (request(session="b"), 2),
        (request(session="c"), 1),
        (request(session="c", fresh=True), 0),
        (request(), 1),
    ],
    ids=["its own", "the one that serves", "none serves", "no session"],
)
def test_a_prompt_gets_the_slot_that_serves_it_best(asked: Request, expected: int) -> None:
    slots = [slot(0, [9] * 9, "a", 1), slot(1, [5, 6, 7, 8], "a", 3), slot(2, [9] * 4, "b", 2)]
    chosen = choose_slot(slots, [5, 6, 7, 8, 9], asked)
    assert chosen is slots[expected]
    for busy in slots:
        busy.key = 1
    assert choose_slot(slots, [5], asked) is None


def test_another_conversation_takes_only_what_saw_nothing_else() -> None:
    its = slot(0, list(range(10, 36)), "a")
    its.prepare([*range(10, 14), *range(16, 36), 9], request(session="a"), True)
    assert its.pure == 4
    edits, kept = its.prepare([*range(10, 14), *range(16, 36), 8], request(session="b"), True)
    assert (edits, kept) == ((Remove(0, 4),), 4)
