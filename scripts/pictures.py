"""Makes README's pictures of a cluster again: real commands in terminals of their own, three devices on this machine.

    python scripts/pictures.py [FOLDER]      # docs/ unless given; two minutes, on a machine that is quiet

The devices measure themselves once, with `homeinfer profile`. Their profiles then say that each
has so little memory that all three must take part, as with a model that fits on none of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pseudo_terminal import COLUMNS, Terminal, plain
from rich.console import Console
from rich.text import Text

from homeinfer.cli.default_model import default_model
from homeinfer.cluster.client import find_cluster
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.errors import HomeinferError

DEVICES = ("desktop", "laptop", "box")
MEMORY = 118_000_000
PATIENCE = 120.0
CONTEXT = "1024"
MESSAGE = "Write a short story about a lighthouse."


class Screen(Terminal):
    """A terminal with enough rows for all that a command shows, and how it looks now."""

    def __init__(self, words: list[str], environment: dict[str, str], folder: Path, *, has_keys: bool = True) -> None:
        super().__init__(words, environment, folder=folder, rows=60, has_keys=has_keys)

    def lines(self) -> list[str]:
        """What is on the screen, with colours as escape sequences."""
        return drawn(self.shown.decode("utf-8", "replace"))

    def see(self, pattern: str) -> str:
        """Wait until the screen shows this."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, plain("\n".join(self.lines())))

        wait(lambda: found() is not None, lambda: f"{pattern!r} was not seen in {self.text[-2000:]}")
        match = found()
        assert match is not None
        return match[0]

    def kill(self) -> None:
        """As if the machine were off."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Ctrl-C, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        self.close()


def drawn(written: str) -> list[str]:
    """What a terminal shows after this: of escape sequences, the few that rich uses for a view that it draws anew."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif piece.endswith("A") and piece.startswith("\x1b["):
            row = max(0, row - int(piece[2:-1] or 1))
        elif piece.endswith("K"):
            lines[row] = ""
        elif not piece.startswith("\x1b") or piece.endswith("m"):
            lines[row] = piece if column == 0 and not piece.startswith("\x1b") else lines[row] + piece
            column += 1
    return lines


def picture(path: Path, title: str, lines: list[str]) -> None:
    """Lines of a terminal as an SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    while lines and not plain(lines[-1]).strip():
        lines.pop()
    for line in lines:
        text = Text.from_ansi(line)
        for part in text.divide(range(COLUMNS, len(text), COLUMNS)):  # as a terminal does, at any letter
            console.print(part, no_wrap=True)
    path.write_text(console.export_svg(title=title, unique_id=path.stem), encoding="utf-8")
    print(f"{path}: {len(lines)} lines", flush=True)


class Evening:
    """The devices, each with folders of its own in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[str, Screen] = {}

    def start(self, device: str, *words: str, has_keys: bool = True) -> Screen:
        folder = self.root / device
        folder.mkdir(exist_ok=True)
        names = ("STATE", "WINDOWS", "WEIGHTS", "DATA")
        environment = os.environ | {f"HOMEINFER_{name}": str(folder / name.lower()) for name in names}
        environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONUTF8": "1"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "homeinfer", *words]
        made = Screen(command, environment, folder, has_keys=has_keys)
        self.open[f"{device} {words[0]}"] = made
        return made

    def status(self) -> ClusterStatus | None:
        with contextlib.suppress(HomeinferError):
            client = find_cluster(self.root / DEVICES[0] / "state")
            if client is not None:
                with contextlib.closing(client):
                    return client.status()
        return None

    def wait_for(self, wanted: Callable[[ClusterStatus], bool]) -> ClusterStatus:
        """The first status that is as wanted."""
        seen: list[ClusterStatus | None] = []

        def is_so() -> bool:
            seen.append(self.status())
            return seen[-1] is not None and wanted(seen[-1])

        wait(is_so, lambda: f"the cluster did not come so far: {seen[-1]}")
        assert seen[-1] is not None
        return seen[-1]


@contextlib.contextmanager
def evening() -> Iterator[Evening]:
    with tempfile.TemporaryDirectory(prefix="hi-pictures-") as folder:
        made = Evening(Path(folder))
        try:
            yield made
        finally:
            for terminal in reversed(made.open.values()):
                terminal.end()


def wait(is_so: Callable[[], bool], complaint: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit(complaint())
        time.sleep(0.05)


def profiles(made: Evening) -> Path:
    """What this machine measures of itself, as of three that have less memory."""
    path = made.root / "one.json"
    measuring = made.start("profile", "profile", str(default_model()), "--threads", "1", "--fresh", "-o", str(path))
    wait(lambda: measuring.process.poll() is not None, lambda: "measuring took too long")
    one = json.loads(path.read_bytes())
    network = {"bytes_per_s": 1e9, "latency_s": 2e-5}
    three = [{**one["devices"][0], "name": name, "memory_bytes": MEMORY, "network": network} for name in DEVICES]
    path.write_text(json.dumps({"version": one["version"], "devices": three}))
    return path


def take(folder: Path) -> None:
    """All pictures of one evening."""
    with evening() as made:
        given = ("--profile", str(profiles(made)), "--host", "127.0.0.1", "--name", DEVICES[0], "--port", "0")
        fixed = ("--ctx", CONTEXT, "--threads", "1", "--devices", "3")
        head = made.start(DEVICES[0], "cluster", "up", *given, *fixed)
        code, joined = "", {}
        for name in DEVICES[1:]:
            used = code
            code = made.wait_for(lambda status, used=used: status.code not in (None, used)).code or ""  # type: ignore[misc]
            options = ("--name", name, "--host", "127.0.0.1", "--threads", "1")
            joined[name] = made.start(name, "cluster", "join", code, *options)
            made.wait_for(lambda status, name=name: name in [device.name for device in status.devices])  # type: ignore[misc]
        head.see("Load it so")
        head.type("y\n")
        made.wait_for(lambda status: status.state == "ready")
        picture(folder / "cluster-up.svg", "desktop", ["$ homeinfer cluster up", *until_answered(head.lines())])
        joined["laptop"].see("takes part")
        chat = made.start(DEVICES[0], "chat", "--temp", "0", "-n", "200", has_keys=False)
        chat.see("for commands")
        said = len(chat.lines())
        chat.type(f"{MESSAGE}\n")
        wait(lambda: len(plain("\n".join(chat.lines()[said - 1 :]))) > 200, lambda: "no answer")
        made.wait_for(lambda status: status.answers > 0 and all(device.compute_share for device in status.devices))
        time.sleep(1.1)
        picture(folder / "cluster-running.svg", "desktop", running(head.lines()))
        picture(folder / "cluster-join.svg", "laptop", [f"$ homeinfer cluster join {code}", *joined["laptop"].lines()])
        joined["laptop"].kill()
        chat.see(r"first token after")
        shown = chat.lines()
        prompt = f"\x1b[1m> \x1b[0m{MESSAGE}"
        picture(
            folder / "cluster-chat.svg", "desktop", ["$ homeinfer chat", *shown[: said - 1], prompt, *shown[said - 1 :]]
        )


def until_answered(lines: list[str]) -> list[str]:
    """What stays on the screen: down to the question and what was typed."""
    last = max(number for number, line in enumerate(lines) if "Load it so" in line)
    return lines[: last + 1]


def running(lines: list[str]) -> list[str]:
    """The live view alone: from its heading on."""
    first = max(number for number, line in enumerate(lines) if "tokens of context" in line)
    return lines[first:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[1] / "docs")
    folder: Path = parser.parse_args().folder
    if not folder.is_dir():
        raise SystemExit(f"{folder}: there is no such folder; make it first")
    take(folder)


if __name__ == "__main__":
    main()
