"""How often a token goes around the ring: how many windows each device has. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def count_rounds(owners: Sequence[Hashable]) -> int:
    """How often a token comes by the device with the most windows; the head's last window is no round of its own.

    owners: the device of each window in ring order.
    """
    return max(_windows_of_each(owners).values())


def has_rounds(owners: Sequence[Hashable], rounds: int) -> bool:
    """Whether each device has so many windows, the head one more, which is the last. One alone has one window, whatever
    is asked for."""
    return len(owners) == 1 or set(_windows_of_each(owners).values()) == {rounds}


def least_layers(devices: int, rounds: int) -> int:
    """Layers of the smallest model that so many devices can hold in so many rounds."""
    return devices * rounds + 1 if devices > 1 else 1


def _windows_of_each(owners: Sequence[Hashable]) -> Counter[Hashable]:
    return Counter(owners[:-1] if len(owners) > 1 else owners)
