"""Who needs which tensors, and whom to ask for them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from homeinfer.cluster.coordinator.state import Cluster, DeviceView
from homeinfer.cluster.wire.control import Source

_SPARE = 1 << 30
"""Bytes of a disk that replicas never take."""


def sources(cluster: Cluster, wants: str, tensors: frozenset[int]) -> tuple[Source, ...]:
    """The devices alive that have some of the tensors, those with less to do first: the head last."""
    found = [
        source(device, device.holds & tensors)
        for device in sorted(cluster.devices, key=lambda device: (device.is_head, device.name))
        if device.is_alive and device.name != wants and device.weights_port and device.holds and device.holds & tensors
    ]
    return tuple(found)


def source(device: DeviceView, tensors: Iterable[int]) -> Source:
    return Source(device.name, device.host, device.weights_port, device.key, tuple(sorted(tensors)))


def missing(device: DeviceView, needs: frozenset[int]) -> frozenset[int]:
    return needs - (device.holds or frozenset())


def replica_wants(cluster: Cluster) -> dict[str, frozenset[int]]:
    """What devices should get besides their own layers, so that what a lost device held is on another one's disk.

    The head's disk counts for none of them where there are enough others: it has the whole model anyway, and layers
    that move go to the others. Each device's layers go to those with the most room first.
    """
    plan, copies = cluster.plan, cluster.options.replicas
    if plan is None or copies < 2:
        return {}
    others = [
        device for device in cluster.devices if device.is_alive and not device.is_head and device.holds is not None
    ]
    room = {device.name: device.disk_free_bytes - _SPARE for device in others}
    has = {device.name: set(device.holds or ()) for device in others}
    sizes = [tensor.nbytes for tensor in cluster.model.manifest.tensors]
    wants: dict[str, set[int]] = {}
    for name in sorted(set(plan.needs) - {cluster.head}):
        for tensor in sorted(plan.needs[name]):
            holders = sum(tensor in held for held in has.values())
            for other in sorted(room, key=lambda other: (-room[other], other)):
                if holders >= copies:
                    break
                if tensor not in has[other] and room[other] >= sizes[tensor]:
                    room[other] -= sizes[tensor]
                    has[other].add(tensor)
                    wants.setdefault(other, set()).add(tensor)
                    holders += 1
    return {name: frozenset(tensors) for name, tensors in wants.items()}
