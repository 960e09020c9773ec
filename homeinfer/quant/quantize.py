"""One GGUF in, a smaller one out: checks first, then llama.cpp's quantizer in a process of its own.

The output is written under a temporary name beside the destination and renamed when it is complete,
so a failure at any moment leaves the source and the destination as they were, and nothing else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import msgspec

import homeinfer
from homeinfer.errors import HomeinferError
from homeinfer.model.ggml_types import TYPE_NUMBERS
from homeinfer.model.header import TYPE_SIZES, Header, printable, read_header
from homeinfer.quant.recipes import PlannedTensor, Recipe, misfit_note, plan, recipe_for, recipe_info
from homeinfer.quant.worker import GO, Failed, Message, Planned, Request, Started

_ALIGNMENT = 32
"""Bytes; llama.cpp pads tensor data so, whatever `general.alignment` the source has."""


class Progress(msgspec.Struct, frozen=True):
    """Tensor number `index` of `count`, from 1, is next; the `fraction` of all weights is done."""

    index: int
    count: int
    tensor: str
    fraction: float


class QuantizeResult(msgspec.Struct, frozen=True):
    """What was written: bytes of the file, bits per weight of its tensors, seconds it took."""

    path: str
    recipe: str
    size_bytes: int
    bpw: float
    seconds: float
    notes: tuple[str, ...]


def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: str | Recipe,
    *,
    requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Write `source` (any part, when it is split) to `destination` as the recipe says.

    Raises HomeinferError for whatever is wrong before, during or after; KeyboardInterrupt and what
    on_progress raises pass through.
    """
    began = time.monotonic()
    if isinstance(recipe, str):
        _refuse_imatrix(recipe_info(recipe).needs_imatrix, recipe)
    header = read_header(source)
    made = recipe_for(recipe, header) if isinstance(recipe, str) else recipe
    target = _checked_destination(Path(destination), header, force)
    partial = target.with_name(f".homeinfer-{secrets.token_hex(4)}.partial")
    request = _request(header, made, partial, requantize, threads)
    with _Quantizer(request, Path(header.files[0].path), target, partial) as quantizer:
        planned = quantizer.plan()
        _refuse_imatrix(planned.needs_imatrix, made.name)
        tensors = _checked_plan(header, planned, made, requantize)
        _require_space(target, header, tensors)
        quantizer.run(_progress(header, planned, on_progress))
        _require_complete(partial, target, tensors)
        size = _publish(partial, target)
    return QuantizeResult(
        path=os.fspath(destination),
        recipe=made.name,
        size_bytes=size,
        bpw=round(8 * sum(tensor.bytes for tensor in tensors) / header.n_weights, 4),
        seconds=round(time.monotonic() - began, 3),
        notes=made.notes + _notes(header, planned, made),
    )


