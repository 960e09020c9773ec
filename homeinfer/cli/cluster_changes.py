"""What happened to a cluster between two looks at it, as lines for a log; and how long it will take. Pure but for the
clock that is handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from homeinfer.cluster.wire.client import ClusterState, ClusterStatus, DeviceState, DeviceStatus

SAID: dict[DeviceState, str] = {
    "new": "is here",
    "measuring": "is being measured",
    "measured": "is measured",
    "fetching": "gets its weights",
    "loading": "is loading",
    "ready": "is ready",
    "lost": "is lost",
    "left": "has left",
    "refused": "was refused",
}
_WORK: dict[ClusterState, str] = {
    "measuring": "measuring the devices",
    "planning": "planning who holds which layers",
    "loading": "loading",
    "recovering": "recovering",
    "stopping": "ending the cluster",
}
_ENOUGH = 0.02
"""From this share on, the time it took says something of the time that is left."""
_LINES = 16


def changes(before: ClusterStatus | None, after: ClusterStatus) -> tuple[str, ...]:
    """A line for each thing that is new."""
    work = [f"{after.model}: {_WORK[after.state]}"] if _is_new_work(before, after) else []
    if after.waits_for and (before is None or before.waits_for != after.waits_for):
        work.append(f"{after.model}: waiting for devices: {after.waits_for}")
    old = {device.name: device for device in before.devices} if before is not None else {}
    said = new_events(before.events if before is not None else (), after.events)
    came = tuple(f"{device.name} " for device in after.devices if device.name not in old)
    first = [line for line in said if line.startswith(came)]
    devices = [
        _device_line(device)
        for device in after.devices
        if _is_changed(old.get(device.name), device) and not _is_gone_and_said(device, said)
    ]
    return (*first, *work, *devices, *(line for line in said if line not in first))


def _is_new_work(before: ClusterStatus | None, after: ClusterStatus) -> bool:
    return after.state in _WORK and (before is None or before.state != after.state)


def _is_changed(before: DeviceStatus | None, after: DeviceStatus) -> bool:
    """That a device is new is an event already."""
    return after.state != "new" and (before is None or before.state != after.state)


def _is_gone_and_said(device: DeviceStatus, said: Sequence[str]) -> bool:
    """Why a device is gone is an event, which says more."""
    return device.state in ("lost", "left", "refused") and any(line.startswith(f"{device.name} ") for line in said)


def _device_line(device: DeviceStatus) -> str:
    return f"{device.name} {SAID[device.state]}{f': {device.detail}' if device.detail else ''}"


def new_events(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    """What was added to a list that forgets its oldest lines."""
    for dropped in range(len(before) + 1):
        kept = before[dropped:]
        if list(after[: len(kept)]) == list(kept):
            return tuple(after[len(kept) :])
    return tuple(after[-_LINES:])


class Begun(msgspec.Struct, frozen=True):
    """When a task was first seen, and how far it was then."""

    what: str
    at: float
    share: float


class Pace:
    """Guesses how long each task still takes from how fast it went so far."""

    def __init__(self) -> None:
        self._begun: dict[str, Begun] = {}

    def left(self, tasks: Mapping[str, tuple[str, float | None]], now: float) -> dict[str, float]:
        """Seconds left by name. tasks: what each name does, and the share that is done; now: of any steady clock."""
        self._begun = {name: self._seen(name, what, share, now) for name, (what, share) in tasks.items() if share}
        found = {}
        for name, begun in self._begun.items():
            share = tasks[name][1]
            if share is not None and share - begun.share >= _ENOUGH:
                found[name] = (now - begun.at) / (share - begun.share) * max(1 - share, 0.0)
        return found

    def _seen(self, name: str, what: str, share: float | None, now: float) -> Begun:
        begun = self._begun.get(name)
        if begun is None or begun.what != what or (share or 0.0) < begun.share:
            return Begun(what, now, share or 0.0)
        return begun


def tasks_of(status: ClusterStatus) -> dict[str, tuple[str, float | None]]:
    """For Pace.left."""
    return {device.name: (device.state, device.share) for device in status.devices}
