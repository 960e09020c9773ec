"""The engine process of a device: sets up, loads windows, serves one ring after the other, and leaves.

The same code whether the other devices are on this machine or not. llama.cpp ends the process on what it
dislikes, so this is a process of its own and its supervisor reports the end. It leaves when its standard
input closes: with the supervisor, however that ended.

    python -m homeinfer.cluster.engine    (lines of engine_messages on stdin and stdout)
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import NoReturn

import msgspec

from homeinfer.cluster.device import Device
from homeinfer.cluster.engine_messages import (
    BEAT_SECONDS,
    Beat,
    Failed,
    FromEngine,
    Joined,
    Listening,
    Loading,
    Ready,
    Routes,
    Setup,
)
from homeinfer.cluster.wire.transport import Links
from homeinfer.engine.streaming import Streamer
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError
from homeinfer.memory import give_back

_FRAME_SLACK = 1 << 20
"""Beside its rows a message has a header, and a grammar may be in it."""


class _Supervisor:
    """The lines to and from whoever started this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def say(self, message: FromEngine) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
            sys.stdout.buffer.flush()

    def hear(self) -> bytes:
        return sys.stdin.buffer.readline()

    def obey(self, listen: str, ordered: deque[Routes], links: Links) -> None:
        """Take in what comes on stdin, and end this process with it, even in the middle of a computation."""
        for line in sys.stdin.buffer:
            try:
                ordered.append(msgspec.json.decode(line, type=Routes))
            except msgspec.MsgspecError as problem:
                self.say(Failed(f"the engine was given what it can't read: {problem}"))
                break
            links.wake()
        remove_sockets(listen)
        os._exit(0)

    def beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.say(Beat())


def remove_sockets(listen: str) -> None:
    """Unlink the files of a local ring whose head has left, and their folder, which was made for them."""
    if listen.startswith("ipc://"):
        folder = Path(listen.removeprefix("ipc://")).parent
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if path.is_socket():
                    path.unlink(missing_ok=True)
            folder.rmdir()


def load_windows(setup: Setup, supervisor: _Supervisor) -> list[LayerWindow]:
    """Load all windows, telling the supervisor how far it is. Raises HomeinferError."""
    streamer = Streamer(setup.stream_bytes) if setup.stream_bytes else None
    windows: list[LayerWindow] = []
    last_said = 0.0

    def progress(share: float) -> bool:
        nonlocal last_said
        if time.monotonic() - last_said > 0.1:
            last_said = time.monotonic()
            supervisor.say(Loading((len(windows) + share) / len(setup.windows)))
        return True

    for spec in setup.windows:
        windows.append(LayerWindow(spec, progress, streamer))
    if streamer is not None:
        streamer.start()
    return windows


def serve(supervisor: _Supervisor) -> NoReturn:
    """Set up, load, and serve until stdin closes. Raises HomeinferError."""
    setup = msgspec.json.decode(supervisor.hear(), type=Setup)
    widest = max(spec.embedding_length for spec in setup.windows)
    rows = max(spec.n_batch for spec in setup.windows)
    prompt = max(spec.n_ctx for spec in setup.windows) * 4
    links = Links(setup.listen, setup.keys, max_bytes=max(rows * widest * 4, prompt) + _FRAME_SLACK)
    supervisor.say(Listening(links.address))
    ordered: deque[Routes] = deque()
    threading.Thread(target=supervisor.obey, args=(setup.listen, ordered, links), daemon=True).start()
    threading.Thread(target=supervisor.beat, daemon=True).start()
    windows = load_windows(setup, supervisor)
    give_back()
    gc.freeze()
    supervisor.say(Ready(windows[-1].n_vocab, all(w.can_shift for w in windows)))
    Device(setup, windows, links, ordered, lambda epoch: supervisor.say(Joined(epoch))).run()


def main() -> NoReturn:
    """Entry of the engine process."""
    supervisor = _Supervisor()
    try:
        serve(supervisor)
    except HomeinferError as problem:
        supervisor.say(Failed(str(problem)))
    except msgspec.MsgspecError as problem:
        supervisor.say(Failed(f"the engine was given what it can't read: {problem}"))
    except Exception:
        traceback.print_exc()  # the agent tells its last line
    # no tidy-up of llama.cpp: the process ends here, and its destructors have been seen to hang
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
