"""From devices to a plan of what each loads: runs the planner, which takes seconds; for a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from homeinfer.cluster.coordinator.options import ClusterOptions
from homeinfer.cluster.coordinator.planning import gain, known_links
from homeinfer.cluster.coordinator.ring_plan import ring_plan
from homeinfer.cluster.coordinator.state import MakePlan, RingPlan
from homeinfer.cluster.plan_files import planned_model
from homeinfer.cluster.planning import planner
from homeinfer.cluster.planning.kinds import layer_kinds
from homeinfer.cluster.planning.plan import Constraints, Wire, Workload
from homeinfer.cluster.planning.profile import DeviceProfile, Network
from homeinfer.cluster.planning.remarks import remarks
from homeinfer.cluster.planning.report import PlanReport
from homeinfer.cluster.weights.manifest import make_manifest, needed_tensors
from homeinfer.cluster.wire.control import Manifest
from homeinfer.errors import HomeinferError
from homeinfer.model.header import Header

ASSUMED = Network(bytes_per_s=37.5e6, latency_s=0.0005)
"""Of devices whose links could not be timed: 300 Mbit/s, and a millisecond from one to the other."""
_PROMPT = 512
_MUCH_NETWORK, _WORTH_IT = 0.15, 0.1
"""Half as many bytes on the wire are worth trying above this share of a token, and worth having from this gain on."""


async def read_model(header: Header, on_share: Callable[[float], None]) -> Manifest:
    """Its manifest, for which all of it is read the first time. on_share, 0 to 1, is called in the event loop. Raises
    HomeinferError when it can't be read."""
    loop, stopped = asyncio.get_running_loop(), threading.Event()

    def tell(share: float) -> None:
        loop.call_soon_threadsafe(on_share, share)

    try:
        return await asyncio.to_thread(make_manifest, header, tell, stopped=stopped)
    finally:
        stopped.set()  # the end of a process waits for its threads: not for all of a model


class Planner:
    """What stays the same from plan to plan."""

    def __init__(self, header: Header, manifest: Manifest, options: ClusterOptions, n_ctx: int) -> None:
        self._header, self._manifest, self._options, self._n_ctx = header, manifest, options, n_ctx

    def workload(self, wire: Wire) -> Workload:
        options = self._options
        return Workload(
            n_ctx=self._n_ctx,
            sequences=options.sequences,
            prompt_tokens=min(_PROMPT, self._n_ctx),
            n_batch=min(options.n_batch, self._n_ctx),
            wire=wire,
            headroom=options.headroom,
            objective=options.objective,
        )

    def make(self, asked: MakePlan) -> RingPlan:
        """Raises HomeinferError when there is no plan, or the model's file has changed."""
        try:
            return self._made(asked)
        except HomeinferError:
            raise
        except Exception as problem:  # devices say what they like of themselves, and must not end the cluster by it
            names = ", ".join(device.name for device in asked.devices[1:])
            raise HomeinferError(
                f"planning failed unexpectedly ({type(problem).__name__}: {problem}): if the profile of {names} may be "
                "at fault, leave that device out (homeinfer cluster forget)"
            ) from problem

    def _made(self, asked: MakePlan) -> RingPlan:
        self._check_file()
        devices = planner.with_network(self._measured(asked.devices), ASSUMED)
        wire = asked.wire if self._options.wire == "auto" else self._options.wire
        report = self._report(devices, wire or "f32")
        if wire is None and _network_share(report) > _MUCH_NETWORK:
            smaller = self._report(devices, "f16")
            report = smaller if gain(smaller, report) > _WORTH_IT else report
        return self.of_report(report)

    def _measured(self, devices: tuple[DeviceProfile, ...]) -> tuple[DeviceProfile, ...]:
        """Without those (but never the head) whose profiles are of no use for this model: the others go on."""
        kinds = set(layer_kinds(self._header))
        head, *others = devices
        return known_links((head, *(device for device in others if kinds <= known_kinds(device))))

    def of_report(self, report: PlanReport) -> RingPlan:
        """What a plan means for its devices. Raises HomeinferError for one of another model."""
        if report.model.digest != self._manifest.digest:
            raise HomeinferError(
                f"{self._options.model} has changed since the cluster came up: take it down and up again"
            )
        return ring_plan(report, self._manifest.digest, self._needed)

    def fits(self, report: PlanReport) -> bool:
        """Whether an earlier plan is for this model and what is wanted now."""
        wire = report.workload.wire if self._options.wire == "auto" else self._options.wire
        wanted = msgspec.structs.replace(self.workload(wire), n_batch=report.workload.n_batch)  # the planner's choice
        return report.model.digest == self._manifest.digest and report.workload == wanted

    def _needed(self, first: int, last: int) -> frozenset[int]:
        return frozenset(needed_tensors(self._header, self._manifest, first, last))

    def _check_file(self) -> None:
        for file in self._header.files:
            try:
                is_same = Path(file.path).stat().st_size == file.size
            except OSError:
                is_same = False
            if not is_same:
                raise HomeinferError(f"{file.path} has changed since the cluster came up: take it down and up again")

    def _report(self, devices: tuple[DeviceProfile, ...], wire: Wire) -> PlanReport:
        names = {device.name for device in devices}
        required = tuple(name for name in self._options.required if name in names)
        constraints = Constraints(head=devices[0].name, required=required, rounds=self._options.rounds)
        planned = planner.plan_model(self._header, devices, self.workload(wire), constraints)
        notes = remarks(self._header, devices, "", again="homeinfer cluster up --fresh")
        return planner.report_of(planned_model(self._header), devices, constraints, planned, notes=notes)


def known_kinds(device: DeviceProfile) -> set[str]:
    """The kinds of layer whose time on the device's processor is known."""
    return {times.kind for times in device.times if times.place != "gpu" and times.gpu == 0}


def _network_share(report: PlanReport) -> float:
    return report.predicted.cause.network_ms / max(report.predicted.tpot_ms, 1e-9)
