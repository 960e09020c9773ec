"""The running cluster for run and chat, and the line that says so."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from homeinfer.chat.text import for_terminal
from homeinfer.cli import ui
from homeinfer.cli.cluster_view import cluster_words
from homeinfer.cli.opening import Opened
from homeinfer.cluster.client import ClusterClient, ClusterTeller, find_cluster, ring_devices
from homeinfer.cluster.local import RingOptions
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.engine.answers import Generator
from homeinfer.engine.tokenizer import Tokenizer
from homeinfer.model.header import read_header

_LOOK_SECONDS = 0.3
_LONGER = "take the cluster down and up again with a larger --ctx"


@contextlib.contextmanager
def opened_cluster(model: Path | None, options: RingOptions, *, quiet: bool) -> Iterator[Opened | None]:
    """The cluster, as soon as it is ready; None when it runs another model or is just ending.

    Raises HomeinferError when it does not answer.
    """
    client = find_cluster()
    if client is None:
        yield None
        return
    with contextlib.closing(client):
        status = _ready(client, model, quiet=quiet)
    if status is None:
        yield None
        return
    if not quiet:
        _say(using_line(status, options))
    header = read_header(Path(status.model_path))
    with (
        _ended_by_signals(),
        contextlib.closing(Tokenizer(header.files[0].path)) as tokenizer,
        contextlib.closing(ClusterTeller(client.folder, status)) as teller,
    ):
        if not quiet:
            teller.on_notice = _in_an_answer
        yield Opened(status.model, header, tokenizer, Generator(teller, tokenizer, _LONGER))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A closed terminal, or a request to end, ends this process in order: the cluster must not write for nobody."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            before[getattr(signal, name)] = signal.signal(getattr(signal, name), leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(client: ClusterClient, model: Path | None, *, quiet: bool) -> ClusterStatus | None:
    """Its status when it can answer; None when it is not the one that is asked for."""
    status = client.status()
    if model is not None and not is_same_model(model, Path(status.model_path)):
        if not quiet:
            _say(f"the cluster on this machine runs {status.model}: {model.name} runs on this machine alone")
        return None
    said = ""
    while status.state not in ("ready", "recovering"):
        if status.state == "stopping":
            return None
        if status.state != said and not quiet:
            _say(
                f"the cluster on this machine is not ready yet, {cluster_words(status.state)}; --local goes without it"
            )
        said = status.state
        time.sleep(_LOOK_SECONDS)
        status = client.status()
    return status


def is_same_model(named: Path, running: Path) -> bool:
    """Whether these are one file, or parts of one model. Raises HomeinferError for a file that is no model."""
    with contextlib.suppress(OSError):
        if named.samefile(running):
            return True
    parts = [Path(file.path) for file in read_header(named).files]
    with contextlib.suppress(OSError):
        return len(parts) > 1 and any(part.samefile(running) for part in parts)
    return False


def using_line(status: ClusterStatus, options: RingOptions) -> str:
    """ "the cluster on this machine answers: desk, laptop and phone (--local goes without it)"."""
    names = [device.name for device in ring_devices(status)]
    which = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    set_there = [
        name
        for name, is_given in (
            ("--ctx", options.n_ctx not in (0, status.n_ctx)),
            ("--threads", options.n_threads != 0),
            ("--gpu-layers", options.gpu_layers != 0),
            ("--stream", not options.resident),
        )
        if is_given
    ]
    ignored = f"; {' and '.join(set_there)} count only with it" if set_there else ""
    return f"the cluster on this machine answers: {which} (--local goes without it{ignored})"


def _say(line: str) -> None:
    ui.notes.print(Text(for_terminal(line)), style="dim", soft_wrap=True)


def _in_an_answer(line: str) -> None:
    """What the cluster says while an answer is written: on a line of its own."""
    ui.notes.print(Text(f"\n[{for_terminal(line)}]"), style="dim", soft_wrap=True)
