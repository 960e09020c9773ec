#!/usr/bin/env python3
"""How fast a cluster is on the testbed's home, each figure against llama.cpp alone in the same run.

    scripts/bench_cluster.py MODEL.gguf [--only all_memory mem400 mem200 mem550 prefill seq8 idle ready] [--rounds 5]

Makes the devices, brings the cluster up with the commands that a user types, asks for greedy answers, takes it down.
Prints JSON: `all_memory_ratio` and `mem400_ratio` (TPOT over llama.cpp's with all memory), `mem200_tpot_ms` with its
disk's limit, `mem550_speedup`, `prefill_speedup`, `seq8_throughput_ratio`, `idle_cpu_percent`, `idle_rss_mb`,
`ready_s`. Needs root and iproute2. The model must be one whose layers were profiled here before, or the first case
takes a minute more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from home_cluster import TESTBED, Home, HomeOptions, bring_up, home, machine, print_json, status_of, up_words, wait_for

from homeinfer.cluster.client_bench import Prober, Timed, together_per_s
from homeinfer.cluster.wire.client import ClusterStatus
from homeinfer.profiling.disk import measure_disk

PLAIN = Path(__file__).resolve().parent / "plain_llama.py"
PROMPT, TOKENS = 16, 24
IDLE_SECONDS = 20.0
MEM200 = ("200M",) * 3


class Llama:
    """llama.cpp alone in a process of its own; launch: words before its command."""

    def __init__(self, model: Path, threads: int, launch: tuple[str, ...] = (), *more: str) -> None:
        command = [*launch, sys.executable, str(PLAIN), str(model), "--threads", str(threads), *more]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit("llama.cpp alone does not start")

    def answer(self, n_prompt: int, n_tokens: int) -> list[float]:
        """Milliseconds to the first token, then of each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{n_prompt} {n_tokens}\n")
        self._process.stdin.flush()
        times: list[float] = json.loads(self._process.stdout.readline())
        return times

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def prober(made: Home) -> Iterator[Prober]:
    found = Prober(made.folder(0))
    try:
        yield found
    finally:
        found.close()


def ask(probe: Prober, n_prompt: int, n_tokens: int, count: int = 1) -> tuple[Timed, ...]:
    """Answers at the same time, of different prompts; of several only what came when all had begun."""
    prompts = [np.random.default_rng(i).integers(100, 20_000, n_prompt).tolist() for i in range(count)]
    return probe.run(prompts, n_tokens, lambda: None, 3 * n_tokens if count > 1 else None).answers


def decode_ms(times: list[float]) -> float:
    """The mean of an answer's tokens, without those that still have the prompt's traces. (Not the median: a cluster
    tells quick tokens in pairs.)"""
    return statistics.fmean(times[3:])


def steps_ms(timed: Timed) -> list[float]:
    return [timed.ttft_ms, *((b - a) * 1e3 for a, b in zip(timed.tokens, timed.tokens[1:], strict=False))]


def against_llama(case: str, made: Home, model: Path, rounds: int) -> dict[str, object]:
    """TPOT over that of llama.cpp with all memory, A B A B."""
    status = bring_up(made, model, "--ctx", "1024")
    llama = Llama(model, 2)
    try:
        with prober(made) as probe:
            pairs = []
            for _ in range(rounds + 1):
                ours = decode_ms(steps_ms(ask(probe, PROMPT, TOKENS)[0]))
                pairs.append((ours, decode_ms(llama.answer(PROMPT, TOKENS))))
    finally:
        llama.close()
    ours, theirs = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    return {
        f"{case}_ratio": round(ours / theirs, 3),
        f"{case}_tpot_ms": round(ours, 2),
        f"{case}_llama_ms": round(theirs, 2),
        f"{case}_layers": layers(status),
    }


def layers(status: ClusterStatus) -> dict[str, object]:
    return {d.name: f"{d.layers}, {d.streamed_layers} streamed" for d in status.devices}


def all_memory(model: Path, testbed: Path, rounds: int) -> dict[str, object]:
    with home(HomeOptions(("none",) * 3), testbed) as made:
        return against_llama("all_memory", made, model, rounds)


