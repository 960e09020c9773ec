"""Numbers of a problem laid out for the search, and a bound that no plan's simulation can be below. Pure."""

from __future__ import annotations

import math

from homeinfer.cluster.planning.plan import LayerPlace, Window
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.rounds import has_rounds
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve_prompt import FASTEST, PromptBounds, fastest
from homeinfer.cluster.planning.solve_state import MOST_SLOTS, Slot, State, windows_of
from homeinfer.errors import HomeinferError

PLACES: tuple[LayerPlace, ...] = ("r", "s", "g")

Held = tuple[tuple[int, int, str, int], ...]
"""(first, last, places, GPU) of each window of a device."""


class Step:
    """Milliseconds of a step of so many tokens: sums[slot][place][layer] of all layers before it, what the output
    takes, and each hop with the receiver's work (hops[slot][slot])."""

    def __init__(self, simulator: Simulator, slots: tuple[Slot, ...], n_tokens: int) -> None:
        problem = simulator.problem
        behind, n_layers = problem.workload.prompt_tokens, len(problem.shape.layers)
        self.n_tokens = n_tokens
        self.sums: list[dict[str, list[float]]] = []
        self.output: list[dict[str, float]] = []
        self.hops: list[list[float]] = []
        profiles = [problem.devices[slot.device] for slot in slots]
        for slot, profile in zip(slots, profiles, strict=True):
            cost = simulator.costs[profile.name]
            sums: dict[str, list[float]] = {}
            output: dict[str, float] = {}
            for place in PLACES:
                if (place != "g" or slot.has_gpu) and cost.has_times(0, n_layers, place, slot.gpu):
                    sums[place] = cost.step_sums(place, slot.gpu, n_tokens, behind)
                    output[place] = cost.output_ms(place, slot.gpu, n_tokens) or 0.0
            self.sums.append(sums)
            self.output.append(output)
        for sender in profiles:
            ways = [simulator._hop(sender.name, receiver.name) for receiver in profiles]
            self.hops.append(
                [
                    way.latency_ms + way.token_ms * n_tokens + receiver.hop_ms
                    for way, receiver in zip(ways, profiles, strict=True)
                ]
            )


