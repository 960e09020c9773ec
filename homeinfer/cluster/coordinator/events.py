"""What happened, taken into the state. What follows from it is settle's to say, but for what can't wait. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from homeinfer import __version__
from homeinfer.cluster.coordinator import measuring
from homeinfer.cluster.coordinator.checking import CHECK_SIZES, check_links, left_out
from homeinfer.cluster.coordinator.placing import begin, crashed, recover
from homeinfer.cluster.coordinator.planning import ask_for_plan
from homeinfer.cluster.coordinator.state import (
    Cluster,
    Command,
    DeviceView,
    End,
    Engine,
    KeepProfile,
    Note,
    Outcome,
    Tell,
)
from homeinfer.cluster.coordinator.trust import checked_profile, is_pressed, pause_after_losses, recent_losses
from homeinfer.cluster.planning.profile import DeviceProfile, Link
from homeinfer.cluster.wire.client import Order
from homeinfer.cluster.wire.control import (
    LOST_SECONDS,
    PROTOCOL,
    Allow,
    Beat,
    Bye,
    DeviceStats,
    Echoing,
    EngineGone,
    EngineStatus,
    FromAgent,
    Hello,
    Holds,
    Joined,
    Listening,
    Loaded,
    Measured,
    Probe,
    Probed,
    Progress,
    Refuse,
    Sorry,
    Welcome,
)
from homeinfer.errors import HomeinferError

_MOST_FETCHES = 3


def connected(cluster: Cluster, key: str, name: str, hello: Hello, host: str, connection: int, now: float) -> Outcome:
    """A registered device said hello. host: where others reach it."""
    before = cluster.get(name)
    if before is None or before.key != key:  # another device has its name now
        others = tuple(device for device in cluster.devices if device.name != name)
        new = DeviceView(name, key, is_head=name == cluster.head)
        if before is not None:
            new = msgspec.structs.replace(new, connection=before.connection, engine=before.engine)
        before = _given(cluster, new)
        cluster = cluster.having(devices=(*others, before))
    engine = _same_engine(before, hello.engine, host)
    losses = recent_losses(before.losses, now)
    pause = pause_after_losses(losses, now) if not before.is_alive else 0.0
    cluster = cluster.with_device(
        name, key=key, connection=connection, heard=now, moved=now, host=host, weights_port=hello.weights_port,
        knows=False, holds=None, fetching=None, fetch_failures=0, measuring=False, problem="", engine=engine,
        losses=losses, shunned_until=max(before.shunned_until, now + pause if pause else 0.0), task="", share=None,
        detail="", has_left=False, pressed_since=0.0,
    )  # fmt: skip
    outcome = Outcome(cluster, (Tell(name, Welcome(name)), *_allow(cluster)))
    if before.connection == 0 and not before.is_head:
        outcome = outcome.then(Outcome(cluster, (Note(f"{name} is here"),)))
    was_engine = before.engine is not None and cluster.phase in ("placing", "ready", "checking")
    if was_engine and engine is None and name in cluster.ring:
        return outcome.then(recover(cluster, f"{name} began anew", now, replan=False))
    return outcome


def head_at(cluster: Cluster, hosts: Sequence[str]) -> Cluster:
    """The head with an address that it has now, the best first: it may have changed since `cluster up`, and then the
    others come back one by one."""
    head = cluster.get(cluster.head)
    if head is None or not hosts or head.host in hosts:
        return cluster
    return cluster.with_device(head.name, host=hosts[0])


def _allow(cluster: Cluster) -> tuple[Command, ...]:
    """Weights go to the devices of the cluster and to nobody else."""
    keys = tuple(sorted(device.key for device in cluster.devices))
    return tuple(Tell(device.name, Allow(keys)) for device in cluster.devices if device.is_alive)


def _given(cluster: Cluster, device: DeviceView) -> DeviceView:
    """With the profile that the options have for it."""
    found = [profile for profile in cluster.options.profiles if profile.name == device.name]
    return msgspec.structs.replace(device, profile=found[0], is_given=True) if found else device


def _same_engine(before: DeviceView, said: EngineStatus | None, host: str) -> Engine | None:
    """The engine as it was known, when it is that which the device still has: control was away, the ring was not."""
    engine = before.engine
    if said is None or engine is None or engine.part != said.part or before.host != host:
        return None
    return engine if not engine.port or engine.port == said.port else None


def lost(cluster: Cluster, name: str, why: str, now: float, *, on_purpose: bool = False) -> Outcome:
    """A device is gone, or silent for too long."""
    device = cluster.get(name)
    if device is None or not device.is_alive:
        return Outcome(cluster)
    losses = device.losses if on_purpose else (*recent_losses(device.losses, now), now)
    cluster = cluster.with_device(
        name, connection=0, engine=None, losses=losses, fetching=None, measuring=False, task="", share=None,
        stats=msgspec.structs.replace(device.stats, memory_bytes=0), has_left=on_purpose,
    )  # fmt: skip
    for probe in cluster.probes:
        if name in (probe.here, probe.there):
            cluster = measuring.without_link(cluster, probe.id)
    text = f"{name} left{f' ({why})' if why else ''}"
    if name in cluster.ring and cluster.phase in ("placing", "ready", "checking"):
        return recover(cluster, text, now, replan=not device.is_head)
    return Outcome(cluster, (Note(text),))


def silent(cluster: Cluster, now: float) -> Outcome:
    """Devices that have not been heard of for too long are gone."""
    outcome = Outcome(cluster)
    for device in cluster.devices:
        if device.is_alive and now - device.heard > LOST_SECONDS:
            outcome = outcome.then(lost(outcome.cluster, device.name, "", now))
    return outcome


def woke(cluster: Cluster, now: float) -> Cluster:
    """The coordinator itself was stopped for a while: what devices said meanwhile has yet to be read."""
    for device in cluster.devices:
        cluster = cluster.with_device(device.name, heard=now, moved=now)
    return cluster.having(probes=tuple(msgspec.structs.replace(probe, since=now) for probe in cluster.probes))


def heard(cluster: Cluster, name: str, message: FromAgent, now: float) -> Outcome:
    """A device that is connected said something other than Hello."""
    device = cluster.get(name)
    if device is None or not device.is_alive:
        return Outcome(cluster)
    cluster = cluster.with_device(name, heard=now)
    match message:
        case Beat(stats):
            return Outcome(_beat(cluster, device, stats, now))
        case Progress(task, share, detail):
            return Outcome(cluster.with_device(name, moved=now, task=task, share=share, detail=detail))
        case Holds() | Measured() | Echoing() | Probed():
            return _known(cluster, device, message, now)
        case Listening() | Loaded() | Joined():
            return Outcome(_engine(cluster, device, message, now))
        case EngineGone(_, reason, is_memory):
            return _gone(cluster, device, reason, now, is_memory)
        case Sorry():
            return _sorry(cluster, device, message, now)
        case Bye(reason):
            return lost(cluster, name, reason, now, on_purpose=True)
        case _:
            return Outcome(cluster)


def _beat(cluster: Cluster, device: DeviceView, stats: DeviceStats, now: float) -> Cluster:
    fresh = cluster.with_device(device.name, stats=stats)
    profile = device.profile
    if profile is None or device.is_given:
        return fresh
    pressed = is_pressed(profile, stats, cluster.options.headroom)
    return fresh.with_device(device.name, pressed_since=(device.pressed_since or now) if pressed else 0.0)


def _known(cluster: Cluster, device: DeviceView, message: Holds | Measured | Echoing | Probed, now: float) -> Outcome:
    name, digest = device.name, cluster.model.manifest.digest
    match message:
        case Holds() if message.digest == digest:
            n = len(cluster.model.manifest.tensors)
            holds = frozenset(number for number in message.tensors if number < n)
            failed = device.fetching is not None and not device.fetching <= holds
            told = cluster.with_device(
                name, holds=holds, disk_free_bytes=message.disk_free_bytes, fetching=None, moved=now, task="",
                share=None, fetch_failures=device.fetch_failures + 1 if failed else 0,
            )  # fmt: skip
            return _fetched_in_vain(told, name, now) if failed else Outcome(told)
        case Measured() if message.digest == digest and device.measuring and not device.is_given:
            return _measured(cluster, device, message.profile, now)
        case Echoing(number, port):
            return _echoing(cluster, device, number, port)
        case Probed(number, found):
            probe = measuring.probing(cluster, number)
            if probe is not None and probe.here == name:
                return Outcome(
                    measuring.with_link(cluster, number, found), (KeepProfile(name), KeepProfile(probe.there))
                )
    return Outcome(cluster)


def _measured(cluster: Cluster, device: DeviceView, measured: DeviceProfile, now: float) -> Outcome:
    name = device.name
    told = cluster.with_device(name, measuring=False, moved=now, task="", share=None)
    try:
        profile = checked_profile(name, measured)
    except HomeinferError as problem:
        return Outcome(told.with_device(name, problem=str(problem)), (Note(f"{name} is left out: {problem}"),))
    profile = msgspec.structs.replace(profile, links=_links(device.profile))
    return Outcome(told.with_device(name, profile=profile), (KeepProfile(name),))


def _links(profile: DeviceProfile | None) -> tuple[Link, ...]:
    return profile.links if profile is not None else ()


def _fetched_in_vain(cluster: Cluster, name: str, now: float) -> Outcome:
    if cluster.device(name).fetch_failures < _MOST_FETCHES:
        return Outcome(cluster)
    reason = "it can't get its weights"
    return Outcome(cluster.with_device(name, problem=reason, moved=now), (Note(f"{name} is left out: {reason}"),))


def _echoing(cluster: Cluster, device: DeviceView, number: int, port: int) -> Outcome:
    probe = measuring.probing(cluster, number)
    if probe is None or probe.there != device.name or device.profile is None:
        return Outcome(cluster)
    sizes = CHECK_SIZES if probe.is_check else cluster.model.sizes
    message = Probe(number, device.name, device.host, port, device.key, sizes, device.profile.hop_ms)
    return Outcome(measuring.opened(cluster, number), (Tell(probe.here, message),))


def _engine(cluster: Cluster, device: DeviceView, message: Listening | Loaded | Joined, now: float) -> Cluster:
    engine = device.engine
    if engine is None or message.epoch != engine.load_epoch:
        return cluster
    match message:
        case Listening(_, port):
            engine = msgspec.structs.replace(engine, port=port)
        case Loaded(_, n_vocab, can_shift):
            engine = msgspec.structs.replace(engine, is_loaded=True, n_vocab=n_vocab, can_shift=can_shift)
        case Joined(epoch):
            engine = msgspec.structs.replace(engine, joined_epoch=epoch)
    return cluster.with_device(device.name, engine=engine, moved=now)


def _gone(cluster: Cluster, device: DeviceView, reason: str, now: float, is_memory: bool) -> Outcome:
    if device.engine is None:
        return Outcome(cluster)
    why = reason if device.name in reason else f"the engine of {device.name} ended: {reason}"
    return crashed(cluster, device.name, why, now, is_memory=is_memory)


def _sorry(cluster: Cluster, device: DeviceView, sorry: Sorry, now: float) -> Outcome:
    """One device can't do what it was asked; the others go on."""
    name, about, reason = device.name, sorry.about, sorry.reason
    note = Outcome(cluster, (Note(f"{name}: {reason}"),))
    match about:
        case "know" | "measure":
            left_out = cluster.with_device(name, problem=reason, moved=now, measuring=False, task="", share=None)
            is_new = reason != device.problem_before
            commands: tuple[Command, ...] = (Note(f"{name} is left out: {reason}"),) if is_new else ()
            is_head = (End(f"{name}, the head: {reason}", is_problem=True),) if device.is_head else ()
            return Outcome(left_out, (*commands, *is_head))
        case "fetch":
            failures = device.fetch_failures + 1
            told = cluster.with_device(name, fetching=None, fetch_failures=failures, task="", share=None)
            return note.then(_fetched_in_vain(told, name, now))
        case "load" | "route":
            return note.then(crashed(cluster, name, f"{name}: {reason}", now))
        case "probe" | "echo":
            for probe in cluster.probes:
                is_its_own = name == (probe.here if about == "probe" else probe.there)
                if is_its_own and sorry.id in (None, probe.id):
                    cluster = measuring.without_link(cluster, probe.id)
            return Outcome(cluster)
        case _:
            return note


