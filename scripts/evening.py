#!/usr/bin/env python3
"""A short evening: a cluster comes up, devices are paired and get their weights, a question is answered, it goes down.

    scripts/evening.py --prompt FILE --answer FILE [--devices 3] [--loopback] [--model MODEL.gguf]

For scripts/capture_check.py, which looks on the network for what this says. Run it once by itself: the answer, which is
greedy and the same each time, is what is looked for then.

    scripts/capture_check.py --on lo --text prompt.txt --text answer.txt --bytes MODEL.gguf --
        scripts/evening.py --loopback --prompt prompt.txt --answer answer.txt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from home_cluster import HomeOptions, bring_up, home

from homeinfer.cli.default_model import default_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=Path, required=True)
    parser.add_argument("--answer", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--model", type=Path)
    a = parser.parse_args()
    model = (a.model or default_model()).resolve()
    where = ("--host", "127.0.0.1", "--port", "47810") if a.loopback else ()
    with home(HomeOptions(("none",) * a.devices, name="capture"), loopback=a.loopback) as made:
        status = bring_up(made, model, "--ctx", "512", *where, joining=where[:2])
        words = ("run", str(model), "-n", "60", "--temp", "0", "--raw", "-p", a.prompt.read_text().strip())
        done = subprocess.run(
            [sys.executable, "-m", "homeinfer", *words], env=made.environment(0), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"no answer: {done.stderr.strip()}")
        a.answer.write_text(done.stdout)
        print(f"{[d.name for d in status.devices if d.layers]} answered: {done.stdout.strip()[:200]}")


if __name__ == "__main__":
    main()
