#!/usr/bin/env python3
"""What `homeinfer plan` predicts against what the ring then does, on a home of network namespaces.

    scripts/bench_prediction.py SMALL.gguf LARGE.gguf [--testbed ../shared/testbed/homes.py] [--only N …] [--svg FILE]

For each set-up (model, devices, memory limits, link rate) it makes the devices, profiles each one inside its limits
with `homeinfer profile`, times the links between them over the ring's own sockets, plans with exactly that, starts the
planned engines in their namespaces with the planned windows, residency and stream buffers, and compares the TPOT.
Prints JSON: `setups` (a list), `median_error` and `worst_error` (fractions of the measured TPOT). Needs root and
iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psutil
from home_cluster import TESTBED, Home, HomeOptions, home

from homeinfer.cluster.local import RingOptions, most_logits
from homeinfer.cluster.local import threads as local_threads
from homeinfer.cluster.planned import device_windows, stream_bytes
from homeinfer.cluster.planning.model_shape import model_shape
from homeinfer.cluster.planning.plan import Constraints, Prediction, Ring, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Link, ProfileFile
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from homeinfer.cluster.ring import RingPipeline
from homeinfer.cluster.ring_start import DeviceStart, RingStart, start_ring
from homeinfer.engine.request import Request, Sampling
from homeinfer.errors import HomeinferError
from homeinfer.folders import windows_folder
from homeinfer.model.header import Header, read_header
from homeinfer.model.window_file import write_window
from homeinfer.profiling.link_probe import measure_link
from homeinfer.profiling.measure import work_folder
from homeinfer.profiling.shadow import Sizes, shadows
from homeinfer.profiling.timer import timer
from homeinfer.profiling.window_times import Bench, Patience

N_CTX, N_BATCH, PROMPT, TOKENS, ANSWERS = 512, 64, 32, 19, 5
SIZES = Sizes(enough=768_000_000, experts=0, most=2_000_000_000)
"""Larger than what the profile streams: a home's streamed layers are, and what lies below may cache less of it."""


class Setup(msgspec.Struct, frozen=True):
    """One home. memory: each device's limit ("none" for no limit)."""

    model: str
    memory: tuple[str, ...]
    mbit: int


SETUPS = tuple(
    Setup(model, memory, mbit)
    for model, memories in (
        ("small", (("none",) * 2, ("none",) * 3, ("400M",) * 2, ("600M", "300M", "300M"))),
        ("large", (("none",) * 2, ("none",) * 3, ("3G", "1500M"), ("2500M", "1500M", "1G"))),
    )
    for memory, mbit in itertools.product(memories, (300, 50))
)


class Result(msgspec.Struct, frozen=True):
    """A set-up and what came of it; times in ms, what all devices read from disk in MB per token."""

    model: str
    memory: tuple[str, ...]
    mbit: int
    windows: str
    predicted_tpot_ms: float
    measured_tpot_ms: float
    error: float
    predicted_cause: dict[str, float]
    measured_compute_ms: float
    predicted_read_mb: float
    measured_read_mb: float
    predicted_ttft_ms: float
    measured_ttft_ms: float


def profile(made: Home, device: int, model: Path) -> DeviceProfile:
    """What `homeinfer profile` says on a device, and its link, whose rate the testbed sets."""
    command = [*made.launch(device), sys.executable, "-m", "homeinfer", "profile", str(model), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"profile on device {device}: {done.stderr.strip()}")
    (found,) = msgspec.json.decode(done.stdout, type=ProfileFile).devices
    disk = msgspec.structs.replace(found.disk, group="testbed")
    return msgspec.structs.replace(found, name=f"device-{device}", disk=disk)


def rate_beside_others(header: Header, threads: int) -> float:
    """Bytes per second at which layers are streamed here while another process computes: the devices of the testbed
    share the machine's cores, those of a home do not."""
    largest = max(shadows(header, SIZES), key=lambda shadow: shadow.nbytes)
    with work_folder(windows_folder()) as folder, timer("streaming") as reader, timer("computing") as other:
        path = folder / "shadow.gguf"
        write_window(Header(3, (), {}, ()), largest.plan, path)
        reader.fill(path)
        bench = Bench(other, folder, threads, 1 << 20, Patience(0.0))
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(bench.time, largest, path, "resident", 6.0, prefill=0)
            time.sleep(2.0)
            rate = Bench(reader, folder, threads, 1 << 20, Patience(0.0)).stream_rate(largest, path, 2.0)
            busy.result()
    return rate


