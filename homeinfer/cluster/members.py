"""Who is registered at a head: names and keys, kept on its disk."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import msgspec

from homeinfer.cluster.private_file import read_private, write_private
from homeinfer.cluster.wire.control import Key, Name
from homeinfer.errors import HomeinferError

_FILE = "members.json"
_WHAT = "the list of paired devices"
_LONGEST = 56
"""Characters of a name, with room left for the number that tells two of one name apart."""


class Member(msgspec.Struct, frozen=True):
    """A device that may join. name: unique at this head."""

    name: Name
    key: Key


class _Registered(msgspec.Struct, frozen=True):
    members: tuple[Member, ...] = ()


class Members:
    """The list in `folder`; what another process changed is seen at the next call. No call that only asks raises."""

    def __init__(self, folder: Path) -> None:
        """Raises HomeinferError when the list can't be read."""
        self._path = folder / _FILE
        self._seen: tuple[int, int, int] | None = None
        self._members: tuple[Member, ...] = ()
        self._read()

    def all(self) -> tuple[Member, ...]:
        """In the order in which they came."""
        self._look()
        return self._members

    def get(self, key: str) -> Member | None:
        """The device with this key, None for a stranger."""
        return next((member for member in self.all() if member.key == key), None)

    def add(self, name: str, key: str) -> Member:
        """Register a device, unless its key is: then as what it is. Its name is made fit to print and unique. Raises
        HomeinferError when it can't be written down."""
        known = self.get(key)
        if known is not None:
            return known
        member = Member(free_name(name, [member.name for member in self._members]), key)
        self._keep((*self._members, member))
        return member

    def forget(self, name: str) -> Member:
        """Take a device off the list; connections that it has are the caller's to end. Raises HomeinferError when
        there is none of this name."""
        member = next((member for member in self.all() if member.name == name), None)
        if member is None:
            names = ", ".join(member.name for member in self._members) or "none"
            raise HomeinferError(f"no device named {name} is paired; paired are: {names}")
        self._keep(tuple(other for other in self._members if other != member))
        return member

    def _keep(self, members: tuple[Member, ...]) -> None:
        write_private(self._path, _Registered(members), _WHAT)
        self._look()

    def _look(self) -> None:
        """What can't be read while a cluster runs must not end it: the last list that could be read goes on."""
        with contextlib.suppress(HomeinferError):
            self._read()

    def _read(self) -> None:
        try:
            info = self._path.stat()
        except FileNotFoundError:
            self._seen, self._members = None, ()
            return
        except OSError as problem:
            raise HomeinferError(f"{self._path}: {_WHAT} can't be read: {problem.strerror}") from None
        now = (info.st_ino, info.st_mtime_ns, info.st_size)
        if now != self._seen:
            kept = read_private(self._path, _Registered, _WHAT)
            self._seen, self._members = now, kept.members if kept is not None else ()


def free_name(wished: str, taken: list[str]) -> str:
    """The name without what a terminal would not show, followed by -2, -3, ... where it is taken."""
    plain = re.sub(r"[^\w.]+", "-", wished, flags=re.ASCII).strip("-.")[:_LONGEST] or "device"
    numbered = (plain if n == 1 else f"{plain}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken)