def stuck(cluster: Cluster, epoch: int, why: str, now: float) -> Outcome:
    """An answer gets no further: look at the links, then join the ring again, which finds out which engine hangs."""
    if cluster.phase != "ready" or epoch != cluster.epoch:
        return Outcome(cluster)
    return check_links(cluster, why, now)


def faulty(cluster: Cluster, culprit: int | None, why: str, now: float) -> Outcome:
    """The ring can't go on with an answer: join it again, without the device that computes rubbish if that is known
    (and is not the head)."""
    plan = cluster.plan
    if cluster.phase != "ready" or plan is None:
        return Outcome(cluster)
    name = plan.hops[culprit][0] if culprit is not None and culprit < len(plan.hops) else cluster.head
    if name == cluster.head:
        return recover(cluster, why, now, replan=False)
    return recover(left_out(cluster, name, now), f"{name} computes rubbish", now, replan=True)


def forgotten(cluster: Cluster, name: str, now: float) -> Outcome:
    """The user wants nothing more of a device."""
    device = cluster.get(name)
    if device is None:
        return Outcome(cluster)
    outcome = Outcome(cluster)
    if device.is_alive:
        refuse = Refuse(PROTOCOL, __version__, "this device was forgotten: pair it again to use it")
        outcome = Outcome(cluster, (Tell(name, refuse),)).then(lost(cluster, name, "forgotten", now, on_purpose=True))
    others = tuple(each for each in outcome.cluster.devices if each.name != name)
    if name in outcome.cluster.ring:  # what is planned anew must not look for it
        return outcome.then(Outcome(outcome.cluster.with_device(name, problem=measuring.FORGOTTEN)))
    left = outcome.cluster.having(devices=others)
    return outcome.then(Outcome(left, _allow(left)))


