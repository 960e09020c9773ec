"""The coordinator as a process of its own, for `homeinfer cluster up --detach`.

python -m homeinfer.cluster.coordinator    (a line of ClusterOptions on stdin; ends on SIGTERM or Order "down")

Says on its standard output, in one JSON line, how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

import msgspec

from homeinfer.cluster.coordinator.coordinator import Coordinator
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.errors import HomeinferError
from homeinfer.folders import state_folder


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    reason: str
    is_problem: bool = False


async def _run(options: ClusterOptions) -> str:
    coordinator = Coordinator(options, state_folder())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # Windows: it ends there without goodbye
            loop.add_signal_handler(number, coordinator.stop, "it was told to stop")
    return await coordinator.run()


def main() -> int:
    """The exit status."""
    try:
        options = msgspec.json.decode(sys.stdin.buffer.readline(), type=ClusterOptions)
        ended = Ended(asyncio.run(_run(options)))
    except HomeinferError as problem:
        ended = Ended(str(problem), is_problem=True)
    except msgspec.MsgspecError as problem:
        ended = Ended(f"the coordinator was given what it can't read: {problem}", is_problem=True)
    with contextlib.suppress(OSError):  # whoever started it may have left long ago
        sys.stdout.buffer.write(msgspec.json.encode(ended) + b"\n")
        sys.stdout.buffer.flush()
    return 1 if ended.is_problem else 0


if __name__ == "__main__":
    sys.exit(main())
