"""What comes over the links of a ring's engine."""

from __future__ import annotations

import time
from typing import Any

from homeinfer.cluster.wire.transport import Links

_PATIENCE_SECONDS = 30.0


def next_of(links: Links) -> list[Any]:
    """The next message, whatever the patience of these links is, and however long a busy machine needs for it; who was
    refused tries again a few times a second."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (frames := links.receive()) is None:
        assert time.monotonic() < deadline
    return frames
