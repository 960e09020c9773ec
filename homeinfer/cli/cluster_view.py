"""How a cluster looks on its head: everything is made from a ClusterStatus. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from homeinfer.cli.cluster_changes import SAID
from homeinfer.cli.ui import layer_ranges
from homeinfer.cluster.planning.problem_checks import gigabytes
from homeinfer.cluster.wire.client import ClusterState, ClusterStatus, DeviceState, DeviceStatus

_STATES: dict[DeviceState, tuple[str, str]] = {
    "new": ("joined", "cyan"),
    "measuring": ("measuring", "cyan"),
    "measured": ("measured", "cyan"),
    "fetching": ("getting weights", "cyan"),
    "loading": ("loading", "cyan"),
    "ready": ("ready", "green"),
    "lost": ("lost", "red"),
    "left": ("left", "dim"),
    "refused": ("refused", "red"),
}
_CLUSTER: dict[ClusterState, tuple[str, str]] = {
    "waiting": ("waiting for devices", "cyan"),
    "measuring": ("measuring the devices", "cyan"),
    "planning": ("planning who holds which layers", "cyan"),
    "confirming": ("waiting for your yes", "yellow"),
    "loading": ("loading", "cyan"),
    "ready": ("ready", "bold green"),
    "recovering": ("recovering", "yellow"),
    "stopping": ("stopping", "dim"),
}
_HOLDING: tuple[DeviceState, ...] = ("fetching", "loading", "ready")
"""States in which a device has its layers, or is getting them."""
_EVENTS = 4
_BAR = 20
_STALLED = 0.1
"""From this share of the time on, waiting for memory is worth a word."""
_SLOW = 1.5
"""From so many times on, computing longer than predicted is."""


def cluster_view(status: ClusterStatus, left: Mapping[str, float] | None = None) -> RenderableType:
    """All of it, a few lines high. left: seconds until each device's present task is done, where that is known."""
    parts: list[RenderableType] = [heading(status)]
    if status.state == "ready":
        said = remarks(status.devices)
        parts += [running_table(status.devices), *([said] if said else []), figures(status)]
    else:
        parts.append(starting_table(status.devices, left or {}))
    if status.events:
        parts.append(events(status.events))
    return Group(*parts)


def code_view(code: str, *, is_first: bool = True) -> Text:
    """What to type on the other machines; a code is good for one of them. Print it with soft_wrap: a code with line
    ends in it can't be copied."""
    text = Text("On another machine, the first time (the code holds for ten minutes):" if is_first else "On the next:")
    text.append(f"\n\n    homeinfer cluster join {code}\n", style="bold")
    if is_first:
        text.append("\nOn one that has joined before: homeinfer cluster join\n", style="dim")
    return text


def heading(status: ClusterStatus) -> Text:
    """ "qwen-72b · 3 devices · 4,096 tokens of context · ready"."""
    words, style = _CLUSTER[status.state]
    here = sum(device.state not in ("lost", "left", "refused") for device in status.devices)
    text = Text.assemble((status.model, "bold"), f" · {_counted(here, 'device')}")
    if status.n_ctx:
        text.append(f" · {status.n_ctx:,} tokens of context")
    if status.sequences > 1:
        text.append(f" · {status.sequences} answers at once")
    text.append(" · ").append(words, style)
    return text.append(f": {status.waits_for}", "dim") if status.waits_for else text


def cluster_words(state: ClusterState) -> str:
    """ "waiting for devices"."""
    return _CLUSTER[state][0]


def starting_table(devices: Sequence[DeviceStatus], left: Mapping[str, float]) -> RenderableType:
    """Who is there, and how far each is with what it does."""
    if not devices:
        return Text("\nstarting\n", "dim")
    has_time = any(device.share is not None and device.name in left for device in devices)
    table = _table(("device", "", "", "", "time left" if has_time else "", ""), right=(3, 4), wrapped=(5,))
    for device in devices:
        words, style = _STATES[device.state]
        seconds = left.get(device.name)
        table.add_row(
            _name(device),
            Text(words, style),
            "" if device.share is None else ProgressBar(1.0, min(max(device.share, 0.0), 1.0), _BAR),
            "" if device.share is None else f"{100 * device.share:.0f} %",
            "" if seconds is None or device.share is None else duration(seconds),
            Text(device.detail or (_layers(device) if device.state in _HOLDING else ""), style="dim"),
        )
    return Padding(table, (1, 0))


