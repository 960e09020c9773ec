"""Who takes part in a pipeline. Needs little memory: an idle agent imports it."""

from __future__ import annotations

import msgspec


class DeviceInfo(msgspec.Struct, frozen=True):
    """One device of a pipeline and the windows [first, last) it holds."""

    name: str
    windows: list[tuple[int, int]]
