"""What is asked of a planner that can't be, each said in one line before anything is searched. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from homeinfer.cluster.planning.plan import Constraints
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.rounds import least_layers
from homeinfer.cluster.planning.shape import ModelShape
from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable


def check_constraints(devices: Sequence[DeviceProfile], constraints: Constraints, n_layer: int) -> None:
    """Raises HomeinferError for devices that no profile names, and for demands that exclude each other."""
    names = [device.name for device in devices]
    head = constraints.head or names[0]
    asked = [("--head", head), *(("--require", name) for name in constraints.required)]
    asked += [("--forbid", name) for name in constraints.forbidden]
    for option, name in asked:
        if name not in names:
            known = ", ".join(printable(known, 40) for known in names[:8])
            raise HomeinferError(
                f"{option} {printable(name, 40)}: no profile is of a device called so; there are {known}"
            )
    if head in constraints.forbidden:
        raise HomeinferError(
            f"--forbid {printable(head, 40)}: it is the head, where the answer is written: "
            "make another device the head with --head"
        )
    both = set(constraints.required) & set(constraints.forbidden)
    if both:
        raise HomeinferError(f"{printable(min(both), 40)} is both required and forbidden: leave one of the two out")
    for end, count in (("first", constraints.private_first), ("last", constraints.private_last)):
        if count > n_layer:
            raise HomeinferError(
                f"--private-layers {count}: the model has {n_layer} layers, so not that many {end} ones: ask for fewer"
            )
    check_rounds(constraints.rounds, max(len({head, *constraints.required}), 2), n_layer)


def check_rounds(rounds: int, devices: int, n_layer: int) -> None:
    """Raises HomeinferError when so many devices can't have so many windows each."""
    least = least_layers(devices, rounds)
    if rounds and least > n_layer:
        raise HomeinferError(
            f"--rounds {rounds}: {devices} devices need {least} layers for that, the model has {n_layer}: ask for fewer"
        )


def used_devices(devices: Sequence[DeviceProfile], constraints: Constraints) -> tuple[DeviceProfile, ...]:
    """Those that a plan may use."""
    return tuple(device for device in devices if device.name not in constraints.forbidden)


def check_kinds(shape: ModelShape, devices: Sequence[DeviceProfile], head: str) -> None:
    """Raises HomeinferError when a device was not measured with this model: it must know the CPU's times of every kind
    of layer, and the head also those of the output matrix."""
    kinds = set(dict.fromkeys(layer.kind for layer in shape.layers))
    for device in devices:
        known = {times.kind for times in device.times if times.place != "gpu"}
        name = printable(device.name, 40)
        missing = len(kinds - known)
        if missing:
            raise HomeinferError(f"{name}'s profile has no times for {_of(missing, len(kinds))}: {_do(device)}")
        if device.name == head and shape.output_kind not in known:
            raise HomeinferError(f"{name}'s profile has no times for this model's output matrix: {_do(device)}")


def _of(missing: int, kinds: int) -> str:
    if kinds == 1:
        return "this model's layers"
    return f"{missing} of this model's {kinds} kinds of layer"


def _do(device: DeviceProfile) -> str:
    name = printable(device.name, 40)
    return f"run homeinfer profile MODEL -o FILE on it, or leave it out with --forbid {name}"


def check_disks(shape: ModelShape, devices: Sequence[DeviceProfile]) -> None:
    """Raises HomeinferError when the layers' files have no room on all disks together; a disk that several devices
    name (Disk.group) counts once."""
    needed = sum(layer.nbytes for layer in shape.layers) + shape.output_bytes
    rooms: dict[str, int] = {}
    for index, device in enumerate(devices):
        key = f"group {device.disk.group}" if device.disk.group else f"device {index}"
        rooms[key] = max(rooms.get(key, 0), device.disk.free_bytes)
    room = sum(rooms.values())
    if needed > room:
        whose = "the disk has" if len(rooms) == 1 else f"all {len(rooms)} disks together have"
        raise HomeinferError(
            f"the model's layers take {gigabytes(needed)} and {whose} room for {gigabytes(room)}: "
            "free some, add a device, or take a smaller model"
        )


def gigabytes(nbytes: float) -> str:
    """ "40.4 GB", "725 MB": as people say it."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            digits = 1 if nbytes < 100 * size and unit != "MB" else 0
            return f"{nbytes / size:,.{digits}f} {unit}"
    return f"{nbytes / 1e3:,.0f} kB"