class Table:
    """What the search reads, again and again."""

    def __init__(self, problem: Problem, simulator: Simulator) -> None:
        self.problem, self.shape = problem, problem.shape
        self.n_layers = len(problem.shape.layers)
        self.names = tuple(device.name for device in problem.devices)
        self.slots = _slots(problem)
        self.memory = simulator.memory
        self.usable = tuple(
            index
            for index, slot in enumerate(self.slots)
            if self.names[slot.device] not in problem.constraints.forbidden
        )
        self.heads = tuple(i for i in self.usable if self.names[self.slots[i].device] == problem.head)
        self.required = frozenset(self.names.index(name) for name in problem.constraints.required)
        self.rounds = problem.constraints.rounds
        self.lead = tuple(problem.devices[slot.device].window_ms for slot in self.slots)
        sequences = problem.workload.sequences
        self.steps = {
            batches: Step(simulator, self.slots, sequences // batches)
            for batches in range(1, sequences + 1)
            if sequences % batches == 0
        }
        self.step = self.steps[1]
        self._quickest = self.steps[sequences]
        self._fastest = [fastest(sums) for sums in self._quickest.sums]
        self._prompt = (
            PromptBounds(simulator, self.slots, self.step.sums) if problem.workload.objective == "ttft" else None
        )
        always = [0]
        for layer in range(self.n_layers):
            always.append(always[-1] + self.memory.always(layer))
        self.always = always
        self._held: dict[tuple[int, Held], tuple[float, float]] = {}
        self.disk_of: list[int] = []
        self.read_ms = tuple(1e3 / device.disk.layer_bytes_per_s for device in problem.devices)
        groups: dict[str, int] = {}
        for index, device in enumerate(problem.devices):
            key = f"group {device.disk.group}" if device.disk.group else f"device {index}"
            self.disk_of.append(groups.setdefault(key, len(groups)))

    def is_allowed(self, owners: bytes) -> bool:
        """Whether the user's demands are met: the head at both ends, private layers there, required devices in it, as
        many rounds as are wanted."""
        if not self._is_private(owners):
            return False
        if self.required and not self.required <= {self.slots[owner].device for owner in set(owners)}:
            return False
        return not self.rounds or has_rounds([self.slots[slot].device for slot, *_ in windows_of(owners)], self.rounds)

    def _is_private(self, owners: bytes) -> bool:
        limits = self.problem.constraints
        private = owners[: limits.private_first] + owners[self.n_layers - limits.private_last :]
        return all(owner in self.heads for owner in set(private))

    def least(self, owners: bytes) -> float:
        """A number that the value of no plan with these owners is below; math.inf where there can be no plan."""
        return self.way(owners) if self.is_allowed(owners) else math.inf

    def way(self, owners: bytes) -> float:
        """The same for a plan that may lack required devices and rounds."""
        if not self._is_private(owners):
            return math.inf
        total, before, step, may_cut = 0.0, -1, self._quickest, self.shape.may_cut
        windows = windows_of(owners)
        for slot, first, last in windows:
            if before >= 0:
                if self.slots[slot].device == self.slots[before].device:
                    return math.inf
                total += step.hops[before][slot]
            if not may_cut(first, last):
                return math.inf
            fastest = self._fastest[slot]
            total += self.lead[slot] + fastest[last] - fastest[first]
            before = slot
        total += min(step.output[before].values())
        if self._prompt is not None:
            return self._prompt.least([(*window, FASTEST) for window in windows])
        work = self.problem.workload
        return total / work.sequences if work.objective == "throughput" else total

    def chain(self, state: State, step: Step) -> tuple[float, list[float]]:
        """Milliseconds of one step's way around the ring without waiting for disks, and each device's own part."""
        total, before, last_place = 0.0, -1, "r"
        busy = [0.0] * len(self.names)
        for slot, first, last, place in state.runs():
            sums = step.sums[slot][place]
            own = self.lead[slot] + sums[last] - sums[first]
            if before not in (-1, slot):
                total += step.hops[before][slot]
            total += own
            busy[self.slots[slot].device] += own
            before, last_place = slot, place
        output = step.output[before][last_place]
        busy[self.slots[before].device] += output
        return total + output, busy

    def held_ms(self, device: int, windows: Held) -> tuple[float, float]:
        """Milliseconds for which a device reads for each token at least when it holds these windows, and maybe more,
        and for how long a token waits for its disk at least; math.inf when they don't fit."""
        key = (device, windows)
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = self._held_ms(device, windows)
        return found

    def _held_ms(self, device: int, windows: Held) -> tuple[float, float]:
        profile, memory = self.problem.devices[device], self.memory
        if not windows:
            return 0.0, 0.0
        held = memory.of_device(
            profile, tuple(Window(profile.name, first, last, text, gpu) for first, last, text, gpu in windows)
        )
        if held.trouble is not None:
            return math.inf, math.inf
        layers = [i for first, _, text, _ in windows for i, place in enumerate(text, first) if place == "s"]
        if not layers:
            return 0.0, 0.0
        if windows[-1][1] == self.n_layers and windows[-1][2][-1] == "s":
            layers.append(self.n_layers)
        total = sum(memory.always(layer) for layer in layers)
        experts = sum(self.shape.layers[layer].expert_bytes for layer in layers if layer < self.n_layers)
        if total + experts <= held.buffer or total <= held.buffer - max(memory.touched(layer) for layer in layers):
            return 0.0, 0.0
        waits = sum(self._waits(device, window, held.buffer) for window in windows if "s" in window[2])
        return total * self.read_ms[device], waits

    def _waits(self, device: int, window: tuple[int, int, str, int], buffer: int) -> float:
        """For how long a window waits for its streamed layers when as many as fit were there before it began."""
        first, last, text, gpu = window
        slot = next(i for i, one in enumerate(self.slots) if one.device == device and one.gpu == gpu)
        sums, rate = self.step.sums[slot], self.read_ms[device]
        now, read, most = 0.0, -buffer * rate, 0.0
        for layer, place in enumerate(text, first):
            if place == "s":
                read += self.memory.always(layer) * rate
                most = max(most, read - now)
            now += sums[place][layer + 1] - sums[place][layer]
        if last == self.n_layers and text[-1] == "s":
            most = max(most, read + self.memory.always(last) * rate - now)
        return most

    def disk_ms(self, state: State) -> tuple[float, float]:
        """For how long the busiest disk reads for each step, and a step waits for disks at least; math.inf when
        something does not fit."""
        devices: dict[int, Held] = {}
        for slot, first, last in state.windows():
            where = self.slots[slot]
            window = (first, last, state.places[first:last], where.gpu)
            devices[where.device] = (*devices.get(where.device, ()), window)
        reads, waited = [0.0] * len(self.names), 0.0
        for device, windows in devices.items():
            own, waits = self.held_ms(device, windows)
            reads[self.disk_of[device]] += own
            waited += waits
        return max(reads), waited

    def bound(self, state: State) -> float:
        """A number that Simulator.value of this state's plan is not below; math.inf where it does not fit."""
        work = self.problem.workload
        reads, waits = self.disk_ms(state)
        if math.isinf(reads):
            return reads
        if self._prompt is not None:
            return self._prompt.least(list(state.runs()))
        chain = self.chain(state, self.step)[0]
        if work.sequences > 1:
            chain = min(chain, self._pipelined(state))
        return max(chain + waits, reads) / (work.sequences if work.objective == "throughput" else 1)

    def _pipelined(self, state: State) -> float:
        best = float("inf")
        for batches, step in self.steps.items():
            chain, busy = self.chain(state, step)
            best = min(best, max(chain, batches * max(busy)))
        return best


def _slots(problem: Problem) -> tuple[Slot, ...]:
    """Each device with each of its GPUs, or alone."""
    found = []
    for index, device in enumerate(problem.devices):
        found += [Slot(index, gpu, True) for gpu in range(len(device.gpus))] or [Slot(index, 0, False)]
    if len(found) > MOST_SLOTS:
        raise HomeinferError(f"{len(found)} devices and GPUs: a plan can choose among {MOST_SLOTS} at most")
    return tuple(found)
