#!/usr/bin/env python3
"""An evening with everything going wrong: faults on a home's devices while two chats go on.

    scripts/soak.py --minutes 30 --seed 1 [--devices 4] [--loopback] [--model MODEL.gguf]

Faults: an engine killed, an agent killed, a device asleep, the head killed and started again; on the testbed also a
cable cut for 1 to 60 seconds, a memory limit lowered, a link at 5 Mbit/s. --loopback needs no root and no testbed: all
devices are on this host. Prints JSON: `faults`, `answers`, `wrong_answers`, `hangs` (no token for over 30 seconds),
`leaks`; exit code 1 when one of the last three is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path

import psutil
from home_cluster import (
    TESTBED,
    Home,
    HomeOptions,
    LoopbackHome,
    code_of,
    home,
    machine,
    print_json,
    up_words,
    wait_for,
)
from soak_answers import HANG_SECONDS, Answer, Chat, references
from soak_faults import Faults, draw

from homeinfer.cli.default_model import default_model
from homeinfer.cluster.client import find_cluster
from homeinfer.errors import HomeinferError

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot that",
    "To make bread you need",
    "The three laws of motion are",
    "A list of colours: red, green,",
    "In the year 1969",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
)
MINUTES_PER_FAULT = 0.35
END_SECONDS = 60.0
"""So long what was told to end may take on a busy machine; what is there then is left behind."""
PORTS = range(15_000, 30_000)
"""Not those that systems give to sockets which ask for any: one may be taken while the head is down."""


class Evening:
    """A cluster that is up, and how its commands are started again."""

    def __init__(self, made: Home, model: Path) -> None:
        self.made = made
        self._port = str(free_port()) if isinstance(made, LoopbackHome) else "47710"
        self._model = model
        self.code = ""
        self.excused: set[str] = set()
        """What was half written when a process was killed."""

    def begin(self) -> None:
        self.start(0)
        for device in range(1, self.made.count):
            self.code = code_of(self.made, self.code)
            self.start(device)
        wait_for(self.made, lambda status: status.state == "ready", 300)

    def start(self, device: int) -> None:
        name = f"device-{device}"
        where = ("--host", "127.0.0.1") if isinstance(self.made, LoopbackHome) else ()
        if device:
            self.made.start(device, "cluster", "join", *self._code(device), "--name", name, "--stay", *where)
            return
        words = ("--ctx", "512", "--sequences", "2", "--port", self._port)
        self.made.start(0, *up_words(self.made, self._model, *words), *where)

    def _code(self, device: int) -> tuple[str, ...]:
        """Only the first time: a code holds once and for ten minutes, a registered device needs none."""
        return () if (self.made.folder(device) / "heads.json").exists() else (self.code,)


def free_port() -> int:
    """One whose next is free too: that is where codes are typed in."""
    while True:
        port = random.choice(PORTS)
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


def memory_mb(made: Home) -> dict[str, float]:
    """What each device's processes have for themselves."""
    found = {}
    for device in range(made.count):
        total = 0
        for process in made.family(device):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().uss
        found[f"device-{device}"] = round(total / 1e6, 1)
    return found


def disturb(
    evening: Evening, minutes: float, seed: int, kinds: list[str], chats: list[Chat]
) -> list[dict[str, object]]:
    """Faults one after the other until the time is over; what was done and how the chats took it."""
    source = random.Random(seed)
    faults = Faults(evening.made, evening.start, lambda: evening.excused.update(unfinished(evening.made)))
    end = time.monotonic() + minutes * 60
    done: list[dict[str, object]] = []
    while time.monotonic() < end:
        fault = draw(source, evening.made.count, kinds)
        begin = time.monotonic()
        faults.do(fault)
        worst = max((time.monotonic() - chat.waiting_since for chat in chats if chat.waiting_since), default=0.0)
        done.append({"kind": fault.kind, "device": fault.device, "seconds": fault.seconds, "waiting": round(worst, 1)})
        print(f"{len(done)} {done[-1]} {sum(len(c.answers) for c in chats)} answers", file=sys.stderr, flush=True)
        left = MINUTES_PER_FAULT * 60 - (time.monotonic() - begin)
        time.sleep(max(2.0, min(left, end - time.monotonic())))
    return done


