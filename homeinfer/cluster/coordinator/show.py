"""What users are shown of a cluster. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from homeinfer.cluster.coordinator.planning import BETTER
from homeinfer.cluster.coordinator.ring_plan import layers_of
from homeinfer.cluster.coordinator.settle import KNOWN_SECONDS
from homeinfer.cluster.coordinator.speed import Rates
from homeinfer.cluster.coordinator.state import Cluster, DeviceView
from homeinfer.cluster.planning.report import PlannedDevice, PlanReport
from homeinfer.cluster.wire.client import ClusterStatus, DeviceState, DeviceStatus


def disk_share(report: PlanReport, name: str, rates: Rates) -> float:
    """The share of the last seconds in which a device's windows waited for its disk: what computing took longer than
    predicted, where it reads for each token. An estimate: llama.cpp reads and computes in one call."""
    device = planned_device(report, name)
    if device is None or not device.read_bytes:
        return 0.0
    return max(0.0, rates.compute_share - device.cause.compute_ms / 1e3 * rates.tokens_per_s)


def slowdown(report: PlanReport, device: DeviceView, rates: Rates) -> float | None:
    """How many times as long as planned a device computes for a token. None while too few tokens were alone, for a
    device that was not measured here or has streamed layers (llama.cpp waits for the disk within what it computes),
    and where the plan is for several answers at once."""
    planned, profile = planned_device(report, device.name), device.profile
    if planned is None or profile is None or device.is_given or rates.computing_ms is None:
        return None
    windows = [window for window in report.windows if window.device == device.name]
    if report.workload.sequences > 1 or any(window.streamed_layers for window in windows):
        return None
    runs = sum(len(window.window().runs()) for window in windows)
    predicted = planned.cause.compute_ms + profile.window_ms * runs
    return rates.computing_ms / predicted if predicted else None


def planned_device(report: PlanReport, name: str) -> PlannedDevice | None:
    return next((device for device in report.devices if device.name == name), None)


def streamed_layers(report: PlanReport, name: str) -> int:
    """Layers of a device that are read from its disk for each token. Where the plan counts no bytes for that they stay
    in memory once they were read."""
    device = planned_device(report, name)
    if device is None or not device.read_bytes:
        return 0
    return sum(window.streamed_layers for window in report.windows if window.device == name)


def device_status(cluster: Cluster, device: DeviceView, rates: Rates) -> DeviceStatus:
    report = cluster.plan.report if cluster.plan is not None else None
    planned = planned_device(report, device.name) if report is not None else None
    detail = device.problem or device.detail or (why_idle(cluster, device) if device.is_alive else "")
    return DeviceStatus(
        name=device.name,
        state=device_state(cluster, device),
        is_head=device.is_head,
        host=device.host,
        detail=detail[:2000],
        share=device.share,
        layers=layers_of(cluster.plan, device.name) if cluster.plan is not None else (),
        streamed_layers=streamed_layers(report, device.name) if report is not None else 0,
        planned_memory_bytes=planned.memory_bytes if planned is not None else 0,
        stats=device.stats,
        read_bytes_per_s=rates.read_bytes_per_s,
        sent_bytes_per_s=rates.sent_bytes_per_s,
        compute_share=rates.compute_share,
        disk_share=disk_share(report, device.name, rates) if report is not None else 0.0,
        holding_share=rates.holding_share,
        slowdown=slowdown(report, device, rates) if report is not None else None,
    )


def why_idle(cluster: Cluster, device: DeviceView) -> str:
    """Why a device has no layers; "" for one that has some, and while nobody knows."""
    if cluster.plan is None or device.name in cluster.plan.parts:
        return ""
    if device.name in cluster.options.forbidden:
        return "--forbid leaves it out"
    planned = planned_device(cluster.plan.report, device.name)
    if planned is not None:
        return planned.reason
    if cluster.better is not None and device.name in cluster.better.parts:
        return "it comes in at the next pause between answers"
    is_judged = cluster.phase == "ready" and device.name in cluster.basis and not cluster.planning
    return f"a plan with it would not be {100 * BETTER:.0f} % better" if is_judged else ""


def waits_for(cluster: Cluster) -> str:
    """What a cluster that waits for devices waits for: "1 of 3 are here"."""
    options = cluster.options
    names = {device.name for device in cluster.devices if device.is_alive and not device.problem}
    here, lacks = len(names), sorted(set(options.required) - names)
    if cluster.phase != "waiting" or not cluster.model.manifest.digest:
        return ""
    if cluster.tried:
        return "those that are here can't run it"
    if lacks:
        return f"{', '.join(lacks)} must take part"
    if options.devices:
        return f"{here} of {options.devices} are here"
    if options.wait_seconds:
        return f"whoever comes within {options.wait_seconds:.0f} s"
    return f"{here} of {cluster.members + 1} that are paired are here, for {KNOWN_SECONDS:.0f} s at most"


def device_state(cluster: Cluster, device: DeviceView) -> DeviceState:
    engine = device.engine
    if not device.is_alive:
        return "left" if device.has_left else "lost"
    if device.problem:
        return "refused"
    if device.fetching is not None:
        return "fetching"
    if engine is not None:
        return "ready" if engine.is_loaded and engine.joined_epoch == cluster.epoch else "loading"
    if device.measuring:
        return "measuring"
    return "measured" if device.is_measured else "new"


def cluster_status(
    cluster: Cluster,
    rates: Mapping[str, Rates],
    *,
    code: str | None,
    events: Sequence[str],
    tokens_per_s: float,
    answers: int,
    answered: int,
    pid: int,
) -> ClusterStatus:
    plan = cluster.plan
    return ClusterStatus(
        state=cluster.state,
        model=cluster.model.name,
        model_path=cluster.model.path,
        epoch=cluster.epoch,
        n_ctx=cluster.model.n_ctx,
        sequences=cluster.options.sequences,
        devices=tuple(
            device_status(cluster, device, rates.get(device.name, Rates()))
            for device in sorted(cluster.devices, key=lambda device: (not device.is_head, device.name))
        ),
        code=code,
        predicted_tpot_ms=plan.report.predicted.tpot_ms if plan is not None else None,
        tokens_per_s=tokens_per_s,
        answers=answers,
        answered=answered,
        waits_for=waits_for(cluster),
        recoveries=cluster.recoveries,
        events=tuple(events),
        pid=pid,
    )


def shown_plan(cluster: Cluster) -> PlanReport | None:
    """The plan that runs or waits for a yes."""
    return cluster.plan.report if cluster.plan is not None else None
