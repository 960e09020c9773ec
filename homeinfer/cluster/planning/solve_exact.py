"""Branch and bound over runs of layers: the best plan of a small instance, or a better one than known. Pure.

A partial plan holds layers [0, n). Its bounds: its way so far and the shortest way on, if memory were no matter and
with memories and disks at a price (solve_bounds); the reads of each disk. None is above what the simulator says; what
exceeds a memory is cut off. For one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import numpy as np

from homeinfer.cluster.planning.solve_bounds import Prices, Relaxed
from homeinfer.cluster.planning.solve_search import LEAST_GAIN, Judge
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Held

_PRICE_ROUNDS = 1000
Ways = tuple[float, ...]
"""Milliseconds so far, for each set of prices."""


class _Rates:
    """One set of prices: begins[before][choice], sums[choice][layer], rest[choice][layer]."""

    def __init__(self, relaxed: Relaxed, prices: Prices | None) -> None:
        values = np.zeros(relaxed.n_resources) if prices is None else prices.values
        layers, leads, _ = relaxed.priced(values)
        self._prices = prices
        n_layers = relaxed.table.n_layers
        # what may not be there is infinite, which differences of sums can't be
        finite = np.where(np.isfinite(layers[:, :n_layers]), layers[:, :n_layers], 0.0)
        self.sums = np.hstack([np.zeros((len(leads), 1)), finite.cumsum(axis=1)]).tolist()
        self.rest = relaxed.rest(layers, leads)[0].tolist()
        self.begins = np.vstack([relaxed.hops + leads[None, :], leads[None, :]]).tolist()

    def given(self, limit: float) -> float:
        return 0.0 if self._prices is None else self._prices.given(limit)


class Exact:
    """One search. nodes: how many partial plans it may look at."""

    def __init__(self, judge: Judge, nodes: int) -> None:
        self._judge, self._table = judge, judge.table
        self.nodes = nodes
        self._choices: tuple[tuple[int, str], ...] = ()
        self._rates: list[_Rates] = []
        self.best = math.inf
        self.state: State | None = None

    def run(self, best: float, state: State | None) -> tuple[float, State | None]:
        """The best plan found, which is the one given if none is better; `nodes` is 0 when it ran out of them."""
        self.best, self.state = best, state
        cases = self._cases()
        for rank, streaming in enumerate(cases):
            prices = Prices(Relaxed(self._table, streaming), self.best, _PRICE_ROUNDS)
            if prices.least < self._limit:
                kept = self.nodes - self.nodes // (len(cases) - rank)
                self.nodes -= kept
                self._search(prices)
                self.nodes += kept
        return self.best, self.state

    def _cases(self) -> list[frozenset[int]]:
        """Every set of devices that may stream, the smallest, which are searched the fastest, first."""
        table = self._table
        devices = sorted({table.slots[slot].device for slot in table.usable if "s" in table.step.sums[slot]})
        return [frozenset(found) for count in range(len(devices) + 1) for found in combinations(devices, count)]

    def _search(self, prices: Prices) -> None:
        self._choices = prices.relaxed.choices
        self._rates = [_Rates(prices.relaxed, prices), _Rates(prices.relaxed, None)]
        n_devices, beginning = len(self._table.names), len(self._choices)
        self._extend(0, beginning, (0.0, 0.0), [()] * n_devices, [0.0] * n_devices, b"", "")

    def _extend(
        self, first: int, before: int, ways: Ways, held: list[Held], reads: list[float], owners: bytes, places: str
    ) -> None:
        table = self._table
        if first == table.n_layers:
            self._try(State(owners, places))
            return
        limit = self.best
        found = sorted(self._runs(first, before, ways), key=lambda run: run[0])
        for _bound, choice, last, reached in found:
            if self.nodes <= 0:
                return
            if self.best < limit and self._is_hopeless(choice, last, reached):
                continue
            self.nodes -= 1
            slot, place = self._choices[choice]
            device = table.slots[slot].device
            now = self._added(held[device], slot, place, first, last)
            if table.rounds and len(now) > table.rounds + (slot in table.heads):
                continue
            more, waits = table.held_ms(device, now)
            if math.isinf(more):
                continue
            following, busy, disk = list(held), list(reads), table.disk_of[device]
            following[device] = now
            before_ms, waited = table.held_ms(device, held[device])
            busy[disk] += more - before_ms
            if busy[disk] >= self._limit:
                continue
            if waits > waited:
                reached = reached[0] + waits - waited, reached[1] + waits - waited
                if self._is_hopeless(choice, last, reached):
                    continue
            n = last - first
            self._extend(last, choice, reached, following, busy, owners + bytes([slot]) * n, places + place * n)

    @property
    def _limit(self) -> float:
        return self.best * (1 - LEAST_GAIN)

    def _is_hopeless(self, choice: int, last: int, reached: Ways) -> bool:
        limit = self._limit
        return any(
            way + rates.rest[choice][last] >= limit + rates.given(limit)
            for way, rates in zip(reached, self._rates, strict=True)
        )

    def _try(self, state: State) -> None:
        if self._table.is_allowed(state.owners):
            value = self._judge.value(state)
            if value < self._limit:
                self.best, self.state = value, state

    def _runs(self, first: int, before: int, ways: Ways) -> Iterator[tuple[float, int, int, Ways]]:
        """Runs that may come next: (bound, choice, end, the ways with it)."""
        table, shape = self._table, self._table.shape
        limits, n_layers = table.problem.constraints, table.n_layers
        priced, plain = self._rates
        limit, priced_limit = self._limit, self._limit + priced.given(self._limit)
        if math.isinf(limit):
            priced_limit = math.inf
        for choice, (slot, _place) in enumerate(self._choices):
            if choice == before or (slot not in table.heads and first < limits.private_first):
                continue
            start, plain_start = ways[0] + priced.begins[before][choice], ways[1] + plain.begins[before][choice]
            if math.isinf(plain_start):
                continue
            sums, plain_sums = priced.sums[choice], plain.sums[choice]
            rest, plain_rest = priced.rest[choice], plain.rest[choice]
            start, plain_start = start - sums[first], plain_start - plain_sums[first]
            final = n_layers - (0 if slot in table.heads else limits.private_last)
            for last in range(first + 1, final + 1):
                bound = start + sums[last] + rest[last]
                if bound >= priced_limit or plain_start + plain_sums[last] + plain_rest[last] >= limit:
                    continue
                if shape.may_cut(first, last):
                    yield bound, choice, last, (start + sums[last], plain_start + plain_sums[last])

    def _added(self, held: Held, slot: int, place: str, first: int, last: int) -> Held:
        """The device's windows with one run more."""
        text, gpu = place * (last - first), self._table.slots[slot].gpu
        if held and held[-1][1] == first:
            begin, _, texts, _ = held[-1]
            return (*held[:-1], (begin, last, texts + text, gpu))
        return (*held, (first, last, text, gpu))
