"""Profile files on disk, as `homeinfer profile` writes them."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.read_profiles import decode_profiles, join_profiles
from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable

_MOST_BYTES = 16 << 20
"""More than profiles of 64 devices with hundreds of kinds of layers take."""


def read_device_profiles(paths: Iterable[Path]) -> tuple[DeviceProfile, ...]:
    """The devices of all files, in order. Raises HomeinferError for a file that is missing, too large or no profile
    of this version, for impossible numbers, and for two devices of one name."""
    named = ((printable(str(path), 1000), path) for path in paths)
    return join_profiles([(name, decode_profiles(name, _content(name, path))) for name, path in named])


def are_measured(paths: Iterable[Path]) -> bool:
    """Whether all files are whole profiles and not just lists of names and memory, which have no version. Raises
    HomeinferError for a file that can't be read."""
    found = []
    for path in paths:
        content = _content(printable(str(path), 1000), path)
        try:
            found.append(msgspec.json.decode(content, type=_Versioned).version is not None)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found.append(False)
    return all(found)


class _Versioned(msgspec.Struct):
    version: object = None


def _content(name: str, path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise HomeinferError(f"{name}: this is no file; give the path of a profile, from homeinfer profile -o FILE")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise HomeinferError(f"{name}: the profile can't be read: {reason}; check the path") from None
    if len(data) > _MOST_BYTES:
        raise HomeinferError(f"{name}: {_MOST_BYTES >> 20} MiB and more is too large for a profile; check the path")
    return data
