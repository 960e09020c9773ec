"""What the simulator says of rings whose times can be worked out by hand."""

from __future__ import annotations

import math

import msgspec
import pytest

from homeinfer.cluster.planning.memory import PAGES
from homeinfer.cluster.planning.plan import Constraints, Workload
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile, Link
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.errors import HomeinferError
from tests.cluster.planning.clusters import MB, a_device, a_ring, a_shape

_PLAIN = Workload(n_ctx=256, prompt_tokens=16, n_batch=16, headroom=0.0)
_READ = 100 + PAGES / 1e6


def _simulator(n: int, *devices: DeviceProfile, workload: Workload = _PLAIN) -> Simulator:
    return Simulator(Problem(a_shape(n), devices, workload))


def test_one_device_computes_its_layers_and_the_output() -> None:
    told = _simulator(4, a_device("head")).predict(a_ring(("head", "rrrr")))
    assert told.tpot_ms == pytest.approx(4 * 2.0 + 1.0 + 0.5)
    assert told.tokens_per_s == pytest.approx(1000 / told.tpot_ms)
    assert told.cause.compute_ms == pytest.approx(9.0)
    assert told.cause.overhead_ms == pytest.approx(0.5)


def test_a_hop_costs_the_wire_its_delay_and_the_receiver() -> None:
    devices = a_device("head"), a_device("other", rate=1e6, latency=0.003)
    told = _simulator(4, *devices).predict(a_ring(("head", "r"), ("other", "rr"), ("head", "r")))
    assert told.cause.network_ms == pytest.approx(2 * (3.0 + 4.0))
    assert told.cause.overhead_ms == pytest.approx(3 * 0.5 + 2 * 0.25)
    assert told.tpot_ms == pytest.approx(8 + 1 + 14 + 2)


def test_a_measured_link_counts_before_both_networks() -> None:
    devices = a_device("head"), a_device("other", links=(Link("head", 4e6, 0.002),))
    told = _simulator(3, *devices).predict(a_ring(("head", "r"), ("other", "r"), ("head", "r")))
    assert told.cause.network_ms == pytest.approx(2 * (2.0 + 1.0))


def test_the_wires_type_counts() -> None:
    ring, devices = a_ring(("head", "r"), ("other", "r"), ("head", "r")), (a_device("head"), a_device("other"))
    full, half = (
        _simulator(3, *devices, workload=msgspec.structs.replace(_PLAIN, wire=wire)).predict(ring).cause.network_ms
        for wire in ("f32", "f16")
    )
    assert half == pytest.approx(full / 2)


def test_streamed_layers_that_fit_the_buffer_are_read_once() -> None:
    told = _simulator(4, a_device("head", 1000 * MB)).predict(a_ring(("head", "rssr")))
    assert told.cause.disk_ms == 0
    assert told.loads[0].read_bytes == 0
    assert told.tpot_ms == pytest.approx(2 * 2 + 2 * 3 + 1 + 3 * 0.5)


def test_a_disk_slower_than_everything_else_decides() -> None:
    device = a_device("head", 2 * 100 * MB + 50 * MB + 3 * 10 * MB + 5 * MB + 220 * MB)
    told = _simulator(6, device).predict(a_ring(("head", "rssssr")))
    assert told.tpot_ms == pytest.approx(4 * _READ)
    assert told.loads[0].read_bytes == pytest.approx(400 * MB, rel=1e-3)
    assert told.cause.disk_ms == pytest.approx(told.tpot_ms - 17 - 1.5)


def test_reading_overlaps_with_what_others_compute() -> None:
    memory = 3 * 10 * MB + 50 * MB + 5 * MB + 100 * MB + 2 * 128_000 + 101 * MB
    alone = a_device("head", memory)
    slow = a_device("other", layer_ms=500.0)
    told = _simulator(4, alone, slow).predict(a_ring(("head", "s"), ("other", "r"), ("head", "sr")))
    assert told.cause.disk_ms == pytest.approx(
        _READ - 4, rel=1e-6
    )  # the other's whole, this one's while the head computes its end
    assert told.cause.compute_ms == pytest.approx(3 + 500 + 3 + 2 + 1)


def test_devices_on_one_disk_wait_for_each_other() -> None:
    def tpot(group: str) -> float:
        memory = 10 * MB * 2 + 60 * MB + 250 * MB
        devices = (a_device("head", 4000 * MB), a_device("b", memory, group=group), a_device("c", memory, group=group))
        return (
            _simulator(12, *devices)
            .predict(a_ring(("head", "r"), ("b", "s" * 5), ("c", "s" * 5), ("head", "r")))
            .tpot_ms
        )

    assert tpot("") < 600
    assert tpot("one") == pytest.approx(10 * _READ, rel=1e-3)


def test_experts_are_read_on_demand_as_far_as_memory_lacks_them() -> None:
    shape = a_shape(4, nbytes=1000 * MB, expert_bytes=900 * MB, expert_share=0.1)

    def told(memory: int) -> tuple[float, float]:
        found = Simulator(Problem(shape, (a_device("head", memory),), _PLAIN)).predict(a_ring(("head", "ssss")))
        return found.cause.disk_ms, found.loads[0].read_bytes / MB

    none = told(8000 * MB)
    some, few = told(2600 * MB), told(700 * MB)
    assert none == (0.0, 0)
    assert 0 < some[0] < few[0] <= 4 * 90 / 0.25 + 500
    assert 0 < some[1] < few[1]


