"""Where a ring of given devices is cut best if each has one window, the head two: dynamic programming. Pure.

The milliseconds of a window are those of its layers in the places that they get when filled in, and of its reads from
disk: either added (nothing is read ahead), or free up to a limit (everything is) and forbidden beyond.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from homeinfer.cluster.planning.solve_fill import Filler
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table

Matrix = npt.NDArray[np.float64]
_MOST_EDGES = 33


class Paths:
    """Costs of windows between edges (layers where the dynamic program may cut), kept for all orders."""

    def __init__(self, table: Table, filler: Filler) -> None:
        self._table, self._filler = table, filler
        self.edges = _edges(table)
        self._windows: dict[int, tuple[Matrix, Matrix]] = {}
        self._heads: dict[int, tuple[Matrix, Matrix]] = {}

    def best(self, head: int, order: Sequence[int], limit: float | None) -> tuple[State | None, float]:
        """The cheapest ring of the head and some of the others in this order (None where nothing fits), and the
        milliseconds for which its busiest device reads for each token.

        limit: milliseconds that each device may read for each token, or None to add all reads to the way.
        """
        ways, reads = self._head_windows(head)
        ends = _priced(ways, reads, limit)
        n_edges = len(self.edges)
        arrived: list[Matrix] = []
        came: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
        hops = self._table.step.hops
        best, trace = float(ends.diagonal().min()), (-1, -1, -1)
        if not math.isfinite(best):
            best = math.inf
        for rank, slot in enumerate(order):
            window = _priced(*self._slot_windows(slot), limit)
            before = np.full((n_edges, n_edges), np.inf)
            np.fill_diagonal(before, hops[head][slot])
            source = np.full((n_edges, n_edges), -1)
            for other in range(rank):
                reached = arrived[other] + hops[order[other]][slot]
                source = np.where(reached < before, other, source)
                before = np.minimum(before, reached)
            sums = before[:, :, None] + window[None, :, :]
            through = sums.argmin(axis=1)
            arrived.append(sums.min(axis=1))
            came.append((source, through))
            total = arrived[rank] + ends + hops[slot][head]
            first, last = np.unravel_index(int(total.argmin()), total.shape)
            if total[first, last] < best:
                best, trace = float(total[first, last]), (rank, int(first), int(last))
        if not math.isfinite(best):
            return None, 0.0
        return self._traced(head, order, came, trace)

    def _traced(
        self,
        head: int,
        order: Sequence[int],
        came: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
        trace: tuple[int, int, int],
    ) -> tuple[State | None, float]:
        rank, first, last = trace
        owners = bytearray([head] * self._table.n_layers)
        reads = float(self._heads[head][1][max(first, 1), max(last, 1)])
        while rank >= 0:
            source, through = came[rank]
            begin = int(through[first, last])
            reads = max(reads, float(self._windows[order[rank]][1][begin, last]))
            for layer in range(self.edges[begin], self.edges[last]):
                owners[layer] = order[rank]
            rank, last = int(source[first, begin]), begin
        state = State(bytes(owners), "s" * self._table.n_layers)
        return self._filler.filled(state, dict.fromkeys(state.owners), "tail"), reads

    def _slot_windows(self, slot: int) -> tuple[Matrix, Matrix]:
        if slot not in self._windows:
            n_edges = len(self.edges)
            ways, reads = np.full((n_edges, n_edges), np.inf), np.zeros((n_edges, n_edges))
            for one in range(1, n_edges - 1):
                for other in range(one + 1, n_edges - 1):
                    span = (self.edges[one], self.edges[other])
                    if self._table.shape.may_cut(*span):
                        ways[one, other], reads[one, other] = self._cost(slot, (span,))
            self._windows[slot] = ways, reads
        return self._windows[slot]

    def _head_windows(self, head: int) -> tuple[Matrix, Matrix]:
        """Costs of [0, first) and [last, end) on the head; the diagonal: of everything there."""
        if head not in self._heads:
            n_edges, n_layers = len(self.edges), self._table.n_layers
            ways, reads = np.full((n_edges, n_edges), np.inf), np.zeros((n_edges, n_edges))
            shape = self._table.shape
            whole = self._cost(head, ((0, n_layers),))
            for one in range(1, n_edges - 1):
                ways[one, one], reads[one, one] = whole
                for other in range(one + 1, n_edges - 1):
                    spans = (0, self.edges[one]), (self.edges[other], n_layers)
                    if shape.may_cut(*spans[0]) and shape.may_cut(*spans[1]):
                        ways[one, other], reads[one, other] = self._cost(head, spans)
            self._heads[head] = ways, reads
        return self._heads[head]

    def _cost(self, slot: int, spans: tuple[tuple[int, int], ...]) -> tuple[float, float]:
        texts = self._filler.fill(slot, spans, "tail")
        if texts is None:
            return math.inf, 0.0
        table, way, streamed = self._table, 0.0, 0
        sums = table.step.sums[slot]
        for (first, last), text in zip(spans, texts, strict=True):
            begin = first
            for layer in range(first + 1, last + 1):
                if layer == last or text[layer - first] != text[begin - first]:
                    place = text[begin - first]
                    way += table.lead[slot] + sums[place][layer] - sums[place][begin]
                    streamed += table.always[layer] - table.always[begin] if place == "s" else 0
                    begin = layer
            if last == table.n_layers:
                way += table.step.output[slot][text[-1]]
        return way, streamed * table.read_ms[table.slots[slot].device]


def _priced(ways: Matrix, reads: Matrix, limit: float | None) -> Matrix:
    return ways + reads if limit is None else np.where(reads <= limit, ways, np.inf)


def _edges(table: Table) -> tuple[int, ...]:
    """Layers to cut at: all of them, or about 32 and the private ones' ends."""
    n_layers, limits = table.n_layers, table.problem.constraints
    first, last = limits.private_first, n_layers - limits.private_last
    stride = max(1, -(-n_layers // _MOST_EDGES))
    inner = {edge for edge in range(stride, n_layers, stride) if first < edge < last}
    inner |= {edge for edge in (first, last) if 0 < edge < n_layers and first <= last}
    return (0, *sorted(inner), n_layers)
