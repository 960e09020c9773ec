"""Why a device is left out, in words, with numbers: what the best plan with it would cost. Pure."""

from __future__ import annotations

import itertools
import math

from homeinfer.cluster.planning.moves import Moves
from homeinfer.cluster.planning.solve_search import Judge
from homeinfer.cluster.planning.solve_state import State

_SAME_MS = 0.05
_WHAT = {"latency": "each token", "throughput": "each token of all answers together", "ttft": "the first token"}


def with_device(judge: Judge, moves: Moves, state: State, device: int) -> tuple[float, State] | None:
    """The best plan among the neighbours of a plan in which a device takes part; None where it can't."""
    slots = [slot for slot in judge.table.usable if judge.table.slots[slot].device == device]
    found: tuple[float, State] | None = None
    for slot in slots:
        better = judge.best_proposal(moves, moves.with_slot(state, slot), found[0] if found else math.inf)
        found = better or found
    return found


def reason(judge: Judge, state: State, best: float, device: int, found: tuple[float, State] | None) -> str:
    """One line for a device that the plan leaves out."""
    table = judge.table
    name = table.names[device]
    if name in table.problem.constraints.forbidden:
        return "you ruled it out"
    if found is None:
        return _no_room(judge, device)
    value, other = found
    what = _WHAT[table.problem.workload.objective]
    slower = value - best
    if slower < _SAME_MS:
        return f"would not make {what} faster: {_ms(best)} with it and {_ms(best)} without"
    return f"would make {what} {_ms(slower)} slower: {_causes(judge, state, other, device)}"


def _causes(judge: Judge, state: State, other: State, device: int) -> str:
    """What its hops and its layers cost, against who has those layers now."""
    table, step = judge.table, judge.table.step
    hops = _hops(judge, other) - _hops(judge, state)
    mine = [i for i, owner in enumerate(other.owners) if table.slots[owner].device == device]
    slot = other.owners[mine[0]]
    own = sum(step.sums[slot][other.places[i]][i + 1] - step.sums[slot][other.places[i]][i] for i in mine)
    own += table.lead[slot]
    before = sum(
        step.sums[state.owners[i]][state.places[i]][i + 1] - step.sums[state.owners[i]][state.places[i]][i]
        for i in mine
    )
    holders = list(dict.fromkeys(table.names[table.slots[state.owners[i]].device] for i in mine))
    layers = "its one layer takes" if len(mine) == 1 else f"its {len(mine)} layers take"
    now = f"{layers} {_ms(own)} against {_ms(before)} on {' and '.join(holders[:2])}"
    return f"its link costs {_ms(hops)}, {now}" if hops >= _SAME_MS else now


def _hops(judge: Judge, state: State) -> float:
    windows = [slot for slot, _, _ in state.windows()]
    return sum(judge.table.step.hops[one][other] for one, other in itertools.pairwise(windows))


def _no_room(judge: Judge, device: int) -> str:
    table = judge.table
    profile = table.problem.devices[device]
    least = min(table.memory.room(layer) for layer in range(table.n_layers))
    batch = 2 * table.problem.workload.n_batch * table.shape.hidden_bytes
    room = table.memory.limit(profile) - profile.overhead_bytes - table.shape.scratch_bytes - batch
    if least > room:
        return (
            f"has no room for a single layer: that takes {least / 1e9:.2f} GB and {max(room, 0) / 1e9:.2f} GB are left"
        )
    least = min(one.nbytes for one in table.shape.layers)
    if profile.disk.free_bytes < least:
        free = profile.disk.free_bytes / 1e9
        return f"its disk has room for {free:.2f} GB, the smallest layer takes {least / 1e9:.2f} GB"
    return "no plan with it fits into all memories"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 9.95 else f"{value:.1f} ms"
