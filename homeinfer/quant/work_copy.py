"""A private copy of a model whose weights can be changed while llama.cpp runs it.

llama.cpp maps the file shared, and Linux and macOS keep one page cache for what is mapped and what is written: bytes
that are written into the file are the running model's weights at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO

from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, TensorInfo, printable, read_header
from homeinfer.model.window_file import ALIGNMENT, write_window
from homeinfer.model.window_plan import PlannedTensor, WindowPlan
from homeinfer.quant.checks import size_text

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: leftovers of killed processes stay
    fcntl = None

_PREFIX = ".homeinfer-work-"
_STEP = 64 << 20
_NO_PARTS = ("split.no", "split.count", "split.tensors.count", "general.alignment")

OnProgress = Callable[[float], None]


class WorkCopy:
    """The copy, one GGUF with the source's tensors in their own types, in a temporary folder inside `folder`.

    It is made when the context is entered and removed when it is left; what a killed process left behind is removed
    by the next one that uses the same folder. Raises HomeinferError when the disk has too little room (checked before
    the first byte) or a file can't be read or written.
    """

    def __init__(self, source: Header, folder: Path, on_progress: OnProgress | None = None) -> None:
        self._source, self._parent, self._on_progress = source, folder, on_progress
        self._stack = contextlib.ExitStack()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> WorkCopy:
        if self._source.truncated:
            raise HomeinferError(f"{_name(self._source)}: the file is cut short; download it again")
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._parent)
            _require_space(self._source, self._parent)
            self._make()
        except OSError as problem:
            self._stack.close()
            raise HomeinferError(
                f"{printable(str(self._parent), 1000)}: a working copy of the model can't be made there: "
                f"{problem.strerror or problem}; choose another folder"
            ) from None
        except BaseException:
            self._stack.close()
            raise
        return self

    def _make(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._stack.enter_context(_locked(self.folder))
        self.path = self.folder / "model.gguf"
        if len(self._source.files) == 1:
            _clone(Path(self._source.files[0].path), self.path, self._on_progress)
        else:
            write_window(self._source, _in_one_file(self._source), self.path, self._counted())
        self.header = read_header(self.path)
        for part in self._source.files:
            self._files.append(self._stack.enter_context(Path(part.path).open("rb")))  # noqa: SIM115 (false alarm)
        self._target = self._stack.enter_context(self.path.open("r+b", buffering=0))

    def _counted(self) -> Callable[[int], None]:
        done, total = 0, max(self._source.nbytes, 1)

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if self._on_progress is not None:
                self._on_progress(done / total)

        return count

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Put other bytes, of the tensor's own type and size, in its place; ValueError for another size."""
        tensor = self._tensor(name)
        if len(data) != tensor.nbytes:
            raise ValueError(f"{name}: {len(data)} bytes for a tensor of {tensor.nbytes}")
        rest = memoryview(data)
        try:
            self._target.seek(tensor.offset)
            while rest:
                rest = rest[self._target.write(rest[:_STEP]) :]
        except OSError as problem:
            raise HomeinferError(
                f"{printable(str(self.path), 1000)}: the working copy can't be changed: {problem.strerror}; "
                "free some space on its disk"
            ) from None

    def restore(self, name: str) -> None:
        """Put the source's bytes back."""
        self.write(name, self.original(name))

    def original(self, name: str) -> bytes:
        """The source's bytes of a tensor."""
        tensor = self._source.by_name[name]
        file = self._files[tensor.file]
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise HomeinferError(f"{_name(self._source)}: the file was cut short meanwhile; start again")
        return data

    def _tensor(self, name: str) -> TensorInfo:
        return self.header.by_name[name]


def enough_space(header: Header, folder: Path) -> bool:
    """Whether the folder's disk has room for a copy of the model."""
    return shutil.disk_usage(folder).free >= _needed_bytes(header)


def _needed_bytes(header: Header) -> int:
    if len(header.files) == 1:
        return header.files[0].size
    return sum(file.size for file in header.files) + ALIGNMENT * len(header.tensors)


def _require_space(header: Header, folder: Path) -> None:
    if not enough_space(header, folder):
        needed, free = size_text(_needed_bytes(header)), size_text(shutil.disk_usage(folder).free)
        raise HomeinferError(
            f"{printable(str(folder), 1000)}: the disk is too full for a working copy of the model: {needed} are "
            f"needed, {free} are free; free some space"
        )


def _in_one_file(header: Header) -> WindowPlan:
    metadata = {key: value for key, value in header.metadata.items() if key not in _NO_PARTS}
    tensors = tuple(PlannedTensor(t.name, t.shape, t.type, t) for t in header.tensors)
    return WindowPlan(0, header.n_layer, metadata, tensors)


def _clone(source: Path, target: Path, on_progress: OnProgress | None) -> None:
    """Copy a file inside the kernel, which shares the blocks where the file system can, else by hand."""
    with source.open("rb", buffering=0) as old, target.open("wb", buffering=0) as new:
        size, done = os.fstat(old.fileno()).st_size, 0
        with contextlib.suppress(AttributeError, OSError):
            while done < size and (n := os.copy_file_range(old.fileno(), new.fileno(), _STEP, done, done)):
                done += n
                if on_progress is not None:
                    on_progress(done / size)
        old.seek(done)
        new.seek(done)
        shutil.copyfileobj(old, new, 1 << 20)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Shows other processes that this folder is in use, for as long as this one lives."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(parent: Path) -> None:
    """Folders of processes that were killed: no one holds their lock."""
    if fcntl is None:
        return
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _name(header: Header) -> str:
    return printable(header.files[0].path, 1000)
