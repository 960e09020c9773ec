from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from homeinfer.chat.commands import COMMANDS, Command, help_text, parse_command
from homeinfer.chat.session import Turn
from homeinfer.chat.terminal import CommandCompleter, joined_lines, make_prompt, turn_text
from homeinfer.chat.text import for_terminal
from homeinfer.engine.answers import Outcome
from homeinfer.engine.request import FinishReason
from homeinfer.errors import HomeinferError

Typed = Callable[[str], str]


@pytest.fixture
def typed(tmp_path: Path) -> Typed:
    """What the prompt gives for keys as a terminal sends them."""

    def read(keys: str) -> str:
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            prompt = make_prompt(lambda: "status", tmp_path / "data")
            keyboard.send_text(keys)
            return prompt.prompt()

    return read


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\ntwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("\x1b[200~one\rtwo\nthree\x1b[201~\r", "one\ntwo\nthree"),
        ("\x1b[200~one\\\x1b[201~\x1b[200~\rtwo\x1b[201~\r", "one\\\ntwo"),
        ("a\\b\r", "a\\b"),
        ("\r  \rhello\r", "  hello"),
        ("wrong\x03right\r", "right"),
        ("\x03again\r", "again"),
        ("\x03x\x7f\x03y\r", "y"),
        ("naïve 🙂\r", "naïve 🙂"),
    ],
    ids=repr,
)
def test_keys_make_a_message(typed: Typed, keys: str, message: str) -> None:
    assert typed(keys) == message


@pytest.mark.parametrize("keys", ["\x04", "\x03\x03", "text\x03\x03\x03", "text\x03\x04"], ids=repr)
def test_leaving_an_empty_line(typed: Typed, keys: str) -> None:
    with pytest.raises(EOFError):
        typed(keys)


def test_what_was_typed_comes_back_in_the_next_chat(typed: Typed, tmp_path: Path) -> None:
    typed("first\x1b\rline\r")
    assert typed("\x1b[A\r") == "first\nline"
    file = tmp_path / "data" / "chat-history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_data_folder_that_can_not_be_made_is_no_obstacle(tmp_path: Path, typed: Typed) -> None:
    (tmp_path / "data").write_text("in the way")
    assert typed("hello\r") == "hello"


@given(st.text())
def test_only_newline_and_tab_are_left_of_the_control_characters(text: str) -> None:
    kept = for_terminal(text)
    controls = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
    assert kept == "".join(char for char in text if char not in controls)


def test_escape_sequences_lose_their_power() -> None:
    assert for_terminal("a\x1b]52;c;aGk=\x07b\x9b2Jc\r\n\td\x00") == "a]52;c;aGk=b2Jc\n\td"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", []),
        ("a\nb\r\nc", ["a", "b", "c"]),
        ("a\\\nb\n\nc\n", ["a\nb", "", "c"]),
        ("a\\\n\\\nb", ["a\n\nb"]),
        ("a\\", ["a"]),
    ],
)
def test_lines_of_a_pipe_make_messages(text: str, messages: list[str]) -> None:
    assert list(joined_lines(text.splitlines(keepends=True))) == messages


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/help", Command("help", "")),
        ("/HELP  ", Command("help", "")),
        ("/bye", Command("exit", "")),
        ("/quit", Command("exit", "")),
        ("/system", Command("system", "")),
        ("/system Be brief.\nBe kind.", Command("system", "Be brief.\nBe kind.")),
        ("/save my talk.json ", Command("save", "my talk.json")),
        ("hello", None),
        (" /help", None),
        ("/etc/hosts is what?", None),
        ("/* a comment */", None),
        ("// another", None),
    ],
)
def test_commands_and_messages_are_told_apart(text: str, command: Command | None) -> None:
    assert parse_command(text) == command


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("/hlep", "there is no /hlep: did you mean /help?"),
        ("/exit now", "/exit takes nothing after it"),
        ("/sav x", "there is no /sav: did you mean /save?"),
        ("/xyzzy", "there is no /xyzzy: see /help"),
        ("/", "there is no /: see /help"),
        ("/load", "/load needs a file: /load FILE"),
    ],
)
def test_what_is_no_command_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(HomeinferError) as caught:
        parse_command(text)
    assert str(caught.value) == problem


def test_help_names_every_command() -> None:
    for command in COMMANDS:
        for name in (command.name, *command.aliases):
            assert f"/{name}" in help_text()


def completions(text: str) -> list[str]:
    return [found.text for found in CommandCompleter().get_completions(Document(text), CompleteEvent())]


def test_tab_offers_commands_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.json").touch()
    assert completions("/s") == ["/system", "/save", "/stats"]
    assert completions("/load ta") == ["lk.json"]
    assert completions("/system ta") == []
    assert completions("hello /s") == []


def outcome(reason: FinishReason, *, tpot_ms: float = 20.0, shifted: int = 0) -> Outcome:
    return Outcome([1, 2, 3], "abc", reason, 10, 0, shifted, 250.0, tpot_ms)


@pytest.mark.parametrize(
    ("turn", "line"),
    [
        (Turn("abc", outcome("stop"), 0), "50.0 tokens/s, first token after 0.25 s"),
        (Turn("a", outcome("stop", tpot_ms=0.0), 0), "first token after 0.25 s"),
        (Turn("abc", outcome("cancelled"), 0), "50.0 tokens/s, first token after 0.25 s, stopped"),
        (
            Turn("abc", outcome("length", shifted=1200), 4),
            "50.0 tokens/s, first token after 0.25 s, cut short after 3 tokens, "
            "the 4 oldest messages left the context, 1,200 tokens left the context",
        ),
        (Turn("", outcome("cancelled"), 0), "stopped before the first word: the message is not kept"),
        (Turn("", outcome("stop"), 0), "the answer ended before the first word: the message is not kept"),
    ],
)
def test_the_line_under_an_answer(turn: Turn, line: str) -> None:
    assert turn_text(turn) == line
