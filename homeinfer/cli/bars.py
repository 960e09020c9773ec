"""Bars of work that says its fraction done: time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homeinfer.quant.quantize import Progress


@contextlib.contextmanager
def tensor_bar(name: str) -> Iterator[Callable[[Progress], None] | None]:
    """For quantize's on_progress."""
    with _bar(name) as update:
        if update is None:
            yield None
            return
        yield lambda at: update(completed=at.fraction, detail=f"{at.index}/{at.count} {at.tensor}")


@contextlib.contextmanager
def fraction_bar(name: str) -> Iterator[Callable[[float], None] | None]:
    """For work that says only its fraction done."""
    with _bar(name) as update:
        yield None if update is None else lambda fraction: update(completed=fraction)


@contextlib.contextmanager
def stage_bar() -> Iterator[Callable[[str, float], None]]:
    """For work in stages: the function takes a stage's name and its fraction done."""
    with _bar("") as update:

        def show(stage: str, fraction: float) -> None:
            if update is not None:
                update(completed=fraction, description=stage)

        yield show


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[..., Any] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    # a twentieth of a second that only those pay who see the bar
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from homeinfer.cli.ui import notes

    bar = ProgressBar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[detail]}", markup=False, style="dim"),
        console=notes,
        transient=True,
    )
    with bar:
        task = bar.add_task(name, total=1.0, detail="")
        yield lambda **changes: bar.update(task, **changes)
