"""The process in which shadow windows are timed: `python -m homeinfer.profiling.timer_process`."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from homeinfer.cluster.wire.transport import Links, Peer
from homeinfer.errors import HomeinferError
from homeinfer.profiling import hops
from homeinfer.profiling.gpu_list import list_gpus
from homeinfer.profiling.shadow_file import fill_shadow
from homeinfer.profiling.step_times import step_times
from homeinfer.profiling.stream_rate import stream_rate
from homeinfer.profiling.timing_messages import (
    Echo,
    Fill,
    Filled,
    FromTimer,
    GpuList,
    ListGpus,
    Refused,
    StreamTimed,
    TimeStream,
    TimeWindow,
    ToTimer,
)


def answer(request: ToTimer) -> FromTimer:
    """Do what was asked."""
    match request:
        case Fill():
            fill_shadow(Path(request.path))
            return Filled()
        case ListGpus():
            return GpuList(list_gpus())
        case TimeWindow():
            return step_times(request)
        case TimeStream():
            return StreamTimed(stream_rate(request))
        case Echo():
            _echo(request)
            return Filled()


def _echo(request: Echo) -> None:
    links = Links(request.listen, patience_ms=2000)
    try:
        hops.echo(links, Peer(request.peer), request.count)
    finally:
        links.close()


def main() -> None:
    decoder = msgspec.json.Decoder(ToTimer)
    for line in sys.stdin.buffer:
        try:
            said: FromTimer = answer(decoder.decode(line))
        except HomeinferError as problem:
            said = Refused(str(problem))
        sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
