"""The windows of a ring in the order of its layers, as (device, its window). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_Device = TypeVar("_Device", int, str)


def onward(ring: Sequence[tuple[_Device, int]], device: _Device) -> list[tuple[int, int, _Device | None]]:
    """What a device does with what comes: (hop, its window, the device that gets what comes out, None for itself: it
    has the next window too, or the last one)."""
    found: list[tuple[int, int, _Device | None]] = []
    for hop, (owner, window) in enumerate(ring):
        if owner == device:
            following = ring[hop + 1][0] if hop + 1 < len(ring) else device
            found.append((hop, window, None if following == device else following))
    return found
