"""Bounds of the time to the first token: no device and no link can be done earlier than with its own work. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from homeinfer.cluster.planning.simulate import CHUNKS, Simulator
from homeinfer.cluster.planning.solve_state import Slot

FASTEST = "*"
"""Each layer in the place where it is the fastest."""
Sums = list[dict[str, list[float]]]
"""Milliseconds of all layers before each: [slot][place][layer]."""


class _Chunks(NamedTuple):
    """A prompt in so many chunks: of all of them, of the first and of the last one, and how long these two are."""

    n: int
    whole: Sums
    first: Sums
    last: Sums
    ends: tuple[int, int]


class _Hop(NamedTuple):
    """Milliseconds of delay and of the wire for each token."""

    delay: float
    token: float


class PromptBounds:
    """For plans of one problem."""

    def __init__(self, simulator: Simulator, slots: tuple[Slot, ...], places: Sequence[Iterable[str]]) -> None:
        """places: of each slot, those that were timed."""
        problem = simulator.problem
        work = problem.workload
        self._prompt = min(work.prompt_tokens, work.n_ctx)
        profiles = [problem.devices[slot.device] for slot in slots]
        costs = [simulator.costs[profile.name] for profile in profiles]
        self._device = [slot.device for slot in slots]
        self._lead = [profile.window_ms for profile in profiles]
        self._receive = [profile.hop_ms for profile in profiles]
        self._output = [
            {place: cost.output_ms(place, slot.gpu, 1) or 0.0 for place in own}
            for slot, cost, own in zip(slots, costs, places, strict=True)
        ]
        for own in self._output:
            own[FASTEST] = min(own.values(), default=0.0)
        self._hops = [[_Hop(*_way(simulator, one.name, other.name)) for other in profiles] for one in profiles]

        def sums(n: int, behind: int) -> Sums:
            return [
                {place: cost.chunk_sums(place, slot.gpu, n, behind) for place in own}
                for slot, cost, own in zip(slots, costs, places, strict=True)
            ]

        self._sizes = [
            _chunks([(min(size, self._prompt - at), at) for at in range(0, self._prompt, size)], sums)
            for size in sorted({min(size, self._prompt, work.n_batch) for size in (*CHUNKS, self._prompt)})
        ]

    def least(self, runs: Sequence[tuple[int, int, int, str]]) -> float:
        """Milliseconds that the first token of a plan with these runs (slot, first, last, place) takes at least."""
        return min(self._least(runs, chunks) for chunks in self._sizes)

    def _least(self, runs: Sequence[tuple[int, int, int, str]], chunks: _Chunks) -> float:
        """The first chunk's way to a device or link, all that is done there, the last chunk's way on from there."""
        busy, before, after = dict[object, float](), dict[object, float](), dict[object, float]()
        come = gone = 0.0
        at = -1
        for slot, first, last, place in runs:
            device, lead = self._device[slot], self._lead[slot]
            if at not in (-1, slot):
                hop, receive = self._hops[at][slot], self._receive[slot]
                link = (self._device[at], device)
                before.setdefault(link, come)
                busy[link] = busy.get(link, 0.0) + hop.token * self._prompt
                gone += hop.token * chunks.ends[1]
                after[link] = gone
                come += hop.token * chunks.ends[0] + hop.delay
                before.setdefault(device, come)
                busy[device] = busy.get(device, 0.0) + receive * chunks.n
                come, gone = come + receive, gone + hop.delay + receive
            before.setdefault(device, come)
            whole, begin, end = chunks.whole[slot][place], chunks.first[slot][place], chunks.last[slot][place]
            busy[device] = busy.get(device, 0.0) + lead * chunks.n + whole[last] - whole[first]
            come += lead + begin[last] - begin[first]
            gone += lead + end[last] - end[first]
            after[device] = gone
            at = slot
        output = self._output[at][runs[-1][3]]
        device, gone = self._device[at], gone + output
        busy[device] += output
        after[device] = gone
        return max(before[one] + busy[one] + gone - after[one] for one in busy)


def _way(simulator: Simulator, sender: str, receiver: str) -> tuple[float, float]:
    found = simulator._hop(sender, receiver)
    return found.latency_ms, found.token_ms


def _chunks(parts: list[tuple[int, int]], sums: Callable[[int, int], Sums]) -> _Chunks:
    """parts: tokens of each chunk, and how many are before it."""
    each = [sums(n, behind) for n, behind in parts]
    whole: Sums = [
        {place: [sum(layer) for layer in zip(*(one[slot][place] for one in each), strict=True)] for place in own}
        for slot, own in enumerate(each[0])
    ]
    found = _Chunks(len(parts), whole, each[0], each[-1], (parts[0][0], parts[-1][0]))
    return found._replace(whole=_with_fastest(whole), first=_with_fastest(found.first), last=_with_fastest(found.last))


def _with_fastest(sums: Sums) -> Sums:
    return [own | {FASTEST: fastest(own)} for own in sums]


def fastest(sums: dict[str, list[float]]) -> list[float]:
    """Milliseconds of all layers before each, each layer where it is fastest."""
    layers = zip(*([end - begin for begin, end in pairwise(one)] for one in sums.values()), strict=True)
    return [0.0, *accumulate(min(layer) for layer in layers)]
