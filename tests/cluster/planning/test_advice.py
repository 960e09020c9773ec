"""What would help most: the least that does it, at most one of each thing, priced by planning again."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.cluster.planning.advice import LEAST_GAIN, Judge, advise, changes, scaled
from homeinfer.cluster.planning.plan import Cause, Constraints, DeviceLoad, Objective, Prediction, Workload
from homeinfer.cluster.planning.planner import largest_context
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import Link, Network
from homeinfer.cluster.planning.quick import adapted_value, has_plan
from homeinfer.cluster.planning.shape import ModelShape
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve import solve
from tests.support.profiles import LAPTOP, MAC, SHAPE, Machine, device_of

WIFI = Network(3e6, 0.003)
DEVICES = tuple(
    msgspec.structs.replace(device_of(msgspec.structs.replace(machine, gpu_bytes=0), SHAPE), network=WIFI)
    for machine in (LAPTOP, MAC)
)


def problem(objective: Objective = "latency") -> Problem:
    return Problem(SHAPE, DEVICES, Workload(n_ctx=4096, objective=objective), Constraints(head="laptop"))


def reshape(_workload: Workload) -> ModelShape:
    return SHAPE


def prediction(network_ms: float = 30.0) -> Prediction:
    """Both take part; the laptop is full and waits for its disk."""
    return Prediction(
        tpot_ms=100.0,
        ttft_ms=1000.0,
        tokens_per_s=10.0,
        cause=Cause(90.0 - network_ms, 10.0, network_ms, 0.0),
        loads=(
            DeviceLoad("laptop", Cause(30.0, 10.0), 3_690_000_000, 410_000_000, 50_000_000, 50_000_000),
            DeviceLoad("mac", Cause(30.0, 0.0), 500_000_000, 1_900_000_000),
        ),
    )


def by_memory(wanted: int) -> Judge:
    """A judge to whom only the laptop's memory counts: 100 ms, and 60 from `wanted` GB more on."""

    def judge(changed: Problem) -> float:
        more = changed.devices[0].memory_bytes - DEVICES[0].memory_bytes
        return 60.0 if more >= wanted * 1_000_000_000 else 100.0

    return judge


@pytest.mark.parametrize("wanted", [1, 2, 4, 8])
def test_the_least_memory_that_does_it_is_advised(wanted: int) -> None:
    found = advise(problem(), prediction(), 100.0, reshape, 4.5, by_memory(wanted))
    assert [(one.what, one.value, one.difference) for one in found] == [(f"+{wanted} GB on laptop", 60.0, -40.0)]
    assert found[0].change == pytest.approx(-0.4)


def test_what_gains_too_little_or_can_not_be_planned_is_no_advice() -> None:
    for value in (100.0, 100.0 * (1 - LEAST_GAIN) + 0.01, math.inf):
        assert advise(problem(), prediction(), 100.0, reshape, 4.5, lambda _: value) == ()  # noqa: B023


def test_three_at_most_and_the_best_first() -> None:
    gains: dict[int, float] = {}

    def judge(changed: Problem) -> float:
        return 90.0 - 5 * gains.setdefault(hash(msgspec.json.encode(changed)) % 97, float(len(gains) % 7))

    found = advise(problem(), prediction(), 100.0, reshape, 16.0, judge)
    assert len(found) == 3
    assert [one.change for one in found] == sorted(one.change for one in found)


def test_throughput_is_told_in_tokens_per_second() -> None:
    (one,) = advise(problem("throughput"), prediction(), 100.0, reshape, 2.0, by_memory(1))
    assert one.value == pytest.approx(1e3 / 60)
    assert one.difference == pytest.approx(1e3 / 60 - 10)
    assert one.change == pytest.approx(2 / 3)


