"""Several steps in the ring at once: chunks of a prompt, micro-batches of sequences. Pure."""

from __future__ import annotations

import heapq

from homeinfer.cluster.planning.disks import Disks
from homeinfer.cluster.planning.route import Stage
from homeinfer.cluster.planning.walk import alone_ms

_ROUNDS = 24


class _Servers:
    """Devices and links serve one step at a time, first come, first served."""

    def __init__(self, disks: Disks) -> None:
        self._device: dict[str, float] = {}
        self._link: dict[tuple[str, str], float] = {}
        self._disks = disks

    def serve(self, stage: Stage, now: float) -> float:
        """When a step that is ready to leave for this stage at `now` has been computed there."""
        if stage.wire:
            pair = (stage.sender, stage.device)
            sent = max(now, self._link.get(pair, 0.0)) + stage.wire
            self._link[pair] = sent
            now = sent + stage.delay
        now = max(now, self._device.get(stage.device, 0.0)) + stage.receive
        for piece in stage.pieces:
            now += piece.lead
            if piece.item >= 0:
                now = max(now, self._disks.ready(stage.device))
            now += piece.fault + piece.compute
            if piece.item >= 0:
                self._disks.release(stage.device, now)
        self._device[stage.device] = now
        return now


def finish_of(jobs: list[list[Stage]], disks: Disks) -> float:
    """When the last of several steps, all ready at 0 and in this order, is done."""
    servers, queue = _Servers(disks), [(0.0, index, 0) for index in range(len(jobs))]
    end = 0.0
    while queue:
        ready, index, at = heapq.heappop(queue)
        end = servers.serve(jobs[index][at], ready)
        if at + 1 < len(jobs[index]):
            heapq.heappush(queue, (end, index, at + 1))
    return end


def least_period(stages: list[Stage], batches: int) -> float:
    """What period_of is not below: one step's way around, and the work of the busiest device."""
    busy: dict[str, float] = {}
    for stage in stages:
        work = stage.receive + sum(piece.lead + piece.fault + piece.compute for piece in stage.pieces)
        busy[stage.device] = busy.get(stage.device, 0.0) + work
    return max(alone_ms(stages), batches * max(busy.values()))


def period_of(stages: list[Stage], batches: int) -> float:
    """Milliseconds between two tokens of a sequence when so many steps go around at once, again and again."""
    servers = _Servers(Disks({}, {}))
    queue = [(0.0, index, 0) for index in range(batches)]
    ends: list[float] = []
    while len(ends) < _ROUNDS:
        ready, index, at = heapq.heappop(queue)
        end = servers.serve(stages[at], ready)
        if at + 1 == len(stages) and index == 0:
            ends.append(end)
        heapq.heappush(queue, (end, index, (at + 1) % len(stages)))
    half = _ROUNDS // 2
    period = (ends[-1] - ends[half - 1]) / (_ROUNDS - half)
    return max(period, least_period(stages, batches))