class _Quantizer:
    """The worker process. Leaving the context ends it and removes the partial file, if still there."""

    def __init__(self, request: Request, source: Path, target: Path, partial: Path) -> None:
        self._source, self._target, self._partial = source, target, partial
        # -P with the package's own folder: what lies in the working directory must not be imported
        paths = [str(Path(homeinfer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "homeinfer.quant.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "GGML_NO_BACKTRACE": "1"},
        )
        self._request = msgspec.json.encode(request) + b"\n"

    def __enter__(self) -> _Quantizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        try:
            self._process.communicate()
        finally:
            self._partial.unlink(missing_ok=True)

    def plan(self) -> Planned:
        """llama.cpp's dry run: what it would write."""
        self._send(self._request)
        message = self._receive()
        if not isinstance(message, Planned):
            reason = message.reason if isinstance(message, Failed) else "no plan came"
            raise HomeinferError(f"{_name(self._source)}: llama.cpp can't quantize this model: {reason}")
        return message

    def run(self, on_started: Callable[[Started], None]) -> None:
        """Quantize; returns when the partial file is written."""
        self._send(GO)
        while isinstance(message := self._receive(), Started):
            on_started(message)
        if isinstance(message, Failed):
            if "iostream error" in message.reason:
                raise _not_written(self._target)
            raise HomeinferError(f"{_name(self._source)}: quantizing failed: {message.reason}")

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
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
        return HomeinferError(f"{_name(self._source)}: {why}")


def _request(header: Header, recipe: Recipe, partial: Path, requantize: bool, threads: int | None) -> Request:
    metadata: dict[str, str | int] = {"homeinfer.recipe": recipe.name} if recipe.overrides else {}
    if any(file.alignment != _ALIGNMENT for file in header.files):
        # llama.cpp copies the key but aligns to 32: the file would be unreadable
        metadata["general.alignment"] = _ALIGNMENT
    return Request(
        source=os.fsencode(header.files[0].path),
        output=os.fsencode(partial),
        ftype=recipe.ftype,
        copy=recipe.copy,
        requantize=requantize,
        threads=threads or _usable_cores(),
        overrides=tuple((_exactly(name), TYPE_NUMBERS[type_name]) for name, type_name in recipe.overrides),
        metadata=metadata,
    )


def _exactly(name: str) -> str:
    """A regular expression (ECMAScript, as std::regex reads it) for this name and no other."""
    return "^" + "".join(f"\\{char}" if char in r"^$\.*+?()[]{}|" else char for char in name) + "$"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_imatrix(needed: bool, recipe: str) -> None:
    if needed:
        raise HomeinferError(
            f"recipe {recipe.upper()} needs an importance matrix (imatrix), which homeinfer can't use yet; "
            "the smallest recipe that needs none is Q2_K"
        )


def _checked_destination(destination: Path, header: Header, force: bool) -> Path:
    """The file to write, symbolic links followed."""
    name = _name(destination)
    target = Path(os.path.realpath(destination))
    try:
        if target.is_dir():
            raise HomeinferError(f"{name}: this is a directory; name the file to write")
        if not target.parent.is_dir():
            raise HomeinferError(f"{name}: the folder {_name(target.parent)} does not exist; create it first")
        if target.exists():
            if any(target.samefile(file.path) for file in header.files):
                raise HomeinferError(f"{name}: this is the source itself; name another file to write")
            if not target.is_file():
                raise HomeinferError(f"{name}: this is not a regular file; name another one to write")
            if not force:
                raise HomeinferError(f"{name}: the file exists already; --force overwrites it")
    except OSError as error:
        raise HomeinferError(f"{name}: {error.strerror}; name another file to write") from None
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise HomeinferError(f"{name}: no permission to write in {_name(target.parent)}; choose another folder")
    return target


def _checked_plan(header: Header, planned: Planned, recipe: Recipe, requantize: bool) -> tuple[PlannedTensor, ...]:
    source = _name(Path(header.files[0].path))
    if {name for name, _ in planned.types} != {tensor.name for tensor in header.tensors}:
        raise HomeinferError(f"{source}: llama.cpp reads other tensors in this file; convert the model again")
    tensors = plan(header, planned.types)
    if requantize or recipe.copy:
        return tensors
    lossy = _requantized_types(header, planned)
    if lossy:
        raise HomeinferError(
            f"{source}: this model is quantized already ({', '.join(lossy)}); take its F16 or BF16 original, "
            "or quantize it once more with --requantize and lose some quality"
        )
    if all(old.type == new.type for old, new in zip(header.tensors, tensors, strict=True)):
        raise HomeinferError(f"{source}: every tensor has the type that {recipe.name} gives it already")
    return tensors


def _requantized_types(header: Header, planned: Planned) -> dict[str, int]:
    """Quantized types that become another type, with the number of their tensors."""
    chosen = dict(planned.types)
    changed = (tensor.type for tensor in header.tensors if tensor.type != chosen[tensor.name])
    return dict(Counter(old for old in changed if TYPE_SIZES[old][0] > 1))


def _notes(header: Header, planned: Planned, recipe: Recipe) -> tuple[str, ...]:
    chosen = dict(planned.types)
    notes = []
    if planned.misfits:
        notes.append(misfit_note((wanted, chosen[name]) for name, wanted in planned.misfits))
    kept = [name for name, type_name in recipe.overrides if chosen.get(name) != type_name]
    if kept:
        notes.append(f"llama.cpp chose another type than the recipe for {len(kept)} tensors: {', '.join(kept[:3])}…")
    lossy = _requantized_types(header, planned)
    if lossy:
        counts = ", ".join(f"{count} {old}" for old, count in lossy.items())
        notes.append(f"warning: quantized twice ({counts} before): the F16 or BF16 original gives a better model")
    return tuple(notes)


def _require_space(target: Path, header: Header, tensors: tuple[PlannedTensor, ...]) -> None:
    needed = sum(-(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)
    needed += sum(file.data_offset for file in header.files)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise HomeinferError(
            f"{_name(target)}: the disk is too full: {_size(needed)} are needed, {_size(free)} are free; "
            "free some space or choose a smaller recipe"
        )


def _progress(
    header: Header, planned: Planned, on_progress: Callable[[Progress], None] | None
) -> Callable[[Started], None]:
    weights = {tensor.name: tensor.n_weights for tensor in header.tensors}
    done = [0, *accumulate(weights[name] for name, _ in planned.types)]

    def started(message: Started) -> None:
        if on_progress is not None:
            fraction = done[message.index - 1] / max(done[-1], 1)
            on_progress(Progress(message.index, message.count, message.name, fraction))

    return started


def _require_complete(partial: Path, target: Path, tensors: tuple[PlannedTensor, ...]) -> None:
    """llama.cpp's stream does not report every failed write, so the file itself is asked."""
    try:
        written = {tensor.name: tensor.type for tensor in read_header(partial).tensors}
    except HomeinferError:
        raise _not_written(target) from None
    if written != {tensor.name: tensor.type for tensor in tensors}:
        raise HomeinferError(f"{_name(target)}: llama.cpp wrote other types than it planned; report this as a bug")


def _publish(partial: Path, target: Path) -> int:
    """Give the complete file its name, with its data on the disk before; returns its size in bytes."""
    try:
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        partial.replace(target)
    except OSError as error:
        raise HomeinferError(f"{_name(target)}: cannot be written: {error.strerror}; try another folder") from None
    return size


def _not_written(target: Path) -> HomeinferError:
    free = _size(shutil.disk_usage(target.parent).free)
    return HomeinferError(
        f"{_name(target)}: writing failed half-way, with {free} free on the disk: free some space, or "
        "raise the limit on file sizes (ulimit -f)"
    )


def _name(path: Path) -> str:
    return printable(str(path), 1000)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
