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
import random
import socket
import sys
import threading
import time
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


class Evening:
    """A cluster that is up, and how its commands are started again."""

    def __init__(self, made: Home, model: Path) -> None:
        self.made = made
        self._port = str(free_port()) if isinstance(made, LoopbackHome) else "47710"
        self._model = model
        self.code = ""

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
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
    faults = Faults(evening.made, evening.start)
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


def take_down(made: Home) -> list[str]:
    """End the cluster as a user does; what is left then: processes, sockets, temporary files."""
    with contextlib.suppress(HomeinferError):
        client = find_cluster(made.folder(0))
        if client is not None:
            with contextlib.closing(client):
                client.order("down")
    for device in range(1, made.count):
        made.processes[device].send_signal(2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(p.poll() is None for p in made.processes.values()):
        time.sleep(0.2)
    return left_behind(made)


def left_behind(made: Home) -> list[str]:
    marks = str(made.root)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if marks in process.environ().get("HOMEINFER_STATE", ""):
                found.append(f"process {' '.join(process.cmdline()[-3:])}")
    for path in made.root.rglob("*"):
        with contextlib.suppress(OSError):
            inside = path.relative_to(made.root)
            if path.is_socket() or is_temporary(inside):
                found.append(str(inside))
    return found


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
        leaks = take_down(made)
    answers = [answer for chat in chats for answer in chat.answers]
    said = machine(("scripts/soak.py", *sys.argv[1:])) | report(answers, done, memory)
    said["hangs"] = int(str(said["hangs"])) + (not settled)
    said["leaks"] = len(leaks)
    said["leaked"] = leaks[:10]
    print_json(said)
    return 1 if said["wrong_answers"] or said["hangs"] or leaks or not answers else 0


if __name__ == "__main__":
    sys.exit(main())
