"""Which links carry nothing: what devices say of one of them is no word of the others, nor always true."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.checking import at_fault
from homeinfer.cluster.coordinator.state import Probing
from homeinfer.cluster.wire import control
from tests.cluster.coordinator.world import World, options, running
from tests.support.scripted_head import HERE, a_head, agent_options, an_agent

HOME = ("desk", "box", "lap", "pad", "tower")


def silence(world: World) -> None:
    world.take(events.stuck(world.cluster, world.cluster.epoch, "the ring was silent", world.now))


@pytest.mark.parametrize(("about", "left"), [("probe", {1, 2}), ("echo", {2, 3})])
def test_what_a_device_cannot_do_for_one_probe_is_no_word_of_its_others(about: str, left: set[int]) -> None:
    world = running()
    probes = (Probing(1, "desk", "box", world.now), Probing(2, "box", "pad", world.now), Probing(3, "box", "pad", 0.0))
    cluster = world.cluster.having(probes=probes)
    number = 3 if about == "probe" else 1
    said = control.from_agent(control.encode(control.Sorry(about, "no", number)))
    assert {probe.id for probe in events.heard(cluster, "box", said, world.now).cluster.probes} == left
    other = control.Sorry(about, "no", 9)
    assert events.heard(cluster, "box", other, world.now).cluster.probes == probes
    assert events.heard(cluster, "lap", said, world.now).cluster.probes == probes


def test_a_device_of_before_that_does_not_say_which_probe_means_all_of_its_own() -> None:
    world = running()
    probes = (Probing(1, "desk", "box", world.now), Probing(2, "box", "pad", world.now), Probing(3, "box", "pad", 0.0))
    old = control.from_agent(control.encode({"type": "sorry", "about": "probe", "reason": "no"}))  # type: ignore[arg-type]
    after = events.heard(world.cluster.having(probes=probes), "box", old, world.now).cluster
    assert {probe.id for probe in after.probes} == {1}


def test_a_real_device_says_which_probe_it_could_not_make(tmp_path: Path) -> None:
    async def test() -> None:
        async with a_head(tmp_path / "head") as head, an_agent(agent_options(head, tmp_path / "desk")):
            await head.expect(control.Hello)
            no_key = "~" * 40
            head.say(control.Probe(7, "lap", HERE, 1, no_key, (256, 1024), 0.0))
            sorry = await head.expect(control.Sorry)
            assert (sorry.about, sorry.id) == ("probe", 7)

    asyncio.run(asyncio.wait_for(test(), 120))


def checks(*links: tuple[str, str]) -> tuple[Probing, ...]:
    return tuple(Probing(number, here, there, 0.0, True, True) for number, (here, there) in enumerate(links))


def test_who_is_at_fault_explains_what_was_said_of_late_too() -> None:
    def blamed(silent: tuple[str, str], *before: tuple[str, str]) -> tuple[str, ...]:
        return at_fault(checks(silent), checks(silent, *before), "desk")

    assert blamed(("box", "pad")) == ("pad",)
    assert blamed(("box", "pad"), ("box", "lap")) == ("box",)
    assert blamed(("pad", "box"), ("lap", "box")) == ("box",)
    assert blamed(("box", "desk")) == blamed(("desk", "box")) == ("box",)
    assert blamed(("box", "pad"), ("lap", "tower")) == ("pad",)
    assert at_fault((), checks(("box", "pad")), "desk") == ()


class Slanderer:
    """A ring of five whose box swallows steps, and says that whoever comes after it does not answer."""

    def __init__(self) -> None:
        self.world = World(options(devices=5), HOME)
        self.world.turn_on(*HOME)
        self.world.run(5)

    def accuse(self) -> str:
        """The device that loses its place for it."""
        world, before = self.world, self.world.ring()
        assert world.cluster.plan is not None
        owners = [owner for owner, _ in world.cluster.plan.hops]
        victim = owners[owners.index("box") + 1]
        silence(world)
        (probe,) = [each for each in world.cluster.probes if (each.here, each.there) == ("box", victim)]
        box = world.devices["box"]
        box.is_mute = True  # its own answers are made here
        world.step()
        box.is_mute = False
        world.take(events.heard(world.cluster, "box", control.Sorry("probe", "nothing", probe.id), world.now))
        for each in world.cluster.probes:  # it is open to others, and reaches those that it does not accuse
            if each.there == "box":
                world.take(events.heard(world.cluster, "box", control.Echoing(each.id, 5000), world.now))
        world.run(12)
        (lost,) = before - world.ring()
        return lost


def test_a_device_that_accuses_one_after_the_other_loses_its_own_place() -> None:
    slanderer = Slanderer()
    first = slanderer.accuse()
    assert first not in ("box", "desk")
    assert slanderer.accuse() == "box"
    world = slanderer.world
    assert any(note.startswith("box can't reach ") and first in note for note in world.notes)
    world.run(100)
    assert world.ring() == set(HOME) - {"box"}
    world.run(20)
    assert world.ring() == set(HOME)
    assert slanderer.accuse() == "box"


def test_a_link_that_carries_again_is_held_against_nobody() -> None:
    world = running()
    world.cluster = world.cluster.having(disputes=checks(("pad", "box"), ("box", "lap")))
    silence(world)
    world.run(3)
    assert [(each.here, each.there) for each in world.cluster.disputes] == [("box", "lap")]
