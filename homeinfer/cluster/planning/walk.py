"""One token's way around the ring, alone. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from homeinfer.cluster.planning.disks import Disks
from homeinfer.cluster.planning.plan import Cause, Span
from homeinfer.cluster.planning.route import Stage, Stream

_MOST_STEPS = 64
_SETTLED = 1e-9


class Recorder:
    """What one token's way consists of: causes by device, and spans for a timeline if wanted."""

    def __init__(self, begin: float, timeline: bool) -> None:
        self.begin = begin
        self.causes: dict[str, Cause] = {}
        self.spans: list[Span] = []
        self._timeline = timeline

    def add(self, device: str, what: str, begin: float, end: float, label: str, **cause: float) -> None:
        old = self.causes.get(device, Cause())
        self.causes[device] = Cause(
            old.compute_ms + cause.get("compute", 0.0),
            old.disk_ms + cause.get("disk", 0.0),
            old.network_ms + cause.get("network", 0.0),
            old.overhead_ms + cause.get("overhead", 0.0),
        )
        if self._timeline and end > begin:
            self.spans.append(Span(device, what, begin - self.begin, end - self.begin, label))  # type: ignore[arg-type]

    def add_reads(self, disks: Disks, streams: dict[str, Stream], end: float, n_layers: int) -> None:
        """Reads that happened while the token went around, or that it needed."""
        for name, reader in disks.readers.items():
            layers = streams[name].layers
            needed = len(reader.released) - len(layers)
            for index, (start, stop) in enumerate(zip(reader.begins, reader.ends, strict=True)):
                if (start < end and stop > self.begin) or needed <= index < len(reader.released):
                    layer = layers[index % len(layers)]
                    label = "output" if layer == n_layers else f"layer {layer}"
                    self.spans.append(Span(name, "read", start - self.begin, stop - self.begin, label))


def added(causes: Iterable[Cause]) -> Cause:
    """All causes together."""
    total = Cause()
    for cause in causes:
        total = Cause(
            total.compute_ms + cause.compute_ms,
            total.disk_ms + cause.disk_ms,
            total.network_ms + cause.network_ms,
            total.overhead_ms + cause.overhead_ms,
        )
    return total


def total_ms(cause: Cause) -> float:
    """All of a cause's milliseconds."""
    return cause.compute_ms + cause.disk_ms + cause.network_ms + cause.overhead_ms


def alone_ms(stages: list[Stage]) -> float:
    """The way around of a step that waits for nothing."""
    total = 0.0
    for stage in stages:
        total += stage.delay + stage.wire + stage.receive
        for piece in stage.pieces:
            total += piece.lead + piece.fault + piece.compute
    return total


def settled(stages: list[Stage], disks: Disks) -> tuple[float, float]:
    """The steady milliseconds per step, and the time at which it was reached: when the step before took as long, or
    the average of the later half of many. Steps that live on what was read ahead are shorter than the disk needs, so
    none is taken for steady."""
    ends = [0.0]
    least = disks.busy_ms
    for _ in range(_MOST_STEPS):
        ends.append(walk(stages, disks, ends[-1]))
        if len(ends) > 3:
            period, before = ends[-1] - ends[-2], ends[-2] - ends[-3]
            if abs(period - before) <= _SETTLED * period and period >= least * (1 - _SETTLED):
                return period, ends[-1]
    half = _MOST_STEPS // 2
    return max((ends[-1] - ends[half]) / (_MOST_STEPS - half), least), ends[-1]


def walk(stages: list[Stage], disks: Disks, now: float, recorder: Recorder | None = None) -> float:
    """When a step that starts at `now` is back at the head."""
    for stage in stages:
        arrived = now + stage.wire + stage.delay + stage.receive
        if recorder is not None and stage.wire + stage.delay + stage.receive > 0:
            sent = now + stage.wire + stage.delay
            label = f"{stage.sender} to {stage.device}"
            recorder.add(stage.sender, "send", now, sent, label, network=sent - now)
            recorder.add(stage.device, "wait", sent, arrived, "receive", overhead=arrived - sent)
        now = arrived
        for piece in stage.pieces:
            begin = now
            now += piece.lead
            if recorder is not None and piece.lead:
                recorder.add(stage.device, "wait", begin, now, "prepare", overhead=piece.lead)
            asked = now
            if piece.item >= 0:
                now = max(now, disks.ready(stage.device))
            if recorder is not None and now > asked:
                recorder.add(stage.device, "wait", asked, now, f"layer {piece.first} from disk", disk=now - asked)
            faulted = now + piece.fault
            if recorder is not None and piece.fault:
                recorder.add(stage.device, "read", now, faulted, f"experts of {piece.first}", disk=piece.fault)
            now = faulted + piece.compute
            if recorder is not None:
                recorder.add(
                    stage.device, "compute", faulted, now, _named(piece.first, piece.last), compute=piece.compute
                )
            if piece.item >= 0:
                disks.release(stage.device, now)
    return now


def _named(first: int, last: int) -> str:
    if first == last:
        return "output"
    return f"layer {first}" if last - first == 1 else f"layers {first} to {last - 1}"
