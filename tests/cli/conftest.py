"""The command without a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

from homeinfer.cli.main import main


class Homeinfer(Protocol):
    """Runs the command: its exit code, and what it printed."""

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def homeinfer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Homeinfer:
    """The command in this process: for refusals, of which there are many. Whatever it does not catch fails the test."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        words = ["homeinfer", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(left.value.code or 0), said.out, said.err)

    return run
