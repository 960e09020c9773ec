"""What is shown while an answer's first word is waited for."""

from __future__ import annotations

import io

from rich.console import Console

from homeinfer.chat.reading import Reading
from tests.support.processes import wait_until

LINE = "waiting for the first word"


def test_a_wait_is_said_on_a_terminal_and_taken_back() -> None:
    screen = io.StringIO()
    with Reading(Console(file=screen, force_terminal=True), after=0.0) as reading:
        wait_until(lambda: LINE in screen.getvalue())
        reading.done()
        reading.done()
    assert "\x1b[2K" in screen.getvalue().rsplit(LINE, 1)[1]


def test_nothing_is_said_elsewhere_or_where_the_word_comes_at_once() -> None:
    for is_terminal, after in ((False, 0.0), (True, 60.0)):
        screen = io.StringIO()
        with Reading(Console(file=screen, force_terminal=is_terminal), after):
            pass
        assert LINE not in screen.getvalue()