def test_cables_change_measured_links_only_between_two_that_get_one() -> None:
    linked = tuple(
        msgspec.structs.replace(device, links=(Link(other, 3e6, 0.003),), network=None)
        for device, other in zip(DEVICES, ("mac", "laptop"), strict=True)
    )
    found = changes(msgspec.structs.replace(problem(), devices=linked), prediction(), reshape, 4.5)
    by_name = {change.what: change.problem for group in found for change in group}
    everyone = by_name["network cables (1 Gbit/s) for all devices"]
    assert all(device.links[0].bytes_per_s > 1e8 and device.links[0].latency_s < 0.001 for device in everyone.devices)
    alone = by_name["a network cable (1 Gbit/s) for laptop"]
    assert [device.links[0].bytes_per_s for device in alone.devices] == [3e6, 3e6]


def test_without_network_time_no_cable_is_advised() -> None:
    assert not any("cable" in group[0].what for group in changes(problem(), prediction(0.0), reshape, 4.5))


def test_a_smaller_file_takes_its_share_of_bytes_and_of_decoding() -> None:
    half = scaled(problem(), 0.5)
    assert [layer.nbytes for layer in half.shape.layers] == [layer.nbytes // 2 for layer in SHAPE.layers]
    before, after = DEVICES[0].times[0], half.devices[0].times[0]
    assert (after.decode_1_ms, after.prefill_512_ms) == (before.decode_1_ms / 2, before.prefill_512_ms)


def test_a_device_with_room_to_spare_is_not_to_get_more() -> None:
    assert not [g for g in changes(problem(), prediction(), reshape, 4.5) if g[0].what.endswith("GB on mac")]


def short_of_memory() -> Problem:
    """Two machines whose memory does not hold the model."""
    small = Machine("one", 360_000_000, 20e9, 1e11, 4e8)
    devices = tuple(
        msgspec.structs.replace(device_of(msgspec.structs.replace(small, name=name), SHAPE), overhead_bytes=20_000_000)
        for name in ("one", "two")
    )
    return Problem(SHAPE, devices, Workload(n_ctx=256, prompt_tokens=64), Constraints(head="one"))


def test_advice_promises_no_more_than_planning_again_gives() -> None:
    """More memory on one of them is among the advice, and the search finds a plan at least as good as promised."""
    short = short_of_memory()
    solution = solve(short)
    value = Simulator(short).value(solution.ring)

    def judge(changed: Problem) -> float:
        return adapted_value(changed, solution.ring, 300)

    found = advise(short, solution.prediction, value, reshape, 4.5, judge)
    assert all(one.change < -LEAST_GAIN for one in found)
    memory = [one for one in found if one.what.startswith("+")]
    assert memory
    for one in memory:
        more, name = int(one.what.split()[0]) * 1_000_000_000, one.what.rsplit(" ", 1)[1]
        devices = tuple(
            msgspec.structs.replace(d, memory_bytes=d.memory_bytes + more) if d.name == name else d
            for d in short.devices
        )
        again = solve(msgspec.structs.replace(short, devices=devices)).prediction.tpot_ms
        assert 0.8 * one.value <= again <= one.value * (1 + 1e-6)


def test_an_unchanged_problem_keeps_its_plan_and_too_little_memory_is_no_plan() -> None:
    short = short_of_memory()
    solution = solve(short)
    assert adapted_value(short, solution.ring, 100) == pytest.approx(solution.prediction.tpot_ms)
    assert has_plan(short)
    none = tuple(msgspec.structs.replace(device, memory_bytes=100_000_000) for device in short.devices)
    assert not has_plan(msgspec.structs.replace(short, devices=none))
    assert adapted_value(msgspec.structs.replace(short, devices=none), solution.ring, 100) == math.inf


@settings(derandomize=True, max_examples=60, deadline=None)
@given(asked=st.integers(1, 1 << 21), most=st.integers(0, 1 << 21))
def test_the_largest_context_is_found(asked: int, most: int) -> None:
    found = largest_context(asked, lambda n_ctx: n_ctx <= most)
    assert found == min(most, asked - 1) // 256 * 256
