"""How good a plan can be at most, memories and disks counted: Lagrangian relaxation of the way around the ring. Pure.

Each resource (a device's memory, a GPU's, room for files, a disk's milliseconds per token) has a price; a path of
layers through slots and places pays for what it uses and is given what there is. Whatever the prices, the cheapest
path costs no more than the best plan; prices are raised by subgradients until that says most. For one sequence.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table

Floats = npt.NDArray[np.float64]
_PATIENCE = 10
_LEAST_STEP = 0.001


class Relaxed:
    """Costs and uses of each choice (a slot and a place) for each layer, the output being the last one.

    Uses are shares of what there is; a streamed layer has two: read for each token, or kept where it was read to.
    streaming: devices (their indexes) that may stream, with room for one layer at least to do it; others may not.
    """

    def __init__(self, table: Table, streaming: frozenset[int]) -> None:
        self.table, self._streaming = table, streaming
        self.choices = tuple(
            (slot, place)
            for slot in table.usable
            for place in table.step.sums[slot]
            if place != "s" or table.slots[slot].device in streaming
        )
        self._names: dict[tuple[str, int, int], int] = {}
        n_choices, n_layers = len(self.choices), table.n_layers
        self.disks = [self._resource("disk", disk) for disk in table.disk_of]
        self._memories = [self._resource("memory", device) for device in range(len(table.names))]
        self._gpus = [self._resource("gpu", table.slots[slot].device, table.slots[slot].gpu) for slot in table.usable]
        self._files = [self._resource("file", device) for device in range(len(table.names))]
        self.n_resources = len(self._names)
        self.room = self._room()
        self.ms = np.full((n_choices, n_layers + 1), np.inf)
        self.leads = np.zeros(n_choices)
        self.lead_uses = np.zeros((n_choices, self.n_resources))
        self.uses = np.zeros((2, n_choices, n_layers + 1, self.n_resources))
        for index in range(n_choices):
            self._add(index)
        self.hops = self._hops()
        self.heads = np.array([slot in table.heads for slot, _ in self.choices])

    def priced(self, prices: Floats) -> tuple[Floats, Floats, npt.NDArray[np.intp]]:
        """With prices in milliseconds: of each choice's layers, of beginning a run, and which of the two uses."""
        both = self.uses @ prices
        return self.ms + both.min(axis=0), self.leads + self.lead_uses @ prices, both.argmin(axis=0)

    def rest(self, layers: Floats, leads: Floats) -> tuple[Floats, npt.NDArray[np.intp]]:
        """The cheapest way on: of [choice, layer] with the layers before `layer` done and the last of them in
        `choice`, and the choice of `layer`; the row behind the last choice: from the beginning."""
        n_choices, n_layers = len(self.choices), self.table.n_layers
        turns = np.vstack([self.hops + leads[None, :] * (1 - np.eye(n_choices)), leads[None, :]])
        rest = np.full((n_choices + 1, n_layers + 1), np.inf)
        following = np.zeros((n_choices + 1, n_layers), dtype=np.intp)
        rest[:n_choices, n_layers] = np.where(self.heads, layers[:, n_layers], np.inf)
        for layer in range(n_layers - 1, -1, -1):
            ways = turns + (layers[:, layer] + rest[:n_choices, layer + 1])[None, :]
            following[:, layer] = ways.argmin(axis=1)
            rest[:, layer] = ways.min(axis=1)
        return rest, following

    def path(self, following: npt.NDArray[np.intp]) -> list[int]:
        """The choice of each layer on the cheapest path."""
        found, at = [], len(self.choices)
        for layer in range(self.table.n_layers):
            at = int(following[at, layer])
            found.append(at)
        return found

    def state(self, path: list[int]) -> State:
        """The plan that a path stands for, which may not fit."""
        chosen = [self.choices[index] for index in path]
        return State(bytes(slot for slot, _ in chosen), "".join(place for _, place in chosen))

    def used(self, path: list[int], modes: npt.NDArray[np.intp]) -> Floats:
        """Of each resource, as shares of what there is."""
        layers = np.arange(self.table.n_layers + 1)
        at = np.array([*path, path[-1]])
        total: Floats = self.uses[modes[at, layers], at, layers].sum(axis=0)
        begins = [index for rank, index in enumerate(path) if rank == 0 or path[rank - 1] != index]
        total += self.lead_uses[begins].sum(axis=0)
        return total

    def _resource(self, what: str, index: int, other: int = 0) -> int:
        return self._names.setdefault((what, index, other), len(self._names))

    def _room(self) -> Floats:
        """Of each resource, in bytes; of disks 1, since their room is the best plan's time."""
        table = self.table
        room = np.ones(self.n_resources)
        batch = 2 * table.problem.workload.n_batch * table.shape.hidden_bytes
        for device, profile in enumerate(table.problem.devices):
            own = table.memory.limit(profile) - profile.overhead_bytes - batch
            own -= self._least_buffer(device) if device in self._streaming else 0
            room[self._memories[device]] = max(own, 1)
            room[self._files[device]] = max(profile.disk.free_bytes, 1)
        for slot, resource in zip(table.usable, self._gpus, strict=True):
            where = table.slots[slot]
            if where.has_gpu:
                gpu = table.problem.devices[where.device].gpus[where.gpu]
                room[resource] = max(int(gpu.memory_bytes * (1 - table.problem.workload.headroom)), 1)
        return room

    def _may_keep(self, device: int) -> bool:
        """Whether streamed layers that all fit into the buffer can be better than the same ones resident."""
        table = self.table
        sums = next(sums for slot, sums in zip(table.slots, table.step.sums, strict=True) if slot.device == device)
        is_slower = "r" in sums and "s" in sums and bool((np.diff(sums["s"]) >= np.diff(sums["r"])).all())
        return table.shape.has_experts or not is_slower

    def _least_buffer(self, device: int) -> int:
        memory, layers = self.table.memory, range(self.table.n_layers)
        return min(map(memory.touched if self._may_keep(device) else memory.room, layers))

    def _add(self, index: int) -> None:
        table, (slot, place) = self.table, self.choices[index]
        shape, memory, where = table.shape, table.memory, table.slots[slot]
        profile, n_layers = table.problem.devices[where.device], table.n_layers
        self.leads[index] = table.lead[slot]
        sums, limits = table.step.sums[slot][place], table.problem.constraints
        first, last = (0, n_layers) if slot in table.heads else (limits.private_first, n_layers - limits.private_last)
        self.ms[index, first:last] = np.diff(np.array(sums))[first:last]
        self.ms[index, n_layers] = table.step.output[slot][place]
        own = [self._memories[where.device]]
        if place == "g":
            gpu = self._gpus[table.usable.index(slot)]
            own = [gpu, *(own if profile.gpus[where.gpu].is_unified else [])]
        kept = np.append(np.diff(np.array(memory.kept, dtype=float)), shape.scratch_logits_bytes)
        weights = np.append(np.diff(np.array(memory.weights, dtype=float)), shape.output_bytes)
        uses = self.uses[:, index]
        uses[:, :, self._files[where.device]] = weights / self.room[self._files[where.device]]
        always = np.array([memory.always(layer) for layer in range(n_layers + 1)], dtype=float)
        for resource in own:
            self.lead_uses[index, resource] = shape.scratch_bytes / self.room[resource]
            uses[0, :, resource] = (kept + (0 if place == "s" else weights)) / self.room[resource]
            uses[1, :, resource] = (kept + (always if place == "s" else weights)) / self.room[resource]
        if place == "s":
            uses[0, :, self.disks[where.device]] = always * table.read_ms[where.device]
            if not self._may_keep(where.device):
                uses[1] = uses[0]

    def _hops(self) -> Floats:
        table, n_choices = self.table, len(self.choices)
        hops = np.zeros((n_choices, n_choices))
        for one, (sender, _) in enumerate(self.choices):
            for other, (receiver, _) in enumerate(self.choices):
                if sender != receiver:
                    is_same = table.slots[sender].device == table.slots[receiver].device
                    hops[one, other] = math.inf if is_same else table.step.hops[sender][receiver]
        return hops


