"""`homeinfer profile`: what this device can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from homeinfer.cli import ui
from homeinfer.cli.profile_view import measuring, show_profile
from homeinfer.cluster.planning.profile import VERSION, DeviceProfile, ProfileFile
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, printable, read_header
from homeinfer.profiling.measure import ProfileOptions, measure_profile
from homeinfer.profiling.profile_file import check_destination, write_profile
from homeinfer.profiling.quiet import quiet_note


def profile(
    model: Annotated[
        Path | None,
        typer.Argument(help="A GGUF file whose layers are timed too; its header is enough.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the profile as one JSON object.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the profile for homeinfer plan to FILE."),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="What to call this device; default: the machine's own name.")
    ] = "",
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, max=1024, help="Threads; 0: one per core.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all anew, whatever was measured before.")] = False,
) -> None:
    """Measure this device for homeinfer plan: processor, memory, disk, GPUs, and how fast a model's layers run here.

    With MODEL, small stand-ins of its layers are made (same shapes and types, random weights) and timed. Takes up to
    a minute, and a few seconds the next time.

    Example: homeinfer profile model.gguf -o laptop.json
    """
    _check_name(name)
    header: Header | None = None if model is None else read_header(model, allow_truncated=True)
    if output is not None:
        check_destination(output)
    with measuring() as on_progress:
        found = measure_profile(header, ProfileOptions(name=name, n_threads=threads, fresh=fresh), on_progress)
    _give(found, header, json=json, output=output)


def _check_name(name: str) -> None:
    if name and (len(name) > 64 or not name.isprintable() or name != name.strip()):
        raise HomeinferError(f"'{printable(name, 80)}' is no name for a device: up to 64 printable characters")


def _give(found: DeviceProfile, header: Header | None, *, json: bool, output: Path | None) -> None:
    data = msgspec.json.format(msgspec.json.encode(ProfileFile(VERSION, (found,))), indent=1)
    if output is not None:
        write_profile(output, data)
    if json:
        typer.echo(data.decode())
    elif output is None:
        show_profile(found, header)
    note = quiet_note(found)
    if note:
        ui.notes.print(f"[yellow]{note}[/]", highlight=False)
    if output is not None and not json:
        ui.notes.print(f"{found.name}: written to {printable(str(output), 1000)}", highlight=False)
