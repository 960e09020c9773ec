"""A plan in one or two sentences, as somebody who knows the machines would put it. Pure."""

from __future__ import annotations

from homeinfer.cluster.planning.problem_checks import gigabytes
from homeinfer.cluster.planning.remarks import listed
from homeinfer.cluster.planning.report import PlannedDevice, PlanReport

_READING = ((10.0, "faster than you read"), (4.0, "about as fast as you read"), (1.0, "slower than you read"))
"""Tokens per second of one answer; people read four to ten."""
_SLOWEST = "something to leave running while you do something else"
_MUCH = 0.25
_LITTLE = 0.05


def verdict(report: PlanReport) -> str:
    """How that feels, where the layers are, and what takes the time."""
    rate = 1e3 / max(report.predicted.tpot_ms, 1e-9)
    feels = next((words for least, words in _READING if rate >= least), _SLOWEST)
    return f"That is {feels}. {_where(report)}{_slow_part(report)}"


def _where(report: PlanReport) -> str:
    used = [device for device in report.devices if device.used]
    read = sum(device.read_bytes for device in used)
    if read:
        share = report.predicted.cause.disk_ms / max(report.predicted.tpot_ms, 1e-9)
        waits = f"waiting for that takes {100 * share:.0f} % of the time"
        if share < _LITTLE:
            waits = "nearly all of that happens while others compute"
        return f"Not all layers fit into memory: {gigabytes(read)} are read from disk for each token, and {waits}."
    places = {"r" if place == "s" else place for window in report.windows for place in window.places}
    where = {"g": "on the GPU", "r": "in memory"}.get("".join(places), "in memory or on a GPU")
    if len(used) == 1 and len(report.devices) > 1:
        return f"All layers fit {where} of {used[0].name}, and a second device would only slow it down."
    return f"All layers are {where}, nothing is read from disk."


def _slow_part(report: PlanReport) -> str:
    """Whoever takes more of the time than its layers say, or the network."""
    cause, total = report.predicted.cause, max(report.predicted.tpot_ms, 1e-9)
    if cause.network_ms > _MUCH * total:
        return f" The network takes {100 * cause.network_ms / total:.0f} % of the time."
    used = [device for device in report.devices if device.used]
    if len(used) < 2 or cause.disk_ms > _MUCH * total:
        return ""
    slow = [device for device in used if _time(device) / total > _MUCH + device.layers / report.model.n_layer]
    if not slow:
        return ""
    share = sum(map(_time, slow)) / total
    layers = sum(device.layers for device in slow)
    verb = "takes" if len(slow) == 1 else "take"
    names = listed([device.name for device in slow])
    return f" {names} {verb} {100 * share:.0f} % of the time for {layers} of {report.model.n_layer} layers."


def _time(device: PlannedDevice) -> float:
    cause = device.cause
    return cause.compute_ms + cause.disk_ms + cause.network_ms + cause.overhead_ms
