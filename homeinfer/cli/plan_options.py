"""The options of `homeinfer plan`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from homeinfer.cli import shared_options
from homeinfer.cli.shared_options import wrong_usage
from homeinfer.cluster.planning.plan import Constraints, Objective, Wire, Workload
from homeinfer.cluster.planning.profile import Network
from homeinfer.model.header import printable

_WHAT_FOR = "What the plan is for"
_DEMANDS = "What you demand"
_MORE = "What else to show"

FilesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, or any part of a split one; its header alone is enough.",
        show_default=False,
    ),
]
ProfilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--profiles",
        "-p",
        metavar="FILE…",
        help="The devices: files from homeinfer profile MODEL -o FILE, as many as you like.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, shared_options.json_option(_MORE)]
TimelineOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.svg", help="Write a picture of one token's way around the ring.", rich_help_panel=_MORE),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Judge other rules for the same devices, too.", rich_help_panel=_MORE)
]

DEFAULT_LINK = "300mbit,1ms"
_PROMPT = 512
_LINK = re.compile(
    r"(?P<rate>\d+(?:\.\d+)?) *(?P<unit>[kmg])bit(?:/s)?(?: *, *(?P<delay>\d+(?:\.\d+)?) *(?P<of>us|ms|s))?"
)
_RATES = {"k": 1e3, "m": 1e6, "g": 1e9}
_DELAYS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclasses.dataclass(frozen=True)
class DemandOptions:
    """What a plan is for and what it must keep to, as typed."""

    ctx: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of context.", rich_help_panel=_WHAT_FOR)] = 4096
    sequences: Annotated[
        int, typer.Option(metavar="N", min=1, max=1024, help="Answers at the same time.", rich_help_panel=_WHAT_FOR)
    ] = 1
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of the prompt; 512 unless given, or what the context holds.",
            rich_help_panel=_WHAT_FOR,
        ),
    ] = None
    objective: Annotated[Objective, shared_options.objective(_WHAT_FOR)] = "latency"
    kv_type: Annotated[
        str, typer.Option(metavar="TYPE", help="The KV cache's type: f16, q8_0, …", rich_help_panel=_WHAT_FOR)
    ] = "f16"
    wire: Annotated[Wire, typer.Option(help="How hidden states travel between devices.", rich_help_panel=_WHAT_FOR)] = (
        "f32"
    )
    link: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,DELAY",
            help="The network of devices whose profile has no figures for it, such as 300mbit,1ms (taken unless "
            "given).",
            rich_help_panel=_WHAT_FOR,
        ),
    ] = None
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The device you sit at; that of the first profile unless given.",
            rich_help_panel=_DEMANDS,
        ),
    ] = None
    require: Annotated[list[str] | None, shared_options.required(_DEMANDS)] = None
    forbid: Annotated[list[str] | None, shared_options.forbidden(_DEMANDS)] = None
    private_layers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="So many first and last layers stay on the head: the more, the less others can tell of your text.",
            rich_help_panel=_DEMANDS,
        ),
    ] = 1
    rounds: Annotated[int, shared_options.rounds(_DEMANDS)] = 0
    headroom: Annotated[str, shared_options.headroom(_DEMANDS)] = "10%"

    def workload(self) -> Workload:
        """Exits with 2 for a headroom that is none."""
        return Workload(
            n_ctx=self.ctx,
            sequences=self.sequences,
            prompt_tokens=min(self.prompt_tokens or _PROMPT, self.ctx),
            kv_type=self.kv_type,
            wire=self.wire,
            headroom=shared_options.parse_headroom(self.headroom),
            objective=self.objective,
        )

    def constraints(self) -> Constraints:
        return Constraints(
            head=self.head or "",
            required=tuple(self.require or ()),
            forbidden=tuple(self.forbid or ()),
            private_first=self.private_layers,
            private_last=self.private_layers,
            rounds=self.rounds,
        )


def model_and_profiles(files: Sequence[Path], profiles: Sequence[Path] | None) -> tuple[Path, list[Path]]:
    """The model, and all profiles in the order in which they were named after --profiles.

    `--profiles a.json b.json` reaches us as the option a.json and a second file b.json, wherever the model stood: the
    model is the one that ends in .gguf, or else the first.
    """
    if not profiles:
        wrong_usage("say which devices: --profiles desk.json laptop.json; homeinfer profile MODEL -o FILE makes them")
    models = [file for file in files if file.suffix.lower() == ".gguf"]
    if len(models) > 1:
        wrong_usage(f"{models[0]} and {models[1]} are both models; name one, any part of a split one")
    model = models[0] if models else files[0]
    rest = list(files)
    rest.remove(model)
    return model, [*profiles[:1], *rest, *profiles[1:]]


def parse_link(text: str | None) -> Network:
    """ "300mbit,1ms": rate, and one way's delay between two such devices, of which each takes half. Exits with 2 for
    anything else."""
    match = _LINK.fullmatch((text or DEFAULT_LINK).strip().lower())
    rate = float(match["rate"]) * _RATES[match["unit"]] / 8 if match else 0.0
    if match is None or not 0 < rate < 1e15:
        wrong_usage(f"--link: '{printable(text or '', 40)}' is no link; write rate and delay, such as 300mbit,1ms")
    delay = float(match["delay"] or 0) * _DELAYS[match["of"] or "s"]
    return Network(bytes_per_s=rate, latency_s=delay / 2)
