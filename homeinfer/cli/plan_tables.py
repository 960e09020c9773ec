"""What `homeinfer plan` shows to people."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from homeinfer.cli.ui import console, layer_range
from homeinfer.cluster.planning.plan import Cause
from homeinfer.cluster.planning.problem_checks import gigabytes
from homeinfer.cluster.planning.report import Advice, Compared, PlannedDevice, PlannedWindow, PlanReport
from homeinfer.cluster.planning.verdict import verdict

_CAUSES = (
    ("compute_ms", "computing", "blue", "█"),
    ("disk_ms", "waiting for the disk", "yellow", "▓"),
    ("network_ms", "network", "green", "▒"),
    ("overhead_ms", "homeinfer itself", "magenta", "░"),
)
_BAR = 32
_SHOWN = 0.0005
"""A smaller share of a token is nothing to show."""


def show_report(report: PlanReport, *, has_advice: bool = True) -> None:
    """Windows, speed, where the time goes, memory, who is left out, what would help where that was looked for."""
    console.print(_heading(report))
    console.print()
    console.print(_windows(report))
    console.print(_speed(report), soft_wrap=True)
    console.print(Text(verdict(report)), soft_wrap=True)
    console.print()
    _show_time(report)
    _show_memory(report)
    _show_left_out(report.devices)
    if has_advice:
        _show_advice(report)
    if report.compare:
        console.print("\n[bold]other rules, same devices[/bold]")
        console.print(_comparison(report))
    if report.notes:
        console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _heading(report: PlanReport) -> Text:
    model, work = report.model, report.workload
    text = Text.assemble((model.name, "bold"), f" · {_counted(model.n_layer, 'layer')} · {gigabytes(model.nbytes)}")
    text.append(f" · {work.n_ctx:,} tokens of context")
    if work.sequences > 1:
        text.append(f" · {work.sequences} answers at once")
    return text


def _windows(report: PlanReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("device", "layers", "where"):
        table.add_column(heading, justify="right" if heading == "layers" else "left")
    reading = {device.name for device in report.devices if device.read_bytes}
    for window in report.windows:
        span = layer_range(window.first, window.last)
        table.add_row(escape(window.device), span, where(window, reads=window.device in reading))
    return table


def where(window: PlannedWindow, *, reads: bool = True) -> str:
    """ "12 in memory, 4 from disk, 8 on the GPU". reads: its device reads its disk for each token; where it need not,
    streamed layers stay in memory once they were read."""
    gpu = "on the GPU" if window.gpu == 0 else f"on GPU {window.gpu}"
    streamed = window.streamed_layers if reads else 0
    counts = (
        (window.resident_layers + window.streamed_layers - streamed, "in memory"),
        (streamed, "from disk"),
        (window.gpu_layers, gpu),
    )
    return ", ".join(f"{count} {place}" for count, place in counts if count)


def _speed(report: PlanReport) -> Text:
    first, rest = speed_line(report).split(" · ", 1)
    return Text.assemble("\n", (first, "bold"), f" · {rest}")


def speed_line(report: PlanReport) -> str:
    """ "12.4 tokens/s · 80.6 ms per token · first token after 1.42 s (a prompt of 512 tokens)"."""
    predicted, work = report.predicted, report.workload
    together = " together" if work.sequences > 1 else ""
    first = f"first token after {milliseconds(predicted.ttft_ms)} (a prompt of {work.prompt_tokens:,} tokens)"
    rate = f"{_figure(predicted.tokens_per_s)} tokens/s{together}"
    return f"{rate} · {milliseconds(predicted.tpot_ms)} per token · {first}"


def _show_time(report: PlanReport) -> None:
    total = max(report.predicted.tpot_ms, 1e-9)
    console.print("[bold]where the time of a token goes[/bold]")
    table = _plain_table()
    for field, words, colour, mark in _CAUSES:
        spent = getattr(report.predicted.cause, field)
        if spent / total >= _SHOWN:
            bar = Text(mark * max(_length(spent, total), 1), style=colour)
            table.add_row(words, bar, milliseconds(spent), _percent(spent / total))
    console.print(table)
    used = [device for device in report.devices if device.used]
    if len(used) < 2:
        return
    console.print()
    table = _plain_table()
    for device in used:
        spent = _sum(device.cause)
        table.add_row(escape(device.name), _stack(device.cause, total), milliseconds(spent), _percent(spent / total))
    console.print(table)


def _plain_table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify)
    return table


def _stack(cause: Cause, total: float) -> Text:
    """One bar of all causes; rounding is carried on, so that its length is right."""
    text, drawn, spent = Text(), 0, 0.0
    for field, _, colour, mark in _CAUSES:
        spent += getattr(cause, field)
        until = _length(spent, total)
        text.append(mark * (until - drawn), style=colour)
        drawn = max(until, drawn)
    return text


def _length(spent: float, total: float) -> int:
    return round(_BAR * min(max(spent / total, 0.0), 1.0))


def _sum(cause: Cause) -> float:
    return cause.compute_ms + cause.disk_ms + cause.network_ms + cause.overhead_ms


def _show_memory(report: PlanReport) -> None:
    """Only columns that have something to say."""
    console.print("\n[bold]memory[/bold]")
    rows = [
        (
            escape(device.name),
            f"{gigabytes(device.memory_bytes)} of {gigabytes(device.memory_total_bytes)}",
            gigabytes(max(device.memory_free_bytes, 0)),
            _on_gpus(device),
            gigabytes(device.read_bytes) if device.read_bytes else "",
        )
        for device in report.devices
        if device.used
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    columns = ("device", "homeinfer takes", "stays free", "on the GPU", "read per token")
    shown = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    for index in shown:
        table.add_column(columns[index], justify="left" if not index else "right")
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    console.print(table)


def _on_gpus(device: PlannedDevice) -> str:
    """ "5.1 GB of 8.0 GB"; of several GPUs those that are used."""
    pairs = zip(device.gpu_bytes, device.gpu_total_bytes, strict=True)
    return ", ".join(f"{gigabytes(used)} of {gigabytes(total)}" for used, total in pairs if used)


def _show_left_out(devices: Iterable[PlannedDevice]) -> None:
    out = [device for device in devices if not device.used]
    if out:
        console.print("\n[bold]left out[/bold]")
    for device in out:
        console.print(Text(f"{device.name}: {device.reason}"), soft_wrap=True)


def _show_advice(report: PlanReport) -> None:
    console.print("\n[bold]what would help most[/bold]")
    if not report.advice:
        console.print("nothing that money buys: no change that was tried gives more than 3 %", soft_wrap=True)
    for advice in report.advice:
        console.print(Text(advice_line(advice, report.workload.objective)), soft_wrap=True)


def advice_line(advice: Advice, objective: str) -> str:
    """ "+2 GB on laptop: −140 ms per token (−31 %)"."""
    share = f"{_signed(100 * advice.change)} %"
    if objective == "throughput":
        return f"{advice.what}: {_signed(advice.difference)} tokens/s ({share})"
    size = milliseconds(abs(advice.difference))
    sign = "−" if advice.difference < 0 else "+"
    return f"{advice.what}: {sign}{size} {'per token' if objective == 'latency' else 'to the first token'} ({share})"


def _comparison(report: PlanReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("rule", "per token", "first token", "tokens/s", "time per token"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    mine = report.predicted
    rows = (Compared("homeinfer", True, mine.tpot_ms, mine.ttft_ms, mine.tokens_per_s), *report.compare)
    for row in rows:
        if row.feasible and row.tpot_ms is not None and row.ttft_ms is not None and row.tokens_per_s is not None:
            times = row.tpot_ms / mine.tpot_ms if mine.tpot_ms else math.nan
            beside = "" if row.name == "homeinfer" else f"{_figure(times)} ×"
            cells = (milliseconds(row.tpot_ms), milliseconds(row.ttft_ms), _figure(row.tokens_per_s), beside)
        else:
            cells = ("–", "–", "–", escape(row.why_not))
        table.add_row(escape(row.name), *cells)
    return table


def milliseconds(ms: float) -> str:
    """ "4.2 ms", "140 ms", "1.4 s", "3.2 min"."""
    if ms < 1000:
        return f"{_figure(ms)} ms"
    return f"{_figure(ms / 1e3)} s" if ms < 120_000 else f"{_figure(ms / 6e4)} min"


def _figure(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"


def _signed(value: float) -> str:
    sign = "−" if value < 0 else "+"
    return f"{sign}{abs(value):.0f}" if abs(value) >= 10 else f"{sign}{abs(value):.1f}"
