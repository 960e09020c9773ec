"""The engine process of a device: loads windows, takes batches from the ring, passes on what comes out.

The same code whether the other devices are on this machine or not. llama.cpp ends the process on what it
dislikes, so this is a process of its own and its supervisor reports the end. It leaves when its standard
input closes: with the supervisor, however that ended.

    python -m homeinfer.cluster.device    (lines of engine_messages on stdin and stdout)
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from homeinfer.cluster.engine_messages import (
    BEAT_SECONDS,
    Beat,
    Failed,
    FromEngine,
    Listening,
    Loading,
    Ready,
    Routes,
    Setup,
)
from homeinfer.cluster.wire.messages import Edits, Failure, Message, Spent, Step, Stop, decode, encode
from homeinfer.cluster.wire.transport import Links, send
from homeinfer.engine.window import LayerWindow
from homeinfer.errors import HomeinferError

_FRAME_SLACK = 1 << 16


class Device:
    """Windows and links of one engine, and what it does with each message."""

    def __init__(self, setup: Setup, windows: list[LayerWindow], links: Links, routes: Routes) -> None:
        self._setup = setup
        self._links = links
        self._hops = {hop.hop: (windows[hop.window], links.sender(hop.next)) for hop in routes.hops}

    def run(self) -> None:
        """Serve until a Stop comes."""
        while True:
            frames = self._links.receive()
            if frames is None:
                continue
            begin = time.perf_counter()
            try:
                message, rows = decode(frames)
                window, following = self._hops[message.hop]
            except (HomeinferError, KeyError):
                continue  # nothing of this ring: nobody to tell
            if message.epoch != self._setup.epoch:
                continue
            send(following, self._answer(message, rows, window, begin))
            if isinstance(message, Stop):
                return

    def _answer(self, message: Message, rows: Any, window: LayerWindow, begin: float) -> list[Any]:
        try:
            if isinstance(message, Step):
                return self._step(message, rows, window, begin)
            if isinstance(message, Edits):
                window.edit(message.edits)
        except HomeinferError as problem:
            return encode(Failure(message.epoch, message.step, message.hop + 1, self._setup.name, str(problem)))
        return encode(msgspec.structs.replace(message, hop=message.hop + 1))

    def _step(self, step: Step, rows: Any, window: LayerWindow, begin: float) -> list[Any]:
        if step.width != (0 if window.takes_tokens else window.n_embd):
            raise HomeinferError(f"rows of {step.width} numbers do not fit the window from layer {window.spec.first}")
        out = window.forward_bytes(step.n, step.index, rows)
        spent = Spent(window.computing * 1e6, (time.perf_counter() - begin) * 1e6)
        return encode(
            Step(step.epoch, step.step, step.hop + 1, step.n, window.width, step.index, spent=(*step.spent, spent)), out
        )


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

    def leave_with_it(self, listen: str) -> None:
        """End this process when stdin ends, even in the middle of a computation."""
        sys.stdin.buffer.read()
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
    windows: list[LayerWindow] = []
    last_said = 0.0

    def progress(share: float) -> bool:
        nonlocal last_said
        if time.monotonic() - last_said > 0.1:
            last_said = time.monotonic()
            supervisor.say(Loading((len(windows) + share) / len(setup.windows)))
        return True

    for spec in setup.windows:
        windows.append(LayerWindow(spec, progress))
    return windows


def serve(supervisor: _Supervisor) -> None:
    """Set up, load, and serve until the ring ends. Raises HomeinferError."""
    setup = msgspec.json.decode(supervisor.hear(), type=Setup)
    widest = max(spec.embedding_length for spec in setup.windows)
    rows = max(spec.n_batch for spec in setup.windows)
    links = Links(setup.listen, setup.keys, max_bytes=rows * widest * 4 + _FRAME_SLACK)
    supervisor.say(Listening(links.address))
    said = supervisor.hear()
    if not said:  # the supervisor has gone already
        links.close()
        remove_sockets(setup.listen)
        return
    routes = msgspec.json.decode(said, type=Routes)
    threading.Thread(target=supervisor.leave_with_it, args=(setup.listen,), daemon=True).start()
    threading.Thread(target=supervisor.beat, daemon=True).start()
    windows = load_windows(setup, supervisor)
    gc.freeze()
    supervisor.say(Ready(windows[-1].n_vocab, all(w.can_shift for w in windows)))
    Device(setup, windows, links, routes).run()
    links.close()


def main() -> NoReturn:
    """Entry of the engine process."""
    supervisor = _Supervisor()
    try:
        serve(supervisor)
    except HomeinferError as problem:
        supervisor.say(Failed(str(problem)))
    except msgspec.MsgspecError as problem:
        supervisor.say(Failed(f"the engine was given what it can't read: {problem}"))
    # no tidy-up of llama.cpp: the process ends here, and its destructors have been seen to hang
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
