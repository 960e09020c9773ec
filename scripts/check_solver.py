#!/usr/bin/env python3
"""Is the planner's answer the best one? Random clusters against enumeration, against other rules, and the clock.

    scripts/check_solver.py --clusters 500 --seed 1 [--baselines 2000]

Prints JSON. worst_gap: by how much the plan's predicted TPOT is above the best of all enumerated plans (a share), in
the worst of the small clusters (2 or 3 devices, up to 10 unlike layers); equal_share: in how many it is equal. solve_s:
seconds for large problems, the slowest of three. baselines: on clusters of 2 to 8 devices the TPOT of prima.cpp's
rule, of a split by memory and of an even split divided by ours: percentiles; cannot: where its plan can't run at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from multiprocessing import Pool
from typing import TypeVar

from homeinfer.cluster.planning.baselines import BASELINES, baseline
from homeinfer.cluster.planning.enumerate import best_plan
from homeinfer.cluster.planning.random_clusters import HOMES, SMALL, Sizes, random_problem
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from homeinfer.errors import HomeinferError

T = TypeVar("T")
EQUAL = 1e-6
LARGE = {"8x80": (8, 80), "16x128": (16, 128), "64x128": (64, 128)}
PERCENTILES = (5, 25, 50, 75, 95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=500, help="small clusters to compare with enumeration")
    parser.add_argument("--baselines", type=int, default=2000, help="larger clusters to compare with other rules")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    report: dict[str, object] = {"command": " ".join(("scripts/check_solver.py", *sys.argv[1:])), "seed": args.seed}
    report["solve_s"] = {name: solve_seconds(*size, args.seed) for name, size in LARGE.items()}
    # a pool for each: what is left in one's queue when enough is known must not be computed
    if args.clusters:
        with Pool(args.processes) as pool:
            report.update(
                judge_gaps(collect(pool.imap_unordered(gap_of, seeds(args.seed)), args.clusters, "enumerated"))
            )
    if args.baselines:
        with Pool(args.processes) as pool:
            ratios = collect(pool.imap_unordered(ratios_of, seeds(args.seed)), args.baselines, "baselines")
            report["baselines"] = judge_ratios(ratios)
    print(json.dumps(report, indent=2))
    return 0


def seeds(seed: int) -> Iterable[int]:
    """More than are needed: some clusters have no plan at all and do not count."""
    return range(seed * 1_000_000, seed * 1_000_000 + 100_000)


def collect(results: Iterable[T | None], wanted: int, what: str) -> list[T]:
    """The first results that are some, with progress on stderr."""
    found: list[T] = []
    begin = shown = time.monotonic()
    for result in results:
        if result is not None:
            found.append(result)
        now = time.monotonic()
        if found and (now - shown > 2 or len(found) == wanted):
            left = (now - begin) / len(found) * (wanted - len(found))
            print(f"\r{what}: {len(found)} of {wanted}, {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
            shown = now
        if len(found) == wanted:
            break
    print(file=sys.stderr)
    return found


def gap_of(seed: int) -> tuple[int, float] | None:
    """(seed, share by which the solver's plan is slower than the best), None where there is no plan."""
    problem = random_problem(seed, SMALL)
    simulator = Simulator(problem)
    try:
        ours = simulator.value(solve(problem).ring)
    except HomeinferError:
        ours = math.inf
    best = best_plan(problem, simulator, ours).value
    if math.isinf(best):
        return None
    return seed, max(ours / best - 1, 0.0)


def judge_gaps(gaps: list[tuple[int, float]]) -> dict[str, object]:
    worst = max(gaps, key=lambda found: found[1])
    return {
        "clusters": len(gaps),
        "worst_gap": worst[1],
        "worst_gap_seed": worst[0],
        "equal_share": sum(gap <= EQUAL for _, gap in gaps) / len(gaps),
    }


def ratios_of(seed: int) -> dict[str, float] | None:
    """Each rule's TPOT divided by ours (math.inf where its plan can't run), None where there is no plan."""
    problem = random_problem(seed, HOMES)
    simulator = Simulator(problem)
    try:
        ours = simulator.value(solve(problem).ring)
    except HomeinferError:
        return None
    found = {}
    for name in BASELINES:
        ring = baseline(name, problem)
        found[name] = math.inf if ring is None else simulator.value(ring) / ours
    return found


def judge_ratios(ratios: list[dict[str, float]]) -> dict[str, object]:
    lowest = min(min(found.values()) for found in ratios)
    report: dict[str, object] = {
        "clusters": len(ratios),
        "never_slower": lowest >= 1 - EQUAL,
        "worst_ratio": lowest,
    }
    for name in BASELINES:
        values = sorted(found[name] for found in ratios)
        can = [value for value in values if math.isfinite(value)]
        row: dict[str, float] = {"cannot": (len(values) - len(can)) / len(values)}
        for percent in PERCENTILES if can else ():
            row[f"p{percent}"] = round(can[min(len(can) * percent // 100, len(can) - 1)], 3)
        row["equal"] = sum(value <= 1 + EQUAL for value in can) / len(values)
        report[name] = row
    return report


def solve_seconds(devices: int, layers: int, seed: int) -> float:
    """The slowest of three problems of so many devices and layers that have a plan."""
    sizes = Sizes(devices=(devices, devices), layers=(layers, layers), layer_bytes=(1e8, 6e8), memory=(0.5, 1.5))
    slowest, found, number = 0.0, 0, seed * 1_000_000
    while found < 3:
        problem = random_problem(number, sizes)
        number += 1
        begin = time.monotonic()
        try:
            solve(problem)
        except HomeinferError:
            continue
        slowest, found = max(slowest, time.monotonic() - begin), found + 1
        print(f"{devices} devices, {layers} layers: {time.monotonic() - begin:.1f} s", file=sys.stderr)
    return round(slowest, 2)


if __name__ == "__main__":
    sys.exit(main())
