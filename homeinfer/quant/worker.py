"""The process that runs llama_model_quantize, which ends its process on what it dislikes.

Started as `python -m homeinfer.quant.worker`. One Request comes in on stdin, one JSON line, and behind it
the imatrix as float32 values of this machine's byte order; out go
Messages on stdout, one JSON line each: Planned, and after the line GO on stdin a Started for each
tensor and Finished, or Failed at any point. From GO on the parent ends the worker by killing it, when
the output has its final name; when stdin ends before, the parent is gone, and the worker removes what
it wrote and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.quant.quantizer_messages import GO, Failed, Finished, Message, Planned, Request, Started
from homeinfer.quant.to_parent import open_to_parent

_LOG_LEVEL_ERROR = 4
_BUFFER_BYTES = 1 << 30
"""Rows of a tensor held in memory at once. llama.cpp's own 8 GiB is half of a home machine."""
_TENSOR_LINE = re.compile(r"\[ *(\d+)/ *(\d+)\] (.+?) +- \[.*\], type = +(\S+), ")
_SIZE_LINE = re.compile(r"size = .*?MiB(?: -> .*\((\w+)\))?\n")
_MISFIT_LINE = re.compile(r"warning: (.+?) +- ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\) ")
_FLOAT_BYTES = 4
_keep: list[object] = []
"""llama.cpp may call a log callback for as long as the process lives."""


class QuantizeLog:
    """What llama_model_quantize says only in its log."""

    def __init__(self, started: Callable[[Started], None] | None = None) -> None:
        self.types: list[tuple[str, str]] = []
        self.misfits: list[tuple[str, str]] = []
        self.needs_imatrix = False
        self._started = started
        self._errors: list[str] = []
        self._tensor = ("", "")

    def feed(self, level: int, text: str) -> None:
        """One call of the log callback: mostly a line, sometimes a part of one."""
        if match := _TENSOR_LINE.match(text):
            self._tensor = (match[3], match[4].upper())
            if self._started is not None:
                self._started(Started(int(match[1]), int(match[2]), match[3]))
        elif match := _SIZE_LINE.match(text):
            name, source_type = self._tensor
            self.types.append((name, (match[1] or source_type).upper()))
        elif match := _MISFIT_LINE.match(text):
            self.misfits.append((match[1], match[2].upper()))
        elif "will require an imatrix" in text:
            self.needs_imatrix = True
        elif level == _LOG_LEVEL_ERROR and text.strip():
            self._errors.append(" ".join(text.split()))

    def failure(self) -> Failed:
        """llama.cpp's last word, which is what made it give up."""
        reason = self._errors[-1].rpartition("failed to quantize: ")[2] if self._errors else "no reason given"
        return Failed(reason, self._tensor[0])


def _parameters(llama: Any, request: Request, values: bytearray, dry_run: bool) -> Any:
    params = llama.llama_model_quantize_default_params()
    params.nthread = request.threads
    params.ftype = request.ftype
    params.only_copy = request.copy
    params.allow_requantize = request.requantize
    params.dry_run = dry_run
    params.max_buf_size = _BUFFER_BYTES
    if request.overrides:
        types = (llama.llama_model_tensor_override * (len(request.overrides) + 1))()
        for slot, (pattern, type_number) in zip(types, request.overrides, strict=False):
            slot.pattern, slot.type = pattern.encode(), type_number
        params.tt_overrides = types
    if request.metadata:
        pairs = (llama.llama_model_kv_override * (len(request.metadata) + 1))()
        for pair, (key, value) in zip(pairs, request.metadata.items(), strict=False):
            pair.key = key.encode()
            if isinstance(value, str):
                pair.tag, pair.value.val_str = llama.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
            else:
                pair.tag, pair.value.val_i64 = llama.LLAMA_KV_OVERRIDE_TYPE_INT, value
        params.kv_overrides = pairs
    if request.imatrix:
        params.imatrix = _imatrix(llama, request, values)
    return params


def _imatrix(llama: Any, request: Request, values: bytearray) -> Any:
    """llama_model_imatrix_data that points into values, ended by an empty one."""
    entries = (llama.llama_model_imatrix_data * (len(request.imatrix) + 1))()
    offset = 0
    for entry, (name, count) in zip(entries, request.imatrix, strict=False):
        entry.name, entry.size = name.encode("utf-8", "surrogateescape"), count
        entry.data = ctypes.pointer(ctypes.c_float.from_buffer(values, offset))
        offset += count * _FLOAT_BYTES
    return entries


def run_quantizer(request: Request, log: QuantizeLog, dry_run: bool, values: bytearray | None = None) -> bool:
    """Whether llama_model_quantize succeeded; a dry run reads no weights and writes nothing. values are the
    imatrix's."""
    llama = runtime.llama()

    @llama.llama_log_callback  # type: ignore[untyped-decorator]
    def feed(level: int, text: bytes, _user: object) -> None:
        log.feed(level, text.decode("utf-8", "replace"))

    _keep.append(feed)
    llama.llama_log_set(feed, ctypes.c_void_p(0))
    params = _parameters(llama, request, values or bytearray(), dry_run)
    return bool(llama.llama_model_quantize(request.source, request.output, ctypes.byref(params)) == 0)


def _end_with_parent(output: bytes) -> None:
    """Runs in a thread: the parent holds stdin open for as long as it lives and wants the file."""
    while os.read(0, 4096):
        pass
    Path(os.fsdecode(output)).unlink(missing_ok=True)
    os._exit(1)


def _read_values(stdin: io.BufferedReader, count: int) -> bytearray:
    values = bytearray(count * _FLOAT_BYTES)
    rest = memoryview(values)
    while rest and (got := stdin.readinto(rest)):
        rest = rest[got:]
    return values


def _work(send: Callable[[Message], None]) -> None:
    with contextlib.suppress(HomeinferError):
        runtime.llama()  # while the parent still reads and checks; what fails here fails again below
    stdin = sys.stdin.buffer
    assert isinstance(stdin, io.BufferedReader)
    line = stdin.readline()
    if not line.endswith(b"\n"):
        return
    request = msgspec.json.decode(line, type=Request)
    values = _read_values(stdin, sum(count for _, count in request.imatrix))
    plan = QuantizeLog()
    if not run_quantizer(request, plan, True, values):
        send(plan.failure())
        return
    send(Planned(tuple(plan.types), tuple(plan.misfits), plan.needs_imatrix))
    if stdin.readline() != GO:
        return
    parent = threading.Thread(target=_end_with_parent, args=(request.output,), daemon=True)
    parent.start()
    log = QuantizeLog(started=send)
    send(Finished() if run_quantizer(request, log, False, values) else log.failure())
    parent.join()


def _skip_package_start() -> None:
    """llama_cpp's low-level module without what its package imports beside it: numpy, jinja2 and more take as
    long as the quantizer's own start."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is not None and spec.submodule_search_locations is not None:
        package = importlib.util.module_from_spec(spec)
        sys.modules["llama_cpp"] = package


def main() -> None:
    send = open_to_parent()
    _skip_package_start()
    try:
        _work(send)
    except HomeinferError as error:
        send(Failed(str(error)))


if __name__ == "__main__":
    main()
