"""From a plan to a ring that runs: weights fetched, windows loaded, engines joined. And back to it when it broke.
Pure."""

from __future__ import annotations

import msgspec

from homeinfer.cluster.coordinator.measuring import FORGOTTEN
from homeinfer.cluster.coordinator.ring_plan import route_of
from homeinfer.cluster.coordinator.state import (
    Cluster,
    Command,
    DeviceView,
    End,
    Engine,
    Halt,
    KeepEpoch,
    KeepPlan,
    Note,
    Outcome,
    Recovery,
    RingPlan,
    Serve,
    Tell,
    names,
    usable,
)
from homeinfer.cluster.coordinator.trust import is_hopeless, memory_share, pause_after_crashes, recent_crashes
from homeinfer.cluster.coordinator.weights import missing, sources
from homeinfer.cluster.wire.control import Fetch, Load, Unload

JOIN_SECONDS = 8.0
"""An engine that is loaded joins in milliseconds; one that does not in so long hangs."""
LOAD_SECONDS = 120.0
"""A device that loads says how far it is every second; one that is silent about it for so long hangs."""
FETCH_SECONDS = 180.0
"""A device that fetches weights and says nothing of it for so long is asked again."""
_LESS_MEMORY = 0.85


def adopt(cluster: Cluster, plan: RingPlan, now: float) -> Outcome:
    """Take a plan: as soon as the user has said yes, once, where that was asked for."""
    if cluster.options.needs_yes and not cluster.agreed:
        return Outcome(cluster.having(plan=plan, phase="confirming", since=now))
    return begin(cluster, plan, now)


def begin(cluster: Cluster, plan: RingPlan, now: float) -> Outcome:
    """A new epoch, in which this plan is to run. Devices whose part is the same keep what they have loaded."""
    epoch = cluster.epoch + 1
    commands: list[Command] = [KeepEpoch(epoch)]
    for device in cluster.devices:
        if device.engine is not None and device.name not in plan.parts:
            cluster = cluster.with_device(device.name, engine=None, task="", share=None)
            commands += [Tell(device.name, Unload())] if device.is_alive else []
    left = tuple(device for device in cluster.devices if device.is_alive or device.problem != FORGOTTEN)
    cluster = cluster.having(devices=left)
    for name in plan.parts:
        cluster = cluster.with_device(name, moved=now)
    better = cluster.better if plan is cluster.plan else None
    begun = cluster.having(plan=plan, phase="placing", since=now, epoch=epoch, better=better, tried="")
    return Outcome(begun, tuple(commands))


def recover(cluster: Cluster, what: str, now: float, *, replan: bool) -> Outcome:
    """The ring broke, or has not come up: make it anew. what: why, for the user."""
    plan = cluster.plan
    if cluster.phase not in ("placing", "ready", "checking") or plan is None:
        return Outcome(cluster)
    was_ready = cluster.phase == "ready"
    commands: tuple[Command, ...] = (Halt(), Note(f"{what}: {_next_step(replan)}", is_notice=True)) if was_ready else ()
    before = cluster.recovery
    cluster = cluster.having(probes=(), suspects=()) if cluster.phase == "checking" else cluster
    if was_ready:
        cluster = cluster.having(recovery=Recovery(what, now, replan), recoveries=cluster.recoveries + 1)
    elif before is not None:
        cluster = cluster.having(recovery=Recovery(what, before.began, before.is_planned or replan))
    if replan:
        return Outcome(cluster.having(phase="measuring", since=now, planning=0, better=None), commands)
    return Outcome(cluster, commands).then(begin(cluster, plan, now))


def _next_step(replan: bool) -> str:
    return "planning anew" if replan else "joining the devices again"


def crashed(cluster: Cluster, name: str, why: str, now: float, *, is_memory: bool = False) -> Outcome:
    """A device's engine is gone: start it again, or leave the device out when that happens too often."""
    device = cluster.device(name)
    crashes = (*recent_crashes(device.crashes, now), now)
    share = memory_share(device.memory_share, device.crashes, now) * (_LESS_MEMORY if is_memory else 1.0)
    cluster = cluster.with_device(name, engine=None, crashes=crashes, memory_share=share, task="", share=None)
    if device.is_head and is_hopeless(crashes, now):
        ending = f"the engine of {name}, the head, ends again and again: {why}"
        return Outcome(cluster, (End(ending, is_problem=True),))
    pause = pause_after_crashes(crashes, now)
    if pause:
        cluster = cluster.with_device(name, shunned_until=now + pause)
    if name not in cluster.ring:
        return Outcome(cluster)
    is_left_out = pause > 0 and not device.is_head
    return recover(cluster, why, now, replan=is_left_out or is_memory)


