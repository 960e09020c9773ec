"""A client of a cluster, against a coordinator that does what a test wants, on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster import client
from homeinfer.cluster.client import ClusterClient, ClusterTeller, find_cluster
from homeinfer.cluster.client_telling import Telling
from homeinfer.cluster.wire.client import (
    AnswerDone,
    AnswerFailed,
    AskAnswer,
    CancelAnswer,
    Done,
    FromClient,
    Notice,
    Order,
    Resume,
    Tokens,
    Unknown,
)
from homeinfer.engine.request import Finish, Request, Sampling
from homeinfer.errors import HomeinferError
from tests.support.processes import wait_until
from tests.support.scripted_coordinator import Script, ScriptedCoordinator, ready_status

REQUEST = Request(Sampling(temperature=0), limit=8)
PROMPT = (5, 6, 7)
ANSWER = (11, 12, 13, 14)
STOP = Finish("stop", 0, 0)
Heads = Callable[[Script], ScriptedCoordinator]


@pytest.fixture
def short_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of silence only: on a busy machine it is silent for moments anyway, and clients then ask again."""
    monkeypatch.setattr(client, "QUIET_SECONDS", 0.2)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is taken for gone whose process is there."""
    monkeypatch.setattr(client, "QUIET_SECONDS", 30.0)
    monkeypatch.setattr(client, "LOST_SECONDS", 30.0)


@pytest.fixture
def heads(temp_folder: Path) -> Iterator[Heads]:
    made: list[ScriptedCoordinator] = []

    def make(script: Script) -> ScriptedCoordinator:
        head = ScriptedCoordinator(temp_folder, ready_status(temp_folder / "model.gguf"), script)
        head.start()
        made.append(head)
        return head

    yield make
    for head in made:
        head.close()


def told(
    folder: Path, head: ScriptedCoordinator, cancelled: Callable[[], bool] = lambda: False
) -> tuple[Finish, list[int]]:
    tokens: list[int] = []
    with closing(ClusterTeller(folder, head.status)) as teller:
        finish = teller.tell(PROMPT, REQUEST, tokens.append, cancelled)
    return finish, tokens


def whole(message: FromClient) -> Sequence[msgspec.Struct]:
    if not isinstance(message, AskAnswer):
        return []
    return [Tokens(message.id, 0, ANSWER[:1]), Tokens(message.id, 1, ANSWER[1:]), AnswerDone(message.id, 4, STOP)]


def test_where_no_cluster_runs_none_is_found(temp_folder: Path) -> None:
    assert find_cluster(temp_folder) is None


def test_a_note_that_a_killed_coordinator_left_is_no_cluster(temp_folder: Path, heads: Heads) -> None:
    head = heads(whole)
    head.stop(leaves_note=True)
    note = temp_folder / "run" / "cluster.json"
    note.write_bytes(note.read_bytes().replace(b'"began":', b'"began":1'))
    assert find_cluster(temp_folder) is None


def test_a_running_cluster_is_found_and_says_how_it_is(temp_folder: Path, heads: Heads) -> None:
    head = heads(whole)
    found = find_cluster(temp_folder)
    assert found is not None
    with closing(found):
        assert found.status() == head.status
        assert found.plan() is None


def test_an_order_that_can_not_be_followed_says_why(temp_folder: Path, heads: Heads) -> None:
    heads(lambda message: [Done("no device named attic" if message == Order("forget", "attic") else None)])
    with closing(ClusterClient(temp_folder)) as asking:
        asking.order("code")
        with pytest.raises(HomeinferError, match="no device named attic"):
            asking.order("forget", "attic")


def test_a_cluster_that_went_away_is_one_line(temp_folder: Path, heads: Heads) -> None:
    head = heads(whole)
    with closing(ClusterClient(temp_folder)) as asking:
        asking.status()
        head.stop()
        with pytest.raises(HomeinferError, match="the cluster on this machine is gone"):
            asking.status()


def test_an_answer_is_told_token_by_token(temp_folder: Path, heads: Heads) -> None:
    head = heads(whole)
    assert told(temp_folder, head) == (STOP, list(ANSWER))
    (ask,) = [message for message in head.heard if isinstance(message, AskAnswer)]
    assert ask.prompt == PROMPT
    assert ask.request == REQUEST


def test_answers_of_one_conversation_share_a_session(temp_folder: Path, heads: Heads) -> None:
    head = heads(whole)
    with closing(ClusterTeller(temp_folder, head.status)) as teller:
        for _ in range(2):
            teller.tell(PROMPT, REQUEST, lambda _token: None, lambda: False)
    first, second = [message for message in head.heard if isinstance(message, AskAnswer)]
    assert first.session == second.session
    assert first.id != second.id


def test_tokens_that_are_told_twice_count_once(temp_folder: Path, heads: Heads) -> None:
    def again(message: FromClient) -> Sequence[msgspec.Struct]:
        if not isinstance(message, AskAnswer):
            return []
        pieces = [
            Tokens(message.id, 0, ANSWER[:2]),
            Tokens(message.id, 0, ANSWER[:3]),
            Tokens(message.id, 3, ANSWER[3:]),
        ]
        return [*pieces, AnswerDone(message.id, 4, STOP)]

    assert told(temp_folder, heads(again)) == (STOP, list(ANSWER))


def test_tokens_that_are_missing_are_asked_for(temp_folder: Path, heads: Heads) -> None:
    def gap(message: FromClient) -> Sequence[msgspec.Struct]:
        if isinstance(message, AskAnswer):
            return [Tokens(message.id, 0, ANSWER[:1]), Tokens(message.id, 2, ANSWER[2:])]
        if isinstance(message, Resume):
            return [Tokens(message.id, message.have, ANSWER[message.have :]), AnswerDone(message.id, 4, STOP)]
        return []

    head = heads(gap)
    assert told(temp_folder, head) == (STOP, list(ANSWER))
    assert [message.have for message in head.heard if isinstance(message, Resume)] == [1]


def test_messages_about_other_answers_change_nothing(temp_folder: Path, heads: Heads) -> None:
    def mixed(message: FromClient) -> Sequence[msgspec.Struct]:
        return [Tokens("0" * 32, 0, (99,)), AnswerDone("0" * 32, 1, STOP), *whole(message)]

    assert told(temp_folder, heads(mixed)) == (STOP, list(ANSWER))


def test_what_the_cluster_says_in_the_middle_is_passed_on(temp_folder: Path, heads: Heads) -> None:
    head = heads(lambda message: [Notice("laptop left"), *whole(message)])
    said: list[str] = []
    with closing(ClusterTeller(temp_folder, head.status, said.append)) as teller:
        teller.tell(PROMPT, REQUEST, lambda _token: None, lambda: False)
    assert said == ["laptop left"]


def test_an_answer_that_can_not_be_written_is_one_line(temp_folder: Path, heads: Heads) -> None:
    head = heads(
        lambda message: [AnswerFailed(message.id, "no device has room")] if isinstance(message, AskAnswer) else []
    )
    with pytest.raises(HomeinferError, match="no device has room"):
        told(temp_folder, head)


def test_cancelling_is_passed_on_once(temp_folder: Path, heads: Heads) -> None:
    def slow(message: FromClient) -> Sequence[msgspec.Struct]:
        if isinstance(message, AskAnswer):
            return [Tokens(message.id, 0, ANSWER[:2])]
        if isinstance(message, CancelAnswer):
            return [AnswerDone(message.id, 2, Finish("cancelled", 0, 0))]
        return []

    head = heads(slow)
    finish, tokens = told(temp_folder, head, cancelled=lambda: any(isinstance(m, AskAnswer) for m in head.heard))
    assert finish.reason == "cancelled"
    assert len([message for message in head.heard if isinstance(message, CancelAnswer)]) == 1
    assert tokens in ([], list(ANSWER[:2]))


def test_an_answer_that_is_interrupted_is_cancelled_at_the_cluster(temp_folder: Path, heads: Heads) -> None:
    head = heads(lambda message: [Tokens(message.id, 0, ANSWER[:1])] if isinstance(message, AskAnswer) else [])

    def interrupt(_token: int) -> None:
        raise KeyboardInterrupt

    with closing(ClusterTeller(temp_folder, head.status)) as teller, pytest.raises(KeyboardInterrupt):
        teller.tell(PROMPT, REQUEST, interrupt, lambda: False)
    wait_until(lambda: any(isinstance(message, CancelAnswer) for message in head.heard))


def test_a_question_to_a_head_that_has_gone_meanwhile_is_said_to_wait(
    temp_folder: Path, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homeinfer.cluster.client.DOWN_SECONDS", 0.5)
    head = heads(whole)
    said: list[str] = []
    with closing(ClusterTeller(temp_folder, head.status, said.append)) as teller:
        head.stop()
        with pytest.raises(HomeinferError, match="the cluster was taken down"):
            teller.tell(PROMPT, REQUEST, lambda _token: None, lambda: False)
    assert said == ["the cluster's head does not answer: waiting for it to come back"]


@pytest.mark.usefixtures("short_silences")
def test_an_answer_goes_on_after_the_coordinator_was_started_again(temp_folder: Path, heads: Heads) -> None:
    def begins(message: FromClient) -> Sequence[msgspec.Struct]:
        if isinstance(message, AskAnswer):
            return [Tokens(message.id, 0, ANSWER[:2])]
        if isinstance(message, Resume) and came_back.is_set():
            return [Tokens(message.id, message.have, ANSWER[message.have :]), AnswerDone(message.id, 4, STOP)]
        return []

    came_back = threading.Event()
    head = heads(begins)
    tokens: list[int] = []
    said: list[str] = []

    def on_token(token: int) -> None:
        tokens.append(token)
        if len(tokens) == 2:
            head.stop()

    def on_notice(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            came_back.set()
            head.start()

    with closing(ClusterTeller(temp_folder, head.status, on_notice)) as teller:
        assert teller.tell(PROMPT, REQUEST, on_token, lambda: False) == STOP
    assert tokens == list(ANSWER)
    assert len(said) == 2
    assert "does not answer" in said[0]
    assert "is back" in said[1]


@pytest.mark.usefixtures("short_silences")
def test_an_answer_that_the_coordinator_does_not_know_any_more_is_asked_again(temp_folder: Path, heads: Heads) -> None:
    asked: list[AskAnswer] = []

    def forgetful(message: FromClient) -> Sequence[msgspec.Struct]:
        if isinstance(message, Resume):
            return [Unknown(message.id)]
        if isinstance(message, AskAnswer):
            asked.append(message)
            return whole(message) if len(asked) > 1 else [Tokens(message.id, 0, ANSWER[:2])]
        return []

    assert told(temp_folder, heads(forgetful)) == (STOP, list(ANSWER))
    assert len(asked) >= 2  # on a busy machine more than one silence may pass meanwhile


@pytest.mark.usefixtures("short_silences")
def test_a_user_who_stops_does_not_wait_for_a_coordinator_that_is_gone(temp_folder: Path, heads: Heads) -> None:
    head = heads(lambda message: [Tokens(message.id, 0, ANSWER[:1])] if isinstance(message, AskAnswer) else [])
    is_gone = threading.Event()

    def on_token(_token: int) -> None:
        head.stop()
        is_gone.set()

    with closing(ClusterTeller(temp_folder, head.status)) as teller:
        assert teller.tell(PROMPT, REQUEST, on_token, is_gone.is_set).reason == "cancelled"


def test_a_telling_never_counts_a_token_twice_in_whatever_pieces_it_comes() -> None:
    for first in range(5):
        for second in range(first + 1):
            telling = Telling("0" * 32, PROMPT, REQUEST)
            one = telling.take(Tokens(telling.id, 0, ANSWER[:first]))
            two = telling.take(Tokens(telling.id, second, ANSWER[second:]))
            assert one.tokens + two.tokens == ANSWER
