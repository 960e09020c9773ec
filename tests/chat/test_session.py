from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeinfer.chat.session import (
    AnswerFailed,
    Conversation,
    Session,
    fit,
    load_conversation,
    reserve,
    save_conversation,
    without_oldest,
)
from homeinfer.chat.template import ChatMessage, ChatTemplate
from homeinfer.cli.default_model import default_model
from homeinfer.cluster.local import RingOptions, start_local_ring
from homeinfer.engine.answers import Generator
from homeinfer.engine.edits import Remove
from homeinfer.engine.request import Sampling
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header
from tests.support.processes import engines

N_CTX = 96
GREEDY = Sampling(temperature=0)
ENDLESS = Sampling(temperature=0, grammar='root ::= "on and " root')
LONG = 100_000
"""An ENDLESS answer is still being written when a test that was held up comes to stop it."""


class Model:
    """The embedded model, loaded; sessions of it have an empty memory."""

    def __init__(self) -> None:
        self.header: Header = read_header(default_model())
        self.tokenizer = Tokenizer(self.header.files[0].path)
        self.pipeline = start_local_ring(self.header, RingOptions(n_ctx=N_CTX, n_threads=1))
        self.template = ChatTemplate(self.header, self.tokenizer)

    def session(self, sampling: Sampling = GREEDY, limit: int = 6, system: str | None = None) -> Session:
        self.pipeline.edit((Remove(0),))
        generator = Generator(self.pipeline, self.tokenizer)
        return Session("small", self.template, generator, sampling, limit=limit, system=system)

    def close(self) -> None:
        self.pipeline.close()
        self.tokenizer.close()


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    loaded = Model()
    yield loaded
    loaded.close()


def roles(messages: Sequence[ChatMessage]) -> str:
    return "".join(message.role[0] for message in messages)


def conversation(text: str) -> tuple[ChatMessage, ...]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(ChatMessage(names[letter], f"{n}") for n, letter in enumerate(text))  # type: ignore[arg-type]


def test_turns_are_remembered_and_their_memory_reused(model: Model) -> None:
    session = model.session()
    pieces: list[str] = []
    first = session.ask("Hello", pieces.append)
    second = session.ask("And again?")
    assert roles(session.messages) == "uaua"
    assert session.messages[1] == ChatMessage("assistant", first.text)
    assert "".join(pieces) == first.text
    assert second.outcome.reused >= first.outcome.prompt_tokens
    assert session.context_used == second.outcome.prompt_tokens + len(second.outcome.tokens)


def test_the_same_seed_gives_the_same_conversation(model: Model) -> None:
    told = []
    for _ in range(2):
        session = model.session(Sampling(temperature=2.0, seed=11))
        session.ask("Tell me a story.")
        session.ask("Another one.")
        told.append(session.messages)
    assert told[0] == told[1]


def test_asking_again_takes_another_seed(model: Model) -> None:
    session = model.session(Sampling(temperature=2.0, seed=11))
    first = session.ask("Tell me a story.").text
    session.clear()
    assert session.ask("Tell me a story.").text != first


def test_nothing_of_what_was_cleared_is_left_in_the_memory(model: Model) -> None:
    question = "Please tell me what my favourite colour and the name of my dog are, in one short sentence, if you can."
    fresh = model.session(limit=10).ask(question)
    session = model.session(limit=10)
    session.ask("My favourite colour is purple and my dog is called Bismarck.")
    session.ask(question)
    session.clear()
    again = session.ask(question)
    assert again.outcome.reused == 0
    assert again.outcome.tokens == fresh.outcome.tokens


def test_the_oldest_messages_leave_a_full_context_but_not_the_history(model: Model) -> None:
    session = model.session(system="Be brief.")
    dropped = []
    for n in range(5):
        turn = session.ask(f"Message number {n}: the quick brown fox jumps over the lazy dog.")
        dropped.append(turn.dropped)
        assert turn.outcome.prompt_tokens <= N_CTX - reserve(N_CTX)
    assert sum(dropped) > 0
    assert all(n % 2 == 0 for n in dropped)
    assert dropped[0] == 0
    assert roles(session.messages) == "s" + "ua" * 5
    assert turn.outcome.reused > turn.outcome.prompt_tokens // 2, "what stayed was run again"


