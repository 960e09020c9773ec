#!/usr/bin/env python3
"""How fast layer windows and a ring of three are, against llama.cpp in the same run.

    scripts/bench_window.py MODEL.gguf [--threads 2] [--rounds 8] [--tokens 24] [--prompt 512]

Four contenders, each in a process of its own, take turns (A B C D, A B C D, …) after a warm-up: llama.cpp through
llama-cpp-python's low-level calls; LayerWindow over all layers; three windows in one process; a ring of three
devices on this machine. Prints one JSON object; times are medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from plain_llama import N_BATCH, PlainLlama

from homeinfer.cluster.local import RingOptions, start_local_ring, window_specs
from homeinfer.engine import runtime
from homeinfer.engine.edits import Remove
from homeinfer.engine.pipeline import Batch, Floats
from homeinfer.engine.request import Request, Sampling
from homeinfer.errors import HomeinferError
from homeinfer.model.header import read_header
from homeinfer.model.window_plan import split_layers

N_CTX = 1024


class Steps(msgspec.Struct, frozen=True):
    """Milliseconds of a prefill and of each token after the one that it gave; for the ring also what each of these
    cost its windows (computing and in all) and the sampler."""

    prefill: float
    steps: list[float]
    spent: list[list[tuple[float, float]]] = []
    choosing: list[float] = []


class Stepped(Protocol):
    def forward(self, batch: Batch) -> Floats: ...
    def clear(self) -> None: ...


def answer(contender: Stepped, prompt: list[int], tokens: int) -> Steps:
    """Greedy tokens, each chosen by numpy's argmax and fed back."""
    contender.clear()
    times = [time.perf_counter()]
    batch = Batch.of(prompt, 0)
    for i in range(tokens + 1):
        token = int(contender.forward(batch)[0].argmax())
        times.append(time.perf_counter())
        batch = Batch.of([token], len(prompt) + i)
    return Steps((times[1] - times[0]) * 1e3, [(b - a) * 1e3 for a, b in itertools.pairwise(times[1:])])


class Llama(PlainLlama):
    """llama.cpp alone, as a contender."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__(model, threads, N_CTX)

    def forward(self, batch: Batch) -> Floats:
        return self.logits(np.ascontiguousarray(batch.tokens)).copy()[None]


class Windows:
    """LayerWindows in this process, one after the other."""

    def __init__(self, model: str, threads: int, count: int) -> None:
        from homeinfer.engine.window import LayerWindow

        header = read_header(model)
        options = RingOptions(devices=count, n_ctx=N_CTX, n_batch=N_BATCH, n_threads=threads)
        self._windows = [LayerWindow(s) for s in window_specs(header, split_layers(header, count), options)]

    def forward(self, batch: Batch) -> Floats:
        rows: Any = batch.tokens
        for window in self._windows:
            rows = window.forward(rows, batch.positions, batch.sequences, batch.wanted)
        return rows  # type: ignore[no-any-return]

    def clear(self) -> None:
        for window in self._windows:
            window.edit([Remove(0)])


class Ring:
    """Three devices, each a process, and this one as their head, which asks for an answer as `homeinfer run` does."""

    def __init__(self, model: str, threads: int) -> None:
        options = RingOptions(devices=3, n_ctx=N_CTX, n_batch=N_BATCH, n_threads=threads)
        self.pipeline = start_local_ring(read_header(model), options)

    def answer(self, prompt: list[int], tokens: int) -> Steps:
        """Greedy tokens, chosen by homeinfer's sampler; the time is that at which the head hears of them."""
        times = [time.perf_counter()]
        spent: list[list[tuple[float, float]]] = []
        choosing: list[float] = []

        def on_token(_token: int) -> None:
            times.append(time.perf_counter())
            spent.append([(s.computing / 1e3, s.holding / 1e3) for s in self.pipeline.spent])
            choosing.append(self.pipeline.choosing / 1e3)

        request = Request(Sampling(temperature=0), tokens + 1, fresh=True)
        self.pipeline.tell(prompt, request, on_token, lambda: False)
        steps = [(b - a) * 1e3 for a, b in itertools.pairwise(times[1:])]
        return Steps((times[1] - times[0]) * 1e3, steps, spent[1:], choosing[1:])


CONTENDERS: dict[str, Callable[[str, int], Any]] = {
    "llama_cpp": Llama,
    "layerwindow": lambda model, threads: Windows(model, threads, 1),
    "three_windows": lambda model, threads: Windows(model, threads, 3),
    "ring3": Ring,
}


