"""What the coordinator decides, on devices that are made up: who takes part, and what happens when one does not."""

from __future__ import annotations

import random

import msgspec
import pytest

from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.checking import culprits
from homeinfer.cluster.coordinator.placing import FETCH_SECONDS, JOIN_SECONDS
from homeinfer.cluster.coordinator.planning import allows
from homeinfer.cluster.coordinator.ring_plan import route_of
from homeinfer.cluster.coordinator.show import device_status
from homeinfer.cluster.coordinator.speed import Rates
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.client import Order
from homeinfer.engine.scheduler import MOST_REPLAYED
from tests.cluster.coordinator.world import LAYERS, World, options, profile

NAMES = ("desk", "box", "pad")


def running(**changes: object) -> World:
    """Three devices that serve."""
    world = World(options(devices=3, **changes), NAMES)
    world.turn_on(*NAMES)
    world.run(5)
    assert world.ring() == set(NAMES)
    return world


def test_devices_are_told_the_model_measured_linked_given_weights_and_joined() -> None:
    world = running()
    told = [type(message).__name__ for message in world.devices["box"].heard]
    assert [name for name in told if name in ("Know", "Measure", "Fetch", "Load", "Route")] == [
        "Know",
        "Measure",
        "Fetch",
        "Load",
        "Route",
    ]
    assert "Fetch" not in [type(message).__name__ for message in world.devices["desk"].heard]
    links = {link.to for device in world.cluster.devices if device.profile for link in device.profile.links}
    assert links == set(NAMES)
    assert world.epochs == [1]


def test_devices_get_only_what_their_layers_need() -> None:
    world = running()
    assert world.devices["box"].holds | world.devices["pad"].holds == frozenset(range(1, LAYERS - 2))
    assert not world.devices["box"].holds & world.devices["pad"].holds


def test_a_device_that_gets_no_weights_is_asked_again_after_a_while() -> None:
    world = World(options(devices=2), NAMES[:2])
    world.devices["box"].is_deaf_to_fetch = True
    world.turn_on("desk", "box")
    world.run(FETCH_SECONDS + 5)
    asked = [message for message in world.devices["box"].heard if isinstance(message, control.Fetch)]
    assert len(asked) == 2
    assert {source.name for source in asked[0].sources} == {"desk"}


def test_nothing_is_loaded_before_a_yes_and_no_ends_it() -> None:
    for word, state in (("yes", "ready"), ("no", None)):
        world = World(options(devices=2, needs_yes=True), NAMES[:2])
        world.turn_on(*NAMES[:2])
        world.run(5)
        assert world.cluster.state == "confirming"
        assert not world.epochs
        outcome, problem = events.ordered(world.cluster, Order(word), world.now)  # type: ignore[arg-type]
        assert problem is None
        world.take(outcome)
        world.run(3)
        assert (world.serving is not None) == (state == "ready")
        assert (world.ended is not None) == (state is None)


def test_the_head_waits_for_as_many_devices_as_it_was_told_to() -> None:
    world = World(options(devices=2), NAMES)
    world.turn_on("desk")
    world.run(60)
    assert world.cluster.state == "waiting"
    world.turn_on("pad")
    world.run(5)
    assert world.ring() == {"desk", "pad"}


def test_without_a_number_it_waits_a_moment_for_those_that_are_registered() -> None:
    world = World(options(), NAMES)
    world.turn_on("desk", "box")
    world.run(6)
    assert world.serving is None
    world.run(6)
    assert world.ring() == {"desk", "box"}


def test_the_plan_that_ran_last_runs_again_when_its_devices_are_there() -> None:
    before = running()
    world = World(options(devices=3), NAMES)
    world.cluster = world.cluster.having(remembered=before.cluster.plan)
    for name in NAMES:
        world.devices[name].holds = before.devices[name].holds
    world.turn_on("desk", "box")
    world.run(5)
    assert world.serving is None
    world.turn_on("pad")
    world.run(2)
    assert world.ring() == set(NAMES)
    assert world.cluster.planned == 0
    assert world.cluster.wire == "f32", "numbers stay what they are when it is planned anew"


def test_the_plan_that_ran_last_waits_for_as_many_devices_as_it_is_told_to() -> None:
    before = running()
    world = World(options(devices=4), (*NAMES, "tower"))
    world.cluster = world.cluster.having(remembered=before.cluster.plan)
    world.turn_on(*NAMES)
    world.run(30)
    assert world.serving is None
    world.turn_on("tower")
    world.run(5)
    assert world.ring() == {*NAMES, "tower"}