def running_table(devices: Sequence[DeviceStatus]) -> RenderableType:
    """What each device that has layers holds and does."""
    headings = ("device", "layers", "computing", "", "memory", "free", "disk", "network")
    table = _table(headings, right=(3, 4, 5, 6, 7), wrapped=(1,))
    for device in devices:
        if not device.layers:
            continue
        busy = min(max(device.compute_share, 0.0), 1.0)
        table.add_row(
            _name(device),
            _layers(device),
            ProgressBar(1.0, busy, _BAR // 3, complete_style="blue", finished_style="blue"),
            f"{100 * busy:.0f} %",
            _memory(device),
            _size(device.stats.available_bytes),
            _rate(device.read_bytes_per_s),
            _rate(device.sent_bytes_per_s),
        )
    return Padding(table, (1, 0))


def remarks(devices: Sequence[DeviceStatus]) -> Text:
    """A line for each device that is not just doing its part."""
    said = [line for device in devices if (line := _remark(device)) is not None]
    return Text("\n").join(said)


def _remark(device: DeviceStatus) -> Text | None:
    because = f": {device.detail}" if device.detail else ""
    if not device.layers and device.state in ("new", "measured", "ready"):
        return Text(f"{device.name} takes no part{because}", "dim")
    if device.state != "ready":
        return Text(f"{device.name} {SAID[device.state]}{because}", _STATES[device.state][1])
    if device.stats.stalled >= _STALLED:
        return Text(f"{device.name} is short of memory, {100 * device.stats.stalled:.0f} % of the time", "yellow")
    slow = slow_line(device.name, device.slowdown)
    return Text(slow, "yellow") if slow else None


def slow_line(name: str, slowdown: float | None) -> str:
    """What to tell of a device that computes much longer than planned, "" of others. slowdown: DeviceStatus's."""
    if slowdown is None or slowdown < _SLOW:
        return ""
    return (
        f"{name} computes {slowdown:.1f} times slower than when it was measured: another program may be busy there; "
        "if none is, homeinfer cluster up --fresh measures anew"
    )


def figures(status: ClusterStatus) -> Text:
    """ "12.4 tokens/s · 2 answers being written · 17 written · 80 ms per token predicted"."""
    text = Text()
    if status.answers:
        text.append(f"{status.tokens_per_s:.1f} tokens/s", style="bold")
        text.append(f" · {_counted(status.answers, 'answer')} being written")
    else:
        text.append("idle", style="bold")
    if status.answered:
        text.append(f" · {status.answered:,} written")
    if status.predicted_tpot_ms:
        text.append(f" · {status.predicted_tpot_ms:,.0f} ms per token predicted")
    if status.recoveries:
        text.append(f" · recovered {_counted(status.recoveries, 'time')}")
    return text


def events(lines: Sequence[str]) -> Text:
    """The last few lines that a user should know."""
    return Text("\n" + "\n".join(lines[-_EVENTS:]), style="dim")


def registered_table(devices: Sequence[DeviceStatus]) -> Table:
    """For `cluster devices`: who may join, and who is there."""
    table = _table(("device", "", "address", "layers"), wrapped=(3,))
    for device in devices:
        words, style = _STATES[device.state]
        table.add_row(_name(device), Text(words, style), Text(device.host), _layers(device))
    return table


def duration(seconds: float) -> str:
    """ "8 s", "2:05"."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 100 else f"{whole // 60}:{whole % 60:02}"


def _table(headings: Sequence[str], right: Sequence[int] = (), wrapped: Sequence[int] = ()) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for index, words in enumerate(headings):
        table.add_column(words, justify="right" if index in right else "left", no_wrap=index not in wrapped)
    return table


def _name(device: DeviceStatus) -> Text:
    return Text.assemble((device.name, "bold"), (" head", "dim") if device.is_head else "")


def _layers(device: DeviceStatus) -> str:
    spans = layer_ranges(device.layers)
    shown = ", ".join(spans[:3]) + (f" and {len(spans) - 3} more" if len(spans) > 3 else "")
    return f"{shown} ({device.streamed_layers} from disk)" if device.streamed_layers else shown


def _memory(device: DeviceStatus) -> str:
    """What the engine has, of what the plan gives it."""
    used, planned = device.stats.engine_bytes, device.planned_memory_bytes
    if not planned:
        return _size(used)
    short, whole = gigabytes(used), gigabytes(planned)
    return f"{short.removesuffix(whole[-3:])} of {whole}"


def _size(count: int) -> str:
    return gigabytes(count) if count else "–"


def _rate(per_second: float) -> str:
    return f"{gigabytes(per_second)}/s" if per_second >= 1000 else "–"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
