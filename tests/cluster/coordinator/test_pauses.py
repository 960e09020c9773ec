"""What waits for a pause between answers, what does not, and what goes on slowly meanwhile; devices are made up."""

from __future__ import annotations

from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.planning import planned
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.client import Order
from tests.cluster.coordinator.world import LAYERS, NAMES, World, back_in_mid_answer, even_plan, running


def test_a_user_may_have_it_planned_anew_in_the_middle_of_an_answer() -> None:
    world = running()
    world.cluster = events.busy(world.cluster, 1).cluster
    for least, changes in ((1, False), (4, False)):
        world.least = least
        outcome, problem = events.ordered(world.cluster, Order("replan"), world.now)
        assert problem is None
        world.take(outcome)
        world.run(3)
        assert (len(world.epochs) > 1) == changes
    assert "planned anew: everything stays as it is" in world.notes
    assert world.ring() == set(NAMES)


def test_a_device_that_returns_waits_for_a_pause_between_answers() -> None:
    world = back_in_mid_answer("box")
    world.run(10)
    assert world.ring() == {"desk", "pad"}
    world.cluster = events.busy(world.cluster, 0).cluster
    world.run(3)
    assert world.ring() == set(NAMES)


def test_a_better_plan_outlives_a_crash_of_the_present_one() -> None:
    world = back_in_mid_answer("box")
    world.run(3)
    world.devices["pad"].crash()
    world.run(2)
    assert world.ring() == {"desk", "pad"}
    world.cluster = events.busy(world.cluster, 0).cluster
    world.run(3)
    assert world.ring() == set(NAMES)


def test_replicas_go_to_disks_of_other_devices() -> None:
    world = running(replicas=2)
    world.run(10)
    middle = frozenset(range(1, LAYERS - 2))
    assert world.devices["box"].holds == middle
    assert world.devices["pad"].holds == middle


def test_weights_move_slowly_while_an_answer_is_written() -> None:
    world = running(replicas=2)
    world.cluster = events.busy(world.cluster, 1).cluster
    world.devices["pad"].holds = frozenset()
    world.hello("pad")
    world.step()
    world.devices["pad"].is_on = False  # it hears Fetch and has not answered
    world.cluster = world.cluster.with_device("pad", fetching=frozenset({1}))
    world.step()
    limits = [message for message in world.devices["box"].heard if isinstance(message, control.Limit)]
    assert limits[-1].most_bytes_per_s > 0


def planned_while_it_is_joined_again(least: int) -> World:
    """A device comes back while an answer is written; what the planner says of it comes when the ring has just
    broken."""
    world = back_in_mid_answer("box")
    world.is_planning_slow = True
    world.run(5)
    (asked,) = world.plans
    world.devices["pad"].part = None
    world.take(events.heard(world.cluster, "pad", control.EngineGone(world.epochs[-1], "it was killed"), world.now))
    assert world.cluster.phase == "placing"
    world.take(planned(world.cluster, asked.number, even_plan(asked.devices, least), world.now))
    world.plans, world.is_planning_slow = [], False
    return world


def test_a_plan_that_comes_while_the_ring_is_joined_again_is_not_lost() -> None:
    world = planned_while_it_is_joined_again(1)
    world.run(20)
    assert world.ring() == {"desk", "pad"}
    world.cluster = events.busy(world.cluster, 0).cluster
    world.run(3)
    assert world.ring() == set(NAMES)


def test_no_other_plan_while_the_ring_is_joined_again_takes_nothing_away() -> None:
    world = planned_while_it_is_joined_again(4)
    world.run(20)
    assert world.ring() == {"desk", "pad"}
