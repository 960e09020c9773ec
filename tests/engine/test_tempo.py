"""The faster number of decode steps is found, and found again."""

from __future__ import annotations

import pytest

from homeinfer.engine.tempo import Tempo


def run(tempo: Tempo, seconds: dict[int, float], tokens: int, answers: int = 8, now: float = 0.0) -> list[int]:
    """How many steps were under way at each token; seconds a token takes then."""
    ways = []
    for _ in range(tokens):
        now += seconds[tempo.groups]
        ways.append(tempo.chosen(now, answers))
    return ways


@pytest.mark.parametrize(("seconds", "faster"), [({1: 0.01, 3: 0.04}, 1), ({1: 0.03, 3: 0.01}, 3)])
def test_the_faster_way_is_taken_after_both_were_tried(seconds: dict[int, float], faster: int) -> None:
    ways = run(Tempo(3), seconds, 1000)
    assert set(ways[:112]) == {1, 3}
    assert set(ways[120:]) == {faster}


def test_a_change_is_noticed_in_time() -> None:
    tempo = Tempo(3)
    run(tempo, {1: 0.01, 3: 0.04}, 1000)
    ways = run(tempo, {1: 0.05, 3: 0.01}, 6000, now=100.0)
    assert set(ways[4000:]) == {3} or ways[-1] == 3


def test_one_answer_needs_no_trial() -> None:
    assert set(run(Tempo(3), {1: 0.01, 3: 0.01}, 200, answers=1)) == {1}


def test_what_is_known_of_eight_answers_serves_for_six() -> None:
    tempo = Tempo(3)
    run(tempo, {1: 0.03, 3: 0.01}, 400)
    assert set(run(tempo, {1: 0.03, 3: 0.01}, 200, answers=6, now=50.0)) == {3}


def test_prompts_in_between_do_not_count() -> None:
    tempo = Tempo(2)
    for _ in range(500):
        tempo.chosen(0.0, 4, is_calm=False)
    assert tempo.groups == 1