def test_an_answer_longer_than_the_context_keeps_the_system_message(model: Model) -> None:
    session = model.session(Sampling(temperature=1.5, seed=3), limit=70, system="Speak like a pirate.")
    turn = session.ask("Tell me a very long story about the sea, and never end it.")
    assert turn.outcome.shifted > 0
    assert session.context_used < N_CTX
    system = model.template.tokens([ChatMessage("system", "Speak like a pirate."), ChatMessage("user", "")])
    after = session.ask("Go on.")
    assert after.dropped == 2
    assert after.outcome.reused >= len(system) - len(model.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n"))


def test_a_message_longer_than_the_context_changes_nothing(model: Model) -> None:
    session = model.session()
    session.ask("Hello")
    before = session.messages
    with pytest.raises(HomeinferError, match=r"tokens .* context holds 96: shorten it") as caught:
        session.ask("word " * 300)
    assert not isinstance(caught.value, AnswerFailed)
    assert session.messages == before
    assert session.ask("Still there?").dropped == 0


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_message_is_refused(model: Model, text: str) -> None:
    session = model.session()
    with pytest.raises(HomeinferError, match="the message is empty"):
        session.ask(text)
    assert session.messages == ()


def test_a_stopped_answer_stays_as_far_as_it_was_written(model: Model) -> None:
    session = model.session(ENDLESS, LONG)
    pieces: list[str] = []
    turn = session.ask("Tell me a long story.", pieces.append, lambda: len(pieces) >= 3)
    assert turn.outcome.finish_reason == "cancelled"
    assert turn.text == "".join(pieces)
    assert session.messages[1] == ChatMessage("assistant", turn.text)
    more: list[str] = []
    session.ask("Go on.", more.append, lambda: len(more) >= 3)
    assert roles(session.messages) == "uaua"


def test_an_answer_stopped_before_its_first_word_takes_its_question_along(model: Model) -> None:
    session = model.session()
    turn = session.ask("Tell me a long story.", cancelled=lambda: True)
    assert (turn.text, turn.outcome.finish_reason) == ("", "cancelled")
    assert session.messages == ()


def test_bytes_that_are_no_text_become_replacement_characters(model: Model, tmp_path: Path) -> None:
    session = model.session(limit=1)
    session.ask("caf\udce9 \ud83d!")
    session.save(tmp_path / "talk.json")
    assert "�" in load_conversation(tmp_path / "talk.json").messages[0].content


def test_the_system_message_is_set_shown_and_taken_away(model: Model) -> None:
    session = model.session(limit=1)
    assert session.system is None
    session.set_system("Be brief.")
    session.ask("Hello")
    session.set_system("Be kind.")
    assert session.messages[0] == ChatMessage("system", "Be kind.")
    assert roles(session.messages) == "sua"
    session.clear()
    assert roles(session.messages) == "s"
    session.set_system(None)
    assert session.messages == ()


def test_a_system_message_that_leaves_no_room_is_refused(model: Model) -> None:
    session = model.session(system="Be brief.")
    with pytest.raises(HomeinferError, match="the system message takes"):
        session.set_system("word " * 300)
    assert session.system == "Be brief."


def test_a_saved_conversation_goes_on(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    session = model.session(system="Be brief.")
    session.ask("Hello")
    session.save(file)
    session.ask("More")
    session.save(file)
    other = model.session()
    assert other.load(file).model == "small"
    assert other.messages == session.messages
    assert other.context_used > 0
    assert other.ask("Bye").outcome.prompt_tokens > session.stats.context_used
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_saving_overwrites_nothing_but_conversations(model: Model, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for path, reason in (
        (notes, "exists and is no saved conversation"),
        (tmp_path, "exists and is no saved conversation"),
        (tmp_path / "missing" / "talk.json", "can't be written: No such file or directory"),
    ):
        with pytest.raises(HomeinferError, match=reason):
            model.session().save(path)
    assert notes.read_text() == "mine"


SAID = '{"role":"user","content":"a"},{"role":"assistant","content":"b"}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ('{"version": 1', "not JSON"),
        ("[]", "Expected `object`"),
        ("{}", "missing required field `version`"),
        (f'{{"version":2,"model":"m","messages":[{SAID}]}}', "of version 2, this homeinfer reads 1"),
        (f'{{"version":1,"model":"m","messages":[{SAID}],"x":0}}', "unknown field `x`"),
        ('{"version":1,"model":"m","messages":[{"role":"tool","content":"a"}]}', "Invalid enum value 'tool'"),
        ('{"version":1,"model":"m","messages":[{"role":"user","content":7}]}', "Expected `str`"),
        ('{"version":1,"model":"m","messages":[{"role":"user","content":"a"}]}', "the last message has no answer"),
        ('{"version":1,"model":"m","messages":[{"role":"assistant","content":"a"}]}', "message 1 is the assistant's"),
        (f'{{"version":1,"model":"m","messages":[{SAID},{{"role":"system","content":"a"}}]}}', "message 3 is"),
    ],
)
def test_what_is_no_conversation_is_refused(model: Model, tmp_path: Path, text: str, reason: str) -> None:
    session = model.session(limit=1)
    session.ask("Hello")
    before = session.messages
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(HomeinferError) as caught:
        session.load(file)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert session.messages == before


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"version":1,"model":"caf\xe9","messages":[]}')
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, reason in (
        (tmp_path / "missing.json", "can't be read: No such file"),
        (tmp_path, "is not a file"),
        (fifo, "is not a file"),
        (Path("/dev/zero"), "is not a file"),
        (tmp_path / "latin.json", "not JSON"),
    ):
        with pytest.raises(HomeinferError, match=reason):
            load_conversation(path)


def test_a_file_that_a_link_names_is_written_through_it(tmp_path: Path) -> None:
    empty = Conversation(1, "m", ())
    save_conversation(empty, tmp_path / "talk.json")
    (tmp_path / "link.json").symlink_to("talk.json")
    save_conversation(Conversation(1, "m", conversation("ua")), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert load_conversation(tmp_path / "talk.json").messages == conversation("ua")


odd_many = st.lists(st.integers(0, 30), min_size=1, max_size=31).filter(lambda sizes: len(sizes) % 2 == 1)


@given(st.booleans(), odd_many, st.integers(0, 200))
def test_no_more_pairs_leave_than_must(with_system: bool, sizes: list[int], room: int) -> None:
    said = conversation("ua" * (len(sizes) // 2) + "u")
    messages = conversation("s" * with_system) + said
    size_of = dict(zip(said, sizes, strict=True)) | {messages[0]: 5 if with_system else sizes[0]}

    def count(some: Sequence[ChatMessage]) -> int:
        return sum(size_of[message] for message in some)

    left = fit(messages, count, room)
    kept = without_oldest(messages, left)
    assert left % 2 == 0
    assert kept[-1] == messages[-1]
    assert kept[:1] == messages[:1] or not with_system
    assert count(kept) <= room or len(kept) == 1 + with_system
    assert left == 0 or count(without_oldest(messages, left - 2)) > room


def test_an_engine_that_dies_leaves_what_was_said(tmp_path: Path) -> None:
    others = engines()
    model = Model()
    try:
        (engine,) = (each for each in engines() if each not in others)
        session = model.session(ENDLESS, LONG)
        pieces: list[str] = []

        def kill_after_three(text: str) -> None:
            pieces.append(text)
            if len(pieces) == 3:
                engine.kill()

        with pytest.raises(AnswerFailed, match="device-1"):
            session.ask("Tell me a long story.", kill_after_three)
        assert roles(session.messages) == "ua"
        assert session.messages[-1].content == "".join(pieces)
        session.save(tmp_path / "talk.json")
        assert load_conversation(tmp_path / "talk.json").messages == session.messages
    finally:
        model.close()
