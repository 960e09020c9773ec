"""What must hold of every ring: more of anything is never worse, and parts add up."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.cluster.planning.plan import Objective, Ring, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Network
from homeinfer.cluster.planning.simulate import Simulator
from tests.cluster.planning.clusters import MB, a_device, a_ring, a_shape

_NAMES = ("head", "b", "c")
_FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@st.composite
def _problems(draw: st.DrawFn, objective: Objective = "latency", sequences: int = 1) -> tuple[Problem, Ring]:
    n = draw(st.integers(3, 10))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=4)))
    edges = [0, *cuts, n]
    windows = []
    for first, last in itertools.pairwise(edges):
        ends = first == 0 or last == n
        name = "head" if ends else draw(st.sampled_from(_NAMES))
        windows.append(
            (name, "".join(draw(st.lists(st.sampled_from("rs"), min_size=last - first, max_size=last - first))))
        )
    experts = draw(st.sampled_from((0, 80 * MB)))
    shape = a_shape(n, expert_bytes=experts, expert_share=0.1 if experts else 1.0, kv_bytes=1000)
    group = draw(st.sampled_from(("", "one")))
    devices = tuple(
        a_device(
            name,
            draw(st.integers(250, 1200)) * MB,
            layer_ms=draw(st.sampled_from((1.0, 7.0, 40.0))),
            disk=draw(st.sampled_from((2e8, 1e9, 3e9))),
            group=group,
            rate=draw(st.sampled_from((1e6, 1e8))),
            latency=draw(st.sampled_from((0.0, 0.004))),
        )
        for name in _NAMES
    )
    workload = Workload(n_ctx=512, prompt_tokens=64, n_batch=16, headroom=0.0, objective=objective, sequences=sequences)
    return Problem(shape, devices, workload), a_ring(*windows)


def _better(device: DeviceProfile, what: str) -> DeviceProfile:
    network = device.network or Network(1e6, 0.0)
    faster = msgspec.structs.replace(network, bytes_per_s=2 * network.bytes_per_s)
    disk = device.disk
    if what == "memory":
        return msgspec.structs.replace(device, memory_bytes=device.memory_bytes + 130 * MB)
    if what == "network":
        return msgspec.structs.replace(device, network=faster)
    if what == "latency":
        halved = msgspec.structs.replace(network, latency_s=network.latency_s / 2)
        return msgspec.structs.replace(device, network=halved)
    rates = {name: 1.3 * getattr(disk, name) for name in ("layer_bytes_per_s", "fault_bytes_per_s")}
    return msgspec.structs.replace(device, disk=msgspec.structs.replace(disk, **rates))


@pytest.mark.parametrize("what", ["memory", "network", "latency", "disk"])
@_FEW
@given(case=_problems(), which=st.integers(0, 2))
def test_more_is_never_slower(what: str, case: tuple[Problem, Ring], which: int) -> None:
    problem, ring = case
    devices = list(problem.devices)
    devices[which] = _better(devices[which], what)
    before = Simulator(problem).value(ring)
    after = Simulator(msgspec.structs.replace(problem, devices=tuple(devices))).value(ring)
    assert after <= before * (1 + 1e-6)


@_FEW
@given(case=_problems(), objective=st.sampled_from(("latency", "throughput", "ttft")))
def test_a_ring_has_a_value_exactly_when_it_has_no_trouble(case: tuple[Problem, Ring], objective: Objective) -> None:
    problem, ring = case
    workload = msgspec.structs.replace(problem.workload, objective=objective, sequences=2)
    simulator = Simulator(msgspec.structs.replace(problem, workload=workload))
    assert (simulator.value(ring) == math.inf) == (simulator.trouble(ring) is not None)


@_FEW
@given(case=_problems())
def test_memory_stays_below_the_limit_and_causes_add_up(case: tuple[Problem, Ring]) -> None:
    problem, ring = case
    simulator = Simulator(problem)
    if simulator.trouble(ring) is not None:
        return
    told = simulator.predict(ring)
    cause = told.cause
    parts = (cause.compute_ms, cause.disk_ms, cause.network_ms, cause.overhead_ms)
    assert sum(parts) == pytest.approx(told.tpot_ms)
    assert min(parts) >= 0
    assert all(load.memory_free_bytes >= 0 for load in told.loads)
