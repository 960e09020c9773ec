"""The chat as its users meet it: through a pipe, and with keys in a (pseudo) terminal."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pseudo_terminal import Terminal

from homeinfer.chat.session import load_conversation
from tests.support.processes import engines, have_ended, wait_until

HOMEINFER = [sys.executable, "-m", "homeinfer", "chat"]
SMALL = ["--temp", "0", "--threads", "1", "--ctx", "256"]
ENDLESS = r'root ::= "on and " root'
CLIPBOARD = r'root ::= "a\x1b]52;c;aGk=\x07b\r\x9b"'
PATIENCE = 240.0


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "HOMEINFER_DATA": str(folder / "data"),
        "TERM": "xterm-256color",
        "PYTHONUTF8": "1",
    }


def piped(folder: Path, said: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*HOMEINFER, *SMALL, *options], input=said, capture_output=True, timeout=PATIENCE, env=environment(folder)
    )


class Chat(Terminal):
    """`homeinfer chat` in a terminal of its own."""

    def __init__(self, folder: Path, grammar: str) -> None:
        (folder / "grammar.gbnf").write_text(grammar)
        super().__init__([*HOMEINFER, *SMALL, "--grammar", str(folder / "grammar.gbnf")], environment(folder), rows=24)

    def see(self, pattern: str) -> str:
        """Wait for what comes after all that is shown now: an endless answer says the same again and again."""
        seen = super().see(pattern)
        self.skip()
        return seen

    @property
    def engine(self) -> psutil.Process:
        (only,) = engines(self.process.pid)
        return only

    def press_until_seen(self, keys: str, pattern: str) -> None:
        """Type keys, again where a busy machine took two Ctrl-C for one."""
        for _ in range(18):
            self.type(keys)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                if re.search(pattern, self.text):
                    return
                time.sleep(0.02)
        raise AssertionError(f"{pattern} was not seen: {self.text[-2000:]}")

    def left(self) -> int:
        """Wait for the end: the exit code. The terminal must be as it was before."""
        code = self.ends()
        assert termios.tcgetattr(self.device) == self.settings
        return code

    def unread(self) -> int:
        """Bytes typed that the next program would get."""
        held = self.settings.copy()
        held[3] &= ~termios.ICANON
        termios.tcsetattr(self.device, termios.TCSANOW, held)
        (n,) = struct.unpack("i", fcntl.ioctl(self.device, termios.FIONREAD, b"\0" * 4))
        return int(n)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Chat]:
    """A chat whose answers do not end."""
    with Chat(tmp_path, ENDLESS) as opened:
        yield opened


def test_lines_of_a_pipe_are_answered_until_exit(tmp_path: Path) -> None:
    done = piped(tmp_path, b"hi\n\n/exti\n/exit\nnever\n", "-n", "12")
    assert done.returncode == 0
    assert done.stdout == b"Hello! How can I assist you today?\n"
    assert b"there is no /exti: did you mean /exit?\n" in done.stderr
    assert b"30 layers on 1 device, context 256" in done.stderr


def test_the_end_of_a_pipe_ends_the_chat_and_the_history_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    done = piped(tmp_path, b"/system Be brief.\ncaf\xe9\\\nor tea?\nwhy\n/save " + bytes(file) + b"\n/stats", "-n", "3")
    assert done.returncode == 0
    said = load_conversation(file).messages
    assert [m.content for m in said if m.role != "assistant"] == ["Be brief.", "caf�\nor tea?", "why"]
    assert done.stdout.decode() == "".join(f"{m.content}\n" for m in said if m.role == "assistant")
    assert b"generated tokens  6" in done.stderr
    assert b"device-1" in done.stderr


def test_what_leaves_the_context_is_said(tmp_path: Path) -> None:
    said = b"".join(b"%d: the quick brown fox jumps over the lazy dog\n" % n for n in range(3))
    done = piped(tmp_path, said + b"word " * 200 + b"\n", "-n", "4", "--ctx", "96")
    assert done.returncode == 0
    assert b"the 2 oldest messages left the context" in done.stderr
    assert re.search(rb"the message takes \d+ tokens .* the context holds 96", done.stderr)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["missing.gguf"], "missing.gguf"),
        (["--grammar", "{folder}/bad.gbnf"], "the grammar can't be read"),
    ],
    ids=["model", "grammar"],
)
def test_what_can_not_work_is_one_line(tmp_path: Path, options: list[str], reason: str) -> None:
    (tmp_path / "bad.gbnf").write_text("no rules ::= (")
    done = piped(tmp_path, b"hi\n", *(option.format(folder=tmp_path) for option in options))
    assert done.returncode == 1
    assert done.stdout == b""
    # llama.cpp itself writes where a grammar is wrong, before it
    assert re.search(rf"(\A|\n)homeinfer: [^\n]*{reason}[^\n]*\n\Z", done.stderr.decode())


def test_talking_in_a_terminal(terminal: Chat) -> None:
    terminal.see("loading")
    terminal.type("hi\r")
    terminal.see("on and on and")
    terminal.type("\x03")
    terminal.see(r"[\d.]+ tokens/s, first token after [\d.]+ s, stopped")
    terminal.type("more\r")
    terminal.see("on and on and")
    terminal.type("typed ahead")
    terminal.see("on and on and")
    assert "typed ahead" not in terminal.text, "keys were shown in the middle of an answer"
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.see(r"stopped[\s\S]*>[\s\S]*typed ahead")
    terminal.type("\x03/sta\t")
    terminal.see("show tokens, speed|/stats")
    terminal.type("\r")
    terminal.see(r"answers\s+2\s[\s\S]*context [\d,]+ of 256")
    terminal.type("not sent\x03\x03")
    terminal.see("again leaves")
    terminal.type("\x03")
    assert terminal.left() == 0


def test_an_engine_that_dies_is_one_line_and_the_conversation_is_saved(terminal: Chat) -> None:
    terminal.see("/help for commands")
    terminal.type("hi\r")
    terminal.see("on and on and")
    terminal.type("a message, not a command of the shell\r")
    terminal.engine.kill()
    shown = terminal.see(r"homeinfer: .*device-1[\s\S]*json\)")
    assert terminal.left() == 1
    assert terminal.unread() == 0
    named = re.search(r"/load (\S+json)\)", shown.replace("\r\n", ""))
    assert named is not None
    assert [m.role for m in load_conversation(Path(named[1])).messages] == ["user", "assistant"]


def test_control_c_leaves_at_last_when_an_engine_hangs(terminal: Chat) -> None:
    terminal.see("/help for commands")
    terminal.type("hi\r")
    terminal.see("on and on and")
    engine = terminal.engine
    engine.suspend()
    terminal.type("\x03")
    time.sleep(0.3)
    terminal.press_until_seen("\x03", "Ctrl-C once more leaves the chat")
    terminal.type("\x03")
    terminal.see("what was said is saved: /load")
    assert terminal.left() == 130
    wait_until(lambda: have_ended([engine]))


def test_a_model_can_not_command_the_terminal(tmp_path: Path) -> None:
    with Chat(tmp_path, CLIPBOARD) as terminal:
        terminal.see("/help for commands")
        terminal.type("hi\r")
        terminal.see(r"a\]52;c;aGk=b\s+[\d.]+ tokens/s")
        assert b"\x1b]52" not in terminal.shown
        terminal.type(f"/save {tmp_path}/talk.json\r/exit\r")
        assert terminal.left() == 0
        assert load_conversation(tmp_path / "talk.json").messages[1].content.startswith("a\x1b]52;c;aGk=\x07b\r")
