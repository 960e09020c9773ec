"""What a plan becomes when something about its problem changes, without searching all over again. Pure."""

from __future__ import annotations

import math
from itertools import islice

from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve_fill import ORDERS, Filler
from homeinfer.cluster.planning.solve_search import Judge, descend
from homeinfer.cluster.planning.solve_state import to_state
from homeinfer.cluster.planning.solve_table import Table
from homeinfer.cluster.planning.start_all import starts
from homeinfer.errors import HomeinferError

_MOST_STARTS = 12
"""All that stand on the head alone, by everybody else's rules, and along one or two ways around the ring."""


def adapted_value(problem: Problem, ring: Ring, simulations: int) -> float:
    """The objective's value of a plan for `problem` that begins as `ring`, a plan for one like it, with its
    layers placed anew, or as a start of the search (solve): the best of them, moved while that helps and as far as so
    many simulations go. math.inf where that gives no plan.

    A whole search may find better: what this gains is gained at least.
    """
    try:
        simulator = Simulator(problem)
        table = Table(problem, simulator)
    except HomeinferError:
        return math.inf
    filler, judge = Filler(problem, table.slots, table.memory), Judge(table, simulator, simulations)
    state = to_state(ring, table.slots, table.names)
    filled = (filler.filled(state, dict.fromkeys(state.owners), order) for order in ORDERS)
    again = (state, *(one for one in filled if one is not None), *islice(starts(table, filler), _MOST_STARTS))
    best = judge.best_of(again, math.inf)
    return math.inf if best is None else descend(judge, filler, best[1])[0]


def has_plan(problem: Problem, *, in_memory: bool = False) -> bool:
    """Whether there is any plan, or one that streams nothing, by the starts of the search (solve): far quicker than
    the best one."""
    try:
        simulator = Simulator(problem)
        table = Table(problem, simulator)
    except HomeinferError:
        return False
    judge = Judge(table, simulator, 0)
    found = starts(table, Filler(problem, table.slots, table.memory))
    return any(not (in_memory and "s" in state.places) and math.isfinite(judge.value(state)) for state in found)
