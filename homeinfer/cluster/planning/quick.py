"""What a plan becomes when something about its problem changes, without searching all over again. Pure."""

from __future__ import annotations

import math
from itertools import islice

from homeinfer.cluster.planning.plan import Ring
from homeinfer.cluster.planning.problem import Problem
from homeinfer.cluster.planning.simulate import Simulator
from homeinfer.cluster.planning.solve_fill import ORDERS, Filler
from homeinfer.cluster.planning.solve_search import Judge, descend
from homeinfer.cluster.planning.solve_state import State, to_state
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
    judge, filler = Judge(table, simulator, simulations), Filler(problem, table.slots, table.memory)
    return adapted(judge, filler, ring, starts_too=True)[0]


def adapted(judge: Judge, filler: Filler, ring: Ring, *, starts_too: bool) -> tuple[float, State | None]:
    """The same with the plan itself, as far as the judge's effort goes; (math.inf, None) where there is none.

    starts_too: looks at starts of the search even if the plan can be with its layers placed anew.
    """
    table = judge.table
    state = to_state(ring, table.slots, table.names)
    filled = (filler.filled(state, dict.fromkeys(state.owners), order) for order in ORDERS)
    again = (state, *(one for one in filled if one is not None))
    best = None if starts_too else judge.best_of(again, math.inf)
    if best is None:
        best = judge.best_of((*again, *islice(starts(table, filler), _MOST_STARTS)), math.inf)
    return (math.inf, None) if best is None else descend(judge, filler, best[1])


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
