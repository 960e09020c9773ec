"""Every plan of a small instance, to judge the solver by: ring orders, windows, places. Pure; for tests and scripts.

Nothing here is shared with the solver. Plans are left out only when their way around the ring, or one disk's reads for
each token, already take as long as the best plan known: no simulation can be below that (latency, one sequence).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise, product

import msgspec

from homeinfer.cluster.planning.memory import MemoryModel
from homeinfer.cluster.planning.plan import Ring, Window
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator

MOST_WINDOWS = 7
"""A head and two others three times around, and the head's last window."""
MOST_RUNS = 3

Spans = tuple[tuple[int, int], ...]


class Best(msgspec.Struct, frozen=True):
    """The best plan of all (None where `known` was not beaten); plans: how many were simulated."""

    value: float
    ring: Ring | None
    plans: int


class _Option(msgspec.Struct, frozen=True):
    """One device's windows with places: milliseconds of its part of the way around, and of its disk."""

    way_ms: float
    disk_ms: float
    windows: tuple[Window, ...]


def best_plan(problem: Problem, simulator: Simulator, known: float = math.inf) -> Best:
    """The plan with the least TPOT, for one sequence and devices with at most one GPU.

    known: a value that some plan has, so that only better ones are looked for.
    """
    search = _Search(problem, simulator, known)
    layouts = [(search.least(layout), layout) for layout in _layouts(problem)]
    for least, layout in sorted(layouts):
        if least < search.best:
            search.try_all(layout)
    return Best(search.best, search.ring, search.plans)


class _Search:
    def __init__(self, problem: Problem, simulator: Simulator, known: float) -> None:
        self.problem, self.simulator = problem, simulator
        self.best, self.plans = known, 0
        self.ring: Ring | None = None
        self._memory = MemoryModel(problem)
        self._texts: dict[tuple[int, int, int], list[tuple[float, str]]] = {}
        self._options: dict[tuple[int, Spans], tuple[float, list[_Option]]] = {}
        n_layers, behind = len(problem.shape.layers), problem.workload.prompt_tokens
        self._sums: list[dict[str, list[float]]] = []
        for device in problem.devices:
            cost = simulator.costs[device.name]
            self._sums.append(
                {
                    place: cost.step_sums(place, 0, 1, behind)
                    for place in ("r", "s", "g")
                    if (place != "g" or device.gpus) and cost.has_times(0, n_layers, place, 0)
                }
            )

    def least(self, layout: tuple[tuple[int, int, int], ...]) -> float:
        """Milliseconds that a layout takes at least, wherever its layers are."""
        return (
            self._hops(layout)
            + sum(self._window_texts(*window)[0][0] for window in layout if self._window_texts(*window))
            + (math.inf if any(not self._window_texts(*window) for window in layout) else 0.0)
        )

    def try_all(self, layout: tuple[tuple[int, int, int], ...]) -> None:
        spans: dict[int, list[tuple[int, int]]] = {}
        least: dict[int, float] = {}
        for device, first, last in layout:
            spans.setdefault(device, []).append((first, last))
            least[device] = least.get(device, 0.0) + self._window_texts(device, first, last)[0][0]
        hops = self._hops(layout)
        options = []
        for device, own in spans.items():
            room = self.best - hops - sum(ms for other, ms in least.items() if other != device)
            found = self._device_options(device, tuple(own), room)
            if not found:
                return
            options.append(found)
        self._combine(options, 0, hops, ())

    def _combine(self, options: list[list[_Option]], at: int, way: float, windows: tuple[Window, ...]) -> None:
        if at == len(options):
            ring = Ring(tuple(sorted(windows, key=lambda window: window.first)))
            self.plans += 1
            value = self.simulator.value(ring)
            if value < self.best:
                self.best, self.ring = value, ring
            return
        rest = sum(found[0].way_ms for found in options[at + 1 :])
        for option in options[at]:
            if way + option.way_ms + rest >= self.best:
                break
            if option.disk_ms < self.best:
                self._combine(options, at + 1, way + option.way_ms, windows + option.windows)

    def _device_options(self, device: int, spans: Spans, room: float) -> list[_Option]:
        """What fits, the fastest first, as far as it takes less than `room` milliseconds."""
        key = (device, spans)
        known = self._options.get(key)
        if known is not None and known[0] >= room:
            return known[1]
        lists = [self._window_texts(device, *span) for span in spans]
        found = []
        for way_ms, texts in _sums_below(lists, room):
            option = self._option(device, spans, way_ms, texts)
            if option is not None:
                found.append(option)
        found.sort(key=lambda option: option.way_ms)
        self._options[key] = (room, found)
        return found

    def _option(self, device: int, spans: Spans, way_ms: float, texts: tuple[str, ...]) -> _Option | None:
        profile, memory = self.problem.devices[device], self._memory
        windows = tuple(
            Window(profile.name, first, last, text) for (first, last), text in zip(spans, texts, strict=True)
        )
        needed = memory.of_device(profile, windows)
        if needed.trouble is not None:
            return None
        layers = [
            layer for window in windows for layer, place in enumerate(window.places, window.first) if place == "s"
        ]
        disk_ms, experts = 0.0, sum(self.problem.shape.layers[layer].expert_bytes for layer in layers)
        if layers and layers[-1] == len(self.problem.shape.layers) - 1:
            layers.append(layers[-1] + 1)  # the output matrix is streamed with the last layer
        always = sum(memory.always(layer) for layer in layers)
        passing = max((memory.touched(layer) for layer in layers), default=0)
        if always + experts > needed.buffer and always > needed.buffer - passing:
            disk_ms = 1e3 * always / profile.disk.layer_bytes_per_s
        return _Option(way_ms, disk_ms, windows) if disk_ms < self.best else None

    def _window_texts(self, device: int, first: int, last: int) -> list[tuple[float, str]]:
        """All ways to place a window's layers in at most MOST_RUNS runs, with their milliseconds, the fastest first."""
        key = (device, first, last)
        if key not in self._texts:
            self._texts[key] = sorted(self._placings(device, first, last))
        return self._texts[key]

    def _placings(self, device: int, first: int, last: int) -> Iterator[tuple[float, str]]:
        profile, sums, shape = self.problem.devices[device], self._sums[device], self.problem.shape
        cost = self.simulator.costs[profile.name]
        for n_runs in range(1, MOST_RUNS + 1):
            for cuts in combinations(range(first + 1, last), n_runs - 1):
                edges = (first, *cuts, last)
                runs = list(pairwise(edges))
                if not all(shape.may_cut(*run) for run in runs):
                    continue
                for places in product(sums, repeat=n_runs):
                    if any(one == other for one, other in pairwise(places)):
                        continue
                    ms = n_runs * profile.window_ms
                    ms += sum(
                        sums[place][end] - sums[place][begin] for place, (begin, end) in zip(places, runs, strict=True)
                    )
                    if last == len(shape.layers):
                        ms += cost.output_ms(places[-1], 0, 1) or 0.0
                    yield ms, "".join(place * (end - begin) for place, (begin, end) in zip(places, runs, strict=True))

    def _hops(self, layout: tuple[tuple[int, int, int], ...]) -> float:
        total = 0.0
        for (one, *_), (other, *_) in pairwise(layout):
            sender, receiver = self.problem.devices[one], self.problem.devices[other]
            way = self.simulator._hop(sender.name, receiver.name)
            total += way.latency_ms + way.token_ms + receiver.hop_ms
        return total


