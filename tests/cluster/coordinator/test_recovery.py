"""What a ring of made-up devices does when one of them fails: who is blamed, who stays, and that it serves again."""

from __future__ import annotations

import random

import pytest

from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.checking import culprits
from homeinfer.cluster.coordinator.placing import JOIN_SECONDS
from homeinfer.cluster.wire import control
from tests.cluster.coordinator.world import NAMES, World, options, running


def test_an_engine_that_crashed_is_loaded_again_and_the_others_keep_theirs() -> None:
    world = running()
    ports = world.devices["pad"].port
    world.devices["box"].crash()
    world.run(2)
    assert world.ring() == set(NAMES)
    assert world.epochs == [1, 2]
    assert world.devices["pad"].port == ports
    assert world.devices["box"].port > 1001


def test_a_device_that_is_silent_is_left_out_and_taken_back_when_it_returns() -> None:
    world = running()
    world.devices["box"].is_on = False
    world.run(control.LOST_SECONDS + 3)
    assert world.ring() == {"desk", "pad"}
    assert any("box left" in note and "re-planned on 2 devices" in note for note in world.notes)
    world.turn_on("box")
    world.run(5)
    assert world.ring() == set(NAMES)
    assert world.cluster.recoveries == 1


def test_a_head_that_was_stopped_itself_takes_nobody_for_lost() -> None:
    world = running()
    world.now += 60
    world.cluster = events.woke(world.cluster, world.now)
    world.take(events.silent(world.cluster, world.now))
    assert world.ring() == set(NAMES)


def test_a_device_that_comes_and_goes_is_left_out_for_a_while() -> None:
    world = running()
    for _ in range(4):
        world.devices["box"].end()
        world.run(control.LOST_SECONDS + 2)
        world.turn_on("box")
        world.run(4)
    assert world.ring() == {"desk", "pad"}
    world.run(120)
    assert world.ring() == set(NAMES)


def test_an_engine_that_hangs_is_found_and_started_again() -> None:
    world = running()
    world.devices["pad"].is_hung = True
    world.take(events.stuck(world.cluster, world.cluster.epoch, "nothing was heard", world.now))
    assert world.serving is None
    world.run(JOIN_SECONDS + 3)
    assert world.ring() == set(NAMES)
    assert any(isinstance(message, control.Unload) for message in world.devices["pad"].heard)


def test_a_link_that_carries_nothing_costs_one_of_its_devices_its_place() -> None:
    world = running()
    world.devices["pad"].is_walled = True
    world.take(events.stuck(world.cluster, world.cluster.epoch, "the ring was silent", world.now))
    assert world.cluster.state == "recovering"
    world.run(15)
    assert world.ring() == {"desk", "box"}
    assert any("pad can't be reached by the others" in note for note in world.notes)


def test_a_device_that_computes_rubbish_is_left_out() -> None:
    world = running()
    assert world.cluster.plan is not None
    number = [owner for owner, _ in world.cluster.plan.hops].index("box")
    world.take(events.faulty(world.cluster, number, "rows that are no numbers", world.now))
    world.run(5)
    assert world.ring() == {"desk", "pad"}
    assert any("box computes rubbish" in note for note in world.notes)


def test_the_fewest_devices_are_blamed_for_links_that_are_silent() -> None:
    assert culprits([("desk", "box"), ("box", "pad")], "desk") == ("box",)
    assert culprits([("pad", "desk")], "desk") == ("pad",)
    assert culprits([("desk", "box"), ("pad", "desk")], "desk") == ("box", "pad")


def test_an_engine_that_crashes_again_and_again_costs_its_device_its_place() -> None:
    world = running()
    for _ in range(3):
        world.devices["box"].crash()
        world.run(2)
    assert world.ring() == {"desk", "pad"}
    assert world.ended is None


def test_the_head_ends_the_cluster_when_its_own_engine_cannot_stay_up() -> None:
    world = running()
    for _ in range(12):
        world.devices["desk"].crash()
        world.run(1)
    assert world.ended is not None
    assert "again and again" in world.ended


def test_a_device_without_memory_is_planned_with_less() -> None:
    world = running()
    world.devices["box"].part = None
    world.devices["box"].says.append(control.EngineGone(1, "killed", is_memory=True))
    world.run(3)
    assert world.ring() == set(NAMES)
    assert world.cluster.device("box").memory_share == pytest.approx(0.85)


def test_too_few_devices_are_waited_for_and_the_answer_goes_on_when_they_are_back() -> None:
    world = World(options(devices=3), NAMES, least=3)
    world.turn_on(*NAMES)
    world.run(5)
    assert world.ring() == set(NAMES)
    world.devices["box"].end()
    world.run(10)
    assert world.serving is None
    assert world.cluster.state == "recovering"
    plans = world.cluster.planned
    world.run(60)
    assert world.cluster.planned == plans  # nothing is tried while nothing has changed
    world.turn_on("box")
    world.run(5)
    assert world.ring() == set(NAMES)


def test_a_connection_that_was_away_for_a_moment_changes_nothing() -> None:
    world = running()
    world.hello("pad")
    world.run(3)
    assert world.epochs == [1]
    assert world.ring() == set(NAMES)


def test_a_device_that_was_forgotten_is_told_and_replaced() -> None:
    world = running()
    world.take(events.forgotten(world.cluster, "box", world.now))
    assert isinstance(world.devices["box"].heard[-1], control.Refuse)
    world.devices["box"].end()
    world.run(5)
    assert world.ring() == {"desk", "pad"}
    assert world.cluster.get("box") is None


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_it_comes_to_serve_again(seed: int) -> None:
    """Faults at random for ten minutes, then peace: all devices serve, and no epoch came twice (World checks)."""
    chance = random.Random(seed)
    world = World(options(devices=3), NAMES, least=1 + seed % 2, seed=seed)
    world.turn_on(*NAMES)
    for _ in range(200):
        world.run(chance.uniform(0, 6))
        name = chance.choice(NAMES)
        device = world.devices[name]
        fault = chance.choice(("crash", "end", "hang", "hello", "stuck", "on", "on", "on"))
        if fault == "crash" and device.is_on and name != "desk":
            device.crash()
        elif fault == "end":
            device.end()
        elif fault == "hang":
            device.is_hung = device.part is not None
        elif fault == "hello" and device.is_on:
            world.hello(name)
        elif fault == "stuck":
            world.take(events.stuck(world.cluster, world.cluster.epoch, "nothing was heard", world.now))
        elif fault == "on" and not device.is_on:
            world.turn_on(name)
    for device in world.devices.values():
        if not device.is_on:
            world.turn_on(device.name)
    world.run(1500)
    assert world.ended is None
    world.take(events.stuck(world.cluster, world.cluster.epoch, "the last one", world.now))
    world.run(60)
    assert world.ring() == set(NAMES), world.cluster
