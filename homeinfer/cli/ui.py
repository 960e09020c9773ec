"""Every progress bar, table and live view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from homeinfer.engine.device_info import DeviceInfo

console = Console()
"""For what a user asked to see."""

notes = Console(stderr=True)
"""For progress and remarks, so that a script's output stays clean."""


@contextmanager
def copying(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over bytes, with rate and time left; gives the function that takes bytes done since the last call."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True, disable=total == 0 or not notes.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


@contextmanager
def loading(names: list[str]) -> Iterator[Callable[[list[float]], None]]:
    """One bar per device over the share of its weights that is loaded; gives the function that takes the shares."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        tasks = [progress.add_task(f"loading {name}", total=1.0) for name in names]

        def show(shares: list[float]) -> None:
            for task, share in zip(tasks, shares, strict=True):
                progress.update(task, completed=share)

        yield show


def layer_range(first: int, last: int) -> str:
    """Layers [first, last) as a person counts them."""
    return f"{first}–{last - 1}" if last - first > 1 else f"{first}"


def layer_ranges(spans: Iterable[tuple[int, int]]) -> list[str]:
    """Those of a device, neighbours as one: resident and streamed layers of one window are spans of their own."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and merged[-1][1] == first:
            first = merged.pop()[0]
        merged.append((first, last))
    return [layer_range(first, last) for first, last in merged]


def show_plan(devices: tuple[DeviceInfo, ...], layer_bytes: list[int]) -> None:
    """Who holds which layers, and how much that is."""
    table = Table(title="plan", title_justify="left", box=None, header_style="bold")
    for heading in ("device", "layers", "weights"):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    for device in devices:
        for first, last in device.windows:
            size = sum(layer_bytes[first:last]) / 1e6
            table.add_row(device.name, layer_range(first, last), f"{size:,.1f} MB")
    notes.print(table)
