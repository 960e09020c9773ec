"""Commands whose options come in dataclasses, as typer runs them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from homeinfer.cli.option_groups import with_options


@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 3
    tall: Annotated[bool, typer.Option("--tall")] = False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["desk"], "desk Size(width=3, tall=False) False"),
        (["desk", "--tall", "--json", "--width", "5"], "desk Size(width=5, tall=True) True"),
    ],
)
def test_each_field_is_an_option_and_the_command_gets_them_together(words: list[str], said: str) -> None:
    app = typer.Typer()

    @app.command()
    @with_options
    def show(name: str, *, size: Size, json: Annotated[bool, typer.Option("--json")] = False) -> None:
        """Show it."""
        typer.echo(f"{name} {size} {json}")

    assert CliRunner().invoke(app, words).output.strip() == said
    assert "Show it." in CliRunner().invoke(app, ["--help"]).output
