"""Which tokens of answers that are timed together count."""

from __future__ import annotations

from homeinfer.cluster.client_bench import since_all_began


def test_tokens_count_from_when_all_answers_have_begun() -> None:
    """The second one's prompt is read behind the first one's, whose tokens are slow meanwhile."""
    first, second = (1.0, 3.0, 5.0, 5.1, 5.2), (4.9, 5.15, 5.25)
    assert since_all_began((first, second)) == ((5.0, 5.1, 5.2), (4.9, 5.15, 5.25))


def test_of_one_answer_every_token_counts() -> None:
    assert since_all_began(((1.0, 2.0, 3.0),)) == ((1.0, 2.0, 3.0),)


def test_an_answer_that_ended_before_another_began_has_none_that_count() -> None:
    assert since_all_began(((1.0, 2.0), (3.0, 4.0))) == ((), (3.0, 4.0))
