"""Devices that must take part put into starts that lack them. Pure."""

from __future__ import annotations

import math

from homeinfer.cluster.planning.moves import Proposal
from homeinfer.cluster.planning.solve_fill import ORDERS, Filler
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table

_STEPS = (1, 2, 3, 4, 8)
_MOST_WAYS = 60_000
_MOST_FILLED, _MOST_FOUND = 60, 6


class Required:
    """Completes starts; counts its work, so that many devices take seconds and not minutes."""

    def __init__(self, table: Table, filler: Filler) -> None:
        self._table, self._filler = table, filler
        self._left = _MOST_WAYS

    def completed(self, state: State) -> State | None:
        """The state with a window for every required device that has none, each where the plan is the fastest by its
        bound; None where it lacks none or there is no room for one."""
        table = self._table
        lacking = sorted(table.required - {table.slots[owner].device for owner in state.owners})
        if not lacking:
            return None
        found: State | None = state
        for device in lacking:
            found = self._with_device(found, device) if found is not None and self._left > 0 else None
        return found

    def _with_device(self, state: State, device: int) -> State | None:
        table = self._table
        kept = table.required & {table.slots[owner].device for owner in state.owners}
        options: dict[bytes, tuple[float, Proposal]] = {}
        for slot in table.usable:
            if table.slots[slot].device != device:
                continue
            for proposal in self._proposals(state, slot):
                self._left -= 1
                present = {table.slots[owner].device for owner in proposal.owners}
                way = table.way(proposal.owners) if kept <= present else math.inf
                if math.isfinite(way):
                    options[proposal.owners] = (way, proposal)
        ranked = sorted(options.values(), key=lambda option: (option[0], option[1].owners))
        return self._best([proposal for _, proposal in ranked])

    def _best(self, proposals: list[Proposal]) -> State | None:
        """The lowest bound of the first few that fit; the first of all where none does, since those that come next
        may make room."""
        best, found, first = math.inf, 0, None
        chosen: State | None = None
        for proposal in proposals[:_MOST_FILLED]:
            for order in ORDERS[:2]:
                plan = State(proposal.owners, proposal.places)
                first = first or plan
                filled = self._filler.filled(plan, dict.fromkeys(proposal.owners), order)
                bound = math.inf if filled is None else self._table.bound(filled)
                found += math.isfinite(bound)
                if bound < best:
                    best, chosen = bound, filled
            if found >= _MOST_FOUND:
                break
        return chosen or first

    def _proposals(self, state: State, slot: int) -> list[Proposal]:
        """A window of some layers for this slot, at the ends and in the middle of every window."""
        n_layers = self._table.n_layers
        edges = {edge for _, first, last in state.windows() for edge in (first, (first + last) // 2, last)}
        edges |= set(range(n_layers + 1)) if n_layers <= 2 * len(_STEPS) else set()
        found = []
        for edge in sorted(edges):
            for step in _STEPS:
                for first in (edge, edge - step):
                    if first >= 0 and first + step <= n_layers:
                        owners = state.owners[:first] + bytes([slot]) * step + state.owners[first + step :]
                        found.append(Proposal(owners, state.places, (slot,)))
        return found