def work(name: str, model: str, threads: int, link: Connection) -> None:
    """A contender's process: load, say so, then run one block per request until told to leave."""
    contender = CONTENDERS[name](model, threads)
    link.send("ready")
    while (request := link.recv()) is not None:
        n_prompt, tokens = request
        prompt = np.random.default_rng(0).integers(100, 20_000, n_prompt).tolist()
        link.send(
            contender.answer(prompt, tokens) if isinstance(contender, Ring) else answer(contender, prompt, tokens)
        )
    if isinstance(contender, Ring):
        contender.pipeline.close()


@contextlib.contextmanager
def environment_of(name: str) -> Iterator[None]:
    """Windows run as in their engine processes; llama.cpp as its users start it, and the head of the ring too."""
    before = dict(os.environ)
    if name in ("layerwindow", "three_windows"):
        os.environ.update(runtime.engine_environment(before))
    yield
    os.environ.clear()
    os.environ.update(before)


def measure(model: str, threads: int, rounds: int, prompt: int, tokens: int) -> dict[str, list[Steps]]:
    """Blocks of all contenders in turn; the first round only warms up."""
    spawn = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for name in CONTENDERS:
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(name, model, threads, theirs))
        with environment_of(name):
            process.start()
        theirs.close()
        if mine.recv() != "ready":
            raise SystemExit(f"{name} did not come up")
        links[name] = mine
        processes.append(process)
    blocks: dict[str, list[Steps]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds + 1):
        for name, link in links.items():
            time.sleep(0.05)  # the threads of the one before have gone to sleep
            link.send((prompt, tokens))
            measured = link.recv()
            if turn:
                blocks[name].append(measured)
    for link in links.values():
        link.send(None)
    for process in processes:
        process.join()
    return blocks


def summary(blocks: dict[str, list[Steps]], prompt: int) -> dict[str, Any]:
    """Medians and their ratios; ratios are medians over rounds of the ratio within a round."""
    decode = {name: [statistics.median(b.steps) for b in bs] for name, bs in blocks.items()}
    prefill = {name: [b.prefill for b in bs] for name, bs in blocks.items()}

    def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[over], times[under], strict=True)), 4)

    steps = [step for b in blocks["ring3"] for step in zip(b.steps, b.spent, b.choosing, strict=True)]
    hops = len(steps[0][1])  # the last window's device chooses the token and sends it to the first: a message each
    outside = [(t - sum(c for c, _ in s)) / hops for t, s, _ in steps]
    device = [sum(h - c for c, h in s) / hops for _, s, _ in steps]
    choosing = [c / hops for _, _, c in steps]
    return {
        "layerwindow_decode_ratio": ratio(decode, "llama_cpp", "layerwindow"),
        "layerwindow_prefill_ratio": ratio(prefill, "llama_cpp", "layerwindow"),
        "three_windows_tpot_ratio": ratio(decode, "three_windows", "llama_cpp"),
        "ring3_tpot_ratio": ratio(decode, "ring3", "llama_cpp"),
        "ring3_over_layerwindow_tpot_ratio": ratio(decode, "ring3", "layerwindow"),
        "ring3_prefill_ratio": ratio(prefill, "llama_cpp", "ring3"),
        "hop_overhead_ms": round(statistics.median(outside), 4),
        "hop_overhead_by_cause_ms": {
            "device: python and copying": round(statistics.median(device), 4),
            "choosing the token": round(statistics.median(choosing), 4),
            "zeromq and waking up": round(
                statistics.median(o - d - c for o, d, c in zip(outside, device, choosing, strict=True)), 4
            ),
        },
        "tpot_ms": {name: round(statistics.median(v), 3) for name, v in decode.items()},
        "prefill_tokens_per_s": {name: round(1e3 * prompt / statistics.median(v), 1) for name, v in prefill.items()},
        "ring3_overhead_ms_per_token": round(statistics.median(outside) * hops, 3),
        "ring3_computing_ms": round(statistics.median(sum(c for c, _ in s) for _, s, _ in steps), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=512)
    a = parser.parse_args()
    try:
        read_header(a.model)
    except HomeinferError as problem:
        raise SystemExit(f"bench_window: {problem}") from None
    blocks = measure(a.model, a.threads, a.rounds, a.prompt, a.tokens)
    said = {
        "model": Path(a.model).name,
        "bytes": Path(a.model).stat().st_size,
        "threads": a.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "rounds": a.rounds,
        "tokens": a.tokens,
        "prompt": a.prompt,
    }
    print(json.dumps({**summary(blocks, a.prompt), **said}, indent=2))


if __name__ == "__main__":
    main()
