"""Who is asked for what: every tensor comes whole and right as long as somebody honest has it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.cluster.weights.messages import PIECE_BYTES
from homeinfer.cluster.weights.schedule import SLOW_SECONDS, Piece, Schedule, Wanted


def take_all(schedule: Schedule, source: str, now: float = 0.0) -> list[Piece]:
    pieces = []
    while (piece := schedule.next(source, now)) is not None:
        pieces.append(piece)
    return pieces


def give(schedule: Schedule, source: str, piece: Piece) -> bool:
    return schedule.take(source, piece) and schedule.arrived(source, piece)


def test_a_tensor_is_asked_for_in_pieces_and_once() -> None:
    schedule = Schedule([Wanted(4, 2 * PIECE_BYTES + 10)], {"a": [4], "b": [4]})
    pieces = take_all(schedule, "a")
    assert pieces == [Piece(4, 0, PIECE_BYTES), Piece(4, PIECE_BYTES, PIECE_BYTES), Piece(4, 2 * PIECE_BYTES, 10)]
    assert take_all(schedule, "b") == []
    assert [give(schedule, "a", piece) for piece in pieces] == [False, False, True]
    schedule.right(4)
    assert schedule.is_done


def test_pieces_of_an_earlier_run_are_not_asked_for() -> None:
    schedule = Schedule([Wanted(0, 3 * PIECE_BYTES, frozenset({0, 2})), Wanted(1, 5, frozenset({0}))], {"a": [0, 1]})
    assert take_all(schedule, "a") == [Piece(0, PIECE_BYTES, PIECE_BYTES)]
    assert schedule.whole() == (1,)


def test_rare_tensors_come_first_and_sources_take_different_ones() -> None:
    schedule = Schedule([Wanted(n, 10) for n in range(4)], {"a": [0, 1, 2, 3], "b": [0, 1]})
    first = schedule.next("a", 0)
    second = schedule.next("b", 0)
    assert first is not None
    assert second is not None
    assert (first.tensor, second.tensor) == (2, 0)


def test_what_a_silent_source_was_asked_for_is_asked_of_another() -> None:
    schedule = Schedule([Wanted(0, 4 * PIECE_BYTES)], {"a": [0], "b": [0]})
    first = schedule.next("a", 0)
    assert first is not None
    give(schedule, "a", first)
    take_all(schedule, "a")
    schedule.drop("a")
    assert sorted(piece.offset for piece in take_all(schedule, "b")) == [n * PIECE_BYTES for n in (1, 2, 3)]


def test_a_late_piece_is_asked_of_another_and_only_the_first_answer_is_written() -> None:
    schedule = Schedule([Wanted(0, PIECE_BYTES)], {"a": [0], "b": [0]})
    piece = schedule.next("a", 0)
    assert schedule.next("b", SLOW_SECONDS / 2) is None
    assert schedule.next("b", SLOW_SECONDS) == piece
    assert piece is not None
    assert give(schedule, "b", piece)
    assert not schedule.take("a", piece)


def test_a_wrong_digest_names_the_only_giver() -> None:
    schedule = Schedule([Wanted(0, 10)], {"a": [0], "b": [0]})
    piece = schedule.next("a", 0)
    assert piece is not None
    assert give(schedule, "a", piece)
    assert schedule.wrong(0) == "a"
    schedule.drop_for_good("a")
    assert schedule.next("a", 0) is None
    assert schedule.next("b", 0) == piece


def test_a_wrong_tensor_of_several_givers_comes_again_from_one_alone() -> None:
    schedule = Schedule([Wanted(0, 2 * PIECE_BYTES)], {"a": [0], "b": [0]})
    one, two = schedule.next("a", 0), schedule.next("b", 0)
    assert one is not None
    assert two is not None
    assert [give(schedule, "a", one), give(schedule, "b", two)] == [False, True]
    assert schedule.wrong(0) is None
    assert len(take_all(schedule, "b")) == 2
    assert take_all(schedule, "a", now=100.0) == []
    schedule.drop("b")
    assert len(take_all(schedule, "a")) == 2


def test_tensors_that_nobody_has_are_named() -> None:
    schedule = Schedule([Wanted(0, 10), Wanted(1, 10)], {"a": [0, 1], "b": [1]})
    piece = schedule.next("a", 0)
    assert piece == Piece(0, 0, 10)
    schedule.refused("a", piece)
    assert schedule.nobody_has() == (0,)
    assert schedule.serves("a")


@given(st.integers(0, 1 << 32), st.sets(st.sampled_from("abcd"), max_size=3))
@settings(max_examples=60, deadline=None)
def test_with_one_honest_source_everything_comes_right_whatever_the_others_do(seed: int, liars: set[str]) -> None:
    """Sources answer in any order, fall silent, and lie now and then; no step count beyond what a fetch may take."""
    chance = random.Random(seed)
    sizes = {n: chance.randint(0, 5 * PIECE_BYTES) for n in range(8)}
    sources = {name: [n for n in sizes if name == "e" or chance.random() < 0.7] for name in "abcde"}
    schedule = Schedule([Wanted(n, nbytes) for n, nbytes in sizes.items()], sources)
    asked: dict[str, list[Piece]] = {name: [] for name in sources}
    written: dict[tuple[int, int], bool] = {}
    for n in schedule.whole():
        schedule.right(n)
    named: set[str] = set()
    for step in range(4000):
        if schedule.is_done:
            break
        name = chance.choice(sorted(set(sources) - named))
        piece = schedule.next(name, step * 0.05)
        if piece is not None:
            asked[name].append(piece)
        if chance.random() < 0.02:
            schedule.drop(name)
            asked[name] = []
        if asked[name] and chance.random() < 0.8:
            came = asked[name].pop(chance.randrange(len(asked[name])))
            if not schedule.take(name, came):
                continue
            written[came.tensor, came.offset] = name not in liars or chance.random() < 0.5
            if schedule.arrived(name, came):
                right = all(written[came.tensor, at] for at in range(0, sizes[came.tensor], PIECE_BYTES))
                liar = None if right else schedule.wrong(came.tensor)
                if right:
                    schedule.right(came.tensor)
                if liar is not None:
                    assert liar in liars
                    named.add(liar)
                    schedule.drop_for_good(liar)
    assert schedule.is_done
