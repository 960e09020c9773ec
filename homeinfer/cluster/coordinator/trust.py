"""How far a device may be relied on: lost or crashed once is bad luck, again and again is a habit. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from homeinfer.cluster.planning.profile import VERSION, DeviceProfile, ProfileFile
from homeinfer.cluster.planning.read_profiles import decode_profiles
from homeinfer.cluster.wire.control import DeviceStats

_MEMORY_OF_LOSSES, _MEMORY_OF_CRASHES = 600.0, 300.0
_FREE_LOSSES, _FREE_CRASHES = 2, 3
_FIRST_PAUSE, _LONGEST_PAUSE = 15.0, 600.0
_MOST_HEAD_CRASHES = 8
_NOTEWORTHY = 0.8
_PRESSED = 0.25
"""Of what is to stay free: what is planned for may take a little more than was thought."""


def recent_losses(losses: Sequence[float], now: float) -> tuple[float, ...]:
    return tuple(when for when in losses if now - when < _MEMORY_OF_LOSSES)


def recent_crashes(crashes: Sequence[float], now: float) -> tuple[float, ...]:
    return tuple(when for when in crashes if now - when < _MEMORY_OF_CRASHES)


def pause_after_losses(losses: Sequence[float], now: float) -> float:
    """Seconds for which a device that is back is better left out: a link that comes and goes would cost every answer a
    new beginning."""
    return _pause(len(recent_losses(losses, now)) - _FREE_LOSSES)


def pause_after_crashes(crashes: Sequence[float], now: float) -> float:
    """Seconds for which a device whose engine crashed is better left out; 0: start the engine again."""
    return _pause(len(recent_crashes(crashes, now)) - _FREE_CRASHES + 1)


def _pause(too_many: int) -> float:
    return min(_FIRST_PAUSE * 2.0 ** (too_many - 1), _LONGEST_PAUSE) if too_many > 0 else 0.0


def memory_share(share: float, crashes: Sequence[float], now: float) -> float:
    """How much of a device's memory may be planned with, where crashes for want of it have made that so little: all of
    it again when they are long ago."""
    return share if recent_crashes(crashes, now) else 1.0


def is_hopeless(crashes: Sequence[float], now: float) -> bool:
    """Whether the head's engine, without which there is no cluster, ends whatever is tried."""
    return len(recent_crashes(crashes, now)) > _MOST_HEAD_CRASHES


def checked_profile(name: str, said: DeviceProfile) -> DeviceProfile:
    """What a device says of itself, under the name that it has here, without links. Raises HomeinferError for what no
    device can be."""
    named = msgspec.structs.replace(said, name=name, links=())
    return decode_profiles("its profile", msgspec.json.encode(ProfileFile(VERSION, (named,)))).devices[0]


def plannable(profile: DeviceProfile, stats: DeviceStats, share: float, *, is_given: bool) -> int:
    """Bytes of memory to plan with: what was measured, unless other programs have taken much of it since. is_given:
    the profile was given and not measured here."""
    now = stats.available_bytes + stats.memory_bytes
    taken = stats.total_bytes and now < _NOTEWORTHY * profile.memory_bytes and not is_given
    return max(1, int((now if taken else profile.memory_bytes) * share))


def bearable(held: int, profile: DeviceProfile, stats: DeviceStats, headroom: float) -> int:
    """Bytes of memory to plan with for a device that holds so much as the plan says, so that it gives back what is
    lacking of what is to stay free, or takes what is over. Not by what its processes seem to hold: they share pages
    with each other and with files."""
    over = stats.available_bytes - headroom * profile.memory_bytes
    return max(1, int((held + over) / (1 - headroom)))


def is_pressed(profile: DeviceProfile, stats: DeviceStats, headroom: float) -> bool:
    """Whether so little memory is left for the user's other programs that the plan should give some back."""
    return stats.total_bytes > 0 and stats.available_bytes < _PRESSED * headroom * profile.memory_bytes
