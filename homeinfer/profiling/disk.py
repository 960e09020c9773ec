"""How fast weights come from disk, asked for as engine/streaming.py does: past the page cache, several at a time."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from homeinfer.cluster.planning.profile import Disk
from homeinfer.engine.streaming import PIECE, READERS
from homeinfer.errors import HomeinferError
from homeinfer.folders import free_bytes

_MOST_BYTES = 512 << 20
_LEAST_BYTES = 32 << 20
_SECONDS = 1.5
"""Each of the three patterns is read for so long."""
_PASS = 128 << 20
_STREAMED = 192 << 20
"""Each token reads the same layers again: where something below caches (a host of virtual machines, a disk's own
memory) that is faster than a file's first time, and it is what streaming gets."""
_EXPERT = 2 << 20

if sys.platform == "darwin":
    import fcntl

Part = Callable[[float], None]


def measure_disk(
    folder: Path, model: Path | None = None, *, n_threads: int = 1, on_progress: Part = lambda _share: None
) -> Disk:
    """Read a file in `folder`, made for this where window files are kept: the model itself if it lies on the same
    disk, else a temporary file, which is gone afterwards. n_threads: how many compute, and so come to missing pages at
    once. Some 5 seconds.

    Raises HomeinferError when the folder can't be made or written, or has no room for 32 MB.
    """
    with _file_to_read(folder, model, lambda share: on_progress(share * 0.3)) as path:
        size = min(path.stat().st_size, 8 * _MOST_BYTES) // PIECE * PIECE
        with _opened(path) as files, ThreadPoolExecutor(READERS) as pool:
            read = _Reader(files, pool)
            sequential = _rate(lambda number: read(_from(number * _PASS % size, min(_PASS, size), size)))
            on_progress(0.55)
            layers = _from(0, min(_STREAMED, size), size)
            read(layers)
            layer = _rate(lambda _number: read(layers))
            on_progress(0.8)
        fault = min(_fault_rate(path, size, n_threads), layer)
        on_progress(1.0)
    return Disk(
        sequential_bytes_per_s=sequential,
        layer_bytes_per_s=layer,
        fault_bytes_per_s=fault,
        free_bytes=free_bytes(folder),
    )


class _Reader:
    """Reads pieces, as many at once as there are open files."""

    def __init__(self, files: list[FileIO], pool: ThreadPoolExecutor) -> None:
        self._files, self._pool = files, pool
        self._buffers = [mmap.mmap(-1, PIECE) for _ in files]  # whole pages, as direct reads ask for

    def __call__(self, offsets: list[int]) -> int:
        """Read the pieces at these offsets; the bytes that came."""
        n = len(self._files)
        return sum(self._pool.map(self._read, range(n), [offsets[i::n] for i in range(n)]))

    def _read(self, number: int, offsets: list[int]) -> int:
        file, count = self._files[number], 0
        for offset in offsets:
            file.seek(offset)
            count += file.readinto(self._buffers[number]) or 0
        return count


def _from(begin: int, nbytes: int, size: int) -> list[int]:
    return [(begin + at) % size for at in range(0, nbytes, PIECE)]


def _rate(read: Callable[[int], int]) -> float:
    """Bytes per second: the median of many passes."""
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        count = read(len(rates))
        rates.append(count / max(time.perf_counter() - start, 1e-9))
    return max(statistics.median(rates), 1.0)


def _fault_rate(path: Path, size: int, n_threads: int) -> float:
    """Bytes per second of a mapping that is read on demand, page by page, as experts are; infinite where the system
    has no way to forget what it has cached."""
    if not hasattr(os, "posix_fadvise"):
        return float("inf")
    draw = random.Random(0)
    with path.open("rb") as file, ThreadPoolExecutor(n_threads) as pool:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        pages = np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE]
        places = list(range(0, len(pages), _EXPERT // mmap.PAGESIZE))
        draw.shuffle(places)
        begin = time.perf_counter()
        count = sum(pool.map(lambda i: _touch(pages, places[i::n_threads], begin), range(n_threads)))
        return max(count / max(time.perf_counter() - begin, 1e-9), 1.0)


def _touch(pages: npt.NDArray[np.uint8], places: list[int], begin: float) -> int:
    """Bytes of the pages that were read within half a second or so."""
    few, count = _EXPERT // mmap.PAGESIZE, 0  # more than 500: numpy lets other threads run
    for place in places:
        if time.perf_counter() - begin > _SECONDS / 2:
            break
        pages[place : place + few].max(initial=0)
        count += len(pages[place : place + few]) * mmap.PAGESIZE
    return count


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[list[FileIO]]:
    """The file, open for each reader, past the page cache where the system can."""
    flags = getattr(os, "O_DIRECT", 0)
    with contextlib.ExitStack() as stack:

        def opened(with_flags: int) -> FileIO:
            opener = partial(_open, flags=with_flags)
            return stack.enter_context(open(path, "rb", buffering=0, opener=opener))

        try:
            opened(flags).readinto(mmap.mmap(-1, PIECE))
        except OSError:
            flags = 0
        files = [opened(flags) for _ in range(READERS)]
        for file in files:
            _past_cache(file)
        yield files


def _open(path: str, usual_flags: int, flags: int) -> int:
    return os.open(path, usual_flags | flags)


def _past_cache(file: FileIO) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sys.platform == "darwin":
        fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)


@contextlib.contextmanager
def _file_to_read(folder: Path, model: Path | None, on_progress: Part) -> Iterator[Path]:
    """The model, if it is large enough and lies on the folder's disk, or a temporary file of random bytes."""
    try:
        if model is not None and model.stat().st_dev == folder.stat().st_dev and model.stat().st_size >= _MOST_BYTES:
            yield model
            return
        size = min(_MOST_BYTES, free_bytes(folder) // 4) // PIECE * PIECE
        if size < _LEAST_BYTES:
            raise HomeinferError(
                f"{folder.parent} has too little room to measure its disk ({free_bytes(folder) / 1e6:,.0f} MB free): "
                "make room there or set HOMEINFER_WINDOWS to another folder"
            )
        with tempfile.NamedTemporaryFile(prefix=".profile-", dir=folder) as file:
            _write(file.fileno(), size, on_progress)
            yield Path(file.name)
    except OSError as problem:
        raise HomeinferError(
            f"{folder.parent}: its disk can't be measured: {problem.strerror or problem}; free some space there, or "
            "set HOMEINFER_WINDOWS to another folder"
        ) from None


def _write(handle: int, size: int, on_progress: Part) -> None:
    """Random bytes, so that no file system or disk can make them less; a slow disk gets fewer."""
    draw = np.random.default_rng(0)
    begin, written = time.perf_counter(), 0
    while written < size and (written < _LEAST_BYTES or time.perf_counter() - begin < 4):
        written += os.write(handle, draw.bytes(min(4 * PIECE, size - written)))
        on_progress(written / size)
        if written % (16 * PIECE) == 0:
            os.fsync(handle)
    os.fsync(handle)
