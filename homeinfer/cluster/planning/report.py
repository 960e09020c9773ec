"""A plan as the world sees it: what `homeinfer plan --json` prints, and what a ring is started from. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from homeinfer.cluster.planning.plan import Cause, Constraints, DeviceLoad, Prediction, Ring, Window, Workload
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.timeline_svg import Lane

REPORT_VERSION = 1


class PlannedModel(msgspec.Struct, frozen=True):
    """Which model a plan is for. files: names of its parts, without folders. digest: SHA-256 of their headers one
    after the other (everything before the tensors' data), by which devices know that they hold the same model.
    nbytes: of all weights."""

    name: str
    files: tuple[str, ...]
    digest: str
    architecture: str
    n_layer: int
    nbytes: int


class PlannedWindow(msgspec.Struct, frozen=True):
    """Layers [first, last) on a device, in ring order: how many are where, and in `places` one letter for each
    (plan.LayerPlace). gpu: which of the device's GPUs the g layers are on."""

    device: str
    first: int
    last: int
    gpu_layers: int
    resident_layers: int
    streamed_layers: int
    places: str
    gpu: int = 0

    def window(self) -> Window:
        return Window(self.device, self.first, self.last, self.places, self.gpu)


class Predicted(msgspec.Struct, frozen=True):
    """plan.Prediction's sums: tokens_per_s of all sequences together, the others of each."""

    tpot_ms: float
    ttft_ms: float
    tokens_per_s: float
    cause: Cause


class PlannedDevice(msgspec.Struct, frozen=True):
    """A device of the plan, or one that is left out (used false, and why in `reason`).

    memory_bytes: what homeinfer takes of it at its peak, stream_buffer_bytes of it for streamed layers;
    memory_free_bytes: what is left then of memory_total_bytes, the profile's. cause: its part of a token.
    read_bytes: from its disk per token. gpu_bytes: on each of its GPUs, of
    gpu_total_bytes.
    """

    name: str
    used: bool
    reason: str
    memory_bytes: int
    memory_free_bytes: int
    memory_total_bytes: int
    layers: int = 0
    is_head: bool = False
    cause: Cause = Cause()
    stream_buffer_bytes: int = 0
    read_bytes: int = 0
    gpu_bytes: tuple[int, ...] = ()
    gpu_total_bytes: tuple[int, ...] = ()


class Advice(msgspec.Struct, frozen=True):
    """A change that would help. what: "+2 GB on laptop"; the objective's value then, and its difference from now:
    milliseconds of TPOT or TTFT, or tokens per second for throughput; change is a share of now's."""

    what: str
    value: float
    difference: float
    change: float


class Compared(msgspec.Struct, frozen=True):
    """What another rule would do with the same devices, by the same simulator; why_not where it can't."""

    name: str
    feasible: bool
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    why_not: str = ""


class PlanReport(msgspec.Struct, frozen=True):
    """Everything that is needed to run a plan, to show it and to judge it.

    windows are in ring order; the first and the last are the head's. rounds: how often a token passes the head's
    devices: 1 when every device has its layers in one piece (the head in two at most).
    """

    version: int
    model: PlannedModel
    workload: Workload
    constraints: Constraints
    windows: tuple[PlannedWindow, ...]
    rounds: int
    predicted: Predicted
    devices: tuple[PlannedDevice, ...]
    advice: tuple[Advice, ...] = ()
    compare: tuple[Compared, ...] = ()
    notes: tuple[str, ...] = ()

    def ring(self) -> Ring:
        """The windows as the planner and the engines take them."""
        return Ring(tuple(window.window() for window in self.windows))


def plan_report(
    model: PlannedModel,
    workload: Workload,
    constraints: Constraints,
    devices: Sequence[DeviceProfile],
    ring: Ring,
    rounds: int,
    prediction: Prediction,
    reasons: Mapping[str, str],
    *,
    advice: Sequence[Advice] = (),
    compare: Sequence[Compared] = (),
    notes: Sequence[str] = (),
) -> PlanReport:
    """Puts a solution into one report; reasons say why devices are left out, by name."""
    loads = {load.name: load for load in prediction.loads}
    head = constraints.head or devices[0].name
    return PlanReport(
        version=REPORT_VERSION,
        model=model,
        workload=workload,
        constraints=msgspec.structs.replace(constraints, head=head),
        windows=tuple(_window(window) for window in ring.windows),
        rounds=rounds,
        predicted=Predicted(prediction.tpot_ms, prediction.ttft_ms, prediction.tokens_per_s, prediction.cause),
        devices=tuple(_device(device, ring, loads.get(device.name), reasons, head) for device in devices),
        advice=tuple(advice),
        compare=tuple(compare),
        notes=tuple(notes),
    )


def _window(window: Window) -> PlannedWindow:
    count = window.places.count
    return PlannedWindow(
        window.device, window.first, window.last, count("g"), count("r"), count("s"), window.places, window.gpu
    )


def _device(
    device: DeviceProfile, ring: Ring, load: DeviceLoad | None, reasons: Mapping[str, str], head: str
) -> PlannedDevice:
    layers = sum(window.last - window.first for window in ring.windows if window.device == device.name)
    if load is None or not layers:
        why = reasons.get(device.name, "the others are faster without it")
        return PlannedDevice(device.name, False, why, 0, device.memory_bytes, device.memory_bytes)
    return PlannedDevice(
        name=device.name,
        used=True,
        reason="",
        memory_bytes=load.memory_bytes,
        memory_free_bytes=load.memory_free_bytes,
        memory_total_bytes=device.memory_bytes,
        layers=layers,
        is_head=device.name == head,
        cause=load.cause,
        stream_buffer_bytes=load.stream_buffer_bytes,
        read_bytes=load.read_bytes,
        gpu_bytes=load.gpu_bytes,
        gpu_total_bytes=tuple(gpu.memory_bytes for gpu in device.gpus),
    )


def lanes_of(report: PlanReport) -> tuple[Lane, ...]:
    """The devices of a timeline in the order in which a token meets them first."""
    layers: dict[str, list[str]] = {}
    for window in report.windows:
        span = f"{window.first}–{window.last - 1}" if window.last - window.first > 1 else f"{window.first}"
        layers.setdefault(window.device, []).append(span)
    return tuple(Lane(device, _layers(spans)) for device, spans in layers.items())


def _layers(spans: Sequence[str]) -> str:
    shown = ", ".join(spans[:2])
    return f"layers {shown}{f' and {len(spans) - 2} more' if len(spans) > 2 else ''}"
