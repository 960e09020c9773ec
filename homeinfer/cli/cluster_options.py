"""The options of `homeinfer cluster`."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Annotated, Literal

import typer

from homeinfer.cli import shared_options
from homeinfer.cluster.coordinator.options import PORT
from homeinfer.cluster.planning.plan import Objective

_WHO = "Who takes part"
_RING = "How it runs"
_WHERE = "Where this machine is"


def _address(text: str) -> str:
    """An address of this machine as typed; exits with 2 for what is none. It may be one that only others see (NAT)."""
    if text:
        try:
            socket.getaddrinfo(text, None)
        except (OSError, UnicodeError):
            raise typer.BadParameter(
                f"'{text}' is neither an address nor a name that this machine can look up"
            ) from None
    return text


NameOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What to call this machine; its own name unless given.",
        show_default=False,
        rich_help_panel=_WHERE,
    ),
]
HostOption = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        callback=_address,
        help="The address at which the others reach this machine; found out unless given.",
        show_default=False,
        rich_help_panel=_WHERE,
    ),
]
ThreadsOption = Annotated[
    int,
    typer.Option("--threads", "-t", min=0, help="Threads on this machine; 0: one per core.", rich_help_panel=_WHERE),
]
DeviceArgument = Annotated[
    str, typer.Argument(metavar="DEVICE", help="Its name, as homeinfer cluster devices shows it.", show_default=False)
]
LeftHeadOption = Annotated[
    str,
    typer.Option("--head", metavar="NAME", help="Which head, where this machine knows several.", show_default=False),
]


@dataclasses.dataclass(frozen=True)
class UpOptions:
    """Those of `cluster up`, as typed."""

    devices: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Wait until so many devices are there, this one included.",
            show_default=False,
            rich_help_panel=_WHO,
        ),
    ] = 0
    wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="Wait so long for whoever comes.", show_default=False, rich_help_panel=_WHO
        ),
    ] = 0
    require: Annotated[list[str] | None, shared_options.required(_WHO)] = None
    forbid: Annotated[list[str] | None, shared_options.forbidden(_WHO)] = None
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="What homeinfer profile wrote for this model on a device, which is then not measured again.",
            rich_help_panel=_WHO,
        ),
    ] = None
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Measure all devices anew, whatever was measured before.", rich_help_panel=_WHO),
    ] = False
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Load what was planned without asking.", rich_help_panel=_WHO)
    ] = False
    ctx: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Context length in tokens; 0: the model's own, 4,096 at most.",
            rich_help_panel=_RING,
        ),
    ] = 0
    sequences: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="Answers at the same time.", rich_help_panel=_RING)
    ] = 1
    wire: Annotated[
        Literal["f32", "f16", "bf16", "q8", "auto"],
        typer.Option(
            help="How hidden states travel: f32 gives the tokens of one machine; auto: smaller where the network is "
            "slow.",
            rich_help_panel=_RING,
        ),
    ] = "auto"
    replicas: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=16,
            help="Keep each layer on the disks of N devices, so that a lost device costs no transfer.",
            rich_help_panel=_RING,
        ),
    ] = 1
    rounds: Annotated[int, shared_options.rounds(_RING)] = 0
    objective: Annotated[Objective, shared_options.objective(_RING)] = "latency"
    headroom: Annotated[str, shared_options.headroom(_RING)] = "10%"
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is ready; homeinfer cluster down ends it.")
    ] = False
    name: NameOption = ""
    host: HostOption = ""
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65534,
            help="TCP port for the other devices; pairing takes the next one. 0: free ones.",
            rich_help_panel=_WHERE,
        ),
    ] = PORT
    threads: ThreadsOption = 0


@dataclasses.dataclass(frozen=True)
class JoinOptions:
    """Those of `cluster join`, as typed."""

    code: Annotated[
        list[str] | None,
        typer.Argument(metavar="CODE", help="What cluster up shows; only the first time.", show_default=False),
    ] = None
    head: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which head, where this machine knows several; the last one unless given.",
            show_default=False,
        ),
    ] = ""
    models: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the model's file may be on this machine, so that nothing must be sent; the current folder "
            "unless given.",
            show_default=False,
        ),
    ] = None
    stay: Annotated[bool, typer.Option("--stay", help="When the cluster goes down, wait until it comes up again.")] = (
        False
    )
    name: NameOption = ""
    host: HostOption = ""
    threads: ThreadsOption = 0
