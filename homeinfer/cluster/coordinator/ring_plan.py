"""From a plan to what each device loads, needs on its disk, and sends where. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from homeinfer.cluster.coordinator.state import Cluster, DeviceView, RingPlan
from homeinfer.cluster.engine_messages import Pace
from homeinfer.cluster.hops import onward
from homeinfer.cluster.planning.plan import LayerPlace
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.wire.control import EngineOptions, Neighbour, Part, Route, RouteHop, WindowRun
from homeinfer.engine.generate import MOST_REPLAYED

Needed = Callable[[int, int], frozenset[int]]
"""Numbers of the tensors that a window of layers [first, last) is cut from."""


def ring_plan(report: PlanReport, digest: str, needed: Needed) -> RingPlan:
    """The parts of a plan's devices; each run of layers in one place is a window of its device's engine."""
    runs: dict[str, list[WindowRun]] = {}
    hops: list[tuple[str, int]] = []
    for window in report.ring().windows:
        mine = runs.setdefault(window.device, [])
        for first, last, place in window.runs():
            hops.append((window.device, len(mine)))
            mine.append(WindowRun(first, last, cast(LayerPlace, place), window.gpu))
    work = report.workload
    options = EngineOptions(work.n_ctx, work.n_batch, work.sequences, work.wire)
    buffers = {device.name: device.stream_buffer_bytes for device in report.devices}
    teller = hops[-1][0]
    parts = {
        name: Part(digest, tuple(mine), options, buffers.get(name, 0), name == teller) for name, mine in runs.items()
    }
    needs = {
        name: frozenset[int]().union(*(needed(run.first, run.last) for run in part.runs))
        for name, part in parts.items()
    }
    return RingPlan(report, parts, needs, tuple(hops))


def route_of(cluster: Cluster, name: str) -> Route:
    """Where the messages of a device's engine go, in the present epoch: all engines of the plan listen."""
    plan = cluster.plan
    assert plan is not None
    first, teller = plan.hops[0][0], plan.hops[-1][0]
    pace = _pace(cluster.options.sequences, plan)
    return Route(
        epoch=cluster.epoch,
        hops=tuple(
            RouteHop(hop, window, None if to is None else engine_address(cluster.device(to)))
            for hop, window, to in onward(plan.hops, name)
        ),
        n_hops=len(plan.hops),
        head=cluster.ring_head,
        first=None if first == teller else engine_address(cluster.device(first)),
        allowed=tuple(sorted({cluster.device(each).key for each in plan.parts})),
        chunk=pace.chunk,
        ahead=pace.ahead,
        groups=pace.groups,
        replay=pace.replay,
    )


def _pace(sequences: int, plan: RingPlan) -> Pace:
    """Where any device reads weights from its disk, in few steps one after the other, since each reads them all. (The
    buffer of streamed layers may have room for all of them: then they are read once.)"""
    if any(device.read_bytes for device in plan.report.devices):
        return Pace(chunk=plan.report.workload.n_batch, ahead=1, groups=1, replay=1)
    return Pace(groups=min(sequences, len(plan.parts)), replay=MOST_REPLAYED)


def engine_address(device: DeviceView) -> Neighbour:
    """Where a device's engine takes messages."""
    port = device.engine.port if device.engine is not None else 0
    return Neighbour(f"tcp://{bracketed(device.host)}:{port}", device.key)


def bracketed(host: str) -> str:
    """A host as it stands in an address: IPv6 ones have colons of their own."""
    return f"[{host}]" if ":" in host else host


def layers_of(plan: RingPlan, name: str) -> tuple[tuple[int, int], ...]:
    """[first, last) of a device's windows."""
    part = plan.parts.get(name)
    return tuple((run.first, run.last) for run in part.runs) if part is not None else ()


def hops_of(plan: RingPlan | None, name: str) -> tuple[int, ...]:
    """Numbers of a device's windows in the ring."""
    return tuple(hop for hop, (owner, _) in enumerate(plan.hops) if owner == name) if plan is not None else ()
