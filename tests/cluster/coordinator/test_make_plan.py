"""From what devices say of themselves to a plan, whatever they say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from homeinfer.cluster.coordinator.make_plan import Planner
from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.state import MakePlan, RingPlan
from homeinfer.cluster.coordinator.trust import checked_profile
from homeinfer.cluster.planning.kinds import layer_kinds, output_kind
from homeinfer.cluster.planning.profile import DeviceProfile, Disk, Gpu, KindTimes, Link
from homeinfer.cluster.weights.manifest import make_manifest
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header, read_header

DISK = Disk(1e9, 1e9, 1e8, 1 << 38)


@pytest.fixture(scope="module")
def header(smollm2_path: Path) -> Header:
    return read_header(smollm2_path)


@pytest.fixture
def planner(header: Header, tmp_path: Path) -> Planner:
    manifest = make_manifest(header, folder=tmp_path)
    return Planner(header, manifest, ClusterOptions(header.files[0].path, wire="f32"), 256)


def device(name: str, header: Header, *places: str, **changes: object) -> DeviceProfile:
    kinds = (*dict.fromkeys(layer_kinds(header)), output_kind(header))
    times = tuple(KindTimes(kind, place, 0.3, 0.6, 9.0) for kind in kinds for place in places)  # type: ignore[arg-type]
    profile = DeviceProfile(name, 2_000_000_000, 2, 2, 1e10, DISK, times=times, attention_macs_per_s=1e10)
    return checked_profile(name, msgspec.structs.replace(profile, **changes))


def outcome(planner: Planner, asked: MakePlan) -> RingPlan | str:
    try:
        return planner.make(asked)
    except HomeinferError as problem:
        return str(problem)


def test_two_devices_get_a_plan_of_this_model(planner: Planner, header: Header) -> None:
    devices = tuple(device(name, header, "resident", "mapped") for name in ("desk", "lap"))
    plan = planner.make(MakePlan(1, devices, None))
    assert plan.parts["desk"].has_last
    other = msgspec.structs.replace(plan.report.model, digest="0" * 64)
    changed = msgspec.structs.replace(plan.report, model=other)
    with pytest.raises(HomeinferError, match="has changed since the cluster came up"):
        planner.of_report(changed)


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_device_whose_profile_is_of_no_use_is_left_out(planner: Planner, header: Header, is_elsewhere: bool) -> None:
    """It knows only times on its GPU, or says that its processor was a GPU."""
    liar = device("lap", header, "gpu", gpus=(Gpu("g", "CUDA0", 1 << 40),))
    if is_elsewhere:
        times = tuple(msgspec.structs.replace(one, place="resident", gpu=7) for one in liar.times)
        liar = msgspec.structs.replace(liar, times=(*liar.times, *times))
    desk = device("desk", header, "resident", "mapped")
    desk = msgspec.structs.replace(desk, links=(Link("lap", 1e9, 1e-4),))
    for asked in (MakePlan(1, (desk, liar), None), MakePlan(2, (desk, liar, device("box", header, "resident")), None)):
        assert "lap" not in planner.make(asked).parts


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_bytes": 1},
        {"disk": Disk(1e-300, 1e-300, 1e-300, 0), "hop_ms": 1e300},
        {"gpus": (Gpu("g", "CUDA0", (1 << 63) - 1),), "overhead_bytes": (1 << 63) - 1, "memory_bytes": (1 << 63) - 1},
        {"times": (), "attention_macs_per_s": 5e-324, "window_ms": 1e308},
    ],
)
def test_a_device_that_says_what_cannot_be_does_not_end_the_planning(
    planner: Planner, header: Header, changes: dict[str, object]
) -> None:
    liar = device("lap", header, "resident", "mapped", **changes)
    lies = MakePlan(1, (device("desk", header, "resident", "mapped", memory_bytes=90_000_000), liar), None)
    made = outcome(planner, lies)
    assert made.splitlines() == [made] if isinstance(made, str) else "desk" in made.parts
