"""What was measured before on this machine, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import secrets
from pathlib import Path
from typing import TypeVar

import msgspec
import platformdirs
import psutil

from homeinfer import __version__
from homeinfer.profiling.machine import Machine

_FORMAT = 3
T = TypeVar("T", bound=msgspec.Struct)


def default_folder() -> Path:
    """`HOMEINFER_PROFILES`, or profiles/ in the user's cache folder."""
    named = os.environ.get("HOMEINFER_PROFILES")
    return Path(named) if named else Path(platformdirs.user_cache_dir("homeinfer")) / "profiles"


class Cache:
    """Measurements by name, of one machine, one number of threads and one version of everything that computes.

    A file that is missing or damaged, or a folder that can't be written, costs a measurement and no error.
    """

    def __init__(self, machine: Machine, n_threads: int, folder: Path, *, fresh: bool = False) -> None:
        versions = (_FORMAT, __version__, importlib.metadata.version("llama-cpp-python"))
        facts = (machine, n_threads, psutil.virtual_memory().total, versions)
        self._key, self._folder, self._fresh = msgspec.json.encode(facts), folder, fresh

    def get(self, name: str, kind: type[T]) -> T | None:
        """What was kept under a name, or None."""
        if self._fresh:
            return None
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode(self._path(name).read_bytes(), type=kind)
        return None

    def put(self, name: str, value: msgspec.Struct) -> None:
        """Keep a measurement, whole or not at all."""
        partial = self._folder / f".{secrets.token_hex(6)}.partial"
        with contextlib.suppress(OSError):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(msgspec.json.encode(value))
                partial.replace(self._path(name))
            finally:
                partial.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(self._key + name.encode()).hexdigest()[:24]}.json"
