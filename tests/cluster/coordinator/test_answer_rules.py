"""How answers that were interrupted go on, and what of them is on disk."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from homeinfer.cluster.coordinator.answer_rules import Failures, Patience, after_failure, again, is_whole
from homeinfer.cluster.coordinator.journal import Journal
from homeinfer.cluster.coordinator.speed import Rate, Speed
from homeinfer.cluster.wire.client import AskAnswer
from homeinfer.cluster.wire.messages import Spent
from homeinfer.engine.request import Finish, Request, Sampling

REQUEST = Request(Sampling(temperature=0), 5)
ASK = AskAnswer("a" * 32, "b" * 32, (1, 2, 3), REQUEST)


def test_what_was_told_is_asked_for_as_a_part_of_the_answer() -> None:
    prompt, request = again(ASK.prompt, [7, 8], REQUEST, "talk")
    assert prompt == (1, 2, 3, 7, 8)
    assert (request.resumed, request.session, request.limit) == (2, "talk", 5)


def test_an_answer_of_as_many_tokens_as_were_wanted_is_whole() -> None:
    assert is_whole([1] * 5, REQUEST)
    assert not is_whole([1] * 4, REQUEST)


def test_a_failure_is_tried_again_then_with_a_new_ring_then_given_up() -> None:
    failures, said = Failures(), []
    for _ in range(3):
        failures, what = after_failure(failures, "llama_decode failed", 4, has_begun=True)
        said.append(what)
    assert said == ["again", "anew", "give up"]


def test_tokens_between_failures_make_them_the_first_again() -> None:
    failures, said = Failures(), []
    for told in (3, 3, 9, 9):
        failures, what = after_failure(failures, "x", told, has_begun=True)
        said.append(what)
    assert said == ["again", "anew", "again", "anew"]


def test_a_request_that_fails_before_anything_was_computed_disturbs_nobody_else() -> None:
    failures, first = after_failure(Failures(), "the grammar can't be read", 0, has_begun=False)
    _, second = after_failure(failures, "the grammar can't be read", 0, has_begun=False)
    assert (first, second) == ("again", "give up")


def test_patience_follows_the_prediction_the_prompts_and_earlier_stalls() -> None:
    fast, slow = Patience(5.0, 1.0), Patience(2000.0, 100.0)
    assert fast.seconds(10, 0, 1, 0) == 10
    assert slow.seconds(10, 0, 1, 0) == 40
    assert slow.seconds(10, 0, 3, 0) == 120
    assert fast.seconds(10, 4000, 1, 0) == pytest.approx(80.1)
    assert fast.seconds(10, 0, 1, 2) == 40
    assert slow.seconds(10, 100_000, 8, 5) == 300


def test_a_journal_tells_after_a_crash_what_was_told_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers")
    journal.begin(ASK)
    for token in (5, 6):
        journal.tokens(ASK.id, (token,))
    (kept,) = Journal(tmp_path / "answers").load()  # the first one was not closed
    assert (kept.ask, kept.told, kept.finish) == (ASK, (5, 6), None)


def test_a_line_that_was_cut_off_counts_for_nothing_and_the_journal_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(ASK)
    journal.tokens(ASK.id, (5,))
    journal.close_all()
    (path,) = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(b"12")
    again_opened = Journal(tmp_path)
    assert again_opened.load()[0].told == (5,)
    again_opened.tokens(ASK.id, (1299, 7))
    again_opened.finish(ASK.id, Finish("length", 0, 0))
    (kept,) = Journal(tmp_path).load()
    assert (kept.told, kept.finish) == ((5, 1299, 7), Finish("length", 0, 0))


def test_damaged_journals_are_removed_and_nobody_else_may_read_them(tmp_path: Path) -> None:
    (tmp_path / f"{'c' * 32}.answer").write_bytes(b"no journal\n")
    journal = Journal(tmp_path)
    journal.begin(ASK)
    assert [kept.ask for kept in journal.load()] == [ASK]
    (path,) = tmp_path.iterdir()
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600
        assert tmp_path.stat().st_mode & 0o777 == 0o700
    journal.forget(ASK.id)
    assert not list(tmp_path.iterdir())


def test_speed_counts_tokens_and_shares_of_the_last_seconds() -> None:
    speed = Speed()
    for i in range(11):
        speed.token(i / 10, (Spent(50_000, 60_000), Spent(10_000, 20_000)))
    assert speed.tokens_per_s(1.0) == pytest.approx(10)
    assert speed.shares(1.0, [0]) == pytest.approx((0.55, 0.66))
    assert speed.tokens_per_s(9.0) == 0


def test_a_rate_begins_anew_with_its_sum() -> None:
    rate = Rate()
    rate.see(0, 1000)
    rate.see(2, 5000)
    assert rate.per_s == 2000
    rate.see(3, 100)
    assert rate.per_s == 0


def test_a_disk_that_takes_only_a_part_of_a_token_is_full(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(ASK)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (path,) = tmp_path.iterdir()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 2, before[1]))
        with pytest.raises(OSError, match="No space left"):
            journal.tokens(ASK.id, (12345,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    journal.close_all()
    assert Journal(tmp_path).load()[0].told == ()
