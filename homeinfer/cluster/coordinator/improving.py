"""What a ring that runs does besides: better plans for devices that came, less memory where it is short, copies of
weights on other disks. Pure."""

from __future__ import annotations

from homeinfer.cluster.coordinator.measuring import link
from homeinfer.cluster.coordinator.placing import begin, fetch, recover
from homeinfer.cluster.coordinator.planning import ask_for_plan, has_more_memory
from homeinfer.cluster.coordinator.state import Cluster, Halt, Note, Outcome, Recovery, RingPlan, names, usable
from homeinfer.cluster.coordinator.weights import missing, replica_wants

_CALM = 1.0
"""Seconds after the ring came up before anything else is tried."""
_PRESSED_SECONDS, _PLANS_APART = 1.0, 60.0
_LONGEST_WAIT = 120.0
"""Seconds that a better plan waits for a moment without answers."""


def improve(cluster: Cluster, now: float) -> Outcome:
    gone = set(cluster.ring) - names(usable(cluster, now))
    if gone:
        return recover(cluster, f"{', '.join(sorted(gone))} left", now, replan=gone != {cluster.head})
    if now - cluster.since < _CALM:
        return Outcome(cluster)
    if cluster.better is not None:
        return _change(cluster, now)
    if cluster.planning:
        return Outcome(cluster)
    there = frozenset(
        device.name
        for device in usable(cluster, now)
        if device.is_measured or (device.name in cluster.basis and device.profile is not None)
    )
    if there - cluster.basis:
        linked = link(cluster, now)
        if linked.commands or linked.cluster.probes:
            return linked
        return ask_for_plan(linked.cluster, now)
    cluster = cluster.having(basis=cluster.basis & there)
    if _is_pressed(cluster, now):
        return ask_for_plan(cluster.having(is_forced=True), now)
    if _is_relieved(cluster, now):
        return ask_for_plan(cluster, now)
    return _copy(cluster, now)


def _is_pressed(cluster: Cluster, now: float) -> bool:
    pressed = [device for device in cluster.devices if device.name in cluster.ring and device.pressed_since]
    lasts = any(now - device.pressed_since > _PRESSED_SECONDS for device in pressed)
    return lasts and now - cluster.planned_at > _PLANS_APART


def _is_relieved(cluster: Cluster, now: float) -> bool:
    """Whether a device has memory again that it lacked when the plan was made."""
    return now - cluster.planned_at > _PLANS_APART and has_more_memory(cluster, cluster.ring, now)


def _change(cluster: Cluster, now: float) -> Outcome:
    """To the better plan, when its devices have what they need and no answer is under way."""
    better = cluster.better
    assert better is not None
    if not set(better.parts) <= names(usable(cluster, now)):
        return Outcome(cluster.having(better=None))
    outcome, lacks = Outcome(cluster), False
    for name, needs in better.needs.items():
        device = outcome.cluster.device(name)
        lacking = missing(device, needs)
        if lacking:
            lacks = True
            outcome = outcome.then(fetch(outcome.cluster, device, lacking, now))
    waits = cluster.answering > 0 and not cluster.is_urgent and now - cluster.better_since < _LONGEST_WAIT
    if lacks or waits:
        return outcome
    what = _why(cluster, better)
    cluster = cluster.having(recovery=Recovery(what, now, is_planned=True))
    return Outcome(cluster, (Halt(), Note(f"{what}: loading anew", is_notice=True))).then(begin(cluster, better, now))


def _why(cluster: Cluster, better: RingPlan) -> str:
    came = set(better.parts) - set(cluster.ring)
    if came:
        return f"{', '.join(sorted(came))} joined"
    short = [device.name for device in cluster.devices if device.name in cluster.ring and device.pressed_since]
    if short and cluster.is_urgent:
        return f"other programs need memory of {', '.join(sorted(short))}"
    return "there is a better plan"


def _copy(cluster: Cluster, now: float) -> Outcome:
    outcome = Outcome(cluster)
    if cluster.options.replicas < 2 or any(device.fetching is not None for device in cluster.devices):
        return outcome
    for name, tensors in replica_wants(cluster).items():
        if cluster.device(name).fetch_failures == 0:
            outcome = outcome.then(fetch(outcome.cluster, outcome.cluster.device(name), tensors, now))
    return outcome
