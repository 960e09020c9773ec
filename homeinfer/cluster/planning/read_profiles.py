"""From a profile file's bytes to devices, strictly: what is wrong is said with file, device and field. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import msgspec

from homeinfer.cluster.planning.profile import VERSION, DeviceProfile, ProfileFile
from homeinfer.errors import HomeinferError
from homeinfer.model.header import printable

_AGAIN = "make it again with homeinfer profile"
_MOST_NAME = 64
_WHERE = re.compile(r"(?P<what>.*?) - at `\$(?P<path>.*)`", re.DOTALL)
_DEVICE = re.compile(r"\.devices\[(\d+)\]\.?")
_BOUND = re.compile(r"Expected `\w+` (?P<sign>>=|<=|>|<) (?P<bound>\S+)")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_SIGNS = {">": "more than", "<": "less than", ">=": "at least", "<=": "at most"}


def decode_profiles(name: str, data: bytes) -> ProfileFile:
    """The devices of one profile file; `name` is what messages call it.

    Raises HomeinferError for what is no JSON, for another version (both are named), for fields that are missing or of
    the wrong type, for numbers that can't be (negative, NaN, infinite, zero bandwidth), and for a device that
    contradicts itself.
    """
    raw = _parsed(name, data)
    _check_version(name, raw)
    for path, value in _numbers(raw, ""):
        if not math.isfinite(value):
            _refuse_field(name, raw, path, f"is {value}, which is no number that can be measured")
    try:
        found = msgspec.convert(raw, ProfileFile)
    except msgspec.ValidationError as error:
        _refuse(name, raw, str(error))
    if not found.devices:
        raise HomeinferError(f"{name}: this profile names no device; {_AGAIN}")
    for device in found.devices:
        _check_device(name, device)
    return found


def _parsed(name: str, data: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(data)  # takes NaN and Infinity, so that they can be said by name
    except (ValueError, RecursionError):
        raise HomeinferError(f"{name}: this is no profile: it holds no JSON that can be read; {_AGAIN}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("devices"), list):
        raise HomeinferError(f"{name}: this is no profile: it has no list of devices; {_AGAIN}")
    return raw


def _check_version(name: str, raw: dict[str, Any]) -> None:
    version = raw.get("version")
    if version is None:
        raise HomeinferError(
            f"{name}: this profile has no version and no measurements, which quantize --fit takes, but a plan needs "
            "more: make one with homeinfer profile MODEL -o FILE"
        )
    if version != VERSION or isinstance(version, bool):
        raise HomeinferError(
            f"{name}: this profile is of version {printable(str(version), 20)}, and this homeinfer reads version "
            f"{VERSION}: use the same homeinfer on all devices and make the profile again"
        )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}[{index}]")


def _refuse(name: str, raw: dict[str, Any], said: str) -> NoReturn:
    """msgspec's message in a user's words."""
    match = _WHERE.fullmatch(said)
    what, path = (match["what"], match["path"]) if match else (said, "")
    if missing := _MISSING.match(what):
        _refuse_field(name, raw, f"{path}.{missing[1]}", "is missing")
    bound = _BOUND.match(what)
    if bound is None:
        _refuse_field(name, raw, path, f"is wrong: {what[:1].lower()}{what[1:]}")
    limit = bound["bound"].removesuffix(".0")
    value = printable(str(_value_at(raw, path)), 30)
    _refuse_field(name, raw, path, f"is {value}, and must be {_SIGNS[bound['sign']]} {limit}")


def _refuse_field(name: str, raw: dict[str, Any], path: str, said: str) -> NoReturn:
    match = _DEVICE.match(path)
    field = path[match.end() :] if match else path.removeprefix(".")
    whose = f"{_device_name(raw, int(match[1]))}: " if match else ""
    raise HomeinferError(f"{name}: {whose}{printable(field, 100) or 'the profile'} {said}; {_AGAIN}")


def _device_name(raw: dict[str, Any], index: int) -> str:
    device = raw["devices"][index] if index < len(raw["devices"]) else None
    called = device.get("name") if isinstance(device, dict) else None
    return printable(called, 40) if isinstance(called, str) and called else f"device {index + 1}"


def _value_at(raw: Any, path: str) -> Any:
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        raw = raw[key] if key else raw[int(index)]
    return raw


def _check_device(name: str, device: DeviceProfile) -> None:
    """What the schema can't say."""
    if not 0 < len(device.name) <= _MOST_NAME or not device.name.isprintable() or device.name != device.name.strip():
        raise HomeinferError(
            f"{name}: '{printable(device.name, 40)}' is no name for a device: 1 to {_MOST_NAME} characters on one line"
        )
    called = printable(device.name, 40)
    if device.memory_bytes == 0:
        raise HomeinferError(f"{name}: {called}: memory_bytes is 0, and must be more than 0; {_AGAIN}")
    seen: set[tuple[str, str, int]] = set()
    for times in device.times:
        if times.gpu != 0 and times.place != "gpu":
            raise HomeinferError(f"{name}: {called}: times of GPU {times.gpu} that are none of a GPU; {_AGAIN}")
        if times.place == "gpu" and not 0 <= times.gpu < len(device.gpus):
            raise HomeinferError(
                f"{name}: {called}: times of GPU {times.gpu}, but the profile lists {len(device.gpus)}; {_AGAIN}"
            )
        key = (times.kind, times.place, times.gpu)
        if key in seen:
            raise HomeinferError(f"{name}: {called}: two times for one kind of layer in one place; {_AGAIN}")
        seen.add(key)


def join_profiles(files: Sequence[tuple[str, ProfileFile]]) -> tuple[DeviceProfile, ...]:
    """The devices of all files in order. Raises HomeinferError when two have one name."""
    found: dict[str, tuple[str, DeviceProfile]] = {}
    for name, file in files:
        for device in file.devices:
            if device.name in found:
                first = found[device.name][0]
                where = f"in {name}" if first == name else f"in {first} and in {name}"
                raise HomeinferError(
                    f"two devices are called {printable(device.name, 40)}, {where}: give each device a name of its own"
                )
            found[device.name] = (name, device)
    return tuple(device for _, device in found.values())
