"""What users are shown of a cluster. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from homeinfer.cluster.coordinator.ring_plan import layers_of
from homeinfer.cluster.coordinator.speed import Rates
from homeinfer.cluster.coordinator.state import Cluster, DeviceView
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.client import ClusterStatus, DeviceState, DeviceStatus


def disk_share(report: PlanReport, name: str, rates: Rates) -> float:
    """The share of the last seconds in which a device's windows waited for its disk: what computing took longer than
    predicted, where layers are streamed. An estimate: llama.cpp reads and computes in one call."""
    streams = any(window.streamed_layers for window in report.windows if window.device == name)
    predicted = sum(device.cause.compute_ms for device in report.devices if device.name == name) / 1e3
    return max(0.0, rates.compute_share - predicted * rates.tokens_per_s) if streams else 0.0


def device_status(cluster: Cluster, device: DeviceView, rates: Rates) -> DeviceStatus:
    planned, streamed, waited = 0, 0, 0.0
    detail = device.problem or device.detail
    if cluster.plan is not None and device.is_alive and device.name not in cluster.plan.parts:
        detail = detail or reason_of(cluster.plan.report, device.name)
    if cluster.plan is not None and device.name in cluster.plan.parts:
        report = cluster.plan.report
        planned = sum(each.memory_bytes for each in report.devices if each.name == device.name)
        waited = disk_share(report, device.name, rates)
        streamed = sum(window.streamed_layers for window in report.windows if window.device == device.name)
    return DeviceStatus(
        name=device.name,
        state=device_state(cluster, device),
        is_head=device.is_head,
        host=device.host,
        detail=detail[:2000],
        share=device.share,
        layers=layers_of(cluster.plan, device.name) if cluster.plan is not None else (),
        streamed_layers=streamed,
        planned_memory_bytes=planned,
        stats=device.stats,
        read_bytes_per_s=rates.read_bytes_per_s,
        sent_bytes_per_s=rates.sent_bytes_per_s,
        compute_share=rates.compute_share,
        disk_share=waited,
        holding_share=rates.holding_share,
    )


def reason_of(report: PlanReport, name: str) -> str:
    """Why a plan leaves a device out; "" where it doesn't know the device."""
    return next((device.reason for device in report.devices if device.name == name), "")


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
        recoveries=cluster.recoveries,
        events=tuple(events),
        pid=pid,
    )


def shown_plan(cluster: Cluster) -> PlanReport | None:
    """The plan that runs or waits for a yes."""
    return cluster.plan.report if cluster.plan is not None else None
