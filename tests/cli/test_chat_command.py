"""The chat as its users meet it: through a pipe, and with keys in a (pseudo) terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from homeinfer.chat.session import load_conversation

HOMEINFER = [sys.executable, "-m", "homeinfer", "chat"]
SMALL = ["--temp", "0", "--threads", "1", "--ctx", "256"]
LONG = "Tell me a very long story about a dragon."
PATIENCE = 60.0


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "HOMEINFER_DATA": str(folder / "data"),
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "TERM": "xterm-256color",
        "PYTHONUTF8": "1",
    }


def piped(folder: Path, said: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*HOMEINFER, *SMALL, *options], input=said, capture_output=True, timeout=PATIENCE, env=environment(folder)
    )


class Terminal:
    """`homeinfer chat` in a terminal of its own."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._master, self._slave = pty.openpty()
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.settings = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [*HOMEINFER, *options],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=environment(folder),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.set_blocking(self._master, False)
        self.shown = b""
        self._seen = 0

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def see(self, pattern: str) -> str:
        """Wait for what has not been seen yet, without the escape sequences around it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self._read()
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown[self._seen :].decode("utf-8", "replace"))
            if re.search(pattern, text):
                self._seen = len(self.shown)
                return text
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} was not seen after {self.shown[self._seen :]!r}")

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self.shown += data
        except BlockingIOError:
            pass

    @property
    def engine(self) -> psutil.Process:
        (child,) = (c for c in psutil.Process(self.process.pid).children() if "homeinfer.cluster.device" in c.cmdline())
        return child

    def left(self) -> int:
        """Wait for the end: the exit code. The terminal must be as it was before."""
        code = self.process.wait(PATIENCE)
        self._read()
        assert termios.tcgetattr(self._slave) == self.settings
        return code

    def unread(self) -> int:
        """Bytes typed that the next program would get."""
        held = self.settings.copy()
        held[3] &= ~termios.ICANON
        termios.tcsetattr(self._slave, termios.TCSANOW, held)
        (n,) = struct.unpack("i", fcntl.ioctl(self._slave, termios.FIONREAD, b"\0" * 4))
        return int(n)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminal(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    opened = Terminal(tmp_path, getattr(request, "param", SMALL))
    yield opened
    opened.close()


def test_lines_of_a_pipe_are_answered_until_exit(tmp_path: Path) -> None:
    done = piped(tmp_path, b"hi\n\n/exti\n/exit\nnever\n", "-n", "12")
    assert done.returncode == 0
    assert done.stdout == b"Hello! How can I assist you today?\n"
    assert b"there is no /exti: did you mean /exit?\n" in done.stderr
    assert b"30 layers on 1 device, context of 256 tokens" in done.stderr


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
        (["--system", "word " * 300], "the system message takes"),
    ],
    ids=["model", "grammar", "system"],
)
def test_what_can_not_work_is_one_line(tmp_path: Path, options: list[str], reason: str) -> None:
    (tmp_path / "bad.gbnf").write_text("no rules ::= (")
    done = piped(tmp_path, b"hi\n", *(option.format(folder=tmp_path) for option in options))
    assert done.returncode == 1
    assert done.stdout == b""
    assert re.fullmatch(r"homeinfer: [^\n]*\n", done.stderr.decode())
    assert reason in done.stderr.decode()


def test_talking_in_a_terminal(terminal: Terminal) -> None:
    terminal.see("/help for commands")
    terminal.type("hi\r")
    terminal.see(r"Hello! How can I assist you today\?\s+[\d.]+ tokens/s, first token after")
    terminal.type(LONG + "\r")
    terminal.see("[Oo]nce|dragon.*\n.*[a-z]{3} [a-z]{3}")
    terminal.type("\x03")
    terminal.see("first token after .* s, stopped")
    terminal.type(LONG + "\r")
    terminal.see("dragon.*\n.*[a-z]")
    terminal.type("typed ahead")
    time.sleep(0.3)
    assert "typed ahead" not in terminal.shown.decode(), "keys were shown in the middle of an answer"
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.see(r"stopped[\s\S]*> typed ahead")
    terminal.type("\x03/sta\t\r")
    terminal.see(r"answers\s+3\s")
    terminal.type("/exit\r")
    assert terminal.left() == 0


def test_control_c_twice_on_an_empty_line_leaves(terminal: Terminal) -> None:
    terminal.see("context 0 of 256")
    terminal.type("not sent\x03\x03")
    terminal.see("Ctrl-C again leaves")
    terminal.type("\x03")
    assert terminal.left() == 0


def test_an_engine_that_dies_is_one_line_and_the_conversation_is_saved(terminal: Terminal) -> None:
    terminal.see("/help for commands")
    terminal.type(LONG + "\r")
    terminal.see("dragon.*\n.*[a-z]")
    terminal.type("a message, not a command of the shell\r")
    terminal.engine.kill()
    shown = terminal.see(r"homeinfer: .*device-1[\s\S]*json\)")
    assert terminal.left() == 1
    assert terminal.unread() == 0
    named = re.search(r"/load (\S+json)\)", shown.replace("\r\n", ""))
    assert named is not None
    assert [m.role for m in load_conversation(Path(named[1])).messages] == ["user", "assistant"]


def test_control_c_leaves_at_last_when_an_engine_hangs(terminal: Terminal) -> None:
    terminal.see("/help for commands")
    terminal.type(LONG + "\r")
    terminal.see("dragon.*\n.*[a-z]")
    engine = terminal.engine
    engine.suspend()
    terminal.type("\x03")
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.see("Ctrl-C once more leaves the chat")
    terminal.type("\x03")
    terminal.see("what was said is saved: /load")
    assert terminal.left() == 130
    assert not engine.is_running()


CLIPBOARD = r'root ::= "a\x1b]52;c;aGk=\x07b\r\x9b"'


def test_a_model_can_not_command_the_terminal(tmp_path: Path) -> None:
    grammar = tmp_path / "clipboard.gbnf"
    grammar.write_text(CLIPBOARD)
    options = ["--grammar", str(grammar), *SMALL]
    assert b"a\x1b]52;c;aGk=\x07b" in piped(tmp_path, b"hi\n", *options).stdout, "a pipe gets what was written"
    terminal = Terminal(tmp_path, options)
    try:
        terminal.see("/help for commands")
        terminal.type("hi\r")
        terminal.see(r"a\]52;c;aGk=b\s+[\d.]+ tokens/s")
        assert b"\x1b]52" not in terminal.shown
    finally:
        terminal.close()