def settle(chats: list[Chat], stop: threading.Event) -> bool:
    """Let the answers that are under way end. False when one does not."""
    stop.set()
    for chat in chats:
        chat.join(timeout=120)
    return not any(chat.is_alive() for chat in chats)


def take_down(made: Home, excused: Collection[str]) -> list[str]:
    """End the cluster as a user does; what is left then: processes, sockets, temporary files. excused: what processes
    that were killed in the middle of writing have left."""
    with contextlib.suppress(HomeinferError):
        client = find_cluster(made.folder(0))
        if client is not None:
            with contextlib.closing(client):
                client.order("down")
    for device in range(1, made.count):
        made.processes[device].send_signal(2)
    deadline = time.monotonic() + END_SECONDS
    while (left := [each for each in left_behind(made) if each not in excused]) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def left_behind(made: Home) -> list[str]:
    marks = str(made.root)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if marks in process.environ().get("HOMEINFER_STATE", ""):
                found.append(f"process {' '.join(process.cmdline()[-3:])}")
    return found + [str(inside) for inside in all_inside(made) if (made.root / inside).is_socket()] + unfinished(made)


def unfinished(made: Home) -> list[str]:
    """Temporary files."""
    return [str(inside) for inside in all_inside(made) if is_temporary(inside)]


def all_inside(made: Home) -> list[Path]:
    """Files and folders of a home; not by rglob, which fails when a folder goes meanwhile."""
    return [
        Path(folder, name).relative_to(made.root)
        for folder, folders, files in os.walk(made.root)
        for name in (*folders, *files)
    ]


def is_temporary(inside: Path) -> bool:
    """Whether a file of a home has the name of one that should be gone: half written, or not of a device."""
    is_named_so = inside.suffix in (".part", ".partial") or inside.name.startswith((".", "homeinfer-"))
    return is_named_so or not inside.parts[0].isdigit()


def report(answers: list[Answer], done: list[dict[str, object]], memory: list[dict[str, float]]) -> dict[str, object]:
    wrong = [f"{PROMPTS[a.prompt]}: {a.wrong} ({'; '.join(a.notices)})" for a in answers if a.wrong is not None]
    silences = sorted(a.silence for a in answers)
    return {
        "faults": len(done),
        "answers": len(answers),
        "tokens": sum(a.n_tokens for a in answers),
        "wrong_answers": len(wrong),
        "hangs": sum(s > HANG_SECONDS for s in silences),
        "ties": sum(a.tie for a in answers),
        "longest_silence_s": round(silences[-1], 1) if silences else None,
        "wrong": wrong[:10],
        "kinds": {kind: sum(d["kind"] == kind for d in done) for kind in sorted({str(d["kind"]) for d in done})},
        "recovered": [notice for a in answers for notice in a.notices][-5:],
        "memory_mb": {"begin": memory[0], "end": memory[-1]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--testbed", type=Path, default=TESTBED)
    a = parser.parse_args()
    model = (a.model or default_model()).resolve()
    known = references(model, PROMPTS, a.tokens)
    kinds = ["engine", "agent", "asleep", "head"] + ([] if a.loopback else ["cut", "slow", "memory"])
    options = HomeOptions(("none",) * a.devices, name="soak")
    with home(options, a.testbed, loopback=a.loopback) as made:
        evening = Evening(made, model)
        evening.begin()
        stop = threading.Event()
        chats = [Chat(made.folder(0), known, first, stop) for first in (0, len(PROMPTS) // 2)]
        for chat in chats:
            chat.start()
        time.sleep(5)
        memory = [memory_mb(made)]
        done = disturb(evening, a.minutes, a.seed, kinds, chats)
        settled = settle(chats, stop)
        memory.append(memory_mb(made))
        leaks = take_down(made, evening.excused)
    answers = [answer for chat in chats for answer in chat.answers]
    said = machine(("scripts/soak.py", *sys.argv[1:])) | report(answers, done, memory)
    said["hangs"] = int(str(said["hangs"])) + (not settled)
    said["leaks"] = len(leaks)
    said["leaked"] = leaks[:10]
    print_json(said)
    return 1 if said["wrong_answers"] or said["hangs"] or leaks or not answers else 0


if __name__ == "__main__":
    sys.exit(main())
