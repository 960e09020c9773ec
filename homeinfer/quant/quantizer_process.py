"""The parent's side of the worker process: it starts early, gets one request, and never outlives its context."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from homeinfer.engine.child import Child
from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_NUMBERS
from homeinfer.model.header import Header
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
        self._child = Child("homeinfer.quant.worker", verb="quantize", name="the quantizer")

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._child.end()
        finally:
            if self._partial is not None:
                self._partial.unlink(missing_ok=True)

    def plan(self, request: Request, source: str, importance: Importance | None = None) -> Planned:
        """llama.cpp's dry run: what it would write. source is the file's name for messages."""
        self._child.subject = source
        self._partial = Path(os.fsdecode(request.output)) if request.output else None
        self._child.send(msgspec.json.encode(request) + b"\n")
        for values in importance.values.values() if importance is not None else ():
            self._child.send(values.astype("=f4", copy=False).tobytes())
        message = self._receive()
        if not isinstance(message, Planned):
            reason = message.reason if isinstance(message, Failed) else "no plan came"
            raise HomeinferError(f"{source}: llama.cpp can't quantize this model: {reason}")
        return message

    def run(self, target: Path, on_started: Callable[[Started], None]) -> None:
        """Quantize; returns when the partial file is written."""
        self._child.send(GO)
        while isinstance(message := self._receive(), Started):
            on_started(message)
        if isinstance(message, Failed):
            raise self._failure(message, target)

    def _failure(self, message: Failed, target: Path) -> HomeinferError:
        if "iostream error" in message.reason:
            return not_written(target)
        if match := _BROKEN.search(message.reason):
            return broken_tensor(self._child.subject, match[1])
        if "data validation failed" in message.reason:
            return unwritable_tensor(self._child.subject, message.tensor)
        return HomeinferError(f"{self._child.subject}: quantizing failed: {message.reason}")

    def _receive(self) -> Message:
        message: Message = msgspec.json.decode(self._child.receive(), type=Message)
        return message


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