def test_several_sequences_pipeline_around_the_ring() -> None:
    devices = a_device("head"), a_device("other")
    ring = a_ring(("head", "rrr"), ("other", "r" * 4), ("head", "r"))
    alone = _simulator(8, *devices).predict(ring)
    four = _simulator(8, *devices, workload=msgspec.structs.replace(_PLAIN, sequences=4)).predict(ring)
    assert four.tokens_per_s > 1.5 * alone.tokens_per_s
    assert four.tpot_ms >= alone.tpot_ms
    assert four.tokens_per_s == pytest.approx(4 / four.tpot_ms * 1000)


def test_a_prompt_is_pipelined_in_chunks() -> None:
    devices = tuple(a_device(name) for name in ("head", "b", "c", "d"))
    long = Workload(n_ctx=1024, prompt_tokens=512, n_batch=512, headroom=0.0)
    ring = a_ring(("head", "rr"), ("b", "rr"), ("c", "rr"), ("d", "rr"), ("head", "r"))
    alone = _simulator(9, *devices, workload=long).predict(a_ring(("head", "r" * 9)))
    assert _simulator(9, *devices, workload=long).predict(ring).ttft_ms < 0.75 * alone.ttft_ms
    assert alone.ttft_ms == pytest.approx(9 * 40 + 1 + 0.5, rel=0.05)


def test_chunks_without_logits_do_not_read_the_output_matrix() -> None:
    """It is read once, at the end, and not ahead; what fits beside it is not read again."""
    four = Workload(n_ctx=256, prompt_tokens=256, n_batch=64, headroom=0.0)
    layer_ms, read_ms = 12.0, 50 + PAGES / 1e6

    def ttft(memory: int, block: int = 0) -> float:
        shape = msgspec.structs.replace(a_shape(4), output_block_bytes=block)
        problem = Problem(shape, (a_device("head", memory),), four)
        return Simulator(problem).predict(a_ring(("head", "ssss"))).ttft_ms

    computing = 4 * (4 * layer_ms + 0.5) + 1
    assert ttft(600 * MB) == ttft(600 * MB, 10 * MB) == pytest.approx(computing)
    assert ttft(450 * MB) == ttft(450 * MB, 10 * MB) == pytest.approx(computing + read_ms)
    assert ttft(300 * MB) == ttft(300 * MB, 10 * MB)


def test_causes_add_up_and_spans_lie_in_the_token() -> None:
    devices = a_device("head", 450 * MB), a_device("other", 400 * MB)
    ring = a_ring(("head", "rss"), ("other", "ssss"), ("head", "sr"))
    told = _simulator(9, *devices).predict(ring, timeline=True)
    parts = told.cause.compute_ms + told.cause.disk_ms + told.cause.network_ms + told.cause.overhead_ms
    assert parts == pytest.approx(told.tpot_ms, rel=1e-12)
    for what in ("compute_ms", "disk_ms", "network_ms", "overhead_ms"):
        assert sum(getattr(load.cause, what) for load in told.loads) == pytest.approx(getattr(told.cause, what))
    busy = [span for span in told.timeline if span.what != "read"]
    assert max(span.end_ms for span in busy) == pytest.approx(told.tpot_ms)
    assert min(span.begin_ms for span in busy) >= 0
    assert {span.what for span in told.timeline} == {"compute", "read", "send", "wait"}
    assert _simulator(9, *devices).value(ring) == told.tpot_ms


def test_objectives_are_values() -> None:
    ring, devices = a_ring(("head", "r"), ("other", "rr"), ("head", "r")), (a_device("head"), a_device("other"))
    for objective, wanted in (("latency", "tpot_ms"), ("ttft", "ttft_ms")):
        workload = msgspec.convert({**msgspec.to_builtins(_PLAIN), "objective": objective}, Workload)
        simulator = _simulator(4, *devices, workload=workload)
        assert simulator.value(ring) == getattr(simulator.predict(ring), wanted)
    workload = msgspec.structs.replace(_PLAIN, objective="throughput", sequences=4)
    simulator = _simulator(4, *devices, workload=workload)
    assert simulator.value(ring) == pytest.approx(1000 / simulator.predict(ring).tokens_per_s)


def test_rings_that_cannot_be_are_named() -> None:
    devices = a_device("head"), a_device("other")
    limits = Constraints(head="head", forbidden=("other",), private_first=2)
    simulator = Simulator(Problem(a_shape(4), devices, _PLAIN, limits))
    for ring, why in (
        (a_ring(("other", "rr"), ("head", "rr")), "where the user is"),
        (a_ring(("head", "rr"), ("other", "r"), ("head", "r")), "ruled out"),
        (a_ring(("head", "rrr")), "the ring ends"),
        (a_ring(("head", "rr"), ("nobody", "rr")), "no profile is named"),
        (a_ring(("head", "rrrg")), "no GPU"),
    ):
        assert why in str(simulator.trouble(ring))
        assert simulator.value(ring) == math.inf
        with pytest.raises(HomeinferError, match="this plan can't be"):
            simulator.predict(ring)


def test_a_profile_without_the_models_layers_is_named() -> None:
    device = msgspec.structs.replace(a_device("head"), times=())
    with pytest.raises(HomeinferError, match="the profile of head lacks"):
        _simulator(4, device)
