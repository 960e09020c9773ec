"""A window's file as llama.cpp may load it without reading it, and where it then is in memory (Linux).

llama.cpp populates the mapping of a file while it loads: it would read all weights once, experts too, through a page
cache that may be smaller. So it gets a file in memory that holds the header alone, as long as the real one only until
the header is read: pages beyond the end can't be populated. Then the real file takes that mapping's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from homeinfer.engine import runtime
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header

PAGE = mmap.PAGESIZE
_SHARED_FIXED = 0x11
_BEFORE_MAPPING = b"loading model tensors"
"""llama.cpp says so between reading the header and mapping the file (llama_model_base::load_tensors)."""


class Mapping(msgspec.Struct, frozen=True):
    """Where [offset, offset + size) of a file is in memory."""

    address: int
    size: int
    offset: int

    def place(self, begin: int, end: int) -> int | None:
        """The address of the file's bytes [begin, end), if they are inside."""
        inside = self.offset <= begin and end <= self.offset + self.size
        return self.address + begin - self.offset if inside else None


def place(mappings: Iterable[Mapping], begin: int, end: int) -> int | None:
    """The address of a file's bytes [begin, end), if one of its mappings holds them."""
    return next((at for mapping in mappings if (at := mapping.place(begin, end)) is not None), None)


def load_unread(header: Header, load: Callable[[str], Any]) -> tuple[Any, list[Mapping]]:
    """What `load` (path to llama_model, or None) returns for a file without reading its weights, and where they are: in
    several pieces where llama.cpp leaves out tensors that it does not use.

    Raises HomeinferError what `load` raises, and when the file can't be mapped.
    """
    path, size = header.files[0].path, header.files[0].size
    start = min(tensor.offset for tensor in header.tensors)
    try:
        handle = os.memfd_create("homeinfer-window")
        try:
            with Path(path).open("rb") as file:
                os.write(handle, file.read(start))
                os.ftruncate(handle, size)
                with _shortened(handle, start):
                    model = load(f"/proc/self/fd/{handle}")
                if not model:
                    return model, []
                found = _mappings_of(handle)
                for mapping in found:
                    _map_over(mapping, file.fileno())
        finally:
            os.close(handle)
    except OSError as problem:
        raise HomeinferError(f"{path} can't be mapped: {problem.strerror or problem}") from problem
    if not found:
        raise HomeinferError(
            f"{path}: llama.cpp has mapped it in another way than homeinfer knows: reinstall homeinfer"
        )
    return model, found


@contextlib.contextmanager
def _shortened(handle: int, size: int) -> Iterator[None]:
    """While llama.cpp loads: cut the file to `size` bytes as soon as its header is read."""
    lib = runtime.llama()
    before, user = lib.llama_log_callback(), ctypes.c_void_p()
    lib.llama_log_get(ctypes.byref(before), ctypes.byref(user))

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(level: int, text: bytes, _user: object) -> None:
        if _BEFORE_MAPPING in text:
            os.ftruncate(handle, size)
        before(level, text, user)

    lib.llama_log_set(hear, None)
    try:
        yield
    finally:
        lib.llama_log_set(before, user)


def _mappings_of(handle: int) -> list[Mapping]:
    """Where this process has mapped a file."""
    inode = os.fstat(handle).st_ino
    found = []
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if int(fields[4]) == inode and "homeinfer-window" in line:
                first, last = (int(part, 16) for part in fields[0].split("-"))
                found.append(Mapping(first, last - first, int(fields[2], 16)))
    return found


def _map_over(mapping: Mapping, handle: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    made = libc.mmap(mapping.address, mapping.size, mmap.PROT_READ, _SHARED_FIXED, handle, mapping.offset)
    if made != mapping.address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def advise_random(address: int, size: int) -> None:
    """A fault in these bytes of a mapping reads what it touches and nothing around it."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    first, last = address // PAGE * PAGE, -(-(address + size) // PAGE) * PAGE
    libc.madvise(first, last - first, mmap.MADV_RANDOM)


def open_direct(path: str) -> int:
    """A descriptor that reads past the page cache, where the file system can; else one that reads through it.
    Raises HomeinferError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, PAGE) as page:
                os.preadv(handle, [page], 0)
            return handle
        except OSError:
            os.close(handle)
    except OSError:
        pass
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as problem:
        raise HomeinferError(f"{path} can't be read: {problem.strerror}") from problem
