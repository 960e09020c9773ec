"""The same devices with about the same layers each, in so many rounds: what is streamed can be read while others
compute, and a user may have asked for them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from homeinfer.cluster.planning.rounds import least_layers
from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table


def with_rounds(state: State, rounds: int, table: Table) -> State | None:
    """Each slot's layers in so many equal windows, cut where the model allows it nearby, in the order in which slots
    come first; the head's last window stays the last. None where that can't be. Places are to be filled in.

    Slots for which there are too few layers are left out, first those that hold the fewest.
    """
    order = _that_have_room(state, rounds, table)
    if len(order) == 1:
        return State(bytes(order) * table.n_layers, state.places)
    slots = (*order * rounds, order[0])
    edges = _allowed(table, slots, (*_wanted(state, rounds, table, order), table.n_layers))
    if edges is None:
        return None
    windows = zip(slots, pairwise(edges), strict=True)
    return State(b"".join(bytes([slot]) * (last - first) for slot, (first, last) in windows), state.places)


def one_slot_each(state: State, table: Table) -> State:
    """The state with all layers of a device on its first slot."""
    first = {table.slots[owner].device: owner for owner in reversed(state.owners)}
    return State(bytes(first[table.slots[owner].device] for owner in state.owners), state.places)


def _that_have_room(state: State, rounds: int, table: Table) -> tuple[int, ...]:
    """Slots in the order in which they come first: the head's, required ones, and those with the most layers."""
    layers, head = Counter(state.owners), state.owners[0]
    ranked = sorted(
        layers, key=lambda slot: (slot != head, table.slots[slot].device not in table.required, -layers[slot], slot)
    )
    most = len(ranked)
    while most > 1 and least_layers(most, rounds) > table.n_layers:
        most -= 1
    return tuple(slot for slot in layers if slot in ranked[:most])


def _wanted(state: State, rounds: int, table: Table, order: tuple[int, ...]) -> list[int]:
    """Where each window but the last should end."""
    limits = table.problem.constraints
    counts = {slot: state.owners.count(slot) for slot in order}
    counts[order[0]] -= max(min(limits.private_last, counts[order[0]] - limits.private_first), 0)
    ends, at = [], 0
    for index in range(rounds):
        for slot in order:
            at += counts[slot] * (index + 1) // rounds - counts[slot] * index // rounds
            ends.append(at)
    return ends


def _allowed(table: Table, slots: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """0 and where each window ends: cuts that the model allows, together the nearest to those that are wanted."""
    n, limits = table.n_layers, table.problem.constraints
    layers = np.arange(n + 1)
    may = np.array([[first < last and table.shape.may_cut(first, last) for last in range(n + 1)] for first in range(n)])
    private = (layers[:n, None] < limits.private_first) | (layers[None, :] > n - limits.private_last)
    cost = np.where(layers == 0, 0.0, np.inf)
    came = []
    for slot, end in zip(slots, wanted, strict=True):
        ways = np.where(may if slot in table.heads else may & ~private, cost[:n, None], np.inf)
        came.append(ways.argmin(axis=0))
        cost = ways.min(axis=0) + np.abs(layers - end)
    if not np.isfinite(cost[n]):
        return None
    edges = [n]
    for before in reversed(came):
        edges.append(int(before[edges[-1]]))
    return tuple(reversed(edges))
