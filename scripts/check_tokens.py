#!/usr/bin/env python3
"""Whether a cluster's greedy tokens are those of llama.cpp alone, on the same file.

    scripts/check_tokens.py [MODEL.gguf …] [--devices 1 2 3 4] [--rounds 1 2 3] [--tokens 40] [--loopback]
    scripts/check_tokens.py MODEL.gguf --devices 3 --memory 200M      layers that don't fit are streamed

For each model (the embedded one unless named), number of devices and of rounds it brings a real cluster up in which all
devices take part, asks several prompts, and takes it down. Without --rounds the plan chooses them; one device alone has
one window, so one set-up. Prints JSON: for each set-up `equal`, `ties` (differences at which llama.cpp's two best
logits are closer than 0.05) and `wrong` (others), and the windows. Exit code 1 when one is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from home_cluster import TESTBED, Home, HomeOptions, bring_up, home, machine, print_json
from soak import PROMPTS, free_port
from soak_answers import Reference, judge, references

from homeinfer.cli.default_model import default_model
from homeinfer.cluster.client import ClusterTeller
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.engine.request import Request, Sampling


def answers(made: Home, status: ClusterStatus, known: tuple[Reference, ...]) -> list[list[int]]:
    """The cluster's tokens for each prompt."""
    found: list[list[int]] = []
    with closing(ClusterTeller(made.folder(0), status)) as teller:
        for reference in known:
            tokens: list[int] = []
            request = Request(Sampling(temperature=0), limit=len(reference.tokens), fresh=True)
            teller.tell(reference.prompt, request, tokens.append, lambda: False)
            found.append(tokens)
    return found


def compared(
    made: Home, model: Path, known: tuple[Reference, ...], rounds: int, *, loopback: bool
) -> dict[str, object]:
    where = ("--host", "127.0.0.1", "--port", str(free_port())) if loopback else ()
    status = bring_up(made, model, "--ctx", "512", "--rounds", str(rounds), *where, joining=where[:2])
    judged = [judge(r, tokens) for r, tokens in zip(known, answers(made, status, known), strict=True)]
    return {
        "model": model.name,
        "devices": made.count,
        "rounds": rounds,
        "windows": {d.name: str(d.layers) for d in status.devices},
        "equal": sum(wrong is None and not tie for wrong, tie in judged),
        "ties": sum(tie for _, tie in judged),
        "wrong": [wrong for wrong, _ in judged if wrong is not None] + amiss(status, rounds),
    }


def amiss(status: ClusterStatus, rounds: int) -> list[str]:
    """Devices that don't have as many windows as they should."""
    found = []
    for number, device in enumerate(status.devices):
        windows = len(device.layers)
        wanted = rounds + (number == 0) if rounds and len(status.devices) > 1 else max(windows, 1)
        if windows != wanted:
            found.append(f"{device.name} has {windows} windows instead of {wanted}")
    return found


def setups(devices: Sequence[int], rounds: Sequence[int]) -> list[tuple[int, int]]:
    """(devices, rounds) of each cluster: one device has one window and no rounds to choose."""
    return [(count, each) for count in devices for each in (rounds if count > 1 else rounds[:1])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--memory", default="none", help="of each device, on the testbed: 200M")
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--testbed", type=Path, default=TESTBED)
    a = parser.parse_args()
    found = []
    for model in [path.resolve() for path in a.models] or [default_model()]:
        known = references(model, PROMPTS, a.tokens)
        for count, rounds in setups(a.devices, a.rounds):
            with home(HomeOptions((a.memory,) * count, name="tokens"), a.testbed, loopback=a.loopback) as made:
                found.append(compared(made, model, known, rounds, loopback=a.loopback))
            print(found[-1], file=sys.stderr, flush=True)
    said = machine(("scripts/check_tokens.py", *sys.argv[1:])) | {"setups": found}
    print_json(said)
    return 1 if any(each["wrong"] for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
