"""The parent's side of the worker process: it starts early, gets one request, and never outlives its context."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

import homeinfer
from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_NUMBERS
from homeinfer.model.header import Header, printable
from homeinfer.quant.checks import path_name, size_text
from homeinfer.quant.importance import Importance
from homeinfer.quant.output_header import added_metadata
from homeinfer.quant.quantizer_messages import GO, Failed, Message, Planned, Request, Started
from homeinfer.quant.recipes import Recipe
from homeinfer.quant.weights_check import broken_tensor, unwritable_tensor

_BROKEN = re.compile(r"tensor '(.+)' has invalid data")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantize_request(
    header: Header,
    recipe: Recipe,
    partial: Path | None = None,
    *,
    source: str | None = None,
    importance: Importance | None = None,
    requantize: bool = False,
    threads: int | None = None,
) -> Request:
    """What the worker is to do; source is the first file's path where it is not the header's own."""
    entries = importance.values.items() if importance is not None else ()
    return Request(
        source=os.fsencode(source or header.files[0].path),
        output=os.fsencode(partial) if partial else b"",
        ftype=recipe.ftype,
        copy=recipe.copy,
        requantize=requantize,
        threads=threads or usable_cores(),
        overrides=tuple((_exactly(name), TYPE_NUMBERS[type_name]) for name, type_name in recipe.overrides),
        metadata=added_metadata(header, recipe, importance),
        imatrix=tuple((name, values.size) for name, values in entries),
    )


class Quantizer:
    """The worker process. Leaving the context ends it and removes the partial file, if still there.

    It loads llama.cpp while the caller still reads and checks: start it first.
    """

    def __init__(self) -> None:
        self._partial: Path | None = None
        self._source = ""
        # -P with the package's own folder: what lies in the working directory must not be imported
        paths = [str(Path(homeinfer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "homeinfer.quant.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "GGML_NO_BACKTRACE": "1"},
        )

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        try:
            self._process.communicate()
        finally:
            if self._partial is not None:
                self._partial.unlink(missing_ok=True)

    def plan(self, request: Request, source: str, importance: Importance | None = None) -> Planned:
        """llama.cpp's dry run: what it would write. source is the file's name for messages."""
        self._source = source
        self._partial = Path(os.fsdecode(request.output)) if request.output else None
        self._send(msgspec.json.encode(request) + b"\n")
        for values in importance.values.values() if importance is not None else ():
            self._send(values.astype("=f4", copy=False).tobytes())
        message = self._receive()
        if not isinstance(message, Planned):
            reason = message.reason if isinstance(message, Failed) else "no plan came"
            raise HomeinferError(f"{source}: llama.cpp can't quantize this model: {reason}")
        return message

    def run(self, target: Path, on_started: Callable[[Started], None]) -> None:
        """Quantize; returns when the partial file is written."""
        self._send(GO)
        while isinstance(message := self._receive(), Started):
            on_started(message)
        if isinstance(message, Failed):
            raise self._failure(message, target)

    def _failure(self, message: Failed, target: Path) -> HomeinferError:
        if "iostream error" in message.reason:
            return not_written(target)
        if match := _BROKEN.search(message.reason):
            return broken_tensor(self._source, match[1])
        if "data validation failed" in message.reason:
            return unwritable_tensor(self._source, message.tensor)
        return HomeinferError(f"{self._source}: quantizing failed: {message.reason}")

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def _receive(self) -> Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        message: Message = msgspec.json.decode(line, type=Message)
        return message

    def _death(self) -> HomeinferError:
        """Why the worker ended without a last message: its signal, and what llama.cpp said on stderr."""
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        status = self._process.wait()
        if status == -getattr(signal, "SIGKILL", 0):
            why = "the quantizer was killed, by someone or because memory ran out; run it again"
        elif status == -getattr(signal, "SIGBUS", 0):
            why = "reading the file failed half-way: it was cut short meanwhile, or its disk is damaged"
        else:
            end = signal.Signals(-status).name if status < 0 else f"status {status}"
            asserted = [line[line.index("GGML_ASSERT") :] for line in said if "GGML_ASSERT" in line]
            last = (asserted or said or ["no reason given"])[-1]
            why = f"llama.cpp can't quantize this model, it ended with {end}: {printable(last.strip())}"
        return HomeinferError(f"{self._source}: {why}")


def not_written(target: Path) -> HomeinferError:
    """The error for a write that failed; says how much room the disk has."""
    free = size_text(shutil.disk_usage(target.parent).free)
    return HomeinferError(
        f"{path_name(target)}: writing failed half-way, with {free} free on the disk: free some space, or "
        "raise the limit on file sizes (ulimit -f)"
    )


def _exactly(name: str) -> str:
    """A regular expression (ECMAScript, as std::regex reads it) for this name and no other."""
    return "^" + "".join(f"\\{char}" if char in r"^$\.*+?()[]{}|" else char for char in name) + "$"
