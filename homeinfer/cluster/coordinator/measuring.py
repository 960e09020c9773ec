"""Getting to know devices: what of the model they hold, how fast they and the links between them are. Pure."""

from __future__ import annotations

from itertools import combinations

import msgspec

from homeinfer.cluster.coordinator.state import Cluster, Command, DeviceView, Note, Outcome, Probing, Tell, usable
from homeinfer.cluster.coordinator.weights import source
from homeinfer.cluster.planning.profile import Link
from homeinfer.cluster.wire.control import Echo, Know, Limit, Measure

_PROBE_SECONDS = 30.0
_MEASURE_SECONDS = 240.0
_KNOW_SECONDS = 120.0
"""Without a word of how far it is, while a device looks what it has of the model."""
_AGAIN_SECONDS = 30.0
"""After so long a device that could not do something is asked once more."""
FORGOTTEN = "it was forgotten"
WHILE_ANSWERING = 4_000_000
"""Bytes per second at which weights move while an answer is being written."""


def introduce(cluster: Cluster, now: float) -> Outcome:
    """Tell whoever is here what the model is, and let them measure themselves."""
    head = cluster.get(cluster.head)
    digest = cluster.model.manifest.digest
    if head is None or not head.is_alive or not head.weights_port or not digest:
        return Outcome(cluster)
    commands: list[Command] = []
    for device in cluster.devices:
        if not device.is_alive:
            continue
        if device.problem:
            if now - device.moved > _AGAIN_SECONDS and device.problem != FORGOTTEN:
                before, again = device.problem, {"knows": False, "holds": None, "fetch_failures": 0}
                cluster = cluster.with_device(device.name, problem="", problem_before=before, moved=now, **again)
        elif not device.knows:
            if not device.is_head and head.holds is None:
                continue  # it has nothing to serve yet
            cluster = cluster.with_device(device.name, knows=True, moved=now)
            commands.append(Tell(device.name, Know(cluster.model.manifest, source(head, ()))))
        elif device.holds is None:
            if now - device.moved > _KNOW_SECONDS:
                reason = "it does not say what it holds of the model"
                cluster = cluster.with_device(device.name, problem=reason, moved=now, task="", share=None)
                commands.append(Note(f"{device.name} is left out: {reason}"))
        elif device.profile is None and not device.measuring:
            cluster = cluster.with_device(device.name, measuring=True, moved=now)
            commands.append(Tell(device.name, Measure(digest, cluster.options.fresh)))
        elif device.measuring and now - device.moved > _MEASURE_SECONDS:
            cluster = cluster.with_device(device.name, measuring=False, problem="it can't be measured", moved=now)
            commands.append(Note(f"{device.name} gets on with no measurement, and is left out"))
    return _limited(cluster, commands)


def _limited(cluster: Cluster, commands: list[Command]) -> Outcome:
    """Weights must not keep answers waiting."""
    is_busy = cluster.phase == "ready" and cluster.answering > 0
    limit = WHILE_ANSWERING if is_busy and any(device.fetching for device in cluster.devices) else 0
    if limit != cluster.limit:
        cluster = cluster.having(limit=limit)
        commands += [Tell(device.name, Limit(limit)) for device in cluster.devices if device.is_alive]
    return Outcome(cluster, tuple(commands))


def link(cluster: Cluster, now: float) -> Outcome:
    """Time the links that nobody has timed yet, each device one at a time."""
    late = {probe for probe in cluster.probes if now - probe.since > _PROBE_SECONDS}
    for probe in late:
        cluster = without_link(cluster, probe.id)
    busy = {name for probe in cluster.probes for name in (probe.here, probe.there)}
    commands: list[Command] = []
    for here, there in combinations(usable(cluster, now), 2):
        if busy & {here.name, there.name} or not _lacks_link(cluster, here, there):
            continue
        busy |= {here.name, there.name}
        number = cluster.probed + 1
        probing = Probing(number, here.name, there.name, now)
        cluster = cluster.having(probed=number, probes=(*cluster.probes, probing))
        commands.append(Tell(there.name, Echo(number, here.key, cluster.model.sizes)))
    return Outcome(cluster, tuple(commands))


def _lacks_link(cluster: Cluster, here: DeviceView, there: DeviceView) -> bool:
    if here.profile is None or there.profile is None or here.is_given or there.is_given:
        return False
    known = {link.to for link in here.profile.links}
    return there.name not in known and (here.name, there.name) not in cluster.unlinked


def probing(cluster: Cluster, number: int) -> Probing | None:
    return next((probe for probe in cluster.probes if probe.id == number), None)


def opened(cluster: Cluster, number: int) -> Cluster:
    """A probe whose other end waits for it."""
    return cluster.having(
        probes=tuple(msgspec.structs.replace(p, is_open=p.is_open or p.id == number) for p in cluster.probes)
    )


def without_link(cluster: Cluster, number: int) -> Cluster:
    """A probe that came to nothing: the plan then assumes an ordinary network."""
    probe = probing(cluster, number)
    if probe is None:
        return cluster
    left = tuple(other for other in cluster.probes if other.id != number)
    if probe.is_check:
        return cluster.having(probes=left, suspects=(*cluster.suspects, probe))
    return cluster.having(probes=left, unlinked=cluster.unlinked | {(probe.here, probe.there)})


def with_link(cluster: Cluster, number: int, found: Link) -> Cluster:
    """A link that was timed there and back counts in both directions."""
    probe = probing(cluster, number)
    if probe is None:
        return cluster
    cluster = cluster.having(probes=tuple(other for other in cluster.probes if other.id != number))
    if probe.is_check:
        ends = {probe.here, probe.there}
        return cluster.having(disputes=tuple(old for old in cluster.disputes if {old.here, old.there} != ends))
    for name, to in ((probe.here, probe.there), (probe.there, probe.here)):
        profile = cluster.device(name).profile
        if profile is not None:
            others = tuple(link for link in profile.links if link.to != to)
            links = (*others, msgspec.structs.replace(found, to=to))
            cluster = cluster.with_device(name, profile=msgspec.structs.replace(profile, links=links))
    return cluster
