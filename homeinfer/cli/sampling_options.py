"""The sampling options that run and chat share."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Annotated

import typer

from homeinfer.engine.request import Sampling
from homeinfer.errors import HomeinferError

_PANEL = "Choosing tokens"


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen, as typed."""

    temp: Annotated[
        float,
        typer.Option(min=0, max=100, help="Temperature; 0: always the likeliest token.", rich_help_panel=_PANEL),
    ] = 0.8
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**32 - 1, help="For the same text again; default: another each time.", rich_help_panel=_PANEL
        ),
    ] = None
    top_k: Annotated[int, typer.Option(min=0, help="Only the K likeliest; 0: all.", rich_help_panel=_PANEL)] = 40
    top_p: Annotated[
        float, typer.Option(min=0.0001, max=1, help="Only the likeliest that make up P.", rich_help_panel=_PANEL)
    ] = 0.95
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Only those at least P times the likeliest.", rich_help_panel=_PANEL)
    ] = 0.05
    repeat_penalty: Annotated[
        float, typer.Option(min=0.01, max=10, help="Over 1: repeats less.", rich_help_panel=_PANEL)
    ] = 1.0
    repeat_last_n: Annotated[
        int, typer.Option(min=0, help="Tokens that penalties look back on.", rich_help_panel=_PANEL)
    ] = 64
    frequency_penalty: Annotated[
        float, typer.Option(min=-10, max=10, help="Per time a token came.", rich_help_panel=_PANEL)
    ] = 0.0
    presence_penalty: Annotated[
        float, typer.Option(min=-10, max=10, help="For a token that came at all.", rich_help_panel=_PANEL)
    ] = 0.0
    grammar: Annotated[
        Path | None, typer.Option(help="A GBNF file that the answer must follow.", rich_help_panel=_PANEL)
    ] = None

    def sampling(self) -> Sampling:
        """With a seed of its own unless one was given. Raises HomeinferError when the grammar can't be read."""
        return Sampling(
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=self.repeat_last_n,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            seed=secrets.randbits(32) if self.seed is None else self.seed,
            grammar=grammar_text(self.grammar),
        )


def grammar_text(path: Path | None) -> str | None:
    """The grammar file's text. Raises HomeinferError when it can't be read."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as problem:
        raise HomeinferError(f"{path}: the grammar can't be read: {problem.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise HomeinferError(f"{path}: the grammar is no UTF-8 text; name a GBNF file") from None
