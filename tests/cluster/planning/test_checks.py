"""What a plan can't be made of: each is one line that says where and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homeinfer.cluster.planning.plan import Constraints
from homeinfer.cluster.planning.problem_checks import check_constraints, check_disks, check_kinds, used_devices
from homeinfer.cluster.planning.profile import VERSION, DeviceProfile, ProfileFile
from homeinfer.cluster.planning.read_profiles import decode_profiles
from homeinfer.cluster.profiles_file import read_device_profiles
from homeinfer.errors import HomeinferError
from tests.support.profiles import DESK, LAPTOP, MAC, SHAPE, device_of, write_profile

DESK_PROFILE, LAPTOP_PROFILE = device_of(DESK, SHAPE), device_of(LAPTOP, SHAPE)


def encoded(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A profile file of desk with something changed."""
    raw = json.loads(msgspec.json.encode(ProfileFile(VERSION, (DESK_PROFILE,))))
    change(raw)
    return json.dumps(raw).encode()


def device(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["devices"][0]
    return found


def test_profiles_come_back_as_they_were_written_in_order(tmp_path: Path) -> None:
    one = write_profile(tmp_path / "one.json", DESK_PROFILE)
    two = write_profile(tmp_path / "two.json", LAPTOP_PROFILE, device_of(MAC, SHAPE))
    assert read_device_profiles([one, two])[:2] == (DESK_PROFILE, LAPTOP_PROFILE)
    assert [found.name for found in read_device_profiles([two, one])] == ["laptop", "mac", "desk"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("memory_bytes", -1, "memory_bytes is -1, and must be at least 0"),
        ("memory_bytes", 0, "memory_bytes is 0, and must be more than 0"),
        ("memory_bytes", 1 << 80, "and must be at most 9223372036854775807"),
        ("memory_bytes", 1.5, "memory_bytes is wrong: expected `int`, got `float`"),
        ("memory_bytes_per_s", 0, "memory_bytes_per_s is 0, and must be more than 0"),
        ("memory_bytes_per_s", float("nan"), "memory_bytes_per_s is nan, which is no number that can be measured"),
        ("memory_bytes_per_s", float("inf"), "memory_bytes_per_s is inf, which is no number that can be measured"),
        ("memory_bytes_per_s", -float("inf"), "memory_bytes_per_s is -inf, which is no number that can be measured"),
        ("memory_bytes_per_s", "fast", "memory_bytes_per_s is wrong: expected `float`, got `str`"),
        ("cores", 0, "cores is 0, and must be at least 1"),
        ("noise", float("nan"), "noise is nan"),
        ("name", 7, "name is wrong: expected `str`, got `int`"),
    ],
)
def test_impossible_numbers_are_named_by_file_device_and_field(field: str, value: object, said: str) -> None:
    with pytest.raises(HomeinferError) as caught:
        decode_profiles("desk.json", encoded(lambda raw: device(raw).update({field: value})))
    assert str(caught.value).startswith("desk.json: ")
    assert said in str(caught.value)
    assert field == "name" or "desk: " in str(caught.value)


def test_fields_deep_inside_are_named_with_their_path() -> None:
    for change, said in (
        (lambda raw: device(raw)["disk"].update(layer_bytes_per_s=0), "desk: disk.layer_bytes_per_s is 0"),
        (lambda raw: device(raw)["times"][1].update(decode_1_ms=-3), "desk: times[1].decode_1_ms is -3"),
        (lambda raw: device(raw)["disk"].pop("free_bytes"), "desk: disk.free_bytes is missing"),
        (lambda raw: device(raw).pop("name"), "device 1: name is missing"),
        (
            lambda raw: device(raw)["times"][0].update(place="attic"),
            "desk: times[0].place is wrong: invalid enum value",
        ),
        (lambda raw: device(raw)["times"][-1].update(gpu=3), "desk: times of GPU 3, but the profile lists 1"),
        (lambda raw: device(raw)["times"][0].update(gpu=1), "desk: times of GPU 1 that are none of a GPU"),
        (lambda raw: device(raw)["times"].append(device(raw)["times"][0]), "desk: two times for one kind of layer"),
        (lambda raw: device(raw).update(name=""), "'' is no name for a device"),
        (lambda raw: device(raw).update(name="a\nb"), "'a\\nb' is no name for a device"),
        (lambda raw: raw.update(devices=[]), "names no device"),
        (lambda raw: raw.update(devices=[3]), "device 1: the profile is wrong"),
    ):
        with pytest.raises(HomeinferError) as caught:
            decode_profiles("desk.json", encoded(change))
        assert said in str(caught.value)


def test_other_versions_are_refused_with_both_versions() -> None:
    for version in (0, VERSION + 1, "1", True):
        with pytest.raises(HomeinferError, match=rf"version {version}, .* reads version {VERSION}"):
            decode_profiles("desk.json", encoded(lambda raw: raw.update(version=version)))  # noqa: B023
    with pytest.raises(HomeinferError, match="no version and no measurements"):
        decode_profiles("desk.json", b'{"devices": [{"name": "desk", "memory_bytes": 16000000000}]}')