class Prices:
    """The prices of resources that say most, for plans faster than `limit` milliseconds (math.inf: any), and the paths
    met on the way there."""

    def __init__(self, relaxed: Relaxed, limit: float, rounds: int) -> None:
        self.relaxed, self.limit = relaxed, limit
        room = np.ones(relaxed.n_resources)
        self._is_disk = np.zeros(relaxed.n_resources, dtype=bool)
        self._is_disk[relaxed.disks] = True
        if math.isfinite(limit):
            room[self._is_disk] = limit
        self._given = room
        self.values = np.zeros(relaxed.n_resources)
        self.least = -math.inf
        self.paths: dict[State, None] = {}
        self._raise(rounds)

    def given(self, limit: float) -> float:
        """What the prices give back for all room, when disks may take so long."""
        disks = float(self.values[self._is_disk].sum())
        return float(self.values[~self._is_disk].sum()) + (disks * limit if disks else 0.0)

    def _raise(self, rounds: int) -> None:
        relaxed, prices, step, since = self.relaxed, self.values, 1.0, 0
        is_free = self._is_disk & (not math.isfinite(self.limit))
        for _ in range(rounds):
            layers, leads, modes = relaxed.priced(prices)
            rest, following = relaxed.rest(layers, leads)
            cost = float(rest[-1, 0])
            if not math.isfinite(cost):
                return
            least = cost - float(prices @ self._given)
            path = relaxed.path(following)
            self.paths.setdefault(relaxed.state(path))
            if least > self.least:
                self.least, self.values, since = least, prices, 0
            else:
                since += 1
            if since >= _PATIENCE:
                prices, step, since = self.values, step / 2, 0
                if step < _LEAST_STEP:
                    return
                continue
            if self.least >= self.limit:
                return
            slope = np.where(is_free, 0.0, relaxed.used(path, modes) / self._given - 1.0)
            slope = np.where((prices <= 0) & (slope < 0), 0.0, slope)
            length = float(slope @ slope)
            if length <= 0:
                return
            target = self.limit if math.isfinite(self.limit) else 1.2 * least
            prices = np.maximum(prices + step * max(target - least, 0.01 * target) * slope / length / self._given, 0.0)