def _sums_below(lists: list[list[tuple[float, str]]], room: float) -> Iterator[tuple[float, tuple[str, ...]]]:
    """One text of each (sorted) list, where their milliseconds together are below `room`."""
    if not lists:
        yield 0.0, ()
        return
    rest = sum(texts[0][0] if texts else math.inf for texts in lists[1:])
    for ms, text in lists[0]:
        if ms + rest >= room:
            return
        for more, texts in _sums_below(lists[1:], room - ms):
            yield ms + more, (text, *texts)


def _layouts(problem: Problem) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """(device, first, last) for each window of every ring, the head first and last."""
    shape, limits = problem.shape, problem.constraints
    n_layers = len(shape.layers)
    head = next(index for index, device in enumerate(problem.devices) if device.name == problem.head)
    usable = [i for i, device in enumerate(problem.devices) if device.name not in limits.forbidden]
    required = {i for i, device in enumerate(problem.devices) if device.name in limits.required}
    for n_windows in range(1, min(MOST_WINDOWS, n_layers) + 1):
        for order in product(usable, repeat=n_windows):
            if order[0] != head or order[-1] != head or not required <= set(order):
                continue
            if any(one == other for one, other in pairwise(order)):
                continue
            for cuts in combinations(range(1, n_layers), n_windows - 1):
                edges = (0, *cuts, n_layers)
                if n_windows > 1 and (cuts[0] < limits.private_first or cuts[-1] > n_layers - limits.private_last):
                    continue
                if all(shape.may_cut(*span) for span in pairwise(edges)):
                    yield tuple(zip(order, edges[:-1], edges[1:], strict=True))