def linked(made: Home, devices: list[DeviceProfile], token_bytes: int) -> tuple[DeviceProfile, ...]:
    """The profiles with every pair's link, measured over the ring's own sockets."""
    links: dict[str, list[Link]] = {device.name: [] for device in devices}
    for i, j in itertools.combinations(range(made.count), 2):
        ends = [(made.launch(k), f"tcp://10.77.0.{k + 1}:*") for k in (i, j)]
        sizes = (token_bytes, N_BATCH * token_bytes)
        links[devices[i].name].append(measure_link(devices[j].name, ends[0], ends[1], sizes, devices[j].hop_ms))
    return tuple(msgspec.structs.replace(device, links=tuple(links[device.name])) for device in devices)


def started(header: Header, ring: Ring, prediction: Prediction, made: Home, threads: int) -> RingPipeline:
    """The planned engines, each in its namespace and with its own copy of its windows."""
    options = RingOptions(n_ctx=N_CTX, n_batch=N_BATCH, n_threads=threads)
    buffers = stream_bytes(prediction)
    names = [f"device-{i}" for i in range(made.count)]
    used = [i for i, name in enumerate(names) if any(w.device == name for w in ring.windows)]
    devices = tuple(
        DeviceStart(
            name=names[i],
            windows=device_windows(header, ring, names[i], options, made.root / names[i]),
            listen=f"tcp://10.77.0.{i + 1}:*",
            launch=made.launch(i),
            stream_bytes=buffers[names[i]],
        )
        for i in used
    )
    made.drop()  # a limit means nothing where another's pages are used
    return start_ring(RingStart(devices, header.files[0].path, most_logits(header, N_BATCH), "tcp://10.77.0.254:*"))


def read_bytes() -> int:
    """What the engines, children of this process, have read from disk."""
    return sum(child.io_counters().read_bytes for child in psutil.Process().children())


def measure(pipeline: RingPipeline) -> tuple[float, float, float, float]:
    """(TPOT, computing and MB read for a token, TTFT): after a warm-up, the means of the answer that others disturbed
    least. The profile says likewise what layers take when nobody disturbs."""
    prompt = np.random.default_rng(0).integers(100, 20_000, PROMPT).tolist()
    found = []
    for _ in range(1 + ANSWERS):
        times: list[float] = []
        computing: list[float] = []
        read: list[int] = []

        def on_token(_token: int, times=times, computing=computing, read=read) -> None:  # type: ignore[no-untyped-def]
            times.append(time.perf_counter())
            read.append(read_bytes())
            computing.append(sum(s.computing for s in pipeline.spent) / 1e3)

        begin = time.perf_counter()
        pipeline.tell(prompt, Request(Sampling(temperature=0), TOKENS, fresh=True), on_token, lambda: False)
        # the first steps after a prompt still have its prefetching in them
        tpot = (times[-1] - times[2]) * 1e3 / (len(times) - 3)
        mb = (read[-1] - read[2]) / 1e6 / (len(read) - 3)
        found.append((tpot, statistics.mean(computing[3:]), mb, (times[0] - begin) * 1e3))
    return min(found[1:])


def beside(device: DeviceProfile, rate: float) -> DeviceProfile:
    """The profile of a device that shares its machine with others."""
    return msgspec.structs.replace(device, disk=msgspec.structs.replace(device.disk, layer_bytes_per_s=rate))


