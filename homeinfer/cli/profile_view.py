"""How `homeinfer profile` looks: the bar while it measures, the tables of what it found."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from homeinfer.cli.ui import console, notes
from homeinfer.cluster.planning.kinds import kind_label, layer_kinds, output_kind
from homeinfer.cluster.planning.profile import DeviceProfile, KindTimes
from homeinfer.model.header import Header
from homeinfer.profiling.progress import OnProgress

_PLACES = {"resident": "in memory", "mapped": "streamed", "gpu": "GPU"}


@contextmanager
def measuring() -> Iterator[OnProgress]:
    """A bar that says what is being measured and how many seconds are left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("getting ready", total=1.0, left="")
        begin = time.monotonic()

        def show(what: str, share: float, left: float) -> None:
            passed = time.monotonic() - begin
            # what was expected, stretched by how long the first part really took
            pace = max(passed * (1 - share) / share, 0.0) if share > 0.2 else left
            progress.update(task, description=f"measuring {what}", completed=share, left=f"{pace:.0f} s left")

        yield show


def show_profile(profile: DeviceProfile, header: Header | None) -> None:
    """Everything a profile holds, for people."""
    console.print(_facts(profile))
    if header is not None and profile.times:
        console.print(_times(profile, header))
        console.print(_meaning(profile, header), highlight=False)


def _facts(profile: DeviceProfile) -> Table:
    table = Table(title=profile.name, title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    disk = profile.disk
    rows = [
        ("processor", f"{profile.cpu} · {profile.cores} cores · {profile.threads} threads used"),
        ("system", profile.system),
        ("memory", f"{_size(profile.memory_bytes)} can be used now · read at {_rate(profile.memory_bytes_per_s)}"),
        ("GPUs", "\n".join(f"{gpu.name} ({gpu.backend}) · {_size(gpu.memory_bytes)} free" for gpu in profile.gpus)),
        (
            "disk",
            f"{_rate(disk.sequential_bytes_per_s)} in one go · {_rate(disk.layer_bytes_per_s)} by layer · "
            f"{_rate(disk.fault_bytes_per_s)} on demand · {_size(disk.free_bytes)} free",
        ),
        ("a step", f"{profile.window_ms:.2f} ms beside the layers · {profile.hop_ms:.2f} ms to receive and send"),
        ("a process", f"{_size(profile.overhead_bytes)} before any weight"),
    ]
    for what, value in rows:
        table.add_row(what, value or "none")
    return table


def _times(profile: DeviceProfile, header: Header) -> Table:
    table = Table(title="milliseconds of one layer", title_justify="left", box=None, header_style="bold")
    for heading in ("", "where", "1 token", "8 tokens", "512 tokens"):
        table.add_column(heading, justify="right" if "token" in heading else "left")
    for kind in (*dict.fromkeys(layer_kinds(header)), output_kind(header)):
        for number, times in enumerate(found for found in profile.times if found.kind == kind):
            label = kind_label(header, kind) if number == 0 else ""
            table.add_row(label, _place(times), *map(_ms, (times.decode_1_ms, times.decode_8_ms, times.prefill_512_ms)))
    return table


def _place(times: KindTimes) -> str:
    return _PLACES[times.place] + (f" {times.gpu}" if times.place == "gpu" else "")


def _meaning(profile: DeviceProfile, header: Header) -> str:
    """What the times would come to, were the whole model in memory here."""
    kinds = (*layer_kinds(header), output_kind(header))
    resident = {times.kind: times for times in profile.times if times.place == "resident"}
    token = sum(resident[kind].decode_1_ms for kind in kinds) + profile.window_ms
    prompt = sum(resident[kind].prefill_512_ms for kind in kinds) + profile.window_ms
    fits = header.nbytes + profile.overhead_bytes < profile.memory_bytes
    where = "All layers in memory here" if fits else "If all layers fitted into memory here (they don't)"
    return f"{where}: {token:,.1f} ms per token, {512e3 / prompt:,.0f} tokens of a prompt per second."


def _ms(value: float) -> str:
    return f"{value:,.3f}" if value < 10 else f"{value:,.1f}"


def _size(count: int) -> str:
    return decimal(count, precision=1)


def _rate(count: float) -> str:
    return f"{decimal(int(count), precision=1)}/s"
