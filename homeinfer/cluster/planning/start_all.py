"""Plans to start the search from: constructed, averaged (MILP), and everybody else's rules. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

from homeinfer.cluster.planning.baselines import BASELINES, baseline
from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.solve_fill import ORDERS, Filler
from homeinfer.cluster.planning.solve_state import State, to_state
from homeinfer.cluster.planning.solve_table import Table
from homeinfer.cluster.planning.start_cut import one_slot_each, with_rounds
from homeinfer.cluster.planning.start_milp import average_counts
from homeinfer.cluster.planning.start_path import Paths
from homeinfer.cluster.planning.start_required import Required
from homeinfer.cluster.planning.start_rounds import round_starts

_MOST_DEVICES = 20
_LIMITS = 5


def starts(table: Table, filler: Filler) -> Iterator[State]:
    """States that may be feasible; some come more than once. Those that lack a required device come with it too, and
    all of them in as many rounds as are wanted."""
    if not table.rounds:
        yield from _complete(table, filler)
        return
    seen = set[bytes]()
    for state in _complete(table, filler):
        cut = with_rounds(one_slot_each(state, table), table.rounds, table)
        if cut is not None and cut.owners not in seen:
            seen.add(cut.owners)
            yield from in_all_orders(filler, cut)


def in_all_orders(filler: Filler, state: State) -> Iterator[State]:
    """A state's windows filled in each way that fits."""
    for order in ORDERS:
        filled = filler.filled(state, dict.fromkeys(state.owners), order)
        if filled is not None:
            yield filled


def _complete(table: Table, filler: Filler) -> Iterator[State]:
    required = Required(table, filler)
    if table.required:
        streamed = State(bytes([table.heads[0]]) * table.n_layers, "s" * table.n_layers)
        completed = required.completed(streamed)
        if completed is not None:
            yield completed
    for state in _starts(table, filler):
        yield state
        completed = required.completed(state)
        if completed is not None:
            yield completed


def _starts(table: Table, filler: Filler) -> Iterator[State]:
    yield from _alone(table, filler)
    for name in BASELINES:
        ring: Ring | None = baseline(name, table.problem)
        if ring is not None:
            yield to_state(ring, table.slots, table.names)
    paths = Paths(table, filler)
    for head in table.heads:
        for order in _orders(table, head):
            yield from _cut_best(paths, head, order)
    yield from round_starts(table)


def _alone(table: Table, filler: Filler) -> Iterator[State]:
    for head in table.heads:
        for order in ORDERS[:2]:
            alone = State(bytes([head]) * table.n_layers, "s" * table.n_layers)
            found = filler.filled(alone, (head,), order)
            if found is not None:
                yield found


def _cut_best(paths: Paths, head: int, order: Sequence[int]) -> Iterator[State]:
    """With all reads on the way; with reads for nothing up to what the plan before needed, halved again and again."""
    limit: float | None = None
    for _ in range(_LIMITS):
        found, reads = paths.best(head, order, limit)
        if found is None:
            return
        yield found
        if limit is None:
            limit = 1e12
        elif reads <= 0.0:
            return
        else:
            limit = reads / 2


def _orders(table: Table, head: int) -> Iterator[tuple[int, ...]]:
    others = [slot for slot in table.usable if table.slots[slot].device != table.slots[head].device]
    if len(others) <= 3:
        yield from permutations(others)
        return
    counts = average_counts(table) or {}
    chosen = [slot for slot in others if slot in counts]
    if 0 < len(chosen) <= 3:
        yield from permutations(chosen)
    elif chosen:
        yield _nearest(table, head, chosen)
    fast = sorted(others, key=lambda slot: (_speed(table, slot), slot))[:_MOST_DEVICES]
    yield _nearest(table, head, fast)
    yield tuple(fast)
    near = sorted(others, key=lambda slot: (table.step.hops[head][slot], slot))[:_MOST_DEVICES]
    yield tuple(near)
    roomy = sorted(others, key=lambda slot: (-_room(table, slot), slot))[:_MOST_DEVICES]
    yield _nearest(table, head, roomy)


def _speed(table: Table, slot: int) -> float:
    return min(sums[-1] for sums in table.step.sums[slot].values())


def _room(table: Table, slot: int) -> int:
    where = table.slots[slot]
    profile = table.problem.devices[where.device]
    own = profile.gpus[where.gpu].memory_bytes if where.has_gpu and not profile.gpus[where.gpu].is_unified else 0
    return profile.memory_bytes + own


def _nearest(table: Table, head: int, slots: Sequence[int]) -> tuple[int, ...]:
    """Each after the one from which the hop to it is the shortest."""
    order, left, at = [], list(slots), head
    while left:
        at = min(left, key=lambda slot: (table.step.hops[at][slot], slot))
        left.remove(at)
        order.append(at)
    return tuple(order)
