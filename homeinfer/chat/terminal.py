"""Keys and screen of a conversation."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style
from rich.console import Console
from rich.text import Text

from homeinfer.chat.commands import COMMANDS, parse_command, run_command
from homeinfer.chat.reading import Reading
from homeinfer.chat.session import AnswerFailed, Session, Turn
from homeinfer.chat.text import for_terminal
from homeinfer.errors import HomeinferError

_STYLE = Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"})


class LeaveNow(KeyboardInterrupt):
    """Ctrl-C, again and again: the user wants out though an engine is in the middle of a step."""


class Screen:
    """Answers on standard output as they come, remarks on `notes`."""

    def __init__(self, notes: Console) -> None:
        self.notes = notes
        self._to_terminal = sys.stdout.isatty()
        self._at_start = True
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")

    def write(self, text: str) -> None:
        """A piece of an answer."""
        text = for_terminal(text) if self._to_terminal else text
        sys.stdout.write(text)
        sys.stdout.flush()
        self._at_start = text.endswith("\n") if text else self._at_start

    def end_line(self) -> None:
        """Begin a new line unless the last piece did."""
        if not self._at_start:
            self.write("\n")

    def note(self, text: str, style: str = "dim") -> None:
        """A remark."""
        self.end_line()
        self.notes.print(Text(for_terminal(text)), style=style, soft_wrap=True)


class Interrupts:
    """Ctrl-C while an answer is written: the first asks it to stop, the second says why it has not yet, the
    third raises LeaveNow."""

    def __init__(self) -> None:
        self._times = 0
        self._before: signal.Handlers | int | Callable[[int, FrameType | None], object] | None = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_raised: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._times += 1
        if self._times == 2:
            # not through sys.stderr: this may have come in the middle of a write to it
            os.write(2, b"\n(stops as soon as the engine has done its step; Ctrl-C once more leaves the chat)\n")
        if self._times > 2:
            raise LeaveNow

    def stopped(self) -> bool:
        """Whether there was one."""
        return self._times > 0


def talk(session: Session, notes: Console, greeting: str) -> None:
    """Greet, and hold the conversation until the user leaves: with line editing in a terminal, else one message
    per line of standard input.

    Raises HomeinferError when an engine fails, with the name of the file that the conversation was saved to.
    """
    screen = Screen(notes)
    screen.note(greeting)
    try:
        if has_keys():
            _talk_with_keys(session, screen)
        else:
            _talk_in_lines(session, screen)
    except AnswerFailed as problem:
        screen.end_line()
        raise HomeinferError(f"{problem} ({_rescue(session)})") from problem
    except LeaveNow:
        screen.note(_rescue(session))
        raise


def _talk_with_keys(session: Session, screen: Screen) -> None:
    prompt = make_prompt(lambda: status_text(session), data_folder())
    while True:
        try:
            text = prompt.prompt()
            with Interrupts() as interrupts:
                if respond(text, session, screen, interrupts.stopped):
                    return
        except EOFError:
            return
        except LeaveNow:
            raise
        except KeyboardInterrupt:
            continue  # it came a moment too late to stop an answer


def _talk_in_lines(session: Session, screen: Screen) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for text in joined_lines(sys.stdin or ()):
        if respond(text, session, screen):
            return


def joined_lines(lines: Iterable[str]) -> Iterator[str]:
    """Messages of a text that is no terminal's: a line each, one that ends in a backslash with the next."""
    begun: list[str] = []
    for line in lines:
        text = line.rstrip("\r\n")
        begun.append(text.removesuffix("\\"))
        if not text.endswith("\\"):
            yield "\n".join(begun)
            begun = []
    if begun:
        yield "\n".join(begun)


def respond(text: str, session: Session, screen: Screen, cancelled: Callable[[], bool] = lambda: False) -> bool:
    """Do a command or answer a message; True: the user leaves. Raises AnswerFailed."""
    if not text.strip():
        return False
    try:
        command = parse_command(text)
        if command is None:
            screen.note(turn_text(_answered(text.strip(), session, screen, cancelled)))
            return False
        reply = run_command(command, session)
    except AnswerFailed:
        raise
    except HomeinferError as problem:
        screen.note(" ".join(str(problem).split()), style="red")
        return False
    if reply.text:
        screen.note(reply.text)
    return reply.leave


def _answered(text: str, session: Session, screen: Screen, cancelled: Callable[[], bool]) -> Turn:
    with Reading(screen.notes) as reading:

        def write(piece: str) -> None:
            reading.done()
            screen.write(piece)

        return session.ask(text, write, cancelled)


