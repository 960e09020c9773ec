"""A process in which llama.cpp runs: it ends its process on what it dislikes, and that must be one line here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import homeinfer
from homeinfer.errors import HomeinferError
from homeinfer.model.records import printable


class Child:
    """`python -m module`, with lines going in and out. `end` it in any case.

    subject: what an error is about, the model's file in most cases; may change while it runs. verb: what llama.cpp does
    with a model there ("run", "quantize"); name: what the process is called when someone killed it.
    """

    def __init__(
        self, module: str, *, verb: str, name: str, subject: str = "", environment: Mapping[str, str] = os.environ
    ) -> None:
        self.subject = subject
        self._verb, self._name = verb, name
        # -P with the package's own folder: what lies in the working directory must not be imported
        paths = [str(Path(homeinfer.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe could fill up and stop the child)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "GGML_NO_BACKTRACE": "1"},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, data: bytes) -> None:
        """Raises HomeinferError that says why the process ended, if it has."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def receive(self) -> bytes:
        """The next line it writes; HomeinferError that says why the process ended, if it has."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        return line

    def end(self) -> None:
        """Kill it, wait for it. Safe to call twice."""
        self._process.kill()
        try:
            with contextlib.suppress(OSError, ValueError):  # what it was not sent yet can't be sent any more
                self._process.communicate()
        finally:
            self._stderr.close()

    def _death(self) -> HomeinferError:
        """Why the process ended without a last message: its signal, and what llama.cpp said on stderr."""
        status = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        if status == -getattr(signal, "SIGKILL", 0):
            why = f"{self._name} was killed, by someone or because memory ran out; run it again"
        elif status == -getattr(signal, "SIGBUS", 0):
            why = "reading the file failed half-way: it was cut short meanwhile, or its disk is full or damaged"
        else:
            end = signal.Signals(-status).name if status < 0 else f"status {status}"
            asserted = [line[line.index("GGML_ASSERT") :] for line in said if "GGML_ASSERT" in line]
            last = (asserted or said or ["no reason given"])[-1]
            why = f"llama.cpp can't {self._verb} this model, it ended with {end}: {printable(last.strip())}"
        return HomeinferError(f"{self.subject}: {why}")
