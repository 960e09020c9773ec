"""Start an engine process, follow what it says, and say how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import msgspec

from homeinfer.cluster.engine_messages import (
    Failed,
    FromEngine,
    Joined,
    Listening,
    Loading,
    Ready,
    Routes,
    Setup,
)
from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError

SILENCE_SECONDS = 30.0
"""An engine that gave no sign of life for so long (15 beats) is taken for hung."""


class EngineProcess:
    """One engine process and the last things it said. Its methods never block for long."""

    def __init__(self, setup: Setup, launch: tuple[str, ...] = ()) -> None:
        """Start it in an environment of its own (runtime.engine_environment), `launch` before its command."""
        self.setup = setup
        self.address: str | None = None
        self.ready: Ready | None = None
        self.joined: int | None = None
        """The epoch of the last Routes that it follows."""
        self.share = 0.0
        self._failed: str | None = None
        self._heard = time.monotonic()
        self._errors: deque[str] = deque(maxlen=40)
        self._process = subprocess.Popen(
            [*launch, sys.executable, "-m", "homeinfer.cluster.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=runtime.engine_environment(os.environ),
            start_new_session=True,  # a Ctrl-C in the terminal is the head's to deal with
        )
        self._readers = [
            threading.Thread(target=self._follow, daemon=True),
            threading.Thread(target=self._keep_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self._say(setup)

    @property
    def pid(self) -> int:
        return self._process.pid

    def route(self, routes: Routes) -> None:
        """Tell it where its messages go from now on; `joined` says when it follows."""
        self._say(routes)

    def _say(self, message: Setup | Routes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it is gone is what `problem` says
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        decoder = msgspec.json.Decoder(FromEngine)
        for line in self._process.stdout:
            self._heard = time.monotonic()
            with contextlib.suppress(msgspec.MsgspecError):
                match decoder.decode(line):
                    case Listening(address):
                        self.address = address
                    case Loading(share):
                        self.share = share
                    case Ready() as ready:
                        self.ready = ready
                    case Joined(epoch):
                        self.joined = epoch
                    case Failed(message):
                        self._failed = message

    def _keep_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line.decode("utf-8", "replace").strip())

    def problem(self) -> str | None:
        """Why this engine is of no more use, in one line, or None while it is."""
        name = f"{self.setup.name} ({_layers(self.setup)})"
        if self._process.poll() is not None:
            for reader in self._readers:
                reader.join(timeout=1)
            if self._failed is not None:
                return f"{name}: {self._failed}"
            return f"the engine of {name} ended: {self._last_words()}"
        if time.monotonic() - self._heard > SILENCE_SECONDS:
            return f"the engine of {name} has given no sign of life for {SILENCE_SECONDS:.0f} seconds"
        return None

    def _last_words(self) -> str:
        code = self._process.returncode
        told = [line for line in self._errors if "GGML_ASSERT" in line or "error" in line.lower()]
        if told:
            return told[-1]
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
        return self._errors[-1] if self._errors else f"exit code {code}"

    def check(self) -> None:
        """Raises HomeinferError when the engine is of no more use."""
        problem = self.problem()
        if problem is not None:
            raise HomeinferError(problem)

    def close(self) -> None:
        """End it: politely for a second, then not."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(timeout=1)


def _layers(setup: Setup) -> str:
    return "layers " + ", ".join(f"{w.first}-{w.last - 1}" for w in setup.windows)