def place(cluster: Cluster, now: float) -> Outcome:
    """One look at what the plan's devices still lack."""
    plan = cluster.plan
    assert plan is not None
    gone = set(plan.parts) - names(usable(cluster, now))
    if gone - {cluster.head}:
        return recover(cluster, f"{', '.join(sorted(gone))} left", now, replan=True)
    if gone:
        return Outcome(cluster)  # the head's own agent is being started again
    outcome = Outcome(cluster)
    for name, part in plan.parts.items():
        device = outcome.cluster.device(name)
        lacking = missing(device, plan.needs[name])
        if device.holds is None:
            continue
        if lacking:
            outcome = outcome.then(fetch(outcome.cluster, device, lacking, now))
        elif device.engine is None or device.engine.load_epoch != cluster.epoch:
            engine = Engine(part, load_epoch=cluster.epoch)
            told = outcome.cluster.with_device(name, engine=engine, moved=now, share=None)
            outcome = outcome.then(Outcome(told, (Tell(name, Load(cluster.epoch, part)),)))
        elif hung := _hung(device, now):
            ended = Outcome(outcome.cluster, (Tell(name, Unload()),))
            return outcome.then(ended).then(crashed(outcome.cluster, name, hung, now))
    return outcome.then(_join(outcome.cluster, now))


def _hung(device: DeviceView, now: float) -> str:
    """Why the engine is of no use, "" while it gets on."""
    engine, quiet = device.engine, now - device.moved
    if engine is None or engine.joined_epoch == engine.load_epoch:
        return ""
    if not engine.is_loaded and quiet > LOAD_SECONDS:
        return f"{device.name} has not loaded its layers and gets no further"
    if engine.is_loaded and engine.routed_epoch == engine.load_epoch and quiet > JOIN_SECONDS:
        return f"the engine of {device.name} does not answer"
    return ""


def fetch(cluster: Cluster, device: DeviceView, lacking: frozenset[int], now: float) -> Outcome:
    """Let a device get tensors that it lacks, unless it does already and gets on."""
    found = sources(cluster, device.name, lacking)
    is_at_it = device.fetching is not None and now - device.moved < FETCH_SECONDS
    if is_at_it or not found:
        return Outcome(cluster)
    asked = cluster.with_device(device.name, fetching=lacking, moved=now, share=None)
    message = Fetch(cluster.model.manifest.digest, tuple(sorted(lacking)), found, cluster.limit)
    return Outcome(asked, (Tell(device.name, message),))


def _join(cluster: Cluster, now: float) -> Outcome:
    assert cluster.plan is not None
    engines = {name: cluster.device(name).engine for name in cluster.plan.parts}
    if not all(e is not None and e.port and e.load_epoch == cluster.epoch for e in engines.values()):
        return Outcome(cluster)
    outcome = Outcome(cluster)
    for name, engine in engines.items():
        if engine is not None and engine.routed_epoch != cluster.epoch:
            route = route_of(cluster, name)
            routed = _with_engine(outcome.cluster, name, moved=now, routed_epoch=cluster.epoch)
            outcome = outcome.then(Outcome(routed, (Tell(name, route),)))
    if all(e is not None and e.is_loaded and e.joined_epoch == cluster.epoch for e in engines.values()):
        return outcome.then(_ready(outcome.cluster, now))
    return outcome


def _with_engine(cluster: Cluster, name: str, moved: float, **changes: int) -> Cluster:
    engine = cluster.device(name).engine
    assert engine is not None
    return cluster.with_device(name, moved=moved, engine=msgspec.structs.replace(engine, **changes))


def _ready(cluster: Cluster, now: float) -> Outcome:
    recovery = cluster.recovery
    ready = cluster.having(phase="ready", since=now, recovery=None)
    for name in cluster.ring:
        ready = ready.with_device(name, task="", share=None, detail="")
    n = len(cluster.ring)
    devices = f"{n} device{'s' if n > 1 else ''}"
    if recovery is None:
        return Outcome(ready, (Note(f"ready on {devices}"), KeepPlan(), Serve(cluster.epoch)))
    how = "re-planned on" if recovery.is_planned else "goes on with"
    text = f"{recovery.what}, {how} {devices}, {now - recovery.began:.1f} s"
    return Outcome(ready, (Note(text, is_notice=True), KeepPlan(), Serve(cluster.epoch)))
