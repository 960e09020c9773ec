"""The heads that this device was paired with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from homeinfer.cluster.private_file import read_private, write_private
from homeinfer.cluster.wire.control import Address, Key, Name, Port

_FILE = "heads.json"
_WHAT = "the list of heads this device was paired with"


class KnownHead(msgspec.Struct, frozen=True):
    """A head that knows this device. hosts: where it was last; port: of its control socket; name: the head's own."""

    key: Key
    hosts: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)]
    port: Port
    name: Name


class _Heads(msgspec.Struct, frozen=True):
    heads: tuple[KnownHead, ...] = ()


def known_heads(folder: Path) -> tuple[KnownHead, ...]:
    """All of them, the one used last first. Raises HomeinferError when the list can't be read."""
    kept = read_private(folder / _FILE, _Heads, _WHAT)
    return kept.heads if kept is not None else ()


def remember_head(folder: Path, head: KnownHead) -> None:
    """Put a head first in the list, in place of what was known of it. Raises HomeinferError."""
    others = (known for known in known_heads(folder) if known.key != head.key)
    write_private(folder / _FILE, _Heads((head, *others)), _WHAT)


def forget_head(folder: Path, key: str) -> None:
    """Take the head with this key off the list, if it is there. Raises HomeinferError."""
    heads = known_heads(folder)
    left = tuple(known for known in heads if known.key != key)
    if left != heads:
        write_private(folder / _FILE, _Heads(left), _WHAT)
