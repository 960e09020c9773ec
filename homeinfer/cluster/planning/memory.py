"""How much memory each device of a ring needs, and what is left for layers streamed from its disk. Pure."""

from __future__ import annotations

from itertools import accumulate

import msgspec

from homeinfer.cluster.planning.plan import Window
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.profile import DeviceProfile
from homeinfer.cluster.planning.scratch import cells
from homeinfer.model.records import printable

PAGES = 65536
"""Bytes that a streamed layer may take more than its weights, since it is read in whole pages."""


class DeviceMemory(msgspec.Struct, frozen=True):
    """A device's bytes. fixed: everything but streamed layers; limit: memory without headroom; buffer: what is left
    for streamed layers (0 where there are none); gpus: on each GPU; file: window files on its disk.

    Each run of a window is a llama.cpp context of its own, whose compute buffer keeps what it once touched: all
    count. Window files must fit the disk's free room, though those of earlier plans might be there already."""

    fixed: int
    limit: int
    buffer: int
    gpus: tuple[int, ...]
    file: int
    trouble: str | None = None


class MemoryModel:
    """Sums over layers, so that a device's memory takes as long as its windows are many."""

    def __init__(self, problem: Problem) -> None:
        shape, workload = problem.shape, problem.workload
        self._shape, self._workload = shape, workload
        kept, n_cells = [], cells(workload)
        for layer in shape.layers:
            seen = min(n_cells, layer.kv_window * workload.sequences) if layer.kv_window else n_cells
            kept.append(layer.kv_bytes * seen + layer.state_bytes * workload.sequences)
        self.weights = [0, *accumulate(layer.nbytes for layer in shape.layers)]
        self.kept = [0, *accumulate(kept)]
        self._n = len(shape.layers)
        self._touched = [
            round(layer.expert_bytes * distinct_share(layer.expert_share, workload.sequences)) for layer in shape.layers
        ] + [0]
        self._most_touched = max(self._touched)
        self._small = small_bytes(self._n, shape.hidden_bytes)
        self._always = [layer.nbytes - layer.expert_bytes + PAGES for layer in shape.layers]
        self._always.append(shape.output_bytes + PAGES)

    def limit(self, profile: DeviceProfile) -> int:
        """What homeinfer may take of a device's memory."""
        return int(profile.memory_bytes * (1 - self._workload.headroom))

    def of_device(self, profile: DeviceProfile, windows: tuple[Window, ...]) -> DeviceMemory:
        """What these windows, all of one device, take there."""
        shape, batch = self._shape, self._workload.n_batch
        fixed = profile.overhead_bytes + 2 * batch * shape.hidden_bytes
        gpus = [0] * len(profile.gpus)
        least, files = 0, 0
        for window in windows:
            for first, last, place in window.runs():
                kept = self.kept[last] - self.kept[first] + shape.scratch_bytes
                weights = self.weights[last] - self.weights[first]
                files += weights
                if last == self._n:
                    kept += shape.scratch_logits_bytes + (shape.output_bytes if place != "s" else 0)
                    files += shape.output_bytes
                if place == "g":
                    gpu = window.gpu if window.gpu < len(gpus) else -1
                    if gpu < 0:
                        return DeviceMemory(fixed, 0, 0, tuple(gpus), files, _no_gpu(profile, window.gpu))
                    if profile.gpus[gpu].is_unified:
                        fixed += kept + weights
                    gpus[gpu] += kept + weights
                    continue
                fixed += kept
                if place == "r":
                    fixed += weights
                else:
                    end = last + 1 if last == self._n else last
                    least = max(least, max(self.room(layer) for layer in range(first, end)))
                    if last - first == self._n and shape.is_tied:  # the model's own file
                        least = max(least, self._with_passing(self.always(last) + shape.layers[-1].largest_bytes))
        return self._judged(profile, fixed, least, tuple(gpus), files)

    def room(self, layer: int) -> int:
        """The least buffer for a streamed layer: the two largest tensors that each token touches, since while one is
        used the next one is read, the small ones that are kept (engine/streaming.least_buffer), and the experts of one
        step, of whichever layer that touches most."""
        return self._with_passing(self._pair(layer))

    def _with_passing(self, pair: int) -> int:
        return pair + self._small + self._most_touched

    def _pair(self, layer: int) -> int:
        layers = self._shape.layers
        if layer == self._n:
            block = min(self._shape.output_block_bytes or self.always(layer), self.always(layer))
            return block + max(layers[-1].largest_bytes, self._shape.output_block_bytes)
        return min(self.always(layer), 2 * layers[layer].largest_bytes or self.always(layer))

    def always(self, layer: int) -> int:
        """Bytes of a streamed layer that every token reads, in whole pages; the output matrix is streamed as if it
        were one more layer (engine/streaming.py)."""
        return self._always[layer]

    def touched(self, layer: int) -> int:
        """Bytes of the routed experts that one step of all sequences reads."""
        return self._touched[layer]

    def _judged(
        self, profile: DeviceProfile, fixed: int, least: int, gpus: tuple[int, ...], files: int
    ) -> DeviceMemory:
        limit, name = self.limit(profile), printable(profile.name, 60)
        buffer = limit - fixed if least else 0
        trouble = None
        if fixed + least > limit:
            trouble = f"{name} would need {(fixed + least) / 1e9:.2f} GB and has {limit / 1e9:.2f} GB for it"
        for gpu, needed in zip(profile.gpus, gpus, strict=True):
            room = int(gpu.memory_bytes * (1 - self._workload.headroom))
            if needed > room:
                trouble = (
                    f"{printable(gpu.name, 60)} of {name} would need {needed / 1e9:.2f} GB, has {room / 1e9:.2f} GB"
                )
        if files > profile.disk.free_bytes:
            trouble = f"{name}'s disk has no room for {files / 1e9:.2f} GB of window files"
        return DeviceMemory(fixed, limit, max(buffer, 0), gpus, files, trouble)


def small_bytes(n_layers: int, hidden_bytes: int) -> int:
    """About what the small tensors of so many layers take, which are kept: two norms each, in whole pages of 4 kB."""
    return PAGES + 2 * n_layers * (hidden_bytes + -hidden_bytes % 4096)


def distinct_share(share: float, n: int) -> float:
    """The share of experts that n tokens touch together, each `share` of them, independently."""
    return 1 - (1 - share) ** n if share < 1 else 1.0


def _no_gpu(profile: DeviceProfile, gpu: int) -> str:
    return f"{printable(profile.name, 60)} has no GPU {gpu}"