def mem400(model: Path, testbed: Path, rounds: int) -> dict[str, object]:
    with home(HomeOptions(("400M",) * 3), testbed) as made:
        return against_llama("mem400", made, model, rounds)


def read_bytes(made: Home) -> int:
    """What all devices have read from disk."""
    return sum(p.io_counters().read_bytes for device in range(made.count) for p in made.family(device))


def mem200(model: Path, testbed: Path, rounds: int) -> dict[str, object]:
    """The model doesn't fit into all three together. limit: bytes that are read for a token, by the disk's rate."""
    with home(HomeOptions(MEM200), testbed) as made:
        status = bring_up(made, model, "--ctx", "512")
        rate = measure_disk(made.root, n_threads=2).layer_bytes_per_s
        with prober(made) as probe:
            found = []
            for _ in range(rounds + 1):
                before = read_bytes(made)
                timed = ask(probe, PROMPT, TOKENS)[0]
                found.append((timed.tpot_ms, (read_bytes(made) - before) / (TOKENS + 1)))
    tpot, read = (statistics.median(values) for values in zip(*found[1:], strict=True))
    return {
        "mem200_tpot_ms": round(tpot, 1),
        "mem200_memory": MEM200,
        "mem200_read_mb_per_token": round(read / 1e6, 1),
        "mem200_disk_mb_per_s": round(rate / 1e6),
        "mem200_disk_limit_ms": round(read / rate * 1e3, 1),
        "mem200_over_limit": round(tpot / (read / rate * 1e3), 2) if read else None,
        "mem200_predicted_ms": status.predicted_tpot_ms,
        "mem200_layers": layers(status),
    }


