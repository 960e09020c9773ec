"""What users are shown of a cluster."""

from __future__ import annotations

import msgspec
import pytest

from homeinfer.cluster.coordinator.show import disk_share, streamed_layers, waits_for, why_idle
from homeinfer.cluster.coordinator.speed import Rates
from homeinfer.cluster.coordinator.state import Cluster
from homeinfer.cluster.planning.plan import Cause
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire import control
from tests.cluster.coordinator.world import NAMES, World, back_in_mid_answer, options, running


def streaming(read_bytes: int) -> PlanReport:
    """Box streams two layers; the disk gives so many bytes for each token."""
    plan = running().cluster.plan
    assert plan is not None
    windows = tuple(
        msgspec.structs.replace(window, streamed_layers=2) if window.device == "box" else window
        for window in plan.report.windows
    )
    devices = tuple(
        msgspec.structs.replace(device, read_bytes=read_bytes, cause=Cause(compute_ms=30.0))
        for device in plan.report.devices
    )
    return msgspec.structs.replace(plan.report, windows=windows, devices=devices)


def test_layers_that_stay_in_memory_once_they_were_read_are_not_from_disk() -> None:
    rates = Rates(compute_share=0.8, tokens_per_s=10.0)
    assert streamed_layers(streaming(1000), "box") == 2
    assert disk_share(streaming(1000), "box", rates) == pytest.approx(0.5)
    assert streamed_layers(streaming(0), "box") == 0
    assert disk_share(streaming(0), "box", rates) == 0.0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"devices": 3}, "1 of 3 are here"),
        ({"devices": 1, "required": ("pad",)}, "pad must take part"),
        ({"wait_seconds": 60.0}, "whoever comes within 60 s"),
        ({}, "1 of 3 that are paired are here, for 8 s at most"),
    ],
)
def test_a_cluster_that_waits_says_for_what(asked: dict[str, object], said: str) -> None:
    world = World(options(**asked), NAMES)
    world.turn_on("desk")
    world.run(2)
    assert world.cluster.state == "waiting"
    assert waits_for(world.cluster) == said


def test_a_cluster_without_a_plan_says_that_those_who_are_here_do_not_do() -> None:
    world = World(options(), NAMES, least=3)
    world.turn_on("desk", "box")
    world.run(12)
    assert waits_for(world.cluster) == "those that are here can't run it"
    assert waits_for(running().cluster) == ""


def idle(cluster: Cluster, name: str) -> str:
    return why_idle(cluster, cluster.device(name))


def test_a_device_that_came_later_says_why_it_does_nothing_or_when_it_will() -> None:
    world = back_in_mid_answer("box")
    world.run(10)
    assert idle(world.cluster, "box") == "it comes in at the next pause between answers"
    assert idle(world.cluster, "pad") == ""
    assert idle(world.cluster.having(better=None), "box") == "a plan with it would not be 5 % better"
    assert idle(world.cluster.having(options=options(forbidden=("box",))), "box") == "--forbid leaves it out"


def test_devices_are_measured_anew_where_that_is_wanted() -> None:
    told = running(fresh=True).devices["box"].heard
    assert [message.fresh for message in told if isinstance(message, control.Measure)] == [True]