@pytest.mark.parametrize("data", [b"", b"GGUF\x03", b"{", b"[]", b"3", b"null", b'{"devices": 1}', b"[" * 100_000])
def test_what_is_no_profile_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(HomeinferError, match=r"x\.json: this is no profile: .*homeinfer profile"):
        decode_profiles("x.json", data)


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(field=st.sampled_from([*msgspec.to_builtins(DESK_PROFILE)]), junk=_JUNK)
def test_any_junk_in_any_field_is_one_line_or_a_profile(field: str, junk: object) -> None:
    said = refusal(encoded(lambda raw: device(raw).update({field: junk})))
    assert len(said) < 400
    assert said == "" or said.isprintable()


def refusal(data: bytes) -> str:
    try:
        decode_profiles("desk.json", data)
    except HomeinferError as error:
        return str(error)
    return ""


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(HomeinferError, match=r"gone\.json: the profile can't be read: No such file"):
        read_device_profiles([tmp_path / "gone.json"])
    with pytest.raises(HomeinferError, match="this is no file"):
        read_device_profiles([tmp_path])
    huge = tmp_path / "huge.json"
    huge.touch()
    os.truncate(huge, 1 << 40)
    with pytest.raises(HomeinferError, match=r"huge\.json: 16 MiB and more is too large for a profile"):
        read_device_profiles([huge])


def test_two_devices_of_one_name_are_refused_within_a_file_and_across_files(tmp_path: Path) -> None:
    both = write_profile(tmp_path / "both.json", DESK_PROFILE, DESK_PROFILE)
    with pytest.raises(HomeinferError, match=r"two devices are called desk, in \S*both\.json: give"):
        read_device_profiles([both])
    one, two = (write_profile(tmp_path / f"{name}.json", DESK_PROFILE) for name in ("one", "two"))
    with pytest.raises(HomeinferError, match=r"called desk, in \S*one\.json and in \S*two\.json"):
        read_device_profiles([one, two])


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        (Constraints(head="tower"), "--head tower: no profile is of a device called so; there are desk, laptop"),
        (Constraints(required=("tower",)), "--require tower: no profile"),
        (Constraints(forbidden=("tower",)), "--forbid tower: no profile"),
        (Constraints(forbidden=("desk",)), "--forbid desk: it is the head"),
        (Constraints(required=("laptop",), forbidden=("laptop",)), "laptop is both required and forbidden"),
        (Constraints(private_first=6), "--private-layers 6: the model has 5 layers"),
    ],
)
def test_demands_that_cannot_be_met_are_said(constraints: Constraints, said: str) -> None:
    with pytest.raises(HomeinferError) as caught:
        check_constraints((DESK_PROFILE, LAPTOP_PROFILE), constraints, len(SHAPE.layers))
    assert said in str(caught.value)


def without(profile: DeviceProfile, *kinds: str) -> DeviceProfile:
    return msgspec.structs.replace(profile, times=tuple(t for t in profile.times if t.kind not in kinds))


def test_a_device_that_was_not_measured_with_this_model_is_said_to_be_so() -> None:
    check_kinds(SHAPE, (DESK_PROFILE, without(LAPTOP_PROFILE, "output")), "desk")
    for profile, said in (
        (
            without(LAPTOP_PROFILE, "dense", "odd"),
            "laptop's profile has no times for 2 of this model's 3 kinds of layer",
        ),
        (without(DESK_PROFILE, "output"), "desk's profile has no times for this model's output matrix"),
    ):
        with pytest.raises(HomeinferError) as caught:
            check_kinds(SHAPE, (profile,), "desk")
        assert said in str(caught.value)
        assert "run homeinfer profile MODEL -o FILE on it" in str(caught.value)
    lacking = (DESK_PROFILE, without(LAPTOP_PROFILE, "dense"))
    check_kinds(SHAPE, used_devices(lacking, Constraints(forbidden=("laptop",))), "desk")


def with_disk(profile: DeviceProfile, free_bytes: int, group: str = "") -> DeviceProfile:
    return msgspec.structs.replace(
        profile, disk=msgspec.structs.replace(profile.disk, free_bytes=free_bytes, group=group)
    )


def test_a_model_too_large_for_all_disks_is_refused_and_a_shared_disk_counts_once() -> None:
    check_disks(SHAPE, (with_disk(DESK_PROFILE, 200_000_000), with_disk(LAPTOP_PROFILE, 200_000_000)))
    with pytest.raises(HomeinferError, match=r"layers take 390 MB and the disk has room for 200 MB"):
        check_disks(SHAPE, (with_disk(DESK_PROFILE, 200_000_000, "a"), with_disk(LAPTOP_PROFILE, 200_000_000, "a")))
    with pytest.raises(HomeinferError, match="all 2 disks together have room for 300 MB"):
        check_disks(SHAPE, (with_disk(DESK_PROFILE, 200_000_000), with_disk(LAPTOP_PROFILE, 100_000_000)))
