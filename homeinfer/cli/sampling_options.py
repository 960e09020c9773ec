"""The sampling options that run and chat share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from homeinfer.errors import HomeinferError

_PANEL = "Choosing tokens"

TemperatureOption = Annotated[
    float,
    typer.Option("--temp", min=0, max=100, help="Temperature; 0: always the likeliest token.", rich_help_panel=_PANEL),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        max=2**32 - 1,
        help="For the same text again; default: another each time.",
        rich_help_panel=_PANEL,
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Only the K likeliest; 0: all.", rich_help_panel=_PANEL)
]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", min=0.0001, max=1, help="Only the likeliest that make up P.", rich_help_panel=_PANEL),
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", min=0, max=1, help="Only those at least P times the likeliest.", rich_help_panel=_PANEL),
]
RepeatOption = Annotated[
    float, typer.Option("--repeat-penalty", min=0.01, max=10, help="Over 1: repeats less.", rich_help_panel=_PANEL)
]
RepeatLastOption = Annotated[
    int, typer.Option("--repeat-last-n", min=0, help="Tokens that penalties look back on.", rich_help_panel=_PANEL)
]
FrequencyOption = Annotated[
    float,
    typer.Option("--frequency-penalty", min=-10, max=10, help="Per time a token came.", rich_help_panel=_PANEL),
]
PresenceOption = Annotated[
    float,
    typer.Option("--presence-penalty", min=-10, max=10, help="For a token that came at all.", rich_help_panel=_PANEL),
]
GrammarOption = Annotated[
    Path | None, typer.Option("--grammar", help="A GBNF file that the answer must follow.", rich_help_panel=_PANEL)
]


def grammar_text(path: Path | None) -> str | None:
    """The grammar file's text. Raises HomeinferError when it can't be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise HomeinferError(f"the grammar {path} can't be read: {problem}") from problem
