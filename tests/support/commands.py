"""homeinfer's commands in processes of their own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

HOMEINFER = (sys.executable, "-c", "from homeinfer.cli.main import main; main()")
ENVIRONMENT = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
HANG_SECONDS = 150.0
"""A command that has not ended after so long hangs: on a busy machine the slowest takes some twenty seconds."""


def ran(*arguments: str | Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """What a command said and its exit code; largest_file: bytes that a file of it may have, as on a full disk."""

    def limit() -> None:
        assert largest_file is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [*HOMEINFER, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
        env=ENVIRONMENT,
        preexec_fn=None if largest_file is None else limit,
    )
