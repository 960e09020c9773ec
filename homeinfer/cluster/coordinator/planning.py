"""When a plan is made, and what becomes of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from homeinfer.cluster.coordinator import placing
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.state import Cluster, DeviceView, MakePlan, Note, Outcome, RingPlan, names, usable
from homeinfer.cluster.coordinator.trust import bearable, memory_share, plannable
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.report import PlanReport

BETTER = 0.05
"""By so much a plan must be better for devices to load anew."""
_MORE = 1.1
"""Times the memory that was planned with, from which on there may be another plan."""


def usable_names(cluster: Cluster, now: float) -> frozenset[str]:
    return names(usable(cluster, now))


def allows(options: ClusterOptions, report: PlanReport) -> bool:
    """Whether an earlier plan has the devices and rounds that are asked for now."""
    used = {window.device for window in report.windows}
    is_enough = len(report.devices) >= options.devices
    is_as_wanted = report.constraints.rounds == options.rounds
    return is_enough and is_as_wanted and used.isdisjoint(options.forbidden) and used.issuperset(options.required)


def ask_for_plan(cluster: Cluster, now: float) -> Outcome:
    """Plan on all devices that are there and measured."""
    devices = [device for device in usable(cluster, now) if device.is_measured]
    profiles = tuple(
        msgspec.structs.replace(
            device.profile,
            name=device.name,
            memory_bytes=memory_now(cluster, device, device.profile, now),
        )
        for device in devices
        if device.profile is not None
    )
    for profile in profiles:
        cluster = cluster.with_device(profile.name, planned_bytes=profile.memory_bytes)
    number = cluster.planned + 1
    asked = cluster.having(planning=number, planned=number, planned_at=now, basis=names(devices), tried="")
    return Outcome(asked, (MakePlan(number, known_links(profiles), cluster.wire),))


def memory_now(cluster: Cluster, device: DeviceView, profile: DeviceProfile, now: float) -> int:
    """Bytes of a device to plan with: for one that runs, what leaves other programs what is to stay free."""
    share = memory_share(device.memory_share, device.crashes, now)
    memory = plannable(profile, device.stats, share, is_given=device.is_given)
    planned = cluster.plan.report.devices if cluster.plan is not None else ()
    held = next((each.memory_bytes for each in planned if each.name == device.name and each.used), 0)
    if device.is_given or not held or not device.stats.total_bytes:
        return memory
    return min(memory, bearable(held, profile, device.stats, cluster.options.headroom))


def has_more_memory(cluster: Cluster, names: Iterable[str], now: float) -> bool:
    """Whether one of these devices has much more memory than was planned with last."""
    devices = [device for device in map(cluster.get, names) if device is not None]
    return any(
        memory_now(cluster, device, device.profile, now) > _MORE * device.planned_bytes > 0
        for device in devices
        if device.profile is not None
    )


def known_links(profiles: tuple[DeviceProfile, ...]) -> tuple[DeviceProfile, ...]:
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
    if cluster.phase in ("ready", "placing", "checking"):  # a ring runs, or is being joined again
        return _no_other(cluster, made) if isinstance(made, str) else _compared(cluster, made, now)
    if cluster.phase != "planning":
        return Outcome(cluster)
    if isinstance(made, str):
        return _no_plan(cluster, made, now)
    wire = made.report.workload.wire
    return placing.adopt(cluster.having(wire=wire), made, now)


def _no_other(cluster: Cluster, why: str) -> Outcome:
    notes = (Note(f"planned anew: everything stays as it is, since {why}"),) if cluster.is_forced else ()
    return Outcome(cluster.having(is_forced=False), notes)


def _no_plan(cluster: Cluster, why: str, now: float) -> Outcome:
    waiting = cluster.having(phase="waiting", since=now, plan=None, tried=why)
    return Outcome(waiting, (Note(f"no plan: {why}; waiting for other devices", is_notice=True),))


def _compared(cluster: Cluster, made: RingPlan, now: float) -> Outcome:
    """A plan for more devices, or for less memory, while another one runs."""
    assert cluster.plan is not None
    is_other, is_forced = made.parts != cluster.plan.parts, cluster.is_forced
    is_better = is_forced or gain(made.report, cluster.plan.report) > BETTER
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