def turn_text(turn: Turn) -> str:
    """The line under an answer."""
    outcome = turn.outcome
    if not turn.text:
        ended = "stopped before" if outcome.finish_reason == "cancelled" else "the answer ended before"
        return f"{ended} the first word: the message is not kept"
    parts = [f"{1e3 / outcome.tpot_ms:.1f} tokens/s"] if outcome.tpot_ms else []
    parts.append(f"first token after {outcome.ttft_ms / 1e3:.2f} s")
    if outcome.finish_reason == "cancelled":
        parts.append("stopped")
    if outcome.finish_reason == "length":
        parts.append(f"cut short after {len(outcome.tokens):,} tokens")
    if turn.dropped:
        parts.append(f"the {turn.dropped} oldest messages left the context")
    if outcome.shifted:
        parts.append(f"{outcome.shifted:,} tokens left the context")
    return ", ".join(parts)


def data_folder() -> Path:
    """Where the chat keeps what was typed and said: `HOMEINFER_DATA`, or the user's data folder."""
    named = os.environ.get("HOMEINFER_DATA")
    return Path(named) if named else Path(platformdirs.user_data_dir("homeinfer"))


def _rescue(session: Session) -> str:
    if all(message.role == "system" for message in session.messages):
        return "nothing was said yet"
    path = data_folder() / "conversations" / time.strftime("%Y-%m-%d-%H%M%S.json")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        session.save(path)
    except (HomeinferError, OSError) as problem:
        return f"what was said could not be saved: {problem}"
    return f"what was said is saved: /load {path}"


def has_keys() -> bool:
    """Whether a person at a terminal is on both ends."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


@contextlib.contextmanager
def keys_held_back() -> Iterator[None]:
    """What is typed while a model loads or answers stays off the screen and is the next prompt's, Enter as
    Enter. When an error leaves no next prompt it is dropped: a message must not become a command of the shell.
    """
    try:
        import termios
    except ImportError:  # Windows, whose console does so by itself
        yield
        return
    if not has_keys():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    held = before.copy()
    held[0] &= ~termios.ICRNL
    held[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(keyboard, termios.TCSANOW, held)
    when = termios.TCSAFLUSH
    try:
        yield
        when = termios.TCSANOW
    finally:
        with contextlib.suppress(termios.error):  # a terminal that has gone
            termios.tcsetattr(keyboard, when, before)


def status_text(session: Session) -> str:
    """The line at the bottom of the screen."""
    last = session.last
    rate = f" · {1e3 / last.tpot_ms:.1f} tokens/s" if last and last.tpot_ms else ""
    return for_terminal(f"{session.model} · context {session.context_used:,} of {session.n_ctx:,}{rate}")


def make_prompt(status: Callable[[], str], folder: Path) -> PromptSession[str]:
    """What reads messages from a terminal: `prompt()` gives one that is not blank, or raises EOFError when the
    user leaves. The messages of earlier chats are in a file in `folder` that only the user can read."""
    keys = _Keys()
    prompt: PromptSession[str] = PromptSession(
        [("class:prompt", "> ")],
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys.bindings,
        completer=CommandCompleter(),
        complete_while_typing=False,
        history=_history(folder),
        bottom_toolbar=lambda: "Ctrl-C again leaves" if keys.leaves_next else status(),
        style=_STYLE,
        enable_suspend=True,
    )
    prompt.default_buffer.on_text_changed += keys.on_text_changed
    return prompt


class _Keys:
    """Enter sends, Alt-Enter and Ctrl-J begin a line, Ctrl-C clears and, twice on an empty line, leaves."""

    def __init__(self) -> None:
        self.leaves_next = False
        self.bindings = KeyBindings()
        self.bindings.add("enter")(self._enter)
        self.bindings.add("escape", "enter")(self._new_line)
        self.bindings.add("c-j")(self._new_line)
        self.bindings.add("c-c")(self._interrupt)
        self.bindings.add("<sigint>")(self._interrupt)

    def on_text_changed(self, _buffer: object) -> None:
        self.leaves_next = False

    def _enter(self, event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()

    def _new_line(self, event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def _interrupt(self, event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        elif self.leaves_next:
            event.app.exit(exception=EOFError())
        else:
            self.leaves_next = True


class CommandCompleter(Completer):
    """Commands after a slash, files after those that take one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What may go on from the text before the cursor."""
        name, space, argument = document.text_before_cursor.partition(" ")
        if space and name in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif name.startswith("/") and not space and "\n" not in name:
            for command in COMMANDS:
                if command.name.startswith(name[1:].lower()):
                    yield Completion(f"/{command.name}", -len(name), display_meta=command.what)


class _PrivateHistory(FileHistory):
    """A history file that a full disk does not end the chat for."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history(folder: Path) -> History:
    file = folder / "chat-history"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        file.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(str(file))
