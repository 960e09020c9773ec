"""Which of its layers a device keeps on the GPU, in memory, or streams: as many as fit, in some order. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from homeinfer.cluster.planning.costs import DeviceCosts
from homeinfer.cluster.planning.memory import MemoryModel
from homeinfer.cluster.planning.plan import LayerPlace, Window
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.solve_state import Slot, State, may_run

Order = Literal["tail", "front", "each tail", "each front"]
"""Which layers are streamed first: a device's last, its first, or the last or first of each of its windows alike."""
ORDERS: tuple[Order, ...] = ("tail", "front", "each tail", "each front")
_TRIES = 6


class Filler:
    """Fills windows with places; remembers what it found."""

    def __init__(self, problem: Problem, slots: tuple[Slot, ...], memory: MemoryModel) -> None:
        self._problem, self._slots, self.memory = problem, slots, memory
        self._n = len(problem.shape.layers)
        costs = [DeviceCosts(problem.shape, device, problem.workload) for device in problem.devices]
        self._gpu_wins = [slot.has_gpu and self._prefers_gpu(costs[slot.device], slot) for slot in slots]
        self._sums = [self._sums_of(costs[slot.device], slot) for slot in slots]
        self._known: dict[tuple[int, tuple[tuple[int, int], ...], Order], tuple[str, ...] | None] = {}

    def filled(self, state: State, slots: Iterable[int], order: Order) -> State | None:
        """The state with the windows of some slots filled; None where one's layers fit nowhere on it."""
        places = state.places
        spans: dict[int, list[tuple[int, int]]] = {slot: [] for slot in slots}
        for slot, first, last in state.windows():
            if slot in spans:
                spans[slot].append((first, last))
        for slot, own in spans.items():
            if not own:
                continue
            texts = self.fill(slot, tuple(own), order)
            if texts is None:
                return None
            for (first, last), text in zip(own, texts, strict=True):
                places = places[:first] + text + places[last:]
        return State(state.owners, places)

    def fill(self, slot: int, spans: tuple[tuple[int, int], ...], order: Order) -> tuple[str, ...] | None:
        """Places of each window of a slot, the most on the GPU, then the most in memory; None if not even streamed."""
        if len(spans) == 1 and order in ("each tail", "each front"):
            order = "tail" if order == "each tail" else "front"
        key = (slot, spans, order)
        if key not in self._known:
            ranked = _ranked(spans, order)
            self._known[key] = self._search(slot, spans, ranked)
        return self._known[key]

    def fits(self, slot: int, spans: Sequence[tuple[int, int]], texts: Sequence[str]) -> bool:
        """Whether these places of a slot's windows fit and can be cut so."""
        profile = self._problem.devices[self._slots[slot].device]
        gpu = self._slots[slot].gpu
        windows = tuple(
            Window(profile.name, first, last, text, gpu) for (first, last), text in zip(spans, texts, strict=True)
        )
        shape = self._problem.shape
        if any(
            not may_run("?" * first + text, shape, first, last)
            for (first, last), text in zip(spans, texts, strict=True)
        ):
            return False
        return self.memory.of_device(profile, windows).trouble is None

    def _prefers_gpu(self, costs: DeviceCosts, slot: Slot) -> bool:
        work, n = self._problem.workload, self._n
        if not costs.has_times(0, n, "g", slot.gpu):
            return False
        on_gpu = costs.step_sums("g", slot.gpu, 1, work.prompt_tokens)[n]
        return on_gpu < costs.step_sums("r", 0, 1, work.prompt_tokens)[n]

    def _search(self, slot: int, spans: tuple[tuple[int, int], ...], ranked: list[int]) -> tuple[str, ...] | None:
        """With the most layers on the GPU that works, or with none there where that is faster."""
        most = self._most_on_gpu(slot, ranked, len(spans))
        without = self._with_gpu(slot, spans, ranked, 0)
        for on_gpu in range(most, max(most - _TRIES, 0), -1):
            found = self._with_gpu(slot, spans, ranked, on_gpu)
            if found is not None:
                return min((found, without), key=lambda texts: self._ms(slot, spans, texts)) if without else found
        return without

    def _ms(self, slot: int, spans: tuple[tuple[int, int], ...], texts: tuple[str, ...]) -> float:
        """Of all layers one after another, reads included."""
        sums, disk = self._sums[slot], self._problem.devices[self._slots[slot].device].disk
        total = 0.0
        for (first, last), text in zip(spans, texts, strict=True):
            for layer, place in zip(range(first, last), text, strict=True):
                total += sums[place][layer + 1] - sums[place][layer]
                if place == "s":
                    total += 1e3 * self.memory.always(layer) / disk.layer_bytes_per_s
        return total

    def _sums_of(self, costs: DeviceCosts, slot: Slot) -> dict[str, list[float]]:
        behind = self._problem.workload.prompt_tokens
        places: tuple[LayerPlace, ...] = ("r", "s", "g") if slot.has_gpu else ("r", "s")
        return {place: costs.step_sums(place, slot.gpu, 1, behind) for place in places}

    def _with_gpu(
        self, slot: int, spans: tuple[tuple[int, int], ...], ranked: list[int], on_gpu: int
    ) -> tuple[str, ...] | None:
        total = len(ranked)
        texts = _texts(spans, ranked, on_gpu, total)
        if self.fits(slot, spans, texts):
            return texts
        most = self._most_resident(slot, ranked, on_gpu, len(spans))
        if most < 0:
            return None
        for resident in range(min(on_gpu + most, total - 1), max(on_gpu + most - _TRIES, on_gpu), -1):
            texts = _texts(spans, ranked, on_gpu, resident)
            if self.fits(slot, spans, texts):
                return texts
        texts = _texts(spans, ranked, on_gpu, on_gpu)
        return texts if self.fits(slot, spans, texts) else None

    def _most_resident(self, slot: int, ranked: list[int], on_gpu: int, n_windows: int) -> int:
        """How many of the layers behind those on the GPU fit into memory at most, the others streamed; -1: not even
        none of them."""
        memory, shape = self.memory, self._problem.shape
        profile = self._problem.devices[self._slots[slot].device]
        room = memory.limit(profile) - profile.overhead_bytes - shape.scratch_bytes * n_windows
        weights = []
        for layer in ranked[on_gpu:]:
            room -= memory.kept[layer + 1] - memory.kept[layer]
            weights.append(memory.weights[layer + 1] - memory.weights[layer])
        if room < min(weights, default=0) * (not shape.has_experts):
            return -1
        for count, nbytes in enumerate(weights):
            room -= nbytes
            if room < 0:
                return count
        return len(weights)

    def _most_on_gpu(self, slot: int, ranked: list[int], n_windows: int) -> int:
        if not self._gpu_wins[slot]:
            return 0
        where, shape = self._slots[slot], self._problem.shape
        gpu = self._problem.devices[where.device].gpus[where.gpu]
        room = int(gpu.memory_bytes * (1 - self._problem.workload.headroom)) - shape.scratch_bytes * n_windows
        memory = self.memory
        for count, layer in enumerate(ranked):
            room -= memory.weights[layer + 1] - memory.weights[layer] + memory.kept[layer + 1] - memory.kept[layer]
            if layer == self._n - 1:
                room -= shape.output_bytes + shape.scratch_logits_bytes
            if room < 0:
                return count
        return len(ranked)


def _ranked(spans: tuple[tuple[int, int], ...], order: Order) -> list[int]:
    """The device's layers, those first that get the best place."""
    layers = [(layer, (layer - first) / (last - first)) for first, last in spans for layer in range(first, last)]
    if order in ("each tail", "each front"):
        layers.sort(key=lambda pair: (pair[1] if order == "each tail" else -pair[1], pair[0]))
    found = [layer for layer, _ in layers]
    return found[::-1] if order == "front" else found


def _texts(
    spans: tuple[tuple[int, int], ...], ranked: list[int], on_gpu: int, on_gpu_or_resident: int
) -> tuple[str, ...]:
    places = dict.fromkeys(ranked[:on_gpu], "g")
    places.update(dict.fromkeys(ranked[on_gpu:on_gpu_or_resident], "r"))
    return tuple("".join(places.get(layer, "s") for layer in range(first, last)) for first, last in spans)
