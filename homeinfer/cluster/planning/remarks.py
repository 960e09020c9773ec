"""What a user should know beside a plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.model.architectures_refused import REFUSED
from homeinfer.model.header import Header, printable


def remarks(
    header: Header, devices: Sequence[DeviceProfile], assumed_link: str, again: str = "homeinfer profile --fresh"
) -> tuple[str, ...]:
    """One sentence each: busy devices, networks nobody measured (for which assumed_link stands, "" when the user said
    what to take), models that stay in one piece, files without data. again: the command that measures anew."""
    found = []
    busy = [device for device in devices if not device.is_quiet]
    if busy:
        names = listed([printable(device.name, 40) for device in busy])
        were, they = ("was", "it was") if len(busy) == 1 else ("were", "they were")
        most = max(device.noise for device in busy)
        off = f" (times differed by {'up to ' if len(busy) > 1 else ''}{100 * most:.0f} %)" if most else ""
        found.append(
            f"{names} {were} busy while {they} measured{off}, so the numbers may be off: {again} measures again, "
            "best when nothing else runs there"
        )
    unknown = [printable(device.name, 40) for device in devices if not device.network and not device.links]
    if unknown and len(devices) > 1 and assumed_link:
        found.append(
            f"nobody measured the network of {listed(unknown)}: {assumed_link} was taken; --link says otherwise"
        )
    if header.architecture in REFUSED and len(devices) > 1:
        found.append(
            f"{printable(header.architecture, 40)} models run in one piece, on the head alone: "
            f"{REFUSED[header.architecture]}"
        )
    if header.truncated:
        found.append("the model's file is cut short: enough for a plan, but not for running it")
    return tuple(found)


def listed(names: Sequence[str]) -> str:
    """ "desk", "desk and laptop", "desk, laptop and phone"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