@pytest.mark.parametrize("is_remembered", [True, False])
def test_a_head_that_was_killed_waits_for_nobody_who_stays_away(is_remembered: bool) -> None:
    before = running()
    world = World(options(devices=3), NAMES)
    remembered = before.cluster.plan if is_remembered else None
    world.cluster = world.cluster.having(remembered=remembered, is_restart=True)
    world.turn_on("desk", "box")
    world.run(5)
    assert world.serving is None
    world.run(5)
    assert world.ring() == {"desk", "box"}
    world.turn_on("pad")
    world.run(10)
    assert world.ring() == set(NAMES)


@pytest.mark.parametrize(
    ("asked", "is_allowed"),
    [
        ({}, True),
        ({"devices": 3, "required": ("box",), "forbidden": ("tower",)}, True),
        ({"devices": 4}, False),
        ({"required": ("tower",)}, False),
        ({"forbidden": ("box",)}, False),
    ],
)
def test_an_earlier_plan_must_have_the_devices_that_are_asked_for(asked: dict[str, object], is_allowed: bool) -> None:
    plan = running().cluster.plan
    assert plan is not None
    assert allows(options(**asked), plan.report) == is_allowed


@pytest.mark.parametrize(("read_bytes", "pace"), [(0, (0, 0, 2, MOST_REPLAYED)), (1000, (512, 1, 1, 1))])
def test_where_a_device_reads_from_its_disk_the_ring_is_fed_in_few_steps(
    read_bytes: int, pace: tuple[int, int, int, int]
) -> None:
    world = running(sequences=2)
    plan = world.cluster.plan
    assert plan is not None
    *others, last = plan.report.devices
    devices = (*others, msgspec.structs.replace(last, read_bytes=read_bytes))
    report = msgspec.structs.replace(plan.report, devices=devices)
    cluster = world.cluster.having(plan=msgspec.structs.replace(plan, report=report))
    for name in NAMES:
        route = route_of(cluster, name)
        assert (route.chunk, route.ahead, route.groups, route.replay) == pace


def test_a_device_that_is_left_out_says_why() -> None:
    world = running()
    plan = world.cluster.plan
    assert plan is not None
    parts = {name: part for name, part in plan.parts.items() if name != "pad"}
    reason = "the others are faster without it"
    devices = tuple(
        msgspec.structs.replace(device, used=False, reason=reason) if device.name == "pad" else device
        for device in plan.report.devices
    )
    report = msgspec.structs.replace(plan.report, devices=devices)
    cluster = world.cluster.having(plan=msgspec.structs.replace(plan, parts=parts, report=report))
    shown = {name: device_status(cluster, cluster.device(name), Rates()).detail for name in NAMES}
    assert shown == {"desk": "", "box": "", "pad": reason}


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
    world = running()
    world.devices["box"].end()
    world.run(control.LOST_SECONDS + 3)
    world.cluster = events.busy(world.cluster, 1).cluster
    world.turn_on("box")
    world.run(10)
    assert world.ring() == {"desk", "pad"}
    world.cluster = events.busy(world.cluster, 0).cluster
    world.run(3)
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


def test_a_profile_that_no_device_can_have_leaves_its_device_out() -> None:
    world = World(options(devices=2), NAMES[:2])
    world.devices["box"].measured = msgspec.structs.replace(profile("box"), memory_bytes_per_s=float("nan"))
    world.turn_on("desk", "box")
    world.run(3)
    assert "memory_bytes_per_s" in world.cluster.device("box").problem


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


def test_replicas_go_to_disks_of_other_devices() -> None:
    world = running(replicas=2)
    world.run(10)
    middle = frozenset(range(1, LAYERS - 2))
    assert world.devices["box"].holds == middle
    assert world.devices["pad"].holds == middle


def test_a_better_plan_outlives_a_crash_of_the_present_one() -> None:
    world = running()
    world.devices["box"].end()
    world.run(control.LOST_SECONDS + 3)
    world.cluster = events.busy(world.cluster, 1).cluster
    world.turn_on("box")
    world.run(3)
    world.devices["pad"].crash()
    world.run(2)
    assert world.ring() == {"desk", "pad"}
    world.cluster = events.busy(world.cluster, 0).cluster
    world.run(3)
    assert world.ring() == set(NAMES)


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
    if world.ended is None:
        world.take(events.stuck(world.cluster, world.cluster.epoch, "the last one", world.now))
        world.run(60)
        assert world.ring() == set(NAMES), world.cluster
