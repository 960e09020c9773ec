"""What the coordinator knows, as frozen data, and what it may want done. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.planning.plan import Wire
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import ClusterState
from homeinfer.cluster.wire.control import DeviceStats, FromHead, Manifest, Neighbour, Part

Phase = Literal["waiting", "measuring", "planning", "confirming", "placing", "ready", "checking", "stopping"]


class Engine(msgspec.Struct, frozen=True):
    """A device's engine as far as it is known. port 0: it doesn't listen yet. load_epoch, joined_epoch: for which
    epochs it was told to load, and has joined."""

    part: Part
    port: int = 0
    is_loaded: bool = False
    n_vocab: int = 0
    can_shift: bool = False
    load_epoch: int = 0
    routed_epoch: int = 0
    joined_epoch: int = 0


class DeviceView(msgspec.Struct, frozen=True):
    """One registered device. connection: number of its present connection, 0 while there is none. heard: when it last
    said something; moved: when its present task last got on. holds: numbers of the tensors on its disk, None: not
    said yet. fetching: what it was asked to get. problem: why it can't be used; it is asked again after a while.
    shunned_until: it was lost or crashed too often. memory_share: how much of its memory may be planned with;
    planned_bytes: what was planned with last."""

    name: str
    key: str
    is_head: bool = False
    connection: int = 0
    heard: float = 0.0
    moved: float = 0.0
    host: str = ""
    weights_port: int = 0
    knows: bool = False
    holds: frozenset[int] | None = None
    disk_free_bytes: int = 0
    fetching: frozenset[int] | None = None
    fetch_failures: int = 0
    profile: DeviceProfile | None = None
    is_given: bool = False
    measuring: bool = False
    engine: Engine | None = None
    problem: str = ""
    problem_before: str = ""
    losses: tuple[float, ...] = ()
    crashes: tuple[float, ...] = ()
    shunned_until: float = 0.0
    memory_share: float = 1.0
    planned_bytes: int = 0
    pressed_since: float = 0.0
    task: str = ""
    share: float | None = None
    detail: str = ""
    stats: DeviceStats = DeviceStats()
    has_left: bool = False

    @property
    def is_alive(self) -> bool:
        return self.connection > 0

    @property
    def is_measured(self) -> bool:
        return self.holds is not None and self.profile is not None


class RingPlan(msgspec.Struct, frozen=True):
    """A plan with what each of its devices loads and needs for that. hops: (device, its window) in layer order."""

    report: PlanReport
    parts: Mapping[str, Part]
    needs: Mapping[str, frozenset[int]]
    hops: tuple[tuple[str, int], ...]


class Probing(msgspec.Struct, frozen=True):
    """A link that is being timed, from one device to another; is_check: to see whether it carries anything. is_open:
    the other end is, so that whatever is wrong is what `here` says, or does not say, of `there`."""

    id: int
    here: str
    there: str
    since: float
    is_check: bool = False
    is_open: bool = False


class Recovery(msgspec.Struct, frozen=True):
    """Why a ring that ran is being made anew, and since when. is_planned: with another plan."""

    what: str
    began: float
    is_planned: bool = False


class Model(msgspec.Struct, frozen=True):
    """The cluster's model. sizes: bytes of a hidden state, and of a prefill chunk's."""

    name: str
    path: str
    manifest: Manifest
    n_ctx: int
    sizes: tuple[int, int]


class Cluster(msgspec.Struct, frozen=True):
    """Everything that decisions are made from. members: how many devices are registered beside the head. basis: the
    devices that the present plan, or the last trial to make one, could choose from. tried: why nothing could be made of
    them. planning: number of the plan that is being made, 0 for none. better: a plan to change to when no answer is
    being written. answering: answers under way. agreed: the user has said yes. unlinked: pairs whose link couldn't be
    timed; suspects: the checks over which nothing came now; disputes: those of late whose other end was open.
    is_restart: the head was killed, or ended while it wrote
    answers: whoever waits for those shall not wait for devices that stay away."""

    options: ClusterOptions
    model: Model
    head: str
    began: float
    members: int = 0
    devices: tuple[DeviceView, ...] = ()
    phase: Phase = "waiting"
    since: float = 0.0
    epoch: int = 0
    plan: RingPlan | None = None
    basis: frozenset[str] = frozenset()
    tried: str = ""
    planning: int = 0
    planned: int = 0
    planned_at: float = 0.0
    is_forced: bool = False
    better: RingPlan | None = None
    better_since: float = 0.0
    is_urgent: bool = False
    remembered: RingPlan | None = None
    agreed: bool = False
    answering: int = 0
    is_restart: bool = False
    recovery: Recovery | None = None
    recoveries: int = 0
    probes: tuple[Probing, ...] = ()
    probed: int = 0
    unlinked: frozenset[tuple[str, str]] = frozenset()
    suspects: tuple[Probing, ...] = ()
    disputes: tuple[Probing, ...] = ()
    wire: Wire | None = None
    limit: int = 0
    ring_head: Neighbour = Neighbour("")

    def get(self, name: str) -> DeviceView | None:
        return next((device for device in self.devices if device.name == name), None)

    def device(self, name: str) -> DeviceView:
        return next(device for device in self.devices if device.name == name)

    def with_device(self, name: str, **changes: Any) -> Cluster:
        devices = tuple(msgspec.structs.replace(d, **changes) if d.name == name else d for d in self.devices)
        return msgspec.structs.replace(self, devices=devices)

    def having(self, **changes: Any) -> Cluster:
        return msgspec.structs.replace(self, **changes)

    @property
    def ring(self) -> tuple[str, ...]:
        """The devices of the plan."""
        return tuple(self.plan.parts) if self.plan is not None else ()

    @property
    def state(self) -> ClusterState:
        """What users are shown."""
        if self.recovery is not None and self.phase in ("measuring", "planning", "placing", "waiting"):
            return "recovering"
        if self.phase == "checking":
            return "recovering"
        return "loading" if self.phase == "placing" else self.phase


class Tell(msgspec.Struct, frozen=True):
    device: str
    message: FromHead


class MakePlan(msgspec.Struct, frozen=True):
    """Plan on these devices, the head first; answered by `planned` with the number. wire None: choose one."""

    number: int
    devices: tuple[DeviceProfile, ...]
    wire: Wire | None


class KeepEpoch(msgspec.Struct, frozen=True):
    """Have the number on disk before anybody hears of it."""

    epoch: int


class KeepProfile(msgspec.Struct, frozen=True):
    device: str


class KeepPlan(msgspec.Struct, frozen=True):
    """The plan has proved itself: take it again after a restart."""


class Halt(msgspec.Struct, frozen=True):
    """The ring is of no use now: answers under way wait to be asked again."""


class Serve(msgspec.Struct, frozen=True):
    """The ring of this epoch is ready: ask it for answers."""

    epoch: int


class Note(msgspec.Struct, frozen=True):
    """A line for the user. is_notice: also for those who wait for an answer."""

    text: str
    is_notice: bool = False


class End(msgspec.Struct, frozen=True):
    """The cluster ends. is_problem: nobody asked for that."""

    reason: str
    is_problem: bool = False


Command = Tell | MakePlan | KeepEpoch | KeepProfile | KeepPlan | Halt | Serve | Note | End


class Outcome(NamedTuple):
    """The new state and what is to be done, in this order."""

    cluster: Cluster
    commands: tuple[Command, ...] = ()

    def then(self, following: Outcome) -> Outcome:
        """Both, one after the other; `following` was made from this one's state."""
        return Outcome(following.cluster, (*self.commands, *following.commands))


def usable(cluster: Cluster, now: float) -> tuple[DeviceView, ...]:
    """The devices that a plan may use, the head first."""
    found = [
        device
        for device in cluster.devices
        if device.is_alive
        and not device.problem
        and (now >= device.shunned_until or device.is_head)
        and device.name not in cluster.options.forbidden
    ]
    return tuple(sorted(found, key=lambda device: (not device.is_head, device.name)))


def names(devices: Iterable[DeviceView]) -> frozenset[str]:
    return frozenset(device.name for device in devices)