def mem550(model: Path, testbed: Path, rounds: int) -> dict[str, object]:
    """Two devices against llama.cpp on one, each of 550 MB, with its own copy of the file."""
    with home(HomeOptions(("550M",) * 3), testbed) as made:
        copy = made.root / "alone.gguf"
        shutil.copy(model, copy)
        made.testbed("drop", str(copy))
        made.count = 2
        status = bring_up(made, model, "--ctx", "1024")
        llama = Llama(copy, 2, made.launch(2), "--no-repack", "--ctx", "1024")  # repacked it is killed for memory
        try:
            with prober(made) as probe:
                pairs = []
                for _ in range(max(2, rounds // 2) + 1):
                    ours = decode_ms(steps_ms(ask(probe, PROMPT, TOKENS)[0]))
                    pairs.append((ours, decode_ms(llama.answer(PROMPT, 8))))
        finally:
            llama.close()
            made.count = 3
    ours, theirs = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    return {
        "mem550_speedup": round(theirs / ours, 1),
        "mem550_tpot_ms": round(ours, 2),
        "mem550_llama_ms": round(theirs, 1),
        "mem550_layers": layers(status),
    }


def prefill(model: Path, testbed: Path, rounds: int) -> dict[str, object]:
    """2,048 tokens on three devices with a share of a core each, against llama.cpp on one with such a share. It takes
    minutes."""
    with home(HomeOptions(("none",) * 4, cpus=0.5), testbed) as made:
        made.count = 3
        status = bring_up(made, model, "--ctx", "4096", "--threads", "1", "--objective", "ttft")
        llama = Llama(model, 1, made.launch(3))
        try:
            with prober(made) as probe:
                pairs = []
                ask(probe, 128, 2)
                llama.answer(128, 1)
                for _ in range(max(1, rounds // 2)):
                    pairs.append((ask(probe, 2048, 2)[0].ttft_ms, llama.answer(2048, 1)[0]))
        finally:
            llama.close()
            made.count = 4
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "prefill_speedup": round(theirs / ours, 2),
        "prefill_ms": round(ours),
        "prefill_llama_ms": round(theirs),
        "prefill_layers": layers(status),
    }


def seq8(model: Path, testbed: Path, rounds: int) -> dict[str, object]:
    """Tokens per second of eight answers at once over one's; llama.cpp alone on the same processor says what there is
    to be had."""
    with home(HomeOptions(("none",) * 3), testbed) as made:
        bring_up(made, model, "--ctx", "256", "--sequences", "8", "--objective", "throughput")
        alone = Llama(model, 2, (), "--ctx", "256")
        batched = Llama(model, 2, (), "--ctx", "256", "--sequences", "8")
        try:
            with prober(made) as probe:
                found = []
                for _ in range(rounds + 1):
                    one = 1e3 / ask(probe, PROMPT, TOKENS)[0].tpot_ms
                    eight = together_per_s(ask(probe, PROMPT, 2 * TOKENS, 8))
                    llama = [1e3 / decode_ms(each.answer(PROMPT, TOKENS)) for each in (alone, batched)]
                    found.append((one, eight, llama[0], 8 * llama[1]))
        finally:
            alone.close()
            batched.close()
    one, eight, *both = (statistics.median(values) for values in zip(*found[1:], strict=True))
    return {
        "seq8_throughput_ratio": round(eight / one, 2),
        "seq1_tokens_per_s": round(one, 1),
        "seq8_tokens_per_s": round(eight, 1),
        "seq8_llama_ratio": round(both[1] / both[0], 2),
        "seq1_llama_tokens_per_s": round(both[0], 1),
        "seq8_llama_tokens_per_s": round(both[1], 1),
    }


def idle(model: Path, testbed: Path, _rounds: int) -> dict[str, object]:
    """What agent and engine of a joined device cost while nobody asks: the last device's, which is no head."""
    with home(HomeOptions(("none",) * 3), testbed) as made:
        status = bring_up(made, model, "--ctx", "512")
        with prober(made) as probe:
            ask(probe, PROMPT, TOKENS)
        time.sleep(3)
        found = {device: at_rest(made, device) for device in range(made.count)}
        time.sleep(IDLE_SECONDS)
        percent = {d: 100 * (at_rest(made, d)[0] - cpu) / IDLE_SECONDS for d, (cpu, _) in found.items()}
        weights = {d: sum(p.stat().st_blocks * 512 for p in made.folder(d, "windows").rglob("*.gguf")) for d in found}
    rss = {d: (memory - weights[d]) / 1e6 for d, (_, memory) in found.items()}
    joined = range(1, made.count)
    return {
        "idle_cpu_percent": round(max(percent[d] for d in joined), 2),
        "idle_rss_mb": round(max(rss[d] for d in joined)),
        "idle_each": {f"device-{d}": [round(percent[d], 2), round(rss[d])] for d in found},
        "idle_layers": layers(status),
    }


def at_rest(made: Home, device: int) -> tuple[float, int]:
    """CPU seconds so far, and memory that only these processes have, bytes: agent and engine; on the head the
    coordinator too."""
    family = made.family(device)
    cpu = sum(sum(p.cpu_times()[:2]) for p in family)
    return cpu, sum(p.memory_full_info().uss for p in family)


def ready(model: Path, testbed: Path, _rounds: int) -> dict[str, object]:
    """From `cluster up`, with devices that are paired and have their windows, to the first token; loading included."""
    with home(HomeOptions(("none",) * 3), testbed) as made:
        bring_up(made, model, "--ctx", "512")
        made.processes[0].send_signal(2)
        made.processes[0].wait(30)
        begin = time.monotonic()
        made.start(0, *up_words(made, model, "--ctx", "512"))
        wait_for(made, lambda status: status.state == "ready", 120)
        up = time.monotonic() - begin
        with prober(made) as probe:
            ask(probe, PROMPT, 2)
        told = status_of(made)
        return {
            "ready_s": round(time.monotonic() - begin, 2),
            "ready_without_answer_s": round(up, 2),
            "ready_events": told.events if told is not None else (),
        }


CASES = {
    "all_memory": all_memory,
    "mem400": mem400,
    "mem200": mem200,
    "mem550": mem550,
    "prefill": prefill,
    "seq8": seq8,
    "idle": idle,
    "ready": ready,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--testbed", type=Path, default=TESTBED)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    said: dict[str, object] = machine(("scripts/bench_cluster.py", *sys.argv[1:]))
    for case in a.only:
        begin = time.monotonic()
        found = CASES[case](a.model.resolve(), a.testbed.resolve(), a.rounds)
        said.update(found)
        print(f"{case}: {math.ceil(time.monotonic() - begin)} s {json.dumps(found)}", file=sys.stderr, flush=True)
    print_json(said)


if __name__ == "__main__":
    main()
