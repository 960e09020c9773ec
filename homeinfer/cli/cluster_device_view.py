"""How a device that takes part looks on its own screen: what its agent said so far, and what that shows. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from homeinfer.cli.cluster_view import duration
from homeinfer.cli.ui import layer_ranges
from homeinfer.cluster.agent_options import (
    AgentEvent,
    Connected,
    Ended,
    EngineNow,
    Seeking,
    StatsNow,
    Trouble,
    Working,
)
from homeinfer.cluster.planning.problem_checks import gigabytes
from homeinfer.cluster.wire.control import DeviceStats, Task

_TASKS: dict[Task, str] = {
    "measure": "measuring this device",
    "fetch": "getting weights",
    "check": "checking weights on this disk",
    "cut": "cutting windows",
    "load": "loading",
}
_TROUBLES = 3
_BAR = 30
_STALLED = 0.1
_SHOWN_RATE = 1000
"""Bytes per second; beats alone are less."""


class Part(msgspec.Struct, frozen=True):
    """What a device's agent said of itself. tasks: how far each is that is not done, with its detail. seen, before:
    the last two stats with the seconds at which they came. reasons: why the head was not there, since it last was."""

    head: str
    name: str = ""
    host: str = ""
    seeking: Seeking | None = None
    reasons: frozenset[str] = frozenset()
    tasks: dict[Task, tuple[float, str]] = {}
    engine: EngineNow = EngineNow("none")
    seen: tuple[float, DeviceStats] | None = None
    before: tuple[float, DeviceStats] | None = None
    troubles: tuple[str, ...] = ()


def after(part: Part, event: AgentEvent, now: float) -> Part:
    """The part after one more event. now: seconds of any steady clock."""
    replace = msgspec.structs.replace
    if isinstance(event, Seeking):
        return replace(part, seeking=event, reasons=part.reasons | {event.reason})
    if isinstance(event, Connected):
        return replace(part, name=event.name, host=event.host, seeking=None, reasons=frozenset())
    if isinstance(event, Working):
        others = {task: how for task, how in part.tasks.items() if task != event.task}
        return replace(part, tasks=others if event.share >= 1 else others | {event.task: (event.share, event.detail)})
    if isinstance(event, EngineNow):
        return replace(part, engine=event)
    if isinstance(event, StatsNow):
        return replace(part, seen=(now, event.stats), before=part.seen)
    if isinstance(event, Trouble):
        return replace(part, troubles=(*part.troubles, event.text)[-_TROUBLES:])
    return part


def line_of(event: AgentEvent, part: Part) -> str | None:
    """What a log says of an event; part: as it was before. None for what only a live view shows."""
    if isinstance(event, Seeking):
        # a head has several addresses, tried in turn for as long as it is away
        is_new = event.reason and event.reason not in part.reasons
        return f"looking for {part.head}: {event.reason}" if is_new else None
    if isinstance(event, Connected):
        return f"connected to {part.head} ({event.host}) as {event.name}"
    if isinstance(event, Working):
        return _TASKS[event.task] if event.task not in part.tasks and event.share < 1 else None
    if isinstance(event, EngineNow):
        return _engine_line(event, part.engine) if event.state != part.engine.state else None
    if isinstance(event, Trouble):
        return event.text
    return None


def tasks_of(part: Part) -> dict[str, tuple[str, float | None]]:
    """For cluster_changes.Pace.left."""
    return {task: (task, share) for task, (share, _) in part.tasks.items()}


def part_view(part: Part, left: Mapping[str, float] | None = None) -> RenderableType:
    """A few lines. left: seconds until each task is done, where that is known."""
    parts: list[RenderableType] = [_heading(part)]
    if part.tasks:
        parts.append(_tasks(part, left or {}))
    elif part.seeking is None:
        parts.append(Text(_engine(part.engine), "red" if part.engine.state == "gone" else ""))
    if part.seen is not None:
        parts.append(_stats(part))
    parts += [Text(trouble, "yellow") for trouble in part.troubles]
    parts.append(Text("Ctrl-C leaves", "dim"))
    return Group(*parts)


def _heading(part: Part) -> Text:
    text = Text(part.name or "this device", "bold").append(f" · cluster of {part.head}", "not bold")
    if part.seeking is not None:
        since = f" for {duration(part.seeking.away_seconds)}" if part.seeking.away_seconds >= 1 else ""
        text.append(f" · looking for it{since}", "yellow")
        text.append(f": {part.seeking.reason}" if part.seeking.reason else "", "dim")
    elif part.host:
        text.append(" · connected", "green")
    return text


def _tasks(part: Part, left: Mapping[str, float]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    for task, (share, detail) in part.tasks.items():
        time_left = f"{duration(left[task])} left" if task in left else ""
        bar = ProgressBar(1.0, min(max(share, 0.0), 1.0), _BAR)
        table.add_row(_TASKS[task], bar, f"{100 * share:.0f} %", time_left, Text(detail, "dim"))
    return table


def _engine_line(engine: EngineNow, before: EngineNow) -> str:
    return "let go of its layers" if engine.state == "none" and before.layers else _engine(engine)


def _engine(engine: EngineNow) -> str:
    spans = layer_ranges(engine.layers)
    is_one = sum(last - first for first, last in engine.layers) == 1
    holds = f"layer{'' if is_one else 's'} {', '.join(spans)}" if spans else "no layers"
    if engine.state == "gone":
        return f"the engine ended: {engine.reason}"
    if engine.state == "none":
        return "nothing to do yet"
    return {"loading": f"loading {holds}", "ready": f"holds {holds}", "joined": f"takes part with {holds}"}[
        engine.state
    ]


def _stats(part: Part) -> Text:
    assert part.seen is not None
    now, stats = part.seen
    facts = [f"{gigabytes(stats.memory_bytes)} of memory, {gigabytes(stats.available_bytes)} free"]
    if part.before is not None and now > part.before[0]:
        then, old = part.before
        seconds = now - then
        facts.append(f"disk {_rate(stats.read_bytes - old.read_bytes, seconds)}")
        facts.append(f"sent {_rate(stats.sent_bytes - old.sent_bytes, seconds)}")
        facts.append(f"{100 * max(stats.cpu_seconds - old.cpu_seconds, 0) / seconds:.0f} % of a core")
    text = Text(" · ".join(facts), "dim")
    if stats.stalled >= _STALLED:
        text.append(f" · short of memory {100 * stats.stalled:.0f} % of the time", "yellow")
    return text


def _rate(count: int, seconds: float) -> str:
    per_second = max(count, 0) / seconds
    return f"{gigabytes(per_second)}/s" if per_second >= _SHOWN_RATE else "–"


def is_problem(event: AgentEvent) -> bool:
    """Whether the agent ended in a way that a user must do something about."""
    return isinstance(event, Ended) and event.is_problem
