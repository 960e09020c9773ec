"""The same layers for everyone, in several rounds: what is streamed can be read while others compute. Pure."""

from __future__ import annotations

from homeinfer.cluster.planning.solve_state import State
from homeinfer.cluster.planning.solve_table import Table


def with_rounds(state: State, rounds: int, table: Table) -> State:
    """Each slot's layers in so many equal windows, in the order in which slots come first; the head's last window
    stays the last. Places are to be filled in."""
    n_layers, last = table.n_layers, table.problem.constraints.private_last
    order = tuple(dict.fromkeys(state.owners))
    if len(order) == 1:
        return state
    counts = {slot: state.owners.count(slot) for slot in order}
    end = min(last, counts[order[0]] - table.problem.constraints.private_first)
    counts[order[0]] -= max(end, 0)
    owners = bytearray()
    for index in range(rounds):
        for slot in order:
            owners += bytes([slot]) * (counts[slot] * (index + 1) // rounds - counts[slot] * index // rounds)
    owners += bytes([order[0]]) * (n_layers - len(owners))
    return State(bytes(owners), state.places)


def count_rounds(owners: tuple[str, ...]) -> int:
    """How often a token comes by the device with the most windows; the head's last window is no round of its own.

    owners: the device of each window in ring order.
    """
    if len(owners) == 1:
        return 1
    return max(owners[:-1].count(owner) for owner in owners[:-1])
