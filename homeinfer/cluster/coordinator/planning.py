"""When a plan is made, and what becomes of it. Pure."""

from __future__ import annotations

import msgspec

from homeinfer.cluster.coordinator import placing
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.state import Cluster, MakePlan, Note, Outcome, RingPlan, names, usable
from homeinfer.cluster.coordinator.trust import plannable
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.report import PlanReport

_BETTER = 0.05
"""By so much a plan must be better for devices to load anew."""


def usable_names(cluster: Cluster, now: float) -> frozenset[str]:
    return names(usable(cluster, now))


def allows(options: ClusterOptions, report: PlanReport) -> bool:
    """Whether an earlier plan has the devices that are asked for now."""
    used = {window.device for window in report.windows}
    is_enough = len(report.devices) >= options.devices
    return is_enough and used.isdisjoint(options.forbidden) and used.issuperset(options.required)


def ask_for_plan(cluster: Cluster, now: float) -> Outcome:
    """Plan on all devices that are there and measured."""
    devices = [device for device in usable(cluster, now) if device.is_measured]
    profiles = tuple(
        msgspec.structs.replace(
            device.profile,
            name=device.name,
            memory_bytes=plannable(device.profile, device.stats, device.memory_share, is_given=device.is_given),
        )
        for device in devices
        if device.profile is not None
    )
    number = cluster.planned + 1
    asked = cluster.having(planning=number, planned=number, planned_at=now, basis=names(devices), tried="")
    return Outcome(asked, (MakePlan(number, _known_links(profiles), cluster.wire),))


def _known_links(profiles: tuple[DeviceProfile, ...]) -> tuple[DeviceProfile, ...]:
    """Without links to devices that are not in this plan."""
    there = {profile.name for profile in profiles}
    return tuple(
        msgspec.structs.replace(profile, links=tuple(link for link in profile.links if link.to in there))
        for profile in profiles
    )


def planned(cluster: Cluster, number: int, made: RingPlan | str, now: float) -> Outcome:
    """What the planner said: a plan, or why there is none."""
    if number != cluster.planning:
        return Outcome(cluster)
    cluster = cluster.having(planning=0)
    if isinstance(made, str):
        return _no_plan(cluster, made, now)
    if cluster.phase == "ready":
        return _compared(cluster, made, now)
    if cluster.phase != "planning":
        return Outcome(cluster)
    wire = made.report.workload.wire
    return placing.adopt(cluster.having(wire=wire), made, now)


def _no_plan(cluster: Cluster, why: str, now: float) -> Outcome:
    if cluster.phase == "ready":
        return Outcome(cluster.having(is_forced=False))
    waiting = cluster.having(phase="waiting", since=now, plan=None, tried=why)
    return Outcome(waiting, (Note(f"no plan: {why}; waiting for other devices", is_notice=True),))


def _compared(cluster: Cluster, made: RingPlan, now: float) -> Outcome:
    """A plan for more devices, or for less memory, while another one runs."""
    assert cluster.plan is not None
    is_other, is_forced = made.parts != cluster.plan.parts, cluster.is_forced
    is_better = is_forced or gain(made.report, cluster.plan.report) > _BETTER
    cluster = cluster.having(is_forced=False)
    if not is_other or not is_better:
        notes = (Note("planned anew: everything stays as it is"),) if is_forced else ()
        return Outcome(cluster.having(better=None), notes)
    return Outcome(cluster.having(better=made, better_since=now, is_urgent=is_forced))


def gain(new: PlanReport, old: PlanReport) -> float:
    """The share by which a plan is predicted to be better than another one."""
    match new.workload.objective:
        case "throughput":
            return new.predicted.tokens_per_s / max(old.predicted.tokens_per_s, 1e-9) - 1
        case "ttft":
            return 1 - new.predicted.ttft_ms / max(old.predicted.ttft_ms, 1e-9)
        case _:
            return 1 - new.predicted.tpot_ms / max(old.predicted.tpot_ms, 1e-9)
