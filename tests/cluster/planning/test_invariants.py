"""What holds for every plan, on random clusters (hypothesis)."""

from __future__ import annotations

import math

import msgspec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import Solution, solve
from homeinfer.errors import HomeinferError
from tests.support.clusters import Sizes, random_problem

TINY = Sizes(layers=(3, 7))
SEEDS = st.integers(0, 10_000)


def solved(problem: Problem) -> Solution:
    try:
        return solve(problem)
    except HomeinferError:
        assume(False)
        raise


@settings(derandomize=True, max_examples=25, deadline=None)
@given(SEEDS)
def test_every_layer_once_in_order_head_at_both_ends_memory_kept(seed: int) -> None:
    problem = random_problem(seed, TINY)
    solution = solved(problem)
    windows = solution.ring.windows
    layers = [layer for window in windows for layer in range(window.first, window.last)]
    assert layers == list(range(len(problem.shape.layers)))
    assert windows[0].device == windows[-1].device == problem.head
    assert Simulator(problem).trouble(solution.ring) is None
    assert all(load.memory_free_bytes >= 0 for load in solution.prediction.loads)
    used = {window.device for window in windows}
    assert set(solution.reasons) == {device.name for device in problem.devices} - used


@settings(derandomize=True, max_examples=15, deadline=None)
@given(SEEDS, st.integers(0, 2), st.sampled_from(["memory", "disk", "network"]))
def test_more_of_anything_makes_no_token_slower(seed: int, index: int, what: str) -> None:
    problem = random_problem(seed, TINY)
    before = solved(problem).prediction.tpot_ms
    device = problem.devices[index % len(problem.devices)]
    if what == "memory":
        better = msgspec.structs.replace(device, memory_bytes=int(device.memory_bytes * 1.3))
    elif what == "disk":
        rate = device.disk.layer_bytes_per_s * 1.3
        better = msgspec.structs.replace(device, disk=msgspec.structs.replace(device.disk, layer_bytes_per_s=rate))
    else:
        assert device.network is not None
        rate = device.network.bytes_per_s * 1.3
        better = msgspec.structs.replace(device, network=msgspec.structs.replace(device.network, bytes_per_s=rate))
    devices = tuple(better if one.name == device.name else one for one in problem.devices)
    after = solve(msgspec.structs.replace(problem, devices=devices)).prediction.tpot_ms
    assert math.isfinite(after)
    assert after <= before * (1 + 1e-6)
