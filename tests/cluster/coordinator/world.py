"""A cluster without machines: devices that answer as agents do, a clock that is a number. For the decisions alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from homeinfer.cluster.coordinator import events
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.planning import planned
from homeinfer.cluster.coordinator.ring_plan import ring_plan
from homeinfer.cluster.coordinator.settle import settle
from homeinfer.cluster.coordinator.state import (
    Cluster,
    Command,
    End,
    Halt,
    KeepEpoch,
    MakePlan,
    Model,
    Note,
    Outcome,
    RingPlan,
    Serve,
    Tell,
)
from homeinfer.cluster.planning.plan import Cause, Constraints, Workload
from homeinfer.cluster.planning.profile import DeviceProfile, Disk, Link, Network
from homeinfer.cluster.planning.report import PlannedDevice, PlannedModel, PlannedWindow, PlanReport, Predicted
from homeinfer.cluster.wire import control
from homeinfer.cluster.wire.control import FromAgent, FromHead, Manifest, ModelFile, ModelTensor, Part

DIGEST = "d" * 64
NAMES = ("desk", "box", "pad")
LAYERS = 8
MANIFEST = Manifest(
    DIGEST,
    (ModelFile("m.gguf", 1000 * LAYERS, 10, DIGEST),),
    tuple(ModelTensor(f"blk.{i}", 0, 1000 * i, 1000, DIGEST) for i in range(LAYERS)),
)


def profile(name: str, memory_bytes: int = 1_000_000, *, network: bool = True) -> DeviceProfile:
    return DeviceProfile(
        name, memory_bytes, 1, 1, 1e9, Disk(1e9, 1e9, 1e8, 1 << 40), network=Network(1e8, 1e-4) if network else None
    )


def even_plan(devices: Sequence[DeviceProfile], least: int = 1) -> RingPlan | str:
    """Layers 0 and the last two on the head, the others shared out; none when there are fewer devices than `least`."""
    if len(devices) < least:
        return f"{least} devices are needed"
    names = [device.name for device in devices]
    windows = [PlannedWindow(names[0], 0, 1, 0, 1, 0, "r")]
    middle, at = names[1:] or names[:1], 1
    for i, name in enumerate(middle):
        last = 1 + (LAYERS - 3) * (i + 1) // len(middle)
        if last > at:
            windows.append(PlannedWindow(name, at, last, 0, last - at, 0, "r" * (last - at)))
        at = last
    windows.append(PlannedWindow(names[0], at, LAYERS, 0, LAYERS - at, 0, "r" * (LAYERS - at)))
    report = PlanReport(
        version=1,
        model=PlannedModel("m", ("m.gguf",), DIGEST, "llama", LAYERS, 1000 * LAYERS),
        workload=Workload(n_ctx=256),
        constraints=Constraints(head=names[0]),
        windows=tuple(windows),
        rounds=1,
        predicted=Predicted(100.0 / len(names), 500.0, 10.0 * len(names), Cause()),
        devices=tuple(PlannedDevice(name, True, "", 1000, 1000, 2000) for name in names),
    )
    return ring_plan(report, DIGEST, lambda first, last: frozenset(range(first, last)))


class FakeDevice:
    """What an agent and its engine would do, a moment later."""

    def __init__(self, name: str, *, holds: frozenset[int] = frozenset()) -> None:
        self.name, self.holds = name, holds
        self.is_on = False
        self.is_hung = False
        self.is_walled = False
        self.is_mute = False
        self.is_deaf_to_fetch = False
        self.measured = profile("whatever", network=False)
        self.part: Part | None = None
        self.epoch = 0
        self.port = 1000
        self.says: list[FromAgent] = []
        self.heard: list[FromHead] = []
        self.stats = control.DeviceStats()

    def hear(self, message: FromHead) -> None:
        self.heard.append(message)
        if self.is_mute:
            return
        match message:
            case control.Know():
                self.says.append(control.Holds(DIGEST, tuple(sorted(self.holds)), 1 << 40))
            case control.Measure():
                self.says.append(control.Measured(DIGEST, self.measured))
            case control.Echo(number) if self.is_walled:
                self.says.append(control.Sorry("echo", "nothing comes", number))
            case control.Echo(number):
                self.says.append(control.Echoing(number, 5000))
            case control.Probe(number):
                self.says.append(control.Probed(number, Link(message.to, 1e8, 1e-4)))
            case control.Fetch(_, tensors, sources) if not self.is_deaf_to_fetch:
                there = {tensor for source in sources for tensor in source.tensors}
                self.holds |= frozenset(tensors) & there
                self.says.append(control.Holds(DIGEST, tuple(sorted(self.holds)), 1 << 40))
            case control.Load(epoch, part):
                self._load(epoch, part)
            case control.Route(epoch):
                if not self.is_hung and self.part is not None:
                    self.says.append(control.Joined(epoch))
            case control.Unload():
                self.part, self.is_hung = None, False

    def _load(self, epoch: int, part: Part) -> None:
        assert self.holds, "loads what it does not have"
        assert epoch >= self.epoch, "epochs go backwards"
        if part != self.part:
            self.part, self.port, self.is_hung = part, self.port + 1, False
        self.epoch = epoch
        self.says += [control.Listening(epoch, self.port), control.Loaded(epoch, 32, True)]

    def end(self) -> None:
        self.is_on, self.part, self.is_hung, self.says = False, None, False, []

    def crash(self, *, is_memory: bool = False) -> None:
        if self.part is not None:
            self.part, self.is_hung = None, False
            self.says.append(control.EngineGone(self.epoch, "it was killed", is_memory=is_memory))


class World:
    """Time, devices, and everything that the decisions led to."""

    def __init__(self, options: ClusterOptions, names: Sequence[str], *, least: int = 1, seed: int = 0) -> None:
        model = Model("m", "m.gguf", MANIFEST, 256, (100, 1000))
        self.now, self.least = 100.0, least
        self.random = random.Random(seed)
        self.cluster = Cluster(options, model, names[0], self.now, members=len(names) - 1, since=self.now)
        every = frozenset(range(LAYERS))
        self.devices = {name: FakeDevice(name, holds=every if i == 0 else frozenset()) for i, name in enumerate(names)}
        self.epochs: list[int] = []
        self.serving: int | None = None
        self.notes: list[str] = []
        self.ended: str | None = None
        self.plans: list[MakePlan] = []
        self.is_planning_slow = False
        self._connections = 0

    def turn_on(self, *names: str) -> None:
        for name in names:
            device = self.devices[name]
            device.is_on = True
            self.hello(name)

    def hello(self, name: str) -> None:
        """The device connects, for the first time or again."""
        device = self.devices[name]
        device.says = []
        self._connections += 1
        engine = control.EngineStatus(device.part, device.port, 32, True) if device.part is not None else None
        hello = control.Hello(control.PROTOCOL, "1", name, "10.0.0.1", weights_port=900, engine=engine)
        self.take(
            events.connected(self.cluster, name.ljust(40, "k"), name, hello, "10.0.0.1", self._connections, self.now)
        )

    def take(self, outcome: Outcome) -> None:
        self.cluster = outcome.cluster
        self._perform(outcome.commands)
        further = settle(self.cluster, self.now)
        self.cluster = further.cluster
        self._perform(further.commands)

    def _perform(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Tell(name, message):
                    device = self.devices.get(name)
                    if device is not None and device.is_on:
                        device.hear(message)
                case KeepEpoch(epoch):
                    assert not self.epochs or epoch > self.epochs[-1]
                    self.epochs.append(epoch)
                case Halt():
                    self.serving = None
                case Serve(epoch):
                    self._check_ring(epoch)
                    self.serving = epoch
                case MakePlan():
                    self.plans.append(command)
                case Note(text):
                    self.notes.append(text)
                case End(reason):
                    self.ended = reason

    def _check_ring(self, epoch: int) -> None:
        """Whoever is served by has said that it is there."""
        assert self.cluster.plan is not None
        assert epoch == self.epochs[-1]
        for name in self.cluster.plan.parts:
            engine = self.cluster.device(name).engine
            assert engine is not None
            assert engine.joined_epoch == epoch

    def step(self, seconds: float = 0.2) -> None:
        """A moment passes: signs of life, what devices had to say, plans."""
        self.now += seconds
        for name, device in self.devices.items():
            if device.is_on:
                self.take(events.heard(self.cluster, name, control.Beat(device.stats), self.now))
                said, device.says = device.says, []
                for message in said:
                    self.take(events.heard(self.cluster, name, message, self.now))
        plans, self.plans = ([], self.plans) if self.is_planning_slow else (self.plans, [])
        for plan in plans:
            made = even_plan(plan.devices, self.least)
            self.take(planned(self.cluster, plan.number, made, self.now))
        self.take(events.silent(self.cluster, self.now))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def ring(self) -> set[str]:
        """The devices that serve now."""
        return set(self.cluster.ring) if self.serving is not None else set()


def options(**changes: object) -> ClusterOptions:
    return msgspec.structs.replace(ClusterOptions("m.gguf"), **changes)


def back_in_mid_answer(name: str) -> World:
    """Three devices of which one was gone, and is there again while an answer is written by the others."""
    world = running()
    world.devices[name].end()
    world.run(control.LOST_SECONDS + 3)
    world.cluster = events.busy(world.cluster, 1).cluster
    world.turn_on(name)
    return world


def running(**changes: object) -> World:
    """Three devices that serve."""
    world = World(options(devices=3, **changes), NAMES)
    world.turn_on(*NAMES)
    world.run(5)
    assert world.ring() == set(NAMES)
    return world
