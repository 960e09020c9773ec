"""What the decisions are when other programs take memory of a device while the cluster runs."""

from __future__ import annotations

import pytest

from homeinfer.cluster.coordinator.state import MakePlan
from homeinfer.cluster.coordinator.trust import bearable, is_pressed, memory_share, plannable
from homeinfer.cluster.wire.control import DeviceStats
from tests.cluster.coordinator.world import NAMES, World, profile, running

MB = 1_000_000
DESK = profile("desk", 1000 * MB)


def stats(available: int, held: int = 0) -> DeviceStats:
    return DeviceStats(memory_bytes=held * MB, available_bytes=available * MB, total_bytes=4000 * MB)


def asked_memory(world: World, name: str) -> int:
    """What the next plan may use of a device."""
    world.is_planning_slow = True
    world.run(4)
    plan = world.plans[-1]
    assert isinstance(plan, MakePlan)
    return next(device.memory_bytes for device in plan.devices if device.name == name)


def test_less_than_a_quarter_of_what_is_to_stay_free_is_too_little() -> None:
    assert is_pressed(DESK, stats(24), 0.1)
    assert not is_pressed(DESK, stats(26), 0.1)
    assert not is_pressed(DESK, DeviceStats(), 0.1)  # nothing was said yet
    assert not is_pressed(DESK, stats(1), 0.0)  # nothing is to stay free


@pytest.mark.parametrize("taken", [60, 100, 150, 300])
def test_what_is_lacking_is_given_back_whatever_processes_seem_to_hold(taken: int) -> None:
    """900 MB of 1,000 are planned and held; of what others take all but the 100 that stayed free is lacking."""
    now = stats(max(100 - taken, 0), held=980)
    lacking = 100 - now.available_bytes // MB
    assert bearable(900 * MB, DESK, now, 0.1) * 0.9 == pytest.approx((900 - lacking) * MB, abs=2)
    assert plannable(DESK, now, 1.0, is_given=False) == DESK.memory_bytes  # by that alone nothing would change


def test_a_device_that_lacks_everything_still_has_a_number() -> None:
    assert bearable(10, DESK, stats(0), 0.1) == 1


def test_what_is_over_may_be_taken_again() -> None:
    assert bearable(450 * MB, DESK, stats(550), 0.1) == pytest.approx(1000 * MB, abs=2)


@pytest.fixture
def world() -> World:
    made = running()
    assert made.cluster.device("box").profile is not None
    return made


def test_memory_that_others_take_is_planned_without(world: World) -> None:
    total = memory_of(world, "box")
    world.devices["box"].stats = DeviceStats(memory_bytes=total, available_bytes=total // 50, total_bytes=total * 4)
    world.now += 60  # since the plan before
    assert asked_memory(world, "box") < total
    assert world.cluster.is_forced


def test_a_device_that_ran_out_of_memory_long_ago_may_have_all_of_it_again() -> None:
    assert memory_share(0.72, (100.0, 200.0), 400.0) == 0.72
    assert memory_share(0.72, (100.0, 200.0), 900.0) == 1.0


def test_a_moment_of_little_memory_changes_nothing(world: World) -> None:
    total = memory_of(world, "box")
    world.now += 60
    plans = world.cluster.planned
    world.devices["box"].stats = DeviceStats(available_bytes=total // 50, total_bytes=total * 4)
    world.run(0.5)
    world.devices["box"].stats = DeviceStats(available_bytes=total // 2, total_bytes=total * 4)
    world.run(10)
    assert world.cluster.planned == plans


def test_it_is_not_planned_anew_all_the_time(world: World) -> None:
    total = memory_of(world, "box")
    world.devices["box"].stats = DeviceStats(available_bytes=total // 50, total_bytes=total * 4)
    plans = world.cluster.planned
    world.run(150)
    assert world.cluster.planned - plans in (2, 3)


def test_memory_that_others_gave_back_is_planned_with_again_once(world: World) -> None:
    total, held = memory_of(world, "box"), 1000  # as its plan says
    world.devices["box"].stats = DeviceStats(available_bytes=total // 50, total_bytes=total * 4)
    world.now += 60
    world.run(4)
    less = world.cluster.device("box").planned_bytes
    assert less < total
    plans = world.cluster.planned
    world.run(70)
    world.devices["box"].stats = DeviceStats(available_bytes=total - held, total_bytes=total * 4)
    world.run(70)
    assert world.cluster.device("box").planned_bytes == pytest.approx(total, rel=0.01)
    plans = world.cluster.planned
    world.run(200)
    assert world.cluster.planned == plans


def test_where_there_was_no_plan_for_want_of_memory_there_is_one_when_it_comes_back() -> None:
    """The engine was killed for memory, and what the device said just then was that it has none at all."""
    world = running(required=("box",))
    total = memory_of(world, "box")
    world.devices["box"].stats = DeviceStats(available_bytes=total // 50, total_bytes=total * 4)
    world.step()
    world.least = 4
    world.devices["box"].crash(is_memory=True)
    world.run(30)
    assert world.cluster.phase == "waiting"
    plans = world.cluster.planned
    world.least = 1
    world.run(30)
    assert world.cluster.planned == plans  # with nothing new there is nothing to plan
    world.devices["box"].stats = DeviceStats(available_bytes=total // 2, total_bytes=total * 4)
    world.run(5)
    assert world.ring() == set(NAMES)


def memory_of(world: World, name: str) -> int:
    found = world.cluster.device(name).profile
    assert found is not None
    return found.memory_bytes