def run(setup: Setup, models: dict[str, Path], testbed: Path, rate: float) -> Result:
    """Make the home, profile, plan, run, compare."""
    header = read_header(models[setup.model])
    with home(HomeOptions(setup.memory, mbit=setup.mbit, name="pred"), testbed) as made:
        shape = model_shape(header, Workload())
        profiles = [beside(profile(made, i, models[setup.model]), rate) for i in range(made.count)]
        devices = linked(made, profiles, shape.hidden_bytes)
        workload = Workload(n_ctx=N_CTX, n_batch=N_BATCH, prompt_tokens=PROMPT + TOKENS // 2)
        constraints = Constraints(head="device-0", required=tuple(device.name for device in devices))
        solution = solve(Problem(model_shape(header, workload), devices, workload, constraints))
        with contextlib.closing(
            started(header, solution.ring, solution.prediction, made, devices[0].threads)
        ) as pipeline:
            tpot, computing, read_mb, ttft = measure(pipeline)
    predicted = solution.prediction
    asked = msgspec.structs.replace(workload, prompt_tokens=PROMPT)
    ttft_ms = Simulator(Problem(model_shape(header, asked), devices, asked, constraints)).predict(solution.ring).ttft_ms
    return Result(
        model=setup.model,
        memory=setup.memory,
        mbit=setup.mbit,
        windows=" ".join(f"{w.device[-1]}:{w.first}-{w.last}{_runs(w.runs())}" for w in solution.ring.windows),
        predicted_tpot_ms=round(predicted.tpot_ms, 2),
        measured_tpot_ms=round(tpot, 2),
        error=round(abs(predicted.tpot_ms - tpot) / tpot, 4),
        predicted_cause={key: round(value, 2) for key, value in msgspec.to_builtins(predicted.cause).items()},
        measured_compute_ms=round(computing, 2),
        predicted_read_mb=round(sum(load.read_bytes for load in predicted.loads) / 1e6, 1),
        measured_read_mb=round(read_mb, 1),
        predicted_ttft_ms=round(ttft_ms, 1),
        measured_ttft_ms=round(ttft, 1),
    )


def _runs(runs: tuple[tuple[int, int, str], ...]) -> str:
    return "".join(f"{place}{last - first}" for first, last, place in runs)


def plot(results: list[Result]) -> str:
    """Predicted against measured TPOT as SVG, both logarithmic; lines where they agree and 10 % beside that."""
    values = [v for r in results for v in (r.predicted_tpot_ms, r.measured_tpot_ms)]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def at(value: float) -> float:
        return 60 + 400 * (math.log10(value) - low) / (high - low)

    def line(factor: float, style: str) -> str:
        a, b = 10**low, 10**high
        ends = f'x1="{at(a):.1f}" y1="{520 - at(a * factor):.1f}" x2="{at(b):.1f}" y2="{520 - at(b * factor):.1f}"'
        return f"<line {ends} {style}/>"

    ticks = [t for t in (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if low <= math.log10(t) <= high]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 530" font-family="sans-serif" font-size="12">',
        "<style>text,line,rect{fill:#57606a;stroke:none}line{stroke:#8c959f}</style>",
        "<title>Predicted against measured TPOT</title>",
        line(1.0, ""),
        line(1.1, 'stroke-dasharray="3 4"'),
        line(1 / 1.1, 'stroke-dasharray="3 4"'),
        *(f'<text x="{at(t):.0f}" y="482" text-anchor="middle">{t}</text>' for t in ticks),
        *(f'<text x="52" y="{524 - at(t):.0f}" text-anchor="end">{t}</text>' for t in ticks),
        '<text x="260" y="504" text-anchor="middle">measured TPOT, ms</text>',
        '<text x="14" y="260" text-anchor="middle" transform="rotate(-90 14 260)">predicted TPOT, ms</text>',
    ]
    colours = {"small": "#0969da", "large": "#bc4c00"}
    for r in results:
        x, y = at(r.measured_tpot_ms), 520 - at(r.predicted_tpot_ms)
        home = f"{r.model}, {'+'.join(r.memory)}, {r.mbit} Mbit/s"
        said = f"{home}: {r.predicted_tpot_ms} predicted, {r.measured_tpot_ms} measured"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colours[r.model]}"><title>{said}</title></circle>'
        )
    parts.append(
        '<text x="70" y="30" style="fill:#0969da">1.2B</text><text x="70" y="48" style="fill:#bc4c00">8B</text></svg>'
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small")
    parser.add_argument("large")
    parser.add_argument("--testbed", type=Path, default=TESTBED)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of set-ups, from 0")
    parser.add_argument("--svg", type=Path, help="draw predicted against measured")
    a = parser.parse_args()
    models = {"small": Path(a.small).resolve(), "large": Path(a.large).resolve()}
    chosen = [SETUPS[i] for i in a.only] if a.only else list(SETUPS)
    results = []
    rates: dict[str, float] = {}
    for number, setup in enumerate(chosen, 1):
        try:
            if setup.model not in rates:
                rates[setup.model] = rate_beside_others(read_header(models[setup.model]), local_threads(0))
            results.append(run(setup, models, a.testbed, rates[setup.model]))
        except HomeinferError as problem:
            raise SystemExit(f"bench_prediction: {setup}: {problem}") from None
        print(f"{number}/{len(chosen)} {msgspec.json.encode(results[-1]).decode()}", file=sys.stderr, flush=True)
    errors = [result.error for result in results]
    said = {
        "setups": msgspec.to_builtins(results),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "streaming_beside_others_bytes_per_s": {model: round(rate) for model, rate in rates.items()},
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    }
    print(json.dumps(said, indent=2))
    if a.svg:
        a.svg.write_text(plot(results))


if __name__ == "__main__":
    main()