def ordered(cluster: Cluster, order: Order, now: float) -> tuple[Outcome, str | None]:
    """What a user wants of the plan or of the cluster; the reason why it can't be done, or None."""
    match order.what:
        case "yes" if cluster.phase == "confirming" and cluster.plan is not None:
            return begin(cluster.having(agreed=True), cluster.plan, now), None
        case "no" if cluster.phase == "confirming":
            return Outcome(cluster, (End("the plan was not wanted"),)), None
        case "yes" | "no":
            return Outcome(cluster), "there is no plan that waits for a yes or no"
        case "down":
            return Outcome(cluster.having(phase="stopping"), (End("the cluster was taken down"),)), None
        case "replan" if cluster.phase == "ready":
            return ask_for_plan(cluster.having(is_forced=True, better=None), now), None
        case "replan" if cluster.phase in ("waiting", "confirming"):
            return Outcome(cluster.having(phase="measuring", since=now, tried="", remembered=None)), None
        case "replan":
            return Outcome(cluster), "a plan is being made or loaded already"
        case _:
            return Outcome(cluster), f"there is no order {order.what}"


def busy(cluster: Cluster, answering: int) -> Outcome:
    """So many answers are being written or wait."""
    return Outcome(cluster if answering == cluster.answering else cluster.having(answering=answering))
