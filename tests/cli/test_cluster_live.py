"""The screen of a long-running command, on terminals that take what they get and on one that does not."""

from __future__ import annotations

import errno
import io
import threading

import pytest
from rich.console import Console
from rich.text import Text

from homeinfer.cli import cluster_live
from homeinfer.cli.cluster_live import Screen
from tests.support.processes import wait_until


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that a busy machine holds up is not taken for a terminal that stands still."""
    monkeypatch.setattr(cluster_live, "_PATIENCE", 120.0)
    monkeypatch.setattr(cluster_live, "_LAST_PATIENCE", 120.0)


class Frozen(io.StringIO):
    """A terminal after Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.goes_on.wait(60)
        return super().write(text)


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, _text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.usefixtures("patient")
def test_lines_stay_and_the_view_is_taken_away() -> None:
    terminal = io.StringIO()
    with Screen(Console(file=terminal, force_terminal=True)) as screen:
        screen.say("one")
        screen.show(Text("a view"))
        screen.say("two")
    text = terminal.getvalue()
    assert text.index("one") < text.index("a view") < text.index("two")
    assert text.endswith("\x1b[2K")


@pytest.mark.usefixtures("patient")
def test_no_terminal_gets_lines_alone() -> None:
    log = io.StringIO()
    with Screen(Console(file=log)) as screen:
        screen.show(Text("a view"))
        screen.say("one")
    assert log.getvalue() == "one\n"


def test_a_screen_that_stands_still_holds_up_nobody_and_shows_all_lines_later() -> None:
    terminal = Frozen()
    screen = Screen(Console(file=terminal, force_terminal=True))
    for number in range(100):
        screen.say(f"line {number}.")
        screen.show(Text(f"view {number}."))
    assert terminal.getvalue() == ""
    terminal.goes_on.set()
    wait_until(lambda: all(last in terminal.getvalue() for last in ("line 99.", "view 99.")))
    text = terminal.getvalue()
    assert [text.index(f"line {number}.") for number in range(100)] == sorted(
        text.index(f"line {number}.") for number in range(100)
    )


@pytest.mark.usefixtures("patient")
def test_a_terminal_that_is_gone_stops_nothing() -> None:
    with Screen(Console(file=Gone())) as screen:
        screen.say("one")
        screen.say("two")


@pytest.mark.usefixtures("patient")
def test_what_cannot_be_shown_is_raised_by_who_shows_it() -> None:
    screen = Screen(Console(file=io.StringIO()))
    with pytest.raises(TypeError):
        screen.say("one", end=1)  # type: ignore[arg-type]
