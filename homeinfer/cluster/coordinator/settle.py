"""What is to be done next: one look at the whole state, after every event and a few times a second. Pure."""

from __future__ import annotations

from homeinfer.cluster.coordinator import checking, improving, measuring, placing
from homeinfer.cluster.coordinator.planning import ask_for_plan, has_more_memory, usable_names
from homeinfer.cluster.coordinator.state import Cluster, Outcome, RingPlan, usable

KNOWN_SECONDS = 8.0
"""How long the head waits for devices that are registered, where nobody said how long."""
_REMEMBERED_SECONDS = 8.0
"""How long for the devices of the plan that ran last, which then runs again as it was; and how long at most for any
after the head was killed."""
_ROUNDS = 8


def settle(cluster: Cluster, now: float) -> Outcome:
    """Everything that can be done now. Comes to rest: settling twice does nothing the second time."""
    outcome = Outcome(cluster)
    for _ in range(_ROUNDS):
        further = _once(outcome.cluster, now)
        outcome = outcome.then(further)
        if not further.commands and further.cluster == cluster:
            break
        cluster = further.cluster
    return outcome


def _once(cluster: Cluster, now: float) -> Outcome:
    outcome = measuring.introduce(cluster, now)
    match outcome.cluster.phase:
        case "waiting":
            return outcome.then(_wait(outcome.cluster, now))
        case "measuring":
            return outcome.then(_measure(outcome.cluster, now))
        case "planning":
            return outcome.then(_replan_when_changed(outcome.cluster, now))
        case "confirming":
            return outcome.then(_reconsider(outcome.cluster, now))
        case "placing":
            return outcome.then(placing.place(outcome.cluster, now))
        case "checking":
            return outcome.then(checking.look(outcome.cluster, now))
        case "ready":
            return outcome.then(improving.improve(outcome.cluster, now))
        case _:
            return outcome


def _wait(cluster: Cluster, now: float) -> Outcome:
    if not cluster.model.manifest.digest:
        return Outcome(cluster)  # the model is being read
    remembered = cluster.remembered
    is_full = cluster.is_restart or len(usable_names(cluster, now)) >= cluster.options.devices
    if remembered is not None and is_full and _can_run(cluster, remembered, now):
        wire = remembered.report.workload.wire
        known = cluster.having(remembered=None, basis=frozenset(remembered.parts), wire=wire)
        return placing.adopt(known, remembered, now)
    if remembered is not None and now - cluster.began < _REMEMBERED_SECONDS:
        return Outcome(cluster)
    measured = frozenset(device.name for device in usable(cluster, now) if device.is_measured)
    if cluster.tried and measured == cluster.basis and not has_more_memory(cluster, measured, now):
        return Outcome(cluster)  # the same devices as when nothing could be made of them, with as little memory
    if not _may_start(cluster, now):
        return Outcome(cluster)
    return Outcome(cluster.having(phase="measuring", since=now, remembered=None))


def _can_run(cluster: Cluster, plan: RingPlan, now: float) -> bool:
    there = {device.name: device for device in usable(cluster, now)}
    return all(name in there and there[name].is_measured for name in plan.parts)


def _may_start(cluster: Cluster, now: float) -> bool:
    """Whether enough devices are there to make a plan."""
    there, options, waited = usable_names(cluster, now), cluster.options, now - cluster.began
    if cluster.head not in there:
        return False
    if cluster.tried or cluster.recovery is not None:
        return True
    if cluster.is_restart and waited >= _REMEMBERED_SECONDS:
        return True
    if not there.issuperset(options.required):
        return False
    if options.devices:
        return len(there) >= options.devices
    if options.wait_seconds:
        return waited >= options.wait_seconds or len(there) > cluster.members > 0
    return len(there) > cluster.members or waited >= KNOWN_SECONDS


def _measure(cluster: Cluster, now: float) -> Outcome:
    there = usable(cluster, now)
    if cluster.head not in {device.name for device in there}:
        return Outcome(cluster)
    if cluster.recovery is not None:  # an answer waits: whoever is new here comes in later
        return ask_for_plan(cluster.having(phase="planning", since=now), now)
    if not all(device.is_measured for device in there):
        return Outcome(cluster)
    linked = measuring.link(cluster, now)
    if linked.commands or linked.cluster.probes:
        return linked
    return linked.then(ask_for_plan(linked.cluster.having(phase="planning", since=now), now))


def _replan_when_changed(cluster: Cluster, now: float) -> Outcome:
    """A plan with a device that is gone is no plan; one without a device that has come is, for now."""
    if cluster.basis <= usable_names(cluster, now):
        return Outcome(cluster)
    return Outcome(cluster.having(phase="measuring", since=now, planning=0))


def _reconsider(cluster: Cluster, now: float) -> Outcome:
    there = usable(cluster, now)
    measured = frozenset(device.name for device in there if device.is_measured)
    if measured == cluster.basis or cluster.head not in measured:
        return Outcome(cluster)
    return Outcome(cluster.having(phase="measuring", since=now))
