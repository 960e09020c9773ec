"""What quantization keeps between runs: a folder for each model, named by the digest of its content."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import platformdirs

from homeinfer.errors import HomeinferError
from homeinfer.model.records import Header, printable
from homeinfer.process_start import process_start, still_runs

_REGION: Final = 64 << 20
_BLOCK: Final = 4 << 20
_DIGEST_BYTES: Final = 20
_MOST_THREADS: Final = 8
_USERS: Final = "users"


def kept_folder() -> Path:
    """`HOMEINFER_KEPT`, or quant/ in the user's cache folder; it may not be there yet."""
    named = os.environ.get("HOMEINFER_KEPT")
    return Path(named) if named else Path(platformdirs.user_cache_dir("homeinfer")) / "quant"


def model_digest(header: Header, on_progress: Callable[[float], None] | None = None) -> str:
    """Of every byte of a model's files, header and data: BLAKE2b of the BLAKE2b of each 64 MiB.

    Raises HomeinferError when a file can't be read, or has another size than its header was read with.
    """
    regions = [
        (Path(file.path), start, min(_REGION, file.size - start))
        for file in header.files
        for start in range(0, file.size, _REGION)
    ]
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    total.update(msgspec.json.encode([file.size for file in header.files]))
    stop: list[bool] = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        try:
            for number, digest in enumerate(pool.map(functools.partial(_region_digest, stop), regions)):
                total.update(digest)
                if on_progress is not None:
                    on_progress((number + 1) / len(regions))
        finally:
            stop.append(True)  # Ctrl-C must not wait for the rest of a large file
            pool.shutdown(cancel_futures=True)
    return total.hexdigest()


def _region_digest(stop: Sequence[bool], region: tuple[Path, int, int]) -> bytes:
    path, start, left = region
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    block = memoryview(bytearray(min(_BLOCK, left)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and not stop:
                n = file.readinto(block[: min(len(block), left)])
                if not n:
                    raise HomeinferError(f"{_name(path)}: the file was cut short meanwhile; get it again")
                digest.update(block[:n])
                left -= n
    except OSError as error:
        raise HomeinferError(f"{_name(path)}: it can't be read any more: {error.strerror or error}") from None
    return digest.digest()


def tokens_digest(chunks: Sequence[npt.NDArray[np.int32]]) -> str:
    """Of the chunks' lengths and tokens."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(msgspec.json.encode([len(chunk) for chunk in chunks]))
    for chunk in chunks:
        digest.update(np.ascontiguousarray(chunk, "<i4").tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[Path]:
    """Make a model's folder, count it as used now, and keep `prune` of every process from removing it meanwhile.

    Raises HomeinferError when it can't be made.
    """
    mark = folder / _USERS / f"{os.getpid()}-{secrets.token_hex(4)}"
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(process_start())
        os.utime(folder)
    except OSError as error:
        raise HomeinferError(
            f"{_name(folder)} can't be made to keep measurements in ({error.strerror or error}): "
            "set HOMEINFER_KEPT to another folder"
        ) from None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
            os.utime(folder)


def prune(folder: Path, keep: int = 3) -> tuple[Path, ...]:
    """Remove the model folders in `folder` (kept_folder()) that were used longest ago, all but the `keep` latest, and
    none that a live process uses. What can't be removed stays. Returns those that are gone."""
    found = sorted(_folders(folder), reverse=True)
    gone = []
    for _, path in found[keep:]:
        if not _is_used(path):
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path)
    return tuple(path for path in gone if not path.exists())


def _folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Model folders (those that `in_use` made) and when they were used, in ns."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (path / _USERS).is_dir() and not path.is_symlink():
                yield path.stat().st_mtime_ns, path


def _is_used(folder: Path) -> bool:
    return any(_is_alive(mark) for mark in (folder / _USERS).iterdir())


def _is_alive(mark: Path) -> bool:
    """A mark's process; another that got its number later does not count."""
    try:
        return still_runs(int(mark.name.partition("-")[0]), mark.read_text())
    except (ValueError, OSError):
        return False


def _name(path: Path) -> str:
    return printable(str(path), 1000)
