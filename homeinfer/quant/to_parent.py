"""What a child process (engine.child.Child) tells its parent: messages, a JSON object a line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import msgspec


def open_to_parent() -> Callable[[msgspec.Struct], None]:
    """The function that sends a message; it raises BrokenPipeError where the parent is gone.

    Messages leave through a copy of stdout; whatever libraries print goes to stderr. Ctrl-C reaches every process of
    the terminal: what it means is the parent's to say.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: msgspec.Struct) -> None:
        out.write(msgspec.json.encode(message) + b"\n")
        out.flush()

    return send
