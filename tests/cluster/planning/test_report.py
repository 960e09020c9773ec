"""A plan's report: it can be run from, and says what it is in words."""

from __future__ import annotations

import msgspec
import pytest

from homeinfer.cluster.planning.plan import Cause, Constraints, DeviceLoad, Prediction, Ring, Window, Workload
from homeinfer.cluster.planning.remarks import remarks
from homeinfer.cluster.planning.report import PlannedModel, PlanReport, lanes_of, plan_report
from homeinfer.cluster.planning.verdict import verdict
from tests.support.headers import header_of
from tests.support.profiles import DESK, LAPTOP, SHAPE, device_of

DESK_PROFILE, LAPTOP_PROFILE = device_of(DESK, SHAPE), device_of(LAPTOP, SHAPE)
MODEL = PlannedModel("model-Q4_K_M", ("model-Q4_K_M.gguf",), "00", "llama", 5, 190_000_000)
RING = Ring((Window("desk", 0, 2, "gg", 0), Window("laptop", 2, 4, "rs"), Window("desk", 4, 5, "r")))
PREDICTION = Prediction(
    tpot_ms=100.0,
    ttft_ms=900.0,
    tokens_per_s=10.0,
    cause=Cause(50.0, 30.0, 15.0, 5.0),
    loads=(
        DeviceLoad("desk", Cause(20.0, 0.0, 7.0, 2.0), 3_000_000_000, 6_700_000_000, gpu_bytes=(90_000_000,)),
        DeviceLoad("laptop", Cause(30.0, 30.0, 8.0, 3.0), 2_000_000_000, 2_100_000_000, 60_000_000, 60_000_000, (0,)),
    ),
)


def report(
    ring: Ring = RING, prediction: Prediction = PREDICTION, *, devices: int = 2, reasons: dict[str, str] | None = None
) -> PlanReport:
    return plan_report(
        MODEL, Workload(), Constraints(), (DESK_PROFILE, LAPTOP_PROFILE)[:devices], ring, 1, prediction, reasons or {}
    )


def test_json_holds_all_that_is_needed_to_run_the_plan() -> None:
    made = report()
    back = msgspec.json.decode(msgspec.json.encode(made), type=PlanReport)
    assert back == made
    assert back.ring() == RING
    assert back.constraints.head == "desk"
    raw = msgspec.json.decode(msgspec.json.encode(made))
    assert {"windows", "rounds", "predicted", "devices", "advice", "model", "workload"} <= raw.keys()
    window = {"device": "laptop", "first": 2, "last": 4, "gpu_layers": 0, "resident_layers": 1, "streamed_layers": 1}
    assert raw["windows"][1].items() >= {**window, "places": "rs"}.items()
    assert raw["predicted"].keys() >= {"tpot_ms", "ttft_ms", "tokens_per_s", "cause"}
    assert raw["devices"][1]["stream_buffer_bytes"] == 60_000_000


def test_a_device_without_layers_is_left_out_with_the_reason() -> None:
    alone = Ring((Window("desk", 0, 5, "ggggg"),))
    _, left = report(alone, reasons={"laptop": "two hops cost more than it computes"}).devices
    assert (left.used, left.reason, left.memory_bytes) == (False, "two hops cost more than it computes", 0)
    assert left.memory_free_bytes == left.memory_total_bytes == LAPTOP_PROFILE.memory_bytes


def test_lanes_follow_the_ring_and_name_their_layers() -> None:
    assert [(lane.device, lane.about) for lane in lanes_of(report())] == [
        ("desk", "layers 0–1, 4"),
        ("laptop", "layers 2–3"),
    ]


def with_tpot(tpot_ms: float) -> Prediction:
    return msgspec.structs.replace(PREDICTION, tpot_ms=tpot_ms)


@pytest.mark.parametrize(
    ("tpot_ms", "said"),
    [(20.0, "faster than you read"), (150.0, "about as fast"), (600.0, "slower than"), (5000.0, "leave running")],
)
def test_the_verdict_says_how_fast_that_feels(tpot_ms: float, said: str) -> None:
    assert said in verdict(report(prediction=with_tpot(tpot_ms)))


def test_the_verdict_says_where_the_layers_are() -> None:
    assert "60 MB are read from disk for each token, and waiting for that takes 30 % of the time" in verdict(report())
    loads = tuple(msgspec.structs.replace(load, read_bytes=0) for load in PREDICTION.loads)
    resident = msgspec.structs.replace(PREDICTION, loads=loads)
    alone = Ring((Window("desk", 0, 5, "ggggg"),))
    assert "All layers fit on the GPU of desk, and a second device would only slow it down" in verdict(
        report(alone, resident)
    )
    assert "All layers are on the GPU, nothing is read" in verdict(report(alone, resident, devices=1))
    network = msgspec.structs.replace(resident, cause=Cause(50.0, 0.0, 45.0, 5.0))
    assert "The network takes 45 % of the time" in verdict(report(Ring((Window("desk", 0, 5, "rrrrr"),)), network))


def test_remarks_name_busy_devices_unknown_networks_and_models_in_one_piece() -> None:
    busy = msgspec.structs.replace(LAPTOP_PROFILE, is_quiet=False, noise=0.23)
    header = header_of("llama", layers=2)
    said = " ".join(remarks(header, (DESK_PROFILE, busy), "300 Mbit/s"))
    assert "laptop was busy while it was measured (times differed by 23 %)" in said
    assert "nobody measured the network of desk and laptop: 300 Mbit/s was taken" in said
    both = remarks(header, (msgspec.structs.replace(DESK_PROFILE, is_quiet=False), busy), "")
    assert both[0].startswith("desk and laptop were busy while they were measured (times differed by up to 23 %)")
    assert remarks(header, (DESK_PROFILE, LAPTOP_PROFILE), "") == ()
    assert remarks(header, (DESK_PROFILE,), "300 Mbit/s") == ()
    assert (
        "bloom models run in one piece" in remarks(header_of("bloom", layers=2), (DESK_PROFILE, LAPTOP_PROFILE), "")[0]
    )
