"""How devices that are made up become a ring: who is waited for, what each is told, and whose plan it is."""

from __future__ import annotations

import msgspec
import pytest

from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.placing import FETCH_SECONDS
from homeinfer.cluster.coordinator.planning import allows
from homeinfer.cluster.coordinator.ring_plan import route_of
from homeinfer.cluster.coordinator.show import device_status
from homeinfer.cluster.coordinator.speed import Rates
from homeinfer.cluster.coordinator.state import Probing
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.client import Order
from homeinfer.engine.generate import MOST_REPLAYED
from tests.cluster.coordinator.world import LAYERS, NAMES, World, options, profile, running


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


def test_the_head_waits_for_devices_that_must_take_part() -> None:
    world = World(options(required=("pad",)), NAMES)
    world.turn_on("desk", "box")
    world.run(60)
    assert world.cluster.state == "waiting"
    world.turn_on("pad")
    world.run(5)
    assert world.ring() == set(NAMES)


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


def test_a_profile_that_no_device_can_have_leaves_its_device_out() -> None:
    world = World(options(devices=2), NAMES[:2])
    world.devices["box"].measured = msgspec.structs.replace(profile("box"), memory_bytes_per_s=float("nan"))
    world.turn_on("desk", "box")
    world.run(3)
    assert "memory_bytes_per_s" in world.cluster.device("box").problem


def test_the_head_is_reached_where_it_is_now() -> None:
    cluster = running().cluster
    before = cluster.device(cluster.head).host
    assert events.head_at(cluster, ("192.0.2.7", before)) == cluster
    assert events.head_at(cluster, ()) == cluster
    assert events.head_at(cluster, ("192.0.2.7", "192.0.2.8")).device(cluster.head).host == "192.0.2.7"


def test_a_device_that_took_over_a_name_is_measured_itself() -> None:
    world = running()
    before = world.cluster.device("box")
    hello = control.Hello(control.PROTOCOL, "1", "box", "10.0.0.9", weights_port=900)
    world.devices["box"].end()
    world.devices["box"].is_on = True
    world.take(events.connected(world.cluster, "n" * 40, "box", hello, "10.0.0.9", 99, world.now))
    after = world.cluster.device("box")
    assert before.profile is not None
    assert (after.key, after.profile) == ("n" * 40, None)
    assert [device.name for device in world.cluster.devices].count("box") == 1
    world.run(20)
    assert world.ring() == set(NAMES)


def test_what_nobody_asked_to_be_measured_counts_for_nothing() -> None:
    world = running()
    known = world.cluster.device("box").profile
    assert known is not None
    lie = control.Measured(world.cluster.model.manifest.digest, profile("box", 7))
    world.take(events.heard(world.cluster, "box", lie, world.now))
    assert world.cluster.device("box").profile == known


def test_a_device_that_never_says_what_it_holds_keeps_nobody_waiting() -> None:
    world = World(options(devices=2), NAMES)
    world.devices["pad"].is_mute = True
    world.turn_on("desk", "box", "pad")
    world.run(130)
    assert world.cluster.device("pad").problem == "it does not say what it holds of the model"
    assert world.ring() == {"desk", "box"}


def test_a_pause_of_the_head_is_no_silence_of_a_probe() -> None:
    world = World(options(devices=2), NAMES[:2])
    world.devices["box"].is_on = True
    probing = Probing(1, "desk", "box", world.now)
    cluster = world.cluster.having(probes=(probing,))
    assert events.woke(cluster, world.now + 100).probes == (Probing(1, "desk", "box", world.now + 100),)
