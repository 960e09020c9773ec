"""Write window files: copied by the kernel where it can, atomic, reused when already there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import gguf
import msgspec
import numpy as np

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, ValueType
from homeinfer.model.window_plan import PlannedTensor, WindowPlan, plan_window

ALIGNMENT = 4096
"""Every tensor starts on a page, so a layer can be mapped, advised and dropped by itself."""

_FORMAT = 1
_FLOAT = np.dtype(np.float32)
_CHUNK = 16 << 20
_NOT_HERE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}

Progress = Callable[[int], None]
"""Called with the bytes copied since the last call."""


def window_path(header: Header, first: int, last: int, folder: Path) -> Path:
    """The file that layers [first, last) of this very model have: the name holds a digest of what the
    window says and holds, and of the source's sizes and modification times. Raises HomeinferError when it is gone."""
    try:
        sources = [(f.size, Path(f.path).stat().st_mtime_ns) for f in header.files]
    except OSError as problem:
        raise HomeinferError(f"{problem.filename} can't be read any more: {problem.strerror}") from problem
    said = msgspec.json.encode((_FORMAT, sources, plan_window(header, first, last)), enc_hook=str)
    stem = Path(header.files[0].path).stem[:60]
    return folder / f"{stem}-{hashlib.sha256(said).hexdigest()[:16]}-{first}-{last}.gguf"


def cut_windows(
    header: Header, windows: tuple[tuple[int, int], ...], folder: Path, progress: Progress | None = None
) -> list[Path]:
    """Write the window files of one model that are not there yet, and say where each is.

    Raises HomeinferError when the disk has too little room (checked before the first byte), when
    the source is cut short, or when writing fails; no file of this call stays then.
    """
    if header.truncated:
        raise HomeinferError(f"{header.files[0].path} is cut short: it can't be cut into windows; get it again")
    paths = [window_path(header, first, last, folder) for first, last in windows]
    missing = [
        (plan_window(header, first, last), path)
        for (first, last), path in zip(windows, paths, strict=True)
        if not path.is_file()
    ]
    if missing:
        _make_folder(folder)
        _check_room(folder, sum(plan.nbytes + ALIGNMENT * len(plan.tensors) for plan, _ in missing))
    for number, (plan, path) in enumerate(missing):
        try:
            write_window(header, plan, path, progress)
        except HomeinferError:
            for _, written in missing[:number]:
                written.unlink(missing_ok=True)
            raise
    return paths


def missing_bytes(header: Header, windows: tuple[tuple[int, int], ...], folder: Path) -> int:
    """Bytes that `cut_windows` would copy."""
    return sum(
        plan_window(header, first, last).nbytes
        for first, last in windows
        if not window_path(header, first, last, folder).is_file()
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HomeinferError(
            f"{folder} can't be made for window files ({problem.strerror}): set HOMEINFER_WINDOWS to another folder"
        ) from problem


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HomeinferError(
            f"window files need {needed / 1e6:,.0f} MB in {folder}, which has {free / 1e6:,.0f} MB free: "
            "make room there or set HOMEINFER_WINDOWS to another folder"
        )


def write_window(header: Header, plan: WindowPlan, path: Path, progress: Progress | None = None) -> None:
    """Write one planned window to `path`, which appears only when it is whole.

    Raises HomeinferError when it can't be written, leaving nothing behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        start = _write_header(plan, Path(name))
        with Path(name).open("r+b") as target, contextlib.ExitStack() as stack:
            sources = [stack.enter_context(Path(f.path).open("rb")) for f in header.files]
            for tensor, offset in _placed(plan.tensors, start):
                if tensor.source is None:
                    _fill(target, offset, tensor)
                elif tensor.factor != 1.0:
                    _scale(sources[tensor.source.file], target, offset, tensor)
                else:
                    source = sources[tensor.source.file]
                    _copy(source.fileno(), tensor.source.offset, target.fileno(), offset, tensor.nbytes, progress)
            target.truncate(_end(plan.tensors, start))
            os.fsync(target.fileno())
        Path(name).replace(path)
    except OSError as problem:
        raise HomeinferError(f"{path} can't be written: {problem.strerror or problem}") from problem
    finally:
        Path(name).unlink(missing_ok=True)


def _write_header(plan: WindowPlan, path: Path) -> int:
    """Metadata and tensor table by gguf-py; returns where the data begins."""
    values = dict(plan.metadata)
    architecture = str(values.pop("general.architecture").value)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(ALIGNMENT)
    for key, value in values.items():
        item = None if value.item is None else gguf.GGUFValueType(int(value.item))
        plain: Any = value.value
        if value.type == ValueType.ARRAY and not plain:
            continue
        writer.add_key_value(key, plain, gguf.GGUFValueType(int(value.type)), sub_type=item)
    for tensor in plan.tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        # the dtype only decides how gguf-py reads the shape: as weights for any but uint8
        writer.add_tensor_info(tensor.name, tensor.shape[::-1], _FLOAT, tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return _aligned(path.stat().st_size)


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _placed(tensors: tuple[PlannedTensor, ...], start: int) -> Iterator[tuple[PlannedTensor, int]]:
    for tensor in tensors:
        yield tensor, start
        start += _aligned(tensor.nbytes)


def _end(tensors: tuple[PlannedTensor, ...], start: int) -> int:
    return start + sum(_aligned(t.nbytes) for t in tensors)


def _fill(target: IO[bytes], offset: int, tensor: PlannedTensor) -> None:
    """Zeros stay a hole in the file."""
    if tensor.fill:
        target.seek(offset)
        target.write(np.full(math.prod(tensor.shape), tensor.fill, _FLOAT).tobytes())
        target.flush()


def _scale(source: IO[bytes], target: IO[bytes], offset: int, tensor: PlannedTensor) -> None:
    """A copy of a small F32 tensor times its factor."""
    assert tensor.source is not None
    source.seek(tensor.source.offset)
    values = np.frombuffer(source.read(tensor.nbytes), _FLOAT)
    if values.nbytes != tensor.nbytes:
        raise OSError(errno.EIO, "the source ended early")
    target.seek(offset)
    target.write((values * np.float32(tensor.factor)).tobytes())
    target.flush()


def _copy(source: int, at: int, target: int, to: int, count: int, progress: Progress | None) -> None:
    """Copy bytes between files inside the kernel (shared blocks where the file system can), else by hand."""
    by_kernel = hasattr(os, "copy_file_range")
    while count:
        n = 0
        if by_kernel:
            try:
                n = os.copy_file_range(source, target, min(count, _CHUNK), at, to)
            except OSError as problem:
                if problem.errno not in _NOT_HERE:
                    raise
            by_kernel = n > 0
        if not n:
            n = _copy_by_hand(source, at, target, to, min(count, _CHUNK))
        at, to, count = at + n, to + n, count - n
        if progress is not None:
            progress(n)


def _copy_by_hand(source: int, at: int, target: int, to: int, count: int) -> int:
    os.lseek(source, at, os.SEEK_SET)
    data = os.read(source, count)
    if not data:
        raise OSError(errno.EIO, "the source ended early")
    os.lseek(target, to, os.SEEK_SET)
    return os.write(target, data)
